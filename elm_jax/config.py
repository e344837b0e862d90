"""The configuration: every key with its type, default and meaning, and what a value may be.

A config file's `get_config()` and the flags of a command make a ConfigDict or dict; `resolve` checks it and
returns the frozen `Config` that everything else reads. No key is read that is not in these dataclasses.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ml_collections import ConfigDict, config_dict

from elm_jax import compat, schema
from elm_jax.ecg.recording import LEADS
from elm_jax.elms import ALIASES, ELMS, Viewed
from elm_jax.errors import UserError, closest
from elm_jax.objective_keys import DpoConfig, RlConfig, SslConfig
from elm_jax.schema import key
from elm_jax.scoring.protocols import PROTOCOLS
from elm_jax.text.forms import CHAT_FORMS

# A run may be resumed with other values of these (a trailing dot: of the whole section).
RESUMABLE = (
    "workdir", "debug", "mesh.", "log.", "eval.", "data.workers", "data.timeout",
    "data.outside_root", "train.steps", "train.epochs", "train.save_every", "train.keep", "train.timeout",
)  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    names: tuple[str, ...] = key((), "datasets: folders or files under data.root, or dataset names")
    root: str = key(".", "folder that the datasets and their ecg_path are relative to")
    outside_root: bool = key(False, "records may name recordings outside data.root: absolute, by .. or through links")
    fold: int = key(1, "which of the dataset's folds", limit="at least 1")
    val_fraction: float = key(
        0.02, "part of the training patients kept for validation, of a dataset without a split val of its own; with 0 "
        "such splits alone validate, where train.eval_every or early_stopping is set", limit="at least 0 and below 1",
    )
    representation: str = key(
        "signal", "what the model sees of an ECG", choices=("signal", "symbolic", "stacked_signal", "rgb")
    )
    segment_len: int = key(2500, "samples of an ECG after resampling", limit="from 1 to 10000000")
    sampling_rate: int = key(250, "samples per second after resampling", limit="from 1 to 100000")
    leads: tuple[str, ...] = key(
        LEADS, "leads by name, or by place in the canonical order (from 0)",
        choices=LEADS, accepts=tuple[int | str, ...],
    )  # fmt: skip
    normalize: str = key("minmax", "how a signal is scaled", choices=("minmax",))
    norm_eps: float = key(1e-6, "added to the range of the signal before dividing by it", limit="above 0")
    subset: float | None = key(None, "use this part of the training records", limit="above 0 and at most 1")
    weights: tuple[float, ...] | None = key(
        None, "how often an epoch sees each of data.names; 1 is every sample once", limit="above 0"
    )
    augment_ecg: bool = key(False, "random changes to training signals: noise, baseline wander")
    augment_rgb: bool = key(False, "random changes to training images: rotation, blur, colours")
    perturb: str | None = key(None, "replace the ECG, as a control", choices=("noise", "zeros", "only_text"))
    system_prompt: str | None = key(None, "the system prompt: its text, or the path of a text file")
    ecg_tokenizer: str | None = key(None, "file of the symbolic tokenizer: .json or the reference's .pkl")
    min_ecg_tokens: int = key(512, "symbolic tokens of an ECG that truncation keeps", limit="at least 0")
    explicit_thinking: bool = key(False, "answers begin with a think tag that is given, not generated")
    pack: bool = key(True, "several conversations in a row")
    share: str = key("system", "what conversations of a row compute once", choices=("none", "system", "ecg"))
    max_len: int = key(2048, "longest row, in tokens", limit="at least 1")
    max_bad_records: float = key(
        0.001, "part of the records that may be bad before the run stops", limit="at least 0 and below 1"
    )
    workers: int = key(0, "loader processes; 0 loads in the training process", limit="at least 0")
    timeout: float = key(300.0, "seconds of reading one record that stop a training; 0 is never", limit="at least 0")


@dataclass(frozen=True)
class LoraConfig:
    rank: int = key(0, "rank of the LoRA matrices; 0 is no LoRA", limit="at least 0")
    alpha: float = key(32.0, "LoRA's scale is alpha / rank", limit="above 0")
    dropout: float = key(0.0, "dropout before the LoRA matrices", limit="at least 0 and below 1")
    targets: str = key("all", "layers with LoRA: all, peft (the choice of PEFT), or names as q_proj,v_proj")
    adapter: str | None = key(None, "a PEFT adapter folder to start from")


@dataclass(frozen=True)
class LlmConfig:
    name: str = key("qwen2.5-1.5b-instruct", "registry key, Hugging Face id or local folder")
    scratch: dict[str, Any] | None = key(None, "sizes of a randomly initialised LLM, instead of weights")
    compute_dtype: str = key("bfloat16", "of activations and frozen weights", choices=("bfloat16", "float32"))
    param_dtype: str = key("float32", "of trained weights", choices=("bfloat16", "float32"))
    scan: bool = key(True, "compile one layer and scan over them")
    remat: str = key("dots", "what the backward pass recomputes", choices=("none", "full", "dots"))
    dropout: float = key(0.0, "dropout after embeddings and before each residual sum", limit="at least 0 and below 1")
    chat: str | None = key(None, "chat form; None is that of the tokenizer", choices=tuple(CHAT_FORMS))
    attention: str = key("auto", "attention kernel", choices=("auto", "xla", "cudnn"))
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class EncoderConfig:
    name: str | None = key(None, "the ECG encoder, for example merl")
    checkpoint: str | None = key(None, "its weights: a .safetensors or .pt file; None initialises randomly")
    tokens: int = key(1, "signal tokens of an ECG", limit="at least 1")
    cache: bool = key(False, "compute a frozen encoder's outputs once for each recording, and keep them on disk")
    config: dict[str, Any] = key({}, "sizes of the encoder, by their names in its table")


@dataclass(frozen=True)
class ConnectorConfig:
    hidden: int | None = key(None, "width inside an MLP connector; None is the LLM's", limit="at least 1")


@dataclass(frozen=True)
class MuonConfig:
    momentum: float = key(0.95, "momentum", limit="at least 0 and below 1")
    ns_steps: int = key(5, "Newton-Schulz iterations", limit="at least 1")
    adamw_lr_ratio: float = key(0.015, "learning rate of what AdamW has, by optim.lr", limit="above 0")


@dataclass(frozen=True)
class OptimConfig:
    name: str = key("adamw", "the optimizer", choices=("adam", "adamw", "muon"))
    lr: float = key(1e-4, "peak learning rate", limit="above 0")
    schedule: str = key("constant", "learning rate after warm-up", choices=("constant", "cosine", "inv_sqrt"))
    warmup_ratio: float = key(0.1, "part of the steps that warms up linearly", limit="from 0 to 1")
    warmup_steps: int | None = key(None, "steps that warm up, instead of a part of them", limit="at least 0")
    min_lr_ratio: float = key(0.1, "where cosine ends, relative to optim.lr", limit="from 0 to 1")
    weight_decay: float = key(1e-2, "decoupled for adamw, in the gradient for adam", limit="at least 0")
    weight_decay_scale: str = key(
        "none", "how weight decay follows the batch size", choices=("none", "inv_sqrt", "inv_linear")
    )
    beta1: float = key(0.9, "decay of the first moment", limit="at least 0 and below 1")
    beta2: float = key(0.99, "decay of the second moment", limit="at least 0 and below 1")
    eps: float = key(1e-8, "added to the root of the second moment", limit="above 0")
    grad_clip: float = key(0.0, "largest global gradient norm; 0 is no clipping", limit="at least 0")
    skip_spikes: float = key(
        0.0, "skip steps whose loss or gradient norm is so many standard deviations above the mean of the last 128; "
        "6 is usual, 0 skips none", limit="at least 0",
    )  # fmt: skip
    accum_steps: int = key(1, "micro-batches of a step", limit="at least 1")
    ref_batch: int | None = key(
        None, "batch size that lr and weight decay are meant for; None is this one", limit="at least 1"
    )
    muon: MuonConfig = field(default_factory=MuonConfig)


@dataclass(frozen=True)
class TrainConfig:
    batch_size: int | None = key(
        8, "rows of a step, over all hosts and micro-batches; None where train.conversations is given",
        limit="at least 1"
    )
    conversations: int | None = key(
        None, "conversations of a step, instead of rows: as many rows as they need", limit="at least 1"
    )
    epochs: int = key(1, "passes over the data", limit="at least 1")
    steps: int | None = key(None, "optimizer steps, instead of epochs", limit="at least 1")
    log_every: int = key(10, "steps between lines of metrics.jsonl", limit="at least 1")
    save_every: int = key(500, "steps between checkpoints", limit="at least 1")
    eval_every: int | None = key(
        None, "steps between validation losses; None is train.save_every", limit="at least 1"
    )
    keep: int = key(2, "checkpoints kept, the best one aside", limit="at least 1")
    early_stopping: bool = key(False, "stop when the validation loss no longer falls")
    patience: int = key(5, "validations without a better loss before stopping", limit="at least 1")
    patience_delta: float = key(0.1, "how much lower counts as better", limit="at least 0")
    timeout: float = key(1800.0, "seconds without progress that end a run, with stacks; 0 is none", limit="at least 0")

    @property
    def count(self) -> int:
        """Conversations of a step where these are counted, else its rows."""
        return self.conversations or self.batch_size or 0


@dataclass(frozen=True)
class MeshConfig:
    data: int = key(-1, "replicas; -1 is what the other axes leave", limit="-1 or at least 1")
    fsdp: int = key(1, "shards of weights and optimizer state", limit="-1 or at least 1")
    tensor: int = key(1, "shards of each layer's work", limit="-1 or at least 1")


@dataclass(frozen=True)
class EvalConfig:
    at_end: bool = key(False, "evaluate when training has finished")
    batch_size: int = key(32, "conversations generated at once", limit="at least 1")
    max_new_tokens: int = key(128, "longest answer, in tokens", limit="at least 1")
    temperature: float = key(0.0, "0 is greedy decoding", limit="at least 0")
    top_p: float = key(1.0, "nucleus of sampling", limit="above 0 and at most 1")
    repetition_penalty: float = key(
        1.0, "logits of tokens that were there already are divided by it, negative ones multiplied", limit="above 0"
    )
    controls: tuple[str, ...] = key(
        ("zeros", "noise", "text_only", "shuffled"), "what the ECG is replaced by, to compare",
        choices=("zeros", "noise", "text_only", "shuffled"),
    )  # fmt: skip
    folds: tuple[int, ...] | None = key(None, "folds to average over; None is data.fold", limit="at least 1")
    seeds: tuple[int, ...] | None = key(None, "seeds to average over; None is seed", limit="at least 0")
    limit: int | None = key(None, "evaluate only the first so many questions", limit="at least 1")
    labels: str | None = key(None, "PTB-XL's folder: also ask for each of its statements whether the ECG shows it")
    protocol: str = key("ours", "by which rules answers are scored", choices=tuple(PROTOCOLS))
    wordnet: str | None = key(None, "folder of NLTK's data, for METEOR's WordNet; None looks in NLTK's places")
    bert_model: str | None = key(None, "model of BERTScore, which is computed if it is named or the protocol has it")


@dataclass(frozen=True)
class LogConfig:
    progress: bool = key(True, "progress bar on a terminal")
    wandb: bool = key(False, "log to Weights & Biases too")
    wandb_project: str | None = key(None, "its project there; None is WANDB_PROJECT, else elm_jax")
    wandb_entity: str | None = key(None, "the user or team there; None is WANDB_ENTITY, else your own")
    wandb_tags: tuple[str, ...] = key((), "its tags there; none are those of WANDB_TAGS")
    tensorboard: bool = key(False, "log to TensorBoard too")
    profile_steps: str | None = key(None, "profile steps a to b, as a:b")


@dataclass(frozen=True)
class Config(Viewed):
    """A checked configuration. Made by `resolve`; leads are names, aliases of `elm` are replaced."""

    seed: int = key(0, "seed of everything random", limit="from 0 to 4294967295")
    workdir: str = key("runs/<name>", "the run's folder; <name> is the config file's name")
    objective: str = key("sft", "what is learnt, a row of elm_jax/objectives; its older name is phase")
    elm: str = key("mlp_llava", "how an ECG enters the LLM", choices=ELMS)
    update: tuple[str, ...] = key(
        ("connector", "llm"), "the parts that are trained", choices=("encoder", "connector", "llm")
    )
    init_from: str | None = key(None, "start from the weights of this run folder")
    init_missing_ok: tuple[str, ...] = key((), "parts that init_from may lack")
    compat: tuple[str, ...] = key((), "behaviours of the reference to keep (elm_jax/compat.py)")
    debug: bool = key(False, "show the traceback of a user error, as --debug does")
    data: DataConfig = field(default_factory=DataConfig)
    llm: LlmConfig = field(default_factory=LlmConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    encoders: dict[str, Any] = key({}, "of an elm of several views: the keys of encoder of each but the first, by view")
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    rl: RlConfig = field(default_factory=RlConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    ssl: SslConfig = field(default_factory=SslConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def encoder_of(self, view: str) -> EncoderConfig:
        """What is said of a view's encoder: of the first one in `encoder`, of another in `encoders`."""
        return self.encoder if view == next(iter(self.views)) else EncoderConfig(**self.encoders.get(view, {}))

    @property
    def encoder_parts(self) -> dict[str, EncoderConfig]:
        """What is said of each encoder, by its part of the model."""
        return {self.part("encoder", name): self.encoder_of(name) for name, view in self.views.items() if view.encoder}


