"""ST-MEM, MTAE and MLAE without reference data: patches, initial values, any number of leads, errors."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from elm_jax.errors import UserError
from elm_jax.models.encoders import build_encoder
from elm_jax.models.encoders.mae import MaeConfig, MaskedAutoencoder, calculate_patch_size
from elm_jax.models.functional import Structure, structure_of
from elm_jax.models.pooling import adaptive_average_pool
from elm_jax.runtime.mesh import make_mesh, named_sharding
from elm_jax.training.state import split_names
from elm_jax.weights.encoders import from_published, load_encoder, to_published

NAMES = ("st_mem", "mtae", "mlae")
SMALL = {
    "seq_len": 40, "num_leads": 3, "embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_embed_dim": 8,
    "decoder_depth": 1, "decoder_num_heads": 1,
}  # fmt: skip
TIME = {"patch_size": 5}  # for st_mem and mtae


@cache
def initial(name: str) -> dict[str, jax.Array]:
    """The arrays of a fresh encoder."""
    return structure(name).arrays(load_encoder(name, **config_for(name)).module)


@pytest.fixture(scope="module")
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def config_for(name: str, **changes: Any) -> dict[str, Any]:
    return SMALL | ({} if name == "mlae" else TIME) | changes


def structure(name: str, tokens: int = 1, **changes: Any) -> Structure:
    return structure_of(lambda: build_encoder(name, config_for(name, **changes), tokens, nnx.Rngs(0)))


def published(name: str, rng: np.random.Generator, **changes: Any) -> dict[str, np.ndarray]:
    """Random tensors under published names."""
    leaves = structure(name, **changes).leaves
    return to_published(
        name, {key: 0.3 * rng.standard_normal(leaf.shape, dtype=np.float32) for key, leaf in leaves.items()}
    )


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


# Patches


def test_ties_of_the_patch_size_rule_go_to_the_smaller() -> None:
    assert calculate_patch_size(252) == 7  # 36 patches; 9 samples give 28, as far from 32


def test_patches_hold_the_samples_they_should(rng) -> None:
    x = normal(rng, 2, 3, 40)
    cut = {name: MaeConfig.from_fields(name, config_for(name)).cut(x) for name in NAMES}
    assert [cut[name].shape for name in NAMES] == [(2, 3, 8, 5), (2, 8, 15), (2, 3, 40)]
    for patch in range(8):
        span = slice(5 * patch, 5 * patch + 5)
        np.testing.assert_array_equal(cut["st_mem"][:, :, patch], x[:, :, span])
        np.testing.assert_array_equal(cut["mtae"][:, patch], x[:, :, span].transpose(0, 2, 1).reshape(2, 15))
    np.testing.assert_array_equal(cut["mlae"], x)


def test_a_patch_of_mlae_is_as_many_whole_leads_as_it_is_told(rng) -> None:
    """Patches of three leads read three leads and no other; weights of one lead's head, as published, fit."""
    sizes = {"num_leads": 6, "patch_size": 3}
    config, x = MaeConfig.from_fields("mlae", config_for("mlae", **sizes)), normal(rng, 2, 6, 40)
    assert config.patches == (2, 120)
    np.testing.assert_array_equal(config.cut(x), [[np.concatenate(leads) for leads in (one[:3], one[3:])] for one in x])
    tensors = published("mlae", rng, **sizes)
    assert tensors["decoder_head.weight"].shape == (40, 8) and tensors["encoder.pos_embedding"].shape == (1, 3, 16)
    encoder = load_encoder("mlae", tensors, 3, **config_for("mlae", **sizes))
    plain, latent = encoder(x), encoder.module.encode(x)
    swapped = encoder.module.encode(x[:, [3, 4, 5, 0, 1, 2]])
    assert plain.shape == (2, 3, 8) and not np.allclose(latent, swapped, atol=1e-3)
    embedded = encoder.module.patch(config.cut(x))
    other = encoder.module.patch(config.cut(np.concatenate([x[:, :3], 0 * x[:, 3:]], 1)))
    np.testing.assert_array_equal(embedded[:, 0], other[:, 0])


