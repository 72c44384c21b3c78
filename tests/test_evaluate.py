"""evaluate.py: the score by hand, real command lines on a drawn set of six pictures, and what is wrong with input."""
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate
from model import Box2SegNet, load_network, predict
from toy_voc import CLASS_NAMES, make_toy_voc

REPOSITORY = Path(evaluate.__file__).parent


def command_line(*arguments):
    """python evaluate.py ... in a process of its own -> (exit status, stdout, stderr)"""
    command = [sys.executable, REPOSITORY / "evaluate.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def run(*arguments):
    """The same within this process, which has torch loaded already."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            status = evaluate.main([str(argument) for argument in arguments])
        except SystemExit as stop:                      # argparse
            status = stop.code
    return status, out.getvalue(), error.getvalue()


def refused(*arguments):
    """The one line on stderr of a command that ends with status 2."""
    status, _, error = run(*arguments)
    assert status == 2 and error.startswith("evaluate.py: ") and error.count("\n") == 1, (status, error)
    return error


def save_checkpoint(path, class_names, **arch):
    torch.manual_seed(0)
    network = Box2SegNet(len(class_names), "resnet18", embedding_dim=4, width=16, **arch)
    torch.nn.init.normal_(network.segmentation[-1].weight)                          # so that all classes are predicted
    torch.save({"model": network.state_dict(), "class_names": class_names, "arch": network.arch, "args": {}}, path)
    return path


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Four pictures to train on, two to validate on, 48 x 64, with B and M beside them (M: the truth, 255 as 0)."""
    voc = Path(make_toy_voc(tmp_path_factory.mktemp("toy") / "VOCdevkit", 4, 2, (48, 64)))
    for folder in ("BoxMasks", "GrabCutMasks"):
        (voc / folder).mkdir()
        for path in (voc / "SegmentationClass").iterdir():
            labels = np.array(Image.open(path))
            evaluate.write_label(voc / folder / path.name, np.where(labels == 255, 0, labels))
    return voc


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("run") / "best.pt", CLASS_NAMES)


@pytest.fixture
def copy(toy, tmp_path):
    """A copy of the toy devkit to break things in."""
    return Path(shutil.copytree(toy, tmp_path / "VOCdevkit" / "VOC2012"))


def png(path):
    return np.array(Image.open(path))


# ----------------------------------------------------------------------------------------------------------------------
# by hand

def test_score_by_hand():
    """Rows are the truth:            to background  to cat  to dog      IoU
        of 6 background pixels                  4       2       0        4 / (6 + 5 - 4) = 4/7
        of 4 cat pixels                         1       3       0        3 / (4 + 5 - 3) = 1/2
        of no dog pixels                        0       0       0        does not occur: not part of the mean
    """
    result = evaluate.score(torch.tensor([[4, 2, 0], [1, 3, 0], [0, 0, 0]]), ["background", "cat", "dog"])
    assert result["iou"] == {"background": pytest.approx(4 / 7), "cat": pytest.approx(1 / 2), "dog": None}
    assert result["miou"] == pytest.approx((4 / 7 + 1 / 2) / 2)
    assert result["classes_present"] == 2
    assert result["pixel_accuracy"] == pytest.approx(7 / 10)


def test_table_by_hand():
    text = evaluate.table({"miou": 0.5357, "iou": {"background": 4 / 7, "cat": 0.5, "dog": None}, "classes_present": 2,
                           "pixel_accuracy": 0.7, "images": 1})
    assert text == ("   bkg     cat     dog    mIoU\n"
                    "  57.1    50.0       -    53.6\n"
                    "\n"
                    "mIoU 53.6 % over 2 of 3 classes, pixel accuracy 70.0 %, 1 images")


def test_table_has_the_order_and_names_of_the_papers_table_2():
    head = ("bkg aero bike bird boat bottle bus car cat chair cow table dog horse mbike person plant sheep sofa train "
            "tv mIoU").split()
    result = {"miou": 1, "iou": {name: c / 100 for c, name in enumerate(evaluate.VOC_CLASSES)}, "classes_present": 21,
              "pixel_accuracy": 1, "images": 1}
    lines = evaluate.table(result).split("\n")
    assert lines[0].split() + lines[3].split() == head
    assert lines[1].split() + lines[4].split() == [f"{c}.0" for c in range(21)] + ["100.0"]
    assert len({len(lines[i]) for i in (0, 1, 3, 4)}) == 1 and len(lines[0]) <= 100


