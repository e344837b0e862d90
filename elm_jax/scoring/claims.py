"""What a text says of an ECG that can be measured: numbers with their kind, lead and unit, and judgements in words.

English. A sentence is cut at its subjects ("PR interval", "ST segment", "axis"); a number, a judging word or leads
belong to the subject before them, or to the one that they stand right before ("a 98 ms QRS", "prolonged PR"). Nothing
is guessed: what has neither a unit nor a subject close by is no claim.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from math import inf

from elm_jax.scoring.quantities import Number, digits, numbers

LIMBS, CHEST = ("I", "II", "III", "aVR", "aVL", "aVF"), ("V1", "V2", "V3", "V4", "V5", "V6")
LEADS = (*LIMBS, *CHEST)
PER_LEAD = ("st", "t", "q", "r", "s", "p_wave")  # kinds that are of a lead, in mV


@dataclass(frozen=True)
class Claim:
    """A measurable statement.

    kind: rate, rr (ms), p, pr, qrs, qt, qtc (ms), axis, p_axis, t_axis (°), st, t, q, r, s, p_wave, sokolow, cornell
    (mV), beat (s); of words alone regular, fibrillation, sinus, early, ectopic. leads: in one of which at least it is
    said to be so; () where none is named. low, high: the number or range, infinite where it is a bound. word: what is
    said in place of a number, such as "long". said: where it stands.
    """

    kind: str
    leads: tuple[str, ...] = ()
    low: float = -inf
    high: float = inf
    word: str = ""
    negated: bool = False
    said: str = field(default="", compare=False)


_PLAUSIBLE = {"rate": (15, 400), "axis": (-180, 360), "p_axis": (-180, 360), "t_axis": (-180, 360)}
_INTERVALS = ("p", "pr", "qrs", "qt", "qtc", "rr")
_NO_UNIT_BEHIND = re.compile(r"\s*(?:%|x\b|/\d|(?:st|nd|rd|th)\b|-?leads?\b|beats?\b|mm\b|years?\b)", re.I)
_QT_PAIR = re.compile(r"\bqt\s*/\s*qtc\b\D{0,12}(\d{2,4})\s*(?:ms)?\s*/\s*(\d{2,4})", re.I)
_SAID, _FAR = 200, 160  # letters of a sentence that are told, and in which a denial is looked for
_SUM = r"s(?:[- ]waves?)?(?: in |[- ]?)v1 ?(?:and|plus|\+) ?(?:the )?r(?:[- ]waves?)?(?: in |[- ]?)v[56]"  # Sokolow's
_SUBJECTS = {
    "sokolow_sum": _SUM, "other": r"atrial rate|paper speed|filter\w*|calibration|age\b|pauses?",
    "rr": r"r-?r(?: intervals?)?",
    "qtc": r"corrected qt(?: interval)?|qtc(?: interval)?", "qt": r"qt(?: interval)?(?: duration)?",
    "pr": r"(?:pr|pq|p-r)(?! segment| depress)(?: interval)?(?: duration)?", "p_axis": r"p[- ](?:wave )?axis",
    "t_axis": r"t[- ](?:wave )?axis", "axis": r"(?:qrs |electrical |frontal |plane |mean |heart |cardiac ){0,3}axis",
    "beat": r"r[- ]?peaks?|(?:qrs )?complexes\b|beats?(?!\s*(?:per|/|a min))",
    "qrs": r"qrs(?: complex)?(?: duration| width)?",
    "p": r"p[- ]waves? durations?|p durations?", "st": r"st(?:[- ]segments?)?|j[- ]point",
    "p_wave": r"p[- ]waves?", "q": r"q[- ]waves?", "r": r"r[- ]waves?", "s": r"s[- ]waves?", "t": r"t[- ]waves?",
    "rate": r"(?:heart |ventricular |pulse )?rate|hr|heart frequency", "rhythm": r"rhythm|ventricular response",
    "sokolow": r"sokolow(?:[- ]lyon)?", "cornell": r"cornell",
}  # fmt: skip
_SUBJECT = re.compile("|".join(rf"(?P<{kind}>\b(?:{p})\b)" for kind, p in _SUBJECTS.items()), re.I)
# A wave by its letter alone, which is a wave where a lead or a voltage follows.
_LETTER = re.compile(r"\b(?P<letter>[PQRST])(?= (?:in|of|amplitude|voltage)\b| ?(?:=|:)? ?-?\d+(?:\.\d+)? ?m[mV])")
_DEPRESSION, _ELEVATION = r"depress\w+|lowered", r"elevat\w+|raised"
_LONG, _SHORT, _NORMAL = r"prolong\w*|long\b|lengthened|increased", r"short(?:ened)?\b", r"normal(?:ly)?\b"
_ADJECTIVES: dict[str, dict[str, str]] = {
    "rate": {"slow": r"slow\b|bradycardic", "fast": r"fast\b|rapid\b|tachycardic", "normal": _NORMAL},
    "pr": {"long": _LONG, "short": _SHORT, "normal": _NORMAL},
    "qrs": {"wide": r"wide(?:ned)?\b|broad(?:ened)?\b|prolong\w*", "narrow": r"narrow\b|" + _NORMAL},
    "qtc": {"long": _LONG, "short": _SHORT, "normal": _NORMAL},
    "axis": {
        "left": r"left(?:ward)?\b", "right": r"right(?:ward)?\b", "far": r"extreme\b|north-?west", "normal": _NORMAL,
    },
    "rhythm": {"irregular": r"irregular(?:ly)?\b|var(?:ying|ies|iable)\b", "regular": r"regular(?:ly)?\b"},
    "st": {
        "elevation": _ELEVATION, "depression": _DEPRESSION, "level": rf"isoelectric|baseline|{_NORMAL}|unremarkable",
        "deviation": r"deviat\w+|changes?\b|abnormal\w*|shifts?\b",
    },
    "t": {"inverted": r"invert\w*|inversions?\b|negative", "upright": r"upright|positive"},
    "q": {"deep": r"patholog\w+|deep\b|significant\b|abnormal\b"},
}  # fmt: skip
_ADJECTIVES |= {"rr": _ADJECTIVES["rhythm"], "qt": _ADJECTIVES["qtc"]}
_OF_KIND = {
    kind: re.compile("|".join(rf"(?P<{word}>\b(?:{p}))" for word, p in words.items()), re.I)
    for kind, words in _ADJECTIVES.items()
}  # fmt: skip
_NOT_OF_IT = re.compile(r"\s*(?:\w+ )?(?:morpholog|voltage|progression|amplitude|configur|range)", re.I)
_BEATS = r"(?:beats?|complex(?:es)?|contractions?)"
_FINDINGS: tuple[tuple[str, str, str], ...] = (  # what is said, and the kind and word that it means
    (r"brad[yi]cardi\w+", "rate", "slow"), (r"tachycardi\w+", "rate", "fast"),
    (r"(?:first|1st|1)[- ]degree (?:av|a-v|atrio-?ventricular)(?:[- ]nodal)? block", "pr", "long"),
    (r"(?<!incomplete )(?:left|right) bundle[- ]branch block|(?<!incomplete )\b[lr]bbb", "qrs", "wide"),
    (r"left(?:ward)? axis(?: deviation)?|axis deviat\w+ to the left|\blad\b", "axis", "left"),
    (r"right(?:ward)? axis(?: deviation)?|axis deviat\w+ to the right", "axis", "right"),
    (r"extreme axis(?: deviation)?", "axis", "far"),
    (r"normal (?:qrs |electrical |frontal |cardiac )?axis", "axis", "normal"),
    (r"atrial fibrillation|\ba-?fib\b", "fibrillation", "present"), (r"irregularly irregular", "rhythm", "irregular"),
    (r"sinus rhythm|sinus (?=brady|tachy)", "sinus", "present"), (r"sinus arrhythmia", "sinus", "present"),
    (rf"premature ventricular(?: {_BEATS})?|(?<!supra)ventricular (?:premature|ectop|extrasyst)\w*(?: {_BEATS})?|"
     r"\bpvcs?\b|\bvpcs?\b|early beats? of another form", "ectopic", "present"),
    (rf"premature (?:supraventricular |atrial )?{_BEATS}|(?:supraventricular|atrial) premature \w+|extrasystol\w+|"
     r"ectop\w+|\bpacs?\b|early beats?(?: of the usual form)?", "early", "present"),
)  # fmt: skip
_FINDING = re.compile("|".join(f"(?P<f{i}>{p})" for i, (p, _, _) in enumerate(_FINDINGS)), re.I)

_GROUPS = {
    "inferior": ("II", "III", "aVF"), "high lateral": ("I", "aVL"), "inferolateral": ("II", "III", "aVF", "V5", "V6"),
    "anterolateral": ("I", "aVL", "V3", "V4", "V5", "V6"), "anteroseptal": CHEST[:4], "anterior": CHEST[:4],
    "septal": ("V1", "V2"), "lateral": ("I", "aVL", "V5", "V6"), "right precordial": CHEST[:3],
    "left precordial": CHEST[3:], "precordial": CHEST, "chest": CHEST, "limb": LIMBS,
}  # fmt: skip
_GROUP = re.compile(rf"\b({'|'.join(_GROUPS)})\b", re.I)
_ONE = r"(?:aV[RLF]|V[1-6]|III|II)"
# "I" is a lead behind "lead", in a list with others, or before its voltage; else it may be who writes.
_LEAD = (
    r"(?:\b(?:[aA][vV][rRlLfF]|[vV][1-6]|III|II)\b|(?<=\bleads )I\b|(?<=\blead )I\b|(?<=\bin )I\b|"
    rf"(?<=, )I\b(?=,| \()|\bI\b(?=,? (?:and|to|through) (?:{_ONE}|leads?)|, {_ONE}| ?[-/&] ?{_ONE}| \(-?\d)|"
    r"(?<=and )I\b(?=[,.;]|$| \())"
)
_LEAD_LIST = re.compile(rf"({_LEAD})(?:\s*(?:-|to|through)\s*({_LEAD}))?")
_BY_NAME = {lead.lower(): lead for lead in LEADS}
_OWN = re.compile(rf"({_LEAD})\s*(?:\(|:|=|of\b|with\b|is\b)?\s*(?=[-+]?\d)")  # a lead whose number follows it

_IN = re.compile(r"\s*(?:[\w-]+\s+){0,3}?(?:in|at)\b", re.I)

_NO = (
    r"\b(?:no(?! (?:longer|more|less|greater) )|not(?! (?:more|less|longer|greater|exceed|only))|without|nor|neither|"
    r"never|absence of|absent|lack of|free of|negative for|rules? out|ruled out)\b|n't\b"
)
_NOT_BEFORE = re.compile(_NO, re.I)
_SCOPE_ENDS = re.compile(
    r"\b(?:but|however|although|though|while|with(?!out)|shows?|there (?:is|are)|except|and(?! no\b)|is|are)\b|[,:(]",
    re.I,
)
_LISTED = re.compile(r"\b(?:or|nor)\b", re.I)
_NOT_BEHIND = re.compile(
    r"[\s\w]{0,12}?\b(?:is|are|was|were)\s+(?:not\b|absent|excluded|ruled out|never)|\s+absent\b", re.I
)
_NOT_THERE = re.compile(  # behind a number; "of 430 ms is not prolonged" denies none
    r"[\s\w]{0,12}?\b(?:is|are|was|were)\s+(?:(?:not|never) (?:seen|present|found|there|observed|measured|reached|"
    r"exceeded)|absent|excluded|ruled out)|\s+absent\b", re.I
)  # fmt: skip
_SENTENCE = re.compile(r"[.!?](?=\s|$)|[;\n]")
_PRE = r"(?:\b(?:{adjectives}|significant|mild|marked|slight|clear|{groups})[\s-]+)+$"
_PREMODIFIER = re.compile(
    _PRE.format(
        adjectives="|".join(p for words in _ADJECTIVES.values() for p in words.values()), groups="|".join(_GROUPS)
    ), re.I,
)  # fmt: skip
_JUDGED = re.compile("|".join(rf"\b(?:{p})" for words in _ADJECTIVES.values() for p in words.values()), re.I)
_SO = re.compile(r"\w\s+at\b", re.I)  # what is so "at" a number, and the number not it
_SEPARATED = re.compile(r"(?:^|[,;:(]|\b(?:and|with|an?|no|shows?)\b)\s*$", re.I)


@lru_cache(1 << 12)
def claims(text: str) -> tuple[Claim, ...]:
    """The measurable statements of a text, each once, in their order."""
    text = _QT_PAIR.sub(r"QT \1 ms, QTc \2 ms", digits(unicodedata.normalize("NFC", text)))
    return tuple(dict.fromkeys(claim for sentence in _SENTENCE.split(text) for claim in _in_sentence(sentence)))


@dataclass(frozen=True)
class _Region:
    """A subject of a sentence, and from where to where things belong to it."""

    kind: str
    start: int
    subject: int
    behind: int
    end: int


def _in_sentence(text: str) -> Iterator[Claim]:
    said = " ".join(text.split())[:_SAID]
    found, rest = numbers(text), text
    denied = frozenset(number for number in found if _denied(text, number))
    for match in _FINDING.finditer(text):
        _, kind, word = _FINDINGS[int(str(match.lastgroup)[1:])]
        yield _worded(kind, word, (), _negated(text, match.start(), match.end()), said)
        if kind not in ("early", "ectopic", "sinus"):  # of which beats and rhythm are said, too
            rest = rest[: match.start()] + " " * len(match[0]) + rest[match.end() :]
    regions = _regions(rest, found)
    head = rest[: regions[0].start] if regions else rest
    for region in regions:
        inside = [number for number in found if region.start <= number.start < region.end]
        yield from _of_region(rest, region, inside, denied, head, said)
    for number in found:  # without a subject; a region goes on to the next one
        if number.unit in _ALONE and not (regions and regions[0].start <= number.start):
            yield Claim(_ALONE[number.unit], (), number.low, number.high, "", number in denied, said)


def _regions(text: str, numbers: list[Number]) -> list[_Region]:
    found = [(str(m.lastgroup).removesuffix("_sum"), m.start(), m.end()) for m in _SUBJECT.finditer(text)]
    letters = [m for m in _LETTER.finditer(text) if not any(a <= m.start() < b for _, a, b in found)]
    found += [("p_wave" if m["letter"] == "P" else m["letter"].lower(), m.start(), m.end()) for m in letters]
    found.sort(key=lambda one: one[1])
    starts = []
    for place, (_, start, _) in enumerate(found):
        behind = found[place - 1][2] if place else 0
        modifier = _PREMODIFIER.search(text[behind:start])
        begin = behind + modifier.start() if modifier else start
        before = _right_before(numbers, text, behind, begin)
        if before and before.unit and (not place or _SEPARATED.search(text[behind : before.start])):
            begin = before.start
        starts.append(begin)
    ends = [*starts[1:], len(text)][: len(starts)]
    return [_Region(kind, a, s, b, e) for (kind, s, b), a, e in zip(found, starts, ends, strict=True)]


def _right_before(numbers: list[Number], text: str, begin: int, end: int) -> Number | None:
    """The number that ends right before a place, or has but "of" between."""
    near = (n for n in numbers if begin <= n.start and n.end <= end and text[n.end : end].strip(" -") in ("", "of"))
    return next(near, None)


def _of_region(
    text: str, region: _Region, numbers: list[Number], denied: frozenset[Number], head: str, said: str
) -> Iterator[Claim]:
    kind, subject = region.kind, text[region.subject : region.behind].lower()
    if kind in ("p", "p_wave"):
        if any(number.unit in _TO_MV for number in numbers):
            yield from _of_leads(text, region, "p_wave", numbers, denied, head, said)
        numbers, kind = [n for n in numbers if n.unit or kind == "p"], "p"  # "no P wave of one form"
    if kind == "beat" and subject.startswith("qrs") and not any(number.unit == "s" for number in numbers):
        kind = "qrs"
    if kind in PER_LEAD:
        yield from _of_leads(text, region, kind, numbers, denied, head, said)
        return
    if kind == "other":
        return
    for number in numbers:
        of, factor = _meant(kind, number, text[region.behind : number.start], text[number.end :])
        if of:
            yield Claim(of, (), number.low * factor, number.high * factor, "", number in denied, said)
        elif number.unit == "rate":
            yield Claim("rate", (), number.low, number.high, "", number in denied, said)
    for match in _words(kind, text, region):
        of = {"qt": "qtc", "rr": "rhythm"}.get(kind, kind)
        yield _worded(of, str(match.lastgroup), (), _negated(text, match.start(), match.end()), said)


def _worded(kind: str, word: str, leads: tuple[str, ...], negated: bool, said: str) -> Claim:
    """A judgement; of rhythm the kind is what is judged."""
    if kind == "rhythm":
        return Claim("regular", (), 1, 1, word, negated != (word == "irregular"), said)
    if word == "present":
        return Claim(kind, (), 1, 1, word, negated, said)
    return Claim(kind, leads, word=word, negated=negated, said=said)


def _words(kind: str, text: str, region: _Region) -> list[re.Match[str]]:
    pattern = _OF_KIND.get(kind)
    found = pattern.finditer(text, region.start, region.end) if pattern else ()
    return [match for match in found if kind == "st" or not _NOT_OF_IT.match(text, match.end())]


def _meant(kind: str, number: Number, gap: str, behind: str) -> tuple[str, float]:
    """The kind of claim that a number behind this subject makes, and what it is multiplied by; "" for none."""
    unit, size = number.unit, max(abs(end) for end in (number.low, number.high) if abs(end) < inf)
    if kind in _INTERVALS:
        if unit in ("ms", "s"):
            return kind, 1000 if unit == "s" else 1
        if not unit and _linked(gap, behind):
            return (kind, 1) if 20 <= size <= 2000 else (kind, 1000) if 0.02 <= size < 2.5 and size % 1 else ("", 1)
    if kind == "beat" and (unit == "s" or (not unit and "." in f"{size:g}" and re.search(r"\bat\b", gap))):
        return ("beat", 1) if re.search(r"\bat\b", gap) else ("", 1)
    if kind in _PLAUSIBLE:
        low, high = _PLAUSIBLE[kind]
        right = unit == ("rate" if kind == "rate" else "deg") or (not unit and _linked(gap, behind))
        if right and low <= size <= high:
            return kind, 1
    if kind in ("sokolow", "cornell") and unit in _TO_MV:
        return kind, _TO_MV[unit]
    return "", 1


_ALONE = {"rate": "rate", "deg": "axis"}  # units that say what a number is of
_TO_MV = {"mv": 1.0, "mm": 0.1, "uv": 0.001}


def _linked(gap: str, behind: str) -> bool:
    """Whether a number without a unit stands close enough to its subject to be its value."""
    return len(gap.split()) <= 4 and not re.search(r"[\d,;(]", gap) and not _NO_UNIT_BEHIND.match(behind)


def _of_leads(
    text: str, region: _Region, kind: str, numbers: list[Number], denied: frozenset[Number], head: str, said: str
) -> Iterator[Claim]:
    """Claims about waves and ST in leads: each judging word with the leads and the voltages behind it."""
    words = _words(kind, text, region)
    if kind == "q" and not words and not numbers and _negated(text, region.subject, region.behind):
        part = text[region.start : region.end]
        for leads in [(lead,) for lead in _leads(part) or _leads(head)] or [_group(part) or _group(head)]:
            yield _worded("q_deep", "deep", leads, True, said)
    numbers = [number for number in numbers if number.unit in _TO_MV]
    cuts = [region.start, *(m.start() for m in words[1:]), region.end]
    for place, match in enumerate(words[1:], 1):  # "2 mm depression": the number before a word is the word's
        before = _right_before(numbers, text, region.start, match.start())
        cuts[place] = before.start if before else cuts[place]
    last = _leads(text[cuts[-2] : region.end])
    for place, (begin, end) in enumerate(pairwise(cuts)):
        word = str(words[place].lastgroup) if words else ""
        part, inside = text[begin:end], [n for n in numbers if begin <= n.start < end]
        no = bool(words) and _negated(text, words[place].start(), words[place].end())
        if no:  # a number before the word is denied with it
            denied |= {number for number in inside if number.end <= words[place].start()}
        own: list[tuple[str, Number]] = []
        for match in _OWN.finditer(text, begin, end):
            own += [(_BY_NAME[match[1].lower()], n) for n in inside if n.start <= match.end() <= n.end]
        shared = [n for n in inside if n not in [number for _, number in own]]
        for place_of, number in enumerate(shared):
            behind = shared[place_of + 1].start if place_of + 1 < len(shared) else end
            if _IN.match(text, number.end):  # "2 mm in V2, 1 mm in V3"
                own += [(lead, number) for lead in _leads(text[number.end : behind])]
        shared = [n for n in shared if n not in [number for _, number in own]]
        told, group = _leads(part) or last or _leads(head), _group(part) or _group(head)
        every = [(lead,) for lead in told] or [group]
        places = [(lead,) for lead in told if lead not in [one for one, _ in own]] or ([] if own else [group])
        claimed = [((lead,), number) for lead, number in own] + [(leads, n) for n in shared for leads in places]
        for leads, number in claimed:
            there = number in denied or not no
            sign = -1 if word in ("depression", "inverted") and there else 1
            ends = [_signed(value * _TO_MV[number.unit], sign, kind) for value in (number.low, number.high)]
            yield Claim(kind, leads, min(ends), max(ends), "", number in denied, said)
        worded = every if no and not denied.intersection(inside) else places if not shared else []
        for leads in worded if words else ():
            yield _worded("q_deep" if kind == "q" else kind, word, leads, no, said)


def _signed(value: float, sign: int, kind: str) -> float:
    """A voltage as it is measured: of Q and S their size; below zero where the word says so."""
    return abs(value) if kind in ("q", "s") else sign * abs(value) if sign < 0 else value


def _leads(text: str) -> list[str]:
    """The leads that a text names, each once; from V1 to V4 are four."""
    found: list[str] = []
    for match in _LEAD_LIST.finditer(text):
        first, last = (_BY_NAME.get((one or match[1]).lower(), "") for one in (match[1], match[2]))
        row = CHEST if first in CHEST and last in CHEST else LIMBS if first in LIMBS and last in LIMBS else ()
        both = row[row.index(first) : row.index(last) + 1] if row and first != last else (first,)
        found += both or (first, last)
    return list(dict.fromkeys(found))


def _group(text: str) -> tuple[str, ...]:
    match = _GROUP.search(text)
    return _GROUPS[match[1].lower()] if match else ()


def _negated(text: str, start: int, end: int) -> bool:
    """Whether what stands from start to end is denied: before it, or behind it."""
    return _behind_denial(text, start) is not None or bool(_NOT_BEHIND.match(text, end))


def _denied(text: str, number: Number) -> bool:
    """Whether a number is denied, and not what is so at it: "not prolonged at 380 ms" says that it is 380 ms. A bound
    is denied with the word: "not prolonged above 440 ms"."""
    between = _behind_denial(text, number.start)
    if between is None:
        return bool(_NOT_THERE.match(text, number.end))
    bound = inf in (-number.low, number.high)
    return not _SO.search(between) and (bound or not (_JUDGED.search(between) or _FINDING.search(between)))


def _behind_denial(text: str, start: int) -> str | None:
    """What stands between a denial and the place that it reaches; None where there is none."""
    before = text[max(0, start - _FAR) : start]
    found = list(_NOT_BEFORE.finditer(before))
    if not found:
        return None
    between = before[found[-1].end() :]
    ended = _SCOPE_ENDS.search(between)
    listed = ended is not None and ended[0] == "," and bool(_LISTED.search(text, start - len(between) + ended.start()))
    goes_on = listed and not re.search(r"\b(?:but|however|although|is|are|and)\b", between, re.I)
    return between if ended is None or goes_on else None
