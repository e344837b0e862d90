"""docs/differences.md against the defaults: each key has the value that the page says, and each remedy is one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from elm_jax import compat
from elm_jax.cli import read_config_file
from elm_jax.config import SCHEMA, Config, from_text, resolve, to_dict

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
SETTING = re.compile(r"`([a-z_.]+[a-z_0-9]*)=([^`]*)`")
SECTIONS = dict(part.split("\n", 1) for part in PAGE.split("\n## ")[1:])


def rows(section: str) -> list[list[str]]:
    """The cells of a section's table: what, ELM, here, restored by."""
    lines = [line for line in SECTIONS[section].splitlines() if line.startswith("|")]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert found and all(len(row) == 4 for row in found), section
    return found


def value(tree: dict, key: str) -> object:
    for part in key.split("."):
        tree = tree[part]
    return tree


@pytest.mark.parametrize("section", SECTIONS)
def test_the_page_has_our_defaults_and_keys_that_change_them(section: str) -> None:
    config = resolve(*read_config_file(str(ROOT / "configs" / "ecg_qa.py"))) if "configs" in section else Config()
    defaults = to_dict(config)
    for what, _, here, remedy in rows(section):
        for key, text in SETTING.findall(here):
            assert value(defaults, key) == from_text(key, text), f"{what}: {key}"
        settings = SETTING.findall(remedy)
        assert settings or remedy == "none", what
        for key, text in settings:
            assert key in SCHEMA, f"{what}: {key}"
            assert value(defaults, key) != from_text(key, text), f"{what}: {key}"
        tree: dict = {}
        for key, text in settings:
            *sections, leaf = key.split(".")
            node = tree
            for part in sections:
                node = node.setdefault(part, {})
            node[leaf] = from_text(key, text)
        resolve(tree)


def test_every_named_behaviour_is_on_the_page() -> None:
    named = [text for *_, remedy in rows("Behaviours with a name") for key, text in SETTING.findall(remedy)]
    assert sorted(named) == sorted(compat.BEHAVIOURS)


def test_the_reference_configs_set_what_the_page_says() -> None:
    ours = to_dict(resolve(*read_config_file(str(ROOT / "configs" / "reference" / "llava_merl.py"))))
    for section in ("Training", "The ECG-QA configs", "Evaluation"):
        for what, _, _, remedy in rows(section):
            for key, text in SETTING.findall(remedy):
                # LoRA is asked for, prompts are files of ELM's, and data may well lie in data.root.
                if not key.startswith("llm.lora.") and text != "PATH" and key != "data.outside_root":
                    assert value(ours, key) == from_text(key, text), f"{what}: {key}"
