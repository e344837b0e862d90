"""LoRA: what it adds, where, what is then trained, and which adapter folders are refused."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import LEADS, SAMPLES, SIGNAL_LAYOUT, SIGNAL_TOKENS, RandomConversations, stack_micro_batches, tiny_elm

from elm_jax.config import Config, MeshConfig, resolve
from elm_jax.data.batch import Batch, BatchShape, Group, collate
from elm_jax.errors import UserError
from elm_jax.inference.generate import generate
from elm_jax.keys import LoraConfig
from elm_jax.models.connectors import build_signal_connector
from elm_jax.models.decoder import Decoder, DecoderConfig
from elm_jax.models.elm import ELM
from elm_jax.models.families import FAMILIES, scratch_config
from elm_jax.models.functional import Structure, structure_of
from elm_jax.models.lora import LoraSpec, add_lora, is_lora, target_modules
from elm_jax.models.noise import drawing
from elm_jax.run.checkpoint import Checkpoints
from elm_jax.runtime.mesh import array_shardings, batch_sharding, make_mesh, to_device
from elm_jax.training.muon import matrices
from elm_jax.training.optim import make_optimizer
from elm_jax.training.state import TrainState, abstract_state, new_state, split_names
from elm_jax.training.step import make_train_step
from elm_jax.weights.load import parameters
from elm_jax.weights.peft import load_adapter, merged, save_adapter, spec_of

VOCABULARY = 64
SIZES = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 48, "max_len": 128}
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 9))


def tiny_config() -> DecoderConfig:
    return scratch_config(SIZES, VOCABULARY)


def adapted(spec: LoraSpec, full: bool = True, dtype: Any = jnp.float32) -> Decoder:
    """A small decoder with LoRA; `full`: its b is not zero."""
    llm = Decoder(tiny_config(), nnx.Rngs(0), param_dtype=dtype)
    add_lora(llm, spec, nnx.Rngs(1), dtype)
    if full:
        for name, variable in parameters(nnx.state(llm)).items():
            if name.endswith(".lora.b"):
                variable.set_value(0.1 * jax.random.normal(jax.random.key(len(name)), variable.shape, dtype))
    return llm


def arrays_of(llm: Decoder) -> dict[str, jax.Array]:
    return {name: variable[...] for name, variable in parameters(nnx.state(llm)).items()}


def test_at_first_nothing_changes_and_then_it_does() -> None:
    bare = Decoder(tiny_config(), nnx.Rngs(0))
    spec = LoraSpec(4, 8.0)
    assert np.array_equal(adapted(spec, full=False)(TOKENS), bare(TOKENS))
    assert not np.allclose(adapted(spec)(TOKENS), bare(TOKENS), atol=1e-3)


def test_the_merged_model_computes_and_generates_the_same() -> None:
    llm, bare = adapted(LoraSpec(4, 8.0)), Decoder(tiny_config(), nnx.Rngs(0))
    lora_first = sorted(jax.device_get(arrays_of(llm)).items(), key=lambda item: not is_lora(item[0]))
    whole = dict(merged(lora_first, 2.0))
    for name, variable in parameters(nnx.state(bare)).items():
        variable.set_value(whole[name])
    assert set(whole) == set(arrays_of(bare))
    np.testing.assert_allclose(llm(TOKENS), bare(TOKENS), atol=1e-5)
    found, expected = (generate(model, TOKENS, max_new_tokens=5) for model in (llm, bare))
    assert np.array_equal(found, expected)


def test_scanned_and_unrolled_layers_agree() -> None:
    llm = adapted(LoraSpec(4, 8.0))
    scanned = llm(TOKENS)
    llm.scan = False
    np.testing.assert_allclose(llm(TOKENS), scanned, rtol=1e-5, atol=1e-6)


def test_the_dtype_of_activations_is_kept() -> None:
    layer = jax.tree.map(lambda x: x[0], nnx.state(adapted(LoraSpec(4, 8.0)).layers.mlp.up))
    graph = nnx.graphdef(adapted(LoraSpec(4, 8.0)).layers.mlp.up)
    assert nnx.merge(graph, layer)(jnp.ones((2, 32), jnp.bfloat16)).dtype == jnp.bfloat16


def test_dropout_drops_only_where_there_is_a_key() -> None:
    """On average over draws it changes nothing."""
    layers = adapted(LoraSpec(4, 8.0, dropout=0.5)).layers.mlp.up
    graph, state = nnx.split(layers)
    linear = nnx.merge(graph, jax.tree.map(lambda x: x[0], state))
    x = jax.random.normal(jax.random.key(1), (3, 32))
    plain = linear(x)
    assert np.array_equal(plain, linear(x))

    @jax.jit
    def once(key: jax.Array) -> jax.Array:
        with drawing(key):
            return linear(x)

    drawn = jnp.stack([once(key) for key in jax.random.split(jax.random.key(2), 400)])
    assert not np.array_equal(drawn[0], plain) and not np.array_equal(drawn[0], drawn[1])
    error = drawn.std(0) / 400**0.5
    assert np.abs((drawn.mean(0) - plain) / error).max() < 5
    base = x @ linear.kernel[...]
    assert np.abs(base - plain).max() > 0.1 and linear.lora.rate == 0.5


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_targets(family: str) -> None:
    """All are the projections of the layers; PEFT's are some of them; each can be named."""
    config = scratch_config({n: x for n, x in SIZES.items() if n != "kv_heads"} | {"family": family}, VOCABULARY)
    everything = target_modules(config, "all")
    leaves = structure_of(lambda: Decoder(config, nnx.Rngs(0))).leaves
    linear = {n for n in leaves if n.startswith("layers.") and "kernel" in n and ".experts." not in n}
    assert set(everything) == {n.removesuffix(".kernel") for n in linear}
    chosen = target_modules(config, "peft")
    names = FAMILIES[family].peft.split(",")
    assert len(chosen) == len(names) and set(chosen) < set(everything)
    assert target_modules(config, " , ".join(names)) == chosen


