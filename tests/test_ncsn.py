"""NCSN's mathematics and network, on the real functions, against densities known in closed form."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ncsn
from ncsn import SIGMA_MIN

SAMPLERS = [("langevin", None), ("consistent", 0.0), ("consistent", 1.0), ("heun", None)]
every_sampler = pytest.mark.parametrize(("name", "freshness"), SAMPLERS)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=gen(seed), dtype=dtype)


def random_bytes(*shape, seed=0):
    return torch.randint(256, shape, generator=gen(seed), dtype=torch.uint8)


def ladder(top, bottom, count):
    """Levels with equal ratios."""
    return torch.logspace(math.log10(top), math.log10(bottom), count, dtype=torch.float64).tolist()


def run(name, freshness, score, x, levels, step_size=0.1, repeats=4, **constrain):
    """The sampler of that name."""
    if name == "langevin":
        return ncsn.langevin(score, x, levels, step_size, repeats, gen(), **constrain)
    if name == "consistent":
        return ncsn.consistent(score, x, levels, freshness, gen(), **constrain)
    return ncsn.heun(score, x, levels, **constrain)


class Recorder:
    """A constraint that changes nothing, and remembers sigma and x after every step."""

    def __init__(self):
        self.sigmas = []
        self.xs = []

    def __call__(self, x, sigma):
        self.sigmas.append(sigma)
        self.xs.append(x)
        return x


# ----------------------------------------------------------- exact scores of data with noise sigma


def gaussian(s, mean=0.0):
    """Of N(mean, s^2 I); with s = 0 a point mass."""

    def score(x, sigma):
        return (mean - x) / (s**2 + sigma**2)

    return score


def correlated(covariance):
    """Of N(0, covariance) of the flattened pixels."""

    def score(x, sigma):
        eye = torch.eye(len(covariance), dtype=torch.float64)
        precision = torch.linalg.inv(covariance + sigma**2 * eye).to(x.dtype)
        return -(x.flatten(1) @ precision).reshape(x.shape)

    return score


def two_modes(shift=0.0):
    """Of 1/5 N(shift - 5, I) + 4/5 N(shift + 5, I), as in the paper of 2019."""

    def score(x, sigma):
        variance = 1 + sigma**2
        total = (x - shift).flatten(1).sum(1).reshape(-1, 1, 1, 1)
        right = torch.sigmoid(math.log(4) + 10 * total / variance)
        return (shift - 5 + 10 * right - x) / variance

    return score


def weight_of_left_mode(x, shift=0.0):
    """1/5, if x is drawn from two_modes()."""
    return ((x - shift).flatten(1).sum(1) < 0).double().mean().item()


def points(images):
    """Of each of the images with the same probability."""

    def score(x, sigma):
        square = (x.flatten(1)[:, None] - images.flatten(1)).square().sum(2)
        weights = (-square / (2 * sigma**2)).softmax(1).to(x.dtype)
        mean = weights @ images.flatten(1)
        return (mean.reshape(x.shape) - x) / sigma**2

    return score


class GaussianNet:
    """In the place of a ScoreNet: the exact denoiser of images from N(0, s^2 I)."""

    def __init__(self, s, sigma_data, sigma_max):
        self.s = s
        self.sigma_data = sigma_data
        self.sigma_max = sigma_max
        self.amp = False

    def __call__(self, y, sigma):
        sigma = torch.as_tensor(sigma).reshape(-1, 1, 1, 1)
        return y * (self.s**2 / (self.s**2 + sigma**2))

    def score(self, y, sigma):
        return gaussian(self.s)(y, sigma)


# -------------------------------------------------------------------------------------- a small net


def network(mults=(1, 2), fresh=False, **options):
    """A ScoreNet; unless fresh, layers that start at zero are random."""
    torch.manual_seed(0)
    net = ncsn.ScoreNet(width=8, mults=mults, blocks=(1,), **options)
    for p in net.parameters():
        if not fresh and not p.any():
            nn.init.normal_(p, std=0.2)
    return net


def frozen(*args, **options):
    return network(*args, **options).requires_grad_(False)


# --------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("sigma", [0.02, 0.3, 2.0, 40.0])
def test_loss_of_the_exact_denoiser_is_analytic_and_a_multiple_of_ncsns(sigma):
    """Sign of the score, scale of the noise, weight, the axes of the mean."""
    s = 0.7
    sigma_data = 0.4
    x = s * randn(2000, 3, 4, 4)
    net = GaussianNet(s, sigma_data, 50.0)
    loss = ncsn.denoising_loss(net, x, torch.full((2000,), sigma), sigma_data, gen())
    expected_ncsns = s**2 / (s**2 + sigma**2)  # E |sigma score + z|^2 / dim
    weight = (sigma**2 + sigma_data**2) / sigma_data**2
    assert loss.shape == (2000,)
    assert loss.mean().item() == pytest.approx(weight * expected_ncsns, rel=0.03)

    z = torch.randn(2000, 3, 4, 4, generator=gen()).double()  # the same, image by image
    ncsns = (sigma * net.score(x + sigma * z, sigma) + z).square().mean((1, 2, 3))
    assert torch.allclose(loss.double(), weight * ncsns, rtol=5e-3)


def test_loss_of_a_batch_gives_each_image_its_own_sigma():
    x = 0.5 * randn(4, 3, 4, 4)
    sigma = torch.tensor([0.03, 0.4, 2.0, 50.0])
    net = GaussianNet(0.5, 0.4, 80.0)
    loss = ncsn.denoising_loss(net, x, sigma, 0.4, gen())
    z = torch.randn(x.shape, generator=gen())
    for i, level in enumerate(sigma.tolist()):
        error = (net(x[i] + level * z[i], level) - x[i]).double()
        expected = error.square().mean().item() * (1 / level**2 + 1 / 0.4**2)
        assert loss[i].item() == pytest.approx(expected, rel=1e-4)


def test_fresh_network_has_loss_one_at_every_sigma():
    """sigma_data that does not fit the range of the images, c_skip that does not fit the weight."""
    images = (50 + 40 * randn(200, 3, 8, 8)).clamp(0, 255).to(torch.uint8)
    sigma_data, sigma_max = ncsn.measure(images)
    net = frozen(fresh=True, sigma_data=sigma_data, sigma_max=sigma_max)
    for sigma in ladder(sigma_max, SIGMA_MIN, 7):
        level = torch.full((200,), sigma)
        loss = ncsn.denoising_loss(net, ncsn.dequantise(images, gen(2)), level, sigma_data, gen())
        assert loss.mean().item() == pytest.approx(1, abs=0.04)
        if sigma > 5:  # images in [0, 1] miss it
            loss = ncsn.denoising_loss(net, images / 255, level, sigma_data, gen())
            assert not 0.7 < loss.mean().item() < 1.4


# ----------------------------------------------------------------------------- sigmas of a training


def share_below(sigma, median):
    """How likely a draw below sigma is, where ln sigma is logistic with scale 0.7."""
    return 1 / (1 + (median / sigma) ** (1 / 0.7))


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(5, 1, 4, 4),
        torch.zeros(5, 4, 4, dtype=torch.uint8),
        torch.zeros(0, 1, 4, 4).byte(),
    ],
)
def test_only_bytes_are_measured(images):
    """Floats from 0 to 1, taken as bytes, would all be nearly black."""
    with pytest.raises(ValueError, match="uint8"):
        ncsn.measure(images)


def test_sigmas_are_stratified():
    """Each of 1000 slices of the distribution has one, anywhere in it; the order is by chance."""
    drawn = ncsn.sample_sigma(1000, 0.5, 1e9, generator=gen()).double()
    assert drawn.shape == (1000,)
    half = len(drawn) // 2
    below = share_below(drawn, 0.3)
    assert below[:half].mean().item() == pytest.approx(1 / 2, abs=0.05)
    assert abs((below[1:] * below[:-1]).mean().item() - 1 / 4) < 0.03
    inner = drawn.sort().values[20:]  # the first are clamped
    place = 1000 * share_below(inner, 0.3) - torch.arange(20, 1000)
    assert place.min() > -0.01
    assert place.max() < 1.01
    assert place.mean().item() == pytest.approx(1 / 2, abs=0.03)
    assert place.std().item() == pytest.approx(1 / math.sqrt(12), abs=0.02)
    assert abs((place[1:] * place[:-1]).mean().item() - 1 / 4) < 0.03  # each by itself


def test_sigmas_have_the_logistic_distribution_around_the_median_asked_for():
    for focus in 0.6, 2.0:
        many = ncsn.sample_sigma(100_000, 0.5, 80.0, focus, gen()).double()
        for sigma in 0.02, 0.2, 0.3, 1.0, 5.0:
            below = (many < sigma).double().mean().item()
            assert below == pytest.approx(share_below(sigma, focus * 0.5), abs=1e-3)


def test_sigmas_cover_the_whole_ladder_and_nothing_else():
    generator = gen()
    batches = [ncsn.sample_sigma(64, 0.5, 80.0, generator=generator) for _ in range(200)]
    for batch in batches:  # one sigma an image, not one a batch
        assert len(batch.unique()) == 64
    draws = torch.cat(batches)
    assert draws.min() >= SIGMA_MIN * (1 - 1e-6)
    assert draws.max() <= 80
    place = (draws / SIGMA_MIN).log() / math.log(80 / SIGMA_MIN)
    assert torch.histc(place, 10, 0, 1).min() > 10
    assert torch.equal(batches[0], ncsn.sample_sigma(64, 0.5, 80.0, generator=gen()))
    assert not torch.equal(batches[0], batches[1])


# ------------------------------------------------------------------------------------------ measure


def clusters(*sizes):
    """Images around greys, one for each cluster, the first the darkest."""
    greys = torch.linspace(40, 215, len(sizes)).repeat_interleave(torch.tensor(sizes))
    return (greys[:, None, None, None] + 10 * randn(sum(sizes), 3, 2, 2)).to(torch.uint8)


def rare_opposites():
    """Many bright images, and a few nearer to 0 that are farthest from each other."""
    bright = torch.full((2000, 3, 2, 2), 242)
    pattern = torch.tensor([25, 230]).repeat(6).reshape(3, 2, 2)
    rare = torch.stack([pattern, 255 - pattern, pattern, 255 - pattern])
    return (torch.cat([bright, rare]) + 5 * randn(2004, 3, 2, 2)).to(torch.uint8)


MEASURED = {
    "few": random_bytes(300, 3, 4, 4),
    "many": random_bytes(2500, 1, 2, 2),
    "a small cluster": clusters(2000, 400),
    "three clusters": clusters(500, 2000, 300),
    "a large cluster": clusters(5000, 2500),
    "rare opposites": rare_opposites(),
}


@pytest.mark.parametrize("images", MEASURED.values(), ids=MEASURED.keys())
def test_measure_finds_the_root_mean_square_and_the_farthest_pair(images):
    x = (images.double().flatten(1) + 0.5) / 128 - 1
    farthest = torch.cdist(x, x).max().item()
    assert farthest > 1.2 * x.norm(dim=1).max().item()
    sigma_data, sigma_max = ncsn.measure(images)
    assert sigma_data == pytest.approx(x.square().mean().sqrt().item(), rel=1e-4)
    assert sigma_max == pytest.approx(farthest, rel=1e-3)


ALIKE = {
    "one": random_bytes(1, 3, 8, 8),
    "identical": random_bytes(1, 3, 8, 8).expand(40, -1, -1, -1),
    "close to each other": 200 + random_bytes(40, 3, 8, 8) // 16,
    "one black": torch.zeros(1, 1, 28, 28, dtype=torch.uint8),
    "black": torch.zeros(40, 1, 28, 28, dtype=torch.uint8),
    "white": torch.full((40, 3, 8, 8), 255, dtype=torch.uint8),
    "grey": torch.full((40, 3, 8, 8), 128, dtype=torch.uint8),
    "a grey pixel": torch.full((1, 1, 1, 1), 128, dtype=torch.uint8),
}


@pytest.mark.parametrize("images", ALIKE.values(), ids=ALIKE.keys())
def test_images_that_are_alike_have_levels_that_reach_their_norm(images):
    x = (images.double().flatten(1) + 0.5) / 128 - 1
    sigma_data, sigma_max = ncsn.measure(images)
    assert sigma_data == pytest.approx(x.square().mean().sqrt().item(), rel=1e-4)
    assert sigma_max == pytest.approx(x.norm(dim=1).max().item(), rel=1e-4)  # not 0, the distance

    levels = ncsn.make_ladder(sigma_max, x.shape[1])
    for each in levels, ncsn.heun_levels(sigma_max):
        assert len(each) >= 2
        assert each[0] == pytest.approx(sigma_max, rel=1e-5)
        assert each[-1] == pytest.approx(SIGMA_MIN, rel=1e-5)
        assert each == sorted(set(each), reverse=True)
    step_size, repeats = ncsn.langevin_settings(levels)
    assert 0 < step_size < 1
    assert 1 <= repeats < 100
    image = images[:1] / 127.5 - 1
    start = sigma_max * randn(50, *images.shape[1:])
    for name, freshness in SAMPLERS:
        score = gaussian(0, image)
        end = run(name, freshness, score, start, levels, step_size, repeats)
        assert (end - image).abs().max() < 1e-4


# ------------------------------------------------------------------------------------------- ladder


def normal_cdf(t):
    return (1 + math.erf(t / math.sqrt(2))) / 2


def overlap(gamma, dim):
    """How much of the shell of sigma lies within 3 standard deviations of that of gamma sigma."""
    distance = math.sqrt(2 * dim) * (gamma - 1)  # of the means; 1 and gamma are the deviations
    return normal_cdf(distance + 3 * gamma) - normal_cdf(distance - 3 * gamma)


@pytest.mark.parametrize(
    ("dim", "top", "bottom"),
    [(3072, 100, SIGMA_MIN), (784, 40, SIGMA_MIN), (192, 9, 1), (27, 7, 1)],
)
def test_ladder_is_geometric_and_shells_overlap_by_one_half(dim, top, bottom):
    levels = ncsn.make_ladder(top, dim, bottom)
    assert levels == pytest.approx(ladder(top, bottom, len(levels)), rel=1e-5)
    gamma = (top / bottom) ** (1 / (len(levels) - 1))
    gamma_of_fewer = (top / bottom) ** (1 / (len(levels) - 2))
    assert overlap(gamma, dim) >= 0.5 > overlap(gamma_of_fewer, dim)


@pytest.mark.parametrize("dim", [1, 4, 7, 10])
def test_in_few_dimensions_levels_are_a_factor_of_three_apart(dim):
    assert overlap(3, dim) >= 0.5
    levels = ncsn.make_ladder(80, dim, 0.01)
    assert levels == pytest.approx(ladder(80, 0.01, 10), rel=1e-5)  # 3^8 < 8000 < 3^9
    assert len(ncsn.make_ladder(1.1, dim, 1.0)) == 2


def test_shells_are_as_thick_as_overlap_supposes():
    """|sigma z| is nearly N(sqrt(dim) sigma, sigma^2 / 2), here of neighbours on a ladder."""
    upper, lower = ncsn.make_ladder(20, 768)[:2]
    of_upper = (upper * randn(5000, 768)).norm(dim=1)
    of_lower = (lower * randn(5000, 768, seed=2)).norm(dim=1)
    within = (of_lower - of_upper.mean()).abs() < 3 * of_upper.std()
    assert within.double().mean().item() == pytest.approx(0.5, abs=0.1)


def test_cifar10s_ladder_has_the_published_settings():
    levels = ncsn.make_ladder(50, 3072, 0.01)
    assert abs(len(levels) - 219) <= 1
    assert overlap(100 ** (1 / 9), 3072) < 1e-9  # that of the ten levels of 2019, 1 to 0.01
    assert len(ncsn.make_ladder(1, 3072, 0.01)) > 100


def variances(levels, step_size, repeats, fresh):
    """Of chains among images that are all 0 at the end of each level, in units of sigma^2.

    fresh: the variance of new noise in a step, in the same units.
    """
    variance = 1.0
    found = []
    for above, sigma in zip([levels[0], *levels], levels, strict=False):
        variance *= (above / sigma) ** 2
        for _ in range(repeats):
            variance = (1 - step_size) ** 2 * variance + fresh
        found.append(variance)
    return found


@pytest.mark.parametrize("gamma", [1.02, 1.04, 1.2, 3.0])
@pytest.mark.parametrize("excess", [0.02, 0.06, 0.3])
@pytest.mark.parametrize("most", [0.1, 0.2, 0.5])
def test_settings_are_the_fewest_steps_that_keep_up_with_the_ladder(gamma, excess, most):
    levels = [gamma**-i for i in range(300)]
    step_size, repeats = ncsn.langevin_settings(levels, excess, most)
    assert 0 < step_size <= most
    fresh = step_size * (2 - step_size)
    assert variances(levels, step_size, repeats, fresh)[-1] == pytest.approx(1 + excess, rel=1e-3)
    if repeats > 1:
        left = variances(levels, most, repeats - 1, most * (2 - most))[-1]
        assert left > 1 + excess


def test_published_settings_leave_too_much_noise_and_these_do_not():
    levels = ncsn.make_ladder(100, 3072, 0.01)
    published = 6.18e-6 / 0.01**2  # for CIFAR-10, with five steps a level
    assert variances(levels, published, 5, 2 * published)[-1] == pytest.approx(1.13, abs=0.01)
    step_size, repeats = ncsn.langevin_settings(levels)
    assert repeats == 2
    assert step_size == pytest.approx(0.2, abs=0.005)
    assert ncsn.langevin_settings([1.0, 1.0])[1] == 1


def end_of_ladder(s, levels, step_size, repeats, fresh):
    """The std of samples of langevin(), from Gaussian images of std s, in units of s."""
    variance = levels[0] ** 2
    for sigma in levels:
        keep = 1 - step_size * sigma**2 / (s**2 + sigma**2)
        for _ in range(repeats):
            variance = keep**2 * variance + fresh * sigma**2
    without_noise = 1 - levels[-1] ** 2 / (s**2 + levels[-1] ** 2)
    return without_noise * math.sqrt(variance) / s


@pytest.mark.parametrize("s", [0.1, 0.3, 1, 3])
def test_langevin_gives_gaussian_images_their_size(s):
    """To half a percent, where settings by the paper's rule are about 7 percent off."""
    levels = ncsn.make_ladder(100, 3072)
    step_size, repeats = ncsn.langevin_settings(levels)
    size = end_of_ladder(s, levels, step_size, repeats, 1 - (1 - step_size) ** 2)
    assert size == pytest.approx(1, abs=0.005)
    assert end_of_ladder(s, levels, 0.065, 5, 2 * 0.065) == pytest.approx(1.07, abs=0.01)
    start = 100 * randn(40, 3, 8, 8)
    x = ncsn.langevin(gaussian(s), start, levels, step_size, repeats, gen())
    assert x.std().item() == pytest.approx(s * size, rel=0.025)


