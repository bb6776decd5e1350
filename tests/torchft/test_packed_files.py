"""Packed integer weights against compressed-tensors, which packs them, and transformers, which reads them with it."""

import json
import re

import pytest
import torch
from families.experts import DEEPSEEK, KIMI
from oracles import violations
from safetensors.torch import load_file, save_file
from tiny import LLAMA3_ROPE, edit_config, tokens, transformers_model
from transformers import AutoModelForCausalLM

from torchft import hub, models
from torchft.dequantise import open_weights
from torchft.errors import UserError

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, dequantize, quantize

WEIGHT = "model.layers.0.mlp.down_proj.weight"  # [64, 108]: rows that do not fill their last word
LLAMA = {"architectures": ["LlamaForCausalLM"], "rope_parameters": LLAMA3_ROPE, "intermediate_size": 108}
MOE = DEEPSEEK | KIMI | {"intermediate_size": 104}
GROUPS = {"type": "int", "symmetric": True, "strategy": "group", "group_size": 4, "dynamic": False}
ROWS = GROUPS | {"strategy": "channel", "group_size": None}


def write(folder, case, weights):
    """A packed folder, and transformers' model with what compressed-tensors says that it holds."""
    model, args = transformers_model(**case).to(torch.bfloat16), QuantizationArgs(**weights)
    model.save_pretrained(folder)
    path, stored = folder / "model.safetensors", {}
    plain = load_file(path)
    for name, weight in plain.items():
        if not re.search(r"(mlp\.|experts\.|self_attn\.)\S*_proj\.weight", name):
            stored[name] = weight
            continue
        largest = weight.unflatten(1, (-1, weights["group_size"] or weight.shape[1])).abs().amax(-1)
        scale = (largest / (2 ** (weights["num_bits"] - 1) - 0.5)).to(torch.bfloat16)
        codes = quantize(weight, scale, torch.zeros_like(scale), args, dtype=torch.int8)
        stored[f"{name}_packed"] = pack_to_int32(codes, weights["num_bits"])
        stored[f"{name}_scale"], stored[f"{name}_shape"] = scale, torch.tensor(weight.shape)
        plain[name] = dequantize(codes, scale, torch.zeros_like(scale), args)
    save_file(plain, path, metadata={"format": "pt"})
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    save_file(stored, path, metadata={"format": "pt"})
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    fields = {"config_groups": {"group_0": group}, "format": "pack-quantized", "ignore": ["lm_head"]}
    fields["quantization_status"] = "compressed"
    edit_config(folder, quantization_config=fields | {"quant_method": "compressed-tensors"})
    return rounded, plain


@pytest.mark.parametrize("case", [LLAMA, MOE], ids=["llama", "experts"])
@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("weights", [GROUPS, ROWS], ids=["groups", "rows"])
def test_values_are_those_of_compressed_tensors(tmp_path, case, weights, num_bits):
    theirs, plain = write(tmp_path, case, weights | {"num_bits": num_bits})
    files = open_weights(tmp_path)
    assert files.names() == set(plain)
    for name, want in plain.items():
        assert torch.equal(files.read(name), want) and files.shape(name) == want.shape, name
        assert files.dtype(name) == "BF16" and name in files
    for rows, columns in ((slice(3, 50), slice(7, 101)), (slice(0, 64), slice(104, 108)), (slice(63, 64), slice(0, 1))):
        region = (rows, columns) if case is LLAMA else (rows, slice(columns.start // 2, columns.stop // 2))
        assert torch.equal(files.read(WEIGHT, *region), plain[WEIGHT][region])

    ours, batch = models.load(tmp_path, dtype=torch.float32), tokens()
    assert violations({"logits": (ours(batch), theirs.float()(batch).logits)}) == {}
    hub.save(ours, tmp_path / "out", dtype=torch.bfloat16)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(again[name], want) for name, want in plain.items())


def test_transformers_reads_the_same(tmp_path):
    _, plain = write(tmp_path, LLAMA, GROUPS | {"num_bits": 4})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        theirs(tokens())  # the first pass unpacks
    assert torch.equal(theirs.get_parameter(WEIGHT), plain[WEIGHT])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_bits": 3}, r"group_0.weights.num_bits 3"),
        ({"symmetric": False}, r"group_0.weights.symmetric False"),
        ({"actorder": "group"}, r"group_0.weights.actorder 'group'"),
        ({"strategy": "block", "type": "float"}, r"weights.type 'float', group_0.weights.strategy 'block'"),
    ],
)
def test_what_is_packed_otherwise_is_refused_by_its_fields(tmp_path, fields, message):
    write(tmp_path, LLAMA, GROUPS | {"num_bits": 4})
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_0"]["weights"] |= fields
    edit_config(tmp_path, quantization_config=config)
    with pytest.raises(UserError, match=f"'compressed-tensors', .*{message}.*take the original"):
        models.load(tmp_path)


def test_other_formats_of_compressed_tensors_are_refused(tmp_path):
    write(tmp_path, LLAMA, GROUPS | {"num_bits": 4})
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    for change, message in {
        "nvfp4": ({"format": "nvfp4-pack-quantized"}, "group_0.format 'nvfp4-pack-quantized'"),
        "none": ({"config_groups": {}}, r"config_groups \(none\)"),
    }.values():
        edit_config(tmp_path, quantization_config=config | change)
        with pytest.raises(UserError, match=message):
            models.load(tmp_path)


def test_files_that_contradict_themselves(tmp_path):
    write(tmp_path, LLAMA, GROUPS | {"num_bits": 4})
    whole = load_file(tmp_path / "model.safetensors")
    for change in (
        {f"{WEIGHT}_shape": torch.tensor([64, 300])},
        {f"{WEIGHT}_shape": torch.tensor([60, 108])},
        {f"{WEIGHT}_scale": whole[f"{WEIGHT}_scale"][:, :25].contiguous()},
    ):
        save_file(whole | change, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=rf"{WEIGHT}_packed does not fit its scales and shape"):
            open_weights(tmp_path)
    save_file({k: v for k, v in whole.items() if k != f"{WEIGHT}_shape"}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="does not fit"):
        open_weights(tmp_path)
    save_file(whole | {f"{WEIGHT}_zero_point": torch.zeros(8, 27, dtype=torch.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"{WEIGHT}_zero_point moves or reorders"):
        open_weights(tmp_path)
