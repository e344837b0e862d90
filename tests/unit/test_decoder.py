"""The decoder of every family: its cache, packed rows, windows, learned positions, dropout and rematerialisation."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_llms import TINY, WINDOW, tiny_config, tiny_llm

from elm_jax.errors import UserError
from elm_jax.inference.generate import generate
from elm_jax.models.attention import Blocks, attend, choose_attention, packed_mask, padding_mask, windowed
from elm_jax.models.decoder import Decoder
from elm_jax.models.families import from_hf, settled, to_hf
from elm_jax.models.layers import Embedding, LearnedPositions, Linear, repeated

PREFIX, BRANCHES = 6, (7, 5)  # tokens of a packed row; the window is smaller than each part


@pytest.fixture(params=TINY)
def llm(request) -> Decoder:
    return tiny_llm(request.param)


def tokens_of(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 64, shape)


def changed(llm: Decoder, **options) -> Decoder:
    """The same parameters in a decoder with other options."""
    other = Decoder(llm.config, nnx.Rngs(0), **options)
    nnx.update(other, nnx.state(llm))
    return other


def test_generation_with_a_cache_equals_recomputing_every_prefix(llm):
    new, mask = 8, np.array([[0] * 7 + [1] * 5, [1] * 12])
    tokens = tokens_of(mask.shape) * mask
    found = np.asarray(generate(llm, tokens, attention_mask=mask, max_new_tokens=new))
    compute = jax.jit(lambda row, valid: llm(row, valid))
    for prompt, valid, out in zip(tokens, mask, found, strict=True):
        row = np.zeros((1, 20), int)  # one shape, so that it compiles once
        length = valid.sum()
        row[0, :length] = prompt[valid == 1]
        row[0, length : length + new] = out
        logits = compute(row, (np.arange(20) < length + new)[None].astype(int))
        expected = np.asarray(logits[0, length - 1 : length + new - 1]).argmax(-1)
        assert out.tolist() == expected.tolist()
    assert len(np.unique(found)) > 2, "the model is too dull to test anything"


def test_packed_rows_with_a_shared_prefix_equal_separate_rows(llm):
    tokens = tokens_of((1, PREFIX + sum(BRANCHES) + 2))
    groups, branches = np.zeros_like(tokens), np.zeros_like(tokens)
    positions = np.zeros_like(tokens)
    ends = PREFIX + np.cumsum((0, *BRANCHES))
    groups[0, : ends[-1]], positions[0, :PREFIX] = 1, np.arange(PREFIX)
    for number, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        branches[0, start:end] = number + 1
        positions[0, start:end] = PREFIX + np.arange(end - start)

    @jax.jit
    def compute(tokens):
        chains = llm.chains(groups, branches)
        return llm.logits(llm.hidden(llm.embed(tokens), positions, packed_mask(groups, branches), chains=chains))

    packed = compute(tokens)
    for start, end in zip(ends, ends[1:], strict=False):
        alone = llm(np.concatenate([tokens[:, :PREFIX], tokens[:, start:end]], axis=1))
        assert np.allclose(packed[:, start:end], alone[:, PREFIX:], atol=2e-5), (start, end)


def test_long_frequencies_are_of_a_conversation_not_of_a_row():
    """A short conversation beside a long one in a packed row; both as they are alone."""
    llm, lengths = tiny_llm("phi3"), (9, 50, 12)
    assert lengths[0] + lengths[2] < 48 < lengths[1]
    tokens = tokens_of((1, sum(lengths)))
    groups = np.repeat([1, 2, 3], lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    mask = packed_mask(groups, np.zeros_like(groups))
    packed = jax.jit(lambda x: llm.logits(llm.hidden(llm.embed(x), positions, mask)))(tokens)
    for start, length in zip(np.cumsum((0, *lengths)), lengths, strict=False):
        alone = llm(tokens[:, start : start + length])
        assert np.allclose(packed[:, start : start + length], alone, atol=2e-5)


def test_a_run_with_long_frequencies_has_one_kind_of_them():
    """Its conversations stay within the original context, or go beyond and are turned as long ones all."""
    llm, tokens = tiny_llm("phi3"), tokens_of((1, 54))
    assert settled(llm.config, 48) == replace(llm.config, max_len=48)
    graph, state = nnx.split(Decoder(settled(llm.config, 49), nnx.Rngs(0)))
    beyond = nnx.merge(graph, nnx.state(llm))
    for longest in (48, 49):  # an export turns as the run does
        assert settled(from_hf(to_hf(settled(llm.config, longest)), "x"), longest) == settled(llm.config, longest)
    expected = llm(tokens)
    assert np.array_equal(beyond(tokens), expected)
    assert np.allclose(beyond(tokens[:, :20]), expected[:, :20], atol=2e-5)
    assert not np.allclose(llm(tokens[:, :20]), expected[:, :20], atol=1e-3)
    with pytest.raises(UserError, match="20 tokens and 29 to generate; expected at most 48, its short context"):
        generate(llm, tokens[:, :20], max_new_tokens=29)
    assert generate(beyond, tokens[:, :20], max_new_tokens=29).shape == (1, 29)
    found = np.asarray(generate(llm, tokens[:, :50], max_new_tokens=4))[0]
    again = np.asarray(llm(np.concatenate([tokens[:, :50], found[None]], 1)))[0, 49:-1].argmax(-1)
    assert found.tolist() == again.tolist()


def test_blocks_of_keys_equal_all_keys(llm):
    tokens, block = tokens_of((2, 24)), 4
    groups = np.array([[1] * 10 + [2] * 13 + [0]] * 2, np.int32)
    branches = np.array([[0] * 4 + [1] * 3 + [2] * 3 + [0] * 5 + [1] * 8 + [0]] * 2, np.int32)
    positions = np.array([[*range(7), *range(4, 7), *range(13), 0]] * 2, np.int32)
    seen = np.asarray(packed_mask(groups, branches))[:, 0].reshape(2, 6, block, 6, block).any((2, 4))
    order = np.argsort(~seen, axis=-1, kind="stable")[..., : seen.sum(-1).max()]
    blocks = Blocks(jnp.asarray(np.where(np.take_along_axis(seen, order, -1), order, -1), jnp.int32))
    chains, mask = llm.chains(groups, branches), packed_mask(groups, branches, blocks)
    expected = llm.hidden(llm.embed(tokens), positions, packed_mask(groups, branches), chains=chains)
    found = llm.hidden(llm.embed(tokens), positions, mask, blocks=blocks, chains=chains)
    assert blocks.index.shape[-1] < 6 and np.allclose(found, expected, atol=1e-5)


# A period of two, and of one; layers of two kinds.
@pytest.mark.parametrize("family", ["gemma2", "gpt2", "qwen3_5_text", "qwen3_moe"])
def test_scanned_layers_equal_unrolled_ones_under_every_policy_of_rematerialisation(family):
    llm, tokens = tiny_llm(family), tokens_of((1, 9))

    def loss_and_gradient(**options):
        graph, state = nnx.split(changed(llm, **options))
        return jax.jit(jax.value_and_grad(lambda state: nnx.merge(graph, state)(tokens).std()))(state)

    value, gradient = loss_and_gradient()
    for options in ({"scan": False, "remat": "dots"}, {"remat": "full"}):
        other, found = loss_and_gradient(**options)
        assert np.isclose(value, other, rtol=1e-5), options
        scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(gradient), strict=True):
            assert np.allclose(ours, theirs, atol=1e-5 * scale), options


# Windows and soft caps


def test_a_window_counts_positions_within_the_conversation():
    everything = jnp.ones((1, 1, 3, 4), bool)
    queries, keys = jnp.array([[4, 5, 9]]), jnp.array([[0, 3, 4, 8]])
    assert windowed(everything, queries, keys, None) is everything
    expected = [[False, True, True, True], [False, True, True, True], [False, False, False, True]]
    assert windowed(everything, queries, keys, 4)[0, 0].tolist() == expected


def test_only_the_windowed_layers_forget():
    """With one layer nothing beyond the window matters; with an unwindowed layer above, everything does."""
    tokens = tokens_of((1, 10))
    other = tokens.copy()
    other[0, 10 - 1 - WINDOW] = (tokens[0, 10 - 1 - WINDOW] + 1) % 64
    local = Decoder(tiny_config("gemma2", layers=1), nnx.Rngs(0))
    assert local.config.windows == (WINDOW,)
    assert np.array_equal(local(tokens)[0, -1], local(other)[0, -1])
    assert not np.allclose(local(tokens)[0, -2], local(other)[0, -2], atol=1e-3), "one earlier it is in the window"
    both = tiny_llm("gemma2")
    assert not np.allclose(both(tokens)[0, -1], both(other)[0, -1], atol=1e-3)


@pytest.mark.parametrize("layers, period", [(1, 1), (3, 3), (4, 2)])
def test_any_number_of_layers_can_alternate(layers, period):
    config = tiny_config("gemma2", layers=layers)
    assert len(config.windows) == period
    windows = config.windows * (layers // period)
    assert windows == tuple(WINDOW if i % 2 == 0 else None for i in range(layers))
    assert np.isfinite(Decoder(config, nnx.Rngs(0))(tokens_of((1, 6)))).all()


def test_a_soft_cap_bends_scores_before_the_mask():
    q, k, v = (3 * jax.random.normal(jax.random.key(i), (1, 4, 2, 8)) for i in range(3))
    mask = jnp.tril(jnp.ones((4, 4), bool))[None, None]
    scores = 2.0 * jnp.tanh(jnp.einsum("bthd,bshd->bhts", q, k) * 0.5 / 2.0)
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    expected = jnp.einsum("bhts,bshd->bthd", weights, v)
    assert np.allclose(attend(q, k, v, mask, 0.5, "xla", 2.0), expected, atol=1e-5)
    assert not np.allclose(attend(q, k, v, mask, 0.5, "xla"), expected, atol=1e-2)


def test_a_kernel_without_soft_caps_is_refused_by_name_and_passed_over_by_auto():
    cap = tiny_config("gemma2").attention_cap
    with pytest.raises(UserError, match="caps its scores at 2.*no soft cap.*llm.attention=xla"):
        choose_attention("cudnn", 64, "bfloat16", "gpu", softcap=cap)
    assert choose_attention("auto", 64, "bfloat16", "gpu", softcap=cap) == "xla"
    assert choose_attention("auto", 64, "bfloat16", "gpu") == "cudnn"
    with pytest.raises(UserError, match="llm.attention=cudnn: found a model that caps its scores"):
        changed(tiny_llm("gemma2"), attention="cudnn")(tokens_of((1, 4)))


@pytest.mark.parametrize("name", ["auto", "xla"])
def test_every_path_that_can_be_chosen_for_gemma2_computes_the_same(name):
    llm = tiny_llm("gemma2")
    chosen = choose_attention(name, llm.config.head_dim, "float32", softcap=llm.config.attention_cap)
    tokens = tokens_of((2, 12))
    assert np.array_equal(changed(llm, attention=chosen)(tokens), llm(tokens))


# Learned positions


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_prompt_beyond_the_learned_positions_is_an_error(family):
    llm = tiny_llm(family)
    assert np.isfinite(llm(tokens_of((1, 64)))).all()
    with pytest.raises(UserError, match="found 65 tokens; expected at most 64"):
        llm(tokens_of((1, 65)))
    with pytest.raises(UserError, match="found 60 tokens and 5 to generate; expected at most 64"):
        generate(llm, tokens_of((1, 60)), max_new_tokens=5)
    padded = np.zeros((1, 70), int)
    padded[0, -60:] = 1
    assert (np.asarray(generate(llm, tokens_of((1, 70)), attention_mask=padded, max_new_tokens=4)) >= 0).all()


def test_in_a_traced_function_a_position_beyond_the_table_is_not_a_number():
    llm = tiny_llm("gpt2")
    logits = jax.jit(lambda tokens: llm(tokens))(tokens_of((1, 65)))
    assert np.isnan(logits[0, 64]).all()


def test_position_zero_of_opt_is_the_third_row_of_its_table():
    llm = tiny_llm("opt")
    assert llm.positions.table.shape == (66, 32)
    found = llm.placed(jnp.zeros((1, 2, 32)), jnp.array([[0, 1]]))
    assert np.array_equal(found[0], llm.positions.table[...][2:4])


# Dropout


def hidden(llm: Decoder, key: jax.Array | None) -> np.ndarray:
    tokens = tokens_of((2, 8))
    positions, mask = jnp.broadcast_to(jnp.arange(8), (2, 8)), padding_mask(jnp.ones((2, 8), int))
    return np.asarray(jax.jit(lambda key: llm.hidden(llm.embed(tokens), positions, mask, key))(key))


def test_without_a_key_nothing_drops_and_with_one_the_key_decides():
    plain, llm = tiny_llm("gemma2"), changed(tiny_llm("gemma2"), dropout=0.3)
    assert np.array_equal(hidden(llm, None), hidden(plain, None))
    first = hidden(llm, jax.random.key(1))
    assert np.array_equal(first, hidden(llm, jax.random.key(1)))
    assert not np.allclose(first, hidden(llm, jax.random.key(2)), atol=1e-2)
    assert not np.allclose(first, hidden(plain, None), atol=1e-2)
    assert np.array_equal(hidden(plain, jax.random.key(1)), hidden(plain, None)), "rate 0"


@pytest.mark.parametrize("options", [{"scan": False}, {"remat": "dots"}, {"remat": "full"}])
def test_dropout_is_the_same_however_the_layers_are_run(options):
    llm = tiny_llm("gemma2")
    expected = hidden(changed(llm, dropout=0.3), jax.random.key(1))
    assert np.allclose(hidden(changed(llm, dropout=0.3, **options), jax.random.key(1)), expected, atol=1e-5)


def test_every_layer_draws_its_own_dropout():
    """Eight layers that add ones: a unit's sum counts the layers that kept it. One draw for all gives two sums."""
    llm = Decoder(tiny_config("gpt2", layers=8), nnx.Rngs(0), dropout=0.5)
    for linear, bias in ((llm.layers.attention.o, 1.0), (llm.layers.mlp.down, 0.0)):
        linear.kernel[...] = jnp.zeros_like(linear.kernel[...])
        linear.bias[...] = jnp.full_like(linear.bias[...], bias)
    llm.positions.table[...] = jnp.zeros_like(llm.positions.table[...])
    mask = padding_mask(jnp.ones((1, 2), int))
    states = llm.hidden(jnp.zeros((1, 2, 32)), jnp.zeros((1, 2), int), mask, jax.random.key(0))
    assert len(np.unique(np.round(states[0, 0], 3))) > 4, "the final norm keeps the sums of a token apart"
    assert not np.array_equal(states[0, 0], states[0, 1])


