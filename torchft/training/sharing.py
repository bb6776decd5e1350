"""Whether the answers of a run share their prompts' compute, by what was asked, the model and what it saves."""

from typing import Literal

from torchft.data.samples import Samples
from torchft.data.sharing import saved_share
from torchft.data.stream import Stream
from torchft.errors import UserError
from torchft.modules.decoder import Decoder
from torchft.modules.delta_net import GatedDeltaNet
from torchft.modules.moe import MoE
from torchft.modules.rope import LongRope
from torchft.training.routing import RoutingConfig

Sharing = Literal["auto"] | bool  # the key share_prompts of a config
# Of the tokens: below, what masks cost is not won back. By benchmarks/shared_prompts.py on an H100
# (1B) 16.7% saved takes as long as before, 24.2% is 1.13 times as fast.
WORTH = 1 / 6


def unshareable(model: Decoder, routing: RoutingConfig, *, cp: int = 1) -> str | None:
    """Why answers cannot share their prompt in this model, whose rows ``cp`` ranks share; None if they can."""
    if cp > 1:
        return "parallel.cp spreads a prompt over ranks, which attend to plain documents only"
    modules = list(model.modules())
    if any(isinstance(module, GatedDeltaNet) for module in modules):
        return "the model has recurrent layers, whose state after a prompt goes on into one answer only"
    if any(isinstance(rope, LongRope) for rope in model.ropes):
        return "the model's RoPE turns a prompt by the length of its answer, which each answer has of its own"
    if (routing.balance or routing.bias_speed) and any(isinstance(module, MoE) for module in modules):
        return "routing counts the tokens of each expert, and a shared prompt would count once instead of per answer"
    return None


def check_shareable(setting: Sharing, model: Decoder, routing: RoutingConfig, *, cp: int = 1) -> bool:
    """Whether answers can share, and that was not ruled out. UserError if it was asked for and cannot be."""
    reason = unshareable(model, routing, cp=cp) if setting else None
    if setting is True and reason:
        raise UserError(f"share_prompts: {reason}; set it to auto or false", is_shared=True)
    return bool(setting) and reason is None


def pays(setting: Sharing, saved: float) -> bool:
    """Whether to share, where answers can: if asked for, or if it saves enough of the tokens."""
    return setting is True or (setting == "auto" and saved >= WORTH)


def share_pairs(
    setting: Sharing, model: Decoder, routing: RoutingConfig, data: Samples | Stream, *, packed: bool, cp: int = 1
) -> tuple[bool, str]:
    """Whether pairs share their prompts, and why, for people. "auto" leaves rows that are not packed as they are."""
    samples = data.probe if isinstance(data, Stream) else data
    if not samples.are_pairs or not check_shareable(setting, model, routing, cp=cp):
        return False, "computed for each answer"
    saved = saved_share(samples)
    if pays(setting, saved) and (packed or setting is True):
        return True, f"computed once for both answers, which saves {saved:.1%} of the tokens"
    return False, f"computed for each answer; share_prompts=true would save {saved:.1%} of the tokens"
