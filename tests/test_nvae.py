"""NVAE's mathematics and network, on the real functions, against brute force in float64."""
import copy, inspect, math

import pytest
import torch
from torch import nn

import nvae

torch.set_num_threads(1)  # on a busy machine many wait for each other

def gen(seed=0):
    return torch.Generator().manual_seed(seed)

def randn(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=gen(seed), dtype=dtype)

def network(fresh=False, **options):
    """A small NVAE in evaluation mode; unless fresh, layers that start at zero are random."""
    torch.manual_seed(0)
    options = {"width": 4, "groups": (2, 2), "outer": 1, "expand": 2, "latents": 3, **options}
    net = nvae.NVAE(**options).eval()
    for p in [] if fresh else net.parameters():
        nn.init.normal_(p.data, std=0.05) if not p.any() else None
    return net

def images(count, seed=0):
    return torch.randint(256, (count, 3, 32, 32), generator=gen(seed), dtype=torch.uint8)

# ---- the mixture of logistics ----
BYTES = torch.arange(256, dtype=torch.float64) / 127.5 - 1

def pixel(weights, means, log_s, c=None):
    """Logits (1, 10 M, 1, 1) in float64 of one pixel: (M,), and (3, M) each; c before the tanh."""
    parts = [torch.as_tensor(part, dtype=torch.float64) for part in (weights, means, log_s)]
    parts.append(torch.zeros_like(parts[1]) if c is None else torch.as_tensor(c).double())
    return torch.cat([parts[0], *(part.flatten() for part in parts[1:])])[None, :, None, None]

def log_prob(logits, x):
    """Of many values (N, 3) of one pixel."""
    return nvae.dmol_log_prob(logits.expand(len(x), -1, -1, -1), x[:, :, None, None])

def brute_force(weights, means, log_s, c, x):
    """ln p of one pixel, term by term from the definition."""
    sigmoid = lambda a: 1 / (1 + math.exp(-a)) if a > -700 else 0.0  # noqa: E731
    total, norm = 0.0, sum(math.exp(w) for w in weights)
    for k in range(len(weights)):
        p = math.exp(weights[k]) / norm
        t = [math.tanh(c[j][k]) for j in range(3)]
        m = [means[0][k], means[1][k] + t[0] * x[0], means[2][k] + t[1] * x[0] + t[2] * x[1]]
        for v, centre, s in zip(x, m, (max(row[k], -7) for row in log_s), strict=True):
            byte, s = round((v + 1) * 127.5), math.exp(s)
            edges = [(v + 1 / 255 - centre) / s if byte < 255 else math.inf,
                     (v - 1 / 255 - centre) / s if byte > 0 else -math.inf]
            if sum(edges) > 0:  # by symmetry: differences of small numbers, not of near ones
                edges = [-edges[1], -edges[0]]
            p *= sigmoid(edges[0]) - sigmoid(edges[1])
        total += p
    return math.log(total)

@pytest.mark.parametrize("colour", [0, 1, 2])
@pytest.mark.parametrize("mean", [-3, -1, -0.999, -0.3, 0.0, 0.9, 0.9922, 0.996, 1, 1.004, 3])
def test_each_colour_sums_to_one_given_the_others(colour, mean):
    """Byte 254 with the tail of 255, a range of [0, 1], a tail counted twice or never."""
    for log_s in (-9.0, -7.0, -5.0, -3.0, -1.0, 1.0):
        means, scales = torch.full((3, 2), -60.0), torch.full((3, 2), -7.0)  # byte 0 for certain
        means[colour], scales[colour] = torch.tensor([mean, -mean / 3]), log_s
        x = torch.full((256, 3), -1.0, dtype=torch.float64)
        x[:, colour] = BYTES
        logits = pixel([0.3, -0.4], means, scales, 0.2 * randn(3, 2))
        assert log_prob(logits, x).exp().sum().item() == pytest.approx(1, abs=1e-6)
        assert log_prob(logits.float(), x.float()).exp().sum().item() == pytest.approx(1, abs=2e-4)

