"""Which chat format a checkpoint gets."""

import logging
import shutil

import pytest
from conversations import PLAIN, assistant, user
from vocabularies import hub, template, write

from torchft.errors import UserError
from torchft.models import llama2, llama3
from torchft.tokenizers import load
from torchft.tokenizers.templates import TemplateChat


def test_a_base_llama3_gets_llama3s_format(folders, caplog):
    """The released base tokenizer has the control tokens and no template; fine-tuning it on chats is the usual job."""
    with caplog.at_level(logging.INFO, "torchft"):
        tokenizer = load(folders["llama3"])
    assert tokenizer._chat is llama3.chat
    assert "has no chat template; its control tokens are those of llama3" in caplog.text
    end = tokenizer.encode("<|eot_id|>")
    assert tokenizer.stop_ids == (tokenizer.eos_id, *end)


def test_the_template_to_export_gives_the_same_ids(folders):
    """An exported folder of a base model gets chat_template, so that others render what was learned."""
    tokenizer, oracle = load(folders["llama3"]), hub(folders["llama3"])
    for messages in PLAIN.values():
        wanted = oracle.apply_chat_template(
            messages, chat_template=tokenizer.chat_template, tokenize=True, return_dict=False
        )
        assert tokenizer.render(messages).tokens == wanted


def test_a_checkpoint_without_any_sign_has_no_chat(folders):
    tokenizer = load(folders["gpt2"])
    assert not tokenizer.has_chat and tokenizer.chat_template is None
    with pytest.raises(UserError, match=r"no chat template .* name one with chat_format"):
        tokenizer.render([user("a"), assistant("b")])


def test_a_format_can_be_named(folders, tmp_path):
    for name in ("llama2", "torchft.models.llama2.chat"):
        assert load(folders["llama2"], chat_format=name)._chat is llama2.chat
    (tmp_path / "mine.jinja").write_text(template("qwen2_5"))
    mine = load(folders["qwen2"], chat_format=str(tmp_path / "mine.jinja"))
    assert isinstance(mine._chat, TemplateChat)
    with pytest.raises(UserError, match=r"unknown chat_format 'lama2' .did you mean 'llama2'"):
        load(folders["llama2"], chat_format="lama2")
    with pytest.raises(UserError, match=r"missing\.jinja cannot be read"):
        load(folders["llama2"], chat_format=str(tmp_path / "missing.jinja"))


def test_a_format_whose_tokens_are_missing_is_refused(folders):
    """Its control tokens would be spelled out as text, and learned so."""
    with pytest.raises(UserError, match=r"chat_format llama3 needs <\|begin_of_text\|>.* vocabulary"):
        load(folders["gpt2"], chat_format="llama3")


def test_a_changed_template_is_not_taken_for_the_familys(folders, tmp_path):
    """Seeded differences that are easy to miss: no trim, another date, a system prompt by default."""
    for i, (old, new) in enumerate([("| trim", ""), ("26 Jul 2024", "27 Jul 2024"), ("2023", "2024")]):
        folder = tmp_path / str(i)
        shutil.copytree(folders["llama3"], folder)
        source = template("llama3" if old == "| trim" else "llama3_1")
        assert old in source
        write(folder, chat_template=source.replace(old, new))
        tokenizer, oracle = load(folder), hub(folder)
        assert isinstance(tokenizer._chat, TemplateChat)
        for messages in PLAIN.values():
            assert tokenizer.render(messages).tokens == oracle.apply_chat_template(
                messages, tokenize=True, return_dict=False
            )


def test_named_templates_without_a_default_are_refused(folders, tmp_path):
    shutil.copytree(folders["llama3"], tmp_path / "x")
    config = {"eos_token": "<|eot_id|>", "chat_template": [{"name": "rag", "template": "x"}]}
    with pytest.raises(UserError, match="has no template named 'default', only rag"):
        load(write(tmp_path / "x", tokenizer_config=config))
