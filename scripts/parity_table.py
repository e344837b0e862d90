"""Write docs/parity.md: how far each number of the reference is from ours, out of the parity tests themselves.

    python scripts/parity_table.py               runs all parity tests (about ten minutes on two cores) and writes
    python scripts/parity_table.py --from FILE   writes from the measurements of an earlier run (ELM_JAX_PARITY=FILE)
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "parity.md"
HEAD = """\
# Parity with the reference

Each golden holds inputs and outputs of the PyTorch reference. For each quantity of a golden that the tests compare, the
table has the one that comes nearest to its bound. An error is the largest difference over the largest value expected;
where a count is compared, the bound is 0 and any difference fails. `scripts/parity_table.py` writes this page out of
the tests' own comparisons; it was measured with {versions}, in float32.

A bound looser than 1e-5 (outputs) or 1e-4 (gradients) has its reason beside it in the test; those of the training runs
(`e2e_*` with a run's name) are the goldens' own. What is compared exactly, as metrics, rewards, texts and tables are,
stands in the tests alone.

| golden | compared | nearest to its bound | error | bound |
| --- | ---: | --- | ---: | ---: |
"""


def main() -> int:
    """Run the tests, or read what they measured, and write the page; the exit status of the tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="measured", type=Path, metavar="FILE", help="measurements, as JSON lines")
    options = parser.parse_args()
    status = 0
    if options.measured is None:
        options.measured = Path(tempfile.mkdtemp()) / "parity.jsonl"
        status = measure(options.measured)
    PAGE.write_text(page(json.loads(line) for line in options.measured.read_text().splitlines()), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} is written from {options.measured}", file=sys.stderr)
    return status


def measure(path: Path) -> int:
    """Run the tests that compare with goldens; their comparisons go to `path`."""
    tests = sorted(str(file) for file in (ROOT / "tests").rglob("test_*.py") if "parity_log" in file.read_text())
    environment = {**os.environ, "ELM_JAX_PARITY": str(path)}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", *tests]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def page(lines: Iterable[dict[str, Any]]) -> str:
    """The page of these measurements."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        found[line["golden"]].append(line)
    rows = []
    for golden in sorted(found):
        worst = max(found[golden], key=_nearness)
        quantities = len({line["quantity"] for line in found[golden]})
        error, bound = (f"{worst[name]:.1e}" if worst[name] else "0" for name in ("error", "bound"))
        rows.append(f"| {golden} | {quantities} | {worst['quantity']} | {error} | {bound} |")
    versions = f"jax {version('jax')}, flax {version('flax')}, Python {platform.python_version()}"
    return HEAD.format(versions=versions) + "\n".join(rows) + "\n"


def _nearness(line: dict[str, Any]) -> float:
    return line["error"] / line["bound"] if line["bound"] else float(line["error"] > 0)


if __name__ == "__main__":
    sys.exit(main())
