"""Where the parts of objects are: annotations that tell which part of an object a prototype looks at.

open_parts gives one of three kinds, which share these attributes and methods:

num_parts     Q; part ids are 1..Q, and in Panoptic-Parts files an id means another part in each class
classes       sorted list of the class ids that have parts
has(i)        bool: image i of `data` has part labels
keypoints(i)  float32 (K,4): class id, part id, x, y: whole pixels inside the image at its own size; K may be
              0, and is where not has(i)
part_map(i)   uint8 (H,W) part ids, 0 = no part; None for a keypoint file and where not has(i)
"""
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import toy_scenes
from common.datasets import CLASSES
from common.files import IGNORE, composed, listing, load_picture
from common.regions import connected_components
from common.run import UserError

CHECKED = []                                 # files of check_parts: the rows of a table share them
# Names of the parts in the order of their ids. "engine*10": the files number the engines of an image with
# ten ids in a row, which are all read as this one part.
HUMAN, VEHICLE = "torso head arm leg", "window wheel light license_plate chassis"
STREET_VEHICLE = ("front left_side right_side back roof left_mirror right_mirror front_plate back_plate "
                  "door*10 wheel*10 headlight*10 window*20")
FACE = "head left_eye right_eye left_ear right_ear"
PAWS = ("torso neck left_front_leg left_front_paw right_front_leg right_front_paw left_back_leg "
        "left_back_paw right_back_leg right_back_paw tail")
LEGS = ("torso neck left_front_upper_leg left_front_lower_leg right_front_upper_leg right_front_lower_leg "
        "left_back_upper_leg left_back_lower_leg right_back_upper_leg right_back_lower_leg tail")
PANOPTIC_PARTS = {                           # data set: {semantic id in the files: (class name, part names)}
    "cityscapes": {24: ("person", HUMAN), 25: ("rider", HUMAN), 26: ("car", VEHICLE), 27: ("truck", VEHICLE),
                   28: ("bus", VEHICLE)},
    "voc": {CLASSES["voc"].index(name): (name, names) for name, names in {
        "aeroplane": "body stern left_wing right_wing tail engine*10 wheel*10",
        "bicycle": "front_wheel back_wheel saddle handlebar chainwheel headlight",
        "bird": "head left_eye right_eye beak torso neck left_wing right_wing left_leg left_foot right_leg "
                "right_foot tail",
        "bottle": "cap body",
        "bus": STREET_VEHICLE,
        "car": STREET_VEHICLE,
        "cat": f"{FACE} nose {PAWS}",
        "cow": f"{FACE} muzzle left_horn right_horn {LEGS}",
        "dog": f"{FACE} nose {PAWS} muzzle",
        "horse": f"{FACE} muzzle left_front_hoof right_front_hoof left_back_hoof right_back_hoof {LEGS}",
        "motorbike": "front_wheel back_wheel handlebar saddle headlight*10",
        "person": f"{FACE} left_eyebrow right_eyebrow nose mouth hair torso neck left_lower_arm "
                  "left_upper_arm left_hand right_lower_arm right_upper_arm right_hand left_lower_leg "
                  "left_upper_leg left_foot right_lower_leg right_upper_leg right_foot",
        "pottedplant": "pot plant",
        "sheep": f"{FACE} muzzle left_horn right_horn {LEGS}",
        "train": "head head_front head_left_side head_right_side head_back head_roof headlight*10 coach*10 "
                 "coach_front*10 coach_left_side*10 coach_right_side*10 coach_back*10 coach_roof*10",
        "tvmonitor": "screen frame",
    }.items()},
}
FILES = {"cityscapes": ("gtFinePanopticParts", "_gtFinePanopticParts.tif"), "voc": ("labels", ".tif")}


# ---- from part maps to keypoints -------------------------------------------------------------------------