@pytest.mark.parametrize("seed", range(8))
def test_log_probability_is_that_of_a_loop(seed):
    """Order of the channels, colours, clamp, coefficients; softmax over the mixtures."""
    weights, means = randn(4, seed=seed).double(), 0.6 * randn(3, 4, seed=seed + 50).double()
    log_s, c = randn(3, 4, seed=seed + 60).double() - 2, randn(3, 4, seed=seed + 70).double()
    log_s[0, 0], x = -9, BYTES[torch.randint(256, (5, 3), generator=gen(seed))]
    x[0, 0], x[1, 1], x[2] = -1, 1, BYTES[254]
    parts = [part.tolist() for part in (weights, means, log_s, c)]
    due = [brute_force(*parts, row) for row in x.tolist()]
    assert log_prob(pixel(weights, means, log_s, c), x).tolist() == pytest.approx(due, rel=1e-6)
    picture = pixel(weights, means, log_s, c).expand(1, -1, 5, 1)  # a sum over the pixels
    together = nvae.dmol_log_prob(picture, x.T[None, :, :, None])
    assert together.shape == (1,) and together.item() == pytest.approx(sum(due), rel=1e-6)

@pytest.mark.parametrize("x, mean", [(-1, 1), (1, -1), (0, 1), (-0.5, 0.9), (BYTES[254], -1)])
def test_means_far_off_at_the_smallest_scale_still_learn(x, mean):
    """P underflows there: its logarithm must not."""
    logits = pixel([0.0], [[mean]] * 3, [[-7.0]] * 3).float().requires_grad_()
    value = nvae.dmol_log_prob(logits, torch.full((1, 3, 1, 1), float(x)))
    value.sum().backward()
    assert value.isfinite().all() and value < -1000 and logits.grad.isfinite().all()
    means = logits.grad.flatten()[1:4]
    assert (means * (x - mean) > 100).all()

def test_samples_have_the_probabilities_of_their_bytes():
    """Also at the edges, and green and blue given the rounded and clamped colours before them."""
    logits = pixel([0.5, 0.0], [[0.985, -0.99], [0.1, 0.2], [0.0, -0.3]],
                   [[-5.0, -5.5], [-5.2, -6], [-6, -5.0]], [[0.9, -0.8], [0.5, 0.3], [-0.4, 2.0]])
    n = 60_000
    x = nvae.dmol_sample(logits.float().expand(1, -1, n, 1), generator=gen())[0, :, :, 0].T
    bytes_ = ((x + 1) * 127.5).round().long()
    assert torch.allclose(bytes_ / 127.5 - 1, x, atol=1e-6)
    found, counts = bytes_.unique(dim=0, return_counts=True)
    p = log_prob(logits, found / 127.5 - 1.0).exp()
    for colour in range(3):  # of each colour's byte, over the values found of the others
        seen, due = torch.zeros(256), torch.zeros(256, dtype=torch.float64)
        seen.index_add_(0, found[:, colour], counts / n)
        due.index_add_(0, found[:, colour], p)
        assert due.sum() > 0.98 and (seen - due).abs().sum() < 0.05
    assert bytes_[:, 0].min() == 0 and bytes_[:, 0].max() == 255
    often = counts > 150
    assert often.sum() > 20 and ((counts / n / p)[often] - 1).abs().mean() < 0.1

def test_a_colour_follows_the_clamped_ones_before_it():
    logits = pixel([0.0], [[3.0], [0], [0]], torch.full((3, 1), -7.0), [[0.5], [0.0], [0.5]])
    due = [1, math.tanh(0.5), math.tanh(0.5) ** 2]  # not 3 tanh(0.5)
    for draw in (nvae.dmol_sample(logits.float(), 0.01, gen()), nvae.dmol_mean(logits.float())):
        assert draw.flatten().tolist() == pytest.approx(due, abs=0.01)

