"""The scripts of tests/ (ablation, candidate_quality, object_sizes, bench, first_picture), called as a user would."""
import argparse
import functools
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ablation as ablation_script
import bench
import first_picture
import numpy as np
import object_sizes
import pytest
import torch
from conftest import run_as_main
from grabcut_labels import class_names, read_boxes, read_label
from model import Box2SegNet
from toy_voc import make_toy_voc

HERE = Path(__file__).resolve().parent
TINY = ("--backbone efficientnet_lite0 --crop 32 --batch-size 4 --epochs 2 --scale 0.5 1 --workers 0 --device cpu "
        "--amp off --seed 0").split()


def call(script, *arguments, folder, status=0):
    ended, out, error = run_as_main(HERE / script, *arguments, folder=folder)
    assert ended == status, out + error
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A devkit, and BoxSup's ablation of two rows on it."""
    folder = tmp_path_factory.mktemp("tools")
    make_toy_voc(folder / "VOCdevkit", images=8, val=3, size=(48, 64), seed=0)
    ablation(folder)
    return folder


def ablation(folder):
    return call("ablation.py", "--data", "VOCdevkit", "--paper", "boxsup", "--rows", "rectangles", "boxsup",
                "--seeds", 3, "--", *TINY, folder=folder)


def test_ablation_prints_rows_and_runs_nothing_twice(folder):
    out = folder / "runs" / "ablation-boxsup"
    scores = {row: json.loads((out / f"{row}-3" / "done.json").read_text()) for row in ("rectangles", "boxsup")}
    logged = [json.loads(line) for line in (out / "boxsup-3" / "log.jsonl").read_text().splitlines()]
    assert scores["boxsup"]["miou"] == logged[-1]["miou"] and logged[0]["args"]["seed"] == 0  # flags after -- win
    assert len(scores["boxsup"]["masks"]) == 2 and scores["rectangles"]["masks"] == []
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}
    printed = ablation(folder)
    rows = {line.split()[0]: line.split()[1] for line in printed.splitlines() if line.startswith(tuple(scores))}
    assert rows == {row: f"{100 * score['miou']:.1f}" for row, score in scores.items()}
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")} == before


def test_what_ablation_reads_of_a_run(tmp_path):
    """Of a run of 2 epochs of 3 steps, the first in a stage of its own: the last mIoU, and eta' of the last epoch."""
    first = {"git": "abc", "versions": {"torch": "2"}, "device": "cpu"}
    steps = [{"stage": 1, "step": 3, "epoch": 1.0, "L_A": 1.0}] + [
        {"stage": 2, "step": step, "epoch": step / 3, "eta'": fills}
        for step, fills in enumerate((0.9, 0.9, 0.9, 0.1, 0.2, 0.6), 1)]
    scores = [{"stage": 2, "step": 3, "epoch": 1, "miou": 0.2}, {"stage": 2, "step": 6, "epoch": 2, "miou": 0.4}]
    for records, fills in (steps + scores, [pytest.approx(0.3)]), (scores, []):
        (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, [first, *records])))
        run = ablation_script.read_run(tmp_path)
        assert (run["miou"], run["attention"], run["git"], run["torch"]) == (0.4, fills, "abc", "2")


def test_ablation_of_a_row_that_fails_and_of_other_settings(folder):
    flags = "--data", "VOCdevkit", "--paper", "boxsup", "--rows", "rectangles", "--seeds", 0, "--", "--crop", 1
    assert "mIoU" not in call("ablation.py", "--out", "other", *flags, folder=folder, status=1)
    assert "--crop 1: expected 32" in (folder / "other" / "rectangles-0.log").read_text()
    call("ablation.py", *flags, folder=folder, status=1)  # the first test's folder: of other flags
    call("ablation.py", "--data", "nowhere", "--out", "new", folder=folder, status=1)
    assert not (folder / "new" / "settings.json").exists()      # which would refuse the right --data
    call("ablation.py", "--rows", "box2seg", "tuned-0.1", folder=folder, status=2)      # of how many steps?
    assert not (folder / "runs" / "ablation-boxsup" / "rectangles-0.log").exists()


