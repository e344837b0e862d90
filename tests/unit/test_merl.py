"""MERL's parts: pooling, BatchNorm with weights, the encoder's shapes and dtypes, loading and its errors."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elm_jax.errors import UserError
from elm_jax.models.encoders import build_encoder
from elm_jax.models.encoders.merl import BatchNorm
from elm_jax.models.functional import structure_of
from elm_jax.models.pooling import adaptive_average_pool
from elm_jax.weights.encoders import load_encoder, to_published
from elm_jax.weights.safetensors import save_safetensors

SMALL = {"resnet_type": "resnet18", "width": 4}


@pytest.fixture(scope="module")
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


# Pooling


@pytest.mark.parametrize(("length", "tokens"), [(157, 1), (157, 8), (32, 50), (32, 32), (7, 3), (1, 4)])
def test_pooling_averages_the_bins_that_the_definition_gives(rng, length: int, tokens: int) -> None:
    x = normal(rng, 2, length, 3)
    edges = [(i * length // tokens, -(-(i + 1) * length // tokens)) for i in range(tokens)]
    expected = np.stack([x[:, first:last].mean(1) for first, last in edges], 1)
    np.testing.assert_allclose(adaptive_average_pool(x, tokens), expected, atol=1e-6)


# BatchNorm


def norm_of(rng: np.random.Generator, channels: int) -> BatchNorm:
    norm = BatchNorm(channels, param_dtype=jnp.float32)
    norm.scale.set_value(jnp.asarray(1 + 0.1 * normal(rng, channels)))
    norm.bias.set_value(jnp.asarray(0.1 * normal(rng, channels)))
    return norm


def test_batch_statistics_follow_the_definition(rng) -> None:
    x, norm = 3 + 2 * normal(rng, 5, 7, 4), norm_of(rng, 4)
    y = norm(jnp.asarray(x), None, train=True)
    mean, var = x.mean((0, 1), dtype=np.float64), x.var((0, 1), dtype=np.float64)
    expected = (x - mean) / np.sqrt(var + 1e-5) * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * var * 35 / 34, rtol=1e-5)


def test_evaluation_uses_the_running_statistics_and_leaves_them(rng) -> None:
    x, norm = normal(rng, 5, 7, 4), norm_of(rng, 4)
    norm.mean.set_value(jnp.full(4, 0.5))
    norm.var.set_value(jnp.full(4, 4.0))
    y = norm(jnp.asarray(x), None, train=False)
    expected = (x - 0.5) / np.sqrt(4 + 1e-5) * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    np.testing.assert_allclose(y, expected, atol=1e-6)
    np.testing.assert_array_equal(norm.mean[...], 0.5)
    np.testing.assert_array_equal(norm.var[...], 4.0)


def test_the_variance_survives_a_large_mean(rng) -> None:
    """At this mean E[x^2] - E[x]^2 in float32 is off by more than the variance itself."""
    x, norm = 10000 + normal(rng, 16, 100, 2), BatchNorm(2, param_dtype=jnp.float32)
    y = norm(jnp.asarray(x), None, train=True)
    np.testing.assert_allclose(np.std(y, axis=(0, 1)), 1, rtol=1e-2)


# Weighted statistics, of a whole encoder on 4 signals


STRUCTURE = structure_of(lambda: build_encoder("merl", SMALL, 1, nnx.Rngs(0)))  # D is 32


@pytest.fixture(scope="module")
def arrays() -> dict[str, jax.Array]:
    return STRUCTURE.arrays(load_encoder("merl", **SMALL).module)


def statistics(arrays) -> dict[str, jax.Array]:
    return {name: arrays[name] for name, leaf in STRUCTURE.leaves.items() if leaf.statistic}


@jax.jit
def run(arrays, signals, weights, cotangent):
    """Embeddings, moved statistics and gradients (parameters, signals) of sum_b cotangent_b · embedding_b."""
    params = {name: arrays[name] for name, leaf in STRUCTURE.leaves.items() if not leaf.statistic}

    def loss(params, signals):
        encoder = STRUCTURE.bind({**arrays, **params})
        embeddings = encoder(signals, weights, train=True)
        return jnp.sum(embeddings * cotangent), (embeddings, statistics(STRUCTURE.arrays(encoder)))

    with jax.default_matmul_precision("highest"):
        gradients, (embeddings, after) = jax.grad(loss, (0, 1), has_aux=True)(params, signals)
    return embeddings, after, *gradients


def draw(rng: np.random.Generator, weights: list[int]):
    """Four signals, their weights, and a cotangent that counts each signal as its weight does."""
    signals, weight = normal(rng, 4, 12, 96), np.array(weights, np.float32)
    return signals, weight, normal(rng, 4, 1, 32) * weight[:, None, None]


def assert_close_in_scale(ours, theirs, tolerance: float = 1e-4) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max() + 1e-7


def test_a_weight_counts_like_repeating_the_signal(rng, arrays) -> None:
    times = [2, 0, 1, 1]
    signals, weights, _ = draw(rng, times)
    cotangent = normal(rng, 4, 1, 32)
    repeat = np.repeat(np.arange(4), times)
    weighted = run(arrays, signals, weights, cotangent * weights[:, None, None])
    repeated = run(arrays, signals[repeat], np.ones(4, np.float32), cotangent[repeat])
    assert_close_in_scale(weighted[0][repeat], repeated[0])
    assert_close_in_scale(weighted[1:3], repeated[1:3])
    summed = np.stack([np.asarray(repeated[3])[repeat == i].sum(0) for i in range(4)])
    assert_close_in_scale(weighted[3], summed)


def test_an_unused_slot_has_no_influence(rng, arrays) -> None:
    signals, weights, cotangent = draw(rng, [1, 0, 1, 2])
    other, used = signals.copy(), np.array([0, 2, 3])
    other[1] = 100.0
    first, second = run(arrays, signals, weights, cotangent), run(arrays, other, weights, cotangent)
    np.testing.assert_array_equal(first[0][used], second[0][used])
    for ours, theirs in zip(jax.tree.leaves(first[1:3]), jax.tree.leaves(second[1:3]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.asarray(first[3][1]).any()


def test_a_batch_without_any_weight_changes_nothing_and_stays_finite(rng, arrays) -> None:
    signals, weights, _ = draw(rng, [0, 0, 0, 0])
    embeddings, after, gradients, _ = run(arrays, signals, weights, np.ones((4, 1, 32), np.float32))
    evaluated = jax.jit(lambda arrays: STRUCTURE.bind(arrays)(signals))(arrays)
    np.testing.assert_allclose(embeddings, evaluated, rtol=1e-4, atol=1e-6)
    for name, before in statistics(arrays).items():
        np.testing.assert_array_equal(after[name], before, err_msg=name)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.skipif(jax.device_count() < 2, reason="needs several devices")
def test_statistics_are_those_of_the_global_batch_however_it_is_sharded(rng, arrays) -> None:
    batch = draw(rng, [1, 3, 0, 2])
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("data",)), PartitionSpec("data"))
    assert_close_in_scale(run(arrays, *jax.device_put(batch, sharding)), run(arrays, *batch))


# The encoder


@pytest.mark.parametrize(
    ("kind", "width"),
    [("resnet", 512), ("resnet18", 512), ("resnet34", 512), ("resnet50", 2048), ("resnet101", 2048)],
)
def test_width_is_that_of_the_published_nets(kind: str, width: int) -> None:
    for stem in (64, 16):
        config = {"resnet_type": kind, "width": stem}
        encoder = nnx.eval_shape(lambda config=config: build_encoder("merl", config, 8, nnx.Rngs(0)))
        assert (encoder.width, encoder.tokens) == (width * stem // 64, 8)
    signals = jax.ShapeDtypeStruct((3, 12, 500), jnp.float32)
    out = jax.eval_shape(lambda e, x: e(x), encoder, signals)
    assert (out.shape, out.dtype) == ((3, 8, encoder.width), jnp.float32)


def test_bfloat16_is_used_for_convolutions_only() -> None:
    structure = structure_of(lambda: build_encoder("merl", SMALL, 2, nnx.Rngs(0), dtype=jnp.bfloat16))

    def step(arrays, signals):
        encoder = structure.bind(arrays)
        return encoder(signals, train=True), structure.arrays(encoder)

    arrays = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in structure.leaves.items()}
    jaxpr, (out, after) = jax.make_jaxpr(step, return_shape=True)(
        arrays, jax.ShapeDtypeStruct((4, 12, 96), jnp.float32)
    )
    kinds = {e.primitive.name: e.outvars[0].aval.dtype for e in jaxpr.eqns}
    assert kinds["conv_general_dilated"] == jnp.bfloat16
    assert kinds["reduce_sum"] == jnp.float32  # batch statistics
    assert out.dtype == jnp.float32
    assert {leaf.dtype for leaf in after.values()} == {np.dtype(np.float32)}


def test_batch_norm_of_bfloat16_is_computed_in_float32(rng) -> None:
    x, norm = jnp.asarray(100 + normal(rng, 16, 50, 2), jnp.bfloat16), BatchNorm(2, param_dtype=jnp.float32)
    y, exact = norm(x, None, train=True), norm(x.astype(jnp.float32), None, train=True)
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def test_every_array_names_its_axes() -> None:
    leaves = STRUCTURE.leaves
    assert all(len(leaf.axes) == len(leaf.shape) for leaf in leaves.values())
    assert leaves["layer2.0.shortcut.0.kernel"].axes == (None, None, "conv_out")
    assert leaves["bn1.mean"].statistic and not leaves["bn1.scale"].statistic


def test_other_leads_than_the_model_has_are_refused(arrays) -> None:
    signals = jax.ShapeDtypeStruct((1, 8, 96), jnp.float32)
    with pytest.raises(UserError, match=r"found shape \(1, 8, 96\); expected \(batch, 12 leads, samples\)"):
        jax.eval_shape(lambda arrays, x: STRUCTURE.bind(arrays)(x), arrays, signals)
    encoder = nnx.eval_shape(lambda: build_encoder("merl", {**SMALL, "num_leads": 8}, 1, nnx.Rngs(0)))
    assert jax.eval_shape(lambda e, x: e(x), encoder, signals).shape == (1, 1, 32)


# Names, configs and checkpoints


@pytest.fixture(scope="module")
def published(arrays) -> dict[str, np.ndarray]:
    return to_published("merl", arrays)


def weights_of(loaded) -> dict[str, np.ndarray]:
    return to_published("merl", STRUCTURE.arrays(loaded.module))


def assert_same_weights(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def test_a_checkpoint_is_read_from_a_dict_a_training_file_or_safetensors(published, tmp_path) -> None:
    save_safetensors(tmp_path / "encoder.safetensors", published)
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in published.items()}
    others = {
        "lm.pooler.dense.bias": np.zeros(3),
        "proj_t.0.weight": np.zeros((2, 2)),
        "downconv.bias": np.ones(1),
    }
    counters = {"resnet.bn1.num_batches_tracked": np.zeros((), np.int64)}
    for checkpoint in (
        published,
        {"model_state_dict": {**wrapped, **others, **counters}, "epoch": 3},
        tmp_path / "encoder.safetensors",
        str(tmp_path / "encoder.safetensors"),
    ):
        assert_same_weights(weights_of(load_encoder("merl", checkpoint, **SMALL)), published)


def test_a_torch_file_is_read(published, tmp_path) -> None:
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(array.copy()) for name, array in published.items()}
    torch.save({"model_state_dict": tensors}, tmp_path / "encoder.pt")
    assert_same_weights(weights_of(load_encoder("merl", tmp_path / "encoder.pt", **SMALL)), published)


def test_a_torch_file_without_torch_says_what_to_install(monkeypatch, tmp_path) -> None:
    (tmp_path / "encoder.pt").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"found no PyTorch.*pip install torch"):
        load_encoder("merl", tmp_path / "encoder.pt", **SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("resnet.bn1.weight"), "found no resnet.bn1.weight; expected the"),
        (lambda t: t.update({"resnet.fc.weight": np.zeros(2)}), "found unknown resnet.fc.weight"),
        (
            lambda t: t.update({"resnet.conv1.weight": np.zeros((4, 12, 5), np.float32)}),
            r"found resnet.conv1.weight float32\[4, 12, 5\]; expected floating \[4, 12, 7\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(published, change, message: str) -> None:
    tensors = dict(published)
    change(tensors)
    with pytest.raises(UserError, match=message):
        load_encoder("merl", tensors, **SMALL)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("merlin", {}, "encoder.name: found 'merlin'; expected one of merl, .*; did you mean 'merl'?"),
        ("st-mem", {}, "encoder.name: found 'st-mem'; expected one of merl, .*; did you mean 'st_mem'"),
        (
            "merl",
            {"resnet_typ": "resnet18"},
            "resnet_typ: found an unknown field.*did you mean 'resnet_type'?",
        ),
        ("merl", {"resnet_type": "resnet19"}, "resnet_type: found 'resnet19'; expected one of resnet, "),
        ("merl", {"width": 0}, "encoder.config.width: found 0; expected a whole number from 1 to 100000"),
    ],
)
def test_unknown_names_and_fields_are_refused(name: str, config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_encoder(name, **config)


@pytest.mark.parametrize("file", ["absent.safetensors", "weights.onnx"])
def test_files_that_cannot_be_read_are_refused(tmp_path, file: str) -> None:
    (tmp_path / "weights.onnx").write_bytes(b"x")
    with pytest.raises(UserError, match=f"encoder.checkpoint: found .*{file}"):
        load_encoder("merl", tmp_path / file, **SMALL)


def test_unknown_reference_behaviours_are_refused() -> None:
    with pytest.raises(UserError, match="compat"):
        load_encoder("merl", compat=("no_such_behaviour",), **SMALL)
