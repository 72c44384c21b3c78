"""Train BoxSup (Dai, He, Sun, ICCV 2015) from bounding boxes, its baselines, and its semi-supervised rows.

    python train_boxsup.py --data VOCdevkit                # Table 1: boxes only; 62.0 in the paper, after the CRF
    python train_boxsup.py --data VOCdevkit --supervision rectangles           # a row of Table 2
    python train_boxsup.py --data VOCdevkit --method ss --out runs/ss          # a row of Table 3
    python train_boxsup.py --masks-list VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt --out runs/semi    # Table 1
    python train_boxsup.py --data toy/VOCdevkit --recipe small --out runs/toy  # synthetic images, minutes on a laptop
    torchrun --nproc-per-node 4 train_boxsup.py --data VOCdevkit               # four GPUs, the same total batch
    python train_boxsup.py --resume --out runs/boxsup                          # go on where it stopped, bit for bit

Reads    VOC2012/{JPEGImages,Annotations,ImageSets/Segmentation}, Candidates-mcg/<id>.npz (made where missing, see
         mcg_candidates.py), for --supervision grabcut the GrabCutMasks of grabcut_labels.py, true masks to validate
         on, and to train on with --supervision masks and --masks-list, and the folders of --extra.
Writes   in --out:
         masks/<id>.png     the masks that the network trains on now, made anew before each epoch (rectangles: once);
                            masks-1/, masks-2/ those of the --extra sets
         masks.png          some of them over the epochs, as in the paper's Fig. 3; epochs/ keeps those it shows
         last.pt, best.pt   checkpoints for evaluate.py. Report last.pt's score: best.pt was selected on --val-split
         log.jsonl          first line the arguments, git revision, versions, device, seed; then a record for each label
                            update, every --log-every steps, and each validation

The paper's algorithm (Fig. 1, Sect. 4.3) is **train()** below; it alternates between two sets of variables of Eq. 4:
    labels    network fixed: each box takes one of the k candidate segments of least cost E_o + lambda E_r, at random;
              the segment gets the class of the box, all else is background                **update_labels()**
              (lambda is 0 where the network predicts too little of a box as its class: score_candidates())
    network   labels fixed: one epoch of cross-entropy by SGD
"Our algorithm starts from the step of updating segment labels." The rest of this file says which images have which
labels and what the rows of the tables set; what any training needs is in the last section of model.py.
"""
import argparse
import sys
import time
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import losses
import mcg_candidates
from mcg_candidates import BadInput as BadFile
from mcg_candidates import (box_mask, check_classes, class_names, find_image, find_voc, larger_first, read_boxes,
                            read_candidates, read_image, read_label, read_list, read_source, require_a_box,
                            require_a_class, voc_palette, write_label, writing)
from model import (BACKBONES, BadInput, Box2SegNet, DeepLabVGG16, Interrupted, Progress, add_common_arguments, barrier,
                   catch_interrupts, check_arguments, check_images, download_voc, evaluating, finish, full_size_logits,
                   hold_folder, in_parallel, make_optimizer, mixed_precision, normalize, parse, pick_device,
                   place_network, print_rank0, random_crop, rank_and_world, resume_run, run_script, save_checkpoint,
                   say_what_a_crop_sees, say_what_is_trained_on, say_without_effect, seed_of, sgd_step, start_log,
                   start_processes, to_cells, validate, write_log)

# mIoU on val in the paper. Table 1: boxes only 62.0, 1,464 masks and 9,118 boxes 63.5, masks only 63.8.
# Table 2: rectangles 52.3, GrabCut 55.2, without sampling (--top-k 1) 59.7. Table 3: SS 59.5, GOP 60.4, MCG 62.0.
# All of them after the CRF (evaluate.py --crf); the mIoU that training prints is without it.
# PAPER SILENT: how GrabCut is run for Table 2 ("We also use GrabCut [26]"). As for Box2Seg; its masks are better than
# those of OpenCV's plain GrabCut (76.2 and 71.2 mIoU on 2007's training images; the networks 48.4 and 44.2 after 44
# epochs: docs/results.md, "BoxSup, 21 classes"), for which grabcut_labels.py names the flags.
SUPERVISION = ("candidates", "rectangles", "grabcut", "masks")

# --recipe sets these defaults; a flag of its own overrides each.
# PAPER SILENT: crop, augmentation, momentum, weight decay and the rate of the new layer; the baseline's (DeepLab, Chen
# et al., ICLR 2015), which the paper says it reproduces: crops of 321, mirrored but not scaled, 0.9, 5e-4, ten times.
# (In others' copies of its settings biases learn twice as fast as weights and do not decay; not here.)
# PAPER SILENT: a setting for networks that start from scratch; "small" is ours, with the views of train_box2seg.py.
# PAPER SILENT: a setting for photographs without a large GPU; "photos" is ours, with the encoder of train_box2seg.py's,
# which here, too, keeps its BatchNorm and learns at a tenth of the rate, since it knows its classes.
RECIPES = {
    "paper": dict(backbone="vgg16", pretrained=True, crop=321, batch_size=20, epochs=45, lr_drop=15, lr=1e-3,
                  head_lr=10.0, encoder_lr=1.0, freeze_bn=False, clip_norm=0.0, scale=[1.0, 1.0], colour=0.0,
                  val_scale=1.0),
    "photos": dict(backbone="efficientnet_lite0", pretrained=True, crop=193, batch_size=8, epochs=20, lr_drop=15,
                   lr=0.02, head_lr=1.0, encoder_lr=0.1, freeze_bn=True, clip_norm=10.0, scale=[0.5, 1.0], colour=0.3,
                   val_scale=0.7),
    "small": dict(backbone="resnet18", pretrained=False, crop=129, batch_size=8, epochs=10, lr_drop=8, lr=0.02,
                  head_lr=1.0, encoder_lr=1.0, freeze_bn=False, clip_norm=10.0, scale=[0.5, 2.0], colour=0.3,
                  val_scale=1.0),
}


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm (Sect. 4.3)
# ---------------------------------------------------------------------------------------------------------------------