def test_what_ablation_refuses_before_it_runs_anything(folder, tmp_path):
    (tmp_path / "cut.jsonl").write_text('{"paper": "boxs')
    for flags, status, why in (
            (["--jobs", 0], 2, "--jobs must be at least 1"), (["--", "--val-split", "none"], 2, "nothing to compare"),
            (["--record", tmp_path / "cut.jsonl"], 1, "line 1: no record"),
            (["--paper", "box2seg", "--rows", "tuned-1", "--budget", 1], 2, "add box2seg")):
        ended, out, error = run_as_main(HERE / "ablation.py", "--data", "VOCdevkit", "--paper", "boxsup", "--rows",
                                        "rectangles", "--out", tmp_path / why[:6], *flags, folder=folder)
        assert ended == status and why in error and "Traceback" not in error and "train_box" not in out, (out, error)


def test_only_the_tables_flags_hold_placeholders():
    args = argparse.Namespace(paper="boxsup", recipe="small", split=None, budget=None, rest=["--init", "OUT/SEED.pt"])
    assert ablation_script.flags_of(args, "semi", OUT="SEEDS/a", SEED=7, MISSING="m") == [
        "--recipe", "small", "--masks-list", "SEEDS/a/masks.txt", "--init", "OUT/SEED.pt"]


def test_table_5_starts_from_a_network_not_from_a_record(folder, tmp_path, monkeypatch):
    """A seed that is given twice runs once; the record of box2seg stands for it until a row needs its network."""
    started = []

    class Run:                                                  # ends at once, and leaves what a training leaves
        returncode = 0

        def __init__(self, command, **_):
            out = Path(command[command.index("--out") + 1])
            started.append((out.parent.name, out.name))
            out.mkdir(exist_ok=True)
            (out / "last.pt").touch()
            first = {"git": "abc", "versions": {"torch": "2"}, "device": "cpu"}
            (out / "log.jsonl").write_text(json.dumps(first) + '\n{"miou": 0.5}\n')

        def poll(self):
            return 0

    monkeypatch.setattr(subprocess, "Popen", Run)
    monkeypatch.setattr(subprocess, "run", lambda command: argparse.Namespace(returncode=0))

    def ablation(out, *rows):
        call("ablation.py", "--data", "VOCdevkit", "--rows", *rows, "--seeds", 0, 0, "--budget", 2, "--record",
             tmp_path / "new" / "runs.jsonl", "--out", tmp_path / out, "--", "--init", "nowhere.pt", folder=folder)

    ablation("a", "box2seg")
    ablation("b", "box2seg")
    assert started == [("a", "box2seg-0")]
    ablation("b", "box2seg", "tuned-1")
    ablation("b", "box2seg", "tuned-1")
    ablation("c", "box2seg", "tuned-1")                         # all are recorded
    assert started == [("a", "box2seg-0"), ("b", "box2seg-0"), ("b", "tuned-1-0")]
    assert len((tmp_path / "new" / "runs.jsonl").read_text().splitlines()) == 3


def test_a_killed_ablation_leaves_no_run_behind(folder, tmp_path):
    command = [sys.executable, HERE / "ablation.py", "--data", "VOCdevkit", "--paper", "boxsup", "--rows", "rectangles",
               "--seeds", "0", "--out", tmp_path / "out", "--", *TINY, "--epochs", "5000"]
    killed = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "rectangles-0" / "log.jsonl"
    while killed.poll() is None and not (log.exists() and log.read_text().count("\n") > 1):
        time.sleep(0.05)
    killed.terminate()
    error = killed.communicate(timeout=60)[1]
    assert killed.returncode == 1 and "interrupted; the same command goes on" in error
    assert (log.parent / "last.pt").exists() and "--resume" in (tmp_path / "out" / "rectangles-0.log").read_text()


