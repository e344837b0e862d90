"""Measure ECGs: rate, rhythm, P, PR, QRS, QT and QTc, axis, amplitudes and ST levels, each with its quality.

    python -m elm_jax.measure recording.npy
    python -m elm_jax.measure records/*.hea --json
    python -m elm_jax.measure recording.hea --text --language de --picture beat.png

Without --json or --text a table is printed. --json prints a line for each file: values with unit, quality (0 to 1) and,
where there is none, the reason; rhythm; beats; waves and amplitudes of each lead. --text prints sentences in the order
in which a reader goes. --picture draws the averaged beat of all leads, and where its waves begin and end. What reading
took for granted and what looks wrong with a recording is a line on stderr each, and `notes` of --json. Of several
files those that cannot be read are named on stderr, the others measured; the exit status is then 2. What is measured
and how, and how far it can be trusted: docs/measurements.md.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elm_jax import cli
from elm_jax.ecg.beats.amplitudes import AMPLITUDES
from elm_jax.ecg.beats.measurements import UNITS, Measurements, measure
from elm_jax.ecg.beats.words import LANGUAGES, describe
from elm_jax.ecg.checks import check_signal
from elm_jax.ecg.recording import collected_notes, read_ecg
from elm_jax.errors import UserError, printable
from elm_jax.folders import check_picture


def main(argv: Sequence[str]) -> int:
    """Parse the arguments, measure each file, print; returns the status of the last file that could not be measured."""
    parser = cli.Parser("measure", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="recordings of any format of docs/records.md")
    parser.add_argument("--table", action="store_true", help="print a table, beside --text too")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each file, and nothing else")
    parser.add_argument("--text", action="store_true", help="print sentences")
    parser.add_argument("--language", default="en", choices=LANGUAGES, help="of the sentences")
    parser.add_argument("--picture", type=Path, help="draw the averaged beat into a .png, .svg or .pdf file")
    parser.add_argument("--sampling-rate", type=float, metavar="HZ", help="of files that state none; .npy: default 250")
    parser.add_argument("--lead-order", metavar="I,II,...", help="the leads of the file's columns, whatever it says")
    parser.add_argument("--unit", help="of numbers that state none: mV, uV, V or nV")
    options = parser.parse_args(argv)
    if options.picture is not None:
        if len(options.files) > 1:
            raise UserError("--picture", f"{len(options.files)} files", "one FILE", "measure one at a time")
        check_picture(options.picture, "--picture", options.files)
    order = options.lead_order and [name.strip() for name in options.lead_order.split(",")]
    status = 0
    for path in options.files:
        try:
            with collected_notes(os.path.dirname(path)) as notes:
                recording = read_ecg(path, order, unit=options.unit, unstated_rate=options.sampling_rate)
            notes += [finding.text for finding in check_signal(recording.signal, recording.sampling_rate)]
            found = measure(recording.signal, recording.sampling_rate, recording.leads)
        except UserError as error:
            status = cli.report(error, "--debug" in argv)
            continue
        for note in notes:
            print(f"{printable(path)}: {printable(note)}", file=sys.stderr)
        if options.json:
            print(json.dumps({"file": path, "notes": notes, **as_json(found)}))
        else:
            named = [printable(path)] if len(options.files) > 1 else []
            tabled = table(found) if options.table or not options.text else []
            told = [describe(found, options.language)] if options.text else []
            print("\n".join([*named, *tabled, *told]))
        if options.picture is not None:
            from elm_jax.pictures.averaged_beat import draw_beat  # matplotlib is slow to import

            draw_beat(found, options.picture, Path(path).name)
    return status


def as_json(found: Measurements) -> dict[str, Any]:
    """What --json prints of a recording."""
    values: dict[str, Any] = {}
    for name, unit in UNITS.items():
        value = found.values[name]
        shown = None if value.value is None else round(value.value, 3)
        values[name] = {"value": shown, "unit": unit, "quality": value.quality}
        values[name] |= {"reason": value.reason} if shown is None else {}
    return {
        "seconds": round(found.seconds, 3),
        "values": values,
        "rhythm": asdict(found.rhythm),
        "beats": [{"at": at, "look": look} for at, look in zip(found.beats, found.kinds, strict=True)],
        "waves": found.waves,
        "leads": {name: asdict(lead) for name, lead in found.leads.items()},
    }


def table(found: Measurements) -> Iterator[str]:
    """The lines of a table: values, rhythm, and for each lead its amplitudes in mV."""
    for name, unit in UNITS.items():
        value = found.values[name]
        digits = 2 if unit == "mV" else 0
        shown = f"{value.value:.{digits}f} {unit}" if value.value is not None else f"- ({value.reason})"
        quality = f"quality {value.quality:.2f}" if value.value is not None else ""
        yield f"{name:<16}{shown:<14}{quality}".rstrip()
    rhythm = found.rhythm
    yield f"{'rhythm':<16}{rhythm.regularity}, variation {rhythm.variation:.3f}, {len(found.beats)} beats"
    yield f"{'early beats':<16}{rhythm.early} of the usual look, {rhythm.ectopic_early} of another"
    yield f"{'pauses':<16}{rhythm.pauses}, longest interval {rhythm.longest:.2f} s"
    yield f"{'lead (mV)':<10}{''.join(f'{name:>8}' for name in AMPLITUDES)}"
    for name, lead in found.leads.items():
        cells = "".join(f"{lead.amplitudes[a]:8.2f}" for a in AMPLITUDES) if not lead.reason else f"  {lead.reason}"
        yield f"{name:<10}{cells}"


if __name__ == "__main__":
    sys.exit(cli.guard(main))
