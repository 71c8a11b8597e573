"""Pretrained weights: find, read and rename them, and load them if all of them fit."""
import hashlib
import os
import pickletools
import re
import zipfile
from collections import Counter
from pathlib import Path

import torch
import torchvision

from common.mit import MIT
from common.run import UserError

CLASSIFIER_KEYS = ("fc.", "classifier.", "head.", "decode_head.", "norm.")   # "norm.": before Swin's head


def load_weights(net, weights, backbone, cuts=()):
    """Fill a whole backbone from what `weights` of build_network stands for; cuts: see load_fitting."""
    if weights == "none":
        return
    state = read_state_dict(locate_weights(str(weights), backbone))
    if backbone in MIT:
        load_mit_weights(net, state, source=weights)
        return
    if backbone == "resnet50_inat" and any("cb_block." in name for name in state):
        state = conventional_branch(state)
    elif backbone.startswith("densenet"):                               # norm.1 in the files, norm1 by now
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name): value
                 for name, value in state.items()}
    load_fitting(net, state, weights, cuts)


def locate_weights(weights, backbone):
    """The path or URL behind `weights`; UserError if there is none."""
    if weights == "imagenet" and backbone in torchvision.models.list_models():
        return torchvision.models.get_model_weights(backbone).IMAGENET1K_V1.url
    if weights == "imagenet" and backbone in MIT:
        raise UserError(f"torchvision has no ImageNet weights for {backbone}: give the path or URL of the "
                        f"original {backbone}.pth or of pytorch_model.bin from HuggingFace's "
                        f"nvidia/{backbone.replace('_', '-')}.")
    if weights == "imagenet" and backbone == "resnet50_inat":
        raise UserError("resnet50_inat has weights from iNaturalist 2017, not ImageNet: give path or URL "
                        "of BBN.iNaturalist2017.res50.180epoch.best_model.pth, or none")
    if weights == "imagenet":
        raise UserError(f"there are no ImageNet weights for {backbone}: train it from scratch, weights none")
    if weights.split("?")[0].endswith(".safetensors"):
        raise UserError(f"{weights}: reading .safetensors would take another package; use the .bin or .pth "
                        "file of the same model")
    if not weights.startswith(("http://", "https://")) and not Path(weights).is_file():
        raise UserError(f"weights {weights!r}: no such file; they are none, imagenet, or path or http(s) URL "
                        "of a state dict.")
    return weights


def weights_in(weights, backbone):
    """Of a folder: FOLDER/BACKBONE.pth, or "imagenet" where that is missing and torchvision has weights.
    Anything else is returned as it is. UserError as locate_weights."""
    if weights not in ("none", "imagenet") and Path(weights).is_dir():
        path = Path(weights) / f"{backbone}.pth"
        weights = str(path) if path.exists() or backbone in MIT else "imagenet"
    if weights != "none":
        locate_weights(weights, backbone)
    return weights


def read_state_dict(source):
    """The state dict (names and tensors, on the CPU) in a file or behind a URL, else UserError."""
    path, is_url = source, source.startswith(("http://", "https://"))
    try:
        if is_url:
            name = source.split("?")[0].rsplit("/", 1)[-1]
            if not source.startswith("https://download.pytorch.org/"):  # many are called pytorch_model.bin:
                name = hashlib.sha256(source.encode()).hexdigest()[:8] + "_" + name   # one cache entry each
            path = Path(torch.hub.get_dir()) / "checkpoints" / name
            state = torch.hub.load_state_dict_from_url(source, file_name=name, map_location="cpu",
                                                       weights_only=True)
        else:
            state = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:                       # whatever pickle, zip, disk or network may come up with
        if not Path(path).exists():
            reason = printable(str(error) or type(error).__name__)
            raise UserError(f"{source}: cannot be downloaded ({reason}): check address and connection, or "
                            "give the path of a file.") from None
        where = f"{source} (kept as {path}: delete it)" if is_url else source
        raise UserError(f"{where}: cannot read these weights: {unreadable(path, str(error))}") from None
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{source} holds no state dict (names and tensors): {WRITE}.")
    return state


WRITE = "save the tensors alone, with torch.save(model.state_dict(), path), in the program that wrote it"


def printable(text, most=120):
    """The first line of a message, without control characters."""
    return "".join(c if c.isprintable() else "?" for c in text.strip().split("\n")[0])[:most]


def unreadable(path, error):
    """What a file is that torch refused with this message, in words that follow its name."""
    try:
        with open(path, "rb") as file:
            start = file.read(512).lstrip().lower()
    except OSError as problem:
        return f"{problem.strerror}."
    if not start:
        return "the file is empty: copy or download it again."
    if start.startswith(b"<"):
        return "this is a web page and not a file of weights: download the file itself."
    if start.startswith(b"version https://git-lfs"):
        return "this is only a pointer of Git LFS: fetch the file itself with git lfs pull."
    if "TorchScript" in error:
        return f"this is a TorchScript program and not a file of weights: {WRITE}."
    foreign = re.search(r"GLOBAL (\S+)", error)
    if foreign is None:
        return "the file is damaged, cut short or of another kind."
    if is_whole_object(path):
        return f"this holds a whole model ({printable(foreign[1])}) and not its weights alone: {WRITE}."
    return f"this holds more than weights ({printable(foreign[1])}): {WRITE}."


