"""An exported tokenizer is, to transformers and to us, the one that the model was trained with."""

import json
import shutil

import pytest
from conversations import PLAIN
from vocabularies import hub, write

from torchft.tokenizers import load
from torchft.tokenizers.export import save_tokenizer

TURN = "{{ '<|start_header_id|>' + m['role'] + ': ' + m['content'] + '<|eot_id|>' }}"
OTHER = "{% for m in messages %}" + TURN + "{% endfor %}"


@pytest.mark.parametrize("chat_format", [None, "llama3"])
@pytest.mark.parametrize("said_in", ["chat_template.jinja", "tokenizer_config.json", "nothing"])
def test_k28_the_chat_format_of_the_training_is_exported(folders, tmp_path, said_in, chat_format):
    source = shutil.copytree(folders["llama3"], tmp_path / "source")
    if said_in == "chat_template.jinja":
        write(source, chat_template=OTHER)
    if said_in == "tokenizer_config.json":
        config = json.loads((source / said_in).read_text())
        write(source, tokenizer_config=config | {"chat_template": OTHER})
    trained = load(source, chat_format=chat_format)
    (tmp_path / "export").mkdir()
    save_tokenizer(trained, tmp_path / "export")
    theirs, again = hub(tmp_path / "export"), load(tmp_path / "export")
    for messages in PLAIN.values():
        tokens = trained.render(messages).tokens
        assert again.render(messages).tokens == tokens
        assert theirs.apply_chat_template(messages, tokenize=True, return_dict=False) == tokens
