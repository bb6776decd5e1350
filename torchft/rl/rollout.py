"""Rollouts: episodes of the model with its environments, as the tokens that training needs."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torchft.data.prompts import Prompt
from torchft.errors import UserError
from torchft.generation.engine import Engine
from torchft.generation.requests import Request
from torchft.generation.sampling import Sampling
from torchft.generation.text import answer_text
from torchft.rl.environments import Environment
from torchft.rl.remote import RemoteEngine
from torchft.rl.rewards import Attempt, Ending
from torchft.tokenizers.chat import Message
from torchft.tokenizers.tokenizer import Tokenizer

log = logging.getLogger(__name__)


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
    finish: Ending = "length"
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

    An episode ends where its environment says nothing or raises, a turn did not end by itself, or after ``max_turns``.
    A UserError of an environment, or one in every episode, ends the rollout.
    """
    episodes, failures = [], list[tuple[Episode, Exception]]()

    def hear(episode: Episode, say: Callable[[], list[Message]]) -> list[Message]:
        try:
            return say()
        except UserError:
            raise
        except Exception as e:  # the user's code may raise anything: this episode ends, and is counted
            episode.finish = "environment_failed"
            failures.append((episode, e))
            return []

    for i, prompt in enumerate(prompts):
        for j in range(group_size):
            own = environment() if environment else None
            number = (seed << 32) + (first + i) * group_size + j
            episode = Episode(prompt=prompt, seed=number, messages=list(prompt.messages), environment=own)
            if own is not None:
                episode.messages = hear(episode, partial(own.reset, prompt)) or episode.messages
            episode.add(tokenizer.render(episode.messages, add_generation_prompt=True).tokens)
            episodes.append(episode)
    going = [episode for episode in episodes if episode.finish != "environment_failed"]
    while going:
        requests = [
            Request(prompt=e.tokens, sampling=sampling, seed=e.seed + (e.num_turns << 24)) for e in going
        ]  # fmt: skip
        for episode, completion in zip(going, engine.complete(requests)):
            episode.add(completion.tokens, completion.logps)
            episode.finish = completion.finish
            episode.text = answer_text(tokenizer, completion, stop=sampling.stop)
            # A stop text is part of the conversation, and often what a tool looks for.
            content = answer_text(tokenizer, completion) if environment else episode.text
            episode.messages.append({"role": "assistant", "content": content})
            episode.num_turns += 1
        going = [e for e in going if e.finish == "stop" and e.num_turns < max_turns]
        going = [e for e in going if _goes_on(e, hear, tokenizer, max_len=engine.max_len)]
    if failures:
        episode, error = failures[0]
        if len(failures) == len(episodes):
            raise UserError(
                f"rollout.environment: it raised {error!r} for {episode.prompt.where}, and in every episode"
            )
        log.warning(
            "the environment raised %r for %s, and in %d of %d episodes; they are left out and counted",
            error, episode.prompt.where, len(failures), len(episodes),
        )  # fmt: skip
    return episodes


def _goes_on(
    episode: Episode,
    hear: Callable[[Episode, Callable[[], list[Message]]], list[Message]],
    tokenizer: Tokenizer,
    *,
    max_len: int,
) -> bool:
    """Hear what the environment says; whether there is a next turn."""
    if episode.environment is None:
        return False
    said = hear(episode, partial(episode.environment.step, episode.messages[-1]["content"]))
    if not said:
        return False
    is_closed = episode.tokens[-1] in tokenizer.stop_ids  # and not by a stop text
    between = turn_tokens(tokenizer, episode.messages, said, is_closed=is_closed)
    if len(episode.tokens) + len(between) >= max_len:
        episode.finish = "length"
        return False
    episode.messages += said
    episode.add(between)
    return True


def turn_tokens(
    tokenizer: Tokenizer, messages: list[Message], said: list[Message], *, is_closed: bool = True
) -> list[int]:
    """The tokens between an assistant's stop token, the end of ``messages``, and its next turn after ``said``; with
    that token first unless the turn ``is_closed`` by it.

    Taken from two renderings, so that the tokens that the model drew stay as they are: encoding its text again might
    give others. UserError for a chat format that renders earlier turns otherwise once there are later ones.
    """
    before = tokenizer.render(messages, add_generation_prompt=False).tokens
    after = tokenizer.render([*messages, *said], add_generation_prompt=True).tokens
    end = max((i for i, token in enumerate(before) if token in tokenizer.stop_ids), default=-1) + 1
    if after[: len(before)] != before or not end:
        raise UserError("this chat format changes earlier turns when others follow: episodes can have one turn only")
    return after[end if is_closed else end - 1 :]
