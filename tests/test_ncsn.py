"""NCSN's mathematics and network, on the real functions, against densities known in closed form."""
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ncsn
from ncsn import SIGMA_MIN

SAMPLERS = [("langevin", None), ("consistent", 0.0), ("consistent", 1.0), ("heun", None)]
every_sampler = pytest.mark.parametrize("name, freshness", SAMPLERS)
torch.set_num_threads(1)  # on a busy machine many wait for each other

def gen(seed=0):
    return torch.Generator().manual_seed(seed)

def randn(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=gen(seed), dtype=dtype)

def ladder(top, bottom, count):
    return torch.logspace(math.log10(top), math.log10(bottom), count)

def run(name, freshness, score, x, levels, step=0.1, steps=4, **hook):
    if name == "langevin":
        return ncsn.langevin(score, x, levels, step, steps, gen(), **hook)
    if name == "consistent":
        return ncsn.consistent(score, x, levels, freshness, gen(), **hook)
    return ncsn.heun(score, x, levels.double(), **hook)

def record(chain):
    return lambda x, sigma: (chain.append((sigma.item(), x)), x)[1]

# Exact scores of data blurred with sigma.
def gaussian(s, mean=0.0):  # N(mean, s^2 I); s = 0 is a point mass
    return lambda x, sigma: (mean - x) / (s**2 + sigma**2)

def correlated(cov):  # N(0, cov) of the flattened pixels
    def score(x, sigma):
        precision = torch.linalg.inv(cov + sigma.double() ** 2 * torch.eye(len(cov))).to(x.dtype)
        return -(x.flatten(1) @ precision).reshape(x.shape)
    return score

def mixture(shift=0.0):  # 1/5 N(shift - 5, I) + 4/5 N(shift + 5, I), as in the 2019 paper
    def score(x, sigma):
        v, total = 1 + sigma**2, (x - shift).flatten(1).sum(1).reshape(-1, 1, 1, 1)
        return (shift - 5 + 10 * torch.sigmoid(math.log(4) + 10 * total / v) - x) / v
    return score

def points(images):  # each of the images with the same probability
    def score(x, sigma):
        square = (x.flatten(1)[:, None] - images.flatten(1)).square().sum(2)
        mean = (-square / (2 * sigma**2)).softmax(1).to(x.dtype) @ images.flatten(1)
        return (mean.reshape(x.shape) - x) / sigma**2
    return score

def first_mode(x, shift=0.0):
    return ((x - shift).flatten(1).sum(1) < 0).double().mean().item()

# ---- loss ----
@pytest.mark.parametrize("sigma", [0.02, 0.3, 2.0, 40.0])
def test_loss_of_the_exact_denoiser_is_analytic_and_a_multiple_of_ncsns(sigma):
    """Sign of the score, scale of the noise, weight, the axes of the average."""
    s, sigma_data, x, level = 0.7, 0.4, 0.7 * randn(2000, 3, 4, 4), torch.full((2000,), sigma)
    loss = ncsn.denoising_loss(lambda y, level: y * (s**2 / (s**2 + level**2))[:, None, None, None],
                               x, level, sigma_data, gen())
    ncsns = s**2 / (s**2 + sigma**2)  # E |sigma score + z|^2 / dim
    due = ncsns * (sigma**2 + sigma_data**2) / sigma_data**2
    assert loss.shape == (2000,) and loss.mean().item() == pytest.approx(due, rel=0.03)
    z = torch.randn(2000, 3, 4, 4, generator=gen()).double()  # the same, image by image
    same = (sigma * gaussian(s)(x + sigma * z, sigma) + z).square().mean((1, 2, 3))
    assert torch.allclose(loss.double() / due * ncsns, same, rtol=5e-3)

