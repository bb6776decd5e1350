import copy

import pytest
import torch
import torch._functorch.config as functorch_config
from torch import nn

from tests import tiny
from tests.oracles import mean_nll
from torchft import hub, models
from torchft.adapters.fp8_training import FP8TrainingConfig, apply_fp8_training
from torchft.errors import UserError
from torchft.modules.decoder import init_weights
from torchft.training.compile import compile_blocks

CPU = torch.device("cpu")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}  # all multiples of 16


@pytest.fixture(autouse=True)
def compiled_code():
    """Forgotten after each test: one function is compiled for few shapes in a process."""
    yield
    torch.compiler.reset()
    functorch_config.activation_memory_budget = 1.0


def rounded(x, dim, top, dtype):
    """x with its values rounded to fp8, the largest of each row along ``dim`` (None: of all) scaled to ``top``.

    torchao's rowwise recipe scales by powers of two.
    """
    largest = x.abs().amax(dim, keepdim=True) if dim is not None else x.abs().amax()
    scale = top / largest.double()
    scale = (torch.exp2(torch.floor(torch.log2(scale))) if dim is not None else scale).float()
    return (x.float() * scale).clamp(-top, top).to(dtype).double() / scale.double()


@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise"])
@pytest.mark.parametrize("tokens", [32, 21])
def test_the_three_products_are_of_rounded_matrices(recipe, tokens):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 32))
    weight, bias = (p.detach() for p in model.parameters())
    apply_fp8_training(model, FP8TrainingConfig(recipe=recipe), device=CPU)
    x, grad = torch.randn(tokens, 48, requires_grad=True), torch.randn(tokens, 32)
    out = model(x)
    out.backward(grad)

    rows = recipe == "rowwise"

    def e4m3(t, dim):
        return rounded(t.detach(), dim if rows else None, 448, torch.float8_e4m3fn)

    def of_grad(dim):
        return e4m3(grad, dim) if rows else rounded(grad, None, 57344, torch.float8_e5m2)

    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(out.double(), e4m3(x, 1) @ e4m3(weight, 1).t() + bias, **close)
    torch.testing.assert_close(x.grad.double(), of_grad(1) @ e4m3(weight, 0), **close)
    torch.testing.assert_close(model[0].weight.grad.double(), of_grad(0).t() @ e4m3(x, 0), **close)
    torch.testing.assert_close(model[0].bias.grad, grad.sum(0))


def test_all_linear_layers_but_the_head_and_no_name_changes(tmp_path):
    tiny.checkpoint(tmp_path, **SIZES)
    dense = models.load(tmp_path, dtype=torch.float32)
    model = models.build(models.config_json(tmp_path))
    names = apply_fp8_training(model, FP8TrainingConfig(), device=CPU)
    model.to_empty(device="cpu")
    hub.load_weights(model, tmp_path)
    assert len(names) == 7 * len(model.layers) and "layers.0.mlp.up_proj" in names
    assert {name: type(p) for name, p in model.named_parameters()} == dict.fromkeys(dense.state_dict(), nn.Parameter)
    assert all(torch.equal(p, dense.state_dict()[name]) for name, p in model.state_dict().items())
    hub.save(model, tmp_path / "saved")
    again = models.load(tmp_path / "saved", dtype=torch.float32).state_dict()
    assert all(torch.equal(p, again[name]) for name, p in dense.state_dict().items())


@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise"])
def test_loss_and_gradients_are_near_the_dense_models(recipe):
    dense = tiny.decoder(**SIZES)
    init_weights(dense)
    model = copy.deepcopy(dense)
    apply_fp8_training(model, FP8TrainingConfig(recipe=recipe), device=CPU)
    losses = []
    for m in (dense, model):
        loss = mean_nll(m, tiny.tokens(2, 40), tiny.tokens(2, 40))
        loss.backward()
        losses.append(loss.item())
    assert 0 < abs(losses[1] - losses[0]) < 0.01 * losses[0]
    wanted = dict(dense.named_parameters())
    for name, p in model.named_parameters():
        assert (p.grad - wanted[name].grad).norm() < 0.15 * wanted[name].grad.norm(), name


def test_compiled_per_block_it_computes_the_same():
    model = tiny.decoder(**SIZES)
    apply_fp8_training(model, FP8TrainingConfig(), device=CPU)
    gradients = []
    for compiled in (False, True):
        if compiled:
            compile_blocks(model, backend="aot_eager_decomp_partition")
        model.zero_grad()
        mean_nll(model, tiny.tokens(2, 32), tiny.tokens(2, 32)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for given, wanted in zip(*gradients):
        assert (given - wanted).norm() <= 1e-2 * wanted.norm()


def test_odd_sizes_and_old_gpus_are_refused(monkeypatch):
    with pytest.raises(UserError, match=r"fp8: 0 is 16 x 24, not multiples of 16 as fp8 needs: .*leave the fp8"):
        apply_fp8_training(nn.Sequential(nn.Linear(24, 16)), FP8TrainingConfig(), device=CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    with pytest.raises(UserError, match="fp8: A100 has no fp8 matrix units"):
        apply_fp8_training(nn.Sequential(nn.Linear(16, 16)), FP8TrainingConfig(), device=torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_hardware_agrees_with_the_emulation(recipe, compiled):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(512, 256, bias=False, dtype=torch.bfloat16))
    x, grad = torch.randn(200, 512, dtype=torch.bfloat16), torch.randn(200, 256, dtype=torch.bfloat16)
    results = []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(dense).to(device)
        apply_fp8_training(model, FP8TrainingConfig(recipe=recipe), device=torch.device(device))
        here = x.to(device).detach().requires_grad_()
        run = torch.compile(model, fullgraph=True) if compiled and device == "cuda" else model
        out = run(here)
        out.backward(grad.to(device))
        results.append([t.double().cpu() for t in (out, here.grad, model[0].weight.grad)])
    for given, wanted in zip(results[1], results[0]):
        assert (given - wanted).norm() < 2e-2 * wanted.norm()
