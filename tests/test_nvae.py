"""NVAE's mathematics and network: the real functions, against closed forms and float64 loops."""

import copy
import inspect
import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal

import nvae

torch.set_num_threads(1)  # on a busy machine many wait for each other

both_kinds_of_flow = pytest.mark.parametrize("flows", [0, 2])
grey_and_rgb = pytest.mark.parametrize("channels", [1, 3])


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=gen(seed), dtype=dtype)


def network(fresh=False, **options):
    """A small NVAE in evaluation mode; unless fresh, layers that start at zero are random."""
    torch.manual_seed(0)
    small = {
        "width": 4,
        "groups": (2, 2),
        "outer": 1,
        "expand": 2,
        "latents": 3,
        "image_size": 16,
    }
    net = nvae.NVAE(**{**small, **options}).eval()
    if not fresh:
        for parameter in net.parameters():
            if not parameter.any():
                nn.init.normal_(parameter.data, std=0.05)
    return net


def images(count, seed=0, channels=3, size=16):
    """Of independent bytes."""
    return torch.randint(256, (count, channels, size, size), generator=gen(seed), dtype=torch.uint8)


def plain_images(brightness, channels=3, size=16):
    """uint8, each of one brightness."""
    return brightness.to(torch.uint8).reshape(-1, 1, 1, 1).repeat(1, channels, size, size)


def total_kl(draws):
    """(B,), of all groups."""
    return sum(draw.kl().sum((1, 2, 3)) for draw in draws)


def total_log_ratio(draws):
    return sum(draw.log_ratio().sum((1, 2, 3)) for draw in draws)


def bound(net, x):
    """In bits/dim."""
    reconstruction, kl = nvae.test_bound(net, x)
    return (reconstruction + kl.sum()).item()


# --------------------------------------------------------------------------- mixture of logistics

BYTES = torch.arange(256, dtype=torch.float64) / 127.5 - 1
COEFFICIENTS = [[], [(0, 0)], [(1, 0), (2, 1)]]  # of each colour: (which, of which colour before)


def pixel(weights, means, log_s, c=None):
    """Logits (1, K M, 1, 1) in float64 of one pixel: (M,), (C, M) twice, and c before its tanh."""
    weights, means, log_s = (torch.as_tensor(part).double() for part in (weights, means, log_s))
    pairs = len(means) * (len(means) - 1) // 2
    c = torch.zeros(pairs, len(weights)) if c is None else torch.as_tensor(c)
    parts = [weights, means.flatten(), log_s.flatten(), c.double().flatten()]
    return torch.cat(parts)[None, :, None, None]


def log_prob(logits, x):
    """Of many values (N, C) of one pixel."""
    return nvae.dmol_log_prob(logits.expand(len(x), -1, -1, -1), x[:, :, None, None])


def draws_of(logits, count, temperature=1.0, seed=0, channels=3):
    """(count, C), of one pixel."""
    many = logits.float().expand(1, -1, count, 1)
    x = nvae.dmol_sample(many, temperature, gen(seed), channels)
    return x[0, :, :, 0].T


def sigmoid(a):
    return 1 / (1 + math.exp(-a)) if a > -700 else 0.0


def bin_probability(x, mean, s):
    """Of the byte at x, from the definition."""
    byte = round((x + 1) * 127.5)
    upper = (x + 1 / 255 - mean) / s if byte < 255 else math.inf
    lower = (x - 1 / 255 - mean) / s if byte > 0 else -math.inf
    if upper + lower > 0:  # by symmetry the same, but a difference of small numbers
        upper, lower = -lower, -upper
    return sigmoid(upper) - sigmoid(lower)


def brute_force(weights, means, log_s, c, x):
    """ln p of one pixel with values x (C,), in a loop."""
    norm = sum(math.exp(weight) for weight in weights)
    total = 0.0
    for k, weight in enumerate(weights):
        p = math.exp(weight) / norm
        for colour, value in enumerate(x):
            mean = means[colour][k]
            for which, before in COEFFICIENTS[colour]:
                mean += math.tanh(c[which][k]) * x[before]
            p *= bin_probability(value, mean, math.exp(max(log_s[colour][k], -7)))
        total += p
    return math.log(total)


