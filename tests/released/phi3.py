"""Phi. Phi-3-mini-128k-instruct, Phi-3.5-mini-instruct and Phi-4-mini-instruct were checked against stored copies of
config.json; of Phi-3-medium-128k-instruct all but its short factors and window, and none of the reasoning ones."""

from torchft.models.phi3 import (
    PHI_3_MEDIUM_LONG,
    PHI_3_MEDIUM_SHORT,
    PHI_3_MINI_LONG,
    PHI_3_MINI_SHORT,
    PHI_4_LONG,
    PHI_35_LONG,
    PHI_35_SHORT,
)


def _config(vocab, layers, dim, hidden, heads, kv_heads, context, base=10000.0, window=None, tied=False, **more):
    return {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "embd_pdrop": 0.0,
        "hidden_act": "silu",
        "hidden_size": dim,
        "intermediate_size": hidden,
        "max_position_embeddings": context,
        "model_type": "phi3",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "original_max_position_embeddings": 4096 if context == 131072 else context,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": base,
        "sliding_window": window,
        "tie_word_embeddings": tied,
        "vocab_size": vocab,
        **more,
    }


def _long(short, long):
    return {"type": "longrope", "short_factor": list(short), "long_factor": list(long)}


PHI_4_MINI = {
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 0.75,
    "rope_scaling": _long([1.0] * 48, PHI_4_LONG),
}

MINI = (32064, 32, 3072, 8192, 32, 32)
MEDIUM = (32064, 40, 5120, 17920, 40, 10)
PHI_4 = (100352, 40, 5120, 17920, 40, 10)
REASONING = (_config(*PHI_4, 32768, base=500000.0), 14_659_507_200)
PHI_4_MINI_ROW = (_config(200064, 32, 3072, 8192, 24, 8, 131072, window=262144, tied=True, **PHI_4_MINI), 3_836_021_760)

# fmt: off
RELEASED = {
    "microsoft/Phi-3-mini-4k-instruct": (_config(*MINI, 4096, window=2047), 3_821_079_552),
    "microsoft/Phi-3-mini-128k-instruct":
        (_config(*MINI, 131072, window=262144, rope_scaling=_long(PHI_3_MINI_SHORT, PHI_3_MINI_LONG)), 3_821_079_552),
    "microsoft/Phi-3-medium-4k-instruct": (_config(*MEDIUM, 4096, window=2047), 13_960_238_080),
    "microsoft/Phi-3-medium-128k-instruct":
        (_config(*MEDIUM, 131072, window=131072, rope_scaling=_long(PHI_3_MEDIUM_SHORT, PHI_3_MEDIUM_LONG)),
         13_960_238_080),
    "microsoft/Phi-3.5-mini-instruct":
        (_config(*MINI, 131072, window=262144, rope_scaling=_long(PHI_35_SHORT, PHI_35_LONG)), 3_821_079_552),
    "microsoft/phi-4": (_config(*PHI_4, 16384, base=250000.0), 14_659_507_200),
    "microsoft/Phi-4-reasoning": REASONING,
    "microsoft/Phi-4-reasoning-plus": REASONING,
    "microsoft/Phi-4-mini-instruct": PHI_4_MINI_ROW,
    "microsoft/Phi-4-mini-reasoning": PHI_4_MINI_ROW,
}
# fmt: on
