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
    for layer in layers(net, nn.Linear):
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
        buffer.put(slots, (buffer.chains[slots] + 0.5) / 256, torch.tensor(gap), YES)


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


@pytest.mark.parametrize("share", [0.1, 0.8, 1.5])
def test_langevin_has_the_stationary_variance_of_its_own_order_of_noise_and_step(share):
    """x <- x - a c x + s z. Noise before the gradient would have (1 - a c)^2 times that, a factor
    of two in the step or a missing root twice."""
    c, a, s = 40.0, share / 40, 0.02
    x, _ = ebm.langevin(quadratic(c), rand(20_000, 1), 60, a, s, generator=gen())
    due = s**2 / (a * c * (2 - a * c))
    assert x.var().item() == pytest.approx(due, rel=0.04)
    assert abs(x.mean() - 0.5) < 0.01
    t = s**2 / (2 * a)  # as the docstring has it
    assert due == pytest.approx(t / c / (1 - c * a / 2))


def test_langevin_samples_the_density_of_its_temperature():
    """Of a double well, by numerical integration: exp(-E / T), T = noise^2 / (2 step)."""
    step, noise = 0.01, 0.02
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)

    def energy(x):
        wells = (x - 0.3).square() * (x - 0.75).square()
        return 10 * wells.flatten(1).sum(1) + 0.02 * x.sum(1)

    p = torch.exp(-energy(grid[:, None]) / (noise**2 / (2 * step)))
    x, _ = ebm.langevin(energy, rand(4000, 1), 3000, step, noise, generator=gen())
    for power in 1, 2:
        due = (p * grid**power).sum() / p.sum()
        assert abs(x.double().pow(power).mean() - due) < 0.01
    wrong = p**2
    assert abs(x.mean() - (wrong * grid).sum() / wrong.sum()) > 0.02


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


def test_langevin_step_by_step_as_written_and_what_was_seen():
    """Energy at the start; mean size of the gradient; share of it that is clamped."""
    x = rand(3, 2, 4)
    energy_at_start = cubic(x).mean()
    chain = []

    def constrain(x):
        chain.append(x)
        return x

    end, seen = ebm.langevin(cubic, x, 5, 0.3, 0.2, 0.7, gen(), constrain)
    g = gen()
    sizes = []
    assert len(chain) == 5
    for after in chain:
        grad = cubic_gradient(x)
        sizes.append(grad.abs())
        z = torch.randn(x.shape, generator=g)
        x = (x - 0.3 * grad.clamp(-0.7, 0.7) + 0.2 * z).clamp(0, 1)
        assert torch.allclose(after, x, atol=1e-6)
    assert torch.equal(end, chain[-1])
    sizes = torch.stack(sizes)
    shares = (sizes > 0.7).float().mean((1, 2, 3))
    assert 0.1 < shares.mean() < 0.9
    assert len(shares.unique()) > 1  # so that the mean is not that of one step
    due = {"E start": energy_at_start, "gradient": sizes.mean(), "clamped": shares.mean()}
    assert seen.keys() == due.keys()
    for name, value in due.items():
        assert seen[name].shape == ()
        assert seen[name].item() == pytest.approx(value.item(), rel=1e-5)


def test_no_steps_change_nothing():
    x = rand(3, 2, 4)
    end, seen = ebm.langevin(cubic, x, 0, 0.3, 0.2)
    assert torch.equal(end, x)
    assert [value.item() for value in seen.values()] == [0, 0, 0]


def test_the_next_step_starts_from_what_constrain_returns():
    def constrain(x):
        return torch.where(torch.tensor([True, False]), 0.25, x)

    start = torch.full((1, 2), 0.5)
    x, _ = ebm.langevin(cubic, start, 2, 0.1, 0.0, constrain=constrain)
    once = 0.5 - 0.1 * (3 * 0.5**2 - 2 * 0.5)
    twice = once - 0.1 * (3 * once**2 - 2 * 0.25)
    assert torch.allclose(x, torch.tensor([[0.25, twice]]))


def test_energy_and_gradient_are_the_analytic_ones():
    x = rand(3, 2, 4, dtype=torch.float64)
    e, grad = ebm.energy_and_gradient(cubic, x)
    assert torch.allclose(e, cubic(x))
    assert torch.allclose(grad, cubic_gradient(x))
    assert not x.requires_grad


def test_chains_stay_in_the_box_after_the_noise():
    x, _ = ebm.langevin(quadratic(0.0), rand(50, 3, 8, 8), 1, 1.0, 3.0, generator=gen())
    assert x.min() == 0
    assert x.max() == 1
    assert 0.5 < ((x == 0) | (x == 1)).float().mean() < 1


def test_the_gradient_is_cut_in_each_pixel_and_goes_downhill():
    slopes = torch.tensor([100.0, -100.0, 0.001])

    def energy(x):
        return x @ slopes

    x, seen = ebm.langevin(energy, torch.full((2, 3), 0.5), 2, 10.0, 0.0, clamp=0.01)
    assert torch.allclose(x, torch.tensor([0.3, 0.7, 0.48]))
    assert seen["clamped"].item() == pytest.approx(2 / 3)
    assert seen["gradient"].item() == pytest.approx(200.001 / 3)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("mode", [True, False])
