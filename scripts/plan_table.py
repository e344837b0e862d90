"""Plan full fine-tuning of a Qwen2.5-7B-sized model on clusters that are not there: the table of docs/scaling.md.

    python scripts/plan_table.py --json table.json      # H100s: needs jax[cuda12], no GPU
    python scripts/plan_table.py --only v5p:4x8x8       # TPUs: needs jax[tpu], no TPU
    python scripts/plan_table.py --compare              # memory with plain attention and logits of all tokens

Each line is one `python -m elm_jax.plan`, in a process of its own. Outside CI: a compilation takes tens of seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "hidden": 3584, "layers": 28, "heads": 28, "kv_heads": 4, "mlp": 18944, "vocab_size": 152064, "tied": False,
    "max_len": 32768, "rope_theta": 1e6,
}  # fmt: skip
MODEL = (
    "--config=configs/llava_merl.py", "--config.llm.name=demo", f"--config.llm.scratch={SIZES}",
    "--config.encoder.cache", "--config.data.max_len=4096", "--config.llm.remat=full",
)  # fmt: skip
# Topology, mesh, rows on each device.
PLANS: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("h100:1x8", ("--config.mesh.fsdp=8",), 4),
    ("h100:16x8", ("--config.mesh.fsdp=8",), 4),
    ("h100:128x8", ("--config.mesh.fsdp=8",), 4),
    ("v5p:4x8x8", ("--config.mesh.fsdp=8",), 2),
)
HEAD = (
    f"{'topology':<12}{'mesh':<16}{'rows':>6}{'GB':>7}{'fits':>6}{'step ms':>9}{'MFU':>7}{'scaling':>9}"
    f"{'compile s':>11}"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all plans to a file")
    parser.add_argument("--only", action="append", help="plan this topology (may be repeated)")
    parser.add_argument("--compare", action="store_true", help="compare with plain attention and logits of all tokens")
    options = parser.parse_args()
    if options.compare:
        return compare()
    chosen = [plan for plan in PLANS if not options.only or plan[0] in options.only]
    print(HEAD)
    told = []
    for topology, mesh, rows in chosen:
        told.append(plan(f"--topology={topology}", f"--rows={rows}", *mesh))
        print(line(told[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return 0


def plan(*arguments: str, before: str = "") -> dict[str, Any]:
    """What `elm_jax.plan` says; `before` is run first, in its process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        code = f"{before}\nimport sys\nfrom elm_jax import cli, plan\nsys.exit(cli.guard(plan.main))"
        command = [sys.executable, "-c", code, *MODEL, f"--json={path}", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        return json.loads(path.read_text())


def line(told: dict[str, Any]) -> str:
    mesh, predicted = "x".join(str(size) for size in told["mesh"].values()), told["predicted"]
    return (
        f"{told['topology']:<12}{mesh:<16}{told['rows_per_step']:>6}{told['bytes_per_device']['total'] / 1e9:>7.1f}"
        f"{'yes' if told['fits'] else 'no':>6}{predicted['step_ms']:>9.0f}{predicted['mfu']:>7.1%}"
        f"{predicted['scaling_efficiency']:>9.1%}{told['compile_s']:>11.0f}"
    )


def compare() -> int:
    """Activations and temporaries of the fast step, and of one with plain attention and all logits at once."""
    where = ("--topology=h100:1x8", "--config.mesh.fsdp=8", "--rows=1")
    fast = plan(*where)
    whole = "from elm_jax.objectives import cross_entropy\ncross_entropy.CHUNK = 2**62"
    slow = plan(*where, "--config.llm.attention=xla", "--targets=4096", before=whole)
    ours, theirs = (told["bytes_per_device"]["activations_and_temporaries"] / 1e9 for told in (fast, slow))
    print(f"fused attention, logits of 512 supervised tokens: {ours:.2f} GB; logits of all tokens in the program: "
          f"{fast['checks']['logits_of_all_tokens']}; attention: {fast['attention']}")  # fmt: skip
    print(f"plain attention, logits of all 4096 tokens:       {theirs:.2f} GB; logits of all tokens in the program: "
          f"{slow['checks']['logits_of_all_tokens']}; attention: {slow['attention']}")  # fmt: skip
    print(f"ratio {ours / theirs:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
