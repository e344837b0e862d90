"""Generation against plain recomputation, and what it may compile anew. Also masks and attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from elm_jax.errors import UserError
from elm_jax.inference.generate import bucket, generate, generate_from_prompt
from elm_jax.inference.sampling import from_nucleus
from elm_jax.models import hints
from elm_jax.models.attention import attend, choose_attention, packed_mask, padding_mask, positions_from_mask
from elm_jax.models.decoder import Decoder
from elm_jax.models.families import scratch_config

SIZES = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 48, "tied": False}


@pytest.fixture(scope="module")
def llm() -> Decoder:
    """A random model. Untied: tied and untrained, it would only repeat its last token."""
    return Decoder(scratch_config(SIZES, 64), nnx.Rngs(3))


def prompts(lengths: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded random prompts and their mask."""
    width, rng = max(lengths), np.random.default_rng(seed)
    mask = np.arange(width)[None] >= width - np.array(lengths)[:, None]
    return rng.integers(1, 64, mask.shape) * mask, mask.astype(np.int32)


def greedy_by_recomputation(llm: Decoder, prompt: np.ndarray, new: int) -> list[int]:
    row = list(prompt)
    for _ in range(new):
        padded = np.array([row + [0] * (32 - len(row))])  # one shape, so that it compiles once
        mask = (np.arange(32) < len(row)).astype(np.int32)[None]
        row.append(int(jnp.argmax(llm(padded, mask)[0, len(row) - 1])))
    return row[len(prompt) :]


def test_greedy_equals_recomputing_every_prefix(llm):
    tokens, mask = prompts([5, 12, 20])
    found = np.asarray(generate(llm, tokens, attention_mask=mask, max_new_tokens=8))
    for row, valid, out in zip(tokens, mask, found, strict=True):
        assert out.tolist() == greedy_by_recomputation(llm, row[valid == 1], 8)
    assert len(np.unique(found)) > 5, "the model is too dull to test anything"


def test_unrolled_layers_and_gaps_in_the_mask_change_nothing(llm):
    tokens, mask = prompts([9])
    expected = generate(llm, tokens, attention_mask=mask)
    graph, state = nnx.split(llm)
    unrolled = nnx.merge(graph, state)
    unrolled.scan = False
    assert np.array_equal(generate(unrolled, tokens, attention_mask=mask), expected)
    holes = np.insert(tokens, [2, 5, 9], 7, axis=1), np.insert(mask, [2, 5, 9], 0, axis=1)
    assert np.array_equal(generate(llm, holes[0], attention_mask=holes[1]), expected)


def test_rows_do_not_depend_on_their_batch(llm):
    tokens, mask = prompts([5, 12, 20])
    batch = generate(llm, tokens, attention_mask=mask)
    alone = generate(llm, tokens[:1, mask[0] == 1])
    assert np.array_equal(batch[:1], alone)


def test_a_row_ends_after_its_end_token(llm):
    tokens, mask = prompts([5, 12])
    free = np.asarray(generate(llm, tokens, attention_mask=mask, max_new_tokens=10))
    eos = int(free[0, 3])
    ended = np.asarray(generate(llm, tokens, attention_mask=mask, max_new_tokens=10, eos_ids=(eos, 63)))
    for row, whole in zip(ended, free, strict=True):
        ends = np.flatnonzero(np.isin(whole, (eos, 63)))
        stop = ends[0] + 1 if len(ends) else len(whole)
        assert np.array_equal(row[:stop], whole[:stop]) and (row[stop:] == -1).all()


def test_a_row_of_padding_generates_nothing(llm):
    tokens, mask = prompts([5, 12])
    with_empty = generate(
        llm, np.vstack([tokens, tokens[:1]]), attention_mask=np.vstack([mask, mask[:1] * 0])
    )
    assert (with_empty[2] == -1).all()
    assert np.array_equal(with_empty[:2], generate(llm, tokens, attention_mask=mask))


def test_only_the_bucket_and_the_number_of_new_tokens_compile_anew(llm):
    generate_from_prompt.clear_cache()
    for length, temperature, top_p, eos in [(5, 0, 1, 1), (17, 0.7, 0.9, 2), (64, 1.3, 0.5, 3)]:
        tokens, mask = prompts([length, 3])
        key = jax.random.key(length)
        generate(llm, tokens, None, mask, 4, temperature, top_p, (eos,), key)
    assert generate_from_prompt._cache_size() == 1
    generate(llm, *prompts([70])[:1], eos_ids=(1,), max_new_tokens=4)
    assert generate_from_prompt._cache_size() == 2


def test_updated_weights_are_used_without_compiling_anew(llm):
    tokens, mask = prompts([7])
    before = generate(llm, tokens, attention_mask=mask)
    compiled = generate_from_prompt._cache_size()
    graph, state = nnx.split(llm)
    other = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[..., ::-1], state))
    assert not np.array_equal(generate(other, tokens, attention_mask=mask), before)
    assert generate_from_prompt._cache_size() == compiled