def test_nothing_of_the_network_or_the_caller_changes_while_sampling(mode, fails):
    """Weights, vectors of the power iteration, mode, requires_grad, gradients, the start."""
    net = network().train(mode)
    x = rand(2, 3, 8, 8)
    before, start = state(net), x.clone()
    steps = []

    def constrain(x):
        steps.append(x)
        if fails and len(steps) == 2:
            raise InterruptedError
        return x

    try:
        end, _ = ebm.langevin(net, x, 3, 10.0, 0.005, 0.01, gen(), constrain)
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

    def constrain(x):
        enabled.append(torch.is_grad_enabled())
        return x

    with torch.set_grad_enabled(grad):
        energy, gradient = ebm.energy_and_gradient(net, x)
        end, seen = ebm.langevin(net, x, 2, 10.0, 0.005, constrain=constrain)
        walked, _ = settings.walk(net, x, 2, gen())
        results = [energy, gradient, end, *seen.values(), walked]
        results.append(ebm.denoise(net, x, 90.0))
        results.append(ebm.draw(net, x, 2, settings, 90.0, gen()))
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
        end, _ = ebm.langevin(net, batch, 2, 1.0, 0.0)
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
    """Three, if the weights had gradients; and no singular values are computed in it."""
    net = network(width=16, mults=(1, 2, 4), blocks=2)
    x = rand(2, 3, 32, 32)
    with CountFlops() as forward, torch.no_grad():
        net(x)
    with CountFlops() as step:
        ebm.langevin(net, x, 1, 10.0, 0.005)
    assert 1.9 < step.total / forward.total <= 2.2


# ------------------------------------------------------------------------- settings and taking off


def test_d_is_smooth_squared_over_the_temperature():
    settings = ebm.Settings(step_size=7.0, noise=0.05, smooth=0.02)
    assert settings.d() == pytest.approx(2 * 7.0 * (0.02 / 0.05) ** 2)
    assert ebm.Settings().d() == pytest.approx(90)  # as the defaults are


def test_walk_is_langevin_with_the_settings():
    settings = ebm.Settings(step_size=0.3, noise=0.2, clamp=0.7)
    x = rand(3, 2, 4)

    def constrain(x):
        return x.round(decimals=2)

    walked = settings.walk(cubic, x, 4, gen(), constrain)
    due = ebm.langevin(cubic, x, 4, 0.3, 0.2, 0.7, gen(), constrain)
    assert torch.equal(walked[0], due[0])
    assert same(walked[1], due[1])
    assert torch.equal(walked[0], walked[0].round(decimals=2))


def test_denoise_finds_the_best_guess_of_a_gaussian():
    """x ~ N(m, v), y = x + smooth z, E = T (y - m)^2 / (2 (v + smooth^2)): mean(x | y) is known."""
    settings = ebm.Settings(step_size=20.0, noise=0.02, smooth=0.03)
    m, v, t = 0.5, 0.001, 0.02**2 / (2 * 20.0)
    energy = quadratic(t / (v + 0.03**2), m)
    y = 3 * rand(9, 1) - 1  # also beyond [0, 1], where noise leads
    best = ebm.denoise(energy, y, settings.d())
    assert torch.allclose(best, m + v / (v + 0.03**2) * (y - m), atol=1e-5)


def test_denoise_lessens_the_error_of_gaussian_data_as_much_as_can_be():
    """The mean square error goes from smooth^2 to v smooth^2 / (v + smooth^2)."""
    settings = ebm.Settings(step_size=5.0, noise=0.01, smooth=0.05)
    v, t = 0.004, 0.01**2 / (2 * 5.0)
    x = 0.5 + math.sqrt(v) * randn(100_000, 1)
    y = x + 0.05 * randn(100_000, 1, seed=2)
    best = ebm.denoise(quadratic(t / (v + 0.05**2)), y, settings.d())
    due = v * 0.05**2 / (v + 0.05**2)
    assert (best - x).square().mean().item() == pytest.approx(due, rel=0.02)


@pytest.mark.parametrize("noise", [0.1, 0.05])
def test_draw_walks_and_takes_the_noise_off_with_the_d_of_training(noise):
    """Not with that of the settings of sampling, whose noise may be another."""
    d = ebm.Settings(step_size=0.1, noise=0.1, smooth=0.2).d()
    settings = ebm.Settings(step_size=0.1, noise=noise, smooth=0.2, clamp=0.7)
    x = rand(3, 2, 4)
    walked, _ = settings.walk(cubic, x, 3, gen())
    due = walked - d * cubic_gradient(walked)
    assert 0 < ((due < 0) | (due > 1)).float().mean() < 0.5  # samples are in [0, 1] all the same
    drawn = ebm.draw(cubic, x, 3, settings, d, gen())
    assert torch.allclose(drawn, due.clamp(0, 1), atol=1e-5)


