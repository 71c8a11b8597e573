"""Small files for the readers, and the sentence with which they refuse one."""
import numpy as np
import pytest
import torch
from PIL import Image

from common.run import UserError


def write(root, tree):
    """{path below root: array of an image file, or text}; 16-bit arrays stay so. Returns root."""
    for path, content in tree.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            (root / path).write_text(content)
        else:
            array = np.asarray(content)
            Image.fromarray(array if array.dtype == np.uint16 else array.astype(np.uint8)).save(root / path)
    return root


def saved(folder, content):
    """The path of a file of weights: what torch.save makes of the content, or bytes as they are."""
    path = folder / "w.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    return path


def message(call, *args, **kwargs):
    """The sentence of the UserError that call(...) must raise: one line."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    return str(caught.value)


def draw(low=0.0, high=1.0):
    """The next number of torch's generator, as the transforms draw it."""
    return low + (high - low) * torch.rand(()).item()
