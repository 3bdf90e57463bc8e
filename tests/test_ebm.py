"""EBM's mathematics and network, on the real functions, against densities known in closed form."""

import copy
import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import ebm

YES = torch.tensor(True)
NO = torch.tensor(False)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=1, dtype=torch.float32):
    return torch.rand(shape, generator=gen(seed), dtype=dtype)


def randn(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=gen(seed), dtype=dtype)


def rand_bytes(*shape, seed=1):
    return torch.randint(256, shape, generator=gen(seed), dtype=torch.uint8)


def quadratic(c, mean=0.5):
    """The energy c / 2 |x - mean|^2."""

    def energy(x):
        return c / 2 * (x - mean).square().flatten(1).sum(1)

    return energy


class Gaussian(nn.Module):
    """The energy c / 2 |x - mean|^2, with both to learn."""

    def __init__(self, c, mean):
        super().__init__()
        self.c = nn.Parameter(torch.tensor(c))
        self.mean = nn.Parameter(torch.tensor(mean))

    def forward(self, x):
        return quadratic(self.c, self.mean)(x)


def layers(net, kind):
    return [layer for layer in net.modules() if isinstance(layer, kind)]


def network(seed=0, kind=ebm.EnergyNet, **options):
    """A small network whose energy is not flat."""
    torch.manual_seed(seed)
    net = kind(**{"width": 8, "mults": (1, 2), "blocks": 1, **options})
    for layer in layers(net, nn.Conv2d):
        if not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.1)
    return net


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def weights(net):
    return {name: value.detach().clone() for name, value in net.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def adam(net, lr=1e-3):
    return torch.optim.Adam(net.parameters(), lr, betas=(0.0, 0.999), fused=True)


def idle(net):
    """Names of the parameters that got no gradient."""
    return [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]


def remember(buffer, gaps):
    """Let the buffer keep these gaps, and the chains that it has."""
    slots = torch.arange(1)
    for gap in gaps:
        buffer.put(slots, buffer.chains[slots].float(), torch.tensor(gap), YES)


def sorted_gaps(buffer):
    return buffer.gaps.sort().values.clone()


class Calls:
    """The arguments of each call of a function of ebm, by name, which does what it always does.

    random: the generator's state before each call.
    """

    def __init__(self, monkeypatch, name, generator=None):
        self.real = getattr(ebm, name)
        self.generator = generator or gen()
        self.arguments = []
        self.random = []
        monkeypatch.setattr(ebm, name, self)

    def __call__(self, *arguments, **options):
        bound = inspect.signature(self.real).bind(*arguments, **options)
        self.arguments.append(bound.arguments)
        self.random.append(self.generator.get_state())
        return self.real(*arguments, **options)


# ------------------------------------------------------------------------------------------ sampler


@pytest.mark.parametrize("h", [0.05, 0.5, 1.5])
def test_langevin_is_exact_where_energy_curves_as_1(h):
    """The 2 h T of small steps would leave a variance of T / (1 - h / 2) in place of T."""
    t = 0.02
    start = 0.5 + randn(20_000, 1)
    x, _ = ebm.langevin(quadratic(1.0), start, 100, h, t, gen())
    assert x.var().item() == pytest.approx(t, rel=0.04)
    assert abs(x.mean() - 0.5) < 0.01


def test_langevin_samples_the_density_of_its_temperature():
    """Of a double well, by numerical integration: exp(-E / T)."""
    step, t = 0.02, 0.02
    grid = torch.linspace(-1, 2, 2001, dtype=torch.float64)

    def energy(x):
        wells = (x - 0.3).square() * (x - 0.75).square()
        return 10 * wells.flatten(1).sum(1) + 0.02 * x.sum(1)

    p = torch.exp(-energy(grid[:, None]) / t)
    x, _ = ebm.langevin(energy, rand(4000, 1), 2000, step, t, gen())
    for power in 1, 2:
        due = (p * grid**power).sum() / p.sum()
        assert abs(x.double().pow(power).mean() - due) < 0.015
    wrong = p**2
    assert abs(x.var() - ((wrong * grid**2).sum() / wrong.sum())) > 0.02


def cubic(x):
    """The energy sum x^3 - 2 prod x."""
    return (x**3).flatten(1).sum(1) - 2 * x.flatten(1).prod(1)


def cubic_gradient(x):
    flat = x.flatten(1)
    columns = []
    for i in range(flat.shape[1]):
        others = torch.cat([flat[:, :i], flat[:, i + 1 :]], dim=1).prod(1)
        columns.append(3 * flat[:, i] ** 2 - 2 * others)
    return torch.stack(columns, dim=1).view_as(x)


def test_langevin_step_by_step_as_written():
    x = rand(3, 2, 4)
    energies_at_start = cubic(x)
    chain = []

    def constrain(x, sigma):
        chain.append(x)
        assert sigma == pytest.approx(0.2)
        return x

    end, e_start = ebm.langevin(cubic, x, 5, 0.1, 0.04, gen(), constrain)
    assert torch.allclose(e_start, energies_at_start)
    assert len(chain) == 5
    g = gen()
    for after in chain:
        z = torch.randn(x.shape, generator=g)
        x = x - 0.1 * cubic_gradient(x) + math.sqrt(0.1 * 1.9 * 0.04) * z
        assert torch.allclose(after, x, atol=1e-5)
    assert torch.equal(end, chain[-1])


def test_no_steps_change_nothing():
    x = rand(3, 2, 4)
    end, e_start = ebm.langevin(cubic, x, 0, 0.3, 0.2)
    assert torch.equal(end, x)
    assert e_start.tolist() == [0, 0, 0]


def test_the_next_step_starts_from_what_constrain_returns():
    def constrain(x, sigma):
        return torch.where(torch.tensor([True, False]), 0.25, x)

    start = torch.full((1, 2), 0.5)
    x, _ = ebm.langevin(cubic, start, 2, 0.1, 0.0, constrain=constrain)
    once = 0.5 - 0.1 * (3 * 0.5**2 - 2 * 0.5)
    twice = once - 0.1 * (3 * once**2 - 2 * 0.25)
    assert torch.allclose(x, torch.tensor([[0.25, twice]]))


def test_descending_shrinks_noise_around_an_image_as_much_as_sigma():
    """From sigma to the first sigma (1 - h)^k that is not above `end`, along a straight line."""
    seen = []

    def constrain(y, sigma):
        seen.append(sigma)
        return y

    z = randn(2, 3)
    y = ebm.descend(quadratic(1.0, 0.3), 0.3 + 2 * z, 2.0, 0.1, 0.06, constrain)
    count = math.ceil(math.log(0.06 / 2) / math.log(0.9))
    assert seen == pytest.approx([2 * 0.9 ** (k + 1) for k in range(count)])
    assert 0.054 < seen[-1] <= 0.06
    assert torch.allclose(y, 0.3 + seen[-1] * z, atol=1e-6)


def test_energy_and_gradient_are_the_analytic_ones():
    x = rand(3, 2, 4, dtype=torch.float64)
    e, grad = ebm.energy_and_gradient(cubic, x)
    assert torch.allclose(e, cubic(x))
    assert torch.allclose(grad, cubic_gradient(x))
    assert not x.requires_grad


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("mode", [True, False])
def test_nothing_of_the_network_or_the_caller_changes_while_sampling(mode, fails):
    """Weights, mode, requires_grad, gradients, the start."""
    net = network().train(mode)
    x = rand(2, 3, 8, 8)
    before, start = state(net), x.clone()
    steps = []

    def constrain(x, sigma):
        steps.append(x)
        if fails and len(steps) == 2:
            raise InterruptedError
        return x

    try:
        end, _ = ebm.langevin(net, x, 3, 0.1, 0.004, gen(), constrain)
        assert not fails
        assert not torch.equal(end, start)
    except InterruptedError:
        assert fails
    assert same(before, state(net))
    assert torch.equal(x, start)
    assert not x.requires_grad
    assert all(layer.training == mode for layer in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("grad", [True, False])
def test_sampling_needs_no_no_grad_and_does_not_mind_it(grad):
    net = network()
    x = rand(2, 3, 8, 8)
    settings = ebm.Settings()
    enabled = []

    def constrain(x, sigma):
        enabled.append(torch.is_grad_enabled())
        return x

    with torch.set_grad_enabled(grad):
        energy, gradient = ebm.energy_and_gradient(net, x)
        end, e_start = ebm.langevin(net, x, 2, 0.1, 0.004, constrain=constrain)
        walked, _ = settings.walk(net, x, 2, gen())
        results = [energy, gradient, end, e_start, walked]
        results.append(ebm.denoise(net, x))
        results.append(ebm.descend(net, x, 1.0, 0.1, 0.5))
        results.append(ebm.draw(net, x, settings, 2, gen()))
        assert torch.is_grad_enabled() == grad
    assert not any(result.requires_grad for result in results)
    assert enabled == [False, False]
    assert gradient.any()


def test_images_of_a_batch_do_not_see_each_other():
    """The mean over the batch for its sum would divide the gradient of each by the batch."""
    net = network()
    x = rand(8, 3, 8, 8)
    e, grad = ebm.energy_and_gradient(net, x)
    e_alone, grad_alone = ebm.energy_and_gradient(net, x[:1])
    assert torch.allclose(e[:1], e_alone, atol=1e-6)
    assert torch.allclose(grad[:1], grad_alone, rtol=1e-4, atol=1e-8)
    assert grad_alone.any()
    ends = []
    for batch in x, x[:1]:
        end, _ = ebm.langevin(net, batch, 2, 0.5, 0.0)
        ends.append(end[:1])
    assert torch.allclose(*ends, atol=1e-6)
    assert not torch.allclose(ends[0], x[:1], atol=1e-4)


class CountFlops(TorchDispatchMode):
    total = 0

    def __torch_dispatch__(self, operation, kinds, arguments=(), options=None):
        out = operation(*arguments, **options or {})
        kind = operation.overloadpacket
        if kind in flop_registry:
            self.total += flop_registry[kind](*arguments, **options or {}, out_val=out)
        return out


def test_a_langevin_step_costs_two_forwards():
    """Three, if the weights had gradients."""
    net = network(width=16, mults=(1, 2, 4), blocks=2)
    x = rand(2, 3, 32, 32)
    with CountFlops() as forward, torch.no_grad():
        net(x)
    with CountFlops() as step:
        ebm.langevin(net, x, 1, 0.1, 0.004)
    assert 1.9 < step.total / forward.total <= 2.2


# ------------------------------------------------------------------------- settings and taking off


def test_walk_is_langevin_with_the_settings():
    settings = ebm.Settings(step_size=0.3, smooth=0.2)
    x = rand(3, 2, 4)

    def constrain(x, sigma):
        return x.round(decimals=2)

    walked = settings.walk(cubic, x, 4, gen(), constrain)
    due = ebm.langevin(cubic, x, 4, 0.3, 0.04, gen(), constrain)
    assert torch.equal(walked[0], due[0])
    assert torch.equal(walked[1], due[1])
    assert torch.equal(walked[0], walked[0].round(decimals=2))


@pytest.mark.parametrize("sigma", [0.03, 0.2, 3.0])
def test_denoise_finds_the_best_guess_of_a_gaussian(sigma):
    """x ~ N(m, v), y = x + sigma z, E = -sigma^2 ln p(y): mean(x | y) is known."""
    m, v = 0.2, 0.01
    y = 3 * rand(9, 1) - 1
    best = ebm.denoise(quadratic(sigma**2 / (v + sigma**2), m), y)
    assert torch.allclose(best, m + v / (v + sigma**2) * (y - m), atol=1e-5)


def test_draw_descends_walks_and_takes_the_noise_off():
    settings = ebm.Settings(step_size=0.1, sigma_max=3.0, smooth=0.5)
    energy = quadratic(0.5, 0.9)
    z = randn(30, 2, 4)
    descended = ebm.descend(energy, 3 * z, 3.0, 0.1, 0.5)
    walked, _ = settings.walk(energy, descended, 3, gen())
    due = walked - 0.5 * (walked - 0.9)
    assert 0 < (due.abs() > 1).float().mean() < 0.5  # samples are in [-1, 1] all the same
    drawn = ebm.draw(energy, z, settings, 3, gen())
    assert torch.allclose(drawn, due.clamp(-1, 1), atol=1e-5)


def test_descending_is_guided_except_in_much_or_little_noise():
    """By E and E_early with slopes x - 0.5 and 3 (x - 0.5), at strength 1.5: together 0."""
    guided_energy = ebm.guide(quadratic(1.0), quadratic(3.0), 1.5)
    x = randn(5, 3)
    assert torch.allclose(guided_energy(x), torch.zeros(5), atol=1e-5)
    for sigma, guided in (4.0, False), (2.1, False), (1.9, True), (0.31, True), (0.29, False):
        y = ebm.descend(quadratic(1.0), x, sigma, 0.1, 0.95 * sigma, guided_energy=guided_energy)
        assert torch.allclose(y, x if guided else x - 0.1 * (x - 0.5), atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 1.8])
def test_draw_asks_the_early_energy_if_there_is_guidance(guidance):
    settings = ebm.Settings(sigma_max=5.0, guidance=guidance)
    count = 0

    def early(x):
        nonlocal count
        count += 1
        return quadratic(0.9)(x)

    z = randn(4, 2, 4)
    x = ebm.draw(quadratic(1.0), z, settings, early=early)
    if guidance == 1:
        assert count == 0
        assert torch.equal(x, ebm.draw(quadratic(1.0), z, settings))
    else:
        assert count == sum(0.3 <= 5 * 0.9**k <= 2 for k in range(60)) == 18


def test_chains_rest_with_noise_of_std_smooth_in_a_bowl():
    """That curves as 1, at the temperature smooth^2."""
    settings = ebm.Settings(smooth=0.03)
    x, _ = settings.walk(quadratic(1.0, 0.4), torch.full((20_000, 1), 0.4), 100, gen())
    assert x.std().item() == pytest.approx(0.03, rel=0.02)
    assert x.mean().item() == pytest.approx(0.4, abs=0.001)
    assert (ebm.denoise(quadratic(1.0, 0.4), x) - 0.4).abs().max() < 1e-5


# ------------------------------------------------------------------------ contrastive divergence


@pytest.mark.parametrize("margin, counting", [(100.0, 7), (0.02, 2)])
def test_terms_and_gradients_of_contrastive_divergence_are_the_analytic_ones(margin, counting):
    """Chains that are higher than the mean of data by more than the margin do not count."""
    energy = Gaussian(3.0, 0.4).double()
    data = rand(5, 1, dtype=torch.float64)
    chains = rand(7, 1, seed=2, dtype=torch.float64)
    unit = 0.5
    gap, e_data, e_chains = ebm.contrastive_divergence(energy, data, chains, unit, margin)
    due_data = 1.5 * (data - 0.4).square().flatten() / unit
    due_chains = 1.5 * (chains - 0.4).square().flatten() / unit
    assert torch.allclose(e_data, due_data)
    assert torch.allclose(e_chains, due_chains)
    counts = due_chains < due_data.mean() + margin
    assert counts.sum() == counting
    share = counts.double().mean()
    due = share * due_data.mean() - (counts * due_chains).mean()
    assert gap.item() == pytest.approx(due.item())
    gap.backward()
    means = share * data.mean() - (counts * chains[:, 0]).mean()
    assert energy.mean.grad.item() == pytest.approx(-3 * means.item() / unit)
    assert energy.c.grad.item() == pytest.approx(gap.item() / 3)


def test_one_step_downhill_lowers_the_gap_and_nothing_reaches_the_chains():
    net = network()
    data = rand(6, 3, 8, 8) / 2
    chains = rand(6, 3, 8, 8, seed=2).requires_grad_()
    optimizer = torch.optim.SGD(net.parameters(), 0.02)
    gaps = []
    for _ in range(2):
        optimizer.zero_grad()
        gap, *_ = ebm.contrastive_divergence(net, data, chains, 1.0, 1e9)
        gap.backward()
        optimizer.step()
        gaps.append(gap.item())
    assert gaps[1] < gaps[0]
    assert chains.grad is None


def test_both_batches_go_through_one_forward():
    calls = []

    def energy(x):
        calls.append(len(x))
        return x.sum(1)

    ebm.contrastive_divergence(energy, rand(3, 1), rand(3, 1), 1.0)
    assert calls == [6]


def test_contrastive_divergence_recovers_mean_and_temperature_over_variance():
    """Data N(.55, .07^2), T = 1e-3, K = 10 steps of persistent chains. As steps are finite, their
    variance h (2 - h) T / (1 - (1 - h c)^2) is the data's v not quite where c = T / v."""
    v, h, t = 0.0049, 0.2, 1e-3
    energy = Gaussian(0.5, 0.3)
    buffer = ebm.Buffer(torch.full((2000, 1), 166, dtype=torch.uint8))
    optimizer = torch.optim.Adam([{"params": [p]} for p in energy.parameters()], betas=(0.0, 0.99))
    g = gen(3)
    tail = []
    for step in range(500):
        for group, lr in zip(optimizer.param_groups, (8e-3, 5e-3), strict=True):
            group["lr"] = lr * (1 - step / 500)
        data = 0.55 + math.sqrt(v) * torch.randn(1000, 1, generator=g)
        slots, x = buffer.draw(len(data), 0.0, 1.0, g)
        x, _ = ebm.langevin(energy, x, 10, h, t, g)
        optimizer.zero_grad()
        gap, *_ = ebm.contrastive_divergence(energy, data, x, t, 1e9)
        gap.backward()
        optimizer.step()
        buffer.put(slots, x, gap.detach(), YES)
        tail.append((energy.c.item(), energy.mean.item()))
    c, mean = torch.tensor(tail[-100:]).mean(0).tolist()
    due = (1 - math.sqrt(1 - h * (2 - h) * t / v)) / h
    assert due == pytest.approx(0.1876, abs=0.001)
    assert t / v == pytest.approx(0.204, abs=0.001)
    assert c == pytest.approx(due, rel=0.03)
    assert mean == pytest.approx(0.55, abs=0.005)


# ------------------------------------------------------------------------------------- matching


def test_noise_in_training_is_logistic_and_stratified():
    sigma = ebm.sample_sigma(1000, 0.5, 1e-9, 1e9, gen())
    u = torch.sigmoid((sigma.double() / 0.5).log() / 0.8)
    assert ((u.sort().values * 1000).floor() == torch.arange(1000)).float().mean() > 0.99
    assert sigma.median().item() == pytest.approx(0.5, rel=0.01)
    quartiles = sigma.quantile(torch.tensor([0.25, 0.75]))
    assert torch.allclose(quartiles, torch.tensor([0.2, 1.2]), atol=0.02)
    assert (u[:-1] - u[1:]).abs().mean() > 0.2  # in no order
    clamped = ebm.sample_sigma(1001, 2.0, 0.2, 7.0, gen())
    assert clamped.min().item() == pytest.approx(0.2)
    assert clamped.max().item() == pytest.approx(7.0)
    assert clamped.median().item() == pytest.approx(2.0, rel=0.01)


def test_the_error_of_a_slope_is_that_of_the_guessed_image():
    """Over sigma^2 and over SIGMA_DATA^2, both."""
    x, z, slope = randn(3, 3, 2, 4, 4, dtype=torch.float64)
    sigma = torch.tensor([0.1, 0.5, 30.0], dtype=torch.float64).view(3, 1, 1, 1)
    error = ebm.matching_error(slope, z, sigma)
    guess = x + sigma * z - slope
    of_image = (guess - x).square().mean((1, 2, 3))
    due = of_image / sigma.flatten() ** 2 + of_image / ebm.SIGMA_DATA**2
    assert torch.allclose(error, due)
    assert ebm.matching_error(sigma * z, z, sigma).max() < 1e-20


@pytest.mark.parametrize("sigma", [0.05, 0.3, 3.0])
def test_the_best_slope_makes_the_best_guess_of_a_gaussian(sigma):
    """x ~ N(m, v): E = c / 2 (y - m)^2 has the least error at c = sigma^2 / (v + sigma^2), where
    y - grad E(y) is the mean of x given y. The error is a parabola in c."""
    v, m = 0.04, 0.6
    x = m + math.sqrt(v) * randn(200_000, 1, dtype=torch.float64)
    z = randn(200_000, 1, seed=2, dtype=torch.float64)
    y = x + sigma * z
    due = sigma**2 / (v + sigma**2)
    errors = []
    for c in 0.0, due, 2 * due:
        error = ebm.matching_error(c * (y - m), z, torch.full_like(x, sigma))
        errors.append(error.mean().item())
    low, middle, high = errors
    least = due + due * (low - high) / (2 * (low + high - 2 * middle))
    assert least == pytest.approx(due, rel=0.02)
    assert middle < min(low, high)


def test_the_matching_loss_is_as_written(monkeypatch):
    net = network()
    settings = ebm.Settings(smooth=0.1, focus=0.4, sigma_max=9.0)
    noise = Calls(monkeypatch, "sample_sigma")
    error = Calls(monkeypatch, "matching_error")
    x = rand(4, 3, 8, 8)
    loss = ebm.match_loss(net, x, settings, gen())
    (asked,) = noise.arguments
    assert (asked["count"], asked["median"]) == (4, 0.4)
    assert (asked["least"], asked["most"]) == (0.1, 9.0)
    (seen,) = error.arguments
    assert seen["z"].std().item() == pytest.approx(1, abs=0.1)
    _, slope = ebm.energy_and_gradient(net, x + seen["sigma"] * seen["z"])
    assert torch.allclose(seen["slope"], slope, atol=1e-5)
    due = error.real(slope, seen["z"], seen["sigma"]).mean()
    assert loss.item() == pytest.approx(due.item(), rel=1e-4)
    loss.backward()
    assert idle(net) == []
    assert not x.requires_grad


def test_to_learn_from_a_slope_it_is_differentiated_once_more():
    """The gradient of the matching loss in a weight is that of finite differences."""
    net = network(width=4, mults=(1,)).double()
    x = rand(2, 3, 4, 4, dtype=torch.float64)
    weight = net.down[0][0].conv1.weight
    ebm.match_loss(net, x, ebm.Settings(), gen()).backward()
    losses = []
    for change in 1e-5, -2e-5:
        with torch.no_grad():
            weight[1, 2, 0, 1] += change
        losses.append(ebm.match_loss(net, x, ebm.Settings(), gen()).item())
    assert weight.grad[1, 2, 0, 1].item() == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-3)


