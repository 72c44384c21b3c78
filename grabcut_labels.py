"""
Boxes to labels: the box masks B and the GrabCut masks M that Box2Seg trains on (Kulharia et al., ECCV 2020, Sect. 3.1).

    python grabcut_labels.py --data VOCdevkit                              labels for every image of trainaug (or train)
    python grabcut_labels.py --data VOCdevkit --fill-rates fill_rates         ... and how full the boxes are (Fig. 2)
    python grabcut_labels.py --data VOCdevkit --split val --boxes detector   boxes from a detector (GrabCut-NoTrain-Det)
    python grabcut_labels.py --coco instances.json --images DIR --data mydata       boxes of one's own, in COCO's form
    python grabcut_labels.py --yolo LABELS_DIR --images DIR --data mydata           ... in YOLO's: laid out as VOC's are
    python grabcut_labels.py --image FILE --box X0 Y0 X1 Y1                  look at one mask
    python grabcut_labels.py --colours rgb --no-share --margin 99 --working-size 10000 --min-fill 0 --out DIR
                                                                           OpenCV's GrabCut in RGB, on whole images

Reads   VOC2012/JPEGImages/<id>.jpg (or .jpeg, .png, .webp, .bmp, .tif, in capitals, too), Annotations/<id>.xml,
        ImageSets/Segmentation/<split>.txt, class_names.txt if there
Writes  VOC2012/BoxMasks/<id>.png and VOC2012/GrabCutMasks/<id>.png: 8-bit PNG in VOC's palette, one class index a pixel
        and source.json in both: of which images, boxes, class names and GrabCut options, so that no run mixes them

    B(i) = c   pixel i lies in a box of class c (in the smallest such box, where boxes overlap); 0 in no box
    M(i) = c   GrabCut, run once for each box, takes pixel i for foreground in a box of class c (the smallest such box)

box_mask() and grabcut(), at the top, are the concept; the rest runs them over lists of images, counts filling rates,
reads VOC's files, and brings boxes of one's own into VOC's form.

With --coco or --yolo it first writes what it otherwise reads, and import.json, which says what it was made from.
What exists is kept, unless its boxes were corrected since: a second run makes only what is missing, so a run may be
interrupted at any time. Delete a folder to make it anew. Expect about 0.12 s per box on one core. No ground truth is
read; how good M is, evaluate.py --labels tells.
"""
import argparse
import contextlib
import filecmp
import glob
import itertools
import json
import os
import re
import shutil
import struct
import sys
import threading
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from urllib.parse import quote, unquote
from xml.sax.saxutils import escape

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm


# ---------------------------------------------------------------- boxes to B
# ==== shared block "boxes to a map": equal to the byte in grabcut_labels.py and mcg_candidates.py
def larger_first(boxes):
    """Order in which boxes are painted, so that the smaller one ends up on top (Box2Seg, Sect. 3.1)."""
    boxes = np.asarray(boxes, np.int64).reshape(-1, 4)
    # PAPER SILENT: what a box's size is; its area inside the image, and of two equal ones the later annotated is on top
    return np.argsort(-(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), kind="stable")


def box_mask(boxes, classes, size):
    """Boxes (K, 4), classes (K,), size (H, W) -> B, (H, W) uint8: the smallest surrounding box's class, 0 in none."""
    mask = np.zeros(size, np.uint8)
    for k in larger_first(boxes):
        x0, y0, x1, y1 = boxes[k]
        mask[y0:y1, x0:x1] = classes[k]
    return mask
# ==== end of shared block


# ---------------------------------------------------------------- GrabCut: boxes to M
# PAPER SILENT: GrabCut's iterations; 5, fewer where one moves at most 3 pixels of 1,000 (a fifth less time, the same
# score).
# PAPER SILENT: from how much of the image around the box GrabCut learns the background; OpenCV's takes all of it, ours
# a margin of 10 % of the box: far parts of the image share colours with the object more often than they help.
# PAPER SILENT: whether a box knows of its neighbours; what lies in another box of its class is not taken for sure
# background ("background pixels outside all boxes are correctly labeled", Sect. 1): in a flock the margin is full of
# the other sheep, and a background model that has learnt sheep finds no sheep.
# DEPARTS: GrabCut (Rother et al., the paper's [44]) works in RGB. Ours is CIELAB, where equal distances look about
# equally different. (It makes little difference: together with --share, 82.6 mIoU in place of 82.4 on the animals. All
# of ours together, with margin and second attempt: 77.8 on VOC's 2007 val images, where plain GrabCut has 71.6;
# docs/results.md.)
# PAPER SILENT: the resolution GrabCut works at; a box and margin of more than 240 x 240 pixels' area are scaled down to
# that, which is faster on VOC's images and scores the same, and one more iteration at full size then moves the
# boundary. Much smaller would lose objects: GrabCut weighs a sum over the area (colour) against one
# over the boundary (smoothness), and the fewer pixels there are, the more the boundary counts. What has more than 1,500
# x 1,500 pixels, in a phone's photograph, is cut at that size: GrabCut's graph takes 0.2 GB a million pixels.
# PAPER SILENT: what to do where GrabCut loses the object; an iteration that ends with less than 15 % of the box as
# foreground is undone. If it is the first (16 % of the boxes of the 311 images of VOC's train whose ids begin with
# 2007), or the one at full size, the attempt has failed, and a second one takes an ellipse in the middle of the box,
# 0.7 of its sides, for sure foreground: these labels score 76.2 mIoU, those with whole boxes instead 75.0, with the
# ellipse at 0.5, 0.6 or 0.8 of the sides 76.1 to 76.2. A box that covers the image has no sure background; there the
# second attempt takes the corners outside the ellipse that touches the image's sides for probable background.
COVERS_IMAGE, EMPTY, TOO_SMALL = "box covers the image", "GrabCut found nothing", "GrabCut found too little"
STAYS_WHOLE = "box stays whole"  # the second attempt found too little as well
LARGEST = 1500                   # box and margin of more than 1,500 x 1,500 pixels are cut at that size


def cielab(image):
    """(h, w, 3) uint8 RGB -> uint8 L, a, b, all scaled by 2.55: L from 0..100 to 0..255 by OpenCV, a and b here, around
    128; a and b beyond +-50 are clipped (0.9 % of the pixels of VOC's photographs)."""
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(np.float32)
    lab[..., 1:] = 128 + 2.55 * (lab[..., 1:] - 128)
    return np.rint(lab).clip(0, 255).astype(np.uint8)


