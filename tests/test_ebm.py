"""EBM's mathematics and network, on the real functions, against densities known in closed form."""
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import ebm

torch.set_num_threads(1)  # on a busy machine many wait for each other

def gen(seed=0):
    return torch.Generator().manual_seed(seed)

def rand(*shape, seed=1, dtype=torch.float32):
    return torch.rand(shape, generator=gen(seed), dtype=dtype)

def quadratic(c, mean=0.5):  # c / 2 |x - mean|^2
    return lambda x: c / 2 * (x - mean).square().flatten(1).sum(1)

def network(seed=0, **options):
    torch.manual_seed(seed)
    net = ebm.EnergyNet(**{"width": 8, "mults": (1, 2), "blocks": 1, **options})
    assert not net.head.weight.any()  # flat at the start
    nn.init.normal_(net.head.weight, std=0.1)
    return net

def bits(module):
    return {name: value.clone() for name, value in module.state_dict().items()}

def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

# ---- the sampler ----
@pytest.mark.parametrize("share", [0.1, 0.8, 1.5])
def test_langevin_has_the_stationary_variance_of_its_own_order_of_noise_and_step(share):
    """x <- x - a c x + s z. Noise before the gradient would have (1 - a c)^2 times that, a factor
    of two in the step or a missing root twice."""
    c, a, s = 40.0, share / 40, 0.02
    x = ebm.langevin(quadratic(c), rand(20_000, 1), 60, a, s, generator=gen())
    due = s**2 / (a * c * (2 - a * c))
    assert x.var().item() == pytest.approx(due, rel=0.04) and abs(x.mean() - 0.5) < 0.01
    t = s**2 / (2 * a)  # as the docstring has it
    assert due == pytest.approx(t / c / (1 - c * a / 2))

def test_langevin_samples_the_density_of_its_temperature():
    """Of a double well, by numerical integration: exp(-E / T), T = noise^2 / (2 step)."""
    step, noise, grid = 0.01, 0.02, torch.linspace(0, 1, 2001, dtype=torch.float64)
    def energy(x):
        return 10 * ((x - 0.3).square() * (x - 0.75).square()).flatten(1).sum(1) + 0.02 * x.sum(1)
    p = torch.exp(-energy(grid[:, None]) / (noise**2 / (2 * step)))
    x = ebm.langevin(energy, rand(4000, 1), 3000, step, noise, generator=gen()).double()
    for power in 1, 2:
        assert abs(x.pow(power).mean() - (p * grid**power).sum() / p.sum()) < 0.01
    wrong = p**2
    assert abs(x.mean() - (wrong * grid).sum() / wrong.sum()) > 0.02

def test_langevin_step_by_step_as_written():
    x, chain, g = rand(3, 2, 4), [], gen()
    def energy(x):
        return (x**3).flatten(1).sum(1) - 2 * x.flatten(1).prod(1)
    hook = lambda x, e, g: (chain.append((x, e, g)), x)[1]  # noqa: E731
    ebm.langevin(energy, x, 5, 0.3, 0.2, 0.7, gen(), hook)
    for after, e, gradient in chain:
        z, others = torch.randn(x.shape, generator=g), x.flatten(1).repeat(8, 1, 1)
        others[torch.arange(8), :, torch.arange(8)] = 1  # the product of all but one
        due = 3 * x**2 - 2 * others.prod(2).T.reshape(x.shape)
        assert torch.allclose(gradient, due, atol=1e-6) and torch.allclose(e, energy(x))
        x = (x - 0.3 * due.clamp(-0.7, 0.7) + 0.2 * z).clamp(0, 1)
        assert torch.allclose(after, x)
    assert len(chain) == 5 and any((g.abs() > 0.7).any() for _, _, g in chain)

def test_chains_stay_in_the_box_after_the_noise():
    x = ebm.langevin(quadratic(0.0), rand(50, 3, 8, 8), 1, 1.0, 3.0, generator=gen())
    assert x.min() == 0 and x.max() == 1 and 0.5 < ((x == 0) | (x == 1)).float().mean() < 1

