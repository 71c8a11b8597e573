"""Pretrained weights: find, read and rename them, and load them if all of them fit."""
import hashlib
import re
from pathlib import Path

import torch
import torchvision

from common.mit import MIT
from common.run import UserError

CLASSIFIER_KEYS = ("fc.", "classifier.", "head.", "decode_head.", "norm.")   # "norm.": before Swin's head


def load_weights(net, weights, backbone):
    """Fill a backbone, before it is cut, from what `weights` of build_network stands for."""
    if weights == "none":
        return
    state = read_state_dict(locate_weights(str(weights), backbone))
    if backbone in MIT:
        load_mit_weights(net, state, source=weights)
        return
    if backbone == "resnet50_inat":
        state = conventional_branch(state)
    elif backbone.startswith("densenet"):                               # norm.1 in the files, norm1 by now
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name): value
                 for name, value in state.items()}
    load_fitting(net, state, source=weights)


def locate_weights(weights, backbone):
    """The path or URL behind `weights`; UserError if there is none."""
    if weights == "imagenet" and backbone in torchvision.models.list_models():
        return torchvision.models.get_model_weights(backbone).IMAGENET1K_V1.url
    if weights == "imagenet" and backbone in MIT:
        raise UserError(f"torchvision has no ImageNet weights for {backbone}: give the path or URL of the "
                        f"original {backbone}.pth or of pytorch_model.bin from HuggingFace's "
                        f"nvidia/{backbone.replace('_', '-')}")
    if weights == "imagenet" and backbone == "resnet50_inat":
        raise UserError("resnet50_inat has weights from iNaturalist 2017, not ImageNet: give path or URL "
                        "of BBN.iNaturalist2017.res50.180epoch.best_model.pth, or none")
    if weights == "imagenet":
        raise UserError(f"there are no ImageNet weights for {backbone}: train it from scratch, weights none")
    if weights.split("?")[0].endswith(".safetensors"):
        raise UserError(f"{weights}: reading .safetensors would take another package; use the .bin or .pth "
                        "file of the same model")
    if not weights.startswith(("http://", "https://")) and not Path(weights).is_file():
        raise UserError(f"{weights}: no such file; weights are none, imagenet, or path or http(s) URL of "
                        "a state dict")
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
    try:
        if source.startswith(("http://", "https://")):
            name = source.split("?")[0].rsplit("/", 1)[-1]
            if not source.startswith("https://download.pytorch.org/"):  # many are called pytorch_model.bin:
                name = hashlib.sha256(source.encode()).hexdigest()[:8] + "_" + name   # one cache entry each
            state = torch.hub.load_state_dict_from_url(source, file_name=name, map_location="cpu",
                                                       weights_only=True)
        else:
            state = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:                       # whatever pickle, zip, disk or network may come up with
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{source}: cannot read these weights ({reason}); check the file or the connection, "
                        f"delete a broken download from {torch.hub.get_dir()}/checkpoints, or give a path")
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{source}: holds no state dict (names and tensors); write one with "
                        "torch.save(model.state_dict(), path)")
    return state


def load_mit_weights(model, state_dict, source="state dict"):
    """Load a MixTransformer from tensors named as in the original release or by HuggingFace, whose separate
    keys and values are joined into kv. Without classifier and decoder. UserError as load_fitting."""
    if any(re.match(r"(backbone\.)?layers\.\d\.[012]\.", name) for name in state_dict):
        raise UserError(f"{source}: these names (layers.0.0.projection ...) are mmsegmentation's; use the "
                        "original mit_b*.pth or HuggingFace's nvidia/mit-b* instead")
    state = {original_mit_name(name): value for name, value in state_dict.items()}
    for key in [name for name in state if ".attn.key." in name]:
        value = key.replace(".key.", ".value.")
        if value in state and state[value].shape == state[key].shape:
            state[key.replace(".key.", ".kv.")] = torch.cat([state.pop(key), state.pop(value)])
    load_fitting(model, state, source)


def original_mit_name(name):
    """segformer.encoder.block.0.1.attention.self.query.bias -> block1.1.attn.q.bias; other names stay."""
    match = re.match(r"(?:segformer\.)?encoder\.(patch_embeddings|block|layer_norm)\.(\d+)\.(.+)", name)
    if match is None:
        return name
    part = {"patch_embeddings": "patch_embed", "block": "block", "layer_norm": "norm"}[match[1]]
    rest = match[3]
    for theirs, ours in (("attention.self.query", "attn.q"), ("attention.self.", "attn."),
                         ("attention.output.dense", "attn.proj"), ("mlp.dense", "mlp.fc"),
                         ("layer_norm_", "norm"), ("layer_norm", "norm")):
        rest = rest.replace(theirs, ours)
    return f"{part}{int(match[2]) + 1}.{rest}"                               # they count stages from 0


def conventional_branch(state):
    """The ResNet-50 in a checkpoint of BBN under torchvision's names.
    cb_block is the last block of layer4. The classifier and rb_block, for rare classes, are left out."""
    prefix = "module.backbone."
    names = [name for name in state if name.startswith(prefix) and not name.startswith(prefix + "rb_block.")]
    return {re.sub("^cb_block", "layer4.2", name.removeprefix(prefix)): state[name] for name in names}


def load_fitting(model, state, source):
    """Load state into model if all names and shapes fit, classifiers aside; else load nothing, UserError."""
    shapes = {name: value.shape for name, value in model.state_dict().items()
              if not name.startswith(CLASSIFIER_KEYS)}
    state = {name: value for name, value in state.items() if not name.startswith(CLASSIFIER_KEYS)}
    differing = {
        "missing": [name for name in shapes
                    if name not in state and not name.endswith("num_batches_tracked")],
        "unexpected": [name for name in state if name not in shapes],
        "of another shape": [name for name in shapes if name in state and state[name].shape != shapes[name]],
    }
    problems = [f"{len(names)} {what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
                for what, names in differing.items() if names]
    if problems:
        raise UserError(f"{source}: these weights belong to another network, nothing was loaded "
                        f"({'; '.join(problems)}); choose the backbone that they were made for")
    model.load_state_dict(state, strict=False)     # only classifiers and BatchNorm's counters can be missing
