"""Do encoders that were pretrained tell more of recordings than random ones, and do ELMs start from them?

    python scripts/judge_encoders.py --out runs/judged [--kinds st_mem,merl] [--real FOLDER]

Each kind is pretrained by its config of configs/pretrain_encoder, small and for minutes, on synthetic recordings;
judged on others beside a random encoder of the same sizes (`elm_jax.probe`); exported; and a small ELM begins from the
file. merl's reports and its text tower, a BERT of two layers that learns with it, are made here; its ELM learns for
a while with the encoder frozen, and is asked with its own and with other patients' ECGs: the signal dependence.

With --real, a folder with `ptbxl/` (PTB-XL's tables and recordings), it is pretrained twice, with the recordings of
folds 1 to 5 as well, and with those of folds 6 to 10. Each half of the patients is then judged by the encoder, and by
the linear probes, that the other half taught, so that every recording tests once.

Prints a line of JSON, {kind: {"synthetic": {method: [[macro AUROC, low, high], the random one's]}, "real": the same and
the difference, "elm": [signal dependence, low, high]}}, and sentences; exits 1 where, on the synthetic recordings, the
linear probe of an encoder is not above that of the random one by intervals apart, or an ELM that learns does not depend
on the ECG.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from machine import machine
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from elm_jax import export, probe, train
from elm_jax.cli import ConfigFlags
from elm_jax.data.demo import demo_rhythm
from elm_jax.data.labels import read_labels
from elm_jax.data.prepare.ptb_xl import entries
from elm_jax.evaluation.encoders import embeddings, open_encoder, random_encoder
from elm_jax.models.encoders.text_tower import BERT, TextConfig, TextTower
from elm_jax.models.functional import structure_of
from elm_jax.scoring.probing import apply_head, judge, logistic_heads, macro_auroc, standardised
from elm_jax.scoring.statistics import Patients, ci95


@dataclass(frozen=True)
class Kind:
    """How a kind is pretrained. steps: of 32 recordings; signals: what it reads, its ELM too; elm_steps: of the ELM."""

    sizes: Mapping[str, Any]
    steps: int
    signals: tuple[str, ...]
    flags: tuple[str, ...] = ()
    elm_steps: int = 2


BLOCKS = {"embed_dim": 64, "depth": 2, "num_heads": 1, "decoder_embed_dim": 64, "decoder_depth": 1}
BLOCKS |= {"decoder_num_heads": 1, "mlp_ratio": 2.0}
FOUR = ("--config.data.leads=I,II,V2,V5",)
Z_SCORES = ("--config.data.normalize=lead_zscore",)  # leads of one size: the error of each that is hidden counts alike
HALF = ("--config.ssl.mask_ratio=0.5",)
KINDS = {
    "st_mem": Kind(BLOCKS | {"patch_size": 25}, 2000, FOUR),
    "mtae": Kind(BLOCKS, 1500, FOUR, HALF),
    "mlae": Kind(BLOCKS, 1500, FOUR + Z_SCORES, (*HALF, "--config.optim.lr=4e-3")),
    "mae_vit": Kind(
        {"d_model": 64, "n_heads": 4, "dim_ff": 128, "num_layers": 2, "num_decoder_layers": 1}, 2000, FOUR + Z_SCORES,
        HALF,
    ),
    "merl": Kind(
        {"resnet_type": "resnet18", "width": 8, "proj_hidden": 64, "proj_out": 64}, 600, FOUR,
        ("--config.ssl.frozen_layers=0", "--config.data.max_len=8"), 400,
    ),
}  # fmt: skip
SIGNALS = ("--config.data.sampling_rate=50", "--config.data.segment_len=500", "--config.llm.compute_dtype=float32")
TASK = ("--task", "demo", "--labels", "demo:train=600,val=200,test=2000")
QUIET = "--noconfig.log.progress"
HALVES = (range(1, 6), range(6, 11))  # folds of PTB-XL
PROMISED = "linear, 100 %"
DATA = ("synthetic", "real")
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
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"which: {', '.join(KINDS)}")
    parser.add_argument("--real", type=Path, help="folder with ptbxl/; usually $ELM_JAX_SHARED/real/ecg")
    options = parser.parse_args()
    shared = os.environ.get("ELM_JAX_SHARED")
    real = options.real or (Path(shared, "real", "ecg") if shared else None)
    options.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for kind in options.kinds.split(","):
        found[kind] = judged(kind, options.out.resolve(), None if real is None else real.resolve())
        print(json.dumps({kind: found[kind]}), file=sys.stderr, flush=True)
    print(json.dumps(found | {"machine": machine("jax")}))
    good = True
    for kind, each in found.items():
        held = above(each["synthetic"][PROMISED]) and (KINDS[kind].elm_steps == 2 or each["elm"][1] > 0)
        said = {name: "apart" if above(each[name][PROMISED]) else "that touch" for name in DATA if name in each}
        print(f"{kind}: {'as' if held else 'not as'} promised; intervals of the linear probe: {said}")
        good &= held
    sys.exit(0 if good else 1)


def above(pair: Sequence[Sequence[float]]) -> bool:
    """Whether the first interval is wholly above the second."""
    return pair[0][1] > pair[1][2]


def judged(kind: str, out: Path, real: Path | None) -> dict[str, Any]:
    """Pretrain, judge, export, and begin an ELM."""
    how, begun = KINDS[kind], time.time()
    runs = [pretrained(kind, out, real, 0)]
    (out / "prompts.json").write_text(json.dumps(PROMPTS))
    prompts = "--prompts", str(out / "prompts.json")
    command("probe", "--checkpoint", str(runs[0]), *TASK, "--random", "--fractions", "10,100", *prompts, QUIET)
    found: dict[str, Any] = {"synthetic": read(runs[0] / "probe" / "demo.json")}
    command("export", "--checkpoint", str(runs[0]), "--out", str(out / f"{kind}_exported"))
    own = {name: value for name, value in how.sizes.items() if not name.startswith("proj")}
    elm = out / f"{kind}_elm"
    command(
        "train", "--config", "configs/demo.py", f"--config.workdir={elm}", *SIGNALS, *how.signals, QUIET,
        f"--config.encoder.name={kind}", f"--config.encoder.config={json.dumps(own)}", "--config.encoder.tokens=1",
        f"--config.encoder.checkpoint={out / f'{kind}_exported' / 'encoder.safetensors'}",
        "--config.update=connector,llm", f"--config.train.steps={how.elm_steps}",
        f"--config.data.names=('demo:train={16 * how.elm_steps},val=16,test=200',)",
        "--config.eval.controls=('shuffled',)", f"--config.eval.at_end={how.elm_steps > 2}",
    )  # fmt: skip
    if how.elm_steps > 2:
        (metrics,) = (elm / "eval").glob("*/metrics.json")
        depends = json.loads(metrics.read_text())["signal_dependence"]
        found["elm"] = rounded([depends["value"], *depends["ci95"]])
    if real is not None:
        found["real"] = crossed([*runs, pretrained(kind, out, real, 1)], real)
    return found | {"seconds": round(time.time() - begun)}


def pretrained(kind: str, out: Path, real: Path | None, half: int) -> Path:
    """The run of a kind, on synthetic recordings and those of a half of PTB-XL's folds."""
    how, run = KINDS[kind], out / f"{kind}_{half}"
    records = write_records(out / f"records_{half}.jsonl", real, HALVES[half])
    flags = [f"--config.ssl.text={tower(out / 'tower')}"] if kind == "merl" else []
    command(
        "train", "--config", f"configs/pretrain_encoder/{kind}.py", f"--config.workdir={run}", *flags, *SIGNALS,
        *how.signals, QUIET, f"--config.encoder.config={json.dumps(how.sizes)}",
        f"--config.data.names=('{records}',)", f"--config.data.root={real or out}", "--config.data.val_fraction=0.01",
        "--config.data.augment_ecg=false", f"--config.train.steps={how.steps}", "--config.train.batch_size=32",
        f"--config.train.eval_every={how.steps}", f"--config.train.save_every={how.steps}", "--config.optim.lr=2e-3",
        "--config.optim.warmup_steps=50", *how.flags,
    )  # fmt: skip
    return run