def test_the_gradient_is_cut_in_each_pixel_and_goes_downhill():
    slopes = torch.tensor([100.0, -100.0, 0.001])
    x = ebm.langevin(lambda x: x @ slopes, torch.full((2, 3), 0.5), 2, 10.0, 0.0, clamp=0.01)
    assert torch.allclose(x, torch.tensor([0.3, 0.7, 0.48]))

@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("mode", [True, False])
def test_nothing_of_the_network_or_the_caller_changes_while_sampling(mode, fails):
    """Weights, vectors of the power iteration, mode, requires_grad, gradients, the start."""
    net, x = network().train(mode), rand(2, 3, 8, 8)
    before, start, count = bits(net), x.clone(), [0]
    def hook(x, e, g):
        count[0] += 1
        if fails and count[0] == 2:
            raise InterruptedError
        return x
    try:
        with torch.no_grad():  # a caller may have it, as evaluation does
            end = ebm.langevin(net, x, 3, 10.0, 0.005, 0.01, gen(), hook)
        assert not fails and not end.requires_grad and not torch.equal(end, start)
    except InterruptedError:
        assert fails
    assert same(before, bits(net)) and torch.equal(x, start) and not x.requires_grad
    assert all(m.training == mode for m in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert torch.is_grad_enabled()

def test_images_of_a_batch_do_not_see_each_other():
    """The mean over the batch for its sum would divide the gradient of each by the batch."""
    net, x, seen = network(), rand(8, 3, 8, 8), {}
    for count in 8, 1:
        ebm.langevin(net, x[:count], 1, 1.0, 0.0, hook=lambda x, e, g, count=count: (
            seen.__setitem__(count, (e[0], g[0])), x)[1])
    assert torch.allclose(seen[8][0], seen[1][0], atol=1e-6)
    assert torch.allclose(seen[8][1], seen[1][1], rtol=1e-4, atol=1e-8) and seen[1][1].any()

def test_a_langevin_step_costs_two_forwards():
    """Three, if the weights had gradients; and no singular values are computed in it."""
    class Count(TorchDispatchMode):
        total = 0
        def __torch_dispatch__(self, operation, kinds, arguments=(), options=None):
            out, kind = operation(*arguments, **options or {}), operation.overloadpacket
            if kind in flop_registry:
                self.total += flop_registry[kind](*arguments, **options or {}, out_val=out)
            return out
    net, x = network(width=16, mults=(1, 2, 4), blocks=2), rand(2, 3, 32, 32)
    with Count() as forward, torch.no_grad():
        net(x)
    with Count() as step:
        ebm.langevin(net, x, 1, 10.0, 0.005)
    assert 1.9 < step.total / forward.total <= 2.2

# ---- the loss ----
class Gaussian(nn.Module):
    """E = c / 2 (x - mean)^2, with both to learn."""
    def __init__(self, c, mean):
        super().__init__()
        self.c, self.mean = nn.Parameter(torch.tensor(c)), nn.Parameter(torch.tensor(mean))
    def forward(self, x):
        return quadratic(self.c, self.mean)(x)

def test_terms_and_gradients_of_the_loss_are_the_analytic_ones():
    energy = Gaussian(3.0, 0.4).double()
    data, chains = rand(5, 1, dtype=torch.float64), rand(7, 1, seed=2, dtype=torch.float64)
    gap, penalty, plus, minus = ebm.contrastive_divergence(energy, data, chains, alpha=0.3)
    due = [1.5 * (x - 0.4).square().flatten() for x in (data, chains)]
    assert torch.allclose(plus, due[0]) and torch.allclose(minus, due[1])
    assert gap.item() == pytest.approx((due[0].mean() - due[1].mean()).item())
    assert penalty.item() == pytest.approx(0.3 * sum(e.square().mean() for e in due).item())
    gap.backward()
    assert energy.mean.grad.item() == pytest.approx(3 * (chains.mean() - data.mean()).item())
    assert energy.c.grad.item() == pytest.approx(gap.item() / 3)

def test_one_step_downhill_lowers_the_gap_and_nothing_reaches_the_chains():
    net, data, chains = network(), rand(6, 3, 8, 8) / 2, rand(6, 3, 8, 8, seed=2).requires_grad_()
    optimizer, gaps = torch.optim.SGD(net.parameters(), 0.02), []
    for _ in range(2):
        optimizer.zero_grad()
        gap, *_ = ebm.contrastive_divergence(net, data, chains)
        gap.backward()
        optimizer.step()
        gaps.append(gap.item())
    assert gaps[1] < gaps[0] and chains.grad is None

def test_both_batches_go_through_one_forward():
    calls = []
    ebm.contrastive_divergence(
        lambda x: (calls.append(len(x)), x.sum(1))[1], rand(3, 1), rand(3, 1))
    assert calls == [6]

def test_contrastive_divergence_recovers_mean_and_temperature_over_variance():
    """Data N(.55, .07^2), T = 1, a = 5e-4, K = 20 steps of persistent chains. As the steps are
    finite, their variance is the data's v where s^2 / (a c (2 - a c)) = v, not where c = 1 / v."""
    v, a = 0.0049, 5e-4
    energy, buffer, g = Gaussian(100.0, 0.3), ebm.Buffer(2000, (1,), gen()), gen(3)
    s, tail = math.sqrt(2 * a), []
    optimizer = torch.optim.Adam([{"params": [p]} for p in energy.parameters()], betas=(0.0, 0.99))
    for step in range(500):
        for group, lr in zip(optimizer.param_groups, (8.0, 5e-3), strict=True):
            group["lr"] = lr * (1 - step / 500)
        data = 0.55 + math.sqrt(v) * torch.randn(1000, 1, generator=g)
        slots, x = buffer.draw(1000, 0.0, g)
        x = ebm.langevin(energy, x, 20, a, s, generator=g)
        optimizer.zero_grad()
        ebm.contrastive_divergence(energy, data, x)[0].backward()
        optimizer.step()
        buffer.chains[slots] = ebm.quantise(x)
        tail.append((energy.c.item(), energy.mean.item()))
    c, mean = torch.tensor(tail[-100:]).mean(0).tolist()
    due = (1 - math.sqrt(1 - 2 * a / v)) / a  # the root of s^2 / (a c (2 - a c)) = v at T = 1
    assert due == pytest.approx(215.6, abs=1) and 1 / v == pytest.approx(204, abs=1)
    assert c == pytest.approx(due, rel=0.03) and mean == pytest.approx(0.55, abs=0.005)

def test_score_matching_is_the_mean_square_that_it_says():
    x, sigma = rand(3, 2, 4, 4, dtype=torch.float64), torch.tensor([0.1, 0.5, 2.0]).view(3, 1, 1, 1)
    z = torch.randn(x.shape, generator=gen(5)).double()
    score = ebm.denoising_score_matching(quadratic(3.0, 0.4), x, sigma, 0.7, gen(5))
    due = (0.7 / sigma * 3 * (x + sigma * z - 0.4) - z).square().mean()
    assert score.item() == pytest.approx(due.item())
    many = rand(2000, 3, 4, 4)
    flat = ebm.denoising_score_matching(quadratic(0.0), many, torch.ones(2000, 1, 1, 1), 5.0, gen())
    assert flat.item() == pytest.approx(1, abs=0.02)

@pytest.mark.parametrize("sigma", [0.05, 0.3])
def test_score_matching_finds_the_best_guess_of_a_gaussian(sigma):
    """x ~ N(m, v): E[x | y] = y - sigma^2 / (v + sigma^2) (y - m), so scale c = sigma^2 /
    (v + sigma^2). The loss is a parabola in c, whose least lies at that."""
    v, m, scale, known = 0.04, 0.6, 90.0, {}
    x = m + math.sqrt(v) * torch.randn(200_000, 1, generator=gen(), dtype=torch.float64)
    due = sigma**2 / (v + sigma**2) / scale
    for c in 0.0, due, 2 * due:
        known[c] = ebm.denoising_score_matching(
            quadratic(c, m), x, torch.full((len(x), 1), sigma), scale, gen(1)).item()
    low, middle, high = known.values()
    least = due + due * (low - high) / (2 * (low + high - 2 * middle))
    assert least == pytest.approx(due, rel=0.02) and middle < min(low, high)

def test_score_matching_teaches_every_weight_but_the_constant():
    net, x = network(), rand(4, 3, 8, 8)
    ebm.denoising_score_matching(net, x, torch.full((4, 1, 1, 1), 0.1), 90.0, gen()).backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == ["head.bias"] and not x.requires_grad and x.grad is None

def test_a_tweedie_step_takes_the_noise_off():
    """Of E fitted by hand to N(m, v) smoothed by s, at T: the step must end at E[x | y]."""
    class args:
        step_size, noise, smooth = 20.0, 0.02, 0.03
    m, v, t = 0.5, 0.01, args.noise**2 / (2 * args.step_size)
    energy, y = quadratic(t / (v + args.smooth**2), m), rand(9, 1)
    x = ebm.langevin(energy, y, 1, ebm.tweedie(args), 0.0)
    assert torch.allclose(x, m + v / (v + args.smooth**2) * (y - m), atol=1e-6)

# ---- data and buffer ----
def test_quantise_inverts_dequantise_and_leaves_no_grid():
    values = torch.arange(256, dtype=torch.uint8).expand(2000, 256)
    x = ebm.dequantise(values, gen())
    assert (ebm.quantise(x) != values).float().mean() < 1e-4  # fp32 rounds 255.999999 to 256
    assert x.min() >= 0 and x.max() <= 1
    assert (x.mean(0) - (torch.arange(256) + 0.5) / 256).abs().max() < 2e-4
    assert (x.std(0) * math.sqrt(12) * 256 - 1).abs().max() < 0.08
    assert (x * 255 - (x * 255).round()).abs().mean() > 0.2  # data on a grid would be told by it
    assert ebm.quantise(torch.tensor([-3.0, 0.0, 1.0, 7.0])).tolist() == [0, 0, 255, 255]

def test_buffer_draws_without_replacement_from_slots_that_it_names():
    buffer, g = ebm.Buffer(50, (2, 4, 4), gen()), gen(1)
    before = buffer.chains.clone()
    slots, x = buffer.draw(20, 0.0, g)
    assert len(slots.unique()) == 20 and x.shape == (20, 2, 4, 4)
    assert torch.equal(ebm.quantise(x), before[slots]) and torch.equal(buffer.chains, before)
    new = rand(20, 2, 4, 4, seed=5)
    buffer.chains[slots] = ebm.quantise(new)
    assert torch.equal(buffer.chains[slots], ebm.quantise(new))
    rest = torch.ones(50, dtype=torch.bool)
    rest[slots] = False
    assert torch.equal(buffer.chains[rest], before[rest])
    assert len(torch.cat([buffer.draw(20, 0.0, g)[0] for _ in range(20)]).unique()) == 50

@pytest.mark.parametrize("fresh", [0.0, 0.05, 0.5, 1.0])
def test_a_binomial_share_of_the_chains_starts_anew_in_uniform_noise(fresh):
    buffer, g = ebm.Buffer(4000, (1, 2, 2), gen()), gen(1)
    buffer.chains.fill_(7)
    anew = []
    for _ in range(10):
        slots, x = buffer.draw(1000, fresh, g)
        new = (ebm.quantise(x) != 7).flatten(1).any(1)  # all pixels or none, but for chance
        anew.append(new.sum().item())
    total = sum(anew)
    assert abs(total - 10_000 * fresh) <= 4 * math.sqrt(10_000 * fresh * (1 - fresh))
    assert fresh in (0, 1) or len(set(anew)) > 1  # by chance, not the first so many
    if fresh == 1:
        assert x.mean().item() == pytest.approx(0.5, abs=0.02)
        assert x.std().item() == pytest.approx(1 / math.sqrt(12), abs=0.01)
    assert (buffer.chains == 7).all()  # until they are written back

def test_a_fresh_buffer_is_uniform_and_its_state_can_be_kept():
    buffer = ebm.Buffer(300, (3, 8, 8), gen())
    assert buffer.chains.dtype == torch.uint8
    assert (buffer.chains.flatten().bincount(minlength=256) > 100).all()
    other = ebm.Buffer(300, (3, 8, 8), gen(1))
    other.load_state_dict(buffer.state_dict())
    assert torch.equal(other.draw(9, 0.3, gen(2))[1], buffer.draw(9, 0.3, gen(2))[1])

# ---- guards ----
@pytest.mark.parametrize("gap, norm, median, good", [
    (0.1, 1.0, 0.0, True), (-0.9, 1.0, 0.0, True), (1.1, 1.0, 0.0, False), (-1.1, 1.0, 0.1, False),
    (4.9, 1.0, 1.0, True), (5.1, 1.0, 1.0, False), (math.nan, 1.0, 0.0, False),
    (0.1, math.nan, 0.0, False), (0.1, math.inf, 0.0, False), (-math.inf, 1.0, 9.0, False)])
def test_a_good_step_is_finite_and_its_gap_is_not_wild(gap, norm, median, good):
    recent = torch.full((101,), 100.0)  # wild ones do not move a median
    recent[:60:2], recent[1:60:2] = median, -median
    recent[100] = math.nan
    assert ebm.step_is_good(torch.tensor(gap), torch.tensor(norm), recent).item() == good
    assert ebm.step_is_good(torch.tensor(gap), torch.tensor(norm), recent[:0]).item() == (
        good and abs(gap) < 1)  # the first step of an epoch

def last(**changed):
    return {key: changed.get(key.replace(" ", "_"), 0.1) for key in ebm.TERMS}

@pytest.mark.parametrize("changed, skipped, named", [
    ({}, 49, ""), ({}, 50, "50 steps"), ({"E_data": -10.1}, 0, "energ"), ({"E_data": 9.9}, 0, ""),
    ({"E_chains": 11.0}, 0, "energ"), ({"E_chains": -9.9}, 0, ""),
    ({"saturated": 0.56}, 0, "black"), ({"saturated": 0.54}, 0, ""),
    ({"saturated": 0.79, "data_saturated": 0.6}, 0, ""),
    ({"saturated": 0.81, "data_saturated": 0.6}, 0, "black")])
def test_what_counts_as_trouble(changed, skipped, named):
    text = ebm.trouble(network(), skipped, 1000, last(**changed))
    assert named in text and bool(text) == bool(named)

def test_an_epoch_of_bad_steps_is_trouble_however_short():
    assert "20 steps" in ebm.trouble(network(), 20, 20, last())
    assert not ebm.trouble(network(), 19, 20, last())

def test_weights_that_are_not_finite_are_trouble():
    net = network()
    with torch.no_grad():
        net.head.bias[0] = math.nan
    assert "not finite" in ebm.trouble(net, 0, 1000, last())

# ---- the network ----
def stretch(net):  # largest singular value of each convolution
    return torch.stack([torch.linalg.matrix_norm(layer.weight.detach().flatten(1).double(), 2)
                        for layer in net.convolutions])

def test_projection_keeps_the_largest_singular_value_of_each_convolution_at_one():
    net = network(width=16, mults=(1, 2, 2), blocks=2)
    assert 0.5 < stretch(net).min() and stretch(net).max() < 1.05  # as it starts
    g = gen()
    with torch.no_grad():
        for _ in range(200):  # as in training: one iteration after each small change
            for p in net.parameters():
                p += 0.003 * torch.randn(p.shape, generator=g)
            net.project()
        assert stretch(net).max() < 1.03
        for layer in net.convolutions:
            layer.weight *= 0.5
        before = bits(net)
        net.project()  # a smaller one is left alone
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items() if "weight" in k)
    assert len(net.convolutions) == 1 + 2 * 6 + 1  # stem, blocks and a skip

