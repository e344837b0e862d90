"""Encoders by name, built for training; `weights.encoders` reads and writes them under their published names.

An encoder maps (B, C, L) signals to (B, N, D) float32 embeddings; `width` is D and `tokens` is N. Its arrays
have two names, ours (`layer1.0.conv1.kernel`) and the published one (`resnet.layer1.0.conv1.weight`); each
encoder's module holds the one table between them. All else that is said of an encoder stands in its row of ENCODERS.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax import compat as behaviours
from elm_jax.ecg.images import CLIP, DINOV2, SIGLIP, SIGLIP2, VIT, Processing
from elm_jax.errors import UserError
from elm_jax.models.encoders import (
    any_leads,
    checkpoints,
    clip_patches,
    dinov2,
    dit,
    ecg_coca,
    mae,
    mae_pretraining,
    merl,
    merl_pretraining,
    merl_vit,
    mixer,
    next_token,
    pairs,
    sequence,
    siglip,
    signal2vec,
    vision,
    vision_pretraining,
)
from elm_jax.models.encoders import vision_config as sizes
from elm_jax.models.encoders.text_tower import Paired, with_text
from elm_jax.models.names import Rule, bare_name
from elm_jax.registry import Registry


class Encoder(Protocol):
    """What the rest of the program knows of an encoder; all are nnx.Modules."""

    width: int
    tokens: int

    def __call__(self, signals: Any, weights: jax.Array | None = None, train: bool = False) -> jax.Array: ...


@dataclass(frozen=True)
class Pooled:
    """The positions that an encoder pools to its tokens, in their order, as sections of a line of samples.

    The line is the time, L, of all leads at once; `by_lead`: the leads one after the other, C·L. edges: from the
    encoder's config and the line's length, where each position begins and, at last, where the last one ends. CLS has
    no length.
    """

    edges: Callable[[Any, int], Sequence[int]]
    by_lead: bool = False


@dataclass(frozen=True)
class Kind:
    """All that is said of an encoder.

    config: how its own config is read, from `encoder.config` with num_leads and seq_len where it reads signals.
    module: its class, built as `build_encoder` does. weight_rule: the published name of an array of ours (by default
    the same, as it is). published_name: a name as `published` gives it -> that of the table, None for what is no part
    of the encoder.
    alias: (a prefix, another); checkpoints hold the weights of the second under the first as well.
    absent: from the names in a checkpoint, the published names that it may lack: these are drawn anew.
    unused: published names of what no embedding depends on: in another shape, a checkpoint's are left out as well.
    compat: the reference's behaviours (`elm_jax.compat`), and the config fields that bring them about.
    file_config: from a Hugging Face `config.json` to fields of `config`; None: its checkpoints have none.
    releases: the forms in which its authors release it under other names than the reference: how a name begins that
        only this form has, and what its names have in place of what the published ones have.
    wrapper: what the reference's own module around it puts before its names.
    sign: by which tensor a checkpoint is known to be of this encoder and none of those before it; None: it is not.
    sizes: what the shapes of a checkpoint say of the configuration.
    pooled: which part of an ECG its tokens stand for; None: each for all of it.
    some_leads: whether it reads signals with any of the leads, and any length up to the data's, as a dict of arrays
        that says which and how many (`ecg.recording.in_slots`).
    processing: how it wants its images; None: it reads signals, or the ids of ECG-Byte where `symbols` says so.
    images: what of that its own config changes, which then has the size of the images as `page`.
    pretraining: the encoder with all that its own pretraining trains, which `kind_of` finds as "NAME.pretraining".
    text: the text tower that this trains it against. Its config has the tower's fields as `text`.
    """

    config: Callable[[Mapping[str, Any]], Any]
    module: Callable[..., Encoder]
    weight_rule: Callable[[str], Rule] = lambda name: Rule(name, name)
    published_name: Callable[[str], str | None] = bare_name
    alias: tuple[str, str] | None = None
    absent: Callable[[Collection[str]], Collection[str]] = lambda names: ()
    unused: tuple[str, ...] = ()
    compat: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    file_config: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    releases: tuple[tuple[str, str, str], ...] = ()
    wrapper: str = ""
    sign: checkpoints.Sign | None = None
    sizes: Callable[[checkpoints.Tensors], checkpoints.Told] = lambda tensors: {}
    pooled: Pooled | None = None
    some_leads: bool = False
    processing: Processing | None = None
    images: Callable[[Any, Processing], Processing] | None = None
    symbols: bool = False
    pretraining: Kind | None = None
    text: Paired | None = None

    @property
    def reads(self) -> str:
        """"images", "symbols" or "signals"."""
        return "images" if self.processing else "symbols" if self.symbols else "signals"

    def aliases(self, names: Iterable[str]) -> dict[str, str]:
        """The second name -> the first, of those published names that have two."""
        if self.alias is None:
            return {}
        second, first = self.alias
        return {second + name.removeprefix(first): name for name in names if name.startswith(first)}

    def published(self, names: Iterable[str]) -> dict[str, str]:
        """The names of a checkpoint's tensors -> the published ones, whichever release it is of."""
        bare = {name: bare_name(name) for name in names}
        for mark, theirs, ours in self.releases:
            if any(own.startswith(mark) for own in bare.values()):
                return {n: ours + o.removeprefix(theirs) if o.startswith(theirs) else o for n, o in bare.items()}
        return bare

    def image_processing(self, fields: Mapping[str, Any], compat: Iterable[str]) -> Processing | None:
        """How an encoder whose own config has these fields wants its images; None where it reads signals."""
        usual, sizes = self.processing, self.config(fields)
        if usual is None:
            return None
        if self.images is not None:
            return self.images(sizes, usual)
        if usual.patch is not None:
            return replace(usual, patch=sizes.patch_size)
        edge = sizes.edge
        if not behaviours.enabled("clip_centre_crop", compat):  # which would cut off the outer leads
            usual = usual.whole()
        shortest = usual.shortest_edge and usual.size and edge * usual.shortest_edge // usual.size[0]
        return replace(usual, size=(edge, edge), shortest_edge=shortest)


