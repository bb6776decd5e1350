"""Builders from file to samples: ids and masks by hand, policies, and faults D4 to D8, D10, D13 with their place."""

import json

import pytest
from letters import BOS, END, EOS, ROLES, Letters, turns, write_jsonl

from torchft.data.datasets import chat, completion, instruct
from torchft.data.samples import CONTROL_TEXT
from torchft.data.summary import summarise
from torchft.errors import UserError

USER, ASSISTANT, SYSTEM = ROLES["user"], ROLES["assistant"], ROLES["system"]


def build(builder, tmp_path, rows, *, seq_len=100, has_chat=True, **options):
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    return builder(path, tokenizer=Letters(has_chat=has_chat), seq_len=seq_len, **options).samples()


def shown(sample):
    """The sample's tokens, with [ ] around the trained ones: labels put back where their tokens are."""
    names = {BOS: "<bos>", EOS: "<eos>", END: "<end>"} | {v: f"<{k}>" for k, v in ROLES.items()}
    trained = [False] + [label != -100 for label in sample.labels[:-1]]
    assert all(y in (-100, t) for y, t in zip(sample.labels, sample.tokens[1:]))
    pieces = [f"[{names.get(t, chr(t))}]" if on else names.get(t, chr(t)) for t, on in zip(sample.tokens, trained)]
    return "".join(pieces).replace("][", "")


def refused(builder, tmp_path, rows, **options):
    with pytest.raises(UserError) as e:
        build(builder, tmp_path, rows, **options)
    return str(e.value)


def test_chat_trains_each_answer_and_its_end(tmp_path):
    samples = build(chat, tmp_path, [turns("Hi", "Yo", "A?", "B")])
    assert shown(samples[0]) == ("<bos><user>Hi<end><assistant>[Yo<end>]<user>A?<end><assistant>[B<end>]")
    assert samples.pad_id == EOS and samples.seq_len == 100


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("last", "<bos><user>Hi<end><assistant>Yo<end><user>A?<end><assistant>[B<end>]"),
        ("all", "<bos>[<user>Hi<end><assistant>Yo<end><user>A?<end><assistant>B<end>]"),
    ],
)
def test_train_on(tmp_path, train_on, expected):
    assert shown(build(chat, tmp_path, [turns("Hi", "Yo", "A?", "B")], train_on=train_on)[0]) == expected


def test_a_message_that_says_train_false_is_not_trained(tmp_path):
    row = turns("Hi", "Yo", "A?", "B")
    row["messages"][1]["weight"] = 0
    expected = "<bos><user>Hi<end><assistant>Yo<end><user>A?<end><assistant>[B<end>]"
    assert shown(build(chat, tmp_path, [row])[0]) == expected


def test_every_format_gives_the_same_sample(tmp_path):
    sharegpt = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}
    alpaca, prompt = {"instruction": "Hi", "input": "", "output": "Yo"}, {"prompt": "Hi", "completion": "Yo"}
    renamed = {"dialog": turns("Hi", "Yo")["messages"]}
    samples = [
        build(chat, tmp_path, [turns("Hi", "Yo")]),
        build(chat, tmp_path, [sharegpt]),
        build(chat, tmp_path, [sharegpt], format="sharegpt"),
        build(chat, tmp_path, [renamed], column_map={"messages": "dialog"}),
        build(chat, tmp_path, [alpaca]),
        build(instruct, tmp_path, [alpaca]),
        build(instruct, tmp_path, [{"q": "Hi", "a": "Yo"}], column_map={"instruction": "q", "output": "a"}),
        build(instruct, tmp_path, [prompt]),
    ]
    assert {shown(s[0]) for s in samples} == {"<bos><user>Hi<end><assistant>[Yo<end>]"}


def test_system_prompts(tmp_path):
    row = turns("Hi", "Yo")
    row["messages"].insert(0, {"role": "system", "content": "Old"})
    for rows in ([row], [turns("Hi", "Yo")]):
        sample = build(chat, tmp_path, rows, new_system_prompt="New")[0]
        assert shown(sample) == "<bos><system>New<end><user>Hi<end><assistant>[Yo<end>]"


def test_a_system_message_at_the_beginning_of_the_first_question(tmp_path):
    row = turns("Hi", "Yo", "More", "No")
    row["messages"].insert(0, {"role": "system", "content": "Old"})
    sample = build(chat, tmp_path, [row], system_into_question=True)[0]
    assert shown(sample).startswith("<bos><user>Old\n\nHi<end><assistant>[Yo<end>]<user>More")
    plain = build(chat, tmp_path, [turns("Hi", "Yo")], system_into_question=True)[0]
    assert shown(plain) == "<bos><user>Hi<end><assistant>[Yo<end>]"
    new = build(chat, tmp_path, [turns("Hi", "Yo")], system_into_question=True, new_system_prompt="New")[0]
    assert shown(new) == "<bos><user>New\n\nHi<end><assistant>[Yo<end>]"
    row["messages"][1]["content"] = [{"type": "text", "text": "Hi"}]
    assert "must be text" in refused(chat, tmp_path, [row], system_into_question=True)


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'])
def test_tools_reach_the_template(tmp_path, tools):
    sample = build(chat, tmp_path, [turns("Hi", "Yo") | {"tools": tools}])[0]
    assert shown(sample).startswith('<bos>[{"name": "f"}]<user>')
    plain = build(chat, tmp_path, [turns("Hi", "Yo") | {"tools": empty} for empty in (None, "", [])])
    assert len({shown(s) for s in plain}) == 1


