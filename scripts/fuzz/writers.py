"""Writers of the formats that `read_ecg` reads, for tests and for the fuzzer: small files, with faults too."""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.ecg.names import LEADS, NUMBERED

EIGHT = ("I", "II", *LEADS[6:])
LIMBS = ("III", "aVR", "aVL", "aVF")
RNG = np.random.default_rng(7)
EVEN = np.round(np.cumsum(RNG.normal(0, 8, (8, 150)), axis=1)).astype(int) * 4  # steps of EIGHT, limb leads are whole
ONE, TWO = EVEN[:2]
STEPS = np.stack([ONE, TWO, TWO - ONE, -(ONE + TWO) // 2, ONE - TWO // 2, TWO - ONE // 2, *EVEN[2:]])


def edf(path: Path, names: Sequence[str], steps: Sequence[np.ndarray], seconds: float = 0.1, records: int | None = None,
        unit: bytes = b"uV", wide: bool = False, kind: bytes = b"", limits: tuple[int, int, int, int] | None = None,
        encoding: str = "utf-8") -> Path:  # fmt: skip
    """`steps`: of each signal (records, samples in a record)."""
    count, low = len(names), -(1 << (23 if wide else 15))
    low, high, least, most = limits or (low, -low - 1, low, -low - 1)
    head = (b"\xffBIOSEMI" if wide else b"0".ljust(8)) + b" " * 176 + str(256 * (count + 1)).encode().ljust(8)
    head += kind.ljust(44) + str(len(steps[0]) if records is None else records).encode().ljust(8)
    head += f"{seconds:g}".encode().ljust(8) + str(count).encode().ljust(4)
    head += b"".join(name.encode(encoding).ljust(16) for name in names) + b" " * 80 * count + unit.ljust(8) * count
    head += b"".join(str(value).encode().ljust(8) * count for value in (low, high, least, most)) + b" " * 80 * count
    head += b"".join(str(part.shape[1]).encode().ljust(8) for part in steps) + b" " * 32 * count
    body = b"".join(
        part[i].astype("<i4").view(np.uint8).reshape(-1, 4)[:, : 3 if wide else 2].tobytes()
        for i in range(len(steps[0]))
        for part in steps
    )
    path.write_bytes(head + body)
    return path


def aecg(
    names: Sequence[str] = LEADS,
    steps: np.ndarray = STEPS,
    unit: str = "uV",
    scale: float = 4.88,
    origin: float = 0,
    increment: str = "0.002",
    before: str = "",
    more: str = "",
) -> str:
    sequences = "".join(
        f'<component><sequence><code code="{name}"/><value xsi:type="SLIST_PQ"><origin value="{origin}" unit="{unit}"/>'
        f'<scale value="{scale}" unit="{unit}"/><digits>\n{" ".join(map(str, row))} </digits></value></sequence>'
        "</component>"
        for name, row in zip(names, steps, strict=True)
    )
    time = '<component><sequence><code code="TIME_ABSOLUTE"/><value xsi:type="GLIST_TS"><head value="20021122"/>'
    time += f'<increment value="{increment}" unit="s"/></value></sequence></component>'
    said = '<subjectOf><annotationSet><component><annotation><code code="MDC_ECG_INTERPRETATION_STATEMENT"/>'
    said += '<value xsi:type="ST">Sinus rhythm</value></annotation></component></annotationSet></subjectOf>'
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>{before}<AnnotatedECG xmlns="urn:hl7-org:v3" xmlns:xsi="x"><component>'
        f"<series><component><sequenceSet>{time}{sequences}</sequenceSet></component>{more}{said}</series></component>"
        "</AnnotatedECG>"
    )


def muse(
    names: Sequence[str] = EIGHT,
    steps: np.ndarray = EVEN,
    gain: str = "4.88",
    unit: str = "MICROVOLTS",
    count: int = 0,
    kind: str = "Rhythm",
    exponent: str = "0",
    size: str = "2",
) -> str:
    leads = "".join(
        f"<LeadData><LeadSampleCountTotal>{count or len(row)}</LeadSampleCountTotal><LeadAmplitudeUnitsPerBit>{gain}"
        f"</LeadAmplitudeUnitsPerBit><LeadAmplitudeUnits>{unit}</LeadAmplitudeUnits><LeadID>{name}</LeadID>"
        f"<LeadSampleSize>{size}</LeadSampleSize><WaveFormData>\n{base64.encodebytes(row.astype('<i2').tobytes()).decode()}"
        "</WaveFormData></LeadData>"
        for name, row in zip(names, steps, strict=True)
    )
    waves = "".join(
        f"<Waveform><WaveformType>{each}</WaveformType><SampleBase>500</SampleBase><SampleExponent>{exponent}"
        f"</SampleExponent>{leads}</Waveform>"
        for each in ("Median", kind)
    )
    said = "".join(
        f"<DiagnosisStatement><StmtText>{one}</StmtText></DiagnosisStatement>" for one in ("Sinus rhythm", "Normal")
    )
    return (
        '<?xml version="1.0" encoding="ISO-8859-1"?><!DOCTYPE RestingECG SYSTEM "restecg.dtd">'
        f"<RestingECG><Diagnosis>{said}</Diagnosis>{waves}</RestingECG>"
    )


def lzw(data: bytes) -> bytes:
    """Ten bits a code, none of them for the end."""
    table, codes, before = {bytes([i]): i for i in range(256)}, [], b""
    for i in range(len(data)):
        longer = before + data[i : i + 1]
        if longer not in table:
            codes.append(table[before])
            if len(table) <= 1022:
                table[longer] = len(table)
            longer = data[i : i + 1]
        before = longer
    codes.append(table[before])
    bits = np.array(codes)[:, None] >> np.arange(9, -1, -1) & 1
    return np.packbits(bits.astype(np.uint8).ravel()).tobytes()


def xli(stored: np.ndarray) -> bytes:
    """What `unpack_xli` reads."""
    chunks = []
    for row in stored.tolist():
        second = [2 * row[i - 1] - row[i - 2] - row[i] for i in range(2, len(row))]
        kept = np.array([*row[:2], *(value + 64 for value in second[1:]), 0]).astype(np.int16)
        halves = np.stack([kept >> 8, kept & 255]).astype(np.uint8).tobytes()
        packed = lzw(halves)
        chunks.append(
            len(packed).to_bytes(4, "little") + b"\1\0" + int(second[0]).to_bytes(2, "little", signed=True) + packed
        )
    return b"".join(chunks)


def philips(
    data: bytes,
    method: str = "XLI",
    encoding: str = "Base64",
    leads: Sequence[str] = LEADS,
    step: str = "5",
    milliseconds: int = 300,
) -> str:
    packed = f'compressflag="{bool(method)}" compressmethod="{method}"' if method else 'compressflag="False"'
    return (
        '<?xml version="1.0" encoding="UTF-16"?><restingecgdata xmlns="http://www3.medical.philips.com"><dataacquisition>'
        f"<signalcharacteristics><samplingrate>500</samplingrate><resolution>{step}</resolution></signalcharacteristics>"
        f'</dataacquisition><waveforms><parsedwaveforms dataencoding="{encoding}" {packed} '
        f'numberofleads="{len(leads)}" '
        f'durationperchannel="{milliseconds}" leadlabels="{" ".join(leads)}">{base64.b64encode(data).decode()}'
        "</parsedwaveforms></waveforms><interpretations><interpretation><statement><leftstatement>SR</leftstatement>"
        "<rightstatement>normal</rightstatement></statement></interpretation></interpretations></restingecgdata>"
    )


def residuals(steps: np.ndarray) -> np.ndarray:
    one, two, three, avr, avl, avf = steps[:6]
    limbs = [two - one - three, -avr - (one + two) // 2, (one - three) // 2 - avl, (two + three) // 2 - avf]
    return np.stack([one, two, *limbs, *steps[6:]])


def huffman(values: np.ndarray, table: dict[int, str] | None = None) -> bytes:
    """By the default table: k ones, a zero and the sign; larger ones in 8 or 16 bits behind ten of an escape."""

    def code(value: int) -> str:
        if table is not None:
            return table[value]
        if value == 0:
            return "0"
        if abs(value) <= 8:
            return "1" * abs(value) + "0" + ("0" if value > 0 else "1")
        return f"1111111110{value & 255:08b}" if -128 <= value < 128 else f"1111111111{value & 65535:016b}"

    bits = "".join(map(code, values.tolist()))
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))


