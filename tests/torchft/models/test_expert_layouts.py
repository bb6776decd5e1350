"""Experts in files: transformers' own stacked layout beside the per-expert one; parts of them; each gathered once."""

import pytest
import torch
from families import experts
from safetensors.torch import load_file
from tiny import transformers_model

from torchft import hub, models
from torchft.errors import UserError
from torchft.models.shallow import build_shallow
from torchft.weights import WeightFiles

NAMES = ("deepseek_v3", "glm4_moe", "mixtral", "olmoe", "qwen3_5_moe", "qwen3_moe", "qwen3_next")
PER_EXPERT = {name: case for name, case in experts.CASES.items() if name in NAMES}
each_family = pytest.mark.parametrize("case", PER_EXPERT.values(), ids=PER_EXPERT)


def stacked_folder(case, folder):
    transformers_model(**case).save_pretrained(folder, save_original_format=False)
    return folder


@each_family
def test_both_layouts_load_alike(case, tmp_path):
    transformers_model(**case).save_pretrained(tmp_path / "per_expert")
    a = models.load(tmp_path / "per_expert", dtype=torch.float32)
    b = models.load(stacked_folder(case, tmp_path / "stacked"), dtype=torch.float32)
    names = [set(load_file(tmp_path / kind / "model.safetensors")) for kind in ("per_expert", "stacked")]
    assert len(names[0]) > len(names[1])
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@each_family
def test_each_layout_is_written_as_it_was_read(case, tmp_path):
    """Bit for bit, and transformers reads what was written."""
    theirs = transformers_model(**case)
    theirs.save_pretrained(tmp_path / "per_expert")
    stacked_folder(case, tmp_path / "stacked")
    for kind in ("per_expert", "stacked"):
        hub.save(models.load(tmp_path / kind, dtype=torch.float32), tmp_path / f"{kind}_again")
        want, got = (load_file(tmp_path / name / "model.safetensors") for name in (kind, f"{kind}_again"))
        assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
        _, info = type(theirs).from_pretrained(tmp_path / f"{kind}_again", output_loading_info=True)
        assert not any(info.values())


@each_family
@pytest.mark.parametrize("kind", ["per_expert", "stacked"])
def test_students_of_the_first_blocks_begin_from_both(case, kind, tmp_path):
    folder = tmp_path / kind
    transformers_model(**case).save_pretrained(folder, save_original_format=kind == "per_expert")
    whole, student = models.load(folder, dtype=torch.float32), build_shallow(models.config_json(folder), 1)
    student = student.to(torch.float32).to_empty(device="cpu")
    hub.load_weights(student, folder)
    own = dict(whole.named_parameters())
    assert all(torch.equal(p, own[name]) for name, p in student.named_parameters())
    hub.save(student, tmp_path / "student")
    again = models.load(tmp_path / "student", dtype=torch.float32)
    assert all(torch.equal(p, q) for p, q in zip(student.parameters(), again.parameters(), strict=True))


@each_family
def test_what_is_missing_of_a_layout_is_said_in_its_names(case, tmp_path):
    folder = stacked_folder(case, tmp_path / "stacked")
    json = models.config_json(folder)
    expert_count = next(k for k in ("num_local_experts", "num_experts", "n_routed_experts") if k in json)
    model = models.build(json | {expert_count: 12})
    with pytest.raises(UserError, match=r"mlp.experts.gate_up_proj has shape \[\d+, \d+, 64\], but .* \[12, \d+, 64\]"):
        hub.load_weights(model, folder)


def test_only_what_is_needed_is_read(tmp_path, monkeypatch):
    """Of an expert's matrices as much as a region says, and nothing of other experts."""
    transformers_model(**experts.QWEN3_MOE).save_pretrained(tmp_path)
    model = models.load(tmp_path, dtype=torch.float32)
    name = "layers.0.mlp.experts.gate_up_proj.weight"
    parts = list(hub.pieces({name: model.get_parameter(name)}, hub.hub_format(model).names))
    read = []
    original = WeightFiles.read
    monkeypatch.setattr(
        WeightFiles, "read", lambda self, n, *region: read.append((n, region)) or original(self, n, *region)
    )
    wanted = (slice(2, 4), slice(30, 50), slice(0, 64))  # rows of the gate's end and of the up's beginning: 40 each
    got = hub._read(WeightFiles(tmp_path), parts, wanted)
    assert torch.equal(got, model.get_parameter(name)[wanted])
    word = "model.layers.0.mlp.experts"
    halves = {"gate_proj": slice(30, 40), "up_proj": slice(0, 10)}
    assert read == [(f"{word}.{e}.{h}.weight", (rows, slice(0, 64))) for e in (2, 3) for h, rows in halves.items()]


def test_a_stacked_weight_is_gathered_once(tmp_path):
    transformers_model(**experts.QWEN3_MOE).save_pretrained(tmp_path / "in")
    model = models.load(tmp_path / "in", dtype=torch.float32)
    asked = []

    def read(name):
        asked.append(name)
        return model.get_parameter(name).detach()

    hub.save(model, tmp_path / "out", read=read, shard_bytes=20_000)
    assert sorted(asked) == sorted(dict(model.named_parameters()))
    again = models.load(tmp_path / "out", dtype=torch.float32)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
