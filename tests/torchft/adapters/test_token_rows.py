"""Trained rows of the vocabulary: PEFT's trainable_token_indices in logits, gradients, merged weights and files."""

import copy
from functools import partial

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from torchft import hub, models
from torchft.adapters.lora import LoRAConfig, adapters_off, apply_lora, init_adapters, merged_tensor
from torchft.adapters.peft import save_peft
from torchft.adapters.token_rows import apply_token_rows, token_rows
from torchft.errors import UserError
from torchft.losses.likelihood import nll_sum

IDS = [3, 40, 41, 42, 100]  # alone, neighbours, the last one
TOKENS = tiny.tokens(length=50)
CONFIG = LoRAConfig(rank=4, alpha=7.0, targets=["q_proj", "down_proj"])


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path):
    tiny.checkpoint(tmp_path / "base", tie_word_embeddings=request.param)
    return tmp_path / "base"


def peft_model(base, *, seed=1):
    """PEFT's, with adapters and rows that are far from the base's."""
    hub_model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tied = hub_model.config.tie_word_embeddings
    config = peft.LoraConfig(
        r=CONFIG.rank,
        lora_alpha=CONFIG.alpha,
        target_modules=list(CONFIG.targets),
        trainable_token_indices=IDS if tied else {"embed_tokens": IDS, "lm_head": IDS},
    )
    model = peft.get_peft_model(hub_model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "trainable_tokens_delta" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def their_name(name):
    """Of PEFT's parameter, by our name."""
    module, _, child = name.rpartition(".")
    module = module if module == "lm_head" else f"model.{module}"
    suffix = {"lora_a": "lora_A.default.weight", "lora_b": "lora_B.default.weight"}
    return f"base_model.model.{module}." + suffix.get(child, "token_adapter.trainable_tokens_delta.default")


@pytest.fixture
def both(base):
    """PEFT's model and ours with its numbers."""
    theirs = peft_model(base)
    model = models.load(base, dtype=torch.float32)
    apply_lora(model, CONFIG)
    apply_token_rows(model, IDS)
    init_adapters(model)
    numbers = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(numbers[their_name(name)])
    return theirs, model


def test_what_is_trained_begins_as_it_was(base):
    plain, model = models.load(base, dtype=torch.float32), models.load(base, dtype=torch.float32)
    apply_lora(model, CONFIG)
    apply_token_rows(model, IDS)
    init_adapters(model)
    assert (model(TOKENS) - plain(TOKENS)).abs().max() < 1e-5
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "layers" not in name}
    assert trained == {f"{name}.lora_rows" for name in token_rows(model)}
    assert set(token_rows(model)) == {"embed_tokens"} | ({"lm_head"} if model.lm_head is not None else set())


def test_logits_loss_and_every_gradient_are_pefts(both):
    theirs, model = both
    labels = TOKENS.roll(-1, 1)
    wanted = theirs(TOKENS).logits
    assert (model(TOKENS) - wanted).abs().max() < 1e-4
    loss = torch.nn.functional.cross_entropy(wanted.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    ours = model(TOKENS, head=partial(nll_sum, labels=labels, chunk=16))
    ours.backward()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    seen = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            want = gradients[their_name(name)]
            assert (parameter.grad - want).norm() <= 1e-5 * want.norm(), name
            seen += 1
        else:
            assert parameter.grad is None
    assert seen == len(gradients)


def test_merged_weights_and_the_exported_model_are_pefts(both, base, tmp_path):
    theirs, model = both
    with torch.no_grad():
        wanted = copy.deepcopy(theirs).merge_and_unload()(TOKENS).logits
    hub.save(model, tmp_path / "merged", read=partial(merged_tensor, model))
    exported = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert (exported(TOKENS).logits - wanted).abs().max() < 1e-4
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) == (model.lm_head is not None)
    before = models.load(base, dtype=torch.float32).embed_tokens.weight
    others = [i for i in range(101) if i not in IDS]
    merged = merged_tensor(model, "embed_tokens.weight")
    assert torch.equal(merged[others], before[others]) and not torch.equal(merged[IDS], before[IDS])


def test_peft_reads_ours(both, base, tmp_path, caplog):
    theirs, model = both
    rename = model.hub_format.names.rename
    save_peft(model, tmp_path / "adapter", hub_name=rename, base_model_name_or_path=str(base))
    loaded = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    assert (loaded(TOKENS).logits - theirs(TOKENS).logits).abs().max() < 1e-4
    assert "export the merged model" in caplog.text


def test_adapters_off_is_the_base(both, base):
    _, model = both
    with adapters_off(model), torch.no_grad():
        assert torch.equal(model(TOKENS), models.load(base, dtype=torch.float32)(TOKENS))
    assert (model(TOKENS) - models.load(base, dtype=torch.float32)(TOKENS)).abs().max() > 0.1


def test_ids_without_a_row_and_heads_with_an_adapter_are_refused(base):
    model = models.load(base, dtype=torch.float32)
    with pytest.raises(UserError, match="trainable_tokens: id 101 is outside the model's 101 embedding rows"):
        apply_token_rows(model, [3, 101])
    if model.lm_head is not None:
        apply_lora(model, LoRAConfig(targets=["lm_head"]))
        with pytest.raises(UserError, match=r"leave lm_head out of lora\.targets"):
            apply_token_rows(model, [3])
