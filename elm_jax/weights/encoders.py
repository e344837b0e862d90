"""Encoders with published weights: from a dict, a file, a Hugging Face folder or an id of its hub, and back.

Arrays have two names, ours (`layer1.0.conv1.kernel`) and the published one (`resnet.layer1.0.conv1.weight`); each
encoder's module holds the one table between them, read here in both directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from elm_jax import compat as behaviours
from elm_jax.ecg.images import Processing
from elm_jax.errors import UserError
from elm_jax.folders import CONFIG, FACTS, json_if_whole, read_json
from elm_jax.models.encoders import Encoder, build_encoder, kind_of
from elm_jax.models.encoders.text_tower import TEXT
from elm_jax.models.functional import Leaf, initialise, structure_of
from elm_jax.models.names import export
from elm_jax.weights.files import HF_FOLDER, TORCH_WHOLE, download, is_repository, open_tensors
from elm_jax.weights.published import Published, described, match
from elm_jax.weights.safetensors import Safetensors
from elm_jax.weights.torch_file import SUFFIXES, TorchFile

WHERE = "encoder.checkpoint"
EXPORTED = "encoder.safetensors"  # in the folder of an export
FOLDER_FILES = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]


def load_encoder(
    name: str,
    checkpoint: str | Path | Mapping[str, Any] | None = None,
    tokens: int = 1,
    compat: Iterable[str] = (),
    **config: Any,
) -> LoadedEncoder:
    """An encoder in float32 and evaluation mode, to call on arrays.

    checkpoint: a .pt (needs the torch extra) or .safetensors file with published names, a dict of name to array,
        or, for the vision encoders, a Hugging Face folder or id, whose config.json gives the sizes. None
        initialises at random with seed 0.
    config: the fields of the encoder's own config, such as resnet_type.
    Raises UserError for an unknown name or field, and for weights missing, unknown or of another shape.
    """
    behaviours.check(compat)
    fields = encoder_config(name, checkpoint, config)

    def build() -> Encoder:
        return build_encoder(name, fields, tokens, nnx.Rngs(0), compat=compat)

    structure, arrays = structure_of(build), {}
    if checkpoint is not None:
        arrays = jax.device_put(from_published(name, structure.leaves, *read_checkpoint(checkpoint)))
    if drawn := {ours: None for ours in structure.leaves if ours not in arrays}:
        arrays |= initialise(build, structure, drawn)
    return LoadedEncoder(structure.bind(arrays))


def encoder_config(
    name: str, checkpoint: str | Path | Mapping[str, Any] | None, config: Mapping[str, Any]
) -> dict[str, Any]:
    """`config` over what the checkpoint's own `config.json` says, where there is one: what `build_encoder` takes."""
    kind = kind_of(name)
    return {**(kind.file_config(read_config(checkpoint, kind.processing)) if kind.file_config else {}), **config}


class LoadedEncoder:
    """An encoder with its weights, in evaluation mode, compiled per input shape; `module` is the bare one."""

    def __init__(self, module: Encoder) -> None:
        self.module, self.width, self.tokens = module, module.width, module.tokens
        graphdef, self._state = nnx.split(module)
        self._encode = jax.jit(lambda state, signals: nnx.merge(graphdef, state)(signals))

    def __call__(self, signals: Any) -> jax.Array:
        """Signals (B, C, L), or what else the encoder takes: images, or a dict of arrays -> (B, N, D) float32."""
        if check := getattr(self.module, "check_values", None):
            check(signals)
        if isinstance(signals, Mapping):
            return self._encode(self._state, {name: jnp.asarray(value) for name, value in signals.items()})
        return self._encode(self._state, jnp.asarray(signals))


def open_encoder(
    name: str, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Any], where: str = WHERE
) -> Published:
    """Published tensors as arrays of these names and shapes of ours, in the tensors' own dtype.

    What the checkpoint may lack and does (`Kind.absent`), or has in another shape (`Kind.unused`), is left out. Raises
    UserError, naming `where` and the tensors, unless every other array is there in its shape and nothing is left over
    but what the encoder's table says belongs to other parts.
    """
    kind, fix = kind_of(name), "check encoder.config and that the file is of this encoder"
    rules = [kind.weight_rule(ours) for ours in shapes]
    of_text = [theirs for rule in rules if rule.ours.startswith(TEXT) for theirs in rule.names(shapes[rule.ours])]
    published = {key: kind.published_name(own) for key, own in kind.published(tensors).items()}
    named = {key: theirs for key, theirs in published.items() if theirs is not None}  # what is not of other parts
    if not isinstance(tensors, Safetensors | TorchFile):
        tensors = {key: np.asarray(tensors[key]) for key in named}
    unused = {rule.theirs: rule.their_shape(shapes[rule.ours]) for rule in rules if rule.theirs in kind.unused}
    info = described(tensors)
    other = {own for key, own in named.items() if own in unused and tuple(info[key].shape) != unused[own]}
    named = {key: theirs for key, theirs in named.items() if theirs not in other}
    expected = [theirs for rule in rules for theirs in rule.names(shapes[rule.ours])]
    without_text = of_text if set(of_text).isdisjoint(named.values()) else ()  # whose own folder has it then
    return match(
        where, f"this {name}", fix, rules, shapes, tensors, named, aliases=kind.aliases(expected),
        may_lack=[*kind.absent(published), *without_text, *other], twice=True,
    )  # fmt: skip


