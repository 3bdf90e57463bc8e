"""ncsn.py's loss, samplers, likelihood and network, against densities known in closed form."""

import math

import pytest
import torch

import ncsn
from ncsn import SIGMA_MIN


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_bytes(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


class GaussianNet:
    """In the place of a Denoiser: the exact denoiser of images from N(mean, s^2 I)."""

    def __init__(self, s, sigma_data=0.5, sigma_max=80.0, mean=0.0):
        self.s = s
        self.mean = mean
        self.sigma_data = sigma_data
        self.sigma_max = sigma_max

    def __call__(self, y, sigma):
        sigma = torch.as_tensor(sigma).reshape(-1, 1, 1, 1)
        return self.mean + (y - self.mean) * (self.s**2 / (self.s**2 + sigma**2))

    def score(self, y, sigma):
        return (self.mean - y) / (self.s**2 + sigma**2)


def network(**options):
    """A small Denoiser whose layers that start at zero are random."""
    torch.manual_seed(0)
    net = ncsn.Denoiser((3, 8, 8), 0.5, 80.0, width=8, mults=(1, 2), blocks=1, **options)
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.2)
    return net.requires_grad_(False)


# ----------------------------------------------------------------------------------- bytes, floats


def test_every_byte_survives_the_largest_draws(monkeypatch):
    """In float32, 255 + u can round to 256: here with each of the 512 largest u below 1."""
    largest = 1 - torch.arange(1, 513) * 2.0**-24
    images = torch.arange(256, dtype=torch.uint8).repeat_interleave(512)
    monkeypatch.setattr(torch, "rand", lambda shape, device: largest.repeat(256))
    x = ncsn.dequantise(images)
    assert x.max() < 1
    assert torch.equal(ncsn.quantise(x), images)


def test_a_byte_becomes_a_uniform_draw_from_its_bin():
    torch.manual_seed(0)
    u = (ncsn.dequantise(torch.full((200_000,), 77, dtype=torch.uint8)) + 1) * 128 - 77
    assert u.min() >= 0
    assert u.mean().item() == pytest.approx(1 / 2, abs=3e-3)
    assert u.std().item() / 128 == pytest.approx(SIGMA_MIN, rel=5e-3)


@pytest.mark.parametrize("images", [torch.rand(2, 1, 4, 4), torch.zeros(2, 1, 4, 4).int()])
def test_only_bytes_are_images(images):
    for function in ncsn.dequantise, ncsn.measure:
        with pytest.raises(ValueError, match="uint8"):
            function(images)


# ----------------------------------------------------------------------------------- measure, sigma