@pytest.mark.parametrize("targets", ["q_prj", "q_proj,lm_head", "embed_tokens", "", "c_attn", "proj"])
def test_unknown_targets_are_refused_with_the_list(targets: str) -> None:
    with pytest.raises(UserError, match=r"llm\.lora\.targets.*down_proj, gate_proj, k_proj, o_proj, q_proj"):
        target_modules(scratch_config(SIZES, VOCABULARY), targets)


def build() -> ELM:
    """A patch connector and a decoder with LoRA."""
    sizes = {**SIZES, "heads": 4, "kv_heads": 4, "mlp": 64}
    llm = Decoder(scratch_config(sizes, VOCABULARY), nnx.Rngs(0))
    add_lora(llm, LoraSpec(4, 8.0), nnx.Rngs(1))
    connector = build_signal_connector("patch", LEADS, SAMPLES, SIGNAL_TOKENS, 32, rngs=nnx.Rngs(2))
    return ELM(None, connector, llm, jnp.dtype(jnp.float32))


@functools.cache
def structure() -> Structure:
    return structure_of(build)


def test_arrays_are_stacked_and_named_by_their_layers_axes() -> None:
    leaves = structure().leaves
    a, b = (leaves[f"llm.layers.attention.o.lora.{side}"] for side in "ab")
    assert (a.shape, a.axes) == ((2, 32, 4), ("heads", None))
    assert (b.shape, b.axes) == ((2, 4, 32), (None, "embed"))
    chosen = matrices(leaves)
    assert {name for name in leaves if is_lora(name)} <= set(chosen)


def test_only_the_adapter_of_the_llm_is_trained() -> None:
    trained, moving, frozen = split_names(structure(), ("connector", "llm"))
    assert {n for n in trained if n.startswith("llm.")} == {n for n in structure().leaves if is_lora(n)}
    assert {n for n in trained if n.startswith("connector.")} == {"connector.projection.kernel",
                                                                  "connector.projection.bias"}  # fmt: skip
    assert not moving and len(trained) + len(frozen) == len(structure().leaves)
    assert not any(is_lora(name) for name in split_names(structure(), ("connector",))[0])


