"""XML of recordings: HL7 aECG, GE MUSE, Philips; the first element tells which.

A document is parsed by expat into a bare tree. Definitions of entities are refused and nothing outside is read: an
outer DTD, which MUSE names, is passed over.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn
from xml.parsers import expat

from elm_jax.ecg.stored import AGAIN, read_file
from elm_jax.errors import UserError

WHAT = "XML of HL7 aECG, MUSE (RestingECG) or Philips (restingecgdata)"
_ENCODINGS = ("utf-8", "utf-16", "iso-8859-1", "us-ascii")  # for others Python would import what a file names
MOST, _DEEPEST, _MOST_ELEMENTS = 128 << 20, 100, 1_000_000


@dataclass
class Element:
    """name: without its namespace; text: directly within it."""

    name: str
    attributes: dict[str, str] = field(default_factory=dict)
    children: list["Element"] = field(default_factory=list)
    text: str = ""

    def all(self, *names: str) -> Iterator["Element"]:
        """The elements that lead there by these names, each a child of the one before."""
        if not names:
            yield self
            return
        for child in self.children:
            if child.name == names[0]:
                yield from child.all(*names[1:])

    def first(self, *names: str) -> "Element":
        """The first of them, or an empty element."""
        return next(self.all(*names), Element(""))

    def within(self, name: str) -> Iterator["Element"]:
        """The elements of a name, however deep."""
        for child in self.children:
            if child.name == name:
                yield child
            yield from child.within(name)


def parse(path: Path) -> Element:
    """The first element of a document. Raises UserError: not well-formed, or it defines entities."""
    parser, tree, pieces = expat.ParserCreate(), [Element("")], [[]]
    count = 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal count
        count += 1
        if len(tree) > _DEEPEST or count > _MOST_ELEMENTS:
            raise UserError(path, "elements nested too deeply, or too many", f"at most {_MOST_ELEMENTS}", AGAIN)
        plain = {key.rpartition(":")[2]: value for key, value in attributes.items()}
        element = Element(name.rpartition(":")[2], plain)
        tree[-1].children.append(element)
        tree.append(element)
        pieces.append([])

    def end(_: str) -> None:
        tree.pop().text = "".join(pieces.pop())

    def declaration(_: str, encoding: str | None, standalone: int) -> None:
        if encoding is not None and encoding.casefold() not in _ENCODINGS:
            raise UserError(path, f"the encoding {encoding[:80]}", "UTF-8, UTF-16 or ISO-8859-1", AGAIN)

    def doctype(_: str, system: str | None, public: str | None, inner: int) -> None:
        if inner:
            refuse()

    def refuse(*_: object) -> NoReturn:
        raise UserError(path, "definitions of its own (entities, a DTD)", "XML without them", AGAIN)

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = lambda text: pieces[-1].append(text)
    parser.XmlDeclHandler, parser.StartDoctypeDeclHandler = declaration, doctype
    parser.EntityDeclHandler = parser.ExternalEntityRefHandler = parser.SkippedEntityHandler = refuse
    parser.buffer_text = True
    try:
        parser.Parse(read_file(path, WHAT, MOST), True)
    except (expat.ExpatError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(path, f"what is no XML ({error})", WHAT, AGAIN) from None
    return tree[0].children[0]


def number(path: Path, what: str, text: str) -> float:
    """A finite decimal number. Raises UserError."""
    if re.fullmatch(r"\s*[+-]?(\d{1,20}(\.\d{0,20})?|\.\d{1,20})([eE][+-]?\d{1,2})?\s*", text):
        return float(text)
    raise UserError(path, f"{what} {text.strip()[:40]!r}", "a number", AGAIN)
