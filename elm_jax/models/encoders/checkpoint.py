"""Where an encoder's weights come from: a dict, a file, a Hugging Face folder, or an id of its hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from elm_jax.data.images import Processing
from elm_jax.errors import UserError
from elm_jax.weights.load import open_checkpoint, read_json
from elm_jax.weights.safetensors import Safetensors
from elm_jax.weights.torch_file import SUFFIXES, TorchFile

WHERE = "encoder.checkpoint"
FOLDER_FILES = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]
TORCH_IN_FOLDER = "pytorch_model.bin"  # of old repositories, which have no safetensors


def read_checkpoint(checkpoint: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Tensors by name and what to call their source in errors.

    checkpoint: a dict, maybe with the tensors under model_state_dict; a .safetensors, .pt or .pth file; a folder
        with model.safetensors (or an index and its files), else pytorch_model.bin; an id of the Hugging Face hub.
    Raises UserError for what cannot be read; files of PyTorch need the torch extra.
    """
    if isinstance(checkpoint, Mapping):
        return checkpoint.get("model_state_dict", checkpoint), WHERE
    path = resolve(checkpoint)
    if path.is_dir():
        old = path / TORCH_IN_FOLDER
        return (TorchFile(old), str(old)) if _only_torch(path) else (open_checkpoint(path), str(path))
    if path.suffix == ".safetensors":
        return Safetensors(path), str(path)
    if path.suffix in SUFFIXES:
        return TorchFile(path), str(path)
    fix = "convert it to .safetensors"
    raise UserError(WHERE, str(path), "a folder, or a file ending in .pt, .pth or .safetensors", fix)


def read_config(checkpoint: str | Path | Mapping[str, Any] | None, processing: Processing | None) -> dict[str, Any]:
    """The `config.json` of a checkpoint that is a folder or in the hub; empty for others.

    Raises UserError if its images were made unlike `processing`, which is how ours are.
    """
    if checkpoint is None or isinstance(checkpoint, Mapping):
        return {}
    path = resolve(checkpoint)
    if not path.is_dir():
        return {}
    images = path / "preprocessor_config.json"
    if processing is not None and images.is_file():
        _check_images(images, processing)
    return read_json(path / "config.json")


def resolve(checkpoint: str | Path) -> Path:
    """The file or folder of a checkpoint, downloaded if it is an id of the hub; UserError if it is neither."""
    path = Path(checkpoint).expanduser()
    if path.exists():
        return path
    parts = str(checkpoint).split("/")
    is_file = path.suffix in (".safetensors", *SUFFIXES)
    if is_file or len(parts) != 2 or parts[0] in ("", ".", "..", "~") or not parts[1]:
        expected = "an existing file or folder, or owner/name of the Hugging Face hub"
        raise UserError(WHERE, str(path), expected, "correct the path")
    try:
        folder = Path(snapshot_download(str(checkpoint), allow_patterns=FOLDER_FILES))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(checkpoint), allow_patterns=[*FOLDER_FILES, TORCH_IN_FOLDER]))
        return folder
    except (OSError, ValueError, HfHubHTTPError) as error:
        found = f"'{checkpoint}', which the Hugging Face hub did not give ({type(error).__name__}: {str(error)[:200]})"
        fix = f"download {checkpoint} on a connected machine and set {WHERE} to that folder"
        raise UserError(WHERE, found, "a file, a folder or a model that can be downloaded", fix) from None


def _check_images(file: Path, ours: Processing) -> None:
    """Raise UserError where a preprocessor_config.json says a number that is not that of our images.

    What it leaves out, as old files do, is the model's usual. Image and patch size are those of config.json, which the
    weights have to fit; whether CLIP's crop is made is decided elsewhere.
    """
    expected: dict[str, Any] = {
        "do_resize": True, "do_rescale": True, "do_normalize": True, "image_mean": list(ours.mean),
        "image_std": list(ours.std), "resample": ours.resample, "rescale_factor": ours.rescale,
    }  # fmt: skip
    if ours.patch is not None:
        expected["max_num_patches"] = ours.max_patches
    told = read_json(file)
    for name, value in expected.items():
        if told.get(name, value) not in (value, None):
            fix = "use a checkpoint that was trained on such images"
            raise UserError(f"{file} {name}", str(told[name]), str(value), fix)


def _only_torch(folder: Path) -> bool:
    return (folder / TORCH_IN_FOLDER).is_file() and not list(folder.glob("*.safetensors"))
