"""Answers per second beside Hugging Face `generate`: the same weights and ECG-QA questions; docs/benchmarks.md's table.

    python scripts/bench_generate.py --data FOLDER --tokenizer FOLDER [--device cpu|gpu] [--json FILE]

FOLDER is what `prepare` made (ecg_qa.parquet and the recordings); the tokenizer is Qwen2.5's. The decoder has
Qwen2.5-0.5B's shape with 8 layers and random weights, the encoder is MERL with 50 signal tokens. Each side runs in a
process of its own, one after the other:

- theirs: Hugging Face Transformers with SDPA, one question after the other with all of its prompt, as the reference
  evaluates; its ECGs are given as embeddings, so that its encoder costs nothing;
- ours: `elm_jax`'s engine with 32 rows, recording by recording, with the encoder; twice, of which the second counts,
  since the first compiles.

Weights that nobody trained do not end their answers: each answer has as many tokens as the true one with its end, on
both sides. In float32 both must say the same.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_train import SIGNAL_TOKENS, encoder, write_llm
from machine import machine

ROWS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of prepare: ecg_qa.parquet, ptb_xl/")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of Qwen2.5's tokenizer")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--theirs", type=int, default=32, help="questions that theirs answers")
    parser.add_argument("--limit", type=int, default=260, help="questions that ours answers")
    parser.add_argument("--rows", type=int, default=ROWS, help="questions that ours answers at a time")
    parser.add_argument("--repeat", type=int, default=1, help="true answers so many times as long")
    parser.add_argument("--tiny", action="store_true", help="a few small layers, to try the script itself")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return {"ours": _ours, "theirs": _theirs}[args.side](args)
    with tempfile.TemporaryDirectory() as folder:
        args.work = Path(folder)
        write_llm(args.work / "llm", args.tokenizer, args.tiny)
        found = {side: _run(side, args) for side in ("ours", "theirs")}
    ours, theirs = found["ours"], found["theirs"]
    same = np.mean([a == b for a, b in zip(ours.pop("tokens"), theirs.pop("tokens"), strict=False)])
    load = " and ".join(f"{side['load']:.1f}" for side in (ours, theirs))
    on = machine("jax", "torch", "transformers", device=args.device)
    print(f"{on}; load of the machine before each side: {load}\n")
    print("| side | questions | tokens | seconds | questions/s | times | processor seconds a question | times |")
    print("|---|---|---|---|---|---|---|---|")
    for name, side in found.items():
        cells = [name, side["questions"], side["new"], f"{side['seconds']:.1f}", f"{side['rate']:.3g}"]
        cells += [f"{side['rate'] / theirs['rate']:.1f}", f"{side['work']:.3g}", f"{theirs['work'] / side['work']:.1f}"]
        print(f"| {' | '.join(map(str, cells))} |")
    print(f"\nequal answers: {same:.0%}; ours compiled {len(ours['calls'])} programs in {ours['first']:.0f} s:")
    for name, count in ours["calls"].items():
        print(f"- {count} calls of {name}")
    if args.json:
        told = {"machine": on, "rows": args.rows, "repeat": args.repeat, "equal": same, **found}
        args.json.write_text(json.dumps(told, indent=1))


def _run(side: str, args: argparse.Namespace) -> dict[str, Any]:
    options = {
        "--data": args.data, "--tokenizer": args.tokenizer, "--device": args.device, "--theirs": args.theirs,
        "--rows": args.rows, "--limit": args.limit, "--repeat": args.repeat, "--side": side,
        "--work": args.work,
    }  # fmt: skip
    command = [sys.executable, __file__, *(str(word) for pair in options.items() for word in pair)]
    platforms = "cpu" if args.device == "cpu" else "cuda,cpu"
    done = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": platforms})
    if done.returncode:
        raise SystemExit(f"error: {side} ended with status {done.returncode}")
    return json.loads((args.work / f"{side}.json").read_text())


def _ours(args: argparse.Namespace) -> None:
    import jax

    from elm_jax.assemble import assemble
    from elm_jax.cli import ConfigFlags
    from elm_jax.inference.speaker import Prompt, Speaker
    from elm_jax.run.weights import Weights
    from elm_jax.runtime.mesh import array_shardings, make_mesh
    from elm_jax.text.render import answer_ids

    gpu = args.device == "gpu"
    values = {
        "elm": "linear_llava", "encoder.name": "merl", "encoder.tokens": SIGNAL_TOKENS,
        "encoder.config": json.dumps(encoder(args.tiny)), "llm.name": args.work / "llm",
        "llm.compute_dtype": "bfloat16" if gpu else "float32", "llm.scan": gpu, "data.names": "ecg_qa.parquet",
        "data.root": args.data, "data.val_fraction": 0.0, "eval.batch_size": args.rows,
    }  # fmt: skip
    config = ConfigFlags.parse(
        ["--config", "configs/ecg_qa.py", *(f"--config.{key}={value}" for key, value in values.items())]
    ).load()
    assembly, mesh = assemble(config), make_mesh(config.mesh, jax.devices()[:1])
    speaker = Speaker(assembly, mesh, Weights(assembly).place(array_shardings(assembly.structure, mesh)))
    asked: list[tuple[str, Prompt]] = []
    for split in ("train", "val", "test"):
        dataset = assembly.dataset(split)
        for record in range(len(dataset)):
            for rendered, truth in dataset.prompts(record):
                new = (len(answer_ids(truth, assembly.tokenizer, assembly.text.family)) + 1) * args.repeat
                path = str(dataset.records[record].ecg_paths)
                asked.append((path, Prompt(rendered, dataset.signals(record), new)))
    prompts = [prompt for _, prompt in sorted(asked[: args.limit], key=lambda pair: pair[0])]
    firsts = {"load": os.getloadavg()[0]}
    seconds, work = [], []
    for _ in range(2):
        speaker.engine.prefills.forget()
        speaker.engine.calls.clear()
        begun, worked, tokens = time.perf_counter(), time.process_time(), [[] for _ in prompts]
        for event in speaker.events(prompts, config.eval):
            tokens[event.number] += event.tokens
        seconds.append(time.perf_counter() - begun)
        work.append(time.process_time() - worked)
    part = prompts[: args.theirs]
    arrays: dict[str, np.ndarray] = {}
    for row, prompt in enumerate(part):
        request = speaker.request(row, prompt, prompt.new or 1)
        arrays[f"x_{row}"] = np.asarray(speaker.embeddings(request), np.float32)
        arrays[f"new_{row}"] = np.array(prompt.new)
    np.savez(args.work / "prompts.npz", **arrays)
    calls = dict(speaker.engine.calls)
    told = {"first": seconds[0], "seconds": seconds[1], "questions": len(prompts), "new": sum(map(len, tokens))}
    told |= {"rate": len(prompts) / seconds[1], "work": work[1] / len(prompts), "tokens": tokens[: len(part)]}
    told |= {"calls": calls, **firsts}
    (args.work / "ours.json").write_text(json.dumps(told))


def _theirs(args: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    gpu = args.device == "gpu"
    device, dtype = torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float32
    load = AutoModelForCausalLM.from_pretrained
    llm = load(str(args.work / "llm"), dtype=dtype, attn_implementation="sdpa").to(device).eval()
    arrays = np.load(args.work / "prompts.npz")
    count = sum(name.startswith("x_") for name in arrays.files)
    embeddings = [torch.from_numpy(arrays[f"x_{i}"])[None].to(device, dtype) for i in range(count)]
    prompts = [(x, int(arrays[f"new_{i}"])) for i, x in enumerate(embeddings)]

    def answer(x: Any, new: int) -> list[int]:
        mask = torch.ones(x.shape[:2], dtype=torch.long, device=device)
        lengths = {"max_new_tokens": new, "min_new_tokens": new}
        with torch.inference_mode():
            return llm.generate(inputs_embeds=x, attention_mask=mask, do_sample=False, **lengths)[0].tolist()

    average = os.getloadavg()[0]
    answer(*prompts[0])
    begun, worked = time.perf_counter(), time.process_time()
    tokens = [answer(*prompt) for prompt in prompts]
    seconds, work = time.perf_counter() - begun, (time.process_time() - worked) / count
    told = {"seconds": seconds, "questions": count, "new": sum(map(len, tokens)), "rate": count / seconds}
    (args.work / "theirs.json").write_text(json.dumps({**told, "work": work, "tokens": tokens, "load": average}))


if __name__ == "__main__":
    main()
