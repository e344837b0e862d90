"""Export a run: everything that PyTorch's world needs of it, in one folder.

Files are written into a folder beside the target, which it becomes when they are complete.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from elm_jax.config import Config
from elm_jax.errors import UserError
from elm_jax.exchange.card import facts_of, facts_of_encoder, write_card
from elm_jax.exchange.exported import ADAPTER, LLM
from elm_jax.exchange.llava import config_json
from elm_jax.exchange.llava import write_config as write_llava_config
from elm_jax.exchange.llm_folder import write_companions, write_config
from elm_jax.exchange.reference import Kinds, Reference, published_rules, reference_of
from elm_jax.exchange.torch_files import ELM, ENCODER, has_torch, write_checkpoints, write_encoder
from elm_jax.folders import ECG_BYTE, FACTS, TOKENIZER, whole_folder, write_json
from elm_jax.models.encoders import kind_of
from elm_jax.models.lora import is_lora
from elm_jax.models.names import Rule
from elm_jax.run.weights import TrainedWeights
from elm_jax.weights.encoders import EXPORTED
from elm_jax.weights.files import open_checkpoint
from elm_jax.weights.llava import their_rule
from elm_jax.weights.peft import WEIGHTS, merged, save_adapter, spec_of
from elm_jax.weights.safetensors import Safetensors
from elm_jax.weights.shards import ShardWriter

LLAVA = "llava"
SHARD_BYTES = 5 * 10**9
_WRITTEN = frozenset((LLM, ADAPTER, LLAVA, EXPORTED, "connector.safetensors", ELM, ENCODER, ECG_BYTE, FACTS,
                      "README.md"))  # fmt: skip
NO_TORCH = f"left out: {ELM}, for PyTorch is not installed (pip install torch)"


def export(
    config: Config, out: str | Path, which: str = "best", merge: bool = False, dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES, llava: bool = False,
) -> list[str]:  # fmt: skip
    """Write the run `config.workdir` into the folder `out`; returns a line about each part.

    Args:
        which: `latest`, `best` (else latest) or a step.
        merge: add LoRA to the weights that it adapts, instead of writing it beside them.
        dtype: of every parameter; None: what was trained as it was trained, the rest as it came.
        shard_bytes: of a file of the LLM at most. llava: also all of it as a folder of LLaVA's, as GEM and PULSE are.
    Raises:
        UserError: a model that LLaVA's program does not know, no checkpoint, nothing to merge, weights that are not the
            run's, or an `out` that is no export.
    """
    out = Path(out).expanduser().resolve()
    _check_out(out, config)
    export = _Export(TrainedWeights(Path(config.workdir), which, config, alone=True), merge, dtype, shard_bytes)
    if llava:
        config_json(export.weights.assembly)
        if export.adapter and not merge:
            raise UserError("--llava", "LoRA beside the weights", "weights alone", "give --merge too")
    with whole_folder(out) as fresh:
        if export.weights.assembly.llm is not None:
            (fresh / LLM).mkdir()
        return export.write(fresh) + (export.write_llava(fresh / LLAVA) if llava else [])


def _check_out(out: Path, config: Config) -> None:
    """Raise UserError unless `out` is new, empty, or an earlier export that nothing else lies in and no run needs."""
    if out.is_mount():
        raise UserError("--out", f"{out}, where a disk is mounted", "a folder that can be replaced", "name one in it")
    if out.exists():
        there = {entry.name for entry in out.iterdir()} if out.is_dir() else {""}
        of_views = {name for name in there if re.fullmatch(r"(encoder|connector)\.\w+\.safetensors", name)}
        if there - _WRITTEN - of_views or (there and FACTS not in there):
            raise UserError("--out", f"{out}, which holds something else", "a new folder", "name another")
    for key, path in (("--checkpoint", config.workdir), ("llm.name", config.llm.name),
                      *(("encoder.checkpoint", encoder.checkpoint) for encoder in config.encoder_parts.values()),
                      ("llm.lora.adapter", config.llm.lora.adapter), ("init_from", config.init_from)):  # fmt: skip
        if path is not None and Path(path).exists() and Path(path).resolve().is_relative_to(out):
            raise UserError("--out", f"{out}, in which lies {key}={path}", "a folder of its own", "name another")


@dataclass(frozen=True)
class _Export:
    """What is to be exported, and how."""

    weights: TrainedWeights
    merge: bool
    asked: str | None
    shard_bytes: int

    def __post_init__(self) -> None:
        if self.merge and not self.adapter:
            raise UserError("--merge", "a run without LoRA", "a run with llm.lora.rank > 0", "leave --merge out")

    @cached_property
    def adapter(self) -> list[str]:
        return [name for name in self.weights.leaves if is_lora(name)]

    @cached_property
    def rules(self) -> dict[str, Rule]:
        """The published rule of each array but those of LoRA, named within its part."""
        return published_rules(self.weights.leaves, self._kinds)

    @cached_property
    def reference(self) -> Reference:
        """The names in elm.pt."""
        leaves = {n: leaf for n, leaf in self.weights.leaves.items() if not (self.merge and is_lora(n))}
        return reference_of(leaves, self._kinds, rows=len(self.weights.assembly.tokenizer))

    @property
    def _kinds(self) -> Kinds:
        return Kinds.of(self.weights.assembly)

    def dtype(self, name: str) -> np.dtype:
        """What an array is written in; running statistics and constants are as they are."""
        if self.asked is None or self.weights.leaves[name].statistic:
            return self.weights.dtype(name)
        return np.dtype(jnp.dtype(self.asked))

    def write(self, folder: Path) -> list[str]:
        """Write everything into `folder`."""
        writers = self._writers(folder)
        adapter: dict[str, np.ndarray] = {}
        for name, array in self._arrays():
            array = array.astype(self.dtype(name), copy=False)
            if is_lora(name):
                adapter[name.removeprefix("llm.")] = array
            else:
                writers[self.weights.leaves[name].part].write(name, array)
            del array  # before the next one is read
        lines = []
        for part, writer in writers.items():
            writer.close()
            lines.append(f"{part}: {', '.join(writer.files)} ({_size(writer.bytes)})")
        lines += self._companions(folder, adapter)
        lines += self._checkpoints(folder)
        return lines

    def write_llava(self, folder: Path) -> list[str]:
        """Write all arrays into a new folder, as LLaVA's program saves a model."""
        folder.mkdir()
        rules = [their_rule(rule) for rule in self.reference.rules.values()]
        layouts = {rule.ours: (self.dtype(rule.ours), self.weights.leaves[rule.ours].shape) for rule in rules}
        writer = ShardWriter(folder / "model", rules, layouts, None, self.shard_bytes)
        for name, array in self._arrays():
            writer.write(name, array.astype(self.dtype(name), copy=False))
        writer.close()
        write_llava_config(folder, self.weights.assembly, str(self.dtype("llm.embedding.table")))
        write_companions(folder, self.weights.assembly)
        return [f"{LLAVA}: {', '.join(writer.files)} ({_size(writer.bytes)})"]

    def _writers(self, folder: Path) -> dict[str, ShardWriter]:
        kinds = self._kinds
        writers = {}
        for part in ("llm", *kinds.encoders, *kinds.connectors):
            stem = folder / LLM / "model" if part == LLM else folder / part
            rules = [rule for name, rule in self.rules.items() if self.weights.leaves[name].part == part]
            layouts = {rule.ours: (self.dtype(rule.ours), self.weights.leaves[rule.ours].shape) for rule in rules}
            if rules:
                names = [name for rule in rules for name in rule.names(layouts[rule.ours][1])]
                aliases = kind_of(kinds.encoders[part]).aliases(names) if part in kinds.encoders else {}
                writers[part] = ShardWriter(stem, rules, layouts, aliases, self.shard_bytes if part == LLM else None)
        return writers

    def _arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """All arrays that are written, LoRA first."""
        arrays = self.weights.arrays([*self.adapter, *(name for name in self.weights.leaves if not is_lora(name))])
        if not self.merge:
            return arrays
        spec = spec_of(self.weights.assembly.config.llm.lora)
        assert spec is not None
        # In the dtype that is written: a sum rounded to the base's own would be no better for being widened.
        written = ((n, x if is_lora(n) else x.astype(self.dtype(n), copy=False)) for n, x in arrays)
        return merged(written, spec.scale)

    def _companions(self, folder: Path, adapter: Mapping[str, np.ndarray]) -> list[str]:
        weights, assembly = self.weights, self.weights.assembly
        kept = weights.folder / TOKENIZER / ECG_BYTE
        if kept.is_file():
            shutil.copyfile(kept, folder / ECG_BYTE)
        if assembly.llm is None:
            write_json(folder / FACTS, facts_of_encoder(weights))
            return []
        llm = [name for name in self.rules if name.startswith("llm.")]
        as_it_came = all(weights.from_folder(n) and self.dtype(n) == weights.dtype(n) for n in llm)
        write_config(folder / LLM, assembly, {self.dtype(name) for name in llm}, as_it_came)
        no_template = write_companions(folder / LLM, assembly)
        facts = facts_of(weights, len(assembly.tokenizer), no_template)
        write_json(folder / FACTS, facts)
        write_card(folder / "README.md", weights, facts, merged=self.merge)
        lines = [f"left out: a chat template, for {no_template}"] if no_template else []
        if (index := assembly.config.retrieval.index) is not None:
            lines.append(f"left out: retrieval.index={index}; what is exported answers without what is retrieved")
        if not adapter:
            return lines
        spec = spec_of(weights.assembly.config.llm.lora)
        assert spec is not None
        save_adapter(folder / ADAPTER, adapter, spec, assembly.llm, weights.assembly.config.llm.name)
        return [*lines, f"{ADAPTER}: {WEIGHTS} ({_size(sum(x.nbytes for x in adapter.values()))})"]

    def _checkpoints(self, folder: Path) -> list[str]:
        if not has_torch():
            return [NO_TORCH]
        if self.weights.assembly.llm is None:
            return self._pretrained(folder)
        loss = self.weights.meta["history"].get("best_val_loss")
        tensors, alone = self._reference_tensors(folder), list(self._kinds.encoders) == ["encoder"]
        files = write_checkpoints(folder, self.reference, tensors, self.weights.step, loss, alone)
        return [f"for the reference: {name} ({_size((folder / name).stat().st_size)})" for name in files]

    def _pretrained(self, folder: Path) -> list[str]:
        """What the reference's program for pretraining leaves of an encoder alone."""
        if list(self._kinds.encoders) != ["encoder"]:
            return []
        write_encoder(folder, dict(Safetensors(folder / EXPORTED)))
        return [f"for the reference: {ENCODER} ({_size((folder / ENCODER).stat().st_size)})"]

    def _reference_tensors(self, folder: Path) -> dict[str, np.ndarray]:
        """The tensors of the written files under the names that they have in elm.pt."""
        written: dict[str, Any] = {"llm": open_checkpoint(folder / LLM)}
        for part in (*self._kinds.encoders, *self._kinds.connectors):
            written[part] = Safetensors(folder / f"{part}.safetensors")
        if not self.merge and self.adapter:
            written["llm.lora"] = Safetensors(folder / ADAPTER / WEIGHTS)
        tensors = {}
        for ours in self.reference.rules:
            names, part = self.reference.names(ours), self.weights.leaves[ours].part
            rule = self.rules.get(ours)
            own = [_in_adapter(n) for n in names] if rule is None else rule.names(self.weights.leaves[ours].shape)
            tensors |= {name: written[part][theirs] for name, theirs in zip(names, own, strict=True)}
        return tensors


def _in_adapter(name: str) -> str:
    """The name that a tensor of LoRA has in an adapter's own file."""
    return "base_model" + name.partition("base_model")[2].replace(".default.weight", ".weight")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} bytes"
