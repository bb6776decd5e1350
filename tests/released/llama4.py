"""Llama 4: the ``text_config`` of the multimodal releases, and the parameters of the text model alone."""

SCOUT_ROPE = {"factor": 8.0, "high_freq_factor": 4.0}
INSTRUCT_ROPE = {"factor": 16.0, "high_freq_factor": 1.0}


def _config(experts, every, context, scaling, qk_norm):
    llama3 = {"low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
    return {
        "architectures": ["Llama4ForCausalLM"],
        "attention_bias": False,
        "attention_chunk_size": 8192,
        "attention_dropout": 0.0,
        "attn_scale": 0.1,
        "attn_temperature_tuning": 4,
        "bos_token_id": 200000,
        "eos_token_id": [200001, 200007, 200008],
        "floor_scale": 8192,
        "for_llm_compressor": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "initializer_range": 0.02,
        "interleave_moe_layer_step": every,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "max_position_embeddings": context,
        "model_type": "llama4_text",
        "moe_layers": list(range(every - 1, 48, every)),
        "no_rope_layers": [1, 1, 1, 0] * 12,
        "num_attention_heads": 40,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "num_local_experts": experts,
        "output_router_logits": False,
        "pad_token_id": 200018,
        "rms_norm_eps": 1e-05,
        "rope_scaling": scaling and llama3 | scaling,
        "rope_theta": 500000.0,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_qk_norm": qk_norm,
        "vocab_size": 202048,
    }


VISION = 0.87e9  # parameters, of the 109e9 and 401.6e9 that the Hub counts
RELEASED = {
    "meta-llama/Llama-4-Scout-17B-16E": (_config(16, 1, 262144, SCOUT_ROPE, True), 108.64e9 - VISION),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": (_config(16, 1, 10485760, INSTRUCT_ROPE, True), 108.64e9 - VISION),
    "meta-llama/Llama-4-Maverick-17B-128E": (_config(128, 2, 262144, None, False), 401.6e9 - VISION),
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": (_config(128, 2, 1048576, None, False), 401.6e9 - VISION),
}
