"""A reward model's score is transformers'."""

import shutil

import pytest
import torch
from tiny import SIZES
from transformers import LlamaConfig, LlamaForSequenceClassification

from torchft import shipped, tokenizers
from torchft.config import Component
from torchft.data.prompts import Prompt
from torchft.errors import UserError
from torchft.rl.reward_model import reward_model
from torchft.rl.rewards import Attempt
from torchft.rl.scoring import RewardConfig, Scorer


def folder_of(path, **more):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"vocab_size": 448, "pad_token_id": 0} | more)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(shipped.config_path("demo/base") / name, path)
    return model


def test_scores_are_transformers(tmp_path):
    theirs, tokenizer = folder_of(tmp_path, num_labels=1), tokenizers.load(shipped.config_path("demo/base"))
    reward = reward_model(checkpoint_dir=str(tmp_path), dtype="fp32", device="cpu")
    asked = [{"role": "user", "content": "What is 3 plus 4?"}]
    scores = []
    for text in ("7", "Eight, I think."):
        prompt = Prompt(messages=asked, answer="", values={}, where="x")
        scores.append(reward(Attempt(prompt=prompt, text=text, num_tokens=1, finish="stop")))
        tokens = tokenizer.render([*asked, {"role": "assistant", "content": text}]).tokens
        with torch.no_grad():
            assert scores[-1] == pytest.approx(theirs(torch.tensor([tokens])).logits.item(), abs=1e-5)
    assert scores[0] != scores[1]


def test_batches_score_as_single_answers_do(tmp_path):
    """Of unlike lengths, in the order they were asked, also through the scorer."""
    folder_of(tmp_path, num_labels=1)
    config = Component("torchft.rl.reward_model.reward_model", {
        "checkpoint_dir": str(tmp_path), "dtype": "fp32", "device": "cpu", "batch_size": 2
    })  # fmt: skip
    reward = config.build()
    prompt = Prompt(messages=[{"role": "user", "content": "Hi?"}], answer="", values={}, where="x")
    texts = ["7", "Eight, I think.", "no", "a much longer answer than the others are", "red"]
    attempts = [Attempt(prompt=prompt, text=text, num_tokens=1, finish="stop") for text in texts]
    singles = [reward(attempt) for attempt in attempts]
    assert len(set(singles)) == 5 and reward.score(attempts) == pytest.approx(singles, abs=1e-6)
    scores = Scorer([RewardConfig(reward=config)], timeout_s=5.0).score(attempts)
    assert scores.total.tolist() == pytest.approx(singles, abs=1e-6)
    assert reward.score([]) == []


def test_other_models_are_refused(tmp_path):
    folder_of(tmp_path, num_labels=3)
    with pytest.raises(UserError, match="with 3 labels"):
        reward_model(checkpoint_dir=str(tmp_path), device="cpu")
    with pytest.raises(UserError, match="one score"):
        reward_model(checkpoint_dir=str(shipped.config_path("demo/base")), device="cpu")
