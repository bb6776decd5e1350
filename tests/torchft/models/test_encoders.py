"""Encoders against transformers in fp32 with tiny random models: hidden states and all gradients of padded and packed
rows, the Hub's files both ways; and every size against what its repository publishes."""

import json

import cpu_kernels
import pytest
import torch
import transformers
from oracles import gradients, in_our_names, violations
from safetensors.torch import load_file, save_file
from tiny import SIZES, edit_config, random_, tokens

from torchft import hub, models
from torchft.errors import UserError
from torchft.files import read_json
from torchft.modules import masks
from torchft.modules.masks import Sight

LENGTHS = (61, 33)  # tokens of the two documents
COMMON = {k: v for k, v in SIZES.items() if k not in ("rms_norm_eps", "num_key_value_heads", "eos_token_id")}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CASES = {
    "bert": ("BertModel", NO_DROPOUT | {"layer_norm_eps": 1e-3}),
    "xlm_roberta": ("XLMRobertaModel", NO_DROPOUT | {"layer_norm_eps": 1e-3, "pad_token_id": 1, "type_vocab_size": 1}),
    "modernbert": (
        "ModernBertModel",
        {"num_hidden_layers": 4, "local_attention": 24, "norm_eps": 1e-3, "bos_token_id": 0, "eos_token_id": 2,
         "cls_token_id": 0, "sep_token_id": 2},
    ),
    "modernbert_biases": (
        "ModernBertModel",
        {"local_attention": 24, "attention_bias": True, "mlp_bias": True, "norm_bias": True, "bos_token_id": 0,
         "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2},
    ),
}  # fmt: skip


def encoder(architecture, **changes):
    cls = getattr(transformers, architecture)
    config = cls.config_class(**(COMMON | changes))
    config._attn_implementation = "eager"
    options = {} if architecture == "ModernBertModel" else {"add_pooling_layer": False}
    return around_one(random_(cls(config, **options)))


def around_one(theirs):
    for name, p in theirs.named_parameters():
        if name.endswith("LayerNorm.weight"):
            p.data += 1.0
    return theirs


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    architecture, changes = CASES[request.param]
    theirs = encoder(architecture, **changes)
    theirs.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", models.load(tmp_path / "theirs", dtype=torch.float32), theirs


def padded():
    """Rows of LENGTHS tokens with random ones behind them; positions that begin again there; what is no padding."""
    batch = tokens().clamp_min(3)  # not XLM-R's padding token, of which transformers counts no position
    is_real = torch.arange(100) < torch.tensor(LENGTHS)[:, None]
    positions = torch.stack([torch.cat((torch.arange(n), torch.arange(100 - n))) for n in LENGTHS])
    return batch, positions, is_real


def with_gradients(ours, theirs, hidden, want, folder):
    """Both hidden states [t, d] of real tokens, and gradients of their weighted sum."""
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    got_grads = gradients(ours, (hidden * weights).sum())
    params = dict(theirs.named_parameters())
    grads = torch.autograd.grad((want * weights).sum(), list(params.values()))
    want_grads = in_our_names(theirs, folder, dict(zip(params, grads)))
    assert got_grads.keys() == want_grads.keys()
    scale = max(g.abs().max() for g in want_grads.values())  # sums over 94 tokens of weights of size 1
    for name in [
        n for n in want_grads if n.endswith("k_proj.bias") and ours.ropes[0] is None
    ]:  # the same in all scores
        assert max(grads.pop(name).abs().max() for grads in (got_grads, want_grads)) < 1e-6 * scale
    return {"hidden": (hidden, want)} | {n: (got_grads[n] / scale, want_grads[n] / scale) for n in want_grads}


def test_padded_rows(pair, tmp_path):
    _, ours, theirs = pair
    batch, positions, is_real = padded()
    want = theirs(batch, attention_mask=is_real.long()).last_hidden_state[is_real]
    assert violations(with_gradients(ours, theirs, ours(batch, positions)[is_real], want, tmp_path / "g")) == {}
    later_seen = ours(batch)[is_real]
    assert violations({"hidden": (later_seen, want)})  # the bars see padding that is looked at


def test_packed_rows(pair, tmp_path):
    _, ours, theirs = pair
    batch, _, is_real = padded()
    row = batch[is_real][None]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    want = theirs(batch, attention_mask=is_real.long()).last_hidden_state[is_real]
    assert violations(with_gradients(ours, theirs, ours(row, positions)[0], want, tmp_path / "g")) == {}


@pytest.mark.gpu
def test_packed_rows_on_gpu(pair, monkeypatch):
    """FlashAttention's kernel in bf16, of packed documents, to both sides and in windows: as near to fp32 as plain bf16
    attention is, hidden states and gradients."""
    check_flash(pair[1], "cuda", monkeypatch)


def test_packed_rows_through_the_kernels_of_a_gpu(pair, monkeypatch):
    """The same on a CPU, where the kernels are formulas: that what they are asked for is right."""
    monkeypatch.setattr(masks, "_kernel", lambda x, *_: "flash" if x.dtype == torch.bfloat16 else "dense")
    with cpu_kernels.installed():
        check_flash(pair[1], "cpu", monkeypatch)


def check_flash(ours, device, monkeypatch):
    lengths = (61, 1, 33, 128, 5)
    batch = tokens(1, sum(lengths), seed=5).clamp_min(3).to(device)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    weights = torch.randn(1, sum(lengths), 64, generator=torch.Generator().manual_seed(1)).to(device)

    def run(model):
        hidden = model(batch, positions)
        grads = gradients(model, (hidden.float() * weights).sum())
        grads = {n: g for n, g in grads.items() if not n.endswith("k_proj.bias")}  # with BERT's positions they are 0
        return [hidden.detach().float().flatten(), *(g.float().flatten() for g in grads.values())]

    def error(found):
        return torch.stack([(a - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)])

    exact = run(ours.to(device))
    model = ours.bfloat16()
    seen = masks.visible(model.embed_tokens(batch), 16, Sight(window=13, causal=False), positions)
    assert (seen.kernel, seen.causal, seen.window) == ("flash", False, 13)
    flash = error(run(model))
    monkeypatch.setattr(masks, "_kernel", lambda *_: "dense")
    dense = error(run(model))
    assert flash[0] <= 1.5 * dense[0] + 1e-3 and flash.mean() <= 1.5 * dense.mean() + 1e-3
    assert flash.max() <= 2 * dense.max() + 1e-3
    assert error(run_without_borders(model, batch, run))[0] > 10 * flash[0]


def run_without_borders(model, batch, run):
    """As if the row were one document: the bars see it."""
    hidden = model(batch)
    return [hidden.detach().float().flatten(), *run(model)[1:]]


def test_hub_round_trip_is_bit_exact(pair, tmp_path):
    folder, ours, theirs = pair
    hub.save(ours, tmp_path / "ours")
    want, got = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "ours"))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert read_json(tmp_path / "ours" / "config.json") == read_json(folder / "config.json")
    again = type(theirs).from_pretrained(tmp_path / "ours", dtype=torch.float32, attn_implementation="eager")
    batch = tokens().clamp_min(3)
    with torch.no_grad():
        assert torch.equal(again(batch).last_hidden_state, theirs(batch).last_hidden_state)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "XLMRobertaForMaskedLM", "ModernBertForMaskedLM"])
