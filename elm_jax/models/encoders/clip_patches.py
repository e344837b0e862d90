"""CLIP's patches as they are before its last blocks: what LLaVA, and PULSE and GEM after it, read of an image, or of
tiles of it (`ecg.tiles`).

Source: LLaVA 1.5 and 1.6 (`clip_encoder.py`, `llava_arch.py`).
Flow: (B, H, W, 3) image, or (B, n, S, S, 3) tiles -> (B n, 1 + P, D) patches -> the blocks that are read -> (B, N, D).
Dimension letters: B images, n tiles of one, S pixels a side of a tile, P patches of a tile, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from elm_jax.ecg.images import CLIP, Processing
from elm_jax.ecg.tiles import MERGES, NEWLINE, count, order
from elm_jax.errors import UserError
from elm_jax.models.encoders.transformer import Transformer
from elm_jax.models.encoders.vision import PatchEmbedding, clip_name, clip_rule, named_inputs, normal, read_images
from elm_jax.models.encoders.vision_config import BASE_SIZES, WHERE, ClipConfig, _activation, _size
from elm_jax.models.layers import LayerNorm, hold, plus, repeated
from elm_jax.models.names import Rule
from elm_jax.schema import key

MOST = 16  # columns or rows of tiles
FITS = ("whole", "crop", "pad", "anyres")
# In a LLaVA checkpoint, as older and newer versions of Transformers write it.
RELEASES = (
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.vision_tower.", ""),
    ("model.vision_tower.vision_tower.", "model.vision_tower.vision_tower.", "vision_model."),
    ("embeddings.class_embedding", "", "vision_model."),
)
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # LLaVA's
_OTHERS = ("visual_projection.", "model.", "lm_head.")  # of CLIP, and of a LLaVA checkpoint
_BEHIND = "behind_"  # and the number of the first of the blocks that are not read


@dataclass(frozen=True)
class ClipPatchesConfig(ClipConfig):
    """Defaults: openai/clip-vit-large-patch14-336, as LLaVA reads it.

    layer: which hidden states: 0 is what enters the blocks, -1 what leaves the last one, -2 the one before.
    class_token: whether its place is read, too. fit: how an image becomes square: stretched; its shorter edge fitted
    and the middle cut out; on a square of the mean colour; or in tiles. grids: (columns, rows) that tiles may make;
    merge: the order of their patches (`ecg.tiles`). page: (height, width) of the images before that, to which others
    are brought.
    """

    hidden_size: int = _size(1024)
    num_hidden_layers: int = _size(24)
    num_attention_heads: int = _size(16, divides="hidden_size")
    intermediate_size: int = _size(4096)
    image_size: int = _size(336)
    patch_size: int = _size(14, divides="image_size")
    hidden_act: str = _activation("quick_gelu")
    layer: int = key(-2, "which hidden states are read")
    class_token: bool = key(False, "whether the class token is among them")
    fit: str = key("whole", "how an image becomes square", choices=FITS)
    grids: tuple[tuple[int, ...], ...] = key(GRIDS, "columns and rows that tiles may make")
    merge: str = key("flat", "in which order patches of tiles are read", choices=MERGES)
    page: tuple[int, ...] = key((336, 336), "height and width of an image", limit="from 1 to 100000")

    @classmethod
    def omitted(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """A Hugging Face file leaves out what is the default there: the sizes of the base model."""
        if "vision_config" not in config and "model_type" not in config:
            return {}
        return {name: getattr(ClipConfig, name) for name in (*BASE_SIZES, "image_size", "patch_size")}

    @classmethod
    def from_fields(cls, config: Mapping[str, Any]) -> "ClipPatchesConfig":
        found = super().from_fields(config)
        if not 1 <= found.read <= found.num_hidden_layers:
            expected = f"a block: 1 to {found.num_hidden_layers}, or counted from the last, -1"
            raise UserError(f"{WHERE}.layer", str(found.layer), expected, "choose one that there is")
        if not found.grids or not all(len(grid) == 2 and min(grid) > 0 and max(grid) <= MOST for grid in found.grids):
            expected = f"pairs of columns and rows, from 1 to {MOST}"
            raise UserError(f"{WHERE}.grids", str(found.grids), expected, "correct them")
        if len(found.page) != 2:
            raise UserError(f"{WHERE}.page", str(found.page), "a height and a width", "leave it out")
        if found.class_token and (found.fit == "anyres" or found.merge == "spatial_unpad"):
            raise UserError(f"{WHERE}.class_token", "True", "false with tiles or newlines", "leave it out")
        return found

    @property
    def read(self) -> int:
        """How many blocks are."""
        return self.layer if self.layer >= 0 else self.num_hidden_layers + 1 + self.layer

    @property
    def order(self) -> np.ndarray:
        """(N,): the numbers of the patches of an image among those of its tiles, `NEWLINE` for a newline."""
        if self.fit == "anyres":
            side = self.image_size // self.patch_size
            return order((self.page[0], self.page[1]), self.image_size, self.sizes, side, self.merge)
        own = np.arange(self.patches + self.class_token)
        return np.append(own, NEWLINE) if self.merge == "spatial_unpad" else own

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of the grids, in pixels."""
        return [(rows * self.image_size, columns * self.image_size) for columns, rows in self.grids]

    def images(self, usual: Processing) -> Processing:
        """How it wants its images."""
        size, edge = (self.image_size, self.image_size), self.image_size
        cut = replace(usual, size=size, shortest_edge=edge if self.fit in ("crop", "pad") else None)
        grids = tuple(self.sizes) if self.fit == "anyres" else ()
        return replace(cut, padded=self.fit == "pad", grids=grids, page=(self.page[0], self.page[1]))


