"""What a method costs: its training step against the same network's ordinary step, in the same process; and
what its training samples cost, in seconds of one processor core.

    python tests/benchmark.py [--device auto] [--steps 10] [--only cbp_occl]

Both steps see the same batch and take turns, so that a machine whose speed drifts slows both; the ratio is
the median of the ratios of neighbours. A step is forward, losses, backward and optimizer. Peak memory: on
CUDA of one step of each kind; on a CPU of the whole process.
"""
import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cbp_occl, pfa_scribble, protopool, scaleprotoseg  # noqa: E401, E402
from common import datasets, loaders, run, speed  # noqa: E402


def config(script, preset, **options):
    return run.make_config(script.Config, script.PRESETS, preset, out="unused", **options)


def channels_last(x, device):
    return x.to(device, memory_format=torch.channels_last)


def cbp_occl_steps(device, batch_size):
    """SegFormer-B0 at 512 x 512, 150 classes: ordinary 1x1 classifier, and CBP + OCCL. Limit: 1.10."""
    cfg = config(cbp_occl, "ade20k-segformer-b0", batch_size=batch_size)
    x = channels_last(torch.randn(batch_size, 3, 512, 512), device)
    regions = torch.randint(150, (batch_size, 4, 4))                    # 16 an image, about as in ADE20K
    labels = regions.repeat_interleave(128, 1).repeat_interleave(128, 2).to(device)
    for name in ("baseline", "CBP + OCCL"):
        row = replace(cfg, **cbp_occl.ROWS[name])
        net = channels_last(cbp_occl.build_model(row, 150), device).train()
        optimizer = cbp_occl.build_optimizer(net, row, device)
        scheduler = run.poly_schedule(optimizer, row.iterations)
        yield partial(cbp_occl.train_step, net, net, optimizer, scheduler, x, labels, row)


def protopool_steps(device, batch_size):
    """ResNet-34 at 224 x 224, 200 classes, joint phase: linear, and 202 prototypes. Limit: 1.10."""
    cfg = config(protopool, "cub-r34", batch_size=batch_size)
    x = channels_last(torch.randn(batch_size, 3, cfg.size, cfg.size), device)
    labels, tau = torch.randint(200, (batch_size,)).to(device), protopool.temperature(10)
    progress = dict(classes=range(200), num_prototypes=cfg.prototypes)
    for kind, trains_last in ((0, True), (1, False)):                   # as in the joint phase
        net = protopool.build_models(progress, cfg, device)[kind].train()
        net.last_layer.requires_grad_(trains_last)
        optimizer, _ = protopool.build_optimizer(net, "joint", cfg, device)
        yield partial(protopool.train_step, net, optimizer, x, labels, tau, cfg)


def scaleprotoseg_steps(device, batch_size):
    """ResNet-101 at 513 x 513, 19 classes, joint: plain DeepLabv2, and 228 prototypes. Limit: 1.15."""
    regions = torch.randint(19, (batch_size, 9, 9))
    labels = regions.repeat_interleave(57, 1).repeat_interleave(57, 2).to(device)
    x = channels_last(torch.randn(batch_size, 3, 513, 513), device)
    for method in ("deeplab", "scaleprotoseg"):
        cfg = config(scaleprotoseg, "cityscapes", batch_size=batch_size, method=method)
        owner, scale = scaleprotoseg.first_prototypes(cfg, 19)
        progress = dict(phase="joint", classes=range(19), prototype_class=owner, prototype_scale=scale)
        net = channels_last(scaleprotoseg.build_model(cfg, progress), device).train()
        optimizer, scheduler = scaleprotoseg.build_optimizer(net, "joint", cfg, device)
        yield partial(scaleprotoseg.train_step, net, net, optimizer, scheduler, x, labels, "joint", cfg)


def distance_steps(device, batch_size, classes):
    """prototype_distances alone, 64 x 64 cells, forward and backward: one product with rows of all scales,
    zero but in the prototype's own, and ours. Limits: 1.0 at 19 classes, 0.5 at 150."""
    scale = torch.arange(4, device=device).repeat_interleave(3 * classes)
    table, is_scale = scaleprotoseg.members_by_key(scale, 4), torch.nn.functional.one_hot(scale).float()
    z = channels_last(torch.rand(batch_size, 256, 64, 64), device).requires_grad_()
    p = torch.rand(len(scale), 64, device=device, requires_grad=True)
    slope = torch.rand(batch_size, len(p), 64, 64, device=device)

    def with_zeros():
        rows, zz = is_scale[:, :, None] * p[:, None], z.flatten(2).unflatten(1, (4, -1)).square().sum(2)
        d2 = is_scale @ zz - 2 * (rows.flatten(1) @ z.flatten(2)) + p.square().sum(1)[:, None]
        return d2.clamp_min(0).view_as(slope)
    for distances in (with_zeros, lambda: scaleprotoseg.prototype_distances(z, p, scale, table)):
        yield lambda distances=distances: torch.autograd.grad(distances(), (z, p), slope)