SCHEMA = dict(schema.walk(Config))  # dotted name -> Key
OLDER = {"phase": "objective"}  # former names of keys, which may be written still
SECTIONS = {".".join(name.split(".")[:depth]) for name in SCHEMA for depth in range(1, name.count(".") + 1)}


def default_config() -> ConfigDict:
    """All keys with their defaults, for a config file to change; one that is None can be set to its type.

    A key and its older name are one: what is set last counts.
    """
    tree: dict[str, Any] = {}
    for name, k in SCHEMA.items():
        *sections, leaf = name.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        empty = config_dict.placeholder(schema.kinds(k.type)[0])
        section[leaf] = empty if k.default is None else k.default
    for older, name in OLDER.items():
        tree[older] = tree[name] = config_dict.FieldReference(tree[name])
    return ConfigDict(tree)


def renamed(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`values` under the names that keys have now; errors name keys with `prefix`.

    Raises:
        UserError: a key and its older name have different values.
    """
    found = dict(values)
    for older, name in OLDER.items():
        if older in found and found.setdefault(name, found[older]) != found.pop(older):
            raise UserError(
                prefix + older, f"{values[older]!r} beside {prefix}{name}={values[name]!r}",
                f"one of the two: {older} is the older name of {name}", f"leave {prefix}{older} out",
            )  # fmt: skip
    return found


def resolve(cd: ConfigDict | Mapping[str, Any], config_name: str = "default") -> Config:
    """The checked Config of what a config file returned or a config.json holds, with defaults for the rest.

    `config_name` replaces `<name>` in workdir. Raises UserError, naming the key, for an unknown key, a wrong
    type or value, or keys that contradict each other.
    """
    values = dict(_leaves(asdict(Config())))
    for name, value in _leaves(renamed(cd.to_dict() if isinstance(cd, ConfigDict) else cd)):
        if name not in SCHEMA:
            raise unknown_key(name)
        values[name] = _check(name, value)
    values["workdir"] = values["workdir"].replace("<name>", config_name)
    if values["train.conversations"] is not None and values["train.batch_size"] == TrainConfig.batch_size:
        values["train.batch_size"] = None  # nobody has asked for rows
    config: Config = schema.build(Config, values)
    _check_together(config)
    return config


def to_dict(cfg: Config) -> dict[str, Any]:
    """`cfg` as plain JSON values; `resolve` reads them back to an equal Config."""
    return json.loads(json.dumps(asdict(cfg)))


def differences(old: Mapping[str, Any], new: Config) -> dict[str, str]:
    """Keys that `new` may not change when it resumes the run whose config.json is `old`, but does -> "was …, now …".

    Of two dictionaries only the entries that differ are shown.
    """
    defaults = _leaves(to_dict(Config()))
    before, after = dict(defaults) | dict(_leaves(renamed(old))), dict(_leaves(to_dict(new)))
    changed = {}
    for name, was in before.items():
        now = after.get(name)
        if (name in after and was == now) or name.startswith(RESUMABLE):
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            same = {entry for entry in was if entry in now and was[entry] == now[entry]}
            was, now = ({entry: x for entry, x in each.items() if entry not in same} for each in (was, now))
        changed[name] = f"was {schema.shown(was)}, now {schema.shown(now)}"
    return changed


def from_text(name: str, text: str) -> Any:
    """The value that a flag's text stands for; text that does not fit the key's type is left to `resolve`."""
    return schema.read(text, SCHEMA[name].accepts or SCHEMA[name].type)


def unknown_key(name: str, prefix: str = "") -> UserError:
    """The error for a key that does not exist, with the nearest that does; `prefix` as the user wrote it."""
    if name in SECTIONS:
        first = next(known for known in SCHEMA if known.startswith(f"{name}."))
        return UserError(prefix + name, "a value", "a section of keys", f"set for example {prefix}{first}")
    meant = closest_key(name)
    fix = f"did you mean '{prefix}{meant}'?" if meant else "remove it"
    return UserError(prefix + name, "an unknown key", "one that --help lists", fix)


def closest_key(name: str) -> str:
    """The key or section that `name` may mean: a slip of one in its own section, one with the same last part, else the
    most similar, or ""."""
    section, _, leaf = name.rpartition(".")
    beside = [known.rpartition(".")[2] for known in SCHEMA if section and known.rpartition(".")[0] == section]
    if meant := closest(leaf, beside, cutoff=0.85):
        return f"{section}.{meant}"
    same = [known for known in SCHEMA if known.rpartition(".")[2] == leaf]
    return closest(name, same or [*SCHEMA, *SECTIONS]) or (same[0] if same else "")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value); a dictionary that is the value of a key stays whole."""
    for name, value in tree.items():
        if f"{prefix}{name}" in SECTIONS and isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _check(name: str, value: Any) -> Any:
    if name == "elm" and isinstance(value, str):
        value = ALIASES.get(value, value)
    if name == "data.leads" and isinstance(value, list | tuple):
        value = tuple(LEADS[lead] if type(lead) is int and 0 <= lead < len(LEADS) else lead for lead in value)
    if name == "update" and isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        schema.check(name, SCHEMA[name], list(dict.fromkeys(part.partition(".")[0] for part in value)))
        return schema.check(name, replace(SCHEMA[name], choices=()), value)  # of one view: `check_views` knows it
    return schema.check(name, SCHEMA[name], value)


def _check_together(c: Config) -> None:
    """Rules that one key alone does not decide, and the syntax of profile_steps."""
    compat.check(c.compat)
    weights, names, steps = c.data.weights, c.data.names, c.log.profile_steps
    first, _, last = (steps or "0:1").partition(":")
    free = [axis for axis, size in asdict(c.mesh).items() if size == -1]
    accum = c.optim.accum_steps
    # Holds, then where, found, expected and fix of the error if it does not.
    rules = [
        (c.workdir, "workdir", "an empty text", "a folder", "name one, or leave it out for runs/<name>"),
        (c.update, "update", "nothing", "the parts to train", "name encoder, connector or llm"),
        (c.data.leads, "data.leads", "no leads", "at least one", "name some, or leave it out for all 12"),
        (weights is None or len(weights) == len(names), "data.weights", f"{len(weights or ())} weights",
         f"{len(names)}, one for each of data.names", "give as many weights as names"),
        ((c.train.batch_size is None) != (c.train.conversations is None), "train.batch_size",
         f"{c.train.batch_size} beside train.conversations={c.train.conversations}",
         "one of the two: a step counts rows or conversations", "set the other to None"),
        (c.train.count % accum == 0, "train.conversations" if c.train.conversations else "train.batch_size",
         str(c.train.count), f"a multiple of optim.accum_steps={accum}", "change one of them"),
        (len(free) <= 1, "mesh", f"-1 for {' and '.join(free)}", "-1 for one axis at most",
         "give the sizes of the others"),
        (first.isdecimal() and last.isdecimal() and int(first) < int(last), "log.profile_steps", repr(steps),
         "a:b with a below b", "write for example 10:20"),
    ]  # fmt: skip
    for holds, name, found, expected, fix in rules:
        if not holds:
            raise UserError(name, found, expected, fix)
