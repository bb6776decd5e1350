# ruff: noqa: E501
"""tiktoken's files of Llama 3 and Kimi: ids of Hugging Face's engine with the same merges, and the added tokens."""

import base64
import json

import pytest
from conversations import PLAIN, assistant, user
from vocabularies import byte_level, hub, random_texts, write

from torchft.errors import UserError
from torchft.tokenizers import bpe, load

NAMED = ["[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"]
# moonshotai/Kimi-K2-Instruct's first released template, of text alone.
KIMI = (
    "{% if tools -%}{{ '<|im_system|>tool_declare<|im_middle|>' -}}{{- tools | tojson -}}{{ '<|im_end|>' -}}"
    "{%- endif -%}{%- for message in messages -%}{%- if loop.first and messages[0]['role'] != 'system' -%}{{ '<|im_system|>system"
    "<|im_middle|>You are a helpful assistant<|im_end|>' }}{%- endif -%}{%- if message['role'] == 'system' -%}{{ "
    "'<|im_system|>system<|im_middle|>' }}{%- elif message['role'] == 'user' -%}{{ '<|im_user|>user<|im_middle|>' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ '<|im_assistant|>assistant<|im_middle|>' }}{%- elif message['role'] "
    "== 'tool' -%}{{ '<|im_system|>tool<|im_middle|>' }}{%- endif -%}{{- message['content'] + '<|im_end|>' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_assistant|>assistant<|im_middle|>' }}{%- endif -%}"
)


def ranks(tokenizer):
    """tiktoken's lines for a byte-level vocabulary, whose ids are its merges' order."""
    of_letter = {letter: byte for byte, letter in bpe._byte_alphabet().items()}
    model = json.loads(tokenizer.to_str())["model"]["vocab"]
    tokens = {bytes(of_letter[letter] for letter in text): i for text, i in model.items()}
    return "".join(f"{base64.b64encode(token).decode()} {i}\n" for token, i in tokens.items()), len(tokens)


@pytest.fixture(scope="module")
def kimi(tmp_path_factory):
    """(our tokenizer of tiktoken.model, transformers' of the same as a tokenizer.json)."""
    folder, theirs = tmp_path_factory.mktemp("kimi"), tmp_path_factory.mktemp("theirs")
    engine = byte_level(bpe.PATTERNS["Kimi"], special=[])
    lines, first = ranks(engine)
    (folder / "tiktoken.model").write_text(lines)
    places = [0, 1, 2, 3, 4, 10, 17]  # in between are ids without a name
    names = [NAMED[places.index(i)] if i in places else f"<|reserved_token_{first + i}|>" for i in range(256)]
    decoder = {str(first + i): {"content": names[i], "special": True} for i in places}
    config = {"bos_token": "[BOS]", "eos_token": "[EOS]", "added_tokens_decoder": decoder}
    write(folder, tokenizer_config=config, chat_template=KIMI)
    engine.model.ignore_merges = True
    engine.add_special_tokens(names)
    write(theirs, tokenizer_config={"bos_token": "[BOS]", "eos_token": "[EOS]"}, chat_template=KIMI)
    engine.save(str(theirs / "tokenizer.json"))
    return load(folder), hub(theirs), load(theirs)


def test_kimis_ids(kimi):
    ours, oracle, converted = kimi
    han = ["漢字かな交じり文", "a漢b", " 你好world", "数字12345个", "〇〆々"]
    for text in [*han, *random_texts(300, 7, [*NAMED, "<|reserved_token_9|>"])]:
        want = oracle.encode(text, add_special_tokens=False)
        assert ours.encode(text) == want == converted.encode(text)
    assert ours.vocab_size == len(oracle)
    assert ours.files()[-1].name == "tiktoken.model"


@pytest.mark.parametrize("conversation", PLAIN)
def test_kimis_chat(conversation, kimi):
    """Ids of the released template; learned are the answers and the token that ends them."""
    (ours, oracle, _), messages = kimi, PLAIN[conversation]
    for prompt in (False, True):
        options = {"add_generation_prompt": prompt}
        want = oracle.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
        assert ours.render(messages, **options).tokens == want
    got = ours.render(messages)
    learned = ours.decode([token for token, train in zip(got.tokens, got.train) if train])
    assert learned == "".join(f"{m['content']}<|im_end|>" for m in messages if m["role"] == "assistant")
    assert ours.stop_ids == (ours.eos_id, *ours.encode("<|im_end|>"))


def test_llama3s_file(tmp_path):
    engine = byte_level(bpe.PATTERNS["Llama 3"], special=[], llama=False)
    lines, first = ranks(engine)
    (tmp_path / "tokenizer.model").write_text(lines)
    ours = load(tmp_path)
    engine.model.ignore_merges = True
    for text in random_texts(100, 8, ["<|eot_id|>"]):
        assert ours.encode(text, control=False) == engine.encode(text, add_special_tokens=False).ids
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (first, first + 1, first + 256)
    assert ours.encode("<|eot_id|><|reserved_special_token_0|>") == [first + 9, first + 2]
    assert ours.render([user("a"), assistant("b")]).tokens[-1] == first + 9


def test_a_damaged_file_names_its_line(tmp_path):
    (tmp_path / "tiktoken.model").write_text("YQ== 0\nYg==\n")
    with pytest.raises(UserError, match=r"tiktoken\.model:2: expected a base64 token and its rank"):
        load(tmp_path)
