"""Toy birds as files; the birds themselves are drawn by common/toy_birds.py.

    python -m data.toy_birds --out runs/toy_birds          # both splits; open overview.png first
"""
import csv
import sys

from PIL import Image, ImageDraw, ImageFont

from common.toy_birds import PARTS, SPECIES, SPECIES_VARIANTS, SPLITS, VARIANTS, bird_index, make_bird
from data import toy_files


def overview(seed, cell=160, columns=6):
    """Contact sheet, a row per species: its name, six training pictures, the names of its variants."""
    font, left = ImageFont.load_default(size=18), 160
    sheet = Image.new("RGB", (left + columns * cell + 320, len(SPECIES) * cell), "white")
    draw = ImageDraw.Draw(sheet)
    for label, name in enumerate(SPECIES):
        top = label * cell
        draw.text((8, top + cell // 2 - 12), name, "black", font)
        for column in range(columns):
            bird = make_bird(seed, bird_index("train", label + column * len(SPECIES)))
            picture = Image.fromarray(bird["image"]).resize((cell - 4, cell - 4), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left + column * cell, top + 2))
        for row, (part, variant) in enumerate(zip(PARTS, SPECIES_VARIANTS[label])):
            text = f"{part}: {VARIANTS[part][variant]}"
            draw.text((left + columns * cell + 8, top + 16 + 26 * row), text, "black", font)
    return sheet


def write_birds(folder, seed, counts):
    """Write counts[split] pictures of every split, parts.csv, classes.txt and overview.png into a folder."""
    rows = [("split", "file", "species", "part", "variant", "variant_number", "x", "y", "visible")]
    for split, count in counts.items():
        for name in SPECIES:
            (folder / split / name).mkdir(parents=True)
        for i in range(count):
            bird = make_bird(seed, bird_index(split, i))
            file = f"{i:04d}.png"
            name = SPECIES[bird["label"]]
            Image.fromarray(bird["image"]).save(folder / split / name / file)
            parts = zip(PARTS, bird["variants"], bird["centres"], bird["visible"])
            rows += [(split, file, name, part, VARIANTS[part][v], v, f"{x:.2f}", f"{y:.2f}", int(visible))
                     for part, v, (x, y), visible in parts]
    with open(folder / "parts.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    overview(seed).save(folder / "overview.png")
    (folder / "classes.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(SPECIES)))


def main(arguments=None):
    """Command line; returns the exit code."""
    return toy_files.main("birds", "pictures", SPLITS, f"{len(SPECIES)} species", write_birds, arguments)


if __name__ == "__main__":
    sys.exit(main())