def test_shared_blocks_are_equal_to_the_byte():
    def blocks(file):
        text = (REPOSITORY / file).read_text()
        return [part.split("# ==== end of shared block")[0] for part in text.split("# ==== shared block")[1:]]
    assert len(blocks("evaluate.py")) == 2
    assert set(blocks("evaluate.py")) <= set(blocks("grabcut_labels.py"))


# ----------------------------------------------------------------------------------------------------------------------
# label PNGs

def test_labels_score_one_where_they_equal_the_truth(toy, tmp_path):
    status, out, error = run("--data", toy.parent, "--labels", toy / "GrabCutMasks", "--split", "trainval",
                             "--json", tmp_path / "new" / "score.json")
    assert status == 0, error
    result = json.loads((tmp_path / "new" / "score.json").read_text())
    truth = np.concatenate([png(path).ravel() for path in (toy / "SegmentationClass").iterdir()])
    present = [name in set(np.array(CLASS_NAMES)[truth[truth != 255]]) for name in CLASS_NAMES]
    assert result == {"miou": 1.0, "iou": {name: 1.0 if there else None for name, there in zip(CLASS_NAMES, present)},
                      "classes_present": sum(present), "pixel_accuracy": 1.0, "images": 6, "failed": []}
    assert f"mIoU 100.0 % over {sum(present)} of 6 classes" in out
    assert os.listdir(tmp_path / "new") == ["score.json"]                           # no temporary file is left


def test_labels_against_a_count_by_pixel_loop(copy):
    """One confusion matrix over all images, at 255 left out; not the mean of the images' scores."""
    rng, both, either = np.random.default_rng(0), np.zeros(6), np.zeros(6)
    (copy / "preds").mkdir()
    names = (copy / "ImageSets" / "Segmentation" / "train.txt").read_text().split()
    for name in names:
        truth = png(copy / "SegmentationClass" / f"{name}.png")
        prediction = np.where(rng.random(truth.shape) < 0.3, rng.integers(0, 6, truth.shape), truth % 255)
        evaluate.write_label(copy / "preds" / f"{name}.png", prediction)
        for t, p in zip(truth.ravel().tolist(), prediction.ravel().tolist()):
            if t != 255:
                both[t] += t == p
                either[t] += 1
                either[p] += t != p
    in_truth = [c for c in range(6) if any((png(copy / "SegmentationClass" / f"{n}.png") == c).any() for n in names)]
    status, _, error = run("--data", copy, "--labels", copy / "preds", "--split", "train", "--json", copy / "s.json")
    assert status == 0, error
    result = json.loads((copy / "s.json").read_text())
    assert result["miou"] == pytest.approx(np.mean(both[in_truth] / either[in_truth]))
    assert [result["iou"][CLASS_NAMES[c]] for c in in_truth] == pytest.approx(list(both[in_truth] / either[in_truth]))


def test_list_file_and_extra_masks(copy):
    """--list names the ids; a mask that SegmentationClass lacks is looked for in SegmentationClassAug."""
    (copy / "SegmentationClassAug").mkdir()
    (copy / "SegmentationClass" / "toy_train_00001.png").rename(copy / "SegmentationClassAug" / "toy_train_00001.png")
    (copy / "mine.txt").write_text("toy_train_00001\ntoy_val_00000\n")
    status, out, error = run("--data", copy, "--labels", copy / "GrabCutMasks", "--list", copy / "mine.txt")
    assert status == 0 and "2 images" in out and "mIoU 100.0 %" in out, error


