"""SmolLM 2, from the model cards; SmolLM 3, checked against a stored copy of its config.json."""


def _smollm2(layers, dim, hidden, heads, kv_heads, base):
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": dim,
        "initializer_range": 0.02,
        "is_llama_config": True,
        "intermediate_size": hidden,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": base,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    }


SMOLLM3 = {
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 128256,
}

# fmt: off
RELEASED = {
    "HuggingFaceTB/SmolLM2-135M": (_smollm2(30,  576, 1536,  9,  3, 100000), 134_515_008),
    "HuggingFaceTB/SmolLM2-360M": (_smollm2(32,  960, 2560, 15,  5, 100000), 361_821_120),
    "HuggingFaceTB/SmolLM2-1.7B": (_smollm2(24, 2048, 8192, 32, 32, 130000), 1_711_376_384),
    "HuggingFaceTB/SmolLM3-3B-Base": (SMOLLM3, 3_075_098_624),
    "HuggingFaceTB/SmolLM3-3B": (SMOLLM3, 3_075_098_624),
}
# fmt: on
