"""The pure functions of protopool.py against the paper (Rymarczyk et al., ECCV 2022), formula by formula.

The references are loops and plain numpy in float64 and share no line with protopool.py: a second explanation
of the method. B images, M prototypes, D channels, C classes, K slots a class. An assignment is (C,K,M): row
(c,k) says which share of every prototype is in slot k of class c. Two readings: `paper` is the printed
formula, `official` what the authors' released code computes instead.

    python -m pytest -q tests/test_protopool_equations.py
"""

import math

import numpy as np
import pytest
import torch

from protopool import (assign, cluster_cost, focal_similarity, harden, log_similarity, orthogonality_loss,
                       separation_cost, slot_similarity, squared_distances, temperature)

B, M, D, C, K, H, W = 3, 6, 8, 4, 2, 4, 5
both_readings = pytest.mark.parametrize("reading", ["paper", "official"])
gradcheck = torch.autograd.gradcheck                                    # against finite differences


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distributions(*shape, seed=0):
    return torch.softmax(2 * normal(*shape, seed=seed), dim=-1)


def gumbel(*shape, seed=0):
    return -torch.log(-torch.log(uniform(*shape, seed=seed) + 1e-12))


def one_hot(slots):
    """slots (C,K), the prototype number of every slot -> assignment (C,K,M)."""
    return torch.nn.functional.one_hot(torch.tensor(slots), M).double()


def assert_near(actual, expected, tolerance):
    actual, expected = (torch.as_tensor(x).detach().double().cpu() for x in (actual, expected))
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance


# ---- temperature: Supp. 8 ------------------------------------------------------------------------

def test_temperature_of_the_paper():
    """tau = 1 / sqrt(3.4e4 epoch) below epoch 30, else 0.001, "start with tau = 1": a jump, then slowly."""
    tau = [temperature(epoch) for epoch in range(101)]
    assert tau[0] == 1 and tau[30:] == [0.001] * 71 and isinstance(tau[3], float)
    assert tau[1:30] == pytest.approx([1 / math.sqrt(3.4e4 * epoch) for epoch in range(1, 30)], rel=1e-12)
    assert tau[1] == pytest.approx(0.005423, abs=1e-6) and tau[29] == pytest.approx(0.001007, abs=1e-6)


def test_temperature_of_the_official_code():
    """It multiplies q by 183, 258, ... 1000, which is 1 / tau; no temperature at all at epoch 0."""
    scales = {1: 183, 2: 258, 5: 408, 10: 577, 20: 816, 29: 983, 30: 1000, 31: 1000, 200: 1000}
    assert {epoch: round(1 / temperature(epoch, "official")) for epoch in scales} == scales
    assert temperature(0, "official") == math.inf


# ---- assignment: Gumbel-softmax, Sec. 3 and Supp. 8 ----------------------------------------------

def slow_assign(q, tau, noise, factor=1):
    """y^i = exp(factor (q^i / tau + eta_i)) / sum over m of the same."""
    logits = factor * (q.detach().numpy() / tau + noise.numpy())
    powers = np.exp(logits - logits.max(-1, keepdims=True))             # the shift cancels in the fraction
    return powers / powers.sum(-1, keepdims=True)


@both_readings
@pytest.mark.parametrize("tau", [1.0, 0.3, 0.01])
def test_assign_is_the_printed_softmax(reading, tau):
    """Supp. 8: exp(q / tau + eta) over its sum; official doubles the exponent. "Differentiable"."""
    q, noise = normal(C, K, M), gumbel(C, K, M, seed=1)
    for eta in (noise, torch.zeros(C, K, M)):
        expected = slow_assign(q, tau, eta, factor=2 if reading == "official" else 1)
        assert_near(assign(q, tau, eta, reading), expected, 1e-12)
    assert_near(assign(q, tau, None, reading), expected, 1e-12)         # None: no noise
    assert gradcheck(lambda x: assign(x, 0.7, noise, reading), (q.requires_grad_(),))


def test_official_assign_without_temperature_is_a_plain_softmax():
    """Epoch 0 of the official code: softmax(q), not doubled, no noise, and q still learns."""
    q, weight = normal(C, K, M).requires_grad_(), normal(C, K, M, seed=2)
    y = assign(q, temperature(0, "official"), gumbel(C, K, M), "official")
    assert_near(y, slow_assign(q, 1, torch.zeros(C, K, M)), 1e-12)
    assert torch.equal(assign(q, math.inf, None, "official"), y)
    slope = y * (weight - (y * weight).sum(-1, keepdim=True))           # derivative of a softmax
    assert_near(torch.autograd.grad((y * weight).sum(), q)[0], slope, 1e-12)