@pytest.mark.parametrize("break_it, words", [
    (lambda path: path.write_bytes(path.read_bytes()[:60]), "not a readable PNG"),
    (lambda path: Image.open(path).convert("RGB").save(path), "RGB"),
    (lambda path: evaluate.write_label(path, np.zeros((48, 65))), "65x48"),
    (lambda path: evaluate.write_label(path, np.full((48, 64), 6)), "class 6"),
    (lambda path: evaluate.write_label(path, np.full((48, 64), 255)), "255"),
    (lambda path: path.unlink(), "no label"),
])
def test_a_bad_label_is_one_line_that_names_it(copy, break_it, words):
    path = copy / "GrabCutMasks" / "toy_val_00001.png"
    break_it(path)
    error = refused("--data", copy, "--labels", copy / "GrabCutMasks")
    assert str(path) in error and words in error


# ----------------------------------------------------------------------------------------------------------------------
# networks

def test_a_checkpoint_end_to_end(toy, checkpoint, tmp_path):
    """The saved predictions are predict()'s argmax, and score as labels what the network scored."""
    status, out, error = command_line("--data", toy, "--checkpoint", checkpoint, "--device", "cpu", "--json",
                                      tmp_path / "a.json", "--save-png", tmp_path / "png", "--pictures",
                                      tmp_path / "pictures", "--num-pictures", 1)
    assert status == 0, error
    network, _ = load_network(checkpoint)
    for name in ("toy_val_00000", "toy_val_00001"):
        saved = Image.open(tmp_path / "png" / f"{name}.png")
        assert saved.mode == "P" and saved.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
        expected = predict(network, png(toy / "JPEGImages" / f"{name}.jpg")).argmax(0).numpy()
        assert (np.array(saved) == expected).mean() > 0.999                         # other threads, other roundings
    assert sorted(os.listdir(tmp_path / "png")) == ["toy_val_00000.png", "toy_val_00001.png"]
    assert sorted(os.listdir(tmp_path / "pictures")) == ["sheet.png", "toy_val_00000.png"]
    # six panels of 240 x 320 pixels: image, truth, boxes, GrabCut, prediction, attention
    strip = png(tmp_path / "pictures" / "toy_val_00000.png")
    assert strip.shape[1] == 6 * (320 + 4) and strip.shape[0] >= 240 + 30 and strip.shape[2] == 3
    status, _, error = run("--data", toy, "--labels", tmp_path / "png", "--json", tmp_path / "b.json")
    assert status == 0, error
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads((tmp_path / "b.json").read_text())


def test_scales_and_flip_reach_predict(toy, checkpoint, tmp_path):
    status, _, error = run("--data", toy, "--checkpoint", checkpoint, "--device", "cpu", "--scales", 0.5, 1.5, "--flip",
                           "--save-png", tmp_path)
    assert status == 0, error
    network, _ = load_network(checkpoint)
    image = png(toy / "JPEGImages" / "toy_val_00000.jpg")
    saved = png(tmp_path / "toy_val_00000.png")
    assert (saved == predict(network, image, (0.5, 1.5), True).argmax(0).numpy()).mean() > 0.999
    assert (saved == predict(network, image).argmax(0).numpy()).mean() < 0.99


def test_bf16(toy, checkpoint, tmp_path):
    status, _, error = run("--data", toy, "--checkpoint", checkpoint, "--device", "cpu", "--amp", "bf16", "--save-png",
                           tmp_path)
    assert status == 0, error
    network, _ = load_network(checkpoint)
    exact = predict(network, png(toy / "JPEGImages" / "toy_val_00000.jpg")).argmax(0).numpy()
    assert (png(tmp_path / "toy_val_00000.png") == exact).mean() > 0.8


def test_pictures_without_boxes_grabcut_and_attention(copy, tmp_path):
    """Panels that are not at hand are left out: image, truth, prediction remain."""
    shutil.rmtree(copy / "BoxMasks")
    shutil.rmtree(copy / "GrabCutMasks")
    plain = save_checkpoint(tmp_path / "plain.pt", CLASS_NAMES, attention=False, embedding=False)
    status, _, error = run("--data", copy, "--checkpoint", plain, "--device", "cpu", "--split", "trainval",
                           "--pictures", tmp_path / "pictures", "--num-pictures", 99, "--worst")
    assert status == 0, error
    assert len(os.listdir(tmp_path / "pictures")) == 7                              # six, and the sheet
    assert png(tmp_path / "pictures" / "toy_val_00000.png").shape[1] == 3 * (320 + 4)


