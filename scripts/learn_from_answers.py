"""From rewards and preferences the demo learns to answer in figures; docs/learning_from_answers.md has what came out.

    python scripts/learn_from_answers.py [--out FOLDER] [--only sapo,grpo,...]

`sft` is the demo, which gives the heart rate to the nearest ten, and half the time in words: slow, normal, fast. From
it begin, on recordings that it has not seen,

- `sapo` and `grpo`: the reward of the right figure is 1, that of the right word a quarter (who knows nothing of the ECG
  gets about a twelfth either way);
- `shuffled`: sapo again, but each question and its answer stand beside the ECG of another recording;
- `dpo`: pairs of the rate in figures, which is preferred, and the word;
- `judged`: dpo again, on pairs that the model drew itself (`python -m elm_jax.pairs`), judged by that reward.

All are asked about the same held-out recordings: for the rate four times by drawing, for the rest the likeliest
answer. Promised: exact rates rise by 20 points or more through `sapo`, `grpo` and `judged`, in under ten minutes each,
and the reward of the policies rises; by less than 5 through `shuffled`; through `dpo` nine answers in ten are figures;
and what else is asked, and what is exact of the figures, gets worse by 2 points at most, but for `shuffled`. What was
exact of the figures before and after is compared recording by recording, with a 95 % interval. The status is 1 where a
promise is not kept.

`--choose` tries settings of `dpo` instead, and asks about recordings that are no part of the test: DPO is what was best
there. A part that is there already is taken as it is; the seconds are those of a run without a break, and left out of
others.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

from elm_jax import register_reward
from elm_jax.cli import ConfigFlags
from elm_jax.config import Config
from elm_jax.data.demo import demo_records
from elm_jax.evaluation.pairs import draw_pairs
from elm_jax.folders import write_atomic
from elm_jax.inference.model import Prompt, TrainedModel
from elm_jax.run.config import config_of_run
from elm_jax.scoring.rewards import Answered
from elm_jax.training.loop import train

SEEN, FRESH = 13600, 2000  # recordings: of sft, and of what begins from it
ASKED, DRAWN = {"val": 1000, "test": 2000}, 4  # recordings that are asked about, and how often for the rate
PARTS = ("sapo", "grpo", "shuffled", "dpo", "judged")
RL = {
    "rl.rewards": ["rate"], "rl.answers": 8, "rl.max_new_tokens": 8, "rl.temperature": 1.0, "rl.top_p": 1.0,
    "rl.batch_size": 256, "train.steps": 80, "optim.lr": 1e-4,
}  # fmt: skip
DPO = {"train.steps": 80, "optim.lr": 1e-4, "dpo.beta": 1.0, "dpo.rpo_alpha": 1.0}
TRIED = [  # of which --choose finds DPO
    {"train.steps": 40, "dpo.rpo_alpha": 0.0},
    {"train.steps": 40},
    {},
]
JUDGED = {"train.steps": 40, "optim.lr": 1e-4, "dpo.beta": 1.0}
LEARNING = {
    "update": ["connector", "llm"], "data.max_len": 128, "data.val_fraction": 0.05, "train.batch_size": 32,
    "train.save_every": 20, "train.log_every": 1, "optim.schedule": "constant", "optim.warmup_ratio": 0.0,
}  # fmt: skip


def main() -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/learn_from_answers"), help="the runs, and figures.json")
    parser.add_argument("--only", default=",".join(PARTS), help="which parts, with commas between them")
    parser.add_argument("--choose", action="store_true", help="try settings of dpo on recordings apart from the test")
    options = parser.parse_args()
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    register_reward("rate", right)
    learnt(out, "sft", told(), {"train.save_every": 505})
    if options.choose:
        return choose(out)
    begun = Asked.of(out / "sft")
    print(row("sft", begun.shares), flush=True)
    figures: dict[str, Any] = {"sft": begun.shares}
    problems = []
    for part in options.only.split(","):
        took = learnt(out, part, records(part, out), keys(part, out))
        now = Asked.of(out / part)
        figures[part] = now.shares | now.change(begun) | rewards(out / part) | took
        print(row(part, figures[part]), flush=True)
        problems += wrong(part, figures[part], begun.shares)
    good = not problems
    figures |= {"good": good, "problems": problems, "machine": machine("jax")}
    (out / "figures.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures))
    print("; ".join(problems) or "all is as promised")
    return 0 if good else 1


def choose(out: Path) -> int:
    """Each of TRIED, on the recordings of validation: the best has the most exact rates."""
    begun, found = Asked.of(out / "sft", "val"), []
    print(row("sft", begun.shares), flush=True)
    for number, changes in enumerate(TRIED):
        part = f"dpo_{number}"
        learnt(out, part, records("dpo", out), keys("dpo", out) | changes)
        now = Asked.of(out / part, "val")
        found.append({"changes": changes} | now.shares | now.change(begun))
        print(row(part, found[-1]), flush=True)
    print(json.dumps(found))
    print("best:", DPO | max(found, key=lambda one: one["heart_rate"])["changes"])
    return 0


# -- records ------------------------------------------------------------------------------------------------------


def told() -> Iterator[dict[str, Any]]:
    """What sft learns: the demo's own questions, the rate in words or in figures by a throw of a coin."""
    for number, record in enumerate(demo_records("train", f"demo:train={SEEN}")):
        in_words = record["name"] == "heart_rate" and random.Random(f"in words: {number}").random() < 0.5
        question, answer = said(record)
        yield conversation(record, question, word(answer) if in_words else answer)


