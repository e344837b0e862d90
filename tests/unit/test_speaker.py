"""A model that answers questions about ECGs: the same on any mesh, with anything shared, in pieces or whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from elm_jax.assemble import Assembly, assemble
from elm_jax.config import MeshConfig
from elm_jax.errors import UserError
from elm_jax.inference.decoding import make_cache
from elm_jax.inference.requests import Piece
from elm_jax.inference.speaker import Prompt, Speaker
from elm_jax.run.weights import Weights
from elm_jax.runtime.mesh import array_shardings, make_mesh
from elm_jax.symbols.coder import EcgByte
from elm_jax.text.render import render_prompt

ONE = (1, 1, 1)
VIT = {
    "encoder__name": "vit", "data__representation": "stacked_signal",
    "encoder__config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
                        "image_size": 32, "patch_size": 16},
}  # fmt: skip
KINDS = {
    "mlp_llava": {"connector__hidden": 48},
    "conv_elf": {"update": "connector,llm", "encoder__name": None, "encoder__config": {}, "encoder__tokens": 5},
    "linear_llava": VIT,
    "ecg_byte": {"encoder__name": None, "encoder__config": {}, "encoder__tokens": 1, "data__representation": "symbolic",
                 "data__min_ecg_tokens": 8, "data__max_len": 128, "update": "llm"},
}  # fmt: skip


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Assembly]:
    """build("mlp_llava"): the assembly of a tiny model."""
    runs.prepare(monkeypatch, tmp_path / "cache")

    def make(elm: str) -> Assembly:
        # Untied: tied and untrained, a model would only repeat its last token.
        changes = {"llm__scratch": {**runs.TINY["llm.scratch"], "tied": False}, **KINDS[elm]}
        if elm == "ecg_byte":
            EcgByte([]).save(tmp_path / "bpe.json")
            changes["data__ecg_tokenizer"] = str(tmp_path / "bpe.json")
        return assemble(runs.config(tmp_path / "run", elm=elm, eval__max_new_tokens=6, eval__batch_size=4, **changes))

    return make


def speaker(assembly: Assembly, sizes: tuple[int, int, int] = ONE) -> Speaker:
    """With random weights, moved so that answers differ."""
    count = int(np.prod(sizes))
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:count])
    arrays = Weights(assembly).place(array_shardings(assembly.structure, mesh))
    rng = np.random.default_rng(0)
    for name, x in arrays.items():
        if name.startswith(("llm.embedding", "llm.head", "connector.")):
            noise = rng.standard_normal(x.shape).astype(x.dtype)
            arrays[name] = jax.device_put(np.asarray(x) + noise, x.sharding)
    return Speaker(assembly, mesh, arrays)


def prompts(assembly: Assembly, count: int = 6) -> list[Prompt]:
    """Two questions on each recording; the last one is about two recordings."""
    found, options = [], {**assembly.text.__dict__, "max_len": None}
    for i in range(count):
        ecgs = [assembly.signal.show(f"demo:test:{n}", 0) for n in ([0, 1] if i == count - 1 else [i // 2])]
        text = [{"role": "user", "content": f"What is the rate{', please' * i}?"}]
        rendered = render_prompt(text, assembly.tokenizer, n_ecgs=len(ecgs), **options)
        found.append(Prompt(rendered, ecgs))
    return found


@pytest.mark.parametrize(
    "elm", ["conv_elf", *(pytest.param(elm, marks=pytest.mark.slow) for elm in KINDS if elm != "conv_elf")]
)
def test_answers_depend_on_the_prompt_alone(build, elm: str) -> None:
    assembly = build(elm)
    model, asked, options = speaker(assembly), prompts(assembly), assembly.config.eval
    whole = model.answers(asked, options)
    assert len(set(whole)) > 1, "the answers are all alike"
    assert [model.answers([prompt], options)[0] for prompt in asked] == whole
    assert model.answers(asked[::-1], options)[::-1] == whole
    assert "".join(model.spoken(asked[0], options)) == whole[0]
    alone = [replace(p, rendered=replace(p.rendered, system_end=0, signal_end=0)) for p in asked]
    assert speaker(assembly).answers(alone, options) == whole
    streamed = {answer.number: answer for answer in model.stream(iter(asked), options)}
    assert {n: answer.text for n, answer in streamed.items()} == dict(enumerate(whole))
    assert all(0 < answer.tokens <= 6 and answer.seconds > 0 for answer in streamed.values())
    likely = model.option_probabilities(asked, ["yes", "no", "not sure"])
    assert likely.shape == (6, 3) and np.allclose(likely.sum(1), 1)
    assert np.allclose(model.option_probabilities(asked[-1], ["yes", "no", "not sure"]), likely[-1], atol=1e-4)


def test_a_prompt_that_leaves_no_room_is_refused(build) -> None:
    assembly = build("mlp_llava")
    with pytest.raises(UserError, match=r"eval\.max_new_tokens: found 250 beyond a prompt of"):
        speaker(assembly).answers(prompts(assembly), replace(assembly.config.eval, max_new_tokens=250))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 4, 2), (2, 2, 2)])
@pytest.mark.parametrize("elm", ["mlp_llava", "ecg_byte"])
def test_every_mesh_answers_alike(build, elm: str, sizes: tuple[int, int, int]) -> None:
    assembly = build(elm)
    asked, options = prompts(assembly, 20), assembly.config.eval
    single, many = speaker(assembly), speaker(assembly, sizes)
    assert many.answers(asked, options) == single.answers(asked, options)
    expected = single.option_probabilities(asked, ["yes", "no"])
    assert np.allclose(many.option_probabilities(asked, ["yes", "no"]), expected, atol=1e-4)
    keys = make_cache(many.engine.model, 8, 64, jnp.float32, "batch").attention.keys
    layers, rows, heads, places, dim = keys.shape
    ways = sizes[0] * sizes[1], sizes[2]
    assert keys.sharding.shard_shape(keys.shape) == (layers, rows // ways[0], heads // ways[1], places, dim)


def test_an_answer_without_a_token_is_refused(build: Callable[[str], Assembly]) -> None:
    assembly = build("mlp_llava")
    model = speaker(assembly)
    prompt = replace(prompts(assembly)[0], new=0)
    with pytest.raises(UserError, match="at least of each"):
        model.answers([prompt], assembly.config.eval)


def test_inputs_reach_the_devices_without_a_word_among_processes(
    build: Callable[[str], Assembly], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several processes `jax.device_put` of what all of them hold gathers it from all, to see that it is alike."""
    assembly = build("mlp_llava")
    model = speaker(assembly, (4, 1, 1))
    monkeypatch.setattr(jax, "device_put", lambda *_, **__: pytest.fail("asks the other processes"))
    monkeypatch.setattr(model, "_encode", lambda arrays, signals, weights: (signals, weights))
    monkeypatch.setattr(model, "_splice", lambda arrays, tokens, slot, encoded: (tokens, slot, *encoded))
    requests = [model.request(i, prompt, 6) for i, prompt in enumerate(prompts(assembly, 4))]
    pieces = [Piece(request, 0, len(request.ids)) for request in requests]
    found, expected = model._embedded(pieces, 4, 64), model._arrays(pieces, 4, 64)
    for x, whole in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.shape == whole.shape and x.dtype == whole.dtype and np.array_equal(x, whole)
        assert {shard.data.shape for shard in x.addressable_shards} == {(1, *whole.shape[1:])}
