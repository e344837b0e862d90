"""Tokens per second of a policy's rollouts and updates, beside the usual way in PyTorch.

    python scripts/bench_rollouts.py [--answers 8] [--new 64] [--prompts 8] [--json FILE]

A Llama of 6 layers and 11 million parameters with random weights behind a small MERL with 50 signal tokens. A prompt
has a system prompt of about 174 tokens, as the reference's, an ECG and a question about it. SAPO, float32, all of the
LLM trained. Each side has a process of its own, one after the other, and the second of two rounds counts:

- theirs: Hugging Face Transformers with SDPA on the same weights, as the reference's loop: prompt by prompt, each
  computed once for each of its answers, in `generate`, in the pass that gives the old log probabilities, and in the
  update, whose gradients are added up before AdamW's step. Its ECGs are given as embeddings: its encoder costs nothing;
- ours: the run's own rollouts and step; and the same where no beginning is shared, each answer in a row of its own.

Both learn from the same answers, of which both must find the same log probabilities.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

LLM = {"hidden": 384, "layers": 6, "heads": 6, "kv_heads": 2, "mlp": 1152, "max_len": 2048}
TINY = {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "mlp": 64, "max_len": 2048}
TEMPERATURE, TOP_P, LR = 0.8, 0.95, 1e-6
TAU = 1.0, 1.05


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=8, help="to each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--prompts", type=int, default=8, help="of a step")
    parser.add_argument("--tiny", action="store_true", help="a few small layers, to try the script itself")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return {"ours": _ours, "theirs": _theirs}[args.side](args)
    with tempfile.TemporaryDirectory() as folder:
        args.work = Path(folder)
        found = {**_run("ours", args), **_run("theirs", args)}
    differ, prompt, on = found.pop("differ"), found.pop("prompt"), machine("jax", "torch", "transformers")
    print(f"{on}\n")
    print(f"{args.prompts} prompts of {prompt:.0f} tokens on average, {args.answers} answers of {args.new}\n")
    print(f"| side | what | tokens/s | times | processor ms a token | times |\n|{'---|' * 6}")
    for what in ("drawn", "learnt", "both"):
        for name, side in found.items():
            (seconds, work), (their_seconds, their_work) = side[what], found["theirs"][what]
            cells = [name, what, f"{1 / seconds:.1f}", f"{their_seconds / seconds:.2f}", f"{1000 * work:.2f}"]
            print(f"| {' | '.join([*cells, f'{their_work / work:.2f}'])} |")
    print(f"\nlog probabilities of the answers differ by {differ:.1e} at most")
    if args.json:
        args.json.write_text(json.dumps({"machine": on, "differ": differ, "prompt": prompt, **found}))


def _run(side: str, args: argparse.Namespace) -> dict[str, Any]:
    options = {"--answers": args.answers, "--new": args.new, "--prompts": args.prompts, "--side": side}
    options |= {"--work": args.work}
    command = [sys.executable, __file__, *(str(word) for pair in options.items() for word in pair)]
    done = subprocess.run(command + ["--tiny"] * args.tiny, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    if done.returncode:
        raise SystemExit(f"error: {side} ended with status {done.returncode}")
    return json.loads((args.work / f"{side}.json").read_text())


def _second(act: Callable[[], Any]) -> np.ndarray:
    """The seconds of a second time, and those of the processors."""
    act()
    begun = np.array([time.perf_counter(), time.process_time()])
    act()
    return np.array([time.perf_counter(), time.process_time()]) - begun


def _ours(args: argparse.Namespace) -> None:
    import jax

    from elm_jax.cli import ConfigFlags
    from elm_jax.data.batch import BatchShape, Group, collate
    from elm_jax.exchange.export import export
    from elm_jax.inference.generate import bucket
    from elm_jax.inference.speaker import Speaker
    from elm_jax.run.folder import open_folder
    from elm_jax.scoring.rewards import register_reward
    from elm_jax.text.prompts import DEFAULT
    from elm_jax.training.loop import Trainer, train

    register_reward("of_length", lambda answered: len(answered.answer) % 7)

    def config(name: str, **changes: Any) -> Any:
        values = {
            "workdir": args.work / name, "data.names": json.dumps(["demo:train=64,val=8,test=8"]), "train.steps": 1,
            "data.system_prompt": DEFAULT[:380], "llm.scratch": json.dumps(TINY if args.tiny else LLM),
            "encoder.tokens": 50,
            "encoder.config": json.dumps({"resnet_type": "resnet18", "width": 8}), "data.max_len": 2048,
            "train.batch_size": args.prompts, "data.val_fraction": 0.0, "eval.at_end": False, "log.progress": False,
        }  # fmt: skip
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        return ConfigFlags.parse(
            ["--config", "configs/demo.py", *(f"--config.{key}={value}" for key, value in values.items())]
        ).load()

    begun = config("begun", data__share="none", data__pack=False)
    train(begun)
    export(begun, args.work / "exported", "latest")
    longest = args.answers * args.new + 1024
    made = config(
        "policy", objective="sapo", init_from=args.work / "begun", update="llm", optim__lr=LR, data__pack=False,
        rl__answers=args.answers, rl__max_new_tokens=args.new, rl__rewards='["of_length"]', rl__temperature=TEMPERATURE,
        rl__top_p=TOP_P, rl__batch_size=args.prompts * args.answers, train__steps=8, train__save_every=8,
        train__batch_size=args.prompts, data__max_len=longest, optim__weight_decay=0.0,
    )  # fmt: skip
    trainer = Trainer(made, open_folder(made))
    trainer._build()
    rollouts, source, dataset = trainer.rollouts, trainer.source, trainer.dataset
    assert rollouts is not None
    figures: dict[str, Any] = {}
    request, answered = Speaker.request, list[Any]()

    def draw() -> None:
        answered[:] = rollouts._step(source, 0, trainer._arrays)

    for name in ("ours", "ours, nothing shared"):
        if name != "ours":
            setattr(Speaker, "request", lambda *given: replace(request(*given), edges=()))  # noqa: B010
        drawing = _second(draw)
        batch, scored = answered[0].batch, answered[1]
        if name == "ours":
            _keep(args, rollouts, scored, batch)
        else:
            groups = [group for found in rollouts._groups(dataset, scored).values() for group in found]
            alone = [[Group(0, [one])] for group in groups for one in group.conversations]
            width = bucket(max(len(group.conversations[0].ids) for (group,) in alone))
            rows = collate(alone, BatchShape(width, 1, args.new), dataset.signal.layout, dataset.samples.extras)
            batch = rollouts._with_old(jax.tree.map(lambda x: x[None], rows), trainer._arrays)
        placed = trainer._on_devices(batch)
        trainer.step.compile(trainer.state, trainer.frozen, placed)

        def learn() -> None:
            trainer.state, metrics = trainer.step(trainer.state, trainer.frozen, placed)  # noqa: B023
            jax.block_until_ready(metrics)

        tokens = sum(len(ids) for one in scored.values() for ids in one.answers)
        figures[name] = _costs(tokens, drawing, tokens, _second(learn))
    prompt = float(np.mean([len(one.prompt.rendered.ids) for one in scored.values()]))
    (args.work / "ours.json").write_text(json.dumps({**figures, "prompt": prompt}))


def _costs(drawn: int, drawing: np.ndarray, learnt: int, learning: np.ndarray) -> dict[str, list[float]]:
    """Of a token the seconds, and those of the processors."""
    each = {"drawn": drawing / drawn, "learnt": learning / learnt}
    return {name: cost.tolist() for name, cost in {**each, "both": each["drawn"] + each["learnt"]}.items()}


def _keep(args: argparse.Namespace, rollouts: Any, scored: dict[int, Any], batch: Any) -> None:
    """What theirs learns from: prompts as embeddings, answers, advantages; and what ours finds of these."""
    arrays: dict[str, Any] = {}
    extras = {name: np.asarray(x)[0] for name, x in batch.extras.items()}
    weights, samples, ids = (np.asarray(x)[0] for x in (batch.target_weights, batch.target_sample, batch.target_ids))
    for n, one in enumerate(scored.values()):
        arrays[f"x_{n}"] = np.asarray(rollouts.speaker.embeddings(rollouts.speaker.request(0, one.prompt, args.new)))
        row = next(r for r in range(len(ids)) if list(ids[r][weights[r] > 0][: len(one.answers[0])]) == one.answers[0])
        for g, answer in enumerate(one.answers):
            mine = (samples[row] == g) & (weights[row] > 0)
            arrays[f"ids_{n}_{g}"] = np.asarray(answer)
            arrays |= {f"{name}_{n}_{g}": extras[name][row][mine] for name in ("old", "advantage")}
    np.savez(args.work / "answers.npz", **arrays)


def _theirs(args: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = str(args.work / "exported" / "llm")
    llm: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").float().eval()
    stored = np.load(args.work / "answers.npz")
    count = sum(name.startswith("x_") for name in stored.files)
    prompts = [torch.from_numpy(stored[f"x_{n}"])[None].repeat(args.answers, 1, 1) for n in range(count)]
    embed, optimizer = llm.get_input_embeddings(), torch.optim.AdamW(llm.parameters(), lr=LR, weight_decay=0.0)

    def log_probs(x: Any, ids: Any) -> Any:
        """(G, N) of the answers' tokens behind the prompt."""
        whole = torch.cat([x, embed(ids)], 1)
        logits = llm(inputs_embeds=whole, use_cache=False, logits_to_keep=ids.shape[1] + 1).logits[:, :-1]
        return torch.log_softmax(logits / TEMPERATURE, -1).gather(2, ids[..., None])[..., 0]

    given = []  # of each prompt: ids, mask, advantages, old
    for n in range(count):
        each = [[stored[f"{name}_{n}_{g}"] for g in range(args.answers)] for name in ("ids", "advantage", "old")]
        padded = [np.stack([np.pad(x, (0, args.new - len(x))) for x in values]) for values in each]
        mask = np.stack([np.arange(args.new) < len(x) for x in each[0]])
        given.append([torch.from_numpy(x) for x in (padded[0].astype(np.int64), mask.astype(np.float32), *padded[1:])])

    def draw() -> None:
        with torch.no_grad():
            for x in prompts:
                ids = llm.generate(
                    inputs_embeds=x, attention_mask=torch.ones(x.shape[:2], dtype=torch.long), do_sample=True,
                    temperature=TEMPERATURE, top_p=TOP_P, top_k=0, max_new_tokens=args.new, min_new_tokens=args.new,
                )  # fmt: skip
                log_probs(x, ids)

    def learn() -> None:
        optimizer.zero_grad()
        for x, (ids, mask, advantage, old) in zip(prompts, given, strict=True):
            ratio = torch.exp(torch.clamp(log_probs(x, ids) - old, -20, 20))
            tau = torch.where(advantage > 0, *TAU)
            loss = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantage
            ((loss * mask).sum(1) / (mask.sum(1) + 1e-8)).sum().div(count * args.answers).backward()
        torch.nn.utils.clip_grad_norm_(llm.parameters(), 1.0)
        optimizer.step()

    with torch.no_grad():
        differ = max(
            float(((log_probs(x, ids) - old) * mask).abs().max())
            for x, (ids, mask, _, old) in zip(prompts, given, strict=True)
        )
    tokens, learnt = count * args.answers * args.new, int(sum(mask.sum() for _, mask, _, _ in given))
    figures = _costs(tokens, _second(draw), learnt, _second(learn))
    (args.work / "theirs.json").write_text(json.dumps({"theirs": figures, "differ": differ}))


if __name__ == "__main__":
    main()
