"""The command `doctor`: every line it can print is made to appear, with the command that mends what is wrong."""

from __future__ import annotations

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
    found = [Finding(OK, "fine", "", "a"), Finding(NOTE, "so so", "do this", "b"), Finding(FAIL, "broken", "do that")]
    for failing, status in ((True, 1), (False, 0)):
        monkeypatch.setattr(checks, "examine", lambda _: iter(found[:2]))
        monkeypatch.setattr(trials, "findings", lambda failing=failing: iter(found[2:] if failing else []))
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
    with pytest.raises(SystemExit, match="2"):
        doctor.main(arguments)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and word in err and len(err.splitlines()) == 1


def test_a_check_that_breaks_is_a_finding() -> None:
    def breaks() -> Finding:
        raise ModuleNotFoundError("No module named 'packaging'")

    (finding,) = checks.examine({"breaks": breaks})
    says(finding, FAIL, "breaks cannot be checked", "No module named 'packaging'", mend="pip install")


def test_without_any_other_package_the_doctor_says_so(command_environment: dict[str, str]) -> None:
    script = "import sys; from elm_jax.doctor import checks, report; "
    script += "sys.exit(report(checks.examine(checks.HOST_CHECKS), None))"
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


def test_versions_are_compared_with_those_asked_for(monkeypatch: Patch) -> None:
    says(checks.packages(), OK, f"Python {sys.version_info[0]}.", "jax ", "flax ", "transformers ", "datasets ")
    with_versions(monkeypatch, {"flax": "0.11.0", "optax": None})
    words = ("flax 0.11.0 is not", "optax is not installed")
    says(checks.packages(), FAIL, *words, mend='pip install "flax<0.13,>=0.12.8" "optax>=0.2.8"')


def test_the_package_comes_from_its_tree_or_a_wheel(monkeypatch: Patch, tmp_path: Path) -> None:
    assert checks.install("gpu") == f'pip install -e "{ROOT}[gpu]"'
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    monkeypatch.setattr(checks.metadata, "requires", lambda name: [f"{name}-needs>=7", 'jax[cuda12]; extra == "gpu"'])
    says(checks.packages(), FAIL, "elm-jax-needs is not installed", mend='pip install "elm-jax-needs>=7"')
    assert "elm_jax-*.whl)[gpu]" in checks.install("gpu")


def test_extras_are_notes_where_they_are_missing(monkeypatch: Patch) -> None:
    with_versions(monkeypatch, {"torch": None, "wandb": "0.20", "tensorboardX": "2.6"})
    says(checks.packages("torch", ".pt files"), NOTE, "torch is not installed", ".pt files", mend="[torch]")
    says(checks.packages("wandb", "W"), OK, "wandb 0.20, for W")
    with_versions(monkeypatch, {"torch": "2.0"})
    says(checks.packages("torch", ".pt files"), FAIL, "torch 2.0 is not >=2.6", mend='pip install "torch>=2.6"')


def test_the_rust_tokenizer(monkeypatch: Patch) -> None:
    pytest.importorskip("elm_jax._bpe")
    says(checks.tokenizer(), OK, "Rust tokenizer")
    monkeypatch.setitem(sys.modules, "elm_jax._bpe", None)
    (finding,) = checks.examine({"tokenizer": checks.tokenizer})
    says(finding, FAIL, "elm_jax._bpe", mend=checks.install())


# -- the machine ---------------------------------------------------------------------------------------------


