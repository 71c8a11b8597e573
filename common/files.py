"""Single files: images as tensors, masks of class ids, lists, names in a folder. Errors name the file."""
import codecs
import contextlib
import os
import re
import shutil
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as F

from common.run import UserError

IGNORE = 255                                             # label of a pixel that counts nowhere
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".jfif")
EXIF_ORIENTATION = 0x0112                                # a camera's rotation mark: 1 = as it is, 2 to 8
NOT_OURS = ("thumbs.db", "desktop.ini", "__macosx")      # what systems leave in folders, beside .*
TOLD = set()                                             # notes that this process has printed
warnings.simplefilter("ignore", Image.DecompressionBombWarning)            # of large images, which we want


@contextlib.contextmanager
def opened(path, page=None):
    """Pillow image, not yet decoded. UserError: a missing or damaged file, or one of several pages or frames
    if `page` does not say which one."""
    try:
        if Path(path).is_fifo():                         # which would be waited for
            raise FileNotFoundError
        with Image.open(path) as picture:
            if page is None and picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:
                raise UserError(f"{path} has {picture.n_frames} pages: save each page as a file of its own.")
            picture.seek(page or 0)
            yield picture
    except (UserError, MemoryError):
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist, or is no file.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: name an image.") from None
    except Image.DecompressionBombError as error:
        pixels = int(re.search(r"\d+", str(error))[0]) // 10 ** 6
        raise UserError(f"{path} has {pixels} million pixels, more than Pillow reads: cut it into pieces or "
                        "shrink it.") from None
    except Exception as error:                           # Pillow raises many types for a damaged file
        raise UserError(f"{path} cannot be read as an image ({error}): it is damaged or cut short, "
                        "so copy or download it again.") from None


def load_picture(path, page=None):
    """Decoded Pillow image. UserError as `opened`."""
    with opened(path, page) as picture:
        picture.load()
        return picture


def check_depth(picture, path):
    """UserError for more than 8 bits a channel, which Pillow would clip to white, or cut to the upper 8."""
    if picture.mode[0] in "IF" or ";16" in str(picture.tile[:1]):        # such as a tile of RGB;16B
        raise UserError(f"{path} has more than 8 bits a channel: convert it to 8.")


def read_image(path, page=None):
    """-> uint8 (3,H,W) RGB; grey and palette images become RGB, a camera's rotation mark is obeyed."""
    with opened(path, page) as picture:
        check_depth(picture, path)
        picture.load()
        ImageOps.exif_transpose(picture, in_place=True)
        return F.pil_to_tensor(picture if picture.mode == "RGB" else picture.convert("RGB"))


def turn_of(picture):
    """A camera's rotation mark, 1 to 8; other numbers mean nothing, as 1 does."""
    turn = picture.getexif().get(EXIF_ORIENTATION, 1)
    return turn if turn in range(2, 9) else 1


def size_and_turn(path, page=None):
    """(height, width) of what read_image returns, and a camera's rotation mark, 1 to 8; decodes nothing.
    UserError for what read_image would refuse before it decodes."""
    with opened(path, page) as picture:
        check_depth(picture, path)
        turn = turn_of(picture)
        width, height = picture.size
        if picture.format == "TIFF":                     # its size may be that of the turned picture
            width, height = picture.tag_v2[256], picture.tag_v2[257]
    return ((width, height) if turn >= 5 else (height, width)), turn


def read_large_enough(path, least=32):
    """read_image; UserError if a side has fewer pixels than `least`, which is too small for a network."""
    image = read_image(path)
    height, width = image.shape[1:]
    if min(height, width) < least:
        raise UserError(f"{path} is {width} x {height} pixels, but {least} a side are needed: enlarge it.")
    return image


def read_values(path, id_of, problem, page=None):
    """Mask file -> uint8 (H,W): id_of {value in the file: id} of its values, of a palette PNG the indices.
    UserError for a colour picture, and for a value without an id; problem: what to say of such values."""
    with opened(path, page) as picture:
        few_bits = re.search(r"'L;([24])'", str(picture.tile[:1]))       # of a grey PNG
        turn = turn_of(picture)
        picture.load()
    if len(picture.getbands()) > 1:
        raise UserError(f"{path} is a colour picture (mode {picture.mode}), not a map of class ids: use the "
                        "original index masks (palette or grey PNG), or convert the colours to ids first.")
    if picture.format == "JPEG":
        raise UserError(f"{path} is a JPEG file, whatever its name says: its compression has changed the "
                        "ids, so take the masks from where they were still PNG.")
    if turn != 1:
        raise UserError(f"{path} is a mask with a rotation mark (EXIF orientation {turn}), which programs "
                        "obey or not: save it without the mark, as its image lies.")
    raw = np.array(picture)
    if few_bits:                                         # Pillow stretches such values to 0..255
        raw = raw // {"2": 85, "4": 17}[few_bits[1]]
    values = raw.astype(np.uint8)                        # 16-bit values wrap around: they are no ids
    content = values.tobytes()
    if content.translate(None, bytes(id_of)) or (values != raw).any():   # what is left without known values
        wrong = np.setdiff1d(raw, list(id_of)).tolist()
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{path} has the pixel values {wrong[:5]}{more}, {problem}")
    table = bytes(id_of.get(value, 0) for value in range(256))
    return torch.frombuffer(bytearray(content.translate(table)), dtype=torch.uint8).view(raw.shape)


