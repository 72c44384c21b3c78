"""tests/toy_voc.py: the drawn devkit has VOC's form, exact masks and boxes, and labels that are noisy as promised."""
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import cv2
import numpy as np
import pytest
from PIL import Image

from toy_voc import CLASS_NAMES, make_toy_voc, voc_palette


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy_voc(tmp_path_factory.mktemp("toy") / "VOCdevkit", images=60, val=12)


def names_of(root, split):
    with open(os.path.join(root, "ImageSets", "Segmentation", split + ".txt")) as f:
        return f.read().split()


def png_of(root, folder, name):
    return np.array(Image.open(os.path.join(root, folder, name + ".png")))


def objects_of(root, name):
    """[(class name, (xmin, ymin, xmax, ymax) as written)] of an annotation."""
    tree = ElementTree.parse(os.path.join(root, "Annotations", name + ".xml")).getroot()
    return [(o.findtext("name"), tuple(int(o.findtext("bndbox/" + k)) for k in ("xmin", "ymin", "xmax", "ymax")))
            for o in tree.iter("object")]


def all_bytes(root):
    return {os.path.relpath(os.path.join(folder, f), root): open(os.path.join(folder, f), "rb").read()
            for folder, _, files in os.walk(root) for f in files}


def test_same_seed_same_bytes_and_another_seed_other_pictures(tmp_path):
    a, b, c = [all_bytes(make_toy_voc(tmp_path / folder, 3, 2, (48, 64), seed))
               for folder, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert len(a) == 5 * 4 + 4 and a == b
    jpegs = [k for k in a if k.endswith(".jpg")]
    assert len(jpegs) == 5 and all(a[k] != c[k] for k in jpegs)
    assert len({a[k] for k in jpegs}) == 5              # train and val share no image


def test_a_picture_does_not_change_with_the_number_of_pictures(tmp_path):
    few, many = [all_bytes(make_toy_voc(tmp_path / str(n), n, n, (48, 64))) for n in (2, 4)]
    pictures = [k for k in few if not k.endswith(".txt")]
    assert len(pictures) == 16 and all(few[k] == many[k] for k in pictures)


def test_lists_sizes_and_class_names(toy):
    train, val = names_of(toy, "train"), names_of(toy, "val")
    assert (len(train), len(val)) == (60, 12) and names_of(toy, "trainval") == train + val
    assert len(set(train + val)) == 72
    with open(os.path.join(toy, "class_names.txt")) as f:
        assert f.read().split("\n") == [*CLASS_NAMES, ""] and CLASS_NAMES[0] == "background"
    for name in train + val:
        image = cv2.imread(os.path.join(toy, "JPEGImages", name + ".jpg"))
        assert image.shape == (120, 160, 3) and image.std() > 5
        assert png_of(toy, "SegmentationClass", name).shape == (120, 160)


def test_palette():
    palette = voc_palette()
    # from the VOC devkit's documentation: aeroplane, bicycle, bird, tv monitor, void
    assert palette[[0, 1, 2, 3, 20, 255]].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0],
                                                       [0, 64, 128], [224, 224, 192]]


def test_masks_are_palette_pngs(toy):
    for name in names_of(toy, "trainval")[:5]:
        for folder in ("SegmentationClass", "SegmentationObject"):
            png = Image.open(os.path.join(toy, folder, name + ".png"))
            assert png.mode == "P"
            assert png.getpalette()[:768] == voc_palette().ravel().tolist()[:len(png.getpalette())]


def test_boxes_are_the_tight_boxes_of_the_instance_masks(toy):
    count, seen = 0, set()
    for name in names_of(toy, "trainval"):
        instances, classes = png_of(toy, "SegmentationObject", name), png_of(toy, "SegmentationClass", name)
        objects = objects_of(toy, name)
        assert set(np.unique(instances)) - {0, 255} == set(range(1, len(objects) + 1))      # one mask per XML object
        assert ((instances == 0) == (classes == 0)).all() and ((instances == 255) == (classes == 255)).all()
        for k, (label, box) in enumerate(objects, 1):
            ys, xs = np.nonzero(instances == k)
            assert box == (xs.min() + 1, ys.min() + 1, xs.max() + 1, ys.max() + 1)          # 1-based, inclusive
            assert (classes[ys, xs] == CLASS_NAMES.index(label)).all()
            assert len(ys) >= 40
            count += 1
            seen.add(label)
    assert count > 100 and seen == set(CLASS_NAMES[1:])


