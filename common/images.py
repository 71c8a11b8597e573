"""Data for image classification: readers for four data sets (data/README.md), see open_images, and the views
that a network gets of them, for train_loader of common/loaders.py.

CUB and Stanford Cars have no validation images: split "val" is a share of every class's training images, and
split "train" is the others.
"""
import re
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from common import figures, toy_birds
from common.datasets import layout_error
from common.files import check_names, composed, images_in, others_in, read_image, read_list, tell_unread
from common.loaders import mixed_seed, to_device
from common.run import UserError
from common.transforms import MEAN, STD, normalise, seeded, warp

DATASETS = ("toy_birds", "cub", "cars", "imagefolder")
SPLITS = ("train", "val", "test")
NUMBER = r"\s+[-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?"         # after an id, in a list of CUB
TREES = {                                                # what a reader expects, where the data come from
    "cub": ("ROOT/images/CLASS/*.jpg, ROOT/{images,image_class_labels,train_test_split,bounding_boxes,"
            "classes}.txt, perhaps ROOT/parts/{parts,part_locs}.txt; ROOT = CUB_200_2011",
            "CUB_200_2011.tgz from data.caltech.edu/records/65de6-vp158"),
    "cars": ("ROOT/train/CLASS/*.jpg and ROOT/test/CLASS/*.jpg", "a mirror of Stanford Cars, sorted"),
    "imagefolder": ("ROOT/train/CLASS/* and ROOT/test/CLASS/*, perhaps ROOT/val/CLASS/*", "your own data"),
}


# ---- data sets -------------------------------------------------------------------------------------------

class ImageSet:
    """Images on disk, each with one label.

    Attributes: name, split, classes (names), num_classes, paths, labels (list of int), part_names (() if
    unknown), variants (None, or int (C,P): which variant of part p class c has).
    items: one (path, label, box, parts) per image. box: None, or x, y, width, height of what read() cuts
    out, in pixels. parts: () or float (P,3): x, y in pixels of the whole image, visible 1 or 0.
    """

    def __init__(self, name, split, classes, items, part_names=(), variants=None):
        self.name, self.split, self.items, self.variants = name, split, items, variants
        self.classes = list(classes)
        self.num_classes = len(self.classes)
        self.part_names = tuple(part_names)
        self.paths = [item[0] for item in items]
        self.labels = [item[1] for item in items]

    def __len__(self):
        return len(self.items)

    def name_of(self, i):
        """Class folder and file name without ending, and no slash: a name for an output file."""
        return f"{self.paths[i].parent.name}_{self.paths[i].stem}"

    def id_of(self, i):
        """FOLDER/CLASS/NAME.jpg, wherever the data lie and whatever its number: no other is called so."""
        return "/".join(self.paths[i].parts[-3:])

    def ids(self):
        return [self.id_of(i) for i in range(len(self))]

    def read(self, i):
        """Image uint8 (3,H,W) RGB, label int. UserError: damaged file, or a box outside the image."""
        path, label, box, _ = self.items[i]
        image = read_image(path)
        if box is not None:
            x0, y0, x1, y1 = box_corners(box)
            image = image[:, y0:y1, x0:x1].contiguous()  # a slice ends at the edge of the image
            if not image.numel():
                raise UserError(f"the bounding box of {path} (x, y, width, height = {str(box)[1:-1]}) lies "
                                "outside this image: correct its line in bounding_boxes.txt.")
        return image, label

    def part_locations(self, i):
        """float32 (P,3): x, y in pixels of the image that read(i) returns, visible 1 or 0; opens no image.

        A part outside the box is not visible. x, y of a part that is not visible mean nothing.
        """
        box, parts = self.items[i][2:]
        located = torch.tensor(parts, dtype=torch.float32).reshape(-1, 3)
        if box is not None:
            x0, y0, x1, y1 = box_corners(box)
            located[:, :2] -= torch.tensor([x0, y0])
            inside = (located[:, :2] >= 0) & (located[:, :2] < torch.tensor([x1 - x0, y1 - y0]))  # (P,2)
            located[:, 2] *= inside.all(1)
        return located


