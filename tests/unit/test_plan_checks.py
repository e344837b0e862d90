"""What a plan warns of: gradients that are all-reduced whole, logits of all tokens."""

from __future__ import annotations

import lzma
import sys
from pathlib import Path

import pytest

from elm_jax.planning.hlo import Module, collectives
from elm_jax.planning.program import all_reduced, holds_logits
from elm_jax.runtime.mesh import SMALL

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

from published_runs import RUNS, Run  # noqa: E402

PROGRAMS = ROOT / "tests" / "data" / "plan"
MESH = {"data": 2, "fsdp": 8, "tensor": 1}
MATRIX = {"llm.layers.q": (2048, 2048)}
OVER_FSDP, OVER_DATA = "replica_groups=[2,8]<=[16]", "replica_groups=[8,2]<=[2,8]T(1,0)"


def reduced(operands: str, groups: str, whole: int = 0) -> list[str]:
    """What `all_reduced` says of a program that all-reduces arrays of these types, in one instruction."""
    types = operands.split(" ")
    text = "\n".join([
        "ENTRY %m () -> f32[] {",
        *(f"  %x{n} = {kind} parameter({n})" for n, kind in enumerate(types)),
        f"  ROOT %r = ({', '.join(types)}) all-reduce({', '.join(f'%x{n}' for n in range(len(types)))}), {groups}",
        "}",
    ])  # fmt: skip
    return all_reduced(collectives(Module(text), 16), MESH, MATRIX, whole)


@pytest.mark.parametrize(
    ("operands", "found"),
    [
        ("bf16[2048,2048]", ["llm.layers.q"]),
        ("bf16[2048,2048] f32[4,2048,2048]", ["f32[4,2048,2048]", "llm.layers.q"]),
        ("bf16[8388608]", ["bf16[8388608]"]),  # two of them, combined
        ("f32[4096] bf16[1,2048,2048]", ["llm.layers.q"]),
        ("f32[4096]", []),
    ],
)
def test_whole_gradients_are_found_however_xla_combines_them(operands: str, found: list[str]) -> None:
    assert reduced(operands, OVER_FSDP) == found
    assert reduced(operands, "replica_groups={}") == found  # over all devices, that is over fsdp too
    assert reduced(operands, OVER_DATA) == []  # these are shards


def test_gradients_of_what_is_not_divided_may_be_all_reduced() -> None:
    norms = 65536
    assert reduced(f"f32[{norms}] f32[5]", OVER_FSDP, whole=norms) == []
    assert reduced(f"f32[{norms}]", OVER_FSDP, whole=norms - SMALL) == [f"f32[{norms}]"]
    # The largest arrays, until the rest is explained.
    assert reduced(f"f32[{norms}] bf16[{8 * norms}]", OVER_FSDP, whole=norms) == [f"bf16[{8 * norms}]"]


@pytest.mark.parametrize("run", [run for run in RUNS if run.fsdp > 1], ids=lambda run: run.name)
def test_no_whole_gradient_is_all_reduced_on_h100s(run: Run) -> None:
    sizes = run.sizes
    width, mlp = sizes["hidden"], sizes["mlp"]
    heads = width * sizes["kv_heads"] // sizes["heads"]
    divided = {
        "q": (width, width), "kv": (width, heads), "mlp": (width, mlp), "head": (width, sizes["vocab_size"]),
    }  # fmt: skip
    ways = {"data": run.devices // run.fsdp, "fsdp": run.fsdp, "tensor": 1}
    for name in run.programs():
        module = Module(lzma.decompress((PROGRAMS / f"{name}.hlo.xz").read_bytes()).decode())
        carried = collectives(module, run.devices)
        norms = (2 * sizes["layers"] + 1) * width
        assert all_reduced(carried, ways, divided, norms) == []
        assert all_reduced(carried, ways, divided, 0) != []  # they are carried over fsdp, and seen


# Rows of T = 256 tokens through a head (D, V) of as many numbers, 32 tokens' logits at a time.
HEAD = """\
ENTRY %m (x: bf16[256,256], w: bf16[256,4096]) -> bf16[256,4096] {
  %x = bf16[1,256,256]{2,1,0} parameter(0)
  %w = bf16[256,4096]{1,0} parameter(1)
  %picked = bf16[TOKENS,256]{1,0} slice(%x)
  %logits = bf16[TOKENS,4096]{1,0} dot(%picked, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %gradient = bf16[256,4096]{1,0} dot(%picked, %logits), lhs_contracting_dims={0}, rhs_contracting_dims={0}
}
"""


@pytest.mark.parametrize(("supervised", "found"), [(32, False), (128, False), (256, True)])
def test_a_head_as_tall_as_a_row_is_long_is_no_logits(supervised: int, found: bool) -> None:
    module = Module(HEAD.replace("TOKENS", str(supervised)))
    assert holds_logits(module, (1, 256, 4096), 256, [(256, 4096)]) is found


@pytest.mark.parametrize("shape", ["2,128,4096", "256,4096", "4096,256", "1,256,4096"])
def test_logits_of_all_tokens_are_found_in_any_shape(shape: str) -> None:
    text = f"ENTRY %m () -> f32[] {{\n  ROOT %x = f32[{shape}]{{1,0}} parameter(0)\n}}"
    assert holds_logits(Module(text), (2, 128, 4096), 192, [(192, 4096)])
    assert not holds_logits(Module(text), (2, 64, 4096), 192, [(192, 4096)])
