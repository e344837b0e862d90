"""Files and folders that results go to, which appear whole or not at all; and where things lie in a run's folder."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TextIO

import xxhash

from elm_jax.errors import UserError, one_line, printable, refused
from elm_jax.json_text import parse_json

TOKENIZER, ECG_BYTE = "tokenizer", "ecg_byte.json"  # a run's own; the second, if the run has it, lies in the first
CONFIG = "config.json"  # of a run
FACTS = "elm.json"  # of an export: what it says of itself
_SEAL, _LIST, _VERSION = "checksum", "checksums.json", 1
PICTURES = (".png", ".svg", ".pdf")
MOST_JSON = 64 << 20  # bytes of a file that says how something is made: far above the index of the largest model
_log = logging.getLogger(__name__)
LOCK = ".lock"  # held while a process writes into the folder; what it says of whom counts only then
_claimed: dict[Path, TextIO] = {}


def claim_folder(folder: Path, alone: str = "start no second training in it") -> str:
    """Lock the folder; who has locked it, if somebody has. The lock is the system's and ends with the process.

    `alone`: what users are to do where the file system has no locks.
    """
    if folder.resolve() in _claimed:  # closing the file a second time would give the lock away
        return ""
    file = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        with file:
            file.seek(0)
            return one_line(file.read())[:80] or "another process"
    except OSError as error:
        warning = f"warning: {folder} cannot be locked ({error}): {alone}"
        print(printable(warning), file=sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _claimed[folder.resolve()] = file
    return ""


def leave_folder(folder: Path) -> None:
    """Let others write into the folder."""
    if folder.resolve() in _claimed:
        _claimed.pop(folder.resolve()).close()


def writable_folder(out: Path, where: str) -> Path:
    """`out`, made where it was missing. Raises UserError, which names `where`, unless files can be written there."""
    check_writable(out, where)
    out.mkdir(parents=True, exist_ok=True)
    return out


def check_writable(out: Path, where: str) -> None:
    """Raise UserError, which names `where`, unless `out` is a folder that can be written, or can be made one."""
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    with refused(where, "", "a folder that can be written", "name another", OSError):
        tempfile.TemporaryFile(dir=there).close()


def check_picture(file: Path, where: str, inputs: Sequence[str | Path] = ()) -> None:
    """Raise UserError, which names `where`, unless `file` is a picture by its ending, in a folder that is there and can
    be written, and none of `inputs`."""
    if file.suffix.lower() not in PICTURES:
        raise UserError(where, file.name, f"a file of {', '.join(PICTURES)}", "correct its ending")
    if any(os.path.exists(one) and os.path.exists(file) and os.path.samefile(one, file) for one in inputs):
        raise UserError(where, file.name, "a file that is not read", "name another")
    if not file.absolute().parent.is_dir():
        raise UserError(where, f"no folder {file.parent}", "a file in a folder that is there", "make the folder")
    check_writable(file.absolute().parent, where)


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, to be filled; at the end it takes the place of `out`, and of what was there.

    An exception leaves `out` as it was. Raises UserError where files cannot be written.
    """
    with refused("--out", "", "a folder that can be written", "name another, or make room", OSError):
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        old = fresh.with_name(f"{fresh.name}.old")
        try:
            yield fresh
            fresh.chmod(0o777 & ~_umask())
            if out.exists():
                out.rename(old)
            fresh.rename(out)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            if out.exists():
                shutil.rmtree(old, ignore_errors=True)
            elif old.exists():
                old.rename(out)