# -------------------------------------------------------------------------------- data and buffer


def test_quantise_inverts_dequantise_and_leaves_no_grid():
    values = torch.arange(256, dtype=torch.uint8).expand(2000, 256)
    x = ebm.dequantise(values, gen())
    assert (ebm.quantise(x) != values).float().mean() < 1e-4  # fp32 rounds 255.999999 to 256
    assert x.min() >= -1
    assert x.max() <= 1
    assert (x.mean(0) - ((torch.arange(256) + 0.5) / 128 - 1)).abs().max() < 4e-4
    assert (x.std(0) * math.sqrt(12) * 128 - 1).abs().max() < 0.08
    assert (x * 127.5 - (x * 127.5).round()).abs().mean() > 0.2  # a grid would tell data
    assert ebm.quantise(torch.tensor([-3.0, -1.0, 1.0, 7.0])).tolist() == [0, 0, 255, 255]


def some_chains(count, *shape):
    """A buffer of chains that all differ."""
    return ebm.Buffer(rand_bytes(count, *shape, seed=9))


def test_buffer_draws_without_replacement_from_slots_that_it_names():
    buffer = some_chains(50, 2, 4, 4)
    g = gen(1)
    before = state(buffer)
    slots, x = buffer.draw(20, 0.0, 2.0, g)
    assert len(slots.unique()) == 20
    assert x.dtype == torch.float32
    assert torch.equal(x, before["chains"][slots].float())
    assert same(before, state(buffer))
    drawn = [buffer.draw(20, 0.0, 2.0, g)[0] for _ in range(20)]
    assert len(torch.cat(drawn).unique()) == 50


