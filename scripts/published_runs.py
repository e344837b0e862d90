"""Published training runs, against which the roofline is held: what was run, on what, and how fast it was.

Each is compiled as elm_jax would run it (scripts/plan_published.py keeps the programs), and corrected for what is known
to differ: their attention skips the masked half and is not computed again in the backward pass, while elm_jax's masks
are arrays; where they recompute every second product, the mean of recomputing none and all stands for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from elm_jax.planning.hardware import GIGA, H100, TERA, Hardware
from elm_jax.planning.hlo import Module
from elm_jax.planning.roofline import step_times

ATTENTION = 0.5 * 3.5 / 4.5  # of the work of elm_jax's attention: half the pairs, 7 products instead of 9

# A3 High has 100 Gb/s a GPU and reaches less (GPUDirect-TCPX): so much that the published step from one to two nodes,
# 492 to 422 TFLOP/s, comes out. What it says of 128 GPUs is then a prediction.
A3_HIGH = replace(H100, outer=5.3 * GIGA)
# torchtitan's: HBM2e at 2.4 TB/s, and 500 W of 700. What matrix products lose by that is an assumption: a fifth.
H100_500W = replace(
    H100, bandwidth=2.4 * TERA, products=0.8 * H100.products, attention=0.8 * H100.attention
)

LLAMA2_7B: dict[str, Any] = {
    "family": "llama", "hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 32, "mlp": 11008, "vocab_size": 32000,
    "tied": False, "max_len": 8192,
}  # fmt: skip
LLAMA3_8B = {**LLAMA2_7B, "kv_heads": 8, "mlp": 14336, "vocab_size": 128256}
QWEN25_7B: dict[str, Any] = {
    "hidden": 3584, "layers": 28, "heads": 28, "kv_heads": 4, "mlp": 18944, "vocab_size": 152064, "tied": False,
    "max_len": 32768, "rope_theta": 1e6,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A published run: `rows` of `tokens` on each device, in `fsdp` shards; tokens per second and device measured."""

    name: str
    topology: str
    sizes: dict[str, Any]
    tokens: int
    rows: int
    fsdp: int
    measured: float
    hardware: Hardware
    remat: tuple[str, ...] = ("dots",)
    lora: int = 0

    def programs(self) -> dict[str, dict[str, Any]]:
        """File name -> the config of a program that stands for it, as `resolve` takes it."""
        return {
            f"{self.name}-{remat}": {
                "elm": "base_elf",  # one ECG, projected: nothing beside the LLM
                "update": ["llm"],
                "llm": {"name": "demo", "scratch": self.sizes, "remat": remat, "lora": {"rank": self.lora}},
                "data": {"max_len": self.tokens},
                "mesh": {"data": -1, "fsdp": self.fsdp, "tensor": 1},
            }
            for remat in self.remat
        }

    def predicted(self, modules: Sequence[Module]) -> float:
        """Tokens per second and device, by the programs that stand for it."""
        hardware = replace(self.hardware, attention=self.hardware.attention / ATTENTION)
        nodes = [device // hardware.node for device in range(self.devices)]
        seconds = [step_times(module, hardware, nodes).total for module in modules]
        return self.rows * self.tokens * len(seconds) / sum(seconds)

    @property
    def devices(self) -> int:
        nodes, gpus = self.topology.partition(":")[2].split("x")
        return int(nodes) * int(gpus)


# MaxText: configs/a3/llama_2_7b/README.md and 1vm.sh … 16vm.sh (TFLOP/s a GPU as tokens/s). torchtitan:
# benchmarks/llama3_h100_202412_torchtitan.md, FSDP with torch.compile. NeMo: AutoModel's performance summary.
_MAXTEXT = 10680 / 492
RUNS = (
    Run("maxtext-8", "h100:1x8", LLAMA2_7B, 4096, 4, 8, 492 * _MAXTEXT, A3_HIGH),
    Run("maxtext-16", "h100:2x8", LLAMA2_7B, 4096, 4, 8, 422 * _MAXTEXT, A3_HIGH),
    Run("maxtext-128", "h100:16x8", LLAMA2_7B, 4096, 4, 8, 375 * _MAXTEXT, A3_HIGH),
    Run("torchtitan-8", "h100:1x8", LLAMA3_8B, 8192, 2, 8, 6667, H100_500W, ("dots", "full")),
    Run("torchtitan-128", "h100:16x8", LLAMA3_8B, 8192, 2, 128, 6514, H100_500W, ("dots", "full")),
    Run("nemo-lora-qwen2.5-7b", "h100:1x1", QWEN25_7B, 4096, 2, 1, 14110, H100, lora=16),
    Run("nemo-lora-llama3-8b", "h100:1x1", LLAMA3_8B, 4096, 2, 1, 12473, H100, lora=16),
)
