"""Which fused kernel computes plain causal rows, by GPU; written by ``python benchmarks/attention.py --write``.

{compute capability: {head_dim: [(row length in tokens up to which it is the fastest, kernel), ...]}}, by length.
"""

KERNELS = {
    "9.0": {
        64: [(32768, "cudnn")],
        128: [(32768, "cudnn")],
    },
}
