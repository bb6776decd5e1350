"""Quantised checkpoints read as bf16 ones: MXFP4 against transformers, blocks of FP8 against the closed form."""

import json

import pytest
import torch
from families import experts
from oracles import violations
from safetensors.torch import load_file, save_file
from tiny import edit_config, tokens, transformers_model
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from torchft import hub, models
from torchft.dequantise import open_weights
from torchft.errors import UserError
from torchft.models.shallow import build_shallow

WIDE = {"hidden_size": 192, "intermediate_size": 160}


def rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def to_mxfp4(tensors):
    """Random codes in place of the experts' weights; returns nothing, changes the dictionary."""
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        num_experts, columns, rows = tensors.pop(name).shape
        shape = (num_experts, rows, columns // 32, 16)
        tensors[f"{name}_blocks"] = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 123, shape[:3], generator=generator, dtype=torch.uint8)


def test_mxfp4_is_transformers(tmp_path):
    case = experts.GPT_OSS | WIDE
    theirs = transformers_model(**case)
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, to_mxfp4)
    edit_config(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    packed = load_file(tmp_path / "model.safetensors")
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if f"{name}_blocks" in packed:
                p.copy_(convert_moe_packed_tensors(packed[f"{name}_blocks"], packed[f"{name}_scales"]))
    ours = models.load(tmp_path, dtype=torch.float32)
    batch = tokens()
    assert violations({"logits": (ours(batch), theirs(batch).logits)}) == {}

    name = "model.layers.1.mlp.experts.gate_up_proj"
    files, region = open_weights(tmp_path), (slice(2, 5), slice(40, 100), slice(3, 50))
    assert torch.equal(files.read(name, *region).float(), theirs.get_parameter(name)[region])

    hub.save(ours, tmp_path / "out", dtype=torch.bfloat16)  # exact: bf16 holds every value of MXFP4
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    again = models.load(tmp_path / "out", dtype=torch.float32)
    parameter = "layers.1.mlp.experts.gate_up_proj.weight"
    assert torch.equal(again.get_parameter(parameter), ours.get_parameter(parameter))


def to_fp8(tensors):
    """As DeepSeek stores matrices: e4m3 codes, and an inverse scale for each 128 x 128 of them."""
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors[name]
        rows, columns = (-(-n // 128) for n in weight.shape)
        padded = torch.zeros(rows * 128, columns * 128)
        padded[: weight.shape[0], : weight.shape[1]] = weight
        scales = padded.view(rows, 128, columns, 128).abs().amax((1, 3)) / 448
        full = torch.kron(scales, torch.ones(128, 128))[: weight.shape[0], : weight.shape[1]]
        tensors[name] = (weight / full).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales


@pytest.fixture
def fp8_folder(tmp_path):
    theirs = transformers_model(**(experts.DEEPSEEK | WIDE | {"moe_intermediate_size": 136}))
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, to_fp8)
    edit_config(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"})
    return tmp_path


def test_fp8_blocks(fp8_folder, tmp_path):
    """As much of each matrix as is asked for, across blocks, times the scale of its own block."""
    ours = models.load(fp8_folder, dtype=torch.float32)
    tensors = load_file(fp8_folder / "model.safetensors")
    q, scales = (tensors[f"model.layers.0.self_attn.o_proj.weight{end}"] for end in ("", "_scale_inv"))
    want = torch.tensor([[q[i, j].item() * scales[i // 128, j // 128].item() for j in range(80)] for i in range(192)])
    torch.testing.assert_close(ours.layers[0].self_attn.o_proj.weight.data, want)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"  # 192 x 136: four blocks
    files = open_weights(fp8_folder)
    assert torch.equal(files.read(name, slice(100, 150), slice(120, 136)), files.read(name)[100:150, 120:136])
    assert torch.equal(ours.layers[1].mlp.experts.down_proj.weight[3], files.read(name))
    assert len(load_file(fp8_folder / "model.safetensors")[f"{name}_scale_inv"].unique()) == 4
    hub.save(ours, tmp_path / "out")
    assert not any("scale_inv" in n for n in load_file(tmp_path / "out" / "model.safetensors"))


def test_a_scale_that_is_missing_is_an_error(fp8_folder):
    rewrite(fp8_folder, lambda tensors: tensors.pop("model.layers.0.self_attn.o_proj.weight_scale_inv"))
    with pytest.raises(UserError, match=r"o_proj.weight is stored as F8_E4M3, which cannot be trained"):
        models.load(fp8_folder)


def test_scales_of_other_blocks_are_refused_whatever_config_json_says(fp8_folder):
    """Read as 128 x 128, blocks of 64 gave weights that were wrong and looked right."""

    def finer(tensors):
        for name in [n for n in tensors if n.endswith("_scale_inv")]:
            tensors[name] = torch.ones(2, 2).kron(tensors[name])

    rewrite(fp8_folder, finer)
    with pytest.raises(UserError, match=r"FP8 tensors, such as .*scales of another shape.*block of 128 x 128"):
        models.load(fp8_folder)


@pytest.mark.parametrize("size", [None, [1, 128]])
def test_other_blocks_are_refused(fp8_folder, size):
    edit_config(fp8_folder, quantization_config={"quant_method": "fp8", "weight_block_size": size})
    with pytest.raises(UserError, match=r"quantised weights.*'fp8'.*original"):
        models.load(fp8_folder)


def test_layers_behind_the_last_are_left_out(tmp_path):
    """Those of multi-token prediction; of a model with more layers they would be its own."""
    transformers_model(**experts.GLM4_MOE).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.zeros(2, 2)}))
    models.load(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.4.eh_proj.weight": torch.zeros(2, 2)}))
    with pytest.raises(UserError, match=r"no place for: model.layers.4.eh_proj.weight"):
        models.load(tmp_path)


@pytest.mark.parametrize("case", ["glm4_moe", "deepseek_v3"])
def test_a_layer_that_config_json_does_not_count_is_none_of_these(case, tmp_path):
    transformers_model(**experts.CASES[case]).save_pretrained(tmp_path)
    edit_config(tmp_path, num_hidden_layers=2)
    with pytest.raises(UserError, match=r"no place for: model\.layers\.2\."):
        models.load(tmp_path)


def test_what_is_written_counts_no_layers_that_are_left_out(tmp_path):
    """Nor does a student of the first blocks have the teacher's."""
    transformers_model(**experts.GLM4_MOE).save_pretrained(tmp_path / "in")
    rewrite(tmp_path / "in", lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.zeros(2, 2)}))
    edit_config(tmp_path / "in", num_nextn_predict_layers=1)  # as transformers writes it where there are none, too
    hub.save(models.load(tmp_path / "in"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    student = build_shallow(models.config_json(tmp_path / "in"), 2).to_empty(device="cpu")
    hub.load_weights(student, tmp_path / "in")
    assert student.hub_format.config_json["num_nextn_predict_layers"] == 0
    whole = models.load(tmp_path / "in")
    assert torch.equal(student.layers[1].self_attn.q_proj.weight.bfloat16(), whole.layers[1].self_attn.q_proj.weight)


def test_the_correction_stays_fp32_in_files(tmp_path):
    transformers_model(**experts.DEEPSEEK).save_pretrained(tmp_path / "in")
    ours = models.load(tmp_path / "in", dtype=torch.bfloat16)
    hub.save(ours, tmp_path / "out", dtype=torch.bfloat16)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    want, got = (load_file(tmp_path / kind / "model.safetensors") for kind in ("in", "out"))
    assert torch.equal(got[name], want[name]) and got[name].dtype == torch.float32
    assert got["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16
