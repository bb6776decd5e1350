"""Exact match: the share of held-out questions that a model answers word for word, by real decoding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from torchft.config import Range
from torchft.generation.greedy import generate
from torchft.modules.decoder import Decoder
from torchft.modules.sharded import gathered
from torchft.ranks import gather, num_ranks, rank
from torchft.tokenizers.chat import Message
from torchft.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ExamConfig:
    """The ``exact_match:`` section of `evaluate`: held-out conversations whose last answer is decoded and compared."""

    source: str  # as a dataset's source
    max_rows: Annotated[int, Range(min=1)] | None = None  # null: all
    max_new_tokens: Annotated[int, Range(min=1)] = 64  # longer answers are cut, and count as wrong
    batch_size: Annotated[int, Range(min=1)] = 64  # conversations decoded together


@dataclass(frozen=True, kw_only=True)
class ExactMatchConfig(ExamConfig):
    """That of a training recipe, which does not stop for long to ask."""

    max_rows: Annotated[int, Range(min=1)] = 200


@dataclass(frozen=True, kw_only=True)
class Answer:
    question: str  # the last message before the answer
    want: str
    got: str
    num_tokens: int  # of the conversation and the answer that was decoded
    is_cut: bool  # at max_new_tokens

    @property
    def is_right(self) -> bool:
        return self.got.strip() == self.want.strip()


def answer_all(
    model: Decoder, tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]], limits: ExamConfig
) -> list[Answer]:
    """Decode greedily what ``model`` says in place of the last message of each conversation."""
    answers = []
    for start in range(0, len(conversations), limits.batch_size):
        batch = conversations[start : start + limits.batch_size]
        prompts = [tokenizer.render(c[:-1], add_generation_prompt=True).tokens for c in batch]
        replies = generate(model, prompts, max_new_tokens=limits.max_new_tokens, stop_ids=tokenizer.stop_ids)
        answers += [
            Answer(
                question=c[-2]["content"],
                want=c[-1]["content"],
                got=tokenizer.decode(reply),
                num_tokens=len(prompt) + len(reply),
                is_cut=len(reply) == limits.max_new_tokens,  # what a stop token ended is shorter, without it
            )
            for c, prompt, reply in zip(batch, prompts, replies)
        ]
    return answers


def answer_among_ranks(
    model: Decoder,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    limits: ExamConfig,
    *,
    tp: int = 1,
) -> list[Answer]:
    """All ranks, each ``tp`` of them with a whole model: `answer_all`, of which they answer a part and hear of all."""
    count = num_ranks() // tp
    own = answer_all(model, tokenizer, conversations[rank() // tp :: count], limits)
    found = gather(own)[::tp]
    return [found[i % count][i // count] for i in range(len(conversations))]


def answer_sharded(
    model: Decoder,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    limits: ExamConfig,
    *,
    tp: int,
    fits: bool,
) -> list[Answer]:
    """All ranks, of a model that FSDP2 shards: `answer_among_ranks`, if it ``fits`` as a whole on each ``tp`` of them.
    Otherwise all answer everything, in step, as a block is gathered on all at once."""
    if not fits:
        return answer_all(model, tokenizer, conversations, limits)
    with gathered(model):
        return answer_among_ranks(model, tokenizer, conversations, limits, tp=tp)


def share_right(answers: Sequence[Answer]) -> float:
    """0 to 1."""
    return sum(a.is_right for a in answers) / len(answers)


def side_by_side(
    before: Sequence[Answer], after: Sequence[Answer], *, limit: int = 5
) -> list[tuple[str, str, str, str]]:
    """(question, wanted answer, before, after) of the first few; nothing under before if it was not measured."""
    old = [a.got for a in before] or [""] * len(after)
    return [(a.question, a.want, b, a.got) for b, a in zip(old, after)][:limit]
