"""A preview as one HTML file without scripts and without anything from elsewhere."""

import html
from collections.abc import Iterator

from torchft.data.preview import Document, Preview, Token

STYLE = """
:root { --ink: #1c2430; --dim: #667085; --line: #e3e7ee; --paper: #ffffff; --back: #f5f7fa; --on: #c9f0d4;
  --on-ink: #0b4a22; --off: #49546a; --accent: #2f6fed; --pill: #e4e9f7; --bad: #9a5b00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --dim: #98a2b3; --line: #2b3240; --paper: #171b23;
  --back: #0f1218; --on: #14532d; --on-ink: #c7f7d6; --off: #98a2b3; --accent: #6ea0ff; --pill: #26304a;
  --bad: #f5b94a; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", "Open Sans",
  "DejaVu Sans", sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px }
h1 { font-size: 24px; margin: 0 } h2 { font-size: 16px; margin: 28px 0 10px }
.from { color: var(--dim); margin: 2px 0 24px; overflow-wrap: anywhere }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 12px }
.card, .row, .panel { background: var(--paper); border: 1px solid var(--line); border-radius: 10px }
.card { padding: 12px 16px } .card b { display: block; font-size: 22px; font-variant-numeric: tabular-nums }
.card span { color: var(--dim); font-size: 13px }
.panel { padding: 16px }
.warn { color: var(--bad) } ul { margin: 8px 0 0; padding-left: 20px }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums }
th { color: var(--dim); font-weight: 500; font-size: 13px; text-align: right; padding: 4px 0 8px 16px }
td { text-align: right; padding: 6px 0 6px 16px; border-top: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left; padding-left: 0; overflow-wrap: anywhere }
.share { display: inline-block; width: 120px; height: 8px; border-radius: 4px; background: var(--line);
  margin-left: 8px; overflow: hidden; vertical-align: 1px }
.share i { display: block; height: 100%; background: var(--accent) }
.bars { display: flex; align-items: flex-end; height: 90px; gap: 2px; border-bottom: 1px solid var(--line) }
.bars i { flex: 1; background: var(--accent); border-radius: 2px 2px 0 0; min-height: 1px }
.axis { display: flex; justify-content: space-between; color: var(--dim); font-size: 13px; margin-top: 4px }
.legend { color: var(--dim); font-size: 13px; margin: 0 0 12px }
.row { margin-bottom: 16px; overflow: hidden }
.row header { display: flex; gap: 16px; padding: 10px 16px; border-bottom: 1px solid var(--line); color: var(--dim);
  font-size: 13px } .row header b { color: var(--ink) }
.map { display: flex; height: 6px } .map i { background: var(--accent); border-right: 2px solid var(--paper) }
.map i:nth-child(even) { opacity: .55 } .map u { background: var(--line) }
.doc { padding: 12px 16px; border-top: 2px dashed var(--line) } .doc:first-of-type { border-top: 0 }
.where { color: var(--dim); font-size: 12px; margin-bottom: 6px; display: flex; justify-content: space-between;
  gap: 16px; overflow-wrap: anywhere }
.text { font: 13px/1.75 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere }
.text s { text-decoration: none; color: var(--off) }
.text b { font-weight: 400; background: var(--on); color: var(--on-ink); padding: 2px 0 }
.text .c { background: var(--pill); border-radius: 4px; padding: 0 3px; box-shadow: none; font-size: 12px }
.text b.c { background: var(--on); outline: 1px solid var(--on-ink) }
.pad { padding: 8px 16px; color: var(--dim); font-size: 12px; border-top: 2px dashed var(--line) }
#edges:checked ~ .rows .text > * { border-left: 1px solid var(--dim) }
label { cursor: pointer } #edges { vertical-align: -2px }
"""


