"""A checkpoint counts when it is verified; whatever is damaged afterwards is found, and an older one is taken."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from elm_jax import stopping
from elm_jax.errors import UserError
from elm_jax.folders import read_json, write_atomic, write_json
from elm_jax.run import verification
from elm_jax.run.arrays import SavedArrays, save_arrays
from elm_jax.run.checkpoint import DAMAGED, META, Checkpoints
from elm_jax.run.fingerprints import summary_of
from elm_jax.runtime import distributed

LIST = "checksums-0-of-1.json"


def items(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    trained = {n: jnp.asarray(rng.normal(size=(8, 16)), jnp.float32) for n in ("connector.w", "llm.w")}
    return {
        "trained": trained,
        "statistics": {"encoder.mean": jnp.asarray(rng.normal(size=4), jnp.bfloat16)},
        "optimizer": optax.chain(optax.clip(1.0), optax.adamw(lambda step: 0.1 * step)).init(trained),
    }


def a_run(folder: Path, *steps: int, count: int = 5, best: int | None = None) -> Path:
    """A run's folder with checkpoints of these steps; their arrays are `items(step)`."""
    writer = Checkpoints(folder, count)
    for step in steps:
        writer.save(step, items(step), {"history": {"val_losses": [1.0, float("nan")]}}, best)
    writer.close()
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_run(tmp_path_factory.mktemp("made") / "run", 3, 6, 9, best=6)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def step_of(folder: Path, step: int = 9) -> Path:
    return folder / "checkpoints" / str(step)


@contextmanager
def opened(folder: Path, read_only: bool = True) -> Iterator[Checkpoints]:
    reader = Checkpoints(folder, 5, read_only)
    yield reader
    reader.close()


def found(folder: Path, which: str = "latest", read_only: bool = True) -> int | None:
    with opened(folder, read_only) as reader:
        return reader.find(which)


def an_array_file(step: Path, item: str = "trained") -> Path:
    return max((step / item / "d").iterdir(), key=lambda path: path.stat().st_size)


def flip(path: Path, place: int = -20) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def without_lists(step: Path) -> None:
    """As a run leaves it that was killed between writing it and listing its files."""
    (step / LIST).unlink()


def of_an_older_version(step: Path) -> None:
    without_lists(step)
    meta = {name: x for name, x in read_json(step / META).items() if name not in ("sums", "checksum", "version")}
    write_json(step / META, meta)


def test_what_is_saved_is_verified_and_what_was_verified_is_taken(folder: Path, capsys: Any) -> None:
    files = verification.listed(step_of(folder))
    on_disk = {str(p.relative_to(step_of(folder))) for p in step_of(folder).rglob("*") if p.is_file()}
    assert files.keys() == on_disk - {LIST} and META in files
    sums = read_json(step_of(folder) / META)["sums"]
    leaves = jax.tree.leaves(items(9))
    assert len(sums) == len(leaves) and sums["optimizer/1.0.mu.llm.w"].startswith("float32:(8, 16):")
    value = np.asarray(items(9)["statistics"]["encoder.mean"])
    assert sums["statistics/encoder.mean"] == f"bfloat16:{summary_of(value, value.dtype)}"
    assert (found(folder), found(folder, "best"), found(folder, "3")) == (9, 6, 3)
    with opened(folder, read_only=False) as writer:
        assert writer.find() == 9
        restored = writer.restore(9, items(0))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(restored), leaves, strict=True))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda step: flip(an_array_file(step)), "trained/.* has other content than was written"),
        (lambda step: an_array_file(step).write_bytes(b""), "trained/.* has 0 bytes in place of "),
        (lambda step: (step / META).unlink(), "meta/metadata is gone"),
        (lambda step: shutil.rmtree(step / "trained"), "trained/.* is gone"),
        (lambda step: (shutil.rmtree(step), (step / "meta").mkdir(parents=True)), "meta/metadata: .*No such file"),
    ],
)  # fmt: skip
def test_the_next_older_one_is_taken_and_that_is_said(
    folder: Path, capsys: Any, damage: Callable[[Path], Any], says: str
) -> None:
    damage(step_of(folder))
    assert found(folder) == 6
    said = capsys.readouterr().err

    assert re.fullmatch(rf"warning: \S*/checkpoints: checkpoint 9 is damaged \({says}\S*.*\); step 6 is taken\n", said)
    with pytest.raises(UserError, match=r"checkpoint 9 is damaged .*name another step"):
        found(folder, "9")
    assert found(folder, "best") == 6 and step_of(folder).exists()
    # Who trains goes back for good: what is in its way later is moved aside.
    assert found(folder, read_only=False) == 6
    assert (folder / DAMAGED / "9").is_dir() and not step_of(folder).exists()
    a_run(folder, 9)
    assert found(folder) == 9


def test_readers_of_the_model_do_not_mind_a_damaged_optimizer(folder: Path) -> None:
    flip(an_array_file(step_of(folder), "optimizer"))
    assert found(folder) == 9 and found(folder, read_only=False) == 6


