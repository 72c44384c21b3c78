"""train_box2seg.py: crops, order of batches, every row of the tables, interrupts, processes, bad input."""
import functools
import http.server
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import kept_signals, refused
from PIL import Image
from toy_voc import make_toy_voc

import evaluate
import losses
import model
import train_box2seg
import train_boxsup
from grabcut_labels import class_fill_rates, read_label, read_list, write_label
from model import (BadInput, Box2SegNet, DeepLabVGG16, batches, in_parallel, initialize, load_network, make_optimizer,
                   mixed_precision, place_network, predict, quiet_worker, random_crop, say_what_a_crop_sees, sgd_step,
                   validate)
from train_box2seg import FIXED, ROWS

SCRIPT = Path(__file__).resolve().parent.parent / "train_box2seg.py"
# The least that still has every part: 2 stages, 3 steps an epoch.
TINY = ("--recipe small --backbone efficientnet_lite0 --width 8 --embedding-dim 8 --crop 32 --batch-size 4 --epochs 2 "
        "--scale 0.5 1 --pretrain-epochs 1 --workers 0 --log-every 1 --device cpu --amp off").split()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    data = tmp_path_factory.mktemp("toy") / "VOCdevkit"
    make_toy_voc(data, images=12, val=3, size=(48, 64), seed=0)
    return data


def train(toy, out, *flags):
    """One run in this process -> exit status."""
    with kept_signals():
        return train_box2seg.main(["--data", str(toy), "--out", str(out), *TINY, *map(str, flags)])


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def short_run(script, toy, out, *flags):
    """An epoch of either script on the true masks -> exit status."""
    row = {train_box2seg: "--loss mask", train_boxsup: "--supervision masks"}[script]
    tiny = f"--recipe small --crop 32 --batch-size 4 --epochs 1 --workers 0 --device cpu --amp off {row}".split()
    with kept_signals():
        return script.main(["--data", str(toy), "--out", str(out), *tiny, *map(str, flags)])


