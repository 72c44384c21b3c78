"""grabcut_labels.py --coco and --yolo: small exports in the form of five tools, what they leave open, what is wrong."""
import contextlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).parent.parent))
import grabcut_labels
from conftest import run_as_main
from grabcut_labels import (BadInput, class_names, coco_corners, find_voc, fit_boxes, import_boxes, make_labels,
                            read_boxes, read_data_yaml, read_label, read_list, split_of, yolo_boxes)
from mcg_candidates import coco_boxes
from toy_voc import make_toy_voc

SCRIPT = Path(grabcut_labels.__file__)
W, H = 80, 60                                                                       # of most images here


def image(path, size=(W, H), seed=0, **options):
    """A noisy image file -> its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def text(path, content, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))
    return path


def coco(path, files, boxes, categories=((1, "cat"), (2, "dog")), **more):
    """A JSON of files [name or (name, width, height)] and boxes [(number of the file, category, bbox, other keys)]."""
    files = [(name, W, H) if isinstance(name, str) else name for name in files]
    content = {
        "images": [{"id": n, "file_name": name, "width": width, "height": height, "license": 0}
                   for n, (name, width, height) in enumerate(files, 1)],
        "categories": [{"id": key, "name": name, "supercategory": "", **dict(*rest)}
                       for key, name, *rest in categories],
        "annotations": [{"id": n, "image_id": number, "category_id": category, "bbox": box, "area": 1, "iscrowd": 0,
                         "segmentation": [], **dict(*rest)}
                        for n, (number, category, box, *rest) in enumerate(boxes, 1)],
        "info": {}, "licenses": [], **more}
    return text(path, json.dumps(content))


def labelled(data, image_id, size=(H, W)):
    """[(class, x0, y0, x1, y1), ...] of an annotation, as everything else reads it: 0-based, half-open."""
    voc = find_voc(data)
    boxes, classes = read_boxes(voc / "Annotations" / f"{image_id}.xml", class_names(voc), size)
    return [(class_names(voc)[c], *map(int, box)) for c, box in zip(classes, boxes)]


def ids(data, split):
    path = find_voc(data) / "ImageSets" / "Segmentation" / f"{split}.txt"
    return read_list(path) if path.exists() else None


def said(capsys):
    """What was printed: {line without its number: number}; a line that begins with none has None."""
    found = {}
    for line in capsys.readouterr().out.splitlines():
        number, _, rest = line.partition(" ")
        found[rest if number.isdigit() else line] = int(number) if number.isdigit() else None
    return found


def command_line(*arguments):
    """python grabcut_labels.py ... -> (exit status, stdout, stderr)"""
    return run_as_main(SCRIPT, *arguments)


# ---------------------------------------------------------------- exports of tools
def test_cvat_coco(tmp_path, capsys):
    """COCO 1.0: rectangles with rotation about their centre, polygons, painted masks as runs with iscrowd 1."""
    export = tmp_path / "export"
    for name in "abc":
        image(export / "images" / "default" / f"{name}.jpg")
    attributes = {"attributes": {"occluded": False, "rotation": 0.0}}
    turned = {"attributes": {"occluded": True, "rotation": 90.0}}, {"attributes": {"rotation": 330.0}}
    mask = {"iscrowd": 1, "segmentation": {"counts": [5, 4, 4791], "size": [H, W]}, **attributes}
    outline = {"segmentation": [[5.0, 5.0, 15.5, 5.0, 15.5, 25.4]], "attributes": {"rotation": 45.0}}
    coco(export / "annotations" / "instances_default.json", ["a.jpg", "b.jpg", "c.jpg"], [
        (1, 1, [10.4, 20.5, 30.1, 20.0], attributes),        # to 40.5, 40.5, which are rounded up, as 20.5 is
        (1, 2, [10, 20, 40, 20], turned[0]),                 # about 30, 30: 20 wide, 40 high
        (1, 2, [10, 20, 40, 20], turned[1]),                 # 40 cos 30 + 20 sin 30 = 44.64 wide, 37.32 high
        (2, 2, [5.0, 5.0, 10.5, 20.4], outline),             # the box of an outline is upright whatever it says
        (2, 1, [7, 7, 0, 9], attributes), (2, 1, [W, 5, 9, 9], attributes), (2, 1, [-9, 5, 9, 9], attributes),
        (2, 1, [70, 50, 30, 4], attributes),                 # 20 pixels of it are beyond the edge
        (2, 1, [W - 0.3, 10, 0.2, 0.3], attributes),         # a sliver: one pixel
        (2, 1, [10, 10, 4, 4], mask)])
    data = tmp_path / "mydata"
    assert import_boxes(data, export / "images", [export / "annotations" / "instances_default.json"]) == []
    assert labelled(data, "default_a") == [("cat", 10, 21, 41, 41), ("dog", 20, 10, 40, 50), ("dog", 8, 11, 52, 49)]
    assert labelled(data, "default_b") == [("dog", 5, 5, 16, 25), ("cat", 70, 50, 80, 54), ("cat", 79, 10, 80, 11)]
    assert ids(data, "train") == ["default_a", "default_b"] and ids(data, "val") is None
    assert class_names(find_voc(data)) == ["background", "cat", "dog"]
    assert said(capsys) == {
        "rotated boxes: the upright box around each is taken": 2,
        "crowds left out (iscrowd 1, as CVAT marks all painted masks; --crowds takes them)": 1,
        "ids with underscores for folders and spaces (default/a.jpg -> default_a)": 3,
        "boxes of no area left out": 1, "boxes outside of their image left out": 2,
        "boxes cut off at the edge of their image": 1, "images without a box left out": 1,
        "train.txt: 2 images, 6 boxes": None, "classes, boxes of each: cat 3, dog 3": 2}
    whole = export / "annotations" / "instances_default.json"
    whole.write_text(whole.read_text().replace('"iscrowd": 0', '"iscrowd": "0"'))           # some tools write text
    import_boxes(tmp_path / "text", export / "images" / "default", [export])
    assert labelled(tmp_path / "text", "a") == labelled(data, "default_a") and said(capsys)[
        "crowds left out (iscrowd 1, as CVAT marks all painted masks; --crowds takes them)"] == 1
    import_boxes(tmp_path / "crowds", export / "images" / "default", [export], crowds=True)   # and by the folder
    assert labelled(tmp_path / "crowds", "b")[-1] == ("cat", 10, 10, 14, 14)
    assert "crowds" not in " ".join(said(capsys))


def test_cvat_coco_of_two_subsets(tmp_path):
    """instances_Train.json, instances_Validation.json; one file name in both, which the subset's folder tells apart."""
    for split in ("Train", "Validation"):
        image(tmp_path / "images" / split / "frame_000000.png")
        coco(tmp_path / "annotations" / f"instances_{split}.json", ["frame_000000.png"],
             [(1, 1 + (split == "Train"), [3, 4, 10, 20])])
    assert import_boxes(tmp_path / "d", tmp_path, [tmp_path]) == []
    assert (ids(tmp_path / "d", "train"), ids(tmp_path / "d", "val")) == (["Train_frame_000000"],
                                                                          ["Validation_frame_000000"])
    assert labelled(tmp_path / "d", "Train_frame_000000") == [("dog", 3, 4, 13, 24)]
    assert labelled(tmp_path / "d", "Validation_frame_000000") == [("cat", 3, 4, 13, 24)]
    linked = tmp_path / "d" / "VOC2012" / "JPEGImages" / "Train_frame_000000.png"
    assert linked.samefile(tmp_path / "images" / "Train" / "frame_000000.png")


def test_cvat_yolo(tmp_path, capsys):
    """YOLO 1.1: obj.names, labels beside the images in obj_<subset>_data, empty files for frames without objects."""
    for subset, name, rows in (("train", "a", "1 0.5 0.5 0.25 0.5\n0 0.1 0.1 0.2 0.2\n"), ("train", "b", ""),
                               ("valid", "c", "0 0.25 0.5 0.5 1.0\n"), ("train", "deep/d", "1 0.5 0.5 1 1")):
        image(tmp_path / f"obj_{subset}_data" / f"{name}.jpg")
        text(tmp_path / f"obj_{subset}_data" / f"{name}.txt", rows)
    text(tmp_path / "obj.names", "cat\ndog\n")
    text(tmp_path / "obj.data", "classes = 2\nnames = data/obj.names\ntrain = data/train.txt\n")
    text(tmp_path / "train.txt", "data/obj_train_data/a.jpg\n")
    text(tmp_path / "valid.txt", "data/obj_valid_data/c.jpg\n")
    assert import_boxes(tmp_path / "d", tmp_path, yolo=tmp_path) == []
    assert labelled(tmp_path / "d", "obj_train_data_a") == [("dog", 30, 15, 50, 45), ("cat", 0, 0, 16, 12)]
    assert labelled(tmp_path / "d", "obj_valid_data_c") == [("cat", 0, 0, 40, 60)]
    assert ids(tmp_path / "d", "train") == ["obj_train_data_a", "obj_train_data_deep_d"]
    assert ids(tmp_path / "d", "val") == ["obj_valid_data_c"]
    out = said(capsys)
    assert out.pop(f"class names read from {tmp_path / 'obj.names'}") == 2
    assert out.pop("ids with underscores for folders and spaces (obj_train_data/a.jpg -> obj_train_data_a)") == 4
    assert out == {"images without a box left out": 1, "train.txt: 2 images, 3 boxes": None,
                   "val.txt: 1 images, 1 boxes": None, "classes, boxes of each: cat 2, dog 2": 2}


