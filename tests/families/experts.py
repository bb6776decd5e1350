"""Mixture-of-experts families. Documents have up to 100 tokens: windows are 24, old contexts 64, so that both end."""

from tiny import rope

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

CASES = {
    "mixtral": MIXTRAL,
    "mixtral_window": MIXTRAL | {"sliding_window": WINDOW, "num_experts_per_tok": 3},
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe_as_it_is": QWEN3_MOE | {"norm_topk_prob": False, "attention_bias": True, "tie_word_embeddings": True},
}