def write_atomic(
    path: Path,
    write: Callable[[IO[bytes]], Any],
    where: Path | None = None,
    expected: str = "a place to write to",
    fix: str = "name another, or make room",
    lasting: bool = False,
) -> None:
    """`write` into a file beside `path`, then rename it: nobody ever sees half of it. A `lasting` one is on the disk
    itself when this returns: it outlives a loss of power.

    Raises UserError, naming `where` (None: the path), where files cannot be written.
    """
    with refused(where or path, "", expected, fix, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                if lasting:
                    file.flush()
                    os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        if lasting:
            _keep_names(path.parent)


def another(file: IO[bytes]) -> IO[bytes]:
    """A second handle of a file that is being written: it may be closed, and the first goes on behind it."""
    return os.fdopen(os.dup(file.fileno()), "wb")


def _keep_names(folder: Path) -> None:
    """Have what the files of a folder are called on the disk itself, where its file system can do that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_regular(path: Path, expected: str, fix: str = "check the path") -> None:
    """Raise UserError for what is there and is no file: a pipe would be waited for, a device has no end."""
    if os.path.exists(path) and not os.path.isfile(path):  # which raise nothing, however long the name is
        raise UserError(path, "a folder" if os.path.isdir(path) else "no regular file", expected, fix)


def read_regular(path: Path, expected: str, fix: str, most: int | None = None) -> bytes:
    """What a file holds. Raises UserError for what is no file, cannot be read, or has more than `most` bytes."""
    check_regular(path, expected, fix)
    with refused(path, "no readable file", expected, fix):
        size = path.stat().st_size
        if most is not None and size > most:
            raise UserError(path, f"{size} bytes", f"at most {most}", fix)
        return path.read_bytes()


def keep(
    stem: Path, ending: str, write: Callable[[IO[bytes]], Any], expected: str = "a place to write to",
    fix: str = "name another, or make room",
) -> Path:  # fmt: skip
    """Write what can be made again to a file whose name is that of `stem`, then a checksum of what it holds, then
    `ending`: only `kept` finds it. Raises UserError, naming the folder, where it cannot be written."""
    half = stem.with_name(f".{stem.name}.{uuid.uuid4().hex}")
    write_atomic(half, write, stem.parent, expected, fix)
    whole = half.replace(stem.with_name(f"{stem.name}-{file_checksum(half)}{ending}"))
    for other in set(stem.parent.glob(f"{glob.escape(stem.name)}-*{ending}")) - {whole}:
        other.unlink(missing_ok=True)
    return whole


def kept(stem: Path, ending: str) -> Path | None:
    """The file that `keep` has left for `stem`, where there is one that is whole."""
    return next(kept_in(stem.parent, ending, stem.name), None)


def kept_in(folder: Path, ending: str, name: str | None = None) -> Iterator[Path]:
    """The files that `keep` has left, of all stems or of the one called `name`. One that has changed since is removed,
    and the log says so."""
    for path in sorted(folder.glob(f"{'*' if name is None else glob.escape(name)}-*{ending}")):
        with contextlib.suppress(OSError):
            if path.is_file() and path.name.removesuffix(ending).rpartition("-")[2] == file_checksum(path):
                yield path
                continue
            _log.warning("%s is damaged: what it held is made again", path)
            path.unlink(missing_ok=True)


def file_checksum(path: Path) -> str:
    """Of a file's content. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def seal(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its own checksum, which `sealed` looks at."""
    whole = {**facts, "version": _VERSION}
    return {**whole, _SEAL: _checksum_of(whole)}


def sealed(facts: Mapping[str, Any]) -> bool:
    """Whether a JSON object is as `seal` made it."""
    rest = {name: value for name, value in facts.items() if name != _SEAL}
    return facts.get("version") == _VERSION and facts.get(_SEAL) == _checksum_of(rest)


def _checksum_of(facts: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


def write_checksums(folder: Path) -> None:
    """List the files of a folder with their checksums, in it, for `check_checksums`."""
    found = {path.name: file_checksum(path) for path in sorted(folder.iterdir()) if path.is_file()}
    write_json(folder / _LIST, seal({"files": found}))


def check_checksums(folder: Path) -> None:
    """Raise UserError where a file of a folder is not as `write_checksums` found it, if there is such a list."""
    if not os.path.exists(folder / _LIST):
        return
    fix = f"put the folder back from a copy, or remove {_LIST} if you changed it yourself"
    facts = read_json(folder / _LIST, fix)
    files = facts.get("files")
    if not sealed(facts) or not isinstance(files, dict) or not all(Path(name).name == name for name in files):
        raise UserError(folder / _LIST, "other content than was written", "checksums of the files beside it", fix)
    for name, checksum in files.items():
        check_regular(folder / name, "a file", fix)
        there = os.path.isfile(folder / name)
        with refused(folder / name, "an unreadable file", "the file as it was", fix):
            if not there or file_checksum(folder / name) != checksum:
                found = "other content than was written" if there else "no file"
                raise UserError(folder / name, found, "the file as it was", fix)


def write_run_config(folder: Path, tree: Mapping[str, Any]) -> None:
    """Leave a run's configuration in its folder. Raises UserError where it cannot be written."""
    write_json(folder / CONFIG, seal(tree))


def read_run_config(folder: Path) -> dict[str, Any]:
    """A run's configuration, as `write_run_config` left it; older versions left no checksum. Raises UserError."""
    fix = f"put it back from a copy; what was changed by hand counts without the key {_SEAL}"
    facts = read_json(folder / CONFIG, fix)
    if _SEAL in facts and not sealed(facts):
        raise UserError(folder / CONFIG, "other content than the run wrote", "the configuration of the run", fix)
    return {name: value for name, value in facts.items() if name not in (_SEAL, "version")}


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON; who reads, is stopped or loses power meanwhile finds the old file or the new one. Raises
    UserError."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    data = text.encode(errors="backslashreplace")  # JSON's own escape, for what the names of files have and no text
    write_atomic(path, lambda file: file.write(data), lasting=True)


def read_json(path: Path, fix: str = "check the folder") -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, which names the file and `fix`, for anything else."""
    data = read_regular(path, "a JSON file", fix, MOST_JSON)
    with refused(path, "", "a JSON file", fix):
        value = parse_json(data)
    if not isinstance(value, dict):
        raise UserError(str(path), type(value).__name__, "a JSON object", fix)
    return value


def json_if_whole(path: Path) -> dict[str, Any]:
    """`read_json`, or an empty object where the file is not there, or is being written."""
    with contextlib.suppress(UserError):
        return read_json(path)
    return {}


def json_lines(path: Path, fix: str) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none where there is no file. A last line that is still being written, or
    was cut short, is left out. Raises UserError, naming the line, for anything else."""
    if not path.exists():
        return []
    data = read_regular(path, "a file of JSON lines", "check the folder")
    found = list(whole_lines(data))
    rest = data[found[-1][1] if found else 0 :]
    if b"\n" in rest:
        line = rest.partition(b"\n")[0].decode(errors="replace")
        raise UserError(f"{path}, line {len(found) + 1}", repr(line[:60]), "a JSON object", fix)
    return [line for line, _ in found]


def whole_lines(data: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """The objects of JSON lines up to the first that is none, each with the place of its end."""
    end = 0
    for line in data.splitlines(keepends=True):
        try:
            value = parse_json(line) if line.endswith(b"\n") else None
        except ValueError:
            return
        if not isinstance(value, dict):
            return
        end += len(line)
        yield value, end


def run_folder(path: str, where: str) -> Path:
    """A folder that holds a run. Raises UserError, naming `where`, otherwise."""
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        raise UserError(
            where, f"{path} without config.json", "a run folder", "give the workdir of a training run"
        )
    return folder


def tokenizer_of(source: str) -> Path:
    """The folder of the tokenizer of the run folder `source`, which another run starts from.

    Raises:
        UserError: no run there, or one without a tokenizer.
    """
    folder = run_folder(source, "config.init_from") / TOKENIZER
    if not (folder / "tokenizer.json").is_file():
        found = f"{source} without {TOKENIZER}/tokenizer.json"
        raise UserError("config.init_from", found, "a trained run", "restore its tokenizer, or train it again")
    return folder
