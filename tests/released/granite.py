"""Granite 3, dense. granite-3.3-8b-instruct was checked against a stored copy of config.json, others by the cards."""


def _config(vocab, dim, hidden, context, base, scores, logits):
    return {
        "architectures": ["GraniteForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_multiplier": scores,
        "embedding_multiplier": 12.0,
        "hidden_act": "silu",
        "hidden_size": dim,
        "intermediate_size": hidden,
        "logits_scaling": logits,
        "max_position_embeddings": context,
        "mlp_bias": False,
        "model_type": "granite",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": base,
        "tie_word_embeddings": True,
        "vocab_size": vocab,
    }


# fmt: off
RELEASED = {
    "ibm-granite/granite-3.0-2b-base": (_config(49155, 2048,  8192,   4096, 10000, 0.015625,  8.0), 2_533_531_648),
    "ibm-granite/granite-3.0-8b-base": (_config(49155, 4096, 12800,   4096, 10000, 0.0078125, 16.0), 8_170_848_256),
    "ibm-granite/granite-3.1-2b-base": (_config(49155, 2048,  8192, 131072, 5e6, 0.015625,  8.0), 2_533_531_648),
    "ibm-granite/granite-3.1-8b-base": (_config(49155, 4096, 12800, 131072, 1e7, 0.0078125, 16.0), 8_170_848_256),
    "ibm-granite/granite-3.3-2b-instruct": (_config(49159, 2048, 8192, 131072, 1e7, 0.015625, 8.0), 2_533_539_840),
    "ibm-granite/granite-3.3-8b-instruct":
        (_config(49159, 4096, 12800, 131072, 1e7, 0.0078125, 16.0), 8_170_864_640),
}
# fmt: on
