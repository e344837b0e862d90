"""Our own loss curves: twenty steps of seven small runs, which a change of structure must leave bit for bit.

    python scripts/curves.py                 compare with the curves on record for this processor and jaxlib
    python scripts/curves.py --write         put this code's curves on record (a commit of them says why)
    python scripts/curves.py --against TREE  compare with the code of another clone, run here and now

The runs are `elm_jax.train` commands on generated ECGs, in float32 on the CPU. XLA's sums differ between processors and
versions, so there is one file for each pair (`tests/data/curves/<jaxlib>-<processor>.json`); one thread computes, so
that the number of cores changes nothing.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import compiling  # noqa: E402

from elm_jax.symbols.coder import EcgByte  # noqa: E402

RECORD = ROOT / "tests" / "data" / "curves" / f"{compiling.built_for()}.json"
STEPS = 20
COMMON = {
    "data.names": '["demo:train=64,val=8,test=8"]', "data.val_fraction": 0, "data.sampling_rate": 50,
    "data.segment_len": 500, "llm.scratch": '{"hidden":32,"layers":2,"heads":4,"kv_heads":2,"mlp":64,"max_len":128}',
    "encoder.config": '{"resnet_type":"resnet18","width":4}', "connector.hidden": 32, "train.batch_size": 8,
    "train.steps": STEPS, "train.log_every": 1, "train.save_every": STEPS, "eval.at_end": "false",
    "log.progress": "false",
}  # fmt: skip
ST_MEM = {"encoder.name": "st_mem", "encoder.config": '{"embed_dim":32,"depth":2,"num_heads":2}'}
NO_ENCODER = {"encoder.name": "None", "encoder.config": "{}", "update": "connector,llm", "connector.hidden": "None"}
SYMBOLS = {
    **NO_ENCODER, "elm": "ecg_byte", "update": "llm", "data.representation": "symbolic", "data.leads": "II",
    "data.min_ecg_tokens": 16, "data.max_len": 256, "data.ecg_tokenizer": "merges.json",
    "llm.scratch": '{"hidden":32,"layers":2,"heads":4,"kv_heads":2,"mlp":64,"max_len":512}',
}  # fmt: skip
GEMMA = {
    "llm.scratch": '{"family":"gemma2","hidden":32,"layers":4,"heads":4,"kv_heads":2,"head_dim":12,"mlp":48,'
    '"max_len":128,"window":16,"attention_cap":50.0,"logit_cap":30.0,"query_scalar":12.0}',
    "llm.lora.rank": 4, "llm.lora.dropout": 0.1, "update": "connector,llm",
}  # fmt: skip
CASES: dict[str, dict[str, object]] = {
    "llava_merl_trained": {},
    "st_mem_frozen_cached": {**ST_MEM, "update": "connector,llm", "encoder.cache": "true"},
    "conv_elf": {**NO_ENCODER, "elm": "conv_elf", "encoder.tokens": 20},
    "ecg_byte": SYMBOLS,
    "gemma2_lora": GEMMA,
    "two_ecgs": {"data.names": "two.jsonl", "data.max_len": 128},
    "mesh_2x2x2": {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
}
TEXTS = (("Which is faster?", "the first"), ("Are both regular?", "no"), ("Is the second one noisy?", "yes"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put these curves on record")
    parser.add_argument("--against", type=Path, help="another clone of the project")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    found = curves(ROOT, options.cases)
    if options.write:
        kept = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        RECORD.write_text(json.dumps(kept | found, indent=1) + "\n")
        print(f"written: {RECORD.relative_to(ROOT)}")
        return 0
    if options.against is None and not RECORD.exists():
        print(f"error: no curves on record for {RECORD.stem}; give --write, or --against TREE", file=sys.stderr)
        return 2
    expected = curves(options.against, options.cases) if options.against else json.loads(RECORD.read_text())
    return 1 if [case for case in options.cases if not same(case, found[case], expected[case])] else 0


def same(case: str, found: list[float], expected: list[float]) -> bool:
    apart = [i + 1 for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    told = "the same bits" if not apart else (
        f"others from step {apart[0]}: {found[apart[0] - 1]!r} was {expected[apart[0] - 1]!r}; at the end {found[-1]!r}"
    )  # fmt: skip
    print(f"{case}: {told}")
    return not apart


def curves(tree: Path, cases: list[str], python: tuple[str, ...] = (sys.executable,)) -> dict[str, list[float]]:
    """The losses of each case, run by the code in `tree`."""
    with TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder = Path(name)
        make_inputs(folder)
        return dict(zip(cases, pool.map(lambda case: curve(tree, case, folder, python), cases), strict=True))


def make_inputs(folder: Path) -> None:
    """Symbols' merges, and conversations about two ECGs."""
    letters = "klmnop"  # about the baseline
    EcgByte([(a + b).encode() for a in letters for b in letters]).save(folder / "merges.json")
    lines = [
        {
            "ecg_path": [f"demo:train:{2 * i}", f"demo:train:{2 * i + 1}"], "name": "pairs", "patient_id": f"p{i}",
            "text": [{"from": "human", "value": TEXTS[i % 3][0]}, {"from": "gpt", "value": TEXTS[i % 3][1]}],
        }
        for i in range(48)
    ]  # fmt: skip
    (folder / "two.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def curve(tree: Path, case: str, folder: Path, python: tuple[str, ...]) -> list[float]:
    workdir = folder / case
    flags = {**COMMON, **CASES[case], "workdir": workdir}
    devices = 8 if case.startswith("mesh") else 1
    environment = os.environ | {
        "PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu", "ELM_JAX_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1",
        "XLA_FLAGS": f"{compiling.FLAGS} --xla_cpu_multi_thread_eigen=false "
        f"--xla_force_host_platform_device_count={devices}",
    }  # fmt: skip
    command = ["-m", "elm_jax.train", f"--config={tree / 'elm_jax/configs/demo.py'}"]
    command += [f"--config.{key}={value}" for key, value in flags.items()]
    done = subprocess.run([*python, *command], env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr[-3000:]}")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


if __name__ == "__main__":
    sys.exit(main())
