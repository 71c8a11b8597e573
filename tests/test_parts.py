"""common/parts.py against flood fill, hand values and brute force; tiny data sets stand in tmp_path."""
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common import parts as pt
from common import regions, toy_scenes
from common.datasets import open_dataset
from common.run import UserError


def save(path, array):
    """Write an array as an image file, int32 arrays as 32-bit TIFF; makes the folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path)


def message(call, *args):
    """The sentence of the UserError that call(...) must raise: one line."""
    with pytest.raises(UserError) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text and "Traceback" not in text
    return text


# ---- connected components --------------------------------------------------------------------------------

def flood_fill(ids):
    """Component numbers in the order of first pixels, one pixel after the other."""
    height, width = ids.shape
    numbers, count = np.zeros((height, width), int), 0
    for start in zip(*np.nonzero(ids)):
        if numbers[start]:
            continue
        count += 1
        numbers[start], todo = count, [start]
        while todo:
            y, x = todo.pop()
            for v in range(max(y - 1, 0), min(y + 2, height)):
                for u in range(max(x - 1, 0), min(x + 2, width)):
                    if ids[v, u] == ids[y, x] and not numbers[v, u]:
                        numbers[v, u] = count
                        todo.append((v, u))
    return numbers


def spiral(size):
    """One path of value 1 that winds inwards, with a free row between its turns."""
    ids = np.zeros((size, size), int)
    ids[0, 0], y, x, direction, steps = 1, 0, 0, 0, size - 1
    while steps > 0:
        dy, dx = [(0, 1), (1, 0), (0, -1), (-1, 0)][direction % 4]
        for _ in range(steps):
            y, x = y + dy, x + dx
            ids[y, x] = 1
        direction += 1
        steps -= 2 if direction > 2 and direction % 2 else 0
    return ids


def shapes():
    """Maps that are hard to label: long paths, joins at the very end, touching corners only."""
    comb, fork = np.zeros((2, 9, 21), int)
    comb[:, ::2] = 1
    comb[-1] = 1                                         # teeth that meet in the last row
    fork[::2] = 1
    fork[:, -1] = 1
    snake = np.zeros((15, 12), int)
    snake[::2], snake[1::4, -1], snake[3::4, 0] = 1, 1, 1
    chain = np.eye(17, dtype=int) + 2 * np.eye(17, k=3, dtype=int) + np.fliplr(np.eye(17, dtype=int)) * 5
    wrap = np.zeros((3, 5), int)
    wrap[0, -1], wrap[1, 0], wrap[1, -1], wrap[2, 0] = 1, 1, 2, 2     # neighbours in memory only
    vee = (np.abs(np.arange(15) - 7) == np.arange(8)[::-1, None]) * 3
    yield from (comb, fork, snake, chain, wrap, vee, comb.T, snake.T, comb[::-1], snake[:, ::-1])
    yield from (spiral(5), spiral(16), spiral(31), spiral(24)[::-1] * 7, np.indices((9, 9)).sum(0) % 3)
    yield from (np.ones((1, 1), int), np.zeros((4, 5), int), np.ones((6, 7), int))
    yield np.indices((10, 11)).sum(0) % 2 + 1


def test_spiral_winds():
    assert spiral(7).tolist() == [[1, 1, 1, 1, 1, 1, 1],
                                  [0, 0, 0, 0, 0, 0, 1],
                                  [1, 1, 1, 1, 1, 0, 1],
                                  [1, 0, 0, 0, 1, 0, 1],
                                  [1, 0, 1, 1, 1, 0, 1],
                                  [1, 0, 0, 0, 0, 0, 1],
                                  [1, 1, 1, 1, 1, 1, 1]]


def test_components_of_shapes_equal_flood_fill():
    for ids in shapes():
        assert (regions.connected_components(ids) == flood_fill(ids)).all(), ids


def test_components_of_noise_equal_flood_fill():
    rng = np.random.default_rng(0)
    for size in [(1, 40), (40, 1), (2, 30), (13, 14), (30, 37)]:
        for share in (0.1, 0.3, 0.4, 0.6, 0.95):
            for values in (1, 2, 6):
                ids = rng.integers(1, values + 1, size) * (rng.random(size) < share)
                assert (regions.connected_components(ids) == flood_fill(ids)).all()
    ids = rng.integers(0, 3, (20, 25))
    for dtype in (np.uint8, np.int32, np.int64):
        assert (regions.connected_components((ids * 100).astype(dtype)) == flood_fill(ids)).all()


def test_lowest_of_group_in_any_order():
    rng = np.random.default_rng(1)
    for count, links in [(1, 0), (5, 0), (40, 15), (40, 35), (200, 190)]:
        a, b = rng.integers(0, count, (2, links))
        a, b = a[a != b], b[a != b]
        expected = np.arange(count)
        for _ in range(count):
            for i, j in zip(a, b):
                expected[i] = expected[j] = min(expected[i], expected[j])
        assert (regions.lowest_of_group(count, a, b) == expected).all()
    path = rng.permutation(300)                          # one long path, its numbers shuffled
    assert (regions.lowest_of_group(300, path[:-1], path[1:]) == 0).all()
    leaves = np.arange(299)                              # a star whose centre is the highest number
    assert (regions.lowest_of_group(300, leaves, np.full(299, 299)) == 0).all()


def test_a_cityscapes_map_takes_less_than_a_second():
    rng = np.random.default_rng(2)
    blocks = rng.integers(0, 6, (64, 128)).repeat(16, 0).repeat(16, 1) * (rng.random((1024, 2048)) < .97)
    comb = np.ones((1024, 2048), np.uint8)
    comb[:-1, ::2] = 0
    for ids in (blocks.astype(np.uint8), comb):
        begin = time.process_time()
        rows = pt.part_centroids(ids, np.full_like(ids, 13))
        assert time.process_time() - begin < 1
    assert len(rows) == 1


# ---- centroids -------------------------------------------------------------------------------------------

def test_centroids_by_hand():
    part_map = np.array([[1, 1, 0, 0, 0, 2],
                         [0, 0, 1, 0, 0, 2],
                         [0, 0, 0, 0, 1, 2],
                         [2, 2, 2, 0, 1, 2]], np.uint8)
    class_map = np.full((4, 6), 3, np.uint8)
    class_map[3] = 1
    class_map[:2, 5] = 255
    rows = pt.part_centroids(part_map, class_map)
    assert rows.dtype == np.float32 and rows.tolist() == [
        [1, 1, 4, 3],                                    # part 1 of class 1; the pixel above is of class 3
        [1, 2, 1, 3], [1, 2, 5, 3],
        [3, 1, 1, 0],                                    # joined at a corner: x 3/3, y 1/3
        [3, 1, 4, 2],
        [3, 2, 5, 2]]                                    # above it the class is 255


def test_centroids_are_rounded_means_of_every_piece():
    rng = np.random.default_rng(3)
    part_map = (rng.integers(1, 4, (30, 41)) * (rng.random((30, 41)) < 0.5)).astype(np.uint8)
    class_map = rng.choice(np.array([0, 5, 18, 255], np.uint8), (30, 41))
    class_map[:, 10:30] = 5
    expected = []
    for c in (0, 5, 18):
        for p in (1, 2, 3):
            pieces = flood_fill((part_map == p) & (class_map == c))
            for k in range(1, pieces.max() + 1):
                y, x = np.nonzero(pieces == k)
                expected.append([c, p, round(x.mean()), round(y.mean())])
    rows = pt.part_centroids(part_map, class_map)
    assert rows.tolist() == expected and len(rows) > 50


def test_centroid_of_a_hook_lies_off_it_and_nothing_gives_nothing():
    hook = np.zeros((5, 5), np.uint8)
    hook[0], hook[-1], hook[:, 0] = 9, 9, 9
    assert pt.part_centroids(hook, np.zeros_like(hook)).tolist() == [[0, 9, 2, 2]] and hook[2, 2] == 0
    for part_map, c in ((hook * 0, 4), (hook, 255)):
        assert pt.part_centroids(part_map, np.full_like(hook, c)).shape == (0, 4)


# ---- toy scenes ------------------------------------------------------------------------------------------

def test_toy_scenes_have_the_parts_of_their_generator():
    data = open_dataset("toy_scenes", "", "val", seed=4)
    parts = pt.open_parts(data)
    assert parts.num_parts == len(toy_scenes.PARTS) - 1 and toy_scenes.PARTS[1] == "tree:trunk"
    assert parts.classes == [c for c, name in enumerate(data.classes)
                             if any(part.startswith(name + ":") for part in toy_scenes.PARTS)]
    for i in (3, 0, 3):
        scene = toy_scenes.make_scene(4, 100_000 + i)
        assert parts.has(i) and (parts.part_map(i).numpy() == scene["parts"]).all()
        assert (data.read_mask(i).numpy() == scene["mask"]).all()
        rows = parts.keypoints(i)
        assert rows.dtype == torch.float32 and rows.tolist() == pt.part_centroids(
            scene["parts"], scene["mask"]).tolist()
        for c, p, x, y in rows.tolist():
            assert toy_scenes.PARTS[int(p)].split(":")[0] == data.classes[int(c)]
        assert (np.unique(scene["parts"])[1:] == np.unique(rows[:, 1])).all() and len(rows) > 2


def test_a_toy_part_in_one_piece_has_its_centre_where_the_generator_says():
    parts, seen = pt.open_parts(open_dataset("toy_scenes", "", "train")), 0
    for i in range(5):
        rows = parts.keypoints(i).numpy()
        centres = np.array(toy_scenes.make_scene(0, i)["part_centres"])
        for p in np.unique(rows[:, 1]):
            if (rows[:, 1] == p).sum() == 1 == (centres[:, 0] == p).sum():
                off = rows[rows[:, 1] == p][0, 2:] - centres[centres[:, 0] == p][0, 2:]
                assert abs(off).max() <= 0.5 + 1e-9
                seen += 1
    assert seen > 10


def test_data_sets_without_parts():
    for name in ("camvid", "voc", "cityscapes"):
        assert pt.open_parts(SimpleNamespace(name=name)) is None
    for name in ("camvid", "toy_scenes", "folder"):
        text = message(pt.open_parts, SimpleNamespace(name=name), "x")
        assert f"--parts is for cityscapes and voc, not for {name}" in text


# ---- Panoptic-Parts label files --------------------------------------------------------------------------

def decode_text(number):
    """Semantic and part id from the decimal digits of an id."""
    digits = str(number)
    if number < 100:
        return number, 0
    whole = digits if number >= 100_000 else digits + "00"
    return int(whole[:-5]), int(whole[-2:])


def test_decoding_by_digits():
    examples = {0: (0, 0), 12: (12, 0), 1234: (1, 0), 12345: (12, 0), 123456: (1, 56), 1234567: (12, 67),
                2300304: (23, 4), 2600000: (26, 0), 24099: (24, 0), 9999999: (99, 99), 1000: (1, 0)}
    rng = np.random.default_rng(5)
    ids = [*examples, *range(100), *rng.integers(1000, 100_000, 300),
           *rng.integers(100_000, 10_000_000, 500)]
    expected = [examples.get(i) or decode_text(int(i)) for i in ids]
    semantic, part = pt.decode_panoptic(np.array([ids], np.int32))
    assert list(zip(semantic[0].tolist(), part[0].tolist())) == expected


def cityscapes(root, sizes=((6, 8), (6, 8), (6, 8))):
    """A val split of three images; masks: all car (label id 26) but a row of rider (25) at the top."""
    names = [f"{city}_00000{k}_000019" for k, city in enumerate(("bonn", "bonn", "zurich"))]
    for name, size in zip(names, sizes):
        city = name.split("_")[0]
        mask = np.full(size, 26, np.uint8)
        mask[0] = 25
        save(root / f"leftImg8bit/val/{city}/{name}_leftImg8bit.png", np.zeros((*size, 3), np.uint8))
        save(root / f"gtFine/val/{city}/{name}_gtFine_labelIds.png", mask)
    return open_dataset("cityscapes", str(root), "val"), names


def test_cityscapes_labels(tmp_path):
    data, names = cityscapes(tmp_path)
    ids = np.full((6, 8), 26001, np.int32)               # car 1 without parts
    ids[0, :2], ids[0, 4:6] = 2500702, 2600702           # head of rider 7; a car where the rider is
    ids[2:4, 1:4], ids[4, 4] = 2600102, 2600102          # a wheel of car 1
    ids[5, 7], ids[5, 0], ids[0, 7] = 2600105, 2600100, 2500705   # chassis; no part; a rider has no part 5
    ids[2, 6], ids[3, 7] = 2600199, 23                   # ids that are no part: 99, and sky
    for name in (names[0], names[2]):
        save(tmp_path / f"gtFinePanopticParts/val/{name.split('_')[0]}/{name}_gtFinePanopticParts.tif", ids)
    for path in (tmp_path, tmp_path / "gtFinePanopticParts", tmp_path / "gtFinePanopticParts" / "val"):
        parts = pt.open_parts(data, str(path))
        assert [parts.has(i) for i in range(3)] == [True, False, True]
    expected = np.zeros((6, 8), int)
    expected[0, :2], expected[2:4, 1:4], expected[4, 4], expected[5, 7] = 2, 2, 2, 5
    part_map = parts.part_map(0)
    assert part_map.dtype == torch.uint8 and (part_map.numpy() == expected).all()
    assert parts.keypoints(2).tolist() == [[12, 2, 0, 0], [13, 2, 2, 3], [13, 5, 7, 5]]   # 18/7 = 2.57 -> 3
    assert parts.keypoints(1).shape == (0, 4) and parts.part_map(1) is None
    assert parts.classes == [11, 12, 13, 14, 15] and parts.num_parts == 5
    assert [parts.names[c][p - 1] for c, p in ((12, 2), (13, 2), (15, 5), (11, 4))] == [
        "head", "wheel", "chassis", "leg"]


def voc(root, masks):
    """A val split with these masks {name: array}."""
    for name, mask in masks.items():
        mask = np.asarray(mask, np.uint8)
        save(root / "JPEGImages" / f"{name}.jpg", np.zeros((*mask.shape, 3), np.uint8))
        save(root / "SegmentationClass" / f"{name}.png", mask)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("".join(f"{name}\n" for name in masks))
    return open_dataset("voc", str(root), "val")


def test_pascal_labels(tmp_path):
    data = voc(tmp_path, {"2008_000001": [[15, 15, 15, 255, 10, 10], [4, 9, 11, 18, 0, 10]],
                          "2009_000002": np.zeros((3, 3))})
    save(tmp_path / "pp/labels/validation/2008_000001.tif", np.array(
        [[1500124, 1600101, 1500101, 1500101, 1000319, 1000320],      # right, wrong class, right, void
         [400101, 900101, 1100101, 1800101, 1500101, 1000301]], np.int32))
    for path in (tmp_path / "pp", tmp_path / "pp/labels", tmp_path / "pp/labels/validation"):
        parts = pt.open_parts(data, str(path))
        assert [parts.has(0), parts.has(1)] == [True, False]
    assert parts.part_map(0).tolist() == [[24, 0, 1, 0, 19, 0], [0, 0, 0, 0, 0, 1]]
    assert parts.keypoints(0).tolist() == [[10, 1, 5, 1], [10, 19, 4, 0], [15, 1, 2, 0], [15, 24, 0, 0]]
    assert parts.classes == [1, 2, 3, 5, 6, 7, 8, 10, 12, 13, 14, 15, 16, 17, 19, 20]
    assert parts.num_parts == 24
    assert [parts.names[c][p - 1] for c, p in ((10, 19), (15, 24))] == ["tail", "right_foot"]


@pytest.mark.parametrize("c, folds, count", [
    (1, {5: 5, 6: 6, 15: 6, 16: 7, 25: 7, 26: 0}, 7),
    (6, {9: 9, 10: 10, 20: 11, 39: 12, 40: 13, 59: 13, 60: 0}, 13),
    (14, {4: 4, 5: 5, 14: 5, 15: 0}, 5), (12, {17: 17, 18: 18, 19: 0}, 18), (13, {21: 21, 22: 0}, 21),
    (19, {6: 6, 7: 7, 16: 7, 17: 8, 27: 9, 37: 10, 47: 11, 57: 12, 67: 13, 76: 13, 77: 0}, 13)])
def test_pascal_numbers_repeated_parts_and_we_do_not(tmp_path, c, folds, count):
    data = voc(tmp_path / "voc", {"a": np.full((1, len(folds)), c)})
    save(tmp_path / "a.tif", np.array([[c * 100_000 + 100 + raw for raw in folds]], np.int32))
    parts = pt.open_parts(data, str(tmp_path))
    assert parts.part_map(0).tolist() == [list(folds.values())]
    assert len(parts.names[c]) == count and "*" not in "".join(parts.names[c])


def test_sizes_must_agree(tmp_path):
    data, names = cityscapes(tmp_path)
    save(tmp_path / f"gtFinePanopticParts/{names[1]}_gtFinePanopticParts.tif", np.zeros((6, 9), np.int32))
    text = message(pt.open_parts(data, str(tmp_path)).keypoints, 1)
    assert f"{names[1]}_gtFinePanopticParts.tif is 9 x 6" in text
    assert f"{names[1]}_gtFine_labelIds.png of this image is 8 x 6" in text


@pytest.mark.parametrize("array, expected", [
    (np.full((2, 2), 100), "pixel values 100,"),
    (np.array([[999, -3], [5, 10_000_000]]), "-3, 999, 10000000"),
    (np.zeros((2, 2, 3), np.uint8), "mode RGB"), (np.zeros((2, 2), np.uint8), "mode L")])
def test_files_that_are_no_label_files(tmp_path, array, expected):
    data = voc(tmp_path / "voc", {"a": np.zeros((2, 2))})
    save(tmp_path / "labels" / "a.tif", array if array.dtype == np.uint8 else array.astype(np.int32))
    text = message(pt.open_parts(data, str(tmp_path)).part_map, 0)
    assert str(tmp_path / "labels" / "a.tif") in text and expected in text


def test_a_damaged_label_file_and_two_of_one_name(tmp_path):
    data = voc(tmp_path / "voc", {"a": np.zeros((2, 2))})
    for name in ("labels/val/a", "labels/val/b", "labels/train/b", "copy/a"):
        save(tmp_path / f"{name}.tif", np.zeros((2, 2), np.int32))
    file = tmp_path / "labels" / "val" / "a.tif"
    assert pt.open_parts(data, str(tmp_path)).files == [file]      # labels/ goes first; no image b
    save(tmp_path / "labels" / "train" / "a.tif", np.zeros((2, 2), np.int32))
    text = message(pt.open_parts, data, str(tmp_path))
    assert "train/a.tif" in text and "val/a.tif" in text and "keep one" in text
    file.write_bytes(file.read_bytes()[:-3])
    assert f"{file} cannot be read" in message(pt.open_parts(data, str(file.parent)).keypoints, 0)


def test_messages_about_the_path(tmp_path):
    data, _ = cityscapes(tmp_path / "city")
    assert "gone does not exist" in message(pt.open_parts, data, str(tmp_path / "gone"))
    (tmp_path / "k.json").write_text("{}")
    assert "for voc only" in message(pt.open_parts, data, str(tmp_path / "k.json"))
    (tmp_path / "k.zip").write_text("")
    assert "k.zip is a file" in message(pt.open_parts, data, str(tmp_path / "k.zip"))
    save(tmp_path / "other" / "x_gtFinePanopticParts.tif", np.zeros((2, 2), np.int32))
    text = message(pt.open_parts, data, str(tmp_path / "other"))
    assert "bonn_000000_000019_gtFinePanopticParts.tif" in text and "has 1 files" in text
    assert "found there: x_gtFinePanopticParts.tif" in text and "3 images of cityscapes val" in text
    (tmp_path / "empty").mkdir()
    assert "found there: nothing" in message(pt.open_parts, data, str(tmp_path / "empty"))


# ---- keypoint files --------------------------------------------------------------------------------------

def keypoint_file(path, **changes):
    content = {
        "categories": [{"id": 3, "name": "sheep", "keypoints": ["nose", "tail"]},
                       {"id": 1, "name": "zebra", "keypoints": ["stripe"]},
                       {"id": 2, "name": "cat", "keypoints": ["tail", "ear", "nose"]}],
        "images": {"7": "a.jpg", "8": "b.jpeg", "9": "elsewhere.jpg"},
        "annotations": [
            {"image_id": 7, "category_id": 2, "keypoints": [[3, 1, 1], [0, 0, 0], [2.6, 0.2, 2]]},
            {"image_id": 7, "category_id": 1, "keypoints": [[1, 1, 1]]},
            {"image_id": 7, "category_id": 3, "keypoints": [[4, 3, 1], [5, 3, 1]]},
            {"image_id": 7, "category_id": 3, "keypoints": [[4.4, -0.4, 1], [4, 4, 1]]},
            {"image_id": 7, "category_id": 3, "keypoints": [[4.6, 0, 1], [-1, 3, 1]]},
            {"image_id": 9, "category_id": 2, "keypoints": [[1, 1, 1]] * 3}]}
    path.write_text(json.dumps({**content, **changes}))
    return str(path)


def test_keypoint_file(tmp_path):
    data = voc(tmp_path, {"a": np.zeros((4, 5)), "b": np.zeros((4, 5)), "c": np.zeros((4, 5))})
    parts = pt.open_parts(data, keypoint_file(tmp_path / "points.json"))
    assert parts.part_names == ["nose", "tail", "ear"] and parts.num_parts == 3 and parts.classes == [8, 17]
    assert [parts.has(i) for i in range(3)] == [True, True, False]
    assert parts.part_map(0) is None
    rows = parts.keypoints(0)
    assert rows.dtype == torch.float32 and rows.tolist() == [
        [8, 2, 3, 1], [8, 1, 3, 0],                      # the ear is not visible, 2.6 and 0.2 are rounded
        [17, 1, 4, 3],                                   # x = 5 is outside
        [17, 1, 4, 0]]                                   # -0.4 is inside, y = 4, x = 4.6 and x = -1 are not
    assert parts.keypoints(1).shape == (0, 4) == parts.keypoints(2).shape


def test_messages_about_keypoint_files(tmp_path):
    data, path = voc(tmp_path, {"a": np.zeros((4, 5))}), tmp_path / "points.json"
    text = message(pt.open_parts, data, keypoint_file(path, images={"7": "x.jpg", "9": "y.jpg"}))
    assert "names such as a, but it has x, y" in text and "points.json" in text
    text = message(pt.open_parts, data, keypoint_file(path, annotations=[], categories=[
        {"id": 1, "name": "zebra", "keypoints": []}]))
    assert "no category (zebra) is a class of voc" in text
    short = [{"image_id": 7, "category_id": 2, "keypoints": [[1, 1, 1]]}]
    text = message(pt.open_parts, data, keypoint_file(path, annotations=short))
    assert "cat has 3 keypoints, but an annotation of image 7 has the shape (1, 3)" in text
    broken = [dict(annotations=5), dict(images=[1]), dict(categories=[{"id": 1}]), dict(categories=None),
              dict(annotations=[{"image_id": 55, "category_id": 2, "keypoints": [[1, 1, 1]] * 3}])]
    texts = [message(pt.open_parts, data, keypoint_file(path, **change)) for change in broken]
    for content in (b"[1, 2", b"[]", b"\xff\xfe\x00", b""):
        path.write_bytes(content)
        texts.append(message(pt.open_parts, data, str(path)))
    assert all(f"{path} cannot be read as a keypoint file" in text for text in texts)
