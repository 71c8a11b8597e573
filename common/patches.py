"""Patches of training images that lie far from each other: a start for prototypes."""
import torch


@torch.no_grad()
def training_patches(features, loader, device, seed, most=50_000):
    """Vectors of the maps features(x), (B,D,h,w), of a loader's images: (N,D). As many of each image, drawn
    at random, as make about `most` in all."""
    generator = torch.Generator().manual_seed(seed)
    few = max(1, most // len(loader.dataset))
    rows = []
    for x, _ in loader:
        z = features(x.to(device)).float().flatten(2).transpose(1, 2)                # (B,h*w,D)
        order = torch.rand(z.shape[:2], generator=generator).argsort(1)[:, :few].to(device)
        rows.append(z.gather(1, order[..., None].expand(-1, -1, z.shape[2])).flatten(0, 1))
    return torch.cat(rows)


def spread_patches(patches, count, seed, tries=6):
    """Greedy k-means++: `count` rows of patches (N,D), far from each other. -> (count,D)

    Each is the best of `tries`, drawn by the squared distance to the nearest row chosen before: the one that
    leaves the smallest sum of such distances (Arthur and Vassilvitskii, SODA 2007).
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(patches), (1,), generator=generator)
    nearest = torch.full((len(patches),), 1e30, device=patches.device)
    chosen = []
    while True:
        d2 = torch.stack([(patches - patches[row]).square().sum(1) for row in rows.tolist()])  # (tries,N)
        left = torch.minimum(nearest, d2)
        best = int(left.sum(1).argmin())
        nearest = left[best]
        chosen.append(int(rows[best]))
        if len(chosen) == count:
            return patches[chosen]
        chance = nearest.cpu() + 1e-12                               # above 0 even where all are chosen
        rows = torch.multinomial(chance, tries, replacement=True, generator=generator)
