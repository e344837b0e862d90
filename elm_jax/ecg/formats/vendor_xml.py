"""Recordings in XML: HL7 annotated ECG, GE MUSE and Philips (Sierra ECG), by their first element."""

import base64
import binascii
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from elm_jax.ecg.formats.xli import unpack_xli
from elm_jax.ecg.formats.xml import WHAT, Element, number, parse
from elm_jax.ecg.names import LEADS, lead_of
from elm_jax.ecg.stored import AGAIN, Channel, Stored
from elm_jax.errors import UserError, some


def read_xml(path: Path) -> Stored:
    """The rhythm leads of a document. Raises UserError."""
    root = parse(path)
    reader = _READERS.get(root.name)
    if reader is None:
        raise UserError(path, f"XML that begins with {root.name[:80]}", WHAT, "export it in one of these forms")
    return reader(path, root)


# ---- HL7 aECG (HL7 V3 ECG Annotation, 2004)


def _read_aecg(path: Path, root: Element) -> Stored:
    """The first series, of a rhythm; derived ones (averaged beats) stand in it and are not read."""
    series = list(root.all("component", "series"))
    sets = [one for each in series[:1] for one in each.all("component", "sequenceSet")]
    found = [_aecg_set(path, one) for one in sets]
    full = [channels for channels in found if {"I", "II"} <= {lead[0] for c in channels if (lead := lead_of(c.name))}]
    if len(full) != 1:
        told = f"{len(sets)} sets of sequences, {len(full)} of them with leads I and II"
        raise UserError(path, told, "all leads in one set, of one stretch of time", "export it so")
    said = [
        value.text.strip()
        for note in series[0].within("annotation")
        if "INTERPRETATION_STATEMENT" in note.first("code").attributes.get("code", "")
        for value in note.all("value")
    ]
    return Stored(path, full[0], "; ".join(filter(None, said)))


def _aecg_set(path: Path, one: Element) -> list[Channel]:
    rate, channels = None, []
    for sequence in one.all("component", "sequence"):
        code, value = sequence.first("code").attributes.get("code", ""), sequence.first("value")
        if code.startswith("TIME_"):
            step = value.first("increment").attributes
            scale = {"s": 1.0, "ms": 1e-3, "us": 1e-6}.get(step.get("unit", ""))
            seconds = number(path, "increment", step.get("value", "")) * (scale or 0)
            if scale is None or seconds <= 0:
                raise UserError(path, f"an increment of {seconds:g} {step.get('unit', '')!r}", "s, ms or us", AGAIN)
            rate = 1 / seconds
            continue
        scale, origin = value.first("scale").attributes, value.first("origin").attributes
        gain, offset = (number(path, f"scale of {code}", of.get("value", "0")) for of in (scale, origin))
        unit = scale.get("unit", "")
        if offset and origin.get("unit", unit) != unit:
            raise UserError(path, f"an origin in another unit than the scale of {code}", unit, AGAIN)
        digits = _digits(path, value.first("digits").text)
        channels.append(Channel(code, digits, None, unit, gain, offset))
    return [Channel(c.name, c.values, rate and float(f"{rate:.9g}"), c.unit, c.gain, c.offset) for c in channels]


def _digits(path: Path, text: str) -> np.ndarray:
    """Numbers parted by blanks."""
    if re.fullmatch(r"[\s\d+.eE-]*", text) is None:
        raise UserError(path, "samples that are no numbers", "numbers, parted by blanks", AGAIN)
    try:
        return np.array(text.split(), np.float64)
    except ValueError as error:
        raise UserError(path, f"samples that are no numbers ({error})", "numbers, parted by blanks", AGAIN) from None


# ---- GE MUSE (RestingECG)


def _read_muse(path: Path, root: Element) -> Stored:
    """The waveform called Rhythm; MUSE stores I, II and V1 to V6."""
    waves = [one for one in root.all("Waveform") if one.first("WaveformType").text.strip().casefold() == "rhythm"]
    if len(waves) != 1:
        kinds = some([one.first("WaveformType").text.strip() for one in root.all("Waveform")]) or "no waveform"
        raise UserError(path, kinds, "one waveform of the type Rhythm", "export it with its full rhythm")
    wave = waves[0]
    base, exponent = (wave.first(name).text for name in ("SampleBase", "SampleExponent"))
    rate = number(path, "SampleBase", base) * 10.0 ** np.clip(number(path, "SampleExponent", exponent or "0"), -30, 30)
    channels = []
    for lead in wave.all("LeadData"):
        name = lead.first("LeadID").text.strip()
        data = _base64(path, name, lead.first("WaveFormData").text)
        width = lead.first("LeadSampleSize").text.strip() or "2"
        claimed = number(path, "LeadSampleCountTotal", lead.first("LeadSampleCountTotal").text)
        if width != "2" or len(data) != 2 * claimed:
            found = f"{len(data)} bytes of lead {name} for {claimed:g} samples of {width[:9]} bytes"
            raise UserError(path, found, "two bytes a sample", AGAIN)
        gain = number(path, f"units per bit of {name}", lead.first("LeadAmplitudeUnitsPerBit").text)
        unit = lead.first("LeadAmplitudeUnits").text.strip()
        channels.append(Channel(name, np.frombuffer(data, "<i2"), rate, unit, gain))
    said = [one.text.strip() for one in root.all("Diagnosis", "DiagnosisStatement", "StmtText")]
    return Stored(path, channels, "; ".join(filter(None, said)))


