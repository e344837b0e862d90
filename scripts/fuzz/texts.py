"""Conversations, command lines, configurations of runs, tables, lines of results: valid ones, and what reads them."""

import argparse
import functools
import io
import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

from elm_jax import cli
from elm_jax.cli import ConfigFlags
from elm_jax.config import Config, default_config, resolve, to_dict
from elm_jax.text.forms import CHAT_FORMS
from elm_jax.text.render import PHASES, TextSpec, add_tokens, decode, to_prompt, to_prompts, to_tokens
from scripts.fuzz.changes import Files

# ---- render

LLAMA_LIKE = ("llama2", "vicuna")
LEFT, RIGHT = "\u202e", "\u2066"
PIECES = (
    *("what is it?", "an ecg", " ", "\n", "", "<ecg>", "< ECG >\n", "<image>", "<signal>", "<think>\n", "</think>"),
    *("<answer>", "</answer>", "user:", "Assistant : ", "q\uff1a", "a picture of", "<|im_end|>", "<|im_start|>"),
    *("<|eot_id|>", "<|begin_of_text|>", "</s>", "<s>", "[INST] ", " [/INST]", "<<SYS>>\n", "<bos>", "<end_of_turn>"),
    *("\ud800", "\udfff\ud800", "\x00", "\x1b[31m", LEFT, RIGHT, "\u00e9", "e\u0301", "\u6f22\u5b57", "\U0001f600"),
    *("\u0130", "signal_12", "<|endoftext|>", "a" * 3000, "\u0627" * 700, "<ecg>" * 50, "user:" * 300, " " * 20_000),
    *("< " * 2000, "<\n\t" * 500, "user" + " " * 9000),
)
SPEAKERS = ("human", "gpt", "user", "assistant", "system", " USER ", "", "tool", "\ud800")
COMPAT = ("response_by_ids", "clean_answers", "special_tokens_in_text", "truncate_tokens")


def conversations() -> list[Files]:
    """Every form, with the choice of settings as a number."""
    turns = [{"from": "human", "value": "<ecg>\nwhat is it?"}, {"from": "gpt", "value": "<think>\nhm</think>an ecg"}]
    roles = [{"role": "system", "content": "be short"}, {"role": "user", "content": "a"},
             {"role": "assistant", "content": "b"}, {"role": "user", "content": None}]  # fmt: skip
    forms = (turns, roles, ["single-verify", "is it?", ["yes", "no"]], "sinus rhythm", json.dumps(turns))
    return [_case(form, number) for number, form in enumerate(forms)]


def _case(conversation: Any, settings: int, system: Any = None, ecgs: Any = None) -> Files:
    case = {"conversation": conversation, "settings": settings, "system": system, "ecgs": ecgs}
    return {"a.json": json.dumps(case).encode()}


def new_conversation(rng: random.Random, files: Files) -> Files:
    """Half of the inputs are made anew: turns of hostile pieces, any number of them, under any settings."""
    if rng.random() < 0.5:
        return files

    def text() -> str:
        return "".join(rng.choice(PIECES) for _ in range(rng.choice((0, 1, 1, 2, 4, 9))))

    count = rng.choice((0, 1, 2, 3, 5, 8, 40))
    names = rng.choice((("from", "value"), ("role", "content")))
    turns: Any = [dict(zip(names, (rng.choice(SPEAKERS), text()), strict=True)) for _ in range(count)]
    if rng.random() < 0.3:
        turns = rng.choice((text(), [text(), text(), rng.choice((text(), [text(), 3, text()], 4.5))]))
    elif turns and rng.random() < 0.1:
        turns[rng.randrange(count)] = rng.choice((None, [], {}, {"from": "human"}, {"value": 3}, 7, turns[0]))
    ecgs = rng.choice((None, None, 1, 2, 3, 50))
    return _case(turns, rng.randrange(1 << 30), rng.choice((None, None, "", text())), ecgs)


