"""The data sets that a config may name: `auto`, `chat`, `instruct`, `completion`, `tokenized`; more in named.py.

    dataset: {_component_: torchft.data.datasets.chat, source: data/train.jsonl, split: "train[:95%]"}
    datasets:                                   # several; without _component_ it is `auto`
      - {source: data/chat.jsonl, weight: 0.7}
      - {source: "data/books#1000", weight: 0.3}

Each function here makes the encoder of its rows, given a first one to tell the format by. Beside its own keywords it
has those of every data set (builder.Reading): source, split, column_map, filters ...; the recipe gives ``tokenizer``
and ``seq_len``.
"""

from functools import partial
from typing import Literal

from torchft.data.builder import builder
from torchft.data.encoders import Encoder, document, ids, prompt_and_answer, rendered
from torchft.data.messages import FORMATS, Values, detect
from torchft.errors import UserError
from torchft.tokenizers.tokenizer import Tokenizer

Format = Literal["auto", "openai", "sharegpt", "alpaca", "prompt_completion", "prompt_answer"]


@builder(splits=True)
def auto(
    tokenizer: Tokenizer,
    example: Values,
    *,
    new_system_prompt: str | None = None,
    system_into_question: bool = False,
    train_on: Literal["assistant", "last", "all"] = "assistant",
) -> Encoder:
    """Whatever the first row's columns say: a conversation in any format, an instruction, raw text, token ids."""
    if "input_ids" in example:
        return ids
    if "text" in example and not any(column in example for column in ("messages", "conversations", "output")):
        return partial(document, tokenizer=tokenizer, add_eos=True)
    found = detect(example)
    if not tokenizer.has_chat and found in ("alpaca", "prompt_completion"):
        return partial(prompt_and_answer, tokenizer=tokenizer, template=None, train_on=train_on)
    how = {"new_system_prompt": new_system_prompt, "system_into_question": system_into_question}
    return rendered(tokenizer, FORMATS[found], train_on=train_on, **how)


@builder
def chat(
    tokenizer: Tokenizer,
    example: Values,
    *,
    format: Format = "auto",
    new_system_prompt: str | None = None,
    system_into_question: bool = False,
    train_on: Literal["assistant", "last", "all"] = "assistant",
) -> Encoder:
    """Conversations in the checkpoint's own chat format.

    Args:
        format: OpenAI messages, ShareGPT, alpaca columns, prompt and completion or answer; "auto": by the first row.
        new_system_prompt: replaces every system message.
        system_into_question: the system message becomes the beginning of the first question, for chat formats that have
            no place for it (Gemma 1 and 2), or put it into the last question alone (Mistral 7B v0.3, Nemo).
        train_on: each assistant turn, the last one, or every token. A message's own "train" (or OpenAI's "weight")
            comes first.
    """
    messages_of = FORMATS[detect(example) if format == "auto" else format]
    how = {"new_system_prompt": new_system_prompt, "system_into_question": system_into_question}
    return rendered(tokenizer, messages_of, train_on=train_on, **how)


@builder
def instruct(
    tokenizer: Tokenizer,
    example: Values,
    *,
    prompt_template: str | None = None,
    new_system_prompt: str | None = None,
    system_into_question: bool = False,
    train_on: Literal["assistant", "all"] = "assistant",
) -> Encoder:
    """One question and one answer per row: columns instruction, input (optional), output; or prompt, completion.

    They become a conversation in the checkpoint's chat format. If it has none, or with ``prompt_template``, they become
    plain text: the template, the answer, the end-of-text token.

    Args:
        prompt_template: text with {column} for any column of the row, for example "Q: {question}\\nA: ".
        train_on: the answer and its end, or the prompt too.
    """
    if prompt_template is None and tokenizer.has_chat:
        messages_of = FORMATS[detect(example)]
        how = {"new_system_prompt": new_system_prompt, "system_into_question": system_into_question}
        return rendered(tokenizer, messages_of, train_on=train_on, **how)
    if new_system_prompt is not None:
        raise UserError("dataset.new_system_prompt: plain text has no system message; write it into prompt_template")
    return partial(prompt_and_answer, tokenizer=tokenizer, template=prompt_template, train_on=train_on)


@builder(splits=True, too_long="split")
def completion(tokenizer: Tokenizer, example: Values, *, add_eos: bool = True) -> Encoder:
    """Raw text: the column "text", every token trained. A .txt file is one document.

    ``too_long: split``, the default here, cuts a long text into pieces of seq_len that overlap by one token: each token
    is trained once.

    Args:
        add_eos: end each text with the end-of-text token.
    """
    return partial(document, tokenizer=tokenizer, add_eos=add_eos)


@builder(splits=True)
def tokenized(tokenizer: Tokenizer, example: Values) -> Encoder:
    """Token ids made elsewhere: "input_ids", perhaps with "labels" (ids at their own place, or -100) or "loss_mask"."""
    return ids