@pytest.mark.parametrize("length", [1, 63, 64, 65, 500, 513, 1000, 2049, 5000])
def test_buckets_are_few_and_waste_little(length):
    padded = bucket(length)
    assert padded >= length and padded % 64 == 0
    assert padded - length < max(64, length / 4)


def test_sampling_follows_its_key(llm):
    tokens, mask = prompts([5, 12])

    def draw(seed):
        return np.asarray(generate(llm, tokens, None, mask, 12, 1.0, 1.0, (), jax.random.key(seed)))

    assert np.array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))


def test_a_tiny_nucleus_is_greedy(llm):
    tokens, mask = prompts([5, 12])
    drawn = generate(llm, tokens, None, mask, 8, 1.0, 1e-6, (), jax.random.key(0))
    assert np.array_equal(drawn, generate(llm, tokens, attention_mask=mask, max_new_tokens=8))


def drawn_from(logits, top_p, count):
    keys = jax.random.split(jax.random.key(0), count)
    tokens, log_probs = jax.jit(from_nucleus)(keys, jnp.tile(logits, (count, 1)), jnp.float32(top_p))
    expected = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))[tokens]
    np.testing.assert_allclose(log_probs, expected, atol=1e-5)
    return np.bincount(tokens, minlength=len(logits)) / count


@pytest.mark.parametrize("top_p", [1e-6, 0.4, 0.7, 0.95, 1.0])
def test_tokens_are_drawn_from_the_fewest_that_reach_top_p(top_p):
    """Each as often as it is likely among these. Logits are in several blocks, some alike, and some never drawn."""
    logits = (np.random.default_rng(0).normal(size=300) * 2).round(1).astype(np.float32)
    logits[:3] = -np.inf, 0.0, -0.0
    sure = np.exp(logits.astype(np.float64))
    sure /= sure.sum()
    kept = sure * (np.where(logits > logits[:, None], sure, 0.0).sum(-1) < top_p)
    kept /= kept.sum()
    found = drawn_from(logits, top_p, 4000)
    assert not found[kept == 0].any()
    assert (np.abs(found - kept) < 5 * np.sqrt(kept / 4000) + 1 / 4000).all()


def test_what_is_not_finite_ends():
    assert drawn_from(np.array([0.0, -np.inf, -np.inf], np.float32), 0.9, 4)[0] == 1
    tokens, log_probs = from_nucleus(jax.random.split(jax.random.key(0)), jnp.full((2, 9), jnp.nan), jnp.float32(0.9))
    assert ((tokens >= 0) & (tokens < 9)).all() and np.isnan(log_probs).all()


@pytest.mark.slow
def test_sampled_frequencies_are_the_probabilities(llm):
    """First tokens drawn for many equal rows, against softmax(logits / temperature)."""
    temperature, tokens = 0.4, np.tile(np.array([[3, 9]]), (500, 1))
    drawn = np.concatenate(
        [
            generate(llm, tokens, None, None, 1, temperature, 1.0, (), jax.random.key(i))[:, 0]
            for i in range(8)
        ]
    )
    expected = np.asarray(jax.nn.softmax(llm(tokens[:1])[0, -1] / temperature))
    found = np.bincount(drawn, minlength=64) / len(drawn)
    assert expected.max() > 0.1, "too even a distribution to test anything"
    assert (np.abs(found - expected) < 5 * np.sqrt(expected / len(drawn)) + 1 / len(drawn)).all()


@pytest.mark.parametrize("wrong", [
    {"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": 1.0},
    {"top_p": 0.0}, {"top_p": 1.5},
])  # fmt: skip
def test_values_out_of_range_are_errors(llm, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        generate(llm, np.ones((1, 3), int), **wrong)


def test_either_tokens_or_embeddings(llm):
    with pytest.raises(ValueError, match="either"):
        generate(llm)
    with pytest.raises(ValueError, match="attention_mask"):
        llm(np.ones((1, 3), int), attention_mask=np.ones((1, 4), int))


# Attention and masks


def test_grouped_attention_equals_repeated_keys():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 5, n, 8)) for i, n in enumerate((6, 2, 2)))
    mask = jnp.tril(jnp.ones((5, 5), bool))[None, None]
    found = attend(q, k, v, mask, 0.3, "xla")
    scores = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 3, axis=2)) * 0.3
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    assert np.allclose(found, jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(v, 3, axis=2)), atol=1e-6)


def test_what_is_masked_has_no_weight_and_a_row_that_sees_nothing_is_zero():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 3, 2, 8)) for i in range(3))
    mask = jnp.array([[True, False, False], [False, False, False], [True, True, False]])[None, None]
    found = attend(q, k, v, mask, 1.0, "xla")
    assert np.array_equal(found, attend(q, k, v.at[:, 2].set(1e30), mask, 1.0, "xla"))
    assert (found[0, 1] == 0).all() and np.isfinite(found).all()
    gradient = jax.grad(lambda q: attend(q, k, v, mask, 1.0, "xla").sum())(q)
    assert np.isfinite(gradient).all()