def test_chains_rest_with_noise_of_std_smooth_in_a_bowl():
    """sqrt(T d) = smooth, for E = |x - m|^2 / (2 d) and steps that are small against d."""
    settings = ebm.Settings(step_size=20.0, noise=0.005, smooth=0.03)
    d = settings.d()
    assert settings.step_size / d < 0.02
    x, seen = settings.walk(quadratic(1 / d, 0.4), torch.full((20_000, 1), 0.4), 400, gen())
    t = settings.noise**2 / (2 * settings.step_size)
    assert math.sqrt(t * d) == pytest.approx(0.03)
    assert x.std().item() == pytest.approx(0.03, rel=0.02)
    assert x.mean().item() == pytest.approx(0.4, abs=0.001)
    assert seen["clamped"] == 0
    clean = ebm.draw(quadratic(1 / d, 0.4), x, 100, settings, d, gen(1))
    assert (clean - 0.4).abs().max() < 1e-5


# ------------------------------------------------------------------------ contrastive divergence


def test_terms_and_gradients_of_contrastive_divergence_are_the_analytic_ones():
    energy = Gaussian(3.0, 0.4).double()
    data = rand(5, 1, dtype=torch.float64)
    chains = rand(7, 1, seed=2, dtype=torch.float64)
    gap, penalty, e_data, e_chains = ebm.contrastive_divergence(energy, data, chains, alpha=0.3)
    due_data = 1.5 * (data - 0.4).square().flatten()
    due_chains = 1.5 * (chains - 0.4).square().flatten()
    assert torch.allclose(e_data, due_data)
    assert torch.allclose(e_chains, due_chains)
    assert gap.item() == pytest.approx((due_data.mean() - due_chains.mean()).item())
    squares = due_data.square().mean() + due_chains.square().mean()
    assert penalty.item() == pytest.approx(0.3 * squares.item())
    gap.backward()
    assert energy.mean.grad.item() == pytest.approx(3 * (chains.mean() - data.mean()).item())
    assert energy.c.grad.item() == pytest.approx(gap.item() / 3)


def test_one_step_downhill_lowers_the_gap_and_nothing_reaches_the_chains():
    net = network()
    data = rand(6, 3, 8, 8) / 2
    chains = rand(6, 3, 8, 8, seed=2).requires_grad_()
    optimizer = torch.optim.SGD(net.parameters(), 0.02)
    gaps = []
    for _ in range(2):
        optimizer.zero_grad()
        gap, *_ = ebm.contrastive_divergence(net, data, chains)
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

    ebm.contrastive_divergence(energy, rand(3, 1), rand(3, 1))
    assert calls == [6]


def test_contrastive_divergence_recovers_mean_and_temperature_over_variance():
    """Data N(.55, .07^2), T = 1, a = 5e-4, K = 10 steps of persistent chains. As the steps are
    finite, their variance is the data's v where s^2 / (a c (2 - a c)) = v, not where c = 1 / v."""
    v, a = 0.0049, 5e-4
    s = math.sqrt(2 * a)
    energy = Gaussian(100.0, 0.3)
    buffer = ebm.Buffer(2000, (1,), gen())
    optimizer = torch.optim.Adam([{"params": [p]} for p in energy.parameters()], betas=(0.0, 0.99))
    g = gen(3)
    tail = []
    for step in range(500):
        for group, lr in zip(optimizer.param_groups, (8.0, 5e-3), strict=True):
            group["lr"] = lr * (1 - step / 500)
        data = 0.55 + math.sqrt(v) * torch.randn(1000, 1, generator=g)
        slots, x = buffer.draw(1000, 0.0, g)
        x, _ = ebm.langevin(energy, x, 10, a, s, generator=g)
        optimizer.zero_grad()
        gap, *_ = ebm.contrastive_divergence(energy, data, x)
        gap.backward()
        optimizer.step()
        buffer.put(slots, x, gap.detach(), YES)
        tail.append((energy.c.item(), energy.mean.item()))
    c, mean = torch.tensor(tail[-100:]).mean(0).tolist()
    due = (1 - math.sqrt(1 - 2 * a / v)) / a  # the root of s^2 / (a c (2 - a c)) = v at T = 1
    assert due == pytest.approx(215.6, abs=1)
    assert 1 / v == pytest.approx(204, abs=1)
    assert c == pytest.approx(due, rel=0.03)
    assert mean == pytest.approx(0.55, abs=0.005)


# ------------------------------------------------------------------------------- score matching


def test_score_matching_is_the_mean_square_that_it_says():
    x = rand(3, 2, 4, 4, dtype=torch.float64)
    sigma = torch.tensor([0.1, 0.5, 2.0]).view(3, 1, 1, 1)
    z = torch.randn(x.shape, generator=gen(5)).double()
    score = ebm.denoising_score_matching(quadratic(3.0, 0.4), x, sigma, 0.7, gen(5))
    due = (0.7 / sigma * 3 * (x + sigma * z - 0.4) - z).square().mean()
    assert score.shape == ()
    assert score.item() == pytest.approx(due.item())


def test_score_matching_is_one_while_the_energy_is_flat():
    x = rand(2000, 3, 4, 4)
    score = ebm.denoising_score_matching(quadratic(0.0), x, torch.ones(2000, 1, 1, 1), 5.0, gen())
    assert score.item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("sigma", [0.05, 0.3])