def test_other_parts_follow_update_as_without_lora() -> None:
    plain, _ = tiny_elm()
    trained, moving, frozen = split_names(plain, ("encoder", "llm"))
    assert {n.split(".")[0] for n in trained} == {"encoder", "llm"} and moving
    assert {n.split(".")[0] for n in frozen} == {"connector"}


# -- adapter folders ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of all projections of the small decoder."""
    llm = adapted(LoraSpec(4, 8.0, dropout=0.1))
    arrays = {name: np.asarray(x) for name, x in arrays_of(llm).items() if is_lora(name)}
    save_adapter(tmp_path, arrays, LoraSpec(4, 8.0, 0.1), llm.config)
    return tmp_path


def change(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_an_adapter_comes_back(folder: Path) -> None:
    spec, found = load_adapter(folder, tiny_config())
    arrays = found.arrays()
    assert (spec.rank, spec.alpha, spec.dropout) == (4, 8.0, 0.1)
    assert spec.targets.split(",") == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    expected = {name: x for name, x in arrays_of(adapted(spec)).items() if is_lora(name)}
    assert set(arrays) == set(expected)
    assert all(np.array_equal(arrays[name], expected[name]) for name in arrays)


def test_rank_stabilised_adapters_have_their_scale(folder: Path) -> None:
    change(folder, use_rslora=True)
    assert load_adapter(folder, tiny_config())[0].scale == pytest.approx(8.0 / 4**0.5)


def test_the_config_asks_for_an_adapter(folder: Path) -> None:
    assert spec_of(LoraConfig()) is None
    assert spec_of(LoraConfig(rank=2, alpha=3.0, targets="peft")) == LoraSpec(2, 3.0, 0.0, "peft")
    read, _ = load_adapter(folder, tiny_config())
    for rank in (0, 4):
        assert spec_of(LoraConfig(rank=rank, dropout=0.3, adapter=str(folder))) == replace(read, dropout=0.3)
    with pytest.raises(UserError, match=r"llm\.lora\.rank: found 8; expected 4"):
        spec_of(LoraConfig(rank=8, adapter=str(folder)))
    with pytest.raises(UserError, match="adapter_config"):
        spec_of(LoraConfig(adapter=str(folder / "nowhere")))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True), ("rank_pattern", {"q_proj": 8}), ("alpha_pattern", {"q_proj": 8}), ("bias", "all"),
        ("modules_to_save", ["lm_head"]), ("init_lora_weights", "pissa"), ("layers_to_transform", [0]),
        ("peft_type", "IA3"), ("use_qalora", True), ("lora_bias", True), ("quantum", None), ("r", 0), ("r", None),
        ("lora_alpha", "32"), ("target_modules", ".*_proj"), ("target_modules", []),
        ("target_modules", ["q_proj", "lm_head"]), ("trainable_token_indices", [1]),
        ("lora_alpha", float("nan")), ("lora_dropout", float("inf")),
    ],
)  # fmt: skip
def test_what_an_adapter_asks_for_and_we_do_not_compute_is_named(folder: Path, name: str, value: Any) -> None:
    change(folder, **{name: value})
    shown = value[-1] if name == "target_modules" and value and value[-1] == "lm_head" else name
    with pytest.raises(UserError, match=shown) as caught:
        load_adapter(folder, tiny_config())
    assert "adapter_config.json" in str(caught.value)


def test_tensors_that_do_not_fit_are_named(folder: Path) -> None:
    change(folder, target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"unknown base_model.*down_proj\.lora_A"):
        load_adapter(folder, tiny_config())
    change(folder, target_modules="all-linear", r=8)
    with pytest.raises(UserError, match=r"lora_A\.weight float32\[4, 32\]; expected floating \[8, 32\]"):
        load_adapter(folder, tiny_config())
    change(folder, r=4)
    with pytest.raises(UserError, match=r"no base_model\.model\.model\.layers\.2"):
        load_adapter(folder, scratch_config({**SIZES, "layers": 3}, VOCABULARY))
    (folder / "adapter_config.json").write_text("[")
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        load_adapter(folder, tiny_config())


