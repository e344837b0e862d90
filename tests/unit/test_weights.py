"""Safetensors files, the rules between names and parameters, and loading into shards."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from elm_jax.config import MeshConfig
from elm_jax.errors import UserError
from elm_jax.inference.generate import generate
from elm_jax.models import hints
from elm_jax.models.families import extended, rules_of, to_hf
from elm_jax.models.names import Rule, bare_name, export
from elm_jax.runtime.mesh import MeshPlacement, make_mesh, named_sharding
from elm_jax.weights.files import open_checkpoint
from elm_jax.weights.load import (
    load_llm,
    open_llm,
    parameters,
    read_llm_config,
    resolve_llm_folder,
)
from elm_jax.weights.published import NewRows
from elm_jax.weights.safetensors import DTYPES, Safetensors, save_safetensors

SHARDED = "llm_llama_untied_sharded"


def one_device(path, spec):
    return SingleDeviceSharding(jax.devices()[0])


@pytest.fixture
def folder(golden, tmp_path) -> Path:
    """A copy of the sharded Llama that a test may spoil."""
    return writable_copy(golden(SHARDED), tmp_path / "model")


def writable_copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        if file.suffix in (".safetensors", ".json"):
            shutil.copyfile(file, target / file.name)
    return target


def rewrite(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """Replace the folder's weights by one file of `tensors`."""
    for file in folder.glob("model*"):
        file.unlink()
    save_safetensors(folder / "model.safetensors", tensors)


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Files


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_survives_a_round_trip(tmp_path, dtype):
    values = np.arange(12).reshape(3, 4).astype(dtype)
    save_safetensors(tmp_path / "x.safetensors", {"x": values, "scalar": values[0, 1], "none": values[:0]})
    found = Safetensors(tmp_path / "x.safetensors")
    assert {name: (found[name].dtype, found[name].shape) for name in found} == {
        "x": (dtype, (3, 4)),
        "scalar": (dtype, ()),
        "none": (dtype, (0, 4)),
    }
    assert np.array_equal(found["x"], values)


def test_transposed_and_strided_arrays_are_written_as_they_read(tmp_path):
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    save_safetensors(tmp_path / "x.safetensors", {"t": values.T, "s": values[::2, ::3]}, {"format": "pt"})
    found = Safetensors(tmp_path / "x.safetensors")
    assert np.array_equal(found["t"], values.T) and np.array_equal(found["s"], values[::2, ::3])
    assert found.metadata == {"format": "pt"}


def test_files_are_exchanged_with_the_safetensors_library(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, ml_dtypes.bfloat16)}
    save_safetensors(tmp_path / "ours.safetensors", values)
    theirs = library.load_file(tmp_path / "ours.safetensors")
    library.save_file(values, tmp_path / "theirs.safetensors")
    ours = Safetensors(tmp_path / "theirs.safetensors")
    for name, value in values.items():
        assert np.array_equal(theirs[name], value) and np.array_equal(ours[name], value)


def write_raw(path: Path, header, body: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


UNSOUND = {
    "truncated": ({"x": entry([4], 0, 16)}, b"\0" * 8),
    "trailing bytes": ({"x": entry([4], 0, 16)}, b"\0" * 24),
    "overlap": ({"x": entry([4], 0, 16), "y": entry([4], 8, 24)}, b"\0" * 24),
    "hole": ({"x": entry([2], 0, 8), "y": entry([2], 16, 24)}, b"\0" * 24),
    "shape and bytes differ": ({"x": entry([5], 0, 16)}, b"\0" * 16),
    "negative offset": ({"x": entry([4], -16, 0)}, b"\0" * 16),
    "negative size": ({"x": entry([-4], 0, 16)}, b"\0" * 16),
    "size that is no number": ({"x": entry(["4"], 0, 16)}, b"\0" * 16),
    "unknown dtype": ({"x": entry([16], 0, 16, "F8_E4M3")}, b"\0" * 16),
    "no offsets": ({"x": {"dtype": "F32", "shape": [4]}}, b"\0" * 16),
    "no object": ([1, 2], b""),
    "no JSON": (b"{x", b""),
    "name twice": (b'{"x": {}, "x": {}}', b""),
}


@pytest.mark.parametrize("header, body", UNSOUND.values(), ids=UNSOUND)
def test_an_unsound_file_is_an_error_that_names_it(tmp_path, header, body):
    path = write_raw(tmp_path / "bad.safetensors", header, body)
    with pytest.raises(UserError, match="bad.safetensors"):
        Safetensors(path)


@pytest.mark.parametrize("content", [b"", b"\1\2\3", (10**12).to_bytes(8, "little")])
def test_a_file_without_a_header_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="bad.safetensors"):
        Safetensors(path)


