"""The decoder against transformers' own numbers: the llm_* goldens, and a real pretrained Llama."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity_log import compare, record

from elm_jax.inference.generate import generate
from elm_jax.models.decoder import Decoder
from elm_jax.models.families import from_hf, rules_of, to_hf
from elm_jax.models.names import export
from elm_jax.weights.load import load_llm, parameters

NAMES = (
    *("llm_llama_tied", "llm_llama_untied_sharded", "llm_qwen2_tied", "llm_qwen3", "llm_gemma2"),
    *("llm_gpt2", "llm_opt", "llm_gemma3", "llm_mistral", "llm_phi3", "llm_qwen3_5", "llm_qwen3_moe"),
)
FORWARD, GRADIENT = 1e-5, 1e-4  # largest difference, as a part of the largest reference value
# The softmax does not see a key's bias where positions do not turn it (OPT): its gradient is rounding alone, in
# the reference too, and is compared with zero at the scale of the others.
NO_GRADIENT = 1e-6
# A recurrence of 80 steps: transformers' own logits differ by 0.9e-5 of scale between a row with padding and without.
WIDER = {"llm_qwen3_5": 5}


@dataclass(frozen=True)
class Case:
    """`llm` counts positions from the first real token, as transformers' generate() does; `forward_llm` as its
    forward() does, which for GPT-2 with left padding is another model (and is all that most numbers here are of)."""

    folder: Path
    llm: Decoder
    forward_llm: Decoder
    tokens: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    expected: dict[str, np.ndarray]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def forward(self) -> float:
        return FORWARD * WIDER.get(self.name, 1)

    @property
    def gradient(self) -> float:
        return GRADIENT * WIDER.get(self.name, 1)

    @property
    def valid(self) -> np.ndarray:
        return self.mask == 1

    @property
    def logits(self) -> np.ndarray:
        """Those of `llm`."""
        return self.expected.get("logits_position_ids_from_mask", self.expected["logits"])


@cache
def load_case(folder: Path) -> Case:
    inputs = np.load(folder / "inputs.npz")
    expected = dict(np.load(folder / "outputs.npz"))
    arrays = (inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
    return Case(folder, load_llm(folder), load_llm(folder, compat=("gpt2_positions",)), *arrays, expected)


@pytest.fixture(params=NAMES)
def case(request, golden) -> Case:
    return load_case(golden(request.param))


def to_right_padding(rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The same rows with their padding moved from the left to the right."""
    return np.stack([np.roll(row, int(m.sum()), axis=0) for row, m in zip(rows, mask, strict=True)])


def test_logits_match_whether_layers_are_scanned_or_unrolled(case):
    for scan in (True, False):
        graph, state = nnx.split(case.forward_llm)
        llm = nnx.merge(graph, state)
        llm.scan = scan
        logits = llm(case.tokens, case.mask)
        assert logits.dtype == jnp.float32
        what = f"logits with scan={scan}"
        compare(case.name, what, logits[case.valid], case.expected["logits"][case.valid], case.forward)


def test_logits_on_positions_from_the_mask_match(case):
    logits = case.llm(case.tokens, case.mask)
    compare(case.name, "logits, positions from the mask", logits[case.valid], case.logits[case.valid], case.forward)


def test_logits_of_right_padded_and_of_unpadded_prompts_match(case):
    tokens, mask = to_right_padding(case.tokens, case.mask), to_right_padding(case.mask, case.mask)
    logits = case.llm(tokens, mask)
    compare(case.name, "logits, right padding", logits[mask == 1], case.logits[case.valid], case.forward)
    alone = case.llm(case.tokens[1:2, case.valid[1]])
    compare(case.name, "logits, no padding", alone, case.expected["logits_row1_unpadded_nomask"], case.forward)