def test_buffer_keeps_what_is_put_there_and_nothing_else_changes():
    buffer = some_chains(50, 2, 4, 4)
    remember(buffer, [float(i) for i in range(1, 101)])
    due = buffer.chains.clone()
    slots, _ = buffer.draw(20, 0.0, 2.0, gen(1))
    x = 1.5 * randn(20, 2, 4, 4, seed=5)  # beyond [-1, 1], too
    due[slots] = x.half()
    buffer.put(slots, x, torch.tensor(0.7), YES)
    assert torch.equal(buffer.chains, due)
    assert (due[slots].float() - x).abs().max() < 2e-3
    gaps = sorted_gaps(buffer)
    for value in 0.9, math.nan:
        wild = torch.full_like(x, math.nan)
        buffer.put(slots, wild, torch.tensor(value), NO)
        assert torch.equal(buffer.chains, due)
        assert torch.equal(sorted_gaps(buffer), gaps)


def test_buffer_keeps_the_last_hundred_gaps_of_good_steps():
    buffer = some_chains(3, 1)
    assert sorted_gaps(buffer).tolist() == [0.0] * 100
    remember(buffer, [5.0])
    assert sorted_gaps(buffer).tolist() == [0.0] * 99 + [5.0]
    remember(buffer, [float(i) for i in range(250)])
    assert sorted_gaps(buffer).tolist() == list(range(150, 250))


