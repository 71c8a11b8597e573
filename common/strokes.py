"""Scribbles, as lines, as pixels and painted: read, draw, weaken, and invent them from full masks.

A stroke as a line is (class id, points float (n,2)): x and y in pixels, (0, 0) is the centre of the first.
Drawn scribbles are a map uint8 (H,W): class ids along the strokes, 255 = unlabelled.
"""
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from common.figures import palette
from common.files import load_picture, palette_of, read_index_map
from common.regions import connected_components, depth_inside, geodesic_distance
from common.run import UserError

UNLABELLED = 255
XML_NAMES = ("background plane bike bird boat bottle bus car cat chair cow table dog horse motorbike person "
             "plant sheep sofa train monitor").split()  # ScribbleSup's names of the 21 classes of VOC, by id
CLASS_ID = {name: i for i, name in enumerate(XML_NAMES)} | {       # and VOC's own
    "aeroplane": 1, "bicycle": 2, "diningtable": 11, "pottedplant": 16, "tvmonitor": 20}
MIN_SHARE, MIN_PIXELS = 0.0005, 10                       # a region smaller than this gets no stroke


# ---- strokes as lines ------------------------------------------------------------------------------------

def read_strokes(path):
    """ScribbleSup XML file -> (width, height) of its image, strokes [(class id, points float (n,2))].

    Below the root are a <size> with <width> and <height>, and for each stroke a <polygon> with its class
    name in <tag> and with <point>s of <X> and <Y>, or of two elements, x first. Strokes without a point are
    left out. UserError: damaged or another kind of file, a class name that is not in CLASS_ID, a stroke that
    lies wholly outside the image, points that only lie inside if x and y change places.
    """
    try:
        root = ElementTree.parse(path).getroot()
        if root.find("size") is None or root.find("object") is not None:
            raise ValueError("it has no <size>, or describes boxes, <object>, and not strokes, <polygon>")
        width, height = (int(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
        drawn = [(stroke.findtext("tag", "").strip(),
                  np.array([[float(point.findtext(axis) or point[k].text) for k, axis in enumerate("XY")]
                            for point in stroke.iter("point")]).reshape(-1, 2))
                 for stroke in root.iter("polygon")]
        if min(width, height) < 1 or not all(np.isfinite(points).all() for _, points in drawn):
            raise ValueError("the size or a coordinate is no proper number")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (OSError, SyntaxError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"{path} cannot be read as a file of strokes ({error}): it is damaged or of another "
                        "kind, so take the XML files of ScribbleSup (see data/README.md).") from None

    def outside(points):                                                 # by more than a slip of 2 pixels
        return ~((points > -3) & (points < (width + 2, height + 2))).all(1)
    every = np.concatenate([np.empty((0, 2)), *(points for _, points in drawn)])
    if outside(every).sum() > 2 and not outside(every[:, ::-1]).any():
        raise UserError(f"{path}: {outside(every).sum()} of {len(every)} points lie outside the image of "
                        f"{width} x {height} pixels, but none if x and y change places: write x first.")
    strokes = []
    for name, points in drawn:
        if name.lower() not in CLASS_ID:
            raise UserError(f"{path} has a stroke of the class {name!r}, which does not exist: rename it to "
                            f"one of {', '.join(XML_NAMES)}.")
        if not len(points):
            continue
        if outside(points).all():
            x, y = points[0]
            raise UserError(f"{path}: a stroke of {name}, which begins at ({x:g}, {y:g}), lies outside the "
                            f"image of {width} x {height} pixels: take the file that belongs to the image.")
        strokes.append((CLASS_ID[name.lower()], points))
    return (width, height), strokes


def draw_strokes(strokes, width, height, thickness=3):
    """Strokes [(class id, points (n,2))] -> uint8 (H,W), 255 elsewhere; later strokes cover earlier ones.

    A line with curved joints and a disc at every vertex, both `thickness` pixels wide, as the loaders of
    GatedCRFLoss and TreeEnergyLoss draw ScribbleSup. What is outside is cut off.
    """
    picture = Image.new("L", (width, height), UNLABELLED)
    draw = ImageDraw.Draw(picture)
    for class_id, points in strokes:
        corners = np.rint(np.asarray(points, dtype=float)).astype(int)
        draw.line(corners.ravel().tolist(), fill=int(class_id), width=thickness, joint="curve")
        for x, y in (corners - thickness // 2).tolist():
            draw.ellipse((x, y, x + thickness - 1, y + thickness - 1), fill=int(class_id))
    return np.array(picture)


def central_part(points, shrink):
    """Polyline (n,2) -> its central 1 - shrink by length, (m,2); all of it at 0, its midpoint alone at 1."""
    along = np.append(0, np.linalg.norm(np.diff(points, axis=0), axis=1).cumsum())   # (n,) way to each point
    low, high = along[-1] * shrink / 2, along[-1] * (1 - shrink / 2)
    if low <= 0:
        return points
    ends = np.stack([np.interp([low, high], along, points[:, axis]) for axis in (0, 1)], 1)         # (2,2)
    if low >= high:
        return ends[:1]
    return np.concatenate([ends[:1], points[(along > low) & (along < high)], ends[1:]])


def check_ratios(drop, shrink):
    """UserError unless both are from 0 to 1."""
    for name, ratio in (("drop", drop), ("shrink", shrink)):
        if not 0 <= ratio <= 1:
            raise UserError(f"{name} {ratio} is no ratio: choose a number from 0 (all stays as it is) to 1.")


def weaken_strokes(strokes, drop=0.0, shrink=0.0, seed=0):
    """Scribble-drop and scribble-shrink (PFA, B.1, Fig. 8) of strokes as lines, see `weaken`; a new list."""
    check_ratios(drop, shrink)
    kept = np.random.default_rng(seed).random(len(strokes)) >= drop
    return [(class_id, central_part(points, shrink)) for (class_id, points), k in zip(strokes, kept) if k]


# ---- strokes as pixels -----------------------------------------------------------------------------------

def strokes_of_mask(scribbles):
    """uint8 (H,W), 255 = unlabelled -> int64 (H,W): 0 = unlabelled, else the number of the pixel's stroke.
    A stroke is what touches with the same class, see connected_components."""
    return connected_components(np.where(scribbles == UNLABELLED, 0, scribbles.astype(np.int32) + 1))


def extreme(regions, values):
    """Flat index of the pixel with the highest value in each region but 0, in the order of their numbers."""
    pixels = np.flatnonzero(regions)
    number = regions.ravel()[pixels]
    order = np.lexsort((values.ravel()[pixels], number))
    return pixels[order[np.diff(number[order], append=0) != 0]]                    # the last of each number


def shrunk(strokes, shrink):
    """Stroke numbers 1..K (H,W) -> bool (H,W): the pixels that are left of them, around their middles.

    From any pixel the farthest is one end, and from there the farthest is the other. In the middle the way
    to the farther end is shortest; among the pixels across the stroke one inside is taken, not at its rim.
    """
    start = np.unique(strokes, return_index=True)[1][-strokes.max():]
    one = extreme(strokes, geodesic_distance(strokes, start))
    from_one = geodesic_distance(strokes, one)
    other = extreme(strokes, from_one)
    from_other = geodesic_distance(strokes, other)
    inside = 0.5 * depth_inside(strokes) - np.maximum(from_one, from_other)
    length = from_one.ravel()[other]                                                                # (K,)
    way = geodesic_distance(strokes, extreme(strokes, inside))                     # (H,W) from the middle
    area = np.bincount(strokes.ravel())[1:]
    reach = np.maximum((1 - shrink) * way.ravel()[extreme(strokes, way)], area / (length + 1) / 2)  # (K,)
    return (way <= np.append(0, reach)[strokes]) & (strokes > 0)


def weaken(scribbles, drop=0.0, shrink=0.0, seed=0):
    """Scribble-drop and scribble-shrink (PFA, B.1, Fig. 8): uint8 (H,W) -> uint8 (H,W), with fewer labels.

    drop: each stroke (see strokes_of_mask) is removed with this probability, whatever happens to the others.
    shrink: of each stroke the central 1 - shrink of its length stays, measured along its pixels; 1 leaves a
    dot about as wide as the stroke. Of a stroke that forks or closes into a ring, what is near its middle
    stays. What is left at larger ratios is part of what is left at smaller ones.
    """
    check_ratios(drop, shrink)
    strokes = strokes_of_mask(scribbles)
    luck = np.random.default_rng(seed).random(strokes.max())
    kept = np.append(False, luck >= drop)[strokes]                                                  # (H,W)
    if shrink > 0 and kept.any():
        kept &= shrunk(strokes, shrink)
    return np.where(kept, scribbles, UNLABELLED).astype(np.uint8)


# ---- strokes painted by hand -----------------------------------------------------------------------------

def classes_of_colours(colour, changed, classes):
    """Class ids uint8 (H,W) of a painting, see painted_strokes. colour int32 (3,H,W), changed bool (H,W)."""
    code = colour[0] * 65536 + colour[1] * 256 + colour[2]
    squares = code.unfold(0, 2, 1).unfold(1, 2, 1).flatten(2)                                 # (H-1,W-1,4)
    equal = (squares == squares[..., :1]).all(2).float()
    even = F.max_pool2d(F.pad(equal, (1, 1, 1, 1))[None], 2, 1)[0] > 0   # in such a square, (H,W)
    code, index = code[changed].unique(return_inverse=True)              # few colours, many pixels
    colours = torch.stack([code // 65536, code // 256 % 256, code % 256], 1).float()                # (U,3)
    own = palette(classes).float()                                                                  # (N,3)
    away, nearest = torch.cdist(colours, own, p=torch.inf).min(1)
    is_seed = (away[index] == 0) | (away[index] <= 20) & even[changed]
    ids = torch.full(changed.shape, UNLABELLED, dtype=torch.uint8)
    ids[changed] = torch.where(is_seed, nearest[index], UNLABELLED).to(torch.uint8)
    y, x = (changed & (ids == UNLABELLED)).nonzero().T                   # M blends
    framed = F.pad(ids, (1, 1, 1, 1), value=UNLABELLED)
    around = torch.stack([framed[y + dy, x + dx] for dy, dx in np.ndindex(3, 3)], 1).long()         # (M,9)
    away = (colour[:, y, x].T[:, None] - own[around.clamp(max=len(own) - 1)]).abs().amax(2)
    best = torch.where(around == UNLABELLED, 256, away).argmin(1, keepdim=True)
    ids[y, x] = around.gather(1, best)[:, 0].to(torch.uint8)
    return ids


def painted_strokes(path, image, classes):
    """Strokes somebody drew on a photograph -> uint8 (H,W): class ids, 255 = unlabelled.

    image uint8 (3,H,W). An index PNG (data/README.md), or a painting in the colours of figures.palette: on
    transparency, on white or black, or on the image, whose unchanged pixels are no strokes. Seeds of a class
    have exactly its colour, or (programs shift it) lie in a 2 x 2 square of equal pixels at most 20 away in
    R, G, B. Other changed pixels are blends, as at the edge of a brush: they take, of the classes of the
    seeds they touch, the nearest in colour. UserError: JPEG, another size, too much changed, no stroke.
    """
    picture = load_picture(path)
    if picture.format == "JPEG":
        raise UserError(f"--draw: {path} is a JPEG file, whose compression changes the colours of strokes: "
                        "save them as PNG.")
    if (picture.width, picture.height) != (image.shape[2], image.shape[1]):
        raise UserError(f"--draw: the image is {image.shape[2]} x {image.shape[1]} pixels, but its strokes "
                        f"{path} are {picture.width} x {picture.height}: both must have the same size.")
    is_map = len(picture.getbands()) == 1
    if picture.mode == "P":                              # ids alone, none of them in another class's colour
        id_of, shown = {tuple(c): i for i, c in enumerate(palette(classes).tolist())}, palette_of(path)
        is_map = "transparency" not in picture.info and all(
            id_of.get(tuple(shown[value]), value) == value and value in (*range(len(classes)), UNLABELLED)
            for value in np.unique(picture).tolist())
    if is_map:
        ids = read_index_map(path, len(classes))
    else:
        painted = torch.from_numpy(np.array(picture.convert("RGBA"))).permute(2, 0, 1).int()
        colour, paper = painted[:3], (painted[:3] < 4).all(0) | (painted[:3] > 251).all(0)
        changed = (colour != image).any(0) & (painted[3] > 127) & ~paper                            # (H,W)
        if changed.float().mean() > 1 / 3:
            raise UserError(f"--draw: {100 * changed.float().mean():.0f} % of {path} differ from the image, "
                            "but strokes are a third of it at most: paint on a copy of the image or on a "
                            "transparent layer, and save it as PNG alone.")
        ids = classes_of_colours(colour, changed, classes)
        piece = connected_components(changed.numpy().astype(np.int32))
        lost = np.bincount(piece[~np.isin(piece, piece[~changed | (ids != UNLABELLED)])])
        if (lost >= MIN_PIXELS).any():
            print(f"note: {lost[lost >= MIN_PIXELS].sum()} px of {path} have no class's colour: left out")
    if (ids == UNLABELLED).all():
        raise UserError(f"--draw: {path} has no stroke: it must hold class ids along strokes, 255 "
                        "elsewhere, or strokes painted, opaque, in the colours of figures/colours.png.")
    if (ids != UNLABELLED).float().mean() > 0.5:
        print(f"note: {path} labels more than half of the image: if 0 means unlabelled there, write 255")
    return ids


# ---- scribbles from full masks ---------------------------------------------------------------------------

def middle_lines(rng, regions, depth):
    """A curved line along the middle of each region, regions and depth int (h,w): {number: points (n,2)}.

    Its ends are two pixels of the region's core (depth above 0.3 of the largest) that are far apart. It is
    the cheapest way between them, where the price is high near the edge and differs at random from place to
    place. On that way are the pixels whose distances from both ends add up to the whole.
    """
    if not regions.any():
        return {}
    deepest = extreme(regions, depth)
    pieces = connected_components(regions)               # a region may fall apart on a coarser grid:
    regions = np.where(np.isin(pieces, pieces.ravel()[deepest]), regions, 0)       # its deepest piece counts
    numbers = regions.ravel()[deepest]
    limit = np.zeros(regions.max() + 1)
    limit[numbers] = 0.3 * depth.ravel()[deepest]
    core = np.where(depth >= limit[regions], regions, 0)
    one = extreme(core, geodesic_distance(regions, deepest))
    other = extreme(core, geodesic_distance(regions, one))
    coarse = rng.normal(0, 0.7, (regions.shape[0] // 12 + 2, regions.shape[1] // 12 + 2)).astype(np.float32)
    noise = Image.fromarray(coarse).resize(regions.shape[::-1], Image.Resampling.BICUBIC)
    price = np.exp(np.asarray(noise, dtype=float)) / depth
    from_one, from_other = (geodesic_distance(regions, ends, price) for ends in (one, other))
    whole = np.zeros(regions.max() + 1)
    whole[numbers] = from_one.ravel()[other]
    on_way = np.flatnonzero((regions > 0) & (from_one + from_other <= whole[regions] + 1e-9))
    on_way = on_way[np.argsort(from_one.ravel()[on_way])]
    number, (y, x) = regions.ravel()[on_way], np.divmod(on_way, regions.shape[1])
    return {n: np.stack([x, y], 1)[number == n].astype(float) for n in numbers.tolist()}


def smooth(points, reach=3):
    """Polyline (n,2) -> (n,2): each point the mean of itself and `reach` points on both sides; ends stay."""
    padded = np.pad(points, ((reach, reach), (0, 0)), mode="edge")
    means = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=0).mean(2)
    return np.concatenate([points[:1], means[1:-1], points[-1:]]) if len(points) > 1 else points


def scribbles_from_mask(mask, seed=0, thickness=None):
    """Full mask uint8 (H,W), 255 = ignore -> scribbles uint8 (H,W), 255 = unlabelled, which agree with it.

    One stroke in each connected region of a class that has MIN_SHARE of the pixels and at least MIN_PIXELS:
    a curve along its middle, cut off at the region's edge. The seed decides the curves. thickness in pixels;
    None is 1/125 of the mask's shorter side, which is 3 in most images of VOC.
    """
    rng = np.random.default_rng(seed)
    thickness = thickness or max(1, round(min(mask.shape) / 125))
    regions = strokes_of_mask(mask)
    large = np.bincount(regions.ravel()) >= max(MIN_PIXELS, MIN_SHARE * mask.size)
    regions = np.where(large[regions], regions, 0)
    scribbles = np.full(mask.shape, UNLABELLED, np.uint8)
    depth, stride = depth_inside(regions), -(-max(mask.shape) // 128)   # lines are found on every n-th pixel
    middle = stride // 2
    lines = middle_lines(rng, regions[middle::stride, middle::stride], depth[middle::stride, middle::stride])
    for start in extreme(regions, depth):                # its deepest pixel
        y, x = np.divmod(start, mask.shape[1])
        number, points = regions[y, x], np.array([[x, y]])               # so small that the grid missed it
        if number in lines:
            points = central_part(smooth(lines[number]) * stride + middle, rng.uniform(0, 0.3))
        drawn = draw_strokes([(mask[y, x], points)], *mask.shape[::-1], thickness)
        scribbles[(drawn != UNLABELLED) & (regions == number)] = mask[y, x]
    return scribbles
