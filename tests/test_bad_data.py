"""Data that would spoil a run without a word: told before the training in one sentence, or read as meant."""
import contextlib
import io
import os
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import cbp_occl
from commands import SCRIPTS, SHORT, copy_of, done, files, mistake, read
from common import datasets, figures, run, survey, tables
from common.files import list_images
from common.images import open_images
from trees import message, write

GREY, VOID = np.full((64, 64, 3), 100), np.full((64, 64), 255)
HALVES, PARTS = np.repeat([[0, 1]], 32, 1).repeat(64, 0), np.repeat([[0, 1, 2, 2]], 16, 1).repeat(64, 0)
SKY, NFC, NFD = "wet \u5929", "\u00e9", "e\u0301"             # half Chinese; an accent in one piece, in two
BIRDS = {f"{part}/{c}/{k}.png": GREY for part in ("train", "test") for c, k in ("a0", "b0", "b1")}


def folder(root, train=HALVES, val=HALVES, classes=b"sky\nroad\n", more=()):
    """A data set of 4 + 1 pairs; more: {path: array or bytes} beside them or in their place."""
    masks = {f"masks/train/{i}.png": train for i in range(4)} | {"masks/val/0.png": val}
    tree = {path.replace("masks", "images"): GREY for path in masks} | masks | dict(more)
    write(root, {path: content for path, content in tree.items() if not isinstance(content, bytes)})
    for path in [path for path in tree if isinstance(tree[path], bytes)]:
        (root / path).write_bytes(tree[path])
    (root / "classes.txt").write_bytes(classes)
    return root


def picture(kind, mode="RGB", turn=1, **pages):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = turn
    Image.new(mode, (64, 64)).save(file, kind, exif=exif, **pages)
    return file.getvalue()


MOVING = picture("PNG", save_all=True, append_images=[Image.new("RGB", (64, 64), "red")])
PAGES = picture("TIFF", save_all=True, append_images=[Image.new("RGB", (64, 64))] * 2)


@pytest.mark.parametrize("name", ["cbp_occl", "scaleprotoseg", "pfa_scribble"])
@pytest.mark.parametrize("data, words", [
    (dict(train=HALVES * 255), "no labelled training pixel of road, and sky alone .* 255"),      # 0 and 255
    (dict(train=VOID), "train .*no pixel is labelled"), (dict(val=VOID), "val .*no pixel is labelled"),
    (dict(train=VOID * 0, val=VOID * 0, classes=b"thing"), "one class"),
    (dict(more={"masks/train/3.png": HALVES * 7}), r"masks/train/3.png has the pixel values \[7\]"),
    (dict(more={"images/train/3.png": GREY[:60]}), "train/3.png is 64 x 60 .* 64 x 64"),
    (dict(more={"images/train/0.png": picture("PNG", turn=6)}), "train/0.png has a rotation mark"),
    (dict(more={"masks/train/0.png": picture("JPEG", "L")}), "train/0.png is a JPEG file"),
    (dict(more={"images/val/1.tif": GREY, "masks/val/1.tif": VOID}), "val/1.png .1.tif is there"),
    (dict(more={"images/val/1.tif": VOID.astype(np.uint16), "masks/val/1.png": VOID}), "1.tif .* 8 bits"),
    (dict(more={"images/val/1.tif": PAGES, "masks/val/1.png": VOID}), "1.tif has 3 pages"),
    (dict(more={"images/train/0.png": MOVING}), "train/0.png has 2 pages"),
    (dict(more={"masks/train/0.png": picture("PNG", "L", 3)}), "train/0.png is a mask with a rotation mark")])
def test_told_before_the_training_and_no_run_folder_is_left(tmp_path, name, data, words):
    argv = ["--data", folder(tmp_path / "data", **data), "--test-split", "val", "--out", tmp_path / "out"]
    strokes = ["--scribbles", "masks"] if name == "pfa_scribble" else []
    said = mistake(name, *SHORT[name], "--dataset", "folder", *argv, *strokes)
    assert re.search(words, said) and not (tmp_path / "out").exists(), said


A, B, X = b"sky\nroad", b"1 sky\n2 road", b"0 x\n1 sky\n2 road"


