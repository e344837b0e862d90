"""From a configuration to its parts: tokenizer, data specs, and the model's structure.

Train, evaluate and chat start here, so that a run is put together in one way.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.config import Config, renamed, resolve
from elm_jax.data.dataset import Dataset, TextSpec, text_spec
from elm_jax.data.ecg_ids import EcgIds
from elm_jax.data.ecg_tokens import EcgTokens, add_ecg_tokens
from elm_jax.data.represent import SignalSpec
from elm_jax.data.samples import REPORT
from elm_jax.data.sources import load_records
from elm_jax.data.specs import page_size, signal_spec, views_of
from elm_jax.ecg.recording import LEADS
from elm_jax.errors import UserError
from elm_jax.folders import ECG_BYTE, TOKENIZER, check_checksums, read_run_config, run_folder, tokenizer_of
from elm_jax.models.attention import choose_attention
from elm_jax.models.connectors import build_connector, build_signal_connector
from elm_jax.models.decoder import Decoder, DecoderConfig, Remat
from elm_jax.models.elm import ELM
from elm_jax.models.encoders import ENCODERS, PRETRAINING, build_encoder, kind_of
from elm_jax.models.families import chat_family, extended, scratch_config, settled
from elm_jax.models.functional import Arrays, Structure, initialise, structure_of
from elm_jax.models.lora import add_lora
from elm_jax.models.views import check_views, representation_of, signal_tokens
from elm_jax.objectives import OBJECTIVES, Objective, objective_of
from elm_jax.retrieval.lookup import retriever_of
from elm_jax.symbols.coder import EcgByte
from elm_jax.text.render import THINK_TOKENS, add_tokens
from elm_jax.text.vocabulary import load_tokenizer
from elm_jax.weights.encoders import encoder_config, resolve_encoder
from elm_jax.weights.load import read_llm_config, resolve_llm_folder
from elm_jax.weights.peft import spec_of
from elm_jax.weights.text_tower import read_text_tower, text_tower_folder

DEMO_LLM = "demo"  # llm.name of the embedded demo: a tokenizer trained on the demo's own text


@dataclass(frozen=True)
class Assembly:
    """A run's parts before any array exists."""

    config: Config
    tokenizer: Any  # None as the LLM, where the objective needs an encoder alone
    text: TextSpec
    signal: SignalSpec
    objective: Objective
    llm: DecoderConfig
    llm_folder: Path | None  # None: the LLM starts from nothing
    encoders: Mapping[str, Mapping[str, Any]]  # by view, the fields of its encoder's own config
    structure: Structure

    def dataset(self, split: Any, fold: int | None = None) -> Dataset:
        """One split of `data.names`, of another fold than `data.fold` if that is given."""
        data = self.config.data if fold is None else replace(self.config.data, fold=fold)
        records = load_records(data, split, self.config.seed)
        augments = split == "train" and self.signal.changes
        samples = self.objective.samples if split == "train" else self.objective.samples.judged
        return Dataset(records, self.tokenizer, self.text, self.signal, augments, samples)

    @property
    def encoder_kinds(self) -> dict[str, str]:
        """The row of each encoder, by its part of the model."""
        return {part: encoder_kind(self.config, part) for part in self.config.encoder_parts}

    def check_llm(self) -> None:
        """Raise UserError where an encoder is all there is."""
        if self.llm is None:
            found = f"{self.config.objective}, of an encoder alone"
            fix = "train an LLM behind it first: --config.init_from takes this run's encoder"
            if self.objective.pretrains:
                fix = "export it, and train an LLM behind it: --config.encoder.checkpoint takes its encoder.safetensors"
            raise UserError("config.objective", found, "one with an LLM", fix)

    def draw(self, shardings: Mapping[str, Any]) -> Arrays:
        """These arrays of the model as they are drawn from the seed, each where it belongs."""
        return initialise(lambda: _build(self.config, self.llm, self.encoders), self.structure, shardings)


