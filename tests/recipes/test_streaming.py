"""Both recipes on a stream of mixed, packed data: resumed bit for bit, and refused before it starts."""

import json

import pytest
from letters import write_jsonl
from processes import run_ranks
from recipe_runs import (
    conversations,
    digests,
    interrupted,
    largest_difference,
    load_recipe,
    losses,
    rows,
    train,
    weights,
)

from torchft.errors import UserError


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Two sources that the first row tells apart, one of them capped."""
    folder = tmp_path_factory.mktemp("sources")
    questions = [{"instruction": f"Say {i}", "input": "", "output": str(i) * (1 + i % 9)} for i in range(30)]
    chat = write_jsonl(folder / "chat.jsonl", conversations(11))
    capped = write_jsonl(folder / "questions.jsonl", questions) + "#20"
    datasets = [{"source": chat, "weight": 0.7}, {"source": capped, "weight": 0.3, "filters": {"output": {"not": "3"}}}]
    return ["~dataset", f"datasets={json.dumps(datasets)}", "packed=true"]


STREAMING = ["streaming={shuffle_rows: 4, lookahead: 6}", "max_steps=7"]


@pytest.mark.parametrize("recipe", ["lora", "full"])
def test_a_stream_resumes_bit_for_bit(recipe, request, options, tmp_path, monkeypatch, no_picture):
    run = request.getfixturevalue(recipe)
    options = [*options, *STREAMING, "save_every=1"]
    whole = run(tmp_path / "whole", *options)
    for step in (1, 3, 4, 6):
        with interrupted(monkeypatch, step):
            run(tmp_path / "parts", *options)
    parts = run(tmp_path / "parts", *options)
    assert rows(parts) == rows(whole) and len(rows(whole)) == 7
    assert digests(parts) == digests(whole)


def part(settings, output_dir, overrides):
    train(load_recipe("lora_finetune"), settings, output_dir, *overrides)


def test_two_ranks_share_a_stream_and_train_rows_of_the_vocabulary(lora, settings, options, tmp_path, no_picture):
    """The losses and weights of one process with the same global batch, of which each rank takes its rows."""
    options = [*options, *STREAMING, "gradient_accumulation_steps=1", "trainable_tokens=['<|eot_id|>']"]
    alone = lora(tmp_path / "alone", *options, "batch_size=4")
    run_ranks(part, 2, settings, tmp_path / "together", [*options, "batch_size=2"])
    ours = tmp_path / "together"
    assert (losses(ours) - losses(alone)).abs().max() <= 1e-5 and len(losses(ours)) == 7
    assert [row["supervised_tokens"] for row in rows(ours)] == [row["supervised_tokens"] for row in rows(alone)]
    assert "embed_tokens.lora_rows" in weights(ours)
    assert largest_difference(weights(ours), weights(alone)) < 1e-4


def test_a_mixture_with_epochs_resumes_bit_for_bit(lora, options, tmp_path, monkeypatch, no_picture):
    options = [*options, "save_every=1"]
    whole = lora(tmp_path / "whole", *options)
    for step in (1, 2):
        with interrupted(monkeypatch, step):
            lora(tmp_path / "parts", *options)
    parts = lora(tmp_path / "parts", *options)
    assert (rows(parts), digests(parts)) == (rows(whole), digests(whole))


def test_what_a_config_must_say(lora, options, tmp_path):
    with pytest.raises(UserError, match="streaming: a stream has no end; say in max_steps"):
        lora(tmp_path / "run", *options, "streaming={}")
    with pytest.raises(UserError, match="dataset: give one data set here, or several in datasets"):
        lora(tmp_path / "run", *options[1:])
    with pytest.raises(UserError, match="dataset: give one data set here, or several in datasets"):
        lora(tmp_path / "run", options[0])
