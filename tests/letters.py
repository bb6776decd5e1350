"""A tokenizer whose ids can be read: a character's id is its code point, control tokens start at 1000."""

import json

from torchft.tokenizers.chat import Rendered, prepare

BOS, EOS, END = 1000, 1001, 1002
ROLES = {"system": 1003, "user": 1004, "assistant": 1005, "tool": 1006}


class Letters:
    bos_id, eos_id, pad_id, vocab_size = BOS, EOS, EOS, 1010
    fingerprint = ""  # as of a tokenizer that no folder holds

    def __init__(self, *, has_chat=True):
        self.has_chat = has_chat

    def encode(self, text, *, add_special_tokens=False, control=True):
        ids = [ord(c) for c in (text.replace("<end>", chr(END)) if control else text)]
        return [BOS] * add_special_tokens + ids

    def num_control(self, text):
        return text.count("<end>")

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i < 1000)

    def render(self, messages, *, tools=None, add_generation_prompt=False, train_on="assistant"):
        """<bos> then, for each message, <role> content <end>; the last two are trained in the assistant's."""
        tokens, train, escaped = [BOS], [train_on == "all"], 0
        if tools:
            tokens, train = tokens + self.encode(json.dumps(tools)), train + [False] * len(json.dumps(tools))
        for message in prepare(messages, add_generation_prompt=add_generation_prompt, train_on=train_on):
            body = [*self.encode(message["content"], control=False), END]
            is_trained = message.get("train", train_on == "all")
            tokens += [ROLES[message["role"]], *body]
            train += [train_on == "all"] + [is_trained] * len(body)
            escaped += message["content"].count("<end>")
        return Rendered(tokens, train, escaped)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def turns(*contents):
    """A row of OpenAI messages: user, assistant, user, ..."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]}