PRETRAINING = ".pretraining"


def _masked(name: str, module: Callable[..., Encoder]) -> Kind:
    """A masked autoencoder with its decoder."""
    compat = {"st_mem_train_positions": {"train_positions": True}} if name == "st_mem" else {}
    return Kind(
        partial(mae.MaeConfig.from_fields, name), module, mae.weight_rule, bare_name, mae.ALIAS, compat=compat
    )


def _sequence(module: Callable[..., Encoder], names: Mapping[str, str], attention: str, pooled: Pooled) -> Kind:
    """An encoder that holds what its pretraining trains."""
    rule = partial(sequence.weight_rule, names=names, attention=attention)
    return _pretrained(Kind(sequence.SequenceConfig.from_fields, module, rule, pooled=pooled))


def _pretrained(kind: Kind) -> Kind:
    """An encoder that holds all that its pretraining trains."""
    return replace(kind, pretraining=kind)


# MERL's trainer saves `ecg_encoder` alone, or the whole model around it.
_MERL_RELEASES = (("conv1.weight", "", "resnet."), ("ecg_encoder.", "ecg_encoder.", "resnet."))
# Its strides make 16: position k is made of samples on both sides of 16 k, and stands for those next to it.
_MERL_POOLED = Pooled(lambda config, length: (0, *range(8, length - 8, 16), length))
_PATCHES = Pooled(lambda config, length: range(0, length + 1, config.patch_size))
_IN_MODULE = "vision_encoder."  # the reference's module around a model of Hugging Face
_BARE = (("pos_embedding", "", "encoder."),)  # a masked autoencoder's encoder without what is around it
ENCODERS: Registry[Kind] = Registry("encoder.name", {
    "merl": Kind(
        merl.MerlConfig.from_fields, merl.Merl, merl.weight_rule, merl.published_name,
        releases=_MERL_RELEASES,
        sign=checkpoints.begins("resnet.conv1.", without=any_leads.EMBEDDING), sizes=checkpoints.merl_sizes,
        pooled=_MERL_POOLED,
        pretraining=Kind(
            with_text(merl_pretraining.PretrainedMerlConfig.from_fields), merl_pretraining.PretrainedMerl,
            merl_pretraining.weight_rule, merl_pretraining.published_name, releases=_MERL_RELEASES,
            text=merl_pretraining.PAIRED,
        ),
    ),
    "resnet18_any": Kind(
        any_leads.AnyLeadsConfig.from_fields, any_leads.AnyLeads, any_leads.weight_rule, merl.published_name,
        absent=any_leads.absent, releases=_MERL_RELEASES, some_leads=True,
        sign=checkpoints.has(any_leads.EMBEDDING), sizes=checkpoints.merl_sizes, pooled=_MERL_POOLED,
    ),
    "merl_vit": Kind(
        merl_vit.MerlVitConfig.from_fields, merl_vit.MerlVit, merl_vit.weight_rule, merl_vit.published_name,
        sign=checkpoints.begins("to_patch_embedding.weight"), sizes=checkpoints.merl_vit_sizes,
        pooled=_PATCHES,
    ),
    "st_mem": Kind(
        partial(mae.MaeConfig.from_fields, "st_mem"), mae.StMem, mae.weight_rule, mae.st_mem_published_name,
        compat={"st_mem_train_positions": {"train_positions": True}}, releases=_BARE,
        sign=checkpoints.begins("encoder.sep_embedding"), sizes=partial(checkpoints.mae_sizes, "st_mem"),
        pooled=Pooled(lambda config, length: range(0, length + 1, config.patch_size), by_lead=True),
        pretraining=_masked("st_mem", mae_pretraining.MaskedStMem),
    ),
    "mtae": Kind(
        partial(mae.MaeConfig.from_fields, "mtae"), mae.MaskedAutoencoder, mae.weight_rule, bare_name, mae.ALIAS,
        releases=_BARE, sign=checkpoints.is_mtae, sizes=partial(checkpoints.mae_sizes, "mtae"),
        pooled=Pooled(lambda config, length: (0, *range(0, length + 1, config.patch_size))),
        pretraining=_masked("mtae", mae_pretraining.MaskedTime),
    ),
    "mlae": Kind(
        partial(mae.MaeConfig.from_fields, "mlae"), mae.MaskedAutoencoder, mae.weight_rule, bare_name, mae.ALIAS,
        releases=_BARE, sign=checkpoints.is_mlae, sizes=partial(checkpoints.mae_sizes, "mlae"), unused=mae.HEAD,
        pooled=Pooled(
            lambda config, length: (0, *range(0, length + 1, config.patch_size * config.seq_len)), by_lead=True
        ),
        pretraining=_masked("mlae", mae_pretraining.MaskedTime),
    ),
    "mae_vit": _sequence(
        sequence.MaeVit, sequence.MAE_VIT_NAMES, "attn",
        Pooled(lambda config, length: range(0, length + 1, config.seq_len), by_lead=True),
    ),
    "nepa": _sequence(
        sequence.Nepa, sequence.NEPA_NAMES, "self_attn", Pooled(lambda config, length: range(length + 1))
    ),
    "next_token": _pretrained(Kind(
        next_token.NextTokenConfig.from_fields, next_token.NextToken,
        partial(sequence.weight_rule, names=next_token.NEXT_TOKEN_NAMES, attention="self_attn"), symbols=True,
    )),
    "signal2vec": Kind(
        signal2vec.Signal2VecConfig.from_fields, signal2vec.Signal2Vec, published_name=signal2vec.published_name,
        symbols=True, pretraining=Kind(signal2vec.Signal2VecConfig.from_fields, signal2vec.SkipGram, symbols=True),
    ),
    "mlp_mixer": Kind(
        mixer.MixerConfig.from_fields, mixer.MlpMixer, mixer.mixer_rule, mixer.mixer_name, wrapper=_IN_MODULE,
        processing=VIT,
    ),
    "dit": _pretrained(Kind(
        dit.DitConfig.from_fields, dit.Dit, dit.weight_rule, pooled=Pooled(lambda config, length: range(length + 1)),
    )),
    "dit_text": Kind(
        dit.DitConfig.of_text, dit.Dit, dit.weight_rule, dit.without_text,
        pooled=Pooled(lambda config, length: range(length + 1)),
        pretraining=Kind(with_text(dit.DitConfig.of_text), dit.DitText, dit.weight_rule, text=dit.PAIRED),
    ),
    "clip": Kind(
        sizes.ClipConfig.from_fields, vision.Clip, vision.clip_rule, vision.clip_name, file_config=dict,
        wrapper=_IN_MODULE, sign=checkpoints.begins("visual_projection."), processing=CLIP,
        pretraining=Kind(
            with_text(sizes.ClipConfig.from_fields), pairs.PairedClip, pairs.paired_clip_rule, pairs.paired_name,
            wrapper=_IN_MODULE, text=pairs.CLIP_PAIR,
        ),
    ),
    "dinov2": Kind(
        sizes.Dinov2Config.from_fields, dinov2.Dinov2, dinov2.dinov2_rule, dinov2.dinov2_name, absent=dinov2.absent,
        file_config=dict, wrapper=_IN_MODULE, sign=checkpoints.begins("encoder.layer.0.layer_scale1."),
        processing=DINOV2,
    ),
    "clip_patches": Kind(
        clip_patches.ClipPatchesConfig.from_fields, clip_patches.ClipPatches, clip_patches.weight_rule,
        clip_patches.published_name, file_config=dict, releases=clip_patches.RELEASES, wrapper=_IN_MODULE,
        sign=checkpoints.begins("vision_model.pre_layrnorm."), processing=CLIP,
        images=clip_patches.ClipPatchesConfig.images,
    ),
    "vit": Kind(
        sizes.VitConfig.from_fields, vision.Vit, vision.vit_rule, vision.vit_name, absent=vision.vit_absent,
        compat={"vit_random_mask": {"mask_ratio": 0.75}}, file_config=dict, wrapper=_IN_MODULE,
        sign=checkpoints.begins("vit.embeddings.", "embeddings.patch_embeddings."), processing=VIT,
        pretraining=Kind(
            sizes.VitConfig.from_fields, vision_pretraining.MaskedVit, vision_pretraining.masked_vit_rule,
            vision_pretraining.masked_vit_name, absent=vision_pretraining.masked_vit_absent, file_config=dict,
            wrapper=_IN_MODULE,
        ),
    ),
    "siglip": Kind(
        sizes.SiglipConfig.from_fields, siglip.Siglip, siglip.siglip2_rule, siglip.siglip2_name, file_config=dict,
        wrapper=_IN_MODULE, sign=checkpoints.is_siglip, processing=SIGLIP,
    ),
    "siglip2": Kind(
        sizes.Siglip2Config.from_fields, siglip.Siglip2, siglip.siglip2_rule, siglip.siglip2_name, file_config=dict,
        wrapper=_IN_MODULE, sign=checkpoints.begins("vision_model.head."), processing=SIGLIP2,
        pretraining=Kind(
            with_text(sizes.Siglip2Config.from_fields), pairs.PairedSiglip2, pairs.paired_siglip2_rule,
            pairs.paired_name, wrapper=_IN_MODULE, text=pairs.SIGLIP_PAIR,
        ),
    ),
    "siglip_ecg": Kind(
        sizes.SiglipEcgConfig.from_fields, siglip.SiglipEcg, siglip.siglip_ecg_rule, siglip.siglip_ecg_name,
        absent=siglip.siglip_ecg_absent, file_config=sizes.tower_of_file, releases=siglip.NEWER,
        sign=checkpoints.begins("vision_model.", f"{siglip.PREFIX}vision_model."),
        pooled=_PATCHES,
        pretraining=Kind(
            with_text(sizes.SiglipEcgConfig.from_fields), pairs.PairedSiglipEcg, pairs.paired_siglip_ecg_rule,
            pairs.paired_siglip_ecg_name, absent=siglip.siglip_ecg_absent, releases=siglip.NEWER,
            text=pairs.SIGLIP_ECG_PAIR,
        ),
    ),
    "orah": Kind(
        sizes.OrahConfig.from_fields, siglip.SiglipEcg, siglip.siglip_ecg_rule, siglip.orah_name,
        absent=siglip.siglip_ecg_absent, file_config=sizes.orah_of_file, releases=siglip.NEWER,
        pooled=_PATCHES,
    ),
    "ecg_coca": Kind(
        ecg_coca.EcgCocaConfig.from_fields, ecg_coca.EcgCoca, ecg_coca.weight_rule, ecg_coca.published_name,
        releases=ecg_coca.GEM, sign=checkpoints.begins("ecg.class_embedding"),
        pooled=Pooled(lambda config, length: (0, *range(0, length + 1, config.patch_size))),
        pretraining=Kind(
            with_text(ecg_coca.EcgCocaConfig.from_fields), ecg_coca.PairedEcgCoca, ecg_coca.weight_rule,
            ecg_coca.paired_name, compat={"coca_sees_answers": {"sees_answers": True}}, text=ecg_coca.PAIRED,
        ),
    ),
})  # fmt: skip