@pytest.mark.parametrize("times", [64, 4096])
def test_gradients_of_what_many_rows_share_are_summed_in_float32(times):
    """Biases, and tokens and positions that are added to each row of a batch."""
    linear = Linear(4, 8, (None, None), nnx.Rngs(0), bias=True)
    token = nnx.Param(jnp.ones(8), axes=(None,))
    graph, state = nnx.split((linear, token))
    parts = jax.random.normal(jax.random.key(0), (times, 8)) + 0.3

    def loss(state, dtype):
        linear, token = nnx.merge(graph, state)
        rows = linear(jnp.ones((times, 4), dtype)) + repeated(token, (times, 8), dtype)
        assert rows.dtype == dtype
        return (rows * parts.astype(dtype)).sum(dtype=jnp.float32)

    low, high = (jax.jit(jax.grad(loss), static_argnums=1)(state, d) for d in (jnp.bfloat16, jnp.float32))
    for place in (lambda state: state[0]["bias"], lambda state: state[1]):
        np.testing.assert_allclose(place(low)[...], place(high)[...], rtol=2e-3)


@pytest.mark.parametrize("kind", ["embedding", "positions"])
def test_gradients_of_a_frequent_row_are_summed_in_float32(kind):
    """A token that comes 4096 times: in bfloat16 its sum would stop growing after some hundred."""
    rngs, times, width = nnx.Rngs(0), 4096, 8
    module = Embedding(6, width, rngs) if kind == "embedding" else LearnedPositions(6, 0, width, rngs)
    index, graph, state = jnp.full((4, times // 4), 3), *nnx.split(module)
    parts = jax.random.normal(jax.random.key(0), (*index.shape, width)) + 0.3

    def loss(state, dtype):
        return (nnx.merge(graph, state)(index, dtype) * parts.astype(dtype)).sum(dtype=jnp.float32)

    low, high = (jax.jit(jax.grad(loss), static_argnums=1)(state, d)["table"][...] for d in (jnp.bfloat16, jnp.float32))
    assert low.dtype == jnp.float32 and not low[jnp.arange(6) != 3].any()
    np.testing.assert_allclose(low[3], high[3], rtol=0.01)
