"""The way back from the input of a network to its pixels."""
import torch

from common.transforms import MEAN, STD


def denormalise(x):
    """float (3,H,W), normalised -> uint8 (3,H,W)."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (x.float() * std + mean).round().clamp(0, 255).to(torch.uint8)
