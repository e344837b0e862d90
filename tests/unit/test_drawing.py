"""An ECG in Braille characters: every lead, at one scale, with its peaks."""

import numpy as np
import pytest

from elm_jax.ecg.recording import LEADS
from elm_jax.pictures.braille import LABEL, LINES, in_characters


def dots(line: str) -> int:
    return sum((ord(c) - 0x2800).bit_count() for c in line[LABEL:].replace(" ", "\u2800"))


@pytest.mark.parametrize("width", [45, 80, 200])
def test_a_narrow_peak_is_drawn_at_any_width(width: int) -> None:
    signal = np.zeros((12, 2500))
    signal[3, 1250] = 2.0
    signal[4, 1250] = -1.0
    lines = in_characters(signal, LEADS, 250, width)
    assert len(lines) == 12 * LINES + 1 and max(map(len, lines)) <= width
    assert lines[-1].strip() == "10 s; each lead's room is 4 mV"
    leads = [lines[LINES * i : LINES * (i + 1)] for i in range(12)]
    assert [lead[1].split()[0] for lead in leads] == list(LEADS)
    ink = [sum(map(dots, lead)) for lead in leads]
    assert ink[3] > ink[4] > ink[0] and len(set(ink[:3] + ink[5:])) == 1
    top = leads[3][0]
    assert 0.4 * width < len(top) < 0.65 * width and dots(top) >= 4, "the peak is not in the middle"


def test_few_samples_and_a_flat_line_are_drawn() -> None:
    lines = in_characters(np.zeros((12, 7)), LEADS, 50, 80)
    assert {dots(line) for line in lines[1:-1:LINES]} == {7}
