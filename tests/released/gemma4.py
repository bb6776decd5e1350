"""Gemma 4's dense models, the ``text_config`` of multimodal releases, checked against stored copies of config.json.

The cards round the parameters; of E2B's 5.1B the towers for images and sound are 0.45B, of E4B's 8B too.
"""

TEXT = {
    "architectures": ["Gemma4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_k_eq_v": True,
    "bos_token_id": 2,
    "dtype": "bfloat16",
    "enable_moe_block": False,
    "eos_token_id": 1,
    "expert_intermediate_size": None,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 5376,
    "hidden_size_per_layer_input": 0,
    "initializer_range": 0.02,
    "intermediate_size": 21504,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 10,
    "max_position_embeddings": 262144,
    "model_type": "gemma4_text",
    "num_attention_heads": 32,
    "num_experts": None,
    "num_global_key_value_heads": 4,
    "num_hidden_layers": 60,
    "num_key_value_heads": 16,
    "num_kv_shared_layers": 0,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": 1024,
    "tie_word_embeddings": True,
    "top_k_experts": None,
    "use_bidirectional_attention": "vision",
    "use_cache": True,
    "use_double_wide_mlp": False,
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
}


def _elastic(num_layers, every, **sizes):
    kinds = (["sliding_attention"] * (every - 1) + ["full_attention"]) * (num_layers // every)
    elastic = {"attention_k_eq_v": False, "hidden_size_per_layer_input": 256, "num_global_key_value_heads": None}
    few = {"num_attention_heads": 8, "sliding_window": 512, "max_position_embeddings": 131072}
    return TEXT | elastic | few | {"num_hidden_layers": num_layers, "layer_types": kinds, **sizes}


E2B = _elastic(
    35, 5, hidden_size=1536, intermediate_size=6144, num_key_value_heads=1, num_kv_shared_layers=20,
    use_double_wide_mlp=True,
)  # fmt: skip
E4B = _elastic(42, 6, hidden_size=2560, intermediate_size=10240, num_key_value_heads=2, num_kv_shared_layers=18)
TWELVE = TEXT | {
    "architectures": ["Gemma4UnifiedForCausalLM"], "model_type": "gemma4_unified_text", "hidden_size": 3840,
    "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8,
    "num_global_key_value_heads": 1, "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 8,
}  # fmt: skip

RELEASED = {
    "google/gemma-4-E2B": (E2B, 4.65e9),
    "google/gemma-4-E4B": (E4B, 7.5e9),
    "google/gemma-4-12B": (TWELVE, 11.95e9),
    "google/gemma-4-31B": (TEXT, 30.7e9),
}