def test_padding_is_finite_and_its_tokens_do_not_matter(case):
    other = np.where(case.valid, case.tokens, 7)
    a, b = case.llm(case.tokens, case.mask), case.llm(other, case.mask)
    assert np.isfinite(a).all()
    assert np.array_equal(a[case.valid], b[case.valid])


def test_hidden_states_of_every_layer_match(case):
    found = np.asarray(case.forward_llm.all_hidden(case.tokens, case.mask))
    assert len(found) == len(case.expected["hidden_states"])
    for layer, expected in enumerate(case.expected["hidden_states"]):
        compare(case.name, f"hidden state {layer}", found[layer][case.valid], expected[case.valid], case.forward)


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
    graph, state = nnx.split(case.forward_llm)

    def loss(state, change):
        llm = nnx.merge(graph, state)
        llm.remat = remat
        return loss_of(llm, {"inputs_embeds": llm.embed(jnp.asarray(case.tokens)) + change}, case)

    no_change = jnp.zeros((*case.tokens.shape, case.llm.config.hidden))
    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state, no_change)
    return value, *gradients


def test_loss_and_gradients_match(case):
    value, gradients, by_embeddings = loss_and_gradients(case)
    compare(case.name, "loss", value, case.expected["loss"], case.forward)
    expected = case.expected["grad_inputs_embeds"][case.valid]
    compare(case.name, "gradient of inputs_embeds", by_embeddings[case.valid], expected, case.gradient)

    arrays = {path: variable[...] for path, variable in parameters(gradients).items()}
    theirs = fused(dict(export(rules_of(case.llm.config), arrays)))
    norms = json.loads((case.folder / "grad_norms.json").read_text())
    assert set(norms) == set(theirs)
    largest = max(norms.values())
    for name, expected in np.load(case.folder / "grads.npz").items():
        if norms[name] < NO_GRADIENT * largest:
            record(case.name, f"gradient of {name}", float(np.abs(theirs[name]).max()) / largest, NO_GRADIENT)
        else:
            compare(case.name, f"gradient of {name}", theirs[name], expected, case.gradient)
    some = [name for name in norms if norms[name] >= NO_GRADIENT * largest]
    assert len(some) == len(norms) - (case.llm.config.layers if case.name == "llm_opt" else 0)
    errors = [abs(np.linalg.norm(theirs[name]) / norms[name] - 1) for name in some]
    record(case.name, "norms of all gradients", float(max(errors)), case.gradient)


