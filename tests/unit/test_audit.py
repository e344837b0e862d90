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
    assert done.returncode == 1 and "error: pillow" in done.stderr and "GHSA-x" in done.stderr, done


def test_a_file_of_another_content_than_before_is_told(tmp_path: Path) -> None:
    known = json.loads((AUDIT.parent / "hashes.json").read_text())["files"]
    name = next(iter(known))

    def installed(sha256: str) -> str:
        source = {"url": f"https://files.example/x/{name}", "archive_info": {"hashes": {"sha256": sha256}}}
        (tmp_path / "report.json").write_text(json.dumps({"install": [{"download_info": source}]}))
        return str(tmp_path / "report.json")

    assert audit("--database", NOWHERE, "--report", installed(known[name])).returncode == 0
    done = audit("--database", NOWHERE, "--report", installed("0" * 64))
    assert done.returncode == 1 and f"error: {name}: its sha256 was" in done.stderr, done
