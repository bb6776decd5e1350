"""Quantised folders: values against closed forms, logits against transformers' reading of them, and what is refused."""

import json

import pytest
import torch
import torch._inductor.config
from families import dense, experts
from oracles import violations
from safetensors.torch import load_file, save_file
from tiny import checkpoint, edit_config, tokens, transformers_model
from transformers import AutoModelForCausalLM
from vocabularies import byte_level, write

from torchft import models
from torchft.dequantise import open_weights
from torchft.errors import UserError
from torchft.generation import loaded
from torchft.quantise import Quantisation, quantise_folder
from torchft.tokenizers import bpe

CPU = torch.device("cpu")
NAME = "model.layers.1.mlp.down_proj.weight"
KINDS = {
    "dense": dense.LLAMA,
    "fused": dense.PHI3,  # q, k and v are one tensor on the Hub, gate and up another
    "experts": experts.QWEN3_MOE,  # whose stacked weights stay as they are
}


def quantise(source, folder, *, dtype=torch.float32, **how):
    folder.mkdir()
    return quantise_folder(source, folder, Quantisation(**how), device=CPU, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", ["int4", "int8_int4", "int8", "fp8_weight"])
def test_transformers_computes_what_we_do(kind, format, tmp_path):
    source, folder = tmp_path / "source", tmp_path / "quantised"
    transformers_model(**KINDS[kind]).save_pretrained(source)
    names = quantise(source, folder, format=format)
    write(folder)
    byte_level(bpe.PATTERNS["Llama 3"], special=["<s>"]).save(str(folder / "tokenizer.json"))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours, _ = loaded.load(folder, dtype=torch.float32, device=CPU)
    batch = tokens()
    assert violations({"logits": (ours(batch), theirs(batch).logits)}) == {}
    assert (ours(batch) - models.load(source, dtype=torch.float32)(batch)).abs().max() > 1e-3
    assert not any("lm_head" in name or "embed" in name or "experts" in name for name in names)
    assert {type(p).__name__ for n, p in theirs.named_parameters() if n in names} in (
        {"IntxUnpackedToInt8Tensor"}, {"Int8Tensor"}, {"Float8Tensor"}
    )  # fmt: skip


def step(weight, format, group):
    """[out, in]: of each weight half the distance between two codes, fp64."""
    weight = weight.double()
    groups = weight.unflatten(1, (-1, group)).abs().amax(-1, keepdim=True).expand(-1, -1, group).flatten(1)
    rows = weight.abs().amax(1, keepdim=True)
    if format == "fp8_weight":
        exponent = torch.floor(torch.log2((weight.abs() * 448 / rows).clamp_min(2.0**-6)))
        return torch.exp2(exponent - 4) * rows / 448
    return groups / 7.5 / 2 if format == "int4" else rows / 127.5 / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("format", "largest"), [("int4", 8), ("int8", 127), ("fp8_weight", 448)])
def test_every_weight_is_the_nearest_that_the_format_has(tmp_path, format, largest, dtype):
    checkpoint(tmp_path / "source", dtype=dtype)
    quantise(tmp_path / "source", tmp_path / "q", format=format, group_size=16, dtype=dtype)
    source, files = open_weights(tmp_path / "source"), open_weights(tmp_path / "q")
    weight, values = source.read(NAME).double(), files.read(NAME)
    assert values.dtype == dtype and files.dtype(NAME) == {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    clipped = step(weight, format, 16) * 2  # the largest positive of a group or row has no code of its own
    allowed = torch.where(weight.abs() * (1 + 1e-6) >= weight.abs().amax(1, keepdim=True), clipped, clipped / 2)
    if format == "int4":
        groups = weight.unflatten(1, (-1, 16)).abs()
        top = (groups * (1 + 1e-6) >= groups.amax(-1, keepdim=True)).flatten(1)
        allowed = torch.where(top, clipped, clipped / 2)
    noise = 0.0 if dtype == torch.float32 else 2.0**-6 * weight.abs()  # scales and values are rounded to bf16
    assert ((values.double() - weight).abs() <= allowed * 1.001 + noise + 1e-9).all()
    codes = load_file(tmp_path / "q" / "model.safetensors")[NAME.replace(".weight", "._weight_qdata")]
    assert codes.float().abs().max() in (largest, largest - 1, largest + 1)
    assert torch.equal(files.read(NAME, slice(3, 9), slice(2, 70)), values[3:9, 2:70])


def test_searched_scales_are_nearer(tmp_path):
    checkpoint(tmp_path / "source")
    want = open_weights(tmp_path / "source").read(NAME)
    errors = []
    for i, search in enumerate((False, True)):
        quantise(tmp_path / "source", tmp_path / str(i), format="int4", search_scales=search)
        errors.append((open_weights(tmp_path / str(i)).read(NAME) - want).norm())
    assert errors[1] < 0.99 * errors[0]


def test_only_what_is_named_is_quantised_and_the_rest_is_bit_equal(tmp_path):
    checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    names = quantise(
        tmp_path / "source", tmp_path / "q", format="int4", targets=["mlp.down_proj"], dtype=torch.bfloat16
    )
    assert names == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
    source, files = open_weights(tmp_path / "source"), open_weights(tmp_path / "q")
    assert files.names() == source.names()
    same = {name for name in source.names() if torch.equal(files.read(name), source.read(name))}
    assert same == source.names() - set(names)
    left = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert "lm_head" in left and "model.layers.0.self_attn.q_proj" in left and len(left) == 2 * 6 + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_codes_in_a_byte_are_the_same_weights(tmp_path, dtype):
    checkpoint(tmp_path / "source", dtype=dtype)
    names = quantise(tmp_path / "source", tmp_path / "bytes", format="int4", dtype=dtype)
    quantise(tmp_path / "source", tmp_path / "packed", format="int4", packed=True, dtype=dtype)
    one, other = open_weights(tmp_path / "bytes"), open_weights(tmp_path / "packed")
    assert one.names() == other.names()
    for name in one.names():
        assert torch.equal(one.read(name), other.read(name)) and one.dtype(name) == other.dtype(name), name
        assert one.shape(name) == other.shape(name)
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert stored[NAME.replace(".weight", "._weight_qdata")].shape == (64, 48) and len(names) == 14
    assert torch.equal(other.read(NAME, slice(3, 9), slice(33, 70)), one.read(NAME)[3:9, 33:70])
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "packed").get_parameter(NAME)).__name__ == "Int4Tensor"