def test_fresh_network_has_loss_one_at_every_sigma():
    """sigma_data that does not fit the range of the images, c_skip that does not fit the weight."""
    images = (50 + 40 * randn(200, 3, 8, 8)).clamp(0, 255).to(torch.uint8)
    sigma_data, sigma_max = ncsn.measure(images)
    net = network(fresh=True, sigma_data=sigma_data, sigma_max=sigma_max)
    for sigma in ladder(sigma_max, SIGMA_MIN, 7):
        losses = [ncsn.denoising_loss(net, x, sigma.expand(200), sigma_data, gen()).mean().item()
                  for x in (ncsn.dequantise(images, gen(2)), images / 255)]
        assert losses[0] == pytest.approx(1, abs=0.04)
        assert sigma < 5 or not 0.7 < losses[1] < 1.4  # images in [0, 1] miss it

# ---- noise levels ----
def test_sigmas_are_stratified():
    """A batch has as many below any value as the distribution says, to within one or two."""
    many = ncsn.sample_sigma(100_000, 0.5, 80.0, generator=gen()).sort().values
    sigma = ncsn.sample_sigma(200, 0.5, 80.0, generator=gen(1))
    assert sigma.shape == (200,) and len(sigma.unique()) == 200
    due = torch.searchsorted(many, sigma.sort().values) / 500  # below each
    assert (due - torch.arange(200)).abs().max() < 2.1
    assert sigma.median().item() == pytest.approx(0.3, rel=0.15)
    focused = ncsn.sample_sigma(200, 0.5, 80.0, focus=2.0, generator=gen(1))
    assert focused.median().item() == pytest.approx(1.0, rel=0.15)

def test_sigmas_cover_the_whole_ladder_and_nothing_else():
    g = gen()
    draws = torch.stack([ncsn.sample_sigma(64, 0.5, 80.0, generator=g) for _ in range(200)])
    assert all(len(draw.unique()) == 64 for draw in draws)  # one sigma each, not one a batch
    assert draws.min() >= SIGMA_MIN * (1 - 1e-6) and draws.max() <= 80
    place = (draws / SIGMA_MIN).log() / math.log(80 / SIGMA_MIN)
    assert torch.histc(place, 10, 0, 1).min() > 10
    assert torch.equal(draws[0], ncsn.sample_sigma(64, 0.5, 80.0, generator=gen()))
    assert not torch.equal(draws[0], draws[1])

def clusters(*sizes):  # images about a grey of their own, the first cluster darkest
    greys = torch.linspace(40, 215, len(sizes)).repeat_interleave(torch.tensor(sizes))
    return (greys[:, None, None, None] + 10 * randn(sum(sizes), 3, 2, 2)).to(torch.uint8)

@pytest.mark.parametrize("images", [
    torch.randint(256, (300, 3, 4, 4), generator=gen(), dtype=torch.uint8),
    torch.randint(256, (2500, 1, 2, 2), generator=gen(), dtype=torch.uint8),
    clusters(2000, 400), clusters(500, 2000, 300), clusters(5000, 2500),
], ids=["few", "many", "a small cluster", "three clusters", "a large cluster"])
def test_measure_finds_the_root_mean_square_and_the_farthest_pair(images):
    x, (sigma_data, sigma_max) = images.double().flatten(1) / 127.5 - 1, ncsn.measure(images)
    assert sigma_data == pytest.approx(x.square().mean().sqrt().item(), rel=1e-4)
    assert sigma_max == pytest.approx(torch.cdist(x, x).max().item(), rel=1e-3)

def overlap(gamma, dim):
    d, phi = math.sqrt(2 * dim) * (gamma - 1), lambda t: (1 + math.erf(t / math.sqrt(2))) / 2
    return phi(d + 3 * gamma) - phi(d - 3 * gamma)

