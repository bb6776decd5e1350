"""Text that comes in pieces is the text of the whole, and never holds half a letter or half a stop text."""

import pytest
from letters import END, Letters

from torchft.generation.text import TextStream


class Bytes(Letters):
    """Ids are bytes, so that a letter may take several."""

    stop_ids = (END,)

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def pieces(text, *, size=1, stop=(), end=(END,)):
    stream = TextStream(Bytes(), stop=stop)
    ids = [*text.encode(), *end]
    parts = [ids[i : i + size] for i in range(0, len(ids), size)]
    return [stream.push(part, is_last=i == len(parts) - 1) for i, part in enumerate(parts)]


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_pieces_join_to_the_text(size):
    text = "Größe: 東京 🙂 end"
    found = pieces(text, size=size)
    assert "".join(found) == text and not any("\ufffd" in piece for piece in found)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_stop_texts_are_cut_and_their_beginnings_held_back(size):
    found = pieces("one EN two END three", size=size, stop=("END", "unused"))
    assert "".join(found) == "one EN two "
    assert not any(piece.endswith("E") for piece in found)


def test_what_looked_like_a_stop_text_is_given_in_the_end():
    assert "".join(pieces("it is EN", stop=("END",))) == "it is EN"


def test_a_letter_that_stays_broken_is_given_in_the_end():
    assert "".join(pieces("ab", end=(0xE6,))) == "ab\ufffd"
