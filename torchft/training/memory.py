"""An estimate, before anything is allocated, of what training needs on one device."""

from dataclasses import dataclass

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchft.losses.likelihood import CHUNK
from torchft.modules.decoder import Decoder

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes, each at its own peak. The total is what to expect within about 20%; fragmentation comes on top."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # kept from forward to backward
    working: int  # what a block or the head needs while it runs

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working

    def lines(self) -> dict[str, str]:
        """For a panel: name -> "1.23 GiB", the total last."""
        parts = {**vars(self), "total": self.total}
        return {name: f"{size / GIB:.2f} GiB" for name, size in parts.items()}


def estimate_step(
    model: Decoder,
    *,
    tokens: int,
    saved: int,
    recomputed: int,
    largest: int,
    offload: bool = False,
    optimizer_bytes: int | None = None,
    gradient_bytes: int | None = None,
) -> Estimate:
    """Of training ``model`` on micro-steps of ``tokens``, from the measured cost of a block (`block_costs`).

    Args:
        saved: bytes that a block keeps for backward in a micro-step.
        recomputed: bytes that it makes again in backward.
        largest: bytes of the largest tensor that a block makes.
        offload: only two blocks' kept bytes are on the device at a time.
        optimizer_bytes: None: two states per trained value. ``gradient_bytes``: None: one gradient per trained value.
    """
    parameters = list(model.parameters())
    trainable = sum(p.nbytes for p in parameters if p.requires_grad)
    table = model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
    hidden = tokens * model.config.dim * model.embed_tokens.weight.itemsize
    logits = min(tokens, CHUNK) * model.config.vocab_size * model.embed_tokens.weight.itemsize
    summed = table.numel() * 4 + table.nbytes if table.requires_grad else 0  # the head's gradient over chunks, in fp32
    head = logits + 3 * hidden + summed
    block = recomputed + 3 * largest  # a gated MLP's backward has three gradients of its width at once
    return Estimate(
        weights=sum(map(stored_bytes, parameters)),
        gradients=trainable if gradient_bytes is None else gradient_bytes,
        optimizer=2 * trainable if optimizer_bytes is None else optimizer_bytes,
        activations=saved * (2 if offload else len(model.layers)),
        working=max(head, block),
    )


def stored_bytes(tensor: Tensor) -> int:
    """Bytes in memory: of a quantised tensor, of the tensors that it is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