def test_gradient_of_the_energy_is_that_of_finite_differences():
    net, x = network().double(), rand(2, 3, 8, 8, dtype=torch.float64)
    (g,) = torch.autograd.grad(net(x.requires_grad_()).sum(), x)
    x, v = x.detach(), torch.randn(x.shape, generator=gen(), dtype=torch.float64)
    slope = (net(x + 1e-4 * v) - net(x - 1e-4 * v)) / 2e-4
    assert torch.allclose((g * v).flatten(1).sum(1), slope, rtol=1e-5)

def test_every_layer_matters():
    net, x = network(mults=(1, 2, 2)), rand(2, 3, 16, 16)
    (net(x) * torch.tensor([1.0, -2.0])).sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]

def test_far_out_the_energy_grows_as_the_square_of_noise_does():
    net, z = network(), rand(3, 3, 16, 16) - 0.5
    ratio = net(0.5 + 2e4 * z) / net(0.5 + 1e4 * z)
    assert torch.allclose(ratio, torch.full_like(ratio, 4), rtol=0.01)

def test_bf16_stays_between_stem_and_pool():
    fine, rough, x = network(), network(amp=True), rand(4, 3, 16, 16)
    kinds = {}
    for name in "stem", "head":
        getattr(rough, name).register_forward_hook(
            lambda _, inputs, output, name=name: kinds.__setitem__(
                name, (inputs[0].dtype, output.dtype)))
    e = rough(x)
    assert set(kinds.values()) == {(torch.float32, torch.float32)} and e.dtype == torch.float32
    assert not torch.equal(e, fine(x)) and (e - fine(x)).abs().max() < 0.01

