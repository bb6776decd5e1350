"""Whether two checkpoints speak of the same tokens, as a student and its teacher must."""

from torchft.errors import UserError
from torchft.tokenizers.tokenizer import Tokenizer

TEXTS = ("The quick brown fox, 12345 + 678 = 13023!", "Größe\n\n\tdéjà vu  你好", " def f(x):\n        return x\n")


def check_same_tokens(student: Tokenizer, teacher: Tokenizer) -> None:
    """UserError unless both give the same ids to the same text, and the same text to the same ids."""
    common = min(student.vocab_size, teacher.vocab_size)
    for i in range(common):
        if student.decode([i]) != teacher.decode([i]):
            raise UserError(
                f"teacher_dir: its tokenizer is another one: token {i} is {teacher.decode([i])!r}, the student's is "
                f"{student.decode([i])!r}. Take a teacher of the same tokenizer family"
            )
    for text in TEXTS:
        ours, theirs = (tokenizer.encode(text) for tokenizer in (student, teacher))
        if ours != theirs:
            raise UserError(
                f"teacher_dir: its tokenizer cuts {text!r} into {len(theirs)} tokens, the student's into {len(ours)}. "
                "Take a teacher of the same tokenizer family"
            )
