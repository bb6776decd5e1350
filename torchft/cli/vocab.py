"""``tune vocab``: a checkpoint with new special tokens, to fine-tune."""

from pathlib import Path

from torchft.cli.arguments import Parser
from torchft.errors import UserError
from torchft.vocabulary import add_tokens


def main(arguments: list[str]) -> None:
    """``tune vocab CHECKPOINT OUT --add TOKEN[=WORDS] ...``"""
    parser = Parser("vocab", "Write a checkpoint with new special tokens. Their rows begin as the mean of WORDS' rows.")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a Hub folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="where the new one goes")
    words = "a token and, in words, what it stands for (else its own text): '<|call|>=call of a tool'"
    parser.add_argument("--add", metavar="TOKEN=WORDS", action="append", default=[], help=words)
    given = parser.parse(arguments)
    if given.out.exists():
        raise UserError(f"{given.out} exists; give another path or delete it")
    tokens = {token: words for token, _, words in (word.partition("=") for word in given.add)}
    ids = add_tokens(given.checkpoint, given.out, tokens)
    for token, id in ids.items():
        print(f"{token} is id {id}")
    listed = ", ".join(ids)
    print(f"{given.out}: checkpoint_dir for a recipe; to train these rows under LoRA: trainable_tokens=[{listed}]")
