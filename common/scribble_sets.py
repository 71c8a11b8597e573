"""Which data a run that learns from strokes reads: strokes to train on, full masks to be scored on.

cfg holds the options dataset, data, scribbles, scribble_drop, scribble_shrink, method, seed, and the splits.
"""
from common.datasets import WeakerScribbles, open_dataset
from common.loaders import survey_scribbles
from common.run import UserError


def open_full(cfg, split):
    """A split with its full masks."""
    return open_dataset("voc" if cfg.dataset == "voc_scribble" else cfg.dataset, cfg.data, split)


def open_sets(cfg):
    """{"train", "val", "test"}: SegmentationSets; train has strokes, for --method full its full masks."""
    if cfg.method == "full":
        train = open_full(cfg, cfg.train_split)
    elif cfg.dataset in ("voc", "folder") and not cfg.scribbles:
        raise UserError(f"--dataset {cfg.dataset} has full masks: name the folder of the strokes, "
                        "--scribbles FOLDER (data/README.md), or take --method full.")
    else:
        folder = "scribbles" if cfg.dataset == "toy_scenes" else cfg.scribbles
        train = open_dataset(cfg.dataset, cfg.data, cfg.train_split, mask_dir=folder)
        if cfg.scribble_drop or cfg.scribble_shrink:
            train = WeakerScribbles(train, cfg.scribble_drop, cfg.scribble_shrink, cfg.seed)
    sets = dict(train=train, val=open_full(cfg, cfg.val_split), test=open_full(cfg, cfg.test_split))
    if train.num_classes < 2:
        raise UserError(f"{cfg.data} has one class: two are needed, of which the first is the background.")
    return sets


def classes_with_strokes(data, cfg, machine):
    """(N,) bool: classes with a stroke in some training image. Prints which masks and classes have none."""
    survey = survey_scribbles(data, cfg.workers)
    occurs = survey["images"] > 0
    if machine.rank == 0:
        for key, labels in (("empty", "nothing"), ("background_only", "background alone")):
            if survey[key]:
                print(f"note: {len(survey[key])} of {len(data)} scribble masks label {labels}, such as "
                      f"{survey[key][0]}")
        absent = [name for name, present in zip(data.classes, occurs) if not present]
        if absent:
            print(f"note: no training image has a stroke of {', '.join(absent)}: not learned, and not "
                  "waited for by the memory")
        print(f"strokes label {survey['labelled']:.1f} % of the pixels of {len(data)} training images",
              flush=True)
    return occurs