@pytest.mark.parametrize("folder", ["", "data"])
def test_lists_of_obj_data(tmp_path, capsys, folder):
    """All images in one folder: only the lists tell train from val. CVAT writes data/ before all paths, though its ZIP
    has no such folder; darknet's own data/ is where obj.data lies."""
    for name in "abc":
        image(tmp_path / folder / "obj" / f"{name}.jpg")
        text(tmp_path / folder / "obj" / f"{name}.txt", "0 0.5 0.5 0.5 0.5\n")
    text(tmp_path / folder / "obj.names", "cat\n")
    text(tmp_path / folder / "obj.data", "classes = 1\ntrain  = data/train.txt\nvalid=data/test.txt\nbackup = backup/\n"
                                         "test = data/none.txt\n")
    text(tmp_path / folder / "train.txt", "data/obj/a.jpg\ndata/obj/c.jpg\n")
    text(tmp_path / folder / "test.txt", "data\\obj\\b.jpg\r\n")
    assert import_boxes(tmp_path / "d", tmp_path / folder, yolo=tmp_path / folder) == []
    assert ids(tmp_path / "d", "train") == ["obj_a", "obj_c"] and ids(tmp_path / "d", "val") == ["obj_b"]
    assert said(capsys)[f"entry of {tmp_path / folder / 'obj.data'} left out, which names no folder or list "
                        "(test: data/none.txt)"] == 1


def test_names_as_an_url_or_a_mac_spells_them(tmp_path):
    """%20 for a space, and u with two dots as two characters, in the export or on the disk; also in class names."""
    for name in ("a b", "u\u0308", "\u00e4", "50%", "c%20d"):
        image(tmp_path / "images" / f"{name}.jpg")
        image(tmp_path / "yolo" / f"{name}.jpg")
    named = ["images/a%20b.jpg", "images/\u00fc.jpg", "images/a\u0308.jpg", "images/50%25.jpg", "images/c%20d.jpg"]
    categories = ((0, "Gr\u00fcn"), (1, "BACKGROUND"))
    coco(tmp_path / "one.json", named[:2], [(1, 0, [1, 2, 3, 4]), (2, 0, [5, 6, 7, 8])], categories)
    coco(tmp_path / "two.json", named[2:], [(n, 0, [1, 2, 3, 4]) for n in (1, 2, 3)] + [(1, 1, [0, 0, W, H])],
         ((0, "Gru\u0308n"), (1, "Background")))
    assert import_boxes(tmp_path / "d", tmp_path / "images", [tmp_path / "one.json", tmp_path / "two.json"]) == []
    assert class_names(find_voc(tmp_path / "d")) == ["background", "Gr\u00fcn"]
    assert ids(tmp_path / "d", "train") == ["a_b", "u\u0308", "\u00e4", "50%", "c%20d"]
    assert labelled(tmp_path / "d", "\u00e4") == [("Gr\u00fcn", 1, 2, 4, 6)]

    for name in named:
        text(tmp_path / "yolo" / f"{Path(name).stem}.txt", "0 0.5 0.5 0.5 0.5\n")
    text(tmp_path / "yolo" / "classes.txt", "cat\nBackground\n")
    assert import_boxes(tmp_path / "y", tmp_path / "yolo", yolo=tmp_path / "yolo") == []
    assert sorted(ids(tmp_path / "y", "train")) == sorted(ids(tmp_path / "d", "train"))
    assert class_names(find_voc(tmp_path / "y")) == ["background", "cat"]


def test_an_image_with_two_endings_keeps_to_its_split(tmp_path):
    """Lists leave an ending away, so that the id a.jpg would be read as a, another image."""
    for name in ("a.jpg", "a.jpg.jpg", "b.PNG.jpg", "v1.2.jpg"):
        image(tmp_path / "images" / name)
        text(tmp_path / "labels" / f"{name[:-4]}.txt", "0 0.5 0.5 0.5 0.5\n")
    text(tmp_path / "train.txt", "images/a.jpg.jpg\nimages/b.PNG.jpg\nimages/v1.2.jpg\n")
    text(tmp_path / "val.txt", "images/a.jpg\n")
    text(tmp_path / "data.yaml", "names: [cat]\ntrain: train.txt\nval: val.txt\n")
    assert import_boxes(tmp_path / "d", tmp_path / "images", yolo=tmp_path / "labels") == []
    assert ids(tmp_path / "d", "train") == ["a_jpg", "b_PNG", "v1.2"] and ids(tmp_path / "d", "val") == ["a"]
    assert sorted(path.name for path in (tmp_path / "d" / "VOC2012" / "JPEGImages").iterdir()) == [
        "a.jpg", "a_jpg.jpg", "b_PNG.jpg", "v1.2.jpg"]


def test_coco_outlines_without_a_box(tmp_path, capsys):
    """Left out, the object would be background for certain, beside the boxes of others."""
    image(tmp_path / "a.jpg"), image(tmp_path / "b.jpg")
    outline = dict(segmentation=[[10, 10, 30, 12, 20, 40], [35, 20, 36, 21, 34, 25]])
    coco(tmp_path / "a.json", ["a.jpg", "b.jpg"],
         [(1, 1, [], outline), (1, 2, [50, 5, 10, 10]), (2, 1, [0, 0, 0, 0], outline), (2, 1, []),
          (2, 2, [], dict(segmentation={"counts": "Q", "size": [H, W]}))])
    assert import_boxes(tmp_path / "d", tmp_path, [tmp_path / "a.json"]) == []
    assert labelled(tmp_path / "d", "a") == [("cat", 10, 10, 36, 40), ("dog", 50, 5, 60, 15)]
    assert labelled(tmp_path / "d", "b") == [("cat", 10, 10, 36, 40)]
    assert said(capsys)["annotations without a box left out"] == 2
    coco(tmp_path / "a.json", ["a.jpg", "b.jpg"], [(1, 1, [], dict(segmentation=[[1, 2, 3]])), (2, 1, [1, 2, 3, 4])])
    assert import_boxes(tmp_path / "e", tmp_path, [tmp_path / "a.json"]) == [
        "a.jpg: a.json has the box []: expected x, y, width, height: fix it"]


@pytest.mark.parametrize("folder", [".", "images"])
def test_label_studio_coco(tmp_path, folder):
    """result.json, whose names are images/..., images\\/... or, from Windows, images\\...; names in any script."""
    for name in ("3f2a-a b.jpg", "77-ü.jpg", "9.jpg"):
        image(tmp_path / "images" / name)
    coco(tmp_path / "result.json", ["images/3f2a-a b.jpg", "images\\/77-ü.jpg", "images\\9.jpg"],
         [(1, 0, [1, 2, 3, 4]), (2, 0, [5, 6, 7, 8]), (3, 1, [9, 10, 11, 12])], ((0, "Möwe & Co"), (1, "<猫>")))
    assert import_boxes(tmp_path / "d", tmp_path / folder, [tmp_path / "result.json"]) == []
    assert ids(tmp_path / "d", "train") == ["3f2a-a_b", "77-ü", "9"]
    assert class_names(find_voc(tmp_path / "d")) == ["background", "Möwe & Co", "<猫>"]
    assert labelled(tmp_path / "d", "77-ü") == [("Möwe & Co", 5, 6, 12, 14)]
    assert labelled(tmp_path / "d", "9") == [("<猫>", 9, 10, 20, 22)]


def test_label_studio_yolo(tmp_path, capsys):
    """classes.txt and notes.json beside images/ and labels/; from Windows with byte order marks and CRLF."""
    for name in ("a", "b", "unlabelled"):
        image(tmp_path / "images" / f"{name}.jpg")
    text(tmp_path / "images" / "._a.jpg", "what a Mac leaves behind")
    text(tmp_path / "classes.txt", "cat\r\nwild dog\r\n", "utf-8-sig")
    text(tmp_path / "notes.json", '{"categories": []}')
    text(tmp_path / "labels" / "a.txt", "1 0.25 0.5 0.25 0.5\r\n\r\n0 0.75 0.5 0.25 0.5\r\n", "utf-8-sig")
    text(tmp_path / "labels" / "b.txt", "0 0.1 0.2 0.35 0.2 0.35 0.65 0.2 0.8 0.1 0.6\r\n")  # an outline of five points
    text(tmp_path / "labels" / "gone.txt", "0 0.5 0.5 0.5 0.5\n")
    text(tmp_path / "labels" / "classes.txt", "cat\nwild dog\n")                             # labelImg's place for it
    assert import_boxes(tmp_path / "d", tmp_path / "images", yolo=tmp_path / "labels") == []
    assert labelled(tmp_path / "d", "a") == [("wild dog", 10, 15, 30, 45), ("cat", 50, 15, 70, 45)]
    assert labelled(tmp_path / "d", "b") == [("cat", 8, 12, 28, 48)]
    assert said(capsys) == {
        f"class names read from {tmp_path / 'labels' / 'classes.txt'}": 2, "images without a label file left out": 1,
        "label files left out that have no image (gone.txt)": 1, "train.txt: 2 images, 3 boxes": None,
        "classes, boxes of each: cat 2, wild dog 1": 2}


