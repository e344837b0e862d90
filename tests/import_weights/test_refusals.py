"""What does not fit is refused by name before anything is written, and nothing in a file but tensors is read."""

from __future__ import annotations

import io
import os
import pickle
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from import_weights import checkpoints
from import_weights.conftest import Model, imported

from elm_jax.errors import UserError
from elm_jax.exchange import bring_in as import_run
from elm_jax.weights.encoders import load_encoder

Golden = Callable[[str], Path]
Refused = Callable[..., str]
QUERY = "llm.llm.model.layers.1.self_attn.q_proj.weight"
TABLE, HEAD = "llm.llm.model.embed_tokens.weight", "llm.llm.lm_head.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(QUERY), f"found no {QUERY}; expected the 22 tensors"),
        (lambda s: s.pop("project_layer.projection.bias"), "found no project_layer.projection.bias"),
        (lambda s: s.update({"llm.llm.model.extra.weight": np.zeros(3)}), "found unknown llm.llm.model.extra.weight"),
        (lambda s: s.update({"value_head.weight": np.zeros(3)}), "found unknown value_head.weight"),
        (lambda s: s.update({QUERY: s[QUERY][:, :-1]}), f"found {QUERY} float32[64, 63]; expected floating [64, 64]"),
        (lambda s: s.update({QUERY: np.zeros((64, 64), np.int64)}), f"found {QUERY} int64[64, 64]; expected floating"),
        (lambda s: s.update({TABLE: s[TABLE][:-1], HEAD: s[HEAD][:-1]}), "embed_tokens.weight of 511 tokens"),
        (lambda s: s.update({HEAD: s[HEAD] + 1}), f"found {HEAD} unlike {TABLE}"),
        (lambda s: s.update({f"module.{QUERY}": s[QUERY]}), f"found both {QUERY} and module.{QUERY}; expected one"),
        (lambda s: [s.pop(n) for n in list(s) if "embed_tokens" in n], "found 0 of them; expected one table"),
    ],
)  # fmt: skip
def test_what_is_missing_extra_or_misshapen_is_named(
    model: Model, golden: Golden, tmp_path: Path, refused: Refused, change: Callable[[Any], None], message: str
) -> None:
    _, flags = model("base_elf_llama")
    state = checkpoints.state_dict("base_elf_llama", golden)
    change(state)
    assert message in refused(checkpoints.save(tmp_path / "changed.pt", state), *flags)


def test_an_encoder_in_a_model_is_held_to_its_names_too(
    model: Model, golden: Golden, tmp_path: Path, refused: Refused
) -> None:
    _, flags = model("linear_llava_llama")
    state = checkpoints.state_dict("linear_llava_llama", golden)
    name = "encoder.encoder.block1.ff.norm.bias"
    without = {n: x for n, x in state.items() if n != name}
    assert f"found no {name}" in refused(checkpoints.save(tmp_path / "a.pt", without), *flags)
    more = {**state, "encoder.encoder.block2.ff.norm.bias": state[name]}
    assert "block2.ff.norm.bias" in refused(checkpoints.save(tmp_path / "b.pt", more), *flags)


def test_another_model_than_the_flags_say_is_refused(
    model: Model, tmp_path: Path, refused: Refused, golden: Golden
) -> None:
    file, flags = model("base_elf_llama")
    qwen = checkpoints.llm_folder("qwen2", golden, file.parent)
    assert "self_attn.k_proj.bias" in refused(file, *flags, f"--config.llm.name={qwen}")
    assert "llm.name: found nothing; expected the language model (of width 64, with 512 tokens)" in refused(file)
    assert "project_layer.projection.weight of 3000 inputs" in refused(file, *flags, "--config.data.segment_len=77")
    assert "found no adapter" in refused(file, *flags, "--merge")
    assert "no such file" in refused(tmp_path / "absent.pt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").touch()
    with pytest.raises(UserError, match="--out: found .*folder, which is not empty"):
        import_run.import_weights(file, tmp_path / "folder", None)  # type: ignore[arg-type]
    assert "a language model alone" in refused(qwen)


