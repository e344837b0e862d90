"""`elm_jax.load`: a run and its export as one object, which answers as the chat does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import runs
import wfdb
from export.made_runs import export_command, make_run

import elm_jax
from elm_jax.config import to_dict
from elm_jax.ecg.names import LEADS
from elm_jax.errors import UserError
from elm_jax.inference.session import Session
from elm_jax.loaded import EcgModel

ROOT = Path(__file__).resolve().parents[2]
QUESTION, OTHER = "What does the recording show?", "What is the heart rate?"
RATE = 50


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A run that nobody has trained, and its export; both answer something."""
    place = tmp_path_factory.mktemp("loaded")
    with pytest.MonkeyPatch.context() as patch:
        runs.prepare(patch, place / "cache")
        tiny = runs.config(place / "run", elm="mlp_llava", encoder__tokens=3, eval__max_new_tokens=8)
        make_run(place / "run", to_dict(tiny) | {"connector": {"hidden": 48}})
        assert export_command("--checkpoint", str(place / "run"), "--out", str(place / "exported")) == 0
        yield place / "run", place / "exported"


@pytest.fixture(scope="module")
def model(folders: tuple[Path, Path]) -> EcgModel:
    return elm_jax.load(folders[0])


def signals(count: int) -> list[np.ndarray]:
    return [np.random.default_rng(i).normal(size=(12, 12 * RATE)).astype(np.float32) for i in range(count)]


@pytest.mark.slow
def test_it_answers_as_the_chat_of_files_arrays_and_recordings(model: EcgModel, tmp_path: Path) -> None:
    one, two = signals(2)
    file = tmp_path / "ecg.npy"
    np.save(file, {"ecg": one, "target_sf": RATE}, allow_pickle=True)
    session = Session(model.model)
    session.add_ecg(str(file))
    expected = session.say(QUESTION)
    assert expected
    assert model.ask(file, QUESTION) == model.ask(one, QUESTION, sampling_rate=RATE) == expected
    assert model.ask(elm_jax.read_ecg(file), QUESTION) == expected
    order = [3, 1, 2, 0, *range(4, 12)]
    names = [session.spec.names[i] for i in order]
    assert model.ask(one[order], QUESTION, sampling_rate=RATE, leads=names) == expected
    assert "".join(model.stream(file, QUESTION)) == expected
    answers = model.ask([file, two], [QUESTION, OTHER])
    assert answers == [expected, model.ask(two, OTHER)]
    assert model.ask([file, two], QUESTION)[0] == model.ask(file, [QUESTION, OTHER])[0] == expected
    assert model.ask((file, two), QUESTION) and model.ask(None, QUESTION)
    assert model.ask(file, QUESTION, max_new_tokens=1) != expected
    assert model.ask(file, QUESTION, system="Be brief.") is not None


@pytest.mark.slow
def test_turns_are_kept_in_a_chat(model: EcgModel) -> None:
    one, two = signals(2)
    chat, session = model.chat(one), Session(model.model)
    session.add_ecg(model._path(one, {}))
    assert [chat.ask(QUESTION), "".join(chat.stream(OTHER))] == [session.say(QUESTION), session.say(OTHER)]
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 2
    assert "12 leads" in chat.show(two) and "2 ECGs, 4 turns" in repr(chat)


@pytest.mark.slow
def test_it_shows_what_the_llm_is_given_and_where_it_looks(model: EcgModel, tmp_path: Path) -> None:
    one, two = signals(2)
    first = model.embed(one)
    assert first.shape == (3, model.model.assembly.llm.hidden) and first.dtype == np.float32
    both = model.embed([one, two])
    np.testing.assert_array_equal(both[0], first)
    assert both.shape[0] == 2 and np.abs(both[1] - first).max() > 0
    found = model.attention(one, QUESTION, "w3 w4", picture=tmp_path / "looks.png")
    assert 0 < found.ecg_share < 1 and (tmp_path / "looks.png").stat().st_size > 1000


@pytest.mark.slow
def test_an_export_answers_as_the_run(model: EcgModel, folders: tuple[Path, Path]) -> None:
    ecgs = signals(3)
    exported = elm_jax.load(folders[1], eval={"batch_size": 2})
    assert exported.ask(ecgs, QUESTION) == model.ask(ecgs, QUESTION)
    np.testing.assert_array_equal(exported.embed(ecgs[0]), model.embed(ecgs[0]))
    assert "mlp_llava, merl" in repr(model) and str(folders[1]) in repr(exported)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_lines_of_the_pages_run(page: str, folders: tuple[Path, Path], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)[0]
    assert "runs/demo" in code
    wfdb.wrsamp("ecg", RATE, ["mV"] * 12, list(LEADS), p_signal=signals(1)[0].T, fmt=["16"] * 12)
    exec(compile(code.replace("runs/demo", str(folders[0])), page, "exec"), {"__name__": "page"})
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.ask(signals(2), [QUESTION]), "2 ECGs and 1 questions"),
        (lambda m: m.ask(signals(1)[0], QUESTION, max_tokens=3), "max_tokens: found an unknown option"),
        (lambda m: m.ask(signals(1)[0], QUESTION, temperature=-1), "temperature"),
        (lambda m: m.ask(signals(1)[0], QUESTION, seed="x"), "seed: found"),
        (lambda m: m.ask("nowhere.npy", QUESTION), "nowhere.npy"),
        (lambda m: m.ask(np.zeros((3, 4, 5)), QUESTION), "array of shape"),
        (lambda m: m.ask(np.array({"ecg": 1}), QUESTION), "dtype object; expected real numbers"),
        (lambda m: m.ask(np.zeros((12, 500), complex), QUESTION), "dtype complex128; expected real numbers"),
        (lambda m: m.embed(None), "embed: found no ECG"),
        (lambda m: elm_jax.load(m.model.folder, eval=3), "eval: found 3"),
        (lambda m: elm_jax.load(m.model.folder / "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_is_one_error(model: EcgModel, call, said: str) -> None:
    with pytest.raises(UserError) as raised:
        call(model)
    assert said in str(raised.value) and "\n" not in str(raised.value)