def read_conversation(data: bytes) -> None:
    """Render a case as training tokens, prompts or a prompt; ids, what is learnt and ECGs must fit together."""
    try:
        case = json.loads(data)
        conversation, number, system, ecgs = (case[key] for key in ("conversation", "settings", "system", "ecgs"))
    except (ValueError, KeyError, TypeError, RecursionError):
        conversation, number, system, ecgs = data.decode("utf-8", "surrogateescape"), len(data), None, None
    number = number if type(number) is int and number >= 0 else 0
    spec = _spec(number, system if isinstance(system, str) else None)
    ecgs = ecgs if type(ecgs) is int and 0 < ecgs < 1000 else None
    tokenizer = _tokenizer(spec.family in LLAMA_LIKE)
    if number % 3 == 0:
        found = [one for one, _ in to_prompts(conversation, tokenizer, spec, ecgs)]
    else:
        found = [(to_tokens if number % 3 == 1 else to_prompt)(conversation, tokenizer, spec, ecgs)]
    for one in found:
        assert one.ids.shape == one.supervised.shape and one.ids.min() >= 0 and one.ids.max() < len(tokenizer)
        assert spec.max_len is None or len(one.ids) <= spec.max_len
        assert one.signal_positions.shape[1] == spec.signal_tokens
        assert number % 3 != 1 or one.supervised.any() or spec.compat
        decode(one.ids, tokenizer, spec.family)


def _spec(number: int, system: str | None) -> TextSpec:
    """The settings of this number."""
    rest, family = divmod(number, len(CHAT_FORMS))
    rest, phase = divmod(rest, len(PHASES) + 1)
    rest, signals = divmod(rest, 4)
    rest, limit = divmod(rest, 6)
    rest, thinks = divmod(rest, 2)
    compat = tuple(itertools.compress(COMPAT, map(int, f"{rest % 16:04b}"))) if rest % 3 == 0 else ()
    return TextSpec(
        list(CHAT_FORMS)[family], (1, 0, 4, 32)[signals], system, (*PHASES, "sft")[phase], bool(thinks),
        (None, 1, 16, 64, 300, 2048)[limit], compat,
    )  # fmt: skip


