"""What a method costs: its training step against the same network's ordinary step, in the same process.

    python tests/benchmark.py [--device auto] [--steps 10] [--only cbp_occl]

Both steps see the same batch and take turns, so that a machine whose speed drifts slows both; the ratio is
the median of the ratios of neighbours. A step is forward, losses, backward and optimizer. Peak memory: on
CUDA of one step of each kind; on a CPU of the whole process. Below, functions against the loops over images,
classes, scales and pairs that their equations suggest, forward and backward.
"""
import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import run, speed  # noqa: E402


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
        progress = dict(classes=range(num_classes), num_prototypes=cfg.prototypes)
        ordinary, pool = protopool.build_models(progress, cfg, device)
        net = (ordinary if plain else pool).train()
        net.last_layer.requires_grad_(plain)                           # as in the joint phase
        optimizer, _ = protopool.build_optimizer(net, "joint", cfg, device)
        tau = protopool.temperature(10)
        steps.append(lambda net=net, optimizer=optimizer: protopool.train_step(net, optimizer, x, labels, tau, cfg))
    return "protopool", "ResNet-34, 224x224", steps


def scaleprotoseg_steps(device, batch_size):
    """ResNet-101 at 513 x 513, 19 classes, joint step: the plain DeepLabv2, and 228 prototypes with all losses.

    Limit of the ratio: 1.15.
    """
    import scaleprotoseg
    num_classes, steps = 19, []
    labels = torch.randint(num_classes, (batch_size, 9, 9)).repeat_interleave(57, 1).repeat_interleave(57, 2).to(device)
    for method in ("deeplab", "scaleprotoseg"):
        cfg = run.make_config(scaleprotoseg.Config, scaleprotoseg.PRESETS, "cityscapes", out="unused",
                              batch_size=batch_size, method=method)
        x = torch.randn(batch_size, 3, cfg.crop, cfg.crop).to(device, memory_format=torch.channels_last)
        prototype_class, prototype_scale = scaleprotoseg.first_prototypes(cfg, num_classes)
        net = scaleprotoseg.build_model(cfg, dict(phase="joint", classes=range(num_classes),
                                                  prototype_class=prototype_class, prototype_scale=prototype_scale))
        net = net.to(device, memory_format=torch.channels_last).train()
        optimizer, scheduler = scaleprotoseg.build_optimizer(net, "joint", cfg, device)
        steps.append(lambda net=net, optimizer=optimizer, scheduler=scheduler, cfg=cfg, x=x:
                     scaleprotoseg.train_step(net, net, optimizer, scheduler, x, labels, "joint", cfg))
    return "scaleprotoseg", "ResNet-101, 513x513", steps


def pfa_scribble_steps(device, batch_size):
    """SegFormer-B1 at 512 x 512, 21 classes: partial cross-entropy alone, and PFA's last phase, memory full.

    Limit of the ratio: 1.35.
    """
    import pfa_scribble
    num_classes, size, steps = 21, 512, []
    x = torch.randn(batch_size, 3, size, size).to(device, memory_format=torch.channels_last)
    scribbles = torch.full((batch_size, size, size), 255)
    for c, row in ((0, 40), (8, 200), (15, 400)):                      # three strokes an image, 1.7 % of the pixels
        scribbles[:, row:row + 3, :size - 32] = c
    scribbles = scribbles.to(device)
    classes = pfa_scribble.classes_in(scribbles, num_classes)
    for method, phase in (("pce", "warmup"), ("pfa", "global")):
        cfg = run.make_config(pfa_scribble.Config, pfa_scribble.PRESETS, "voc-b1", out="unused",
                              batch_size=batch_size, method=method)
        net = pfa_scribble.build_model(cfg, num_classes).to(device, memory_format=torch.channels_last).train()
        if method == "pfa":
            net.memory.bank.normal_()
            net.memory.count.fill_(cfg.slots)
        optimizer, scheduler = pfa_scribble.build_optimizer(net, cfg, device)
        steps.append(lambda net=net, optimizer=optimizer, scheduler=scheduler, cfg=cfg, phase=phase:
                     pfa_scribble.train_step(net, net, optimizer, scheduler, x, scribbles, classes, phase, cfg))
    return "pfa_scribble", "SegFormer-B1, 512x512", steps


# script: its steps, images a batch on a CPU and on a GPU
BENCHMARKS = {"cbp_occl": (cbp_occl_steps, 2, 16), "protopool": (protopool_steps, 8, 80),
              "scaleprotoseg": (scaleprotoseg_steps, 1, 10), "pfa_scribble": (pfa_scribble_steps, 1, 16)}


