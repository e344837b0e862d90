"""What is kept to save time is never believed: whatever happens to a file of it, it is made again."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from elm_jax.config import DataConfig
from elm_jax.data.kept_features import Features, FeatureWriter
from elm_jax.data.specs import signal_spec
from elm_jax.errors import Absent, UserError
from elm_jax.folders import keep, kept, kept_in
from elm_jax.runtime.compilation import keep_compiled


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "flipped at its start": lambda data: flipped(data, 0),
    "flipped inside": lambda data: flipped(data, len(data) // 2),
    "flipped at its end": lambda data: flipped(data, len(data) - 1),
    "cut": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "longer": lambda data: data + b"\0",
    "nested": lambda data: b"[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_kept_file_that_has_changed_is_not_there_any_more(tmp_path: Path, damage: str, caplog) -> None:
    stem = tmp_path / "folder" / "a[1]*b.2"
    assert kept(stem, ".bin") is None
    path = keep(stem, ".bin", lambda file: file.write(b"what was measured"))
    keep(stem.with_name("other"), ".bin", lambda file: file.write(b"other"))
    assert kept(stem, ".bin") == path and path.read_bytes() == b"what was measured" and not caplog.text
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert kept(stem, ".bin") is None and not path.exists() and "damaged" in caplog.text
    assert keep(stem, ".bin", lambda file: file.write(b"what was measured")) == path == kept(stem, ".bin")


def test_what_is_kept_anew_takes_the_place_of_what_was(tmp_path: Path) -> None:
    keep(tmp_path / "a", ".bin", lambda file: file.write(b"1"))
    path = keep(tmp_path / "a", ".bin", lambda file: file.write(b"2"))
    assert list(tmp_path.iterdir()) == [path] == list(kept_in(tmp_path, ".bin"))


# -- an encoder's outputs


def written(folder: Path) -> Features:
    features = Features(str(folder), (2, 3), "bfloat16")
    with FeatureWriter(features, ["a", "b", "c"]) as writer:
        writer.put(np.arange(18, dtype=np.float32).reshape(3, 2, 3))
        writer.leave_out(["b"])
    return Features(str(folder), (2, 3), "bfloat16")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("ending", [".json", ".rows"])
def test_a_damaged_output_of_an_encoder_is_never_used(tmp_path: Path, damage: str, ending: str) -> None:
    written(tmp_path)
    (file,) = tmp_path.glob(f"*{ending}")
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    found = Features(str(tmp_path), (2, 3), "bfloat16")
    for name, values in (("a", np.arange(6)), ("c", np.arange(12, 18))):
        try:
            output = found.load(name)
        except UserError as error:
            assert "start the run again" in str(error)
        else:
            assert output is None or np.array_equal(output.astype(int), values.reshape(2, 3))
    again = written(tmp_path)
    assert np.array_equal(again.load("c").astype(int), np.arange(12, 18).reshape(2, 3))


def test_a_part_with_a_damaged_row_is_computed_again_at_the_next_start(tmp_path: Path) -> None:
    features = written(tmp_path)
    (file,) = tmp_path.glob("*.rows")
    file.write_bytes(DAMAGE["flipped at its end"](file.read_bytes()))
    assert features.load("a") is not None
    with pytest.raises(Absent, match="an output of the encoder that is damaged.*; start the run again"):
        features.load("c")
    assert "a" not in Features(str(tmp_path), (2, 3), "bfloat16")


def test_a_damaged_part_that_cannot_be_removed_is_told_or_not_there(tmp_path: Path, monkeypatch) -> None:
    """As in a cache that many share and one writes."""

    def refusing(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    features = written(tmp_path)
    (file,) = tmp_path.glob("*.rows")
    file.write_bytes(DAMAGE["flipped at its end"](file.read_bytes()))
    monkeypatch.setattr(Path, "unlink", refusing)
    with pytest.raises(Absent, match="remove that file, and start the run again"):
        features.load("c")
    os.remove(file)
    assert "a" not in Features(str(tmp_path), (2, 3), "bfloat16")


def test_a_recording_that_changes_while_its_time_does_not_has_another_name(tmp_path: Path) -> None:
    spec = signal_spec(DataConfig(root=str(tmp_path)), 0)
    path = tmp_path / "a.npy"
    path.write_bytes(b"1234")
    before, name, stamp = path.stat(), spec.names_of("a.npy", 0), spec.stamp("a.npy")
    path.write_bytes(b"5678")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert spec.stamp("a.npy") == stamp and spec.names_of("a.npy", 0) != name


def test_what_leaves_a_recording_as_it_is_does_not_disturb_a_run_that_goes_on(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "a.npy"
    path.write_bytes(b"1234")
    spec = signal_spec(DataConfig(root=str(tmp_path / "data")), 0)
    name, asked = spec.names_of("a.npy", 0)
    features = Features(str(tmp_path / "kept"), (2, 3), "float32", {asked: name})
    with FeatureWriter(features, [name]) as writer:
        writer.put(np.ones((1, 2, 3)))
    spec = replace(spec, features=pickle.loads(pickle.dumps(features)))
    os.link(path, tmp_path / "backup")
    assert spec.names_of("a.npy", 0)[1] == asked
    assert np.array_equal(spec.load("a.npy", 0), np.ones((2, 3)))
    path.write_bytes(b"12345")
    with pytest.raises(UserError):
        spec.load("a.npy", 0)


# -- compiled programs


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_program_is_compiled_again_and_kept_anew(tmp_path: Path, damage: str, caplog) -> None:
    from jax._src import compilation_cache

    keep_compiled()
    cache, _ = compilation_cache.get_file_cache(str(tmp_path))
    assert cache.get("jit_f-1") is None
    cache.put("jit_f-1", b"a program")
    cache.put("jit_f-12", b"another")
    assert cache.get("jit_f-1") == b"a program"
    (file,) = tmp_path.glob("jit_f-1.*")
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert cache.get("jit_f-1") is None
    assert "compiled again" in caplog.text
    cache.put("jit_f-1", b"a program")
    assert cache.get("jit_f-1") == b"a program" and cache.get("jit_f-12") == b"another"


def test_programs_are_kept_wherever_jax_keeps_them(tmp_path: Path) -> None:
    from jax._src import compilation_cache

    class Bucket(type(tmp_path)):
        """A folder that only its own methods reach, as one of a cloud."""

        def glob(self, pattern: str) -> Iterator[Path]:
            return iter([self / file.name for file in tmp_path.glob(pattern)])

        def read_bytes(self) -> bytes:
            return (tmp_path / self.name).read_bytes()

        def exists(self) -> bool:
            return (tmp_path / self.name).exists()

        def unlink(self, missing_ok: bool = False) -> None:
            (tmp_path / self.name).unlink(missing_ok)

    keep_compiled()
    cache, _ = compilation_cache.get_file_cache(str(tmp_path))
    cache.put("jit_f-1", b"a program")
    cache.path = Bucket("/no-folder-of-this-machine")
    assert cache.get("jit_f-1") == b"a program"
    (file,) = tmp_path.glob("jit_f-1.*")
    file.write_bytes(b"another")
    assert cache.get("jit_f-1") is None and not file.exists()
