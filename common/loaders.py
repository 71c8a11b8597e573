"""What a network sees of a data set: views, the order of the samples, loaders.

All that is random about a training sample comes from torch's CPU generator, with a seed of the sample's own:
they are the same for any number of workers, and a resumed run goes on with the batches it would have had.
"""
import hashlib
import itertools
from functools import partial

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler

from common.run import UserError
from common.transforms import augment, augment_scribble, normalise, resize_whole, seeded


class TrainView(Dataset):
    """Augmented samples: view[(index, sample_seed)] -> dict(image, mask, index); same key, same sample.

    image float32 (3,crop,crop), normalised; mask uint8 (crop,crop), 255 = ignore. size: short side at r = 1,
    0 = the image's own; r ~ U(scale). crop_retries: see random_crop.
    """

    def __init__(self, data, size, crop, scale=(0.5, 2.0), photometric=True, crop_retries=10):
        self.data = data
        self.augment = partial(augment, size=size, crop=crop, scale=scale, photometric=photometric,
                               crop_retries=crop_retries)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, key):
        index, sample_seed = key
        image, mask = self.data.read(index)
        with seeded(sample_seed):
            image, mask = self.augment(image, mask)
        return {"image": image, "mask": mask, "index": index}


class ScribbleView(TrainView):
    """Samples of PFA (Sec. 4.2, see augment_scribble): as TrainView's, and classes bool (N,): those that are
    labelled anywhere in the whole image. rotation: largest angle in degrees. blur: False = never."""

    def __init__(self, data, size, crop, scale=(0.5, 2.0), rotation=10.0, blur=True):
        self.data = data
        self.augment = partial(augment_scribble, size=size, crop=crop, scale=scale, rotation=rotation,
                               blur=blur)

    def __getitem__(self, key):
        index, sample_seed = key
        image, mask = self.data.read(index)
        classes = torch.bincount(mask.flatten(), minlength=256)[:self.data.num_classes] > 0
        with seeded(sample_seed):
            image, mask = self.augment(image, mask)
        return {"image": image, "mask": mask, "classes": classes, "index": index}


class TestView(Dataset):
    """Whole images: view[i] -> dict(image, mask, index).

    image float32 (3,h,w), normalised, by resize_whole; mask uint8 (H,W) as in the file: resize the logits to
    it before argmax. UserError for a square of size 0.
    """
    __test__ = False                                     # pytest: this is no test

    def __init__(self, data, size, square=False):
        if square and not size:
            raise UserError("--size 0 leaves every image as it is, but square test images need a side: set "
                            "--size to its number of pixels, such as 513.")
        self.data, self.size, self.square = data, size, square

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        image, mask = self.data.read(i)
        image = normalise(resize_whole(image, self.size, self.square))
        return {"image": image, "mask": mask, "index": i}


# ---- batches and loaders ---------------------------------------------------------------------------------

def mixed_seed(*numbers):
    """Integers -> one 56-bit seed. A hash, so that neighbouring numbers give unrelated seeds."""
    text = " ".join(map(str, numbers))
    content = text.encode("utf-8", "surrogatepass")         # of file names that are no UTF-8, too
    return int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "little")


class BatchesFrom(Sampler):
    """Batches of the iterations start..stop-1 (stop = None: without end) as lists of (index, sample_seed).

    A run is one long row of samples, a fresh permutation of the data set every epoch, cut into batches of
    batch_size; rank r of w gets the samples r::w of each. Seed, batch_size and iteration decide a batch.
    """

    def __init__(self, length, batch_size, seed, start=0, stop=None, rank=0, world=1):
        if batch_size < 1 or batch_size % world:
            raise UserError(f"--batch-size {batch_size} counts the images of all processes together: it "
                            f"must be a multiple of their number, {world}.")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.stop, self.rank, self.world = start, stop, rank, world

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        current, order = None, None
        for iteration in itertools.count(self.start) if self.stop is None else range(self.start, self.stop):
            batch = []
            for k in range(iteration * self.batch_size, (iteration + 1) * self.batch_size):
                epoch, position = divmod(k, self.length)
                if epoch != current:
                    generator = torch.Generator().manual_seed(mixed_seed(self.seed, "epoch", epoch))
                    order = torch.randperm(self.length, generator=generator).tolist()
                    current = epoch
                batch.append((order[position], mixed_seed(self.seed, "sample", k)))
            yield batch[self.rank::self.world]


def make_loader(view, batches, workers, device):
    """Its own generator: every pass over a DataLoader draws a number, and dropout must not notice that."""
    return DataLoader(view, batch_sampler=batches, num_workers=workers, persistent_workers=workers > 0,
                      pin_memory=torch.device(device).type == "cuda", generator=torch.Generator())


def train_loader(view, batch_size, seed, start, stop, workers, device, rank=0, world=1):
    """DataLoader over a TrainView, see BatchesFrom: image (B,3,crop,crop), mask (B,crop,crop), index (B)."""
    batches = BatchesFrom(len(view), batch_size, seed, start, stop, rank, world)
    return make_loader(view, batches, workers, device)


def eval_loader(view, workers, device, rank=0, world=1):
    """DataLoader over a TestView, one image a batch as sizes differ; rank r of w gets the images r::w."""
    return make_loader(view, [[i] for i in range(rank, len(view), world)], workers, device)


def to_device(batch, device, *names):
    """A batch on its way to the network: tensors on the device, float (B,C,H,W) in channels_last order, masks
    uint8 (B,H,W) as int64 (they travel at an eighth of its size). batch: a dict, whose entries `names` are
    taken in this order, or a sequence of tensors, without names."""
    tensors = [batch[name] for name in names] if names else batch
    on_cuda = torch.device(device).type == "cuda"           # then make_loader's batches are in pinned memory
    moved = []
    for tensor in tensors:
        is_image = tensor.ndim == 4 and tensor.is_floating_point()
        memory_format = torch.channels_last if is_image else torch.preserve_format
        tensor = tensor.to(device, non_blocking=on_cuda, memory_format=memory_format)
        is_mask = tensor.ndim == 3 and tensor.dtype == torch.uint8
        moved.append(tensor.long() if is_mask else tensor)
    return moved


def of_all_ranks(tensor):
    """(B,...) of every process -> (B*world,...) in the order of the undivided batch; rank r has r::world."""
    if not dist.is_initialized():
        return tensor
    tensor = tensor.contiguous()
    every = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(every, tensor)
    return torch.stack(every, 1).flatten(0, 1)


def share_of_ranks(count):
    """A count of this process over its mean over all processes: what turns the average that
    DistributedDataParallel takes over processes into a mean over all that is counted."""
    if not dist.is_initialized():
        return 1.0
    mine = count.float()
    mean = mine / dist.get_world_size()
    dist.all_reduce(mean)
    return mine / mean.clamp(min=1e-6)