def train(network, images, updated, choices, optimizer, autocast, scaler, args, progress):
    """Sect. 4.3: "We iteratively perform the above two steps, fixing one set of variables and solving for the other
    set. For each iteration, we update the network parameters using one training epoch (i.e., all training images are
    visited once), and after that we update the segment labeling of all images."

    updated: the indices of the images that learn from candidates; choices: {index: (K,) the candidate that each box
    holds, -1 for none}, filled here.
    """
    num_classes, device = network.arch["num_classes"], next(network.parameters()).device
    crops = Crops(images, num_classes, args.crop, tuple(args.scale), args.colour, args.seed)
    model = in_parallel(network, args.compile)

    # PAPER SILENT: the last, incomplete batch of an epoch. It is dropped: its images, fewer than --batch-size, the last
    # of the epoch's random order, wait for another epoch.
    for epoch in range(progress.step // progress.per_epoch, args.epochs):
        # ---- first step: theta fixed, update {l_S}
        if updated and progress.step == epoch * progress.per_epoch:
            # PAPER SILENT: what E_r is in the first label update ("our algorithm starts from the step of updating
            # segment labels"), when the network's last layer is still random. That update goes by E_o alone.
            started, scorer = time.time(), network if epoch >= args.warm_up else None
            with evaluating(network):
                new, sums, confusion = update_labels(scorer, images, updated, choices, epoch, args, num_classes,
                                                     progress.interrupted)
            choices.update(new)
            report_labels(images, updated, epoch, scorer, sums, confusion, time.time() - started, args, progress)

        # ---- second step: {l_S} fixed, update theta: "the problem becomes the FCN problem as in Eqn.(1)"
        lr = args.lr * 0.1 ** (epoch // args.lr_drop)           # "divided by 10 after every 15 epochs"
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        end = (epoch + 1) * progress.per_epoch
        for step, (image, labels) in progress.steps(crops, end, args.seed + 1, device):
            torch.manual_seed(seed_of(args.seed, step, rank_and_world()[0]))    # of VGG-16's dropout
            with autocast:
                logits = model(normalize(image))                                # (N, L+1, h, w)
            logits = logits[0] if isinstance(logits, tuple) else logits         # Box2SegNet gives its branches, too
            # PAPER SILENT: at which resolution Eq. 1 is summed. On the network's grid, each cell with the label of its
            # pixel, as DeepLab's code does; the label update sees full resolution.
            loss = losses.cross_entropy_loss(logits, to_cells(labels, network))     # Eq. 1

            clipped = sgd_step(loss, model, optimizer, scaler, args.clip_norm)
            progress.finish_step(lr, {"E_r": loss}, clipped)           # with true masks it is Eq. 1's E


def update_labels(scorer, images, updated, previous, epoch, args, num_classes, interrupted):
    """Sect. 4.3, first step: "With the network parameters theta fixed, we update the semantic labeling {l_S} [...] by
    selecting a single candidate segment for each ground-truth bounding box, such that its cost E_o + lambda E_r is the
    smallest among all candidates", or one of the k smallest at random; and writes the masks that result.

    scorer: the network in eval mode, or None where E_o alone decides; updated: the indices of the images; previous:
    {index: choices} of the update before, or nothing; interrupted: a list that Ctrl-C fills.
    -> choices {index: (K,) int32}, their sums for the report (see measure()), and the confusion matrix (C, C) of the
    estimated masks against the truth where it exists. Under torchrun each process updates its share, and gets all.
    """
    def read(index):
        return index, *read_proposals(images, index, num_classes)

    def assign(proposals):
        for index, image, c in proposals:
            if interrupted:
                raise Interrupted("in the label update")
            boxes, candidate_boxes = torch.from_numpy(c["boxes"]), torch.from_numpy(c["candidate_boxes"])
            E_o = losses.overlap_cost(boxes, candidate_boxes).numpy()                             # (K, N), Eq. 2
            cost = E_o
            if scorer is not None and len(boxes):
                cost = score_candidates(scorer, image, c, images.ids[index], args)    # (K, N), Eq. 4
            rng = np.random.default_rng((args.seed, epoch, index, 1))   # 1: not the stream that makes the image's crop
            choice = choose(cost, E_o < 1, args.top_k, rng)                                       # (K,), of the N
            labels = paint(c["superpixels"].shape, c["boxes"], c["classes"], segments_of(choice, c))        # (H, W)
            yield index, choice, labels, measure(choice, cost, E_o, previous.get(index), args.top_k)

    def write(job):
        index, choice, labels, measured = job
        write_label(images.files(index)[1], labels)
        return index, choice, measured, confusion_with_truth(images, index, labels, num_classes)

    # Threads read files ahead of the network and write them behind it: with E_o alone, on 2 cores, 8 ms an image, where
    # a DataLoader, which hands whole images from process to process, took 23.
    choices, sums = {}, Counter()
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device="cpu")
    (rank, world), threads = rank_and_world(), max(1, args.workers)
    mine = updated[rank::world]
    with ThreadPoolExecutor(threads) as pool:
        jobs = ahead(pool, write, assign(ahead(pool, read, mine, threads)), threads)
        for index, choice, measured, table in tqdm(jobs, "labels", len(mine), leave=False, unit="image",
                                                   disable=True if rank else None):
            choices[index] = choice
            sums.update(measured)
            confusion += table
    return gather(choices, sums, confusion)


# ---------------------------------------------------------------------------------------------------------------------
# The parts of the label update
# ---------------------------------------------------------------------------------------------------------------------

def read_proposals(images, index, num_classes):
    """-> image (H, W, 3) uint8, and the candidates of its boxes as mcg_candidates.py wrote them."""
    image_file, _, candidates = images.files(index)
    image = read_image(image_file)
    return image, read_candidates(candidates, image.shape[:2], num_classes)


def paint(size, boxes, classes, segments):
    """The estimated masks l_S: each box's segment in the box's class, all else background -> (H, W) uint8.

    boxes (K, 4), classes (K,), segments: K times (H, W) bool, or None for a box that stays a rectangle.
    """
    # PAPER SILENT: which of two segments that overlap is on top; that of the smaller box, as for rectangles (and as in
    # Box2Seg), since what lies in front is more often the smaller.
    # DEPARTS: the paper paints the whole segment, and "all other pixels are assigned the background label" (Sect. 4.3).
    # Here the part of a segment outside its box becomes background, too: it is not the object, and E_r does not count
    # it. Masks of 68.8 mIoU in place of 67.2 (docs/results.md, "Network feedback").
    labels = np.zeros(size, np.uint8)
    for k in larger_first(boxes):
        x0, y0, x1, y1 = boxes[k]
        part = labels[y0:y1, x0:x1]
        if segments[k] is None:
            part[:] = classes[k]
        else:
            part[segments[k][y0:y1, x0:x1]] = classes[k]
    return labels


def choose(cost, overlaps, top_k, rng):
    """One candidate for each box: at random one of its top_k cheapest, -1 where none overlaps the box.

    cost (K, N); overlaps (K, N) bool, the candidates whose tight box meets the box -> (K,) int32.
    """
    # PAPER SILENT: a box that no candidate overlaps; it keeps its rectangle.
    # DEPARTS: Sect. 4.3 takes the smallest cost "among all candidates"; ours are those whose tight box meets the box,
    # since others would paint nothing in it. (Rarely a segment whose tight box does has no pixel in the box, and paints
    # nothing: one of the five cheapest of 2 of 899 boxes of VOC's 2007.)
    cost = np.where(overlaps, cost, np.inf)
    choice = np.full(len(cost), -1, np.int32)
    for k, row in enumerate(cost):
        n = min(top_k, np.isfinite(row).sum())
        if n:
            choice[k] = np.argsort(row, kind="stable")[rng.integers(n)]
    return choice


def segments_of(choice, candidates):
    """What paint() takes: the masks of the candidates chosen, None for -1."""
    return [candidates["members"][n][candidates["superpixels"]] if n >= 0 else None for n in choice]


def score_candidates(network, image, c, image_id, args):
    """Eq. 4 for an image (H, W, 3) and its candidates, as read_proposals() gives them -> (K, N) float32 array."""
    # PAPER SILENT: at which size the network sees an image here; its own, as at test (--val-scale).
    # DEPARTS: lambda = 3 is printed as a constant. Ours holds for a box if the network predicts the box's class in 0.3
    # or more of its pixels; for the others it is 0. A network takes what it does not recognize for background, and E_r
    # is then smallest for the smallest segment. (What is thin or mostly hidden never fills 0.3 of its box, and stays
    # with E_o: true masks fill less in 70 of 899 boxes of VOC's 2007.) After four epochs of 382 photographs lambda = 3
    # for every box made masks of 53.0 mIoU, E_o alone 65.8, and lambda = 3 for the boxes recognized 68.8
    # (docs/results.md, "Network feedback").
    device = next(network.parameters()).device
    with torch.inference_mode():
        logits = full_size_logits(network, torch.from_numpy(image), args.val_scale)               # (C, H, W), float32
        there = {key: torch.from_numpy(value).to(device) for key, value in c.items()}
        recognized = losses.recognized_share(logits, there["boxes"], there["classes"])            # (K,)
        weight = args.lambda_r * (recognized >= args.min_recognized)[:, None]                     # (K, 1): lambda or 0
        cost = losses.candidate_cost(logits, weight=weight, **there).cpu().numpy()
    if not np.isfinite(cost).all():
        raise BadInput(f"Eq. 4 is not finite for {image_id}: stopped; try a lower --lr")
    return cost


def measure(choice, cost, E_o, previous, top_k):
    """One image's summands for report_labels(), {name: number}:

        assigned, rectangles    boxes with a segment, and without one
        cost, box_iou           of the chosen segments: sum of Eq. 4, and sum of the IoU of tight box and box
        changed                 boxes whose choice differs from `previous` (None: all)
        box_iou_alone           sum over boxes of the mean IoU of the top_k segments among which E_o alone would draw
    """
    assigned = np.flatnonzero(choice >= 0)
    chosen, best = choice[assigned], np.sort(E_o[assigned], 1)[:, :top_k]
    return {"assigned": len(assigned), "rectangles": len(choice) - len(assigned),
            "cost": float(cost[assigned, chosen].sum()), "box_iou": float((1 - E_o[assigned, chosen]).sum()),
            "changed": len(choice) if previous is None else int((choice != previous).sum()),
            "box_iou_alone": float(((1 - best).sum(1) / (best < 1).sum(1)).sum())}


def confusion_with_truth(images, index, labels, num_classes):
    """Estimated mask against the true one, where there is one: it is reported, never trained on -> (C, C), or 0."""
    image_file, truth = images.files(index)[0], truth_file(images.voc, images.ids[index])
    if images.voc / "JPEGImages" not in image_file.parents or not truth.exists():
        return 0
    try:
        truth = torch.from_numpy(read_label(truth, labels.shape, num_classes))
    except BadFile:                                     # nothing is learned from it: no reason to stop
        return 0
    return losses.confusion_matrix(torch.from_numpy(labels), truth, num_classes)


def ahead(pool, work, items, count):
    """work(item) for each item, in order, while `count` more are under way in the pool's threads."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > count:
            yield waiting.popleft().result()
    for job in waiting:
        yield job.result()


def gather(choices, sums, confusion):
    """What each process has of the label update -> that of all together, the choices in the order of the images."""
    if not dist.is_initialized():
        return choices, sums, confusion
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, (choices, sums, confusion))
    choices, sums, confusions = zip(*shares)
    together = {index: choice for share in choices for index, choice in share.items()}
    return dict(sorted(together.items())), sum(sums, Counter()), sum(confusions)


def repaint(images, updated, choices, num_classes):
    """For a run resumed in the middle of an epoch: paints those of the epoch's masks again that are missing on disk."""
    rank, world = rank_and_world()
    for index in updated[rank::world]:
        label_file = images.files(index)[1]
        if not label_file.exists():
            c = read_proposals(images, index, num_classes)[1]
            write_label(label_file, paint(c["superpixels"].shape, c["boxes"], c["classes"],
                                          segments_of(choices[index], c)))
    barrier()


def report_labels(images, updated, epoch, scorer, sums, confusion, seconds, args, progress):
    """A line and a record of a label update, and Fig. 3."""
    boxes, assigned = sums["assigned"] + sums["rectangles"], max(sums["assigned"], 1)
    report = {"boxes": boxes, "rectangles": sums["rectangles"], "cost": sums["cost"] / assigned,
              "box_iou": sums["box_iou"] / assigned, "box_iou_alone": sums["box_iou_alone"] / assigned,
              "changed": sums["changed"] / max(boxes, 1)}
    if confusion.sum():
        report["mask_miou"] = losses.iou(confusion).nanmean().item()
    write_log(progress.out, {"step": progress.step + 1, "labels_of_epoch": epoch + 1, **report})
    if rank_and_world()[0] == 0 and epoch + 1 in (*args.show_epochs, args.epochs) and args.show_images:
        show_masks(images, updated.start, progress.out, epoch + 1, args.show_images)
    print_rank0(f"labels epoch {epoch + 1:{len(str(args.epochs))}d}/{args.epochs}  cost {report['cost']:.4f}  box IoU "
                f"{report['box_iou']:.4f}  changed {report['changed']:4.0%}" + (
                f"  mIoU of masks {100 * report['mask_miou']:5.2f}" if "mask_miou" in report else "") +
                f"  {len(updated) / seconds:5.1f} img/s", flush=True)
    # (The ratio is 1 where E_o alone chooses; where masks became scraps it was 0.85 and less.)
    if scorer is not None and report["box_iou"] < 0.95 * report["box_iou_alone"]:
        print_rank0("the chosen segments no longer fit their boxes: the network does not know its objects well enough "
                    "to choose; start again with a larger --min-recognized or a longer --warm-up", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Figure 3
# ---------------------------------------------------------------------------------------------------------------------

def show_masks(images, first, out, epoch, count):
    """Fig. 3: keeps this epoch's masks of a few images in out/epochs, and draws out/masks.png: one row per image, the
    image and its estimated masks over the epochs kept so far."""
    # PAPER SILENT: from when Fig. 3 counts: a mask there is "the supervision for the next epoch". Since the algorithm
    # starts with the masks, epoch 1's here are those with which epoch 1 trains, chosen by E_o alone.
    height, rows = 160, []
    colours = np.minimum(voc_palette() * 1.1 + 40, 255)
    chosen = range(first, len(images.ids), max(1, (len(images.ids) - first) // count))[:count]
    for index in chosen:
        image_file, label_file, _ = images.files(index)
        image = read_image(image_file)
        write_label(out / "epochs" / f"{index}-{epoch}.png", read_label(label_file))
        panels = [("image", image)]
        for kept in range(1, epoch + 1):
            if (out / "epochs" / f"{index}-{kept}.png").exists():
                labels = read_label(out / "epochs" / f"{index}-{kept}.png")
                strength = (labels > 0)[..., None] * 0.7                                          # (H, W, 1)
                mixed = (1 - strength) * 0.6 * image.mean(2, keepdims=True) + strength * colours[labels]
                panels.append((f"epoch {kept}", mixed.astype(np.uint8)))
        width = min(max(60, round(image.shape[1] * height / image.shape[0])), 6 * height)
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
    with writing(out / "masks.png") as temporary:
        Image.fromarray(np.vstack(rows)).save(temporary, "PNG")


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

class Crops(torch.utils.data.Dataset):
    """(epoch, index) -> image (crop, crop, 3), labels (crop, crop), both uint8: a random view of image and mask.

    A view depends on (seed, epoch, index) alone, so that a run is repeatable and resumable in the middle of an epoch.
    """
    def __init__(self, images, num_classes, crop, scale_range, colour, seed):
        self.images, self.num_classes, self.view, self.seed = images, num_classes, (crop, scale_range, colour), seed

    def __len__(self):
        return len(self.images.ids)

    def __getitem__(self, key):
        epoch, index = key
        image_file, label_file, _ = self.images.files(index)
        image = read_image(image_file)
        labels = read_label(label_file, image.shape[:2], self.num_classes)
        image, (labels,) = random_crop(image, [labels], np.random.default_rng((self.seed, epoch, index)), *self.view)
        return image, labels


# ==== shared block "lists and truth": equal to the byte in train_box2seg.py and train_boxsup.py
def open_data(args, saved):
    """--data, after --download (not in a run that goes on) -> the folder that holds JPEGImages."""
    if args.download and not saved and rank_and_world()[0] == 0:
        download_voc(args.download, args.data)
    barrier()
    try:
        return find_voc(args.data)
    except BadFile as error:
        raise BadInput(f"{error}; three ways on: --download fetches VOC 2012; python tests/toy_voc.py {args.data} "
                       "makes a small set; for boxes of your own see README.md, 'Your own boxes'") from None


def training_list(voc, split):
    """-> (ids, path of the list). --split, or trainaug.txt (the 10,582 images) where it exists, otherwise train.txt."""
    folder = voc / "ImageSets" / "Segmentation"
    for name in [split] if split else ["trainaug", "train"]:
        if (folder / f"{name}.txt").exists():
            return read_list(folder / f"{name}.txt"), folder / f"{name}.txt"
    wanted = f"{split}.txt" if split else "trainaug.txt or train.txt"
    raise BadInput(f"no image list {folder}/{wanted}: write one, an image id (file name without .jpg) a line")


def validation_list(voc, split, num_classes):
    """--val-split -> ids with ground-truth masks; [] for "none", or for the default "val" where there is no val.txt.
    Reads every mask now, so that a broken one does not stop the run after its first epoch."""
    path = voc / "ImageSets" / "Segmentation" / f"{split}.txt"
    if split == "none" or (split == "val" and not path.exists()):
        print_rank0("no validation: no list of images with true masks")
        return []
    ids = read_list(path)
    for file in (f for i in ids for f in (find_image(voc / "JPEGImages", i), truth_file(voc, i))):
        if not file.exists():
            raise BadInput(f"no {file} to validate on: add it, or give --val-split none")
    require_a_class(truth_file(voc, i) for i in ids)
    if rank_and_world()[0] == 0:
        for i in tqdm(ids, "validation list", leave=False, unit="image", disable=None):
            read_pair(voc, num_classes, i)
    return ids


def truth_file(voc, image_id):
    """Ground-truth mask of an image: VOC's, or, for the 9,000 extra images (SBD), the one in SegmentationClassAug."""
    own, extra = (voc / folder / f"{image_id}.png" for folder in ("SegmentationClass", "SegmentationClassAug"))
    return extra if extra.exists() and not own.exists() else own


def read_pair(voc, num_classes, image_id):
    """-> image (H, W, 3) and true labels (H, W), uint8."""
    image = read_image(find_image(voc / "JPEGImages", image_id))
    return image, read_label(truth_file(voc, image_id), image.shape[:2], num_classes)
# ==== end of shared block


class Images:
    """The training set: ids of several sources, and where the files of each lie. No image is held in memory.

    A source is (folder of images, folder of candidates or None, folder of label maps or None: ground truth). Order of
    the images: those with ground-truth masks; those of the list with boxes only; those of --extra sets with boxes only.
    """
    listed_boxes = updated = range(0)   # indices: of the list, with boxes only; with candidates, so updated each epoch

    def __init__(self, voc):
        self.voc, self.sources, self.ids, self.source_of = voc, [], [], []

    def add(self, ids, image_dir, candidates, labels):
        self.ids += ids
        self.source_of += [len(self.sources)] * len(ids)
        self.sources.append((image_dir, candidates, labels))

    def of(self, image_dir):
        """The ids of the images in image_dir. (Images of other sets may have the same ids.)"""
        here = [folder.resolve() == image_dir.resolve() for folder, _, _ in self.sources]
        return [image_id for image_id, source in zip(self.ids, self.source_of) if here[source]]

    def files(self, index):
        """-> image, label map, candidates (None where there are none)."""
        image_id, (image_dir, candidates, labels) = self.ids[index], self.sources[self.source_of[index]]
        label_file = labels / f"{image_id}.png" if labels else truth_file(self.voc, image_id)
        return find_image(image_dir, image_id), label_file, candidates and candidates / f"{image_id}.npz"


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------

def parse_arguments(argv):
    """-> (arguments, {name: value} of those that were given on the command line)."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="(paper): the value is BoxSup's. (baseline): that of DeepLab, which its baseline reproduces.\n(ours): "
               "neither says.")
    add_common_arguments(parser, RECIPES, "runs/boxsup, or runs/boxsup-SUPERVISION")
    add = parser.add_argument_group("supervision").add_argument
    add("--supervision", default="candidates", choices=SUPERVISION, help="what boxes become: candidate segments, "
        "chosen anew each epoch (the method); rectangles or GrabCut's masks, fixed (Table 2); masks: the truth "
        "(default %(default)s)")
    add("--method", default="mcg", choices=["mcg", "ss", "gop"], help="whose candidates (paper: mcg; Table 3)")
    add("--candidates", metavar="DIR", help="folder of the <id>.npz, which are made if missing (default: "
        "Candidates-METHOD in --data)")
    add("--grabcut", metavar="DIR", help="where the label maps for --supervision grabcut lie (default: GrabCutMasks in "
        "--data)")
    add("--masks-list", metavar="FILE", help="image ids, one a line: these train on true masks, the others on boxes "
        "(paper, semi-supervised: VOC's train.txt)")
    add("--extra", nargs="+", default=[], metavar="DIR", help="candidates of further sets that have boxes only, as "
        "mcg_candidates.py wrote them (paper: VOC 2007, COCO), or COCO's masks (its --masks)")
    add("--top-k", type=int, default=5, metavar="K", help="sample one of the K cheapest candidates (paper: 5; 1: "
        "without sampling)")
    add("--warm-up", type=int, default=1, metavar="EPOCHS", help="in the first EPOCHS epochs choose by E_o alone "
        "(ours: %(default)s, since an untrained network cannot choose; 0 is allowed with --init)")
    add("--min-recognized", type=float, default=0.3, metavar="SHARE", help="lambda is 0 for a box if the network "
        "predicts its class in less than this share of it (ours: %(default)s; 0: the printed constant lambda)")
    add("--lambda-r", type=float, default=3.0, metavar="LAMBDA", help="weight of Eq. 3 in Eq. 4 (paper: %(default)s)")

    add = parser.add_argument_group("network").add_argument
    add("--backbone", choices=["vgg16", *BACKBONES], help="vgg16: DeepLab's (paper); the others: Box2Seg's network "
        "without its further branches (default %(default)s)")
    add("--large-fov", action="store_true", help="vgg16: the later, smaller and better head of DeepLab (ours: off, "
        "since it would lift every row)")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=int, help="(paper: 45; default %(default)s)")
    add("--batch-size", type=int, help="over all processes (paper: 20; default %(default)s)")
    add("--lr", type=float, help="initial learning rate (paper: 1e-3; default %(default)s)")
    add("--lr-drop", type=int, metavar="EPOCHS", help="divide --lr by 10 after every EPOCHS epochs (paper: 15; "
        "default %(default)s)")
    add("--head-lr", type=float, metavar="FACTOR", help="learning rate of the last layer, which is new, in multiples "
        "of --lr (baseline: 10; default %(default)s)")
    add("--momentum", type=float, default=0.9, help="(baseline: %(default)s)")
    add("--weight-decay", type=float, default=5e-4, help="(baseline: %(default)s)")
    add("--clip-norm", type=float, help="clip the gradient to this norm; 0: no clipping (ours; default %(default)s)")

    add = parser.add_argument_group("augmentation").add_argument
    add("--crop", type=int, help="side of the training crops, 32 k + 1 pixels (baseline: 321; default "
        "%(default)s)")
    add("--scale", type=float, nargs=2, metavar=("MIN", "MAX"), help="random scale (baseline: 1 1; default "
        "%(default)s)")
    add("--colour", type=float, help="brightness, contrast, saturation times a random 1 +- this (baseline: 0; default "
        "%(default)s)")
    add("--val-scale", type=float, help="in validation and label updates images go through the network "
        "at this scale; scores and segments are at full size (ours: 1; default %(default)s)")

    add = parser.add_argument_group("masks.png").add_argument
    add("--show-epochs", type=int, nargs="*", default=[1, 5, 20], metavar="E", help="epochs whose masks are "
        "shown by masks.png, besides the last (paper, Fig. 3: 1 5 20)")
    add("--show-images", type=int, default=6, metavar="N", help="number of images in masks.png (ours: %(default)s)")

    return parse(parser, RECIPES, argv)


def check(args, device, out):
    """What can be seen to be wrong before any work is done."""
    check_arguments(args, device, out, [
        (min(args.epochs, args.lr_drop, args.top_k) >= 1, "--epochs, --lr-drop, --top-k: expected at least 1"),
        (args.warm_up >= (0 if args.init else 1), f"--warm-up {args.warm_up}: expected at least 1, or 0 with --init"),
        (min(args.lambda_r, args.head_lr, args.show_images) >= 0,
         "--lambda-r, --head-lr, --show-images: expected 0 or more"),
        (not args.large_fov or args.backbone == "vgg16", "--large-fov goes with --backbone vgg16"),
        (not args.freeze_bn or args.backbone != "vgg16", "--freeze-bn: VGG-16 has no BatchNorm; give --no-freeze-bn"),
        (args.resume or not args.sync_bn or args.backbone != "vgg16",
         "--sync-bn: VGG-16 has no BatchNorm; leave it out"),
        (0 <= args.min_recognized <= 1, f"--min-recognized {args.min_recognized}: expected a share, 0 to 1"),
        (args.supervision != "masks" or not args.masks_list,
         "--masks-list: with --supervision masks all images have masks"),
        (args.supervision == "candidates" or not args.candidates, "--candidates goes with --supervision candidates"),
        (args.supervision == "grabcut" or not args.grabcut, "--grabcut goes with --supervision grabcut")])


# ---------------------------------------------------------------------------------------------------------------------
# The whole run
# ---------------------------------------------------------------------------------------------------------------------

def training_images(voc, names, args, out):
    """--supervision, --masks-list and --extra -> Images, and the list's file."""
    images = Images(voc)
    ids, list_file = training_list(voc, args.split)
    image_dir = voc / "JPEGImages"
    masked = ids if args.supervision == "masks" else read_list(args.masks_list) if args.masks_list else []
    if outside := set(masked) - set(ids):
        raise BadInput(f"{args.masks_list}: {min(outside)} is not in {list_file}: take it off, or give another --split")
    known = set(masked)
    boxed = [i for i in ids if i not in known]
    if masked:
        images.add(masked, image_dir, None, None)

    further = []                                        # of other sets: ids, images, candidates, labels
    trains = {f"{image_dir.resolve()}/{i}": f"{list_file} names" for i in ids}
    for number, folder in enumerate(map(Path, args.extra), 1):
        source = read_source(folder)
        true_masks = source["method"] == "masks"        # by mcg_candidates.py --masks
        extra = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in
                       folder.rglob("*.png" if true_masks else "*.npz") if not path.name.startswith("._"))
        if source["class_names"] != names:
            raise BadInput(f"--extra {folder}: made for other classes ({' '.join(source['class_names'][1:])}): make it "
                           "anew with this data's")
        if not extra:
            raise BadInput(f"--extra {folder}: holds no {'masks' if true_masks else 'candidates'}: make them by "
                           "mcg_candidates.py")
        where = source["images"].resolve()
        for i in extra:
            if owner := trains.get(f"{where}/{i}"):
                raise BadInput(f"--extra {folder}: has {i}, which {owner} too: it would train twice")
            trains[f"{where}/{i}"] = "another --extra has"
        if true_masks:
            images.add(extra, source["images"], None, folder)
        else:
            further.append((extra, source["images"], folder, out / f"masks-{number}"))
    first = len(images.ids)

    if boxed:
        candidates = Path(args.candidates or voc / f"Candidates-{args.method}")
        grabcut = Path(args.grabcut or voc / "GrabCutMasks")
        images.add(boxed, image_dir, candidates if args.supervision == "candidates" else None,
                   grabcut if args.supervision == "grabcut" else out / "masks")
    for source in further:
        images.add(*source)
    last = first + len(boxed)
    images.listed_boxes = range(first, last)
    images.updated = range(first if args.supervision == "candidates" else last, len(images.ids))
    print_rank0(f"{len(images.ids)} training images, {len(names) - 1} classes: {len(masked)} with masks, {len(boxed)} "
                f"with boxes ({args.supervision}) of {list_file}; {first - len(masked)} with masks, "
                f"{len(images.ids) - last} with boxes of other sets")
    return images, list_file


def write_rectangles(images, indices, names, keep):
    """--supervision rectangles: each box filled with its class (Fig. 2c), written to out/masks. keep: what is there."""
    require_a_box((images.voc / "Annotations" / f"{images.ids[index]}.xml" for index in indices), names)
    for index in tqdm(indices, "rectangles", unit="image", disable=None):
        image_id, (image_file, label_file, _) = images.ids[index], images.files(index)
        if keep and label_file.exists():
            continue
        size = read_image(image_file).shape[:2]
        boxes, classes = read_boxes(images.voc / "Annotations" / f"{image_id}.xml", names, size)
        write_label(label_file, box_mask(boxes, classes, size))


def check_grabcut(images, folder, names, args):
    """--supervision grabcut: refuses masks of other classes or images, and of boxes that were corrected since: the
    annotation is newer than B, which lies beside M, and draws another one."""
    check_classes(folder, names, images.voc / "JPEGImages")
    for index in images.listed_boxes:
        image_id = images.ids[index]
        annotation, B = images.voc / "Annotations" / f"{image_id}.xml", folder.parent / "BoxMasks" / f"{image_id}.png"
        if annotation.exists() and B.exists() and annotation.stat().st_mtime > B.stat().st_mtime:
            drawn = read_label(B)
            boxes, classes = read_boxes(annotation, names, drawn.shape)
            if not np.array_equal(drawn, box_mask(boxes, classes, drawn.shape)):
                raise BadInput(f"{annotation}: corrected since the masks in {folder} were made: make its mask anew by "
                               f"python grabcut_labels.py --data {args.data}" +
                               f" --out {folder.parent}" * bool(args.grabcut))


def made_from(images, args):
    """What choices and labels depend on, so that --resume notices a change: for each source how many images it has and
    what they learn from, a fingerprint of all candidates' boxes, of the true masks and of the rectangles' annotations,
    and what the GrabCut masks' source.json says."""
    made, folder = {"proposals": 0, "masks": 0}, Path(args.grabcut or images.voc / "GrabCutMasks")
    made["sources"] = [(images.source_of.count(k), "candidates" if candidates else "labels" if labels else "truth")
                       for k, (_, candidates, labels) in enumerate(images.sources)]
    progress = partial(tqdm, leave=False, unit="image", disable=True if rank_and_world()[0] else None)
    for index in progress(images.updated, "boxes of the candidates"):
        try:
            with np.load(images.files(index)[2]) as file:
                for name in ("boxes", "classes", "candidate_boxes"):
                    made["proposals"] = zlib.crc32(file[name].tobytes(), made["proposals"])
        except Exception:   # of broken bytes NumPy raises nearly anything; the label update will name the file
            pass
    masked = set(range(len(images.ids))) - set(images.updated) - set(images.listed_boxes)
    for index in progress(sorted(masked), "true masks"):
        made["masks"] = zlib.crc32(images.files(index)[1].read_bytes(), made["masks"])
    if args.supervision == "rectangles":
        for index in progress(images.listed_boxes, "boxes"):
            annotation = images.voc / "Annotations" / f"{images.ids[index]}.xml"
            made["boxes"] = zlib.crc32(annotation.read_bytes(), made.get("boxes", 0))
    if args.supervision == "grabcut":
        source = read_source(folder) if (folder / "source.json").exists() else None         # None: of unknown make
        made["grabcut"] = source and {key: value for key, value in source.items() if key != "images"}
    return made


def build_network(args, num_classes, weights, pretrained):
    if args.backbone == "vgg16":
        return DeepLabVGG16(num_classes, large_fov=args.large_fov, weights=weights, pretrained=pretrained)
    return Box2SegNet(num_classes, args.backbone, weights=weights, pretrained=pretrained, attention=False,
                      embedding=False)


def make_labels(images, names, list_file, args, saved):
    """Makes what is missing of the list's candidates or rectangles; then the files of all images must exist."""
    if rank_and_world()[0] == 0:
        indices = images.listed_boxes
        if args.supervision == "candidates" and indices:
            summary = mcg_candidates.make_candidates(
                images.voc, images.ids[indices.start:indices.stop], out=args.candidates, method=args.method,
                workers=args.workers or 1)
            if summary["failures"]:
                raise BadInput(f"{len(summary['failures'])} images got no candidates ({summary['failures'][0]}): fix "
                               f"them or take them off {list_file}")
        if args.supervision == "rectangles":
            write_rectangles(images, indices, names, keep=bool(saved))
    barrier()
    if args.supervision == "grabcut":
        check_grabcut(images, Path(args.grabcut or images.voc / "GrabCutMasks"), names, args)
    for index in range(len(images.ids)):
        image_file, label_file, candidates = images.files(index)
        made = candidates or label_file                 # of other sets these are there, or the image would not be
        for path in (image_file, made):
            if path.exists():
                continue
            if set(made.parents) & set(map(Path, args.extra)):
                raise BadInput(f"no {path}, to which {made} belongs: add the one or delete the other")
            remedy = "add it or take its id off the list"
            if args.supervision == "grabcut" and path == label_file:
                remedy = f"make it by python grabcut_labels.py --data {args.data}"
            raise BadInput(f"no {path}, which {list_file} names: {remedy}")


def main(argv):
    args, given = parse_arguments(argv)
    out = Path(args.out or f"runs/boxsup{'' if args.supervision == 'candidates' else '-' + args.supervision}")
    saved = None
    if args.resume:
        saved, args = resume_run(args, given, out, may_differ={"candidates", "grabcut", "masks_list", "extra"})
    device = pick_device(args.device)
    check(args, device, out)
    device = start_processes(args, device)

    # ---- images and labels
    voc = open_data(args, saved)
    names = class_names(voc)
    images, list_file = training_images(voc, names, args, out)
    n, updated = len(images.ids), images.updated
    check_images(images.ids, names, list_file, args, saved, out)
    hold_folder(out)
    if args.supervision != "candidates" or not images.listed_boxes:
        idle = set() if updated else {"top_k", "warm_up", "min_recognized", "lambda_r", "show_epochs", "show_images"}
        say_without_effect({"method"} | idle, given, "since no box of the list chooses a candidate")
    val_ids = validation_list(voc, args.val_split, len(names))      # before hours of candidates
    say_what_is_trained_on(images.of(voc / "JPEGImages"), val_ids, args.val_split)
    make_labels(images, names, list_file, args, saved)
    if len(updated) < n:
        require_a_class(images.files(index)[1] for index in range(n) if index not in updated)
    if not saved:
        say_what_a_crop_sees(images.files, n, args)
    made_of = made_from(images, args)
    # (A checkpoint that is older than one of these fingerprints lacks it.)
    if saved and any(saved.get("made_of", {}).get(key, value) != value for key, value in made_of.items()):
        raise BadInput(f"{out / 'last.pt'}: the run had other candidates, boxes, true or GrabCut masks than these: "
                       "give the --candidates, --grabcut, --masks-list, --extra that it had, or start another --out")

    # ---- network
    torch.manual_seed(args.seed)
    network = build_network(args, len(names), None if saved else args.weights,
                            args.pretrained and not (args.weights or args.init or saved))
    network = place_network(network, args, saved, names, device)
    args.amp, autocast, scaler = mixed_precision(args.amp, device)
    optimizer = make_optimizer(network, args, args.head_lr)

    # ---- the algorithm, from its first step or from where the run stopped
    choices, step, best = {}, 0, 0.0
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        step, best = saved["step"], saved["best"]
        held = saved["choices"].split(saved["boxes_of"].tolist())
        choices = {index: choice.numpy() for index, choice in zip(updated, held)}
    elif rank_and_world()[0] == 0:  # --overwrite: what an old run left must not pass for this one's
        for path in (out / "epochs").glob("*.png"):
            path.unlink()
    start_log(out, args, device, saved, n, names, step=step)

    def save(name, step, best):
        held = [torch.from_numpy(choices[index]) for index in sorted(choices)]
        save_checkpoint(out / name, network, optimizer, scaler, args, names, images.ids, step=step, best=best,
                        made_of=made_of,
                        choices=torch.cat([torch.empty(0, dtype=torch.int32, device="cpu"), *held]),
                        boxes_of=torch.tensor([len(choice) for choice in held], dtype=torch.int64, device="cpu"))

    def score():
        read = partial(read_pair, voc, len(names))
        return losses.iou(validate(network, val_ids, read, args.val_scale, losses.confusion_matrix)).nanmean().item()

    progress = Progress(args, out, save, score if val_ids else None, catch_interrupts(), title="train", where={},
                        step=step, epochs=args.epochs, per_epoch=n // args.batch_size, best=best)
    if step % progress.per_epoch:
        repaint(images, updated, choices, len(names))
    try:
        train(network, images, updated, choices, optimizer, autocast, scaler, args, progress)
    except Interrupted as where:
        print_rank0(f"interrupted {where}" + (f"; to go on: python train_boxsup.py --resume --out {out}"
                    if (out / "last.pt").exists() else " before the first epoch: start again"))
        return 130
    finish(out, progress.best)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, "train_boxsup.py", [BadFile], "--out or --candidates"))
