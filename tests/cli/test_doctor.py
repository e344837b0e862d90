"""The command `doctor`: every line it can print is made to appear, with the command that mends what is wrong."""

from __future__ import annotations

import collections
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elm_jax import doctor
from elm_jax.doctoring import checks, trials
from elm_jax.doctoring.checks import FAIL, NOTE, OK, Finding

ROOT = Path(__file__).resolve().parents[2]
Patch = pytest.MonkeyPatch
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def says(finding: Finding, status: str, *words: str, mend: str = "") -> None:
    """The finding has this status, these words in its text and this in its mending command."""
    assert finding.status == status, str(finding)
    for word in words:
        assert word in finding.text, str(finding)
    assert mend in finding.mend, str(finding)
    assert "\n" not in finding.text + finding.mend
    assert bool(finding.mend) == bool(mend), str(finding)


# -- the command ---------------------------------------------------------------------------------------------


def test_findings_are_lines_with_their_mending_and_a_file(monkeypatch: Patch, tmp_path: Path, capsys) -> None:
    found = [Finding("a", OK, "fine"), Finding("b", NOTE, "so so", "do this"), Finding("c", FAIL, "broken", "do that")]
    for failing, status in ((True, 1), (False, 0)):
        monkeypatch.setattr(checks, "examine", lambda: iter(found[:2]))
        monkeypatch.setattr(trials, "examine", lambda failing=failing: iter(found[2:] if failing else []))
        assert doctor.main(["--json", str(tmp_path / "f.json")]) == status
        lines = capsys.readouterr().out.splitlines()
        assert lines[:3] == ["ok    fine", "note  so so", "      mend: do this"]
        assert (lines[3:5] == ["FAIL  broken", "      mend: do that"]) == failing
        assert lines[-1] == f"{2 + failing} checks: {int(failing)} failed, 1 with a note"
        content = json.loads((tmp_path / "f.json").read_text())
        assert content["ok"] is not failing
        assert content["findings"][1] == {"check": "b", "status": "note", "text": "so so", "mend": "do this"}


@pytest.mark.parametrize("arguments, word", [(["--jsno", "x"], "--jsno"), (["x"], "x"), (["--json", "no/f"], "no")])
def test_wrong_arguments_are_one_line_and_status_2(arguments: list[str], word: str, capsys) -> None:
    assert doctor.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and word in err and len(err.splitlines()) == 1


def test_a_check_that_breaks_is_a_finding() -> None:
    def breaks() -> Finding:
        raise ModuleNotFoundError("No module named 'packaging'")

    (finding,) = checks.examine([breaks])
    says(finding, FAIL, "breaks cannot be checked", "No module named 'packaging'", mend="pip install")


def test_without_any_other_package_the_doctor_says_so(command_environment: dict[str, str]) -> None:
    script = "import sys; from elm_jax import doctor; sys.exit(doctor.report(doctor.checks.examine(), None))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", script], capture_output=True, text=True, cwd=ROOT,
        env=command_environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr == ""
    assert "FAIL  packages cannot be checked" in done.stdout and "mend: pip install" in done.stdout