def test_measure_finds_the_root_mean_square_and_the_farthest_pair_of_sorted_images():
    images = torch.cat([random_bytes(6000, 3, 2, 2) // 8, random_bytes(6000, 3, 2, 2) // 8 + 220])
    x = ((images.double() + 0.5) / 128 - 1).flatten(1)
    found = ncsn.measure(images)
    assert found["sigma_data"] == pytest.approx(x.square().mean().sqrt().item(), rel=1e-3)
    farthest = torch.cdist(x[:3000], x[-3000:]).max().item()
    assert found["sigma_max"] == pytest.approx(farthest, rel=0.02)


@pytest.mark.parametrize("byte", [0, 128, 255])
def test_images_that_are_alike_have_noise_levels_too(byte):
    found = ncsn.measure(torch.full((3, 1, 8, 8), byte, dtype=torch.uint8))
    distance_from_0 = max(abs((byte + 0.5) / 128 - 1) * 8, SIGMA_MIN)
    assert found["sigma_max"] == pytest.approx(distance_from_0, rel=0.5)
    assert found["sigma_max"] > SIGMA_MIN


def test_sigma_is_logistic_and_stratified():
    """The median is 0.6 sigma_data, ln sigma has scale 0.7; each of 1000 intervals has one draw."""
    net = GaussianNet(1.0, sigma_data=0.4, sigma_max=1e9)
    torch.manual_seed(0)
    sigma = ncsn.sample_sigma(net, torch.zeros(1000, 3)).double()
    place = 1000 / (1 + (0.6 * 0.4 / sigma) ** (1 / 0.7))
    order = place.argsort()
    assert not torch.equal(order, torch.arange(1000))
    within = place[order][20:] - torch.arange(20, 1000)  # smaller ones are clamped
    assert within.min() > -0.01 and within.max() < 1.01
    assert within.std().item() == pytest.approx(1 / math.sqrt(12), abs=0.02)
    assert abs(torch.corrcoef(torch.stack([place[:-1], place[1:]]))[0, 1]) < 0.1


def test_sigma_stays_between_its_ends():
    net = GaussianNet(1.0, sigma_data=0.5, sigma_max=3.0)
    draws = torch.cat([ncsn.sample_sigma(net, torch.zeros(64, 3)) for _ in range(50)])
    assert draws.min().item() == pytest.approx(SIGMA_MIN)
    assert draws.max().item() == pytest.approx(3.0)


# ----------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("sigma", [0.02, 0.3, 2.0, 40.0])
def test_loss_of_the_exact_denoiser_is_analytic_and_a_multiple_of_ncsns(sigma):
    """Sign of the score, scale of the noise, weight, the axes of the mean."""
    s = 0.7
    net = GaussianNet(s, sigma_data=0.4)
    x = s * randn(2000, 3, 4, 4)
    torch.manual_seed(5)
    loss = ncsn.denoising_loss(net, x, torch.full((2000,), sigma))
    weight = (sigma**2 + 0.4**2) / 0.4**2
    assert loss.shape == (2000,)
    assert loss.mean().item() == pytest.approx(weight * s**2 / (s**2 + sigma**2), rel=0.03)
    torch.manual_seed(5)
    z = torch.randn(2000, 3, 4, 4)  # the same; NCSN's loss is |sigma score + z|^2
    ncsns = (sigma * net.score(x + sigma * z, sigma) + z).double().square().mean((1, 2, 3))
    assert torch.allclose(loss.double(), weight * ncsns, rtol=5e-3)


def test_each_image_of_a_batch_has_its_own_sigma():
    x = 0.5 * randn(4, 3, 4, 4)
    sigma = torch.tensor([0.03, 0.4, 2.0, 50.0])
    net = GaussianNet(0.5, sigma_data=0.4)
    torch.manual_seed(5)
    loss = ncsn.denoising_loss(net, x, sigma)
    torch.manual_seed(5)
    z = torch.randn(4, 3, 4, 4)
    for i, level in enumerate(sigma.tolist()):
        error = (net(x[i] + level * z[i], level) - x[i]).double().square().mean().item()
        assert loss[i].item() == pytest.approx(error * (1 / level**2 + 1 / 0.4**2), rel=1e-4)


def test_a_fresh_network_has_loss_one_at_every_sigma():
    """A c_skip or c_out that does not fit the weight, a sigma_data that does not fit the images."""
    images = (50 + 40 * randn(200, 3, 8, 8)).clamp(0, 255).to(torch.uint8)
    found = ncsn.measure(images)
    net = ncsn.Denoiser(**found, width=8, mults=(1, 2), blocks=1).requires_grad_(False)
    for sigma in torch.logspace(math.log10(SIGMA_MIN), math.log10(found["sigma_max"]), 7):
        loss = ncsn.denoising_loss(net, ncsn.dequantise(images), sigma.expand(200))
        assert loss.mean().item() == pytest.approx(1, abs=0.04)


@pytest.mark.parametrize("sigma", [0.003, 0.5, 60.0])
def test_inputs_and_targets_of_the_network_have_mean_square_one(sigma):
    """For images of variance sigma_data^2, at every sigma: what preconditioning is for."""
    net = network()
    seen = {}

    def spy(x, ln_sigma):
        seen.update(x=x, ln_sigma=ln_sigma)
        return torch.zeros_like(x)

    net.unet.forward = spy
    x = 0.5 * randn(500, 3, 8, 8, seed=2)
    y = x + sigma * randn(500, 3, 8, 8, seed=3)
    c_skip_y = net(y, sigma)
    c_out = sigma * 0.5 / math.sqrt(sigma**2 + 0.25)
    assert seen["x"].square().mean().item() == pytest.approx(1, rel=0.02)
    assert ((x - c_skip_y) / c_out).square().mean().item() == pytest.approx(1, rel=0.02)
    assert seen["ln_sigma"].tolist() == pytest.approx([math.log(sigma)] * 500, rel=1e-5)


def test_score_is_tweedies_formula_and_sigma_may_be_a_number_or_a_batch():
    net = network()
    y = randn(2, 3, 8, 8)
    D = net(y, torch.tensor([0.3, 0.3]))
    assert torch.allclose(net.score(y, 0.3), (D - y) / 0.3**2)
    assert torch.allclose(net(y, 0.3), D)
    assert not torch.allclose(net(y, torch.tensor([0.3, 3.0]))[1], D[1])


# ----------------------------------------------------------------------------------------- samplers


def exact_flow(s, top):
    """The factor by which the probability flow of N(0, s^2 I) and the denoising change y."""
    return math.sqrt((s**2 + SIGMA_MIN**2) / (s**2 + top**2)) * s**2 / (s**2 + SIGMA_MIN**2)


def test_dpm_solver_is_of_second_order():
    z = randn(10, 3, 4, 4).double()
    due = 20 * z * exact_flow(0.5, 20)
    errors = []
    for count in 25, 49, 97:
        found = ncsn.dpm_solver(GaussianNet(0.5).score, z, 20.0, count)
        errors.append((found - due).abs().max().item())
    assert 3.2 < errors[0] / errors[1] < 5
    assert 3.2 < errors[1] / errors[2] < 5
    assert errors[2] < 0.02


def test_dpm_solver_follows_its_formula_down_the_levels_of_karras():
    ends = 80 ** (1 / 7), SIGMA_MIN ** (1 / 7)
    levels = [(ends[0] + i / 4 * (ends[1] - ends[0])) ** 7 for i in range(5)]
    net = GaussianNet(0.5, mean=0.2)
    z = randn(2, 3, 4, 4).double()
    y = 80 * z
    before = None
    for i in range(4):
        s = levels[i]
        t = levels[i + 1]
        D = net(y, s)
        trend = 0
        if i > 0:
            r = math.log(levels[i - 1] / s) / math.log(s / t)
            trend = (D - before) / (2 * r)
        y = t / s * y + (1 - t / s) * (D + trend)
        before = D
    assert torch.allclose(ncsn.dpm_solver(net.score, z, 80.0, 5), net(y, levels[4]), rtol=1e-6)


@pytest.mark.parametrize("sampler, calls", [(ncsn.dpm_solver, 12), (ncsn.langevin, 549)])
def test_calls_and_noise_levels_of_a_sample_of_cifar10s_size(sampler, calls):
    sigmas = []

    def score(y, sigma):
        sigmas.append(sigma)
        return -y / (0.25 + sigma**2)

    sampler(score, randn(1, 3, 32, 32), 97.0)
    assert len(sigmas) == pytest.approx(calls, abs=4)
    assert sigmas == sorted(sigmas, reverse=True)
    assert sigmas[0] == pytest.approx(97.0)
    assert sigmas[-1] == pytest.approx(SIGMA_MIN)
    assert {type(sigma) for sigma in sigmas} == {float}


def overlap(gamma, dim):
    """How much of the sphere of sigma lies within 3 standard deviations of that of gamma sigma."""

    def cdf(t):
        return (1 + math.erf(t / math.sqrt(2))) / 2

    distance = math.sqrt(2 * dim) * (gamma - 1)
    return cdf(distance + 3 * gamma) - cdf(distance - 3 * gamma)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 8, 8), (1, 4, 4)])
