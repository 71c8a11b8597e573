"""Figures of scaleprotoseg.py: prototypes and groups of a trained network, and why a pixel got its class.

The network is asked by its methods alone: net.similarity(x), net.final_logits(x, cfg), net.used(alpha),
net.groups.activations(similarity, alpha), net.groups.members_of(c, g, alpha). scaleprotoseg_page.py says what
each figure shows.
"""
import itertools
import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

from common import figures, segmentation
from common.datasets import SegmentationSet
from common.files import read_image
from common.figures import cell_block, framed, heat, in_colours, legend_of, thumbnail
from common.metrics import row_quantile
from common.regions import connected_components
from common.run import UserError, write_json
from common.scaleprotoseg_measures import explain_cell, moved_far, shrunk
from common.segmentation import labels_of_cells, network_input, resized
from common.survey import of_masks
from common.transforms import normalise


@dataclass
class Drawing:
    """A trained network with all that its figures need; to predict alone needs no images."""
    net: nn.Module
    cfg: object
    progress: dict                                       # its sources[p]: image, row, column of prototype p
    device: torch.device
    test: SegmentationSet = None
    source_images: SegmentationSet = None                # those that prototypes were projected to
    tiles: dict = field(default_factory=dict)            # {p: cells of prototype p}, see tile

    @property
    def classes(self):
        return self.progress["classes"]

    @cached_property
    def moved_far(self):
        return moved_far(self.progress["sources"])

    def class_of(self, p):
        return self.progress["prototype_class"][p]

    def scale_of(self, p):
        return self.progress["prototype_scale"][p]

    def file_name(self, c):
        return self.classes[c].replace(" ", "-").replace("/", "-")

    def input_of(self, image):
        """The network's input for an image uint8 (3,H,W) as it is tested -> (1,3,h,w)."""
        return network_input(image, self.cfg.test_size, self.cfg.test_square).to(self.device)

    def similarity(self, image, native=False):
        """Of an image uint8 (3,H,W) as it is tested, or in its own size -> (P,h,w)."""
        x = normalise(image)[None].to(self.device) if native else self.input_of(image)
        return self.net.similarity(x)[0]

    def predict(self, image):
        """uint8 (3,H,W) -> class ids (H,W) uint8 on the CPU."""
        x = self.input_of(image)
        windows = segmentation.in_windows(lambda x: self.net.final_logits(x, self.cfg), x, self.cfg.window)
        return segmentation.class_ids(windows, x.shape[2:], image.shape[1:])[0].to(torch.uint8).cpu()

    @torch.no_grad()
    def tile(self, p):
        """Cells (picture uint8 (3,h,w), caption) for save_grid, drawn when first asked for: the "patch" that
        prototype p is, enlarged, the image with it "boxed", the "heat" of p in this image."""
        if p not in self.tiles:
            i, *cell = self.progress["sources"][p][:3]
            image, mask = self.source_images.read(i)
            similarity = self.similarity(image, native=True)[p].cpu()                     # (h,w)
            box = region_box(similarity, cell, mask == self.class_of(p))
            patch = enlarged(image, box)
            rate = f", rate {self.cfg.rates[self.scale_of(p)]}" if self.cfg.method == "scaleprotoseg" else ""
            moved = f", moved far: {self.moved_far[p]:.1f}" if p in self.moved_far else ""
            caption = f"p{p}, {self.classes[self.class_of(p)]}{rate}{moved}"
            self.tiles[p] = dict(patch=(patch, caption), boxed=(framed(image, box), caption),
                                 heat=own_heat(image, similarity))
        return self.tiles[p]


# ---- pieces ----------------------------------------------------------------------------------------------