def test_yolo_files_that_name_other_classes(tmp_path):
    """labelImg writes a classes.txt beside the labels, whose numbers need not be those of data.yaml. Where they are,
    data.yaml counts, which knows more: lists and keypoints."""
    image(tmp_path / "images" / "a.jpg")
    text(tmp_path / "labels" / "a.txt", "0 0.5 0.5 0.5 0.5 0.1 0.1 0.9 0.9\n")  # a box and two keypoints
    text(tmp_path / "labels" / "classes.txt", "dog\ncat\n")
    text(tmp_path / "data.yaml", "names: [cat, dog]\nkpt_shape: [2, 2]\n")
    with pytest.raises(BadInput, match="data.yaml and .*classes.txt name different classes.*--class-names"):
        import_boxes(tmp_path / "d", tmp_path / "images", yolo=tmp_path / "labels")
    for right in ("cat\ndog\n", "dog\ncat\n"):                                # ... is one of the two
        text(tmp_path / "right", right)
        data = tmp_path / right[:3]
        assert import_boxes(data, tmp_path / "images", yolo=tmp_path / "labels", names_file=tmp_path / "right") == []
        assert labelled(data, "a")[0][0] == right[:3]
    text(tmp_path / "labels" / "classes.txt", "cat\ndog\n")
    assert import_boxes(tmp_path / "d", tmp_path / "images", yolo=tmp_path / "labels") == []
    assert labelled(tmp_path / "d", "a") == [("cat", 20, 15, 60, 45)]
    for wrong in ("dog\n", "dog\ncat\n"):                                        # asked for, as of COCO's; mixed up
        text(tmp_path / "wrong", wrong)
        with pytest.raises(BadInput, match="--class-names .*wrong: .*data.yaml has other classes .cat, dog."):
            import_boxes(tmp_path / "e", tmp_path / "images", yolo=tmp_path / "labels", names_file=tmp_path / "wrong")
    names = text(tmp_path / "names", "Katze\nHund\n")                            # new names for all are fine
    import_boxes(tmp_path / "e", tmp_path / "images", yolo=tmp_path / "labels", names_file=names)
    assert labelled(tmp_path / "e", "a")[0][0] == "Katze"
    text(tmp_path / "data.yaml", "names: {a: b}\n")
    text(tmp_path / "names", "cat\ndog\ncow\n")                                   # one more; and data.yaml is broken
    import_boxes(tmp_path / "f", tmp_path / "images", yolo=tmp_path / "labels", names_file=names)
    assert labelled(tmp_path / "f", "a")[0][0] == "cat"


@pytest.mark.parametrize("labels, images", [(".", "images"), ("labels", "."), ("Labels", "Images")])
def test_yolo_folders_that_do_not_belong_together(tmp_path, labels, images):
    image(tmp_path / images / ("a.jpg" if images != "." else "images/a.jpg"))
    text(tmp_path / labels / ("a.txt" if labels != "." else "labels/a.txt"), "0 0.5 0.5 0.5 0.5\n")
    names = text(tmp_path / "data.yaml", "names: [cat]\n")
    if labels == "Labels":                              # these do, named one by one, but not from the folder above
        assert import_boxes(tmp_path / "d", tmp_path / images, yolo=tmp_path / labels) == []
        labels = images = "."
    with pytest.raises(BadInput, match=r"no image has a label file .*a.jpg would have .*a.txt.*abels/a.txt has no|"
                                       r"no image has a label file .*a.jpg would have .*a.txt., and a.txt has no"):
        import_boxes(tmp_path / "e", tmp_path / images, yolo=tmp_path / labels, names_file=names)