def test_score_matching_finds_the_best_guess_of_a_gaussian(sigma):
    """x ~ N(m, v): mean(x | y) = y - sigma^2 / (v + sigma^2) (y - m), so d c = sigma^2 /
    (v + sigma^2). The loss is a parabola in c, whose least lies at that."""
    v, m, d = 0.04, 0.6, 90.0
    x = m + math.sqrt(v) * randn(200_000, 1, seed=0, dtype=torch.float64)
    sigmas = torch.full((len(x), 1), sigma)
    due = sigma**2 / (v + sigma**2) / d
    scores = []
    for c in 0.0, due, 2 * due:
        score = ebm.denoising_score_matching(quadratic(c, m), x, sigmas, d, gen(1))
        scores.append(score.item())
    low, middle, high = scores
    least = due + due * (low - high) / (2 * (low + high - 2 * middle))
    assert least == pytest.approx(due, rel=0.02)
    assert middle < min(low, high)


def test_score_matching_teaches_every_weight_but_the_constant():
    net = network()
    x = rand(4, 3, 8, 8)
    score = ebm.denoising_score_matching(net, x, torch.full((4, 1, 1, 1), 0.1), 90.0, gen())
    score.backward()
    assert idle(net) == [name for name, p in net.named_parameters() if p.numel() == 1]
    assert len(idle(net)) == 1
    assert not x.requires_grad
    assert x.grad is None


# -------------------------------------------------------------------------------- data and buffer


def test_quantise_inverts_dequantise_and_leaves_no_grid():
    values = torch.arange(256, dtype=torch.uint8).expand(2000, 256)
    x = ebm.dequantise(values, gen())
    assert (ebm.quantise(x) != values).float().mean() < 1e-4  # fp32 rounds 255.999999 to 256
    assert x.min() >= 0
    assert x.max() <= 1
    assert (x.mean(0) - (torch.arange(256) + 0.5) / 256).abs().max() < 2e-4
    assert (x.std(0) * math.sqrt(12) * 256 - 1).abs().max() < 0.08
    assert (x * 255 - (x * 255).round()).abs().mean() > 0.2  # data on a grid would be told by it
    assert ebm.quantise(torch.tensor([-3.0, 0.0, 1.0, 7.0])).tolist() == [0, 0, 255, 255]


def test_buffer_draws_without_replacement_from_slots_that_it_names():
    buffer = ebm.Buffer(50, (2, 4, 4), gen())
    g = gen(1)
    before = state(buffer)
    slots, x = buffer.draw(20, 0.0, g)
    assert len(slots.unique()) == 20
    assert x.shape == (20, 2, 4, 4)
    assert torch.equal(ebm.quantise(x), before["chains"][slots])
    assert same(before, state(buffer))
    drawn = [buffer.draw(20, 0.0, g)[0] for _ in range(20)]
    assert len(torch.cat(drawn).unique()) == 50


def test_buffer_keeps_what_is_put_there_and_nothing_else_changes():
    buffer = ebm.Buffer(50, (2, 4, 4), gen())
    remember(buffer, [float(i) for i in range(1, 101)])
    due = buffer.chains.clone()
    slots, _ = buffer.draw(20, 0.0, gen(1))
    x = rand(20, 2, 4, 4, seed=5)
    due[slots] = ebm.quantise(x)
    buffer.put(slots, x, torch.tensor(0.7), YES)
    assert torch.equal(buffer.chains, due)
    assert buffer.chains.dtype == torch.uint8
    gaps = sorted_gaps(buffer)
    for value in 0.9, math.nan:
        wild = torch.full_like(x, math.nan)
        buffer.put(slots, wild, torch.tensor(value), NO)
        assert torch.equal(buffer.chains, due)
        assert torch.equal(sorted_gaps(buffer), gaps)


def test_buffer_keeps_the_last_hundred_gaps_of_good_steps():
    buffer = ebm.Buffer(3, (1,), gen())
    assert sorted_gaps(buffer).tolist() == [0.0] * 100
    remember(buffer, [5.0])
    assert sorted_gaps(buffer).tolist() == [0.0] * 99 + [5.0]
    remember(buffer, [float(i) for i in range(250)])
    assert sorted_gaps(buffer).tolist() == list(range(150, 250))


@pytest.mark.parametrize("fresh", [0.0, 0.05, 0.5, 1.0])
def test_a_binomial_share_of_the_chains_starts_anew_in_uniform_noise(fresh):
    buffer = ebm.Buffer(4000, (1, 2, 2), gen())
    buffer.chains.fill_(7)
    g = gen(1)
    anew = []
    for _ in range(10):
        _, x = buffer.draw(1000, fresh, g)
        differs = (ebm.quantise(x) != 7).flatten(1)
        assert (differs.any(1) == (differs.sum(1) > 2)).all()  # all pixels or none, but for chance
        anew.append(differs.any(1).sum().item())
    sigma = math.sqrt(1000 * fresh * (1 - fresh))
    assert abs(sum(anew) - 10_000 * fresh) <= 4 * math.sqrt(10) * sigma
    spread = torch.tensor(anew).float().std()
    assert 0.4 * sigma <= spread <= 2 * sigma  # by chance, not so many each time, not all or none
    if fresh == 1:
        assert x.mean().item() == pytest.approx(0.5, abs=0.02)
        assert x.std().item() == pytest.approx(1 / math.sqrt(12), abs=0.01)
    assert (buffer.chains == 7).all()  # until they are written back