@pytest.mark.parametrize("channels, colour", [(1, 0), (3, 0), (3, 1), (3, 2)])
@pytest.mark.parametrize("mean", [-3, -1, -0.999, -0.3, 0.0, 0.9, 0.9922, 0.996, 1, 1.004, 3])
def test_each_colour_sums_to_one_given_the_others(channels, colour, mean):
    """Not so with 254 in the tail of 255, a tail counted twice or never."""
    c = 0.2 * randn(channels * (channels - 1) // 2, 2)
    x = torch.full((256, channels), -1.0, dtype=torch.float64)
    x[:, colour] = BYTES
    for log_s in (-9.0, -7.0, -5.0, -3.0, -1.0, 1.0):
        means = torch.full((channels, 2), -60.0)  # byte 0 for certain
        scales = torch.full((channels, 2), -7.0)
        means[colour] = torch.tensor([mean, -mean / 3])
        scales[colour] = log_s
        logits = pixel([0.3, -0.4], means, scales, c)
        assert log_prob(logits, x).exp().sum().item() == pytest.approx(1, abs=1e-6)
        assert log_prob(logits.float(), x.float()).exp().sum().item() == pytest.approx(1, abs=2e-4)


@grey_and_rgb
@pytest.mark.parametrize("seed", range(6))
def test_log_probability_is_that_of_a_loop(channels, seed):
    """Order of the logits, colours, clamp, coefficients; softmax over the logistics."""
    weights = randn(4, seed=seed)
    means = 0.6 * randn(channels, 4, seed=seed + 50)
    log_s = randn(channels, 4, seed=seed + 60) - 2
    log_s[0, 0] = -9
    c = randn(channels * (channels - 1) // 2, 4, seed=seed + 70)
    x = BYTES[torch.randint(256, (5, channels), generator=gen(seed))]
    x[0, 0] = -1
    x[1, -1] = 1
    x[2] = BYTES[254]
    parts = [part.tolist() for part in (weights, means, log_s, c)]
    due = [brute_force(*parts, row) for row in x.tolist()]
    logits = pixel(weights, means, log_s, c)
    assert log_prob(logits, x).tolist() == pytest.approx(due, rel=1e-6)
    picture = nvae.dmol_log_prob(logits.expand(1, -1, 5, 1), x.T[None, :, :, None])
    assert picture.shape == (1,)
    assert picture.item() == pytest.approx(sum(due), rel=1e-6)  # a sum over the pixels


@grey_and_rgb
@pytest.mark.parametrize("log_s", [7.0, 20.0, 300.0])
@pytest.mark.parametrize("x", [-1, 0, 1])
def test_the_widest_logistics_are_finite(channels, log_s, x):
    """1 / s must not become 0: a bin would have no width."""
    logits = pixel([0.0], [[0.3]] * channels, [[log_s]] * channels).float().requires_grad_()
    at_x = torch.full((1, channels, 1, 1), float(x))
    value = nvae.dmol_log_prob(logits, at_x)
    value.sum().backward()
    widest = pixel([0.0], [[0.3]] * channels, [[7.0]] * channels).float()
    assert value.item() == nvae.dmol_log_prob(widest, at_x).item()
    assert logits.grad.isfinite().all()


@grey_and_rgb
@pytest.mark.parametrize("x, mean", [(-1, 1), (1, -1), (0, 1), (-0.5, 0.9), (BYTES[254], -1)])
def test_means_far_off_at_the_smallest_scale_still_learn(channels, x, mean):
    """P underflows there: its logarithm must not."""
    logits = pixel([0.0], [[mean]] * channels, [[-7.0]] * channels).float().requires_grad_()
    value = nvae.dmol_log_prob(logits, torch.full((1, channels, 1, 1), float(x)))
    value.sum().backward()
    assert value.isfinite().all()
    assert value < -300 * channels
    assert logits.grad.isfinite().all()
    of_means = logits.grad.flatten()[1 : 1 + channels]
    assert (of_means * (x - mean) > 100).all()


def test_samples_have_the_probabilities_of_their_bytes():
    """Also at the edges, and green and blue given the rounded and clamped colours before them."""
    means = [[0.985, -0.99], [0.1, 0.2], [0.0, -0.3]]
    log_s = [[-5.0, -5.5], [-5.2, -6], [-6, -5.0]]
    logits = pixel([0.5, 0.0], means, log_s, [[0.9, -0.8], [0.5, 0.3], [-0.4, 2.0]])
    n = 60_000
    x = draws_of(logits, n)
    drawn = ((x + 1) * 127.5).round().long()
    assert torch.allclose(drawn / 127.5 - 1, x, atol=1e-6)
    found, counts = drawn.unique(dim=0, return_counts=True)
    p = log_prob(logits, found / 127.5 - 1.0).exp()
    for colour in range(3):  # of each colour's byte, over the values found of the others
        seen = torch.zeros(256).index_add(0, found[:, colour], counts / n)
        due = torch.zeros(256).double().index_add(0, found[:, colour], p)
        assert due.sum() > 0.98
        assert (seen - due).abs().sum() < 0.05
    assert drawn[:, 0].min() == 0
    assert drawn[:, 0].max() == 255
    often = counts > 150
    assert often.sum() > 20
    assert ((counts / n / p)[often] - 1).abs().mean() < 0.1


@pytest.mark.parametrize("log_s", [-5.0, -2.5])
def test_samples_of_one_channel_have_the_probabilities_of_their_bytes(log_s):
    logits = pixel([0.5, -0.2, 0.1], [[0.99, -0.98, 0.3]], [[log_s, log_s, -4.0]])
    n = 60_000
    x = draws_of(logits, n, channels=1)
    assert x.shape == (n, 1)
    seen = ((x[:, 0] + 1) * 127.5).round().long().bincount(minlength=256) / n
    due = log_prob(logits, BYTES[:, None]).exp()
    assert (seen - due).abs().sum() < 0.05
    assert seen[[0, 255]].tolist() == pytest.approx(due[[0, 255]].tolist(), abs=0.01)
    assert due[[0, 255]].min() > 0.015


def test_a_colour_follows_the_clamped_ones_before_it():
    logits = pixel([0.0], [[3.0], [0], [0]], [[-7.0]] * 3, [[0.5], [0.0], [0.5]]).float()
    due = [1, math.tanh(0.5), math.tanh(0.5) ** 2]  # not 3 tanh(0.5)
    assert nvae.dmol_sample(logits, 0.01, gen()).flatten().tolist() == pytest.approx(due, abs=0.01)
    assert nvae.dmol_mean(logits).flatten().tolist() == pytest.approx(due, abs=0.01)


@grey_and_rgb
def test_temperature_of_pixels_narrows_logistics_and_prefers_likely_ones(channels):
    logits = pixel([0.0], [[0.1]] * channels, [[-3.0]] * channels)
    for temperature in (0.1, 0.5, 1.0):
        x = draws_of(logits, 20_000, temperature, channels=channels)
        due = temperature * math.exp(-3) * math.pi / 3**0.5
        assert x.std(0).tolist() == pytest.approx([due] * channels, rel=0.05)
        assert x.mean(0).tolist() == pytest.approx([0.1] * channels, abs=0.003)
    logits = pixel([2.0, 0.0], [[-0.5, 0.5]] * channels, [[-7.0] * 2] * channels)
    for temperature in (0.5, 1.0):
        x = draws_of(logits, 20_000, temperature, channels=channels)
        due = 1 / (1 + math.exp(2 / temperature))
        assert (x > 0).float().mean(0).tolist() == pytest.approx([due] * channels, abs=0.01)


@grey_and_rgb
def test_mean_is_that_of_the_samples_which_a_generator_fixes(channels):
    c = randn(channels * (channels - 1) // 2, 3)
    log_s = torch.full((channels, 3), -3.0)
    logits = pixel([0.3, 0.0, -1], 0.3 * randn(channels, 3), log_s, c)
    mean = nvae.dmol_mean(logits, channels).flatten()
    x = draws_of(logits, 20_000, channels=channels)
    assert mean.tolist() == pytest.approx(x.mean(0).tolist(), abs=0.01)
    assert torch.equal(draws_of(logits, 20_000, channels=channels), x)


@grey_and_rgb
def test_logits_are_weights_means_scales_and_coefficients(channels):
    """M weights, then C M means, C M ln s, and M coefficients for each pair of colours."""
    pairs = channels * (channels - 1) // 2
    per_logistic = 1 + 2 * channels + pairs
    assert nvae.logits_per_logistic(channels) == per_logistic
    logits = 9 * randn(2, per_logistic * 5, 3, 3)
    weights, means, log_s, c = nvae.mixture(logits, channels)
    starts = [0, 5, 5 + 5 * channels, 5 + 10 * channels, 5 * per_logistic]
    due = [logits[:, start:end] for start, end in zip(starts, starts[1:], strict=False)]
    assert torch.equal(weights, due[0])
    assert means.shape == log_s.shape == (2, channels, 5, 3, 3)
    assert c.shape == (2, pairs, 5, 3, 3)
    assert torch.equal(means.flatten(1, 2), due[1])
    assert torch.equal(log_s.flatten(1, 2), due[2].clamp(-7, 7))
    assert torch.equal(c.flatten(1, 2), torch.tanh(due[3]))


def test_quantise_inverts_scaled_and_samples_may_leave_the_range():
    values = torch.arange(256, dtype=torch.uint8)
    x = nvae.scaled(values)
    assert x.dtype == torch.float32
    assert torch.allclose(x.double(), BYTES, atol=1e-6)
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(nvae.quantise(x), values)
    assert torch.equal(nvae.quantise(x + 0.49 * 2 / 255), values)
    assert torch.equal(nvae.quantise(x - 0.49 * 2 / 255), values)
    assert nvae.quantise(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


# ------------------------------------------------------------------------------------ KL and loss


def random_normal(seed, *shape):
    mu = randn(*shape, seed=seed, dtype=torch.float64)
    sigma = randn(*shape, seed=seed + 1, dtype=torch.float64).exp()
    return Normal(mu, sigma)


def test_kl_is_the_closed_form_and_the_mean_over_draws():
    q = random_normal(2, 4, 5)
    p = random_normal(4, 4, 5)
    z = q.loc + q.scale * randn(100_000, 4, 5, dtype=torch.float64)
    draw = nvae.Draw(z, p, q, z, None)
    due = (p.scale / q.scale).log() - 0.5
    due = due + (q.scale**2 + (q.loc - p.loc) ** 2) / (2 * p.scale**2)
    assert torch.allclose(draw.kl(), due)
    assert torch.allclose(due, torch.distributions.kl_divergence(q, p))
    assert torch.allclose(draw.log_ratio(), q.log_prob(z) - p.log_prob(z))
    assert (draw.log_ratio().mean(0) / due - 1).abs().max() < 0.1
    assert nvae.Draw(z, p, p, z, None).kl().abs().max() < 1e-12


def test_log_ratio_takes_p_after_and_q_before_the_flows():
    q = random_normal(2, 4, 5)
    p = random_normal(4, 4, 5)
    z = randn(3, 4, 5, seed=6, dtype=torch.float64)
    log_det = torch.full((3, 4, 5), 0.25, dtype=torch.float64)
    draw = nvae.Draw(z + 0.5, p, q, z, log_det)  # as if a flow had moved z
    due = q.log_prob(z) - 0.25 - p.log_prob(z + 0.5)
    assert torch.allclose(draw.log_ratio(), due)
    assert torch.equal(draw.kl(), draw.log_ratio())


def test_normals_are_clamped_smoothly():
    values = [0.0, 0.1, 99, -99]
    normal = nvae.soft_clamped_normal(torch.tensor(values + values).reshape(1, 8, 1, 1))
    assert normal.loc.flatten().tolist() == pytest.approx([0, 0.1, 5, -5], abs=1e-4)
    due = [1.01, math.exp(0.1) + 0.01, math.exp(2) + 0.01, math.exp(-5) + 0.01]
    assert normal.scale.flatten().tolist() == pytest.approx(due, rel=1e-4)
    middle = nvae.soft_clamped_normal(torch.full((1, 2, 1, 1), 4.0))
    assert middle.loc.item() == pytest.approx(5 * math.tanh(0.8))


@both_kinds_of_flow
def test_loss_is_the_bound_in_nats(flows):
    """Not with a mean over pixels or a weight set by hand."""
    net = network(flows=flows)
    x = nvae.scaled(images(3))
    reconstruction, kl = nvae.elbo(net, x, gen())
    logits, draws = net(x, net.noise(3, gen()))
    assert reconstruction.shape == (3,)
    assert torch.allclose(reconstruction, -nvae.dmol_log_prob(logits, x))
    assert kl.shape == (3, 4, 3)
    assert (kl.sum((1, 2)) > 0).all()
    for i, draw in enumerate(draws):
        due = draw.log_ratio() if flows else torch.distributions.kl_divergence(draw.q, draw.p)
        assert torch.allclose(kl[:, i], due.sum((2, 3)), rtol=1e-4, atol=1e-6)


def test_a_bit_per_dimension_is_that_many_nats():
    assert nvae.nats_of_one_bit(images(5, size=32)) == pytest.approx(3072 * math.log(2))
    assert nvae.nats_of_one_bit(images(5, channels=1, size=28)) == pytest.approx(784 * math.log(2))


def test_bound_of_a_set_weighs_images_not_batches():
    net = network()
    x = images(130)  # in batches of 100 and 30
    x[100:] = 0  # which cost something else
    reconstruction, kl = nvae.test_bound(net, x)
    generator = gen()
    due_reconstruction = 0.0
    due_kl = torch.zeros(4, 3)
    for batch in x.split(100):
        batch = nvae.scaled(batch)
        logits, draws = net(batch, net.noise(len(batch), generator))
        due_reconstruction -= nvae.dmol_log_prob(logits, batch).sum().item()
        due_kl += torch.stack([draw.kl().sum((0, 2, 3)) for draw in draws]).detach()
    nats = 130 * 768 * math.log(2)
    assert reconstruction.item() == pytest.approx(due_reconstruction / nats, rel=1e-5)
    assert torch.allclose(kl, due_kl / nats, rtol=1e-4)
    assert bound(net, x[:100]) != pytest.approx(bound(net, x), abs=0.01)


def test_balancing_has_mean_one_is_detached_and_ends():
    kl = (3 * randn(6, 5)).exp().requires_grad_()
    alpha = torch.tensor([1.0, 1, 4, 4, 4])
    of_groups = kl.detach().mean(0)
    gamma = (of_groups + 0.01) / alpha
    gamma = gamma / gamma.mean()
    loss = nvae.kl_loss(kl, 0.25, alpha)
    assert loss.item() == pytest.approx(0.25 * (gamma * of_groups).sum().item(), rel=1e-5)
    (grad,) = torch.autograd.grad(loss, kl)
    assert grad.mean().item() * 6 == pytest.approx(0.25)  # gamma is 1 on average
    assert torch.allclose(grad, 0.25 * gamma.expand(6, 5) / 6)
    assert nvae.kl_loss(kl, 1.0, alpha).item() == pytest.approx(of_groups.sum().item(), rel=1e-5)


def test_balancing_takes_estimates_below_zero():
    """As flows can give of one draw: no group may be paid for its KL."""
    kl = torch.tensor([[-0.5, 2.0], [-0.1, 1.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(nvae.kl_loss(kl, 0.5, torch.ones(2)), kl)
    assert (grad > 0).all()
    assert grad.sum().item() == pytest.approx(0.5 * 2)


def test_a_group_owes_kl_by_its_pixels():
    alpha = network(groups=(3, 2)).alpha  # 2 at a quarter, then 3 at half
    assert (alpha / alpha[-1]).tolist() == pytest.approx([0.25 * 3 / 2] * 2 + [1] * 3)


def test_weight_of_the_kl_rises_to_one():
    assert nvae.kl_weight(0, 10) == pytest.approx(1e-4)
    assert [nvae.kl_weight(step, 8) for step in (2, 4, 8, 99)] == [0.25, 0.5, 1, 1]
    assert nvae.kl_weight(0, 0) == 1


# ------------------------------------------------------------------------------------ regulariser


def convolutions(net):
    return [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]


def largest_singular_value(layer):
    weight = layer.weight * getattr(layer, "mask", 1)
    return torch.linalg.matrix_norm(weight.flatten(1), 2)


def exact_regulariser(net):
    return sum(largest_singular_value(layer) for layer in convolutions(net))


def network_of_many_scales(**options):
    """No two layers alike."""
    net = network(**options)
    for layer in convolutions(net):
        layer.weight.data *= 4 * torch.rand(())
    return net


@both_kinds_of_flow
def test_regulariser_is_the_sum_of_largest_singular_values(flows):
    net = network_of_many_scales(flows=flows, groups=(1, 1))
    spectral = nvae.Spectral(net)
    spectral(200)  # fewer steps than any run has: near-equal singular values part slowly
    due = exact_regulariser(net)
    assert spectral().item() == pytest.approx(due.item(), rel=0.01)
    weights = [layer.weight for layer in convolutions(net)]
    ours = torch.autograd.grad(spectral(), weights)
    theirs = torch.autograd.grad(due, weights)
    for a, b in zip(ours, theirs, strict=True):
        assert (a * b).sum() / a.norm() / b.norm() > 0.9
        assert a.norm().item() == pytest.approx(b.norm().item(), rel=0.1)


@both_kinds_of_flow
def test_regulariser_follows_the_weights_by_one_iteration_a_step(flows):
    net = network_of_many_scales(flows=flows, groups=(1, 1))
    spectral = nvae.Spectral(net)
    spectral(200)
    before = exact_regulariser(net).item()
    with torch.no_grad():
        weight = convolutions(net)[-1].weight
        turn = randn(*weight.shape, seed=5) / 20
        for _ in range(20):
            weight.add_(turn)
            found = spectral().item()
    assert found == pytest.approx(exact_regulariser(net).item(), rel=0.01)
    assert found > before + 0.5
    restored = nvae.Spectral(net, iterations=1)
    assert restored().item() < 0.99 * found  # not found at once
    restored.load_state_dict(spectral.state_dict())
    assert restored().item() == pytest.approx(spectral().item(), rel=1e-4)


def test_weights_that_start_at_zero_are_found_once_they_are_not():
    """As those of the layers that read p and q: vectors of zeros would stay zeros."""
    layer = nn.Conv2d(3, 4, 3)
    nn.init.zeros_(layer.weight)
    spectral = nvae.Spectral(layer)
    assert spectral().item() == 0
    nn.init.normal_(layer.weight, generator=gen())
    due = largest_singular_value(layer).item()
    assert spectral(50).item() == pytest.approx(due, rel=1e-3)


def test_regulariser_leaves_out_the_weights_that_a_flow_does_not_use():
    flow = random_flow(turned=False)
    layers = convolutions(flow)
    z = randn(4, 3, 3, 3)
    context = randn(4, 5, 3, 3, seed=2)
    spectral = nvae.Spectral(flow, iterations=200)
    before = spectral(200).item()
    out = flow(z, context)[0]
    grads = torch.autograd.grad(out.square().sum(), [layer.weight for layer in layers])
    unused = [grad == 0 for grad in grads]
    counts = [mask.sum().item() for mask in unused]
    assert sum(count > 0 for count in counts) == 1
    # 12 x 3 at each of four pixels to come, 12 x 2 latents not before one at the pixel itself
    assert max(counts) == 4 * 36 + 24
    with torch.no_grad():
        for layer, mask in zip(layers, unused, strict=True):
            layer.weight[mask] += 9
    assert torch.equal(flow(z, context)[0], out)
    assert spectral(200).item() == pytest.approx(before, rel=1e-3)
    grads = torch.autograd.grad(spectral(), [layer.weight for layer in layers])
    assert not any(grad[mask].any() for grad, mask in zip(grads, unused, strict=True))


# ---------------------------------------------------------------------- importance-weighted bound


class Toy:
    """z ~ N(0, 1), x | z ~ N(z, 1): p(x) = N(0, 2), p(z|x) = N(x / 2, 1/2); q `scale` as wide."""

    def __init__(self, scale):
        self.scale = scale
        self.encoded = 0

    def noise(self, count, generator=None):
        return [torch.randn(count, 1, 1, 1, generator=generator, dtype=torch.float64)]

    def encode(self, x):
        self.encoded += 1
        return [x]

    def infer(self, features, eps):
        mu = features[0] / 2
        q = Normal(mu, torch.full_like(mu, self.scale * math.sqrt(0.5)))
        p = Normal(torch.zeros_like(mu), torch.ones_like(mu))
        z = q.loc + q.scale * eps[0]
        return z, [nvae.Draw(z, p, q, z, None)]


@pytest.fixture
def gaussian_pixels(monkeypatch):
    def log_prob(logits, x):
        return Normal(logits, 1.0).log_prob(x).flatten()

    monkeypatch.setattr(nvae, "dmol_log_prob", log_prob)


@pytest.mark.usefixtures("gaussian_pixels")
def test_importance_weighted_bound_is_exact_where_q_is():
    x = randn(1000, 1, 1, 1, dtype=torch.float64)
    due = Normal(0.0, 2**0.5).log_prob(x).flatten()
    for k in (1, 7):
        net = Toy(1.0)
        found = nvae.iw_bound(net, x, k, gen())
        assert found.shape == due.shape
        assert torch.allclose(found, due)
        assert net.encoded == 1


@pytest.mark.usefixtures("gaussian_pixels")
def test_importance_weighted_bound_rises_from_the_elbo_to_the_likelihood():
    x = randn(40_000, 1, 1, 1, dtype=torch.float64)
    due = Normal(0.0, 2**0.5).log_prob(x).flatten()
    gaps = [(nvae.iw_bound(Toy(0.6), x, k, gen(k)) - due).mean().item() for k in (1, 2, 8, 64)]
    elbo = -(math.log(1 / 0.6) + 0.36 / 2 - 0.5)  # minus KL(q || p(z|x))
    assert gaps == sorted(gaps)
    assert gaps[0] == pytest.approx(elbo, abs=0.01)
    assert gaps[-1] == pytest.approx(0, abs=0.03)
    wide = (nvae.iw_bound(Toy(1.2), x, 1, gen()) - due).exp().mean().item()
    assert wide == pytest.approx(1, abs=0.01)  # mean of the weights: p(x) itself


@both_kinds_of_flow
@torch.no_grad()
def test_importance_weighted_bound_of_the_network(flows):
    net = network(flows=flows, image_size=8)
    copies = 80
    x = nvae.scaled(images(2, size=8)).repeat_interleave(copies, dim=0)
    bounds = []
    for k in (1, 5, 20):
        bounds.append(nvae.iw_bound(net, x, k, gen()).reshape(2, copies).mean(1))
    reconstruction, kl = nvae.elbo(net, x, gen())
    elbo = -(reconstruction + kl.sum((1, 2))).reshape(2, copies).mean(1)
    assert (bounds[0] < bounds[1]).all()
    assert (bounds[1] < bounds[2]).all()
    assert torch.allclose(bounds[0], elbo, rtol=1e-3)


# ------------------------------------------------------------------------------------------ flows

both_directions = pytest.mark.parametrize("turned", [False, True])


def random_flow(turned):
    torch.manual_seed(0)
    flow = nvae.Flow(3, 5, turned)
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.5)
    return flow


@both_directions
def test_flow_is_the_identity_at_first(turned):
    z = randn(2, 3, 3, 3)
    out, log_det = nvae.Flow(3, 5, turned)(z, randn(2, 5, 3, 3, seed=2))
    assert torch.equal(out, z)
    assert not log_det.any()


@both_directions
def test_flow_is_triangular_with_its_determinant(turned):
    flow = random_flow(turned).double()
    z = randn(2, 3, 3, 3, dtype=torch.float64)
    context = randn(2, 5, 3, 3, seed=2, dtype=torch.float64)

    def bend(z):
        return flow(z, context)[0]

    _, log_det = flow(z, context)
    assert log_det.shape == z.shape
    jacobian = torch.autograd.functional.jacobian(bend, z)
    for i in range(2):
        assert not jacobian[i, :, :, :, 1 - i].any()  # images do not see each other
        # in raster order of the pixels, in each the latents
        j = jacobian[i, :, :, :, i].permute(1, 2, 0, 4, 5, 3).reshape(27, 27)
        j = j.flip(0, 1) if turned else j
        assert not j.triu(1).any()
        assert j.tril(-1).count_nonzero() == 3 * 9 + 9 * 20  # of a pixel, and 20 pairs of pixels
        assert torch.linalg.slogdet(j)[1].item() == pytest.approx(log_det[i].sum().item(), rel=1e-9)


@both_directions
def test_context_acts_at_its_own_pixel(turned):
    """Where the pixels are turned, it must be turned with them."""
    flow = random_flow(turned)
    z = randn(1, 3, 3, 3)

    def bend(context):
        return flow(z, context)[0].sum((0, 1)).flatten()

    jacobian = torch.autograd.functional.jacobian(bend, randn(1, 5, 3, 3, seed=2))
    by_pixel = jacobian.abs().sum((1, 2)).flatten(1)
    assert torch.equal(by_pixel > 0, torch.eye(9, dtype=torch.bool))


@both_directions
def test_flow_bends_by_no_more_than_e_squared(turned):
    """So that no draw explodes: |a| < 2."""
    flow = random_flow(turned)
    _, log_det = flow(99 * randn(2, 3, 3, 3), 99 * randn(2, 5, 3, 3))
    assert 1.9 < log_det.abs().max() <= 2


@pytest.mark.parametrize("flows", [0, 1, 2])
def test_a_second_flow_turns_so_that_pixels_hang_together_both_ways(flows):
    net = network(flows=flows, groups=(1,), latents=1, image_size=4)
    features = net.encode(nvae.scaled(images(1, size=4)))

    def latents(eps):
        _, draws = net.infer(features, [eps])
        return draws[0].z

    eps = randn(1, 1, 2, 2)
    jacobian = torch.autograd.functional.jacobian(latents, eps).reshape(4, 4)
    ones = torch.ones(4, 4)
    due = [torch.eye(4), ones.tril(), ones][flows]
    assert torch.equal(jacobian != 0, due.bool())


@both_kinds_of_flow
@pytest.mark.parametrize("seed", range(3))
def test_log_ratio_is_that_of_densities_found_from_the_jacobian(flows, seed):
    """ln q(z|x) by a change of variables from eps to the latents of all groups."""
    net = network(flows=flows, groups=(1, 1), latents=2, image_size=4).double()
    x = nvae.scaled(images(1, size=4)).double()
    eps = tuple(part.double() for part in net.noise(1, gen(seed)))

    def latents(*eps):
        _, draws = net(x, eps)
        return torch.cat([draw.z.flatten() for draw in draws])

    jacobian = torch.autograd.functional.jacobian(latents, eps)
    jacobian = torch.cat([part.flatten(1) for part in jacobian], dim=1)
    assert jacobian.shape == (10, 10)
    log_q = sum(Normal(0.0, 1.0).log_prob(part).sum() for part in eps)
    log_q = log_q - torch.linalg.slogdet(jacobian)[1]
    _, draws = net(x, eps)
    log_p = sum(draw.p.log_prob(draw.z).sum() for draw in draws)
    due = (log_q - log_p).item()
    assert total_log_ratio(draws).item() == pytest.approx(due, abs=1e-4)
    if flows:
        assert not torch.allclose(draws[0].z, draws[0].z_before_flows, atol=0.01)
        assert total_kl(draws).item() == pytest.approx(due, abs=1e-4)


@both_kinds_of_flow
@torch.no_grad()
def test_kl_over_many_draws_is_that_of_distributions(flows):
    """KL = mean of ln q/p, 1 = mean of p/q: where ln q/p is not one of densities, they are off."""
    net = network(flows=flows, groups=(1,), latents=2, image_size=4)
    x = nvae.scaled(images(1, size=4))
    n = 40_000
    features = [feature.expand(n, -1, -1, -1) for feature in net.encode(x)]
    _, draws = net.infer(features, net.noise(n, gen()))
    log_ratio = total_log_ratio(draws).double()
    kl = total_kl(draws).double()
    assert log_ratio.mean().item() > 0.05
    assert kl.mean().item() == pytest.approx(log_ratio.mean().item(), abs=0.03)
    assert (-log_ratio).exp().mean().item() == pytest.approx(1, abs=0.1)


# ---------------------------------------------------------------------------------------- network


@both_kinds_of_flow
def test_posterior_is_the_prior_at_first(flows):
    net = network(fresh=True, flows=flows)
    x = nvae.scaled(images(2))
    _, draws = net(x, net.noise(2, gen()))
    for draw in draws:
        assert not draw.p.loc.any()
        assert torch.allclose(draw.p.scale, torch.tensor(1.01))
        assert torch.equal(draw.p.loc, draw.q.loc)
        assert torch.equal(draw.p.scale, draw.q.scale)
    assert not nvae.elbo(net, x, gen())[1].any()


@both_kinds_of_flow
def test_paths_coincide_where_the_posterior_is_the_prior(flows):
    """Training and sampling differ in nothing but where z comes from; q is told relative to p."""
    net = network(fresh=True, flows=flows)
    x = nvae.scaled(images(2))
    eps = net.noise(2, gen(3))
    _, draws = net(x, eps)
    parameters = list(net.parameters())
    of_p = sum(draw.p.loc.sum() + draw.p.scale.sum() for draw in draws)
    grads = torch.autograd.grad(of_p, parameters, allow_unused=True)
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is not None and grad.any():  # what reads p, but not yet what q alone hangs on
            nn.init.normal_(parameter.data, std=0.2)
    logits, draws = net(x, eps)
    sampled, drawn = net.generate(eps)
    assert torch.equal(logits, sampled)
    for draw, z in zip(draws, drawn, strict=True):
        assert torch.equal(draw.z, z)
        assert torch.equal(draw.p.loc, draw.q.loc)
        assert torch.equal(draw.p.scale, draw.q.scale)
        assert draw.p.loc.abs().max() > 0.1


@both_kinds_of_flow
def test_the_image_reaches_the_output_through_z_alone(flows):
    net = network(flows=flows)
    x = nvae.scaled(images(2)).requires_grad_()
    logits, draws = net(x, net.noise(2, gen()))
    (grad,) = torch.autograd.grad(logits.square().sum(), x, retain_graph=True)
    assert grad.any()
    z = [draw.z.detach() for draw in draws]
    from_z, kept = net.generate(net.noise(2, gen(9)), given=z)
    assert torch.allclose(from_z, logits, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(kept, z, strict=True))
    features = [part.detach().requires_grad_() for part in net.encode(x)]
    _, draws = net.infer(features, net.noise(2, gen()))
    for draw, feature in zip(draws, features, strict=True):  # its own, not only the z before
        for part in draw.q.loc, draw.q.scale:
            (grad,) = torch.autograd.grad(part.sum(), feature, retain_graph=True)
            assert grad.any()
    others = [torch.randn_like(part) for part in z]
    assert not torch.allclose(net.generate(net.noise(2, gen(9)), given=others)[0], logits, atol=0.1)


def test_features_go_from_coarse_to_fine_and_from_deep_to_shallow():
    net = network(groups=(3, 2))
    weights = list(net.parameters())
    features = net.encode(nvae.scaled(images(2)))
    assert [feature.shape[-1] for feature in features] == [4, 4, 8, 8, 8]
    depths = []
    for feature in features:
        grads = torch.autograd.grad(feature.sum(), weights, retain_graph=True, allow_unused=True)
        depths.append(sum(grad is not None for grad in grads))
    assert depths == sorted(set(depths), reverse=True)


def test_given_latents_are_kept_and_the_others_drawn():
    net = network()
    eps = net.noise(2, gen(1))
    _, z = net.generate(net.noise(2, gen()))
    _, drawn = net.generate(eps)
    for known in range(5):
        _, again = net.generate(eps, given=z[:known])
        same = [torch.equal(a, b) for a, b in zip(z, again, strict=True)]
        assert same == [i < known for i in range(4)]
        if 0 < known < 4:  # drawn in view of those given
            assert not torch.equal(again[known], drawn[known])


@both_kinds_of_flow
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_temperature_narrows_every_prior(flows, temperature):
    """z_i = mu + temperature sigma eps, of the p that training knows at the same z before."""
    net = network(flows=flows)
    eps = net.noise(2, gen(5))
    _, draws = net(nvae.scaled(images(2)), net.noise(2, gen()))
    z = [draw.z for draw in draws]
    for i, draw in enumerate(draws):
        _, drawn = net.generate(eps, temperature, given=z[:i])
        due = draw.p.loc + temperature * draw.p.scale * eps[i]
        assert torch.allclose(drawn[i], due, atol=1e-5)
        assert draw.p.loc.abs().max() > 0.01


def test_temperature_cannot_reach_the_kl():
    net = network()
    assert "temperature" in inspect.signature(net.generate).parameters
    for function in net.infer, net.forward, nvae.elbo, nvae.iw_bound, nvae.test_bound:
        assert "temperature" not in inspect.signature(function).parameters


@pytest.mark.parametrize("expand", [0, 2])
def test_every_layer_matters(expand):
    net = network(flows=1, expand=expand).train()
    assert isinstance(net.start, nn.Parameter)
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.ones_(layer.bias)  # so that no ReLU of a gate happens to be always 0
    reconstruction, kl = nvae.elbo(net, nvae.scaled(images(4)), gen())
    (reconstruction.mean() + kl.sum((1, 2)).mean()).backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


GROUPS = [(2,), (1, 1), (1, 2, 1), (1, 1, 1, 1), (0, 2), (2, 0), (1, 0, 0, 1)]


@pytest.mark.parametrize("expand", [0, 1])
@pytest.mark.parametrize("groups", GROUPS)
def test_shapes_of_groups_and_images(groups, expand):
    net = network(groups=groups, cells=2, outer=2, expand=expand)
    x = nvae.scaled(images(2))
    features = net.encode(x)
    eps = net.noise(2, gen())
    logits, draws = net.infer(features, eps)
    assert logits.shape == (2, 100, 16, 16)
    assert len(draws) == len(features) == len(eps) == len(net.alpha) == sum(groups)
    sizes = []
    for level in reversed(range(len(groups))):
        sizes += [8 >> level] * groups[level]
    for feature, part, draw, size in zip(features, eps, draws, sizes, strict=True):
        assert feature.shape == (2, 8, size, size)
        assert part.shape == draw.z.shape == draw.kl().shape == (2, 3, size, size)
    sampled, z = net.generate(eps)
    assert sampled.shape == logits.shape
    assert [part.shape for part in z] == [part.shape for part in eps]
    assert nvae.dmol_sample(logits, generator=gen()).shape == x.shape


def test_noise_is_normal_and_fixed_by_its_generator():
    net = network()
    eps = net.noise(2000, gen())
    for part in eps:
        assert part.mean().item() == pytest.approx(0, abs=0.02)
        assert part.std().item() == pytest.approx(1, abs=0.02)
    assert all(torch.equal(a, b) for a, b in zip(eps, net.noise(2000, gen()), strict=True))
    assert not torch.equal(eps[0], eps[1])


@pytest.mark.parametrize("expand", [0, 1, 2, 3, 6])
def test_depthwise_convolutions_have_expand_times_the_channels(expand):
    """Half of that at full resolution, but not less than as many; without any, cells are dense."""
    net = network(groups=(2,), outer=2, expand=expand)

    def depthwise(part):
        convolutions = [layer for layer in part.modules() if isinstance(layer, nn.Conv2d)]
        return [len(layer.weight) for layer in convolutions if layer.groups > 1]

    assert depthwise(net.encoder) == depthwise(net.stem) == []
    outer = {0: 0, 1: 1, 2: 1, 3: 1, 6: 3}[expand]
    half, full = 8, 4  # channels
    due = [expand * half], [outer * half, outer * full]  # the first at full size begins at half
    if expand == 0:
        due = [], []
    assert (depthwise(net.groups), depthwise(net.out)) == due
    for cells in net.groups[1].cells, net.out:
        cell = cells[0]
        assert isinstance(cell, nvae.Cell)
        assert sum(isinstance(layer, nn.Conv2d) for layer in cell.body.modules()) == 3 - (
            not expand
        )


@pytest.mark.parametrize("mults", [(1, 2, 3), (2, 1, 3), (2, 3)])
def test_widths_of_scales(mults):
    """The last of mults serves all lower resolutions."""
    net = network(groups=(1, 1, 1), mults=mults, outer=2)
    x = nvae.scaled(images(2))
    full, half, quarter, eighth = (4 * mults[min(level, len(mults) - 1)] for level in range(4))
    shapes = [tuple(feature.shape[1:]) for feature in net.encode(x)]
    assert shapes == [(eighth, 2, 2), (quarter, 4, 4), (half, 8, 8)]
    assert net.start.shape == (1, eighth, 2, 2)
    assert {len(layer.weight) for layer in convolutions(net)} >= {full, half, quarter, eighth}
    reconstruction, kl = nvae.elbo(net, x, gen())
    assert reconstruction.isfinite().all()
    assert kl.shape == (2, 3, 3)


@pytest.mark.parametrize("channels, per_logistic", [(1, 3), (2, 6), (3, 10)])
def test_mixtures_have_a_weight_means_scales_and_coefficients(channels, per_logistic):
    net = network(mixtures=2, channels=channels)
    x = nvae.scaled(images(2, channels=channels))
    logits, _ = net(x, net.noise(2, gen()))
    assert logits.shape == (2, 2 * per_logistic, 16, 16)
    assert nvae.elbo(net, x, gen())[0].isfinite().all()
    assert nvae.dmol_mean(logits, channels).shape == x.shape
    assert nvae.dmol_sample(logits, channels=channels).shape == x.shape


def test_images_of_a_batch_do_not_see_each_other():
    net = network(flows=1).train()
    x = nvae.scaled(images(3))
    eps = net.noise(3, gen())
    together, draws = net(x, eps)
    for i in range(3):
        alone, draws_alone = net(x[i : i + 1], [part[i : i + 1] for part in eps])
        assert torch.allclose(alone, together[i : i + 1], atol=1e-4)
        for a, b in zip(draws_alone, draws, strict=True):
            assert torch.allclose(a.kl(), b.kl()[i : i + 1], atol=1e-4)


@pytest.mark.parametrize("growth", [3, 10, 30])
def test_no_z_makes_the_next_ones_explode(growth):
    """However much layers amplify what they see, as once in training for one image in 25,000."""
    net = network(groups=(3, 3), residual=1.0)
    for layer in convolutions(net):
        layer.weight.data *= growth
    x = nvae.scaled(images(4))
    _, draws = net(x, net.noise(4, gen()))
    largest = max(eps.abs().max() for eps in net.noise(4, gen()))
    assert max(draw.z.abs().max() for draw in draws) < 5 + 7.4 * largest
    reconstruction, kl = nvae.elbo(net, x, gen())
    loss = reconstruction.sum() + kl.sum()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def test_bf16_stays_inside_the_network():
    """Its spacing at 8192 nats is 32."""
    net = network(amp=True, flows=1)
    x = nvae.scaled(images(2))
    assert net.encode(x)[0].dtype == torch.bfloat16  # so there is something to keep out
    logits, draws = net(x, net.noise(2, gen()))
    sampled, z = net.generate(net.noise(2, gen()))
    seen = [logits, sampled, *z, *nvae.elbo(net, x, gen()), nvae.dmol_log_prob(logits, x)]
    seen += [nvae.Spectral(net)(), nvae.iw_bound(net, x, 2, gen())]
    for draw in draws:
        seen += [draw.z, draw.z_before_flows, draw.log_det, draw.kl(), draw.log_ratio()]
        seen += [draw.p.loc, draw.p.scale, draw.q.loc, draw.q.scale]
    assert {term.dtype for term in seen} == {torch.float32}
    for normal in draws[1].p, draws[1].q:  # the clamp is computed in fp32, not only stored in it
        assert not torch.equal(normal.scale, normal.scale.to(torch.bfloat16).float())
    assert not torch.equal(draws[1].z, draws[1].z.to(torch.bfloat16).float())


def test_flows_in_bf16_have_the_determinant_of_what_they_do():
    """ln |dz / deps| of one latent in fp32, where exp(a) in bf16 is off by up to 0.004."""
    net = network(amp=True, flows=2, groups=(1,), latents=1, image_size=2)
    eps = randn(50, 1, 1, 1).requires_grad_()
    _, draws = net(nvae.scaled(images(50, size=2)), [eps])
    (slope,) = torch.autograd.grad(draws[0].z.sum(), eps)
    assert draws[0].log_det.abs().mean() > 0.01
    assert torch.allclose(slope.log(), draws[0].q.scale.log() + draws[0].log_det, atol=1e-5)


@pytest.mark.parametrize("residual", [0.1, 0.7])
def test_what_cells_add_is_gated_and_scaled(residual):
    """skip + residual gate body, where a gate sees the means of all channels and no pixel."""
    torch.manual_seed(0)
    skip = nn.Conv2d(5, 5, 1)
    cell = nvae.Cell(skip, nn.Identity(), 5, residual)

    def gate(x):
        return (cell(x) - skip(x)) / residual / x

    x = randn(2, 5, 4, 4)
    found = gate(x)
    assert ((found > 0) & (found < 1)).all()
    assert torch.allclose(found, found.mean((2, 3), keepdim=True).expand_as(x), atol=1e-3)
    redder = x.clone()
    redder[:, 0] += 3
    changed = (gate(redder) - found).abs().mean((0, 2, 3))
    assert (changed > 0.01).sum() > 1


def test_residual_reaches_every_cell():
    cells = [layer for layer in network(residual=0.7).modules() if isinstance(layer, nvae.Cell)]
    assert {cell.residual for cell in cells} == {0.7}


@pytest.mark.parametrize("channels, size, groups", [(1, 28, (2, 1)), (3, 64, (1, 1)), (1, 6, (1,))])
def test_networks_of_other_images_train_and_sample(channels, size, groups):
    options = {"channels": channels, "image_size": size, "groups": groups, "mixtures": 2}
    net = network(fresh=True, **options).train()
    x = images(4, channels=channels, size=size)
    spectral = nvae.Spectral(net)
    optimizer = torch.optim.Adamax(net.parameters(), 1e-2)
    before = [parameter.clone() for parameter in net.parameters()]
    terms = nvae.training_step(net, spectral, [optimizer], x, generator=gen())
    assert all(value.isfinite() for value in terms.values())
    assert 1 < terms["train loss"] < 30
    assert any((a != b).any() for a, b in zip(before, net.parameters(), strict=True))
    drawn = nvae.sample(net, 3, 0.7, 0.7, gen())
    assert drawn.shape == (3, channels, size, size)
    assert drawn.dtype == torch.uint8
    assert math.isfinite(bound(net, x))
    assert nvae.iw_bound(net, nvae.scaled(x), 2, gen()).shape == (4,)


@pytest.mark.parametrize(
    "size, groups", [(28, (1, 1, 1)), (30, (1, 1)), (31, (2,)), (32, (1,) * 6)]
)
def test_a_size_that_cannot_be_halved_is_an_error(size, groups):
    with pytest.raises(ValueError, match=rf"{size} .*halved {len(groups)} times"):
        network(image_size=size, groups=groups)
    network(image_size=2 ** len(groups), groups=groups)


@pytest.mark.parametrize("groups", [(), (0,), (0, 0)])
def test_a_network_without_groups_is_an_error(groups):
    with pytest.raises(ValueError, match="group"):
        network(groups=groups)


def count_parameters(net):
    return sum(parameter.numel() for parameter in net.parameters())


def test_sizes_of_the_default_and_the_paper_s_network():
    with torch.device("meta"):
        default = nvae.NVAE()
        paper = nvae.NVAE(width=128, groups=(30,), cells=2, flows=2, expand=6)
    assert 13e6 < count_parameters(default) < 15e6
    assert default.latent_shapes == [(20, 8, 8)] * 8 + [(20, 16, 16)] * 12
    assert 120e6 < count_parameters(paper) < 136e6
    assert paper.latent_shapes == [(20, 16, 16)] * 30
    assert paper.start.shape == (1, 256, 16, 16)


def test_flags_have_the_network_s_names_and_defaults():
    parameters = inspect.signature(nvae.NVAE).parameters
    args = nvae.make_parser().parse_args([])
    for flag in nvae.NETWORK_FLAGS:
        default = parameters[flag].default
        assert getattr(args, flag) == (list(default) if isinstance(default, tuple) else default)


# ---------------------------------------------------------------------------------------- samples


def test_samples_are_of_the_temperatures_of_latents_and_of_pixels():
    net = network()
    one = nvae.sample(net, 4, 0.7, 1.0, gen())
    assert one.dtype == torch.uint8
    logits, _ = net.generate(net.noise(4, gen()), 0.7)  # the same latents
    middle = nvae.quantise(nvae.dmol_sample(logits, 1e-3, gen())).float()
    closer = nvae.sample(net, 4, 0.7, 0.1, gen())
    assert (closer - middle).abs().mean() < 0.5 * (one - middle).abs().mean()
    generator = gen()
    logits, _ = net.generate(net.noise(4, generator), 0.7)
    due = nvae.quantise(nvae.dmol_sample(logits, 1.0, generator))
    assert torch.equal(one, due)
    assert not torch.equal(nvae.sample(net, 4, 0.3, 1.0, gen()), one)


# --------------------------------------------------------------------------------------- training


def watch_grad_mode(net):
    """The list of whether gradients were on, at each call of a layer of net or of its copies."""
    modes = []

    def keep(layer, args):
        modes.append(torch.is_grad_enabled())

    for layer in convolutions(net):
        layer.register_forward_pre_hook(keep)
    return modes


def test_only_training_keeps_what_gradients_need():
    net = network()
    x = images(4)
    modes = watch_grad_mode(net)
    nvae.sample(net, 2)
    nvae.iw_bound(net, nvae.scaled(x), 2)
    nvae.test_bound(net, x)
    assert len(modes) > 3 * 10
    assert not any(modes)
    assert torch.is_grad_enabled()
    modes.clear()
    nvae.elbo(net, nvae.scaled(x))
    assert all(modes)
    assert nvae.iw_bound(net, nvae.scaled(x), 1).requires_grad is False


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_a_training_step_descends_the_loss_and_reports_its_terms(beta):
    net = network(flows=1).train()
    spectral = nvae.Spectral(net)
    net_before, spectral_before = copy.deepcopy((net, spectral))
    x = images(8)
    optimizer = torch.optim.SGD(net.parameters(), 1e-5)
    for parameter in net.parameters():  # left by a step before
        parameter.grad = torch.full_like(parameter, 1e6)
    terms = nvae.training_step(net, spectral, [optimizer], x, beta, 50.0, gen())
    reconstruction, kl = nvae.elbo(net_before, nvae.scaled(x), gen())
    regulariser = 50.0 * spectral_before()
    balanced = nvae.kl_loss(kl.sum(2), beta, net.alpha)
    (reconstruction.mean() + balanced + regulariser).backward()
    for before, after in zip(net_before.parameters(), net.parameters(), strict=True):
        moved = (before - after).detach()
        assert torch.allclose(moved, 1e-5 * before.grad, rtol=1e-2, atol=1e-6)
    due = {
        "train loss": reconstruction.mean() + kl.sum((1, 2)).mean(),
        "reconstruction": reconstruction.mean(),
        "kl": kl.sum((1, 2)).mean(),
        "regulariser": regulariser,
    }
    assert terms.keys() == due.keys()
    for name, value in terms.items():
        assert not value.requires_grad
        nats = value.item() * 768 * math.log(2)
        assert nats == pytest.approx(due[name].item(), rel=1e-4)


@pytest.mark.parametrize("expand", [0, 2])
@pytest.mark.parametrize("size", [16, 64])
def test_a_step_lowers_the_loss(size, expand):
    net = network(fresh=True, expand=expand).train()
    x = (images(8) // 4 + 90).repeat(size // 8, 1, 1, 1)
    spectral = nvae.Spectral(net)
    optimizers = nvae.make_optimizers(net)
    losses = []
    for _ in range(6):
        terms = nvae.training_step(net, spectral, optimizers, x, generator=gen())
        losses.append(terms["train loss"].item())
    assert losses[-1] < losses[0] - 0.2
    assert all(math.isfinite(loss) for loss in losses)


def test_every_kind_of_cell_is_compiled(monkeypatch):
    """Three resolutions have nine kinds, and the compiler by itself gives up after eight."""
    from torch._dynamo.utils import counters

    def without_code(self):
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", without_code)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    torch._dynamo.reset()
    counters.clear()
    net = network(width=4, mults=(1, 2, 3), groups=(2, 2, 2), image_size=32).train()
    x = torch.rand(2, 3, 32, 32)
    nvae.compile_cells(net)
    net(x, net.noise(2))
    frames = counters["frames"]
    torch._dynamo.reset()
    assert frames["total"] == frames["ok"] > 8


def test_gradients_of_the_likelihood_at_the_edges():
    """The outer bins reach infinitely far, where a careless gradient would be infinity times 0."""
    x = nvae.scaled(torch.tensor([0, 1, 127, 254, 255], dtype=torch.double))
    x = x.expand(1, 3, 1, 5)
    logits = randn(1, 2 * nvae.logits_per_logistic(3), 1, 5, dtype=torch.double)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: nvae.dmol_log_prob(logits, x), logits)


def test_recorded_steps_train_as_steps_do(recording):
    """Six of them: three as they are, one that is recorded, and two more."""
    device, wrap = recording
    start = network().train().to(device)
    nets = copy.deepcopy(start), copy.deepcopy(start)
    outputs = []
    for net, is_recorded in zip(nets, [True, False], strict=True):
        spectral = nvae.Spectral(net, iterations=200)  # so that it hardly matters how u began
        optimizers = nvae.make_optimizers(net)
        generator = torch.Generator(device).manual_seed(0)
        parts = net, spectral, optimizers, generator
        step = recorded_step(*parts, wrap) if is_recorded else plain_step(*parts)
        terms = []
        for i in range(6):
            x = images(8, seed=i).to(device)
            values = step(x, 0.01 / (i + 1), min(1.0, 0.25 * i)).values()
            terms.append(torch.stack(list(values)))
        outputs.append(torch.stack(terms))
    close = 1e-3 if device == "cpu" else 5e-2
    assert torch.allclose(*outputs, rtol=close, atol=close)
    weights = [nn.utils.parameters_to_vector(net.parameters()) for net in (start, *nets)]
    assert (weights[1] - weights[2]).norm() < close * (weights[2] - weights[0]).norm()


def plain_step(net, spectral, optimizers, generator):
    """As in train()."""

    def step(batch, rate, beta):
        nvae.set_rate(optimizers, rate)
        return nvae.training_step(net, spectral, optimizers, batch, beta, 1e-2, generator)

    return step


def recorded_step(net, spectral, optimizers, generator, wrap):
    step = plain_step(net, spectral, optimizers, generator)
    return nvae.record_step(wrap(step), optimizers, generator)