def assemble(config: Config, tokenizer_folder: Path | None = None, weights: bool = True) -> Assembly:
    """The parts of a run. `tokenizer_folder`: where the run keeps its own tokenizer, used where it exists. Without
    `weights`, those of the LLM need not be there.

    A new run with `init_from` begins from the tokenizer of that run, so that the tokens both have keep their ids.

    Raises:
        UserError: a name or size in the config does not fit; names the key.
    """
    objective = objective_of(config)
    folder = find_llm(config, tokenizer_folder, weights)
    if "llm" not in objective.needs:
        return _encoders_alone(config, objective, tokenizer_folder)
    weights = weights and config.llm.scratch is None
    phase = str(objective.samples.phase)
    tokenizer = _tokenizer(config, phase, tokenizer_folder, weights)
    symbols = _symbols(config, tokenizer, tokenizer_folder)
    # A pretrained model has room for the tags of fine-tuning too, so that this can start from it as it is.
    rows = len({*tokenizer.get_vocab(), *THINK_TOKENS})
    llm = scratch_config(config.llm.scratch or {}, rows) if folder is None else extended(read_llm_config(folder), rows)
    llm = settled(llm, config.data.max_len)
    told = tokenizer.get_vocab(), str(tokenizer.chat_template or ""), config.llm.name
    is_new = tokenizer_folder is None or not tokenizer_folder.is_dir()
    family = config.llm.chat or chat_family(llm.model_type, *told, guess=folder is None or not is_new)
    text = text_spec(config.data, family, signal_tokens(config), phase, config.compat)
    encoders = {view: _encoder_fields(config, view, tokenizer_folder) for view in config.encoded}
    signal = replace(_signal(config, encoders, symbols, tokenizer_folder), retrieval=retriever_of(config, family))
    structure = structure_of(lambda: _build(config, llm, encoders))
    return Assembly(config, tokenizer, text, signal, objective, llm, folder, encoders, structure)


def find_llm(config: Config, tokenizer_folder: Path | None = None, weights: bool = True) -> Path | None:
    """The local folder of the pretrained LLM, where there is one; it may have to be downloaded, which takes long. The
    arguments are those of `assemble`.

    Raises UserError as `assemble`, for what can be told before.
    """
    objective = objective_of(config)
    _check_objective(config, objective)
    check_views(config)
    for view in config.encoded:
        if ENCODERS[name := str(config.encoder_of(view).name)].file_config is None:
            ENCODERS[name].config(_encoder_fields(config, view, tokenizer_folder))
    if objective.samples.phase == REPORT:
        text_tower_folder(config.ssl.text)
    if "llm" not in objective.needs:
        return None
    folder = None if config.llm.scratch else resolve_llm_folder(config.llm.name, weights)
    context = (read_llm_config(folder) if folder else scratch_config(config.llm.scratch or {}, 1)).max_len
    if config.data.max_len > context:
        raised = f", or --config.llm.scratch.max_len={config.data.max_len}" if folder is None else ""
        fix = f"set --config.data.max_len={context}{raised}"
        raise UserError("data.max_len", str(config.data.max_len), f"at most the model's context, {context}", fix)
    return folder


def _encoders_alone(config: Config, objective: Objective, own: Path | None) -> Assembly:
    encoders, none = {view: _encoder_fields(config, view, own) for view in config.encoded}, cast(Any, None)
    signal, text, tokenizer = _signal(config, encoders, None, own), TextSpec("plain", signal_tokens(config)), none
    if objective.samples.phase == REPORT:
        (part,) = config.encoder_parts
        tokenizer, tower = read_text_tower(encoder_kind(config, part), config.ssl, config.data.max_len)
        text = replace(text, max_len=config.data.max_len)
        encoders = {view: {**fields, "text": tower} for view, fields in encoders.items()}
    structure = structure_of(lambda: _build(config, none, encoders))
    return Assembly(config, tokenizer, text, signal, objective, none, none, encoders, structure)


def assemble_encoder(config: Config) -> Assembly:
    """The encoder of a config alone, whatever its objective: neither an LLM nor its tokenizer is looked for.

    Raises UserError as `assemble`; or where there is no encoder, or more than one.
    """
    check_views(config)
    if len(config.encoded) != 1 or len(config.slots) > 1:  # what views write is nothing to the encoder
        found = f"{config.elm}, with {len(config.encoded)} encoders in {len(config.views)} views"
        raise UserError("elm", found, "an elm of one view with an encoder", "name an encoder: --config.elm=mlp_llava")
    return _encoders_alone(config, objective_of(config), Path(config.workdir) / TOKENIZER)


