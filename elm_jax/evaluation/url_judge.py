"""Answers marked by another language model behind a URL, as OpenAI's chat completions are had: GEM's criteria.

Off unless `eval.judge.url` is set. Texts of answers and truths leave this machine then, ECGs do not. A judge that
cannot be reached leaves all other scores as they are. Replies are kept, and what was asked once is not asked again.
"""

import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException, HTTPMessage
from typing import IO, Any
from urllib.parse import urljoin, urlsplit

from tqdm import tqdm

from elm_jax import stopping
from elm_jax.errors import UserError
from elm_jax.evaluation.store import AnswerFile
from elm_jax.json_text import parse_json
from elm_jax.keys import JudgeConfig
from elm_jax.scoring.answers import split_response
from elm_jax.scoring.judging import PROMPT, averages, marks, question
from elm_jax.scoring.metrics import question_id

_ENDING = "/chat/completions"
_MOST, _PART = 4 << 20, 1 << 16  # bytes of a reply, and of what is read at once
_AGAIN = (408, 425, 429, 500, 502, 503, 504)  # statuses after which it is asked again
_LONGEST_WAIT, _MOST_AT_ONCE = 60.0, 64  # s, requests
_FIX = "correct eval.judge.*, and give the same command again: answers are kept"

Lines = Sequence[Mapping[str, Any]]