def assert_same_run(a, b):
    """Two folders hold the same run, bit for bit: weights, momentum, every logged loss and score."""
    one, two = (torch.load(out / "last.pt", weights_only=True) for out in (a, b))
    for name in one["model"]:
        assert torch.equal(one["model"][name], two["model"][name]), name
    for key, state in one["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], two["optimizer"]["state"][key]["momentum_buffer"])
    assert (one["stage"], one["step"], one["best"]) == (two["stage"], two["step"], two["best"])
    logs = [[{k: v for k, v in r.items() if k != "images_per_second"} for r in log_of(out) if "args" not in r]
            for out in (a, b)]
    assert logs[0] == logs[1]


# ---------------------------------------------------------------------------------------------------------------------
# Crops
# ---------------------------------------------------------------------------------------------------------------------

def test_images_of_which_a_crop_shows_little_are_told(tmp_path, capsys):
    for n, size in enumerate([(3000, 4000), (4000, 2000), (4000, 3000), (90, 90)]):
        Image.new("L", size).save(tmp_path / f"{n}.png")
    (tmp_path / "4.png").write_bytes(b"broken")
    args = SimpleNamespace(crop=193, scale=[0.5, 1.0], val_scale=0.7)
    files = lambda n: [tmp_path / f"{n}.png"]
    say_what_a_crop_sees(files, 5, args)
    assert capsys.readouterr().out == (
        "the images are 4000 pixels long (median), of which a crop shows 386 at most: give --scale 0.062 0.12 "
        "--val-scale 0.087, with which it shows as much as of VOC's 500\n")
    Image.new("L", (1158, 9)).save(tmp_path / "0.png")      # three crops, no more
    say_what_a_crop_sees(files, 1, args)
    say_what_a_crop_sees(lambda n: files(4), 1, args)
    assert capsys.readouterr().out == ""


def test_a_crop_upon_which_maps_do_not_lie_is_told(capsys):
    network = Box2SegNet(3, "resnet18", width=8, embedding=False, attention=False)
    for crop, fitting in ((321, None), (320, 321), (512, 513), (33, None)):
        args = SimpleNamespace(init=None, freeze_bn=False, batch_size=8, sync_bn=False, crop=crop)
        place_network(network, args, None, ["background", "a", "b"], torch.device("cpu"))
        said = capsys.readouterr().out
        assert f"--crop {crop}: the network's maps" in said and f"give {fitting} " in said if fitting else not said


def test_a_crop_of_the_whole_image_is_the_image_or_its_mirror():
    rng = np.random.default_rng(0)
    image, labels = rng.integers(0, 256, (40, 40, 3), np.uint8), rng.integers(0, 5, (40, 40), np.uint8)
    seen = set()
    for seed in range(8):
        view, (B, M) = random_crop(image, [labels, labels], np.random.default_rng(seed), 40, (1, 1), 0)
        flip = not np.array_equal(view, image)
        seen.add(flip)
        assert np.array_equal(view, image[:, ::-1] if flip else image)
        assert np.array_equal(B, labels[:, ::-1] if flip else labels) and np.array_equal(B, M)
    assert seen == {False, True}


def test_padding_is_unlabelled_and_of_the_mean_colour():
    image, labels = np.zeros((20, 30, 3), np.uint8), np.zeros((20, 30), np.uint8)
    for seed in range(8):
        view, (B,) = random_crop(image, [labels], np.random.default_rng(seed), 64, (1, 1), 0)
        assert (B == 0).sum() == 20 * 30 and (B == 255).sum() == 64 * 64 - 20 * 30
        assert (view[B == 0] == 0).all() and (view[B == 255] == (124, 116, 104)).all()


def test_image_and_labels_move_together_at_any_scale():
    labels = np.kron(np.arange(12, dtype=np.uint8).reshape(3, 4), np.ones((40, 40), np.uint8))  # 12 squares, side 40
    image = np.repeat(20 * labels[:, :, None] + 10, 3, axis=2)  # whose grey tells the class
    for seed in range(30):
        view, (B, M) = random_crop(image, [labels, 11 - labels], np.random.default_rng(seed), 64, (0.3, 3), 0)
        told, inside = (view[:, :, 0].astype(int) - 10 + 10) // 20, B != 255
        assert np.array_equal(inside, M != 255) and (B[inside] + M[inside] == 11).all()
        wrong = (told != B) & inside  # only where two squares meet, which interpolation mixes
        meets = np.zeros_like(inside)
        for axis in (0, 1):
            edge = np.diff(B.astype(int), axis=axis, prepend=np.take(B, [0], axis).astype(int)) != 0
            meets |= edge | np.roll(edge, -1, axis) | np.roll(edge, -2, axis) | np.roll(edge, 1, axis)
        assert not (wrong & ~meets).any()


def test_a_view_at_scale_2_shows_half_as_much_at_twice_the_size():
    """Columns are numbered; at scale 1/3 each column of the view shows the middle one of three."""
    labels = np.arange(96, dtype=np.uint8)[None].repeat(96, 0)
    image = np.repeat(labels[..., None], 3, 2)
    for scale, columns in ((2, np.arange(32) // 2), (1, np.arange(32)), (1 / 3, 3 * np.arange(32) + 1)):
        for seed in range(8):
            view, (B,) = random_crop(image, [labels], np.random.default_rng(seed), 32, (scale, scale), 0)
            row = B[0].astype(int) if B[0, 0] < B[0, -1] else B[0, ::-1].astype(int)
            assert np.array_equal(row - row[0], columns - columns[0]) and (scale >= 1 or row[0] == 1)
            assert np.abs(view[..., 0].astype(int) - B).max() <= 1


@pytest.mark.parametrize("axis", [0, 1])
def test_crops_come_from_everywhere_and_each_scale_comes_up(axis):
    labels = np.arange(40, dtype=np.uint8)[None].repeat(40, 0)
    labels = np.ascontiguousarray(labels.T) if axis == 0 else labels
    image = np.repeat(labels[..., None], 3, 2)

    def views(crop, scale):
        return [random_crop(image, [labels], np.random.default_rng(seed), crop, scale, 0)[1][0] for seed in range(200)]

    assert {view.min() for view in views(32, (1, 1))} == set(range(9))
    assert {(view.min(1 - axis) == 255).argmin() for view in views(48, (1, 1))} == set(range(9))    # padded
    shown = [len(np.unique(view)) for view in views(32, (1, 4))]
    assert min(shown) == 8 and max(shown) > 28 and len(set(shown)) > 15


def test_shrunk_views_are_averaged_and_enlarged_ones_interpolated():
    image = np.zeros((128, 128, 3), np.uint8)
    image[:, ::4] = 255
    shrunk, _ = random_crop(image, [], np.random.default_rng(0), 32, (0.25, 0.25), 0)
    assert abs(shrunk.astype(int) - 64).max() <= 1
    enlarged, _ = random_crop(image, [], np.random.default_rng(0), 32, (2, 2), 0)
    assert len(np.unique(enlarged)) > 2


def test_half_of_the_views_are_mirrored():
    image = np.arange(8, dtype=np.uint8)[None, :, None].repeat(8, 0).repeat(3, 2)
    left = [random_crop(image, [], np.random.default_rng(seed), 8, (1, 1), 0)[0][0, 0, 0] for seed in range(400)]
    assert set(left) == {0, 7} and 160 < left.count(7) < 240


def test_brightness_contrast_and_saturation_change_both_ways(monkeypatch):
    factors = {name: [] for name in ("adjust_brightness", "adjust_contrast", "adjust_saturation")}
    for name, seen in factors.items():
        monkeypatch.setattr(model.TF, name, lambda x, factor, seen=seen: seen.append(factor) or x)
    image = np.zeros((8, 8, 3), np.uint8)
    for seed in range(100):
        random_crop(image, [image[..., 0]], np.random.default_rng(seed), 8, (1, 1), 0.3)
    for seen in factors.values():
        assert len(seen) == 100 and 0.7 <= min(seen) < 0.75 and 1.25 < max(seen) <= 1.3
    assert len(set(map(tuple, factors.values()))) == 3


@pytest.mark.parametrize("script", [train_box2seg, train_boxsup])
def test_crop_scale_and_colour_reach_the_views(toy, tmp_path, monkeypatch, script):
    seen, original = set(), script.random_crop
    monkeypatch.setattr(script, "random_crop", lambda *a: seen.add(a[3:]) or original(*a))
    assert short_run(script, toy, tmp_path, *"--crop 33 --scale 0.6 0.9 --colour 0.2".split()) == 0
    assert seen == {(33, (0.6, 0.9), 0.2)}


@pytest.mark.parametrize("script", [train_box2seg, train_boxsup])
def test_padding_reaches_the_loss_as_255(toy, tmp_path, monkeypatch, script):
    seen, original = [], losses.cross_entropy_loss
    monkeypatch.setattr(losses, "cross_entropy_loss", lambda x, y: seen.append((y == 255).double().mean().item()) or
                        original(x, y))
    assert short_run(script, toy, tmp_path, *"--crop 97 --scale 1 1".split()) == 0              # images of 48 x 64
    assert len(seen) == 3 and min(seen) > 0.6


def test_colour_changes_the_picture_and_not_the_labels():
    image, labels = np.full((32, 32, 3), 100, np.uint8), np.arange(1024, dtype=np.uint8).reshape(32, 32) % 5
    view, (plain,) = random_crop(image, [labels], np.random.default_rng(3), 32, (1, 1), 0)
    jittered, (same,) = random_crop(image, [labels], np.random.default_rng(3), 32, (1, 1), 0.5)
    assert np.array_equal(plain, same) and not np.array_equal(view, jittered)


# ---------------------------------------------------------------------------------------------------------------------
# Recipes and attention
# ---------------------------------------------------------------------------------------------------------------------

def test_a_run_whose_attention_is_dead_says_so(toy, tmp_path, capsys):
    assert train(toy, tmp_path / "dead", "--loss", "aw-fr", "--lambda-aw", 10, "--lambda-alpha", 1, "--lr", 0.5,
                 "--epochs", 6) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "attention is dead" in printed[-2] and "--lambda-alpha at least 5 times --lambda-aw" in printed[-2]
    assert log_of(tmp_path / "dead")[-2]["eta'"] < 0.05
    assert train(toy, tmp_path / "alive", "--loss", "aw-fr", "--epochs", 3) == 0
    assert "attention is dead" not in capsys.readouterr().out and log_of(tmp_path / "alive")[-2]["eta'"] > 0.2


def test_momentum_by_hand():
    weight = torch.nn.Parameter(torch.zeros(1))
    network = SimpleNamespace(encoder=SimpleNamespace(parameters=lambda: [weight]), last_layer=torch.nn.Linear(1, 1),
                              parameters=lambda: [weight, torch.nn.Parameter(torch.zeros(1))])
    optimizer = make_optimizer(network, SimpleNamespace(encoder_lr=1, lr=0.1, momentum=0.5, weight_decay=0))
    moved = []
    for _ in range(3):
        optimizer.zero_grad()
        weight.sum().backward()
        optimizer.step()
        moved.append(weight.item())
    assert moved == pytest.approx([-0.1, -0.25, -0.425])    # steps of 1, 1.5 and 1.75 times 0.1


def test_a_step_forgets_the_gradient_of_the_one_before():
    layer = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    optimizer, scaler = torch.optim.SGD(layer.parameters(), lr=1.0), torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(2):
        sgd_step(layer(torch.tensor([[3.0, 4.0]])).sum(), layer, optimizer, scaler, 0)
    torch.testing.assert_close(layer.weight[0], -2 * torch.tensor([3.0, 4.0]))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("clip_norm, cut, step", [(0, 0, 5), (4, 1, 4), (6, 0, 5)])
def test_a_gradient_that_is_too_long_is_cut(clip_norm, cut, step, scaled):
    """L = 3 v + 4 w: a gradient of norm 5, whether or not fp16's scaler multiplies it meanwhile."""
    layer = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    loss = layer(torch.tensor([[3.0, 4.0]])).sum()
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    assert sgd_step(loss, layer, torch.optim.SGD(layer.parameters(), lr=1.0), scaler, clip_norm) == cut
    torch.testing.assert_close(layer.weight[0], -torch.tensor([0.6, 0.8]) * step)


def test_a_run_whose_gradients_are_cut_says_so(toy, tmp_path, capsys):
    for name, clip_norm, clipped in (("short", 0.001, 1), ("long", 1000, 0)):
        assert train(toy, tmp_path / name, "--loss", "grabcut", "--epochs", 1, "--clip-norm", clip_norm) == 0
        said = "100% of the gradients were cut to --clip-norm 0.001" in capsys.readouterr().out
        assert said == clipped and log_of(tmp_path / name)[-2]["clipped"] == clipped
    assert train(toy, tmp_path / "any", "--loss", "grabcut", "--epochs", 1, "--clip-norm", 0) == 0
    assert "were cut" not in capsys.readouterr().out and "clipped" not in log_of(tmp_path / "any")[-2]


def test_what_attention_fills_is_logged_of_the_boxes(toy, tmp_path, monkeypatch):
    """eta' of Eq. 8, mean over the classes that have a box in an image: B's, not M's."""
    alpha, B = torch.zeros(2, 2, 2, 2), torch.tensor([[[1, 1], [0, 2]], [[0, 0], [0, 255]]])
    alpha[0, 0, 0], alpha[0, 1, 1, 1] = torch.tensor([0.5, 1]), 0.25
    assert train_box2seg.mean_fill(alpha, B) == pytest.approx((0.75 + 0.25) / 2)
    seen, original = [], losses.box2seg_loss
    monkeypatch.setattr(losses, "box2seg_loss", lambda *a, **k: seen.append((a[1].detach(), a[3])) or original(*a, **k))
    assert train(toy, tmp_path, "--loss", "aw-fr", "--epochs", 1) == 0
    logged = [r["eta'"] for r in log_of(tmp_path) if "eta'" in r]
    assert logged == pytest.approx([train_box2seg.mean_fill(alpha, B).item() for alpha, B in seen]) and len(seen) == 3


def test_recipes_hold_attention_but_for_the_printed_weights():
    weights = {name: (recipe["lambda_aw"], recipe["lambda_alpha"], recipe["lambda_a"])
               for name, recipe in train_box2seg.RECIPES.items()}
    assert weights.pop("printed") == (10, 1, 1)  # Sect. 4.1
    assert all(alpha >= 5 * aw and a == 1 for aw, alpha, a in weights.values())


def test_the_rate_of_each_step(toy, tmp_path, monkeypatch):
    """Polynomial, anew in each stage, the encoder's --encoder-lr times as much; momentum and weight decay for all."""
    taken, original = [], train_box2seg.sgd_step
    monkeypatch.setattr(train_box2seg, "sgd_step", lambda *a: taken.append(
        [(g["lr"], g["momentum"], g["weight_decay"]) for g in a[2].param_groups]) or original(*a))
    assert train(toy, tmp_path, "--encoder-lr", 0.5, "--momentum", 0.8, "--weight-decay", 0.01) == 0
    rates = [0.02 * (1 - step / steps) ** 0.9 for steps in (3, 6) for step in range(steps)]
    assert len(taken) == len(rates)
    for groups, rate in zip(taken, rates):
        assert groups == [(pytest.approx(factor * rate), 0.8, 0.01) for factor in (0.5, 1, 1)]


def test_weight_decay_by_hand():
    """Where the loss has no gradient, a step of SGD takes lr * decay of each weight, 0.1 * 0.5."""
    network = Box2SegNet(3, "resnet18", 5, width=8)
    optimizer = make_optimizer(network, SimpleNamespace(encoder_lr=1, lr=0.1, momentum=0.0, weight_decay=0.5))
    before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    sum(0 * weight.sum() for weight in network.parameters()).backward()
    optimizer.step()
    assert all(torch.allclose(weight, 0.95 * before[name]) for name, weight in network.named_parameters())


@pytest.mark.parametrize("script", [train_box2seg, train_boxsup])
def test_the_encoder_starts_from_imagenet_unless_other_weights_are_given(toy, tmp_path, monkeypatch, script):
    asked = []
    monkeypatch.setattr(model, "download_encoder", lambda encoder, backbone: asked.append(backbone))
    for name, flags, times in (("scratch", [], 0), ("imagenet", ["--pretrained"], 1), ("imagenet", ["--resume"], 1),
                               ("init", ["--pretrained", "--init", tmp_path / "scratch" / "last.pt"], 1)):
        assert short_run(script, toy, tmp_path / name, *flags) == 0 and asked == ["resnet18"] * times


def test_encoder_rate_and_batch_norm_at_rest(toy, tmp_path):
    """--encoder-lr 0 leaves the encoder's weights as they came, --freeze-bn its statistics too."""
    train(toy, tmp_path / "start", "--loss", "grabcut", "--epochs", 1)
    train(toy, tmp_path / "run", "--loss", "grabcut", "--epochs", 1, "--encoder-lr", 0, "--freeze-bn", "--init",
          tmp_path / "start" / "last.pt")
    start, run = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("start", "run"))
    encoder = {key for key in run["model"] if key.startswith("encoder.")}
    parameters = {key for key in encoder if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert parameters and all(torch.equal(run["model"][key], start["model"][key]) for key in parameters)
    assert not torch.equal(run["model"]["fuse.0.weight"], start["model"]["fuse.0.weight"])
    assert all(torch.equal(run["model"][key], start["model"][key]) for key in encoder - parameters)
    assert not torch.equal(run["model"]["fuse.1.running_mean"], start["model"]["fuse.1.running_mean"])
    with pytest.raises(BadInput, match="--freeze-bn: a network from scratch .* --no-freeze-bn"):
        train(toy, tmp_path / "scratch", "--freeze-bn")


# ---------------------------------------------------------------------------------------------------------------------
# The order of training
# ---------------------------------------------------------------------------------------------------------------------

def test_an_epoch_shows_each_image_once_and_the_processes_share_it():
    whole = list(batches(13, 4, seed=5, start=0, stop=6, rank=0, world=1))
    for epoch in (0, 1):
        shown = [i for batch in whole[3 * epoch:3 * epoch + 3] for e, i in batch if e == epoch]
        assert len(shown) == len(set(shown)) == 12
    assert [i for _, i in whole[0]] != [i for _, i in whole[3]]
    halves = [list(batches(13, 4, 5, 0, 6, rank, 2)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*halves)] == [sorted(batch) for batch in whole]
    for start in range(6):  # where a resumed run comes in does not change what follows
        assert list(batches(13, 4, 5, start, 6, 0, 1)) == whole[start:]


def test_the_paper_recipe_is_the_paper():
    args, _ = train_box2seg.parse_arguments([])
    assert (args.backbone, args.pretrained, args.epochs, args.lr) == ("resnet101", True, 40, 1e-3)
    assert (args.momentum, args.weight_decay, args.power) == (0.9, 5e-4, 0.9)
    assert (args.gamma, args.pair_fraction) == (0.7, 0.1)
    assert (args.batch_size, args.crop, args.pretrain_epochs, args.scale) == (16, 321, 5, [0.5, 2])
    assert (args.val_scale, args.freeze_bn, args.clip_norm, args.colour, args.embedding_dim) == (1, False, 0, 0.3, 64)
    assert (args.loss, args.lambda_aw, args.lambda_alpha, args.masks, args.detach_targets) == (
        "box2seg", 1, 5, 1, False)
    assert args.lr * args.encoder_lr == pytest.approx(1e-4)  # Sect. 4.1, for the encoder alone
    printed, _ = train_box2seg.parse_arguments(["--recipe", "printed"])
    assert (printed.lambda_aw, printed.lambda_alpha, printed.lambda_a) == (10, 1, 1)
    assert (printed.lr, printed.encoder_lr) == (1e-4, 1)
    assert {key for key, value in vars(printed).items() if value != vars(args)[key]} == {
        "recipe", "lr", "encoder_lr", "lambda_aw", "lambda_alpha"}
    small, given = train_box2seg.parse_arguments(["--recipe", "small", "--lr", "0.5"])
    assert small.lr == 0.5 and small.backbone == "resnet18" and given == {"recipe": "small", "lr": 0.5}


def test_the_rows_are_those_of_the_tables():
    learns_from = {"box": "boxes", "filling-rate": "boxes", "mask": "masks", "mask-aw": "masks", "mask-aw-gc": "masks"}
    for row, (labels, _, with_aw, regularizer, with_a) in ROWS.items():
        assert labels == learns_from.get(row, "grabcut") and with_a == (row in ("affinity", "box2seg"))
        assert with_aw == ("aw" in row or row == "box2seg")
        assert regularizer == ("box" if row == "aw-box" else "fr" if with_aw else None)


def test_attention_is_a_sigmoid_each_class_by_itself(toy, tmp_path):
    """At the start, where logits are near 0, each class's attention is one half. (A softmax would share 1.)"""
    assert train(toy, tmp_path, "--loss", "aw-fr", "--lr", 0, "--epochs", 1) == 0
    assert [r["eta'"] for r in log_of(tmp_path) if "eta'" in r] == pytest.approx([0.5] * 3, abs=0.05)


@pytest.mark.parametrize("row", ROWS)
def test_every_row_trains_its_own_terms(toy, tmp_path, row, capsys):
    assert train(toy, tmp_path, "--loss", row) == 0
    log = log_of(tmp_path)
    assert log[0]["args"]["loss"] == row and log[0]["versions"]["torch"] == torch.__version__ and log[0]["images"] == 12
    target, name, with_aw, _, with_a = ROWS[row]
    expected = {name} | ({"L_AW", "L_alpha"} if with_aw else set()) | ({"L_A"} if with_a else set()) | {"L"}
    steps = [r for r in log if r.get("stage") == 2 and "L" in r]
    assert len(steps) == 6
    assert all({k for k in r if k.startswith("L")} == expected for r in steps)
    args = log[0]["args"]
    for r in steps:  # Eq. 11
        total = r[name] + r.get("L_A", 0)
        total += args["lambda_aw"] * r.get("L_AW", 0) + args["lambda_alpha"] * r.get("L_alpha", 0)
        assert r["L"] == pytest.approx(total, rel=1e-4)
        assert r["lr"] == pytest.approx(0.02 * (1 - (r["step"] - 1) / 6) ** 0.9)
    pretraining = [r for r in log if r.get("stage") == 1 and "L_A" in r]
    assert len(pretraining) == (3 if with_a else 0)
    assert [r["epoch"] for r in log if "miou" in r] == [1, 2]
    network, checkpoint = load_network(tmp_path / "last.pt")
    assert checkpoint["class_names"][0] == "background"
    assert (network.attention is not None) == (with_aw and row not in FIXED)
    line = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stage 2  epoch 2/2")][0]
    assert all(f"  {term} " in line for term in expected) and "mIoU" in line and "img/s" in line


@pytest.mark.parametrize("row, fills", [("aw-mask", "grabcut"), ("aw-one", "grabcut"), ("aw-fr", "grabcut"),
                                        ("mask-aw", "masks"), ("mask-aw-gc", "grabcut")])
def test_what_attention_is_and_what_it_is_held_to(toy, tmp_path, monkeypatch, row, fills):
    """aw-mask: attention is M, so that it fills as much of the boxes as M does; aw-one: 1. mask-aw-gc: cross-entropy
    with the true masks, filling rates of GrabCut's, here those of boxes that are all object."""
    whole = tmp_path / "labels"
    train(toy, tmp_path / "made", "--loss", "grabcut", "--epochs", 1, "--label-dir", whole)
    for path in (whole / "BoxMasks").glob("*.png"):  # GrabCut's masks: the boxes
        (whole / "GrabCutMasks" / path.name).write_bytes(path.read_bytes())
    seen, original = [], losses.box2seg_loss
    monkeypatch.setattr(losses, "box2seg_loss", lambda *a, **k: seen.append((a, k)) or original(*a, **k))
    assert train(toy, tmp_path / "run", "--loss", row, "--epochs", 1, "--label-dir", whole) == 0
    for (logits, alpha, _, B, M, *_), flags in seen:
        assert torch.equal(flags["fill_labels"], B if fills == "grabcut" else M)
        assert torch.equal(B, M) == (not row.startswith("mask"))
        held = original(logits, alpha, None, B, M, lambda_a=0, fill_labels=flags["fill_labels"])[1]["L_alpha"]
        assert held == losses.fill_rate_loss(alpha, B, flags["fill_labels"])
        if row in FIXED:
            assert held == 0 and not alpha.requires_grad
            assert (alpha == 1).all() if row == "aw-one" else torch.equal(alpha.sum(1), ((M > 0) & (M != 255)).float())
    assert len(seen) == 3


def test_flat_attention(toy, tmp_path, monkeypatch):
    """aw-flat: the least that L_alpha^fr lets attention fill, evenly: gamma times the share of the class's boxes that
    M calls the class, here what lies in the right half of the image, and 0 for a class without a box."""
    where, seen, original = tmp_path / "labels", [], losses.box2seg_loss
    train(toy, tmp_path / "made", "--loss", "grabcut", "--epochs", 1, "--label-dir", where)
    for path in (where / "BoxMasks").glob("*.png"):
        label = read_label(path)
        label[:, :32] = 0
        write_label(where / "GrabCutMasks" / path.name, label)
    monkeypatch.setattr(losses, "box2seg_loss", lambda *a, **k: seen.append(a) or original(*a, **k))
    assert train(toy, tmp_path / "run", "--loss", "aw-flat", "--epochs", 1, "--label-dir", where, "--gamma", 0.6) == 0
    rates = set()
    for _, alpha, _, B, M, *_ in seen:
        for n, c in itertools.product(range(len(B)), range(alpha.shape[1])):
            box = B[n] == c + 1
            rate = ((M[n] == c + 1) & box).sum() / box.sum().clamp(min=1)
            assert (alpha[n, c] == 0.6 * rate).all() and not alpha.requires_grad
            rates.add(round(float(rate), 3))
        assert losses.fill_rate_loss(alpha, B, M, 0.6) < 1e-6
    assert len(seen) == 3 and 0 in rates and 1 in rates and len(rates) > 4


@pytest.mark.parametrize("row, cross_entropy, boxes, regularizer, pairs", [
    ("box", "B", "B", None, 0), ("grabcut", "M", "M", None, 0), ("affinity", "M", "M", None, 9),
    ("aw-box", "M", "B", "box", 0), ("aw-fr", "M", "B", "fr", 0), ("box2seg", "M", "B", "fr", 9)])
def test_which_labels_and_settings_reach_the_losses(toy, tmp_path, monkeypatch, row, cross_entropy, boxes, regularizer,
                                                    pairs):
    """With all B made class 1, and M 2 on the left and 3 on the right: which of them each loss gets (without L_AW no
    loss looks at B, and M stands in for it), and that the flags reach losses, clipping and validation. Pixels of L_A
    are drawn anew each step, by M."""
    where, seen, sampled = tmp_path / "labels", [], []
    train(toy, tmp_path / "made", "--loss", "grabcut", "--epochs", 1, "--label-dir", where)
    for kind, c in (("BoxMasks", [1, 1]), ("GrabCutMasks", [2, 3])):
        for path in (where / kind).glob("*.png"):
            write_label(path, np.full((48, 64), np.repeat(c, 32), np.uint8))

    def spy(module, name, look):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: look(a, k) or original(*a, **k))

    def which(labels):
        return "B" if set(labels.unique().tolist()) <= {1, 255} else "M"

    spy(losses, "cross_entropy_loss", lambda a, k: seen.append(("cross-entropy", which(a[1]))))
    spy(losses, "box2seg_loss", lambda a, k: seen.append(("boxes", which(a[3]))) or seen.extend(
        (name, k[name]) for name in ("gamma", "detach_targets", "regularizer")))
    spy(losses, "affinity_loss", lambda a, k: sampled.append((*a[1:4], a[4].initial_seed())))
    spy(train_box2seg, "sgd_step", lambda a, k: seen.append(("clip", a[4])))
    spy(train_box2seg, "validate", lambda a, k: seen.append(("val_scale", a[3])))
    assert train(toy, tmp_path / "run", "--loss", row, "--label-dir", where, "--gamma", 0.5, "--detach-targets",
                 "--pair-fraction", 0.3, "--clip-norm", 3, "--val-scale", 0.5) == 0
    expected = {"cross-entropy": cross_entropy, "boxes": boxes, "gamma": 0.5, "detach_targets": True,
                "regularizer": regularizer, "clip": 3, "val_scale": 0.5}
    assert all(value == expected[name] for name, value in seen) and {name for name, _ in seen} == set(expected)
    assert len({seed for *_, seed in sampled}) == len(sampled) == pairs
    for _, labels, num_samples, _ in sampled:
        assert which(labels) == "M" and torch.equal(num_samples, losses.pair_samples(labels, 6, 0.3))
    for targets, labels, *_ in sampled[:3]:                                      # stage 1: M in place of y
        assert torch.equal(targets.argmax(1)[labels < 255], labels[labels < 255].long())


def test_vocs_own_mask_comes_before_that_of_the_extra_images(tmp_path):
    """Where both exist: SBD's have other borders and no rim of 255."""
    own, extra = (tmp_path / folder / "a.png" for folder in ("SegmentationClass", "SegmentationClassAug"))
    for path in (own, extra):
        path.parent.mkdir()
        path.touch()
    finders = train_box2seg.truth_file, train_boxsup.truth_file, evaluate.truth_path
    assert all(find(tmp_path, "a") == own for find in finders)
    own.unlink()
    assert all(find(tmp_path, "a") == extra for find in finders)


@pytest.mark.parametrize("script", [train_box2seg, train_boxsup])
def test_the_10582_images_are_taken_where_their_list_is(tmp_path, script):
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\n")
    assert script.training_list(tmp_path, None) == (["a"], lists / "train.txt")
    (lists / "trainaug.txt").write_text("a\nb\n")
    assert script.training_list(tmp_path, None) == (["a", "b"], lists / "trainaug.txt")
    assert script.training_list(tmp_path, "train") == (["a"], lists / "train.txt")


def test_filling_rates_are_those_of_the_training_masks(toy, tmp_path, monkeypatch):
    seen, original = [], losses.filling_rate_loss
    monkeypatch.setattr(losses, "filling_rate_loss", lambda *a: seen.append(a[2]) or original(*a))
    made = tmp_path / "labels"
    assert train(toy, tmp_path / "run", "--loss", "filling-rate", "--epochs", 1, "--label-dir", made) == 0
    voc = toy / "VOC2012"
    expected = class_fill_rates(voc, read_list(voc / "ImageSets" / "Segmentation" / "train.txt"), made)
    assert len(seen) == 3 and all(torch.equal(rates, expected) for rates in seen) and (expected < 1).any()


def test_no_two_views_of_a_run_are_the_same(toy, tmp_path, monkeypatch):
    """Also of the two stages, whose epochs count from 0 alike. NumPy takes a seed (0, 3) and a seed (0, 3, 0) for the
    same: no two keys may be equal but for such zeros."""
    keys, original = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda key: keys.append(key) or original(key))
    assert train(toy, tmp_path) == 0
    keys = [np.trim_zeros(key, "b") for key in keys if not isinstance(key, int) and len(key) > 2]
    assert len(keys) == 12 + 2 * 12 and len(set(keys)) == len(keys)


def test_the_seed_decides_order_views_samples_and_start(toy, tmp_path, monkeypatch):
    """Key by key: the first number of each is the seed, and of the order of a stage's images seed + stage."""
    keys, starts, rng, seed_of, start = set(), [], np.random.default_rng, train_box2seg.seed_of, torch.manual_seed
    monkeypatch.setattr(np.random, "default_rng", lambda key: keys.add(("NumPy", len(key), key[0])) or rng(key))
    monkeypatch.setattr(train_box2seg, "seed_of", lambda *key: keys.add(("sample", len(key), key[0])) or seed_of(*key))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: starts.append(seed) or start(seed))
    assert train(toy, tmp_path, "--seed", 7, "--epochs", 1) == 0
    assert keys == {("NumPy", 2, 8), ("NumPy", 2, 9), ("NumPy", 4, 7), ("sample", 4, 7)} and starts == [7]