def is_whole_object(path):
    """Is the outermost thing in a file of torch.save an object of some class, and not a dict or a list?"""
    if not zipfile.is_zipfile(path):                                    # written before torch 1.6
        return False
    with zipfile.ZipFile(path) as archive:
        data = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        operators = pickletools.genops(archive.read(data))
        first = next((argument for operator, argument, _ in operators if operator.name != "PROTO"), None)
    return first is not None and first != "collections OrderedDict"     # that of {} and [] has no argument


def load_mit_weights(model, state_dict, source="state dict"):
    """Load a MixTransformer from tensors named as in the original release or by HuggingFace, whose separate
    keys and values are joined into kv. Without classifier and decoder. UserError as load_fitting."""
    if any(re.match(r"(module\.)?(backbone\.)?layers\.\d\.[012]\.", name) for name in state_dict):
        raise UserError(f"{source}: these names (layers.0.0.projection ...) are mmsegmentation's; use the "
                        "original mit_b*.pth or HuggingFace's nvidia/mit-b* instead.")
    state = {original_mit_name(name): value for name, value in state_dict.items()}
    for key in [name for name in state if ".attn.key." in name]:
        value = key.replace(".key.", ".value.")
        if value in state and state[value].shape == state[key].shape:
            state[key.replace(".key.", ".kv.")] = torch.cat([state.pop(key), state.pop(value)])
    load_fitting(model, state, source)


def original_mit_name(name):
    """segformer.encoder.block.0.1.attention.self.query.bias -> block1.1.attn.q.bias; other names stay."""
    match = re.match(r"(.*?)(?:segformer\.)?encoder\.(patch_embeddings|block|layer_norm)\.(\d+)\.(.+)", name)
    if match is None:
        return name
    part = {"patch_embeddings": "patch_embed", "block": "block", "layer_norm": "norm"}[match[2]]
    rest = match[4]
    for theirs, ours in (("attention.self.query", "attn.q"), ("attention.self.", "attn."),
                         ("attention.output.dense", "attn.proj"), ("mlp.dense", "mlp.fc"),
                         ("layer_norm_", "norm"), ("layer_norm", "norm")):
        rest = rest.replace(theirs, ours)
    return f"{match[1]}{part}{int(match[3]) + 1}.{rest}"                     # they count stages from 0


def conventional_branch(state):
    """The ResNet-50 in a checkpoint of BBN under torchvision's names.
    cb_block is the last block of layer4. The classifier and rb_block, for rare classes, are left out."""
    prefix = "module.backbone."
    names = [name for name in state if name.startswith(prefix) and not name.startswith(prefix + "rb_block.")]
    return {re.sub("^cb_block", "layer4.2", name.removeprefix(prefix)): state[name] for name in names}


def load_fitting(model, state, source, cuts=()):
    """Load state into model if all names and shapes fit, classifiers aside; else load nothing, UserError.

    A first part of the names, such as "module." or "backbone.", is taken off where the rest then fits, and a
    note says what was left out. cuts: modules made of the model's parts, whose own names for them will do;
    what the first of them lacks may be missing.
    """
    used = None
    if cuts:
        used = {id(value) for value in cuts[0].state_dict(keep_vars=True).values()}
    tried = []
    for target in (model, *cuts):
        for prefix in prefixes(target, state):
            part = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
            part = {name: value for name, value in part.items() if not name.startswith(CLASSIFIER_KEYS)}
            tried.append(misfits(target, part, used))
            if not any(tried[-1].values()):
                check_finite(part, source)
                target.load_state_dict(part, strict=False)    # only classifiers and counters can be missing
                tell_taken(prefix, state, source)
                return
    fewest = min(tried, key=lambda found: sum(map(len, found.values())))
    problems = [f"{len(names)} {what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
                for what, names in fewest.items() if names]
    raise UserError(f"{source}: these weights belong to another network, nothing was loaded "
                    f"({'; '.join(problems)}); choose the backbone that they were made for.")


def prefixes(model, state):
    """"", and what stands in front of the name of the model's first tensor wherever state has it."""
    first = next(iter(model.state_dict()))
    return ["", *(name.removesuffix(first) for name in state if name.endswith("." + first))]


def misfits(model, state, used):
    """{what is wrong: names} between a model and a state dict; missing may be what is not in used (ids)."""
    tensors = {name: value for name, value in model.state_dict(keep_vars=True).items()
               if not name.startswith(CLASSIFIER_KEYS)}
    return {
        "missing": [name for name, value in tensors.items() if name not in state
                    and not name.endswith("num_batches_tracked") and (used is None or id(value) in used)],
        "unexpected": [name for name in state if name not in tensors],
        "of another shape": [name for name, value in tensors.items()
                             if name in state and state[name].shape != value.shape],
    }


def check_finite(state, source):
    """UserError for nan or infinity, which would show only as a loss that is not finite."""
    wrong = [name for name, value in state.items() if not value.isfinite().all()]
    if wrong:
        raise UserError(f"{source} holds nan or infinity ({len(wrong)} tensors, such as {wrong[0]}): take "
                        "weights of a training that went well.")


def tell_taken(prefix, state, source):
    """A note of what was taken off the names, and of the tensors beside those; by the first process."""
    if not prefix or int(os.environ.get("RANK", 0)):
        return
    depth = prefix.count(".")                                           # network.backbone, network.head
    others = Counter(".".join(name.split(".")[:depth]) for name in state if not name.startswith(prefix))
    left = ", ".join(f"{name} ({count})" for name, count in others.items())
    print(f"note: {source}: took {len(state) - sum(others.values())} tensors called {prefix}*"
          + (f", and left out {left}" if left else ""))
