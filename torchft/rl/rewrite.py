"""Batches whose last answers a model writes anew: the student itself, as in GKD (https://arxiv.org/abs/2306.13649), or
its teacher, as in sequence-level distillation (https://arxiv.org/abs/1606.07947)."""

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch

from torchft.config import Range
from torchft.data.batch import Batch
from torchft.data.loader import Loader
from torchft.data.mixture import generator_of
from torchft.data.samples import Sample, Samples, shift
from torchft.errors import UserError
from torchft.generation.loaded import engine
from torchft.generation.requests import Completion, Request
from torchft.generation.sampling import Sampling
from torchft.losses.likelihood import IGNORE
from torchft.modules.decoder import Decoder
from torchft.modules.sharded import gathered
from torchft.ranks import gather
from torchft.tokenizers.tokenizer import Tokenizer
from torchft.training.distributed import World
from torchft.training.metrics import Row

Author = Literal["data", "student", "teacher"]


@dataclass(frozen=True, kw_only=True)
class RewriteConfig:
    """The ``rewrite:`` section of a config: which steps learn from answers that are written anew, and how."""

    student_share: Annotated[float, Range(min=0, max=1)] = 0.0  # of steps with the student's answers: GKD's lambda
    teacher_share: Annotated[float, Range(min=0, max=1)] = 0.0  # of steps with the teacher's
    sampling: Sampling = field(default_factory=Sampling)
    num_slots: Annotated[int, Range(min=1)] = 64  # answers that a device computes together

    @property
    def is_asked(self) -> bool:
        return self.student_share + self.teacher_share > 0

    def problems(self) -> Iterator[str]:
        """For a recipe's ``conflicts``."""
        if self.student_share + self.teacher_share > 1:
            yield "rewrite: student_share and teacher_share are of the same steps, so together at most 1"