def page(preview: Preview, *, title: str, source: str) -> str:
    """The whole file. ``source``: which config it is of."""
    s = preview.summary
    cards = {
        "steps": f"{preview.steps:,}",
        "tokens in all": short(preview.tokens),
        "samples": f"{s.samples:,}",
        "tokens supervised": f"{s.supervised_share:.1%}",
        "rows filled": f"{preview.fill:.1%}",
        "tokens, longest row": f"{s.longest:,}",
    }
    parts = [
        f"<h1>{_text(title)}</h1><p class=from>{_text(source)}</p>",
        "<div class=cards>" + "".join(f"<div class=card><b>{v}</b><span>{k}</span></div>" for k, v in cards.items()),
        "</div><h2>What the data holds</h2><div class=panel>",
        *_facts(preview),
        "</div><h2>Lengths of samples</h2><div class=panel>",
        *_histogram(preview),
        "</div><h2>The first rows</h2>",
        "<input type=checkbox id=edges> <label for=edges class=legend>show where tokens begin</label>",
        "<p class=legend>Point at a token for its id and place. ",
        "<span class=text><b>Green is trained</b>, <s>grey is only read</s>, <s class=c>&lt;control&gt;</s></span></p>",
        "<div class=rows>",
        *(_row(i, documents, padding) for i, (documents, padding) in enumerate(preview.rows, 1)),
        "</div>",
    ]
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{_text(title)}</title>"
    view = "<meta name=viewport content='width=device-width, initial-scale=1'>"
    return f"{head}{view}<style>{STYLE}</style><main>{''.join(parts)}</main></html>\n"


def short(n: float) -> str:
    """1,234 -> 1.23k"""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:g}"


def _facts(preview: Preview) -> Iterator[str]:
    s = preview.summary
    shown = "a stream; its first " if s.is_probe else ""
    yield f"{shown}{s.rows:,} rows became {s.samples:,} samples of {s.tokens:,} tokens"
    if s.sources:
        yield "<table><tr><th>source<th>weight<th>samples<th>tokens<th>supervised<th>share when mixed"
        for share in s.sources:
            part = share.of_all
            weight = "-" if share.weight is None else f"{share.weight:g}"
            bar = f"<span class=share><i style='width:{100 * part:.1f}%'></i></span>"
            trained = share.supervised / max(share.tokens, 1)
            yield f"<tr><td>{_text(share.name)}<td>{weight}<td>{share.samples:,}<td>{share.tokens:,}"
            yield f"<td>{trained:.1%}<td>{part:.1%}{bar}"
        yield "</table>"
    if s.warnings():
        yield "<ul class=warn>" + "".join(f"<li>{_text(line)}" for line in s.warnings()) + "</ul>"


def _histogram(preview: Preview) -> Iterator[str]:
    highest = max(count for _, _, count in preview.bars)
    yield "<div class=bars>"
    for first, last, count in preview.bars:
        yield f"<i style='height:{100 * count / highest:.1f}%' title='{first:,} to {last:,} tokens: {count:,}'></i>"
    yield f"</div><div class=axis><span>1</span><span>half of them at most {preview.median:,} tokens</span>"
    yield f"<span>{preview.bars[-1][1]:,}</span></div>"


def _row(number: int, documents: list[Document], padding: int) -> str:
    total = sum(len(document.tokens) for document in documents)
    trained = sum(token.is_trained for document in documents for token in document.tokens)
    sizes = "".join(f"<i style='flex:{len(document.tokens)}'></i>" for document in documents)
    padded = f"<div class=pad>{padding:,} tokens of padding</div>" if padding else ""
    what = f"{len(documents)} documents" if len(documents) > 1 else "1 document"
    return (
        f"<section class=row><header><b>row {number}</b><span>{what}</span><span>{total:,} tokens</span>"
        f"<span>{trained / max(total, 1):.0%} trained</span></header>"
        f"<div class=map>{sizes}<u style='flex:{padding}'></u></div>"
        f"{''.join(map(_document, documents))}{padded}</section>"
    )


def _document(document: Document) -> str:
    trained = sum(token.is_trained for token in document.tokens)
    role = f" ({document.role})" if document.role else ""
    count = f"{len(document.tokens):,} tokens, {trained:,} trained"
    tokens = "".join(_token(i, token) for i, token in enumerate(document.tokens))
    where = f"<div class=where><span>{_text(document.where)}{role}</span><span>{count}</span></div>"
    return f"<div class=doc>{where}<div class=text>{tokens}</div></div>"


def _token(place: int, token: Token) -> str:
    if not token.text:
        return ""
    tag, kind = "b" if token.is_trained else "s", " class=c" if token.is_control else ""
    return f"<{tag}{kind} title='{token.id} at {place}'>{_text(visible(token.text))}</{tag}>"


def visible(text: str) -> str:
    """The text with line breaks marked and what does not print escaped."""
    marked = text.replace("\n", "↵\n").replace("\t", "→\t")
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in marked)


def _text(text: str) -> str:
    return html.escape(text, quote=True)