class ToyBirds(ImageSet):
    """Birds of common/toy_birds.py, each drawn once. paths is None; an item begins with the bird's number
    within `part`, which is train or test."""

    def __init__(self, split, items, part):
        super().__init__("toy_birds", split, toy_birds.SPECIES, items, toy_birds.PARTS,
                         toy_birds.SPECIES_VARIANTS)
        self.part = part
        self.paths = None
        self.birds = [None] * len(items)                 # those drawn so far

    def name_of(self, i):
        return f"{self.classes[self.labels[i]]}_{self.items[i][0]:04d}"     # as python -m data.toy_birds

    def id_of(self, i):
        return f"{self.part}/{self.name_of(i)}"

    def bird(self, i):
        if self.birds[i] is None:
            self.birds[i] = toy_birds.make_bird(0, toy_birds.bird_index(self.part, self.items[i][0]))
        return self.birds[i]

    def read(self, i):
        return torch.from_numpy(self.bird(i)["image"]).permute(2, 0, 1).contiguous(), self.labels[i]

    def part_locations(self, i):
        bird = self.bird(i)
        return torch.tensor(np.column_stack([bird["centres"], bird["visible"]]), dtype=torch.float32)


def box_corners(box):
    """x, y, width, height -> int x0, y0, x1, y1, ends exclusive: fractions are cut off, none is below 0."""
    x, y, width, height = box
    return tuple(max(0, int(value)) for value in (x, y, x + width, y + height))


# ---- CUB-200-2011: lists whose lines begin with the id of an image, a class or a part --------------------

def read_table(root, file, columns=None, ids=()):
    """Lines "ID NUMBER ..." with so many `columns` after the id -> float64 (lines, 1 + columns); without
    columns, lines "ID TEXT" -> {id: text}.

    UserError if there is no such file in root, for the first line that is not of this kind, or for the first
    of `ids` that has no line.
    """
    path = root / file
    if not path.is_file():
        raise layout_error("cub", root, f"the list {file} is missing", TREES)
    pattern = r"\d+\s+\S.*" if columns is None else r"\d+" + NUMBER * columns
    expected = "an id and a name" if columns is None else f"an id and {columns} numbers"
    matches = re.compile(pattern).fullmatch
    lines = read_list(path)
    for number, line in enumerate(lines, 1):
        if not matches(line):
            raise UserError(f"{path}, line {number} ({line[:60]!r}): expected {expected}; correct this "
                            "line, or unpack the download again.")
    if columns is None:
        return {int(key): text for key, text in (line.split(maxsplit=1) for line in lines)}
    table = np.fromstring(" ".join(lines), sep=" ").reshape(-1, 1 + columns)
    missing = sorted(set(ids) - set(table[:, 0].tolist()))
    if missing:
        raise UserError(f"{path} has no line for {len(missing)} of {len(ids)} images of images.txt, such as "
                        f"{missing[0]}: unpack the download again.")
    return table


def cub_parts(root, images):
    """The folder parts/ -> names of the P parts, {image id: (P,3) x, y, visible}; without it (), {}."""
    if not (root / "parts").is_dir():
        return (), {}
    names = read_table(root, "parts/parts.txt")
    table = read_table(root, "parts/part_locs.txt", 4)                   # image, part, x, y, visible
    image, part = table[:, :2].astype(int).T
    located = np.zeros((1 + max([*images, *image]), 1 + max([*names, *part]), 3))   # by their ids
    located[image, part] = table[:, 2:]
    return tuple(names.values()), dict(zip(images, located[list(images)][:, list(names)]))


