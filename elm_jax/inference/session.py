"""A conversation with a trained model: turns, ECGs where they came up, and an answer to what is said next.

C leads, L samples.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.config import EvalConfig
from elm_jax.data.batch import Shown
from elm_jax.data.ecg_tokens import reserved
from elm_jax.data.pages import is_image
from elm_jax.data.represent import DEMO, FLATLINE, NOISE, SignalSpec
from elm_jax.ecg.checks import limb_sums
from elm_jax.ecg.recording import LEADS, Recording, collected_notes, read_ecg
from elm_jax.errors import UserError, refused
from elm_jax.inference.model import Prompt, TrainedModel
from elm_jax.text.render import CHAT_FORMS, Rendered, Turn, to_prompt, to_tokens
from elm_jax.text.turns import Words, count_marks, with_words
from elm_jax.text.write import THINK_PREFIX, TextSpec

MARK = "<ecg>"
MOST_MV = 30.0  # no ECG is larger
_UNNAMED = OSError, ValueError, RuntimeError  # of what no file can be called


@dataclass(frozen=True, eq=False)
class Ecg:
    """An ECG as the model sees it, the leads as they were recorded (12, L) in mV, of an image zeros, and in words what
    was read."""

    path: str
    signal: Shown
    recorded: np.ndarray
    words: Words  # what views of the model write of it
    summary: str


class Session:
    """One conversation with `model`: `add_ecg`, then `say`, as often as one likes.

    In phase "sft" what is said is a question, and its answer part of what follows. A single ECG stands before
    the first question, as in training; several stand before the questions that they came up with, or at the
    `<ecg>` markers in them. In phase "pretrain" there are no questions: what is said is the beginning of a text
    about the ECGs, possibly empty, which the model goes on with, and nothing of it is kept.

    Where answers are drawn (`eval.temperature`), the seed and an answer's number decide how: the first of `eval.seeds`,
    else `seed`; answers are numbered from the start of the session on.

    `bare_rate`: Hz of files that state none; by default the model's own rate. `options`: how answers are made; by
    default as the run's `eval` says.

    Raises:
        UserError: `eval.max_new_tokens` leaves no room for a prompt.
    """

    def __init__(
        self, model: TrainedModel, bare_rate: float | None = None, options: EvalConfig | None = None
    ) -> None:
        self.model, self.options = model, options or model.config.eval
        self.spec = replace(model.assembly.signal, bare_rate=bare_rate)
        context, new = model.assembly.llm.max_len, self.options.max_new_tokens
        self.room = context - new
        if self.room < 1:
            raise UserError(
                "eval.max_new_tokens", str(new), f"less than the model's context, {context}",
                "lower --config.eval.max_new_tokens",
            )  # fmt: skip
        self.system = model.assembly.text.system_prompt
        self._drawn = 0  # answers so far, of cleared conversations too: where answers are drawn, no two are drawn alike
        self.clear()

    def instruct(self, text: str) -> None:
        """Have another system prompt from the next answer on.

        Raises:
            UserError: the model's chat form has none, or it was pretrained, without any chat form.
        """
        spec = self.model.assembly.text
        if spec.phase == "pretrain" or CHAT_FORMS[spec.family].system is None:
            fix = "say it in a message"
            raise UserError("system prompt", "one", f"none for a model of {spec.family}, phase {spec.phase}", fix)
        self.system = text

    def clear(self) -> None:
        """Forget all turns and ECGs."""
        self.turns: list[Turn] = []
        self.ecgs: list[Ecg] = []
        self.renew()

    def renew(self) -> None:
        """Forget all turns; the ECGs are for the next question."""
        self.turns = []
        self._new = len(self.ecgs)  # ECGs that no question has come with yet
        self.shortened = False  # whether the last prompt had to be shortened to fit the context
        self.cut = 0  # tokens of its ECGs, where these are symbols, that did not fit

    def add_ecg(self, path: str) -> Ecg:
        """Read an ECG for the next question: `read_input`, which says what it raises."""
        ecg = read_input(path, self.spec, len(self.ecgs))
        self.ecgs.append(ecg)
        self._new += 1
        return ecg

    def say(self, text: str) -> str:
        """The model's answer to `text`, whole; see `spoken`."""
        return "".join(self.spoken(text))

    def spoken(self, text: str) -> Iterator[str]:
        """The model's answer to `text`, in pieces as it comes. Until it is whole, the conversation is as it was.

        When the conversation outgrows the context, the oldest turns go first (see `text.render`), and only when the
        last question alone is too long, symbols of ECGs (`cut` says how many).

        Raises:
            UserError: not one marker for each new ECG, or even the shortest prompt does not fit.
        """
        pieces = []
        for piece in self._answer(self.prompt(text)):
            pieces.append(piece)
            yield piece
        if self.model.assembly.text.phase != "pretrain":
            prefix = THINK_PREFIX if self.model.assembly.text.explicit_thinking else ""
            self.turns += [Turn("user", self._marked(text)), Turn("assistant", prefix + "".join(pieces))]
            self._new = 0

    def prompt(self, text: str) -> Prompt:
        """What the model is asked where `text` is said next, which leaves the conversation as it is. Raises UserError
        as `spoken`."""
        pretrained = self.model.assembly.text.phase == "pretrain"
        turns = [] if pretrained else [*self.turns, Turn("user", self._marked(text))]
        rendered = self._beginning(text) if pretrained else self._prompt(turns)
        prompt = Prompt(rendered, [ecg.signal for ecg in self.ecgs])
        prompt = self.model.written(prompt, self.options.max_new_tokens)
        self.cut = prompt.cut
        return prompt

    def record(self) -> dict[str, Any]:
        """The conversation as a record, as datasets have them, with where the answers are from.

        Raises:
            UserError: the model goes on with texts, which are no conversation.
        """
        if self.model.assembly.text.phase == "pretrain":
            raise UserError("/save", "a model of phase pretrain", "one that converses", "copy the text")
        turns = [{"role": turn.role, "content": turn.text} for turn in self.turns]
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return {
            "ecg_path": [ecg.path for ecg in self.ecgs[: len(self.ecgs) - self._new]],
            "text": [*system, *turns],
            "name": "chat",
            "checkpoint": str(self.model.folder),
            "step": self.model.step,
            "eval": asdict(self.options),
        }

    def save(self, name: str) -> tuple[Path, Path]:
        """Write the conversation as a record, `name`.json, and as text to read, `name`.txt; their paths.

        Raises:
            UserError: they cannot be written, or there is no conversation (`record`).
        """
        record = self.record()
        lines = [f"{record['checkpoint']}, step {record['step']}", *(f"ecg {ecg.summary}" for ecg in self.ecgs)]
        lines += [f"{turn['role']}: {turn['content']}" for turn in record["text"]]
        with refused("/save", "", "a file that can be written", "name another", OSError, ValueError, RuntimeError):
            path = Path(name).expanduser()
            path = path.with_suffix("") if path.suffix in (".json", ".txt") else path
            if path.name in ("", ".."):
                raise ValueError(f"{name!r} names a folder")
            files = path.with_name(f"{path.name}.json"), path.with_name(f"{path.name}.txt")
            files[0].write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            files[1].write_text("\n\n".join(lines) + "\n", encoding="utf-8")
        return files

    def _answer(self, prompt: Prompt) -> Iterator[str]:
        seed = (self.options.seeds or (self.model.config.seed,))[0]
        yield from self.model.spoken(prompt, self.options, seed=zlib.crc32(f"{seed}:{self._drawn}".encode()))
        self._drawn += 1

    def _marked(self, text: str) -> str:
        marks = count_marks(text)
        if marks not in (0, self._new):
            raise UserError(
                "message", f"{marks} {MARK} markers for {self._new} new ECGs", "one for each, or none",
                f"give the ECGs first, or leave {MARK} out",
            )  # fmt: skip
        return text if marks else MARK * self._new + text

    def _prompt(self, turns: Sequence[Turn]) -> Rendered:
        whole, room = self._to_prompt(turns), self._room_beside(whole=True)
        self.shortened = len(whole.ids) > room
        if not self.shortened:
            return whole
        try:
            return self._to_prompt(turns, max(room, 1))
        except UserError:
            alone, room = self._alone(turns[-1]), self._room_beside(whole=False)
        try:
            rendered = self._to_prompt([alone], room)
        except UserError as error:
            raise self._too_long(error.expected) from error
        self.shortened = len(rendered.ids) < len(whole.ids)
        return rendered

    def _to_prompt(self, turns: Sequence[Turn], max_len: int | None = None) -> Rendered:
        words = [ecg.words for ecg in self.ecgs]
        options = self._options(max_len)
        return to_prompt(with_words(turns, words, options[1].prompt) if any(map(any, words)) else turns, *options)

    def _alone(self, question: Turn) -> Turn:
        """The question with all ECGs of the conversation before it."""
        return question._replace(text=MARK * (len(self.ecgs) - count_marks(question.text)) + question.text)

    def _beginning(self, text: str) -> Rendered:
        """The prompt of a pretrained model: the ECGs, and the beginning of the text about them."""
        if text:
            whole = to_tokens([Turn("assistant", text)], *self._options())
            end = np.isin(whole.ids, self.model.stops)[::-1].argmin()  # the end tokens after the text
            kept = len(whole.ids) - int(end)
            rendered = replace(whole, ids=whole.ids[:kept], supervised=whole.supervised[:kept])
        elif self.ecgs:
            rendered = to_prompt([Turn("user", "")], *self._options())
        else:
            raise UserError("message", "neither an ECG nor a text", "one of them", "give an ECG first")
        if len(rendered.ids) > self._room_beside(whole=False):
            raise self._too_long(f"at least {len(rendered.ids)} for these ECGs and this text")
        return rendered

    def _room_beside(self, whole: bool) -> int:
        """The tokens that text and placeholders may have beside the ECGs' symbols, which are whole or cut short."""
        tokens = self.spec.tokens
        if tokens is None:
            return self.room
        ecgs = [ecg.signal[self.spec.view] for ecg in self.ecgs]
        return self.room - reserved(ecgs, max(map(len, ecgs), default=0) if whole else tokens.least)

    def _too_long(self, needed: str) -> UserError:
        new = self.options.max_new_tokens
        return UserError(
            "conversation", f"a context with room for {self.room} tokens beside {new} new ones", needed,
            "begin anew with fewer ECGs or a shorter text, or lower --config.eval.max_new_tokens",
        )  # fmt: skip

    def _options(self, max_len: int | None = None) -> tuple[Any, TextSpec, int]:
        spec = replace(self.model.assembly.text, max_len=max_len, system_prompt=self.system)
        return self.model.assembly.tokenizer, spec, len(self.ecgs)