# ----------------------------------------------------------------------------------------- samplers


def test_langevin_follows_the_recursion_of_mean_and_variance():
    """Noise of another size, clamps, a level's last step without noise, a step too few."""
    s = 0.5
    m = 0.3
    start = 6 * randn(50, 3, 16, 16)
    levels = ladder(6, 0.05, 23)
    step_size, repeats = ncsn.langevin_settings(levels)
    chain = Recorder()
    end = ncsn.langevin(gaussian(s, m), start, levels, step_size, repeats, gen(), chain)
    assert chain.sigmas == [sigma for sigma in levels for _ in range(repeats)] + [0]
    mean = start.mean().item()
    variance = start.var().item()
    for i, (sigma, x) in enumerate(zip(chain.sigmas[:-1], chain.xs[:-1], strict=True)):
        alpha = step_size * sigma**2
        keep = 1 - alpha / (s**2 + sigma**2)
        mean = m + keep * (mean - m)
        variance = keep**2 * variance + step_size * (2 - step_size) * sigma**2
        assert x.var().item() == pytest.approx(variance, rel=0.03)
        assert abs(x.mean().item() - mean) < 0.03 * math.sqrt(variance)
        if i % repeats == repeats - 1 and sigma > 1:  # that of images with noise
            assert variance == pytest.approx(s**2 + sigma**2, rel=0.1)
    assert torch.allclose(end, chain.xs[-2] + 0.05**2 * gaussian(s, m)(chain.xs[-2], 0.05))


