"""One run per folder: locks, records, and what may change on resume. C.., K.., R.., S..: faults."""

import json
import os
import signal
import subprocess

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks

from torchft.errors import UserError
from torchft.training.run_folder import changes, open_run, redacted_command
from torchft.training.saver import save

CONFIG = "optimizer:\n  lr: 0.0001\n  betas: [0.9, 0.95]\nseed: 0\nmax_steps: 10\n"


def start(path, config=CONFIG, recipe="lora_finetune", **options):
    return open_run(path, config, recipe=recipe, command=["tune", "run"], **options)


def put(run, step=1):
    save(run.path, step, {"model": {"w": torch.ones(2)}}, run_id=run.id)


def open_with_another_rate(folder):
    dist.init_process_group("gloo")
    config = CONFIG.replace("0.0001", "0.0002") if dist.get_rank() else CONFIG
    words = r"rank 1 was started .* than rank 0: optimizer\.lr\. Start"
    with pytest.raises(UserError, match=words) as stop, start(folder, config):
        pass
    return stop.value.is_shared


def test_x12_another_config_on_one_rank_is_refused(tmp_path):
    assert run_ranks(open_with_another_rate, 2, tmp_path) == [True, True]
    assert not list(tmp_path.iterdir())


def record(path):
    return json.loads((path / "run.json").read_text())


def test_record_of_a_new_run_and_its_resume(tmp_path):
    with start(tmp_path, device="cpu") as first:
        assert first.is_new and record(tmp_path)["starts"][0]["status"] == "running"
        put(first)
    with start(tmp_path) as second:
        assert second.id == first.id and not second.is_new and not second.config_changed
    written = record(tmp_path)
    assert [s["status"] for s in written["starts"]] == ["finished", "finished"]
    begun = written["starts"][0]
    assert (
        begun["versions"]["torch"] == torch.__version__ and begun["command"] == "tune run" and begun["device"] == "cpu"
    )
    assert begun["started"] <= begun["ended"]
    assert (tmp_path / "config.yaml").read_text() == CONFIG


def test_failure_and_ctrl_c_are_recorded(tmp_path):
    with pytest.raises(RuntimeError), start(tmp_path):
        raise RuntimeError("device lost")
    assert record(tmp_path)["starts"][0]["error"] == "RuntimeError: device lost"
    with pytest.raises(KeyboardInterrupt), start(tmp_path):
        raise KeyboardInterrupt
    assert record(tmp_path)["starts"][-1]["status"] == "interrupted"


def test_without_a_checkpoint_a_run_starts_over(tmp_path):
    with start(tmp_path) as first:
        pass
    with start(tmp_path, CONFIG.replace("0.0001", "0.001")) as second:
        assert second.is_new and second.id != first.id


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("lr: 0.0001", "lr: 0.001", "optimizer.lr: 0.0001 -> 0.001"),
        ("0.95]", "0.999]", "optimizer.betas.1: 0.95 -> 0.999"),
        ("seed: 0", "seed: 1", "seed: 0 -> 1"),
        ("seed: 0", "seed: 0\nbatch_size: 4", r"batch_size: \(not set\) -> 4"),
    ],
)
def test_k19_changed_config_is_refused_unless_accepted(tmp_path, old, new, line):
    with start(tmp_path) as first:
        put(first)
    changed = CONFIG.replace(old, new)
    assert changed != CONFIG
    with pytest.raises(UserError, match=rf"{line}(.|\n)*resume=accept_changes"), start(tmp_path, changed):
        pass
    assert (tmp_path / "config.yaml").read_text() == CONFIG  # a refusal leaves no trace
    with start(tmp_path, changed, resume="accept_changes") as second:
        assert second.id == first.id and second.config_changed


