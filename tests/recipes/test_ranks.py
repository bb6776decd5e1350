"""Recipes on several ranks: the steps, weights and exports of one process with the same global batch."""

import shutil
from math import prod

import pytest
import tiny
from processes import NEEDS_TWO_GPUS, run_ranks
from recipe_runs import digests, largest_difference, load_recipe, losses, newest_step, rows, train, weights
from safetensors.torch import load_file

from torchft.training.metrics import read_rows

ADAM = "optimizer={_component_: torch.optim.AdamW, lr: 1e-3, weight_decay: 0.1}"
# 20 steps of 4 rows; without packing the last one of an epoch has a single row, so that ranks have none
STEPS = ["max_steps=20", "epochs=20", "clip_grad_norm=0.5", "gradient_accumulation_steps=1", ADAM]
LONG = pytest.mark.long
WHOLE = "parallel.reshard_after_forward=false"  # frozen weights too: no rank has parts of them
STOCHASTIC = "optimizer={_component_: torchft.training.stochastic.AdamWStochastic, lr: 1e-3, state_dtype: fp32}"


def part(recipe, settings, output_dir, overrides):
    train(load_recipe(recipe), settings, output_dir, *overrides)


def together(size, recipe, settings, output_dir, *overrides, env=None):
    """The run of ``size`` ranks that has 4 rows a step in all."""
    sharing = prod(int(o.partition("=")[2]) for o in overrides if o.startswith(("parallel.tp=", "parallel.cp=")))
    run_ranks(part, size, recipe, settings, output_dir, [*overrides, f"batch_size={4 * sharing // size}"], env=env)
    return output_dir


def same_run(ours, alone, steps=20, bar=1e-5):
    assert len(losses(ours)) == len(losses(alone)) == steps
    assert (losses(ours) - losses(alone)).abs().max() <= bar
    for row, want in zip(rows(ours), rows(alone), strict=True):
        (
            row.pop("tokens", None),
            want.pop("tokens", None),
        )  # ranks pad to their own longest row
        assert row.pop("grad_norm", 0.0) == pytest.approx(want.pop("grad_norm", 0.0), rel=bar)
        if row["step"] < 3:  # a policy that is all but its reference: rounding decides which reward is higher
            row, want = ({k: v for k, v in r.items() if not k.endswith("accuracy")} for r in (row, want))
        assert row == pytest.approx(want, rel=10 * bar, abs=bar)
    assert largest_difference(weights(ours), weights(alone)) < 10 * bar
    exported = [load_file(run / "export" / "model.safetensors") for run in (ours, alone)]
    assert largest_difference(*exported) < 10 * bar


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, ["packed=true"]),
        pytest.param(4, ["packed=false"], marks=LONG),
        pytest.param(
            4,
            ["packed=false", "parallel.replicate=2", "gradient_accumulation_steps=2", "max_steps=10"],
            marks=LONG,
        ),
        (2, ["recompute=full", STOCHASTIC]),
        (2, ["optimizer_in_backward=true", "clip_grad_norm=null"]),
        (2, ["from_scratch=true"]),
        (2, [WHOLE, "exact_match.max_new_tokens=4"]),
        (2, ["parallel.tp=2"]),
        (2, ["parallel.cp=2", "packed=true"]),
        (4, ["parallel.tp=2", "packed=true", STOCHASTIC]),
        (4, ["parallel.tp=2", "parallel.cp=2", "recompute=full"]),
    ],
)
def test_full_fine_tuning_is_that_of_one_process(full, settings, data, tmp_path, no_picture, size, options):
    options = [*STEPS, f"dataset_eval={{_component_: torchft.data.datasets.chat, source: {data}}}", *options]
    options += [f"exact_match.source={data}"] * options[-1].startswith("exact_match")
    alone = full(tmp_path / "alone", *[o for o in options if "parallel" not in o], "batch_size=4")
    ours = together(size, "full_finetune", settings, tmp_path / "together", *options)
    same_run(ours, alone, steps=len(losses(alone)))
    assert not any(path.name.startswith(".step") for path in ours.iterdir())


