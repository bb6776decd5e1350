"""What the user sees: a first panel, one line or a live bar while training, a last panel. Plain values in, text out.

On a terminal the bar is live; elsewhere (a file, a scheduler's log) each reported step is one plain line.
"""

import itertools
import shlex
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from torchft.redact import redact

Metrics = Mapping[str, float | int | str | None]

MIN_BAR = 4  # characters
SAMPLE_TOKENS = 600  # of the first sample, so that a long one does not fill the screen


def first_panel(
    console: Console,
    title: str,
    facts: Mapping[str, str],
    sample: Sequence[tuple[str, bool]],
    *,
    what: str = "are trained on",
) -> None:
    """Facts as two columns, then the first sample with its mask: each token's text, and whether they "are trained on",
    or ``what`` there is to say of them."""
    parts: list[RenderableType] = [_columns(facts)]
    if sample:
        trained = sum(is_trained for _, is_trained in sample)
        in_colour = console.color_system is not None
        how = ("green", "green") if in_colour else ("in « »", "")
        heading = ("\nfirst sample: ", "bold"), f"{trained} of {len(sample)} tokens {what} (", how, ")\n"
        parts += [Text.assemble(*heading), mask_text(sample, marks=not in_colour)]
    console.print(_panel(Group(*parts), title, "blue"))


def mask_text(sample: Sequence[tuple[str, bool]], *, marks: bool = False, limit: int = SAMPLE_TOKENS) -> Text:
    """Tokens as one text, trained ones green and the rest dim, or trained ones in « » (``marks``)."""
    text = Text()
    for is_trained, run in itertools.groupby(sample[:limit], key=lambda token: token[1]):
        tokens = "".join(_visible(token) for token, _ in run)
        text.append(f"«{tokens}»" if marks and is_trained else tokens, style="green" if is_trained else "dim")
    if len(sample) > limit:
        text.append(f" ... {len(sample) - limit} more tokens", style="italic dim")
    return text


def last_panel(console: Console, title: str, where: Mapping[str, str], commands: Mapping[str, Sequence[str]]) -> None:
    """Where everything is, and commands to copy: ``commands`` maps what one does to its argument list."""
    console.print(_panel(_columns(where), title, "green"))
    for purpose, arguments in commands.items():
        console.print(Text(f"# {purpose}", style="dim"))
        console.print(Text(shlex.join(arguments), style="bold"), soft_wrap=True)  # unbroken, so that it can be copied


def answers_table(console: Console, rows: Sequence[tuple[str, ...]], title: str) -> None:
    """Sample answers before and after training: (question, wanted answer, before, after). A run that went on has none
    from before."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", expand=False)
    knows_before = any(before for _, _, before, _ in rows)
    for name in ("question", "wanted", *["before"] * knows_before, "after"):
        table.add_column(name, overflow="fold")
    for question, want, before, after in rows:
        answers = [before, after] if knows_before else [after]
        colours = ["", "", *("green" if answer.strip() == want.strip() else "red" for answer in answers)]
        table.add_row(*(Text(_short(text), style=c) for text, c in zip((question, want, *answers), colours)))
    console.print(table)


class Steps:
    """Progress of the optimizer steps: a bar on a terminal, one line per ``update`` elsewhere.

    with Steps(console, total_steps, start=start) as progress:
        progress.update(step, {"loss": 1.2, "lr": 1e-4, "tokens_per_second": 5e4, "peak_memory_gib": 7.0})
    """

    def __init__(self, console: Console, total: int, *, start: int = 0) -> None:
        self._console, self._total, self._start = console, total, start
        self._began = time.perf_counter()
        self._room = console.width - len(f"step {total}/{total} {MIN_BAR * '-'}  0:00:00 left ")  # for the metrics
        columns: list[ProgressColumn] = [
            TextColumn("[bold]step[/] {task.completed}/{task.total}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=MIN_BAR)),
            TextColumn("{task.fields[metrics]}", table_column=Column(no_wrap=True)),
            _TimeLeft(self),
        ]
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal, expand=True)
        self._task = self._bar.add_task("", total=total, completed=start, metrics="")

    def __enter__(self) -> "Steps":
        self._began = time.perf_counter()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, step: int, metrics: Metrics) -> None:
        """``step`` optimizer steps are done. Knows the usual keys of a row of metrics.jsonl; others are left out."""
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, metrics=metrics_line(metrics, width=self._room))
        else:
            line = metrics_line(metrics)
            left = duration(self.seconds_left(step))
            self._console.print(f"step {step}/{self._total}  {line}  {left} left", highlight=False, soft_wrap=True)

    def seconds_left(self, step: int) -> float | None:
        """By this session's mean pace; None before its first step."""
        done = step - self._start
        return (time.perf_counter() - self._began) / done * (self._total - step) if done else None


class _TimeLeft(ProgressColumn):
    """Rich's own estimate forgets resumed steps and long pauses."""

    def __init__(self, steps: Steps) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._steps = steps

    def render(self, task: Task) -> Text:
        return Text(f"{duration(self._steps.seconds_left(int(task.completed)))} left", style="cyan")


def metrics_line(metrics: Metrics, *, width: int = 1000) -> str:
    """ "loss 1.2340  lr 1.0e-04  12.3k tok/s  7.1 GiB", of those that are there and, the important ones first, fit."""
    forms = {
        "loss": lambda v: f"loss {v:.4f}",
        "reward": lambda v: f"reward {v:.3f}",
        "margin": lambda v: f"margin {v:.3f}",
        "accuracy": lambda v: f"right {v:.0%}",
        "lr": lambda v: f"lr {v:.1e}",
        "grad_norm": lambda v: f"norm {v:.3f}",
        "tokens_per_second": lambda v: f"{count(v)} tok/s",
        "mfu": lambda v: f"mfu {100 * v:.0f}%",
        "peak_memory_gib": lambda v: f"{v:.1f} GiB",
    }
    parts = {key: form(metrics[key]) for key, form in forms.items() if metrics.get(key) is not None}
    for least in ("grad_norm", "mfu", "lr", "peak_memory_gib"):
        if len("  ".join(parts.values())) > width:
            parts.pop(least, None)
    return "  ".join(parts.values())


def count(n: float) -> str:
    """1234 -> 1.23k, 8.03e9 -> 8.03B; below 1000 as it is."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= size * 0.9995:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"


def duration(seconds: float | None) -> str:
    """0:42, 12:03, 3:07:00, 2d 04:10:00; --:-- if unknown."""
    if seconds is None:
        return "--:--"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02}:{m:02}:{s:02}"
    return f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"


def _panel(content: RenderableType, title: str, colour: str) -> Panel:
    return Panel(content, title=Text(title, style="bold"), title_align="left", border_style=colour, padding=(1, 2))


def _columns(facts: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 3))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(Text(name), Text(redact(value)))
    return table


def _short(text: str, limit: int = 60) -> str:
    text = _visible(text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _visible(token: str) -> str:
    """Escapes what would move the cursor; a line break stays one, marked."""
    return "".join(
        "↵\n" if c == "\n" else c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in token
    )
