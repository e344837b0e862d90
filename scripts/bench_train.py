"""Training speed beside PyTorch: the same model, weights and ECG-QA conversations; prints docs/benchmarks.md's table.

    python scripts/bench_train.py --against torch --data FOLDER --tokenizer FOLDER [--device cpu|gpu] [--json FILE]

FOLDER is what `prepare` made (ecg_qa.parquet and the recordings); questions about one ECG are taken, behind a system
prompt of the reference's length. The tokenizer is Qwen2.5's. The decoder has
Qwen2.5-0.5B's shape with 8 layers and random weights; the encoder (MERL, 50 signal tokens) is frozen, and its outputs
are kept on disk for both sides. Each side runs in a process of its own, one after the other:

- theirs: Hugging Face Transformers with SDPA, left padding to the longest of a batch or to 2048, AdamW, gradients
  clipped, each conversation on its own as the PyTorch framework trains it;
- ours: `elm_jax.train` itself, on rows that conversations share.

A step of ours fixes which conversations a step of theirs has, and the losses of the first step must agree.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

SHAPE = {"hidden_size": 896, "num_hidden_layers": 8, "num_attention_heads": 14, "num_key_value_heads": 2,
         "intermediate_size": 4864, "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
         "max_position_embeddings": 32768, "tie_word_embeddings": True}  # fmt: skip
SIGNAL_TOKENS, PROMPT_TOKENS, LIMIT, QUESTIONS = 50, 174, 2048, 14
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 64, "vocab_size": 2048}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One row of the table: how ours trains, how theirs pads (0: to the longest), how large their micro-batch is."""

    name: str
    ours: dict[str, Any]
    table: str
    pad_to: int
    micro: int
    steps: int  # of ours; the first half is for compilation
    timed: int  # micro-batches of theirs


def cases(device: str, tiny: bool) -> dict[str, Case]:
    gpu = device == "gpu"
    equal, rows, micro, padded = (2, 1, 2, 1) if tiny else (32, 8, 64, 16) if gpu else (20, 1, 20, 2)
    steps, timed = (2, 1) if tiny else (16, 16) if gpu else (6, 2)  # of ours; micro-batches of theirs
    alone = {"train.batch_size": equal, "data.pack": False, "data.share": "none", "data.max_len": None,
             "llm.scan": True}
    system = {"train.batch_size": rows, "data.max_len": LIMIT, "data.share": "system"}
    ecg = system | {"data.share": "ecg"}
    many = f"{QUESTIONS} questions on each recording (synthetic)"
    return {
        "equal": Case("equal shapes, no padding, nothing shared", alone, "equal", 0, equal, steps, timed),
        "system": Case("real ECG-QA; theirs padded to the longest", system, "real", 0, micro, steps, timed),
        "padded": Case(
            "real ECG-QA; theirs padded to 2048", system, "real", LIMIT, padded, steps, timed
        ),
        "many": Case(f"{many}; the system prompt shared", system, "many", 0, micro, steps, timed),
        "ecg": Case(f"{many}; recordings shared", ecg, "many", 0, micro, steps, timed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of prepare: ecg_qa.parquet, ptb_xl/")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of Qwen2.5's tokenizer")
    parser.add_argument("--against", choices=["torch"], default="torch", help="what it is held against")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--cases", default="equal,system,padded,many,ecg", help="which rows of the table")
    parser.add_argument("--tiny", action="store_true", help="a few small layers and steps, to try the script itself")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return {"ours": _ours, "theirs": _theirs}[args.side](args.work)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        _prepare(Path(folder), args)
        on = machine("jax", "torch", "transformers", device=args.device)
        print(f"{on}\n")
        print("| case | theirs, conv/s | ours, conv/s | times | theirs, GB above the state | ours | ratio |")
        print("|---|---|---|---|---|---|---|")
        for name in args.cases.split(","):
            result = _compare(Path(folder), name, cases(args.device, args.tiny)[name], args)
            found.append(result)
            theirs, ours = result["theirs"], result["ours"]
            cells = [result["case"]]
            for key in ("rate", "memory_gb"):
                cells += [f"{theirs[key]:.3g}", f"{ours[key]:.3g}", f"{ours[key] / theirs[key]:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": on, "cases": found}, indent=1))


# -- what both sides read ---------------------------------------------------------------------------------------


