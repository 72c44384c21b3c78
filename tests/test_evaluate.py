"""evaluate.py: the score by hand, real command lines on a drawn set of six images, and what is wrong with input."""
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate
import losses
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
    """Four images to train on, two to validate on, 48 x 64, with B and M beside them (M: the truth, 255 as 0)."""
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
    labels, candidates = (set(blocks(file)) for file in ("grabcut_labels.py", "mcg_candidates.py"))
    assert len(blocks("evaluate.py")) == 6 and len(set(blocks("evaluate.py")) & labels) == 5
    assert set(blocks("evaluate.py")) <= labels | candidates


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
                                      tmp_path / "images", "--num-pictures", 1)
    assert status == 0, error
    network, _ = load_network(checkpoint)
    for name in ("toy_val_00000", "toy_val_00001"):
        saved = Image.open(tmp_path / "png" / f"{name}.png")
        assert saved.mode == "P" and saved.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
        expected = predict(network, png(toy / "JPEGImages" / f"{name}.jpg")).argmax(0).numpy()
        assert (np.array(saved) == expected).mean() > 0.999                         # other threads, other roundings
    assert sorted(os.listdir(tmp_path / "png")) == ["toy_val_00000.png", "toy_val_00001.png"]
    assert sorted(os.listdir(tmp_path / "images")) == ["sheet.png", "toy_val_00000.png"]
    # six panels of 240 x 320 pixels: image, truth, boxes, GrabCut, prediction, attention
    strip = png(tmp_path / "images" / "toy_val_00000.png")
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