def read_input(path: str, spec: SignalSpec, number: int = 0) -> Ecg:
    """The ECG at `path`: a recording that `read_ecg` reads, an image, `demo:<split>:<index>`, `noise` or `flatline`.

    A relative path is relative to the current folder, not to `data.root`. `number` tells one `noise` from
    another.

    Raises:
        UserError: whatever cannot be such an ECG; or the run leaves ECGs out.
    """
    if spec.perturb == "only_text":
        raise UserError(
            "data.perturb", "'only_text', which leaves ECGs out", "a run that sees ECGs",
            "start the chat with --config.data.perturb=None",
        )  # fmt: skip
    key, spec = zlib.crc32(f"{spec.seed}:{number}".encode()), replace(spec, outside_root=True)  # the user's own word
    if path in (NOISE, FLATLINE) or path.startswith(DEMO):
        file = path
        facts = ["generated", _amount(len(LEADS), spec.sampling_rate, spec.length)]
    elif is_image(path):
        with refused(path, "", "the path of an image", "correct it", *_UNNAMED):
            file, facts = str(Path(path).expanduser().absolute()), ["an image"]
    else:
        file, recording, notes = _read(path, spec)
        amount = _amount(len(recording.leads), recording.sampling_rate, recording.signal.shape[1])
        facts = [amount, *notes, *_remarks(recording, spec)]
    if len(spec.leads) < len(LEADS):
        facts.append(f"only {', '.join(LEADS[i] for i in spec.leads)} used")
    if spec.perturb is not None:
        facts.append(f"replaced by {spec.perturb} (data.perturb)")
    told = f"{path}: {'; '.join(facts)}"
    nothing = np.zeros((len(LEADS), spec.length), np.float32)  # of an image
    recorded = nothing if is_image(path) else spec.load_raw(file, key)
    return Ecg(file, spec.show(file, key), recorded, spec.words(file, key), told)


