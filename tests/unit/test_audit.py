"""`.ci/audit.py`: what is affected fails, what cannot be asked does not."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

AUDIT = Path(__file__).resolve().parents[2] / ".ci" / "audit.py"
NOWHERE = "http://127.0.0.1:9/"


def audit(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(AUDIT), *args], capture_output=True, text=True)


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

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def test_without_a_network_the_dated_list_counts() -> None:
    done = audit("--database", NOWHERE)
    assert done.returncode == 0 and "0 affected, by advisories.toml of 20" in done.stdout, done


def test_what_the_database_knows_is_told(database: str) -> None:
    done = audit("--database", database)
    assert done.returncode == 0 and "warning: pillow" in done.stderr and "GHSA-x" in done.stderr, done
    done = audit("--database", database, "--strict")
    assert done.returncode == 1 and "error: pillow" in done.stderr and "GHSA-x" in done.stderr, done


def test_a_file_of_another_content_than_before_is_told(tmp_path: Path) -> None:
    hashes, report = tmp_path / "hashes.json", tmp_path / "report.json"

    def installed(sha256: str, *more: str) -> subprocess.CompletedProcess[str]:
        source = {"url": "https://files.example/x/a-1-py3-none-any.whl", "archive_info": {"hashes": {"sha256": sha256}}}
        report.write_text(json.dumps({"install": [{"download_info": source}]}))
        return audit("--database", NOWHERE, "--report", str(report), "--hashes", str(hashes), *more)

    assert "1 of their files are not in hashes.json" in installed("1" * 64, "--write").stdout
    assert installed("1" * 64).returncode == 0
    done = installed("0" * 64)
    assert done.returncode == 1 and "error: a-1-py3-none-any.whl: its sha256 was 111" in done.stderr, done
