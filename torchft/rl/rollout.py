"""Rollouts: episodes of the model with its environments, as the tokens that training needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torchft.data.prompts import Prompt
from torchft.errors import UserError
from torchft.generation.engine import Engine
from torchft.generation.requests import Finish, Request
from torchft.generation.sampling import Sampling
from torchft.generation.text import answer_text
from torchft.rl.environments import Environment
from torchft.rl.remote import RemoteEngine
from torchft.rl.rewards import Attempt
from torchft.tokenizers.chat import Message
from torchft.tokenizers.tokenizer import Tokenizer


@dataclass
class Episode:
    """Grows turn by turn. ``chosen[i]``: token i is the model's; ``logps[i]``: its log-probability then, else 0."""

    prompt: Prompt
    seed: int
    messages: list[Message]
    environment: Environment | None
    tokens: list[int] = field(default_factory=list)
    chosen: list[bool] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    text: str = ""  # of the last turn
    finish: Finish = "length"
    num_turns: int = 0

    @property
    def num_chosen(self) -> int:
        return sum(self.chosen)

    @property
    def attempt(self) -> Attempt:
        return Attempt(prompt=self.prompt, text=self.text, num_tokens=self.num_chosen, finish=self.finish)

    def add(self, tokens: Sequence[int], logps: Sequence[float] | None = None) -> None:
        """The model's tokens with their ``logps``, or what others say."""
        self.tokens += tokens
        self.chosen += [logps is not None] * len(tokens)
        self.logps += [0.0] * len(tokens) if logps is None else logps


def rollout(
    engine: Engine | RemoteEngine,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    sampling: Sampling,
    group_size: int,
    seed: int,
    first: int = 0,
    environment: Callable[[], Environment] | None = None,
    max_turns: int = 1,
) -> list[Episode]:
    """``group_size`` episodes of each prompt, in order. ``seed`` decides all that is drawn, with the number of each
    prompt, which for the first one is ``first``.

    An episode ends where its environment says nothing, a turn did not end by itself, or after ``max_turns``.
    """
    episodes = []
    for i, prompt in enumerate(prompts):
        for j in range(group_size):
            own = environment() if environment else None
            messages = own.reset(prompt) if own else list(prompt.messages)
            number = (seed << 32) + (first + i) * group_size + j
            episode = Episode(prompt=prompt, seed=number, messages=messages, environment=own)
            episode.add(tokenizer.render(messages, add_generation_prompt=True).tokens)
            episodes.append(episode)
    going = episodes
    while going:
        requests = [
            Request(prompt=e.tokens, sampling=sampling, seed=e.seed + (e.num_turns << 24)) for e in going
        ]  # fmt: skip
        for episode, completion in zip(going, engine.complete(requests)):
            episode.add(completion.tokens, completion.logps)
            episode.finish = completion.finish
            episode.text = answer_text(tokenizer, completion, stop=sampling.stop)
            episode.messages.append({"role": "assistant", "content": episode.text})
            episode.num_turns += 1
        going = [e for e in going if e.finish == "stop" and e.num_turns < max_turns and _goes_on(e, tokenizer, engine)]
    return episodes


def _goes_on(episode: Episode, tokenizer: Tokenizer, engine: Engine | RemoteEngine) -> bool:
    """Hear what the environment says; whether there is a next turn."""
    said = episode.environment.step(episode.text) if episode.environment else []
    if not said:
        return False
    between = turn_tokens(tokenizer, episode.messages, said)
    if len(episode.tokens) + len(between) >= engine.max_len:
        episode.finish = "length"
        return False
    episode.messages += said
    episode.add(between)
    return True


def turn_tokens(tokenizer: Tokenizer, messages: list[Message], said: list[Message]) -> list[int]:
    """The tokens between an assistant's stop token, the end of ``messages``, and its next turn after ``said``.

    Taken from two renderings, so that the tokens that the model drew stay as they are: encoding its text again might
    give others. UserError for a chat format that renders earlier turns otherwise once there are later ones.
    """
    before = tokenizer.render(messages, add_generation_prompt=False).tokens
    after = tokenizer.render([*messages, *said], add_generation_prompt=True).tokens
    end = max((i for i, token in enumerate(before) if token in tokenizer.stop_ids), default=-1) + 1
    if after[: len(before)] != before or not end:
        raise UserError("this chat format changes earlier turns when others follow: episodes can have one turn only")
    return after[end:]