def _prepare(folder: Path, args: argparse.Namespace) -> None:
    """The LLM as a Hugging Face folder, and the tables of conversations."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_llm(folder / "llm", args.tokenizer, args.tiny)
    rows = pq.read_table(args.data / "ecg_qa.parquet").to_pylist()
    real = [row | {"split": "train"} for row in rows if row["name"].startswith("single-")]
    paths = sorted({row["ecg_path"] for row in real})
    asked = sorted({json.loads(row["text"])[1] for row in real})

    def ask(path: str, question: str) -> dict[str, Any]:
        text = json.dumps(["single-verify", question, ["yes"]])
        return {**real[0], "ecg_path": path, "patient_id": path, "text": text}

    many = [ask(path, asked[(7 * i + k) % len(asked)]) for i, path in enumerate(paths) for k in range(QUESTIONS)]
    equal = [ask(path, asked[0]) for path in paths]  # of one length each
    for i, row in enumerate([*many, *equal]):
        row["sample_id"] = i
    data = folder / "data"
    data.mkdir()
    for child in args.data.iterdir():
        (data / child.name).symlink_to(child.resolve())
    (folder / "prompt.txt").write_text(_prompt(args.tokenizer))
    for name, rows in (("real", real), ("many", many), ("equal", equal)):
        pq.write_table(pa.Table.from_pylist(rows), data / f"bench_{name}.parquet")


def write_llm(llm: Path, tokenizer: Path, tiny: bool) -> None:
    """A Hugging Face folder of the decoder with random weights."""
    from safetensors.numpy import save_file

    shape = SHAPE | (TINY if tiny else {})
    llm.mkdir()
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "vocab", "merges", "special", "added", "chat")):
            (llm / file.name).write_bytes(file.read_bytes())
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "attention_dropout": 0.0,
    }
    ends = {"bos_token_id": shape["vocab_size"] - 293, "eos_token_id": shape["vocab_size"] - 291}  # Qwen2.5's own
    (llm / "config.json").write_text(json.dumps({**config, **shape, **ends}))
    rng = np.random.default_rng(0)
    hidden, mlp = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    sizes = {"model.embed_tokens.weight": (shape["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for i in range(shape["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for part, rows in (("q", hidden), ("k", kv), ("v", kv)):
            sizes |= {f"{at}self_attn.{part}_proj.weight": (rows, hidden), f"{at}self_attn.{part}_proj.bias": (rows,)}
        sizes |= {f"{at}self_attn.o_proj.weight": (hidden, hidden), f"{at}mlp.down_proj.weight": (hidden, mlp),
                  f"{at}mlp.gate_proj.weight": (mlp, hidden), f"{at}mlp.up_proj.weight": (mlp, hidden),
                  f"{at}input_layernorm.weight": (hidden,),
                  f"{at}post_attention_layernorm.weight": (hidden,)}  # fmt: skip
    ones = ("norm.weight", "layernorm.weight")
    drawn = {
        n: np.ones(s, np.float32) if n.endswith(ones) else rng.normal(0, 0.02, s).astype(np.float32)
        for n, s in sizes.items()
    }
    save_file(drawn, llm / "model.safetensors", metadata={"format": "pt"})


def encoder(tiny: bool) -> dict[str, Any]:
    """What `encoder.config` says of MERL."""
    return {"resnet_type": "resnet18", **({"width": 8} if tiny else {})}


def _prompt(tokenizer: Path) -> str:
    """A system prompt that takes PROMPT_TOKENS tokens together with the chat's own marks."""
    from elm_jax.text.prompts import DEFAULT
    from elm_jax.text.vocabulary import load_tokenizer

    count, words, text = load_tokenizer(tokenizer), (2 * DEFAULT).split(), ""
    while len(count(text)["input_ids"]) < PROMPT_TOKENS - 5:
        text = f"{text} {words.pop(0)}".strip()
    return text


