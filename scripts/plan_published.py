"""Hold the roofline of `elm_jax.plan` against published training runs (scripts/published_runs.py).

    python scripts/plan_published.py --out tests/data/plan      # compiles them; needs jax[cuda12], no GPU; minutes
    python scripts/plan_published.py --read tests/data/plan     # predicts from the programs kept there
"""

from __future__ import annotations

import argparse
import lzma
import re
from pathlib import Path

from published_runs import RUNS, Run

from elm_jax.config import resolve
from elm_jax.planning import topology
from elm_jax.planning.hlo import Module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--out", type=Path, help="compile, and keep the programs in this folder")
    chosen.add_argument("--read", type=Path, help="the folder of programs compiled before")
    options = parser.parse_args()
    if options.out:
        topology.prepare(topology.parse(RUNS[0].topology))
        options.out.mkdir(parents=True, exist_ok=True)
        for run in RUNS:
            keep(run, options.out)
    print(f"{'run':<24}{'GPUs':>6}{'tokens/s measured':>19}{'predicted':>11}{'off':>8}")
    for run in RUNS:
        speed = run.predicted([read(options.out or options.read, name) for name in run.programs()])
        print(f"{run.name:<24}{run.devices:>6}{run.measured:>19,.0f}{speed:>11,.0f}{speed / run.measured - 1:>8.1%}")


def keep(run: Run, folder: Path) -> None:
    """Compile the programs of a run and write them, without what the cost model does not read."""
    from elm_jax.planning.report import Load, Planner

    for name, tree in run.programs().items():
        load = Load(rows=run.rows, signals=1, targets=run.tokens)
        plan = Planner(resolve(tree), topology.parse(run.topology), load).compiled()
        text = re.sub(r', metadata=\{[^{}]*\}|, frontend_attributes=\{[^{}]*\}|, stack_frame_id=\d+', "", plan.text)
        text = re.sub(r'"(?:force_earliest_schedule|reification_cost|device_type)":[^,}]*,?', "", text)
        (folder / f"{name}.hlo.xz").write_bytes(lzma.compress(text.encode(), preset=9))
        print(f"{name}: compiled in {plan.seconds:.0f} s", flush=True)


def read(folder: Path, name: str) -> Module:
    """A program that was kept."""
    return Module(lzma.decompress((folder / f"{name}.hlo.xz").read_bytes()).decode())


if __name__ == "__main__":
    main()
