"""``tune ls``: what it shows, and how fast."""

import time


def test_table(library, tune):
    (library / "configs" / "demo" / "other.yaml").write_text("lr: 1\nrecipe: 'stub'\n")
    (library / "configs" / "demo" / "shared.yaml").write_text("lr: 1\n")
    code, out, err = tune("ls")
    assert (code, err) == (0, "")
    assert out.splitlines()[:6] == [
        "RECIPE         CONFIG",
        "dpo            tiny/dpo",
        "stub           demo/other",
        "               demo/stub",
        "(any recipe)   demo/shared",
        "",
    ]
    assert "  stub           Print the config. For tests." in out


def test_under_one_second(python):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert python("-m", "torchft.cli.main", "ls").returncode == 0
        times.append(time.perf_counter() - start)
    assert min(times) < 1  # measured: 0.1 s