def test_k19_changes_that_came_to_nothing_leave_the_old_config(tmp_path):
    """The command that the checkpoints are of goes on, until there is one of the other."""
    with start(tmp_path) as first:
        put(first)
    changed = CONFIG.replace("lr: 0.0001", "lr: 0.001")

    def fails(error, *, step=None):
        with start(tmp_path, changed, resume="accept_changes") as run:
            assert (tmp_path / "config.yaml").read_text() == changed
            if step:
                put(run, step=step)
            raise error

    for error in (UserError("lora_a has another shape"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fails(error)
        assert (tmp_path / "config.yaml").read_text() == CONFIG
    with start(tmp_path) as same:
        assert same.id == first.id and not same.config_changed
    with pytest.raises(KeyboardInterrupt):
        fails(KeyboardInterrupt(), step=2)
    assert (tmp_path / "config.yaml").read_text() == changed


@pytest.mark.parametrize("resume", ["auto", "accept_changes"])
def test_k19_another_recipes_run_is_not_continued(tmp_path, resume):
    with start(tmp_path) as first:
        put(first)
    with (
        pytest.raises(UserError, match="a run of lora_finetune, not of dpo; choose"),
        start(tmp_path, recipe="dpo", resume=resume),
    ):
        pass
    assert (tmp_path / "config.yaml").read_text() == CONFIG


def test_k19_free_keys_may_change(tmp_path):
    with start(tmp_path) as first:
        put(first)
    with start(tmp_path, CONFIG.replace("max_steps: 10", "max_steps: 20\nlog_every: 5")) as second:
        assert second.id == first.id and not second.config_changed
    assert changes({"metric_loggers": [{"project": "a"}]}, {"metric_loggers": []}) == []


def test_c15_resume_never_and_foreign_files(tmp_path):
    with start(tmp_path) as run:
        put(run)
    with pytest.raises(UserError, match=r"step_000001.*resume is 'never'"), start(tmp_path, resume="never"):
        pass
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text("mine: 1")
    with pytest.raises(UserError, match=r"holds config.yaml, but no run.json"), start(other):
        pass
    assert (other / "config.yaml").read_text() == "mine: 1"
    (other / "config.yaml").rename(other / "notes.yaml")
    with start(other) as run:  # files of no name of ours don't matter
        assert run.is_new


def test_c14_folders_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere"):
        with pytest.raises(UserError, match=r"cannot be written: .*choose a folder"), start(type(tmp_path)(bad)):
            pass
    with pytest.raises(UserError, match=r"write \$\{oc.env:SCRATCH\}"), start(tmp_path / "$SCRATCH"):
        pass
    inside = start(tmp_path / "base" / "out", checkpoint_dir=tmp_path / "base")
    with pytest.raises(UserError, match="lies inside checkpoint_dir"), inside:
        pass
    monkeypatch.setenv("HOME", str(tmp_path))
    with start(type(tmp_path)("~/größe und mehr")) as run:
        assert run.path == tmp_path / "größe und mehr"


def test_c14_read_only_disk(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("needs root, to mount a read-only disk")
    try:
        for path in (tmp_path, tmp_path / "new"):
            with pytest.raises(UserError, match="Read-only file system"), start(path):
                pass
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_k26_second_process_is_refused_and_a_killed_one_lets_go(tmp_path):
    ready, tell = os.pipe()
    if (child := os.fork()) == 0:
        with start(tmp_path):
            os.write(tell, b".")
            signal.pause()
    os.read(ready, 1)
    with pytest.raises(UserError, match=f"is in use by process {child} on"), start(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with start(tmp_path):
        assert record(tmp_path)["starts"][-1]["status"] == "running"


def test_r7_leftovers_are_cleaned_at_start(tmp_path):
    (tmp_path / ".step_000002.partial").mkdir()
    (tmp_path / ".export.partial").mkdir()
    (tmp_path / ".metrics.jsonl.77.tmp").write_text("half")
    with start(tmp_path):
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "config.yaml", "run.json"]


def test_s9_secrets_stay_out_of_the_command():
    secret = "hf_" + "a" * 34
    line = redacted_command(
        [
            "tune",
            "run",
            "x",
            f"a.hf_token={secret}",
            "l.api_key=1234567890abcdef",
            f"--u=https://me:{secret}@h/x",
            "seq_len=5",
        ]
    )
    assert secret not in line and "1234567890abcdef" not in line and "seq_len=5" in line and "l.api_key=" in line
