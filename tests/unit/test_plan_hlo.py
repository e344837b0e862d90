"""What is read out of a compiled program: shapes, loops, groups of devices, and the work of each instruction."""

from __future__ import annotations

import pytest

from elm_jax.planning.costs import Cost, cost
from elm_jax.planning.hlo import Array, Module, collectives

# As XLA writes it for H100s: a loop of 28 layers that gathers a weight, multiplies, attends and scatters a gradient.
GPU = """\
HloModule jit_step, is_scheduled=true

%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%x, %y)
}

%fused (p.0: bf16[28,448,3584], p.1: s32[]) -> bf16[448,3584] {
  %p.0 = bf16[28,448,3584]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,448,3584]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,448,3584}
  ROOT %flat = bf16[448,3584]{1,0} bitcast(%slice)
}

%body (arg: (s32[], bf16[4096,3584], bf16[28,448,3584])) -> (s32[], bf16[4096,3584], bf16[28,448,3584]) {
  %arg = (s32[], bf16[4096,3584]{1,0}, /*index=2*/bf16[28,448,3584]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = bf16[4096,3584]{1,0} get-tuple-element(%arg), index=1
  %all = bf16[28,448,3584]{2,1,0} get-tuple-element(%arg), index=2
  %shard = bf16[448,3584]{1,0} fusion(%all, %i), kind=kLoop, calls=%fused
  %gather = (bf16[448,3584]{1,0}, bf16[3584,3584]{1,0}) all-gather-start(%shard), channel_id=1, \
replica_groups=mesh['axis_0'=8,'axis_1'=2], device_ids=([2,8]T(1,0)) {'axis_0'}, dimensions={0}
  %weight = bf16[3584,3584]{1,0} all-gather-done(%gather)
  %gemm = (bf16[4096,3584]{1,0}, s8[33554432]{0}) custom-call(%x, %weight), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[]}}}
  %y = bf16[4096,3584]{1,0} get-tuple-element(%gemm), index=0
  %q = bf16[1,4096,28,128]{3,2,1,0} bitcast(%y)
  %k = bf16[1,4096,4,128]{3,2,1,0} broadcast(%i), dimensions={}
  %attend = (bf16[1,28,4096,128]{3,1,2,0}, f32[1,28,4096]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), \
custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":{"mask_type": "NO_MASK"}}
  %scatter = ((bf16[3584,3584]{1,0}), bf16[448,3584]{1,0}) reduce-scatter-start(%weight), channel_id=2, \
replica_groups=[2,8]<=[16], dimensions={0}, to_apply=%add
  %done = bf16[448,3584]{1,0} reduce-scatter-done(%scatter)
  %sum = bf16[448,3584]{1,0} all-reduce(%done), channel_id=3, replica_groups=[8,2]<=[2,8]T(1,0), to_apply=%add
  ROOT %out = (s32[], bf16[4096,3584]{1,0}, bf16[28,448,3584]{2,1,0}) tuple(%i, %y, %all)
}

%condition (arg: (s32[], bf16[4096,3584], bf16[28,448,3584])) -> pred[] {
  %arg = (s32[], bf16[4096,3584]{1,0}, bf16[28,448,3584]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %bound = s32[] constant(28)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (x: bf16[4096,3584], w: bf16[28,448,3584]) -> (s32[], bf16[4096,3584], bf16[28,448,3584]) {
  %x = bf16[4096,3584]{1,0} parameter(0)
  %w = bf16[28,448,3584]{2,1,0} parameter(1)
  %start = s32[] constant(0)
  %init = (s32[], bf16[4096,3584]{1,0}, bf16[28,448,3584]{2,1,0}) tuple(%start, %x, %w)
  ROOT %loop = (s32[], bf16[4096,3584]{1,0}, bf16[28,448,3584]{2,1,0}) while(%init), condition=%condition, body=%body\
NOTED
}
"""
NOTED = ', backend_config={"known_trip_count":{"n":"28"},"known_init_step":{"init":"0","step":"1"}}'


@pytest.fixture(params=[NOTED, ""], ids=["trips noted", "trips by the condition"])
def module(request: pytest.FixtureRequest) -> Module:
    return Module(GPU.replace("NOTED", request.param))