def crossed(runs: Sequence[Path], real: Path) -> dict[str, Any]:
    """PTB-XL's superclasses, each half of its folds by the encoder and the linear probes that the other half taught.

    The penalty is what is best within the folds that teach.
    """
    table, of_path = read_labels("ptbxl_super", str(real / "ptbxl")), dict[str, int]()
    of_path |= {path: entry.strat_fold for entry, path in entries(real / "ptbxl")}
    fold = np.array([of_path[record.path] for record in table.records])
    true = np.array([[name in record.labels for name in table.classes] for record in table.records], float)
    scores = np.zeros((2, *true.shape))
    for run, half in zip(runs, HALVES, strict=True):
        encoder = open_encoder(str(run), ConfigFlags.parse([]), "latest")
        for own, one in zip(scores, (encoder, random_encoder(encoder)), strict=True):
            records, features = embeddings(one, table, False)
            assert len(records) == len(fold)
            taught, inside = np.isin(fold, half), []
            for held in half:
                mine, others = fold == held, taught & (fold != held)
                known, asked = standardised(features[others], features[mine])
                inside.append(np.stack([apply_head(asked, head) for head in logistic_heads(known, true[others])]))
            order = np.concatenate([np.flatnonzero(fold == held) for held in half])
            areas = [macro_auroc(each, true[order]) for each in np.concatenate(inside, axis=1)]
            known, asked = standardised(features[taught], features[~taught])
            own[~taught] = apply_head(asked, logistic_heads(known, true[taught])[int(np.argmax(areas))])
    patients = Patients([record.patient for record in table.records])
    both = [judge(own, own > 0, true, list(table.classes), patients) for own in scores]
    values = [rounded([one.report["macro_auc"]["value"], *one.report["macro_auc"]["ci95"]]) for one in both]
    by = [values[0][0] - values[1][0], *ci95(both[0].macro_aucs - both[1].macro_aucs)]
    return {PROMISED: values, "difference": rounded(by), "recordings": len(fold)}


