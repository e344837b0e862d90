"""`.ci/audit.py`: what is affected fails, what cannot be asked does not."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

AUDIT = Path(__file__).resolve().parents[2] / ".ci" / "audit.py"
NOWHERE = "http://127.0.0.1:9/"


def audit(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(AUDIT), *args], capture_output=True, text=True)


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture
def database() -> Iterator[str]:
    """OSV, which knows something about pillow."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
            names = [(query["package"]["name"], query["package"]["ecosystem"]) for query in asked]
            assert ("pyo3", "crates.io") in names and ("elm-jax", "PyPI") not in names
            found = [{"vulns": [{"id": "GHSA-x"}]} if name == ("pillow", "PyPI") else {} for name in names]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"results": found}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with serving(Answer) as url:
        yield url


NUMPY = 'numpy = [{ id = "CVE-1", below = "999" }]'  # every one is affected


def known(file: Path, accepted: str = "", pypi: str = "") -> str:
    """A list by hand."""
    file.write_text(f"written = 2026-11-30\n[accepted]\n{accepted}\n[crates-io]\n[pypi]\n{pypi}\n")
    return str(file)


@pytest.mark.parametrize(
    ("accepted", "affected"),
    [("", 1), ('CVE-1 = "unused, until 9999-12-31"', 0), ('CVE-1 = "unused, until 2026-01-31"', 1)],
    ids=["told", "accepted", "no longer accepted"],
)
def test_without_a_network_the_dated_list_counts(tmp_path: Path, accepted: str, affected: int) -> None:
    done = audit("--database", NOWHERE, "--known", known(tmp_path / "known.toml", accepted, NUMPY))
    assert f"{affected} affected, by advisories.toml of 2026-11-30" in done.stdout, done
    assert done.returncode == affected and ("CVE-1" in done.stderr) == bool(affected), done


def test_what_is_accepted_has_a_date(tmp_path: Path) -> None:
    done = audit("--database", NOWHERE, "--known", known(tmp_path / "known.toml", 'CVE-1 = "unused"'))
    assert done.returncode == 1 and "accepts CVE-1 without a date" in done.stderr, done


def test_what_the_database_knows_is_told_unless_it_is_accepted(database: str, tmp_path: Path) -> None:
    by_hand = known(tmp_path / "known.toml")
    done = audit("--database", database, "--known", by_hand)
    assert done.returncode == 0 and "warning: pillow" in done.stderr and "GHSA-x" in done.stderr, done
    done = audit("--database", database, "--known", by_hand, "--strict")
    assert done.returncode == 1 and "error: pillow" in done.stderr and "GHSA-x" in done.stderr, done
    by_hand = known(tmp_path / "known.toml", 'GHSA-x = "unused, until 9999-12-31"')
    done = audit("--database", database, "--known", by_hand, "--strict")
    assert done.returncode == 0 and not done.stderr, done


@pytest.mark.parametrize("answer", ["[]", '{"results": [{}]}', '{"results": 3}', "not JSON", "HTTP"])
def test_a_database_that_answers_something_else_counts_as_not_there(tmp_path: Path, answer: str) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if answer == "HTTP":
                self.wfile.write(b"no protocol\r\n\r\n")
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *_: object) -> None:
            pass

    with serving(Answer) as url:
        done = audit("--database", url, "--known", known(tmp_path / "known.toml"))
    assert done.returncode == 0 and "OSV was not asked" in done.stdout and not done.stderr, done


def test_a_file_of_another_content_than_before_is_told(tmp_path: Path) -> None:
    hashes, report = tmp_path / "hashes.json", tmp_path / "report.json"

    by_hand = known(tmp_path / "known.toml")

    def installed(sha256: str, *more: str) -> subprocess.CompletedProcess[str]:
        source = {"url": "https://files.example/x/a-1-py3-none-any.whl", "archive_info": {"hashes": {"sha256": sha256}}}
        report.write_text(json.dumps({"install": [{"download_info": source}]}))
        return audit("--database", NOWHERE, "--known", by_hand, "--report", str(report), "--hashes", str(hashes), *more)

    assert "1 of their files are not in hashes.json" in installed("1" * 64, "--write").stdout
    assert installed("1" * 64).returncode == 0
    done = installed("0" * 64)
    assert done.returncode == 1 and "error: a-1-py3-none-any.whl: its sha256 was 111" in done.stderr, done