def test_validation_sees_images_at_its_scale(toy):
    torch.manual_seed(0)
    network = Box2SegNet(6, "resnet18", width=8).eval()
    network.segmentation[-1].weight.data.normal_()
    voc = toy / "VOC2012"
    ids = read_list(voc / "ImageSets" / "Segmentation" / "val.txt")
    read = functools.partial(train_box2seg.read_pair, voc, 6)
    found = {scale: validate(network, ids, read, scale, losses.confusion_matrix) for scale in (1.0, 0.5)}
    assert not torch.equal(found[1.0], found[0.5])
    for scale, confusion in found.items():
        assert torch.equal(confusion, sum(
            losses.confusion_matrix(predict(network, image, scales=(scale,)).argmax(0), torch.from_numpy(truth), 6)
            for image, truth in map(read, ids)))


@pytest.mark.parametrize("script", [train_box2seg, train_boxsup])
def test_validation_is_of_its_list_and_at_its_scale(toy, tmp_path, monkeypatch, script):
    seen, original = [], script.validate
    monkeypatch.setattr(script, "validate", lambda *a: seen.append((a[1], a[3])) or original(*a))
    assert short_run(script, toy, tmp_path, "--val-scale", 0.5) == 0
    assert seen == [([f"toy_val_{n:05}" for n in range(3)], 0.5)]