# Rules


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
def test_a_rule_is_inverted_by_restore(stacked, transpose):
    rule = Rule("layer.{layer}.w" if stacked else "w", "w", transpose)
    theirs = [np.random.default_rng(i).normal(size=(3, 5)) for i in range(4 if stacked else 1)]
    ours = rule.arrange(theirs)
    assert all(np.array_equal(a, b) for a, b in zip(rule.restore(ours), theirs, strict=True))
    assert all(part.flags.c_contiguous for part in rule.restore(ours))
    assert rule.their_shape(ours.shape) == (3, 5)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("experts", [(), (2,)])
def test_a_slice_through_a_rule_is_the_slice_of_the_whole(transpose, experts):
    """With a layer left out between, as where not all have such a part."""
    rule = Rule("layer.{layer}.{expert}.w" if experts else "layer.{layer}.w", "w", transpose, numbers=(0, 1, 3))
    stack = (3, *experts)
    theirs = [np.random.default_rng(i).normal(size=(6, 8)) for i in range(int(np.prod(stack)))]
    whole = rule.arrange(theirs, stack)
    index = (slice(1, 3), *[slice(1, 2)] * len(experts), slice(2, 6), slice(None, 4))
    places, each = rule.split(index, whole.shape)
    assert np.array_equal(rule.arrange([theirs[n][each] for n in places.flat], places.shape), whole[index])
    assert all(np.array_equal(a, b) for a, b in zip(rule.restore(whole), theirs, strict=True))
    names = rule.names(whole.shape)
    assert len(set(names)) == len(theirs) and names[-1] == ("layer.3.1.w" if experts else "layer.3.w")


def test_wrappers_leave_no_trace_in_names():
    assert bare_name("module._orig_mod.a.module.b") == bare_name("_orig_mod.module.a.module.b") == "a.module.b"


GOLDENS = (
    *("llm_llama_tied", SHARDED, "llm_qwen2_tied", "llm_qwen3", "llm_gemma2", "llm_gpt2", "llm_opt"),
    *("llm_qwen3_5", "llm_qwen3_moe"),
)


@pytest.mark.parametrize("name", GOLDENS)
def test_export_gives_back_the_checkpoint_bit_for_bit(golden, name, tmp_path):
    llm = load_llm(golden(name))
    arrays = {path: np.asarray(v[...]) for path, v in parameters(nnx.state(llm)).items()}
    exported = dict(export(rules_of(llm.config), arrays))
    original = open_checkpoint(golden(name))
    assert set(exported) == set(original)
    assert all(np.array_equal(exported[n], original[n]) for n in original)
    (tmp_path / "config.json").write_text(json.dumps(to_hf(llm.config)))
    save_safetensors(tmp_path / "model.safetensors", exported)
    again = load_llm(tmp_path)
    tokens = np.arange(1, 9)[None]
    assert again.config == llm.config and np.array_equal(again(tokens), llm(tokens))


# Loading


def test_loading_into_shards_gives_the_same_parameters(golden):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    plain = parameters(nnx.state(load_llm(golden("llm_qwen2_tied"))))
    sharded = parameters(nnx.state(load_llm(golden("llm_qwen2_tied"), mesh=mesh)))
    for path, variable in sharded.items():
        assert np.array_equal(variable[...], plain[path][...]), path
    kernel = sharded["layers.attention.q.kernel"][...]
    assert kernel.addressable_shards[0].data.shape == (3, 32, 32)


