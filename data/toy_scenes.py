"""Toy scenes as files; the scenes themselves are drawn by common/toy_scenes.py.

    python -m data.toy_scenes --out runs/toy_scenes        # all splits; open overview.png first
"""
import csv
import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.figures import index_picture, palette
from common.toy_scenes import CLASSES, PARTS, SPLITS, UNLABELLED, make_scene, scene_index
from data import toy_files


def palettes():
    """Colours uint8 (256,3) of class ids, and of part ids (pale shades of the class's); 255 is white."""
    of_class = np.full((256, 3), 255, np.uint8)
    of_class[:len(CLASSES)] = palette(CLASSES)
    of_part = of_class.copy()
    of_part[0] = 60                                                                 # no part: dark grey
    owners = [part.split(":")[0] for part in PARTS]
    for i, owner in enumerate(owners[1:], start=1):
        pale = 0.22 * owners[:i].count(owner)
        of_part[i] = of_class[CLASSES.index(owner)] * (1 - pale) + 255 * pale
    return of_class, of_part


def overview(scenes):
    """Contact sheet, two scenes a row: image, mask, parts, scribbles over the paled image; legend below."""
    of_class, of_part = palettes()
    cell, top, font = 256, 30, ImageFont.load_default(size=18)
    height = top + (len(scenes) + 1) // 2 * cell
    sheet = Image.new("RGB", (8 * cell, height + 60), "white")
    draw = ImageDraw.Draw(sheet)
    for k, scene in enumerate(scenes):
        drawn = (scene["scribbles"] != UNLABELLED)[..., None]
        paled = scene["image"] // 2 + 127
        panels = {"image": scene["image"], "mask": of_class[scene["mask"]], "parts": of_part[scene["parts"]],
                  "scribbles": np.where(drawn, of_class[scene["scribbles"]], paled)}
        for j, (caption, panel) in enumerate(panels.items()):
            x, y = (k % 2 * 4 + j) * cell, top + k // 2 * cell
            draw.text((x + 4, 4), caption, "black", font)
            small = Image.fromarray(panel).resize((cell - 2, cell - 2), Image.Resampling.NEAREST)
            sheet.paste(small, (x, y))
    for i, name in enumerate(CLASSES):
        x = 8 + i * (8 * cell // len(CLASSES))
        draw.rectangle((x, height + 20, x + 20, height + 40), fill=tuple(of_class[i].tolist()))
        draw.text((x + 26, height + 18), name, "black", font)
    return sheet


def write_scenes(folder, seed, counts):
    """Write counts[split] scenes of every split, their tables and overview.png into an empty folder."""
    of_class, of_part = palettes()
    maps = {"masks": ("mask", of_class), "parts": ("parts", of_part), "scribbles": ("scribbles", of_class)}
    rows = [("split", "scene", "part_id", "part", "class_id", "x", "y")]
    for split, count in counts.items():
        for kind in ("images", *maps):
            (folder / kind / split).mkdir(parents=True)
        for i in range(count):
            scene = make_scene(seed, scene_index(split, i))
            stem = f"{i:04d}"
            Image.fromarray(scene["image"]).save(folder / "images" / split / f"{stem}.png")
            for kind, (key, palette) in maps.items():
                index_picture(scene[key], palette).save(folder / kind / split / f"{stem}.png")
            rows += [(split, stem, int(p), PARTS[int(p)], int(c), f"{x:.2f}", f"{y:.2f}")
                     for p, c, x, y in scene["part_centres"]]
    with open(folder / "part_centres.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    overview([make_scene(seed, i) for i in range(min(8, counts["train"]))]).save(folder / "overview.png")
    for file, names in (("parts.txt", PARTS), ("classes.txt", CLASSES)):
        (folder / file).write_text("".join(f"{i} {name}\n" for i, name in enumerate(names)))


def main(arguments=None):
    """Command line; returns the exit code."""
    contents = f"{len(CLASSES)} classes, {len(PARTS) - 1} parts"
    return toy_files.main("scenes", "scenes", SPLITS, contents, write_scenes, arguments)


if __name__ == "__main__":
    sys.exit(main())
