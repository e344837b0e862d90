"""What a clone and a wheel hold: one version, the configs, the compiled tokenizer, and no jax at import."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata, resources
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IN_CI = os.environ.get("CI", "").lower() == "true"


@pytest.fixture(scope="module")
def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _python(*args, cwd=ROOT, **env):
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_the_crate_and_the_package_have_one_version(pyproject):
    crate = tomllib.loads((ROOT / "rust_bpe" / "Cargo.toml").read_text())
    lock = tomllib.loads((ROOT / "rust_bpe" / "Cargo.lock").read_text())
    locked = {package["name"]: package["version"] for package in lock["package"]}
    assert crate["package"]["version"] == locked["elm-bpe"] == pyproject["project"]["version"]


def test_configs_of_the_clone_are_those_of_the_package():
    packaged = resources.files("elm_jax").joinpath("configs")
    assert [entry.name for entry in packaged.iterdir() if entry.name.endswith(".py")], (
        f"no configs in {packaged}"
    )
    assert (ROOT / "configs").resolve() == ROOT / "elm_jax" / "configs"


def test_what_the_package_imports_is_declared(pyproject):
    project = pyproject["project"]
    extras = [
        spec for name, specs in project["optional-dependencies"].items() if name != "test" for spec in specs
    ]
    declared = {_canonical(re.split(r"[^\w-]", spec)[0]) for spec in project["dependencies"] + extras}
    providers = {"faiss": ["faiss-cpu"], **metadata.packages_distributions()}  # which need not be installed
    missing = set()
    for path in (ROOT / "elm_jax").rglob("*.py"):
        for module in set(re.findall(r"^\s*(?:import|from) (\w+)", _code(path), flags=re.MULTILINE)):
            own = module in sys.stdlib_module_names or module == "elm_jax"
            if not own and not declared & {_canonical(name) for name in providers.get(module, [module])}:
                missing.add(f"{module} in {path.relative_to(ROOT)}")
    assert not missing, f"imported but not declared in pyproject.toml: {sorted(missing)}"


def _canonical(name):
    return name.lower().replace("_", "-")


def _code(path):
    """The source without docstrings, whose lines may begin with 'from' or 'import' too."""
    return re.sub(r'"""[\s\S]*?"""', '""', path.read_text())


@pytest.mark.parametrize("module", ["elm_jax", "elm_jax.symbols.coder"])
def test_importing_loads_no_jax(module):
    report = f"import sys, {module}; print(sorted({{'jax', 'flax', 'torch'}} & set(sys.modules)))"
    assert _python("-c", report).strip() == "[]"


REPORT = """
import json
from importlib.resources import files
import elm_jax
from elm_jax.symbols.coder import EcgByte
ids = EcgByte([b"ab"]).encode_symbols(b"abc").tolist()
configs = sorted(path.name for path in files("elm_jax").joinpath("configs").iterdir())
print(json.dumps([elm_jax.__file__, ids, [name for name in configs if name.endswith(".py")]]))
"""


@pytest.mark.slow
def test_an_installed_wheel_works_away_from_the_clone(tmp_path):
    for tool, there in (("cargo", shutil.which("cargo")), ("pip", _has_pip())):
        if not there:
            (pytest.fail if IN_CI else pytest.skip)(f"{tool} is not installed; the wheel cannot be built")
    _python("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    assert "cp311-abi3" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        assert tops == {"elm_jax", wheel.name.split("-cp311")[0] + ".dist-info"}, tops
        templates = {f"elm_jax/templates/{path.name}" for path in (ROOT / "elm_jax" / "templates").iterdir()}
        assert templates and templates <= set(archive.namelist())
        archive.extractall(tmp_path / "site")
    report = tmp_path / "report.py"
    report.write_text(REPORT)
    where, ids, configs = json.loads(_python(report, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")))
    assert Path(where).is_relative_to(tmp_path / "site")
    assert ids == [256, 99]
    assert configs == sorted(path.name for path in (ROOT / "elm_jax" / "configs").glob("*.py"))


def _has_pip():
    return subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0


def test_every_command_is_one_of_elm_too():
    from elm_jax.__main__ import commands

    listed = set(re.findall(r"^\| `python -m elm_jax\.(\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert set(commands()) == listed and all(commands().values())
    assert _python("-m", "elm_jax", "--version").split() == ["elm_jax", metadata.version("elm-jax")]
    assert "usage: python -m elm_jax.measure" in _python("-m", "elm_jax", "measure", "--help")
    done = subprocess.run([sys.executable, "-m", "elm_jax", "chta"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: elm: found chta") and "'chat'" in done.stderr
