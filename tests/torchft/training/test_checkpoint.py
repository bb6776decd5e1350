"""Step folders: whole or absent, whatever happens; K.., R.. and S.. are the ids of the fault catalogue."""

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch

from torchft.errors import UserError
from torchft.training import disk, fault
from torchft.training.checkpoint import best, clean, damage, latest, prune, steps
from torchft.training.saver import save

HERE = Path(__file__).parent


def parts(step, numel=100):
    return {"model": {"w": torch.full((numel,), float(step))}, "loader": {"row": step}}


def put(folder, step, run_id="r", **options):
    return save(folder, step, parts(step), run_id=run_id, **options)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def fails_at(monkeypatch, point, action):
    monkeypatch.setenv(fault.VARIABLE, f"{point}:{action}:0:*")


def killed_at(point, folder, step):
    """Saves ``step`` in a forked process that kills itself at ``point``."""
    if (child := os.fork()) == 0:
        os.environ[fault.VARIABLE] = f"{point}:kill:*:{step}"
        put(folder, step)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_round_trip_and_manifest(tmp_path):
    path = put(tmp_path, 100, base="b", score=0.5)
    assert names(tmp_path) == ["step_000100"] and names(path) == ["loader", "manifest.json", "model"]
    saved = latest(tmp_path, "r", base="b")
    assert saved.number == 100 and saved.read("loader") == {"row": 100}
    assert torch.equal(saved.read("model")["w"], torch.full((100,), 100.0))
    manifest = json.loads((path / "manifest.json").read_text())
    assert (
        manifest["run_id"] == "r" and manifest["step"] == 100 and manifest["format"] == 2 and manifest["score"] == 0.5
    )
    assert manifest["ranks"] == 1
    files = {str(p.relative_to(path)): p.stat().st_size for p in path.rglob("*") if p.is_file()}
    del files["manifest.json"]
    assert {name: f["size"] for name, f in manifest["files"].items()} == files
    digest = subprocess.run(["sha256sum", path / "model/index.json"], capture_output=True, text=True).stdout[:64]
    assert manifest["files"]["model/index.json"]["sha256"] == digest


def test_none_yet(tmp_path):
    assert latest(tmp_path, "r") is None


def test_numeric_order_beyond_six_digits(tmp_path):
    for step in (999_999, 1_000_000, 20):
        put(tmp_path, step)
    os.utime(tmp_path / "step_000020")  # R8: times are never used for order
    assert [s.number for s in steps(tmp_path, "r")] == [20, 999_999, 1_000_000]


def test_k1_random_kills():
    shm = Path("/dev/shm")  # a kill is no power cut: without real fsyncs there are more saves to hit
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        command = [sys.executable, HERE / "kill_loop.py", folder, "15"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) >= 10 and int(lines[-1].split()[0]) > 15
    assert any(".partial" in line for line in lines), "no kill hit a save: the test shows nothing"


@pytest.mark.parametrize("point", ["after_shard_write", "before_commit"])
def test_k2_killed_before_the_commit(tmp_path, point):
    put(tmp_path, 1)
    killed_at(point, tmp_path, 2)
    assert latest(tmp_path, "r").number == 1
    assert len(names(tmp_path)) == 2
    clean(tmp_path)
    assert names(tmp_path) == ["step_000001"]


def test_k3_killed_after_the_commit(tmp_path):
    put(tmp_path, 1)
    killed_at("after_commit", tmp_path, 2)
    assert [s.number for s in steps(tmp_path, "r") if not damage(s)] == [1, 2]
    prune(tmp_path, "r", newest=2, keep_last=1)
    assert names(tmp_path) == ["step_000002"]


def test_r7_leftovers_are_removed_and_their_size_said(tmp_path, caplog):
    put(tmp_path, 1)
    for name in (".step_000002.partial", ".step_000003.partial"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "rank_00000_000.safetensors").write_bytes(bytes(1 << 20))
    (tmp_path / ".step_000002.partial-notes").mkdir()
    with caplog.at_level(logging.WARNING):
        clean(tmp_path)
    assert names(tmp_path) == [".step_000002.partial-notes", "step_000001"]
    assert "removed 0.00196 GiB of unfinished checkpoints" in caplog.text


@pytest.mark.parametrize("action", ["enospc", "eio"])
def test_k5_k7_disk_errors_leave_the_last_good_step(tmp_path, monkeypatch, action):
    put(tmp_path, 1)
    fails_at(monkeypatch, "after_shard_write", action)
    with pytest.raises(UserError, match=r"step 2 could not be saved .* need .* GiB, have .* GiB at .*Free some space"):
        put(tmp_path, 2)
    assert names(tmp_path) == ["step_000001"] and latest(tmp_path, "r").number == 1


