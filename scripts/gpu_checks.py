"""What `gpu_round.py` checks of numbers: attention on packed rows, and a choice of goldens.

Float32 is multiplied in full precision unless it says otherwise: a GPU's default rounds the factors (TensorFloat-32).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.assemble import assemble
from elm_jax.cli import ConfigFlags
from elm_jax.data.loader import StepSource
from elm_jax.data.plan import Plan
from elm_jax.errors import UserError
from elm_jax.models import attention
from elm_jax.training.attention_check import BOUNDS, Attend, Packed, Sizes, error_of

GOLDENS = Path(__file__).resolve().parents[1] / "tests" / "data" / "golden"
WINDOW = 48
Tell = Callable[[dict[str, Any]], None]


# -- attention --------------------------------------------------------------------------------------------------


def attention_paths(tell: Tell, tiny: bool) -> None:
    """Every implementation, whole rows and blocks, forward and backward, against the reference path in float32; and
    with each a mask that was tampered with, which must not pass."""
    tokens, heads, kv_heads, dim = (256, 4, 2, 16) if tiny else (2048, 12, 2, 128)  # Qwen2.5-1.5B's
    packed = packed_rows(tokens)
    rows, groups = len(packed[0]), [int(row.max()) for row in packed[0]]
    tell({"rows": f"{rows} of {tokens} tokens, {groups} groups, branches up to {int(packed[1].max())}"})
    wrong = []
    for implementation, dtype in (("cudnn", "bfloat16"), ("xla", "bfloat16"), ("xla", "float32")):
        try:
            chosen = attention.choose_attention(implementation, dim, dtype)
        except UserError as error:
            tell({f"{implementation} {dtype}": f"cannot run here: {error.found}"})
            if not tiny:
                wrong.append(f"{implementation} cannot run")
            continue
        sizes, bound = Sizes(rows, tokens, heads, kv_heads, dim, jnp.dtype(dtype)), BOUNDS[dtype]
        for what, attend, window, in_blocks, passes in _cases(chosen, dim):
            with jax.default_matmul_precision("highest"):
                error = error_of(attend, _attend("xla", dim), sizes, window, in_blocks, packed)
            name = f"{implementation} {dtype}, {'blocks' if in_blocks else 'whole rows'}{what}"
            tell({name: error if np.isfinite(error) else "not finite, or gradients through the mask"})
            if (error <= bound) != passes:
                wrong.append(f"{name}: {error:.3g}, {'at most' if passes else 'more than'} {bound:g} expected")
    tell({"allowed": [f"{dtype} {BOUNDS[dtype]:g}" for dtype in ("bfloat16", "float32")]})
    if wrong:
        raise SystemExit(f"error: {'; '.join(wrong)}")


def _attend(implementation: attention.Implementation, dim: int) -> Attend:
    return lambda q, k, v, mask: attention.attend(q, k, v, mask, dim**-0.5, implementation)


def _cases(chosen: attention.Implementation, dim: int) -> Iterator[tuple[str, Attend, int | None, bool, bool]]:
    """What it is, how to attend, the window, whether in blocks, whether it must pass."""
    plain = _attend(chosen, dim)
    for in_blocks in (False, True):
        yield "", plain, None, in_blocks, True
        yield ", a key too many", lambda q, k, v, m: plain(q, k, v, m | jnp.roll(m, 1, -1)), None, in_blocks, False
        yield ", a key too few", lambda q, k, v, m: plain(q, k, v, _one_less(m)), None, in_blocks, False
    if chosen == "cudnn":
        yield f", window {WINDOW}", plain, WINDOW, False, True


def _one_less(mask: jax.Array) -> jax.Array:
    """The mask without one key that others than itself see, in the middle of the row."""
    place = mask.shape[-1] // 2
    itself = jnp.arange(mask.shape[-2]) == place if mask.shape[-1] == mask.shape[-2] else False
    return mask.at[..., place].set(mask[..., place] & itself)


def packed_rows(tokens: int) -> Packed:
    """Two rows as training reads them: one shares recordings between their questions, one the system prompt."""
    found = []
    for share in ("ecg", "system"):
        llm = {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "mlp": 32, "max_len": tokens}
        flags = {"data.share": share, "data.max_len": tokens, "data.names": '["demo:train=128,val=8,test=8"]',
                 "llm.scratch": llm}  # fmt: skip
        config = ConfigFlags.parse(
            ["--config=configs/demo.py", *(f"--config.{key}={value}" for key, value in flags.items())]
        ).load()
        dataset = assemble(config).dataset("train")
        plan = Plan(dataset.length_index(share, 0.0), rows=1, max_len=tokens, pack=True, seed=0)
        batch = StepSource(dataset, plan, steps=1)[0].batch
        found.append([np.asarray(x)[0] for x in (batch.group_ids, batch.branch_ids, batch.positions)])
        assert found[-1][0].shape == (1, tokens), found[-1][0].shape
    groups, branches, positions = (np.concatenate(parts).astype(np.int32) for parts in zip(*found, strict=True))
    return groups, branches, positions


# -- goldens ----------------------------------------------------------------------------------------------------


def goldens(tell: Tell, tiny: bool) -> None:
    """A decoder against transformers' numbers; clipping, Adam, AdamW and Muon against PyTorch's."""
    wrong = []
    for name, error, bound in (*_decoder(), *_optimizers()):
        tell({f"{name} (of {bound:g})": error})
        if not error <= bound:
            wrong.append(f"{name} differs by {error:.3g}, more than {bound:g}")
    if wrong:
        raise SystemExit(f"error: {'; '.join(wrong)}")


def _error(found: Any, expected: Any) -> float:
    """max |found - expected| / max |expected|."""
    ours, theirs = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _decoder() -> Iterator[tuple[str, float, float]]:
    """Logits of a Llama, and the gradients of its loss by the embeddings of its tokens."""
    from elm_jax.weights.load import load_llm

    folder = GOLDENS / "llm_llama_untied_sharded"
    inputs, expected = (dict(np.load(folder / f"{name}.npz")) for name in ("inputs", "outputs"))
    tokens, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
    valid = mask == 1
    # Rounding of a factor: 2^-24 of float32, 2^-11 of TensorFloat-32, 2^-9 of bfloat16; sums and layers add to it.
    for dtype, precision, forward, backward in (
        ("float32", "highest", 1e-5, 1e-4), ("float32", "default", 1e-2, 2e-2), ("bfloat16", "default", 1e-1, 2e-1),
    ):  # fmt: skip
        with jax.default_matmul_precision(precision):
            llm = load_llm(folder, dtype)

            def loss(embeddings: jax.Array, llm: Any = llm) -> tuple[jax.Array, jax.Array]:
                logits = llm(inputs_embeds=embeddings, attention_mask=mask)
                told = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
                picked = jnp.take_along_axis(told, np.maximum(labels[:, 1:], 0)[..., None], -1)[..., 0]
                return -jnp.sum(picked * (labels[:, 1:] >= 0)) / (labels[:, 1:] >= 0).sum(), logits

            embeddings = llm.embed(jnp.asarray(tokens))
            (value, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(embeddings)
        name = f"decoder, {dtype}, {precision} precision"
        yield f"{name}: logits", _error(logits[valid], expected["logits"][valid]), forward
        yield f"{name}: loss", _error(value, expected["loss"]), forward
        yield f"{name}: gradient", _error(gradient[valid], expected["grad_inputs_embeds"][valid]), backward


def _turned(x: Any) -> np.ndarray:
    """Ours keep (in, out), theirs (out, in), which matters to Muon alone."""
    return np.asarray(x).T


def _optimizers() -> Iterator[tuple[str, float, float]]:
    import optax

    from elm_jax.config import OptimConfig, TrainConfig
    from elm_jax.training.optim import clip_coefficient, make_optimizer

    with np.load(GOLDENS / "optim_clip" / "cases.npz") as file:
        clips = dict(file)
    worst = 0.0
    for n in sorted({name.split("/")[0] for name in clips}):
        norm = optax.tree.norm({g: jnp.asarray(clips[f"{n}/{g}"]) for g in ("g0", "g1")})
        coefficient = clip_coefficient(norm, float(clips[f"{n}/max_norm"]))
        worst = max(worst, *(_error(clips[f"{n}/g{i}"] * coefficient, clips[f"{n}/c{i}"]) for i in (0, 1)))
    yield "clipping", worst, 1e-6
    with np.load(GOLDENS / "optim_updates" / "cases.npz") as file:
        updates = dict(file)
    for kind, bound in (("adam", 1e-6), ("adamw", 1e-6), ("muon", 1e-5)):
        worst = 0.0
        for name in sorted({name.split("/")[0] for name in updates if name.split("_")[0] == kind}):
            given = {"beta1": 0.9, "beta2": 0.99} if kind != "muon" else {}
            decay = float(name.rpartition("_wd")[2])
            optim = OptimConfig(name=kind, lr=1e-2, weight_decay=decay, warmup_ratio=0.0, **given)  # type: ignore[arg-type]
            turned = _turned if kind == "muon" else np.asarray
            expected = updates[f"{name}/{'w_float32_newton_schulz' if kind == 'muon' else 'w'}"]
            tx = make_optimizer(optim, TrainConfig(), 3, *([{"w": -1}] if kind == "muon" else []))
            weights: Any = {"w": jnp.asarray(turned(updates[f"{name}/w0"]))}
            state, update = tx.init(weights), jax.jit(tx.update)
            with jax.default_matmul_precision("highest"):
                for gradient, wanted in zip(updates[f"{name}/grads"], expected, strict=True):
                    change, state = update({"w": jnp.asarray(turned(gradient))}, state, weights)
                    weights = optax.apply_updates(weights, change)
                    worst = max(worst, _error(turned(weights["w"]), wanted))
        yield f"{kind}, three steps", worst, bound
