"""Mistral and Ministral 3: of the multimodal releases (Small 3.1 and 3.2, Ministral 3) the ``text_config``.

From the model cards, without a stored copy of config.json at hand. Cards round Ministral 3's parameters.
"""


def _config(vocab, layers, dim, hidden, heads, context, base, window=None):
    return {
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": dim,
        "intermediate_size": hidden,
        "max_position_embeddings": context,
        "model_type": "mistral",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": base,
        "sliding_window": window,
        "tie_word_embeddings": False,
        "vocab_size": vocab,
    }


def _ministral(layers, dim, hidden, base, tied):
    return {
        "architectures": ["Ministral3ForCausalLM"],
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": dim,
        "intermediate_size": hidden,
        "max_position_embeddings": 262144,
        "model_type": "ministral3",
        "num_attention_heads": 32,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 16.0,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16384,
            "rope_theta": base,
            "rope_type": "yarn",
            "type": "yarn",
        },
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "vocab_size": 131072,
    }


# fmt: off
RELEASED = {
    "mistralai/Mistral-7B-v0.1":          (_config(32000, 32, 4096, 14336, 32, 32768, 1e4, 4096), 7_241_732_096),
    "mistralai/Mistral-7B-Instruct-v0.2": (_config(32000, 32, 4096, 14336, 32, 32768, 1e6), 7_241_732_096),
    "mistralai/Mistral-7B-v0.3":          (_config(32768, 32, 4096, 14336, 32, 32768, 1e6), 7_248_023_552),
    "mistralai/Mistral-Nemo-Base-2407":   (_config(131072, 40, 5120, 14336, 32, 131072, 1e6), 12_247_782_400),
    "mistralai/Mistral-Small-Instruct-2409": (_config(32768, 56, 6144, 16384, 48, 32768, 1e6), 22_247_282_688),
    "mistralai/Mistral-Small-24B-Base-2501": (_config(131072, 40, 5120, 32768, 32, 32768, 1e8), 23_572_403_200),
    "mistralai/Mistral-Small-3.1-24B-Base-2503":
        (_config(131072, 40, 5120, 32768, 32, 131072, 1e9), 23_572_403_200),
    "mistralai/Mistral-Small-3.2-24B-Instruct-2506":
        (_config(131072, 40, 5120, 32768, 32, 131072, 1e9), 23_572_403_200),
    "mistralai/Ministral-3-3B-Base-2512":  (_ministral(26, 3072,  9216, 1e6, True), 3.4e9),
    "mistralai/Ministral-3-8B-Base-2512":  (_ministral(34, 4096, 14336, 1e6, False), 8.5e9),
    "mistralai/Ministral-3-14B-Base-2512": (_ministral(40, 5120, 16384, 1e9, False), 13.5e9),
}
# fmt: on
