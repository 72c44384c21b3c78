"""train_boxsup.py: choice of segments, label update, every row of the tables, interrupts, processes, bad input."""
import functools
import json
import os
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
from conftest import kept_signals, refused
from toy_voc import make_toy_voc

import grabcut_labels
import losses
import mcg_candidates
import train_boxsup
from model import load_network, normalize
from train_boxsup import choose, paint, read_label, read_list

SCRIPT = Path(__file__).resolve().parent.parent / "train_boxsup.py"
# The least that still has every part: 3 steps an epoch.
TINY = ("--recipe small --backbone efficientnet_lite0 --crop 32 --batch-size 4 --epochs 2 --scale 0.5 1 --workers 0 "
        "--log-every 1 --device cpu --amp off --top-k 2").split()


def grid_candidates(voc, ids, folder):
    """Candidates without a segmentation method: cells of 2x2 pixels, and per object the cells in its box, those of its
    true mask (both by more than half), and three halves of it. Row 0 is the whole image."""
    names = train_boxsup.class_names(voc)
    mcg_candidates.claim_folder(folder, voc / "JPEGImages", names, "mcg")
    for image_id in ids:
        truth = read_label(voc / "SegmentationClass" / f"{image_id}.png")
        height, width = truth.shape
        superpixels = (np.arange(height)[:, None] // 2 * (width // 2) + np.arange(width) // 2).astype(np.int32)
        boxes, classes = train_boxsup.read_boxes(voc / "Annotations" / f"{image_id}.xml", names, truth.shape)
        area = np.bincount(superpixels.ravel())
        members = [np.ones(len(area), bool)]
        for (x0, y0, x1, y1), c in zip(boxes, classes):
            inside = np.zeros(truth.shape, bool)
            inside[y0:y1, x0:x1] = True
            left = inside & (np.arange(width) < (x0 + x1) // 2)
            top = inside & (np.arange(height)[:, None] < (y0 + y1) // 2)
            for mask in (inside, inside & (truth == c), left, top, left & top):
                cells = 2 * np.bincount(superpixels[mask], minlength=len(area)) > area
                if cells.any():
                    members.append(cells)
        mcg_candidates.write_candidates(folder / f"{image_id}.npz", superpixels, np.array(members), boxes, classes)


def draw(folder, images, seed):
    data = folder / "VOCdevkit"
    make_toy_voc(data, images=images, val=3, size=(48, 64), seed=seed)
    voc = data / "VOC2012"
    grid_candidates(voc, read_list(voc / "ImageSets" / "Segmentation" / "train.txt"), voc / "Candidates-mcg")
    return data


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("toy"), 12, 0)


def train(toy, out, *flags):
    """One run in this process -> exit status."""
    with kept_signals():
        return train_boxsup.main(["--data", str(toy), "--out", str(out), *TINY, *map(str, flags)])


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def masks_of(out):
    return {path.name: path.read_bytes() for path in (out / "masks").glob("*.png")}


def assert_same_run(a, b):
    """Two folders hold the same run, bit for bit: weights, momentum, choices, masks, every logged loss and score."""
    one, two = (torch.load(out / "last.pt", weights_only=True) for out in (a, b))
    for name in one["model"]:
        assert torch.equal(one["model"][name], two["model"][name]), name
    for key, state in one["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], two["optimizer"]["state"][key]["momentum_buffer"])
    assert torch.equal(one["choices"], two["choices"]) and torch.equal(one["boxes_of"], two["boxes_of"])
    assert (one["step"], one["best"]) == (two["step"], two["best"])
    assert masks_of(a) == masks_of(b)
    logs = [[{k: v for k, v in r.items() if k != "images_per_second"} for r in log_of(out) if "args" not in r]
            for out in (a, b)]
    assert logs[0] == logs[1]


# ---------------------------------------------------------------------------------------------------------------------
# Choosing and painting
# ---------------------------------------------------------------------------------------------------------------------

def test_choose_draws_evenly_from_the_k_cheapest():
    cost = np.array([[5.0, 1.0, 4.0, 2.0, 3.0, 0.0]])
    overlaps = np.array([[True, True, True, True, True, False]])  # the cheapest of all does not meet the box
    rng = np.random.default_rng(0)
    drawn = [int(choose(cost, overlaps, 3, rng)[0]) for _ in range(3000)]
    assert set(drawn) == {1, 3, 4}
    assert all(900 < drawn.count(n) < 1100 for n in (1, 3, 4))
    assert {int(choose(cost, overlaps, 1, rng)[0]) for _ in range(20)} == {1}
    assert {int(choose(cost, overlaps, 99, rng)[0]) for _ in range(300)} == {0, 1, 2, 3, 4}


def test_choose_leaves_a_box_that_nothing_overlaps():
    choice = choose(np.ones((2, 3)), np.array([[False, True, False], [False] * 3]), 5, np.random.default_rng(0))
    assert choice.tolist() == [1, -1] and choice.dtype == np.int32
    assert choose(np.ones((0, 3)), np.ones((0, 3), bool), 5, np.random.default_rng(0)).shape == (0,)
    assert choose(np.ones((1, 0)), np.ones((1, 0), bool), 5, np.random.default_rng(0)).tolist() == [-1]


def test_paint_puts_the_smaller_box_on_top_and_fills_boxes_without_a_segment():
    """A 4x6 image: class 1's box is 4x4 and has a segment that leaves it, which is cut off there; class 2's, 2x3, has
    none."""
    segment = np.zeros((4, 6), bool)
    segment[0, :] = segment[1, 1:3] = True
    for order in ([0, 1], [1, 0]):
        boxes, classes = np.array([[0, 0, 4, 4], [2, 1, 5, 3]])[order], np.array([1, 2], np.uint8)[order]
        segments = [[segment, None][k] for k in order]
        assert paint((4, 6), boxes, classes, segments).tolist() == [
            [1, 1, 1, 1, 0, 0],
            [0, 1, 2, 2, 2, 0],
            [0, 0, 2, 2, 2, 0],
            [0, 0, 0, 0, 0, 0]]


# ---------------------------------------------------------------------------------------------------------------------
# The label update
# ---------------------------------------------------------------------------------------------------------------------

class Oracle(torch.nn.Module):
    """A network that knows the truth: logits 9 for the true class, at full size; it looks images up by their sum."""
    def __init__(self, voc, ids, num_classes):
        super().__init__()
        self.unused, self.num_classes, self.truth = torch.nn.Parameter(torch.zeros(1)), num_classes, {}
        for i in ids:
            labels = torch.from_numpy(read_label(voc / "SegmentationClass" / f"{i}.png").astype(np.int64))
            image = torch.from_numpy(train_boxsup.read_image(voc / "JPEGImages" / f"{i}.jpg"))
            self.truth[round(normalize(image[None]).double().sum().item(), 3)] = labels

    def forward(self, x):
        labels = self.truth[round(x.double().sum().item(), 3)]
        labels = torch.where(labels == 255, 0, labels)
        return 9.0 * torch.nn.functional.one_hot(labels, self.num_classes).permute(2, 0, 1)[None].float()


def update(toy, out, network, **options):
    """One label update of the drawn set -> its report and the images."""
    voc = toy / "VOC2012"
    names = train_boxsup.class_names(voc)
    args, _ = train_boxsup.parse_arguments(["--data", str(toy), *TINY])
    vars(args).update(options)
    images, _ = train_boxsup.training_images(voc, names, args, out)
    (out / "masks").mkdir(parents=True, exist_ok=True)
    choices, sums, confusion = train_boxsup.update_labels(
        network, images, images.updated, {}, 0, args, len(names), [])
    return choices, sums, losses.iou(confusion).nanmean().item(), images


def test_before_the_first_epoch_the_tight_box_decides(toy, tmp_path):
    choices, sums, _, images = update(toy, tmp_path, None, top_k=1)
    boxes = 0
    for index, choice in choices.items():
        c = mcg_candidates.read_candidates(images.files(index)[2])
        for k, n in enumerate(choice):
            ious = mcg_candidates.box_iou(c["boxes"][k], c["candidate_boxes"])
            assert ious[n] == ious.max()
            boxes += 1
        expected = paint(c["superpixels"].shape, c["boxes"], c["classes"],
                         [c["members"][n][c["superpixels"]] for n in choice])
        assert np.array_equal(read_label(images.files(index)[1]), expected)
    assert sums["assigned"] == boxes and sums["rectangles"] == 0
    assert sums["cost"] == pytest.approx(boxes - sums["box_iou"], rel=1e-5)


def test_a_network_that_knows_more_finds_better_masks(toy, tmp_path):
    voc = toy / "VOC2012"
    ids = read_list(voc / "ImageSets" / "Segmentation" / "train.txt")
    oracle = Oracle(voc, ids, len(train_boxsup.class_names(voc))).eval()
    _, _, by_box, _ = update(toy, tmp_path / "a", None, top_k=1)
    _, _, by_both, _ = update(toy, tmp_path / "b", oracle, top_k=1)
    _, _, by_one_of_5, _ = update(toy, tmp_path / "c", oracle, top_k=5)
    _, _, weight_0, _ = update(toy, tmp_path / "d", oracle, top_k=1, lambda_r=0.0)
    assert by_both > by_box + 0.05 and by_both > by_one_of_5 + 0.05 and weight_0 == pytest.approx(by_box)
    assert by_both > 0.7  # what cells of 2x2 pixels can draw


def test_lambda_is_each_boxs_own_and_the_network_sees_the_image_at_its_scale(toy, tmp_path, monkeypatch):
    """Of an image's boxes every second is recognized: 3 for those, 0 for the others."""
    weights, scales, cost, full = [], [], losses.candidate_cost, train_boxsup.full_size_logits
    monkeypatch.setattr(losses, "recognized_share", lambda logits, boxes, classes: torch.tensor(
        [0.29, 0.3] * len(boxes))[:len(boxes)])
    monkeypatch.setattr(losses, "candidate_cost", lambda *a, **k: weights.append(k["weight"]) or cost(*a, **k))
    monkeypatch.setattr(train_boxsup, "full_size_logits", lambda network, image, scale: scales.append(scale) or full(
        network, image, 1.0))
    voc = toy / "VOC2012"
    ids = read_list(voc / "ImageSets" / "Segmentation" / "train.txt")
    oracle = Oracle(voc, ids, len(train_boxsup.class_names(voc))).eval()
    choices, *_ = update(toy, tmp_path, oracle, lambda_r=3.0, min_recognized=0.3, val_scale=0.5)
    assert [w.flatten().tolist() for w in weights] == [([0.0, 3.0] * len(c))[:len(c)] for c in choices.values()]
    assert max(map(len, weights)) > 1 and all(w.shape[1] == 1 for w in weights) and scales == [0.5] * len(choices)


def test_a_box_that_no_candidate_meets_keeps_its_rectangle(toy, tmp_path, monkeypatch):
    original = losses.overlap_cost

    def first_meets_none(boxes, candidate_boxes):
        cost = original(boxes, candidate_boxes)
        cost[0] = 1
        return cost

    monkeypatch.setattr(losses, "overlap_cost", first_meets_none)
    choices, sums, _, images = update(toy, tmp_path, None)
    assert all(choice[0] == -1 and (choice[1:] >= 0).all() for choice in choices.values())
    assert sums["rectangles"] == len(choices)


def test_what_the_report_adds_up_by_hand():
    """Three boxes, six segments, of which the first box meets two and the last none. E_o alone would draw among the
    two: 1 and 0.8; and among the second box's five best: 0.6 to 0.2."""
    overlap = np.array([[0, .2, 1, 1, 1, 1], [.9, .4, .5, .6, .7, .8], [1, 1, 1, 1, 1, 1]])
    sums = train_boxsup.measure(np.array([1, 2, -1]), overlap + 0.25, overlap, np.array([1, 3, -1]), 5)
    assert sums == pytest.approx({"assigned": 2, "rectangles": 1, "cost": 0.7 + 0.5, "box_iou": 0.8 + 0.5, "changed": 1,
                                  "box_iou_alone": 0.9 + 0.4})
    assert train_boxsup.measure(np.array([-1]), overlap[:1, :0], overlap[:1, :0], None, 5)["changed"] == 1


def test_the_report_on_masks_by_hand(toy, tmp_path):
    """Rows are true classes, columns estimated ones; pixels of 255 do not count."""
    *_, images = update(toy, tmp_path, None)
    truth = read_label(images.voc / "SegmentationClass" / f"{images.ids[0]}.png")
    num_classes = len(train_boxsup.class_names(images.voc))
    table = train_boxsup.confusion_with_truth(images, 0, np.full_like(truth, 2), num_classes)
    assert (truth == 255).any() and table.sum() == (truth != 255).sum()
    assert table[:, 2].tolist() == [(truth == c).sum() for c in range(num_classes)]


def test_workers_and_shares_change_nothing(toy, tmp_path):
    update(toy, tmp_path / "a", None)
    update(toy, tmp_path / "b", None, workers=2)
    assert masks_of(tmp_path / "a") == masks_of(tmp_path / "b") and len(masks_of(tmp_path / "a")) == 12


# ---------------------------------------------------------------------------------------------------------------------
# The rows
# ---------------------------------------------------------------------------------------------------------------------

def test_the_paper_recipe_is_the_paper():
    args, _ = train_boxsup.parse_arguments([])
    assert (args.backbone, args.pretrained, args.large_fov, args.method) == ("vgg16", True, False, "mcg")
    assert (args.epochs, args.batch_size, args.lr, args.lr_drop, args.top_k, args.lambda_r) == (45, 20, 1e-3, 15, 5, 3)
    assert (args.warm_up, args.min_recognized, args.supervision) == (1, 0.3, "candidates")
    assert (args.encoder_lr, args.scale, args.colour, args.clip_norm) == (1, [1, 1], 0, 0)
    assert (args.val_scale, args.freeze_bn) == (1, False)
    assert (args.crop, args.momentum, args.weight_decay, args.head_lr) == (321, 0.9, 5e-4, 10)
    assert args.show_epochs == [1, 5, 20]


def test_of_equal_costs_the_first_is_cheapest():
    cost = np.random.default_rng(0).integers(0, 3, (20, 100)).astype(float)
    drawn = choose(cost, np.ones(cost.shape, bool), 1, np.random.default_rng(0))
    assert drawn.tolist() == cost.argmin(1).tolist()


def test_the_seed_decides_all_draws(toy, tmp_path, monkeypatch):
    """Key by key: the first number is the seed, and of the order of the images seed + 1."""
    keys, starts, rng, seed_of, start = set(), [], np.random.default_rng, train_boxsup.seed_of, torch.manual_seed
    monkeypatch.setattr(np.random, "default_rng", lambda key: keys.add((len(key), key[0])) or rng(key))
    monkeypatch.setattr(train_boxsup, "seed_of", lambda *key: keys.add(("dropout", key[0])) or seed_of(*key))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: starts.append(seed) or start(seed))
    assert train(toy, tmp_path, "--seed", 7, "--epochs", 1) == 0
    assert keys == {(2, 8), (3, 7), (4, 7), ("dropout", 7)} and starts[0] == 7


@pytest.mark.parametrize("labels", train_boxsup.SUPERVISION)
def test_every_row_trains_on_its_own_labels(toy, tmp_path, labels, monkeypatch, capsys):
    voc, seen = toy / "VOC2012", []
    ids = read_list(voc / "ImageSets" / "Segmentation" / "train.txt")
    flags = []
    if labels == "grabcut":
        for i in ids:
            train_boxsup.write_label(tmp_path / f"{i}.png", np.full((48, 64), 3))
        flags = ["--grabcut", tmp_path]
    original = train_boxsup.read_label
    monkeypatch.setattr(train_boxsup, "read_label", lambda path, *rest: seen.append(path) or original(path, *rest))
    assert train(toy, tmp_path / "out", "--supervision", labels, *flags) == 0
    folder = {"grabcut": tmp_path, "masks": voc / "SegmentationClass"}.get(labels, tmp_path / "out" / "masks")
    assert {path.stem for path in seen if path.parent == folder} >= set(ids)
    log = log_of(tmp_path / "out")
    assert log[0]["args"]["supervision"] == labels and log[0]["versions"]["torch"] == torch.__version__
    updates = [r for r in log if "labels_of_epoch" in r]
    assert [r["labels_of_epoch"] for r in updates] == ([1, 2] if labels == "candidates" else [])
    assert [r["epoch"] for r in log if "miou" in r] == [1, 2]
    assert [r["step"] for r in log if "E_r" in r] == [1, 2, 3, 4, 5, 6]
    out = capsys.readouterr().out
    assert "train  epoch 2/2  E_r" in out and ("labels epoch 2/2  cost" in out) == (labels == "candidates")
    if labels == "rectangles":
        names = train_boxsup.class_names(voc)
        boxes, classes = train_boxsup.read_boxes(voc / "Annotations" / f"{ids[0]}.xml", names, (48, 64))
        assert np.array_equal(original(folder / f"{ids[0]}.png"), mcg_candidates.box_mask(boxes, classes, (48, 64)))
    if labels == "grabcut":                             # labels of another make, which say so, or do not
        names, other = train_boxsup.class_names(voc), tmp_path / "other"
        shutil.copytree(tmp_path, other, ignore=shutil.ignore_patterns("out", "other"))
        (other / "source.json").write_text(json.dumps({"images": "i", "class_names": names, "method": "grabcut"}))
        with pytest.raises(train_boxsup.BadInput, match="GrabCut masks than these"):
            train(toy, tmp_path / "out", "--supervision", labels, "--resume", "--grabcut", other)
        assert train(toy, tmp_path / "out", "--supervision", labels, "--resume", *flags) == 0
    if labels == "candidates":
        assert (tmp_path / "out" / "masks.png").exists()
        assert set(updates[0]) >= {"boxes", "rectangles", "cost", "box_iou", "changed", "mask_miou"}
        assert updates[0]["changed"] == 1 and 0 < updates[1]["changed"] < 1


def test_dropout_draws_anew_each_step(toy, tmp_path, monkeypatch):
    seeds, original = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or original(seed))
    assert train(toy, tmp_path) == 0
    assert len(seeds) == len(set(seeds)) == 1 + 6                                # the start's, and one a step


def test_training_learns(toy, tmp_path):
    assert train(toy, tmp_path, "--supervision", "masks", "--epochs", 15, "--val-every", 15, "--lr-drop", 15) == 0
    curve = [r["E_r"] for r in log_of(tmp_path) if "E_r" in r]
    assert np.mean(curve[-6:]) < 0.7 * np.mean(curve[:6])


def test_scores_and_costs_are_computed_in_float32(toy, tmp_path, monkeypatch):
    modes, original = set(), train_boxsup.Box2SegNet.forward

    def forward(network, *args, **kwargs):
        modes.add((network.training, torch.is_autocast_enabled("cpu")))
        return original(network, *args, **kwargs)

    monkeypatch.setattr(train_boxsup.Box2SegNet, "forward", forward)
    assert train(toy, tmp_path, "--amp", "bf16", "--epochs", 2) == 0
    assert modes == {(True, True), (False, False)}


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_follows_float32(toy, tmp_path, monkeypatch, amp):
    # A step in fp16 takes seconds on most processors, so none is spent on overflows that halve the scale.
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=16))
    for name in ("off", amp):
        assert train(toy, tmp_path / name, "--amp", name, "--batch-size", 12, "--lr", 1e-4) == 0
    curves = [[r["E_r"] for r in log_of(tmp_path / name) if "E_r" in r] for name in ("off", amp)]
    assert curves[0] != curves[1] and np.allclose(*curves, rtol=0.1)
    costs = [[r["cost"] for r in log_of(tmp_path / name) if "labels_of_epoch" in r] for name in ("off", amp)]
    assert costs[0][0] == costs[1][0] and costs[0][1] != costs[1][1] == pytest.approx(costs[0][1], rel=0.1)
    scaler = torch.load(tmp_path / amp / "last.pt", weights_only=True)["scaler"]
    assert not scaler if amp == "bf16" else scaler["scale"] >= 1 and scaler["_growth_tracker"] > 0  # steps taken


