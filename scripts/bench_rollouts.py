"""Tokens per second of a policy's rollouts and updates, beside the usual way in PyTorch; docs/benchmarks.md's table.

    python scripts/bench_rollouts.py [--answers 8] [--new 64] [--prompts 8] [--rounds 5] [--json FILE]

A decoder of 8 layers, width 512 and a vocabulary of 32 000 (42 million parameters, random weights) behind a small MERL
with 50 signal tokens. A prompt has a system prompt of about 174 tokens, as the reference's, an ECG and a question about
it. SAPO, float32, all of the LLM trained, each side on all processors that the script may use:

- theirs: Hugging Face Transformers with SDPA on the same weights, as the reference's loop: prompt by prompt, each
  computed once for each of its answers, in `generate`, in the pass that gives the old log probabilities, and in the
  update, whose gradients are added up before AdamW's step. Its ECGs are given as embeddings: its encoder costs nothing;
- ours: the run's own rollouts and step, whose micro-batches are a prompt with its answers each; and the same where no
  beginning is shared, each answer in a row of its own.

Each side has a process of its own. After a round that does not count, in which programs are compiled, they do the same
in turn, forwards and backwards; medians count. All learn from the same answers, again and again: log probabilities
before, and the loss of each update, must agree, and so must answers that are not drawn, but the likeliest tokens. Ends
with 1 where they do not, or where ours are not four times as many tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from sides import Acts, Side

LLM = {"hidden": 512, "layers": 8, "heads": 8, "kv_heads": 4, "mlp": 1536, "max_len": 2048, "vocab_size": 32000}
TINY = {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "mlp": 64, "max_len": 2048, "vocab_size": 2048}
TEMPERATURE, TOP_P, LR, CLIP = 0.8, 0.95, 1e-5, 1.0
BETAS, TAU = (0.9, 0.99), (1.0, 1.05)
PROMPT = 320  # no prompt is longer
PROMISED, TOLERANCE = 4.0, 1e-4


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=8, help="to each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--prompts", type=int, default=8, help="of a step")
    parser.add_argument("--rounds", type=int, default=5, help="that count")
    parser.add_argument("--tiny", action="store_true", help="a few small layers, to try the script itself")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args.work = Path(folder)
        sides = {"ours": Side(_ours, args, True)}
        old, greedy = (sides["ours"](act).given for act in ("log_probs", "greedy"))
        sides |= {"ours, nothing shared": Side(_ours, args, False), "theirs": Side(_theirs, args)}
        differ = max(float(np.abs(side("log_probs").given - old).max()) for side in sides.values())
        equal = all(side("greedy").given == greedy for side in sides.values())
        found: dict[str, dict[str, list[Any]]] = {name: {"drawn": [], "learnt": [], "losses": []} for name in sides}
        for turn in range(args.rounds + 1):
            for what, act in (("drawn", "draw"), ("learnt", "learn")):
                for name in list(sides)[:: (-1) ** turn]:
                    done = sides[name](act)
                    print(f"round {turn}: {name}, {what} in {done.seconds:.1f} s", file=sys.stderr)
                    if act == "learn":
                        found[name]["losses"].append(done.given)
                    if turn:
                        tokens = done.given if act == "draw" else len(old)
                        found[name][what].append((tokens / done.seconds, tokens / done.work))
        with np.load(args.work / "answers.npz") as kept:
            prompt = statistics.mean(len(kept[name]) for name in kept.files if name.startswith("x_"))
    losses = np.array([side.pop("losses") for side in found.values()])
    apart, on, times = float(np.abs(losses - losses[0]).max()), machine("jax", "torch", "transformers"), {}
    print(f"{on}\n\n{args.prompts} prompts of {prompt:.0f} tokens on average,", end="")
    print(f" {args.answers} answers of {args.new}; medians of {args.rounds} rounds (least to most)\n")
    print(f"| what | side | tokens/s | times theirs | by processor time |\n|{'---|' * 5}")
    for side in found.values():
        side["both"] = list(1 / (1 / np.array(side["drawn"]) + 1 / np.array(side["learnt"])))
    for what in ("drawn", "learnt", "both"):
        for name, side in found.items():
            rates = np.array(side[what])  # (rounds, 2): by the clock, and by processor time
            faster = rates / np.array(found["theirs"][what])
            times[f"{what}, {name}"] = np.median(faster, 0).tolist()
            print(f"| {what} | {name} | {' | '.join(map(_spread, [rates[:, 0], *faster.T]))} |")
    print(
        f"\nlog probabilities of the answers differ by {differ:.1e} at most, losses of {losses.shape[1]} updates",
        end="",
    )
    print(f" by {apart:.1e} (from {losses[0][0]:.4g} to {losses[0][-1]:.4g}); the likeliest answers are ", end="")
    print("equal" if equal else "not equal")
    least = min(times[f"{what}, ours"][0] for what in ("drawn", "learnt"))
    print(f"{least:.2f} times as many tokens a second as theirs at least; {PROMISED:g} are promised")
    if args.json:
        told = {"machine": on, "prompt": prompt, "times": times, "log_probs_differ": differ, "losses_differ": apart}
        args.json.write_text(json.dumps({**told, "greedy_equal": equal, "losses": losses.tolist()}))
    sys.exit(0 if least >= PROMISED and max(differ, apart) <= TOLERANCE and equal else 1)


def _spread(values: np.ndarray) -> str:
    return f"{np.median(values):.3g} ({values.min():.3g} to {values.max():.3g})"


def _ours(args: argparse.Namespace, shares: bool) -> Acts:
    import jax

    from elm_jax.cli import ConfigFlags
    from elm_jax.data.batch import BatchShape, Group, collate
    from elm_jax.exchange.export import export
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
            "encoder.tokens": 50, "encoder.config": json.dumps({"resnet_type": "resnet18", "width": 8}),
            "data.max_len": 2048, "data.pack": False, "train.batch_size": args.prompts, "data.val_fraction": 0.0,
            "eval.at_end": False, "log.progress": False,
        }  # fmt: skip
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        return ConfigFlags.parse(
            ["--config", "configs/demo.py", *(f"--config.{key}={value}" for key, value in values.items())]
        ).load()

    if shares:
        begun = config("begun", data__share="none")
        train(begun)
        export(begun, args.work / "exported", "latest")
    made = config(
        f"policy_{shares}", objective="sapo", init_from=args.work / "begun", update="llm", rl__answers=args.answers,
        rl__max_new_tokens=args.new, rl__rewards='["of_length"]', rl__temperature=TEMPERATURE, rl__top_p=TOP_P,
        rl__batch_size=args.prompts * args.answers, train__steps=1000, train__save_every=1000,
        data__max_len=args.answers * args.new + PROMPT, optim__accum_steps=args.prompts, optim__lr=LR,
        optim__schedule="constant", optim__warmup_ratio=0,
        optim__weight_decay=0.0, optim__grad_clip=CLIP, optim__beta1=BETAS[0], optim__beta2=BETAS[1],
    )  # fmt: skip
    trainer = Trainer(made, open_folder(made))
    trainer._build()
    rollouts, dataset, source = trainer.rollouts, trainer.dataset, trainer.source
    assert rollouts is not None
    if not shares:
        request, events = Speaker.request, Speaker.events

        def one_by_one(speaker: Speaker, prompts: Any, *given: Any) -> Any:
            """The answers to a prompt, each of a prompt of its own."""
            each = (replace(prompt, draws=(draw,)) for prompt in prompts for draw in prompt.draws or (0,))
            for event in events(speaker, each, *given):
                number, answer = divmod(event.number, args.answers)
                yield event._replace(number=number, answer=answer)

        setattr(Speaker, "request", lambda *given: replace(request(*given), edges=()))  # noqa: B010
        setattr(Speaker, "events", one_by_one)  # noqa: B010
    made, scored = rollouts._step(source, 0, trainer._arrays)
    batch = made.batch
    if shares:
        weighted = np.asarray(batch.target_weights) > 0
        kept = {name: np.asarray(batch.extras[name])[weighted] for name in ("old", "advantage")}
        kept |= {"ids": batch.target_ids[weighted]}
        for n, one in enumerate(scored.values()):
            kept[f"x_{n}"] = np.asarray(rollouts.speaker.embeddings(rollouts.speaker.request(0, one.prompt, args.new)))
            kept[f"prompt_{n}"] = np.array(one.prompt.rendered.ids)
            kept[f"ecg_{n}"] = np.isin(np.arange(len(kept[f"prompt_{n}"])), one.prompt.rendered.signal_positions)
            kept[f"lengths_{n}"] = np.array([len(ids) for ids in one.answers])
        np.savez(args.work / "answers.npz", **kept)
        (args.work / "scored.pkl").write_bytes(pickle.dumps(scored))
    else:
        learnt = pickle.loads((args.work / "scored.pkl").read_bytes())
        groups = [group for found in rollouts._groups(dataset, learnt).values() for group in found]
        alone = [[Group(0, [one])] for group in groups for one in group.conversations]
        width = -(-max(len(group.conversations[0].ids) for (group,) in alone) // 64) * 64
        rows = collate(alone, BatchShape(width, 1, args.new), dataset.signal.layout, dataset.samples.extras)
        parts = len(groups), args.answers  # a prompt at a time, as theirs
        batch = jax.tree.map(lambda x: x.reshape(*parts, *x.shape[1:]), rows)
    placed = trainer._on_devices(batch)
    trainer.step.compile(trainer.state, trainer.frozen, placed)

    def draw() -> int:
        _, drawn = rollouts._step(source, 0, trainer._arrays)
        return sum(len(ids) for one in drawn.values() for ids in one.answers)

    def learn() -> float:
        trainer.state, metrics = trainer.step(trainer.state, trainer.frozen, placed)
        return float(metrics["loss"])

    def greedy() -> list[int]:
        prompt = replace(next(iter(scored.values())).prompt, draws=(0,))
        events = rollouts.speaker.events([prompt], replace(rollouts.options, temperature=0.0))
        return [token for event in events for token in event.tokens]

    def log_probs() -> np.ndarray:
        return np.asarray(batch.extras["old"])[np.asarray(batch.target_weights) > 0]

    return {"draw": draw, "learn": learn, "greedy": greedy, "log_probs": log_probs}


def _theirs(args: argparse.Namespace) -> Acts:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    folder = str(args.work / "exported" / "llm")
    llm: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").float().eval()
    stored = np.load(args.work / "answers.npz")
    lengths = [stored[f"lengths_{n}"] for n in range(sum(name.startswith("x_") for name in stored.files))]
    each = [[torch.from_numpy(stored[f"{name}_{n}"]) for name in ("x", "prompt", "ecg")] for n in range(len(lengths))]
    mask = torch.from_numpy(np.arange(args.new) < np.stack(lengths)[..., None])  # (P, G, N)
    ids, old, advantage = (torch.zeros(mask.shape, dtype=kind) for kind in (torch.long, torch.float, torch.float))
    for name, whole in (("ids", ids), ("old", old), ("advantage", advantage)):
        whole[mask] = torch.from_numpy(stored[name]).to(whole.dtype)
    embed = llm.get_input_embeddings()
    optimizer = torch.optim.AdamW(llm.parameters(), lr=LR, betas=BETAS, weight_decay=0.0)

    def prompt(n: int, count: int) -> Any:
        """(count, T, D): its text embedded now, and its ECG as it was."""
        x, text, ecg = each[n]
        return torch.where(ecg[:, None], x, embed(text))[None].repeat(count, 1, 1)

    def scores(n: int, ids: Any) -> Any:
        """(G, N) log probabilities of the tokens of its answers."""
        whole = torch.cat([prompt(n, args.answers), embed(ids)], 1)
        logits = llm(inputs_embeds=whole, use_cache=False, logits_to_keep=ids.shape[1] + 1).logits[:, :-1]
        return torch.log_softmax(logits / TEMPERATURE, -1).gather(2, ids[..., None])[..., 0]

    def answers(x: Any, **how: Any) -> Any:
        seen = torch.ones(x.shape[:2], dtype=torch.long)
        return llm.generate(inputs_embeds=x, attention_mask=seen, max_new_tokens=args.new, **how)

    @torch.no_grad()
    def draw() -> int:
        how = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0}
        drawn = [answers(prompt(n, args.answers), min_new_tokens=args.new, **how) for n in range(len(each))]
        for n, found in enumerate(drawn):
            scores(n, found)
        return sum(found.numel() for found in drawn)

    def learn() -> float:
        optimizer.zero_grad()
        total = 0.0
        for n in range(len(each)):
            ratio = torch.exp(torch.clamp(scores(n, ids[n]) - old[n], -20, 20))
            tau = torch.where(advantage[n] > 0, *TAU)
            losses = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantage[n] * mask[n]
            loss = (losses.sum(1) / (mask[n].sum(1) + 1e-8)).sum() / (len(each) * args.answers)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(llm.parameters(), CLIP)
        optimizer.step()
        return total

    @torch.no_grad()
    def log_probs() -> np.ndarray:
        return torch.stack([scores(n, ids[n]) for n in range(len(each))])[mask].numpy()

    @torch.no_grad()
    def greedy() -> list[int]:
        return answers(prompt(0, 1), do_sample=False)[0].tolist()

    return {"draw": draw, "learn": learn, "greedy": greedy, "log_probs": log_probs}


if __name__ == "__main__":
    main()
