"""What importing the package brings, and what it does not."""

import subprocess
import sys

import pytest

import elm_jax


@pytest.mark.parametrize("module", ["elm_jax", "elm_jax.config", "elm_jax.cli", "elm_jax.compat"])
def test_importing_it_imports_no_jax(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('jax', 'flax', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_dir_lists_the_public_names_without_loading_them() -> None:
    assert set(elm_jax.__all__) <= set(dir(elm_jax))


@pytest.mark.parametrize("name", elm_jax.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(elm_jax, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_lllm'"):
        elm_jax.load_lllm  # noqa: B018