@both_readings
def test_a_fresh_slot_gives_every_prototype_the_same_share(reading):
    """Fig. 5: "in the beginning, all prototypes are assigned with a probability of 0.005" (= 1 / 202)."""
    xavier = math.sqrt(2 / (10 * 202 + 200 * 10))                       # 0.0223, of q (200,202,10)
    y = assign(xavier * normal(20, 10, 202), temperature(0, reading), None, reading)
    assert y.min() > 0.0044 and y.max() < 0.0056 and y.mean().item() == pytest.approx(1 / 202)


@both_readings
def test_observation_1_low_temperatures_make_the_slot_one_hot(reading):
    """Observation 1: the limit for tau -> 0 is a canonical vector; in this variant the one of argmax q.

    The noise is outside the division by tau ("we reduce the influence of the noise"), so it cannot choose in
    the limit. The classic softmax((q + eta) / tau) would choose argmax(q + eta), another prototype here.
    """
    q = torch.tensor([[[0.30, 0.10, 0.25, -0.20]]], dtype=torch.float64)
    noise = torch.tensor([[[-0.5, 2.0, 0.1, 0.4]]], dtype=torch.float64)
    shares = [assign(q, tau, noise, reading)[0, 0] for tau in (1, 0.1, 0.01, 0.001, 1e-5)]
    assert shares[0].argmax() == 1 and (q + noise).argmax() == 1
    assert all(before[0] <= after[0] for before, after in zip(shares, shares[1:]))
    assert_near(shares[-1], torch.tensor([1, 0, 0, 0]), 1e-12)
    assert torch.isfinite(assign(1e4 * q.float(), 0.001, noise.float(), reading)).all()    # exponents of 3e6


def test_harden_keeps_what_is_above_one_half():
    """Sec. 4: "set all values of a distribution q higher than 0.5 to 1, and the remaining values to 0"."""
    y = torch.tensor([[[0.51, 0.49, 0.0], [0.5, 0.5, 0.0], [0.4, 0.3, 0.3], [0.0, 0.0, 1.0]]])
    assert harden(y).tolist() == [[[1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1]]]


# ---- distances -----------------------------------------------------------------------------------

def differences(features, prototypes):
    """z - p for every cell z and prototype p: (B,M,D,H,W) float64."""
    z, p = features.detach().cpu().double(), prototypes.detach().cpu().double()
    return z[:, None] - p[None, :, :, None, None]


def slow_distances(features, prototypes):
    return (differences(features, prototypes) ** 2).sum(2)


@pytest.mark.parametrize("shape", [(B, D, H, W), (1, D, 1, 1), (1, D, 7, 2)])
def test_squared_distances_by_definition(shape):
    """Sec. 3: ||z - p||^2 of every vector z of the image to every prototype p; float32 whatever comes in."""
    features, prototypes = uniform(*shape), uniform(M, D, seed=1)
    for kind in (torch.float32, torch.float64, torch.bfloat16):
        z, p = features.to(kind), prototypes.to(kind)
        d2 = squared_distances(z.contiguous(memory_format=torch.channels_last), p)
        assert d2.dtype == torch.float32
        assert_near(d2, slow_distances(z, p), 1e-5)
        assert_near(squared_distances(z, p), d2, 1e-5)


def test_squared_distances_pass_gradients_to_features_and_prototypes():
    """d ||z - p||^2 / dz = 2 (z - p), and the opposite for p; weights make every entry count differently."""
    z, p = uniform(B, D, H, W).float().requires_grad_(), uniform(M, D, seed=1).float().requires_grad_()
    weight = normal(B, M, H, W, seed=2)
    dz, dp = torch.autograd.grad((squared_distances(z, p) * weight).sum(), (z, p))
    slope = 2 * weight[:, :, None] * differences(z, p)
    assert_near(dz, slope.sum(1), 1e-4)
    assert_near(dp, -slope.sum((0, 3, 4)), 1e-3)


def exact_patches(device="cpu"):
    """CUB's size, D = 256: features (2,256,7,7) and 98 prototypes, each an exact copy of one cell."""
    features = uniform(2, 256, 7, 7).float().to(device)
    return features, features.permute(0, 2, 3, 1).reshape(98, 256).clone()


def own_similarity(d2):
    """(98,): the log similarity of every prototype of exact_patches() to the cell it was copied from."""
    return log_similarity(d2.cpu().permute(0, 2, 3, 1).reshape(98, 98).diagonal())


