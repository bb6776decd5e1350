"""Tools as gpt-oss reads them: a namespace of TypeScript with a type for each function, and OpenAI's own two.

White space is that of the released template, whose breaks inside objects and unions the model was shipped with.
"""

import json
from typing import Any

from torchft.errors import UserError

Schema = dict[str, Any]
LONGEST_ITEM = 50  # characters of an array's item; longer ones are any
_SCALARS = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean"}

BUILTIN_TOOLS = {
    "browser": """\
## browser

// Tool for browsing.
// The `cursor` appears in brackets before each browsing display: `[{cursor}]`.
// Cite information from the tool using the following format:
// `【{cursor}†L{line_start}(-L{line_end})?】`, for example: `【6†L9-L11】` or `【8†L3】`.
// Do not quote more than 10 words directly from the tool output.
// sources=web (default: web)
namespace browser {

// Searches for information related to `query` and displays `topn` results.
type search = (_: {
query: string,
topn?: number, // default: 10
source?: string,
}) => any;

// Opens the link `id` from the page indicated by `cursor` starting at line number `loc`, showing `num_lines` lines.
// Valid link ids are displayed with the formatting: `【{id}†.*】`.
// If `cursor` is not provided, the most recent page is implied.
// If `id` is a string, it is treated as a fully qualified URL associated with `source`.
// If `loc` is not provided, the viewport will be positioned at the beginning of the document or centered on the \
most relevant passage, if available.
// Use this function without `id` to scroll to a new location of an opened page.
type open = (_: {
id?: number | string, // default: -1
cursor?: number, // default: -1
loc?: number, // default: -1
num_lines?: number, // default: -1
view_source?: boolean, // default: false
source?: string,
}) => any;

// Finds exact matches of `pattern` in the current page, or the page given by `cursor`.
type find = (_: {
pattern: string,
cursor?: number, // default: -1
}) => any;

} // namespace browser

""",
    "python": """\
## python

Use this tool to execute Python code in your chain of thought. The code will not be shown to the user. This tool \
should be used for internal reasoning, but not for code that is intended to be visible to the user (e.g. when creating \
plots, tables, or files).

When you send a message containing Python code to python, it will be executed in a stateful Jupyter notebook \
environment. python will respond with the output of the execution or time out after 120.0 seconds. The drive at \
'/mnt/data' can be used to save and persist user files. Internet access for this session is UNKNOWN. Depends on the \
cluster.

""",
}


def namespace(name: str, tools: list[Any]) -> str:
    """The tools, in OpenAI's form, under one name. Raises UserError for one without a description."""
    parts = [f"## {name}\n\nnamespace {name} {{\n\n"]
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not all(isinstance(function.get(k), str) for k in ("name", "description")):
            raise UserError(f"tool {i}: needs a function with a name and a description, found {tool!r:.80}")
        parts.append(f"// {function['description']}\ntype {function['name']} = ")
        schema = function.get("parameters") or {}
        if not schema.get("properties"):
            parts.append("() => any;\n\n")
            continue
        required = schema.get("required") or []
        fields = (_field(key, value, key in required, required) for key, value in schema["properties"].items())
        parts.append(f"(_: {{\n{''.join(fields)}}}) => any;\n\n")
    return "".join(parts) + f"}} // namespace {name}"


def _field(name: str, schema: Schema, is_required: bool, required: list[str]) -> str:
    """A line of a function's argument, behind a line with its description."""
    text = f"// {schema['description']}\n" if schema.get("description") else ""
    text += name + ("" if is_required else "?") + ": " + type_of(schema, required)
    if "default" in schema:
        default = schema["default"]
        if schema.get("enum"):
            text += f", // default: {default}"
        elif schema.get("oneOf"):
            text += f"// default: {default}"
        else:
            text += f", // default: {json.dumps(default, ensure_ascii=False)}"
    return text + ",\n"


def type_of(schema: Schema, required: list[str]) -> str:
    """A JSON schema's type. ``required``: names that the schema around it requires."""
    kind = schema.get("type")
    null = " | null" if schema.get("nullable") else ""
    if kind == "array":
        return _array(schema.get("items"), required) + null
    if isinstance(kind, list) and kind:
        return " | ".join(map(str, kind))
    if schema.get("oneOf"):
        return _union(schema["oneOf"], required)
    if kind == "string":
        return '"' + '" | "'.join(map(str, schema["enum"])) + '"' if schema.get("enum") else "string" + null
    if kind == "object":
        return _object(schema) if schema.get("properties") else "object"
    return _SCALARS.get(kind, "any") if isinstance(kind, str) else "any"


def _array(items: Schema | None, required: list[str]) -> str:
    if not items:
        return "any[]"
    kind = items.get("type")
    if kind in ("string", "number", "integer"):
        return f"{_SCALARS[kind]}[]"
    item = type_of(items, required)
    return "any[]" if item == "object | object" or len(item) > LONGEST_ITEM else f"{item}[]"


def _object(schema: Schema) -> str:
    required = schema.get("required") or []
    fields = (
        f"{key}{'' if key in required else '?'}: \n                {type_of(value, required)}"
        for key, value in schema["properties"].items()
    )
    return "{\n" + ", ".join(fields) + "}"


def _union(variants: list[Schema], required: list[str]) -> str:
    parts = []
    for variant in variants:
        text = type_of(variant, required)
        if variant.get("description"):
            text += f"// {variant['description']}"
        if "default" in variant:
            text += f"                    // default: {json.dumps(variant['default'], ensure_ascii=False)}"
        parts.append(text)
    return " | \n".join(parts)
