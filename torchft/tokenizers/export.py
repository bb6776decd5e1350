"""A tokenizer's files into an exported folder."""

import shutil
from pathlib import Path

from torchft.ranks import is_main
from torchft.tokenizers.tokenizer import Tokenizer

TEMPLATE = "chat_template.jinja"


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy the checkpoint's own files, and write down the chat format that it was trained in if they say another.

    Of several ranks the main one writes.
    """
    if not is_main():
        return
    for file in tokenizer.files():
        shutil.copyfile(file, folder / file.name)
    if tokenizer.chat_template is not None:  # this file comes before what tokenizer_config.json says
        (folder / TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")
