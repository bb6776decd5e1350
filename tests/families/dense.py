"""Dense families. Documents of the suite have up to 100 tokens: windows are 24, old contexts 64, so that both end."""

from tiny import LLAMA3_ROPE, rope

WINDOW = 24

LLAMA = {"architectures": ["LlamaForCausalLM"]}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "head_dim": 24}
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": WINDOW,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 6.0,
}
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}

CASES = {
    "llama2_mha": LLAMA | {"num_key_value_heads": 4},
    "llama3.2_tied": LLAMA | {"rope_parameters": LLAMA3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True},
    "llama3.3_mqa": LLAMA | {"num_key_value_heads": 1, "rope_parameters": LLAMA3_ROPE},
    "llama_linear_rope": LLAMA | {"rope_parameters": rope("linear", factor=4.0)},
    "llama_biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama_prime_sizes": LLAMA | {"vocab_size": 97, "intermediate_size": 89, "head_dim": 24},
    "qwen3": QWEN3 | {"rope_parameters": rope(base=1e6)},
    "qwen3_tied_windows": QWEN3 | SLIDING | {"tie_word_embeddings": True, "attention_bias": True},
    "gemma2": GEMMA2,
}