def test_a_damaged_best_one_is_replaced_by_the_latest(folder: Path, capsys: Any) -> None:
    flip(an_array_file(step_of(folder, 6)))
    assert found(folder, "best") == 9
    assert "checkpoint 6 is damaged" in capsys.readouterr().err


def test_none_is_whole(folder: Path) -> None:
    for step in (3, 6, 9):
        flip(an_array_file(step_of(folder, step)))
    with pytest.raises(UserError, match=r"checkpoint 9 .*; checkpoint 6 .*; checkpoint 3 .*put one back from a copy"):
        found(folder, read_only=False)
    assert step_of(folder).exists() and not (folder / DAMAGED).exists()


def test_one_that_was_not_verified_yet_is_verified_now(folder: Path, capsys: Any) -> None:
    without_lists(step_of(folder))
    assert found(folder) == 9 and not (step_of(folder) / LIST).exists()
    assert found(folder, read_only=False) == 9 and verification.listed(step_of(folder))
    (step_of(folder) / LIST).write_text("{")
    assert found(folder, read_only=False) == 9 and verification.listed(step_of(folder))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: flip(an_array_file(step)),
        lambda step: an_array_file(step).unlink(),
        lambda step: (step / META).write_text((step / META).read_text().replace('"step": 9', '"step": 8')),
        lambda step: (shutil.rmtree(step / "trained"), (step.with_name("6") / "trained").rename(step / "trained")),
    ],
)  # fmt: skip
def test_one_that_was_not_verified_and_is_damaged_is_found_by_its_values(
    folder: Path, damage: Callable[[Path], Any]
) -> None:
    without_lists(step_of(folder))
    damage(step_of(folder))
    assert found(folder) == found(folder, read_only=False) in (3, 6)


def test_one_of_an_older_version_is_taken_with_a_word(folder: Path, capsys: Any) -> None:
    of_an_older_version(step_of(folder))
    assert found(folder) == 9
    assert "kept no checksums" in capsys.readouterr().err
    an_array_file(step_of(folder)).write_bytes(b"")
    (step_of(folder) / "trained" / "manifest.ocdbt").write_bytes(b"")
    assert found(folder) == 6


def test_what_does_not_belong_there_does_no_harm(folder: Path, capsys: Any) -> None:
    place = folder / "checkpoints"
    (place / "7").mkdir()
    (place / "15").write_text("a file")
    (place / "notes").mkdir()
    (place / "007").mkdir()
    (place / "9" / "notes.txt").write_text("mine")
    (place / "18.orbax-checkpoint-tmp").mkdir()
    assert found(folder) == found(folder, read_only=False) == 9 and capsys.readouterr().err == ""
    assert not (place / "18.orbax-checkpoint-tmp").exists() and (place / "notes").exists()
    a_run(folder, 12, 15)
    assert found(folder) == 15 and (folder / DAMAGED / "15").read_text() == "a file"


def test_a_newest_folder_without_files_is_told(folder: Path, capsys: Any) -> None:
    step_of(folder, 12).mkdir()
    assert found(folder, read_only=False) == 9
    assert "checkpoint 12 is damaged (its folder is empty); step 9 is taken" in capsys.readouterr().err
    assert (folder / DAMAGED / "12").is_dir()


def _raises(number: int) -> Any:
    def fails(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fails


def test_a_newest_folder_that_cannot_be_listed_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    listing, step, fails = Path.iterdir, step_of(folder), _raises(errno.EACCES)
    monkeypatch.setattr(Path, "iterdir", lambda path: fails() if path == step else listing(path))
    assert found(folder) == 6
    assert "checkpoint 9 is damaged (its folder cannot be listed: Permission denied)" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_a_damage(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    without_lists(step_of(folder))
    monkeypatch.setattr(verification, "_size_and_checksum", _raises(errno.EIO))
    with opened(folder, read_only=False) as writer, pytest.raises(UserError, match="damaged"):
        writer.find("9")
    monkeypatch.undo()
    reads = verification._size_and_checksum

    def reads_others(path: Path) -> Any:
        return _raises(errno.EIO)() if "9" in path.parts else reads(path)

    monkeypatch.setattr(verification, "_size_and_checksum", reads_others)
    assert found(folder, read_only=False) == 6
    assert re.search(r"checkpoint 9 is damaged \(\S+ cannot be read: Input/output error\)", capsys.readouterr().err)


def test_a_step_that_one_process_does_not_see_is_waited_for_and_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here process 1 is one that sees nothing, first for three looks, then for ever."""
    def gather(value: Any) -> list[Any]:
        if value is not True:
            return [value, "is gone" if value == "" and len(looks) < late else value]
        looks.append(value)
        return [value, len(looks) >= late]

    monkeypatch.setattr(distributed, "gather", gather)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    looks, late = list[bool](), 3
    assert found(folder) == 9 and len(looks) == 3
    looks, late = [], 10**6
    with pytest.raises(UserError, match="checkpoint 9, which process 1 does not see"):
        found(folder)


def test_it_tells_that_verifying_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(stopping, "doing", told.append)
    found(folder)
    assert len(told) >= len(verification.listed(step_of(folder)))
    without_lists(step_of(folder))
    told.clear()
    found(folder, read_only=False)
    assert len(told) >= len(read_json(step_of(folder) / META)["sums"])


def test_the_last_verified_one_is_never_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the third save comes back with other values: with one to keep, the second stays."""
    folder = a_run(tmp_path / "run", 3, 6, count=1, best=3)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"3", "6"}
    monkeypatch.setattr(verification, "summary_of", lambda *_: "(8, 16):0")
    writer = Checkpoints(folder, 1)
    writer.find()
    writer.save(9, items(9), {}, 3)
    with pytest.raises(UserError, match=r"checkpoints/9: .*comes back with other values.*of step 6 is whole"):
        writer.wait()
    writer.close()
    monkeypatch.undo()
    assert found(folder) == 9  # it was written well, only read badly
    assert found(folder, "6") == 6 and found(folder, "best") == 3


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Writing more than `size` bytes to a file fails, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 100, 600])
def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(folder: Path, room: int, capfd: Any) -> None:
    writer = Checkpoints(folder, 1)
    assert writer.find() == 9
    fails = pytest.raises(UserError, match=r"checkpoints/12: .*could not be saved: .*of step 9 is whole")
    with no_file_beyond(room), fails:
        writer.save(12, items(12), {"history": "x" * 1000})
        writer.wait()
    writer.close()
    for thread in threading.enumerate():
        if type(thread) is not threading.Thread and thread is not threading.main_thread() and not thread.daemon:
            threading.Thread.join(thread, 60)  # its own raises what it met
            assert not thread.is_alive()
    assert capfd.readouterr().err == ""
    assert found(folder) == 9
    a_run(folder, 12)
    assert found(folder) == 12


