"""Toy scenes: small landscapes with houses, cars and birds, for semantic segmentation without a download.

A scene is a pile of polygons, painted, far ones first, into one *index map*, which holds at every pixel the
number of the polygon on top. Image, class mask, part map and scribbles are look-ups in that map, so they
agree by construction. It has twice the scene's size; halving the picture smooths the edges.

Hard, on purpose: a long tail (a third of all pixels are sky, 0.3 % birds), look-alikes (a taxi is a car with
a sign on its roof, a chapel a slim house with a pointed roof), sizes over a factor of four, occlusion,
shared colours, nameless clutter that counts as background, light, contrast, colour cast and noise.
"""
import numpy as np
from PIL import Image, ImageDraw

from common.regions import depth_inside

SPLITS = {"train": 400, "val": 100, "test": 100}              # scenes per split
FIRST_INDEX = {"train": 0, "val": 100_000, "test": 200_000}   # splits share no scene
SIZE_FACTORS = (0.65, 2.7)                                    # smallest and largest drawing of one object
MIN_CENTRE_PIXELS = 4                                         # a part seen in fewer pixels has no centre
MIN_STROKE_PIXELS = 10                                        # a region seen in fewer pixels has no scribble
UNLABELLED = 255

# ---- what there is to draw --------------------------------------------------------------------------------
# Base colours (RGB). Classes share lists, and the lists overlap: colour alone does not tell the class.
PAINT = [(182, 60, 50), (58, 88, 164), (226, 210, 178), (218, 176, 56)]
TILES = [(150, 70, 50), (104, 66, 56), (92, 94, 104), (70, 80, 96)]
WOOD = [(104, 76, 52), (78, 62, 50), (128, 104, 84)]
LEAF = [(72, 112, 52), (100, 132, 62), (140, 122, 52), (50, 86, 58), (168, 104, 48)]
GLASS = [(62, 74, 92), (152, 178, 194), (236, 222, 160), (104, 114, 124)]
DARK = [(42, 40, 42), (70, 60, 56), (62, 62, 68)]
SKIN = [(226, 182, 152), (178, 132, 100), (104, 74, 58)]
STUFF = {                                                     # classes without parts
    "background": [(132, 114, 90), (96, 112, 124), (120, 126, 98), (86, 100, 84)],
    "sky": [(150, 190, 230), (192, 206, 220), (234, 204, 176), (124, 152, 192)],
    "grass": [(106, 142, 68), (142, 144, 80), (84, 112, 60), (160, 148, 98)],
    "road": [(112, 112, 116), (140, 130, 118), (92, 94, 100)],
    "water": [(82, 122, 152), (112, 142, 152), (72, 102, 108)],
}


def box(x0, y0, x1, y1):
    """Corners (4,2) of an upright rectangle."""
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], dtype=float)


def disc(x, y, rx, ry):
    """Corners (14,2) of an ellipse with its centre at (x, y)."""
    angles = np.arange(14) * 2 * np.pi / 14
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1)


CAR = [("cabin", GLASS, [(-.28, .3), (.24, .3), (.14, .5), (-.2, .5)]),
       ("body", PAINT, [(-.5, .1), (.5, .1), (.48, .24), (.26, .32), (-.46, .32)]),
       ("wheel", DARK, disc(-.28, .1, .11, .11)),
       ("wheel", DARK, disc(.28, .1, .11, .11))]

