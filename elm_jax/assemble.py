"""From a configuration to its parts: tokenizer, data specs, and the model's structure and arrays.

Train, evaluate and chat start here, so that a run is put together in one way.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.config import Config
from elm_jax.data.chat import add_tokens
from elm_jax.data.dataset import Dataset, TextSpec, signal_spec, text_spec
from elm_jax.data.sources import load_records
from elm_jax.errors import UserError, one_line
from elm_jax.models.attention import choose_attention
from elm_jax.models.connectors import build_connector
from elm_jax.models.decoder import Decoder, DecoderConfig, Remat
from elm_jax.models.elm import ELM
from elm_jax.models.encoders import build_encoder, from_published, read_checkpoint
from elm_jax.models.families import chat_family, extended, scratch_config
from elm_jax.models.functional import Arrays, Structure, initialise, structure_of
from elm_jax.weights.load import load_llm_arrays, read_llm_config, resolve_llm_folder

CONNECTORS = {"linear_llava": "linear", "mlp_llava": "mlp"}
DEMO_LLM = "demo"  # llm.name of the embedded demo: a tokenizer trained on the demo's own text


@dataclass(frozen=True)
class Assembly:
    """A run's parts before any array exists."""

    config: Config
    tokenizer: Any
    text: TextSpec
    llm: DecoderConfig
    llm_folder: Path | None  # None: the LLM starts from nothing
    structure: Structure

    def dataset(self, split: Any) -> Dataset:
        """One split of `data.names`."""
        records = load_records(self.config.data, split, self.config.seed)
        return Dataset(records, self.tokenizer, self.text, signal_spec(self.config.data, self.config.seed))


def assemble(config: Config, tokenizer_folder: Path | None = None) -> Assembly:
    """The parts of a run. `tokenizer_folder`: where the run keeps its own tokenizer, used where it exists.

    Raises:
        UserError: a name or size in the config does not fit; names the key.
    """
    folder = None if config.llm.scratch else resolve_llm_folder(config.llm.name)
    tokenizer = _tokenizer(config, tokenizer_folder)
    if folder is None:
        llm = scratch_config(config.llm.scratch or {}, len(tokenizer))
    else:
        llm = extended(read_llm_config(folder), len(tokenizer))
    if config.data.max_len > llm.max_len:
        raise UserError(
            "data.max_len", str(config.data.max_len), f"at most the model's context, {llm.max_len}",
            f"set --config.data.max_len={llm.max_len}",
        )  # fmt: skip
    family = chat_family(llm.model_type, tokenizer.get_vocab())
    text = text_spec(config.data, family, config.encoder.tokens, config.phase, config.compat)
    if config.encoder.name is None:
        raise UserError(
            "encoder.name", "None", f"an ECG encoder for elm={config.elm}", "set --config.encoder.name=merl"
        )
    structure = structure_of(lambda: _build(config, llm))
    return Assembly(config, tokenizer, text, llm, folder, structure)


def make_arrays(assembly: Assembly, shardings: Mapping[str, Any], known: Collection[str] = ()) -> Arrays:
    """The model's arrays in their shards: loaded where there is a checkpoint, else drawn from the seed.

    Those that are `known`, from a run's own checkpoint, are left out.
    """
    config, leaves = assembly.config, assembly.structure.leaves
    wanted = [name for name in leaves if name not in known]
    components = {name.split(".")[0] for name in wanted}
    made: Arrays = {}
    if assembly.llm_folder is not None and "llm" in components:
        dtype = _dtype(config, "llm")
        arrays = load_llm_arrays(assembly.llm_folder, assembly.llm, dtype, lambda n, _: shardings[f"llm.{n}"])
        made |= {f"llm.{name}": x for name, x in arrays.items()}
    if config.encoder.checkpoint is not None and "encoder" in components:
        mine = {n.removeprefix("encoder."): leaf for n, leaf in leaves.items() if n.startswith("encoder.")}
        arrays = from_published(str(config.encoder.name), mine, *read_checkpoint(config.encoder.checkpoint))
        made |= {f"encoder.{n}": jax.device_put(x, shardings[f"encoder.{n}"]) for n, x in arrays.items()}
    rest = {name: shardings[name] for name in wanted if name not in made}
    if rest:
        made |= initialise(lambda: _build(config, assembly.llm), assembly.structure, rest)
    return {name: made[name] for name in wanted}


def _build(config: Config, llm: DecoderConfig) -> ELM:
    compute = jnp.dtype(config.llm.compute_dtype)
    encoder = build_encoder(
        str(config.encoder.name), config.encoder.config, config.encoder.tokens, _rngs(config, "encoder"), compute,
        _dtype(config, "encoder"),
    )  # fmt: skip
    connector = build_connector(
        CONNECTORS[config.elm], encoder.width, llm.hidden, config.connector.hidden, rngs=_rngs(config, "connector"),
        param_dtype=_dtype(config, "connector"),
    )  # fmt: skip
    decoder = Decoder(
        llm, _rngs(config, "llm"), param_dtype=_dtype(config, "llm"), scan=config.llm.scan,
        remat=cast(Remat, config.llm.remat),
        attention=choose_attention(config.llm.attention, llm.head_dim, compute),
    )  # fmt: skip
    return ELM(cast(nnx.Module, encoder), connector, decoder, compute, config.compat)


def _dtype(config: Config, component: str) -> Any:
    """What is trained has its own dtype; what is frozen is kept in the one it computes in."""
    return jnp.dtype(config.llm.param_dtype if component in config.update else config.llm.compute_dtype)


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
        folder = resolve_llm_folder(config.llm.name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            found = f"{folder} without a tokenizer that can be read ({one_line(str(error))[:120]})"
            raise UserError("llm.name", found, "a folder with tokenizer.json", "add the tokenizer") from error
    add_tokens(tokenizer, config.phase)
    return tokenizer
