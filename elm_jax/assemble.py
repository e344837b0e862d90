"""From a configuration to its parts: tokenizer, data specs, and the model's structure and arrays.

Train, evaluate and chat start here, so that a run is put together in one way.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax import compat as behaviours
from elm_jax.config import Config
from elm_jax.data.chat import add_tokens
from elm_jax.data.dataset import Dataset, TextSpec, text_spec
from elm_jax.data.ecg_tokens import EcgTokens, add_ecg_tokens
from elm_jax.data.images import PROCESSING, Processing
from elm_jax.data.rasterize import REFERENCE_DPI
from elm_jax.data.represent import SignalSpec, signal_spec
from elm_jax.data.sources import load_records
from elm_jax.errors import UserError, one_line
from elm_jax.models.attention import choose_attention
from elm_jax.models.connectors import SIGNAL_KINDS, build_connector, build_signal_connector
from elm_jax.models.decoder import Decoder, DecoderConfig, Remat
from elm_jax.models.elm import ELM
from elm_jax.models.encoders import ENCODERS, build_encoder, encoder_config, from_published, read_checkpoint
from elm_jax.models.families import chat_family, extended, scratch_config
from elm_jax.models.functional import Arrays, Structure, initialise, structure_of
from elm_jax.models.lora import add_lora, is_lora
from elm_jax.weights.load import load_llm_arrays, read_llm_config, resolve_llm_folder
from elm_jax.weights.peft import load_adapter, spec_of

# elm -> the kind of its connector; None: ECGs are symbols in the text.
CONNECTORS = {
    "linear_llava": "linear",
    "mlp_llava": "mlp",
    "base_elf": "patch",
    "patch_elf": "patch",
    "conv_elf": "conv",
    "ecg_byte": None,
}
DEMO_LLM = "demo"  # llm.name of the embedded demo: a tokenizer trained on the demo's own text


@dataclass(frozen=True)
class Assembly:
    """A run's parts before any array exists."""

    config: Config
    tokenizer: Any
    text: TextSpec
    signal: SignalSpec
    llm: DecoderConfig
    llm_folder: Path | None  # None: the LLM starts from nothing
    encoder: Mapping[str, Any]  # the fields of the encoder's own config
    structure: Structure

    def dataset(self, split: Any) -> Dataset:
        """One split of `data.names`."""
        records = load_records(self.config.data, split, self.config.seed)
        augments = split == "train" and (self.signal.augment_ecg or self.signal.augment_rgb)
        return Dataset(records, self.tokenizer, self.text, self.signal, augments)


def assemble(config: Config, tokenizer_folder: Path | None = None) -> Assembly:
    """The parts of a run. `tokenizer_folder`: where the run keeps its own tokenizer, used where it exists.

    Raises:
        UserError: a name or size in the config does not fit; names the key.
    """
    _check_parts(config)
    folder = None if config.llm.scratch else resolve_llm_folder(config.llm.name)
    tokenizer = _tokenizer(config, tokenizer_folder)
    symbols = _symbols(config, tokenizer)
    if folder is None:
        llm = scratch_config(config.llm.scratch or {}, len(tokenizer))
    else:
        llm = extended(read_llm_config(folder), len(tokenizer))
    if config.data.max_len > llm.max_len:
        raise UserError(
            "data.max_len", str(config.data.max_len), f"at most the model's context, {llm.max_len}",
            f"set --config.data.max_len={llm.max_len}",
        )  # fmt: skip
    family = config.llm.chat or chat_family(
        llm.model_type, tokenizer.get_vocab(), str(tokenizer.chat_template or "")
    )
    text = text_spec(config.data, family, config.encoder.tokens, config.phase, config.compat)
    encoder = _encoder_fields(config)
    processing = _processing(config.encoder.name, encoder, config.compat)
    dpi = REFERENCE_DPI if behaviours.enabled("rgb_250_dpi", config.compat) else None
    signal = signal_spec(config.data, config.seed, processing, symbols, dpi)
    structure = structure_of(lambda: _build(config, llm, encoder))
    return Assembly(config, tokenizer, text, signal, llm, folder, encoder, structure)


