"""The parts of a run: the tokenizer it begins from, the ECG-Byte it keeps, and what does not fit together."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from elm_jax.assemble import Assembly, assemble
from elm_jax.config import Config, resolve
from elm_jax.data.demo import demo_tokenizer
from elm_jax.errors import UserError
from elm_jax.run import folder as run
from elm_jax.run.weights import Weights
from elm_jax.symbols.coder import EcgByte
from elm_jax.text.render import THINK_TOKENS
from elm_jax.training.loop import Trainer

SIZES = {"hidden": 16, "layers": 1, "heads": 2, "mlp": 16, "max_len": 128}
ECG_BYTE = {"elm": "ecg_byte", "update": ["llm"], "data__representation": "symbolic"}
NEXT_TOKEN = {
    "objective": "next_token", "encoder__name": "next_token", "update": ["encoder"], "data__representation": "symbolic",
    "encoder__config": {"d_model": 16, "n_heads": 2, "dim_ff": 16, "num_layers": 1}, "eval__at_end": False,
}  # fmt: skip
BASE_ELF = {"elm": "base_elf"}
MERL = {"elm": "linear_llava", "encoder__name": "merl", "encoder__config": {"resnet_type": "resnet18", "width": 4}}
VIT = {
    "encoder__name": "vit", "data__representation": "stacked_signal",
    "encoder__config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
}  # fmt: skip


def config(workdir: Path, **keys: Any) -> Config:
    """A config of the demo's data and tokenizer, with these keys (`__` for the dot)."""
    keys = {"llm__name": "demo", "llm__scratch": SIZES, "data__names": ["demo"], "data__sampling_rate": 50,
            "data__segment_len": 500, "data__max_len": 128, "workdir": str(workdir)} | keys  # fmt: skip
    tree: dict[str, Any] = {}
    for key, value in keys.items():
        place, (*sections, leaf) = tree, key.split("__")
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return resolve(tree)


def begun(config: Config) -> Assembly:
    """The parts of a run whose folder holds what training leaves there first."""
    assembly = assemble(config, Path(config.workdir) / "tokenizer")
    folder = run.open_folder(config)
    run.keep_tokenizer(folder, assembly.tokenizer, assembly.signal.ecg_byte)
    return assembly


@pytest.fixture
def coders(tmp_path: Path) -> tuple[Path, Path]:
    """Two ECG-Byte files of the same size."""
    files = tmp_path / "one.json", tmp_path / "other.json"
    for file, merge in zip(files, (b"aa", b"ab"), strict=True):
        EcgByte([merge, b"abab"]).save(file)
    return files