def grabcut(image, box, same_class=None, iterations=5, margin=0.1, working_size=240, min_fill=0.15, colours="lab"):
    """GrabCut on one box -> (mask, why): the object, (H, W) bool, inside the box; None if the first attempt found it,
    otherwise why there was a second one: COVERS_IMAGE, EMPTY or TOO_SMALL, or STAYS_WHOLE if it failed as well (then
    the mask is the whole box).

    image: (H, W, 3) uint8 RGB; box: x0, y0, x1, y1 inside it, half-open; same_class: (H, W) bool, union of the boxes of
    its class (default: this box); margin: in box sides; working_size: in pixels; min_fill: share of the box; colours:
    "lab" or "rgb". The mask depends on the arguments alone, not on the order of calls or the thread: the seed of the
    mixtures' k-means is set for each box.
    """
    x0, y0, x1, y1 = (int(corner) for corner in box)
    mask = np.zeros(image.shape[:2], bool)
    mask[y0:y1, x0:x1] = True

    # Box and margin, at working size. A margin that rounds to no working pixel is none: the object is cut off there.
    dx, dy = max(2, round(margin * (x1 - x0))), max(2, round(margin * (y1 - y0)))
    left, top = max(0, x0 - dx), max(0, y0 - dy)
    window = np.s_[top:y1 + dy, left:x1 + dx]
    crop, inside = image[window], mask[window]                                                    # (h, w, 3), (h, w)
    h, w = inside.shape
    factor = max(LARGEST, working_size) / (h * w) ** 0.5
    if factor < 1:  # too large a graph for the last iteration: the same on a smaller picture
        size = max(1, int(w * factor)), max(1, int(h * factor))
        shrunk = partial(cv2.resize, dsize=size, interpolation=cv2.INTER_AREA)
        near = None if same_class is None else shrunk(same_class[window].astype(np.float32)) > 0.5
        start = (x0 - left) * size[0] // w, (y0 - top) * size[1] // h
        end = -((left - x1) * size[0] // w), -((top - y1) * size[1] // h)                         # rounded up
        found, why = grabcut(shrunk(crop), start + end, near, iterations, margin, working_size, min_fill, colours)
        if why != STAYS_WHOLE:
            inside &= cv2.resize(found.astype(np.float32), (w, h), interpolation=cv2.INTER_LINEAR) > 0.5
        return mask, why

    if colours == "lab":
        crop = cielab(crop)
    scale = min(1, working_size / (h * w) ** 0.5)
    size = max(1, round(w * scale)), max(1, round(h * scale))  # OpenCV's order: width, height
    small = cv2.resize(crop, size, interpolation=cv2.INTER_AREA)
    a0, a1 = min(round((x0 - left) * size[0] / w), size[0] - 1), round((x1 - left) * size[0] / w)
    b0, b1 = min(round((y0 - top) * size[1] / h), size[1] - 1), round((y1 - top) * size[1] / h)
    own = np.s_[b0:max(b1, b0 + 1), a0:max(a1, a0 + 1)]

    # The start: probable foreground in the box, sure background outside, probable foreground in boxes of the same class
    # (unless they leave less than a tenth of the margin).
    state = np.full(small.shape[:2], cv2.GC_BGD, np.uint8)          # 0, 1 sure, 2, 3 probable; odd is the foreground
    state[own] = cv2.GC_PR_FGD
    margin_pixels = np.count_nonzero(state == cv2.GC_BGD)
    probable = inside                                                                             # (h, w) bool
    if same_class is not None and margin_pixels:
        shared = cv2.resize(same_class[window].astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0.5
        if np.count_nonzero(~shared & (state == cv2.GC_BGD)) >= 0.1 * margin_pixels:
            state[shared] = cv2.GC_PR_FGD
            probable = inside | same_class[window]

    def cut(state):
        """One attempt from an initial `state` (GC_* per working pixel) -> (object (h, w) bool, None) or (None, why)."""
        # Each iteration: assign pixels to Gaussians and refit them, five for each side, then cut (GrabCut's steps 1
        # to 3).
        background, foreground = np.zeros((1, 65)), np.zeros((1, 65))  # the two mixtures, written in place
        cv2.setRNGSeed(0)
        kept = None
        for iteration in range(iterations):
            before = state.copy()
            mode = cv2.GC_EVAL if iteration else cv2.GC_INIT_WITH_MASK
            cv2.grabCut(small, state, None, background, foreground, 1, mode)
            filled = (state[own] & 1).mean()
            if filled < min_fill:
                break
            kept = state & 1, background.copy(), foreground.copy()
            if np.count_nonzero(state != before) <= 0.003 * state[own].size:
                break
        if kept is None:
            return None, TOO_SMALL if filled else EMPTY

        found, background, foreground = kept
        if scale < 1:  # back at full size, one more iteration, in which only pixels near the boundary may change
            found = cv2.resize(found.astype(np.float32), (w, h), interpolation=cv2.INTER_LINEAR) > 0.5
            found = (found & probable).astype(np.uint8)                                           # (h, w)
            kernel = np.ones((2 * int(np.ceil(2 / scale)) + 1,) * 2, np.uint8)  # two working pixels each way
            state = np.where(found == 1, np.uint8(cv2.GC_PR_FGD), np.uint8(cv2.GC_PR_BGD))
            state[cv2.erode(found, kernel) == 1] = cv2.GC_FGD
            state[(cv2.dilate(found, kernel) == 0) | ~probable] = cv2.GC_BGD
            cv2.grabCut(crop, state, None, background, foreground, 1, cv2.GC_EVAL)
            found = state & 1
        found = (found == 1) & inside
        enough = np.count_nonzero(found) >= min_fill * (x1 - x0) * (y1 - y0)
        return (found, None) if enough else (None, TOO_SMALL)

    found, why = cut(state.copy()) if margin_pixels else (None, COVERS_IMAGE)
    if why:  # the second attempt
        ys, xs = ((2 * np.arange(n) + 1) / n - 1 for n in state[own].shape)
        radius = np.hypot(ys[:, None], xs)                     # 0 in the box's middle, 1 where its sides are reached
        state[own][radius <= 0.7] = cv2.GC_FGD
        if not margin_pixels:
            state[own][radius > 1] = cv2.GC_PR_BGD
        if not (state & 1).all():                              # but in a tiny image no pixel is left for background
            found, _ = cut(state)
        if found is None:
            return mask, STAYS_WHOLE
    mask[window] = found
    return mask, why


def grabcut_mask(image, boxes, classes, share=True, **options):
    """Boxes (K, 4), classes (K,) -> M, (H, W) uint8, and K times None or grabcut's reason for that box.

    share: whether other boxes of a box's class are "probable foreground" to it, not background; options: grabcut's.

    Smaller boxes are painted last, as in B; but where a smaller box's GrabCut sees background and a larger box's sees
    foreground, M is the larger one's class, B the smaller one's.
    """
    # PAPER SILENT: how the GrabCuts of boxes that overlap are merged; the smaller box's foreground goes on top.
    mask = np.zeros(image.shape[:2], np.uint8)
    fallbacks = [None] * len(boxes)
    boxes, classes = np.asarray(boxes).reshape(-1, 4), np.asarray(classes)
    for k in larger_first(boxes):
        same = (classes == classes[k]) & share
        same_class = box_mask(boxes[same], np.ones(same.sum()), mask.shape) == 1 if same.sum() > 1 else None
        found, fallbacks[k] = grabcut(image, boxes[k], same_class, **options)
        mask[found] = classes[k]
    return mask, fallbacks


# ---------------------------------------------------------------- labels for a list of images
# ==== shared block "a folder of one make": equal to the byte in grabcut_labels.py and mcg_candidates.py
def claim_folder(folder, images, names, method, **more):
    """Makes the folder and its source.json; a folder of other images, classes, method or anything else that its files
    depend on (more) is refused."""
    def from_there(path):
        try:
            return os.path.relpath(Path(path).resolve(), Path(folder).resolve())
        except ValueError:  # another drive of Windows
            return str(Path(path).resolve())

    keep_apart([Path(folder)], [Path(images)])
    source = {"images": from_there(images), "class_names": list(names), "method": method, **more}
    path = Path(folder) / "source.json"
    made = path.exists() and any(file.suffix in (".npz", ".png") for file in Path(folder).rglob("*"))
    there = read_source(folder) if made else None       # a source.json without files beside it is ignored
    # A source.json that names images which are not there came along when the folder was copied here, as are parts
    # that several machines have made: the images are ours, the rest has to agree.
    moved = there and not there["images"].is_dir()
    if there:
        there["images"] = source["images"] if moved else from_there(there["images"])
        for key in source:
            if there.get(key, source[key]) != source[key]:  # an older version wrote fewer keys
                raise BadInput(f"{path}: made with other {key} ({there[key]}, not {source[key]}): repeat that, name "
                               "another folder (--out; --label-dir or --candidates when training), or delete this one")
    if not there or moved:
        with writing(path) as temporary:
            Path(temporary).write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
# ==== end of shared block


# ==== shared block "a long job": equal to the byte in grabcut_labels.py and mcg_candidates.py
def one_line(error):
    """An exception as a line, with its kind where it is none of ours."""
    return ("" if isinstance(error, BadInput) else f"{type(error).__name__}: ") + " ".join(str(error).split())


def say_notes(notes):
    """{what: [ids of the images that have it]}, as they were done -> the same in order, after a line each on stderr."""
    notes = {what: sorted(ids) for what, ids in sorted(notes.items())}
    for what, ids in notes.items():
        more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
        print(f"{len(ids)} images have {what}: {', '.join(ids[:5])}{more}", file=sys.stderr)
    return notes


MOST = 50                                               # lines about images that fail


def shortened(lines):
    """The first of many lines, and how many more there are."""
    return lines if len(lines) <= MOST else [*lines[:MOST], f"and {len(lines) - MOST} more"]


def a_few_ahead(ids, submit, ahead):
    """Yields id and job as jobs end, whatever their order, None for a job where nothing was to be done.

    submit(id) -> a Future or None. At most `ahead` are under way at a time, however long the list is.
    """
    todo, jobs = iter(ids), {}
    while True:
        for image_id in todo:
            job = submit(image_id)
            if job is None:
                yield image_id, None
                continue
            jobs[job] = image_id
            if len(jobs) >= ahead:
                break
        if not jobs:
            return
        for job in wait(jobs, return_when=FIRST_COMPLETED).done:
            yield jobs.pop(job), job


def take_shard(ids, shard):
    """'2/3' -> the second of three interleaved parts of ids."""
    try:
        part, parts = (int(number) for number in shard.split("/"))
        if not 1 <= part <= parts:
            raise ValueError
    except ValueError:
        raise BadInput(f"--shard {shard}: expected I/N with I from 1 to N, such as 1/4") from None
    return ids[part - 1::parts]
# ==== end of shared block


GRABCUT = dict(share=True, iterations=5, margin=0.1, working_size=240, min_fill=0.15, colours="lab")


def label_paths(voc, out=None, detector=False):
    """Folders of B and M: beside SegmentationClass, or under out. Labels from detected boxes never mix with others."""
    suffix = "-detector" if detector else ""
    return [Path(out or voc) / (name + suffix) for name in ("BoxMasks", "GrabCutMasks")]


def claim_labels(folders, voc, ids, names, boxes, options):
    """The folders of B and M, for labels of these boxes and GrabCut options -> options, all of them, and the folders
    whose labels are not ours, and stay. Options not given are those with which the folder was made, so that whatever is
    missing is made like the rest."""
    there = read_source(folders[1]) if (folders[1] / "source.json").exists() else {}
    adopted = {key: there[key] for key, default in GRABCUT.items()
               if key not in options and there.get(key, default) != default}
    if adopted:
        print(f"{folders[1]}: made with {adopted}, not the defaults; what is missing is made so, too", file=sys.stderr)
    options, foreign = GRABCUT | adopted | options, []
    for folder, more in zip(folders, ({}, options)):
        if not (folder / "source.json").exists() and any((folder / f"{i}.png").exists() for i in ids):
            print(f"{folder}: labels of unknown make (no source.json) are there and stay; what is missing is made of "
                  f"{boxes}", file=sys.stderr)
            foreign.append(folder)
        else:
            claim_folder(folder, voc / "JPEGImages", names, "grabcut" if more else "boxes", boxes=boxes, **more)
    return options, foreign


def make_labels(voc, ids, out=None, workers=None, detect=None, **options):
    """Makes B and M of the images where either is missing, or where the annotation has been corrected since, on all
    cores, with a progress bar on stderr.

    voc: folder with JPEGImages; out: see label_paths; workers: threads (default: one per core); detect: None for the
    annotation's boxes, or a function image -> boxes, classes; options: some of GRABCUT. Returns {"made",
    "corrected" (of these: in place of older labels), "skipped": counts of images, "boxes": count, "classes": {name:
    count of boxes}, "fallbacks": {reason: count of boxes}, "notes": see say_notes, "failures": ["id: what is wrong"],
    "source": what the labels depend on}.
    """
    voc, names, folders = Path(voc), class_names(voc), label_paths(voc, out, detect is not None)
    boxes_from = "Annotations" if detect is None else getattr(detect, "source", "detector")
    if detect is None:
        require_a_box((voc / "Annotations" / f"{i}.xml" for i in ids), names)
    options, foreign = claim_labels(folders, voc, ids, names, boxes_from, options)
    detecting = threading.Lock()

    def label(image_id):
        image = read_image(find_image(voc / "JPEGImages", image_id))                              # (H, W, 3)
        size = image.shape[:2]
        if detect is None:
            boxes, classes = read_boxes(voc / "Annotations" / f"{image_id}.xml", names, size)
        else:
            with detecting:  # one image at a time on the detector's device; GrabCut goes on beside it
                boxes, classes = detect(image)
        mask, fallbacks = grabcut_mask(image, boxes, classes, **options)
        for folder, labels in ((folders[1], mask), (folders[0], box_mask(boxes, classes, size))):
            if folder not in foreign or not (folder / f"{image_id}.png").exists():
                write_label(folder / f"{image_id}.png", labels)     # B last, since corrected() reads its time
        return classes, fallbacks

    summary = {"made": 0, "corrected": 0, "skipped": 0, "boxes": 0, "classes": Counter(), "fallbacks": Counter(),
               "notes": {}, "failures": [], "source": {"class_names": names, "boxes": boxes_from, **options}}
    if foreign:
        summary["source"]["unknown make"] = [folder.name for folder in foreign]
    threads_before = cv2.getNumThreads()
    cv2.setNumThreads(1)  # each image on one core; OpenCV lets go of Python's lock, so threads serve as processes would
    workers = workers or os.cpu_count()
    pool, older = ThreadPoolExecutor(workers), set()

    def corrected(image_id):
        """Is the annotation newer than B, and does it draw another one, or perhaps the same with other boxes?"""
        annotation, made = voc / "Annotations" / f"{image_id}.xml", folders[0] / f"{image_id}.png"
        if detect is not None or folders[0] in foreign or not annotation.exists():
            return False
        if annotation.stat().st_mtime <= made.stat().st_mtime:
            return False
        try:
            B = read_label(made)
            boxes, classes = read_boxes(annotation, names, B.shape)
            # Where boxes meet, B may hide an edge, but each has a GrabCut of its own.
            x0, y0, x1, y1 = boxes.T[:, :, None]
            meet = np.triu((x0 <= x1.T) & (x0.T <= x1) & (y0 <= y1.T) & (y0.T <= y1), 1)
            return meet.any() or not np.array_equal(B, box_mask(boxes, classes, B.shape))
        except BadInput:  # label() says what is wrong
            return True

    def submit(image_id):
        made = all((folder / f"{image_id}.png").exists() for folder in folders)
        if made and not corrected(image_id):
            return None
        if made:
            older.add(image_id)
        return pool.submit(label, image_id)

    try:
        with tqdm(total=len(ids), desc="B and M", unit="image", disable=None if ids else True) as bar:
            for image_id, job in a_few_ahead(ids, submit, 3 * workers):
                bar.update()
                if job is None:
                    summary["skipped"] += 1
                    continue
                try:
                    classes, fallbacks = job.result()
                except CannotWrite:
                    raise
                except Exception as error:  # one bad image does not stop the others, whatever is bad in it
                    summary["failures"].append(f"{image_id}: {one_line(error)}")
                    if len(summary["failures"]) <= MOST:
                        tqdm.write(summary["failures"][-1], file=sys.stderr)
                    continue
                summary["made"] += 1
                summary["corrected"] += image_id in older
                summary["boxes"] += len(fallbacks)
                summary["classes"].update(names[c] for c in classes)
                summary["fallbacks"].update(why for why in fallbacks if why)
                if not fallbacks:
                    summary["notes"].setdefault("no box, all background", []).append(image_id)
    finally:  # also on Ctrl-C: what is running is finished, what is waiting is dropped
        pool.shutdown(cancel_futures=True)
        cv2.setNumThreads(threads_before)
    summary["notes"] = say_notes(summary["notes"])
    summary["failures"].sort()
    return summary


# ---------------------------------------------------------------- boxes from a detector (Sect. 4.2: NoTrain-Det)
# ==== shared block "COCO's JSON": equal to the byte in grabcut_labels.py and mcg_candidates.py
COCO_TO_VOC = {"airplane": "aeroplane", "motorcycle": "motorbike", "potted plant": "pottedplant", "couch": "sofa",
               "dining table": "diningtable", "tv": "tvmonitor"}  # VOC's other fourteen have the same name in COCO


def once(pairs):
    """A JSON object's pairs -> dict; of a key that is there twice json would keep the last value alone."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("an object has one key twice")
    return dict(pairs)
# ==== end of shared block


def make_detector(names, name="fasterrcnn_resnet50_fpn_v2", weights=None, device="cpu", threshold=0.5):
    """A torchvision COCO detector -> function image (H, W, 3) uint8 -> boxes (K, 4) int32, classes (K,) uint8.

    weights: a local state dict; None downloads torchvision's. COCO classes that `names` lacks are dropped.
    """
    # DEPARTS: the paper's detector is SNIPER (Sect. 4.2). Ours is one of torchvision's, trained on COCO: it needs no
    # code beyond what is installed.
    # PAPER SILENT: the detector's score threshold and its training data; 0.5 here, and COCO.
    import torch  # here, so that labels from annotations need no torch
    from torchvision.models import detection, get_model_weights, list_models
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {device}: cannot be used here ({str(error).split('. ')[0]}): use --device "
                       "cpu") from None
    if name not in list_models(module=detection) or "coco" not in str(list(get_model_weights(name))).lower():
        raise BadInput(f"--detector {name}: no COCO detector of torchvision.models.detection")
    pretrained = get_model_weights(name).DEFAULT
    categories = [COCO_TO_VOC.get(category, category) for category in pretrained.meta["categories"]]
    classes_of = torch.tensor([names.index(c) if c in names[1:] else 0 for c in categories])      # (91,), 0: none
    if not classes_of.any():
        raise BadInput("--boxes detector: no class in class_names.txt has a COCO name: use --boxes annotation")
    if unknown := [name for name in names[1:] if name not in categories]:
        print(f"{name} does not know {', '.join(unknown)}: it will find no boxes of these", file=sys.stderr)
    try:
        if weights is None:
            network = getattr(detection, name)(weights=pretrained)
        else:
            network = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=len(categories))
            network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except OSError as error:
        hint = f"no detector weights {weights}" if weights else f"cannot download {name}: give --detector-weights FILE"
        raise BadInput(f"{hint} ({error})") from None
    except Exception as error:  # a broken file, or another network's: torch raises many kinds
        raise BadInput(f"{weights or 'the download'}: not a state dict of {name} "
                       f"({str(error).splitlines()[0]})") from None
    network.eval().to(device)

    def detect(image):
        height, width = image.shape[:2]
        with torch.inference_mode():
            pixels = torch.from_numpy(image).to(device).permute(2, 0, 1).float() / 255            # (3, H, W)
            found = {key: value.cpu() for key, value in network([pixels])[0].items()}
        classes = classes_of[found["labels"]]
        keep = (found["scores"] >= threshold) & (classes > 0)
        corners = found["boxes"][keep].numpy()
        low, high = np.floor(corners[:, :2]), np.ceil(corners[:, 2:])  # outwards: never without area
        boxes = np.hstack([low.clip(0), np.minimum(high, (width, height))]).astype(np.int32)
        inside = (boxes[:, :2] < boxes[:, 2:]).all(1)
        return boxes[inside], classes[keep].numpy().astype(np.uint8)[inside]

    detect.source = f"{name} ({Path(weights).name if weights else 'COCO'}) from {threshold}"
    return detect


# ---------------------------------------------------------------- filling rates (Eq. 7, Fig. 2)
def fill_rates(box_labels, mask_labels):
    """Eq. 7 for one image: {class index: eta_c}, eta_c = sum_i M(i, c) / sum_i B(i, c), for the classes c in B.

    box_labels, mask_labels: (H, W) uint8. M(., c) counts inside B(., c) only, so 0 <= eta_c <= 1, pixels where
    M is 255 not at all: see losses.fill_rate.
    """
    box_area = np.bincount(box_labels[mask_labels != 255], minlength=256)
    filled = np.bincount(box_labels[box_labels == mask_labels], minlength=256)
    return {int(c): float(filled[c] / box_area[c]) for c in np.flatnonzero(box_area) if c not in (0, 255)}


def fill_rate_table(folders, ids, names):
    """The filling rates of B and M on disk: {"images": {id: {class: rate}}, "classes": {class: statistics}}."""
    # PAPER SILENT: from which masks Fig. 2's rates are computed, and whether per box. Here from GrabCut's, and as in
    # Eq. 7: one rate per image and class, over all its boxes together.
    images = {}
    for image_id in tqdm(ids, "filling rates", unit="image", disable=None):
        box_labels = read_label(folders[0] / f"{image_id}.png", num_classes=len(names))
        mask_labels = read_label(folders[1] / f"{image_id}.png", box_labels.shape, len(names))
        images[image_id] = {names[c]: round(rate, 4) for c, rate in fill_rates(box_labels, mask_labels).items()}
    classes = {}
    for name in names[1:]:
        rates = np.array([rates[name] for rates in images.values() if name in rates])
        classes[name] = {"images": len(rates)}
        if len(rates):
            classes[name] |= {key: round(float(getattr(np, key)(rates)), 4) for key in ("mean", "std", "median")}
    return {"images": images, "classes": classes}


def class_fill_rates(voc, ids, out=None):
    """Labels on disk -> (L,) float32 tensor: each class's mean filling rate, 1 for a class that has no box."""
    # DEPARTS: Song et al. estimate their rates by a dense CRF, box by box, and have 1 to 3 a class (Sect. 2, Fig. 2).
    # Ours: one rate per class, the mean over images of Eq. 7, from GrabCut's masks.
    import torch
    names = class_names(voc)
    classes = fill_rate_table(label_paths(voc, out), ids, names)["classes"]
    return torch.tensor([classes[name].get("mean", 1.0) for name in names[1:]])


def draw_fill_rates(table):
    """A figure like Fig. 2, (H, W, 3) uint8 RGB: per class a row, how its images' filling rates spread."""
    names = [name for name, row in table["classes"].items() if row["images"]]
    left, step, plot, bins = 190, 44, 800, 40
    canvas = np.full((len(names) * step + 110, left + plot + 210, 3), 255, np.uint8)
    text = dict(fontFace=cv2.FONT_HERSHEY_SIMPLEX, color=(40, 40, 40), thickness=1, lineType=cv2.LINE_AA)
    foot = 50 + len(names) * step
    cv2.putText(canvas, "filling rate of the boxes, image by image (Eq. 7)", (left, 26), fontScale=0.6, **text)
    cv2.putText(canvas, "mean    std   images", (left + plot + 14, 26), fontScale=0.5, **text)
    for tick in range(0, 11, 2):
        x = left + plot * tick // 10
        cv2.line(canvas, (x, 40), (x, foot), (225, 225, 225), 1)
        cv2.putText(canvas, f"{tick / 10:.1f}", (x - 12, foot + 24), fontScale=0.5, **text)
    for row, name in enumerate(names):
        rates = np.array([rates[name] for rates in table["images"].values() if name in rates])
        counts = np.histogram(rates, bins, (0, 1))[0].astype(np.float64)
        density = np.convolve(np.pad(counts, 2, "symmetric"), (0.1, 0.2, 0.4, 0.2, 0.1), "valid")  # smoothed a little
        base = 50 + (row + 1) * step - 4
        xs = left + plot * (np.arange(bins) + 0.5) / bins
        outline = np.stack([np.r_[left, xs, left + plot], base - (step - 10) * np.r_[0, density, 0] / density.max()], 1)
        colour = tuple(int(c) for c in voc_palette()[list(table["classes"]).index(name) + 1])
        pale = tuple((c + 2 * 255) // 3 for c in colour)
        cv2.fillPoly(canvas, [np.round(outline * 16).astype(np.int32)], pale, cv2.LINE_AA, shift=4)
        cv2.polylines(canvas, [np.round(outline * 16).astype(np.int32)], False, colour, 1, cv2.LINE_AA, shift=4)
        x = round(left + plot * rates.mean())
        cv2.line(canvas, (x, base - step + 12), (x, base), (0, 0, 0), 2, cv2.LINE_AA)  # the mean
        cv2.putText(canvas, name, (14, base - 8), fontScale=0.6, **text)
        numbers = f"{rates.mean():.2f}   {rates.std():.2f}   {len(rates)}"
        cv2.putText(canvas, numbers, (left + plot + 14, base - 8), fontScale=0.5, **text)
    return canvas


# ---------------------------------------------------------------- one image
def show_mask(path, corners, out=None, **options):
    """GrabCut on one box of a file -> path of an image (image | mask | object), filling rate, and why
    there was a second attempt, or None."""
    image = read_image(path)
    box = x0, y0, x1, y1 = clip_box(corners, image.shape[:2], path)
    mask, why = grabcut(image, box, **options)
    panels = [image.copy(), image.copy(), np.where(mask[..., None], image, 255).astype(np.uint8)]
    panels[1][mask] = (0.5 * image[mask] + 0.5 * np.array([0, 200, 80])).astype(np.uint8)
    thick = max(1, round(max(image.shape[:2]) / 250))
    contours = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0]
    cv2.drawContours(panels[1], contours, -1, (255, 255, 255), thick)
    for panel in panels[:2]:
        cv2.rectangle(panel, (x0, y0), (x1 - 1, y1 - 1), (255, 60, 60), thick)
    target = (Path(out) if out else Path(path).parent) / f"{Path(path).stem}_grabcut.png"
    with writing(target) as temporary:
        Image.fromarray(np.hstack(panels)).save(temporary, "PNG")
    return target, float(mask[y0:y1, x0:x1].mean()), why


# ---------------------------------------------------------------- VOC's files: lists, images, label maps, annotations
# ==== shared block "VOC on disk": equal to the byte in evaluate.py, grabcut_labels.py and mcg_candidates.py
VOC_CLASSES = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
               "person pottedplant sheep sofa train tvmonitor").split()


class BadInput(Exception):
    """What the user gave cannot be used; the message is one line that names the file and the remedy."""


class CannotWrite(BadInput):
    """A full disk or a folder that may not be written: the end of a job that goes on after a single bad image."""


def find_voc(data):
    """--data (a VOCdevkit, or the VOC2012 folder in it) -> Path of the folder that holds JPEGImages."""
    for folder in (Path(data), Path(data) / "VOC2012", Path(data) / "VOCdevkit" / "VOC2012"):
        try:
            if (folder / "JPEGImages").is_dir():
                return folder
        except PermissionError:
            raise BadInput(f"{folder}: may not be read: ask its owner, or copy the data") from None
    raise BadInput(f"no VOC data in {data}: expected {data}/VOC2012/JPEGImages")


def read_text(path):
    """A text file -> str, lines end in "\\n". UTF-8 whatever the system, or UTF-16, which needs its byte order mark."""
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise BadInput(f"{path}: not text in UTF-8: save it in that encoding")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_names(path):
    """A file of class names, one a line, background first -> list."""
    names = [name.strip() for name in read_text(path).split("\n") if name.strip()]
    names = names[names[:1] == ["__ignore__"]:]  # labelme's own, for what is labelled 255
    if not 2 <= len(names) <= 255 or len(set(names)) < len(names):
        raise BadInput(f"{path}: expected 2 to 255 different names, one a line, background first")
    return names


def class_names(voc):
    """VOC's 21 names, or those of a class_names.txt beside JPEGImages (one a line, background first)."""
    path = Path(voc) / "class_names.txt"
    return read_names(path) if path.exists() else list(VOC_CLASSES)
# ==== end of shared block


# ==== shared block "ids of images": equal to the byte in evaluate.py, grabcut_labels.py and mcg_candidates.py
ENDINGS = ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"  # of images, in small letters or in capitals


def image_id(text, where):
    """What a list calls an image -> its id: the image's path below JPEGImages without its ending, as in day1/a."""
    endings, name = "|".join(ENDINGS).replace(".", r"\."), text
    if columns := re.fullmatch(rf"(.+?)({endings})\s+(.*[/\\])?(.+)\.(png|xml)", name, re.I):  # DeepLab's lists
        name = columns[1]
        if re.split(r"[/\\]", name)[-1] != columns[4]:
            raise BadInput(f"{where}: {text[:99]!r} are two names: expected one image a line")
    name = re.sub(r"^(\./)?(/?((VOCdevkit/)?VOC2012/)?JPEGImages/)?", "", name.replace("\\", "/"))
    parts = re.sub(rf"({endings})$", "", name, flags=re.I).split("/")
    long = max(len(part.encode("utf-8", "replace")) for part in parts) > 230  # with an ending too long for a file name
    if long or {"", ".", ".."} & set(parts) or parts[0][1:2] == ":":
        raise BadInput(f"{where}: {text[:99]!r} is no id: expected an image's name, or its path below JPEGImages")
    return "/".join(parts)


def read_list(path):
    """An ImageSets list -> image ids in order: see image_id(). One a line, which may hold spaces."""
    if not Path(path).exists():
        raise BadInput(f"no image list {path}: write one id a line (file names without .jpg)")
    lines = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    unflagged = {re.sub(r"\s+(-1|0|1)$", "", line) for line in lines}
    if lines and len(unflagged) == len(lines) and unflagged.isdisjoint(lines):
        raise BadInput(f"{path}: a second column of 1, 0, -1, as in VOC's lists of one class (dog_train.txt): keep the "
                       "lines that you want, and only their ids")
    ids = [image_id(line, path) for line in lines]
    if not ids or len(set(ids)) < len(ids):
        raise BadInput(f"{path}: " + ("names an id twice" if ids else "is empty") + ": expected one id a line")
    return ids


def find_image(folder, name):
    """The image of an id, whatever its ending (where there is none, what .jpg would be called). Two are refused."""
    paths = [Path(folder) / f"{name}{ending}" for small in ENDINGS for ending in (small, small.upper())]
    found = [path for path in paths if path.is_file()] or paths[:1]
    for other in found[1:]:
        if not other.samefile(found[0]):  # it is where capitals do not count
            raise BadInput(f"{found[0]} and {other.name} have one id: rename one, or move it out of {folder}")
    return found[0]
# ==== end of shared block


# ==== shared block "an image": equal to the byte in crf.py, evaluate.py, grabcut_labels.py and mcg_candidates.py
UPRIGHT = dict(enumerate(("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE",
                          "ROTATE_90"), 2))  # EXIF's orientation -> how Pillow undoes it


def orientation(exif):
    """EXIF's bytes -> its orientation, or None. Pillow reads all other tags, too, and an odd one hides this from it."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = "<" if exif[:2] == b"II" else ">"
    try:
        start, = struct.unpack_from(order + "I", exif, 4)
        for entry in range(start + 2, start + 2 + 12 * struct.unpack_from(order + "H", exif, start)[0], 12):
            tag, kind = struct.unpack_from(order + "HH", exif, entry)
            if tag == 0x0112:
                return struct.unpack_from(order + ("I" if kind == 4 else "H"), exif, entry + 8)[0]
    except struct.error:  # cut off
        pass
    return None


def read_image(path):
    """An image file -> (H, W, 3) uint8 RGB, turned upright where EXIF says so."""
    try:
        with Image.open(path) as file:
            file.verify()  # a PNG's checksums, which load() does not look at; other formats have none
        with Image.open(path) as file:
            deep = any(depth in str(file.tile) for depth in (";16B", ";16L", ";16N"))  # where mode may say RGB, too
            file.load()  # raises on a cut-off JPEG; turns a TIFF itself
            mode, image, turn = file.mode, file.convert("RGB"), UPRIGHT.get(orientation(file.info.get("exif", b"")))
    except FileNotFoundError:
        raise BadInput(f"no image {path}") from None
    except Exception as error:  # broken bytes make decoders raise nearly anything
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadInput(f"{path}: not a readable image ({why}): replace it or take its id off the list") from None
    if mode[0] in "IF" or deep:  # what their black and white are is not said; Pillow would cut at 255, or the low byte
        raise BadInput(f"{path}: its pixels have more than 8 bits ({mode}): save it with 8 bits a channel")
    return np.array(image.transpose(Image.Transpose[turn]) if turn else image)
# ==== end of shared block


# ==== shared block "label maps": equal to the byte in evaluate.py, grabcut_labels.py and mcg_candidates.py
def voc_palette():
    """VOC's colours, (256, 3) uint8: bits 0, 1, 2 of the index give the high bit of R, G, B, bits 3, 4, 5 the next."""
    bits = [[(np.arange(256) >> (3 * k + c) & 1) << (7 - k) for k in range(3)] for c in range(3)]
    return np.array(bits).sum(1).T.astype(np.uint8)


def read_label(path, size=None, num_classes=None):
    """A label PNG -> (H, W) uint8 class index per pixel, 255 ignored. size is (H, W) of the image it belongs to."""
    try:
        with Image.open(path, formats=["PNG"]) as png:  # a JPEG's indices would be blurred
            png.verify()  # its checksums
        with Image.open(path) as png:
            depth = png.tile[0][3].rpartition(";")[2]  # bits a pixel where they are fewer than 8
            labels = np.array(png.convert("L") if png.mode == "1" else png)  # of a palette PNG the indices
            mode, palette = png.mode, np.array(png.getpalette() or [], np.uint8).reshape(-1, 3)
    except FileNotFoundError:
        raise BadInput(f"no label {path}") from None
    except Exception as error:  # broken bytes make decoders raise nearly anything
        raise BadInput(f"{path}: not a readable PNG ({' '.join(str(error).split())}): delete it and make it "
                       "again") from None
    if mode not in ("P", "L", "1"):
        raise BadInput(f"{path}: a {mode} image, not class indices: save it as an 8-bit palette PNG")
    if mode != "P" and depth in ("1", "2", "4"):
        labels //= 255 // (2 ** int(depth) - 1)  # Pillow has spread them over 0..255
    colours, classes = voc_palette(), [*range(num_classes or 21), 255]
    if mode == "P" and not np.array_equal(palette, colours[:len(palette)]):  # then colours must not say another class
        used = [index for index in np.flatnonzero(np.bincount(labels.ravel())) if index < len(palette)]
        said = [[c for c in classes if np.array_equal(colours[c], palette[index])] for index in used]
        if all(said) and sum(said, []) != used and len(set(map(tuple, said))) == len(used):
            raise BadInput(f"{path}: its colours are VOC's, its indices are not: save it with VOC's palette in order")
    if size is not None and labels.shape != tuple(size):
        raise BadInput(f"{path}: {labels.shape[1]}x{labels.shape[0]}, its image {size[1]}x{size[0]}: delete it and "
                       "make it again")
    if num_classes is not None and (worst := labels[labels < 255].max(initial=0)) >= num_classes:
        raise BadInput(f"{path}: holds class {worst}, but there are {num_classes} classes: check class_names.txt")
    return labels


def require_a_class(paths):
    """Refuses label PNGs that together hold no class but background; reads them up to the first that does."""
    count = 0
    try:
        for count, path in enumerate(paths, 1):
            if (read_label(path) % 255).any():
                return
    except BadInput:
        return  # it is reported with its image
    if count:
        raise BadInput(f"{path}: no class but background in it, nor in any of the list ({count}): expected classes' "
                       "indices (255 is ignored: in masks of 0 and 255 replace it by the class's index)")


def write_label(path, labels):
    """(H, W) class indices -> 8-bit palette PNG."""
    png = Image.fromarray(np.asarray(labels, np.uint8))
    png.putpalette(voc_palette().tobytes())  # makes it mode P, indices unchanged
    with writing(path) as temporary:
        png.save(temporary, "PNG")
# ==== end of shared block


# ==== shared block "what was made": equal to the byte in evaluate.py, grabcut_labels.py and mcg_candidates.py
@contextlib.contextmanager
def writing(path):
    """A temporary name, under which to write the file: no half file is ever seen. Makes its folder, too."""
    temporary = f"{path}.{os.getpid()}-{os.urandom(4).hex()}.tmp"   # containers on one disk have the same pids
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise CannotWrite(f"{path}: cannot be written ({error.strerror or error}): make room, or name another place "
                          "to write to (such as --out)") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def read_source(folder):
    """A folder of candidates or labels -> its source.json: {"images": Path of the folder of its images,
    "class_names", "method", and what else they depend on}."""
    path = Path(folder) / "source.json"
    if not path.is_file():
        raise BadInput(f"no {path}: {folder} holds no candidates: make them by mcg_candidates.py")
    try:
        source = json.loads(read_text(path))
        return source | {"images": Path(folder) / source["images"], "class_names": list(source["class_names"]),
                         "method": str(source["method"])}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"{path}: not what mcg_candidates.py or grabcut_labels.py writes ({error}): delete {folder}, "
                       "make it again") from None


