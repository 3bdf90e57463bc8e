"""NVAE's mathematics and network: the real functions, against closed forms and float64 loops."""

import argparse
import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal

import nvae

grey_and_rgb = pytest.mark.parametrize("channels", [1, 3])
dense_and_depthwise = pytest.mark.parametrize("depthwise", [False, True])


def randn(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def images(count, seed=0, shape=(3, 16, 16)):
    """Of independent bytes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, *shape), generator=generator, dtype=torch.uint8)


def network(fresh=False, shape=(3, 16, 16), groups=(2, 2), **options):
    """A small NVAE; unless fresh, layers that start at zero are random."""
    torch.manual_seed(0)
    net = nvae.NVAE(shape, width=4, groups=groups, **options)
    for parameter in net.parameters():
        if not fresh and not parameter.any():
            nn.init.normal_(parameter.data, std=0.05)
    return net


def parameters_of(dmol):
    return torch.cat([dmol.logits, *dmol.means.unbind(1), *dmol.log_scales.unbind(1)], dim=1)


def convolutions(net):
    return [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]


def watch_z(groups):
    """The list to which z of each group is appended, at each call."""
    seen = []

    def keep(layer, inputs):
        seen.append(inputs[0].detach())

    for group in groups:
        group.merge.register_forward_pre_hook(keep)
    return seen


# --------------------------------------------------------------------------- mixture of logistics

BYTES = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def pixel(weights, means, log_s, c=None):
    """Parameters (1, ., 1, 1) of DMOL from (M,), (C, M) twice, and coefficients before tanh."""
    weights, means, log_s = (torch.as_tensor(part).double() for part in (weights, means, log_s))
    pairs = len(means) * (len(means) - 1) // 2
    c = torch.zeros(pairs, len(weights)) if c is None else torch.as_tensor(c)
    parts = [weights, means.flatten(), log_s.flatten(), c.double().flatten()]
    return torch.cat(parts)[None, :, None, None]


def log_prob(parameters, x):
    """Of many values (N, C) of one pixel."""
    many = parameters.expand(len(x), -1, -1, -1)
    return nvae.DMOL(many, x.shape[1]).log_prob(x[:, :, None, None])


def draws_of(parameters, count, temperature=1.0, channels=3):
    """(count, C) bytes of one pixel."""
    torch.manual_seed(0)
    many = parameters.float().expand(1, -1, count, 1)
    return nvae.DMOL(many, channels).sample(temperature)[0, :, :, 0].T.long()


def brute_force(weights, means, log_s, c, x):
    """log p of one pixel x (C,), from the definition, in float64."""
    pairs = {(1, 0): 0, (2, 0): 1, (2, 1): 2}  # (colour, colour before): number of coefficient
    p = weights.double().softmax(0)
    for k, value in enumerate(x):
        mean = means[k].double()
        for j in range(k):
            mean = mean + torch.tanh(c[pairs[k, j]].double()) * x[j]
        s = log_s[k].double().clamp(min=-7).exp()
        upper = torch.sigmoid((value + 1 / 255 - mean) / s) if value < 1 else 1.0
        lower = torch.sigmoid((value - 1 / 255 - mean) / s) if value > -1 else 0.0
        p = p * (upper - lower)
    return p.sum().log().item()


@pytest.mark.parametrize("channels, colour", [(1, 0), (3, 0), (3, 1), (3, 2)])
@pytest.mark.parametrize("mean", [-3, -1, -0.3, 0.9, 0.9922, 1.004, 3])
def test_probabilities_of_a_colour_sum_to_one_given_the_others(channels, colour, mean):
    """Not so with 254 in the tail of 255, a tail counted twice or never."""
    c = 0.2 * randn(channels * (channels - 1) // 2, 2)
    x = torch.full((256, channels), -1.0, dtype=torch.float64)
    x[:, colour] = BYTES
    for log_s in (-9.0, -5.0, -3.0, 1.0):
        means = torch.full((channels, 2), -60.0)  # byte 0 for certain
        scales = torch.full((channels, 2), -7.0)
        means[colour] = torch.tensor([mean, -mean / 3])
        scales[colour] = log_s
        parameters = pixel([0.3, -0.4], means, scales, c)
        assert log_prob(parameters, x).exp().sum().item() == pytest.approx(1, abs=1e-6)
        in_fp32 = log_prob(parameters.float(), x.float()).exp().sum().item()
        assert in_fp32 == pytest.approx(1, abs=2e-4)


@grey_and_rgb
@pytest.mark.parametrize("seed", range(4))
def test_log_probability_is_that_of_the_definition(channels, seed):
    """Order of the parameters, colours, clamp, coefficients; softmax over the components."""
    weights = randn(4, seed=seed)
    means = 0.6 * randn(channels, 4, seed=seed + 50)
    log_s = randn(channels, 4, seed=seed + 60) - 2
    log_s[0, 0] = -9
    c = randn(channels * (channels - 1) // 2, 4, seed=seed + 70)
    x = BYTES[images(5, seed, (channels,)).long()]
    x[0, 0] = -1
    x[1, -1] = 1
    x[2] = BYTES[254]
    due = [brute_force(weights, means, log_s, c, row) for row in x]
    parameters = pixel(weights, means, log_s, c)
    assert log_prob(parameters, x).tolist() == pytest.approx(due, rel=1e-6)
    picture = nvae.DMOL(parameters.expand(1, -1, 5, 1), channels).log_prob(x.T[None, :, :, None])
    assert picture.tolist() == pytest.approx([sum(due)], rel=1e-6)  # a sum over the pixels


@pytest.mark.parametrize("x, mean", [(-1, 1), (1, -1), (0, 1), (-0.5, 0.9), (BYTES[254], -1)])
def test_extreme_parameters_still_learn(x, mean):
    """For small s, P underflows; for large s, 1 / s does, and with it the width of a bin."""
    at_x = torch.full((1, 3), float(x))
    for log_s in (-7.0, 300.0):
        parameters = pixel([0.0], [[mean]] * 3, [[log_s]] * 3).float().requires_grad_()
        value = log_prob(parameters, at_x)
        (grad,) = torch.autograd.grad(value.sum(), parameters)
        assert value.isfinite().all()
        assert grad.isfinite().all()
        assert log_s > 0 or (grad.flatten()[1:4] * (x - mean) > 100).all()  # of the means


def test_samples_have_the_probabilities_of_their_bytes():
    """Also at the edges, and green and blue given the rounded and clipped colours before them."""
    means = [[0.985, -0.99], [0.1, 0.2], [0.0, -0.3]]
    log_s = [[-5.0, -5.5], [-5.2, -6], [-6, -5.0]]
    parameters = pixel([0.5, 0.0], means, log_s, [[0.9, -0.8], [0.5, 0.3], [-0.4, 2.0]])
    n = 60_000
    drawn = draws_of(parameters, n)
    found, counts = drawn.unique(dim=0, return_counts=True)
    p = log_prob(parameters, found / 127.5 - 1.0).exp()
    for colour in range(3):  # of each colour's byte, over the values found of the others
        seen = torch.zeros(256).index_add(0, found[:, colour], counts / n)
        due = torch.zeros(256).double().index_add(0, found[:, colour], p)
        assert due.sum() > 0.98
        assert (seen - due).abs().sum() < 0.05
    often = counts > 150
    assert often.sum() > 20
    assert ((counts / n / p)[often] - 1).abs().mean() < 0.1


@grey_and_rgb
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
def test_temperature_of_pixels_narrows_logistics_and_prefers_likely_ones(channels, temperature):
    parameters = pixel([0.0], [[0.1]] * channels, [[-3.0]] * channels)
    x = draws_of(parameters, 20_000, temperature, channels) / 127.5 - 1
    due = temperature * math.exp(-3) * math.pi / 3**0.5
    assert x.std(0).tolist() == pytest.approx([due] * channels, rel=0.05, abs=1e-6)
    assert x.mean(0).tolist() == pytest.approx([0.1] * channels, abs=0.003)
    parameters = pixel([0.5, 0.0], [[-0.5, 0.5]] * channels, [[-7.0] * 2] * channels)
    bright = (draws_of(parameters, 20_000, temperature, channels) > 127).float().mean(0)
    due = 1 / (1 + math.exp(0.5 / max(temperature, 1e-3)))
    assert bright.tolist() == pytest.approx([due] * channels, abs=0.01)


def test_quantise_inverts_scaled_which_takes_nothing_but_bytes():
    values = torch.arange(256, dtype=torch.uint8)
    x = nvae.scaled(values)
    assert torch.allclose(x.double(), BYTES, atol=1e-6)
    for off in (0, 0.49, -0.49):
        assert torch.equal(nvae.quantise(x + off * 2 / 255), values)
    assert nvae.quantise(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]
    for dtype in (torch.float32, torch.int64):
        with pytest.raises(ValueError, match="uint8"):
            nvae.scaled(values.to(dtype))


# ------------------------------------------------------------------------------ groups, the network


def test_normals_are_clamped_smoothly():
    values = [0.0, 0.1, 4, 99, -99]
    normal = nvae.soft_clamped_normal(torch.tensor(values + values).reshape(1, 10, 1, 1))
    due = [0, 0.1, 5 * math.tanh(0.8), 5, -5]
    assert normal.loc.flatten().tolist() == pytest.approx(due, abs=1e-4)
    due = [1.01, math.exp(0.1) + 0.01] + [math.exp(2) + 0.01] * 2 + [math.exp(-5) + 0.01]
    assert normal.scale.flatten().tolist() == pytest.approx(due, rel=1e-4)


def test_posterior_is_given_relative_to_the_prior():
    """Its output is added to mu and ln sigma of p, before the clamp."""
    group = network().groups[1]
    nn.init.zeros_(group.posterior.weight)
    _, (_, q, p) = group(randn(2, 8, 4, 4), randn(2, 8, 4, 4, seed=2))
    bias = group.posterior.bias.detach()[:, None, None]
    mu = 5 * torch.atanh(p.loc / 5) + bias[:20]
    log_sigma = 5 * torch.atanh((p.scale - 0.01).log() / 5) + bias[20:]
    assert torch.allclose(q.loc, 5 * torch.tanh(mu / 5), atol=1e-5)
    assert torch.allclose(q.scale, (5 * torch.tanh(log_sigma / 5)).exp() + 0.01, atol=1e-5)
    assert p.loc.std(0).max() > 0.01  # p sees h


def test_posterior_is_the_prior_at_first_and_then_training_and_sampling_coincide():
    net = network(fresh=True)
    features = net.encode(nvae.scaled(images(2)))
    for _, q, p in net.decode(features)[1]:
        assert not p.loc.any() and torch.allclose(p.scale, torch.tensor(1.01))
        assert torch.equal(p.loc, q.loc) and torch.equal(p.scale, q.scale)
    for group in net.groups:
        nn.init.normal_(group.prior[1].weight)
    torch.manual_seed(3)
    trained, _ = net.decode(features)
    torch.manual_seed(3)
    assert torch.allclose(parameters_of(trained), parameters_of(net.generate(2)), atol=1e-4)


def test_the_image_reaches_the_output_through_z_alone(monkeypatch):
    net = network()
    x = nvae.scaled(images(2)), nvae.scaled(images(2, seed=1))
    outputs = [net.decode(net.encode(each))[0] for each in x]
    assert not torch.allclose(*map(parameters_of, outputs), atol=0.01)
    monkeypatch.setattr(nvae.Normal, "rsample", lambda self: torch.ones_like(self.loc))
    (output, draws), (other_output, other_draws) = [net.decode(net.encode(each)) for each in x]
    assert torch.equal(parameters_of(output), parameters_of(other_output))
    for (_, q, p), (_, other_q, other_p) in zip(draws, other_draws, strict=True):
        assert torch.equal(p.loc, other_p.loc)
        assert (q.loc - other_q.loc).abs().max() > 1e-3  # its own feature, not only the z before
        assert (q.scale - other_q.scale).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_temperature_narrows_every_prior(temperature):
    group = network().groups[1]
    seen = watch_z([group])
    h = randn(2, 8, 4, 4)
    for each in (temperature, 1.0):
        torch.manual_seed(0)
        group.generate(h, each)
    p = nvae.soft_clamped_normal(group.prior(group.cells(h)))
    assert torch.allclose(seen[0] - p.loc, temperature * (seen[1] - p.loc), atol=1e-5)
    assert ((seen[1] - p.loc) / p.scale).std().item() == pytest.approx(1, abs=0.1)


def test_samples_share_the_first_groups_as_asked():
    net = network()
    seen = watch_z(net.groups)
    for shared in range(4):
        seen.clear()
        assert net.generate(3, shared=shared).means.shape[0] == 3
        assert [torch.equal(z[0], z[-1]) for z in seen] == [i < shared for i in range(4)]


@pytest.mark.parametrize("groups", [(2,), (1, 2, 1), (0, 2), (2, 0), (1, 0, 0, 1)])
def test_shapes_and_sizes_of_groups(groups):
    net = network(groups=groups, mults=(1, 2, 3))
    features = net.encode(nvae.scaled(images(2)))
    likelihood, draws = net.decode(features)
    assert likelihood.means.shape == net.generate(2).means.shape == (2, 3, nvae.MIXTURES, 16, 16)
    levels = [level for level in range(len(groups), 0, -1) for _ in range(groups[level - 1])]
    for level, feature, (z, _, _), alpha in zip(levels, features, draws, net.alpha, strict=True):
        size = 16 // 2**level
        assert feature.shape == (2, 4 * min(level + 1, 3), size, size)  # the last mult for the rest
        assert z.shape == (2, 20, size, size)
        assert alpha == size**2 / groups[level - 1]
    cells = [len([c for c in group.cells if isinstance(c, nvae.Cell)]) for group in net.groups]
    ups = [above - level for above, level in zip([len(groups), *levels], levels, strict=False)]
    assert cells == [up + (i > 0) for i, up in enumerate(ups)]  # none on a constant


def test_what_cells_add_is_gated_and_scaled():
    """x + 0.3 gate body(x), where a gate sees the means of body(x) in all channels and no pixel."""
    torch.manual_seed(0)
    cell = nvae.Cell(5, 5)
    cell.body = nn.Sigmoid()
    x = randn(2, 5, 4, 4)
    redder = x + 3 * (torch.arange(5) == 0).view(5, 1, 1)
    gates, other_gates = [(cell(each) - each) / 0.3 / each.sigmoid() for each in (x, redder)]
    assert ((gates > 0) & (gates < 1)).all()
    assert torch.allclose(gates, gates.mean((2, 3), keepdim=True).expand_as(x), atol=1e-3)
    assert ((other_gates - gates).abs().mean((0, 2, 3)) > 0.002).sum() > 1
    assert torch.allclose(gates.mean((2, 3)), cell.gate(x.sigmoid().mean((2, 3))), atol=1e-3)


def test_terms_are_those_of_the_elbo_in_nats():
    """Not with a mean over pixels, a weight set by hand or KL(p || q)."""
    net = network()
    x = nvae.scaled(images(3))
    torch.manual_seed(0)
    terms = nvae.elbo_terms(net, x)
    torch.manual_seed(0)
    likelihood, draws = net.decode(net.encode(x))
    assert terms.shape == (3, 5)
    assert torch.allclose(terms[:, 0], -likelihood.log_prob(x))
    for i, (_, q, p) in enumerate(draws, start=1):
        due = (p.scale / q.scale).log() - 0.5
        due = due + (q.scale**2 + (q.loc - p.loc) ** 2) / (2 * p.scale**2)
        assert torch.allclose(terms[:, i], due.sum((1, 2, 3)), rtol=1e-3)
    assert nvae.bits_per_dim(768 * math.log(2), images(3)) == pytest.approx(1)


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_balancing_has_mean_one_is_detached_and_ends(kind):
    kl = (3 * randn(6, 5)).exp().requires_grad_()
    alpha = torch.tensor([1.0, 1, 4, 4, 4])
    of_groups = kl.detach().mean(0)
    gamma = (of_groups + 0.01) / alpha
    gamma = gamma / gamma.mean()
    loss = nvae.kl_loss(kl, kind(0.25), alpha)
    assert loss.item() == pytest.approx(0.25 * (gamma * of_groups).sum().item(), rel=1e-5)
    (grad,) = torch.autograd.grad(loss, kl)
    assert torch.allclose(grad, 0.25 * gamma.expand(6, 5) / 6)
    plain = nvae.kl_loss(kl, kind(1.0), alpha)
    assert plain.item() == pytest.approx(of_groups.sum().item(), rel=1e-5)
    assert nvae.kl_loss(torch.zeros(6, 5), kind(0.5), alpha) == 0  # not 0 / 0


def test_regulariser_is_the_sum_of_largest_singular_values():
    net = network(groups=(1, 1), depthwise=True)
    for layer in convolutions(net):
        layer.weight.data *= 4 * torch.rand(())  # no two layers alike
    spectral = nvae.Spectral(net, 0.5)
    spectral(200)  # fewer steps than any run has: near-equal singular values part slowly
    weights = [layer.weight for layer in convolutions(net)]
    due = 0.5 * sum(torch.linalg.matrix_norm(weight.flatten(1), 2) for weight in weights)
    assert spectral().item() == pytest.approx(due.item(), rel=0.01)
    ours = torch.autograd.grad(spectral(), weights)
    for a, b in zip(ours, torch.autograd.grad(due, weights), strict=True):
        assert (a * b).sum() / a.norm() / b.norm() > 0.9
        assert a.norm().item() == pytest.approx(b.norm().item(), rel=0.1)


def test_regulariser_follows_the_weights_by_one_iteration_a_step():
    """Also from zero, where layers that put out p and q start: u = 0 would stay there."""
    layer = nn.Conv2d(8, 12, 3)
    nn.init.zeros_(layer.weight)
    spectral = nvae.Spectral(layer, 1.0)
    assert spectral().item() == 0
    for _ in range(30):
        layer.weight.data.mul_(0.9).add_(randn(12, 8, 3, 3, seed=5))
        found = spectral().item()
    due = torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item()
    assert found == pytest.approx(due, rel=0.01)
    assert nvae.Spectral(layer)().item() == pytest.approx(0.01 * due, rel=0.005)  # 40 at first
    assert list(spectral.state_dict()) == ["12x72"]  # u is in checkpoints


class Toy:
    """z_1, z_2 ~ N(0, 1), x ~ N(z_1, 1); q(z_1) is `scale` times as wide as p(z_1|x)."""

    def __init__(self, scale, shift):
        self.scale = scale
        self.shift = shift
        self.encoded = 0

    def encode(self, x):
        self.encoded += 1
        return x / 2

    def decode(self, mu):
        p = Normal(torch.zeros_like(mu), torch.ones_like(mu))
        posteriors = [Normal(mu, self.scale * 0.5**0.5), Normal(p.loc + self.shift, 1.0)]
        draws = [(q.sample(), q, p) for q in posteriors]
        self.log_prob = lambda x: Normal(draws[0][0], 1.0).log_prob(x).flatten()
        return self, draws


def test_importance_weighted_bound_rises_from_the_elbo_to_the_likelihood():
    torch.manual_seed(0)
    x = randn(40_000, 1, 1, 1, dtype=torch.float64)
    due = Normal(0.0, 2**0.5).log_prob(x).flatten()
    exact = Toy(1.0, 0.0)
    assert torch.allclose(nvae.iw_bound(exact, x, 7), due)
    assert exact.encoded == 1
    gaps = [(nvae.iw_bound(Toy(0.6, 0.5), x, k) - due).mean().item() for k in (1, 2, 8, 64)]
    elbo = -(math.log(1 / 0.6) + 0.36 / 2 - 0.5) - 0.125  # minus KL(q || p(z|x))
    assert gaps == sorted(gaps)
    assert gaps[0] == pytest.approx(elbo, abs=0.01)
    assert gaps[-1] == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("beta, weight", [(0.3, 50.0), (1.0, 50.0), (1.0, 1e5)])
def test_a_training_step_descends_the_loss_and_reports_its_terms(beta, weight):
    net = network()
    spectral = nvae.Spectral(net, weight)
    net_before, spectral_before = copy.deepcopy((net, spectral))
    x = images(8)
    idle = nn.Parameter(torch.ones(1))
    optimizers = torch.optim.SGD([idle], 9.0), torch.optim.SGD(net.parameters(), 9.0)
    for parameter in net.parameters():  # left by a step before
        parameter.grad = torch.full_like(parameter, 1e6)
    torch.manual_seed(0)
    terms = nvae.training_step(net, spectral, optimizers, x, 1e-4, beta)
    assert optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)
    assert 1 - idle.item() == pytest.approx(0.01 * 1e-4, rel=0.05)  # weight decay
    torch.manual_seed(0)
    due = nvae.elbo_terms(net_before, nvae.scaled(x))
    regulariser = spectral_before()
    balanced = nvae.kl_loss(due[:, 1:], beta, net.alpha)
    (due[:, 0].mean() + balanced + regulariser).backward()
    norm = nn.utils.get_total_norm([before.grad for before in net_before.parameters()])
    assert (norm > 30 * 768) == (weight > 50)
    rate = 1e-5 * min(1, 30 * 768 / norm)  # Adam's is a tenth; long gradients are clipped
    for before, after in zip(net_before.parameters(), net.parameters(), strict=True):
        assert torch.allclose(before - after, rate * before.grad, rtol=1e-2, atol=1e-6)
    due = [due[:, 0].mean().item(), due[:, 1:].sum(1).mean().item(), regulariser.item()]
    assert (terms * 768 * math.log(2)).tolist() == pytest.approx(due, rel=1e-4)
    assert not terms.requires_grad


def test_bf16_stays_inside_the_network():
    """Its spacing at 8192 nats is 32."""
    net = network()
    x = nvae.scaled(images(2))
    with torch.autocast("cpu", torch.bfloat16):
        features = net.encode(x)
        likelihood, draws = net.decode(features)
        seen = [likelihood.log_prob(x), parameters_of(likelihood), nvae.elbo_terms(net, x)]
    assert features[0].dtype == torch.bfloat16  # so there is something to keep out
    z, q, p = draws[1]
    assert {part.dtype for part in (z, q.loc, q.scale, p.loc, p.scale, *seen)} == {torch.float32}
    for exact in (z, q.scale, p.scale):  # computed in fp32, not only stored in it
        assert not torch.equal(exact, exact.to(torch.bfloat16).float())
    parts = nvae.Spectral(net), nvae.make_optimizers(net), images(2), 0.0
    terms = []
    for amp in (False, True):
        torch.manual_seed(0)
        terms.append(nvae.training_step(net, *parts, amp=amp)[:2])
    assert 0 < (terms[0] - terms[1]).abs().max() < 0.1


def test_beta_rises_over_5_percent_of_the_steps(monkeypatch):
    betas = []

    def step(net, spectral, optimizers, batch, lr, beta, amp):
        betas.append(beta)
        return torch.zeros(3)

    monkeypatch.setattr(nvae, "training_step", step)
    monkeypatch.setattr(nvae, "finish_epoch", lambda args, state, *rest: state["rows"].append({}))
    np.savez("data.npz", train=images(20, shape=(32, 32, 3)), test=images(1, shape=(32, 32, 3)))
    flags = "--data data.npz --batch-size 4 --width 4 --groups 1 --device cpu"
    nvae.train(nvae.parse(f"{flags} --epochs 24".split()))
    assert betas == pytest.approx([min(1, step / 6) for step in range(1, 121)])
    nvae.train(nvae.parse(f"{flags} --epochs 2 --out other".split()))
    assert betas[120:] == [1.0] * 10  # 5 % are less than a step


@torch.no_grad()
def test_evaluation_reports_means_over_images_and_their_standard_error(monkeypatch, capsys):
    net = network(shape=(3, 32, 32), groups=(1, 1))
    test = images(10, shape=(3, 32, 32))
    test[7:] = 0  # the last batch, of 3, costs something else
    monkeypatch.setattr("common.load", lambda data: (test, test))
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n - 4, n))
    flags = {"seed": 3, "data": "", "device": "cpu", "batch_size": 7, "iw_samples": 2, "out": "."}
    nvae.evaluate(argparse.Namespace(**flags, temperature=1.0, pixel_temperature=1.0), net)
    terms, elbo, fewer, iw = capsys.readouterr().out.splitlines()
    torch.manual_seed(3)
    due = torch.cat([nvae.elbo_terms(net, nvae.scaled(x)) for x in test.split(7)]) / 3072
    due = due / math.log(2)
    assert terms.split()[-2:] == [f"{kl:.4f}" for kl in due[:, 1:].mean(0)]
    bits = due.sum(1)
    error = bits.std() / 10**0.5
    assert elbo == f"minus ELBO: {bits.mean():.4f} bits/dim, standard error {error:.4f}, 10 images"
    assert float(fewer.split()[4]) == pytest.approx(bits[-4:].mean().item(), abs=1e-4)
    assert float(iw.split()[6]) == pytest.approx(bits[-4:].mean().item(), abs=0.05)
