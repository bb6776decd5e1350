"""The most likely continuations of a batch of prompts."""

from collections.abc import Sequence

from torchft.generation.engine import Engine, Request
from torchft.generation.sampling import Sampling
from torchft.modules.decoder import Decoder


def generate(
    model: Decoder, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Sequence[int]
) -> list[list[int]]:
    """The most likely continuation of each prompt, without the stop token that ended it.

    ``max_new_tokens`` bounds each answer; the model's mode (train or eval) is left as it is found. Raises ValueError
    for an empty prompt.
    """
    max_len = max(map(len, prompts)) + max_new_tokens
    engine = Engine(model, num_slots=len(prompts), max_len=max_len, stop_ids=stop_ids)
    sampling = Sampling(temperature=0.0, max_new_tokens=max_new_tokens)
    completions = engine.complete(Request(prompt=prompt, sampling=sampling) for prompt in prompts)
    return [c.tokens[:-1] if c.finish == "stop" else c.tokens for c in completions]
