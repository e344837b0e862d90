"""Named behaviours of the reference that ours departs from; each is off unless its name is asked for.

`config.compat` and every `compat=` keyword take a tuple of names from BEHAVIOURS or PRESETS.
"""

from collections.abc import Iterable

from elm_jax.errors import UserError, nearest

BEHAVIOURS: dict[str, str] = {
    "clean_answers": "clean answers as user text is cleaned (a leading 'A:' goes, image becomes signal)",
    "truncate_tokens": "truncate by dropping single tokens of the rendered text instead of whole turns",
    "response_by_ids": "find what is supervised by searching the token ids for the response header",
    "special_tokens_in_text": "read special tokens written in a message as special tokens, not as text",
    "skip_zero_signals": "leave the text embedding of <signal> where a signal embedding is exactly zero",
    "signal_token_order": "add the ECG-Byte tokens to the LLM's in the order of the file, which is not sorted",
    "lead_order": "take a file's rows in the order they are stored in, whatever leads they are",
    "spline_resampling": "resample by a cubic spline from first to last sample, with no low-pass before it",
    "comprehension_sets": "make synthetic sets as ECG-Preprocess does, whose labels are not what is asked (prepare)",
    "published_report_cleaning": "clean reports as MERL's and ECG-Chat's own code does, faults included (prepare)",
    "rgb_250_dpi": "draw the ECG paper of rgb at 250 dots per inch before it is resized",
    "muon_by_name": "choose the matrices that Muon moves by words in their published names",
    "micro_batch_mean_loss": "average the loss over micro-batches, each the mean over its own tokens",
    "st_mem_train_positions": "train the position embedding of the st_mem encoder with its other weights",
    "vit_random_mask": "hide 75 % of the patches of an image from the vit encoder, at random",
    "coca_sees_answers": "let coca write a report from the text tower's hidden states, which have seen all of it",
    "clip_centre_crop": "show CLIP the middle of an image only, as its own processor does, not all of it",
    "scale_signal_embeddings": "scale Gemma's signal embeddings as its token embeddings, as transformers 4 did",
    "dequantize_by_25": "read an ECG-Byte symbol q as q/25, not the middle of its bin, (q+0.5)/26 (EcgByte.decode)",
    "feature_windows": "take QRS duration, ST deviation and bands of the 24 numbers of a lead as the reference does",
    "rag_0_0_2": "write of retrieved recordings as the reference's version 0.0.2 does (retrieval.index)",
    "rag_0_0_3": "write of retrieved recordings as the reference's version 0.0.3 does",
    "rag_0_0_4": "write of retrieved recordings as the reference's version 0.0.4 does",
    "rag_92bff32": "write of retrieved recordings as the branch of the reference's RAG paper does",
    "rag_protocol": "let an ECG retrieve itself and its patient, and leave out flat entries afterwards, with no others",
    "gpt2_positions": "count a GPT-2 prompt's positions from its padding, as transformers' forward() does (load_llm)",
}

# Both were measured with transformers 5, clean no reports, and retrieve nothing.
_NEITHER = ("scale_signal_embeddings", "published_report_cleaning")
_BOTH = tuple(name for name in BEHAVIOURS if name not in _NEITHER and not name.startswith("rag_"))

PRESETS: dict[str, tuple[str, ...]] = {
    "elm-2026-04": _BOTH,
    "elm-2026-08": _BOTH,
}


def enabled(name: str, compat: Iterable[str]) -> bool:
    """Whether behaviour `name` is asked for in `compat`, by its own name or through a preset."""
    assert name in BEHAVIOURS, f"{name!r} is not in compat.BEHAVIOURS"
    return any(name == asked or name in PRESETS.get(asked, ()) for asked in compat)


def check(compat: Iterable[str]) -> None:
    """Raise UserError for a name that is neither a behaviour nor a preset."""
    known = [*BEHAVIOURS, *PRESETS]
    for asked in compat:
        if asked not in known:
            fix = nearest(asked, known) or "leave the name out"
            raise UserError("compat", repr(asked), f"names out of {', '.join(known)}", fix)
