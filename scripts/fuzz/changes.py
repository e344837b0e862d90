"""What is done to a valid input: bits, lengths, slices, lines, words, values of JSON; all from a `Random` alone."""

import json
import random
from collections.abc import Callable
from typing import Any

Files = dict[str, bytes]  # an input: the first file is the one that is opened; the first word of its name is `a`
Way = Callable[[random.Random, bytes], bytes]

LONGEST = 2 << 20  # bytes of a file while it is changed
TEXTS = (".hea", ".json", ".jsonl", ".args", ".csv", ".tsv", ".xml")
NUMBERS = (
    *("0", "-1", "1", "2", "255", "65536", "2147483648", "-2147483649", "99999999999999999999", "1e-9", "1e400", "nan"),
    *("inf", "0x10", "9" * 5000, "1.5", "", "~", "16x9", "212:999", "1/0", "0/mV", "1(99)/uV", "None", "\u0663"),
)
WORDS = (
    *(b"numpy", b"dtype", b"O8", b"f8", b"U9", b"\xff" * 8, b"\x7f\xff\xff\xff", bytes(8), b"c__main__\nx\n"),
    *(b"cos\nsystem\n(S'true'\ntR.", b"cbuiltins\neval\n", b"\x8c\x02os\x8c\x06system\x93", b"PK\x03\x04", b"PAR1"),
    *(b"h\x00", b"h\x05", b"\x8a\xff", b"B\xff\xff\xff\x7f", b"\x85", b"\x93", b"\x94", b"\x00", b"\xed\xa0\x80"),
    *(bytes([code]) for code in b"(tRb]}eusa"),
)
_LONG, _NESTED = "9" * 5000, '[{"a":'
# In place of a value of JSON, as it is written there. Halves of surrogate pairs, and what Python's parser lets pass.
VALUES = (
    *("null", "true", "-1", "0", "1", "3", "1e400", "NaN", "-Infinity", "1.5", _LONG, "-9223372036854775809", "[]"),
    "{}",
    *('""', '"\\ud800"', '"\\u0000"', '"\\u202e\\u001b[31m"', '"<signal>"', '"<ecg>"', '"../../etc/passwd"', '"None"'),
    *("[[[[]]]]", '{"a": {"b": 1}}', '[1, "a", null]', '"\\u00e9\\ud83d\\ude00"', f"{_NESTED * 60}1{'}]' * 60}"),
    *(f"{_NESTED * 2000}1{'}]' * 2000}", '"a\\nb"', '"{{ 7 * 7 }}"', "2147483648", "0.1", '"https://localhost:1/x"'),
)


def changed(rng: random.Random, files: Files, others: list[Files], ways: tuple[Way, ...] = ()) -> Files:
    """An input: a seed with one to six changes, mostly to one of its files; half of them of `ways`, where there are."""
    files = dict(files)
    name = rng.choice(list(files))
    for _ in range(rng.choice((1, 1, 1, 2, 2, 5))):
        if rng.random() < 0.1:
            name = rng.choice(list(files))
        text = name.endswith(TEXTS)
        fitting = ways if ways and rng.random() < 0.5 else TEXT_WAYS if text and rng.random() < 0.7 else WAYS
        if text and not name.endswith((".hea", ".args", ".tsv", ".xml")) and rng.random() < 0.5:
            fitting = (in_json,)
        if rng.random() < 0.1:
            files[name] = _spliced(rng, files[name], rng.choice(others))
        else:
            files[name] = rng.choice(fitting)(rng, files[name])
        files[name] = files[name][:LONGEST]
    if rng.random() < 0.03 and len(files) > 1:
        del files[rng.choice(list(files)[1:])]
    return files


def flipped(rng: random.Random, data: bytes) -> bytes:
    """Bits."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 16)) if found else 0):
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def overwritten(rng: random.Random, data: bytes) -> bytes:
    at, put = _place(rng, data), rng.choice(WORDS) if rng.random() < 0.5 else bytes([rng.randrange(256)])
    return data[:at] + put + data[at + len(put) :]


def put_in(rng: random.Random, data: bytes) -> bytes:
    at, times = _place(rng, data), rng.choice((1, 1, 1, 2, 5000))
    return data[:at] + (rng.choice(WORDS) if rng.random() < 0.6 else bytes([rng.randrange(256)])) * times + data[at:]


def cut(rng: random.Random, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] if rng.random() < 0.5 else data[:at] + data[at + rng.choice((1, 2, 4, 40)) :]


def moved(rng: random.Random, data: bytes) -> bytes:
    at, to, size = _place(rng, data), _place(rng, data), rng.choice((1, 4, 16, 100))
    return data[:to] + data[at : at + size] * rng.choice((1, 1, 2, 50)) + data[to:]


def _spliced(rng: random.Random, data: bytes, other: Files) -> bytes:
    """The end of another seed's file behind a beginning of this."""
    behind = rng.choice(list(other.values()))
    return data[: _place(rng, data)] + behind[_place(rng, behind) :]


def number(rng: random.Random, data: bytes) -> bytes:
    """Another number in place of one, or of one's part."""
    words = data.split(b" ")
    at = rng.randrange(len(words))
    words[at] = rng.choice(NUMBERS).encode() if rng.random() < 0.5 else overwritten(rng, words[at])
    return b" ".join(words)


def lines(rng: random.Random, data: bytes) -> bytes:
    """A line gone, doubled, or in another's place."""
    found = data.split(b"\n")
    at, to = rng.randrange(len(found)), rng.randrange(len(found))
    if rng.random() < 0.3:
        del found[at]
    elif rng.random() < 0.5:
        found[at], found[to] = found[to], found[at]
    else:
        found[at:at] = [found[to]] * rng.choice((1, 2, 300))
    return b"\n".join(found)


def deep(rng: random.Random, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + rng.choice((b"[", b'{"a":', b'"\\ud800"', b"9" * 5000)) * rng.choice((1, 3000)) + data[at:]


def in_json(rng: random.Random, data: bytes) -> bytes:
    """A value of a JSON text, or of one of its lines, gone, doubled or replaced; what is no JSON is cut instead."""
    before, line, after = b"", data, b""
    if data.count(b"\n") > 1:
        rows = data.split(b"\n")
        at = rng.randrange(len(rows))
        before, line, after = b"\n".join([*rows[:at], b""]), rows[at], b"\n".join([b"", *rows[at + 1 :]])
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return cut(rng, data)
    mark = "\ue000"
    value = _replaced(rng, value, mark)
    text = json.dumps(value).replace(json.dumps(mark), rng.choice(VALUES))
    return before + text.encode() + after


def _replaced(rng: random.Random, value: Any, mark: str) -> Any:
    """A tree with one value, key or item changed, `mark` where a hostile value shall stand."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.08:
        return mark
    place = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    chance = rng.random()
    if chance < 0.8:
        value[place] = _replaced(rng, value[place], mark)
    elif chance < 0.9:
        del value[place]
    elif isinstance(value, list):
        value[place:place] = [value[rng.randrange(len(value))]] * rng.choice((1, 3, 2000))
    else:
        value[rng.choice(("", "a", "\ud800", "__class__", "version", "text", mark))] = value.pop(place)
    return value


WAYS: tuple[Way, ...] = (flipped, overwritten, put_in, cut, moved)
TEXT_WAYS: tuple[Way, ...] = (number, number, number, lines, deep, cut, overwritten)


def _place(rng: random.Random, data: bytes) -> int:
    """Mostly near the beginning, where headers and opcodes are."""
    return rng.randrange(min(len(data), rng.choice((64, 400, 1 << 30))) + 1)