def encoder_structure(assembly: Assembly) -> Structure:
    """The encoder alone, of a model of one view."""
    ((view, fields),) = assembly.encoders.items()
    return structure_of(lambda: _encoder(assembly.config, view, fields))


def structure_behind_encoder(assembly: Assembly) -> Structure:
    """The model without its encoder: it is given the encoder's outputs in place of signals."""

    def build() -> ELM:
        elm = _build(assembly.config, assembly.llm, assembly.encoders)
        return ELM(None, elm.connector, elm.llm, elm.dtype, elm.compat)

    return structure_of(build)


def with_attention(assembly: Assembly, name: str) -> Assembly:
    """The same parts with another `llm.attention`."""
    config = replace(assembly.config, llm=replace(assembly.config.llm, attention=name))
    structure = structure_of(lambda: _build(config, assembly.llm, assembly.encoders))
    return replace(assembly, config=config, structure=structure)


def _signal(
    config: Config, encoders: Mapping[str, Mapping[str, Any]], symbols: EcgTokens | None, own: Path | None
) -> SignalSpec:
    """What becomes of an ECG in each view."""
    specs = {}
    for view, each in config.views.items():
        if each.writes == "text":
            continue
        encoder = config.encoder_of(view).name
        processing = ENCODERS[encoder].image_processing(encoders[view], config.compat) if encoder else None
        spec = signal_spec(config.data, config.seed, processing, symbols, config.compat)
        specs[view] = replace(
            spec, representation=representation_of(config, view), ids=_ids(config, view, own), view=view,
            shown=views_of(config), some_leads=encoder is not None and kind_of(encoder).some_leads,
        )  # fmt: skip
    texts = {view: each.text for view, each in config.views.items() if each.text is not None}
    return replace(specs.pop(next(iter(specs))), further=specs, texts=texts)


def _build(config: Config, llm: DecoderConfig | None, encoders: Mapping[str, Mapping[str, Any]]) -> ELM:
    compute = jnp.dtype(config.llm.compute_dtype)
    built = {view: _encoder(config, view, fields) for view, fields in encoders.items()}
    if llm is None:
        encoders_alone = built if len(config.slots) > 1 else next(iter(built.values()))
        return ELM(encoders_alone, None, None, compute, config.compat)
    through = {view: each.through for view, each in config.slots.items() if each.through is not None}
    widths = {view: built[through[view]].width if view in through else llm.embedding for view in config.slots}
    connectors = {view: _connector(config, view, built.get(view), width) for view, width in widths.items()}
    decoder = Decoder(
        llm, _rngs(config, "llm"), param_dtype=_llm_dtype(config), scan=config.llm.scan,
        remat=cast(Remat, config.llm.remat),
        attention=choose_attention(config.llm.attention, llm.head_dim, compute, softcap=llm.attention_cap),
        dropout=config.llm.dropout,
    )  # fmt: skip
    adapter = spec_of(config.llm.lora)
    if adapter is not None:
        add_lora(decoder, adapter, _rngs(config, "lora"), _dtype(config, "llm"))
    if len(connectors) > 1:
        return ELM(built, connectors, decoder, compute, config.compat, through, views_of(config).places)
    return ELM(built.get(view := next(iter(config.views))), connectors.get(view), decoder, compute, config.compat)


def _connector(config: Config, view: str, encoder: Any, width: int) -> nnx.Module:
    """What leads from a view's encoder, or from its signals themselves, to the LLM's width."""
    part, kind = config.part("connector", view), str(config.views[view].connector)
    options: dict[str, Any] = {"rngs": _rngs(config, part), "param_dtype": _dtype(config, part)}
    if encoder is None:
        shape, tokens = (len(config.data.leads), config.data.segment_len), config.encoder_of(view).tokens
        return build_signal_connector(kind, *shape, tokens, width, **options)
    options |= {"hidden": config.connector.hidden} if kind == "mlp" else {}
    return build_connector(kind, encoder.width, width, **options, newlines=getattr(encoder, "newlines", ()))