@every_sampler
def test_final_denoising_leaves_no_noise_on_a_point_mass(name, freshness):
    chain = Recorder()
    start = 5 * randn(50, 3, 4, 4)
    x = run(name, freshness, gaussian(0, 0.3), start, ladder(5, 0.1, 40), constrain=chain)
    assert (x - 0.3).abs().max() < 1e-4
    assert chain.sigmas[-1] == 0
    assert torch.equal(x, chain.xs[-1].float())
    assert chain.xs[-2].std().item() == pytest.approx(0.1, rel=0.15)  # until then the last level's


@every_sampler
def test_annealing_finds_the_weights_of_far_apart_modes(name, freshness):
    start = 60 * randn(4000, 2, 1, 1)
    x = run(name, freshness, two_modes(), start, ladder(60, 0.1, 68), step_size=0.08, repeats=56)
    assert weight_of_left_mode(x) == pytest.approx(0.2, abs=0.03)
    assert (x.abs() - 5).std().item() == pytest.approx(1, abs=0.1)


def test_langevin_needs_annealing_and_then_reaches_modes_far_off_centre():
    start = 16 * torch.rand(2000, 2, 1, 1, generator=gen()) - 8
    x = ncsn.langevin(two_modes(), start, [0.4], 0.9, 500, gen())
    assert weight_of_left_mode(x) > 0.35
    start = 300 * randn(4000, 2, 1, 1)
    x = ncsn.langevin(two_modes(30.0), start, ladder(300, 0.5, 70), 0.08, 56, gen())
    assert weight_of_left_mode(x, 30.0) == pytest.approx(0.2, abs=0.03)


