"""Checkpoints come back as they were, on any mesh; fingerprints tell weights apart; what fits a run is checked."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from elm_jax.config import Config, MeshConfig, to_dict
from elm_jax.errors import UserError
from elm_jax.folders import LOCK, leave_folder, read_json, write_json
from elm_jax.models.functional import Arrays, Leaf, Structure
from elm_jax.run import folder as run
from elm_jax.run.arrays import SavedArrays, save_arrays
from elm_jax.run.checkpoint import Checkpoints
from elm_jax.run.fingerprints import fingerprint
from elm_jax.run.weights import INHERITED, first_arrays
from elm_jax.runtime.mesh import make_mesh

SPECS = [PartitionSpec(), PartitionSpec("fsdp"), PartitionSpec("fsdp", "tensor"), PartitionSpec(None, ("data", "fsdp"))]


@functools.cache
def mesh() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(2, 2, 2))


def arrays(seed: int = 0, spec: PartitionSpec = SPECS[0]) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    values = {"llm.w": rng.normal(size=(8, 16)), "connector.w": rng.normal(size=(16, 8))}
    return {n: jax.device_put(x.astype(np.float32), NamedSharding(mesh(), spec)) for n, x in values.items()}


def items(seed: int = 0, spec: PartitionSpec = SPECS[0]) -> dict[str, Any]:
    trained = arrays(seed, spec)
    moments = jax.tree.map(lambda x: (2 * x).astype(jnp.bfloat16), trained)
    return {"trained": trained, "statistics": {}, "optimizer": (jnp.int32(seed), moments)}


def structs(like: dict[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in like.items()}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    opened = Checkpoints(tmp_path, 2)
    yield opened
    opened.close()


def assert_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)


def test_restored_on_another_mesh_bit_by_bit(checkpoints: Checkpoints) -> None:
    checkpoints.save(3, items(1, SPECS[1]), {"history": {}})
    checkpoints.wait()
    like = items(0, SPECS[2])
    restored = checkpoints.restore(3, like)
    assert_equal(restored, items(1))
    for name, array in restored["trained"].items():
        assert array.sharding == like["trained"][name].sharding
    with pytest.raises(UserError, match=r"eval\.ema: found true for .*3, a checkpoint without an average"):
        checkpoints.items(3, average=True)
    saved = SavedArrays(checkpoints.items(3)["llm.w"])
    assert_equal(saved.place(structs(arrays())), arrays(1))
    one = {"llm.w": arrays()["llm.w"].astype(jnp.bfloat16)}
    assert_equal(saved.place(structs(one)), {"llm.w": arrays(1)["llm.w"].astype(jnp.bfloat16)})
    assert_equal(saved.arrays(["llm.w"]), {"llm.w": np.asarray(arrays(1)["llm.w"])})


def test_the_latest_and_the_best_are_kept_also_by_the_next_start(tmp_path: Path) -> None:
    opened = Checkpoints(tmp_path, 2)
    for step in range(1, 5):
        opened.save(step, items(step), {}, best=1)
    opened.close()
    again = Checkpoints(tmp_path, 2)
    assert (again.find("latest"), again.find("best"), again.find("3")) == (4, 1, 3)
    again.save(5, items(5), {}, best=1)
    again.save(6, items(6), {}, best=6)
    again.save(7, items(7), {}, best=6)
    again.close()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["6", "7"]


def test_steps_that_are_not_there(checkpoints: Checkpoints, tmp_path: Path) -> None:
    assert checkpoints.find("latest") is None and checkpoints.find("best") is None
    checkpoints.save(2, items(), {}, best=1)  # the best one was never saved
    checkpoints.wait()
    (tmp_path / "checkpoints" / "1").mkdir()  # left by something else: not a checkpoint
    reader = Checkpoints(tmp_path, read_only=True)
    assert reader.find("latest") == reader.find("best") == 2
    for which in ("3", "last"):
        with pytest.raises(UserError, match=r"--step.*latest, best or one of \[2\]"):
            reader.find(which)
    reader.close()


def test_meta_is_that_of_the_moment_of_saving(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written in the background; here as late as can be."""
    written: dict[str, Any] = {}
    save = checkpoints._library.save
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_complete", lambda *_: None)
        patch.setattr(checkpoints._library, "save", lambda path, args: written.update(path=path, args=args))
        history = {"val_losses": [1.0]}
        checkpoints.save(1, items(), {"history": history})
        history["val_losses"].append(2.0)
    save(written["path"], args=written["args"])
    checkpoints._library.wait_until_finished()
    assert checkpoints.meta(1)["history"] == {"val_losses": [1.0]} and checkpoints.meta(1)["step"] == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves a loop behind
