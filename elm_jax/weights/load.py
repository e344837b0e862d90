"""Language model weights: a Hugging Face folder -> parameters, straight into their shards."""

import fnmatch
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from elm_jax import compat as behaviours
from elm_jax.errors import UserError, some
from elm_jax.folders import read_json
from elm_jax.models.decoder import Decoder, DecoderConfig
from elm_jax.models.families import ALIASES, FAMILIES, family_of, from_hf, nearest_model, rules_of
from elm_jax.runtime.mesh import named_sharding
from elm_jax.text.vocabulary import TOKENIZER_FILES
from elm_jax.weights.files import HF_FOLDER, TORCH, conversion, download, is_repository, listed, open_checkpoint
from elm_jax.weights.llava import is_llava, of_llm, text_config
from elm_jax.weights.published import Published, match

_HEAD = "lm_head.weight"  # where the tied ones have a copy of the embedding table


def load_llm(
    folder: str | Path, dtype: str = "float32", mesh: Mesh | None = None, compat: tuple[str, ...] = ()
) -> Decoder:
    """A decoder with the weights of a Hugging Face folder (`config.json` and safetensors, sharded or not).

    Args:
        folder: local folder, Hugging Face id, or short name (`qwen2.5-0.5b-instruct`).
        dtype: of the parameters, and so of the computation: float32, bfloat16 or float16.
        mesh: where they lie (default: all on this process's first device).
        compat: names of reference behaviours (`elm_jax.compat`).
    Raises UserError for anything amiss with the folder or the names.
    """
    behaviours.check(compat)
    path = resolve_llm_folder(folder)
    config = read_llm_config(path)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError("dtype", f"'{dtype}'", "float32, bfloat16 or float16", "choose one of these")
    # RoPE does not see the shift, and OPT's positions follow the mask: only GPT-2 is another with it.
    padding = config.model_type == "gpt2" and behaviours.enabled("gpt2_positions", compat)
    model = abstract_decoder(config, param_dtype=dtype, positions_count_padding=padding)
    graph, state = nnx.split(model)

    def place(name: str, variable: nnx.Variable) -> jax.ShapeDtypeStruct:
        sharding = SingleDeviceSharding(jax.local_devices()[0])
        if mesh is not None:
            sharding = named_sharding(mesh, variable.axes, variable.shape, name)
        return jax.ShapeDtypeStruct(variable.shape, jnp.dtype(dtype), sharding=sharding)

    variables = parameters(state)
    for name, array in open_llm(path, config).place({n: place(n, v) for n, v in variables.items()}).items():
        variables[name].set_value(array)
    return nnx.merge(graph, state)


def open_llm(folder: str | Path, config: DecoderConfig) -> Published:
    """The parameters ("layers.attention.q.kernel") in a Hugging Face folder; none has been read.

    `config` is the folder's own (`read_llm_config`), possibly `settled` and `extended`: the rows of a larger
    vocabulary, in the embedding and in an untied head, are `NewRows` of the folder's.

    Raises:
        UserError: missing, unexpected or misshapen tensors, by name.
    """
    base = read_llm_config(folder)
    same = replace(base, vocab_size=config.vocab_size, rope=config.rope, max_len=config.max_len)
    assert same == config and config.vocab_size >= base.vocab_size
    family = family_of(config.model_type)
    stored, shapes = (
        {name: v.shape for name, v in parameters(nnx.state(abstract_decoder(each))).items()} for each in (base, config)
    )
    rules = [rule for rule in rules_of(base) if rule.ours in shapes]
    assert len(rules) == len(shapes), "the rules and the parameters differ"
    tensors, table = open_checkpoint(folder), family.rules[0].theirs
    if is_llava(tensors):
        tensors = {name: tensor for name, tensor in tensors.items() if of_llm(name)}
    prefix = table.partition(".")[0] + "."
    bare = table not in tensors and table.removeprefix(prefix) in tensors  # of the model inside the causal one
    theirs, ours = family.renamed
    named = {key: ours + key.removeprefix(theirs) if theirs and key.startswith(theirs) else key for key in tensors}
    named = {key: name for key, name in named.items() if not (family.dropped and name.startswith(family.dropped))}
    named |= {key: prefix + key for key in named if bare and not key.startswith("lm_head.")}
    return match(
        str(folder), f"this {config.model_type}", "check that config.json fits, tie_word_embeddings too", rules, shapes,
        tensors, {key: name for key, name in named.items() if not name.endswith(family.buffers)}, stored=stored,
        aliases={_HEAD: table} if config.tied else None,
    )  # fmt: skip


def abstract_decoder(config: DecoderConfig, **options: Any) -> Decoder:
    """A `Decoder(config, **options)` of shapes without arrays."""
    return nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), **options))


def parameters(state: nnx.State) -> dict[str, nnx.Variable]:
    """The variables of a state by their path, joined by dots."""
    return {".".join(str(part) for part in path): variable for path, variable in nnx.to_flat_state(state)}


def read_llm_config(folder: str | Path) -> DecoderConfig:
    """The configuration in a local folder's `config.json`; UserError if it is not one of ours."""
    path = Path(folder) / "config.json"
    return from_hf(text_config(read_json(path, HF_FOLDER)), str(path))


def resolve_llm_folder(name: str | Path, weights: bool = True) -> Path:
    """The local folder of a model: a folder as it is; a short name or Hugging Face id, downloaded if need be.

    Without `weights` only configuration and tokenizer are downloaded.

    Raises UserError if it is neither, or cannot be had.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    repo = ALIASES.get(str(name), str(name))
    if not is_repository(repo):
        families = f"a model of the families {', '.join(FAMILIES)}, for others are not supported yet"
        known = f"use a folder, owner/name of the Hugging Face hub, or {', '.join(ALIASES)}: {families}"
        fix = nearest_model(repo, ALIASES) or known
        raise UserError("llm.name", f"'{name}', which is no folder", "a folder or a known name", fix)
    folder = download(repo, "llm.name", (*TOKENIZER_FILES, *(["*.safetensors"] if weights else [])))
    old = weights and not list(folder.glob("*.safetensors")) and fnmatch.filter(listed(repo, "llm.name"), TORCH)
    if old:
        found = f"'{repo}', which has {some(old)} only"
        raise UserError("llm.name", found, "safetensors", conversion(repo, "llm.name"))
    return folder
