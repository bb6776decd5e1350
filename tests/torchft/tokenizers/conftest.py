"""Checkpoint folders of each tokenizer kind, with Hugging Face's reading of them as the oracle."""

from pathlib import Path

import pytest
import transformers
from vocabularies import LLAMA3_SPECIAL, QWEN_MARKUP, QWEN_SPECIAL, byte_level, hub, train_sentencepiece, write

from torchft.tokenizers import bpe, load
from torchft.tokenizers.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """name -> folder of a tokenizer of that kind (llama2 is sentencepiece), without chat templates."""
    root = tmp_path_factory.mktemp("tokenizers")
    kinds = {"tekken": bpe.PATTERNS["Tekken"], "o200k": bpe.PATTERNS["o200k"], "digits": bpe.DIGITS}
    kinds |= {"qwen3_5": bpe.PATTERNS["Qwen 3.5"], "kimi": bpe.PATTERNS["Kimi"], "deepseek": bpe.DEEPSEEK}
    folders = {name: root / name for name in ("gpt2", "qwen2", "llama3", "llama2", *kinds)}
    for name, pattern in kinds.items():
        write(folders[name], tokenizer_config={"eos_token": "<|endoftext|>"})
        byte_level(pattern, special=["<|endoftext|>"], nfc=name == "digits").save(str(folders[name] / "tokenizer.json"))
    write(folders["gpt2"], tokenizer_config={"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"})
    byte_level(bpe.PATTERNS["GPT-2"], special=["<|endoftext|>"]).save(str(folders["gpt2"] / "tokenizer.json"))
    write(folders["qwen2"], tokenizer_config={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    byte_level(bpe.PATTERNS["Qwen 2"], special=QWEN_SPECIAL, markup=QWEN_MARKUP, nfc=True).save(
        str(folders["qwen2"] / "tokenizer.json")
    )
    write(folders["llama3"], tokenizer_config={"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"})
    byte_level(bpe.PATTERNS["Llama 3"], special=LLAMA3_SPECIAL, llama=True).save(
        str(folders["llama3"] / "tokenizer.json")
    )

    write(
        folders["llama2"],
        tokenizer_config={"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True},
    )
    train_sentencepiece(folders["llama2"])
    return folders


@pytest.fixture(scope="session")
def ours(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: load(folder) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def theirs(folders: dict[str, Path]) -> dict[str, transformers.PreTrainedTokenizerBase]:
    return {name: hub(folder) for name, folder in folders.items()}
