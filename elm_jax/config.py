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
from elm_jax.elms import ALIASES, ELMS, RETRIEVED, View, Viewed
from elm_jax.errors import UserError, closest
from elm_jax.keys import (
    ConnectorConfig,
    DataConfig,
    DpoConfig,
    EncoderConfig,
    EvalConfig,
    LlmConfig,
    LogConfig,
    MeshConfig,
    OptimConfig,
    RetrievalConfig,
    RlConfig,
    SslConfig,
    TrainConfig,
)
from elm_jax.schema import key

# A run may be resumed with other values of these (a trailing dot: of the whole section).
RESUMABLE = (
    "workdir", "debug", "mesh.", "log.", "eval.", "data.workers", "data.timeout",
    "data.outside_root", "data.prefixes", "data.remote_gb", "retrieval.index",
    "train.steps", "train.epochs", "train.save_every",
    "train.save_minutes", "train.save_wait", "train.keep", "train.timeout", "rl.batch_size", "rl.show_every",
)  # fmt: skip


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
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
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

    @property
    def views(self) -> Mapping[str, View]:
        """The ways in which an ECG enters the model, by name: those of `elm`, and what is retrieved for it."""
        return super().views if self.retrieval.index is None else {**super().views, **RETRIEVED}

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
        if older not in found:
            continue
        value = found.pop(older)
        if found.setdefault(name, value) is not value and found[name] != value:
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


def lasting(cfg: Config) -> dict[str, Any]:
    """The keys of `cfg` that a resume may not change, with their values as `to_dict` has them."""
    return {name: value for name, value in _leaves(to_dict(cfg)) if not name.startswith(RESUMABLE)}


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
    if meant := closest(leaf, beside, cutoff=0.83):
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
        (c.optim.ema or not c.eval.ema, "eval.ema", "true", "a run that averages its weights: optim.ema above 0",
         "leave --config.eval.ema out"),
        (len(free) <= 1, "mesh", f"-1 for {' and '.join(free)}", "-1 for one axis at most",
         "give the sizes of the others"),
        (first.isdecimal() and last.isdecimal() and int(first) < int(last), "log.profile_steps", repr(steps),
         "a:b with a below b", "write for example 10:20"),
    ]  # fmt: skip
    for holds, name, found, expected, fix in rules:
        if not holds:
            raise UserError(name, found, expected, fix)