@pytest.mark.parametrize(
    "name", ["llm_qwen2_tied", *(pytest.param(name, marks=pytest.mark.slow) for name in GOLDENS[3:])]
)
def test_a_sharded_model_computes_and_generates_the_same(golden, name):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    tokens = np.arange(1, 49).reshape(4, 12)
    bound = 5e-5 if name == "llm_qwen3_5" else 1e-5  # see `WIDER` of tests/parity/test_llm_golden.py
    plain, sharded = load_llm(golden(name)), load_llm(golden(name), mesh=mesh)
    logits, text = plain(tokens), generate(plain, tokens, max_new_tokens=6)
    for placement in (None, MeshPlacement(mesh)):
        with hints.placed(placement):
            assert np.allclose(sharded(tokens), logits, atol=bound * np.abs(logits).max()), placement
            assert np.array_equal(generate(sharded, tokens, max_new_tokens=6), text), placement


TABLES = {"embedding.table": "model.embed_tokens.weight", "head.kernel": "lm_head.weight"}


def new_rows(folder, config, base, shardings=one_device) -> dict[str, np.ndarray]:
    """The rows (new, D) of both tables after the folder's own, which must be as they were."""
    llm, tensors, found = open_llm(folder, config), open_checkpoint(folder), {}
    specs = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in llm.shapes.items()}
    arrays = llm.place({path: spec.update(sharding=shardings(path, spec)) for path, spec in specs.items()})
    for path, name in TABLES.items():
        rows = np.asarray(arrays[path] if path == "embedding.table" else arrays[path].T)
        assert len(rows) == config.vocab_size and np.array_equal(rows[: base.vocab_size], tensors[name])
        found[name] = rows[base.vocab_size :]
    return found


def test_new_vocabulary_rows_lie_around_the_mean_and_can_be_told_apart(golden):
    folder = golden(SHARDED)
    base = read_llm_config(folder)
    tensors, found = open_checkpoint(folder), new_rows(folder, extended(base, base.vocab_size + 5), base)
    noises = {}
    for name, rows in found.items():
        assert len(rows) == 64  # padded to a multiple of it
        mean, deviation = tensors[name].mean(0), tensors[name].std(0)
        noises[name] = (rows - mean) / deviation
        assert noises[name].std() == pytest.approx(0.1, rel=0.05) and abs(noises[name].mean()) < 0.01
        distances = np.linalg.norm(rows[:, None] - rows, axis=-1) + np.eye(64) * 1e9
        assert distances.min() > 0.05 * np.linalg.norm(deviation)
    # Those of the head have nothing to do with those of the embedding.
    one, other = noises.values()
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.1


def test_a_new_row_depends_on_its_table_and_number_alone():
    table = np.random.default_rng(0).normal(size=(10_000, 6)).astype(np.float32)
    rows = NewRows.like("w", table)
    assert np.allclose(rows.mean, table.mean(0), atol=1e-6) and np.allclose(rows.noise, 0.1 * table.std(0), rtol=1e-4)
    whole = rows.draw(10_000, 10_020, slice(None))
    assert np.array_equal(whole[5:9, 2:4], rows.draw(10_005, 10_009, slice(2, 4)))
    assert not any(np.allclose(a, b, atol=1e-4) for a, b in pairwise(whole))
    assert not np.allclose(whole, NewRows.like("v", table).draw(10_000, 10_020, slice(None)), atol=1e-4)


@pytest.mark.parametrize("tensor", [1, 2])
def test_new_vocabulary_rows_are_the_same_on_every_mesh(golden, tensor):
    folder = golden(SHARDED)
    base = read_llm_config(folder)
    config = extended(base, base.vocab_size + 5)
    plain = new_rows(folder, config, base)
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2, tensor=tensor))
    axes = {"embedding.table": ("vocab", "embed"), "head.kernel": ("embed", "vocab")}

    def shardings(path, spec):
        return named_sharding(mesh, axes.get(path, (None,) * len(spec.shape)), spec.shape, path)

    for name, rows in new_rows(folder, config, base, shardings).items():
        assert np.array_equal(rows, plain[name]), name


