"""Pictures of cbp_occl.py: F1 by frequency (Fig. 5), cosines of the rows (Fig. 6), examples (Fig. 7)."""
from pathlib import Path

import torch.nn.functional as F

from common import datasets, figures, segmentation


def draw_figures(out, data, predict, class_vectors, f1_groups):
    """examples.png, similarity_map.png and f1_by_frequency.png in OUT/figures.

    data: the test split. predict(image uint8 (3,H,W)) -> class ids (H,W) uint8. class_vectors (N,C): rows of
    the classifier; look-alikes are shown first. f1_groups: [{classes: names, f1: percent}], rarest first.
    """
    folder = Path(out) / "figures"
    segmentation.save_examples(folder / "examples.png", data,
                               lambda i, image, label: dict(label=label, prediction=predict(image)),
                               f"{data.split} images")
    unit = F.normalize(class_vectors.detach().float().cpu(), dim=1)
    lookalikes = [c for pair in datasets.LOOKALIKES.get(data.name, []) for c in pair]
    classes = list(dict.fromkeys(lookalikes + list(range(len(data.classes)))))[:20]
    figures.save_matrix(folder / "similarity_map.png", unit[classes] @ unit[classes].T,
                        [data.classes[c] for c in classes],
                        title="Cosine between the classifier's rows (Fig. 6)")

    names = []
    for group in f1_groups:
        count = len(group["classes"])
        names.append(group["classes"][0] + (f" ... ({count})" if count > 1 else ""))
    rates = [group["f1"] for group in f1_groups]
    figures.save_bars(folder / "f1_by_frequency.png", {f"{data.split} F1": rates}, names,
                      title="F1 by number of training pixels, rarest classes left (Fig. 5)")
