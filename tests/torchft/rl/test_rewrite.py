"""Which steps are whose, and what stands before a last answer."""

from types import SimpleNamespace

import pytest
import torch

from torchft.data.loader import Loader
from torchft.data.samples import Samples, shift
from torchft.rl.rewrite import RewriteConfig, Writers, last_questions
from torchft.training.distributed import World

DOCUMENTS = [  # tokens, which are trained: two turns, one turn, plain text
    ([1, 7, 8, 20, 21, 2, 9, 30, 31, 2], [0, 0, 0, 1, 1, 1, 0, 1, 1, 1]),
    ([1, 7, 22, 2, 5], [0, 0, 1, 1, 0]),
    ([1, 40, 41, 42], [0, 1, 1, 1]),
    ([40, 41, 42], [1, 1, 1]),
]
QUESTIONS = {0: [1, 7, 8, 20, 21, 2, 9], 1: [1, 7], 2: [1], 3: [40]}


@pytest.fixture
def samples():
    made = Samples(seq_len=16, pad_id=0)
    for i, (tokens, train) in enumerate(DOCUMENTS):
        made.append(shift(tokens, [bool(t) for t in train]), origin="x.jsonl", number=i + 1)
    return made


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("one_shape", [False, True])
def test_questions_are_what_stands_before_the_last_answer(samples, packed, one_shape):
    for batch in Loader(samples, batch_size=3, seed=1, packed=packed, one_shape=one_shape):
        assert last_questions(batch) == [QUESTIONS[i] for i in batch.samples]


def test_steps_are_shared_out_by_the_seed(samples):
    def authors(seed, **shares):
        writers = Writers(
            RewriteConfig(**shares), *[SimpleNamespace()] * 3, samples=samples, batches={"seed": seed},
            world=World(device=torch.device("cpu")),
        )  # fmt: skip
        return [writers.author(step) for step in range(400)]

    found = authors(3, student_share=0.5, teacher_share=0.2)
    assert found.count("student") == pytest.approx(200, abs=40) and found.count("teacher") == pytest.approx(80, abs=30)
    assert found == authors(3, student_share=0.5, teacher_share=0.2) != authors(4, student_share=0.5, teacher_share=0.2)
    assert set(authors(3)) == {"data"} and set(authors(3, student_share=1.0)) == {"student"}