def test_the_rate_falls_in_steps_and_the_last_layer_has_its_own(toy, tmp_path):
    assert train(toy, tmp_path, "--supervision", "masks", "--epochs", 3, "--lr-drop", 1, "--head-lr", 10) == 0
    rates = {r["step"]: r["lr"] for r in log_of(tmp_path) if "E_r" in r}
    assert [rates[step] for step in (1, 3, 4, 6, 7, 9)] == pytest.approx([0.02, 0.02, 2e-3, 2e-3, 2e-4, 2e-4])
    checkpoint = torch.load(tmp_path / "last.pt", weights_only=True)
    groups = checkpoint["optimizer"]["param_groups"]                           # encoder, between, last layer
    assert [group["lr"] for group in groups] == pytest.approx([2e-4, 2e-4, 2e-3])
    network, _ = load_network(tmp_path / "last.pt")
    encoder = len(list(network.encoder.parameters()))
    assert [len(group["params"]) for group in groups] == [encoder, len(list(network.parameters())) - encoder - 2, 2]
    assert network.last_layer.out_channels == len(checkpoint["class_names"])


def test_a_run_whose_gradients_are_cut_says_so(toy, tmp_path, capsys):
    assert train(toy, tmp_path, "--supervision", "masks", "--epochs", 1, "--clip-norm", 0.001) == 0
    assert "100% of the gradients were cut to --clip-norm 0.001" in capsys.readouterr().out
    assert {record["clipped"] for record in log_of(tmp_path) if "E_r" in record} == {1}


