"""Qwen 2 and 2.5. Qwen2-7B-Instruct was checked against a stored copy of its config.json."""


def _config(vocab, layers, dim, hidden, heads, kv_heads, context, eps=1e-6):
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": dim,
        "initializer_range": 0.02,
        "intermediate_size": hidden,
        "max_position_embeddings": context,
        "max_window_layers": layers,
        "model_type": "qwen2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": eps,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": vocab == 151936,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab,
    }


# fmt: off
RELEASED = {  #                          vocab layers dim hidden heads kv context eps   parameters
    "Qwen/Qwen2-0.5B":            (_config(151936, 24,  896,  4864, 14, 2, 131072), 494_032_768),
    "Qwen/Qwen2-1.5B":            (_config(151936, 28, 1536,  8960, 12, 2, 131072), 1_543_714_304),
    "Qwen/Qwen2-7B":              (_config(152064, 28, 3584, 18944, 28, 4, 131072), 7_615_616_512),
    "Qwen/Qwen2-72B":             (_config(152064, 80, 8192, 29568, 64, 8, 131072, 1e-5), 72_706_203_648),
    "Qwen/Qwen2-0.5B-Instruct":   (_config(151936, 24,  896,  4864, 14, 2,  32768), 494_032_768),
    "Qwen/Qwen2-1.5B-Instruct":   (_config(151936, 28, 1536,  8960, 12, 2,  32768), 1_543_714_304),
    "Qwen/Qwen2-7B-Instruct":     (_config(152064, 28, 3584, 18944, 28, 4,  32768), 7_615_616_512),
    "Qwen/Qwen2-72B-Instruct":    (_config(152064, 80, 8192, 29568, 64, 8,  32768), 72_706_203_648),
    "Qwen/Qwen2.5-0.5B":          (_config(151936, 24,  896,  4864, 14, 2,  32768), 494_032_768),
    "Qwen/Qwen2.5-1.5B":          (_config(151936, 28, 1536,  8960, 12, 2, 131072), 1_543_714_304),
    "Qwen/Qwen2.5-3B":            (_config(151936, 36, 2048, 11008, 16, 2,  32768), 3_085_938_688),
    "Qwen/Qwen2.5-7B":            (_config(152064, 28, 3584, 18944, 28, 4, 131072), 7_615_616_512),
    "Qwen/Qwen2.5-14B":           (_config(152064, 48, 5120, 13824, 40, 8, 131072, 1e-5), 14_770_033_664),
    "Qwen/Qwen2.5-32B":           (_config(152064, 64, 5120, 27648, 40, 8, 131072, 1e-5), 32_763_876_352),
    "Qwen/Qwen2.5-72B":           (_config(152064, 80, 8192, 29568, 64, 8, 131072, 1e-5), 72_706_203_648),
    "Qwen/Qwen2.5-0.5B-Instruct": (_config(151936, 24,  896,  4864, 14, 2,  32768), 494_032_768),
    "Qwen/Qwen2.5-1.5B-Instruct": (_config(151936, 28, 1536,  8960, 12, 2,  32768), 1_543_714_304),
    "Qwen/Qwen2.5-3B-Instruct":   (_config(151936, 36, 2048, 11008, 16, 2,  32768), 3_085_938_688),
    "Qwen/Qwen2.5-7B-Instruct":   (_config(152064, 28, 3584, 18944, 28, 4,  32768), 7_615_616_512),
    "Qwen/Qwen2.5-14B-Instruct":  (_config(152064, 48, 5120, 13824, 40, 8,  32768), 14_770_033_664),
    "Qwen/Qwen2.5-32B-Instruct":  (_config(152064, 64, 5120, 27648, 40, 8,  32768), 32_763_876_352),
    "Qwen/Qwen2.5-72B-Instruct":  (_config(152064, 80, 8192, 29568, 64, 8,  32768), 72_706_203_648),
}
# fmt: on