def make_arrays(assembly: Assembly, shardings: Mapping[str, Any], known: Collection[str] = ()) -> Arrays:
    """The model's arrays in their shards: loaded where there is a checkpoint, else drawn from the seed.

    Those that are `known`, from a run's own checkpoint, are left out.
    """
    config, leaves = assembly.config, assembly.structure.leaves
    wanted = [name for name in leaves if name not in known]
    components = {name.split(".")[0] for name in wanted}
    made: Arrays = {}
    if assembly.llm_folder is not None and any(n.startswith("llm.") and not is_lora(n) for n in wanted):
        dtype = _llm_dtype(config)
        arrays = load_llm_arrays(assembly.llm_folder, assembly.llm, dtype, lambda n, _: shardings[f"llm.{n}"])
        made |= {f"llm.{name}": x for name, x in arrays.items()}
    adapted = [name for name in wanted if is_lora(name)]
    if config.llm.lora.adapter is not None and adapted:
        _, adapter = load_adapter(config.llm.lora.adapter, assembly.llm)
        for name in adapted:
            array = adapter[name.removeprefix("llm.")].astype(leaves[name].dtype)
            made[name] = jax.device_put(array, shardings[name])
    if config.encoder.checkpoint is not None and "encoder" in components:
        mine = {n.removeprefix("encoder."): leaf for n, leaf in leaves.items() if n.startswith("encoder.")}
        arrays = from_published(str(config.encoder.name), mine, *read_checkpoint(config.encoder.checkpoint))
        made |= {f"encoder.{n}": jax.device_put(x, shardings[f"encoder.{n}"]) for n, x in arrays.items()}
    rest = {name: shardings[name] for name in wanted if name not in made}
    if rest:
        made |= initialise(lambda: _build(config, assembly.llm, assembly.encoder), assembly.structure, rest)
    return {name: made[name] for name in wanted}


def _build(config: Config, llm: DecoderConfig, encoder_fields: Mapping[str, Any]) -> ELM:
    compute = jnp.dtype(config.llm.compute_dtype)
    encoder, connector = _signal_path(config, encoder_fields, llm.hidden, compute)
    decoder = Decoder(
        llm, _rngs(config, "llm"), param_dtype=_llm_dtype(config), scan=config.llm.scan,
        remat=cast(Remat, config.llm.remat),
        attention=choose_attention(config.llm.attention, llm.head_dim, compute, softcap=llm.attention_cap),
        dropout=config.llm.dropout,
    )  # fmt: skip
    adapter = spec_of(config.llm.lora)
    if adapter is not None:
        add_lora(decoder, adapter, _rngs(config, "lora"), _dtype(config, "llm"))
    return ELM(encoder, connector, decoder, compute, config.compat)


def _signal_path(
    config: Config, encoder_fields: Mapping[str, Any], width: int, compute: Any
) -> tuple[nnx.Module | None, nnx.Module | None]:
    """The encoder and the connector of `config.elm`, where it has them; `width` is the LLM's."""
    kind, tokens = CONNECTORS[config.elm], config.encoder.tokens
    shape = len(config.data.leads), config.data.segment_len
    options = {"rngs": _rngs(config, "connector"), "param_dtype": _dtype(config, "connector")}
    if kind is None:
        return None, None
    if kind in SIGNAL_KINDS:
        return None, build_signal_connector(kind, *shape, tokens, width, **options)
    encoder = build_encoder(
        str(config.encoder.name), encoder_fields, tokens, _rngs(config, "encoder"), compute, _dtype(config, "encoder"),
        config.compat,
    )  # fmt: skip
    return cast(nnx.Module, encoder), build_connector(kind, encoder.width, width, config.connector.hidden, **options)


def _encoder_fields(config: Config) -> dict[str, Any]:
    """The encoder's own config: of `encoder.config`, else of its checkpoint, else of the data."""
    name, data = config.encoder.name, config.data
    if name is None:
        return {}
    sizes = {"num_leads": len(data.leads), "seq_len": data.segment_len} if data.representation == "signal" else {}
    return encoder_config(name, config.encoder.checkpoint, sizes | config.encoder.config)


