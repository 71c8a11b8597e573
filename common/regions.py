"""Areas of equal value in a map of ids: which pixels touch, how far it is along them. Without scipy."""
import numpy as np


def lowest_of_group(count, a, b):
    """Groups of the numbers 0..count-1 in which a[k] and b[k] belong together -> int64 (count,): for each
    number the lowest of its group. a, b: int (M,)."""
    root = np.arange(count)
    while len(a):                                        # pairs of different roots; O(log count) rounds
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))         # each points at its lowest neighbour
        while not np.array_equal(root, root[root]):      # paths become half as long each time
            root = root[root]
        a, b = root[a], root[b]
        apart = a != b
        a, b = a[apart], b[apart]
    return root


def connected_components(ids):
    """Areas of equal value: int (H,W) -> int64 (H,W), 0 where ids is 0, else 1, 2, ... by first pixel.

    Pixels of equal value that touch, at a side or a corner, get the same number. Works on runs, stretches of
    equal pixels within a row: two of neighbouring rows touch if neither begins behind the other's end.
    """
    width = ids.shape[1] + 1
    flat = np.pad(ids, ((0, 0), (0, 1))).ravel()         # a 0 behind every row: no run reaches the next
    starts = np.flatnonzero(np.append(True, flat[1:] != flat[:-1]))
    lengths = np.diff(starts, append=flat.size)
    filled = np.flatnonzero(flat[starts])                # the runs that are not 0
    start, end, value = starts[filled], (starts + lengths)[filled], flat[starts[filled]]            # (R,)
    first = np.searchsorted(end, start + width)          # runs first..last-1 of the row below touch
    last = np.searchsorted(start, end + width, side="right")
    upper = np.repeat(np.arange(len(start)), last - first)                                          # (M,)
    lower = np.arange(len(upper)) + np.repeat(last - np.cumsum(last - first), last - first)
    same = value[upper] == value[lower]
    root = lowest_of_group(len(start), upper[same], lower[same])
    number = np.zeros(len(starts), np.int64)
    number[filled] = np.cumsum(root == np.arange(len(root)))[root]
    return np.repeat(number, lengths).reshape(-1, width)[:, :-1]


def depth_inside(regions):
    """int (H,W) -> int64 (H,W): steps along rows and columns to the nearest pixel at the region's edge, + 1.
    At the edge, where one of the 4 neighbours has another value or lies outside the picture, it is 1."""
    padded = np.pad(regions, 1, constant_values=-1)
    neighbours = [np.roll(padded, step, axis) for axis in (0, 1) for step in (1, -1)]
    edge = np.any([other != padded for other in neighbours], axis=0)[1:-1, 1:-1]
    depth = np.where(edge, 1, regions.size)
    for axis in (0, 1):                                  # along an axis: min over t' of depth(t') + |t - t'|
        t = np.arange(regions.shape[axis]).reshape((-1, 1)[:2 - axis])
        before = np.minimum.accumulate(depth - t, axis) + t
        behind = np.flip(np.minimum.accumulate(np.flip(depth + t, axis), axis), axis) - t
        depth = np.minimum(before, behind)
    return depth


def geodesic_distance(regions, sources, price=None):
    """Shortest way from the nearest source along pixels of the source's region: int (H,W) -> float64 (H,W).

    sources: flat indices of pixels that are not 0, for 0 is no region. A step to one of the 8 neighbours is
    1 or sqrt(2) long, times the mean `price` (H,W) of the two pixels; inf where no way leads. Fronts run
    over all regions at once, until no way gets shorter.
    """
    width = regions.shape[1] + 2
    ids = np.pad(regions, 1).ravel()
    price = np.ones(ids.size) if price is None else np.pad(price, 1).ravel()
    pixels = np.flatnonzero(ids)                         # the P pixels of all regions; number P is a wall
    number = np.full(ids.size, len(pixels))
    number[pixels] = np.arange(len(pixels))
    step = np.array([-1, 1, -width, width, -width - 1, -width + 1, width - 1, width + 1])
    length = np.where(np.arange(8) < 4, 1, 2 ** 0.5)
    to = pixels[:, None] + step                                                                     # (P,8)
    neighbour = np.where(ids[to] == ids[pixels, None], number[to], len(pixels))
    cost = length * (price[pixels, None] + price[to]) / 2
    distance = np.append(np.full(len(pixels), np.inf), -np.inf)
    y, x = np.divmod(np.asarray(sources), regions.shape[1])
    front = number[(y + 1) * width + x + 1]
    distance[front] = 0
    while len(front):
        way, to = distance[front, None] + cost[front], neighbour[front]                             # (F,8)
        closer = way < distance[to]
        to, way = to[closer], way[closer]
        np.minimum.at(distance, to, way)
        front = np.unique(to)
    result = np.full(ids.size, np.inf)
    result[pixels] = distance[:-1]
    return result.reshape(-1, width)[1:-1, 1:-1]
