"""Messages -> drafts: ids, what is learnt, where the shareable prefixes end; and drafts that fit a length."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import chain
from typing import NamedTuple

from elm_jax.errors import UserError
from elm_jax.text import compat as chat_compat
from elm_jax.text.forms import CHAT_FORMS, ChatForm
from elm_jax.text.messages import Message, keep, oldest_first, runs, trimmed
from elm_jax.text.vocabulary import SIGNAL_TOKEN, Vocabulary

THINK_PREFIX = "<think>\n"


@dataclass(frozen=True)
class TextSpec:
    """All that decides how a record becomes tokens; `render.render` says what each means."""

    family: str
    signal_tokens: int = 1
    system_prompt: str | None = None
    phase: str = "sft"
    explicit_thinking: bool = False
    max_len: int | None = None
    compat: tuple[str, ...] = ()

    @property
    def prompt(self) -> str | None:
        """The system prompt of a conversation that brings none."""
        return CHAT_FORMS[self.family].default_system if self.system_prompt is None else self.system_prompt


@dataclass(frozen=True, eq=False)
class Style:
    """A spec, made ready for a tokenizer; `system` None: no system turn; the last four are compat.

    Equal only to itself: styles are few, made once, and looked up for every conversation.
    """

    spec: TextSpec
    words: Vocabulary
    form: ChatForm
    system: str | None
    clean_answers: bool
    by_ids: bool
    by_tokens: bool
    specials: bool

    @cached_property
    def ecg(self) -> "Segment":
        """The placeholders of one ECG."""
        signal, count = self.words.id(SIGNAL_TOKEN), self.spec.signal_tokens
        assert signal is not None, "checked when the style was made"
        return Segment(SIGNAL_TOKEN * count, (signal,) * count, False)

    @cached_property
    def beginning(self) -> "tuple[list[Segment], int]":
        """What `Writer.begin` writes, and how many of these segments end with the system prompt."""
        writer = Writer(self)
        writer.write_beginning()
        return writer.segments, writer.system_segments

    def form_id(self, template: str) -> int:
        """The id of the first special token of one of the form's strings."""
        pieces = self.words.template(template, self.form.tokens)
        return next(token for _, token in pieces if token is not None)


class Draft(NamedTuple):
    """`learn` has a byte 0 or 1 for each id; `ecgs` is how many were written."""

    prompt: str
    ids: list[int]
    learn: bytearray
    system_end: int
    signal_end: int
    ecgs: int


class Segment(NamedTuple):
    """Text with its ids; None: a run of text, tokenised once it is complete."""

    text: str
    ids: tuple[int, ...] | None
    learn: bool