def test_a_fresh_buffer_is_uniform_and_its_state_can_be_kept():
    buffer = ebm.Buffer(300, (3, 8, 8), gen())
    assert buffer.chains.dtype == torch.uint8
    assert (buffer.chains.flatten().bincount(minlength=256) > 100).all()
    remember(buffer, [3.0, 4.0])
    other = ebm.Buffer(300, (3, 8, 8), gen(1))
    other.load_state_dict(buffer.state_dict())
    assert torch.equal(sorted_gaps(other), sorted_gaps(buffer))
    for ours, theirs in zip(buffer.draw(9, 0.3, gen(2)), other.draw(9, 0.3, gen(2)), strict=True):
        assert torch.equal(ours, theirs)


# ---------------------------------------------------------------------------------- training step


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("with_buffer", [False, True])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 64), (2, 12, 20)])
def test_images_of_any_channels_and_size_train_and_can_be_drawn(shape, with_buffer, amp):
    torch.manual_seed(0)
    net = ebm.EnergyNet(width=4, mults=(1, 2, 2), blocks=1, channels=shape[0], amp=amp)
    images = rand_bytes(4, *shape)
    x = rand(4, *shape)
    assert (net(x) == net(x)[0]).all()  # flat at first
    settings = ebm.Settings(steps=2)
    buffer = ebm.Buffer(6, shape) if with_buffer else None
    for _ in range(2):
        terms = ebm.training_step(net, [adam(net)], images, settings, buffer)
        assert terms["skipped"] == 0
        assert all(value.shape == () and value.isfinite() for value in terms.values())
        assert not any(value.requires_grad for value in terms.values())
    assert len(net(x).unique()) == 4
    assert all(p.isfinite().all() and p.requires_grad for p in net.parameters())
    drawn = ebm.draw(net, x, 3, settings, settings.d())
    assert drawn.shape == x.shape
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert not torch.equal(drawn, x)


@pytest.mark.parametrize("shape, said", [((30, 32), "30x32"), ((32, 30), "32x30")])
def test_a_size_that_cannot_be_halved_often_enough_is_a_clear_error(shape, said):
    net = network(mults=(1, 2, 2))
    before = state(net)
    with pytest.raises(ValueError, match=f"{said} pixels cannot be halved 2 times"):
        net(rand(2, 3, *shape))
    with pytest.raises(ValueError, match=said):
        ebm.training_step(net, [adam(net)], rand_bytes(2, 3, *shape), ebm.Settings())
    assert same(before, state(net))
    assert network(mults=(1, 2))(rand(2, 3, *shape)).shape == (2,)


def test_a_training_step_with_chains_is_as_written(monkeypatch):
    """One step of SGD down gap + penalty + 0.1 score, of the data and chains that it has used."""
    net = network()
    twin = copy.deepcopy(net)
    net(rand(2, 3, 8, 8)).sum().backward()  # gradients of before do not count
    settings = ebm.Settings(
        steps=3, step_size=0.5, noise=0.2, clamp=0.02, smooth=0.2, fresh=0.0, penalty=0.7
    )  # with a d of 1, so that each part of the loss counts
    g = gen()
    divergence = Calls(monkeypatch, "contrastive_divergence", g)
    matching = Calls(monkeypatch, "denoising_score_matching", g)
    walk = Calls(monkeypatch, "langevin", g)
    buffer = ebm.Buffer(20, (3, 8, 8), gen(1))
    due_chains = buffer.chains.clone()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    terms = ebm.training_step(net, [optimizer], rand_bytes(6, 3, 8, 8), settings, buffer, g)

    # The chains go on from those of the buffer, which gets their ends.
    (walked,) = walk.arguments
    g.set_state(walk.random[0])
    ends, seen = settings.walk(twin, walked["x"], 3, g)
    (diverged,) = divergence.arguments
    assert torch.allclose(diverged["chains"], ends, atol=1e-5)
    starts = ebm.quantise(walked["x"])
    slots = [(due_chains == x).flatten(1).all(1).nonzero().item() for x in starts]
    due_chains[slots] = ebm.quantise(diverged["chains"])
    assert torch.equal(buffer.chains, due_chains)

    gap, penalty, e_data, e_chains = divergence.real(twin, diverged["data"], ends, 0.7)
    (matched,) = matching.arguments
    g.set_state(matching.random[0])
    score = matching.real(twin, matched["x"], matched["sigma"], settings.d(), g)
    loss = gap + penalty + 0.1 * score
    loss.backward()
    assert nn.utils.clip_grad_norm_(twin.parameters(), 0.5) > 0.5
    torch.optim.SGD(twin.parameters(), 0.1).step()
    twin.project()
    after = state(net)
    for name, value in state(twin).items():
        assert torch.allclose(after[name], value, atol=1e-5), name

    due = {"E data": e_data.mean(), "E chains": e_chains.mean(), **seen}
    due.update({"gap": gap, "penalty": penalty, "score": score, "train loss": loss})
    due["saturated"] = ((ends == 0) | (ends == 1)).float().mean()
    data = diverged["data"]
    due["data saturated"] = ((data == 0) | (data == 1)).float().mean()
    due["skipped"] = torch.tensor(0.0)
    assert terms.keys() == due.keys()
    for name, value in due.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
    assert len({round(value.item(), 6) for value in due.values()}) == len(due)
    remembered = sorted_gaps(buffer)[sorted_gaps(buffer) != 0]
    assert torch.equal(remembered, terms["gap"][None])


