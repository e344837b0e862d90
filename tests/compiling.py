"""How tests compile: they compile much and compute little, on a CPU."""

from elm_jax.runtime.gpu_settings import known_flags, libraries

# Without LLVM's optimisations, with the older of XLA's two ways to write loops, in one piece: a quarter of the time.
_WANTED = {
    "xla_backend_optimization_level": "0",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}
# For XLA_FLAGS. A flag that the installed jaxlib has no more would end the process.
FLAGS = " ".join(f"--{name}={_WANTED[name]}" for name in known_flags(_WANTED, libraries()))