def test_spheres_of_langevins_levels_overlap_by_one_half(shape):
    sigmas = []

    def score(y, sigma):
        sigmas.append(sigma)
        return -y / sigma**2

    ncsn.langevin(score, randn(1, *shape), 40.0)
    levels = sorted(set(sigmas[:-1]), reverse=True)  # the last call is the denoising
    gamma = levels[0] / levels[1]
    assert levels == pytest.approx([40.0 / gamma**i for i in range(len(levels))], rel=1e-3)
    fewer = (40.0 / SIGMA_MIN) ** (1 / (len(levels) - 2))
    dim = math.prod(shape)
    assert overlap(gamma, dim) >= 0.5 > overlap(fewer, dim) - 0.01


@pytest.mark.parametrize("shape", [(3, 64, 64), (3, 32, 32), (1, 28, 28), (3, 8, 8), (1, 4, 4)])
@pytest.mark.parametrize("s", [0.1, 0.5, 3.0])
def test_langevin_gives_gaussians_their_std_at_any_size(shape, s):
    """Noise, lag and step size in balance: by the papers' rule it is 7 % too large for CIFAR-10."""
    torch.manual_seed(0)
    z = torch.randn(math.ceil(60_000 / math.prod(shape)), *shape)
    x = ncsn.langevin(GaussianNet(s, mean=0.4).score, z, 60.0)
    assert x.mean().item() == pytest.approx(0.4, abs=0.02 * s)
    assert x.std().item() == pytest.approx(s, rel=0.016)