# class: (length of one unit in pixels at 128x128, how often, where it stands, shapes in painting order)
# shape: (part, base colours, corners in units: x to the right, y up, the object stands at (0, 0))
OBJECTS = {
    "tree": (33, 0.24, "ground", [
        ("trunk", WOOD, box(-.06, 0, .06, .5)),
        ("crown", LEAF, disc(0, .68, .27, .33))]),
    "house": (26, 0.18, "ground", [
        ("wall", PAINT, box(-.5, 0, .5, .55)),
        ("roof", TILES, [(-.6, .53), (.6, .53), (.32, .95), (-.32, .95)]),
        ("door", WOOD, box(-.36, 0, -.16, .36)),
        ("window", GLASS, box(.0, .2, .16, .4)),
        ("window", GLASS, box(.25, .2, .41, .4))]),
    "chapel": (26, 0.03, "ground", [
        ("wall", PAINT, box(-.3, 0, .3, .66)),
        ("roof", TILES, [(-.37, .64), (.37, .64), (0, 1.4)]),
        ("door", WOOD, box(-.1, 0, .1, .36))]),
    "car": (31, 0.2, "road", CAR),
    "taxi": (31, 0.04, "road", [("sign", GLASS[2:], box(-.2, .47, .12, .66))] + CAR),
    "boat": (33, 0.12, "water", [
        ("sail", PAINT[::2], [(-.02, .22), (.4, .26), (-.02, 1)]),
        ("hull", PAINT, [(-.48, .24), (.5, .24), (.34, 0), (-.36, 0)])]),
    "person": (26, 0.07, "ground", [
        ("legs", DARK + PAINT[1:2],
         [(-.17, 0), (-.04, 0), (0, .3), (.04, 0), (.17, 0), (.16, .46), (-.16, .46)]),
        ("torso", PAINT, [(-.19, .42), (.19, .42), (.26, .8), (-.26, .8)]),
        ("head", SKIN, disc(0, .91, .13, .14))]),
    "bird": (16, 0.04, "sky", [
        ("beak", PAINT[3:4] + SKIN[:1], [(.36, .08), (.36, -.1), (.64, -.03)]),
        ("body", DARK, disc(0, 0, .44, .22)),
        ("wing", DARK + PAINT[:2], [(-.12, .0), (.2, .04), (-.1, .34), (-.38, .56)])]),
    "balloon": (18, 0.03, "sky", [
        ("basket", WOOD, box(-.1, -.62, .1, -.4)),
        ("envelope", PAINT, np.concatenate([disc(0, .1, .36, .38)[:8], [(-.1, -.42), (.1, -.42)]]))]),
}
CLASSES = list(STUFF) + list(OBJECTS)
PARTS = ["none"] + list(dict.fromkeys(f"{name}:{part[0]}" for name in OBJECTS for part in OBJECTS[name][3]))
LOOKALIKES = [(CLASSES.index(a), CLASSES.index(b)) for a, b in (("car", "taxi"), ("house", "chapel"))]
TEXTURE = {"background": 1, "grass": 2, "tree": 1, "water": 3}   # which of textures(); the others 0


def scene_index(split, i):
    """Index for make_scene of scene i of a split: train starts at 0, val at 100000, test at 200000."""
    if split not in FIRST_INDEX or not 0 <= i < 100_000:
        raise ValueError(f"no scene {i} in split {split!r}: there are train, val and test, 0 to 99999")
    return FIRST_INDEX[split] + i


# ---- the pile of polygons ---------------------------------------------------------------------------------
# A shape is (corners (n,2) in pixels of a 128x128 scene, class id, part id, region number, colour (3,)).
# A region is what a person would draw one stroke into: one object, one piece of clutter, or all visible sky.

def pick_colour(rng, colours):
    """One of the base colours, shifted a little: float (3,)."""
    return colours[rng.integers(len(colours))] + rng.normal(0, 8, 3)