@pytest.mark.parametrize("fresh", [0.0, 0.05, 0.5])
def test_a_binomial_share_of_the_chains_starts_anew_in_noise(fresh):
    buffer = ebm.Buffer(rand_bytes(4000, 1, 2, 2))
    buffer.chains.fill_(7)
    g = gen(1)
    counts = []
    for _ in range(10):
        _, x = buffer.draw(1000, fresh, 3.0, g)
        old = (x == 7).flatten(1)
        assert torch.equal(old.all(1), old.any(1))
        counts.append((~old.all(1)).sum().item())
    sigma = math.sqrt(1000 * fresh * (1 - fresh))
    assert abs(sum(counts) - 10_000 * fresh) <= 4 * math.sqrt(10) * sigma
    spread = torch.tensor(counts).float().std()
    assert 0.4 * sigma <= spread <= 2 * sigma  # by chance, not so many each time, or all
    if fresh == 0.5:
        new = x[~old.all(1)]
        assert new.mean().item() == pytest.approx(0, abs=0.3)
        assert new.std().item() == pytest.approx(3, abs=0.3)
    assert (buffer.chains == 7).all()  # until they are written back


def test_the_state_of_a_buffer_can_be_kept():
    buffer = some_chains(300, 3, 8, 8)
    remember(buffer, [3.0, 4.0])
    other = ebm.Buffer(rand_bytes(300, 3, 8, 8, seed=4))
    other.load_state_dict(buffer.state_dict())
    assert torch.equal(sorted_gaps(other), sorted_gaps(buffer))
    drawn = [each.draw(9, 0.3, 2.0, gen(2)) for each in (buffer, other)]
    for ours, theirs in zip(*drawn, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (2, 12, 20)])