def test_temperature_narrows_below_one_and_the_mean_is_that_of_the_samples():
    logits = pixel([0.3, 0.0, -1], 0.3 * randn(3, 3), torch.full((3, 3), -3.0), randn(3, 3))
    logits = logits.float().expand(1, -1, 20_000, 1)
    single = pixel([0.0], [[0.1]] * 3, [[-3.0]] * 3).float().expand(1, -1, 20_000, 1)
    stds = [nvae.dmol_sample(single, t, gen()).std(2).mean().item() for t in (0.1, 0.5, 1.0)]
    assert stds == pytest.approx([math.exp(-3) * math.pi / 3**0.5 * t for t in (0.1, 0.5, 1)],
                                 rel=0.05)
    choice = pixel([2.0, 0.0], [[-0.5, 0.5]] * 3, [[-7.0] * 2] * 3).float().expand(1, -1, 20_000, 1)
    for t in (0.5, 1.0):  # of the mixture, too
        rare = (nvae.dmol_sample(choice, t, gen()) > 0).float().mean().item()
        assert rare == pytest.approx(1 / (1 + math.exp(2 / t)), abs=0.01)
    mean = nvae.dmol_sample(logits, 1.0, gen()).mean(2)
    assert torch.allclose(nvae.dmol_mean(logits)[:, :, 0], mean, atol=0.01)
    assert torch.equal(nvae.dmol_sample(logits, 1.0, gen()), nvae.dmol_sample(logits, 1.0, gen()))

def test_quantise_inverts_scaled_and_samples_may_leave_the_range():
    values = torch.arange(256, dtype=torch.uint8)
    x = nvae.scaled(values)
    assert torch.equal(nvae.quantise(x), values) and x.dtype == torch.float32
    assert (x.min(), x.max()) == (-1, 1) and torch.allclose(x.double(), BYTES, atol=1e-6)
    assert torch.equal(nvae.quantise(x + 0.49 * 2 / 255), values)
    assert nvae.quantise(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]

# ---- loss ----
def test_kl_is_that_of_torch_and_of_samples():
    q, p = ((3 * randn(4, 5, seed=s, dtype=torch.float64),
             randn(4, 5, seed=s + 1, dtype=torch.float64).exp()) for s in (2, 4))
    normals = [torch.distributions.Normal(*d) for d in (q, p)]
    assert torch.allclose(nvae.kl_normal(q, p), torch.distributions.kl_divergence(*normals))
    assert nvae.kl_normal(p, p).abs().max() < 1e-12
    z = q[0] + q[1] * randn(100_000, 4, 5, dtype=torch.float64)
    group = {"z0": z, "z": z + 0.5, "q": q, "p": p, "log_det": 0.25}  # as if a flow had moved z
    due = normals[0].log_prob(z) - 0.25 - normals[1].log_prob(z + 0.5)
    assert torch.allclose(nvae.log_ratio(group), due)
    error = nvae.log_ratio({**group, "z": z, "log_det": 0}).mean(0) / nvae.kl_normal(q, p) - 1
    assert error.abs().max() < 0.1

def test_normals_are_clamped_smoothly_and_have_a_temperature():
    mu, sigma = nvae.normal(torch.tensor([0.0, 0.1, 99, -99, 0, 0.1, 99, -99]).reshape(1, 8, 1, 1))
    assert mu.flatten().tolist() == pytest.approx([0, 0.1, 5, -5], abs=1e-4)
    due = [1.01, math.exp(0.1) + 0.01, math.exp(5) + 0.01, math.exp(-5) + 0.01]
    assert sigma.flatten().tolist() == pytest.approx(due, rel=1e-4)
    cold = nvae.normal(torch.zeros(1, 8, 1, 1), 0.5)[1]
    assert cold.flatten().tolist() == pytest.approx([0.505] * 4)

