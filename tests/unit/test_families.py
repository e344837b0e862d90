"""Configurations of the families, Hugging Face's and ours: what is read, refused, written; odd checkpoints."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from flax import nnx
from tiny_llms import TINY, VOCABULARY, tiny_config, tiny_llm

from elm_jax.errors import UserError
from elm_jax.models.experts import ExpertSizes
from elm_jax.models.families import (
    ALIASES,
    FAMILIES,
    chat_family,
    extended,
    family_of,
    from_hf,
    rules_of,
    scratch_config,
    to_hf,
)  # fmt: skip
from elm_jax.models.layers import LongScaling, Rope
from elm_jax.models.lora import target_modules
from elm_jax.models.names import export
from elm_jax.text.forms import CHAT_FORMS
from elm_jax.weights.files import open_checkpoint
from elm_jax.weights.load import load_llm, open_llm, parameters, read_llm_config, resolve_llm_folder
from elm_jax.weights.safetensors import save_safetensors

SHARDED = "llm_llama_untied_sharded"

REFUSED = {
    "unknown field": ({"logit_scale": 2.0}, "logit_scale"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "bias": ({"attention_bias": True}, "attention_bias"),
    "rope type": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
    "rope field": ({"rope_parameters": {"rope_theta": 1e4, "factor": 4.0}}, "factor"),
    "rope value": ({"rope_parameters": {"rope_theta": -1}}, "rope_theta"),
    "model type": ({"model_type": "mamba"}, "llama or qwen2 or .* or gpt2 or opt"),
    "size": ({"num_hidden_layers": 0}, "layers"),
    "size that is no number": ({"hidden_size": "64"}, "hidden"),
    "heads": ({"num_key_value_heads": 3}, "kv_heads"),
    "missing": ({"vocab_size": None}, "vocab_size"),
    "tied": ({"tie_word_embeddings": "yes"}, "tied"),
}


@pytest.mark.parametrize("changes, named", REFUSED.values(), ids=REFUSED)
def test_what_the_decoder_does_not_compute_is_refused_by_name(golden, changes, named):
    config = json.loads((golden(SHARDED) / "config.json").read_text())
    with pytest.raises(UserError, match=named):
        from_hf(config | changes, "config.json")


@pytest.mark.parametrize("changes, named", [
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
])  # fmt: skip
def test_windows_of_qwen2_are_refused(golden, changes, named):
    config = json.loads((golden("llm_qwen2_tied") / "config.json").read_text())
    with pytest.raises(UserError, match=named):
        from_hf(config | changes, "config.json")


def test_the_configs_of_published_models_are_read():
    qwen = {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 1536, "initializer_range": 0.02,
        "intermediate_size": 8960, "max_position_embeddings": 32768, "max_window_layers": 21,
        "model_type": "qwen2", "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 151936,
    }  # fmt: skip
    config = from_hf(qwen, "config.json")
    assert (config.head_dim, config.rope.theta, config.qkv_bias, config.tied) == (128, 1e6, True, True)
    assert extended(config, 151_670) == config


def test_scratch_sizes_make_a_config():
    config = scratch_config({"hidden": 64, "layers": 2, "heads": 4, "mlp": 128, "family": "llama"}, 500)
    assert (config.kv_heads, config.head_dim, config.vocab_size, config.qkv_bias) == (4, 16, 512, False)
    with pytest.raises(UserError, match="did you mean 'layers'"):
        scratch_config({"hidden": 64, "layer": 2, "heads": 4, "mlp": 128}, 500)
    with pytest.raises(UserError, match="no mlp"):
        scratch_config({"hidden": 64, "layers": 2, "heads": 4}, 500)


def test_the_chat_form_follows_the_tokenizer():
    assert chat_family("llama", {"<|start_header_id|>": 1, "<s>": 2}) == "llama3"
    assert chat_family("llama", {"<s>": 1}, "{{ '[INST] ' + content }}") == "llama2"
    assert chat_family("llama", {"<s>": 1}) == "plain", "a base model has no chat form"
    assert chat_family("qwen3", {"<|im_start|>": 1}) == "qwen2"
    assert chat_family("gemma2", {"<start_of_turn>": 1}) == "gemma2"
    assert chat_family("gpt2", {"<|endoftext|>": 1}) == chat_family("opt", {"</s>": 1}) == "gpt2"
    assert {form for family in FAMILIES.values() for _, form in family.chat} <= set(CHAT_FORMS)
    assert chat_family("qwen2", {"<|im_start|>": 1}) == "qwen2"
    assert chat_family("llama", {"<|im_start|>": 1}) == "plain"
    assert chat_family("llama", {"<s>": 1}, "{{ 'USER: ' + content + ' ASSISTANT:' }}") == "vicuna"
    assert chat_family("gemma3_text", {"<start_of_turn>": 1}) == "gemma3"
    assert chat_family("phi3", {"<|assistant|>": 1}) == "phi3"
    assert chat_family("mistral", {"[INST]": 1}) == chat_family("mistral", {}, "[INST] x") == "mistral"


def test_a_tokenizer_that_many_forms_share_says_which_by_name_or_is_refused():
    llama2 = {"<s>": 1, "</s>": 2, "\u2581": 3}
    for family in ("llama", "mistral"):
        with pytest.raises(UserError, match="llm.chat: found None.*of /models/mine, .*--config.llm.chat"):
            chat_family(family, llama2, "", "/models/mine", guess=False)
    assert chat_family("llama", llama2, "", "vicuna-7b-v1.5", guess=False) == "vicuna"
    assert chat_family("llama", llama2, "", "biomedgpt-lm-7b", guess=False) == "llama2"
    assert chat_family("llama", llama2, "", "/models/mine") == "plain", "a run that has begun goes on"


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("vicuna-7b-v1.5", "vicuna"),
        ("lmsys/vicuna-7b-v1.5", "vicuna"),
        ("/models/Vicuna-13B/", "vicuna"),
        ("biomedgpt-lm-7b", "llama2"),
        ("PharMolix/BioMedGPT-LM-7B", "llama2"),
        ("/models/vicuna/other", "plain"),
    ],
)
def test_a_chat_form_that_no_tokenizer_tells_is_taken_by_name_and_said(caplog, name: str, form: str):
    assert chat_family("llama", {"<s>": 1}, "", name) == form
    (line,) = caplog.messages
    assert name in line and repr(form) in line and "llm.chat" in line
    caplog.clear()
    assert chat_family("llama", {"<|start_header_id|>": 1}, "", name) == "llama3"
    assert not caplog.messages, "what the tokenizer says is no guess"


@pytest.mark.parametrize("name", ["qwen3.5-0.6b", "qwen4", "gemma-3-2b-it"])
def test_a_family_that_is_not_supported_is_said_to_be_so_and_no_other_is_suggested(name: str):
    for ask in (family_of, resolve_llm_folder):
        with pytest.raises(UserError, match="supported yet") as told:
            ask(name)
        assert "did you mean" not in str(told.value)
        assert all(family in str(told.value) for family in FAMILIES)


def test_a_slip_in_the_name_of_a_model_is_still_recognised():
    with pytest.raises(UserError, match="did you mean 'qwen3-0.6b'"):
        resolve_llm_folder("qwen-3-06b")
    with pytest.raises(UserError, match="did you mean 'gemma2'"):
        family_of("gema2")


def test_the_family_decides_its_biases(golden):
    assert replace(read_llm_config(golden("llm_qwen2_tied")), qkv_bias=False).model_type == "qwen2"
    paths = parameters(nnx.state(load_llm(golden("llm_qwen2_tied"))))
    assert {path for path in paths if path.endswith("bias")} == {f"layers.attention.{n}.bias" for n in "qkv"}


# The other families


@pytest.mark.parametrize("family", TINY)
def test_scratch_configs_are_written_and_read_again(family):
    config = tiny_config(family)
    assert config.model_type == TINY[family].get("family", family)
    assert from_hf(to_hf(config), "config.json") == config
    least = scratch_config({"hidden": 32, "layers": 2, "heads": 4, "mlp": 64, "family": config.model_type}, 100)
    assert from_hf(to_hf(least), "config.json") == least


@pytest.mark.parametrize("family", TINY)
def test_rules_and_parameters_fit_in_every_family(family, tmp_path):
    llm = tiny_llm(family)
    arrays = {path: np.asarray(v[...]) for path, v in parameters(nnx.state(llm)).items()}
    rules = rules_of(llm.config)
    assert set(arrays) <= {rule.ours for rule in rules}
    (tmp_path / "config.json").write_text(json.dumps(to_hf(llm.config)))
    save_safetensors(tmp_path / "model.safetensors", dict(export(rules, arrays)))
    again = parameters(nnx.state(load_llm(tmp_path)))
    assert all(np.array_equal(again[path][...], array) for path, array in arrays.items())


@pytest.mark.slow  # PyTorch
@pytest.mark.parametrize("family", ["gemma3_text", "mistral", "phi3", "opt_350m"])
def test_transformers_computes_what_we_do_with_what_we_write(family, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    llm = tiny_llm(family)
    arrays = {path: np.asarray(v[...]) for path, v in parameters(nnx.state(llm)).items()}
    (tmp_path / "config.json").write_text(json.dumps({**to_hf(llm.config), "pad_token_id": None}))
    tensors = dict(export(rules_of(llm.config), arrays))
    save_safetensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").float()
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, (2, 59))  # longer than every window, and Phi-3's short
    mask = np.ones_like(tokens)
    mask[1, :7] = 0
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask)).logits.numpy()
    ours = np.asarray(llm(tokens, mask))
    assert np.abs(ours - theirs)[mask == 1].max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("name", ["gemma3", "mistral", "phi3", "llama2_vicuna"])
def test_what_was_read_is_written_byte_for_byte(golden, name):
    folder = golden(f"llm_{name}")
    config, theirs = read_llm_config(folder), open_checkpoint(folder)
    arrays = open_llm(folder, config).arrays()
    written = dict(export(rules_of(config), arrays))
    assert {key: (x.dtype, x.shape, x.tobytes()) for key, x in written.items()} == {
        key: (x.dtype, x.shape, x.tobytes()) for key, x in ((key, np.asarray(x)) for key, x in theirs.items())
    }
    found = target_modules(config, "peft")
    fused = ["layers.attention.qkv"]
    assert [*found] == (fused if name == "phi3" else ["layers.attention.q", "layers.attention.v"])
    everything = target_modules(config, "all")
    assert len(everything) == (4 if name == "phi3" else 7) and {"layers.mlp.down"} <= {*everything}


def test_scratch_keys_are_those_of_the_family():
    sizes = {"hidden": 32, "layers": 2, "heads": 4, "mlp": 64}
    for family, key in (("gpt2", "kv_heads"), ("opt", "rope_theta"), ("llama", "window"), ("opt", "norm_eps")):
        with pytest.raises(UserError, match=f"llm.scratch: found '{key}'"):
            scratch_config(sizes | {"family": family, key: 1}, 64)
    gemma = scratch_config(sizes | {"family": "gemma2"}, 64)
    assert (gemma.windows, gemma.attention_cap, gemma.logit_cap, gemma.query_scalar) == ((4096, None), 50, 30, 8)
    with pytest.raises(UserError, match="sliding_window: found 0"):
        scratch_config(sizes | {"family": "gemma2", "window": 0}, 64)


REFUSED_BY_FAMILY = {
    "qwen3.5 layer types": ("llm_qwen3_5", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
    "qwen3.5 all linear": ("llm_qwen3_5", {"layer_types": ["linear_attention"] * 4}, "no layer of full_attention"),
    "qwen3.5 heads": ("llm_qwen3_5", {"linear_num_value_heads": 3}, "3 value heads, 2 key heads"),
    "qwen3.5 without a gate": ("llm_qwen3_5", {"attn_output_gate": False}, "attn_output_gate"),
    "qwen3.5 experts": ("llm_qwen3_5", {"num_experts": 4}, "unknown field num_experts"),
    "qwen3.5 convolution": ("llm_qwen3_5", {"linear_conv_kernel_dim": 0}, "taps"),
    "experts that are two numbers": ("llm_qwen3_moe", {"num_experts": 4}, "num_local_experts = 8"),
    "too many experts": ("llm_qwen3_moe", {"num_experts_per_tok": 9}, "9 of 8 experts"),
    "no experts": ("llm_qwen3_moe", {"num_local_experts": None}, "num_experts"),
    "router loss": ("llm_qwen3_moe", {"output_router_logits": True}, "output_router_logits"),
    "dense layers": ("llm_qwen3_moe", {"mlp_only_layers": "none"}, "mlp_only_layers"),
    "sparse step": ("llm_qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
    "gemma2 without caps": ("llm_gemma2", {"attn_logit_softcapping": ...}, "attn_logit_softcapping"),
    "gemma2 layer types": ("llm_gemma2", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    "gemma2 chunks": ("llm_gemma2", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
    "gemma2 window": ("llm_gemma2", {"sliding_window": None}, "sliding_window"),
    "gemma2 activation": ("llm_gemma2", {"hidden_activation": "gelu"}, "hidden_activation"),
    "gemma2 both ways": ("llm_gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "qwen3 windows": ("llm_qwen3", {"use_sliding_window": True}, "use_sliding_window"),
    "qwen3 without head_dim": ("llm_qwen3", {"head_dim": None}, "head_dim"),
    "gpt2 scaling": ("llm_gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    "gpt2 rope": ("llm_gpt2", {"rope_theta": 1e4}, "unknown field rope_theta"),
    "opt norms": ("llm_opt", {"do_layer_norm_before": 0}, "pre_norm: found 0"),
    "opt projection": ("llm_opt", {"word_embed_proj_dim": -1}, "embedding: found -1"),
    "gemma3 caps": ("llm_gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50"),
    "gemma3 local positions": (
        "llm_gemma3",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "stretched positions within the window",
    ),
    "gemma3 kinds of positions": (
        "llm_gemma3", {"rope_parameters": {"full_attention": {}, "other": {}}}, "rope_parameters with other"
    ),
    "mistral layer types": ("llm_mistral", {"layer_types": ["full_attention"] * 3}, "unknown field layer_types"),
    "mistral window": ("llm_mistral", {"sliding_window": "8"}, "sliding_window"),
    "phi3 factors": (
        "llm_phi3",
        {"rope_parameters": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 2.0]}},
        "1 short_factor, 2 long_factor; expected 8 each",
    ),
    "phi3 share": ("llm_phi3", {"rope_parameters": {"partial_rotary_factor": 2.0}}, "partial_rotary_factor: found 2"),
    "llama share": (SHARDED, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "with partial_rotary_factor"),
    "galactica": ("llm_opt", {"activation_function": "gelu"}, "activation_function"),
}


@pytest.mark.parametrize("name, changes, named", REFUSED_BY_FAMILY.values(), ids=REFUSED_BY_FAMILY)
def test_variants_of_a_family_are_refused_by_name(golden, name, changes, named):
    config = json.loads((golden(name) / "config.json").read_text()) | changes
    with pytest.raises(UserError, match=named):
        from_hf({key: value for key, value in config.items() if value is not ...}, "config.json")


PUBLISHED = {
    "qwen3-30b-a3b": (
        {
            "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
            "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
            "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
            "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
            "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
            "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
            "use_sliding_window": False, "vocab_size": 151936,
        },
        {"sparse": (True,), "experts": ExpertSizes(128, 8, 768, True), "period": 1},
    ),
    "qwen3.5": (
        {
            "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "tie_word_embeddings": True,
            "image_token_id": 248056, "vision_config": {"model_type": "qwen3_5"},
            "text_config": {
                "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True,
                "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size": 1024,
                "intermediate_size": 3584, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
                "linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_value_head_dim": 128,
                "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144, "mlp_only_layers": [],
                "model_type": "qwen3_5_text", "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False,
                "num_attention_heads": 8, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
                "use_cache": True, "vocab_size": 248320,
                "rope_parameters": {
                    "mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25,
                    "rope_theta": 10000000, "rope_type": "default",
                },
            },
        },
        {"linear": (True, True, True, False), "tied": True, "rope": Rope(1e7, 1.0, 0.25), "period": 4},
    ),
    "gemma-2-2b-it": (
        {
            "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
            "eos_token_id": [1, 107], "final_logit_softcapping": 30.0, "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
            "initializer_range": 0.02, "intermediate_size": 9216, "max_position_embeddings": 8192,
            "model_type": "gemma2", "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4,
            "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
            "sliding_window": 4096, "torch_dtype": "bfloat16", "transformers_version": "4.42.4", "use_cache": True,
            "vocab_size": 256000,
        },
        {"windows": (4096, None), "tied": True, "scale_embeddings": True},
    ),
    "gpt2": (
        {
            "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
            "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12,
            "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
            "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
            "summary_use_proj": True, "vocab_size": 50257,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        },
        {"mlp": 3072, "head_dim": 64, "tied": True, "rope": None},
    ),
    "opt-125m": (
        {
            "_name_or_path": "facebook/opt-125m", "_remove_final_layer_norm": False, "activation_dropout": 0.0,
            "activation_function": "relu", "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0,
            "bos_token_id": 2, "do_layer_norm_before": True, "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 3072,
            "hidden_size": 768, "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048,
            "model_type": "opt", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
            "prefix": "</s>", "torch_dtype": "float16", "transformers_version": "4.21.0.dev0", "use_cache": True,
            "vocab_size": 50272, "word_embed_proj_dim": 768,
        },
        {"position_offset": 2, "tied": True, "activation": "relu"},
    ),
    "opt-350m": (
        {
            "activation_dropout": 0.0, "activation_function": "relu", "architectures": ["OPTForCausalLM"],
            "attention_dropout": 0.0, "bos_token_id": 2, "do_layer_norm_before": False, "dropout": 0.1,
            "eos_token_id": 2, "ffn_dim": 4096, "hidden_size": 1024, "init_std": 0.02, "layerdrop": 0.0,
            "max_position_embeddings": 2048, "model_type": "opt", "num_attention_heads": 16, "num_hidden_layers": 24,
            "pad_token_id": 1, "prefix": "</s>", "torch_dtype": "float16", "use_cache": True, "vocab_size": 50272,
            "word_embed_proj_dim": 512,
        },
        {"pre_norm": False, "embedding": 512, "hidden": 1024},
    ),
    "gemma-3-1b-it": (
        {
            "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
            "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
            "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
            "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0,
            "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
            "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
            "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 262144,
        },
        {"windows": tuple(None if i % 6 == 5 else 512 for i in range(26)), "rope": Rope(1e6), "local_rope": Rope(1e4)},
    ),
    "mistral-7b-v0.1": (
        {
            "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
            "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
            "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
            "vocab_size": 32000,
        },
        {"windows": (4096,), "head_dim": 128},
    ),
    "phi-4-mini-instruct": (
        {
            "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "bos_token_id": 199999, "embd_pdrop": 0.0,
            "eos_token_id": 199999, "full_attn_mod": 1, "hidden_act": "silu", "hidden_size": 3072,
            "initializer_range": 0.02, "intermediate_size": 8192, "interpolate_factor": 1, "lm_head_bias": False,
            "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "phi3", "num_attention_heads": 24,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "original_max_position_embeddings": 4096,
            "pad_token_id": 199999, "partial_rotary_factor": 0.75, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
            "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
            "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "use_cache": True, "vocab_size": 200064,
        },
        {
            "rope": Rope(1e4, LongScaling((1.0,) * 48, (2.0,) * 48, 4096, (1 + 5 / 12) ** 0.5), 0.75),
            "windows": (262144,), "fused_mlp": True, "tied": True,
        },
    ),
    "vicuna-7b-v1.5": (
        {
            "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
            "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
            "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 0, "pretraining_tp": 1,
            "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
            "transformers_version": "4.31.0", "use_cache": True, "vocab_size": 32000,
        },
        {"kv_heads": 32, "head_dim": 128, "tied": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("published, parts", PUBLISHED.values(), ids=PUBLISHED)
def test_the_configs_of_other_published_models_are_read(published, parts):
    config = from_hf(published, "config.json")
    assert {name: getattr(config, name) for name in parts} == parts
    assert from_hf(to_hf(config), "config.json") == config


def test_the_language_model_within_a_model_of_more_parts_is_read(golden, tmp_path):
    """As the Hub has Qwen3.5: beside a vision tower, and layers that predict several tokens."""
    source = golden("llm_qwen3_5")
    config = {"model_type": "qwen3_5", "vision_config": {}, "tie_word_embeddings": False}
    config["text_config"] = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {name.replace("model.", "model.language_model.", 1): x for name, x in open_checkpoint(source).items()}
    others = {"model.visual.x.weight": np.ones(2, np.float32), "mtp.norm.weight": np.ones(2, np.float32)}
    save_safetensors(tmp_path / "model.safetensors", tensors | others)
    config = read_llm_config(source)
    expected, found = (open_llm(folder, config).arrays() for folder in (source, tmp_path))
    assert found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)
    save_safetensors(tmp_path / "model.safetensors", tensors | {"model.other.weight": np.ones(2, np.float32)})
    with pytest.raises(UserError, match="unknown model.other.weight"):
        open_llm(tmp_path, config)


def test_a_checkpoint_of_the_bare_model_with_its_buffers_is_read(golden, tmp_path):
    """As the Hub has GPT-2: without the prefix `transformer.`, and with the causal mask of every layer."""
    source = golden("llm_gpt2")
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in open_checkpoint(source).items()}
    tensors |= {f"h.{i}.attn.bias": np.ones((1, 1, 4, 4), np.float32) for i in range(2)}
    save_safetensors(tmp_path / "model.safetensors", tensors)
    expected = parameters(nnx.state(load_llm(source)))
    for path, variable in parameters(nnx.state(load_llm(tmp_path))).items():
        assert np.array_equal(variable[...], expected[path][...]), path
    save_safetensors(tmp_path / "model.safetensors", tensors | {"h.0.extra.bias": tensors["h.0.attn.bias"]})
    with pytest.raises(UserError, match="unknown h.0.extra.bias"):
        load_llm(tmp_path)


def test_short_names_are_those_of_published_models():
    assert all(name == name.lower() and repo.count("/") == 1 for name, repo in ALIASES.items())
    assert ALIASES["biomedgpt-lm-7b"] == "PharMolix/BioMedGPT-LM-7B"