def check_classes(folder, names, images=None):
    """Refuses a folder of labels that was made with other class names: its indices would mean other classes; or, where
    the images' folder is given, of other images, whose ids may be the same."""
    if not (Path(folder) / "source.json").exists():
        return
    there = read_source(folder)
    if there["class_names"] != names:
        raise BadInput(f"{folder}: made with other class_names ({' '.join(there['class_names'])}): delete it and make "
                       "it again")
    if images and there["images"].is_dir() and not there["images"].samefile(images):
        raise BadInput(f"{folder}: made of other images ({there['images'].resolve()}): name the one made of {images}")


def keep_apart(folders, inputs, files=()):
    """Refuses folders and files to write to that are read from, and files to write in a folder that is read from."""
    for out in filter(None, [*folders, *files]):
        for source in filter(None, inputs):
            for path in (out, out.parent) if out in files else (out,):
                if path.exists() and source.exists() and path.samefile(source):
                    raise BadInput(f"{out}: writing there would overwrite what is read from {source}: name another")
# ==== end of shared block


# ==== shared block "boxes of an annotation": equal to the byte in grabcut_labels.py and mcg_candidates.py
def check_size(said, size, where):
    """What an annotation says of its image's size, (width, height), against the image's own (H, W)."""
    try:
        said = [float(number or 0) for number in said]
    except (TypeError, ValueError):  # "null", "unknown": nothing is said
        return
    # Off by one is let pass: some tools that wrote VOC files round a resized image's size up, others down, or take
    # the last pixel's number for it; such boxes are off by a pixel at most. 0 and nothing are what others write.
    if any(number > 0 and abs(number - pixels) > 1 for number, pixels in zip(said, size[::-1])):
        turned = abs(said[0] - size[0]) <= 1 and abs(said[1] - size[1]) <= 1
        raise BadInput(f"{where}: says {said[0]:g}x{said[1]:g}, but the image is {size[1]}x{size[0]}: " + (
            "if EXIF turns it and the boxes do not, take the orientation out (exiftool -Orientation= FILE), otherwise "
            "correct the size" if turned else "annotate it as it is, or put back the image that was annotated"))


