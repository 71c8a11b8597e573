"""Pictures of protopool.py: its prototypes, what classes share, the slots, focal similarity, an explanation.

The network comes in as `net`, the script's ProtoPool, and is asked by its methods: similarity_maps(x) gives
the similarity of every cell to every prototype, held() which class holds which prototype. The numbers of an
explanation come from the script. At the end of the file: what the prototypes see of every test image.
An image is a uint8 tensor (3,H,W); M prototypes, C classes with K slots each.
"""
from pathlib import Path

import torch
from tqdm import tqdm

from common import figures, metrics, run
from common.classification import clean_loader
from common.files import read_image
from common.images import network_input
from common.metrics import activation_box, activation_boxes
from common.run import UserError


def draw_run(net, sets, progress, names, explain, cfg, device):
    """OUT/figures/ of a run; returns what explain(image, name) says of three test images.

    explain: the script's explanation(). names: {prototype: part}, may be empty.
    """
    net.eval()
    folder = Path(cfg.out) / "figures"
    train_set, test_set, sources = sets["train"], sets["test"], progress["sources"]
    held = net.held().cpu()                                          # (C,M)
    portraits = [portrait(train_set, c) for c in range(train_set.num_classes)]
    patches = prototype_patches(net, train_set, sources, cfg, device)
    draw_prototypes(net, train_set, sources, held, names, patches, folder, cfg, device)
    draw_sharing(train_set.classes, held, patches, portraits, folder)
    draw_assignment(progress["soft"], progress["slot"], progress["classes"], folder)
    draw_focal(net, test_set, held, folder, cfg, device)
    explanations = []
    for k in range(3):
        i = (2 * k + 1) * len(test_set) // 6                         # spread over the split
        image, label = test_set.read(i)
        facts = explain(image, f"{test_set.name_of(i)}; label: {test_set.classes[label]}")
        maps = maps_of(net, image, cfg, device)
        draw_explanation(facts, image, maps, patches, folder / f"explanation-{k + 1}.png")
        explanations.append(facts)
    return explanations


# ---- prototypes as patches of training images ----

def maps_of(net, image, cfg, device):
    """Similarity of the cells of an image to all prototypes: (M,h,w) on the CPU."""
    return net.similarity_maps(network_input(image, cfg.size, device))[0].cpu()


def patch_of(image, similarity):
    """The part of an image where a map (h,w) is highest."""
    y0, y1, x0, x1 = activation_box(similarity, image.shape[1:])
    return image[:, y0:y1, x0:x1]


def portrait(data, c):
    """The first image of class c."""
    return data.read(data.labels.index(c))[0]


def prototype_patches(net, train_set, sources, cfg, device):
    """The patch that every prototype was projected onto: M images of any size. sources: M of Source."""
    patches = []
    for m, source in enumerate(sources):
        image, _ = train_set.read(source[0])
        patches.append(patch_of(image, maps_of(net, image, cfg, device)[m]))
    return patches


@torch.inference_mode()
def draw_prototypes(net, train_set, sources, held, names, patches, folder, cfg, device, page=20):
    """prototypes-NN.png: patch; box, heat map on its source; patches of the five nearest images, Supp. 9."""
    loader = clean_loader(train_set, cfg, device)
    nearest = torch.cat([net(x.to(device))[1].cpu() for x, _ in loader])           # (N,M) squared distances
    images = [source[0] for source in sources]
    nearest[images, list(range(len(images)))] = torch.inf            # the source has columns of its own
    near = nearest.topk(min(5, len(nearest) - 1), dim=0, largest=False).indices                  # (5,M)
    maps = {i: maps_of(net, train_set.read(i)[0], cfg, device) for i in {*images, *near.flatten().tolist()}}
    rows = []
    for m, i in enumerate(images):
        image, label = train_set.read(i)
        name = f"p{m}, {names[m]}" if names else f"p{m}"
        box = activation_box(maps[i][m], image.shape[1:])
        row = [(patches[m], f"{name}, in {int(held[:, m].sum())} classes"),
               (figures.draw_box(image, box), train_set.classes[label]),
               (figures.heatmap(image, maps[i][m]), f"similarity up to {maps[i][m].max():.2f}")]
        for j in near[:, m].tolist():
            other, label = train_set.read(j)
            row.append((patch_of(other, maps[j][m]), train_set.classes[label]))
        rows.append(row)
    for start in range(0, len(rows), page):
        title = "Prototypes: patch, box and activation; patches of the nearest training images"
        path = folder / f"prototypes-{start // page + 1:02d}.png"
        figures.save_grid(path, rows[start:start + page], cell=140, title=title)