def test_a_gpu_without_memory_is_no_fault_of_the_image(toy, checkpoint, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(evaluate, "predict", full)
    for flags in (("--data", toy), ("--images", toy / "JPEGImages", "--out", tmp_path),
                  ("--data", toy, "--crf-search", 2, "--workers", 0)):
        status, _, error = run(*flags, "--checkpoint", checkpoint, "--device", "cpu")
        assert status == 2 and error.endswith("give smaller --scales, --amp bf16, or --device cpu\n"), error


def test_scores_are_kept_where_the_table_cannot_be_printed(toy, tmp_path):
    with open("/dev/full", "w") as full:
        subprocess.run([sys.executable, REPOSITORY / "evaluate.py", "--data", toy, "--labels", toy / "GrabCutMasks",
                        "--json", tmp_path / "scores.json"], stdout=full, stderr=subprocess.DEVNULL)
    assert json.loads((tmp_path / "scores.json").read_text())["images"] == 2


def test_the_table_is_printed_where_scores_cannot_be_kept(toy):
    status, out, error = run("--data", toy, "--labels", toy / "GrabCutMasks", "--json", "/proc/nowhere/s.json")
    assert status == 2 and "s.json: cannot be written" in error and "mIoU" in out


def test_labels_of_other_images_are_not_scored(copy, toy, tmp_path):
    """Their ids may be the same. Where the folder of their images is not there, they came along with a copy."""
    source = {"images": str(toy / "JPEGImages"), "class_names": CLASS_NAMES, "method": "grabcut"}
    (copy / "GrabCutMasks" / "source.json").write_text(json.dumps(source))
    assert "made of other images" in refused("--data", copy, "--labels", copy / "GrabCutMasks")
    for images in (copy / "JPEGImages", tmp_path / "nowhere"):
        (copy / "GrabCutMasks" / "source.json").write_text(json.dumps(source | {"images": str(images)}))
        assert run("--data", copy, "--labels", copy / "GrabCutMasks")[0] == 0


def test_predictions_are_not_written_over_labels(toy, checkpoint, tmp_path):
    (tmp_path / "source.json").write_text("{}")
    for flags in (["--split", "val", "--save-png"], ["--images", toy / "JPEGImages", "--out"]):
        assert "holds labels or candidates" in refused("--data", toy, "--checkpoint", checkpoint, *flags, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["source.json"]


def test_figures_of_several_kinds_predict_once(toy, checkpoint, tmp_path, monkeypatch):
    calls, original = [], evaluate.predict
    monkeypatch.setattr(evaluate, "predict", lambda *a: calls.append(a) or original(*a))
    status, _, error = run("--data", toy, "--checkpoint", checkpoint, "--device", "cpu", "--pictures", tmp_path / "p",
                           "--attention", tmp_path / "a", "--affinity", tmp_path / "b")
    assert status == 0 and len(calls) == 4, error               # two images, to score and to draw
    assert all(len(list((tmp_path / kind).glob("*.png"))) == 3 for kind in "pab")


def test_attention_and_affinity_are_seen_at_the_first_scale(toy, checkpoint, tmp_path, monkeypatch):
    seen, original = [], evaluate.resized
    monkeypatch.setattr(evaluate, "resized", lambda *a: seen.append(a[1]) or original(*a))
    status, _, error = run("--data", toy, "--checkpoint", checkpoint, "--device", "cpu", "--scales", 0.5, 1.5,
                           "--num-pictures", 1, "--attention", tmp_path / "a", "--affinity", tmp_path / "b")
    assert status == 0 and seen == [0.5, 0.5], error


def test_an_image_named_sheet_has_no_place_among_figures(copy, tmp_path):
    for folder, ending in (("JPEGImages", "jpg"), ("SegmentationClass", "png"), ("GrabCutMasks", "png")):
        (copy / folder / f"toy_val_00000.{ending}").rename(copy / folder / f"sheet.{ending}")
    (tmp_path / "ids.txt").write_text("sheet\ntoy_val_00001\n")
    flags = "--data", copy, "--labels", copy / "GrabCutMasks", "--list", tmp_path / "ids.txt"
    assert run(*flags)[0] == 0
    assert "an image is named sheet" in refused(*flags, "--pictures", tmp_path / "p")


def test_images_are_seen_at_the_scale_of_the_training(toy, checkpoint, tmp_path):
    """Else --recipe photos, which validates at 0.7, would be scored and drawn at a size that it was not trained for."""
    saved = torch.load(checkpoint, weights_only=True)
    torch.save(saved | {"args": {"val_scale": 0.5}}, tmp_path / "half.pt")
    scores = {}
    for name, flags in {"half": ["half.pt"], "told": ["half.pt", "--scales", 1], "other": [checkpoint, "--scales", 0.5],
                        "one": [checkpoint]}.items():
        status, out, error = run("--data", toy, "--checkpoint", tmp_path / flags[0], "--device", "cpu", *flags[1:],
                                 "--json", tmp_path / f"{name}.json", "--attention", tmp_path / name,
                                 "--num-pictures", 1)
        assert status == 0, error
        assert ("at scale 0.5, as in its training" in out) == (name == "half")
        scores[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert scores["half"] == scores["other"] != scores["told"] == scores["one"]
    drawn = {name: png(tmp_path / name / "sheet.png") for name in scores}
    assert np.array_equal(drawn["half"], drawn["other"]) and np.array_equal(drawn["told"], drawn["one"])
    assert not np.array_equal(drawn["half"], drawn["told"])


@pytest.mark.parametrize("flags, dtype", [((), torch.float32), (("--amp", "auto"), torch.float32),
                                          (("--amp", "bf16"), torch.bfloat16)])
def test_scores_are_float32_unless_amp_asks(toy, checkpoint, monkeypatch, flags, dtype):
    """What a convolution gives in the middle of an evaluation."""
    seen, original = set(), torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda *a, **k: seen.add(original(*a, **k).dtype) or original(
        *a, **k))
    status, _, error = run("--data", toy, "--checkpoint", checkpoint, "--device", "cpu", *flags)
    assert status == 0 and seen == {dtype}, error


def test_help_says_that_scores_are_float32(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    assert re.search(r"off: float32, so that.*\(ours: off\)", " ".join(capsys.readouterr().out.split()))


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
    status, out, error = run("--data", copy, "--checkpoint", plain, "--device", "cpu", "--split", "trainval",
                             "--pictures", tmp_path / "images", "--num-pictures", 99, "--worst")
    assert status == 0 and "sheet.png; without boxes and GrabCut, which grabcut_labels.py makes" in out, error
    assert len(os.listdir(tmp_path / "images")) == 7                              # six, and the sheet
    assert png(tmp_path / "images" / "toy_val_00000.png").shape[1] == 3 * (320 + 4)


def test_worst_pictures_are_those_of_lowest_miou(copy, tmp_path):
    worst = copy / "GrabCutMasks" / "toy_train_00002.png"
    evaluate.write_label(worst, np.zeros((48, 64)))
    status, out, error = run("--data", copy, "--labels", copy / "GrabCutMasks", "--split", "trainval", "--pictures",
                             tmp_path / "images", "--num-pictures", 1, "--worst")
    assert status == 0 and "without" not in out, error
    assert sorted(os.listdir(tmp_path / "images")) == ["sheet.png", "toy_train_00002.png"]


def test_attention_picture_by_hand():
    """Black image; alpha of class 1 is 1 in the left pixel, and 1 in the middle one, which lies outside its box."""
    image, truth = np.zeros((1, 3, 3), np.uint8), np.array([[1, 0, 0]], np.uint8)
    alpha = np.array([[[1.0, 1.0, 0.5]], [[1.0, 1.0, 1.0]]], np.float32)            # class 2 is not in the image
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
    status, out, error = run("--help")
    assert status == 0 and "(paper)" in out and "(ours)" in out and "comp6_val_cls" in out
    assert "0.8 1.0 1.2" in " ".join(out.split())                                   # BoxSup+


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
                  ["--checkpoint", checkpoint, "--images", toy], ["--checkpoint", checkpoint, "--scales", 0],
                  ["--checkpoint", checkpoint, "--workers", -1],
                  ["--checkpoint", checkpoint, "--crf-search", 2, "--crf-backend", "pydensecrf"],
                  ["--checkpoint", checkpoint, "--crf-search", 2, "--pictures", "p"],
                  ["--checkpoint", checkpoint, "--crf-search", 2, "--trimap-plot", "p.png"],
                  ["--checkpoint", checkpoint, "--save-png", "p", "--pictures", "./p"],
                  ["--checkpoint", checkpoint, "--attention", "p", "--affinity", tmp_path / "q" / ".." / "p",
                   "--save-png", tmp_path / "p"],
                  ["--checkpoint", checkpoint, "--crf-iterations", 3],
                  ["--checkpoint", checkpoint, "--crf-backend", "pydensecrf"],
                  ["--checkpoint", checkpoint, "--crf-search", 2, "--images", toy, "--out", tmp_path],
                  ["--checkpoint", checkpoint, "--crf-w", 3], ["--labels", toy, "--flip"],
                  ["--checkpoint", checkpoint, "--crf", "--crf-rgb", 0.009],
                  ["--checkpoint", checkpoint, "--split", "val", "--list", tmp_path / "ids.txt"],
                  ["--checkpoint", checkpoint, "--pixels", 0, 0, 5, 5], ["--checkpoint", checkpoint, "--worst"],
                  ["--checkpoint", checkpoint, "--trimap-plot", tmp_path / "plot.svg"],
                  ["--checkpoint", checkpoint, "--num-pictures", 3], ["--checkpoint", checkpoint, "--json", tmp_path],
                  ["--checkpoint", checkpoint, "--pseudo-label-dir", toy],
                  ["--checkpoint", checkpoint, "--pictures", "p", "--pseudo-label-dir", tmp_path / "nowhere"],
                  *(["--checkpoint", checkpoint, "--images", toy, "--out", tmp_path / "o", *more] for more in (
                      ["--json", tmp_path / "j.json"], ["--trimap"], ["--split", "val"], ["--pictures", tmp_path]))):
        status, _, error = run("--data", toy, *wrong)
        assert status == 2 and "Traceback" not in error and "usage" in error


@pytest.mark.parametrize("flags", ["--scales 0.5 1 --flip --crf --trimap", "--crf-search", "--trimap-plot plot.png "
                                   "--pictures p --attention a --affinity b --pixels 0 0 63 47"])
def test_every_device_is_named(toy, checkpoint, tmp_path, monkeypatch, devices_named, flags):
    monkeypatch.setattr(evaluate, "GRID", {"xy": (33,), "rgb": (5,), "w": (2, 4)})
    made = []
    for device in ("meta", "cpu"):
        (tmp_path / device).mkdir()
        monkeypatch.chdir(tmp_path / device)
        with torch.device(device):
            status, said, error = run("--data", toy, "--checkpoint", checkpoint, "--device", "cpu", "--workers", 0,
                                      "--json", "scores.json", *flags.split())
        assert status == 0, error
        made.append((said, {path.relative_to(tmp_path / device): path.read_bytes()
                            for path in (tmp_path / device).rglob("*") if path.is_file()}))
    assert made[0] == made[1]


# ----------------------------------------------------------------------------------------------------------------------
# the trimap

def naive_distance(truth):
    """To the nearest pixel of another label, by trying all of them."""
    h, w = truth.shape
    return np.array([[min((np.hypot(y - v, x - u) for v in range(h) for u in range(w) if truth[v, u] != truth[y, x]),
                          default=np.inf) for x in range(w)] for y in range(h)])


def test_boundary_distance_by_hand():
    """VOC's rim (255) is a boundary on both sides; where there is none, class lies against class."""
    row = np.array([[0, 0, 0, 255, 255, 1, 1, 1, 2]], np.uint8)
    assert evaluate.boundary_distance(row).tolist() == [[3, 2, 1, 1, 1, 1, 2, 1, 1]]
    assert np.isinf(evaluate.boundary_distance(np.zeros((3, 4), np.uint8))).all()   # the image's edge is no boundary


def test_boundary_distance_against_a_loop():
    truth = np.random.default_rng(0).choice([0, 0, 0, 0, 0, 0, 0, 0, 1, 255], (13, 11)).astype(np.uint8)
    truth[:6, :5] = 2
    assert evaluate.boundary_distance(truth) == pytest.approx(naive_distance(truth), rel=1e-6)


def test_trimap_scores_by_hand():
    """truth       0 0 0 0 1 1 1 1     width 1: the two pixels in the middle; of 0 none is right, of 1 one of two: 1/4.
       prediction  0 0 0 1 1 1 1 0     Outside of it 3 of 4 and 2 of 3: 17/24. Width 4: all, and nothing outside.
    """
    truth, prediction = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])
    everything = evaluate.confusion_matrix(prediction, truth, 2)
    bands = {1: evaluate.confusion_matrix(prediction[3:5], truth[3:5], 2), 4: everything}
    trimap = evaluate.trimap_scores(everything, bands)
    assert trimap == {"widths": [1, 4], "boundary": [pytest.approx(1 / 4), pytest.approx((3 / 5 + 3 / 5) / 2)],
                      "interior": [pytest.approx(17 / 24), None], "interior_classes": [2, 0],
                      "share": [pytest.approx(1 / 4), 1.0]}
    assert [line.split()[-2:] for line in evaluate.trimap_table(trimap).split("\n")] == [
        ["1", "4"], ["25.0", "100.0"], ["25.0", "60.0"], ["70.8", "-"], ["2", "0"]]


