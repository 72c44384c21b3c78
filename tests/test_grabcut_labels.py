"""grabcut_labels.py: boxes by hand, masks of synthetic images, interrupted runs, bad input by command line."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import grabcut_labels
from conftest import refused, run_as_main
from grabcut_labels import (COVERS_IMAGE, EMPTY, STAYS_WHOLE, TOO_SMALL, BadInput, box_mask, class_fill_rates,
                            class_names, fill_rates, find_image, find_voc, grabcut, grabcut_mask, larger_first,
                            make_labels, read_boxes, read_image, read_label, read_list)
from toy_voc import CLASS_NAMES, make_toy_voc

SCRIPT = Path(grabcut_labels.__file__)
NAMES = ["background", "cat", "dog"]


def command_line(*arguments):
    """python grabcut_labels.py ... -> (exit status, stdout, stderr)"""
    return run_as_main(SCRIPT, *arguments)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A drawn devkit of 10 + 4 images, and the labels of all of them made by one thread, beside it."""
    devkit = tmp_path_factory.mktemp("drawn") / "VOCdevkit"
    make_toy_voc(devkit, images=10, val=4, size=(60, 80))
    voc = find_voc(devkit)
    make_labels(voc, all_ids(voc), out=devkit.parent / "labels", workers=1)
    return devkit, devkit.parent / "labels"


@pytest.fixture
def devkit(drawn, tmp_path):
    """A copy without labels, to be spoilt."""
    return Path(shutil.copytree(drawn[0], tmp_path / "VOCdevkit"))


def all_ids(voc):
    return read_list(voc / "ImageSets" / "Segmentation" / "trainval.txt")


def label_bytes(folder):
    return {f"{kind}/{path.name}": path.read_bytes() for kind in ("BoxMasks", "GrabCutMasks")
            for path in sorted((folder / kind).glob("*.png"))}


def disc(size=(80, 100), centre=(48, 40), radius=18, seed=0):
    """A grey disc on green, both noisy -> image (H, W, 3), truth (H, W) bool, tight box."""
    ys, xs = np.mgrid[:size[0], :size[1]]
    truth = (xs - centre[0]) ** 2 + (ys - centre[1]) ** 2 <= radius ** 2
    picture = np.where(truth[..., None], (160, 150, 150), (60, 120, 50))
    picture = picture + np.random.default_rng(seed).normal(0, 12, picture.shape)
    rows, columns = np.flatnonzero(truth.any(1)), np.flatnonzero(truth.any(0))
    return picture.clip(0, 255).astype(np.uint8), truth, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


# ---------------------------------------------------------------- boxes
def annotation(tmp_path, text):
    path = tmp_path / "a.xml"
    path.write_text(text)
    return path


def thing(name, xmin, ymin, xmax, ymax, more=""):
    box = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
    return f"<object>{more}<name>{name}</name><bndbox>{box}</bndbox></object>"


def test_boxes_by_hand(tmp_path):
    """VOC's pixel 1 is our 0, and VOC's last pixel is inside: xmin 3, xmax 5 are the three pixels 2, 3, 4 = [2, 5)."""
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    path = annotation(tmp_path, "<annotation><filename>../../elsewhere.jpg</filename>"
                      + thing("dog", 3, 1, 5, 6)
                      + thing("cat", 45.7, 2.2, 60.4, 9.5, "<difficult>1</difficult>")   # floats are rounded
                      + thing("cat", 10, 10, 20, 20, part)                               # the head is no object
                      + thing("dog", -5, 0, 300, 4)                                      # clipped
                      + thing(" dog ", 7, 7, 7, 7) + "</annotation>")                    # one pixel
    boxes, classes = read_boxes(path, NAMES, (50, 100))
    assert boxes.tolist() == [[2, 0, 5, 6], [45, 1, 60, 10], [9, 9, 20, 20], [0, 0, 100, 4], [6, 6, 7, 7]]
    assert classes.tolist() == [2, 1, 1, 2, 2]


def test_an_annotation_without_objects_has_no_boxes(tmp_path):
    boxes, classes = read_boxes(annotation(tmp_path, "<annotation/>"), NAMES, (5, 5))
    assert boxes.shape == (0, 4) and classes.shape == (0,)
    assert not box_mask(boxes, classes, (5, 5)).any()
    mask, fallbacks = grabcut_mask(np.zeros((5, 5, 3), np.uint8), boxes, classes)
    assert mask.shape == (5, 5) and not mask.any() and fallbacks == []


@pytest.mark.parametrize("text, words", [
    ("<annotation><object>", "not readable XML"),
    ("", "not readable XML"),
    ("\x00\x01", "not readable XML"),
    ("<annotation>" + thing("horse", 1, 1, 5, 5) + "</annotation>", "unknown class 'horse'; known are cat, dog"),
    ("<annotation>" + thing("background", 1, 1, 5, 5) + "</annotation>", "unknown class"),
    ("<annotation><object><bndbox/></object></annotation>", "an object without a name"),
    ("<annotation><object><name>cat</name></object></annotation>", "without xmin"),
    ("<annotation>" + thing("cat", 1, 1, 5, 5).replace("</object>", "<attributes><attribute><name>rotation</name>"
     "<value>30.0</value></attribute></attributes></object>") + "</annotation>", "turned by 30.0 degrees"),
    ("<annotation>" + thing("cat", 1, "", 5, 5) + "</annotation>", "without xmin"),
    ("<annotation>" + thing("cat", 1, "nan", 5, 5) + "</annotation>", "without xmin"),
    ("<annotation>" + thing("cat", 1, 1, "inf", 5) + "</annotation>", "without xmin"),
    ("<annotation>" + thing("cat", 6, 1, 5, 5) + "</annotation>", "no area"),
    ("<annotation>" + thing("cat", 101, 1, 120, 5) + "</annotation>", "no area"),
    ("<annotation>" + thing("cat", -9, 1, 0, 5) + "</annotation>", "no area")])
def test_bad_annotations(tmp_path, text, words):
    path = annotation(tmp_path, text)
    with pytest.raises(BadInput) as raised:
        read_boxes(path, NAMES, (50, 100))
    assert words in str(raised.value) and str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_the_remedy_for_unknown_classes_works(drawn, devkit):
    """Without class_names.txt no image gets labels, and the message names the file; with it the same call makes all."""
    voc = find_voc(devkit)
    names = (voc / "class_names.txt").read_text()
    (voc / "class_names.txt").unlink()
    summary = make_labels(voc, all_ids(voc))
    assert summary["made"] == 0 and all("class_names.txt beside JPEGImages" in why for why in summary["failures"])
    (voc / "class_names.txt").write_text(names)
    assert make_labels(voc, all_ids(voc))["made"] == 14 and label_bytes(voc) == label_bytes(drawn[1])


