"""The command `chat`: a conversation in a terminal and in a script; mistakes do not end it."""

from __future__ import annotations

import codecs
import io
import json
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_model import FakeModel, fake_config
from PIL import Image

from elm_jax import chat, cli
from elm_jax.config import to_dict
from elm_jax.inference.session import Session

Command = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).resolve().parents[2]
BLIND = "note: no ECG was shown: this is from the text alone"


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[list[str], str]]:
    """typed(lines, answers): stdout's lines and stderr of a scripted chat with a model that gives these answers."""

    def run(lines: list[str], *answers: str, **keys: object) -> tuple[list[str], str]:
        session = Session(FakeModel(fake_config(**keys), answers=answers))  # type: ignore[arg-type]
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        chat.talk(session, is_terminal=False)
        out, err = capsys.readouterr()
        return out.splitlines(), err

    return run


def test_a_script_gets_one_line_for_each_command_and_answer(typed) -> None:
    lines = ["/ecg demo:test:3", "How fast?", "", "/clear", "Hello", "/quit", "Is anybody there?"]
    out, err = typed(lines, "61", "Hi,\n\nthere")
    assert out == [
        "ecg 1: demo:test:3: generated; 12 leads, 50 Hz, 10 s",
        "assistant: 61",
        "cleared: no turns, no ECGs",
        "assistant: Hi, there",
    ]
    assert err == f"{BLIND}\n"


def test_a_new_conversation_keeps_the_ecgs_and_one_without_any_is_noted(typed) -> None:
    out, err = typed(["How fast?", "/ecg demo:test:3", "How fast?", "/new", "Regular?", "/clear", "How?"], *"abcd")
    assert out[0] == "assistant: a" and out[2:] == [
        "assistant: b", "a new conversation; ECGs: 1", "assistant: c", "cleared: no turns, no ECGs", "assistant: d"
    ]  # fmt: skip
    assert err.splitlines() == [BLIND] * 2


def test_mistakes_are_error_lines_and_the_chat_goes_on(typed) -> None:
    lines = ["/ecg nowhere.npy", "/ecg", "/egc demo:test:3", "/etc/passwd?", "What of <ecg>?", "How are you?"]
    out, err = typed(lines, "Well.")
    assert out == ["assistant: Well."]
    *errors, note = err.splitlines()
    assert note == BLIND and len(errors) == 5 and all(line.startswith("error: ") for line in errors)
    expected = ["nowhere.npy", "/ecg PATH", "did you mean '/ecg'?", "a blank", "0 new"]
    for line, says in zip(errors, expected, strict=True):
        assert says in line


def test_paths_may_have_blanks_and_quotes(typed, tmp_path: Path) -> None:
    path = tmp_path / "my ecg.npy"
    np.save(path, np.random.default_rng(0).normal(size=(12, 500)).astype(np.float32))
    out, err = typed([f"/ecg {path}", f'/ecg "{path}"', "/ecg 'demo:test:3' "])
    assert err == "" and [line.split()[:2] for line in out] == [["ecg", "1:"], ["ecg", "2:"], ["ecg", "3:"]]


def test_a_blank_before_a_slash_makes_it_a_message(typed) -> None:
    assert typed([" /ecg is a command"], "Yes.") == (["assistant: Yes."], f"{BLIND}\n")


def test_a_shortened_conversation_is_noted(typed) -> None:
    out, err = typed(["What is an ECG, an ECG, an ECG?"] * 30)
    assert len(out) == 30 and err.splitlines()[-1].startswith("note: the conversation was shortened to the 248 tokens")


def test_control_characters_of_an_answer_do_not_reach_the_terminal(typed) -> None:
    assert typed(["a"], "6\x1b[2J0")[0] == ["assistant: 6\\x1b[2J0"]


def test_an_interrupted_answer_does_not_end_the_chat(typed) -> None:
    out, err = typed(["a", "b"], "fail", "61")
    assert out == ["assistant: 61"] and "stopped" in err


def test_an_empty_line_asks_a_pretrained_model_for_a_text(typed) -> None:
    out, err = typed(["/ecg demo:test:3", "", "sinus"], "regular", " rhythm", phase="pretrain")
    assert out[1:] == ["assistant: regular", "assistant: rhythm"] and err == ""


def test_a_system_prompt_can_be_given_and_seen(typed) -> None:
    out, err = typed(["/system", "/system Answer in one word.", "How are you?"], "Well.")
    assert out == ["system prompt: Be brief.", "system prompt: Answer in one word.", "assistant: Well."]
    assert err == f"{BLIND}\n"


def test_a_conversation_is_saved_as_a_record_and_to_read(typed, tmp_path: Path) -> None:
    lines = ["/ecg demo:test:3", "How fast?", f"/save {tmp_path}/talk.json", "/save", f"/save {tmp_path}/no/where"]
    out, err = typed(lines, "61")
    assert out[-1] == f"saved in {tmp_path}/talk.json and {tmp_path}/talk.txt"
    record = json.loads((tmp_path / "talk.json").read_text())
    roles = [(turn["role"], turn["content"]) for turn in record["text"]]
    assert roles == [("system", "Be brief."), ("user", "<ecg>How fast?"), ("assistant", "61")]
    assert record["ecg_path"] == ["demo:test:3"] and record["step"] == 3
    assert record["eval"]["max_new_tokens"] == 8
    text = (tmp_path / "talk.txt").read_text()
    assert "user: <ecg>How fast?\n\nassistant: 61\n" in text and "12 leads" in text
    assert [line.split(":")[1] for line in err.splitlines()] == [" /save", " /save"]


