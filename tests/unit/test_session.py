"""A conversation: its prompts are those of training, with ECGs where they came up, and fit the context."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_model import RATE, SECONDS, FakeModel, fake_config

from elm_jax.data.dataset import Dataset
from elm_jax.data.demo import load_demo_ecg
from elm_jax.data.ecg_tokens import add_ecg_tokens
from elm_jax.data.sources import load_records
from elm_jax.data.specs import signal_spec
from elm_jax.ecg.recording import LEADS
from elm_jax.errors import UserError
from elm_jax.inference.session import Session, read_input
from elm_jax.symbols.coder import EcgByte
from elm_jax.text.render import render, render_prompt

ECG = "<signal><signal>\n"
SPEC = signal_spec(fake_config().data, 0)


def session(family: str = "qwen2", context: int = 256, answers: tuple[str, ...] = (), **keys: object) -> Session:
    model = FakeModel(fake_config(**keys), family, context, answers)
    return Session(model)  # type: ignore[arg-type]


def prompts(talk: Session) -> list[str]:
    return [prompt.rendered.prompt for prompt in talk.model.prompts]  # type: ignore[attr-defined]


def seeds(talk: Session) -> list[int]:
    return talk.model.seeds  # type: ignore[attr-defined]


def test_a_first_question_is_asked_as_the_records_of_the_run_ask_it() -> None:
    config = fake_config()
    talk = session()
    records = load_records(config.data, "test", config.seed)
    assembly = talk.model.assembly
    dataset = Dataset(records, assembly.tokenizer, assembly.text, signal_spec(config.data, config.seed))
    record = dataset.records[0]
    (expected, _), *_ = dataset.prompts(0)
    talk.add_ecg(record.ecg_paths[0])
    talk.say(record.text[0]["value"])
    (prompt,) = talk.model.prompts  # type: ignore[attr-defined]
    np.testing.assert_array_equal(prompt.rendered.ids, expected.ids)
    np.testing.assert_array_equal(prompt.rendered.signal_positions, expected.signal_positions)
    np.testing.assert_equal(prompt.signals[0], dataset.signals(0)[0])


def test_the_history_is_rendered_as_a_conversation_of_training() -> None:
    talk = session(answers=("61", "regular"))
    talk.add_ecg("demo:test:0")
    for text in ("How fast?", "Is it regular?", "Sure?"):
        talk.say(text)
    words = [("user", "How fast?"), ("assistant", "61"), ("user", "Is it regular?"), ("assistant", "regular")]
    turns = [{"role": role, "content": text} for role, text in [*words, ("user", "Sure?")]]
    expected = render_prompt(turns, talk.model.assembly.tokenizer, "qwen2", "Be brief.", signal_tokens=2)
    np.testing.assert_array_equal(talk.model.prompts[-1].rendered.ids, expected.ids)  # type: ignore[attr-defined]


def test_several_ecgs_before_the_first_question_need_no_markers() -> None:
    talk = session()
    for path in ("demo:test:0", "demo:test:1"):
        talk.add_ecg(path)
    talk.say("Compare them.")
    expected = render_prompt(
        [{"role": "user", "content": "Compare them."}], talk.model.assembly.tokenizer, "qwen2", "Be brief.",
        signal_tokens=2, n_ecgs=2,
    )  # fmt: skip
    np.testing.assert_array_equal(talk.model.prompts[0].rendered.ids, expected.ids)  # type: ignore[attr-defined]
    assert talk.model.prompts[0].rendered.signal_end > 0  # type: ignore[attr-defined]


def test_a_later_ecg_stands_before_the_question_it_came_up_with() -> None:
    talk = session(answers=("61",))
    talk.add_ecg("demo:test:0")
    talk.say("How fast?")
    talk.add_ecg("demo:test:1")
    talk.say("And this?")
    talk.say("Sure?")
    for prompt in prompts(talk)[1:]:
        assert f"user\n{ECG}How fast?" in prompt and f"user\n{ECG}And this?" in prompt
    first, second = (ecg.signal for ecg in talk.ecgs)
    np.testing.assert_equal(talk.model.prompts[-1].signals, [first, second])  # type: ignore[attr-defined]


def test_markers_in_a_message_say_where_its_ecgs_stand() -> None:
    talk = session()
    for path in ("demo:test:0", "demo:test:1"):
        talk.add_ecg(path)
    talk.say("Is <ecg> faster than <ecg>?")
    assert f"Is {ECG}faster than {ECG}?" in prompts(talk)[0]


@pytest.mark.parametrize("text", ["Compare <ecg>, <ecg> and <ecg>.", "Look: <ecg>"])
def test_markers_that_do_not_fit_the_new_ecgs_are_refused(text: str) -> None:
    talk = session()
    for path in ("demo:test:0", "demo:test:1"):
        talk.add_ecg(path)
    with pytest.raises(UserError, match="markers for 2 new ECGs"):
        talk.say(text)
    talk.say("Compare them.")
    assert prompts(talk)[0].count(ECG) == 2


def test_a_single_ecg_stands_before_the_first_question_however_late_it_came() -> None:
    talk = session()
    talk.say("What is an ECG?")
    talk.add_ecg("demo:test:0")
    talk.say("How fast?")
    assert prompts(talk)[1].count(ECG) == 1 and f"{ECG}What is an ECG?" in prompts(talk)[1]


def test_a_conversation_without_ecgs_is_text_alone() -> None:
    talk = session()
    talk.say("What is an ECG?")
    assert "<signal>" not in prompts(talk)[0] and talk.model.prompts[0].signals == []  # type: ignore[attr-defined]


def test_what_looks_like_a_record_is_a_message() -> None:
    talk = session()
    talk.say('["a", "b", "c"]')
    assert 'user\n["a", "b", "c"]<|im_end|>' in prompts(talk)[0]


def test_clear_forgets_turns_and_ecgs() -> None:
    talk = session()
    talk.add_ecg("demo:test:0")
    talk.say("How fast?")
    talk.add_ecg("demo:test:1")
    talk.clear()
    talk.say("Hello")
    assert prompts(talk)[1] == prompts(talk)[0].replace(f"{ECG}How fast?", "Hello")


def test_an_answer_that_never_came_leaves_the_conversation_as_it_was() -> None:
    talk = session(answers=("fail", "61"))
    talk.add_ecg("demo:test:0")
    with pytest.raises(KeyboardInterrupt):
        talk.say("How fast?")
    talk.say("How slow?")
    assert "How fast?" not in prompts(talk)[1] and prompts(talk)[1].count(ECG) == 1


def test_each_answer_is_drawn_with_a_seed_of_its_own() -> None:
    for phase in ("sft", "pretrain"):
        talk = session(phase=phase)
        for _ in range(3):
            talk.say("a")
        assert len(set(seeds(talk))) == 3


def test_after_clear_the_same_question_is_drawn_anew_and_after_a_restart_alike() -> None:
    drawn = []
    for _ in range(2):
        talk = session()
        talk.say("a")
        talk.clear()
        talk.say("a")
        assert len(set(seeds(talk))) == 2
        drawn.append(seeds(talk))
    assert drawn[0] == drawn[1]


def test_the_users_seed_decides_what_is_drawn() -> None:
    drawn = []
    for keys in ({}, {"seed": 1}, {"eval__seeds": [7]}, {"seed": 1, "eval__seeds": [7, 8]}):
        talk = session(**keys)
        talk.say("a")
        drawn += seeds(talk)
    assert len(set(drawn)) == 3 and drawn[2] == drawn[3], "eval.seeds before seed"


def test_a_long_conversation_loses_its_oldest_turns_and_no_ecg() -> None:
    talk = session(context=80)
    talk.add_ecg("demo:test:0")
    talk.add_ecg("demo:test:1")
    for number in range(6):
        talk.say(f"Question {number}?")
        assert talk.shortened == ("Question 0?" not in prompts(talk)[-1])
    last = prompts(talk)[-1]
    assert talk.shortened and "Question 5?" in last and last.count(ECG) == 2 and "Be brief." in last


def test_ecgs_that_fill_the_context_are_an_error_that_says_so() -> None:
    talk = session(context=80)
    for _ in range(30):
        talk.add_ecg("noise")
    with pytest.raises(UserError, match="^conversation: found a context with room for 72 tokens .*begin anew"):
        talk.say("Compare them.")


def test_no_room_for_a_prompt_is_an_error_that_names_the_key() -> None:
    with pytest.raises(UserError, match=r"^eval\.max_new_tokens: found 256"):
        session(eval__max_new_tokens=256)


def test_thinking_models_get_their_think_prefix_back() -> None:
    talk = session(answers=("beats\n</think>61",), data__explicit_thinking=True)
    talk.say("How fast?")
    talk.say("Sure?")
    assert prompts(talk)[0].endswith("assistant\n<think>\n")
    assert "assistant\n<think>\nbeats\n</think>61<|im_end|>" in prompts(talk)[1]
    assert prompts(talk)[1].endswith("assistant\n<think>\n")


def test_families_without_a_chat_form_can_talk() -> None:
    talk = session("plain", answers=("61",))
    talk.add_ecg("demo:test:0")
    talk.say("How fast?")
    talk.say("Sure?")
    assert prompts(talk) == [f"Be brief.\n{ECG}How fast?\n", f"Be brief.\n{ECG}How fast?\n61<|im_end|>\nSure?\n"]


def test_a_pretrained_model_goes_on_with_a_text_as_it_learnt_it() -> None:
    talk = session(phase="pretrain")
    talk.add_ecg("demo:test:0")
    talk.say("The rhythm is")
    whole = render("The rhythm is regular", talk.model.assembly.tokenizer, "qwen2", signal_tokens=2, phase="pretrain")
    ids = talk.model.prompts[0].rendered.ids  # type: ignore[attr-defined]
    np.testing.assert_array_equal(ids, whole.ids[: len(ids)])
    assert len(ids) == len(whole.ids) - 2  # one word and the end token


def test_a_pretrained_model_writes_a_text_of_its_own() -> None:
    talk = session(phase="pretrain")
    talk.add_ecg("demo:test:0")
    talk.say("")
    assert prompts(talk) == [f"<|im_start|>{ECG}"]
    assert talk.turns == []
    talk.clear()
    with pytest.raises(UserError, match="neither an ECG nor a text"):
        talk.say("")


def test_a_beginning_that_does_not_fit_is_an_error_not_a_shorter_beginning() -> None:
    with pytest.raises(UserError, match="^conversation: "):
        session(phase="pretrain", context=40).say("regular " * 60)


def test_a_run_without_ecgs_says_so() -> None:
    talk = session(data__perturb="only_text")
    with pytest.raises(UserError, match=r"data\.perturb=None"):
        talk.add_ecg("demo:test:0")
    talk.say("How fast?")
    assert "<signal>" not in prompts(talk)[0]


# -- what is read of an ECG ----------------------------------------------------------------------------------


def write(path: Path, signal: np.ndarray) -> str:
    np.save(path, signal.astype(np.float32))
    return str(path)


def recording(seconds: float = SECONDS, rate: int = RATE) -> np.ndarray:
    samples = round(seconds * rate)
    whole = load_demo_ecg("demo:test:0", rate, SECONDS * rate)
    return np.tile(whole, -(-samples // whole.shape[1]))[:, :samples]


def test_the_summary_says_what_was_read_and_assumed(tmp_path: Path) -> None:
    ecg = read_input(write(tmp_path / "a.npy", recording()), SPEC)
    assert ecg.signal["ecg"].shape == SPEC.shape and ecg.signal["ecg"].dtype == np.float32
    assert f"{tmp_path}/a.npy: 12 leads, 50 Hz, 10 s" in ecg.summary
    assert "no sampling rate in the files: taken as 50 Hz" in ecg.summary
    assert "rows taken as I, II, III, aVR" in ecg.summary
    assert "contradict" not in ecg.summary and "flat" not in ecg.summary


def test_a_file_without_its_rate_is_read_at_the_one_given(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npy", recording(10, 200))
    ecg = read_input(path, replace(SPEC, bare_rate=200))
    assert "12 leads, 200 Hz, 10 s" in ecg.summary and "taken as 200 Hz" in ecg.summary
    stated = tmp_path / "b.npy"
    np.save(stated, {"ecg": recording(10, 200), "leads": LEADS, "target_sf": 200}, allow_pickle=True)  # type: ignore[arg-type]
    told = read_input(str(stated), replace(SPEC, bare_rate=100))
    assert "taken as" not in told.summary
    np.testing.assert_array_equal(ecg.signal["ecg"], told.signal["ecg"])


def test_values_that_are_no_millivolts_are_noticed(tmp_path: Path) -> None:
    assert "taken as mV" not in read_input(write(tmp_path / "a.npy", recording()), SPEC).summary
    assert "are they µV?" in read_input(write(tmp_path / "b.npy", 1000 * recording()), SPEC).summary


def test_the_summary_says_what_is_not_used(tmp_path: Path) -> None:
    ecg = read_input(write(tmp_path / "a.npy", recording(15)), SPEC)
    assert "15 s" in ecg.summary and "the first 10 s used" in ecg.summary
    spec = signal_spec(fake_config(data__leads=["II", "V1"], data__perturb="zeros").data, 0)
    ecg = read_input("demo:test:0", spec)
    assert ecg.signal["ecg"].shape == (2, 500) and "only II, V1 used" in ecg.summary
    assert "replaced by zeros (data.perturb)" in ecg.summary


def test_the_summary_names_the_leads_that_are_left_out(tmp_path: Path) -> None:
    signal = np.concatenate([recording(), recording()[:3]])
    content = {"ecg": signal, "leads": [*LEADS, "vx", "vy", "vz"], "target_sf": RATE}
    np.save(tmp_path / "a.npy", content, allow_pickle=True)  # type: ignore[arg-type]
    for _ in range(2):
        assert "vx, vy, vz left out" in read_input(str(tmp_path / "a.npy"), SPEC).summary


def test_leads_that_are_flat_or_in_another_order_are_noticed(tmp_path: Path) -> None:
    flat = recording()
    flat[7] = 0.1
    assert "flat: V2" in read_input(write(tmp_path / "a.npy", flat), SPEC).summary
    for swap in ([1, 0], [3, 4], [0, 2]):
        swapped = recording()
        swapped[swap] = swapped[swap[::-1]]
        assert "limb leads contradict" in read_input(write(tmp_path / "b.npy", swapped), SPEC).summary


def test_recordings_of_the_public_databases_do_not_contradict_themselves(shared: Path) -> None:
    headers = sorted((shared / "real/ecg/ptbxl/records500").rglob("*.hea"))[:20]
    assert headers
    for header in headers:
        summary = read_input(str(header.with_suffix("")), SPEC).summary
        assert "12 leads, 500 Hz, 10 s; resampled to 50 Hz" in summary and "contradict" not in summary


def test_noise_is_new_each_time_and_a_flat_line_is_flat() -> None:
    one, two, again = (read_input("noise", SPEC, number).signal["ecg"] for number in (0, 1, 0))
    assert not np.array_equal(one, two) and np.array_equal(one, again)
    assert not read_input("flatline", SPEC).signal["ecg"].any()


@pytest.mark.parametrize(
    "signal, says",
    [
        (recording(5), "250 samples at 50 Hz"),
        (recording()[:3], "3 rows of 500 samples"),
        (recording().T, "transposed"),
        (np.where(np.arange(500) == 7, np.nan, recording()), "nan in lead I at sample 7"),
    ],
)
def test_a_bad_recording_is_a_user_error_that_names_the_file(tmp_path: Path, signal: np.ndarray, says: str) -> None:
    path = write(tmp_path / "bad.npy", signal)
    with pytest.raises(UserError, match=says) as error:
        read_input(path, SPEC)
    assert error.value.where == path


@pytest.mark.parametrize(
    "path", ["nowhere.npy", "nowhere", "demo:test", "demo:nothing:1", ".", "/", "~nosuchuser/x", "a" * 300, "a\0b.npy"]
)
def test_no_recording_is_a_user_error(path: str) -> None:
    with pytest.raises(UserError):
        read_input(path, SPEC)


@pytest.mark.parametrize("name", [".", "..", "/", "~nosuchuser/x", "a\0b", "nowhere/at/all"])
def test_a_name_that_cannot_be_written_is_a_user_error(name: str) -> None:
    with pytest.raises(UserError, match="/save"):
        session().save(name)


def test_what_was_assumed_of_a_folder_is_said_each_time(tmp_path: Path) -> None:
    write(tmp_path / "a.npy", recording())
    first, second = (read_input(str(tmp_path / "a.npy"), SPEC).summary for _ in range(2))
    assert first == second and "no lead names" in second


def test_relative_and_home_paths_are_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.npy", recording())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    elsewhere = signal_spec(fake_config(data__root="/elsewhere").data, 0)
    for path in ("a.npy", "~/a.npy"):
        ecg = read_input(path, elsewhere)
        assert ecg.path == str(tmp_path / "a.npy") and ecg.signal["ecg"].shape == (len(LEADS), 500)


def symbolic(tmp_path: Path, context: int) -> Session:
    EcgByte([b"aa"]).save(tmp_path / "bpe.json")
    talk = session(context=context, encoder__tokens=1)
    tokens = add_ecg_tokens(talk.model.assembly.tokenizer, tmp_path / "bpe.json", 60)
    talk.spec = replace(talk.spec, representation="symbolic", leads=(1,), tokens=tokens)
    talk.model.assembly.signal = talk.spec  # type: ignore[misc]
    ecg = talk.add_ecg("noise")
    assert isinstance(ecg.signal["ecg"], np.ndarray) and 300 < ecg.signal["ecg"].shape[0] <= 500
    return talk


def test_where_ecgs_are_symbols_old_turns_make_room_for_all_of_them(tmp_path: Path) -> None:
    talk = symbolic(tmp_path, context=700)
    for question in range(8):
        talk.say(f"Question {question}, and a little more of it?")
        (*_, prompt) = talk.model.prompts  # type: ignore[attr-defined]
        assert talk.cut == 0 and talk.ecgs[0].signal["ecg"].tobytes() in prompt.rendered.ids.tobytes()
    assert talk.shortened and len(talk.turns) == 16


def test_symbols_for_which_the_context_has_no_room_are_cut_and_counted(tmp_path: Path) -> None:
    talk = symbolic(tmp_path, context=200)
    talk.say("Is it normal?")
    (prompt,) = talk.model.prompts  # type: ignore[attr-defined]
    assert len(prompt.rendered.ids) == 200 - talk.model.config.eval.max_new_tokens and not talk.shortened
    kept = len(talk.ecgs[0].signal["ecg"]) - talk.cut
    assert kept >= 60 and talk.ecgs[0].signal["ecg"][:kept].tobytes() in prompt.rendered.ids.tobytes()
    cut = talk.cut
    for _ in range(3):
        talk.say("Is it normal?")
        assert talk.shortened and talk.cut == cut, "older turns go before any more of the ECG does"
