"""Qwen 3 Next, Qwen 3 Coder Next, and the ``text_config`` of Qwen 3.5. Parameters of Qwen 3.5's text models are what
transformers' classes have, those of Qwen 3 Next are rounded as on the model card."""


def _delta(layers, dim, heads, kv_heads, vocab, delta_heads, rope, **more):
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": dim,
        "initializer_range": 0.02,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": delta_heads,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": vocab,
        **rope,
        **more,
    }


def _experts(number, top_k, width):
    return {
        "moe_intermediate_size": width,
        "num_experts": number,
        "num_experts_per_tok": top_k,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": width,
    }


def _next(base):
    rope = {"partial_rotary_factor": 0.25, "rope_scaling": None, "rope_theta": base}
    more = _experts(512, 10, 512) | {
        "architectures": ["Qwen3NextForCausalLM"],
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "full_attention_interval": 4,
        "intermediate_size": 5120,
        "mlp_only_layers": [],
        "model_type": "qwen3_next",
        "norm_topk_prob": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
    }
    return _delta(48, 2048, 16, 2, 151936, 32, rope, **more)


def _qwen3_5(layers, dim, heads, kv_heads, hidden, delta_heads, experts=None, tied=False):
    rope = {
        "partial_rotary_factor": 0.25,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
    }
    more = {
        "architectures": ["Qwen3_5MoeForCausalLM" if experts else "Qwen3_5ForCausalLM"],
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 248044,
        "full_attention_interval": 4,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * (layers // 4),
        "mamba_ssm_dtype": "float32",
        "model_type": "qwen3_5_moe_text" if experts else "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "tie_word_embeddings": tied,
        **(experts or {"intermediate_size": hidden}),
    }
    return _delta(layers, dim, heads, kv_heads, 248320, delta_heads, rope, **more)


# fmt: off
RELEASED = {
    "Qwen/Qwen3-Next-80B-A3B-Instruct": (_next(10000000), 80e9),
    "Qwen/Qwen3-Next-80B-A3B-Thinking": (_next(10000000), 80e9),
    "Qwen/Qwen3-Coder-Next": (_next(5000000), 80e9),
    "Qwen/Qwen3.5-0.8B": (_qwen3_5(24, 1024, 8, 2, 3584, 16, tied=True), 752_393_024),
    "Qwen/Qwen3.5-2B": (_qwen3_5(24, 2048, 8, 2, 6144, 16, tied=True), 1_881_825_088),
    "Qwen/Qwen3.5-4B": (_qwen3_5(32, 2560, 16, 4, 9216, 32, tied=True), 4_205_751_296),
    "Qwen/Qwen3.5-9B": (_qwen3_5(32, 4096, 16, 4, 12288, 32), 8_953_803_264),
    "Qwen/Qwen3.5-27B": (_qwen3_5(64, 5120, 24, 4, 17408, 48), 26_895_998_464),
    "Qwen/Qwen3.5-35B-A3B": (_qwen3_5(40, 2048, 16, 2, 0, 32, _experts(256, 8, 512)), 34_660_610_688),
    "Qwen/Qwen3.5-122B-A10B": (_qwen3_5(48, 3072, 32, 2, 0, 64, _experts(256, 8, 1024)), 122_111_526_912),
    "Qwen/Qwen3.5-397B-A17B": (_qwen3_5(60, 4096, 32, 2, 0, 64, _experts(512, 10, 1024)), 396_346_350_336),
}
# fmt: on
