"""What scaleprotoseg.py measures on a trained network beside IoU: parts, sparsity, overlap, Eq. (10).

The network is asked by its methods alone: net.similarity(x) gives g_proto (B,P,h,w), net.used(alpha) the
prototypes in use, net.groups.activations(similarity, alpha) the groups. cfg: the script's settings. What
[D8] marks is explained on top of the script.
"""
import itertools
import statistics

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Subset
from tqdm import tqdm

from common import loaders, segmentation, speed
from common.files import some_of
from common.loaders import to_device
from common.metrics import counted_quantiles, row_quantile
from common.parts import open_parts
from common.regions import lowest_of_group
from common.segmentation import labels_of_cells, resized


def test_view(data, cfg):
    """Whole images as they are tested."""
    return loaders.TestView(data, cfg.test_size, cfg.test_square)


@torch.no_grad()
def analyse(net, data, cfg, device):
    """All measures that a test split allows, as entries of metrics.json."""
    net.eval()
    entries = sparsity(net, cfg)
    parts = open_parts(data, cfg.parts)
    if parts is not None:
        entries |= part_scores(net, data, parts, cfg, device) | part_purity(net, data, parts, cfg, device)
    if net.groups is not None:
        entries["group_overlap"] = mean_overlap(net, data, cfg, device)
    return entries


@torch.no_grad()
def images_per_second(net, data, cfg, device):
    """Table 10 "It/s": whole test images from input to labels, the clock read when the device is done."""
    net.eval()
    sample = test_view(data, cfg)[0]
    x = sample["image"][None].to(device, memory_format=torch.channels_last)

    def predict():
        windows = segmentation.in_windows(lambda x: net.final_logits(x, cfg), x, cfg.window)
        segmentation.class_ids(windows, x.shape[2:], sample["mask"].shape)
    return 1 / speed.measured_speed(predict, {}, device, repeats=11)


def told(entries, cfg):
    """What metrics.json says of prototypes, as lines to print."""
    lines, curve, moved = [], entries.get("part_metrics", {}), entries.get("projection", {})

    def row(name):
        values = [scores[name] for scores in curve.values()]
        return " / ".join("-" if value is None else f"{value:.0f}" for value in values)

    if moved:
        farthest = sorted(moved, key=lambda name: -moved[name]["distance"])
        far = {name: len(moved[name]["moved_far"]) for name in farthest if moved[name]["moved_far"]}
        names = f" ({some_of([f'{name} {count}' for name, count in far.items()], 20)})" if far else ""
        lines.append("projection, median squared distance by class: "
                     + some_of([f"{name} {moved[name]['distance']:.2f}" for name in farthest], 20)
                     + f"; moved far: {sum(far.values())} prototypes{names}")
    if "purity" in entries:
        lines.append(f"parts: purity {entries['purity']:.1f} %; the largest part of a class covers "
                     f"{entries['largest_part']:.1f} % of it")
    if curve:
        means = [f"{name} {entries[name]:.1f} %" for name in ("consistency", "stability")
                 if entries[name] is not None]
        lines += [f"parts, active above quantile {' / '.join(curve)}:",
                  f"  hit rate of the best part {row('hit_rate')} % (true parts {row('hit_rate_ceiling')}, "
                  f"random maps {row('hit_rate_chance')})",
                  f"  consistency {row('consistency')} % (true parts {row('consistency_ceiling')}, "
                  f"random maps {row('consistency_chance')})",
                  f"  stability {row('stability')} % (no part lit with nor without noise "
                  f"{row('stability_empty')})",
                  f"  the paper's means, over quantiles {', '.join(f'{q:g}' for q in cfg.quantiles)}: "
                  + ", ".join(means)]
    for q, entry in entries.get("equivariance", {}).items():
        if entry["mean_iou"] is not None:
            lines.append(f"equivariance at p_th = {q}: mean IoU {entry['mean_iou']:.2f} (with random maps "
                         f"{entry['chance_iou']:.2f}), {entry['above_chance']:.0f} % of the pairs above "
                         f"theirs, {len(entry['pairs'])} above 0.5 (with random maps "
                         f"{entry['pairs_by_chance']})")
    return lines