def clip_box(corners, size, where):
    """Corners x0, y0, x1, y1 (0-based, half-open, any order of magnitude) -> the four ints, clipped to (H, W)."""
    x0, y0, x1, y1 = corners
    height, width = size
    clipped = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        raise BadInput(f"{where}: box {x0} {y0} {x1} {y1} has no area inside the {width}x{height} image: fix it")
    return clipped


def only(parent, tag, where):
    """The text of the one child of that name, "" where there is none; of two, neither may be dropped."""
    found = parent.findall(tag)
    if len(found) > 1:
        raise BadInput(f"{where}: <{parent.tag}> has several <{tag}>: write an <object> of its own for each box")
    return (found[0].text or "").strip() if found else ""
# ==== end of shared block


# ==== shared block "a VOC annotation": equal to the byte in grabcut_labels.py and mcg_candidates.py
def read_boxes(xml_path, names, size):
    """A VOC annotation -> boxes (K, 4) int32 x0, y0, x1, y1 (0-based, half-open, clipped) and classes (K,) uint8.

    names: class_names(...), background first; size: (H, W) of the image, None: unknown. VOC's corners are 1-based and
    inclusive, some are floats. Raises BadInput.
    """
    # PAPER SILENT: objects marked difficult (161 of the 899 boxes of VOC's 2007 train images), in both papers. They are
    # kept: they are there in the image, and what lies outside of all boxes is to be background.
    try:
        root = ElementTree.parse(xml_path).getroot()
    except FileNotFoundError:
        raise BadInput(f"no annotation {xml_path}") from None
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
        raise BadInput(f"{xml_path}: not readable XML ({error}): export it again or take its id off the list") from None
    things = root.findall("object")  # direct children only, here and below: a <part> inside is no object
    # A web page, CVAT's own XML, objects in a wrapper or a namespace, <Object>: to find nothing there would be wrong.
    tags = [element.tag.rpartition("}")[2].lower() for element in root.iter()]
    held = sum(len(root.findall(path)) for path in ("object/bndbox", "object/part/bndbox"))
    if root.tag != "annotation" or tags.count("object") > len(things) or tags.count("bndbox") > held:
        raise BadInput(f"{xml_path}: <{root.tag}> is not VOC's form, in which <annotation> holds each <object> and "
                       "that its <bndbox>: export it as Pascal VOC")
    for element in root.findall("size") if size else ():
        check_size((only(element, "width", xml_path), only(element, "height", xml_path)), size, xml_path)
    boxes, classes = [], []
    for thing in things:
        if not (len(thing) or thing.attrib or (thing.text or "").strip()):
            continue  # <object/>: how some say that there is none
        name = only(thing, "name", xml_path)
        if name not in names[1:]:
            raise BadInput(f"{xml_path}: " + (f"unknown class {name!r}" if name else "an object without a name")
                           + f"; known are {', '.join(names[1:])}"
                           + f" ({name} is the background: the first of class_names.txt)" * (name == names[0])
                           + "; other classes: name them in class_names.txt beside JPEGImages, one a line, background "
                           "first" * (names == VOC_CLASSES))
        only(thing, "bndbox", xml_path)
        for attribute in thing.findall("attributes/attribute"):  # CVAT's: how far the box is turned about its centre
            if attribute.findtext("name") == "rotation" and (attribute.findtext("value") or "").strip("0. "):
                raise BadInput(f"{xml_path}: a {name} whose box is turned by {attribute.findtext('value')} degrees: "
                               "export it as COCO, for grabcut_labels.py --coco, which takes the upright box around it")
        try:
            box = thing.find("bndbox")
            corners = [float(only(box, key, xml_path)) for key in ("xmin", "ymin", "xmax", "ymax")]
            xmin, ymin, xmax, ymax = (int(np.floor(corner + 0.5)) for corner in corners)  # int() refuses nan and inf
        except (AttributeError, ValueError, OverflowError):
            raise BadInput(f"{xml_path}: a {name} without xmin, ymin, xmax, ymax in its bndbox: fix it") from None
        if max(corners) <= 1 and min(corners) < 1:
            raise BadInput(f"{xml_path}: the box {corners} lies in 0..1, as a share of the image: expected pixels")
        boxes.append(clip_box((xmin - 1, ymin - 1, xmax, ymax), size or (2 ** 31 - 1,) * 2, xml_path))
        classes.append(names.index(name))
    return np.array(boxes, np.int32).reshape(-1, 4), np.array(classes, np.uint8)