def test_little_memory_is_noted_and_too_little_fails(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "MEMORY", tmp_path / "meminfo")
    assert "GB" in checks.machine().text
    for free, status in ((8.0, OK), (2.0, NOTE), (0.5, FAIL)):
        (tmp_path / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:  {free * 1e9 / 1024:.0f} kB\n")
        says(checks.machine(), status, f"{free:.1f} GB", "CPU cores", mend="" if status == OK else "ps aux")


def with_gpus(monkeypatch: Patch, module: Any, *said: str, status: int = 0) -> None:
    monkeypatch.setattr(module, "smi", lambda: (status, list(said)))


H100 = "NVIDIA H100 80GB HBM3, 550.54.15, 81079 MiB"


def test_gpus_and_their_driver(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "PCI", tmp_path)
    with_gpus(monkeypatch, checks, status=127)
    says(checks.nvidia(), OK, "no NVIDIA GPU")
    (tmp_path / "0000:00").mkdir()
    (tmp_path / "0000:00/vendor").write_text("0x10de\n")
    (tmp_path / "0000:00/class").write_text("0x030200\n")
    says(checks.nvidia(), FAIL, "1 NVIDIA GPUs without a working driver", "not there", mend="driver")
    with_gpus(monkeypatch, checks, "Failed to initialize NVML: Driver/library version mismatch", status=18)
    says(checks.nvidia(), FAIL, "nvidia-smi: Failed to initialize NVML", mend="reboot")
    with_gpus(monkeypatch, checks, H100, H100)
    says(checks.nvidia(), OK, f"2 NVIDIA GPUs ({H100})")


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
    import http.server
    import threading

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "nonsense")
    says(checks.hugging_face(), NOTE, "nothing is downloaded", "0 models", mend="unset HF_HUB_OFFLINE")
    for commit in ("a", "b"):
        (tmp_path / f"models--Qwen--Qwen2.5-0.5B/snapshots/{commit}").mkdir(parents=True)
    says(checks.hugging_face(), OK, "nothing is downloaded", "1 models")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    says(checks.hugging_face(), NOTE, "nonsense does not answer", mend="export HF_HUB_OFFLINE=1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        says(checks.hugging_face(), OK, constants.ENDPOINT, "answers")  # 501
        server.shutdown()
        thread.join()
    says(checks.hugging_face(), NOTE, "refused", mend="export HF_HUB_OFFLINE=1")


@pytest.mark.parametrize(
    "variables, status, words, mend",
    [
        ({}, OK, "works alone", ""),
        ({ADDRESS: "localhost:1234", COUNT: "2", INDEX: "1"}, OK, "process 1 of 2", ""),
        ({COUNT: "1"}, OK, "works alone", ""),
        ({ADDRESS: "localhost:1234", COUNT: "2"}, FAIL, f"{INDEX}: nothing", "set it"),
        ({INDEX: "0"}, FAIL, f"{ADDRESS}: nothing", f"set {COUNT}=1"),
        ({ADDRESS: "localhost", COUNT: "2", INDEX: "1"}, FAIL, "instead of host:port", "set it"),
        ({ADDRESS: "localhost:99999", COUNT: "2", INDEX: "1"}, FAIL, "instead of host:port", "set it"),
        ({ADDRESS: "localhost:1234", COUNT: "2", INDEX: "2"}, FAIL, f"a number below {COUNT}=2", "number the"),
        ({ADDRESS: "localhost:1234", COUNT: "two", INDEX: "0"}, FAIL, "'two' instead of", f"{COUNT}=1"),
        ({ADDRESS: "nowhere.invalid:1234", COUNT: "2", INDEX: "0"}, FAIL, "no address", f"export {ADDRESS}"),
    ],
)
def test_variables_of_several_processes_fit_together(variables, status: str, words: str, mend: str) -> None:
    (finding,) = checks.examine({"processes": lambda: checks.processes(variables)})
    says(finding, status, words, mend=mend)


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


def test_jax_without_devices(monkeypatch: Patch) -> None:
    import jax

    says(trials.devices(), OK, jax.__version__, "cpu devices")

    def none() -> None:
        raise RuntimeError("Unable to initialize backend 'cuda'\nmore")

    monkeypatch.setattr(jax, "devices", none)
    (finding,) = checks.examine({"devices": trials.devices})
    says(finding, FAIL, "Unable to initialize backend 'cuda'")


def test_gpus_that_jax_does_not_use(monkeypatch: Patch) -> None:
    import jax

    def check(platform: str, asked: str | None = None) -> Finding:
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        monkeypatch.setattr(jax, "local_device_count", lambda: 1)
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)
        if asked:
            monkeypatch.setenv("JAX_PLATFORMS", asked)
        return trials.accelerator()

    with_gpus(monkeypatch, trials, status=127)
    says(check("cpu"), OK, "no GPU")
    with_gpus(monkeypatch, trials, H100)
    says(check("gpu"), OK, "JAX computes on 1 NVIDIA GPU")
    says(check("cpu"), FAIL, "no CUDA plugin of this version", mend="[gpu]")
    says(check("cpu", asked="cpu"), NOTE, "keeps JAX off", mend="unset JAX_PLATFORMS")
    with_gpus(monkeypatch, trials, H100, H100)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    says(check("gpu"), NOTE, "1 of 2 NVIDIA GPUs", mend="nvidia-smi -L")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    says(check("gpu"), NOTE, "1 of 2 NVIDIA GPUs", mend="unset CUDA_VISIBLE_DEVICES")


