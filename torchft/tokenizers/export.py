"""A tokenizer's files into an exported folder."""

import shutil
from pathlib import Path

from torchft.tokenizers.tokenizer import Tokenizer

TEMPLATE = "chat_template.jinja"


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy the checkpoint's own files, and write down the chat format that it was trained in if they do not say it."""
    for file in tokenizer.files():
        shutil.copyfile(file, folder / file.name)
    said = (folder / "tokenizer_config.json").read_text() if (folder / "tokenizer_config.json").exists() else ""
    if tokenizer.chat_template and not (folder / TEMPLATE).exists() and '"chat_template"' not in said:
        (folder / TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")