def require_a_box(paths, names):
    """Refuses annotations that together hold no box; reads them up to the first that does, or that cannot be read."""
    count = 0
    try:
        for count, path in enumerate(paths, 1):
            if len(read_boxes(path, names, None)[0]):
                return
    except BadInput:
        return  # it is reported with its image
    if count:
        raise BadInput(f"{path}: no object in it, nor in any other of the list ({count}): export the boxes again")
# ==== end of shared block


# ---------------------------------------------------------------- boxes of one's own (--coco, --yolo)
# What an annotation tool exports -> --data/VOC2012 in VOC's form; from there on everything is as with VOC. Decisions:
#   ids         an image's path below --images without its ending; folders (but images/) and spaces give underscores
#   lists       train, val or test by data.yaml, or by the name of a folder or JSON; a single list is train
#   no boxes    such images are left out: an export does not tell "nothing in it" from "nobody has looked yet"
#   crowds      (COCO's iscrowd 1: one box around many objects) are left out unless --crowds takes them
#   rotation    the upright box around a rotated box, or around an outline, is taken
#   EXIF        tools draw on the upright image; where a JSON has the size of the stored one, its boxes are turned, but
#               not Label Studio's. Where sizes do not tell (YOLO's files state none), boxes are left as they are, and
#               it is said
WORD = "obj|data|instances|annotations|images|labels|coco|set|split"      # what stands beside train or val in a name
SPLIT = re.compile(rf"(?:(?:{WORD})[-_. ])?(train|val|test)(?:ing|id|idation)?"
                   rf"(?:[-_. ](?:{WORD})|set|[-_. ]?(?:19|20)\d\d)?", re.IGNORECASE)


def split_of(names):
    """Names of folders or files -> "train", "val" or "test" by the last that says so (valid, val2017, train_coco), or
    None."""
    found = [match[1].lower() for match in map(SPLIT.fullmatch, names) if match]
    return found[-1] if found else None


def files_below(folder, pattern="*"):
    """Files below a folder, as sorted paths relative to it. Links are followed; hidden files (._a.jpg) are left out."""
    names = glob.iglob(f"**/{pattern}", root_dir=folder, recursive=True)
    return sorted(Path(name) for name in names if (Path(folder) / name).is_file())


def tidy_name(name):
    """A class name with single spaces, and with one code for each letter (Macs write a u and two dots)."""
    return " ".join(unicodedata.normalize("NFC", str(name)).split())


def no_class(name):
    return name.lower() in ("background", "_background_", "__background__", "__ignore__")  # labelme's, and others'


def spellings(name):
    """The file names that an export may mean by name: as it stands, %20 for a space, and a Mac's letters."""
    return dict.fromkeys(unicodedata.normalize(form, text) if form else text
                         for text in (name, unquote(name), quote(name, errors="surrogatepass"))   # not UTF-8
                         for form in ("", "NFC", "NFD"))


def tidy_names(names, where):
    """Class names, each tidy; refused unless they are 1 to 254 different printable ones."""
    names = [tidy_name(name) for name in names]
    if not 1 <= len(names) <= 254 or len(set(names)) < len(names) or not all(n and n.isprintable() for n in names):
        raise BadInput(f"{where}: expected 1 to 254 different class names, got {', '.join(map(repr, names)) or 'none'}")
    return names


def outline_corners(outline):
    """COCO's polygons [[x, y, x, y, ...], ...] -> array x0, y0, x1, y1 around them, or None where there are none."""
    if not isinstance(outline, list) or not all(isinstance(part, list) and len(part) % 2 == 0 for part in outline):
        return None
    points = np.array([number for part in outline for number in part], float).reshape(-1, 2)
    return np.concatenate([points.min(0), points.max(0)]) if len(points) else None


def coco_corners(thing, notes):
    """One of COCO's annotations -> floats x0, y0, x1, y1, or None where it has no box. Raises TypeError, ValueError."""
    outline = thing.get("segmentation")
    extent = outline_corners(outline)
    if not any(thing.get("bbox") or ()):
        if extent is None and isinstance(outline, list) and outline:
            raise ValueError("neither a box nor an outline")
        return None if extent is None else tuple(extent)
    x, y, width, height = (float(number) for number in thing["bbox"])
    attributes = thing.get("attributes")
    degrees = float(attributes.get("rotation") or 0) if isinstance(attributes, dict) else 0.0
    if not np.isfinite([x, y, width, height, degrees]).all():
        raise ValueError("not finite")
    if extent is not None and (abs(extent - (x, y, width, height)) <= 2).all() and (
            abs(extent[2:] - (x + width, y + height)) > 2).any():
        raise ValueError("two corners, by its outline")
    if degrees % 360 and not outline:  # CVAT's bbox: the rectangle before it turns about its centre
        notes["rotated boxes: the upright box around each is taken"] += 1
        cos, sin = abs(np.cos(np.radians(degrees))), abs(np.sin(np.radians(degrees)))
        x, y = x + width / 2, y + height / 2
        width, height = width * cos + height * sin, width * sin + height * cos
        x, y = x - width / 2, y - height / 2
    return x, y, x + width, y + height


def locate(name, images, beside, split):
    """A JSON's file name -> the images (paths below --images) that it may mean: none, one or several.

    beside: whether an image lies beside the JSON or below; split: the JSON's. They tell images of one name apart.
    """
    parts = tuple(part for part in re.split(r"[\\/]+", name) if part not in ("", ".", ".."))
    found = [path for path in images if path.parts[-len(parts):] == parts]
    if not found:  # --images may be a folder that the JSON's name begins with
        return [path for path in images if path.parts in (parts[k:] for k in range(1, len(parts)))]
    for fits in (beside, lambda path: split_of(path.parts[:-1]) == split, lambda path: path.parts == parts):
        if len(found) > 1 and sum(map(fits, found)) == 1:
            found = [path for path in found if fits(path)]
    return found


def read_coco_export(sources, folder, images, wanted, crowds, notes, failed):
    """COCO's JSON files, or folders with them -> class names, [(image, split, stated size, boxes), ...].

    images: paths below folder; wanted: class names, or None for all; boxes: [(class, x0, y0, x1, y1), ...], floats.
    notes: Counter of what is left out or changed, failed: {image: what is wrong}; both are added to.
    """
    patterns = ("_annotations.coco.json", "instances_*.json", "result.json", "result_coco.json",
                "annotations.json")
    files, by_name, found, classes, named = [], {}, [], {}, set()
    for path in map(Path, sources):
        here = [path / name for p in patterns for name in files_below(path, p)] if path.is_dir() else [path]
        files += here
        if not here:
            raise BadInput(f"--coco {path}: no {', '.join(patterns)} in this folder: name the JSON file")
    by_stem = {path.stem.lower(): path for path in images}
    for path in images:
        by_name.setdefault(path.name, []).append(path)
    for file in files:
        try:
            coco = json.loads(read_text(file), object_pairs_hook=once)
            kinds = {kind["id"]: tidy_name(kind["name"]) for kind in coco["categories"]}
            # Label Studio states the size of the image as stored, and draws boxes on the upright one. (Its outlines
            # are scaled by the stored size, which is why such images are named.)
            about = coco.get("info") or {}
            drawn = ("upright",) * (isinstance(about, dict) and about.get("contributor") == "Label Studio")
            entries = {one["id"]: (str(one["file_name"]), (one.get("width"), one.get("height"), *drawn), [])
                       for one in coco["images"]}
            things = [(thing["image_id"], thing["category_id"], thing) for thing in coco["annotations"]]
            used, _ = ({thing[key] for thing in coco["annotations"]} for key in ("category_id", "image_id"))  # hashable
            parents = {(kind.get("supercategory"), key) for kind in coco["categories"] for key in kinds
                       if key != kind["id"]}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(f"{file}: not COCO's images, annotations, categories ({error!r}): export as COCO") from None
        for what, ids in (("categories", kinds), ("images", entries)):
            if len(ids) < len(coco[what]):
                raise BadInput(f"{file}: two {what} have one id, so nobody can tell whose the boxes are: give each its "
                               "own")
        # Roboflow's first category has the project's name and is the parent of all others: no class, if without boxes.
        classes.update({name: None for key, name in kinds.items()
                        if not no_class(name) and (key in used or (name, key) not in parents)})
        bad, project = {}, file.absolute().parent.name
        split = split_of((project, file.stem))
        for image, category, thing in things:
            name = kinds.get(category)
            if image not in entries or name is None:
                notes["boxes of an image or category that the JSON does not list left out"] += 1
            elif no_class(name) or wanted and name not in wanted:
                notes["boxes of classes that are not asked for, or background, left out"] += 1
            elif thing.get("iscrowd") not in (None, 0, "0", "") and not crowds:
                notes["crowds left out (iscrowd 1, as CVAT marks all painted masks; --crowds takes them)"] += 1
            else:
                try:
                    corners = coco_corners(thing, notes)
                    entries[image][2].extend([(name, *corners)] if corners else [])
                    notes["annotations without a box left out"] += not corners
                except (TypeError, ValueError, OverflowError):
                    bad[image] = f"{file.name} has the box {thing.get('bbox')}: expected x, y, width, height: fix it"
        for key, (name, size, boxes) in entries.items():
            beside = lambda path: (folder / path).is_relative_to(os.path.abspath(file.parent))
            which = next(filter(None, (locate(spelt, by_name.get(re.split(r"[\\/]", spelt)[-1], []), beside, split)
                                       for spelt in spellings(name))), [])
            named.update(which)
            if len(which) != 1:
                near = by_stem.get(Path(name.replace("\\", "/")).stem.lower())
                failed[name] = (f"may be {' or '.join(map(str, which))}: rename them" if which else
                                f"{file.name} names it, but {folder} has no such image" + (
                                    f", only {near}: rename it, or give --images its folder" if near else
                                    f" ({' '.join(ENDINGS)}): add it"))
            elif key in bad or boxes and max(max(corners) for _, *corners in boxes) <= 1:
                failed[str(which[0])] = bad.get(key) or f"{file.name} has boxes from 0 to 1: expected pixels"
            else:
                # "instances_val.json" says it best, then the image's own folders; a project may be called "test"
                found.append((which[0], split_of((project, *which[0].parts[:-1], file.stem)), size, boxes))
    notes["images left out that no JSON names"] += len(set(images) - named)
    if missing := set(wanted or ()) - set(classes):
        raise BadInput(f"no category is called {', '.join(sorted(missing))}, as --class-names has it; there are "
                       f"{', '.join(classes)}")
    return wanted or tidy_names(classes, files[0]), found