def records(part: str, out: Path) -> Iterator[dict[str, Any]]:
    """Questions for the rate of recordings that are new."""
    if part == "judged":
        yield from drawn(out)
        return
    rows = [r for r in demo_records("train", f"demo:train={SEEN + FRESH}") if r["name"] == "heart_rate"][SEEN:]
    paths = [record["ecg_path"] for record in rows]
    if part == "shuffled":
        random.Random(0).shuffle(paths)
    for record, path in zip(rows, paths, strict=True):
        question, answer = said(record)
        more = {"rejected": word(answer)} if part == "dpo" else {}
        yield conversation({**record, "ecg_path": path}, question, answer) | more


def drawn(out: Path) -> list[dict[str, Any]]:
    """Pairs of answers of sft itself."""
    table = out / "rates.jsonl"
    write(table, records("sapo", out))
    values = {"data.names": [str(table)], **{key: value for key, value in RL.items() if key.startswith("rl.")}}
    flags = ConfigFlags.parse([f"--config.{key}={text(value)}" for key, value in values.items()])
    return [found.pair for found in draw_pairs(config_of_run(str(out / "sft"), flags), "train") if found.pair]


def conversation(record: dict[str, Any], question: str, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {**record, "text": turns}


def said(record: dict[str, Any]) -> tuple[str, str]:
    """Question and answer of a record of the demo."""
    question, answer = (turn["value"] for turn in json.loads(record["text"]))
    return question, str(round(int(answer), -1)) if record["name"] == "heart_rate" else answer


def word(rate: str) -> str:
    return "slow" if int(rate) < 60 else "normal" if int(rate) <= 100 else "fast"


def right(answered: Answered) -> float:
    """The reward of an answer about the rate."""
    return 1.0 if answered.answer == answered.truth else 0.25 * (answered.answer == word(answered.truth))


# -- runs ---------------------------------------------------------------------------------------------------------


def keys(part: str, out: Path) -> dict[str, Any]:
    objective = {"shuffled": "sapo", "judged": "dpo"}.get(part, part)
    own = {"dpo": DPO, "judged": JUDGED}.get(part, RL)
    return {**LEARNING, **own, "objective": objective, "init_from": str(out / "sft")}


def learnt(out: Path, part: str, rows: Iterable[dict[str, Any]], changes: dict[str, Any]) -> dict[str, float]:
    """Train a part, unless that is done; the seconds that its records and its run took, and those of the processors.

    Of a run that was broken off they are not known, and nothing is returned.
    """
    table, begun, worked = out / f"{part}.jsonl", time.time(), time.process_time()
    whole = not table.is_file()
    if whole:
        write(table, rows)
    values = {"workdir": out / part, "data.names": [str(table)], "eval.at_end": False, **changes}
    flags = ["--config", "configs/demo.py", *(f"--config.{key}={text(value)}" for key, value in values.items())]
    config: Config = ConfigFlags.parse(flags).load()
    took = out / part / "seconds.json"
    if train(config) and whole:
        seconds = {"seconds": time.time() - begun, "processor_seconds": time.process_time() - worked}
        took.write_text(json.dumps({name: round(value) for name, value in seconds.items()}))
    return json.loads(took.read_text()) if took.is_file() else {}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A table of records."""
    write_atomic(path, lambda file: file.write("".join(json.dumps(row) + "\n" for row in rows).encode()))


def text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)


# -- figures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What a model answers.

    shares: of the answers to questions about recordings, in per cent. rates: (N, 2) of each recording how many answers
    to the question for its rate are figures, and how many of them the right ones.
    """

    shares: dict[str, float]
    rates: np.ndarray

    @classmethod
    def of(cls, run: Path, split: str = "test") -> Asked:
        name = f"demo:{split}={ASKED[split]}"
        model = TrainedModel(config_of_run(str(run), ConfigFlags.parse([f'--config.data.names=["{name}"]'])), "latest")
        dataset = model.assembly.dataset(split)
        prompts: dict[str, list[tuple[Prompt, str]]] = {}
        for i, record in enumerate(demo_records(split, name)):
            prompt = Prompt(dataset.prompts(i)[-1][0], dataset.signals(i))
            prompts.setdefault(record["name"], []).append((prompt, said(record)[1]))
        shares, rates = {}, np.zeros((ASKED[split], 2))
        for kind, pairs in prompts.items():
            drawn = kind == "heart_rate"
            pairs = pairs * (DRAWN if drawn else 1)
            options = replace(model.config.eval, batch_size=256, temperature=float(drawn))
            answers = model.answers([prompt for prompt, _ in pairs], options)
            exact = np.array([answer == truth for answer, (_, truth) in zip(answers, pairs, strict=True)])
            shares[kind] = 100 * exact.mean()
            if drawn:
                figures = np.array([answer.isdigit() for answer in answers])
                rates = np.stack([figures, exact], 1).reshape(DRAWN, -1, 2).sum(0)
                shares |= {"in_figures": 100 * figures.mean(), "exact_figures": exact_figures(rates)}
        return cls({name: round(float(value), 1) for name, value in shares.items()}, rates)

    def change(self, before: Asked) -> dict[str, list[float]]:
        """By how many points more of the figures are exact, with a 95 % interval of a bootstrap over recordings."""
        rng, found = np.random.default_rng(0), [exact_figures(self.rates) - exact_figures(before.rates)]
        for _ in range(2000):
            chosen = rng.integers(len(self.rates), size=len(self.rates))
            found.append(exact_figures(self.rates[chosen]) - exact_figures(before.rates[chosen]))
        return {"exact_figures_by": [round(float(x), 1) for x in (found[0], *np.percentile(found[1:], (2.5, 97.5)))]}


def exact_figures(rates: np.ndarray) -> float:
    figures, exact = rates.sum(0)
    return 100 * exact / max(1, figures)


def rewards(run: Path) -> dict[str, float]:
    """The reward of a policy's validations, the first and the last."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line["val_reward"] for line in lines if "val_reward" in line]
    return {"first_reward": round(found[0], 3), "last_reward": round(found[-1], 3)} if found else {}


def wrong(part: str, now: dict[str, float], begun: dict[str, float]) -> Iterator[str]:
    """What of a part is not as promised."""
    gained = now["heart_rate"] - begun["heart_rate"]
    if part == "shuffled":
        if gained >= 5:
            yield f"{part}: exact rates rose by {gained:.1f} points"
        return
    if part != "dpo" and gained < 20:
        yield f"{part}: exact rates rose by {gained:.1f} points"
    if "last_reward" in now and now["last_reward"] <= now["first_reward"]:
        yield f"{part}: the reward went from {now['first_reward']} to {now['last_reward']}"
    if part == "dpo" and now["in_figures"] < 90:
        yield f"{part}: {now['in_figures']:.1f} % of the answers are figures"
    if now.get("seconds", 0) >= 600:
        yield f"{part}: {now['seconds']} s"
    for name in ("regularity", "signal_type", "exact_figures"):
        if now[name] < begun[name] - 2:
            yield f"{part}: {name} fell from {begun[name]} to {now[name]} %"


def row(part: str, found: dict[str, float]) -> str:
    return f"{part}: " + ", ".join(f"{name} {value}" for name, value in found.items())


if __name__ == "__main__":
    sys.exit(main())
