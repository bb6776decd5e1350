"""A few rows of the vocabulary trained, the rest frozen: for tokens that were added, or are to mean something else.

    apply_token_rows(model, token_ids)      # on meta, with apply_lora
    init_adapters(model)                    # once the weights are loaded

The rows are whole vectors in a wider dtype, in place of the table's, as PEFT's ``trainable_token_indices`` has them.
Tied embeddings share them between input and output; an output head of its own gets its own.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchft.errors import UserError
from torchft.modules.decoder import Decoder
from torchft.modules.embedding import Embedding
from torchft.ranks import copy_part, whole


class TokenRows(Embedding):
    """A frozen table in which ``lora_rows`` stand in place of the rows ``ids``."""

    def __init__(self, table: nn.Embedding, ids: Sequence[int], *, dtype: torch.dtype) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, device="meta")
        self.weight, self.ids, self.enabled = table.weight, tuple(ids), True
        self.requires_grad_(False)
        rows = torch.empty(len(self.ids), self.embedding_dim, device=table.weight.device, dtype=dtype)
        self.lora_rows = nn.Parameter(rows)

    def forward(self, tokens: Tensor) -> Tensor:
        """[...] -> [..., d], in the dtype of the table."""
        x = super().forward(tokens)
        for id, row in zip(self.ids, self.lora_rows.to(x.dtype)) if self.enabled else ():
            x = torch.where((tokens == id).unsqueeze(-1), row, x)  # no index tensor: it would be a buffer
        return x

    def project(self, x: Tensor) -> Tensor:
        logits = super().project(x)
        return _replaced(logits, F.linear(x, self.lora_rows.to(x.dtype)), self.ids) if self.enabled else logits

    @torch.no_grad()
    def init_adapter(self) -> None:
        """The rows as they are in the table. All ranks call it."""
        copy_part(self.lora_rows, whole(self.weight)[list(self.ids)].to(self.lora_rows.dtype))

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The table with the trained rows in it, [v, d]. All ranks call it; each gets all of it."""
        return _merged(self.weight, self.lora_rows, self.ids, dtype)


class TokenHead(nn.Linear):
    """A frozen output head in which ``lora_rows`` stand in place of the rows ``ids``."""

    def __init__(self, head: nn.Linear, ids: Sequence[int], *, dtype: torch.dtype) -> None:
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight, self.ids, self.enabled = head.weight, tuple(ids), True
        self.requires_grad_(False)
        rows = torch.empty(len(self.ids), self.in_features, device=head.weight.device, dtype=dtype)
        self.lora_rows = nn.Parameter(rows)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [..., d] -> logits [..., v]."""
        logits = super().forward(x)
        return _replaced(logits, F.linear(x, self.lora_rows.to(x.dtype)), self.ids) if self.enabled else logits

    @torch.no_grad()
    def init_adapter(self) -> None:
        """The rows as they are in the head. All ranks call it."""
        copy_part(self.lora_rows, whole(self.weight)[list(self.ids)].to(self.lora_rows.dtype))

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The head with the trained rows in it, [v, d]. All ranks call it; each gets all of it."""
        return _merged(self.weight, self.lora_rows, self.ids, dtype)


def apply_token_rows(model: Decoder, ids: Sequence[int], *, dtype: torch.dtype = torch.float32) -> None:
    """Train the rows ``ids`` of the embedding and, if there is one, of the output head; call it after ``apply_lora``.

    UserError for an id that the model has no row for.
    """
    ids = sorted(set(ids))
    if ids and not 0 <= ids[0] <= ids[-1] < model.config.vocab_size:
        raise UserError(
            f"trainable_tokens: id {ids[-1]} is outside the model's {model.config.vocab_size} embedding rows; "
            "`tune vocab` makes a checkpoint with rows for new tokens"
        )
    if model.lm_head is not None and type(model.lm_head) is not nn.Linear:
        raise UserError("trainable_tokens: the output head has an adapter already; leave lm_head out of lora.targets")
    model.embed_tokens = TokenRows(model.embed_tokens, ids, dtype=dtype)
    if model.lm_head is not None:
        model.lm_head = TokenHead(model.lm_head, ids, dtype=dtype)


def token_rows(model: nn.Module) -> dict[str, TokenRows | TokenHead]:
    """The layers with trained rows by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (TokenRows, TokenHead))}


def _replaced(logits: Tensor, own: Tensor, ids: Sequence[int]) -> Tensor:
    """``logits`` [..., v] with the columns ``ids`` from ``own`` [..., n]."""
    for start, stop in _runs(ids):  # one copy for neighbours, as new tokens are
        logits[..., ids[start] : ids[start] + stop - start] = own[..., start:stop]
    return logits


def _merged(weight: Tensor, rows: Tensor, ids: Sequence[int], dtype: torch.dtype | None) -> Tensor:
    merged = whole(weight).to(dtype or weight.dtype, copy=True)
    merged[list(ids)] = whole(rows).to(merged.dtype)
    return merged


def _runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """[start, stop) of neighbours that follow each other in ascending ``ids``."""
    starts = [i for i, id in enumerate(ids) if not i or id != ids[i - 1] + 1]
    return list(zip(starts, [*starts[1:], len(ids)], strict=True))
