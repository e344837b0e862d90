"""Environment and fixtures of all tests; runs before any test module imports jax."""

import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import compiling
import goldens
import pytest
import warm
from hypothesis import settings

from elm_jax.runtime.compilation import keep_compiled

FAKE_DEVICES = 8
ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={FAKE_DEVICES} {compiling.FLAGS}"
).strip()
os.environ["HF_HUB_OFFLINE"] = "1"
# Compiled programs are shared between tests, between the processes they start, and with the next run of any clone.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiling.cache()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

# Properties promise results, not speed: on a busy machine a stall of 0.2 s in one example is no failure.
settings.register_profile("elm_jax", deadline=None)
settings.load_profile("elm_jax")


SLOW = 40  # a slow test takes as long as so many quick ones, about


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first, so that the two processes end together: each file is one process's alone."""
    longest = Counter[Path]()
    for item in items:
        longest[item.path] += SLOW if item.get_closest_marker("slow") else 1
    items.sort(key=lambda item: -longest[item.path])


def pytest_collection_finish() -> None:
    """What is imported is not looked through again by each collection of garbage, a tenth of the time of what traces;
    and programs are kept as commands keep them, so that each finds what the other has compiled."""
    if "jax" in sys.modules:
        keep_compiled()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*warm.COLLECTED)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The slowest parts of tests, in a file: whoever makes the suite slower sees it at the head."""
    reports = [r for found in terminalreporter.stats.values() for r in found if isinstance(r, pytest.TestReport)]
    reports.sort(key=lambda report: -report.duration)
    lines = [f"{r.duration:7.1f} s {r.when:<8} {r.nodeid}\n" for r in reports[:60]]
    cache = config.rootpath / ".pytest_cache"
    cache.mkdir(exist_ok=True)
    (cache / "durations.txt").write_text("".join(lines), encoding="utf-8")


MAPPINGS = 30_000  # Linux allows a process 65 530, and ends it inside LLVM where there are no more


@pytest.fixture(autouse=True)
def few_programs() -> Iterator[None]:
    """Compiled programs are let go before there are too many: each keeps some mappings of memory (a mesh of 8: 100)."""
    begun = time.perf_counter()
    yield
    maps = Path("/proc/self/maps")
    if "jax" not in sys.modules or time.perf_counter() - begun < 0.1 or not maps.exists():
        return  # counting takes milliseconds, and what was quick compiled little
    if maps.read_bytes().count(b"\n") > MAPPINGS:
        sys.modules["jax"].clear_caches()
        gc.collect()


def shared_folder() -> Path:
    """The folder with reference data (`goldens.shared`).

    Where it is absent the test is skipped, except in CI (CI=true), where nothing may go untested unnoticed.
    """
    path = goldens.shared()
    if not path.is_dir():
        reason = f"no reference data at {path}; set ELM_JAX_SHARED to the folder that has golden/ and real/"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with reference data (golden/, real/); skips where it is absent, fails in CI."""
    return shared_folder()


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """golden(name): the folder of a golden (`goldens.find`); skips or fails as `shared` does where there is none."""

    def find(name: str) -> Path:
        folder = goldens.find(name)
        if not folder.is_dir():
            shared_folder()
        assert folder.is_dir(), f"there is no golden called {name!r}: {folder} does not exist"
        return folder

    return find