def test_loss_is_the_bound_in_nats():
    """A mean over pixels or a hand-set weight; 3072 ln 2 nats are one bit per dimension."""
    net, x = network(), nvae.scaled(images(3))
    reconstruction, kl = nvae.elbo(net, x, gen())
    assert reconstruction.shape == (3,) and kl.shape == (3, 4, 3) and (kl > 0).all()
    logits, groups = net.top_down(nvae.noise(gen()), 3, net.bottom_up(x))
    assert torch.allclose(reconstruction, -nvae.dmol_log_prob(logits, x))
    for i, group in enumerate(groups):
        q, p = (torch.distributions.Normal(*group[key]) for key in "qp")
        due = torch.distributions.kl_divergence(q, p).sum((2, 3))
        assert torch.allclose(kl[:, i], due, rtol=1e-4)
    assert nvae.NATS == pytest.approx(3072 * math.log(2))

def bound(net, x):  # in bits/dim
    return sum(part.sum().item() for part in nvae.measure(net, x))

def test_loss_of_a_set_weighs_images_not_batches():
    net, x = network(), images(130)  # 100 and 30
    x[100:] = 0  # which cost something else
    loss, draws = bound(net, x), nvae.noise(gen())
    total = 0.0
    for part in x.split(100):
        logits, groups = net.top_down(draws, len(part), net.bottom_up(nvae.scaled(part)))
        total -= nvae.dmol_log_prob(logits, nvae.scaled(part)).sum().item()
        total += sum(nvae.kl_normal(g["q"], g["p"]).sum().item() for g in groups)
    assert loss == pytest.approx(total / 130 / nvae.NATS, rel=1e-5)

def test_balancing_has_mean_one_is_detached_and_ends():
    kl = (3 * randn(6, 5)).exp().requires_grad_()
    alpha = torch.tensor([1.0, 1, 4, 4, 4])
    total = kl.detach().mean(0)  # of each group
    gamma = (total + 0.01) / alpha
    gamma = gamma / gamma.mean()
    loss = nvae.kl_loss(kl, 0.25, alpha)
    assert loss.item() == pytest.approx(0.25 * (gamma * total).sum().item(), rel=1e-5)
    (grad,) = torch.autograd.grad(loss, kl)
    assert grad.mean().item() * 6 == pytest.approx(0.25)  # gamma is 1 on average
    assert torch.allclose(grad, 0.25 * gamma.expand(6, 5) / 6)
    assert nvae.kl_loss(kl, 1.0, alpha).item() == pytest.approx(total.sum().item(), rel=1e-5)

def test_a_scale_owes_kl_by_its_pixels():
    alpha = network(groups=(3, 2)).alpha
    assert (alpha / alpha[-1]).tolist() == pytest.approx([0.25 * 3 / 2] * 2 + [1] * 3)