@pytest.mark.parametrize("classes, ignore, values, ids", [
    (A, 0, [0, 1, 2, 255], [255, 0, 1, 255]), (B, 0, [0, 1, 2, 255], [255, 0, 1, 255]),
    (X, 0, [0, 1, 2, 2], [255, 0, 1, 1]), (b"0 sky\n1 x\n2 road", 1, [0, 1, 2, 2], [0, 255, 1, 1]),
    (A, 2, [0, 1, 2, 255], [0, 1, 255, 255]), (A, 9, [0, 1, 9, 255], [0, 1, 255, 255]),
    (A, 9, [0, 1, 2, 9], "only 0..1 and 255"), (B, None, [1, 1, 2, 2], "--ignore"),
    (b"\xef\xbb\xbf" + A, None, [0, 1], [0, 1]), (A.decode().encode("utf-16"), None, [0, 1], [0, 1]),
    (SKY.encode("gbk"), None, [0], "UTF-8"), (A.decode().encode("utf-16-le"), None, [0], "UTF-8"),
    (f"{NFC}\n{NFD}".encode(), None, [0], "two classes called"),
    (b"0 sky\n1", None, [0], "the line 1 has no name"), (b"# id\n0,sky\n1,road", None, [0, 1], [0, 1]),
    (b"id,name\n0,sky\n1,road", None, [0], "'id,name' does not")])
def test_a_value_can_be_ignored_and_classes_txt_is_read_or_refused(tmp_path, classes, ignore, values, ids):
    tree = {"images/train/0.png": GREY[:, :len(values)]}
    root = folder(tmp_path, train=np.repeat([values], 64, 0), classes=classes, more=tree)
    for mask_dir in ("", "masks"):                                      # full masks, and the same as strokes
        argv = ("folder", root, "train", 0, mask_dir, ignore)
        if isinstance(ids, str):
            assert ids in message(lambda: datasets.open_dataset(*argv).read(0))
        else:
            assert datasets.open_dataset(*argv).classes == ["sky", "road"]
            assert datasets.open_dataset(*argv).read(0)[1][0].tolist() == ids
    assert "--ignore 0" in message(datasets.open_dataset, "camvid", root, "train", ignore=0)


def test_a_run_with_an_ignored_value_and_names_that_terminal_and_font_lack(tmp_path):
    out, photos = tmp_path / "out", tmp_path / "photos"
    argv = ["--data", folder(tmp_path / "data", PARTS, PARTS, f"{SKY}\nb|c".encode()), "--test-split", "val"]
    done("cbp_occl", *SHORT["cbp_occl"], "--dataset", "folder", *argv, "--out", out, "--ignore", 0)
    iou = read(out / "metrics.json")["iou"]
    done("cbp_occl", "--out", out, "--eval-only")
    assert list(iou) == [SKY, "b|c"] and read(out / "metrics.json")["iou"] == iou
    assert "--ignore 1 contradicts" in mistake("cbp_occl", "--out", out, "--eval-only", "--ignore", 1)
    assert (out / "figures" / "class_names.txt").read_text("utf-8") == f"0 {SKY}\n1 b|c\n"
    for text, drawn in ((f"p1, {SKY}", "p1, class 0"), ("\udcff", "?")):
        assert figures.text_piece(text, 300).tobytes() == figures.text_piece(drawn, 300).tobytes()
    assert tables.markdown(list(iou), []).splitlines()[0] == rf"| {SKY} | b\|c |"
    write(photos, {name: GREY for name in (f"{SKY}.png", os.fsdecode(b"caf\xe9.png"), "a.png")})
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
    with contextlib.redirect_stdout(terminal), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["cbp_occl.py", "--out", str(out), "--predict", str(photos)])
        run.run_script(cbp_occl.main, cbp_occl.Config, cbp_occl.PRESETS)
    assert b".png: 0 wet \\u5929, 1 b" in terminal.buffer.getvalue() and len(files(out / "predictions")) == 6


def test_masks_of_few_bits_hold_their_ids_and_a_list_may_not_pair_two_names(tmp_path, capsys):
    tree = {f"images/{k}.png": GREY for k in "ab"} | {f"masks/{k}.png": HALVES for k in "ab"}
    write(tmp_path, tree | {"classes.txt": "a\nb\nc\nd", "train.txt": "images/a.png masks/a.png"})
    for bits in (2, 4):
        Image.fromarray((HALVES * 3).astype(np.uint8)).save(tmp_path / "masks" / "a.png", bits=bits)
        _, mask = datasets.open_dataset("folder", tmp_path, "train").read(0)
        assert mask.tolist() == (HALVES * 3).tolist()
    (tmp_path / "train.txt").write_text("a\nb\na.png")
    datasets.open_dataset("folder", tmp_path, "train")
    assert "names 1 images of images/ twice or more, such as a" in capsys.readouterr().out
    (tmp_path / "train.txt").write_text("images/a.png masks/b.png")
    assert "'images/a.png masks/b.png'" in message(datasets.open_dataset, "folder", tmp_path, "train")


