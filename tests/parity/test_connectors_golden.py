"""Connectors and splicing against the reference's numbers."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from elm_jax.models.connectors import RULES, build_connector, splice
from elm_jax.models.functional import structure_of
from elm_jax.weights.rules import export

GoldenFolder = Callable[[str], Path]
CASES = {
    "connector_linear": ("linear", None),
    "connector_linear_2d": ("linear", None),
    "connector_mlp": ("mlp", None),
    "connector_mlp_hidden96": ("mlp", 96),
}


def close_in_scale(ours, theirs, tolerance: float) -> bool:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return ours.shape == theirs.shape and np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("case", CASES)
def test_connector_output_loss_and_gradients(golden: GoldenFolder, case: str) -> None:
    folder, (kind, hidden) = golden(case), CASES[case]
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    inputs, expected = np.load(folder / "inputs.npz"), np.load(folder / "outputs.npz")
    structure = structure_of(
        lambda: build_connector(kind, config["in_dim"], config["llm_hidden"], hidden, rngs=nnx.Rngs(0))
    )
    assert {rule.theirs for rule in RULES[kind]} == set(weights)
    params = {rule.ours: jnp.asarray(rule.arrange([weights[rule.theirs]])) for rule in RULES[kind]}
    assert {name: p.shape for name, p in params.items()} == {
        n: leaf.shape for n, leaf in structure.leaves.items()
    }

    def loss(params):
        out = structure.bind(params)(inputs["signal_embeds"])
        return jnp.sum(out * inputs["loss_weight"]), out

    with jax.default_matmul_precision("highest"):
        (value, out), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    assert close_in_scale(out, expected["out"], 1e-5)
    # The loss is a sum of terms that cancel, so its own size is no measure of the rounding in it.
    assert abs(value - expected["loss"]) < 1e-6 * np.abs(expected["out"] * inputs["loss_weight"]).sum()
    for key, gradient in export(RULES[kind], gradients):
        assert close_in_scale(gradient, expected[f"grad_{key}"], 1e-4), key


@pytest.mark.parametrize(
    "case",
    ["normal", "minus_one", "zero_rows_skipped", "two_dim_projected", "one_dim_indices_batch1", "only_text"]
    + ["duplicate_equal"],
)
def test_splice_equals_the_reference_injection(golden: GoldenFolder, case: str) -> None:
    cases = np.load(golden("connector_injection") / "cases.npz")
    text, expected = cases[f"{case}/llm_embeddings"], cases[f"{case}/out"]
    signals = cases[f"{case}/projected"].reshape(text.shape[0], -1, text.shape[2])
    slot = slots(cases[f"{case}/indices"].reshape(signals.shape[:2]), text.shape[1])
    if case == "only_text":  # the reference was told to inject nothing, whatever the positions
        slot[:] = -1
    skipping = ("skip_zero_signals",)
    np.testing.assert_array_equal(splice(text, signals, slot, skipping), expected)
    ours = np.asarray(splice(text, signals, slot))
    if case == "zero_rows_skipped":
        zero = (slot >= 0) & ~np.take_along_axis(signals, np.maximum(slot, 0)[..., None], 1).any(-1)
        assert zero.any()
        np.testing.assert_array_equal(ours, np.where(zero[..., None], 0, expected))
    else:
        np.testing.assert_array_equal(ours, expected)


def slots(indices: np.ndarray, length: int) -> np.ndarray:
    """The reference's positions (B, N), -1 for none, as our slot (B, T)."""
    slot = np.full((indices.shape[0], length), -1, np.int32)
    for row, positions in enumerate(indices):
        for k, position in enumerate(positions):
            if position >= 0:
                slot[row, position] = k
    return slot
