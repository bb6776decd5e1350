"""The data sets that a config may name: `chat`, `instruct`, `completion`.

    dataset: {_component_: torchft.data.datasets.chat, source: data/train.jsonl, split: "train[:95%]"}

Each is source -> rows -> messages or text -> tokens with a mask -> samples. Their keywords are a config's keys, hence
many and flat; the recipe supplies ``tokenizer`` and ``seq_len``. What they share:

    source      a .jsonl .json .csv .parquet .txt file, a folder or a glob of them, a list of these, or a Hub name
    split       train, validation ..., with a slice in file order if wanted: train[:95%], train[-500:]
    subset, revision    of a Hub name
    max_rows    stop after so many rows
    column_map  {our column: the data's column}
    too_long    rows of more than seq_len tokens: truncate, drop, error; split (only raw text)
    empty_rows  rows whose text is null or blank: drop (counted) or error
    bad_rows    rows that break a rule of their format: error (reported together) or drop (counted)
"""

from typing import Literal

from torchft.data.cache import cached
from torchft.data.encoders import conversation, document, prompt_and_answer
from torchft.data.samples import Limits, Policy, Samples, collect
from torchft.data.sources import Source, rows
from torchft.errors import UserError
from torchft.tokenizers.tokenizer import Tokenizer


@cached
def chat(
    source: str | list[str],
    *,
    tokenizer: Tokenizer,
    seq_len: int,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    max_rows: int | None = None,
    format: Literal["auto", "openai", "sharegpt", "alpaca", "prompt_completion"] = "auto",
    column_map: dict[str, str] | None = None,
    new_system_prompt: str | None = None,
    train_on: Literal["assistant", "last", "all"] = "assistant",
    too_long: Literal["truncate", "drop", "error"] = "truncate",
    empty_rows: Policy = "drop",
    bad_rows: Policy = "error",
) -> Samples:
    """Conversations in the checkpoint's own chat format.

    Args:
        format: OpenAI messages, ShareGPT, alpaca columns, or prompt and completion; "auto" looks at the first row.
        new_system_prompt: replaces every system message.
        train_on: each assistant turn, the last one, or every token. A message's own "train" (or OpenAI's "weight")
            comes first.
    """
    if not tokenizer.has_chat:
        raise UserError(
            "dataset: this checkpoint has no chat template. Start from an instruct checkpoint, or use "
            "torchft.data.datasets.instruct, which needs none"
        )
    encode = conversation(tokenizer, format, column_map or {}, train_on=train_on, new_system_prompt=new_system_prompt)
    read = Source(path=source, split=split, subset=subset, revision=revision, max_rows=max_rows)
    limits = Limits(seq_len=seq_len, too_long=too_long, empty_rows=empty_rows, bad_rows=bad_rows)
    return collect(rows(read), encode, limits, pad_id=tokenizer.pad_id)


@cached
def instruct(
    source: str | list[str],
    *,
    tokenizer: Tokenizer,
    seq_len: int,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    max_rows: int | None = None,
    column_map: dict[str, str] | None = None,
    prompt_template: str | None = None,
    new_system_prompt: str | None = None,
    train_on: Literal["assistant", "all"] = "assistant",
    too_long: Literal["truncate", "drop", "error"] = "truncate",
    empty_rows: Policy = "drop",
    bad_rows: Policy = "error",
) -> Samples:
    """One question and one answer per row: columns instruction, input (optional), output; or prompt, completion.

    They become a conversation in the checkpoint's chat format. If it has none, or with ``prompt_template``, they become
    plain text: the template, the answer, the end-of-text token.

    Args:
        prompt_template: text with {column} for any column of the row, for example "Q: {question}\\nA: ".
        train_on: the answer and its end, or the prompt too.
    """
    if prompt_template is None and tokenizer.has_chat:
        encode = conversation(
            tokenizer, "auto", column_map or {}, train_on=train_on, new_system_prompt=new_system_prompt
        )
    elif new_system_prompt is not None:
        raise UserError("dataset.new_system_prompt: plain text has no system message; write it into prompt_template")
    else:
        encode = prompt_and_answer(tokenizer, prompt_template, column_map or {}, train_on=train_on)
    read = Source(path=source, split=split, subset=subset, revision=revision, max_rows=max_rows)
    limits = Limits(seq_len=seq_len, too_long=too_long, empty_rows=empty_rows, bad_rows=bad_rows)
    return collect(rows(read), encode, limits, pad_id=tokenizer.pad_id)


@cached
def completion(
    source: str | list[str],
    *,
    tokenizer: Tokenizer,
    seq_len: int,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    max_rows: int | None = None,
    column_map: dict[str, str] | None = None,
    add_eos: bool = True,
    too_long: Literal["split", "truncate", "drop", "error"] = "split",
    empty_rows: Policy = "drop",
    bad_rows: Policy = "error",
) -> Samples:
    """Raw text: the column "text", every token trained. A .txt file is one document.

    Args:
        add_eos: end each text with the end-of-text token.
        too_long: split cuts a long text into pieces of seq_len that overlap by one token: each token is trained once.
    """
    encode = document(tokenizer, column_map or {}, add_eos=add_eos)
    read = Source(path=source, split=split, subset=subset, revision=revision, max_rows=max_rows)
    limits = Limits(seq_len=seq_len, too_long=too_long, empty_rows=empty_rows, bad_rows=bad_rows)
    return collect(rows(read), encode, limits, pad_id=tokenizer.pad_id)
