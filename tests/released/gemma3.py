"""Gemma 1 and Gemma 3, of which sizes from 4B on are multimodal releases: here their ``text_config``.

Their parameters are the release's less the vision tower's and the projector's. From the model cards and transformers'
conversion script, without stored copies of config.json.
"""

VISION = 416_866_032


def _gemma(layers, dim, hidden, heads, kv_heads):
    return {
        "architectures": ["GemmaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 256,
        "hidden_act": "gelu",
        "hidden_activation": None,
        "hidden_size": dim,
        "intermediate_size": hidden,
        "max_position_embeddings": 8192,
        "model_type": "gemma",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "vocab_size": 256000,
    }


def _config(vocab, layers, dim, hidden, heads, kv_heads, window, context, head_dim=256, query=256):
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "head_dim": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": dim,
        "intermediate_size": hidden,
        "max_position_embeddings": context,
        "model_type": "gemma3_text",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "query_pre_attn_scalar": query,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None if context == 32768 else {"factor": 8.0, "rope_type": "linear"},
        "rope_theta": 1000000,
        "sliding_window": window,
        "sliding_window_pattern": 6,
        "vocab_size": vocab,
    }


# fmt: off
RELEASED = {
    "google/gemma-2b":       (_gemma(18, 2048, 16384, 8, 1), 2_506_172_416),
    "google/gemma-7b":       (_gemma(28, 3072, 24576, 16, 16), 8_537_680_896),
    "google/gemma-3-270m":   (_config(262144, 18,  640,  2048,  4, 1, 512, 32768), 268_098_176),
    "google/gemma-3-1b-pt":  (_config(262144, 26, 1152,  6912,  4, 1, 512, 32768), 999_885_952),
    "google/gemma-3-4b-pt":
        (_config(262208, 34, 2560, 10240,  8, 4, 1024, 131072), 4_300_079_472 - VISION - 1152 * 2561),
    "google/gemma-3-12b-pt":
        (_config(262208, 48, 3840, 15360, 16, 8, 1024, 131072), 12_187_325_040 - VISION - 1152 * 3841),
    "google/gemma-3-27b-pt":
        (_config(262208, 62, 5376, 21504, 32, 16, 1024, 131072, 128, 168), 27_432_406_640 - VISION - 1152 * 5377),
}
# fmt: on