def test_box_mask_paints_the_smaller_box_last():
    """A 4x3 box of class 1, in it a 2x1 box of class 2: on top wherever it stands in the list. Ties: the later one."""
    wanted = [[1, 1, 1, 1, 0],
              [1, 2, 2, 1, 0],
              [1, 1, 1, 1, 0]]
    large, small = (0, 0, 4, 3), (1, 1, 3, 2)
    assert box_mask([large, small], [1, 2], (3, 5)).tolist() == wanted
    assert box_mask([small, large], [2, 1], (3, 5)).tolist() == wanted
    assert box_mask([(0, 0, 2, 1), (1, 0, 3, 1)], [1, 2], (1, 4)).tolist() == [[1, 2, 2, 0]]
    long, square = (0, 1, 6, 2), (0, 0, 3, 3)                               # areas 6 and 9, circumferences 14 and 12
    assert box_mask([long, square], [1, 2], (3, 6))[1].tolist() == [1] * 6
    assert box_mask([large, small], [1, 2], (3, 5)).dtype == np.uint8


def test_boxes_of_one_size_keep_their_order():
    sides = np.random.default_rng(0).integers(1, 4, 100)
    assert larger_first([(0, 0, s, s) for s in sides]).tolist() == sorted(range(100), key=lambda k: -sides[k])


def test_the_working_size_is_an_area(monkeypatch):
    """A 300x100 box and its margin of a tenth, 360x120, at the area of 100x100; then once at full size."""
    sizes = []
    monkeypatch.setattr(cv2, "grabCut", lambda image, *_: sizes.append(image.shape[:2]))
    grabcut(np.zeros((200, 400, 3), np.uint8), (50, 50, 350, 150), working_size=100)
    assert sizes == [(58, 173), (120, 360)]


def test_the_working_image_is_averaged(monkeypatch):
    seen, stripes = [], np.zeros((200, 200, 3), np.uint8)
    monkeypatch.setattr(cv2, "grabCut", lambda image, *_: seen.append(image))
    stripes[:, ::4] = 255
    grabcut(stripes, (50, 50, 150, 150), working_size=30, colours="rgb")
    assert seen[0].shape == (30, 30, 3) and abs(seen[0].astype(int) - 64).max() <= 1


@pytest.mark.parametrize("reach, side, background", [(150, 120, 10 * 120), (157, 120, 120 ** 2 - 100 ** 2),
                                                     (151, 60, 5 * 60)])
def test_boxes_of_the_class_count_if_they_leave_a_tenth_of_the_margin(monkeypatch, reach, side, background):
    """They reach over the margin from the left: to 10 columns from its right end, to 3, and to 9 at half the size,
    where the column of which half is theirs is not theirs."""
    starts, same_class = [], np.zeros((200, 200), bool)
    monkeypatch.setattr(cv2, "grabCut", lambda image, state, *_: starts.append((state == cv2.GC_BGD).sum()))
    same_class[:, :reach] = True
    grabcut(np.zeros((200, 200, 3), np.uint8), (50, 50, 150, 150), same_class, working_size=side)
    assert starts[0] == background


def test_two_boxes_of_a_class_know_of_each_other(monkeypatch):
    seen, boxes = [], [(0, 0, 2, 4), (3, 0, 6, 4), (2, 0, 3, 1)]
    monkeypatch.setattr(grabcut_labels, "grabcut", lambda image, box, same_class, **_: (
        seen.append(same_class), (np.zeros(image.shape[:2], bool), None))[1])
    grabcut_mask(np.zeros((4, 6, 3), np.uint8), boxes, [1, 1, 2])
    assert all(np.array_equal(one, box_mask(boxes[:2], [1, 1], (4, 6)) == 1) for one in seen[:2]) and seen[2] is None


# ---------------------------------------------------------------- GrabCut
@pytest.mark.parametrize("radius", [8, 18, 150])  # the last is scaled down, and cut again at full size
def test_a_disc_is_found(radius):
    picture, truth, box = disc((4 * radius, 5 * radius), (int(2.4 * radius), 2 * radius), radius)
    mask, why = grabcut(picture, box)
    assert why is None and mask.shape == truth.shape and mask.dtype == bool
    assert (mask & truth).sum() / (mask | truth).sum() > 0.93                # the box has pi / 4 = 0.79
    x0, y0, x1, y1 = box
    mask[y0:y1, x0:x1] = False
    assert not mask.any()                                                    # nothing outside the box


def test_the_last_cut_follows_the_pixels():
    """Scaled down by 4 and up again a boundary is some pixels off; the cut at full size brings it back."""
    picture, truth, box = disc((800, 800), (400, 400), 300)
    mask, _ = grabcut(picture, box)
    assert (mask ^ truth).sum() < 2 * np.pi * 300 / 4                       # a quarter of the boundary's pixels


def test_a_very_large_picture_is_cut_at_a_smaller_size(monkeypatch):
    """Box and margin, 720x720 here, at no more than 200x200: the disc is found to a pixel of that size; the box's twin
    to the left is known as such; a working size above it counts as the largest; a box that stays whole stays so."""
    picture, truth, box = disc((800, 800), (400, 400), 300)
    twin = np.zeros(truth.shape, bool)
    twin[100:700, :700] = True
    cut, sizes, starts = cv2.grabCut, [], []

    def watched(image, state, *rest):
        sizes.append(image.shape[:2])
        starts.append(state.copy())
        cut(image, state, *rest)

    monkeypatch.setattr(cv2, "grabCut", watched)
    monkeypatch.setattr(grabcut_labels, "LARGEST", 200)
    mask, why = grabcut(picture, box, working_size=100)
    assert max(sizes) == (200, 200) and min(sizes) == (100, 100)
    assert why is None and not (mask & ~whole_box(mask.shape, box)).any()
    assert (mask ^ truth).sum() < 2 * np.pi * 300 * 720 / 200
    starts.clear()
    grabcut(picture, box, twin, working_size=100)
    assert (starts[0][10:90, :8] == cv2.GC_PR_FGD).all() and (starts[0][:, -8:] == cv2.GC_BGD).all()
    sizes.clear()
    grabcut(picture, box, working_size=700)
    assert set(sizes) == {(700, 700)}
    mask, why = grabcut(picture, box, working_size=100, min_fill=0.99)
    assert why == STAYS_WHOLE and np.array_equal(mask, whole_box(mask.shape, box))


def test_small_boxes_in_a_very_large_picture(monkeypatch):
    """With a margin that takes the whole picture, a box may be smaller than a pixel of the picture that is cut."""
    monkeypatch.setattr(grabcut_labels, "LARGEST", 8)
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    for box in [(0, 0, 1, 1), (119, 89, 120, 90), (60, 0, 61, 90), (0, 45, 120, 46), (33, 35, 36, 38)]:
        mask, why = grabcut(image, box, working_size=4, margin=99)
        assert mask.shape == (90, 120) and not (mask & ~whole_box(mask.shape, box)).any(), why


def test_same_mask_whatever_came_before():
    picture, _, box = disc()
    first = grabcut(picture, box)[0]
    cv2.setRNGSeed(77)
    grabcut(*disc(seed=5)[::2])
    assert np.array_equal(first, grabcut(picture, box)[0])


def whole_box(shape, box):
    mask = np.zeros(shape[:2], bool)
    mask[box[1]:box[3], box[0]:box[2]] = True
    return mask


def among_its_like():
    """A disc between two fields of its own grey, which the background model learns: -> image, truth, box."""
    picture, truth, box = disc()
    grey = picture[truth][np.random.default_rng(1).integers(0, truth.sum(), picture.shape[:2])]
    for columns in (np.s_[:, :box[0] - 1], np.s_[:, box[2] + 1:]):
        picture[columns] = grey[columns]
    return picture, truth, box