# ---- what classes share ----

def draw_sharing(classes, held, patches, portraits, folder, page=12):
    """Fig. 7, 1, 8, 9, 13: which classes hold which prototypes. held bool (C,M); portraits: C images."""
    captions = [f"p{m}, in {count} classes" for m, count in enumerate(held.sum(0).tolist())]
    rows = []
    for c, name in enumerate(classes):
        members = held[c].nonzero().flatten().tolist()
        rows.append([(portraits[c], name)] + [(patches[m], captions[m]) for m in members])
    for start in range(0, len(rows), page):
        path = folder / f"classes-{start // page + 1:02d}.png"
        figures.save_grid(path, rows[start:start + page], cell=120,
                          title="Characteristics of the classes (Fig. 7)")
    graph = draw_class_graph({"": held}, classes, folder)
    if graph.any():
        a, b = divmod(int(graph.argmax()), len(classes))
        draw_pair(a, b, classes, held, patches, portraits, folder / "shared_pair.png")
    m = int(held.sum(0).argmax())
    holders = held[:, m].nonzero().flatten().tolist()
    cells = [(patches[m], f"p{m}")] + [(portraits[c], classes[c]) for c in holders]
    figures.save_grid(folder / "shared_prototype.png", [cells[k:k + 7] for k in range(0, len(cells), 7)],
                      cell=140, title=f"Prototype p{m} and the {len(holders)} classes that hold it (Fig. 8)")
    draw_counts({"prototypes": held}, folder / "classes_per_prototype.png")


def draw_class_graph(held_by, classes, folder):
    """Fig. 13: prototypes that two classes share, mean over runs: a matrix (C,C), returned, and edges.

    held_by: {run: held (C,M)}.
    """
    graphs = torch.stack([(held.float() @ held.float().T).fill_diagonal_(0) for held in held_by.values()])
    std, mean = torch.std_mean(graphs, 0, correction=0)              # (C,C)
    figures.save_matrix(folder / "class_graph.png", mean, classes, vmin=0, vmax=max(1.0, mean.max().item()),
                        title="Prototypes that two classes share (Fig. 13)")
    edges = []
    for a, b in mean.triu(1).nonzero().tolist():
        shared = [(held[a] & held[b]).nonzero().flatten().tolist() for held in held_by.values()]
        text = "; ".join(" ".join(f"p{m}" for m in members) for members in shared)
        edges.append(dict(class_a=classes[a], class_b=classes[b], shared=mean[a, b].item(),
                          std=std[a, b].item(), prototypes=text))
    nothing = dict(class_a="", class_b="", shared=0, std=0, prototypes="")
    run.write_csv(folder / "class_graph.csv", edges or [nothing])
    return mean


def draw_counts(held_by, path):
    """Fig. 9: how many prototypes are held by 1, 2, ... classes. held_by: {run: held (C,M)}."""
    counts = {}
    for name, held in held_by.items():
        counts[name] = torch.bincount(held.sum(0), minlength=len(held) + 1)[1:]
    most = 1 + max(int(count.nonzero().max()) for count in counts.values())
    figures.save_bars(path, {name: count[:most].tolist() for name, count in counts.items()},
                      [str(n + 1) for n in range(most)], unit="prototypes",
                      title="How many classes hold a prototype (Fig. 9)")


def draw_ensemble(held_by, classes, folder):
    """Fig. 9 and 13 of several runs. held_by: {run: held (C,M)}."""
    draw_counts(held_by, folder / "classes_per_prototype.png")
    draw_class_graph(held_by, classes, folder)


def draw_pair(a, b, classes, held, patches, portraits, path):
    """Fig. 1: the prototypes of class a alone, of both, and of class b alone."""
    groups = ((portraits[a], f"only {classes[a]}", held[a] & ~held[b]), (None, "both", held[a] & held[b]),
              (portraits[b], f"only {classes[b]}", held[b] & ~held[a]))
    rows = []
    for image, caption, members in groups:
        first = None if image is None else (image, caption)
        row = [first] + [(patches[m], f"p{m}, {caption}") for m in members.nonzero().flatten().tolist()]
        if any(row):
            rows.append(row)
    figures.save_grid(path, rows, cell=140,
                      title=f"{classes[a]} and {classes[b]}: own and shared prototypes (Fig. 1)")


