"""Toy birds: small pictures of 12 invented species, for fine-grained classification without a download.

A species is a combination of one head, beak, wing, tail and belly, and species *share* these variants: every
variant belongs to at least two species, and two species differ in two parts or more (SPECIES_VARIANTS). It
is known which part prototypes a model with a shared pool should find, and which classes should share them.

A bird is a pile of polygons in one *index map*, as in common/toy_scenes.py: picture, part centres and
visibility are look-ups in that map, so they agree by construction.

Easy: a variant is told from its colour and pattern alone, and the parts lie apart from each other.
Hard, on purpose: no single part tells the species; place, side, size and tilt vary, and so do light, colours
and noise; colours occur in several parts; the body's colour tells nothing; a leaf may hide a part.
"""
import numpy as np
from PIL import Image

from common.toy_scenes import WOOD, box, disc, paint, pick_colour, rotation

SPLITS = {"train": 720, "test": 240}                           # pictures per split
FIRST_INDEX = {"train": 0, "test": 120_000}                    # splits share no picture; multiples of 12
SIZE_FACTORS = (0.75, 1.15)                                    # smallest and largest bird
UNIT = 0.9                                                     # pixels per unit of length below, at 96x96
HIDDEN = 0.09                                                  # how often a leaf covers one part
CUT = 0.05                                                     # how often the tail sticks out of the picture
MIN_PIXELS = 6                                                 # a part seen in fewer pixels is not visible

# ---- what there is to draw --------------------------------------------------------------------------------
# A bird that faces right: x to the right, y up, about 80 units long. A variant is a list of
# (base colour, corners in units of the part's own frame).
PLACE = {                                                      # where a part's frame lies: x, y, degrees
    "head": (20, 17, 0), "beak": (20, 17, 0),                  # x to the beak
    "wing": (0, 8, 210),                                       # x to the wing's tip, y to the belly
    "tail": (-15, -9, 213),                                    # x to the tail's tip
    "belly": (11, -6, 35),                                     # x to the breast
}
PAINTING_ORDER = ("tail", "body", "belly", "wing", "head", "beak")
SWING = {"head": 7, "wing": 8, "tail": 7, "belly": 4}          # degrees; the beak turns with the head
RED, BLACK, WHITE = (206, 36, 42), (34, 34, 40), (246, 244, 238)
CREAM, BROWN, PURPLE = (238, 222, 184), (118, 72, 38), (136, 66, 170)

SKULL = disc(0, 0, 9.5, 9)
EYE = (BLACK, disc(3.5, 1, 1.8, 1.8))
WING = [(-1, -5), (6, -7), (15, -6), (27, 0), (18, 4.5), (8, 7), (0, 5)]
BREAST = disc(0, 0, 11, 9)
SPOTS = [(5, -3), (6, 3), (11, 0), (16, -3), (16, 2), (21, -.5)]
STREAKS = [(-7, 0), (-3.5, 4), (-3.5, -4), (0, 0), (3.5, 4), (3.5, -4), (7, 0)]

