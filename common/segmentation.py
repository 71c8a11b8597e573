"""What the three segmentation scripts do alike: score a split, predict image files, show examples."""
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import figures, run
from common.files import some_of
from common.metrics import ConfusionMatrix
from common.run import UserError
from common.transforms import ENOUGH, normalise, resize_whole

WINDOW = ("side of the windows in which an image is scored or labelled, two thirds of it apart, logits "
          "averaged where they overlap: for large images; 0 = all at once, as where it fits into one window")
MOST = 2 ** 26                                           # numbers in the logits that are resized at once


def network_input(image, size=0, square=False):
    """uint8 (3,H,W) -> normalised (1,3,h,w), resized as a TestView does."""
    return normalise(resize_whole(image, size, square))[None]


def resized(maps, size, mode="bilinear"):
    """(B,F,h,w) -> (B,F,*size) float32."""
    return F.interpolate(maps.float(), size, mode=mode, align_corners=False)


def labels_of_cells(mask, size):
    """Of each cell of a grid (h,w) the label under its centre: mask (H,W) -> (h,w) int64."""
    return F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0].long()


# ---- from logits to class ids ----------------------------------------------------------------------------

class TooSmall(UserError):
    """An image that the network cannot take; whoever knows its name puts it in front."""


def starts_of_windows(side, window):
    """First pixels of the windows along a side, as in mmsegmentation: two thirds of a window apart, the last
    one moved inside. A side of 1000 and a window of 512 give 0, 341, 488."""
    stride, last = max(1, 2 * window // 3), side - window
    return [min(start, last) for start in range(0, last + stride, stride)]


def in_windows(forward, x, window=0):
    """[(rows, columns, forward(x[:, :, rows, columns]))] for the windows of x (B,3,H,W), as slices. A side
    that is no longer than the window, or any for window 0, is taken whole. TooSmall: x is."""
    whole = [window if 0 < window < side else side for side in x.shape[2:]]
    rows, columns = ([slice(start, start + part) for start in starts_of_windows(side, part)]
                     for side, part in zip(x.shape[2:], whole))
    try:
        return [(r, c, forward(x[:, :, r, c])) for r in rows for c in columns]
    except (RuntimeError, ValueError):
        if min(whole) >= ENOUGH:
            raise
        raise TooSmall(f"{whole[1]} x {whole[0]} pixels are too few for this network: enlarge it.") from None


def part_of(windows, key):
    """in_windows of a forward that returns a list or dict -> the same with one of its entries."""
    return [(rows, columns, output[key]) for rows, columns, output in windows]


def enlarged(maps, size, aligned=False):
    """(B,F,h,w) -> (B,F,*size), bilinear, in float32 (or float64). aligned: corners stay in place."""
    if maps.shape[2:] == tuple(size):
        return maps
    maps = maps if maps.dtype == torch.float64 else maps.float()
    return F.interpolate(maps, size, mode="bilinear", align_corners=aligned)


def mean_of_windows(windows, size, aligned):
    """Logits of windows, each resized to its own size, averaged where they overlap -> (B,N,*size). Those of
    a single window stay as they are, (B,N,h,w)."""
    if len(windows) == 1:
        return windows[0][2]
    total = windows[0][2].new_zeros(*windows[0][2].shape[:2], *size, dtype=torch.float32)
    count = total.new_zeros(size)
    for rows, columns, logits in windows:
        place = total[:, :, rows, columns]
        place += enlarged(logits, place.shape[2:], aligned)
        count[rows, columns] += 1
    return total.div_(count)


def groups_of_classes(N, pixels):
    """[(first, end)]: groups of N classes, of a multiple of 16, with about MOST numbers at `pixels`."""
    size = 16 * max(1, MOST // (16 * pixels))
    starts = list(range(0, N, size))
    if len(starts) > 1 and N - starts[-1] < 4:           # torch resizes fewer than 4 maps by other means
        starts.pop()
    return list(zip(starts, [*starts[1:], N]))


def some_classes(windows, chosen):
    """in_windows of logits (B,N,h,w) -> the same of the chosen classes, a slice or their ids, in the same
    order in memory, on which rounding depends."""
    parts = []
    for rows, columns, logits in windows:
        channels_last = logits.is_contiguous(memory_format=torch.channels_last)
        order = torch.channels_last if channels_last else torch.contiguous_format
        parts.append((rows, columns, logits[:, chosen].contiguous(memory_format=order)))
    return parts


@torch.inference_mode()
def class_ids(windows, size_of_x, size, twice=False, aligned=False, classes=None):
    """Ids (B,*size) int64 of the classes with the highest logits, resized to `size`.

    windows: in_windows of a forward that returns logits (B,N,h,w). twice: they are first resized to the size
    of the network's input x, as those of several windows always are. One group of classes after the other
    is resized, with the same numbers as all at once: 150 classes at 12 million pixels would need 7 GB.
    classes (N,) bool: the others cannot win, as if their logits were minus infinity.
    """
    if classes is not None:
        allowed = classes.nonzero()[:, 0]
        return allowed[class_ids(some_classes(windows, allowed), size_of_x, size, twice, aligned)]
    sizes = [size_of_x, size] if twice or len(windows) > 1 else [size]
    B, N = windows[0][2].shape[:2]
    best = ids = None
    for first, end in groups_of_classes(N, B * max(height * width for height, width in sizes)):
        maps = mean_of_windows(some_classes(windows, slice(first, end)), size_of_x, aligned)
        for target in sizes:
            maps = enlarged(maps, target, aligned)
        values, found = maps.max(1)                      # of equal ones the first; much quicker than argmax
        if best is None:
            best, ids = values, found
        else:
            higher = values > best                       # of equal ones the first class counts
            best, ids = torch.where(higher, values, best), torch.where(higher, found + first, ids)
    return ids


# ---- scores and files ------------------------------------------------------------------------------------

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
        try:
            predicted = predict(batch)
        except TooSmall as error:
            raise UserError(f"{loader.dataset.data.name_of(int(batch['index']))}: {error}") from None
        for name, ids in predicted.items():
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


def absent_classes(metrics):
    """For the line that a run ends with: the classes that no label of the split has, or ""."""
    return f"; classes without a pixel there: {some_of(metrics['absent'])}" if metrics["absent"] else ""


def predict_files(files, predict, classes, out):
    """OUT/predictions/NAME.png (class ids, palette) and NAME_overlay.png for every image file; a line each.
    predict(path) -> image uint8 (3,H,W), class ids uint8 (H,W), both on the CPU. UserError if an image has
    the name of another's overlay."""
    folder = Path(out) / "predictions"
    figures.know_classes(classes)                        # which decide their colours
    overlays = {f"{path.stem}_overlay" for path in files} & {path.stem for path in files}
    if overlays:
        raise UserError(f"--predict: the image {min(overlays)} has the name of another image's overlay: "
                        "rename it, or move it away.")
    for path in tqdm(files, desc="predict", disable=None):
        try:
            image, ids = predict(path)
        except TooSmall as error:
            raise UserError(f"{path}: {error}") from None
        figures.save_prediction(folder, path.stem, image, ids)
        share = 100 * torch.bincount(ids.flatten().long(), minlength=len(classes)) / ids.numel()
        largest = [c for c in share.topk(min(3, len(share))).indices.tolist() if share[c] > 0]
        text = ", ".join(f"{classes[c]} {share[c]:.0f} %" for c in largest)
        tqdm.write(f"{path}: {text} -> {folder / path.stem}_overlay.png")
    print(f"values in {folder}/NAME.png: {some_of([f'{c} {name}' for c, name in enumerate(classes)], 30)}")


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
