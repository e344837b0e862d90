"""Language model weights: a Hugging Face folder -> parameters, straight into their shards."""

import fnmatch
import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from elm_jax import compat as behaviours
from elm_jax.errors import UserError, some
from elm_jax.json_text import parse_json
from elm_jax.models.decoder import Decoder, DecoderConfig
from elm_jax.models.families import ALIASES, FAMILIES, Family, family_of, from_hf, nearest_model
from elm_jax.models.names import Index, Rule
from elm_jax.weights.safetensors import Safetensors, forget

Shardings = Callable[[str, jax.ShapeDtypeStruct], Sharding]

_TOKENIZER_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
_HUB_FILES = [*_TOKENIZER_FILES, "*.safetensors"]
_HEAD = "lm_head.weight"  # where the tied ones have a copy of the embedding table
_TORCH = "pytorch_model*.bin"  # of old repositories
# New rows differ by this much of the old ones' spread. As inputs to a network that does not learn they must be told
# apart: its first norm makes of this a good part of the length of the mean row. As outputs they must not push out the
# old ones: where the logits of a position spread by s, noise of a tenth raises the new tokens' share by
# exp((s / 10)^2 / 2), 13% for s = 5, and noise of the whole spread by exp(s^2 / 2).
_NOISE = 0.1


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
    axes = {name: variable.axes for name, variable in parameters(state).items()}

    def shardings(name: str, array: jax.ShapeDtypeStruct) -> Sharding:
        if mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        from elm_jax.runtime.mesh import named_sharding

        return named_sharding(mesh, axes[name], array.shape, name)

    arrays = load_llm_arrays(path, config, dtype, shardings)
    for name, variable in parameters(state).items():
        variable.set_value(arrays[name])
    return nnx.merge(graph, state)


def load_llm_arrays(
    folder: str | Path, config: DecoderConfig, dtype: jax.typing.DTypeLike, shardings: Shardings
) -> dict[str, jax.Array]:
    """The parameters of `config` out of a folder: path ("layers.attention.q.kernel") -> array.

    `config` as for `LlmFolder`. Each process reads what its own devices hold, one parameter at a time; no host ever
    holds the model. `shardings` is asked with the path and the shape. Raises UserError as `LlmFolder`.
    """
    tensors, arrays = LlmFolder(folder, config), {}
    for name, shape in tensors.shapes.items():
        spec = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        arrays[name] = _to_devices(tensors, name, spec, shardings(name, spec))
    return arrays


class LlmFolder:
    """The parameters that a Hugging Face folder's tensors are, read piece by piece, in the tensors' own dtype.

    `config` is the folder's own (`read_llm_config`), possibly `extended`: the rows of a larger vocabulary, in the
    embedding and in an untied head, are `NewRows` of the folder's.

    Raises:
        UserError: missing, unexpected or misshapen tensors, by name.
    """

    def __init__(self, folder: str | Path, config: DecoderConfig) -> None:
        folder, base = Path(folder), read_llm_config(folder)
        assert replace(base, vocab_size=config.vocab_size) == config and config.vocab_size >= base.vocab_size
        family = family_of(config.model_type)
        own = {name: v.shape for name, v in parameters(nnx.state(abstract_decoder(base))).items()}
        wanted = {name: v.shape for name, v in parameters(nnx.state(abstract_decoder(config))).items()}
        self.rules = {rule.ours: rule for rule in family.rules if rule.ours in own}
        assert set(wanted) == set(self.rules), "the rules and the parameters differ"
        self.shapes = {name: wanted[name] for name in self.rules}
        self._tensors = _with_prefix(open_checkpoint(folder), family)
        _check_tensors(folder, self._tensors, list(self.rules.values()), own, base)
        self._new: dict[str, NewRows] = {}

    def dtype(self, name: str) -> np.dtype:
        """Of our parameter: that of its tensors, which a layer may have wider than another."""
        return functools.reduce(jnp.promote_types, (part.dtype for part in self._parts(name)))

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Our parameter, or a slice of it, in the dtype of its tensors."""
        rule, parts = self.rules[name], self._parts(name)
        whole = index if index is not None else tuple(slice(0, size) for size in self.shapes[name])
        layers, each = rule.split(whole)
        return rule.arrange([self._slice(rule, part, each) for part in parts[layers]])

    def forget(self) -> None:
        """Give back the memory of what was read."""
        for tensor in self._tensors.values():
            forget(tensor)

    def _parts(self, name: str) -> list[np.ndarray]:
        rule = self.rules[name]
        return [self._tensors[theirs] for theirs in rule.names(self.shapes[name][0] if rule.stacked else 1)]

    def _slice(self, rule: Rule, part: np.ndarray, index: Index) -> np.ndarray:
        """A slice of `part` as if it had its new shape: the rows beyond its end, of a vocabulary, are new."""
        shape = rule.their_shape(self.shapes[rule.ours])
        rows = part[index]
        start, stop, _ = index[0].indices(shape[0])
        first = max(start, len(part))
        if part.shape == shape or first >= stop:
            return rows
        if rule.theirs not in self._new:
            self._new[rule.theirs] = NewRows.like(rule.theirs, part)
        return np.concatenate([rows, self._new[rule.theirs].draw(first, stop, index[1]).astype(part.dtype)])


def abstract_decoder(config: DecoderConfig, **options: Any) -> Decoder:
    """A `Decoder(config, **options)` of shapes without arrays."""
    return nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), **options))


def parameters(state: nnx.State) -> dict[str, nnx.Variable]:
    """The variables of a state by their path, joined by dots."""
    return {".".join(str(part) for part in path): variable for path, variable in nnx.to_flat_state(state)}


def read_llm_config(folder: str | Path) -> DecoderConfig:
    """The configuration in a local folder's `config.json`; UserError if it is not one of ours."""
    path = Path(folder) / "config.json"
    return from_hf(read_json(path), str(path))