def test_ablation_takes_recorded_runs(folder, tmp_path):
    """A line of --record stands for a run with the same arguments, wherever the data lies; one other argument, if only
    a default that has changed since, and it does not."""
    settings = json.loads((folder / "runs" / "ablation-boxsup" / "settings.json").read_text())
    arguments = settings["arguments"]["rectangles"]
    assert (arguments["supervision"], arguments["crop"], arguments["lambda_r"]) == ("rectangles", 32, 3.0)
    run = {"paper": "boxsup", "row": "rectangles", "seed": 3, "miou": 0.123, "masks": [], "arguments": arguments}
    record = tmp_path / "runs.jsonl"
    record.write_text(json.dumps(run) + "\n")
    flags = ("--data", "VOCdevkit", "--paper", "boxsup", "--rows", "rectangles", "--seeds", 3, "--record", record,
             "--out", tmp_path / "out", "--", *TINY)
    assert "12.3" in call("ablation.py", *flags, folder=folder) and record.read_text().count("\n") == 1
    record.write_text(json.dumps(run | {"arguments": arguments | {"min_recognized": 0.2}}) + "\n")
    shutil.rmtree(tmp_path / "out")
    assert "12.3" not in call("ablation.py", *flags, folder=folder)
    old, new = map(json.loads, record.read_text().splitlines())
    assert new["arguments"] == arguments and new["miou"] != 0.123 and new["seed"] == 3 and new["device"] == "cpu"


def test_every_row_of_a_table_has_one_budget():
    """Five epochs each, one of them stage 1's where a row has it; Table 5's rows take the steps of two epochs of all
    images, those from ImageNet also the five before. Of 311 images and a batch of 8 an epoch has 38 steps, of 31 images
    3 and of 16 images 2: 2 epochs of all are 76 steps, 7 are 266."""
    args = argparse.Namespace(paper="box2seg", budget=5, stage_1=1, tune=2, images=80, batch_size=8)
    flags = {row: ablation_script.budget_flags(args, row, given) for row, (given, _) in
             ablation_script.TABLES["box2seg"].items()}
    assert flags["box2seg"] == flags["affinity"] == ["--pretrain-epochs", 1, "--epochs", 4]
    assert flags["grabcut"] == flags["mask-aw"] == ["--pretrain-epochs", 0, "--epochs", 5]
    assert flags["tuned-0.1"] == ["--epochs", 20] and flags["imagenet-0.1"] == ["--epochs", 70]
    assert flags["tuned-1"] == ["--epochs", 2] and flags["imagenet-1"] == ["--epochs", 7]
    args.images = 311
    epochs = {row: ablation_script.budget_flags(args, row, ablation_script.TABLES["box2seg"][row][0])[1]
              for row in ("tuned-1", "tuned-0.1", "tuned-0.05", "imagenet-1", "imagenet-0.1", "imagenet-0.05")}
    assert list(epochs.values()) == [2, 25, 38, 7, 89, 133]
    args.images = 20                    # of which the shares fill no batch: the run itself refuses them
    assert ablation_script.budget_flags(args, "tuned-0.1", ablation_script.TABLES["box2seg"]["tuned-0.1"][0])[1] == 4


def test_objects_that_are_missing_from_masks(folder, tmp_path):
    """Fig. 7: what is missing is background, inside boxes of the training list only; a second call changes nothing."""
    data, made = folder / "VOCdevkit", tmp_path / "missing" / "VOC2012"
    ablation_script.without_some_objects(data, None, tmp_path, share=0.5)
    changed = 0
    for path in sorted((data / "VOC2012" / "SegmentationClass").glob("*.png")):
        before, after = read_label(path), read_label(made / "SegmentationClass" / path.name)
        boxes, classes = read_boxes(data / "VOC2012" / "Annotations" / f"{path.stem}.xml",
                                    class_names(data / "VOC2012"), before.shape)
        differs, explained = before != after, np.zeros(before.shape, bool)
        for (x0, y0, x1, y1), c in zip(boxes, classes):
            explained[y0:y1, x0:x1] |= before[y0:y1, x0:x1] == c
        assert (after[differs] == 0).all() and not (differs & ~explained).any()
        assert not (differs.any() and "val" in path.stem)
        changed += differs.any()
    removed, total = map(int, re.findall(r"\d+", (tmp_path / "missing" / "done").read_text()))
    assert 0 < changed <= removed < total
    stamp = (tmp_path / "missing" / "done").stat().st_mtime_ns
    ablation_script.without_some_objects(data, None, tmp_path, share=0.5)
    assert (tmp_path / "missing" / "done").stat().st_mtime_ns == stamp