def fused(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With the experts of a layer in two arrays, as transformers has them in memory."""
    found = {name: x for name, x in tensors.items() if ".experts." not in name}
    for layer in sorted({name.partition(".experts.")[0] for name in set(tensors) - set(found)}):
        count = sum(name.startswith(f"{layer}.experts.") for name in tensors) // 3
        gate, up, down = ([tensors[f"{layer}.experts.{e}.{n}_proj.weight"] for e in range(count)]
                          for n in ("gate", "up", "down"))  # fmt: skip
        found[f"{layer}.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        found[f"{layer}.experts.down_proj"] = np.stack(down)
    return found


def test_the_loss_on_positions_from_the_mask_matches(case):
    value = loss_of(case.llm, {"tokens": case.tokens}, case)
    expected = case.expected.get("loss_position_ids_from_mask", case.expected["loss"])
    compare(case.name, "loss, positions from the mask", value, expected, case.forward)


def test_the_shape_of_llama_2_and_vicuna(golden):
    """A key and value of its own for each head, and a config of the hub without head_dim."""
    case = load_case(golden("llm_llama2_vicuna"))
    assert from_hf(json.loads((case.folder / "config_hub_style.json").read_text()), "config.json") == case.llm.config
    logits = case.llm(case.tokens, case.mask)
    compare(case.name, "logits", logits[case.valid], case.expected["logits"][case.valid], case.forward)


def test_a_conversation_beyond_the_original_context_has_the_long_frequencies(golden):
    case = load_case(golden("llm_phi3"))
    tokens = case.expected["long_input_ids"]
    compare(case.name, "logits, long", case.llm(tokens), case.expected["long_logits"], case.forward)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_no_gradient(golden, remat):
    case = load_case(golden("llm_llama_untied_sharded"))
    _, expected, _ = loss_and_gradients(case)
    _, found, _ = loss_and_gradients(case, remat)
    for path, variable in parameters(found).items():
        scale = np.abs(parameters(expected)[path][...]).max()
        assert np.abs(variable[...] - parameters(expected)[path][...]).max() <= FORWARD * scale, path


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_tokens_are_identical(case, side):
    tokens, mask = case.tokens, case.mask
    if side == "right":
        tokens, mask = to_right_padding(tokens, mask), to_right_padding(mask, mask)
    new = case.expected["gen_embeds"]
    assert np.array_equal(case.expected["gen_ids"][:, tokens.shape[1] :], new)
    embeddings = case.llm.embed(jnp.asarray(tokens))
    for what, prompt in (("tokens", {"tokens": tokens}), ("embeddings", {"inputs_embeds": embeddings})):
        found = np.asarray(generate(case.llm, attention_mask=mask, max_new_tokens=new.shape[1], **prompt))
        record(case.name, f"greedy tokens from {what}, {side} padding", int((found != new).sum()), 0)


def test_greedy_rows_end_with_their_end_token(case):
    eos = json.loads((case.folder / "meta.json").read_text())["gen_eos: eos id used"]
    expected = case.expected["gen_eos"].copy()
    for row in expected:  # transformers fills with the pad id after the end, we with -1
        ends = np.flatnonzero(row == eos)
        if len(ends):
            row[ends[0] + 1 :] = -1
    assert (expected == -1).any(), "the golden does not test anything"
    new = expected.shape[1]  # as long as the longest row
    found = np.asarray(generate(case.llm, case.tokens, attention_mask=case.mask, max_new_tokens=new, eos_ids=(eos,)))
    record(case.name, "greedy tokens up to the end token", int((found != expected).sum()), 0)


def test_both_styles_of_config_mean_the_same(case):
    config = case.llm.config
    hub_style = json.loads((case.folder / "config_hub_style.json").read_text())
    assert from_hf(hub_style, "config.json") == config
    assert from_hf(to_hf(config), "config.json") == config


def test_a_written_config_says_what_the_original_says(case):
    written = to_hf(case.llm.config)
    for file in ("config.json", "config_hub_style.json"):
        original = json.loads((case.folder / file).read_text())
        rope = original.get("rope_parameters", original)
        original |= {"rope_theta": rope.get("full_attention", rope).get("rope_theta")}
        original |= {"n_inner": 4 * original["n_embd"]} if "n_embd" in original else {}  # null means this
        shared = [name for name in written if name in original and name != "rope_scaling"]
        assert len(shared) > 10 and {n: written[n] for n in shared} == {n: original[n] for n in shared}


def test_bfloat16_stays_near_float32(golden):
    case = load_case(golden("llm_llama_untied_sharded"))
    logits = load_llm(case.folder, dtype="bfloat16")(case.tokens, case.mask)
    assert logits.dtype == jnp.float32
    compare(case.name, "logits in bfloat16", logits[case.valid], case.expected["logits"][case.valid], 0.05)


def test_a_real_llama_tells_its_story(shared):
    folder = shared / "real" / "models" / "stories260K"
    expected = json.loads((folder / "golden.json").read_text())
    llm, prompt = load_llm(folder), np.array([expected["input_ids"]])
    compare("stories260K", "last logits", llm(prompt)[0, -1], np.array(expected["logits_last"]), FORWARD)
    story = generate(llm, prompt, max_new_tokens=120)[0].tolist()
    wrong = sum(a != b for a, b in zip(expected["input_ids"] + story, expected["greedy_120"], strict=True))
    record("stories260K", "greedy tokens", wrong, 0)