def test_during_the_warm_up_there_is_no_feedback(toy, tmp_path, monkeypatch):
    asked, original = [], losses.candidate_cost
    monkeypatch.setattr(losses, "candidate_cost", lambda *args, **kwargs: asked.append(1) or original(*args, **kwargs))
    assert train(toy, tmp_path, "--warm-up", 2, "--epochs", 3, "--top-k", 1, "--min-recognized", 0) == 0
    assert len(asked) == 12
    updates = [r for r in log_of(tmp_path) if "labels_of_epoch" in r]
    assert updates[1]["changed"] == 0 and updates[1]["cost"] == updates[0]["cost"] < updates[2]["cost"]


def test_lambda_holds_for_the_boxes_that_the_network_recognizes(toy, tmp_path, monkeypatch):
    """A network that recognizes too little of every box changes nothing, whatever lambda; with one that recognizes
    enough costs are those of a constant lambda."""
    def updates(name, *flags):
        assert train(toy, tmp_path / name, "--epochs", 2, "--top-k", 1, "--lr", 0, "--lambda-r", 3, *flags) == 0
        return [r for r in log_of(tmp_path / name) if "labels_of_epoch" in r]

    constant = updates("constant", "--min-recognized", 0)
    for share, same in ((0.0, "first"), (0.29, "first"), (0.31, "constant"), (1.0, "constant")):
        monkeypatch.setattr(losses, "recognized_share", lambda logits, boxes, classes: torch.full((len(boxes),), share))
        first, second = updates(f"share-{share}")
        assert second["cost"] == (first if same == "first" else constant[1])["cost"] and first == constant[0]
    assert constant[1]["cost"] > constant[0]["cost"]


