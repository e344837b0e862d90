from collections.abc import Callable

import numpy as np

class Encoder:
    """The encoder of one tokenizer, compiled from rust_bpe. ids come as 32-bit integers in a bytearray."""

    def __new__(cls, merges: list[bytes], symbols: bytes) -> Encoder: ...
    def encode(self, symbols: bytes | bytearray, in_order: bool) -> bytearray: ...
    def encode_signals(
        self, samples: np.ndarray, records: int, eps: float, in_order: bool, threads: int
    ) -> tuple[bytearray, list[int]]: ...
    def symbols_of(self, samples: np.ndarray, eps: float) -> bytes: ...

def train(
    records: list[bytes],
    num_merges: int,
    across_records: bool,
    threads: int,
    progress: Callable[[int, int, int], object] | None,
) -> tuple[list[bytes], list[int], int, int, bool]:
    """What each merge spells, its pair's count, symbols before and after, whether Ctrl-C ended it."""