def test_two_commands_that_make_objects_missing_at_once(folder, tmp_path, monkeypatch):
    """The first to finish gives the data; the other leaves nothing behind. What is half made does not pass for made."""
    data = folder / "VOCdevkit"

    def meanwhile(*arguments):  # while this one is at work, the other command finishes
        monkeypatch.undo()
        ablation_script.without_some_objects(data, None, tmp_path)
        return ablation_script.training_list(*arguments)

    monkeypatch.setattr(ablation_script, "training_list", meanwhile)
    ablation_script.without_some_objects(data, None, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["missing"]
    (tmp_path / "missing" / "done").unlink()
    with pytest.raises(OSError):
        ablation_script.without_some_objects(data, None, tmp_path)


def test_candidate_quality(folder):
    row = call("candidate_quality.py", "--data", "VOCdevkit", "--method", "box", folder=folder).splitlines()[-1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "box" and int(cells[1]) > 0 and cells[2] == "1" and 0.3 < float(cells[4].split(" / ")[0]) < 0.9


def test_what_the_choice_makes_of_candidates(folder):
    """lambda 0 does not ask the network; with any lambda "cheapest" is at least as good as chance on such images."""
    out = call("candidate_quality.py", "--data", "VOCdevkit", "--split", "train", "--checkpoint",
               "runs/ablation-boxsup/boxsup-3/last.pt", "--lambda-r", 0, 1, "--min-recognized", 0, 2, folder=folder)
    lines = out.splitlines()
    assert lines[0].startswith("8 images; the network itself: ") and lines[2].startswith("| boxes recognized by | ")
    rows = [[float(x) for x in line.strip("|").split("|")] for line in lines[4:]]
    assert [row[:3] for row in rows] == [[0, 1, 0], [0, 1, 1], [2, 0, 0], [2, 0, 1]]
    assert all(0 < x < 100 for row in rows for x in row[3:]) and rows[0][3] > 40     # by the box alone, isolated shapes
    assert rows[2][3:] == rows[3][3:] == rows[0][3:]        # no box is recognized by twice its area: E_o alone
    copied = folder / "copied" / "VOC2012"
    shutil.copytree(folder / "VOCdevkit" / "VOC2012", copied)
    source = json.loads((copied / "Candidates-mcg" / "source.json").read_text())
    source["class_names"][1:3] = source["class_names"][2:0:-1]
    (copied / "Candidates-mcg" / "source.json").write_text(json.dumps(source))
    call("candidate_quality.py", "--data", "copied", "--split", "train", "--checkpoint",
         "runs/ablation-boxsup/boxsup-3/last.pt", folder=folder, status=2)      # of other classes


def test_bench_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "drawn", functools.partial(bench.drawn, height=192, width=256))
    monkeypatch.setitem(bench.SIZES["small"], "affinity_sides", (8, 16, 32))
    monkeypatch.chdir(tmp_path)
    assert bench.main(["stages", "affinity", "--repeat", "1", "--json", "bench.json"]) == 0
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "bench.json").read_text())
    assert report["failed"] == [] and report["command"].endswith("--json bench.json") and report["hardware"]["cores"]
    names = [row["name"] for row in report["rows"]]
    assert names[0] == "stages contour_strength" and names[-1] == "affinity growth" and len(names) == 12
    for row in report["rows"]:
        assert row["name"] in printed and row["low"] <= row["ratio"] <= row["high"] and row["ours"] > 0
    assert "no row stage:" in subprocess.run([sys.executable, HERE / "bench.py", "stage"], capture_output=True,
                                             text=True).stderr


def test_bench_of_a_label_update(tmp_path):
    c = argparse.Namespace(folder=tmp_path, pictures=2, boxsup="resnet18", device="cpu", repeat=1)
    assert bench.update(c)["name"] == "update"


