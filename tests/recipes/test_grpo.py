"""GRPO from end to end on the demo's model: against transformers, divided, on ranks, resumed, and that it learns."""

import json
import re
from functools import partial

import pytest
import torch
from letters import write_jsonl
from processes import run_ranks
from recipe_runs import digests, hub_model, interrupted, largest_difference, load_recipe, train, weights
from safetensors.torch import load_file
from vllm_stub import served

from torchft import registry, shipped
from torchft.errors import UserError
from torchft.generation import loaded
from torchft.rl import remote
from torchft.rl.curves import rollout_row
from torchft.training import profile, recompute
from torchft.training.communication import Communication
from torchft.training.compile import compile_blocks, compiled
from torchft.training.metrics import read_rows
from torchft.training.saver import Saver

CONFIG = shipped.configs()["demo/grpo"]
SMALL = [
    "max_steps=2", "rollout.prompts_per_step=4", "rollout.group_size=4", "rollout.sampling.temperature=3.0",
    "~prompts_eval", "~eval_every", "seq_len=48", "export_dtype=fp32", "batch_size=16",
]  # fmt: skip
GATHER_ONCE = "parallel.reshard_after_forward=false"
SGD = "optimizer={_component_: torch.optim.SGD, lr: 0.5}"
FULL = ["~lora", SGD, "clip_grad_norm=null"]
CLOCK = ("tokens_per_second", "mfu", "peak_memory_gib", "time_s", "start_to_first_step_s", "rollout_s")


@pytest.fixture
def grpo(monkeypatch):
    recipe = load_recipe("grpo")
    monkeypatch.setattr(recipe, "draw_loss", lambda *args, **kwargs: None)

    def run(folder, *overrides):
        return train(recipe, CONFIG, folder, *SMALL, *overrides)

    run.recipe = recipe
    return run


def rows(folder):
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in read_rows(folder / "metrics.jsonl")]


def hub_logps(model, batch, temperature=3.0):
    """transformers' log-probability of each label [b, s], 0 where there is none."""
    logits = model(batch.tokens).logits.float() / temperature
    logps = logits.log_softmax(-1).gather(-1, batch.labels.clamp_min(0)[..., None]).squeeze(-1)
    return torch.where(batch.mask, logps, 0.0)


@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "dapo", "rloo", "gspo"])
def test_a_step_is_transformers_with_the_policy_gradient(grpo, tmp_path, monkeypatch, method):
    """On policy every method's gradient is -A times that of log p, and only the divisor differs."""
    seen, make = [], grpo.recipe.shared_rows
    monkeypatch.setattr(grpo.recipe, "shared_rows", lambda *args, **how: seen.append(make(*args, **how)) or seen[-1])
    run = grpo(tmp_path / "run", *FULL, "max_steps=1", f"method={method}")
    [batch] = seen
    assert batch.scores.abs().max() > 0.05 and batch.mask.any(1).all()
    model = hub_model(shipped.config_path("demo/base"))
    logps, mask, a = hub_logps(model, batch), batch.mask, batch.scores[:, None]
    n, tokens = len(mask), mask.sum(1, keepdim=True)
    terms = {
        "grpo": logps * a / (n * tokens),
        "dr_grpo": logps * a / (n * 12),
        "dapo": logps * a / mask.sum(),
        "rloo": logps * a / n,
        "gspo": logps * a / (n * tokens),
    }
    (-terms[method].sum()).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.5 * p.grad
    got = load_file(run / "export" / "model.safetensors")
    want = {name: p for name, p in model.named_parameters() if name in got}
    before = load_file(shipped.config_path("demo/base") / "model.safetensors")
    assert largest_difference(got, want) < 2e-5
    assert largest_difference(got, {name: before[name].float() for name in got}) > 1e-4