def pfa_scribble_steps(device, batch_size):
    """SegFormer-B1 at 512 x 512, 21 classes: partial cross-entropy, and PFA's last phase. Limit: 1.35."""
    x = channels_last(torch.randn(batch_size, 3, 512, 512), device)
    scribbles = torch.full((batch_size, 512, 512), 255, device=device)
    for c, row in ((0, 40), (8, 200), (15, 400)):                       # three strokes, 1.7 % of the pixels
        scribbles[:, row:row + 3, :480] = c
    classes = pfa_scribble.classes_in(scribbles, 21)
    for method, phase in (("pce", "warmup"), ("pfa", "global")):
        cfg = config(pfa_scribble, "voc-b1", batch_size=batch_size, method=method)
        net = channels_last(pfa_scribble.build_model(cfg, 21), device).train()
        if method == "pfa":                                             # the memory is full
            net.memory.bank.normal_()
            net.memory.count.fill_(cfg.slots)
        optimizers = pfa_scribble.build_optimizer(net, cfg, device)     # with its scheduler
        yield partial(pfa_scribble.train_step, net, net, *optimizers, x, scribbles, classes, phase, cfg)


# script: model, its steps, images a batch on a CPU and on a GPU
BENCHMARKS = {"cbp_occl": ("SegFormer-B0, 512x512", cbp_occl_steps, 2, 16),
              "protopool": ("ResNet-34, 224x224", protopool_steps, 8, 80),
              "scaleprotoseg": ("ResNet-101, 513x513", scaleprotoseg_steps, 1, 10),
              "distances": ("19 classes", partial(distance_steps, classes=19), 2, 10),
              "distances-150": ("150 classes", partial(distance_steps, classes=150), 2, 10),
              "pfa_scribble": ("SegFormer-B1, 512x512", pfa_scribble_steps, 1, 16)}


def write_samples(root, count):
    """ADE20K's layout with pictures of 512 x 683 pixels, smooth with some grain, and masks of 63 areas."""
    for folder in ("images/training", "annotations/training"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        picture = sum(strength * torch.nn.functional.interpolate(torch.randn(1, 3, *grid), (512, 683))
                      for strength, grid in ((40, (8, 11)), (20, (64, 85)), (5, (512, 683))))[0] + 128
        picture = picture.clamp(0, 255).byte().permute(1, 2, 0)
        Image.fromarray(picture.numpy()).save(root / f"images/training/{i}.jpg", quality=90)
        areas = torch.randint(151, (7, 9)).repeat_interleave(76, 0).repeat_interleave(76, 1)[:512, :683]
        Image.fromarray(areas.byte().numpy()).save(root / f"annotations/training/{i}.png")


def seconds_of_core(action, keys):
    """Mean over the keys, after one pass that does not count."""
    for key in keys:
        action(key)
    start = time.process_time()
    for key in keys:
        action(key)
    return (time.process_time() - start) / len(keys)


def print_loading(steps):
    """A training sample of cbp_occl on ADE20K: from its two files to the normalised crop and its mask."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)                                            # as in a process of a DataLoader
    with tempfile.TemporaryDirectory() as folder:
        write_samples(Path(folder), 4)
        data = datasets.open_dataset("ade20k", folder, "train")
        view = loaders.TrainView(data, 512, 512)
        keys = [(k % 4, k) for k in range(10 * steps)]                  # image, seed of the sample
        whole = seconds_of_core(lambda key: view[key], keys)
        reading = seconds_of_core(lambda key: data.read(key[0]), keys)
    torch.set_num_threads(threads)
    print(f"loading: a sample like ADE20K's, 512 x 683 to 512 x 512, takes {1000 * whole:.1f} ms of a core, "
          f"{1000 * reading:.1f} of them reading and decoding: {1 / whole:.0f} images/s a core")


def compared(first, second, repeats, device):
    """Median seconds of two steps that take turns, and the median of second / first of neighbours."""
    pairs = [(seconds(first, device), seconds(second, device)) for _ in range(repeats)]
    return *map(statistics.median, zip(*pairs)), statistics.median(b / a for a, b in pairs)


def seconds(step, device):
    speed.synchronize(device)
    start = time.perf_counter()
    step()
    speed.synchronize(device)
    return time.perf_counter() - start


def memory_of(step, device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step()
    return speed.peak_memory(device)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    parser.add_argument("--steps", type=int, default=10, help="of each kind, after two that do not count")
    parser.add_argument("--only", choices=(*BENCHMARKS, "loading"), help="one of these instead of all")
    args = parser.parse_args()
    device = run.setup(args.device)[0]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.steps} steps\n")
    if args.only in (None, "loading"):
        print_loading(args.steps)
    if args.only == "loading":
        return
    print("\n| script | model | batch | ordinary step, s | our step, s | ratio | our images/s | "
          "peak memory, GiB: ordinary, ours |\n|---|---|---|---|---|---|---|---|")
    for script, (model, build, cpu_batch, gpu_batch) in BENCHMARKS.items():
        if args.only in (None, script):
            batch_size = gpu_batch if device.type == "cuda" else cpu_batch
            ordinary, ours = build(device, batch_size)
            memory = [memory_of(step, device) for step in (ordinary, ours)]             # also the warm-up
            ordinary(), ours()
            a, b, ratio = compared(ordinary, ours, args.steps, device)
            gib = ", ".join("?" if m is None else f"{m:.2f}" for m in memory)
            print(f"| {script} | {model} | {batch_size} | {a:.4g} | {b:.4g} | {ratio:.3f} | "
                  f"{batch_size / b:.3g} | {gib} |", flush=True)


if __name__ == "__main__":
    main()