def test_trimap_against_loops_over_pixels(copy):
    """Bands of all images in one count each; 255 in neither region. The command's table, JSON and plot."""
    names = (copy / "ImageSets" / "Segmentation" / "val.txt").read_text().split()
    rng, counts = np.random.default_rng(0), {(w, near): np.zeros((6, 6)) for w in (2, 5) for near in (True, False)}
    (copy / "preds").mkdir()
    for name in names:
        truth = png(copy / "SegmentationClass" / f"{name}.png")
        y, x = np.argwhere((truth != 0) & (truth != 255))[0]                        # of an object
        y, x = min(max(0, y - 8), 28), min(max(0, x - 12), 40)
        truth = truth[y:y + 20, x:x + 24]                                           # small, for the naive loop
        assert len(set(truth.ravel().tolist())) > 2
        prediction = np.where(rng.random(truth.shape) < 0.3, rng.integers(0, 6, truth.shape), truth % 255)
        evaluate.write_label(copy / "SegmentationClass" / f"{name}.png", truth)
        evaluate.write_label(copy / "preds" / f"{name}.png", prediction)
        picture = Image.open(copy / "JPEGImages" / f"{name}.jpg").crop((x, y, x + 24, y + 20))
        picture.save(copy / "JPEGImages" / f"{name}.jpg")
        for t, p, d in zip(truth.ravel(), prediction.ravel(), naive_distance(truth).ravel()):
            for w in (2, 5) if t != 255 else ():
                counts[w, bool(d <= w)][t, p] += 1

    def miou(n):
        return np.mean([n[c, c] / (n[c].sum() + n[:, c].sum() - n[c, c]) for c in range(6) if n[c].sum()])

    command = ["--data", copy, "--labels", copy / "preds"]
    status, out, error = run(*command, "--trimap", 5, 2, "--json", copy / "a.json")
    assert status == 0, error
    trimap = json.loads((copy / "a.json").read_text())["trimap"]
    assert trimap["widths"] == [2, 5]
    assert trimap["boundary"] == pytest.approx([miou(counts[w, True]) for w in (2, 5)])
    assert trimap["interior"] == pytest.approx([miou(counts[w, False]) for w in (2, 5)])
    assert trimap["share"] == pytest.approx([counts[w, True].sum() / (counts[w, True] + counts[w, False]).sum()
                                             for w in (2, 5)])
    row = next(line.split() for line in out.splitlines() if line.startswith("boundary mIoU"))
    assert row[2:] == [f"{100 * value:.1f}" for value in trimap["boundary"]]

    status, _, error = run(*command, "--json", copy / "b.json", "--trimap-plot", copy / "new" / "plot.png",
                           "--trimap-add", copy / "a.json")
    assert status == 0, error
    assert json.loads((copy / "b.json").read_text())["trimap"]["widths"] == list(evaluate.WIDTHS)
    plot = png(copy / "new" / "plot.png")
    assert plot.shape[1] == 4 * (288 + 4)               # four panels of 24 x 20 pixels, at a height of 240
    for colour in evaluate.CURVES[:2]:                  # this run, and the other one
        assert (plot == colour).all(2).sum() > 200