def test_an_mlae_pretrained_on_several_leads_a_patch_is_an_elms_encoder(rng) -> None:
    """Its head rebuilds all leads of a patch, which the published one does not; no embedding depends on it."""
    sizes, name = config_for("mlae", num_leads=6, patch_size=3), "mlae.pretraining"
    pretrained, x = load_encoder(name, None, 3, **sizes), normal(rng, 2, 6, 40)
    module: Any = pretrained.module
    rebuilt = jax.eval_shape(lambda x: module.rebuild(x, module.noise(jax.random.key(0), 2), 0.5), x)
    assert rebuilt.patches.shape == rebuilt.truth.shape == (2, 2, 120)
    tensors = to_published(name, structure_of(lambda: module).arrays(module))
    assert tensors["decoder_head.weight"].shape == (120, 8)
    np.testing.assert_array_equal(load_encoder("mlae", tensors, 3, **sizes)(x), pretrained(x))
    with pytest.raises(UserError, match=r"to_decoder_embedding.weight float32\[7, 16\]"):
        load_encoder("mlae", {**tensors, "to_decoder_embedding.weight": tensors["to_decoder_embedding.weight"][1:]}, 3,
                     **sizes)  # fmt: skip


@pytest.mark.parametrize(("name", "count"), [("st_mem", 24), ("mtae", 9), ("mlae", 4)])
def test_tokens_are_bins_of_all_latents(rng, name: str, count: int) -> None:
    """As many tokens as latents: the latents themselves, lead after lead for ST-MEM, CLS first for the others."""

    @jax.jit
    def run(arrays, x):
        several, one = structure(name, count).bind(arrays), structure(name, 2).bind(arrays)
        latents = one.encode(x) if name == "st_mem" else one.decode(one.encode(x))
        return latents, several(x), one(x)

    latents, several, pooled = run(initial(name), normal(rng, 2, 3, 40))
    np.testing.assert_allclose(several, latents.reshape(several.shape), atol=1e-5)
    np.testing.assert_allclose(pooled, adaptive_average_pool(several, 2), atol=1e-5)


# Positions and other initial values


@pytest.mark.parametrize("name", NAMES)
def test_positions_are_sines_that_nothing_trains(name: str) -> None:
    form = structure(name)
    positions = {key for key, leaf in form.leaves.items() if leaf.statistic and "position" in key}
    assert positions == ({"position"} if name == "st_mem" else {"position", "decoder_position"})
    table = np.asarray(initial(name)["position"])[0]
    patches = 3 if name == "mlae" else 8
    assert len(table) == patches + (2 if name == "st_mem" else 1)
    assert not table[0].any() and (name != "st_mem" or not table[-1].any())
    at = np.arange(patches)[:, None] / 10000 ** (np.arange(8) / 8)
    np.testing.assert_allclose(table[1 : patches + 1], np.concatenate([np.sin(at), np.cos(at)], 1), atol=1e-6)


def test_the_reference_trains_the_positions_of_st_mem() -> None:
    compat = ("st_mem_train_positions",)
    form = structure_of(lambda: build_encoder("st_mem", config_for("st_mem"), 1, nnx.Rngs(0), compat=compat))
    assert not any(leaf.statistic for leaf in form.leaves.values())


def test_what_is_held_is_the_same_float32_where_weights_are_bfloat16() -> None:
    """A run that trains the encoder must find what one left that had it frozen in bfloat16."""

    def build() -> Any:
        return build_encoder("mtae", config_for("mtae"), 1, nnx.Rngs(0), param_dtype=jnp.bfloat16)

    form = structure_of(build)
    whole = structure("mtae").arrays(build_encoder("mtae", config_for("mtae"), 1, nnx.Rngs(0)))
    for name, array in form.arrays(build()).items():
        if form.leaves[name].statistic:
            np.testing.assert_array_equal(array, whole[name], err_msg=name)
    assert {leaf.dtype for leaf in form.leaves.values() if leaf.statistic} == {np.dtype(np.float32)}
    assert {leaf.dtype for leaf in form.leaves.values() if not leaf.statistic} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", NAMES)
def test_initial_weights_are_xavier_uniform(name: str) -> None:
    for key, array in initial(name).items():
        values = np.asarray(array)
        if key.endswith("kernel"):
            bound = (6 / sum(values.shape[-2:])) ** 0.5
            assert 0.8 * bound < np.abs(values).max() <= bound, key
            assert values.std() == pytest.approx(bound / 3**0.5, rel=0.15), key
        elif key.endswith("bias"):
            assert not values.any(), key
        elif key in ("cls", "sep", "lead", "mask"):
            assert 0.005 < values.std() < 0.04, key


