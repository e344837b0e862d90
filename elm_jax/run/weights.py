"""The arrays of a trained run, one after the other in the host's memory, each as it is kept: no more of the model than
a few of them is there at a time.

What was trained comes out of the checkpoint. What was frozen comes from where the run took it, in the dtype that it
has there: the run itself computed with a copy, perhaps in another one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from elm_jax.assemble import Assembly, assemble, make_arrays
from elm_jax.config import Config
from elm_jax.errors import UserError
from elm_jax.folders import TOKENIZER
from elm_jax.models.functional import Leaf
from elm_jax.models.lora import is_lora
from elm_jax.run import folder as run
from elm_jax.run.checkpoint import Checkpoints, joined, read_arrays, saved_dtypes, summary_of
from elm_jax.weights import stream
from elm_jax.weights.encoders import from_published, read_checkpoint
from elm_jax.weights.load import LlmFolder
from elm_jax.weights.peft import load_adapter, merged_kernel
from elm_jax.weights.safetensors import Safetensors, forget

_TABLE = "llm.embedding.table"  # who has it has the whole LLM
_AT_ONCE = 256 * 2**20  # bytes of small arrays that are read together


class Source(Protocol):
    """Where arrays come from."""

    def dtype(self, name: str) -> np.dtype: ...

    def read(self, names: Sequence[str]) -> Mapping[str, np.ndarray]: ...


class TrainedWeights:
    """The weights of the run folder `config.workdir`.

    Args:
        which: `latest`, `best` (else latest) or a step.
    Raises:
        UserError: no checkpoint.
    """

    def __init__(self, config: Config, which: str = "best") -> None:
        self.config, self.folder = config, Path(config.workdir)
        checkpoints = Checkpoints(self.folder, read_only=True)
        step = checkpoints.find(which)
        if step is None:
            raise UserError(str(self.folder), "no checkpoint", "a trained run", "train it first")
        self.step, self.meta = step, checkpoints.meta(step)
        saved = checkpoints.items(step)
        checkpoints.close()
        own = self._own(saved)
        self.assembly = assemble(config, self.folder / TOKENIZER, weights=_TABLE not in own)
        self.leaves = self.assembly.structure.leaves
        self.frozen = [name for name in self.leaves if name not in saved]
        self._sources = {name: source for name, source in own.items() if name in self.leaves}
        for part in dict.fromkeys(self.leaves[name].part for name in self.leaves):
            names = [name for name in self.leaves if self.leaves[name].part == part and name not in self._sources]
            self._sources |= self._published(part, names) if names else {}
        drawn = [name for name in self.leaves if name not in self._sources]
        self._sources |= dict.fromkeys(drawn, _Drawn(self.assembly))

    def dtype(self, name: str) -> np.dtype:
        """The dtype that an array is kept in."""
        return self._sources[name].dtype(name)

    def from_folder(self, name: str) -> bool:
        """Whether an array is, unchanged, that of the Hugging Face folder that the run names."""
        return isinstance(self._sources[name], _Folder)

    def arrays(self, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """These arrays, by source and in order; those of the frozen parts are checked, when the last has come.

        Raises:
            UserError: a frozen part is not the one that the run was trained with.
        """
        summaries: dict[str, dict[str, str]] = {}
        for source in dict.fromkeys(self._sources[name] for name in names):
            mine = [name for name in names if self._sources[name] is source]
            for group in self._groups(mine):
                read = dict(source.read(group))
                for name in group:
                    if name in self.frozen:
                        summary = summary_of(read[name], self.leaves[name].dtype)
                        summaries.setdefault(self.leaves[name].part, {})[name] = summary
                    yield name, read.pop(name)
        self._check(summaries)

    def _check(self, summaries: Mapping[str, Mapping[str, str]]) -> None:
        whole = {
            part: joined(found) for part, found in summaries.items()
            if set(found) == {name for name in self.frozen if self.leaves[name].part == part}
        }  # fmt: skip
        saved = {part: value for part, value in self.meta["frozen"].items() if part in whole}
        run.check_fingerprints(str(self.folder), saved, whole)

    def _groups(self, names: Sequence[str]) -> Iterator[list[str]]:
        """These names in groups that are small enough to be in memory together."""
        group, size = [], 0
        for name in names:
            own = int(np.prod(self.leaves[name].shape)) * self.dtype(name).itemsize
            if group and size + own > _AT_ONCE:
                yield group
                group, size = [], 0
            group, size = [*group, name], size + own
        if group:
            yield group

    def _own(self, saved: Mapping[str, Path]) -> dict[str, Source]:
        """The sources of the arrays in the run's folder; `saved`: those of the checkpoint."""
        found: dict[str, Source] = {}
        inherited = self.folder / run.INHERITED
        imported = inherited / stream.FILE
        if imported.is_file():
            found = dict.fromkeys(tensors := Safetensors(imported), _Mapped(tensors))
        elif inherited.is_dir():
            found = dict.fromkeys(saved_dtypes(inherited), _Saved(inherited))
        folders = {folder: _Saved(folder) for folder in saved.values()}
        return found | {name: folders[folder] for name, folder in saved.items()}

    def _published(self, part: str, names: Sequence[str]) -> dict[str, Source]:
        """The sources of these arrays of a part, as far as they are files that the run names."""
        config, assembly = self.config, self.assembly
        if part == "llm" and assembly.llm_folder is not None:
            return dict.fromkeys(names, _Folder(LlmFolder(assembly.llm_folder, assembly.llm)))
        if part == "llm.lora" and config.llm.lora.adapter is not None:
            adapter = load_adapter(config.llm.lora.adapter, assembly.llm)[1]
            return dict.fromkeys(names, _Held({f"llm.{name}": array for name, array in adapter.items()}))
        encoder = config.encoder_parts.get(part)
        if encoder is not None and encoder.checkpoint is not None:
            mine = {n.removeprefix(f"{part}."): x for n, x in self.leaves.items() if x.part == part}
            arrays = _encoder(str(encoder.name), mine, encoder.checkpoint)
            held = _Held({f"{part}.{name}": array for name, array in arrays.items()})
            return {name: held for name in names if name in held.arrays}
        return {}


