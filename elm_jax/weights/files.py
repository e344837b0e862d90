"""Where tensors lie: a file, a folder, a repository of the Hugging Face hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from elm_jax.errors import UserError, some
from elm_jax.folders import read_json
from elm_jax.weights.safetensors import Safetensors
from elm_jax.weights.torch_file import SUFFIXES, TorchFile

TORCH = "pytorch_model*.bin"  # of old repositories
TORCH_WHOLE = "pytorch_model.bin"
HF_FOLDER = "use the folder of a Hugging Face model"  # what to do where a JSON file of one cannot be read


def is_repository(name: str) -> bool:
    """Whether this may be an id of the hub, owner/name."""
    owner, _, model = name.partition("/")
    return owner not in ("", ".", "..", "~") and bool(model) and "/" not in model


def download(repository: str, key: str, patterns: Sequence[str]) -> Path:
    """The local folder of a repository's files of these patterns.

    Raises UserError, which names the config key that asked for it, where they cannot be had.
    """
    with _asking(repository, key):
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))


def listed(repository: str, key: str) -> list[str]:
    """The names of a repository's files. Raises UserError as `download`."""
    with _asking(repository, key):
        return list_repo_files(repository)


@contextlib.contextmanager
def _asking(repository: str, key: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(
            key, f"'{repository}', which the Hugging Face hub did not give ({reason})",
            "a file, a folder or a model that can be downloaded",
            f"download {repository} on a connected machine and set {key} to that folder",
        ) from None  # fmt: skip


def open_tensors(path: Path, key: str) -> Mapping[str, np.ndarray]:
    """The tensors of a file that PyTorch or safetensors saved, or of a folder of safetensors, else of the one file
    that old repositories have.

    Raises UserError, which names `key`, for a file of another kind.
    """
    if path.is_dir():
        old = path / TORCH_WHOLE
        return TorchFile(old) if old.is_file() and not list(path.glob("*.safetensors")) else open_checkpoint(path)
    if path.suffix == ".safetensors":
        return Safetensors(path)
    if path.suffix in SUFFIXES:
        return TorchFile(path)
    expected = f"a folder, or a file ending in {', '.join((*SUFFIXES, '.safetensors'))}"
    raise UserError(key, f"{path}, a file ending in '{path.suffix}'", expected, "rename it if it is one, or convert it")


def open_checkpoint(folder: str | Path) -> dict[str, np.ndarray]:
    """Tensor name -> read-only view of a mapped file: `model.safetensors`, or an index and its files."""
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return dict(Safetensors(single))
    if not index.is_file():
        old = sorted(file.name for file in folder.glob(TORCH))
        found = f"{some(old)} only" if old else "no safetensors"
        fix = conversion(str(folder), "the path") if old else "check the folder"
        raise UserError(str(folder), found, f"{single.name} or {index.name}", fix)
    where = read_json(index, HF_FOLDER).get("weight_map")
    if not isinstance(where, dict) or any(Path(str(file)).name != file for file in where.values()):
        raise UserError(
            str(index), "no sound weight_map", "tensor names with files beside it", "download it again"
        )
    files = {file: Safetensors(folder / file) for file in sorted(set(where.values()))}
    absent = [name for name, file in where.items() if name not in files[file]]
    if absent:
        found = f"{some(absent)} not in the file that it names"
        raise UserError(str(index), found, "an index that fits its files", "download the folder again")
    return {name: files[file][name] for name, file in where.items()}


def conversion(source: str, setting: str) -> str:
    """What to do about a language model of which there are PyTorch's files only: those are not read."""
    return (
        f"convert it where PyTorch is installed: transformers.AutoModelForCausalLM.from_pretrained('{source}')"
        f".save_pretrained(folder, safe_serialization=True), its tokenizer likewise, and set {setting} "
        "to that folder"
    )