# ---- how far the projection moved prototypes -------------------------------------------------------------

FAR = 4                                                  # times the median over all prototypes (ours)


def moved_far(sources):
    """{p: squared distance} of the prototypes that the projection moved by more than FAR times the median of
    all: their patch is only the nearest there was, and what they learned lies elsewhere."""
    distances = [source[3] for source in sources]
    limit = FAR * statistics.median(distances)
    return {p: distance for p, distance in enumerate(distances) if distance > limit}


def projection(progress):
    """{"projection": {class: median squared distance, prototypes that moved far}}, for metrics.json."""
    far, entries = moved_far(progress["sources"]), {}
    for c, name in enumerate(progress["classes"]):
        own = [p for p, owner in enumerate(progress["prototype_class"]) if owner == c]
        if own:
            distance = statistics.median(progress["sources"][p][3] for p in own)
            entries[name] = dict(distance=distance, moved_far=[p for p in own if p in far])
    return dict(projection=entries)


# ---- parts (Sec. 6; formulas: code) [D8] -----------------------------------------------------------------

LEAST_IMAGES = 5                                         # that show a part: of fewer, 80 % is chance
CURVE = (0.5, 0.6, 0.7, 0.8, 0.9)                        # the quantiles of part_metrics


class PartView(loaders.TestView):
    """Images at their own size, with parts: keypoints int64 (K,4): class, part, x, y, on the image's pixels;
    part int64 (H,W): part ids, 0 = none, as everywhere if there is no part map."""

    def __init__(self, data, parts):
        super().__init__(data, 0)
        self.parts = parts

    def __getitem__(self, i):
        sample, part = super().__getitem__(i), self.parts.part_map(i)
        part = torch.zeros_like(sample["mask"]).long() if part is None else part.long()
        return sample | dict(part=part, keypoints=self.parts.keypoints(i).long())


def lit_parts(maps, owner, pixels, keypoints, num_parts, quantiles):
    """Do maps of one image light up on the keypoints of the parts of their class?

    maps (M,n): values of n cells; owner (M,): the class of each map; pixels (R,n) int64: how many pixels of
    each class lie in a cell, so that classes are row numbers; keypoints (K,4) int64: class, part id 1..Q,
    cell, 1 if on a pixel of its class, else 0 -> lit (quantiles,M,Q) bool: a keypoint of the part lies in an
    active cell; exists (M,Q) bool: the map's class has a keypoint of the part. Active: above the map's
    quantile over the pixels of its class [D8].
    """
    kind, part, cell, inside = keypoints.unbind(1)
    own = owner[:, None] == kind                                     # (M,K)
    threshold = counted_quantiles(maps, pixels[owner], quantiles)    # (quantiles,M)
    active = (maps[:, cell] > threshold[..., None]) & own & (inside > 0)                  # (quantiles,M,K)
    lit = torch.zeros(*active.shape[:2], num_parts, dtype=torch.int32, device=maps.device)
    exists = torch.zeros_like(lit[0]).index_add_(1, part - 1, own.int())
    return lit.index_add_(2, part - 1, active.int()) > 0, exists > 0


def part_presence(similarity, class_mask, keypoints, num_parts, quantile=0.8):
    """lit_parts for one class, at the image's own size: similarity (P,H,W), class_mask (H,W) bool, keypoints
    (K,3): part id 1..Q, x, y -> present (P,Q) bool, exists (Q,) bool: the image has a keypoint of it."""
    part, x, y = keypoints.long().unbind(1)
    points = torch.stack([0 * part, part, y * class_mask.shape[1] + x, class_mask[y, x].long()], 1)
    owner = torch.zeros(len(similarity), dtype=torch.int64, device=similarity.device)
    pixels = class_mask.flatten()[None].long()
    lit, exists = lit_parts(similarity.flatten(1), owner, pixels, points, num_parts, [quantile])
    return lit[0], exists.any(0)


