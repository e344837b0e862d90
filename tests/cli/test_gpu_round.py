"""The GPU round: whatever a part does, its line is there; and the whole round, rehearsed on the CPU."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import compiling
import pytest
import warm

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

import gpu_round  # noqa: E402
from gpu_round import PARTS, Part, Round, latest, page, read  # noqa: E402

LONG = 1000.0  # seconds: never reached
TELLS = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{\"found\": 1.5}'); "
Runs = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """Runs parts that are Python programs, each given the file of its figures; the lines that were recorded."""

    def run(*programs: str, seconds: Sequence[float] = (LONG,) * 4, budget: float = LONG) -> list[dict[str, Any]]:
        parts = [Part(PARTS[n].name, seconds[n], "") for n in range(len(programs))]
        body = {part.name: program for part, program in zip(parts, programs, strict=True)}

        def command(name: str, figures: Path) -> list[str]:
            return [sys.executable, "-c", body[name], str(figures)]

        lines = Round(tmp_path, tmp_path / "out.jsonl", budget, False, command).run(parts)
        assert read(tmp_path / "out.jsonl") == lines
        return lines

    return run


def test_a_part_that_ends_well_tells_its_figures(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = runs(TELLS)
    assert (line["status"], line["figures"]) == ("ok", {"found": 1.5}) and "tail" not in line
    assert json.loads(capsys.readouterr().out) == line


def test_a_crash_leaves_its_figures_the_end_of_its_output_and_the_parts_after_it(runs: Runs) -> None:
    failed, missing, killed, after = runs(
        TELLS + "print('before'); raise SystemExit('error: it broke')", "import no_such_package",
        "import os; os.abort()", TELLS,
    )  # fmt: skip
    assert (failed["status"], failed["figures"], failed["why"]) == ("failed", {"found": 1.5}, "it ended with status 1")
    assert failed["tail"] == "before\nerror: it broke"
    assert missing["status"] == "failed" and "No module named 'no_such_package'" in missing["tail"]
    assert (killed["status"], killed["why"]) == ("failed", "it ended with signal SIGABRT")
    assert after["status"] == "ok"


def test_a_part_without_figures_is_not_ok(runs: Runs) -> None:
    assert runs("pass")[0]["why"] == "it left no figures"


def test_a_part_is_ended_at_its_limit_with_what_it_started_and_keeps_what_it_told(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {_deaf(tmp_path)!r}])"
    patience, begun = subprocess.Popen.wait, tmp_path / "pid"

    def wait(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        """The part's time is over as soon as it has done what is to be seen, however busy the machine is."""
        if timeout == 77:
            while not begun.is_file():
                time.sleep(0.05)
            raise subprocess.TimeoutExpired(self.args, timeout)
        return patience(self, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    late, after = runs(TELLS + child, TELLS, seconds=[77, LONG])
    assert (late["status"], late["figures"]) == ("time", {"found": 1.5})
    assert late["why"] == "it had not ended after 77 s"
    assert after["status"] == "ok"
    wait_for_the_end_of(int((tmp_path / "pid").read_text()))


def wait_for_the_end_of(pid: int) -> None:
    """Killed processes end soon, those of ended parents when the system has time for it."""
    state = Path(f"/proc/{pid}/stat")
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.05)


def _deaf(folder: Path) -> str:
    """A program that writes its process id, and ends for nothing but SIGKILL."""
    write = f"import os, pathlib; pathlib.Path({str(folder / 'pid')!r}).write_text(str(os.getpid()))"
    return f"import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); {write}; time.sleep(900)"


def test_no_part_begins_without_time_left(runs: Runs) -> None:
    first, second = runs(TELLS, TELLS, budget=gpu_round.LEAST - 1)
    assert {first["status"], second["status"]} == {"skipped"} and first["why"].endswith("s were left")