def read_index_map(path, num_classes, unlabelled=IGNORE, hint=""):
    """Mask file -> uint8 (H,W): ids 0..N-1, 255 = ignore. UserError as read_values, with a hint at its end.
    unlabelled: the file's id of unlabelled pixels; larger ids move down by one to close the gap."""
    last = num_classes if unlabelled <= num_classes else num_classes - 1
    values = [value for value in range(last + 1) if value != unlabelled]           # their places are the ids
    id_of = dict(zip(values, range(num_classes))) | {unlabelled: IGNORE, IGNORE: IGNORE}
    return read_values(path, id_of, f"but with {num_classes} classes only 0..{last} and 255 (= ignore) are "
                       f"ids: convert colour or 0/255 masks to ids first{hint}.")


def palette_of(path):
    """uint8 (256,3), the colours that an index PNG shows its values in; None for a grey or a damaged one."""
    with contextlib.suppress(UserError), opened(path) as picture:
        if picture.mode == "P":
            colours = np.array(picture.getpalette(), np.uint8).reshape(-1, 3)
            return np.pad(colours, ((0, 256 - len(colours)), (0, 0)))
    return None


# ---- texts, names ----------------------------------------------------------------------------------------

def composed(name):
    """Letters and their accents in one piece (NFC): some systems write them in two."""
    return unicodedata.normalize("NFC", name)


def read_text(path):
    """A text file in UTF-8, or in UTF-16 with a byte-order mark. UserError: unreadable, or other bytes."""
    try:
        content = Path(path).read_bytes()
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{path} is not a text in UTF-8: save it anew with the encoding UTF-8.")
    return text


def read_list(path):
    """Non-empty lines of a text file, see read_text; accents as `composed`."""
    return [line.strip() for line in composed(read_text(path)).splitlines() if line.strip()]


def check_names(path, names):
    """UserError for a class name that occurs twice: results are told by name."""
    for c, name in enumerate(names):
        if name in names[:c]:
            raise UserError(f"{path} has two classes called {name}: give every class a name of its own.")


def note(text):
    """Prints a note, once, in the first process."""
    if text not in TOLD and not int(os.environ.get("RANK", 0)):
        print(f"note: {text}", flush=True)
    TOLD.add(text)


def others_in(folder, endings=IMAGE_ENDINGS):
    """Sorted names of what lies in a folder and has none of these endings, hidden files aside; those of
    sub-folders end in /."""
    names = [entry for entry in os.scandir(folder) if os.path.splitext(entry.name)[1].lower() not in endings
             and entry.name[0] != "." and entry.name.lower() not in NOT_OURS]
    return sorted(entry.name + "/" * entry.is_dir() for entry in names)


def tell_unread(folder, names):
    """A note on these files and sub-folders (ending in /) of a folder."""
    if not names:
        return
    kinds = "files and folders" if any(name[-1] == "/" for name in names) else "files"
    what = f"{len(names)} {kinds} in {folder} are not read, such as {names[0]}"
    note(f"{folder}/{names[0]} is not read" if len(names) == 1 else what)


def images_in(folder):
    """The image files in a folder, not in its sub-folders, sorted; UserError if there is none."""
    images = sorted(p for p in folder.glob("*") if p.suffix.lower() in IMAGE_ENDINGS and p.name[0] != ".")
    if not images:
        raise UserError(f"{folder} holds no image ({' '.join(IMAGE_ENDINGS)}): found there: "
                        f"{listing(folder)}.")
    return images


def list_images(path):
    """An image file, or a folder of them (images_in) -> paths. New files are called as they are, but for the
    ending: UserError if two names are alike then. A note tells what lies in the folder beside them."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist: name an image or a folder of images.")
    images, stems = images_in(path), {}
    for image in images:
        other = stems.setdefault(os.path.normcase(composed(image.stem)), image)
        if other is not image:
            raise UserError(f"{path} holds {other.name} and {image.name}: what is written for them would "
                            "have the same name, so rename one.")
    tell_unread(path, others_in(path))
    for image in images:
        size_and_turn(image)                             # what is no image at all is told before the first
    return images


def some_of(names, most=5):
    """A list of names for a message: "a, b, c, d, e and 106 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def listing(folder):
    """The first names in a folder, for messages."""
    if not folder.is_dir():
        return "no such folder"
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    return some_of(names, 8) or "nothing"


def files_in(folder, endings, tail=""):
    """{stem: path} of the files with these endings, sorted; `tail` is cut off the stems (composed)."""
    files = {}
    for entry in sorted(os.listdir(folder)):
        stem, ending = os.path.splitext(entry)
        if ending.lower() in endings and stem.endswith(tail) and not entry.startswith("."):
            stem = composed(stem.removesuffix(tail))
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
        array = np.load(path, allow_pickle=False)
        if array.dtype.kind not in "fiu":
            raise ValueError
        numbers = torch.from_numpy(array.astype(np.float32))
    except OSError as error:
        raise UserError(f"{option} {path} cannot be read ({error.strerror or error}): write an array of "
                        "numbers with numpy.save.") from None
    except (ValueError, AttributeError):                 # a pickle, text, complex numbers; an .npz
        raise UserError(f"{option} {path} is no array of real numbers: write one with numpy.save.") from None
    if not numbers.isfinite().all():
        raise UserError(f"{option} {path} holds nan or infinity: finite numbers are needed.")
    return numbers