def parts_on_cells(mask, part, points, row_of, shape):
    """What a grid of n = h*w cells holds; a pixel is in the cell that the nearest interpolation takes there.

    mask, part (H,W), points (K,4) as in PartView; row_of (256,): the row of each class; shape: rows R, parts
    Q, h, w -> area int64 (R,Q+1,n): pixels of each class and part; keypoints as in lit_parts.
    """
    R, Q, *size = shape
    cells = torch.arange(size[0] * size[1], dtype=torch.float32, device=mask.device).view(1, 1, *size)
    cells = F.interpolate(cells, mask.shape, mode="nearest")[0, 0].long()                 # (H,W)
    area = torch.zeros(R, Q + 1, size[0] * size[1], dtype=torch.int64, device=mask.device)
    area.index_put_((row_of[mask], part, cells), torch.ones_like(cells), accumulate=True)
    kind, number, x, y = points.unbind(1)
    return area, torch.stack([row_of[kind], number, cells[y, x], (mask[y, x] == kind).long()], 1)


def true_maps(area, row, part, size):
    """Maps (T,*size) of parts, given by row and id (T,): the share of the part in each cell of the grid. The
    mean over 3 x 3 cells is taken twice, or no cell of a large part would be above the others."""
    maps = (area[row, part] / area.sum((0, 1)).clamp(min=1)).unflatten(1, size)
    for _ in range(2):
        maps = F.avg_pool2d(maps, 3, 1, 1, count_include_pad=False)
    return maps