DRAWINGS = {
    "head": {
        "red crown": [((128, 118, 104), SKULL), EYE,
                      (RED, [(-9.6, 0), (-8, 7), (-3, 10.5), (3, 10.5), (8, 6.5), (9, 3.5), (-3, 3.5)])],
        "black with a white eye ring": [(BLACK, SKULL), (WHITE, disc(3, .5, 4.8, 4.8)),
                                        (BLACK, disc(3, .5, 2.4, 2.4))],
        "white with a dark eye stripe": [
            (WHITE, SKULL), (BLACK, [(-9.6, -2), (-9, 4.4), (2, 4.6), (9, 2.5), (9, -1.5), (2, -2.6)]),
            (CREAM, disc(3.5, 1, 1.2, 1.2))],
        "purple crest": [(PURPLE, SKULL), (WHITE, disc(3.5, 1, 2.6, 2.6)), EYE, (PURPLE, [
            (0, 7), (-4, 16), (-7, 9), (-13, 14), (-10, 5), (-16, 6), (-9, -1)])]},
    "beak": {
        "long orange needle": [((244, 146, 26), [(7, 2), (7, -2.6), (24, -1.6)])],
        "short grey cone": [((128, 140, 156), [(7, 6), (7, -6), (20, -1)]),
                            (BLACK, [(8, -.2), (19, -1), (8, -1.6)])],
        "red hook": [(RED, [(7, 4.5), (13, 4.5), (18.5, 1.5), (20, -7), (15.5, -2.5), (8, -4)])]},
    "wing": {
        "dark with two white bars": [(BLACK, WING), (WHITE, box(5.5, -6.6, 9, 6.4)),
                                     (WHITE, box(13.5, -6, 17, 4.6))],
        "plain blue": [((52, 104, 208), WING)],
        "brown with pale spots": [(BROWN, WING)] + [(CREAM, disc(x, y, 1.7, 1.7)) for x, y in SPOTS],
        "green with a yellow edge": [((52, 128, 70), WING), ((248, 218, 64), [
            (-.5, 2), (8, 3), (17, .5), (27, 0), (18, 4.5), (8, 7), (0, 5)])]},
    "tail": {
        "black fork": [(BLACK, [(0, -3), (12, -5), (27, -10), (16, 0), (27, 10), (12, 5), (0, 3)])],
        "long thin red": [(RED, [(0, -2.6), (27, -3), (29, 0), (27, 3), (0, 2.6)])],
        "striped fan": [(CREAM, [(0, -3), (21, -11), (24, -6), (25, 0), (24, 6), (21, 11), (0, 3)]),
                        (BROWN, [(8, -6), (11, -7), (11, 7), (8, 6)]),
                        (BROWN, [(15, -8.6), (18, -9.8), (18, 9.8), (15, 8.6)])],
        "teal with a white tip": [((30, 150, 150), box(0, -5.5, 18, 5.5)), (WHITE, box(17, -6, 24, 6))]},
    "belly": {
        "plain yellow": [((248, 208, 44), BREAST)],
        "white with dark streaks": [(WHITE, BREAST)] + [
            ((66, 52, 48), box(x - .8, y - 2.4, x + .8, y + 2.4)) for x, y in STREAKS],
        "orange with a dark band": [((242, 130, 36), BREAST), (BLACK, box(-2.4, -8.8, 2.4, 8.8))],
        "pink with white spots": [((226, 112, 150), BREAST)] + [
            (WHITE, disc(x, y, 1.6, 1.6)) for x, y in STREAKS]},
}
PARTS = tuple(DRAWINGS)
VARIANTS = {part: tuple(DRAWINGS[part]) for part in PARTS}
SPECIES = ["alder_robin", "brook_finch", "cliff_swift", "dune_lark", "elm_warbler", "fen_bunting",
           "grove_thrush", "heath_tit", "island_martin", "juniper_jay", "karst_pipit", "lake_wren"]
SPECIES_VARIANTS = np.array([                                  # (12,5) variant of each part
    [0, 1, 0, 2, 2], [0, 2, 0, 2, 3], [0, 2, 2, 0, 2], [1, 0, 3, 2, 1], [1, 1, 0, 1, 2], [1, 2, 1, 0, 3],
    [2, 0, 1, 3, 1], [2, 1, 2, 1, 3], [2, 2, 2, 1, 0], [3, 0, 1, 3, 0], [3, 0, 3, 0, 0], [3, 1, 3, 3, 1]])

BODY = [(122, 122, 128), (150, 132, 110), (112, 118, 92), (94, 104, 122), (160, 152, 144)]
LEGS = [(70, 60, 56), (150, 110, 70), (104, 98, 100)]
LEAF = [(72, 112, 52), (100, 132, 62), (140, 122, 52), (50, 86, 58)]
BACKDROPS = [                                                  # colours at the top and at the bottom
    ((140, 186, 232), (214, 224, 228)), ((176, 196, 214), (232, 214, 190)),        # sky
    ((66, 104, 58), (140, 164, 92)), ((150, 172, 110), (84, 112, 70)),             # leaves
    ((220, 202, 166), (178, 152, 114))]                                            # sand