class Writer:
    """Collects segments. A text joins the run of text before it, except where `edge` begins a new one."""

    def __init__(self, style: Style) -> None:
        self.style = style
        self.segments: list[Segment] = []
        self.system_segments = self.signal_segments = self.ecgs = 0

    def text(self, text: str, learn: bool = False, edge: bool = False) -> None:
        last = self.segments[-1] if self.segments else None
        if not text:
            return
        if last and last.ids is None and (not edge or self.style.by_ids):
            self.segments[-1] = Segment(last.text + text, None, learn)
        else:
            self.segments.append(Segment(text, None, learn))

    def template(self, text: str, learn: bool = False, edge: bool = False) -> None:
        for piece, token in self.style.words.template(text, self.style.form.tokens) if text else ():
            if token is None:
                self.text(piece, learn, edge)
            else:
                self.segments.append(Segment(piece, (token,), learn))

    def tagged(self, text: str, learn: bool = False, edge: bool = False) -> None:
        """Text in which think and answer tags are tokens."""
        for piece, tag in [(text, None)] if self.style.specials else self.style.words.tagged(text):
            if tag is None:
                self.text(piece, learn, edge)
            else:
                self.segments.append(Segment(piece, (tag,), learn))

    def ecg(self) -> None:
        self.segments.append(self.style.ecg)
        self.ecgs += 1

    def begin(self) -> None:
        """What all conversations of a style begin with, written once."""
        segments, self.system_segments = self.style.beginning
        self.segments += segments

    def write_beginning(self) -> None:
        self.template(self.style.form.bos)
        if not self.style.form.system_in_user:
            self._system()

    def _system(self) -> None:
        form, prompt = self.style.form, self.style.system
        if prompt is None or form.system is None:
            return
        self.template(form.system[0])
        self.tagged(prompt)
        before = len(self.segments)
        self.template(form.system[1])
        added = range(before, len(self.segments))
        self.system_segments = max((i + 1 for i in added if self.segments[i].ids is not None), default=0)

    def user(self, message: Message, first: bool, leading: bool) -> None:
        """`first`: of the user; `leading`: of all, with all ECGs of the conversation in it."""
        form, pieces, end = self.style.form, runs(message, self.style.form.strip), 0
        self.template(form.user[0])
        if first and form.system_in_user:
            self._system()
        for piece in pieces:
            if piece is None:
                self.ecg()
                end = len(self.segments)
            else:
                self.text(piece)
        last = len(pieces) - 1 - pieces[::-1].index(None) if None in pieces else 0
        if leading and all(piece in (None, "\n") for piece in pieces[: last + 1]):
            self.signal_segments = end
        self.template(form.user[1])

    def assistant(self, text: str) -> None:
        form, thought = self.style.form, self.style.spec.explicit_thinking and text.startswith(THINK_PREFIX)
        self._header(text)
        if not text:  # only with compat: the reference leaves the header of an empty answer open
            return
        if thought:
            self.tagged(THINK_PREFIX, edge=True)
        self.tagged(text.removeprefix(THINK_PREFIX) if thought else text, learn=True, edge=True)
        self.template(form.answer[1], learn=True)
        self.template(form.answer[2])

    def next_header(self, opening: str) -> None:
        self._header(opening)
        self.tagged(opening, edge=True)

    def _header(self, answer: str) -> None:
        header = self.style.form.answer[0]
        bare = header.removesuffix(" ") if self.style.words.spaces_runs else header
        self.template(bare, edge=True)
        if bare != header and answer:  # which is a run of its own and brings its space
            self.segments.append(Segment(" ", (), False))

    def draft(self) -> Draft:
        words, specials = self.style.words, self.style.specials
        ids: list[int] = []
        learn = bytearray()
        ends = [0]
        for text, known, learnt in self.segments:
            found = words.encode(text, specials) if known is None else known
            ids += found
            learn += (b"\1" if learnt else b"\0") * len(found)
            ends.append(len(ids))
        prompt = "".join(segment.text for segment in self.segments)
        learn[:1] = bytes(len(learn[:1]))  # nothing predicts the first token: a text without bos begins with it
        return Draft(prompt, ids, learn, ends[self.system_segments], ends[self.signal_segments], self.ecgs)


def chat_draft(style: Style, messages: Sequence[Message], opening: str | None = None) -> Draft:
    """The whole conversation; with `opening`: and the next response's header and first words, and nothing to learn."""
    writer, ecgs = Writer(style), sum(message.ecgs for message in messages)
    writer.begin()
    first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
    for i, message in enumerate(messages):
        if message.role == "assistant":
            writer.assistant(message.text)
            continue
        if i:
            writer.template(style.form.between)
        writer.user(message, first=i == first, leading=i == 0 and message.ecgs == ecgs)
    if opening is not None:
        writer.next_header(opening)
        draft = writer.draft()
        return draft._replace(learn=bytearray(len(draft.ids)))
    writer.template(style.form.final, learn=True)
    draft = writer.draft()
    return draft._replace(learn=bytearray(_labels(style, draft.ids))) if style.by_ids else draft


def text_draft(style: Style, ecgs: int, text: str | None) -> Draft:
    """The pretraining form: ECGs and a text; None: only what comes before the text."""
    writer, (bos, eos) = Writer(style), style.form.pretrain
    writer.template(bos)
    for _ in range(ecgs if style.spec.signal_tokens else 0):
        writer.ecg()
        writer.signal_segments = len(writer.segments)
        writer.text("\n")
    if text is not None:
        writer.tagged(text, learn=True, edge=True)
        writer.template(eos, learn=True)
    draft = writer.draft()
    if style.by_ids and text is not None:
        signal = style.words.id(SIGNAL_TOKEN)
        return draft._replace(learn=bytearray(chat_compat.pretrain_labels(draft.ids, style.form_id(bos), signal)))
    return draft