def test_scraps_are_reported(toy, tmp_path, monkeypatch, capsys):
    """A network whose say makes segments that do not fit their boxes: the run says what to do."""
    assert train(toy, tmp_path / "fine", "--epochs", 1) == 0
    (update,) = [r for r in log_of(tmp_path / "fine") if "labels_of_epoch" in r]
    assert 0.9 * update["box_iou_alone"] <= update["box_iou"] <= 1.1 * update["box_iou_alone"] < 1.1
    assert train(toy, tmp_path / "loose", "--epochs", 1, "--top-k", 50) == 0             # poor, but not its doing
    (loose,) = [r for r in log_of(tmp_path / "loose") if "labels_of_epoch" in r]
    assert loose["box_iou_alone"] < 0.9 * update["box_iou_alone"]
    assert "--min-recognized" not in capsys.readouterr().out
    monkeypatch.setattr(losses, "candidate_cost", lambda *a, boxes, candidate_boxes, **k: -losses.overlap_cost(
        boxes, candidate_boxes))
    assert train(toy, tmp_path / "scraps", "--epochs", 2) == 0
    assert "a larger --min-recognized or a longer --warm-up" in capsys.readouterr().out


def test_segments_and_crops_are_drawn_independently(toy, tmp_path, monkeypatch):
    """NumPy takes a seed (0, 3) and a seed (0, 3, 0) for the same: no two draws may be equal but for such zeros."""
    keys, original = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda key: keys.append(key) or original(key))
    assert train(toy, tmp_path, "--epochs", 2) == 0
    keys = [key for key in keys if len(key) > 2]  # of crops and of segments; (seed, epoch) is the order's
    assert len(keys) == 2 * 12 + 2 * 12
    assert len({np.trim_zeros(key, "b") for key in keys}) == len(keys)