def _read(path: str, spec: SignalSpec) -> tuple[str, Recording, list[str]]:
    """The absolute path, what is there, and what reading it took for granted."""
    with refused(path, "", "the path of a recording", "correct it", *_UNNAMED):
        file = Path(path).expanduser().absolute()
        with collected_notes(str(file.parent)) as notes:
            bare_rate = spec.bare_rate or spec.sampling_rate
            return str(file), read_ecg(file, bare_rate=bare_rate, some_leads=spec.takes_some), notes


def _amount(leads: int, rate: float, samples: int) -> str:
    return f"{leads} leads, {rate:g} Hz, {samples / rate:g} s"


def _remarks(recording: Recording, spec: SignalSpec) -> Iterator[str]:
    """What one may want to know of a recording before trusting an answer about it."""
    seconds, used = recording.signal.shape[1] / recording.sampling_rate, spec.length / spec.sampling_rate
    if recording.sampling_rate != spec.sampling_rate:
        yield f"resampled to {spec.sampling_rate:g} Hz"
    if seconds > used:
        yield f"the first {used:g} s used"
    most = float(np.abs(recording.signal).max())
    if most > MOST_MV:
        yield f"values up to {most:g}, taken as mV: are they \N{MICRO SIGN}V?"
    flat = [name for name, lead in zip(recording.leads, recording.signal, strict=True) if np.ptp(lead) == 0]
    if flat:
        yield f"flat: {', '.join(flat)}"
    elif recording.leads != LEADS:
        yield f"{', '.join(recording.leads)} alone"
    elif contradiction := limb_sums(recording.signal):
        yield contradiction.text
