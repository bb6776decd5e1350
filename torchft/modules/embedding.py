"""The table of token vectors."""

import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Embedding):
    """nn.Embedding that, of a model with tied embeddings, is the output projection too."""

    def project(self, x: Tensor) -> Tensor:
        """Hidden states [..., d] -> logits [..., v]."""
        return F.linear(x, self.weight)