def compare(net, train_set, sources, cfg, device):
    """draw_pair for the two classes that --compare names: OUT/figures/pair-A-B.png; UserError for others."""
    classes = train_set.classes
    if len(cfg.compare) != 2 or len({*cfg.compare} & {*classes}) != 2:
        given, known = " ".join(map(repr, cfg.compare)), ", ".join(classes[:20])
        raise UserError(f"--compare {given}: give two class names of the run, quoted if they hold blanks: "
                        f"{known}{' ...' if len(classes) > 20 else ''}.")
    a, b = (classes.index(name) for name in cfg.compare)
    name = f"pair-{classes[a]}-{classes[b]}.png".replace(" ", "_").replace("/", "_")
    path = Path(cfg.out) / "figures" / name
    patches = prototype_patches(net, train_set, sources, cfg, device)
    portraits = {c: portrait(train_set, c) for c in (a, b)}
    draw_pair(a, b, classes, net.held().cpu(), patches, portraits, path)
    print(f"drawn to {path}")


# ---- slots, focal similarity ----

def draw_assignment(soft, slot, classes, folder):
    """Fig. 14, 15, 5: the distributions of the slots at the end of training, and one slot over time.

    soft (C,K,M) with all prototypes of the pool; slot: list of M values for every epoch.
    """
    order = torch.randperm(len(soft), generator=torch.Generator().manual_seed(0))
    chosen = order[:10].sort().values.tolist()
    columns = [f"{classes[c]} {k}" for c in chosen for k in range(soft.shape[1])]
    title = f"Slots of {len(chosen)} classes before they are fixed; rows: prototypes (Fig. 14)"
    figures.save_matrix(folder / "assignment.png", soft[chosen].flatten(0, 1).T,
                        [str(m) for m in range(soft.shape[2])], columns, vmin=0, vmax=1, title=title)
    figures.save_histogram(folder / "assignment_histogram.png", {"y": soft.flatten()}, low=0, high=1,
                           log=True, title="Values of the slots' distributions (Fig. 15)")
    if slot:
        slot = torch.tensor(slot)                                    # (epochs,M)
        times = {"start": 0, "middle": len(slot) // 2, "end": len(slot) - 1}
        likely = slot.amax(0).topk(min(12, slot.shape[1])).indices.sort().values
        figures.save_bars(folder / "slot_over_time.png",
                          {f"{name}: epoch {e + 1}": slot[e, likely].tolist() for name, e in times.items()},
                          [str(m) for m in likely.tolist()], unit="probability",
                          title=f"Slot 0 of {classes[0]}: its most likely prototypes of the pool (Fig. 5)")


@torch.inference_mode()
def draw_focal(net, data, held, folder, cfg, device, most=1000):
    """Fig. 2, 4: maximum and mean of a map on five images; Fig. 17: similarities minus the mean and not."""
    count = min(most, len(data))
    chosen = [k * len(data) // count for k in range(count)]          # spread over the split
    shown = [chosen[k * count // 5] for k in range(5)]
    rows, focal, maximum = [], [], []
    for i in tqdm(chosen, desc="focal", leave=False, disable=None):
        image, label = data.read(i)
        maps = maps_of(net, image, cfg, device)                      # (M,h,w)
        highest = maps.flatten(1).amax(1)                            # (M,)
        maximum.append(highest)
        focal.append(highest - maps.flatten(1).mean(1))              # Eq. (1)
        if i in shown and held[label].any():
            m = int(focal[-1].masked_fill(~held[label], -1).argmax())              # strongest of its class
            best, mean = maps[m].max(), maps[m].mean()
            rows.append([(image, data.classes[label]),
                         (figures.heatmap(image, maps[m], opacity=1.0), f"p{m}"),
                         (figures.heatmap(image, maps[m]),
                          f"max {best:.2f} - mean {mean:.2f} = {best - mean:.2f}")])
    figures.save_grid(folder / "focal.png", rows, cell=200, title="The strongest own prototype (Fig. 2, 4)")
    figures.save_histogram(folder / "focal_histogram.png",
                           {"focal": torch.cat(focal), "max only": torch.cat(maximum)},
                           title=f"Similarity of {count} test images to all prototypes (Fig. 17)")


# ---- explanations, and what the boxes of prototypes hold ----

def explain_files(paths, net, sets, progress, explain, cfg, device):
    """OUT/explanations/NAME.png (Fig. 6), NAME.json and a line for every file. explain: see draw_run."""
    patches = prototype_patches(net, sets["train"], progress["sources"], cfg, device)
    for path in paths:
        image = read_image(path)
        facts = explain(image, path.name)
        stem = Path(cfg.out) / "explanations" / path.stem
        draw_explanation(facts, image, maps_of(net, image, cfg, device), patches, f"{stem}.png")
        run.write_json(f"{stem}.json", facts)
        terms = " + ".join(f"{term['product']:.2f} (p{term['prototype']})" for term in facts["slots"])
        print(f"{path}: {facts['prediction']} ({100 * facts['probability']:.0f} %) because {terms} + rest "
              f"{facts['rest']:.2f} = {facts['logit']:.2f} -> {stem}.png")


def draw_explanation(facts, image, maps, patches, path):
    """Fig. 6: the image, and a row for every term of its logit. facts: see draw_run; maps (M,h,w)."""
    rows = [[(image, facts["image"]),
             (image, f"prediction: {facts['prediction']} ({100 * facts['probability']:.0f} %)")]]
    terms = facts["slots"]
    brightest = max([maps[term["prototype"]].max().item() for term in terms], default=1.0)   # of all maps
    for term in terms:
        m = term["prototype"]
        box = activation_box(maps[m], image.shape[1:])
        rows.append([(patches[m], f"prototype p{m}"), (figures.draw_box(image, box), "looks like this part"),
                     (figures.heatmap(image, maps[m], vmin=0, vmax=brightest),
                      f"{term['similarity']:.2f} x {term['weight']:.2f} = {term['product']:.2f}")])
    title = (f"Why {facts['prediction']}? own slots {facts['own']:.2f} + rest {facts['rest']:.2f} = "
             f"logit {facts['logit']:.2f}")
    figures.save_grid(path, rows, cell=180, title=title)


@torch.inference_mode()
def observe(net, data, own, size, device, noise=0.2):
    """Every image of a split as the prototypes see it, in pixels of the network's input, on the CPU.

    own (N,M) bool: prototypes of the image's class. Returns similarities g_p (N,M), activation boxes
    (N,M,4), the boxes of the own prototypes on the noisy image (N,M,4), parts (N,P,3): x, y, visible.
    """
    generator = torch.Generator().manual_seed(0)
    similarity, boxes, noisy, points = [], [], [], []
    for i in tqdm(range(len(data)), desc="parts", leave=False, disable=None):
        image, _ = data.read(i)
        x = network_input(image, size, device)
        x = torch.cat([x, x + noise * torch.randn(x.shape, generator=generator).to(device)])
        clean, disturbed = net.similarity_maps(x)                    # (M,h,w) each
        peaks, means = clean.flatten(1).amax(1), clean.flatten(1).mean(1)
        similarity.append((peaks - means if net.focal else peaks).cpu())
        boxes.append(activation_boxes(clean, (size, size)).cpu())
        noisy.append(torch.zeros_like(boxes[-1]))
        if own[i].any():
            noisy[-1][own[i]] = activation_boxes(disturbed[own[i].to(device)], (size, size)).cpu()
        scale = torch.tensor([size / image.shape[2], size / image.shape[1], 1])
        points.append(data.part_locations(i) * scale)
    return [torch.stack(part) for part in (similarity, boxes, noisy, points)]


def truth_metrics(net, data, size, device):
    """Is the explanation true? Does a prototype's box hold the same part again, where parts are annotated?

    -> numbers of common/metrics.py, and {prototype: "part share"}; two empty dicts without parts.
    """
    if not data.part_names:
        return {}, {}
    labels, held = torch.tensor(data.labels), net.held().cpu()       # (N,), (C,M)
    similarity, boxes, noisy, points = observe(net, data, held[labels], size, device)
    inside, result = metrics.part_truth(boxes, noisy, points, similarity, held[labels], size)      # (N,M,P)
    if data.variants is not None:
        variants = torch.as_tensor(data.variants)                    # (C,P)
        result |= metrics.variant_truth(inside, similarity, labels, held, variants)
    best, part = metrics.part_shares(inside, similarity).max(1)      # (M,)
    names = [f"{data.part_names[p]} {100 * share:.0f} %" for p, share in zip(part.tolist(), best.tolist())]
    return result, dict(enumerate(names))
