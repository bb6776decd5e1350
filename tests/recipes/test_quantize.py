"""Post-training quantisation from end to end: against torchao on transformers' model; what is reported and left."""

import json

import pytest
import torch
from letters import write_jsonl
from processes import run_ranks
from recipe_runs import conversations, hub_batch, hub_loss, hub_model, load_recipe, train
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)
from transformers import AutoModelForCausalLM

from torchft import models, shipped
from torchft.config_load import load
from torchft.dequantise import open_weights
from torchft.errors import UserError

INT4 = {"weight_dtype": torch.int4}
THEIRS = {
    "int4": IntxWeightOnlyConfig(**INT4, granularity=PerGroup(32)),
    "int8_int4": Int8DynamicActivationIntxWeightConfig(**INT4, weight_granularity=PerGroup(32)),
    "int8": Int8WeightOnlyConfig(version=2),
    "fp8_weight": Float8WeightOnlyConfig(),
}
HELD_OUT = conversations(7, seed=1)
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="session")
def quantize_settings(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("quantize")
    held_out = write_jsonl(folder / "held_out.jsonl", HELD_OUT)
    fields = {"checkpoint_dir": str(base), "dtype": "fp32", "device": "cpu", "seq_len": 128, "batch_size": 3}
    fields |= {"dataset_eval": {"_component_": "torchft.data.datasets.chat", "source": held_out}}
    (folder / "config.yaml").write_text(json.dumps(fields))
    return folder / "config.yaml"


@pytest.fixture(scope="session")
def quantize(quantize_settings):
    """``quantize(output_dir, *overrides) -> output_dir``"""

    def run(output_dir, *overrides):
        return train(load_recipe("quantize"), quantize_settings, output_dir, *overrides)

    return run


def report(folder):
    return json.loads((folder / "report.json").read_text())


def theirs(base, format):
    """transformers' model after torchao's own quantize_."""
    model = hub_model(base)
    quantize_(model, THEIRS[format], lambda module, name: isinstance(module, torch.nn.Linear) and name != "lm_head")
    return model


@pytest.mark.parametrize("format", THEIRS)
def test_weights_and_perplexity_are_torchaos(format, quantize, base, tmp_path):
    out = quantize(tmp_path / "run", f"format={format}", "packed=false")
    want, files = theirs(base, format), open_weights(out / "export")
    for name, weight in want.named_parameters():
        values = weight.dequantize() if type(weight.data) is not torch.Tensor else weight
        assert torch.equal(files.read(name), values), name
    batch, found = hub_batch(out / "export", HELD_OUT), report(out)
    with torch.no_grad():
        before, after = hub_loss(hub_model(base), batch).item(), hub_loss(want, batch).item()
        again = hub_loss(AutoModelForCausalLM.from_pretrained(out / "export").eval(), batch).item()
    assert found["nll_before"] == pytest.approx(before, rel=1e-5)
    assert found["nll_after"] == pytest.approx(after, rel=1e-5) == pytest.approx(again, rel=1e-5)
    assert abs(found["nll_after"] - found["nll_before"]) > 1e-5
    assert found["perplexity_after"] == pytest.approx(torch.tensor(after).exp().item(), rel=1e-4)
    assert found["tokens"] == batch["attention_mask"].sum() and found["format"] == format


def test_sizes_on_the_disk(quantize, base, tmp_path):
    """A file's bytes: codes, and of int4 a group's scale and zero in fp32, of int8 a row's scale and a byte."""
    rest = {name: torch.tensor(open_weights(base).shape(name)).prod().item() for name in open_weights(base).names()}
    linears = {name for name in rest if "proj" in name}
    weights = sum(rest[name] for name in linears)
    rows = sum(open_weights(base).shape(name)[0] for name in linears)
    kept = 4 * (sum(rest.values()) - weights)
    for format, bytes_of in {
        "int4": weights * (1 / 2 + 8 / 32),
        "nf4": weights * (1 / 2 + 4 / 64),
        "int8": weights + 5 * rows,
    }.items():
        out = quantize(tmp_path / format, f"format={format}", "~dataset_eval")
        found, file = report(out), out / "export" / "model.safetensors"
        assert found["bytes_after"] == file.stat().st_size == pytest.approx(kept + bytes_of, abs=20_000)
        assert found["bytes_before"] == (base / "model.safetensors").stat().st_size
        assert found["share_of_parameters"] == pytest.approx(weights / sum(rest.values()))
        assert "nll_before" not in found


def test_an_adapter_is_merged_first(quantize, lora, base, tmp_path):
    trained = lora(tmp_path / "lora", "max_steps=4")
    one = quantize(tmp_path / "one", f"adapter={trained / 'export' / 'adapter'}")
    other = quantize(tmp_path / "other", f"checkpoint_dir={trained / 'export'}")
    plain = quantize(tmp_path / "plain")
    weights = [open_weights(run / "export").read(WEIGHT) for run in (one, other, plain)]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert not torch.equal(weights[0], weights[2])
    for key in ("nll_before", "nll_after"):
        assert report(one)[key] == pytest.approx(report(other)[key], rel=1e-5)
        assert abs(report(one)[key] - report(plain)[key]) > 1e-3
    assert sorted(p.name for p in one.iterdir() if not p.name.startswith(".")) == [
        "config.yaml", "export", "report.json", "run.json",
    ]  # fmt: skip


@pytest.mark.parametrize("format", ["int4", "int8_int4", "nf4"])
def test_evaluate_and_generate_take_the_folder(format, quantize, tmp_path):
    out = quantize(tmp_path / "run", f"format={format}")
    prompts = write_jsonl(tmp_path / "prompts.jsonl", HELD_OUT)
    how = [f"checkpoint_dir={out / 'export'}", "dtype=fp32", "device=cpu", "seq_len=128"]
    evaluate, generate = load_recipe("evaluate"), load_recipe("generate")
    given = [*how, f"perplexity.source={prompts}", f"output={tmp_path / 'found.json'}"]
    evaluate.main(load(evaluate.Config, recipe="evaluate", file=None, overrides=given))
    assert json.loads((tmp_path / "found.json").read_text())["nll"] == pytest.approx(report(out)["nll_after"], rel=1e-6)
    given = [*how, f"prompts.source={prompts}", f"output={tmp_path / 'a.jsonl'}", "sampling.temperature=0"]
    given += ["sampling.max_new_tokens=8", "num_slots=4", "logps=true"]
    generate.main(load(generate.Config, recipe="generate", file=None, overrides=given))
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == len(HELD_OUT)


def test_calibration(quantize, data, tmp_path):
    """Another rounding of the same model, by the rows that are measured; test_awq.py says which."""
    calibration = [f"calibration={{_component_: torchft.data.datasets.chat, source: {data}}}"]
    measured = [f"dataset_eval.source={data}", "group_size=128"]
    plain = report(quantize(tmp_path / "plain", *measured))
    found = report(quantize(tmp_path / "run", *measured, *calibration))
    assert found["calibration_tokens"] == found["tokens"] == plain["tokens"]
    assert found["nll_before"] == plain["nll_before"] and found["nll_after"] != plain["nll_after"]
    assert 0 < found["bytes_after"] - plain["bytes_after"] < 14 * (256 * 4 + 400)  # a scale for each input
    with pytest.raises(UserError, match="calibration: AWQ is for int4 with packed: true"):
        quantize(tmp_path / "int8", "format=int8", *calibration)


def test_every_problem_is_said_at_once(quantize, tmp_path):
    wrong = ["format=fp8", "ignore=[gate_prj]", "dataset_eval.source=nowhere.jsonl"]
    with pytest.raises(UserError) as e:
        quantize(tmp_path / "run", *wrong)
    text = str(e.value)
    assert "4 problems" in text and "nowhere.jsonl" in text and "did you mean 'gate_proj'" in text
    assert "format: fp8 needs a GPU" in text and "dtype: the products of fp8 give bf16" in text
    assert not (tmp_path / "run" / "export").exists()
    with pytest.raises(UserError, match=r"needs multiples of 256 and 1: .*set group_size to a divisor"):
        quantize(tmp_path / "other", "group_size=256")


def test_half_of_an_export_is_none(quantize, tmp_path, monkeypatch):
    out = quantize(tmp_path / "run", "~dataset_eval")
    files = {p.name: p.read_bytes() for p in (out / "export").iterdir()}

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("torchft.quantise.save_side_files", full)
    with pytest.raises(OSError, match="no space"):
        quantize(out, "~dataset_eval", "format=int8", "resume=accept_changes")
    assert {p.name: p.read_bytes() for p in (out / "export").iterdir()} == files
    with pytest.raises(OSError, match="no space"):
        quantize(tmp_path / "fresh", "~dataset_eval")
    assert not (tmp_path / "fresh" / "export").exists() and not (tmp_path / "fresh" / "report.json").exists()


def test_another_config_does_not_overwrite(quantize, tmp_path):
    quantize(tmp_path / "run", "~dataset_eval")
    with pytest.raises(UserError, match="format: int4 -> int8"):
        quantize(tmp_path / "run", "~dataset_eval", "format=int8")
    quantize(tmp_path / "run", "~dataset_eval", "format=int8", "resume=accept_changes")
    assert report(tmp_path / "run")["format"] == "int8"


def on_ranks(folder, settings):
    with pytest.raises(UserError, match="runs in one process"):
        train(load_recipe("quantize"), settings, folder / "run")


def test_ranks_are_refused(quantize_settings, tmp_path):
    run_ranks(on_ranks, 2, tmp_path, quantize_settings)


def test_demo(tmp_path):
    """Four tasks that the small model knows: it still knows them in int4, in a third of the space."""
    out = train(load_recipe("quantize"), shipped.find_config("demo/quantize"), tmp_path / "run")
    found = report(out)
    assert found["perplexity_before"] < 1.001 and found["perplexity_after"] < 1.001
    assert found["bytes_after"] < 0.36 * found["bytes_before"]
    assert models.load(out / "export").config == models.load(shipped.config_path("demo/base")).config


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["int4", "int8", "fp8_weight", "nf4"])
def test_a_gpu_rounds_as_a_cpu_does(format, quantize, tmp_path):
    """But for weights in the middle of two codes, such as the largest of its group, which the last bit of a scale
    decides (by a number, GPUs multiply by its reciprocal); and measures the same."""
    cpu = quantize(tmp_path / "cpu", f"format={format}")
    gpu = quantize(tmp_path / "gpu", f"format={format}", "device=cuda")
    one, other = open_weights(cpu / "export"), open_weights(gpu / "export")
    pairs = [(one.read(name), other.read(name)) for name in one.names()]
    equal = [ours.isclose(theirs, rtol=3e-7, atol=0).float().mean().item() for ours, theirs in pairs]
    assert min(equal) > 0.99
    assert report(gpu)["nll_after"] == pytest.approx(report(cpu)["nll_after"], rel=1e-3)


