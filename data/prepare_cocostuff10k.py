"""COCO-Stuff10K: .mat labels -> index PNGs, in the layout that mmsegmentation's converter makes.

    python -m data.prepare_cocostuff10k ROOT               # ROOT = the unpacked cocostuff-10k-v1.1.zip

Reads  ROOT/imageLists/{train,test}.txt, ROOT/images/NAME.jpg, ROOT/annotations/NAME.mat (variable S)
Writes ROOT/images/{train2014,test2014}/NAME.jpg (hard links, or copies where the disk has no links)
       ROOT/annotations/{train2014,test2014}/NAME_labelTrainIds.png

The .mat labels are 0 = unlabelled and 1..182, of which 11 ids were never used; the PNGs are 0 = unlabelled
and 1..171 without gaps (the reader in common/datasets.py moves 0 to 255 and the rest to 0..170). No file of
the download is changed. Once interrupted, the same command goes on where it stopped. Needs scipy.
"""
import argparse
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.files import read_text
from common.run import UserError, print_any_name, replacing

UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)              # in the original numbering 0..182
USED = [i for i in range(183) if i not in UNUSED]                  # 172: 0, 80 things, 91 kinds of stuff


def to_train_ids(labels, path):
    """Labels (H,W), 0..182 -> uint8 (H,W), 0..171. UserError names `path` if an id does not exist."""
    bad = np.setdiff1d(labels, USED).tolist()
    if bad:
        raise UserError(f"{path}: S holds the ids {bad[:5]}, which COCO-Stuff10K v1.1 does not have: take "
                        "the labels of cocostuff-10k-v1.1.zip.")
    return np.searchsorted(USED, labels).astype(np.uint8)


def read_mat(path):
    """The label map S (H,W) of a .mat file."""
    try:
        from scipy.io import loadmat                               # only this script needs scipy
    except ImportError:
        raise UserError("reading .mat files needs scipy: pip install scipy, then start again.") from None
    try:
        return loadmat(path, variable_names=["S"])["S"]
    except Exception as error:                                     # scipy raises many types
        raise UserError(f"{path} cannot be read as a label file ({error!r}): unpack it again.") from None


def link_or_copy(source, target):
    """A hard link where the file system has them, else a copy; `target` appears only when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with replacing(target, "wb") as file:
            file.write(source.read_bytes())


def read_names(root):
    """{"train": names, "test": names} from ROOT/imageLists; UserError if a file of it is missing."""
    names = {}
    for split in ("train", "test"):
        path = root / "imageLists" / f"{split}.txt"
        if not path.is_file():
            raise UserError(f"{path} is missing: ROOT must be the unpacked cocostuff-10k-v1.1.zip with "
                            "imageLists/, images/ and annotations/ (see data/README.md).")
        names[split] = read_text(path).split()
    for folder, ending in (("images", ".jpg"), ("annotations", ".mat")):
        lost = [n for n in names["train"] + names["test"] if not (root / folder / (n + ending)).is_file()]
        if lost:
            raise UserError(f"{root / folder / (lost[0] + ending)} is missing, and {len(lost) - 1} more of "
                            "the listed files: unpack the download again.")
    return names


def prepare(root):
    """Convert what is not converted yet. Returns the number of images of each split."""
    names = read_names(root)
    jobs = [(split, name) for split in names for name in names[split]]
    for split, name in tqdm(jobs, desc="convert", disable=None):
        mask = root / "annotations" / f"{split}2014" / f"{name}_labelTrainIds.png"
        image = root / "images" / f"{split}2014" / f"{name}.jpg"
        if not mask.exists():
            path = root / "annotations" / f"{name}.mat"
            ids = to_train_ids(read_mat(path), path)
            with replacing(mask, "wb") as file:                    # complete or not there at all
                Image.fromarray(ids).save(file, "PNG")
        if not image.exists():
            link_or_copy(root / "images" / f"{name}.jpg", image)
    return {split: len(names[split]) for split in names}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the unpacked cocostuff-10k-v1.1.zip")
    root = parser.parse_args(argv).root
    print_any_name()
    try:
        counts = prepare(root)
    except UserError as error:
        print(f"prepare_cocostuff10k: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"ready: {counts['train']} training and {counts['test']} test images (of 9000 and 1000)")


if __name__ == "__main__":
    main()
