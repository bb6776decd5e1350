"""Episodes: their tokens, masks and log-probabilities, with one turn and with tools."""

from functools import partial

import pytest
import torch

from torchft import shipped
from torchft.config import Component
from torchft.data.prompts import Prompt
from torchft.errors import UserError
from torchft.generation.loaded import engine, load
from torchft.generation.requests import Completion
from torchft.generation.sampling import Sampling
from torchft.losses.likelihood import token_logps
from torchft.rl.batch import count_totals, countable, micro_batches, rows
from torchft.rl.curves import Curves, cut_samples, rollout_row, write_samples
from torchft.rl.environments import Calculator, calculator
from torchft.rl.rollout import rollout, turn_tokens
from torchft.rl.scoring import RewardConfig, Scorer, Scores
from torchft.rl.shared_row import saved_by_sharing, shared_rows
from torchft.tokenizers.chat import Rendered
from torchft.training.distributed import World

WORLD = World(device=torch.device("cpu"))


@pytest.fixture(scope="module")
def demo():
    return load(shipped.config_path("demo/base"), dtype=torch.float32, device=torch.device("cpu"))


def prompt(question, answer=""):
    return Prompt(messages=[{"role": "user", "content": question}], answer=answer, values={}, where=question)


def episodes(demo, questions, **more):
    model, tokenizer = demo
    slots = engine(model, tokenizer, num_slots=4, max_len=96)
    how = {"sampling": Sampling(max_new_tokens=12, temperature=4.0), "group_size": 3, "seed": 1} | more
    return rollout(slots, tokenizer, [prompt(q) for q in questions], **how)


def test_groups_of_one_turn(demo):
    _, tokenizer = demo
    found = episodes(demo, ['Repeat the word "abc".', "What is 3 plus 4?"])
    assert [e.prompt.where for e in found] == ['Repeat the word "abc".'] * 3 + ["What is 3 plus 4?"] * 3
    assert len({tuple(e.tokens) for e in found}) > 2
    for e in found:
        start = tokenizer.render(e.prompt.messages, add_generation_prompt=True).tokens
        assert e.tokens[: len(start)] == start and e.chosen == [False] * len(start) + [True] * e.num_chosen
        assert e.messages == [*e.prompt.messages, {"role": "assistant", "content": e.text}]
        assert len(e.logps) == len(e.tokens) and e.attempt.num_tokens == e.num_chosen > 0
    again = episodes(demo, ["What is 3 plus 4?"], first=1)  # the same number of the prompt, the same draws
    assert [e.tokens for e in again] == [e.tokens for e in found[3:]]


def test_rows_hold_what_training_computes(demo):
    """At the place before each chosen token: its label, and the engine's log-probability, equal to a forward's."""
    model, tokenizer = demo
    found = episodes(demo, ['Repeat the word "abc".', 'Spell the word "longer".'])
    counts = [True, True, False, True, True, True]
    advantages = torch.arange(6.0)
    batch = rows(found, [5, 2, 0], scores=advantages, counts=counts, pad_id=tokenizer.pad_id)
    assert batch.tokens.shape[1] % 16 == 0 and batch.scores.tolist() == [5, 2, 0]
    with torch.no_grad():
        logps = model(batch.tokens, head=partial(token_logps, labels=batch.labels, temperature=4.0))
    assert (logps - batch.sampler_logps).abs().max() < 1e-4
    assert batch.mask.sum(1).tolist() == [found[5].num_chosen, 0, found[0].num_chosen]
    row = batch.tokens[0].roll(-1)
    assert torch.equal(batch.labels[0][batch.mask[0]], row[batch.mask[0]])
    total = count_totals([batch], max_tokens=12, world=WORLD)
    assert (total.sequences, total.tokens) == (2, found[5].num_chosen + found[0].num_chosen)


@pytest.mark.parametrize("make", [rows, shared_rows])
@pytest.mark.parametrize("length", [None, 48])
def test_a_prompt_without_room_for_an_answer_costs_nothing(demo, make, length):
    """Its row is empty: neither as long as the prompt nor more than a compiled block's shape holds."""
    _, tokenizer = demo
    found = episodes(demo, ["What is 3 plus 4?", "x " * 500], sampling=Sampling(max_new_tokens=4, temperature=4.0))
    assert [e.finish for e in found[3:]] == ["too_long"] * 3
    counts = countable(found, torch.zeros(6), skip_truncated=False)
    how = {"scores": torch.zeros(6), "counts": counts, "pad_id": tokenizer.pad_id, "length": length}
    batch = make(found, range(6), **how)
    assert batch.tokens.shape[1] <= 48 and batch.mask.any(1).tolist() == [True] * 3 + [False] * 3
    assert make(found, range(3, 6), **how).mask.sum() == 0
    alone = saved_by_sharing(found[:3], counts[:3], group_size=3, world=WORLD)
    assert saved_by_sharing(found, counts, group_size=3, world=WORLD) == alone >= 0.5