def test_best_is_the_best_and_last_the_last(toy, tmp_path, monkeypatch):
    scores = iter([2, 6, 4])                                    # tenths: IoU of the one class that occurs
    monkeypatch.setattr(train_box2seg, "validate", lambda *_: torch.tensor([[v := next(scores), 10 - v], [0, 0]]))
    assert train(toy, tmp_path, "--loss", "grabcut", "--epochs", 3) == 0
    best, last = (torch.load(tmp_path / name, weights_only=True) for name in ("best.pt", "last.pt"))
    assert (best["step"], best["best"]) == (6, pytest.approx(0.6))
    assert (last["step"], last["best"]) == (9, pytest.approx(0.6))
    assert [r["miou"] for r in log_of(tmp_path) if "miou" in r] == pytest.approx([0.2, 0.6, 0.4])


@pytest.mark.parametrize("script", [train_box2seg, train_boxsup])
def test_the_best_score_outlives_a_stop(toy, tmp_path, monkeypatch, script):
    scores = iter([6, 4])

    def scored(*_):
        if (tenths := next(scores)) == 6:
            signal.raise_signal(signal.SIGINT)
        return torch.tensor([[tenths, 10 - tenths], [0, 0]])

    monkeypatch.setattr(script, "validate", scored)
    assert short_run(script, toy, tmp_path, "--epochs", 2) == 130
    assert short_run(script, toy, tmp_path, "--epochs", 2, "--resume") == 0
    best, last = (torch.load(tmp_path / name, weights_only=True) for name in ("best.pt", "last.pt"))
    assert (best["step"], last["step"], last["best"]) == (3, 6, pytest.approx(0.6))