@pytest.mark.parametrize("flows", [0, 2])
def test_regulariser_is_the_sum_of_largest_singular_values(flows):
    net = network(flows=flows)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, std=2)
    spectral = nvae.Spectral(net)
    def exact(net=net):
        return {w: torch.linalg.matrix_norm(w.flatten(1), 2) for w in
                (m.weight for m in net.modules() if isinstance(m, nn.Conv2d))}
    spectral(200)  # fewer steps than any run has: near-equal singular values part slowly
    due = exact()
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            alone = nvae.Spectral(layer, iterations=200)()
            assert alone.item() == pytest.approx(due[layer.weight].item(), rel=0.01)
    peaks = sum(m.weight.abs().max() for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    total = sum(due.values()) + peaks
    assert spectral().item() == pytest.approx(total.item(), rel=0.01)
    assert sum(map(len, spectral.stacks.values())) == len(due) and peaks > 5
    weight = net.after[-1].weight
    ours, = torch.autograd.grad(spectral(), weight)
    theirs, = torch.autograd.grad(total, weight)
    assert (ours * theirs).sum() / ours.norm() / theirs.norm() > 0.9
    with torch.no_grad():  # follows the weights, one iteration a step
        turn = randn(*weight.shape, seed=5) / 20
        for _ in range(20):
            weight.add_(turn)
            found = spectral()
    assert found.item() == pytest.approx((sum(exact().values()) + peaks).item(), rel=0.01)
    assert found > total + 0.5

# ---- importance-weighted bound ----
def gaussian(x, mu, sigma):
    return torch.distributions.Normal(mu, sigma).log_prob(x)

class Toy:
    """z ~ N(0, 1), x | z ~ N(z, 1): p(x) = N(0, 2), p(z|x) = N(x / 2, 1/2); q `scale` as wide."""
    def __init__(self, scale):
        self.scale, self.encoded = scale, 0
    def bottom_up(self, x):
        self.encoded += 1
        return [x]
    def top_down(self, draw, count, features):
        mu, sigma = features[0] / 2, torch.full_like(features[0], self.scale * math.sqrt(0.5))
        z = mu + sigma * draw(mu.shape)
        p = torch.zeros_like(mu), torch.ones_like(mu)
        return z, [{"z": z, "z0": z, "log_det": 0.0, "q": (mu, sigma), "p": p}]

def test_weights_that_start_at_zero_are_found_once_they_are_not():
    """As those of the layers that read p and q: vectors of zeros would stay zeros."""
    layer = nn.Conv2d(3, 4, 3)
    nn.init.zeros_(layer.weight)
    spectral = nvae.Spectral(layer)
    assert spectral().item() == 0
    nn.init.normal_(layer.weight, generator=gen())
    due = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2).item()
    assert spectral(50).item() == pytest.approx(due, rel=1e-3)

def test_importance_weighted_bound_on_a_toy(monkeypatch):
    """Exact where q is, at any K; else below ln p(x), the ELBO at K = 1, and rising with K."""
    monkeypatch.setattr(nvae, "dmol_log_prob", lambda z, x: gaussian(x, z, 1.0).flatten())
    x = randn(40_000, 1, 1, 1, dtype=torch.float64)
    due = gaussian(x, 0.0, 2**0.5).flatten()
    for k in (1, 7):
        net = Toy(1.0)
        bound = nvae.iw_bound(net, x, k, gen())
        assert bound.shape == due.shape and torch.allclose(bound, due) and net.encoded == 1
    means = [(nvae.iw_bound(Toy(0.6), x, k, gen(k)) - due).mean().item() for k in (1, 2, 8, 64)]
    elbo = -(math.log(1 / 0.6) + 0.36 / 2 - 0.5)  # minus KL(q || p(z|x))
    assert means == sorted(means) and means[0] == pytest.approx(elbo, abs=0.01)
    assert means[-1] == pytest.approx(0, abs=0.03)

@pytest.mark.parametrize("flows", [0, 1])
def test_importance_weighted_bound_of_the_network(flows):
    net, x = network(flows=flows), nvae.scaled(images(2))
    with torch.no_grad():
        bounds = [sum(nvae.iw_bound(net, x, k, gen(s)) for s in range(12)) / 12 for k in (1, 5, 20)]
        elbos = [-r - kl.sum((1, 2)) for r, kl in (nvae.elbo(net, x, gen(s)) for s in range(12))]
    assert (bounds[0] < bounds[1]).all() and (bounds[1] < bounds[2]).all()
    assert torch.allclose(bounds[0], sum(elbos) / 12, rtol=2e-3)