def _encoder(config: Config, view: str, fields: Mapping[str, Any]) -> Any:
    compute, part, encoder = jnp.dtype(config.llm.compute_dtype), config.part("encoder", view), config.encoder_of(view)
    kind, dtype = encoder_kind(config, part), _dtype(config, part)
    return build_encoder(kind, fields, encoder.tokens, _rngs(config, part), compute, dtype, config.compat)


def encoder_kind(config: Config, part: str) -> str:
    """The row of the encoder that is a part of the model; where the objective pretrains it, of all that this trains."""
    return f"{config.encoder_parts[part].name}{PRETRAINING if objective_of(config).pretrains else ''}"


def _encoder_fields(config: Config, view: str, own_folder: Path | None) -> dict[str, Any]:
    """The encoder's own config: of `encoder.config`, else of its checkpoint, else of the data."""
    encoder, data = config.encoder_of(view), config.data
    of_signal = representation_of(config, view) == "signal"
    sizes: dict[str, Any] = {"num_leads": len(data.leads), "seq_len": data.segment_len} if of_signal else {}
    if kind_of(str(encoder.name)).images is not None:
        sizes = {"page": page_size(data, representation_of(config, view), config.compat)}
    ids = _ids(config, view, own_folder)
    own = encoder.config if ids is None else {**encoder.config, "vocab_size": ids.vocab_size}
    return encoder_config(str(encoder.name), encoder.checkpoint, sizes | own)


def _ids(config: Config, view: str, own: Path | None) -> EcgIds | None:
    """How an ECG becomes the ids that the encoder of a view reads, if it reads such: see `_ecg_byte`."""
    encoder, data = config.encoder_of(view), config.data
    if encoder.name is None or kind_of(encoder.name).reads != "symbols":
        return None
    sizes, leads = kind_of(encoder.name).config(encoder.config), tuple(map(LEADS.index, data.leads))
    folder = own if own is not None and own.is_dir() else None
    if folder is not None:
        check_checksums(folder)
    elif config.init_from is not None:
        folder = run_folder(config.init_from, "config.init_from") / TOKENIZER
    elif encoder.checkpoint is not None:  # an export has it beside its weights
        folder = resolve_encoder(encoder.checkpoint).parent
    return EcgIds(EcgByte.load(_ecg_byte(config, folder, own)), sizes.max_seq_len, leads, sizes.lead_tokens)


def _check_objective(config: Config, objective: Objective) -> None:
    """Raise UserError unless the parts that are trained, and the text, are those of the objective."""
    if objective.samples.phase != "sft" and any(view.writes == "text" for view in config.views.values()):
        expected = f"sft with {'retrieval' if config.retrieval.index else config.elm}, which writes into prompts"
        raise UserError("config.objective", config.objective, expected, "set it so")
    if "llm" not in objective.needs and {part.split(".")[0] for part in config.update} != {"encoder"}:
        fix = "set --config.update=encoder"
        raise UserError("update", ",".join(config.update), f"the encoder alone with objective={config.objective}", fix)
    if "llm" not in objective.needs and config.eval.at_end:
        fix = "set --noconfig.eval.at_end"
        raise UserError("eval.at_end", "True", f"false with objective={config.objective}: nothing answers", fix)
    if config.encoder.cache and objective.samples.experience is not None:
        expected = f"false with objective={config.objective}, which asks the whole model"
        raise UserError("encoder.cache", "True", expected, "leave --config.encoder.cache out")
    if config.data.augment_ecg and config.view.writes == "tokens" and not objective.samples.plain:
        expected = f"false with objective={config.objective} and elm={config.elm}: lengths would change"
        raise UserError("data.augment_ecg", "True", expected, "leave --config.data.augment_ecg out")
    if config.data.explicit_thinking and objective.samples.phase != "sft":
        expected = f"false with objective={config.objective}"
        raise UserError("data.explicit_thinking", "True", expected, "leave --config.data.explicit_thinking out")