def cub_items(root, full_images):
    """-> class names, part names, {"train": items, "test": items} in the order of images.txt."""
    root = root / "CUB_200_2011" if (root / "CUB_200_2011").is_dir() else root
    files = read_table(root, "images.txt")               # {image id: CLASS/NAME.jpg}
    classes = read_table(root, "classes.txt")            # {class id: name}
    images = root / "images"
    existing = {composed(path.relative_to(images).as_posix()): path for path in images.glob("*/*")}
    missing = [file for file in files.values() if file not in existing]
    if missing:
        raise layout_error("cub", root, f"images/ lacks {len(missing)} of {len(files)} images of "
                           f"images.txt, such as {missing[0]}", TREES)
    class_of = dict(read_table(root, "image_class_labels.txt", 1, files).tolist())
    mark_of = dict(read_table(root, "train_test_split.txt", 1, files).tolist())
    boxes = [] if full_images else read_table(root, "bounding_boxes.txt", 4, files).tolist()
    box_of = {i: box for i, *box in boxes}
    part_names, parts_of = cub_parts(root, files)
    label_of = {key: label for label, key in enumerate(classes)}
    items = {"train": [], "test": []}
    for i, file in files.items():
        key, mark = class_of[i], mark_of[i]
        if key not in label_of or mark not in (0, 1):
            raise UserError(f"image {i} of {root} has class {key:g} and split mark {mark:g}: the class must "
                            "stand in classes.txt, the mark must be 1 (train) or 0 (test).")
        items["train" if mark else "test"].append((existing[file], label_of[key], box_of.get(i),
                                                   parts_of.get(i, ())))
    names = [re.sub(r"^\d+\.", "", name).replace("_", " ") for name in classes.values()]
    check_names(root / "classes.txt", names)
    for part in items:
        empty = sorted(set(range(len(names))) - {item[1] for item in items[part]})
        if empty:
            raise UserError(f"cub: {len(empty)} classes of {root}, such as {names[empty[0]]}, have no "
                            f"{part} image: correct train_test_split.txt, or take them out of all lists.")
    return names, part_names, items


def folder_items(name, root, parts):
    """ROOT/PART/CLASS/* -> class names, sorted, and {part: items} sorted by class and file name."""
    classes, items = {}, {}
    for part in parts:
        if not (root / part).is_dir():
            raise layout_error(name, root, f"the folder {part}/ is missing", TREES)
        folders = sorted((composed(folder.name), folder) for folder in (root / part).glob("[!.]*")
                         if folder.is_dir() and folder.name != "__MACOSX")
        classes[part] = [label for label, _ in folders]
        if not folders:
            raise layout_error(name, root, f"{part}/ must hold a folder for each class, but has none", TREES)
        check_names(root / part, classes[part])
        odd = sorted(set(classes[part]) ^ set(classes[parts[0]]))
        if odd:
            raise layout_error(name, root, f"only one of {parts[0]}/ and {part}/ has the class {odd[0]} "
                               f"({len(odd)} such classes)", TREES)
        items[part] = [(path, label, None, ()) for label, (_, folder) in enumerate(folders)
                       for path in images_in(folder)]
        unread = [file for file in others_in(root / part, ()) if file[-1] != "/"]      # in no class's folder
        unread += [f"{folder.name}/{file}" for _, folder in folders for file in others_in(folder)]
        tell_unread(root / part, unread)
    return classes[parts[0]], items


# ---- opening, splits -------------------------------------------------------------------------------------

def share_of_training(items, classes, split, seed, val_fraction):
    """The items of split train or val: of every class val_fraction (rounded, at least one) are val."""
    if val_fraction == 0:
        if split == "val":
            raise UserError("val_fraction 0 leaves no image to choose by: give --val-fraction up to 0.5, or "
                            "--select-on-test.")
        return items
    val = set()                                          # places in items
    for label, name in enumerate(classes):
        members = [i for i, item in enumerate(items) if item[1] == label]
        if len(members) < 2:
            raise UserError(f"the class {name} has a single training image, so none can be set apart for "
                            "val: add images, take the class out, or give --select-on-test instead.")
        generator = torch.Generator().manual_seed(mixed_seed(seed, "val", label))
        order = torch.randperm(len(members), generator=generator).tolist()
        count = max(1, int(val_fraction * len(members) + 0.5))
        val.update(members[k] for k in order[:count])
    return [item for i, item in enumerate(items) if (i in val) == (split == "val")]