# Leads and dtypes


@pytest.mark.parametrize("leads", [1, 8, 15])
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_any_number_of_leads_is_used(rng, name: str, leads: int) -> None:
    tensors = published(name, rng, num_leads=leads)
    if name == "st_mem":
        assert sum(key.startswith("encoder.lead_embeddings.") for key in tensors) == leads
    encoder = load_encoder(name, tensors, tokens=2, **config_for(name, num_leads=leads))
    signals = np.repeat(normal(rng, 1, leads, 40), 1 + leads, 0)
    for lead in range(leads):
        signals[1 + lead, lead] = normal(rng, 40)
    out = np.asarray(encoder(signals))
    assert (out.shape, out.dtype) == ((1 + leads, 2, encoder.width), np.float32)
    assert (np.abs(out[1:] - out[0]).max((1, 2)) > 1e-4).all()  # each lead is seen


def test_lead_embeddings_keep_their_order(rng) -> None:
    """Of 12 and more, where the order of names as text would put 10 before 2."""
    tensors = published("st_mem", rng, num_leads=12)
    arrays = from_published("st_mem", structure("st_mem", num_leads=12).leaves, tensors)
    for lead in range(12):
        np.testing.assert_array_equal(arrays["lead"][lead], tensors[f"encoder.lead_embeddings.{lead}"])


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_computes_close_to_float32(rng, name: str) -> None:
    config = config_for(name)
    rounded = structure_of(lambda: build_encoder(name, config, 2, nnx.Rngs(0), dtype=jnp.bfloat16))

    @jax.jit
    def run(arrays, x):
        return rounded.bind(arrays)(x), structure(name, 2).bind(arrays)(x)

    found, expected = run(initial(name), normal(rng, 2, 3, 40))
    assert found.dtype == jnp.float32
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < 0.03  # bfloat16 has 8 bits, so it is not float32 that ran


OF_PRETRAINING = {"mask", "decoder_norm.scale", "decoder_norm.bias", "head.kernel", "head.bias"}


@pytest.mark.parametrize("name", NAMES)
def test_what_no_embedding_depends_on_is_held_and_all_else_is_trained(rng, name: str) -> None:
    """An optimizer would decay what has no gradient to nothing."""
    form, signals = structure(name), normal(rng, 2, 3, 40)
    gradients = jax.jit(jax.grad(lambda arrays: jnp.sum(form.bind(arrays)(signals) ** 2)))(initial(name))
    unused = {key for key, gradient in gradients.items() if not np.asarray(gradient).any()}
    assert unused == (set() if name == "st_mem" else OF_PRETRAINING)
    leaves = {f"encoder.{key}": replace(leaf, part="encoder") for key, leaf in form.leaves.items()}
    model = replace(form, leaves=leaves)
    trained, moving, frozen = split_names(model, ("encoder",))
    assert set(moving) == {f"encoder.{key}" for key in (*unused, *form.leaves) if key in unused or "position" in key}
    assert not frozen and set(trained) | set(moving) == set(model.leaves)


def test_pretraining_trains_what_the_reconstruction_depends_on(rng) -> None:
    config = MaeConfig.from_fields("mtae", config_for("mtae"))
    form = structure_of(lambda: MaskedAutoencoder(config, rngs=nnx.Rngs(0), pretrain=True))
    assert {key for key, leaf in form.leaves.items() if leaf.statistic} == {"position", "decoder_position"}
    signals = normal(rng, 2, 3, 40)

    @jax.jit
    @jax.grad
    def loss(arrays: Any) -> Any:
        model = form.bind(arrays)
        return jnp.sum(model.head(model.decoder_norm(model.decode(model.encode(signals)))) ** 2)

    gradients = loss(initial("mtae"))
    assert all(np.asarray(gradients[key]).any() for key in OF_PRETRAINING - {"mask"})


@pytest.mark.parametrize("mesh", [{"data": 1, "fsdp": 8}, {"data": 1, "fsdp": 2, "tensor": 4}])
@pytest.mark.parametrize("name", NAMES)
def test_full_size_weights_can_be_laid_out_on_a_mesh(name: str, mesh: dict[str, int]) -> None:
    from elm_jax.config import MeshConfig

    devices = make_mesh(MeshConfig(**mesh))
    leaves = structure_of(lambda: build_encoder(name, {}, 1, nnx.Rngs(0))).leaves
    for key, leaf in leaves.items():
        spread = not named_sharding(devices, leaf.axes, leaf.shape, key).is_fully_replicated
        assert spread or np.prod(leaf.shape) < 1e5, key