def test_a_wrong_sum_over_devices_is_found(monkeypatch: Patch) -> None:
    import jax

    says(trials.collective(), OK, "a sum over 8 devices")
    monkeypatch.setattr(jax.lax, "psum", lambda x, axis: jax.lax.pmax(x, axis))
    says(trials.collective(), FAIL, "is 7 instead of 28", mend="NCCL_DEBUG")


def test_a_training_step_whose_loss_is_no_number_is_found(monkeypatch: Patch) -> None:
    loss = 5.0

    def train(config: Any) -> None:
        Path(config.workdir).mkdir()
        Path(config.workdir, "metrics.jsonl").write_text(f'{{"event": "x"}}\n{json.dumps({"step": 1, "loss": loss})}\n')

    monkeypatch.setattr("elm_jax.training.loop.train", train)
    monkeypatch.setenv("ELM_JAX_CACHE", "")
    says(trials.training(), OK, "loss 5.00")
    loss = None
    says(trials.training(), FAIL, "no number", mend="unset")


def script(body: str) -> list[str]:
    return [sys.executable, "-c", f"import json, os, signal\n{body}"]


def test_findings_come_out_of_the_trials_own_process() -> None:
    body = "print('hello'); print(json.dumps({'status': 'ok', 'text': 'b', 'mend': '', 'check': 'a'}))"
    assert list(trials.findings(script(body))) == [Finding(OK, "b", "", "a")]


@pytest.mark.parametrize(
    "ending, words",
    [
        ("os.abort()", "devices ended the process with signal SIGABRT"),
        ("raise SystemExit('no libcuda')", "devices ended the process with status 1: no libcuda"),
        ("signal.raise_signal(signal.SIGALRM)", "devices did not end within 600 s"),
    ],
)
def test_a_trial_that_kills_its_process_or_hangs_is_a_finding(ending: str, words: str) -> None:
    (finding,) = trials.findings(script(ending))
    says(finding, FAIL, words)


def test_a_process_that_dies_after_its_trials_is_a_finding_too() -> None:
    told = "print(json.dumps({'status': 'ok', 'text': 'b', 'mend': '', 'check': 'a'}), flush=True)"
    *found, last = trials.findings(script(f"for _ in range({len(trials.TRIALS)}): {told}\nos.abort()"))
    assert len(found) == len(trials.TRIALS)
    says(last, FAIL, "the end of the trials ended the process with signal SIGABRT")


@pytest.mark.parametrize("flag", ["--xla_nonsense=1", "--xla_cpu_enable_fast_math=maybe"])
def test_flags_that_xla_refuses_are_named(monkeypatch: Patch, flag: str) -> None:
    monkeypatch.setenv("XLA_FLAGS", flag)
    (finding,) = trials.findings(script("import jax; jax.devices()"))
    says(finding, FAIL, f"XLA does not take XLA_FLAGS={flag}", mend="unset XLA_FLAGS")


def test_the_trials_stop_where_there_is_no_device(monkeypatch: Patch, capfd) -> None:
    def breaks() -> Finding:
        raise RuntimeError("as can be")

    monkeypatch.setattr(trials, "TRIALS", {"first": breaks, "devices": breaks, "last": breaks})
    limits: list[int] = []
    monkeypatch.setattr(trials.signal, "alarm", limits.append)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    trials.main()
    first, last = (json.loads(line) for line in capfd.readouterr().out.splitlines())
    assert first["text"] == "first cannot be checked: RuntimeError: as can be" and last["check"] == "devices"
    assert limits == [trials.SECONDS]
