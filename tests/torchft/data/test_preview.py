"""What a preview says of rows, masks, fill and steps, against the batches and by hand; its page in a browser."""

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from letters import BOS, END, Letters, turns, write_jsonl

from torchft.data.datasets import chat
from torchft.data.mixture import mix
from torchft.data.preferences import pairs
from torchft.data.preview import judged_tokens, look, masked_tokens, token_texts
from torchft.data.preview_page import page, short, visible
from torchft.data.samples import Sample
from torchft.data.stream import StreamConfig, gather
from torchft.data.stream_loader import open_loader
from torchft.data.summary import summarise
from torchft.losses.likelihood import IGNORE

HARM = '<script>alert("x")</script>'


class Bytes(Letters):
    """Ids below 256 are bytes, so that a character may take several tokens."""

    def encode(self, text, *, add_special_tokens=False, control=True):
        return [BOS] * add_special_tokens + list(text.encode())

    def decode(self, ids):
        names = {BOS: b"<bos>", END: b"<end>"}
        return b"".join(bytes([i]) if i < 256 else names.get(i, b"<role>") for i in ids).decode(errors="replace")

    def num_control(self, text):
        return len(re.findall(r"<(bos|end|role)>", text))


@pytest.fixture
def data(tmp_path):
    rows = [turns("Größe 👍" + "?" * (i % 5), f"{HARM}\n{i}") for i in range(30)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    return [chat(path, tokenizer=Bytes(), seq_len=200)]


def preview(data, *, num_rows=2, packed=True, **options):
    loader = open_loader(data, batch_size=2, seed=0, packed=packed)
    options = {"micro_steps": 2, "epochs": 3, "max_steps": None} | options
    return look(loader, summarise(data), Bytes(), num_rows=num_rows, **options)


def test_characters_of_several_tokens_are_whole():
    tokens = [*"aé👍b".encode(), 0xFF, ord("c"), END]
    assert token_texts(tokens, Bytes()) == ["a", "é", "", "👍", "", "", "", "b", "\ufffd", "c", "<end>"]
    assert token_texts([0xF0, 0x9F], Bytes()) == ["\ufffd", "\ufffd"]  # cut off
    assert token_texts([], Bytes()) == []


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("streaming", [None, StreamConfig(shuffle_rows=4, lookahead=8)])
def test_documents_are_the_samples_with_their_masks(data, packed, streaming):
    made = mix(data)
    by_place = {made.where(i): made[i] for i in range(len(made))}
    found = preview(gather(data, streaming=streaming), packed=packed, max_steps=7)
    assert len(found.rows) == 2 and found.rows_per_step == 4
    for documents, padding in found.rows:
        assert len(documents) > 1 or not packed
        for document in documents:
            sample = by_place[document.where]
            assert [token.id for token in document.tokens] == sample.tokens
            trained = [token.id for token in document.tokens if token.is_trained]
            assert trained == [label for label in sample.labels if label != -100]
            assert "".join(t.text for t in document.tokens if t.is_trained) == f"{HARM}\n{trained_number(sample)}<end>"
            controls = {token.id for token in document.tokens if token.is_control}
            assert controls == {BOS, END, 1004, 1005}
        total = sum(len(document.tokens) for document in documents) + padding
        assert total == 200 if packed else total % 64 == 0
    steps = 7 if streaming else min(7, found.steps)
    assert found.steps == steps


def trained_number(sample):
    return Bytes().decode([label for label in sample.labels if label != -100]).split("\n")[1].removesuffix("<end>")


def test_numbers_by_hand(data):
    made = mix(data)
    found = preview(made)
    tokens = len(made.tokens)
    loader = open_loader(made, batch_size=2, seed=0, packed=True)
    assert found.fill == pytest.approx(tokens / (200 * sum(len(batch.tokens) for batch in loader)))
    assert found.steps == 3 * -(-len(loader) // 2)
    assert found.tokens == pytest.approx(tokens / len(loader) * 2 * found.steps, abs=1)
    lengths = sorted(made.lengths())
    assert sum(count for _, _, count in found.bars) == 30 and found.bars[-1][1] >= lengths[-1]
    for first, last, count in found.bars:
        assert count == sum(first <= n <= last for n in lengths)
    assert found.median == lengths[15]


def test_pairs_say_which_is_which(tmp_path):
    rows = [{"prompt": "Q", "chosen": f"good {i}", "rejected": "bad"} for i in range(5)]
    data = gather([pairs(write_jsonl(tmp_path / "p.jsonl", rows), tokenizer=Bytes(), seq_len=99)], streaming=None)
    for packed in (True, False):
        found = preview(data, packed=packed)
        roles = [[document.role for document in documents] for documents, _ in found.rows]
        assert all(row == ["chosen", "rejected"] * (len(row) // 2) for row in roles)
        (chosen, rejected, *_), _ = found.rows[0]
        assert "".join(t.text for t in chosen.tokens if t.is_trained).startswith("good ")
        assert "".join(t.text for t in rejected.tokens if t.is_trained).startswith("bad")


def test_masked_tokens_of_the_first_panel(data):
    sample = mix(data)[0]
    shown = masked_tokens(sample, Bytes())
    assert "".join(text for text, trained in shown if trained) == f"{HARM}\n0<end>"
    judged = judged_tokens(Sample(tokens=[104, 105, 33], labels=[IGNORE, IGNORE, 0]), Bytes())
    assert judged == [("h", False), ("i", False), ("!", True)]


class Reader(HTMLParser):
    """Which text stands in which tags; fails for tags that do not close."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.titles = [], {}, 0

    def handle_starttag(self, tag, attributes):
        if tag in ("s", "b", "i", "u", "div", "section", "header", "style", "main", "table"):
            self.open.append(tag)
        self.titles += any(name == "title" for name, _ in attributes) and tag in "sb"
        assert tag not in ("script", "link", "img", "iframe")
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attributes)

    def handle_endtag(self, tag):
        if tag in ("s", "b", "i", "u", "div", "section", "header", "style", "main", "table"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        tag = self.open[-1] if self.open else ""
        self.text[tag] = self.text.get(tag, "") + data


def test_the_page_is_whole_and_its_text_cannot_act(data):
    found = preview(gather(data, streaming=None))
    written = page(found, title="Data of <d>", source="c.yaml")
    reader = Reader()
    reader.feed(written)
    assert not reader.open and "http" not in written and "url(" not in written
    assert "Data of <d>" in reader.text["main"]
    tokens = [token for documents, _ in found.rows for document in documents for token in document.tokens]
    assert reader.titles == sum(bool(token.text) for token in tokens)
    for document in (document for documents, _ in found.rows for document in documents):
        for is_trained, tag in ((True, "b"), (False, "s")):
            wanted = "".join(visible(token.text) for token in document.tokens if token.is_trained == is_trained)
            assert wanted and wanted in reader.text[tag]
    assert f"<b>{found.steps:,}</b><span>steps</span>" in written


@pytest.mark.skipif(not shutil.which("chromium-headless-shell"), reason="needs headless Chromium")
def test_a_browser_shows_it(data, tmp_path):
    """Trained tokens green, no script ran, nothing wider than the window."""
    found = preview(gather(data, streaming=None))
    probe = (
        "<script>const b = document.querySelector('.doc b'); document.title = [getComputedStyle(b).backgroundColor,"
        "getComputedStyle(document.querySelector('.doc s:not(.c)')).backgroundColor,"
        "document.querySelectorAll('.doc').length,"
        "document.documentElement.scrollWidth <= innerWidth].join(';')</script>"
    )
    written = page(found, title="t", source="c.yaml").replace("</html>", f"{probe}</html>")
    (tmp_path / "p.html").write_text(written)
    command = ["chromium-headless-shell", "--no-sandbox", "--window-size=900,900", "--dump-dom"]
    dom = subprocess.run([*command, f"file://{tmp_path}/p.html"], capture_output=True, text=True, timeout=60).stdout
    trained, read, documents, fits = html.unescape(re.search("<title>(.*?)</title>", dom)[1]).split(";")
    assert trained == "rgb(201, 240, 212)" and read == "rgba(0, 0, 0, 0)"
    assert int(documents) == sum(len(row) for row, _ in found.rows) and fits == "true"


def test_short():
    assert [short(n) for n in (7, 1234, 2_500_000, 3e9)] == ["7", "1.23k", "2.5M", "3B"]
