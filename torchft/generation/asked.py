"""What a body in OpenAI's form asks the engine for. What cannot be done is refused by name, never passed over.

https://platform.openai.com/docs/api-reference/chat/create and .../completions/create
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torchft.config import Range
from torchft.errors import UserError
from torchft.generation.requests import Request
from torchft.generation.sampling import Sampling, sampling_of
from torchft.names import nearest
from torchft.tokenizers.tokenizer import Tokenizer

Json = dict[str, Any]

MAX_CHOICES = 2048  # of a request, of all its prompts
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
COLDEST = 1e-5  # temperatures below it are 0: logits divided by less are not finite in fp32
# What is not done, and the values that ask for nothing.
NEUTRAL: Mapping[str, Sequence[Any]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "parallel_tool_calls": (True,),
}
# What is read; and what changes no answer.
READ = {
    "messages", "prompt", "n", "seed", "stream", "stream_options", "logprobs", "best_of", "stop", "max_tokens",
    "max_completion_tokens", "top_k", "tools", "tool_choice", *NUMBERS,
}  # fmt: skip
HARMLESS = {"model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
INSTEAD = {"frequency_penalty": "; repetition_penalty is", "presence_penalty": "; repetition_penalty is",
           "functions": "; tools are", "function_call": "; tools are"}  # fmt: skip
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Refused(Exception):
    """A request that cannot be answered, with its HTTP status. ``param``: the field that is to blame."""

    def __init__(self, message: str, status: int = 400, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


@dataclass(frozen=True, kw_only=True)
class Asked:
    """``requests``: one for each choice, ``n`` for each prompt, in their order."""

    requests: list[Request]
    num_prompt_tokens: int
    is_streamed: bool
    with_usage: bool  # at the end of a stream; else it is always told
    with_logps: bool


def parse(raw: bytes | bytearray) -> Json:
    """The object in a body. Refused for what is none, and for NaN and Infinity, which JSON does not know."""

    def no_number(word: str) -> NoReturn:
        raise ValueError(f"{word} is no number there")

    try:
        body = json.loads(raw, parse_constant=no_number)
    except ValueError as e:
        raise Refused(f"the request is not JSON: {e}") from None
    except RecursionError:
        raise Refused("the request is nested too deep") from None
    if not isinstance(body, dict):
        raise Refused("the request must be a JSON object")
    return body


def asked(body: Json, tokenizer: Tokenizer, *, max_len: int, vocab_size: int, is_chat: bool) -> Asked:
    """What ``body`` asks of an engine of ``max_len`` tokens per slot and a model with ``vocab_size`` embeddings."""
    _check_neutral(body)
    options = _value(body, "stream_options", dict, "an object") or {}
    n = _whole(body, "n", Range(min=1, max=128)) or 1
    seed = _whole(body, "seed", Range())
    sampling = _sampling(body, max_len)
    if is_chat:
        with_logps = bool(_value(body, "logprobs", bool, "true or false"))
        found = [_conversation(body, tokenizer)]
    else:
        number = _whole(body, "logprobs", Range(min=0))
        if number is not None and number > 1:
            raise Refused("logprobs: only those of the chosen tokens are given, for 0 or 1", param="logprobs")
        if (best_of := _whole(body, "best_of", Range(min=1))) is not None and best_of != n:
            raise Refused("best_of is not available; n is", param="best_of")
        with_logps = number is not None
        found = _prompts(body, tokenizer)
    name = "messages" if is_chat else "prompt"
    if len(found) * n > MAX_CHOICES:
        raise Refused(f"{len(found)} prompts with n={n} are more than {MAX_CHOICES} choices", param=name)
    for i, prompt in enumerate(found):
        which = f"prompt {i}" if len(found) > 1 else "the prompt"
        if not 0 < len(prompt) < max_len:
            raise Refused(f"{which} has {len(prompt)} tokens; between 1 and {max_len - 1} fit", param=name)
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < vocab_size)
            raise Refused(f"{which} has the token {wrong}; the model's lie between 0 and {vocab_size - 1}", param=name)
    first = secrets.randbits(62) if seed is None else seed
    prompts = [prompt for prompt in found for _ in range(n)]
    return Asked(
        requests=[
            Request(prompt=prompt, sampling=sampling, seed=(first + (i << 32)) % 2**63, is_streamed=True)
            for i, prompt in enumerate(prompts)
        ],
        num_prompt_tokens=sum(map(len, found)),
        is_streamed=bool(_value(body, "stream", bool, "true or false")),
        with_usage=bool(_value(options, "include_usage", bool, "true or false")),
        with_logps=with_logps,
    )


def _check_neutral(body: Json) -> None:
    for name, value in body.items():
        if value is not None and name not in READ | HARMLESS | NEUTRAL.keys():
            raise Refused(f"{name!r:.80} is not available{nearest(name, READ)}; leave it out", param=name)
    for name, nothing in NEUTRAL.items():
        value = body.get(name)
        if value is not None and not any(
            value == x and isinstance(value, bool) == isinstance(x, bool) for x in nothing
        ):
            raise Refused(f"{name} is not available{INSTEAD.get(name, '')}; leave it out", param=name)


def _sampling(body: Json, max_len: int) -> Sampling:
    settings: dict[str, Any] = {}
    for name in NUMBERS:
        if (value := _value(body, name, (int, float), "a number")) is not None:
            if not -1e38 < value < 1e38:  # fp32's, which an integer of JSON may be far above, too
                raise Refused(f"{name}: {value!s:.20} is out of every range", param=name)
            settings[name] = value
    if 0 < settings.get("temperature", 0) < COLDEST:
        settings["temperature"] = 0.0
    if (top_k := _whole(body, "top_k", Range(min=1))) is not None:
        settings["top_k"] = min(top_k, 2**31)
    most = [_whole(body, name, Range(min=1)) for name in ("max_completion_tokens", "max_tokens")]
    settings["max_new_tokens"] = next((number for number in most if number is not None), max_len)
    stop = body.get("stop") or []
    settings["stop"] = [stop] if isinstance(stop, str) else stop
    if not isinstance(settings["stop"], list) or not all(_is_text(x) and x for x in settings["stop"]):
        raise Refused("stop: a text, or a list of texts, none of them empty", param="stop")
    try:
        return sampling_of(settings)
    except UserError as e:
        raise Refused("; ".join(e.problems), param=e.problems[0].partition(":")[0]) from None


def _prompts(body: Json, tokenizer: Tokenizer) -> list[list[int]]:
    """Of ``prompt``: a text, several, token ids, or several lists of these."""
    prompt = body.get("prompt")
    prompts: list[Any] = prompt if isinstance(prompt, list) else [prompt]
    if prompts and all(type(token) is int for token in prompts):
        return [prompts]
    if prompts and all(isinstance(one, list) and all(type(token) is int for token in one) for one in prompts):
        return prompts
    if not prompts or not all(map(_is_text, prompts)):
        raise Refused("prompt: a text, a list of texts, token ids or a list of lists of token ids", param="prompt")
    return [tokenizer.encode(one, add_special_tokens=True) for one in prompts]


def _conversation(body: Json, tokenizer: Tokenizer) -> list[int]:
    messages = _value(body, "messages", list, "a list of {role, content} objects")
    if messages is None:
        raise Refused("messages: a list of {role, content} objects is needed", param="messages")
    for i, message in enumerate(messages):
        _check_message(i, message)
    tools = _value(body, "tools", list, "a list") or None
    for i, tool in enumerate(tools or []):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(f"tools: number {i} is no function with a name", param="tools")
    choice = body.get("tool_choice", "auto")
    if choice not in (None, "auto", "none"):
        raise Refused("tool_choice: only auto and none; the model cannot be made to call", param="tool_choice")
    tools = None if choice == "none" else tools
    try:
        rendered = tokenizer.render(messages, tools=tools, add_generation_prompt=True)
    except UserError as e:
        raise Refused(str(e), param="messages") from None
    except RecursionError:
        raise Refused("the request is nested too deep", param="messages") from None
    except (AttributeError, LookupError, TypeError, ValueError) as e:  # formats trust a tool's schema
        raise Refused(f"the chat format cannot render this: {type(e).__name__}: {e}", param="messages") from None
    if "tools" in rendered.left_out:
        raise Refused("tools: the model's chat template does not know them; leave them out", param="tools")
    return rendered.tokens


def _check_message(i: int, message: Any) -> None:
    """What `Tokenizer.render` takes for granted."""
    if not isinstance(message, dict):
        return  # which it does not
    content, calls = message.get("content"), message.get("tool_calls")
    for part in content if isinstance(content, list) else []:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Refused(f"message {i}: only parts with the type text can be read", param="messages")
    if calls is not None and not isinstance(calls, list):
        raise Refused(f"message {i}: tool_calls is no list", param="messages")
    for name in ("name", "tool_call_id"):
        if not isinstance(message.get(name), str | None):
            raise Refused(f"message {i}: {name} is no text", param="messages")


def _value(body: Json, name: str, kinds: type | tuple[type, ...], what: str) -> Any:
    """``body[name]``, of one of ``kinds``, or None. A bool is no number."""
    value = body.get(name)
    if value is not None and type(value) not in (kinds if isinstance(kinds, tuple) else (kinds,)):
        raise Refused(f"{name}: expected {what}, found {type(value).__name__}", param=name)
    return value


def _whole(body: Json, name: str, bounds: Range) -> int | None:
    value: int | None = _value(body, name, int, "a whole number")
    if value is not None and (problem := bounds.problem(value)):
        raise Refused(f"{name}: {value!s:.20} {problem}", param=name)
    return value


def _is_text(value: Any) -> bool:
    """Which can be encoded: JSON can spell half a character."""
    return isinstance(value, str) and not _SURROGATE.search(value)
