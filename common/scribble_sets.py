"""Which data a run that learns from strokes reads: strokes to train on, full masks to be scored on.

cfg holds the options dataset, data, ignore, scribbles, scribble_drop, scribble_shrink, method, seed, and the
splits.
"""
from common.datasets import WeakerScribbles, open_dataset
from common.run import UserError


def open_full(cfg, split):
    """A split with its full masks."""
    name = "voc" if cfg.dataset == "voc_scribble" else cfg.dataset
    return open_dataset(name, cfg.data, split, ignore=cfg.ignore)


def open_sets(cfg):
    """{"train", "val", "test"}: SegmentationSets; train has strokes, for --method full its full masks."""
    if cfg.method == "full":
        train = open_full(cfg, cfg.train_split)
    elif cfg.dataset == "voc" and not cfg.scribbles:
        raise UserError("--dataset voc has full masks: name the folder of the strokes, --scribbles FOLDER "
                        "(data/README.md), or take --method full.")
    else:
        own = "scribbles" if cfg.dataset in ("toy_scenes", "folder") else ""       # voc_scribble has others
        folder = cfg.scribbles or own
        train = open_dataset(cfg.dataset, cfg.data, cfg.train_split, mask_dir=folder, ignore=cfg.ignore)
        if cfg.scribble_drop or cfg.scribble_shrink:
            train = WeakerScribbles(train, cfg.scribble_drop, cfg.scribble_shrink, cfg.seed)
    sets = dict(train=train, val=open_full(cfg, cfg.val_split), test=open_full(cfg, cfg.test_split))
    if train.num_classes < 2:
        raise UserError(f"{cfg.data} has one class: two are needed, of which the first is the background.")
    return sets
