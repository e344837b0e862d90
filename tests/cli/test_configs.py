"""Every shipped config, its models made small and its data real: it learns and evaluates; a kind of each goes on."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elm_jax.cli import ConfigFlags

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "elm_jax" / "configs"
SHARED_SETTINGS = ("base", "ecg_qa", "st_mem_full_training/recipe")  # no experiments of their own
REFERENCE = "reference"  # the same models with the reference's settings: test_reference_recipe.py
ALONE = "pretrain_encoder"  # encoders without an LLM: tests/unit/test_self_supervised.py
OF_ANSWERS = ("dpo", "rl/dapo", "rl/grpo", "rl/sapo")  # need a model that answers: tests/unit/test_policy.py
OF_PARTS = ("ecg_lm",)  # what llava_merl has, and parts that tests/unit/test_any_leads.py and test_lora.py try
STAGES = [f"st_mem_full_training/stage{n}" for n in (1, 2, 3, 4)]
# One of each way in which an ECG enters, and of each phase: these go on, too, and show their attention.
WAYS = ("llava_merl", "llava_st_mem", "llava_clip", "elf_base", "elf_patch", "elf_conv", "ecg_byte", STAGES[0])
STEPS = 24
LLM = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "mlp": 64, "max_len": 1024}
IMAGES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
MAE = {"embed_dim": 32, "depth": 2, "num_heads": 2}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
COCA = {"width": 32, "layers": 1, "heads": 2, "embed_dim": 8}
CLIP = IMAGES | {"image_size": 32, "patch_size": 16}
TWO_VIEWS = {
    "encoders": {"image": {"name": "clip_patches", "tokens": 4, "config": CLIP}}, "encoder.tokens": 11,
    "data.sampling_rate": 250, "llm.chat": None,
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "gem": COCA,
    "ecg_r1_style": COCA,
    "pulse": CLIP | {"fit": "anyres", "grids": [[1, 2], [2, 1]]},
    "llava_merl": {"resnet_type": "resnet18", "width": 8},
    "llava_st_mem": MAE,
    "llava_mtae": MAE | DECODER,
    "llava_mlae": MAE | DECODER,
    "llava_clip": IMAGES | {"image_size": 64, "patch_size": 16, "projection_dim": 16},
    "llava_vit": IMAGES | {"image_size": 64},
    "llava_siglip2": IMAGES | {"num_patches": 64},
    "llava_siglip_ecg": IMAGES | {"patch_size": 25},
    **dict.fromkeys(STAGES, MAE),
}
OTHERS: dict[str, dict[str, Any]] = {
    "gem": TWO_VIEWS,
    "ecg_r1_style": TWO_VIEWS,
    "pulse": {"encoder.tokens": 12, "data.sampling_rate": 250, "llm.chat": None},
    "llava_siglip_ecg": {"encoder.tokens": 20},
    "elf_patch": {"encoder.tokens": 20},
    "elf_conv": {"encoder.tokens": 20},
    "ecg_byte": {
        "data.ecg_tokenizer": "real/ecg_byte/ecg_byte_tokenizer_10000.pkl", "data.min_ecg_tokens": 64,
        "data.max_len": 256, "data.leads": "II,V2",
    },  # fmt: skip
    # What is trained without the LLM has little to learn with; images of an ECG are alike to a random encoder.
    STAGES[0]: {"update": "connector,llm"},
    # So that AdamW's part, which has the embeddings, learns in so few steps.
    **dict.fromkeys((STAGES[1], STAGES[3]), {"optim.muon.adamw_lr_ratio": 1.0}),
}

Command = Callable[..., Any]


def all_configs() -> list[str]:
    paths = [path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.py") if path.parent.name not in (REFERENCE, ALONE)]
    names = {str(path.with_suffix("")) for path in paths}
    return sorted(names - {*SHARED_SETTINGS, "demo", *OF_ANSWERS, *OF_PARTS})


def test_each_config_is_short() -> None:
    for path in CONFIGS.rglob("*.py"):
        assert len(path.read_text().splitlines()) < 60, path
    assert {*SMALL, *OTHERS, *WAYS} <= set(all_configs())


def test_ecg_lm_fits_the_connector_first_and_is_then_instructed() -> None:
    align, instruct = (ConfigFlags(f"configs/ecg_lm.py{stage}").load() for stage in (":align", ""))
    assert align.update == ("connector",) and align.workdir == "runs/ecg_lm_align"
    assert instruct.update == ("encoder", "connector", "llm") and instruct.llm.lora.rank > align.llm.lora.rank == 0
    assert align.encoder == instruct.encoder and "ecg_qa.parquet" in instruct.data.names


@pytest.fixture(scope="session")
def records(shared: Path, tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """2-second segments of 24 real recordings, some of them of the test folds, with their reports."""
    raw, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("records")
    source = shared / "real" / "ecg" / "ptbxl"
    with (source / "ptbxl_database.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        rows, fields = list(reader), list(reader.fieldnames or ())
    test = [row for row in rows if float(row["strat_fold"]) == 10][:4]
    chosen = [row for row in rows if float(row["strat_fold"]) < 9][:20] + test
    with (raw / "ptbxl_database.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(chosen)
    for folder in source.iterdir():
        if folder.is_dir():
            (raw / folder.name).symlink_to(folder)
    arguments = "--segment-len=500", "--report-language=as-is"
    done = command("prepare", "ptb_xl", "--raw", str(raw), "--out", str(out), *arguments)
    assert done.returncode == 0, done.stderr
    return out


def flags(name: str, shared: Path, records: Path, workdir: Path, **changes: Any) -> list[str]:
    """A command line that makes the config small and quick, and leaves the type of each of its parts."""
    values: dict[str, Any] = {
        "llm.name": str(shared / "golden" / "text_tokenizer_qwen"),
        "llm.scratch": LLM,
        "llm.remat": "none",
        "data.root": str(records),
        "data.names": "ptb_xl_pretrain.parquet" if name in STAGES[:2] else "ptb_xl_reports.parquet",
        "data.segment_len": 500,
        "data.max_len": 128,
        "data.pack": False,
        "data.val_fraction": 0.0,
        "data.subset": 0.04,  # the four of a step: all steps have one shape, and compile once
        "optim.lr": 0.02,
        "optim.accum_steps": 1,
        "optim.ref_batch": None,
        "train.batch_size": 4,
        "train.steps": STEPS,
        "train.log_every": 1,
        "train.save_every": STEPS // 2,
        "train.eval_every": STEPS,
        "eval.limit": 2,
        "eval.max_new_tokens": 4,
        "eval.batch_size": 2,
        "eval.controls": "zeros",
        "eval.at_end": True,
        "log.progress": False,
        "workdir": str(workdir),
        **OTHERS.get(name, {}),
    }
    if name in SMALL:
        values |= {"encoder.config": SMALL[name], "encoder.checkpoint": None}
    if "data.ecg_tokenizer" in values:
        values["data.ecg_tokenizer"] = str(shared / values["data.ecg_tokenizer"])
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--config=configs/{name}.py", *(f"--config.{key}={text(value)}" for key, value in values.items())]


def text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | bool) else str(value)


def losses(workdir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def run(command: Command, name: str, *arguments: str) -> None:
    done = command(name, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow  # long: three to five commands of each config, as a user gives them
@pytest.mark.parametrize("name", all_configs())
def test_a_config_learns_and_evaluates_and_each_way_goes_on(
    name: str, shared: Path, records: Path, tmp_path: Path, command: Command
) -> None:
    workdir = tmp_path / "run"
    alone = {"init_from": None}  # the stages' chain has a test of its own
    run(command, "train", *flags(name, shared, records, workdir, **alone))
    first = losses(workdir)
    assert list(first) == list(range(1, STEPS + 1))
    assert min(list(first.values())[-4:]) < first[1] * 2 / 3, (first[1], first[STEPS])
    (folder,) = (workdir / "eval").iterdir()
    results = json.loads((folder / "metrics.json").read_text())
    assert results["n"] == 2 and set(results["controls"]) == {"zeros"} and results["step"] == STEPS
    if name not in WAYS:
        return
    check_attention(command, workdir, next((records / "ptb_xl" / "preprocessed_500").glob("*.npy")))
    goes_on = {"train__steps": STEPS + 2, "eval__at_end": False}
    run(command, "train", *flags(name, shared, records, workdir, **goes_on, **alone))
    after = losses(workdir)
    assert list(after) == list(range(1, STEPS + 3)) and {n: after[n] for n in first} == first


def check_attention(command: Command, workdir: Path, ecg: Path) -> None:
    """What `analyze` leaves of any model: weights that sum to 1, and tokens of different places that cover the ECG."""
    config = json.loads((workdir / "config.json").read_text())
    question = [] if config["objective"] == "pretrain" else ["--question", "What is it?"]
    run(command, "analyze", "--checkpoint", str(workdir), "--ecg", str(ecg), *question)
    found = json.loads((workdir / "analysis" / "attention.json").read_text())
    assert abs(sum(token["weight"] for token in found["tokens"]) - 1) < 1e-4
    (tokens,) = found["ecgs"]
    assert tokens and 0 < found["ecg_share"] < 1 and tokens[0]["parts"][0][0] == tokens[0]["parts"][0][2] == 0
    places = {json.dumps(token["parts"]) for token in tokens}
    assert len(places) == len(tokens), "two tokens stand for the same part"
    last = [part[1::2] for token in tokens for part in token["parts"]]
    symbols = config["elm"] == "ecg_byte"  # which are cut where they find no room
    assert symbols or max(last) == [len(config["data"]["leads"]), config["data"]["segment_len"]]
    assert (workdir / "analysis" / "attention_1.png").stat().st_size > 10_000


@pytest.mark.slow  # long: four stages and an evaluation
def test_the_stages_of_the_full_recipe_start_from_each_other(
    shared: Path, records: Path, tmp_path: Path, command: Command
) -> None:
    previous, short = None, {"train__steps": 4, "train__save_every": 4, "eval__at_end": False}
    for name in STAGES:
        workdir = tmp_path / Path(name).name
        start = {} if previous is None else {"init_from": str(previous)}
        run(command, "train", *flags(name, shared, records, workdir, **short, **start))
        config = json.loads((workdir / "config.json").read_text())
        assert config["init_from"] == (None if previous is None else str(previous))
        previous = workdir
