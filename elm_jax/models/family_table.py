"""The language model families as data: configuration fields, weight names, chat forms, names in the registry.

One `Family` per Hugging Face `model_type`; `families.py` reads the table in both directions. Everything that a
`config.json` may say is accounted for here by name.
"""

from collections.abc import Mapping
from dataclasses import replace

from elm_jax.models.family import LLAMA_FIELDS, Family, llama_layout, rules
from elm_jax.models.names import Rule
from elm_jax.registry import Registry

# Short names of the checkpoints that the project is used with.
ALIASES: Mapping[str, str] = {
    "llama-3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b-instruct": "meta-llama/Llama-3.2-3B-Instruct",
    "biomedgpt-lm-7b": "PharMolix/BioMedGPT-LM-7B",
    "vicuna-7b-v1.5": "lmsys/vicuna-7b-v1.5",
    "qwen2.5-0.5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b-instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b-instruct": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-0.6b-base": "Qwen/Qwen3-0.6B-Base",
    "qwen3-1.7b-base": "Qwen/Qwen3-1.7B-Base",
    "qwen3-4b-base": "Qwen/Qwen3-4B-Base",
    "qwen3-8b-base": "Qwen/Qwen3-8B-Base",
    **{f"qwen3.5-{size.lower()}": f"Qwen/Qwen3.5-{size}" for size in ("0.8B", "2B", "4B", "9B")},
    **{f"qwen3.5-{size.lower()}-base": f"Qwen/Qwen3.5-{size}-Base" for size in ("0.8B", "2B", "4B", "9B")},
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "gemma-2-2b-it": "google/gemma-2-2b-it",
    "gemma-3-270m-it": "google/gemma-3-270m-it",
    "gemma-3-1b-it": "google/gemma-3-1b-it",
    "mistral-7b-instruct-v0.3": "mistralai/Mistral-7B-Instruct-v0.3",
    "phi-3-mini-4k-instruct": "microsoft/Phi-3-mini-4k-instruct",
    "phi-3.5-mini-instruct": "microsoft/Phi-3.5-mini-instruct",
    "phi-4-mini-instruct": "microsoft/Phi-4-mini-instruct",
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "opt-125m": "facebook/opt-125m",
    "opt-350m": "facebook/opt-350m",
    "opt-1.3b": "facebook/opt-1.3b",
    "opt-2.7b": "facebook/opt-2.7b",
    "opt-6.7b": "facebook/opt-6.7b",
}


_LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    rules=llama_layout(),
    fields=LLAMA_FIELDS,
    constants={},
    derived=frozenset({"kv_heads", "head_dim"}),
    only={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "attention_dropout": (0.0,),
        "pretraining_tp": (1,),
        "layer_types": (None,),
    },
    chat=(("<|start_header_id|>", "llama3"), ("[INST]", "llama2"), ("ASSISTANT:", "vicuna")),
    called=(("vicuna", "vicuna"), ("biomedgpt", "llama2")),  # BioMedGPT-LM goes on from Llama 2's chat model
)
_QWEN_ONLY = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
    "attention_dropout": (0.0,),
    "layer_types": (None, "full_attention"),
}
_QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    rules=llama_layout(biased="attention.q attention.k attention.v"),
    fields=LLAMA_FIELDS,
    constants={"qkv_bias": True},
    derived=frozenset({"kv_heads", "head_dim"}),
    only={**_QWEN_ONLY, "use_mrope": (False,)},
    chat=(("<|im_start|>", "qwen2"),),
    irrelevant=frozenset({"sliding_window", "max_window_layers"}),  # of the windows that are switched off
)
_QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    rules=llama_layout(qk_norm=True),
    fields=LLAMA_FIELDS,
    constants={"qk_norm": True},
    only={**_QWEN_ONLY, "attention_bias": (False,)},
    chat=(("<|im_start|>", "qwen2"),),
    irrelevant=frozenset({"sliding_window", "max_window_layers"}),
)
_DELTA = "model.layers.{layer}.linear_attn"
_QWEN3_5 = Family(
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    rules=(
        *llama_layout(qk_norm=True),
        *rules(
            {
                **{f"{_DELTA}.in_proj_{n}": f"layers.delta.{n}" for n in ("qkv", "z", "b", "a")},
                f"{_DELTA}.norm": "layers.delta.norm",
                f"{_DELTA}.out_proj": "layers.delta.out",
            }
        ),
        Rule(f"{_DELTA}.conv1d.weight", "layers.delta.taps"),
        Rule(f"{_DELTA}.A_log", "layers.delta.log_rates"),
        Rule(f"{_DELTA}.dt_bias", "layers.delta.step_bias"),
    ),
    fields={
        **LLAMA_FIELDS,
        "linear_conv_kernel_dim": "delta.taps",
        "linear_num_key_heads": "delta.key_heads",
        "linear_num_value_heads": "delta.value_heads",
        "linear_key_head_dim": "delta.key_dim",
        "linear_value_head_dim": "delta.value_dim",
    },
    constants={"norm": "rms_offset", "qk_norm": True, "attention_gate": True},
    only={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "attention_dropout": (0.0,),
        "attn_output_gate": (None, True),
        "mlp_only_layers": (None,),
    },
    chat=(("<|im_start|>", "qwen2"),),
    # The three axes of a text's positions are the same one.
    irrelevant=frozenset(
        {
            *("mrope_section", "mrope_interleaved", "mamba_ssm_dtype"),
            *("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"),
        }
    ),
    linear=True,
    within="qwen3_5",
    renamed=("model.language_model.", "model."),
    dropped=("model.visual.", "mtp."),
    rope={"partial_rotary_factor": 0.25},
    scratch={
        **{"linear_conv_kernel_dim": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
        **{"linear_key_head_dim": 16, "linear_value_head_dim": 16, "full_attention_interval": 2},
    },
    peft="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",  # the reference's; PEFT has no default
)
_EXPERT = "model.layers.{layer}.mlp.experts.{expert}"
_QWEN3_MOE = replace(
    _QWEN3,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    rules=(
        *_QWEN3.rules,
        Rule("model.layers.{layer}.mlp.gate.weight", "layers.experts.router", transpose=True),
        *rules({f"{_EXPERT}.{n}_proj": f"layers.experts.{n}" for n in ("gate", "up", "down")}),
    ),
    fields={
        **LLAMA_FIELDS,
        **dict.fromkeys(("num_experts", "num_local_experts"), "experts.count"),
        "num_experts_per_tok": "experts.chosen",
        "moe_intermediate_size": "experts.inner",
        "norm_topk_prob": "experts.normalised",
    },
    only={**_QWEN3.only, "output_router_logits": (False,)},
    irrelevant=_QWEN3.irrelevant | {"router_aux_loss_coef"},  # of the loss that is off with `output_router_logits`
    sparse=True,
    scratch={
        **{"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
        **{"mlp_only_layers": None, "decoder_sparse_step": 1},
    },
)
_MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    rules=llama_layout(),
    fields=LLAMA_FIELDS,
    constants={},
    derived=frozenset({"kv_heads", "head_dim"}),
    only={"hidden_act": ("silu",), "attention_dropout": (0.0,)},
    chat=(("[INST]", "mistral"),),
    windows=0,
    scratch={"window": None},
)
_PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    rules=llama_layout(fused=True),
    fields={theirs: ours for theirs, ours in LLAMA_FIELDS.items() if ours != "head_dim"},
    constants={"fused_qkv": True, "fused_mlp": True},
    derived=frozenset({"kv_heads"}),
    only={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "attention_dropout": (0.0,),
        "full_attn_mod": (1,),
        "interpolate_factor": (1,),
        "lm_head_bias": (False,),
        "mlp_bias": (False,),
    },
    chat=(("<|assistant|>", "phi3"),),
    irrelevant=frozenset({"embd_pdrop", "resid_pdrop", "auto_map"}),
    windows=0,
    rope={"partial_rotary_factor": 1.0, "original_max_position_embeddings": None},
    scratch={"window": None},
    peft="qkv_proj",
)
_GEMMA_NORMS = ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")
_GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    rules=llama_layout(norms=_GEMMA_NORMS),
    fields={
        **LLAMA_FIELDS,
        "query_pre_attn_scalar": "query_scalar",
        "attn_logit_softcapping": "attention_cap",
        "final_logit_softcapping": "logit_cap",
    },
    constants={
        "norm": "rms_offset",
        "post_norms": True,
        "activation": "gelu_tanh",
        "scale_embeddings": True,
    },
    nullable=frozenset({"attention_cap", "logit_cap"}),
    only={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "attention_dropout": (0.0,),
        "use_bidirectional_attention": (None, False),
        "hidden_act": (None, "gelu_pytorch_tanh"),
    },
    chat=(("<start_of_turn>", "gemma2"),),
    irrelevant=frozenset({"cache_implementation", "sliding_window_size"}),
    tied=True,
    windows=2,
    scratch={"window": 4096, "attention_cap": 50.0, "logit_cap": 30.0, "query_scalar": None},
)
_GEMMA3 = replace(
    _GEMMA2,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    rules=llama_layout(norms=_GEMMA_NORMS, qk_norm=True),
    fields={theirs: ours for theirs, ours in _GEMMA2.fields.items() if ours != "attention_cap"},
    constants={**_GEMMA2.constants, "qk_norm": True},
    nullable=frozenset({"logit_cap"}),
    only={**_GEMMA2.only, "attn_logit_softcapping": (None,)},
    chat=(("<start_of_turn>", "gemma3"),),
    irrelevant=_GEMMA2.irrelevant | {"sliding_window_pattern", "_sliding_window_pattern"},
    windows=6,
    rope={"rope_local_base_freq": 10000.0},
    scratch={"window": 1024, "sliding_window_pattern": 6, "logit_cap": None, "query_scalar": None, "rope_theta": 1e6},
)