def part_centroids(part_map, class_map):
    """One keypoint for each connected piece of a part: float32 (K,4): class id, part id, x, y, by ids.

    part_map, class_map: uint8 (H,W); part 0 and class 255 are nothing. A piece is what touches at sides or
    corners with the same class and part. x, y: mean of its pixels, rounded; this need not be one of them.
    """
    parts, classes = np.asarray(part_map), np.asarray(class_map)
    ids = np.where((parts > 0) & (classes != IGNORE), classes.astype(np.int32) * 256 + parts, 0)
    pieces = connected_components(ids)
    y, x = pieces.nonzero()
    piece = pieces[y, x] - 1                             # 0..K-1
    area = np.bincount(piece)                            # number of pixels, which have one id
    key, x, y = (np.bincount(piece, values) / area for values in (ids[y, x], x, y))
    rows = np.stack([key // 256, key % 256, np.rint(x), np.rint(y)], axis=1)
    return rows[np.argsort(key, kind="stable")].astype(np.float32)


# ---- files -----------------------------------------------------------------------------------------------

def panoptic_files(data, path):
    """The label file of each image, None for an image without one; UserError if all have none."""
    inner, tail = FILES[data.name]
    folder = path / inner if (path / inner).is_dir() else path
    stems = [composed(data.name_of(i)).removesuffix("_leftImg8bit") for i in range(len(data))]
    file_of = {}                                         # stem -> label file
    for file in sorted(folder.rglob(f"*{tail}")):
        stem = composed(file.name.removesuffix(tail))
        if stem in file_of and stem in stems:
            raise UserError(f"--parts {path} holds both {file_of[stem]} and {file}: keep one of them, or "
                            "pass the folder of one.")
        file_of[stem] = file
    files = [file_of.get(stem) for stem in stems]
    if not any(files):
        example = f", such as {next(iter(file_of.values()))}" if file_of else ""
        raise UserError(f"--parts {path}: no label file of the {len(data)} images of {data.name} "
                        f"{data.split}: looked for files such as {stems[0]}{tail} below {folder}, which has "
                        f"{len(file_of)} files *{tail}{example}; found there: {listing(folder)}; see "
                        "data/README.md.")
    return files


def decode_panoptic(ids):
    """Ids of 7 digits, semantic (2), instance (3), part (2), or without the last 2 or 5 of them -> semantic
    ids, part ids (0 = none). All int32 (H,W)."""
    full = np.where(ids < 100, ids * 100_000, np.where(ids < 100_000, ids * 100, ids))
    return full // 100_000, full % 100


def read_panoptic(path):
    """Label file -> semantic ids, part ids (0 = none), int32 (H,W). UserError: damaged file, other ids."""
    picture = load_picture(path)
    if picture.mode != "I":
        raise UserError(f"{path} is no Panoptic-Parts label file, which has one 32-bit integer a pixel "
                        f"(this one has mode {picture.mode}): get the original .tif files.")
    ids = np.array(picture)
    bad = np.unique(ids[(ids < 0) | (ids >= 100) & (ids < 1000) | (ids >= 10_000_000)]).tolist()
    if bad:
        raise UserError(f"{path} has the pixel values {str(bad[:5])[1:-1]}, which are no ids of the "
                        "Panoptic-Parts format (0..99, 1000..9999999): get the original .tif files.")
    return decode_panoptic(ids)


def read_keypoint_file(path):
    """-> {category name: keypoint names}, {stem of every image: [(category name, points (K,3): x, y,
    visible)]}. UserError for a damaged file."""
    try:
        content = json.loads(path.read_bytes())
        categories = {entry["id"]: (str(entry["name"]), [str(name) for name in entry["keypoints"]])
                      for entry in content["categories"]}
        stem_of = {str(number): composed(Path(name).stem) for number, name in content["images"].items()}
        noted = {stem: [] for stem in stem_of.values()}
        for annotation in content["annotations"]:
            category, names = categories[annotation["category_id"]]
            points = np.array(annotation["keypoints"], dtype=float)
            if points.shape != (len(names), 3):
                raise ValueError(f"{category} has {len(names)} keypoints, but an annotation of image "
                                 f"{annotation['image_id']} has the shape {points.shape}")
            noted[stem_of[str(annotation["image_id"])]].append((category, points))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as a keypoint file ({type(error).__name__}: {error}): it is "
                        "damaged, or not of the format that data/README.md shows.") from None
    return dict(categories.values()), noted


# ---- the three kinds -------------------------------------------------------------------------------------

class PartMaps:
    """Parts of which there are maps: read(i) gives the part ids and class ids of an image, uint8 (H,W)."""
    last = None, None                                    # the image asked for last, what read gave

    def maps(self, i):
        if self.last[0] != i:                            # whoever wants keypoints wants the map, too
            self.last = i, self.read(i)
        return self.last[1]

    def keypoints(self, i):
        return torch.from_numpy(part_centroids(*self.maps(i))) if self.has(i) else torch.zeros(0, 4)

    def part_map(self, i):
        return torch.from_numpy(self.maps(i)[0]) if self.has(i) else None


class ToyParts(PartMaps):
    """Parts of toy_scenes, from the generator; every image has them."""

    def __init__(self, data):
        self.data, self.num_parts = data, len(toy_scenes.PARTS) - 1
        self.classes = sorted(toy_scenes.CLASSES.index(name) for name in toy_scenes.OBJECTS)

    def has(self, i):
        return True

    def read(self, i):
        scene = toy_scenes.make_scene(self.data.seed, toy_scenes.scene_index(self.data.split, i))
        return scene["parts"], scene["mask"]


class PanopticParts(PartMaps):
    """Label files of Cityscapes-Panoptic-Parts or PASCAL-Panoptic-Parts below the folder `path`.

    A pixel's class is that of data.read_mask; its part counts only where the label file names this class. An
    id that is no part of the pixel's class counts as no part.
    """

    def __init__(self, data, path):
        self.data = data
        self.class_of = np.full(100, IGNORE, np.uint8)   # semantic id -> class id
        self.part_of = np.zeros((100, 100), np.uint8)    # semantic id, part id in the files -> part id
        self.names = {}                                  # class id -> names of its parts
        for semantic, (name, parts) in PANOPTIC_PARTS[data.name].items():
            names, _, counts = zip(*(part.partition("*") for part in parts.split()))
            ids = np.repeat(np.arange(len(names)) + 1, [int(count or 1) for count in counts])
            self.part_of[semantic, 1:len(ids) + 1] = ids
            self.class_of[semantic] = data.classes.index(name)
            self.names[data.classes.index(name)] = names
        self.classes, self.num_parts = sorted(self.names), int(self.part_of.max())
        self.files = panoptic_files(data, path)          # a path or None for each image

    def has(self, i):
        return self.files[i] is not None

    def read(self, i):
        semantic, part = read_panoptic(self.files[i])
        mask = self.data.read_mask(i).numpy()
        if semantic.shape != mask.shape:
            (h, w), (mask_h, mask_w) = semantic.shape, mask.shape
            raise UserError(f"{self.files[i]} is {w} x {h} pixels, but the mask {self.data.paths[i][1]} of "
                            f"this image is {mask_w} x {mask_h}: both must have the same size, so get the "
                            "label files that belong to these images.")
        return self.part_of[semantic, part] * (self.class_of[semantic] == mask), mask

    def check(self, i):
        """UserError as read; returns nothing, for a loader."""
        self.read(i)


class KeypointParts:
    """Keypoints in the JSON format of Animal-Pose; a category is the class of `data` with the same name."""

    def __init__(self, data, path):
        categories, noted = read_keypoint_file(path)
        known = {c: names for c, names in categories.items() if c in data.classes}
        if not known:
            raise UserError(f"{path}: no category ({', '.join(categories) or 'none there'}) is a class of "
                            f"{data.name}: name them like its classes ({', '.join(data.classes)}).")
        self.data, self.noted = data, noted
        if not any(map(self.has, range(len(data)))):
            raise UserError(f"{path} lists none of the {len(data)} images of {data.name} {data.split}: "
                            f"looked for names such as {data.name_of(0)}, but it has "
                            f"{', '.join(list(noted)[:3]) or 'none'}; pass the file of these images.")
        self.part_names = list(dict.fromkeys(name for names in known.values() for name in names))
        self.num_parts = len(self.part_names)
        self.classes = sorted(data.classes.index(name) for name in known)
        self.ids = {c: [self.part_names.index(name) + 1 for name in names] for c, names in known.items()}

    def has(self, i):
        return composed(self.data.name_of(i)) in self.noted

    def keypoints(self, i):
        noted = self.noted.get(composed(self.data.name_of(i)), ())
        rows = np.array([(self.data.classes.index(category), part, x, y)
                         for category, points in noted if category in self.ids
                         for part, (x, y, visible) in zip(self.ids[category], points) if visible > 0])
        rows = rows.reshape(-1, 4).round().astype(np.float32)
        height, width = self.data.read_mask(i).shape
        inside = (rows[:, 2:] >= 0) & (rows[:, 2:] < (width, height))                               # (K,2)
        return torch.from_numpy(rows[inside.all(1)])

    def part_map(self, i):
        return None


def open_parts(data, path=""):
    """Parts of the images of a SegmentationSet, as described on top; None where there are none and no path.

    path: a folder of Panoptic-Parts label files (cityscapes, voc), or a keypoint file that ends in .json
    (voc). toy_scenes take none. UserError says what is missing or wrong, and with which file.
    """
    if not path:
        return ToyParts(data) if data.name == "toy_scenes" else None
    if data.name not in PANOPTIC_PARTS:
        raise UserError(f"--parts is for cityscapes and voc, not for {data.name}: leave it out.")
    path = Path(path).expanduser()
    keypoint_file = path.is_file() and path.suffix.lower() == ".json"
    if not keypoint_file and not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        raise UserError(f"--parts {path} {problem}: pass the folder of the Panoptic-Parts label files "
                        "(.tif), or for voc a keypoint file (.json); see data/README.md.")
    if keypoint_file and data.name != "voc":
        raise UserError(f"--parts {path}: a keypoint file is for voc only; for {data.name} pass the folder "
                        f"{FILES[data.name][0]}.")
    return KeypointParts(data, path) if keypoint_file else PanopticParts(data, path)


def check_parts(data, cfg):
    """UserError now, not after the training, if a part file of these images cannot be read.
    cfg: parts, workers."""
    parts = open_parts(data, cfg.parts)
    if isinstance(parts, PanopticParts) and parts.files not in CHECKED:
        with_files = [i for i in range(len(data)) if parts.has(i)]
        loader = DataLoader(with_files, batch_size=None, collate_fn=parts.check, num_workers=cfg.workers,
                            generator=torch.Generator())
        other = os.environ.get("RANK", "0") != "0" or None              # a process that shows no bar
        for _ in tqdm(loader, "read part files", leave=False, disable=other):
            pass
        CHECKED.append(parts.files)
