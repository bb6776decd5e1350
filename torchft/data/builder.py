"""What one entry of a config's data is: where its rows come from and how they become tokens. Nothing is read yet.

`builder` makes a function that a config may name from one that says how a row is encoded; the keywords that all data
sets have are added to its own.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cached_property, partial, wraps
from typing import Any, Literal, get_type_hints

from torchft.data import cache
from torchft.data import filters as filters_of
from torchft.data.collect import collect
from torchft.data.encoders import Encoder
from torchft.data.extents import streamed
from torchft.data.messages import EmptyError, FilteredError, RowError, Values, rename
from torchft.data.samples import Limits, Policy, Samples
from torchft.data.sources import Row, Source, capped, rows
from torchft.errors import UserError
from torchft.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The keywords of every data set."""

    source: str | list[str]  # a .jsonl .json .csv .parquet .txt file, a folder, a glob, a list of these, a Hub name;
    # "name#1000": its first 1000 rows
    split: str = "train"  # validation, test; with a slice in file order if wanted: train[:95%], train[-500:]
    subset: str | None = None  # of a Hub name
    revision: str | None = None  # of a Hub name
    max_rows: int | None = None  # stop after so many
    column_map: dict[str, str] | None = None  # {our column: the data's column}
    filters: dict[str, Any] | None = None  # conditions on the data's columns: torchft/data/filters.py
    deduplicate: bool = False  # leave out a row whose tokens an earlier one has
    too_long: Literal["truncate", "split", "drop", "error"] = "truncate"  # rows of more than seq_len tokens
    empty_rows: Policy = "drop"  # rows whose text is null or blank; dropped ones are counted
    bad_rows: Policy = "error"  # rows that break a rule of their format; errors are reported together
    name: str | None = None  # in reports, instead of the source
    weight: float | None = None  # share of the samples when there are several data sets
    stage: int = 0  # data sets of a lower stage come first


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Pickles, so that worker processes can encode its rows.

    Args:
        builder: the function that a config names; what it wraps makes the encoder.
        own: its own keywords, all of them.
    """

    builder: Callable[..., "Dataset"]
    own: dict[str, Any]
    reading: Reading
    tokenizer: Tokenizer
    seq_len: int

    @property
    def name(self) -> str:
        return self.reading.name or str(self.source)

    @property
    def kind(self) -> str:
        """The full name of its builder."""
        return f"{self.builder.__module__}.{self.builder.__qualname__}"

    @cached_property
    def source(self) -> Source:
        read = self.reading
        path, max_rows = capped(read.source, read.max_rows)
        return Source(path=path, split=read.split, subset=read.subset, revision=read.revision, max_rows=max_rows)

    @property
    def limits(self) -> Limits:
        read = self.reading
        return Limits(
            seq_len=self.seq_len,
            too_long=read.too_long,
            empty_rows=read.empty_rows,
            bad_rows=read.bad_rows,
            deduplicate=read.deduplicate,
        )

    def rows(self, *, streaming: bool = False) -> Iterator[Row]:
        """Every row as it is in the data; ``streaming``: of a Hub name none before it is asked for."""
        return streamed(self.source) if streaming else rows(self.source)

    def example(self, *, streaming: bool = False) -> Values:
        """The first row that says which format the data has."""
        for row in self.rows(streaming=streaming):
            try:
                self.encoder(row.values)
            except (EmptyError, FilteredError):
                continue
            except RowError as e:
                if self.reading.bad_rows == "error":
                    raise UserError(f"{row.origin}:{row.number}: {e}") from None
            else:
                return row.values
        raise UserError(f"{self.name}: nothing to train on: every row is empty, broken or left out by the filters")

    def encoder(self, example: Values) -> Encoder:
        """The step from a row to tokens, which leaves out what the filters do. ``example`` tells the format."""
        prepare = partial(_prepared, filters=self.reading.filters or {}, column_map=self.reading.column_map or {})
        encode = inspect.unwrap(self.builder)(self.tokenizer, prepare(example), **self.own)
        return lambda row: encode(prepare(row))

    def samples(self) -> Samples:
        """All rows tokenised, or read from the cache if an earlier run did."""
        of_tokens = {key: value for key, value in vars(self.reading).items() if key not in ("name", "weight", "stage")}
        return cache.read_or_make(
            [self.kind, of_tokens, self.own, self.seq_len],
            source=self.source,
            is_ours=self.kind.startswith("torchft."),
            tokenizer=self.tokenizer,
            make=lambda: collect(self.rows(), self.encoder(self.example()), self.limits, pad_id=self.tokenizer.pad_id),
        )


Make = Callable[..., Encoder]


def builder(
    make: Make | None = None, *, splits: bool = False, whole: bool = False, **defaults: Any
) -> Callable[..., Any]:
    """``make(tokenizer, example, *, its own) -> Encoder`` as ``(source, *, tokenizer, seq_len, ...) -> Dataset``.

    ``example`` is a row of the data, to tell a format by; EmptyError asks for the next one.

    Args:
        splits: whether ``too_long: split`` is allowed, which cuts text anywhere.
        whole: whether nothing is ever cut, because it would change what is judged: only drop and error are allowed.
        defaults: other defaults of Reading, for example the source.
    """
    if make is None:
        return partial(builder, splits=splits, whole=whole, **defaults)
    own = list(inspect.signature(make).parameters.values())[2:]
    own_names = {parameter.name for parameter in own}

    @wraps(make)
    def build(source: Any = None, *, tokenizer: Tokenizer, seq_len: int, **given: Any) -> Dataset:
        read = {key: value for key, value in given.items() if key not in own_names}
        reading = Reading(**defaults | ({} if source is None else {"source": source}) | read)
        if reading.too_long == "split" and not splits:
            raise UserError("dataset.too_long: only raw text is split; a conversation is cut at its end, or dropped")
        if reading.too_long in ("split", "truncate") and whole:
            raise UserError(
                "dataset.too_long: an answer that is judged is never cut; drop or error, and a longer seq_len"
            )
        filters_of.check(reading.filters or {})
        keywords = {p.name: p.default for p in own} | {key: given[key] for key in own_names & given.keys()}
        return Dataset(builder=build, own=keywords, reading=reading, tokenizer=tokenizer, seq_len=seq_len)

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("tokenizer", "seq_len")]
    for field in fields(Reading):
        default = defaults.get(field.name, inspect.Parameter.empty if field.default is MISSING else field.default)
        parameters.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default))
    types = get_type_hints(Reading, include_extras=True) | get_type_hints(make, include_extras=True)
    signature = inspect.Signature([*parameters, *own])
    vars(build).update(
        __signature__=signature, __annotations__={name: types.get(name, Any) for name in signature.parameters}
    )
    return build


def _prepared(row: Values, *, filters: Mapping[str, Any], column_map: Mapping[str, str]) -> Values:
    if not filters_of.passes(row, filters):
        raise FilteredError("left out by the filters")
    return rename(row, column_map) if column_map else row
