"""The XLA flags that a run on NVIDIA GPUs wants, by version of jaxlib: an unknown one aborts the process.

They let collectives run beside the products of other layers; NVIDIA's advice for JAX, and what `elm_jax.plan`
compiles with.
"""

from __future__ import annotations

from packaging.version import Version

Flags = dict[str, bool | int]

_LAYER = 2**29  # bytes: more than one layer's weights of a 7B model, which are then gathered at once

# From this version of jaxlib on.
_GPU: dict[str, Flags] = {
    "0.10": {
        "xla_gpu_enable_triton_gemm": False,
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_enable_pipelined_all_gather": True,
        "xla_gpu_enable_pipelined_reduce_scatter": True,
        "xla_gpu_enable_pipelined_all_reduce": True,
        "xla_gpu_enable_while_loop_double_buffering": True,
        "xla_gpu_all_gather_combine_threshold_bytes": _LAYER,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": _LAYER,
        "xla_gpu_all_reduce_combine_threshold_bytes": _LAYER,
    },
}


def gpu_flags(jaxlib: str) -> Flags:
    """The flags for a version of jaxlib; none for one older than the table."""
    known = [version for version in _GPU if Version(version) <= Version(jaxlib)]
    return dict(_GPU[max(known, key=Version)]) if known else {}