def test_worst_pictures_are_those_of_lowest_miou(copy, tmp_path):
    worst = copy / "GrabCutMasks" / "toy_train_00002.png"
    evaluate.write_label(worst, np.zeros((48, 64)))
    status, _, error = run("--data", copy, "--labels", copy / "GrabCutMasks", "--split", "trainval", "--pictures",
                           tmp_path / "pictures", "--num-pictures", 1, "--worst")
    assert status == 0, error
    assert sorted(os.listdir(tmp_path / "pictures")) == ["sheet.png", "toy_train_00002.png"]


def test_attention_picture_by_hand():
    """Black picture; alpha of class 1 is 1 in the left pixel, and 1 in the middle one, which lies outside its box."""
    image, truth = np.zeros((1, 3, 3), np.uint8), np.array([[1, 0, 0]], np.uint8)
    alpha = np.array([[[1.0, 1.0, 0.5]], [[1.0, 1.0, 1.0]]], np.float32)            # class 2 is not in the picture
    red = evaluate.colour_of(np.array(1)).tolist()
    inside = evaluate.attention_overlay(image, alpha, truth, np.array([[1, 0, 1]], np.uint8))[0].tolist()
    assert inside == [red, [0, 0, 0], [90, 20, 20]] and red == [180, 40, 40]       # 1.1 * VOC's (128, 0, 0) + 40
    everywhere = evaluate.attention_overlay(image, alpha, truth, None)[0].tolist()
    assert everywhere == [red, red, [90, 20, 20]]


def test_colours_of_all_voc_classes_differ():
    colours = evaluate.colour_of(np.array([*range(21), 255]))
    assert len({tuple(colour) for colour in colours.tolist()}) == 22


def test_one_bad_image_is_reported_and_left_out(copy, checkpoint):
    bad = copy / "JPEGImages" / "toy_train_00001.jpg"
    bad.write_bytes(bad.read_bytes()[:700])
    wrong = copy / "SegmentationClass" / "toy_train_00003.png"
    evaluate.write_label(wrong, np.zeros((40, 64)))
    status, out, error = run("--data", copy, "--checkpoint", checkpoint, "--device", "cpu", "--split", "train",
                             "--json", copy / "s.json")
    assert status == 1 and str(bad) in error and str(wrong) in error and "Traceback" not in error
    assert error.strip().endswith("2 images were left out (see above): toy_train_00001 toy_train_00003")
    assert "2 images" in out
    result = json.loads((copy / "s.json").read_text())
    assert result["images"] == 2 and result["failed"] == ["toy_train_00001", "toy_train_00003"]


def test_missing_truth_is_found_before_work_begins(copy, checkpoint):
    (copy / "SegmentationClass" / "toy_val_00001.png").unlink()
    error = refused("--data", copy, "--checkpoint", checkpoint, "--device", "cpu")
    assert str(copy / "SegmentationClass" / "toy_val_00001.png") in error and "truth" in error
    (copy / "SegmentationClass" / "toy_val_00000.png").unlink()
    assert "1 others" in refused("--data", copy, "--labels", copy / "GrabCutMasks")


def test_bad_checkpoints(toy, tmp_path):
    assert str(tmp_path / "no.pt") in refused("--data", toy, "--checkpoint", tmp_path / "no.pt", "--device", "cpu")
    (tmp_path / "broken.pt").write_bytes(b"PK nonsense")
    assert "broken.pt" in refused("--data", toy, "--checkpoint", tmp_path / "broken.pt", "--device", "cpu")
    other = save_checkpoint(tmp_path / "other.pt", ["background", "cat", "dog"])
    error = refused("--data", toy, "--checkpoint", other, "--device", "cpu")
    assert "other.pt" in error and "3 classes" in error and " 6 " in error


def test_exit_status_of_the_command_line(toy, tmp_path):
    status, out, error = command_line("--data", tmp_path, "--labels", toy / "GrabCutMasks")
    assert status == 2 and not out and error.startswith("evaluate.py: ") and error.count("\n") == 1, error
    status, out, error = command_line("--help")
    assert status == 0 and "(paper)" in out and "(ours)" in out and "comp6_val_cls" in out


