"""What a post-processor of tokenizer.json puts around a text, and between the two of a pair."""

from pathlib import Path
from typing import Any, NamedTuple

from torchft.errors import UserError


class Around(NamedTuple):
    """The ids that stand before a text, after it, and between the two texts of a pair."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    between: tuple[int, ...] | None  # None: a pair has others before and after it


def affixes(node: Any, path: Path) -> Around:
    """What a post-processor says."""
    around = Around((), (), ())
    for step in node["processors"] if node and node["type"] == "Sequence" else [node]:
        match step:
            case None | {"type": "ByteLevel"}:
                pass
            case {"type": "TemplateProcessing", "single": list(single), "special_tokens": special}:
                before, after = _cut(single, special)
                parts = _cut(step.get("pair") or [], special)
                fits = len(parts) == 3 and (parts[0], parts[2]) == (before, after)
                around = Around(before, after, parts[1] if fits else None)
            case {"type": "BertProcessing" | "RobertaProcessing" as kind, "cls": [_, int(cls)], "sep": [_, int(sep)]}:
                around = Around((cls,), (sep,), (sep,) if kind == "BertProcessing" else (sep, sep))
            case _:
                raise UserError(
                    f"{path}: unknown post_processor {step['type']!r}; torchft knows TemplateProcessing and ByteLevel"
                )
    return around


def _cut(template: list[dict[str, Any]], special: dict[str, Any]) -> list[tuple[int, ...]]:
    """The ids before, between and after the texts of a template."""
    parts: list[tuple[int, ...]] = [()]
    for item in template:
        if "Sequence" in item:
            parts.append(())
        else:
            parts[-1] += tuple(special[item["SpecialToken"]["id"]]["ids"])
    return parts