@pytest.mark.parametrize("dim, top, bottom", [(3072, 100, SIGMA_MIN), (192, 9, 1)])
def test_ladder_is_geometric_with_just_the_overlap_asked_for(dim, top, bottom):
    levels, step, steps = ncsn.make_ladder(top, dim, bottom)
    assert levels[[0, -1]].tolist() == pytest.approx([top, bottom], rel=1e-5)
    assert torch.allclose(levels, ladder(top, bottom, len(levels)), rtol=1e-5)
    gammas = [(top / bottom) ** (1 / (len(levels) - k)) for k in (1, 2)]  # this, one level less
    assert overlap(gammas[0], dim) >= 0.5 > overlap(gammas[1], dim)
    assert len(ncsn.make_ladder(top, dim, bottom, overlap=0.9)[0]) > len(levels)
    due = [ncsn.langevin_settings(gamma) for gamma in gammas]
    assert due[0][1] <= steps <= due[1][1] and step == pytest.approx(due[0][0], rel=0.1)

def test_cifar10s_ladder_has_the_published_settings():
    levels, _, steps = ncsn.make_ladder(50, 3072, 0.01)
    assert abs(len(levels) - 219) <= 1 and steps == 5
    assert len(ncsn.make_ladder(1, 3072, 0.01)[0]) > 100 and overlap(100 ** (1 / 9), 3072) < 1e-9
    gamma = 5000 ** (1 / 231)  # of the published 232 levels, where T = 4 comes to 1.0587 at best
    v, (step, steps) = gamma**2, ncsn.langevin_settings(gamma, excess=0.0586)
    assert steps == 5 and step * 0.01**2 == pytest.approx(6.18e-6, rel=0.01)
    for _ in range(5):
        v = v * (1 - step) ** 2 + 2 * step
    assert v == pytest.approx(1.0555, abs=2e-4) and ncsn.langevin_settings(gamma, 0.0589)[1] == 4

