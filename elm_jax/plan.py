"""Compile the train step for hardware that is not there, and say whether it fits and how fast it would be.

    python -m elm_jax.plan --config configs/demo.py --topology cpu:8 --config.mesh.fsdp=8
    python -m elm_jax.plan --config configs/llava_merl.py --topology h100:16x8 --config.mesh.fsdp=8 --rows 2
    python -m elm_jax.plan --config configs/llava_merl.py --topology v5p:4x4x4 --search --json plan.json

No weights and no data are read: shapes come from the config and from --rows, --signals and --targets. What compiles
for NVIDIA is in jax[cuda12], for TPUs in jax[tpu]; no device is needed. docs/scaling.md says how the prediction is
made and how far it can be trusted.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from elm_jax import cli
from elm_jax.errors import UserError

if TYPE_CHECKING:
    from elm_jax.planning.report import Plan


def main(argv: Sequence[str]) -> None:
    """Parse the arguments, plan, print and write the result."""
    flags, options = _parser().read(argv)
    from elm_jax.planning import topology

    where, config = topology.parse(options.topology), flags.load()
    for path in (options.json, options.hlo):
        if path and (path.is_dir() or not path.absolute().parent.is_dir()):
            found = "a folder" if path.is_dir() else f"no folder {path.parent}"
            raise UserError(str(path), found, "a file in a folder that exists", "name another, or make the folder")
    topology.prepare(where)
    from elm_jax.planning.report import Load, Planner

    planner = Planner(config, where, Load(options.rows, options.signals, options.targets, options.key_blocks or 0))
    plans = planner.search() if options.search else [planner.plan()]
    if options.search:
        print(_table(plans), end="\n\n")
    best = plans[0]
    print(_report(best))
    if options.json:
        options.json.write_text(json.dumps(best.json(), indent=2) + "\n", encoding="utf-8")
    if options.hlo:
        options.hlo.write_text(best.compiled.text, encoding="utf-8")


def _parser() -> cli.Parser:
    parser = cli.Parser("plan", description=__doc__)
    parser.add_argument("--topology", required=True, help="h100:NODESxGPUS, v5p:XxYxZ, v5e:XxY or cpu:DEVICES")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the plan to a file too")
    parser.add_argument("--hlo", metavar="FILE", type=Path, help="write the compiled program to a file")
    parser.add_argument("--search", action="store_true", help="try the meshes that may fit, and plan the fastest")
    parser.add_argument("--rows", metavar="N", type=_count, help="rows of a micro-batch for each device")
    parser.add_argument("--signals", metavar="N", type=_count, help="ECGs of a row (default: one for 512 tokens)")
    parser.add_argument("--targets", metavar="N", type=_count, help="supervised tokens of a row (default: an eighth)")
    parser.add_argument(
        "--key-blocks", metavar="N", type=_count,
        help="blocks of 64 keys that a block of queries sees at most, as in rows of many conversations (default: all)",
    )  # fmt: skip
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError
    return int(text)


_count.__name__ = "a whole number, at least 1"


def _table(plans: "list[Plan]") -> str:
    lines = [f"{'data':>6}{'fsdp':>6}{'tensor':>8}{'fits':>6}{'GB':>8}{'step ms':>10}{'MFU':>8}{'scaling':>9}"]
    for plan in plans:
        data, fsdp, tensor = plan.compiled.mesh.shape.values()
        lines.append(
            f"{data:>6}{fsdp:>6}{tensor:>8}{'yes' if plan.fits else 'no':>6}{plan.compiled.bytes.total / 1e9:>8.1f}"
            f"{1000 * plan.times.total:>10.1f}{plan.mfu:>8.1%}{plan.scaling:>9.1%}"
        )
    return "\n".join(lines)


def _report(plan: "Plan") -> str:
    told, compiled, times = plan.json(), plan.compiled, plan.times
    held, usable = compiled.bytes, plan.topology.hardware.memory
    mesh = ", ".join(f"{axis} {size}" for axis, size in told["mesh"].items())
    lines = [
        f"{plan.topology.name}: {mesh}; {compiled.rows} rows of {compiled.shape.tokens} tokens a step; "
        f"compiled in {compiled.seconds:.0f} s",
        f"memory        {_size(held.total)} a device, of {_size(usable)} usable: "
        + ("it fits" if plan.fits else "IT DOES NOT FIT"),
        f"              parameters {_size(held.parameters)}, optimizer {_size(held.optimizer)}, activations and "
        f"temporaries {_size(held.activations_and_temporaries)}",
        f"arithmetic    {told['flops_per_step'] / 1e12:.3g} TFLOP a step, recomputation included; attention: "
        f"{compiled.attention}",
    ]
    for kind, entry in sorted(told["collectives"].items()):
        lines.append(f"{kind:<20}{entry['count']:>6} a step, {_size(entry['bytes'])} a device")
    lines += [
        f"predicted     {1000 * times.total:.1f} ms a step, {plan.tokens_per_second:,.0f} tokens/s a device, MFU "
        f"{plan.mfu:.1%}, {plan.scaling:.1%} of {plan.baseline.name}'s speed a device",
        f"              products {1000 * times.products:.1f} ms, attention {1000 * times.attention:.1f}, other "
        f"{1000 * times.other:.1f}, waiting for links {1000 * times.exposed:.1f}",
    ]
    checks = told["checks"]
    for what in ("replicated_parameters", "all_reduced_weights"):
        if checks[what] and plan.topology.hardware.platform != "cpu":  # which has no reduce-scatter
            lines.append(f"warning: {what.replace('_', ' ')}: {', '.join(checks[what])}")
    return "\n".join(lines)


def _size(count: float) -> str:
    """Bytes in words."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count / 1e3:.1f} kB"


if __name__ == "__main__":
    sys.exit(cli.guard(main))