def test_decoys_are_few_flat_fields_of_their_mean_colours_or_two_images_at_once(shape):
    x = rand(400, *shape)
    y = ebm.decoys(x, gen())
    assert y.shape == x.shape
    mixed = torch.isclose(y, (x + x.roll(1, 0)) / 2).flatten(1).all(1)
    flat = (y == y[..., :1, :1]).flatten(1).all(1)
    assert mixed.float().mean().item() == pytest.approx(1 / 2, abs=0.07)
    assert flat.float().mean().item() == pytest.approx(1 / 8, abs=0.05)
    assert torch.allclose(y[flat][..., 0, 0], x[flat].mean((2, 3)), atol=1e-5)
    fields = torch.tensor([len(image[0].unique()) for image in y[~mixed]])
    assert set(fields.tolist()) <= {1, 4, 16, 63, 64}  # of random colours two may be alike
    assert len(fields.unique()) >= 4


# ---------------------------------------------------------------------------------- training step


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("stage", ebm.STAGES)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 64), (2, 12, 20)])
def test_images_of_any_channels_and_size_train_and_can_be_drawn(shape, stage, amp):
    torch.manual_seed(0)
    net = ebm.EnergyNet(width=4, mults=(1, 2, 2), blocks=1, channels=shape[0], amp=amp)
    images = rand_bytes(4, *shape)
    z = randn(4, *shape)
    settings = ebm.Settings(steps=2, smooth=0.4)  # E of these images is large, in units of T
    buffer = some_chains(6, *shape) if stage == "chains" else None
    for _ in range(2):
        ebm.training_step(net, [adam(net)], images, settings, "matching")
        terms = ebm.training_step(net, [adam(net)], images, settings, stage, buffer)
        assert terms["skipped"] == 0
        assert all(value.shape == () and value.isfinite() for value in terms.values())
        assert not any(value.requires_grad for value in terms.values())
    assert len(net(z).unique()) == 4
    assert all(p.isfinite().all() and p.requires_grad for p in net.parameters())
    drawn = ebm.draw(net, z, settings, 3)
    assert drawn.shape == z.shape
    assert (drawn.abs() <= 1).all()
    assert not torch.equal(drawn, z.clamp(-1, 1))


@pytest.mark.parametrize("shape, said", [((30, 32), "30x32"), ((32, 30), "32x30")])
def test_a_size_that_cannot_be_halved_often_enough_is_a_clear_error(shape, said):
    net = network(mults=(1, 2, 2))
    before = state(net)
    with pytest.raises(ValueError, match=f"{said} pixels cannot be halved 2 times"):
        net(rand(2, 3, *shape))
    with pytest.raises(ValueError, match=said):
        images = rand_bytes(2, 3, *shape)
        ebm.training_step(net, [adam(net)], images, ebm.Settings(), "matching")
    assert same(before, state(net))
    assert network(mults=(1, 2))(rand(2, 3, *shape)).shape == (2,)


def test_a_training_step_with_chains_is_as_written(monkeypatch):
    """One step of SGD down match + weight gap, of the data and chains that it has used."""
    net = network()
    twin = copy.deepcopy(net)
    net(rand(2, 3, 8, 8)).sum().backward()  # gradients of before do not count
    settings = ebm.Settings(steps=3, step_size=0.2, smooth=0.2, fresh=0.0, decoys=0.4, weight=50.0)
    g = gen()
    divergence = Calls(monkeypatch, "contrastive_divergence", g)
    matching = Calls(monkeypatch, "match_loss", g)
    walk = Calls(monkeypatch, "langevin", g)
    buffer = some_chains(20, 3, 8, 8)
    due_chains = buffer.chains.clone()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    images = rand_bytes(6, 3, 8, 8)
    terms = ebm.training_step(net, [optimizer], images, settings, "chains", buffer, g)

    # The chains go on from those of the buffer, which gets their ends.
    (walked,) = walk.arguments
    g.set_state(walk.random[0])
    ends, e_start = settings.walk(twin, walked["x"], 3, g)
    (diverged,) = divergence.arguments
    assert torch.allclose(diverged["chains"], ends, atol=1e-5)
    assert len(walked["x"]) == 6 + 3  # three more, for 0.4 * 6 decoys, which are not kept
    found = [(due_chains == x.half()).flatten(1).all(1).nonzero() for x in walked["x"]]
    assert [len(slots) for slots in found] == [1] * 6 + [0] * 3
    due_chains[torch.cat(found[:6])[:, 0]] = diverged["chains"][:6].half()
    assert torch.equal(buffer.chains, due_chains)

    unit = 0.2**2 * 3 * 8 * 8
    assert diverged["unit"] == pytest.approx(unit)
    gap, e_data, e_chains = divergence.real(twin, diverged["data"], ends, unit)
    (matched,) = matching.arguments
    g.set_state(matching.random[0])
    match = matching.real(twin, matched["x"], settings, g)
    loss = match + 50.0 * gap
    loss.backward()
    assert nn.utils.clip_grad_norm_(twin.parameters(), 1.0) > 1
    torch.optim.SGD(twin.parameters(), 0.1).step()
    after = state(net)
    for name, value in state(twin).items():
        assert torch.allclose(after[name], value, atol=1e-5), name

    due = {
        "E data": e_data.mean(),
        "E chains": e_chains.median(),
        "E start": e_start.median() / unit,
    }
    due.update({"gap": gap, "match": match, "train loss": loss, "skipped": torch.tensor(0.0)})
    assert terms.keys() == due.keys()
    for name, value in due.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
    assert len({round(value.item(), 6) for value in due.values()}) == len(due)
    remembered = sorted_gaps(buffer)[sorted_gaps(buffer) != 0]
    assert torch.equal(remembered, terms["gap"][None])


def test_data_get_noise_as_chains_have_and_matching_begins_at_clean_ones(monkeypatch):
    divergence = Calls(monkeypatch, "contrastive_divergence")
    matching = Calls(monkeypatch, "match_loss")
    settings = ebm.Settings(steps=1, smooth=0.1)
    net = network(channels=1)
    grey = torch.full((600, 1, 4, 4), 128, dtype=torch.uint8)
    ebm.training_step(net, [adam(net)], grey, settings, "chains", some_chains(600, 1, 4, 4), gen(1))
    data = divergence.arguments[0]["data"]
    assert data.mean().item() == pytest.approx(128.5 / 128 - 1, abs=0.005)
    assert data.std().item() == pytest.approx(0.1, rel=0.03)
    assert torch.equal(ebm.quantise(matching.arguments[0]["x"]), grey)


@pytest.mark.parametrize("decoys, count", [(0.0, 0), (0.001, 1), (0.5, 300)])
def test_some_chains_start_in_noise_and_others_in_decoys_with_the_noise_of_data(
    monkeypatch, decoys, count
):
    walk = Calls(monkeypatch, "langevin")
    net = network(channels=1)
    buffer = some_chains(600, 1, 4, 4)
    buffer.chains.fill_(7)
    settings = ebm.Settings(steps=1, fresh=0.3, decoys=decoys, smooth=0.01, sigma_max=20.0)
    black = torch.zeros(600, 1, 4, 4, dtype=torch.uint8)
    ebm.training_step(net, [adam(net)], black, settings, "chains", buffer, gen(1))
    x = walk.arguments[0]["x"]
    assert len(x) == 600 + count
    old = (x == 7).flatten(1).all(1)
    decoy = ((x + 1).abs() < 0.1).flatten(1).all(1)
    assert decoy.sum() == count
    assert old.sum().item() == pytest.approx(420, abs=45)
    assert x[~old & ~decoy].std().item() == pytest.approx(20, abs=1)
    if count == 300:
        assert (x[decoy] + 1 - 1 / 256).std().item() == pytest.approx(0.01, rel=0.2)