def _base64(path: Path, name: str, text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(path, f"samples of {name} that are no base64 ({error})", "base64", AGAIN) from None


# ---- Philips (Sierra ECG XML 1.03 and 1.04)

_PLAIN, _TWELVE = ("", "uncompressed", "none"), ("STD-12", "10-WIRE")


def _read_philips(path: Path, root: Element) -> Stored:
    """The parsed waveforms: of 16 bits, plain, or packed by XLI (see `xli`)."""
    data = next(root.within("parsedwaveforms"), Element(""))
    about = next(root.within("signalcharacteristics"), Element(""))
    encoding = data.attributes.get("dataencoding", "").casefold()
    method = data.attributes.get("compressmethod", data.attributes.get("compression", ""))
    if data.attributes.get("compressflag", "true").casefold() == "false":
        method = ""
    if encoding != "base64" or method.casefold() not in (*_PLAIN, "xli"):
        found = f"waveforms in {encoding or 'no encoding'}, packed by {method or 'nothing'}"
        raise UserError(path, found, "base64, plain or packed by XLI, the one way that is published", "export them so")
    names = data.attributes.get("leadlabels", "").split()
    if not names:
        if (kind := about.first("acquisitiontype").text.strip()) not in _TWELVE:
            raise UserError(path, f"no names of leads, acquired as {kind or 'nothing'}", some(_TWELVE), AGAIN)
        names = list(LEADS)
    count = data.attributes.get("numberofleads") or about.first("numberchannelsvalid").text
    names = names[: max(0, int(number(path, "number of leads", count or str(len(names)))))]
    if (bits := about.first("bitspersample").text.strip() or "16") != "16":
        raise UserError(path, f"samples of {bits} bits", "sixteen", "export them so")
    rate = number(path, "samplingrate", about.first("samplingrate").text)
    step = about.first("signalresolution").text.strip() or about.first("resolution").text
    samples = int(number(path, "durationperchannel", data.attributes.get("durationperchannel", "")) * rate / 1000)
    packed = _base64(path, "parsedwaveforms", data.text)
    if not 0 < samples < 1 << 24 or not names:
        raise UserError(path, f"{len(names)} leads of {samples} samples", "a recording", AGAIN)
    if method.casefold() == "xli":
        signal = _with_limb_leads(path, names, unpack_xli(path, packed, len(names), samples))
    elif len(packed) < 2 * samples * len(names):
        raise UserError(path, f"{len(packed)} bytes for {len(names)} leads of {samples} samples", "two a sample", AGAIN)
    else:
        signal = np.frombuffer(packed, "<i2", samples * len(names)).reshape(len(names), samples)
    gain = number(path, "resolution", step)
    said = [" ".join(part.text.strip() for part in one.children) for one in root.within("statement")]
    channels = [Channel(name, row, rate, "uV", gain) for name, row in zip(names, signal, strict=True)]
    return Stored(path, channels, "; ".join(filter(None, said)))


def _with_limb_leads(path: Path, names: Sequence[str], signal: np.ndarray) -> np.ndarray:
    """XLI keeps of III, aVR, aVL and aVF only by how much they differ from what follows of I and II."""
    row = {lead[0]: place for place, lead in enumerate(map(lead_of, names)) if lead}
    if missing := [lead for lead in LEADS[:6] if lead not in row]:
        if len(missing) < 6 and missing != [*LEADS[2:6]]:
            raise UserError(path, f"packed limb leads without {', '.join(missing)}", "all six", AGAIN)
    else:
        one, two, three, avr, avl, avf = (signal[row[lead]] for lead in LEADS[:6])
        three[:] = two - one - three
        avr[:] = -avr - (one + two) // 2
        avl[:] = (one - three) // 2 - avl
        avf[:] = (two + three) // 2 - avf
    return signal


_READERS: dict[str, Callable[[Path, Element], Stored]] = {
    "AnnotatedECG": _read_aecg,
    "RestingECG": _read_muse,
    "restingecgdata": _read_philips,
}