def test_heads_of_pretraining_are_left_out(kind, tmp_path):
    """A folder with a head, whose names have a prefix; of BERT with the norms' old names too."""
    name, changes = next((n, c) for n, c in CASES.values() if n.startswith(kind.partition("For")[0]))
    cls = getattr(transformers, kind)
    theirs = random_(cls(cls.config_class(**(COMMON | changes))))
    theirs.save_pretrained(tmp_path)
    if kind.startswith("Bert"):
        state = load_file(tmp_path / "model.safetensors")
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, was in old.items():
            state = {n.replace(new, was): t for n, t in state.items()}
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = models.load(tmp_path, dtype=torch.float32)
    batch = tokens().clamp_min(3)
    with torch.no_grad():
        want = theirs.base_model(batch).last_hidden_state
        assert violations({"hidden": (ours(batch), want)}) == {}
    assert ours.hub_format.config_json["architectures"] == [name]


def test_recipes_that_write_text_refuse_an_encoder(pair):
    with pytest.raises(UserError, match="is an encoder, which writes no text; embedding_finetune and reward"):
        models.config_json(pair[0])


def test_strange_fields_are_refused(pair):
    edit_config(pair[0], hidden_act="silu", hidden_activation="silu")
    with pytest.raises(UserError, match="'silu', but this family has only 'gelu'"):
        models.load(pair[0])


# Parameters of the encoder alone: those of the published files less pooler and head.
PARAMETERS = {
    "bert/bert-base-uncased": 109_482_240 - 590_592,
    "bert/bert-base-cased": 108_310_272 - 590_592,
    "bert/bert-large-uncased": 335_141_888 - 1_049_600,
    "bert/bert-large-cased": 333_579_264 - 1_049_600,
    "bert/all-MiniLM-L6-v2": 22_713_216 - 147_840,
    "bert/all-MiniLM-L12-v2": 33_360_000 - 147_840,
    "bert/ms-marco-MiniLM-L6-v2": 22_713_601 - 147_840 - 385,
    "bert/multilingual-e5-small": 117_653_760 - 147_840,
    "bert/bge-small-en-v1.5": 33_360_000 - 147_840,
    "bert/bge-base-en-v1.5": 109_482_240 - 590_592,
    "bert/bge-large-en-v1.5": 335_141_888 - 1_049_600,
    "xlm_roberta/xlm-roberta-base": 278_043_648 - 590_592,
    "xlm_roberta/xlm-roberta-large": 559_890_432 - 1_049_600,
    "xlm_roberta/multilingual-e5-base": 278_043_648 - 590_592,
    "xlm_roberta/multilingual-e5-large": 559_890_432 - 1_049_600,
    "xlm_roberta/bge-m3": 567_754_752 - 1_049_600,
    "xlm_roberta/bge-reranker-v2-m3": 567_755_777 - 1_049_600 - 1_025,
    "modernbert/ModernBERT-base": 149_655_232 - 640_960,
    "modernbert/ModernBERT-large": 395_881_664 - 1_099_968,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_released_sizes(name):
    model = models.build(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert models.build(json.loads(json.dumps(model.hub_format.config_json))).config == model.config


def test_every_size_is_held():
    assert set(PARAMETERS) == {f"{name}/{size}" for name, family in models.ENCODERS.items() for size in family.CONFIGS}
