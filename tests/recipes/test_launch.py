"""Launched as users do: several processes, several nodes (here on one machine), signals, and a rank that dies."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from processes import TWO_GPUS, free_port
from recipe_runs import rows

from torchft.cli import run
from torchft.training.checkpoint import damage, steps
from torchft.training.interrupt import SAME_S
from torchft.training.metrics import read_rows

ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
STEPS = ["max_steps=8", "epochs=20", "batch_size=1", "save_every=2", "export=[adapter]"]

KILLED = "was killed by SIGKILL (exit code -9); if it has saved a checkpoint, the same command goes on from there"
GOES_ON = r"going on after step\W+[24]"  # a rank that is killed in step 6 may have been writing step 4


def launch(*words, fault=None, recipe="lora_finetune", **how):
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCHFT_FAULT": fault or "", "PYTHONPATH": PATH}
    command = [sys.executable, "-c", "import sys; from torchft.cli.main import main; sys.exit(main())", "run"]
    return subprocess.Popen(
        [*command, recipe, *map(str, words)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **how,
    )


def ended(process, timeout=180):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


@pytest.fixture
def words(settings, tmp_path):
    return ["--config", settings, f"output_dir={tmp_path / 'run'}", *STEPS]


def statuses(folder):
    return [start["status"] for start in json.loads((folder / "run.json").read_text())["starts"]]


def test_two_nodes_and_one_screen(words, tmp_path):
    nodes = ["--nnodes=2", "--nproc-per-node=1", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1"]
    results = [ended(process) for process in [launch(*nodes, *words, "parallel.replicate=2") for _ in range(2)]]
    assert [code for code, _, _ in results] == [0, 0], results
    panels = [out.count("Done") for _, out, _ in results]
    assert sorted(panels) == [0, 1], "one rank speaks"
    assert len(rows(tmp_path / "run")) == 8
    assert (tmp_path / "run" / "export" / "adapter" / "adapter_model.safetensors").exists()


def test_x7_sigterm_to_the_launcher_saves_and_exits_0(words, tmp_path):
    process = launch("--nproc-per-node=2", *words, "max_steps=100000", "epochs=100000", "save_every=100000")
    deadline = time.monotonic() + 120
    while not read_rows(tmp_path / "run" / "metrics.jsonl"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    code, out, err = ended(process, timeout=60)
    assert code == 0, (out, err)
    (step,) = (int(p.name[5:]) for p in (tmp_path / "run").glob("step_*"))
    assert f"Stopped after step {step}" in out and rows(tmp_path / "run")[-1]["step"] == step
    assert statuses(tmp_path / "run") == ["stopped"] and "Traceback" not in err


def test_x8_a_second_ctrl_c_ends_at_once_and_the_newest_checkpoint_is_whole(words, tmp_path):
    endless = [*words, "max_steps=100000", "epochs=100000", "save_every=20"]
    process = launch("--nproc-per-node=2", *endless, fault="after_shard_write:slow:*:*")  # seconds for each save
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "step_000020").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(1.5 * SAME_S)
    code, out, err = ended(process, timeout=30)
    assert code == 130 and "Traceback" not in err and "Stopped after" not in out, (code, out, err)
    found = steps(tmp_path / "run", json.loads((tmp_path / "run" / "run.json").read_text())["id"])
    assert found and not any(damage(step) for step in found)


def test_x1_a_rank_that_dies_is_named_and_the_same_command_goes_on(words, tmp_path):
    code, _, err = ended(launch("--nproc-per-node=2", *words, fault="before_step:kill:1:5"))
    assert code == 1 and err.rstrip().splitlines()[-1] == f"error: rank 1 {KILLED}"
    assert rows(tmp_path / "run")[-1]["step"] == 5
    code, out, err = ended(launch("--nproc-per-node=2", *words))
    assert code == 0 and re.search(GOES_ON, out), (out, err)
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 9))


def test_a_crash_in_compiled_code_says_which_rank_and_where(words):
    code, _, err = ended(launch("--nproc-per-node=2", *words, fault="before_step:segv:1:3"))
    assert code == 1 and err.rstrip().splitlines()[-1] == "error: rank 1 was killed by SIGSEGV (exit code -11)"
    assert "Segmentation fault" in err and re.search(r'fault.py", line \d+ in point', err), err


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=TWO_GPUS)])
def test_x1_torchrun_restarts_and_the_run_goes_on_by_itself(words, tmp_path, device):
    options = ["--nproc-per-node=2", "--max-restarts=1", *words, f"device={device}"]
    process = launch(*options, fault="before_step:kill:1:5")
    code, out, err = ended(process)
    assert code == 0 and re.search(GOES_ON, out) and out.count("Done") == 1, (out, err)
    assert statuses(tmp_path / "run")[-1] == "finished" and len(statuses(tmp_path / "run")) == 2
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 9))


def test_x3_a_rank_that_hangs_is_named_within_the_timeout(words, tmp_path):
    began = time.monotonic()
    process = launch(
        "--nproc-per-node=2", *words, "parallel.timeout_s=10", "save_every=100", fault="before_step:hang:1:3"
    )
    code, _, err = ended(process, timeout=90)
    last = err.rstrip().splitlines()[-1]
    assert code == 1 and "no answer from rank 1 (in step 4)" in last and "rank 0 waited" in last, err
    assert "Traceback" not in err and time.monotonic() - began < 75
    assert rows(tmp_path / "run")[-1]["step"] == 3
    debug = {path.name: path.read_text() for path in (tmp_path / "run" / "debug").iterdir()}
    assert "Timed out" in debug["log_rank_00000.txt"] and "stacks_rank_00000.txt" in debug
    assert "fault.py" in debug["stacks_rank_00001.txt"]


def test_x4_a_rank_that_leaves_early_is_named(words, tmp_path):
    code, _, err = ended(
        launch("--nproc-per-node=2", *words, "save_every=100", fault="before_step:exit:1:3"), timeout=90
    )
    assert code == 1 and "no answer from rank 1 (in step 4)" in err.rstrip().splitlines()[-1], err
    assert "Traceback" not in err


DEADLY = """import os, signal

