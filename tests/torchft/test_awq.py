"""AWQ: scales against torchao's own on transformers' model, and what a folder with them computes."""

import json

import pytest
import torch
from families import dense
from oracles import violations
from safetensors.torch import load_file
from tiny import tokens, transformers_model
from torchao.prototype.awq import AWQConfig, AWQObservedLinear
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM

from torchft import models
from torchft.adapters.formats import torchao_config
from torchft.dequantise import open_weights
from torchft.quantise import Quantisation, calibrated, quantise_folder

CPU, FP32 = torch.device("cpu"), torch.float32
HOW = Quantisation(format="int4", packed=True)
NAME = "model.layers.1.mlp.down_proj.weight"
TEXTS = [row[:length].tolist() for row, length in zip(tokens(rows=3), (100, 37, 64))]


@pytest.fixture(scope="module", params=["dense", "fused"])
def source(request, tmp_path_factory):
    """Of which embeddings, and so inputs, are of very different sizes."""
    folder = tmp_path_factory.mktemp(request.param)
    model = transformers_model(**{"dense": dense.LLAMA, "fused": dense.PHI3}[request.param])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.mul_(torch.logspace(-1, 1, len(parameter)))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scales(source):
    return calibrated(models.load(source, dtype=FP32), TEXTS, source, HOW, dtype=FP32)


def test_scales_are_torchaos(source, scales):
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=FP32).eval()
    config = AWQConfig(torchao_config("int4", group_size=32), step="prepare")
    quantize_(theirs, config, lambda module, name: isinstance(module, torch.nn.Linear) and name != "lm_head")
    with torch.no_grad():
        for text in TEXTS:
            theirs(torch.tensor([text]))
        observed = {f"{n}.weight": m for n, m in theirs.named_modules() if isinstance(m, AWQObservedLinear)}
        for module in observed.values():  # torchao joins batches of one length only
            module.act_obs.inputs = [x.flatten(0, -2) for x in module.act_obs.inputs]
        want = {name: module.act_obs.calculate_qparams() for name, module in observed.items()}
    assert scales.keys() == want.keys()
    assert violations({name: (scales[name], want[name]) for name in want}) == {}
    assert max(scale.max() / scale.min() for scale in scales.values()) > 2


def test_the_folder_has_the_weights_as_they_are_then(source, scales, tmp_path):
    """Columns times scale, rounded, divided by scale: outputs are nearer to the layer's than without."""
    for kind, given in (("plain", None), ("awq", scales)):
        (tmp_path / kind).mkdir()
        names = quantise_folder(source, tmp_path / kind, HOW, device=CPU, dtype=FP32, scales=given)
    before, plain, files = (open_weights(folder) for folder in (source, tmp_path / "plain", tmp_path / "awq"))
    model = models.load(source, dtype=FP32)
    with torch.no_grad():
        x = model.layers[0].attn_norm(model.embed_tokens(torch.tensor([token for text in TEXTS for token in text])))
    first = next(name for name in names if ".0.self_attn.q" in name)
    errors = [((read.read(first) - before.read(first)) @ x.T).norm() for read in (plain, files)]
    assert errors[1] < 0.9 * errors[0]
    stored = load_file(tmp_path / "awq" / "model.safetensors")
    inputs = stored[NAME.replace(".weight", "._weight_act_pre_scale")]
    torch.testing.assert_close(inputs, 1 / scales[NAME])
    largest = (before.read(NAME) * scales[NAME]).unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True)
    step = (largest / 7.5).expand(-1, -1, 32).flatten(1) / scales[NAME]
    assert ((files.read(NAME) - before.read(NAME)).abs() <= 1.001 * step).all()
    assert files.names() == plain.names() and set(names) == set(scales)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "awq", dtype=FP32).get_parameter(NAME)
    assert type(theirs).__name__ == "Int4Tensor" and torch.equal(theirs.act_pre_scale, inputs)
    about = json.loads(files.metadata()[NAME])
    assert "act_pre_scale" in about["_tensor_data_names"]
