"""Every field of every family's config.json, changed or left out: the numbers of transformers, or refused by name."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from families import CASES
from tiny import tokens, transformers_model

from torchft import models
from torchft.errors import UserError

ABSENT = object()
# Sizes of weights, which cannot load into others; and what no number depends on.
SKIPPED = {
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "transformers_version", "dtype", "bos_token_id", "eos_token_id",
    "pad_token_id", "use_cache", "initializer_range", "output_router_logits", "router_aux_loss_coef",
    "attention_dropout", "chunk_size_feed_forward", "id2label", "label2id", "is_encoder_decoder", "output_attentions",
    "output_hidden_states", "problem_type", "return_dict",
}  # fmt: skip


def others(key: str, value: Any) -> list[Any]:
    """Values that a field might have in place of its own."""
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, max(1, value // 2)] if value else [1]
        case float():
            return [value * 1.5] if value else [0.5]
        case None:
            return [True, 3, 0.5]
        case str() if "act" in key:
            return ["gelu", "relu", "gelu_pytorch_tanh", "silu"]
        case [_, *_] if not isinstance(value[0], dict) and value[::-1] != value:
            return [value[::-1]]
    return []


def paths(fields: dict[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in fields.items():
        if key in SKIPPED:
            continue
        if isinstance(value, dict):
            yield from paths(value, (*before, key))
        else:
            yield (*before, key), value


def changed(fields: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    fields = copy.deepcopy(fields)
    inner = fields
    for key in path[:-1]:
        inner = inner[key]
    if value is ABSENT:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return fields


@pytest.mark.parametrize("case", CASES)
def test_no_field_means_something_else_than_to_transformers(case, tmp_path):
    base = transformers_model(**({"rms_norm_eps": 1e-3} | CASES[case]))
    base.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    weights = models.load(tmp_path, dtype=torch.float32).state_dict()
    batch = tokens(vocab_size=saved["vocab_size"])

    def theirs(fields: dict[str, Any]) -> torch.Tensor:
        config = type(base.config).from_dict(copy.deepcopy(fields), attn_implementation="eager")
        model = type(base)(config)
        model.load_state_dict(base.state_dict())
        return model.eval()(batch).logits

    def ours(fields: dict[str, Any]) -> torch.Tensor:
        model = models.build(copy.deepcopy(fields), device="cpu")
        model.load_state_dict(weights)
        return model.eval()(batch)

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    present = {path for path, _ in paths(saved)}
    changes = [(path, other) for path, value in paths(base.config.to_dict()) for other in others(path[-1], value)]
    num_compared, wrong = 0, []
    for path, value in [*changes, *((path, ABSENT) for path in present)]:
        if len(path) > 1 and path not in present:
            continue
        fields = changed(saved, path, value)
        what = f"{'.'.join(path)} = {'absent' if value is ABSENT else value!r}"
        with torch.no_grad():
            try:
                wanted = theirs(fields)
            except Exception:  # of any class: then only that we do not fail later than by name
                wanted = None
            try:
                found = ours(fields)
            except UserError:
                continue
            except Exception as e:  # other shapes, which loading refuses
                if "state_dict" not in str(e):
                    wrong.append(f"{what}: {type(e).__name__} {e}")
                continue
        if wanted is not None:
            num_compared += 1
            if not (difference := (wanted - found).abs().max()) < 1e-3:
                wrong.append(f"{what}: logits differ by {difference:.3g}")
    transformers.logging.set_verbosity(level)
    assert not wrong, "\n".join(wrong)
    assert num_compared >= 5
