"""The sizes of the vision encoders, under the field names of Hugging Face.

They come from `encoder.config`, from a checkpoint's `config.json`, or from both. Every field is accounted for by
name: one that is not known, or has a value that our encoders do not compute, is an error.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

from elm_jax.errors import UserError, nearest
from elm_jax.models.encoders.transformer import TransformerConfig
from elm_jax.models.layers import Activation
from elm_jax.schema import key, sizes_of

WHERE = "encoder.config"
TOWERS = ("vision_config", "vision_config_dict")  # the fields inside which a file describes its vision tower
HIDDEN_ACTS: Mapping[str, Activation] = {  # Hugging Face's name -> ours
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
# Fields with the values for which the encoders are right; a file may leave any of them out.
ONLY: Mapping[str, tuple[Any, ...]] = {
    "num_channels": (3,),
    "attention_dropout": (0.0,),
    "dropout": (0.0,),
    "hidden_dropout_prob": (0.0,),
    "attention_probs_dropout_prob": (0.0,),
    "vision_use_head": (True,),
    "pruned_heads": ({}, None),
    "drop_path_rate": (0.0,),
    "chunk_size_feed_forward": (0,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
}
# Fields that say nothing about an image's embedding: of the text tower, the losses, the initial weights, and
# those which Hugging Face used to write for generation into every file.
IRRELEVANT = frozenset({
    "model_type", "architectures", "transformers_version", "_name_or_path", "_from_model_config", "_commit_hash",
    "num_labels", "_attn_implementation_autoset", "dtype", "torch_dtype", "return_dict", "output_attentions",
    "output_hidden_states", "problem_type", "id2label", "label2id", "is_encoder_decoder", "text_config",
    "text_config_dict", "logit_scale_init_value", "initializer_factor", "initializer_range", "encoder_stride",
    "pooler_act", "pooler_output_size", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "decoder_start_token_id", "bad_words_ids", "cross_attention_hidden_size", "diversity_penalty", "do_sample",
    "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "length_penalty", "max_length",
    "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores",
    "prefix", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens",
    "begin_suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torchscript", "typical_p", "use_bfloat16",
    "use_cache",
})  # fmt: skip
OF_THE_PROCESSOR = frozenset({"image_size", "max_num_patches"})  # where images have no size of their own


_size = partial(key, meaning="a size", limit="from 1 to 100000")
_activation = partial(key, meaning="the activation inside an MLP", choices=tuple(HIDDEN_ACTS))
_eps = partial(key, meaning="of the norms", limit="above 0")


@dataclass(frozen=True)
class VisionConfig:
    """What the encoders have in common: a transformer of width D."""

    hidden_size: int = _size(768)
    num_hidden_layers: int = _size(12)
    num_attention_heads: int = _size(12, divides="hidden_size")
    intermediate_size: int = _size(3072)
    hidden_act: str = _activation("gelu")
    layer_norm_eps: float = _eps(1e-6)

    model_types: ClassVar[tuple[str, ...]] = ()  # of Hugging Face
    ignored: ClassVar[frozenset[str]] = frozenset()  # further fields that do not matter
    ignored_in_tower: ClassVar[frozenset[str]] = frozenset()  # those of `vision_config` that do not

    @classmethod
    def from_fields(cls, config: Mapping[str, Any]) -> Self:
        """Read `encoder.config`: fields of ours, a whole `config.json`, or one with fields of ours over it.

        Raises UserError for an unknown field or value, and for sizes that do not fit each other.
        """
        _check_model_type(config, cls.model_types)
        tower = {name: value for name, value in _tower(config).items() if name not in cls.ignored_in_tower}
        _check_model_type(tower, cls.model_types)
        values = {**cls.omitted(config), **tower, **{n: v for n, v in config.items() if n not in TOWERS}}
        for name, allowed in ONLY.items():
            if name in values and values[name] not in allowed:
                expected = " or ".join(map(str, allowed))
                raise UserError(f"{WHERE}.{name}", repr(values[name]), expected, "this variant is not supported")
        return cls(**sizes_of(cls, WHERE, values, {*ONLY, *IRRELEVANT, *cls.ignored}))

    @classmethod
    def omitted(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values that `config` means where it does not name them, other than our defaults."""
        return {}

    def transformer(self, qkv_bias: bool = True) -> TransformerConfig:
        """The sizes of the blocks."""
        return TransformerConfig(
            self.hidden_size, self.num_hidden_layers, self.num_attention_heads, self.intermediate_size,
            activation=HIDDEN_ACTS[self.hidden_act], norm_eps=self.layer_norm_eps, qkv_bias=qkv_bias,
        )  # fmt: skip