def from_published(
    name: str, leaves: Mapping[str, Leaf], tensors: Mapping[str, Any], where: str = WHERE
) -> dict[str, np.ndarray]:
    """`open_encoder`, read: the arrays in the shapes and dtypes of `leaves`."""
    found = open_encoder(name, {ours: leaf.shape for ours, leaf in leaves.items()}, tensors, where)
    return {ours: array.astype(leaves[ours].dtype) for ours, array in found.arrays().items()}


def to_published(name: str, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays under our names as published tensors: the inverse of `from_published`."""
    kind = kind_of(name)
    tensors = dict(export([kind.weight_rule(ours) for ours in arrays], arrays))
    return tensors | {second: tensors[first] for second, first in kind.aliases(tensors).items()}


def read_checkpoint(checkpoint: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Tensors by name and what to call their source in errors.

    checkpoint: a dict, maybe with the tensors under model_state_dict; a .safetensors, .pt or .pth file; the folder
        of an export, or one with model.safetensors (or an index and its files), else pytorch_model.bin; an id of the
        Hugging Face hub.
    """
    if isinstance(checkpoint, Mapping):
        return checkpoint.get("model_state_dict", checkpoint), WHERE
    path = resolve_encoder(checkpoint)
    return open_tensors(path, WHERE), str(path)


def read_config(checkpoint: str | Path | Mapping[str, Any] | None, processing: Processing | None) -> dict[str, Any]:
    """The `config.json` of a checkpoint that is a folder or in the hub; empty for others.

    Raises UserError if its images were made unlike `processing`, which is how ours are.
    """
    if checkpoint is None or isinstance(checkpoint, Mapping):
        return {}
    path = resolve_encoder(checkpoint)
    if not path.is_dir():
        return {}
    images = path / "preprocessor_config.json"
    if processing is not None and images.is_file():
        _check_images(images, processing)
    return read_json(path / "config.json", HF_FOLDER)


def read_facts(checkpoint: str | Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Of an exported encoder the fields of its config, and of the data that it was trained on, as the elm.json beside
    it has them; both empty for other files."""
    path = resolve_encoder(checkpoint)
    beside = path.with_name(FACTS)
    facts = json_if_whole(beside) if path.is_file() else {}
    own, signal = facts.get(path.stem), facts.get("signal")
    if not (isinstance(own, Mapping) and isinstance(sizes := own.get("config"), Mapping)):
        return {}, {}
    shown = {"representation": own["representation"]} if "representation" in own else {}
    return sizes, {**signal, **shown} if isinstance(signal, Mapping) else {}


def resolve_encoder(checkpoint: str | Path) -> Path:
    """The file or folder of a checkpoint, downloaded if it is an id of the hub; UserError if it is neither."""
    path = Path(checkpoint).expanduser()
    if (path / EXPORTED).is_file() and not (path / CONFIG).is_file():  # which a Hugging Face folder has, an export not
        return path / EXPORTED
    if "workdir" in json_if_whole(path / CONFIG):
        raise UserError(WHERE, f"{path}, a run", "an encoder that was exported", export_first(path))
    if path.exists():
        return path
    if path.suffix in (".safetensors", *SUFFIXES) or not is_repository(str(checkpoint)):
        expected = "an existing file or folder, or owner/name of the Hugging Face hub"
        raise UserError(WHERE, str(path), expected, "correct the path")
    folder = download(str(checkpoint), WHERE, FOLDER_FILES)
    whole = list(folder.glob("*.safetensors"))
    return folder if whole else download(str(checkpoint), WHERE, [*FOLDER_FILES, TORCH_WHOLE])


def export_first(run: str | Path) -> str:
    """What to do where an ELM should begin from a run of an encoder alone."""
    return f"export it first: python -m elm_jax.export --checkpoint {run} --out D, then --config.{WHERE}=D"


def _check_images(file: Path, ours: Processing) -> None:
    """Raise UserError where a preprocessor_config.json says a number that is not that of our images.

    What it leaves out, as old files do, is the model's usual. Image and patch size are those of config.json, which the
    weights have to fit; whether CLIP's crop is made is decided elsewhere.
    """
    expected: dict[str, Any] = {
        "do_resize": True, "do_rescale": True, "do_normalize": True, "image_mean": list(ours.mean),
        "image_std": list(ours.std), "resample": ours.resample, "rescale_factor": 1 / 255,
    }  # fmt: skip
    if ours.patch is not None:
        expected["max_num_patches"] = ours.max_patches
    told = read_json(file, HF_FOLDER)
    for name, value in expected.items():
        if told.get(name, value) not in (value, None):
            fix = "use a checkpoint that was trained on such images"
            raise UserError(f"{file} {name}", str(told[name]), str(value), fix)