def test_another_models_checkpoint_is_refused_by_folder(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.save(1, items(), {})
    checkpoints.wait()
    larger = items()
    larger["trained"] = {n: jnp.zeros((32, 32)) for n in larger["trained"]}
    other_names = items()
    other_names["trained"] = {f"{n}2": x for n, x in other_names["trained"].items()}
    for like in (larger, other_names):
        with pytest.raises(UserError, match="checkpoints/1"):
            checkpoints.restore(1, like)


# -- fingerprints ---------------------------------------------------------------------------------------------


def test_a_fingerprint_is_the_same_on_every_mesh() -> None:
    plain = {name: jnp.asarray(np.asarray(x)) for name, x in arrays().items()}
    assert {fingerprint(arrays(0, spec)) for spec in SPECS} == {fingerprint(plain)}


@settings(max_examples=25)
@given(st.integers(0, 127), st.integers(0, 31), st.sampled_from(["float32", "bfloat16"]))
def test_a_flipped_bit_changes_the_fingerprint(place: int, bit: int, dtype: str) -> None:
    original = np.asarray(jnp.asarray(arrays()["llm.w"], dtype))
    words = original.copy().view(np.uint32 if dtype == "float32" else np.uint16)
    words.reshape(-1)[place] ^= np.array(1 << (bit % (8 * words.itemsize)), words.dtype)
    flipped = words.view(original.dtype)
    assert fingerprint({"w": jnp.asarray(original)}) != fingerprint({"w": jnp.asarray(flipped)})


def test_names_shapes_and_order_of_values_count() -> None:
    x = jnp.arange(1.0, 7.0)
    prints = [fingerprint(a) for a in ({"a": x}, {"b": x}, {"a": x.reshape(2, 3)}, {"a": x[::-1]}, {"a": x, "b": x})]
    assert len(set(prints)) == len(prints)
    assert fingerprint({"b": x, "a": x}) == prints[-1] and fingerprint({}) == ""


# -- what a run starts from -----------------------------------------------------------------------------------


def a_run(folder: Path, frozen: dict[str, str]) -> str:
    """A run folder that trained `llm` and `connector`, beside the frozen parts that it names."""
    folder.mkdir()
    write_json(folder / "config.json", to_dict(Config(workdir=str(folder))))
    saved = Checkpoints(folder)
    saved.save(5, items(1), {"frozen": frozen})
    saved.close()
    return str(folder)


def model(dtype: str = "float32") -> dict[str, jax.Array]:
    return {**arrays(0), "encoder.w": jnp.ones((4, 4), dtype) / 3}


def start(
    source: str, missing_ok: tuple[str, ...] = (), dtype: str = "float32", learns: bool = True, **others: jax.Array
) -> Arrays:
    """As a new run does: what `source` knows, the rest made anew, and checked; `others` replace arrays of the model."""
    made = {**model(dtype), **others}
    leaves = {n: Leaf(x.shape, x.dtype, (), False, n.split(".")[0]) for n, x in made.items()}
    assembly: Any = SimpleNamespace(
        config=Config(init_from=source, init_missing_ok=missing_ok), structure=Structure(None, None, leaves),  # type: ignore[arg-type]
        llm_folder=None, encoder_kinds={"encoder": "merl"},
        draw=lambda shardings: {name: made[name] for name in shardings},
    )  # fmt: skip
    moved = made if learns else {}
    return first_arrays(assembly, Path(source) / "new", {n: x.sharding for n, x in made.items()}, moved)


def encoder_fingerprint(dtype: str) -> dict[str, str]:
    return {"encoder": fingerprint({"encoder.w": model("float32")["encoder.w"].astype(dtype)})}


def test_init_from_takes_what_was_trained_and_checks_what_was_not(tmp_path: Path) -> None:
    # The source computed in bfloat16, the default, and kept its frozen parts in it.
    started = start(a_run(tmp_path / "same", encoder_fingerprint("bfloat16")))
    assert_equal({n: started[n] for n in arrays()}, arrays(1))
    assert_equal(started["encoder.w"], model()["encoder.w"])
    other = a_run(tmp_path / "other", {"encoder": "00000000"})
    with pytest.raises(UserError, match="trained with other encoder weights"):
        start(other)
    assert_equal(start(other, ("encoder",))["llm.w"], arrays(1)["llm.w"])


def test_init_from_takes_what_the_source_itself_inherited(tmp_path: Path) -> None:
    source = a_run(tmp_path / "heir", {"encoder": "whatever"})
    inherited = {"encoder.w": jnp.full((4, 4), 7.0)}
    save_arrays(Path(source) / INHERITED, inherited)
    assert_equal(start(source)["encoder.w"], inherited["encoder.w"])
    kept = Path(source) / "new" / INHERITED
    start(source, learns=False)
    shutil.rmtree(Path(source) / INHERITED)
    save_arrays(Path(source) / INHERITED, {"encoder.w": jnp.full((4, 4), 8.0)})
    # As a start that was killed is made again: what it has kept stays.
    assert_equal(start(source, learns=False)["encoder.w"], jnp.full((4, 4), 8.0))
    assert_equal(SavedArrays(kept).arrays(["encoder.w"]), inherited)


def test_init_from_names_what_is_missing(tmp_path: Path) -> None:
    source = a_run(tmp_path / "partial", {})
    with pytest.raises(UserError, match=r"no encoder in .*partial.*--config.init_missing_ok=encoder"):
        start(source)
    assert_equal(start(source, ("encoder",))["connector.w"], arrays(1)["connector.w"])


def test_init_from_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config.init_from"):
        start(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="config.init_from: found no checkpoint in"):
        start(str(tmp_path))


def test_init_from_another_model_is_refused_by_name(tmp_path: Path) -> None:
    source = a_run(tmp_path / "other", {})
    with pytest.raises(UserError, match=r"connector.w \[16, 8\], here \[2, 2\]"):
        start(source, ("encoder",), **{"connector.w": jnp.zeros((2, 2))})
    save_arrays(Path(source) / INHERITED, {"encoder.v": jnp.zeros(3)})
    with pytest.raises(UserError, match="inherited: found arrays unknown to this model: encoder.v"):
        start(source, ("encoder",))


# -- the run's folder -----------------------------------------------------------------------------------------


def test_only_a_committed_checkpoint_binds_the_configuration(tmp_path: Path) -> None:
    config = Config(workdir=str(tmp_path / "run"))
    folder = run.open_folder(config)
    (folder / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    changed = Config(workdir=str(folder), seed=7)
    assert run.open_folder(changed) == folder and read_json(folder / "config.json")["seed"] == 7
    (folder / "checkpoints" / "3").mkdir()
    with pytest.raises(UserError, match="other seed"):
        run.open_folder(config)


def test_one_process_at_a_time_trains_in_a_folder_and_a_dead_one_leaves_it(tmp_path: Path) -> None:
    config = Config(workdir=str(tmp_path / "run"))
    assert run.open_folder(config) == run.open_folder(config)  # its own it may open again
    leave_folder(Path(config.workdir))
    program = f"import fcntl, sys; f = open({str(tmp_path / 'run' / LOCK)!r}, 'r+'); fcntl.lockf(f, fcntl.LOCK_EX)"
    waits = f"{program}; f.write('process 7 on here'); f.flush(); print(flush=True); sys.stdin.read()"
    before = read_json(tmp_path / "run" / "config.json")
    with subprocess.Popen([sys.executable, "-c", waits], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(UserError, match="run: found a run that process 7 on here.* trains; expected one training"):
            run.open_folder(Config(workdir=config.workdir, seed=7))
        assert read_json(tmp_path / "run" / "config.json") == before
        other.kill()
    assert run.open_folder(config)
    leave_folder(Path(config.workdir))


def test_done_until_there_is_more_to_do(tmp_path: Path) -> None:
    assert not run.is_done(tmp_path, 10)
    run.write_done(tmp_path, 10, 10)
    assert run.is_done(tmp_path, 10) and not run.is_done(tmp_path, 11)
    run.write_done(tmp_path, 6, 10)  # stopped early
    assert read_json(tmp_path / "DONE")["stopped_early"] and run.is_done(tmp_path, 10)
    assert not run.is_done(tmp_path, 20)
