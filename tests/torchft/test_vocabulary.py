"""New tokens: transformers' ids and rows, means by hand, spare rows used, what is refused; trained and exported."""

import json

import pytest
import tiny
import torch
from families import CASES
from letters import write_jsonl
from recipe_runs import conversations, load_recipe
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM
from vocabularies import LLAMA3_SPECIAL, byte_level, write

from torchft import models, tokenizers
from torchft.cli.main import main
from torchft.config_load import load
from torchft.errors import UserError
from torchft.tokenizers import bpe
from torchft.vocabulary import add_tokens

NEW = {"<|call|>": "call of a tool", "<|résumé|>": ""}


def checkpoint(folder, *, spare=0, tied=True):
    """Like Llama 3's base, with ``spare`` rows that no token has."""
    write(folder, tokenizer_config={"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"})
    tokenizer = byte_level(bpe.PATTERNS["Llama 3"], special=LLAMA3_SPECIAL, llama=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    eos, size = tokenizer.token_to_id("<|end_of_text|>"), tokenizer.get_vocab_size() + spare
    sizes = {"vocab_size": size, "hidden_size": 64, "std": 0.1, "num_hidden_layers": 1}
    tiny.checkpoint(folder, eos_token_id=eos, tie_word_embeddings=tied, max_shard_size="100KB", **sizes)
    return size


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 1, 40])
def test_rows_are_means_of_words_and_all_else_is_as_it_was(tmp_path, spare, tied):
    size = checkpoint(tmp_path / "old", spare=spare, tied=tied)
    ids = add_tokens(tmp_path / "old", tmp_path / "new", NEW)
    first = size - spare
    assert ids == {"<|call|>": first, "<|résumé|>": first + 1}
    before = LlamaForCausalLM.from_pretrained(tmp_path / "old").state_dict()
    after = LlamaForCausalLM.from_pretrained(tmp_path / "new").state_dict()
    rows = size if spare >= 2 else -(-(first + 2) // 64) * 64
    plain = AutoTokenizer.from_pretrained(tmp_path / "old")
    for name, weight in before.items():
        if not name.endswith(("embed_tokens.weight", "lm_head.weight")):
            assert torch.equal(after[name], weight)
            continue
        assert after[name].shape == (rows, 64)
        assert torch.equal(after[name][:first], weight[:first])
        for id, words in ((first, "call of a tool"), (first + 1, "<|résumé|>")):
            pieces = plain(words, add_special_tokens=False)["input_ids"]
            assert len(pieces) > 1
            torch.testing.assert_close(after[name][id], weight[pieces].mean(0))
    ours, theirs = tokenizers.load(tmp_path / "new"), AutoTokenizer.from_pretrained(tmp_path / "new")
    text = "a<|call|> <|résumé|>b<|call"
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode("<|call|>") == [first] and ours.encode("<|call|>", control=False) != [first]
    model = models.load(tmp_path / "new", dtype=torch.float32)
    tokens = torch.tensor([[1, first, first + 1]])
    with torch.no_grad():
        wanted = LlamaForCausalLM.from_pretrained(tmp_path / "new")(tokens).logits
        assert (model(tokens) - wanted).abs().max() < 1e-4


def test_tables_of_each_layer_grow_too(tmp_path):
    """Gemma 4 E2B's second table, of which config.json says the rows as well."""
    size = checkpoint(tmp_path / "old")
    for file in (tmp_path / "old").glob("*.safetensors*"):
        file.unlink()
    case = CASES["gemma4_e2b"] | {"vocab_size": size, "vocab_size_per_layer_input": size, "tie_word_embeddings": True}
    tiny.transformers_model(**case).save_pretrained(tmp_path / "old")
    ids = add_tokens(tmp_path / "old", tmp_path / "new", NEW)
    tables = (
        models.load(tmp_path / "new").embed_tokens_per_layer.weight,
        models.load(tmp_path / "new").embed_tokens.weight,
    )
    words = tokenizers.load(tmp_path / "old").encode(NEW["<|call|>"])
    assert all(len(table) >= size + 2 and table[:size].ne(0).any() for table in tables)
    assert all(torch.allclose(t[ids["<|call|>"]], t[words].float().mean(0).bfloat16(), atol=1e-2) for t in tables)


def test_a_new_token_is_trained_alone_and_exported(tmp_path):
    """Under LoRA: of the exported table only its row is another, and PEFT's file has it."""
    checkpoint(tmp_path / "old")
    assert main(["vocab", str(tmp_path / "old"), str(tmp_path / "new"), "--add", "<|call|>=call of a tool"]) == 0
    rows = conversations(6)
    for row in rows:
        row["messages"][-1]["content"] = "<|call|> " + row["messages"][-1]["content"]
    recipe = load_recipe("lora_finetune")
    settings = [
        f"checkpoint_dir={tmp_path / 'new'}", f"output_dir={tmp_path / 'run'}", "device=cpu", "dtype=fp32",
        f"dataset.source={write_jsonl(tmp_path / 'd.jsonl', rows)}", "trainable_tokens=['<|call|>', '<|eot_id|>']",
        "export_dtype=fp32", "batch_size=2", "seq_len=128", "optimizer.lr=1e-2", "lora.rank=2",
    ]  # fmt: skip
    recipe.main(load(recipe.Config, recipe="lora_finetune", file=None, overrides=settings))
    ids = tokenizers.token_ids(tmp_path / "new", ["<|call|>", "<|eot_id|>"])
    name = "model.embed_tokens.weight"
    before = LlamaForCausalLM.from_pretrained(tmp_path / "new").state_dict()[name]
    after = LlamaForCausalLM.from_pretrained(tmp_path / "run" / "export").state_dict()[name]
    changed = (before != after).any(1).nonzero().flatten().tolist()
    assert changed == sorted(ids)
    adapter = load_file(tmp_path / "run" / "export" / "adapter" / "adapter_model.safetensors")
    (delta,) = [tensor for key, tensor in adapter.items() if "trainable_tokens_delta" in key]
    torch.testing.assert_close(delta, after[sorted(ids)])


def test_what_is_refused(tmp_path):
    checkpoint(tmp_path / "old")
    for tokens, message in (
        ({"<|eot_id|>": ""}, "is a token of .* already; train its row with trainable_tokens"),
        ({" x": ""}, "a token is text without white space around it"),
        ({}, "name at least one token"),
    ):
        with pytest.raises(UserError, match=message):
            add_tokens(tmp_path / "old", tmp_path / "new", tokens)
    with pytest.raises(UserError, match=r"trainable_tokens: '<\|call\|>' is \d tokens of .*tune vocab"):
        tokenizers.token_ids(tmp_path / "old", ["<|call|>"])
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    (tmp_path / "old" / "config.json").write_text(json.dumps(config | {"vocab_size": 7}))
    with pytest.raises(UserError, match=r"embed_tokens.weight has .* rows, but config.json says vocab_size 7"):
        add_tokens(tmp_path / "old", tmp_path / "new", NEW)
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit, match="2"):
        main(["vocab", str(tmp_path / "old"), str(tmp_path / "old"), "--add", "<|x|>"])
