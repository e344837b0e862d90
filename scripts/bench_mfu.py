"""Training speed of models of 1.5B and 7B parameters on GPUs: docs/scaling.md's marks, without any download.

    python scripts/bench_mfu.py [--cases 1.5b,7b-lora] [--steps N] [--json FILE]
    python scripts/bench_mfu.py --tiny            # a few small layers, to try the script itself anywhere

Each case is the train command in a process of its own: a LLaVA ELM with Qwen2.5's sizes and random weights behind a
frozen MERL encoder, on generated ECGs whose conversations are packed into whole rows. The figures are those of
`metrics.jsonl` after the steps that compile. No checkpoint is written (it would be 12 bytes a trained parameter).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import machine

ROOT = Path(__file__).resolve().parents[1]
QWEN = {"vocab_size": 151936, "max_len": 32768, "rope_theta": 1e6, "head_dim": 128}
SIZES = {
    "1.5b": QWEN | {"hidden": 1536, "layers": 28, "heads": 12, "kv_heads": 2, "mlp": 8960, "tied": True},
    "7b-lora": QWEN | {"hidden": 3584, "layers": 28, "heads": 28, "kv_heads": 4, "mlp": 18944, "tied": False},
}
TINY = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp": 128, "vocab_size": 1024}
# What is trained, on rows of how many tokens, how many of them a device; and the mark.
CASES: dict[str, tuple[dict[str, Any], int, int, str]] = {
    "1.5b": ({}, 2048, 16, "50 % MFU"),
    "7b-lora": ({"llm.lora.rank": 16, "llm.remat": "dots"}, 4096, 2, "14 100 tokens/s"),
}
COMMON = {
    "llm.name": "demo", "encoder.cache": True, "data.val_fraction": 0.0, "data.system_prompt": None,
    "optim.schedule": "constant", "optim.lr": 1e-5, "train.log_every": 5, "train.save_every": 10**6,
    "eval.at_end": False, "log.progress": False,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help="which of them")
    parser.add_argument("--steps", type=int, default=40, help="steps of a case; the second half counts")
    parser.add_argument("--rows", type=int, help="rows a step in place of the case's own")
    parser.add_argument("--recordings", type=int, help="generated recordings in place of as many as the steps read")
    parser.add_argument("--tiny", action="store_true", help="small layers and rows of 256 tokens")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--train", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        return train(args.train)
    found = {}
    for name in args.cases.split(","):
        with tempfile.TemporaryDirectory() as folder:
            found[name] = run(Path(folder), name, args)
        print(line(name, found[name]), flush=True)
    device = "cpu" if any(told["mfu"] is None for told in found.values()) else "gpu"
    print(machine("jax", "flax", device=device))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


def flags(name: str, steps: int, tiny: bool, rows: int | None = None, recordings: int | None = None) -> list[str]:
    """The train command's flags of a case, but for the folder."""
    own, tokens, own_rows, _ = CASES[name]
    tokens, rows = 256 if tiny else tokens, rows or own_rows
    # Of some 100 tokens each, all questions about it together.
    demo = json.dumps([f"demo:train={recordings or max(64, steps * rows * tokens // 100)},val=8,test=8"])
    values = COMMON | own | {
        "llm.scratch": SIZES[name] | (TINY if tiny else {}), "data.names": demo,
        "data.max_len": tokens, "train.batch_size": rows, "train.steps": steps,
        **({"encoder.config": {"resnet_type": "resnet18", "width": 8}} if tiny else {}),
    }  # fmt: skip
    return ["--config=configs/llava_merl.py", *(f"--config.{key}={value}" for key, value in values.items())]


def train(flags: list[str]) -> None:
    """The train command in this process, without checkpoints."""
    from elm_jax.cli import ConfigFlags
    from elm_jax.runtime import compilation, gpu_settings

    gpu_settings.apply()
    compilation.keep_compiled()
    from elm_jax.run import folder as run
    from elm_jax.training import loop

    class Unsaved(loop.Trainer):
        def _save(self, done: int) -> None:
            """Nothing: what is measured here is not gone on with."""

    config = ConfigFlags.parse(flags).load()
    Unsaved(config, run.open_folder(config)).run()


def run(folder: Path, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What metrics.jsonl says of a case."""
    chosen = [*flags(name, args.steps, args.tiny, args.rows, args.recordings), f"--config.workdir={folder / 'run'}"]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    environment = {**os.environ, "ELM_JAX_CACHE": str(folder / "cache"), "PYTHONPATH": path}
    if subprocess.run([sys.executable, __file__, "--train", *chosen], env=environment).returncode:
        raise SystemExit(f"error: {name} ended with an error, above")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line and "event" not in line]
    timed = [line for line in logged if line["step"] > args.steps // 2]
    found = {key: timed[-1][key] for key in ("loss", "padding_fraction", "device_memory_gb")}
    for key in ("step_ms", "tokens_per_s", "padded_tokens_per_s", "mfu", "host_wait_share"):
        told = [line[key] for line in timed]
        found[key] = None if None in told else sum(told) / len(told)
    events = {line["event"]: line for line in lines if "event" in line}
    attention = {key: events["attention"][key] for key in ("implementation", "reason")}
    compiled = {key: events["finish"][key] for key in ("compile_seconds", "compile_count")}
    shape = events["compile"]["shape"]
    found |= {"attention": attention, "rows": shape["rows"], "tokens": shape["tokens"], "shape": shape}
    return {**found, **compiled}


def line(name: str, found: dict[str, Any]) -> str:
    mfu = "not known here" if found["mfu"] is None else f"{found['mfu']:.1%}"
    return (
        f"{name}: {found['rows']} rows of {found['tokens']}: {found['step_ms']:.0f} ms a step, MFU {mfu}, "
        f"{found['tokens_per_s']:,.0f} tokens/s, host wait {found['host_wait_share']:.1%}, "
        f"padding {found['padding_fraction']:.1%}, peak {found['device_memory_gb']} GB; "
        f"attention {found['attention']['implementation']} ({found['attention']['reason']}); the mark: {CASES[name][3]}"
    )


if __name__ == "__main__":
    main()
