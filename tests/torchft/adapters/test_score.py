"""Score heads of encoders against transformers' *ForSequenceClassification: scores, loss and every gradient, of texts
and pairs, in padded and packed rows; what a checkpoint holds of a head; the Hub's files both ways."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import experts
from oracles import gradients, violations
from safetensors.torch import load_file
from tiny import SIZES, random_, transformers_model

from torchft import hub, models
from torchft.adapters.score import apply_score_head, init_score_head
from torchft.documents import Documents
from torchft.errors import UserError
from torchft.files import read_json
from torchft.losses.reward import binary_cross_entropy, cross_entropy, document_scores

COMMON = {k: v for k, v in SIZES.items() if k not in ("rms_norm_eps", "num_key_value_heads", "eos_token_id")}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
MODERN = {"local_attention": 24, "bos_token_id": 0, "eos_token_id": 99, "cls_token_id": 0, "sep_token_id": 99}
CASES = {
    "Bert": NO_DROPOUT | {"layer_norm_eps": 1e-3},
    "XLMRoberta": NO_DROPOUT | {"layer_norm_eps": 1e-3, "pad_token_id": 1, "type_vocab_size": 1},
    "ModernBert": MODERN | {"num_hidden_layers": 4, "norm_eps": 1e-3},
    "ModernBert, mean": MODERN | {"classifier_pooling": "mean", "classifier_bias": True, "norm_bias": True},
}
LABELS = ["no", "maybe", "yes"]
SEPARATOR = 99
PAIRS = ((20, 33), (41, 7), (30, 0))  # tokens of both texts with their separators; the last is one text


def theirs_of(case, kind="ForSequenceClassification", **more):
    cls = getattr(transformers, case.partition(",")[0] + kind)
    config = cls.config_class(**(COMMON | CASES[case] | more), num_labels=3)
    config._attn_implementation = "eager"
    model = random_(cls(config), std=0.15)
    for name, p in model.named_parameters():
        if name.endswith("LayerNorm.weight"):
            p.data += 1.0
    return model


def scorer(folder, labels=LABELS, *, separator=SEPARATOR, problem=None):
    model = models.build(models.config_json(folder, encoders=True, separator=separator))
    apply_score_head(model, list(labels), per_token=False, pad_id=None, problem=problem)
    absent = hub.lacking(model, folder)
    model.to_empty(device="cpu")
    hub.load_weights(model, folder)
    init_score_head(model, 0, lacking=absent)
    return model, absent


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture
def pair(case, tmp_path):
    theirs = theirs_of(case)
    theirs.save_pretrained(tmp_path / "theirs")
    model, absent = scorer(tmp_path / "theirs")
    assert absent == set()
    return model, theirs


def texts():
    """Documents, and of each token 1 if it is of the second text."""
    generator = torch.Generator().manual_seed(3)
    documents, types = [], []
    for lengths in PAIRS:
        parts = [torch.randint(3, 99, (n,), generator=generator) for n in lengths if n]
        for part in parts:
            part[-1] = SEPARATOR
        documents.append(torch.cat(parts))
        types.append(torch.cat([torch.full_like(part, i) for i, part in enumerate(parts)]))
    return documents, types


def hub_scores(theirs):
    documents, types = texts()
    ids, kinds = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True, padding_value=0) for x in (documents, types))
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(d) for d in documents], batch_first=True)
    more = {"token_type_ids": kinds} if theirs.config.model_type == "bert" else {}
    return theirs(input_ids=ids, attention_mask=mask, **more).logits


def our_scores(ours, *, packed):
    """Rows that hold the documents, one each or all, and padding, in which there may be separators."""
    documents, _ = texts()
    groups = [documents] if packed else [[d] for d in documents]
    length = max(sum(map(len, group)) for group in groups) + 5
    rows = torch.full((len(groups), length), SEPARATOR)
    positions = torch.zeros_like(rows)
    places, found = [], 0
    for r, group in enumerate(groups):
        at = 0
        for document in group:
            rows[r, at : at + len(document)] = document
            positions[r, at : at + len(document)] = torch.arange(len(document))
            at += len(document)
            places.append(found)
            found += 1
        positions[r, at:] = torch.arange(length - at)
        found += 1
    where = {"positions": positions, "count": found, "documents_of": torch.tensor(places)[:, None]}
    head = partial(document_scores, score=ours.lm_head, pooling=ours.config.pooling, **where)
    return ours(rows, positions, head, documents=Documents(found, length))[:, 0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_scores_loss_and_gradients(case, pair, tmp_path, packed, several):
    ours, theirs = pair
    targets = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    got, want = our_scores(ours, packed=packed), hub_scores(theirs)
    theirs.config.problem_type = "multi_label_classification" if several else "single_label_classification"
    if several:
        losses = binary_cross_entropy(got, targets).mean(), F.binary_cross_entropy_with_logits(want, targets)
    else:
        losses = cross_entropy(got, targets).mean(), F.cross_entropy(want, targets.argmax(1))
    assert violations({"scores": (got, want), "loss": losses}) == {}
    params = dict(theirs.named_parameters())
    grads = torch.autograd.grad(losses[1], list(params.values()), allow_unused=True)
    with torch.no_grad():
        for p, grad in zip(params.values(), grads):
            p.copy_(torch.zeros_like(p) if grad is None else grad)
    theirs.save_pretrained(tmp_path / "gradients")
    want_grads = dict(scorer(tmp_path / "gradients")[0].named_parameters())
    got_grads = gradients(ours, losses[0])
    assert got_grads.keys() == want_grads.keys() and "lm_head.dense.weight" in got_grads
    scale = max(g.abs().max() for g in want_grads.values())
    skip = [n for n in want_grads if n.endswith("k_proj.bias") and ours.ropes[0] is None]  # the same in all scores
    assert all(max(g[n].abs().max() for g in (got_grads, want_grads)) < 1e-5 * scale for n in skip)
    of_all = {n: (got_grads[n] / scale, want_grads[n] / scale) for n in want_grads if n not in skip}
    assert violations(of_all) == {}


def test_the_bars_see_types_pooling_and_other_documents(case, pair, tmp_path):
    ours, theirs = pair
    want = hub_scores(theirs)
    if case == "Bert":
        without, _ = scorer(tmp_path / "theirs", separator=None)
        assert violations({"scores": (our_scores(without, packed=True), want)})
    at_ends = partial(document_scores, score=ours.lm_head, pooling="last")
    documents, _ = texts()
    where = {"positions": None, "count": 1, "documents_of": torch.tensor([[0]])}
    assert violations({"scores": (ours(documents[0][None], head=partial(at_ends, **where))[0], want[:1])})


def test_exports_load_in_transformers(case, pair, tmp_path):
    ours, theirs = pair
    hub.save(ours, tmp_path / "ours")
    assert (
        load_file(tmp_path / "ours" / "model.safetensors").keys()
        == load_file(tmp_path / "theirs" / "model.safetensors").keys()
    )
    again, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(again) is type(theirs) and again.config.id2label == dict(enumerate(LABELS))
    with torch.no_grad():
        assert torch.equal(hub_scores(again.eval()), hub_scores(theirs))
    model, absent = scorer(tmp_path / "ours", separator=None)  # config.json says it now
    assert absent == set() and torch.equal(our_scores(model, packed=True), our_scores(ours, packed=True))


@pytest.mark.parametrize(
    ("case", "kind", "absent"),
    [
        ("Bert", "Model", {"weight", "bias"}),  # it has a pooler
        ("Bert", "ForMaskedLM", {"dense.weight", "dense.bias", "weight", "bias"}),
        ("XLMRoberta", "ForMaskedLM", {"dense.weight", "dense.bias", "weight", "bias"}),
        ("ModernBert", "ForMaskedLM", {"weight", "bias"}),  # whose head has the same first half
        ("ModernBert", "Model", {"dense.weight", "norm.weight", "weight", "bias"}),
    ],
)
def test_what_pretraining_left_is_kept(tmp_path, case, kind, absent):
    theirs = theirs_of(case, kind)
    theirs.save_pretrained(tmp_path)
    model, found = scorer(tmp_path)
    assert {name.removeprefix("lm_head.") for name in found} == absent
    again, _ = scorer(tmp_path)
    assert torch.equal(our_scores(model, packed=True), our_scores(again, packed=True))
    assert our_scores(model, packed=True).std() > 0.05 and (model.lm_head.bias == 0).all()


def test_another_number_of_labels_begins_anew(tmp_path):
    theirs_of("XLMRoberta").save_pretrained(tmp_path)
    model, absent = scorer(tmp_path, ["score"])
    assert absent == {"lm_head.weight", "lm_head.bias"}
    assert our_scores(model, packed=True).shape == (3, 1)


def test_labels_in_another_order_are_refused(case, pair, tmp_path):
    hub.save(pair[0], tmp_path / "ours")
    with pytest.raises(UserError, match=r"the checkpoint's head has them in the order \['no', 'maybe', 'yes'\]"):
        scorer(tmp_path / "ours", ["yes", "no", "maybe"])
    model = models.build(models.config_json(tmp_path / "theirs", encoders=True))
    with pytest.raises(UserError, match="is an encoder, which sees the steps that follow"):
        apply_score_head(model, ["wrong", "right"], per_token=True, pad_id=None)


def test_the_problem_is_written(tmp_path):
    theirs_of("Bert").save_pretrained(tmp_path / "theirs")
    model, _ = scorer(tmp_path / "theirs", problem="multi_label_classification")
    hub.save(model, tmp_path / "ours")
    assert read_json(tmp_path / "ours" / "config.json")["problem_type"] == "multi_label_classification"


@pytest.mark.parametrize("kind", ["per_expert", "stacked"])
def test_a_mixture_of_experts_gets_a_head_from_either_layout(kind, tmp_path):
    """And again from what is written, where the head is known."""
    case = experts.CASES["qwen3_moe"]
    transformers_model(**case).save_pretrained(tmp_path / "in", save_original_format=kind == "per_expert")
    ours, absent = scorer(tmp_path / "in")
    assert absent == {"lm_head.weight"}
    hub.save(ours, tmp_path / "out")
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert "score.weight" in names and any(".experts.0." in name for name in names) == (kind == "per_expert")
    theirs, info = transformers.Qwen3MoeForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()) and torch.equal(theirs.score.weight, ours.lm_head.weight)