_LEARNED = {  # of GPT-2 and OPT
    "rope": None,
    "norm": "layer",
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "gated": False,
}
_GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    rules=rules(
        {
            "transformer.wte": "embedding",
            "transformer.wpe": "positions",
            "transformer.h.{layer}.ln_1": "layers.attention_norm",
            "transformer.h.{layer}.attn.c_attn": "layers.attention.qkv",
            "transformer.h.{layer}.attn.c_proj": "layers.attention.o",
            "transformer.h.{layer}.ln_2": "layers.mlp_norm",
            "transformer.h.{layer}.mlp.c_fc": "layers.mlp.up",
            "transformer.h.{layer}.mlp.c_proj": "layers.mlp.down",
            "transformer.ln_f": "norm",
            "lm_head": "head",
        },
        biased="*",
        transpose=False,
    ),
    fields={
        "vocab_size": "vocab_size",
        "n_embd": "hidden",
        "n_layer": "layers",
        "n_head": "heads",
        "n_inner": "mlp",
        "n_positions": "max_len",
        "layer_norm_epsilon": "norm_eps",
    },
    constants={**_LEARNED, "fused_qkv": True, "activation": "gelu_tanh"},
    derived=frozenset({"mlp"}),
    only={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    chat=(("<|endoftext|>", "gpt2"),),
    irrelevant=frozenset(
        {
            *("attn_pdrop", "embd_pdrop", "resid_pdrop", "reorder_and_upcast_attn", "n_ctx"),
            *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type"),
            "summary_use_proj",
        }
    ),
    tied=True,
    scratch={"norm_eps": 1e-5, "max_len": 1024},
    peft="c_attn",
    buffers=(".attn.bias", ".attn.masked_bias"),  # the causal mask
)
_OPT = Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    rules=rules(
        {
            "model.decoder.embed_tokens": "embedding",
            "model.decoder.embed_positions": "positions",
            "model.decoder.layers.{layer}.self_attn_layer_norm": "layers.attention_norm",
            **{f"model.decoder.layers.{{layer}}.self_attn.{n}_proj": f"layers.attention.{n}" for n in "qkv"},
            "model.decoder.layers.{layer}.self_attn.out_proj": "layers.attention.o",
            "model.decoder.layers.{layer}.final_layer_norm": "layers.mlp_norm",
            "model.decoder.layers.{layer}.fc1": "layers.mlp.up",
            "model.decoder.layers.{layer}.fc2": "layers.mlp.down",
            "model.decoder.final_layer_norm": "norm",
            "lm_head": "head",
        },
        biased="*",
    )
    + rules({f"model.decoder.{name}": name for name in ("project_in", "project_out")}),
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden",
        "word_embed_proj_dim": "embedding",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "ffn_dim": "mlp",
        "max_position_embeddings": "max_len",
        "do_layer_norm_before": "pre_norm",
    },
    constants={**_LEARNED, "activation": "relu", "norm_eps": 1e-5, "position_offset": 2},
    derived=frozenset({"embedding", "pre_norm"}),
    only={
        "activation_function": ("relu",),
        "_remove_final_layer_norm": (False,),
        "enable_bias": (True,),
        "layer_norm_elementwise_affine": (True,),
    },
    chat=(("</s>", "gpt2"),),
    irrelevant=frozenset({"dropout", "attention_dropout", "activation_dropout", "layerdrop", "init_std"}),
    tied=True,
    scratch={"embedding": None, "pre_norm": True},
    buffers=(),
)

FAMILIES: Registry[Family] = Registry(
    "model_type",
    {
        family.model_type: family
        for family in (
            *(_LLAMA, _QWEN2, _QWEN3, _QWEN3_5, _QWEN3_MOE, _GEMMA2, _GEMMA3, _MISTRAL, _PHI3, _GPT2, _OPT),
        )
    },
)


def register_family(family: Family) -> None:
    """Let a checkpoint with this `model_type` be loaded, trained and exported.

    Raises:
        UserError: the type is no identifier, or one of the package's families.
    """
    FAMILIES.register(family.model_type, family)
