"""Muon, the same class in each script: against a brute force by singular value decomposition."""

import importlib
import math
import re
from copy import deepcopy

import pytest
import torch
from conftest import SCRIPTS
from torch import nn

NETWORKS = {
    "ncsn": lambda ncsn: ncsn.ScoreNet(width=8, mults=(1, 2), blocks=(1,)),
    "nvae": lambda nvae: nvae.NVAE(width=4, groups=(1, 2), flows=1),
    "ebm": lambda ebm: ebm.EnergyNet(width=4, mults=(1, 2), blocks=1),
}
# Layers that are not Muon's: at the ends of the network, or not of a block.
ENDS = {
    "ncsn": r"^(stem|out|embed)",
    "nvae": r"^stem.0$|^out.\d+$|flows|gate",
    "ebm": r"^(stem|out)",
}


@pytest.fixture(params=SCRIPTS)
def module(request):
    return importlib.import_module(request.param)


def with_singular_values(values, rows, columns, seed=0):
    """U, S, V of a random matrix in fp64."""
    g = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, len(values), generator=g, dtype=torch.double)).Q
    v = torch.linalg.qr(torch.randn(columns, len(values), generator=g, dtype=torch.double)).Q
    return u, torch.tensor(values, dtype=torch.double), v


def brute_force(matrix):
    """orthogonal() by its definition: five times the polynomial, of the singular values."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ vt


@pytest.mark.parametrize("rows, columns", [(6, 40), (40, 6), (6, 6), (1, 5), (5, 1)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_singular_values_come_near_1_and_directions_stay(module, rows, columns, size):
    count = min(rows, columns)
    values = torch.logspace(-1.5, 0, count).tolist()
    u, s, v = with_singular_values(values, rows, columns)
    x = module.orthogonal((size * u @ s.diag() @ v.T).float()[None])[0]
    assert x.shape == (rows, columns)
    inside = u.T @ x.double() @ v  # a diagonal matrix, if U and V have stayed
    assert (inside - inside.diagonal().diag()).abs().max() < 1e-4
    assert inside.diagonal().min() > 0.65
    assert inside.diagonal().max() < 1.22
    assert torch.linalg.matrix_norm(x.double() - u @ inside @ v.T) < 1e-4  # and nothing else


def test_orthogonal_of_nothing_is_nothing(module):
    assert module.orthogonal(torch.zeros(1, 3, 4)).eq(0).all()


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (4, 3, 3, 3), (40, 2, 1, 1)])
def test_steps_are_those_of_the_brute_force(module, shape):
    g = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=g))
    optimizer = module.Muon([weight], lr=0.3, momentum=0.8)
    due = weight.detach().double().flatten(1)
    average = torch.zeros_like(due)
    for _ in range(4):
        weight.grad = torch.randn(shape, generator=g)
        optimizer.step()
        gradient = weight.grad.double().flatten(1)
        average = 0.8 * average + 0.2 * gradient
        change = brute_force(0.8 * average + 0.2 * gradient)
        due = due - 0.3 * max(1, math.sqrt(change.shape[0] / change.shape[1])) * change
    assert torch.allclose(weight.detach().double().flatten(1), due, atol=2e-4)


def test_steps_do_not_depend_on_the_gradients_scale(module):
    g = torch.Generator().manual_seed(0)
    start = torch.randn(8, 5, 3, 3, generator=g)
    weights = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [module.Muon([weight], lr=0.1) for weight in weights]
    for _ in range(3):
        gradient = torch.randn(start.shape, generator=g)
        for weight, optimizer, scale in zip(weights, optimizers, (1e-2, 1e3), strict=True):
            weight.grad = scale * gradient
            optimizer.step()
    assert (weights[0] - start).norm() > 0.1
    assert torch.allclose(*weights, atol=1e-4)


def test_a_gradient_of_0_moves_nothing(module):
    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = module.Muon([weight])
    weight.grad = torch.rand(3, 4)
    optimizer.step()
    before = weight.detach().clone()
    assert not before.eq(1).any()
    weight.grad = torch.zeros(3, 4)
    optimizer.step()
    assert weight.eq(before).all()


def test_weights_of_one_shape_step_together_as_each_would_alone(module):
    g = torch.Generator().manual_seed(0)
    shapes = [(4, 3, 3, 3), (6, 5), (4, 3, 3, 3), (4, 27), (6, 5)]
    start = [torch.randn(shape, generator=g) for shape in shapes]
    together = [nn.Parameter(weight.clone()) for weight in start]
    alone = [nn.Parameter(weight.clone()) for weight in start]
    optimizer = module.Muon(together, lr=0.1)
    others = [module.Muon([weight], lr=0.1) for weight in alone]
    for step in range(3):
        for a, b in zip(together, alone, strict=True):
            a.grad = torch.randn(a.shape, generator=g)
            b.grad = a.grad.clone()
        if step == 2:  # the others do not wait for one that stays
            together[0].grad = torch.zeros(shapes[0])
            alone[0].grad = torch.zeros(shapes[0])
        optimizer.step()
        for other in others:
            other.step()
    for a, b, before in zip(together, alone, start, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
        assert (a - before).norm() > 0.1


def test_a_gradient_that_is_not_finite_is_seen_in_its_weight_alone(module):
    weights = [nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
    for weight, number in zip(weights, (math.nan, 1.0), strict=True):
        weight.grad = torch.rand(3, 4)
        weight.grad[0, 0] = number
    module.Muon(weights).step()
    assert not weights[0].isfinite().all()
    assert weights[1].isfinite().all()


def test_a_weight_without_gradient_is_passed_over(module):
    frozen, moving = (nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    moving.grad = torch.rand(3, 4)
    module.Muon([frozen, moving]).step()
    assert frozen.eq(1).all()
    assert not moving.eq(1).any()


def test_fp64_stays_fp64_and_is_more_precise(module):
    matrix = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    x = module.orthogonal(matrix[None])[0]
    assert x.dtype == torch.double
    assert torch.allclose(x, brute_force(matrix), rtol=0, atol=2e-6)


def test_a_saved_optimizer_goes_on_exactly(module):
    g = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 3, 3, 3, generator=g))
    optimizer = module.Muon([weight], lr=0.1)
    gradients = torch.randn(4, *weight.shape, generator=g)
    for gradient in gradients[:2]:
        weight.grad = gradient
        optimizer.step()
    copy = nn.Parameter(weight.detach().clone())
    other = module.Muon([copy])
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    for gradient in gradients[2:]:
        weight.grad = copy.grad = gradient
        optimizer.step()
        other.step()
    assert copy.eq(weight).all()


def test_each_weight_has_one_optimizer_and_matrices_inside_have_muon(module):
    net = NETWORKS[module.NAME](module)
    optimizers = module.make_optimizers(net, 0.5)
    assert isinstance(optimizers[0], module.Muon)
    found = [{id(w) for w in optimizer.param_groups[0]["params"]} for optimizer in optimizers]
    names = {id(weight): name for name, weight in net.named_parameters()}
    assert found[0] | found[1] == set(names)
    assert not found[0] & found[1]
    for name, layer in net.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        at_an_end = re.search(ENDS[module.NAME], name) is not None
        depthwise = isinstance(layer, nn.Conv2d) and layer.groups > 1
        assert (id(layer.weight) in found[0]) == (not at_an_end and not depthwise), name
        assert layer.bias is None or id(layer.bias) in found[1]
    assert all(dict(net.named_parameters())[names[i]].dim() > 1 for i in found[0])
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [0.5, 0.5 / 10]


def test_directions_of_little_slope_are_learned_too(module):
    """Least squares whose inputs have singular values from 1 to 1/300: Muon against Adam."""
    g = torch.Generator().manual_seed(0)
    u, s, v = with_singular_values(torch.logspace(0, -2.5, 16).tolist(), 64, 16)
    x = (8 * u @ s.diag() @ v.T).float()
    target = x @ torch.randn(16, 16, generator=g)

    def error(make):
        weight = nn.Parameter(torch.zeros(16, 16))
        optimizer = make([weight])
        for step in range(200):
            optimizer.param_groups[0]["lr"] = 0.3 * (1 - step / 200)
            weight.grad = None
            (x @ weight.T - target).square().mean().backward()
            optimizer.step()
        return (x @ weight.T - target).square().mean()

    assert error(module.Muon) < 0.3 * error(torch.optim.Adam)