def test_micro_batches_change_nothing(grpo, tmp_path):
    whole = grpo(tmp_path / "whole", "batch_size=16", *FULL)
    parts = grpo(tmp_path / "parts", "batch_size=3", *FULL)
    assert largest_difference(weights(whole), weights(parts)) < 1e-5
    for a, b in zip(rows(whole), rows(parts), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6) and a["entropy"] == pytest.approx(b["entropy"], rel=1e-5)
        assert a["reward"] == b["reward"] and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("options", [["batch_size=16", *FULL], ["batch_size=6", "mini_batches=2", "kl_coef=0.1", SGD]])
@pytest.mark.parametrize("method", ["grpo", "gspo"])
def test_shared_prompts_train_what_others_do(grpo, tmp_path, method, options):
    """Full training and LoRA; groups in one micro-batch and cut in two."""
    options = [*options, f"method={method}", "skip_truncated=true"]
    shared, plain = (grpo(tmp_path / s, *options, f"share_prompts={s}") for s in ("true", "false"))
    assert largest_difference(weights(shared), weights(plain)) < 1e-5
    for row, want in zip(rows(shared), rows(plain), strict=True):
        assert row.pop("shared_tokens") > 0.2 and row.pop("tokens") < want.pop("tokens")
        assert row == pytest.approx(want, rel=1e-4, abs=1e-6)


def part(folder, overrides):
    recipe = load_recipe("grpo")
    recipe.draw_loss = lambda *args, **kwargs: None
    train(recipe, CONFIG, folder, *SMALL, *overrides)


@pytest.mark.parametrize(
    ("spread", "options"),
    [
        ([], ["mini_batches=2", "kl_coef=0.1", SGD, GATHER_ONCE]),
        ([], [*FULL, "kl_coef=0.1", "max_steps=1"]),
        (["parallel.tp=2"], [*FULL, "share_prompts=true", "importance_cap=null"]),
        (["parallel.cp=2"], ["kl_coef=0.1", SGD, "share_prompts=false"]),
        ([], [*FULL, "method=reinforce_pp", "max_steps=1"]),
        (["parallel.cp=2"], [*FULL, "method=reinforce_pp_baseline", "max_steps=1", "share_prompts=false"]),
        ([], [*FULL, "method=reinforce_pp_baseline", "max_steps=1"]),
        (["parallel.tp=2", "parallel.cp=2"], ["mini_batches=2", SGD, "method=gspo", "share_prompts=false"]),
    ],
)
def test_ranks_are_one_process(grpo, tmp_path, spread, options):
    alone = grpo(tmp_path / "alone", *options)
    run_ranks(part, 2 ** max(1, len(spread)), tmp_path / "ranks", [*options, *spread, "batch_size=8"])
    assert largest_difference(weights(alone), weights(tmp_path / "ranks")) < 1e-4
    for ours, want in zip(rows(tmp_path / "ranks"), rows(alone), strict=True):
        assert ours.keys() == want.keys()
        for name in want.keys() - {"tokens"}:  # each rank pads its own
            value = want[name]
            assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


def compiled_part(folder, overrides, num_graphs):
    """Rollouts and updates compiled; says how many graphs there were after each step."""
    loaded.backend_of = lambda setting, device: "aot_eager" if setting is True else None
    recompute.compile_blocks = partial(compile_blocks, backend="aot_eager")
    recipe = load_recipe("grpo")
    recipe.draw_loss = lambda *args, **kwargs: None
    recipe.rollout_row = lambda *args, **kwargs: num_graphs.append(compiled().graphs) or rollout_row(*args, **kwargs)
    train(recipe, CONFIG, folder, *SMALL, *overrides)
    return num_graphs