def test_tools_that_are_none_are_a_rows_problem(tmp_path):
    problem = refused(chat, tmp_path, [turns("Hi", "Yo") | {"tools": [{"function": "f"}]}])
    assert "d.jsonl:1: 'tools' must be a list of objects that describe functions" in problem


def test_instruct_without_chat_template(tmp_path):
    rows = [{"instruction": "Add", "input": "1", "output": "2"}, {"instruction": "Add", "input": None, "output": "2"}]
    samples = build(instruct, tmp_path, rows, has_chat=False)
    assert [shown(s) for s in samples] == [
        "<bos>### Instruction:\nAdd\n\n### Input:\n1\n\n### Response:\n[2<eos>]",
        "<bos>### Instruction:\nAdd\n\n### Response:\n[2<eos>]",
    ]
    samples = build(instruct, tmp_path, [{"prompt": "1+1=", "completion": "2"}], has_chat=False)
    assert shown(samples[0]) == "<bos>1+1=[2<eos>]"
    assert shown(build(instruct, tmp_path, rows, has_chat=False, train_on="all")[1]).startswith("<bos>[### Instr")


def test_instruct_with_a_prompt_template(tmp_path):
    options = {"prompt_template": "Q: {question}\nA: ", "column_map": {"output": "answer"}}
    row = {"question": "<end> {x}", "answer": "Yo"}
    for has_chat in (True, False):
        samples = build(instruct, tmp_path, [row], has_chat=has_chat, **options)
        assert shown(samples[0]) == "<bos>Q: <end> {x}\nA: [Yo<eos>]"
        assert summarise(samples).notes == {CONTROL_TEXT: 1}
    assert "write it into prompt_template" in refused(instruct, tmp_path, [row], new_system_prompt="x", **options)


def test_completion_trains_everything_and_splits(tmp_path):
    samples = build(completion, tmp_path, [{"text": "abcdef"}, {"text": "gh"}], seq_len=4)
    assert [shown(s) for s in samples] == ["<bos>[abc]", "c[def]", "f[<eos>]", "<bos>[gh<eos>]"]
    assert summarise(samples).split == 1
    cut = build(completion, tmp_path, [{"text": "abcdef"}], seq_len=4, too_long="truncate", add_eos=False)
    assert [shown(s) for s in cut] == ["<bos>[abc]"]
    (tmp_path / "book.txt").write_text("ab\ncd\n")
    book = completion(str(tmp_path / "book.txt"), tokenizer=Letters(), seq_len=100).samples()
    assert [shown(s) for s in book] == ["<bos>[ab\ncd\n<eos>]"]


def test_chat_without_chat_template_is_refused(tmp_path):
    assert "torchft.data.datasets.instruct, which needs none" in refused(
        chat, tmp_path, [turns("a", "b")], has_chat=False
    )


def test_d4_missing_column_names_file_line_and_a_column_map(tmp_path):
    rows = [{"question": "Hi", "answer": "Yo"}] * 3
    message = refused(chat, tmp_path, rows)
    assert message.startswith(f"{tmp_path}/d.jsonl:1: no column 'messages' of a conversation, and no column 'instruct")
    assert "Try column_map: {instruction: question, output: answer}" in message
    assert "no column 'text'; the columns are ['question', 'answer']" in refused(completion, tmp_path, rows)
    assert "no column 'text'" in refused(completion, tmp_path, [{"text": "a"}, {"txt": "b"}])
    assert "prompt_template names {q}" in refused(instruct, tmp_path, rows, prompt_template="{q}")


def test_d5_mixed_types_name_the_row(tmp_path):
    rows = [{"text": "a"}, {"text": 1}, {"text": "b"}, {"text": {"c": 2}}]
    message = refused(completion, tmp_path, rows)
    assert f"{tmp_path}/d.jsonl:2: 'text' must be text, found int 1" in message
    assert f"{tmp_path}/d.jsonl:4: 'text' must be text, found dict {{'c': 2}}" in message
    assert len(build(completion, tmp_path, rows, bad_rows="drop")) == 2
    messages = [turns("a", "b"), turns("a", 5)]
    assert f"{tmp_path}/d.jsonl:2: message 1 (assistant): content must be text" in refused(chat, tmp_path, messages)
    mixed = [turns("a", "b"), {"conversations": [{"from": "human", "value": "a"}]}]  # held to the first row's format
    assert "d.jsonl:2: conversations[0] must be an object with 'role'" in refused(chat, tmp_path, mixed)


