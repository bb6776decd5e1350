"""Rows of each format become the same messages; rows that do not fit name the rule (faults D4, D5, D6)."""

import pytest

from torchft.data.messages import (
    FORMATS,
    EmptyError,
    RowError,
    detect,
    fill,
    missing,
    rename,
    text,
    with_system,
    without_empty,
)

ASK, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Count."}
NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("openai", {"messages": [ASK, ANSWER]}),
        ("openai", {"conversations": [ASK, ANSWER], "id": 7}),
        ("openai", {"messages": [ASK | {"name": None, "tool_calls": None}, ANSWER | {"weight": None}]}),  # from parquet
        ("sharegpt", {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}),
        ("sharegpt", {"messages": [{"from": "user", "value": "2+2?"}, {"from": "assistant", "value": "4"}]}),
        ("alpaca", {"instruction": "2+2?", "input": "", "output": "4"}),
        ("alpaca", {"instruction": "2+2?", "output": "4"}),
        ("alpaca", {"instruction": "2+2?", "input": NAN, "output": "4"}),
    ],
)
def test_formats(name, row):
    assert detect(row) == name
    assert FORMATS[name](row) == [ASK, ANSWER]


def test_alpaca_input_follows_the_instruction():
    row = {"instruction": "Add.", "input": "2, 2", "output": "4"}
    assert FORMATS["alpaca"](row) == [{"role": "user", "content": "Add.\n\n2, 2"}, ANSWER]


@pytest.mark.parametrize("row", [{"prompt": "2+2?", "completion": "4"}, {"prompt": [ASK], "completion": [ANSWER]}])
def test_prompt_completion_trains_the_completion_only(row):
    assert detect(row) == "prompt_completion"
    assert FORMATS["prompt_completion"](row) == [ASK | {"train": False}, ANSWER]


def test_openai_weight_and_train():
    row = {"messages": [ASK | {"weight": 1}, ANSWER | {"weight": 0}, ASK, ANSWER | {"train": False, "weight": 1}]}
    assert FORMATS["openai"](row) == [ASK, ANSWER | {"train": False}, ASK, ANSWER | {"train": False}]


def test_tool_turns_keep_their_fields():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    result = {"role": "tool", "tool_call_id": "1", "content": ""}
    messages = FORMATS["openai"]({"messages": [ASK, call, result, ANSWER]})
    assert messages == [ASK, {k: v for k, v in call.items() if v is not None}, result, ANSWER]
    assert without_empty(messages) == messages  # no text in a call or a result is no fault
    turns = [{"from": "function_response", "value": "9"}]
    assert FORMATS["sharegpt"]({"conversations": turns}) == [{"role": "tool", "content": "9"}]


def test_system_prompt():
    assert with_system([SYSTEM, ASK], "New.") == with_system([ASK], "New.") == [SYSTEM | {"content": "New."}, ASK]


def test_rename():
    assert rename({"q": 1, "b": 2}, {"instruction": "q"}) == {"q": 1, "b": 2, "instruction": 1}


def test_d4_missing_columns_are_listed_with_a_column_map():
    for row, hint in [
        ({"question": "a", "answer": "b"}, "Try column_map: {instruction: question, output: answer}"),
        ({"instruction": "a", "response": "b"}, "no column 'output'; the columns are ['instruction', 'response']"),
        ({"dialog": [ASK]}, "Try column_map: {messages: dialog}"),
        ({"text": "a"}, "torchft.data.datasets.completion for raw text"),
        ({"a": 1}, "Try column_map: {instruction: YOUR_COLUMN, output: YOUR_COLUMN}"),
    ]:
        with pytest.raises(RowError) as e:
            detect(row)
        assert hint in str(e.value)
    with pytest.raises(RowError, match=r"no column 'qestion' \(did you mean 'question'\?\); the columns are"):
        rename({"question": 1}, {"instruction": "qestion"})
    assert missing(["text"], {"content": 1}).endswith("Try column_map: {text: content}")


@pytest.mark.parametrize(
    ("name", "row", "why"),
    [
        ("openai", {"messages": "hello"}, "'messages' must be a list of messages, found str 'hello'"),
        ("openai", {"messages": [ASK, 7]}, "messages[1] must be an object with 'role' and 'content', found int 7"),
        ("openai", {"messages": [{"content": "x"}]}, "messages[0] must be an object with 'role'"),
        ("openai", {"messages": [ANSWER | {"weight": 0.5}]}, "messages[0].weight must be 0 or 1, found 0.5"),
        ("openai", {"other": 1}, "no column 'messages'"),
        (
            "sharegpt",
            {"conversations": [{"from": "gpt"}]},
            "conversations[0] must be an object with 'from' and 'value'",
        ),
        ("sharegpt", {"conversations": [{"from": "gtp", "value": "x"}]}, "unknown 'from' 'gtp' (did you mean 'gpt'?)"),
        ("sharegpt", {"conversations": [{"from": ["gpt"], "value": "x"}]}, "unknown 'from' ['gpt']"),
        ("alpaca", {"instruction": "a", "output": 4}, "'output' must be text, found int 4"),
        ("alpaca", {"instruction": {"a": 1}, "output": "b"}, "'instruction' must be text, found dict {'a': 1}"),
        ("alpaca", {"instruction": "a", "input": [1], "output": "b"}, "'input' must be text, found list [1]"),
        ("prompt_completion", {"prompt": [ASK], "completion": "b"}, "'prompt' must be text, found list"),
    ],
)
def test_d5_wrong_types_name_the_place(name, row, why):
    with pytest.raises(RowError) as e:
        FORMATS[name](row)
    assert why in str(e.value)


@pytest.mark.parametrize("value", [None, NAN, "", " \n\t "])
def test_d6_empty_text(value):
    with pytest.raises(EmptyError, match="'output' is empty"):
        text({"output": value}, "output")
    for row in [{"messages": [ASK, ANSWER | {"content": value}]}, {"messages": [ASK, {"role": "assistant"}]}]:
        with pytest.raises(EmptyError, match="assistant message is empty"):
            without_empty(FORMATS["openai"](row))
    with pytest.raises(EmptyError, match="user message is empty"):
        without_empty(FORMATS["sharegpt"]({"conversations": [{"from": "human", "value": value}]}))
    parts = {"role": "user", "content": [{"type": "text", "text": value}]}
    if isinstance(value, str):
        with pytest.raises(EmptyError):
            without_empty([parts, ANSWER])
    assert without_empty([SYSTEM | {"content": value or ""}, ASK, ANSWER])[-2:] == [ASK, ANSWER]


@pytest.mark.parametrize("value", [None, NAN, []])
def test_d6_empty_conversation(value):
    for raises in (detect, FORMATS["openai"], lambda row: without_empty(FORMATS["openai"](row))):
        if value == [] and raises is FORMATS["openai"]:
            continue
        with pytest.raises(EmptyError):
            raises({"messages": value})


def test_empty_system_message_is_left_out():
    assert without_empty([SYSTEM | {"content": " "}, ASK, ANSWER]) == [ASK, ANSWER]


def test_fill_replaces_columns_and_nothing_else():
    row = {"q": "{a} %s {q}", "none": None, "a": "x"}
    assert fill("Q: {q}|{none}|{ q }|{{a}}", row) == "Q: {a} %s {q}||{ q }|{x}"
    with pytest.raises(RowError, match=r"prompt_template names \{b\}: no column 'b'"):
        fill("{b}", row)
    with pytest.raises(RowError, match="must be text"):
        fill("{q}", {"q": 3})
