"""How pfa_scribble.py shows what it has learned: pictures, and words. Nothing here belongs to the method.

A predictor is the script's Predictor: a trained network (net, with its method paths), its settings (cfg),
and the methods of_image (the plain prediction of an image), class_sets, augmented, surest and attention.
"""
import re
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import center_crop

from common import figures
from common.figures import heatmap, in_colours, thumbnail
from common.pfa_tables import PREDICTIONS, in_words
from common.run import UserError
from common.scribble_sets import open_full
from common.segmentation import absent_classes, labels_of_cells, save_examples


def draw_figures(predictor, sets, scores, metrics, baseline, log):
    """All figures of a run in OUT/figures; pfa_page.py says what each shows.

    sets: data sets "train" and "test". scores: {image name: (N,)} or None. metrics: of metrics.json.
    baseline: another predictor or None. log: rows of log.csv.
    """
    folder = Path(predictor.cfg.out) / "figures"
    draw_colours(folder / "colours.png", sets["test"].classes)
    draw_modes(folder / "modes.png", metrics)
    draw_examples(folder / "examples.png", predictor, sets["test"], scores, metrics["headline"], baseline)
    draw_training(folder / "training.png", predictor, sets["train"], baseline)
    draw_log(folder / "miou.png", log, predictor.cfg.val_split)
    if predictor.net.paths():
        draw_confidence(folder / "confidence.png", predictor, sets["train"])
        draw_attention(folder, predictor, sets["test"])


def draw_colours(file, classes):
    """colours.png: what to paint the strokes of --draw with."""
    colours = figures.palette(classes).tolist()
    entries = [(rgb, f"{c} {classes[c]}: {', '.join(map(str, rgb))}") for c, rgb in enumerate(colours)]
    title = figures.text_piece("Colours of the classes (red, green, blue)", 700, 18)
    figures.save_stack(file, [title, figures.legend_piece(entries, 700)])


def widened(scribbles):
    """uint8 (H,W) -> the same with strokes a pixel wider on all sides, which a thumbnail still shows."""
    nearest = -F.max_pool2d(-scribbles.float()[None, None], 3, 1, 1)     # 255 where no stroke is near
    return nearest[0, 0].to(torch.uint8)


def with_strokes(image, scribbles):
    """Image with its strokes, for a figure."""
    return thumbnail(figures.overlay(image, widened(scribbles), opacity=1.0))


def plain_cells(predictor, baseline, image):
    """The plain prediction of an image, and {caption: ids}: it beside that of the run of --baseline."""
    plain = predictor.of_image(image)
    before = {} if baseline is None else {f"baseline ({baseline.cfg.method})": baseline.of_image(image).ids}
    return plain, before | {"plain": plain.ids}


def told(predictor, plain, present, paths, source):
    """{caption: ids} of the predictions that know which classes are present, and the control of each."""
    made = predictor.augmented(plain, present, paths, restricted=True)
    return {f"{name}, {source}".replace("_", " "): ids for name, ids in made.items()}


def draw_modes(file, metrics):
    """modes.png (Table 4): mIoU of every prediction in every mode, beside the plain one that knows none."""
    plain = metrics["miou"]["plain"]["plain"]
    modes = {mode: rates for mode, rates in metrics["miou"].items() if mode != "plain"}
    names = [name for name in PREDICTIONS[1:] if any(name in rates for rates in modes.values())]
    matrix = torch.tensor([[plain, *(rates[name] for name in names)] for rates in modes.values()])
    columns = [name.replace("_", " ") for name in ("plain", *names)]
    figures.save_matrix(file, matrix, list(modes), columns, vmin=matrix.min(), vmax=matrix.max() + 1e-6,
                        title=f"{metrics['split']} mIoU by who says which classes are there")