def test_micro_batches_have_all_once_and_part_every_group():
    lengths = [7, 1, 5, 3, 2, 9, 4, 8]
    found = micro_batches(8, mini_batches=2, batch_size=3, lengths=lengths)
    assert sorted(i for part in found for rows in part for i in rows) == list(range(8))
    for part in found:
        numbers = [i for rows in part for i in rows]
        assert [len(rows) for rows in part] == [3, 1] and {i // 4 for i in numbers} == {0, 1}
        assert [lengths[i] for i in numbers] == sorted(lengths[i] for i in numbers)


class Scripted:
    """An engine whose answers are written down."""

    max_len = 200

    def __init__(self, tokenizer, *turns):
        self.tokenizer, self.turns, self.prompts = tokenizer, list(turns), []

    def complete(self, requests):
        self.prompts += [list(r.prompt) for r in requests]
        found = []
        for _ in requests:
            tokens = [*self.tokenizer.encode(self.turns.pop(0)), self.tokenizer.stop_ids[0]]
            found.append(Completion(tokens=tokens, logps=[-0.5] * len(tokens), finish="stop"))
        return found


def test_a_calculator_answers_turns(demo):
    _, tokenizer = demo
    slots = Scripted(tokenizer, "<calc>12*(3+4)</calc>", "<calc>1/0</calc>", "It is 84.")
    [e] = rollout(
        slots, tokenizer, [prompt("What is 12 times 7?")], sampling=Sampling(), group_size=1, seed=0,
        environment=calculator, max_turns=5,
    )  # fmt: skip
    said = [m["content"] for m in e.messages if m["role"] == "tool"]
    assert said[0] == "84" and said[1].startswith("error") and e.text == "It is 84." and e.num_turns == 3
    whole = tokenizer.render(e.messages, add_generation_prompt=False).tokens
    assert e.tokens == whole  # as if it had been rendered at once: nothing is lost or doubled between turns
    chosen = tokenizer.decode([t for t, c in zip(e.tokens, e.chosen) if c])
    assert chosen == "<calc>12*(3+4)</calc><|end|><calc>1/0</calc><|end|>It is 84.<|end|>"
    assert all((logp == -0.5) == c for logp, c in zip(e.logps, e.chosen))
    assert slots.prompts[1] == e.tokens[: len(slots.prompts[1])]


def test_a_stop_text_is_what_the_tool_reads_and_the_turn_is_closed(demo):
    """The model ends at the text, without the token that ends a turn: others add that."""
    _, tokenizer = demo

    class Stopped(Scripted):
        def complete(self, requests):
            ends = [c.tokens[:-1] for c in super().complete(requests)]
            return [Completion(tokens=tokens, logps=[-0.5] * len(tokens), finish="stop") for tokens in ends]

    slots = Stopped(tokenizer, "<calc>12*7</calc>", "It is 84.")
    [e] = rollout(
        slots, tokenizer, [prompt("What is 12 times 7?")], sampling=Sampling(stop=["</calc>"]), group_size=1, seed=0,
        environment=calculator, max_turns=5,
    )  # fmt: skip
    assert [m["content"] for m in e.messages[1:]] == ["<calc>12*7</calc>", "84", "It is 84."]
    closed = tokenizer.render(e.messages, add_generation_prompt=False).tokens
    assert [*e.tokens, tokenizer.stop_ids[0]] == closed and e.text == "It is 84."
    assert tokenizer.decode([t for t, c in zip(e.tokens, e.chosen) if c]) == "<calc>12*7</calc>It is 84."


def test_an_environment_that_raises_ends_its_own_episode(demo, caplog):
    _, tokenizer = demo

    class Broken(Calculator):
        def reset(self, prompt):
            return prompt.values["missing"] if prompt.where == "bad" else super().reset(prompt)

        def step(self, text):
            return 1 / 0 if "7" in text else super().step(text)

    slots = Scripted(tokenizer, "<calc>7</calc>", "<calc>1+1</calc>", "It is 2.")
    asked = [prompt("bad"), prompt("a"), prompt("b")]
    found = rollout(
        slots, tokenizer, asked, sampling=Sampling(), group_size=1, seed=0, environment=lambda: Broken("tool"),
        max_turns=5,
    )  # fmt: skip
    assert [e.finish for e in found] == ["environment_failed", "environment_failed", "stop"]
    assert found[2].text == "It is 2." and found[0].num_turns == 0 and found[1].num_turns == 1
    [told] = caplog.messages
    assert "raised KeyError('missing') for bad, and in 2 of 3 episodes" in told
    scorer = Scorer([RewardConfig(reward=Component("torchft.rl.rewards.length", {"high": 99}))], timeout_s=1)
    scores = scorer.score([e.attempt for e in found])
    assert scores.total.isnan().tolist() == [True, True, False] and scores.num_failed == {"length": 0}
    assert countable(found, scores.total, skip_truncated=False) == [False, False, True]


@pytest.mark.parametrize("error", [UserError("no such table"), KeyError("a")])
def test_an_environment_that_can_never_work_ends_the_run(demo, error):
    """The user's own word at once; another error where no episode was without it."""

    class Broken(Calculator):
        def reset(self, prompt):
            raise error

    how = {"sampling": Sampling(), "group_size": 2, "seed": 0, "environment": lambda: Broken("tool"), "max_turns": 2}
    match = "no such table" if isinstance(error, UserError) else r"raised KeyError\('a'\) for b, and in every episode"
    with pytest.raises(UserError, match=match):
        rollout(Scripted(demo[1]), demo[1], [prompt("b")], **how)


def test_episodes_end(demo):
    """After the most turns; and where no room is left."""
    _, tokenizer = demo
    how = {"sampling": Sampling(), "group_size": 1, "seed": 0, "environment": calculator}
    slots = Scripted(tokenizer, *["<calc>1+1</calc>"] * 2)
    [e] = rollout(slots, tokenizer, [prompt("?")], max_turns=2, **how)
    assert e.num_turns == 2 and e.messages[-1]["role"] == "assistant"
    slots = Scripted(tokenizer, "<calc>1+1</calc>")
    slots.max_len = 25
    [e] = rollout(slots, tokenizer, [prompt("?")], max_turns=2, **how)
    assert e.num_turns == 1 and e.finish == "length" and e.messages[-1]["role"] == "assistant"


def test_turn_tokens_keep_what_a_template_adds_after_the_stop_token():
    class WithNewline:
        stop_ids = (9,)

        def render(self, messages, *, add_generation_prompt):
            tokens = [t for m in messages for t in (len(m["content"]), 9, 5)]  # <text> <stop> <newline>
            return Rendered(tokens + [7] * add_generation_prompt, [])

    answer, said = {"role": "assistant", "content": "ab"}, {"role": "tool", "content": "abc"}
    assert turn_tokens(WithNewline(), [answer], [said]) == [5, 3, 9, 5, 7]


def test_report_of_a_rollout(demo):
    found = episodes(demo, ["What is 3 plus 4?", 'Repeat the word "abc".'])
    nan = float("nan")
    totals = torch.tensor([1.0, 1.0, 1.0, 2.0, nan, 0.0])
    scores = Scores(by_reward={"right": totals}, total=totals, num_failed={"right": 1})
    row = rollout_row(found, scores, group_size=3)
    assert (
        row["reward"] == row["reward/right"] == 1.0 and row["groups_equal"] == 0.5 and row["rewards_failed/right"] == 1
    )
    assert row["response_tokens"] == sum(e.num_chosen for e in found) / 6 and row["turns"] == 1
    signed = {"fine": torch.tensor([-1.0, -2.0, nan, -3.0, -1.0, 0.0]), "rest": torch.tensor([-1.0, 1.0] * 3)}
    scores = Scores(by_reward=signed, total=signed["fine"], num_failed={"fine": 1, "rest": 0})
    row = rollout_row(found, scores, group_size=3)
    assert row["reward"] == row["reward/fine"] == -1.4 and row["reward/rest"] == 0
    assert row["rewards_failed/fine"] == 1 and "rewards_failed/rest" not in row


def test_curves_tell_how_often_a_weight_is_capped(demo):
    _, tokenizer = demo
    found = episodes(demo, ["What is 3 plus 4?"])
    batch = rows(found, range(3), scores=torch.zeros(3), counts=[True] * 3, pad_id=tokenizer.pad_id)
    before = batch.sampler_logps.clone()
    first = int(batch.mask[0].nonzero()[0])
    before[0, first] += 0.7  # exp(0.7) is more than 2
    zero = torch.zeros_like(before)
    about = {"entropy": zero, "clipped": zero, "before": before, "reference": None}
    curves = Curves(WORLD, importance_cap=2.0)
    curves.add(batch, before, **about)
    assert curves.row()["capped"] == pytest.approx(1 / int(batch.mask.sum()))
    curves = Curves(WORLD)
    curves.add(batch, before, **about)
    assert "capped" not in curves.row()


def test_samples_of_steps_that_are_taken_again_are_removed(demo, tmp_path):
    found, totals = episodes(demo, ["What is 3 plus 4?"]), torch.zeros(3)
    scores = Scores(by_reward={"right": totals}, total=totals, num_failed={"right": 0})
    path = tmp_path / "samples.jsonl"
    for step in (1, 2, 3):
        write_samples(path, step, found, scores)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 1, "mess')  # a killed process's
    cut_samples(path, resume_step=2)
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:6])
    cut_samples(path, resume_step=0)
    assert path.read_bytes() == b""
    cut_samples(tmp_path / "none.jsonl", resume_step=0)