def rotation(angle):
    """(2,2) matrix that turns row vectors."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, s], [-s, c]])


def stripe(rng, middle, half, slant):
    """Corners (12,2) of a wavy band across the picture, centred on row `middle`, `half` rows up and down."""
    x = np.linspace(-2, 130, 6)
    y = middle + slant * (x - 64) + rng.normal(0, 0.7, 6)
    return np.concatenate([np.stack([x, y - half], 1), np.stack([x, y + half], 1)[::-1]])


def landscape(rng):
    """Sky, hills, grass, perhaps water, a road: shapes, {where: (middle, half, slant)}, horizon row."""
    horizon = rng.uniform(40, 70)
    shapes, places = [], {"sky": (horizon / 2, horizon / 2 - 8, 0)}

    def add(name, corners, pale=0.0):
        class_id, colour = CLASSES.index(name), pick_colour(rng, STUFF[name])
        shapes.append((corners, class_id, 0, class_id + 1, colour + pale * (240 - colour)))

    add("sky", box(-2, -2, 130, 130))
    for _ in range(rng.integers(0, 4)):                        # clouds are sky
        x, y, radius = rng.uniform((0, 5, 6), (128, horizon, 20))
        add("sky", disc(x, y, radius, radius / 3), pale=0.6)
    if rng.random() < 0.8:                                     # hills are background
        x = np.linspace(-2, 130, 10)
        y = horizon - rng.uniform(4, 26) * rng.uniform(0.2, 1, 10)
        add("background", np.concatenate([np.stack([x, y], 1), [(130, 130), (-2, 130)]]))
    slant = rng.normal(0, 0.04)
    add("grass", stripe(rng, horizon + 70, 70, slant))
    if rng.random() < 0.5:
        half = rng.uniform(8, 22)
        places["water"] = rng.uniform(horizon + half, 128), half, slant
        add("water", stripe(rng, *places["water"]))
    if rng.random() < 0.75:
        half, slant = rng.uniform(6, 15), rng.normal(0, 0.1)
        middle = rng.uniform(horizon + half + 4, 122)
        places["road"] = middle, half, slant
        add("road", stripe(rng, middle, half, slant))
        if rng.random() < 0.5:                                 # the white line
            add("road", stripe(rng, middle, half * 0.07, slant), pale=0.6)
    return shapes, places, horizon


def place_object(rng, name, region, places, horizon):
    """One object at a random place, size, side and tilt: its shapes and the row it stands on."""
    unit, _, ground, parts = OBJECTS[name]
    growth = rng.uniform()                                     # 0 smallest, 1 largest
    size = unit * SIZE_FACTORS[0] * (SIZE_FACTORS[1] / SIZE_FACTORS[0]) ** growth
    x = rng.uniform(4, 124)
    if ground in places and rng.random() < 0.92:
        middle, half, slant = places[ground]
        y = middle + slant * (x - 64) + half * rng.uniform(-0.7, 0.8)
    else:                                                      # on the ground; small things are far away
        y = horizon + (126 - horizon) * np.clip(0.8 * growth + rng.normal(0.1, 0.2), 0.02, 1)
    stretch = np.diag((rng.choice((-1, 1)) * rng.uniform(0.85, 1.15), -rng.uniform(0.85, 1.15)))
    matrix = size * stretch @ rotation(rng.normal(0, 0.25 if name == "bird" else 0.06))
    colour = {part: pick_colour(rng, colours) for part, colours, _ in parts}      # both wheels look the same
    shapes = []
    for part, _, corners in parts:
        corners = corners + rng.normal(0, 0.012, (len(corners), 2))                # drawn by hand
        shapes.append((corners @ matrix + (x, y), CLASSES.index(name), PARTS.index(f"{name}:{part}"), region,
                       colour[part]))
    return shapes, y


def place_clutter(rng, region):
    """A nameless ellipse, box or triangle in the colours of the objects; it counts as background."""
    kind, (w, h) = rng.integers(3), np.exp(rng.uniform(np.log(2.5), np.log(9), 2))
    corners = disc(0, 0, w, h) if kind == 0 else box(-w, -h, w, h)[:2 + kind]
    corners = corners @ rotation(rng.normal(0, 0.4)) + rng.uniform(0, 128, 2)
    colours = (PAINT, TILES, LEAF, DARK, GLASS)[rng.integers(5)]
    return [(corners, 0, 0, region, pick_colour(rng, colours))], rng.uniform(0, 128)


def compose(rng):
    """All shapes of a scene in painting order: the landscape, then things from far (high up) to near."""
    shapes, places, horizon = landscape(rng)
    often = np.array([OBJECTS[name][1] * (name != "boat" or "water" in places) for name in OBJECTS])
    names = rng.choice(list(OBJECTS), size=rng.integers(4, 9), p=often / often.sum())
    first = len(STUFF) + 1                                     # the regions before are stuff
    things = [place_object(rng, name, first + i, places, horizon) for i, name in enumerate(names)]
    things += [place_clutter(rng, first + len(names) + i) for i in range(rng.integers(1, 5))]
    for group, _ in sorted(things, key=lambda thing: thing[1]):
        shapes += group
    return shapes


# ---- from shapes to pixels --------------------------------------------------------------------------------

def paint(shapes, size, width=128, first=0):
    """Index map, Pillow image of mode P, (2 size, 2 size): `first` + the number of the shape on top. width:
    of the picture in which the corners of the shapes are given."""
    index_map = Image.new("P", (2 * size, 2 * size))
    draw = ImageDraw.Draw(index_map)
    for number, shape in enumerate(shapes, start=first):
        draw.polygon((shape[0] * (2 * size / width)).ravel().tolist(), fill=number)
    return index_map


def textures(rng, size):
    """Patterns of about unit strength, float32 (4,H,W): flat, blotches, upright blades, flat waves."""
    def pattern(h, w):
        small = Image.fromarray(rng.standard_normal((h, w), dtype=np.float32))
        return np.asarray(small.resize((size, size), Image.Resampling.BILINEAR))
    return np.stack([np.zeros((size, size), np.float32), pattern(size // 5, size // 5),
                     pattern(size // 8, size // 2), pattern(size // 2, size // 10)])


def photograph(rng, index_map, shapes, numbers):
    """The scene through a camera, uint8 (H,W,3): colour, texture, light, contrast, cast, noise."""
    colours = np.clip([shape[4] for shape in shapes], 0, 255).astype(np.uint8)
    index_map.putpalette(colours.tobytes())
    image = np.asarray(index_map.convert("RGB").reduce(2), dtype=np.float32)  # (H,W,3)
    kind = np.array([TEXTURE.get(CLASSES[shape[1]], 0) for shape in shapes])[numbers]  # (H,W)
    grain = np.take_along_axis(textures(rng, len(numbers)), kind[None], axis=0)[0]  # (H,W)
    image = image + grain[..., None] * rng.uniform(8, 14)
    x = np.linspace(-1, 1, len(numbers), dtype=np.float32)
    slope_x, slope_y = rng.uniform(-0.1, 0.1, 2)
    light = (1 + slope_x * x + slope_y * x[:, None])[..., None]  # (H,W,1)
    gain = rng.uniform(0.85, 1.15) * rng.uniform(0.96, 1.04, 3).astype(np.float32)  # contrast, cast
    image = (image * light - 128) * gain + (128 + rng.uniform(-14, 14))
    image += rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(2, 6)
    return np.clip(image, 0, 255).astype(np.uint8)


def part_centres(shapes, numbers):
    """Float (K,4): part id, class id, x, y of every visible part; each wheel has a row of its own."""
    y, x = np.indices(numbers.shape)
    count, sum_x, sum_y = (np.bincount(numbers.ravel(), values, minlength=len(shapes))
                           for values in (None, x.ravel(), y.ravel()))
    rows = [(part, class_id, sum_x[i] / count[i], sum_y[i] / count[i])
            for i, (_, class_id, part, _, _) in enumerate(shapes)
            if part > 0 and count[i] >= MIN_CENTRE_PIXELS]
    return np.array(rows, dtype=float).reshape(-1, 4)


def draw_scribbles(rng, regions, mask, walks=24, steps=20):
    """One curved stroke in each region that is large enough: class ids uint8 (H,W), 255 = unlabelled. Of
    `walks` random walks from random pixels of a region the one that stays inside longest is its stroke."""
    size, area = len(regions), np.bincount(regions.ravel())
    ids = np.flatnonzero(area >= MIN_STROKE_PIXELS)  # (R,) regions with a stroke
    pixels = np.argsort(regions.ravel(), kind="stable")  # grouped by region
    offset = rng.integers(0, area[ids, None], (len(ids), walks))
    start = pixels[(np.cumsum(area) - area)[ids, None] + offset]  # (R,walks)
    step = np.sqrt(area[ids]) * rng.uniform(0.8, 1.4, len(ids)) / steps  # (R,) pixels
    turn = rng.normal(0, 0.2, (len(ids), walks, steps))
    turn[:, :, 0] = rng.uniform(0, 2 * np.pi, (len(ids), walks))
    angle = turn.cumsum(2)  # (R,walks,steps)
    x = (start % size)[..., None] + (step[:, None, None] * np.cos(angle)).cumsum(2)
    y = (start // size)[..., None] + (step[:, None, None] * np.sin(angle)).cumsum(2)
    column, row = np.rint([x, y]).astype(int).clip(0, size - 1)  # the border is not inside
    inner = np.where(depth_inside(regions) > 1, regions, 0)  # 0 at the edge of a region
    inside = inner[row, column] == ids[:, None, None]
    length = np.logical_and.accumulate(inside, axis=2).sum(2)  # steps before it leaves
    strokes = Image.new("L", (size, size))
    draw = ImageDraw.Draw(strokes)
    for i, best in enumerate(length.argmax(1)):
        n = max(length[i, best], 1)
        points = np.stack([x[i, best, :n], y[i, best, :n]], 1).ravel().tolist()
        width = int(rng.integers(1, 3 if area[ids[i]] < 1000 else 4))
        draw.line(points if n > 1 else points * 2, fill=int(ids[i]), width=width, joint="curve")
    return np.where(np.asarray(strokes) == regions, mask, UNLABELLED).astype(np.uint8)


def make_scene(seed, index, size=128):
    """One scene as a dict; (seed, index, size) alone decide it, but for slight differences between versions
    of numpy and Pillow. H = W = size, at least 32.

    image         uint8 (H,W,3)  RGB
    mask          uint8 (H,W)    class ids
    parts         uint8 (H,W)    part ids, 0 = no part
    objects       uint8 (H,W)    a number for each object (not consecutive), 0 = no object
    part_centres  float (K,4)    per visible part: part id, class id, x, y: the mean of its visible pixels
    scribbles     uint8 (H,W)    class ids along thin strokes (about 3 % of the pixels), 255 = unlabelled
    """
    rng = np.random.default_rng((seed, index))
    shapes = compose(rng)
    index_map = paint(shapes, size)
    numbers = np.asarray(index_map)[::2, ::2]  # (H,W) shape numbers
    class_of, part_of, region_of = np.array([shape[1:4] for shape in shapes], dtype=np.uint8).T
    mask, parts, regions = class_of[numbers], part_of[numbers], region_of[numbers]
    return {"image": photograph(rng, index_map, shapes, numbers), "mask": mask, "parts": parts,
            "objects": regions * (parts > 0), "part_centres": part_centres(shapes, numbers),
            "scribbles": draw_scribbles(rng, regions, mask)}
