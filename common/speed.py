"""How long and how much: seconds of a step, memory, multiply-adds, and the line that a run begins with."""
import copy
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

from common.run import duration, precision, rng_state, set_rng_state, write_json
from common.tables import cell_text, markdown


def synchronize(device):
    """Wait until the device has done its work: before every reading of the clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device):
    """Highest memory use so far in GiB, on CUDA the GPU allocator's, else the process's. None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    try:
        import resource                                 # not on Windows
    except ImportError:
        return None
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte / 2 ** 30


def measured_speed(step, parts, device, repeats=3):
    """Seconds of step(): median of `repeats` after one warm-up. `parts` and the RNG stay as they were."""
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    scalers = {name: copy.deepcopy(vars(part).pop("scaler", None)) for name, part in parts.items()}
    rng = rng_state()
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - start)
    for name, part in parts.items():
        part.load_state_dict(before[name])
        vars(part).pop("scaler", None)                  # of --amp fp16, see run.backward
        if scalers[name]:
            part.scaler = scalers[name]
    set_rng_state(rng)
    return sorted(times[1:])[repeats // 2]


def announce(step, view, parts, steps, test_images, cfg, machine):
    """One line before training: steps, expected time at the speed measured now, peak memory.

    step(batch) is one training iteration on `parts`; view[(index, sample_seed)] is a training sample;
    test_images are evaluated on the way; without a backward pass each takes 0.4 of a step's image.
    """
    def read_batch():                                   # this process's batch, as one loader process would
        return default_collate([view[(i % len(view), i)] for i in range(cfg.batch_size // machine.world)])

    read_batch()                                        # the second time the files are in the system's cache
    start = time.perf_counter()
    batch = read_batch()
    loading = time.perf_counter() - start
    one = measured_speed(lambda: step(batch), parts, machine.device)
    one = max(one, loading / cfg.workers) if cfg.workers else one + loading
    seconds = steps * one + 0.4 * one * test_images / cfg.batch_size
    memory = peak_memory(machine.device)
    if machine.rank == 0:
        shown = f"{memory:.1f} GiB" if memory else "unknown"
        kind = precision(machine.device, cfg.amp)
        print(f"{steps} steps of {cfg.batch_size} images on {machine.device.type} x {machine.world}, "
              f"amp {kind}: about {duration(seconds)} at {one:.2g} s a step, peak memory {shown}",
              flush=True)


def cost_of_model(parts, train_step, predict, num_classes, cfg, device):
    """What a segmentation network costs on random images of --crop pixels: a dict of numbers.

    parts: model, optimizer, scheduler, made for this measurement, which leaves the model in eval mode.
    train_step(x, labels): one step on --batch-size images; predict(x): from one image to labels. gflops: 1e9
    multiply-adds of the model for one image, as mmsegmentation counts; training_gib: None but on CUDA.
    """
    net = parts["model"]
    x = torch.randn(cfg.batch_size, 3, cfg.crop, cfg.crop).to(device, memory_format=torch.channels_last)
    labels = torch.randint(num_classes, (cfg.batch_size, cfg.crop, cfg.crop)).to(device)
    seconds = measured_speed(lambda: train_step(x, labels), parts, device)
    memory = None
    if device.type == "cuda":
        train_step(x, labels)                           # from here on the optimizer keeps its moments
        torch.cuda.reset_peak_memory_stats(device)
        train_step(x, labels)
        memory = peak_memory(device)
    net.eval()
    one = measured_speed(lambda: predict(x[:1]), {}, device, repeats=11)
    with torch.inference_mode():
        _, multiply_adds = counted(net, x[:1])
    return dict(parameters=sum(p.numel() for p in net.parameters()), gflops=multiply_adds / 1e9,
                training_gib=memory, training_images_per_second=cfg.batch_size / seconds,
                inference_images_per_second=1 / one)


def report_costs(costs, cfg, device):
    """{name: what cost_of_model returns} -> a table on the screen, and OUT/profile.json."""
    print(f"On {device.type}, training with {cfg.batch_size} images of {cfg.crop} x {cfg.crop} pixels at "
          "once; GFLOPs and inference: one image.\n")
    rows = [[name, f"{cost['parameters'] / 1e6:.3f}", f"{cost['gflops']:.1f}",
             cell_text([cost["training_gib"]], 2), f"{cost['training_images_per_second']:.1f}",
             f"{cost['inference_images_per_second']:.1f}"] for name, cost in costs.items()]
    print(markdown(["model", "parameters, M", "GFLOPs", "training, GiB", "training, images/s",
                    "inference, images/s"], rows))
    about = dict(preset=cfg.preset, device=device.type, crop=cfg.crop, batch_size=cfg.batch_size)
    write_json(Path(cfg.out) / "profile.json", costs | about)


def counted(module, x, leave_out=()):
    """module(x), and its multiply-adds; operators whose name holds a word of `leave_out` do not count.
    Attention is computed as two plain products, as the counter does not know the fused one of a CPU."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        y = module(x)
    flops = counter.get_flop_counts()["Global"]
    counted_flops = sum(count for operator, count in flops.items()
                        if not any(word in str(operator) for word in leave_out))
    return y, counted_flops / 2