# ---- flows ----
@pytest.mark.parametrize("turned", [False, True])
def test_flow_is_triangular_with_its_determinant_and_at_first_the_identity(turned):
    torch.manual_seed(0)
    flow, z, context = nvae.Flow(3, 5, turned), randn(2, 3, 3, 3), randn(2, 5, 3, 3, seed=2)
    nn.init.zeros_(flow.last.weight), nn.init.zeros_(flow.last.bias)
    out, log_det = flow(z, context)
    assert torch.equal(out, z) and not log_det.any()
    fresh = network(fresh=True, flows=2).groups[0].flows
    assert not any(p.any() for flow in fresh for p in flow.last.parameters())
    for p in flow.parameters():
        nn.init.normal_(p, std=0.5)
    flow, z, context = flow.double(), z.double(), context.double()
    out, log_det = flow(z, context)
    assert log_det.shape == z.shape
    jacobian = torch.autograd.functional.jacobian(lambda z: flow(z, context)[0], z)
    for i in range(2):
        assert not jacobian[i, :, :, :, 1 - i].any()  # images do not see each other
        # Raster order of the pixels, in each the latents.
        j = jacobian[i, :, :, :, i].permute(1, 2, 0, 4, 5, 3).reshape(27, 27)
        j = j.flip(0, 1) if turned else j
        assert not j.triu(1).any() and j.tril(-1).count_nonzero() > 100
        assert torch.linalg.slogdet(j)[1].item() == pytest.approx(log_det[i].sum().item(), rel=1e-9)
    assert not torch.allclose(flow(z, 2 * context)[0], out)

# ---- network ----
def test_posterior_is_the_prior_at_first_and_paths_then_coincide():
    """Training and sampling differ in nothing but where z comes from."""
    net, x = network(), nvae.scaled(images(2))
    for group in net.groups:
        for p in group.posterior.parameters():
            nn.init.zeros_(p)
    logits, groups = net.top_down(nvae.noise(gen(3)), 2, net.bottom_up(x))
    sampled, drawn = net.top_down(nvae.noise(gen(3)), 2)
    assert torch.equal(logits, sampled)
    assert all(torch.equal(a["z"], b["z"]) for a, b in zip(groups, drawn, strict=True))
    fresh = network(fresh=True)
    assert not nvae.elbo(fresh, x, gen())[1].any()

@pytest.mark.parametrize("flows", [0, 2])
def test_the_image_reaches_the_output_through_z_alone(flows):
    net, x = network(flows=flows), nvae.scaled(images(2)).requires_grad_()
    logits, groups = net.top_down(nvae.noise(gen()), 2, net.bottom_up(x))
    (grad,) = torch.autograd.grad(logits.square().sum(), x)
    assert grad.abs().max() > 0
    z = [group["z"].detach() for group in groups]
    fixed, again = net.top_down(nvae.noise(gen(9)), 2, net.bottom_up(x), z=z)
    assert torch.allclose(fixed, logits, atol=1e-5)
    assert torch.autograd.grad(fixed.square().sum(), x, allow_unused=True)[0] is None
    assert torch.autograd.grad(again[1]["q"][0].sum(), x)[0].any()  # as q still depends on it

def test_given_latents_are_kept_and_the_others_drawn():
    net = network()
    _, groups = net.top_down(nvae.noise(gen()), 2)
    for known in range(5):
        z = [group["z"] for group in groups[:known]]
        _, again = net.top_down(nvae.noise(gen(1)), 2, z=z)
        same = [torch.equal(a["z"], b["z"]) for a, b in zip(groups, again, strict=True)]
        assert same == [i < known for i in range(4)]

def test_temperature_narrows_every_prior():
    net = network()
    for part, zero in (net.groups[0].prior[1], True), (net.groups[1].prior[1], True):
        nn.init.zeros_(part.weight) if zero else None
    warm, cold = ([g["p"][1] for g in net.top_down(lambda shape: torch.zeros(shape), 1,
                  temperature=t)[1]] for t in (1.0, 0.5))
    assert all(torch.allclose(0.5 * a, b) for a, b in zip(warm, cold, strict=True))

def test_every_layer_matters():
    net = network(flows=1).train()
    reconstruction, kl = nvae.elbo(net, nvae.scaled(images(4)), gen())
    (reconstruction.mean() + kl.sum((1, 2)).mean()).backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead

def test_shapes_of_groups_and_images():
    for groups in (2,), (1, 1), (1, 2, 1), (1, 1, 1, 1), (0, 2), (1, 0, 0, 1):
        net, x = network(groups=groups, cells=2, outer=2), nvae.scaled(images(2))
        features = net.bottom_up(x)
        logits, found = net.top_down(nvae.noise(gen()), 2, features)
        assert logits.shape == (2, 100, 32, 32) and len(found) == len(features) == sum(groups)
        sizes = [16 >> scale for scale, n in reversed(list(enumerate(groups))) for _ in range(n)]
        assert [group["z"].shape[1:] for group in found] == [(3, size, size) for size in sizes]
        assert nvae.dmol_sample(logits, generator=gen()).shape == x.shape

def test_widths_of_scales_and_mixtures():
    """The last of mults serves all lower resolutions; M mixtures have 10 M logits a pixel."""
    net, x = network(groups=(1, 1, 1), mults=(1, 2, 3), mixtures=2), nvae.scaled(images(2))
    features = net.bottom_up(x)
    logits, _ = net.top_down(nvae.noise(gen()), 2, features)
    shapes = [tuple(feature.shape[1:]) for feature in features]
    assert shapes == [(12, 4, 4), (12, 8, 8), (8, 16, 16)] and logits.shape == (2, 20, 32, 32)
    assert net.start.shape == (1, 12, 4, 4) and net.before[0].out_channels == 4
    weights, *parts = nvae.mixture(logits)
    assert torch.equal(weights, logits[:, :2])  # then means, ln s and c, of red, green and blue
    for part, kept in zip(parts, (logits[:, 2:8], logits[:, 8:14].clamp(min=-7),
                                  torch.tanh(logits[:, 14:])), strict=True):
        assert torch.equal(part.flatten(1, 2), kept)
    assert nvae.elbo(net, x, gen())[0].isfinite().all()
    assert nvae.dmol_mean(logits).shape == nvae.dmol_sample(logits).shape == x.shape

def test_images_of_a_batch_do_not_see_each_other():
    net, x = network(), nvae.scaled(images(3))
    still = lambda shape: torch.zeros(shape)  # noqa: E731
    together = net.top_down(still, 3, net.bottom_up(x))[0]
    for i in range(3):
        alone = net.top_down(still, 1, net.bottom_up(x[i:i + 1]))[0]
        assert torch.allclose(alone, together[i:i + 1], atol=1e-4)

def test_bf16_stays_inside_the_network():
    """Its spacing at 8192 nats is 32."""
    net, x = network(amp=True, flows=1), nvae.scaled(images(2))
    logits, groups = net.top_down(nvae.noise(gen()), 2, net.bottom_up(x))
    assert net.bottom_up(x)[0].dtype == torch.bfloat16  # so there is something to keep out
    seen = [part for group in groups for part in (
        group["z"], group["z0"], group["log_det"], *group["p"], *group["q"])]
    seen += [logits, *nvae.elbo(net, x, gen()), nvae.dmol_log_prob(logits, x),
             nvae.Spectral(net)(), nvae.iw_bound(net, x, 2, gen()), *map(nvae.log_ratio, groups)]
    assert {term.dtype for term in seen} == {torch.float32}
    sigma = groups[0]["q"][1]  # the clamp is computed in fp32, not only stored in it
    assert not torch.equal(sigma, sigma.to(torch.bfloat16).float())

# ---- BatchNorm's statistics ----
def state(net):
    return {key: value.clone() for key, value in net.state_dict().items()}

