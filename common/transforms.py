"""Transforms of one image and its mask: the default pipelines of mmsegmentation, and PFA's for scribbles.

Whatever is random comes from torch's CPU generator; `seeded` sets it for the length of one sample.
"""
import contextlib
import math

import numpy as np
import torch
from torch.nn.functional import grid_sample, pad
from torchvision.transforms.v2 import functional as F

from common.files import IGNORE

MEAN = (123.675, 116.28, 103.53)                         # of ImageNet, RGB, for values 0..255
STD = (58.395, 57.12, 57.375)
ENOUGH = 64                                              # pixels a side that every network here takes


@contextlib.contextmanager
def seeded(sample_seed):
    """Within, torch's CPU generator starts from this seed; afterwards it is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(sample_seed)     # torch.manual_seed would reseed the GPUs too
        yield


def uniform(low, high):
    return low + (high - low) * torch.rand(()).item()


def coin():
    return torch.rand(()).item() < 0.5


def normalise(image):
    """uint8 (3,H,W) RGB -> float32 (3,H,W): minus MEAN, divided by STD (mmsegmentation default). One that is
    float32 already is changed in place."""
    return F.normalize(image.float(), MEAN, STD, inplace=True)


def fitted_size(height, width, size, ratio=1.0):
    """(height, width) of the largest image of this aspect inside 4 size * ratio and size * ratio (mmcv's
    keep-ratio rule). size = 0: height * ratio, width * ratio."""
    factor = ratio
    if size:
        factor = min(int(4 * size * ratio) / max(height, width), int(size * ratio) / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resize_whole(image, size, square=False):
    """uint8 (3,H,W) -> uint8 (3,h,w): short side `size`, long side <= 4 size, aspect kept, 0 = as it is; or,
    if square, (3,size,size). Bilinear without antialiasing, as OpenCV does it and so as the networks of the
    papers were scored."""
    return F.resize(image, [size, size] if square else fitted_size(*image.shape[1:], size), antialias=False)


def warp_matrix(matrix, mirrored=False, upside_down=False):
    """What warp() needs of a projective map, (3,3): coordinates x, y, 1 of the output -> of the input, both
    from -1 to 1. Enlarged until no border shows; flips on top."""
    corners = torch.tensor([[x, y, 1.0] for x in (-1, 1) for y in (-1, 1)]) @ matrix.T         # (4,3)
    reach = (corners[:, :2] / corners[:, 2:]).abs().max().clamp(min=1)
    flips = torch.tensor([1.0 - 2 * mirrored, 1.0 - 2 * upside_down, reach])
    return (flips / reach)[:, None] * matrix


def warp(images, matrices):
    """Each image through its matrix, on their device, in one call: uint8 (B,3,S,S), (B,3,3) of warp_matrix
    -> float32 (B,3,S,S), whole numbers 0..255."""
    line = torch.linspace(-1, 1, images.shape[-1], device=images.device)
    y, x = torch.meshgrid(line, line, indexing="ij")
    grid = torch.stack([x, y, torch.ones_like(x)], -1).flatten(0, 1) @ matrices.mT  # (B,S*S,3)
    grid = (grid[..., :2] / grid[..., 2:]).unflatten(1, x.shape)
    return grid_sample(images.float(), grid, align_corners=True).round()


def nearest(length, resized):
    """Which of `length` pixels in a row each of `resized` pixels shows: numpy int (resized,). In float32, as
    torch's nearest neighbour computes it."""
    places = np.arange(resized, dtype=np.float32) * (np.float32(length) / np.float32(resized))
    return np.minimum(places.astype(int), length - 1)


def taken(mask, rows, columns):
    """These rows and columns of a mask uint8 (H,W), in this order. numpy is faster at it than torch."""
    return torch.from_numpy(mask.numpy().take(columns, 1).take(rows, 0))


def random_crop(mask, rows, columns, crop, max_share=0.75, retries=10):
    """Corner (y, x) and mask of a random crop x crop window: mmsegmentation's RandomCrop.

    Drawn again, at most `retries` times, while one class covers max_share or more of the window's labelled
    pixels, or none is labelled. The mask uint8 (H,W) is resized in the window alone: rows (h,) and columns
    (w,) are `nearest` of its sides.
    """
    for _ in range(retries + 1):
        y, x = (torch.randint(max(len(side) - crop, 0) + 1, ()).item() for side in (rows, columns))
        window = taken(mask, rows[y:y + crop], columns[x:x + crop])
        counts = torch.bincount(window.flatten(), minlength=256)[:IGNORE]
        if counts.max() < max_share * counts.sum():      # so there are two classes at least
            break
    return y, x, window


# The changes of colour are in place, on float32 (3,H,W) of whole numbers 0..255, before and after.

def to_whole(image):
    """Cut to 0..255, and fractions cut off, as in mmsegmentation."""
    image.clamp_(0, 255).floor_()


def scale_saturation(image, factor):
    """HSV saturation, (max - min) / max over R, G, B, times `factor`, at most 1: every distance from the
    maximum is scaled; hue and value stay."""
    highest, lowest = image.amax(0), image.amin(0)                                          # (H,W)
    stretch = (highest / (highest - lowest).clamp_(min=1)).clamp_(max=factor)               # saturation <= 1
    image.sub_(highest).mul_(stretch).add_(highest).round_()