def test_no_room_for_the_list_is_told_in_the_same_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Checkpoints(folder, 1)
    writer.find()

    def full(path: Path, _: Any) -> None:
        raise UserError(path / LIST, "No space left on device", "", "")

    monkeypatch.setattr(verification, "write_list", full)
    writer.save(12, items(12), {})
    with pytest.raises(UserError, match=r"checkpoints/12: .*No space left.*of step 9 is whole"):
        writer.close()
    monkeypatch.undo()
    assert found(folder) == found(folder, read_only=False) == 12  # its values are right


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match="run/checkpoints: .*a folder that can be written"):
        Checkpoints(tmp_path / "run")


@pytest.mark.parametrize("name", ["inherited", "reference"])
def test_arrays_that_are_saved_once_are_verified_too(tmp_path: Path, name: str) -> None:
    folder, arrays = tmp_path / name, {"encoder.w": jnp.arange(24.0).reshape(4, 6)}
    save_arrays(folder, arrays)  # what this compiles is kept
    shutil.rmtree(folder)
    with no_file_beyond(10), pytest.raises(UserError, match=f"{name}: found arrays that could not be saved"):
        save_arrays(folder, arrays)
    assert not folder.exists()
    save_arrays(folder, arrays)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    np.testing.assert_array_equal(SavedArrays(folder).arrays(["encoder.w"])["encoder.w"], arrays["encoder.w"])
    for path in [path for path in folder.rglob("*") if path.is_file() and path.name != LIST]:
        kept = path.read_bytes()
        flip(path, len(kept) // 2) if kept else path.write_bytes(b"x")
        with pytest.raises(UserError, match=f"{name}: found {path.relative_to(folder)} has .*put the folder back"):
            SavedArrays(folder)
        path.write_bytes(kept)
    (folder / LIST).unlink()  # as folders of older versions are
    assert SavedArrays(folder).shapes == {"encoder.w": (4, 6)}


def test_who_cannot_save_waits_for_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are inside the library then, and only the end of this process ends them."""
    gathered: list[Any] = []
    monkeypatch.setattr(distributed, "gather", lambda value: [gathered.append(value)])
    with no_file_beyond(10), pytest.raises(UserError, match="arrays that could not be saved"):
        save_arrays(tmp_path / "reference", {"encoder.w": jnp.arange(24.0)})
    assert gathered == [None], "before it began"


def test_who_brings_a_problem_does_not_wait_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    brought: list[tuple[str, str]] = []
    client = SimpleNamespace(key_value_set=lambda *of: brought.append(of), blocking_key_value_get=lambda *_: 1 / 0)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("jax._src.distributed.global_state.client", client)
    assert distributed.exchange("9", "a full disk") == ["a full disk"] and brought == [("elm_jax/9/0", "a full disk")]
    with pytest.raises(ZeroDivisionError):
        distributed.exchange("9", "")


def test_a_file_that_cannot_be_moved_to_its_place_is_an_error_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "DONE").mkdir()
    with pytest.raises(UserError, match="DONE"):
        write_json(tmp_path / "DONE", {})
    with no_file_beyond(3), pytest.raises(UserError, match="kept: .*File too large"):
        write_atomic(tmp_path / "kept", lambda file: file.write(b"four"))
    assert [path.name for path in tmp_path.iterdir()] == ["DONE"]
