"""Say what works here, what does not, and the command that mends it.

    python -m elm_jax.doctor
    python -m elm_jax.doctor --json findings.json

Each line is the result of a test made just then: `ok`, `note` (worth knowing) or `FAIL`, with a command that
mends it below. It takes about half a minute. Exit status: 0 if nothing failed, else 1.
"""

# Imports nothing but Python's own modules: it must be able to say that the others are missing.
import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import NoReturn

from elm_jax.doctoring import checks, trials
from elm_jax.doctoring.checks import FAIL, NOTE, Finding


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: command line: {message}; run {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Check, print, write the JSON file if asked for; the exit status."""
    parser = _Parser(
        prog="python -m elm_jax.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the findings to a file too")
    parser.add_argument("--debug", action="store_true", help="taken, as by all commands; there is no more to show")
    path = parser.parse_args(argv).json
    if path and (path.is_dir() or not path.absolute().parent.is_dir()):
        parser.error(f"--json: {path} is a folder" if path.is_dir() else f"--json: no folder {path.parent}")
    return report(chain(checks.examine(checks.HOST_CHECKS), trials.findings()), path)


def report(findings: Iterable[Finding], path: Path | None) -> int:
    """Print the findings as they come, and write them to `path`: 1 if one of them is FAIL, else 0.

    The file holds `{"ok": bool, "findings": [{"check", "status", "text", "mend"}]}`.
    """
    found = []
    for finding in findings:
        print(finding, flush=True)
        found.append(finding)
    failed, notes = (sum(finding.status == status for finding in found) for status in (FAIL, NOTE))
    if path:
        content = {"ok": not failed, "findings": [asdict(finding) for finding in found]}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"\n{len(found)} checks: {failed} failed, {notes} with a note")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