def test_k5_full_disk(tmp_path):
    """A real 4 MB disk: three checkpoints of 1 MB fit, none of 3 MB, and then one of 1 MB again."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("needs root, to mount a small disk")
    try:
        for step in (1, 2):
            save(small, step, parts(step, 250_000), run_id="r")
        with pytest.raises(UserError, match=r"No space left on device.*need 0.00279 GiB, have 0.00\d+ GiB at"):
            save(small, 3, parts(3, 750_000), run_id="r")
        assert names(small) == ["step_000001", "step_000002"] and latest(small, "r").number == 2
        two = {"fits": {"w": torch.ones(400_000)}, "does not": {"w": torch.ones(350_000)}}
        with pytest.raises(
            UserError, match=r"need 0.00279 GiB, have 0.0020\d* GiB at"
        ):  # as after what failed is removed
            save(small, 3, two, run_id="r")
        save(small, 3, parts(3, 250_000), run_id="r")
        assert latest(small, "r").number == 3
        with pytest.raises(UserError, match=r"a checkpoint does not fit: need 0.00931 GiB, have"):  # K6
            disk.check_space(small, 10_000_000, copies=2)
    finally:
        subprocess.run(["umount", small], check=True)


def test_k5_file_size_limit(tmp_path):
    put(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match="File too large"):
            save(tmp_path, 2, parts(2, 100_000), run_id="r")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert names(tmp_path) == ["step_000001"] and latest(tmp_path, "r").number == 1


def test_k6_space_for_one_but_not_all_is_a_warning(tmp_path, caplog):
    free = shutil.disk_usage(tmp_path).free
    with caplog.at_level(logging.WARNING):
        disk.check_space(tmp_path, free // 3, copies=2)
        assert not caplog.text
        disk.check_space(tmp_path, free // 2, copies=4)
    assert "4 checkpoints may not fit" in caplog.text


def test_k8_same_step_again_replaces_it(tmp_path):
    put(tmp_path, 5)
    save(tmp_path, 5, parts(6), run_id="r")
    assert names(tmp_path) == ["step_000005"] and latest(tmp_path, "r").read("loader") == {"row": 6}


def test_k8_killed_within_the_swap(tmp_path):
    put(tmp_path, 5)
    os.rename(tmp_path / "step_000005", tmp_path / ".step_000005.replaced")
    (tmp_path / ".step_000005.partial").mkdir()
    clean(tmp_path)
    assert names(tmp_path) == ["step_000005"] and latest(tmp_path, "r").number == 5


@pytest.mark.parametrize(
    "fault_id", ["K9 one byte", "K9 half", "K11 bit flip", "K12 missing", "index", "manifest", "html"]
)
def test_damaged_step_is_reported_and_passed_over(tmp_path, caplog, fault_id):
    put(tmp_path, 1)
    path = put(tmp_path, 2)
    file = path / "model" / "rank_00000_000.safetensors"
    data = bytearray(file.read_bytes())
    match fault_id:
        case "K9 one byte":
            file.write_bytes(data[:-1])
        case "K9 half":
            file.write_bytes(data[: len(data) // 2])
        case "K11 bit flip":
            data[-2] ^= 1
            file.write_bytes(data)
        case "K12 missing":
            file.unlink()
        case "index":
            (path / "model" / "index.json").write_text("{}")
        case "manifest":
            (path / "manifest.json").write_text('{"run_id": "r", ')
        case "html":
            file.write_bytes(b"<!DOCTYPE html>".ljust(len(data)))
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path, "r").number == 1
    assert "step_000002" in caplog.text
    shutil.rmtree(tmp_path / "step_000001")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole: restore one, or choose another output_dir"):
        latest(tmp_path, "r")  # never silently from scratch


def test_damaged_later_step_costs_no_good_one(tmp_path):
    """Resumed at 1 because 9 has a flipped bit: saving 2 and 3 must not make 9 count as the newest to keep."""
    put(tmp_path, 1)
    file = put(tmp_path, 9) / "model" / "index.json"
    file.write_bytes(file.read_bytes().swapcase())
    for step in (2, 3):
        put(tmp_path, step)
        prune(tmp_path, "r", newest=step, keep_last=1)
    assert names(tmp_path) == ["step_000003", "step_000009"] and latest(tmp_path, "r").number == 3


def test_k18_other_base_is_refused(tmp_path):
    put(tmp_path, 1, base="aaaa")
    with pytest.raises(UserError, match=r"other base weights \(fingerprint aaaa\) .* now \(bbbb\)"):
        latest(tmp_path, "r", base="bbbb")


def test_k23_planted_folders_are_ignored(tmp_path):
    put(tmp_path, 10)
    put(tmp_path, 900, run_id="other")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    real = put(elsewhere, 800)
    for name in ("step_000010-bak", "step_10", "step_0000100x", "astep_000700"):
        shutil.copytree(real, tmp_path / name)
    os.symlink(real, tmp_path / "step_000800")
    assert latest(tmp_path, "r").number == 10
    before = names(tmp_path)
    prune(tmp_path, "r", newest=10, keep_last=1)
    assert names(tmp_path) == before


def test_s11_folders_in_the_way_are_moved_not_deleted(tmp_path, caplog):
    """Another run's step, a link out of the folder, and a user's folder bear the name to be written."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    real = put(elsewhere, 3)
    out = tmp_path / "out"
    out.mkdir()
    put(out, 2, run_id="other")
    os.symlink(real, out / "step_000003")
    (out / "step_000004").mkdir()
    (out / "step_000004" / "notes.txt").write_text("mine")
    with caplog.at_level(logging.WARNING):
        for step in (2, 3, 4):
            put(out, step)
            prune(out, "r", newest=step, keep_last=1)
    assert latest(out, "r").number == 4
    assert names(out) == [
        *(f"step_00000{i}.moved-{os.getpid()}" for i in (2, 3)),
        "step_000004",
        f"step_000004.moved-{os.getpid()}",
    ]
    assert latest(elsewhere, "r").number == 3 and "moved to" in caplog.text


