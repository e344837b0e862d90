"""How long each record is in tokens: measured once, by all processors where there are many records, and kept.

What is kept is a file of Arrow columns that is mapped into memory, with the fingerprint of the dataset. It is found by
the content of the tables, so that a start reads no record. A text that comes again is measured once; two texts cost as
much in one call of the tokenizer as in two.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from tqdm import tqdm

from elm_jax import stopping
from elm_jax.data.packing import LengthIndex
from elm_jax.data.represent import FLATLINE, NOISE
from elm_jax.errors import Absent, UserError
from elm_jax.folders import file_checksum, keep, kept
from elm_jax.registry import qualified_name
from elm_jax.symbols.coder import cores
from elm_jax.text.render import Rendered

if TYPE_CHECKING:
    from elm_jax.data.dataset import Dataset
    from elm_jax.data.sources import Record

VERSION = 4  # of what is kept
CHUNK = 512  # records that are measured before others may see them
SHARE = 20_000  # records for which a process is worth its start
_WAITING, _AHEAD = 2, 256  # chunks that a process has, and that lie there out of their turn
_KNOWN = 1 << 15  # texts whose measures are known at a time
_ENDING = 5.0  # seconds that a process which was killed is waited for
SPARE = 1.25  # of an ECG's symbols are planned for where augmentation varies them


class Measure(NamedTuple):
    """Of a record; all 0 where nothing can be learnt of it. See `plan.LengthIndex`.

    system_end, signal_end: tokens of what it may begin with, as `text.render.Rendered` has them, 0 where an answer is
    among them; system_key, signal_key: what tells these tokens apart.
    """

    length: int = 0
    targets: int = 0
    ecgs: int = 0  # symbols take no slots
    system_end: int = 0
    signal_end: int = 0
    cut: bool = False
    lost_answers: int = 0
    cut_ecgs: bool = False
    system_key: int = 0
    signal_key: int = 0


_TYPES = {name: np.int32 for name in Measure._fields} | {
    "cut": np.bool_, "lost_answers": np.int16, "cut_ecgs": np.bool_, "system_key": np.uint64, "signal_key": np.uint64,
    "dataset": np.int32,
}  # fmt: skip
Columns = dict[str, np.ndarray]


class _Chunk(NamedTuple):
    """Records that follow one another: their columns, what the fingerprint is made of, and what is wrong with some."""

    columns: Columns
    told: bytes
    errors: list[UserError]


def index_of(
    dataset: Dataset, share: str, max_bad: float, cache: Path | None, progress: bool, timeout: float, neighbours: int
) -> LengthIndex:
    """See `Dataset.length_index`."""
    # What a function of the user's writes is measured at every start: nothing says when the function has changed.
    stem = cache / _name(dataset) if cache and all(map(_room, _writers(dataset))) else None
    columns = None
    if whole := stem and kept(stem, ".arrow"):
        with contextlib.suppress(OSError):  # somebody else may have removed it
            columns, dataset.fingerprint = _read(whole)
            for i in np.flatnonzero(columns["length"] == 0)[int(max_bad * len(dataset)) :]:
                try:
                    dataset.check(int(i))  # says what is wrong with the first that is too many
                except UserError as error:
                    raise dataset.too_many(error, max_bad) from error
    if columns is None:
        columns, dataset.fingerprint = _measure(dataset, max_bad, progress, timeout, neighbours)
        # An ECG that could not be read may be mended: the next start looks again.
        if stem and (not dataset.reads_ecgs or columns["length"].all()):
            keep(stem, ".arrow", functools.partial(_write, columns, dataset.fingerprint))
    # An ECG of which every epoch has other symbols is part of no prefix of a known length.
    return _for_share(columns, "system" if share == "ecg" and dataset.varies else share)


def _for_share(columns: Columns, share: str) -> LengthIndex:
    nothing = np.zeros_like(columns["length"])
    with_ecg = (columns["signal_end"] > 0) & (share == "ecg")
    prefix = nothing if share == "none" else np.where(with_ecg, columns["signal_end"], columns["system_end"])
    return LengthIndex(
        prefix=prefix,
        key=np.where(with_ecg, columns["signal_key"], columns["system_key"]),
        prefix_ecgs=np.where(with_ecg, columns["ecgs"], nothing),
        shares_ecg=with_ecg,
        **{name: columns[name] for name in ("length", "targets", "ecgs", "dataset", "cut", "lost_answers", "cut_ecgs")},
    )


# -- what is kept ---------------------------------------------------------------------------------------------


def _writers(dataset: Dataset) -> list[Callable[..., Any]]:
    """The functions that write what is learnt of a record, or stands in its text."""
    texts = dataset.signal.texts.values() if dataset.text.signal_tokens else ()
    return [*filter(None, (dataset.samples.of,)), *texts]


def _room(function: Callable[..., Any]) -> str:
    """The folder of the package that a function is from; "" where it is the user's."""
    package, _, rest = qualified_name(function).partition(".")
    return rest.partition(".")[0] if package == "elm_jax" else ""


