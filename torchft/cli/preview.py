"""``tune preview``: what a config would train on, token by token, before anything is loaded on a device."""

from pathlib import Path

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from torchft import registry, shipped
from torchft.cli.arguments import Parser
from torchft.cli.run import find
from torchft.config_load import load
from torchft.data.preview import Preview, look
from torchft.data.preview_page import page, short
from torchft.data.stream_loader import open_loader
from torchft.errors import UserError
from torchft.redact import redact
from torchft.tokenizers import load as load_tokenizer
from torchft.training.console import mask_text

BLOCKS = " ▁▂▃▄▅▆▇█"


def main(arguments: list[str]) -> None:
    """``tune preview [RECIPE] --config CONFIG [-n ROWS] [--html FILE] [key=value ...]``"""
    parser = Parser("preview", "Show what a config trains on: its first rows with their mask, and what they add up to.")
    parser.add_argument("--config", metavar="CONFIG", required=True, help="name (`tune ls`) or YAML file")
    parser.add_argument("-n", metavar="ROWS", type=int, default=3, help="rows to show (3)")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write one HTML file instead, for a browser")
    parser.add_argument("--devices", metavar="N", type=int, default=1, help="how many will share a step (1)")
    trust = "your own package, whose classes and functions the config may name"
    parser.add_argument("--trust", metavar="PACKAGE", action="append", default=[], help=trust)
    parser.add_argument("words", nargs="*", metavar="RECIPE key=value", help="recipe, if the config does not say it")
    given = parser.parse(arguments)
    if given.n < 1 or given.devices < 1:
        raise UserError(f"-n {given.n} and --devices {given.devices} must be at least 1")
    file = shipped.find_config(given.config)
    has_name = bool(given.words) and "=" not in given.words[0] and not given.words[0].startswith("~")
    name = given.words[0] if has_name else shipped.recipe_of(file)
    if name is None:
        raise UserError(f"{file} has no 'recipe: NAME' line; name the recipe: tune preview RECIPE --config ...")
    for package in given.trust:
        registry.trust(package)
    script, _ = find(name)
    recipe = next((known for known, path in shipped.recipes().items() if path == script), script.stem)
    module = vars(shipped.load_recipe(recipe))
    config = load(module["Config"], recipe=recipe, file=file, overrides=given.words[has_name:])
    if "build_data" not in module:
        raise UserError(f"{recipe} makes its samples while it trains, so there is nothing to preview")

    tokenizer = load_tokenizer(config.checkpoint_dir, chat_format=config.chat_format)
    data, _, summary = module["build_data"](config, tokenizer)
    how = {"batch_size": config.batch_size, "seed": config.seed, "packed": config.packed}
    loader = open_loader(data, num_ranks=given.devices, **how)
    preview = look(
        loader,
        summary,
        tokenizer,
        num_rows=given.n,
        micro_steps=config.gradient_accumulation_steps,
        epochs=config.epochs,
        max_steps=config.max_steps,
    )
    loader.close()
    if given.html:
        try:
            given.html.write_text(
                redact(page(preview, title=f"Data of {file.stem}", source=f"{recipe}, {given.config}"))
            )
        except OSError as e:
            raise UserError(f"--html {given.html}: {e.strerror}") from None
        print(f"{given.html}: {len(preview.rows)} rows, {preview.steps:,} steps, {short(preview.tokens)} tokens")
    else:
        show(preview, Console())


def show(preview: Preview, console: Console) -> None:
    """The preview on a terminal: rows with trained tokens green, or in « » without colours."""
    for i, (documents, padding) in enumerate(preview.rows, 1):
        console.print(Rule(f"row {i}", style="dim"))
        for document in documents:
            trained = sum(token.is_trained for token in document.tokens)
            counts = f"{len(document.tokens)} tokens, {trained} trained"
            role = f", {document.role}" if document.role else ""
            console.print(Text(f"┌ {redact(document.where)}{role}: {counts}", style="cyan"))
            pairs = [(token.text, token.is_trained) for token in document.tokens]
            console.print(mask_text(pairs, marks=console.color_system is None))
        if padding:
            console.print(Text(f"└ {padding} tokens of padding", style="dim"))
    console.print(Rule(style="dim"))
    table = Table.grid(padding=(0, 3))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for fact, value in facts(preview).items():
        table.add_row(Text(fact), Text(redact(value)))
    console.print(table)


def facts(preview: Preview) -> dict[str, str]:
    highest = max(count for _, _, count in preview.bars)
    bars = "".join(BLOCKS[-(-count * 8 // highest)] for _, _, count in preview.bars)
    return {
        "data": "\n".join(preview.summary.lines()),
        "lengths": f"1 {bars} {preview.bars[-1][1]:,} tokens; half of the samples at most {preview.median:,}",
        "rows": f"{preview.rows_per_step:,} per step, {preview.fill:.1%} filled",
        "run": f"{preview.steps:,} steps, about {short(preview.tokens)} tokens",
    }