def region_box(similarity, cell, mask, margin=5):
    """y0, y1, x0, x1, ends exclusive, of what a map (h,w) points at around a cell, in pixels of mask (H,W):
    the region above the 95th percentile in the mask that touches the cell, and `margin` pixels (code)."""
    H, W = mask.shape
    values = resized(similarity[None, None], (H, W), "bicubic")[0, 0].cpu() * mask
    active = values > row_quantile(values.flatten()[None], 0.95)[0]
    y0, y1, x0, x1 = cell_block(cell, similarity.shape, (H, W))
    active[y0:y1, x0:x1] = True
    regions = torch.from_numpy(connected_components(active.to(torch.uint8).numpy()))
    y, x = (regions == regions[y0, x0]).nonzero().T
    return (max(int(y.min()) - margin, 0), min(int(y.max()) + 1 + margin, H),
            max(int(x.min()) - margin, 0), min(int(x.max()) + 1 + margin, W))


def enlarged(image, box):
    """What a box y0, y1, x0, x1 frames, with so much around it that it has the shape of the whole image
    (3,H,W): both fill the cell of a grid alike."""
    size = image.shape[1:]
    share = min(1, 1.2 * max((box[1] - box[0]) / size[0], (box[3] - box[2]) / size[1]))
    sides, frame = [], []
    for low, high, side in ((*box[:2], size[0]), (*box[2:], size[1])):
        length = round(share * side)
        start = min(max((low + high - length) // 2, 0), side - length)
        sides.append(slice(start, start + length))
        frame += [low - start, high - start]
    factor = max(1, 240 // (sides[1].stop - sides[1].start))
    patch = image[:, sides[0], sides[1]].repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return framed(patch, [factor * edge for edge in frame])


OWN_SCALE = {"similarity, each picture on a scale of its own": ("0", "the number below it, or more")}


def own_heat(image, similarity):
    """Cell: heat map up to the 99th percentile, as a single cell of 9.2 would leave all others grey."""
    most = float(row_quantile(similarity.flatten()[None], 0.99))
    return heat(image, similarity, most), f"similarity, 0 to {most:.1f}"


def exemplars(data, most=20):
    """{class id: number of the image that shows most of it}, for the `most` classes with the most pixels."""
    counts = torch.stack(list(of_masks(data.label_counts, data)))[:, :data.num_classes]   # (images,C)
    order = counts.sum(0).argsort(descending=True, stable=True)[:most].tolist()
    return {c: int(counts[:, c].argmax()) for c in sorted(order) if counts[:, c].any()}


def label_cells(image, name, label, prediction):
    """A row: image, label, prediction."""
    return [(thumbnail(image), name), (in_colours(image, label), "label"),
            (in_colours(image, prediction), "prediction")]


def value_of(values, cell):
    """A map's value at a cell, or its highest if no cell is given."""
    return float(values.max() if cell is None else values[tuple(cell)])


def group_rows(d, classes, image, similarity, most=3, cell=None, captions=None):
    """(rows, bars) for save_grid: activation of a group on an image, then the members that add most to its
    exponent. All groups share a colour scale, all members another. cell: give its numbers, not the highest
    ones. captions: {(name of a class, group): text}."""
    groups, num_groups = d.net.groups, d.cfg.groups
    activation = groups.activations(similarity[None], d.cfg.threshold)[0]                 # (C*G,h,w)
    members = {}                                         # of each group (prototype, weight), best first
    for c, g in itertools.product(classes, range(num_groups)):
        pairs = groups.members_of(c, g, d.cfg.threshold)
        members[c, g] = sorted(pairs, key=lambda pair: -pair[1] * value_of(similarity[pair[0]], cell))
    top = max(float(activation.unflatten(0, (-1, num_groups))[classes].max()), 1.01)
    shown = [p for pairs in members.values() for p, _ in pairs[:most]]
    top_member = max([float(similarity[p].max()) for p in shown], default=1.0)
    at_most = "at most " if cell is None else ""
    rows = []
    for (c, g), pairs in members.items():
        if g == 0 and len(classes) > 1:
            rows.append(f"Groups of {d.classes[c]}:")
        if groups.members[c, 0] < 0:
            rows += [f"{d.classes[c]} has no prototypes, so no groups."] * (g == 0)
            continue
        f = c * num_groups + g
        weight, value = float(groups.last_layer.weight[c, f]), value_of(activation[f], cell)
        text = f"group {g + 1}: {weight:.2f} x {at_most}{value:.1f} = {weight * value:.2f}"
        text = (captions or {}).get((d.classes[c], g), text)
        row = [(heat(image, activation[f].log(), math.log(top)), text)]
        for p, w in pairs[:most]:
            row += [d.tile(p)["patch"], (heat(image, similarity[p], top_member),
                    f"weight {w:.2f} x {at_most}{value_of(similarity[p], cell):.2f}")]
        if len(pairs) > most:
            picture, caption = row[-1]
            row[-1] = (picture, f"{caption}; {len(pairs) - most} more")
        rows.append(row)
    return rows, {"activation of a group, its logarithm": (0, math.log(top)),
                  "similarity to a member": (0, top_member)}


def prototype_rows(d, prototypes, image, similarity, cell=None, captions=None, most=3):
    """The same for ProtoSeg, which has no groups. prototypes: {class: its prototypes to show}."""
    shown = [p for of_class in prototypes.values() for p in of_class]
    top = max([float(similarity[p].max()) for p in shown], default=1.0)
    at_most = "at most " if cell is None else ""
    rows = []
    for c, of_class in prototypes.items():
        rows.append(f"Prototypes of {d.classes[c]}:" if of_class else f"{d.classes[c]} has no prototypes.")
        row = []
        for p in of_class:
            weight, value = float(d.net.last_layer.weight[c, p]), value_of(similarity[p], cell)
            text = f"{weight:.2f} x {at_most}{value:.2f} = {weight * value:.2f}"
            text = (captions or {}).get((d.classes[c], p), text)
            row += [d.tile(p)["patch"], (heat(image, similarity[p], top), text)]
        rows += [row[k:k + 2 * most] for k in range(0, len(row), 2 * most)]
    return rows, {"similarity to a prototype": (0, top)}


# ---- figures of a run ------------------------------------------------------------------------------------

@torch.no_grad()
def draw_figures(d, entries):
    """All figures of a run, in OUT/figures. entries: those of metrics.json."""
    d.net.eval()
    folder = Path(d.cfg.out) / "figures"
    segmentation.save_examples(folder / "examples.png", d.test,
                               lambda i, image, label: dict(label=label, prediction=d.predict(image)),
                               f"{d.cfg.test_split} images")
    draw_learning(folder / "learning.png", {d.cfg.method: d.progress})
    if d.cfg.method == "deeplab":
        return
    shown = exemplars(d.test)
    used = d.net.used(d.cfg.threshold).tolist()
    for c, i in shown.items():
        draw_prototypes(d, c, used, folder)
        if d.net.groups is not None:
            draw_groups(d, c, i, folder)
    draw_nearest_patches(d, shown, used, folder)
    draw_nearest_prototypes(d, folder)
    if entries.get("part_metrics"):
        draw_part_metrics(entries["part_metrics"], folder)
    if "equivariance" in entries:
        draw_equivariance(d, entries["equivariance"], folder)


def draw_learning(path, runs, most=6):
    """learning.png: val IoU of the classes with the fewest training pixels over iterations, of one run or of
    several beside each other. runs: {name: progress}."""
    progress = next(iter(runs.values()))
    classes, pixels = progress["classes"], progress["pixels"].tolist()
    rare = sorted((c for c in range(len(classes)) if pixels[c]), key=lambda c: pixels[c])[:most]
    shared = sorted(set.intersection(*(set(other.get("val_iou", {})) for other in runs.values())))
    panels = {}
    for name, other in runs.items():
        of_class = {classes[c]: [other["val_iou"][n][c] for n in shared] for c in rare}
        panels[name] = {key: values for key, values in of_class.items() if values and None not in values}
    if all(panels.values()):
        figures.save_panels(path, panels, shared, below="iterations over all phases",
                            title="When rare classes are learned: their IoU on val")


def draw_prototypes(d, c, used, folder):
    """prototypes-CLASS.png: a row for each scale; prototypes in their source images, their activations."""
    rows = []
    for s in range(len(d.cfg.rates)):
        row = []
        for p in range(len(used)):
            if (d.class_of(p), d.scale_of(p)) == (c, s):
                picture, caption = d.tile(p)["boxed"]
                row += [(picture, caption if used[p] else f"{caption} (no group)"), d.tile(p)["heat"]]
        rows += [row[k:k + 6] for k in range(0, len(row), 6)]
    if rows:
        figures.save_grid(folder / f"prototypes-{d.file_name(c)}.png", rows, cell=170, bars=OWN_SCALE,
                          title=f"Prototypes of {d.classes[c]}, a scale after the other: the patch of a "
                          "training image (framed) that each is, and how similar to it that image is")


def draw_groups(d, c, i, folder):
    """groups-CLASS.png (Fig. 11 to 13, 26): every group on the test image i, with its members."""
    image, mask = d.test.read(i)
    only = [torch.where(ids == c, ids, 255) for ids in (mask.long(), d.predict(image))]
    first = label_cells(image, d.test.name_of(i), *only)
    rows, bars = group_rows(d, [c], image, d.similarity(image))
    figures.save_grid(folder / f"groups-{d.file_name(c)}.png", [first, *rows], cell=160, bars=bars,
                      title=f"The groups of {d.classes[c]} in a {d.cfg.test_split} image: weight in the "
                      "logit x activation. Right of a group the members that add most: training patch "
                      "(framed), and where the image looks like it: weight in the group x similarity")


def draw_nearest_patches(d, shown, used, folder, most=3):
    """nearest_patches.png (Fig. 14 to 19): a prototype of each class, its nearest patches in test images."""
    chosen = []
    for c in shown:                                      # the heaviest in the groups, or the first
        weight = Counter({p: 0.0 for p in range(len(used)) if d.class_of(p) == c and used[p]})
        for g in range(d.cfg.groups if d.net.groups is not None else 0):
            weight.update(dict(d.net.groups.members_of(c, g, d.cfg.threshold)))
        chosen += [p for p, _ in weight.most_common(1)]
    if not chosen:
        return
    best = []                                            # of every image the highest similarities
    for i in tqdm(range(len(d.test)), desc="nearest patches", leave=False, disable=None):
        similarity = d.similarity(d.test.read(i)[0], native=True)
        best.append(similarity[chosen].flatten(1).amax(1).cpu())
    top = torch.stack(best).topk(min(most, len(best)), dim=0).indices                     # (most,classes)
    rows = []
    for k, p in enumerate(chosen):
        row = [d.tile(p)["boxed"], d.tile(p)["heat"]]
        for i in top[:, k].tolist():
            image, mask = d.test.read(i)
            s = d.similarity(image, native=True)[p].cpu()
            cell = divmod(int(s.argmax()), s.shape[1])
            label = int(labels_of_cells(mask, s.shape)[cell])
            box = region_box(s, cell, torch.ones_like(mask))             # anywhere in the image
            row += [(framed(image, box), "void" if label == 255 else f"on {d.classes[label]}"),
                    own_heat(image, s)]
        rows.append(row)
    figures.save_grid(folder / "nearest_patches.png", rows, cell=130, bars=OWN_SCALE,
                      title="Left: a prototype of each class (framed) in its training image. Right: what it "
                      f"is most similar to in the {d.cfg.test_split} images (framed), and of which class it "
                      "is (Fig. 14 to 19)")


def draw_nearest_prototypes(d, folder, images=2, patches=3):
    """nearest_prototypes-N.png (Fig. 20 to 25): random patches of an image, their nearest prototypes."""
    generator = torch.Generator().manual_seed(d.cfg.seed)
    used = d.net.used(d.cfg.threshold)
    for n in range(images):
        i = int(torch.randint(len(d.test), (), generator=generator))
        image, mask = d.test.read(i)
        similarity = d.similarity(image, native=True)    # (P,h,w)
        labels = labels_of_cells(mask, similarity.shape[1:])
        rows = []
        for _ in range(patches):
            cell = [int(torch.randint(side, (), generator=generator)) for side in labels.shape]
            of_cell = similarity[:, cell[0], cell[1]].masked_fill(~used, -1)
            label = int(labels[cell[0], cell[1]])
            row = [(framed(image, cell_block(cell, labels.shape, mask.shape)),
                    "void" if label == 255 else d.classes[label])]
            for p in of_cell.topk(min(3, int(used.sum()))).indices.tolist():
                box = region_box(similarity[p], cell, torch.ones_like(mask))                # anywhere
                row += [d.tile(p)["boxed"], (framed(image, box), f"similarity {of_cell[p]:.1f}")]
            rows.append(row)
        figures.save_grid(folder / f"nearest_prototypes-{n + 1}.png", rows, cell=150,
                          title=f"Left: random cells of {d.test.name_of(i)}. Right: the three prototypes "
                          "most similar to each, in their training images, and the region around the cell "
                          "that they light up (Fig. 20 to 25)")


def draw_part_metrics(curve, folder):
    """part_metrics.png: what prototypes know of parts, over the quantile above which a map is active."""
    names = dict(hit_rate="Hit rate: images in which a prototype lights up on its best part, mean",
                 consistency="Consistency: prototypes whose hit rate is above 80 %",
                 stability="Stability: parts that a prototype lights up on stay the same under noise")
    kinds = {"": "prototypes", "_ceiling": "true parts", "_chance": "random maps",
             "_empty": "no part lit, before nor after"}
    panels = {}
    for name, heading in names.items():
        rows = {text: [scores.get(name + kind) for scores in curve.values()] for kind, text in kinds.items()}
        panels[heading] = {text: row for text, row in rows.items() if None not in row}
    figures.save_panels(folder / "part_metrics.png", {text: rows for text, rows in panels.items() if rows},
                        [float(q) for q in curve],
                        below="quantile over the pixels of the class: above it a prototype's map is lit")


def draw_equivariance(d, ratios, folder, most=8):
    """equivariance.png (Fig. 7): the ratios. equivariant_pairs.png (Fig. 8 to 10): the best pairs."""
    names = dict(groups_to_learned_groups="groups / learned groups",
                 prototypes_in_groups="prototypes in a group", classes_with_groups="classes with a group")
    series = {f"active: above quantile {q}": [entry[name] for name in names] for q, entry in ratios.items()}
    figures.save_bars(folder / "equivariance.png", series, list(names.values()),
                      title="Prototypes of two scales that light up alike where the image is shrunk to make "
                      "up for the scale: quasi-equivariant (Fig. 7)")
    quantile = min(ratios)
    best = {}                                            # class -> its best pair
    for i, j, iou in ratios[quantile]["pairs"]:
        best.setdefault(d.class_of(i), (i, j, iou))
    rows = []
    for c, (i, j, iou) in list(best.items())[:most]:
        image, mask = d.source_images.read(d.progress["sources"][j][0])     # an image of the class
        row = []
        for p, other in ((i, j), (j, i)):
            factor = d.cfg.rates[d.scale_of(other)] / d.cfg.rates[0]        # see equivariance
            x = shrunk(normalise(image)[None], factor).to(d.device)
            s = resized(d.net.similarity(x)[:, [p]], mask.shape)[0, 0].cpu()
            active = (mask == c) & (s >= row_quantile(s[mask == c][None], float(quantile)))
            grey = (0.35 * image.float().mean(0) + 0.65 * torch.where(mask == c, 255, 110)).to(torch.uint8)
            row += [d.tile(p)["boxed"], (thumbnail(torch.where(active, image, grey)),
                                         f"seen in the image shrunk by {factor:g}")]
        row[3] = (row[3][0], f"{row[3][1]}; mean IoU of the pair {iou:.2f}")
        rows.append(row)
    if rows:
        figures.save_grid(folder / "equivariant_pairs.png", rows, cell=220,
                          title="Quasi-equivariant pairs (Fig. 8 to 10): two prototypes (framed), in colour "
                          f"the {100 - 100 * float(quantile):.0f} % of their class that each lights up "
                          "most, light grey the rest of it, dark grey other classes")


@torch.no_grad()
def draw_entropy(path, runs, most=6):
    """Fig. 6: groups of some classes without (left) and with the entropy loss; runs: {off, on: Drawing}."""
    data = runs["on"].test
    rows = []
    for c, i in list(exemplars(data).items())[-most:]:
        image, _ = data.read(i)
        row, maps = [(thumbnail(image), data.classes[c])], {}
        for name, d in runs.items():
            similarity = d.similarity(image, native=True)[None]
            activation = d.net.groups.activations(similarity, d.cfg.threshold)[0].log()
            maps[name] = activation.unflatten(0, (-1, d.cfg.groups))[c]                   # (G,h,w)
        top = max(float(of_class.max()) for of_class in maps.values())
        for name, of_class in maps.items():
            row += [(heat(image, s, top), f"entropy {name}, group {g}: up to {float(s.max()):.1f}")
                    for g, s in enumerate(of_class, 1)]
        rows.append(row)
    bars = {"logarithm of the activation, each row on a scale of its own": ("0", "the row's highest")}
    figures.save_grid(path, rows, cell=150, bars=bars,
                      title="Do the groups of a class look at different places? Without (off) and with (on) "
                      "the entropy loss (Fig. 6)")


# ---- why a pixel got its class, why a class is missed -----------------------------------------------------

@torch.no_grad()
def explain(d, baseline=None):
    """--explain IMAGE: OUT/explanations/NAME-CLASS.png and .json. Returns the numbers. baseline: another
    run, which tells of the same pixel and classes."""
    image, cfg, classes = read_image(Path(d.cfg.explain)), d.cfg, d.classes
    size, seen, found = image.shape[1:], [], []
    for one in [d, baseline] if baseline else [d]:
        similarity = one.similarity(image)               # (P,h,w)
        logits = one.net.logits(similarity[None], one.cfg.threshold)[0]                   # (C,h,w)
        if one is d:
            c, cell = class_and_cell(logits, size, cfg.class_, classes, cfg.pixel)
            other = rival_of(c, logits[:, cell[0], cell[1]], cfg.against, classes)
            y0, y1, x0, x1 = cell_block(cell, logits.shape[1:], size)
            pixel = (x0 + x1) // 2, (y0 + y1) // 2
        else:
            _, cell = class_and_cell(logits, size, "", classes, pixel)
        at_cell = logits[:, cell[0], cell[1]]
        numbers = {"class": classes[c], "against": classes[other], "x": pixel[0], "y": pixel[1],
                   "predicted": classes[int(at_cell.argmax())], "logit": float(at_cell[c])}
        found.append(numbers | explain_cell(one.net, similarity, c, other, cell, one.cfg.threshold))
        seen.append((one, similarity, logits, cell))
    name = f"{Path(cfg.explain).stem}-{d.file_name(c)}" + f"-not-{d.file_name(other)}" * bool(cfg.against)
    target = Path(cfg.out) / "explanations" / f"{name}.png"
    draw_explanation(target, image, seen, found, c, other)
    for (one, *_), numbers in zip(seen, found):
        print(f"{one.cfg.method}: {numbers['class']} at x {pixel[0]}, y {pixel[1]} (predicted: "
              f"{numbers['predicted']}): {in_words(numbers)[0]}; see {target}")
    explanation = found[0] | (dict(baseline=found[1]) if baseline else {})
    write_json(target.with_suffix(".json"), explanation)
    return explanation


def rounded(values, digits=2):
    """Numbers with so many digits that add up to the rounded sum: the largest remainders are rounded up."""
    scaled = [value * 10 ** digits for value in values]
    units = [math.floor(value) for value in scaled]
    by_remainder = sorted(range(len(units)), key=lambda k: units[k] - scaled[k])
    for k in by_remainder[:round(sum(scaled)) - sum(units)]:
        units[k] += 1
    return [unit / 10 ** digits for unit in units]


def strongest(parts, most=3):
    """The `most` parts of an explanation that add or take most, in the order in which they stand."""
    by_size = sorted(range(len(parts)), key=lambda k: -abs(parts[k]["contribution"]))
    return [parts[k] for k in sorted(by_size[:most])]


def in_words(numbers):
    """The sum that is the margin as a sentence, and a caption for each group (class, group) or prototype
    (class, prototype) in it: their printed numbers add up."""
    sides = {numbers["class"]: numbers["own"], numbers["against"]: numbers["rival"]}
    values = [part["contribution"] for parts in sides.values() for part in parts]
    values = iter(rounded([*values, numbers["others"], numbers["constant"]]))
    terms, captions = [], {}
    for name, parts in sides.items():
        rest = 0.0
        for part, value in [(part, next(values)) for part in parts]:
            key, seen = part.get("group", part.get("prototype")), f"{part['activation']:.2f}"
            label, seen = (f"group {key + 1}", f"({seen} - 1)") if "group" in part else (f"p{key}", seen)
            captions[name, key] = f"{label}: {value:+.2f} = {part['weight']:.2f} x {seen}"
            if part in strongest(parts):
                terms.append((value, f"{name} {label}"))
            else:
                rest += value
        if len(parts) > len(strongest(parts)):
            terms.append((rest, f"{len(parts) - len(strongest(parts))} more of {name}"))
    terms.append((next(values), "other classes"))
    if numbers["constant"]:                              # ProtoSeg has none
        terms.append((next(values), "constant"))
    own, rival = sides
    margin = round(sum(value for value, _ in terms), 2) + 0.0        # + 0.0: never "-0.00"
    return (f"logit of {own} - logit of {rival} = {margin:.2f} = "
            + " ".join(f"{round(value, 2) + 0.0:+.2f} ({label})" for value, label in terms)), captions


HOW_TO_READ = dict(
    scaleprotoseg=["A group adds (its weight for {0} - its weight for {1}) x (its activation - 1): nothing "
                   "where it sees nothing, as its activation is then 1. Constant: what is left if none sees "
                   "anything.",
                   "Right of a group the members that add most: training patch (framed), and where this "
                   "image looks like it. Weight x similarity of all members: logarithm of the activation."],
    protoseg=["A prototype adds (its weight for {0} - its weight for {1}) x its similarity at the pixel. "
              "Left its training patch (framed), right where this image looks like it."])


def draw_explanation(target, image, seen, found, c, other):
    """Why class c and not `other`, by one run or by two below each other: a picture at the path `target`.
    seen: (Drawing, similarity (P,h,w), logits (C,h,w), cell) of each run; found: its numbers."""
    rows, bars, predictions = [], {}, []
    for (d, similarity, logits, cell), numbers in zip(seen, found):
        name, rival, method = d.classes[c], d.classes[other], d.cfg.method
        which = f"{method} ({Path(d.cfg.out).name}): " if len(seen) > 1 else ""
        sentence, captions = in_words(numbers)
        predictions.append(d.predict(image))
        margin = logits[c] - logits[other]
        most, around = float(margin.abs().max()), image.shape[2] // 30
        y0, y1, x0, x1 = cell_block(cell, margin.shape, image.shape[1:])
        cells = [(framed(image, [y0 - around, y1 + around, x0 - around, x1 + around]), "the pixel"),
                 (in_colours(image, predictions[-1]), f"prediction (there: {numbers['predicted']})"),
                 (heat(image, margin, most), f"red: {name} is ahead of {rival}, blue: behind")]
        if d.net.groups is not None:
            more, scales = group_rows(d, [c, other], image, similarity, cell=cell, captions=captions)
        else:
            shown = {k: [part["prototype"] for part in strongest(numbers[side])]
                     for k, side in ((c, "own"), (other, "rival"))}
            more, scales = prototype_rows(d, shown, image, similarity, cell, captions)
        rows += [which + sentence, cells,
                 *(line.format(name, rival) for line in HOW_TO_READ[method]), *more]
        for text, ends in {f"logit of {name} - logit of {rival}": (-most, most), **scales}.items():
            bars[which + text] = ends
    one = found[0]
    better, worse = (name, rival) if one["margin"] >= 0 else (rival, name)
    figures.save_grid(target, rows, cell=170, legend=legend_of(d.classes, *predictions), bars=bars,
                      title=f"Why {better} and not {worse} at x {one['x']}, y {one['y']}? Predicted there: "
                      f"{one['predicted']}")


def class_id(name, classes, option):
    """The id of a class by its name; UserError if there is none."""
    if name not in classes:
        raise UserError(f"{option} {name}: this run knows no such class; it knows {', '.join(classes)}.")
    return classes.index(name)


def rival_of(c, logits, name, classes):
    """Id of the class that c is held against: --against NAME, else the highest but c of logits (C,)."""
    if not name:
        return int(logits.index_fill(0, torch.tensor([c], device=logits.device), -math.inf).argmax())
    other = class_id(name, classes, "--against")
    if other == c:
        raise UserError(f"--against {name}: that is the class which is explained; name another one.")
    return other


def class_and_cell(logits, size, name, classes, pixel):
    """Class id and cell (row, column) to explain, from --class NAME and --pixel X Y; both may be empty.

    logits (C,h,w) of an image of `size` (H,W). Without --pixel the cell where the logit of the class is
    highest; without --class the class predicted at the pixel, or the one that most cells have.
    """
    (H, W), (h, w) = size, logits.shape[1:]
    c = class_id(name, classes, "--class") if name else None
    if not pixel:
        c = int(torch.bincount(logits.argmax(0).flatten()).argmax()) if c is None else c
        return c, divmod(int(logits[c].argmax()), w)
    x, y = pixel
    if not (0 <= x < W and 0 <= y < H):
        raise UserError(f"--pixel {x} {y} lies outside the image, which is {W} x {H}: give x, y inside it.")
    cell = y * h // H, x * w // W
    return int(logits[:, cell[0], cell[1]].argmax()) if c is None else c, cell


@torch.no_grad()
def draw_failures(d, most=3):
    """OUT/failures/CLASS-N.png (Sec. 17): the test images with the most wrong pixels of --failure, missed or
    invented, among those with an IoU of the class below --failure-iou. Returns all of these, dicts."""
    c = class_id(d.cfg.failure, d.classes, "--failure")
    failures = []
    for i in tqdm(range(len(d.test)), desc="failures", leave=False, disable=None):
        image, mask = d.test.read(i)
        labelled = mask == c
        if not labelled.any():
            continue
        prediction = d.predict(image)
        predicted = (prediction == c) & (mask != 255)
        iou = float((labelled & predicted).sum() / (labelled | predicted).sum())
        if iou < d.cfg.failure_iou:
            others = torch.cat([prediction[labelled & ~predicted], mask[predicted & ~labelled]]).long()
            wrong = torch.bincount(others, minlength=d.test.num_classes)
            failures.append(dict(image=i, name=d.test.name_of(i), iou=iou, wrong=int(wrong.sum()),
                                 confused_with=int(wrong.argmax())))
    failures.sort(key=lambda failure: -failure["wrong"])
    if not failures:
        print(f"no {d.cfg.test_split} image with {d.classes[c]} has an IoU below {d.cfg.failure_iou:g}: "
              "raise it.")
    for n, failure in enumerate(failures[:most], 1):
        path = Path(d.cfg.out) / "failures" / f"{d.file_name(c)}-{n}.png"
        draw_failure(d, c, failure, path)
        print(f"{failure['name']}: IoU {100 * failure['iou']:.0f} %, confused with "
              f"{d.classes[failure['confused_with']]}; see {path}")
    return failures


def draw_failure(d, c, failure, path):
    """Fig. 27 to 35: label and prediction, then the groups (ProtoSeg: prototypes) of both classes."""
    image, mask = d.test.read(failure["image"])
    prediction = d.predict(image)
    similarity = d.similarity(image)
    both = [c, failure["confused_with"]]
    if d.net.groups is not None:
        rows, bars = group_rows(d, both, image, similarity, most=2)
    else:
        best = similarity.flatten(1).amax(1).argsort(descending=True, stable=True).tolist()
        shown = {k: [p for p in best if d.class_of(p) == k][:3] for k in both}
        rows, bars = prototype_rows(d, shown, image, similarity)
    figures.save_grid(path, [label_cells(image, failure["name"], mask, prediction), *rows], cell=170,
                      legend=legend_of(d.classes, mask, prediction), bars=bars,
                      title=f"{d.classes[c]}: IoU {100 * failure['iou']:.0f} %, most often confused with "
                      f"{d.classes[failure['confused_with']]} (Sec. 17). What of both classes is found, and "
                      "where: training patches (framed), weight x highest activation in the image")