class Writers:
    """All ranks make one, and call it alike; each rewrites its own rows, with whole weights meanwhile.

    What is drawn is decided by the seed, the step and the sample: there is no generator whose state would have to be
    saved.

    Args:
        samples: of the run's data, which say how long rows are and what pads them.
        batches: how rows are made of samples, as for Loader: batch_size, seed, packed, one_shape.
    """

    def __init__(
        self,
        config: RewriteConfig,
        student: Decoder,
        teacher: Decoder,
        tokenizer: Tokenizer,
        *,
        samples: Samples,
        batches: Mapping[str, Any],
        world: World,
    ) -> None:
        self._config, self._tokenizer, self._world = config, tokenizer, world
        asked = {"student": (student, config.student_share), "teacher": (teacher, config.teacher_share)}
        self._models = {name: model for name, (model, share) in asked.items() if share}
        self._seq_len, self._pad_id = samples.seq_len, samples.pad_id
        self._batches = {**batches, "rank": 0, "num_ranks": 1, "shuffle": False}
        self._seen = Counter[str]()  # since the last row
        self._seconds = 0.0

    @property
    def student_writes(self) -> bool:
        return self._config.student_share > 0

    def author(self, step: int) -> Author:
        """Who writes the answers of a step: drawn by the seed, alike on all ranks."""
        drawn = float(torch.rand((), generator=generator_of(self._batches["seed"], "author", step)))
        if drawn < self._config.student_share:
            return "student"
        return "teacher" if drawn < self._config.student_share + self._config.teacher_share else "data"

    def rewrite(self, author: Author, window: Sequence[Batch], *, step: int) -> list[Batch]:
        """All ranks: ``window`` with the answers of ``author``. Only they are learned.

        As many batches on every rank, which need not be as many as before: other answers have other lengths.
        """
        if author == "data":
            return list(window)
        began = time.perf_counter()
        found, completions = self._rewritten(author, window, key=step)
        self._seconds += time.perf_counter() - began
        for completion in completions:
            self._seen += Counter({"answers": 1, "tokens": len(completion.tokens), f"ended/{completion.finish}": 1})
        return found

    def held_out(self, batches: Sequence[Batch]) -> list[Batch]:
        """All ranks: held-out ``batches`` with the answers of the student, from the same seeds each time."""
        return self._rewritten("student", batches, key="held out")[0]

    def row(self) -> Row:
        """All ranks: tokens of an answer, and how those ended that did not by themselves, since the last row."""
        total = sum((Counter(own) for own in gather(dict(self._seen))), Counter[str]())
        self._seen.clear()
        if not total:
            return {}
        ends = [name for name in sorted(total) if name.startswith("ended/") and name != "ended/stop"]
        row: Row = {"response_tokens": total["tokens"] / total["answers"], "rollout_s": self._seconds}
        self._seconds = 0.0
        return row | {name: total[name] / total["answers"] for name in ends}

    def _rewritten(
        self, author: Author, window: Sequence[Batch], *, key: int | str
    ) -> tuple[list[Batch], list[Completion]]:
        questions = [question for batch in window for question in last_questions(batch)]
        numbers = [number for batch in window for number in batch.samples]
        completions = self._complete(author, questions, seeds=[self._seed(key, number) for number in numbers])
        rewritten = Samples(seq_len=self._seq_len, pad_id=self._pad_id)
        places = [place.rpartition(":") for batch in window for place in batch.where]
        for question, completion, (origin, _, row) in zip(questions, completions, places, strict=True):
            learned = [False] * len(question) + [True] * len(completion.tokens)
            rewritten.append(shift(question + completion.tokens, learned), origin=origin, number=int(row))
        found = self._as_batches(rewritten)
        if not any(batch.all_supervised for batch in found):
            raise UserError(f"rewrite: no answer of the {author} has a token (step {key}): its logits are not finite")
        return found, completions

    def _complete(self, author: Author, questions: list[list[int]], *, seeds: list[int]) -> list[Completion]:
        """This rank's; the memory that it took is freed."""
        model, how = self._models[author], self._config.sampling
        requests = [Request(prompt=q, sampling=how, seed=seed) for q, seed in zip(questions, seeds, strict=True)]
        longest = max(map(len, questions), default=0) + how.max_new_tokens
        slots, max_len = min(self._config.num_slots, len(requests)), min(self._seq_len, longest)
        with gathered(model):
            if not requests:
                return []
            return engine(model, self._tokenizer, num_slots=slots, max_len=max_len).complete(requests)

    def _as_batches(self, samples: Samples) -> list[Batch]:
        own = list(Loader(samples, **self._batches)) if len(samples) else []
        counts = gather([batch.num_supervised for batch in own])  # by rank, by batch
        most = max(map(len, counts))
        nothing = Samples(seq_len=self._seq_len, pad_id=self._pad_id)  # for a rank that has fewer than others
        nothing.append(Sample(tokens=[self._pad_id] * 2, labels=[IGNORE] * 2), origin="", number=0)
        for _ in range(most - len(own)):
            own.append(replace(next(iter(Loader(nothing, **self._batches))), where=()))
        totals = [sum(count[i] for count in counts if i < len(count)) for i in range(most)]
        made = [replace(batch, all_supervised=total) for batch, total in zip(own, totals, strict=True)]
        return [batch.to(self._world.device) for batch in made]

    def _seed(self, key: int | str, sample: int) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._batches['seed']}/{key}/{sample}".encode()).digest()[:7])


def last_questions(batch: Batch) -> list[list[int]]:
    """Of each sample the tokens before its last answer, the last of its labels that stand together; of plain text its
    first token."""
    s = batch.tokens.shape[1]
    starts = list(range(0, batch.tokens.numel(), s))
    if batch.positions is not None:
        starts = (batch.positions == 0).flatten().nonzero()[:, 0].tolist()
    tokens, learned = batch.tokens.flatten().tolist(), (batch.labels != IGNORE).flatten().tolist()
    found = []
    for (document,), length in zip(batch.documents_of.tolist(), batch.lengths, strict=True):
        at = starts[document]
        end = max(i for i in range(at, at + length) if learned[i])
        while end > at and learned[end - 1]:
            end -= 1
        found.append(tokens[at : end + 1])
    return found