def test_plot_by_hand():
    """Interior 70 %, boundary 20 %: two level lines, the first one solid, the second one dashed."""
    run_of = {"widths": [10, 20], "boundary": [0.2, 0.2], "interior": [0.7, 0.7]}
    plot = evaluate.draw_trimap({"a": run_of}, 800)
    blue = (plot == evaluate.CURVES[0]).all(2)[50:]                                 # below the run's name
    rows = np.flatnonzero(blue.sum(1) > 100)                                        # the curves: columns 420 to 780
    upper, lower = rows[rows < rows.mean()], rows[rows > rows.mean()]
    assert lower.min() - upper.max() > 200                                          # the axis reaches from 20 to 70 %
    assert blue[upper].any(0).sum() >= 355 and 0.4 < blue[lower].any(0).sum() / blue[upper].any(0).sum() < 0.9
    assert not blue[upper][:, :410].any()                                           # nothing is drawn before width 10
    perfect = evaluate.draw_trimap({"a": {**run_of, "interior": [1.0, 1.0]}}, 800)
    line = np.flatnonzero((perfect == evaluate.CURVES[0]).all(2)[:, 500])
    assert abs(line.min() - 58) <= 1                    # 100 % is the uppermost line, below one name
    nothing_inside = {**run_of, "interior": [0.7, None]}
    assert evaluate.draw_trimap({"a": nothing_inside}, 800).shape == (420, 800, 3)


def test_trimap_panels_show_the_regions_in_white(copy):
    """Truth: class 1 from column 32 on. Width 4: boundary columns 28..35, the rest interior, the 255 corner neither."""
    truth = np.zeros((48, 64), np.uint8)
    truth[:, 32:] = 1
    truth[:12, :12] = 255                               # (0, 0) lies farther than 4 pixels from other labels
    evaluate.write_label(copy / "SegmentationClass" / "toy_val_00000.png", truth)
    args = SimpleNamespace(trimap=[2, 4, 8], against=None)
    trimap = {"widths": [2, 4, 8], "boundary": [0.5] * 3, "interior": [0.5] * 3}
    picture = evaluate.trimap_picture(copy, "toy_val_00000", {"a": trimap}, args)
    left = 2 * (320 + 4) + 2                            # panels of 320 x 240, scaled by 5
    boundary, interior = picture[28:264:5, left + 2:left + 322:5], picture[28:264:5, left + 326:left + 646:5]
    wanted = np.zeros((48, 64))
    wanted[:, 28:36] = 255
    assert (boundary[20:, :, 0] == wanted[20:]).all() and (interior[20:, :, 0] == 255 - wanted[20:]).all()
    assert boundary[0, 0, 0] == 0 == interior[0, 0, 0]


def test_bad_trimaps(toy, tmp_path):
    command = ["--data", toy, "--labels", toy / "GrabCutMasks", "--trimap-plot", tmp_path / "plot.png"]
    (tmp_path / "none.json").write_text('{"miou": 0.5}')
    (tmp_path / "broken.json").write_text('{"miou": 0.')
    for name in ("none.json", "broken.json", "missing.json"):
        assert f"{tmp_path / name}: holds no trimap" in refused(*command, "--trimap-add", tmp_path / name)
    for scores in ({"widths": ["a"], "boundary": [0.5], "interior": [0.5]}, {"widths": [2], "boundary": ["b"],
                   "interior": [0.5]}, {"widths": [2, 4], "boundary": [0.5], "interior": [0.5]}):
        (tmp_path / "odd.json").write_text(json.dumps({"trimap": scores}))
        assert "odd.json: holds no trimap" in refused(*command, "--trimap-add", tmp_path / "odd.json")
    (tmp_path / "odd.json").write_text('{"trimap": {"widths": [2], "boundary": [0.5], "interior": [null]}}')
    shutil.copytree(tmp_path, tmp_path / "copy" / tmp_path.name)                    # .../NAME/odd.json twice
    assert "two curves would have the same name" in refused(
        *command, "--trimap-add", tmp_path / "odd.json", tmp_path / "copy" / tmp_path.name / "odd.json")
    assert "two curves would have the same name" in refused(
        *command, "--json", tmp_path / "copy" / tmp_path.name / "odd.json", "--trimap-add", tmp_path / "odd.json")
    for wrong in (["--trimap", 0], ["--trimap-add", tmp_path / "none.json"]):
        status, _, error = run("--data", toy, "--labels", toy / "GrabCutMasks", *wrong)
        assert status == 2 and "usage" in error and "--trimap" in error


# ----------------------------------------------------------------------------------------------------------------------
# two label folders