@dataclass(frozen=True)
class ImageConfig(VisionConfig):
    """An encoder of square images, `image_size` pixels wide, in patches of `patch_size`."""

    image_size: int = _size(224)
    patch_size: int = _size(16, divides="image_size")

    @property
    def edge(self) -> int:
        """Pixels of an image that is read."""
        return self.image_size

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class ClipConfig(ImageConfig):
    """Defaults: openai/clip-vit-base-patch32. projection_dim is the width of the embedding."""

    hidden_act: str = _activation("quick_gelu")
    layer_norm_eps: float = _eps(1e-5)
    patch_size: int = _size(32, divides="image_size")
    projection_dim: int = _size(512)

    model_types = ("clip", "clip_vision_model")


@dataclass(frozen=True)
class VitConfig(ImageConfig):
    """Defaults: google/vit-base-patch16-224-in21k.

    mask_ratio: the probability with which a patch is replaced by the mask token (see `vision.Vit`).
    """

    layer_norm_eps: float = _eps(1e-12)
    qkv_bias: bool = key(True, "whether queries, keys and values have a bias")
    mask_ratio: float = key(0.0, "part of the patches that is masked", limit="from 0 to 1")

    model_types = ("vit",)


@dataclass(frozen=True)
class Dinov2Config(ImageConfig):
    """Defaults: facebook/dinov2-base. image_size is that which the table of positions is for; `resolution` pixels have
    the images that are read, as its processor crops them, and the table is resized to their patches.
    """

    image_size: int = _size(518)
    patch_size: int = _size(14)
    resolution: int = _size(224)
    mlp_ratio: int = _size(4)
    qkv_bias: bool = key(True, "whether queries, keys and values have a bias")
    use_swiglu_ffn: bool = key(False, "whether the MLPs are gated, as in the giant model")

    intermediate_size: ClassVar[int]  # which follows from mlp_ratio
    model_types = ("dinov2",)
    ignored = frozenset({
        "layerscale_value", "out_features", "out_indices", "stage_names", "apply_layernorm", "reshape_hidden_states",
        "use_mask_token",
    })  # fmt: skip

    @classmethod
    def omitted(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """A Hugging Face file that does not say an image_size means 224."""
        return {"image_size": 224} if "model_type" in config else {}

    @property
    def edge(self) -> int:
        return self.resolution

    def transformer(self, qkv_bias: bool = True) -> TransformerConfig:
        """The sizes of the blocks; a gated MLP has two thirds of the inner width, up to a multiple of 8."""
        inner = self.hidden_size * self.mlp_ratio
        return TransformerConfig(
            self.hidden_size, self.num_hidden_layers, self.num_attention_heads,
            (int(inner * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else inner,
            activation=HIDDEN_ACTS[self.hidden_act], norm_eps=self.layer_norm_eps, qkv_bias=self.qkv_bias,
            layer_scale=True, gated=self.use_swiglu_ffn,
        )  # fmt: skip


@dataclass(frozen=True)
class SiglipConfig(ImageConfig):
    """Defaults: google/siglip-base-patch16-224. Patches need not fill an image: of 384 pixels 27 of 14 are read."""

    hidden_act: str = _activation("gelu_pytorch_tanh")
    patch_size: int = _size(16)

    model_types = ("siglip", "siglip_vision_model")


@dataclass(frozen=True)
class Siglip2Config(VisionConfig):
    """Defaults: google/siglip2-so400m-patch16-naflex. num_patches is the size of the (square) position table."""

    hidden_size: int = _size(1152)
    num_hidden_layers: int = _size(27)
    num_attention_heads: int = _size(16, divides="hidden_size")
    intermediate_size: int = _size(4304)
    hidden_act: str = _activation("gelu_pytorch_tanh")
    patch_size: int = _size(16)
    num_patches: int = _size(256)

    model_types = ("siglip2", "siglip2_vision_model")
    ignored = OF_THE_PROCESSOR

    @classmethod
    def omitted(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """A Hugging Face file leaves out what is the default there: the sizes of the base model."""
        if "vision_config" not in config and "model_type" not in config:
            return {}
        return {name: getattr(SiglipEcgConfig, name) for name in BASE_SIZES}

    @property
    def grid(self) -> int:
        """Rows, and columns, of the position table."""
        return round(self.num_patches**0.5)

    @classmethod
    def from_fields(cls, config: Mapping[str, Any]) -> Self:
        found = super().from_fields(config)
        if found.grid**2 != found.num_patches:
            raise UserError(f"{WHERE}.num_patches", str(found.num_patches), "a square number", "correct it")
        return found


@dataclass(frozen=True)
class SiglipEcgConfig(VisionConfig):
    """Defaults: google/siglip2-base-patch16-naflex behind patches of `patch_size` samples of all leads.

    seq_len (L; also called segment_len) and num_leads (C) are those of the signals. A `vision_config` gives the
    sizes of the transformer only: its patches and positions are those of images.
    """

    hidden_act: str = _activation("gelu_pytorch_tanh")
    patch_size: int = _size(25, divides="seq_len")
    seq_len: int = _size(2500, limit="from 1 to 10000000")
    num_leads: int = _size(12)
    min_max: bool = key(False, "whether the model itself scales each ECG to [0, 1], whatever the data are scaled to")

    model_types = ("siglip2", "siglip2_vision_model")
    ignored = frozenset({"num_encoder_tokens"})  # ours is the argument `tokens`
    ignored_in_tower = OF_THE_PROCESSOR | {"patch_size", "num_patches", "vision_use_head"}

    @classmethod
    def from_fields(cls, config: Mapping[str, Any]) -> Self:
        """As for the others; `segment_len` is another name of `seq_len`."""
        named = {"seq_len" if name == "segment_len" else name: value for name, value in config.items()}
        return super().from_fields(named)

    @property
    def patches(self) -> int:
        """Patches of a signal."""
        return self.seq_len // self.patch_size


@dataclass(frozen=True)
class OrahConfig(SiglipEcgConfig):
    """The encoder of Orah, the reference's model of August 2026: SigLIP-ECG that scales ECGs itself."""

    min_max: bool = key(True, "whether the model itself scales each ECG to [0, 1], whatever the data are scaled to")


BASE_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def tower_of_file(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` as fields of `SiglipEcgConfig`: a bare vision config, too, is one of images."""
    bare = fields.get("model_type") == "siglip2_vision_model"
    return {"vision_config": dict(fields)} if bare else dict(fields)


def orah_of_file(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` as fields of `OrahConfig`: of a whole Orah what it says of its encoder."""
    if fields.get("model_type") != "orah":
        return tower_of_file(fields)
    return {name: fields[name] for name in ("vision_config", "patch_size") if name in fields}


def _tower(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a `config.json` says of its vision tower; old ones say some of it twice."""
    towers = [config.get(name) or {} for name in TOWERS]
    for name, tower in zip(TOWERS, towers, strict=True):
        if not isinstance(tower, Mapping):
            raise UserError(f"{WHERE}.{name}", repr(tower), "an object with fields", "correct config.json")
    usual, old = towers
    for name in old:
        if usual.get(name, old[name]) != old[name]:
            found = f"{old[name]!r} in {TOWERS[1]} and {usual[name]!r} in {TOWERS[0]}"
            raise UserError(f"{WHERE}.{name}", found, "one value", "correct config.json")
    return {**old, **usual}


def _check_model_type(config: Mapping[str, Any], allowed: Collection[str]) -> None:
    model_type = config.get("model_type", "")
    if model_type and model_type not in allowed:
        fix = nearest(str(model_type), allowed) or "choose the encoder.name that fits the checkpoint"
        raise UserError(f"{WHERE}.model_type", repr(model_type), " or ".join(allowed), fix)
