"""Does a model with two encoders learn from both, and do without either? The demo, with the signal and its page.

    python scripts/two_views.py [--out FOLDER] [--steps N]

It trains configs/demo.py with elm=ecg_r1 (an encoder of the signal, one of the page, both from nothing), drops a view
in half of the samples, and is then asked about held-out recordings with both views, without the page and without the
signal. The promise: the loss falls by half, and each of the three tells ECGs from noise and flat lines better than the
best constant answer does. It prints a line of JSON and a sentence, and exits 1 where the promise fails.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from elm_jax.cli import ConfigFlags
from elm_jax.config import Config
from elm_jax.evaluation.evaluator import evaluate
from elm_jax.training.loop import train

NAME = "signal_type.accuracy"
IMAGE = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 96,
         "patch_size": 24, "layer": -1}  # fmt: skip
KEYS: dict[str, Any] = {
    "elm": "ecg_r1", "encoders": {"image": {"name": "clip_patches", "config": IMAGE, "tokens": 16}},
    "data.leads": "II,V1", "data.drop_views": 0.5, "data.max_len": 96,
    "data.names": ["demo:train=4000,val=64,test=200"],
    "encoder.config": {"resnet_type": "resnet18", "width": 8}, "connector.hidden": 256, "log.progress": False,
    "eval.at_end": False, "eval.controls": "zeros", "train.epochs": 20, "train.log_every": 10,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the run's folder; a temporary one by default")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = configured(options.out or Path(folder) / "run", options.steps)
        train(config)
        lines = [json.loads(line) for line in Path(config.workdir, "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        scores, constant = {}, 0.0
        for left_out in ((), ("image",), ("ecg",)):
            found = asked(replace(config, data=replace(config.data, left_out=left_out)))
            scores["without " + left_out[0] if left_out else "both"] = {
                name: found["metrics"][name]["value"] for name in (NAME, "heart_rate.within_5_bpm")
            }
            constant = max(each[NAME] for each in found["baselines"].values() if NAME in each)
    kept = losses[-1] < losses[0] / 2 and all(each[NAME] > constant + 0.1 for each in scores.values())
    print(json.dumps({"loss": [losses[0], losses[-1]], "constant": constant, **scores}))
    told = ", ".join(f"{name} {each[NAME]:.3f}" for name, each in scores.items())
    print(f"signal type: {told}; the best constant {constant:.3f}: the promise {'holds' if kept else 'FAILS'}")
    return 0 if kept else 1


def configured(workdir: Path, steps: int) -> Config:
    values = {**KEYS, "workdir": str(workdir), "train.steps": steps, "train.save_every": steps}
    flags = [f"--config.{key}={json.dumps(x) if isinstance(x, dict | list | bool) else x}" for key, x in values.items()]
    return ConfigFlags.parse(["--config", "configs/demo.py", *flags]).load()


def asked(config: Config) -> dict[str, Any]:
    """What an evaluation leaves."""
    return json.loads((evaluate(config, "test", "latest") / "metrics.json").read_text())


if __name__ == "__main__":
    sys.exit(main())
