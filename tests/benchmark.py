"""What a method costs: its training step against the same network's ordinary step, in the same process.

    python tests/benchmark.py [--device auto] [--steps 10] [--only cbp_occl]

Both steps see the same batch and take turns, so that a machine whose speed drifts slows both; the ratio is
the median of the ratios of neighbours. A step is forward, losses, backward and optimizer. Peak memory: on
CUDA of one step of each kind; on a CPU of the whole process.
"""
import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import run  # noqa: E402


def cbp_occl_steps(device, batch_size):
    """SegFormer-B0 at 512 x 512, 150 classes: ordinary 1x1 classifier, and CBP + OCCL.

    Limit of the ratio: 1.10.
    """
    import cbp_occl
    size, num_classes = 512, 150
    cfg = run.make_config(cbp_occl.Config, cbp_occl.PRESETS, "ade20k-segformer-b0", out="unused",
                          batch_size=batch_size)
    x = torch.randn(batch_size, 3, size, size).to(device, memory_format=torch.channels_last)
    regions = torch.randint(num_classes, (batch_size, 4, 4))           # 16 an image, about as in ADE20K
    labels = regions.repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2).to(device)
    steps = []
    for overrides in (cbp_occl.ROWS["baseline"], cbp_occl.ROWS["CBP + OCCL"]):
        row = replace(cfg, **overrides)
        net = cbp_occl.build_model(row, num_classes).to(device, memory_format=torch.channels_last).train()
        optimizer = cbp_occl.build_optimizer(net, row, device)
        scheduler = run.poly_schedule(optimizer, row.iterations)
        steps.append(lambda net=net, optimizer=optimizer, scheduler=scheduler, row=row:
                     cbp_occl.train_step(net, net, optimizer, scheduler, x, labels, row))
    return "cbp_occl", "SegFormer-B0, 512x512", steps


def protopool_steps(device, batch_size):
    """ResNet-34 at 224 x 224, 200 classes, joint phase: linear classifier, and ProtoPool with 202 prototypes.

    Limit of the ratio: 1.10.
    """
    import protopool
    num_classes = 200
    cfg = run.make_config(protopool.Config, protopool.PRESETS, "cub-r34", out="unused", batch_size=batch_size)
    x = torch.randn(batch_size, 3, cfg.size, cfg.size).to(device, memory_format=torch.channels_last)
    labels = torch.randint(num_classes, (batch_size,)).to(device)
    steps = []
    for plain in (True, False):
        backbone = protopool.build_extractor(cfg.backbone)
        net = (protopool.PlainClassifier(backbone, num_classes) if plain else protopool.build_pool(
            backbone, dict(classes=range(num_classes), num_prototypes=cfg.prototypes), cfg))
        net = net.to(device, memory_format=torch.channels_last).train()
        net.last_layer.requires_grad_(plain)                           # as in the joint phase
        optimizer, _ = protopool.build_optimizer(net, "joint", cfg, device)
        tau = protopool.temperature(10)
        steps.append(lambda net=net, optimizer=optimizer: protopool.train_step(net, optimizer, x, labels, tau, cfg))
    return "protopool", "ResNet-34, 224x224", steps


# script: its steps, images a batch on a CPU and on a GPU
BENCHMARKS = {"cbp_occl": (cbp_occl_steps, 2, 16), "protopool": (protopool_steps, 8, 80)}


def seconds(step, device):
    run.synchronize(device)
    start = time.perf_counter()
    step()
    run.synchronize(device)
    return time.perf_counter() - start


def memory_of(step, device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step()
    return run.peak_memory(device)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    parser.add_argument("--steps", type=int, default=10,
                        help="steps of each kind, after two that do not count")
    parser.add_argument("--only", choices=tuple(BENCHMARKS), help="one script instead of all")
    args = parser.parse_args()
    device = run.setup(args.device)[0]
    name = (torch.cuda.get_device_name(device) if device.type == "cuda" else
            f"{torch.get_num_threads()} CPU threads")
    print(f"{name}, torch {torch.__version__}, median of {args.steps} alternating steps\n")
    print("| script | model | batch | ordinary step, s | our step, s | ratio | our images/s | "
          "peak memory, GiB: ordinary, ours |")
    print("|---|---|---|---|---|---|---|---|")
    for script, (build, cpu_batch, gpu_batch) in BENCHMARKS.items():
        if args.only in (None, script):
            batch_size = gpu_batch if device.type == "cuda" else cpu_batch
            title, model, (ordinary, ours) = build(device, batch_size)
            memory = [memory_of(step, device) for step in (ordinary, ours)]            # also the warm-up
            ordinary(), ours()
            pairs = [(seconds(ordinary, device), seconds(ours, device)) for _ in range(args.steps)]
            a, b = (statistics.median(times) for times in zip(*pairs))
            ratio = statistics.median(ours_s / ordinary_s for ordinary_s, ours_s in pairs)
            print(f"| {title} | {model} | {batch_size} | {a:.4g} | {b:.4g} | {ratio:.3f} | {batch_size / b:.3g} | "
                  + ", ".join("?" if m is None else f"{m:.2f}" for m in memory) + " |")


if __name__ == "__main__":
    main()