def test_retention_keeps_the_last_and_the_best(tmp_path):
    scores = {1: float("nan"), 2: 0.3, 3: 0.5, 4: 0.3, 5: None, 10: 0.8}
    for step, score in scores.items():
        put(tmp_path, step, score=score)
        prune(tmp_path, "r", newest=step, keep_last=2)
    assert [s.number for s in steps(tmp_path, "r")] == [2, 5, 10] and best(steps(tmp_path, "r")).number == 2


def test_k25_never_without_a_whole_step(tmp_path):
    put(tmp_path, 1)
    stop, seen = threading.Event(), []

    def watch():
        while not stop.is_set():
            listed = [p for p in tmp_path.iterdir() if p.name.startswith("step_")]
            seen.append(len(listed))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for step in range(2, 30):
        put(tmp_path, step)
        prune(tmp_path, "r", newest=step, keep_last=1)
    stop.set()
    watcher.join()
    assert len(seen) > 30 and min(seen) == 1 and max(seen) == 2


def test_k24_words_in_the_path_mean_nothing(tmp_path):
    folder = tmp_path / "step_000007" / "stephan epoch_3" / "größe $HOME"
    folder.mkdir(parents=True)
    put(folder, 5)
    assert latest(folder, "r").number == 5


def test_k29_checkpoint_of_an_earlier_version_loads(tmp_path):
    """A folder that two ranks of torchft 0.1.0 wrote; when the format changes, add another and keep this one."""
    shutil.copytree(HERE / "golden" / "format_2" / "step_000002", tmp_path / "step_000002")
    saved = latest(tmp_path, "golden", base="0123")
    assert saved.read("model")["layers.0.weight"].tolist() == [[1.5, -2.0], [0.25, 3.0]]
    optimizer = saved.read("optimizer")
    assert optimizer["groups"][0]["betas"] == (0.9, 0.95)
    assert optimizer["state"]["layers.0.weight"]["exp_avg_sq"].tolist() == [[0.5, 0.25], [1.0, 2.0]]
    assert saved.read("loader") == {"epoch": 1, "row": 7}
    assert saved.read_own("rng")["torch"].tolist() == list(range(16))
    assert saved.read("rng/rank_00001")["torch"].tolist() == list(range(1, 17))


@pytest.mark.parametrize(("number", "version"), [(1, "0.1.0"), (3, "9.9")])
def test_k29_checkpoint_of_another_format_says_so(tmp_path, number, version):
    path = put(tmp_path, 2)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": number, "torchft": version}))
    with pytest.raises(UserError, match=rf"format {number}, written by torchft {version}; torchft .* reads format 2"):
        latest(tmp_path, "r")


def test_s5_no_pickle_is_written(tmp_path):
    path = put(tmp_path, 1)
    assert {p.suffix for p in path.rglob("*") if p.is_file()} == {".json", ".safetensors"}
