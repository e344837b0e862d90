"""DICOM waveforms (PS3.3 A.34, C.10.9) by pydicom: the multiplex group that holds the rhythm."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.ecg.formats.extras import needed
from elm_jax.ecg.names import NUMBERED, lead_of
from elm_jax.ecg.npy import MAX_BYTES
from elm_jax.ecg.stored import AGAIN, Channel, Stored
from elm_jax.errors import UserError, refused, some
from elm_jax.folders import check_regular

WHAT = "a DICOM file with an ECG's waveforms"
_DEFLATED, _BIG = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"  # transfer syntaxes
_NUMBERS = {("SB", 8): "i1", ("UB", 8): "u1", ("SS", 16): "i2", ("US", 16): "u2", ("SL", 32): "i4", ("UL", 32): "u4"}


def read_dicom(path: Path) -> Stored:
    """The rhythm of a file, each lead by its code. Raises UserError."""
    check_regular(path, WHAT)
    pydicom = needed(path, "pydicom", "DICOM")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(path, f"{path.stat().st_size} bytes", f"at most {MAX_BYTES}", AGAIN)
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # it would warn in words of the file
    with refused(path, "an unreadable DICOM file", WHAT, AGAIN, Exception):
        syntax = str(pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID", ""))
        if syntax == _DEFLATED:
            raise UserError(path, "a deflated file", "one that is not packed", "export it uncompressed")
        data = pydicom.dcmread(path, stop_before_pixels=True)
        groups = [_group(path, group, ">" if syntax == _BIG else "<") for group in data.get("WaveformSequence") or ()]
    rhythms = [one for one in groups if {"I", "II"} <= {lead[0] for c in one[1] if (lead := lead_of(c.name))}]
    if len(rhythms) > 1:  # beats are no rhythm
        rhythms = [one for one in rhythms if not re.search("median|average|beat", one[0])]
    if len(rhythms) != 1:
        told = some(name or "a group without a label" for name, _ in groups) or "no waveforms"
        raise UserError(path, told, "one group of waveforms with leads I and II, of a rhythm", "export it so")
    return Stored(path, rhythms[0][1])


def _group(path: Path, group: Any, order: str) -> tuple[str, list[Channel]]:
    """Label of a multiplex group, and its channels."""
    count, samples = int(group.NumberOfWaveformChannels), int(group.NumberOfWaveformSamples)
    bits, kind = int(group.WaveformBitsAllocated), str(group.WaveformSampleInterpretation)
    rate, data = float(group.SamplingFrequency), bytes(group.WaveformData)
    number = _NUMBERS.get((kind, bits))
    if number is None:
        raise UserError(path, f"samples of {bits} bits, {kind}", "whole numbers of 8, 16 or 32 bits", "export it so")
    needs = count * samples * bits // 8
    definitions = group.ChannelDefinitionSequence
    if count < 1 or samples < 1 or needs > len(data) or len(definitions) != count:
        found = f"{len(data)} bytes and {len(definitions)} definitions for {count} channels of {samples} samples"
        raise UserError(path, found, f"{needs} bytes, and one definition for each channel", AGAIN)
    values = np.frombuffer(data, order + number, count * samples).reshape(samples, count)
    channels = [_channel(path, about, values[:, i], rate) for i, about in enumerate(definitions)]
    return str(group.get("MultiplexGroupLabel", "")).casefold(), channels


def _channel(path: Path, about: Any, values: np.ndarray, rate: float) -> Channel:
    source = about.ChannelSourceSequence[0]
    code, scheme, name = (str(source.get(key, "")) for key in ("CodeValue", "CodingSchemeDesignator", "CodeMeaning"))
    match = re.search(r"(\d{1,3})$", code)
    if match and scheme in ("MDC", "SCPECG"):  # 2:1; 5.6.3-9-1
        name = NUMBERED.get(int(match[1]), name or code)
    if float(about.get("ChannelSampleSkew") or 0):
        raise UserError(path, f"a skew of {about.ChannelSampleSkew} samples in {name}", "none", "export it so")
    units = about.get("ChannelSensitivityUnitsSequence")
    gain, factor = (about.get(f"ChannelSensitivity{key}") for key in ("", "CorrectionFactor"))
    if gain in (None, ""):  # without a sensitivity the numbers have no unit
        return Channel(name, values, rate, None)
    unit, gain = str(units[0].CodeValue) if units else "", float(gain) * float(1 if factor in (None, "") else factor)
    return Channel(name, values, rate, unit, gain, float(about.get("ChannelBaseline") or 0))