@pytest.mark.parametrize("guidance", [0, 1, 1.8])
def test_autoguidance_extrapolates_scores_of_gaussians(guidance):
    guide, net = GaussianNet(2.0), GaussianNet(0.5)
    y = randn(5, 3, 4, 4)
    precision = guidance / (0.5**2 + 0.7**2) + (1 - guidance) / (2.0**2 + 0.7**2)
    score = ncsn.autoguided(net.score, guide.score, guidance)
    assert torch.allclose(score(y, 0.7), -precision * y, atol=1e-5)


def test_ideal_score_is_that_of_the_mixture_of_training_images():
    """Against automatic differentiation of the log density, in float64."""
    images = random_bytes(6, 1, 3, 3)
    x = ((images.double() + 0.5) / 128 - 1).flatten(1)
    for sigma in 0.1, 0.7, 5.0:
        y = (x[:4] + sigma * randn(4, 9).double()).requires_grad_()
        log_p = torch.logsumexp(-(y[:, None] - x).square().sum(2) / (2 * sigma**2), dim=1)
        (due,) = torch.autograd.grad(log_p.sum(), y)
        found = ncsn.ideal_score(images)(y.detach().float().view(4, 1, 3, 3), sigma)
        assert torch.allclose(found.flatten(1).double(), due, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", [ncsn.dpm_solver, ncsn.langevin])
def test_samples_of_the_ideal_score_are_the_training_images(sampler):
    images = random_bytes(8, 3, 8, 8)
    torch.manual_seed(0)
    x = ncsn.quantise(sampler(ncsn.ideal_score(images), randn(300, 3, 8, 8), 20.0))
    same = (x[:, None] == images).flatten(2).all(2)  # (300, 8)
    assert same.sum(1).eq(1).all()
    assert same.sum(0).min() >= 15
    assert same.sum(0).max() <= 75


# --------------------------------------------------------------------------------------- likelihood


@pytest.mark.parametrize("s", [0.3, 1.0])
def test_bits_per_dim_of_a_gaussian_is_its_entropy(s):
    """With the exact errors of its denoiser: the prior, the path and the noise at the end."""
    sigmas = torch.logspace(math.log10(SIGMA_MIN), 2, 33, dtype=torch.float64)
    errors = s**2 * sigmas**2 / (s**2 + sigmas**2)
    x = randn(4, 3, 16, 16).double()
    x = s * x / x.square().mean((1, 2, 3), keepdim=True).sqrt()
    bits = ncsn.bits_per_dim(x, sigmas, errors.expand(4, -1))
    entropy = math.log2(2 * math.pi * math.e * (s**2 + SIGMA_MIN**2)) / 2
    assert bits.tolist() == pytest.approx([7 + entropy] * 4, abs=1e-4)


def test_bits_per_dim_has_the_priors_term():
    sigmas = torch.logspace(math.log10(SIGMA_MIN), 0, 9)
    zeros = torch.zeros(1, 9)
    near = ncsn.bits_per_dim(torch.zeros(1, 1, 2, 2), sigmas, zeros)
    far = ncsn.bits_per_dim(torch.full((1, 1, 2, 2), 3.0), sigmas, zeros)
    assert (far - near).item() == pytest.approx(9 / 2 / math.log(2), rel=1e-5)


# ------------------------------------------------------------------------------------------ network


@pytest.mark.parametrize("mults, blocks", [((1,), 1), ((1, 2), 2), ((2, 1, 3), 1)])
def test_the_network_keeps_the_shape_and_uses_all_its_weights(mults, blocks):
    torch.manual_seed(0)
    net = ncsn.UNet(channels=2, width=4, mults=mults, blocks=blocks)
    torch.nn.init.normal_(net.out.weight)
    for block in [*net.down, net.middle, *net.up]:
        torch.nn.init.normal_(block.conv2.weight)
    out = net(randn(2, 2, 8, 12), torch.tensor([-1.0, 2.0]))
    assert out.shape == (2, 2, 8, 12)
    out.square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.any(), name


def test_the_network_depends_on_sigma_and_on_far_pixels():
    net = network().unet
    y = randn(1, 3, 8, 8)
    outs = [net(y, torch.tensor([ln_sigma])) for ln_sigma in (-6.0, -5.9, 0.0, 6.0)]
    for i, a in enumerate(outs):
        for b in outs[:i]:
            assert not torch.allclose(a, b, atol=1e-4)
    moved = y.clone()
    moved[0, 0, 0, 0] += 1
    assert (net(moved, torch.tensor([0.0])) - outs[2])[0, :, 7, 7].abs().max() > 0


def test_the_skip_connections_end_at_their_own_resolution():
    """Blocks on the way up see the output of their counterparts on the way down, the last first."""
    net = network().unet
    outputs = []
    seen = []
    for block in net.down:
        block.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    for block in net.up:
        block.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    pooled = []
    net.down[1].register_forward_hook(lambda _, inputs, output: pooled.append(inputs[0]))
    net(randn(1, 3, 8, 8), torch.tensor([0.0]))
    assert [h.shape[2] for h in seen] == [4, 8]
    for h, skip in zip(seen, reversed(outputs), strict=True):
        assert torch.equal(h[:, -skip.shape[1] :], skip)
    assert torch.equal(pooled[0], torch.nn.functional.avg_pool2d(outputs[0], 2))
    h = randn(1, 8, 4, 4)
    assert torch.allclose(ncsn.Block(8, 8, 32)(h, randn(1, 32)), h / math.sqrt(2))


def test_only_the_network_computes_in_bfloat16():
    types = []
    net = network(amp=True)
    net.unet.middle.conv1.register_forward_hook(
        lambda _, inputs, output: types.append(output.dtype)
    )
    y = randn(2, 3, 8, 8)
    D = net(y, 0.002)
    assert types == [torch.bfloat16]
    assert D.dtype == torch.float32
    assert (D - y).abs().max() < 0.01  # c_skip is nearly 1: y itself was not rounded
    net.amp = False
    net(y, 0.002)
    assert types[1] == torch.float32


def test_training_lowers_the_loss():
    images = random_bytes(64, 1, 1, 1).expand(64, 1, 8, 8)
    torch.manual_seed(0)
    net = ncsn.Denoiser(**ncsn.measure(images), width=8, mults=(1, 2), blocks=1)
    optimizers = ncsn.make_optimizers(net)
    losses = [ncsn.training_step(net, optimizers, images, 0.01).item() for _ in range(40)]
    assert losses[0] == pytest.approx(1, abs=0.05)
    assert sum(losses[-5:]) / 5 < 0.5


def test_gradients_are_cleared_and_clipped_before_the_step(monkeypatch):
    images = random_bytes(8, 1, 8, 8)
    net = ncsn.Denoiser(**ncsn.measure(images), width=8, mults=(1,), blocks=1)
    optimizers = ncsn.make_optimizers(net)
    for factor, due in (1e6, 1), (0, 0):
        monkeypatch.setattr(ncsn, "denoising_loss", lambda net, x, s, f=factor: f * net(x, s).sum())
        ncsn.training_step(net, optimizers, images, 0.01)
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        assert norm.item() == pytest.approx(due, rel=1e-3)
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [0.01, 0.001]
