"""Tables that a user's own file may add rows to: encoders, views, objectives, datasets, metrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from elm_jax.errors import UserError, nearest

Row = TypeVar("Row")


def qualified_name(function: Callable[..., Any]) -> str:
    """The name of a function, or of the class of what is called as one."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


class Registry(dict[str, Row]):
    """Rows by name. `where`: what an error names, a config key or a flag."""

    def __init__(self, where: str, rows: Mapping[str, Row]) -> None:
        super().__init__(rows)
        self.where, self._packaged = where, frozenset(rows)

    def packaged(self) -> dict[str, Row]:
        """The package's own rows."""
        return {name: self[name] for name in self if name in self._packaged}

    def register(self, name: str, row: Row) -> None:
        """Add a row. A name may be registered again (a file is run again), but not taken from the package.

        Raises:
            UserError: it is no name that a flag can have, or the package's own.
        """
        if not re.fullmatch(r"[A-Za-z_][\w.-]*", name):
            raise UserError(f"{self.where} {name!r}", "no name", "letters, digits, _, - and .", "rename it")
        if name in self._packaged:
            raise UserError(f"{self.where} {name!r}", "a name of the package", "a name of its own", "rename it")
        self[name] = row

    def find(self, name: str, fix: str = "") -> Row:
        """The row of a name; `fix` is what an error advises, by default a name that is nearly the same.

        Raises:
            UserError: there is none.
        """
        if name not in self:
            found = fix or nearest(str(name), self) or "choose one of them"
            advice = f"{found}; where a file of yours registers it, add --register FILE"
            raise UserError(self.where, repr(name), f"one of {', '.join(self)}", advice)
        return self[name]
