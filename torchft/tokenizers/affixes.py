"""What a post-processor of tokenizer.json puts around a text."""

from pathlib import Path
from typing import Any

from torchft.errors import UserError


def affixes(node: Any, path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that a post-processor puts before and after a text."""
    before: list[int] = []
    after: list[int] = []
    for step in node["processors"] if node and node["type"] == "Sequence" else [node]:
        match step:
            case None | {"type": "ByteLevel"}:
                pass
            case {"type": "TemplateProcessing", "single": list(single), "special_tokens": special}:
                side = before
                for item in single:
                    if "Sequence" in item:
                        side = after
                    else:
                        side += special[item["SpecialToken"]["id"]]["ids"]
            case {"type": "BertProcessing" | "RobertaProcessing", "cls": [str(), int(cls)], "sep": [str(), int(sep)]}:
                before, after = [*before, cls], [sep, *after]
            case _:
                raise UserError(
                    f"{path}: unknown post_processor {step['type']!r}; torchft knows TemplateProcessing and ByteLevel"
                )
    return tuple(before), tuple(after)
