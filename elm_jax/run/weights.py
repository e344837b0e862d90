"""Every array of a model, and where it comes from: what a run has trained, what it inherited from the run that it
started from, the files that its config names, and else the seed.

Training, evaluation and chat have the arrays placed, each straight into its shards. Export reads them one after the
other in the host's memory, each as it is kept: what was frozen in the dtype of its file, though the run computed with
a copy in perhaps another one.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from elm_jax.assemble import Assembly, assemble
from elm_jax.config import Config, renamed, resolve, to_dict
from elm_jax.errors import UserError, some
from elm_jax.folders import FACTS, TOKENIZER, read_run_config, run_folder
from elm_jax.keys import LoraConfig
from elm_jax.models.encoders import PRETRAINING, kind_of
from elm_jax.models.functional import Arrays, Leaf
from elm_jax.models.lora import is_lora
from elm_jax.models.names import Rule
from elm_jax.models.views import representation_of
from elm_jax.objectives import objective_of
from elm_jax.run.arrays import SavedArrays, save_arrays
from elm_jax.run.checkpoint import Checkpoints
from elm_jax.run.fingerprints import fingerprint, joined, summary_of
from elm_jax.run.verification import check_files
from elm_jax.runtime.mesh import replicated
from elm_jax.weights.encoders import WHERE, export_first, open_encoder, read_checkpoint, read_facts
from elm_jax.weights.load import open_llm
from elm_jax.weights.peft import load_adapter, save_adapter, spec_of
from elm_jax.weights.published import Published
from elm_jax.weights.safetensors import Safetensors
from elm_jax.weights.text_tower import open_text_tower, text_tower_folder

INHERITED = "inherited"  # folder of the frozen arrays that came from `init_from`, or of an import's
IMPORTED = "arrays.safetensors"  # in it: those that an import left
_TABLE = "llm.embedding.table"  # who has it has the whole LLM
_AT_ONCE = 256 * 2**20  # bytes of small arrays that are read together
# Of data.*: what a recording is made into for an encoder.
_SEEN = ("representation", "leads", "sampling_rate", "segment_len", "normalize", "norm_eps")
_log = logging.getLogger(__name__)


class Source(Protocol):
    """Where arrays come from."""

    def dtype(self, name: str, /) -> np.dtype:
        """The one that an array is kept in."""
        ...

    def arrays(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        """In the host's memory, as they are kept."""
        ...

    def place(self, like: Mapping[str, jax.ShapeDtypeStruct]) -> Arrays:
        """In the dtypes and shards that `like` says."""
        ...