class UrlJudge:
    """Who is asked at `options.url`; its key, if there is one, is in the environment as `options.key_variable`.

    wait: s before it is asked again, then twice as long, and so on.

    Raises:
        UserError: the URL is none of http or https, holds a password, or no model is named.
    """

    def __init__(self, options: JudgeConfig, wait: float = 1.0) -> None:
        url, self.options, self._wait = urlsplit(options.url or ""), options, wait
        if url.scheme not in ("http", "https") or not url.hostname or url.username is not None or url.query:
            found = f"{url.scheme}://{url.hostname or ''}…"
            expected = "http(s)://HOST/v1, without a password or a query"
            fix = f"write it so; a key goes into the environment variable {options.key_variable}"
            raise UserError("eval.judge.url", found, expected, fix)
        if not options.model:
            raise UserError("eval.judge.model", "none", "the name of a model at eval.judge.url", "set it")
        base = (options.url or "").rstrip("/")
        self.url = base if base.endswith(_ENDING) else base + _ENDING
        self._opener = urllib.request.build_opener(_SameHost)

    def reply(self, text: str) -> str:
        """What the model says to a text.

        Raises:
            UserError: it cannot be reached, refuses, or sends what is no chat completion.
        """
        for turn in range(self.options.retries + 1):
            try:
                return self._once(text)
            except _Again as error:
                if turn == self.options.retries:
                    raise UserError(self.url, str(error), "a chat completion", _FIX) from None
                time.sleep(min(error.wait or self._wait * 2**turn, _LONGEST_WAIT))
        raise AssertionError("unreachable")

    def _once(self, text: str) -> str:
        asked = {
            "model": self.options.model, "messages": [{"role": "user", "content": text}], "temperature": 0,
            "max_tokens": self.options.max_tokens,
        }  # fmt: skip
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.options.key_variable, "").strip():
            if not (key.isascii() and key.isprintable()):  # http.client would print it
                raise UserError(self.options.key_variable, "characters that no header holds", "a key", "set it anew")
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(asked).encode(), headers)
        try:
            with self._opener.open(request, timeout=self.options.timeout) as answer:
                data, end = b"", time.monotonic() + self.options.timeout
                while part := answer.read1(_PART):  # type: ignore[union-attr]
                    data += part
                    if len(data) > _MOST or time.monotonic() > end:
                        raise _Again("a reply that is too long or comes too slowly")
                if answer.length:
                    raise _Again("a reply that was cut off")
        except urllib.error.HTTPError as error:
            with error:
                if error.code in _AGAIN:
                    raise _Again(f"status {error.code}", _seconds(error.headers.get("Retry-After"))) from None
            raise UserError(self.url, f"status {error.code}", "a chat completion", _FIX) from None
        except UserError:  # a redirect that is not followed; it is a ValueError, too
            raise
        except (OSError, HTTPException, ValueError, OverflowError) as error:  # also a URLError and a timeout
            raise _Again(f"{type(error).__name__}: {getattr(error, 'reason', error)}") from None
        try:
            found: Any = parse_json(data)
            content = found["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, UnicodeDecodeError):
            content = None
        if not isinstance(content, str):
            raise UserError(self.url, "a reply without choices[0].message.content", "a chat completion", _FIX)
        return content


class _Again(Exception):
    """What may be otherwise the next time; wait: s that the server asks for, if it does."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Redirects are followed on the same host alone, so that neither texts nor the key go elsewhere."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request:
        old, new = urlsplit(req.full_url), urlsplit(urljoin(req.full_url, newurl))
        if (old.scheme, old.netloc) != (new.scheme, new.netloc):
            found = f"a redirect to another host, {new.scheme}://{new.hostname}"
            raise UserError(req.full_url, found, "no redirect, or one on the same host", _FIX)
        return urllib.request.Request(new.geturl(), req.data, dict(req.header_items()), method=req.get_method())


def _seconds(text: str | None) -> float:
    try:
        return min(max(float(text or 0), 0.0), _LONGEST_WAIT)
    except ValueError:  # a date
        return 0.0


def ask_judge(judge: UrlJudge, lines: Lines, file: AnswerFile, progress: bool = False) -> dict[str, Any]:
    """Have answers (id, patient, answer, truth) marked: {"url", "model", "prompt", "asked", "n", "unreadable",
    "criteria": {name: {"value", "ci95"}}}; where the judge fails "absent", why, in place of the criteria.

    `file` keeps the replies, of which one to the same model, prompt and texts is taken as it is; `unreadable` lists the
    ids of those that are no marks, which the next evaluation asks for again.
    """
    options, chosen = judge.options, lines[: judge.options.limit]
    told: dict[str, Any] = {"url": judge.url, "model": options.model, "prompt": PROMPT, "asked": len(chosen)}
    if not chosen:
        return {**told, "absent": "no answer to a record that is called as eval.grounding says"}
    known = {line["of"]: line["reply"] for line in file.lines}
    wanted = {question_id(one): (one, question(_said(one["answer"]), _said(one["truth"]))) for one in chosen}
    names = {name: _name(options.model, text) for name, (_, text) in wanted.items()}
    rest = [name for name in wanted if names[name] not in known or _marks(known[names[name]]) is None]
    try:
        with ThreadPoolExecutor(min(options.workers, _MOST_AT_ONCE)) as pool:
            try:
                replies = stopping.each(pool.map(lambda name: judge.reply(wanted[name][1]), rest), "judgement")
                bar = tqdm(replies, "judge", len(rest), disable=not progress)
                for name, reply in zip(rest, bar, strict=True):
                    known[names[name]] = reply
                    file.append({"id": name, "of": names[name], "reply": reply})
            finally:
                pool.shutdown(cancel_futures=True)
    except UserError as error:
        return {**told, "absent": str(error)}
    found = {name: _marks(known[names[name]]) for name in wanted}
    read = {name: one for name, one in found.items() if one is not None}
    told |= {"n": len(read), "unreadable": [name for name in found if name not in read]}
    if not read:
        return {**told, "absent": "no reply could be read"}
    return {**told, "criteria": averages(list(read.values()), [str(wanted[name][0]["patient"]) for name in read])}


def _said(text: str) -> str:
    """An answer with its thinking, without tags."""
    return "\n".join(filter(None, split_response(text)))


def _name(model: str | None, text: str) -> str:
    """What a reply is kept by."""
    return hashlib.sha256(f"{model}\n{text}".encode()).hexdigest()


def _marks(reply: str) -> dict[str, float] | None:
    try:
        return marks(reply)
    except ValueError:
        return None
