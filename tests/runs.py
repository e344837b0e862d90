"""Tiny runs of the demo in processes of their own, to stop, go on and compare.

As a program this is the train command with one more ResNet layout, `tiny`, which compiles in a fraction of the
time; and it sends itself the signal that TEST_SIGNAL asks for: `KILL@step=7` when the line of step 7 has been
logged, `KILL@rename=6/optimizer` when that part of checkpoint 6 is about to be moved to its final name,
`TERM*3@doing=^saving#2` three times when it does what matches for the second time (`elm_jax.stopping.doing`),
`INT@call=elm_jax.run.folder:open_folder#1` before a function is called, `USR1@import=orbax.checkpoint`. With TEST_MESH
the devices of two processes take turns on the mesh, as neighbours on a torus may. The file TEST_SAMPLES gets a line for
each step that is taken: its number, and the ids of this process's samples in their order. TEST_STUCK is the number of a
record whose reading never ends, and the file that appears when it begins. TEST_COMMAND is another command with
arguments of its own, as `evaluate`.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import compiling
import numpy as np
import warm

from elm_jax.cli import ConfigFlags
from elm_jax.config import Config

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parent.parent
STEPS, SAVE_EVERY = 12, 3
# What two runs that do the same log alike; the others are times.
VALUES = ("loss", "grad_norm", "val_loss", "learning_rate", "tokens", "supervised_tokens", "conversations",
          "recordings", "padding_fraction")  # fmt: skip
TINY: dict[str, Any] = {
    "data.names": ["demo:train=64,val=8,test=8"],
    "data.sampling_rate": 50,
    "data.segment_len": 500,
    "llm.scratch": {"hidden": 32, "layers": 2, "heads": 8, "kv_heads": 8, "mlp": 64, "max_len": 256},
    "encoder.config": {"resnet_type": "tiny", "width": 8},
    "connector.hidden": None,
    "train.batch_size": 8,
    "train.steps": STEPS,
    "train.save_every": SAVE_EVERY,
    "train.log_every": 1,
    "eval.at_end": False,
    "log.progress": False,
}


def flags(workdir: Path, **changes: Any) -> list[str]:
    """The command line of a tiny run; `changes` are keys with `__` for the dot."""
    values = {**TINY, **{name.replace("__", "."): value for name, value in changes.items()}, "workdir": str(workdir)}
    return ["--config", "configs/demo.py", *(f"--config.{name}={_text(value)}" for name, value in values.items())]


def config(workdir: Path, **changes: Any) -> Config:
    """The checked configuration of a tiny run, to run in this process: see `prepare`."""
    return ConfigFlags.parse(flags(workdir, **changes)).load()


def prepare(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Let this process know the layout `tiny` and use a cache of its own, as long as the test runs."""
    from elm_jax.models.encoders import merl

    monkeypatch.setitem(merl.LAYOUTS, "tiny", (merl.basic, (1,)))
    monkeypatch.setenv("ELM_JAX_CACHE", str(cache))


def start_command(command: list[str], devices: int, env: dict[str, str]) -> subprocess.Popen[str]:
    """Start a command on `devices` fake devices, with `env` beside what is inherited."""
    xla_flags = f"--xla_force_host_platform_device_count={devices} {compiling.FLAGS}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags, **env}
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def start(
    workdir: Path, *, ask: str = "", devices: int = 1, env: dict[str, str] | None = None, more: Sequence[str] = (),
    **changes: Any,
) -> subprocess.Popen[str]:  # fmt: skip
    """Start a tiny run on `devices` fake devices; `ask` is TEST_SIGNAL, `more` is put behind its command line."""
    own = {"ELM_JAX_CACHE": str(workdir.parent / "cache"), "TEST_SIGNAL": ask, **(env or {})}
    return start_command([*warm.python(own), __file__, *flags(workdir, **changes), *more], devices, own)


def two() -> list[dict[str, str]]:
    """The environments of two processes that belong together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    together = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [{**together, "JAX_PROCESS_ID": str(i)} for i in range(2)]


def start_two(workdir: Path, **options: Any) -> list[subprocess.Popen[str]]:
    """Start a tiny run as two processes of four devices each."""
    return [start(workdir, devices=4, env=env, **options) for env in two()]


def finish_all(processes: list[subprocess.Popen[str]], expect: int = 0) -> list[str]:
    """`finish` for each; none is left behind."""
    try:
        return [finish(process, expect) for process in processes]
    finally:
        for process in processes:
            process.kill()


def finish(process: subprocess.Popen[str], expect: int = 0) -> str:
    """Wait for a run that ends with status `expect`; its stderr."""
    try:
        _, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == expect, f"status {process.returncode}, expected {expect}:\n{errors[-4000:]}"
    return errors


def train(workdir: Path, expect: int = 0, **options: Any) -> str:
    """A tiny run from start to its end with status `expect`; its stderr."""
    return finish(start(workdir, **options), expect)


def lines(workdir: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def logged(workdir: Path) -> dict[int, dict[str, Any]]:
    """What was logged of every step and does not depend on time; each step must be there once."""
    steps = [line for line in lines(workdir) if "loss" in line and "event" not in line]
    found = {line["step"]: {name: line[name] for name in VALUES if name in line} for line in steps}
    assert len(found) == len(steps), "a step was logged twice"
    return found


def committed(workdir: Path) -> list[int]:
    """Steps of the checkpoints, in order."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def saved_arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint as they are on disk: item and name -> array."""
    import jax
    import orbax.checkpoint as ocp

    found = {}
    for item in ("trained", "statistics", "optimizer", "average"):
        path = workdir / "checkpoints" / str(step) / item
        if path.is_dir():
            with ocp.PyTreeCheckpointer() as reader:
                tree = reader.metadata(path).item_metadata.tree
                args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
                restored = reader.restore(path, ocp.args.PyTreeRestore(restore_args=args))
            for key, leaf in jax.tree_util.tree_leaves_with_path(restored):
                found[f"{item}{jax.tree_util.keystr(key)}"] = np.asarray(leaf)
    return found


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | dict | bool) else str(value)


