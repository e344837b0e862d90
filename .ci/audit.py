"""Hold what is installed, and the crates of Cargo.lock, against known advisories.

    python .ci/audit.py [--strict] [--database URL] [--known FILE] [--report FILE [--hashes FILE] [--write]]

Asks OSV (https://osv.dev) once for all of them: it has the advisories that pip-audit and cargo-audit know. Where it
cannot be reached in ten seconds, `advisories.toml` alone counts: a list by hand, with its date. `--report` is what
`pip install --report FILE` left: files of versions in `hashes.json` must be those that were seen before; versions that
are not in it are new, and told. `--write` writes them there.

Exit status 1 where the list says that something is affected, or a file is another one than before. What OSV alone says
is a warning, so that a commit that passed once passes again; with `--strict` it is an error, too.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tomllib
from datetime import date
from http.client import HTTPException
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib import request

from packaging.utils import canonicalize_name
from packaging.version import Version

HERE = Path(__file__).resolve().parent
LOCK, KNOWN, HASHES = HERE.parent / "rust_bpe" / "Cargo.lock", HERE / "advisories.toml", HERE / "hashes.json"
DATABASE = "https://api.osv.dev/v1/querybatch"
ECOSYSTEMS = {"pypi": "PyPI", "crates-io": "crates.io"}
_UNTIL = re.compile(r"until (\d{4}-\d\d-\d\d)$")  # the last day of what is accepted
OWN = ("elm-jax", "elm-bpe", "pip")  # pip is the machine's, and nothing of ours
Package = tuple[str, str, str]  # one of ECOSYSTEMS, name, version


def packages() -> list[Package]:
    """What is installed in this environment, and the crates that are locked."""
    found = {("pypi", canonicalize_name(one.metadata["Name"]), one.version) for one in metadata.distributions()}
    crates = tomllib.loads(LOCK.read_text(encoding="utf-8"))["package"]
    found |= {("crates-io", crate["name"], crate["version"]) for crate in crates}
    return sorted(package for package in found if package[1] not in OWN)


def by_list(all_of_them: list[Package], known: dict[str, Any]) -> list[tuple[Package, str]]:
    """What `advisories.toml` says."""
    return [
        (package, advisory["id"])
        for package in all_of_them
        for advisory in known[package[0]].get(package[1], ())
        if Version(package[2]) < Version(advisory["below"])
    ]


def by_database(all_of_them: list[Package], url: str) -> list[tuple[Package, str]] | None:
    """What OSV says; None where it says nothing."""
    queries = [
        {"package": {"name": name, "ecosystem": ECOSYSTEMS[where]}, "version": version}
        for where, name, version in all_of_them
    ]
    asked = request.Request(url, json.dumps({"queries": queries}).encode(), {"Content-Type": "application/json"})
    try:
        with request.urlopen(asked, timeout=10) as answer:
            pairs = zip(all_of_them, json.load(answer)["results"], strict=True)
        return [(package, one["id"]) for package, result in pairs for one in result.get("vulns", ())]
    except (HTTPException, OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        print(f"OSV was not asked, or answered something else ({type(problem).__name__}: {problem})")
        return None


def accepted(known: dict[str, Any], today: date) -> set[str]:
    """The advisories that are accepted today."""
    until = {name: _UNTIL.search(reason) for name, reason in known["accepted"].items()}
    if undated := [name for name, found in until.items() if found is None]:
        names = ", ".join(undated)
        sys.exit(f"error: advisories.toml accepts {names} without a date: end the reason with `until 2027-01-31`")
    return {name for name, found in until.items() if found and today <= date.fromisoformat(found[1])}


def other_files(report: Path, hashes: Path, write: bool) -> list[str]:
    """Files that pip installed whose version was seen with another hash."""
    installed = json.loads(report.read_text(encoding="utf-8"))["install"]
    seen = json.loads(hashes.read_text(encoding="utf-8")) if hashes.exists() else {"files": {}}
    files, wrong, new = seen["files"], [], 0
    for one in installed:
        source = one.get("download_info", {})
        name = source.get("url", "").rpartition("/")[2]
        found = source.get("archive_info", {}).get("hashes", {}).get("sha256")
        if found is not None:  # a folder, as of this project, has none
            new += name not in files
            if files.setdefault(name, found) != found:
                wrong.append(f"{name}: its sha256 was {files[name]}, and is {found}")
    print(f"{len(installed)} packages were installed; {new} of their files are not in {hashes.name}")
    if write:
        hashes.write_text(json.dumps({**seen, "files": dict(sorted(files.items()))}, indent=1) + "\n", encoding="utf-8")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strict", action="store_true", help="what OSV alone says is an error, too")
    parser.add_argument("--database", default=DATABASE, help="where OSV's querybatch is")
    parser.add_argument("--known", type=Path, default=KNOWN, help="the list by hand")
    parser.add_argument("--report", type=Path, help="what `pip install --report FILE` left")
    parser.add_argument("--hashes", type=Path, default=HASHES, help="files that were seen, with their sha256")
    parser.add_argument("--write", action="store_true", help="add the report's files to them")
    args = parser.parse_args()
    known, all_of_them = tomllib.loads(args.known.read_text(encoding="utf-8")), packages()
    asked, taken = by_database(all_of_them, args.database), accepted(known, date.today())
    listed, told = (
        [found for found in one or () if found[1] not in taken] for one in (by_list(all_of_them, known), asked)
    )
    affected, others = (
        [f"{package[1]} {package[2]}: {one}" for package, one in dict.fromkeys(found)]
        for found in ((listed + told, []) if args.strict else (listed, [one for one in told if one not in listed]))
    )
    for line in others:
        print(f"warning: {line}, says OSV", file=sys.stderr)
    wrong = [] if args.report is None else other_files(args.report, args.hashes, args.write)
    for line in affected + wrong:
        print(f"error: {line}", file=sys.stderr)
    by = f"advisories.toml of {known['written']}" + ("" if asked is None else " and OSV of today")
    print(f"{len(all_of_them)} packages and crates, {len(affected)} affected, by {by}")
    return 1 if affected or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
