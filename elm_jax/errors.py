"""The one error for what the user got wrong; `assert` is for what we got wrong."""

import contextlib
import difflib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

LONGEST = 2000  # characters of each part of an error: a file may hold any text


class UserError(ValueError):
    """The user's input is wrong: one line that says where, what was found, what was expected and what to do.

    `where` is a file or a config key (`data.leads`), `fix` an instruction ("set data.root to the folder").
    Commands print it as `error: ...` and exit with status 2; it is never a fault of the program.
    """

    status = 2

    def __init__(self, where: str | Path, found: str, expected: str, fix: str) -> None:
        parts = (one_line(str(s)) for s in (where, found, expected, fix))
        self.where, self.found, self.expected, self.fix = (s if len(s) <= LONGEST else f"{s[:LONGEST]}…" for s in parts)
        super().__init__(f"{self.where}: found {self.found}; expected {self.expected}; {self.fix}")

    @property
    def parts(self) -> tuple[str, str, str, str]:
        """What it is made of anew."""
        return self.where, self.found, self.expected, self.fix

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str, str, str]]:
        # Exceptions are pickled by their message; loader workers need the four parts to cross processes.
        return type(self), self.parts


@contextlib.contextmanager
def refused(
    where: str | Path, found: str, expected: str, fix: str, *errors: type[BaseException]
) -> Iterator[None]:
    """What of `errors` (by default OSError and ValueError) is raised within, as one UserError.

    Behind what was `found` stands what the error says, in brackets; where `found` is "", that alone.
    """
    refusable = errors or (OSError, ValueError)
    try:
        yield
    except UserError:
        raise
    except refusable as error:
        said = str(error.__cause__ or error)
        raise UserError(where, f"{found} ({said})" if found else said, expected, fix) from error


class Absent(UserError):
    """What was waited for did not come, and may come the next time: status 75 (sysexits.h: try again)."""

    status = 75


def nearest(name: str, choices: Iterable[str]) -> str:
    """`did you mean 'x'?` for the choice closest to `name`, or "" when none is close."""
    best = closest(name, choices)
    return f"did you mean '{best}'?" if best else ""


def closest(name: str, choices: Iterable[str], cutoff: float = 0.6) -> str:
    """The choice closest to `name`, upper or lower case, or "" when none is close."""
    folded: dict[str, str] = {}
    for choice in choices:
        folded.setdefault(choice.casefold(), choice)
    found = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=cutoff)
    return folded[found[0]] if found else ""


def some(names: Iterable[str], most: int = 4) -> str:
    """The first `most` of `names`, joined by commas, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def one_line(text: str) -> str:
    """`text`, printable, with every run of whitespace, line breaks included, as one space."""
    return printable(" ".join(text.split()))


def printable(text: str, but: str = "") -> str:
    """`text` with what no terminal, page or picture may get as it is written in escapes: `\\x1b`.

    These are controls, line separators, marks that turn the direction of writing, halves of surrogate pairs and what
    is no character; not those of `but`, and not the joiners that some scripts and emoji need.
    """

    def shown(match: re.Match[str]) -> str:
        c = match[0]
        holds = c.isprintable() or c in but or c in _JOINERS or unicodedata.category(c) in ("Zs", "Co")
        return c if holds else repr(c)[1:-1]

    return _NOT_ASCII.sub(shown, text)


_NOT_ASCII = re.compile("[^ -~]")  # a character that is not certainly printable
_JOINERS = "\u200c\u200d"
