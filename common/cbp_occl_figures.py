"""Pictures of cbp_occl.py: rows of the classifier (Fig. 6), F1 by frequency (Fig. 5), examples (Fig. 7), the
sweeps of Fig. 4, and (ours) how features lie to the rows. They show one network, or several side by side."""
import statistics
from typing import NamedTuple

import torch

from common import cbp_occl_measures as measures
from common import datasets, figures, segmentation


class Shown(NamedTuple):
    """A trained network, as figures show it."""
    name: str
    net: torch.nn.Module
    cfg: object                                                        # settings of its run
    runs: list                                                         # metrics.json, one a seed
    features: measures.Features | None = None

    @property
    def rows(self):
        """Rows of the classifier (N,C) on the CPU."""
        return self.net.classifier.class_vectors().detach().float().cpu()

    @property
    def device(self):
        return self.net.classifier.class_vectors().device


def name_of(cfg):
    """What figures call a network: "CBP + OCCL"."""
    return cfg.classifier.replace("cbp", "CBP") + " + OCCL" * bool(cfg.w_centroid or cfg.w_category)


def draw_figures(prefix, data, shown, predict, results=None):
    """PREFIXexamples.png, similarity_map.png, f1_by_frequency.png, and two more where features are known.

    data: the test split. shown: [Shown]. predict: predict_image of the script. results: {name: [metrics, one
    a seed]} for the F1; if not given, of those shown.
    """
    def cells_of(i, image, label):
        return dict(label=label) | {one.name: predict(one.net, image, one.cfg, one.device) for one in shown}
    segmentation.save_examples(f"{prefix}examples.png", data, cells_of, f"{data.split} images (Fig. 7)")
    matrices = {one.name: measures.cosines(one.rows, one.rows) for one in shown}
    draw_cosines(f"{prefix}similarity_map.png", matrices, data,
                 "Cosine between the classifier's rows (Fig. 6): red = alike, white = orthogonal")
    draw_f1(f"{prefix}f1_by_frequency.png", results or {one.name: one.runs for one in shown}, data)
    if all(one.features for one in shown):
        matrices = {one.name: measures.cosines(one.features.centroids, one.rows) for one in shown}
        draw_cosines(f"{prefix}feature_cosines.png", matrices, data,
                     "How near is the mean feature of a class (left) to the classifier's rows (above)? "
                     f"Cosines, {shown[0].features.images} {data.split} images")
        draw_lookalikes(f"{prefix}lookalikes.png", shown, data)


def draw_cosines(path, matrices, data, title):
    """{heading: (N,N) by class} side by side, of at most 20 classes, look-alikes first."""
    lookalikes = [c for pair in datasets.LOOKALIKES.get(data.name, []) for c in pair]
    classes = list(dict.fromkeys(lookalikes + list(range(data.num_classes))))[:20]
    figures.save_matrices(path, {name: table[classes][:, classes] for name, table in matrices.items()},
                          [data.classes[c] for c in classes], title=title)


def draw_f1(path, results, data):
    """Fig. 5: F1 of groups of classes by their training pixels, a series a network, mean over its seeds."""
    f1s = {name: [[run["f1"][c] for c in data.classes] for run in runs] for name, runs in results.items()}
    pixels = next(iter(results.values()))[0]["training_pixels"]
    groups = measures.rarest_first([pixels[c] for c in data.classes], sum(f1s.values(), []))
    series, around = {}, {}
    for name, of_seeds in f1s.items():
        means = [[statistics.mean(f1[c] for c in group) for f1 in of_seeds] for group in groups]
        series[name], around[name] = figures.mean_and_deviation(means)
    names = [data.classes[group[0]] + f" ... ({len(group)})" * (len(group) > 1) for group in groups]
    seeds = max(map(len, f1s.values()))
    title = f"{data.split} F1 by number of training pixels, rarest classes left (Fig. 5)"
    figures.save_bars(path, series, names, deviations=around,
                      title=title + f"; mean and deviation of {seeds} seeds" * (seeds > 1))


def draw_lookalikes(path, shown, data):
    """The pixels of two classes by their cosines with both rows, a line where both logits are equal."""
    rows = []
    for pair in measures.lookalikes(data, shown[-1].features):
        names, colours = [data.classes[c] for c in pair], figures.CLASS_COLOURS[list(pair)].tolist()
        plots = []
        for one in shown:
            lengths, series = one.rows[list(pair)].norm(dim=1).tolist(), {}
            for k, c in enumerate(pair):
                points = measures.cosines(one.features.pixels[c], one.rows[list(pair)])              # (n,2)
                share = (points[:, k] * lengths[k] > points[:, 1 - k] * lengths[1 - k]).float().mean()
                series[f"{names[k]}: {100 * share:.0f} %"] = colours[k], points
            axes = [f"cosine with the row of {name}" for name in names]
            plots.append((one.name, axes, series, lengths[0] / lengths[1]))
        rows.append(plots)
    if rows:
        rows = rows if len(shown) > 1 else [sum(rows, [])]             # of one network: in one row
        figures.save_scatters(path, rows, title="Features of two classes that look alike, a dot a pixel. On "
                              "the line both logits are equal (bias aside); it is the diagonal if rows are "
                              "equally long. Percentages: pixels of a class on its own side of the line")


def draw_sweeps(path, results, values, cfg):
    """Fig. 4, in the paper's colours. results: {row: [metrics, one a seed]}, a row a value and symbol."""
    series, around = {}, {}
    for symbol, rest in (("phi", f"lambda = {cfg.w_centroid:g}"), ("lambda", f"phi = {cfg.w_category:g}")):
        rates = [[run["miou"] for run in results[f"{symbol} = {value:g}"]] for value in values]
        name = f"{symbol} ({rest})"
        series[name], around[name] = figures.mean_and_deviation(rates)
    title = f"{cfg.test_split} mIoU by the weights of OCCL (Fig. 4): lambda for Eq. (4), phi for Eq. (5)"
    figures.save_curves(path, series, values, deviations=around, below="the weight that is varied",
                        title=title + f"; mean and deviation of {cfg.seeds} seeds" * (cfg.seeds > 1))
