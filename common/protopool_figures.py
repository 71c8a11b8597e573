"""Pictures of protopool.py: its prototypes, what classes share, the slots, focal similarity, an explanation;
and what a checkpoint keeps for them: the patches of the prototypes, a film of the slots.

`net` is the script's ProtoPool and is asked by its methods: similarity_maps(x) gives the similarity of every
cell to every prototype, held() which class holds which prototype. An image is uint8 (3,H,W); there are M
prototypes and C classes with K slots each. At the end: what the prototypes see of every test image.
"""
from pathlib import Path

import torch
from torch.utils.data import BatchSampler
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from common import figures, metrics, run
from common.classification import clean_loader, open_splits
from common.files import read_image, some_of
from common.images import CleanView, network_input
from common.loaders import make_loader, to_device
from common.metrics import activation_box, activation_boxes
from common.run import UserError
from common.tables import row_configs


FALSE = "Red frame: a false slot. The class lacks what most of the prototype's ten nearest test images show."


def draw_run(net, sets, progress, names, true, explain, cfg):
    """OUT/figures/ of a run. names: {prototype: the part that it shows}, may be empty; true: see
    truth_metrics. explain(image, name): the script's explanation(). Returns what it tells of three test
    images."""
    net.eval()
    folder = Path(cfg.out) / "figures"
    test_set, sources = sets["test"], progress["sources"]
    held = net.held().cpu()                                          # (C,M)
    draw_prototypes(net, sets, sources, held, names, folder, cfg)
    draw_sharing(sets["train"], held, sources, net.hard_assignment().cpu(), true, folder)
    draw_assignment(progress["soft"], progress["classes"], folder)
    draw_film(progress["film"]["frames"], progress["soft"], progress["classes"], folder)
    draw_focal(net, test_set, held, folder, cfg.size)
    explanations = []
    for k in (1, 2, 3):
        i = (2 * k - 1) * len(test_set) // 6                         # spread over the split
        image, label = test_set.read(i)
        facts = explain(image, f"{test_set.name_of(i)}; label: {test_set.classes[label]}")
        draw_explanation(facts, image, net, sources, progress["classes"], cfg.size,
                         folder / f"explanation-{k}.png", true)
        explanations.append(facts)
    return explanations


def save_pages(folder, name, rows, page, cell, title, heads, lines=2):
    """Grids of at most `page` rows below the heads of the columns: NAME-01.png, NAME-02.png, ..."""
    for start in range(0, len(rows), page):
        path = folder / f"{name}-{start // page + 1:02d}.png"
        figures.save_grid(path, [*heads, *rows[start:start + page]], cell=cell, title=title, lines=lines)


# ---- prototypes as patches of training images ----

def maps_of(net, image, size):
    """Similarity of the cells of an image, resized to size x size, to all prototypes: (M,h,w) on the CPU."""
    return net.similarity_maps(network_input(image, size, net.prototypes.device))[0].cpu()


def copy_for_drawing(image, most=1024):
    """The image (3,H,W), or a copy of at most so many pixels a side: a photo of 80 megapixels is slow."""
    factor = most / max(image.shape[1:])
    if factor >= 1:
        return image
    return resize(image, [max(1, round(factor * side)) for side in image.shape[1:]])


def patch_of(image, similarity):
    """The part of an image where a map (h,w) is highest."""
    y0, y1, x0, x1 = activation_box(similarity, image.shape[1:])
    return image[:, y0:y1, x0:x1]


def portrait(data, c):
    """The first image of class c."""
    return data.read(data.labels.index(c))[0]


@torch.no_grad()
def keep_sources(net, train_set, sources, size):
    """What a checkpoint keeps of the M sources of project_prototypes, so that an explanation shows the right
    patch whatever becomes of the training images: a list of dicts of image (its id), label, row, column,
    distance, and patch, uint8 (3,H,W) of any size."""
    kept = []
    for m, (i, row, column, distance) in enumerate(sources):
        image, label = train_set.read(i)
        patch = patch_of(copy_for_drawing(image), maps_of(net, image, size)[m])
        kept.append(dict(image=train_set.id_of(i), label=label, row=row, column=column, distance=distance,
                         patch=copy_for_drawing(patch, 256).clone()))
    return kept