def register_encoder(name: str, kind: Kind) -> None:
    """Let `encoder.name` be one more.

    Raises:
        UserError: the name is no identifier, or one of the package's encoders.
    """
    ENCODERS.register(name, kind)


def build_encoder(
    name: str,
    config: Mapping[str, Any],
    tokens: int,
    rngs: nnx.Rngs,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    compat: Iterable[str] = (),
) -> Encoder:
    """A freshly initialised encoder, computed in `dtype`; works under jit and eval_shape.

    `config` has the fields of the encoder's own config. UserError for an unknown name, field or value.
    """
    kind = kind_of(name)
    for behaviour, changed in kind.compat.items():
        if behaviours.enabled(behaviour, compat):
            config = {**config, **changed}
    if tokens < 1:
        raise UserError("encoder.tokens", str(tokens), "at least 1", "set it to the signal tokens per ECG")
    return kind.module(kind.config(config), tokens, rngs=rngs, dtype=dtype, param_dtype=param_dtype)


def kind_of(name: str) -> Kind:
    """The registry's entry of `encoder.name`, or of one with ".pretraining" behind it.

    Raises:
        UserError: there is none, or it has no pretraining of its own.
    """
    name, of_pretraining, _ = str(name).partition(PRETRAINING)
    plain = str(name).rpartition("/")[2].replace("-", "_").casefold()
    family = max((known for known in ENCODERS if plain.startswith(f"{known}_")), key=len, default="")
    weights = f"set encoder.name={family}, and encoder.checkpoint to its weights: a file, a folder or a hub's id"
    kind = ENCODERS.find(name, weights if family else "")
    if not of_pretraining:
        return kind
    if kind.pretraining is None:
        known = [known for known, row in ENCODERS.items() if row.pretraining is not None]
        raise UserError("encoder.name", name, f"one that is pretrained by itself: {', '.join(known)}", "choose one")
    return kind.pretraining
