"""Whether an encoder, a representation and what else a configuration says fit the views of its `elm`."""

from __future__ import annotations

from elm_jax import schema
from elm_jax.config import SCHEMA, Config
from elm_jax.elms import ELMS
from elm_jax.errors import UserError
from elm_jax.models.encoders import ENCODERS, kind_of

_READABLE = {"images": ("rgb", "stacked_signal"), "symbols": ("symbolic",), "signals": ("signal",)}


def check_views(config: Config) -> None:
    """Raise UserError, naming the key, for what the views of `config.elm` do not have, and for what they lack."""
    elm, view, encoder, data = config.elm, config.view, config.encoder, config.data
    first, *further = config.views
    for name in config.encoders:
        if name not in further:
            expected = f"one of {', '.join(further)}" if further else f"nothing for elm={elm}"
            raise UserError("encoders", name, expected, f"leave --config.encoders.{name} out")
        if not isinstance(config.encoders[name], dict):
            raise UserError(f"encoders.{name}", str(config.encoders[name]), "keys of encoder", "write a dictionary")
        for key, value in config.encoders[name].items():
            if f"encoder.{key}" not in SCHEMA:
                raise UserError(f"encoders.{name}.{key}", "an unknown key", "one of encoder's", "correct it")
            schema.check(f"encoders.{name}.{key}", SCHEMA[f"encoder.{key}"], value)
        each, own = config.views[name], config.encoders[name]
        meant = {"cache": False, "tokens": each.tokens is None, "checkpoint": each.encoder, "config": each.encoder}
        for key, holds in meant.items():
            usual = SCHEMA[f"encoder.{key}"].default
            if not holds and own.get(key, usual) != usual:
                fix = f"leave --config.encoders.{name}.{key} out"
                raise UserError(f"encoders.{name}.{key}", str(own[key]), f"nothing for view {name} of elm={elm}", fix)
    for name, each in config.views.items():
        key = "encoder" if name == first else f"encoders.{name}"
        own = config.encoder_of(name).name
        if each.encoder and own is None:
            known = ", ".join(ENCODERS)
            raise UserError(f"{key}.name", "None", f"an ECG encoder for elm={elm}: {known}", f"set --config.{key}.name")
        if not each.encoder and own is not None:
            raise UserError(f"{key}.name", own, f"no encoder with elm={elm}", "leave it out, or choose a LLaVA")
        if own is not None and each.shows is not None and each.shows not in _READABLE[_reads(config, name)]:
            expected = f"an encoder of {each.shows} for view {name} of elm={elm}"
            fitting = [known for known in ENCODERS if each.shows in _READABLE[kind_of(known).reads]]
            raise UserError(f"{key}.name", own, f"{expected}: {', '.join(fitting)}", f"set --config.{key}.name")
    parts = {"encoder": any(each.encoder for each in config.views.values()), "connector": bool(config.slots)}
    parts |= {config.part("encoder", name): True for name, each in config.slots.items() if each.encoder}
    parts |= {config.part("connector", name): True for name in config.slots}
    for part in config.update:
        if part != "llm" and not parts.get(part):
            raise UserError("update", part, f"no {part} with elm={elm}", "leave it out, or choose another elm")
    mlp = any(each.connector == "mlp" for each in config.views.values())
    of_images = any(_reads(config, name) == "images" for name in config.views)
    of_pages = any(representation_of(config, name) == "rgb" for name in config.views)
    fitting = _fitting(config, first)
    if data.representation not in fitting:
        what = f"encoder.name={encoder.name}" if view.encoder else f"elm={elm}"
        raise UserError(
            "data.representation", data.representation, f"{' or '.join(fitting)} for {what}",
            f"set --config.data.representation={fitting[0]}",
        )  # fmt: skip
    symbols = view.writes == "tokens" or any(_reads(config, name) == "symbols" for name in config.views)
    if symbols and data.ecg_tokenizer is None:
        fix = "set --config.data.ecg_tokenizer to an ECG-Byte file (.json or .pkl)"
        what = f"elm={elm}" if view.writes == "tokens" else f"encoder.name={encoder.name}"
        raise UserError("data.ecg_tokenizer", "None", f"a symbolic tokenizer for {what}", fix)
    # Holds, then the key, what is found, and where it has a meaning: elsewhere it would be ignored without a word.
    lora = config.llm.lora
    adapts = lora.rank > 0 and lora.adapter is None and config.init_from is None
    used = [
        ("llm" in config.update or not adapts, "llm.lora.rank", lora.rank, "0 where update leaves the LLM out"),
        (view.encoder or encoder.checkpoint is None, "encoder.checkpoint", encoder.checkpoint, f"None for elm={elm}"),
        (view.encoder or not encoder.config, "encoder.config", encoder.config, f"nothing for elm={elm}"),
        (view.encoder or not encoder.cache, "encoder.cache", True, f"false for elm={elm}"),
        ("encoder" not in config.update or not encoder.cache, "encoder.cache", True,
         "false where update has the encoder: outputs of one that learns change"),
        (len(config.views) == 1 or not encoder.cache, "encoder.cache", True,
         f"false for elm={elm}{' with retrieval.index' if config.retrieval.index else ''}"),
        (not (data.augment_ecg or data.augment_rgb or data.augment_paper) or not encoder.cache, "encoder.cache", True,
         "false with data.augment_ecg, augment_rgb or augment_paper: recordings change"),
        (view.tokens in (None, encoder.tokens), "encoder.tokens", encoder.tokens, f"{view.tokens} for elm={elm}"),
        (symbols or data.ecg_tokenizer is None, "data.ecg_tokenizer", data.ecg_tokenizer,
         f"None but for {_elms_with('writes', 'tokens')} and encoders of symbols"),
        (of_images or not data.augment_rgb, "data.augment_rgb", True, "false without an encoder of images"),
        (data.normalize == "minmax" or any(representation_of(config, name) == "signal" for name in config.views),
         "data.normalize", data.normalize, f"minmax with data.representation={data.representation}"),
        (of_pages or not data.augment_paper, "data.augment_paper", True, "false without images of pages (rgb)"),
        (of_pages or data.images is None, "data.images", data.images, "None without images of pages (rgb)"),
        (of_pages or (data.image_layout, data.image_rhythm) == ("12x1", ()), "data.image_layout", data.image_layout,
         "12x1, and no image_rhythm, without images of pages (rgb)"),
        (len(config.slots) > 1 or not (data.drop_views or data.swap_views or data.left_out),
         "data.drop_views, swap_views or left_out", (data.drop_views, data.swap_views, data.left_out),
         "nothing of an elm of one view"),
        (not data.left_out or set(data.left_out) < set(config.slots), "data.left_out", data.left_out,
         f"some of {', '.join(config.slots)}, but not all"),
        (mlp or config.connector.hidden is None, "connector.hidden", config.connector.hidden,
         f"None but for {_elms_with('connector', 'mlp')}"),
    ]  # fmt: skip
    for holds, key, found, expected in used:
        if not holds:
            raise UserError(key, str(found), expected, f"leave --config.{key} out")


def signal_tokens(config: Config) -> int:
    """Places of an ECG among the tokens: of its embeddings, or one that its own tokens take."""
    return sum(view.tokens or config.encoder_of(name).tokens for name, view in config.slots.items()) or 1


def representation_of(config: Config, view: str) -> str:
    """What a view shows of an ECG: the first one what `data.representation` says."""
    return config.data.representation if view == next(iter(config.views)) else _fitting(config, view)[0]


def _fitting(config: Config, view: str) -> tuple[str, ...]:
    """The representations that a view can have."""
    shows = config.views[view].shows
    return (shows,) if shows else _READABLE[_reads(config, view)]


def _reads(config: Config, view: str) -> str:
    """What the encoder of a view reads."""
    encoder = config.encoder_of(view).name
    return "signals" if encoder is None else kind_of(encoder).reads


def _elms_with(fact: str, value: str) -> str:
    named = [elm for elm, views in ELMS.items() if any(getattr(view, fact) == value for view in views.values())]
    return f"elm={' or '.join(named)}"
