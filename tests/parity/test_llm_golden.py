"""The decoder against transformers' own numbers: the llm_* goldens, and a real pretrained Llama."""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from elm_jax.inference.generate import generate
from elm_jax.models.decoder import Decoder
from elm_jax.models.families import family_of, from_hf, to_hf
from elm_jax.weights.load import load_llm, parameters
from elm_jax.weights.rules import export

NAMES = ("llm_llama_tied", "llm_llama_untied_sharded", "llm_qwen2_tied")
FORWARD, GRADIENT = 1e-5, 1e-4  # largest difference, as a part of the largest reference value


@dataclass(frozen=True)
class Case:
    folder: Path
    llm: Decoder
    tokens: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    expected: dict[str, np.ndarray]

    @property
    def valid(self) -> np.ndarray:
        return self.mask == 1


@cache
def load_case(folder: Path) -> Case:
    inputs = np.load(folder / "inputs.npz")
    expected = dict(np.load(folder / "outputs.npz"))
    arrays = (inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
    return Case(folder, load_llm(folder), *arrays, expected)


@pytest.fixture(params=NAMES)
def case(request, golden) -> Case:
    return load_case(golden(request.param))


def assert_within(found, expected, tolerance: float, what: str) -> None:
    """The largest difference is at most `tolerance` of the largest expected value."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, what
    ratio = np.abs(found - expected).max() / np.abs(expected).max()
    assert ratio <= tolerance, f"{what}: off by {ratio:.1e} of the scale, allowed {tolerance:.0e}"


def to_right_padding(rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The same rows with their padding moved from the left to the right."""
    return np.stack([np.roll(row, int(m.sum()), axis=0) for row, m in zip(rows, mask, strict=True)])


def test_logits_match_whether_layers_are_scanned_or_unrolled(case):
    for scan in (True, False):
        graph, state = nnx.split(case.llm)
        llm = nnx.merge(graph, state)
        llm.scan = scan
        logits = llm(case.tokens, case.mask)
        assert logits.dtype == jnp.float32
        what = f"logits with scan={scan}"
        assert_within(logits[case.valid], case.expected["logits"][case.valid], FORWARD, what)


def test_logits_of_right_padded_and_of_unpadded_prompts_match(case):
    tokens, mask = to_right_padding(case.tokens, case.mask), to_right_padding(case.mask, case.mask)
    logits = case.llm(tokens, mask)
    assert_within(logits[mask == 1], case.expected["logits"][case.valid], FORWARD, "right padding")
    alone = case.llm(case.tokens[1:2, case.valid[1]])
    assert_within(alone, case.expected["logits_row1_unpadded_nomask"], FORWARD, "one row without padding")


def test_padding_is_finite_and_its_tokens_do_not_matter(case):
    other = np.where(case.valid, case.tokens, 7)
    a, b = case.llm(case.tokens, case.mask), case.llm(other, case.mask)
    assert np.isfinite(a).all()
    assert np.array_equal(a[case.valid], b[case.valid])


def test_hidden_states_of_every_layer_match(case):
    found = np.asarray(case.llm.all_hidden(case.tokens, case.mask))
    for layer, expected in enumerate(case.expected["hidden_states"]):
        assert_within(found[layer][case.valid], expected[case.valid], FORWARD, f"hidden state {layer}")


def test_embeddings_in_place_of_tokens_give_the_same_logits(case):
    from_embeddings = case.llm(
        inputs_embeds=case.llm.embed(jnp.asarray(case.tokens)), attention_mask=case.mask
    )
    assert np.array_equal(from_embeddings, case.llm(case.tokens, case.mask))


def loss_of(llm: Decoder, prompt: dict, case: Case) -> jax.Array:
    logits = llm(**prompt, attention_mask=case.mask)[:, :-1]
    labels = case.labels[:, 1:]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), np.maximum(labels, 0)[..., None], -1)[..., 0]
    return -jnp.sum(picked * (labels >= 0)) / (labels >= 0).sum()


