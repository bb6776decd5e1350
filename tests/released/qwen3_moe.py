"""Qwen 3 with experts."""


def _config(layers, dim, hidden, heads, kv_heads, experts, width, context, base):
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": dim,
        "initializer_range": 0.02,
        "intermediate_size": hidden,
        "max_position_embeddings": context,
        "max_window_layers": layers,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
        "num_attention_heads": heads,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": base,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }


def _coder(*numbers):  # these releases have fields of an earlier draft of the family
    drafts = {"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True}
    return {k: v for k, v in _config(*numbers).items() if k not in ("attention_bias", "bos_token_id")} | drafts


A3B, A22B = (2048, 6144, 32, 4, 128, 768), (4096, 12288, 64, 4, 128, 1536)
# fmt: off
RELEASED = {
    "Qwen/Qwen3-30B-A3B-Base":             (_config(48, *A3B, 32768, 1000000.0), 30_532_122_624),
    "Qwen/Qwen3-30B-A3B":                  (_config(48, *A3B, 40960, 1000000.0), 30_532_122_624),
    "Qwen/Qwen3-30B-A3B-Instruct-2507":    (_config(48, *A3B, 262144, 10000000), 30_532_122_624),
    "Qwen/Qwen3-30B-A3B-Thinking-2507":    (_config(48, *A3B, 262144, 10000000), 30_532_122_624),
    "Qwen/Qwen3-Coder-30B-A3B-Instruct":
        (_coder(48, 2048, 5472, 32, 4, 128, 768, 262144, 10000000), 30_532_122_624),
    "Qwen/Qwen3-235B-A22B":                (_config(94, *A22B, 40960, 1000000.0), 235_093_634_560),
    "Qwen/Qwen3-235B-A22B-Instruct-2507":  (_config(94, *A22B, 262144, 5000000), 235_093_634_560),
    "Qwen/Qwen3-235B-A22B-Thinking-2507":  (_config(94, *A22B, 262144, 5000000), 235_093_634_560),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct":
        (_coder(62, 6144, 8192, 96, 8, 160, 2560, 262144, 10000000), 480_154_875_392),
}
# fmt: on