def test_ecgs_are_written_as_pictures_to_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    session = Session(FakeModel(fake_config()))  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "stdin", io.StringIO("/ecg demo:test:4"))
    chat.talk(session, False, tmp_path / "ecgs", ["demo:test:3"])
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if "drawn" in line] == [
        f"ecg {n}: drawn in {tmp_path}/ecgs/ecg_{n}.png" for n in (1, 2)
    ]
    pages = [np.asarray(Image.open(tmp_path / "ecgs" / f"ecg_{n}.png")) for n in (1, 2)]
    width = 10 * 25 + 20 + 2 * 3  # mm: 10 s at 25 mm/s, a pulse of 10 mm/mV and edges, and a margin
    assert pages[0].shape[1] == int(width / 25.4 * 110) and pages[0].shape == pages[1].shape
    assert not np.array_equal(*pages)


def test_help_in_the_chat_names_every_command(typed) -> None:
    out, _ = typed(["/help"])
    assert [line.split()[0] for line in out] == list(chat.COMMANDS)


def test_help_imports_no_jax(command: Command) -> None:
    script = "import sys; from elm_jax import chat, cli; cli.guard(chat.main, ['--help'])"
    check = f"try:\n    {script}\nfinally:\n    assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for word in (*chat.COMMANDS, "--checkpoint", "--step", "--ecg", "--config.eval"):
        assert word in done.stdout


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "--checkpoint"),
        (["--checkpoint", "nowhere"], "--checkpoint: found nowhere without config.json"),
        (["--checkpoint", "W", "--chekpoint=x"], "did you mean '--checkpoint'?"),
        (["--checkpoint", "W", "--config.eval.max_tokens=3"], "max_new_tokens"),
        (["--checkpoint", "W", "--config.llm.name=other"], "a run with other llm.name"),
        (["--checkpoint", "W", "--ecg", "missing.npy"], "missing.npy: found No such file"),
        (["--checkpoint", "W", "--ecg", "demo:test:1", "--ecg", "demo:1"], "demo:<split>:<index>"),
        (["--checkpoint", "W"], "no checkpoint"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(tmp_path, capsys, arguments, says) -> None:
    keys = {"llm__name": "demo", "llm__scratch": {"hidden": 16, "layers": 1, "heads": 2, "mlp": 32, "max_len": 2048}}
    config = to_dict(fake_config(**keys, encoder__config={"resnet_type": "resnet", "width": 4}))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.guard(chat.main, [str(tmp_path) if a == "W" else a for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and says in err and len(err.splitlines()) == 1


@pytest.mark.slow
def test_a_scripted_chat_with_a_trained_run(tiny_run: Path, command: Command) -> None:
    lines = [
        "What is the heart rate?", "/ecg nowhere", "/ecg demo:test:4", "Is the rhythm regular or irregular?", "/clear",
        "/ecg flatline", "Is this an ECG, \udcff or a flat line?",  # a byte that is no UTF-8
    ]  # fmt: skip
    done = command(
        "chat", "--checkpoint", str(tiny_run), "--ecg", "demo:test:3", "--config.eval.max_new_tokens=4",
        text="\n".join(lines),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line.split(": ")[0] for line in done.stdout.splitlines()] == [
        "ecg 1", "assistant", "ecg 2", "assistant", "cleared", "ecg 1", "assistant",
    ]  # fmt: skip
    answers = [line.partition(": ")[2] for line in done.stdout.splitlines() if line.startswith("assistant")]
    assert all(answer.isprintable() and answer for answer in answers)
    assert "up to 4 tokens (greedy)" in done.stderr and "step 40" in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    again = command("chat", "--checkpoint", str(tiny_run), "--step", "7")
    assert again.returncode == 2 and again.stderr.splitlines()[-1].startswith("error: --step: found '7'")


@pytest.mark.slow
def test_a_chat_at_a_terminal(tiny_run: Path, command_environment: dict[str, str], tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, 100))
    process = subprocess.Popen(
        [sys.executable, "-m", "elm_jax.chat", "--checkpoint", str(tiny_run)], stdin=theirs, stdout=theirs,
        stderr=theirs, cwd=ROOT, env=command_environment | {"TERM": "dumb", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    os.close(theirs)
    seen, reader = "", codecs.getincrementaldecoder("utf-8")()

    def until(mark: str, count: int = 1) -> None:
        nonlocal seen
        while seen.count(mark) < count:
            seen += reader.decode(os.read(ours, 4096))

    lines = ["/ecg demo:test:3", "What is the heart rate?", "/ecg nowhere", "/system Answer briefly.",
             "/ecg demo:test:4", "Is <ecg> faster?", f"/save {tmp_path}/talk", "/clear"]  # fmt: skip
    try:
        for number, line in enumerate(lines, 1):
            until("you: ", number)
            os.write(ours, f"{line}\n".encode())
        until("you: ", len(lines) + 1)
        os.write(ours, b"\x04")  # Ctrl-D
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(ours)
    assert seen.index("/help says more") < seen.index("you: ")
    assert "ecg 1: demo:test:3" in seen and seen.count("assistant: ") == 2 and seen.count("error: ") == 1
    assert seen.count("What is the heart rate?") == 1  # echoed by the terminal alone
    drawn = [line for line in seen.splitlines() if any("\u2800" <= c <= "\u28ff" for c in line)]
    assert len(drawn) > 2 * 12 and max(map(len, drawn)) <= 100 and any(line.startswith("V6") for line in drawn)
    saved = json.loads((tmp_path / "talk.json").read_text())
    answers = [turn["content"] for turn in saved["text"] if turn["role"] == "assistant"]
    assert saved["text"][0] == {"role": "system", "content": "Answer briefly."} and len(answers) == 2
    assert "assistant: " + answers[0].split("\n")[0] in seen.replace("\r", "")