def test_before_their_stage_there_are_no_chains(monkeypatch):
    walk = Calls(monkeypatch, "langevin")
    divergence = Calls(monkeypatch, "contrastive_divergence")
    matching = Calls(monkeypatch, "match_loss")
    net = network()
    before = weights(net)
    images = rand_bytes(4, 3, 8, 8)

    def step(*arguments):
        raise AssertionError

    monkeypatch.setattr(ebm, "energy_and_gradient", step)
    buffer = some_chains(6, 3, 8, 8)
    terms = ebm.training_step(net, [adam(net)], images, ebm.Settings(), "matching", buffer, gen(1))
    assert walk.arguments == divergence.arguments == []
    assert len(matching.arguments) == 1
    assert set(terms) == {"match", "train loss", "skipped"}
    assert terms["train loss"].item() == terms["match"].item()
    assert terms["skipped"] == 0
    assert idle(net) == []
    assert not same(before, weights(net))


def test_the_slope_learns_to_take_noise_off():
    """In a few steps, of images that are all grey: mean((denoise(y) - x)^2) against that of y."""
    torch.manual_seed(0)
    net = ebm.EnergyNet(width=8, mults=(1, 2), blocks=1, channels=1)
    settings = ebm.Settings()
    grey = torch.full((16, 1, 8, 8), 128, dtype=torch.uint8)
    optimizer = adam(net, 3e-3)
    for step in range(200):
        terms = ebm.training_step(net, [optimizer], grey, settings, "matching", None, gen(step))
    x = ebm.dequantise(grey, gen(2))
    y = x + 0.2 * randn(*x.shape, seed=3)
    error = (ebm.denoise(net, y) - x).square().mean()
    assert error < 0.4 * 0.2**2
    assert terms["match"] < 0.5


# ------------------------------------------------------------------------------------- bad steps


@pytest.mark.parametrize(
    "gap, norm, median, good",
    [
        (0.1, 1.0, 0.0, True),
        (-9.0, 1.0, 0.0, True),
        (11.0, 1.0, 0.0, False),
        (-11.0, 1.0, 1.0, False),
        (49.0, 1.0, 10.0, True),
        (-49.0, 1.0, 10.0, True),
        (51.0, 1.0, 10.0, False),
        (-51.0, 1.0, 10.0, False),
        (math.nan, 1.0, 0.0, False),
        (0.1, math.nan, 0.0, False),
        (0.1, math.inf, 0.0, False),
        (-math.inf, 1.0, 90.0, False),
    ],
)
def test_a_good_step_is_finite_and_its_gap_is_not_wild(gap, norm, median, good):
    recent = torch.tensor([0.0] * 10 + [median, -median] * 25 + [1000.0, -1000.0] * 20)
    energy = Gaussian(1.0, 0.5)
    energy.c.grad = torch.tensor(2.0 if good else math.nan)
    found = ebm.cancel_bad_step(energy, torch.tensor(gap), torch.tensor(norm), recent)
    assert found.shape == ()
    assert found.dtype == torch.bool
    assert found.item() == good
    assert energy.c.grad.item() == (2.0 if good else 0.0)
    assert energy.mean.grad is None


class Spoiled(ebm.EnergyNet):
    """Its residual is `factor` times what it should be."""

    factor = 1.0

    def residual(self, x):
        return self.factor * super().residual(x)


def spoil(monkeypatch, function, net, value):
    """Make the next step bad: what that function of ebm, or the network, returns is off."""
    if function == "network":
        monkeypatch.setattr(net, "factor", value)
        return
    real = getattr(ebm, function)

    def spoiled(*arguments, **options):
        result = real(*arguments, **options)
        if function == "contrastive_divergence":
            gap, *others = result
            return gap + value, *others  # that leaves the gradient as it was, unlike a factor
        return result * value

    monkeypatch.setattr(ebm, function, spoiled)


def small_step(with_buffer=True):
    """(net, optimizers, images, settings, stage, buffer, generator), after two good steps."""
    net = network(kind=Spoiled)
    buffer = some_chains(9, 3, 8, 8) if with_buffer else None
    optimizers = ebm.make_optimizers(net)
    stage = "chains" if with_buffer else "matching"
    settings = ebm.Settings(steps=2, smooth=0.4)
    parts = net, optimizers, rand_bytes(4, 3, 8, 8), settings, stage, buffer, gen(1)
    for _ in range(2):
        assert ebm.training_step(*parts)["skipped"] == 0
    return parts


BAD = [
    ("network", math.nan),
    ("network", math.inf),
    ("network", 1e9),
    ("contrastive_divergence", math.nan),
    ("contrastive_divergence", math.inf),
    ("contrastive_divergence", -math.inf),
    ("contrastive_divergence", 300.0),
    ("contrastive_divergence", -300.0),
    ("match_loss", math.nan),
    ("match_loss", math.inf),
]


@pytest.mark.parametrize("function, value", BAD)
def test_a_bad_step_leaves_weights_chains_and_recent_gaps_as_they_were(
    monkeypatch, function, value
):
    parts = small_step()
    net, buffer = parts[0], parts[5]
    with monkeypatch.context() as patch:
        spoil(patch, function, net, value)
        before, chains, gaps = weights(net), buffer.chains.clone(), sorted_gaps(buffer)
        assert gaps.count_nonzero() == 2
        for _ in range(2):
            terms = ebm.training_step(*parts)
            assert terms.pop("skipped") == 1
            assert "gap" in terms
            assert all(value.shape == () and value == 0 for value in terms.values())
            assert same(before, weights(net))
            assert torch.equal(chains, buffer.chains)
            assert torch.equal(gaps, sorted_gaps(buffer))
    terms = ebm.training_step(*parts)  # and it goes on
    assert terms["skipped"] == 0
    assert all(value.isfinite() for value in terms.values())
    assert all(p.isfinite().all() for p in net.parameters())
    assert not same(before, weights(net))
    assert not torch.equal(chains, buffer.chains)
    assert sorted_gaps(buffer).count_nonzero() == 3


@pytest.mark.parametrize("function, value", [("network", math.nan), BAD[-2], BAD[-1]])
def test_a_bad_step_without_a_buffer_leaves_the_weights_as_they_were(monkeypatch, function, value):
    parts = small_step(with_buffer=False)
    net = parts[0]
    before = weights(net)
    with monkeypatch.context() as patch:
        spoil(patch, function, net, value)
        terms = ebm.training_step(*parts)
        assert terms.pop("skipped") == 1
        assert all(value == 0 for value in terms.values())
        assert same(before, weights(net))
    assert ebm.training_step(*parts)["skipped"] == 0
    assert not same(before, weights(net))


