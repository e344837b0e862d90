"""docs/add_*.md: a newcomer who follows a page, from a folder of his own, gets where it says.

A page's blocks are taken in order: ```python FILE is written to FILE; each line of ```bash is run; ```text is what the
last command must have printed, line by line.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import warm

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted(page.name for page in DOCS.glob("add_*.md"))


def blocks(page: str) -> list[tuple[str, str]]:
    """(info string, body) of each fenced block."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.mark.slow  # a page trains, evaluates and exports: up to ten commands, as a user would give them
@pytest.mark.parametrize("page", PAGES)
def test_a_page_leads_where_it_says(page: str, tmp_path: Path, command_environment: dict[str, str]) -> None:
    (tmp_path / "cache").mkdir()
    environment = command_environment | {"ELM_JAX_CACHE": str(tmp_path / "cache")}
    printed, commands = "", 0
    for info, body in blocks(page):
        language, _, file = info.partition(" ")
        if language == "python" and file:
            (tmp_path / file).write_text(body, encoding="utf-8")
        elif language == "bash":
            for line in body.replace("\\\n", " ").splitlines():
                python, *arguments = shlex.split(line)
                assert python == "python", line
                done = subprocess.run(
                    [*warm.python(), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True,
                    timeout=600,
                )  # fmt: skip
                assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
                printed, commands = done.stdout + done.stderr, commands + 1
        elif language == "text":
            for line in body.splitlines():
                assert line in printed, f"{line!r} is not in what was printed:\n{printed}"
        else:
            assert language == "python", f"{page}: a block of {info!r} that nobody runs"
    assert commands, page


def test_each_page_is_listed() -> None:
    index = (DOCS / "extend.md").read_text(encoding="utf-8")
    assert PAGES and all(f"]({page})" in index for page in PAGES)