@pytest.mark.slow
def test_nothing_fails_on_this_machine(command: Callable[..., Any], tmp_path: Path) -> None:
    done = command("doctor", "--json", str(tmp_path / "findings.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    findings = json.loads((tmp_path / "findings.json").read_text())["findings"]
    expected = len(checks.HOST_CHECKS) + len(trials.TRIALS)
    assert [f["status"] for f in findings].count(FAIL) == 0 and len(findings) == expected
    assert "a small model trains" in done.stdout


# -- what is installed ---------------------------------------------------------------------------------------


def with_versions(monkeypatch: Patch, versions: dict[str, str | None]) -> None:
    """Make packages look as if they had other versions; None: not installed."""
    own = checks.metadata.version

    def version(name: str) -> str:
        if versions.get(name, "") is None:
            raise checks.metadata.PackageNotFoundError(name)
        return versions.get(name) or own(name)

    monkeypatch.setattr(checks.metadata, "version", version)


def test_python_that_is_too_old(monkeypatch: Patch) -> None:
    says(checks.python(), OK, ".".join(map(str, sys.version_info[:3])))
    info = collections.namedtuple("info", "major minor micro releaselevel serial")  # noqa: PYI024
    monkeypatch.setattr(checks.sys, "version_info", info(3, 10, 4, "final", 0))
    says(checks.python(), FAIL, "Python 3.10.4 is not >=3.11", mend="-m venv")


def test_versions_are_compared_with_those_asked_for(monkeypatch: Patch) -> None:
    says(checks.packages(), OK, "jax ", "jaxlib ", "flax ", "transformers ", "datasets ")
    with_versions(monkeypatch, {"flax": "0.11.0", "grain": None, "jaxlib": "0.4.1"})
    words = ("flax 0.11.0 is not", "grain is missing", "jaxlib 0.4.1 is not")
    says(checks.packages(), FAIL, *words, mend='pip install "flax<0.13,>=0.12.8" "grain>=0.2.18" "jaxlib')


def test_requirements_are_those_of_the_tree_or_of_the_installation(monkeypatch: Patch, tmp_path: Path) -> None:
    tree = checks.requirements()
    assert any(line.startswith("jax>=") for line in tree) and 'torch>=2.6; extra == "torch"' in tree
    assert checks.install("gpu") == f'pip install -e "{ROOT}[gpu]"'
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    monkeypatch.setattr(checks.metadata, "requires", lambda name: [f"{name}-needs>=7", 'jax[cuda12]; extra == "gpu"'])
    monkeypatch.setattr(checks.metadata, "metadata", lambda name: {"Requires-Python": ">=3.99"})
    says(checks.packages(), FAIL, "elm-jax-needs is missing", mend='pip install "elm-jax-needs>=7"')
    says(checks.python(), FAIL, ">=3.99", mend="elm_jax-*.whl")
    assert checks.install("gpu") == 'pip install "jax[cuda12]"'


def test_extras_are_notes_where_they_are_missing(monkeypatch: Patch) -> None:
    with_versions(monkeypatch, {"torch": None, "wandb": "0.20", "tensorboardX": "2.6"})
    says(checks.optional("torch", ".pt files"), NOTE, "torch is not installed", ".pt files", mend="[torch]")
    says(checks.optional("wandb", "W"), OK, "wandb 0.20 is installed, for W")
    with_versions(monkeypatch, {"torch": "2.0"})
    says(checks.optional("torch", ".pt files"), FAIL, "torch 2.0 is not >=2.6", mend='pip install "torch>=2.6"')


def test_a_missing_or_wrong_rust_tokenizer(monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "elm_jax._bpe", None)
    monkeypatch.setattr(checks.shutil, "which", lambda name: "/bin/cargo")
    says(checks.tokenizer(), FAIL, "not built", mend=checks.install())
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    says(checks.tokenizer(), FAIL, "not built", mend="rustup")
    wrong = SimpleNamespace(encode=lambda symbols, in_order: b"\x61\0\0\0")
    encoder = SimpleNamespace(Encoder=lambda merges, symbols: wrong)
    monkeypatch.setitem(sys.modules, "elm_jax._bpe", encoder)  # type: ignore[arg-type]
    says(checks.tokenizer(), FAIL, "encodes wrongly", "[97]", mend="--force-reinstall")


def test_the_rust_tokenizer_of_this_tree() -> None:
    pytest.importorskip("elm_jax._bpe")
    says(checks.tokenizer(), OK, "19 letters")
    assert checks.longest_match(b"aabcx", [b"ab", b"abc"]) == [97, 257, 120]


# -- the machine ---------------------------------------------------------------------------------------------


def test_little_memory_is_noted_and_too_little_fails(monkeypatch: Patch) -> None:
    assert checks.free_memory() > 0
    for free, status in ((8.0, OK), (2.0, NOTE), (0.5, FAIL)):
        monkeypatch.setattr(checks, "free_memory", lambda free=free: free)
        says(checks.machine(), status, f"{free:.1f} GB", "CPU cores", mend="" if status == OK else "ps aux")


def test_a_containers_limit_counts(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "CGROUP", tmp_path)
    for name, text in (("max", "3000000000"), ("current", "2900000000"), ("stat", "anon 5\ninactive_file 400000000")):
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    assert checks.free_memory() == pytest.approx(0.5)
    (tmp_path / "memory.max").write_text("max\n")
    assert checks.free_memory() > 0.5


def with_gpus(monkeypatch: Patch, module: Any, text: str | None, status: int = 0) -> None:
    result = None if text is None else subprocess.CompletedProcess((), status, text, "")
    monkeypatch.setattr(module, "smi", lambda: result)


H100 = "NVIDIA H100 80GB HBM3, 81559, {}, {}"


def test_gpus_drivers_and_who_else_is_there(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "NVIDIA_PROC", tmp_path / "version")
    monkeypatch.setattr(checks, "PCI", tmp_path)
    with_gpus(monkeypatch, checks, None)
    says(checks.nvidia(), OK, "no NVIDIA GPU")
    (tmp_path / "0000:00").mkdir()
    (tmp_path / "0000:00/vendor").write_text("0x10de\n")
    (tmp_path / "0000:00/class").write_text("0x030200\n")
    says(checks.nvidia(), FAIL, "1 NVIDIA GPUs without a working driver", mend="driver")
    with_gpus(monkeypatch, checks, "\n".join([H100.format(4, "550.54.15")] * 2))
    says(checks.nvidia(), OK, "2 NVIDIA GPUs (NVIDIA H100 80GB HBM3, driver 550.54.15)")
    with_gpus(monkeypatch, checks, f"{H100.format(4, '550.54.15')}\n{H100.format(70000, '550.54.15')}\n")
    says(checks.nvidia(), NOTE, "others take memory: 86% of GPU 1", mend="nvidia-smi")
    with_gpus(monkeypatch, checks, H100.format(4, "470.10"))
    says(checks.nvidia(), FAIL, "driver 470.10", "525", mend="driver")
    (tmp_path / "version").write_text("NVRM")
    with_gpus(monkeypatch, checks, "Failed to initialize NVML: Driver/library version mismatch\n", 18)
    says(checks.nvidia(), FAIL, "nvidia-smi fails: Failed to initialize NVML", mend="reboot")


def test_folders_that_are_full_or_closed(monkeypatch: Patch, tmp_path: Path) -> None:
    where = tmp_path / "new" / "deep"

    def check() -> Finding:
        return checks.folder("cache folder", lambda: where, "export X=...")

    for free, status in ((100e9, OK), (5e9, NOTE), (0.1e9, FAIL)):
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        says(check(), status, str(where), f"{free / 1e9:.1f} GB", mend="" if status == OK else "export X")
    assert not where.exists() and list(tmp_path.iterdir()) == []

    def closed(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checks.tempfile, "TemporaryFile", closed)
    says(check(), FAIL, "cannot be written: Permission denied", mend="export X")


# -- network and environment ---------------------------------------------------------------------------------


def test_hugging_face_with_and_without_a_network(monkeypatch: Patch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(checks, "unreachable", lambda url: pytest.fail("offline means no connection"))
    says(checks.hugging_face(), NOTE, "nothing is downloaded", "0 models", mend="unset HF_HUB_OFFLINE")
    for commit in ("a", "b"):
        (tmp_path / f"models--Qwen--Qwen2.5-0.5B/snapshots/{commit}").mkdir(parents=True)
    says(checks.hugging_face(), OK, "nothing is downloaded", "1 models")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(checks, "unreachable", lambda url: "timed out")
    says(checks.hugging_face(), NOTE, "does not answer (timed out)", mend="export HF_HUB_OFFLINE=1")
    monkeypatch.setattr(checks, "unreachable", lambda url: "")
    says(checks.hugging_face(), OK, constants.ENDPOINT, "answers")


def test_a_server_that_is_not_there_is_unreachable_and_one_that_refuses_is_not() -> None:
    import http.server
    import threading

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert checks.unreachable(url) == ""  # it answers 501
        server.shutdown()
        thread.join()
    assert "refused" in checks.unreachable(url)
    assert checks.unreachable("nonsense") != ""


@pytest.mark.parametrize(
    "variables, status, words, mend",
    [
        ({}, OK, "works alone", ""),
        ({ADDRESS: "localhost:1234", COUNT: "2", INDEX: "1"}, OK, "process 1 of 2", ""),
        ({COUNT: "1"}, OK, "works alone", ""),
        ({ADDRESS: "localhost:1234", COUNT: "2"}, FAIL, f"{INDEX}: nothing", "set it"),
        ({INDEX: "0"}, FAIL, f"{ADDRESS}: nothing", f"export {COUNT}=1"),
        ({ADDRESS: "localhost", COUNT: "2", INDEX: "1"}, FAIL, "instead of host:port", "set it"),
        ({ADDRESS: "localhost:99999", COUNT: "2", INDEX: "1"}, FAIL, "instead of host:port", "set it"),
        ({ADDRESS: "localhost:1234", COUNT: "2", INDEX: "2"}, FAIL, f"a number below {COUNT}=2", "number the"),
        ({ADDRESS: "localhost:1234", COUNT: "two", INDEX: "0"}, FAIL, "'two' instead of", f"export {COUNT}=1"),
        ({ADDRESS: "nowhere.invalid:1234", COUNT: "2", INDEX: "0"}, FAIL, "no address", f"export {ADDRESS}"),
    ],
)
def test_variables_of_several_processes_fit_together(variables, status: str, words: str, mend: str) -> None:
    says(checks.processes(variables), status, words, mend=mend)


@pytest.mark.parametrize(
    "variables, status, words, mend",
    [
        ({}, OK, "XLA_FLAGS is not set", ""),
        ({"XLA_FLAGS": "--xla_gpu_autotune_level=0"}, OK, "--xla_gpu_autotune_level=0", ""),
        ({"XLA_FLAGS": "xla_gpu_autotune_level=0"}, FAIL, "'xla_gpu_autotune_level=0'", "unset XLA_FLAGS"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, NOTE, "for tests", "unset XLA_FLAGS"),
        ({"JAX_DISABLE_JIT": "True", "JAX_DEBUG_NANS": "0"}, NOTE, "JAX_DISABLE_JIT set", "unset JAX_DISABLE_JIT"),
    ],
)
def test_settings_that_surprise_are_named(variables, status: str, words: str, mend: str) -> None:
    says(checks.settings(variables), status, words, mend=mend)


# -- what is tried out ---------------------------------------------------------------------------------------


def test_a_module_that_cannot_be_imported_is_named(monkeypatch: Patch) -> None:
    own = importlib.import_module

    def broken(name: str, package: str | None = None) -> Any:
        if name == "elm_jax.ecg.recording":
            raise ModuleNotFoundError("No module named 'wfdb'")
        return own(name, package)

    monkeypatch.setattr(trials.importlib, "import_module", broken)
    says(trials.modules(), FAIL, "elm_jax.ecg.recording", "No module named 'wfdb'", mend="pip install")


def test_jax_without_devices(monkeypatch: Patch) -> None:
    import jax

    says(trials.devices(), OK, jax.__version__, "cpu devices")

    def none() -> None:
        raise RuntimeError("Unable to initialize backend 'cuda'\nmore")

    monkeypatch.setattr(jax, "devices", none)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    says(trials.devices(), FAIL, "JAX_PLATFORMS=cuda", "Unable to initialize", mend="unset JAX_PLATFORMS")
    monkeypatch.delenv("JAX_PLATFORMS")
    says(trials.devices(), FAIL, "no device:", mend="pip install")


def test_gpus_that_jax_does_not_use(monkeypatch: Patch) -> None:
    import jax

    def check(platform: str, asked: str | None = None, plugin: str = "") -> Finding:
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        monkeypatch.setattr(jax, "local_device_count", lambda: 1)
        monkeypatch.setattr(trials, "_version", lambda name: plugin if name == "jax-cuda12-plugin" else "")
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)
        if asked:
            monkeypatch.setenv("JAX_PLATFORMS", asked)
        return trials.accelerator()

    with_gpus(monkeypatch, trials, None)
    says(check("cpu"), OK, "no GPU")
    with_gpus(monkeypatch, trials, H100.format(4, "550.1"))
    says(check("gpu"), OK, "JAX computes on 1 NVIDIA GPU")
    says(check("cpu"), FAIL, "without CUDA", mend="[gpu]")
    says(check("cpu", asked="cpu"), NOTE, "keeps JAX off", mend="unset JAX_PLATFORMS")
    says(check("cpu", plugin="0.4.1"), FAIL, "jax-cuda12-plugin 0.4.1 is not of jax", mend='"jax[cuda12]==')
    says(check("cpu", plugin=jax.__version__), FAIL, "finds no device", mend="--force-reinstall")
    with_gpus(monkeypatch, trials, "\n".join([H100.format(4, "550.1")] * 2))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    says(check("gpu"), NOTE, "1 of 2 NVIDIA GPUs", mend="nvidia-smi -L")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    says(check("gpu"), NOTE, "1 of 2 NVIDIA GPUs", mend="unset CUDA_VISIBLE_DEVICES")


def test_wrong_arithmetic_is_found(monkeypatch: Patch) -> None:
    says(trials.arithmetic(), OK, "8 devices")
    multiply = trials.multiply
    monkeypatch.setattr(trials, "multiply", lambda a, b: multiply(a, b).at[3, 5].add(1))
    says(trials.arithmetic(), FAIL, "wrongly", mend="unset XLA_FLAGS")


def test_a_wrong_sum_over_devices_is_found(monkeypatch: Patch) -> None:
    import jax

    says(trials.collective(), OK, "a sum over 8 devices")
    monkeypatch.setattr(jax.lax, "psum", lambda x, axis: jax.lax.pmax(x, axis))
    says(trials.collective(), FAIL, "is 7 instead of 28", mend="NCCL_DEBUG")


def test_a_local_tokenizer_that_reads_otherwise_is_found(monkeypatch: Patch) -> None:
    from transformers import AutoTokenizer

    says(trials.local_models(), OK, "without the network")
    other = lambda text: {"input_ids": [1]}  # noqa: E731
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: other)
    says(trials.local_models(), FAIL, "encodes otherwise", mend="pip install")


def test_a_training_step_that_fails_in_any_way_is_found(monkeypatch: Patch) -> None:
    for loss, has_checkpoint, status, word, mend in (
        (5.0, True, OK, "loss 5.00, with a checkpoint", ""),
        (float("nan"), True, FAIL, "loss of a training step is nan", "unset"),
        (5.0, False, FAIL, "no checkpoint", "orbax"),
    ):
        monkeypatch.setattr(trials, "train_one_step", lambda _, result=(loss, has_checkpoint): result)
        says(trials.training(), status, word, mend=mend)


def script(body: str) -> list[str]:
    begin = "import json, os, time; print(json.dumps({'trial': 'devices'}), flush=True)"
    return [sys.executable, "-c", f"{begin}\n{body}"]


def test_findings_come_out_of_the_trials_own_process() -> None:
    body = "print('hello'); print(json.dumps({'finding': {'check': 'a', 'status': 'ok', 'text': 'b', 'mend': ''}}))"
    assert list(trials.examine(script(body))) == [Finding("a", OK, "b")]


def test_a_trial_that_kills_its_process_is_a_finding() -> None:
    (finding,) = trials.examine(script("os.abort()"))
    says(finding, FAIL, "devices ended the process with signal SIGABRT")
    (finding,) = trials.examine(script("raise SystemExit('no libcuda')"))
    says(finding, FAIL, "devices ended the process with status 1: no libcuda")


def test_a_trial_that_hangs_is_a_finding() -> None:
    (finding,) = trials.examine(script("time.sleep(900)"), seconds=5)
    says(finding, FAIL, "devices did not end within 5 s")


@pytest.mark.parametrize("flag", ["--xla_nonsense=1", "--xla_cpu_enable_fast_math=maybe"])
def test_flags_that_xla_refuses_are_named(monkeypatch: Patch, flag: str) -> None:
    monkeypatch.setenv("XLA_FLAGS", flag)
    (finding,) = trials.examine(script("import jax; jax.devices()"))
    says(finding, FAIL, f"XLA does not take XLA_FLAGS={flag}", mend="unset XLA_FLAGS")


def test_the_trials_stop_where_there_is_no_device(monkeypatch: Patch, capfd) -> None:
    def breaks() -> Finding:
        raise RuntimeError("as can be")

    def devices() -> Finding:
        return Finding("devices", FAIL, "none")

    monkeypatch.setattr(trials, "devices", devices)
    monkeypatch.setattr(trials, "TRIALS", (breaks, devices, breaks))
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    trials.main()
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line.get("trial") for line in lines] == ["breaks", None, "devices", None]
    assert lines[1]["finding"]["text"] == "breaks failed: RuntimeError: as can be"