def draw_examples(file, predictor, data, scores, headline, baseline):
    """examples.png (Fig. 4, 9, 10): test images, predictions of every branch, true classes given, label."""
    source = f"classes > {predictor.cfg.filter} pixels"
    if headline in ("scores", "classifier"):
        source = f"classes of the {headline}"
    paths = predictor.net.paths()

    def cells_of(i, image, label):
        plain, cells = plain_cells(predictor, baseline, image)
        row = scores[data.name_of(i)] if scores else None
        present = predictor.class_sets(plain, [headline, "oracle"], label, row)
        cells |= told(predictor, plain, present[headline], paths, source)
        cells |= told(predictor, plain, present["oracle"], paths[-1:], "true classes given")
        return cells | {"label": label}
    save_examples(file, data, cells_of, f"{data.split} images", count=5)


def classes_of(predictor, plain, labels):
    """The classes of labels uint8 (H,W), background always: bool (N,)."""
    return predictor.class_sets(plain, ["oracle"], labels)["oracle"]


def draw_training(file, predictor, data, baseline):
    """training.png (Fig. 4): training images with strokes, what becomes of them, the full label if any."""
    cfg = predictor.cfg
    try:
        full = open_full(cfg, cfg.train_split)
    except UserError:                                                    # strokes are all there is
        full = None

    def cells_of(i, image, scribbles):
        plain, cells = plain_cells(predictor, baseline, image)
        present = classes_of(predictor, plain, scribbles)
        labelled = {"what is labelled": scribbles if cfg.method == "full" else widened(scribbles)}
        label = {} if full is None else {"label": full.read_mask(i)}
        cells |= told(predictor, plain, present, predictor.net.paths(), "classes drawn")
        return labelled | cells | label
    title = "training images; all but the plain prediction are told the classes of the strokes"
    save_examples(file, data, cells_of, title, count=5)


def draw_log(file, log, split):
    """miou.png: val mIoU of the predictions over the training."""
    if not log:
        return
    series = {name: [row.get(f"val_{name}") for row in log] for name in PREDICTIONS}
    series = {name.replace("_", " "): rates for name, rates in series.items() if set(rates) != {None}}
    figures.save_bars(file, series, [f"{row['iteration']} {row['phase']}" for row in log],
                      title=f"{split} mIoU by iteration and phase; classes by the filter")


