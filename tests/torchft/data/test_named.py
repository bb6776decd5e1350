"""Each named data set, on rows of the released schema: the messages, by hand, and the tokens through its builder."""

import pickle

import pytest
from letters import Letters, write_jsonl

from torchft import registry
from torchft.data import named
from torchft.errors import UserError

BOTH = [("user", "Q"), ("assistant", "A")]
OPENAI = [{"role": role, "content": content} for role, content in BOTH]
SHAREGPT = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]

ROWS = {  # name -> a row with the columns of the release, what it becomes
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "Below is an instruction ..."},
        [("user", "Add.\n\n1 2"), ("assistant", "3")],
    ),
    "slimorca": (
        {"conversations": [{"from": "system", "value": "S", "weight": None}, *SHAREGPT]},
        [("system", "S"), *BOTH],
    ),
    "openhermes": (
        {"system_prompt": None, "source": "airoboros2.2", "skip_prompt_formatting": False, "conversations": SHAREGPT},
        BOTH,
    ),
    "ultrachat": ({"prompt": "Q", "prompt_id": "f0e3", "messages": OPENAI}, BOTH),
    "tulu3": ({"id": "oasst1_1", "messages": OPENAI, "source": "ai2-adapt-dev/oasst1_converted"}, BOTH),
    "gsm8k": (
        {"question": "6 times 7?", "answer": "6*7=<<6*7=42>>42.\n#### 42"},
        [("user", "6 times 7?"), ("assistant", "6*7=42.\n#### 42")],
    ),
    "hh_rlhf": (
        {
            "chosen": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: And?\n\nAssistant: No. \n\nAssistant: Never.",
            "rejected": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: And?\n\nAssistant: Yes.",
        },
        [*BOTH, ("user", "And?"), ("assistant", "No.\n\nNever.")],
    ),
    "ultrafeedback": (
        {
            "prompt": "Q",
            "prompt_id": "a1",
            "chosen": OPENAI,
            "rejected": [OPENAI[0], {"role": "assistant", "content": "B"}],
            "messages": OPENAI,
            "score_chosen": 8.0,
            "score_rejected": 3.5,
        },
        BOTH,
    ),
    "stack_exchange": (
        {
            "qid": 4,
            "question": "Q",
            "date": "2008/07/31",
            "metadata": ["https://stackoverflow.com/questions/4"],
            "response_j": "A",
            "response_k": "B",
        },
        BOTH,
    ),
    "cnn_dailymail": (
        {"article": "Long.", "highlights": "Short .", "id": "42c0"},
        [("user", "Summarize this article in a few sentences.\n\nLong."), ("assistant", "Short .")],
    ),
    "samsum": (
        {"id": "13818513", "dialogue": "A: Hi\r\nB: Ho", "summary": "They greet."},
        [("user", "Summarize this conversation.\n\nA: Hi\r\nB: Ho"), ("assistant", "They greet.")],
    ),
    "grammar": (
        {"input": "He go.", "output": "He goes."},
        [("user", "Correct this sentence.\n\nHe go."), ("assistant", "He goes.")],
    ),
}
IMAGE = {"bytes": "...", "path": None}
WITH_IMAGES = {
    "the_cauldron": (
        {"images": [IMAGE], "texts": [{"user": "Q", "assistant": "A", "source": "AI2D"}] * 2},
        [
            ("user", [{"type": "image", "image": IMAGE}, {"type": "text", "text": "Q"}]),
            ("assistant", "A"),
            *BOTH,
        ],
    ),
    "llava_instruct": (
        {"id": "1", "image": "1.jpg", "conversations": [{"from": "human", "value": "Q\n<image>"}, SHAREGPT[1]]},
        [("user", [{"type": "text", "text": "Q"}, {"type": "image", "image": "1.jpg"}]), ("assistant", "A")],
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_become_these_messages(name, tmp_path):
    """Through the name that a config has, tokenised and rendered."""
    row, messages = ROWS[name]
    build = registry.resolve(f"torchft.data.named.{name}")
    source = write_jsonl(tmp_path / "rows.jsonl", [row])
    tokenizer = Letters()
    dataset = build(source, tokenizer=tokenizer, seq_len=500, split="train")
    want = tokenizer.render([{"role": role, "content": content} for role, content in messages])
    (sample,) = dataset.samples()
    assert sample.tokens == want.tokens
    assert [label != -100 for label in sample.labels[:-1]] == want.train[1:] and any(want.train)
    assert pickle.loads(pickle.dumps(dataset)).encoder(row)(row).tokens == want.tokens  # in a worker process


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_rows_with_images(name, tmp_path):
    row, messages = WITH_IMAGES[name]
    seen = []

    class Watching(Letters):
        def render(self, messages, **options):
            seen.append([(message["role"], message["content"]) for message in messages])
            raise UserError("message 0: this model reads only text")

    build = registry.resolve(f"torchft.data.named.{name}")
    source = write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*reads only text"):
        build(source, tokenizer=Watching(), seq_len=500).samples()
    assert seen == [messages]


def test_wikitext(tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", [{"text": ""}, {"text": " = Robert = \n"}])
    samples = named.wikitext(source, tokenizer=Letters(), seq_len=500).samples()
    assert Letters().decode(samples[0].tokens) == " = Robert = \n" and samples.counts.dropped == {"empty": 1}


def test_every_named_data_set_has_a_hub_name():
    names = [name for name in registry.names("dataset") if ".named." in name]
    assert len(names) == 15
    for name in names:
        reading = registry.resolve(name)(tokenizer=Letters(), seq_len=9).reading
        assert reading.source.count("/") == 1


def test_a_row_of_another_form_is_refused(tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", [{"chosen": "Hello", "rejected": "x"}])
    with pytest.raises(UserError, match=r"rows.jsonl:1: expected .*Human"):
        named.hh_rlhf(source, tokenizer=Letters(), seq_len=9).samples()


@pytest.mark.parametrize("name", ["hh_rlhf", "ultrafeedback", "stack_exchange"])
def test_pairs_of_the_same_rows(name, tmp_path):
    """The prompt that both share, then each answer; what is chosen is what the conversation of that name has."""
    row, messages = ROWS[name]
    build = registry.resolve(f"torchft.data.named_pairs.{name}")
    assert registry.kind(f"torchft.data.named_pairs.{name}") == "preferences"
    source = write_jsonl(tmp_path / "rows.jsonl", [row])
    tokenizer = Letters()
    dataset = build(source, tokenizer=tokenizer, seq_len=500, split="train")
    samples = dataset.samples()
    chosen, rejected = samples.documents(0)
    turns = [{"role": role, "content": content} for role, content in messages]
    assert samples.tokens[chosen].tolist() == tokenizer.render(turns).tokens
    other = {"hh_rlhf": "Yes.", "ultrafeedback": "B", "stack_exchange": "B"}[name]
    turns[-1] = {"role": "assistant", "content": other}
    assert samples.tokens[rejected].tolist() == tokenizer.render(turns).tokens
    for part, answer in ((chosen, messages[-1][1]), (rejected, other)):
        learned = [label for label in samples.labels[part] if label != -100]
        assert tokenizer.decode(learned) == answer
    pickled = pickle.loads(pickle.dumps(dataset))
    assert pickled.encoder(row)(row).tokens == samples[0].tokens
