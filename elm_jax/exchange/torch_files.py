"""The reference's own checkpoints of an exported model, made of the files that were written before: `elm.pt` for its
`--elm_ckpt`, `encoder.pt` for its `--encoder_ckpt`. They need PyTorch.

The tensors are views of the mapped files: PyTorch writes them from there, and the model is never in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from elm_jax.exchange.reference import Reference
from elm_jax.weights.safetensors import forget

ELM, ENCODER = "elm.pt", "encoder.pt"
_LARGE = 2**20  # bytes


def has_torch() -> bool:
    """Whether PyTorch is installed."""
    try:
        import torch  # pyright: ignore[reportMissingImports]  # noqa: F401
    except ImportError:
        return False
    return True


def write_checkpoints(
    folder: Path, reference: Reference, tensors: Mapping[str, np.ndarray], step: int, loss: float | None,
    alone: bool,
) -> list[str]:  # fmt: skip
    """Write `elm.pt` and, for a model with one encoder, `encoder.pt`; returns their names.

    Args:
        tensors: by the names of `reference`, but for aliases and counters; vocabulary tables may have more rows.
        alone: whether there is one encoder, which the reference reads without the model.
        step: how many steps the model was trained for; loss: the best validation loss, if there was validation.
    """
    import torch  # pyright: ignore[reportMissingImports]

    expected = reference.expected()
    state: dict[str, Any] = {name: _tensor(x[: expected[name][0]]) for name, x in tensors.items()}
    state |= {second: state[first] for second, first in reference.aliases.items()}
    state |= {name: torch.zeros((), dtype=torch.int64) for name in reference.counters}
    state = {name: state[name] for name in expected}
    best = math.inf if loss is None else loss
    run = {"epoch": 0, "step": step, "n_current_steps": step, "best_loss": best, "optimizer_state_dict": {}}
    _save({**run, "model_state_dict": state}, folder / ELM, tensors.values())
    encoder = {name.removeprefix("encoder."): x for name, x in state.items() if name.startswith("encoder.")}
    if not alone:
        return [ELM]
    _save({"model_state_dict": encoder}, folder / ENCODER, ())
    return [ELM, ENCODER]


def write_encoder(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write `encoder.pt` of an encoder that was pretrained alone."""
    _save({"model_state_dict": {name: _tensor(x) for name, x in tensors.items()}}, folder / ENCODER, tensors.values())


def _save(content: Mapping[str, Any], path: Path, views: Iterable[np.ndarray]) -> None:
    """Save to a file; what of the mapped files of `views` has been read for it does not stay in memory."""
    import torch  # pyright: ignore[reportMissingImports]

    views = list(views)

    class Writer:
        """A file, as PyTorch wants it."""

        def write(self, data: Any) -> int:
            written = file.write(data)
            for view in views if len(data) > _LARGE else ():
                forget(view)
            return written

        def flush(self) -> None:
            file.flush()

    with path.open("wb") as file:
        torch.save(dict(content), Writer())  # pyright: ignore[reportArgumentType]


def _tensor(array: np.ndarray) -> Any:
    """A tensor of the same memory, which nobody writes to."""
    import warnings

    import torch  # pyright: ignore[reportMissingImports]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)