def test_data_get_noise_as_chains_have_and_score_matching_has_them_clean(monkeypatch):
    divergence = Calls(monkeypatch, "contrastive_divergence")
    matching = Calls(monkeypatch, "denoising_score_matching")
    settings = ebm.Settings(steps=1, smooth=0.1)
    net = network(channels=1)
    buffer = ebm.Buffer(600, (1, 4, 4), gen())
    grey = torch.full((600, 1, 4, 4), 128, dtype=torch.uint8)
    ebm.training_step(net, [adam(net)], grey, settings, buffer, gen(1))
    data = divergence.arguments[0]["data"]
    assert data.mean().item() == pytest.approx(128.5 / 256, abs=0.005)
    assert data.std().item() == pytest.approx(0.1, rel=0.03)

    matched = matching.arguments[0]
    assert torch.equal(ebm.quantise(matched["x"]), grey)
    assert matched["d"] == settings.d()
    sigma = matched["sigma"]
    assert sigma.shape == (600, 1, 1, 1)  # one an image
    place = sigma.log() / math.log(0.1)  # uniform in [0, 1]
    quantiles = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert torch.allclose(place.flatten().quantile(quantiles), quantiles, atol=0.08)
    assert place.min() >= 0
    assert place.max() <= 1

    terms = ebm.training_step(net, [adam(net)], torch.zeros_like(grey), settings, buffer, gen(1))
    black = divergence.arguments[1]["data"]
    assert black.min() == 0  # in the box, as chains are
    assert terms["data saturated"].item() == pytest.approx(0.49, abs=0.03)


def test_a_share_of_the_chains_starts_anew_in_a_training_step(monkeypatch):
    walk = Calls(monkeypatch, "langevin")
    net = network(channels=1)
    buffer = ebm.Buffer(600, (1, 4, 4), gen())
    buffer.chains.fill_(7)
    settings = ebm.Settings(steps=1, fresh=0.3)
    ebm.training_step(net, [adam(net)], rand_bytes(600, 1, 4, 4), settings, buffer, gen(1))
    anew = (ebm.quantise(walk.arguments[0]["x"]) != 7).flatten(1).any(1)
    assert anew.float().mean().item() == pytest.approx(0.3, abs=0.08)


def test_without_a_buffer_there_are_no_chains(monkeypatch):
    walk = Calls(monkeypatch, "langevin")
    divergence = Calls(monkeypatch, "contrastive_divergence")
    matching = Calls(monkeypatch, "denoising_score_matching")
    net = network()
    before = weights(net)
    images = rand_bytes(4, 3, 8, 8)
    terms = ebm.training_step(net, [adam(net)], images, ebm.Settings(), None, gen(1))
    assert walk.arguments == divergence.arguments == []
    assert len(matching.arguments) == 1
    assert set(terms) == {"score", "data saturated", "train loss", "skipped"}
    assert terms["train loss"].item() == pytest.approx(0.1 * terms["score"].item())
    assert terms["skipped"] == 0
    assert len(idle(net)) == 1
    assert not same(before, weights(net))

    def step(*arguments):
        raise AssertionError

    monkeypatch.setattr(ebm, "energy_and_gradient", step)
    ebm.training_step(net, [adam(net)], images, ebm.Settings(), None, gen(1))


def test_score_matching_alone_learns_to_take_noise_off():
    """In a few steps, of images that are all grey: mean((denoise(y) - x)^2) against that of y."""
    torch.manual_seed(0)
    net = ebm.EnergyNet(width=8, mults=(1, 2), blocks=1, channels=1)
    settings = ebm.Settings()
    grey = torch.full((16, 1, 8, 8), 128, dtype=torch.uint8)
    optimizer = adam(net, 3e-3)
    for _ in range(150):
        terms = ebm.training_step(net, [optimizer], grey, settings, None, gen(1))
    x = ebm.dequantise(grey, gen(2))
    y = x + 0.3 * randn(*x.shape, seed=3)
    error = (ebm.denoise(net, y, settings.d()) - x).square().mean()
    assert error < 0.1 * 0.3**2
    assert terms["score"] < 0.5


# ------------------------------------------------------------------------------------- bad steps