# ---- samplers ----
def test_langevin_follows_the_recursion_of_mean_and_variance():
    """a against a/2, clamps, a level's last step without noise, a step of another size."""
    s, m, start, levels, chain = 0.5, 0.3, 6 * randn(50, 3, 16, 16), ladder(6, 0.05, 23), []
    step, steps = ncsn.langevin_settings((levels[0] / levels[1]).item())
    ncsn.langevin(gaussian(s, m), start, levels, step, steps, gen(), record(chain))
    assert len(chain) == len(levels) * steps + 1 and chain[-1][0] == 0
    mean, v = start.mean().item(), start.var().item()
    for i, (sigma, x) in enumerate(chain[:-1]):
        assert sigma == levels[i // steps]
        a = step * sigma**2
        keep = 1 - a / (s**2 + sigma**2)
        mean, v = m + keep * (mean - m), keep**2 * v + 2 * a
        assert x.var().item() == pytest.approx(v, rel=0.03)
        assert abs(x.mean() - mean) < 0.03 * math.sqrt(v)
        if i % steps == steps - 1 and sigma > 1:  # that of blurred data
            assert v == pytest.approx(s**2 + sigma**2, rel=0.1)

@every_sampler
def test_final_denoising_leaves_no_noise_on_a_point_mass(name, freshness):
    chain, start = [], 5 * randn(50, 3, 4, 4)
    x = run(name, freshness, gaussian(0, 0.3), start, ladder(5, 0.1, 40), hook=record(chain))
    assert (x - 0.3).abs().max() < 1e-4 and torch.equal(x, chain[-1][1].float())
    assert chain[-2][1].std().item() == pytest.approx(0.1, rel=0.15)  # the last level's, until then

@every_sampler
def test_annealing_finds_the_weights_of_far_apart_modes(name, freshness):
    start, levels = 60 * randn(4000, 2, 1, 1), ladder(60, 0.1, 68)
    x = run(name, freshness, mixture(), start, levels, step=0.08, steps=56)
    assert first_mode(x) == pytest.approx(0.2, abs=0.03)
    assert (x.abs() - 5).std().item() == pytest.approx(1, abs=0.1)

def test_langevin_needs_annealing_and_then_reaches_modes_far_off_centre():
    start = 16 * torch.rand(2000, 2, 1, 1, generator=gen()) - 8
    assert first_mode(ncsn.langevin(mixture(), start, torch.tensor([0.1]), 5, 1000, gen())) > 0.35
    start, levels = 300 * randn(4000, 2, 1, 1), ladder(300, 0.5, 70)
    x = ncsn.langevin(mixture(30.0), start, levels, 0.08, 56, gen())
    assert first_mode(x, 30.0) == pytest.approx(0.2, abs=0.03)

@every_sampler
def test_sampling_eight_images_returns_those_eight(name, freshness):
    """From noise to images by sample(), its ladder included."""
    images = 2 * torch.rand(8, 3, 8, 8, generator=gen()) - 1
    flat = images.double().flatten(1)
    net = SimpleNamespace(score=points(images), sigma_max=torch.cdist(flat, flat).max().item())
    args = SimpleNamespace(sampler=name, freshness=freshness)
    x = ncsn.sample(args, net, randn(400, 3, 8, 8), gen())
    assert x.shape == (400, 3, 8, 8) and x.dtype == torch.float32
    distance, hit = torch.cdist(x.double().flatten(1), flat).min(1)
    assert distance.max() < 1e-4
    assert 20 <= hit.bincount(minlength=8).min() and hit.bincount().max() <= 90

def test_consistent_is_euler_at_one_end_and_ancestral_at_the_other():
    levels, score, g = ladder(10, 0.1, 12).double(), gaussian(0.5, 0.2), gen()
    euler = ancestral = start = 10 * randn(20, 3, 2, 2, dtype=torch.float64)
    flow, reverse = [], []
    run("consistent", 0.0, score, start, levels, hook=record(flow))
    run("consistent", 1.0, score, start, levels, hook=record(reverse))
    for i in range(11):
        (s, t), z = levels[i:i + 2], torch.randn(start.shape, generator=g)
        euler = euler + (t - s) * -s * score(euler, s)
        ancestral = ancestral + (s**2 - t**2) * score(ancestral, s) + t * (1 - t**2/s**2).sqrt() * z
        assert torch.allclose(flow[i][1], euler) and torch.allclose(reverse[i][1], ancestral)
    for x, chain in (euler, flow), (ancestral, reverse):
        assert torch.allclose(chain[-1][1], x + t**2 * score(x, t)) and chain[-1][0] == 0

@pytest.mark.parametrize("freshness", [0.0, 0.5, 1.0])
def test_consistent_leaves_the_noise_of_the_next_level(freshness):
    levels, chain = torch.tensor([8.0, 3.0, 1.0, 0.5, 0.1]), []
    start = 0.3 + 8 * randn(400, 3, 8, 8)
    run("consistent", freshness, gaussian(0, 0.3), start, levels, hook=record(chain))
    for (sigma, x), due in zip(chain[:-1], levels[1:].tolist(), strict=True):
        assert sigma == pytest.approx(due) and x.std().item() == pytest.approx(due, rel=0.02)
        assert abs(x.mean() - 0.3) < 0.02 * due

def test_heun_is_of_second_order_and_works_in_fp64():
    s, errors, chain, x = 0.5, [], [], 20 * randn(10, 3, 4, 4)
    for count in (13, 25, 49):
        out = ncsn.heun(gaussian(s), x, ncsn.heun_levels(20.0, count), record(chain))
        due = x * math.sqrt((s**2 + SIGMA_MIN**2) / (s**2 + 20**2)) * s**2 / (s**2 + SIGMA_MIN**2)
        errors.append((out - due).abs().max().item())
    assert out.dtype == torch.float32 and all(x.dtype == torch.float64 for _, x in chain)
    assert 3 < errors[0] / errors[1] < 6 and 3 < errors[1] / errors[2] < 6 and errors[2] < 0.01
    due = [(80 ** (1/7) + i / 17 * (0.002 ** (1/7) - 80 ** (1/7))) ** 7 for i in range(18)]
    assert ncsn.heun_levels(80.0, 18, 0.002).tolist() == pytest.approx(due, rel=1e-9)

# ---- bits/dim ----
def exact_bits(x, cov):  # of N(0, cov + SIGMA_MIN^2), in bins of 2/256
    normal = torch.distributions.MultivariateNormal(
        torch.zeros(len(cov), dtype=torch.float64), cov + SIGMA_MIN**2 * torch.eye(len(cov)))
    return 7 - normal.log_prob(x.flatten(1).double()) / (len(cov) * math.log(2))

def test_bits_per_dim_of_gaussian_images_is_the_analytic_one():
    """Sign of the divergence, scale of the prior, width of the bins, nats for bits."""
    x, due = 0.3 * randn(6, 3, 8, 8), 0.09 * torch.eye(192, dtype=torch.float64)
    bits = ncsn.bits_per_dim(gaussian(0.3), x, ncsn.heun_levels(60.0, 200), gen())
    assert bits.shape == (6,) and (bits - exact_bits(x, due)).abs().max() < 0.005

def test_bits_per_dim_is_right_on_average_where_pixels_are_correlated():
    """Hutchinson's trace: of signs shared by pixels, off-diagonal entries would count as well."""
    factor = torch.tensor([[5.0, 0, 0, 0], [4, 2, 0, 0], [-3, 1, 2, 0], [4, 0, 0, 1]]).double() / 10
    x = (randn(1, 4, seed=3) @ factor.T.float()).reshape(1, 1, 2, 2).expand(3000, 1, 2, 2)
    bits = ncsn.bits_per_dim(correlated(factor @ factor.T), x, ncsn.heun_levels(30.0, 128), gen())
    error = bits.std() / math.sqrt(3000)
    assert 0 < error < 0.03  # so v differs from image to image
    assert (bits - exact_bits(x, factor @ factor.T)).mean().abs() < 3 * error + 0.005

# ---- inpainting ----
@every_sampler
def test_inpainting_keeps_the_known_and_without_a_mask_is_sampling(name, freshness):
    truth, known = randn(6, 3, 8, 8, seed=2), torch.ones(8, 8, dtype=torch.bool)
    known[2:6, 2:6] = False
    problem = name, freshness, gaussian(0.5), 10 * randn(6, 3, 8, 8), ladder(10, 0.01, 20)
    x = run(*problem, hook=ncsn.restore(truth, known, gen(9)))
    assert torch.equal(x[:, :, known], truth[:, :, known])
    assert (x - truth)[:, :, ~known].abs().min() > 0
    empty = ncsn.restore(truth, known & False, gen(9))
    assert torch.equal(run(*problem, hook=empty), run(*problem))

def test_inpainting_completes_by_the_conditional_distribution():
    """Known pixels without the noise of the level, or with another's, tell of another neighbour."""
    cov = 0.25 * torch.tensor([[1, 0.8], [0.8, 1]]).double()
    truth, known = torch.tensor([1.0, -9.0]).expand(3000, 1, 1, 2), torch.tensor([True, False])
    hook = ncsn.restore(truth, known, gen(1))
    x = run("langevin", None, correlated(cov), 5 * randn(3000, 1, 1, 2), ladder(5, 0.01, 60),
            step=0.08, steps=40, hook=hook)[..., 1]
    assert x.mean().item() == pytest.approx(0.8, abs=0.06)
    assert x.std().item() == pytest.approx(0.3, abs=0.04)
    noise = hook(truth, torch.tensor(2.0))[..., 0] - 1
    assert noise.std().item() == pytest.approx(2, rel=0.05) and noise.mean().abs() < 0.2

# ---- training ----
def test_ema_forgets_the_initial_weights_as_its_closed_form_says():
    ema, net = (nn.Linear(2, 2).double() for _ in range(2))
    for part, value in (ema, 1.0), (net, 0.0):
        for p in part.parameters():
            nn.init.constant_(p, value)
    left, half_life = 1.0, 50  # 5 % of the run
    for step in range(1000):
        ncsn.update_ema(ema, net, step, half_life)
        left *= min(0.5 ** (1 / half_life), (1 + step) / (10 + step))
        assert ema.bias[0].item() == ema.weight[1, 0].item()
        assert ema.bias[0].item() / left == pytest.approx(1, rel=1e-9)
        assert step < 49 or left < 1e-5  # a long memory would keep them
    for _ in range(half_life):
        ncsn.update_ema(ema, net, 1000, half_life)
    assert ema.bias[0].item() / left == pytest.approx(0.5, rel=1e-6)
    assert not any(p.any() for p in net.parameters())

@pytest.mark.parametrize("total", [1, 2, 19, 100, 2000, 19500, 10**6])
def test_learning_rate_warms_up_linearly_and_falls_to_zero(total):
    warmup, steps = min(500, max(1, total // 20)), range(min(total, 3000))
    rates = [ncsn.learning_rate(step, total, 2.0) for step in steps]
    assert rates[:warmup - 1] == pytest.approx([2 * (i + 1) / warmup for i in range(warmup - 1)])
    cosine = [1 + math.cos(math.pi * i / total) for i in steps]
    assert rates[warmup:] == pytest.approx(cosine[warmup:])
    assert 1.98 < max(rates) <= 2 and min(rates) > 0
    assert ncsn.learning_rate(total, total, 2.0) == pytest.approx(0, abs=1e-12)

def test_quantise_inverts_dequantise_over_the_whole_of_each_bin(monkeypatch):
    values = torch.arange(256, dtype=torch.uint8).expand(2000, 256)
    x = ncsn.dequantise(values, gen())
    assert (ncsn.quantise(x) != values).float().mean() < 1e-4  # fp32 rounds 255.999999 to 256
    assert (x.mean(0) - ((torch.arange(256) + 0.5) / 128 - 1)).abs().max() < 3e-4
    assert (x.std(0) * math.sqrt(12) * 128 - 1).abs().max() < 0.08  # bins 2/256 wide
    for noise, ends in (0.0, (-1, 1 - 2 / 256)), (1 - 2**-16, (-1 + 2 / 256, 1)):
        monkeypatch.setattr(torch, "rand", lambda shape, noise=noise, **_: torch.full(shape, noise))
        x = ncsn.dequantise(values)
        assert torch.equal(ncsn.quantise(x), values) and -1 <= x.min() and x.max() < 1
        assert (x.min().item(), x.max().item()) == pytest.approx(ends, abs=1e-6)
    wild = torch.tensor([-70.0, -1.001, 1.0, 1.5, 70.0])  # samples may leave the range
    assert ncsn.quantise(wild).tolist() == [0, 0, 255, 255, 255]

# ---- network ----
def network(mults=(1, 2), fresh=False, **options):
    """A small ScoreNet; unless fresh, layers that start at zero are random."""
    torch.manual_seed(0)
    net = ncsn.ScoreNet(width=8, mults=mults, blocks=1, **options).requires_grad_(False)
    for p in [] if fresh else net.parameters():
        nn.init.normal_(p, std=0.2) if not p.any() else None
    return net

@pytest.mark.parametrize("sigma", [SIGMA_MIN, 0.1, 1.0, 90.0])
def test_preconditioning_keeps_input_and_output_of_f_at_unit_variance(sigma):
    """c_in, c_out, and that the loss weighs by 1 / c_out^2."""
    a, b = (network(fresh=True, sigma_data=0.4) for _ in range(2))
    first, *_, last = [m for m in b.modules() if isinstance(m, nn.Conv2d)]
    last.bias.fill_(1)  # F is 1 more than that of a
    seen, x, level = [], 0.4 * randn(200, 3, 8, 8), torch.full((200,), sigma)
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    loss = ncsn.denoising_loss(lambda y, s: x + (b(y, s) - a(y, s)), x, level, 0.4, gen())
    assert torch.allclose(loss, torch.ones(200), atol=0.01)
    assert seen[0].std().item() == pytest.approx(1, abs=0.02)

def test_score_is_tweedies_formula_for_one_sigma_and_for_many():
    net, x = network(), randn(3, 3, 8, 8)
    for sigma in (torch.tensor(0.7), torch.tensor([0.05, 0.7, 30.0])):
        due = (net(x, sigma) - x) / sigma.reshape(-1, 1, 1, 1) ** 2
        assert torch.allclose(net.score(x, sigma), due, rtol=1e-4, atol=1e-4)
    for i in range(3):  # images of a batch must not see each other
        assert torch.allclose(net(x[i:i + 1], sigma[i]), net(x, sigma)[i:i + 1], atol=1e-5)

def test_every_layer_and_sigma_itself_matter():
    net, x = network(mults=(1, 2, 2), sigma_data=1e6).requires_grad_(True), randn(2, 3, 8, 8)
    f = [net(x, torch.tensor(s)) / s - x / s for s in (0.3, 3.0)]  # F(x / 1e6, ln sigma)
    assert (f[0] - f[1]).abs().max() > 0.01
    (f[0] * x).sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]

def test_bf16_stays_inside_f():
    """A bf16 skip would cost 0.4 % of x, which the score magnifies by 1 / sigma^2."""
    x, sigma = 90 * randn(2, 3, 8, 8), torch.tensor([90.0, 0.01])
    fresh, rough = network(fresh=True), network(fresh=True, amp=True)  # F = 0 in any precision
    assert torch.equal(fresh(x, sigma), rough(x, sigma))
    assert rough(x, sigma).dtype == rough.score(x, sigma).dtype == torch.float32
    assert not torch.equal(network()(x, sigma), network(amp=True)(x, sigma))

@every_sampler
def test_sampling_is_a_function_of_the_seed_and_leaves_the_mode_alone(name, freshness):
    net, args = network(sigma_max=0.02), SimpleNamespace(sampler=name, freshness=freshness)
    ends = []
    for mode, seed in (True, 5), (False, 5), (False, 6):
        ends.append(ncsn.sample(args, net.train(mode), randn(2, 3, 4, 4), gen(seed)))
        assert all(part.training == mode for part in net.modules())
    assert torch.equal(ends[0], ends[1]) and ends[0].isfinite().all()
    assert torch.equal(ends[1], ends[2]) == (name == "heun" or freshness == 0)  # no fresh noise

def test_size_of_the_network():
    with torch.device("meta"):
        large, small = ncsn.ScoreNet(), ncsn.ScoreNet(width=32, mults=(1, 2, 3), blocks=1)
    assert 27e6 < sum(p.numel() for p in large.parameters()) < 35e6
    assert sum(p.numel() for p in small.parameters()) <= 1.26e6
    for mults in (1,), (1, 2), (1, 1, 2, 2), (2, 1, 3):
        x = randn(2, 3, 16, 16)
        assert network(mults)(x, torch.tensor([0.1, 9.0])).shape == x.shape
    for width in 4, 20, 100, 200, 256:  # whatever the width, its heads and groups are equal
        net, x = ncsn.Block(width, width, 8, attention=True), randn(2, width, 4, 4)
        assert net(x, randn(2, 8)).shape == x.shape
        assert net.attend.num_heads <= max(1, width // 64)
        assert width // net.norm1.num_groups >= min(width, 16)

@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (3, 1, 4, 6), (1, 2, 1, 5)])
def test_loss_samplers_and_bits_take_any_shape(shape):
    x, levels = randn(*shape), ladder(10, 0.01, 5)
    for name, freshness in SAMPLERS:
        assert run(name, freshness, gaussian(0.5), 10 * x, levels).shape == shape
    assert ncsn.denoising_loss(lambda y, s: y, x, torch.ones(len(x)), 0.5).shape == shape[:1]
    assert ncsn.bits_per_dim(gaussian(0.5), x, levels.double()).shape == shape[:1]