class Weights:
    """Every array of a model, and where it comes from.

    Args:
        saved: by name, the sources of the arrays that a run has saved. The others are in the files that the config
            names, or are drawn from the seed.
        step: how far training was.
    Raises:
        UserError: such a file cannot be read or does not fit, or leaves out what is frozen; or what was saved is of
            another model.
    """

    def __init__(
        self, assembly: Assembly, saved: Mapping[str, SavedArrays | Published] | None = None, step: int = 0
    ) -> None:
        self.assembly, self.leaves = assembly, assembly.structure.leaves
        self.folder, self.step = Path(assembly.config.workdir), step
        self.trained, self.frozen = frozenset[str](self.leaves), list[str]()  # as far as anybody knows
        self.saved = saved or {}
        for source in dict.fromkeys(self.saved.values()):
            _check_shapes(source, self.leaves)
        self._sources: dict[str, Source] = {**self.saved}
        drawn, published = _Drawn(assembly), functools.cache(self._published)
        for name in self.leaves:
            if name not in self.saved:
                found = published(self.leaves[name].part)
                self._sources[name] = next((source for source in found if name in source.rules), drawn)

    def check(self, fingerprints: Mapping[str, str], part: str | None = None) -> None:
        """Raise UserError where a frozen part (only this one, if it is given) is not the one that the run was trained
        with."""

    def dtype(self, name: str) -> np.dtype:
        """The dtype that an array is kept in."""
        return self._sources[name].dtype(name)

    def from_folder(self, name: str) -> bool:
        """Whether an array is, unchanged, that of the Hugging Face folder that the run names."""
        return name not in self.saved and isinstance(self._sources[name], Published) and self.leaves[name].part == "llm"

    def place(self, shardings: Mapping[str, Any], names: Iterable[str] | None = None) -> Arrays:
        """These arrays, or all, in their shards and in the dtypes that the model has."""
        names, like, placed = list(self.leaves if names is None else names), {}, {}
        for name in names:
            leaf = self.leaves[name]
            like[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
        for source, mine in self._by_source(names):
            placed |= source.place({name: like[name] for name in mine})
        return {name: placed[name] for name in names}

    def arrays(self, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """These arrays in the host's memory as they are kept, by source and in order, few of them at a time."""
        for source, mine in self._by_source(names):
            for group in self._groups(mine):
                read = dict(source.arrays(group))
                for name in group:
                    yield name, read.pop(name)

    def _by_source(self, names: Iterable[str]) -> list[tuple[Source, list[str]]]:
        found: dict[Source, list[str]] = {}
        for name in names:
            found.setdefault(self._sources[name], []).append(name)
        return list(found.items())

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

    def _published(self, part: str) -> Sequence[Published]:
        """A part of the model in the files that the config names for it; what one has not, the next may have."""
        config, assembly = self.assembly.config, self.assembly
        if part == "llm" and assembly.llm_folder is not None:
            return [open_llm(assembly.llm_folder, assembly.llm).under("llm.")]
        if part == "llm.lora" and config.llm.lora.adapter is not None:
            return [load_adapter(config.llm.lora.adapter, assembly.llm)[1].under("llm.")]
        encoder = config.encoder_parts.get(part)
        if encoder is None:
            return []
        mine = {name.removeprefix(f"{part}."): x for name, x in self.leaves.items() if x.part == part}
        shapes, kind = {name: leaf.shape for name, leaf in mine.items()}, assembly.encoder_kinds[part]
        tower = []
        if kind_of(kind).text is not None:
            tower = [open_text_tower(kind, shapes, text_tower_folder(config.ssl.text)).under(f"{part}.")]
        if encoder.checkpoint is None:
            return tower
        tensors, where = read_checkpoint(encoder.checkpoint)
        sizes, signal = read_facts(encoder.checkpoint)
        view = next(view for view in assembly.encoders if config.part("encoder", view) == part)
        shown = {"representation": representation_of(config, view)}
        _tell_of_other_data(where, signal, to_dict(config)["data"] | shown)
        try:
            found = open_encoder(kind, shapes, tensors, where)
        except UserError as error:
            own = assembly.encoders[view]
            there = ", ".join(f"{name}={x}" for name, x in sizes.items() if own.get(name) != x)
            hint = f"; {FACTS} beside it has encoder.config with {there}" if there else ""
            raise UserError(error.where, error.found, error.expected, error.fix + hint) from None
        drawn = [name for name, leaf in mine.items() if name not in found.rules and not leaf.statistic]
        if drawn and not any(mine[name].is_of(config.update) for name in drawn):
            raise UserError(
                WHERE, f"no weights for {some(drawn)}, which would stay as they are drawn",
                f"all weights of {encoder.name}, or {part} in update", "give a checkpoint of it, or train it",
            )  # fmt: skip
        return [found.under(f"{part}."), *tower]


def _tell_of_other_data(file: str, signal: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Warn where an encoder was trained on recordings that were made into other signals (`signal`) than these."""
    before, now = ({name: of[name] for name in _SEEN if name in of} for of in (signal, data))
    for each in (before, now):
        if each.get("normalize") == "instance_minmax":
            each["normalize"] = "minmax"  # which are one
    other = [f"data.{name}={x}, here {now[name]}" for name, x in before.items() if now[name] != x]
    if other and jax.process_index() == 0:
        _log.warning("%s was trained with %s (as %s beside it says)", file, "; ".join(other), FACTS)


@dataclass(frozen=True, eq=False)
class _Drawn:
    """What is as it was drawn from the seed."""

    assembly: Assembly

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self.assembly.structure.leaves[name].dtype)

    def arrays(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        here = SingleDeviceSharding(jax.local_devices()[0])
        return {name: np.asarray(x) for name, x in self.assembly.draw(dict.fromkeys(names, here)).items()}

    def place(self, like: Mapping[str, jax.ShapeDtypeStruct]) -> Arrays:
        return self.assembly.draw({name: spec.sharding for name, spec in like.items()})


class TrainedWeights(Weights):
    """The weights of a run: those that it has trained or inherited, and beside them what `Weights` finds.

    Args:
        folder: the run's. which: `latest`, `best` (else latest) or a step.
        model: the parts of the model, or the run's config, of which they are made; with its `eval.ema` what is trained
            is its average.
        key: what names the folder, in errors.
        checkpoints: those of the folder, where the caller has them.
        alone: a run of an encoder alone will do, where `model` is its config.
    Raises:
        UserError: no checkpoint, or none that is whole, or what `Weights` raises.
    """

    def __init__(
        self, folder: Path, which: str, model: Assembly | Config, key: str = "config.workdir",
        checkpoints: Checkpoints | None = None, alone: bool = False,
    ) -> None:  # fmt: skip
        reader = checkpoints or Checkpoints(folder, read_only=True)
        step = reader.find(which)
        if step is None:
            raise UserError(key, f"no checkpoint in {folder}", "a trained run", "train it first")
        average = isinstance(model, Config) and model.eval.ema
        self.meta, places = reader.meta(step), reader.items(step, average)
        if checkpoints is None:
            reader.close()
        saved: dict[str, SavedArrays | Published] = {}
        if (folder / INHERITED).is_dir():
            inherited = _inherited(folder / INHERITED)
            saved = dict.fromkeys(inherited.shapes, inherited)
        opened = {place: SavedArrays(place) for place in dict.fromkeys(places.values())}
        saved |= {name: opened[place] for name, place in places.items()}
        if isinstance(model, Config):
            model = assemble(model, folder / TOKENIZER, weights=_TABLE not in saved)
            if not alone:
                model.check_llm()
        super().__init__(model, saved, step)
        self.folder, self.trained = folder, frozenset(places)
        self.frozen = [name for name in self.leaves if name not in places]

    def check(self, fingerprints: Mapping[str, str], part: str | None = None) -> None:
        saved = {name: found for name, found in self.meta["frozen"].items() if part in (None, name)}
        _check_fingerprints(str(self.folder), saved, fingerprints)

    def arrays(self, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """As `Weights.arrays`; when the last has come, frozen parts that were read whole are checked as by `check`."""
        summaries: dict[str, dict[str, str]] = {}
        frozen = set(self.frozen)
        for name, array in super().arrays(names):
            if name in frozen:
                summaries.setdefault(self.leaves[name].part, {})[name] = summary_of(array, self.leaves[name].dtype)
            yield name, array
            del array  # it may be large, and what comes next too
        counts = Counter(self.leaves[name].part for name in frozen)
        whole = {part: joined(found) for part, found in summaries.items() if len(found) == counts[part]}
        saved = {part: value for part, value in self.meta["frozen"].items() if part in whole}
        _check_fingerprints(str(self.folder), saved, whole)


def first_arrays(assembly: Assembly, folder: Path, shardings: Mapping[str, Any], moved: Collection[str]) -> Arrays:
    """The arrays that a new run in `folder` begins with: those of `init_from`, the others as `Weights` has them.

    What came from there and is not `moved` by training is saved in `folder`: nothing else would have it later.

    Raises:
        UserError: no run there or one of another model, an adapter that would mean something else here, a part that is
            missing there and not in `init_missing_ok`, or one that it was not trained with.
    """
    config = assembly.config
    if config.init_from is None:
        return Weights(assembly).place(shardings)
    source = run_folder(config.init_from, "config.init_from")
    _check_pretrained(assembly, source)
    before = read_run_config(source).get("llm", {})
    _check_adapter(source, LoraConfig(**before.get("lora", {})), config.llm.lora)
    weights = TrainedWeights(source, "best", assembly, "config.init_from")
    lacking = _lacking(config, weights)
    arrays = weights.place(shardings)
    # There it was frozen, in the dtype that run computes in; here it may be trained, in another.
    dtype = jnp.dtype(before["compute_dtype"])
    made = {n: x for n, x in weights.leaves.items() if n not in weights.saved and x.part in lacking}
    there = {name: arrays[name] if leaf.statistic else arrays[name].astype(dtype) for name, leaf in made.items()}
    saved = {part: weights.meta["frozen"][part] for part in lacking}
    _check_fingerprints(config.init_from, saved, frozen_fingerprints(weights.leaves, there))
    inherited = {name: arrays[name] for name in weights.saved if name not in moved}
    if inherited and not (folder / INHERITED).is_dir():
        save_arrays(folder / INHERITED, inherited)
    return arrays


def _check_pretrained(assembly: Assembly, source: Path) -> None:
    """Raise UserError where a model would begin from a run that pretrains an encoder, with all that is for that."""
    before = read_run_config(source)
    try:
        pretrains = objective_of(resolve(renamed(before))).pretrains
    except UserError:  # it may have needed a file of the user's
        return
    alike = pretrains and kind_of(pretrains + PRETRAINING).module is kind_of(pretrains).module
    if pretrains and not alike and not assembly.objective.pretrains:
        found = f"{source}, a run of an encoder alone (objective={before['objective']})"
        raise UserError("config.init_from", found, "a run of the whole model", export_first(source))


def _lacking(config: Config, weights: TrainedWeights) -> set[str]:
    """The parts of which the run has not saved all, and which must be those that it was trained with, frozen."""
    saved = weights.meta.get("frozen", {})
    missing = {leaf.part for name, leaf in weights.leaves.items() if name not in weights.saved}
    if "llm.lora" not in saved:  # a new adapter changes nothing until it is trained: no run need have it
        missing.discard("llm.lora")
    lacking = missing - {leaf.part for leaf in weights.leaves.values() if leaf.is_of(config.init_missing_ok)}
    if without := ",".join(sorted(lacking - set(saved))):
        raise UserError(
            "config.init_from", f"no {without.replace(',', ', ')} in {config.init_from}", "all parts of the model",
            f"name what may start afresh: --config.init_missing_ok={without}",
        )  # fmt: skip
    return lacking


def _check_adapter(folder: Path, before: LoraConfig, lora: LoraConfig) -> None:
    """Raise UserError unless the adapter of the run in `folder`, where it has one, means the same under `lora`."""
    there = spec_of(before)
    if there is None:
        return
    here = None if lora.adapter is not None and lora.rank == 0 else spec_of(replace(lora, adapter=None))
    if here is None or (here.rank, here.alpha, here.targets) != (there.rank, there.alpha, there.targets):
        found = "none" if here is None else f"rank {here.rank}, alpha {here.alpha:g}, targets {here.targets}"
        expected = f"that of {folder}: rank {there.rank}, alpha {there.alpha:g}, targets {there.targets}"
        fix = "set llm.lora.rank, alpha and targets so, without llm.lora.adapter"
        raise UserError("llm.lora", found, expected, fix)


def keep_adapter(folder: Path, assembly: Assembly, trained: Arrays, mesh: Mesh) -> None:
    """Leave the adapter, if one was trained, as a folder that PEFT opens: `adapter/`."""
    llm, spec = assembly.config.llm, spec_of(assembly.config.llm.lora)
    mine = {name: x for name, x in trained.items() if is_lora(name)}
    if spec is None or not mine:
        return
    whole = {n.removeprefix("llm."): np.asarray(jax.device_put(x, replicated(mesh))) for n, x in mine.items()}
    if jax.process_index() == 0:
        save_adapter(folder / "adapter", whole, spec, assembly.llm, llm.name)


def frozen_fingerprints(leaves: Mapping[str, Leaf], frozen: Arrays) -> dict[str, str]:
    """Part -> fingerprint of what is frozen of it."""
    parts: dict[str, Arrays] = {}
    for name, array in frozen.items():
        parts.setdefault(leaves[name].part, {})[name] = array
    return {part: fingerprint(parts[part]) for part in sorted(parts)}


def _check_fingerprints(where: str, saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    for part in sorted(saved):
        if now.get(part) != saved[part]:
            raise UserError(
                where, f"a checkpoint trained with other {part} weights", "the frozen weights of that run",
                f"use the same weights for the {part}, or start a new run",
            )  # fmt: skip


def _inherited(folder: Path) -> SavedArrays | Published:
    """The arrays that a run inherited from another one, or an import left."""
    path = folder / IMPORTED
    if not path.is_file():
        return SavedArrays(folder)
    check_files(folder)
    tensors = Safetensors(path)
    rules, shapes = {name: Rule(name, name) for name in tensors}, {name: x.shape for name, x in tensors.info.items()}
    return Published(str(path), rules, shapes, tensors, {name: name for name in tensors})


def _check_shapes(source: SavedArrays | Published, leaves: Mapping[str, Leaf]) -> None:
    unknown = [name for name in source.shapes if name not in leaves]
    found = f"arrays unknown to this model: {some(unknown)}" if unknown else ""
    for name, shape in source.shapes.items():
        if not found and shape != leaves[name].shape:
            found = f"{name} {list(shape)}, here {list(leaves[name].shape)}"
    if found:
        raise UserError(source.where, found, "a run of the same model", "check config.init_from and the model's keys")
