"""How long the train step takes to compile by the number of layers; prints docs/benchmarks.md's table.

    python scripts/bench_compile.py [--layers 4 28] [--unrolled] [--repeat 3] [--json FILE]

The decoder has the sizes of Qwen2.5-1.5B but for its layers and its vocabulary, which is the demo's; rows have 1024
tokens. It and the connector that reads the signal are trained, and there is no encoder: its share of the time would be
the same for any decoder. No array is made. Each compilation has a process of its own, without
a cache of compiled programs; the figure is the least of several, in processor seconds, which other work on the machine
changes little, and in wall-clock seconds.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import machine

SIZES = {"hidden": 1536, "heads": 12, "kv_heads": 2, "mlp": 8960, "max_len": 1024}
TOKENS, SIGNALS, TARGETS = 1024, 4, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 28])
    parser.add_argument("--unrolled", action="store_true", help="each number of layers without the scan, too")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("LAYERS", "SCAN"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(_compile(int(args.one[0]), args.one[1] == "True")))
        return
    rows = [_least(layers, scan, args.repeat) for scan in ([True, False] if args.unrolled else [True])
            for layers in args.layers]  # fmt: skip
    result = {"machine": machine("jax"), "tokens": TOKENS, "sizes": SIZES, "rows": rows}
    _print(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _least(layers: int, scan: bool, repeat: int) -> dict[str, Any]:
    """The least of each time over some processes."""
    found = []
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    for _ in range(repeat):
        command = [sys.executable, __file__, "--one", str(layers), str(scan)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"error: {layers} layers, scan={scan}:\n{done.stderr[-3000:]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return {"layers": layers, "scan": scan, **{name: min(one[name] for one in found) for name in found[0]}}


def _compile(layers: int, scan: bool) -> dict[str, float]:
    from elm_jax import cli
    from elm_jax.assemble import assemble
    from elm_jax.config import resolve
    from elm_jax.data.batch import BatchShape
    from elm_jax.runtime.mesh import make_mesh
    from elm_jax.training.program import train_program

    tree, _ = cli.read_config_file("configs/demo.py")
    tree["llm"] |= {"scratch": {**SIZES, "layers": layers}, "scan": scan, "remat": "dots", "compute_dtype": "bfloat16"}
    tree |= {"elm": "base_elf", "update": ("connector", "llm")}
    tree["encoder"] |= {"name": None, "config": {}}
    tree["connector"]["hidden"] = None
    tree["data"]["max_len"] = TOKENS
    tree["train"]["batch_size"] = 1
    config = resolve(tree)
    mesh = make_mesh(config.mesh)
    program = train_program(assemble(config), mesh, 1000)
    clocks = [(time.process_time(), time.perf_counter())]
    lowered = program.step.lower(program.state, program.frozen, program.batch(BatchShape(TOKENS, SIGNALS, TARGETS)))
    clocks.append((time.process_time(), time.perf_counter()))
    lowered.compile()
    clocks.append((time.process_time(), time.perf_counter()))
    cpu, wall = zip(*clocks, strict=True)
    return {
        "trace_cpu_s": cpu[1] - cpu[0], "compile_cpu_s": cpu[2] - cpu[1], "cpu_s": cpu[2] - cpu[0],
        "wall_s": wall[2] - wall[0],
    }  # fmt: skip


def _print(result: dict[str, Any]) -> None:
    print(f"{result['machine']}\n")
    print("| layers | | tracing, processor s | compiling, processor s | both | wall clock s | by the first row |")
    print("|---|---|---|---|---|---|---|")
    for row in result["rows"]:
        first = next(one for one in result["rows"] if one["scan"] == row["scan"])
        kind = "scan" if row["scan"] else "unrolled"
        times = " | ".join(f"{row[name]:.1f}" for name in ("trace_cpu_s", "compile_cpu_s", "cpu_s", "wall_s"))
        print(f"| {row['layers']} | {kind} | {times} | {row['cpu_s'] / first['cpu_s']:.2f} |")


if __name__ == "__main__":
    main()
