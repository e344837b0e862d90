"""The end-to-end goldens: a tiny model of every kind, its batches, and the reference's training traces replayed.

Everything goes through our own parts: collate, the ELM, the train step, the optimizer. What the reference does
otherwise is asked for by its compat name: micro_batch_mean_loss and muon_by_name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import goldens
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from support import stack_micro_batches

from elm_jax.config import Config, MeshConfig, resolve
from elm_jax.data.batch import ArraySpec, Batch, BatchShape, Conversation, Group, collate
from elm_jax.elms import ELMS
from elm_jax.exchange.reference import Kinds, published_rules
from elm_jax.models.connectors import SIGNAL_KINDS, build_connector, build_signal_connector
from elm_jax.models.decoder import Decoder
from elm_jax.models.elm import ELM
from elm_jax.models.encoders import build_encoder
from elm_jax.models.functional import Arrays, Structure, structure_of
from elm_jax.models.names import Rule, export
from elm_jax.runtime.mesh import array_shardings, make_mesh
from elm_jax.training.muon import matrices_by_name
from elm_jax.training.optim import batch_scale, learning_rate_multiplier, make_optimizer
from elm_jax.training.state import abstract_state, new_state, split_names
from elm_jax.training.step import make_train_step
from elm_jax.weights.encoders import from_published
from elm_jax.weights.load import open_llm, read_llm_config
from elm_jax.weights.safetensors import Safetensors

KINDS = tuple(elm for elm, views in ELMS.items() if len(views) == 1)  # the reference's
LLMS = {"llama": "llm_llama_tied", "qwen2": "llm_qwen2_tied"}
ENCODER, ENCODER_FOLDER = "st_mem", "encoder_tiny_st_mem"
_ENCODER = goldens.config(ENCODER_FOLDER)
LEADS, SAMPLES = _ENCODER.get("num_leads", 12), _ENCODER.get("seq_len", 250)
# The reference's names of the parts, which differ between its kinds of models: the first that occurs is meant.
PREFIXES = {"llm": ("llm.llm.", "llm."), "encoder": ("encoder.",), "connector": ("projection.", "project_layer.")}


@dataclass(frozen=True)
class Case:
    """A golden's model: `kind` as config.elm has it; everything in float32."""

    name: str
    kind: str
    folder: Path
    structure: Structure
    arrays: Mapping[str, np.ndarray]
    rules: Mapping[str, Rule]
    inputs: Mapping[str, np.ndarray]
    traces: Mapping[str, Any]

    @property
    def signal_shape(self) -> tuple[int, int]:
        """(C, L) of its signals; the leads of one that lies flat are those of the goldens' encoder."""
        return signal_shape(self.inputs)

    def batch(self, number: int, empty: bool = False) -> Batch:
        """Micro-batch `number` of the golden, without the micro-batch axis; `empty`: with nothing to learn."""
        start = f"batch{number}"
        ids, mask, labels = (self.inputs[f"{start}/elm_{part}"] for part in ("input_ids", "attention_mask", "labels"))
        places, signals = self.inputs.get(f"{start}/signal_id_indices"), self.inputs.get(f"{start}/ecg_signal")
        rows = []
        for row, valid in enumerate(mask == 1):
            first = int(np.argmax(valid))  # what is padded is padded on the left
            assert valid[first:].all()
            at = np.zeros((0, 1), np.int32) if places is None else places[row : row + 1] - first
            supervised = labels[row, first:] >= 0
            assert not supervised[0] and (labels[row, first:] == ids[row, first:])[supervised].all()
            own = [] if signals is None else [{"ecg": signals[row].reshape(self.signal_shape)}]
            rows.append([Group(0, [Conversation(row, ids[row, first:].astype(np.int32), supervised, at, own)])])
        shape = BatchShape(ids.shape[1], 0 if signals is None else 1, int((labels >= 0).sum(1).max()))
        batch = collate(rows, shape, {"ecg": ArraySpec(self.signal_shape)})
        return batch._replace(target_weights=0 * batch.target_weights) if empty else batch

    def published(self, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Arrays under the names of the reference's state dict."""
        known = {name for each in self.traces.values() for name in each["final_checksums"]}
        found = {}
        for name, array in arrays.items():
            component = name.split(".")[0]
            prefix = next(p for p in PREFIXES[component] if any(theirs.startswith(p) for theirs in known))
            rule = self.rules[name]
            own = Rule(rule.theirs, name, rule.transpose)
            found.update({f"{prefix}{theirs}": x for theirs, x in export([own], {name: np.asarray(array)})})
        return found


def signal_shape(inputs: Mapping[str, np.ndarray]) -> tuple[int, int]:
    _, *shape = inputs.get("batch0/ecg_signal", np.zeros((1, LEADS, 1))).shape
    return (shape[0], shape[1]) if len(shape) == 2 else (LEADS, shape[0] // LEADS)


def split_name(name: str) -> tuple[str, str]:
    """A golden's name -> (kind, LLM): e2e_conv_elf_llama is ("conv_elf", "llama")."""
    kind, _, llm = name.removeprefix("e2e_").rpartition("_")
    return kind, llm


@cache
def load_case(name: str, golden: Any) -> Case:
    kind, llm = split_name(name)
    folder, llm_folder = golden(name), golden(LLMS[llm])
    inputs = dict(np.load(folder / "inputs.npz"))
    places = inputs.get("batch0/signal_id_indices")
    tokens = 0 if places is None else places.shape[1]
    build = partial(_build, kind, read_llm_config(llm_folder), tokens, signal_shape(inputs), golden)
    structure = structure_of(build)
    encoder = ENCODER if any(n.startswith("encoder.") for n in structure.leaves) else None
    connector = ELMS[kind]["ecg"].connector
    parts = {"encoder": encoder} if encoder else {}, {"connector": connector} if connector else {}
    kinds = Kinds(read_llm_config(llm_folder), *parts)
    rules = published_rules(structure.leaves, kinds)
    arrays = dict(_initial(structure, folder, llm_folder, encoder, rules, golden))
    traces = json.loads((folder / "train_traces.json").read_text())
    return Case(name, kind, folder, structure, arrays, rules, inputs, traces)


def _build(kind: str, llm: Any, tokens: int, shape: tuple[int, int], golden: Any) -> ELM:
    rngs, connector = nnx.Rngs(0), ELMS[kind]["ecg"].connector
    decoder = Decoder(llm, rngs)
    if connector is None:
        return ELM(None, None, decoder, jnp.dtype(jnp.float32))
    if connector in SIGNAL_KINDS:
        bridge = build_signal_connector(connector, *shape, tokens, llm.hidden, rngs=rngs)
        return ELM(None, bridge, decoder, jnp.dtype(jnp.float32))
    config = json.loads((golden(ENCODER_FOLDER) / "config.json").read_text())
    encoder = build_encoder(ENCODER, config, tokens, rngs, compat=("st_mem_train_positions",))
    bridge = build_connector(connector, encoder.width, llm.hidden, rngs=rngs)
    return ELM(encoder, bridge, decoder, jnp.dtype(jnp.float32))


def _initial(
    structure: Structure, folder: Path, llm_folder: Path, encoder: str | None, rules: Mapping[str, Rule], golden: Any
) -> Iterator[tuple[str, np.ndarray]]:
    llm = open_llm(llm_folder, read_llm_config(llm_folder)).arrays()
    yield from ((f"llm.{name}", x.astype(np.float32)) for name, x in llm.items())
    if encoder is not None:
        own = {n.removeprefix("encoder."): leaf for n, leaf in structure.leaves.items() if n.startswith("encoder.")}
        tensors = Safetensors(golden(ENCODER_FOLDER) / "model.safetensors")
        yield from ((f"encoder.{name}", x) for name, x in from_published(encoder, own, tensors).items())
    bridge = [name for name in structure.leaves if name.startswith("connector.")]
    if bridge:
        saved = Safetensors(folder / "connector_init.safetensors")
        tensors = {name.split(".", 1)[1]: x for name, x in saved.items()}
        yield from ((name, rules[name].arrange([tensors[rules[name].theirs]])) for name in bridge)


# -- training -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replayed:
    """What our steps did: lists have an entry per optimizer step."""

    losses: list[float]
    norms: list[float]
    rates: list[float]
    lengths: list[float]  # L2 norm of what is trained, after the step
    arrays: Arrays  # of the whole model, at the end


def settings_of(trace: Mapping[str, Any]) -> Config:
    """Our configuration of a trace's arguments."""
    args, accumulated = trace["args"], trace["args"]["grad_accum_steps"]
    return resolve(
        {
            "update": tuple(trace["update"]),
            "compat": ("micro_batch_mean_loss", "muon_by_name"),
            "train": {"batch_size": args["batch_size"] * accumulated},
            "optim": {
                "name": args["optimizer"],
                "lr": args["lr"],
                "schedule": args["lr_schedule"],
                "warmup_ratio": args["warmup_ratio"],
                "min_lr_ratio": args["min_lr_ratio"],
                "weight_decay": args["weight_decay"],
                "weight_decay_scale": args["scale_wd"],
                "beta1": args["beta1"],
                "beta2": args["beta2"],
                "eps": args["eps"],
                "grad_clip": args["grad_clip"],
                "accum_steps": accumulated,
                "ref_batch": args["ref_global_bs"],
                "muon": {
                    "momentum": args["muon_momentum"],
                    "ns_steps": args["muon_ns_steps"],
                    "adamw_lr_ratio": args["muon_adamw_lr_ratio"],
                },
            },
        }
    )


def replay(case: Case, trace: Mapping[str, Any]) -> Replayed:
    """Train as the reference did in this trace, with our own train step on one device.

    Its schedule counts micro-batches (args.max_steps) though it advances once a step; a last window that is not
    full is divided by the full number, which here is what micro-batches without targets do.
    """
    config, structure = settings_of(trace), case.structure
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    shardings = array_shardings(structure, mesh)
    trained, moving, frozen = split_names(structure, config.update)
    total = trace["args"]["max_steps"]
    tx = make_optimizer(config.optim, config.train, total, matrices_by_name(structure.leaves, case.rules))
    arrays = {name: jax.device_put(x, shardings[name]) for name, x in case.arrays.items()}
    like = abstract_state(structure, trained, moving, tx, mesh, shardings)
    kept = {name: arrays[name] for name in frozen}
    state = new_state(arrays, like, tx)
    layout = jax.tree.map(lambda x: x.sharding, like)
    step = make_train_step(structure, config, tx, mesh, layout, {name: shardings[name] for name in frozen})
    rate = learning_rate_multiplier(config.optim, total)
    peak = config.optim.lr * batch_scale(config.optim, config.train)
    losses, norms, rates, lengths = [], [], [], []
    for window in windows(trace):
        rates.append(peak * float(rate(len(rates))))
        micro = [case.batch(max(number, 0), empty=number < 0) for number in window]
        state, metrics = step(state, kept, stack_micro_batches(micro))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
        squares = [np.sum(np.square(np.asarray(x, np.float64))) for x in state.trained.values()]
        lengths.append(float(np.sqrt(np.sum(squares))))
    return Replayed(losses, norms, rates, lengths, {**kept, **state.trained, **state.statistics})


def windows(trace: Mapping[str, Any]) -> list[list[int]]:
    """The numbers of the micro-batches of each optimizer step; -1 is one that there is not."""
    count, size = trace["n_batches"], trace["args"]["grad_accum_steps"]
    return [[n if n < count else -1 for n in range(start, start + size)] for start in range(0, count, size)]


def mean_losses(trace: Mapping[str, Any]) -> list[float]:
    """The reference's loss of each optimizer step: its micro-batches' over the full number of them."""
    losses = trace["micro_losses"]
    return [sum(losses[n] for n in window if n >= 0) / len(window) for window in windows(trace)]