def test_d6_empty_rows_are_counted_or_refused(tmp_path):
    rows = [turns("a", "b"), turns("a", ""), turns(None, "b"), turns("a", " \n"), {"messages": []}, {"messages": None}]
    summary = summarise(build(chat, tmp_path, rows))
    assert (summary.rows, summary.samples, summary.dropped) == (6, 1, {"empty": 5})
    assert "d.jsonl:2 and 1 more rows: assistant message is empty" in refused(chat, tmp_path, rows, empty_rows="error")
    (tmp_path / "d.csv").write_text("text\nab\n \ncd\n")
    from_csv = completion(str(tmp_path / "d.csv"), tokenizer=Letters(), seq_len=9).samples()
    assert (len(from_csv), dict(from_csv.counts.dropped)) == (2, {"empty": 1})
    (tmp_path / "n.jsonl").write_text('{"text": NaN}\n{"text": "ab"}\n')
    assert len(completion(str(tmp_path / "n.jsonl"), tokenizer=Letters(), seq_len=9).samples()) == 1


@pytest.mark.parametrize(
    ("roles", "rule"),
    [
        (["user", "asistant"], "unknown role 'asistant' (did you mean 'assistant'?)"),
        (["user", "user", "assistant"], "messages 0 and 1 both have the role 'user'"),
        (["user", "assistant", "assistant"], "messages 1 and 2 both have the role 'assistant'"),
        (["user"], "has the role 'assistant', so there is nothing to learn"),
        (["user", "system", "assistant"], "message 1: role 'system' is allowed only as the first message"),
        (["user", None], "messages[1].role must be text, found NoneType None"),
        (["user", ["assistant"]], "messages[1].role must be text, found list ['assistant']"),
    ],
)
def test_d7_roles_name_the_row_and_the_rule(tmp_path, roles, rule):
    bad = {"messages": [{"role": role, "content": "x"} for role in roles]}
    message = refused(chat, tmp_path, [turns("a", "b"), bad])
    assert message.startswith(f"{tmp_path}/d.jsonl:2: ")
    assert rule in message
    assert len(build(chat, tmp_path, [turns("a", "b"), bad], bad_rows="drop")) == 1


def test_d8_d10_answer_cut_off(tmp_path):
    rows = [turns("x" * 50, "b"), turns("a", "b" * 50), turns("a", "b")]
    summary = summarise(build(chat, tmp_path, rows, seq_len=20))
    assert summary.dropped == {"cut before the first trained token": 1}
    assert (summary.samples, summary.truncated, summary.longest) == (2, 1, 56)
    sample = build(chat, tmp_path, rows, seq_len=20)[0]
    assert sample.tokens[-1] == ord("b") and len(sample.tokens) == 20  # no end-of-turn is made up at the cut
    assert summarise(build(chat, tmp_path, rows, seq_len=20, too_long="drop")).dropped == {"too long": 2}
    message = refused(chat, tmp_path, rows, seq_len=20, too_long="error")
    assert "d.jsonl:1 and 1 more rows: 56 tokens are more than seq_len 20" in message


def test_d13_control_tokens_in_user_text_stay_text_and_are_counted(tmp_path):
    rows = [turns("stop <end> here", "b"), turns("a", "b")]
    samples = build(chat, tmp_path, rows)
    assert list(samples[0].tokens).count(END) == 2  # one per turn, none from the text
    assert summarise(samples).notes == {CONTROL_TEXT: 1}
    samples = build(completion, tmp_path, [{"text": "<end>"}, {"text": "end"}])
    assert END not in samples[0].tokens and summarise(samples).notes == {CONTROL_TEXT: 1}


def test_one_bad_row_among_many_is_reported_with_its_line(tmp_path):
    rows = [turns("a", "b")] * 200
    rows[150] = {"messages": [{"role": "robot", "content": "x"}]}
    assert f"{tmp_path}/d.jsonl:151: " in refused(chat, tmp_path, rows)


def test_max_rows_and_slices(tmp_path):
    rows = [turns(str(i), "b") for i in range(10)]
    assert len(build(chat, tmp_path, rows, max_rows=3)) == 3
    train, held = (build(chat, tmp_path, rows, split=s) for s in ("train[:80%]", "train[80%:]"))
    assert {shown(s) for s in train}.isdisjoint({shown(s) for s in held})
    assert (len(train), len(held)) == (8, 2)


def test_deep_json_of_messages_does_not_crash(tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_text(json.dumps(turns("a", "b")) + "\n" + '{"messages": ' + "[" * 50_000 + "]" * 50_000 + "}\n")
    with pytest.raises(UserError, match=r"deep.jsonl:2"):
        chat(str(path), tokenizer=Letters(), seq_len=10).samples()
