class Encoder:
    """Greedy longest match over all bytes and `merges`; compiled from rust_bpe."""

    def __new__(cls, merges: list[tuple[bytes, int]]) -> Encoder: ...
    def encode(self, symbols: bytes | bytearray) -> bytes: ...

def train(
    records: list[bytes], num_merges: int, across_records: bool
) -> tuple[list[bytes], list[int], list[list[int]]]:
    """Byte-pair training: what each merge spells, its pair's count, the corpus after all merges."""