def labelled_images(predictor, data, count=4):
    """Of a few images, spread over a data set: name, image uint8 (3,H,W), labels uint8 (H,W), the plain
    prediction, and the classes of the labels, bool (N,). With --window: the middle of the image alone."""
    cfg = predictor.cfg
    predictor = predictor._replace(cfg=replace(cfg, window=0))
    for i in range(0, len(data), max(1, len(data) // count))[:count]:
        image, labels = data.read(i)
        if cfg.window and not cfg.test_size:
            image, labels = (center_crop(maps, [min(side, cfg.window) for side in labels.shape])
                             for maps in (image, labels))
        plain = predictor.of_image(image)
        yield data.name_of(i), image, labels, plain, classes_of(predictor, plain, labels)


def shown_classes(present, most):
    """Ids of the classes present (N,) bool, at most so many: the background and the last ones."""
    ids = present.nonzero()[:, 0].tolist()
    return ids[:1] + ids[1:][-(most - 1):]


def draw_confidence(file, predictor, data):
    """confidence.png: how sure each pixel is of classes with a stroke; the K pixels of their prototypes."""
    rows = []
    for name, image, scribbles, plain, present in labelled_images(predictor, data):
        confidence, chosen = predictor.surest(plain, present)                            # (N,h,w) each
        rows.append([(with_strokes(image, scribbles), f"{name}: strokes")])
        for c in shown_classes(present, 4):
            surest = torch.where(chosen[c], c, 255)[None, None].float()
            surest = F.interpolate(surest, image.shape[1:])[0, 0]
            heat = heatmap(thumbnail(image), confidence[c], vmin=0, vmax=1)
            rows[-1].append((heat, f"{data.classes[c]}: confidence"))
            rows[-1].append((in_colours(image, surest), f"its {int(chosen[c].sum())} surest pixels"))
    figures.save_grid(file, rows, cell=200,
                      title="Confidence, and the pixels that form the local prototype (Eq. 1 to 3)")


def draw_attention(folder, predictor, data):
    """attention.png: how pixels attend to prototypes (Eq. 6), beside what becomes of them;
    attention_matrix.png: the last image's as numbers."""
    path = predictor.net.paths()[-1]
    rows = []
    last = None
    for name, image, label, plain, present in labelled_images(predictor, data):
        omega, mask = predictor.attention(path, plain, present)                          # (h,w,M), (M,)
        of_class = omega.permute(2, 0, 1).unflatten(0, (data.num_classes, -1)).sum(1)    # (N,h,w)
        augmented = predictor.augmented(plain, present, [path])[path]
        rows.append([(thumbnail(image), name), (in_colours(image, plain.ids), "plain prediction"),
                     (in_colours(image, augmented), f"{path} prediction")])
        for c in shown_classes(present, 5):
            heat = heatmap(thumbnail(image), of_class[c], vmin=0, vmax=1)
            rows[-1].append((heat, f"to {data.classes[c]}"))
        small = labels_of_cells(label, omega.shape[:2])
        if (small < data.num_classes).any():
            last = omega, mask, small
    figures.save_grid(folder / "attention.png", rows, cell=200,
                      title=f"Attention of every pixel to the {path} prototypes of the true classes (Eq. 6; "
                      "sums to 1 over the classes). It need not name the pixel's class: layers follow, Eq. "
                      "(7), (8) and the classifier, and make the prediction.")
    if last is not None:
        draw_attention_matrix(folder / "attention_matrix.png", *last, data.classes, path)


def draw_attention_matrix(file, omega, mask, label, classes, path):
    """attention_matrix.png: mean attention of a class's pixels to every prototype. label (h,w)."""
    slots = len(mask) // len(classes)
    ids = [c for c in range(len(classes)) if (label == c).any()]
    matrix = torch.stack([omega[label == c].mean(0) for c in ids])[:, mask]
    keys = mask.nonzero()[:, 0].tolist()
    columns = [f"{classes[k // slots]} {k % slots + 1}" if slots > 1 else classes[k] for k in keys]
    figures.save_matrix(file, matrix, [classes[c] for c in ids], columns, vmin=0, vmax=1,
                        title=f"Mean attention of a class's pixels (rows) to the {path} prototypes")


def save_strokes(stem, scribbles, classes):
    """Says how the strokes of --draw were understood, and writes them: STEM_strokes.png, an index PNG which
    shows unlabelled pixels, 255, in white, so that a paint program can go on with it."""
    colours = figures.CLASS_COLOURS.clone()
    colours[255] = 255
    figures.write_png(f"{stem}_strokes.png", figures.index_picture(scribbles.numpy(), colours))
    pixels = scribbles.flatten().bincount(minlength=256)[:len(classes)].tolist()
    print("strokes: " + ", ".join(f"{classes[c]} {n} px" for c, n in enumerate(pixels) if n), flush=True)
    if not pixels[0]:
        print(f"note: no stroke of {classes[0]}; a few help to tell where the others end")


def save_drawing(stem, image, scribbles, before, after, classes, steps):
    """What --draw writes and says. before: plain ids (H,W); after: {caption: ids}, the last one counts."""
    last = list(after.values())[-1]
    figures.know_classes(classes)
    figures.save_prediction(stem.parent, stem.name, image, last.to(torch.uint8).cpu())
    cells = [(with_strokes(image, scribbles), "strokes, as understood")]
    for caption, ids in {"before": before, **after}.items():
        cells.append((in_colours(image, ids), caption))
    legend = figures.legend_of(classes, scribbles, before, *after.values())
    figures.save_grid(f"{stem}_before_after.png", [cells], legend=legend)
    labelled = scribbles != 255
    right = [100 * (ids.cpu()[labelled] == scribbles[labelled]).float().mean() for ids in (before, last)]
    print(f"{right[0]:.0f} % of the stroke pixels had their class before, {right[1]:.0f} % after {steps} "
          f"steps; see {stem}_before_after.png; ids in {stem}.png")


def draw_components(file, predictors, data, threshold):
    """components.png (Fig. 4, 11): test images, last prediction of the rows of Table 2, {row: Predictor}."""
    mode = f"filter_{threshold}"

    def cells_of(i, image, label):
        cells = {}
        for row, predictor in predictors.items():
            plain = predictor.of_image(image)
            present = predictor.class_sets(plain, [mode])[mode]
            made = {"plain": plain.ids} | predictor.augmented(plain, present, predictor.net.paths(), True)
            last = [name for name in ("plain", "local", "global") if name in made][-1]
            for prediction in (last, "plain_restricted"):
                cells[f"{row}: {prediction} prediction".replace("_", " ")] = made[prediction]
        return cells | {"label": label}
    save_examples(file, data, cells_of,
                  f"Components (Fig. 4, 11); classes with more than {threshold} predicted pixels", count=5)


def draw_curves(file, results, title):
    """figureN.png: mIoU in the headline's mode over the number in a row's name, mean and sample deviation
    over the seeds. results: {row: [metrics, one a seed]}; "drop 0.25, local" is at 0.25 in a panel "drop"."""
    panels = {}                                                          # {heading: {curve: {x: rates}}}
    for row, runs in results.items():
        number = re.search(r"[\d.]+", row)[0]
        heading, _, method = row.replace(number, "").partition(", ")
        for name in PREDICTIONS:
            rates = [(run["miou"]["plain"] | run["miou"][run["headline"]]).get(name) for run in runs]
            if None not in rates and not (method == "local" and name.startswith("plain")):
                curve = name if method != "strokes alone" else name.replace("plain", method)
                panel = panels.setdefault(heading.strip(" ="), {})
                panel.setdefault(curve.replace("_", " "), {})[float(number)] = rates
    pieces = [figures.text_piece(title, 744, size=18)]
    for heading, curves in panels.items():
        x = sorted(next(iter(curves.values())))
        means, around = {}, {}
        for curve, rates in curves.items():
            means[curve], around[curve] = figures.mean_and_deviation([rates[k] for k in x])
        pieces += figures.curve_pieces(means, x, heading, "%", around)
    figures.save_stack(file, pieces)


# ---- in words and numbers --------------------------------------------------------------------------------

def summary(metrics, cfg):
    """What a run ends with, in words; filters that give the same rates share a line."""
    plain = metrics["miou"]["plain"]
    filters, others = {}, []                                             # filters: {rates: thresholds}
    for mode, predictions in metrics["miou"].items():
        text = in_words(plain | predictions)
        if mode.startswith("filter_"):
            filters.setdefault(text, []).append(mode.removeprefix("filter_"))
        elif mode == "oracle":
            others.append(f"TRUE CLASSES GIVEN (oracle: an upper bound, not a result): {text}")
        elif mode != "plain":
            source = "--class-scores" if mode == "scores" else "the trained classifier"
            others.append(f"classes from {source} (mAP {metrics['class_map']:.1f}): {text}")
    lines = [f"{cfg.test_split} mIoU: {in_words(plain)}{absent_classes(metrics)}; where classes are told "
             "(restricted: no other class can win):"]
    for text, thresholds in filters.items():
        lines.append(f"classes with more than {' or '.join(thresholds)} predicted pixels: {text}")
    lines += others
    if cfg.method == "pfa" and cfg.augment != "local" and metrics["iterations_until_bank_full"] is None:
        lines.append("the memory never filled in time, so that no global prediction was trained: train "
                     "longer, or lower --warmup or --slots")
    return "\n  ".join(lines) + f"\nsee {cfg.out}/metrics.json and {cfg.out}/figures"
