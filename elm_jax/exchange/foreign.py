"""What `import_weights` is given: a checkpoint of a whole model, of an encoder, or an adapter folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from elm_jax.errors import UserError
from elm_jax.folders import read_json
from elm_jax.models.names import bare_name
from elm_jax.weights.files import HF_FOLDER, open_tensors
from elm_jax.weights.llava import ECG_PROJECTOR, is_llava, our_name
from elm_jax.weights.peft import CONFIG as ADAPTER_CONFIG
from elm_jax.weights.peft import WEIGHTS as ADAPTER_WEIGHTS
from elm_jax.weights.published import described
from elm_jax.weights.safetensors import Safetensors
from elm_jax.weights.torch_file import TorchFile

Kind = Literal["elm", "encoder", "adapter"]
TITLES: Mapping[Kind, str] = {
    "elm": "a checkpoint of an ECG-language model",
    "encoder": "a checkpoint of an encoder",
    "adapter": "a PEFT adapter",
}
_LLM = "llm."  # before the language model's names in the reference's checkpoints
_OF_AN_LLM = ("model.embed_tokens.weight", "transformer.wte.weight", "model.decoder.embed_tokens.weight")


@dataclass(frozen=True)
class Foreign:
    """An opened checkpoint; no tensor has been read.

    info: shape and dtype by name, without the prefixes of PyTorch's wrappers. written: that name -> the file's own.
    rest: what else is in the file, which is not read. tensors: by the file's own names. llava: the `config.json` of a
    folder of LLaVA's, whose tensors have in `info` and `written` the names of the reference's checkpoints; else None.
    """

    path: Path
    kind: Kind
    info: Mapping[str, jax.ShapeDtypeStruct]
    written: Mapping[str, str]
    rest: tuple[str, ...]
    tensors: Mapping[str, np.ndarray]
    llava: Mapping[str, Any] | None = None

    @property
    def title(self) -> str:
        """What it is, in words."""
        return TITLES[self.kind]


def open_foreign(path: str | Path) -> Foreign:
    """Open a `.pt`, `.pth`, `.bin` or `.safetensors` file, a folder of safetensors, or an adapter folder.

    Raises UserError for what cannot be read, or is none of these.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(str(path), "no such file or folder", "a checkpoint", "correct the path")
    if path.is_dir() and (path / ADAPTER_CONFIG).is_file():
        return _foreign(path, "adapter", Safetensors(path / ADAPTER_WEIGHTS))
    tensors = open_tensors(path, str(path))
    bare = {bare_name(name) for name in tensors}
    if is_llava(bare):
        if not path.is_dir():
            fix = "give the folder that it is in, with config.json and the tokenizer"
            raise UserError(str(path), "the tensors of a LLaVA model alone", "its folder", fix)
        both = any(name.startswith(ECG_PROJECTOR) for name in bare)
        ours = {our_name(bare_name(name), both): name for name in tensors}
        return replace(_foreign(path, "elm", tensors, ours), llava=read_json(path / "config.json", HF_FOLDER))
    if any(name in bare for name in _OF_AN_LLM):
        fix = "no import is needed: save it with save_pretrained and set --config.llm.name to the folder"
        raise UserError(str(path), "a language model alone", "an ECG-language model, an encoder or an adapter", fix)
    return _foreign(path, "elm" if any(name.startswith(_LLM) for name in bare) else "encoder", tensors)


def _foreign(
    path: Path, kind: Kind, tensors: Mapping[str, np.ndarray], named: Mapping[str, str] | None = None
) -> Foreign:
    """`named`: the names that tensors go by -> their own."""
    specs, written = described(tensors), dict(named or {})
    for name in tensors if named is None else ():
        if bare_name(name) in written:
            found = f"both {written[bare_name(name)]} and {name}"
            raise UserError(str(path), found, "one of them", "save the state dict of the bare module")
        written[bare_name(name)] = name
    if not written:
        raise UserError(str(path), "no tensors", "tensors by name", "save its state dict with torch.save")
    info = {bare: jax.ShapeDtypeStruct(specs[n].shape, specs[n].dtype) for bare, n in written.items()}
    return Foreign(path, kind, info, written, tensors.rest if isinstance(tensors, TorchFile) else (), tensors)