# -- what the config alone says comes first -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"encoder__name": "clip-vit-base-patch32"}, "encoder.name: found 'clip-vit-base-patch32'; .*name=clip, and"),
        ({"encoder__name": "google/vit-base-patch16-224-in21k"}, "set encoder.name=vit, and encoder.checkpoint to"),
        ({"encoder__name": "siglip2-so400m-patch16-naflex"}, "set encoder.name=siglip2, and"),
        ({"encoder__name": "ST-MEM-large"}, "set encoder.name=st_mem, and"),
        ({"encoder__name": "merll"}, "did you mean 'merl'"),
        ({"encoder__name": "vitamin"}, "expected one of merl, .*choose one|did you mean 'vit'"),
        ({"encoder__config": {"resnet": "resnet18"}}, "encoder.config.resnet: found an unknown field"),
        ({"encoder__name": "st_mem", "encoder__config": {"patch_size": 7}}, "encoder.config.patch_size"),
    ],
)
def test_an_encoder_that_is_none_is_told_before_the_llm_is_looked_for(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    nowhere = {"llm__name": str(tmp_path / "none"), "llm__scratch": None}
    with pytest.raises(UserError, match=message):
        assemble(config(tmp_path, **MERL | nowhere | keys))


def test_thinking_is_of_a_form_that_has_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.explicit_thinking: found True; expected false with objective=pretrain"):
        assemble(config(tmp_path, **MERL, objective="pretrain", data__explicit_thinking=True))


# -- the tokenizer of init_from -------------------------------------------------------------------------------


@pytest.mark.parametrize("elm", ["ecg_byte", "base_elf", "linear_llava"])
def test_a_run_that_starts_from_another_keeps_the_ids_of_its_tokens(
    elm: str, tmp_path: Path, coders: tuple[Path, Path]
) -> None:
    keys = {"ecg_byte": ECG_BYTE | {"data__ecg_tokenizer": str(coders[0])}, "base_elf": BASE_ELF, "linear_llava": MERL}
    first = begun(config(tmp_path / "first", phase="pretrain", **keys[elm]))
    second = begun(config(tmp_path / "second", phase="sft", init_from=str(tmp_path / "first"), **keys[elm]))
    before, after = first.tokenizer.get_vocab(), second.tokenizer.get_vocab()
    assert before.items() < after.items()
    more = sorted(after.keys() - before.keys(), key=lambda token: after[token])
    assert tuple(more) == THINK_TOKENS and [after[token] for token in more] == [*range(len(before), len(after))]
    if elm == "ecg_byte":
        assert first.signal.tokens is not None and second.signal.tokens is not None
        np.testing.assert_array_equal(first.signal.tokens.llm_ids, second.signal.tokens.llm_ids)
    again = assemble(second.config, tmp_path / "second" / "tokenizer")
    assert again.tokenizer.get_vocab() == after


@pytest.mark.parametrize("spare", [1, 4, 5])
def test_fine_tuning_has_the_vocabulary_of_pretraining(spare: int, tmp_path: Path) -> None:
    """However close the tokenizer is to a multiple of 64, to which the rows of the table are rounded up."""
    more = -(len(demo_tokenizer()) + 1 + 256 + spare) % 64
    EcgByte([b"a" * n for n in range(2, 2 + more)]).save(tmp_path / "ecg_byte.json")
    keys = ECG_BYTE | {"data__ecg_tokenizer": str(tmp_path / "ecg_byte.json")}
    first = begun(config(tmp_path / "first", phase="pretrain", **keys))
    second = assemble(config(tmp_path / "second", phase="sft", init_from=str(tmp_path / "first"), **keys))
    assert len(second.tokenizer) == len(first.tokenizer) + 4 <= second.llm.vocab_size == first.llm.vocab_size


def test_a_run_without_a_tokenizer_is_nothing_to_start_from(tmp_path: Path) -> None:
    begun(config(tmp_path / "first", **BASE_ELF))
    shutil.rmtree(tmp_path / "first" / "tokenizer")
    with pytest.raises(UserError, match="config.init_from: found .*first without tokenizer/tokenizer.json"):
        assemble(config(tmp_path / "second", init_from=str(tmp_path / "first"), **BASE_ELF))


def test_another_llm_with_another_tokenizer_is_refused(tmp_path: Path, golden: Any) -> None:
    begun(config(tmp_path / "first", **BASE_ELF))
    keys = BASE_ELF | {"init_from": str(tmp_path / "first"), "llm__name": str(golden("text_tokenizer_qwen"))}
    with pytest.raises(UserError, match="llm.name: found .*text_tokenizer_qwen, .*set --config.llm.name=demo"):
        assemble(config(tmp_path / "second", **keys))


@pytest.mark.parametrize("same", [True, False])
def test_the_same_tokenizer_under_another_name_is_taken_if_texts_end_alike(same: bool, tmp_path: Path) -> None:
    begun(config(tmp_path / "first", **BASE_ELF))
    tokenizer = demo_tokenizer()
    if not same:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(5)
    tokenizer.save_pretrained(tmp_path / "llm")
    keys = BASE_ELF | {"init_from": str(tmp_path / "first"), "llm__name": str(tmp_path / "llm")}
    if same:
        assert len(assemble(config(tmp_path / "second", **keys)).tokenizer) == len(tokenizer) + 5
    else:
        with pytest.raises(UserError, match="llm.name: found"):
            assemble(config(tmp_path / "second", **keys))


# -- the run's own ECG-Byte -----------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [ECG_BYTE, NEXT_TOKEN])
def test_a_run_keeps_its_ecg_byte(keys: dict[str, Any], tmp_path: Path, coders: tuple[Path, Path]) -> None:
    one, other = coders
    own = tmp_path / "run" / "tokenizer"
    first = begun(config(tmp_path / "run", **keys, data__ecg_tokenizer=str(one)))
    copied = tmp_path / "moved.json"
    one.rename(copied)
    for given in (one, copied):  # what it began with need not be there; the same elsewhere is the same
        found = assemble(config(tmp_path / "run", **keys, data__ecg_tokenizer=str(given)), own)
        assert found.signal.ecg_byte is not None and first.signal.ecg_byte is not None
        assert found.signal.ecg_byte.merges == first.signal.ecg_byte.merges
    with pytest.raises(UserError, match="data.ecg_tokenizer: found .*other.json; expected the same ECG-Byte as"):
        assemble(config(tmp_path / "run", **keys, data__ecg_tokenizer=str(other)), own)
    other.rename(one)  # the same name, other contents
    with pytest.raises(UserError, match="data.ecg_tokenizer: found .*one.json; expected the same ECG-Byte as"):
        assemble(config(tmp_path / "run", **keys, data__ecg_tokenizer=str(one)), own)


@pytest.mark.parametrize("keys", [ECG_BYTE, NEXT_TOKEN])
def test_who_starts_from_a_run_needs_its_ecg_byte(
    keys: dict[str, Any], tmp_path: Path, coders: tuple[Path, Path]
) -> None:
    one, other = coders
    begun(config(tmp_path / "first", **keys, data__ecg_tokenizer=str(one)))
    for given, said in ((other, "found .*other.json; expected the same"), (tmp_path / "none.json", "no readable file")):
        more = {"init_from": str(tmp_path / "first"), "data__ecg_tokenizer": str(given)}
        with pytest.raises(UserError, match=said):
            assemble(config(tmp_path / "second", **keys, **more))


# -- what does not fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (ECG_BYTE | {"update": ["connector"]}, "update: found connector; expected no connector with elm=ecg_byte"),
        (ECG_BYTE | {"update": ["encoder"]}, "update: found encoder; expected no encoder with elm=ecg_byte"),
        (BASE_ELF | {"update": ["encoder", "llm"]}, "update: found encoder; expected no encoder with elm=base_elf"),
        (ECG_BYTE | {"encoder__tokens": 2}, "encoder.tokens: found 2; expected 1 for elm=ecg_byte"),
        (BASE_ELF | {"encoder__tokens": 2}, "encoder.tokens: found 2; expected 1 for elm=base_elf"),
        (BASE_ELF | {"data__ecg_tokenizer": "one.json"}, "data.ecg_tokenizer: found one.json; expected None but for"),
        (MERL | {"data__augment_rgb": True}, "data.augment_rgb: found True; expected false without an encoder of im"),
        (ECG_BYTE | {"data__augment_rgb": True}, "data.augment_rgb: found True"),
        (MERL | {"connector__hidden": 8}, "connector.hidden: found 8; expected None but for elm=mlp_llava"),
        (BASE_ELF | {"connector__hidden": 8}, "connector.hidden: found 8"),
        (ECG_BYTE | {"connector__hidden": 8}, "connector.hidden: found 8"),
    ],
)
def test_what_would_be_ignored_is_refused(keys: dict, said: str, tmp_path: Path, coders: tuple[Path, Path]) -> None:
    if keys["elm"] == "ecg_byte":
        keys = keys | {"data__ecg_tokenizer": str(coders[0])}
    with pytest.raises(UserError, match=said):
        assemble(config(tmp_path / "run", **keys))