@pytest.mark.parametrize("trains_compiled", ["true", "false"])
def test_compiled_rollouts_change_nothing_and_compile_once(grpo, tmp_path, monkeypatch, trains_compiled):
    """Also on ranks, whose blocks FSDP gathers."""
    options = [SGD, "max_steps=3", "rollout.num_slots=4", "share_prompts=false"]
    plain = grpo(tmp_path / "plain", *options)
    options += ["rollout.compile=true", f"compile={trains_compiled}"]
    for module, name in ((loaded, "backend_of"), (recompute, "compile_blocks")):
        monkeypatch.setattr(module, name, vars(module)[name])  # put back what `compiled_part` sets
    counts = [compiled_part(tmp_path / "one", options, [])]
    counts += run_ranks(compiled_part, 2, tmp_path / "ranks", [*options, "batch_size=8"], [])
    for run in ("one", "ranks"):
        assert largest_difference(weights(plain), weights(tmp_path / run)) < 1e-5
    assert all(first == second == third for first, second, third in counts)


def test_compiled_blocks_share_prompts_in_rows_of_one_shape(grpo, tmp_path, monkeypatch):
    """More answers to a row, so fewer rows; ranks have as many as each other, also if one needs fewer."""
    options = [SGD, "max_steps=3", "mini_batches=2", "kl_coef=0.1", "batch_size=3", "skip_truncated=true"]
    plain = grpo(tmp_path / "plain", *options, "share_prompts=false")
    options += ["share_prompts=true", "compile=true", "rollout.compile=false"]
    for module, name in ((loaded, "backend_of"), (recompute, "compile_blocks")):
        monkeypatch.setattr(module, name, vars(module)[name])
    counts = [compiled_part(tmp_path / "one", options, [])]
    counts += run_ranks(compiled_part, 2, tmp_path / "ranks", options, [])
    assert all(first == third for first, _, third in counts)
    before = 0
    for row in rows(tmp_path / "one"):
        assert (row["tokens"] - before) % (3 * 48) == 0 and row["tokens"] - before <= 16 * 48 * 0.75
        before = row["tokens"]
    for run in ("one", "ranks"):
        assert largest_difference(weights(plain), weights(tmp_path / run)) < 1e-5
        for row, want in zip(rows(tmp_path / run), rows(plain), strict=True):
            for name in want.keys() - {"tokens"}:
                assert row[name] == pytest.approx(want[name], rel=1e-4, abs=1e-6), name


def test_a_profile_goes_into_the_rows(grpo, tmp_path, monkeypatch):
    """Of a step with its rollout; on CPUs collectives leave no times, so these here are made up."""
    monkeypatch.setattr(profile, "communication", lambda profiler: Communication(running=0.3, exposed=0.1))
    run = grpo(tmp_path / "run", "max_steps=3", "profile={first_step: 2, steps: 1}")
    assert [row.get("communication_exposed") for row in rows(run)] == [None, 0.1, 0.1]
    assert (run / "profile" / "trace_rank_00000.json.gz").stat().st_size > 0


@pytest.mark.parametrize("options", [["passes=2", "mini_batches=2", "rollout.resample=1", "share_prompts=true"]])
def test_resume_is_bit_exact(grpo, tmp_path, monkeypatch, options):
    options = ["max_steps=3", "save_every=1", *options]
    whole = grpo(tmp_path / "whole", *options)
    for step in (1, 2):
        with interrupted(monkeypatch, step):
            grpo(tmp_path / "parts", *options)
    parts = grpo(tmp_path / "parts", *options)
    assert digests(parts) == digests(whole) and rows(parts) == rows(whole)


def test_the_reference_is_the_model_without_its_adapters(grpo, tmp_path):
    """And a second model in full training: no divergence in the first step, then some, and less with a higher price."""
    divergence = {}
    for name, options in {
        "lora": ["optimizer.lr=0.02"], "lora, dear": ["optimizer.lr=0.02", "kl_coef=20.0"], "full": FULL
    }.items():  # fmt: skip
        run = grpo(tmp_path / name, "max_steps=3", *(["kl_coef=0.01"] if "dear" not in name else []), *options)
        divergence[name] = [row["kl"] for row in rows(run)]
        assert divergence[name][0] < 1e-9 < divergence[name][-1]
    assert divergence["lora, dear"][-1] < 0.85 * divergence["lora"][-1]