@every_sampler
def test_sampling_eight_images_returns_those_eight(name, freshness):
    """From noise to images by sample(), its levels included."""
    images = 2 * torch.rand(8, 3, 8, 8, generator=gen()) - 1
    flat = images.double().flatten(1)
    net = SimpleNamespace(score=points(images), sigma_max=torch.cdist(flat, flat).max().item())
    args = SimpleNamespace(sampler=name, freshness=freshness)
    x = ncsn.sample(args, net, randn(400, 3, 8, 8), generator=gen())
    assert x.shape == (400, 3, 8, 8)
    assert x.dtype == torch.float32
    distance, nearest = torch.cdist(x.double().flatten(1), flat).min(1)
    assert distance.max() < 1e-4
    hits = nearest.bincount(minlength=8)
    assert hits.min() >= 20
    assert hits.max() <= 90


def test_consistent_is_euler_at_one_end_and_ancestral_at_the_other():
    levels = ladder(10, 0.1, 12)
    score = gaussian(0.5, 0.2)
    start = 10 * randn(20, 3, 2, 2, dtype=torch.float64)
    old_noise = Recorder()
    new_noise = Recorder()
    run("consistent", 0.0, score, start, levels, constrain=old_noise)
    run("consistent", 1.0, score, start, levels, constrain=new_noise)
    assert old_noise.sigmas == new_noise.sigmas == [*levels[1:], 0]
    euler = start
    ancestral = start
    generator = gen()
    for i in range(11):
        s, t = levels[i : i + 2]
        z = torch.randn(start.shape, generator=generator)
        euler = euler + (t - s) * -s * score(euler, s)
        renewed = t * math.sqrt(1 - t**2 / s**2)
        ancestral = ancestral + (s**2 - t**2) * score(ancestral, s) + renewed * z
        assert torch.allclose(old_noise.xs[i], euler)
        assert torch.allclose(new_noise.xs[i], ancestral)
    assert torch.allclose(old_noise.xs[-1], euler + 0.1**2 * score(euler, 0.1))
    assert torch.allclose(new_noise.xs[-1], ancestral + 0.1**2 * score(ancestral, 0.1))


@pytest.mark.parametrize("freshness", [0.0, 0.5, 1.0])
def test_consistent_leaves_the_noise_of_the_next_level(freshness):
    levels = [8.0, 3.0, 1.0, 0.5, 0.1]
    chain = Recorder()
    start = 0.3 + 8 * randn(400, 3, 8, 8)
    run("consistent", freshness, gaussian(0, 0.3), start, levels, constrain=chain)
    assert chain.sigmas == [*levels[1:], 0]
    for sigma, x in zip(chain.sigmas[:-1], chain.xs[:-1], strict=True):
        assert x.std().item() == pytest.approx(sigma, rel=0.02)
        assert abs(x.mean().item() - 0.3) < 0.02 * sigma


def exact_flow(x, s, top, bottom):
    """Where the probability flow of N(0, s^2 I) leads from noise `top` to noise `bottom`."""
    return x * math.sqrt((s**2 + bottom**2) / (s**2 + top**2))


def test_heun_is_of_second_order_and_works_in_fp64():
    s = 0.5
    start = 20 * randn(10, 3, 4, 4)
    flow = exact_flow(start, s, 20, SIGMA_MIN)
    expected = flow * s**2 / (s**2 + SIGMA_MIN**2)  # denoised
    errors = []
    for count in 13, 25, 49:
        chain = Recorder()
        levels = ncsn.heun_levels(20.0, count)
        end = ncsn.heun(gaussian(s), start, levels, chain)
        errors.append((end - expected).abs().max().item())
        assert chain.sigmas == [*levels[1:], 0]
        assert all(x.dtype == torch.float64 for x in chain.xs)
        assert end.dtype == torch.float32
    assert 3 < errors[0] / errors[1] < 6
    assert 3 < errors[1] / errors[2] < 6
    assert errors[2] < 0.01


def test_heun_computes_in_fp32_where_there_is_no_fp64(monkeypatch):
    start = 20 * randn(10, 3, 4, 4)
    levels = ncsn.heun_levels(20.0)
    usual = ncsn.heun(gaussian(0.5), start, levels)
    monkeypatch.setattr(ncsn, "precise", torch.Tensor.float)
    chain = Recorder()
    x = ncsn.heun(gaussian(0.5), start, levels, chain)
    assert all(x.dtype == torch.float32 for x in chain.xs)
    assert torch.allclose(x, usual, rtol=1e-3, atol=1e-5)


def test_levels_of_heun_are_those_of_karras():
    ends = 80 ** (1 / 7), 0.002 ** (1 / 7)
    expected = [(ends[0] + i / 17 * (ends[1] - ends[0])) ** 7 for i in range(18)]
    assert ncsn.heun_levels(80.0, 18, 0.002) == pytest.approx(expected, rel=1e-9)
    assert ncsn.heun_levels(80.0)[-1] == pytest.approx(SIGMA_MIN)


def test_sigma_of_scores_and_constraints_is_a_python_float():
    types = set()

    def score(x, sigma):
        types.add(type(sigma))
        return gaussian(0.5)(x, sigma)

    def constrain(x, sigma):
        types.add(type(sigma))
        return x

    x = randn(2, 3, 4, 4)
    for name, freshness in SAMPLERS:
        args = SimpleNamespace(sampler=name, freshness=freshness)
        net = SimpleNamespace(score=score, sigma_max=2.0)
        ncsn.sample(args, net, x, generator=gen(), constrain=constrain)
    ncsn.bits_per_dim(score, x, ncsn.heun_levels(2.0), gen())
    assert types == {float}


def test_sample_walks_down_from_sigma_max_times_z_by_the_sampler_named():
    """With few calls of the network each: about 280 and 35 for images of CIFAR-10's size."""
    z = randn(20, 3, 8, 8)
    args = SimpleNamespace(sampler="langevin", freshness=0.0)
    calls = []

    def score(x, sigma):
        calls.append((x, sigma))
        return gaussian(0.5)(x, sigma)

    net = SimpleNamespace(score=score, sigma_max=13.0)
    due = exact_flow(13 * z, 0.5, 13, 0)
    for sampler, rel in ("heun", 0.03), ("consistent", 0.05):
        calls.clear()
        x = ncsn.sample(args, net, z, sampler, gen())
        assert torch.allclose(x, due, rtol=rel, atol=0)
        assert torch.allclose(calls[0][0], 13 * z)
        assert calls[0][1] == pytest.approx(13, rel=1e-5)
        assert calls[-1][1] == pytest.approx(SIGMA_MIN, rel=1e-5)
        assert len(calls) == (35 if sampler == "heun" else len(ncsn.make_ladder(13.0, 192)))
    levels = ncsn.make_ladder(13.0, 192)
    for sampler in None, "langevin":
        x = ncsn.sample(args, net, z, sampler, gen())
        settings = ncsn.langevin_settings(levels)
        assert torch.equal(x, ncsn.langevin(score, 13.0 * z, levels, *settings, gen()))