@pytest.mark.parametrize(
    "gap, norm, median, good",
    [
        (0.1, 1.0, 0.0, True),
        (-0.9, 1.0, 0.0, True),
        (1.1, 1.0, 0.0, False),
        (-1.1, 1.0, 0.1, False),
        (4.9, 1.0, 1.0, True),
        (-4.9, 1.0, 1.0, True),
        (5.1, 1.0, 1.0, False),
        (-5.1, 1.0, 1.0, False),
        (math.nan, 1.0, 0.0, False),
        (0.1, math.nan, 0.0, False),
        (0.1, math.inf, 0.0, False),
        (-math.inf, 1.0, 9.0, False),
    ],
)
def test_a_good_step_is_finite_and_its_gap_is_not_wild(gap, norm, median, good):
    recent = torch.tensor([0.0] * 10 + [median, -median] * 25 + [100.0, -100.0] * 20)
    energy = Gaussian(1.0, 0.5)
    energy.c.grad = torch.tensor(2.0 if good else math.nan)
    found = ebm.cancel_bad_step(energy, torch.tensor(gap), torch.tensor(norm), recent)
    assert found.shape == ()
    assert found.dtype == torch.bool
    assert found.item() == good
    assert energy.c.grad.item() == (2.0 if good else 0.0)
    assert energy.mean.grad is None


class Spoiled(ebm.EnergyNet):
    """Its energy is `factor` times what it should be."""

    factor = 1.0

    def forward(self, x):
        return self.factor * super().forward(x)


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
    """(net, optimizers, images, settings, buffer, generator), after two good steps.

    Convolutions have no singular value near 1, so that projection cannot change them.
    """
    net = network(kind=Spoiled)
    for layer in layers(net, nn.Conv2d):
        layer.weight.data *= 0.5
    buffer = ebm.Buffer(9, (3, 8, 8), gen()) if with_buffer else None
    optimizers = ebm.make_optimizers(net)
    parts = net, optimizers, rand_bytes(4, 3, 8, 8), ebm.Settings(steps=2), buffer, gen(1)
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
    ("contrastive_divergence", 30.0),
    ("contrastive_divergence", -30.0),
    ("denoising_score_matching", math.nan),
    ("denoising_score_matching", math.inf),
]


@pytest.mark.parametrize("function, value", BAD)
def test_a_bad_step_leaves_weights_chains_and_recent_gaps_as_they_were(
    monkeypatch, function, value
):
    parts = small_step()
    net, buffer = parts[0], parts[4]
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
    buffer = parts[4]
    spoil(monkeypatch, "contrastive_divergence", parts[0], 30.0)
    assert ebm.training_step(*parts)["skipped"] == 1
    remember(buffer, [-20.0] * 60)
    assert ebm.training_step(*parts)["skipped"] == 0
    remember(buffer, [0.1] * 60)
    assert ebm.training_step(*parts)["skipped"] == 1


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
    terms = {"data saturated": 0.1, "skipped": 0}  # as without chains
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
        ({"E data": -10.1}, "energ"),
        ({"E data": 9.9}, ""),
        ({"E chains": 11.0}, "energ"),
        ({"E chains": -9.9}, ""),
        ({"saturated": 0.56}, "black"),
        ({"saturated": 0.54}, ""),
        ({"saturated": 0.79, "data saturated": 0.6}, ""),
        ({"saturated": 0.81, "data saturated": 0.6}, "black"),
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


@pytest.mark.parametrize("with_buffer", [False, True])
def test_a_healthy_step_is_no_trouble(tmp_path, with_buffer):
    net = network()
    for layer in layers(net, nn.Linear):
        nn.init.zeros_(layer.weight)  # a flat energy, as at first
    buffer = ebm.Buffer(9, (3, 8, 8), gen()) if with_buffer else None
    images = rand_bytes(4, 3, 8, 8)
    terms = ebm.training_step(net, [adam(net)], images, ebm.Settings(steps=2), buffer, gen(1))
    assert trouble_after(tmp_path, [terms], net) == ""


def test_centring_makes_the_mean_energy_of_data_zero():
    """Of data with their noise and within [0, 1], not of clean ones or others."""
    net = network(channels=1)
    images = torch.zeros(200, 1, 8, 8, dtype=torch.uint8)
    clean = ebm.dequantise(images, gen(1))
    noisy = clean + 0.1 * randn(*clean.shape, seed=2)

    def mean_energy(x):
        with torch.no_grad():
            return net(x).mean().item()

    before = mean_energy(clean)
    _, grad = ebm.energy_and_gradient(net, clean)
    ebm.centre_energy(net, images, ebm.Settings(smooth=0.1), gen(3))
    assert abs(before) > 0.1
    assert abs(mean_energy(noisy.clamp(0, 1))) < 0.003
    assert abs(mean_energy(noisy)) > 0.01
    assert abs(mean_energy(clean)) > 0.01
    assert torch.equal(ebm.energy_and_gradient(net, clean)[1], grad)
    assert all(p.requires_grad for p in net.parameters())


# ---------------------------------------------------------------------------------------- network


def stretches(net):
    """The largest singular value of each convolution."""
    values = []
    for layer in layers(net, nn.Conv2d):
        matrix = layer.weight.detach().flatten(1).double()
        values.append(torch.linalg.matrix_norm(matrix, 2))
    return torch.stack(values)