def test_a_view_that_claims_to_be_larger_than_its_values_is_refused(tmp_path: Path, refused: Refused) -> None:
    torch = pytest.importorskip("torch")
    claims = {"encoder.pos_embedding": torch.zeros(1, 1, 64).expand(1, 10**12, 64)}
    torch.save({"model_state_dict": claims}, tmp_path / "large.pt")
    assert "encoder.pos_embedding" in refused(tmp_path / "large.pt")


def test_what_stops_half_way_leaves_nothing(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    file, flags = model("base_elf_llama")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(import_run, "_write_checkpoint", full)
        assert "--out: found No space left on device" in refused(file, *flags)
    before = set(tmp_path.iterdir())
    imported(file, tmp_path / "run", *flags)
    assert set(tmp_path.iterdir()) - before == {tmp_path / "run"}


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def tar_of(evil: Evil) -> bytes:
    """A file in the form of PyTorch before 0.1.10."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            member, data = tarfile.TarInfo(name), pickle.dumps(evil, 2)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return content.getvalue()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("form", ["zip", "old", "bare", "tar", "in_state_dict", "in_optimizer"])
def test_a_malicious_file_runs_nothing(tmp_path: Path, refused: Refused, form: str, suffix: str) -> None:
    torch = pytest.importorskip("torch")
    witness, file = tmp_path / "it_ran", tmp_path / f"evil{suffix}"
    evil = Evil(f"touch {witness}")
    tensors = {"llm.llm.model.embed_tokens.weight": torch.ones(2, 2)}
    contents = {
        "zip": {"model_state_dict": tensors, "epoch": evil},
        "old": {"model_state_dict": tensors, "epoch": evil},
        "in_state_dict": {"model_state_dict": {**tensors, "evil": evil}},
        "in_optimizer": {"model_state_dict": tensors, "optimizer_state_dict": {"state": evil}},
    }
    if form in contents:
        torch.save(contents[form], file, _use_new_zipfile_serialization=form != "old")
    else:
        file.write_bytes(pickle.dumps(evil, 2) if form == "bare" else tar_of(evil))
    said = refused(file, "--config.llm.name=anything")
    assert str(file) in said and not witness.exists()
    if suffix != ".safetensors":
        if form not in ("bare", "tar"):
            assert "posix.system, which is no tensor" in said
        with pytest.raises(UserError):
            load_encoder("merl", file)
    assert not witness.exists()
    pickle.loads(pickle.dumps(evil))  # the attack itself is real
    assert witness.exists()


def test_a_damaged_file_is_refused(model: Model, tmp_path: Path, refused: Refused) -> None:
    file, flags = model("base_elf_llama")
    whole = file.read_bytes()
    for name, content in {"empty.pt": b"", "cut.pt": whole[: len(whole) // 2], "noise.pt": b"\x80\x02x" * 99}.items():
        (tmp_path / name).write_bytes(content)
        assert "expected a sound file of tensors only" in refused(tmp_path / name, *flags)


def test_tensors_of_other_kinds_are_refused(tmp_path: Path, refused: Refused) -> None:
    torch = pytest.importorskip("torch")
    kinds = {"sparse": torch.eye(3).to_sparse(), "eight": torch.ones(3).to(torch.float8_e4m3fn), "no": 3}
    for name, value in kinds.items():
        torch.save({"model_state_dict": {name: value}}, tmp_path / f"{name}.pt")
        assert name in refused(tmp_path / f"{name}.pt")


def test_without_torch_or_with_an_old_one_it_says_what_to_install(
    model: Model, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, flags = model("base_elf_llama")
    with monkeypatch.context() as patch:
        patch.setattr("torch.__version__", "2.5.1")
        assert "PyTorch 2.5.1, whose check of files is not safe" in refused(file, *flags)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "install it with `pip install torch`" in refused(file, *flags)
