"""What becomes of the reports of a dataset before they are written: translated, cleaned, with a machine's measures."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from elm_jax.data.prepare.raw import RawRecording
from elm_jax.data.prepare.translation import Translated
from elm_jax.errors import UserError
from elm_jax.text.reports import clean_report

AS_IS = "as-is"
Translate = Callable[[Iterable[str]], Mapping[str, Translated]]


@dataclass(frozen=True)
class Reports:
    """language: how the settings of a folder name that of its reports. translate: what makes it; None: they have it.
    cleaning: of CLEANINGS, or "none"; published: with the faults of its source. wave: with the machine's measures.
    """

    language: str = AS_IS
    translate: Translate | None = None
    cleaning: str = "none"
    published: bool = False
    wave: bool = False

    @property
    def name(self) -> str:
        """As the settings of a folder have it: two that differ write other reports."""
        cleaning = "" if self.cleaning == "none" else f"cleaned as {self.cleaning}{'_published' * self.published}"
        return ", ".join(filter(None, (self.language, cleaning, "wave text" * self.wave)))

    def __call__(self, found: list[RawRecording]) -> tuple[list[RawRecording], dict[str, dict[str, str]]]:
        """The recordings with the reports that they are to have; and by kind those whose report is left out, or was cut
        off where it was translated, with what it was.

        Raises:
            UserError: measures are asked for, and there are none; or as `translate` does.
        """
        if self == UNCHANGED:
            return found, {}
        if self.wave and not any(one.wave for one in found):
            expected = "a machine's measurements, as MIMIC-IV-ECG has them in the columns rr_interval, p_onset, …"
            raise UserError("--wave-text", "a dataset without them", expected, "leave the flag out")
        made = self.translate({one.words for one in found if one.words.strip()}) if self.translate else {}
        written = []
        told: dict[str, dict[str, str]] = {"reports_left_out": {}, "translations_cut_off": {}}
        for one in found:
            said = one.report if isinstance(one.report, tuple) else (one.report,)
            if one.words in made:
                said = (made[one.words].text,)
                if not made[one.words].whole:
                    told["translations_cut_off"][one.where] = one.words
            text = " ".join(said)
            if self.cleaning != "none":
                text = clean_report(said, self.cleaning, self.published)
            if one.words.strip() and not text:
                told["reports_left_out"][one.where] = one.words
            written.append(replace(one, report=text + one.wave * (self.wave and bool(text)), wave=""))
        return written, told


UNCHANGED = Reports()
