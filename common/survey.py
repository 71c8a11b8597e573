"""What the masks of a run label, read once before the first step: wrong masks would train in silence.

No image is decoded. Every process reads its share, and the rows of a table share what was read.
"""
import os
import zlib

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.backbones import fits, least_side
from common.files import IGNORE, palette_of, some_of
from common.run import UserError
from common.transforms import ENOUGH, fitted_size

READ = {}                                                # what read_all found, in this process


def of_masks(read, data, workers=0, rank=0, world=1):
    """read(i) of each of the masks rank::world of data in turn; many are read by loader processes."""
    indices = range(rank, len(data), world)
    return DataLoader(indices, batch_size=None, collate_fn=read, generator=torch.Generator(),
                      num_workers=workers if len(indices) > 100 else 0)


def identity(data):
    """What decides the masks of a split: its settings, and names and times of its files."""
    settings = {name: value for name, value in vars(data).items() if isinstance(value, (str, int, float))}
    masks = [(str(path), os.stat(path).st_mtime_ns) for _, path, *_ in data.paths or ()]
    return repr((type(data), settings, data.names, masks))


def read_all(data, cfg, machine):
    """-> pixels int64 (256,): how many have each value; labels (images,N) bool: the classes of each mask;
    sizes int64 (images,2): height and width.
    UserError: a wrong mask, see SegmentationSet.label_counts. cfg: workers."""
    key = identity(data)
    if key not in READ:
        pixels, labels = torch.zeros(256, dtype=torch.int64), torch.zeros(len(data), data.num_classes)
        sizes = torch.zeros(len(data), 2, dtype=torch.int64)
        counts = of_masks(data.counts_and_size, data, cfg.workers, machine.rank, machine.world)
        bar = tqdm(counts, f"read masks of {data.split}", leave=False, disable=machine.quiet)
        for i, values in zip(range(machine.rank, len(data), machine.world), bar):
            pixels += values[:-2]
            sizes[i] = values[-2:]
            labels[i] = (values[:data.num_classes] > 0).float()
        found = [pixels.to(machine.device), labels.to(machine.device), sizes.to(machine.device)]
        if dist.is_initialized():
            for part in found:
                dist.all_reduce(part)
        pixels, labels, sizes = (part.cpu() for part in found)
        READ[key] = pixels, labels > 0, sizes
    return READ[key]


def survey(train, others, cfg, machine, strokes=False, net=None):
    """Reads all masks of a run -> int64 (N,): labelled pixels of each class in the training split. Notes
    tell what cannot be learned, and which masks look wrong.

    train: SegmentationSet; others: splits to be scored on; strokes: train has strokes, not full masks; net:
    the network, on the CPU. UserError: a wrong mask, a split without a labelled pixel, a single class to
    learn, or an image too small for net.
    """
    pixels, labels, _ = read_all(train, cfg, machine)
    check_training(train, pixels, strokes)
    for data in others:
        _, known, sizes = read_all(data, cfg, machine)
        if net is not None:
            check_images(data, sizes, cfg, net)
        if not known.any():
            raise UserError(f"{named(data)}: no pixel is labelled, so there is nothing to score: check the "
                            "masks, or choose another split.")
    if machine.rank == 0:
        tell(train, pixels, labels, strokes)
        scored = [data for data in others if data.split in (cfg.val_split, cfg.test_split)]
        tell_shared(train, scored)
        if getattr(cfg, "project_split", "") in (cfg.val_split, cfg.test_split):
            print(f"note: --project-split {cfg.project_split}: prototypes become patches of images that are "
                  "scored on")
    return pixels[:train.num_classes]


def check_images(data, sizes, cfg, net):
    """UserError if an image of a split is too small for net in evaluation. sizes int64 (images,2)."""
    size, square = (getattr(cfg, name, None) for name in ("test_size", "test_square"))
    option = "--size" if size is None else "--test-size"
    size = cfg.size if size is None else size
    fitted = [(size, size) if square else fitted_size(*sides, size) for sides in sizes.tolist()]
    height, width = (min(sides) for sides in zip(*fitted))
    if min(height, width) >= ENOUGH:
        return
    was_training = net.training
    net.eval()
    least = 1 if fits(net, height, width) else least_side(net)
    net.train(was_training)
    for i, (height, width) in enumerate(fitted):
        if min(height, width) < least:
            name = data.paths[i][0] if data.paths else data.name_of(i)
            raise UserError(f"{name} is {width} x {height} pixels at the network, but {cfg.backbone} needs "
                            f"{least} a side: choose a larger {option} (now {size}; 0 = as it is), or leave "
                            "such images out.")


