"""What the demo must reach on held-out recordings: python .ci/check_demo.py RUN_FOLDER."""

import json
import sys
from pathlib import Path

results = json.loads((Path(sys.argv[1]) / "eval" / "demo-test" / "metrics.json").read_text())
scores = {name: score["value"] for name, score in results["metrics"].items()}
shuffled = {name: score["value"] for name, score in results["controls"]["shuffled"].items()}
constant = results["baselines"]["constant"]
checks = [
    ("at least 1000 held-out ECGs", results["by"]["name"]["heart_rate"]["heart_rate.within_5_bpm"]["n"] >= 1000),
    ("signal type", scores["signal_type.accuracy"] >= 0.99),
    ("heart rate within 5 bpm", scores["heart_rate.within_5_bpm"] >= 0.95),
    *(
        (f"{name} with shuffled ECGs as a constant answer", abs(shuffled[name] - constant[name]) <= 0.05)
        for name in ("signal_type.accuracy", "heart_rate.within_5_bpm")
    ),
]
for name, holds in checks:
    print(f"{'ok  ' if holds else 'FAIL'} {name}")
print(json.dumps({"scores": scores, "shuffled": shuffled, "constant": constant}, indent=1))
sys.exit(not all(holds for _, holds in checks))