def shift_hue(image, steps):
    """HSV hue plus `steps` of 2 degrees (OpenCV's scale 0..179), |steps| <= 30. OpenCV rounds hue and
    saturation to 8 bits on the way; here 0 steps change nothing.

    A pixel's highest, middle and lowest value are each 2 value - middle, cut to lowest..highest. Turning the
    hue by 60 degrees, from R to G to B to R, moves that number, before the cut, by highest - lowest: down if
    the next channel exceeds the one before, as the hue then leaves this channel behind, else up.
    """
    values = r, g, b = image.short()                     # whole numbers, in half the memory
    highest, lowest = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)   # (H,W)
    middle = r + g + b - highest - lowest
    move = ((highest - lowest) * steps / 30).round_().short()
    falls = [(g - b).sign_(), (b - r).sign_(), (r - g).sign_()]                             # 1, or -1: rises
    for channel, value, falling in zip(image, values, falls):
        channel.copy_(value.mul_(2).sub_(middle).sub_(falling.mul_(move)).clamp_(lowest, highest))


def distort_colours(image):
    """mmsegmentation's PhotoMetricDistortion, every step with probability 1/2."""
    if coin():
        to_whole(image.add_(uniform(-32, 32)))                                              # brightness
    contrast, contrast_first = coin(), coin()
    if contrast and contrast_first:
        to_whole(image.mul_(uniform(0.5, 1.5)))
    if coin():
        scale_saturation(image, uniform(0.5, 1.5))
    if coin():
        shift_hue(image, torch.randint(-18, 18, ()).item())
    if contrast and not contrast_first:
        to_whole(image.mul_(uniform(0.5, 1.5)))


def augment(image, mask, size, crop, scale=(0.5, 2.0), photometric=True, crop_retries=10):
    """mmsegmentation's training pipeline: resize to fit inside (4 size, size) * r, r ~ U(scale); crop; flip;
    colours; normalise; pad on the right and at the bottom with 0 and 255. crop_retries: see random_crop.

    image uint8 (3,H,W), mask uint8 (H,W) -> float32 (3,crop,crop), uint8 (crop,crop).
    """
    resized = fitted_size(*mask.shape, size, uniform(*scale))
    rows, columns = map(nearest, mask.shape, resized)
    y, x, mask = random_crop(mask, rows, columns, crop, retries=crop_retries)
    image = F.resize(image, resized, antialias=False)[:, y:y + crop, x:x + crop]   # bilinear, as OpenCV does
    if coin():
        image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
    image = image.to(torch.float32, memory_format=torch.contiguous_format)         # one plane a channel
    if photometric:
        distort_colours(image)                           # after the crop: no pixel is computed in vain
    image, (lack_y, lack_x) = normalise(image), (crop - side for side in mask.shape)
    if lack_y or lack_x:
        image, mask = pad(image, [0, lack_x, 0, lack_y]), pad(mask, [0, lack_x, 0, lack_y], value=IGNORE)
    return image, mask


BLUR = torch.softmax(-(torch.arange(5.0) - 2) ** 2 / (2 * 1.1 ** 2), 0).tolist()   # OpenCV's sigma for 5


def rotated(image, mask, angle, rows, columns):
    """The window rows x columns (slices) of an image turned about its centre by `angle` degrees: float
    (3,H,W), normalised, mask uint8 (H,W) -> (3,h,w) bilinear, (h,w) nearest. Outside are 0 and 255."""
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
    """Training pipeline of PFA (Sec. 4.2): scale r ~ U(scale); each with probability 1/2, a rotation of
    U(-rotation, rotation) degrees about the centre, a 5x5 Gaussian blur, a flip; pad evenly with the mean
    colour and 255; random crop. Rotation and blur are done on the crop alone, which comes to the same.

    image uint8 (3,H,W), mask uint8 (H,W) -> float32 (3,crop,crop) normalised, uint8 (crop,crop).
    """
    height, width = fitted_size(*mask.shape, size, uniform(*scale))
    turn, angle, blurs, flips = coin(), uniform(-rotation, rotation), coin() and blur, coin()
    image = F.resize(image, [height, width], antialias=False)
    lines = nearest(mask.shape[0], height), nearest(mask.shape[1], width)
    y, x = (torch.randint(max(side - crop, 0) + 1, ()).item() for side in (height, width))
    top, left = max(y - 2, 0), max(x - 2, 0)             # the window, and what a blur needs around it
    rows, columns = slice(top, min(y + crop + 2, height)), slice(left, min(x + crop + 2, width))
    if turn:
        image, mask = rotated(normalise(image), taken(mask, *lines), angle, rows, columns)
    else:
        image, mask = normalise(image[:, rows, columns]), taken(mask, lines[0][rows], lines[1][columns])
    if blurs and min(height, width) > 2:
        image = blurred(image)
    rows, columns = slice(y - top, y - top + crop), slice(x - left, x - left + crop)
    image, mask = image[:, rows, columns], mask[rows, columns]
    if flips:
        image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
    lack_y, lack_x = (crop - side for side in mask.shape)
    padding = [lack_x // 2, lack_y // 2, (lack_x + 1) // 2, (lack_y + 1) // 2]     # left, top, right, bottom
    return F.pad(image, padding, fill=0), F.pad(mask[None], padding, fill=IGNORE)[0]
