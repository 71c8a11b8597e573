"""Which classes are in an image? A classifier trained on the classes of the strokes, and files of scores.

It stands in for Q2L and MCAR, which PFA asks at test time (A.2, Table 4). Scores are float32 between 0 and
1, one a class; that of the background, class 0, is 1.
"""
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import run
from common.backbones import EXTRACTORS, build_extractor, check_side
from common.files import composed
from common.loaders import TestView, to_device, train_loader
from common.metrics import mean_average_precision
from common.run import RunConfig, UserError, opt
from common.transforms import normalise, resize_whole


@dataclass
class ClassifierConfig(RunConfig):
    """Options of the classifier and of the scores, which the Config of a script inherits."""
    class_scores: str = opt("", "FILE.npz: image name -> scores of the classes, from a classifier of yours",
                            evaluation=True)
    score_threshold: float = opt(0.5, "a class whose score is above this counts as present", at_least=0,
                                 at_most=1, evaluation=True)
    train_classifier: bool = opt(False, "train a classifier of images on the strokes' classes when all else "
                                 "is done; with --eval-only for a run that has none", evaluation=True)
    classifier_backbone: str = opt("resnet50", "network of the image classifier", choices=EXTRACTORS)
    classifier_weights: str = opt("imagenet", "pretrained weights of the image classifier: a file or URL, "
                                  "imagenet or none", source=True)
    classifier_size: int = opt(448, "side in pixels of the squares that the image classifier sees", above=0)
    classifier_iterations: int = opt(6600, "training steps of the image classifier, --batch-size images "
                                     "each", above=0, schedule=True)
    classifier_lr: float = opt(1e-4, "AdamW learning rate of the image classifier, falling to 0; its new "
                               "layer learns 10 times as fast", above=0)


def check_classifier(cfg):
    """UserError if the classifier cannot be trained on so small images."""
    if cfg.train_classifier:
        name = cfg.classifier_backbone
        check_side(lambda: build_extractor(name), cfg.classifier_size, "--classifier-size", name,
                   run.batch_of_process(cfg))


# ---- files of scores -------------------------------------------------------------------------------------

def key_of(name):
    """An image's name as a key of a file of scores: accents as `composed`, what is no UTF-8 as its code."""
    return composed(name).encode("utf-8", "backslashreplace").decode("utf-8")


def read_scores(path, names, num_classes):
    """--class-scores FILE -> {image name: (N,) float32}, background 1. UserError: a name without scores."""
    N = num_classes
    try:
        with np.load(path, allow_pickle=False) as file:
            rows = {composed(name): file[name] for name in file.files}
    except Exception as error:                           # numpy raises many types for a wrong file
        reason = getattr(error, "strerror", None) or "it is damaged, or holds something else"
        raise UserError(f"--class-scores {path} cannot be read ({reason}): an .npz file is needed, written "
                        "by numpy.savez(path, **{image name: scores}).") from None
    missing = [name for name in names if key_of(name) not in rows]
    if missing:
        raise UserError(f"--class-scores {path} lacks {len(missing)} of {len(names)} images, such as "
                        f"{missing[0]}: its keys must be the images' names without ending.")
    lengths = {rows[key_of(name)].shape: name for name in names}
    if len(lengths) > 1:
        (one, name), (other, other_name) = list(lengths.items())[:2]
        raise UserError(f"--class-scores {path} has scores of shape {one} for {name}, but {other} for "
                        f"{other_name}: all images need as many.")
    scores = {}
    for name in names:
        row = rows[key_of(name)]
        if row.shape not in ((N,), (N - 1,)) or row.dtype.kind not in "fiu" or not np.isfinite(row).all():
            raise UserError(f"--class-scores {path} holds {row.dtype} of shape {row.shape} for {name}: {N} "
                            f"finite numbers are needed, one a class, or {N - 1} without the background.")
        row = torch.from_numpy(row.astype(np.float32))
        scores[name] = torch.cat([torch.ones(1), row[len(row) - N + 1:]])          # the background is there
    every = torch.stack(list(scores.values()))
    if every.min() < 0 or every.max() > 1:
        print(f"note: {path} has scores from {every.min():.3g} to {every.max():.3g}; if they are logits, "
              "apply a sigmoid, or choose a fitting --score-threshold")
    return scores


def scores_of_file(cfg, data):
    """--class-scores for all images of a data set, None without the option."""
    if not cfg.class_scores:
        return None
    return read_scores(cfg.class_scores, [data.name_of(i) for i in range(len(data))], data.num_classes)


def labelled_classes(mask, num_classes):
    """Mask uint8 (H,W), 255 = no label -> bool (N,): the classes that occur, the background always."""
    present = torch.bincount(mask.flatten(), minlength=256)[:num_classes] > 0
    present[0] = True
    return present


def scores_quality(scores, data, learned):
    """mAP of the scores against the classes of the labels (Table 4), over the classes learned (N,) bool."""
    rows = torch.stack([scores[data.name_of(i)] for i in range(len(data))])
    truth = torch.stack([labelled_classes(data.read_mask(i), data.num_classes) for i in range(len(data))])
    known = learned[1:].cpu()                            # without the background
    rows, truth = rows[:, 1:][:, known], truth[:, 1:][:, known]
    quality = mean_average_precision(rows, truth)
    others = [mean_average_precision(rows.roll(k, 0), truth) for k in range(1, min(20, len(rows)))]
    if quality is not None and len(others) > 3 and quality <= max(others):
        print(f"note: the scores know these images no better (mAP {quality:.1f}) than the scores of other "
              f"images do (up to {max(others):.1f}): are they of another split?")
    return quality


