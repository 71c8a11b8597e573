"""What scaleprotoseg.py measures on a trained network beside IoU and Eq. (10): parts, sparsity, overlap.

The network is asked by its methods alone: net.similarity(x) gives g_proto (B,P,h,w), net.used(alpha) the
prototypes in use, net.groups.activations(similarity, alpha) the groups. cfg: the script's settings. What
[D8] marks is explained on top of the script.
"""
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import loaders, segmentation, speed
from common.loaders import to_device
from common.metrics import row_quantile
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


# ---- parts (Sec. 6; formulas: code) [D8] -----------------------------------------------------------------

LEAST_IMAGES = 5                                         # that show a part: of fewer, 80 % is chance


def part_presence(similarity, class_mask, keypoints, num_parts, quantile=0.8):
    """Do prototypes light up on the keypoints of parts in one image?

    similarity (P,H,W) of P prototypes of a class at the image's size, class_mask (H,W) bool, keypoints
    (K,3): part id 1..Q, x, y -> present (P,Q) bool: some keypoint of the part lies on an active pixel;
    exists (Q,) bool: the image has a keypoint of it. Active: above the map's quantile in the class.
    """
    pixels = similarity[:, class_mask]                               # (P,n)
    part, x, y = keypoints.long().unbind(1)
    exists = torch.zeros(num_parts, dtype=torch.bool, device=similarity.device)
    exists[part - 1] = True
    present = torch.zeros(len(similarity), num_parts, dtype=torch.int64, device=similarity.device)
    if pixels.shape[1] and len(part):
        active = similarity[:, y, x] > row_quantile(pixels, quantile)[:, None]            # (P,K) [D8]
        present.index_add_(1, part - 1, (active & class_mask[y, x]).long())
    return present > 0, exists


@torch.no_grad()
def part_scores(net, data, parts, cfg, device):
    """Consistency and stability in percent for every quantile and as their mean (native image size).

    Consistency: share of the prototypes in use that light up on one and the same part in more than 80 % of
    the images that show this part, LEAST_IMAGES or more; None if no part is shown so often. Stability: share
    of (image, class, prototype) whose parts stay the same under noise N(0, 0.2) on the normalised image.
    Both over classes with parts.
    """
    generator = torch.Generator().manual_seed(cfg.seed)
    used = net.used(cfg.threshold)
    images = torch.zeros(len(used), parts.num_parts, device=device)  # images of p's class that show part q
    hits = images.repeat(len(cfg.quantiles), 1, 1)                   # those in which p lights up on q
    stable = torch.zeros(len(cfg.quantiles))
    pairs = 0
    view = loaders.TestView(data, 0)
    with_parts = [i for i in range(len(data)) if parts.has(i)]
    for i in tqdm(with_parts, desc="parts", leave=False, disable=None):
        sample = view[i]
        keypoints = parts.keypoints(i).to(device)                    # (K,4): class, part, x, y
        x, mask = sample["image"][None].to(device), sample["mask"].to(device)
        noise = 0.2 * torch.randn(x.shape, generator=generator).to(device)
        both = [net.similarity(image) for image in (x, x + noise)]
        for c in parts.classes:
            index = ((net.prototype_class == c) & used).nonzero()[:, 0]
            points = keypoints[keypoints[:, 0] == c, 1:]
            if not len(index) or not len(points) or not (mask == c).any():
                continue                                             # [D8]
            maps = [F.interpolate(s[:, index], mask.shape, mode="nearest")[0] for s in both]
            for k, q in enumerate(cfg.quantiles):
                clean, exists = part_presence(maps[0], mask == c, points, parts.num_parts, q)
                noisy, _ = part_presence(maps[1], mask == c, points, parts.num_parts, q)
                hits[k, index] += clean
                stable[k] += (clean == noisy).all(1).sum().cpu()
            images[index] += exists
            pairs += len(index)
    if not pairs:
        return dict(consistency=None, stability=None)
    often = images >= LEAST_IMAGES                                   # (P,Q) [D8]
    rates = (hits / images.clamp(min=1) * often)[:, often.any(1)].amax(2)   # (quantiles, prototypes)
    scores = dict(stability=100 * stable / pairs)
    if often.any():
        scores["consistency"] = 100 * (rates > 0.8).float().mean(1)
    entries = dict(consistency=None) | {name: values.mean().item() for name, values in scores.items()}
    for name, values in scores.items():
        entries[f"{name}_by_quantile"] = {f"{q:g}": v for q, v in zip(cfg.quantiles, values.tolist())}
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
        s = net.similarity(sample["image"][None].to(device))[0].cpu()                     # (P,h,w)
        labels = labels_of_cells(sample["mask"], s.shape[1:])
        ids = labels_of_cells(part_map, s.shape[1:]).flatten()
        s = s.masked_fill(labels != prototype_class[:, None, None], -1.0).flatten(1)
        highest, cell = s.max(1)
        similarity.append(highest)
        part.append(ids[cell])
        area.index_put_((labels.flatten(), ids), torch.tensor(1.0), accumulate=True)
    similarity, part = torch.stack(similarity), torch.stack(part)    # (images,P)
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


def shrunk(x, factor):
    """Images (B,3,H,W), smaller by the factor, antialiased."""
    return x if factor == 1 else F.interpolate(x, scale_factor=1 / factor, mode="bilinear", antialias=True)


def equivariance_ratios(net, iou, least):
    """iou (P,P) on the CPU -> the ratios of Fig. 7 in percent, and the pairs; pairs that share a prototype
    merge into a group."""
    i, j = (iou > least).nonzero().T
    paired = torch.cat([i, j]).unique()
    num_groups = len(np.unique(lowest_of_group(len(iou), i.numpy(), j.numpy())[paired.numpy()]))
    pairs = zip(i.tolist(), j.tolist(), iou[i, j].tolist())
    num_classes = len(net.prototype_class.unique())                  # classes with prototypes
    learned = num_classes * net.groups.weights.shape[1]
    return dict(groups=num_groups, groups_to_learned_groups=100 * num_groups / learned,
                prototypes_in_groups=100 * len(paired) / len(iou),
                classes_with_groups=100 * len(net.prototype_class[paired].unique()) / num_classes,
                pairs=sorted(pairs, key=lambda pair: -pair[2]))


# ---- why a pixel got its class ---------------------------------------------------------------------------

@torch.no_grad()
def explain_cell(net, similarity, c, other, cell, alpha=0.0, prior=None):
    """Why class c and not `other` at a cell (row, column)? similarity (P,h,w) -> dict of plain numbers.

    margin = logit of c - logit of other = contributions of both classes' groups (own, rival) + others, the
    sum of all other classes', + constant. As a group that sees nothing has activation 1, it contributes (its
    weight for c - its weight for other) x (activation - 1); constant: what is left where none sees anything.
    ProtoSeg: prototypes in place of groups, similarities in place of activations - 1, constant 0. prior
    (C,), where there is one, is added to all logits, and so to the constant.
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
    constant = float((weight * nothing).sum()) + (0.0 if prior is None else float(prior[c] - prior[other]))
    return dict(margin=float(terms.sum()) + constant, own=parts[c], rival=parts[other],
                others=float(terms[(owner != c) & (owner != other)].sum()), constant=constant)