def test_collectives_by_kind_bytes_and_group(module: Module) -> None:
    found = {one.kind: one for one in collectives(module, 16)}
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce"}
    assert all(one.count == 28 for one in found.values())
    whole = 2 * 3584 * 3584
    assert found["all-gather"].payload == found["reduce-scatter"].payload == whole
    assert found["all-reduce"].payload == whole // 8
    assert found["all-gather"].group == found["reduce-scatter"].group == tuple(range(8))
    assert found["all-reduce"].group == (0, 8)
    assert found["reduce-scatter"].arrays == (Array("bf16", (3584, 3584)),)


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups={}", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,2,2]T(1,0,2)", [0, 1]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [0, 2]),
        ("source_target_pairs={{1,0},{3,2}}", [0, 1]),
    ],
)
def test_groups_in_every_form_that_xla_writes(groups: str, first: list[int]) -> None:
    lines = [
        "ENTRY %m (x: f32[8]) -> f32[8] {",
        "  %x = f32[8]{0} parameter(0)",
        f"  ROOT %r = f32[8]{{0}} all-reduce(%x), {groups}",
        "}",
    ]
    assert Module("\n".join(lines)).computations["m"]["r"].group(8) == first


def work(module: Module, name: str) -> Cost:
    found = cost(module, "body", module.computations["body"][name])
    assert found is not None
    return found


def test_products_attention_and_slices(module: Module) -> None:
    gemm = work(module, "gemm")
    assert (gemm.kind, gemm.flops, gemm.operand) == ("products", 2 * 4096 * 3584 * 3584, "bf16")
    assert gemm.bytes == 2 * (2 * 4096 * 3584 + 3584 * 3584)  # without the workspace
    attend = work(module, "attend")
    assert (attend.kind, attend.flops) == ("attention", 4 * 28 * 4096 * 4096 * 128)
    assert work(module, "shard").bytes == 2 * (448 * 3584 * 2) + 4  # what is sliced, not all layers
    assert cost(module, "body", module.computations["body"]["gather"]) is None


# As XLA writes it for TPUs: counters that rise by 2, copies of one collective, products as convolutions with holes.
TPU = """\
%carried (p: bf16[16,64]) -> bf16[128,64] {
  %p = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gathered = bf16[128,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8]
}

%body (arg: (u32[], bf16[16,64])) -> (u32[], bf16[16,64]) {
  %arg = (u32[], bf16[16,64]{1,0}) parameter(0)
  %i = u32[] get-tuple-element(%arg), index=0
  %x = bf16[16,64]{1,0} get-tuple-element(%arg), index=1
  %first = bf16[128,64]{1,0:T(8,128)(2,1)S(1)} fusion(%x), kind=kCustom, calls=%carried
  %again = bf16[128,64]{1,0:T(8,128)(2,1)S(1)} fusion(%x), kind=kCustom, calls=%carried
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  ROOT %out = (u32[], bf16[16,64]{1,0}) tuple(%next, %x)
}

%condition (arg: (u32[], bf16[16,64])) -> pred[] {
  %arg = (u32[], bf16[16,64]{1,0}) parameter(0)
  %i = u32[] get-tuple-element(%arg), index=0
  %bound = u32[] constant(8)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (x: bf16[16,64], q: bf16[4096,4,128,1], k: bf16[4096,4,7,128]) -> f32[4,4096,4096,7] {
  %x = bf16[16,64]{1,0} parameter(0)
  %q = bf16[4096,4,128,1]{2,0,3,1} parameter(1)
  %k = bf16[4096,4,7,128]{3,0,2,1} parameter(2)
  %start = u32[] constant(0)
  %init = (u32[], bf16[16,64]{1,0}) tuple(%start, %x)
  %loop = (u32[], bf16[16,64]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %scores = f32[4,4096,4096,7]{2,1,3,0} convolution(%q, %k), \
window={size=4x7 stride=3x1 pad=0_0x6_6 lhs_dilate=4x1 rhs_reversal=0x1}, dim_labels=b0f1_o01i->0bf1
}
"""


def test_copies_of_a_collective_inside_fusions_are_one() -> None:
    (found,) = collectives(Module(TPU), 8)
    assert (found.kind, found.payload, found.count) == ("all-gather", 2 * 128 * 64, 4)


def test_a_scatter_of_a_tpu_is_told_from_an_all_reduce() -> None:
    text = TPU.replace("%carried", "%all-reduce-scatter.1").replace("all-gather(%p)", "all-reduce(%p)")
    (found,) = collectives(Module(text), 8)
    assert (found.kind, found.payload) == ("reduce-scatter", 2 * 16 * 64)


def test_a_product_written_as_a_convolution_counts_what_meets() -> None:
    module = Module(TPU)
    scores = cost(module, "main", module.computations["main"]["scores"])
    assert scores is not None and scores.flops == 2 * 28 * 4096 * 4096 * 128


def test_memory_on_the_chip_costs_no_bandwidth() -> None:
    assert Module(TPU).computations["body"]["first"].bytes == 0
