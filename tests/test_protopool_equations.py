"""ProtoPool (Rymarczyk et al., ECCV 2022), formula by formula: read it beside protopool.py.

An image is a map of feature vectors. A prototype scores by how much its best cell stands out (Eq. 1). Each of
the K slots of a class holds a distribution over one pool of M prototypes, which Gumbel-softmax turns into a
choice (Supp. 8); a logit is the sum of the slots of its class. Training keeps the slots of a class apart
(Eq. 2), an own prototype near, others far. Then slots are fixed, every prototype becomes a patch of a
training image (Eq. 3), and the last layer learns alone.

The references are loops and plain formulas in float64 and share no line with the script. B images, D channels
and C classes. Two readings: `paper` is the printed formula, `official` what the authors' code has instead;
the script's header explains [D1] to [D23].
"""
import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import protopool
from common import run
from common.patches import spread_patches
from protopool import (ProtoPool, Source, assign, cluster_cost, focal_similarity, gumbel_noise, harden,
                       log_similarity, orthogonality_loss, project_prototypes, separation_cost,
                       slot_similarity, squared_distances, temperature)

B, M, D, C, K, H, W = 3, 6, 8, 4, 2, 4, 5
CPU = torch.device("cpu")
both_readings = pytest.mark.parametrize("reading", ["paper", "official"])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def preset(name, **flags):
    return run.make_config(protopool.Config, protopool.PRESETS, name, out="unused", **flags)


def assert_near(actual, expected, tolerance=1e-6):
    actual, expected = (torch.as_tensor(x).detach().double().cpu() for x in (actual, expected))
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance


def assert_same(function, reference, *inputs, tolerance=1e-6):
    """The same values, and the same gradients into every input; the reference works in float64."""
    inputs, exact = ([x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
                     for dtype in (None, torch.float64))
    found, expected = function(*inputs), reference(*exact)
    assert_near(found, expected, tolerance)
    weight = normal(*expected.shape, seed=9)
    slopes = torch.autograd.grad((weight * found).sum(), inputs)
    for slope, exact_slope in zip(slopes, torch.autograd.grad((weight * expected).sum(), exact)):
        assert_near(slope, exact_slope, 10 * tolerance)


# ---- slots: Gumbel-softmax, Sec. 3 and Supp. 8 ---------------------------------------------------

def test_temperature_falls_from_1_to_a_thousandth():
    """Supp. 8: 1 / sqrt(3.4e4 epoch) below epoch 30, else 0.001, "start with tau = 1". official: q times 183
    to 1000, which is 1 / tau; nothing at epoch 0. Epochs count from the start of the warm-up."""
    tau = [1] + [1 / math.sqrt(3.4e4 * epoch) for epoch in range(1, 30)] + [0.001] * 71
    assert [temperature(epoch) for epoch in range(101)] == pytest.approx(tau, rel=1e-12)
    scales = {1: 183, 2: 258, 5: 408, 10: 577, 20: 816, 29: 983, 30: 1000, 31: 1000, 200: 1000}
    assert {epoch: round(1 / temperature(epoch, "official")) for epoch in scales} == scales
    assert temperature(0, "official") == math.inf
    for reading, warmup, joint in (("paper", 1, tau[15]), ("official", 1 / 182.6, 1 / 707.1)):
        for phase, epoch, expected in (("warmup", 0, warmup), ("joint", 5, joint)):
            found = protopool.temperature_of(phase, epoch, preset("cub-r34", reading=reading))
            assert found == pytest.approx(expected, rel=1e-3)
    cfg = preset("cub-r34", tau="geometric", warmup_epochs=3, joint_epochs=6)          # [D21]: 6 epochs
    for phase, epoch, expected in (("warmup", 0, 1), ("warmup", 2, 0.1), ("joint", 0, 0.001 ** 0.5),
                                   ("joint", 1, 0.01), ("joint", 3, 0.001), ("joint", 5.5, 0.001)):
        assert protopool.temperature_of(phase, epoch, cfg) == pytest.approx(expected)


def slow_assign(q, tau, noise, factor=1):
    """y^i = exp(factor (q^i / tau + eta_i)) / sum over m of the same."""
    powers = (factor * (q / tau + noise)).exp()
    return powers / powers.sum(-1, keepdim=True)


@both_readings
@pytest.mark.parametrize("tau", [1.0, 0.3, 0.05])
def test_assign_is_the_printed_softmax(reading, tau):
    """official doubles the exponent, and has neither that nor noise where there is no temperature."""
    q, noise, factor = normal(C, K, M), normal(C, K, M, seed=1), 2 if reading == "official" else 1
    for eta in (noise, None):
        assert_same(lambda q: assign(q, tau, eta, reading),
                    lambda q: slow_assign(q, tau, 0 if eta is None else eta, factor), q, tolerance=1e-12)
    assert_near(assign(q, math.inf, noise, "official"), slow_assign(q, 1, 0), 1e-12)


def test_noise_is_standard_gumbel():
    """Mean 0.5772 (Euler), variance pi^2 / 6, skewed to the right."""
    noise = gumbel_noise(torch.empty(400, 500))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02) and noise.isfinite().all()
    assert noise.var().item() == pytest.approx(math.pi ** 2 / 6, rel=0.02)
    assert (noise - noise.mean()).pow(3).mean() > 1