def _processing(name: str | None, fields: Mapping[str, Any], compat: tuple[str, ...]) -> Processing | None:
    """How the encoder called `name` wants its images; None where it reads signals."""
    if name not in PROCESSING:
        return None
    usual, sizes = PROCESSING[name], ENCODERS[name].config(fields)
    if usual.patch is not None:
        return replace(usual, patch=sizes.patch_size)
    edge = sizes.image_size
    if not behaviours.enabled("clip_centre_crop", compat):  # which would cut off the outer leads
        usual = usual.whole()
    return replace(usual, size=(edge, edge), shortest_edge=None if usual.shortest_edge is None else edge)


def _check_parts(config: Config) -> None:
    """Raise UserError unless elm, encoder and representation fit each other."""
    elm, name, representation = config.elm, config.encoder.name, config.data.representation
    kind = CONNECTORS[elm]
    encoded = kind is not None and kind not in SIGNAL_KINDS
    if encoded and name is None:
        known = ", ".join(ENCODERS)
        raise UserError("encoder.name", "None", f"an ECG encoder for elm={elm}: {known}", "set --config.encoder.name")
    if not encoded and (name is not None or "encoder" in config.update):
        where = "encoder.name" if name is not None else "update"
        raise UserError(where, str(name or "encoder"), f"no encoder with elm={elm}", "leave it out, or choose a LLaVA")
    fitting = ("symbolic",) if kind is None else ("rgb", "stacked_signal") if name in PROCESSING else ("signal",)
    if representation not in fitting:
        what = f"encoder.name={name}" if encoded else f"elm={elm}"
        raise UserError(
            "data.representation", representation, f"{' or '.join(fitting)} for {what}",
            f"set --config.data.representation={fitting[0]}",
        )  # fmt: skip
    if elm == "base_elf" and config.encoder.tokens != 1:
        fix = "set --config.encoder.tokens=1, or elm=patch_elf"
        raise UserError("encoder.tokens", str(config.encoder.tokens), "1 for elm=base_elf", fix)
    if kind is None and config.data.ecg_tokenizer is None:
        fix = "set --config.data.ecg_tokenizer to an ECG-Byte file (.json or .pkl)"
        raise UserError("data.ecg_tokenizer", "None", "a symbolic tokenizer for elm=ecg_byte", fix)


def _symbols(config: Config, tokenizer: Any) -> EcgTokens | None:
    """The ECG's symbols in the tokenizer, which gets them here, where ECGs are symbols."""
    if CONNECTORS[config.elm] is not None:
        return None
    return add_ecg_tokens(tokenizer, str(config.data.ecg_tokenizer), config.data.min_ecg_tokens, config.compat)


def _dtype(config: Config, component: str) -> Any:
    """What is trained has its own dtype; what is frozen is kept in the one it computes in."""
    return jnp.dtype(config.llm.param_dtype if component in config.update else config.llm.compute_dtype)


def _llm_dtype(config: Config) -> Any:
    """Of the LLM's own weights, which are frozen beneath LoRA."""
    return jnp.dtype(config.llm.compute_dtype) if spec_of(config.llm.lora) else _dtype(config, "llm")


def _rngs(config: Config, component: str) -> nnx.Rngs:
    """Each component draws from its own stream, whatever else is drawn or loaded."""
    return nnx.Rngs(jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(component.encode())))


def _tokenizer(config: Config, own: Path | None) -> Any:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch is no news here
    from transformers import AutoTokenizer

    if own is not None and (own / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(own)
    if config.llm.name == DEMO_LLM:
        from elm_jax.data.demo import demo_tokenizer

        tokenizer = demo_tokenizer()
    else:
        folder = resolve_llm_folder(config.llm.name, weights=config.llm.scratch is None)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            found = f"{folder} without a tokenizer that can be read ({one_line(str(error))[:120]})"
            raise UserError("llm.name", found, "a folder with tokenizer.json", "add the tokenizer") from error
    add_tokens(tokenizer, config.phase)
    return tokenizer