def test_packed_rows_see_their_prefix_and_their_own_branch():
    groups = jnp.array([[1, 1, 1, 1, 1, 2, 2, 0]])
    branches = jnp.array([[0, 0, 1, 1, 2, 0, 1, 0]])
    expected = [
        "10000000",
        "11000000",
        "11100000",
        "11110000",
        "11001000",
        "00000100",
        "00000110",
        "00000001",
    ]
    found = packed_mask(groups, branches)
    assert found.shape == (1, 1, 8, 8) and found.dtype == bool
    assert ["".join(str(int(x)) for x in row) for row in found[0, 0]] == expected


def test_a_branch_computes_as_if_it_stood_alone(llm):
    """Prefix 5 4, branches 7 8 9 and 3 2: their states equal those of separate rows."""
    tokens = jnp.array([[5, 4, 7, 8, 9, 3, 2, 0]])
    positions = jnp.array([[0, 1, 2, 3, 4, 2, 3, 0]])
    mask = packed_mask(jnp.array([[1, 1, 1, 1, 1, 1, 1, 0]]), jnp.array([[0, 0, 1, 1, 1, 2, 2, 0]]))
    packed = llm.logits(llm.hidden(llm.embed(tokens), positions, mask))
    assert np.allclose(packed[0, :5], llm(np.array([[5, 4, 7, 8, 9]]))[0], atol=1e-4)
    assert np.allclose(packed[0, 5:7], llm(np.array([[5, 4, 3, 2]]))[0, 2:], atol=1e-4)


def test_masks_and_positions_of_padding_on_either_side():
    mask = jnp.array([[0, 0, 1, 1], [1, 1, 0, 0]])
    assert positions_from_mask(mask).tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]
    seen = padding_mask(mask)[:, 0]
    assert seen[0, 3].tolist() == [False, False, True, True] and seen[1, 1].tolist() == [
        True,
        True,
        False,
        False,
    ]
    assert seen.any(-1).all(), "a padding row that sees nothing"


def test_fused_attention_is_refused_where_it_cannot_run():
    q = jnp.ones((1, 2, 2, 8), jnp.bfloat16)
    with pytest.raises(UserError, match="platform cpu"):
        attend(q, q, q, jnp.ones((1, 1, 2, 2), bool), 1.0, "cudnn")
    with pytest.raises(UserError, match="float32"):
        choose_attention("cudnn", 64, "float32", "gpu")
    with pytest.raises(UserError, match="head size 12"):
        choose_attention("cudnn", 12, "bfloat16", "gpu")
    with pytest.raises(UserError, match="flash"):
        choose_attention("flash", 64, "bfloat16", "gpu")
    assert choose_attention("auto", 64, "bfloat16", "gpu") == "cudnn"
    assert (
        choose_attention("auto", 64, "float32", "gpu")
        == choose_attention("auto", 64, "bfloat16", "cpu")
        == "xla"
    )


# Building


def test_a_model_is_built_without_arrays_and_stacked():
    config = scratch_config(SIZES, 64)
    state = nnx.state(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), param_dtype="bfloat16")))
    leaves = jax.tree.leaves(state)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.dtype == jnp.bfloat16 for leaf in leaves)
    for path, variable in nnx.to_flat_state(state):
        stacked = 1 if path[0] == "layers" else 0
        assert len(variable.axes) == len(variable.shape) - stacked, path
        assert not stacked or variable.shape[0] == config.layers


def test_layers_start_different_from_each_other():
    llm = Decoder(scratch_config(SIZES, 64), nnx.Rngs(0))
    first, second = llm.layers.attention.q.kernel[...]
    assert not np.allclose(first, second)


def test_a_placement_sees_every_axis_named_and_is_part_of_the_compilation(llm):
    class Recorder:
        platform = "cpu"

        def __init__(self):
            self.activations, self.weights = set(), set()

        def activation(self, x, axes):
            assert x.ndim == len(axes)
            self.activations.add(axes)
            return x

        def weight(self, w, axes, dtype):
            assert w.ndim == len(axes)
            self.weights.add(axes)
            return w.astype(dtype)

        def ways(self, axis):
            return 1

        def copies(self, w, axes, rows):
            assert w.ndim == len(axes)
            return w[None]

    recorder, tokens = Recorder(), np.array([[1, 2, 3]])
    expected = llm(tokens)
    with hints.placed(recorder):
        found = llm(tokens)
    assert np.array_equal(found, expected)
    assert {("batch", None, "vocab"), ("batch", None, None), ("vocab", None)} <= recorder.activations
    assert {("batch", None, "heads", None), ("batch", None, "kv_heads", None)} <= recorder.activations
    assert {("vocab", "embed"), ("embed", "heads"), ("heads", "embed"), ("embed", "mlp")} <= recorder.weights
