"""The comparison's runner and tables with a fake runner, and its peers' side against our model's own counts."""

import importlib
import json
import subprocess
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts_import_each_other(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def compare():
    return importlib.import_module("compare")


@pytest.fixture
def rows(compare):
    ours, slim, wide, fails = (
        compare.Run(who=who, arguments=arguments, cost_s=10, rank=rank)
        for who, arguments, rank in (
            ("torchft", "8b --recompute none", 0),
            ("unsloth", "lora --recompute full", 1),
            ("torchtune", "lora --recompute none", 0),
            ("hf", "lora --batch-size 99", 2),
        )
    )
    return (
        compare.Row(work="free", goal="≥ 1", runs=(ours, slim, wide, fails)),
        compare.Row(work="tight", goal="≥ 2", limit_gib=24, runs=(ours, slim, wide)),
        compare.Row(work="start", goal="≤ 3", measure="start_to_first_step_s", runs=(ours, slim, wide)),
        compare.Row(work="broken", goal="-", runs=(fails,)),
    )


SPEEDS = {"8b": (20000, 23.5, 9.0), "unsloth": (11000, 23.9, 12.5), "torchtune": (16000, 93.8, 15.0)}


def fake(command, timeout_s):
    for name, (speed, memory, start) in SPEEDS.items():
        if name in command:
            numbers = {"tokens_per_second": speed, "peak_memory_gib": memory, "start_to_first_step_s": start}
            return numbers | {"mfu": 0.5, "first_step_s": 4.0, "device": "GPU X", "torch": "2.11"}
    return {"error": "out of memory"}


def test_best_within_the_limit_stands_in_the_table(compare, rows, tmp_path):
    path = tmp_path / "results.jsonl"
    compare.run_all(compare.planned(rows, ""), path, budget_s=1000, run_command=fake)
    free, tight, start, broken = compare.summary_table(rows, compare.read_results(path)).splitlines()[2:]
    assert free == "| free | - | torchtune 16,000 (93.8 GiB) [2] | 20,000 (23.5 GiB) [1] | ≥ 1 | 1.25x |"
    assert tight == "| tight | 24 GiB | unsloth 11,000 (23.9 GiB) [3] | 20,000 (23.5 GiB) [1] | ≥ 2 | 1.82x |"
    assert start == "| start | - | unsloth 12.5 s (23.9 GiB) [3] | 9.0 s (23.5 GiB) [1] | ≤ 3 | 1.39x |"
    assert broken == "| broken | - | failed [4] | - | - | - |"


def test_a_peer_over_the_limit_is_marked_not_dropped(compare, rows, tmp_path, monkeypatch):
    monkeypatch.setitem(SPEEDS, "unsloth", (11000, 24.1, 12.5))
    compare.run_all(compare.planned(rows, ""), path := tmp_path / "r", budget_s=1000, run_command=fake)
    tight = compare.summary_table(rows, compare.read_results(path)).splitlines()[3]
    assert "torchtune 16,000 (**over**, 93.8 GiB)" in tight


def test_every_run_is_listed_with_command_and_reason(compare, rows, tmp_path):
    compare.run_all(compare.planned(rows, ""), path := tmp_path / "r", budget_s=1000, run_command=fake)
    results = compare.read_results(path)
    table = compare.runs_table(results)
    assert "| 2 | `benchmarks/peers.py torchtune lora --recompute none` | 16,000 | 0.500 | 93.8 | 4.0 |" in table
    assert "| 4 | `benchmarks/peers.py hf lora --batch-size 99` | out of memory | | | |" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert compare.provenance(results) == "Device: GPU X.\nVersions: torch 2.11."


def test_done_runs_are_skipped_and_failed_ones_only_on_request_repeated(compare, rows, tmp_path):
    path, calls = tmp_path / "r", []

    def counting(command, timeout_s):
        calls.append(command)
        return fake(command, timeout_s)

    runs = compare.planned(rows, "")
    assert [run.rank for run in runs] == [0, 0, 1, 2]
    compare.run_all(runs[:2], path, budget_s=1000, run_command=counting)
    compare.run_all(runs, path, budget_s=1000, run_command=counting)
    assert calls == [run.command for run in runs]
    compare.run_all(runs, path, budget_s=1000, retry_failed=True, run_command=counting)
    assert calls[4:] == ["benchmarks/peers.py hf lora --batch-size 99"]


def test_budget(compare, rows, tmp_path):
    """Nothing starts that would not end in time, and a healthy run cut short is not recorded as failed."""
    path = tmp_path / "r"
    compare.run_all(compare.planned(rows, ""), path, budget_s=9, run_command=fake)
    assert compare.read_results(path) == {}

    def slow(command, timeout_s):
        raise subprocess.TimeoutExpired(command, timeout_s)

    compare.run_all(compare.planned(rows, ""), path, budget_s=50, run_command=slow)
    assert compare.read_results(path) == {}
    compare.run_all(compare.planned(rows, ""), path, budget_s=1000, run_command=slow)
    assert {r["error"] for r in compare.read_results(path).values()} == {"not done after 60 s"}


def test_only_selects_by_row_or_command(compare, rows):
    assert [run.who for run in compare.planned(rows, "torchtune")] == ["torchtune"]
    assert [run.who for run in compare.planned(rows, "tight")] == ["torchft", "torchtune", "unsloth"]


@pytest.mark.parametrize(
    ("code", "result"),
    [
        ("""print('noise'); print('{"tokens_per_second": 5}')""", {"tokens_per_second": 5}),
        ("raise RuntimeError('no such flag')", {"error": "exit code 1: RuntimeError: no such flag"}),
        ("raise MemoryError('CUDA out of memory. Tried')", {"error": "out of memory"}),
        ("""import sys; print('{"a": 1}'); sys.exit(3)""", {"error": "exit code 3: no output"}),
    ],
)
def test_a_process_becomes_a_result(compare, code, result):
    assert compare.execute(f"-c {json.dumps(code)}", 60) == result


def test_peers_accept_the_arguments_of_every_row(compare):
    peers = importlib.import_module("peers")
    for run in compare.planned(compare.ROWS, ""):
        if run.who != "torchft":
            peers.parse([run.who, *run.arguments.split()])
    with pytest.raises(SystemExit):
        peers.parse(["hf", "lora", "--recompute", "offload"])


@pytest.mark.parametrize(
    ("shape", "name"), [("8b", "llama3/Llama-3.1-8B"), ("3b", "llama3/Llama-3.2-3B"), ("1b", "llama3/Llama-3.2-1B")]
)
@pytest.mark.parametrize("work", ["lora", "full"])
def test_peers_are_given_the_flops_of_our_model(shape, name, work):
    from torchft import models
    from torchft.adapters.lora import LoRAConfig, apply_lora
    from torchft.training.meter import training_flops

    peers = importlib.import_module("peers")
    model = models.build(name)
    if work == "lora":
        apply_lora(model, LoRAConfig(rank=peers.RANK, alpha=2 * peers.RANK))
    assert peers.model_flops(shape, work, 2048) == training_flops(model, seq_len=2048)
