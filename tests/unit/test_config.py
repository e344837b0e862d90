"""The configuration: the contract's keys, what is refused and in which words, the way through JSON."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from elm_jax import compat
from elm_jax.cli import help_text, read_config_file
from elm_jax.config import SCHEMA, Config, default_config, differences, from_text, resolve, to_dict
from elm_jax.data.dataset import read_system_prompt
from elm_jax.ecg.recording import LEADS
from elm_jax.errors import UserError
from elm_jax.text.prompts import PROMPTS

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
# The contract, written out a second time on purpose: a changed default must be a decision.
DEFAULTS: dict[str, Any] = {
    "seed": 0, "workdir": "runs/<name>", "objective": "sft", "elm": "mlp_llava", "update": ("connector", "llm"),
    "init_from": None, "init_missing_ok": (), "compat": (), "debug": False,
    "data": {
        "names": (), "root": ".", "outside_root": False, "prefixes": {}, "remote_gb": 16.0, "fold": 1,
        "val_fraction": 0.02, "representation": "signal",
        "segment_len": 2500, "sampling_rate": 250, "leads": LEADS, "normalize": "minmax", "norm_eps": 1e-6,
        "subset": None, "weights": None, "augment_ecg": False, "augment_rgb": False, "perturb": None,
        "system_prompt": None, "ecg_tokenizer": None, "min_ecg_tokens": 512, "explicit_thinking": False,
        "pack": True, "share": "system", "max_len": 2048, "max_bad_records": 0.001, "workers": 0, "timeout": 300.0,
    },
    "llm": {
        "name": "qwen2.5-1.5b-instruct", "scratch": None, "compute_dtype": "bfloat16",
        "param_dtype": "float32", "scan": True, "remat": "dots", "attention": "auto",
        "lora": {"rank": 0, "alpha": 32, "dropout": 0.0, "targets": "all"},
    },
    "encoder": {"name": None, "checkpoint": None, "tokens": 1, "cache": False, "config": {}},
    "connector": {"hidden": None},
    "optim": {
        "name": "adamw", "lr": 1e-4, "schedule": "constant", "warmup_ratio": 0.1, "min_lr_ratio": 0.1,
        "weight_decay": 1e-2, "weight_decay_scale": "none", "beta1": 0.9, "beta2": 0.99, "eps": 1e-8,
        "grad_clip": 0.0, "skip_spikes": 0.0, "accum_steps": 1, "ref_batch": None,
        "muon": {"momentum": 0.95, "ns_steps": 5, "adamw_lr_ratio": 0.015},
    },
    "train": {
        "batch_size": 8, "epochs": 1, "steps": None, "log_every": 10, "save_every": 500, "eval_every": None,
        "keep": 2, "early_stopping": False, "patience": 5, "patience_delta": 0.1, "timeout": 1800.0,
    },
    "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
    "eval": {
        "at_end": False, "batch_size": 32, "max_new_tokens": 128, "temperature": 0.0, "top_p": 1.0,
        "controls": ("zeros", "noise", "text_only", "shuffled"), "folds": None, "seeds": None, "limit": None,
    },
    "log": {"progress": True, "wandb": False, "tensorboard": False, "profile_steps": None},
}  # fmt: skip


def nested(key: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def refusal(given: dict[str, Any]) -> UserError:
    with pytest.raises(UserError) as caught:
        resolve(given)
    return caught.value


def test_an_older_name_with_what_equals_nothing_is_refused_in_words() -> None:
    assert "objective" in str(refusal({"phase": float("nan")}))


def test_keys_and_defaults_are_those_of_the_contract_and_those_it_has_grown_by() -> None:
    expected = copy.deepcopy(DEFAULTS)
    expected["llm"] |= {"dropout": 0.0, "chat": None}
    expected["llm"]["lora"]["adapter"] = None
    expected["eval"] |= {"repetition_penalty": 1.0, "labels": None, "protocol": "ours", "ema": False, "guidance": 1.0}
    expected["log"] |= {"wandb_project": None, "wandb_entity": None, "wandb_tags": ()}
    expected["eval"] |= {"wordnet": None, "bert_model": None, "grounding": ("grounding",)}
    expected["eval"]["judge"] = {"url": None, "model": None, "key_variable": "ELM_JAX_JUDGE_KEY", "timeout": 120.0}
    expected["eval"]["judge"] |= {"retries": 3, "workers": 4, "max_tokens": 4096, "limit": None}
    expected["train"] |= {"conversations": None, "save_minutes": None, "save_wait": False}
    expected["encoders"] = {}
    expected["data"] |= {
        "augment_paper": False, "image_layout": "12x1", "image_rhythm": (), "images": None, "missing": "error",
        "left_out": (), "drop_views": 0.0, "swap_views": 0.0,
    }  # fmt: skip
    expected["optim"] |= {"warmup_steps": None, "ema": 0.0}
    expected["rl"] = {
        "rewards": ("format", "tags", "answer"), "reward_weights": None, "answers": 4, "max_new_tokens": 384,
        "temperature": 0.8, "top_p": 0.95, "batch_size": 32, "updates": 2, "advantage": None, "mean": None,
        "tau_pos": 1.0, "tau_neg": 1.05, "low": 0.2, "high": None, "cap": None, "sequence": False, "kl": 0.0,
        "resample": None, "overlong": 0, "skip_truncated": None, "show_every": 50,
    }  # fmt: skip
    expected["dpo"] = {"loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "gamma": 0.5, "reference": True}
    expected["dpo"]["rpo_alpha"] = 0.0
    expected["ssl"] = {"mask_ratio": 0.75, "norm_patches": None, "probe": None}
    expected["ssl"] |= {"text": None, "frozen_layers": None, "temperature": 0.07}
    expected["retrieval"] = {"index": None, "k": 1, "mode": "feature", "scaling": "z_scored", "content": "report"}
    expected["retrieval"] |= {"place": "system", "search": "exact"}
    assert dataclasses.asdict(Config()) == expected
    assert default_config().to_dict() == {**expected, "phase": "sft"}  # its older name
    assert resolve(default_config()) == resolve({}) == Config(workdir="runs/default")


def test_every_key_says_in_one_line_what_it_means() -> None:
    text = help_text()
    for name, key in SCHEMA.items():
        assert key.meaning and "\n" not in key.meaning, name
        assert f"--config.{name}=" in text and key.meaning in text


def test_a_key_may_be_written_by_its_older_name() -> None:
    c = default_config()
    c.phase = "pretrain"
    assert c.objective == "pretrain" and resolve(c) == resolve({"phase": "pretrain"})
    begun = {**to_dict(resolve({})), "phase": "sft"}
    del begun["objective"]
    assert not differences(begun, resolve({})) and resolve(begun) == resolve({})
    assert list(differences(begun, resolve({"objective": "pretrain"}))) == ["objective"]


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve({}).optim.lr = 1.0  # type: ignore[misc]


def test_the_workdir_is_named_after_the_config_file() -> None:
    assert resolve({}, "llava").workdir == "runs/llava"
    assert resolve({"workdir": "/data/<name>/1"}, "llava").workdir == "/data/llava/1"
    assert resolve({"workdir": "here"}, "llava").workdir == "here"


def test_json_brings_back_an_equal_config() -> None:
    given = {
        "data": {"names": ["a", "b"], "weights": [1, 0.5], "leads": [1, "V2"], "subset": 0.5},
        "llm": {"scratch": {"layers": 2, "sizes": (1, 2)}},
        "encoder": {"name": "merl", "config": {"seq_len": 100}},
        "elm": "llava",
        "compat": ["elm-2026-08"],
    }
    config = resolve(given)
    assert resolve(json.loads(json.dumps(to_dict(config)))) == config


def test_the_defaults_of_one_config_are_not_shared_with_another() -> None:
    resolve({}).encoder.config["seq_len"] = 1
    assert resolve({}).encoder.config == {}


def test_keys_that_are_none_can_be_set_to_their_type_in_a_config_file_and_to_nothing_else() -> None:
    config = default_config()
    config.train.steps = 5
    config.data.weights = (1.0,)
    config.data.names = ("a",)
    config.llm.scratch = {"layers": 2}
    config.encoder.config.seq_len = 100
    resolved = resolve(config)
    assert (resolved.train.steps, resolved.llm.scratch) == (5, {"layers": 2})
    assert resolved.encoder.config == {"seq_len": 100}
    with pytest.raises(TypeError):
        config.train.steps = "five"


def test_leads_may_be_named_or_numbered_and_aliases_of_elm_are_replaced() -> None:
    assert resolve({"data": {"leads": [0, "V1", 11]}}).data.leads == ("I", "V1", "V6")
    assert resolve({"elm": "llava"}).elm == "linear_llava"


@pytest.mark.parametrize(
    ("given", "where", "meant"),
    [
        (nested("optim.lrr", 1), "optim.lrr", "optim.lr"),
        (nested("lr", 1), "lr", "optim.lr"),
        (nested("optm.lr", 1), "optm", "optim"),
        (nested("optm", {}), "optm", "optim"),
        (nested("llm.lora.rnk", 1), "llm.lora.rnk", "llm.lora.rank"),
        (nested("train.max_len", 1), "train.max_len", "data.max_len"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_real_one(given: dict, where: str, meant: str) -> None:
    error = refusal(given)
    assert error.where == where
    assert error.fix == f"did you mean '{meant}'?"


def test_a_key_added_in_a_config_file_is_found_out() -> None:
    config = default_config()
    config.optim.learning_rate = 1.0
    with pytest.raises(UserError, match=r"^optim\.learning_rate: found an unknown key"):
        resolve(config)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("optim.lr", "abc", "a number"),
        ("optim.lr", float("nan"), "a number"),
        ("optim.lr", float("inf"), "a number"),
        ("optim.lr", True, "a number"),
        ("optim.lr", None, "a number"),
        ("seed", True, "a whole number"),
        ("seed", 1.0, "a whole number"),
        ("data.pack", 1, "true or false"),
        ("data.root", 3, "text"),
        ("train.steps", "5", "a whole number or None"),
        ("update", "llm", "a list (each text)"),
        ("data.names", [1], "a list (each text)"),
        ("data.weights", [1, "x"], "a list (each a number) or None"),
        ("encoder.config", [1], "a dictionary"),
        ("llm.scratch", {"a": object()}, "a dictionary or None"),
        ("data", 3, "a section of keys"),
    ],
)
def test_a_wrong_type_is_refused_with_what_was_found_and_expected(
    key: str, value: Any, expected: str
) -> None:
    error = refusal(nested(key, value))
    assert error.where == key
    assert error.expected == expected
    assert key == "data" or error.found == repr(value) or "object at" in error.found


def test_a_whole_number_is_a_number() -> None:
    lr = resolve({"optim": {"lr": 1}}).optim.lr
    assert lr == 1.0 and isinstance(lr, float)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("elm", "llama"), ("data.share", "all"), ("data.normalize", "zscore"),
        ("data.perturb", "shuffled"), ("data.leads", ("V7",)), ("data.leads", (12,)), ("update", ("head",)),
        ("optim.name", "sgd"), ("optim.schedule", "linear"), ("optim.weight_decay_scale", "linear"),
        ("llm.compute_dtype", "float16"), ("llm.param_dtype", "fp32"), ("llm.remat", "some"),
        ("llm.attention", "flash"), ("eval.controls", ("zeros", "only_text")), ("compat", ("elm-2026-4",)),
    ],
)  # fmt: skip
def test_a_value_out_of_a_list_must_be_in_it(key: str, value: Any) -> None:
    assert refusal(nested(key, value)).where == key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.batch_size", 0), ("train.steps", 0), ("train.keep", 0), ("train.eval_every", 0),
        ("data.val_fraction", 1.0), ("data.val_fraction", -0.1), ("data.subset", 0.0), ("data.subset", 1.1),
        ("data.max_bad_records", 1.0), ("data.workers", -1), ("data.fold", 0), ("encoder.tokens", 0),
        ("connector.hidden", 0), ("optim.lr", 0.0), ("optim.beta2", 1.0), ("optim.warmup_ratio", 1.5),
        ("optim.accum_steps", 0), ("mesh.fsdp", 0), ("mesh.tensor", -2), ("eval.temperature", -1.0),
        ("eval.top_p", 0.0), ("eval.limit", 0), ("seed", -1),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_refused_with_the_range(key: str, value: Any) -> None:
    error = refusal(nested(key, value))
    assert (error.where, error.found) == (key, repr(value))
    assert SCHEMA[key].limit in error.expected


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"train": {"batch_size": 9}, "optim": {"accum_steps": 2}}, "train.batch_size"),
        ({"train": {"conversations": 9}, "optim": {"accum_steps": 2}}, "train.conversations"),
        ({"train": {"batch_size": 16, "conversations": 9}}, "train.batch_size"),
        ({"train": {"batch_size": None}}, "train.batch_size"),
        ({"data": {"names": ["a"], "weights": [1, 2]}}, "data.weights"),
        ({"objective": "sft", "phase": "pretrain"}, "phase"),
        ({"mesh": {"fsdp": -1}}, "mesh"),
        ({"eval": {"ema": True}}, "eval.ema"),
        ({"log": {"profile_steps": "20:10"}}, "log.profile_steps"),
        ({"log": {"profile_steps": "ten"}}, "log.profile_steps"),
        ({"update": []}, "update"),
        ({"update": ["llm", "llm"]}, "update"),
        ({"data": {"leads": []}}, "data.leads"),
        ({"data": {"leads": ["I", 0]}}, "data.leads"),
        ({"workdir": ""}, "workdir"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(given: dict, where: str) -> None:
    assert refusal(given).where == where


def test_a_step_counts_rows_or_conversations_and_a_run_goes_on_as_it_began() -> None:
    rows, talks = resolve({}), resolve(default_config().to_dict() | {"train": {"conversations": 32}})
    assert (rows.train.batch_size, rows.train.conversations, rows.train.count) == (8, None, 8)
    assert (talks.train.batch_size, talks.train.conversations, talks.train.count) == (None, 32, 32)
    assert resolve(to_dict(talks)) == talks
    assert "train.conversations" in str(differences(to_dict(rows), talks))
    (changed,) = differences(to_dict(talks), resolve({"train": {"conversations": 64}}))
    assert changed.startswith("train.conversations")
    with pytest.raises(UserError, match="set the other to None"):
        resolve({"train": {"batch_size": 32, "conversations": 64}})


def test_equal_weights_of_two_datasets_are_no_repetition() -> None:
    assert resolve({"data": {"names": ["a", "b"], "weights": [1, 1]}}).data.weights == (1.0, 1.0)


def test_a_run_may_resume_with_other_places_and_lengths_only() -> None:
    old = to_dict(resolve({}))
    allowed = resolve(
        {
            "workdir": "elsewhere", "debug": True, "mesh": {"fsdp": 2}, "log": {"wandb": True},
            "eval": {"limit": 3}, "data": {"workers": 2},
            "train": {"steps": 9, "epochs": 2, "save_every": 7, "save_minutes": 3, "save_wait": True, "keep": 1},
        }
    )  # fmt: skip
    assert differences(old, allowed) == {}
    changed = resolve({"optim": {"lr": 1.0}, "data": {"names": ["a"]}, "encoder": {"config": {"width": 1}}})
    assert sorted(differences(old, changed)) == ["data.names", "encoder.config", "optim.lr"]


def test_a_changed_key_is_shown_with_its_value_then_and_now() -> None:
    old = to_dict(resolve({"train": {"eval_every": 3}, "encoder": {"config": {"width": 1, "resnet_type": "resnet18"}}}))
    new = resolve({"train": {"eval_every": 5}, "encoder": {"config": {"width": 2, "resnet_type": "resnet18"}}})
    assert differences(old, new) == {
        "train.eval_every": "was 3, now 5",
        "encoder.config": "was {'width': 1}, now {'width': 2}",
    }


def test_a_run_of_another_version_resumes_if_only_keys_at_their_default_are_new() -> None:
    old = to_dict(resolve({}))
    del old["optim"]["eps"]
    assert differences(old, resolve({})) == {}
    assert differences(old, resolve({"optim": {"eps": 1e-6}})) == {"optim.eps": "was 1e-08, now 1e-06"}
    old["optim"]["gone"] = 1
    assert differences(old, resolve({})) == {"optim.gone": "was 1, now None"}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("update", "connector,llm", ("connector", "llm")),
        ("update", "('connector', 'llm')", ("connector", "llm")),
        ("update", "(connector, llm)", ("connector", "llm")),
        ("update", '["llm"]', ("llm",)),
        ("update", "llm,", ("llm",)),
        ("data.names", "", ()),
        ("data.names", "()", ()),
        ("data.leads", "0,V1", (0, "V1")),
        ("data.weights", "1,0.5", (1.0, 0.5)),
        ("data.weights", "none", None),
        ("train.steps", "None", None),
        ("train.steps", "12", 12),
        ("train.steps", "1e3", "1e3"),
        ("optim.lr", "1e-3", 1e-3),
        ("optim.lr", "fast", "fast"),
        ("optim.weight_decay_scale", "none", "none"),
        ("data.pack", "False", False),
        ("data.pack", "1", True),
        ("data.pack", "maybe", "maybe"),
        ("llm.scratch", '{"layers": 2}', {"layers": 2}),
        ("llm.scratch", "{'layers': 2, 'tied': True}", {"layers": 2, "tied": True}),
        ("llm.scratch", "layers", "layers"),
        ("data.root", "3", "3"),
    ],
)
def test_text_becomes_a_value_of_the_keys_type_or_stays_text(key: str, text: str, value: Any) -> None:
    read = from_text(key, text)
    assert read == value and type(read) is type(value)


def test_shipped_configs_are_short_and_resolve() -> None:
    assert {path.stem for path in CONFIGS} >= {"base", "llava_merl"}
    for path in CONFIGS:
        assert len(path.read_text().splitlines()) < 60, path.name
        tree, name = read_config_file(str(path))
        assert resolve(ConfigDict(tree), name).workdir == f"runs/{path.stem}"


def test_each_behaviour_is_enabled_by_its_name_and_by_its_presets() -> None:
    for name in compat.BEHAVIOURS:
        assert compat.enabled(name, (name,))
        assert not compat.enabled(name, ())
    for preset, names in compat.PRESETS.items():
        assert names and set(names) <= set(compat.BEHAVIOURS)
        assert all(compat.enabled(name, (preset,)) for name in names)


def test_an_unknown_behaviour_is_our_fault_to_ask_and_the_users_to_name() -> None:
    with pytest.raises(AssertionError):
        compat.enabled("no_such_behaviour", ())
    with pytest.raises(UserError, match="did you mean 'elm-2026-04'"):
        compat.check(["elm-2026-4"])
    compat.check([*compat.BEHAVIOURS, *compat.PRESETS])


def test_each_behaviour_is_read_by_the_code() -> None:
    package = Path(compat.__file__).parent
    code = "".join(path.read_text() for path in package.rglob("*.py") if path.name != "compat.py")
    unread = [name for name in compat.BEHAVIOURS if f'"{name}"' not in code]
    assert unread == [], "take these out of compat.BEHAVIOURS, or build them"


def test_system_prompts_have_names_and_the_st_mem_recipe_thinks_in_every_stage() -> None:
    assert len(PROMPTS) > 7 and all(read_system_prompt(name) == text for name, text in PROMPTS.items())
    assert read_system_prompt("Think of ECGs.") == "Think of ECGs." and read_system_prompt("") is None
    pair, three = PROMPTS["bc-noise-flatline"], PROMPTS["mc-ecg-noise-flatline"]
    assert pair.index("A: noise") < pair.index("B: a flat line") < pair.index("one letter, A or B")
    assert three.index("A: an ECG") < three.index("C: a flat line") < three.index("one letter, A, B or C")
    folder = Path(__file__).resolve().parents[2] / "configs" / "st_mem_full_training"
    for stage in range(1, 5):
        config = resolve(*read_config_file(str(folder / f"stage{stage}.py")))
        assert config.data.system_prompt == PROMPTS["think"], stage
