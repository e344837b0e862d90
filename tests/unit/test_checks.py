"""What is wrong with a signal is found by stated rules, and a good one has no findings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_jax.ecg.checks import check_signal
from elm_jax.ecg.recording import LEADS, read_ecg
from elm_jax.ecg.synthetic import synthesize

RATE = 250.0
HEARTS = [synthesize((7, number), RATE, 2500) for number in range(12)]
ARMS, LEGS = [0, 2, 1, 4, 3, 5], [2, 1, 0, 5, 4, 3]  # the right arm's electrode with the left one's, with the leg's
NONE: list[tuple[str, tuple[str, ...]]] = []


def found(signal: np.ndarray) -> list[tuple[str, tuple[str, ...]]]:
    return [(finding.kind, finding.leads) for finding in check_signal(signal, RATE)]


def changed(change: Callable[[np.ndarray], object], signal: np.ndarray = HEARTS[0]) -> np.ndarray:
    signal = np.array(signal, np.float64)
    change(signal)
    return signal


def rewired(signal: np.ndarray, order: list[int], negated: list[int]) -> np.ndarray:
    limbs = signal[order].astype(float)
    limbs[negated] *= -1
    return np.concatenate([limbs, signal[6:]])


@pytest.mark.parametrize("number", range(len(HEARTS)))
def test_a_good_recording_has_no_findings(number: int) -> None:
    assert found(HEARTS[number]) == NONE


def test_values_that_are_no_numbers_are_told_alone() -> None:
    def spoil(signal: np.ndarray) -> None:
        signal[3, 5:9], signal[8, 1] = np.nan, np.inf

    assert found(changed(spoil)) == [("not_finite", ("aVR",)), ("not_finite", ("V3",))]


def test_flat_leads_and_parts_are_told() -> None:
    assert found(changed(lambda s: s.__setitem__(9, 0.25))) == [("flat", ("V4",))]
    part = check_signal(changed(lambda s: s.__setitem__((9, slice(100, 500)), 0.25)), RATE)
    assert [(one.kind, one.text) for one in part] == [("flat", "V4: flat for 1.6 s")]
    assert found(changed(lambda s: s.__setitem__((9, slice(100, 300)), 0.25))) == NONE


def test_a_clipped_lead_is_told_and_a_large_one_is_not() -> None:
    top = np.percentile(HEARTS[0][10], 97)
    assert found(changed(lambda s: np.minimum(s[10], top, out=s[10]))) == [("clipped", ("V5",))]
    assert found(changed(lambda s: np.maximum(s[10], np.percentile(s[10], 3), out=s[10]))) == [("clipped", ("V5",))]


@pytest.mark.parametrize("factor", [1000, 1e-3])
def test_a_wrong_unit_is_told(factor: float) -> None:
    assert found(HEARTS[0] * factor) == [("scale", LEADS)]
    assert ("scale", ("V2",)) in found(changed(lambda s: s.__setitem__(7, s[7] * factor)))


@pytest.mark.parametrize("pair", [(1, 2), (3, 4), (4, 5), (0, 1)])
def test_two_leads_in_each_others_place_are_named(pair: tuple[int, int]) -> None:
    order = list(range(12))
    order[pair[0]], order[pair[1]] = pair[1], pair[0]
    leads = tuple(LEADS[place] for place in pair)
    named = [finding for heart in HEARTS for finding in found(heart[order])]
    assert {kind for kind, _ in named} == {"limb_sums"} and {told for _, told in named} <= {leads, LEADS[:6]}
    assert sum(told == leads for _, told in named) >= 0.7 * len(HEARTS), "in the others the two are much alike"


@pytest.mark.parametrize("row", range(6))
def test_a_negated_limb_lead_is_named(row: int) -> None:
    text = check_signal(changed(lambda s: np.negative(s[row], out=s[row])), RATE)[0].text
    assert text == f"the limb leads contradict each other: {LEADS[row]} negated?"


def test_electrodes_in_each_others_place_are_told_where_the_sums_hold() -> None:
    legs = [[f.text for f in check_signal(rewired(heart, LEGS, [0, 1, 2]), RATE)] for heart in HEARTS]
    assert sum("right arm and left leg" in "".join(texts) for texts in legs) >= 4 and all(len(t) <= 1 for t in legs)
    heart = rewired(HEARTS[0], ARMS, [0])
    assert found(heart) == NONE, "these hearts have no P in lead I that could point down"
    beats = np.flatnonzero((HEARTS[0][1, 1:-1] > HEARTS[0][1].max() * 0.7) & (np.diff(HEARTS[0][1], 2) < -0.02)) + 1
    wave = sum(np.exp(-(((np.arange(2500) - beat) / RATE + 0.16) ** 2) / 0.0006) for beat in beats)
    heart[[0, 3, 4]] += np.array([[-0.2], [0.1], [-0.1]]) * wave
    heart[[2, 5]] += np.array([[0.2], [0.1]]) * wave
    assert found(heart)[0][0] == "reversal" and "of the arms" in check_signal(heart, RATE)[0].text

    def on_the_leg(signal: np.ndarray) -> None:  # the right arm's electrode: at nearly the left leg's potential
        one, two = signal[0] - 0.99 * signal[1], 0.01 * signal[1]
        signal[:6] = one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2

    assert found(changed(on_the_leg)) == [("scale", ("II",)), ("reversal", ("II",))]


def test_too_little_of_a_signal_is_no_error() -> None:
    assert found(np.zeros((12, 1))) == [("flat", (lead,)) for lead in LEADS]
    assert found(HEARTS[0][:, :100]) == NONE


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1000), st.integers(1, 2500), st.integers(0, 11))
def test_whatever_the_rate_and_the_length_is_no_error(rate: int, length: int, number: int) -> None:
    for finding in check_signal(HEARTS[number][:, :length], rate):
        assert finding.text


@pytest.mark.slow
def test_real_recordings_are_mostly_without_findings_and_real_reversals_are_found(shared: Path) -> None:
    """Slow: a hundred recordings are read."""
    headers = sorted((shared / "real/ecg/ptbxl/records500").glob("*/*.hea"))[:100]
    signals = [read_ecg(header.with_suffix("")).signal for header in headers]
    assert not any(check_signal(signal, 500) for signal in signals)
    arms = [check_signal(rewired(signal, ARMS, [0]), 500) for signal in signals]
    assert sum(bool(findings) for findings in arms) >= 50
