"""DeepSeek V3 and R1, Kimi K2, Moonlight. Parameters without the layer for multi-token prediction; of the original ones
in bf16, without FP8 blocks' scales (``quantization_config`` is left out here)."""


def _config(layers, dim, hidden, heads, vocab, experts, width, dense, scale, context, base, **more):
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "aux_loss_alpha": 0.001,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "first_k_dense_replace": dense,
        "hidden_act": "silu",
        "hidden_size": dim,
        "initializer_range": 0.02,
        "intermediate_size": hidden,
        "kv_lora_rank": 512,
        "max_position_embeddings": context,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": width,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": heads,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": base,
        "routed_scaling_factor": scale,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
        "use_cache": True,
        "v_head_dim": 128,
        "vocab_size": vocab,
        **more,
    }


def _yarn(factor, fast):
    numbers = {"beta_fast": fast, "beta_slow": 1, "factor": factor, "mscale": 1.0, "mscale_all_dim": 1.0}
    return {"rope_scaling": {**numbers, "original_max_position_embeddings": 4096, "type": "yarn"}}


def _kimi(context, factor, **more):
    more = {"model_type": "kimi_k2", "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0, **more}
    sizes = (61, 7168, 18432, 64, 163840, 384, 2048, 1, 2.827)
    return _config(*sizes, context, 50000.0, **_yarn(factor, 1.0), **more)


V3 = _config(61, 7168, 18432, 128, 129280, 256, 2048, 3, 2.5, 163840, 10000, **_yarn(40, 32))
MOONLIGHT = _config(
    27, 2048, 11264, 16, 163840, 64, 1408, 1, 2.446, 8192, 50000.0, q_lora_rank=None, n_group=1, topk_group=1,
    num_experts_per_tok=6, n_shared_experts=2, num_nextn_predict_layers=0, rms_norm_eps=1e-5,
)  # fmt: skip
V3_NAMES = ["V3-Base", "V3", "V3-0324", "V3.1-Base", "V3.1", "R1", "R1-0528"]

RELEASED = {
    **{f"deepseek-ai/DeepSeek-{name}": (V3, 671_026_419_200) for name in V3_NAMES},
    "moonshotai/Kimi-K2-Base": (_kimi(131072, 32.0), 1_026_408_232_448),
    "moonshotai/Kimi-K2-Instruct": (_kimi(131072, 32.0), 1_026_408_232_448),
    "moonshotai/Kimi-K2-Instruct-0905": (_kimi(262144, 64.0), 1_026_408_232_448),
    # Numbers of a project that trains it: https://github.com/zianglih/miles, scripts/models/kimi-k2-thinking.sh.
    "moonshotai/Kimi-K2-Thinking": (_kimi(262144, 64.0, rms_norm_eps=1e-5), 1_026_408_232_448),
    "moonshotai/Moonlight-16B-A3B": (MOONLIGHT, 15.96e9),
    "moonshotai/Moonlight-16B-A3B-Instruct": (MOONLIGHT, 15.96e9),
}