class ClipPatches(nnx.Module):
    """CLIP's vision tower up to a block. Those behind it, and the last norm, are held. `width` is D.

    newlines: (N,) bool, the places that are none of a patch, if there are such: what stands there is the connector's.
    """

    def __init__(
        self, config: ClipPatchesConfig, tokens: int = 1, *, rngs: nnx.Rngs, dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ) -> None:  # fmt: skip
        self.config, self.width, self.dtype = config, config.hidden_size, jnp.dtype(dtype)
        self.tokens, self.newlines = len(config.order), tuple((config.order == NEWLINE).tolist())
        if tokens != self.tokens:
            expected = f"{self.tokens}, the patches of an image as encoder.config says"
            raise UserError("encoder.tokens", str(tokens), expected, f"set it to {self.tokens}")
        self.patches = PatchEmbedding(config.patch_size, self.width, False, rngs, param_dtype)
        self.cls = nnx.Param(normal(rngs, (self.width,), 0.02, param_dtype), axes=(None,))
        positions = normal(rngs, (config.patches + 1, self.width), 0.02, param_dtype)
        self.positions = nnx.Param(positions, axes=(None, "signal"))
        self.pre_norm = LayerNorm(self.width, config.layer_norm_eps, param_dtype)
        blocks = config.transformer()
        self.transformer = Transformer(replace(blocks, depth=config.read), rngs, param_dtype)
        self.post_norm = LayerNorm(self.width, config.layer_norm_eps)
        hold(self.post_norm)
        if rest := config.num_hidden_layers - config.read:
            behind = Transformer(replace(blocks, depth=rest), rngs)
            for _, module in nnx.iter_modules(behind):
                hold(module)
            setattr(self, f"{_BEHIND}{config.read}", behind)

    def __call__(self, signals: Any, weights: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Images -> (B, N, D) float32, computed in `dtype`; zeros at newlines. `weights` and `train` change nothing.

        signals: as for `Clip`; with tiles they are (B, n, S, S, 3), or floats (B, n, 3, S, S). Raises UserError for
            images of another size, or of other tiles.
        """
        (images,) = named_inputs(signals, ("pixel_values",), {}).values()
        config = self.config
        if config.fit == "anyres":
            expected = count((config.page[0], config.page[1]), config.image_size, config.sizes)
            if images.ndim != 5 or images.shape[1] != expected:
                fix = "give images of encoder.config.page in tiles"
                raise UserError("encoder input", f"shape {images.shape}", f"(batch, {expected} tiles, ...)", fix)
        flat = images.reshape(-1, *images.shape[-3:])
        x = self.patches(read_images(flat, CLIP, config).astype(self.dtype))
        cls = repeated(self.cls, (x.shape[0], 1, x.shape[2]), x.dtype)
        x = self.transformer(self.pre_norm(plus(jnp.concatenate([cls, x], axis=1), self.positions)))
        x = x if config.class_token else x[:, 1:]
        x = x.reshape(len(images), -1, self.width).astype(jnp.float32)
        if config.fit != "anyres" and not any(self.newlines):
            return x
        chosen = x[:, np.maximum(config.order, 0)]
        return jnp.where(np.array(self.newlines)[:, None], 0.0, chosen)


def weight_rule(name: str) -> Rule:
    """The rule of our array `name`: of CLIP's, with the blocks that are read apart from those behind them."""
    part, _, inside = name.partition(".")
    if not part.startswith(_BEHIND):
        return clip_rule(name)
    return replace(clip_rule(f"transformer.{inside}"), ours=name, first=int(part.removeprefix(_BEHIND)))


def published_name(name: str) -> str | None:
    """A checkpoint's key as CLIP's table has it; None for what stands behind its vision tower, and its texts."""
    name = clip_name(name) or ""
    return None if not name or name.startswith(_OTHERS) else name