def test_an_exact_patch_keeps_its_similarity_inside_bf16_autocast():
    """After Eq. 3 a prototype is a training patch: d = 0, similarity log(1 / 1e-4) = 9.21; never negative.

    The second half shows why the function must leave autocast: in bf16, ||z||^2 - 2 z.p + ||p||^2 is the
    difference of numbers near 85 with 8 binary digits, wrong by about 0.2; most of the similarity is gone.
    """
    features, prototypes = exact_patches()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        d2 = squared_distances(features, prototypes)
        cross = torch.einsum("bdhw,md->bmhw", features, prototypes)     # autocast makes this a bf16 product
    assert d2.dtype == torch.float32 and d2.min() >= 0 and own_similarity(d2).min() > 8.5
    assert squared_distances(features, prototypes).min() >= 0
    assert_near(d2, slow_distances(features, prototypes), 2e-4)
    squares = features.square().sum(1, keepdim=True) + prototypes.square().sum(1)[:, None, None]
    spoilt = own_similarity((squares - 2 * cross.float()).clamp(min=0))
    assert cross.dtype == torch.bfloat16 and spoilt.min() < 4
    assert (spoilt < 8.5).float().mean() > 0.25                         # the clamp at 0 saves about half


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_tf32_does_not_spoil_distances_on_cuda(tf32, autocast):
    """cuDNN rounds convolutions to TF32 by default: error 1e-2, similarity 4. Distances must escape that."""
    features, prototypes = exact_patches("cuda")
    with (torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32),
          torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast)):
        d2 = squared_distances(features, prototypes)
    assert d2.dtype == torch.float32 and d2.is_cuda and d2.min() >= 0
    assert_near(d2, slow_distances(features, prototypes), 5e-4)
    assert own_similarity(d2).min() > 8


# ---- similarities: Eq. 1 and its footnote --------------------------------------------------------

def slow_similarity(d2):
    return np.log((d2 + 1) / (d2 + 1e-4))


def slow_focal(d2):
    """Eq. 1: the largest similarity of an image minus the mean one, (B,M)."""
    g = slow_similarity(d2.detach().numpy())
    return torch.from_numpy(g.max((2, 3)) - g.mean((2, 3)))


def test_log_similarity_by_hand():
    """Footnote 5: log((d + 1) / (d + eps)), close to log(1 + 1/d) of ProtoPNet unless d is tiny."""
    d2 = torch.tensor([[0, 1e-4, 1e-2], [0.1, 1, 8]], dtype=torch.float64)
    assert_near(log_similarity(d2), torch.tensor([[9.2103, 8.517, 4.605], [2.397, 0.693, 0.118]]), 1e-3)
    assert_near(log_similarity(d2[1]), torch.log(1 + 1 / d2[1]), 1e-3)
    assert log_similarity(torch.zeros(1), eps=0.01).item() == pytest.approx(math.log(100))


@pytest.mark.parametrize("shape", [(B, M, H, W), (1, M, H, W), (1, 1, 1, 1), (2, M, 1, 7)])
def test_focal_similarity_is_equation_1(shape):
    """Eq. 1: max over z of g_p(z) minus mean over z of g_p(z); a batch of one keeps its axis."""
    d2 = 8 * uniform(*shape) ** 4
    assert_near(focal_similarity(d2), slow_focal(d2), 1e-6)


def test_focal_similarity_rewards_a_narrow_match():
    """"Maximal ... if a prototype is similar to only a narrow area"; a match everywhere scores 0."""
    d2 = torch.full((1, 3, 7, 7), 8.0)
    d2[0, 0, 2, 5] = 0                                                  # one cell of 49
    d2[0, 1, :4] = 0                                                    # the upper 28 cells
    d2[0, 2] = 0                                                        # all of them
    span = 9.21034 - 0.11777
    assert_near(focal_similarity(d2)[0], torch.tensor([span * 48 / 49, span * 21 / 49, 0]), 1e-4)


def test_focal_similarity_sends_gradient_to_every_cell():
    """"The gradient passes through all elements of Z_x", where max pooling alone reaches a single one."""
    d2 = (0.1 + uniform(B, M, H, W)).requires_grad_()
    assert gradcheck(focal_similarity, (d2,))
    slope, = torch.autograd.grad(focal_similarity(d2).sum(), d2)
    g = 1 / (d2.detach() + 1) - 1 / (d2.detach() + 1e-4)                # derivative of the log similarity
    best = (d2.detach() == d2.detach().amin((2, 3), keepdim=True)).double()
    assert (slope != 0).all()
    assert_near(slope, g * (best - 1 / (H * W)), 1e-8)
    tie = torch.tensor([[[[0.5, 0.5, 3.0, 7.0]]]], dtype=torch.float64, requires_grad=True)
    value = focal_similarity(tie)                                       # two best cells share one gradient
    slope, = torch.autograd.grad(value.sum(), tie)
    assert value.item() == pytest.approx(slow_focal(tie).item())
    assert slope[..., :2].sum().item() == pytest.approx((1 / 1.5 - 1 / 0.5001) * (1 - 2 / 4))


