"""
Scores predictions against the ground-truth masks of a VOC devkit, as in the tables of both papers.

Box2Seg (Kulharia et al., ECCV 2020) Sect. 4.2, Tables 1 and 2, and BoxSup (Dai et al., ICCV 2015) Sect. 5 report the
mean intersection over union (mIoU) on VOC 2012's val, 1449 images. As in the benchmark, there is one confusion matrix
for the pixels of *all* images, at their original resolution, without pixels whose ground truth is 255 (the border
around objects); IoU per class from that matrix; then the mean over classes, background included.

Run:    python evaluate.py --data VOCdevkit --checkpoint runs/box2seg/last.pt
        python evaluate.py --data VOCdevkit --labels VOCdevkit/VOC2012/GrabCutMasks     (the row GrabCut-NoTrain-GT)
        python evaluate.py --checkpoint runs/box2seg/last.pt --crf                      (Box2Seg (C): 74.9 -> 76.4)
        python evaluate.py --checkpoint runs/boxsup/last.pt --crf-search --list held_out.txt   (its parameters)
        python evaluate.py --checkpoint runs/box2seg/last.pt --images holiday --out holiday_labels
        python evaluate.py --checkpoint runs/box2seg/last.pt --trimap-plot fig4.png             (BoxSup's Fig. 4)
        python evaluate.py --checkpoint runs/box2seg/last.pt --attention fig4 --affinity fig5   (Box2Seg's Fig. 4, 5)
        python evaluate.py --labels VOCdevkit/VOC2012/BoxMasks --against VOCdevkit/VOC2012/GrabCutMasks
Reads:  VOC2012/JPEGImages/<id>.jpg (or .png, .webp, ...), and the truth SegmentationClass/<id>.png
        (SegmentationClassAug where it has none) for the ids of ImageSets/Segmentation/val.txt (--split, --list);
        class_names.txt where there is one; a checkpoint of train_box2seg.py or train_boxsup.py, or label PNGs: 8-bit
        palette PNG, class index per pixel, the image's size
Writes: the table, to the terminal. If asked: --json FILE, {"miou": 0..1, "iou": {name: 0..1, or null for a class that
        the truth lacks}, "images": n, "classes_present": k, "pixel_accuracy": 0..1, "failed": [ids]};
        with --trimap also "trimap": {"widths": [pixels], "boundary", "interior": [mIoU 0..1, null: no pixel there],
        "interior_classes": [how many are left there], "share": [of the pixels, in the band, 0..1]};
        with --crf-search instead a list of {"miou", "w", "xy", "rgb", ...}, best first;
        --trimap-plot FILE; --save-png DIR, a label PNG per id; --pictures DIR, --attention DIR, --affinity DIR,
        <id>.png strips and all of them in sheet.png;
        with --images, a label PNG per image and the image under its labels in overlay/, below --out
Expect: the paper's Box2Seg reaches 74.9 (Table 3), its GrabCut labels on the annotated boxes 71.6 (Sect. 4.2).
        Exit status 0; 1 if some images could not be read (they are listed and left out); 2 if nothing could be done.
"""
import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import struct
import sys
import threading
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from crf import BadInput as BadKernel
from crf import ITERATIONS, PRESETS, as_tensor, crf_kernels, dense_crf, drawable, mean_field, unary_energy
from losses import affinity, confusion_matrix, iou
from model import BadInput as BadModel
from model import load_network, normalize, out_of_memory, pick_device, predict, resized, to_pixels


# ----------------------------------------------------------------------------------------------------------------------
# predictions

def load_checkpoint(args):
    """--checkpoint -> (network in eval mode, class names); sets --scales, where it is not given, to what the network
    was validated at in its training (--val-scale: 1, but for --recipe photos 0.7)."""
    network, saved = load_network(args.checkpoint, args.device)
    if args.scales is None:
        args.scales = [saved.get("args", {}).get("val_scale", 1.0)]
        if args.scales != [1.0]:
            print(f"images go through the network at scale {args.scales[0]:g}, as in its training (--scales)")
    return network.to(memory_format=torch.channels_last), saved["class_names"]


def autocast(args):
    """Mixed precision where --amp asks for it; predict() takes its softmax in float32 all the same."""
    native = args.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    amp = ("bf16" if native else "off") if args.amp == "auto" else args.amp
    return torch.autocast(args.device.type, torch.float16 if amp == "fp16" else torch.bfloat16, enabled=amp != "off")


def class_probabilities(network, image, args):
    """(H, W, 3) uint8 RGB -> (C, H, W) float32 on the network's device."""
    with autocast(args):
        return predict(network, image, args.scales, args.flip)


def most_probable(image, probabilities, crf=None):
    """(C, H, W) -> (H, W) uint8, the most probable class of each pixel; after the dense CRF, if crf has its options."""
    if crf:
        probabilities = dense_crf(image, probabilities, **crf)
    return probabilities.max(0).indices.byte().cpu().numpy()    # argmax(0) takes several times as long on a CPU


def crf_options(network, args):
    """--crf and its kin -> options of dense_crf(), or None."""
    if not (args.crf or args.crf_search):
        return None
    if args.crf_backend == "pydensecrf" and not importlib.util.find_spec("pydensecrf"):
        raise BadInput("--crf-backend pydensecrf is not installed: pip install pydensecrf2, or leave the flag out")
    preset = args.crf
    if preset in (None, "auto"):
        vgg16 = "vgg16" if network.arch.get("large_fov") else "vgg16-plain"
        preset = vgg16 if network.arch["network"] == "DeepLabVGG16" else "resnet101"
    given = {key: value for key, value in (("w", args.crf_w), ("xy", args.crf_xy), ("rgb", args.crf_rgb)) if value}
    return PRESETS[preset] | given | {"iterations": args.crf_iterations, "backend": args.crf_backend}


def crf_workers(args):
    """How many processes refine predictions: a CRF on the CPU uses one core, one on a GPU has the GPU to itself."""
    return args.workers if args.crf and args.device.type == "cpu" else 0


# ==== shared block "worker processes": equal to the byte in evaluate.py and mcg_candidates.py
def one_core():
    """Start of a worker process: one thread, deaf to Ctrl-C (the first process hears it), and never left behind."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    first = multiprocessing.parent_process()
    threading.Thread(target=lambda: (first.join(), os._exit(1)), daemon=True).start()


def process_pool(workers, preload):
    """Workers of one core each: forks of a fresh process, which has loaded these modules at most, since a fork of one
    in which torch's threads or CUDA have run may hang."""
    context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    if sys.platform == "linux":                         # macOS may not like what torch loads to be forked
        context.set_forkserver_preload(preload)         # once, and not by each worker
    if sys.platform == "win32":
        workers = min(workers, 61)                      # Windows cannot wait for more
    return ProcessPoolExecutor(workers, context, one_core)