# ---- the classifier --------------------------------------------------------------------------------------

class ImageLabels(TestView):
    """Images, classes of their strokes: view[(index, sample_seed)] -> dict(image, classes (N,)).
    With `square`, as the classifier wants them. Half of the seeds flip the image."""

    def __getitem__(self, key):
        index, sample_seed = key
        sample = super().__getitem__(index)
        image = sample["image"].flip(2) if sample_seed % 2 else sample["image"]
        return {"image": image, "classes": labelled_classes(sample["mask"], self.data.num_classes)}


def build_classifier(cfg, num_classes, weights="none"):
    """Images (B,3,S,S) -> logits (B,N-1) of all classes but the background, each a yes or no of its own."""
    extractor = build_extractor(cfg.classifier_backbone, weights)
    return nn.Sequential(extractor, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(extractor.channels, num_classes - 1))


def train_classifier(cfg, data, machine):
    """The classifier after cfg.classifier_iterations on the strokes' classes, kept in OUT/classifier.pt."""
    path = Path(cfg.out) / "classifier.pt"
    resumes = path.exists()                              # start_run moved those of earlier runs away
    device = machine.device
    torch.manual_seed(cfg.seed)
    net = build_classifier(cfg, data.num_classes, "none" if resumes else cfg.classifier_weights)
    net.to(device, memory_format=torch.channels_last)
    model = run.distribute(net, machine).train()
    groups = [dict(params=net[0].parameters(), lr=cfg.classifier_lr),
              dict(params=net[-1].parameters(), lr=10 * cfg.classifier_lr)]
    optimizer = torch.optim.AdamW(groups, weight_decay=cfg.weight_decay)
    scheduler = run.poly_schedule(optimizer, max(1, cfg.classifier_iterations))
    parts = dict(model=net, optimizer=optimizer, scheduler=scheduler)
    start = run.load_checkpoint(path, parts, device)["iteration"] if resumes else 0
    view = ImageLabels(data, cfg.classifier_size, square=True)
    loader = train_loader(view, cfg.batch_size, cfg.seed, start, cfg.classifier_iterations, cfg.workers,
                          *machine)
    bar = tqdm(loader, total=cfg.classifier_iterations, initial=start, desc="classifier", leave=False,
               disable=machine.quiet)
    for iteration, batch in enumerate(bar, start + 1):
        x, classes = to_device(batch, device, "image", "classes")
        with run.autocast(device, cfg.amp):
            logits = model(x)
        optimizer.zero_grad(set_to_none=True)
        loss = F.binary_cross_entropy_with_logits(logits.float(), classes[:, 1:].float())
        run.backward(loss, optimizer, cfg.amp)
        run.step(optimizer)
        scheduler.step()
        if run.due(iteration, cfg.save_every, cfg.classifier_iterations):
            run.save_checkpoint(path, parts, dict(iteration=iteration, classes=data.classes))
    return net.eval()


def scores_of_classifier(cfg, train_set, test_set, machine):
    """--train-classifier: {image name: (N,) float32} of the test set; also in OUT/class_scores-SPLIT.npz."""
    net = train_classifier(cfg, train_set, machine)
    scores = {}
    for i in range(machine.rank, len(test_set), machine.world):
        scores[test_set.name_of(i)] = classify(net, test_set.read(i)[0], cfg, machine.device)
    if dist.is_initialized():
        every = [None] * machine.world
        dist.all_gather_object(every, scores)
        scores = {name: row for part in every for name, row in part.items()}
    if machine.rank == 0:
        path = Path(cfg.out) / f"class_scores-{test_set.split}.npz"
        with run.replacing(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            for name, row in scores.items():             # numpy.savez would refuse an image called "file"
                with archive.open(f"{key_of(name)}.npy", "w") as entry:
                    np.lib.format.write_array(entry, row.numpy())
    return scores


@torch.inference_mode()
def classify(net, image, cfg, device):
    """uint8 (3,H,W) -> scores (N,) float32 on the CPU; the background's is 1."""
    x = normalise(resize_whole(image, cfg.classifier_size, square=True))[None]
    with run.autocast(device, cfg.amp):
        logits = net(x.to(device, memory_format=torch.channels_last))[0].float()
    return torch.cat([torch.ones(1), logits.sigmoid().cpu()])


def scorer(cfg, files, num_classes, device):
    """How --infer scores image files: a function of (file, image) -> scores (N,), or None without scores."""
    if cfg.infer == "scores":
        scores = read_scores(cfg.class_scores, [file.stem for file in files], num_classes)
        return lambda file, image: scores[file.stem]
    if cfg.infer != "classifier":
        return lambda file, image: None
    path = Path(cfg.out) / "classifier.pt"
    if not path.exists():
        raise UserError(f"--infer classifier: {cfg.out} has no classifier.pt; make one with --eval-only "
                        "--train-classifier, or choose another --infer.")
    net = build_classifier(cfg, num_classes).to(device, memory_format=torch.channels_last).eval()
    done, total = run.load_checkpoint(path, dict(model=net), device)["iteration"], cfg.classifier_iterations
    if done < total:
        print(f"note: the classifier in {path} is not finished: iteration {done} of {total}")
    return lambda file, image: classify(net, image, cfg, device)
