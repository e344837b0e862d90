"""One round on a GPU that is there for minutes: everything that only a GPU can tell, most important first.

    python scripts/gpu_round.py --out gpu_round.jsonl              # at most ten minutes on one H100 or H200
    python scripts/gpu_round.py --out gpu_round.jsonl --continue   # what is not recorded as ok yet
    python scripts/gpu_round.py --out gpu_round.jsonl --parts plan # needs no GPU, but jax for CUDA
    python scripts/gpu_round.py --tiny --out rehearsal.jsonl       # all on a CPU, small
    python scripts/gpu_round.py --page gpu_round.jsonl             # the table of docs/gpu.md

Each part (`scripts/gpu_parts.py`) runs in a process of its own, one after the other, for at most its own seconds and
what is left of --budget-s. When it ends, whichever way, its line goes to stdout and to the file of --out: its status
(ok, failed, time, skipped), its seconds, the figures that it had by then, and where it is not ok why, and the end of
its output. Nothing is downloaded. `scripts/gpu_wheels.sh` fetches what a bare machine may lack. This process never
touches JAX, so the card's memory is each part's alone.

Exit status: 0 if all parts are ok, 1 if one is not.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 580.0  # seconds
LEAST = 15.0  # seconds: with less left nothing is begun
GRACE = 5.0  # seconds between asking a process to end and ending it
TAIL = 3000  # characters
OK, FAILED, TIME, SKIPPED = "ok", "failed", "time", "skipped"
Line = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """`seconds`: its limit on a GPU. Small sizes on a CPU have no limit of their own. `gpu`: whether it needs one."""

    name: str
    seconds: float
    title: str
    gpu: bool = True


PARTS = (
    Part("machine", 80, "doctor, versions, card"),
    Part("attention", 80, "every attention path against the reference path, on packed rows"),
    Part("goldens", 60, "goldens of a decoder and of optimizers"),
    Part("demo", 90, "the demo for 60 seconds"),
    Part("train", 130, "training beside PyTorch"),
    Part("mfu-1.5b", 90, "full fine-tuning of 1.5B parameters, rows of 2048 tokens"),
    Part("mfu-7b-lora", 90, "LoRA on 7B parameters, rows of 4096 tokens"),
    Part("generate", 70, "answers beside Hugging Face generate"),
    Part("resume", 80, "SIGTERM, and the run that goes on"),
    Part("profile", 40, "a profile of three steps"),
    Part("plan", 120, "what was measured beside the plan's prediction", gpu=False),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file of JSON lines; what it holds stays")
    parser.add_argument("--parts", default=",".join(part.name for part in PARTS), help="which, in this order")
    parser.add_argument("--budget-s", type=float, default=BUDGET, help="seconds for all of them (%(default)g)")
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU, to rehearse")
    parser.add_argument("--continue", dest="goes_on", action="store_true", help="leave out what --out has as ok")
    parser.add_argument("--page", type=Path, metavar="FILE", help="print the table of a file of --out, and end")
    args = parser.parse_args(argv)
    if args.page:
        print(page(read(args.page)))
        return 0
    named = {part.name: part for part in PARTS}
    chosen = args.parts.split(",")
    if unknown := [name for name in chosen if name not in named]:
        parser.error(f"--parts {','.join(unknown)}: there is {', '.join(named)}")
    if not args.tiny and any(named[name].gpu for name in chosen) and not has_gpu():
        parser.error("there is no NVIDIA GPU here (nvidia-smi shows none); --tiny rehearses on the CPU")
    if args.out and not args.out.absolute().parent.is_dir():
        parser.error(f"--out {args.out}: there is no folder {args.out.absolute().parent}")
    signal.signal(signal.SIGTERM, stopped)  # so that the part that runs is ended too, and recorded
    done = {line["part"] for line in latest(read(args.out)) if line["status"] == OK} if args.goes_on else set()
    with tempfile.TemporaryDirectory(prefix="gpu_round_") as folder:
        round_ = Round(Path(folder), args.out, args.budget_s, args.tiny)
        lines = round_.run([named[name] for name in chosen if name not in done])
    print(f"\n{page(read(args.out) if args.out else lines)}")
    return 0 if all(line["status"] == OK for line in lines) else 1


def has_gpu() -> bool:
    """Whether nvidia-smi lists a GPU, or the driver does where that program is missing."""
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        return not listed.returncode and "GPU" in listed.stdout
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/proc/driver/nvidia/gpus"))


class Round:
    """Runs parts and records them. `command` makes a part's command line: (name, file of its figures) -> words."""

    def __init__(
        self, folder: Path, out: Path | None, budget: float, tiny: bool,
        command: Callable[[str, Path], list[str]] | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.out, self.tiny = folder, out, tiny
        self.ends = time.monotonic() + budget
        self.command = command or self._command
        self.facts = {"commit": commit(), "tiny": tiny}

    def run(self, parts: Iterable[Part]) -> list[Line]:
        """The lines of these parts, each recorded as soon as its part has ended."""
        return [self._record(self._run(part)) for part in parts]

    def _run(self, part: Part) -> Line:
        line = {"part": part.name, "at": datetime.now(UTC).isoformat(timespec="seconds"), **self.facts}
        left = self.ends - time.monotonic()
        if left < LEAST:
            why = f"{max(left, 0):.0f} s were left"
            return {**line, "status": SKIPPED, "seconds": 0, "figures": {}, "why": why, "tail": ""}
        figures, output = self.folder / f"{part.name}.json", self.folder / f"{part.name}.log"
        begun = time.monotonic()
        limit = left if self.tiny else min(part.seconds, left)
        try:
            status, why = self._wait(self.command(part.name, figures), output, limit)
        except SystemExit:
            self._record({**line, **self._told(FAILED, "the round was stopped", begun, figures, output)})
            raise
        return {**line, **self._told(status, why, begun, figures, output)}

    def _wait(self, command: list[str], output: Path, limit: float) -> tuple[str, str]:
        """The status of a command, and in words why it is not ok."""
        with output.open("wb") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=self.folder,
                env=self._environment(), start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                return TIME, f"it had not ended after {limit:.0f} s"
            finally:
                end(process)  # and what it started
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        return (OK, "") if code == 0 else (FAILED, f"it ended with {how}")

    def _told(self, status: str, why: str, begun: float, figures: Path, output: Path) -> Line:
        seconds = round(time.monotonic() - begun, 1)
        found = json.loads(figures.read_text()) if figures.is_file() else {}
        if status == OK and not found:
            status, why = FAILED, "it left no figures"
        told = {"status": status, "seconds": seconds, "figures": found}
        said = output.read_text(errors="replace")[-TAIL:] if output.is_file() else ""
        return told if status == OK else {**told, "why": why, "tail": said.strip()}

    def _record(self, line: Line) -> Line:
        text = json.dumps(line)
        print(text, flush=True)
        if self.out:
            with self.out.open("a+b") as file:
                file.seek(max(file.tell() - 1, 0))
                cut_off = file.read() not in (b"", b"\n")  # where a round was killed while it wrote
                file.write(("\n" * cut_off + text + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
        return line

    def _command(self, name: str, figures: Path) -> list[str]:
        words = [sys.executable, str(ROOT / "scripts" / "gpu_parts.py"), name, "--figures", str(figures)]
        kept = [] if self.out is None else ["--keep", str(self.out.absolute())]
        return [*words, *kept, *(["--tiny"] if self.tiny else [])]

    def _environment(self) -> dict[str, str]:
        """What all parts share: what they compile and cache; they reach no network."""
        path = [os.environ.get("PYTHONPATH", ""), str(ROOT)]  # an installed elm_jax, with its extension, comes first
        own = {
            "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "ELM_JAX_CACHE": str(self.folder / "cache"), "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, path)), **({"JAX_PLATFORMS": "cpu"} if self.tiny else {}),
        }  # fmt: skip
        compiled = {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled")}
        return {**compiled, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3", **os.environ, **own}


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, which are the process group that it leads."""
    for number, patience in ((signal.SIGTERM, GRACE if process.poll() is None else 0), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def stopped(*_: Any) -> NoReturn:
    raise SystemExit(143)


def commit() -> str:
    """Of the checkout, where git and its history are there; with + where files differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        return "unknown"
    return "unknown" if found.returncode else found.stdout.strip() + ("+" if changed.strip() else "")


# -- what was recorded ------------------------------------------------------------------------------------------


def read(path: Path | None) -> list[Line]:
    """All lines of a file of --out; none where it is not there. A last line that was cut off is left out."""
    if path is None or not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def latest(lines: Iterable[Line]) -> list[Line]:
    """The newest line of each part that is ok, else its newest, in the order of the parts."""
    best: dict[str, Line] = {}
    for line in lines:
        if line["status"] == OK or best.get(line["part"], line)["status"] != OK:
            best[line["part"]] = line
    return [best[part.name] for part in PARTS if part.name in best]


def page(lines: Iterable[Line]) -> str:
    """The Markdown table of a round."""
    rows = latest(lines)
    if not rows:
        return "Nothing has been recorded."
    titles = {part.name: part.title for part in PARTS}
    found = next((line["figures"] for line in rows if line["part"] == "machine"), {})
    commits = ", ".join(dict.fromkeys(line["commit"] for line in rows))
    card = found.get("card") or found.get("processor") or "unknown machine"
    small = "; **a rehearsal with small sizes**" if any(line["tiny"] for line in rows) else ""
    table = [f"{rows[0]['at'][:10]}, commit {commits}, {card}{small}.", ""]
    table += ["| part | status | s | figures |", "|---|---|---|---|"]
    for line in rows:
        why = [] if line["status"] == OK else [line["why"], *error_in(line["tail"])]
        told = "; ".join([*(f"{name} {shown(value)}" for name, value in line["figures"].items()), *why])
        cells = [titles[line["part"]], line["status"], f"{line['seconds']:.0f}", told.replace("|", "\\|")]
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def error_in(output: str) -> list[str]:
    """The last line of some output that names an exception, else its last line, if there is one."""
    lines = output.splitlines()
    return [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)][-1:] or lines[-1:]


def shown(value: Any) -> str:
    """A figure in a cell."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "NO", None: "not known"}[value]
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return ", ".join(map(shown, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    sys.exit(main())