def test_the_second_attempt_finds_what_the_first_loses():
    """The first is empty; the ellipse in the middle of the box knows the disc's grey. The whole box would have 0.79."""
    picture, truth, box = among_its_like()
    mask, why = grabcut(picture, box)
    assert why == EMPTY and (mask & truth).sum() / (mask | truth).sum() > 0.95
    assert not (mask & ~whole_box(picture.shape, box)).any()
    mask, fallbacks = grabcut_mask(picture, [box], [2])
    assert fallbacks == [EMPTY] and (mask[truth] == 2).mean() > 0.95


@pytest.mark.parametrize("scale", [1, 5])  # the second is scaled down, and cut again at full size
def test_a_box_that_covers_the_image_is_cut(scale):
    """No pixel is sure background: the corners outside the ellipse that touches the image's sides may be."""
    height, width = 80 * scale, 100 * scale
    picture, truth, _ = disc((height, width), (width // 2, height // 2), 36 * scale)
    mask, why = grabcut(picture, (0, 0, width, height))
    assert why == COVERS_IMAGE and (mask & truth).sum() / (mask | truth).sum() > 0.95


def test_the_ellipse_has_seven_tenths_of_the_box(monkeypatch):
    """A second attempt starts from 0.7^2 pi / 4 = 0.385 of the box as sure foreground, symmetric, its middle inside."""
    starts = []

    def cut(image, state, *_):
        starts.append(state.copy())
        state[:] = cv2.GC_BGD

    monkeypatch.setattr(cv2, "grabCut", cut)
    mask, why = grabcut(np.zeros((200, 200, 3), np.uint8), (40, 60, 160, 140))
    box = starts[1][8:88, 12:132]                                            # a margin of a tenth around it
    assert why == STAYS_WHOLE and mask.sum() == 120 * 80 and len(starts) == 2
    assert (starts[0] == cv2.GC_FGD).sum() == 0 and (starts[1] == cv2.GC_FGD).sum() == (box == cv2.GC_FGD).sum()
    sure = box == cv2.GC_FGD
    assert sure.mean() == pytest.approx(0.49 * np.pi / 4, abs=0.005) and sure[40, 60]
    assert np.array_equal(sure, sure[::-1, ::-1]) and sure.any(0).sum() == 84 and sure.any(1).sum() == 56
    assert (box[~sure] == cv2.GC_PR_FGD).all()                               # the rest starts as in the first attempt


def test_why_a_box_needs_more_than_one_attempt():
    picture, _, box = disc()
    uniform = np.full_like(picture, 90)
    cases = [(picture, (0, 0, 100, 80), {}, COVERS_IMAGE),           # no background anywhere
             (uniform, (10, 10, 60, 60), {}, EMPTY),                 # all alike
             (among_its_like()[0], box, {}, EMPTY),
             (picture, box, {"min_fill": 0.99}, STAYS_WHOLE),        # a disc fills 0.79 of its box
             (picture[:2, :2], (0, 0, 2, 2), {}, STAYS_WHOLE)]       # covers an image that has no corners
    for image, corners, options, reason in cases:
        mask, why = grabcut(image, corners, **options)
        inside = whole_box(image.shape, corners)
        assert why == reason and mask.any() and not (mask & ~inside).any()
        assert why != STAYS_WHOLE or np.array_equal(mask, inside)


def test_odd_boxes_never_fail():
    """One pixel, one row, one column, at corners and edges, nearly the whole image, in images of any shape."""
    rng = np.random.default_rng(0)
    for height, width in [(1, 2), (2, 2), (3, 40), (40, 3), (1, 60), (60, 80), (2000, 3)]:
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        boxes = [(0, 0, 1, 1), (width - 1, height - 1, width, height), (0, 0, width, 1), (0, 0, 1, height),
                 (width // 2, 0, width // 2 + 1, height), (0, 0, max(1, width - 1), height), (0, 0, width, height)]
        for box in boxes:
            mask, why = grabcut(image, box)
            inside = whole_box(image.shape, box)
            assert mask.any() and not (mask & ~inside).any()
            assert np.array_equal(mask, inside) if why == STAYS_WHOLE else mask.sum() >= 0.15 * inside.sum()


@pytest.mark.parametrize("fills, wanted, reason", [((60, 40, 5), 40, None), ((60, 14, 50), 60, None),
                                                   ((14, 50, 50), 50, TOO_SMALL), ((0, 50, 14), 50, EMPTY),
                                                   ((14, 14), 100, STAYS_WHOLE), ((20, 20, 20), 20, None),
                                                   ((15, 15, 15), 15, None)])
def test_an_iteration_that_loses_the_object_is_taken_back(monkeypatch, fills, wanted, reason):
    """A 10x10 box whose iterations leave so many of its 100 pixels; the last mask before less than 15 counts.

    A first iteration that leaves less is followed by the second attempt, whose own first iteration may fail, too.
    """
    calls = iter(fills)

    def cut(image, state, *_):
        box = np.full(100, cv2.GC_PR_BGD, np.uint8)
        box[:next(calls)] = cv2.GC_PR_FGD
        state[2:12, 2:12] = box.reshape(10, 10)                              # in the box and its margin of 2

    monkeypatch.setattr(cv2, "grabCut", cut)
    mask, why = grabcut(np.zeros((20, 20, 3), np.uint8), (5, 5, 15, 15), iterations=3)
    assert why == reason and mask.sum() == wanted and mask[5:15, 5:15].sum() == wanted


@pytest.mark.parametrize("moved, wanted", [(0, 2), (4, 2), (5, 5)])
def test_iterations_end_where_three_pixels_in_a_thousand_move(monkeypatch, moved, wanted):
    """In a box of 40x40, 4.8 pixels: the first iteration moves half of it, each after it `moved` pixels back."""
    calls = []

    def cut(image, state, *_):
        calls.append(800 - moved * len(calls))
        box = np.full(1600, cv2.GC_PR_BGD, np.uint8)
        box[:calls[-1]] = cv2.GC_PR_FGD
        state[4:44, 4:44] = box.reshape(40, 40)

    monkeypatch.setattr(cv2, "grabCut", cut)
    mask, _ = grabcut(np.zeros((60, 60, 3), np.uint8), (10, 10, 50, 50))
    assert len(calls) == wanted and mask.sum() == calls[-1]


def at_two_sizes(monkeypatch, full):
    """cv2.grabCut that finds the left half of a 100x100 box at half size, and then loses it; at full size `full` does
    what it likes. The box and its margin are 120x120 pixels, 60x60 at half size."""
    def cut(image, state, _, background, foreground, *__):
        if len(state) == 120:
            return full(state, background)
        background[:] += 1
        state[state != cv2.GC_BGD] = cv2.GC_PR_BGD
        if background.flat[0] == 1:
            state[5:55, 5:30] = cv2.GC_PR_FGD
    monkeypatch.setattr(cv2, "grabCut", cut)
    return dict(image=np.zeros((200, 200, 3), np.uint8), box=(50, 50, 150, 150), working_size=60)


@pytest.mark.parametrize("columns, lost", [(0, True), (14, True), (15, False)])
def test_too_little_left_at_full_size_counts_as_lost(monkeypatch, columns, lost):
    def full(state, _):
        state[:] = cv2.GC_BGD
        state[10:110, 10:10 + columns] = cv2.GC_PR_FGD
    mask, why = grabcut(**at_two_sizes(monkeypatch, full))
    assert (why == STAYS_WHOLE) == lost and mask.sum() == (100 * 100 if lost else 1500)


def test_full_size_starts_from_what_the_kept_iteration_found(monkeypatch):
    """Two working pixels each way of the boundary are perhaps, with the models of the iteration that counts; another
    box of the class may reach the object's side of the margin, and the rest of the margin is background."""
    starts = []
    options = at_two_sizes(monkeypatch, lambda state, background: starts.append((state.copy(), background.flat[0])))
    shared = np.zeros((200, 200), bool)
    shared[50:150, 40:150] = True                                           # the margin's left side, too
    for same_class, left in ((None, cv2.GC_BGD), (shared, cv2.GC_PR_BGD)):
        mask, why = grabcut(**options, same_class=same_class)
        (state, model), = starts
        starts.clear()
        row = [cv2.GC_BGD] * 6 + [left] * 4 + [cv2.GC_PR_FGD] * 4 + [cv2.GC_FGD] * 42 + [cv2.GC_PR_FGD] * 4
        assert state[60].tolist() == row + [cv2.GC_PR_BGD] * 4 + [cv2.GC_BGD] * 56
        assert model == 1 and why is None and mask.sum() == 100 * 50 and mask[50:150, 50:100].all()


def test_an_object_lost_at_full_size_counts_as_lost(monkeypatch):
    options = at_two_sizes(monkeypatch, lambda state, _: state.fill(cv2.GC_BGD))
    mask, why = grabcut(**options)
    assert why == STAYS_WHOLE and np.array_equal(mask, whole_box(mask.shape, options["box"]))


def test_colours_are_cielab_of_rgb_stretched_alike():
    colours = np.array([[[140, 110, 100], [90, 120, 130], [128, 128, 128], [20, 60, 30]]], np.uint8)
    L, a, b = np.moveaxis(cv2.cvtColor(colours.astype(np.float32) / 255, cv2.COLOR_RGB2LAB), 2, 0)
    expected = np.stack([2.55 * L, 128 + 2.55 * a, 128 + 2.55 * b], 2)
    assert np.abs(grabcut_labels.cielab(colours) - expected).max() < 3


def flock():
    """Three boxes side by side on a grey band over green: -> image, truth (H, W) bool, boxes."""
    band = np.zeros((90, 160), bool)
    band[25:65] = True
    picture = np.where(band[..., None], (150, 150, 140), (90, 140, 70))
    picture = (picture + np.random.default_rng(0).normal(0, 20, picture.shape)).clip(0, 255).astype(np.uint8)
    return picture, band, [(0, 22, 50, 68), (50, 22, 105, 68), (105, 22, 160, 68)]


def test_the_neighbours_of_a_flock_are_no_background():
    """Left and right of a sheep is sheep. Taken for three classes the boxes get lost, as one class none does."""
    picture, band, boxes = flock()
    together, fallbacks = grabcut_mask(picture, boxes, [1, 1, 1])
    assert fallbacks == [None, None, None]
    assert ((together == 1) & band).sum() / ((together == 1) | band).sum() > 0.98
    apart, fallbacks = grabcut_mask(picture, boxes, [1, 2, 3])
    assert EMPTY in fallbacks and ((apart > 0) ^ band).sum() > 5 * ((together > 0) ^ band).sum()
    alone, again = grabcut_mask(picture, boxes, [1, 1, 1], share=False)
    assert np.array_equal(alone > 0, apart > 0) and again == fallbacks


def test_a_mask_stays_in_its_box_beside_boxes_of_its_class():
    picture, band, boxes = flock()
    for box in boxes:
        mask, why = grabcut(picture, box, band)
        assert why is None and not (mask & ~whole_box(mask.shape, box)).any()


@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_no_more_iterations_than_asked_for(monkeypatch, iterations):
    calls = []

    def cut(image, state, *_):                          # a mask that shrinks each time, so that none is the last
        calls.append(None)
        box = np.full(1600, cv2.GC_PR_BGD, np.uint8)
        box[:800 - 5 * len(calls)] = cv2.GC_PR_FGD
        state[4:44, 4:44] = box.reshape(40, 40)

    monkeypatch.setattr(cv2, "grabCut", cut)
    grabcut(np.zeros((60, 60, 3), np.uint8), (10, 10, 50, 50), iterations=iterations)
    assert len(calls) == iterations


def test_plain_opencv_is_among_the_options():
    """RGB, full size, neighbours ignored: cv2.grabCut's own answer on box and margin."""
    picture, _, (x0, y0, x1, y1) = disc()
    dx, dy = round(0.1 * (x1 - x0)), round(0.1 * (y1 - y0))
    window = np.s_[y0 - dy:y1 + dy, x0 - dx:x1 + dx]
    state = np.full((y1 - y0 + 2 * dy, x1 - x0 + 2 * dx), cv2.GC_BGD, np.uint8)
    state[dy:-dy, dx:-dx] = cv2.GC_PR_FGD
    cv2.setRNGSeed(0)
    cv2.grabCut(picture[window], state, None, np.zeros((1, 65)), np.zeros((1, 65)), 5, cv2.GC_INIT_WITH_MASK)
    plain, why = grabcut(picture, (x0, y0, x1, y1), colours="rgb", working_size=10_000)
    assert why is None and np.array_equal(plain[window], state & 1 == 1)
    state = np.zeros(picture.shape[:2], np.uint8)
    cv2.setRNGSeed(0)
    cv2.grabCut(picture, state, (x0, y0, x1 - x0, y1 - y0), np.zeros((1, 65)), np.zeros((1, 65)), 5,
                cv2.GC_INIT_WITH_RECT)
    whole_image, _ = grabcut(picture, (x0, y0, x1, y1), colours="rgb", working_size=10_000, margin=99, min_fill=0)
    assert np.array_equal(whole_image, state & 1 == 1)
    faint = 128 + 0.3 * (picture - 128.0) + np.random.default_rng(1).normal(0, 10, picture.shape)
    lab, rgb = (grabcut(faint.clip(0, 255).astype(np.uint8), (x0, y0, x1, y1), colours=colours)[0]
                for colours in ("lab", "rgb"))
    assert not np.array_equal(lab, rgb)


def test_same_class_boxes_that_leave_no_background_do_not_count():
    picture, _, box = disc()
    everywhere = np.ones(picture.shape[:2], bool)
    assert np.array_equal(grabcut(picture, box, everywhere)[0], grabcut(picture, box)[0])


def test_in_m_the_larger_object_shows_through_the_smaller_box():
    """A red disc (class 2, small box) on a grey one (class 1): grey corners of the small box are 2 in B, but 1 in M."""
    picture, grey, large = disc((120, 140), (70, 60), 45)
    small = (58, 48, 83, 73)
    ys, xs = np.mgrid[:120, :140]
    red = (xs - 70) ** 2 + (ys - 60) ** 2 <= 12 ** 2
    picture[red] = (200, 30, 30)
    mask, fallbacks = grabcut_mask(picture, [small, large], [2, 1])
    assert fallbacks == [None, None]
    corner = whole_box(mask.shape, small) & ~red
    assert (box_mask([small, large], [2, 1], mask.shape)[corner] == 2).all()
    assert (mask[corner] == 1).mean() > 0.9 and (mask[red] == 2).mean() > 0.9


# ---------------------------------------------------------------- labels on disk
def test_labels_are_palette_pngs_that_fit(drawn):
    devkit, labels = drawn
    voc = find_voc(devkit)
    for image_id in all_ids(voc):
        size = Image.open(voc / "JPEGImages" / f"{image_id}.jpg").size[::-1]
        boxes, classes = read_boxes(voc / "Annotations" / f"{image_id}.xml", CLASS_NAMES, size)
        read = {kind: read_label(labels / kind / f"{image_id}.png", size, len(CLASS_NAMES))
                for kind in ("BoxMasks", "GrabCutMasks")}
        assert np.array_equal(read["BoxMasks"], box_mask(boxes, classes, size))
        assert not read["GrabCutMasks"][read["BoxMasks"] == 0].any()         # M is background where B is
        assert set(np.unique(read["GrabCutMasks"])) <= {0, *classes}
        png = Image.open(labels / "GrabCutMasks" / f"{image_id}.png")
        assert png.mode == "P" and png.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]


def test_what_is_written_is_m(drawn):
    voc, made = find_voc(drawn[0]), drawn[1]
    others = 0
    for image_id in all_ids(voc)[:3]:
        image = grabcut_labels.read_image(voc / "JPEGImages" / f"{image_id}.jpg")
        boxes, classes = read_boxes(voc / "Annotations" / f"{image_id}.xml", class_names(voc), image.shape[:2])
        mask = read_label(made / "GrabCutMasks" / f"{image_id}.png")
        assert np.array_equal(mask, grabcut_mask(image, boxes, classes)[0])
        others += not np.array_equal(mask, box_mask(boxes, classes, mask.shape))
    assert others == 3


def test_the_number_of_workers_changes_nothing(drawn, tmp_path):
    devkit, labels = drawn
    threads = cv2.getNumThreads()
    summary = make_labels(find_voc(devkit), all_ids(find_voc(devkit))[::-1], out=tmp_path, workers=3)
    assert summary["made"] == 14 and summary["skipped"] == 0 and summary["failures"] == []
    assert label_bytes(tmp_path) == label_bytes(labels) and len(label_bytes(labels)) == 28
    assert cv2.getNumThreads() == threads                                    # left as found


def test_a_second_run_makes_only_what_is_missing(drawn, devkit):
    voc = find_voc(devkit)
    ids = all_ids(voc)
    for kind in ("BoxMasks", "GrabCutMasks"):
        shutil.copytree(drawn[1] / kind, voc / kind)
    (voc / "BoxMasks" / f"{ids[0]}.png").unlink()
    (voc / "GrabCutMasks" / f"{ids[1]}.png").unlink()
    (voc / "GrabCutMasks" / f"{ids[1]}.png.4711.tmp").write_bytes(b"half a f")         # of a run that was killed
    before = {path: path.stat().st_mtime_ns for path in voc.glob("*Masks/*.png")}
    summary = make_labels(voc, ids, workers=1)
    assert (summary["made"], summary["skipped"]) == (2, 12)
    assert label_bytes(voc) == label_bytes(drawn[1])
    changed = {path.stem for path, stamp in before.items() if path.stat().st_mtime_ns != stamp}
    assert changed <= set(ids[:2])
    assert make_labels(voc, ids)["made"] == 0


def test_a_corrected_box_gets_new_labels(drawn, devkit):
    """Somebody looks at the sheet, moves a box, and calls the command again; a file that only looks newer stays."""
    voc = find_voc(devkit)
    ids = all_ids(voc)
    for kind in ("BoxMasks", "GrabCutMasks"):
        shutil.copytree(drawn[1] / kind, voc / kind)
    make_labels(voc, ids)
    moved, touched = (voc / "Annotations" / f"{image_id}.xml" for image_id in ids[:2])
    text = re.sub(r"<xmin>.*?</xmin>", "<xmin>1</xmin>", moved.read_text(), count=1)
    assert text != moved.read_text()
    moved.write_text(text)
    for path in (moved, touched):
        os.utime(path, (time.time() + 60, time.time() + 60))
    summary = make_labels(voc, ids)
    assert (summary["made"], summary["skipped"], summary["failures"]) == (1, 13, [])
    B = read_label(voc / "BoxMasks" / f"{ids[0]}.png")
    assert np.array_equal(B, box_mask(*read_boxes(moved, class_names(voc), B.shape), B.shape)) and B[:, 0].any()
    moved.write_text("<annotation>")
    os.utime(moved, (time.time() + 120, time.time() + 120))
    assert "not readable XML" in make_labels(voc, ids)["failures"][0]


def test_a_corrected_box_that_b_does_not_show_gets_new_labels(devkit):
    """Boxes that meet, one within the other or side by side: B may be the same, but each has a GrabCut of its own."""
    voc = find_voc(devkit)
    image_id = all_ids(voc)[0]
    annotation = voc / "Annotations" / f"{image_id}.xml"
    kinds = class_names(voc)[1:3]

    def correct(*things, seconds=[0]):
        seconds[0] += 60
        annotation.write_text("<annotation>" + "".join(things) + "</annotation>")
        os.utime(annotation, (time.time() + seconds[0], time.time() + seconds[0]))
        made = make_labels(voc, [image_id])["made"]
        for kind in ("BoxMasks", "GrabCutMasks"):                               # as new as what they were made from
            os.utime(voc / kind / f"{image_id}.png", (time.time() + seconds[0], time.time() + seconds[0]))
        assert make_labels(voc, [image_id])["made"] == 0
        return made

    whole = thing(kinds[0], 11, 11, 50, 40)
    assert correct(whole) == 1 and correct(whole) == 0
    assert correct(whole, thing(kinds[0], 21, 21, 40, 30)) == 1                 # one within it
    assert correct(thing(kinds[0], 11, 11, 30, 40), thing(kinds[0], 31, 11, 50, 40)) == 1   # two halves, which meet
    apart = [thing(kinds[0], 11, 11, 29, 40), thing(kinds[0], 31, 11, 50, 40)]
    assert correct(*apart) == 1 and correct(*apart) == 0
    above = thing(kinds[1], 25, 5, 60, 45), thing(kinds[0], 11, 11, 40, 40)     # the larger one's edge is hidden
    assert correct(*above) == 1 and correct(*above[::-1]) == 1


def test_labels_of_others_stay(devkit, capsys):
    """Masks without a source.json are not ours: what is missing is made, and nothing else is written."""
    voc = find_voc(devkit)
    one, other = all_ids(voc)[:2]
    size = read_image(find_image(voc / "JPEGImages", one)).shape[:2]
    grabcut_labels.write_label(voc / "GrabCutMasks" / f"{one}.png", np.full(size, 3))
    annotation = voc / "Annotations" / f"{one}.xml"
    for kind in ("GrabCutMasks", "BoxMasks"):                                   # B missing; then B another's, too
        make_labels(voc, [one, other])
        assert "labels of unknown make" in capsys.readouterr().err
        assert (read_label(voc / "GrabCutMasks" / f"{one}.png") == 3).all()
        assert (voc / "GrabCutMasks" / f"{other}.png").exists()
        (voc / "BoxMasks" / "source.json").unlink(missing_ok=True)
        grabcut_labels.write_label(voc / "BoxMasks" / f"{one}.png", np.full(size, 4))
        annotation.write_text("<annotation>" + thing(class_names(voc)[1], 1, 1, 9, 9) + "</annotation>")
        os.utime(annotation, (time.time() + 60, time.time() + 60))
    assert make_labels(voc, [one, other])["made"] == 0 and (read_label(voc / "BoxMasks" / f"{one}.png") == 4).all()


def test_an_image_that_failed_is_not_on_the_sheet(devkit):
    """Its labels may be there, of before its annotation was spoilt."""
    voc = find_voc(devkit)
    assert command_line("--data", devkit)[0] == 0
    annotation = voc / "Annotations" / f"{all_ids(voc)[0]}.xml"
    annotation.write_text("<annotation>" + thing("no such class", 1, 1, 9, 9) + "</annotation>")
    os.utime(annotation, (time.time() + 60, time.time() + 60))
    status, out, error = command_line("--data", devkit, "--show", 20)
    assert status == 1 and "look at" in out and "1 of 10 images got no labels" in error and "Traceback" not in error


def test_an_image_that_is_stopped_between_its_two_labels_is_made_anew(devkit, monkeypatch):
    """B's time says that both are up to date."""
    voc = find_voc(devkit)
    ids = all_ids(voc)[:1]
    make_labels(voc, ids)
    old = label_bytes(voc)
    annotation = voc / "Annotations" / f"{ids[0]}.xml"
    annotation.write_text("<annotation>" + thing(class_names(voc)[1], 11, 11, 50, 40) + "</annotation>")
    os.utime(annotation, (time.time() + 60, time.time() + 60))
    write, written = grabcut_labels.write_label, []

    def full_disk(path, labels):
        if written:
            raise grabcut_labels.CannotWrite("no space left")
        written.append(path)
        write(path, labels)
        os.utime(path, (time.time() + 120, time.time() + 120))

    with monkeypatch.context() as patch:
        patch.setattr(grabcut_labels, "write_label", full_disk)
        with pytest.raises(grabcut_labels.CannotWrite):
            make_labels(voc, ids)
    assert len(written) == 1 and make_labels(voc, ids)["made"] == 1
    new = label_bytes(voc)
    assert new.keys() == old.keys() and all(new[name] != old[name] for name in new)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_stopped_in_the_middle_leaves_whole_files_and_goes_on(tmp_path, how):
    devkit = tmp_path / "VOCdevkit"
    make_toy_voc(devkit, images=60, val=1, size=(60, 80))
    voc = find_voc(devkit)
    command = [sys.executable, SCRIPT, "--data", devkit, "--workers", "2"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and len(list(voc.glob("BoxMasks/*.png"))) < 5:
        time.sleep(0.01)
    run.send_signal(how)
    error = run.communicate()[1]
    done = list(voc.glob("*Masks/*.png"))
    assert 10 <= len(done) < 120
    for path in done:
        read_label(path, (60, 80), len(CLASS_NAMES))                         # no half file under a final name
    if how == signal.SIGINT:
        assert run.returncode == 130 and "goes on" in error and "Traceback" not in error
    status, out, error = command_line("--data", devkit, "--workers", 2)
    assert status == 0
    assert len(list(voc.glob("BoxMasks/*.png"))) == len(list(voc.glob("GrabCutMasks/*.png"))) == 60
    assert "failed 0" in out and "made 60" not in out                        # it did not start over


def test_own_classes_and_the_list_that_is_taken(drawn, devkit):
    voc = find_voc(devkit)
    status, out, _ = command_line("--data", devkit)
    assert status == 0 and "10 images of" in out and "train.txt" in out and "made 10, already there 0, failed 0" in out
    shutil.copy(voc / "ImageSets/Segmentation/val.txt", voc / "ImageSets/Segmentation/trainaug.txt")
    status, out, _ = command_line("--data", voc)
    assert status == 0 and "4 images of" in out and "trainaug.txt" in out
    assert label_bytes(voc) == label_bytes(drawn[1])
    (voc / "class_names.txt").write_text("background\n" + "\n".join(reversed(CLASS_NAMES[1:])) + "\n")
    ids = all_ids(voc)[:1]
    make_labels(voc, ids, out=devkit / "other", workers=1)
    mirrored = read_label(devkit / "other" / "BoxMasks" / f"{ids[0]}.png")
    ours = read_label(drawn[1] / "BoxMasks" / f"{ids[0]}.png")
    assert np.array_equal(mirrored, np.where(ours > 0, len(CLASS_NAMES) - ours.astype(int), 0))


def test_shards_part_the_list(drawn, tmp_path):
    for part in (1, 2, 3):
        shard = ("--split", "trainval", "--shard", f"{part}/3")
        status, out, _ = command_line("--data", drawn[0], *shard, "--out", tmp_path)
        assert status == 0 and "already there 0" in out
    assert label_bytes(tmp_path) == label_bytes(drawn[1])


def test_fallbacks_are_counted(tmp_path):
    """Three images: all alike, a box over all of it, a disc. With a floor of 0.95, above the disc's 0.79 and what the
    ellipse leaves of the first, these two stay whole; the box over all of its image comes out nearly whole."""
    voc = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    (voc / "class_names.txt").write_text("\n".join(NAMES))
    picture, _, (x0, y0, x1, y1) = disc()
    pictures = {"alike": np.full_like(picture, 90), "whole": picture, "disc": picture}
    for name, image in pictures.items():
        Image.fromarray(image).save(voc / "JPEGImages" / f"{name}.jpg", quality=98)
        corners = (1, 1, 100, 80) if name == "whole" else (x0 + 1, y0 + 1, x1, y1)
        (voc / "Annotations" / f"{name}.xml").write_text(f"<annotation>{thing('dog', *corners)}</annotation>")
    (voc / "ImageSets/Segmentation/train.txt").write_text("\n".join(pictures))
    summary = make_labels(voc, list(pictures), workers=2)
    assert summary["boxes"] == 3 and summary["fallbacks"] == {EMPTY: 1, COVERS_IMAGE: 1} and summary["made"] == 3
    status, out, _ = command_line("--data", tmp_path, "--out", tmp_path / "other", "--min-fill", 0.95)
    assert status == 0
    assert f"3 boxes, 3 not at the first attempt (100.0 %): {COVERS_IMAGE}: 1, {STAYS_WHOLE}: 2" in out
    both = [read_label(tmp_path / "other" / kind / "disc.png") for kind in ("BoxMasks", "GrabCutMasks")]
    assert np.array_equal(*both) and both[0].any()


# ---------------------------------------------------------------- bad input
def test_refusals(devkit, tmp_path):
    voc = find_voc(devkit)
    jpeg = next((voc / "JPEGImages").glob("*.jpg"))
    assert "no VOC data in nowhere" in refused(SCRIPT, "--data", "nowhere")
    assert "no image list" in refused(SCRIPT, "--data", devkit, "--split", "test")
    assert "no image list" in refused(SCRIPT, "--data", devkit, "--list", tmp_path / "mine.txt")
    assert "expected I/N" in refused(SCRIPT, "--data", devkit, "--shard", "3/2")
    assert "expected I/N" in refused(SCRIPT, "--data", devkit, "--shard", "half")
    (tmp_path / "file").write_text("")
    assert "--out" in refused(SCRIPT, "--data", devkit, "--out", tmp_path / "file")
    assert "no image" in refused(SCRIPT, "--image", tmp_path / "none.jpg", "--box", 0, 0, 5, 5)
    for flags, words in ((("--detector-weights", "w"), "--detector-weights: only with --boxes detector"),
                         (("--score-threshold", 0.9, "--device", "cuda"), "--device --score-threshold: only with"),
                         (("--crowds",), "--crowds: only with --coco"),
                         (("--fill-rates", "rates", "--shard", "1/2"), "--fill-rates is of the whole list"),
                         (("--show", -1), "--show: expected 0 or more"),
                         (("--image", jpeg, "--box", 0, 0, 5, 5, "--split", "val", "--no-share"),
                          "--no-share --split: not with --image")):
        status, _, error = command_line("--data", devkit, *flags)
        assert status == 2 and words in error.splitlines()[-1], error
    assert "no area" in refused(SCRIPT, "--image", jpeg, "--box", 5, 5, 5, 9)
    assert "no area" in refused(SCRIPT, "--image", jpeg, "--box", 500, 5, 600, 9)
    assert "not a readable image" in refused(SCRIPT, "--image", voc / "class_names.txt", "--box", 0, 0, 5, 5)
    (voc / "class_names.txt").write_text("background\ncat\ncat\n")
    assert "class_names.txt" in refused(SCRIPT, "--data", devkit)


@pytest.mark.parametrize("arguments", [("--image", "x.jpg"), ("--split", "a", "--list", "b"), ("--iterations", "0"),
                                       ("--margin", "0"), ("--workers", "0"), ("--min-fill", "2"), ("--boxes", "mine")])
def test_arguments_that_do_not_fit(arguments):
    status, _, error = command_line(*arguments)
    assert status == 2 and "Traceback" not in error and "error:" in error


def test_bad_images_are_reported_and_the_others_made(drawn, devkit):
    voc = find_voc(devkit)
    ids = all_ids(voc)
    jpeg = voc / "JPEGImages" / f"{ids[0]}.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:500])                                # cut off
    (voc / "JPEGImages" / f"{ids[1]}.jpg").unlink()
    xml = voc / "Annotations" / f"{ids[2]}.xml"
    xml.write_text(xml.read_text()[:-30])
    xml = voc / "Annotations" / f"{ids[3]}.xml"
    xml.write_text(f"<annotation>{thing('unicorn', 1, 1, 5, 5)}</annotation>")
    (voc / "Annotations" / f"{ids[4]}.xml").unlink()
    status, out, error = command_line("--data", devkit, "--split", "trainval", "--fill-rates", devkit / "rates")
    assert status == 1 and "Traceback" not in error
    assert "made 9, already there 0, failed 5" in out and "5 of 14 images got no labels" in error
    listed = error[error.index("5 of 14"):].splitlines()[1:]
    words = ["not a readable image", "no image", "not readable XML", "known are " + ", ".join(CLASS_NAMES[1:]),
             "no annotation"]
    assert [line.split(":")[0].strip() for line in listed] == ids[:5]
    assert all(word in line for word, line in zip(words, listed))
    made = label_bytes(voc)
    assert made == {name: png for name, png in label_bytes(drawn[1]).items() if Path(name).stem in ids[5:]}
    assert set(json.loads((devkit / "rates.json").read_text())["images"]) == set(ids[5:])
    for folder in ("JPEGImages", "Annotations"):                             # fixed, a second run makes the five
        shutil.copytree(drawn[0] / "VOC2012" / folder, voc / folder, dirs_exist_ok=True)
    status, out, _ = command_line("--data", devkit, "--split", "trainval")
    assert status == 0 and "made 5, already there 9, failed 0" in out and label_bytes(voc) == label_bytes(drawn[1])


# ---------------------------------------------------------------- boxes from a detector
class Stub(torch.nn.Module):
    """Stands in for torchvision's detector: four detections, COCO's labels, whatever the image."""
    def forward(self, images):
        assert images[0].shape == (3, 60, 80) and images[0].max() <= 1
        return [{"boxes": torch.tensor([[10.6, 5.2, 40.1, 50.9], [-3.0, 2.0, 90.0, 70.0], [1.0, 1.0, 9.0, 9.0],
                                        [20.0, 20.0, 30.0, 30.0]]),
                 "labels": torch.tensor([72, 1, 25, 18]),                    # tv, person, giraffe, dog
                 "scores": torch.tensor([0.9, 0.5, 0.99, 0.49])}]


def test_detections_become_voc_boxes(monkeypatch, drawn, tmp_path):
    """The giraffe is no VOC class, the dog scores 0.49; a tv is a tvmonitor; corners go outwards and are clipped."""
    from torchvision.models import detection
    monkeypatch.setattr(detection, "fasterrcnn_resnet50_fpn_v2", lambda **_: Stub())
    detect = grabcut_labels.make_detector(grabcut_labels.VOC_CLASSES)
    boxes, classes = detect(np.full((60, 80, 3), 255, np.uint8))
    assert boxes.tolist() == [[10, 5, 41, 51], [0, 2, 80, 60]] and classes.tolist() == [20, 15]
    voc = Path(shutil.copytree(drawn[0], tmp_path / "VOCdevkit")) / "VOC2012"
    (voc / "class_names.txt").write_text("background\nperson\ntvmonitor\n")
    shutil.rmtree(voc / "Annotations")                                       # not needed
    detect = grabcut_labels.make_detector(["background", "person", "tvmonitor"])
    ids = all_ids(voc)[:3]
    summary = make_labels(voc, ids, workers=2, detect=detect)
    assert summary["made"] == 3 and summary["boxes"] == 6 and not (voc / "BoxMasks").exists()
    wanted = box_mask([(10, 5, 41, 51), (0, 2, 80, 60)], [2, 1], (60, 80))
    assert np.array_equal(read_label(voc / "BoxMasks-detector" / f"{ids[0]}.png"), wanted)
    assert set(np.unique(read_label(voc / "GrabCutMasks-detector" / f"{ids[0]}.png"))) <= {0, 1, 2}


def test_every_voc_class_has_one_coco_name():
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_V2_Weights
    categories = FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1.meta["categories"]
    mapped = [grabcut_labels.COCO_TO_VOC.get(category, category) for category in categories]
    assert [mapped.count(name) for name in grabcut_labels.VOC_CLASSES[1:]] == [1] * 20


def test_a_torchvision_detector_from_a_local_file(drawn, tmp_path):
    """Random weights: which boxes come out means nothing, that the whole path runs does."""
    from torchvision.models import detection
    torch.manual_seed(0)
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    network = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=91)
    network.roi_heads.box_predictor.cls_score.bias.data[1] = 9               # it sees persons everywhere
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    voc = Path(shutil.copytree(drawn[0], tmp_path / "VOCdevkit")) / "VOC2012"
    (voc / "class_names.txt").unlink()                                       # VOC's own classes
    (voc / "short.txt").write_text(all_ids(voc)[0])
    arguments = ("--data", voc, "--list", voc / "short.txt", "--boxes", "detector", "--detector", name)
    arguments = (*arguments, "--detector-weights", tmp_path / "weights.pth")
    status, out, error = command_line(*arguments)
    assert status == 0 and "made 1, already there 0, failed 0" in out, error
    found = read_label(voc / "BoxMasks-detector" / f"{all_ids(voc)[0]}.png", (60, 80), 21)
    assert set(np.unique(found)) <= {0, 15} and found.any()
    assert "no detector weights" in refused(SCRIPT, *arguments, "--detector-weights", tmp_path / "none.pth")


def test_detectors_that_cannot_be_made(monkeypatch, tmp_path):
    voc_classes, name = grabcut_labels.VOC_CLASSES, "fasterrcnn_mobilenet_v3_large_320_fpn"
    (tmp_path / "spoilt.pth").write_bytes(b"spoilt")
    torch.save({"other.weight": torch.zeros(1)}, tmp_path / "other.pth")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, words in [((voc_classes, name, tmp_path / "spoilt.pth"), "spoilt.pth: not a state dict"),
                             ((voc_classes, name, tmp_path / "other.pth"), "other.pth: not a state dict"),
                             ((voc_classes, "resnet18"), "resnet18: no COCO detector"),
                             ((voc_classes, "no_such_thing"), "no_such_thing: no COCO detector"),
                             ((["background", "unicorn"], name), "COCO name"),
                             ((voc_classes, "FasterRCNN"), "FasterRCNN: no COCO detector"),
                             ((voc_classes, name, None, "gpu"), "--device gpu: cannot be used here"),
                             ((voc_classes, name, None, "cuda"), "--device cuda: cannot be used here")]:
        with pytest.raises(BadInput, match=words) as raised:
            grabcut_labels.make_detector(*arguments)
        assert "\n" not in str(raised.value)


# ---------------------------------------------------------------- filling rates
def test_fill_rates_by_hand():
    """Class 1 has 4 pixels in B, 2 of them in M; class 2 has 2, none in M as 2: M's third 1 shows through 2's box."""
    box_labels = np.array([[1, 1, 0], [1, 1, 0], [2, 2, 0]], np.uint8)
    mask_labels = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0]], np.uint8)
    assert fill_rates(box_labels, mask_labels) == {1: 0.5, 2: 0.0}
    assert fill_rates(np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.uint8)) == {}
    mask_labels[0, 1] = 255         # as around the objects of true masks: in neither area
    assert fill_rates(box_labels, mask_labels) == {1: 2 / 3, 2: 0.0}


