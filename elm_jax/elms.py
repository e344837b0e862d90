"""How an ECG enters a language model: each `elm` is a set of views of the same recording."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

from elm_jax.ecg.beats.words import written
from elm_jax.errors import UserError
from elm_jax.registry import Registry


@dataclass(frozen=True)
class View:
    """One way in which an ECG enters a model.

    meaning: what the model is then, as its card says it.
    shows: the representation (`data.representation`) that it has; None: one that its encoder reads.
    encoder: whether an encoder reads that; connector: the kind of what stands between it and the LLM
    (`models.connectors`), None where it has no embeddings.
    writes: "slots", places among the tokens for its embeddings; "tokens", tokens of its own; "text", what `text` says
    of the leads (C, L) in mV, at a rate in Hz, by their names (a function of two arguments is not told them); it stands
    behind the ECG in the words of the user.
    tokens: the places of an ECG; None: `encoder.tokens` says it.
    through: another view, through whose connector, too, its embeddings go: its own leads to the width that this reads.
    """

    meaning: str
    shows: str | None = "signal"
    encoder: bool = False
    connector: str | None = None
    writes: Literal["slots", "tokens", "text"] = "slots"
    tokens: int | None = None
    text: Callable[..., str] | None = None
    through: str | None = None


ALIASES = {"llava": "linear_llava", "fuyu": "base_elf"}  # names of the reference's
ELMS: Registry[Mapping[str, View]] = Registry("elm", {
    "linear_llava": {
        "ecg": View("An ECG encoder, a linear connector and a language model", None, encoder=True, connector="linear")
    },
    "mlp_llava": {
        "ecg": View("An ECG encoder, an MLP connector and a language model", None, encoder=True, connector="mlp")
    },
    "mlp_llava_measured": {
        "ecg": View(
            "An ECG encoder, an MLP connector and a language model that reads the ECG's measurements too",
            None, encoder=True, connector="mlp",
        ),
        "measurements": View("What was measured in the ECG, in words", writes="text", text=written),
    },
    "gem": {
        "ecg": View(
            "An encoder of the ECG and one of its image behind a common connector, and a language model", "signal",
            encoder=True, connector="linear", through="image",
        ),
        "image": View("An image encoder and an MLP connector", "rgb", encoder=True, connector="mlp"),
    },
    "ecg_r1": {
        "ecg": View(
            "An encoder of the ECG and one of its image, each with an MLP connector, and a language model", "signal",
            encoder=True, connector="mlp",
        ),
        "image": View("An image encoder and an MLP connector", "rgb", encoder=True, connector="mlp"),
    },
    "base_elf": {
        "ecg": View("A linear connector on the whole signal and a language model", connector="patch", tokens=1)
    },
    "patch_elf": {
        "ecg": View("A linear connector on patches of the signal and a language model", connector="patch")
    },
    "conv_elf": {
        "ecg": View("A convolutional connector on patches of the signal and a language model", connector="conv")
    },
    "ecg_byte": {
        "ecg": View(
            "A language model that reads the ECG as symbols in the text", "symbolic", writes="tokens", tokens=1
        )
    },
})  # fmt: skip


# What any of them has beside its own where `retrieval.index` is given; `retrieval.lookup` writes it.
RETRIEVED = {"retrieved": View("What is known of the recordings most like the ECG, in words", writes="text")}


def register_view(elm: str, views: Mapping[str, View]) -> None:
    """Let `config.elm` be one more: the views of an ECG by name, first those with slots, or one with tokens.

    Raises:
        UserError: the name is no identifier, or one of the package's; or no model can have these views.
    """
    writes = [view.writes for view in views.values()]
    numbers = writes.count("slots"), writes.count("tokens")
    if writes[:1] in ([], ["text"]) or numbers not in ((numbers[0], 0), (0, 1)):
        found = f"views that write {', '.join(writes) or 'nothing'}"
        raise UserError(f"elm {elm!r}", found, "slots, or tokens once, and text behind these", "change the views")
    if elm in ALIASES:
        raise UserError(f"elm {elm!r}", f"another name of {ALIASES[elm]}", "a name of its own", "rename it")
    for name, view in views.items():
        if not name.isidentifier() or name == "lora" or (view.writes == "text") != (view.text is not None):
            expected = "an identifier other than lora, and a function `text` where it writes text"
            raise UserError(f"elm {elm!r}, view {name!r}", str(view.writes), expected, "correct the view")
        behind = views.get(view.through or "")
        if view.through is not None and (behind is None or behind.through is not None or not behind.encoder):
            expected = "a view with an encoder, whose embeddings go through no other"
            raise UserError(f"elm {elm!r}, view {name!r}", f"through {view.through}", expected, "correct the view")
    ELMS.register(elm, views)


def said(text: Callable[..., str], *of: Any) -> str:
    """What it says of leads, their rate and names; a function of two arguments is not told the names."""
    return text(*of[: 2 if len(signature(text).parameters) == 2 else len(of)])


class Viewed:
    """What follows from a configuration's `elm`."""

    elm: str

    @property
    def views(self) -> Mapping[str, View]:
        """The ways in which an ECG enters the model, by name."""
        return ELMS[self.elm]

    @property
    def view(self) -> View:
        """The first of them."""
        return next(iter(self.views.values()))

    @property
    def slots(self) -> dict[str, View]:
        """Those of them that have embeddings."""
        return {name: view for name, view in self.views.items() if view.writes == "slots"}

    @property
    def encoded(self) -> list[str]:
        """Those of them that have an encoder."""
        return [name for name, view in self.views.items() if view.encoder]

    def part(self, component: str, view: str) -> str:
        """What the names of a view's arrays begin with: `encoder`, or where there are several `encoder.<view>`."""
        return f"{component}.{view}" if len(self.slots) > 1 else component
