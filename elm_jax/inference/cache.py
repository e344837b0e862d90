"""What layers keep of the tokens before, for those that follow.

B rows, S places of a row, K key/value heads, d head size, L layers of a kind.
"""

from typing import Any, NamedTuple

import jax

from elm_jax.models.delta import Recurrent

TOKENS = -2, -1  # the axis of S, of keys and of values


class Tokens(NamedTuple):
    """Keys (L, B, K, S, d) and values (L, B, K, d, S); of one layer without L.

    That is how the products of attention want them: otherwise all of a layer's would be copied for every token drawn.
    """

    keys: jax.Array
    values: jax.Array


class Cache(NamedTuple):
    """What each layer keeps, by the part of it that does: a table of parts, as `scan_layers` takes it.

    delta: None where no layer has a recurrence; with a leading axis of L.
    """

    attention: Tokens
    delta: Recurrent | None = None

    @property
    def places(self) -> int:
        """S"""
        return self.attention.keys.shape[-2]

    @property
    def parts(self) -> dict[str, Any]:
        return {name: part for name, part in self._asdict().items() if part is not None}