def fitted_chat(style: Style, messages: list[Message], opening: str | None = None) -> Draft:
    """The draft (`chat_draft`), shortened to `style.spec.max_len` in the order that render.py sets out."""
    draft, limit, is_open = chat_draft(style, messages, opening), style.spec.max_len, opening is not None
    if limit is None or len(draft.ids) <= limit:
        return draft
    if style.by_tokens and not is_open:
        return _without_tokens(style, draft, limit, pretrain=False)
    if _needed(draft, is_open) <= limit:
        return _cut(style, draft, limit)
    going = oldest_first(messages)

    @cache
    def without(count: int) -> tuple[list[Message], Draft]:
        gone = set(chain.from_iterable(going[:count]))
        left = keep(messages, (i for i in range(len(messages)) if i not in gone))
        return left, chat_draft(style, left, opening)

    most = 1  # few go mostly, and thousands may: how many is not found one by one
    while most < len(going) and _needed(without(most)[1], is_open) > limit:
        most *= 2
    counts = range(most // 2 + 1, min(most, len(going)))
    place = bisect_left(counts, True, key=lambda count: _needed(without(count)[1], is_open) <= limit)
    messages, draft = without([*counts, min(most, len(going))][place])
    if _needed(draft, is_open) > limit and style.system is not None:
        style = replace(style, system=None)
        draft = chat_draft(style, messages, opening)
    if _needed(draft, is_open) <= limit:
        return _cut(style, draft, limit)

    def fits(length: int) -> bool:
        return _needed(chat_draft(style, trimmed(messages, length), opening), is_open) <= limit

    question = next(message.text for message in messages if message.role == "user")
    length = bisect_left(range(len(question) + 1), True, key=fits)
    return _cut(style, chat_draft(style, trimmed(messages, length), opening), limit, is_open)


def fitted_text(style: Style, ecgs: int, text: str | None) -> Draft:
    """The pretraining draft (`text_draft`); where it is too long the end of the text goes, and the eos with it."""
    draft, limit = text_draft(style, ecgs, text), style.spec.max_len
    if limit is None or len(draft.ids) <= limit:
        return draft
    if style.by_tokens and text is not None:
        return _without_tokens(style, draft, limit, pretrain=True)
    return _cut(style, draft, limit)


def _needed(draft: Draft, is_open: bool) -> int:
    """Tokens through the last one that matters."""
    if is_open or not any(draft.learn):
        return len(draft.ids)
    return draft.learn.rindex(True) + 1


def _cut(style: Style, draft: Draft, limit: int, is_open: bool = False) -> Draft:
    """The first `limit` tokens; UserError unless at least one of them is learnt, or all that is open fits."""
    least = len(draft.ids) if is_open or not any(draft.learn) else draft.learn.index(True) + 1
    if least > limit:
        signals = draft.ecgs * style.spec.signal_tokens
        expected = f"at least {least} for this conversation, {signals} of them the ECG's"
        raise UserError("data.max_len", str(limit), expected, "raise data.max_len or lower encoder.tokens")
    ids = draft.ids[:limit]
    return draft._replace(prompt=style.words.text(ids), ids=ids, learn=draft.learn[:limit])


def _labels(style: Style, ids: Sequence[int]) -> list[bool]:
    form, words = style.form, style.words
    assert form.reference_start is not None, "families that the reference has not are written our way"
    skip = words.encode(THINK_PREFIX, True) if style.spec.explicit_thinking else ()
    final = style.form_id(form.final) if form.final else None
    start, end = words.encode(form.reference_start, True), style.form_id(form.answer[1])
    watched = chat_compat.Watched(style.form_id(form.pretrain[0]), start, end, final, skip)
    return chat_compat.chat_labels(ids, watched)


def _without_tokens(style: Style, draft: Draft, limit: int, pretrain: bool) -> Draft:
    bos, signal = style.form_id(style.form.pretrain[0]), style.words.id(SIGNAL_TOKEN)
    kept = chat_compat.kept(draft.ids, draft.learn, signal, bos, limit)
    ids, learn = [draft.ids[i] for i in kept], bytearray(draft.learn[i] for i in kept)
    if style.by_ids:
        learn = bytearray(chat_compat.pretrain_labels(ids, bos, signal) if pretrain else _labels(style, ids))
    ends = [end if kept[:end] == list(range(end)) else 0 for end in (draft.system_end, draft.signal_end)]
    return draft._replace(ids=ids, learn=learn, system_end=ends[0], signal_end=ends[1])