def resolve_llm_folder(name: str | Path, weights: bool = True) -> Path:
    """The local folder of a model: a folder as it is; a short name or Hugging Face id, downloaded if need be.

    Without `weights` only configuration and tokenizer are downloaded.

    Raises UserError if it is neither, or cannot be had.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    repo = ALIASES.get(str(name), str(name))
    parts = repo.split("/")
    if len(parts) != 2 or parts[0] in ("", ".", "..", "~") or not parts[1]:
        families = f"a model of the families {', '.join(FAMILIES)}, for others are not supported yet"
        known = f"use a folder, owner/name of the Hugging Face hub, or {', '.join(ALIASES)}: {families}"
        fix = nearest_model(repo, ALIASES) or known
        raise UserError("llm.name", f"'{name}', which is no folder", "a folder or a known name", fix)
    try:
        folder = Path(snapshot_download(repo, allow_patterns=_HUB_FILES if weights else _TOKENIZER_FILES))
        old = weights and not list(folder.glob("*.safetensors")) and fnmatch.filter(list_repo_files(repo), _TORCH)
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = (
            f"'{name}', which the Hugging Face hub did not give ({type(error).__name__}: {str(error)[:200]})"
        )
        fix = f"download {repo} on a connected machine and set llm.name to that folder"
        raise UserError("llm.name", reason, "a folder or a model that can be downloaded", fix) from None
    if old:
        found = f"'{repo}', which has {some(old)} only"
        raise UserError("llm.name", found, "safetensors", _conversion(repo, "llm.name"))
    return folder


def open_checkpoint(folder: str | Path) -> dict[str, np.ndarray]:
    """Tensor name -> read-only view of a mapped file: `model.safetensors`, or an index and its files."""
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return dict(Safetensors(single))
    if not index.is_file():
        old = sorted(file.name for file in folder.glob(_TORCH))
        found = f"{some(old)} only" if old else "no safetensors"
        fix = _conversion(str(folder), "the path") if old else "check the folder"
        raise UserError(str(folder), found, f"{single.name} or {index.name}", fix)
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or any(Path(str(file)).name != file for file in where.values()):
        raise UserError(
            str(index), "no sound weight_map", "tensor names with files beside it", "download it again"
        )
    files = {file: Safetensors(folder / file) for file in sorted(set(where.values()))}
    absent = [name for name, file in where.items() if name not in files[file]]
    if absent:
        found = f"{some(absent)} not in the file that it names"
        raise UserError(str(index), found, "an index that fits its files", "download the folder again")
    return {name: files[file][name] for name, file in where.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError if there is none."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            str(path), str(error), "a JSON file", "use the folder of a Hugging Face model"
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            str(path), type(content).__name__, "a JSON object", "use the folder of a Hugging Face model"
        )
    return content


def _conversion(source: str, setting: str) -> str:
    """What to do about a language model of which there are PyTorch's files only: those are not read."""
    return (
        f"convert it where PyTorch is installed: transformers.AutoModelForCausalLM.from_pretrained('{source}')"
        f".save_pretrained(folder, safe_serialization=True), its tokenizer likewise, and set {setting} "
        "to that folder"
    )


