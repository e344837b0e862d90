"""Greedy generation by the engine: the tokens of the goldens, at any number of rows, and of Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation import answered, engine_for, request
from parity import e2e
from parity_log import record

from elm_jax.inference.engine import Engine
from elm_jax.inference.requests import Piece, Request
from elm_jax.inference.sampling import Sampling
from elm_jax.weights.load import load_llm

Golden = Callable[[str], Path]
LLMS = (
    *("llm_llama_tied", "llm_llama_untied_sharded", "llm_qwen2_tied", "llm_qwen3", "llm_gemma2"),
    *("llm_gpt2", "llm_opt"),
)
KINDS = [f"e2e_{kind}_{llm}" for kind in e2e.KINDS for llm in e2e.LLMS]
QUICK = ("llm_gemma2", "e2e_linear_llava_llama")


def at_rows(names: Iterable[str]) -> list[Any]:
    """Each of `names` at three numbers of rows; one of them at one is quick."""
    cases = [(name, rows) for name in names for rows in (1, 3, 8)]
    return [pytest.param(*c, marks=() if c[0] in QUICK and c[1] == 3 else pytest.mark.slow) for c in cases]


@pytest.mark.parametrize(("name", "rows"), at_rows(LLMS))
def test_greedy_tokens_are_identical_at_any_number_of_rows(golden: Golden, name: str, rows: int) -> None:
    folder = golden(name)
    inputs, expected = np.load(folder / "inputs.npz"), np.load(folder / "outputs.npz")["gen_embeds"]
    prompts = [ids[mask == 1] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    count, new = len(prompts), expected.shape[1]
    asked = [request(n, prompts[n % count], new, 4) for n in range(3 * count)]  # beginnings are shared
    found = answered(engine_for(load_llm(folder)), asked, rows)
    wrong = sum(int((np.array(tokens) != expected[n % count]).sum()) for n, tokens in found.items())
    record(name, f"greedy tokens in {rows} rows", wrong, 0)


@pytest.mark.parametrize(("name", "rows"), at_rows(KINDS))
def test_greedy_tokens_with_ecgs_are_identical(golden: Golden, name: str, rows: int) -> None:
    """The golden's row 1 up to its answer, among the batch's other rows, and twice: its beginning is shared."""
    case = e2e.load_case(name, golden)
    outputs, batch = np.load(case.folder / "outputs.npz"), case.batch(0)
    new = outputs["gen_row1_logits"].shape[1]
    expected = outputs["gen_row1"][0, -new:].tolist()
    elm = case.structure.bind({n: jnp.asarray(x) for n, x in case.arrays.items()})
    tokens = elm.signal_embeddings(*jax.tree.map(jnp.asarray, (batch.signals, batch.signal_weights))).shape[1]

    @jax.jit
    def inputs(ids: jax.Array, slot: jax.Array, signals: jax.Array) -> jax.Array:
        return elm.inputs(ids, slot, elm.signal_embeddings({"ecg": signals}, jnp.ones(signals.shape[:2])))

    def embed(pieces: Sequence[Piece], rows: int, width: int) -> jax.Array:
        ids, slot = np.zeros((rows, width), np.int32), np.full((rows, width), -1, np.int32)
        signals = np.zeros((rows, *np.shape(batch.signals["ecg"])[1:]), np.float32)
        for row, piece in enumerate(pieces):
            ids[row, : len(piece.ids)] = piece.ids
            for ecg in piece.request.ecgs(piece.begin, piece.end):
                places = piece.request.places[ecg] - piece.begin
                slot[row, places] = np.arange(len(places))
                signals[row, ecg] = piece.request.signals[ecg]["ecg"]
        return inputs(ids, slot, signals)

    def asked(number: int, row: int) -> Request:
        valid = np.asarray(batch.group_ids[row]) > 0
        end = int(np.asarray(batch.target_index[row])[np.asarray(batch.target_weights[row]) > 0].min()) + 1
        places = np.flatnonzero(np.asarray(batch.signal_slot[row])[:end] >= 0)[: tokens or None, None].T
        assert valid[:end].all() and places.size == tokens
        edges = (int(places.max()) + 1,) if tokens else (end // 2,)
        signals = [{"ecg": ecg} for ecg in batch.signals["ecg"][row]] if tokens else []
        return Request(number, np.asarray(batch.tokens[row])[:end], signals, places, edges, new)

    count = len(batch.tokens)
    order = [row % count for row in range(2 * count)]
    found = answered(Engine(elm.llm, embed, ()), [asked(n, row) for n, row in enumerate(order)], rows)
    wrong = sum(found[n] != expected for n, row in enumerate(order) if row == 1)
    record(name, f"greedy answers with ECGs in {rows} rows", wrong, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", LLMS)
def test_hugging_face_generates_the_same(golden: Golden, name: str) -> None:
    """On the same weights, its batch padded on the left: up to an end token, with and without a repetition penalty."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder, rng = golden(name), np.random.default_rng(1)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    llm = load_llm(folder)
    prompts = [rng.integers(5, llm.config.vocab_size, length) for length in (3, 17, 9, 12, 5)]
    width = max(map(len, prompts))
    ids = np.array([[0] * (width - len(p)) + p.tolist() for p in prompts])
    mask = np.arange(width) >= width - np.array([[len(p)] for p in prompts])

    def generated(penalty: float, eos: int) -> list[list[int]]:
        with torch.inference_mode():
            out = theirs.generate(
                input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask.astype(np.int64)),
                max_new_tokens=12, do_sample=False, repetition_penalty=penalty, eos_token_id=eos, pad_token_id=eos,
            )  # fmt: skip
        rows = out[:, width:].tolist()
        return [row[: row.index(eos) + 1] if eos in row else row for row in rows]

    eos = generated(1.0, llm.config.vocab_size - 1)[0][4]
    for penalty in (1.0, 1.3):
        engine = engine_for(llm, (eos,))
        asked = [request(n, prompt, 12) for n, prompt in enumerate(prompts)]
        found = answered(engine, asked, 2, Sampling.of(penalty=penalty))
        # With a penalty theirs counts padding as seen: only a prompt without any is comparable.
        fair = range(len(prompts)) if penalty == 1 else [int(np.argmax([len(p) for p in prompts]))]
        expected = generated(penalty, eos)
        wrong = sum(found[n] != expected[n] for n in fair)
        record(name, f"answers of transformers' generate, penalty {penalty}", wrong, 0)