def test_projection_keeps_the_largest_singular_value_of_each_convolution_at_one():
    net = network(width=16, mults=(1, 2, 2), blocks=2)
    assert len(stretches(net)) == 1 + 2 * 6 + 1  # stem, blocks and a skip
    assert stretches(net).min() > 0.5
    assert stretches(net).max() < 1.05  # as it starts
    g = gen()
    with torch.no_grad():
        for _ in range(200):  # as in training: one iteration after each small change
            for p in net.parameters():
                p += 0.003 * torch.randn(p.shape, generator=g)
            net.project()
    assert stretches(net).max() < 1.03
    assert stretches(net).min() > 0.95  # they would be far above 1


def test_projection_leaves_smaller_singular_values_alone():
    net = network(width=16, mults=(1, 2, 2), blocks=2)
    for layer in layers(net, nn.Conv2d):
        layer.weight.data *= 0.5
    before = weights(net)
    net.project()
    assert same(before, weights(net))


def test_projection_scales_a_layer_as_a_whole():
    net = network()
    layer = layers(net, nn.Conv2d)[1]
    before = layer.weight.detach().clone()
    largest = stretches(net)[1]
    layer.weight.data *= 7
    net.project(iterations=100)
    assert torch.allclose(layer.weight, before / largest, atol=1e-5)
    assert layer.weight.requires_grad


def test_the_state_of_the_power_iteration_is_kept_with_the_weights():
    nets = network(0), network(1)
    nets[1].load_state_dict(nets[0].state_dict())
    for net in nets:
        for layer in layers(net, nn.Conv2d):
            layer.weight.data += 0.1 * randn(*layer.weight.shape, seed=3)
        net.project()
    assert same(state(nets[0]), state(nets[1]))


def test_gradient_of_the_energy_is_that_of_finite_differences():
    net = network().double()
    x = rand(2, 3, 8, 8, dtype=torch.float64)
    v = randn(2, 3, 8, 8, dtype=torch.float64)
    e, grad = ebm.energy_and_gradient(net, x)
    assert torch.equal(e, net(x).detach())
    slope = (net(x + 1e-4 * v) - net(x - 1e-4 * v)) / 2e-4
    assert torch.allclose((grad * v).flatten(1).sum(1), slope, rtol=1e-5)


def test_every_layer_and_every_mean_matters():
    net = network(mults=(1, 2, 2))
    energies = net(rand(2, 3, 16, 16))
    (energies * torch.tensor([1.0, -2.0])).sum().backward()
    assert idle(net) == []
    (head,) = layers(net, nn.Linear)
    assert head.weight.grad.all()
    assert head.weight.numel() == 2 * (8 + 16 + 16)  # of two functions, at each resolution


def test_far_out_the_energy_grows_as_the_square_of_noise_does():
    net = network()
    z = rand(3, 3, 16, 16) - 0.5
    ratio = net(0.5 + 2e4 * z) / net(0.5 + 1e4 * z)
    assert torch.allclose(ratio, torch.full_like(ratio, 4), rtol=0.01)


def test_bf16_stays_between_stem_and_means():
    fine = network()
    rough = network(amp=True)
    x = rand(4, 3, 16, 16)
    seen = []

    def look(layer, inputs, output):
        seen.append((inputs[0], output))

    for layer in layers(rough, (nn.Conv2d, nn.Linear)):
        layer.register_forward_hook(look)
    e = rough(x)
    stem, *blocks, head = seen  # in the order of their use
    assert {tensor.dtype for tensor in stem + head} == {torch.float32}
    assert {output.dtype for _, output in blocks} == {torch.bfloat16}
    assert len(blocks) == 5
    means = head[0]
    assert (means != means.bfloat16()).any(0).all()  # not rounded either
    assert e.dtype == torch.float32
    assert not torch.equal(e, fine(x))
    assert (e - fine(x)).abs().max() < 0.01


def test_size_of_the_network():
    count = sum(p.numel() for p in ebm.EnergyNet().parameters())
    assert 4.5e6 < count < 6e6
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
    """Two correlated pixels: E = c / 2 (x^2 + y^2 - 2 r x y) / (1 - r^2), about .5."""
    c, r, a = 1.0, 0.8, 0.02
    s = 0.02 * math.sqrt(0.04)

    def energy(x):
        x, y = (x - 0.5).unbind(1)
        return c / 2 * (x**2 + y**2 - 2 * r * x * y) / (1 - r**2)

    truth = torch.tensor([[0.53, 9.0]]).expand(4000, 2)
    known = torch.tensor([True, False])

    def keep_known(x):
        return torch.where(known, truth, x)

    start = keep_known(rand(4000, 2))
    x, _ = ebm.langevin(energy, start, 600, a, s, generator=gen(), constrain=keep_known)
    t = s**2 / (2 * a)
    assert (x[:, 0] == truth[:, 0]).all()
    assert x[:, 1].mean().item() == pytest.approx(0.5 + r * 0.03, abs=0.002)
    assert x[:, 1].std().item() == pytest.approx(math.sqrt(t / c * (1 - r**2)), rel=0.06)
