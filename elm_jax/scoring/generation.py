"""How good generated, rebuilt and forecast ECGs are.

Sources: FID, arXiv 1706.08500; MMD, Gretton et al. 2012; SSIM, Wang et al. 2004; MASE, Hyndman and Koehler 2006. The
choices are those of ECG-Neural-Networks.

Dimension letters: N records, D features, C leads, L samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg

LEAST_ERROR = 1e-10  # of a lead's mean squared error, so that PSNR ends at 100 dB
SSIM_SIGMA, SSIM_SECONDS = 1.5, 11 / 250  # of the window: its deviation in samples, its length
BLOCK = 1 << 24  # numbers of a kernel that are in memory at once
SSIM_C1, SSIM_C2 = 1e-4, 9e-4


def frechet_distance(real: np.ndarray, made: np.ndarray) -> float:
    """FID of features (N, D) and (N', D): of the normal distributions that have their means and covariances; nan
    where these are not finite."""
    means, covariances = zip(*((x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))) for x in (real, made)), strict=True)
    product = covariances[0] @ covariances[1]
    if not np.isfinite(product).all():
        return math.nan
    root = scipy.linalg.sqrtm(product)
    difference = means[0] - means[1]
    return float(difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * np.real(root)))


def mean_discrepancy(real: np.ndarray, made: np.ndarray, gamma: float | None = None) -> float:
    """MMD of features (N, D) and (N', D), squared and biased, with the kernel exp(−γ |x − y|²); γ None: 1/D."""
    width = 1 / real.shape[1] if gamma is None else gamma

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        squares, total, rows = (y**2).sum(1), 0.0, max(1, BLOCK // len(y))
        for part in (x[start : start + rows] for start in range(0, len(x), rows)):
            distances = (part**2).sum(1)[:, None] + squares - 2 * part @ y.T
            total += float(np.exp(-width * distances).sum())
        return total / (len(x) * len(y))

    return kernel(real, real) + kernel(made, made) - 2 * kernel(real, made)


def twelve_leads(independent: Any, xp: Any = np) -> Any:
    """(..., 8, L) of leads I, II, V1 to V6 -> (..., 12, L) in the canonical order: the limb leads by Einthoven's and
    Goldberger's sums. xp: the module that arrays are of, numpy or jax.numpy."""
    first, second = independent[..., 0, :], independent[..., 1, :]
    third = second - first
    limbs = first, second, third, -(first + second) / 2, (first - third) / 2, (second + third) / 2
    return xp.concatenate([xp.stack(limbs, -2), independent[..., 2:, :]], -2)


class Rebuilding(NamedTuple):
    """Of each lead, in the shape of the signals without their samples."""

    mse: np.ndarray
    mae: np.ndarray
    psnr: np.ndarray  # dB, for signals from 0 to 1
    ssim: np.ndarray


def rebuilding(rebuilt: np.ndarray, truth: np.ndarray, sampling_rate: float) -> Rebuilding:
    """How signals (..., L), from 0 to 1, compare with the true ones; float64."""
    a, b = rebuilt.astype(np.float64), truth.astype(np.float64)
    mse = ((a - b) ** 2).mean(-1)
    psnr = -10 * np.log10(np.maximum(mse, LEAST_ERROR))
    return Rebuilding(mse, np.abs(a - b).mean(-1), psnr, similarity(a, b, sampling_rate))


def ssim_window(sampling_rate: float) -> int:
    """Samples of SSIM's window: an odd number."""
    size = int(SSIM_SECONDS * sampling_rate)
    return max(size + 1 - size % 2, 1)


def similarity(a: np.ndarray, b: np.ndarray, sampling_rate: float) -> np.ndarray:
    """Structural similarity of signals (..., L) -> (...): in one dimension, zeros beyond the ends."""
    size = ssim_window(sampling_rate)
    places = np.arange(size) - size // 2
    window = np.exp(-(places**2) / (2 * SSIM_SIGMA**2))
    window /= window.sum()

    def smooth(x: np.ndarray) -> np.ndarray:
        return np.apply_along_axis(np.convolve, -1, x, window, mode="same")

    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    together = smooth(a * b) - mean_a * mean_b
    found = (2 * mean_a * mean_b + SSIM_C1) * (2 * together + SSIM_C2)
    return (found / ((mean_a**2 + mean_b**2 + SSIM_C1) * (var_a + var_b + SSIM_C2))).mean(-1)


def forecasting(forecast: np.ndarray, truth: np.ndarray, context: np.ndarray | None = None) -> Mapping[str, float]:
    """`mse, mae, mase, pearson_r, snr_db` of a forecast (L,) over the samples that both have; nan where there are none.

    mase: the mean error by the mean step of the `context`, which is what was there before.
    """
    length = min(len(forecast), len(truth))
    if not length:
        return dict.fromkeys(("mse", "mae", "mase", "pearson_r", "snr_db"), math.nan)
    a, b = (np.asarray(x[:length], np.float64) for x in (forecast, truth))
    mse, mae = float(((a - b) ** 2).mean()), float(np.abs(a - b).mean())
    step = 0.0 if context is None or len(context) < 2 else float(np.abs(np.diff(context)).mean())
    varies = np.ptp(a) > 0 and np.ptp(b) > 0
    return {
        "mse": mse,
        "mae": mae,
        "mase": mae / step if step else math.nan,
        "pearson_r": float(np.corrcoef(a, b)[0, 1]) if varies else 0.0,
        "snr_db": 10 * math.log10(float((b**2).mean()) / mse) if mse else math.inf,
    }
