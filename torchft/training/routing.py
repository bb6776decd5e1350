"""How a mixture of experts spreads its tokens: a loss and a bias that even it out, and what of it the metrics show.

    routing = Routing(model, config.routing, sum=world.sum)   # before compile
    routing.begin(micro_steps=4)                              # before the first step
    ...
    routing.end_of_step()                                     # after each
    row |= routing.row()

For a model without experts all of this does nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from torchft.config import Range
from torchft.modules.decoder import Decoder
from torchft.modules.moe import MoE
from torchft.modules.routers import GroupedRouter
from torchft.ranks import local, num_ranks, region
from torchft.training.metrics import Row


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """The ``routing:`` section of a config, for mixtures of experts."""

    balance: Annotated[float, Range(min=0)] = 0.0  # weight of the load-balancing loss; pre-training used 0.001 to 0.02
    bias_speed: Annotated[float, Range(min=0)] = 0.0  # by which a step moves the routers' correction towards an even
    # load (DeepSeek V3, GLM 4.5; pre-training used 0.001)

    def problems(self, *, frozen: bool) -> list[str]:
        """For a recipe's ``conflicts``. ``frozen``: the base is, and adapters are trained."""
        if frozen and self.bias_speed:
            return [
                "routing.bias_speed: it changes the base, which LoRA freezes; use routing.balance or leave lora out"
            ]
        return []


class Routing:
    """Counts the tokens of each expert in each layer, in training forwards: not in those without gradient, as of a
    reference. Micro-steps that recompute count twice: all alike.

    The loss is per layer, as Switch defines it, and ``balance`` weighs its mean over layers. (transformers averages
    shares and probabilities over layers before it multiplies them: the same for one layer.)
    """

    def __init__(self, model: Decoder, config: RoutingConfig, *, sum: Callable[[Tensor], Tensor]) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, MoE)]
        self._config, self._sum = config, sum
        num_experts = self._layers[0].router.num_experts if self._layers else 0
        shape = (len(self._layers), num_experts)
        self._step = torch.zeros(shape, dtype=torch.int64, device=model.embed_tokens.weight.device)
        self._total = torch.zeros_like(self._step)
        for layer, counts in zip(self._layers, self._step):
            layer.counts = counts

    def begin(self, *, micro_steps: int) -> None:
        """Forgets what was counted; from here on each of so many forwards of a step, of each rank, adds its share of
        the loss."""
        self._step.zero_()
        for layer in self._layers:
            layer.balance = self._config.balance / len(self._layers) / micro_steps / num_ranks()

    @torch.no_grad()
    def end_of_step(self) -> None:
        """All ranks: after the optimizer's step."""
        if not self._layers:
            return
        self._total += self._step
        if self._config.bias_speed:
            load = self._sum(self._step).double()  # [layers, e], of all ranks
            moves = self._config.bias_speed * (load.mean(1, keepdim=True) - load).sign().float()
            for layer, move in zip(self._layers, moves):
                if isinstance(layer.router, GroupedRouter):
                    correction = layer.router.correction
                    local(correction).add_(move[region(correction)])
        self._step.zero_()

    def row(self) -> Row:
        """All ranks: since the last row, of all ranks. {} for a model without experts.

        ``expert_load``: tokens of the busiest expert over the mean of its layer, in the worst layer; 1 is even.
        ``idle_experts``: share of all experts that no token went to.
        """
        if not self._layers:
            return {}
        load = self._sum(self._total).double()
        self._total.zero_()
        busiest = (load.amax(1) / load.mean(1).clamp_min(1)).max()
        idle = (load == 0).double().mean()
        worst, share = torch.stack((busiest, idle)).tolist()
        return {"expert_load": worst, "idle_experts": share}