def yaml_values(text, where):
    """What follows a key of data.yaml -> [str, ...]: a value, a list or a map of 0, 1, ...; in brackets or by line."""
    end = {"[": "]", "{": "}"}.get(text.lstrip()[:1], "")
    head, stop = (r",\s*()()", r",\[\]{}\n") if end else (r"^( *)(- +)?", r"\n")
    text = "," + text.lstrip()[1:] if end else text
    plain = rf"""[^\s"'\[\]{{}}&*!|>%@`#?,-](?:[^#{stop}]|(?<=\S)#)*"""
    item = re.compile(rf"""{head}(?:(\d+) *:\s+)?(?:"([^"\\]*)"|'([^']*)'|({plain}))""", re.MULTILINE)
    found = item.findall(text)
    rest = re.sub(r"(?:^|\s)#.*", "", item.sub("", text)).strip(" \t\n,")
    keys = [int(key) for _, _, key, *_ in found if key]
    kinds = {(indent, bool(dash), bool(key)) for indent, dash, key, *_ in found}  # by line: all alike
    one_a_line = end or len(found) < 2 or len(kinds) == 1 and sum(next(iter(kinds))[1:]) == 1
    if (rest != end or not one_a_line or keys and sorted(keys) != list(range(len(found)))
            or any(re.search(r":(\s|$)", value) for *_, value in found)):
        raise BadInput(f"{where}: neither a list nor a map of 0, 1, 2, ...: write it as - name, one a line")
    return ["".join(value).strip() for _, _, _, *value in sorted(found, key=lambda one: int(one[2] or 0))]


def read_data_yaml(path, notes):
    """Ultralytics' and Roboflow's data.yaml -> class names, {absolute folder or image: split}, whether rows have
    keypoints. An entry is a folder, or a list of images as Ultralytics' autosplit writes it."""
    parts = re.split(r"^(\w+)[ \t]*:", read_text(path), flags=re.MULTILINE)
    texts = dict(zip(parts[1::2], parts[2::2]))
    if 2 * len(texts) + 1 < len(parts):
        raise BadInput(f"{path}: has a key twice: delete one")
    value = {key: yaml_values(texts[key], f"{path}, {key}") for key in ("names", "nc", "path", "train", "val", "test")
             if texts.get(key, "").strip()}
    names = tidy_names(value.get("names", []), path)
    if value.get("nc", [str(len(names))]) != [str(len(names))]:
        raise BadInput(f"{path}: nc is {' '.join(value['nc'])}, but there are {len(names)} names: fix it")
    bases = [path.parent / "".join(value.get("path", [])).replace("\\", "/"), path.parent]
    entries = [(split, entry) for split in ("train", "val", "test") for entry in value.get(split, [])]
    splits = split_places(entries, bases, r"^(\.\./)+", path, notes)  # Roboflow has one ../ too many
    return names, splits, "kpt_shape" in texts


def split_places(entries, bases, prefix, where, notes):
    """[(split, folder or list of images), ...], relative to one of bases -> {absolute folder or image: split}.

    Entries and the lines of lists may have a prefix that is not there.
    """
    def places_of(name, bases):
        return {os.path.abspath(base / short) for base in bases for short in (name, re.sub(prefix, "", name))}

    splits = {}
    for split, entry in ((split, entry.replace("\\", "/")) for split, entry in entries if entry):
        places = [place for place in places_of(entry, bases) if os.path.exists(place)]
        for place in [place for place in places if os.path.isfile(place)]:
            meant = {line: places_of(line.replace("\\", "/"), (Path(place).parent, *bases))
                     for line in filter(None, map(str.strip, read_text(place).splitlines()))}
            places += itertools.chain(*meant.values())
            if gone := [line for line, paths in meant.items() if not any(map(os.path.exists, paths))]:
                notes[f"images are not where {place} lists them ({gone[0]}): they go by the names of their folders"
                      ] += len(gone)
        for place in places:
            splits.setdefault(place, split)
        notes[f"entry of {where} left out, which names no folder or list ({split}: {entry})"] += not places
    return splits