def differences(row: np.ndarray, order: int) -> np.ndarray:
    return np.concatenate([row[:order], np.diff(row, order)])


def scp(
    names: Sequence[str] = EIGHT,
    steps: np.ndarray = EVEN,
    order: int = 2,
    tables: bytes | None = struct.pack("<H", 19999),
    table: dict[int, str] | None = None,
    flags: int = 0,
    bimodal: int = 0,
    interval: int = 2000,
    step: int = 5000,
    end: int = 0,
    checksum: bool = True,
) -> bytes:
    numbers = {name: number for number, name in NUMBERED.items()}
    rows = [differences(row, order) for row in steps]
    packed = [row.astype("<i2").tobytes() if tables is None else huffman(row, table) for row in rows]
    leads = b"".join(struct.pack("<IIB", 1, end or steps.shape[1], numbers.get(name, 200)) for name in names)
    rhythm = struct.pack("<HHBB", step, interval, order, bimodal) + struct.pack(f"<{len(packed)}H", *map(len, packed))
    said = b"Sinus rhythm\0"
    contents = {3: struct.pack("<BB", len(names), flags) + leads, 6: rhythm + b"".join(packed)}
    contents[8] = bytes(8) + b"\1" + b"\1" + struct.pack("<H", len(said)) + said
    contents |= {} if tables is None else {2: tables}
    size, body, pointers = (
        6 + 16 + 10 * (len(contents) + 1),
        b"",
        struct.pack("<HII", 0, 16 + 10 * (len(contents) + 1), 7),
    )
    for number, content in sorted(contents.items()):
        pointers += struct.pack("<HII", number, 16 + len(content), size + len(body) + 1)
        body += struct.pack("<HHI", 0, number, 16 + len(content)) + bytes(8) + content
    whole = (
        struct.pack("<I", size + len(body))
        + struct.pack("<HHI", 0, 0, 16 + len(pointers))
        + bytes(2)
        + b"SCPECG"
        + pointers
    )
    whole += body
    return struct.pack("<H", binascii.crc_hqx(whole, 0xFFFF) if checksum else 0) + whole


