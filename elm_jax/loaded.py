"""`elm_jax.load`: a trained model as one object, to ask about ECGs from Python.

N signal tokens of an ECG, D model width, C leads, L samples.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from elm_jax import schema
from elm_jax.cli import ConfigFlags
from elm_jax.config import SCHEMA, EvalConfig
from elm_jax.ecg.recording import Recording, read_ecg
from elm_jax.errors import UserError, nearest
from elm_jax.evaluation.attention import Attention, attention
from elm_jax.exchange.exported import open_exported
from elm_jax.folders import CONFIG, FACTS
from elm_jax.inference.model import Prompt, TrainedModel
from elm_jax.inference.session import Session
from elm_jax.run.config import config_of_run
from elm_jax.runtime.compilation import keep_compiled

if TYPE_CHECKING:
    from os import PathLike

    One = str | PathLike[str] | np.ndarray | Recording
    Shown = One | tuple[One, ...] | None

OPTIONS = ("max_new_tokens", "temperature", "top_p", "repetition_penalty", "batch_size")  # of `eval`
_OWN = ("seed", "system", "sampling_rate", "leads", "unit")


def load(
    source: str | PathLike[str], mesh: Mapping[str, int] | None = None, step: str | int = "best", **config: Any
) -> EcgModel:
    """The model of a run folder, or of a folder that `export` has written.

    mesh: axes and their sizes, as `{"fsdp": 2}`; None: each device holds a whole copy. step: of a run, `latest`, `best`
    (else latest) or a number. Further arguments change sections of the config: `eval={"max_new_tokens": 64}`.

    Raises:
        UserError: no such folder, no checkpoint in it, or a key that cannot be changed; says what to do.
    """
    folder = Path(source).expanduser()
    given = config | ({} if mesh is None else {"mesh": dict(mesh)})
    flags = ConfigFlags(values={f"{section}.{key}": value for section, keys in given.items()
                                for key, value in _keys(section, keys).items()})  # fmt: skip
    keep_compiled()
    if not (folder / CONFIG).is_file() and (folder / FACTS).is_file():
        weights = open_exported(folder, flags)
        return EcgModel(TrainedModel(weights.assembly.config, weights=weights))
    return EcgModel(TrainedModel(config_of_run(str(folder), flags), str(step)))


def _keys(section: str, keys: Any) -> Mapping[str, Any]:
    if not isinstance(keys, Mapping):
        expected = f"a mapping of keys of its section, as {section}={{...}}"
        raise UserError(section, repr(keys), expected, 'write for example eval={"max_new_tokens": 64}')
    return keys


class EcgModel:
    """A model that answers questions about ECGs; made by `load`.

    An ECG is the path of a recording of any format that `read_ecg` reads, an array (C, L) in mV with `sampling_rate=`
    (and `leads=`, where they are not I, II, III, aVR, aVL, aVF, V1 to V6), or a `Recording`; several ECGs of one
    question are a tuple; None is a question without any. `noise` and `flatline` are ECGs that are none.

    Options of a question: max_new_tokens, temperature, top_p, repetition_penalty and batch_size in place of the run's
    own, `seed` of what is drawn, and `system`, a system prompt.
    """

    def __init__(self, model: TrainedModel) -> None:
        self.model = model
        self._arrays = tempfile.TemporaryDirectory(prefix="elm_jax_")

    def __repr__(self) -> str:
        model, spec = self.model, self.model.assembly.signal
        encoders = ", ".join(str(one.name) for one in model.config.encoder_parts.values()) or "no encoder"
        count = sum(leaf.size for leaf in model.arrays.values())
        return (
            f"<EcgModel {model.folder}, step {model.step}: {model.config.elm}, {encoders}, {count:,} parameters; reads "
            f"{len(spec.leads)} leads, {spec.length / spec.sampling_rate:g} s at {spec.sampling_rate:g} Hz>"
        )

    @overload
    def ask(self, ecg: Shown, question: str, **options: Any) -> str: ...
    @overload
    def ask(self, ecg: Shown | list[Shown], question: str | list[str], **options: Any) -> list[str]: ...
    def ask(self, ecg: Shown | list[Shown], question: str | list[str], **options: Any) -> str | list[str]:
        """The answer, a string; of a list of ECGs, of questions, or of both, which then are pairs, a list of answers.

        Each pair is a conversation of its own; all go through the model in batches.

        Raises:
            UserError: an ECG that cannot be read, lists of unlike length, an unknown option, a question that does not
                fit the context; names it.
        """
        many = {len(each) for each in (ecg, question) if isinstance(each, list)}
        if len(many) > 1:
            found = f"{len(ecg)} ECGs and {len(question)} questions"  # type: ignore[arg-type]
            raise UserError("ask", found, "as many, or one of either", "give a question for each ECG")
        count = many.pop() if many else 1
        how, own = self._options(options)
        prompts = [
            self._session(one, how, own).prompt(asked)
            for one, asked in zip(_each(ecg, count), _each(question, count), strict=True)
        ]
        answers = self.model.answers(prompts, how, own.get("seed", self._seed))
        return answers if isinstance(ecg, list) or isinstance(question, list) else answers[0]

    def stream(self, ecg: Shown, question: str, **options: Any) -> Iterator[str]:
        """The answer in pieces, as it comes. Raises UserError as `ask`."""
        how, own = self._options(options)
        prompt = self._session(ecg, how, own).prompt(question)
        yield from self.model.spoken(prompt, how, own.get("seed", self._seed))

    def chat(self, ecg: Shown = None, **options: Any) -> Chat:
        """A conversation about these ECGs, in which turns are kept. Raises UserError as `ask`."""
        how, own = self._options(options)
        return Chat(self, self._session(ecg, how, own), own)

    def embed(self, ecg: Shown | list[Shown], **options: Any) -> np.ndarray:
        """(N, D) float32, of a list (B, N, D): what the LLM is given of an ECG, behind encoder and connector.

        Raises:
            UserError: as `ask`; or ECGs are symbols among the model's tokens, which are no embeddings of a signal; or
                those of a list have other views, and so not as many embeddings.
        """
        how, own = self._options(options)
        if self.model.assembly.signal.tokens is not None:
            found = f"{self.model.config.elm}, whose ECGs are tokens of its text"
            raise UserError("embed", found, "a model with an encoder or a connector", "encode it with elm_jax.EcgByte")
        found = []
        for one in ecg if isinstance(ecg, list) else [ecg]:
            if one is None or isinstance(one, tuple):
                raise UserError("embed", "no ECG" if one is None else f"{len(one)} in a tuple", "one", "give a list")
            request = self.model.request(0, self._session(one, how, own).prompt("?"), 1)
            (places,) = request.places  # -1: of a view that the ECG has not
            found.append(np.asarray(self.model.embeddings(request), np.float32)[places[places >= 0]])
        if len(counts := sorted({len(each) for each in found})) > 1:
            told = f"ECGs of {' and '.join(map(str, counts))} embeddings, which lack some of the views"
            raise UserError("embed", told, "as many of each", "ask for one at a time")
        return np.stack(found) if isinstance(ecg, list) else found[0]

    def attention(
        self, ecg: Shown, question: str, answer: str | None = None, picture: str | PathLike[str] | None = None,
        **options: Any,
    ) -> Attention:  # fmt: skip
        """What the answer (None: the model's own) attends to; drawn on the waveform of the first ECG into the PNG
        `picture`, if there is one. Raises UserError as `ask`."""
        how, own = self._options(options)
        session = self._session(ecg, how, own)
        prompt = session.prompt(question)
        said = self.model.answers([prompt], how, own.get("seed", self._seed))[0] if answer is None else answer
        found = attention(self.model, Prompt(prompt.rendered, [one.signal for one in session.ecgs]), said)
        if picture is not None:
            from elm_jax.evaluation.attention_picture import draw_attention
            from elm_jax.folders import check_picture

            check_picture(file := Path(picture), "picture")
            spec, title = session.spec, f"{question}  →  {said or '(empty)'}"
            draw_attention(found, 0, session.ecgs[0].recorded, spec.sampling_rate, spec.leads, title, file)
        return found

    @property
    def _seed(self) -> int:
        return (self.model.config.eval.seeds or (self.model.config.seed,))[0]

    def _options(self, options: Mapping[str, Any]) -> tuple[EvalConfig, dict[str, Any]]:
        """How answers are made, and the options that are no keys of `eval`."""
        own = {name: value for name, value in options.items() if name in _OWN}
        if "seed" in own:
            own["seed"] = schema.check("seed", SCHEMA["seed"], own["seed"])
        changed = {name: value for name, value in options.items() if name not in _OWN}
        for name in changed:
            if name not in OPTIONS:
                known = (*OPTIONS, *_OWN)
                fix = nearest(name, known) or "leave it out"
                raise UserError(name, "an unknown option", f"one of {', '.join(known)}", fix)
            changed[name] = schema.check(name, SCHEMA[f"eval.{name}"], changed[name])
        return replace(self.model.config.eval, **changed), own

    def _session(self, ecg: Shown, how: EvalConfig, own: Mapping[str, Any]) -> Session:
        """A new conversation about these ECGs."""
        session = Session(self.model, own.get("sampling_rate"), how)
        if own.get("system") is not None:
            session.instruct(own["system"])
        for one in () if ecg is None else ecg if isinstance(ecg, tuple) else (ecg,):
            session.add_ecg(self._path(one, own))
        return session

    def _path(self, ecg: One, own: Mapping[str, Any]) -> str:
        """Where an ECG lies: samples are written to a file, and so every view reads them as it reads a file."""
        rate, leads, unit = (own.get(name) for name in ("sampling_rate", "leads", "unit"))
        if isinstance(ecg, Recording):
            ecg, rate, leads, unit = ecg.signal, ecg.sampling_rate, ecg.leads, None
        elif not isinstance(ecg, np.ndarray):
            return os.fspath(ecg)
        if ecg.dtype.kind not in "biuf":
            where, fix = f"array of shape {ecg.shape}", "give its samples as float32"
            raise UserError(where, f"dtype {ecg.dtype}", "real numbers", fix)
        digest = hashlib.sha256(repr((ecg.shape, str(ecg.dtype), rate, leads, unit)).encode())
        digest.update(ecg.tobytes())
        folder = Path(self._arrays.name)
        file = folder / f"{digest.hexdigest()[:16]}.npy"
        if not file.is_file():
            given = folder / "given.npy"
            np.save(given, ecg, allow_pickle=False)
            spec = self.model.assembly.signal
            try:
                bare, some = spec.sampling_rate, spec.takes_some
                read = read_ecg(given, leads, rate, unit=unit, bare_rate=bare, some_leads=some)
            except UserError as error:
                where = f"array of shape {ecg.shape}"
                raise UserError(where, error.found.replace(str(given), "it"), error.expected, error.fix) from None
            kept: Any = {"ecg": read.signal, "target_sf": read.sampling_rate, "leads": read.leads}
            np.save(file, kept, allow_pickle=True)
        return str(file)


class Chat:
    """A conversation with a model; made by `EcgModel.chat`."""

    def __init__(self, model: EcgModel, session: Session, own: Mapping[str, Any]) -> None:
        self.model, self.session, self._own = model, session, own

    def __repr__(self) -> str:
        return f"<Chat with {self.model!r}: {len(self.session.ecgs)} ECGs, {len(self.turns)} turns>"

    @property
    def turns(self) -> list[dict[str, str]]:
        """What was said, as messages with `role` and `content`."""
        return [{"role": turn.role, "content": turn.text} for turn in self.session.turns]

    def show(self, ecg: One) -> str:
        """One more ECG, for the next question; what was read, in words. Raises UserError as `EcgModel.ask`."""
        return self.session.add_ecg(self.model._path(ecg, self._own)).summary

    def ask(self, question: str) -> str:
        """The answer. Raises UserError as `EcgModel.ask`; the conversation is then as it was."""
        return self.session.say(question)

    def stream(self, question: str) -> Iterator[str]:
        """The answer in pieces, as it comes: turns are kept when it is whole."""
        return self.session.spoken(question)


def _each(of: Any, count: int) -> list[Any]:
    return of if isinstance(of, list) else [of] * count