def test_semi_supervision_trains_on_truth_where_there_is_some(toy, tmp_path):
    voc = toy / "VOC2012"
    ids = read_list(voc / "ImageSets" / "Segmentation" / "train.txt")
    (tmp_path / "masks.txt").write_text("\n".join(ids[:5]) + "\n")
    assert train(toy, tmp_path / "out", "--masks-list", tmp_path / "masks.txt") == 0
    assert {name[:-4] for name in masks_of(tmp_path / "out")} == set(ids[5:])
    checkpoint = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    assert checkpoint["images"] == 12 and len(checkpoint["boxes_of"]) == 7
    # The list may lie elsewhere when the run goes on; but more of its images, in the same order, are another run.
    resume = ["--resume", "--out", str(tmp_path / "out"), "--device", "cpu", "--masks-list"]
    (tmp_path / "masks.txt").rename(tmp_path / "moved.txt")
    assert train_boxsup.main([*resume, str(tmp_path / "moved.txt")]) == 0
    for others, words in ((ids[:7], "true or GrabCut masks than these: give .* --masks-list"), (ids, "--masks-list"),
                          (ids[3:8], "give the --data and the lists of images that it had")):
        (tmp_path / "moved.txt").write_text("\n".join(others) + "\n")
        with pytest.raises(train_boxsup.BadInput, match=words):
            train_boxsup.main([*resume, str(tmp_path / "moved.txt")])


def test_flags_without_effect_are_named(toy, tmp_path, capsys):
    assert train(toy, tmp_path / "masks", "--supervision", "masks", "--epochs", 1, "--method", "ss") == 0
    assert "--method --top-k: without effect, since no box of the list" in capsys.readouterr().out
    assert train(toy, tmp_path / "boxes", "--epochs", 1, "--method", "mcg") == 0
    assert "without effect" not in capsys.readouterr().out


def test_extra_boxes_join_in(toy, tmp_path, capsys):
    other = draw(tmp_path, 5, 1) / "VOC2012" / "Candidates-mcg"
    assert train(toy, tmp_path / "out", "--supervision", "masks", "--extra", other, "--top-k", 1) == 0
    assert "12 with masks" in (said := capsys.readouterr().out) and "0 with masks, 5 with boxes of other sets" in said
    assert not masks_of(tmp_path / "out") and len(list((tmp_path / "out" / "masks-1").glob("*.png"))) == 5
    assert len(torch.load(tmp_path / "out" / "last.pt", weights_only=True)["boxes_of"]) == 5
    source = json.loads((other / "source.json").read_text())
    (other / "source.json").write_text(json.dumps(source | {"class_names": ["background", "cat"]}))
    with pytest.raises(train_boxsup.BadInput, match="made for other classes"):
        train(toy, tmp_path / "again", "--extra", other)
    shutil.copytree(toy / "VOC2012" / "Candidates-mcg", own := tmp_path / "own")
    with pytest.raises(train_boxsup.BadInput, match="would train twice"):
        train(toy, tmp_path / "again", "--supervision", "masks", "--extra", toy / "VOC2012" / "Candidates-mcg")
    for file in own.glob("*.npz"):
        file.unlink()
    with pytest.raises(train_boxsup.BadInput, match="own: holds no candidates"):
        train(toy, tmp_path / "again", "--supervision", "masks", "--extra", own)
    with pytest.raises(mcg_candidates.BadInput, match="nowhere"):
        train(toy, tmp_path / "again", "--extra", tmp_path / "nowhere")