@both_readings
def test_observation_1_low_temperatures_make_the_slot_one_hot(reading):
    """The limit for tau -> 0 is a canonical vector, here the one of argmax q: tau does not divide the noise
    ("we reduce the influence of the noise"), so that argmax(q + eta), another prototype, is not the limit.
    Sec. 4: "set all values of a distribution q higher than 0.5 to 1, and the remaining values to 0"."""
    q, noise = torch.tensor([0.30, 0.10, 0.25, -0.20]), torch.tensor([-0.5, 2.0, 0.1, 0.4])
    shares = [assign(q, tau, noise, reading) for tau in (1, 0.1, 0.01, 0.001, 1e-5)]
    assert shares[0].argmax() == 1 and all(before[0] <= after[0] for before, after in zip(shares, shares[1:]))
    assert_near(shares[-1], torch.tensor([1, 0, 0, 0]))
    assert assign(1e4 * q, 0.001, noise, reading).isfinite().all()      # exponents of 3e6
    y = torch.tensor([[0.51, 0.49, 0.0], [0.5, 0.5, 0.0], [0.4, 0.3, 0.3]])
    assert harden(y).tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]


# ---- similarities and slots: Eq. 1, Sec. 3 ---------------------------------------------------------

def slow_distances(features, prototypes):
    """|z - p|^2 of every cell z to every prototype p: (B,D,H,W), (M,D) -> (B,M,H,W) float64."""
    z, p = features.double(), prototypes.double()
    return torch.stack([((z - v[None, :, None, None]) ** 2).sum(1) for v in p], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squared_distances_are_float32_whatever_comes_in(dtype):
    z, p = normal(B, D, H, W).to(dtype), normal(M, D, seed=1).to(dtype)
    for z in (z, z.contiguous(memory_format=torch.channels_last)):
        assert squared_distances(z, p).dtype == torch.float32
        assert_near(squared_distances(z, p), slow_distances(z, p), 1e-4)
    assert_same(squared_distances, slow_distances, z.float(), p.float(), tolerance=1e-4)


@pytest.mark.parametrize("device, tf32", [("cpu", False), pytest.param("cuda", False, marks=pytest.mark.gpu),
                                          pytest.param("cuda", True, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("enabled", [True, False])
def test_an_exact_patch_keeps_its_similarity_inside_autocast(device, tf32, enabled):
    """After Eq. 3 a prototype is a training patch: d = 0, similarity log(1 / 1e-4) = 9.21, at CUB's D = 256.
    bf16 would be wrong by 0.2, as |z|^2 and 2 z.p are near 85; TF32, cuDNN's default, would leave 4."""
    features = normal(2, 256, 7, 7).sigmoid().float().to(device)
    prototypes = features.permute(0, 2, 3, 1).reshape(98, 256).clone()  # each a copy of one cell
    with (torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32),
          torch.autocast(device, dtype=torch.bfloat16, enabled=enabled)):
        d2 = squared_distances(features, prototypes)
    assert d2.dtype == torch.float32 and d2.device.type == device and d2.min() >= 0
    assert_near(d2, slow_distances(features, prototypes), 5e-4 if device == "cuda" else 2e-4)
    own = log_similarity(d2.permute(0, 2, 3, 1).reshape(98, 98).diagonal())
    assert own.min() > (8 if device == "cuda" else 8.5)


def slow_similarity(d2):
    return ((d2 + 1) / (d2 + 1e-4)).log()


def slow_focal(d2, focal=True):
    """Eq. (1): the largest similarity of an image minus the mean one, (B,M)."""
    cells = [slow_similarity(d2[:, :, i, j]) for i, j in np.ndindex(*d2.shape[2:])]
    return torch.stack(cells).amax(0) - (sum(cells) / len(cells) if focal else 0)


def test_similarity_by_hand():
    """Footnote 5: log((d + 1) / (d + eps)). Eq. (1) is "maximal ... if a prototype is similar to only a
    narrow area", and 0 for a match everywhere."""
    d2 = torch.tensor([[0, 1e-4, 1e-2], [0.1, 1, 8]])
    assert_near(log_similarity(d2), torch.tensor([[9.2103, 8.517, 4.605], [2.397, 0.693, 0.118]]), 1e-3)
    assert log_similarity(torch.zeros(1), eps=0.01).item() == pytest.approx(math.log(100))
    d2 = torch.full((1, 3, 7, 7), 8.0)
    d2[0, 0, 2, 5] = d2[0, 1, :4] = d2[0, 2] = 0                        # one cell of 49, the upper 28, all
    span = 9.21034 - 0.11777
    assert_near(focal_similarity(d2)[0], torch.tensor([span * 48 / 49, span * 21 / 49, 0]), 1e-4)


def slow_slots(d2, y, reading, focal=True):
    """(B,C,K): similarities mixed by the shares; official: distances mixed, the logarithm comes last."""
    def mixed(values):                                                  # (B,M) -> (B,C,K)
        return sum(y[None, :, :, m] * values[:, None, None, m] for m in range(y.shape[2]))
    if reading == "paper":
        return mixed(slow_focal(d2, focal))
    return slow_similarity(mixed(d2.amin((2, 3)))) - focal * slow_similarity(mixed(d2.mean((2, 3))))


@both_readings
@pytest.mark.parametrize("focal", [True, False])
def test_slots_mix_prototypes(reading, focal):
    """By hand: distances 0, 8 and 8, 8, half of each; official: nearest 4, mean 6. An empty slot scores 0."""
    assert_same(lambda *x: slot_similarity(*x, reading, focal), lambda *x: slow_slots(*x, reading, focal),
                0.1 + normal(B, M, H, W).square(), normal(C, K, M).softmax(-1), tolerance=1e-5)
    d2, y = torch.tensor([[[[0.0, 8.0]], [[8.0, 8.0]]]]), torch.tensor([[[0.5, 0.5], [0, 0]]])
    score = dict(paper=0.5 * (9.2103 - 0.1178) / 2, official=math.log(5 / 4) - math.log(7 / 6))[reading]
    assert_near(slot_similarity(d2, y, reading), torch.tensor([[[score, 0]]]), 1e-3)


# ---- losses: Eq. 2, Supp. 8 ----------------------------------------------------------------------

def slow_orthogonality(x, reading):
    """Cosines of slot pairs over the "number of classes multiplied by the number of slots per class"."""
    classes, slots, _ = x.shape
    total = 0 * x.sum()
    for c, i, j in np.ndindex(classes, slots, slots):
        if i < j or reading == "official" and i != j:                   # official: pairs in both orders
            total = total + x[c, i] @ x[c, j] / (x[c, i].norm() * x[c, j].norm())
    return total / (classes * slots)


@both_readings
@pytest.mark.parametrize("shape", [(C, K, M), (1, 5, 9), (3, 1, M)])
def test_orthogonality_loss_is_the_double_loop(reading, shape):
    """Of distributions; official: of logits."""
    x = normal(*shape).softmax(-1) if reading == "paper" else normal(*shape)
    assert_same(lambda x: orthogonality_loss(x, reading), lambda x: slow_orthogonality(x, reading), x)


def test_observation_2_zero_only_if_no_prototype_is_in_two_slots():
    """K equal slots have K (K-1) / 2 pairs of cosine 1, over K. Opposite logits: official falls to -1."""
    apart = torch.tensor([[[0.5, 0.5, 0, 0, 0], [0, 0, 1.0, 0, 0], [0, 0, 0, 0.3, 0.7]]]).repeat(2, 1, 1)
    assert_near(orthogonality_loss(apart), 0)
    for slot, m in (apart[0] == 0).nonzero().tolist():                  # let in a prototype of another slot
        touching = apart.clone()
        touching[0, slot, m] = 0.1
        assert orthogonality_loss(touching) > 0.005
    assert_near(orthogonality_loss(torch.full((3, 4, 5), 0.2)), 1.5, 1e-5)
    opposite = torch.tensor([[[1.0, -2.0, 0.5], [-2.0, 4.0, -1.0]]])
    assert_near(orthogonality_loss(opposite, "official"), -1, 1e-5)


def slow_costs(min_d2, labels, y):
    """Own prototypes: the K with the largest share in the slots of the class, if it is half of the even share
    K / M or more [D22]. Nearest own, nearest other."""
    nearest, slots = [], y.shape[1]
    for distances, label in zip(min_d2, labels):
        share = sum(y[label])
        order = share.argsort(descending=True).tolist()
        own = [m for m in order[:slots] if share[m] >= slots / len(order) / 2]
        others = [m for m in order if m not in own]
        nearest.append(torch.stack([distances[own].min(), distances[others].min()]))
    return sum(nearest) / len(nearest)


def both_costs(min_d2, labels, y):
    return torch.stack([cost(min_d2, labels, y) for cost in (cluster_cost, separation_cost)])


def test_cluster_and_separation_costs_are_the_loop_and_train_no_slot():
    """As in ProtoPNet [8]: near to a prototype of the own class, far from the others; 0 where K = M."""
    labels, y = torch.arange(8).flip(0) % C, normal(C, K, M, seed=3).softmax(-1).requires_grad_()
    assert_same(lambda d2: both_costs(d2, labels, y), lambda d2: slow_costs(d2, labels, y), normal(8, M) ** 2)
    assert not both_costs(normal(8, M), labels, y).requires_grad
    all_own = torch.eye(K).double().repeat(C, 1, 1)
    assert_same(lambda d2: separation_cost(d2, labels, all_own), lambda d2: 0 * d2.sum(), normal(8, K).abs())


@both_readings
@pytest.mark.parametrize("slots, own", [([0, 1, 4], {0, 1, 4}), ([2, 2, 5], {2, 5}), ([3, 3, 3], {3}),
                                        (None, None)])
def test_own_prototypes_are_those_that_the_class_holds(reading, slots, own):
    """[D22]: with a prototype in two slots, fewer than K. official fills them up; so do ties of all M."""
    y = nn.functional.one_hot(torch.tensor([slots]), M).double() if slots else torch.full((1, 3, M), 1 / M)
    found = protopool.own_prototypes(y, reading)[0].nonzero().flatten().tolist()
    if own and reading == "paper":
        assert set(found) == own
    else:
        assert len(found) == 3 and set(found) >= (own or set())
    probes = [[cost(min_d2[None], torch.tensor([0]), y, reading) for cost in (cluster_cost, separation_cost)]
              for min_d2 in 1 - torch.eye(M)]                           # one prototype alone is at distance 0
    assert probes == [[0, 1] if m in found else [1, 0] for m in range(M)]


# ---- the model: Sec. 3, Fig. 3 -------------------------------------------------------------------

class Backbone(nn.Sequential):
    channels = 5

    def __init__(self):
        super().__init__(nn.Conv2d(3, 5, 4, stride=4), nn.BatchNorm2d(5))


def small_net(reading="paper", sharp=20, **flags):
    """3 classes, 8 prototypes, 2 slots; sharp: how far apart the logits of the slots are."""
    torch.manual_seed(0)
    net = ProtoPool(Backbone(), 3, 8, 2, 6, reading, **flags)
    net.q.data *= sharp
    return net


def slow_logits(net, x, y):
    d2 = slow_distances(net.features(x), net.prototypes)
    return slow_slots(d2, y, net.reading, net.focal).flatten(1) @ net.last_layer.weight.double().T


def test_initial_values():
    """Fig. 5: "all prototypes are assigned with a probability of 0.005" (1 / 202). Xavier normal: variance
    2 / (fan_in + fan_out); official: Kaiming, 2 / fan_out [D8]. A class sees its own slots, with weight 1."""
    for reading, add_on, pool in (("paper", 2 / (5 + 256), 2 / (202 + 256)), ("official", 2 / 256, 1 / 12)):
        torch.manual_seed(0)
        net = ProtoPool(Backbone(), 200, 202, 10, 256, reading)
        for values, variance in ((net.q, 2 / (202 * 10 + 200 * 10)), (net.prototypes, pool),
                                 (net.add_on_layers[0].weight, add_on)):
            assert values.var().item() == pytest.approx(variance, rel=0.1)
        assert (net.prototypes.min() >= 0) == (reading == "official") and not net.add_on_layers[0].bias.any()
        assert (net.soft_assignment(temperature(0, reading)) - 0.005).abs().max() < 0.0006
    net = small_net()
    assert net.last_layer.weight.tolist() == net.own_slots().tolist() == [
        [1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]
    z = net.features(9 * torch.randn(2, 3, 8, 8))                       # [D13]
    assert net.last_layer.bias is None and z.shape == (2, 6, 2, 2) and 0 < z.min() and z.max() < 1


@both_readings
@pytest.mark.parametrize("focal", [True, False])
def test_test_time_takes_hard_slots_through_the_last_layer(reading, focal):
    """[D5]: what softmax(q / 0.001) puts above 0.5; official: argmax q. Two winners are none, in `paper`."""
    net, x = small_net(reading, focal=focal, noise=0.3).eval(), torch.randn(B, 3, 8, 12)       # [D24] rests
    net.last_layer.weight.data = torch.randn(3, 6)
    net.q.data[1, 0], net.q.data[2, 1] = torch.tensor([5.0, 5, 0, 0, 0, 0, 0, 0]), 0
    net.q.data[2, 1, 3] = 0.005                                         # little, but 5 times tau
    hard = torch.zeros(3, 2, 8)
    for c, k in np.ndindex(3, 2):
        if reading == "official" or (c, k) != (1, 0):
            hard[c, k, int(np.argmax(net.q[c, k].tolist()))] = 1
    logits, min_d2, y = net(x)
    assert torch.equal(y, hard)
    d2, expected = slow_distances(net.features(x), net.prototypes), slow_logits(net, x, hard)
    assert_near(logits, expected, 2e-4)
    assert_near(net.last_layer(net.slot_scores(x)), expected, 2e-4)
    assert_near(min_d2, d2.amin((2, 3)), 1e-5)
    assert_near(net.similarity_maps(x), slow_similarity(d2), 2e-4)


@both_readings
@pytest.mark.parametrize("gumbel, sd", [(True, 0.0), (False, 0.0), (True, 0.3)])
def test_a_training_pass_samples_one_assignment_for_the_whole_batch(reading, gumbel, sd):
    """Without Gumbel-softmax (Table 4): softmax(q), no temperature, no noise. [D24]: noisy prototypes."""
    net, x = small_net(reading, sharp=0.01, gumbel=gumbel, noise=sd).eval(), torch.randn(B, 3, 8, 12)
    torch.manual_seed(1)
    logits, _, y = net(x, tau=0.03)
    torch.manual_seed(1)
    net.prototypes.data += sd * torch.randn(8, 6) if sd else 0
    noise, factor = gumbel_noise(net.q), 2 if reading == "official" else 1
    assert_near(y, slow_assign(net.q, 0.03, noise, factor) if gumbel else slow_assign(net.q, 1, 0), 1e-5)
    assert_near(logits, slow_logits(net, x, y), 2e-4)
    assert torch.equal(net(x, tau=0.03)[2], y) == (not gumbel)          # noise of its own in every pass


@both_readings
def test_fixed_slots_keep_their_logits_and_empty_slots_and_lose_the_dead(reading):
    """[D17]. One of the slots is empty in `paper`: a softmax over fewer prototypes would fill it."""
    net, x = small_net(reading).eval(), torch.randn(B, 3, 8, 8)
    net.q.data[1, 0] = 0
    hard, before = net.hard_assignment(), net(x)[0]
    alive = hard.flatten(0, 1).any(0)
    kept = net.prototypes[alive].clone()
    assert hard[1, 0].any() == (reading == "official") and net.fix_slots() == (~alive).sum() > 0
    assert torch.equal(net.hard_assignment(), hard[..., alive]) and torch.equal(net.prototypes, kept)
    assert torch.equal(net.held(), hard[..., alive].amax(1) > 0) and net.fix_slots() == 0
    assert_near(net(x)[0], before, 1e-5)
    with pytest.raises(run.UserError, match="every slot is empty"):
        small_net(sharp=0).fix_slots()


# ---- a training step: Supp. 8, Table 5, Table 6 --------------------------------------------------

def slow_ce(logits, labels):
    terms = [row.exp().sum().log() - row[label] for row, label in zip(logits.double(), labels)]
    return sum(terms) / len(terms)


def test_mix_up_draws_from_beta_one_half():
    torch.manual_seed(0)
    x, labels = torch.rand(5, 3, 4, 4), torch.arange(5)
    mixed, others, lams = zip(*(protopool.mix(x, labels) for _ in range(400)))
    for mixture, order, lam in zip(mixed, others, lams):
        assert torch.allclose(mixture, lam * x + (1 - lam) * x[order])  # label n is image n
    assert abs(np.mean(lams) - 0.5) < 0.07 and abs(np.var(lams) - 0.125) < 0.02    # a b / ((a+b)^2 (a+b+1))
    orders = {tuple(order.tolist()) for order in others}
    assert len(orders) > 60 and {tuple(sorted(order)) for order in orders} == {(0, 1, 2, 3, 4)}


@both_readings
@pytest.mark.parametrize("mixup, batch", [(True, 6), (False, 6), (True, 1)])
def test_a_step_goes_down_the_weighted_sum_of_the_paper(reading, mixup, batch):
    """Mix-up draws lam, then an order; then comes the noise. official [D15]: the costs see one label."""
    cfg = preset("toy", reading=reading, mixup=mixup, w_cluster=0.7, w_separation=-0.3, w_orth=2.0)
    net, x, labels = small_net(reading, sharp=3).eval(), torch.randn(batch, 3, 8, 8), torch.arange(batch) % 3
    exact, lam, order = copy.deepcopy(net), 1.0, torch.arange(batch)
    torch.manual_seed(1)
    if mixup:
        lam, order = torch.distributions.Beta(0.5, 0.5).sample().item(), torch.randperm(batch)
    logits, min_d2, y = exact(lam * x + (1 - lam) * x[order], 0.3)
    share = 1.0 if reading == "official" else lam
    near, far = (share * slow_costs(min_d2, labels, y.detach())
                 + (1 - share) * slow_costs(min_d2, labels[order], y.detach()))
    expected = dict(ce=lam * slow_ce(logits, labels) + (1 - lam) * slow_ce(logits, labels[order]),
                    cluster=0.7 * near, separation=-0.3 * far,
                    orth=2 * slow_orthogonality(exact.q if reading == "official" else y, reading))
    sum(expected.values()).backward()
    torch.manual_seed(1)
    terms = protopool.train_step(net, torch.optim.SGD(net.parameters(), lr=0.1), x, labels, 0.3, cfg)
    assert set(terms) == set(expected) and not any(term.requires_grad for term in terms.values())
    for name, term in terms.items():
        assert term.item() == pytest.approx(expected[name].item(), rel=1e-4, abs=1e-5)
    for now, before in zip(net.parameters(), exact.parameters()):
        assert_near(now, before - 0.1 * before.grad, 1e-4)


def test_fine_tuning_is_cross_entropy_and_the_off_class_weights():
    net, slots, labels, others = small_net(), normal(5, 6).float(), torch.arange(5) % 3, torch.arange(5) // 2
    weight, cfg = net.last_layer.weight, preset("toy", w_l1=0.5)
    weight.data = torch.randn(3, 6)
    losses = protopool.finetune_losses(net, net.last_layer, slots, labels, others, 0.3, cfg)
    logits = slots @ weight.T
    assert_near(losses["ce"], 0.3 * slow_ce(logits, labels) + 0.7 * slow_ce(logits, others))
    assert_near(losses["l1"], 0.5 * sum(abs(weight[c, s]) for c, s in np.ndindex(3, 6) if s // 2 != c), 1e-5)


@both_readings
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("phase", ["pretrain", "warmup", "joint", "finetune"])
@pytest.mark.parametrize("add_on_decay", [None, 0.03])
def test_optimizers_follow_table_6(reading, linear, phase, add_on_decay):
    """(rate, decay) of every part, and the cuts of the rate [D6][D7]. [D10]: the code decays the add-on layer
    in the warm-up; [D11]: nobody the pool. The plain classifier's layer takes the add-on layer's place."""
    cfg = preset("cub-r34", reading=reading, lr=0.1, slot_lr=0.2, backbone_lr=0.3, weight_decay=0.4,
                 lr_gamma=0.5, finetune_lr=0.6, lr_step=3, add_on_decay=add_on_decay)
    official, net = reading == "official", small_net(reading)
    layer = (0.1, 0.4 if phase == "joint" or phase == "warmup" and official else 0)
    parts = dict(prototypes=(0.1, 0), q=(0.2, 0), add_on_layers=(0.1, add_on_decay or layer[1]))
    if linear:
        net, parts = protopool.PlainClassifier(Backbone(), 3), dict(last_layer=layer)
    parts["backbone"] = dict(pretrain=(0.3, 0), joint=(0.3, 0.4)).get(phase)
    if phase == "finetune":
        parts = dict(last_layer=(0.6, 0.4 if official else 0))
    optimizer, scheduler = protopool.build_optimizer(net, phase, cfg, CPU)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in net.named_parameters():
        assert found.get(id(parameter)) == parts.get(name.split(".")[0]), name
    assert type(optimizer) is torch.optim.Adam and optimizer.defaults["betas"] == (0.9, 0.999)
    factor, step = dict(joint=(0.5, 3), finetune=(0.95 if official else 1, 5)).get(phase, (1, 5))
    for epoch in range(11):
        group = optimizer.param_groups[0]
        assert group["lr"] == pytest.approx(group["initial_lr"] * factor ** (epoch // step))
        optimizer.step()
        scheduler.step()


COMMON = dict(slots=10, batch_size=80, size=224, patience=12, lr=1.5e-3, slot_lr=1.5e-3, backbone_lr=5e-5,
              weight_decay=1e-3, lr_step=5, w_cluster=0.8, w_separation=-0.08, w_orth=1.0, w_l1=1e-4,
              mixup=True, gumbel=True, focal=True, passes_per_epoch=30, pretrain_epochs=0, add_on_decay=None)
OPTIONS = ("warmup_epochs", "finetune_epochs", "finetune_lr", "lr_gamma", "augment", "finetune_mixup")
READINGS = dict(paper=(10, 15, 1e-4, 0.5, "chain", False), official=(9, 25, 5e-5, 0.1, "single", True))
MODELS = {"cub-r34": "resnet34", "cub-r50-inat": "resnet50_inat", "cub-r152": "resnet152",
          "cub-d121": "densenet121", "cub-d161": "densenet161", "cars-r34": "resnet34",
          "cars-r50": "resnet50", "cars-d121": "densenet121"}


@both_readings
@pytest.mark.parametrize("name", MODELS)
def test_presets_and_readings_are_the_printed_recipes(reading, name):
    """Table 5 to 7, Supp. 8. What is given beats the reading."""
    data = name.split("-")[0]
    expected = COMMON | dict(zip(OPTIONS, READINGS[reading])) | dict(
        backbone=MODELS[name], prototypes=195 if name in ("cars-r34", "cars-r50") else 202, dataset=data,
        depth=dict(cub=256, cars=128)[data])
    cfg = preset(name, reading=reading)
    assert {option: getattr(cfg, option) for option in expected} == expected
    assert preset(name, reading=reading, lr_gamma=0.3).lr_gamma == 0.3


# ---- prototypes that start as patches [D20] ---------------------------------------------------------------

def slow_spread(patches, count, generator, tries):
    """Greedy k-means++: of the rows drawn by squared distance, the one that leaves the smallest sum."""
    drawn, chosen = torch.randint(len(patches), (1,), generator=generator).tolist(), []
    while True:
        left = [torch.stack([min((z - patches[i]).square().sum() for i in (*chosen, row)) for z in patches])
                for row in drawn]
        best = int(np.argmin([chance.sum() for chance in left]))
        chosen.append(drawn[best])
        if len(chosen) == count:
            return patches[chosen]
        drawn = torch.multinomial(left[best] + 1e-12, tries, replacement=True, generator=generator).tolist()


def test_spread_patches_is_greedy_k_means():
    patches = torch.randint(-4, 5, (30, 3), generator=torch.Generator().manual_seed(0)).float()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(spread_patches(patches, 6, seed, 4), slow_spread(patches, 6, generator, 4))
    found = spread_patches(torch.eye(5).repeat(7, 1), 5, seed)
    assert torch.equal(found.sort(0).values, torch.eye(5).sort(0).values)                  # each of the five


# ---- projection: Eq. 3 ---------------------------------------------------------------------------

HELD = [[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]           # p1 shared, p4 nobody's, one empty slot


def pixel_pool(held, prototypes):
    """ProtoPool whose features are the pixels. held: (C,M) 0/1, at most K ones a row."""
    net = ProtoPool(Backbone(), len(held), len(prototypes), K, 3)
    net.backbone = net.add_on_layers = nn.Identity()
    net.prototypes.data.copy_(prototypes)
    net.q.data.zero_()                                                  # a slot of zeros is empty
    for c, row in enumerate(held):
        for k, m in enumerate(np.flatnonzero(row)):
            net.q.data[c, k, m] = 3
    return net


def slow_projection(x, labels, held, prototypes):
    moved, found = prototypes.clone(), []
    for m, p in enumerate(prototypes):
        best, where = math.inf, (-1, -1, -1)
        for i, row, column in np.ndindex(len(x), *x.shape[2:]):
            d2 = ((x[i, :, row, column] - p) ** 2).sum().item()
            if held[labels[i]][m] and d2 < best:
                best, where, moved[m] = d2, (i, row, column), x[i, :, row, column]
        found.append(Source(*where, best))
    return moved, found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("sizes", [[7], [1] * 7, [1, 3, 2, 1]])
def test_projection_is_the_loop_whatever_the_batches(sizes, device):
    """Only images of classes that hold the prototype; of equal patches the first; nobody's stays as it is."""
    for seed in range(4):
        torch.manual_seed(seed)
        x, labels = torch.randint(-4, 5, (7, 3, 2, 3)).float(), torch.arange(7) % 3    # integers: many ties
        prototypes = torch.randint(-4, 5, (5, 3)).float()
        net = pixel_pool(HELD, prototypes).to(device)
        sources = project_prototypes(net, zip(x.split(sizes), labels.split(sizes)), torch.device(device))
        moved, found = slow_projection(x, labels, HELD, prototypes)
        assert sources == found and found[4] == Source(-1, -1, -1, math.inf)
        assert torch.equal(net.prototypes.cpu(), moved)


def test_projection_runs_the_network_in_eval_mode_and_makes_a_perfect_match():
    net, x, labels = small_net().train(), torch.randn(6, 3, 8, 12), torch.arange(6) % 3
    before = copy.deepcopy(net.state_dict())
    sources = project_prototypes(net, zip(x.split(4), labels.split(4)), CPU)
    after = net.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["prototypes"]
    for m in net.held().any(0).nonzero().flatten().tolist():
        z = net.features(x)[sources[m].image, :, sources[m].row, sources[m].column]
        assert_near(net.prototypes[m], z, 1e-5)
        assert_near(sources[m].distance, (z - before["prototypes"][m]).square().sum(), 1e-4)


@pytest.mark.gpu
@both_readings
def test_gpu_a_training_step_never_waits_for_the_device(reading):
    cfg, device = preset("toy", reading=reading, mixup=True, device="cuda"), torch.device("cuda")
    net = small_net(reading, sharp=1).to(device, memory_format=torch.channels_last).train()
    optimizer, _ = protopool.build_optimizer(net, "joint", cfg, device)
    x, labels = torch.randn(6, 3, 32, 32).to(device), torch.tensor([0, 1, 2, 0, 1, 2]).to(device)
    for _ in range(3):                                                  # first calls: kernels load
        protopool.train_step(net, optimizer, x, labels, 0.5, cfg)
    torch.cuda.set_sync_debug_mode("error")
    try:
        terms = protopool.train_step(net, optimizer, x, labels, 0.5, cfg)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(v.is_cuda and math.isfinite(v) for v in terms.values())
