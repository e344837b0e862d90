"""Reports as text towers read them: token ids of one length."""

from __future__ import annotations

from typing import Any

import numpy as np

from elm_jax.errors import UserError


def padded_ids(tokenizer: Any, text: str, length: int) -> np.ndarray:
    """The ids (length,) int32 of a text with the tokens that the tokenizer puts around it, padded on the right.

    What is too long is cut at its end, and the last token, which ends a text, is kept.

    Raises:
        UserError: half of a surrogate pair is no text.
    """
    try:
        ids = tokenizer.encode(text, verbose=False)
    except (TypeError, ValueError, UnicodeError) as error:
        raise UserError("report", f"a text that cannot be read ({error})", "valid Unicode", "mend the record") from None
    if len(ids) > length:
        last = ids[-1:] if ids[-1] in tokenizer.all_special_ids else []
        ids = ids[: length - len(last)] + last
    found = np.full(length, tokenizer.pad_token_id, np.int32)
    found[: len(ids)] = ids
    return found
