"""Connectors and splicing against the reference's numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity_log import compare, record
from safetensors.numpy import load_file

from elm_jax.errors import UserError
from elm_jax.models.connectors import RULES, SIGNAL_KINDS, build_connector, build_signal_connector, splice
from elm_jax.models.functional import structure_of
from elm_jax.models.names import export

GoldenFolder = Callable[[str], Path]
CASES = {
    "connector_linear": "linear",
    "connector_linear_2d": "linear",
    "connector_mlp": "mlp",
    "connector_mlp_hidden96": "mlp",
    "connector_base_elf": "patch",
    "connector_patch_elf": "patch",
    "connector_conv_elf": "conv",
}
ONE_PATCH = "connector_base_elf"


def build(case: str, config: dict[str, Any], weights: dict[str, np.ndarray]) -> nnx.Module:
    kind, width = CASES[case], config["llm_hidden"]
    if kind in SIGNAL_KINDS:
        patches = 1 if case == ONE_PATCH else config["num_patches"]
        shape = config["num_leads"], config["segment_len"]
        return build_signal_connector(kind, *shape, patches, width, rngs=nnx.Rngs(0))
    within = [len(weights[rule.theirs]) for rule in RULES[kind] if rule.ours == "hidden.bias"]
    return build_connector(kind, config["in_dim"], width, *within, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("case", CASES)
def test_connector_output_loss_and_gradients(golden: GoldenFolder, case: str) -> None:
    folder, kind = golden(case), CASES[case]
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    inputs, expected = np.load(folder / "inputs.npz"), np.load(folder / "outputs.npz")
    structure = structure_of(lambda: build(case, config, weights))
    rules = [rule for rule in RULES[kind] if rule.theirs != "image_newline"]  # which only tiles of images have
    assert {rule.theirs for rule in rules} == set(weights)
    params = {rule.ours: jnp.asarray(rule.arrange([weights[rule.theirs]])) for rule in rules}
    assert {name: p.shape for name, p in params.items()} == {
        n: leaf.shape for n, leaf in structure.leaves.items()
    }

    signals = inputs["signal_embeds"] if "signal_embeds" in inputs else inputs["ecg_signal"]
    if kind in SIGNAL_KINDS:  # the reference flattens base_elf's before
        signals = signals.reshape(len(signals), config["num_leads"], config["segment_len"])

    def loss(params):
        out = structure.bind(params)(signals).reshape(expected["out"].shape)
        return jnp.sum(out * inputs["loss_weight"]), out

    with jax.default_matmul_precision("highest"):
        (value, out), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    compare(case, "output", out, expected["out"], 1e-5)
    # The loss is a sum of terms that cancel, so its own size is no measure of the rounding in it.
    size = np.abs(expected["out"] * inputs["loss_weight"]).sum()
    record(case, "loss", abs(value - expected["loss"]) / size, 1e-6)
    for key, gradient in export(RULES[kind], gradients):
        name, part = f"grad_{key}", gradient
        if name not in expected:  # of the largest, the first columns are stored
            name = next(stored for stored in expected if stored.startswith(f"{name}[:, :"))
            part = gradient[:, : expected[name].shape[1]]
        compare(case, f"gradient of {key}", part, expected[name], 1e-4)


@pytest.mark.parametrize("case", goldens.cases("connector_injection"))
def test_splice_equals_the_reference_injection(golden: GoldenFolder, case: str) -> None:
    cases = np.load(golden("connector_injection") / "cases.npz")
    text, expected = cases[f"{case}/llm_embeddings"], cases[f"{case}/out"]
    signals = cases[f"{case}/projected"].reshape(text.shape[0], -1, text.shape[2])
    slot = slots(cases[f"{case}/indices"].reshape(signals.shape[:2]), text.shape[1])
    if case == "only_text":  # the reference was told to inject nothing, whatever the positions
        slot[:] = -1
    theirs = splice(text, signals, slot, ("skip_zero_signals",))
    record("connector_injection", f"{case}: differing values", float(np.sum(np.asarray(theirs) != expected)), 0)
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


def test_only_signal_places_send_gradients_to_the_signals() -> None:
    text, signals = jnp.ones((1, 3, 2)), jnp.full((1, 2, 2), 5.0)
    slot = jnp.array([[-1, 1, 1]], jnp.int32)
    out, pull = jax.vjp(lambda text, signals: splice(text, signals, slot), text, signals)
    to_text, to_signals = pull(jnp.ones_like(out))
    np.testing.assert_array_equal(out[0, :, 0], [1, 5, 5])
    np.testing.assert_array_equal(to_text[0, :, 0], [1, 0, 0])
    np.testing.assert_array_equal(to_signals[0, :, 0], [0, 2])


def test_a_row_without_signal_slots_is_text() -> None:
    text = jnp.ones((2, 3, 4), jnp.bfloat16)
    np.testing.assert_array_equal(splice(text, jnp.ones((2, 0, 4)), jnp.full((2, 3), -1)), text)


def test_the_result_has_the_dtype_of_what_goes_in() -> None:
    connector = build_connector("mlp", 8, 4, rngs=nnx.Rngs(0))
    assert connector(jnp.ones((2, 1, 8), jnp.bfloat16)).dtype == jnp.bfloat16
    assert splice(jnp.ones((1, 2, 4), jnp.bfloat16), jnp.ones((1, 1, 4)), jnp.zeros((1, 2), int)).dtype == (
        jnp.bfloat16
    )


def test_initial_weights_are_uniform_within_one_over_the_root_of_the_inputs() -> None:
    connector = build_connector("mlp", 400, 64, 100, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    for layer, inputs in ((connector.hidden, 400), (connector.projection, 100)):
        for values in (layer.kernel[...], layer.bias[...]):
            assert values.dtype == jnp.bfloat16
            largest = float(jnp.abs(values).max()) * inputs**0.5
            assert 0.9 < largest < 1.01, largest
        assert float(jnp.std(layer.kernel[...].astype(jnp.float32))) == pytest.approx(
            (3 * inputs) ** -0.5, rel=0.05
        )


def test_unknown_kinds_and_a_hidden_width_without_use_are_refused() -> None:
    with pytest.raises(UserError, match="connector: found 'mpl'; expected linear or mlp; did you mean 'mlp'?"):
        build_connector("mpl", 8, 4, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="connector.hidden: found 16; expected None for a linear connector"):
        build_connector("linear", 8, 4, 16, rngs=nnx.Rngs(0))


def test_patches_must_divide_the_samples_and_fit_the_signals() -> None:
    with pytest.raises(UserError, match=r"encoder.tokens: found 7; expected a number that divides .*500; .*tokens=5"):
        build_signal_connector("patch", 12, 500, 7, 8, rngs=nnx.Rngs(0))
    for kind in SIGNAL_KINDS:
        connector = build_signal_connector(kind, 3, 20, 5, 8, rngs=nnx.Rngs(0))
        assert connector(jnp.ones((2, 3, 20), jnp.bfloat16)).dtype == jnp.bfloat16
        with pytest.raises(UserError, match=r"connector input: found signals of shape \(2, 3, 40\)"):
            connector(jnp.ones((2, 3, 40)))


@pytest.mark.parametrize("kind", SIGNAL_KINDS)
def test_a_token_depends_on_its_own_patch_alone(kind: str) -> None:
    connector = build_signal_connector(kind, 3, 40, 4, 8, rngs=nnx.Rngs(0))
    signals = jax.random.normal(jax.random.key(0), (1, 3, 40))
    changed = connector(signals.at[:, :, 10:20].add(1.0)) != connector(signals)
    np.testing.assert_array_equal(changed.any(-1)[0], [False, True, False, False])
