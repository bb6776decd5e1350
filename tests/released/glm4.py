"""GLM 4. glm-4-9b-chat-hf was checked against a stored copy of config.json, others are by the cards."""


def _config(architecture, layers, dim, hidden, heads, context, eps, bias=True):
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "attention_bias": bias,
        "attention_dropout": 0.0,
        "eos_token_id": [151329, 151336, 151338],
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": dim,
        "initializer_range": 0.02,
        "intermediate_size": hidden,
        "max_position_embeddings": context,
        "model_type": architecture.lower(),
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "pad_token_id": 151329,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": eps,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 151552,
    }


BIG = _config("Glm4", 61, 6144, 23040, 48, 32768, 1e-5, bias=False)
# fmt: off
RELEASED = {
    "zai-org/glm-4-9b-hf":      (_config("Glm", 40, 4096, 13696, 32, 8192, 1.5625e-07), 9_399_951_360),
    "zai-org/glm-4-9b-chat-hf": (_config("Glm", 40, 4096, 13696, 32, 131072, 1.5625e-07), 9_399_951_360),
    "zai-org/GLM-4-9B-0414":    (_config("Glm4", 40, 4096, 13696, 32, 32768, 1e-05), 9_400_279_040),
    "zai-org/GLM-Z1-9B-0414":   (_config("Glm4", 40, 4096, 13696, 32, 32768, 1e-05), 9_400_279_040),
    "zai-org/GLM-4-32B-Base-0414": (BIG, 32_566_081_536),
    "zai-org/GLM-4-32B-0414":   (BIG, 32_566_081_536),
    "zai-org/GLM-Z1-32B-0414":  (BIG, 32_566_081_536),
}
# fmt: on