def test_against_compares_what_both_folders_have(copy, tmp_path):
    """255 in either folder leaves a pixel out, so that the two may trade places."""
    (copy / "BoxMasks" / "toy_val_00001.png").unlink()
    agree = either = 0
    for path in (copy / "BoxMasks").glob("*.png"):
        a, b = np.roll(png(path), 5, axis=1), png(copy / "SegmentationClass" / path.name)
        evaluate.write_label(path, a)
        agree, either = agree + ((a == b) & (b != 255)).sum(), either + (b != 255).sum()
    assert 0.5 < agree / either < 0.95
    pair = [copy / "BoxMasks", copy / "SegmentationClass"]
    results = []
    for labels, against in (pair, pair[::-1]):
        status, out, error = run("--data", copy, "--labels", labels, "--against", against, "--json", copy / "s.json")
        assert status == 0 and "pixel agreement" in out and "5 images" in out, error
        results.append(json.loads((copy / "s.json").read_text()))
        assert results[-1]["pixel_accuracy"] == pytest.approx(agree / either)
    assert results[0]["iou"] == results[1]["iou"]
    names = [path.stem for path in (copy / "BoxMasks").glob("*.png")]
    for labels, against in (pair, pair[::-1]):                                # near boundaries likewise
        counts = torch.zeros(6, 6)
        for name in names:
            p, t = png(labels / f"{name}.png"), png(against / f"{name}.png")
            near = (evaluate.boundary_distance(t) <= 2) & (p != 255)
            counts += losses.confusion_matrix(torch.from_numpy(p[near]), torch.from_numpy(t[near]), 6)
        assert run("--data", copy, "--labels", labels, "--against", against, "--trimap", 2, "--json",
                   copy / "s.json")[0] == 0
        assert json.loads((copy / "s.json").read_text())["trimap"]["boundary"] == pytest.approx(
            [losses.iou(counts).nanmean().item()])
    status, out, error = run("--data", copy, "--labels", pair[0], "--against", pair[1], "--split", "train", "--trimap",
                             2, "--pictures", tmp_path / "images", "--num-pictures", 1)
    assert status == 0 and "4 images" in out and "boundary mIoU" in out, error
    assert png(tmp_path / "images" / "toy_train_00000.png").shape[1] == 5 * (320 + 4)     # B stands for the truth


def test_bad_pairs(toy, checkpoint, tmp_path):
    assert str(tmp_path) in refused("--data", toy, "--labels", toy / "BoxMasks", "--against", tmp_path)
    missing = refused("--data", toy, "--labels", toy / "BoxMasks", "--against", tmp_path, "--split", "val")
    assert str(tmp_path / "toy_val_00000.png") in missing
    status, _, error = run("--data", toy, "--checkpoint", checkpoint, "--against", tmp_path)
    assert status == 2 and "usage" in error


# ----------------------------------------------------------------------------------------------------------------------
# best and worst, attention, affinity

def test_best_and_worst_pictures(copy, tmp_path):
    """One image with no background found, one with the left half of its labels gone, one without a mistake."""
    masks = copy / "GrabCutMasks"
    evaluate.write_label(masks / "toy_train_00002.png", np.full((48, 64), 5))
    half = masks / "toy_train_00001.png"
    evaluate.write_label(half, np.where(np.arange(64) < 32, 0, png(half)))
    (copy / "two.txt").write_text("toy_train_00001\ntoy_train_00002\ntoy_train_00003\n")
    for flags, wanted in ((["--best"], "3"), (["--worst"], "2"), (["--best", "--worst"], "23")):
        out = tmp_path / "".join(flags)
        status, _, error = run("--data", copy, "--labels", masks, "--list", copy / "two.txt", "--pictures", out,
                               "--num-pictures", 1, *flags)
        assert status == 0, error
        assert sorted(os.listdir(out)) == ["sheet.png", *(f"toy_train_0000{n}.png" for n in wanted)]


def test_attention_and_affinity_end_to_end(toy, checkpoint, tmp_path):
    status, _, error = run("--data", toy, "--checkpoint", checkpoint, "--device", "cpu", "--num-pictures", 1,
                           "--attention", tmp_path / "a", "--affinity", tmp_path / "b", "--pixels", 0, 0, 63, 47)
    assert status == 0, error
    present = set(png(toy / "SegmentationClass" / "toy_val_00000.png").ravel().tolist()) - {0, 255}
    for folder in ("a", "b"):
        assert sorted(os.listdir(tmp_path / folder)) == ["sheet.png", "toy_val_00000.png"]
    assert png(tmp_path / "a" / "toy_val_00000.png").shape[1] == (3 + len(present)) * 324   # image, truth, GrabCut
    assert png(tmp_path / "b" / "toy_val_00000.png").shape[1] == 4 * 324
    error = refused("--data", toy, "--checkpoint", checkpoint, "--device", "cpu", "--affinity", tmp_path / "b",
                    "--pixels", 0, 0, 64, 47)
    assert "0 0 64 47" in error and "64x48" in error


def test_networks_without_these_branches(toy, tmp_path):
    for branch, flag in (("attention", "--attention"), ("embedding", "--affinity")):
        plain = save_checkpoint(tmp_path / "plain.pt", CLASS_NAMES, **{branch: False})
        error = refused("--data", toy, "--checkpoint", plain, "--device", "cpu", flag, tmp_path / "out")
        assert str(plain) in error and f"no {branch} branch" in error
        status, _, error = run("--data", toy, "--labels", toy / "GrabCutMasks", flag, tmp_path / "out")
        assert status == 2 and "usage" in error


class Planted:
    """A network whose logits of alpha and whose embeddings (1, d, h, w) are given."""

    def __init__(self, attention=None, beta=None):
        self.attention, self.beta = attention, beta

    def branches(self, x):
        return None, self.attention, self.beta


def drawing(**more):
    return SimpleNamespace(device=torch.device("cpu"), amp="off", labels=None, pixels=None, scales=[1.0], **more)


def test_heat_by_hand():
    """0 is blue, 1 is red, over an image of which the colours are lost and 45 % of the brightness are left."""
    image = np.array([[[0, 0, 0], [255, 0, 0], [0, 0, 255]]], np.uint8)
    picture = evaluate.heat(image, np.array([[0.0, 1.0, 7.0]])).astype(int)
    assert picture[0, 0, 2] > picture[0, 0, 1] and picture[0, 1, 0] > picture[0, 1, 2]
    assert (picture[0, 1] == picture[0, 2]).all()                                   # above 1 as 1; both pixels grey 85