@pytest.mark.gpu
def test_fp8_is_what_torchao_computes_on_a_gpu(quantize, tmp_path):
    out = quantize(tmp_path / "run", "format=fp8", "dtype=bf16", "device=cuda")
    batch = {name: values.cuda() for name, values in hub_batch(out / "export", HELD_OUT).items()}
    theirs = AutoModelForCausalLM.from_pretrained(out / "export", dtype=torch.bfloat16).cuda().eval()
    assert type(theirs.get_parameter(WEIGHT)).__name__ == "Float8Tensor"
    with torch.no_grad():
        loss = hub_loss(theirs, batch).item()
    assert report(out)["nll_after"] == pytest.approx(loss, rel=2e-2)
    assert torch.equal(theirs.get_parameter(WEIGHT).dequantize().cpu(), open_weights(out / "export").read(WEIGHT))


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["int4", "fp8_int4"])
def test_packed_int4_is_what_mslk_computes_on_a_gpu(format, quantize, tmp_path):
    pytest.importorskip("mslk")
    out = quantize(tmp_path / "run", f"format={format}", "dtype=bf16", "device=cuda", "group_size=128")
    batch = {name: values.cuda() for name, values in hub_batch(out / "export", HELD_OUT).items()}
    theirs = AutoModelForCausalLM.from_pretrained(out / "export", dtype=torch.bfloat16).cuda().eval()
    assert type(theirs.get_parameter(WEIGHT)).__name__ == "Int4Tensor"
    with torch.no_grad():
        loss = hub_loss(theirs, batch).item()
    assert report(out)["nll_after"] == pytest.approx(loss, rel=2e-2)
