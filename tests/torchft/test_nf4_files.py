"""NF4 files: codes against torchao, all against bitsandbytes where it is installed, double quantisation by hand."""

import json

import pytest
import torch
from families import dense
from oracles import violations
from safetensors.torch import load_file, save_file
from tiny import checkpoint, edit_config, tokens, transformers_model
from vocabularies import byte_level, write

from torchft import models
from torchft.dequantise import open_weights
from torchft.errors import UserError
from torchft.kernels.nf4 import CODEBOOK
from torchft.nf4_files import quantised
from torchft.quantise import Quantisation, quantise_folder
from torchft.tokenizers import bpe

CPU = torch.device("cpu")
NAME = "model.layers.1.mlp.down_proj.weight"
WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture
def folder(tmp_path):
    checkpoint(tmp_path / "source", **WIDE)
    (tmp_path / "nf4").mkdir()
    how = Quantisation(format="nf4")
    names = quantise_folder(tmp_path / "source", tmp_path / "nf4", how, device=CPU, dtype=torch.float32)
    assert len(names) == 14 and NAME in names
    return tmp_path / "nf4"


def test_codes_are_torchaos():
    """Two in a byte; but for values near the middle of two, as torchao has its codebook to four digits."""
    theirs_from = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor", reason="torchao 0.18")
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    theirs = theirs_from.NF4Tensor.from_tensor(weight, 64, 256)
    parts = quantised("w", weight)
    codes, wanted = (torch.stack((b >> 4, b & 15)).int() for b in (parts["w"].view(-1), theirs.quantized_data.view(-1)))
    assert (codes - wanted).abs().max() <= 1 and (codes != wanted).float().mean() < 1e-3
    assert torch.equal(parts["w.absmax"], weight.view(-1, 64).abs().amax(1))


def test_what_is_read_is_codebook_times_scale(folder, tmp_path):
    stored = load_file(folder / "model.safetensors")
    codes = torch.stack((stored[NAME] >> 4, stored[NAME] & 15), dim=-1).view(-1).int()  # the high half comes first
    want = (torch.tensor(CODEBOOK)[codes].view(-1, 64) * stored[f"{NAME}.absmax"][:, None]).view(64, 128)
    files, source = open_weights(folder), open_weights(tmp_path / "source")
    assert torch.equal(files.read(NAME), want)
    assert torch.equal(files.read(NAME, slice(5, 9), slice(2, 70)), want[5:9, 2:70])
    assert files.names() == source.names() and files.shape(NAME) == (64, 128) and files.dtype(NAME) == "F32"
    error = (want - source.read(NAME)).view(-1, 64).abs().amax(1)
    assert (error <= stored[f"{NAME}.absmax"] * (1 - 0.6961928) / 2 + 1e-6).all()  # half of the widest gap
    assert torch.equal(models.load(folder, dtype=torch.float32).layers[1].mlp.down_proj.weight, want)


def test_scales_in_8_bits_are_read(folder):
    """bitsandbytes' double quantisation, of which a code stands for any number that the file says."""
    path = folder / "model.safetensors"
    stored = load_file(path)
    scales = stored.pop(f"{NAME}.absmax")  # 128 of them
    codebook = torch.linspace(-1, 1, 256)
    codes = torch.randint(256, scales.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    nested = torch.tensor([0.5, 3.0])  # of 64 blocks each
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 128]}
    state |= {"nested_blocksize": 64, "nested_dtype": "float32", "nested_offset": 2.5}
    key = f"{NAME}.quant_state.bitsandbytes__nf4"
    stored |= {f"{NAME}.absmax": codes, f"{NAME}.nested_absmax": nested, f"{NAME}.nested_quant_map": codebook}
    stored[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    before = open_weights(folder).read(NAME).view(-1, 64) / scales[:, None]
    save_file(stored, path, metadata={"format": "pt"})
    absmax = codebook[codes.int()] * nested.repeat_interleave(64) + 2.5
    torch.testing.assert_close(open_weights(folder).read(NAME).view(-1, 64), before * absmax[:, None])


def test_bitsandbytes_computes_what_we_do(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    source, ours = tmp_path / "source", tmp_path / "ours"
    transformers_model(**dense.LLAMA | WIDE).save_pretrained(source)
    ours.mkdir()
    names = quantise_folder(source, ours, Quantisation(format="nf4"), device=CPU, dtype=torch.float32)
    write(ours)
    byte_level(bpe.PATTERNS["Llama 3"], special=["<s>"]).save(str(ours / "tokenizer.json"))
    for double in (False, True):
        how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double, "load_in_4bit": True}
        how = BitsAndBytesConfig(**how, bnb_4bit_compute_dtype=torch.float32)
        theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=how)
        theirs.save_pretrained(tmp_path / f"theirs{double}")
        logits = models.load(tmp_path / f"theirs{double}", dtype=torch.float32)(tokens())
        assert violations({"logits": (logits, theirs(tokens()).logits)}) == {}
    one, other = open_weights(ours), open_weights(tmp_path / "theirsFalse")
    assert all(torch.equal(one.read(name), other.read(name)) for name in names)
    theirs = AutoModelForCausalLM.from_pretrained(ours, dtype=torch.float32)
    assert {type(p).__name__ for n, p in theirs.named_parameters() if n in names} == {"Params4bit"}
    assert violations({"logits": (models.load(ours, dtype=torch.float32)(tokens()), theirs(tokens()).logits)}) == {}


def test_what_cannot_be_read_is_refused(folder):
    stored = load_file(folder / "model.safetensors")
    stored[f"{NAME}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(b'{"blocksize": 64}'), dtype=torch.uint8)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"down_proj.weight.* does not say the sizes of an NF4 weight"):
        models.load(folder)
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(UserError, match=r"quantised weights .quant_method 'bitsandbytes'"):
        models.load(folder)
