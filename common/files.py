"""Single files: images as tensors, masks of class ids, lists, names in a folder. Errors name the file."""
import contextlib
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as F

from common.run import UserError

IGNORE = 255                                             # label of a pixel that counts nowhere
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@contextlib.contextmanager
def opened(path):
    """Pillow image, not yet decoded; UserError for a missing or damaged file."""
    try:
        with Image.open(path) as picture:
            yield picture
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except Exception as error:                           # Pillow raises many types for a damaged file
        raise UserError(f"{path} cannot be read as an image ({error}): it is damaged or cut short, "
                        "so copy or download it again.") from None


def load_picture(path, page=0):
    """Decoded Pillow image; page: which one of a multi-page TIFF. UserError as in `opened`."""
    with opened(path) as picture:
        if page:
            picture.seek(page)
        picture.load()
        return picture


def read_image(path, page=0):
    """-> uint8 (3,H,W) RGB; grey and palette images become RGB, a camera's rotation mark is obeyed."""
    picture = load_picture(path, page)
    if picture.mode[0] in "IF":                          # Pillow would clip these to white
        raise UserError(f"{path} has more than 8 bits a channel (mode {picture.mode}): convert it to 8.")
    ImageOps.exif_transpose(picture, in_place=True)
    return F.pil_to_tensor(picture.convert("RGB"))


def read_large_enough(path, least=32):
    """read_image; UserError if a side has fewer pixels than `least`, which is too small for a network."""
    image = read_image(path)
    height, width = image.shape[1:]
    if min(height, width) < least:
        raise UserError(f"{path} is {width} x {height} pixels, but {least} a side are needed: enlarge it.")
    return image


def read_values(path, id_of, problem, page=0):
    """Mask file -> uint8 (H,W): id_of {value in the file: id} of its values, of a palette PNG the indices.
    UserError for a colour picture, and for a value without an id; problem: what to say of such values."""
    picture = load_picture(path, page)
    if len(picture.getbands()) > 1:
        raise UserError(f"{path} is a colour picture (mode {picture.mode}), not a map of class ids: use the "
                        "original index masks (palette or grey PNG), or convert the colours to ids first.")
    raw = np.array(picture)
    table = np.full(256, -1, np.int16)
    table[list(id_of)] = list(id_of.values())
    values = raw.astype(np.uint8)                        # 16-bit values wrap around: they are no ids
    ids = table[values]
    wrong = np.unique(raw[(ids < 0) | (values != raw)]).tolist()
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{path} has the pixel values {wrong[:5]}{more}, {problem}")
    return torch.from_numpy(ids.astype(np.uint8))


def read_index_map(path, num_classes, unlabelled=IGNORE):
    """Mask file -> uint8 (H,W): ids 0..N-1, 255 = ignore. UserError as read_values.
    unlabelled: the file's id of unlabelled pixels; larger ids move down by one to close the gap."""
    last = num_classes if unlabelled < IGNORE else num_classes - 1
    values = [value for value in range(last + 1) if value != unlabelled]           # their places are the ids
    id_of = dict(zip(values, range(num_classes))) | {unlabelled: IGNORE, IGNORE: IGNORE}
    return read_values(path, id_of, f"but with {num_classes} classes only 0..{last} and 255 (= ignore) are "
                       "ids: convert colour or 0/255 masks to ids first.")


def read_list(path):
    """Non-empty lines of a text file."""
    return [line.strip() for line in path.read_text("utf-8-sig", "replace").splitlines() if line.strip()]


def list_images(path, distinct=False):
    """An image file, or a folder of them (not its sub-folders) -> sorted paths; UserError if none.
    distinct: UserError also for two files whose names differ in the ending alone."""
    path = Path(path)
    if path.is_file():
        return [path]
    images = sorted(p for p in path.glob("*") if p.suffix.lower() in IMAGE_ENDINGS and p.name[0] != ".")
    if not images:
        raise UserError(f"{path} holds no image ({' '.join(IMAGE_ENDINGS)}): found there: {listing(path)}.")
    stem, count = Counter(image.stem for image in images).most_common(1)[0]
    if distinct and count > 1:
        raise UserError(f"{path} holds {count} images called {stem}: what is written for them would have "
                        "the same name, so rename all but one.")
    return images


def listing(folder, limit=8):
    """The first names in a folder, for messages."""
    if not folder.is_dir():
        return "no such folder"
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more or "nothing"


def files_in(folder, endings, tail=""):
    """{stem: path} of the files with these endings, sorted; `tail` is cut off the stems."""
    files = {}
    for entry in sorted(os.listdir(folder)):
        stem, ending = os.path.splitext(entry)
        if ending.lower() in endings and stem.endswith(tail) and not entry.startswith("."):
            stem = stem.removesuffix(tail)
            if stem in files:
                raise UserError(f"{folder} holds both {files[stem].name} and {entry}: keep one, as image "
                                "and mask are matched by their names without ending.")
            files[stem] = folder / entry
    return files


@contextlib.contextmanager
def new_folder(out):
    """Within, a folder OUT/unfinished to write into; at the end its files move up to OUT, classes.txt last.
    UserError unless `out` is new or empty and can be written. After any error a new `out` is gone again."""
    draft, is_new = out / "unfinished", not out.exists()
    if draft.is_dir():
        raise UserError(f"{draft} is left from an earlier call that was cut short: remove it first.")
    if not is_new and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: choose another name or remove it first.")
    try:
        draft.mkdir(parents=True)
        yield draft
        for path in sorted(draft.iterdir(), key=lambda path: path.name == "classes.txt"):
            path.rename(out / path.name)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error}): choose another folder.") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if is_new and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


def read_numbers(path, option):
    """A .npy file of numbers -> float32 tensor; UserError names the option: unreadable, nan or infinity."""
    try:
        numbers = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
    except (OSError, ValueError, AttributeError) as error:                       # the last: an .npz
        raise UserError(f"{option} {path} cannot be read ({error}): write an array of numbers with "
                        "numpy.save.") from None
    if not numbers.isfinite().all():
        raise UserError(f"{option} {path} holds nan or infinity: finite numbers are needed.")
    return numbers
