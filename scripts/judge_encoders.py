"""Do encoders that were pretrained tell more of recordings than random ones, and do ELMs start from them?

    python scripts/judge_encoders.py --out runs/judged [--kinds st_mem,merl] [--real FOLDER]

Each kind is pretrained by its config of configs/pretrain_encoder, small and for minutes, on four leads of synthetic
recordings; judged on others beside a random encoder of the same sizes (`elm_jax.probe`); exported; and a small ELM
begins from the file. With --real, a folder with `ptbxl/` (PTB-XL's tables and recordings), it is pretrained on the
recordings of folds 1 to 5 as well, and judged on the patients of the other folds, fold by fold. merl's reports and its
text tower, a BERT of two layers that learns with it, are made here.

Prints a line of JSON: {kind: {data: {method: [[macro AUROC, low, high], the random one's]}}}, and a sentence; exits 1
where no method of a kind has an interval above the random encoder's, on the synthetic recordings.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from elm_jax.data.demo import demo_rhythm
from elm_jax.data.prepare.ptb_xl import entries
from elm_jax.models.encoders.text_tower import BERT, TextConfig, TextTower
from elm_jax.models.functional import structure_of

BLOCKS = {"embed_dim": 64, "depth": 2, "num_heads": 1, "decoder_embed_dim": 64, "decoder_depth": 1}
BLOCKS |= {"decoder_num_heads": 1, "mlp_ratio": 2.0}
SIZES = {
    "st_mem": BLOCKS, "mtae": BLOCKS, "mlae": BLOCKS,
    "merl": {"resnet_type": "resnet18", "width": 8, "proj_hidden": 64, "proj_out": 64},
}  # fmt: skip
SIGNALS = ("--config.data.sampling_rate=100", "--config.data.segment_len=1000", "--config.llm.compute_dtype=float32",
           "--config.data.leads=I,II,V2,V5")  # fmt: skip
TASK = ("--task", "demo", "--labels", "demo:train=600,val=200,test=1000")
QUIET = "--noconfig.log.progress"
# Classes in the words of the synthetic reports.
RHYTHMS = ("sinus rhythm", "atrial fibrillation")
PROMPTS = {
    "irregular": [f"atrial fibrillation rate {rate}" for rate in range(40, 150, 10)],
    "slow": [f"{rhythm} rate {rate}" for rhythm in RHYTHMS for rate in range(42, 60, 4)],
    "fast": [f"{rhythm} rate {rate}" for rhythm in RHYTHMS for rate in range(102, 150, 8)],
}
TOWER = {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 128, "max_position_embeddings": 16, "type_vocab_size": 2, "pad_token_id": 0}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/judged"), help="what is made of it")
    parser.add_argument("--kinds", default=",".join(SIZES), help=f"which: {', '.join(SIZES)}")
    parser.add_argument("--steps", type=int, default=1000, help="of each pretraining, of 32 recordings")
    parser.add_argument("--real", type=Path, help="folder with ptbxl/; usually $ELM_JAX_SHARED/real/ecg")
    options = parser.parse_args()
    shared = os.environ.get("ELM_JAX_SHARED")
    real = options.real or (Path(shared, "real", "ecg") if shared else None)
    options.out.mkdir(parents=True, exist_ok=True)
    found = {kind: judged(kind, options.out.resolve(), options.steps, real) for kind in options.kinds.split(",")}
    apart = {kind: [name for name, pair in data["synthetic"].items() if above(pair)] for kind, data in found.items()}
    print(json.dumps(found))
    for kind, methods in apart.items():
        print(f"{kind}: above a random encoder, intervals apart, by {', '.join(methods) or 'no method'}")
    sys.exit(0 if all(apart.values()) else 1)


def above(pair: Any) -> bool:
    """Whether the first interval is wholly above the second."""
    return pair[0][1] > pair[1][2]


def judged(kind: str, out: Path, steps: int, real: Path | None) -> dict[str, Any]:
    """Pretrain, judge, export, and begin an ELM."""
    run, root = out / kind, out if real is None else real.resolve()
    train = write_records(out / "records.jsonl", real)
    flags = [f"--config.encoder.config={json.dumps(SIZES[kind])}", f"--config.data.names=('{train}',)"]
    if kind == "merl":
        flags += [f"--config.ssl.text={tower(out / 'tower')}", "--config.ssl.frozen_layers=0"]
        flags += ["--config.data.max_len=8"]
    command(
        "train", "--config", f"configs/pretrain_encoder/{kind}.py", f"--config.workdir={run}", *flags, *SIGNALS, QUIET,
        f"--config.data.root={root}", "--config.data.val_fraction=0.01", "--config.data.augment_ecg=false",
        f"--config.train.steps={steps}", "--config.train.batch_size=32", f"--config.train.eval_every={steps}",
        "--config.train.epochs=1", f"--config.train.save_every={steps}", "--config.optim.lr=2e-3",
        "--config.optim.warmup_steps=50",
    )  # fmt: skip
    (out / "prompts.json").write_text(json.dumps(PROMPTS))
    prompts = "--prompts", str(out / "prompts.json")
    command("probe", "--checkpoint", str(run), *TASK, "--random", "--fractions", "10,100", *prompts, QUIET)
    found = {"synthetic": read(run / "probe" / "demo.json")}
    if real is not None:
        held = write_held_out(out / "held_out.csv", real)
        where = "--labels", str(held), "--root", str(root), "--folds", "5"
        command("probe", "--checkpoint", str(run), *where, "--random", "--fractions", "100", QUIET)
        found["real"] = read(run / "probe" / "held_out.json")
    command("export", "--checkpoint", str(run), "--out", str(out / f"{kind}_exported"))
    own = {name: value for name, value in SIZES[kind].items() if not name.startswith("proj")}
    command(
        "train", "--config", "configs/demo.py", f"--config.workdir={out / f'{kind}_elm'}", *SIGNALS, QUIET,
        f"--config.encoder.name={kind}", f"--config.encoder.config={json.dumps(own)}", "--config.encoder.tokens=1",
        f"--config.encoder.checkpoint={out / f'{kind}_exported' / 'encoder.safetensors'}", "--config.train.steps=2",
        "--config.data.names=('demo:train=64,val=8,test=8',)", "--noconfig.eval.at_end",
    )  # fmt: skip
    return found


def write_records(path: Path, real: Path | None) -> Path:
    """Synthetic recordings with reports, and those of PTB-XL's folds 1 to 5, thirty times each."""
    rows = [(f"demo:train:{i}", said(f"demo:train:{i}"), f"demo{i}") for i in range(16_000)]
    if real is not None:
        kept = [(f"ptbxl/{file}", entry) for entry, file in entries(real / "ptbxl") if entry.strat_fold <= 5]
        rows += 30 * [(file, entry.report, entry.patient) for file, entry in kept]
    lines = [json.dumps({"ecg_path": ecg, "text": "", "report": text, "patient_id": who}) for ecg, text, who in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def said(ecg: str) -> str:
    """The report of a synthetic recording."""
    rhythm = demo_rhythm(ecg)
    return f"{'sinus rhythm' if rhythm.regular else 'atrial fibrillation'} rate {rhythm.heart_rate}"


def write_held_out(path: Path, real: Path) -> Path:
    """The superclasses of the recordings of PTB-XL's folds 6 to 10."""
    from elm_jax.data.labels import read_labels

    held = {file for entry, file in entries(real / "ptbxl") if entry.strat_fold > 5}
    rows = [r for r in read_labels("ptbxl_super", str(real / "ptbxl")).records if r.path in held]
    lines = [f"ptbxl/{r.path},{';'.join(sorted(r.labels))},{r.patient}" for r in rows]
    path.write_text("\n".join(["ecg_path,labels,patient_id", *lines]) + "\n")
    return path


def tower(folder: Path) -> Path:
    """A small BERT as it is drawn, with a tokenizer of the words of synthetic reports and of letters."""
    if folder.is_dir():
        return folder
    words = ["sinus", "rhythm", "atrial", "fibrillation", "rate", *map(str, range(30, 200))]
    letters = [f"{before}{chr(c)}" for before in ("", "##") for c in range(ord("a"), ord("z") + 1)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words, *letters]
    backend = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    controls = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **controls).save_pretrained(folder)
    config = TOWER | {"vocab_size": len(tokens)}
    (folder / "config.json").write_text(json.dumps(config))
    fields, rng, tensors = BERT.fields_of(config, "config.json"), np.random.default_rng(0), {}
    for name, leaf in structure_of(lambda: TextTower(TextConfig.from_fields(fields), rngs=nnx.Rngs(0))).leaves.items():
        rule = BERT.rule(name)
        for theirs in rule.names(leaf.shape):
            values = 0.05 * rng.standard_normal(rule.their_shape(leaf.shape), dtype=np.float32)
            tensors[theirs] = values + np.float32(name.endswith("scale"))
    save_file(tensors, folder / "model.safetensors")
    return folder


def read(path: Path) -> dict[str, Any]:
    """{method: [[macro AUROC, low, high] of the encoder, of the random one]}."""
    ours, control = json.loads(path.read_text())["encoders"]

    def three(encoder: Any, method: str) -> list[float]:
        found = encoder["methods"][method]["macro_auc"]
        return [round(x, 4) for x in (found["value"], *found["ci95"])]

    return {method: [three(ours, method), three(control, method)] for method in ours["methods"]}


def command(name: str, *arguments: str) -> None:
    print(f"elm_jax.{name} {' '.join(arguments)}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", f"elm_jax.{name}", *arguments], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
