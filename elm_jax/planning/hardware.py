"""The one table of what hardware can do: every figure that the roofline uses is here, with its source."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Hardware:
    """One kind of device and its links. Rates are per device and second, of links in one direction.

    dimensions: how many sizes a topology of it has. memory: bytes that a program may use. node: devices, at most, that
    reach each other through `inner`; those of different nodes do through `outer`.
    products, attention, streaming, collectives: the parts of the peaks that are reached in practice (attention's peak
    is that of products).
    """

    platform: Literal["gpu", "tpu", "cpu"]
    dimensions: int
    peak: float  # FLOP/s, dense bfloat16: what MFU is a part of
    memory: float
    bandwidth: float  # bytes/s of memory
    inner: float  # bytes/s
    outer: float  # bytes/s
    node: int
    products: float
    attention: float
    streaming: float
    collectives: float
    latency: float  # seconds of a collective beside its bytes
    kernel: float = 0.0  # seconds of a kernel beside its work
    full_precision: float = 1.0  # how many times slower products of float32 are (H100: TensorFloat-32)


USABLE = 0.9  # of a device's memory: the rest is the runtime's, NCCL's and cuDNN's

# H100 SXM: NVIDIA H100 data sheet: 989 TFLOP/s, 80 GB at 3.35 TB/s, NVLink 900 GB/s both ways. Network: one
# 400 Gb/s ConnectX-7 a GPU (DGX H100 data sheet).
H100 = Hardware(
    platform="gpu", dimensions=2, peak=989 * TERA, memory=84929347584 * USABLE, bandwidth=3.35 * TERA,
    inner=450 * GIGA, outer=50 * GIGA, node=8,
    products=0.67, attention=0.42, streaming=0.85, collectives=0.80, latency=20e-6, kernel=3e-6, full_precision=2.0,
)  # fmt: skip

HARDWARE = {
    "h100": H100,
    # NVIDIA H200 data sheet: the same chip with 141 GB at 4.8 TB/s. Its memory in bytes is what
    # CUDA tells of a device (cudaDeviceProp.totalGlobalMem, as PyTorch prints it): 143156 MiB, that is 139.8 GiB.
    "h200": replace(H100, memory=143156 * 2**20 * USABLE, bandwidth=4.8 * TERA),
    # Cloud TPU documentation, "TPU v5p": 459 TFLOP/s, 95 GB at 2765 GB/s, 4800 Gb/s between chips, both ways and all
    # links together. "TPU v5e": 197 TFLOP/s, 16 GB at 819 GB/s, 1600 Gb/s.
    "v5p": Hardware(
        platform="tpu", dimensions=3, peak=459 * TERA, memory=95 * GIGA * USABLE, bandwidth=2.765 * TERA,
        inner=300 * GIGA, outer=300 * GIGA, node=4,
        products=0.85, attention=0.50, streaming=0.85, collectives=0.80, latency=5e-6,
    ),
    "v5e": Hardware(
        platform="tpu", dimensions=2, peak=197 * TERA, memory=16 * GIGA * USABLE, bandwidth=0.819 * TERA,
        inner=100 * GIGA, outer=100 * GIGA, node=4,
        products=0.85, attention=0.50, streaming=0.85, collectives=0.80, latency=5e-6,
    ),
    # No particular CPU: orders of magnitude, so that the command can be tried anywhere.
    "cpu": Hardware(
        platform="cpu", dimensions=1, peak=0.1 * TERA, memory=16 * GIGA * USABLE, bandwidth=20 * GIGA,
        inner=10 * GIGA, outer=10 * GIGA, node=2**30,
        products=0.5, attention=0.3, streaming=0.5, collectives=0.5, latency=50e-6,
    ),
}  # fmt: skip