def naive_rates(box_labels, mask_labels):
    rates = {}
    for c in sorted(set(box_labels.ravel().tolist()) - {0, 255}):
        area = filled = 0
        for b, m in zip(box_labels.ravel().tolist(), mask_labels.ravel().tolist()):
            area += b == c
            filled += b == c and m == c
        rates[c] = filled / area
    return rates


def test_fill_rates_of_a_set(drawn, tmp_path):
    devkit, labels = drawn
    voc = find_voc(devkit)
    status, out, error = command_line("--data", devkit, "--split", "trainval", "--out", labels,
                                      "--fill-rates", tmp_path / "rates")
    assert status == 0 and "made 0, already there 14" in out, error
    table = json.loads((tmp_path / "rates.json").read_text())
    by_class = {name: [] for name in CLASS_NAMES[1:]}
    for image_id in all_ids(voc):
        rates = naive_rates(*(read_label(labels / kind / f"{image_id}.png") for kind in ("BoxMasks", "GrabCutMasks")))
        assert table["images"][image_id] == pytest.approx({CLASS_NAMES[c]: rate for c, rate in rates.items()}, abs=5e-5)
        for c, rate in rates.items():
            by_class[CLASS_NAMES[c]].append(rate)
    assert list(table["images"]) == all_ids(voc) and list(table["classes"]) == CLASS_NAMES[1:]
    for name, rates in by_class.items():
        assert table["classes"][name]["images"] == len(rates)
        assert table["classes"][name]["mean"] == pytest.approx(np.mean(rates), abs=2e-4)
        assert table["classes"][name]["median"] == pytest.approx(np.median(rates), abs=2e-4)
    picture = np.array(Image.open(tmp_path / "rates.png"))
    assert picture.shape[2] == 3 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
    means = class_fill_rates(voc, all_ids(voc), labels)
    assert means.dtype == torch.float32
    assert means.tolist() == pytest.approx([table["classes"][name]["mean"] for name in CLASS_NAMES[1:]])