def test_training_learns(toy, tmp_path):
    assert train(toy, tmp_path, "--loss", "mask", "--backbone", "resnet18", "--epochs", 15, "--val-every", 15) == 0
    curve = [r["L_CE"] for r in log_of(tmp_path) if "L_CE" in r]
    assert np.mean(curve[-6:]) < 0.7 * np.mean(curve[:6])


# ---------------------------------------------------------------------------------------------------------------------
# Interrupts
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole_run(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(toy, out) == 0
    return out


@pytest.mark.parametrize("stage, after", [(1, 2), (2, 2), (2, 4)])
def test_a_run_that_died_goes_on_bit_for_bit(toy, tmp_path, whole_run, monkeypatch, stage, after):
    """Dies as from kill -9, with no chance to save, `after` steps into a stage; the last checkpoint may be older."""
    calls, name = [0], {1: "affinity_loss", 2: "box2seg_loss"}[stage]
    original = getattr(losses, name)

    def dying(*args, **kwargs):
        calls[0] += 1
        if calls[0] > after:
            raise RuntimeError("died")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(losses, name, dying)
        with pytest.raises(RuntimeError, match="died"):
            train(toy, tmp_path, "--save-every", 2, "--workers", 2)
    assert train(toy, tmp_path, "--resume", "--workers", 1) == 0
    assert_same_run(whole_run, tmp_path)


def test_kill_9_and_ctrl_c(toy, tmp_path, whole_run):
    flags = ["--data", toy, "--out", tmp_path, *TINY, "--save-every", 1]
    ends = []
    for number in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen([sys.executable, SCRIPT, *map(str, flags), *(["--resume"] if ends else [])],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        seen = len(log_of(tmp_path)) if ends else 0
        deadline = time.time() + 300
        while process.poll() is None and time.time() < deadline:
            if (tmp_path / "last.pt").exists() and len((tmp_path / "log.jsonl").read_text().splitlines()) > seen + 3:
                process.send_signal(number)
                break
            time.sleep(0.02)
        process.communicate(timeout=300)
        ends.append(process.returncode)
    assert ends[0] == -signal.SIGKILL and ends[1] in (0, 130)  # 0 if it was done before the signal came
    assert train(toy, tmp_path, "--resume") == 0
    assert_same_run(whole_run, tmp_path)


def test_a_polite_kill_of_all_processes(toy, tmp_path, whole_run):
    """As `timeout` and batch systems do it: the workers, too, get the signal."""
    process = subprocess.Popen([sys.executable, SCRIPT, *map(str, ["--data", toy, "--out", tmp_path, *TINY]),
                                "--workers", "2"], stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.time() + 300
    while process.poll() is None and time.time() < deadline:
        if (tmp_path / "log.jsonl").exists() and len((tmp_path / "log.jsonl").read_text().splitlines()) > 1:
            os.killpg(process.pid, signal.SIGTERM)
            break
        time.sleep(0.02)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 130 and "Traceback" not in error, error
    assert train(toy, tmp_path, "--resume") == 0
    assert_same_run(whole_run, tmp_path)


def test_a_terminal_that_is_closed_stops_a_run_unless_nohup_was_asked_for():
    with kept_signals():
        for before, stops in ((signal.SIG_DFL, [signal.SIGHUP]), (signal.SIG_IGN, [])):
            signal.signal(signal.SIGHUP, before)
            interrupted = model.catch_interrupts()
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupted == stops


@pytest.mark.parametrize("script", [train_box2seg, train_boxsup])
def test_images_that_are_trained_on_and_validated_on_are_told(toy, tmp_path, script, capsys):
    lists = toy / "VOC2012" / "ImageSets" / "Segmentation"
    (lists / "both.txt").write_text((lists / "train.txt").read_text() + "toy_val_00001\n")
    assert short_run(script, toy, tmp_path / "a", "--split", "both") == 0
    assert "1 of the 3 images of val.txt are trained on, too (toy_val_00001, for one)" in capsys.readouterr().out
    assert short_run(script, toy, tmp_path / "b") == 0 and "trained on, too" not in capsys.readouterr().out


def works_politely(pipe):
    quiet_worker(0)
    while True:
        pipe.send((pipe.recv(), signal.alarm(0)))           # how soon it would have rung


def test_a_polite_kill_passes_a_worker_by_and_a_second_one_ends_it():
    """A validation, which comes before the epoch's checkpoint, may take an hour after the first."""
    here, there = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=works_politely, args=(there,), daemon=True)
    worker.start()
    for number in range(3):
        here.send(number)
        assert here.poll(60) and here.recv() == (number, 0)
        if number == 1:
            os.kill(worker.pid, signal.SIGTERM)
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == -signal.SIGTERM


def test_a_broken_file_costs_no_step(toy, tmp_path, whole_run, monkeypatch):
    original, calls = train_box2seg.Crops.__getitem__, [0]

    def breaking(self, key):
        calls[0] += 1
        if calls[0] > 4 * 8:                                # in stage 2, in the middle of its second epoch
            raise train_box2seg.BadFile("a.jpg: not a readable image")
        return original(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(train_box2seg.Crops, "__getitem__", breaking)
        with pytest.raises(train_box2seg.BadFile, match="a.jpg"):
            train(toy, tmp_path)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (saved["stage"], saved["step"]) == (2, 5)
    assert train(toy, tmp_path, "--resume") == 0
    assert_same_run(whole_run, tmp_path)


def test_stage_1_leaves_the_decoders_of_y_and_alpha_alone(toy, tmp_path, monkeypatch):
    original, after = losses.affinity_loss, {}
    for steps in (1, 2):
        calls = []

        def interrupted(*args, **kwargs):
            calls.append(None)
            if len(calls) == steps:
                signal.raise_signal(signal.SIGINT)
            return original(*args, **kwargs)

        monkeypatch.setattr(losses, "affinity_loss", interrupted)
        assert train(toy, tmp_path / str(steps), "--backbone", "resnet18") == 130
        saved = torch.load(tmp_path / str(steps) / "last.pt", weights_only=True)
        assert (saved["stage"], saved["step"]) == (1, steps)
        after[steps] = saved["model"]
    for name, one in after[1].items():
        if name.startswith(("segmentation.", "attention.")):                     # their BatchNorm's averages, too
            assert torch.equal(one, after[2][name]), name
    assert after[2]["segmentation.1.num_batches_tracked"] == after[2]["attention.1.num_batches_tracked"] == 0
    assert after[2]["embedding.1.num_batches_tracked"] == 2
    for name in ("encoder.conv1.weight", "encoder.layer4.1.conv2.weight", "fuse.0.weight", "embedding.3.weight"):
        assert not torch.equal(after[1][name], after[2][name]), name


def test_resume_of_a_finished_run_changes_nothing(toy, tmp_path, whole_run):
    before = (whole_run / "last.pt").read_bytes()
    assert train(toy, whole_run, "--resume") == 0
    assert train(toy, whole_run, "--resume", "--amp", "auto") == 0      # off, which auto may have become
    assert (whole_run / "last.pt").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_at_once_and_names_term_and_step(toy, tmp_path, monkeypatch, capfd):
    original, calls = losses.background_loss, [0]

    def breaking(logits, box_labels):
        calls[0] += 1
        return original(logits, box_labels) * (torch.inf if calls[0] == 5 else 1)

    monkeypatch.setattr(losses, "background_loss", breaking)
    with pytest.raises(train_box2seg.BadInput, match="L_AW is inf at step 5 of stage 2"):
        train(toy, tmp_path, "--loss", "aw-fr", "--save-every", 1)
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert last["step"] == 4 and all(value.isfinite().all() for value in last["model"].values())


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, precision, other starts
# ---------------------------------------------------------------------------------------------------------------------

def test_two_processes(toy, tmp_path):
    """Sharded data and validation: one log, and the score of the synchronized weights is the score of one process."""
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
         str(29500 + os.getpid() % 1000), SCRIPT, "--data", toy, "--out", tmp_path, *TINY],
        capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    log = log_of(tmp_path)
    assert log[0]["world"] == 2 and len([r for r in log if "args" in r]) == 1
    steps = [(r["stage"], r["step"]) for r in log if "L" in r]
    assert steps == [(1, i) for i in (1, 2, 3)] + [(2, i) for i in range(1, 7)]
    network, _ = load_network(tmp_path / "last.pt")
    voc = toy / "VOC2012"
    ids = train_box2seg.read_list(voc / "ImageSets" / "Segmentation" / "val.txt")
    confusion = validate(network, ids, functools.partial(train_box2seg.read_pair, voc, 6), 1.0, losses.confusion_matrix)
    alone = losses.iou(confusion).nanmean().item()
    assert [r["miou"] for r in log if "miou" in r][-1] == pytest.approx(alone, abs=1e-12)


def test_gradients_are_added_up_in_one_order():
    """By default DDP regroups the gradients after its first step, a run that goes on one step later than a whole one;
    over three processes and more, sums then round otherwise."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        network = torch.nn.Sequential(*(torch.nn.Conv2d(3, 3, 1) for _ in range(3)))
        model = in_parallel(network, compiled=False)
        for _ in range(3):
            model(torch.ones(1, 3, 2, 2)).sum().backward()
        assert not model._get_ddp_logging_data().get("has_rebuilt_buckets")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_follows_float32(toy, tmp_path, monkeypatch, amp):
    # A step in fp16 takes seconds on most processors, so none is spent on overflows that halve the scale.
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=16))
    for name in ("off", amp):
        # At the full rate this small net's first steps are chaotic: any rounding leads elsewhere.
        assert train(toy, tmp_path / name, "--amp", name, "--backbone", "resnet18", "--epochs", 1, "--lr", 1e-4,
                     "--batch-size", 12 if amp == "fp16" else 4) == 0
    curves = [[r["L"] for r in log_of(tmp_path / name) if "L" in r] for name in ("off", amp)]
    assert curves[0] != curves[1] and np.allclose(*curves, rtol=0.1)
    scaler = torch.load(tmp_path / amp / "last.pt", weights_only=True)["scaler"]
    assert not scaler if amp == "bf16" else scaler["scale"] >= 1 and scaler["_growth_tracker"] > 0  # steps taken


def test_scores_are_computed_in_float32(toy, tmp_path, monkeypatch):
    modes, original = set(), train_box2seg.Box2SegNet.forward

    def forward(network, *args, **kwargs):
        modes.add((network.training, torch.is_autocast_enabled("cpu")))
        return original(network, *args, **kwargs)

    monkeypatch.setattr(train_box2seg.Box2SegNet, "forward", forward)
    assert train(toy, tmp_path, "--amp", "bf16", "--loss", "mask", "--epochs", 1) == 0
    assert modes == {(True, True), (False, False)}


def test_auto_is_bf16_only_where_the_processor_has_it(monkeypatch):
    for capabilities, amp in (({"avx512_bf16": True}, "bf16"), ({"avx512_bf16": False}, "off"), ({}, "off")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        assert mixed_precision("auto", torch.device("cpu"))[0] == amp
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert mixed_precision("auto", torch.device("cpu"))[0] == "off"


def test_a_weight_of_0_leaves_the_branch_out(toy, tmp_path):
    assert train(toy, tmp_path, "--lambda-aw", 0, "--lambda-a", 0, "--epochs", 1) == 0
    network, _ = load_network(tmp_path / "last.pt")
    assert network.attention is None and network.embedding is None
    assert {k for r in log_of(tmp_path) for k in r if k.startswith("L")} == {"L_GC", "L"}


def test_init_from_another_class_count_starts_the_heads_fresh_and_says_so(toy, tmp_path, whole_run, capsys):
    other = tmp_path / "VOCdevkit"
    make_toy_voc(other, images=12, val=3, size=(48, 64), seed=1)
    names = (other / "VOC2012" / "class_names.txt").read_text().split()
    (other / "VOC2012" / "class_names.txt").write_text("\n".join(names + ["one", "more"]) + "\n")
    assert train(other, tmp_path / "out", "--init", whole_run / "best.pt", "--loss", "grabcut", "--epochs", 1) == 0
    said = capsys.readouterr().out
    assert "fresh: segmentation.3.weight, segmentation.3.bias\n" in said and "7 classes" in said
    with pytest.raises(train_box2seg.BadInput,
                       match="is efficientnet_lite0, not resnet50: give --backbone efficientnet_lite0"):
        train(other, tmp_path / "else", "--init", whole_run / "best.pt", "--loss", "grabcut", "--backbone", "resnet50")


@pytest.mark.parametrize("network, last", [
    (lambda: Box2SegNet(4, "resnet18", 5, width=8), ("segmentation.3.", "attention.3.")),
    (lambda: DeepLabVGG16(4, large_fov=True), ("fc8.",))])
def test_of_other_classes_of_the_same_number_each_last_layer_starts_fresh(tmp_path, network, last):
    torch.manual_seed(0)
    old = network()
    torch.save({"model": old.state_dict(), "arch": old.arch, "class_names": list("0abc"), "args": {}, "optimizer": {}},
               tmp_path / "old.pt")
    for names, fresh in ((list("0abc"), ()), (list("0acb"), last)):
        torch.manual_seed(1)
        new = network()
        start = {name: value.clone() for name, value in new.state_dict().items()}
        initialize(new, tmp_path / "old.pt", names)
        for name, value in new.state_dict().items():
            assert torch.equal(value, (start if name.startswith(fresh) else old.state_dict())[name]), name


def test_width_and_embedding_dim_reach_the_network(toy, tmp_path):
    assert train(toy, tmp_path, "--epochs", 1, "--width", 12, "--embedding-dim", 7, "--pretrain-epochs", 0) == 0
    arch = load_network(tmp_path / "last.pt")[0].arch
    assert (arch["width"], arch["embedding_dim"], arch["num_classes"]) == (12, 7, 6)
    assert arch["backbone"] == "efficientnet_lite0"


def test_batches_too_small_for_batch_norm_are_reported(toy, tmp_path, capsys):
    for size, count in ((2, 1), (4, 0)):
        assert train(toy, tmp_path / str(size), "--batch-size", size, "--loss", "mask", "--epochs", 1) == 0
        assert capsys.readouterr().out.count("+1 and -1 whatever the images") == count


def test_masks_is_a_fixed_fraction(toy, tmp_path, whole_run, capsys):
    for seed, share, images in ((0, 0.5, 6), (1, 0.5, 6), (2, 1.0, 12)):  # 1.0 is a share, too, though all without it
        out = tmp_path / str(seed)
        assert train(toy, out, "--masks", share, "--init", whole_run / "best.pt", "--epochs", 1, "--seed", seed) == 0
        first = log_of(out)[0]
        assert first["images"] == images and first["args"]["loss"] == "mask"
    ids, _ = train_box2seg.training_images(toy / "VOC2012", SimpleNamespace(split="train", masks=0.5, seed=0))
    other, _ = train_box2seg.training_images(toy / "VOC2012", SimpleNamespace(split="train", masks=0.5, seed=1))
    assert ids == other == sorted(set(ids)) and len(ids) == 6
    every = read_list(toy / "VOC2012" / "ImageSets" / "Segmentation" / "train.txt")
    assert set(ids) < set(every) and ids not in (every[:6], every[6:], every[::2], every[1::2])


def test_a_run_that_goes_on_with_corrected_boxes_says_so(tmp_path, capsys):
    make_toy_voc(data := tmp_path / "VOCdevkit", images=4, val=2, size=(48, 64), seed=3)
    flags = "--loss", "grabcut", "--epochs", 1
    assert train(data, tmp_path / "out", *flags) == 0
    assert train(data, tmp_path / "out", *flags, "--resume") == 0
    assert "made anew" not in capsys.readouterr().out
    annotation = sorted((data / "VOC2012" / "Annotations").glob("toy_train*.xml"))[0]
    xmin = re.search("<xmin>(.*?)</xmin>", annotation.read_text())
    annotation.write_text(annotation.read_text().replace(xmin[0], f"<xmin>{int(float(xmin[1])) + 2}</xmin>", 1))
    os.utime(annotation, (time.time() + 60, time.time() + 60))
    assert train(data, tmp_path / "out", *flags, "--resume") == 0
    assert "labels of 1 images were made anew" in capsys.readouterr().out


@pytest.mark.parametrize("flags, named", [
    ("--loss grabcut --gamma 0.5 --lambda-aw 3 --lambda-alpha 2 --lambda-a 2 --detach-targets --pair-fraction 0.2",
     "--embedding-dim --pretrain-epochs --lambda-aw --lambda-alpha --lambda-a --gamma --pair-fraction "
     "--detach-targets"),
    ("--loss aw-box --gamma 0.5 --lambda-alpha 2", "--embedding-dim --pretrain-epochs --gamma"),
    ("--loss aw-one --lambda-aw 1 --gamma 0.5 --pretrain-epochs 0", "--embedding-dim --gamma"),
    ("--loss aw-flat --lambda-alpha 2 --gamma 0.5 --pretrain-epochs 0", "--embedding-dim --lambda-alpha"),
    ("--loss aw-flat --lambda-aw 0 --gamma 0.5 --pretrain-epochs 0", "--embedding-dim --gamma"),
    ("--loss box2seg --lambda-a 0 --pretrain-epochs 0", "--embedding-dim"),
    ("--loss mask --label-dir there --pretrain-epochs 0 --masks 1.0", "--label-dir --embedding-dim"),
    ("--loss box2seg --masks 1.0", "--masks"),
    ("--loss box2seg --gamma 0.5 --lambda-aw 2 --lambda-alpha 9 --lambda-a 2 --label-dir there", "")])
def test_flags_without_effect_are_named(flags, named, capsys):
    """In the order of --help. (TINY has --embedding-dim 8 and --pretrain-epochs 1.)"""
    args, given = train_box2seg.parse_arguments([*TINY, *flags.split()])
    train_box2seg.say_without_effect(train_box2seg.without_effect(args), given, "why")
    assert capsys.readouterr().out == (f"{named}: without effect, why\n" if named else "")


def test_partial_weights_start_the_encoder(toy, tmp_path, capsys):
    import torchvision
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith(("layer4", "fc"))}, tmp_path / "partial.pth")
    flags = "--backbone", "resnet18", "--weights", tmp_path / "partial.pth", "--loss", "grabcut"
    assert train(toy, tmp_path / "out", *flags, "--epochs", 1) == 0
    said = capsys.readouterr().out
    assert "missing" in said and "layer4" in said
    with pytest.raises(BadInput, match="has no statistics for 5 BatchNorm layers .layer4.0.bn1.*--no-freeze-bn"):
        train(toy, tmp_path / "frozen", *flags, "--freeze-bn")


@pytest.mark.parametrize("how", ["file", "address"])
def test_download_from_a_local_archive(toy, tmp_path, how):
    archive = tmp_path / "archive" / "voc.tar"
    archive.parent.mkdir()
    with tarfile.open(archive, "w") as tar:
        tar.add(toy, "VOCdevkit")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=archive.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = archive if how == "file" else f"http://127.0.0.1:{server.server_port}/voc.tar"
        data = tmp_path / "here" / "VOCdevkit"
        assert train(data, tmp_path / "out", "--download", source, "--loss", "mask", "--epochs", 1) == 0
        server.shutdown()
    assert (data / "VOC2012" / "JPEGImages").is_dir() and (tmp_path / "out" / "last.pt").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line, on stderr, status 2
# ---------------------------------------------------------------------------------------------------------------------

def test_no_data_names_three_ways_on(tmp_path):
    said = refused(SCRIPT, "--data", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert "nowhere" in said and "--download" in said and "toy_voc.py" in said and "own" in said


def test_a_corrupt_picture_met_by_a_worker_is_one_line(toy, tmp_path):
    data = tmp_path / "VOCdevkit"
    make_toy_voc(data, images=4, val=2, size=(48, 64), seed=2)
    name = train_box2seg.read_list(data / "VOC2012" / "ImageSets" / "Segmentation" / "train.txt")[1]
    picture = data / "VOC2012" / "JPEGImages" / f"{name}.jpg"
    picture.write_bytes(picture.read_bytes()[:300])
    said = refused(SCRIPT, "--data", data, "--out", tmp_path / "out", *TINY, "--workers", 1, "--loss", "mask")
    assert f"{name}.jpg" in said
    flags = map(str, ["--data", data, "--out", tmp_path / "alone", *TINY, "--workers", 2, "--loss", "mask"])
    process = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, timeout=300)
    assert process.returncode == 2 and f"{name}.jpg" in process.stderr      # workers keep no process from ending


@pytest.mark.parametrize("flags, words", [
    (["--crop", "8"], "--crop 8"),
    (["--pair-fraction", "-1"], "--pair-fraction -1"),
    (["--device", "meta"], "--device meta"),
    (["--seed", "-1"], "--seed"),
    (["--download", __file__], "--download failed"),
    (["--val-split", "nosuch"], "nosuch.txt"),
    (["--batch-size", "13"], "--batch-size 12 or less"),
    (["--masks", "0.1", "--loss", "mask"], "1 images of .*train.txt are fewer than one batch: give more images"),
    (["--lr", "-1"], "--lr"),
    (["--momentum", "-1"], "--momentum"),
    (["--weight-decay", "-1"], "--weight-decay"),
    (["--masks", "0.5", "--loss", "box"], "--loss mask"),
    (["--val-scale", "inf"], "--val-scale inf"),
    (["--scale", "0.5", "inf"], "--scale 0.5 inf"),
    (["--split", "nosuch"], "nosuch.txt"),
    (["--weights", "nosuch.pth"], "nosuch.pth"),
    (["--init", "nosuch.pt"], "nosuch.pt"),
    (["--gamma", "7"], "--gamma 7.0: expected a share"),
    (["--power", "-1"], "--power -1.0"),
    (["--resume"], "last.pt"),
    (["--device", "cuda:99"], "CUDA"),
])
def test_bad_flags(toy, tmp_path, flags, words):
    with pytest.raises((train_box2seg.BadInput, train_box2seg.BadFile)) as caught:
        train(toy, tmp_path / "out", "--loss", "grabcut", *flags)
    assert re.search(words, str(caught.value)) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_existing_run_is_neither_overwritten_nor_resumed_with_other_arguments(toy, tmp_path, whole_run):
    before = (whole_run / "last.pt").read_bytes()
    with pytest.raises(train_box2seg.BadInput, match="--resume"):
        train(toy, whole_run)
    with pytest.raises(train_box2seg.BadInput, match="--overwrite starts anew: give one of them"):
        train(toy, whole_run, "--resume", "--overwrite")
    with pytest.raises(train_box2seg.BadInput, match="--lr 0.5: the run in .* has 0.02"):
        train(toy, whole_run, "--resume", "--lr", "0.5")
    with pytest.raises(train_box2seg.BadInput, match="--init auto: the run in .* has None"):
        train(toy, whole_run, "--resume", "--init", "auto")
    other = tmp_path / "VOCdevkit"
    make_toy_voc(other, images=16, val=3, size=(48, 64), seed=1)
    with pytest.raises(train_box2seg.BadInput, match="trained on 12 images and 5 classes"):
        train(other, whole_run, "--resume")
    assert (whole_run / "last.pt").read_bytes() == before
    shutil.copy(whole_run / "best.pt", tmp_path / "best.pt")        # all that somebody kept of a run
    with pytest.raises(train_box2seg.BadInput, match="has a best.pt: --overwrite"):
        train(toy, tmp_path)
    assert (tmp_path / "best.pt").exists()


def test_a_folder_in_which_a_training_is_at_work_is_refused(toy, tmp_path):
    """Until the other process ends, however it ends."""
    code = "import model, pathlib, sys; model.hold_folder(pathlib.Path(sys.argv[1])); print(1, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / "out"], cwd=SCRIPT.parent, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"1\n"
    with pytest.raises(BadInput, match="out: another training is at work there"):
        train(toy, tmp_path / "out", "--loss", "mask")
    assert not (tmp_path / "out" / "log.jsonl").exists()
    other.kill()
    other.communicate()
    assert train(toy, tmp_path / "out", "--loss", "mask", "--epochs", 1) == 0


def test_a_disk_that_fills_up_keeps_no_half_of_a_checkpoint(tmp_path, monkeypatch):
    """And --resume is the remedy where there is something to go on from."""
    def full(_, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("unexpected pos 64 vs 0\nframe 1")

    network = Box2SegNet(3, "efficientnet_lite0", pretrained=False, width=8)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    save = functools.partial(model.save_checkpoint, tmp_path / "best.pt", network, optimizer,
                             torch.amp.GradScaler("cpu", enabled=False), SimpleNamespace(), [], [], step=1)
    save()
    network.segmentation[1].running_var[0] = torch.nan      # the statistics are not finite, though all weights are
    with pytest.raises(BadInput, match="not finite after step 1"):
        save()
    network.segmentation[1].running_var[0] = 1
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(BadInput, match="best.pt: cannot be written .unexpected pos 64 vs 0.: .*then start again"):
        save()
    (tmp_path / "last.pt").touch()
    with pytest.raises(BadInput, match="make room, then --resume"):
        save()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt"]


def test_a_run_goes_on_with_as_many_processes_as_it_had(toy, tmp_path, whole_run):
    saved = torch.load(whole_run / "last.pt", weights_only=True)
    assert saved["world"] == 1
    torch.save(saved | {"world": 2}, tmp_path / "last.pt")
    with pytest.raises(train_box2seg.BadInput, match="a run of 2 processes cannot go on with 1: .*--nproc-per-node 2"):
        train(toy, tmp_path, "--resume")


def test_a_damaged_checkpoint_is_one_line(toy, tmp_path, whole_run):
    (tmp_path / "last.pt").write_bytes((whole_run / "last.pt").read_bytes()[:1000])
    assert "last.pt" in refused(SCRIPT, "--resume", "--out", tmp_path)


def test_missing_truth_to_validate_on_is_said_before_training(toy, tmp_path):
    data = tmp_path / "VOCdevkit"
    make_toy_voc(data, images=4, val=2, size=(48, 64), seed=3)
    name = train_box2seg.read_list(data / "VOC2012" / "ImageSets" / "Segmentation" / "val.txt")[0]
    (data / "VOC2012" / "SegmentationClass" / f"{name}.png").unlink()
    with pytest.raises(train_box2seg.BadInput, match=f"{name}.png.*--val-split none"):
        train(data, tmp_path / "out", "--loss", "grabcut")
    truth = data / "VOC2012" / "SegmentationClass" / f"{name}.png"
    for broken, words in ((np.zeros((5, 5)), "5x5"), (np.full((48, 64), 9), "9")):      # of another size; class 9 of 5
        write_label(truth, broken)
        with pytest.raises(train_box2seg.BadFile, match=f"{name}.png.*{words}"):
            train(data, tmp_path / "out", "--loss", "grabcut")
        assert not (tmp_path / "out").exists()
    assert train(data, tmp_path / "out", "--loss", "grabcut", "--val-split", "none", "--epochs", 1) == 0


def test_every_device_is_named(toy, tmp_path, whole_run, devices_named):
    assert train(toy, tmp_path / "out") == 0
    with torch.device("cpu"):
        assert_same_run(tmp_path / "out", whole_run)


def test_one_gpu_is_asked_for_by_number(toy, tmp_path, one_gpu):
    with pytest.raises(one_gpu):
        train(toy, tmp_path, "--device", "cuda")
