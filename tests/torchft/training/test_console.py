"""Panels and progress, read back as text: on a terminal, in a file, with hostile strings."""

import io
import re

import pytest
from rich.console import Console

from torchft.training.console import (
    Steps,
    answers_table,
    count,
    duration,
    first_panel,
    last_panel,
    mask_text,
    metrics_line,
)

SAMPLE = [("<|user|>", False), ("2 + 2\n", False), ("4", True), ("<|end|>", True), (" rest", False)]
ROW = {
    "loss": 1.2345678,
    "lr": 1e-4,
    "grad_norm": 0.5,
    "tokens_per_second": 51234.0,
    "mfu": None,
    "peak_memory_gib": 7.1,
}


def plain(width=100):
    return Console(file=io.StringIO(), width=width)


def terminal(width=100):
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system="standard")


def test_mask_colours_exactly_the_trained_tokens():
    text = mask_text(SAMPLE)
    assert text.plain == "<|user|>2 + 2↵\n4<|end|> rest"
    green = "".join(text.plain[span.start : span.end] for span in text.spans if span.style == "green")
    assert green == "4<|end|>"


def test_mask_is_marked_where_there_is_no_colour():
    console = plain()
    first_panel(console, "x", {}, SAMPLE)
    assert "2 of 5 tokens are trained on" in console.file.getvalue() and "«4<|end|>» rest" in console.file.getvalue()


def test_long_samples_are_cut():
    assert mask_text([("a", False)] * 1000, limit=3).plain == "aaa ... 997 more tokens"


def test_text_of_others_neither_styles_nor_moves_the_cursor():
    console = terminal()
    evil = "[bold red]x[/] [/nothing] \x1b[2J \r \x00 \u202e"
    first_panel(console, evil[:26], {"model": evil[:26]}, [(evil, True)])
    out = console.file.getvalue()
    assert "\x1b[2J" not in out and "\r" not in out and "\x00" not in out and "\u202e" not in out
    assert out.count("[bold red]x[/]") == 3


def test_s9_facts_are_redacted():
    console = plain()
    first_panel(console, "x", {"data": "https://me:pw1234567@host/x hf_" + "a" * 34}, [])
    assert "pw1234567" not in console.file.getvalue() and "aaaa" not in console.file.getvalue()


def test_a_run_that_went_on_has_no_column_of_answers_from_before():
    for before in ("", "yes"):
        console = plain()
        answers_table(console, [("Is it?", "no", before, "no")], "Held out")
        head = console.file.getvalue().splitlines()
        assert any("wanted" in line and ("before" in line) == bool(before) for line in head)


def test_commands_are_whole_lines_that_a_shell_reads_back():
    import shlex

    console = plain(width=40)
    arguments = ["tune", "run", "generate", "checkpoint_dir=/tmp/out/a very long name/export", "prompt=it's $HOME"]
    last_panel(console, "done", {"adapter": "/tmp/out"}, {"use it": arguments})
    assert arguments in [shlex.split(line, comments=True) for line in console.file.getvalue().splitlines()[5:]]


def test_one_plain_line_per_update_without_a_terminal():
    console = plain(width=40)
    with Steps(console, 10, start=4) as progress:
        progress.update(5, ROW)
        progress.update(6, ROW)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"step 5/10  loss 1.2346  lr 1.0e-04  norm 0.500  51.2k tok/s  7.1 GiB  0:00 left", lines[0])


@pytest.mark.parametrize("width", [60, 80, 140])
def test_bar_stays_on_one_line(width):
    console = terminal(width)
    with Steps(console, 1000) as progress:
        progress.update(999, ROW)
        progress._bar.refresh()
    out = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    last = re.split(r"[\r\n]+", out.strip())[-1]
    assert last.startswith("step 999/1000 ━") and last.endswith("left") and "loss 1.2346" in last and len(last) <= width
    assert ("lr 1.0e-04" in last) == (width >= 80) and ("norm" in last) == (width >= 140)


def test_time_left_counts_only_this_session(monkeypatch):
    clock = iter([0.0, 100.0, 130.0])
    monkeypatch.setattr("torchft.training.console.time.perf_counter", lambda: next(clock))
    with Steps(plain(), 100, start=50) as progress:  # the clock starts on entry, at 100 s
        assert progress.seconds_left(50) is None
        assert progress.seconds_left(60) == pytest.approx(3.0 * 40)


def test_numbers():
    assert [count(n) for n in (0, 7.5, 999, 1000, 12_345, 999_960, 1.24e9, 8.03e12)] == (
        ["0", "7.5", "999", "1k", "12.3k", "1M", "1.24B", "8.03T"]
    )
    assert [duration(s) for s in (None, 0.4, 42, 723, 11_220, 187_801)] == (
        ["--:--", "0:00", "0:42", "12:03", "3:07:00", "2d 04:10:01"]
    )
    assert metrics_line({"loss": 1.0, "other": 3}) == "loss 1.0000" and metrics_line({}) == ""