def _code(room: str) -> list[str]:
    """Changes with the source in a folder of the package."""
    return [file_checksum(file) for file in sorted(Path(stopping.__file__).parent.joinpath(room).rglob("*.py"))]


def _name(dataset: Dataset) -> str:
    """Changes with the lengths and with the fingerprint, and knows files by times that nobody can set."""
    digest = dataset.head
    content = getattr(dataset.records, "content", None) or dataset.fingerprint
    stamp = functools.lru_cache(_KNOWN)(functools.partial(dataset.signal.stamp, kept=True))
    paths = (path for record in (dataset.records if dataset.reads_ecgs else ()) for path in record.ecg_paths)
    stamps = hashlib.sha256(b"".join(repr((path, stamp(path))).encode() for path in paths))
    digest.update(repr((VERSION, content, stamps.hexdigest())).encode())
    for function in _writers(dataset):
        digest.update(repr(_code(_room(function))).encode())
    return digest.hexdigest()[:32]


def _write(columns: Columns, fingerprint: str, file: Any) -> None:
    # A bool of Arrow's is a bit; as a byte it is read where it lies.
    held = {name: column.view(np.uint8) if column.dtype == np.bool_ else column for name, column in columns.items()}
    table = pa.table(held).replace_schema_metadata({"fingerprint": fingerprint})
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _read(file: Path) -> tuple[Columns, str]:
    table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    columns = {name: table[name].to_numpy().view(kind) for name, kind in _TYPES.items()}
    return columns, table.schema.metadata[b"fingerprint"].decode()


# -- measuring ------------------------------------------------------------------------------------------------


def _measure(dataset: Dataset, max_bad: float, progress: bool, timeout: float, neighbours: int) -> tuple[Columns, str]:
    """The columns and the fingerprint. Raises UserError where more than the fraction `max_bad` are bad."""
    columns, digest = {name: np.zeros(len(dataset), kind) for name, kind in _TYPES.items()}, dataset.head
    bad, done = 0, 0
    with tqdm(total=len(dataset), desc=f"measuring {dataset.samples.unit}", disable=not progress, mininterval=1) as bar:
        for chunk in _chunks(dataset, timeout, neighbours):
            bad += len(chunk.errors)
            if bad > max_bad * len(dataset):
                first = int(max_bad * len(dataset)) - bad  # counted from the end
                raise dataset.too_many(chunk.errors[first], max_bad)
            digest.update(chunk.told)
            end = done + len(chunk.columns["length"])
            for name, column in chunk.columns.items():
                columns[name][done:end] = column
            bar.update(end - done)
            done = end
    return columns, digest.hexdigest()[:32]