# ---- slots: Sec. 3, g_k = sum over i of q_k^i g_{p_i} --------------------------------------------

def slow_slots(d2, y, reading):
    """(B,C,K): similarities mixed by the shares; official: distances mixed, the logarithm comes last."""
    def mixed(values):                                                  # (B,M) -> (B,C,K)
        return sum(y[None, :, :, m] * values[:, None, None, m] for m in range(y.shape[2]))
    if reading == "paper":
        return mixed(slow_focal(d2))
    nearest, average = mixed(d2.amin((2, 3))).numpy(), mixed(d2.mean((2, 3))).numpy()
    return slow_similarity(nearest) - slow_similarity(average)


@both_readings
@pytest.mark.parametrize("batch", [1, B])
def test_slot_similarity_of_soft_slots(reading, batch):
    """Sec. 3: "aggregated similarity g_k ... considering the distribution q_k"; both inputs are trained."""
    d2, y = 8 * uniform(batch, M, H, W) ** 4, distributions(C, K, M)
    assert_near(slot_similarity(d2, y, reading), slow_slots(d2, y, reading), 1e-6)
    inputs = (0.1 + uniform(batch, 3, 2, 3)).requires_grad_(), distributions(2, K, 3).requires_grad_()
    assert gradcheck(lambda *x: slot_similarity(*x, reading), inputs)
    d2, y = torch.tensor([[[[0.0, 8.0]], [[8.0, 8.0]]]]), torch.tensor([[[0.5, 0.5]]])      # by hand
    official = math.log(5 / 4) - math.log(7 / 6)                        # of the distances 4 and 6
    expected = official if reading == "official" else 0.5 * (9.2103 - 0.1178) / 2
    assert slot_similarity(d2, y, reading).item() == pytest.approx(expected, abs=1e-3)


def test_one_hot_slots_show_their_prototype_and_jensens_gap():
    """A hard slot is Eq. 1 of its prototype. The log similarity is convex: the official value is larger."""
    d2, slots = 8 * uniform(B, M, H, W) ** 4, [[0, 3], [3, 5], [1, 1], [4, 2]]
    paper, official = (slot_similarity(d2, one_hot(slots), reading) for reading in ("paper", "official"))
    assert_near(paper, focal_similarity(d2)[:, slots], 1e-10)
    assert paper.min() > 0 and (official - paper).min() > 0


@both_readings
def test_an_empty_slot_adds_nothing(reading):
    """Sec. 4 thresholds at 0.5: a slot without a winner has no prototype and scores 0, not log(1 / eps)."""
    d2 = (8 * uniform(B, M, H, W)).float().requires_grad_()
    y = one_hot([[0, 3], [3, 5], [1, 1], [4, 2]]).float()
    y[1, 0] = 0
    scores = slot_similarity(d2, y, reading)
    assert (scores[:, 1, 0] == 0).all() and (scores != 0).sum() == B * (C * K - 1)
    assert (torch.autograd.grad(scores[:, 1, 0].sum(), d2)[0] == 0).all()


# ---- orthogonality: Eq. 2 and Observation 2 ------------------------------------------------------

def slow_orthogonality(x, reading):
    """Cosines of slot pairs over the "number of classes multiplied by the number of slots per class"."""
    classes, slots, _ = x.shape
    total = 0 * x.sum()
    for c, i, j in np.ndindex(classes, slots, slots):
        if reading == "official" or i < j:                              # official: the full K x K matrix
            total = total + x[c, i] @ x[c, j] / (x[c, i].norm() * x[c, j].norm())
    return total / (classes * slots) - (1 if reading == "official" else 0)


@both_readings
@pytest.mark.parametrize("shape", [(C, K, M), (1, 5, 9), (3, 1, M)])
def test_orthogonality_loss_is_the_double_loop(reading, shape):
    """Eq. 2, a sum over i < j, of distributions; official: of logits, over all pairs. Value and gradient."""
    x = (distributions(*shape) if reading == "paper" else normal(*shape)).requires_grad_()
    got, expected = orthogonality_loss(x, reading), slow_orthogonality(x, reading)
    assert_near(got, expected, 1e-6)
    assert_near(torch.autograd.grad(got, x)[0], torch.autograd.grad(expected, x)[0], 1e-6)
    assert gradcheck(lambda z: orthogonality_loss(z, reading), (x,))


