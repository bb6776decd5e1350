"""OLMo 2, from the model cards; OLMo 3, by what stored notes say of its config.json files."""


def _config(family, vocab, layers, dim, hidden, heads, kv_heads, context, **more):
    return {
        "architectures": [f"{family}ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": dim,
        "intermediate_size": hidden,
        "max_position_embeddings": context,
        "model_type": family.lower(),
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "vocab_size": vocab,
        **more,
    }


YARN = {
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "yarn",
}


def _olmo3(layers, *sizes):
    kinds = (["sliding_attention"] * 3 + ["full_attention"]) * (layers // 4)
    more = {"layer_types": kinds, "sliding_window": 4096, "rope_scaling": YARN}
    return _config("Olmo3", 100278, layers, *sizes, 65536, **more)


# fmt: off
RELEASED = {
    "allenai/OLMo-2-0425-1B":  (_config("Olmo2", 100352, 16, 2048,  8192, 16, 16, 4096), 1_484_916_736),
    "allenai/OLMo-2-1124-7B":  (_config("Olmo2", 100352, 32, 4096, 11008, 32, 32, 4096), 7_298_617_344),
    "allenai/OLMo-2-1124-13B": (_config("Olmo2", 100352, 40, 5120, 13824, 40, 40, 4096), 13_716_198_400),
    "allenai/OLMo-2-0325-32B": (_config("Olmo2", 100352, 64, 5120, 27648, 40,  8, 4096), 32_234_279_936),
    "allenai/Olmo-3-1025-7B":  (_olmo3(32, 4096, 11008, 32, 32), 7_298_011_136),
    "allenai/Olmo-3-1125-32B": (_olmo3(64, 5120, 27648, 40, 8), 32_233_522_176),
}
# fmt: on