def named(data):
    """A split in a message."""
    example = f" ({len(data)} masks, such as {data.paths[0][1]})" if data.paths else ""
    return f"{data.name} {data.split}{example}"


def missing_classes(data, pixels):
    """Names of the classes without a pixel."""
    return [name for name, number in zip(data.classes, pixels) if not number]


def check_training(data, pixels, strokes):
    """UserError where nothing can be learned, or one class, or of strokes the background alone."""
    N, missing = data.num_classes, missing_classes(data, pixels)
    wanted = "the masks must hold the class ids" + " along the strokes, and 255 elsewhere" * strokes
    if len(missing) == N:
        raise UserError(f"{named(data)}: no pixel is labelled: all are 255, which is ignored; {wanted}.")
    if N == 1:
        raise UserError(f"{named(data)}: {data.classes[0]} is the only class, and one class alone cannot be "
                        "told from anything: add the background to classes.txt and to the masks.")
    if len(missing) == N - 1:
        [only] = set(data.classes) - set(missing)
        if N == 2 and pixels[IGNORE] and not strokes:
            c = data.classes.index(missing[0])
            wanted = f"255 is ignored, so write {c} at the pixels of {missing[0]}"
        raise UserError(f"{named(data)}: no labelled training pixel of {some_of(missing)}, and {only} alone "
                        f"cannot be told from anything: {wanted}.")


def tell_shared(train, others):
    """Notes on images that are trained on and scored on, be they the same file or copies of it."""
    def sizes(data):
        return [path.stat().st_size for path, *_ in data.paths or ()]

    def images(data, sizes, like):
        for size, (path, _, *page) in zip(sizes, data.paths or ()):
            if size in like:                             # alike: size of the file, page, first bytes
                with open(path, "rb") as file:
                    yield (size, *page, zlib.crc32(file.read(2 ** 16))), path
    ours = sizes(train)
    for data in {data.split: data for data in others}.values():
        theirs = sizes(data)
        like = {*ours} & {*theirs}
        learned = dict(images(train, ours, like))
        shared = [path for key, path in images(data, theirs, like) if key in learned]
        if shared:
            print(f"note: {len(shared)} images of {data.split} are also in {train.split}, such as "
                  f"{shared[0]}: scores there are of images that were trained on")


def tell_palettes(data, labels):
    """A note if two index PNGs show the same class in different colours. labels (images,N) bool."""
    shown = {}                                           # class -> its colour, and the mask that has it
    for (_, path, *_), row in zip(data.paths, labels):
        palette = palette_of(path)
        for c in row.nonzero().flatten().tolist() if palette is not None else ():
            colour = tuple(palette[c + (c >= data.unlabelled)].tolist())
            other, first = shown.setdefault(c, (colour, path))
            if other != colour:
                print(f"note: {path} shows {data.classes[c]} in the colour {colour}, {first} in {other}: do "
                      "the values mean the same in all masks? The colours do not count, the values do")
                return


def tell(data, pixels, labels, strokes):
    """Notes on training masks: without labels, missing classes, strokes that cover too much."""
    empty = ~labels.any(1)
    background = labels[:, 0] & ~labels[:, 1:].any(1) & strokes
    for kind, content in ((empty, "nothing"), (background, "background alone")):
        if kind.any():
            print(f"note: {int(kind.sum())} of {len(data)} training masks label {content}, such as "
                  f"{data.name_of(int(kind.int().argmax()))}")
    if data.name == "folder":
        tell_palettes(data, labels)
        if data.unlabelled != IGNORE and not pixels[IGNORE]:
            print(f"note: --ignore {data.unlabelled}: no training mask has this value, nor 255")
    missing = missing_classes(data, pixels)
    if missing:
        print(f"note: no labelled training pixel of {some_of(missing)}: not learned")
    if data.name == "folder" and data.unlabelled < data.num_classes and data.classes[-1] in missing:
        print(f"note: with --ignore {data.unlabelled} classes.txt names the other values in their order; if "
              f'it has a line for {data.unlabelled} too, begin all lines with their values ("0 sky")')
    if strokes:
        share = 100 * pixels[:data.num_classes].sum().item() / pixels.sum().item()
        print(f"strokes label {share:.1f} % of the pixels of {len(data)} training images", flush=True)
        if share > 50:
            other_way = ", or give --ignore 0, which holds for all masks" if data.name == "folder" else ""
            print("note: strokes usually label a few percent: if 0 means unlabelled in these masks, write "
                  f"255 there{other_way}; full masks want --method full")