def _symbols(config: Config, tokenizer: Any, own: Path | None) -> EcgTokens | None:
    """The ECG's symbols in the tokenizer, which gets them here, where ECGs are symbols."""
    if config.view.writes != "tokens":
        return None
    path = _ecg_byte(config, _began_with(config, own), own)
    return add_ecg_tokens(tokenizer, path, config.data.min_ecg_tokens, config.compat)


def _ecg_byte(config: Config, began_with: Path | None, own: Path | None) -> Path:
    """The file of the ECG-Byte: of the folder that the run has, or that of the run that it starts from; else as given.

    Ids mean nothing with another ECG-Byte than the one they were learnt with: a run keeps its own, and what is given
    must be the same. (The file that a run began with need not be there any more.)
    """
    given = Path(str(config.data.ecg_tokenizer))
    kept = None if began_with is None else began_with / ECG_BYTE
    if kept is None or not kept.is_file():
        return given
    if (given.exists() or began_with != own) and EcgByte.load(given).fingerprint != EcgByte.load(kept).fingerprint:
        fix = "give the file that this began with, or start a new run without those weights"
        raise UserError("data.ecg_tokenizer", str(given), f"the same ECG-Byte as {kept}", fix)
    return kept


def _dtype(config: Config, component: str) -> Any:
    """What is trained has its own dtype; what is frozen is kept in the one it computes in."""
    learns = not {component, component.partition(".")[0]}.isdisjoint(config.update)
    return jnp.dtype(config.llm.param_dtype if learns else config.llm.compute_dtype)


def _llm_dtype(config: Config) -> Any:
    """Of the LLM's own weights, which are frozen beneath LoRA."""
    return jnp.dtype(config.llm.compute_dtype) if spec_of(config.llm.lora) else _dtype(config, "llm")


def _rngs(config: Config, component: str) -> nnx.Rngs:
    """Each component draws from its own stream, whatever else is drawn or loaded."""
    return nnx.Rngs(jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(component.encode())))


def _began_with(config: Config, own: Path | None) -> Path | None:
    """The folder of the tokenizer that the run has, else of the run that it starts from."""
    if own is not None and (own / "tokenizer.json").is_file():
        return own
    if config.init_from is None:
        return None
    before = renamed(read_run_config(run_folder(config.init_from, "config.init_from")))
    row = OBJECTIVES.get(before.get("objective", Config.objective))
    objective: Objective | None = None
    with contextlib.suppress(UserError):  # it may have needed a file of the user's
        objective = row(resolve(before)) if callable(row) else row
    return None if objective is not None and "llm" not in objective.needs else tokenizer_of(config.init_from)


def _tokenizer(config: Config, phase: str, own: Path | None, weights: bool) -> Any:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch is no news here
    folder = _began_with(config, own)
    if folder is None:
        tokenizer = _published_tokenizer(config.llm.name, weights)
    else:
        check_checksums(folder)
        tokenizer = load_tokenizer(folder, str(folder))
    if folder is not None and folder != own:
        _check_llm(config, tokenizer)
    add_tokens(tokenizer, phase)
    return tokenizer


def _check_llm(config: Config, tokenizer: Any) -> None:
    """Raise UserError where the tokenizer of `init_from` is not that of `llm.name` with some tokens more."""
    there = read_run_config(run_folder(str(config.init_from), "config.init_from"))["llm"]["name"]
    if there == config.llm.name:
        return
    ours = _published_tokenizer(config.llm.name, config.llm.scratch is None)
    same_ends = (ours.bos_token, ours.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)
    if not (ours.get_vocab().items() <= tokenizer.get_vocab().items() and same_ends):
        raise UserError(
            "llm.name", f"{config.llm.name}, whose tokenizer is not that of {config.init_from}", there,
            f"set --config.llm.name={there}",
        )  # fmt: skip


def _published_tokenizer(name: str, weights: bool) -> Any:
    """The tokenizer of `llm.name` as it is published. `weights`: the model's are needed too."""
    if name == DEMO_LLM:
        from elm_jax.data.demo import demo_tokenizer

        return demo_tokenizer()
    return load_tokenizer(resolve_llm_folder(name, weights))