def loss_and_gradients(case: Case, remat: str = "none") -> tuple[jax.Array, nnx.State, jax.Array]:
    """The loss, its gradients by the parameters, and by the embeddings of the tokens."""
    graph, state = nnx.split(case.llm)

    def loss(state, change):
        llm = nnx.merge(graph, state)
        llm.remat = remat
        return loss_of(llm, {"inputs_embeds": llm.embed(jnp.asarray(case.tokens)) + change}, case)

    no_change = jnp.zeros((*case.tokens.shape, case.llm.config.hidden))
    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state, no_change)
    return value, *gradients


def test_loss_and_gradients_match(case):
    value, gradients, by_embeddings = loss_and_gradients(case)
    assert math.isclose(value, float(case.expected["loss"]), rel_tol=FORWARD)
    expected = case.expected["grad_inputs_embeds"][case.valid]
    assert_within(by_embeddings[case.valid], expected, GRADIENT, "gradient of inputs_embeds")

    arrays = {path: variable[...] for path, variable in parameters(gradients).items()}
    theirs = dict(export(family_of(case.llm.config.model_type).rules, arrays))
    for name, expected in np.load(case.folder / "grads.npz").items():
        assert_within(theirs[name], expected, GRADIENT, f"gradient of {name}")
    norms = json.loads((case.folder / "grad_norms.json").read_text())
    assert set(norms) == set(theirs)
    for name in theirs:
        assert math.isclose(np.linalg.norm(theirs[name]), norms[name], rel_tol=GRADIENT), name


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_no_gradient(golden, remat):
    case = load_case(golden("llm_llama_untied_sharded"))
    _, expected, _ = loss_and_gradients(case)
    _, found, _ = loss_and_gradients(case, remat)
    for path, variable in parameters(found).items():
        assert_within(variable[...], parameters(expected)[path][...], FORWARD, f"{path} with remat={remat}")


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_tokens_are_identical(case, side):
    tokens, mask = case.tokens, case.mask
    if side == "right":
        tokens, mask = to_right_padding(tokens, mask), to_right_padding(mask, mask)
    new = case.expected["gen_embeds"]
    assert np.array_equal(case.expected["gen_ids"][:, tokens.shape[1] :], new)
    assert np.array_equal(generate(case.llm, tokens, attention_mask=mask), new)
    embeddings = case.llm.embed(jnp.asarray(tokens))
    assert np.array_equal(generate(case.llm, inputs_embeds=embeddings, attention_mask=mask), new)


def test_greedy_rows_end_with_their_end_token(case):
    eos = json.loads((case.folder / "meta.json").read_text())["gen_eos: eos id used"]
    expected = case.expected["gen_eos"].copy()
    for row in expected:  # transformers fills with the pad id after the end, we with -1
        ends = np.flatnonzero(row == eos)
        if len(ends):
            row[ends[0] + 1 :] = -1
    assert (expected == -1).any(), "the golden does not test anything"
    assert np.array_equal(generate(case.llm, case.tokens, attention_mask=case.mask, eos_ids=(eos,)), expected)


def test_both_styles_of_config_mean_the_same(case):
    config = case.llm.config
    hub_style = json.loads((case.folder / "config_hub_style.json").read_text())
    assert from_hf(hub_style, "config.json") == config
    assert from_hf(to_hf(config), "config.json") == config


def test_bfloat16_stays_near_float32(golden):
    case = load_case(golden("llm_llama_untied_sharded"))
    logits = load_llm(case.folder, dtype="bfloat16")(case.tokens, case.mask)
    assert logits.dtype == jnp.float32
    assert_within(logits[case.valid], case.expected["logits"][case.valid], 0.05, "bfloat16 logits")


def test_a_real_llama_tells_its_story(shared):
    folder = shared / "real" / "models" / "stories260K"
    expected = json.loads((folder / "golden.json").read_text())
    llm, prompt = load_llm(folder), np.array([expected["input_ids"]])
    assert_within(llm(prompt)[0, -1], np.array(expected["logits_last"]), FORWARD, "last logits")
    story = generate(llm, prompt, max_new_tokens=120)[0].tolist()
    assert expected["input_ids"] + story == expected["greedy_120"]
