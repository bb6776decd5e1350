"""Mixtral."""


def _config(layers, dim, hidden, heads, vocab, context):
    return {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": dim,
        "initializer_range": 0.02,
        "intermediate_size": hidden,
        "max_position_embeddings": context,
        "model_type": "mixtral",
        "num_attention_heads": heads,
        "num_experts_per_tok": 2,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0",
        "use_cache": True,
        "vocab_size": vocab,
    }


# fmt: off
RELEASED = {  #                               layers  dim hidden heads vocab context  parameters
    "mistralai/Mixtral-8x7B-v0.1":            (_config(32, 4096, 14336, 32, 32000, 32768), 46_702_792_704),
    "mistralai/Mixtral-8x7B-Instruct-v0.1":   (_config(32, 4096, 14336, 32, 32000, 32768), 46_702_792_704),
    "mistralai/Mixtral-8x22B-v0.1":           (_config(56, 6144, 16384, 48, 32000, 65536), 140_620_634_112),
    "mistralai/Mixtral-8x22B-Instruct-v0.1":  (_config(56, 6144, 16384, 48, 32768, 65536), 140_630_071_296),
}
# fmt: on
