"""What `data.*` says of signals, and of the images that they become."""

from elm_jax import compat as behaviours
from elm_jax.config import Config, DataConfig
from elm_jax.data.ecg_tokens import EcgTokens
from elm_jax.data.pages import Paper
from elm_jax.data.represent import SignalSpec
from elm_jax.data.shown import Views
from elm_jax.ecg.images import Processing
from elm_jax.ecg.rasterize import DPI, REFERENCE_DPI
from elm_jax.ecg.recording import LEADS


def signal_spec(
    data: DataConfig, seed: int, processing: Processing | None = None, tokens: EcgTokens | None = None,
    compat: tuple[str, ...] = (),
) -> SignalSpec:  # fmt: skip
    """What `data.*` says of the signals; the images of an encoder need its `processing`, symbols their `tokens`."""
    return SignalSpec(
        root=data.root,
        outside_root=data.outside_root,
        prefixes=data.prefixes,
        leads=tuple(LEADS.index(lead) if isinstance(lead, str) else lead for lead in data.leads),
        length=data.segment_len,
        sampling_rate=data.sampling_rate,
        norm_eps=data.norm_eps,
        normalize="minmax" if data.normalize == "instance_minmax" else data.normalize,
        perturb=data.perturb,
        seed=seed,
        representation=data.representation,
        processing=processing,
        tokens=tokens,
        augment_ecg=data.augment_ecg,
        augment_rgb=data.augment_rgb,
        dpi=REFERENCE_DPI if behaviours.enabled("rgb_250_dpi", compat) else DPI,
        compat=compat,
        paper=Paper(data.image_layout, data.image_rhythm, data.augment_paper, data.images),
    )


def views_of(config: Config) -> Views:
    """What a configuration says of the views of an ECG."""
    data, places = config.data, {v: each.tokens or config.encoder_of(v).tokens for v, each in config.slots.items()}
    return Views(places, data.left_out, data.missing, data.drop_views, data.swap_views)


def page_size(data: DataConfig, representation: str, compat: tuple[str, ...]) -> tuple[int, int]:
    """(H, W) of the images that an ECG becomes. Raises UserError where its leads fill no page."""
    spec = signal_spec(data, 0, compat=compat)
    if representation != "rgb":
        return spec.shape
    return spec.paper.size(spec.names, spec.length / spec.sampling_rate, spec.dpi)
