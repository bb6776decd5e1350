"""Our training step beside the peers' on one GPU; prints the tables of README and docs/performance.md.

    python benchmarks/compare.py --results out/compare.jsonl                   # runs what the file does not have yet
    python benchmarks/compare.py --results out/compare.jsonl --budget-s 540    # as much as fits; call it again
    python benchmarks/compare.py --results out/compare.jsonl --budget-s 0      # only the tables

Each run is a process of its own: benchmarks/train_step.py or benchmarks/peers.py (rows: benchmarks/compare_rows.py).
A run that fails stands in the tables with its reason; --retry-failed tries it again.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from compare_rows import ROWS, Row, Run

ROOT = Path(__file__).parents[1]

Result = dict[str, Any]  # the run's JSON line with "command", "date" and "wall_s", or with "error" in its place


def execute(command: str, timeout_s: float) -> Result:
    """Runs a command in the repository; its JSON line, or {"error": reason}. Raises TimeoutExpired."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": str(Path(tempfile.gettempdir(), "unsloth_compiled_cache")),  # not in the checkout
    }
    done = subprocess.run(
        [sys.executable, *shlex.split(command)], cwd=ROOT, env=env, timeout=timeout_s, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    return {"error": reason(done.stderr, done.returncode)}


def reason(stderr: str, returncode: int) -> str:
    """One line on why a process failed."""
    if "OutOfMemoryError" in stderr or "out of memory" in stderr:
        return "out of memory"
    last = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "no output")
    return f"exit code {returncode}: {last[:200]}"


def planned(rows: Iterable[Row], only: str) -> list[Run]:
    """The runs of rows whose name, or whose command, contains ``only``; the important ones first, each once."""
    runs = {run.command: run for row in rows for run in row.runs if only in row.work or only in run.command}
    return sorted(runs.values(), key=lambda run: run.rank)


def read_results(path: Path) -> dict[str, Result]:
    """Results by command; of two, the later."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {result["command"]: result for line in lines if (result := json.loads(line))}


def run_all(
    runs: Iterable[Run],
    path: Path,
    *,
    budget_s: float,
    retry_failed: bool = False,
    run_command: Callable[[str, float], Result] = execute,
) -> None:
    """Runs what ``path`` lacks and appends a line for each; stops where the next run would not end in time."""
    began = time.monotonic()
    have = read_results(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for run in runs:
        if run.command in have and not (retry_failed and "error" in have[run.command]):
            continue
        left = budget_s - (time.monotonic() - began)
        if left < run.cost_s:
            print(f"stopped: {run.command} takes about {run.cost_s} s and {max(left, 0):.0f} s are left", flush=True)
            return
        print(f"{run.command} ...", end=" ", flush=True)
        started = time.monotonic()
        try:
            result = run_command(run.command, min(left, 6 * run.cost_s))
        except subprocess.TimeoutExpired as e:
            if left < 6 * run.cost_s:  # it may be healthy: a call with more time left shall see
                print("stopped by --budget-s", flush=True)
                return
            result = {"error": f"not done after {e.timeout:.0f} s"}
        wall = round(time.monotonic() - started, 1)
        result |= {"command": run.command, "date": time.strftime("%Y-%m-%d"), "wall_s": wall}
        with open(path, "a") as file:
            file.write(json.dumps(result) + "\n")
        print(
            result.get("error") or f"{result['tokens_per_second']:,} tok/s, {result['peak_memory_gib']} GiB", flush=True
        )


def best(row: Row, results: Mapping[str, Result], *, is_ours: bool) -> Result | None:
    """The best run of one side: within the memory limit if there is one, else the best of all; None if none worked."""
    found = [results[r.command] for r in row.runs if r.command in results and (r.who == "torchft") == is_ours]
    found = [result for result in found if row.measure in result]
    fits = [r for r in found if row.limit_gib is None or r["peak_memory_gib"] <= row.limit_gib]
    sign = -1 if row.measure.endswith("_s") else 1
    return max(fits or found, key=lambda result: sign * result[row.measure], default=None)


def summary_table(rows: Iterable[Row], results: Mapping[str, Result]) -> str:
    """Markdown: each row's best peer and ours; [n] points into ``runs_table``."""
    numbers = {command: n for n, command in enumerate(results, start=1)}

    def cell(row: Row, is_ours: bool) -> str:
        result = best(row, results, is_ours=is_ours)
        runs = [r for r in row.runs if (r.who == "torchft") == is_ours]
        if result is None:
            failed = [numbers[r.command] for r in runs if r.command in results]
            return "failed " + " ".join(f"[{n}]" for n in failed) if failed else "not run" if runs else "-"
        who = "" if is_ours else next(r.who for r in runs if r.command == result["command"]) + " "
        value, memory = result[row.measure], result["peak_memory_gib"]
        over = "**over**, " if row.limit_gib and memory > row.limit_gib else ""
        number = f"{value:,.1f} s" if row.measure.endswith("_s") else f"{value:,}"
        return f"{who}{number} ({over}{memory:.1f} GiB) [{numbers[result['command']]}]"

    def ratio(row: Row) -> str:
        theirs, us = (best(row, results, is_ours=is_ours) for is_ours in (False, True))
        if theirs is None or us is None:
            return "-"
        quotient = us[row.measure] / theirs[row.measure]
        return f"{1 / quotient if row.measure.endswith('_s') else quotient:.2f}x"

    lines = ["| work | memory limit | best peer | torchft | goal | torchft / peer |", "|---|---|---|---|---|---|"]
    for row in rows:
        limit = f"{row.limit_gib:g} GiB" if row.limit_gib else "-"
        lines.append(f"| {row.work} | {limit} | {cell(row, False)} | {cell(row, True)} | {row.goal} | {ratio(row)} |")
    return "\n".join(lines)


