"""Damaged and hostile inputs: each is read or refused in words. `python -m scripts.fuzz` makes a million of them."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # where `scripts` lies

from scripts.fuzz import targets  # noqa: E402
from scripts.fuzz.targets import TARGETS  # noqa: E402
from scripts.fuzz.worker import try_one  # noqa: E402

CORPUS = ROOT / "tests" / "data" / "fuzz"


@pytest.fixture(autouse=True)
def quiet() -> None:
    warnings.simplefilter("ignore")


@pytest.mark.parametrize("name", TARGETS)
def test_what_once_was_found_and_all_refusals(name: str, tmp_path: Path) -> None:
    """tests/data/fuzz/TARGET/: `refused_*` reach every line that refuses; others were crashes or hangs once."""
    known = sorted((CORPUS / name).iterdir())
    assert known or name == "torch"
    for folder in known:
        paths = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: len(path.parts))
        first = next((seed for seed in map(lambda files: next(iter(files)), TARGETS[name].seeds)
                      if (folder / seed).is_file()), None)  # fmt: skip
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        if first is not None:
            files = {first: files.pop(first), **files}
        ended = try_one(TARGETS[name], files, tmp_path)
        assert ended == "refused" or not folder.name.startswith("refused"), folder


@pytest.mark.parametrize("name", TARGETS)
def test_changed_inputs_are_read_or_refused(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    if not target.seeds:
        pytest.skip("its package is not installed")
    for files in target.seeds:
        assert try_one(target, files, tmp_path) == "read", f"a valid input is refused: {list(files)}"
    count = max(10, target.share // 2500)
    assert {try_one(target, targets.made(0, number, name), tmp_path) for number in range(count)} <= {"read", "refused"}


def test_an_input_is_made_of_the_seed_and_its_number_alone() -> None:
    assert targets.made(3, 41, "ecg_byte") == targets.made(3, 41, "ecg_byte") != targets.made(3, 42, "ecg_byte")


def fuzz(tmp_path: Path, *arguments: str, code: str = "") -> tuple[int, dict[str, int], str]:
    """Exit status and counts of a run of the fuzzer, what was said of findings; `code` runs first in each process."""
    (tmp_path / "sitecustomize.py").write_text(code)
    command = [sys.executable, "-m", "scripts.fuzz", "--keep", str(tmp_path / "found"), *arguments]
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    said = "".join(file.read_text() for file in sorted((tmp_path / "found").rglob("said.txt")))
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), said


@pytest.mark.slow
def test_the_fuzzer_counts_what_it_tried_and_keeps_nothing_where_nothing_is_found(tmp_path: Path) -> None:
    status, counts, said = fuzz(tmp_path, "--target", "npy", "--target", "unpickler", "--inputs", "300")
    assert (status, said) == (0, "") and counts["inputs"] == counts["read"] + counts["refused"] == 301


BROKEN = """
import sys
if "--worker" in sys.orig_argv:
    import faulthandler, os, pathlib, resource
    import elm_jax.ecg.pickled as pickled
    sound, begun = pickled.read_pickle, pathlib.Path(__file__).with_name("begun")
    begun.write_text(begun.read_text() + "x" if begun.exists() else "x")
    crashes, hangs = len(begun.read_text()) == 1, len(begun.read_text()) == 2  # the first process, and the second

    def broken(data, start=0):
        fault = len(data) % 13 if resource.getrlimit(resource.RLIMIT_AS)[0] >= 0 else 0  # the seeds come first
        if fault == 3:
            raise KeyError(7)
        if fault == 4:
            exec("x = 1")
        if fault == 5:
            open("/etc/hostname")
        if fault == 6:
            bytes(1 << 32)
        if fault == 7:
            try:
                os.system("true")
            except BaseException:
                raise ValueError("hidden") from None
        if fault == 8 and crashes:
            faulthandler._sigsegv()
        while fault == 8 and hangs:
            pass
        return sound(data, start)

    pickled.read_pickle = broken
"""


@pytest.mark.slow
def test_the_fuzzer_sees_crashes_hangs_and_code_that_runs_and_goes_on(tmp_path: Path) -> None:
    """A reader with every fault that there can be."""
    status, counts, said = fuzz(tmp_path, "--target", "unpickler", "--inputs", "80", code=BROKEN)
    assert status == 1 and counts["inputs"] == 80
    for fault in ("KeyError: 7", "Segmentation fault", "exec (", "open ('/etc/hostname'", "MemoryError", "os.system"):
        assert fault in said, fault
    assert "status -27" in said, "a second of processor time"
