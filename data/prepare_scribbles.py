"""Scribble masks for training: convert them, invent them from full masks, or weaken them.

    python -m data.prepare_scribbles xml FOLDER OUT                             # strokes of ScribbleSup
    python -m data.prepare_scribbles masks FOLDER OUT --seed 0                  # one stroke in every region
    python -m data.prepare_scribbles points FILE.json OUT --images FOLDER       # a disc at every point
    python -m data.prepare_scribbles weaken FOLDER OUT --drop 0.3 --shrink 0.5  # PFA, Fig. 8; PNG or XML

OUT must be new or empty. It gets an index PNG for every file, in the same sub-folders: class ids along the
strokes, 255 = unlabelled. They appear when all are complete. The work is done by common/strokes.py.
"""
import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.figures import CLASS_COLOURS, index_picture
from common.files import list_images, listing, new_folder, opened, read_index_map
from common.loaders import mixed_seed
from common.run import UserError, print_any_name
from common.strokes import (UNLABELLED, draw_strokes, read_strokes, scribbles_from_mask, weaken,
                            weaken_strokes)

COLOURS = CLASS_COLOURS.clone()                                    # for viewers
COLOURS[UNLABELLED] = 255                                          # white


def read_mask(path, unlabelled=UNLABELLED):
    """Mask file -> uint8 (H,W), any ids; the value `unlabelled` becomes 255. UserError: colours, 16 bits."""
    ids = read_index_map(path, 255).numpy()
    ids[ids == unlabelled] = UNLABELLED
    return ids


def mask_of(path, options):
    """One file of masks or strokes -> scribbles uint8 (H,W); its name without ending is part of the seed."""
    if options.command == "xml":
        (width, height), strokes = read_strokes(path)
        return draw_strokes(strokes, width, height)
    seed = mixed_seed(options.seed, path.stem)
    if options.command == "masks":
        return scribbles_from_mask(read_mask(path, options.unlabelled), seed)
    if path.suffix == ".png":
        return weaken(read_mask(path), options.drop, options.shrink, seed)
    (width, height), strokes = read_strokes(path)
    return draw_strokes(weaken_strokes(strokes, options.drop, options.shrink, seed), width, height)


def read_points(path):
    """JSON file {name: [{"x", "y", "cls"}]} -> {name: [(class id, point float (1,2))]}; UserError else."""
    try:
        content = json.loads(path.read_bytes())
        return {name: [(range(UNLABELLED).index(point["cls"]),           # ValueError: no class id
                        np.array([[float(point["x"]), float(point["y"])]])) for point in points]
                for name, points in content.items()}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: pass the JSON file of the points.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as a file of points ({type(error).__name__}: {error}): it "
                        'is damaged or not like {"NAME": [{"x": 10.5, "y": 20, "cls": 3}]}, with class ids '
                        "from 0 to 254.") from None


def discs(path, points, radius):
    """Points [(class id, (1,2))] in the image file `path` -> uint8 (H,W): discs of this radius in pixels."""
    with opened(path) as picture:
        return draw_strokes(points, *picture.size, 2 * radius + 1)


def write_masks(out, jobs, classes=None):
    """Write masks into the folder `out`, new or empty; jobs: {path below out: function -> uint8 (H,W)}.

    classes: ids to keep, what has another id becomes unlabelled; None = all. Returns the share of labelled
    pixels in percent and the class ids that occur. UserError as new_folder.
    """
    counts = np.zeros(256, np.int64)
    with new_folder(out) as folder:
        for path, draw in tqdm(jobs.items(), desc=str(out), disable=None):
            mask = draw()
            if classes is not None:
                mask = np.where(np.isin(mask, classes), mask, UNLABELLED).astype(np.uint8)
            counts += np.bincount(mask.ravel(), minlength=256)
            target = (folder / path).with_suffix(".png")
            target.parent.mkdir(parents=True, exist_ok=True)
            index_picture(mask, COLOURS).save(target)
    return 100 * counts[:UNLABELLED].sum() / counts.sum(), np.flatnonzero(counts[:UNLABELLED]).tolist()


def point_jobs(options):
    """Jobs of the command `points`: every image of the folder that the file names."""
    if options.radius < 0:
        raise UserError(f"--radius {options.radius}: choose 0 (single pixels) or more.")
    points = read_points(options.source)
    named = [path for path in list_images(options.images) if path.stem in points]
    if not named:
        raise UserError(f"{options.source} names none of the images in {options.images}: it has "
                        f"{', '.join(list(points)[:3]) or 'no names'}; pass the folder of these images.")
    return {path.name: partial(discs, path, points[path.stem], options.radius) for path in named}


def jobs_of(options):
    """What to write: {path below OUT: function -> uint8 (H,W)}."""
    if options.command == "points":
        return point_jobs(options)
    if not options.source.is_dir():
        raise UserError(f"{options.source} is no folder: pass the one that holds the masks or strokes.")
    patterns = {"xml": ["*.xml"], "masks": ["*.png"], "weaken": ["*.png", "*.xml"]}[options.command]
    for pattern in patterns:                                       # files of the first kind that occurs
        files = sorted(path for path in options.source.rglob(pattern) if path.name[0] != ".")
        if files:
            return {path.relative_to(options.source): partial(mask_of, path, options) for path in files}
    raise UserError(f"{options.source} holds no file {' or '.join(patterns)}: pass the folder of the "
                    f"masks or strokes; found there: {listing(options.source)}.")


def parse(argv):
    parser = argparse.ArgumentParser("python -m data.prepare_scribbles", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, source, text in (
            ("xml", "folder of ScribbleSup's XML files", "strokes of ScribbleSup -> masks"),
            ("masks", "folder of full masks", "full masks -> scribbles"),
            ("points", "JSON file of points", "points -> discs"),
            ("weaken", "folder of scribbles, PNG or XML", "scribble-drop and scribble-shrink")):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("source", type=Path, help=source)
        command.add_argument("out", type=Path, help="folder to write, new or empty")
        command.add_argument("--classes", type=int, nargs="+", metavar="ID",
                             help="class ids to keep, others become unlabelled (all)")
        if name in ("masks", "weaken"):
            command.add_argument("--seed", type=int, default=0, help="another seed, another result (0)")
    commands.choices["masks"].add_argument("--unlabelled", type=int, default=UNLABELLED,
                                           help="value of unlabelled pixels in the masks, besides 255")
    points, weaker = commands.choices["points"], commands.choices["weaken"]
    points.add_argument("--images", type=Path, required=True, help="folder of the images")
    points.add_argument("--radius", type=int, default=3, help="of the discs in pixels (3)")
    weaker.add_argument("--drop", type=float, default=0.0, help="share of the strokes to remove, 0 to 1")
    weaker.add_argument("--shrink", type=float, default=0.0, help="share of each stroke's length, 0 to 1")
    return parser.parse_args(argv)


def main(argv=None):
    """Command line; user mistakes become one sentence and exit code 2."""
    options = parse(argv)
    print_any_name()
    try:
        jobs = jobs_of(options)
        labelled, classes = write_masks(options.out, jobs, options.classes)
    except UserError as error:
        print(f"prepare_scribbles: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {len(jobs)} masks to {options.out}: {labelled:.2f} % of the pixels are labelled, class "
          f"ids {' '.join(map(str, classes)) or 'none'}")


if __name__ == "__main__":
    main()