# -- LoRA and Muon on a mesh --------------------------------------------------------------------------------------

STEPS, UPDATE = 6, ("connector", "llm")


def settings() -> Config:
    return resolve(
        {
            "optim": {"name": "muon", "lr": 0.1, "grad_clip": 1.0, "schedule": "cosine"},
            "train": {"batch_size": 8, "steps": STEPS},
        }
    )


@functools.cache
def batches() -> list[Batch]:
    talk = RandomConversations(1)
    rows = [[[Group(0, [talk.ask(talk.recording())])] for _ in range(8)] for _ in range(2)]
    return [stack_micro_batches([collate(part, BatchShape(32, 2, 4), SIGNAL_LAYOUT)]) for part in rows]


class Run:
    """A training run of the small model on a mesh, from its start or from a checkpoint."""

    def __init__(self, sizes: tuple[int, int, int]) -> None:
        shape, config = structure(), settings()
        self.mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        shardings = array_shardings(shape, self.mesh)
        arrays = jax.jit(lambda: shape.arrays(build()), out_shardings=shardings)()
        trained, moving, frozen = split_names(shape, UPDATE)
        tx = make_optimizer(config.optim, config.train, STEPS, matrices(shape.leaves))
        self.like = abstract_state(shape, trained, moving, tx, self.mesh, shardings)
        self.frozen = {name: arrays[name] for name in frozen}
        self.state = new_state(arrays, self.like, tx)
        layout = jax.tree.map(lambda x: x.sharding, self.like)
        self.step = make_train_step(shape, config, tx, self.mesh, layout, {n: shardings[n] for n in frozen})

    def advance(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            batch = batches()[int(self.state.step) % 2]
            placed = jax.tree.map(lambda x: to_device(self.mesh, x, batch_sharding(self.mesh), row_axis=1), batch)
            self.state, metrics = self.step(self.state, self.frozen, placed)
            losses.append(float(metrics["loss"]))
        assert self.step._cache_size() == 1, "compiled again: a state is laid out differently from its successor"
        return losses


@pytest.mark.slow
def test_lora_and_muon_on_a_mesh_have_the_losses_of_one_device_and_resume(tmp_path: Path) -> None:
    alone, spread = Run((1, 1, 1)), Run((2, 2, 2))
    expected = alone.advance(STEPS)
    assert expected[0] - expected[-1] > 0.1, "nothing was learnt, so nothing was compared"
    first = spread.advance(3)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, spread.state.items, {"history": {}})
    checkpoints.wait()
    rest = spread.advance(STEPS - 3)
    np.testing.assert_allclose(first + rest, expected, rtol=0, atol=1e-4)

    again = Run((2, 2, 2))
    restored = checkpoints.restore(3, again.like.items)
    checkpoints.close()
    step = jax.device_put(jnp.int32(3), again.like.step.sharding)
    again.state = TrainState(step, **restored)
    assert again.advance(STEPS - 3) == rest
    for name, array in spread.state.trained.items():
        np.testing.assert_array_equal(array, again.state.trained[name], err_msg=name)


@pytest.mark.slow
def test_optimizer_state_of_muon_lies_as_its_parameters_do() -> None:
    run = Run((2, 2, 2))
    before = run.state
    run.advance(1)
    assert all(x.is_deleted() for x in jax.tree.leaves((before.trained, before.optimizer)) if x.ndim)
    momentum = run.state.optimizer.chosen[0].momentum
    assert set(momentum) == {n for n in run.state.trained if n.endswith(".kernel") or is_lora(n)}
    for name, array in momentum.items():
        assert array.dtype == jnp.float32
        assert array.sharding.is_equivalent_to(run.state.trained[name].sharding, array.ndim), name
    assert len({s.data.shape for s in momentum["llm.layers.mlp.up.lora.b"].addressable_shards}) == 1
    assert momentum["llm.layers.mlp.up.lora.b"].addressable_shards[0].data.shape == (2, 4, 32)
    assert set(run.state.optimizer.rest[0].mu) == {"connector.projection.bias"}