def test_a_padded_vocabulary_is_never_shrunk(golden):
    base = read_llm_config(golden(SHARDED))
    assert extended(base, base.vocab_size - 100) == base
    assert extended(base, base.vocab_size) == base


def test_bfloat16_files_are_read_as_they_are(folder):
    halves = {name: t.astype(ml_dtypes.bfloat16) for name, t in open_checkpoint(folder).items()}
    rewrite(folder, halves)
    state = parameters(nnx.state(load_llm(folder, dtype="float32")))
    assert state["norm.scale"].dtype == jnp.float32
    assert np.array_equal(
        state["embedding.table"][...], halves["model.embed_tokens.weight"].astype(np.float32)
    )


def test_missing_and_unexpected_tensors_are_named(folder):
    tensors = dict(open_checkpoint(folder))
    tensors["model.layers.9.extra"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    rewrite(folder, tensors)
    with pytest.raises(
        UserError, match="no model.layers.1.mlp.up_proj.weight; unknown model.layers.9.extra"
    ):
        load_llm(folder)


def test_a_misshapen_tensor_is_named(folder):
    edit_config(folder, intermediate_size=96)
    with pytest.raises(UserError, match=r"mlp\.\w+_proj\.weight"):
        load_llm(folder)


def test_buffers_and_copies_of_tied_tables_are_passed_over(golden, tmp_path):
    folder = writable_copy(golden("llm_llama_tied"), tmp_path / "model")
    tensors = dict(open_checkpoint(folder))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    rewrite(folder, tensors)
    load_llm(folder)
    tensors["lm_head.weight"][3, 3] += 1
    rewrite(folder, tensors)
    with pytest.raises(UserError, match="tie_word_embeddings"):
        load_llm(folder)


def test_an_index_may_not_lead_outside_its_folder(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="index.json"):
        load_llm(folder)


def test_an_index_must_fit_its_files(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "model-00001-of-00005.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="model.norm.weight"):
        load_llm(folder)


def test_a_folder_without_weights_is_an_error(tmp_path, golden):
    shutil.copyfile(golden(SHARDED) / "config.json", tmp_path / "config.json")
    with pytest.raises(UserError, match="safetensors"):
        load_llm(tmp_path)


def test_files_of_pytorch_are_to_be_converted(tmp_path, golden):
    shutil.copyfile(golden(SHARDED) / "config.json", tmp_path / "config.json")
    (tmp_path / "training_args.bin").touch()
    with pytest.raises(UserError, match="found no safetensors.*check the folder"):
        load_llm(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"found pytorch_model.bin only.*save_pretrained\(.*safe_serialization=True"):
        load_llm(tmp_path)


@pytest.mark.parametrize("files", [["pytorch_model.bin", "config.json"], ["model.safetensors"], ["config.json"]])
def test_a_repository_of_pytorch_files_is_to_be_converted(tmp_path, monkeypatch, files):
    if "model.safetensors" in files:
        (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr("elm_jax.weights.files.snapshot_download", lambda repo, allow_patterns: str(tmp_path))
    monkeypatch.setattr("elm_jax.weights.files.list_repo_files", lambda repo: files)
    assert resolve_llm_folder("opt-125m", weights=False) == tmp_path
    if "pytorch_model.bin" not in files:
        assert resolve_llm_folder("opt-125m") == tmp_path
        return
    advice = r"'facebook/opt-125m', which has pytorch_model.bin only.*from_pretrained\('facebook/opt-125m'\)"
    with pytest.raises(UserError, match=advice):
        resolve_llm_folder("opt-125m")


@pytest.mark.parametrize("name", ["qwen2.5-0.5b-instrukt", "nowhere/to/be/found", "~/no/such/folder"])
def test_an_unknown_name_is_an_error(name):
    with pytest.raises(UserError, match="llm.name"):
        resolve_llm_folder(name)


def test_a_model_that_cannot_be_downloaded_says_how_to_go_on():
    with pytest.raises(UserError, match="set llm.name to that folder"):
        resolve_llm_folder("nobody-at-all/no-such-model")