@functools.cache
def _tokenizer(llama: bool) -> Any:
    """As large as a model's: 50 000 tokens over bytes, with the special tokens of all families; or as Llama 2's is."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(33, 127)] + ["\u2581"] if llama else pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {word: i for i, word in enumerate([*(f"<0x{i:02X}>" for i in range(256)), *sorted(letters)])}
    vocabulary |= {} if "<unk>" in vocabulary else {"<unk>": len(vocabulary)}
    merges: list[tuple[str, str]] = []
    words, rng = sorted(letters), random.Random(0)
    while len(vocabulary) < 50_000:
        pair = (rng.choice(words), rng.choice(words))
        if len(word := "".join(pair)) <= 8 and word not in vocabulary:
            vocabulary[word] = len(vocabulary)
            merges.append(pair)
            words += [word] if len(word) <= 4 else []
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, byte_fallback=llama, unk_token="<unk>"))
    if llama:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first")
        backend.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    else:
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    special = {token for form in CHAT_FORMS.values() for token in (*form.tokens, *form.stops) if token[0] != "{"}
    made.add_tokens(sorted(special), special_tokens=True)
    add_tokens(made, "sft")
    return made


# ---- command lines and configurations


def command_lines() -> list[Files]:
    """Flags, one a line."""
    rows = (
        ("--config.update=connector,llm", "--config.optim.lr", "1e-3", "--noconfig.data.pack", "--config.seed=7"),
        ('--config.llm.scratch={"layers": 2}', "--config.llm.scratch.width=8", "--config.mesh.data", "-1"),
        ("--config.data.leads=0,V1", "--config.train.early_stopping", "--config.encoder.config.kind=small", "--debug"),
        ("--config.data.weights=(1, 2.5)", "--config.data.names=a,b", "--config.eval.limit=None", "--json", "out.json"),
        ("--config.phase=pretrain", "--config.elm=mlp_llava", "--config.workdir=runs/x", "--config.data.root=../y"),
    )
    return [{"a.args": "\n".join(row).encode()} for row in rows]


def read_command_line(data: bytes) -> None:
    """The configuration that flags make over the defaults; it must be the same once it is written and read."""
    flags = ConfigFlags.parse(data.decode("utf-8", "surrogateescape").split("\n"))
    config = flags.over(default_config().to_dict(), "fuzz")
    assert resolve(json.loads(json.dumps(to_dict(config))), "fuzz") == config
    parser = cli.Parser("fuzz")
    parser.add_argument("--json")
    parser.add_argument("--steps", type=int)
    assert isinstance(parser.parse_args(flags.rest), argparse.Namespace)


def run_configs() -> list[Files]:
    """config.json of runs, of this version and as old ones wrote it."""
    other = {"data": {"names": ["x"], "leads": ["V1"]}, "elm": "mlp_llava"}
    trees = [to_dict(resolve({"workdir": "a"})), to_dict(resolve(other))]
    old = json.loads(json.dumps(trees[0]))
    old["phase"] = old.pop("objective")
    return [{"config.json": json.dumps(tree).encode()} for tree in (*trees, old)]


def read_run_config(path: Path) -> None:
    """As every command that takes a run folder does."""
    from elm_jax.run.config import config_of_run

    assert isinstance(config_of_run(str(path.parent), ConfigFlags()), Config)


# ---- tables and lines


def tables() -> list[Files]:
    """JSON, JSON lines and Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "an ecg"}]
    row = {"text": turns, "name": "x", "split": "train"}
    rows = [{"ecg_path": f"{i}.npy", **row, "patient_id": str(i)} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    found = [{"a.jsonl": lines.encode()}, {"a.json": json.dumps(rows).encode()}]
    flat = [{**row, "text": json.dumps(turns), "patient_id": i} for i, row in enumerate(rows)]
    for table in (pa.Table.from_pylist(rows), pa.Table.from_pylist(flat)):
        for options in ({}, {"compression": "none", "use_dictionary": False}, {"data_page_version": "2.0"}):
            sink = io.BytesIO()
            pq.write_table(table, sink, **options)
            found.append({"a.parquet": sink.getvalue()})
    return found


def read_table(path: Path) -> None:
    """All rows of a table, each with its conversation."""
    import datasets

    from elm_jax.data.table_files import file_tables
    from elm_jax.text.turns import decode_text, to_turns

    datasets.config.HF_DATASETS_CACHE = path.parent / "cache"
    for _, _, table in file_tables(path):
        for row in table:
            assert isinstance(row["ecg_path"], str | list | int | float | bool | None)
            to_turns(decode_text(row["text"]))


def lines() -> list[Files]:
    """metrics.jsonl and problems of an evaluation."""
    metrics = [{"step": i, "loss": 2.5 / i, "lr": 1e-3, "mfu": None, "tokens_per_s": 10.0} for i in range(1, 6)]
    return [{"metrics.jsonl": "".join(json.dumps(line) + "\n" for line in metrics).encode()}]


def read_lines(path: Path) -> None:
    """What a resumed run keeps of its metrics, which must be read again as it is."""
    from elm_jax.runtime.telemetry import MetricsFile

    kept = MetricsFile(path.parent, 3, writes=True).lines()
    assert all(line.get("step", 0) <= 3 for line in kept) and MetricsFile(path.parent, 3, writes=True).lines() == kept


def comparisons() -> list[Files]:
    """Two evaluated runs, as far as `compare` reads them; paths begin with the folder of a run."""
    files: Files = {}
    for run, shift in (("a", 0), ("b", 1)):
        answers = [
            {"id": f"q{i}", "question": "is it?", "name": "x", "patient": str(i % 3), "truth": "yes" if i % 2 else "no",
             "answer": "yes" if (i + shift) % 3 else "no", "ended": True, "question_type": "single-verify"}
            for i in range(6)
        ]  # fmt: skip
        text = "".join(json.dumps(line) + "\n" for line in answers).encode()
        files |= {
            f"{run}/eval/x/predictions.jsonl": text,
            f"{run}/eval/x/controls/zeros.jsonl": text,
            f"{run}/eval/x/metrics.json": json.dumps({"end_token": "</s>"}).encode(),
            f"{run}/config.json": json.dumps({"eval": {"wordnet": None, "bert_model": None}}).encode(),
        }
    return [files]


def read_comparison(path: Path) -> None:
    """The command, with what it prints thrown away."""
    from contextlib import redirect_stdout

    from elm_jax import compare

    folder = path.parents[3 - (path.name == "config.json") * 2]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        compare.main([str(folder / "a"), str(folder / "b")])