def test_guidance_leads_from_the_early_guess_past_the_later_except_in_much_noise():
    net = SimpleNamespace(score=lambda y, sigma: 2 * y, sigma_data=0.5, sigma_max=9.0)
    early = SimpleNamespace(score=lambda y, sigma: 5 * y)
    y = randn(3, 3, 4, 4)
    guided = ncsn.Guided(net, early, strength=1.5, sigma_limit=6.0)
    assert guided.sigma_max == 9
    for sigma in 0.01, 1.0, 2.9:
        assert torch.allclose(guided.score(y, sigma), 5 * y + 1.5 * (2 * y - 5 * y))
    assert torch.equal(guided.score(y, 3.1), 2 * y)
    unguided = ncsn.Guided(net, None, strength=1)  # does not ask the early network
    assert torch.equal(unguided.score(y, 1.0), 2 * y)


def test_guided_samples_of_two_modes_hardly_lie_between_them():
    """Where those of a network lie that takes them for wider, and more so an early one."""

    def modes(std):
        def score(x, sigma):
            variance = std**2 + sigma**2
            return (5 * torch.tanh(5 * x / variance) - x) / variance

        return SimpleNamespace(score=score, sigma_data=5.0, sigma_max=60.0)

    shares = []
    for strength in 1.0, 1.8:
        guided = ncsn.Guided(modes(1.5), modes(2.0), strength)
        x = ncsn.heun(guided.score, 60 * randn(4000, 1, 1, 1), ladder(60, 0.1, 68))
        shares.append((x.abs() < 2.5).double().mean().item())
    assert shares[0] > 0.03
    assert shares[1] < 0.6 * shares[0]


# ----------------------------------------------------------------------------------------- bits/dim


def exact_bits(x, covariance):
    """Of N(0, covariance + SIGMA_MIN^2), in bins of 2/256."""
    dim = len(covariance)
    noise = SIGMA_MIN**2 * torch.eye(dim, dtype=torch.float64)
    zero = torch.zeros(dim, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(zero, covariance + noise)
    return 7 - normal.log_prob(x.flatten(1).double()) / (dim * math.log(2))


def test_bits_per_dim_of_gaussian_images_is_the_analytic_one():
    """Sign of the divergence, scale of the prior, width of the bins, nats for bits."""
    x = 0.3 * randn(6, 3, 8, 8)
    bits = ncsn.bits_per_dim(gaussian(0.3), x, ncsn.heun_levels(60.0, 200), gen())
    assert bits.shape == (6,)
    expected = exact_bits(x, 0.09 * torch.eye(192, dtype=torch.float64))
    assert (bits - expected).abs().max() < 0.005


def test_bits_per_dim_is_right_on_average_where_pixels_are_correlated():
    """Hutchinson's trace: of signs shared by pixels, off-diagonal entries would count as well."""
    rows = [[5, 0, 0, 0], [4, 2, 0, 0], [-3, 1, 2, 0], [4, 0, 0, 1]]
    factor = torch.tensor(rows, dtype=torch.float64) / 10
    covariance = factor @ factor.T
    x = (randn(1, 4, seed=3) @ factor.T.float()).reshape(1, 1, 2, 2).expand(3000, 1, 2, 2)
    bits = ncsn.bits_per_dim(correlated(covariance), x, ncsn.heun_levels(30.0, 128), gen())
    error = bits.std().item() / math.sqrt(3000)
    assert 0.001 < error < 0.03  # so the signs differ from image to image
    assert abs((bits - exact_bits(x, covariance)).mean().item()) < 3 * error + 0.005


def test_bits_per_dim_is_of_second_order_in_the_levels():
    x = 0.3 * randn(6, 3, 8, 8)
    expected = exact_bits(x, 0.09 * torch.eye(192, dtype=torch.float64))
    errors = []
    for count in 13, 25, 49:
        bits = ncsn.bits_per_dim(gaussian(0.3), x, ncsn.heun_levels(60.0, count), gen())
        errors.append((bits - expected).abs().max().item())
    assert 3 < errors[0] / errors[1] < 6
    assert 3 < errors[1] / errors[2] < 6


def test_bits_per_dim_is_about_the_same_where_there_is_no_fp64(monkeypatch):
    x = 0.3 * randn(6, 3, 8, 8)
    levels = ncsn.heun_levels(60.0, 60)
    usual = ncsn.bits_per_dim(gaussian(0.3), x, levels, gen())
    monkeypatch.setattr(ncsn, "precise", torch.Tensor.float)
    bits = ncsn.bits_per_dim(gaussian(0.3), x, levels, gen())
    assert bits.dtype == torch.float32
    assert usual.dtype == torch.float64
    assert (bits - usual).abs().max() < 0.002


def test_bits_per_dim_of_a_network_is_a_function_of_the_seed():
    net = frozen(sigma_max=3.0)
    levels = ncsn.heun_levels(3.0, 4)
    x = 0.3 * randn(2, 3, 4, 4)
    bits = [ncsn.bits_per_dim(net.score, x, levels, gen(seed)) for seed in (5, 5, 6)]
    assert torch.equal(bits[0], bits[1])
    assert not torch.equal(bits[0], bits[2])
    assert torch.stack(bits).isfinite().all()


@pytest.mark.parametrize("count", [1, 3])
def test_evaluate_prints_exact_losses_and_bits_and_an_error_only_of_several(
    count, tmp_path, capsys
):
    s = 0.3
    test = ncsn.quantise(s * randn(count, 3, 8, 8))
    args = SimpleNamespace(out=tmp_path, seed=0, device="cpu", bits_images=100)
    ncsn.evaluate(args, GaussianNet(s, sigma_data=2 * s, sigma_max=60.0), test)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[:-1]]  # sigma 0.1 loss 1.0
    sigmas = [float(row[1]) for row in rows]
    losses = [float(row[3]) for row in rows]
    assert sigmas == pytest.approx(ladder(SIGMA_MIN, 60, 17), abs=1e-4)
    expected = [(1 + (sigma / s / 2) ** 2) / (1 + (sigma / s) ** 2) for sigma in sigmas]
    assert losses == pytest.approx(expected, rel=0.4)  # from 1 to 1/4; of 192 numbers an image

    x = test / 127.5 - 1
    expected = exact_bits(x, s**2 * torch.eye(192, dtype=torch.float64)).mean().item()
    assert float(lines[-1].split()[1].rstrip(",")) == pytest.approx(expected, abs=0.02)
    assert lines[-1].endswith(f"of {count} test images")
    assert ("standard error" in lines[-1]) == (count > 1)
    assert not any("nan" in line for line in lines)


# --------------------------------------------------------------------------------------- inpainting


