"""Gemma 2."""


def _config(layers, dim, hidden, heads, kv_heads, head_dim, query):
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "head_dim": head_dim,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": dim,
        "initializer_range": 0.02,
        "intermediate_size": hidden,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pad_token_id": 0,
        "query_pre_attn_scalar": query,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "torch_dtype": "float32",
        "transformers_version": "4.42.4",
        "use_cache": True,
        "vocab_size": 256000,
    }


# fmt: off
RELEASED = {  #               layers  dim hidden heads kv head query   parameters
    "google/gemma-2-2b":  (_config(26, 2304, 9216, 8, 4, 256, 256), 2_614_341_888),
    "google/gemma-2-9b":  (_config(42, 3584, 14336, 16, 8, 256, 256), 9_241_705_984),
    "google/gemma-2-27b": (_config(46, 4608, 36864, 32, 16, 128, 144), 27_227_128_320),
}
# fmt: on
