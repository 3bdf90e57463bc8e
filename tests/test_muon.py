"""Muon, the same text in each script: against a brute force by singular value decomposition."""

import math
import re

import ebm
import ncsn
import nvae
import pytest
import torch
from torch import nn


def with_singular_values(values, rows, columns):
    """U, S, V of a random matrix in float64."""
    g = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(rows, len(values), generator=g, dtype=torch.double)).Q
    v = torch.linalg.qr(torch.randn(columns, len(values), generator=g, dtype=torch.double)).Q
    return u, torch.tensor(values, dtype=torch.double), v


def brute_force(matrix):
    """orthogonalise() by its definition: five times the polynomial, of the singular values."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ vt


@pytest.mark.parametrize("rows, columns", [(6, 40), (40, 6), (6, 6), (1, 5), (5, 1)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_singular_values_come_near_1_and_directions_stay(rows, columns, size):
    values = torch.logspace(-1.5, 0, min(rows, columns)).tolist()
    u, s, v = with_singular_values(values, rows, columns)
    x = ncsn.orthogonalise((size * u @ s.diag() @ v.T).float()[None])[0]
    assert x.shape == (rows, columns)
    inside = u.T @ x.double() @ v  # a diagonal matrix, if U and V have stayed
    assert (inside - inside.diagonal().diag()).abs().max() < 1e-4
    assert inside.diagonal().min() > 0.65
    assert inside.diagonal().max() < 1.22
    assert torch.linalg.matrix_norm(x.double() - u @ inside @ v.T) < 1e-4  # and nothing else


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (4, 3, 3, 3), (40, 2, 1, 1)])
def test_steps_are_those_of_the_brute_force(shape):
    g = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=g))
    optimizer = ncsn.Muon([weight], lr=0.3, momentum=0.8)
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


def test_weights_of_one_shape_step_together_as_each_would_alone():
    g = torch.Generator().manual_seed(0)
    shapes = [(4, 3, 3, 3), (6, 5), (4, 3, 3, 3), (4, 27), (6, 5)]
    start = [torch.randn(shape, generator=g) for shape in shapes]
    together = [nn.Parameter(weight.clone()) for weight in start]
    alone = [nn.Parameter(weight.clone()) for weight in start]
    optimizer = ncsn.Muon(together, lr=0.1)
    others = [ncsn.Muon([weight], lr=0.1) for weight in alone]
    for _ in range(3):
        for a, b in zip(together, alone, strict=True):
            a.grad = torch.randn(a.shape, generator=g)
            b.grad = a.grad.clone()
        optimizer.step()
        for other in others:
            other.step()
    for a, b, before in zip(together, alone, start, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
        assert (a - before).norm() > 0.1


NETWORKS = {  # and the layers that are not Muon's: at the ends of the network, or depthwise
    "ncsn": (
        ncsn,
        ncsn.Denoiser((3, 8, 8), 0.5, 9.0, width=8, mults=(1, 2)),
        r"unet\.(stem|out|e)",
    ),
    "nvae": (
        nvae,
        nvae.NVAE((3, 8, 8), width=4, groups=(1, 2), depthwise=True),
        r"^stem|^head|gate",
    ),
    "ebm": (ebm, ebm.EnergyNet((3, 8, 8), width=4, mults=(1, 2), blocks=1), r"^(embed|stem|out)"),
}


@pytest.mark.parametrize("module, net, ends", NETWORKS.values(), ids=NETWORKS)
def test_each_weight_has_one_optimizer_and_matrices_inside_have_muon(module, net, ends):
    muon, adam = module.make_optimizers(net, 0.5)
    assert type(muon).__name__ == "Muon"
    found = [{id(w) for w in optimizer.param_groups[0]["params"]} for optimizer in (muon, adam)]
    assert found[0] | found[1] == {id(weight) for weight in net.parameters()}
    assert not found[0] & found[1]
    for name, layer in net.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        depthwise = isinstance(layer, nn.Conv2d) and layer.groups > 1
        inside = re.search(ends, name) is None and not depthwise
        assert (id(layer.weight) in found[0]) == inside, name
        assert layer.bias is None or id(layer.bias) in found[1]
    assert [optimizer.param_groups[0]["lr"] for optimizer in (muon, adam)] == [0.5, 0.5 / 10]
