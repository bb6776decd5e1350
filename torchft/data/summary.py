"""What a data set holds, for the first panel, and the reasons to refuse it before a run starts."""

from dataclasses import dataclass
from pathlib import Path

import torch

from torchft.data.samples import Samples
from torchft.data.stream import Stream
from torchft.errors import UserError
from torchft.losses.likelihood import IGNORE


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one data set of several adds."""

    name: str
    samples: int
    tokens: int
    supervised: int
    weight: float | None
    stage: int
    of_all: float  # of the tokens of all data sets as they are mixed


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Counts of one data set. Tokens are tokens of the samples, without padding."""

    rows: int
    samples: int
    tokens: int
    supervised: int  # tokens that are trained
    longest: int  # tokens of the longest row, before it was cut
    seq_len: int
    truncated: int  # rows that lost their end at seq_len
    split: int  # rows that became several samples
    dropped: dict[str, int]  # reason -> rows
    notes: dict[str, int]  # what is odd -> rows
    max_id: int  # highest token id
    cache: Path | None = None  # the file that the tokens were read from instead of being made
    sources: tuple[Share, ...] = ()  # of each of several data sets
    is_probe: bool = False  # only the first rows of a stream

    @property
    def supervised_share(self) -> float:
        """Supervised tokens / tokens."""
        return self.supervised / self.tokens if self.tokens else 0.0

    def lines(self) -> list[str]:
        """A few lines for people."""
        what = "a stream; its first " if self.is_probe else ""
        out = [
            f"{what}{self.rows:,} rows -> {self.samples:,} samples, {self.tokens:,} tokens",
            f"{self.supervised:,} tokens supervised ({self.supervised_share:.1%})",
            f"longest row {self.longest:,} tokens (seq_len {self.seq_len:,})",
        ]
        out += self.warnings()
        for share in self.sources:
            weight = f"weight {share.weight:g}, " if share.weight is not None else ""
            stage = f"stage {share.stage}, " if len({s.stage for s in self.sources}) > 1 else ""
            part = f", {share.of_all:.1%} of what is trained on" if len({s.stage for s in self.sources}) == 1 else ""
            out.append(f"  {share.name}: {stage}{weight}{share.samples:,} samples, {share.tokens:,} tokens{part}")
        if self.cache:
            out.append(f"tokenised by an earlier run ({self.cache.parent})")
        return out

    def warnings(self) -> list[str]:
        """What was lost on the way, or is odd."""
        rows = max(self.rows, 1)
        out = []
        if self.truncated:
            out.append(f"{self.truncated:,} rows truncated to seq_len ({self.truncated / rows:.1%})")
        if self.split:
            out.append(f"{self.split:,} rows cut into pieces of seq_len ({self.split / rows:.1%})")
        out += [f"{n:,} rows dropped ({n / rows:.1%}): {reason}" for reason, n in sorted(self.dropped.items())]
        out += [f"{n:,} rows {note}" for note, n in sorted(self.notes.items())]
        return out

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def check(self, *, vocab_size: int, batch_size: int) -> None:
        """UserError with every reason not to train on this.

        Args:
            vocab_size: rows of the model's embedding.
        """
        problems = []
        if not self.supervised:
            why = "; ".join(f"{n:,} rows {reason}" for reason, n in self.dropped.items()) or "every row is empty"
            problems.append(f"nothing to train on: none of {self.rows:,} rows has a supervised token ({why})")
        elif self.samples < batch_size and not self.is_probe:
            ways = "lower batch_size or add data"
            problems.append(f"batch_size {batch_size} is more than the {self.samples} samples of an epoch; {ways}")
        if self.max_id >= vocab_size:
            problems.append(
                f"token id {self.max_id} is outside the model's {vocab_size} embedding rows: "
                "tokenizer and weights do not belong together; use one checkpoint's own files"
            )
        if problems:
            raise UserError(*(f"dataset: {p}" for p in problems))


def summarise(data: Samples | Stream) -> Summary:
    """Count what ``data`` holds; of a stream, its first rows."""
    samples = data.probe if isinstance(data, Stream) else data
    counts, starts = samples.counts, samples.starts
    tokens = torch.frombuffer(samples.tokens, dtype=torch.int32) if samples.tokens else torch.zeros(0)
    trained = torch.frombuffer(samples.labels, dtype=torch.int32) != IGNORE if samples.tokens else torch.zeros(0)
    sizes = [part.stop - part.start for part in samples.parts]
    tokens_of = [starts[part.stop] - starts[part.start] for part in samples.parts]
    mixed = [  # tokens, as many as the weights take
        n if part.weight is None else part.weight * n / max(size, 1)
        for part, n, size in zip(samples.parts, tokens_of, sizes)
    ]
    shares = tuple(
        Share(
            name=part.name,
            samples=size,
            tokens=n,
            supervised=int(trained[starts[part.start] : starts[part.stop]].sum()),
            weight=part.weight,
            stage=part.stage,
            of_all=share / max(sum(mixed), 1e-9),
        )
        for part, size, n, share in zip(samples.parts, sizes, tokens_of, mixed)
    )
    return Summary(
        rows=counts.rows,
        samples=len(samples),
        tokens=len(tokens),
        supervised=int(trained.sum()),
        longest=counts.longest,
        seq_len=samples.seq_len,
        truncated=counts.truncated,
        split=counts.split,
        dropped=dict(counts.dropped),
        notes=dict(counts.notes),
        max_id=int(tokens.max()) if len(tokens) else -1,
        cache=samples.cache,
        sources=shares if len(shares) > 1 else (),
        is_probe=isinstance(data, Stream),
    )