def test_what_has_a_use_is_taken(tmp_path: Path) -> None:
    images = assemble(config(tmp_path / "run", elm="mlp_llava", **VIT, data__augment_rgb=True, connector__hidden=8))
    assert images.signal.augment_rgb and images.structure.leaves["connector.hidden.kernel"].shape == (16, 8)


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        (ECG_BYTE, []),
        (BASE_ELF | {"update": ["llm"]}, ["connector"]),
        (BASE_ELF | {"update": ["connector"]}, ["llm"]),
        (MERL | {"update": ["connector", "llm"]}, ["encoder"]),
    ],
)
def test_only_parts_that_exist_are_warned_of(
    keys: dict, parts: list[str], tmp_path: Path, coders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    if keys["elm"] == "ecg_byte":
        keys = keys | {"data__ecg_tokenizer": str(coders[0])}
    made = config(tmp_path / "run", **keys)
    Trainer._warn_of_random_parts(SimpleNamespace(config=made, assembly=assemble(made)))  # type: ignore[arg-type]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" stays")[0] for line in lines] == [f"warning: the {part}" for part in parts]


def test_a_frozen_encoder_needs_all_its_weights(tmp_path: Path, golden: Any) -> None:
    """A SigLIP 2 checkpoint has the blocks of SigLIP-ECG, but not its stem."""
    keys = {"elm": "linear_llava", "encoder__name": "siglip_ecg", "encoder__config": {"patch_size": 25}}
    keys["encoder__checkpoint"] = str(golden("vision_siglip2_naflex"))
    for update in (["connector", "llm"], ["encoder", "connector", "llm"]):
        assembly = assemble(config(tmp_path, update=update, **keys))
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = dict.fromkeys(assembly.structure.leaves, here)
        if "encoder" in update:
            assert set(Weights(assembly).place(shardings)) == set(shardings)
        else:
            with pytest.raises(UserError, match=r"encoder.checkpoint: found no weights for .*stay as they are drawn"):
                Weights(assembly).place(shardings)