def rounded(values: Sequence[float]) -> list[float]:
    return [round(float(value), 4) for value in values]


def write_records(path: Path, real: Path | None, folds: Sequence[int]) -> Path:
    """Synthetic recordings with reports, and those of these folds of PTB-XL, thirty times each."""
    rows = [(f"demo:train:{i}", said(f"demo:train:{i}"), f"demo{i}") for i in range(16_000)]
    if real is not None:
        kept = [(f"ptbxl/{file}", entry) for entry, file in entries(real / "ptbxl") if entry.strat_fold in folds]
        rows += 30 * [(file, entry.report, entry.patient) for file, entry in kept]
    lines = [json.dumps({"ecg_path": ecg, "text": "", "report": text, "patient_id": who}) for ecg, text, who in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def said(ecg: str) -> str:
    """The report of a synthetic recording."""
    rhythm = demo_rhythm(ecg)
    return f"{'sinus rhythm' if rhythm.regular else 'atrial fibrillation'} rate {rhythm.heart_rate}"


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
        return rounded([found["value"], *found["ci95"]])

    return {method: [three(ours, method), three(control, method)] for method in ours["methods"]}


def command(name: str, *arguments: str) -> None:
    """`python -m elm_jax.NAME`, in this process: what is imported and compiled is so for all."""
    print(f"elm_jax.{name} {' '.join(arguments)}", file=sys.stderr, flush=True)
    with redirect_stdout(sys.stderr):
        if name == "train":
            train.main(ConfigFlags.parse([*arguments]).load())
        else:
            {"probe": probe, "export": export}[name].main(arguments)


if __name__ == "__main__":
    main()