@every_sampler
def test_inpainting_keeps_the_known_and_without_a_mask_is_sampling(name, freshness):
    truth = randn(6, 3, 8, 8, seed=2)
    known = torch.ones(8, 8, dtype=torch.bool)
    known[2:6, 2:6] = False
    args = SimpleNamespace(sampler=name, freshness=freshness)
    net = SimpleNamespace(score=gaussian(0.5), sigma_max=10.0)
    z = randn(6, 3, 8, 8)
    x = ncsn.sample(args, net, z, None, gen(), ncsn.keep_known(truth, known, gen(9)))
    assert torch.equal(x[:, :, known], truth[:, :, known])
    assert (x - truth)[:, :, ~known].abs().min() > 0
    nothing_known = ncsn.keep_known(truth, torch.zeros_like(known), gen(9))
    x = ncsn.sample(args, net, z, None, gen(), nothing_known)
    assert torch.equal(x, ncsn.sample(args, net, z, None, gen()))


def test_inpainting_completes_by_the_conditional_distribution():
    """Known pixels without the noise of the level, or with another's, tell of another neighbour."""
    covariance = 0.25 * torch.tensor([[1, 0.8], [0.8, 1]], dtype=torch.float64)
    truth = torch.tensor([1.0, -9.0]).expand(3000, 1, 1, 2)
    constrain = ncsn.keep_known(truth, torch.tensor([True, False]), gen(1))
    start = 5 * randn(3000, 1, 1, 2)
    x = ncsn.langevin(
        correlated(covariance), start, ladder(5, 0.01, 60), 0.08, 40, gen(), constrain
    )[..., 1]
    assert x.mean().item() == pytest.approx(0.8, abs=0.06)
    assert x.std().item() == pytest.approx(0.3, abs=0.04)


def test_known_pixels_get_the_noise_of_sigma_and_none_at_zero():
    truth = torch.full((3000, 1, 1, 2), 1.0)
    x = torch.full((3000, 1, 1, 2), 7.0)
    constrain = ncsn.keep_known(truth, torch.tensor([True, False]), gen(1))
    first = constrain(x, 2.0)
    assert torch.equal(first[..., 1], x[..., 1])
    noise = first[..., 0] - 1
    assert noise.std().item() == pytest.approx(2, rel=0.05)
    assert noise.mean().abs() < 0.2
    assert not torch.equal(constrain(x, 2.0)[..., 0], first[..., 0])
    assert torch.equal(constrain(x, 0.0)[..., 0], truth[..., 0])


# ----------------------------------------------------------------------------------------- training


def harmonic(n):
    """1 + 1/2 + ... + 1/n, nearly ln n + 0.577."""
    return sum(1 / k for k in range(1, n + 1))


def averaged(share, steps):
    """How much of each step's weights is in the average: (1 + steps,), first the initial weights.

    At step s the weights of the network are the unit vector s + 1, so the average tells of each.
    """
    unit = torch.eye(steps + 1, dtype=torch.float64)
    ema = nn.ParameterList([nn.Parameter(unit[0].clone()), nn.Parameter(unit[0].clone())])
    for step in range(steps):
        net = nn.ParameterList([nn.Parameter(unit[step + 1].clone()) for _ in range(2)])
        ncsn.update_ema(ema, net, step, share)
        assert all(torch.equal(p.data, unit[step + 1]) for p in net)
    assert torch.equal(ema[0], ema[1])
    return ema[0].detach()


@pytest.mark.parametrize("share", [0.05, 0.5, 2.0])
def test_ema_weighs_the_steps_as_its_closed_form_says(share):
    """Weights older than step m keep 2^-((H(n) - H(m)) / share) after n steps, H(n) = 1 + ... 1/n.

    Differences of H are nearly those of ln, so this is about (m / n)^(ln 2 / share).
    """
    n = 300
    weights = averaged(share, n)
    older = [0.5 ** ((harmonic(n) - harmonic(m)) / share) for m in range(n + 1)]
    assert weights.cumsum(0).tolist() == pytest.approx(older, rel=1e-9)
    power = math.log(2) / share
    for m in 100, 200, 250:
        assert older[m] == pytest.approx((m / n) ** power, rel=0.05)
    density = weights[201] / weights[101]
    assert density.item() == pytest.approx(2 ** (power - 1), rel=0.1)


def test_half_life_of_the_ema_is_a_share_of_the_steps_so_far():
    weights = averaged(0.05, 600)
    assert weights[-30:].sum().item() == pytest.approx(0.5, abs=0.02)  # 5 % of 600
    assert weights[:300].sum() < 1e-3  # a long memory would keep them


