"""The house has floors: a room imports from those below it alone, inside functions too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "elm_jax"
# From below. A room is a folder or a file of the package; rooms of one floor do not know each other.
FLOORS = (
    "errors",
    "compat json_text registry stopping",
    "schema folders",
    "ecg",  # recordings: files, units, rates, leads, images, measurements
    "text elms",  # conversations: strings and ids; how an ECG enters a model
    "symbols",  # ECG-Byte
    "scoring",  # strings to numbers
    "pictures",
    "keys",  # of the configuration
    "config",
    "cli",
    "data",  # records to batches on the host
    "models",
    "objectives",
    "runtime",  # mesh, processes, telemetry
    "weights",
    "retrieval",  # recordings like an ECG
    "assemble",  # from a config to structure and specs
    "run",  # a run's folder
    "inference",
    "exchange",  # PyTorch's files, both ways
    "training",
    "evaluation",
    "planning",
    "doctoring",
    "loaded",  # a trained model as one object
    # commands
    "analyze chat compare configs doctor ecg_byte evaluate export import_weights index measure pairs plan prepare "
    "probe train",
    "__main__",  # all of them by one name
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
PURE = ("config", "ecg", "text", "symbols", "scoring")  # which import no jax, and can be lent out alone


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """Line and room of each import of the package in a file; the package itself, which names its API, is no room."""
    for node in ast.walk(ast.parse(file.read_text())):
        modules: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write the whole name"
            of_package = node.module == "elm_jax"
            modules = [f"elm_jax.{alias.name}" for alias in node.names] if of_package else [str(node.module)]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            package, _, room = module.partition(".")
            if package == "elm_jax" and room and room != "_bpe":
                yield node.lineno, room.partition(".")[0]


def rooms() -> Iterator[tuple[Path, str]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        first = file.relative_to(PACKAGE).parts[0]
        if first != "__init__.py":
            yield file, first.removesuffix(".py")


def test_every_room_has_its_floor() -> None:
    assert {room for _, room in rooms()} == set(FLOOR)


def test_a_room_imports_from_the_floors_below_alone() -> None:
    upward = [
        f"{file.relative_to(ROOT)}:{line}: {room} imports from {other}"
        for file, room in rooms()
        for line, other in imported(file)
        if other != room and (FLOOR[other] >= FLOOR[room]) and room != "configs"  # a config may build on another
    ]
    assert not upward, "\n".join(upward)


def test_the_pure_rooms_import_no_jax() -> None:
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file, room in rooms()
        if room in PURE
    ]
    code = f"import sys, importlib\nfor name in {modules!r}:\n    importlib.import_module(name)\n"
    code += "found = {'jax', 'flax', 'torch'} & set(sys.modules)\nassert not found, found"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