class _Meter:
    """Measures records of a dataset."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._known: dict[tuple[bytes, int], Measure] = {}
        self._stamp = functools.lru_cache(_KNOWN)(dataset.signal.stamp)

    def chunk(self, first: int, last: int) -> _Chunk:
        """The records `first` to `last` - 1."""
        dataset, told, errors, datasets = self.dataset, list[bytes](), list[UserError](), list[int]()
        measures: list[Measure] = []
        each = getattr(dataset.records, "each", None)
        records = each(first, last) if each else iter(dataset.records[first:last])
        for index in stopping.each(range(first, last), "conversation", first):
            record = next(records)
            text = repr(record.text)
            told.append(dataset.told(record, text, self._stamp))
            try:
                measures.append(self._measure(index, record, text))
            except UserError as error:
                measures.append(Measure())
                errors.append(error)
            datasets.append(record.dataset)
        columns = dict(zip(Measure._fields, zip(*measures, strict=True), strict=True)) | {"dataset": datasets}
        return _Chunk({name: np.array(columns[name], kind) for name, kind in _TYPES.items()}, b"".join(told), errors)

    def _measure(self, index: int, record: Record, text: str) -> Measure:
        dataset = self.dataset
        if not dataset.samples.plain:
            return Measure(*dataset.samples.measure(dataset, index))
        if dataset.reads_ecgs or record.problem is not None:
            found = _planned(dataset, index, record)
        else:
            key = xxhash.xxh3_128_digest(text.encode()), len(record.ecg_paths)
            known = self._known.get(key)
            found = known or _planned(dataset, index, record)
            if known is None:
                if len(self._known) == _KNOWN:
                    self._known.clear()
                self._known[key] = found
        # What tells recordings apart. Each record's `noise` is its own; so is its place in the batch.
        ecgs = [f"{path}:{record.id}" if path in (NOISE, FLATLINE) else path for path in record.ecg_paths]
        return found._replace(signal_key=xxhash.xxh3_64_intdigest("\0".join([str(found.signal_key), *ecgs]).encode()))


def _planned(dataset: Dataset, index: int, record: Record) -> Measure:
    """With room for what augmentation adds to the record's symbols, and what `text.max_len` does to it.

    What augmentation adds beyond that room will be cut.
    """
    limit, symbols, view = dataset.text.max_len, dataset.symbols, dataset.signal.view
    with dataset.naming(index, record):
        whole = dataset.rendered(index, record, None)
        ecgs = [] if symbols is None else [ecg[view] for ecg in dataset.signals(index)]
    if symbols is None and (limit is None or len(whole.ids) <= limit):
        return _measure_of(whole)
    room = [np.resize(symbols.llm_ids, int(SPARE * len(ecg))) for ecg in ecgs] if symbols and dataset.varies else ecgs
    rendered, amount = dataset.render(index, [{view: ecg} for ecg in room]), sum(map(len, ecgs))
    found = _measure_of(rendered)
    last = int(np.flatnonzero(whole.supervised).max(initial=-1)) + 1 + amount - len(ecgs)
    if limit is None or last <= limit:
        return found
    cut_ecgs = symbols is not None and bool(np.isin(rendered.ids, symbols.llm_ids).sum() < amount)
    return found._replace(cut=True, lost_answers=_answers(whole) - _answers(rendered), cut_ecgs=cut_ecgs)


def _answers(rendered: Rendered) -> int:
    """How many answers are learnt."""
    return int(np.count_nonzero(np.diff(rendered.supervised.astype(np.int8), prepend=0) == 1))


def _measure_of(rendered: Rendered) -> Measure:
    first = int(rendered.supervised.argmax())
    # A prefix holds nothing supervised: its tokens stand once for many conversations.
    system, signals = (end if end <= first else 0 for end in (rendered.system_end, rendered.signal_end))
    keys = (xxhash.xxh3_64_intdigest(rendered.ids[:end].data) for end in (rendered.system_end, rendered.signal_end))
    learnt, ecgs = int(np.count_nonzero(rendered.supervised)), len(rendered.signal_positions)
    system_key, signal_key = keys
    return Measure(len(rendered.ids), learnt, ecgs, system, signals, system_key=system_key, signal_key=signal_key)


# -- processes ------------------------------------------------------------------------------------------------


def _chunks(dataset: Dataset, timeout: float, neighbours: int) -> Iterator[_Chunk]:
    """All records, in their order, measured by this process and by helpers where there are enough records."""
    parts = deque(enumerate((i, min(i + CHUNK, len(dataset))) for i in range(0, len(dataset), CHUNK)))
    meter, samples = _Meter(dataset), dataset.samples
    # What a function of the user's does stays in the process that it was registered in.
    own = samples.experience is not None or not all(map(_room, _writers(dataset)))
    count = 1 if own else max(1, min(cores() // neighbours, len(dataset) // SHARE))
    sent = pickle.dumps((dataset, timeout)) if count > 1 else b""
    helpers = [_Helper(sent) for _ in range(count - 1)]
    lines: dict[Any, _Helper] = {helper.line: helper for helper in helpers}
    there: dict[int, _Chunk] = {}
    try:
        for turn in range(len(parts)):
            while turn not in there:
                for helper in helpers:
                    helper.ask(parts)
                busy = not parts or len(there) > _AHEAD  # nothing for this process to do
                for line in connection.wait(lines, None if busy else 0.0) if lines else ():
                    number, chunk = lines[line].answer()
                    there[number] = chunk
                if turn not in there and parts and not busy:
                    number, part = parts.popleft()
                    there[number] = meter.chunk(*part)
            yield there.pop(turn)
    finally:
        for helper in helpers:
            helper.end()


class _Helper:
    """A process that measures chunks. Unlike those of `multiprocessing` it imports nothing of the command's."""

    def __init__(self, sent: bytes) -> None:
        self.line, theirs = multiprocessing.Pipe()
        code = f"from elm_jax.data import lengths; lengths._serve({theirs.fileno()})"
        path = {"PYTHONPATH": os.pathsep.join(folder or os.getcwd() for folder in sys.path)}
        command = [sys.executable, "-c", code]
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env={**os.environ, **path}
        )
        theirs.close()
        self._asked = deque[int]()
        self._done(lambda: self.line.send_bytes(sent))

    def ask(self, parts: deque[tuple[int, tuple[int, int]]]) -> None:
        """Give it what it has room for of `parts`: (number, (first, last)) of chunks."""
        while parts and len(self._asked) < _WAITING:
            number, part = parts.popleft()
            self._asked.append(number)
            self._done(lambda part=part: self.line.send(part))

    def answer(self) -> tuple[int, _Chunk]:
        """The chunk that has come first of those asked for. Raises the UserError that has come in its place."""
        found = self._done(self.line.recv)
        if isinstance(found, UserError):
            raise found
        return self._asked.popleft(), found

    def _done(self, what: Callable[[], Any]) -> Any:
        try:
            return what()
        except (OSError, EOFError):
            status = self.process.wait()
            assert status < 0, f"a helper failed with status {status}: it said why before"  # none has killed it
            found = f"process {self.process.pid}, which measured some of them, ended with status {status}"
            expected, fix = "a process that measures", "see whether memory has run out, and give the command again"
            raise Absent("data.names", found, expected, fix) from None

    def end(self) -> None:
        self.line.close()
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a read that sticks in the system may not let it end
            self.process.wait(_ENDING)


