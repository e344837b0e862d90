"""The forms in which the encoders' authors release their weights, under the names that our tables have.

MERL (its trainer saves `ecg_encoder` alone, or the whole model around it) and ST-MEM (its encoder without the decoder)
name the same tensors otherwise than the reference, which wraps them once more.
"""

from __future__ import annotations

from collections.abc import Collection

from elm_jax.models.names import bare_name

# Encoder -> a name that only its bare release has, and what the reference puts before all of them.
_BARE = {
    "merl": ("conv1.weight", "resnet."),
    **dict.fromkeys(("st_mem", "mtae", "mlae"), ("pos_embedding", "encoder.")),
}
_MERL_WHOLE = "ecg_encoder."  # of MERL's own model, where the reference has `resnet.`


def published_names(encoder: str, names: Collection[str]) -> dict[str, str]:
    """The names of a checkpoint's tensors -> the published ones, as `Kind.published_name` takes them."""
    bare = {name: bare_name(name) for name in names}
    only, prefix = _BARE.get(encoder, ("", ""))
    if only in bare.values():
        return {name: prefix + own for name, own in bare.items()}
    if encoder == "merl" and any(own.startswith(_MERL_WHOLE) for own in bare.values()):
        return {name: own.replace(_MERL_WHOLE, _BARE["merl"][1], 1) for name, own in bare.items()}
    return bare