def test_grabcut_masks_are_told_apart_beside_extra_boxes(toy, tmp_path):
    """On --resume, too: the candidates of --extra and the GrabCut masks each have a fingerprint."""
    other = draw(tmp_path, 5, 1) / "VOC2012" / "Candidates-mcg"
    ids = read_list(toy / "VOC2012" / "ImageSets" / "Segmentation" / "train.txt")
    for i in ids:
        train_boxsup.write_label(tmp_path / f"{i}.png", np.full((48, 64), 3))
    source = {"images": "JPEGImages", "class_names": train_boxsup.class_names(toy / "VOC2012"), "method": "grabcut"}
    (tmp_path / "source.json").write_text(json.dumps(source))
    flags = ["--supervision", "grabcut", "--grabcut", tmp_path, "--extra", other]
    assert train(toy, tmp_path / "out", *flags) == 0
    assert train_boxsup.main(["--resume", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    (tmp_path / "source.json").write_text(json.dumps(source | {"min_fill": 0.5}))
    with pytest.raises(train_boxsup.BadInput, match="other candidates, boxes, true or GrabCut masks"):
        train_boxsup.main(["--resume", "--out", str(tmp_path / "out"), "--device", "cpu"])


def test_grabcut_masks_of_other_images_or_boxes_are_refused(tmp_path):
    """Two sets may have the same ids. An annotation that is newer, but draws the same boxes, changes nothing."""
    data, other = draw(tmp_path / "a", 5, 1), draw(tmp_path / "b", 5, 2)
    ids = read_list(data / "VOC2012" / "ImageSets" / "Segmentation" / "train.txt")
    for devkit in (data, other):
        grabcut_labels.make_labels(devkit / "VOC2012", ids)
    flags = "--supervision", "grabcut", "--epochs", 1
    with pytest.raises(train_boxsup.BadFile, match="GrabCutMasks: made of other images .*b.VOCdevkit"):
        train(data, tmp_path / "out", *flags, "--grabcut", other / "VOC2012" / "GrabCutMasks")
    annotation = data / "VOC2012" / "Annotations" / "toy_train_00001.xml"
    later = time.time() + 60
    os.utime(annotation, (later, later))
    assert train(data, tmp_path / "out", *flags) == 0
    text = annotation.read_text()
    annotation.write_text(text[:text.index("<object>")] + "</annotation>")
    os.utime(annotation, (later, later))
    with pytest.raises(train_boxsup.BadInput, match="toy_train_00001.xml: corrected since .* python grabcut_labels.py"):
        train(data, tmp_path / "new", *flags)
    summary = grabcut_labels.make_labels(data / "VOC2012", ids)
    os.utime(data / "VOC2012" / "BoxMasks" / "toy_train_00001.png", (later + 1, later + 1))
    assert summary["corrected"] == 1 and train(data, tmp_path / "new", *flags) == 0


def relabel(voc):
    mask = voc / "SegmentationClass" / "toy_train_00001.png"
    train_boxsup.write_label(mask, read_label(mask) % 5)


def move_a_box(voc):
    annotation = voc / "Annotations" / "toy_train_00001.xml"
    annotation.write_text(annotation.read_text().replace("<xmin>", "<xmin>1", 1))


@pytest.mark.parametrize("supervision, change", [("masks", relabel), ("rectangles", move_a_box)])
def test_other_true_masks_or_rectangles_are_told_on_resume(tmp_path, supervision, change):
    data, out = draw(tmp_path, 5, 1), tmp_path / "out"
    assert train(data, out, "--supervision", supervision, "--epochs", 1) == 0
    resume = ["--resume", "--out", str(out), "--device", "cpu"]
    assert train_boxsup.main(resume) == 0
    change(data / "VOC2012")
    with pytest.raises(train_boxsup.BadInput, match="other candidates, boxes, true or GrabCut masks"):
        train_boxsup.main(resume)


def test_images_of_another_set_may_have_the_same_ids(toy):
    images = train_boxsup.Images(toy / "VOC2012")
    images.add(["a"], toy / "VOC2012" / "JPEGImages", None, None)
    images.add(["b"], toy / "VOC2012" / "Annotations" / ".." / "JPEGImages", None, None)
    images.add(["c"], toy / "other", None, None)
    assert images.of(toy / "VOC2012" / "JPEGImages") == ["a", "b"]


def test_a_panorama_makes_no_sheet_that_the_memory_cannot_hold(toy, tmp_path):
    """Fig. 3's panels, and those of the sheet of labels, are at most 6 and 4 times as wide as high."""
    voc = tmp_path / "VOC2012"
    for name in ("JPEGImages", "Annotations", "BoxMasks"):
        (voc / name).mkdir(parents=True)
    cv2.imwrite(str(voc / "JPEGImages" / "wide.png"), np.zeros((1, 4000, 3), np.uint8))
    (voc / "Annotations" / "wide.xml").write_text("<annotation></annotation>")
    train_boxsup.write_label(voc / "BoxMasks" / "wide.png", np.zeros((1, 4000), np.uint8))
    grabcut_labels.draw_sheet(voc, ["wide"], [voc / "BoxMasks"], tmp_path / "sheet.png")
    assert cv2.imread(str(tmp_path / "sheet.png")).shape[1] == 2 * 960
    images = train_boxsup.Images(voc)
    images.add(["wide"], voc / "JPEGImages", None, voc / "BoxMasks")
    train_boxsup.show_masks(images, 0, tmp_path, 1, 1)
    assert cv2.imread(str(tmp_path / "masks.png")).shape[1] == 2 * (6 * 160 + 4)


def test_a_box_more_or_a_segment_less_is_told_on_resume(tmp_path):
    """Its image's candidates are made anew, and the choices that were saved would be one too few."""
    data, out = draw(tmp_path, 9, 1), tmp_path / "out"
    source = data / "VOC2012" / "Candidates-mcg" / "source.json"
    source.write_text(json.dumps(json.loads(source.read_text()) | {"boxes": "Annotations"}))
    assert train(data, out, "--epochs", 1) == 0
    resume = ["--resume", "--out", str(out), "--device", "cpu"]
    assert train_boxsup.main(resume) == 0
    saved = torch.load(out / "last.pt", weights_only=True)
    torch.save({key: value for key, value in saved.items() if key != "made_of"}, out / "last.pt")
    assert train_boxsup.main(resume) == 0                                       # of before there was a fingerprint
    torch.save(saved, out / "last.pt")
    npz = data / "VOC2012" / "Candidates-mcg" / "toy_train_00001.npz"
    before, candidates = npz.read_bytes(), dict(np.load(npz))
    np.savez(npz, **candidates | {name: candidates[name][:-1] for name in ("members", "candidate_boxes")})
    with pytest.raises(train_boxsup.BadInput, match="other candidates, boxes, true or GrabCut masks"):
        train_boxsup.main(resume)                                               # one segment less, for the same boxes
    npz.write_bytes(before)
    assert train_boxsup.main(resume) == 0
    annotation = data / "VOC2012" / "Annotations" / "toy_train_00001.xml"
    text = annotation.read_text()
    annotation.write_text(text.replace("</annotation>", text[text.index("<object>"):]))
    os.utime(annotation, (time.time() + 60, time.time() + 60))
    with pytest.raises(train_boxsup.BadInput, match="other candidates, boxes, true or GrabCut masks"):
        train_boxsup.main(resume)


def test_extra_masks_join_in(toy, tmp_path, capsys, monkeypatch):
    """mcg_candidates.py --masks: trained on as they are, before boxes, which alone get candidates."""
    other, boxes = (draw(tmp_path / name, 5, seed) / "VOC2012" for name, seed in (("a", 1), ("b", 2)))
    folder, seen = tmp_path / "coco_masks", []
    mcg_candidates.claim_folder(folder, other / "JPEGImages", train_boxsup.class_names(other), "masks")
    for path in (other / "SegmentationClass").glob("*.png"):
        shutil.copy(path, folder)
    drawn = {path.name: path.read_bytes() for path in folder.iterdir()}
    original = train_boxsup.read_label
    monkeypatch.setattr(train_boxsup, "read_label", lambda path, *rest: seen.append(path) or original(path, *rest))
    assert train(toy, tmp_path / "out", "--extra", folder, boxes / "Candidates-mcg") == 0
    count = len(drawn) - 1
    said = capsys.readouterr().out
    assert " 0 with masks, 12 with boxes" in said and f"; {count} with masks, 5 with boxes of other sets" in said
    assert len(torch.load(tmp_path / "out" / "last.pt", weights_only=True)["boxes_of"]) == 17
    assert sum(path.parent == folder for path in seen) >= count
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == drawn     # read, never written
    with pytest.raises(train_boxsup.BadInput, match="another --extra has too"):
        train(toy, tmp_path / "again", "--extra", folder, folder)
    picture = other / "JPEGImages" / f"{sorted(drawn)[1].removesuffix('.png')}.jpg"
    picture.rename(tmp_path / "away.jpg")
    with pytest.raises(train_boxsup.BadInput, match=f"no .*{picture.name}, to which {folder}/.*png belongs"):
        train(toy, tmp_path / "again", "--extra", folder)
    for path in folder.glob("*.png"):
        path.unlink()
    with pytest.raises(train_boxsup.BadInput, match="holds no masks"):
        train(toy, tmp_path / "again", "--extra", folder)


# ---------------------------------------------------------------------------------------------------------------------
# Interrupts
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole_run(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(toy, out) == 0
    return out


@pytest.mark.parametrize("where, after", [("candidate_cost", 5), ("cross_entropy_loss", 2), ("cross_entropy_loss", 5)])
def test_a_run_that_died_goes_on_bit_for_bit(toy, tmp_path, whole_run, monkeypatch, where, after):
    """Dies as from kill -9: in the second label update, in the first and second epoch; the checkpoint may be older."""
    calls = [0]
    original = getattr(losses, where)

    def dying(*args, **kwargs):
        calls[0] += 1
        if calls[0] > after:
            raise RuntimeError("died")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(losses, where, dying)
        with pytest.raises(RuntimeError, match="died"):
            train(toy, tmp_path, "--save-every", 2, "--workers", 2)
    if where == "cross_entropy_loss":
        assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] % 3  # in mid-epoch: its masks are needed
        deleted = sorted((tmp_path / "masks").glob("*.png"))[3]
        deleted.unlink()
    assert train(toy, tmp_path, "--resume", "--workers", 1) == 0
    assert_same_run(whole_run, tmp_path)


def test_kill_9_and_ctrl_c(toy, tmp_path, whole_run):
    flags, ends = ["--data", toy, "--out", tmp_path, *TINY, "--save-every", 1], []
    for number in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen([sys.executable, SCRIPT, *map(str, flags), *(["--resume"] if ends else [])],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        seen, deadline = len(log_of(tmp_path)) if ends else 0, time.time() + 300
        while process.poll() is None and time.time() < deadline:
            if (tmp_path / "last.pt").exists() and len((tmp_path / "log.jsonl").read_text().splitlines()) > seen + 2:
                process.send_signal(number)
                break
            time.sleep(0.02)
        process.communicate(timeout=300)
        ends.append(process.returncode)
    assert ends[0] == -signal.SIGKILL and ends[1] in (0, 130)  # 0 if it was done before the signal came
    assert train(toy, tmp_path, "--resume") == 0
    assert_same_run(whole_run, tmp_path)


@pytest.mark.parametrize("where, after", [("candidate_cost", 5), ("cross_entropy_loss", 2)])
def test_ctrl_c_in_a_label_update_and_in_an_epoch(toy, tmp_path, whole_run, monkeypatch, capsys, where, after):
    calls, original = [0], getattr(losses, where)

    def interrupted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == after:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(losses, where, interrupted)
        assert train(toy, tmp_path) == 130
    assert calls[0] == after and f"--resume --out {tmp_path}" in capsys.readouterr().out
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == {"candidate_cost": 3}.get(where, after)
    assert train(toy, tmp_path, "--resume") == 0
    assert_same_run(whole_run, tmp_path)


def test_resume_of_a_finished_run_changes_nothing(toy, whole_run):
    before = (whole_run / "last.pt").read_bytes()
    assert train(toy, whole_run, "--resume") == 0
    assert (whole_run / "last.pt").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_at_once(toy, tmp_path, monkeypatch):
    original, calls = losses.cross_entropy_loss, [0]

    def breaking(logits, labels):
        calls[0] += 1
        return original(logits, labels) * (torch.nan if calls[0] == 5 else 1)

    monkeypatch.setattr(losses, "cross_entropy_loss", breaking)
    with pytest.raises(train_boxsup.BadInput, match="E_r is nan at step 5"):
        train(toy, tmp_path, "--save-every", 1)
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert last["step"] == 4 and all(value.isfinite().all() for value in last["model"].values())


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, other starts
# ---------------------------------------------------------------------------------------------------------------------

def two_processes(toy, out, *flags):
    """What torchrun starts, without torchrun, which takes as long to load as each of them."""
    port = str(30500 + os.getpid() % 1000)
    return [subprocess.Popen([sys.executable, SCRIPT, "--data", toy, "--out", out, *TINY, *flags], text=True,
                             stderr=subprocess.PIPE, env=os.environ | {
                                 "RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port})
            for rank in "01"]


def assert_both_end(processes):
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors


def test_two_processes(toy, tmp_path, whole_run):
    """Sharded update, data and validation: one log, the same first labels, all boxes' choices in the checkpoint. And
    two that are killed in the second epoch go on, bit for bit."""
    assert_both_end(two_processes(toy, tmp_path / "whole"))
    log, alone = log_of(tmp_path / "whole"), log_of(whole_run)
    assert log[0]["world"] == 2 and len([r for r in log if "args" in r]) == 1
    assert [r["step"] for r in log if "E_r" in r] == [1, 2, 3, 4, 5, 6]
    first, other = ([r for r in records if "labels_of_epoch" in r][0] for records in (log, alone))
    assert first == pytest.approx(other)
    checkpoint, there = (torch.load(out / "last.pt", weights_only=True) for out in (tmp_path / "whole", whole_run))
    assert torch.equal(checkpoint["boxes_of"], there["boxes_of"])
    assert len(checkpoint["choices"]) == len(there["choices"]) > 12

    processes = two_processes(toy, tmp_path / "parts", "--save-every", "1")
    log, deadline = tmp_path / "parts" / "log.jsonl", time.time() + 300
    while processes[0].poll() is None and time.time() < deadline:
        if log.exists() and '"step": 4, "epoch"' in log.read_text():
            break
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.communicate(timeout=300)
    assert processes[0].returncode == -signal.SIGKILL and torch.load(tmp_path / "parts" / "last.pt")["step"] >= 3
    assert_both_end(two_processes(toy, tmp_path / "parts", "--resume"))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_init_from_another_class_count_starts_the_last_layer_fresh(toy, tmp_path, whole_run, capsys):
    other = draw(tmp_path, 12, 1)
    names = (other / "VOC2012" / "class_names.txt").read_text().split()
    (other / "VOC2012" / "class_names.txt").write_text("\n".join(names + ["one", "more"]) + "\n")
    assert train(other, tmp_path / "out", "--init", whole_run / "best.pt", "--supervision", "masks", "--epochs", 1) == 0
    said = capsys.readouterr().out
    assert "fresh: segmentation.3.weight, segmentation.3.bias\n" in said and "7 classes" in said


def test_init_from_other_classes_of_the_same_number_starts_the_last_layer_fresh(toy, tmp_path, whole_run, capsys):
    other = draw(tmp_path, 12, 1)
    names = (other / "VOC2012" / "class_names.txt").read_text().split()
    (other / "VOC2012" / "class_names.txt").write_text("\n".join([*names[:1], *names[:0:-1]]) + "\n")
    assert train(other, tmp_path / "out", "--init", whole_run / "best.pt", "--supervision", "masks", "--epochs", 1) == 0
    assert "fresh: segmentation.3.weight, segmentation.3.bias\n" in capsys.readouterr().out


def test_after_init_the_networks_feedback_counts_at_once(toy, tmp_path, whole_run):
    assert train(toy, tmp_path, "--init", whole_run / "best.pt", "--warm-up", 0, "--epochs", 1, "--top-k", 1,
                 "--min-recognized", 0) == 0
    (update,) = [r for r in log_of(tmp_path) if "labels_of_epoch" in r]
    assert update["cost"] > 1 - update["box_iou"] + 0.01  # E_r is in it


def test_nothing_of_an_old_run_passes_for_the_new_ones(toy, tmp_path):
    """--overwrite: rectangles are drawn anew, and a best.pt that the new run does not write is gone."""
    flags = "--supervision", "rectangles", "--epochs", 1
    assert train(toy, tmp_path, *flags) == 0 and (tmp_path / "best.pt").exists()
    path = sorted((tmp_path / "masks").glob("*.png"))[0]
    drawn = path.read_bytes()
    train_boxsup.write_label(path, np.zeros((48, 64)))
    assert train(toy, tmp_path, *flags, "--overwrite", "--val-split", "none") == 0
    assert path.read_bytes() == drawn and not (tmp_path / "best.pt").exists()


def test_vgg_takes_a_step(toy, tmp_path):
    assert train(toy, tmp_path, "--backbone", "vgg16", "--large-fov", "--supervision", "masks", "--epochs", 1,
                 "--lr", 1e-3, "--val-split", "none", "--batch-size", 12) == 0
    network, checkpoint = load_network(tmp_path / "last.pt")
    assert checkpoint["arch"]["network"] == "DeepLabVGG16" and checkpoint["arch"]["large_fov"]


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------

def test_no_data_names_three_ways_on(tmp_path):
    said = refused(SCRIPT, "--data", tmp_path / "nowhere")
    assert "nowhere" in said and "--download" in said and "toy_voc.py" in said and "own" in said


def test_corrupt_candidates_met_by_a_worker_are_one_line(tmp_path):
    data = draw(tmp_path, 4, 2)
    broken = sorted((data / "VOC2012" / "Candidates-mcg").glob("*.npz"))[1]
    broken.write_bytes(broken.read_bytes()[:300])
    said = refused(SCRIPT, "--data", data, "--out", tmp_path / "out", *TINY, "--workers", 1)
    assert broken.name in said and "delete" in said


@pytest.mark.parametrize("flags, words", [
    (["--crop", "8"], "--crop 8"),
    (["--top-k", "0"], "--top-k"),
    (["--warm-up", "0"], "or 0 with --init"),
    (["--device", "meta"], "--device meta"),
    (["--lambda-r", "-1"], "--lambda-r"),
    (["--large-fov"], "--backbone vgg16"),
    (["--val-split", "nosuch"], "nosuch.txt"),
    (["--batch-size", "13"], "--batch-size 12 or less"),
    (["--masks-list", "nosuch.txt"], "nosuch.txt"),
    (["--masks-list", __file__, "--supervision", "masks"], "--masks-list"),
    (["--candidates", "there", "--supervision", "grabcut"], "--candidates goes with"),
    (["--grabcut", "there"], "--grabcut goes with"),
    (["--split", "nosuch"], "nosuch.txt"),
    (["--supervision", "grabcut"], "python grabcut_labels.py"),
    (["--weights", "nosuch.pth"], "nosuch.pth"),
    (["--init", "nosuch.pt"], "nosuch.pt"),
    (["--resume"], "last.pt"),
    (["--device", "cuda:99"], "CUDA"),
])
def test_bad_flags(toy, tmp_path, flags, words):
    with pytest.raises((train_boxsup.BadInput, train_boxsup.BadFile)) as caught:
        train(toy, tmp_path / "out", *flags)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_existing_run_is_neither_overwritten_nor_resumed_with_other_arguments(toy, whole_run):
    before = (whole_run / "last.pt").read_bytes()
    with pytest.raises(train_boxsup.BadInput, match="--resume"):
        train(toy, whole_run)
    with pytest.raises(train_boxsup.BadInput, match="--top-k 5: the run in .* has 2"):
        train(toy, whole_run, "--resume", "--top-k", 5)
    other = toy.parent / "another list" / "VOCdevkit"  # as long as the run's, but of other images
    shutil.copytree(toy, other)
    listed = other / "VOC2012" / "ImageSets" / "Segmentation" / "train.txt"
    listed.write_text("".join(reversed(listed.read_text().splitlines(keepends=True))))
    with pytest.raises(train_boxsup.BadInput, match="trained on 12 images and 5 classes, other ones"):
        train(other, whole_run, "--resume")
    assert (whole_run / "last.pt").read_bytes() == before


def test_a_true_mask_that_is_only_reported_stops_nothing(toy, tmp_path, capsys):
    data = Path(shutil.copytree(toy, tmp_path / "VOCdevkit"))
    for image_id in read_list(data / "VOC2012/ImageSets/Segmentation/train.txt")[1:]:
        cv2.imwrite(str(data / f"VOC2012/SegmentationClass/{image_id}.png"), np.zeros((48, 64, 3), np.uint8))
    assert train(data, tmp_path / "out", "--epochs", 1) == 0
    assert "mIoU of masks" in capsys.readouterr().out       # of the one that is left


def test_every_device_is_named(toy, tmp_path, whole_run, devices_named):
    assert train(toy, tmp_path / "out") == 0
    with torch.device("cpu"):
        assert_same_run(tmp_path / "out", whole_run)


def test_one_gpu_is_asked_for_by_number(toy, tmp_path, one_gpu):
    with pytest.raises(one_gpu):
        train(toy, tmp_path, "--device", "cuda")