def places_of(sources, sets, data):
    """Where the sources' images are today, found by name: M of (ImageSet, number). A new image in a class's
    folder may also move one from train to val. data: --data. UserError: an image is gone."""
    places = {name: (images, i) for images in (sets["val"], sets["train"])
              for i, name in enumerate(images.ids())}
    for m, source in enumerate(sources):
        if source["image"] not in places:
            raise UserError(f"the training image {source['image']}, which prototype p{m} is a patch of, is "
                            f"not in --data {data} any more: put it back, or train again.")
    return [places[source["image"]] for source in sources]


def image_of(source, classes):
    """The name of a source's image, which need not begin with that of its class, and the class."""
    name, label = Path(source["image"]).stem, classes[source["label"]]
    prefix = label.replace(" ", "_").lower() + "_"
    return f"{name[len(prefix):] if name.lower().startswith(prefix) else name} ({label})"


def origin(m, sources, classes):
    """Which patch a prototype is, in words."""
    return f"p{m}: patch of {image_of(sources[m], classes)}"


def told(m, sources, held, classes, c, most=3):
    """origin(), and which classes besides c hold the prototype, in words."""
    others = [classes[k] for k in held[:, m].nonzero().flatten().tolist() if k != c]
    shared = f"shared with {some_of(others, most)}" if others else "not shared"
    return f"{origin(m, sources, classes)}, {shared}"


