"""Answers on disk: appended one by one as they come, so that an evaluation that is stopped goes on where it was.

A file holds the answers of tasks, one after the other; a task is a list of chunks of questions. Answers of a chunk are
made together: after a stop, a chunk that lacks some is asked again whole, and so comes out as it would have.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from elm_jax.errors import UserError
from elm_jax.training.run import read_json, write_json

IDENTITY, PROBLEMS = "evaluation.json", "problems.jsonl"
PREDICTIONS, LABELS, CONTROLS = "predictions.jsonl", "labels.jsonl", "controls"
Line = dict[str, Any]


class Store:
    """The folder of one evaluation. What it holds of another one (`identity` differs) goes.

    resumed: whether there was something of this evaluation.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        identity = json.loads(json.dumps(identity))
        path = folder / IDENTITY
        self.resumed = path.is_file() and _read(path) == identity
        folder.mkdir(parents=True, exist_ok=True)
        if not self.resumed:
            for name in (PREDICTIONS, PROBLEMS, LABELS, "metrics.json", "report.html"):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / CONTROLS, ignore_errors=True)
            write_json(path, identity)
        self._problems = AnswerFile(folder / PROBLEMS)

    def answers(self, condition: str) -> AnswerFile:
        """The file of a condition; `real` is predictions.jsonl."""
        if condition == "real":
            return AnswerFile(self.folder / PREDICTIONS)
        (self.folder / CONTROLS).mkdir(exist_ok=True)
        return AnswerFile(self.folder / CONTROLS / f"{condition}.jsonl")

    def labels(self) -> AnswerFile:
        """The file of what was asked of labels (`labels.ask_labels`)."""
        return AnswerFile(self.folder / LABELS)

    def problems(self) -> list[Line]:
        """What was noted of records that cannot be evaluated."""
        return self._problems.lines

    def note(self, problem: Line) -> None:
        """Keep a problem."""
        self._problems.append(problem)


class AnswerFile:
    """Lines of JSON. What a stop left of a last line is cut off."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines, self._ends, end = path, [], [], 0
        for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
            value = _parsed(line)
            if value is None:
                break
            end += len(line)
            self.lines.append(value)
            self._ends.append(end)
        self._taken = 0
        if path.is_file() and path.stat().st_size > end:
            with path.open("r+b") as file:
                file.truncate(end)

    def take(self, chunks: Sequence[Collection[str]]) -> list[Line]:
        """The lines of the next task as far as its chunks (of ids) are whole; what follows an unfinished one goes.

        The number of chunks that are whole is `whole`.
        """
        start = self._taken
        self.whole = 0
        for ids in chunks:
            found = self.lines[self._taken : self._taken + len(ids)]
            if {line["id"] for line in found} != set(ids):
                self._cut()
                break
            self._taken += len(ids)
            self.whole += 1
        return self.lines[start : self._taken]

    def append(self, line: Line) -> None:
        """Write a line; it is in the file when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.lines.append(line)
        self._ends.append(self.path.stat().st_size)
        self._taken = len(self.lines)

    def _cut(self) -> None:
        del self.lines[self._taken :], self._ends[self._taken :]
        if self.path.is_file():
            with self.path.open("r+b") as file:
                file.truncate(self._ends[-1] if self._ends else 0)


def _read(path: Path) -> Mapping[str, Any] | None:
    try:
        return read_json(path)
    except UserError:  # a stop while it was written: nothing of worth can be there yet
        return None


def _parsed(line: bytes) -> Line | None:
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