# ==== end of shared block


def read_ahead(ids, read):
    """For each id, the id and a function that gives read(id) or raises. A thread reads a few ids ahead, so that a GPU
    does not wait for files."""
    with ThreadPoolExecutor(1) as reader:
        waiting = deque()
        for name in ids:
            waiting.append((name, reader.submit(read, name).result))
            if len(waiting) > 4:
                yield waiting.popleft()
        yield from waiting


def in_order(ids, read, prepare, work, workers):
    """For each id, the id and a function that gives work(*prepare(*read(id))) or raises.

    With workers, work runs in so many processes of one core each, a few ids ahead: a CRF takes longer than a network.
    """
    if not workers:
        for name, loaded in read_ahead(ids, read):
            yield name, lambda: work(*prepare(*loaded()))
        return

    def ended(name, job):                               # waits for the job
        if isinstance(job.exception(), BrokenProcessPool):      # no fault of the image: all that follow would fail, too
            raise BadInput("a worker was killed, perhaps for want of memory: give fewer --workers")
        return name, job.result

    with process_pool(workers, ["torch", "torchvision"]) as pool:
        waiting = deque()
        for name, loaded in read_ahead(ids, read):
            try:
                # As arrays, through a pipe: tensors go through /dev/shm, which is full at 64 MB in a container.
                job = pool.submit(work, *map(np.asarray, prepare(*loaded())))
            except Exception as error:
                job = Future()
                job.set_exception(error)
            waiting.append((name, job))
            if len(waiting) > workers:
                yield ended(*waiting.popleft())
        yield from itertools.starmap(ended, waiting)


def read_prediction(path, size, num_classes):
    """A label PNG that stands for a prediction: (H, W) uint8, where 255 will not do."""
    labels = read_label(path, size, num_classes)
    if (labels == 255).any():
        raise BadInput(f"{path}: holds 255 (ignore), but a prediction names a class for each pixel: 0 is background")
    return labels


# ----------------------------------------------------------------------------------------------------------------------
# the score

def image_path(voc, name):
    return find_image(voc / "JPEGImages", name)


def truth_path(voc, name, against=None):
    """The official mask; that in SegmentationClassAug for SBD's extra images, which have none; or --against's label."""
    if against:
        return against / f"{name}.png"
    official, extra = (voc / folder / f"{name}.png" for folder in ("SegmentationClass", "SegmentationClassAug"))
    return extra if extra.is_file() and not official.is_file() else official


def require(paths, what):
    """All files there, before hours of work begin; otherwise one line with the first of those that are not."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        others = f" (nor {len(missing) - 1} others of the list)" if len(missing) > 1 else ""
        raise BadInput(f"no {what} {missing[0]}{others}: add it, or take its id off the list")


def score(confusion, names):
    """A confusion matrix (C, C) -> what --json holds, but for the images' part."""
    per_class = iou(confusion)                                                      # (C,), nan: not in the truth
    return {"miou": per_class.nanmean().item(),
            "iou": {name: None if math.isnan(value) else value for name, value in zip(names, per_class.tolist())},
            "classes_present": int((~per_class.isnan()).sum()),
            "pixel_accuracy": (confusion.diagonal().sum() / confusion.sum()).item()}


# The head of the paper's Table 2, whose order is that of VOC's class indices.
SHORT = {"background": "bkg", "aeroplane": "aero", "bicycle": "bike", "diningtable": "table", "motorbike": "mbike",
         "pottedplant": "plant", "tvmonitor": "tv"}


def table(result):
    """The paper's Table 2, in percent, folded into lines of at most 11 columns; a dash: not in the truth."""
    percent = lambda value: "-" if value is None else f"{100 * value:.1f}"
    cells = [(SHORT.get(name, name), percent(value)) for name, value in result["iou"].items()]
    cells.append(("mIoU", percent(result["miou"])))
    width = max(6, max(len(name) for name, _ in cells))
    lines = []
    for start in range(0, len(cells), 11):
        for row in zip(*cells[start:start + 11]):
            lines.append("  ".join(f"{cell:>{width}}" for cell in row))
        lines.append("")
    lines.append(f"mIoU {percent(result['miou'])} % over {result['classes_present']} of {len(result['iou'])} classes, "
                 f"pixel accuracy {percent(result['pixel_accuracy'])} %, {result['images']} images")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# the trimap of BoxSup's error analysis (Sect. 5.1, Fig. 4): does a network err at the borders of objects, or within?

# PAPER SILENT: the band widths of BoxSup's Fig. 4, and whether a width counts one side of the boundary or both; these,
# in pixels to either side, up to the 40 of DeepLab's analysis, which BoxSup follows.
WIDTHS = (2, 4, 8, 16, 24, 32, 40)