def test_attention_strip_by_hand():
    """alpha of class 2 is 1 in the left half, that of class 1 nowhere; the box of class 2 is outlined in its colour."""
    image, nothing = np.full((40, 40, 3), 100, np.uint8), np.zeros((40, 40), np.uint8)
    boxes = nothing.copy()
    boxes[5:30, 5:30] = 2
    logits = torch.full((1, 2, 40, 40), -50.0)
    logits[0, 1, :, :20] = 50
    labels = {"truth": boxes, "boxes": boxes, "GrabCut": nothing}
    pictures, present = evaluate.attention_strip(image, labels, nothing, Planted(attention=logits),
                                                 ["background", "cat", "dog"], drawing())
    assert list(pictures) == ["truth", "GrabCut", "attention: dog"] and present == {2}
    outline = nothing.copy()
    outline[5:30, 5:30] = 1
    outline[6:29, 6:29] = 0
    wanted = evaluate.heat(image, np.arange(40)[None].repeat(40, 0) < 20.0)
    wanted[outline == 1] = evaluate.colour_of(2)
    assert (pictures["attention: dog"] == wanted).all()
    assert (pictures["GrabCut"][outline == 1] == evaluate.colour_of(2)).all()


def test_affinity_strip_by_hand():
    """Embeddings: (3, 0) in the left half, (0, 1) in the right, so A is 1 to the own half and 0 to the other (Eq. 9).

    The truth: a rectangle of class 2, the largest, in the left half, whose pixels (12..22, 20) lie deepest, the
    first of them counts; one pixel of class 1. The background is deepest where it is 20 pixels to all of its edges.
    """
    image, truth = np.full((40, 80, 3), 100, np.uint8), np.zeros((40, 80), np.uint8)
    truth[10:31, 2:33], truth[0, 0] = 2, 1
    beta, nothing = torch.zeros(1, 2, 10, 20), np.zeros_like(truth)                 # what is predicted does not matter
    beta[0, 0, :, :10], beta[0, 1, :, 10:] = 3, 1
    args = drawing()
    pictures, present = evaluate.affinity_strip(image, {"truth": truth}, nothing, Planted(beta=beta), [], args)
    assert list(pictures) == ["truth", "affinity to purple", "affinity to green"] and present == {1, 2}
    left = np.arange(80)[None].repeat(40, 0) < 40
    away = abs(np.arange(80) - 39.5) > 4                                            # from the seam, which is blurred

    def assert_shows(picture, half, mark, colour):
        x, y = mark
        assert (picture[y, x] == colour).all()
        far = (abs(np.arange(80) - x)[None] > 12) | (abs(np.arange(40) - y)[:, None] > 12)
        assert ((picture == evaluate.heat(image, half.astype(float))).all(2) | ~far | ~away).all()

    assert_shows(pictures["affinity to purple"], left, (12, 20), (170, 0, 255))
    green = np.argwhere((pictures["affinity to green"] == (0, 220, 0)).all(2)).mean(0).round().astype(int)[::-1]
    assert 50 < green[0] < 62 and 17 < green[1] < 22
    assert_shows(pictures["affinity to green"], ~left, green, (0, 220, 0))
    assert (pictures["truth"][20, 12] == (170, 0, 255)).all()

    args.pixels = [41, 3, 38, 30]                       # to either side of the seam
    pictures, _ = evaluate.affinity_strip(image, {"truth": truth}, nothing, Planted(beta=beta), [], args)
    assert_shows(pictures["affinity to purple"], ~left, (41, 3), (170, 0, 255))
    assert_shows(pictures["affinity to green"], left, (38, 30), (0, 220, 0))


@pytest.mark.parametrize("c", [0, 2])
def test_affinity_where_all_is_one_class(c):
    """No object, or no background: both marks lie in the middle of what there is."""
    image, truth = np.full((20, 20, 3), 100, np.uint8), np.full((20, 20), c, np.uint8)
    network, nothing = Planted(beta=torch.ones(1, 2, 5, 5)), np.zeros_like(truth)
    pictures, present = evaluate.affinity_strip(image, {"truth": truth}, nothing, network, [], drawing())
    assert (pictures["affinity to purple"][9, 9] == (170, 0, 255)).all() and present == {c} - {0}
    assert (pictures["affinity to green"][9, 9] == (0, 220, 0)).all()


def test_narrow_and_wide_pictures():
    """A scale of colours is wider than three panels of a narrow image; JPEG's widest image has 65,500 pixels."""
    narrow, wide = np.zeros((180, 8, 3), np.uint8), np.zeros((5, 3000, 3), np.uint8)
    strip = evaluate.with_legend(evaluate.side_by_side({"image": narrow}), [1], ["background", "cat"], "attention")
    assert strip.shape[1] == 420
    assert evaluate.side_by_side({"image": wide, "prediction": wide}).shape[1] <= 65_500


# ----------------------------------------------------------------------------------------------------------------------
# a folder of plain images

def test_plain_pictures_of_all_kinds(toy, checkpoint, tmp_path):
    """Grey, with alpha, palette, webp; one photographed upright is turned upright, one is broken, one is no image."""
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
    (source / "notes.txt").write_text("no image")
    status, text, error = run("--checkpoint", checkpoint, "--images", source, "--out", out, "--device", "cpu")
    assert status == 1 and str(source / "broken.jpg") in error and "1 images were left out" in error
    assert "5 label PNGs" in text and f"1 not read in {source}: notes.txt" in text
    shapes = {"grey": (48, 64), "alpha": (17, 31), "palette": (48, 64), "web": (48, 64), "turned": (64, 48)}
    assert {path.stem: png(path).shape for path in out.glob("*.png")} == shapes
    assert {path.stem for path in (out / "overlay").iterdir()} == set(shapes)
    network, _ = load_network(checkpoint)
    expected = predict(network, np.array(picture)).argmax(0).numpy()
    assert (png(out / "web.png") == expected).mean() > 0.999


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are always Unicode there")
def test_a_name_that_is_no_utf_8(toy, checkpoint, tmp_path):
    """OpenCV crashes where it is to draw one."""
    name = os.fsdecode(b"B\xe4r")
    (tmp_path / "in").mkdir()
    shutil.copy(toy / "JPEGImages" / "toy_val_00000.jpg", tmp_path / "in" / f"{name}.jpg")
    status, _, error = command_line("--checkpoint", checkpoint, "--images", tmp_path / "in", "--out", tmp_path / "out",
                                    "--device", "cpu")
    assert status == 0, error
    assert (tmp_path / "out" / f"{name}.png").exists() and (tmp_path / "out" / "overlay" / f"{name}.jpg").exists()


