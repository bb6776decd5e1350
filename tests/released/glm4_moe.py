"""GLM 4.5 and 4.6. Parameters as the model cards round them."""


def _config(layers, dim, hidden, experts, width, dense, scale, context, qk_norm):
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": [151329, 151336, 151338],
        "first_k_dense_replace": dense,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": dim,
        "initializer_range": 0.02,
        "intermediate_size": hidden,
        "max_position_embeddings": context,
        "model_type": "glm4_moe",
        "moe_intermediate_size": width,
        "n_group": 1,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 96,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "num_nextn_predict_layers": 1,
        "pad_token_id": 151329,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "routed_scaling_factor": scale,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.54.0",
        "use_cache": True,
        "use_qk_norm": qk_norm,
        "vocab_size": 151552,
    }


AIR = (46, 4096, 10944, 128, 1408, 1, 1.0)
BIG = (92, 5120, 12288, 160, 1536, 3, 2.5)
RELEASED = {
    "zai-org/GLM-4.5-Air": (_config(*AIR, 131072, False), 106e9),
    "zai-org/GLM-4.5-Air-Base": (_config(*AIR, 131072, False), 106e9),
    "zai-org/GLM-4.5": (_config(*BIG, 131072, True), 355e9),
    "zai-org/GLM-4.5-Base": (_config(*BIG, 131072, True), 355e9),
    "zai-org/GLM-4.6": (_config(*BIG, 202752, True), 355e9),
}
