"""What the parity tests measured: every comparison goes through `record`, so that docs/parity.md can be written.

`scripts/parity_table.py` sets ELM_JAX_PARITY to a file; each comparison then appends one JSON line to it.
"""

import json
import os

import numpy as np


def relative_error(found: object, expected: object) -> float:
    """max |found - expected| / max |expected|; the plain maximum where all that is expected is zero."""
    ours, theirs = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    if not theirs.size:
        return 0.0
    worst, scale = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    return worst / scale if scale > 0 else worst


def record(golden: str, quantity: str, error: float, bound: float) -> None:
    """Note the error of a golden's quantity, and assert that it is within its bound (NaN is not)."""
    path = os.environ.get("ELM_JAX_PARITY")
    if path:
        line = {"golden": golden, "quantity": quantity, "error": float(error), "bound": float(bound)}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    assert error <= bound, f"{golden}: {quantity} differs by {error:.3g}, more than {bound:.3g}"


def compare(golden: str, quantity: str, found: object, expected: object, bound: float) -> None:
    """`record` the relative error of an array."""
    record(golden, quantity, relative_error(found, expected), bound)