def test_several_updates_of_a_rollout(grpo, tmp_path):
    """The first knows the engine's weights, later ones are clipped; each is an optimizer step."""
    run = grpo(
        tmp_path / "run",
        "passes=4",
        "optimizer.lr=0.02",
        "max_steps=1",
        "lr_schedule=torchft.training.schedules.linear",
    )
    [row] = rows(run)
    assert row["clipped"] > 0.01 and row["mismatch_kl"] < 1e-6 and row["capped"] == 0
    assert 0 < row["lr"] < 0.02 * 0.3  # the last of four


def sometimes():
    def reward(attempt):
        if len(attempt.text) % 2:
            raise RuntimeError("no odd answers, please")
        return float(len(attempt.text))

    return reward


def constant():
    return lambda attempt: 0.1


def test_rewards_that_raise_are_left_out_and_counted(grpo, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_added", {})
    registry.add(sometimes, kind="reward")
    seen, make = [], grpo.recipe.shared_rows
    monkeypatch.setattr(grpo.recipe, "shared_rows", lambda *args, **how: seen.append(make(*args, **how)) or seen[-1])
    name = f"{sometimes.__module__}.sometimes"
    run = grpo(tmp_path / "run", f"rollout.rewards=[{{reward: {{_component_: {name}}}}}]")
    for row, batch in zip(rows(run), seen, strict=True):
        failed = int(row["rewards_failed/sometimes"])
        assert 0 < failed < 16 and batch.mask.any(1).sum() == 16 - failed and torch.isfinite(batch.scores).all()
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8 and {s["reward"] is None for s in samples} == {True, False}


def test_equal_rewards_move_nothing(grpo, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_added", {})
    registry.add(constant, kind="reward")
    run = grpo(
        tmp_path / "run", f"rollout.rewards=[{{reward: {{_component_: {constant.__module__}.constant}}}}]", *FULL
    )
    assert [(row["grad_norm"], row["groups_equal"]) for row in rows(run)] == [(0, 1), (0, 1)]
    before = load_file(shipped.config_path("demo/base") / "model.safetensors")
    after = load_file(run / "export" / "model.safetensors")
    assert largest_difference(after, {name: p.float() for name, p in before.items()}) == 0


def test_groups_that_teach_nothing_are_replaced(grpo, tmp_path):
    cold = ["rollout.sampling.temperature=1.0", "max_steps=1"]
    [before] = rows(grpo(tmp_path / "before", *cold))
    [after] = rows(grpo(tmp_path / "after", *cold, "rollout.resample=8"))
    assert after["groups_equal"] < before["groups_equal"]


def test_prompts_that_are_too_long_are_counted_and_the_first_is_named(grpo, tmp_path, caplog):
    long = [{"prompt": 'Write "abc" backwards.', "answer": "cba"}] * 2 + [{"prompt": "a" * 60, "answer": "b"}] * 2
    path = write_jsonl(tmp_path / "p.jsonl", long)
    run = grpo(tmp_path / "run", f"prompts.source={path}", "max_steps=1")
    [row] = rows(run)
    assert row["ended/too_long"] == 0.5
    [told] = [m for m in caplog.messages if "leave no room for an answer in seq_len 48" in m]
    assert re.match(rf"{path}:[34]: its 6\d tokens", told)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("rollout.sampling.temperature=0", "at 0 all answers"),
        ("rollout.rewards=[]", "nothing to learn"),
        ("rollout.max_turns=2", "give an environment"),
        ("rollout.group_size=1", "at least 2"),
        ("overlong_buffer=13", "every answer would be penalised"),
        ("lora.dropout=0.1", "lora.dropout: .*leave it 0"),
        ("mini_batches=3", "do not divide"),
        ("rollout.sampling.max_new_tokens=48", "no room"),
        ("method=gppo", "expected 'grpo', 'dr_grpo'"),
        ("rollout.rewards=[{reward: {_component_: torchft.rl.rewards.regex}}]", "pattern"),
        ("rollout.rewards=[{reward: {_component_: os.system}}]", "os.system"),
    ],
)
def test_configs_that_cannot_work(grpo, tmp_path, override, problem):
    with pytest.raises(UserError, match=problem):
        grpo(tmp_path / "run", override)


