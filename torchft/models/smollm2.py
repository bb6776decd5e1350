"""SmolLM 2: Llama's architecture, small, with tied embeddings.

Paper: https://arxiv.org/abs/2502.02737. Weights: https://huggingface.co/HuggingFaceTB
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
from torchft.modules.rope import Rope


def _size(dim: int, num_layers: int, num_heads: int, num_kv_heads: int, hidden_dim: int, base: float) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=49_152, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=64, hidden_dim=hidden_dim, max_seq_len=8192, rope=Rope(base=base), tie_embeddings=True,
    )  # fmt: skip


CONFIGS = {
    #                       dim layers heads kv hidden base
    "SmolLM2-135M":  _size( 576, 30,  9,  3, 1536, 100_000.0),
    "SmolLM2-360M":  _size( 960, 32, 15,  5, 2560, 100_000.0),
    "SmolLM2-1.7B":  _size(2048, 24, 32, 32, 8192, 130_000.0),
}  # fmt: skip