def _serve(handle: int) -> None:
    """What the process of a helper does, until the other end is closed. Signals are the other's affair."""
    for number in stopping.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    line, sending = connection.Connection(handle), threading.Lock()
    with contextlib.suppress(EOFError, ConnectionError):
        dataset, timeout = pickle.loads(line.recv_bytes())
        if timeout:
            threading.Thread(target=_watch, args=(line, sending, timeout), daemon=True).start()
        meter = _Meter(dataset)
        while True:
            part = line.recv()
            try:
                found = meter.chunk(*part)
            except UserError as error:  # of no record: a table that cannot be reached
                found = error
            with sending:
                line.send(found)


def _watch(line: Any, sending: threading.Lock, timeout: float) -> None:
    """Tell the other end where a recording is being read for more than `timeout` seconds. Time in which the whole
    process was stopped does not count."""
    tick, read, sticks = min(1.0, timeout / 10), stopping.oldest_read(), 0.0
    while sticks <= timeout or read is None:
        time.sleep(tick)
        before, read = read, stopping.oldest_read()
        sticks = sticks + tick if read is not None and read == before else 0.0
    fix = "run the same command to go on when its file system answers"
    with sending, contextlib.suppress(ConnectionError):
        line.send(Absent(read[0], f"being read for {sticks:.0f} s", f"at most data.timeout={timeout:g} s", fix))