def test_void_is_one_pixel_outside_of_objects(toy):
    for name in names_of(toy, "train")[:20]:
        label = png_of(toy, "SegmentationClass", name)
        inside = (label > 0) & (label < 255)
        near = cv2.dilate(inside.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        assert ((label == 255) == (near & ~inside)).all()


def test_occluded_and_truncated_objects_are_marked(toy):
    flags = {"truncated": 0, "occluded": 0, "difficult": 0}
    for name in names_of(toy, "train"):
        tree = ElementTree.parse(os.path.join(toy, "Annotations", name + ".xml")).getroot()
        for o, (_, box) in zip(tree.iter("object"), objects_of(toy, name)):
            for flag in flags:
                flags[flag] += int(o.findtext(flag))
            if o.findtext("truncated") == "1":          # a cut object touches the image's edge
                assert box[0] == 1 or box[1] == 1 or box[2] == 160 or box[3] == 120
    assert all(n >= 3 for n in flags.values()), flags


def mean_iou(confusion):
    true_positive = np.diag(confusion)
    return np.mean(true_positive / (confusion.sum(0) + confusion.sum(1) - true_positive))


def test_boxes_are_much_worse_than_grabcut_and_grabcut_is_not_perfect(toy):
    """Box and GrabCut labels by the paper's rules (Sect. 3.1), written here once more, against the exact masks."""
    classes = len(CLASS_NAMES)
    confusions = {"box": np.zeros((classes, classes)), "grabcut": np.zeros((classes, classes))}
    for name in names_of(toy, "train")[:40]:
        image = cv2.imread(os.path.join(toy, "JPEGImages", name + ".jpg"))
        truth = png_of(toy, "SegmentationClass", name)
        labels = {"box": np.zeros_like(truth), "grabcut": np.zeros_like(truth)}
        area = lambda box: (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
        for label, box in sorted(objects_of(toy, name), key=lambda o: -area(o[1])):         # the smaller painted last
            x0, y0, x1, y1 = box[0] - 1, box[1] - 1, box[2], box[3]
            labels["box"][y0:y1, x0:x1] = CLASS_NAMES.index(label)
            state = np.zeros(truth.shape, np.uint8)
            cv2.setRNGSeed(0)
            cv2.grabCut(image, state, (x0, y0, x1 - x0, y1 - y0), np.zeros((1, 65)), np.zeros((1, 65)), 5,
                        cv2.GC_INIT_WITH_RECT)
            mask = (state == cv2.GC_FGD) | (state == cv2.GC_PR_FGD)
            if mask.sum() < 0.15 * area(box):
                mask[y0:y1, x0:x1] = True
            labels["grabcut"][mask] = CLASS_NAMES.index(label)
        known = truth != 255
        for kind, label in labels.items():
            pairs = classes * truth[known].astype(int) + label[known]
            confusions[kind] += np.bincount(pairs, minlength=classes ** 2).reshape(classes, classes)
    assert 0.45 < mean_iou(confusions["box"]) < 0.62
    assert 0.75 < mean_iou(confusions["grabcut"]) < 0.93


def test_command_line(tmp_path):
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "toy_voc.py")
    command = [sys.executable, script, str(tmp_path / "a" / "VOCdevkit"),
               "--images", "2", "--val", "1", "--size", "40", "56", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same = make_toy_voc(tmp_path / "b", 2, 1, (40, 56), 3)
    assert all_bytes(tmp_path / "a" / "VOCdevkit" / "VOC2012") == all_bytes(same)
    assert png_of(same, "SegmentationClass", "toy_train_00000").shape == (40, 56)
    bad = subprocess.run([sys.executable, script, str(tmp_path), "--size", "4", "4"], capture_output=True, text=True)
    assert bad.returncode == 2 and "--size" in bad.stderr
    lists = tmp_path / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("2007_000033\n")
    for folder, why in ((tmp_path / "VOCdevkit", "is another data set"), (script, "Not a directory")):
        bad = subprocess.run([sys.executable, script, str(folder)], capture_output=True, text=True)
        assert bad.returncode in (1, 2) and why in bad.stderr and "Traceback" not in bad.stderr, bad.stderr
    assert (lists / "val.txt").read_text() == "2007_000033\n"
