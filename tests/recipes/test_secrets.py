"""No secret of the environment, the command line or an address stays in what a run prints or leaves (S9)."""

import pytest

from torchft.cli.main import main

CANARY = "canary" + "7" * 20


@pytest.mark.parametrize(
    ("code", "options"),
    [
        (0, ["metric_loggers=[{_component_: torchft.training.loggers.TensorBoard}]"]),
        (2, [f"dataset.source=https://me:{CANARY}@host.org/d.jsonl"]),
        (2, [f"dataset.revision=hf_{CANARY}", "dataset.source=org/absent"]),
        (2, [f"hf_token={CANARY}"]),
    ],
    ids=["environment", "address", "shape", "key"],
)
def test_s9_a_canary_is_nowhere(settings, tmp_path, monkeypatch, capfd, code, options):
    monkeypatch.setenv("HF_TOKEN", f"hf_{CANARY}")
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = tmp_path / "run"
    words = ["run", "lora_finetune", "--config", str(settings), f"output_dir={run}", "max_steps=1", *options]
    try:
        found = main(words)
    except SystemExit as e:
        found = e.code
    printed = capfd.readouterr()
    assert found == code, printed.err
    assert CANARY not in printed.out + printed.err
    files = [path for path in run.rglob("*") if path.is_file()]
    assert code or any(path.suffix == ".safetensors" for path in files)
    for path in files:
        assert CANARY.encode() not in path.read_bytes(), path
