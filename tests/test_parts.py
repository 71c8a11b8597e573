"""common/parts.py and common/regions.py: a slow labelling, hand values, tiny data sets, what is refused."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from common import toy_scenes
from common.datasets import open_dataset
from common.parts import open_parts, part_centroids
from common.regions import connected_components
from trees import message


def save(path, array):
    """Write an array as an image file, int32 arrays as 32-bit TIFF; makes the folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path)


# ---- connected components, centroids ----

def slow_components(ids):
    """Every pixel takes the lowest number of its equal neighbours, until none changes; then 1, 2, ..."""
    numbers, before = np.arange(1, ids.size + 1).reshape(ids.shape) * (ids != 0), None
    while not np.array_equal(numbers, before):
        before = numbers.copy()
        for y, x in np.ndindex(ids.shape):
            near = slice(max(y - 1, 0), y + 2), slice(max(x - 1, 0), x + 2)
            numbers[y, x] = numbers[near][ids[near] == ids[y, x]].min()
    return np.searchsorted(sorted({0, *numbers.ravel()}), numbers)


def test_components_are_what_touches_at_sides_or_corners():
    comb, wrap = np.zeros((2, 9, 13), int)
    comb[:, ::2] = comb[-1] = 1                                           # teeth that meet in the last row
    wrap[0, -1], wrap[1, 0], wrap[1, -1], wrap[2, 0] = 1, 1, 2, 2         # neighbours in memory only
    rng = np.random.default_rng(0)
    noise = [rng.integers(1, values + 1, size) * (rng.random(size) < share) for values in (1, 2, 6)
             for size in ((1, 40), (13, 14)) for share in (0.1, 0.4, 0.6, 0.95)]
    for ids in (comb, wrap, 0 * comb, *noise):
        for turned in (ids, ids[::-1], ids[:, ::-1].astype(np.uint8) * 40):
            assert (connected_components(turned) == slow_components(turned)).all()


# ---- three kinds of parts ----

def test_toy_scenes_have_the_parts_of_their_generator():
    data = open_dataset("toy_scenes", "", "val", seed=4)
    parts = open_parts(data)
    assert parts.num_parts == len(toy_scenes.PARTS) - 1
    assert {data.classes[c] for c in parts.classes} == {name.split(":")[0] for name in toy_scenes.PARTS[1:]}
    scene, rows = toy_scenes.make_scene(4, 100_003), parts.keypoints(3)
    assert parts.has(3) and (parts.part_map(3).numpy() == scene["parts"]).all() and len(rows) > 2
    assert rows.tolist() == part_centroids(scene["parts"], scene["mask"]).tolist()


def cityscapes(root):
    """A val split of three images; masks: all car (label id 26) but a row of rider (25) at the top."""
    names = ("bonn/bonn_000000_000019", "bonn/bonn_000001_000019", "zurich/zurich_000002_000019")
    for name in names:
        save(root / f"leftImg8bit/val/{name}_leftImg8bit.png", np.zeros((6, 8, 3), np.uint8))
        mask = np.repeat([25, 26, 26, 26, 26, 26], 8).reshape(6, 8).astype(np.uint8)
        save(root / f"gtFine/val/{name}_gtFine_labelIds.png", mask)
    return open_dataset("cityscapes", str(root), "val"), names


def test_cityscapes_labels(tmp_path):
    data, names = cityscapes(tmp_path)
    ids = np.full((6, 8), 26001, np.int32)                                # car 1 without parts
    ids[0, :2], ids[0, 4:6] = 2500702, 2600702                           # head of rider 7; a car there
    ids[2:4, 1:4], ids[4, 4] = 2600102, 2600102                           # a wheel of car 1
    ids[5, 7], ids[5, 0], ids[0, 7] = 2600105, 2600100, 2500705       # chassis; none; none of a rider
    ids[2, 6], ids[3, 7], ids[3, 5:7] = 2600199, 23, (1234, 99_999)       # ids that are no part
    for name in names[::2]:
        save(tmp_path / f"gtFinePanopticParts/val/{name}_gtFinePanopticParts.tif", ids)
    for path in (tmp_path, tmp_path / "gtFinePanopticParts", tmp_path / "gtFinePanopticParts" / "val"):
        parts = open_parts(data, str(path))
        assert [parts.has(i) for i in range(3)] == [True, False, True]
    expected = np.zeros((6, 8), int)
    expected[0, :2], expected[2:4, 1:4], expected[4, 4], expected[5, 7] = 2, 2, 2, 5
    assert (parts.part_map(0).numpy() == expected).all() and parts.part_map(1) is None
    assert parts.keypoints(2).tolist() == [[12, 2, 0, 0], [13, 2, 2, 3], [13, 5, 7, 5]]    # 18/7 = 2.57 -> 3
    assert parts.keypoints(1).shape == (0, 4)
    assert parts.classes == [11, 12, 13, 14, 15] and parts.num_parts == 5
    assert (parts.names[12][1], parts.names[13][1], parts.names[15][4]) == ("head", "wheel", "chassis")


def voc(root, masks):
    """A val split with these masks {name: array}."""
    for name, mask in masks.items():
        mask = np.asarray(mask, np.uint8)
        save(root / "JPEGImages" / f"{name}.jpg", np.zeros((*mask.shape, 3), np.uint8))
        save(root / "SegmentationClass" / f"{name}.png", mask)
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(masks))
    return open_dataset("voc", str(root), "val")


