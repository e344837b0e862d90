"""A frozen encoder judged by what its embeddings tell of labelled recordings: linear probes, nearest neighbours, and,
where it was pretrained against reports, zero-shot: by the class whose words are nearest.

An embedding is the mean of the encoder's tokens, as an ELM would be given them. Everything is learnt on the recordings
of training patients, every choice (penalty, threshold) made on those of validation patients, and judged on the others.

N recordings, n of them to learn from, K classes, D the encoder's width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from elm_jax.assemble import encoder_structure
from elm_jax.data.labels import Labelled, LabelTable, read_labels
from elm_jax.errors import UserError, nearest, some
from elm_jax.evaluation.encoders import Encoder, embeddings, random_encoder
from elm_jax.folders import read_json, writable_folder, write_atomic, write_json
from elm_jax.models.encoders import kind_of
from elm_jax.pictures.page import filled
from elm_jax.scoring.probing import (
    Judged,
    apply_head,
    best_f1,
    judge,
    logistic_heads,
    macro_auroc,
    merl_head,
    neighbours,
    prompt_classifier,
    standardised,
    zero_shot,
)
from elm_jax.scoring.statistics import Patients, ci95
from elm_jax.text.reports import padded_ids

PROTOCOLS = ("ours", "merl")
Scores = dict[str, np.ndarray]  # by split "val" and "test": (N, K)


@dataclass(frozen=True)
class Options:
    """How embeddings are judged.

    fractions: percent of the training recordings that linear probes learn from. neighbours: that are asked.
    folds: 0 judges on the table's test part; else its patients are dealt into so many parts, each judged by what is
    learnt of the others. protocol: `merl` trains heads, and chooses thresholds on the test part, as MERL does.
    prompts: what classes are called in zero-shot, in place of the table's words.
    """

    fractions: tuple[float, ...] = (1.0, 10.0, 100.0)
    neighbours: int = 20
    folds: int = 0
    protocol: str = "ours"
    seed: int = 0
    prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)


def probe(
    task: str, table: LabelTable, encoders: Sequence[Encoder], options: Options, progress: bool
) -> dict[str, Any]:
    """Judge encoders, the second of which, if there is one, is the control.

    Returns {"task", "protocol", "classes", "left_out_classes", "n": {split: count}, "encoders": [{"name", "methods":
    {method: the report of `probing.Judged`}}], "difference": {method: {"macro_auc": {"value", "ci95"}}}, "left_out":
    {method: {"n": recordings to learn from, "classes"}}}: the last of methods that learn from too few recordings to
    judge these classes; where that is all of them, the method has no report.

    Raises:
        UserError: recordings cannot be read, or no class has recordings that show it, and others, in the parts to
            learn from and to judge by.
    """
    results: dict[str, Any] = {"task": task, "protocol": options.protocol, "encoders": [], "left_out": {}}
    drawn: list[dict[str, np.ndarray]] = []
    for encoder in encoders:
        read, features = embeddings(encoder, table, progress)
        parts = _parts(read, options)
        classes = _classes(table, read, parts)
        true = np.array([[name in record.labels for name in classes] for record in read], float)
        if not results["encoders"]:
            results |= {"classes": classes, "left_out_classes": [c for c in table.classes if c not in classes]}
            results["n"] = {s: sum(len(part[s]) for part in parts) for s in ("train", "val", "test")}
            results["folds"] = options.folds
        reports, aucs = {}, {}
        for name, method, own in _methods(options, parts):
            kept = [k for k, label in enumerate(classes) if _teach(label, read, own)]
            if len(kept) < len(classes):
                less = [label for k, label in enumerate(classes) if k not in kept]
                results["left_out"][name] = {"n": max(len(part["train"]) for part in own), "classes": less}
            if kept:
                shown = [classes[k] for k in kept]
                judged = _judged(method, features, true[:, kept], own, read, shown, options)
                reports[name], aucs[name] = judged.report, judged.macro_aucs
        if hasattr(kind_of(encoder.assembly.encoder_kinds["encoder"]).module, "ecgs"):  # compared with texts
            _, ecgs = embeddings(encoder, table, progress, compared=True)
            scores = zero_shot(ecgs, _classifier(encoder, table, classes, options))
            judged = _judged(_as_given, scores, true, parts, read, classes, options)
            reports["zero-shot"], aucs["zero-shot"] = judged.report, judged.macro_aucs
        results["encoders"].append({"name": encoder.name, "methods": reports})
        drawn.append(aucs)
    if len(drawn) > 1:
        first, second = (one["methods"] for one in results["encoders"])
        results["difference"] = {
            name: {"macro_auc": {"value": first[name]["macro_auc"]["value"] - second[name]["macro_auc"]["value"],
                                 "ci95": ci95(drawn[0][name] - drawn[1][name])}}
            for name in first
        }  # fmt: skip
    return results


Part = Mapping[str, np.ndarray]  # by split the places of recordings
Method = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray], Scores]


def _parts(records: Sequence[Labelled], options: Options) -> list[dict[str, np.ndarray]]:
    """What is learnt from, chosen by and judged by: once, or once for each fold."""
    if not options.folds:
        return [{s: _where(r.split == s for r in records) for s in ("train", "val", "test")}]
    fold = np.array([int(_hash(options.seed, r.patient)[:12], 16) % options.folds for r in records])
    parts = []
    for number in range(options.folds):
        test, val = fold == number, fold == (number + 1) % options.folds
        parts.append({"train": _where(~test & ~val), "val": _where(val), "test": _where(test)})
    return parts


def _where(chosen: Any) -> np.ndarray:
    return np.flatnonzero(chosen if isinstance(chosen, np.ndarray) else np.fromiter(chosen, bool))


def _hash(seed: int, patient: str) -> str:
    return hashlib.sha256(f"{seed}:{patient}".encode()).hexdigest()


def _classes(table: LabelTable, records: Sequence[Labelled], parts: Sequence[Part]) -> list[str]:
    """Those that some recordings show and others do not, in all of each part to learn from and where is judged."""
    judged = np.concatenate([part["test"] for part in parts])
    classes = [name for name in table.classes if _both(name, records, judged) and _teach(name, records, parts)]
    if not classes or not all(len(part["val"]) for part in parts):
        counts = {split: sum(len(part[split]) for part in parts) for split in ("train", "val", "test")}
        found = f"recordings {counts}, and no class that only some of them show"
        fix = "give more recordings of more classes, or --folds 5 where they are few"
        raise UserError("--labels", found, "a class with and without it in train and test, and some in val", fix)
    return classes


def _both(name: str, records: Sequence[Labelled], places: np.ndarray) -> bool:
    return 0 < sum(name in records[place].labels for place in places) < len(places)


def _teach(name: str, records: Sequence[Labelled], parts: Sequence[Part]) -> bool:
    """Whether a class can be learnt from what every part has for that."""
    return all(_both(name, records, part["train"]) for part in parts)


def _methods(options: Options, parts: Sequence[Part]) -> Iterator[tuple[str, Method, Sequence[Part]]]:
    """Each with its name and the parts that it learns from and is judged by."""
    for fraction in options.fractions:
        head = _by_merl if options.protocol == "merl" else _by_logistic
        fewer = [{**part, "train": _some_of(part["train"], fraction, options.seed)} for part in parts]
        yield f"linear, {fraction:g} %", partial(head, seed=options.seed), fewer
    yield f"{options.neighbours} neighbours", partial(_nearest, count=options.neighbours), parts


def _some_of(places: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """So many per cent of these."""
    count = max(1, math.floor(fraction / 100 * len(places)))
    return places[np.random.default_rng(seed).permutation(len(places))[:count]]


def _by_logistic(
    train: np.ndarray, true: np.ndarray, val: np.ndarray, val_true: np.ndarray, test: np.ndarray, seed: int
) -> Scores:
    """The penalty with the highest macro AUROC of the validation part."""
    train, val, test = standardised(train, val, test)
    heads = logistic_heads(train, true)
    areas = np.nan_to_num([macro_auroc(apply_head(val, head), val_true) for head in heads])
    best = heads[int(np.argmax(areas))]
    return {"val": apply_head(val, best), "test": apply_head(test, best)}


def _by_merl(
    train: np.ndarray, true: np.ndarray, val: np.ndarray, val_true: np.ndarray, test: np.ndarray, seed: int
) -> Scores:
    head = merl_head(train, true, seed)
    return {"val": apply_head(val, head), "test": apply_head(test, head)}


def _nearest(
    train: np.ndarray, true: np.ndarray, val: np.ndarray, val_true: np.ndarray, test: np.ndarray, count: int
) -> Scores:
    train, val, test = standardised(train, val, test)
    return {"val": neighbours(train, true, val, count), "test": neighbours(train, true, test, count)}


def _as_given(
    train: np.ndarray, true: np.ndarray, val: np.ndarray, val_true: np.ndarray, test: np.ndarray
) -> Scores:
    """Of scores that nothing is learnt for."""
    return {"val": val, "test": test}


def _classifier(encoder: Encoder, table: LabelTable, classes: Sequence[str], options: Options) -> np.ndarray:
    """(D, K): what the text tower makes of the words of each class; MERL writes them in lower case."""
    assembly, lower = encoder.assembly, options.protocol == "merl"
    structure, longest = encoder_structure(assembly), assembly.text.max_len
    assert longest is not None
    own = {name.removeprefix("encoder."): x for name, x in encoder.arrays.items()}
    texts = jax.jit(lambda arrays, ids: structure.bind(arrays).texts(ids))
    found = []
    for name in classes:
        words = options.prompts.get(name, table.classes[name])
        ids = [padded_ids(assembly.tokenizer, text.lower() if lower else text, longest) for text in words]
        found.append(np.concatenate([np.asarray(texts(own, one[None])) for one in ids]))
    return prompt_classifier(found)


def read_prompts(path: Path | None) -> dict[str, list[str]]:
    """A JSON file of {class: its words, or a list of such}.

    Raises:
        UserError: it is none.
    """
    found: dict[str, list[str]] = {}
    for name, said in (read_json(path, "write it so") if path else {}).items():
        texts = [said] if isinstance(said, str) else said
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise UserError(f"{path}, {name}", repr(said)[:80], "the words of a class, or a list of such", "mend it")
        found[name] = texts
    return found


def _judged(
    method: Method, features: np.ndarray, true: np.ndarray, parts: Sequence[Part], records: Sequence[Labelled],
    classes: Sequence[str], options: Options,
) -> Judged:  # fmt: skip
    """What the scores of the test recordings of all parts are worth together."""
    scores, decided = np.zeros_like(true), np.zeros_like(true)
    for part in parts:
        train, val, test = (part[split] for split in ("train", "val", "test"))
        found = method(features[train], true[train], features[val], true[val], features[test])
        scores[test] = found["test"]
        for k in range(len(classes)):
            if options.protocol == "merl":
                threshold = best_f1(found["test"][:, k], true[test, k])[1] if len(test) else 0.0
            elif true[val, k].any():
                threshold = best_f1(found["val"][:, k], true[val, k])[1]
            else:  # as many as in the training part
                threshold = float(np.quantile(found["val"][:, k], 1 - true[train, k].mean()))
            decided[test, k] = found["test"][:, k] >= threshold
    judged = np.concatenate([part["test"] for part in parts])
    patients = Patients([records[place].patient for place in judged], options.seed)
    return judge(scores[judged], decided[judged], true[judged], classes, patients)


def write_results(out: Path, results: Mapping[str, Any]) -> str:
    """Leave TASK.json and TASK.md in the folder `out`; returns the text of the second."""
    folder, text = writable_folder(out, "--out"), filled("probe.md", results=results)
    write_json(folder / f"{results['task']}.json", dict(results))
    write_atomic(folder / f"{results['task']}.md", lambda file: file.write(text.encode()))
    return text


def run_probe(
    encoder: Encoder, tasks: Mapping[str, LabelTable], options: Options, out: Path, control: bool, progress: bool
) -> list[str]:
    """Judge an encoder, and with `control` a random one beside it, on each task; returns the reports' texts."""
    if jax.process_count() > 1:
        raise UserError("mesh", "several processes", "one", "judge encoders with one process")
    known = dict.fromkeys(name for table in tasks.values() for name in table.classes)
    if unknown := [name for name in options.prompts if name not in known]:
        fix = nearest(unknown[0], known) or "leave it out"
        raise UserError("--prompts", some(unknown), f"classes of the task: {some(known)}", fix)
    encoders = [encoder, random_encoder(encoder)] if control else [encoder]
    return [write_results(out, probe(task, table, encoders, options, progress)) for task, table in tasks.items()]


def read_tasks(tasks: Sequence[str], labels: str | None, root: Path | None, seed: int) -> dict[str, LabelTable]:
    """The labelled recordings of each task, a table by the name of its file. root: where its recordings are, if not
    beside it."""
    read = {Path(labels or "").stem if t == "table" else t: read_labels(t, labels, seed) for t in tasks}
    return {name: replace(table, root=root) if root else table for name, table in read.items()}
