"""Electrocardiogram-language models in JAX. Names load on first use; importing this imports no jax."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elm_jax.data.prepare import register_dataset
    from elm_jax.ecg.recording import read_ecg, to_segment
    from elm_jax.elms import register_view
    from elm_jax.errors import UserError
    from elm_jax.inference.generate import generate
    from elm_jax.loaded import load
    from elm_jax.models.encoders import register_encoder
    from elm_jax.models.family_table import register_family
    from elm_jax.objectives import register_objective
    from elm_jax.scoring.metrics import register_metric
    from elm_jax.scoring.rewards import register_reward
    from elm_jax.symbols.coder import EcgByte
    from elm_jax.text.render import render
    from elm_jax.weights.encoders import load_encoder
    from elm_jax.weights.load import load_llm

__version__ = "0.1.0"

_HOME = {
    "EcgByte": "elm_jax.symbols.coder",
    "UserError": "elm_jax.errors",
    "generate": "elm_jax.inference.generate",
    "load": "elm_jax.loaded",
    "load_encoder": "elm_jax.weights.encoders",
    "load_llm": "elm_jax.weights.load",
    "read_ecg": "elm_jax.ecg.recording",
    "register_dataset": "elm_jax.data.prepare",
    "register_encoder": "elm_jax.models.encoders",
    "register_family": "elm_jax.models.family_table",
    "register_metric": "elm_jax.scoring.metrics",
    "register_objective": "elm_jax.objectives",
    "register_reward": "elm_jax.scoring.rewards",
    "register_view": "elm_jax.elms",
    "render": "elm_jax.text.render",
    "to_segment": "elm_jax.ecg.recording",
}

__all__ = [
    "EcgByte",
    "UserError",
    "__version__",
    "generate",
    "load",
    "load_encoder",
    "load_llm",
    "read_ecg",
    "register_dataset",
    "register_encoder",
    "register_family",
    "register_metric",
    "register_objective",
    "register_reward",
    "register_view",
    "render",
    "to_segment",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'elm_jax' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