def test_images_that_exif_turns_are_named(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    image(tmp_path / "a.jpg", exif=exif)
    image(tmp_path / "b.jpg")
    for name in "ab":
        text(tmp_path / f"{name}.txt", "0 0.5 0.5 0.5 0.5\n")
    text(tmp_path / "data.yaml", "names: [cat]\n")
    import_boxes(tmp_path / "d", tmp_path, yolo=tmp_path)
    assert "1 images turned by EXIF, perhaps not as their boxes were drawn: look at some (a.jpg)\n" in (
        capsys.readouterr().out)


def test_an_export_of_validation_images_alone(tmp_path):
    for split in ("val", "test"):
        image(tmp_path / "images" / split / f"{split}.jpg")
        text(tmp_path / "labels" / split / f"{split}.txt", "0 0.5 0.5 0.5 0.5\n")
    text(tmp_path / "data.yaml", "names: [cat]\n")
    with pytest.raises(BadInput, match="no image to train on, all are in test.txt and val.txt$"):
        import_boxes(tmp_path / "d", tmp_path, yolo=tmp_path)


def test_validation_images_are_not_trained_on_by_a_second_run(tmp_path):
    """Where they came alone, they became train.txt; with the others beside them this has to be another data set."""
    for split in ("train", "val"):
        coco(tmp_path / "e" / f"instances_{split}2017.json", [f"{split}.jpg"], [(1, 1, [1, 1, 9, 9])])
    image(tmp_path / "i" / "val2017" / "val.jpg")
    flags = tmp_path / "d", tmp_path / "i", [tmp_path / "e"]
    assert len(import_boxes(*flags)) == 1 and ids(tmp_path / "d", "train") == ["val2017_val"]
    assert len(import_boxes(*flags)) == 1
    image(tmp_path / "i" / "train2017" / "train.jpg")
    record = tmp_path / "d" / "VOC2012" / "import.json"
    alone = json.loads(record.read_text())
    for before, called in ((alone, "val"), ({key: alone[key] for key in ("boxes", "images")}, "val or test")):
        record.write_text(json.dumps(before))                                       # as it is, and of an older version
        with pytest.raises(BadInput, match=f"of one list alone, which the export calls {called}, and now there are "):
            import_boxes(*flags)
    assert import_boxes(tmp_path / "other", *flags[1:]) == [] and ids(tmp_path / "other", "val") == ["val2017_val"]


@pytest.mark.skipif(sys.platform == "win32", reason="has no such names")
def test_names_that_are_not_utf_8(tmp_path):
    image(tmp_path / "i" / "a.jpg")
    shutil.copy(tmp_path / "i" / "a.jpg", os.fsencode(tmp_path / "i") + b"/B\xe4r.jpg")
    names = ["a.jpg", "B\udce4r.jpg", "\ud800.jpg"]
    export = coco(tmp_path / "x.json", names, [(n, 1, [1, 1, 9, 9]) for n in (1, 2, 3)])
    assert len(import_boxes(tmp_path / "d", tmp_path / "i", [export])) == 2 and ids(tmp_path / "d", "train") == ["a"]
    text(tmp_path / "i" / "a.txt", "0 0.5 0.5 0.5 0.5\n")
    text(tmp_path / "i" / "data.yaml", "names: [cat]\n")
    code, _, _ = command_line("--yolo", tmp_path / "i", "--images", tmp_path / "i", "--data", tmp_path / "y")
    assert code == 0 and ids(tmp_path / "y", "train") == ["a"]


def test_lists_with_paths_of_another_machine_are_told(tmp_path, capsys):
    for name in "ab":
        image(tmp_path / f"{name}.jpg")
        text(tmp_path / f"{name}.txt", "0 0.5 0.5 0.5 0.5\n")
    text(tmp_path / "data.yaml", "names: [cat]\ntrain: train.txt\nval: val.txt\ntest: ''\n")
    text(tmp_path / "train.txt", "./a.jpg\n")
    text(tmp_path / "val.txt", "/content/ds/images/b.jpg\n/content/ds/images/c.jpg\n")
    import_boxes(tmp_path / "d", tmp_path, yolo=tmp_path)
    assert ids(tmp_path / "d", "train") == ["a", "b"]
    assert [f"{number} {line}" for line, number in said(capsys).items() if "lists them" in line] == [
        f"2 images are not where {tmp_path / 'val.txt'} lists them (/content/ds/images/b.jpg): they go by the names of "
        "their folders"]


def test_class_names_leave_splits_and_keypoints_of_data_yaml(tmp_path):
    for split in ("f1", "f2"):
        image(tmp_path / "images" / split / f"{split}.jpg")
        text(tmp_path / "labels" / split / f"{split}.txt", "0 .5 .5 .5 .5 .9 .9 .1 .1\n")
    text(tmp_path / "data.yaml", "names: [cat]\ntrain: images/f1\nval: images/f2\nkpt_shape: [2, 2]\n")
    names = text(tmp_path / "n.txt", "lion\n")
    for more in ({}, {"names_file": names}):
        data = tmp_path / f"d{len(more)}"
        import_boxes(data, tmp_path / "images", yolo=tmp_path / "labels", **more)
        assert (ids(data, "train"), ids(data, "val")) == (["f1_f1"], ["f2_f2"])
        assert labelled(data, "f1_f1") == [("lion" if more else "cat", 20, 15, 60, 45)]


def test_label_studio_numbers_classes_by_notes_json(tmp_path):
    image(tmp_path / "images" / "a.jpg")
    text(tmp_path / "labels" / "a.txt", "1 0.5 0.5 0.5 0.5\n")
    text(tmp_path / "classes.txt", "dog\ncat\n")
    def numbered(*numbers):
        kinds = [{"id": number, "name": name} for number, name in zip(numbers, ("dog", "cat"))]
        text(tmp_path / "notes.json", json.dumps({"categories": kinds}))

    for n, (numbers, name) in enumerate(((("1", "0"), "dog"), ((1, 0), "dog"), ((0, 1), "cat"))):
        numbered(*numbers)
        import_boxes(tmp_path / f"d{n}", tmp_path / "images", yolo=tmp_path / "labels")
        assert labelled(tmp_path / f"d{n}", "a")[0][0] == name
    numbered("1", "2")
    with pytest.raises(BadInput, match=r"notes.json: numbers the classes \[1, 2\]: name them by --class-names"):
        import_boxes(tmp_path / "d", tmp_path / "images", yolo=tmp_path / "labels")
    names = text(tmp_path / "n.txt", "nothing\ndog\ncat\n")
    import_boxes(tmp_path / "d", tmp_path / "images", yolo=tmp_path / "labels", names_file=names)
    assert labelled(tmp_path / "d", "a")[0][0] == "dog"


@pytest.mark.skipif(sys.platform == "win32", reason="has no such names")
def test_names_that_no_list_can_have(tmp_path):
    """They are left out and named; what was imported beside them can be read."""
    bad = ["1:30.jpg", "a" * 240 + ".jpg", "\u732b" * 78 + ".jpg", "b" * 130 + "/" + "c" * 130 + ".jpg"]
    for name in ("a.jpg", *bad):
        image(tmp_path / "i" / name)
    export = coco(tmp_path / "x.json", ["a.jpg", *bad], [(n, 1, [1, 1, 9, 9]) for n in range(1, 6)])
    failures = import_boxes(tmp_path / "d", tmp_path / "i", [export])
    assert sorted(bad) == sorted(failure.split(": '")[0] for failure in failures)
    assert all(failure.endswith("rename them") for failure in failures) and ids(tmp_path / "d", "train") == ["a"]


def test_yolo_rows_of_tracked_boxes_are_no_outlines(tmp_path):
    """Ultralytics' tracker writes class, box, confidence, number; an outline of three points has as many."""
    for row, wrong in (("0 0.5 0.5 0.5 0.5 0.9 1", "track"), ("0 0.5 0.5 0.5 0.5 0.9 27", "track"),
                       ("0 0.5 0.5 0.5 0.5 0.9 27.5", "not within 0 to 1")):
        text(tmp_path / "a.txt", row)
        with pytest.raises(BadInput, match=f"line 1: .*{wrong}"):
            yolo_boxes(tmp_path / "a.txt", ["cat"])
    text(tmp_path / "a.txt", "0 0.5 0.5 0.6 0.5 0.9 0.7")
    assert yolo_boxes(tmp_path / "a.txt", ["cat"]) == [("cat", 0.5, 0.5, 0.9, 0.7)]


def test_roboflow_coco(tmp_path, capsys):
    """train/, valid/, test/ with _annotations.coco.json; category 0 is the project, parent of the classes. Of several
    images of one name, the one beside the JSON is meant."""
    for split, category in (("train", 1), ("valid", 2), ("test", 2)):
        image(tmp_path / split / "a_jpg.rf.0123abcd.jpg")
        coco(tmp_path / split / "_annotations.coco.json", ["a_jpg.rf.0123abcd.jpg"], [(1, category, [1, 2, 30, 40])],
             ((0, "pets", {"supercategory": "none"}), (1, "cat", {"supercategory": "pets"}),
              (2, "dog", {"supercategory": "pets"})))
    text(tmp_path / "README.roboflow.txt", "exported")
    assert import_boxes(tmp_path / "d", tmp_path, [tmp_path]) == []
    for split, folder, name in (("train", "train", "cat"), ("val", "valid", "dog"), ("test", "test", "dog")):
        assert ids(tmp_path / "d", split) == [f"{folder}_a_jpg.rf.0123abcd"]
        assert labelled(tmp_path / "d", f"{folder}_a_jpg.rf.0123abcd") == [(name, 1, 2, 31, 42)]
    assert class_names(find_voc(tmp_path / "d")) == ["background", "cat", "dog"]
    # A parent that has boxes is a class, and so is a class that happens to have the project's name.
    coco(tmp_path / "x.json", ["train/a_jpg.rf.0123abcd.jpg"], [(1, 0, [1, 2, 30, 40])],
         ((0, "pets", {"supercategory": "none"}), (1, "cat", {"supercategory": "pets"})))
    coco(tmp_path / "y.json", ["train/a_jpg.rf.0123abcd.jpg"], [(1, 1, [1, 2, 30, 40])],
         ((0, "cat", {"supercategory": "none"}), (1, "cat", {"supercategory": "cat"})))
    import_boxes(tmp_path / "x", tmp_path, [tmp_path / "x.json"])
    import_boxes(tmp_path / "y", tmp_path, [tmp_path / "y.json"])
    assert class_names(find_voc(tmp_path / "x")) == ["background", "pets", "cat"]
    assert class_names(find_voc(tmp_path / "y")) == ["background", "cat"]


def test_roboflow_yolo(tmp_path):
    """data.yaml says ../train/images though it lies beside train; nc, a list in brackets, keys of Roboflow's own."""
    for split, row in (("train", "0 0.5 0.5 0.5 0.5"), ("valid", "1 0.5 0.5 0.5 0.5"), ("test", "1 0.5 0.5 1 1")):
        image(tmp_path / split / "images" / f"{split}_png.rf.77.jpg")
        text(tmp_path / split / "labels" / f"{split}_png.rf.77.txt", row)
    yaml = text(tmp_path / "data.yaml", "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\n"
                "names: ['cat', 'it''s a dog']\n\nroboflow:\n  workspace: w\n  license: CC BY 4.0\n")
    with pytest.raises(BadInput, match="data.yaml, names: neither"):              # a quote in quotes is not read here
        import_boxes(tmp_path / "d", tmp_path, yolo=tmp_path)
    text(yaml, yaml.read_text().replace("it''s a dog", "dog"))
    assert import_boxes(tmp_path / "d", tmp_path, yolo=tmp_path) == []
    assert ids(tmp_path / "d", "train") == ["train_train_png.rf.77"]
    assert ids(tmp_path / "d", "val") == ["valid_valid_png.rf.77"]
    assert ids(tmp_path / "d", "test") == ["test_test_png.rf.77"]
    assert labelled(tmp_path / "d", "valid_valid_png.rf.77") == [("dog", 20, 15, 60, 45)]


def test_labelme_coco(tmp_path):
    """labelme2coco.py: annotations.json beside JPEGImages/, _background_ as category 0, ids from 0."""
    image(tmp_path / "JPEGImages" / "2011_000003.jpg")
    coco(tmp_path / "annotations.json", ["JPEGImages/2011_000003.jpg"],
         [(1, 1, [3.5, 4.4, 10, 10], {"segmentation": [[3.5, 4.4, 13.5, 4.4, 13.5, 14.4]]}), (1, 0, [1, 1, 50, 50])],
         ((0, "_background_", {"supercategory": None}), (1, "cat", {"supercategory": None})), type="instances")
    assert import_boxes(tmp_path / "d", tmp_path, [tmp_path]) == []
    assert labelled(tmp_path / "d", "JPEGImages_2011_000003") == [("cat", 4, 4, 14, 14)]
    assert class_names(find_voc(tmp_path / "d")) == ["background", "cat"]


def test_ultralytics_yolo(tmp_path):
    """data.yaml with path, names as a map and splits that only it knows; outlines, rotated boxes, confidences."""
    rows = {"fold1/a": "0 0.1 0.2 0.3 0.2 0.3 0.6\n1 0.1 0.1 0.5 0.1 0.5 0.3 0.1 0.3 0.93\n",
            "fold2/b": "1 .5 .5 .5 .5 .9"}
    for name, row in rows.items():
        image(tmp_path / "set" / "images" / f"{name}.jpg")
        text(tmp_path / "set" / "labels" / f"{name}.txt", row)
    yaml = text(tmp_path / "my.yaml", "# comment\npath: set  # the root\ntrain:\n  - images/fold1\nval: images/fold2\n"
                "test:  # none\n\nnames:\n  1: dog # not 0\n  0: 'cat'\n")
    assert import_boxes(tmp_path / "d", tmp_path / "set" / "images", yolo=tmp_path / "set" / "labels",
                        names_file=yaml) == []
    assert labelled(tmp_path / "d", "fold1_a") == [("cat", 8, 12, 24, 36), ("dog", 8, 6, 40, 18)]
    assert labelled(tmp_path / "d", "fold2_b") == [("dog", 20, 15, 60, 45)]
    assert (ids(tmp_path / "d", "train"), ids(tmp_path / "d", "val")) == (["fold1_a"], ["fold2_b"])


def test_splits_of_data_yaml_as_lists_and_with_windows_paths(tmp_path, capsys):
    """Ultralytics' autosplit writes lists of images; on Windows paths have backslashes; what is nowhere is said."""
    for name in ("images/one/a", "images/one/b", "images/two/c"):
        image(tmp_path / f"{name}.jpg")
        text(tmp_path / f"{name.replace('images', 'labels')}.txt", "0 .5 .5 .5 .5")
    text(tmp_path / "autosplit_val.txt", "./images/one/b.jpg\n")
    for number, (val, wanted) in enumerate([("autosplit_val.txt", ["one_b"]), ("images\\two", ["two_c"])]):
        text(tmp_path / "data.yaml", f"names: [cat]\ntrain: images\\one\nval: {val}\ntest: images\\three\n")
        data = tmp_path / f"d{number}"
        assert import_boxes(data, tmp_path / "images", yolo=tmp_path / "labels") == []
        assert ids(data, "val") == wanted and not set(ids(data, "train")) & set(wanted)
        assert "which names no folder or list (test: images/three)" in capsys.readouterr().out


# ---------------------------------------------------------------- parts
@pytest.mark.parametrize("names", [
    "names: [cat, 'wild dog', \"a, b\"]", "names: {0: cat, 1: wild dog, 2: 'a, b'}  # three",
    "names:\n- cat\n- wild dog   # not tame\n- a, b\n", 'names:\n  0: cat\n  1: "wild dog"\n  2: a, b',
    "names: ['cat',\n        'wild dog',\n        'a, b',]\n",
    "names:\n  2: a, b\n  # the first:\n  0: cat\n\n  1: wild dog\n"])
def test_class_names_of_data_yaml(tmp_path, names):
    more = "\r\ndownload: |\r\n  import os\r\n  names: no\r\n"
    yaml = text(tmp_path / "data.yaml", f"nc: 3\r\n{names}{more}", "utf-8-sig")
    assert read_data_yaml(yaml, Counter()) == (["cat", "wild dog", "a, b"], {}, False)


@pytest.mark.parametrize("yaml, wrong", [
    ("names: &n [cat, dog]", "names: neither"), ("names: [cat, [dog]]", "names: neither"),
    ("names: [cat, dog", "names: neither"), ("names: ['cat, dog']\nnc: 2", "nc is 2, but there are 1"),
    ("names:\n  0: cat\n  2: dog", "names: neither"), ("names:\n  cat: 0\n  dog: 1", "names: neither"),
    ("names: [cat, cat]", "1 to 254 different"), ("nc: 2", "got none"), ("names:\n- wild\n  dog", "names: neither"),
    ("nc: []\nnames: [cat]", "nc is , but there are 1"), ("names:\n- cat\n - dog", "names: neither"),
    ("names: *n", "names: neither"),
    ("names:\n  - |\n    cat", "names: neither"), ("names: []", "got none"), ("not yaml at all", "got none"),
    ("names: [cat]\nnames: [dog]", "has a key twice")])
def test_data_yaml_that_is_not_read_is_refused(tmp_path, yaml, wrong):
    path = text(tmp_path / "data.yaml", yaml)
    with pytest.raises(BadInput, match=wrong):
        read_data_yaml(path, Counter())


@pytest.mark.parametrize("row, wrong", [
    ("2 0.5 0.5 0.5 0.5", "class 2, but the names are of 0 to 1"), ("-1 0.5 0.5 0.5 0.5", "class -1"),
    ("0.5 0.5 0.5 0.5 0.5", "class 0.5"), ("0 40 30 20 10", r"not within 0 to 1 \(pixels"),
    ("0 0.5 nan 0.5 0.5", "pixels"), ("0 0.5 0.5 0.5", "all of them numbers"), ("0", "all of them numbers"),
    ("cat 0.5 0.5 0.5 0.5", "all of them numbers"), ("0,0.5,0.5,0.5,0.5", "all of them numbers"),
    ("0 0.5 0.5 0.5 0.5 57.3", "pixels")])                                          # an angle, not a confidence
def test_yolo_rows_that_are_refused(tmp_path, row, wrong):
    path = text(tmp_path / "a.txt", f"1 0.5 0.5 0.5 0.5\n\n{row}\n")
    with pytest.raises(BadInput, match=rf"a\.txt, line 3: .*{wrong}"):
        yolo_boxes(path, ["cat", "dog"])


def test_yolo_rows(tmp_path):
    rows = {"0 0.5 0.5 0.5 1.0": ("cat", 0.25, 0.0, 0.75, 1.0),
            "1 1.0 0.5 0.5 0.5 0.33": ("dog", 0.75, 0.25, 1.25, 0.75),
            "0 0.5 0.1 0.9 0.5 0.5 0.9 0.1 0.5": ("cat", 0.1, 0.1, 0.9, 0.9),       # a square on its corner
            "0 0.5 0.1 0.9 0.5 0.5 0.9 0.1 0.5 0.7": ("cat", 0.1, 0.1, 0.9, 0.9),
            "1.0 0 0 1 0 0 1": ("dog", 0, 0, 1, 1)}
    path = text(tmp_path / "a.txt", "\n".join(rows))
    assert np.allclose([box[1:] for box in yolo_boxes(path, ["cat", "dog"])], [box[1:] for box in rows.values()])
    assert [box[0] for box in yolo_boxes(path, ["cat", "dog"])] == [box[0] for box in rows.values()]
    pose = text(tmp_path / "p.txt", "0 0.5 0.5 0.5 1.0 0.9 0.9 2 0.1 0.1 0\n")       # two keypoints, seen and not
    assert yolo_boxes(pose, ["cat"], keypoints=True) == [("cat", 0.25, 0.0, 0.75, 1.0)]
    yaml = text(tmp_path / "data.yaml", "kpt_shape: [2, 3]\nnames: [cat]\n")
    assert read_data_yaml(yaml, Counter())[2] is True


def test_names_of_splits():
    for split, names in {"train": ("train", "Train", "training", "train2017", "obj_train_data", "instances_train2014"),
                         "val": ("val", "valid", "validation", "Validation", "instances_val2017", "val_coco",
                                 "annotations_val", "images-val", "valid_images", "validation_set"),
                         "test": ("test", "testing", "obj_test_data", "test_set", "testset", "coco_test")}.items():
        assert {split_of([name]) for name in names} == {split}
    for name in ("images", "trains", "my_train", "train_station", "test_0001", "settest", "value", "result", "coco",
                 "instances_default"):
        assert split_of([name]) is None
    assert split_of(["train", "x", "val"]) == "val" and split_of([]) is None


def test_boxes_are_rounded_as_for_candidates(tmp_path):
    """Both papers' labels come from one set of boxes, whether COCO is laid out here or read by mcg_candidates.py."""
    path, rng = image(tmp_path / "a.jpg"), np.random.default_rng(0)
    boxes = rng.uniform((-20, -20, 0.01, 0.01), (W - 0.01, H - 0.01, 60, 60), (2000, 4)).round(2)
    boxes[::3] = boxes[::3].round()                                               # whole and half pixels among them
    boxes[1::3, :2] = boxes[1::3, :2].round() + 0.5
    x0y0, x1y1 = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    boxes = boxes[((x0y0 < (W, H)) & (x0y0 < x1y1) & (x1y1 >= 0.5)).all(1)]
    corners = [("cat", x, y, x + w, y + h) for x, y, w, h in boxes.tolist()]
    fitted = fit_boxes(path, (W, H), corners)[1]
    expected = coco_boxes(boxes.tolist(), (H, W), path)
    assert len(fitted) == len(expected) > 1500
    assert np.array_equal([box[1:] for box in fitted], expected)


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif(tmp_path, turn):
    """A bright patch in the stored image, and its box there: turned along where the JSON's size is the stored one's."""
    stored = np.full((H, W, 3), 40, np.uint8)
    stored[10:20, 5:35] = 250
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    bright = np.array(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))[..., 0] > 128
    ys, xs = np.nonzero(bright)
    upright = ("cat", xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    size, boxes, notes = fit_boxes(tmp_path / "a.png", bright.shape[::-1], [upright])
    told = {"images turned by EXIF, perhaps not as their boxes were drawn: look at some": 1}
    assert (size, boxes, +notes) == (bright.shape, [upright], told if 2 <= turn <= 4 else {})
    parts = ("cat", *(np.array(upright[1:]) / np.tile(bright.shape[::-1], 2)))
    size, boxes, notes = fit_boxes(tmp_path / "a.png", (), [parts])                  # YOLO
    assert (size, boxes, +notes) == (bright.shape, [upright], told if turn > 1 else {})
    if turn >= 5:
        size, boxes, notes = fit_boxes(tmp_path / "a.png", (W, H), [("cat", 5, 10, 35, 20)])
        assert (size, boxes) == (bright.shape, [upright])
        assert +notes == {"boxes turned, as EXIF turns their image": 1}
        # Boxes that leave the stored image, but not the upright one, were drawn on that. If they leave both, no sign.
        with pytest.raises(BadInput, match="^80x60 in the JSON is the image as it is stored, but .* swap width and"):
            fit_boxes(tmp_path / "a.png", (W, H), [upright, ("cat", 5, 50, 25, 70)])
        assert fit_boxes(tmp_path / "a.png", (W, H), [("cat", 5, 10, 90, 20)])[2]["boxes turned, as EXIF turns their "
                                                                                 "image"] == 1
        size, boxes, notes = fit_boxes(tmp_path / "a.png", (W, H, "upright"), [upright])    # Label Studio
        assert (boxes, +notes) == ([upright], told)
    with pytest.raises(BadInput, match=rf"^{2 * W}x{2 * H} in the JSON, but the image is {bright.shape[1]}x"):
        fit_boxes(tmp_path / "a.png", (2 * W, 2 * H), [upright])


def test_label_studio_states_the_size_of_the_stored_image_and_draws_on_the_upright_one(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image(tmp_path / "images" / "a.jpg", exif=exif)
    for contributor, box in (("Label Studio", ("cat", 5, 10, 25, 15)), ("", ("cat", 45, 5, 50, 25))):
        export = coco(tmp_path / "x.json", ["a.jpg"], [(1, 1, [5, 10, 20, 5])], info={"contributor": contributor})
        import_boxes(tmp_path / f"d{contributor[:1]}", tmp_path / "images", [export])
        assert labelled(tmp_path / f"d{contributor[:1]}", "a", (W, H)) == [box]


def test_an_odd_tag_hides_no_orientation(tmp_path):
    """A tag of the wrong type stands before the orientation: boxes are turned and told as if it did not."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    odd = exif.tobytes().replace(b"\x01\x0e\0\x02", b"\x87\x69\0\x02")
    Image.fromarray(np.full((H, W, 3), 40, np.uint8)).save(tmp_path / "a.jpg", exif=odd)
    size, boxes, notes = fit_boxes(tmp_path / "a.jpg", (W, H), [("cat", 5, 10, 35, 20)])
    assert size == (W, H) and boxes[0][1:] != (5, 10, 35, 20) and "turned, as EXIF" in next(iter(+notes))
    assert fit_boxes(tmp_path / "a.jpg", (), [("cat", 0.1, 0.1, 0.9, 0.9)])[2].total() == 1


def test_a_key_twice_is_refused(tmp_path):
    """json keeps the last value of a key that an object has twice; which one is meant nobody can tell."""
    image(tmp_path / "images" / "a.jpg")
    text(tmp_path / "x.json", '{"images": [{"id": 1, "file_name": "a.jpg"}], "categories": [{"id": 1, "name": "cat"}], '
         '"annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "bbox": [20, 20, 9, 9]}]}')
    code, _, err = command_line("--coco", tmp_path / "x.json", "--images", tmp_path / "images", "--data",
                                tmp_path / "d")
    assert code == 2 and "one key twice" in err and not (tmp_path / "d").exists()


def test_sizes(tmp_path):
    path, box = image(tmp_path / "a.jpg"), [("cat", 0, 0, 9, 9)]
    for stated in ((W, H), (W - 1, H + 1), (0, 0), (None, None), (float(W), None)):
        assert fit_boxes(path, stated, box)[1] == box
    for stated in ((W + 2, H), (H, W), (W, H - 2), (-5, H), ("80", "60"), (float("nan"), H)):
        with pytest.raises(BadInput, match="in the JSON"):
            fit_boxes(path, stated, box)


@pytest.mark.parametrize("box", [[1, 2, 3], [1, 2, 3, 4, 0.5], [1, 2, 3, float("nan")], [1, 2, None, 4], "all",
                                 {"x": 1}])
def test_coco_boxes_that_are_none(box):
    with pytest.raises((TypeError, ValueError)):
        coco_corners({"bbox": box}, Counter())


def test_coco_boxes_that_their_outlines_show_to_be_two_corners():
    square = [[5, 5, 25, 5, 25, 25, 5, 25]]
    for outline in (square, [square[0][:4], square[0][4:]]):
        with pytest.raises(ValueError, match="two corners"):
            coco_corners({"bbox": [5, 5, 25, 25], "segmentation": outline}, Counter())
    for outline in (square, [], [[]], [[5, 5, 25]], {"counts": "abc", "size": [60, 80]}, None, [[40, 40, 60, 60]]):
        assert coco_corners({"bbox": [5, 5, 20, 20], "segmentation": outline}, Counter()) == (5, 5, 25, 25)
    assert coco_corners({"bbox": [0, 0, 25, 25], "segmentation": [[0, 0, 25, 25]]}, Counter()) == (0, 0, 25, 25)


# ---------------------------------------------------------------- what is wrong, or said twice
def test_one_bad_image_stops_no_other(tmp_path):
    """All that can be wrong with an image at once: each is named, the good one is laid out, and exit status is 1."""
    for name in ("good", "size", "broken", "five", "shares", "twice", "same", "a/b", "a_b"):
        image(tmp_path / "images" / f"{name}.jpg")
    image(tmp_path / "images" / "same.png")
    text(tmp_path / "images" / "broken.jpg", "no image")
    files = ["good.jpg", ("size.jpg", 160, 120), "broken.jpg", "five.jpg", "shares.jpg", "twice.jpg", "twice.jpg",
             "same.jpg", "same.png", "a/b.jpg", "a_b.jpg", "missing.jpg", "other/good2.jpg"]
    boxes = [(n, 1, [10, 10, 20, 20]) for n in range(1, len(files) + 1)]
    boxes[3], boxes[4] = (4, 1, [1, 2, 3, 4, 45]), (5, 1, [0.1, 0.2, 0.3, 0.4])
    boxes += [(99, 1, [1, 1, 5, 5]), (1, 77, [1, 1, 5, 5]), (1, 1, []), (1, 1, None)]
    export = coco(tmp_path / "x.json", files, boxes)
    code, out, err = command_line("--coco", export, "--images", tmp_path / "images", "--data", tmp_path / "d")
    assert code == 1 and "Traceback" not in err, err
    assert ids(tmp_path / "d", "train") == ["good"]
    assert labelled(tmp_path / "d", "good") == [("cat", 10, 10, 30, 30)]
    assert "2 boxes of an image or category that the JSON does not list left out\n" in out
    assert "2 annotations without a box left out\n" in out
    assert "11 images of the export were left out" in err
    told = dict(re.findall(r"^  ([^:]+): (.*)$", err, re.M))
    assert set(told) == {"size.jpg", "broken.jpg", "five.jpg", "shares.jpg", "twice.jpg", "same.jpg", "same.png",
                         "a/b.jpg", "a_b.jpg", "missing.jpg", "other/good2.jpg"}
    assert "160x120 in the JSON, but the image is 80x60" in told["size.jpg"]
    assert "not a readable image" in told["broken.jpg"] and "the box [1, 2, 3, 4, 45]" in told["five.jpg"]
    assert "from 0 to 1: expected pixels" in told["shares.jpg"] and told["twice.jpg"] == "annotated twice"
    assert told["same.png"] == "'same' cannot be the id of same.jpg and same.png: rename them"
    assert told["a_b.jpg"] == "'a_b' cannot be the id of a/b.jpg and a_b.jpg: rename them"
    assert re.match("x.json names it, but .* has no such image .*: add it", told["missing.jpg"])
    for here, there in (("e/A.JPG", "a.jpg"), ("e/p/a.jpg", "q/a.jpg"), ("e/a.jpeg", "a.jpg"),
                        ("e/a.jpg", "/x/y/a.gif")):
        shutil.rmtree(tmp_path / "e", ignore_errors=True)
        image(tmp_path / here)
        export = coco(tmp_path / "y.json", [there], [(1, 1, [1, 1, 9, 9])])
        with pytest.raises(BadInput, match=f"no such image, only {here[2:]}: rename it, or give --images its folder"):
            import_boxes(tmp_path / "d2", tmp_path / "e", [export])
    assert not list((tmp_path / "d" / "VOC2012" / "Annotations").glob("[!g]*"))


def test_images_of_one_name_that_nothing_tells_apart(tmp_path):
    for folder in ("day1", "day2"):
        image(tmp_path / folder / "a.jpg")
    image(tmp_path / "b.jpg")
    export = coco(tmp_path / "x.json", ["a.jpg", "b.jpg", "day3/b.jpg"], [(n, 1, [1, 1, 9, 9]) for n in (1, 2, 3)])
    failures = import_boxes(tmp_path / "d", tmp_path, [coco(tmp_path / "y.json", ["day2/a.jpg", "b.jpg"], [
        (1, 1, [1, 1, 9, 9])])])
    assert failures == [] and ids(tmp_path / "d", "train") == ["day2_a"]
    with pytest.raises(BadInput, match="no image to train on; a.jpg: may be day1/a.jpg or day2/a.jpg: rename them"):
        import_boxes(tmp_path / "e", tmp_path, [export])     # b.jpg is day3/b.jpg, too: annotated twice
    assert not (tmp_path / "e").exists()


def test_ids_never_lead_out(tmp_path):
    """Names in a JSON are looked up among the images below --images; nothing else is ever read or made of them."""
    image(tmp_path / "secret.jpg")
    image(tmp_path / "images" / "a.jpg")
    export = coco(tmp_path / "x.json", ["a.jpg", "../secret.jpg", str(tmp_path / "secret.jpg"), "", "/", ".."],
                  [(n, 1, [1, 1, 9, 9]) for n in range(1, 7)])
    failures = import_boxes(tmp_path / "d", tmp_path / "images", [export])
    assert len(failures) == 5 and ids(tmp_path / "d", "train") == ["a"]
    assert {path.name for path in (tmp_path / "d" / "VOC2012" / "JPEGImages").iterdir()} == {"a.jpg"}


@pytest.mark.parametrize("change, wrong", [
    (lambda c: c["images"][1].update(id=1), "two images have one id"),
    (lambda c: c["categories"][1].update(id=1), "two categories have one id"),
    (lambda c: c.pop("annotations"), "not COCO's"), (lambda c: c.update(images={}), "no image to train on"),
    (lambda c: c.update(images="a"), "not COCO's"), (lambda c: c["annotations"][0].pop("image_id"), "not COCO's"),
    (lambda c: c["annotations"][0].update(category_id=[1]), "not COCO's"),
    (lambda c: c["annotations"][0].update(image_id={}), "not COCO's"),
    (lambda c: c["categories"][0].update(name=" "), "1 to 254 different class names"),
    (lambda c: c["categories"][0].update(name="a\0b"), "1 to 254 different class names"),
    (lambda c: c.update(categories=[]), "no image to train on|1 to 254"),
    (lambda c: [thing.update(iscrowd=1) for thing in c["annotations"]], "no image to train on")])
def test_json_that_is_refused(tmp_path, change, wrong):
    for name in "ab":
        image(tmp_path / f"{name}.jpg")
    export = coco(tmp_path / "x.json", ["a.jpg", "b.jpg"], [(1, 1, [1, 1, 9, 9]), (2, 2, [1, 1, 9, 9])])
    content = json.loads(export.read_text())
    change(content)
    export.write_text(json.dumps(content))
    with pytest.raises(BadInput, match=wrong):
        import_boxes(tmp_path / "d", tmp_path, [export])
    assert not (tmp_path / "d").exists()


def test_classes_that_are_asked_for(tmp_path, capsys):
    image(tmp_path / "a.jpg")
    export = coco(tmp_path / "x.json", ["a.jpg"], [(1, 1, [1, 1, 9, 9]), (1, 2, [2, 2, 9, 9])])
    names = text(tmp_path / "names.txt", "background\ndog\n", "utf-8-sig")
    import_boxes(tmp_path / "d", tmp_path, [export], names_file=names)
    assert labelled(tmp_path / "d", "a") == [("dog", 2, 2, 11, 11)]
    assert said(capsys)["boxes of classes that are not asked for, or background, left out"] == 1
    with pytest.raises(BadInput, match="no category is called Dog, as --class-names has it; there are cat, dog"):
        import_boxes(tmp_path / "e", tmp_path, [export], names_file=text(tmp_path / "names.txt", "cat\nDog\n"))


@pytest.mark.parametrize("arguments, wrong", [
    (("--coco", "x.json"), "--images DIR goes with"), (("--images", "i"), "--images DIR goes with"),
    (("--coco", "x.json", "--yolo", "l", "--images", "i"), "not allowed with argument --coco"),
    (("--class-names", "n"), "--class-names with"),
    (("--coco", "x.json", "--images", "nowhere"), "no folder --images nowhere"),
    (("--coco", "nowhere.json", "--images", "i"), "nowhere.json: cannot be read (No such file"),
    (("--coco", "i", "--images", "i"), "--coco i: no _annotations.coco.json, instances_"),
    (("--coco", "binary", "--images", "i"), "UTF-8"),
    (("--yolo", "nowhere", "--images", "i", "--class-names", "n"), "--yolo nowhere: no such folder"),
    (("--yolo", "i", "--images", "i"), "--yolo i: no data.yaml, obj.names or classes.txt in it or above it"),
    (("--yolo", "i", "--images", "i", "--class-names", "gap"), "different class names, got 'cat', ''"),
    (("--yolo", "i", "--images", "i", "--class-names", "background"), "begins with background, but YOLO's class 0"),
    (("--yolo", "i", "--images", "i", "--class-names", "n"), "--yolo i: no image to train on")])
def test_command_lines_that_are_refused(tmp_path, monkeypatch, arguments, wrong):
    """... in one line, exit status 2, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    image(Path("i/a.jpg"))
    text(Path("n"), "cat\n")
    text(Path("background"), "background\ncat\n")
    text(Path("gap"), "cat\n\ndog\n\n")
    Path("binary").write_bytes(b"\xff\xfe{\0}\0\x80")
    code, _, err = command_line(*arguments, "--data", "d")
    assert code == 2 and wrong in err.splitlines()[-1] and "Traceback" not in err, err
    assert not Path("d").exists()


def test_images_of_other_formats_keep_their_ending(tmp_path):
    """... and everything else finds them by their id, here the labels of all."""
    rows = {"a.png": "a", "b c.JPEG": "b_c", "day 1/d.webp": "day_1_d", "e.bmp": "e", "f.tif": "f"}
    for name in rows:
        image(tmp_path / "images" / name)
        text((tmp_path / "labels" / name).with_suffix(".txt"), "0 0.5 0.5 0.5 0.5\n")
    text(tmp_path / "classes.txt", "cat\n")
    code, _, err = command_line("--yolo", tmp_path / "labels", "--images", tmp_path / "images", "--data",
                                tmp_path / "d")
    assert (code, "Traceback" in err) == (0, False), err
    voc = tmp_path / "d" / "VOC2012"
    assert {path.stem for path in (voc / "GrabCutMasks").glob("*.png")} == set(rows.values())
    assert {path.suffix for path in (voc / "JPEGImages").iterdir()} == {".png", ".JPEG", ".webp", ".bmp", ".tif"}


def test_mixed_capitals_become_small(tmp_path):
    """a.Jpg, which no other script would look for."""
    for name in ("a.Jpg", "b.JPG", "c.jpg"):
        image(tmp_path / "images" / name)
    file = coco(tmp_path / "result.json", ["a.Jpg", "b.JPG", "c.jpg"], [(n, 1, [1, 1, 9, 9]) for n in (1, 2, 3)])
    assert import_boxes(tmp_path / "d", tmp_path / "images", [file]) == []
    voc = find_voc(tmp_path / "d")
    assert sorted(path.name for path in (voc / "JPEGImages").iterdir()) == ["a.jpg", "b.JPG", "c.jpg"]
    assert make_labels(voc, ["a", "b", "c"])["failures"] == []


def test_a_projects_name_is_weaker_than_its_images_folders(tmp_path):
    for name in ("train/a.jpg", "train/b.jpg", "val/c.jpg"):
        image(tmp_path / "test" / "images" / name)
    file = coco(tmp_path / "test" / "result.json", ["a.jpg", "b.jpg", "c.jpg"],
                [(n, 1, [1, 1, 9, 9]) for n in (1, 2, 3)])
    import_boxes(tmp_path / "d", tmp_path / "test" / "images", [file])
    assert ids(tmp_path / "d", "train") == ["train_a", "train_b"] and ids(tmp_path / "d", "val") == ["val_c"]


def test_each_folder_that_is_named_has_a_json(tmp_path, export):
    (tmp_path / "other").mkdir()
    text(tmp_path / "other" / "mine.json", "{}")
    with pytest.raises(BadInput, match="--coco .*other: no _annotations.coco.json"):
        import_boxes(tmp_path / "d", export, [export, tmp_path / "other"])


# ---------------------------------------------------------------- a second run
@pytest.fixture
def export(tmp_path):
    """Two good images and one that cannot be read, JSON beside them."""
    for name in "abc":
        image(tmp_path / "export" / f"{name}.jpg", seed=ord(name))
    shutil.copy(tmp_path / "export" / "c.jpg", tmp_path / "c.jpg")
    text(tmp_path / "export" / "c.jpg", "cut off")
    coco(tmp_path / "export" / "result.json", ["a.jpg", "b.jpg", "c.jpg"],
         [(n, n % 2 + 1, [n, 1, 9, 9]) for n in (1, 2, 3)])
    return tmp_path / "export"


def everything(folder):
    return {path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_second_run_adds_what_is_missing(tmp_path, export):
    data = tmp_path / "d"
    assert [failure[:6] for failure in import_boxes(data, export, [export])] == ["c.jpg:"]
    assert ids(data, "train") == ["a", "b"]
    before = everything(data)
    (data / "VOC2012/ImageSets/Segmentation/train.txt").write_text("b\n")         # somebody does not want a
    shutil.copy(tmp_path / "c.jpg", export)                                       # and has found the image
    assert import_boxes(data, export, [export]) == []
    assert ids(data, "train") == ["b", "c"] and labelled(data, "c") == [("dog", 3, 1, 12, 10)]
    after = everything(data)
    lists = {path for path in before if path.name in ("train.txt", "import.json")}
    assert {path: after[path] for path in before if path not in lists} == {path: content for path, content in
                                                                           before.items() if path not in lists}


def test_a_list_that_was_deleted_stays_away(tmp_path):
    for name in "abc":
        image(tmp_path / "images" / ("val" if name == "c" else "train") / f"{name}.jpg")
    file = coco(tmp_path / "result.json", ["a.jpg", "b.jpg", "c.jpg"], [(n, 1, [1, 1, 9, 9]) for n in (1, 2, 3)])
    for _ in range(3):
        import_boxes(tmp_path / "d", tmp_path / "images", [file])
        (tmp_path / "d/VOC2012/ImageSets/Segmentation/val.txt").unlink(missing_ok=True)
    assert ids(tmp_path / "d", "train") == ["train_a", "train_b"]
    import_boxes(tmp_path / "d", tmp_path / "images", [file])
    assert ids(tmp_path / "d", "val") is None


def test_a_folder_with_images_is_no_place_for_an_import(tmp_path, export):
    """Whatever comes later would take d/JPEGImages, or images would have to be read and written in one folder."""
    image(tmp_path / "d" / "JPEGImages" / "x.jpg")
    with pytest.raises(BadInput, match="--data .*d: holds images that were there before"):
        import_boxes(tmp_path / "d", export, [export])
    image(tmp_path / "e" / "VOC2012" / "JPEGImages" / "a.jpg")
    with pytest.raises(BadInput, match="--data .*e: holds images that were there before"):
        import_boxes(tmp_path / "e", tmp_path / "e" / "VOC2012" / "JPEGImages", [export])


def test_an_interrupted_run_is_completed(tmp_path, export, monkeypatch):
    """Stopped after 0, 1, 2, ... files, and then run again: the same as one run."""
    import_boxes(tmp_path / "whole", export, [export])
    whole = {path: content for path, (content, _) in everything(tmp_path / "whole").items()}
    writers = {"replace": os.replace, "link": os.link}
    for stop in range(100):
        done = []

        def stopping(name):
            def write(*paths):
                if len(done) == stop:
                    raise KeyboardInterrupt
                done.append(paths)
                writers[name](*paths)
            return write

        data = tmp_path / f"d{stop}"
        with monkeypatch.context() as patch:
            for name in writers:
                patch.setattr(os, name, stopping(name))
            with contextlib.suppress(KeyboardInterrupt):
                import_boxes(data, export, [export])
        import_boxes(data, export, [export])
        found = {path: content for path, (content, _) in everything(data).items() if path.suffix != ".tmp"}
        assert found == whole, stop
        if len(done) < stop:                                                        # nothing was left to interrupt
            break
    assert stop == len(whole) + 1 == 8


def test_another_export_is_never_mixed_in(tmp_path, export):
    data, voc = tmp_path / "d", tmp_path / "d" / "VOC2012"
    import_boxes(data, export, [export])
    before = everything(data)

    def refused(wrong, *arguments, **options):
        with pytest.raises(BadInput, match=wrong):
            import_boxes(data, *arguments, **options)
        assert everything(data) == before

    other = coco(tmp_path / "other.json", ["a.jpg"], [(1, 1, [1, 1, 9, 9])])
    refused("made from other boxes", export, [other])
    shutil.copytree(export, tmp_path / "elsewhere")
    refused("made from other images", tmp_path / "elsewhere", [export])
    refused("class_names.txt.*: not as the export has it now", export, [export],
            names_file=text(tmp_path / "n.txt", "dog\ncat\n"))
    result = export / "result.json"
    old = result.read_text()
    result.write_text(old.replace("[1, 1, 9, 9]", "[1, 1, 9, 8]"))                # a box was corrected
    refused("Annotations/a.xml: not as the export has it now: name another --data, or delete .*; if you corrected it "
            "there, leave out --coco", export, [export])
    result.write_text(old)
    image(tmp_path / "new.jpg", seed=99)
    os.replace(tmp_path / "new.jpg", export / "b.jpg")                            # an image was replaced
    refused("JPEGImages/b.jpg: not as", export, [export])
    text(voc / "import.json", "{")
    before = everything(data)
    refused("cannot be written or read", export, [export])


def test_data_of_ones_own_is_never_overwritten(tmp_path, export):
    voc = tmp_path / "d" / "VOC2012"
    text(voc / "ImageSets" / "Segmentation" / "train.txt", "mine\n")
    before = everything(voc)
    with pytest.raises(BadInput, match="holds data that this command has not made: name another --data"):
        import_boxes(tmp_path / "d", export, [export])
    assert everything(voc) == before


def test_images_of_the_layout_itself_are_not_taken(tmp_path, export, monkeypatch):
    """--data below --images: a second run does not take JPEGImages for images of the export."""
    monkeypatch.chdir(export)
    assert len(import_boxes("mydata", ".", ["result.json"])) == 1
    before = everything(export / "mydata")
    assert len(import_boxes("mydata/VOC2012", ".", ["result.json"])) == 1
    assert [path for path in everything(export / "mydata")] == list(before)
    assert len(import_boxes("another", ".", ["result.json"])) == 1      # nor those of the first import
    assert len(everything(export / "another")) == len(before)


def test_copies_where_links_cannot_be_made(tmp_path, export, monkeypatch):
    def no_link(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    for _ in range(2):
        import_boxes(tmp_path / "d", export, [export])
    copy = tmp_path / "d" / "VOC2012" / "JPEGImages" / "a.jpg"
    assert copy.read_bytes() == (export / "a.jpg").read_bytes() and not copy.samefile(export / "a.jpg")


# ---------------------------------------------------------------- from one end to the other
def test_both_forms_give_the_labels_of_voc(tmp_path):
    """A synthetic VOC devkit as a COCO and as a YOLO export: B and M are those of the devkit, byte for byte."""
    voc = Path(make_toy_voc(tmp_path / "toy", images=4, val=2, size=(60, 80)))
    names = class_names(voc)
    (tmp_path / "images").symlink_to(voc / "JPEGImages")
    for split in ("train", "val"):
        files, boxes = [], []
        for number, name in enumerate(read_list(voc / "ImageSets" / "Segmentation" / f"{split}.txt"), 1):
            corners, classes = read_boxes(voc / "Annotations" / f"{name}.xml", names, (60, 80))
            files.append((f"{name}.jpg", 80, 60))
            boxes += [(number, int(c), [int(x0), int(y0), int(x1 - x0), int(y1 - y0)])
                      for c, (x0, y0, x1, y1) in zip(classes, corners)]
            text(tmp_path / "labels" / f"{name}.txt", "".join(
                f"{c - 1} {(x0 + x1) / 160:.6f} {(y0 + y1) / 120:.6f} {(x1 - x0) / 80:.6f} {(y1 - y0) / 60:.6f}\n"
                for c, (x0, y0, x1, y1) in zip(classes, corners)))
        coco(tmp_path / f"instances_{split}.json", files, boxes, [*enumerate(names)][1:])
    text(tmp_path / "classes.txt", "\n".join(names[1:]))
    make_labels(voc, read_list(voc / "ImageSets" / "Segmentation" / "trainval.txt"), out=tmp_path / "expected")

    code, out, err = command_line("--coco", tmp_path, "--images", tmp_path / "images", "--data", tmp_path / "c",
                                  "--show", 2)
    assert (code, err.count("Traceback")) == (0, 0), err
    assert "train.txt: 4 images" in out and "val.txt: 2 images" in out and "made 4, already there 0, failed 0" in out
    assert f"python train_box2seg.py --data {tmp_path / 'c'} --val-split none --out runs/mine" in out
    yolo = "--yolo", tmp_path / "labels", "--images", tmp_path / "images", "--data", tmp_path / "y"
    code, out, err = command_line(*yolo)
    assert (code, err.count("Traceback")) == (0, 0), err
    assert f"python train_boxsup.py --data {tmp_path / 'y'} --out runs/mine" in out and "--val-split" not in out
    for data, count in (("c", 4), ("y", 6)):
        for kind in ("BoxMasks", "GrabCutMasks"):
            made = sorted((tmp_path / data / "VOC2012" / kind).glob("*.png"))
            assert len(made) == count
            for path in made:
                assert path.read_bytes() == (tmp_path / "expected" / kind / path.name).read_bytes()
    sheet = np.array(Image.open(tmp_path / "c" / "VOC2012" / "sheet.png"))          # two rows of three panels
    assert sheet.shape == (2 * 244, 3 * 320, 3)
    labels = read_label(tmp_path / "c" / "VOC2012" / "BoxMasks" / f"{ids(tmp_path / 'c', 'train')[0]}.png")
    inside = np.kron(labels > 0, np.ones((4, 4))) == 1                            # a panel is 4 times the image's size
    box = sheet[:240, 320:640].astype(int).max(2) + sheet[:240, 320:640].astype(int).min(2)
    assert box[inside].mean() > 1.3 * box[~inside].mean()                         # B is in colour, the rest is dark
    code, out, _ = command_line(*yolo, "--show", 0)
    assert code == 0 and "made 0, already there 6, failed 0" in out and "sheet" not in out
    code, out, _ = command_line(*yolo, "--show", 0, "--out", tmp_path / "l")
    assert code == 0 and f"train_box2seg.py --data {tmp_path / 'y'} --label-dir {tmp_path / 'l'} --out runs/mine" in out
    assert f"train_boxsup.py --data {tmp_path / 'y'} --out runs/mine" in out
