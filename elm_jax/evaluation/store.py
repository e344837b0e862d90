"""Answers on disk: appended one by one as they come, so that an evaluation that is stopped goes on where it was.

A file holds the answers of tasks, one after the other; a task is a list of chunks of questions. Answers of a chunk are
made together: after a stop, a chunk that lacks some is asked again whole, and so comes out as it would have.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from elm_jax.errors import UserError, printable
from elm_jax.folders import json_if_whole, json_lines, whole_lines, write_json

IDENTITY, PROBLEMS = "evaluation.json", "problems.jsonl"
PREDICTIONS, LABELS, JUDGED, CONTROLS = "predictions.jsonl", "labels.jsonl", "judged.jsonl", "controls"
# All that an evaluation leaves. A move that was stopped is finished by the next one.
LEFT = (PREDICTIONS, PROBLEMS, LABELS, JUDGED, CONTROLS, "metrics.json", "report.html", "examples.png", "plots",
        IDENTITY)  # fmt: skip
_MOVING = "previous.tmp"
AGAIN = "evaluate the run again: python -m elm_jax.evaluate --checkpoint W"
Line = dict[str, Any]
# What every line of a file has: its keys, with the types of their values.
ANSWER = {"id": str, "answer": str, "truth": str}
PROBLEM = {"fold": int, "record": int, **dict.fromkeys(("where", "found", "expected", "fix"), str)}
LABEL = {"id": str, "p": list}
REPLY = {"id": str, "of": str, "reply": str}


class Store:
    """The folder of one evaluation. What it holds of another one (`identity` differs) goes to a folder in it,
    `previous-1` and so on, and a line on stderr says so."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        identity = json.loads(json.dumps(identity))
        path = folder / IDENTITY
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / _MOVING).is_dir() or not path.is_file() or json_if_whole(path) != identity:
            _set_aside(folder, identity)
            write_json(path, identity)
        self.problems = AnswerFile(folder / PROBLEMS, PROBLEM)  # what was noted of records that cannot be evaluated
        self.judged = AnswerFile(folder / JUDGED, REPLY)  # what a judge said of answers (`url_judge.ask_judge`)
        self.labels = AnswerFile(folder / LABELS, LABEL)  # what was asked of labels (`labels.ask_labels`)

    def answers(self, condition: str) -> AnswerFile:
        """The file of a condition; `real` is predictions.jsonl."""
        if condition == "real":
            return AnswerFile(self.folder / PREDICTIONS)
        (self.folder / CONTROLS).mkdir(exist_ok=True)
        return AnswerFile(self.folder / CONTROLS / f"{condition}.jsonl")


def _set_aside(folder: Path, identity: Mapping[str, Any]) -> None:
    """Move what another evaluation has left into the next `previous-<n>`."""
    moving, left = folder / _MOVING, [name for name in LEFT if (folder / name).exists()]
    if not left and not moving.is_dir():
        return
    moving.mkdir(exist_ok=True)
    for name in left:
        (folder / name).rename(moving / name)
    before = json_if_whole(moving / IDENTITY)
    aside = next(path for n in itertools.count(1) if not (path := folder / f"previous-{n}").exists())
    moving.rename(aside)
    other = ", ".join(_differing(before, identity)) or "keys"
    told = f"{folder} held another evaluation, with other {other}: it is now in {aside}"
    print(printable(told), file=sys.stderr)


def _differing(before: Mapping[str, Any], now: Mapping[str, Any], section: str = "") -> Iterator[str]:
    """The dotted keys whose values differ."""
    for key in dict.fromkeys((*before, *now)):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differing(old, new, f"{section}{key}.")
        elif old != new:
            yield f"{section}{key}"


class AnswerFile:
    """Lines of JSON. What a stop left of a last line is cut off; so is all from a line on that was not written here."""

    def __init__(self, path: Path, keys: Mapping[str, type] = ANSWER) -> None:
        self.path, self.lines, self._ends, end = path, [], [], 0
        for value, after in whole_lines(path.read_bytes()) if path.is_file() else ():
            if _lacking(value, keys):
                break
            end = after
            self.lines.append(value)
            self._ends.append(end)
        self._taken = 0
        if path.is_file() and path.stat().st_size > end:
            with path.open("r+b") as file:
                file.truncate(end)

    def take(self, chunks: Sequence[Collection[str]], left_out: Collection[str] = ()) -> list[Line]:
        """The lines of the next task as far as its chunks (of ids) are whole; what follows an unfinished one goes.

        The number of chunks that are whole is `whole`. Lines of ids that were `left_out` later are passed over.
        """
        taken: list[Line] = []
        self.whole = 0
        for ids in chunks:
            found, end = [], self._taken
            for place in range(self._taken, len(self.lines)):
                if self.lines[place]["id"] not in left_out:
                    if len(found) == len(ids):
                        break
                    found.append(self.lines[place])
                end = place + 1
            if {line["id"] for line in found} != set(ids):
                self._cut()
                break
            taken += found
            self._taken = end
            self.whole += 1
        return taken

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


def _lacking(line: Line, keys: Mapping[str, type]) -> list[str]:
    return [key for key, kind in keys.items() if type(line.get(key)) is not kind]


def answers_in(path: Path) -> list[Line]:
    """The answers in a file of an evaluation, none where there is no file.

    Raises:
        UserError: it has another line, which is named.
    """
    found = json_lines(path, AGAIN)
    for number, line in enumerate(found, 1):
        lacking, answers = _lacking(line, ANSWER), line.get("answers", [])
        if lacking:
            raise UserError(f"{path}, line {number}", f"no text as {lacking[0]}", "an answer of an evaluation", AGAIN)
        if type(answers) is not list or not all(type(one) is str for one in answers):
            raise UserError(f"{path}, line {number}", "answers that are no texts", "an answer of an evaluation", AGAIN)
    return found


def predictions_in(folder: Path) -> list[Line]:
    """The predictions of an evaluation. Raises UserError where there are none."""
    found = answers_in(folder / PREDICTIONS)
    if not found:
        raise UserError(folder / PREDICTIONS, "no answer", "an evaluation's predictions", AGAIN)
    return found
