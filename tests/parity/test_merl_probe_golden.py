"""MERL's downstream classification: its ViT, and heads trained on frozen and on learning encoders, to the golden."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from elm_jax.scoring.probing import Adam, apply_head, cross_entropy, merl_step
from elm_jax.weights.encoders import load_encoder

Golden = Callable[[str], Path]


def _read(golden: Golden):
    folder = golden("merl_linear_probe")
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    encoder = load_encoder("merl_vit", weights, **config)
    head = np.concatenate([weights["head.weight"].T, weights["head.bias"][None]]).astype(np.float64)
    given, wanted = (dict(np.load(folder / f"{file}.npz")) for file in ("inputs", "outputs"))
    return encoder, head, given, wanted, json.loads((folder / "train_trace.json").read_text())


def test_linear_probe(golden: Golden) -> None:
    encoder, head, given, wanted, trace = _read(golden)
    features, labels = np.asarray(encoder(given["ecg"]))[:, 0].astype(np.float64), given["target"]
    np.testing.assert_allclose(features, wanted["encoding"], atol=3e-5)
    np.testing.assert_allclose(apply_head(features, head), wanted["logits"], atol=3e-5)
    np.testing.assert_allclose(cross_entropy(apply_head(features, head), labels)[0].mean(), wanted["loss"], atol=1e-5)
    optimizer = Adam(milestone=3)
    for told in trace["linear"]:
        losses, _ = cross_entropy(apply_head(features, head), labels)
        np.testing.assert_allclose(losses.mean(), told["loss"], atol=1e-5)
        head = merl_step(optimizer, head, features, labels)
    np.testing.assert_allclose(head[:-1].T, wanted["linear/head.weight"], atol=2e-5)
    np.testing.assert_allclose(head[-1], wanted["linear/head.bias"], atol=2e-5)


def test_fine_tuning(golden: Golden) -> None:
    encoder, head, given, wanted, trace = _read(golden)
    graph, state = nnx.split(encoder.module)
    leaves, tree = jax.tree.flatten(state)

    @jax.jit
    def cost(values: list[jax.Array]) -> jax.Array:
        *own, head = values
        features = nnx.merge(graph, jax.tree.unflatten(tree, own))(given["ecg"])[:, 0]
        logits = features @ head[:-1] + head[-1]
        return (jax.nn.softplus(logits) - logits * given["target"]).mean()

    values, optimizer = [*map(np.asarray, leaves), head.astype(np.float32)], Adam(milestone=3)
    learn = jax.jit(jax.value_and_grad(cost))
    for told in trace["finetune"]:
        loss, slopes = learn([jnp.asarray(x) for x in values])
        np.testing.assert_allclose(loss, told["loss"], atol=1e-5)
        values = optimizer.step(values, [np.asarray(x) for x in slopes])
    np.testing.assert_allclose(values[-1][:-1].T, wanted["finetune/head.weight"], atol=2e-5)
    np.testing.assert_allclose(values[-1][-1], wanted["finetune/head.bias"], atol=2e-5)
    squares = sum(float((np.asarray(x, np.float64) ** 2).sum()) for x in values)
    np.testing.assert_allclose(np.sqrt(squares), wanted["finetune/l2"], rtol=1e-5)