def test_a_round_that_is_stopped_records_the_part_that_ran(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    program = f"""
import signal, sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
import gpu_round, pathlib
signal.signal(signal.SIGTERM, gpu_round.stopped)
folder = pathlib.Path({str(tmp_path)!r})
command = lambda name, figures: [sys.executable, "-c", {_deaf(tmp_path)!r}]
gpu_round.Round(folder, pathlib.Path({str(out)!r}), 1000, False, command).run([gpu_round.Part("demo", 1000, "")])
"""
    process = subprocess.Popen([sys.executable, "-c", program])
    while not (tmp_path / "pid").is_file() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    (line,) = read(out)
    assert (line["part"], line["status"], line["why"]) == ("demo", "failed", "the round was stopped")
    wait_for_the_end_of(int((tmp_path / "pid").read_text()))


def _line(part: str, status: str = "ok", **figures: Any) -> dict[str, Any]:
    told = {} if status == "ok" else {"why": "it ended with status 1", "tail": "ValueError: a|b\nerror: above"}
    return {"part": part, "at": "2026-12-01T10:00:00+00:00", "commit": "abc1234", "tiny": False, "status": status,
            "seconds": 12.3, "figures": figures, **told}  # fmt: skip


def test_a_round_that_goes_on_leaves_out_what_is_ok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, ran = tmp_path / "out.jsonl", []
    text = "\n".join(json.dumps(line) for line in (_line("machine", card="H200"), _line("train", "failed")))
    out.write_text(text + '\n{"part": "de', encoding="utf-8")  # cut off in the middle
    monkeypatch.setattr(Round, "run", lambda self, parts: ran.extend(part.name for part in parts) or [])
    assert gpu_round.main(["--tiny", "--continue", "--out", str(out), "--parts", "machine,train,demo"]) == 0
    assert ran == ["train", "demo"]


def test_a_line_after_one_that_was_cut_off_is_read(tmp_path: Path, runs: Runs) -> None:
    (tmp_path / "out.jsonl").write_text('{"part": "de')
    command = [sys.executable, "-c", TELLS]
    Round(tmp_path, tmp_path / "out.jsonl", LONG, True, lambda name, figures: [*command, str(figures)]).run([PARTS[0]])
    assert [line["status"] for line in read(tmp_path / "out.jsonl")] == ["ok"]


def test_the_page_has_the_newest_good_line_of_each_part(tmp_path: Path) -> None:
    lines = [_line("train", times=0.5), _line("train", times=4.75), _line("machine", card="NVIDIA H200"),
             _line("demo"), _line("demo", "failed"), _line("mfu-1.5b", "failed", steps=3)]  # fmt: skip
    assert [line["part"] for line in latest(lines)] == ["machine", "demo", "train", "mfu-1.5b"]
    told = page(lines)
    assert told.startswith("2026-12-01, commit abc1234, NVIDIA H200.\n")
    assert "| training beside PyTorch | ok | 12 | times 4.75 |" in told
    assert "| failed | 12 | steps 3; it ended with status 1; ValueError: a\\|b |" in told
    assert "rehearsal" not in told and page([]) == "Nothing has been recorded."


def test_without_a_gpu_a_round_says_how_to_rehearse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_round, "has_gpu", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu_round.main([])
    assert ended.value.code == 2 and "--tiny rehearses on the CPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_round.main(["--tiny", "--parts", "mfu"])
    assert "--parts mfu: there is machine, attention" in capsys.readouterr().err


def test_the_documents_name_the_command_that_there_is() -> None:
    told = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert "python scripts/gpu_round.py --out" in told and "scripts/gpu_wheels.sh" in told


# What each part must have found, on the CPU with small sizes.
FIGURES = {
    "machine": {"processor", "versions", "devices", "checks of the doctor"},
    "attention": {"cudnn bfloat16", "xla float32, blocks", "xla bfloat16, whole rows, a key too few"},
    "goldens": {"clipping (of 1e-06)", "muon, three steps (of 1e-05)"},
    "demo": {"conversations/s", "seconds of compiling", "heart_rate.within_5_bpm",
             "signal_type.accuracy, shuffled ECGs"},
    "train": {"system: times", "system: first loss, ours", "system: first loss, theirs"},
    "mfu-1.5b": {"MFU", "tokens/s", "host wait", "peak GB"},
    "mfu-7b-lora": {"MFU", "tokens/s", "host wait", "peak GB"},
    "generate": {"ours answers/s", "theirs", "equal answers"},
    "resume": {"bitwise", "stopped after step", "largest difference of a loss"},
    "plan": {"1.5b: GB planned", "7b-lora: ms measured by planned"},
    "profile": {"MB of the trace", "kept as"},
}  # fmt: skip


# Long, for it is each of the eleven parts, and trains, answers and plans beside PyTorch.
@pytest.mark.slow
def test_the_whole_round_rehearsed(tmp_path: Path) -> None:
    out = tmp_path / "round.jsonl"
    environment = Round(tmp_path, out, 1.0, True)._environment() | {"XLA_FLAGS": compiling.FLAGS}
    python, environment = warm.executable(tmp_path, environment)  # of thirty processes, whose imports are half the time
    command = [python, ROOT / "scripts" / "gpu_round.py", "--tiny", "--budget-s", "5000", "--out", out]
    done = subprocess.run(list(map(str, command)), env=environment, text=True, capture_output=True)
    lines = read(out)
    statuses = [(line["part"], line["status"]) for line in lines]
    assert statuses == [(part.name, "ok") for part in PARTS], done.stdout[-9000:]
    for line in lines:
        assert set(line["figures"]) >= FIGURES[line["part"]], line
    assert done.returncode == 0, done.stderr[-2000:]
    found = {line["part"]: line["figures"] for line in lines}
    assert found["resume"]["bitwise"] is True and found["generate"]["equal answers"] == 1
    ours, theirs = (found["train"][f"system: first loss, {side}"] for side in ("ours", "theirs"))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert (tmp_path / "gpu_round.trace.json.gz").stat().st_size > 1000
    assert page(lines) in done.stdout
