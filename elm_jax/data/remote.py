"""Tables that lie elsewhere: Parquet files by their URLs, of which row groups are fetched when a row of theirs is read.

Rows have the numbers that they have in the files, so that plans, ids and resumes are those of the same files on disk.
Of a file its footer is fetched when it is opened, then only the columns of a record. Row groups are kept on disk up to
a number of bytes; of more the one that was used longest ago is removed, and fetched again when it is needed.
"""

import contextlib
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar, overload

from elm_jax.data.table_files import COLUMNS, plain_schema, split_in_name
from elm_jax.errors import Absent, UserError
from elm_jax.folders import keep, kept

_WAITS = (0.5, 2.0, 8.0)  # s before what failed is tried again
_OPEN = 16  # row groups that are mapped into memory at a time
_HALF = 86_400.0  # s in which a row group is written by whoever began, or never
# Of a file, by whatever its place calls it.
_STAMPS = ("size", "ETag", "etag", "blob_id", "mtime", "LastModified", "Last-Modified", "Content-MD5", "Digest")
_FIX = "see that it can be reached and read, and give the command again"
Made = TypeVar("Made")


def is_remote(name: str) -> bool:
    """Whether a dataset is named by a URL."""
    return "://" in name


def remote_tables(name: str, most: float) -> Iterator[tuple[str, str | None, "RemoteTable"]]:
    """(where, split in the name, table) of a Parquet file by its URL, or of all below `hf://datasets/OWNER/NAME`.

    most: bytes of their rows that are kept on disk, of all such tables together.

    Raises:
        UserError: there is none, or what there is is no table of records. Absent: it cannot be reached.
    """
    import fsspec

    where = f"data.names: {name}"
    try:
        system, path = fsspec.core.url_to_fs(name)
        paths = [path] if path.endswith(".parquet") else system.glob(f"{path}/**/*.parquet")
    except (ImportError, ValueError) as error:
        raise UserError(where, str(error), "hf://datasets/OWNER/NAME or the URL of a table", "correct it") from None
    except Exception as error:  # of any library
        raise Absent(where, f"no way there ({error})", "a dataset that can be fetched", _FIX) from error
    if not paths:
        raise UserError(where, "no .parquet file", "a table, or a dataset that has some", "correct the URL")
    for one in sorted(paths, key=lambda path: path.split("/")):  # in the order of the same files on disk
        yield one, split_in_name(PurePosixPath(one).stem), RemoteTable(system.unstrip_protocol(one), most)