def test_a_gap_like_the_recent_ones_is_not_wild(monkeypatch):
    parts = small_step()
    buffer = parts[5]
    spoil(monkeypatch, "contrastive_divergence", parts[0], 30.0)
    assert ebm.training_step(*parts)["skipped"] == 1
    remember(buffer, [-20.0] * 60)
    assert ebm.training_step(*parts)["skipped"] == 0
    remember(buffer, [0.1] * 60)
    assert ebm.training_step(*parts)["skipped"] == 1


def test_a_recorded_pass_trains_as_the_pass_does(recording):
    """Steps of both stages, of which the fourth is recorded, and then a bad one."""
    device, wrap = recording
    net = network(kind=Spoiled).to(device)
    nets = net, copy.deepcopy(net)
    settings = ebm.Settings(steps=2, smooth=0.4)
    generators = [torch.Generator(device).manual_seed(0) for _ in nets]
    passes = ebm.Recorded(wrap(ebm.match_pass), generators[0]), ebm.match_pass
    for one, generator, backward in zip(nets, generators, passes, strict=True):
        optimizers = ebm.make_optimizers(one)
        buffer = some_chains(9, 3, 8, 8).to(device)
        for step, stage in enumerate(4 * ["matching"] + 3 * ["chains"]):
            x = rand_bytes(4, 3, 8, 8, seed=step).to(device)
            if step == 5:
                one.factor = math.nan  # the recorded pass does not know, but the chains do
            terms = ebm.training_step(
                one, optimizers, x, settings, stage, buffer, generator, backward
            )
            assert terms["skipped"] == (step == 5)
            one.factor = 1.0
    start, after, due = (
        nn.utils.parameters_to_vector(one.parameters()) for one in (network().to(device), *nets)
    )
    assert (after - due).norm() < (due - start).norm() * (1e-3 if device == "cpu" else 5e-2)


class NoWaiting(TorchDispatchMode):
    """Fails where Python would wait for what a tensor holds, to branch on it or for a size."""

    def __torch_dispatch__(self, operation, kinds, arguments=(), options=None):
        waits = "_local_scalar_dense", "nonzero", "masked_select", "unique", "equal"
        name = operation.overloadpacket.__name__
        assert not name.startswith(waits), name
        return operation(*arguments, **options or {})


@pytest.mark.parametrize("factor", [1.0, math.nan, 1e9])
@pytest.mark.parametrize("with_buffer", [False, True])
def test_no_step_needs_a_branch_on_a_tensor(monkeypatch, with_buffer, factor):
    parts = small_step(with_buffer)
    monkeypatch.setattr(parts[0], "factor", factor)
    with NoWaiting():
        terms = ebm.training_step(*parts)
    assert terms["skipped"] == (factor != 1)
    for wait in bool, float:
        with pytest.raises(AssertionError), NoWaiting():
            wait(torch.ones(()))


class Watched(ebm.GuardedRun):
    """Only says what the trouble is."""

    def check(self):
        self.why = self.trouble()


def trouble_after(tmp_path, steps, net=None):
    """What trouble there is after an epoch with these terms of its steps."""
    terms = {"skipped": 0}  # as without chains
    args = SimpleNamespace(
        out=tmp_path, batch_size=1, epochs=1, seed=0, device="cpu", amp=False, time_limit=None
    )
    net = net or network()
    images = rand_bytes(len(steps), 1, 2, 2)
    run = Watched(args, images, {"net": net, "ema": net}, {}, gen())
    for _ in run.epochs():
        for _, changed in zip(run.batches(images), steps, strict=True):
            step = {**terms, **changed}
            run.record({name: torch.tensor(float(value)) for name, value in step.items()})
    return run.why


@pytest.mark.parametrize(
    "changed, named",
    [
        ({}, ""),
        ({"E data": 101.0}, "energ"),
        ({"E data": 99.0}, ""),
        ({"E chains": 110.0}, "energ"),
        ({"E chains": 99.0}, ""),
    ],
)
def test_what_counts_as_trouble_in_the_last_step(tmp_path, changed, named):
    why = trouble_after(tmp_path, [{}, {}, changed])
    assert named in why
    assert bool(why) == bool(named)
    assert not trouble_after(tmp_path, [changed, changed, {}])  # that has passed


@pytest.mark.parametrize(
    "skipped, steps, named",
    [(49, 60, ""), (50, 60, "50 steps"), (20, 20, "20 steps"), (19, 20, "")],
)
def test_many_bad_steps_are_trouble_and_an_epoch_of_them_however_short(
    tmp_path, skipped, steps, named
):
    bad = [{"skipped": 1}] * skipped
    for terms in bad + [{}] * (steps - skipped), [{}] * (steps - skipped) + bad:
        why = trouble_after(tmp_path, terms)
        assert named in why
        assert bool(why) == bool(named)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_trouble(tmp_path, value):
    net = network()
    last = list(net.parameters())[-1]
    nn.init.constant_(last, value)
    assert "not finite" in trouble_after(tmp_path, [{}], net)


@pytest.mark.parametrize("stage", ebm.STAGES)
def test_a_healthy_step_is_no_trouble(tmp_path, stage):
    net = network()
    nn.init.zeros_(net.out.weight)  # as at first
    images = rand_bytes(4, 3, 8, 8)
    settings, buffer = ebm.Settings(steps=2, smooth=0.4), some_chains(9, 3, 8, 8)
    terms = ebm.training_step(net, [adam(net)], images, settings, stage, buffer, gen(1))
    assert trouble_after(tmp_path, [terms], net) == ""


# ---------------------------------------------------------------------------------------- network


def test_gradient_of_the_energy_is_that_of_finite_differences():
    net = network().double()
    x = rand(2, 3, 8, 8, dtype=torch.float64)
    v = randn(2, 3, 8, 8, dtype=torch.float64)
    e, grad = ebm.energy_and_gradient(net, x)
    assert torch.equal(e, net(x).detach())
    slope = (net(x + 1e-4 * v) - net(x - 1e-4 * v)) / 2e-4
    assert torch.allclose((grad * v).flatten(1).sum(1), slope, rtol=1e-5)


def test_energy_is_half_the_square_of_the_residual():
    net = network()
    x = randn(3, 3, 8, 8)
    assert torch.allclose(net(x), net.residual(x).square().sum((1, 2, 3)) / 2)
    assert net.residual(x).shape == x.shape
    assert net(x).shape == (3,)