@pytest.mark.parametrize("total", [1, 2, 19, 100, 2000, 19500, 10**6])
def test_learning_rate_warms_up_linearly_and_falls_to_zero(total):
    warmup = min(500, max(1, total // 20))
    steps = range(min(total, 3000))
    factors = [ncsn.warmup_cosine(step, total) for step in steps]
    linear = [(step + 1) / warmup for step in range(warmup - 1)]
    assert factors[: warmup - 1] == pytest.approx(linear)
    cosine = [(1 + math.cos(math.pi * step / total)) / 2 for step in steps]
    assert factors[warmup:] == pytest.approx(cosine[warmup:])
    assert 0.99 < max(factors) <= 1
    assert min(factors) > 0
    assert ncsn.warmup_cosine(total, total) == pytest.approx(0, abs=1e-12)


class Zero(nn.Module):
    """In the place of a ScoreNet: guesses 0, and remembers what it saw."""

    sigma_data = 0.5
    sigma_max = 80.0

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, y, sigma):
        self.y = y
        self.sigma = sigma
        return self.gain * y


def test_training_step_shows_each_image_with_noise_of_its_own_size():
    net = Zero()
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    images = torch.full((1000, 1, 4, 4), 192, dtype=torch.uint8)
    for focus in 0.6, 3.0:
        loss = ncsn.training_step(net, [optimizer], images, focus, gen())
        assert net.sigma.shape == (1000,)
        assert net.sigma.median().item() == pytest.approx(focus * 0.5, rel=0.02)
        z = (net.y - 0.5) / net.sigma[:, None, None, None]  # 192 is 0.5
        few = z[net.sigma > 0.1]  # with less, the draw from the bin is not small
        assert few.std().item() == pytest.approx(1, abs=0.03)
        assert abs(few.mean().item()) < 0.03
        weight = 1 / net.sigma**2 + 1 / 0.5**2
        assert loss.item() == pytest.approx((0.504**2 * weight).mean().item(), rel=0.01)


def test_training_step_lowers_the_loss_of_fixed_images():
    images = clusters(4, 4, 4, 4)
    sigma_data, sigma_max = ncsn.measure(images)
    net = network(fresh=True, sigma_data=sigma_data, sigma_max=sigma_max)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    losses = [ncsn.training_step(net, [optimizer], images, generator=gen()) for _ in range(12)]
    for loss in losses:
        assert loss.shape == ()
        assert loss.grad_fn is None
        assert not loss.requires_grad
    assert losses[0].item() == pytest.approx(1, abs=0.25)  # before the step, of a fresh network
    assert losses[-1] < 0.8 * losses[0]
    assert losses[-1] < losses[5] < losses[0]


def norm_of_gradients_of_two_steps(sigma_data):
    """Of the same network with the same draws, so they should be equal."""
    net = network(fresh=True, sigma_data=sigma_data, sigma_max=5.0)
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    norms = []
    for _ in range(2):
        ncsn.training_step(net, [optimizer], random_bytes(16, 3, 4, 4), generator=gen())
        norms.append(nn.utils.get_total_norm([p.grad for p in net.parameters()]).item())
    return norms


def test_training_step_forgets_old_gradients_and_clips_large_ones_to_norm_one():
    first, second = norm_of_gradients_of_two_steps(sigma_data=0.5)
    assert 0.05 < first < 0.5
    assert second == pytest.approx(first, rel=1e-4)
    first, second = norm_of_gradients_of_two_steps(sigma_data=0.001)  # the loss is about 10^5
    assert first == second == pytest.approx(1, rel=1e-3)


# ------------------------------------------------------------------------------------------- pixels


def test_quantise_inverts_dequantise_over_the_whole_of_each_bin():
    values = torch.arange(256, dtype=torch.uint8).expand(2000, 256)
    x = ncsn.dequantise(values, gen())
    assert (ncsn.quantise(x) != values).float().mean() < 1e-4  # fp32 rounds 255.999999 to 256
    middles = (torch.arange(256) + 0.5) / 128 - 1
    assert (x.mean(0) - middles).abs().max() < 3e-4
    assert (x.std(0) / SIGMA_MIN - 1).abs().max() < 0.08
    assert torch.equal(x, ncsn.dequantise(values, gen()))
    assert not torch.equal(x, ncsn.dequantise(values, gen(1)))


@pytest.mark.parametrize(
    ("noise", "lowest", "highest"),
    [(0.0, -1, 1 - 2 / 256), (1 - 2**-16, -1 + 2 / 256, 1)],
    ids=["lower end of the bins", "upper end"],
)
def test_quantise_inverts_dequantise_at_the_ends_of_the_bins(noise, lowest, highest, monkeypatch):
    def rand(shape, **options):
        return torch.full(shape, noise)

    monkeypatch.setattr(torch, "rand", rand)
    values = torch.arange(256, dtype=torch.uint8)
    x = ncsn.dequantise(values)
    assert torch.equal(ncsn.quantise(x), values)
    assert x[0].item() == pytest.approx(lowest, abs=1e-6)
    assert x[-1].item() == pytest.approx(highest, abs=1e-6)
    assert x.min() >= -1
    assert x.max() < 1


def test_quantise_takes_values_beyond_the_range_to_its_ends():
    wild = torch.tensor([-70.0, -1.001, 1.0, 1.5, 70.0])
    assert ncsn.quantise(wild).tolist() == [0, 0, 255, 255, 255]


# ------------------------------------------------------------------------------------------ network


@pytest.mark.parametrize("sigma", [SIGMA_MIN, 0.1, 1.0, 90.0])
def test_preconditioning_keeps_input_and_target_of_f_at_mean_square_one(sigma):
    """c_in, c_skip and c_out, and that the loss is the squared error of F."""
    net = frozen(sigma_data=0.4)
    seen = {}

    def f(x, ln_sigma):
        seen["x"] = x
        seen["ln sigma"] = ln_sigma
        return torch.full_like(x, seen["output"])

    net.F = f
    x = 0.4 * randn(200, 3, 8, 8)
    y = x + sigma * randn(200, 3, 8, 8, seed=2)
    seen["output"] = 0.0
    of_zero = net(y, sigma)
    assert seen["x"].square().mean().item() == pytest.approx(1, abs=0.03)
    assert torch.allclose(seen["ln sigma"], torch.full((200,), sigma).log(), atol=1e-5)
    seen["output"] = 1.0
    c_out = (net(y, sigma) - of_zero).double().mean().item()
    assert c_out == pytest.approx(sigma * 0.4 / math.hypot(sigma, 0.4), rel=1e-3)
    target = (x - of_zero) / c_out
    assert target.square().mean().item() == pytest.approx(1, abs=0.03)
    # c_skip y is the best guess that is linear in y, so its error has nothing of y in it.
    assert abs((target * seen["x"]).mean().item()) < 0.03

    seen["output"] = 0.5
    level = torch.full((200,), sigma)
    loss = ncsn.denoising_loss(net, x, level, 0.4, gen(2))
    seen["output"] = 0.0
    less = ncsn.denoising_loss(net, x, level, 0.4, gen(2))
    assert torch.allclose(less.mean(), torch.tensor(1.0), atol=0.03)
    # E (1/2 - target)^2 = 1/4 + 1, as the mean of the target is 0
    assert loss.mean().item() == pytest.approx(1.25, abs=0.04)


@pytest.mark.parametrize("sigma", [0.05, 0.7, 30.0])
def test_score_is_tweedies_formula(sigma):
    net = frozen(sigma_data=0.4)
    x = randn(3, 3, 8, 8)
    expected = (net(x, sigma) - x).double() / sigma**2
    assert torch.allclose(net.score(x, sigma).double(), expected, rtol=1e-4, atol=1e-4)


def test_sigma_is_a_number_or_a_tensor_of_one_or_of_many():
    net = frozen()
    x = randn(3, 3, 8, 8)
    for function in net, net.score:
        result = function(x, 0.7)
        assert result.shape == x.shape
        assert torch.equal(function(x, torch.tensor(0.7)), result)
        assert torch.equal(function(x, torch.tensor(0.7, dtype=torch.float64)), result)
        assert torch.equal(function(x, torch.tensor([0.7])), result)
        assert torch.equal(function(x, torch.full((3,), 0.7)), result)
        assert torch.equal(function(x, 2), function(x, 2.0))


def test_images_of_a_batch_do_not_see_each_other():
    net = frozen()
    x = randn(3, 3, 8, 8)
    sigma = torch.tensor([0.05, 0.7, 30.0])
    images = net(x, sigma)
    scores = net.score(x, sigma)
    for i, level in enumerate(sigma.tolist()):
        one = x[i : i + 1]
        assert torch.allclose(images[i : i + 1], net(one, level), atol=1e-5)
        error = scores[i : i + 1] - net.score(one, level)
        assert (level**2 * error).abs().max() < 1e-5


def test_every_layer_and_sigma_itself_matter():
    net = network(mults=(1, 2, 2))
    x = randn(2, 3, 8, 8)
    low = net.F(x, torch.full((2,), math.log(0.3)))
    high = net.F(x, torch.full((2,), -math.log(0.3)))  # as far from 0: cosines would not tell
    assert (low - high).abs().max() > 0.01
    (low * x).sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any(), name
        if p.ndim > 1:  # each output by itself: gains as well as biases
            assert p.grad.flatten(1).any(1).all(), name


def test_bf16_stays_inside_f():
    """A bf16 skip would cost 0.4 % of x, which the score magnifies by 1 / sigma^2."""
    x = 90 * randn(2, 3, 8, 8)
    sigma = torch.tensor([90.0, 0.01])
    rough = frozen(fresh=True, amp=True)
    assert torch.equal(frozen(fresh=True)(x, sigma), rough(x, sigma))  # F = 0 in any precision
    assert rough(x, sigma).dtype == torch.float32
    assert rough.score(x, sigma).dtype == torch.float32
    assert not torch.equal(frozen()(x, sigma), frozen(amp=True)(x, sigma))

    def ones_in_bf16(x, ln_sigma):
        return torch.ones_like(x, dtype=torch.bfloat16)

    rough.F = ones_in_bf16
    c_skip = 0.5**2 / (0.5**2 + sigma.double() ** 2)
    c_out = sigma.double() * c_skip.sqrt()
    expected = c_skip[:, None, None, None] * x + c_out[:, None, None, None]
    assert torch.allclose(rough(x, sigma).double(), expected, rtol=1e-5)


def test_size_of_the_network():
    with torch.device("meta"):
        large = ncsn.ScoreNet()
        small = ncsn.ScoreNet(width=32, mults=(1, 2, 3), blocks=(1,))
    assert 27e6 < sum(p.numel() for p in large.parameters()) < 35e6
    assert sum(p.numel() for p in small.parameters()) <= 1.26e6


@pytest.mark.parametrize("mults", [(1,), (1, 2), (1, 1, 2, 2), (2, 1, 3)])
def test_network_has_as_many_resolutions_as_mults(mults):
    x = randn(2, 3, 16, 16)
    assert frozen(mults)(x, torch.tensor([0.1, 9.0])).shape == x.shape


@pytest.mark.parametrize("width", [2, 4, 20, 100, 200, 256])
def test_any_width_has_equal_heads_and_large_groups(width):
    with torch.device("meta"):
        net = ncsn.ScoreNet(width=width, mults=(1, 1), blocks=(1,))
        x = torch.zeros(2, 3, 4, 4)
        assert net.F(x, torch.ones(2)).shape == x.shape
    for part in net.modules():
        if isinstance(part, ncsn.Attention):
            assert part.heads <= max(1, width // 64)
        if isinstance(part, nn.GroupNorm):
            assert part.num_channels // part.num_groups >= min(width, 16)


def test_attention_is_at_the_depths_asked_for_and_in_the_middle():
    for depths, expected in ((), 1), ((1,), 3), ((0, 1), 5):  # on the way down and up
        net = frozen((1, 2), attention=depths)
        found = [part for part in net.modules() if isinstance(part, ncsn.Attention)]
        assert len(found) == expected
        x = randn(2, 3, 8, 8)
        assert net(x, 1.0).shape == x.shape


@pytest.mark.parametrize("channels, heads", [(16, 1), (128, 2)])
def test_attention_is_that_of_torch(channels, heads):
    torch.manual_seed(0)
    attention = ncsn.Attention(channels).requires_grad_(False)
    reference = nn.MultiheadAttention(channels, heads, batch_first=True).requires_grad_(False)
    parts = attention.query, attention.key, attention.value
    for layer in *parts, attention.out:
        layer.weight.normal_(std=0.1)
        layer.bias.normal_()
    reference.in_proj_weight.copy_(torch.cat([layer.weight for layer in parts]))
    reference.in_proj_bias.copy_(torch.cat([layer.bias for layer in parts]))
    reference.out_proj.load_state_dict(attention.out.state_dict())
    x = randn(2, channels, 3, 4)
    h = attention.norm(x).flatten(2).mT
    expected = (x + reference(h, h, h)[0].mT.unflatten(2, (3, 4))) / math.sqrt(2)
    assert torch.allclose(attention(x), expected, atol=1e-4)


def test_blocks_are_as_many_at_each_resolution_as_asked_for():
    """The last number is that of all resolutions below, too."""
    for blocks, expected in ((2,), [2, 2, 2]), ((1, 3), [1, 3, 3]), ((3, 1, 2), [3, 1, 2]):
        net = ncsn.ScoreNet(width=4, mults=(1, 1, 1), blocks=blocks)
        assert [len(stage) for stage in net.down] == expected
        assert [len(stage) for stage in net.up] == expected[::-1]
        assert net(randn(1, 3, 8, 8), 1.0).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 64)])