def test_bad_places_and_devices(toy, checkpoint, tmp_path):
    assert "nowhere" in refused("--data", tmp_path / "nowhere", "--checkpoint", checkpoint)
    assert "test.txt" in refused("--data", toy, "--checkpoint", checkpoint, "--split", "test")
    assert "mine.txt" in refused("--data", toy, "--checkpoint", checkpoint, "--list", tmp_path / "mine.txt")
    assert "overwrite" in refused("--data", toy, "--labels", toy / "GrabCutMasks",
                                  "--save-png", toy / "SegmentationClass")
    assert "cuda:99" in refused("--data", toy, "--checkpoint", checkpoint, "--device", "cuda:99")
    assert "tpu" in refused("--data", toy, "--checkpoint", checkpoint, "--device", "tpu")
    for wrong in ([], ["--checkpoint", checkpoint, "--labels", toy],
                  ["--labels", toy, "--images", toy, "--out", tmp_path],
                  ["--checkpoint", checkpoint, "--images", toy], ["--checkpoint", checkpoint, "--scales", 0]):
        status, _, error = run("--data", toy, *wrong)
        assert status == 2 and "Traceback" not in error and "usage" in error


# ----------------------------------------------------------------------------------------------------------------------
# a folder of plain pictures

def test_plain_pictures_of_all_kinds(toy, checkpoint, tmp_path):
    """Grey, with alpha, palette, webp; one photographed upright is turned upright, one is broken, one is no picture."""
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    picture = Image.open(toy / "JPEGImages" / "toy_val_00000.jpg")
    picture.convert("L").save(source / "grey.png")
    picture.convert("RGBA").resize((31, 17)).save(source / "alpha.png")
    picture.convert("P").save(source / "palette.gif")
    picture.save(source / "web.webp", lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6                                    # the camera was turned by 90 degrees
    picture.save(source / "turned.JPG", exif=exif)
    (source / "broken.jpg").write_bytes((toy / "JPEGImages" / "toy_val_00000.jpg").read_bytes()[:500])
    (source / "notes.txt").write_text("no picture")
    status, text, error = run("--checkpoint", checkpoint, "--images", source, "--out", out, "--device", "cpu")
    assert status == 1 and str(source / "broken.jpg") in error and "1 images were left out" in error
    assert "5 label PNGs" in text
    shapes = {"grey": (48, 64), "alpha": (17, 31), "palette": (48, 64), "web": (48, 64), "turned": (64, 48)}
    assert {path.stem: png(path).shape for path in out.glob("*.png")} == shapes
    assert {path.stem for path in (out / "overlay").iterdir()} == set(shapes)
    network, _ = load_network(checkpoint)
    expected = predict(network, np.array(picture)).argmax(0).numpy()
    assert (png(out / "web.png") == expected).mean() > 0.999


def test_plain_pictures_by_list_and_where_they_cannot_go(toy, checkpoint, tmp_path):
    (tmp_path / "two.txt").write_text("toy_val_00001\ntoy_train_00000\n")
    command = ["--checkpoint", checkpoint, "--device", "cpu", "--images", toy / "JPEGImages"]
    status, _, error = run(*command, "--out", tmp_path / "out", "--list", tmp_path / "two.txt")
    assert status == 0, error
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"toy_val_00001.png", "toy_train_00000.png"}
    (tmp_path / "two.txt").write_text("toy_val_00009\n")
    assert "toy_val_00009" in refused(*command, "--out", tmp_path / "out", "--list", tmp_path / "two.txt")
    assert "overwrite" in refused(*command, "--out", toy / "JPEGImages")
    (tmp_path / "empty").mkdir()
    assert "no pictures" in refused(*command[:-1], tmp_path / "empty", "--out", tmp_path / "out")
    assert "no folder" in refused(*command[:-1], tmp_path / "nowhere", "--out", tmp_path / "out")
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / "empty" / name)
    assert "a.jpg" in refused(*command[:-1], tmp_path / "empty", "--out", tmp_path / "out")