def looped_diversity(d2, labels, prototype_class, prototype_scale):
    """scaleprotoseg.diversity_loss, term by term."""
    terms = []
    for b in range(len(d2)):
        for c in labels[b].unique().tolist():
            for s in prototype_scale.unique().tolist():
                own = ((prototype_class == c) & (prototype_scale == s)).nonzero()[:, 0].tolist()
                log_p = [F.log_softmax(d2[b, p][labels[b] == c], 0) for p in own]
                for i in range(len(own)):
                    for j in range(i + 1, len(own)):
                        both = (F.kl_div(log_p[i], log_p[j], reduction="sum", log_target=True)
                                + F.kl_div(log_p[j], log_p[i], reduction="sum", log_target=True))
                        terms.append((-both / 2).exp())
    return torch.stack(terms).mean()


def looped_groups(similarity, weights, members):
    """scaleprotoseg.group_activations, class by class."""
    return torch.cat([torch.einsum("bnhw,gn->bghw", similarity[:, own], w).exp()
                      for w, own in zip(weights, members)], 1)


def diversity_case(num_classes, in_image, device):
    """(loop, ours): batch 2, 65 x 65 cells, 4 scales with 3 prototypes a class. Equal up to rounding."""
    import scaleprotoseg
    prototype_class = torch.arange(num_classes).repeat_interleave(3).repeat(4).to(device)
    prototype_scale = torch.arange(4).repeat_interleave(3 * num_classes).to(device)
    d2 = (8 * torch.rand(2, len(prototype_class), 65, 65)).to(device).requires_grad_(True)
    labels = torch.stack([torch.randperm(num_classes)[:in_image][torch.randint(in_image, (65, 65))]
                          for _ in range(2)]).to(device)
    table = scaleprotoseg.pair_table(prototype_class, prototype_scale)

    def loop():
        return looped_diversity(d2, labels, prototype_class, prototype_scale)

    def ours():
        return scaleprotoseg.diversity_loss(d2, labels, prototype_class, prototype_scale, table)
    return loop, ours, [d2]


def group_case(num_classes, needs_grad, device):
    """(loop, ours): batch 2, 65 x 65 cells, 12 prototypes and 3 groups a class. In training only the weights learn."""
    import scaleprotoseg
    prototype_class = torch.arange(num_classes).repeat_interleave(3).repeat(4)
    members = scaleprotoseg.members_by_key(prototype_class, num_classes).to(device)
    similarity = (3 * torch.rand(2, 12 * num_classes, 65, 65)).to(device).requires_grad_(needs_grad)
    weights = scaleprotoseg.project_simplex(torch.rand(num_classes, 3, 12)).to(device).requires_grad_(True)

    def loop():
        return looped_groups(similarity, weights, members).mean()

    def ours():
        return scaleprotoseg.group_activations(similarity, weights, members).mean()
    return loop, ours, [weights] + [similarity] * needs_grad


# function: its two versions. Limits: 15 and 80 times as fast; groups no slower
FUNCTIONS = {
    "diversity_loss, 19 classes, 12 in an image": lambda device: diversity_case(19, 12, device),
    "diversity_loss, 150 classes, 10 in an image": lambda device: diversity_case(150, 10, device),
    "group_activations, 19 classes": lambda device: group_case(19, False, device),
    "group_activations, 150 classes": lambda device: group_case(150, False, device),
    "group_activations, 19 classes, gradient of similarities too": lambda device: group_case(19, True, device),
    "group_activations, 150 classes, gradient of similarities too": lambda device: group_case(150, True, device),
}


def both_ways(compute, leaves):
    """One call: forward, backward; returns the value and the gradients."""
    value = compute()
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def benchmark_functions(device, repeats):
    print("\n| function, forward and backward | loop, ms | ours, ms | times as fast |\n|---|---|---|---|")
    for name, build in FUNCTIONS.items():
        loop, ours, leaves = build(device)
        for a, b in zip(both_ways(loop, leaves), both_ways(ours, leaves)):             # also the warm-up
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
        pairs = [(seconds(lambda: both_ways(loop, leaves), device), seconds(lambda: both_ways(ours, leaves), device))
                 for _ in range(repeats)]
        a, b = (statistics.median(times) for times in zip(*pairs))
        print(f"| {name} | {1e3 * a:.1f} | {1e3 * b:.1f} | {statistics.median(a / b for a, b in pairs):.1f} |")


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
                  + ", ".join("?" if m is None else f"{m:.2f}" for m in memory) + " |", flush=True)
    if args.only in (None, "scaleprotoseg"):
        benchmark_functions(device, args.steps)


if __name__ == "__main__":
    main()