def test_first_picture(tmp_path, monkeypatch, capsys):
    """On a rectangle in place of each photograph: B, M and a candidate are that rectangle; a checkpoint adds its
    prediction."""
    rng = np.random.default_rng(0)

    def drawn(name):
        image = rng.integers(30, 50, (120, 160, 3), np.uint8)
        image[20:100, 40:120] = (220, 40, 40)
        return image

    ious, shown = [], first_picture.shown

    def watched(image, labels, names, *width):
        inside, everywhere = np.count_nonzero(labels[20:100, 40:120]), np.count_nonzero(labels)
        ious.append(inside / (80 * 80 + everywhere - inside))
        return shown(image, labels, names, *width)

    monkeypatch.setattr(first_picture, "photograph", drawn)
    monkeypatch.setattr(first_picture, "shown", watched)
    monkeypatch.setattr(first_picture, "PHOTOGRAPHS", {"a": ("cat", (40, 20, 120, 100)),
                                                       "b": ("person", (40, 20, 120, 100))})
    first_picture.main(["--out", str(tmp_path / "new" / "first.jpg")])
    assert (tmp_path / "new" / "first.jpg").stat().st_size > 1000
    box, grabcut, *candidates = np.array(ious).reshape(2, 7).T  # of each row: B, M, five candidates
    assert (box == 1).all() and grabcut.min() > 0.95
    assert np.max(candidates, 0).min() > 0.95  # one of them at least: a segment with a notch has the same tight box

    network = Box2SegNet(21, "resnet18")
    checkpoint = {"model": network.state_dict(), "arch": network.arch, "class_names": first_picture.VOC_CLASSES,
                  "args": {"val_scale": 0.5}}
    torch.save(checkpoint, tmp_path / "network.pt")
    without = first_picture.row("a", None, first_picture.VOC_CLASSES, 1.0)
    with_one = first_picture.row("a", network, first_picture.VOC_CLASSES, 0.5)
    assert list(with_one) == [*without, "prediction"]
    first_picture.main(["--out", str(tmp_path / "second.jpg"), "--checkpoint", str(tmp_path / "network.pt")])
    assert "second.jpg" in capsys.readouterr().out
    with pytest.raises(first_picture.BadInput, match="does not know the class cat"):
        first_picture.row("a", network, ["background", "dog"], 1.0)
    with pytest.raises(first_picture.BadInput, match="no such file"):
        first_picture.main(["--checkpoint", str(tmp_path / "none.pt")])
    with pytest.raises(first_picture.BadInput, match="the name of a file"):
        first_picture.main(["--out", str(tmp_path)])


def test_first_picture_without_scikit_image(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(first_picture.BadInput, match="pip install scikit-image"):
        first_picture.photograph("chelsea")


def test_object_sizes_by_hand(folder):
    """A box of 3x2 pixels: 3 of 4 true ones are found, and a false one; that on the ignored pixel does not count."""
    truth, labels = np.zeros((10, 10), np.uint8), np.zeros((10, 10), np.uint8)
    truth[1:3, 1:4] = [[2, 2, 255], [2, 2, 0]]
    labels[1:3, 1:4] = [[2, 2, 2], [2, 1, 2]]
    labels[5:, 5:] = 2  # outside the box: does not count
    scores = object_sizes.object_scores(labels, truth, [[1, 1, 4, 3], [0, 0, 10, 10]], [2, 7])
    assert np.allclose(scores, [[0.06, 3 / 5, 3 / 4], [1, np.nan, np.nan]], equal_nan=True)
    voc = folder / "VOCdevkit" / "VOC2012"
    table = call("object_sizes.py", "--data", "VOCdevkit", "--labels", voc / "SegmentationClass", folder=folder)
    assert table.splitlines()[-1].endswith("| 100.0 (100.0) |")
    assert {line.count("|") for line in table.splitlines()} == {4}      # sizes of which there is no object, too
    assert "no label" in subprocess.run([sys.executable, HERE / "object_sizes.py", "--data", folder, "--labels", voc],
                                        capture_output=True, text=True).stderr