def test_statistics_are_those_of_the_calls_and_the_network_is_left_alone():
    net, x = network(), images(200)
    before = state(net)
    copied = nvae.calibrated(net, x)
    assert not copied.training and not net.training
    assert all(torch.equal(value, before[key]) for key, value in state(net).items())
    first = copied.before[1].body[0]  # its input is the first convolution's output
    out = net.before[0](nvae.scaled(x))
    assert torch.allclose(first.running_mean, out.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(first.running_var, out.var((0, 2, 3)), rtol=1e-2)

def test_statistics_take_images_from_all_over_the_set():
    """Sorted sets, and such as alternate: every tenth image of the shapes is bright."""
    net, x = network(), images(8000) // 8
    x[::2] += 200
    x[6000:] //= 2
    mean = nvae.calibrated(net, x).before[1].body[0].running_mean
    due = net.before[0](nvae.scaled(x).mean((0, 2, 3), keepdim=True).expand(1, 3, 5, 5))[0, :, 2, 2]
    other = net.before[0](nvae.scaled(x[::10]).mean((0, 2, 3), keepdim=True).expand(1, 3, 5, 5))
    assert (mean - due).abs().max() < 0.3 * (other[0, :, 2, 2] - due).abs().max()

def test_evaluation_is_unchanged_by_having_sampled():
    net, x = network(), images(120)
    loss = bound(nvae.calibrated(net, x), x)
    sampler = nvae.calibrated(net, None, 0.7, calls=3)
    one = nvae.sample(sampler, 4, 0.7, g=gen())
    assert bound(nvae.calibrated(net, x), x) == loss
    assert torch.equal(nvae.sample(nvae.calibrated(net, None, 0.7, calls=3), 4, 0.7, g=gen()), one)
    assert bound(net, x) != loss  # statistics do matter
    warm = nvae.calibrated(net, None, 1.0, calls=3)
    assert not torch.equal(nvae.sample(warm, 4, 0.7, g=gen()), one)
    pixels = nvae.sample(sampler, 4, 0.7, 0.1, gen())  # the same latents, pixels drawn closer
    logits, _ = sampler.top_down(nvae.noise(gen()), 4, temperature=0.7)
    middle = nvae.quantise(nvae.dmol_sample(logits, 1e-3, gen())).float()
    assert (pixels - middle).abs().mean() < 0.5 * (one - middle).abs().mean()

def test_statistics_fit_averaged_weights():
    """Train-mode and calibrated bits/dim agree; with those of other weights they do not."""
    net, x = network(), images(200)
    with torch.no_grad():
        reconstruction, kl = nvae.elbo(copy.deepcopy(net).train(), nvae.scaled(x), gen())
    due = (reconstruction.mean() + kl.sum((1, 2)).mean()).item() / nvae.NATS
    assert bound(nvae.calibrated(net, x), x) == pytest.approx(due, abs=0.02)

# ---- sizes ----
def test_sizes_of_the_networks():
    count = lambda net: sum(p.numel() for p in net.parameters())  # noqa: E731
    with torch.device("meta"):
        default = nvae.NVAE()
        paper = nvae.NVAE(width=128, groups=(30,), cells=2, flows=2)
    assert 10.5e6 < count(default) < 13.5e6
    assert 120e6 < count(paper) < 136e6 and len(paper.groups) == 30
    assert paper.start.shape == (1, 256, 16, 16)

def test_flags_reach_the_network_in_its_order():
    assert list(inspect.signature(nvae.NVAE).parameters)[:9] == nvae.KEPT[:9]

def test_what_cells_add_is_scaled():
    for residual in 0.1, 0.7:
        cell = network(fresh=True, residual=residual).encoder[0][0].eval()
        x = torch.randn(1, len(cell.body[0].weight), 4, 4, generator=gen())
        h = cell.body(x)
        due = cell.skip(x) + residual * h * cell.gate(h.mean((2, 3)))[:, :, None, None]
        assert torch.allclose(cell(x), due) and not torch.allclose(cell(x), cell.skip(x), atol=0.01)

@pytest.mark.parametrize("size", [16, 256])
def test_a_step_lowers_the_loss(size):
    net, x = network(fresh=True).train(), nvae.scaled(images(8) // 4 + 90)
    x = x.repeat(size // 8, 1, 1, 1)
    optimizer, losses = torch.optim.Adamax(net.parameters(), 1e-2), []
    for _ in range(6):
        reconstruction, kl = nvae.elbo(net, x, gen())
        losses.append((reconstruction.mean() + kl.sum((1, 2)).mean()).item())
        optimizer.zero_grad()
        (losses[-1] * 0 + reconstruction.mean() + kl.sum((1, 2)).mean()).backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 500 and all(map(math.isfinite, losses))
