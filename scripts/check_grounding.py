"""Make grounded data of PTB-XL's recordings and check each number in them: python scripts/check_grounding.py --real R

R is PTB-XL's folder (ptbxl_database.csv, scp_statements.csv, records500 or records100). Recordings and readings are
prepared in a temporary folder, by the commands that docs/grounding.md names. Then each recording is measured again:
every number of a reading must be one of its measurements as printed; grounded evaluation must find all it says right,
and every finding cited; and a number that is planted in a reading must be found wrong. Prints a line of JSON, and a
sentence; the status is 1 where any of it fails.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from elm_jax.data.prepare.grounded import printed
from elm_jax.ecg.beats.amplitudes import AMPLITUDES
from elm_jax.ecg.beats.measurements import UNITS, Measurements, measure
from elm_jax.ecg.recording import read_ecg
from elm_jax.prepare import main as prepare
from elm_jax.scoring.grounding import RULES, evidence_of, ground

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
NO_NUMBERS = re.compile(r"\*\*Step \d: [^*]*\*\*|\bV[1-6]\b")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, required=True, help="PTB-XL's folder")
    parser.add_argument("--language", default="statements", help="of the reports, as prepare ptb_xl has it")
    options = parser.parse_args()
    begun, counts = time.process_time(), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        common = ["--out", folder, "--workers", "1"]
        prepare(["ptb_xl", "--raw", str(options.real), "--report-language", options.language, *common])
        prepare(["grounding", *common])
        report = json.loads((out / "grounding_report.json").read_text())
        for row in pq.read_table(out / "grounding.parquet").to_pylist():
            recording = read_ecg(out / row["ecg_path"])
            found = measure(recording.signal, recording.sampling_rate, recording.leads)
            counts += check(found, json.loads(row["text"])[1]["value"])
    counts["reports with statements left out"] = len(report["statements_left_out"])
    failed = [
        name for name in ("numbers not measured", "wrong", "findings not cited", "planted not found") if counts[name]
    ]
    print(json.dumps({**dict(sorted(counts.items())), "seconds": round(time.process_time() - begun, 1)}))
    told = f"{counts['numbers']} numbers in {counts['readings']} readings"
    print(
        f"{told}: {'failed: ' + ', '.join(failed) if failed else 'each is the measurement, each planted one is found'}"
    )
    return int(bool(failed) or not counts["readings"])


def check(found: Measurements, text: str) -> Counter[str]:
    """What is counted of one reading."""
    numbers, known = NUMBER.findall(NO_NUMBERS.sub(" ", text)), measurements(found)
    evidence = evidence_of(found)
    held = ground(text, evidence)
    verdicts = Counter(one.verdict for one in held.held)
    counts = Counter({"readings": 1, "numbers": len(numbers), **verdicts, "findings": len(held.facts)})
    counts["numbers not measured"] = sum(number not in known for number in numbers)
    counts["findings not cited"] = len(held.facts - held.cited)
    alone = [one.claim for one in held.held if one.claim.low == one.claim.high and RULES[one.claim.kind].unit == " ms"]
    if alone:
        claim = alone[int(np.random.default_rng(len(text)).integers(len(alone)))]
        wrong = f"{claim.low + 2.5 * RULES[claim.kind].tolerance + 1:.0f}"
        planted = ground(re.sub(rf"(?<![\d.]){claim.low:.0f} ms", f"{wrong} ms", text), evidence)
        counts["planted"] = 1
        counts["planted not found"] = int(not any(one.verdict == "wrong" for one in planted.held))
    return counts


def measurements(found: Measurements) -> set[str]:
    """All that is measured of a recording, as it is printed."""
    known = {printed(found, kind) for kind in ("beats", "early", "pauses", "longest", "seconds")}
    known |= {printed(found, name) for name in UNITS if found.values[name].value is not None}
    known |= {printed(found, "beat", str(n)) for n in range(len(found.beats))}
    leads = [name for name, lead in found.leads.items() if not lead.reason]
    return known | {printed(found, kind, name) for name in leads for kind in AMPLITUDES}


if __name__ == "__main__":
    sys.exit(main())
