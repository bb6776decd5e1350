"""Episodes: their tokens, masks and log-probabilities, with one turn and with tools."""

from functools import partial

import pytest
import torch

from torchft import shipped
from torchft.data.prompts import Prompt
from torchft.generation.loaded import engine, load
from torchft.generation.requests import Completion
from torchft.generation.sampling import Sampling
from torchft.losses.likelihood import token_logps
from torchft.rl.batch import count_totals, micro_batches, rows
from torchft.rl.curves import rollout_row
from torchft.rl.environments import calculator
from torchft.rl.rollout import rollout, turn_tokens
from torchft.rl.scoring import Scores
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