def yolo_boxes(path, names, keypoints=False):
    """A YOLO label file -> [(class, x0, y0, x1, y1), ...] in parts of the image's width and height. Its rows are

    class, centre x and y, width, height; or class and x, y, x, y, ... of an outline or a rotated box. Either may end
    in a confidence. keypoints: rows are boxes, whatever follows.
    """
    boxes = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            kind, *row = (float(word) for word in line.split())
        except ValueError:
            row = []
        row = row[:4] if keypoints else row
        if len(row) < 4:
            raise BadInput(f"{path}, line {number}: expected class, x, y, width, height, all of them numbers: fix it")
        if kind not in range(len(names)):
            raise BadInput(f"{path}, line {number}: class {kind:g}, but the names are of 0 to {len(names) - 1}")
        x, y, width, height = row[:4]
        inside = 0 < width / 2 < min(x, 1 - x) + 0.01 and 0 < height / 2 < min(y, 1 - y) + 0.01
        if len(row) == 6 and row[5] in range(1, 10 ** 6) and inside:  # as an outline, the third point is at the border
            raise BadInput(f"{path}, line {number}: a box, a confidence and a track's number, by the look of it: save "
                           "it without the last two")
        if not all(-0.5 <= part <= 1.5 for part in row):  # NaN, too
            raise BadInput(f"{path}, line {number}: not within 0 to 1 (pixels?): divide x by the image's width, y by "
                           "its height")
        if len(row) < 6:
            row = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        xs, ys = row[:len(row) // 2 * 2:2], row[1::2]
        boxes.append((names[int(kind)], min(xs), min(ys), max(xs), max(ys)))
    return boxes


def read_yolo_names(file, notes):
    """data.yaml, obj.names (with the lists that obj.data beside it names) or classes.txt -> as read_data_yaml."""
    if file.suffix in (".yaml", ".yml"):
        return read_data_yaml(file, notes)
    names = tidy_names(read_text(file).rstrip().splitlines(), file)  # an empty line would count: refused
    if file.name == "classes.txt":  # Label Studio's may stand in another order than its numbers, which notes.json has
        number = {}
        with contextlib.suppress(BadInput, ValueError, KeyError, TypeError):        # none there, or not Label Studio's
            number = {tidy_name(kind["name"]): int(kind["id"])
                      for kind in json.loads(read_text(file.with_name("notes.json")))["categories"]}
        if set(number) == set(names):
            if sorted(number.values()) != list(range(len(names))):
                raise BadInput(f"{file.with_name('notes.json')}: numbers the classes {sorted(number.values())}: name "
                               "them by --class-names, a line for each number from 0 on, whether used or not")
            names = sorted(names, key=number.get)
    if no_class(names[0]):
        raise BadInput(f"{file}: begins with {names[0]}, but YOLO's class 0 is the first name: delete that line")
    data = file.with_name("obj.data")
    text = read_text(data) if file.name == "obj.names" and data.is_file() else ""
    entries = [("val" if key == "valid" else key, entry)
               for key, entry in re.findall(r"^[ \t]*(train|valid|val|test)[ \t]*=[ \t]*(.*\S)", text, re.MULTILINE)]
    bases = [file.absolute().parent, file.absolute().parent.parent]  # darknet's data/ is this folder, CVAT's is nowhere
    return names, split_places(entries, bases, r"^(\./)?data/", data, notes), False


def read_yolo_export(labels, folder, images, names_file, notes, failed):
    """A folder of YOLO label files -> as read_coco_export, but () for sizes, and boxes in parts of the size."""
    labels = Path(labels)
    usual = [place / name for name in ("data.yaml", "obj.names", "classes.txt")
             for place in (labels, *labels.absolute().parents[:2])]
    file = Path(names_file) if names_file else next((path for path in usual if path.is_file()), None)
    if not labels.is_dir() or not file:
        raise BadInput(f"--yolo {labels}: " + ("no data.yaml, obj.names or classes.txt in it or above it: give "
                                               "--class-names FILE" if labels.is_dir() else "no such folder"))
    names, splits, keypoints = read_yolo_names(file, notes)
    others = {}
    for path in filter(Path.is_file, usual):
        try:
            told = notes if names_file and not splits and not path.samefile(file) else Counter()
            others[path], *rest = read_yolo_names(path, told)
            if names_file:                                              # which may be of the names alone
                splits, keypoints = splits or rest[0], keypoints or rest[1]
        except BadInput:
            if not names_file:                                          # a broken one is a reason to give --class-names
                raise
            notes[f"file with names cannot be read, and its lists, if any, are left out ({path})"] += 1
    for other, theirs in others.items():
        if not names_file and theirs != names:
            raise BadInput(f"{file} and {other} name different classes, or in another order: give the right one by "
                           "--class-names")
        # New names are fine; a choice of the old ones, or another order, would call cats dogs.
        if names not in others.values() and set(names) <= set(theirs):
            raise BadInput(f"--class-names {file}: {other} has other classes ({', '.join(theirs)}): YOLO's files know "
                           "numbers alone, so all names are needed, in that order")
    notes[f"class names read from {file}"] = len(names)
    found, used = [], {file}
    for path in images:
        swapped = Path(re.sub(r"(.*(?:^|/))images/", r"\1labels/", path.as_posix()))  # the last such folder
        label = next((labels / text for where in (path, swapped)
                      for text in spellings(where.with_suffix(".txt").as_posix()) if (labels / text).is_file()), None)
        if not label:
            notes["images without a label file left out"] += 1
            continue
        used.add(label)
        try:
            boxes = yolo_boxes(label, names, keypoints)
        except BadInput as error:
            failed[str(path)] = str(error)
            continue
        kept = [box for box in boxes if not no_class(box[0])]
        notes["boxes of the background left out"] += len(boxes) - len(kept)
        split = next((splits[str(up)] for up in (folder / path, *(folder / path).parents) if str(up) in splits), None)
        found.append((path, split or split_of(path.parts[:-1]), (), kept))
    lists = ("classes.txt", "labels.txt", "train.txt", "val.txt", "valid.txt", "test.txt")
    alone = [path for path in files_below(labels, "*.txt")
             if labels / path not in used and path.name not in lists and not path.name.startswith("README")]
    if images and alone and not found and not failed:
        raise BadInput(f"--yolo {labels}, --images {folder}: no image has a label file ({images[0]} would have "
                       f"{labels / images[0].with_suffix('.txt')}), and {alone[0]} has no image: give the same folder "
                       "twice, or the two that belong together, as labels and images")
    notes["label files left out that have no image (" + "".join(map(str, alone[:1])) + ")"] = len(alone)
    return [name for name in names if not no_class(name)], found


PERHAPS_TURNED = "images turned by EXIF, perhaps not as their boxes were drawn: look at some"


def fit_boxes(path, stated, boxes):
    """Boxes of an export -> (height, width) of the upright image, [(class, x0, y0, x1, y1), ...] in its pixels, 0-based
    and half-open, and a Counter of what was left out or changed.

    stated: the export's (width, height), with "upright" behind it where boxes are so though the size may be that of
    the image as stored; or () where boxes are in parts of the size. Raises BadInput where it is not the image's: then
    the boxes are another image's, or this one was resized.
    """
    def agrees(size):  # one pixel more or less passes (some tools count from 0), and so do None and 0 (not known)
        return all(not says or abs(says - there) <= 1 for says, there in zip(stated, size))

    def hold(size):  # whether no box leaves an image of this size
        return all(x1 - size[0] <= 1 and y1 - size[1] <= 1 for _, _, _, x1, y1 in boxes)

    height, width = read_image(path).shape[:2]
    notes, fitted = Counter(), []
    with Image.open(path) as file:
        turn, stored = orientation(file.info.get("exif", b"")) or 1, file.size
    if not all(says is None or isinstance(says, (int, float)) for says in stated[:2]):
        raise BadInput(f"{stated[:2]} in the JSON for its width and height: expected numbers")
    if agrees((width, height)):
        notes[PERHAPS_TURNED] += turn in range(2, 9) and agrees(stored) and len(stated) < 3
        turn = 1
    elif turn not in (5, 6, 7, 8) or not agrees(stored):
        raise BadInput(f"{stated[0]}x{stated[1]} in the JSON, but the image is {width}x{height}: give the image that "
                       "was annotated, or annotate this one")
    elif len(stated) > 2:
        notes[PERHAPS_TURNED] += 1
        turn = 1
    elif not hold(stored) and hold((width, height)):
        raise BadInput(f"{stated[0]}x{stated[1]} in the JSON is the image as it is stored, but its boxes fit the "
                       "upright one: in the JSON, swap width and height of all images that EXIF turns")
    for name, *corners in boxes:
        x0, y0, x1, y1 = corners if stated else np.multiply(corners, (width, height) * 2)
        if turn != 1:  # from the stored image, whose width is the upright one's height
            notes["boxes turned, as EXIF turns their image"] += 1
            x0, y0, x1, y1 = y0, x0, y1, x1
            x0, x1 = (width - x1, width - x0) if turn in (6, 7) else (x0, x1)
            y0, y1 = (height - y1, height - y0) if turn in (7, 8) else (y0, y1)
        if not (x0 < x1 and y0 < y1):
            notes["boxes of no area left out"] += 1
        elif not (x0 < width and y0 < height and x1 > 0 and y1 > 0):
            notes["boxes outside of their image left out"] += 1
        else:  # to whole pixels as mcg_candidates.py does it, never below one
            notes["boxes cut off at the edge of their image"] += min(x0, y0, width - x1, height - y1) < -1
            x0, y0, x1, y1 = (int(np.floor(edge + 0.5)) for edge in (x0, y0, x1, y1))
            x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
            fitted.append((name, x0, y0, min(max(x1, x0 + 1), width), min(max(y1, y0 + 1), height)))
    return (height, width), fitted, notes


def voc_xml(file_name, size, boxes):
    """Size (H, W) and boxes as fit_boxes has them -> an annotation in VOC's form, see read_boxes."""
    rows = [f"<filename>{escape(file_name)}</filename>", f"<size><width>{size[1]}</width><height>{size[0]}</height>"
            "<depth>3</depth></size>"]
    rows += [f"<object><name>{escape(name)}</name><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax>"
             f"<ymax>{y1}</ymax></bndbox></object>" for name, x0, y0, x1, y1 in boxes]
    return "\n".join(["<annotation>", *rows, "</annotation>"]) + "\n"


def lay_out(voc, source, lists, texts, images):
    """Writes VOC2012: import.json (source), lists {split: ids}, texts {name: content}, images {name: file}.

    A second run adds what is missing, also to lists, where deleted ids stay deleted. Raises BadInput where other files
    than the export's would be mixed with them or overwritten, or where images of val or test, which became train.txt
    since there were no others ("alone" in source), would stay there beside images that are to train.
    """
    def write(path, text):
        with writing(path) as temporary:
            Path(temporary).write_text(text, encoding="utf-8", newline="\n")

    record = voc / "import.json"
    try:
        there = json.loads(read_text(record)) if record.exists() else {}
        if not there and voc.exists() and any(path.suffix != ".tmp" for path in voc.iterdir()):
            raise BadInput(f"{voc}: holds data that this command has not made: name another --data")
        trained = voc / "ImageSets" / "Segmentation" / "train.txt"
        held_out = {i for split, ids in lists.items() if split != "train" for i in ids}
        mixed = held_out and trained.exists() and not held_out.isdisjoint(read_list(trained))
        before = there.get("alone", "val or test" if mixed else source["alone"])    # older records do not say
        if there and before != source["alone"]:
            raise BadInput(f"{voc}: its train.txt was made from images of one list alone, which the export calls "
                           f"{before or source['alone']}, and now there are others: name another --data, or delete it")
        for key in set(there) & set(source):
            if there[key] != source[key]:
                raise BadInput(f"{voc}: made from other {key} ({there[key]}): name another --data, or delete it")
        same = {name: read_text(voc / name) == text for name, text in texts.items() if (voc / name).exists()}
        same |= {name: filecmp.cmp(voc / name, file) for name, file in images.items() if (voc / name).exists()}
        other = [name for name in same if not same[name]]
        if other:
            raise BadInput(f"{voc / other[0]}" + f" (and {len(other) - 1} more)" * (len(other) > 1) + ": not as the "
                           f"export has it now: name another --data, or delete {voc}; if you corrected it there, leave "
                           "out --coco, --yolo and --images")
        write(record, json.dumps(source, indent=1) + "\n")  # first: it says that what follows is this export's
        (voc / "JPEGImages").mkdir(exist_ok=True)
        for split, ids in lists.items():  # before the annotations, whose absence tells the next run what is new
            path = voc / "ImageSets" / "Segmentation" / f"{split}.txt"
            old = read_list(path) if path.exists() else []
            known = set(old)
            new = [i for i in ids if i not in known and not (voc / "Annotations" / f"{i}.xml").exists()]
            if old + new:                 # none: somebody deleted the list, of images that are there
                write(path, "\n".join(old + new) + "\n")
        for name, image in images.items():
            if not (voc / name).exists():
                try:
                    os.link(os.path.realpath(image), voc / name)
                except OSError:  # another disk, or one without hard links
                    with writing(voc / name) as temporary:
                        shutil.copy2(image, temporary)
        for name, text in texts.items():
            if not (voc / name).exists():
                write(voc / name, text)
    except (OSError, json.JSONDecodeError) as error:
        raise BadInput(f"{voc}: cannot be written or read ({error}): name another --data") from None


def is_id(name):
    """Whether lists can have an image of this name: not of over 230 bytes, say, or with a colon, as in 1:30."""
    try:
        return name.isprintable() and image_id(name, "") == name
    except BadInput:
        return False


def name_images(found, notes, failed):
    """[(image, ...), ...] -> {id: (image, ...)}; those that share an id go to failed, what is worth saying to notes."""
    ids = {}
    for entry in found:
        parts = [part for part in entry[0].with_suffix("").parts if part != "images"] or ["images"]
        name = re.sub(r"\s+", "_", "_".join(parts))
        if Path(name).suffix.lower() in ENDINGS:  # of a.jpg.jpg: lists leave an ending away
            name = "_".join(name.rsplit(".", 1))
        ids.setdefault(name, []).append(entry)
    for name, entries in ids.items():
        if len(entries) > 1 or not is_id(name):
            paths = sorted({str(path) for path, *_ in entries})
            failed.update(dict.fromkeys(paths, "annotated twice" if len(paths) < len(entries) else
                                        f"{name!r} cannot be the id of {' and '.join(paths)}: rename them"))
    ids = {name: entries[0] for name, entries in ids.items() if str(entries[0][0]) not in failed}
    renamed = [f"{path} -> {name}" for name, (path, *_) in ids.items() if name != path.stem]
    notes["ids with underscores for folders and spaces (" + "".join(renamed[:1]) + ")"] += len(renamed)
    return ids


def import_boxes(data, images, coco=None, yolo=None, names_file=None, crowds=False, workers=None):
    """Lays out data/VOC2012 from an export, and prints what is in it -> ["image: why it is left out", ...]."""
    voc = Path(data) if Path(data).name == "VOC2012" else Path(data) / "VOC2012"
    folder, notes, failed = Path(os.path.abspath(images)), Counter(), {}
    if not folder.is_dir():
        raise BadInput(f"no folder --images {images}: expected the images that were annotated")
    if voc != Path(data) and (Path(data) / "JPEGImages").is_dir() or folder.is_relative_to(os.path.abspath(voc)):
        raise BadInput(f"--data {data}: holds images that were there before: name another folder, that is still to be "
                       "made")
    below = files_below(folder)
    earlier = {path.parent for path in below if path.parts[-2:] == ("VOC2012", "import.json")}  # other imports' --data
    files = [path for path in below if path.suffix.lower() in ENDINGS
             and earlier.isdisjoint(path.parents) and not (folder / path).is_relative_to(os.path.abspath(voc))]
    if coco:
        wanted = names_file and tidy_names([line for line in read_text(names_file).splitlines() if line.strip()
                                            and not no_class(line.strip())], names_file)
        names, found = read_coco_export(coco, folder, files, wanted, crowds, notes, failed)
    else:
        names, found = read_yolo_export(yolo, folder, files, names_file, notes, failed)

    ids, fitted, lists, turned = name_images(found, notes, failed), {}, {}, []
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        jobs = {i: pool.submit(fit_boxes, folder / path, *rest) for i, (path, _, *rest) in ids.items()}
        for image_id, job in tqdm(jobs.items(), "images", unit="image", disable=None):
            try:
                size, boxes, noted = job.result()
            except BadInput as error:  # one bad image does not stop the others
                failed[str(ids[image_id][0])] = str(error)
                continue
            notes.update(noted)
            turned += [str(ids[image_id][0])] * noted[PERHAPS_TURNED]
            notes["images without a box left out"] += not boxes
            if boxes:
                fitted[image_id] = size, boxes
    finally:
        pool.shutdown(cancel_futures=True)
    for image_id in fitted:  # ids {id: (image, split, stated size, boxes)}; fitted {id: (size, boxes)}
        lists.setdefault(ids[image_id][1] or "train", []).append(image_id)
    alone = "".join(lists) if len(lists) == 1 and "train" not in lists else ""
    lists = {"train": lists[alone]} if alone else lists
    failures = sorted(f"{image}: {' '.join(why.split())}" for image, why in failed.items())
    for note, count in notes.items():
        if count:
            print(f"{count} {note}" + f" ({', '.join(turned[:5])})" * (note == PERHAPS_TURNED))
    if "train" not in lists:
        raise BadInput(f"{'--yolo' if yolo else '--coco'} {yolo or coco[0]}: no image to train on"
                       + f", all are in {' and '.join(f'{split}.txt' for split in lists)}" * bool(lists)
                       + "".join(f"; {why}" for why in failures[:1]))

    source = {"boxes": [os.path.abspath(path) for path in coco or [yolo]], "images": str(folder), "alone": alone}
    texts = {"class_names.txt": "\n".join(["background", *names]) + "\n"}
    texts |= {f"Annotations/{i}.xml": voc_xml(ids[i][0].name, *boxes) for i, boxes in fitted.items()}
    endings = {i: path.suffix if path.suffix.isupper() else path.suffix.lower() for i, (path, *_) in ids.items()}
    lay_out(voc, source, lists, texts, {f"JPEGImages/{i}{endings[i]}": folder / ids[i][0] for i in fitted})
    for split, members in lists.items():
        print(f"{split}.txt: {len(members)} images, {sum(len(fitted[i][1]) for i in members)} boxes")
    counts = Counter(name for _, boxes in fitted.values() for name, *_ in boxes)
    print(f"{len(names)} classes, boxes of each: " + ", ".join(f"{name} {counts[name]}" for name in names))
    return failures


def draw_sheet(voc, ids, folders, path, annotated=True):
    """What to look at before training, as one image at path: a row for each id, image with its boxes | B | M."""
    names, rows = class_names(voc), []
    for image_id in ids:
        image = read_image(find_image(Path(voc) / "JPEGImages", image_id))
        size, scale = image.shape[:2], min(240 / image.shape[0], 960 / image.shape[1])
        panels = [image]
        for folder in folders:
            labels = read_label(folder / f"{image_id}.png", size, len(names))
            panels.append((0.4 * image + 0.6 * np.where(labels[..., None], voc_palette()[labels], 0)).astype(np.uint8))
        panels = [cv2.resize(panel, [max(1, round(scale * side)) for side in size[::-1]]) for panel in panels]
        xml = Path(voc) / "Annotations" / f"{image_id}.xml"
        boxes, classes = read_boxes(xml, names, size) if annotated else ([], [])
        for k in larger_first(boxes):
            x0, y0, x1, y1 = (round(scale * int(edge)) for edge in boxes[k])
            colour, words = voc_palette()[classes[k]].tolist(), names[classes[k]].encode("ascii", "replace").decode()
            cv2.rectangle(panels[0], (x0, y0), (x1 - 1, y1 - 1), colour, 2)
            for thick, ink in ((4, (255, 255, 255)), (1, colour)):  # OpenCV's fonts know ASCII alone
                cv2.putText(panels[0], words, (x0 + 5, y0 + 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, ink, thick, cv2.LINE_AA)
        rows.append(np.hstack(panels))
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 4), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    with writing(path) as temporary:
        Image.fromarray(np.vstack(rows)).save(temporary, "PNG")


# ---------------------------------------------------------------- command line
def parse_arguments():
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    add = parser.add_argument
    add("--data", default="VOCdevkit", help="the VOCdevkit, or the VOC2012 folder in it (default: VOCdevkit)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--split", help="a list in ImageSets/Segmentation (default: trainaug where it exists (paper), "
                       "otherwise train)")
    which.add_argument("--list", metavar="FILE", help="image ids, one a line, instead of --split")
    add("--shard", metavar="I/N", default="1/1", help="only the I-th of N equal parts of the list, to share it among "
        "machines that see one disk (default: 1/1)")
    add("--out", metavar="DIR", help="where BoxMasks/ and GrabCutMasks/ go (default: beside SegmentationClass)")
    add("--workers", type=int, metavar="N", help="images cut at a time, each on one core (default: as many as cores); "
        "each takes up to 0.6 GB, more with a --working-size above 1500")
    add("--fill-rates", metavar="NAME", help="also write the filling rates (Eq. 7) of images and classes to NAME.json, "
        "and a figure like Fig. 2 to NAME.png")
    cut = parser.add_argument_group("GrabCut (one run per box: paper)")
    cut.add_argument("--iterations", type=int, default=GRABCUT["iterations"], help="at most this many "
                     "iterations of GrabCut (default: %(default)s, ours)")
    cut.add_argument("--margin", type=float, default=GRABCUT["margin"], help="width of the band around the box from "
                     "which the background is learnt, in box widths and heights (default: %(default)s, ours)")
    cut.add_argument("--working-size", type=int, default=GRABCUT["working_size"], help="box and margin are scaled down "
                     "to an area of at most this many pixels squared, except for the last iteration (default: "
                     "%(default)s, ours)")
    cut.add_argument("--min-fill", type=float, default=GRABCUT["min_fill"], help="where GrabCut keeps less than this "
                     "part of a box, it starts again from an ellipse in the middle (default: %(default)s, ours)")
    cut.add_argument("--colours", choices=("lab", "rgb"), default=GRABCUT["colours"], help="space of the colour models "
                     "(default: %(default)s, ours)")
    cut.add_argument("--share", action=argparse.BooleanOptionalAction, default=True, help="other boxes of the same "
                     "class are probable foreground (default: on, ours); --no-share: background")
    source = parser.add_argument_group("boxes")
    source.add_argument("--boxes", choices=("annotation", "detector"), default="annotation", help="from Annotations/ "
                        "(default, paper) or from a COCO detector (paper: GrabCut-NoTrain-Det), whose labels go to "
                        "BoxMasks-detector/ and GrabCutMasks-detector/")
    source.add_argument("--detector", metavar="NAME", default="fasterrcnn_resnet50_fpn_v2", help="which one of "
                        "torchvision's (default: fasterrcnn_resnet50_fpn_v2, ours; the paper used SNIPER)")
    source.add_argument("--detector-weights", metavar="FILE", help="state dict (default: torchvision's, downloaded)")
    source.add_argument("--score-threshold", type=float, default=0.5, help="a detection counts from this score on "
                        "(default: 0.5, ours)")
    source.add_argument("--device", default="cpu", help="where the detector runs; GrabCut runs on the CPU "
                        "(default: cpu)")
    own = parser.add_argument_group("boxes of one's own, laid out in VOC's form in --data")
    form = own.add_mutually_exclusive_group()
    form.add_argument("--coco", nargs="+", metavar="PATH", help="COCO's JSON files, or the folder of an export that "
                      "has them (CVAT, Label Studio, Roboflow, labelme)")
    form.add_argument("--yolo", metavar="DIR", help="YOLO's label files: boxes, outlines or rotated boxes")
    own.add_argument("--images", metavar="DIR", help="the images, in sub-folders or not; they are linked or copied")
    own.add_argument("--class-names", metavar="FILE", help="with --yolo data.yaml, obj.names or classes.txt (default: "
                     "the one there or above it); with --coco the classes to take, one a line (default: all)")
    own.add_argument("--crowds", action="store_true", help="take COCO's boxes with iscrowd 1, too")
    own.add_argument("--show", type=int, metavar="N", help="write sheet.png beside BoxMasks/: N images with their "
                     "boxes, B and M (default: 12 for --coco and --yolo, otherwise 0)")
    one = parser.add_argument_group("one image")
    one.add_argument("--image", metavar="FILE", help="show the mask of one box: writes FILE_grabcut.png beside it")
    one.add_argument("--box", type=int, nargs=4, metavar=("X0", "Y0", "X1", "Y1"), help="its pixels, from 0, X1 and Y1 "
                     "not included")
    arguments = parser.parse_args()
    if (arguments.image is None) != (arguments.box is None):
        parser.error("--image and --box go together")
    own_boxes = bool(arguments.coco or arguments.yolo)
    if own_boxes != bool(arguments.images) or arguments.class_names and not own_boxes:
        parser.error("--images DIR goes with --coco or --yolo, and --class-names with both")
    changed = {name for name, value in vars(arguments).items() if value != parser.get_default(name)}
    for here, idle, why in (
            (arguments.boxes == "annotation", {"detector", "detector_weights", "score_threshold", "device"},
             "only with --boxes detector"),
            (not arguments.coco, {"crowds"}, "only with --coco"),
            (arguments.image, {"split", "list", "shard", "workers", "fill_rates", "share", "boxes", "coco",
                               "yolo", "images", "show"}, "not with --image, which is one image and one box")):
        if here and changed & idle:
            named = " ".join("--" + name.replace("_", "-") for name in sorted(changed & idle))
            parser.error(f"{named.replace('--share', '--no-share')}: {why}")
    if arguments.fill_rates and arguments.shard != "1/1":
        parser.error("--fill-rates is of the whole list: give it once all parts are made, without --shard")
    if arguments.show is None:
        arguments.show = 12 * own_boxes
    if arguments.show < 0:
        parser.error("--show: expected 0 or more")
    if arguments.iterations < 1 or arguments.working_size < 8 or (
            arguments.workers is not None and arguments.workers < 1):
        parser.error("--iterations, --workers: expected at least 1; --working-size: at least 8")
    if not (0 < arguments.margin < 100 and 0 <= arguments.min_fill <= 1 and 0 <= arguments.score_threshold <= 1):
        parser.error("--margin: expected more than 0 and less than 100; --min-fill, --score-threshold: 0 to 1")
    return arguments


def main():
    arguments = parse_arguments()
    options = {key: getattr(arguments, key) for key in ("iterations", "margin", "working_size", "min_fill", "colours")}
    if arguments.image:
        path, rate, why = show_mask(arguments.image, arguments.box, arguments.out, **options)
        print(f"{path}: filling rate {rate:.3f}" + (f" (not at the first attempt: {why})" if why else ""))
        return 0

    left_out = []
    if arguments.images:
        left_out = import_boxes(arguments.data, arguments.images, arguments.coco, arguments.yolo,
                                arguments.class_names, arguments.crowds, arguments.workers)
    voc = find_voc(arguments.data)
    if arguments.fill_rates:
        keep_apart([], [voc / "JPEGImages"], [Path(f"{arguments.fill_rates}.{ending}") for ending in ("json", "png")])
    lists = voc / "ImageSets" / "Segmentation"
    split = arguments.split or ("trainaug" if (lists / "trainaug.txt").exists() else "train")
    path = Path(arguments.list) if arguments.list else lists / f"{split}.txt"
    ids = take_shard(read_list(path), arguments.shard)
    detect = None
    if arguments.boxes == "detector":
        detect = make_detector(class_names(voc), arguments.detector, arguments.detector_weights, arguments.device,
                               arguments.score_threshold)
    folders = label_paths(voc, arguments.out, detect is not None)
    print(f"{len(ids)} images of {path} -> {folders[0]}, {folders[1]}")
    summary = make_labels(voc, ids, arguments.out, arguments.workers, detect, share=arguments.share, **options)

    failures, fallbacks = summary["failures"], summary["fallbacks"]
    print(f"made {summary['made']}, already there {summary['skipped']}, failed {len(failures)}")
    if summary["boxes"]:
        reasons = ", ".join(f"{why}: {count}" for why, count in sorted(fallbacks.items()))
        total = sum(fallbacks.values())
        print(f"{summary['boxes']} boxes, {total} not at the first attempt ({100 * total / summary['boxes']:.1f} %)"
              + (f": {reasons}" if reasons else ""))
    if summary["made"] and (without := [name for name in class_names(voc)[1:] if name not in summary["classes"]]):
        print(f"no box of {', '.join(without)}" + " among those made now" * bool(summary["skipped"]))
    made = [i for i in ids if all((folder / f"{i}.png").exists() for folder in folders)
            and not any(failure.startswith(f"{i}: ") for failure in failures)
            ] if arguments.fill_rates or arguments.show else []
    if arguments.fill_rates:
        table = fill_rate_table(folders, made, class_names(voc))
        with writing(f"{arguments.fill_rates}.json") as temporary:
            Path(temporary).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        with writing(f"{arguments.fill_rates}.png") as temporary:
            Image.fromarray(draw_fill_rates(table)).save(temporary, "PNG")
        print(f"filling rates: {arguments.fill_rates}.json, {arguments.fill_rates}.png")
    if arguments.show and made:
        count = min(arguments.show, len(made))
        sheet = folders[0].parent / "sheet.png"
        draw_sheet(voc, [made[i * len(made) // count] for i in range(count)], folders, sheet, detect is None)
        print(f"look at {sheet}: each image with its boxes, B and M")
    if arguments.images:
        no_val = " --val-split none" if (lists / "val.txt").exists() else ""  # val.txt without true masks
        labels = f" --label-dir {arguments.out}" if arguments.out else ""
        print(f"then: python train_box2seg.py --data {arguments.data}{labels}{no_val} --out runs/mine")
        print(f"  or: python train_boxsup.py --data {arguments.data}{no_val} --out runs/mine")
    if left_out:
        print(f"{len(left_out)} images of the export were left out; fix them and run again to add them:",
              *shortened(left_out), sep="\n  ", file=sys.stderr)
    if failures:
        print(f"{len(failures)} of {len(ids)} images got no labels; fix them or take them off the list and run again:",
              *shortened(failures), sep="\n  ", file=sys.stderr)
    return 1 if failures or left_out else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that a pipe's encoding lacks, on Windows
    try:
        sys.exit(main())
    except BadInput as error:
        print(f"grabcut_labels.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("grabcut_labels.py: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