def boundary_distance(truth):
    """(H, W) labels -> (H, W) float32, pixels to the nearest one of another label: 1 at a boundary, inf: no other."""
    # PAPER SILENT: where a boundary lies in BoxSup's trimap, since VOC's truth has a rim of 255 between object and
    # background. Here 255 is a label like others, so that bands start on both sides of the rim; without a rim, between
    # the two classes. Small bands that started in the middle of the rim would hold no scored pixel.
    distance = np.full(truth.shape, np.inf, np.float32)
    for c in np.unique(truth):
        here = truth == c
        if not here.all():                              # the image's own edge is no boundary
            inside = cv2.distanceTransform(here.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
            distance[here] = inside[here]
    return distance


def trimap_scores(confusion, bands):
    """Confusion matrix of all pixels, and {width: that of its band} -> what --json holds under "trimap"."""
    def miou(matrix):
        value = iou(matrix).nanmean().item()
        return None if math.isnan(value) else value                                 # nan: no pixel

    interiors = [confusion - band for band in bands.values()]                       # all that the band leaves
    return {"widths": list(bands), "boundary": [miou(band) for band in bands.values()],
            "interior": [miou(interior) for interior in interiors],
            "interior_classes": [int((interior.sum(1) > 0).sum()) for interior in interiors],
            "share": [(band.sum() / confusion.sum()).item() for band in bands.values()]}


def trimap_table(trimap):
    percent = lambda values: ["-" if value is None else f"{100 * value:.1f}" for value in values]
    rows = [("band, pixels each side", trimap["widths"]), ("in the band, % of pixels", percent(trimap["share"])),
            ("boundary mIoU", percent(trimap["boundary"])), ("interior mIoU", percent(trimap["interior"])),
            ("over so many classes", trimap["interior_classes"])]
    return "\n".join(f"{title:24}" + "".join(f"{cell:>7}" for cell in cells) for title, cells in rows)


def read_trimap(path):
    """The trimap scores in a file that --json wrote."""
    try:
        trimap = json.loads(read_text(path))["trimap"]
        trimap = {key: trimap[key] for key in ("widths", "boundary", "interior")}
        for w, *values in zip(*trimap.values(), strict=True):
            if not (w > 0 and all(value is None or 0 <= value <= 1 for value in values)):
                raise ValueError
        return trimap
    except (BadInput, ValueError, KeyError, TypeError):
        raise BadInput(f"{path}: holds no trimap scores: write it with evaluate.py --trimap --json {path}") from None


# ----------------------------------------------------------------------------------------------------------------------
# figures

PANEL = 240                                             # height of a panel in pixels
INK, PAPER = (40, 40, 40), (255, 255, 255)


def colour_of(labels):
    """(...) class indices -> (..., 3) uint8 RGB: VOC's colours made brighter, for some are nearly black."""
    return np.minimum(voc_palette()[labels] * 1.1 + 40, 255).astype(np.uint8)


def grey(image):
    return image.mean(axis=2, keepdims=True).repeat(3, axis=2)                      # (H, W, 3) float


def overlay(image, labels):
    """Classes in colour over the image in dark grey; what is ignored (255) in near white. (H, W, 3) uint8 RGB."""
    strength = np.where(labels == 0, 0, 0.7)[..., None]                             # (H, W, 1)
    return ((1 - strength) * 0.6 * grey(image) + strength * colour_of(labels)).round().astype(np.uint8)


def classes_in(*labels):
    return set(np.concatenate([one.ravel() for one in labels]).tolist()) - {0, 255}


def attention_of(network, image, args):
    """alpha (Sect. 3.1) at the image's own resolution, seen at the first of --scales: (L, H, W) numpy, class c at
    c - 1."""
    with torch.inference_mode(), autocast(args):
        x = normalize(torch.from_numpy(image)[None].to(args.device))
        _, logits, _ = network.branches(resized(x, args.scales[0], network))
        return to_pixels(logits, x.shape[2:])[0].sigmoid().cpu().numpy()


def attention_overlay(image, alpha, truth, boxes):
    """alpha of the classes that are in the image, each in its colour: how strong is how bright. (H, W, 3) uint8 RGB.

    Eq. 3 trains alpha_c where B is c and nowhere else. So other classes are left out, and what lies outside of the
    boxes too, where the box labels are at hand.
    """
    picture = 0.35 * grey(image)
    for c in sorted(classes_in(truth)):
        strength = alpha[c - 1] if boxes is None else alpha[c - 1] * (boxes == c)
        picture += strength[..., None] * (colour_of(c) - picture)
    return picture.round().astype(np.uint8)


def text_width(words):
    return max(1, cv2.getTextSize(drawable(words), cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)[0][0])


def write(picture, words, x, y, colour=INK, size=0.5):
    cv2.putText(picture, drawable(words), (round(x), round(y)), cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA)


def captioned(image, caption):
    """A panel: the image at PANEL pixels of height under its caption, never so wide that two are too wide for JPEG."""
    width = min(max(1, round(image.shape[1] * PANEL / image.shape[0])), 32_000)
    shrinks = image.shape[0] > PANEL
    image = cv2.resize(image, (width, PANEL), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    bar = np.full((26, width, 3), PAPER, np.uint8)
    write(bar, caption, 2, 18, size=0.5 * min(1, (width - 4) / text_width(caption)))
    return cv2.copyMakeBorder(np.vstack([bar, image]), 0, 4, 2, 2, cv2.BORDER_CONSTANT, value=PAPER)


def side_by_side(pictures):
    """{caption: image} -> (h, w, 3) uint8 RGB."""
    return np.hstack([captioned(picture, caption) for caption, picture in pictures.items()])


def legend(present, names, width):
    """Swatches and names of the classes `present`, in as many rows as they need: (h, width, 3)."""
    rows, x = [], width
    for c in sorted(present):
        w = text_width(names[c])
        if x + w + 40 > width:
            rows.append(np.full((26, width, 3), PAPER, np.uint8))
            x = 4
        cv2.rectangle(rows[-1], (x, 5), (x + 16, 19), colour_of(c).tolist(), cv2.FILLED)
        write(rows[-1], names[c], x + 22, 18)
        x += w + 40
    return np.vstack(rows) if rows else np.empty((0, width, 3), np.uint8)


def heat(image, values):
    """values (H, W) in 0..1 as colours, blue to red, over the image in grey: (H, W, 3) uint8 RGB."""
    colours = cv2.applyColorMap((255 * values.clip(0, 1)).round().astype(np.uint8), cv2.COLORMAP_TURBO)[..., ::-1]
    return (0.45 * grey(image) + 0.55 * colours).round().astype(np.uint8)


def with_legend(panels, present, names, scale=None):
    """Panels above the names of the classes in them, and above what the colours of heat() mean, if scale says it."""
    if scale:
        panels = widened(panels, max(panels.shape[1], 420))         # the bar of colours and its words
    width = panels.shape[1]
    bar = np.full((26 if scale else 0, width, 3), PAPER, np.uint8)
    if scale:
        bar[5:20, 20:180] = heat(np.full((15, 160, 3), 128), np.tile(np.linspace(0, 1, 160), (15, 1)))
        for x, words in ((4, "0"), (186, "1"), (210, scale)):
            write(bar, words, x, 18)
    return np.vstack([panels, legend(present, names, width), bar])


def widened(picture, width):
    return cv2.copyMakeBorder(picture, 0, 0, 0, width - picture.shape[1], cv2.BORDER_CONSTANT, value=PAPER)


def save_picture(path, image):
    """(H, W, 3) uint8 RGB -> PNG or JPEG, under a temporary name first."""
    with writing(path) as temporary:
        Image.fromarray(image).save(temporary, "PNG" if path.suffix.lower() == ".png" else "JPEG", quality=95)


# Three kinds of strips. Each: image (H, W, 3); labels {"truth", "boxes", "GrabCut": (H, W), those at hand}; prediction
# (H, W) -> {caption: (H, W, 3) uint8 RGB}, what is drawn beside the image; and the classes in it, for the legend.

def comparison_strip(image, labels, prediction, network, names, args):
    """Box2Seg's Fig. 1, 6, 8: truth | B | M | prediction | attention."""
    name = args.labels.resolve().name if args.labels else "prediction"
    labels = {**labels, name + " (--labels)" * (name in labels): prediction}
    pictures = {caption: overlay(image, one) for caption, one in labels.items()}
    if getattr(network, "attention", None):
        alpha = attention_of(network, image, args)
        pictures["attention"] = attention_overlay(image, alpha, labels["truth"], labels.get("boxes"))
    return pictures, classes_in(*labels.values())


def attention_strip(image, labels, prediction, network, names, args):
    """Box2Seg's Fig. 4: truth | M in its boxes | alpha of each class that occurs in them."""
    alpha, present = attention_of(network, image, args), classes_in(*labels.values())       # (L, H, W)
    boxes = labels.get("boxes", np.zeros_like(prediction))

    def outlined(picture, c):                           # B as it is painted: a smaller box cuts into a larger one
        outlines, _ = cv2.findContours((boxes == c).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        return cv2.drawContours(picture, outlines, -1, colour_of(c).tolist(), max(1, round(image.shape[0] / PANEL)))

    pictures = {caption: overlay(image, one) for caption, one in labels.items() if caption != "boxes"}
    for c in sorted(present):
        if "GrabCut" in pictures:
            outlined(pictures["GrabCut"], c)
        pictures[f"attention: {names[c]}"] = outlined(heat(image, alpha[c - 1]), c)
    return pictures, present


def affinity_strip(image, labels, prediction, network, names, args):
    """Box2Seg's Fig. 5: truth, two pixels marked | A (Eq. 9) of one with all pixels | A of the other."""
    (caption, truth), *_ = labels.items()
    H, W = truth.shape
    if args.pixels:
        pixels = args.pixels[:2], args.pixels[2:]
        if not all(0 <= x < W and 0 <= y < H for x, y in pixels):
            raise BadInput(f"--pixels {' '.join(map(str, args.pixels))}: not in an image of {W}x{H}: choose others")
    else:                                               # deepest in the largest class, and in the background
        depth = boundary_distance(np.pad(truth, 1, constant_values=255))[1:-1, 1:-1]
        largest = max(classes_in(truth), key=lambda c: (truth == c).sum(), default=0)
        deepest = lambda c: np.argwhere((truth == c) & (depth == depth[truth == c].max()))[0, ::-1].tolist()
        pixels = deepest(largest), deepest(truth.min())
    with torch.inference_mode(), autocast(args):
        seen = resized(normalize(torch.from_numpy(image)[None].to(args.device)), args.scales[0], network)
        _, _, beta = network.branches(seen)                                                         # (1, d, h, w)
        h, w = beta.shape[2:]
        marked = torch.stack([beta[0, :, round(y / max(1, H - 1) * (h - 1)), round(x / max(1, W - 1) * (w - 1))]
                              for x, y in pixels])                                                  # (2, d)
        A = affinity(marked, beta[0].flatten(1).T).view(1, 2, h, w)
        A = to_pixels(A, (H, W))[0].cpu().numpy()                                                   # (2, H, W)

    pictures = {caption: overlay(image, truth)}
    size = max(10, round(16 * H / PANEL))
    for pixel, values, colour, word in zip(pixels, A, ((170, 0, 255), (0, 220, 0)), ("purple", "green")):
        pictures[f"affinity to {word}"] = heat(image, values)
        for picture in (pictures[caption], pictures[f"affinity to {word}"]):
            cv2.drawMarker(picture, pixel, PAPER, cv2.MARKER_CROSS, size, size // 4 + 2)
            cv2.drawMarker(picture, pixel, colour, cv2.MARKER_CROSS, size, size // 4)
    return pictures, classes_in(truth)


def save_pictures(voc, per_image, predicted, network, names, args):
    """--pictures, --attention, --affinity: a strip for each of --num-pictures images, and all of them in sheet.png."""
    if not (args.pictures or args.attention or args.affinity):
        return
    ids = [name for name in per_image if not math.isnan(per_image[name])]           # nan: no truth but 255
    count = min(args.num_pictures, len(ids))
    chosen = [ids[i * len(ids) // count] for i in range(count)]                     # evenly spread over the list
    if args.best or args.worst:
        ranked = sorted(ids, key=per_image.get)
        chosen = list(dict.fromkeys(args.best * ranked[::-1][:count] + args.worst * ranked[:count]))
    if "sheet" in chosen:
        raise BadInput("an image is named sheet, as the sheet of all figures is: leave it out, by --list")
    predicted = functools.cache(predicted)              # figures of several kinds show the same images

    for folder, strip, scale in (
            (args.pictures, comparison_strip, None),
            (args.attention, attention_strip, "attention; Eq. 3 uses it only in the boxes of its class"),
            (args.affinity, affinity_strip, "affinity to the marked pixel (Eq. 9), below 0 as 0")):
        if not folder:
            continue
        strips, everything, missing = [], set(), []
        for name in tqdm(chosen, "figures", unit="img", disable=None):
            image = read_image(image_path(voc, name))
            prediction, size = predicted(name)[1], image.shape[:2]
            against = args.against.resolve().name if args.against else "truth"
            labels = {against: read_label(truth_path(voc, name, args.against), size, len(names))}
            for kind, caption in (("BoxMasks", "boxes"), ("GrabCutMasks", "GrabCut")):
                path = (args.pseudo_label_dir or voc) / kind / f"{name}.png"
                if path.is_file():                      # grabcut_labels.py makes them for the list it is given
                    labels[caption] = read_label(path, size, len(names))
                elif strip is not affinity_strip and caption not in missing:
                    missing.append(caption)
            pictures, present = strip(image, labels, prediction, network, names, args)
            strips.append(side_by_side({f"{name}: mIoU {100 * per_image[name]:.1f}": image, **pictures}))
            save_picture(folder / f"{name}.png", with_legend(strips[-1], present, names, scale))
            everything |= present
        width = max(one.shape[1] for one in strips)
        sheet = np.vstack([widened(one, width) for one in strips])
        save_picture(folder / "sheet.png", with_legend(sheet, everything, names, scale))
        print(f"{len(chosen)} figures in {folder}, all of them in sheet.png" +
              f"; without {' and '.join(missing)}, which grabcut_labels.py makes for this list" * bool(missing))


CURVES = (40, 80, 220), (215, 40, 40), (30, 150, 60), (230, 140, 0), (140, 60, 180)     # Fig. 4: blue, red


def draw_trimap(runs, width):
    """BoxSup's Fig. 4, bottom: {name: trimap scores} -> a plot of mIoU over band width, (420, width, 3) uint8 RGB."""
    canvas = np.full((420, width, 3), PAPER, np.uint8)
    left, right, top, bottom = 60, width - 20, 36 + 22 * len(runs), 360
    scores = [100 * value for run in runs.values() for value in run["boundary"] + run["interior"] if value is not None]
    low = min(90, math.floor(min(scores) / 10) * 10)
    high = max(low + 10, math.ceil(max(scores) / 10) * 10)
    widths = sorted({w for run in runs.values() for w in run["widths"]})
    x_of = lambda w: left + w / widths[-1] * (right - left)
    y_of = lambda percent: bottom - (percent - low) / (high - low) * (bottom - top)
    for percent in range(low, high + 1, 10):
        cv2.line(canvas, (left, round(y_of(percent))), (right, round(y_of(percent))), (220, 220, 220))
        write(canvas, f"{percent:3}", left - 36, y_of(percent) + 5)
    for w in widths:
        write(canvas, str(w), x_of(w) - 5 * len(str(w)), bottom + 22)
    write(canvas, "band width, pixels to either side of the boundary", left, bottom + 46)
    write(canvas, "mIoU in %.  Solid: interior.  Dashed: boundary.", left, 20)
    for number, (name, run) in enumerate(runs.items()):
        colour = CURVES[number % len(CURVES)]
        write(canvas, name, left, 42 + 22 * number, colour)
        for key, every in (("interior", 1), ("boundary", 2)):
            points = [(x_of(w), y_of(100 * value)) for w, value in zip(run["widths"], run[key]) if value is not None]
            for x, y in points:
                cv2.circle(canvas, (round(x), round(y)), 3, colour, cv2.FILLED, cv2.LINE_AA)
            if len(points) > 1:
                x = np.arange(points[0][0], points[-1][0] + 1, 5)                   # pieces of 5 pixels
                pieces = np.stack([x, np.interp(x, *zip(*points))], 1).round().astype(int).tolist()
                for i in range(0, len(pieces) - 1, every):                          # dashed: every other one
                    cv2.line(canvas, pieces[i], pieces[i + 1], colour, 2, cv2.LINE_AA)
    return canvas


def trimap_picture(voc, name, runs, args):
    """BoxSup's Fig. 4: image | truth | boundary | interior, at the middle one of the widths; below it the plot."""
    image = read_image(image_path(voc, name))
    truth = read_label(truth_path(voc, name, args.against), image.shape[:2])
    w, white = args.trimap[len(args.trimap) // 2], np.full_like(image, 255)
    near, scored = (boundary_distance(truth) <= w)[..., None], (truth != 255)[..., None]
    row = side_by_side({name: image, "truth": overlay(image, truth), f"boundary: {w} pixels": white * near * scored,
                        "interior": white * ~near * scored})
    width = max(800, row.shape[1])
    return np.vstack([widened(row, width), draw_trimap(runs, width)])


# ----------------------------------------------------------------------------------------------------------------------
# evaluate(): a list with ground truth; predict_folder(): plain images

# what a VOC2012 folder holds, which must not be overwritten
DATA = "JPEGImages Annotations SegmentationClass SegmentationClassAug BoxMasks GrabCutMasks class_names.txt".split()


def report(error, name, failed, count):
    """Prints what is wrong with one image and adds its name to `failed`; the others go on. Raises where the image is
    not to blame: the GPU's memory is full, or all `count` images have failed."""
    if isinstance(error, torch.OutOfMemoryError):
        raise BadInput("not enough GPU memory: give smaller --scales, --amp bf16, or --device cpu") from None
    if out_of_memory(error):
        error = BadInput(f"{name}: not enough memory: give smaller --scales, or leave it out")
    error = BadInput(f"--crf: {error}") if isinstance(error, BadKernel) else error
    kind = "" if isinstance(error, BadInput) else f"{type(error).__name__}: "
    tqdm.write(f"evaluate.py: {kind}{' '.join(str(error).split())}", file=sys.stderr)
    failed.append(name)
    if len(failed) == count:
        raise BadInput(f"none of the {count} images could be used, see above") if not kind else error


def keep_labels(folders):
    """Refuses to write into labels or candidates wherever they are (--out, --label-dir): training would take what is
    written there for them."""
    for folder in filter(None, folders):
        if (folder / "source.json").exists():
            raise BadInput(f"{folder}: holds labels or candidates (source.json), which training reads: name another")


def write_json(path, content):
    with writing(path) as temporary:
        Path(temporary).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def finish(failed):
    """A long job's end: what was left out, and the exit status."""
    if failed:
        print(f"evaluate.py: {len(failed)} images were left out (see above): {' '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def refine_labels(truth, image, probabilities, crf):
    """-> truth as it is, prediction: (H, W) uint8."""
    return truth, most_probable(image, probabilities, crf)


def evaluate(args):
    """Predictions of a network, or label PNGs, against a list's truth: prints the table, returns the exit status."""
    voc = find_voc(args.data)
    names = class_names(voc)
    if args.against and not args.split and not args.list:
        pngs = (path.relative_to(args.labels) for path in args.labels.rglob("*.png") if not path.name.startswith("._"))
        ids = sorted(path.with_suffix("").as_posix() for path in pngs if (args.against / path).is_file())
        if not ids:
            raise BadInput(f"{args.labels} and {args.against} have no PNG of one name: give folders of label PNGs")
    else:
        ids = read_list(args.list or voc / "ImageSets" / "Segmentation" / f"{args.split or 'val'}.txt")
    curve = lambda path: "/".join(Path(path).parts[-2:])                            # its name in the plot
    others = {curve(path): read_trimap(path) for path in args.trimap_add}
    own = curve(args.json or args.checkpoint or args.labels)
    if len({own, *others}) <= len(args.trimap_add):
        raise BadInput("--trimap-add: two curves would have the same name, their file's and its folder's: rename one")
    network = None
    if args.checkpoint:
        network, trained = load_checkpoint(args)
        for wanted, branch in ((args.attention, "attention"), (args.affinity, "embedding")):
            if wanted and not getattr(network, branch, None):
                raise BadInput(f"{args.checkpoint}: its network has no {branch} branch to draw: give one that "
                               "train_box2seg.py --loss box2seg has trained")
        if trained != names:
            raise BadInput(f"{args.checkpoint}: trained on {len(trained)} classes ({' '.join(trained)}), but {voc} has "
                           f"{len(names)} ({' '.join(names)}): give the data it was trained on")
        args.crf = crf_options(network, args)
        if args.crf_search:
            ids = sorted(random.Random(0).sample(ids, min(args.crf_search, len(ids))))
        require([image_path(voc, name) for name in ids], "image")
    else:
        require([args.labels / f"{name}.png" for name in ids], "label")
    truths = [truth_path(voc, name, args.against) for name in ids]
    require(truths, "label" if args.against else "truth")
    require_a_class(truths)
    noisy = [(args.pseudo_label_dir or voc) / kind for kind in ("BoxMasks", "GrabCutMasks")]
    drawn = noisy if args.pictures or args.attention else []
    for folder in filter(None, (args.labels, args.against, *drawn)):
        check_classes(folder, names, voc / "JPEGImages")
    given = [args.labels, args.against, args.list, *args.trimap_add, args.checkpoint and Path(args.checkpoint)]
    kinds = [*DATA, f"ImageSets/Segmentation/{args.split or 'val'}.txt"]
    folders = [args.save_png, args.pictures, args.attention, args.affinity]
    keep_apart(folders,
               given + [base / kind for base in filter(None, (voc, args.pseudo_label_dir)) for kind in kinds],
               [args.json, args.trimap_plot])
    keep_labels(folders)

    def read_labels(name):                                                          # truth and label PNG: (H, W) uint8
        truth = read_label(truth_path(voc, name, args.against), None, len(names))
        kind = read_label if args.against else read_prediction
        return truth, kind(args.labels / f"{name}.png", truth.shape, len(names))

    def read_truth_and_image(name):                                                 # (H, W), (H, W, 3), both uint8
        image = read_image(image_path(voc, name))
        return read_label(truth_path(voc, name), image.shape[:2], len(names)), image

    def add_probabilities(truth, image):                                                          # and (C, H, W)
        return truth, image, class_probabilities(network, image, args)

    if network is None:
        predicted, results = read_labels, read_ahead(ids, read_labels)
    else:
        work = (functools.partial(try_crfs, grid=crf_grid(args)) if args.crf_search else
                functools.partial(refine_labels, crf=args.crf))
        predicted = lambda name: work(*add_probabilities(*read_truth_and_image(name)))
        results = in_order(ids, read_truth_and_image, add_probabilities, work, crf_workers(args))
    if args.crf_search:
        return crf_search(results, len(ids), args)

    confusion = torch.zeros(len(names), len(names), dtype=torch.int64, device="cpu")   # rows the truth
    bands = {w: torch.zeros_like(confusion) for w in args.trimap}                   # the same inside each band
    per_image, failed = {}, []                                                      # mIoU of each; ids
    for name, result in tqdm(results, "evaluate", len(ids), unit="img", disable=None):
        try:
            truth, prediction = result()                                            # (H, W) uint8 each
        except Exception as error:                      # whatever is bad in one image does not stop the others
            if network is None:                         # seconds of work: nothing is lost by fixing the file first
                raise
            report(error, name, failed, len(ids))
            continue
        scored = np.where(prediction == 255, 255, truth)    # 255 in one of two label folders leaves a pixel out as well
        one = confusion_matrix(*(torch.from_numpy(labels).to(args.device) for labels in (prediction, scored)),
                               len(names)).cpu()
        confusion += one
        per_image[name] = iou(one).nanmean().item()
        distance = boundary_distance(truth) if bands else None
        for w, band in bands.items():
            near = distance <= w
            band += confusion_matrix(torch.from_numpy(prediction[near]), torch.from_numpy(scored[near]), len(names))
        if args.save_png:
            write_label(args.save_png / f"{name}.png", prediction)
    if confusion.sum() == 0:
        raise BadInput(f"no pixel with a truth in the {len(ids)} images from {ids[0]} to {ids[-1]}: nothing to score")

    result = {**score(confusion, names), "images": len(per_image), "failed": failed}
    if bands:
        result["trimap"] = trimap_scores(confusion, bands)
    try:                                                # a full disk may take the one or the other
        if args.json:
            write_json(args.json, result)
    finally:
        text = table(result)
        print(text.replace("pixel accuracy", "pixel agreement") if args.against else text)
        if bands:
            print("\n" + trimap_table(result["trimap"]))
    save_pictures(voc, per_image, predicted, network, names, args)
    if args.trimap_plot:
        runs = {own: result["trimap"], **others}
        save_picture(args.trimap_plot, trimap_picture(voc, next(iter(per_image)), runs, args))
    return finish(failed)


def predict_folder(args):
    """A folder of plain images without truth: label PNGs in --out, images under their labels in --out/overlay; all
    are made anew, since those that are there may be another network's."""
    if not args.images.is_dir():
        raise BadInput(f"no folder {args.images}: --images expects a folder of images")
    suffixes = *ENDINGS, ".gif", ".ppm"
    network, names = load_checkpoint(args)
    args.crf = crf_options(network, args)
    if args.list:                                       # e.g. VOC's test images, all of which lie in JPEGImages
        paths = {name: find_image(args.images, name) for name in read_list(args.list)}
        require(list(paths.values()), "image")
    else:
        there = sorted(args.images.iterdir())
        wanted = [path for path in there if path.suffix.lower() in suffixes and not path.name.startswith("._")]
        others = [path.name for path in there if path.suffix.lower() not in suffixes and path.name[0] != "."]
        paths = {path.stem: path for path in wanted}
        if wanted and others:
            print(f"{len(others)} not read in {args.images}: {', '.join(others[:3])}{', ...' * (len(others) > 3)} "
                  "(folders, or other endings)")
        for path in wanted:
            if paths[path.stem] != path:
                raise BadInput(f"{path}: {paths[path.stem].name} would get the same label {path.stem}.png: rename one")
    if not paths:
        raise BadInput(f"no images in {args.images}: expected {' '.join(suffixes)}")
    data = args.out.parent if (args.out.parent / "JPEGImages").is_dir() else args.out
    keep_apart([args.out, args.out / "overlay"], [args.images, *(data / kind for kind in DATA)])
    keep_labels([args.out])

    def read(name):
        return (read_image(paths[name]),) * 2                                       # one of them comes back with labels

    def add_probabilities(image, same):                                             # (H, W, 3) uint8, and (C, H, W)
        return image, same, class_probabilities(network, image, args)

    failed, work = [], functools.partial(refine_labels, crf=args.crf)
    results = in_order(list(paths), read, add_probabilities, work, crf_workers(args))
    for name, result in tqdm(results, "predict", len(paths), unit="img", disable=None):
        path = paths[name]
        try:
            image, labels = result()
        except Exception as error:                      # whatever is bad in one image does not stop the others
            report(error, path.name, failed, len(paths))
            continue
        write_label(args.out / f"{name}.png", labels)
        panels = side_by_side({path.name: image, "prediction": overlay(image, labels)})
        save_picture(args.out / "overlay" / f"{name}.jpg", with_legend(panels, classes_in(labels), names))
    print(f"{len(paths) - len(failed)} label PNGs in {args.out}, to look at: {args.out / 'overlay'}")
    return finish(failed)


# ----------------------------------------------------------------------------------------------------------------------
# VOC's files: lists, images, label maps

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


# ----------------------------------------------------------------------------------------------------------------------
# parameters of the CRF (BoxSup, Sect. 5.1: "a held-out 100 random validation images are used [...] to set
# hyper-parameters")

# PAPER SILENT: which 100 images, and which hyper-parameters; here the CRF's. No images are set aside: --list names some
# not trained on and not reported (on its training images a network is surer of itself, so that the CRF changes less).
# PAPER SILENT: which parameters of the CRF were tried; the weight and the two standard deviations of the kernel of
# position and colour, on a coarse grid around the presets. The other kernel stays as it is: it matters little.
GRID = {"xy": (33, 50, 67, 121), "rgb": (3, 5, 10), "w": (2, 4, 7)}


def crf_grid(args):
    """The parameter sets to try, as dense_crf's options, those of --crf among them."""
    sets = [args.crf | dict(zip(GRID, values)) for values in itertools.product(*GRID.values())]
    return sets if args.crf in sets else [args.crf, *sets]


def try_crfs(truth, image, probabilities, grid):
    """Confusion matrices (S, C, C) int64 of one image, for each parameter set. A lattice serves all its weights."""
    probabilities = as_tensor(probabilities)            # an array where workers are
    pixels, unary = torch.from_numpy(image).to(probabilities.device), unary_energy(probabilities)
    truth, built, confusions = torch.from_numpy(truth).to(probabilities.device), None, []
    with torch.no_grad():
        for crf in grid:
            widths = crf["xy"], crf["rgb"], crf["gaussian_xy"]
            if built != widths:
                built, (bilateral, gaussian) = widths, crf_kernels(pixels, *widths)
            q = mean_field(unary, [(crf["gaussian_w"], gaussian), (crf["w"], bilateral)], crf["iterations"])
            confusions.append(confusion_matrix(q.argmax(1).view(truth.shape), truth, len(probabilities)).cpu())
    return torch.stack(confusions)


def crf_search(results, count, args):
    """--crf-search: mIoU of each parameter set over the images, best first."""
    grid, total, failed = crf_grid(args), 0, []
    for name, result in tqdm(results, "CRF search", count, unit="img", disable=None):
        try:
            total = total + result()                                                # (S, C, C)
        except Exception as error:                      # whatever is bad in one image does not stop the others
            report(error, name, failed, count)
    scored = sorted(((iou(confusion).nanmean().item(), crf) for confusion, crf in zip(total, grid)),
                    key=lambda pair: -pair[0])
    print(f"mIoU (%) of {len(grid)} parameter sets on {count - len(failed)} images\n\n   mIoU      w     xy    rgb")
    for miou, crf in scored:
        print(f"{100 * miou:7.2f}{crf['w']:7g}{crf['xy']:7g}{crf['rgb']:7g}"
              + "   what --crf takes" * (crf == args.crf))
    if args.json:
        write_json(args.json, [{"miou": miou, **crf} for miou, crf in scored])
    best = scored[0][1]
    print(f"\nto use the best: --crf --crf-w {best['w']:g} --crf-xy {best['xy']:g} --crf-rgb {best['rgb']:g}"
          + f" --crf-iterations {best['iterations']}" * (best["iterations"] != ITERATIONS))
    return finish(failed)


def parse_arguments(argv):
    """-> the arguments. Those that do not go together end the program, as any error of the parser does."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__.split("\n\n")[0].strip(),
        epilog="(paper): the value is the papers'. (ours): the papers do not say.")
    add = parser.add_argument
    add("--data", default="VOCdevkit", help="VOCdevkit, or the VOC2012 folder in it (default %(default)s)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", help="score this network, a .pt file of train_box2seg.py or train_boxsup.py")
    what.add_argument("--labels", type=Path, metavar="DIR", help="score the label PNGs <id>.png in this folder")
    add("--against", type=Path, metavar="DIR", help="compare --labels with the label PNGs of this folder, which takes "
        "the truth's place: all that both have, unless --split or --list says which; 255 in either is left out")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--split", help="list in ImageSets/Segmentation to score (paper: val, the default)")
    which.add_argument("--list", type=Path, metavar="FILE", help="score these ids instead, one a line")
    add("--scales", type=float, nargs="+", metavar="S", help="mean of the predictions at these scales of the image; "
        "figures use the first (ours: --val-scale of the training, 1 unless with --recipe photos; paper, for "
        "BoxSup+, Sect. 5.1: 0.8 1.0 1.2)")
    add("--flip", action="store_true", help="average also over the mirrored image (ours: off)")

    add = parser.add_argument_group("dense CRF on the predictions (crf.py)").add_argument
    add("--crf", nargs="?", const="auto", choices=["auto", *PRESETS], metavar="PRESET", help="refine them (paper), "
        "with the parameters for vgg16-plain, vgg16 (LargeFOV) or resnet101 (ours; default: the one closest to the "
        "network)")
    add("--crf-w", type=float, metavar="W", help="weight of the bilateral kernel, instead of the preset's")
    add("--crf-xy", type=float, metavar="PIXELS", help="its standard deviation in space")
    add("--crf-rgb", type=float, metavar="SD", help="and in colour, 0-255")
    add("--crf-iterations", type=int, default=ITERATIONS, metavar="N", help="iterations of the mean field (ours: "
        "%(default)s)")
    add("--crf-backend", default="torch", choices=["torch", "pydensecrf"], help="(ours: %(default)s)")
    add("--crf-search", type=int, nargs="?", const=100, metavar="N", help="score a grid of parameters on N random "
        "images of the list (paper, BoxSup Sect. 5.1: 100), which should not be those that are reported")

    add = parser.add_argument_group("output, besides the table").add_argument
    add("--json", type=Path, metavar="FILE", help="the scores, 0..1")
    add("--save-png", type=Path, metavar="DIR", help="predictions as label PNGs, the form that VOC's server takes as "
        "results/VOC2012/Segmentation/comp6_val_cls/<id>.png")
    add("--pictures", type=Path, metavar="DIR", help="strips: image | truth | boxes | GrabCut | prediction | attention")
    add("--num-pictures", type=int, default=12, metavar="N", help="how many, evenly spread (ours: %(default)s)")
    add("--worst", action="store_true", help="those of lowest mIoU instead")
    add("--best", action="store_true", help="those of highest mIoU instead; with --worst as many of each")
    add("--attention", type=Path, metavar="DIR", help="as Box2Seg's Fig. 4: image | truth | GrabCut and boxes | "
        "attention of each class that is there, as heat over the image")
    add("--affinity", type=Path, metavar="DIR", help="as Box2Seg's Fig. 5: image | truth, two pixels marked | "
        "affinity (Eq. 9) of each to all others, as heat over the image")
    add("--pixels", type=int, nargs=4, metavar=("X", "Y", "X", "Y"), help="which two, from the upper left corner, 0 0 "
        "(ours: the pixel farthest from any boundary in the largest class other than background, and in background)")
    add("--pseudo-label-dir", type=Path, metavar="DIR", help="where BoxMasks/ and GrabCutMasks/ lie, for the figures "
        "(default: in --data)")

    add = parser.add_argument_group("trimap: mIoU near boundaries of the truth and away from them").add_argument
    add("--trimap", type=int, nargs="*", metavar="W", help="BoxSup's Fig. 4, for bands of these widths, pixels to "
        f"either side (ours: {' '.join(map(str, WIDTHS))})")
    add("--trimap-plot", type=Path, metavar="FILE", help="draw it, as .png or .jpg")
    add("--trimap-add", type=Path, nargs="+", default=[], metavar="JSON", help="draw other runs' curves too, from what "
        "--trimap --json wrote of them")

    add = parser.add_argument_group("plain images, without truth").add_argument
    add("--images", type=Path, metavar="DIR", help="label all images of this folder (with --list: only those), "
        "e.g. VOC's test set; needs --checkpoint and --out")
    add("--out", type=Path, metavar="DIR", help="gets <name>.png, and overlay/<name>.jpg to look at")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default here: %(default)s)")
    add("--amp", default="off", choices=["auto", "bf16", "fp16", "off"], help="mixed precision; off: float32, so that "
        "scores are the same on every machine; auto: bf16 on CUDA (ours: %(default)s)")
    add("--workers", type=int, default=os.cpu_count(), help="CRFs at a time on the CPU, each on one core; each takes "
        "1 to 2 GB a million pixels with 21 classes (default here: %(default)s)")
    args = parser.parse_args(argv)
    figures = args.pictures or args.attention or args.affinity

    if bool(args.images) != bool(args.out) or (args.images and not args.checkpoint):
        parser.error("--images, --out and --checkpoint go together")
    if args.against and not args.labels or (args.attention or args.affinity) and not args.checkpoint:
        parser.error("--against goes with --labels; --attention and --affinity with --checkpoint")
    if args.images and (args.split or args.json or args.save_png or figures or args.trimap is not None
                        or args.trimap_plot):
        parser.error("--images has no truth: of the outputs only --out goes with it, and of the lists --list")
    if not (args.crf or args.crf_search) and (any((args.crf_w, args.crf_xy, args.crf_rgb))
                                              or (args.crf_iterations, args.crf_backend) != (ITERATIONS, "torch")):
        parser.error("--crf-w, --crf-xy, --crf-rgb, --crf-iterations and --crf-backend go with --crf")
    if args.crf_search and (args.save_png or figures or args.trimap is not None or args.trimap_plot):
        parser.error("--crf-search prints a table of its own: of the other outputs only --json goes with it")
    outputs = [path.resolve() for path in (args.save_png, args.pictures, args.attention, args.affinity, args.json,
                                           args.trimap_plot) if path]
    if len(set(outputs)) < len(outputs):
        parser.error("two outputs have one name, and the second would overwrite the first: give each its own")
    if args.labels and (args.flip or args.scales):
        parser.error("--scales and --flip go with --checkpoint: label PNGs are scored as they are")
    if args.pixels and not args.affinity or (args.best or args.worst) and not figures:
        parser.error("--pixels goes with --affinity; --best and --worst with --pictures, --attention or --affinity")
    if args.trimap_plot and args.trimap_plot.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        parser.error(f"--trimap-plot {args.trimap_plot}: expected .png or .jpg")
    if args.trimap_add and not args.trimap_plot:
        parser.error("--trimap-add draws curves into --trimap-plot FILE")
    if args.trimap == [] or args.trimap_plot and not args.trimap:
        args.trimap = WIDTHS
    args.trimap = sorted(set(args.trimap or ()))
    if not all(0 < number < math.inf for number in [*(args.scales or ()), *args.trimap, args.num_pictures]):
        parser.error("--scales, --trimap and --num-pictures must be above 0")
    if (args.crf or args.crf_search is not None) and not args.checkpoint:
        parser.error("--crf goes with --checkpoint: label PNGs hold no probabilities")
    if not all(value is None or 0 < value < math.inf for value in (args.crf_w, args.crf_xy, args.crf_rgb,
                                                                   args.crf_search, args.crf_iterations)):
        parser.error("--crf-w, --crf-xy, --crf-rgb, --crf-search and --crf-iterations must be above 0")
    if min(args.crf_xy or 1, args.crf_rgb or 1) < 0.01:
        parser.error("--crf-xy and --crf-rgb must be at least 0.01")
    if args.crf_search and (args.images or args.crf_backend != "torch"):
        parser.error("--crf-search scores the torch backend against the truth: leave out --images and --crf-backend")
    if args.workers < 0:
        parser.error("--workers must be 0 or more")
    if (args.pseudo_label_dir or args.num_pictures != parser.get_default("num_pictures")) and not figures:
        parser.error("--num-pictures and --pseudo-label-dir go with --pictures, --attention or --affinity")
    if args.pseudo_label_dir and not args.pseudo_label_dir.is_dir():
        parser.error(f"--pseudo-label-dir {args.pseudo_label_dir}: no such folder")
    if args.json and (args.json.is_dir() or args.json.parent.is_file()):
        parser.error(f"--json {args.json}: expected the name of a file")
    return args


def main(argv):
    args = parse_arguments(argv)
    try:
        args.device = pick_device(args.device)
        torch.backends.cudnn.allow_tf32 = False         # on recent GPUs PyTorch rounds convolutions to it otherwise
        return predict_folder(args) if args.images else evaluate(args)
    except (BadInput, BadModel) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that a pipe's encoding lacks, on Windows
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("evaluate.py: interrupted", file=sys.stderr)
        sys.exit(130)