def _with_prefix(tensors: dict[str, np.ndarray], family: Family) -> dict[str, np.ndarray]:
    """The tensors under the names of the causal model, where a checkpoint is of the bare model inside it."""
    table = family.rules[0].theirs
    prefix = table.split(".")[0] + "."
    if table in tensors or table.removeprefix(prefix) not in tensors:
        return tensors
    return {name if name.startswith("lm_head.") else prefix + name: tensor for name, tensor in tensors.items()}


def _check_tensors(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    rules: list[Rule],
    shapes: Mapping[str, tuple[int, ...]],
    config: DecoderConfig,
) -> None:
    """UserError unless the checkpoint holds the tensors of the rules in their shapes, and no others."""
    expected = {n: rule.their_shape(shapes[rule.ours]) for rule in rules for n in rule.names(config.layers)}
    missing = [name for name in expected if name not in tensors]
    family = family_of(config.model_type)
    extra = [name for name in tensors if name not in expected and not name.endswith(family.buffers)]
    if config.tied and _HEAD in extra:
        _check_copy(folder, tensors, family.rules[0].theirs)
        extra.remove(_HEAD)
    if missing or extra:
        found = "; ".join(f"{what} {some(n)}" for what, n in (("missing", missing), ("unexpected", extra)) if n)
        raise UserError(
            str(folder), found, f"the tensors of {config.model_type}", "check that config.json fits"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape or not jnp.issubdtype(tensors[name].dtype, jnp.floating):
            found = f"{name} {tensors[name].dtype}{list(tensors[name].shape)}"
            raise UserError(str(folder), found, f"floating {list(shape)}", "check that config.json fits")


def _check_copy(folder: Path, tensors: Mapping[str, np.ndarray], table: str) -> None:
    head = tensors[_HEAD]
    if table in tensors and not np.array_equal(head.view(np.uint8), tensors[table].view(np.uint8)):
        found = f"{_HEAD} that differs from {table}"
        raise UserError(
            str(folder), found, "a copy, as tie_word_embeddings says", "set tie_word_embeddings to false"
        )


@dataclass(frozen=True)
class NewRows:
    """Rows for tokens that a vocabulary table (V, D) did not have: its mean row, and noise by which they differ.

    The noise is normal, `_NOISE` times each column's standard deviation, and a function of the tensor's name and the
    row alone: every process and mesh draws the same. mean, noise: (D,) float32.
    """

    name: str
    mean: np.ndarray
    noise: np.ndarray

    @classmethod
    def like(cls, name: str, table: np.ndarray) -> "NewRows":
        """Those of the tensor `name`; sums are taken in pieces, so that no whole copy is made."""
        total, squares = np.zeros((2, table.shape[1]), np.float64)
        for begin in range(0, len(table), 4096):
            piece = table[begin : begin + 4096].astype(np.float64)
            total += piece.sum(0)
            squares += np.square(piece).sum(0)
        mean = total / len(table)
        deviation = np.sqrt(np.maximum(squares / len(table) - mean**2, 0))
        return cls(name, mean.astype(np.float32), (_NOISE * deviation).astype(np.float32))

    def draw(self, start: int, stop: int, columns: slice) -> np.ndarray:
        """Rows `start` to `stop` of the table, of these columns: float32."""
        key = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:16], "little")
        rows = np.empty((stop - start, len(self.mean[columns])), np.float32)
        for row in range(start, stop):
            stream = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, row]))
            drawn = stream.standard_normal(len(self.mean), np.float32)
            rows[row - start] = (self.mean + self.noise * drawn)[columns]
        return rows


def _to_devices(
    tensors: LlmFolder, name: str, spec: jax.ShapeDtypeStruct, sharding: Sharding
) -> jax.Array:
    read: dict[tuple, np.ndarray] = {}  # devices that hold the same shard share one reading of it

    def shard(index: Index | None) -> np.ndarray:
        assert index is not None
        key = tuple((s.start, s.stop) for s in index)
        if key not in read:
            read[key] = tensors.read(name, index).astype(spec.dtype, copy=False)
        return read[key]

    return jax.make_array_from_callback(spec.shape, sharding, shard)