def test_network_trains_and_samples_images_of_another_size(shape):
    images = random_bytes(4, *shape)
    sigma_data, sigma_max = ncsn.measure(images)
    net = network((1, 2, 2), True, sigma_data=sigma_data, sigma_max=sigma_max, channels=shape[0])
    before = copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    loss = ncsn.training_step(net, [optimizer], images, generator=gen())
    assert loss.item() == pytest.approx(1, abs=0.3)
    pairs = zip(net.parameters(), before.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    z = randn(2, *shape)
    for name, freshness in SAMPLERS:
        levels = ladder(sigma_max, SIGMA_MIN, 3)
        x = run(name, freshness, net.score, sigma_max * z, levels, repeats=1)
        assert x.shape == z.shape
        assert x.isfinite().all()
    assert ncsn.quantise(x).dtype == torch.uint8


@pytest.mark.parametrize("size", [(30, 28), (28, 30), (7, 7)])
def test_size_that_cannot_be_halved_is_one_clear_error(size):
    net = network((1, 2, 2))
    images = random_bytes(2, 3, *size)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    message = f"^{size[0]}x{size[1]} pixels cannot be halved 2 times$"
    with pytest.raises(ValueError, match=message):
        net(images / 255, 1.0)
    with pytest.raises(ValueError, match=message):
        net.score(images / 255, 1.0)
    with pytest.raises(ValueError, match=message):
        ncsn.training_step(net, [optimizer], images)
    with pytest.raises(ValueError, match=message):
        ncsn.heun(net.score, images / 255, [1.0, 0.1])


# ------------------------------------------------------------------------------- sampling by a net


@every_sampler
def test_sampling_is_a_function_of_the_seed_and_leaves_the_mode_alone(name, freshness):
    net = network(sigma_max=0.004)
    args = SimpleNamespace(sampler=name, freshness=freshness)
    z = randn(2, 3, 4, 4)
    ends = []
    for mode, seed in (True, 5), (False, 5), (False, 6):
        net.train(mode)
        ends.append(ncsn.sample(args, net, z, generator=gen(seed)))
        assert all(part.training == mode for part in net.modules())
    assert ends[0].isfinite().all()
    assert torch.equal(ends[0], ends[1])
    without_new_noise = name == "heun" or freshness == 0
    assert torch.equal(ends[1], ends[2]) == without_new_noise


@pytest.mark.parametrize("name", ["langevin", "consistent", "heun", "bits_per_dim"])
def test_sampling_and_bits_leave_no_graph_and_no_gradients(name):
    net = network()
    for p in net.parameters():
        p.grad = torch.full_like(p, 7.0)
    x = randn(2, 3, 4, 4).requires_grad_()
    levels = [2.0, 0.5, 0.1]
    if name == "bits_per_dim":
        result = ncsn.bits_per_dim(net.score, x, levels, gen())
    else:
        result = run(name, 1.0, net.score, x, levels)
    assert not result.requires_grad
    assert result.grad_fn is None
    assert x.grad is None
    assert torch.is_grad_enabled()
    for p in net.parameters():
        assert p.requires_grad
        assert (p.grad == 7).all()


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (3, 1, 4, 6), (1, 2, 1, 5)])
def test_loss_samplers_and_bits_take_any_shape(shape):
    x = randn(*shape)
    levels = ladder(10, 0.01, 5)
    for name, freshness in SAMPLERS:
        assert run(name, freshness, gaussian(0.5), 10 * x, levels).shape == shape
    loss = ncsn.denoising_loss(GaussianNet(0.5, 0.5, 10.0), x, torch.ones(len(x)), 0.5)
    assert loss.shape == shape[:1]
    assert ncsn.bits_per_dim(gaussian(0.5), x, levels).shape == shape[:1]