def test_layers_to_ignore(tmp_path):
    checkpoint(tmp_path / "source")
    ignore = ["o_proj", r"layers\.0\..*"]
    names = quantise(tmp_path / "source", tmp_path / "q", format="int8", ignore=ignore)
    assert len(names) == 6 and all(".1." in name and "o_proj" not in name for name in names)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q").eval()
    ours = models.load(tmp_path / "q", dtype=torch.float32)
    assert violations({"logits": (ours(tokens()), theirs(tokens()).logits)}) == {}


def test_a_head_is_quantised_if_it_is_named(tmp_path):
    checkpoint(tmp_path / "source")
    names = quantise(tmp_path / "source", tmp_path / "q", format="int8", targets=[".*"])
    assert "lm_head.weight" in names and len(names) == 15
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q").eval()
    assert type(theirs.lm_head.weight).__name__ == "Int8Tensor"
    ours = models.load(tmp_path / "q", dtype=torch.float32)
    assert violations({"logits": (ours(tokens()), theirs(tokens()).logits)}) == {}


@pytest.mark.parametrize("format", ["int8", "fp8_weight", pytest.param("fp8", marks=pytest.mark.gpu)])
def test_nothing_else_in_the_process_is_computed_differently_then(tmp_path, format):
    """torchao would set how fp32 is multiplied, and how the compiler tunes: a run that saves would go on otherwise."""
    checkpoint(tmp_path / "source")
    device = torch.device("cuda" if format == "fp8" else "cpu")
    how = {"device": device, "dtype": torch.bfloat16}
    (tmp_path / "q").mkdir()
    with torch._inductor.config.patch(coordinate_descent_tuning=False):  # whatever ran before this test
        before = torch.get_float32_matmul_precision(), torch._inductor.config.save_config_portable()
        quantise_folder(tmp_path / "source", tmp_path / "q", Quantisation(format=format), **how)
        assert (torch.get_float32_matmul_precision(), torch._inductor.config.save_config_portable()) == before


@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_a_quantised_folder_is_not_quantised_again(tmp_path, format):
    checkpoint(tmp_path / "source", intermediate_size=128)
    quantise(tmp_path / "source", tmp_path / "q", format=format)
    with pytest.raises(UserError, match="is quantised already"):
        quantise(tmp_path / "q", tmp_path / "again", format="int8")


def test_every_problem_is_named_at_once(tmp_path):
    checkpoint(tmp_path / "source")
    how = {"format": "fp8", "targets": ["gate", "up_proj"], "ignore": ["v_prj"]}
    with pytest.raises(UserError) as e:
        quantise(tmp_path / "source", tmp_path / "q", **how, section="a.")
    text = str(e.value)
    assert "4 problems" in text and "a.targets: 'gate'" in text and "a.ignore: 'v_prj'" in text
    assert "a.format: fp8 needs a GPU" in text and "dtype: the products of fp8 give bf16" in text


def test_half_of_a_fused_tensor_is_refused(tmp_path):
    transformers_model(**dense.PHI3).save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match=r"targets: .*k_proj.weight.*as one tensor, .*qkv_proj.weight.*all of them"):
        quantise(tmp_path / "source", tmp_path / "q", format="int4", targets=["q_proj"])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"format": "fp8"}, r"format: fp8 needs a GPU of compute capability 8.9"),
        (
            {"format": "int4", "group_size": 40},
            r"targets: layers.\*.self_attn.q_proj has 64 .*of 40 and 1.*set group_size",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path, how, message):
    checkpoint(tmp_path / "source")
    with pytest.raises(UserError, match=message):
        quantise(tmp_path / "source", tmp_path / "q", **how)


def test_a_broken_header_is_an_error(tmp_path):
    checkpoint(tmp_path / "source")
    quantise(tmp_path / "source", tmp_path / "q", format="int4")
    path = tmp_path / "q" / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"_proj.weight is torchao's unknown"):
        models.load(tmp_path / "q")
    edit_config(tmp_path / "q", quantization_config={"quant_method": "gptq"})
    with pytest.raises(UserError, match=r"quantised weights .quant_method 'gptq'"):
        models.load(tmp_path / "q")