def test_orthogonality_loss_by_hand():
    """K equal slots: K (K-1) / 2 pairs of cosine 1 over K. Logits may be opposite: then official is -1."""
    equal = torch.full((3, 4, 5), 0.2)
    assert orthogonality_loss(equal).item() == pytest.approx(1.5, abs=1e-5)
    assert orthogonality_loss(equal, "official").item() == pytest.approx(3, abs=1e-5)
    q = torch.tensor([[[1.0, -2.0, 0.5], [-2.0, 4.0, -1.0]]])
    assert orthogonality_loss(q, "official").item() == pytest.approx(-1, abs=1e-5)


def test_observation_2_zero_only_if_no_prototype_is_in_two_slots():
    """"If L_orth ... is zero, then each prototype from a pool is assigned to only one slot of the class"."""
    apart = torch.tensor([[[0.5, 0.5, 0, 0, 0], [0, 0, 1.0, 0, 0], [0, 0, 0, 0.3, 0.7]]])
    assert orthogonality_loss(apart).item() == pytest.approx(0, abs=1e-6)
    assert orthogonality_loss(apart.repeat(2, 1, 1)).item() == pytest.approx(0, abs=1e-6)   # two classes
    for slot, m in (apart[0] == 0).nonzero().tolist():                  # let in a prototype of another slot
        touching = apart.clone()
        touching[0, slot] *= 0.9
        touching[0, slot, m] = 0.1
        assert orthogonality_loss(touching) > 0.01


# ---- cluster and separation costs ----------------------------------------------------------------

def slow_costs(min_d2, labels, assignment):
    """Own prototypes: the K with the largest share in the slots of the class. Nearest own, nearest other."""
    slots, nearest = assignment.shape[1], []
    for distances, label in zip(min_d2.detach(), labels):
        order = assignment[label].sum(0).argsort(descending=True)
        nearest.append([distances[order[:slots]].min(), distances[order[slots:]].min()])
    return torch.tensor(nearest).mean(0)


@pytest.mark.parametrize("batch", [1, 8])
def test_cluster_and_separation_costs_by_loop(batch):
    """As in ProtoPNet [8]: near to a prototype of the own class, far from the others. Neither trains q."""
    min_d2, labels = 3 * uniform(batch, M), torch.arange(batch).flip(0) % C
    min_d2, q = min_d2.requires_grad_(), normal(C, K, M, seed=3).requires_grad_()
    y, reached = q.softmax(-1), 0
    costs = cluster_cost(min_d2, labels, y), separation_cost(min_d2, labels, y)
    assert_near(torch.stack(costs), slow_costs(min_d2, labels, y), 1e-6)
    for cost in costs:
        slope, q_slope = torch.autograd.grad(cost, (min_d2, q), allow_unused=True)
        assert q_slope is None or (q_slope == 0).all()
        assert_near(slope.amax(1), torch.full((batch,), 1 / batch), 1e-6)
        reached = reached + (slope != 0).int()
    assert (reached.sum(1) == 2).all() and reached.max() == 1           # one own and one other an image


@pytest.mark.parametrize("slots", [[0, 1, 4], [2, 2, 5], [3, 3, 3], None])
def test_own_and_other_prototypes_are_a_partition_even_with_ties(slots):
    """With a prototype in two slots, fewer than K have a share. Still K are own, none is on both sides."""
    y = one_hot([slots]) if slots else torch.full((1, 3, M), 1 / M)     # None: all prototypes tie
    label, own = torch.tensor([0]), []
    for p, min_d2 in enumerate(1 - torch.eye(M)):                       # a probe: p alone is at distance 0
        costs = [cost(min_d2[None], label, y).item() for cost in (cluster_cost, separation_cost)]
        assert sorted(costs) == [0, 1]
        own += [p] if costs[0] == 0 else []
    assert len(own) == 3 and set(own) >= set(slots or [])


def test_costs_when_every_prototype_is_the_classes_own():
    """K = M: separation has nothing to choose from. It is 0 with gradient 0, not infinite or nan."""
    min_d2, labels, y = (1 + uniform(B, 3)).requires_grad_(), torch.tensor([0, 1, 0]), distributions(2, 3, 3)
    cluster, separation = cluster_cost(min_d2, labels, y), separation_cost(min_d2, labels, y)
    assert separation.item() == 0
    assert_near(cluster, min_d2.min(1).values.mean(), 1e-6)
    slope, = torch.autograd.grad(cluster - separation, min_d2)
    assert_near(slope, (min_d2 == min_d2.min(1, keepdim=True).values) / B, 1e-6)