def bird_index(split, i):
    """Index for make_bird of picture i of a split: train starts at 0, test at 120000; species i % 12."""
    if split not in FIRST_INDEX or not 0 <= i < 100_000:
        raise ValueError(f"no bird {i} in split {split!r}: there are train and test, 0 to 99999")
    return FIRST_INDEX[split] + i


# ---- the pile of polygons ---------------------------------------------------------------------------------
# A shape is (corners (n,2), colour (3,), part number or -1).

def oval(x, y, rx, ry):
    """Corners (15,2) of a leaf: an ellipse with a tip."""
    return np.concatenate([disc(x, y, rx, ry), [(x + 1.4 * rx, y)]])


def bird_shapes(rng, variants):
    """The bird in units, facing right: its shapes in painting order, sometimes with a leaf on one part."""
    turn = {part: rng.uniform(-limit, limit) for part, limit in SWING.items()}
    turn["beak"] = turn["head"]
    hidden = PARTS[rng.integers(len(PARTS))] if rng.random() < HIDDEN else None
    body, legs = pick_colour(rng, BODY), pick_colour(rng, LEGS)
    shapes = []

    def placed(part, corners):
        x, y, angle = PLACE[part]
        return np.asarray(corners) @ rotation(np.deg2rad(angle + turn[part])) + (x, y)

    for part in PAINTING_ORDER:
        if part == "body":
            shapes += [(box(x, -24, x + 1.6, -8), legs, -1) for x in (4, 10)]
            shapes += [(np.array([(4, 8), (13, 24), (29, 12), (21, -2)]), body, -1),   # neck
                       (disc(0, 0, 22, 12) @ rotation(np.deg2rad(28)), body, -1)]
            continue
        number = PARTS.index(part)
        drawing = DRAWINGS[part][VARIANTS[part][variants[number]]]
        for colour, corners in drawing:
            corners = corners + rng.normal(0, 0.25, (len(corners), 2))                 # drawn by hand
            shapes.append((placed(part, corners), pick_colour(rng, [colour]), number))
        if part == hidden:                                     # parts painted later lie over the leaf
            outline = np.concatenate([corners for _, corners in drawing])
            low, high = outline.min(axis=0), outline.max(axis=0)
            leaf = oval(*(low + high) / 2, *(high - low) * 0.7 + 1)
            shapes.append((placed(part, leaf), pick_colour(rng, LEAF), -1))
    return shapes


def scenery(rng, feet):
    """The branch under the feet (x, y), and leaves behind the bird: shapes in pixels of a 96x96 picture."""
    x = np.linspace(-4, 100, 7)
    y = feet[1] + rng.normal(0, 0.12) * (x - feet[0]) + rng.normal(0, 0.4, 7)
    half = rng.uniform(1.6, 3)
    branch = np.concatenate([np.stack([x, y - half], 1), np.stack([x, y + half], 1)[::-1]])
    shapes = [(branch, pick_colour(rng, WOOD), -1)]
    for _ in range(rng.integers(0, 5)):
        middle, length = rng.uniform(0, 96, 2), rng.uniform(5, 11)
        corners = oval(0, 0, length, length * 0.45) @ rotation(rng.uniform(0, 2 * np.pi)) + middle
        shapes.append((corners, pick_colour(rng, LEAF), -1))
    return shapes[::-1]


def compose(rng, variants):
    """All shapes of a picture in painting order, corners in pixels of a 96x96 picture, y down."""
    shapes = bird_shapes(rng, variants)
    side = rng.choice((-1, 1))                                 # 1 faces right
    tilt = rotation(np.deg2rad(rng.uniform(-20, 20)))
    matrix = tilt @ np.diag((side, -1)) * UNIT * rng.uniform(*SIZE_FACTORS)
    outline = np.concatenate([shape[0] for shape in shapes]) @ matrix
    low, high = 2 - outline.min(axis=0), 94 - outline.max(axis=0)
    shift = rng.uniform(np.minimum(low, high), np.maximum(low, high))
    if rng.random() < CUT:                                     # the tail's tip is outside
        shift[0] = (low if side == 1 else high)[0] - side * rng.uniform(4, 10)
    bird = [(corners @ matrix + shift, *rest) for corners, *rest in shapes]
    return scenery(rng, np.array((8, -23)) @ matrix + shift) + bird