def arm(asked: str) -> None:
    """Have this process send itself a signal at the moment asked for."""
    name, times, kind, moment = re.fullmatch(r"(\w+?)(?:\*(\d+))?@(\w+)=(.+)", asked).groups()  # type: ignore[union-attr]
    number = getattr(signal, f"SIG{name}")

    def send(times: int = int(times or 1)) -> None:
        os.kill(os.getpid(), number)
        if times > 1:  # from elsewhere: this may end what happens here
            threading.Timer(0.02, send, (times - 1,)).start()

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background ignores it
    if kind == "import":
        sys.meta_path.insert(0, _Watched(moment, send))  # type: ignore[arg-type]
        return
    if kind in ("doing", "call"):
        what, _, count = moment.rpartition("#")
        place, _, name = what.partition(":") if kind == "call" else ("elm_jax.stopping", "", "doing")
        owner, times_left = importlib.import_module(place), itertools.count(1 - int(count))  # 0 at the moment
        function = getattr(owner, name)

        def and_signal(*arguments: Any, **named: Any) -> Any:
            now = kind == "call" or re.search(what, arguments[0]) is not None
            if kind == "doing":
                function(*arguments)
            if now and next(times_left) == 0:
                send()
            return function(*arguments, **named) if kind == "call" else None

        setattr(owner, name, and_signal)
        return
    if kind == "step":
        from elm_jax.runtime.telemetry import MetricsFile

        write = MetricsFile.write

        def write_and_signal(self: MetricsFile, values: dict[str, Any]) -> None:
            write(self, values)
            if values.get("step") == int(moment) and "loss" in values:
                send()

        MetricsFile.write = write_and_signal  # type: ignore[method-assign, assignment]
        return
    assert kind == "rename", asked
    step, _, item = moment.partition("/")
    final = re.compile(rf"checkpoints/{step}(\.[^/]*/{item})?$" if item else rf"checkpoints/{step}$")
    rename = os.rename

    def rename_or_signal(source: Any, target: Any, **kwargs: Any) -> None:
        if final.search(str(target)) and str(target).endswith(item or step):
            send()
        rename(source, target, **kwargs)

    os.rename = rename_or_signal  # type: ignore[assignment]


class _Watched:
    """Tells when a module is about to be imported."""

    def __init__(self, name: str, tell: Callable[[], None]) -> None:
        self.name, self.tell = name, tell

    def find_spec(self, name: str, *_: Any) -> None:
        if name == self.name:
            self.tell()


def _note_samples(path: str) -> None:
    """Have each step that this process takes written down with its samples."""
    from elm_jax.training.loop import Trainer

    advance = Trainer._advance

    def note(self: Trainer, loaded: Any) -> Any:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([loaded.step + 1, loaded.batch.sample_ids.tolist()]) + "\n")
        return advance(self, loaded)

    Trainer._advance = note  # type: ignore[method-assign]


def _take_turns() -> None:
    """Have the devices lie on the mesh in the order 0, n/2, 1, n/2 + 1, ..."""
    import jax

    from elm_jax.runtime import mesh

    make_mesh = mesh.make_mesh
    mesh.make_mesh = lambda config: make_mesh(config, np.reshape(jax.devices(), (2, -1)).T.ravel().tolist())


def _stick(record: int, began: Path) -> None:
    """Have the reading of a record never end, in the processes of a loader too."""
    from elm_jax.data.dataset import Dataset

    signals = Dataset.signals

    def read_or_stick(self: Dataset, index: int, epoch: int | None = None) -> Any:
        if index == record:
            began.touch()
            threading.Event().wait()
        return signals(self, index, epoch)

    Dataset.signals = read_or_stick  # type: ignore[method-assign]


if os.environ.get("TEST_STUCK"):
    _number, _, _file = os.environ["TEST_STUCK"].partition(" ")
    _stick(int(_number), Path(_file))

if __name__ == "__main__":
    import elm_jax.train
    from elm_jax import cli
    from elm_jax.models.encoders import merl

    merl.LAYOUTS["tiny"] = (merl.basic, (1,))
    if os.environ.get("TEST_SIGNAL"):
        arm(os.environ["TEST_SIGNAL"])
    if os.environ.get("TEST_SAMPLES"):
        _note_samples(os.environ["TEST_SAMPLES"])
    if os.environ.get("TEST_MESH"):
        _take_turns()
    if command := os.environ.get("TEST_COMMAND"):
        sys.exit(cli.guard(importlib.import_module(f"elm_jax.{command}").main))
    cli.run(elm_jax.train.main)
