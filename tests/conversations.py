"""Conversations to render: OpenAI messages, with the arguments that go with them."""

TOOLS = [
    {"type": "function", "function": {
        "name": "get_weather", "description": "Weather in a city, e.g. Zürich",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }},
    {"type": "function", "function": {"name": "now", "description": "The time", "parameters": {"type": "object"}}},
]  # fmt: skip


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def call(name, arguments):
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


PLAIN = {
    "one turn": [user("Hi there"), assistant("Hello, world!")],
    "system": [system("Be brief."), user("Größe?"), assistant("1,80 m")],
    "two turns": [user("a"), assistant("b"), user("c"), assistant("d e")],
    "three turns with system": [
        system("You are a poet."), user("One"), assistant("1"), user("Two"), assistant("2"), user("Three"),
        assistant("3"),
    ],
    "unicode": [system("שלום"), user("你好 👩‍👩‍👧‍👦 e\u0301"), assistant("Привет 🏳️‍🌈 안녕\u0301")],
    "white space": [system("  s \n"), user("\n\n a  b\t"), assistant(" \n x  \n\n"), user("  "), assistant("\ty")],
    "empty": [user(""), assistant("")],
    "empty system": [system(""), user("x"), assistant("y")],
    "digits and newlines": [user("123456789\n\n\n10"), assistant("2024\n\n- a\n- b\n")],
    "inner quotes": [user("say \"hi\" {{ x }} {% if %}"), assistant("'hi' \\n <b>&amp;</b>")],
    "NUL and separators": [user("a\x00b\u2028c\xa0"), assistant("d\u3000e\ufeff")],
    "long": [user("word " * 300), assistant("answer " * 300)],
    "ends with a question": [user("a"), assistant("b"), user("c")],
}  # fmt: skip

TOOL_USE = {
    "tools only offered": [user(" What now? "), assistant("Nothing.")],
    "a call and its result": [
        system("Use tools."), user("Weather?"), call("get_weather", {"city": "Zürich"}),
        {"role": "tool", "content": "{\"celsius\": 21}"}, assistant("21 °C"),
    ],
    "a result that is an object": [
        user("Weather?"), call("get_weather", {"city": "Bern", "days": [1, 2]}),
        {"role": "tool", "content": {"c": "ü"}}, assistant("ok"),
    ],
    "ipython": [
        user("Time?"), call("now", {}), {"role": "ipython", "content": "12:00"}, assistant("Noon"), user("Sure?"),
        assistant("Yes"),
    ],
}  # fmt: skip
