"""Values of the tokens of rows that every rank has whole, also where several ranks compute them together (tp, cp)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchft.documents import Documents
from torchft.losses.likelihood import IGNORE
from torchft.modules.decoder import Decoder
from torchft.token_shards import WHOLE_ROWS


def token_values(
    model: Decoder,
    tokens: Tensor,
    labels: Tensor,
    head: Callable[..., Any],
    *,
    positions: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, ...]:
    """What ``head(hidden, project, labels=labels)`` gives of each token, [b, s] each.

    Where ranks share rows each computes its own tokens, all get all values, and gradients are those of the sum of
    their losses: `TokenShards.whole`.
    """
    shards, s = model.shards or WHOLE_ROWS, tokens.shape[1]
    more = -s % shards.multiple
    if more:  # to what they can share, seen by nothing
        tokens, labels = F.pad(tokens, (0, more)), F.pad(labels, (0, more), value=IGNORE)
        if positions is not None:
            positions = torch.cat((positions, positions[:, -1:] + torch.arange(1, more + 1, device=tokens.device)), 1)
            documents = documents and documents._replace(longest=documents.longest + more)
    own = partial(head, labels=shards.own(labels))
    found = model(shards.own(tokens), positions, documents=documents, head=own)
    return tuple(shards.whole(values)[:, :s] for values in found)