# ---- from shapes to pixels --------------------------------------------------------------------------------

def backdrop(rng, size):
    """A blurred background, Pillow RGB image (size, size): a gradient with soft blobs."""
    top, bottom = (pick_colour(rng, [colour]) for colour in BACKDROPS[rng.integers(len(BACKDROPS))])
    small = np.linspace(top, bottom, 9)[:, None] + np.zeros((9, 9, 1))             # (9,9,3)
    small += rng.normal(0, rng.uniform(4, 16), (9, 9, 1)) + rng.normal(0, 5, (9, 9, 3))
    small = Image.fromarray(np.clip(small, 0, 255).astype(np.uint8))
    return small.resize((size, size), Image.Resampling.BICUBIC)


def photograph(rng, index_map, shapes):
    """The picture through a camera, uint8 (H,W,3): colour, sloping light, gain, cast, noise."""
    colours = np.clip([(0, 0, 0)] + [colour for _, colour, _ in shapes], 0, 255).astype(np.uint8)
    index_map.putpalette(colours.tobytes())
    image = backdrop(rng, index_map.width)
    painted = Image.fromarray((np.asarray(index_map) > 0).astype(np.uint8) * 255)
    image.paste(index_map.convert("RGB"), mask=painted)
    image = np.asarray(image.reduce(2), dtype=np.float32)      # (H,W,3)
    x = np.linspace(-1, 1, len(image), dtype=np.float32)
    slope_x, slope_y = rng.uniform(-0.12, 0.12, 2)
    gain = rng.uniform(0.8, 1.15) * rng.uniform(0.95, 1.05, 3)  # (3,) the same light for all, and its cast
    image *= (1 + slope_x * x + slope_y * x[:, None])[..., None] * gain.astype(np.float32)
    image += rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(2, 8)
    return np.clip(image, 0, 255).astype(np.uint8)


def part_centres(part_of, index_map):
    """Mean of each part's pixels, float (5,2), and whether it has enough of them, bool (5,).

    index_map is (2H,2W), part_of (numbers,) the part of each number in it or -1. The centres are in pixels
    of the picture, x to the right, y down; (0, 0) where a part is not visible.
    """
    part = part_of[index_map].ravel() + 1                      # 0 = no part
    y, x = np.indices(index_map.shape) / 2 - 0.25              # two pixels of the map make one of image
    count, sum_x, sum_y = (np.bincount(part, values, minlength=len(PARTS) + 1)[1:]
                           for values in (None, x.ravel(), y.ravel()))
    visible = count >= 4 * MIN_PIXELS
    centres = np.stack([sum_x, sum_y], axis=1) / np.maximum(count, 1)[:, None]
    return centres * visible[:, None], visible


def make_bird(seed, index, size=96):
    """One picture as a dict; (seed, index, size) alone decide it, but for slight differences between
    versions of numpy and Pillow. H = W = size, at least 48.

    image     uint8 (H,W,3)  RGB
    label     int            species, index % 12
    variants  int (5,)       which variant of each part: SPECIES_VARIANTS[label]
    centres   float (5,2)    x, y of the mean of the part's visible pixels; 0, 0 where it is not visible
    visible   bool (5,)      False where less than 6 pixels of the part are seen (hidden or outside)
    """
    rng = np.random.default_rng((seed, index))
    label = index % len(SPECIES)
    shapes = compose(rng, SPECIES_VARIANTS[label])
    index_map = paint(shapes, size, 96, first=1)               # 0 = backdrop
    part_of = np.array([-1] + [part for _, _, part in shapes])
    centres, visible = part_centres(part_of, np.asarray(index_map))
    return {"image": photograph(rng, index_map, shapes), "label": label, "centres": centres,
            "visible": visible, "variants": SPECIES_VARIANTS[label].copy()}