def _encoder(name: str, leaves: Mapping[str, Leaf], checkpoint: str) -> dict[str, np.ndarray]:
    """The arrays of an encoder's checkpoint in a dtype that holds all of its tensors."""
    tensors, where = read_checkpoint(checkpoint)
    dtypes = {np.asarray(tensor).dtype for tensor in tensors.values()}
    widest = functools.reduce(jnp.promote_types, [d for d in dtypes if jnp.issubdtype(d, jnp.floating)], np.float16)
    return from_published(name, {n: replace(leaf, dtype=widest) for n, leaf in leaves.items()}, tensors, where)


@dataclass(frozen=True, eq=False)
class _Saved:
    """Arrays that the run has saved itself."""

    folder: Path

    @functools.cached_property
    def _dtypes(self) -> dict[str, np.dtype]:
        return saved_dtypes(self.folder)

    def dtype(self, name: str) -> np.dtype:
        return self._dtypes[name]

    def read(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        return read_arrays(self.folder, names)


@dataclass(frozen=True, eq=False)
class _Mapped:
    """Arrays that were imported."""

    tensors: Safetensors

    def dtype(self, name: str) -> np.dtype:
        return self.tensors.info[name].dtype

    def read(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        read = {name: self.tensors[name] for name in names}
        forget(read[names[0]])  # what was read before
        return read


@dataclass(frozen=True, eq=False)
class _Folder:
    """The LLM in a Hugging Face folder."""

    tensors: LlmFolder

    def dtype(self, name: str) -> np.dtype:
        return self.tensors.dtype(name.removeprefix("llm."))

    def read(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        self.tensors.forget()
        return {name: self.tensors.read(name.removeprefix("llm.")) for name in names}


@dataclass(frozen=True, eq=False)
class _Held:
    """Arrays that are in memory: of small parts."""

    arrays: Mapping[str, np.ndarray]

    def dtype(self, name: str) -> np.dtype:
        return self.arrays[name].dtype

    def read(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        return {name: self.arrays[name] for name in names}


@dataclass(frozen=True, eq=False)
class _Drawn:
    """What stayed as it was drawn from the seed."""

    assembly: Assembly

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self.assembly.structure.leaves[name].dtype)

    def read(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        leaves = self.assembly.structure.leaves
        here: dict[str, Any] = dict.fromkeys(leaves, SingleDeviceSharding(jax.local_devices()[0]))
        arrays = make_arrays(self.assembly, here, known=set(leaves) - set(names))
        return {name: np.asarray(x) for name, x in arrays.items()}


def merged(arrays: Iterator[tuple[str, np.ndarray]], scale: float) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays, those of LoRA first, as those of the model without it."""
    adapter: dict[str, np.ndarray] = {}
    for name, array in arrays:
        module = name.removesuffix(".kernel")
        if is_lora(name):
            adapter[name] = array
        elif f"{module}.lora.a" in adapter:
            layers = zip(array, adapter[f"{module}.lora.a"], adapter[f"{module}.lora.b"], strict=True)
            result = np.empty_like(array)
            for layer, parts in enumerate(layers):
                result[layer] = merged_kernel(*parts, scale)
            del array, layers  # it may be large, and what comes next too
            yield name, result
            del result
        else:
            yield name, array
            del array