def test_pascal_labels(tmp_path):
    """The files number repeated parts with ten or twenty ids in a row; here they are one part each."""
    folds = {1: {5: 5, 6: 6, 15: 6, 16: 7, 25: 7, 26: 0}, 12: {17: 17, 18: 18, 19: 0},
             19: {6: 6, 7: 7, 16: 7, 17: 8, 27: 9, 37: 10, 47: 11, 57: 12, 67: 13, 76: 13, 77: 0}}
    rows = [(c, c * 100_000 + 100 + raw, part) for c in folds for raw, part in folds[c].items()]
    mask, ids, expected = zip(*rows)
    data = voc(tmp_path, {"a": [[15, 15, 15, 255, 10, 10], [4, 9, 11, 18, 0, 10]], "b": [[0]], "c": [mask]})
    save(tmp_path / "pp/labels/validation/a.tif", np.array(
        [[1500124, 1600101, 1500101, 1500101, 1000319, 1000320],          # right, wrong class, right, void
         [400101, 900101, 1100101, 1800101, 1500101, 1000301]], np.int32))
    save(tmp_path / "pp/labels/validation/c.tif", np.array([ids], np.int32))
    parts = open_parts(data, str(tmp_path / "pp"))
    assert [parts.has(i) for i in range(3)] == [True, False, True]
    assert parts.part_map(0).tolist() == [[24, 0, 1, 0, 19, 0], [0, 0, 0, 0, 0, 1]]
    assert parts.part_map(2).tolist() == [[*expected]]
    assert parts.keypoints(0).tolist() == [[10, 1, 5, 1], [10, 19, 4, 0], [15, 1, 2, 0], [15, 24, 0, 0]]
    assert parts.classes == [1, 2, 3, 5, 6, 7, 8, 10, 12, 13, 14, 15, 16, 17, 19, 20]
    assert (parts.num_parts, parts.names[10][18], parts.names[15][23]) == (24, "tail", "right_foot")


def keypoint_file(path, **changes):
    notes = [(2, [[3, 1, 1], [0, 0, 0], [2.6, 0.2, 2]]), (1, [[1, 1, 1]]), (3, [[4.4, -0.4, 1], [5, 0, 1]])]
    content = dict(
        categories=[dict(id=c, name=name, keypoints=points.split()) for c, name, points in (
            (3, "sheep", "nose tail"), (1, "zebra", "stripe"), (2, "cat", "tail ear nose"))],
        images={"7": "a.jpg", "8": "b.jpeg", "9": "elsewhere.jpg"},
        annotations=[dict(image_id=7, category_id=c, keypoints=points) for c, points in notes])
    path.write_text(json.dumps({**content, **changes}))
    return str(path)


def test_a_keypoint_file_gives_the_visible_points_inside_the_image(tmp_path):
    data = voc(tmp_path, {"a": np.zeros((4, 5)), "b": np.zeros((4, 5)), "c": np.zeros((4, 5))})
    parts = open_parts(data, keypoint_file(tmp_path / "points.json"))
    assert parts.part_names == ["nose", "tail", "ear"] and parts.num_parts == 3 and parts.classes == [8, 17]
    assert [parts.has(i) for i in range(3)] == [True, True, False] and parts.part_map(0) is None
    assert parts.keypoints(0).tolist() == [                          # whole pixels; -0.4 is inside, 5 is not
        [8, 2, 3, 1], [8, 1, 3, 0], [17, 1, 4, 0]]
    assert parts.keypoints(1).shape == (0, 4) == parts.keypoints(2).shape


@pytest.mark.parametrize("array, expected", [
    (np.array([[999, -3], [5, 10_000_000]], np.int32), ["-3, 999, 10000000"]),
    (np.zeros((2, 3), np.int32), ["is 3 x 2", "of this image is 2 x 2"])])
def test_files_that_are_no_label_files_of_these_images(tmp_path, array, expected):
    data, file = voc(tmp_path / "voc", {"a": np.zeros((2, 2))}), tmp_path / "labels" / "a.tif"
    save(file, array)
    text = message(open_parts(data, str(tmp_path)).part_map, 0)
    assert all(words in text for words in (str(file), *expected))
    file.write_bytes(file.read_bytes()[:-3])
    assert "cannot be read" in message(open_parts(data, str(tmp_path)).part_map, 0)


def test_messages_about_the_path(tmp_path):
    assert open_parts(SimpleNamespace(name="folder")) is None
    assert "cityscapes and voc, not for folder" in message(open_parts, SimpleNamespace(name="folder"), "x")
    data, _ = cityscapes(tmp_path / "city")
    name, tail = "bonn_000000_000019", "_gtFinePanopticParts.tif"
    for file in ("other/x", f"two/1/{name}", f"two/2/{name}"):
        save(tmp_path / f"{file}{tail}", np.zeros((2, 2), np.int32))
    for path, words in [
            ("gone", ["gone does not exist"]), ("two", [f"1/{name}{tail}", f"2/{name}{tail}", "keep one"]),
            ("other", [f"{name}{tail}", "has 1 files", "3 images of cityscapes val", f"there: x{tail}"])]:
        text = message(open_parts, data, str(tmp_path / path))
        assert all(word in text for word in words), text


def test_messages_about_keypoint_files(tmp_path):
    data, path = voc(tmp_path, {"a": np.zeros((4, 5))}), tmp_path / "points.json"
    for changes, words in [
            (dict(images={"7": "x.jpg", "9": "y.jpg"}), "looked for names such as a, but it has x, y"),
            (dict(annotations=[], categories=[]), "no category (none there) is a class of voc"),
            (dict(annotations=[dict(image_id=7, category_id=2, keypoints=[1])]), "cat has 3 keypoints")]:
        assert words in message(open_parts, data, keypoint_file(path, **changes))
    path.write_text("[1, 2")
    assert f"{path} cannot be read as a keypoint file" in message(open_parts, data, str(path))
