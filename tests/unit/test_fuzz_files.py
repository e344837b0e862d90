"""Damaged and hostile files, by the hundred: each is read or refused in words. `scripts/fuzz_files.py` makes more."""

import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fuzz_files.py"


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_files", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("target", ["read_ecg", "tokenizer"])
def test_changed_files_are_read_or_refused(fuzz: ModuleType, target: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for files in fuzz.seeds(target):
            assert fuzz.tried(target, files, tmp_path) == "read", f"a valid file is refused: {list(files)}"
        ends = [fuzz.tried(target, fuzz.made(0, number, target), tmp_path) for number in range(150)]
    assert set(ends) == {"read", "refused"}


def test_an_input_is_made_of_the_seed_and_its_number_alone(fuzz: ModuleType) -> None:
    assert fuzz.made(3, 41, "tokenizer") == fuzz.made(3, 41, "tokenizer") != fuzz.made(3, 42, "tokenizer")


@pytest.mark.slow
def test_the_fuzzer_counts_what_it_tried_and_keeps_what_it_found(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--inputs", "60", "--seed", "5", "--keep", str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["read_ecg"] == counts["tokenizer"] == 60 and counts["read"] + counts["refused"] == 120
    assert not (tmp_path / "found").exists()


@pytest.mark.slow
def test_the_fuzzer_sees_a_crash_and_a_traceback_and_goes_on(tmp_path: Path) -> None:
    """A copy of the script whose reader does both."""
    broken = SCRIPT.read_text().replace(
        "    try:\n        if target == ",
        "    if path.stat().st_size % 7 == 3:\n        faulthandler._sigsegv()\n"
        "    if path.stat().st_size % 7 == 4:\n        raise KeyError(7)\n    try:\n        if target == ",
    ).replace('assert tried(target, files, folder) == "read"', "assert target")  # fmt: skip
    (tmp_path / "fuzz.py").write_text(broken)
    command = [sys.executable, str(tmp_path / "fuzz.py"), "--inputs", "20", "--target", "tokenizer", "--keep"]
    done = subprocess.run([*command, str(tmp_path / "found")], capture_output=True, text=True)
    said = "".join(file.read_text() for file in (tmp_path / "found").rglob("said.txt"))
    assert done.returncode == 1 and "KeyError: 7" in said and "Segmentation fault" in said
    assert json.loads(done.stdout.splitlines()[-1])["tokenizer"] == 20
