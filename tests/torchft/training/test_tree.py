"""Trees of state: exact round trips, and a refusal of anything that would need a pickle."""

import json

import pytest
import torch
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit
from torchao.optim.subclass_fp8 import OptimStateFp8

from torchft.errors import UserError
from torchft.training.tree import flatten, unflatten


def round_trip(tree):
    structure, tensors = flatten(tree)
    return unflatten(json.loads(json.dumps(structure)), tensors.__getitem__)


def test_scalars_and_containers():
    tree = {
        "a": [1, 0.1, True, None, "x", -0.0, float("inf")],
        "b": (1, (2.5,), []),
        "c": {},
        "odd": {3: "three", (1, 2): 4, "$tensor": "not one"},
        "d": torch.bfloat16,
        "": 5,
    }
    assert round_trip(tree) == tree


def test_tensors_lie_under_their_path():
    tree = {"layers.0.weight": {"exp_avg": torch.ones(2), "step": torch.tensor(3.0)}, "l": [torch.zeros(1)]}
    assert sorted(flatten(tree)[1]) == ["l/0", "layers.0.weight/exp_avg", "layers.0.weight/step"]
    assert torch.equal(round_trip(tree)["layers.0.weight"]["exp_avg"], torch.ones(2))


@pytest.mark.parametrize("cls", [OptimState8bit, OptimState4bit, OptimStateFp8])
def test_low_bit_states(cls):
    value = cls.zeros((64, 128)) if cls is OptimStateFp8 else cls.zeros((64, 128), signed=True)
    value.copy_(torch.randn(64, 128))
    back = round_trip({"s": value})["s"]
    assert type(back) is cls and back.dtype == value.dtype and back.shape == value.shape
    assert torch.equal(back.dequantize(), value.dequantize())


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x", print, torch.Generator()])
def test_anything_else_is_refused_with_its_path(value):
    with pytest.raises(UserError, match="a/0 holds a "):
        flatten({"a": [value]})


def test_s5_unknown_tensor_class_is_not_imported():
    with pytest.raises(UserError, match=r"tensor class os.system"):
        unflatten({"$subclass": "os.system", "tensors": {}, "context": ["true"]}, {}.__getitem__)