class RemoteTable:
    """A Parquet file somewhere: rows by number, each a dictionary of those of COLUMNS that it has.

    most: bytes that are kept on disk. What is asked for and cannot be fetched after some tries is `Absent`; a
    UserError where the file is not there, is no table of records, or has changed since it was opened, in this process
    or in the one that it comes from (stamp: what its place told of it there).
    """

    def __init__(self, url: str, most: float, stamp: str = "") -> None:
        self.url, self.most = url, most
        self._file: Any = None
        self._stamp = stamp
        metadata, schema = self._ask(lambda file: (file.metadata, file.schema_arrow))
        self._ends = list(accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)))
        self.schema = plain_schema(url, schema)
        if not len(self):
            raise UserError(url, "no records", "rows of ecg_path and text", "check the file")
        self._group = lru_cache(_OPEN)(self._mapped)

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteTable, (self.url, self.most, self._stamp)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def content(self) -> str:
        """Changes with the file, as far as its place tells."""
        return repr((self.url, self._stamp))

    @property
    def column_names(self) -> list[str]:
        return self.schema.names

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...

    @overload
    def __getitem__(self, index: str) -> list[Any]: ...

    def __getitem__(self, index: int | str) -> Mapping[str, Any] | list[Any]:
        """A row, or all values of a column, of which no other is fetched."""
        if isinstance(index, str):
            return self._ask(lambda file: self._plain(file.read(columns=[index]), [index]))[index].to_pylist()
        group = bisect_right(self._ends, index)
        within = index - (self._ends[group - 1] if group else 0)
        return {name: column[within].as_py() for name, column in self._group(group).items()}

    def _mapped(self, group: int) -> dict[str, Any]:
        """The columns of a row group, mapped into memory from the file that is kept of it."""
        import pyarrow as pa
        from datasets import config

        folder = Path(config.HF_DATASETS_CACHE, "elm_jax", "row_groups")
        digest = blake2b(repr((self.url, self._stamp, group, COLUMNS)).encode(), digest_size=16).hexdigest()
        fix = "make room there, or set HF_DATASETS_CACHE to a folder that can be written"
        table = None
        while table is None:
            whole = there = kept(folder / digest, ".arrow")
            if whole is None:
                write = partial(_write, self._ask(lambda file: self._rows(file, group)))
                whole = keep(folder / digest, ".arrow", write, f"a place for rows of {self.url}", fix)
            with contextlib.suppress(FileNotFoundError):  # another process may have made room meanwhile
                os.utime(whole)
                table = pa.ipc.open_stream(pa.memory_map(str(whole))).read_all()
            if there is None:
                _make_room(whole, self.most)
        return dict(zip(table.column_names, table.columns, strict=True))

    def _rows(self, file: Any, group: int) -> Any:
        return self._plain(file.read_row_group(group, columns=self.column_names), self.column_names)

    def _plain(self, rows: Any, names: list[str]) -> Any:
        """Columns as the schema has them."""
        import pyarrow as pa

        rows = rows.select(names).cast(pa.schema([self.schema.field(name) for name in names]))
        rows.validate(full=True)  # Parquet promises nothing of its texts
        return rows

    def _ask(self, what: Callable[[Any], Made]) -> Made:
        """`what` of the open Parquet file; where it fails, of one that is opened anew, after a while."""
        for wait in (*_WAITS, None):
            try:
                self._file = self._file or self._open()
                return what(self._file)
            except UserError:
                raise
            except Exception as error:  # of the libraries of any place
                if isinstance(error, FileNotFoundError) and not self._stamp:  # later on it is trouble by another name
                    raise UserError(self.url, "no such file, or no way there", "a table", "correct the URL") from None
                self._file = None
                if wait is None:
                    raise Absent(self.url, f"no way to its rows ({error})", "a Parquet file", _FIX) from error
                time.sleep(wait)
        raise AssertionError

    def _open(self) -> Any:
        import fsspec
        import pyarrow.parquet as pq

        system, path = fsspec.core.url_to_fs(self.url)
        if self._stamp:
            system.invalidate_cache()  # which would tell of the file what it was
        told = system.info(path)
        stamp = repr([str(told.get(name)) for name in _STAMPS])
        if self._stamp not in ("", stamp):
            raise UserError(self.url, "another file than before", "the file as it was", "start the run again")
        self._stamp = stamp
        # Arrow asks for what it needs, in few requests, and for no more: nothing is read ahead.
        return pq.ParquetFile(system.open(path, "rb", cache_type="none"), pre_buffer=True)


def _write(rows: Any, sink: IO[bytes]) -> None:
    import pyarrow as pa

    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)


def _make_room(new: Path, most: float) -> None:
    """Remove row groups, the one that was used longest ago first, until those left have `most` bytes; `new` stays. What
    was half written a day ago is removed, too: who wrote it is no more."""
    for half in new.parent.glob(".*"):
        with contextlib.suppress(OSError):
            if time.time() - half.stat().st_mtime > _HALF:
                half.unlink()
    found = []
    for path in new.parent.glob("*.arrow"):
        with contextlib.suppress(OSError):  # another process may have removed it
            told = path.stat()
            found.append((told.st_mtime_ns, told.st_size, path))
    left = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if left > most and path != new:
            path.unlink(missing_ok=True)
            left -= size
