"""``tune preview``: the demo's data on a terminal and as a file, and what it refuses."""

from letters import turns, write_jsonl


def test_the_first_rows_and_what_they_add_up_to(tune):
    code, out, _ = tune("preview", "--config", "demo/lora", "-n", "1", "batch_size=2", "max_steps=5")
    assert code == 0
    assert out.count("palindrome_train.jsonl:") >= 7 and "row 1" in out and "row 2" not in out
    assert "Make a palindrome from" in out and "<|end|>»" in out
    assert "6,000 rows -> 6,000 samples, 170,937 tokens" in out and "5 steps, about" in out


def test_one_file(tune, tmp_path):
    file = tmp_path / "p.html"
    words = ["--config", "demo/stream", "-n", "4", "--devices", "2", "--html", str(file)]
    code, out, _ = tune("preview", "lora_finetune", *words)
    assert code == 0 and out.startswith(f"{file}: 4 rows, 300 steps, ")
    written = file.read_text()
    assert "old_tasks.jsonl" in written and "<td>0.8<td>" in written and written.count("<section class=row>") == 4


def test_refusals(tune, tmp_path):
    silent = write_jsonl(tmp_path / "d.jsonl", [turns("Q" * 300, "A")])
    data = ["~datasets", "~streaming", f"dataset={{source: {silent}}}"]
    for words, message in (
        (["--config", "demo/stream", "-n", "0"], "-n 0 and --devices 1 must be at least 1"),
        (["--config", "demo/stream", *data, "seq_len=6"], "nothing to train on"),
        (["--config", "demo/stream", "--html", str(tmp_path / "none" / "p.html")], "No such file or directory"),
        (["--config", "demo/stream", "max_stepz=3"], "did you mean 'max_steps'"),
    ):
        code, _, err = tune("preview", *words)
        assert code == 2 and message in err