def runs_table(results: Mapping[str, Result]) -> str:
    """Markdown: every run with its command and numbers, failed ones with the reason."""
    lines = ["| | `python ...` | tok/s | MFU | peak GiB | first step s | date |", "|---|---|---|---|---|---|---|"]
    for n, (command, r) in enumerate(results.items(), start=1):
        if "error" in r:
            numbers = f"{r['error'].replace('|', '/')} | | |"
        else:
            mfu = "-" if r["mfu"] is None else f"{r['mfu']:.3f}"
            numbers = f"{r['tokens_per_second']:,} | {mfu} | {r['peak_memory_gib']:.1f} | {r['first_step_s']:.1f}"
        lines.append(f"| {n} | `{command}` | {numbers} | {r['date']} |")
    return "\n".join(lines)


def provenance(results: Mapping[str, Result]) -> str:
    """Devices and versions that the runs report, in one line each."""
    devices, versions = set[str](), set[str]()
    for r in results.values():
        devices |= {r["device"]} if "device" in r else set()
        packages = {"torch": r["torch"]} | r.get("versions", {}) if "torch" in r else {}
        versions |= {f"{name} {version}" for name, version in packages.items()}
    return f"Device: {', '.join(sorted(devices))}.\nVersions: {', '.join(sorted(versions))}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("out/compare.jsonl"), help="one JSON line per run")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="start nothing that would end later")
    parser.add_argument("--only", default="", help="part of a row's name or of a command")
    parser.add_argument("--max-rank", type=int, default=1, help="0: the decisive runs, 1: close rivals too, 2: all")
    parser.add_argument("--retry-failed", action="store_true")
    parser.add_argument("--plan", action="store_true", help="print the runs and their costs, run nothing")
    given = parser.parse_args()

    runs = [run for run in planned(ROWS, given.only) if run.rank <= given.max_rank]
    if given.plan:
        for run in runs:
            print(f"{run.rank} {run.cost_s:4d} s  {run.command}")
        print(f"{sum(run.cost_s for run in runs) / 60:.1f} minutes in all")
        return
    run_all(runs, given.results, budget_s=given.budget_s, retry_failed=given.retry_failed)
    results = read_results(given.results)
    print(summary_table(ROWS, results), runs_table(results), provenance(results), sep="\n\n")


if __name__ == "__main__":
    main()