# Configs, shapes and checkpoints that do not fit


def test_the_published_sizes_are_the_default() -> None:
    st_mem = MaeConfig.from_fields("st_mem", {"norm_pix_loss": False, "d_model": 768, "num_encoder_tokens": 1})
    assert (st_mem.seq_len, st_mem.patch_size, st_mem.embed_dim, st_mem.depth) == (2500, 100, 768, 12)
    assert MaeConfig.from_fields("mtae", {"seq_len": 1250}).patch_size == 50
    assert MaeConfig.from_fields("mlae", {"seq_len": 1250}).patch_size == 1


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("st_mem", {"num_lead": 8}, r"config.num_lead: found an unknown field.*did you mean 'num_leads'\?"),
        ("mtae", {"depth": 0}, "config.depth: found 0; expected a whole number from 1 to 100000"),
        ("mtae", {"embed_dim": 63}, "config.embed_dim: found 63; expected an even number"),
        ("mtae", {"mlp_ratio": "4"}, "config.mlp_ratio: found '4'; expected a number"),
        ("mtae", {"qkv_bias": 1}, "config.qkv_bias: found 1; expected true or false"),
        ("st_mem", {"patch_size": 99}, "config.patch_size: found 99; expected a divisor of seq_len, 2500.*to 100"),
        ("mtae", {"patch_size": 3}, "config.patch_size: found 3; expected a divisor of seq_len, 2500.*to 100"),
        ("mlae", {"patch_size": 5}, "config.patch_size: found 5; expected a divisor of num_leads, 12.*to 1"),
        ("mlae", {"num_leads": 8, "patch_size": 3}, "config.patch_size: found 3; expected a divisor of num_leads, 8"),
    ],
)
def test_configs_that_do_not_fit_are_refused(name: str, config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_encoder(name, config, 1, nnx.Rngs(0))


@pytest.mark.parametrize("shape", [(2, 4, 40), (2, 3, 45), (3, 40)])
@pytest.mark.parametrize("name", NAMES)
def test_signals_of_another_shape_are_refused(name: str, shape: tuple[int, ...]) -> None:
    encoder = nnx.eval_shape(lambda: build_encoder(name, config_for(name), 1, nnx.Rngs(0)))
    with pytest.raises(UserError, match=r"expected \(batch, 3 leads, 40 samples\)"):
        jax.eval_shape(lambda e, x: e(x), encoder, jax.ShapeDtypeStruct(shape, jnp.float32))


def test_a_second_name_is_optional_but_must_agree(rng) -> None:
    tensors, leaves = published("mtae", rng), structure("mtae").leaves
    second = {key: tensors[key] for key in tensors if key.startswith("to_patch_embedding.")}
    assert len(second) == 6
    for key, tensor in second.items():
        np.testing.assert_array_equal(tensor, tensors[f"encoder.{key}"])
    once = {key: tensor for key, tensor in tensors.items() if key not in second}
    arrays = from_published("mtae", leaves, once)
    np.testing.assert_array_equal(arrays["patch.linear.kernel"].T, tensors["to_patch_embedding.2.weight"])
    with pytest.raises(UserError, match="found to_patch_embedding.1.bias unlike encoder.to_patch_embedding.1.bias"):
        from_published("mtae", leaves, {**tensors, "to_patch_embedding.1.bias": np.ones(15, np.float32)})


def test_a_training_checkpoint_of_st_mem_is_read_without_its_decoder(rng) -> None:
    tensors, leaves = published("st_mem", rng), structure("st_mem").leaves
    more = {
        "module.mask_embedding": np.zeros(3),
        "module.to_patch_embedding.1.bias": np.zeros(3),
        "module.decoder_blocks.0.attn.norm.bias": np.zeros(3),
    }
    wrapped = {f"module.{key}": tensor for key, tensor in tensors.items()}
    arrays = from_published("st_mem", leaves, wrapped | more)
    np.testing.assert_array_equal(arrays["sep"], tensors["encoder.sep_embedding"])
    with pytest.raises(UserError, match="found unknown encoder.cls_embedding"):
        from_published("st_mem", leaves, {**tensors, "encoder.cls_embedding": np.zeros(16, np.float32)})