def test_plain_pictures_none_of_which_can_be_read(checkpoint, tmp_path):
    for name in ("a.jpg", "b.png"):
        (tmp_path / name).write_bytes(b"no image")
    status, _, error = run("--checkpoint", checkpoint, "--images", tmp_path, "--out", tmp_path / "out", "--device",
                           "cpu")
    assert status == 2 and error.endswith("none of the 2 images could be used, see above\n")


def test_plain_pictures_with_crfs_in_processes(toy, checkpoint, tmp_path):
    (tmp_path / "three.txt").write_text("toy_val_00000\ntoy_train_00000\ntoy_train_00001\n")
    for workers in (0, 2):
        status, _, error = run("--checkpoint", checkpoint, "--device", "cpu", "--images", toy / "JPEGImages", "--list",
                               tmp_path / "three.txt", "--out", tmp_path / str(workers), "--crf", "--workers", workers)
        assert status == 0, error
    made = [{path.name: path.read_bytes() for path in (tmp_path / workers).rglob("*.*")} for workers in ("0", "2")]
    assert made[0] == made[1] and len(made[0]) == 6


def test_plain_pictures_by_list_and_where_they_cannot_go(toy, checkpoint, tmp_path):
    (tmp_path / "two.txt").write_text("toy_val_00001\ntoy_train_00000\n")
    command = ["--checkpoint", checkpoint, "--device", "cpu", "--images", toy / "JPEGImages"]
    status, _, error = run(*command, "--out", tmp_path / "out", "--list", tmp_path / "two.txt")
    assert status == 0, error
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"toy_val_00001.png", "toy_train_00000.png"}
    (tmp_path / "two.txt").write_text("toy_val_00009\n")
    assert "toy_val_00009" in refused(*command, "--out", tmp_path / "out", "--list", tmp_path / "two.txt")
    assert "overwrite" in refused(*command, "--out", toy / "JPEGImages")
    assert "overwrite" in refused(*command, "--out", toy / "SegmentationClass")  # true masks have these names, too
    (tmp_path / "empty").mkdir()
    assert "no images" in refused(*command[:-1], tmp_path / "empty", "--out", tmp_path / "out")
    assert "no folder" in refused(*command[:-1], tmp_path / "nowhere", "--out", tmp_path / "out")
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / "empty" / name)
    assert "a.jpg" in refused(*command[:-1], tmp_path / "empty", "--out", tmp_path / "out")


# ----------------------------------------------------------------------------------------------------------------------
# dense CRF

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_crf_whose_lattice_would_be_too_large_is_one_line(toy, checkpoint):
    for flags in (["--crf"], ["--crf-search", 2]):
        status, _, error = run("--data", toy, "--checkpoint", checkpoint, "--device", "cpu", "--workers", 0, *flags,
                               "--crf-xy", 0.01, "--crf-rgb", 0.01)
        assert status == 2 and "--crf: the features spread too far" in error and "none of the 2 images" in error, error


def test_a_worker_that_is_killed_is_one_line(toy, checkpoint, tmp_path, monkeypatch):
    """As by Linux where memory runs out: also where all images are with the workers before the first dies."""
    monkeypatch.setattr(evaluate, "refine_labels", die)
    why = "evaluate.py: a worker was killed, perhaps for want of memory: give fewer --workers"
    monkeypatch.setattr(evaluate, "try_crfs", die)
    for flags in (("--crf", "--workers", 1, "--split", "train"), ("--crf", "--workers", 3, "--split", "val"),
                  ("--crf-search", 2, "--workers", 3), ("--crf", "--images", toy / "JPEGImages", "--out", tmp_path)):
        status, _, error = run("--data", toy, "--checkpoint", checkpoint, "--device", "cpu", *flags)
        assert status == 2 and error.strip().splitlines()[-1] == why and "Traceback" not in error, error


@pytest.mark.parametrize("arch, preset", [
    (dict(network="DeepLabVGG16", large_fov=False), "vgg16-plain"),
    (dict(network="DeepLabVGG16", large_fov=True), "vgg16"), (dict(network="Box2SegNet"), "resnet101")])
def test_each_network_has_the_crf_of_its_preset(arch, preset):
    from crf import PRESETS
    args = dict(crf_search=None, crf_backend="torch", crf_w=None, crf_xy=None, crf_rgb=None, crf_iterations=10)
    wanted, network = PRESETS[preset] | {"iterations": 10, "backend": "torch"}, SimpleNamespace(arch=arch)
    for crf in ("auto", preset):
        assert evaluate.crf_options(network, SimpleNamespace(crf=crf, **args)) == wanted
    given = args | dict(crf_w=9.0, crf_xy=8.0, crf_rgb=7.0)
    assert evaluate.crf_options(network, SimpleNamespace(crf="auto", **given)) == wanted | dict(w=9, xy=8, rgb=7)


def kind_of(x):
    return type(x).__name__