def test_fill_rates_are_eq_7_of_the_losses():
    from losses import fill_rate
    rng = np.random.default_rng(0)
    box_labels, mask_labels = rng.integers(0, 5, (2, 30, 40), dtype=np.uint8)
    theirs = fill_rate(torch.from_numpy(mask_labels[None]).long(), torch.from_numpy(box_labels[None]).long(), 5)[0]
    ours = fill_rates(box_labels, mask_labels)
    assert [ours[c] for c in (1, 2, 3, 4)] == pytest.approx(theirs.tolist())


def test_a_class_without_a_box_has_no_rate(drawn):
    devkit, labels = drawn
    voc = find_voc(devkit)
    ids = all_ids(voc)[:1]
    present = set(np.unique(read_label(labels / "BoxMasks" / f"{ids[0]}.png"))) - {0}
    means = class_fill_rates(voc, ids, labels)
    assert len(present) < len(means)
    assert all(means[c - 1] == 1 for c in range(1, len(CLASS_NAMES)) if c not in present)


# ---------------------------------------------------------------- one image
def test_one_mask_is_shown(tmp_path):
    picture, truth, (x0, y0, x1, y1) = disc()
    Image.fromarray(picture).save(tmp_path / "disc.png")
    status, out, error = command_line("--image", tmp_path / "disc.png", "--box", x0, y0, x1, y1)
    assert status == 0 and out.startswith(str(tmp_path / "disc_grabcut.png")), error
    assert float(out.split()[-1]) == pytest.approx(truth.sum() / ((x1 - x0) * (y1 - y0)), abs=0.03)
    shown = np.array(Image.open(tmp_path / "disc_grabcut.png"))
    assert shown.shape[2] == 3 and shown.shape[1] > 2 * picture.shape[1]
    elsewhere = ("--out", tmp_path / "new")
    status, out, _ = command_line("--image", tmp_path / "disc.png", "--box", -5, -5, 200, 200, *elsewhere)
    assert status == 0 and f"not at the first attempt: {COVERS_IMAGE}" in out
    assert (tmp_path / "new/disc_grabcut.png").exists()


def test_help_teaches():
    status, out, _ = command_line("--help")
    assert status == 0
    for option in "--iterations --margin --working-size --min-fill --score-threshold --detector --split".split():
        text = out[out.rindex(f"  {option} "):].split("\n  --")[0]
        assert "ours" in text or "paper" in text, option