def die():
    if os.path.exists("deadly"):
        os.kill(os.getpid(), signal.SIGKILL)

class Tracker:
    def __init__(self, *, run_id, output_dir, config):
        pass
    def log(self, step, values):
        if step == 3:
            die()
    def close(self):
        pass

def reward(*, at):
    trained = 0
    def score(attempt):
        nonlocal trained
        is_held_out = "_test" in attempt.prompt.where
        trained += not is_held_out
        if os.environ["RANK"] == "1" and (trained > 20 if at == "answer" else is_held_out and trained):
            die()
        return float(trained % 2)
    return score
"""
GRPO = [
    "--config", "demo/grpo", "rollout.prompts_per_step=4", "rollout.group_size=4", "eval_every=2", "save_every=1",
    "max_steps=4",
]  # fmt: skip


@pytest.mark.parametrize("at", ["log", pytest.param("answer", marks=pytest.mark.long), "evaluation"])
def test_x14_a_rank_that_dies_beside_a_step_is_named_and_the_same_command_goes_on(words, tmp_path, at):
    """In a tracker of the main rank; while answers are generated and judged, to train on or held out."""
    (tmp_path / "deadly_parts.py").write_text(DEADLY)
    (tmp_path / "deadly").touch()
    recipe, last, rank = "lora_finetune", 8, 0
    words = [
        "--nproc-per-node=2",
        "--trust=deadly_parts",
        *words,
        "metric_loggers=[{_component_: deadly_parts.Tracker}]",
    ]
    if at != "log":
        recipe, last, rank = "grpo", 4, 1
        rewards = f"rollout.rewards=[{{reward: {{_component_: deadly_parts.reward, at: {at}}}}}]"
        words = [*words[:2], *GRPO, f"output_dir={tmp_path / 'run'}", rewards]
    code, _, err = ended(launch(*words, recipe=recipe, cwd=tmp_path))
    assert code == 1 and err.rstrip().splitlines()[-1] == f"error: rank {rank} {KILLED}", err
    (tmp_path / "deadly").unlink()
    code, out, err = ended(launch(*words, recipe=recipe, cwd=tmp_path))
    assert code == 0 and "going on after step" in out, (out, err)
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["step"]] == [
        *range(1, last + 1)
    ]


def test_c10_x12_mistakes_are_told_once(words, tmp_path):
    code, _, err = ended(launch("--nproc-per-node=2", *words, "parallel.shard=3"))
    assert code == 2 and err.count("parallel: replicate 1 x shard 3 = 3, but there are 2 processes") == 1, err
    code, _, err = ended(launch("--nproc-per-node=2", *words, "dataset.source=nowhere.jsonl"))
    assert code == 2 and err.count("nowhere.jsonl") == 1, err
    assert "Traceback" not in err and not list((tmp_path / "run").glob("step_*"))


def test_the_slurm_script():
    script = ROOT / "docs" / "cluster" / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    sbatch = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.M))
    assert sbatch["ntasks-per-node"] == "1" and re.fullmatch(r"TERM@\d+", sbatch["signal"])
    line = text[text.index("srun tune run") :].replace("\\\n", " ")
    values = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7", "head_node": "node1"}
    for name, value in values.items():
        line = line.replace(f"${name}", value)
    check_command(shlex.split(line.replace('"$@"', "lora_finetune --config demo/lora"))[3:])


def test_the_kubernetes_job():
    job = yaml.safe_load((ROOT / "docs" / "cluster" / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"  # the operator looks for this name
    command = container["command"]
    assert command[:2] == ["tune", "run"] and f"--nnodes={worker['replicas']}" in command
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(job["spec"]["nprocPerNode"])
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in worker["template"]["spec"]["volumes"]}
    check_command([word.replace("/data/my.yaml", "demo/lora") for word in command[2:]])


def check_command(words):
    """That ``tune run`` takes the words, and what torchrun would be asked for."""
    from torch.distributed.run import get_args_parser

    asked = {}
    before, run._torchrun = run._torchrun, lambda options, command: asked.update(options=options, command=command)
    try:
        run.main(words)
    finally:
        run._torchrun = before
    parsed = get_args_parser().parse_args([*asked["options"], *asked["command"]])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.max_restarts) == ("2", "8", 3)
    assert Path(parsed.training_script).name == "lora_finetune.py" and "parallel.replicate=2" in asked["command"]