def test_names_pair_up_however_their_accents_are_written(tmp_path):
    write(tmp_path, {f"images/{NFC}.png": GREY, f"masks/{NFD}.png": HALVES, "classes.txt": "a\nb"}
          | {f"{part}/{c}/{k}.png": GREY for part, c in (("train", NFC), ("test", NFD)) for k in "12"})
    for name in (NFC, NFD):
        (tmp_path / "train.txt").write_text(name, "utf-8")
        assert len(datasets.open_dataset("folder", tmp_path, "train").read(0)) == 2
    assert open_images("imagefolder", tmp_path, "test").classes == [NFC]


@pytest.mark.parametrize("rank", [0, 1])
def test_notes_tell_once_what_is_not_read_and_what_is_not_learned(tmp_path, capsys, monkeypatch, rank):
    monkeypatch.setenv("RANK", str(rank))
    others = "images/train/x.gif images/train/y.ppm train/b/x.gif train/y train/.z train/Thumbs.db".split()
    root = write(folder(tmp_path, classes=b"a\nb\nc\nd\ne\nf\ng\nh\ni"), BIRDS | dict.fromkeys(others, ""))
    (root / "train.txt").write_text("0")
    for k, colour in ((1, 200), (2, 200), (3, 60)):                    # index PNGs; 0.png is grey
        mask = Image.fromarray(HALVES.astype(np.uint8))
        mask.putpalette([0, 0, 0, colour, 0, 0])
        mask.save(root / "masks" / "train" / f"{k}.png")
    for _ in range(2):
        train = datasets.open_dataset("folder", root, "train", ignore=99)
        open_images("cars", root, "test")
        assert [path.name for path in list_images(root / "train" / "b")] == ["0.png", "1.png"]
    machine = run.Machine(torch.device("cpu"), rank)
    cfg = SimpleNamespace(workers=0, val_split="train", test_split="val", project_split="val")
    scored = [train] + [datasets.open_dataset("folder", root, "val")] * (rank == 0)
    survey.survey(train, scored, cfg, machine, strokes=True)
    told = capsys.readouterr().out.replace(f"{root}/", "").splitlines()
    words = ["the list train.txt is not read", "2 files in images/train are not read, such as x.gif",
             "2 files in train are not read", "note: train/b/x.gif is not read", "train/3.png shows b in the",
             "--ignore 99: no training mask", "of c, d, e, f, g and 2 more: not learned",
             "strokes label 100.0 %", "if 0 means unlabelled", "4 images of train are also in train",
             "1 images of val are also in train", "--project-split val"]
    assert len(told) == (0 if rank else 12) and all(map(str.__contains__, told, words)), told


@pytest.mark.parametrize("name", SCRIPTS)
def test_results_of_one_name_are_refused_before_anything_is_written(trained, tmp_path, name):
    out, task = copy_of(trained(name), tmp_path / "run"), "--explain" if name == "protopool" else "--predict"
    before = files(out)
    for other in ("a.jpg", "a_overlay.png")[:1 if name == "protopool" else 2]:
        photos = write(tmp_path / other, {"a.png": GREY, other: GREY})
        assert "rename" in mistake(name, "--out", out, task, photos) and files(out) == before
    (write(tmp_path / "b", {"a.png": GREY}) / "z.png").write_text("no image")
    assert "z.png cannot" in mistake(name, "--out", out, task, tmp_path / "b") and files(out) == before


def test_damaged_part_files_are_told_before_the_training_and_a_way_out_works(tmp_path):
    tree = {f"JPEGImages/{k}.png": GREY for k in "ab"} | {f"SegmentationClass/{k}.png": HALVES for k in "ab"}
    lists = {f"ImageSets/Segmentation/{split}.txt": "a\nb" for split in ("train", "val")}
    write(tmp_path, tree | lists | BIRDS)
    for k, end in (("a", None), ("b", -99)):                           # a is whole, b cut short
        (tmp_path / f"{k}.tif").write_bytes(picture("TIFF", "I")[:end])
    argv = ["--data", tmp_path, "--out", tmp_path / "out", "--parts", tmp_path, "--test-split", "val"]
    said = mistake("scaleprotoseg", *SHORT["scaleprotoseg"], "--dataset", "voc", *argv)
    assert f"{tmp_path}/b.tif cannot be read" in said and not (tmp_path / "out").exists()
    argv = ["protopool", *SHORT["protopool"], "--dataset", "imagefolder", *argv[:4]]
    said = mistake(*argv)
    assert "the class a has a single training image" in said and "--select-on-test" in said
    done(*argv, "--batch-size", 3, "--select-on-test")
    for flags, words in (("--iter 1", "did you mean --iterations?"), ("--lr -1e-3", "--lr -0.001: must"),
                         (f"--seed {2 ** 32}", "at most 4294967295")):
        assert words in mistake("cbp_occl", *flags.split())
