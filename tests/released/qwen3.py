"""Qwen 3, dense."""


def _config(layers, dim, hidden, heads, context, base, tied):
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": dim,
        "initializer_range": 0.02,
        "intermediate_size": hidden,
        "max_position_embeddings": context,
        "max_window_layers": layers,
        "model_type": "qwen3",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": base,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }


# fmt: off
RELEASED = {  #                  layers  dim hidden heads context base tied     parameters
    "Qwen/Qwen3-0.6B-Base": (_config(28, 1024, 3072, 16, 32768, 1000000, True), 596_049_920),
    "Qwen/Qwen3-1.7B-Base": (_config(28, 2048, 6144, 16, 32768, 1000000, True), 1_720_574_976),
    "Qwen/Qwen3-4B-Base":   (_config(36, 2560, 9728, 32, 32768, 1000000, True), 4_022_468_096),
    "Qwen/Qwen3-8B-Base":   (_config(36, 4096, 12288, 32, 32768, 1000000, False), 8_190_735_360),
    "Qwen/Qwen3-14B-Base":  (_config(40, 5120, 17408, 40, 32768, 1000000, False), 14_768_307_200),
    "Qwen/Qwen3-0.6B":      (_config(28, 1024, 3072, 16, 40960, 1000000, True), 596_049_920),
    "Qwen/Qwen3-1.7B":      (_config(28, 2048, 6144, 16, 40960, 1000000, True), 1_720_574_976),
    "Qwen/Qwen3-4B":        (_config(36, 2560, 9728, 32, 40960, 1000000, True), 4_022_468_096),
    "Qwen/Qwen3-8B":        (_config(36, 4096, 12288, 32, 40960, 1000000, False), 8_190_735_360),
    "Qwen/Qwen3-14B":       (_config(40, 5120, 17408, 40, 40960, 1000000, False), 14_768_307_200),
    "Qwen/Qwen3-32B":       (_config(64, 5120, 25600, 64, 40960, 1000000, False), 32_762_123_264),
    "Qwen/Qwen3-4B-Instruct-2507": (_config(36, 2560, 9728, 32, 262144, 5000000, True), 4_022_468_096),
    "Qwen/Qwen3-4B-Thinking-2507": (_config(36, 2560, 9728, 32, 262144, 5000000, True), 4_022_468_096),
}
# fmt: on