def test_the_guess_of_noise_is_exact_on_slopes_and_a_little_high_on_edges():
    """Noise alone, and on planes, whose second difference is 0."""
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    plane = (rows - 2 * columns) / 64
    for sigma in 0.1, 3.0, 40.0:
        z = sigma * randn(200, 3, 32, 32)
        for x in z, plane + z:
            guess = ebm.noise_variance(x)
            assert guess.shape == (200, 1, 1, 1)
            assert guess.mean().item() == pytest.approx(sigma**2 + 1e-4, rel=0.01)
            assert guess.std() < 0.1 * guess.mean()
    square = torch.zeros(1, 1, 32, 32)
    square[..., 8:16, 8:16] = 1
    corners = 4 / 31**2
    assert ebm.noise_variance(square).item() == pytest.approx(corners / 4 + 1e-4)


@pytest.mark.parametrize("sigma", [0.03, 0.5, 40.0])
def test_the_unet_sees_and_gives_values_near_1_at_every_noise(monkeypatch, sigma):
    """If the U-Net gives 0, y - r is the best guess that is a multiple of y. What that lacks has a
    mean square that the U-Net's output of 1 makes up for, and y, as it sees it, has one of 1."""
    x = 0.5 * randn(400, 1, 4, 4, dtype=torch.float64)
    y = x + sigma * randn(400, 1, 4, 4, seed=2, dtype=torch.float64)
    net = network(channels=1)
    exact = torch.full((400, 1, 1, 1), sigma**2, dtype=torch.float64)
    monkeypatch.setattr(ebm, "noise_variance", lambda y: exact)
    seen = []

    def unet(y):
        seen.append(y)
        return torch.zeros_like(y)

    monkeypatch.setattr(net, "unet", unet)
    guess = y - net.residual(y)
    assert torch.allclose(guess, 0.25 / (0.25 + sigma**2) * y)
    assert seen[0].square().mean().item() == pytest.approx(1, rel=0.05)
    monkeypatch.setattr(net, "unet", torch.ones_like)
    output = net.residual(y) - (y - guess)
    lack = (x - guess).square().mean()
    assert output.square().mean().item() == pytest.approx(lack.item(), rel=0.05)


def test_every_layer_matters():
    net = network(mults=(1, 2, 2), blocks=2)
    (net(randn(2, 3, 16, 16)) * torch.tensor([1.0, -2.0])).sum().backward()
    assert idle(net) == []


def test_far_pixels_see_each_other():
    net = network(mults=(1, 2, 2, 2)).double()
    x = randn(1, 3, 32, 32, dtype=torch.float64)
    moved = x.clone()
    moved[..., 0, 0] += 1
    change = (net.residual(moved) - net.residual(x)).abs().sum(1)
    assert change[0, 14, 14] > 0


def test_bf16_stays_between_stem_and_output():
    fine = network()
    rough = network(amp=True)
    x = rand(4, 3, 16, 16)
    seen = []

    def look(layer, inputs, output):
        seen.append((inputs[0], output))

    for layer in layers(rough, nn.Conv2d):
        layer.register_forward_hook(look)
    e = rough(x)
    stem, *blocks, out = seen  # in the order of their use
    assert {tensor.dtype for tensor in stem + out} == {torch.float32}
    assert {output.dtype for _, output in blocks} == {torch.bfloat16}
    assert e.dtype == torch.float32
    assert not torch.equal(e, fine(x))
    assert ((e - fine(x)) / fine(x)).abs().max() < 0.05


def test_size_of_the_network():
    count = sum(p.numel() for p in ebm.EnergyNet().parameters())
    assert 12e6 < count < 14e6
    for mults in (1,), (1, 2, 1, 1, 1, 1):
        assert network(mults=mults)(rand(2, 3, 32, 32)).shape == (2,)


# ------------------------------------------------------------------------------------------- uses


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    inside, outside = torch.randint(12, (2, 40), generator=gen())
    pairs = [(b > a) + 0.5 * (b == a) for a in inside.tolist() for b in outside.tolist()]
    assert ebm.auroc(inside.float(), outside.float()) == pytest.approx(sum(pairs) / len(pairs))
    low = rand(5)
    high = 1 + rand(7)
    assert ebm.auroc(low, high) == 1
    assert ebm.auroc(high, low) == 0
    assert ebm.auroc(low, low) == 0.5


def colours(images):
    """The colour of each pixel as one number, sorted within each image."""
    channels = images.shape[1]
    powers = 256 ** torch.arange(channels)[:, None, None]
    return (images.long() * powers).sum(1).flatten(1).sort(1).values


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 12, 28)])
def test_outliers_are_what_they_are_called(shape):
    images = rand_bytes(20, *shape)
    others = ebm.outliers(images, gen(1))
    assert set(others) == {"uniform", "constant", "shuffled", "interpolated", "upside-down"}
    for name, x in others.items():
        assert x.shape == images.shape
        assert x.dtype == torch.uint8
        assert len(x.unique(dim=0)) == 20 or (name == "constant" and shape[0] == 1)
    assert others["uniform"].float().mean().item() == pytest.approx(127.5, abs=1)
    assert others["uniform"].unique().numel() == 256
    assert torch.equal(others["upside-down"].flip(2), images)
    assert torch.equal(colours(others["shuffled"]), colours(images))  # colours stay together
    assert (others["shuffled"] != images).float().mean() > 0.9
    assert (others["constant"] == others["constant"][:, :, :1, :1]).all()
    assert len(others["constant"].unique(dim=0)) > 15
    means = (images.int()[:, None] + images.int()) // 2
    for x in others["interpolated"]:
        assert (means == x.int()).flatten(2).all(2).any()
        assert not (images == x).flatten(1).all(1).any()


def test_inpainting_keeps_the_known_and_samples_the_rest_given_it():
    """Two correlated pixels: E = c / 2 (x^2 + y^2 - 2 r x y) / (1 - r^2)."""
    c, r, t = 0.2, 0.8, 0.01

    def energy(x):
        x, y = x.unbind(1)
        return c / 2 * (x**2 + y**2 - 2 * r * x * y) / (1 - r**2)

    truth = torch.tensor([[0.5, 9.0]]).expand(4000, 2)
    known = torch.tensor([True, False])

    def exactly(x, sigma):
        return torch.where(known, truth, x)

    start = exactly(randn(4000, 2), 1.0)
    x, _ = ebm.langevin(energy, start, 400, 0.1, t, gen(), exactly)
    assert (x[:, 0] == 0.5).all()
    assert x[:, 1].mean().item() == pytest.approx(r * 0.5, abs=0.02)
    assert x[:, 1].std().item() == pytest.approx(math.sqrt(t / c * (1 - r**2)), rel=0.06)


def test_known_pixels_are_as_noisy_as_the_rest():
    truth = torch.full((4000, 2), 0.8)
    constrain = ebm.keep_known(truth, torch.tensor([True, False]), gen())
    for sigma in 9.0, 0.3, 0.03:
        x = constrain(torch.full((4000, 2), 5.0), sigma)
        assert (x[:, 1] == 5).all()
        assert x[:, 0].mean().item() == pytest.approx(0.8, abs=4 * sigma / 60)
        assert x[:, 0].std().item() == pytest.approx(sigma, rel=0.05)
