"""Llama 2: Llama 3's architecture with a 32k sentencepiece vocabulary and plain RoPE.

Paper: https://arxiv.org/abs/2307.09288. Weights: https://huggingface.co/meta-llama
"""

from torchft.models.llama3 import (  # noqa: F401  the same architecture
    HUB,
    MODEL_TYPE,
    LlamaConfig,
    block,
    build,
    from_hub,
    to_hub,
)


def _size(dim: int, num_layers: int, num_heads: int, num_kv_heads: int, hidden_dim: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32_000, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=dim // num_heads, hidden_dim=hidden_dim, max_seq_len=4096,
    )  # fmt: skip


CONFIGS = {
    #                        dim layers heads kv hidden
    "Llama-2-7b-hf":  _size(4096, 32, 32, 32, 11_008),
    "Llama-2-13b-hf": _size(5120, 40, 40, 40, 13_824),
    "Llama-2-70b-hf": _size(8192, 80, 64,  8, 28_672),
}  # fmt: skip