def test_no_tensor_goes_to_a_worker():
    """Tensors would go through /dev/shm, of which a container has 64 MB; images would be left out for want of it."""
    (_, result), = evaluate.in_order(["a"], lambda name: (1,), lambda _: (torch.zeros(3),), kind_of, 1)
    assert result() == "ndarray"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_a_killed_run(toy, checkpoint, tmp_path, how):
    (tmp_path / "images").mkdir()
    for n in range(60):
        shutil.copy(toy / "JPEGImages" / "toy_val_00000.jpg", tmp_path / "images" / f"{n:02}.jpg")
    command = [sys.executable, REPOSITORY / "evaluate.py", "--checkpoint", checkpoint, "--device", "cpu", "--images",
               tmp_path / "images", "--out", tmp_path / "out", "--crf", "--crf-iterations", "500", "--workers", "2"]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while killed.poll() is None and not list(tmp_path.glob("out/*.png")):
        time.sleep(0.01)
    killed.send_signal(how)
    killed.communicate(timeout=60)                              # returns once the workers are gone, too
    assert killed.returncode == -how and len(list(tmp_path.glob("out/*.png"))) < 60


def test_crf_refines_what_is_scored_and_saved(toy, checkpoint, tmp_path):
    from crf import PRESETS, dense_crf
    network, _ = load_network(checkpoint)
    folders = {}
    for name, flags in {"plain": [], "crf": ["--crf"], "alone": ["--crf", "--workers", 0],
                        "strong": ["--crf", "vgg16", "--crf-w", 9, "--crf-iterations", 3, "--workers", 0]}.items():
        folders[name] = tmp_path / name
        status, out, error = run("--data", toy, "--checkpoint", checkpoint, "--device", "cpu", "--save-png",
                                 folders[name], *flags)
        assert status == 0, error
    changed = 0
    for path in folders["plain"].iterdir():
        image = evaluate.read_image(toy / "JPEGImages" / f"{path.stem}.jpg")
        probabilities = predict(network, image)
        assert np.array_equal(png(path), probabilities.argmax(0).numpy())
        assert np.array_equal(png(folders["crf"] / path.name), dense_crf(image, probabilities).argmax(0).numpy())
        assert np.array_equal(png(folders["crf"] / path.name), png(folders["alone"] / path.name))
        expected = dense_crf(image, probabilities, **PRESETS["vgg16"] | {"w": 9, "iterations": 3}).argmax(0)
        assert np.array_equal(png(folders["strong"] / path.name), expected.numpy())
        changed += (png(folders["crf"] / path.name) != png(path)).sum()
    assert changed > 100


def test_crf_search_draws_its_images_alike_each_time(toy, checkpoint, monkeypatch):
    drawn, ids = [], (toy / "ImageSets" / "Segmentation" / "trainval.txt").read_text().split()

    def stop(ids, *_):
        drawn.append(ids)
        raise evaluate.BadInput("enough")
    monkeypatch.setattr(evaluate, "in_order", stop)
    for _ in range(2):
        assert run("--data", toy, "--checkpoint", checkpoint, "--device", "cpu", "--split", "trainval",
                   "--crf-search", 3)[0] == 2
    assert drawn[0] == drawn[1] and len(drawn[0]) == 3 and set(drawn[0]) < set(ids) and drawn[0] != ids[:3]


def test_pictures_are_spread_evenly_over_the_list(toy, tmp_path):
    ids = (toy / "ImageSets" / "Segmentation" / "trainval.txt").read_text().split()
    status, _, error = run("--data", toy, "--labels", toy / "GrabCutMasks", "--split", "trainval", "--pictures",
                           tmp_path / "p", "--num-pictures", 2)
    assert status == 0 and {path.stem for path in (tmp_path / "p").iterdir()} == {"sheet", ids[0], ids[3]}, error


def test_crf_search_scores_each_parameter_set_as_evaluation_does(toy, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "GRID", {"xy": (20, 40), "rgb": (5,), "w": (1, 6)})
    status, out, error = run("--data", toy, "--checkpoint", checkpoint, "--device", "cpu", "--crf-search", 2,
                             "--workers", 0, "--json", tmp_path / "a.json", "--crf-iterations", 3)
    assert status == 0, error
    found = json.loads((tmp_path / "a.json").read_text())
    assert len(found) == 5 and [one["miou"] for one in found] == sorted((one["miou"] for one in found), reverse=True)
    assert out.count("what --crf takes") == 1
    best = found[0]
    assert f"--crf --crf-w {best['w']:g} --crf-xy {best['xy']:g} --crf-rgb {best['rgb']:g} --crf-iterations 3\n" in out
    for one in found:
        status, _, error = run("--data", toy, "--checkpoint", checkpoint, "--device", "cpu", "--crf", "--crf-w",
                               one["w"], "--crf-xy", one["xy"], "--crf-rgb", one["rgb"], "--crf-iterations", 3,
                               "--json", tmp_path / "b.json", "--workers", 0)
        assert status == 0, error
        assert json.loads((tmp_path / "b.json").read_text())["miou"] == pytest.approx(one["miou"], abs=1e-12)


def test_crf_and_bad_input(toy, checkpoint, copy, tmp_path):
    assert run("--data", toy, "--labels", toy / "BoxMasks", "--crf")[0] == 2
    assert run("--data", toy, "--checkpoint", checkpoint, "--device", "cpu", "--crf", "--crf-w", 0)[0] == 2
    name = sorted((copy / "JPEGImages").iterdir())[-1]  # of val
    name.write_bytes(name.read_bytes()[:200])
    for flags in (["--workers", 2], ["--workers", 0]):
        status, out, error = run("--data", copy, "--checkpoint", checkpoint, "--device", "cpu", "--crf", *flags)
        assert status == 1 and name.stem in error and "1 images" in out
    for path in (copy / "JPEGImages").iterdir():
        path.write_bytes(b"no image")
    status, out, error = run("--data", copy, "--checkpoint", checkpoint, "--device", "cpu", "--crf-search", "--workers",
                             0)
    assert status == 2 and "none of the 2 images could be used" in error