def test_it_learns(tmp_path):
    """The demo, cut short: held-out answers, of which the base gets 1 in 25 right."""
    recipe = load_recipe("grpo")
    run = train(recipe, CONFIG, tmp_path / "run", "max_steps=24", "eval_every=100", "~save_every")
    before, after = (row["eval_reward/exact_match"] for row in read_rows(run / "metrics.jsonl") if "eval_reward" in row)
    assert before < 0.1 and after > 0.3
    answer = hub_model(run / "export")
    assert answer.config.vocab_size == 448 and (run / "export" / "adapter" / "adapter_config.json").exists()


def test_rollouts_from_a_server_are_those_of_the_built_in_engine(grpo, tmp_path, monkeypatch):
    """The same weights there, so the same run: adapters under a new name each time; whole models from a folder. One
    that is gone ends the run, which goes on once there is one again."""
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.02)
    for options, name, path in (
        ([SGD], "adapters", "/v1/load_lora_adapter"),
        ([*FULL, "optimizer.lr=0.05"], "whole", "/collective_rpc"),
    ):
        local = grpo(tmp_path / name / "local", *options, "max_steps=3")
        with served(shipped.config_path("demo/base")) as stub:
            asks = [*options, "max_steps=3", f"rollout.server={{url: {stub.url}, patience_s: 0.2}}", "save_every=1"]
            run = grpo(tmp_path / name / "remote", *asks)
            assert (stub.seen[path], stub.seen["/v1/unload_lora_adapter"]) == (3, 2 if name == "adapters" else 0)
            assert stub.seen["/reset_prefix_cache"] == (3 if name == "whole" else 0)
        assert [row["loss"] for row in rows(run)] == pytest.approx([row["loss"] for row in rows(local)], abs=1e-5)
        assert largest_difference(weights(run), weights(local)) < 1e-4
        assert all(abs(row["mismatch_kl"]) < 1e-5 and "server_retries" not in row for row in rows(run))
    with served(shipped.config_path("demo/base")) as stub:
        asks = [SGD, f"rollout.server={{url: {stub.url}, patience_s: 0.2}}", "save_every=1", "max_steps=3"]
        end = Saver.save

        def then_gone(self, step, *args, **kwargs):
            end(self, step, *args, **kwargs)
            stub.failures = 10**6 if step == 1 else 0

        monkeypatch.setattr(Saver, "save", then_gone)
        with pytest.raises(UserError, match=r"/v1/load_lora_adapter answers 503: overloaded, asked again for 0.2 s"):
            grpo(tmp_path / "gone", *asks)
        stub.failures = 0
        stub.forget()
        run = grpo(tmp_path / "gone", *asks)
    assert [row["loss"] for row in rows(run)] == pytest.approx(
        [row["loss"] for row in rows(tmp_path / "adapters" / "local")], abs=1e-5
    )


def ask_server(folder, overrides):
    recipe = load_recipe("grpo")
    train(recipe, CONFIG, folder, *SMALL, *overrides)


def test_ranks_ask_one_server(grpo, tmp_path):
    alone = grpo(tmp_path / "alone", "max_steps=2")
    with served(shipped.config_path("demo/base")) as stub:
        run_ranks(ask_server, 2, tmp_path / "together", ["max_steps=2", f"rollout.server.url={stub.url}"])
        assert stub.seen["/v1/load_lora_adapter"] == 2
    assert [row["loss"] for row in rows(tmp_path / "together")] == pytest.approx(
        [row["loss"] for row in rows(alone)], abs=1e-5
    )
