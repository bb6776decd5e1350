"""Every family against transformers in fp32, with tiny random models: logits, loss, all gradients, packing, the Hub's
files both ways, greedy decoding; and that the bars see each number that is wrong."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from families import CASES
from oracles import against_transformers, distance, gradients, mean_nll, shifted, supervised, violations
from safetensors.torch import load_file
from tiny import tokens, transformers_model

from torchft import hub, models
from torchft.errors import UserError
from torchft.files import read_json
from torchft.generation.greedy import generate
from torchft.models.config_json import ConfigJson
from torchft.modules.decoder import Decoder
from torchft.modules.delta_net import GatedDeltaNet
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import LongRope
from torchft.training.routing import RoutingConfig
from torchft.training.sharing import unshareable

DOCUMENTS = (5, 61, 1, 33)  # tokens; together as many as a row


@dataclass(frozen=True)
class Pair:
    folder: Path  # as transformers saved it
    ours: Decoder
    theirs: transformers.PreTrainedModel
    batch: torch.Tensor  # [2, 100]


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs = transformers_model(**({"rms_norm_eps": 1e-3} | CASES[request.param]))
    theirs.save_pretrained(folder)
    ours = models.load(folder, dtype=torch.float32)
    return Pair(folder, ours, theirs, tokens(vocab_size=ours.config.vocab_size))


def test_logits_loss_and_gradients(pair, tmp_path):
    assert violations(against_transformers(pair.ours, pair.theirs, pair.batch, tmp_path)) == {}


def test_packed_is_unpacked(pair):
    """Gradients of documents in one row, and of each alone."""
    ours, row = pair.ours, pair.batch[:1]
    labels = shifted(supervised(row))
    ends = torch.tensor(DOCUMENTS).cumsum(0)
    labels[:, ends - 1] = -100
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
    packed = mean_nll(ours, row, labels, positions)
    count = (labels != -100).sum()
    alone = [x[None] for x in row[0].split(DOCUMENTS)], [y[None] for y in labels[0].split(DOCUMENTS)]
    unpacked = sum(mean_nll(ours, x, y, count=count) for x, y in zip(*alone))
    packed, unpacked = ({"loss": loss} | gradients(ours, loss) for loss in (packed, unpacked))
    assert violations({name: (packed[name], unpacked[name]) for name in unpacked}) == {}
    one_document = gradients(ours, mean_nll(ours, row, labels))
    assert max(distance(one_document[name], unpacked[name])[1] for name in one_document) > 0.1


def test_answers_share_their_prompt(pair):
    """Gradients of [prompt, answer, answer, answer] twice in a row, and of each answer with a prompt of its own."""
    if unshareable(pair.ours, RoutingConfig()):
        assert {GatedDeltaNet, LongRope} & {*map(type, pair.ours.modules()), *map(type, pair.ours.ropes)}
        pytest.skip("recurrent, or a RoPE by length")
    ours, row = pair.ours, pair.batch[:1]
    alone, shared = [], []  # (tokens, labels, positions)
    for at, prompt, answers in ((0, 31, (1, 20, 12)), (64, 1, (5, 9))):
        tokens, begin = row[0, at:], prompt
        for i, n in enumerate(answers):
            whole = torch.cat((tokens[:prompt], tokens[begin : begin + n]))
            labels = torch.cat((whole.new_full((prompt - 1,), -100), whole[prompt:], whole.new_full((1,), -100)))
            alone.append((whole, labels, torch.arange(len(whole))))
            shared.append(tuple(x[prompt - 1 if i else 0 :] for x in alone[-1]))
            begin += n
    losses = [mean_nll(ours, *(torch.cat(x)[None] for x in zip(*parts))) for parts in (shared, alone)]
    assert len(torch.cat([x for x, _, _ in shared])) < len(torch.cat([x for x, _, _ in alone]))
    got, want = ({"loss": loss} | gradients(ours, loss) for loss in losses)
    assert violations({name: (got[name], want[name]) for name in want}) == {}


def test_hub_round_trip_is_bit_exact(pair, tmp_path):
    hub.save(pair.ours, tmp_path)
    want, got = (load_file(folder / "model.safetensors") for folder in (pair.folder, tmp_path))
    assert got.keys() == want.keys()
    assert all(got[n].dtype == want[n].dtype and torch.equal(got[n], want[n]) for n in want)
    assert read_json(tmp_path / "config.json") == read_json(pair.folder / "config.json")
    again, info = type(pair.theirs).from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(again(pair.batch).logits, pair.theirs(pair.batch).logits)


def test_greedy_is_transformers(pair):
    """From a prompt shorter than windows and one longer, past them both; alone and in one batch."""
    prompts = [pair.batch[0, :7].tolist(), pair.batch[1, :45].tolist()]
    want = []
    for prompt in prompts:
        row = torch.tensor([prompt])
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 30}
        out = pair.theirs.generate(row, attention_mask=torch.ones_like(row), **options)
        want.append(out[0, len(prompt) :].tolist())
    assert [generate(pair.ours, [p], max_new_tokens=30, stop_ids=())[0] for p in prompts] == want
    if not any(isinstance(rope, LongRope) for rope in pair.ours.ropes):  # a batch has one reach
        assert generate(pair.ours, prompts, max_new_tokens=30, stop_ids=()) == want


def wrong_numbers(fields, path=()):
    """(path, wrong value) of each number in a ConfigJson that the family reads and that is no shape."""
    for key in sorted(fields.known & fields.keys()):
        value = fields[key]
        if isinstance(value, ConfigJson):
            yield from wrong_numbers(value, (*path, key))
        elif type(value) is float and value:
            yield (*path, key), value / 2 if key == "partial_rotary_factor" else value * 1.5
        elif type(value) is int and key == "sliding_window":
            yield (*path, key), value + 1
        elif type(value) is int and key == "original_max_position_embeddings":
            yield (*path, key), value * 2


def test_bars_see_every_wrong_number(pair):
    """Each number of config.json that is not a shape, slightly wrong: eps, bases, windows by one, scales, caps."""
    raw = read_json(pair.folder / "config.json")
    fields = ConfigJson(raw)
    models.architecture(raw).from_hub(fields)
    mistakes = dict(wrong_numbers(fields))
    if ("original_max_position_embeddings",) in mistakes:  # Phi's place for it wins, and is LongRoPE's alone
        is_long = fields["rope_parameters"].get("rope_type") == "longrope"
        mistakes.pop((*("rope_parameters",) * is_long, "original_max_position_embeddings"))
    assert len(mistakes) >= 2
    with torch.no_grad():
        want = pair.theirs(pair.batch).logits
        for path, value in mistakes.items():
            wrong = json.loads(json.dumps(raw))
            section = wrong
            for key in path[:-1]:
                section = section[key]
            section[path[-1]] = value
            try:
                ours = models.build(wrong, device="cpu")
            except UserError:
                continue
            ours.load_state_dict(pair.ours.state_dict())
            assert "logits" in violations({"logits": (ours.eval()(pair.batch), want)}), f"{path} = {value} is not seen"


def test_bars_see_a_norm_of_the_other_kind(pair):
    """weight for 1 + weight, or the other way, in any one of a layer's norms or the last one."""
    with torch.no_grad():
        want = pair.theirs(pair.batch).logits
        layer = pair.ours.layers[0]
        norms = [m for m in (*layer.modules(), pair.ours.norm) if isinstance(m, RMSNorm)]
        for norm in norms:
            norm.offset = 1.0 - norm.offset
            got = pair.ours(pair.batch)
            norm.offset = 1.0 - norm.offset
            assert "logits" in violations({"logits": (got, want)})
