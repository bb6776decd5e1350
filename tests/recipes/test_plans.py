"""What both recipes do alike: the plan of `recompute` (after the data is checked, kept in checkpoints), signals."""

import json
from dataclasses import replace

import pytest
from letters import turns, write_jsonl
from recipe_runs import conversations, digests, interrupted, largest_difference, losses, rows, weights

from torchft.errors import UserError
from torchft.training import recompute
from torchft.training.interrupt import Stopped
from torchft.training.metrics import read_rows
from torchft.training.shards import TensorFolder


@pytest.fixture(params=["lora", "full"])
def run(request, lora, full):
    return {"lora": lora, "full": full}[request.param]


def test_bad_data_is_told_before_the_model_is_loaded(run, tmp_path, monkeypatch):
    def build_model(*_):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(run.args[0], "build_model", build_model)
    good, empty = write_jsonl(tmp_path / "good.jsonl", conversations(4)), write_jsonl(tmp_path / "empty.jsonl", [])
    silent = [{"messages": [{**m, "train": False} for m in turns("a", "b")["messages"]]}]
    silent = write_jsonl(tmp_path / "silent.jsonl", silent)
    for options in (
        [f"dataset.source={silent}"],
        [f"dataset_eval={{_component_: torchft.data.datasets.chat, source: {silent}}}"],
        [f"exact_match.source={empty}"],
        [f"exact_match.source={tmp_path / 'none.jsonl'}"],
    ):
        with pytest.raises(UserError):
            run(tmp_path / "run", f"dataset.source={good}", *options)


def test_a_resumed_run_keeps_its_plan(run, tmp_path, monkeypatch, no_picture):
    """To the bit, where the memory free now would have it take other rows."""
    recipe, seen = run.args[0], []
    plans, free = recipe.plans, 1

    def chosen(*args, keep, **given):
        seen.append(keep)
        return [replace(plan, rows=keep["rows"] if keep else free) for plan in plans(*args, **given)]

    monkeypatch.setattr(recipe, "plans", chosen)
    options = ["batch_size=4", "gradient_accumulation_steps=1", "save_every=1"]
    whole = run(tmp_path / "whole", *options)
    with interrupted(monkeypatch, 2):
        run(tmp_path / "parts", *options)
    free = 4
    parts = run(tmp_path / "parts", *options)
    assert seen == [None, None, {"budget": None, "share": 0.0, "offload": False, "rows": 1}]
    assert (rows(parts), digests(parts)) == (rows(whole), digests(whole))


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_blocks_meet_one_shape(run, tmp_path, monkeypatch, no_picture, packed):
    """In training and in evaluation, whatever the rows of an epoch; and nothing is trained or counted more."""
    recipe, shapes = run.args[0], set()
    nll_sum = recipe.nll_sum

    def seen(hidden, project, *, labels, **known):
        shapes.add(tuple(labels.shape))
        return nll_sum(hidden, project, labels=labels, **known)

    monkeypatch.setattr(recompute, "compile_blocks", lambda *args, **kwargs: None)
    held_out = write_jsonl(tmp_path / "eval.jsonl", conversations(4, seed=1))
    options = [f"packed={packed}", "batch_size=3", f"dataset_eval.source={held_out}"]
    options += ["dataset_eval._component_=torchft.data.datasets.chat"]
    eager = run(tmp_path / "eager", *options)
    monkeypatch.setattr(recipe, "nll_sum", seen)
    filled = run(tmp_path / "filled", *options, "compile=true")
    assert shapes == {(3, 128)}
    assert (losses(filled) - losses(eager)).abs().max() < 1e-5
    for ours, plain in zip(rows(filled), rows(eager), strict=True):
        assert ours["supervised_tokens"] == plain["supervised_tokens"]
        assert ours["tokens"] % 128 == 0 and (not packed or ours["tokens"] == plain["tokens"])
    assert sum(row["tokens"] for row in rows(filled)) == 128 * 13 * 2 or packed
    assert rows(filled)[-1]["eval_loss"] == pytest.approx(rows(eager)[-1]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("signal", ["term", "int"])
def test_a_signal_ends_the_run_after_the_step_with_all_saved(run, tmp_path, monkeypatch, capsys, no_picture, signal):
    whole = run(tmp_path / "whole")
    monkeypatch.setenv("TORCHFT_FAULT", f"before_step:{signal}:0:2")  # while the third step is under way
    with pytest.raises(Stopped) as stopped:
        run(tmp_path / "parts")
    assert stopped.value.code == 0 and "Stopped after step 3" in capsys.readouterr().out
    folder = tmp_path / "parts"
    assert [p.name for p in folder.glob("step_*")] == ["step_000003"] and not (folder / "export").exists()
    assert json.loads((folder / "run.json").read_text())["starts"][-1]["status"] == "stopped"
    monkeypatch.delenv("TORCHFT_FAULT")
    parts = run(folder)
    assert (rows(parts), digests(parts)) == (rows(whole), digests(whole))


def test_a_signal_in_the_last_step_changes_nothing(run, tmp_path, monkeypatch, no_picture):
    last = rows(run(tmp_path / "whole"))[-1]["step"] - 1
    monkeypatch.setenv("TORCHFT_FAULT", f"before_step:term:0:{last}")
    assert (run(tmp_path / "run") / "export").exists()


def test_n1_a_step_that_is_not_finite_leaves_no_trace(run, tmp_path, monkeypatch, no_picture):
    """One NaN among the micro-steps of the second step: left out as a whole, counted, and all goes on."""
    recipe, calls = run.args[0], []
    nll_sum = recipe.nll_sum

    def poisoned(*args, **given):
        calls.append(1)
        return nll_sum(*args, **given) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(recipe, "nll_sum", poisoned)
    with pytest.raises(UserError, match=r"step 2: loss nan.*not finite"):
        run(tmp_path / "stops")
    calls.clear()
    found = run(tmp_path / "skips", "guard.not_finite=skip", "save_every=1", "keep_last=9", "max_steps=3")
    steps = [
        {name: TensorFolder(found / f"step_{i:06}" / "model").read(name) for name in weights(found)} for i in (1, 2)
    ]
    assert largest_difference(*steps) == 0
    assert losses_or_null(found)[1] is None and all(loss is not None for loss in losses_or_null(found)[::2])
    assert [row.get("skipped_steps") for row in read_rows(found / "metrics.jsonl")] == [None, 1, 1]


def losses_or_null(folder):
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl")]
