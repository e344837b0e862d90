"""Which views of an ECG a conversation has, and in which order they stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from elm_jax.data.batch import Shown
from elm_jax.text.render import Rendered


@dataclass(frozen=True)
class Views:
    """What is said of the views of an ECG as such.

    places: of each view with embeddings, its tokens, in the order of the embeddings. left_out: views that no ECG has;
    missing: what stands in for one that a record lacks, "error", "draw" or "mask". drop: in training the probability
    that one of the views of an ECG, each as likely, is left out; swap: that they are in reverse order.
    """

    places: Mapping[str, int]
    left_out: tuple[str, ...] = ()
    missing: str = "error"
    drop: float = 0.0
    swap: float = 0.0

    @property
    def vary(self) -> bool:
        """Whether they differ from epoch to epoch."""
        return bool(self.drop or self.swap)

    @property
    def shorten(self) -> bool:
        """Whether an ECG may have fewer tokens than `places`."""
        return bool(self.drop or self.left_out or self.missing == "mask")

    def chosen(self, shown: Shown, drawn: np.random.Generator | None) -> Shown:
        """Those of the views of an ECG that are shown; in training, by `drawn`, fewer, or in another order."""
        shown = {view: signal for view, signal in shown.items() if view not in self.left_out}
        if drawn is not None and len(shown) > 1:
            drop, swap, which = drawn.random() < self.drop, drawn.random() < self.swap, int(drawn.integers(len(shown)))
            shown = {view: signal for n, (view, signal) in enumerate(shown.items()) if not (drop and n == which)}
            shown = dict(reversed(shown.items())) if swap else shown
        return shown

    def fitted(self, rendered: Rendered, ecgs: Sequence[Shown]) -> Rendered:
        """A conversation with the places alone that its ECGs have; itself where they have all of them, in order.

        Of an ECG, number j of `signal_positions` is then the place of its embedding number j, and -1 where it has none.
        """
        if not self.places or all(list(shown) == list(self.places) for shown in ecgs):
            return rendered
        ends = np.cumsum(list(self.places.values()))
        sizes = zip(self.places.items(), ends, strict=True)
        numbers = {view: np.arange(end - width, end) for (view, width), end in sizes}
        keep, positions = np.ones(len(rendered.ids), bool), np.full_like(rendered.signal_positions, -1)
        for row, places, shown in zip(positions, rendered.signal_positions, ecgs, strict=True):
            chosen, there = np.concatenate([numbers[view] for view in shown]), np.sort(places[places >= 0])
            row[chosen] = there[: len(chosen)]
            keep[there[len(chosen) :]] = False
        moved = np.cumsum(keep) - 1
        return replace(
            rendered, ids=rendered.ids[keep], supervised=rendered.supervised[keep],
            signal_positions=np.where(positions < 0, -1, moved[positions]).astype(np.int32),
            system_end=int(keep[: rendered.system_end].sum()), signal_end=int(keep[: rendered.signal_end].sum()),
        )  # fmt: skip
