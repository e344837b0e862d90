"""One train step on every mesh of 8 fake CPU devices: equal to one device, and what the compiled program moves.

    python scripts/bench_mesh.py [--mesh 2,2,2 ...] [--heads 8 8] [--json FILE]

A small decoder behind the ELF patch connector, in float32, on conversations of the demo. For each mesh (data, fsdp,
tensor): how far the loss and the gradients are from those of one device (the largest difference in an array, by the
array's largest gradient), the bytes of the compiled step's arguments and temporaries on a device, and its collectives:
bytes on a device, and how often one runs. Nothing is timed (so code is not optimised, which compiles faster). A mesh
that does not fit the model is shown with the advice.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

DEVICES = 8
MESHES = ("1,1,1", "8,1,1", "1,8,1", "2,4,1", "4,1,2", "1,4,2", "2,2,2", "1,1,8")
SIZES = {"hidden": 128, "layers": 4, "mlp": 512, "max_len": 256}
ROWS = 8
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
Gradients = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", nargs="+", default=list(MESHES), help="data,fsdp,tensor; the first is compared with")
    parser.add_argument("--heads", type=int, nargs=2, default=(8, 8), metavar=("HEADS", "KV"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    told = measured([tuple(int(n) for n in mesh.split(",")) for mesh in args.mesh], tuple(args.heads))
    print(f"{told['versions']}; {told['parameters']:,} parameters, batch {told['batch']}\n")
    print(table(told["meshes"]))
    if args.json:
        args.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    if any(row.get("gradients", 0) > 1e-5 for row in told["meshes"]):
        sys.exit("error: gradients differ by more than 1e-5 of scale")


def measured(meshes: list[tuple[int, ...]], heads: tuple[int, ...]) -> dict[str, Any]:
    """The rows of the table, and what they are of."""
    import jax
    import numpy as np

    from elm_jax.assemble import assemble
    from elm_jax.config import MeshConfig
    from elm_jax.data.loader import StepSource
    from elm_jax.data.plan import Plan
    from elm_jax.errors import UserError
    from elm_jax.run.weights import Weights
    from elm_jax.runtime.mesh import array_shardings, make_mesh

    config = _config(heads)
    assembly = assemble(config)
    dataset = assembly.dataset("train")
    with tempfile.TemporaryDirectory() as folder:
        index = dataset.length_index(config.data.share, 0.0, Path(folder), False)
    plan = Plan(index, rows=ROWS, max_len=config.data.max_len, pack=True, seed=0)
    batch = StepSource(dataset, plan, steps=1)[0].batch
    one = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    arrays = jax.device_get(Weights(assembly).place(array_shardings(assembly.structure, one)))
    rows, expected = [], None
    for sizes in meshes:
        name = ",".join(map(str, sizes))
        try:
            mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
            row, found = _row(assembly, mesh, batch, arrays)
        except UserError as error:
            rows.append({"mesh": name, "refused": str(error)})
            continue
        expected = expected or found
        rows.append({"mesh": name, **_differences(found, expected), **row})
        print(f"{name} done", file=sys.stderr)
    return {
        "versions": f"Python {sys.version.split()[0]}, jax {version('jax')}",
        "parameters": sum(x.size for x in arrays.values()), "batch": list(batch.tokens.shape), "meshes": rows,
    }  # fmt: skip


def _config(heads: tuple[int, ...]) -> Any:
    from elm_jax import cli
    from elm_jax.config import resolve

    tree, _ = cli.read_config_file("configs/demo.py")
    tree["llm"] |= {
        "scratch": {**SIZES, "heads": heads[0], "kv_heads": heads[1]}, "remat": "dots", "compute_dtype": "float32",
    }  # fmt: skip
    tree |= {"elm": "base_elf", "update": ("connector", "llm")}
    tree["encoder"] |= {"name": None, "config": {}, "tokens": 1}
    tree["connector"]["hidden"] = None
    tree["data"] |= {"names": ("demo:train=200,val=8,test=8",), "max_len": SIZES["max_len"]}
    tree["train"]["batch_size"] = ROWS
    return resolve(tree)


def _row(assembly: Any, mesh: Any, batch: Any, arrays: Gradients) -> tuple[dict[str, Any], tuple[float, Gradients]]:
    """What the compiled step is; the loss and the gradients on this mesh."""
    import jax

    from elm_jax.data.batch import BatchShape
    from elm_jax.models.hints import placed
    from elm_jax.planning.hlo import Module, collectives
    from elm_jax.runtime.mesh import MeshPlacement, array_shardings, batch_sharding, check_heads
    from elm_jax.training.program import check_rows, train_program
    from elm_jax.training.step import loss_and_gradients

    check_heads(mesh, assembly.llm)
    check_rows(assembly.config, mesh)
    shape = BatchShape(batch.tokens.shape[-1], batch.signal_weights.shape[-1], batch.target_ids.shape[-1])
    program = train_program(assembly, mesh, 1000)
    compiled = program.step.lower(program.state, program.frozen, program.batch(shape)).compile()
    memory = compiled.memory_analysis()
    moved = {kind: {"bytes": 0, "count": 0} for kind in KINDS}
    for one in collectives(Module(compiled.as_text()), mesh.size):
        moved[one.kind]["bytes"] += one.payload * one.count
        moved[one.kind]["count"] += one.count
    shardings = array_shardings(assembly.structure, mesh)

    def run(arrays: Any, batch: Any) -> Any:
        with placed(MeshPlacement(mesh)):
            loss, gradients, *_ = loss_and_gradients(assembly.structure, arrays, {}, {}, batch)
        return loss, gradients

    step: Callable[..., Any] = jax.jit(run, out_shardings=(None, shardings))
    there = {name: jax.device_put(x, shardings[name]) for name, x in arrays.items()}
    loss, gradients = jax.device_get(step(there, jax.device_put(batch, batch_sharding(mesh))))
    told = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes, "collectives": moved}
    return told, (float(loss), gradients)


def _differences(found: tuple[float, Gradients], expected: tuple[float, Gradients]) -> dict[str, float]:
    import numpy as np

    errors = [np.abs(found[1][n] - g).max() / max(np.abs(g).max(), 1e-30) for n, g in expected[1].items()]
    return {"loss": abs(found[0] - expected[0]), "gradients": float(max(errors))}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; megabytes of a device."""
    lines = [f"| data, fsdp, tensor | loss | gradients | arguments MB | temporaries MB | {' | '.join(KINDS)} |"]
    lines.append("|---" * (5 + len(KINDS)) + "|")
    for row in rows:
        if "refused" in row:
            lines.append(f"| {row['mesh']} | {row['refused']} |" + " |" * (3 + len(KINDS)))
            continue
        moved = [row["collectives"][kind] for kind in KINDS]
        cells = [f"{one['bytes'] / 1e6:.1f} MB in {one['count']}" if one["count"] else "-" for one in moved]
        held = f"{row['arguments'] / 1e6:.1f} | {row['temporaries'] / 1e6:.1f}"
        lines.append(f"| {row['mesh']} | {row['loss']:.1g} | {row['gradients']:.1g} | {held} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