def framed(patch, is_true):
    """The patch, in a red frame if it is false."""
    width = 0 if is_true else max(1, patch.shape[2] // 25)
    red = torch.tensor([220, 0, 0], dtype=torch.uint8)[:, None, None]
    whole = red.repeat(1, patch.shape[1] + 2 * width, patch.shape[2] + 2 * width)
    whole[:, width:width + patch.shape[1], width:width + patch.shape[2]] = patch
    return whole


@torch.inference_mode()
def draw_prototypes(net, sets, sources, held, names, folder, cfg):
    """prototypes-NN.png: patch; box and heat map on its source; patches of five nearest images (Supp. 9)."""
    device, train_set = net.prototypes.device, sets["train"]
    places = places_of(sources, sets, cfg.data)
    loader = clean_loader(train_set, cfg, device)
    d2 = torch.cat([net(x.to(device))[1].cpu() for x, _ in loader])  # (N,M)
    for m, (data, i) in enumerate(places):
        if data is train_set:
            d2[i, m] = torch.inf                                     # the source has columns of its own
    near = d2.topk(min(5, len(d2) - 1), dim=0, largest=False).indices              # (5,M)
    rows = []
    for m, (data, i) in enumerate(places):
        image = data.read(i)[0]
        similarity = maps_of(net, image, cfg.size)[m]                # (h,w)
        image = copy_for_drawing(image)
        name = f"p{m}, {names[m]}" if names else f"p{m}"
        box = activation_box(similarity, image.shape[1:])
        row = [(sources[m]["patch"], f"{name}, held by {held[:, m].sum()} of {len(held)} classes"),
               (figures.draw_box(image, box), image_of(sources[m], train_set.classes)),
               (figures.heatmap(image, similarity), f"similarity up to {similarity.max():.2f}")]
        for j in near[:, m].tolist():
            other, label = train_set.read(j)
            patch = patch_of(copy_for_drawing(other), maps_of(net, other, cfg.size)[m])
            row.append((patch, train_set.classes[label]))
        rows.append(row)
    save_pages(folder, "prototypes", rows, 15, 140, "Prototypes, and the training images nearest to them",
               [["patch", "its source", "activation", *(f"nearest {k + 1}" for k in range(len(near)))]])


# ---- what classes share ----

def draw_sharing(train_set, held, sources, slots, true, folder):
    """Fig. 7, 1, 8, 9, 13: which classes hold which prototypes. held bool (C,M); slots (C,K,M) of 0 and 1;
    true: see truth_metrics."""
    classes, rows = train_set.classes, []
    portraits = [portrait(train_set, c) for c in range(len(classes))]
    for c, name in enumerate(classes):
        row = [(portraits[c], name)]
        for slot in slots[c]:                                        # (M,)
            m = int(slot.argmax())
            patch = framed(sources[m]["patch"], true is None or true[c, m])
            row.append((patch, told(m, sources, held, classes, c)) if slot.any() else "empty")
        rows.append(row)
    heads = ["class", *(f"slot {k}" for k in range(slots.shape[1]))]
    save_pages(folder, "classes", rows, 12, 130, "Characteristics of the classes (Fig. 7)",
               [heads] if true is None else [FALSE, heads], lines=5)
    graph = draw_class_graph({"": held}, classes, folder, train_set.variants)
    if graph.any():
        a, b = divmod(int(graph.argmax()), len(classes))
        draw_pair(a, b, train_set, held, sources, folder / "shared_pair.png")
    m = int(held.sum(0).argmax())
    holders = held[:, m].nonzero().flatten().tolist()
    cells = [(sources[m]["patch"], origin(m, sources, classes))]
    cells += [(portraits[c], classes[c]) for c in holders]
    figures.save_grid(folder / "shared_prototype.png", [cells[k:k + 7] for k in range(0, len(cells), 7)],
                      cell=140, lines=3,
                      title=f"Prototype p{m} and the {len(holders)} classes that hold it (Fig. 8)")
    draw_counts({"prototypes": held}, folder / "classes_per_prototype.png")


def draw_class_graph(held_by, classes, folder, variants=None):
    """Fig. 13: prototypes that two classes share, mean over runs: a matrix (C,C), returned, and edges.
    held_by: {run: held (C,M)}. Beside it how many variants of parts they share, if those are known (C,P)."""
    graphs = torch.stack([(held.float() @ held.float().T).fill_diagonal_(0) for held in held_by.values()])
    std, mean = torch.std_mean(graphs, 0, correction=0)              # (C,C)
    matrices = {"prototypes in common": mean}
    if variants is not None:
        variants = torch.as_tensor(variants)
        alike = (variants[:, None] == variants).sum(2).float().fill_diagonal_(0)   # (C,C)
        matrices["variants of parts in common: the truth"] = alike
    figures.save_matrices(folder / "class_graph.png", matrices, classes, vmin=0,
                          vmax=max(1.0, *(matrix.max().item() for matrix in matrices.values())),
                          title="What two classes share (Fig. 13)")
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
    """Fig. 9: how many prototypes are held by 1, 2, ... classes. held_by: {run: held (C,M)}; of several runs
    also mean and sample deviation."""
    holders = {name: held.sum(0) for name, held in held_by.items()}                # (M,) classes a prototype
    most = max(int(counts.max()) for counts in holders.values())
    bars = {name: counts.bincount(minlength=most + 1)[1:].tolist() for name, counts in holders.items()}
    around = {}
    if len(bars) > 1:
        std, mean = torch.std_mean(torch.tensor(list(bars.values())).float(), 0)   # (most,)
        bars["mean +- deviation"], around["mean +- deviation"] = mean.tolist(), std.tolist()
    figures.save_bars(path, bars, [str(n) for n in range(1, most + 1)], unit="prototypes", deviations=around,
                      title="How many classes hold a prototype (Fig. 9)")


def draw_pair(a, b, train_set, held, sources, path):
    """Fig. 1: the prototypes of class a alone, of both, and of class b alone."""
    classes = train_set.classes
    shared = held[a] & held[b]                                       # (M,)
    groups = (((portrait(train_set, a), f"only {classes[a]}"), f"only {classes[a]}", held[a] & ~shared),
              (None, "both", shared),
              ((portrait(train_set, b), f"only {classes[b]}"), f"only {classes[b]}", held[b] & ~shared))
    rows = []
    for first, caption, members in groups:
        row = [first] + [(sources[m]["patch"], f"p{m}, {caption}")
                         for m in members.nonzero().flatten().tolist()]
        if any(row):
            rows.append(row)
    figures.save_grid(path, rows, cell=140,
                      title=f"{classes[a]} and {classes[b]}: own and shared prototypes (Fig. 1)")


def compare(net, train_set, sources, cfg):
    """draw_pair for the two classes that --compare names: OUT/figures/pair-A-B.png; UserError for others."""
    classes = train_set.classes
    if len(cfg.compare) != 2 or len({*cfg.compare} & {*classes}) != 2:
        known = ", ".join(classes[:20]) + (" ..." if len(classes) > 20 else "")
        raise UserError(f"--compare {' '.join(map(repr, cfg.compare))}: give two different class names, "
                        f"quoted if they hold blanks: {known}.")
    name = f"pair-{'-'.join(cfg.compare)}.png".replace(" ", "_").replace("/", "_")
    path = Path(cfg.out) / "figures" / name
    a, b = map(classes.index, cfg.compare)
    draw_pair(a, b, train_set, net.held().cpu(), sources, path)
    print(f"drawn to {path}")


# ---- slots: a film of learning, kept in progress["film"] ----

def new_film():
    """step: how many were made; frames: dict(step, epoch, y (k,M)) of at most 4 slots of the first class."""
    return dict(step=0, frames=[])


@torch.no_grad()
def film(net, progress, phase, tau):
    """Called before every step up to the projection: one more frame where a fifth more steps were made than
    at the last (0, 1, 2, ... 10, 12, 15, ...; 62 in 157,000 steps)."""
    if not hasattr(net, "q"):                                        # a plain classifier
        return
    kept = progress["film"]
    frames = kept["frames"]
    if not frames:
        kept["chosen"] = net.q.argmax(-1).cpu()                      # (C,K)
    if not frames or kept["step"] >= 1.2 * frames[-1]["step"]:
        frames.append(dict(step=kept["step"], epoch=f"{phase} {progress['epoch'] + 1}",
                           y=net.soft_assignment(tau)[0, :4].cpu()))
    kept["step"] += 1


def slots_changed(net, progress):
    """How many slots prefer another prototype (argmax of q) than after the epoch before; "" in phases
    without slots that learn."""
    if "chosen" not in progress["film"] or net.fixed:
        return ""
    before, progress["film"]["chosen"] = progress["film"]["chosen"], net.q.argmax(-1).cpu()
    return int((progress["film"]["chosen"] != before).sum())


def renumber(alive, film):
    """The order in which prototypes get new numbers at the projection, (M,): those alive (M,) first, as rows
    of net.prototypes, then those that are pruned. The film gets them too."""
    order = torch.cat([alive.nonzero(), (~alive).nonzero()]).flatten()
    for frame in film["frames"]:
        frame["y"] = frame["y"][:, order]
    return order


def draw_film(frames, soft, classes, folder, most=6):
    """slots_over_time.png: probabilities in some slots, step by step (columns) up to the weights that are
    projected; slot_over_time.png (Fig. 5): one slot at the start, where its choice is half made,
    and at the end. frames: see new_film; soft (C,K,M)."""
    if not frames:
        return
    names = [f"{frame['epoch']}, step {frame['step']}" for frame in frames] + ["projected"]
    y = torch.stack([frame["y"] for frame in frames] + [soft[0, :len(frames[0]["y"])]])         # (T,k,M)
    rows, labels = [], []
    for k in range(y.shape[1]):
        for m in y[:, k].amax(0).topk(min(most, y.shape[2])).indices.sort().values.tolist():
            rows.append(y[:, k, m])
            labels.append(f"slot {k}: p{m}")
    figures.save_matrix(folder / "slots_over_time.png", torch.stack(rows), labels, names, vmin=0, vmax=1,
                        title=f"{classes[0]}: the most likely prototypes of its slots while it learns")
    slot = y[:, 0]                                                   # (T,M)
    winner = slot[:, slot[-1].argmax()]                              # (T,) of the one chosen in the end
    middle = int((winner - (winner[0] + winner[-1]) / 2).abs().argmin())
    likely = slot.amax(0).topk(min(12, slot.shape[1])).indices.sort().values
    series = {f"{name}: {names[t]}": slot[t, likely].tolist()
              for name, t in (("start", 0), ("half-way", middle), ("end", len(slot) - 1))}
    figures.save_bars(folder / "slot_over_time.png", series, [f"p{m}" for m in likely.tolist()],
                      unit="probability",
                      title=f"Slot 0 of {classes[0]}: its most likely prototypes of the pool (Fig. 5)")


def some_slots(soft, classes):
    """All slots of ten classes drawn by chance: (M,10 K), and their names. soft (C,K,M)."""
    order = torch.randperm(len(soft), generator=torch.Generator().manual_seed(0))
    chosen = order[:10].sort().values.tolist()
    return soft[chosen].flatten(0, 1).T, [f"{classes[c]} {k}" for c in chosen for k in range(soft.shape[1])]


def draw_assignment(soft, classes, folder):
    """Fig. 14, 15: the distributions of the slots at the end of training. soft (C,K,M) with all prototypes
    of the pool: those that were pruned come last."""
    matrix, columns = some_slots(soft, classes)
    count = len(columns) // soft.shape[1]
    title = f"Slots of {count} classes before they are fixed; rows: prototypes (Fig. 14)"
    figures.save_matrix(folder / "assignment.png", matrix, [f"p{m}" for m in range(soft.shape[2])], columns,
                        vmin=0, vmax=1, title=title)
    figures.save_histogram(folder / "assignment_histogram.png", {"y": soft.flatten()}, low=0, high=1,
                           log=True, title="Values of the slots' distributions (Fig. 15)")


# ---- figures of tables ----

def draw_table(table, results, load, cfg):
    """OUT/figureN.png: Fig. 11 as a curve; Fig. 14, 15, 2 and 17 from the rows of Table 4 (first seed).
    load(cfg): network and progress of a run."""
    if cfg.table in ("11a", "11b"):
        option = "prototypes" if cfg.table == "11a" else "slots"
        draw_sizes(results, {name: row[option] for name, row in table.rows.items()}, option, cfg)
    if cfg.table == "4":
        runs = {name: load(next(row_configs(name, row, cfg))) for name, row in table.rows.items()}
        test_set = open_splits(cfg)["test"]
        draw_settings({name: progress["soft"] for name, (net, progress) in runs.items() if net.focal},
                      test_set.classes, cfg.out)
        draw_against_maximum(runs["ProtoPool"][0], runs["w/o focal similarity"][0], test_set, cfg.size,
                             cfg.out)


def draw_settings(softs, classes, out):
    """--table 4: Fig. 14 and 15 of several settings side by side. softs: {setting: (C,K,M)}."""
    drawn = {name: some_slots(soft, classes) for name, soft in softs.items()}
    columns = next(iter(drawn.values()))[1]
    rows = [f"p{m}" for m in range(next(iter(softs.values())).shape[2])]
    figures.save_matrices(Path(out) / "figure14.png", {name: matrix for name, (matrix, _) in drawn.items()},
                          rows, columns, vmin=0, vmax=1,
                          title="Slots before they are fixed; rows: prototypes (Fig. 14)")
    figures.save_histogram(Path(out) / "figure15.png", softs, low=0, high=1, log=True,
                           title="Values of the slots' distributions (Fig. 15)")


def draw_sizes(results, sizes, option, cfg):
    """Fig. 11: accuracy against the number of prototypes or slots. results: {row: [metrics, one a seed]};
    sizes: {row: number}."""
    rates = [[metrics["accuracy"] for metrics in results[name]] for name in sizes]
    rates = torch.tensor(rates)                                      # (n,seeds)
    series, around = {"test accuracy": rates.mean(1).tolist()}, {}
    title = f"Accuracy by the number of {option} (Fig. 11)"
    if cfg.seeds > 1:
        around = {"test accuracy": rates.std(1).tolist()}
        title += f": mean +- deviation of {cfg.seeds} runs"
    figures.save_curves(Path(cfg.out) / f"figure{cfg.table}.png", series, list(sizes.values()), title=title,
                        below=option, deviations=around)


@torch.inference_mode()
def draw_against_maximum(focal, maximum, data, size, out, most=1000):
    """--table 4: Fig. 2 and 17, a network trained with focal similarity against one trained with the maximum
    alone: where their strongest own prototype lights up, and how similar images are to all prototypes."""
    rows, similarities = [["image", "focal similarity", "maximum alone"]], {}
    for i in of_five_classes(data):
        image, label = data.read(i)
        row = [(copy_for_drawing(image), data.classes[label])]
        for net in (focal, maximum):
            own = net.held()[label].cpu()                            # (M,)
            maps = maps_of(net, image, size)                         # (M,h,w)
            if own.any():
                m = int(score(maps, net.focal).masked_fill(~own, -1).argmax())
                row.append((figures.heatmap(copy_for_drawing(image), maps[m]),
                            f"p{m}: at most {maps[m].max():.2f}, mean {maps[m].mean():.2f}"))
        rows.append(row)
    figures.save_grid(Path(out) / "figure2.png", rows, cell=200, title="Strongest own prototype (Fig. 2)")
    count = min(most, len(data))
    for name, net in (("focal similarity", focal), ("maximum alone, also in training", maximum)):
        images = (data.read(k * len(data) // count)[0] for k in range(count))
        similarities[name] = torch.cat([score(maps_of(net, image, size), net.focal) for image in images])
    figures.save_histogram(Path(out) / "figure17.png", similarities,
                           title=f"Similarity of {count} test images to all prototypes (Fig. 17)")


# ---- focal similarity ----

def score(maps, focal):
    """Similarity of an image to the prototypes, Eq. (1), from its maps (M,h,w): (M,)."""
    cells = maps.flatten(1)
    return cells.amax(1) - cells.mean(1) if focal else cells.amax(1)


def of_five_classes(data):
    """Numbers of five images of different classes, spread over them, or one a class if there are fewer."""
    first = {label: i for i, label in reversed([*enumerate(data.labels)])}         # {class: its first image}
    present = sorted(first)
    return [first[c] for c in dict.fromkeys(present[k * len(present) // 5] for k in range(5))]


@torch.inference_mode()
def draw_focal(net, data, held, folder, size, most=1000):
    """Fig. 2, 4: maximum and mean of a map on five images; Fig. 17: similarities minus the mean and not."""
    count = min(most, len(data))
    chosen = [k * len(data) // count for k in range(count)]          # spread over the split
    rows = []
    similarities = {"focal": [], "max only": []}
    for i in tqdm(chosen + of_five_classes(data), desc="focal", leave=False, disable=None):
        image, label = data.read(i)
        maps = maps_of(net, image, size)                             # (M,h,w)
        peak, mean = maps.flatten(1).amax(1), maps.flatten(1).mean(1)                # (M,) each
        focal = peak - mean                                          # Eq. (1)
        if len(similarities["focal"]) < count:
            similarities["focal"].append(focal)
            similarities["max only"].append(peak)
        elif held[label].any():
            image = copy_for_drawing(image)
            m = int(focal.masked_fill(~held[label], -1).argmax())    # the strongest of its class
            sums = f"max {peak[m]:.2f} - mean {mean[m]:.2f} = {focal[m]:.2f}"
            rows.append([(image, data.classes[label]),
                         (figures.heatmap(image, maps[m], opacity=1.0), f"p{m}"),
                         (figures.heatmap(image, maps[m]), sums)])
    figures.save_grid(folder / "focal.png", rows, cell=200, title="The strongest own prototype (Fig. 2, 4)")
    figures.save_histogram(folder / "focal_histogram.png",
                           {name: torch.cat(values) for name, values in similarities.items()},
                           title=f"Similarity of {count} test images to all prototypes (Fig. 17)")


# ---- explanations, and what the boxes of prototypes hold ----

def explain_files(paths, net, sources, classes, explain, cfg):
    """OUT/explanations/NAME.png (Fig. 6), NAME.json and a line for every file. explain: see draw_run."""
    for path in paths:
        image = read_image(path)
        facts = explain(image, path.name)
        stem = Path(cfg.out) / "explanations" / path.stem
        draw_explanation(facts, image, net, sources, classes, cfg.size, f"{stem}.png")
        run.write_json(f"{stem}.json", facts)
        terms = " + ".join(f"{term['product']:.2f} (p{term['prototype']})" for term in facts["slots"])
        print(f"{path}: {facts['prediction']} ({100 * facts['probability']:.0f} %) because {terms} + rest "
              f"{facts['rest']:.2f} = {facts['logit']:.2f} -> {stem}.png")


def draw_explanation(facts, image, net, sources, classes, size, path, true=None):
    """Fig. 6: the image, and a row for every term of its logit. facts: see draw_run; true: truth_metrics."""
    maps, held = maps_of(net, image, size), net.held().cpu()         # (M,h,w), (C,M)
    image = copy_for_drawing(image)
    rows = [[(image, f"{facts['image']}; prediction: {facts['prediction']} "
              f"({100 * facts['probability']:.0f} %)")],
            ["a training patch", "is found here", "as much: similarity x weight"]]
    if true is not None:
        rows.insert(1, FALSE)
    terms, c = facts["slots"], classes.index(facts["prediction"])
    brightest = max([maps[term["prototype"]].max().item() for term in terms], default=1.0)   # of all maps
    for term in terms:
        m = term["prototype"]
        box = activation_box(maps[m], image.shape[1:])
        rows += [told(m, sources, held, classes, c),
                 [(framed(sources[m]["patch"], true is None or true[c, m]), ""),
                  (figures.draw_box(image, box), ""),
                  (figures.heatmap(image, maps[m], vmin=0, vmax=brightest),
                   f"{term['similarity']:.2f} x {term['weight']:.2f} = {term['product']:.2f}")]]
    title = (f"Why {facts['prediction']}? own slots {facts['own']:.2f} + rest {facts['rest']:.2f} = "
             f"logit {facts['logit']:.2f}")
    figures.save_grid(path, rows, cell=180, title=title, lines=4)


class PartView(CleanView):
    """view[i] -> x as in CleanView, parts (P,3): x, y in pixels of the network's input, visible."""

    def __getitem__(self, i):
        image, _ = self.data.read(i)
        scale = torch.tensor([self.size / image.shape[2], self.size / image.shape[1], 1])
        return network_input(image, self.size, "cpu")[0], self.data.part_locations(i) * scale


@torch.inference_mode()
def observe(net, data, held, cfg, noise=0.2):
    """Every image of a split as the prototypes see it, in pixels of the network's input, on the CPU.

    held (C,M) bool. Returns similarities g_p (N,M), activation boxes (N,M,4), those on the image with noise,
    of the prototypes of its class alone (N,M,4), and parts (N,P,3): x, y, visible.
    """
    device, size = net.prototypes.device, (cfg.size, cfg.size)
    generator = torch.Generator().manual_seed(0)
    batches = BatchSampler(range(len(data)), cfg.batch_size, drop_last=False)
    loader = make_loader(PartView(data, cfg.size), batches, cfg.workers, device)
    own = iter(held[data.labels].to(device))                         # (M,) of each image
    columns = []
    for x, parts in tqdm(loader, desc="parts", leave=False, disable=None):
        shaken = x + noise * torch.randn(x.shape, generator=generator)
        clean, noisy = (net.similarity_maps(*to_device([images], device)) for images in (x, shaken))
        scores, boxes, noisy_boxes = [], [], []
        for maps, others, mine in zip(clean, noisy, own):            # (M,h,w), (M,h,w), (M,)
            scores.append(score(maps, net.focal))
            boxes.append(activation_boxes(maps, size))
            noisy_boxes.append(torch.zeros_like(boxes[-1]))
            if mine.any():
                noisy_boxes[-1][mine] = activation_boxes(others[mine], size)
        columns.append([*(torch.stack(rows).cpu() for rows in (scores, boxes, noisy_boxes)), parts])
    return [torch.cat(parts) for parts in zip(*columns)]


def truth_metrics(net, data, sources, cfg):
    """Is the explanation true? Does a prototype's box hold the same part again, where parts are annotated?
    -> distinct_patches and numbers of common/metrics.py; {prototype: "part share"}, empty without parts; true
    (C,M) bool: the class has the variant that the prototype shows, None where variants are unknown."""
    places = {(source["image"], source["row"], source["column"]) for source in sources}
    result = dict(distinct_patches=len(places))
    if not data.part_names:
        return result, {}, None
    labels, home = torch.tensor(data.labels), torch.tensor([source["label"] for source in sources])
    slots = net.hard_assignment().cpu()                              # (C,K,M)
    held, true = slots.amax(1) > 0.5, None                           # (C,M)
    similarity, boxes, noisy, points = observe(net, data, held, cfg)
    inside, rates = metrics.part_truth(boxes, noisy, points, similarity, labels, held, home, cfg.size)
    result |= rates
    if data.variants is not None:
        variants = torch.as_tensor(data.variants)                    # (C,P)
        numbers, true = metrics.variant_truth(inside, similarity, labels, slots, variants)
        result |= numbers
    shares, parts = metrics.part_shares(inside, similarity).max(1)   # (M,)
    best = enumerate(zip(parts.tolist(), shares.tolist()))
    return result, {m: f"{data.part_names[p]} {100 * share:.0f} %" for m, (p, share) in best}, true
