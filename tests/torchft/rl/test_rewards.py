"""Rewards, what fails of them, and how they add up."""

import math
import re
import signal
import time

import pytest

from torchft import registry
from torchft.config import Component
from torchft.data.prompts import Prompt
from torchft.errors import UserError
from torchft.rl.rewards import Attempt, BatchReward, exact_match, length, math_answer, regex, shared_start
from torchft.rl.scoring import RewardConfig, Scorer, choose, time_limit


def attempt(text, answer="", num_tokens=5, **values):
    prompt = Prompt(messages=[], answer=answer, values=values, where="data.jsonl:3")
    return Attempt(prompt=prompt, text=text, num_tokens=num_tokens, finish="stop")


def test_exact_match():
    assert exact_match()(attempt(" Yes\n", "Yes")) == 1 and exact_match()(attempt("yes", "Yes")) == 0
    assert exact_match(ignore_case=True)(attempt("yes", "Yes")) == 1
    assert exact_match(column="level")(attempt("3", "Yes", level=3)) == 1
    with pytest.raises(ValueError, match=r"data\.jsonl:3.*no answer"):
        exact_match()(attempt("yes"))
    with pytest.raises(ValueError, match="no column 'levle'"):
        exact_match(column="levle")(attempt("3", level=3))


def test_shared_start():
    assert [shared_start()(attempt(text, "abcd")) for text in ("abcd", "abxx", "abcdefgh", "x", "")] == [
        1,
        0.5,
        0.5,
        0,
        0,
    ]


def test_math_answer():
    assert math_answer()(attempt(r"so \boxed{\frac12}", "#### 0.5")) == 1
    assert math_answer()(attempt("it is 3", "#### 4")) == 0 == math_answer()(attempt("no idea", "4"))


def test_regex():
    form = regex(pattern=r"<think>.*</think>\s*<answer>.*</answer>", whole=True)
    assert form(attempt("<think>a\nb</think>\n<answer>1</answer> ")) == 1 and form(attempt("<answer>1</answer>")) == 0
    assert regex(pattern=r"\d")(attempt("a1")) == 1
    with pytest.raises(UserError, match="not a regular expression"):
        regex(pattern="(")


def test_length():
    soft = length(low=2, high=10, over=4)
    assert [soft(attempt("", num_tokens=n)) for n in (1, 2, 10, 12, 14, 99)] == [0, 1, 1, 0.5, 0, 0]
    assert length(high=10)(attempt("", num_tokens=11)) == 0


def broken():
    def reward(attempt):
        if attempt.text == "hang":
            while True:
                time.sleep(0.001)
        if attempt.text == "regex":
            re.match(r"(a+)+$", "a" * 40 + "b")
        return 1 / 0 if attempt.text == "raise" else len(attempt.text)

    return reward


def test_rewards_that_fail_are_left_out_and_counted(monkeypatch, caplog):
    monkeypatch.setattr(registry, "_added", {})
    registry.add(broken, kind="reward")
    name = f"{broken.__module__}.broken"
    match = RewardConfig(reward=Component("torchft.rl.rewards.exact_match", {}), weight=0.5)
    scorer = Scorer([match, RewardConfig(reward=Component(name, {})), match], timeout_s=0.1)
    attempts = [attempt(text, "four") for text in ("four", "hang", "raise", "regex", "no")]
    scores = scorer.score(attempts)
    assert list(scores.by_reward) == ["exact_match", "broken", "exact_match_3"]
    assert scores.num_failed == {"exact_match": 0, "broken": 3, "exact_match_3": 0}
    assert scores.total.isnan().tolist() == [False, True, True, True, False]
    assert scores.total[0] == 0.5 + 4 + 0.5 and scores.total[4] == 2
    assert sum("reward broken" in message for message in caplog.messages) == 1
    both = choose([scores, scores], [0, 9, 4])
    assert both.total[0] == 5 and both.total[1:].tolist() == [2, 2] and both.num_failed["broken"] == 6


def many(*, found: list):
    """``found`` for many answers together; alone, the second one's is infinite."""
    alone = {"a": 1.0, "b": -math.inf, "c": 2.0}
    return BatchReward(score=lambda asked: found if len(asked) > 1 else [alone[asked[0].text]])


def patient():
    def reward(attempt):
        try:
            time.sleep(2)
        except Exception:
            return 0.0

    return reward


@pytest.mark.parametrize("found", [[1.0], [1.0, None, 2.0], [1.0, -math.inf, 2.0], [[], [], []]])
def test_what_is_no_number_for_each_answer_is_a_failure(monkeypatch, caplog, found):
    monkeypatch.setattr(registry, "_added", {})
    registry.add(many, kind="reward")
    scorer = Scorer([RewardConfig(reward=Component(f"{many.__module__}.many", {"found": found}))], timeout_s=1)
    scores = scorer.score([attempt(text) for text in "abc"])
    assert scores.total.tolist()[::2] == [1, 2] and scores.num_failed == {"many": 1}
    assert any("reward many is -inf, for 'b'" in message for message in caplog.messages)


def test_a_reward_that_catches_everything_is_stopped_all_the_same(monkeypatch, caplog):
    monkeypatch.setattr(registry, "_added", {})
    registry.add(patient, kind="reward")
    scorer = Scorer([RewardConfig(reward=Component(f"{patient.__module__}.patient", {}))], timeout_s=0.1)
    began = time.monotonic()
    assert scorer.score([attempt("a")]).num_failed == {"patient": 1}
    assert time.monotonic() - began < 1 and "took over 0.1 s" in caplog.text


def test_time_limit_leaves_another_alarm_as_it_was():
    rung = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    timer = signal.setitimer(signal.ITIMER_REAL, 0.2)
    with time_limit(0.1):
        pass
    time.sleep(0.15)
    assert not rung
    time.sleep(0.1)
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, *timer)
    assert rung
