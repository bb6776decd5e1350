"""Well-known data sets by name: what a row of each looks like, as messages. Defaults are their Hub names.

    dataset: {_component_: torchft.data.named.gsm8k, split: "train[:95%]"}
    dataset: {_component_: torchft.data.named.alpaca, source: my_rows_of_that_form.jsonl}

Each has the keywords of every data set, and ``new_system_prompt`` and ``train_on`` as `datasets.chat` has them.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torchft.data import messages as formats
from torchft.data.builder import Dataset, builder
from torchft.data.encoders import Encoder, document, rendered
from torchft.data.messages import Message, RowError, Values, is_null, text
from torchft.tokenizers.tokenizer import Tokenizer


def named(**defaults: Any) -> Callable[[Callable[[Values], list[Message]]], Callable[..., Dataset]]:
    """A data set of conversations whose rows the decorated function turns into messages."""

    def decorate(messages_of: Callable[[Values], list[Message]]) -> Callable[..., Dataset]:
        def make(
            tokenizer: Tokenizer,
            example: Values,
            *,
            new_system_prompt: str | None = None,
            system_into_question: bool = False,
            train_on: Literal["assistant", "last", "all"] = "assistant",
        ) -> Encoder:
            how = {"new_system_prompt": new_system_prompt, "system_into_question": system_into_question}
            return rendered(tokenizer, messages_of, train_on=train_on, **how)

        for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(make, attribute, getattr(messages_of, attribute))
        built: Callable[..., Dataset] = builder(make, **defaults)
        return built

    return decorate


def exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@named(source="tatsu-lab/alpaca")
def alpaca(row: Values) -> list[Message]:
    """{"instruction", "input", "output"}; ``source: yahma/alpaca-cleaned`` has fewer mistakes."""
    return formats.alpaca(row)


@named(source="Open-Orca/SlimOrca-Dedup")
def slimorca(row: Values) -> list[Message]:
    """{"conversations": [{"from", "value"}]}: system prompts and GPT-4's answers to FLAN's questions."""
    return formats.sharegpt(row)


@named(source="teknium/OpenHermes-2.5")
def openhermes(row: Values) -> list[Message]:
    """{"conversations": [{"from", "value"}], "system_prompt"}."""
    messages = formats.sharegpt(row)
    if is_null(row.get("system_prompt")) or messages[0]["role"] == "system":
        return messages
    return formats.with_system(messages, row["system_prompt"])


@named(source="HuggingFaceH4/ultrachat_200k", split="train_sft")
def ultrachat(row: Values) -> list[Message]:
    """{"prompt", "prompt_id", "messages"}; held out is ``split: test_sft``."""
    return formats.openai({"messages": row.get("messages")})


@named(source="allenai/tulu-3-sft-mixture")
def tulu3(row: Values) -> list[Message]:
    """{"id", "messages", "source"}."""
    return formats.openai({"messages": row.get("messages")})


@named(source="openai/gsm8k", subset="main")
def gsm8k(row: Values) -> list[Message]:
    """{"question", "answer"}: the working, with <<6*7=42>> for a calculator, which is taken out, then "#### 42"."""
    return exchange(text(row, "question"), re.sub(r"<<[^>]*>>", "", text(row, "answer")))


@named(source="Anthropic/hh-rlhf")
def hh_rlhf(row: Values) -> list[Message]:
    """{"chosen", "rejected"}: dialogues as one text each, "\\n\\nHuman: ...\\n\\nAssistant: ..."; the chosen one."""
    return transcript(text(row, "chosen"))


@named(source="HuggingFaceH4/ultrafeedback_binarized", split="train_sft")
def ultrafeedback(row: Values) -> list[Message]:
    """{"prompt", "chosen": [messages], "rejected": [messages], "score_chosen" ...}; the chosen one."""
    return formats.openai({"messages": row.get("chosen")})


@named(source="lvwerra/stack-exchange-paired", subset="data/finetune")
def stack_exchange(row: Values) -> list[Message]:
    """{"question", "response_j" (the better one), "response_k"}; pairs are in ``subset: data/rl``."""
    return exchange(text(row, "question"), text(row, "response_j"))


@named(source="abisee/cnn_dailymail", subset="3.0.0")
def cnn_dailymail(row: Values) -> list[Message]:
    """{"article", "highlights"}: a summary. The articles alone: datasets.completion, column_map: {text: article}."""
    return exchange(f"Summarize this article in a few sentences.\n\n{text(row, 'article')}", text(row, "highlights"))


@named(source="knkarthick/samsum")
def samsum(row: Values) -> list[Message]:
    """{"dialogue", "summary"}: chats between friends."""
    return exchange(f"Summarize this conversation.\n\n{text(row, 'dialogue')}", text(row, "summary"))


@named(source="liweili/c4_200m")
def grammar(row: Values) -> list[Message]:
    """{"input", "output"}: a sentence with mistakes, and without."""
    return exchange(f"Correct this sentence.\n\n{text(row, 'input')}", text(row, "output"))


@named(source="HuggingFaceM4/the_cauldron", subset="ai2d")
def the_cauldron(row: Values) -> list[Message]:
    """{"images": [...], "texts": [{"user", "assistant", "source"}]}: questions about the images, one per turn."""
    turns, images = row.get("texts"), row.get("images") or []
    if not isinstance(turns, list) or not turns:
        raise RowError(f"'texts' must be a list of {{user, assistant}}, found {turns!r:.60}")
    messages = [m for turn in turns for m in exchange(text(turn, "user"), text(turn, "assistant"))]
    messages[0]["content"] = [{"type": "image", "image": image} for image in images] + _text_parts(
        messages[0]["content"]
    )
    return messages


@named(source="liuhaotian/LLaVA-Instruct-150K")
def llava_instruct(row: Values) -> list[Message]:
    """{"image": file name, "conversations": [{"from", "value"}]} with "<image>" where the image stands."""
    messages = formats.sharegpt(row)
    for message in messages:
        before, mark, after = message["content"].partition("<image>")
        if mark:
            image = [{"type": "image", "image": text(row, "image")}]
            message["content"] = _text_parts(before.strip()) + image + _text_parts(after.strip())
    return messages


@builder(splits=True, too_long="split", source="Salesforce/wikitext", subset="wikitext-103-raw-v1")
def wikitext(tokenizer: Tokenizer, example: Values) -> Encoder:
    """{"text"}: Wikipedia's good articles, a paragraph per row."""
    return partial(document, tokenizer=tokenizer, add_eos=True)


def transcript(dialogue: str) -> list[Message]:
    """ "\\n\\nHuman: ...\\n\\nAssistant: ..." as messages."""
    parts = re.split(r"\n\n(Human|Assistant): ?", dialogue)
    if parts[0].strip() or len(parts) < 3:
        raise RowError(f"expected '\\n\\nHuman: ...\\n\\nAssistant: ...', found {dialogue!r:.60}")
    roles = {"Human": "user", "Assistant": "assistant"}
    messages: list[Message] = []
    for speaker, said in zip(parts[1::2], parts[2::2]):
        role, content = roles[speaker], said.strip()
        if messages and messages[-1]["role"] == role:  # some turns hold such a line themselves
            messages[-1]["content"] += f"\n\n{content}"
        else:
            messages.append({"role": role, "content": content})
    return messages


def _text_parts(content: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if content else []