def _compare(folder: Path, name: str, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    work = folder / name
    work.mkdir()
    told = {
        "llm": str(folder / "llm"),
        "data": str(folder / "data"),
        "prompt": str(folder / "prompt.txt"),
        "device": args.device,
        "tiny": args.tiny,
        "case": case.__dict__,
        "cache": str(folder / "cache"),
    }
    (work / "case.json").write_text(json.dumps(told))
    platforms = "cpu" if args.device == "cpu" else "cuda,cpu"
    for side in ("ours", "theirs"):
        command = [
            sys.executable,
            __file__,
            "--data",
            args.data,
            "--tokenizer",
            args.tokenizer,
            "--side",
            side,
            "--work",
            work,
            *(["--tiny"] if args.tiny else []),
        ]
        environment = {**os.environ, "JAX_PLATFORMS": platforms, "ELM_JAX_CACHE": told["cache"]}
        done = subprocess.run(list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"error: {side} of {name} ended with status {done.returncode}")
    ours, theirs = (json.loads((work / f"{side}.json").read_text()) for side in ("ours", "theirs"))
    apart = abs(ours["loss"] - theirs["loss"]) / theirs["loss"]
    if apart > (1e-4 if args.device == "cpu" else 1e-2):
        raise SystemExit(f"error: the first losses of {name} differ: ours {ours['loss']}, theirs {theirs['loss']}")
    return {"case": case.name, "ours": ours, "theirs": theirs}


# -- ours -------------------------------------------------------------------------------------------------------


def _ours(work: Path) -> None:
    started = _resident()
    from elm_jax.assemble import assemble
    from elm_jax.cli import ConfigFlags
    from elm_jax.data.loader import StepSource
    from elm_jax.run.weights import Weights
    from elm_jax.runtime.compilation import cache_folder
    from elm_jax.runtime.mesh import array_shardings
    from elm_jax.training.loop import Trainer

    told = json.loads((work / "case.json").read_text())
    case = told["case"]
    values = {
        "workdir": work / "run", "elm": "linear_llava", "update": "connector,llm", "encoder.name": "merl",
        "encoder.tokens": SIGNAL_TOKENS, "encoder.cache": True,
        "encoder.config": json.dumps(encoder(told["tiny"])), "llm.name": told["llm"],
        "llm.param_dtype": "float32", "llm.scan": told["device"] == "gpu",  # on CPU loops cost a quarter of the speed
        "llm.compute_dtype": "float32" if told["device"] == "cpu" else "bfloat16",
        "data.names": f"bench_{case['table']}.parquet", "data.root": told["data"], "data.outside_root": True,
        "data.val_fraction": 0.0, "train.eval_every": None, "data.system_prompt": told["prompt"],
        "optim.lr": 1e-5, "optim.schedule": "constant", "optim.grad_clip": 1.0, "train.steps": case["steps"],
        "train.log_every": 1, "train.save_every": 10**6, "eval.at_end": False, "log.progress": False, **case["ours"],
    }  # fmt: skip

    def configured(**changes: Any) -> Any:
        flags = (f"--config.{k}={v}" for k, v in {**values, **changes}.items())
        return ConfigFlags.parse(["--config", "configs/ecg_qa.py", *flags]).load()

    if values["data.max_len"] is None:  # all conversations are of one length
        values["data.max_len"] = LIMIT
        values["data.max_len"] = len(assemble(configured(), None).dataset("train").render(0).ids)
    config = configured()
    (work / "run").mkdir()

    class Measured(Trainer):
        """Takes the memory at its peak before the checkpoint is written: theirs writes none."""

        peak_gb = 0.0

        def _save(self, *done: int) -> None:
            self.peak_gb = self.peak_gb or _peak(told["device"])
            super()._save(*done)

    trainer = Measured(config, work / "run")
    trainer.run()
    dataset, leaves = trainer.dataset, trainer.assembly.structure.leaves
    source = StepSource(dataset, trainer.plan, steps=case["steps"])
    steps = [sorted({int(s) for s in np.unique(source[k].batch.sample_ids) if s >= 0}) for k in range(case["steps"])]
    used = sorted({s for step in steps for s in step})
    rendered = {s: dataset.render(s) for s in used}
    shardings = array_shardings(trainer.assembly.structure, trainer.mesh)
    begun_with = Weights(trainer.assembly).place(shardings, [n for n in leaves if n.startswith("connector.")])
    bias, kernel = sorted(map(np.asarray, begun_with.values()), key=np.ndim)
    np.savez(
        work / "samples.npz", steps=np.array([len(s) for s in steps]), order=np.concatenate(steps),
        kernel=kernel, bias=bias,
        **{f"ids_{s}": r.ids for s, r in rendered.items()},
        **{f"told_{s}": r.supervised for s, r in rendered.items()},
        **{f"at_{s}": r.signal_positions.ravel() for s, r in rendered.items()},
        **{f"signal_{s}": np.asarray(dataset.signals(s)[0][dataset.signal.view], np.float32) for s in used},
    )  # fmt: skip
    lengths = [len(r.ids) for r in rendered.values()]
    prefix = {r.system_end for r in rendered.values()}
    print(f"{sum(lengths) / len(lengths):.1f} tokens a conversation, {prefix} of them shared", file=sys.stderr)
    parameters = sum(x.size for x in trainer.state.trained.values())
    lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    timed = logged[len(logged) // 2 :]
    # Of all together: the last row of an epoch, which is not full, is among them.
    rate = sum(line["conversations"] for line in timed) / sum(line["step_ms"] for line in timed) * 1e3
    memory = trainer.peak_gb - 12e-9 * parameters - (started if told["device"] == "cpu" else 0)
    keys = ("padding_fraction", "tokens_per_s", "mfu")
    told = {"loss": logged[0]["loss"], "rate": rate, "memory_gb": memory, **{k: timed[-1][k] for k in keys}}
    (work / "ours.json").write_text(json.dumps({**told, "jax": version("jax"), "cache": str(cache_folder())}))


# -- theirs -----------------------------------------------------------------------------------------------------


def _theirs(work: Path) -> None:
    started = _resident()
    import torch
    from transformers import AutoModelForCausalLM

    told = json.loads((work / "case.json").read_text())
    case, gpu = told["case"], told["device"] == "gpu"
    device = torch.device("cuda" if gpu else "cpu")
    with np.load(work / "samples.npz") as file:  # all of it now: opening members would slow the timed steps
        samples = dict(file)
    started += sum(values.nbytes for values in samples.values()) / 1e9
    llm = AutoModelForCausalLM.from_pretrained(told["llm"], dtype=torch.float32, attn_implementation="sdpa").to(
        device
    )
    connector = torch.nn.Linear(*samples["kernel"].shape).to(device)
    with torch.no_grad():
        connector.weight.copy_(torch.from_numpy(samples["kernel"].T.copy()))
        connector.bias.copy_(torch.from_numpy(samples["bias"]))
    llm.train()
    parameters = [*llm.parameters(), *connector.parameters()]
    adamw = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.01)

    def loss_of(batch: list[int], total: int) -> Any:
        """The summed cross-entropy of a micro-batch by the supervised tokens of its step."""
        length = case["pad_to"] or max(len(samples[f"ids_{s}"]) for s in batch)
        ids = np.zeros((len(batch), length), np.int64)  # padding is masked: any token
        seen, labels = np.zeros_like(ids), np.full_like(ids, -100)
        where: list[tuple[int, int]] = []
        for row, s in enumerate(batch):
            own, first = samples[f"ids_{s}"], length - len(samples[f"ids_{s}"])
            ids[row, first:], seen[row, first:] = own, 1
            labels[row, first:] = np.where(samples[f"told_{s}"], own, -100)
            where += [(row, first + int(p)) for p in samples[f"at_{s}"]]
        signals = torch.from_numpy(np.stack([samples[f"signal_{s}"] for s in batch])).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            x = llm.get_input_embeddings()(torch.from_numpy(ids).to(device))
            spliced = connector(signals).reshape(-1, x.shape[-1]).to(x.dtype)
            rows, places = (torch.tensor(index, device=device) for index in zip(*where, strict=True))
            x = x.index_put((rows, places), spliced)
            out = llm(
                inputs_embeds=x,
                attention_mask=torch.from_numpy(seen).to(device),
                labels=torch.from_numpy(labels).to(device),
            )
        return out.loss * int((labels[:, 1:] != -100).sum()) / total

    def step(conversations: list[int]) -> float:
        total = sum(int(samples[f"told_{s}"].sum()) for s in conversations)
        adamw.zero_grad(set_to_none=True)
        loss = 0.0
        for first in range(0, len(conversations), case["micro"]):
            part = loss_of(conversations[first : first + case["micro"]], total)
            part.backward()
            loss += float(part.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        return loss

    bounds = np.cumsum([0, *samples["steps"]])
    first = samples["order"][: bounds[1]].tolist()
    with torch.no_grad():  # the loss of our whole first step; timed are fewer
        total = sum(int(samples[f"told_{s}"].sum()) for s in first)
        parts = [first[k : k + case["micro"]] for k in range(0, len(first), case["micro"])]
        loss = sum(float(loss_of(part, total)) for part in parts)
    order = samples["order"].tolist()
    size = case["micro"]
    step(order[:size])
    begun = time.perf_counter()
    for k in range(case["timed"]):
        step([order[(k * size + i) % len(order)] for i in range(size)])
        if gpu:
            torch.cuda.synchronize()
    rate = case["timed"] * size / (time.perf_counter() - begun)
    count = sum(p.numel() for p in parameters)
    memory = (torch.cuda.max_memory_allocated() / 1e9 if gpu else _peak("cpu") - started) - 12e-9 * count
    (work / "theirs.json").write_text(
        json.dumps({"loss": loss, "rate": rate, "memory_gb": memory, "torch": torch.__version__})
    )


def _resident() -> float:
    """GB that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e9


def _peak(device: str) -> float:
    """GB that this process, or on a GPU jax, held at most."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    import jax

    return (jax.local_devices()[0].memory_stats() or {})["peak_bytes_in_use"] / 1e9


if __name__ == "__main__":
    main()
