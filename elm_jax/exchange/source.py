"""What `import_weights` is given: a checkpoint of a whole model, of an encoder, or an adapter folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from elm_jax.errors import UserError
from elm_jax.models.names import bare_name
from elm_jax.weights.load import open_checkpoint
from elm_jax.weights.peft import CONFIG as ADAPTER_CONFIG
from elm_jax.weights.peft import WEIGHTS as ADAPTER_WEIGHTS
from elm_jax.weights.safetensors import Safetensors
from elm_jax.weights.torch_file import SUFFIXES, TorchFile

Kind = Literal["elm", "encoder", "adapter"]
TITLES: Mapping[Kind, str] = {
    "elm": "a checkpoint of an ECG-language model",
    "encoder": "a checkpoint of an encoder",
    "adapter": "a PEFT adapter",
}
_LLM = "llm."  # before the language model's names in the reference's checkpoints
_OF_AN_LLM = ("model.embed_tokens.weight", "transformer.wte.weight", "model.decoder.embed_tokens.weight")


@dataclass(frozen=True)
class Source:
    """An opened checkpoint; no tensor has been read.

    info: shape and dtype by name, without the prefixes of PyTorch's wrappers. written: that name -> the file's own.
    rest: what else is in the file, which is not read.
    """

    path: Path
    kind: Kind
    info: Mapping[str, jax.ShapeDtypeStruct]
    written: Mapping[str, str]
    rest: tuple[str, ...]
    _tensors: Mapping[str, np.ndarray]

    def read(self, name: str) -> np.ndarray:
        """A view of a tensor in its own dtype."""
        return self._tensors[self.written[name]]

    @property
    def title(self) -> str:
        """What it is, in words."""
        return TITLES[self.kind]


def open_source(path: str | Path) -> Source:
    """Open a `.pt`, `.pth`, `.bin` or `.safetensors` file, a folder of safetensors, or an adapter folder.

    Raises UserError for what cannot be read, or is none of these.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(str(path), "no such file or folder", "a checkpoint", "correct the path")
    if path.is_dir() and (path / ADAPTER_CONFIG).is_file():
        return _source(path, "adapter", Safetensors(path / ADAPTER_WEIGHTS), ())
    if path.is_dir():
        tensors, rest = _of_folder(path)
    elif path.suffix == ".safetensors":
        tensors, rest = Safetensors(path), ()
    elif path.suffix in SUFFIXES:
        tensors = TorchFile(path)
        rest = tensors.rest
    else:
        expected = f"a folder, or a file ending in {', '.join((*SUFFIXES, '.safetensors'))}"
        raise UserError(str(path), f"a file ending in '{path.suffix}'", expected, "rename it if it is one of these")
    bare = {bare_name(name) for name in tensors}
    if any(name in bare for name in _OF_AN_LLM):
        fix = "no import is needed: save it with save_pretrained and set --config.llm.name to the folder"
        raise UserError(str(path), "a language model alone", "an ECG-language model, an encoder or an adapter", fix)
    return _source(path, "elm" if any(name.startswith(_LLM) for name in bare) else "encoder", tensors, rest)


def _of_folder(path: Path) -> tuple[Mapping[str, np.ndarray], tuple[str, ...]]:
    """The tensors of a folder: safetensors, else the one file that old repositories have."""
    old = path / "pytorch_model.bin"
    if old.is_file() and not list(path.glob("*.safetensors")):
        tensors = TorchFile(old)
        return tensors, tensors.rest
    return open_checkpoint(path), ()


def _source(path: Path, kind: Kind, tensors: Mapping[str, np.ndarray], rest: tuple[str, ...]) -> Source:
    described = tensors.info if isinstance(tensors, TorchFile | Safetensors) else tensors
    written: dict[str, str] = {}
    for name in tensors:
        if bare_name(name) in written:
            found = f"both {written[bare_name(name)]} and {name}"
            raise UserError(str(path), found, "one of them", "save the state dict of the bare module")
        written[bare_name(name)] = name
    if not written:
        raise UserError(str(path), "no tensors", "tensors by name", "save its state dict with torch.save")
    info = {bare: jax.ShapeDtypeStruct(described[n].shape, described[n].dtype) for bare, n in written.items()}
    return Source(path, kind, info, written, rest, tensors)
