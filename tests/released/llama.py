"""Llama 2 and 3."""


def _config(layers, dim, hidden, heads, kv_heads, vocab, context, base, factor, tied):
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": base,
        "rope_scaling": None if factor is None else {"rope_type": "llama3", "factor": factor, **scaling},
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
    }


# fmt: off
RELEASED = {  #                          layers  dim hidden heads kv  vocab context base factor tied   parameters
    "meta-llama/Llama-2-7b-hf":    (_config(32, 4096, 11008, 32, 32, 32000, 4096, 1e4, None, False), 6_738_415_616),
    "meta-llama/Llama-2-13b-hf":   (_config(40, 5120, 13824, 40, 40, 32000, 4096, 1e4, None, False), 13_015_864_320),
    "meta-llama/Llama-2-70b-hf":   (_config(80, 8192, 28672, 64, 8, 32000, 4096, 1e4, None, False), 68_976_648_192),
    "meta-llama/Meta-Llama-3-8B":  (_config(32, 4096, 14336, 32, 8, 128256, 8192, 5e5, None, False), 8_030_261_248),
    "meta-llama/Meta-Llama-3-70B": (_config(80, 8192, 28672, 64, 8, 128256, 8192, 5e5, None, False), 70_553_706_496),
    "meta-llama/Llama-3.1-8B":     (_config(32, 4096, 14336, 32, 8, 128256, 131072, 5e5, 8.0, False), 8_030_261_248),
    "meta-llama/Llama-3.1-70B":    (_config(80, 8192, 28672, 64, 8, 128256, 131072, 5e5, 8.0, False), 70_553_706_496),
    "meta-llama/Llama-3.1-405B": (_config(126, 16384, 53248, 128, 8, 128256, 131072, 5e5, 8.0, False), 405_853_388_800),
    "meta-llama/Llama-3.2-1B":     (_config(16, 2048, 8192, 32, 8, 128256, 131072, 5e5, 32.0, True), 1_235_814_400),
    "meta-llama/Llama-3.2-3B":     (_config(28, 3072, 8192, 24, 8, 128256, 131072, 5e5, 32.0, True), 3_212_749_824),
    "meta-llama/Llama-3.3-70B-Instruct":
        (_config(80, 8192, 28672, 64, 8, 128256, 131072, 5e5, 8.0, False), 70_553_706_496),
}
# fmt: on
