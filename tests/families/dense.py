"""Dense families. Documents of the suite have up to 100 tokens: windows are 24, old contexts 64, so that both end."""

from tiny import LLAMA3_ROPE, rope

WINDOW = 24

LLAMA = {"architectures": ["LlamaForCausalLM"]}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "head_dim": 24}
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": WINDOW,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 6.0,
}
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}

MISTRAL = {"architectures": ["MistralForCausalLM"], "head_dim": 24, "sliding_window": None}
PHI3 = {"architectures": ["Phi3ForCausalLM"], "pad_token_id": None}
GEMMA3 = GEMMA2 | {
    "architectures": ["Gemma3ForCausalLM"],
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
GLM = {"architectures": ["GlmForCausalLM"], "head_dim": 16}
YARN = rope("yarn", 100.0, factor=4.0, original_max_position_embeddings=64, beta_fast=2.5, beta_slow=0.25)
LONG = rope(
    "longrope",
    short_factor=[1.0, 1.02, 1.1, 1.3, 1.7, 1.9],
    long_factor=[1.1, 1.4, 2.0, 3.5, 6.0, 8.0],
    partial_rotary_factor=0.75,
    original_max_position_embeddings=40,
)
GRANITE = {
    "architectures": ["GraniteForCausalLM"],
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
GEMMA4 = {
    "architectures": ["Gemma4ForCausalLM"],
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": WINDOW,
    "final_logit_softcapping": 6.0,
}
GEMMA4_E = {  # four layers: with more, rounding decides, as scores are not scaled
    "architectures": ["Gemma4ForCausalLM"],
    "num_hidden_layers": 4,
    "head_dim": 8,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 12,
    "vocab_size_per_layer_input": 101,
    "sliding_window": WINDOW,
    "final_logit_softcapping": 6.0,
}
COMMAND_R7B = {
    "architectures": ["Cohere2ForCausalLM"],
    "num_hidden_layers": 4,
    "rms_norm_eps": None,
    "layer_norm_eps": 1e-3,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "logit_scale": 0.25,
}

CASES = {
    "llama2_mha": LLAMA | {"num_key_value_heads": 4},
    "llama3.2_tied": LLAMA | {"rope_parameters": LLAMA3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True},
    "llama3.3_mqa": LLAMA | {"num_key_value_heads": 1, "rope_parameters": LLAMA3_ROPE},
    "llama_linear_rope": LLAMA | {"rope_parameters": rope("linear", factor=4.0)},
    "llama_biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama_prime_sizes": LLAMA | {"vocab_size": 97, "intermediate_size": 89, "head_dim": 24},
    "qwen3": QWEN3 | {"rope_parameters": rope(base=1e6)},
    "qwen3_tied_windows": QWEN3 | SLIDING | {"tie_word_embeddings": True, "attention_bias": True},
    "gemma2": GEMMA2,
    "qwen2": QWEN2 | {"rope_parameters": rope(base=1e6)},
    "qwen2_yarn_windows": QWEN2 | SLIDING | {"rope_parameters": YARN | {"truncate": False}},
    "mistral": MISTRAL,
    "mistral_windows": MISTRAL | {"sliding_window": WINDOW},
    "ministral3": {
        "architectures": ["Ministral3ForCausalLM"],
        "head_dim": 16,
        "rope_parameters": YARN | {"llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 0.5},
        "tie_word_embeddings": True,
    },
    "phi3": PHI3,
    "phi3_windows": PHI3 | {"sliding_window": WINDOW, "rope_parameters": rope(base=250_000.0)},
    "phi4_mini": PHI3 | {"rope_parameters": LONG, "original_max_position_embeddings": 40, "tie_word_embeddings": True},
    "gemma": {"architectures": ["GemmaForCausalLM"], "head_dim": 24, "num_key_value_heads": 1},
    "gemma3": GEMMA3
    | {
        "rope_parameters": {
            "full_attention": rope("linear", 1e6, factor=8.0),
            "sliding_attention": rope(),
        }
    },
    "gemma4_e2b": GEMMA4_E
    | {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "num_key_value_heads": 1,
        "use_double_wide_mlp": True,
    },
    "gemma4_e4b": GEMMA4_E | {"layer_types": ["sliding_attention", *["full_attention"] * 3], "num_kv_shared_layers": 1},
    "gemma4": GEMMA4 | {"hidden_size_per_layer_input": 0},
    "gemma4_12b": GEMMA4 | {"architectures": ["Gemma4UnifiedForCausalLM"]},
    "smollm3": {
        "architectures": ["SmolLM3ForCausalLM"],
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 0, 1, 0],
        "rope_parameters": rope(base=5e6),
        "tie_word_embeddings": True,
    },
    "smollm3_windows": {
        "architectures": ["SmolLM3ForCausalLM"],
        "no_rope_layers": [1, 0],
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "tie_word_embeddings": False,
        "mlp_bias": True,
    },
    "olmo2": {"architectures": ["Olmo2ForCausalLM"], "rope_parameters": rope(base=5e5)},
    "olmo3": {
        "architectures": ["Olmo3ForCausalLM"],
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": WINDOW,
        "rope_parameters": {"full_attention": YARN, "sliding_attention": rope(base=5e5)},
    },
    "glm4_9b": GLM,
    "glm4_0414": GLM | {"architectures": ["Glm4ForCausalLM"], "attention_bias": False},
    "granite": GRANITE,
    "granite_biases": GRANITE | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "command_r7b": COMMAND_R7B,
}
