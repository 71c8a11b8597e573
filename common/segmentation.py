"""What the three segmentation scripts do alike: score a split, predict image files, show examples."""
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import figures, run
from common.metrics import ConfusionMatrix
from common.run import UserError
from common.transforms import normalise, resize_whole


def network_input(image, size=0, square=False):
    """uint8 (3,H,W) -> normalised (1,3,h,w), resized as a TestView does."""
    return normalise(resize_whole(image, size, square))[None]


def resized(maps, size, mode="bilinear"):
    """(B,F,h,w) -> (B,F,*size) float32."""
    return F.interpolate(maps.float(), size, mode=mode, align_corners=False)


def labels_of_cells(mask, size):
    """Of each cell of a grid (h,w) the label under its centre: mask (H,W) -> (h,w) int64."""
    return F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0].long()


@torch.inference_mode()
def evaluate(net, loader, num_classes, names, predict, machine):
    """{name: rates in percent (common/metrics.py)} over a split, all processes together; 255 never counts.

    loader: eval_loader of a TestView. predict(batch) -> {name: class ids (1,H,W)} at the size of the labels,
    for all `names`. The network is in eval mode meanwhile, afterwards as before.
    """
    was_training = net.training
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False                             # every image may have another size
    run.share_buffers(net)
    net.eval()
    matrices = {name: ConfusionMatrix(num_classes, machine.device) for name in names}
    for batch in tqdm(loader, desc="evaluate", leave=False, disable=machine.quiet):
        labels = batch["mask"].to(machine.device, non_blocking=machine.device.type == "cuda")
        for name, ids in predict(batch).items():
            matrices[name].update(labels, ids)
    for matrix in matrices.values():
        matrix.all_reduce()
    net.train(was_training)
    torch.backends.cudnn.benchmark = benchmark
    return {name: matrix.summary() for name, matrix in matrices.items()}


def named_rates(score, classes, split):
    """Rates of evaluate() for metrics.json, with class names. UserError if no pixel is labelled."""
    if all(rate is None for rate in score["iou"]):
        raise UserError(f"no pixel of the {split} split is labelled, so there is nothing to score: check "
                        "its masks, or choose another --test-split.")
    return score | dict(iou=dict(zip(classes, score["iou"])), f1=dict(zip(classes, score["f1"])),
                        absent=[classes[c] for c in score["absent"]])


def predict_files(files, predict, classes, out):
    """OUT/predictions/NAME.png (class ids, palette) and NAME_overlay.png for every image file; a line each.
    predict(path) -> image uint8 (3,H,W), class ids uint8 (H,W), both on the CPU."""
    folder = Path(out) / "predictions"
    for path in tqdm(files, desc="predict", disable=None):
        image, ids = predict(path)
        figures.save_prediction(folder, path.stem, image, ids)
        share = 100 * torch.bincount(ids.flatten().long(), minlength=len(classes)) / ids.numel()
        largest = [c for c in share.topk(min(3, len(share))).indices.tolist() if share[c] > 0]
        text = ", ".join(f"{classes[c]} {share[c]:.0f} %" for c in largest)
        tqdm.write(f"{path}: {text} -> {folder / path.stem}_overlay.png")


def save_examples(path, data, cells_of, title, count=4):
    """A row of pictures for `count` images of a split, evenly spread over it: the image uint8 (3,H,W), and
    cells_of(i, image, label) -> {caption: class ids (H,W)} in colours; label uint8 (H,W)."""
    rows, classes = [], set()
    for i in sorted({round(k * (len(data) - 1) / max(1, count - 1)) for k in range(count)}):
        image, label = data.read(i)
        cells = cells_of(i, image, label)
        rows.append([(figures.thumbnail(image), data.name_of(i))]
                    + [(figures.in_colours(image, ids), caption) for caption, ids in cells.items()])
        for ids in cells.values():
            classes |= set(ids.unique().tolist())
    figures.save_grid(path, rows, title=title, legend={c: data.classes[c] for c in sorted(classes - {255})})
