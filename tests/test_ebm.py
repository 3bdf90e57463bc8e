"""ebm.py's losses, samplers, energies and network, against densities known in closed form."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ebm
import ncsn
from ebm import SIGMA_DATA, SIGMA_MAX, SIGMA_MIN, T


def randn(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_bytes(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


class Gaussian(nn.Module):
    """The energy c / 2 |y - mean|^2, with c and mean to learn."""

    def __init__(self, c, mean=0.0):
        super().__init__()
        self.c = nn.Parameter(torch.tensor(c))
        self.mean = nn.Parameter(torch.tensor(mean))

    def forward(self, y):
        return self.c / 2 * (y - self.mean).square().flatten(1).sum(1)

    def grad_E(self, y):
        return self.c * (y - self.mean)


def sees_sigma(y, s=0.5):
    """y - E[x | y] of x ~ N(0, s^2 I), with sigma^2 taken from y as mean(y^2) - s^2."""
    return (1 - s**2 / y.square().mean()) * y


def network(shape=(3, 8, 8), seed=0, **options):
    """A small network whose layers that start at zero are random."""
    torch.manual_seed(seed)
    net = ebm.EnergyNet(shape, **{"width": 8, "mults": (1, 2), "blocks": 1, **options})
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return net


def state(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------------------------ bytes, sigma


def test_noise_levels_are_logistic_and_stratified():
    torch.manual_seed(0)
    sigma = ebm.sample_sigma(torch.zeros(1001, 1)).double()
    assert sigma.median().item() == pytest.approx(0.5, rel=0.01)
    assert sigma.quantile(0.25).item() == pytest.approx(0.5 * 3**-0.8, rel=0.01)
    assert sigma.quantile(0.75).item() == pytest.approx(0.5 * 3**0.8, rel=0.01)
    assert sigma.min().item() == pytest.approx(0.03)
    assert sigma.max().item() == 40
    inside = sigma[(sigma > SIGMA_MIN) & (sigma < SIGMA_MAX)]
    slices = (1001 * torch.sigmoid((inside / 0.5).log() / 0.8)).floor().sort().values
    assert (slices.diff() == 1).double().mean() > 0.98  # one in each
    assert (sigma.log().diff()).abs().mean() > 1  # in no order


# -------------------------------------------------------------------------------- score matching


def test_dsm_loss_of_a_gaussian_energy_is_the_one_by_hand():
    """(c (x + sigma z) / sigma - z)^2 = c^2 x^2 / sigma^2 + (c - 1)^2 in the mean."""
    torch.manual_seed(0)
    c = 0.7
    sigma = torch.tensor([0.05, 0.5, 20.0])
    x = randn(3, 1, 300, 300) * torch.tensor([0.1, 0.8, 0.5]).view(3, 1, 1, 1)
    due = c**2 * x.square().mean((1, 2, 3)) / sigma**2 + (c - 1) ** 2
    loss = ebm.dsm_loss(Gaussian(c), x, sigma)
    assert torch.allclose(loss, due * (1 + (sigma / SIGMA_DATA) ** 2), rtol=0.02)


@pytest.mark.parametrize("backend", [None, "aot_eager"])  # as it is, and as --compile has it
def test_weights_get_the_gradient_of_the_loss_by_finite_differences(backend):
    net = network((3, 4, 4), width=4, mults=(1,)).double()
    if backend:
        net.grad_E = torch.compile(net.grad_E, backend=backend, fullgraph=True)
    x = randn(2, 3, 4, 4, dtype=torch.float64)

    def loss():
        torch.manual_seed(0)
        return ebm.dsm_loss(net, x, torch.tensor([0.2, 2.0])).sum()

    loss().backward()
    for weight in net.down[0].conv1.weight, net.out.weight, net.stem.bias:
        direction = randn(*weight.shape, dtype=torch.float64)
        due = (weight.grad * direction).sum().item()
        losses = []
        for change in 1e-5, -2e-5:
            weight.data += change * direction
            losses.append(loss().item())
        weight.data += 1e-5 * direction
        assert due == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5)


def test_the_loss_is_near_1_at_every_level_before_training():
    torch.manual_seed(0)
    net = ebm.EnergyNet((3, 32, 32), width=8, blocks=1)
    x = nn.functional.interpolate(randn(16, 3, 4, 4), size=32, mode="bicubic")
    x = 0.5 * x / x.square().mean().sqrt()
    for sigma in 0.03, 0.1, 0.3, 1.0, 4.0, 40.0:
        with torch.no_grad():
            loss = ebm.dsm_loss(net, x, torch.full((16,), sigma)).mean()
        assert 0.65 < loss < 1.35


# ----------------------------------------------------------------------------------------- samplers


@pytest.mark.parametrize("h", [0.05, 0.5, 1.5])
def test_langevin_leaves_the_variance_t_around_an_image(h):
    """The usual 2 h T would leave T / (1 - h / 2) there."""
    torch.manual_seed(0)
    y = ebm.langevin(Gaussian(1.0, 0.5).grad_E, 0.5 + 3 * randn(40_000, 1), 200, h, 0.02)
    assert y.var().item() == pytest.approx(0.02, rel=0.03)
    assert y.mean().item() == pytest.approx(0.5, abs=0.005)


def test_langevin_has_the_variance_recursion_of_its_steps():
    """v <- (1 - h c)^2 v + h (2 - h) T, by default with h = 0.1 and T = SIGMA_MIN^2."""
    torch.manual_seed(0)
    c = 0.3
    v = 1e-4
    for steps in range(4):
        y = ebm.langevin(Gaussian(c).grad_E, 0.01 * randn(100_000, 1), steps)
        assert y.var().item() == pytest.approx(v, rel=0.02)
        v = (1 - 0.1 * c) ** 2 * v + 0.1 * 1.9 * 0.03**2


def test_the_solver_is_exact_where_d_does_not_change():
    """E = |y - a|^2 / 2, so D = a: y is a + SIGMA_MIN z at the end, and D(y) is a."""
    seen = []

    def grad_E(y):
        seen.append(y)
        return y - 0.3

    z = randn(2, 1, 4, 4)
    x = ebm.dpm_solver(grad_E, z, langevin_steps=0)
    assert len(seen) == 12
    assert torch.allclose(seen[0], 40 * z)
    ratio = (seen[-1] - 0.3) / (40 * z - 0.3)  # the same for all pixels: sigma shrinks by it
    assert torch.allclose(ratio, torch.tensor(0.03 / 40), rtol=1e-4)
    assert torch.allclose(x, torch.tensor(0.3), atol=1e-6)


def test_the_solver_has_order_2_on_a_gaussian():
    """Exactly, mean(y^2) - s^2 falls as sigma^2. Twice the levels make a quarter of the error."""
    z = randn(1, 1, 100, 100, dtype=torch.float64)
    z = z / z.square().mean().sqrt()
    variance = 0.5**2 + (40**2 - 0.5**2) * (0.03 / 40) ** 2
    errors = []
    for count in 96, 192, 384:
        x = ebm.dpm_solver(sees_sigma, z, count, langevin_steps=0)
        errors.append(x.square().mean().sqrt().item() - 0.5**2 / variance**0.5)
    assert errors[0] / errors[1] == pytest.approx(4, abs=0.4)
    assert errors[1] / errors[2] == pytest.approx(4, abs=0.2)


def test_samples_walk_before_the_noise_is_taken_off():
    """12 levels, the last of them only in name, ten Langevin steps, and D: 11 + 10 + 1 calls."""
    torch.manual_seed(0)
    seen = []

    def grad_E(y):
        seen.append(y)
        return 0.5 * (y - 0.4)

    x = ebm.dpm_solver(grad_E, randn(500, 1, 4, 4))
    assert len(seen) == 22
    walked = seen[-1]
    assert torch.allclose(x, walked - 0.5 * (walked - 0.4))
    moved = seen[12] - seen[11] + 0.1 * 0.5 * (seen[11] - 0.4)
    assert moved.std().item() == pytest.approx(math.sqrt(0.1 * 1.9 * T), rel=0.03)


def test_nothing_of_the_network_or_the_start_changes_while_sampling():
    net = network()
    before = state(net)
    y = randn(2, 3, 8, 8)
    start = y.clone()
    end = ebm.langevin(net.grad_E, y, 3)
    x = ebm.dpm_solver(net.grad_E, y)
    assert torch.equal(y, start) and not torch.equal(end, start)
    assert not end.requires_grad and not x.requires_grad
    assert same(before, state(net))
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


# -------------------------------------------------------------------------- contrastive divergence


@pytest.mark.parametrize("margin", [0.02, 100.0])
def test_cd_loss_is_the_hinge_by_hand(margin):
    """A chain above the mean of data by the margin does not count. In nats per dimension."""
    net = Gaussian(0.002, 0.4)
    x = randn(5, 1, 2, 2)
    chains = 1.2 * randn(7, 1, 2, 2, seed=2)
    torch.manual_seed(0)
    loss = ebm.cd_loss(net, x, chains, steps=0, restart=0.0, margin=margin)
    torch.manual_seed(0)
    slots = torch.randperm(7)[:5]
    torch.rand(5, 1, 1, 1)
    torch.randn_like(x)
    E_data = (net(x + 0.03 * torch.randn_like(x)) / (0.0009 * 4)).mean()
    E = net(chains[slots]) / (0.0009 * 4)
    gaps = [max(0.0, margin + (E_data - E[i]).item()) for i in range(5)]
    assert 0 < sum(gap > 0 for gap in gaps) < (5 if margin < 1 else 6)
    assert loss.item() == pytest.approx(sum(gaps) / 5, rel=1e-5)


def test_cd_lowers_energies_of_data_and_raises_those_of_samples_alone():
    """Weights get the gradient of E(data) - E(samples), at the samples as they are."""
    net = network()
    x, chains = randn(4, 3, 8, 8), randn(4, 3, 8, 8, seed=2)
    torch.manual_seed(0)
    loss = ebm.cd_loss(net, x, chains, steps=2, restart=0.0, margin=1e9)
    found = torch.autograd.grad(loss, list(net.parameters()))
    assert not chains.requires_grad  # they are the samples now
    torch.manual_seed(0)
    torch.randperm(4)
    torch.rand(4, 1, 1, 1)
    for _ in range(3):  # a start from noise and two Langevin steps
        torch.randn_like(x)
    E_data = net(x + SIGMA_MIN * torch.randn_like(x)).mean()
    due = (E_data - net(chains).mean()) / (T * 3 * 8 * 8)
    for a, b in zip(found, torch.autograd.grad(due, list(net.parameters())), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_chains_return_to_their_slots():
    """Of twelve, five move by Langevin steps, and the others stay as they are."""
    chains = randn(12, 1, 4, 4)
    before = chains.clone()
    net = Gaussian(1.0)
    torch.manual_seed(0)
    ebm.cd_loss(net, randn(5, 1, 4, 4), chains, steps=3, restart=0.0)
    moved = (chains != before).flatten(1).any(1)
    assert moved.sum() == 5
    due = 0.7**3 * before  # up to noise of SIGMA_MIN
    assert (chains - due)[moved].abs().max() < 0.1
    drawn = torch.zeros(12)
    for _ in range(30):
        before = chains.clone()
        ebm.cd_loss(net, randn(5, 1, 4, 4), chains, steps=1, restart=0.0)
        drawn += (chains != before).flatten(1).any(1)
    assert drawn.min() > 3  # all have their turn


@pytest.mark.parametrize("restart", [0.0, 0.05, 0.5])
def test_a_share_of_the_chains_starts_anew_from_noise(restart):
    torch.manual_seed(0)
    chains = torch.full((3000, 1, 2, 2), 7.0)
    ebm.cd_loss(Gaussian(1.0), randn(3000, 1, 2, 2), chains, steps=0, restart=restart)
    new = (chains != 7).flatten(1)
    assert torch.equal(new.all(1), new.any(1))
    spread = math.sqrt(restart * (1 - restart) / 3000)
    assert abs(new.all(1).float().mean() - restart) <= 4 * spread
    if restart:
        assert chains.flatten(1)[new].std().item() == pytest.approx(40, rel=0.1)


def test_chains_and_data_carry_the_same_noise():
    """Around an image, where E is |y - a|^2 / 2, both come to half a nat per dimension."""
    torch.manual_seed(0)
    net = Gaussian(1.0)
    x = torch.zeros(200, 1, 8, 8)
    chains = x.clone()
    for _ in range(5):
        loss = ebm.cd_loss(net, x, chains, restart=0.0)
    for y in chains, x + ebm.SIGMA_MIN * randn(*x.shape):
        assert ebm.nats_per_dim(net, y, 64).mean().item() == pytest.approx(0.5, abs=0.02)
    assert loss.item() == pytest.approx(0.3, abs=0.05)


def test_cd_finds_mean_and_precision_of_a_gaussian():
    """Data N(.5, v): c = T / (v + T), if chains of long steps had the variance T / c."""
    torch.manual_seed(0)
    v = 0.003
    net = Gaussian(0.6, 0.4)
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.0, 0.99))
    chains = torch.full((1000, 1, 1, 1), 0.4)
    tail = []
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 500)
        x = 0.5 + math.sqrt(v) * torch.randn(1000, 1, 1, 1)
        loss = ebm.cd_loss(net, x, chains, restart=0.0, margin=1e9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tail.append((net.c.item(), net.mean.item()))
    c, mean = torch.tensor(tail[-100:]).mean(0).tolist()
    due = (1 - math.sqrt(1 - 0.3 * 1.7 * T / (v + T))) / 0.3  # their variance is v + T there
    assert due == pytest.approx(T / (v + T), rel=0.15)
    assert c == pytest.approx(due, rel=0.05)
    assert mean == pytest.approx(0.5, abs=0.01)


# ----------------------------------------------------------------------------------- training step


def test_a_step_with_chains_adds_both_gradients_and_clips_them():
    net = network()
    twin = copy.deepcopy(net)
    net(randn(2, 3, 8, 8)).sum().backward()
    images = random_bytes(6, 3, 8, 8)
    chains = ebm.dequantise(random_bytes(8, 3, 8, 8, seed=2))
    start = chains.clone()
    optimizers = [torch.optim.SGD([*net.parameters()], 1.0), torch.optim.SGD([nn.Parameter()], 1.0)]
    torch.manual_seed(5)
    loss = ebm.training_step(net, optimizers, images, 0.05, chains, cd_weight=20.0)
    torch.manual_seed(5)
    x = ebm.dequantise(images)
    dsm = ebm.dsm_loss(twin, x, ebm.sample_sigma(x)).mean()
    (dsm + 20.0 * ebm.cd_loss(twin, x, start)).backward()
    assert nn.utils.clip_grad_norm_(twin.parameters(), 1.0) > 1
    torch.optim.SGD(twin.parameters(), 0.05).step()
    assert torch.equal(chains, start)
    assert loss.item() == pytest.approx(dsm.item())
    assert not loss.requires_grad
    for found, due in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(found, due, atol=1e-6)


def test_without_chains_there_is_score_matching_alone():
    net = network()
    optimizers = ebm.make_optimizers(net)
    before = state(net)
    ebm.training_step(net, optimizers, random_bytes(4, 3, 8, 8), 0.01)
    assert not any(torch.equal(before[name], value) for name, value in net.state_dict().items())
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    assert rates == pytest.approx([0.01, 0.001])
    assert optimizers[1].param_groups[0]["betas"] == (0.0, 0.98)


def test_the_phases_of_a_run():
    args = SimpleNamespace(cd_share=0.25, lr=1.0, batch_size=128)
    net = network()
    images = random_bytes(1100, 3, 8, 8)
    images[:, 0, 0, 0] = torch.arange(1100) // 5  # sorted by class, as folders are
    run = {"cd": None}

    def enter(step, total=80):
        run["step"] = step
        return ebm.enter_phase(args, run, total, net, images)

    assert enter(59) == (59, ebm.warmup_cosine(59, 60), None)
    step, lr, chains = enter(60)
    assert (step, lr) == (0, 0.2 * ebm.warmup_cosine(0, 20))
    assert len(chains) == len(chains.unique(dim=0)) == 8 * 128
    assert ebm.quantise(chains[:, 0, 0, 0]).unique().tolist() == list(range(220))
    before = run["cd"]["before"]
    assert same(before, net.state_dict())
    net.out.weight.data += 1
    assert enter(79) == (19, 0.2 * ebm.warmup_cosine(19, 20), chains)
    assert run["cd"]["before"] is before and not same(before, net.state_dict())
    assert enter(80, 160) == (80, ebm.warmup_cosine(80, 120), None)  # --resume with more --epochs
    assert run["cd"] is None
    assert enter(70)[0] == 10  # and with fewer: CD begins where the run stands
    assert same(run["cd"]["before"], net.state_dict())


# ----------------------------------------------------------------------------- energies, network


def test_auroc_is_the_share_of_pairs_and_ties_count_half():
    inside, outside = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2.0, 5.0])
    assert ebm.auroc(inside, outside) == pytest.approx((1.5 + 3) / 6)


def test_evaluation_is_of_constant_colours_and_others_before_and_after_cd(monkeypatch, capsys):
    test = torch.full((2, 3, 8, 8), 148, dtype=torch.uint8)
    test[:, :, 0, 0] = 255  # the constant colours are bright, the others grey
    monkeypatch.setattr("common.load", lambda data: (None, test if data == "a" else test * 0 + 128))
    args = SimpleNamespace(seed=0, data="a", ood="b", device="cpu", out=".")
    ebm.evaluate(args, [Gaussian(1.0), Gaussian(1.0, 1.0)])
    before, after = capsys.readouterr().out.splitlines()
    assert before == "AUROC before CD: constant colours 1.000, b 0.000"
    assert after == "AUROC after CD: constant colours 0.000, b 1.000"


def test_the_noise_level_is_seen_in_smooth_images():
    ramp = torch.linspace(-1, 1, 64)
    x = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64)])
    for sigma in 0.0, 0.05, 0.5, 5.0:
        found = ebm.noise_variance(x + sigma * randn(40, 3, 64, 64))
        assert found.shape == (40, 1, 1, 1)
        assert found.mean().item() == pytest.approx(sigma**2 + 1e-4, rel=0.02)


def test_the_energy_is_half_the_square_of_the_preconditioned_residual():
    net = network()
    y = 2 * randn(4, 3, 8, 8)
    variance = ebm.noise_variance(y)
    total = variance + 0.25
    with torch.no_grad():
        f = net.unet(y / total.sqrt(), variance.view(-1, 1).log() / 2)
        r = y - (0.25 / total * y + (0.25 * variance / total).sqrt() * f)
        assert torch.allclose(net(y), r.flatten(1).square().sum(1) / 2, rtol=1e-5)
        assert f.std() > 0.02
        assert not torch.allclose(f, net.unet(y / total.sqrt(), -3 * torch.ones(4, 1)), atol=0.01)


def test_grad_e_is_the_gradient_of_each_energy():
    net = network().double()
    y = randn(3, 3, 8, 8, dtype=torch.float64)
    direction = randn(3, 3, 8, 8, seed=2, dtype=torch.float64)
    with torch.no_grad():
        found = (net.grad_E(y) * direction).flatten(1).sum(1)
        due = (net(y + 1e-5 * direction) - net(y - 1e-5 * direction)) / 2e-5
        assert torch.allclose(found, due, rtol=1e-6)
        assert torch.allclose(net.grad_E(y)[:1], net.grad_E(y[:1]))


def test_the_unet_starts_at_zero_and_skips_join_equal_resolutions():
    torch.manual_seed(0)
    net = ebm.EnergyNet((3, 16, 16), width=4, mults=(1, 2, 3), blocks=2)
    assert not net.unet(randn(2, 3, 16, 16), randn(2, 1)).any()
    sizes = []
    for block in [*net.down, net.middle, *net.up]:
        block.register_forward_hook(lambda block, given, out: sizes.append(tuple(out.shape[1:3])))
    net.unet(randn(2, 3, 16, 16), randn(2, 1))
    down = [(4, 16), (4, 16), (8, 8), (8, 8), (12, 4), (12, 4)]
    assert sizes == [*down, (12, 4), *reversed(down)]
    x = randn(1, 4, 8, 8)
    assert torch.allclose(ebm.Block(4, 4, 8)(x, randn(1, 8)), x / math.sqrt(2))


@pytest.mark.parametrize("module", [ebm, ncsn])
def test_sigma_scales_and_shifts_the_channels_of_a_block(module):
    torch.manual_seed(0)
    block = module.Block(4, 4, 8)
    norm1, norm2 = (getattr(block, name, nn.Identity()) for name in ("norm1", "norm2"))
    nn.init.normal_(block.conv2.weight, std=0.3)
    x, embedding = randn(2, 4, 8, 8), randn(2, 8)
    scale, shift = block.scale_shift(embedding).view(2, 2, 4, 1, 1).unbind(1)
    h = norm2(block.conv1(nn.functional.silu(norm1(x)))) * (1 + scale) + shift
    due = (x + block.conv2(nn.functional.silu(h))) / math.sqrt(2)
    assert torch.allclose(block(x, embedding), due, atol=1e-6)


def test_bfloat16_is_in_the_blocks_only():
    net = network(amp=True)
    kinds = {}
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(
                lambda m, x, out, name=name: kinds.update({name: out.dtype})
            )
    E = net(randn(2, 3, 8, 8))
    assert E.dtype == torch.float32 and net.grad_E(randn(2, 3, 8, 8)).dtype == torch.float32
    for name, kind in kinds.items():
        assert kind == (torch.float32 if name in ("stem", "out") else torch.bfloat16), name