@pytest.fixture(scope="session")
def wide(base, tmp_path_factory):
    """As ``base``, wide enough that half of a weight's rows are whole groups of NF4; embeddings tied."""
    folder = tmp_path_factory.mktemp("wide") / "base"
    shutil.copytree(base, folder)
    sizes = {"vocab_size": 1217, "hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "std": 0.1}
    tiny.checkpoint(folder, **sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    return folder


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, ["packed=true"]),
        pytest.param(4, ["lora.dora=true", "lora.rank=3", "parallel.replicate=2"], marks=LONG),
        (2, ["nf4={}", "packed=true"]),
        (2, [WHOLE, "packed=true"]),
        (2, [WHOLE, "lora.dora=true", "parallel.tp=2"]),
        (2, ["parallel.tp=2", "lora.dora=true"]),
        (4, ["parallel.tp=2", "parallel.replicate=2", "lora.rank=3"]),
        (2, ["parallel.cp=2", "packed=true", "nf4={}"]),
    ],
)
def test_lora_is_that_of_one_process(lora, settings, wide, tmp_path, no_picture, size, options):
    options = [*STEPS, f"checkpoint_dir={wide}", *options]
    alone = lora(tmp_path / "alone", *[o for o in options if "parallel" not in o], "batch_size=4")
    ours = together(size, "lora_finetune", settings, tmp_path / "together", *options)
    same_run(ours, alone)
    adapters = [load_file(run / "export" / "adapter" / "adapter_model.safetensors") for run in (ours, alone)]
    assert largest_difference(*adapters) < 1e-4


DPO_LORA = ["lora={rank: 4, alpha: 24}", "packed=true"]
WEIGHED = ["wpo=true", "ld_alpha=0.4", "precompute_reference=true"]


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, ["parallel.tp=2", *DPO_LORA, "share_prompts=true"]),
        (2, ["parallel.cp=2", *DPO_LORA, "share_prompts=false"]),
        (2, ["parallel.cp=2", *WEIGHED]),
        (4, ["parallel.tp=2", *WEIGHED, "lora={rank: 4}"]),
        (4, ["parallel.tp=2", "parallel.cp=2", *DPO_LORA, "share_prompts=false"]),
    ],
)
def test_preferences_are_those_of_one_process(dpo, dpo_settings, pairs, tmp_path, no_picture, size, options):
    options = [*STEPS, "max_steps=10", f"dataset_eval={{source: {pairs}}}", *options]
    alone = dpo(tmp_path / "alone", *[o for o in options if "parallel" not in o], "batch_size=4")
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}  # where no reference was computed before
    ours = together(size, "dpo", dpo_settings, tmp_path / "together", *options, env=env)
    same_run(ours, alone, steps=10)


def test_weights_that_stay_whole_need_not_divide(lora, settings, base, tmp_path, no_picture):
    """NF4 as below, where it is refused, of a model whose frozen weights each rank has all of."""
    options = [*STEPS, "max_steps=4", f"checkpoint_dir={base}", "nf4={}"]
    alone = lora(tmp_path / "alone", *options, "batch_size=4")
    ours = together(2, "lora_finetune", settings, tmp_path / "together", *options, WHOLE)
    same_run(ours, alone, steps=4)


@pytest.mark.parametrize("options", [[], ["parallel.tp=2"], ["parallel.cp=2"]])
def test_compiled_blocks_on_ranks(lora, settings, wide, tmp_path, no_picture, monkeypatch, options):
    options = [
        *options,
        *STEPS,
        "max_steps=4",
        f"checkpoint_dir={wide}",
        "compile=true",
        "recompute=0.3",
        "packed=true",
        "seq_len=64",
    ]
    plain = [o for o in options if "parallel" not in o]
    alone = lora(tmp_path / "alone", *plain, "batch_size=4", "compile=false", "recompute=none")
    ours = together(2, "lora_finetune", settings, tmp_path / "together", *options)
    same_run(ours, alone, steps=4)


