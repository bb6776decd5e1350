"""Mixture-of-experts families. Documents have up to 100 tokens: windows are 24, old contexts 64, so that both end."""

from tiny import LLAMA3_ROPE, rope

from families.dense import WINDOW

MIXTRAL = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "rope_parameters": rope(base=1e6),
}
OLMOE = {
    "architectures": ["OlmoeForCausalLM"],
    "num_key_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "intermediate_size": 40,
}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "head_dim": 24,
    "intermediate_size": 40,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "sliding_window": WINDOW,
    "swiglu_limit": 2.0,  # bounds some; with many at a bound, rounding decides about one's gradient
    "rope_parameters": rope(
        "yarn", 500.0, factor=8.0, beta_fast=4.0, beta_slow=1.0, original_max_position_embeddings=64, truncate=False
    ),
}
GROUPED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}
GLM4_MOE = GROUPED | {
    "architectures": ["Glm4MoeForCausalLM"],
    "head_dim": 24,
    "attention_bias": True,
    "rope_parameters": rope(base=1e6, partial_rotary_factor=0.5),
}
DEEPSEEK = GROUPED | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_key_value_heads": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
    "rope_parameters": rope(
        "yarn", 100.0, factor=8.0, beta_fast=4.0, beta_slow=1.0, original_max_position_embeddings=64, mscale=0.7,
        mscale_all_dim=1.3,
    ),
}  # fmt: skip
KIMI = {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "n_shared_experts": 2, "rope_parameters": rope(base=5e4)}
LLAMA4 = {
    "architectures": ["Llama4ForCausalLM"],
    "head_dim": 24,
    "num_hidden_layers": 4,
    "intermediate_size": 40,
    "intermediate_size_mlp": 96,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": WINDOW,
    "floor_scale": 16,
    "attn_scale": 0.5,
    "rope_parameters": LLAMA3_ROPE,
}
DELTA = {
    "head_dim": 24,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "rope_parameters": rope(base=1e6, partial_rotary_factor=0.25),
}
SMALL = {
    "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 24
}  # fmt: skip
QWEN3_NEXT = DELTA | SMALL | {"architectures": ["Qwen3NextForCausalLM"]}
QWEN3_5 = DELTA | {"architectures": ["Qwen3_5ForCausalLM"], "tie_word_embeddings": True}
QWEN3_5_MOE = DELTA | SMALL | {"architectures": ["Qwen3_5MoeForCausalLM"]}

CASES = {
    "llama4": LLAMA4,
    "llama4_no_norm": LLAMA4 | {"use_qk_norm": False, "rope_parameters": rope(), "interleave_moe_layer_step": 1},
    "mixtral": MIXTRAL,
    "mixtral_window": MIXTRAL | {"sliding_window": WINDOW, "num_experts_per_tok": 3},
    "deepseek_v3": DEEPSEEK,
    "deepseek_v3_one_group": DEEPSEEK | KIMI,
    "glm4_moe": GLM4_MOE,
    "glm4_moe_qk_norm": GLM4_MOE | {"use_qk_norm": True, "first_k_dense_replace": 0, "num_hidden_layers": 2},
    "gpt_oss": GPT_OSS,
    "olmoe": OLMOE,
    "olmoe_renormalised": OLMOE | {"norm_topk_prob": True, "num_key_value_heads": 2},
    "qwen3_5": QWEN3_5,
    "qwen3_5_moe": QWEN3_5_MOE | {"layer_types": ["full_attention", "linear_attention"]},
    "qwen3_next": QWEN3_NEXT,
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe_as_it_is": QWEN3_MOE | {"norm_topk_prob": False, "attention_bias": True, "tie_word_embeddings": True},
}