def dicom(
    path: Path,
    names: Sequence[str] = LEADS,
    steps: np.ndarray = STEPS,
    scheme: str = "MDC",
    kind: str = "SS",
    bits: int = 16,
    label: str = "RHYTHM",
    samples: int = 0,
    unit: str = "uV",
    syntax: str = "1.2.840.10008.1.2.1",
    baseline: float = 0,
    more: bool = True,
    sensitivity: str | None = "2.5",
) -> Path:
    import pydicom
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset

    def item(**values: Any) -> Dataset:
        found = Dataset()
        for key, value in values.items():
            setattr(found, key, value)
        return found

    numbers = {name: number for number, name in NUMBERED.items()}
    spelled = {"MDC": "2:{}", "SCPECG": "5.6.3-9-{}", "99X": "x{}"}[scheme]
    channels = [
        item(
            ChannelSourceSequence=[
                item(CodeValue=spelled.format(numbers[name]), CodingSchemeDesignator=scheme, CodeMeaning=f"Lead {name}")
            ],
            **({} if sensitivity is None else {"ChannelSensitivity": sensitivity}),
            ChannelSensitivityCorrectionFactor="2",
            ChannelBaseline=str(baseline),
            ChannelSensitivityUnitsSequence=[item(CodeValue=unit, CodingSchemeDesignator="UCUM", CodeMeaning=unit)],
        )
        for name in names
    ]
    order = ">" if syntax == "1.2.840.10008.1.2.2" else "<"
    number = {"SS": "i2", "SL": "i4", "US": "u2", "AB": "i2"}[kind]

    def group(label: str, values: np.ndarray, samples: int) -> Dataset:
        return item(
            MultiplexGroupLabel=label,
            NumberOfWaveformChannels=len(names),
            NumberOfWaveformSamples=samples or values.shape[1],
            SamplingFrequency="500",
            WaveformBitsAllocated=bits,
            WaveformSampleInterpretation=kind,
            ChannelDefinitionSequence=channels,
            WaveformData=values.T.astype(order + number).tobytes(),
        )

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.9.1.1"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = FileDataset(
        str(path), {}, file_meta=meta, preamble=bytes(128), is_implicit_VR=False, is_little_endian=order == "<"
    )
    groups = [group(label, steps, samples)] + [group("MEDIAN BEAT", steps[:, :20], 0)] * more
    data.WaveformSequence = pydicom.sequence.Sequence(groups)
    data.save_as(path, enforce_file_format=True)
    return path