@pytest.mark.parametrize("recipe", ["full_finetune", "lora_finetune"])
def test_resume_on_as_many_ranks_is_bit_exact_and_on_others_the_same_run(
    full, lora, settings, tmp_path, no_picture, recipe
):
    options = [*STEPS, "max_steps=10", "packed=true", "save_every=3"]
    if recipe == "lora_finetune":
        options.append("lora.dropout=0.0")
    whole = together(2, recipe, settings, tmp_path / "whole", *options)
    for size, how in ((2, []), (1, []), (4, ["parallel.tp=2", "parallel.cp=2"])):
        folder = tmp_path / f"by_{size}"
        with pytest.raises(AssertionError, match=r"injected fault|closed|reset|ended with exit code"):
            together(2, recipe, settings, folder, *options, env={"TORCHFT_FAULT": "before_step:raise:*:7"})
        assert newest_step(folder).name == "step_000006"
        accepted = [] if size == 2 else ["resume=accept_changes"]  # of batch_size, rows per rank
        ours = together(size, recipe, settings, folder, *options, *how, *accepted)
        same_run(ours, whole, steps=10)
        if size == 2:
            assert rows(ours) == rows(whole)
            assert digests(ours) == digests(whole)


def test_dropout_is_another_on_each_rank_and_resumes_bit_exactly(settings, tmp_path, no_picture):
    options = [*STEPS, "max_steps=6", "save_every=2", "lora.dropout=0.3"]
    whole = together(2, "lora_finetune", settings, tmp_path / "whole", *options)
    with pytest.raises(AssertionError):
        together(
            2, "lora_finetune", settings, tmp_path / "parts", *options, env={"TORCHFT_FAULT": "before_step:raise:*:3"}
        )
    parts = together(2, "lora_finetune", settings, tmp_path / "parts", *options)
    assert (rows(parts), digests(parts)) == (rows(whole), digests(whole))


def test_what_does_not_divide_is_refused_before_loading(settings, base, tmp_path):
    with pytest.raises(AssertionError, match=r"(?s)UserError: .*nf4.targets"):
        together(2, "lora_finetune", settings, tmp_path / "run", f"checkpoint_dir={base}", "nf4={}")


@pytest.mark.gpu
@NEEDS_TWO_GPUS
@pytest.mark.parametrize(
    ("options", "bar"),
    [
        (["dtype=fp32"], 1e-4),
        (["dtype=fp32", "parallel.tp=2"], 1e-4),
        (["dtype=fp32", "parallel.cp=2", "packed=true"], 1e-4),
        (["dtype=fp32", "parallel.tp=2", "nf4={}"], 5e-3),
        (["dtype=bf16", "packed=true", "compile=true"], 5e-2),
        (["dtype=bf16", "packed=true", "compile=true", WHOLE], 5e-2),
        (["dtype=bf16", "packed=true", "parallel.cp=2", "compile=true"], 5e-2),
        (["dtype=bf16", "packed=true", "parallel.tp=2", "compile=true", "recompute=0.3"], 5e-2),
        (["dtype=bf16", "packed=true", "parallel.tp=2", "fp8={}"], 0.2),
    ],
)
def test_two_gpus_are_one(lora, settings, wide, tmp_path, no_picture, options, bar):
    options = [*STEPS, "max_steps=5", f"checkpoint_dir={wide}", "device=cuda", "seq_len=128", *options]
    alone = lora(tmp_path / "alone", *[o for o in options if "parallel" not in o], "batch_size=4")
    ours = together(2, "lora_finetune", settings, tmp_path / "together", *options)
    same_run(ours, alone, steps=5, bar=bar)


@pytest.mark.gpu
@NEEDS_TWO_GPUS
def test_rows_of_two_gpus_say_what_communication_took(settings, wide, tmp_path, no_picture):
    options = [*STEPS, "max_steps=6", f"checkpoint_dir={wide}", "device=cuda", "profile={first_step: 3, steps: 2}"]
    ours = together(2, "lora_finetune", settings, tmp_path / "run", *options)
    found = read_rows(ours / "metrics.jsonl")
    assert all("communication" not in row for row in found[:3])
    for row in found[3:]:
        assert 0 <= row["communication_exposed"] <= row["communication"] <= 1 and row["communication"] > 0