def random_maps(count, size, generator, device):
    """Smooth maps (count,*size) that know nothing of the image: normal numbers at every fourth cell, bicubic
    in between."""
    knots = torch.randn(1, count, *(side // 4 + 2 for side in size), generator=generator).to(device)
    return F.interpolate(knots, size, mode="bicubic", align_corners=True)[0]


@torch.no_grad()
def part_scores(net, data, parts, cfg, device):
    """What prototypes in use know of parts, in percent (native image size), over classes with parts.

    Consistency: share of the prototypes that light up on one and the same part in more than 80 % of the
    images that show this part, LEAST_IMAGES or more; None if no part is shown so often. Hit rate: the share
    of these images for a prototype's best part, mean over prototypes. Stability: share of (image, class,
    prototype) whose parts stay the same under noise N(0, 0.2) on the normalised image; empty: the share that
    lights up on no part with nor without it. Ceiling: true_maps in place of prototypes, None without part
    maps; chance: random_maps. The paper's consistency and stability are means over cfg.quantiles.
    """
    noise_of, chance_of = (torch.Generator().manual_seed(cfg.seed + k) for k in (0, 1))
    quantiles = sorted({*CURVE, *cfg.quantiles})
    prototype_class, used = net.prototype_class.cpu(), net.used(cfg.threshold).cpu()
    counted = {*parts.classes} & {*prototype_class[used].tolist()}
    P, Q, R = len(used), parts.num_parts, len(parts.classes) + 1     # the last row: other classes
    row_of = torch.full((256,), R - 1).index_copy_(0, torch.tensor(parts.classes), torch.arange(R - 1))
    row_of = row_of.to(device)
    # of every prototype, of a random map in its place, of every part of every class:
    images = torch.zeros(2 * P + R * Q, Q, device=device)            # those with the class that show a part
    hits = images.repeat(len(quantiles), 1, 1)                       # those in which the map lights up on it
    same, empty = torch.zeros(2, len(quantiles), device=device)
    pairs, with_parts = 0, [[i] for i in range(len(data)) if parts.has(i)]
    loader = loaders.make_loader(PartView(data, parts), with_parts, cfg.workers, device)
    for batch in tqdm(loader, desc="parts", leave=False, disable=None):
        noise = 0.2 * torch.randn(batch["image"].shape, generator=noise_of)
        kinds = batch["keypoints"][0, :, :2].unique(dim=0)           # class, part; still on the CPU
        shown = counted & {*kinds[:, 0].tolist()} & {*batch["mask"].unique().tolist()}    # [D8]
        index = (torch.isin(prototype_class, torch.tensor([*shown])) & used).nonzero()[:, 0]
        if not len(index):
            continue
        kinds = kinds[torch.isin(kinds[:, 0], torch.tensor([*shown]))].to(device, non_blocking=True)
        index = index.to(device, non_blocking=True)
        x, mask, part, points = to_device(batch, device, "image", "mask", "part", "keypoints")
        clean, noisy = (net.similarity(image)[0, index] for image in (x, x + noise.to(device)))
        U, *size = clean.shape
        area, points = parts_on_cells(mask[0], part[0], points[0], row_of, (R, Q, *size))
        own, row, part = row_of[net.prototype_class[index]], row_of[kinds[:, 0]], kinds[:, 1]
        maps = [clean, random_maps(U, size, chance_of, device), true_maps(area, row, part, size), noisy]
        lit, exists = lit_parts(torch.cat(maps).flatten(1), torch.cat([own, own, row, own]), area.sum(1),
                                points, Q, quantiles)
        where = torch.cat([index, P + index, 2 * P + row * Q + part - 1])
        images[where] += exists[:-U]
        hits[:, where] += lit[:, :-U]
        clean, noisy = lit[:, :U], lit[:, -U:]                       # (quantiles,U,Q)
        same += (clean == noisy).all(2).sum(1)
        empty += (~(clean | noisy)).all(2).sum(1)
        pairs += U
    if not pairs:
        return dict(consistency=None, stability=None)
    scores = dict(stability=100 * same / pairs, stability_empty=100 * empty / pairs)
    scores |= best_parts("", images[:P], hits[:, :P])
    scores |= best_parts("_chance", images[P:2 * P], hits[:, P:2 * P])
    own = [tally.unflatten(-2, (R, Q)).diagonal(0, -2, -1).flatten(-2)[..., None]         # (..., R*Q, 1)
           for tally in (images[2 * P:], hits[:, 2 * P:])]           # the map of a part on this part
    has_maps = parts.part_map(with_parts[0][0]) is not None
    scores |= best_parts("_ceiling", own[0] * has_maps, own[1])
    return part_entries({name: None if values is None else dict(zip(quantiles, values.tolist()))
                         for name, values in scores.items()}, cfg)


def best_parts(kind, images, hits):
    """images (M,Q) that show a part, hits (quantiles,M,Q) of M maps -> {"consistency" + kind, "hit_rate" +
    kind}: percent for each quantile, None if no part is shown often enough [D8]."""
    often = images >= LEAST_IMAGES                                   # (M,Q)
    if not often.any():
        return {f"consistency{kind}": None, f"hit_rate{kind}": None}
    rates = (hits / images.clamp(min=1) * often)[:, often.any(1)].amax(2)       # (quantiles, counted maps)
    return {f"consistency{kind}": 100 * (rates > 0.8).float().mean(1),
            f"hit_rate{kind}": 100 * rates.mean(1)}


def part_entries(scores, cfg):
    """{name: {quantile: percent} or None} -> entries of metrics.json: the curve, the paper's means."""
    entries = dict(part_metrics={f"{q:g}": {name: values and values[q] for name, values in scores.items()}
                                 for q in CURVE})
    for name in ("consistency", "stability"):
        entries[name] = scores[name] and statistics.mean(scores[name][q] for q in cfg.quantiles)
        if scores[name]:
            entries[f"{name}_by_quantile"] = {f"{q:g}": scores[name][q] for q in cfg.quantiles}
    return entries


@torch.no_grad()
def part_purity(net, data, parts, cfg, device, most=10):
    """Beyond the paper: is a prototype one part? In percent, over prototypes in use of classes with parts.

    purity: of the `most` images in which it is most similar to a pixel of its class, the share that holds
    the most frequent part at that pixel. largest_part: the share of the class that its largest part covers;
    chance lies above it, as purity takes the most frequent of ten. {} without part maps.
    """
    prototype_class = net.prototype_class.cpu()
    similarity, part = [], []
    area = torch.zeros(256, parts.num_parts + 1)                     # cells of each part in each class
    view = test_view(data, cfg)
    with_parts = [i for i in range(len(data)) if parts.has(i)]
    for i in tqdm(with_parts, desc="purity", leave=False, disable=None):
        part_map = parts.part_map(i)
        if part_map is None:
            return {}
        sample = view[i]
        s = net.similarity(sample["image"][None].to(device))[0]      # (P,h,w)
        labels = labels_of_cells(sample["mask"], s.shape[1:])
        ids = labels_of_cells(part_map, s.shape[1:]).flatten()
        others = labels != prototype_class[:, None, None]
        highest, cell = s.masked_fill(others.to(device), -1.0).flatten(1).max(1)
        similarity.append(highest)
        part.append(ids.to(device)[cell])
        area.index_put_((labels.flatten(), ids), torch.tensor(1.0), accumulate=True)
    similarity, part = torch.stack(similarity).cpu(), torch.stack(part).cpu()             # (images,P)
    value, top = similarity.topk(min(most, len(part)), dim=0)
    of_class = value >= 0                                            # (most,P): the image holds the class
    shown = F.one_hot(part.gather(0, top), area.shape[1]) * of_class[..., None]           # (most,P,Q+1)
    share = shown.sum(0)[:, 1:].amax(1) / of_class.sum(0).clamp(min=1)                    # (P,)
    chance = (area[:, 1:].amax(1) / area.sum(1).clamp(min=1))[prototype_class]
    has_parts = torch.isin(prototype_class, torch.tensor(parts.classes))
    counted = net.used(cfg.threshold).cpu() & has_parts & of_class[0]
    if not counted.any():
        return {}
    return dict(purity=100 * share[counted].mean().item(), largest_part=100 * chance[counted].mean().item())


# ---- groups (Sec. 9 to 12) -------------------------------------------------------------------------------

def sparsity(net, cfg):
    """Tables 7, 8 and 10: prototypes in use, prototypes of a group on average, mean |w| of the last layer,
    and parameters beyond backbone and ASPP: used prototypes, group weights that are not 0, last layer."""
    groups = net.groups
    head = (net if groups is None else groups).last_layer.weight.detach()
    prototypes = int(net.used(cfg.threshold).sum())
    entries = dict(prototypes=prototypes, mean_abs_weight=float(head.abs().mean()),
                   extra_parameters=prototypes * net.prototypes.shape[1] + head.numel())
    if groups is not None:
        is_used = (groups.weights >= cfg.threshold) & (groups.weights > 0)                # (C,G,N)
        has_groups = (groups.members >= 0).any(1)
        entries["group_average"] = float(is_used.sum(2)[has_groups].float().mean())
        entries["extra_parameters"] += int(is_used.sum())
        silent = int((is_used.sum((1, 2)) == 0).sum())
        if silent:
            print(f"note: --threshold {cfg.threshold} leaves {silent} of {len(is_used)} classes without a "
                  "prototype, so their logits are constant: lower it")
    return entries


def group_overlap(activation, percentile=95):
    """Table 9 for one image: activation (R,G,H,W) of groups of R classes -> intersection, union in pixels,
    sums over classes and pairs of groups. Every map is binarised above its own percentile over the image."""
    maps = activation.flatten(2)                                     # (R,G,n)
    active = (maps > row_quantile(maps.flatten(0, 1), percentile / 100).view(*maps.shape[:2], 1)).float()
    both = active @ active.transpose(1, 2)                           # (R,G,G) pixels active in both
    i, j = torch.triu_indices(maps.shape[1], maps.shape[1], 1, device=maps.device)
    count = active.sum(2)                                            # (R,G)
    intersection = both[:, i, j].sum()
    return intersection, (count[:, i] + count[:, j]).sum() - intersection


@torch.no_grad()
def mean_overlap(net, data, cfg, device):
    """Table 9: overlap of a class's groups in percent: intersection / union, summed over its images."""
    groups = net.groups
    total = torch.zeros(2, dtype=torch.float64)          # intersection, union
    filled = (groups.weights >= cfg.threshold).any(2).flatten()[:, None, None]            # others are all 1
    loader = loaders.eval_loader(test_view(data, cfg), cfg.workers, device)
    for batch in tqdm(loader, desc="overlap", leave=False, disable=None):
        x, mask = to_device(batch, device, "image", "mask")
        present = [c for c in mask.unique().tolist() if c != 255 and groups.members[c, 0] >= 0]
        if present:
            activation = groups.activations(net.similarity(x), cfg.threshold)[0] * filled # (C*G,h,w)
            activation = activation.unflatten(0, (-1, groups.weights.shape[1]))[present]
            activation = resized(activation, mask.shape[1:], "bicubic")
            total += torch.stack(group_overlap(activation)).cpu().double()
    return float(100 * total[0] / total[1]) if total[1] > 0 else None


# ---- prototypes of two scales (Sec. 11) ------------------------------------------------------------------

def shrunk(x, factor):
    """Images (B,3,H,W), smaller by the factor, antialiased."""
    return x if factor == 1 else F.interpolate(x, scale_factor=1 / factor, mode="bilinear", antialias=True)


@torch.no_grad()
def equivariance(net, data, cfg, device, quantiles=(0.6, 0.7), least=0.5, least_cells=10):
    """Eq. (10): prototypes of two scales that light up alike if the image's size makes up for their rates.

    With r(s) = rate s / rate 1, prototype i of scale s sees the image shrunk by r(t), prototype j of scale
    t > s sees it shrunk by r(s). Both maps go to the larger one's grid and are binarised at a quantile p_th
    over the class's cells. A pair is quasi-equivariant if its mean IoU is above `least`, the paper's IoU_th.
    Chance (ours): random_maps in place of j. Returns {p_th: dict}, see equivariance_ratios.
    """
    dice = torch.Generator().manual_seed(cfg.seed)
    ratios = [rate / cfg.rates[0] for rate in cfg.rates]
    count = min(cfg.equivariance, len(data))
    chosen = Subset(loaders.TestView(data, 0), [k * len(data) // count for k in range(count)])    # [D12]
    owner, scale = net.prototype_class, net.prototype_scale
    owner_here, scale_here = owner.cpu(), scale.cpu()                # what to compare is decided on the CPU
    images = torch.zeros(len(owner), len(owner), device=device)      # in which i and j are compared
    iou, chance = images.repeat(2, len(quantiles), 1, 1)             # sums over these images
    loader = loaders.eval_loader(chosen, cfg.workers, device)
    for batch in tqdm(loader, desc="equivariance", leave=False, disable=None):
        x, = to_device(batch, device, "image")
        maps = [net.similarity(shrunk(x, ratio))[0] for ratio in ratios]                  # (P,h,w) each
        for s, t in itertools.combinations(range(len(ratios)), 2):
            size = maps[s].shape[1:]                                 # image shrunk by r(s): for scale t
            labels = labels_of_cells(batch["mask"][0], size).flatten()                    # (n,)
            shown = torch.bincount(labels, minlength=256)[owner_here] >= least_cells      # [D12]
            i, j = ((shown & (scale_here == k)).nonzero()[:, 0] for k in (s, t))
            if not (owner_here[i][:, None] == owner_here[j]).any():
                continue
            i, j, labels = (part.to(device, non_blocking=True) for part in (i, j, labels))
            small, large = resized(maps[t][None, i], size)[0], maps[s][j]                 # of scales s and t
            a = most_active(small, labels == owner[i][:, None], quantiles)                # (quantiles,I,n)
            is_pair = owner[i][:, None] == owner[j]                                       # (I,J)
            images[i[:, None], j] += is_pair
            for total, others in ((iou, large), (chance, random_maps(len(j), size, dice, device))):
                b = most_active(others, labels == owner[j][:, None], quantiles)           # (quantiles,J,n)
                both = a @ b.mT                                      # cells that are active in both
                either = a.sum(2)[:, :, None] + b.sum(2)[:, None] - both
                total[:, i[:, None], j] += torch.where(is_pair, both / either, 0)
    iou, chance = (total.div(images).cpu() for total in (iou, chance))  # [D12], nan: never compared
    return {f"{q:g}": equivariance_ratios(net, iou[k], chance[k], least) for k, q in enumerate(quantiles)}


def most_active(maps, inside, quantiles):
    """maps (I,h,w), inside (I,n) bool: the cells that count -> float (quantiles,I,n) of 0 and 1: those of
    them at or above the map's quantile over them."""
    values = maps.flatten(1)
    return ((values >= counted_quantiles(values, inside.long(), quantiles)[..., None]) & inside).float()


def equivariance_ratios(net, iou, chance, least):
    """iou, chance (P,P) on the CPU, nan where not compared -> the ratios of Fig. 7 in percent, and the pairs
    (i, j, IoU) above `least`; pairs that share a prototype merge into a group. Beside them the mean IoU and
    that of chance, the percentage of pairs above their own chance (half of them are if there is nothing to
    find), and how many pairs are above `least` by chance."""
    i, j = (iou > least).nonzero().T
    paired = torch.cat([i, j]).unique()
    num_groups = len(np.unique(lowest_of_group(len(iou), i.numpy(), j.numpy())[paired.numpy()]))
    pairs = zip(i.tolist(), j.tolist(), iou[i, j].tolist())
    num_classes = len(net.prototype_class.unique())                  # classes with prototypes
    learned = num_classes * net.groups.weights.shape[1]
    compared = ~iou.isnan()
    above = (iou > chance)[compared].float().mean()
    means = [float(x) if compared.any() else None for x in (iou.nanmean(), chance.nanmean(), 100 * above)]
    return dict(groups=num_groups, groups_to_learned_groups=100 * num_groups / learned,
                prototypes_in_groups=100 * len(paired) / len(iou),
                classes_with_groups=100 * len(net.prototype_class[paired].unique()) / num_classes,
                **dict(zip(("mean_iou", "chance_iou", "above_chance"), means)),
                pairs_by_chance=int((chance > least).sum()), pairs=sorted(pairs, key=lambda pair: -pair[2]))


# ---- why a pixel got its class ---------------------------------------------------------------------------

@torch.no_grad()
def explain_cell(net, similarity, c, other, cell, alpha=0.0):
    """Why class c and not `other` at a cell (row, column)? similarity (P,h,w) -> dict of plain numbers.

    margin = logit of c - logit of other = contributions of both classes' groups (own, rival) + others, the
    sum of all other classes', + constant. As a group that sees nothing has activation 1, it contributes (its
    weight for c - its weight for other) x (activation - 1); constant: what is left where none sees anything.
    ProtoSeg: prototypes in place of groups, similarities in place of activations - 1, constant 0. The log
    prior, where there is one, is added to all logits, and so to the constant.
    """
    groups, s = net.groups, similarity[:, cell[0], cell[1]]          # (P,)
    if groups is None:
        head, owner = net.last_layer.weight, net.prototype_class
        activation, nothing = s, torch.zeros_like(s)
    else:
        head, owner = groups.last_layer.weight, groups.class_of_group
        activation, nothing = (groups.activations(values[None, :, None, None], alpha)[0, :, 0, 0]
                               for values in (s, torch.zeros_like(s)))         # (C*G,); 0, 0 without members
    weight = head[c] - head[other]                                   # (C*G,), ProtoSeg (P,)
    terms = weight * (activation - nothing)
    parts = {c: [], other: []}
    for k, of_class in parts.items():
        for f in (owner == k).nonzero()[:, 0].tolist():
            part = dict(weight=float(weight[f]), activation=float(activation[f]),
                        contribution=float(terms[f]))
            if groups is None:
                of_class.append(part | dict(prototype=f))
            elif nothing[f]:
                g = len(of_class)
                members = [dict(prototype=p, weight=w, scale=int(net.prototype_scale[p]),
                                similarity=float(s[p])) for p, w in groups.members_of(k, g, alpha)]
                of_class.append(part | dict(group=g, members=members))
    constant = float((weight * nothing).sum())
    if net.log_prior is not None:
        constant += float(net.log_prior[c] - net.log_prior[other])
    return dict(margin=float(terms.sum()) + constant, own=parts[c], rival=parts[other],
                others=float(terms[(owner != c) & (owner != other)].sum()), constant=constant)
