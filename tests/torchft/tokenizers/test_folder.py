"""Which file says what, against transformers reading the same folder."""

import json
import shutil

import pytest
from vocabularies import QWEN_SPECIAL, hub, write

from torchft.errors import UserError
from torchft.tokenizers import load


@pytest.fixture
def folder(folders, tmp_path):
    shutil.copytree(folders["qwen2"], tmp_path / "x")
    return tmp_path / "x"


def names(folder, **config):
    write(folder, tokenizer_config=config)
    ours, theirs = load(folder), hub(folder)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    return ours


def test_names_as_text_or_as_mappings(folder):
    added = {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False}
    assert (
        names(folder, eos_token=added, bos_token="<|im_start|>", pad_token=None).decode(
            [names(folder, eos_token=added).eos_id]
        )
        == "<|im_end|>"
    )


def test_special_tokens_map(folder):
    """It counts, and wins, unless tokenizer_config.json has added_tokens_decoder."""
    write(folder, special_tokens_map={"eos_token": {"content": "<|endoftext|>"}, "bos_token": "<|im_start|>"})
    tokenizer = names(folder, eos_token="<|im_end|>")
    assert tokenizer.decode([tokenizer.eos_id]) == "<|endoftext|>"
    ids = {content: load(folder).encode(content)[0] for content in QWEN_SPECIAL}
    decoder = {str(i): {"content": content, "special": True} for content, i in ids.items()}
    tokenizer = names(folder, eos_token="<|im_end|>", added_tokens_decoder=decoder)
    assert tokenizer.decode([tokenizer.eos_id]) == "<|im_end|>"


def test_d15_pad_falls_back_to_eos(folder, caplog):
    tokenizer = names(folder, eos_token="<|im_end|>")
    assert tokenizer.pad_id == tokenizer.eos_id
    tokenizer = names(folder, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    assert tokenizer.pad_id != tokenizer.eos_id
    write(folder, tokenizer_config={"eos_token": "<|im_end|>", "pad_token": "[PAD]"})
    assert load(folder).pad_id == load(folder).eos_id
    assert "pad_token '[PAD]' is not in the vocabulary and is left out" in caplog.text


def test_an_eos_without_an_id_is_refused(folder):
    write(folder, tokenizer_config={"eos_token": "</end>"})
    with pytest.raises(UserError, match=r"tokenizer_config.json: eos_token '</end>' is not in the vocabulary"):
        load(folder)
    write(folder, tokenizer_config={})
    with pytest.raises(UserError, match="no file names the end-of-text token"):
        load(folder)


def test_stop_ids(folder):
    write(folder, tokenizer_config={"eos_token": "<|im_end|>"}, generation_config={"eos_token_id": [3, 5]})
    assert load(folder).stop_ids == (load(folder).eos_id, 3, 5)
    write(folder, tokenizer_config={}, generation_config={"eos_token_id": 7})
    assert (load(folder).eos_id, load(folder).stop_ids) == (7, (7,))
    (folder / "generation_config.json").unlink()
    write(folder, config={"eos_token_id": 9})
    assert load(folder).eos_id == 9


def test_tokens_that_only_the_config_adds(folder):
    size = load(folder).vocab_size
    new = {"content": "<new>", "special": True, "normalized": False}
    tokenizer = names(folder, eos_token="<|im_end|>", added_tokens_decoder={str(size): new})
    assert tokenizer.encode("a<new>b") == hub(folder).encode("a<new>b", add_special_tokens=False)
    assert (tokenizer.encode("<new>"), tokenizer.vocab_size) == ([size], size + 1)


def test_a_token_of_the_vocabulary_named_special_is_cut_out(folder):
    tokenizer = names(folder, eos_token="<|im_end|>", additional_special_tokens=["ing"])
    text = "kingdoms sing ing"
    assert tokenizer.encode(text) == hub(folder).encode(text, add_special_tokens=False)
    with pytest.raises(UserError, match="additional_special_tokens '<none>' is not in the vocabulary"):
        names_without_hub(folder, additional_special_tokens=["<none>"])


def names_without_hub(folder, **config):
    write(folder, tokenizer_config={"eos_token": "<|im_end|>"} | config)
    return load(folder)


def test_add_bos_token_of_the_config_does_not_count_beside_tokenizer_json(folder):
    tokenizer = names(folder, eos_token="<|im_end|>", bos_token="<|im_start|>", add_bos_token=True)
    assert tokenizer.encode("a", add_special_tokens=True) == hub(folder)("a").input_ids


def test_tokenizer_json_beats_tokenizer_model(folder, folders):
    shutil.copy(folders["llama2"] / "tokenizer.model", folder)
    assert load(folder).encode("Größe") == load(folders["qwen2"]).encode("Größe")


def test_files(folder):
    write(folder, config={}, generation_config={}, chat_template="x", special_tokens_map={"eos_token": "<|im_end|>"})
    assert [path.name for path in load(folder).files()] == [
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    ]  # fmt: skip


def test_s7_a_config_cannot_name_a_file_elsewhere(folder, tmp_path):
    """No file's content is ever taken for a path: keys that other libraries open are ignored."""
    (tmp_path / "secret.jinja").write_text("secret")
    wanted = load(folder).encode("hi")
    for key in ("tokenizer_file", "vocab_file", "merges_file", "chat_template_file", "auto_map"):
        tokenizer = names_without_hub(folder, **{key: "../secret.jinja"})
        assert tokenizer.encode("hi") == wanted and not tokenizer.has_chat
        assert all(path.parent == folder for path in tokenizer.files())


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"has neither tokenizer.json nor tokenizer.model; `tune download"):
        load(tmp_path)


def test_broken_files_are_named(folder):
    whole = (folder / "tokenizer.json").read_text()
    for data in (whole[:500], "[]", '{"model": 3}', "version https://git-lfs.github.com/spec/v1\noid x"):
        (folder / "tokenizer.json").write_text(data)
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            load(folder)
    (folder / "tokenizer.json").write_text(whole)
    (folder / "tokenizer_config.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match=r"tokenizer_config\.json: expected a JSON object"):
        load(folder)