def open_images(name, root, split, seed=0, val_fraction=0.1, full_images=False):
    """Data set `name` of DATASETS in the folder `root` -> ImageSet, its layout checked.

    split: train, val or test. seed: of the choice of val images. toy_birds has no root ("").
    full_images: cub without cutting the images to their boxes; the others are always whole.
    UserError says what is missing, what was found, and where the data come from.
    """
    for what, value, choice in (("data set", name, DATASETS), ("split", split, SPLITS)):
        if value not in choice:
            raise UserError(f"there is no {what} {value!r}: choose one of {', '.join(choice)}.")
    if not 0 <= val_fraction <= 0.5:
        raise UserError(f"val_fraction is {val_fraction}: it must be between 0 and 0.5.")
    part = "test" if split == "test" else "train"
    part_names = ()
    if name == "toy_birds":
        if root:
            raise UserError(f"toy_birds are drawn in memory and do not read {root}: leave the folder out, "
                            "or use --dataset imagefolder for files on disk.")
        classes = toy_birds.SPECIES
        items = {part: [(i, toy_birds.bird_index(part, i) % len(classes), None, ())
                        for i in range(toy_birds.SPLITS[part])]}
    elif not root:
        raise UserError(f"{name} needs a folder (--data ROOT): {TREES[name][0]}; source: {TREES[name][1]} "
                        "(see data/README.md).")
    elif name == "cub":
        classes, part_names, items = cub_items(Path(root).expanduser(), full_images)
    else:
        root = Path(root).expanduser()
        val_folder = ["val"] if name == "imagefolder" and (root / "val").is_dir() else []
        classes, items = folder_items(name, root, ["train", "test", *val_folder])
    if split != "test" and "val" not in items:
        items[split] = share_of_training(items["train"], classes, split, seed, val_fraction)
    figures.know_classes(classes)
    if name == "toy_birds":
        return ToyBirds(split, items[split], part)
    return ImageSet(name, split, classes, items[split], part_names)


# ---- views: what a network sees of a data set ------------------------------------------------------------

class CleanView(Dataset):
    """Samples as they are: view[i] -> x float32 (3,size,size) normalised, label int.

    The whole image is resized to a square (aspect not kept, nothing cropped), bilinear with antialiasing.
    """

    def __init__(self, data, size):
        self.data, self.size = data, size

    def __len__(self):
        return len(self.data)

    def square(self, i):                                 # -> uint8 (3,size,size), label
        image, label = self.data.read(i)
        return F.resize(image, [self.size, self.size], antialias=True), label

    def __getitem__(self, i):
        image, label = self.square(i)
        return normalise(image), label


class TrainView(CleanView):
    """Augmented samples: view[(index, sample_seed)] -> image uint8 (3,size,size), a matrix (3,3) for the
    warp that is still to be done (see training_input), label; same key, same sample.

    augment: uint8 (3,size,size) -> the same, and the matrix; random through torch's CPU generator only.
    """

    def __init__(self, data, size, augment):
        super().__init__(data, size)
        self.augment = augment

    def __getitem__(self, key):
        index, sample_seed = key
        image, label = self.square(index)
        with seeded(sample_seed):
            return *self.augment(image), label


def training_input(batch, device):
    """A batch of a TrainView -> x float32 (B,3,size,size) normalised, labels (B,), both on the device, which
    does the warping: in a loader process that takes longer than all else (3 ms at 224 pixels)."""
    warps = bool((batch[1] != torch.eye(3)).any())       # asked on the CPU: no synchronisation
    images, matrices, labels = to_device(batch, device)
    images = warp(images, matrices) if warps else images.float()
    x = torch.stack([(images[:, c] - MEAN[c]) / STD[c] for c in range(3)], 1)
    return x.contiguous(memory_format=torch.channels_last), labels


def network_input(image, size, device):
    """uint8 (3,H,W) -> float32 (1,3,size,size) on the device: what a CleanView shows of it, as a batch."""
    return normalise(F.resize(image, [size, size], antialias=True))[None].to(device)