def test_size_of_the_network():
    with torch.device("meta"):
        count = sum(p.numel() for p in ebm.EnergyNet().parameters())
    assert 4.5e6 < count < 6e6
    for mults in (1,), (1, 2, 1, 1, 1, 1):
        assert network(mults=mults)(rand(2, 3, 32, 32)).shape == (2,)

# ---- uses ----
def test_auroc_is_the_share_of_pairs_in_the_right_order():
    inside, outside = torch.randint(12, (2, 40), generator=gen())
    pairs = [(b > a) + 0.5 * (b == a) for a in inside.tolist() for b in outside.tolist()]
    assert ebm.auroc(inside.float(), outside.float()) == pytest.approx(sum(pairs) / len(pairs))
    low, high = rand(5), 1 + rand(7)
    assert (ebm.auroc(low, high), ebm.auroc(high, low), ebm.auroc(low, low)) == (1, 0, 0.5)

def test_outliers_are_what_they_are_called():
    test = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8, generator=gen())
    others = ebm.outliers(test, gen(1))
    assert all(x.shape == test.shape and x.dtype == torch.uint8 for x in others.values())
    assert all(len(x.unique(dim=0)) == 20 for x in others.values())
    assert torch.equal(others["upside-down"].flip(2), test)
    assert torch.equal(*(x.flatten(2).sort(2).values for x in (others["shuffled"], test)))
    pixels = [x.long().mul(torch.tensor([65536, 256, 1])[:, None, None]).sum(1).flatten(1).sort(1)
              for x in (others["shuffled"], test)]  # colours stay together
    assert torch.equal(*(x.values for x in pixels))
    assert (others["shuffled"] != test).float().mean() > 0.9
    assert (others["constant"] == others["constant"][:, :, :1, :1]).all()
    means = (test.int()[:, None] + test.int()) // 2
    assert all((means == x.int()).flatten(2).all(2).any() for x in others["interpolated"])
    assert others["uniform"].float().mean().item() == pytest.approx(127.5, abs=1)

def test_inpainting_keeps_the_known_and_samples_the_rest_given_it():
    """Two correlated pixels: E = c / 2 (x^2 + y^2 - 2 r x y) / (1 - r^2), about .5."""
    c, r, a, s = 1.0, 0.8, 0.02, 0.02 * math.sqrt(0.04)
    def energy(x):
        x, y = (x - 0.5).unbind(1)
        return c / 2 * (x**2 + y**2 - 2 * r * x * y) / (1 - r**2)
    truth, known = torch.tensor([[0.53, 9.0]]).expand(4000, 2), torch.tensor([True, False])
    x = ebm.langevin(energy, torch.where(known, truth, rand(4000, 2)), 600, a, s, generator=gen(),
                     hook=lambda x, e, g: torch.where(known, truth, x))
    t = s**2 / (2 * a)
    assert (x[:, 0] == truth[:, 0]).all()
    assert x[:, 1].mean().item() == pytest.approx(0.5 + r * 0.03, abs=0.002)
    assert x[:, 1].std().item() == pytest.approx(math.sqrt(t / c * (1 - r**2)), rel=0.06)
