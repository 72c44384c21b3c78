"""
Scores: predictions against the masks of a VOC devkit, as the tables of both papers have them.

Box2Seg (Kulharia et al., ECCV 2020) Sect. 4.2, Tables 1 and 2, and BoxSup (Dai et al., ICCV 2015) Sect. 5 report the
mean intersection over union (mIoU) on VOC 2012's val, 1449 images. It is the benchmark's measure: the pixels of *all*
images are counted in one table of truth against prediction, at the images' own sizes, without those whose truth is 255
(the border around objects); IoU per class from that table; then the mean over classes, background included.

Run:    python evaluate.py --data VOCdevkit --checkpoint runs/box2seg/best.pt
        python evaluate.py --data VOCdevkit --labels VOCdevkit/VOC2012/GrabCutMasks     (the row GrabCut-NoTrain-GT)
        python evaluate.py --checkpoint runs/box2seg/best.pt --images holiday --out holiday_labels
Reads:  VOC2012/JPEGImages/<id>.jpg, and the truth SegmentationClass/<id>.png (SegmentationClassAug where it has none)
        for the ids of ImageSets/Segmentation/val.txt (--split, --list); class_names.txt where there is one;
        a checkpoint of train_box2seg.py, or label PNGs: 8-bit palette PNG, class index per pixel, the image's size
Writes: the table, to the terminal. If asked: --json FILE, {"miou": 0..1, "iou": {name: 0..1, or null for a class that
        the truth lacks}, "images": n, "classes_present": k, "pixel_accuracy": 0..1, "failed": [ids]};
        --save-png DIR, a label PNG per id; --pictures DIR, <id>.png strips and all of them in sheet.png;
        with --images, a label PNG per picture and the picture under its labels in overlay/, below --out
Expect: the paper's Box2Seg reaches 74.9 (Table 3), its GrabCut labels on the annotated boxes 71.6 (Sect. 4.2).
        Exit status 0; 1 if single images could not be read, they are listed and left out; 2 if nothing could be done.
"""
import argparse
import json
import math
import os
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from losses import confusion_matrix, iou
from model import load_network, normalize, predict

# ==== shared block "VOC on disk": equal to the byte in grabcut_labels.py and evaluate.py
VOC_CLASSES = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
               "person pottedplant sheep sofa train tvmonitor").split()


class BadInput(Exception):
    """What the user gave cannot be used; the message is one line that names the file and the remedy."""


def find_voc(data):
    """--data (a VOCdevkit, or the VOC2012 folder in it) -> Path of the folder that holds JPEGImages."""
    for folder in (Path(data), Path(data) / "VOC2012", Path(data) / "VOCdevkit" / "VOC2012"):
        if (folder / "JPEGImages").is_dir():
            return folder
    raise BadInput(f"no VOC data in {data}: wanted {data}/VOC2012/JPEGImages")


def class_names(voc):
    """VOC's 21 names, or those of a class_names.txt beside JPEGImages (one a line, background first)."""
    path = Path(voc) / "class_names.txt"
    names = path.read_text().split("\n") if path.exists() else VOC_CLASSES
    names = [name.strip() for name in names if name.strip()]
    if not 2 <= len(names) <= 255 or len(set(names)) < len(names):
        raise BadInput(f"{path}: wanted 2 to 255 different names, one a line, background first")
    return names


def read_list(path):
    """An ImageSets list -> image ids in order. The first word of each line is the id; empty lines are skipped."""
    if not Path(path).is_file():
        raise BadInput(f"no image list {path}: write one id a line (file names without .jpg)")
    ids = [line.split()[0] for line in Path(path).read_text().splitlines() if line.strip()]
    if not ids or len(set(ids)) < len(ids):
        raise BadInput(f"{path}: " + ("names an id twice" if ids else "is empty") + ": wanted one id a line")
    return ids
# ==== end of shared block


# ==== shared block "pictures and labels": equal to the byte in grabcut_labels.py and evaluate.py
def voc_palette():
    """VOC's colours, (256, 3) uint8: bits 0, 1, 2 of the index give the high bit of R, G, B, bits 3, 4, 5 the next."""
    bits = [[(np.arange(256) >> (3 * k + c) & 1) << (7 - k) for k in range(3)] for c in range(3)]
    return np.array(bits).sum(1).T.astype(np.uint8)


def read_image(path):
    """A picture file -> (H, W, 3) uint8 RGB, turned upright where EXIF says so."""
    try:
        return np.array(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))  # Pillow raises on a cut-off JPEG
    except FileNotFoundError:
        raise BadInput(f"no image {path}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInput(f"{path}: not a readable image ({error}): fetch it again or take its id off the list") from None


def read_label(path, size=None, num_classes=None):
    """A label PNG -> (H, W) uint8 class index per pixel, 255 ignored. size is (H, W) of the image it belongs to."""
    try:
        png = Image.open(path)
        labels = np.array(png)  # of a palette PNG the indices, not the colours
    except FileNotFoundError:
        raise BadInput(f"no label {path}") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise BadInput(f"{path}: not a readable PNG ({error}): make or fetch it again") from None
    if png.mode not in ("P", "L"):
        raise BadInput(f"{path}: a {png.mode} picture, not class indices: save it as an 8-bit palette PNG")
    if size is not None and labels.shape != tuple(size):
        raise BadInput(f"{path}: {labels.shape[1]}x{labels.shape[0]}, its image {size[1]}x{size[0]}: make it again")
    if num_classes is not None and (worst := labels[labels < 255].max(initial=0)) >= num_classes:
        raise BadInput(f"{path}: holds class {worst}, but there are {num_classes} classes: check class_names.txt")
    return labels


def write_label(path, labels):
    """(H, W) class indices -> 8-bit palette PNG, under a temporary name first, so that no half file is ever seen."""
    png = Image.fromarray(np.asarray(labels, np.uint8), "L")
    png.putpalette(voc_palette().tobytes())  # makes it mode P, indices unchanged
    temporary = f"{path}.{os.getpid()}.tmp"
    png.save(temporary, "PNG")
    os.replace(temporary, path)
# ==== end of shared block


# ----------------------------------------------------------------------------------------------------------------------
# predictions

def usable_device(name):
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"--device {name}: no such kind of device: give cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(f"--device {name}: this PyTorch sees {torch.cuda.device_count()} CUDA GPUs: give --device cpu, "
                       "or install a CUDA build of PyTorch")
    return device


def load_checkpoint(checkpoint, device):
    """A checkpoint file -> (network in eval mode, class names)."""
    try:
        network, saved = load_network(checkpoint, device)
    except ValueError as error:
        raise BadInput(error) from None
    return network.to(memory_format=torch.channels_last), saved["class_names"]


def autocast(args):
    """Mixed precision where --amp asks for it; predict() takes its softmax in float32 all the same."""
    amp = {"auto": "bf16" if args.device.type == "cuda" else "off"}.get(args.amp, args.amp)
    return torch.autocast(args.device.type, torch.float16 if amp == "fp16" else torch.bfloat16, enabled=amp != "off")


def predict_labels(network, image, args):
    """(H, W, 3) uint8 RGB -> (H, W) uint8, the most probable class of each pixel."""
    with autocast(args):
        probabilities = predict(network, image, args.scales, args.flip)             # (C, H, W)
    return probabilities.argmax(0).byte().cpu().numpy()                             # (H, W)


def read_prediction(path, size, num_classes):
    """A label PNG that stands for a prediction: (H, W) uint8, where 255 will not do."""
    labels = read_label(path, size, num_classes)
    if (labels == 255).any():
        raise BadInput(f"{path}: holds 255 (ignore), but a prediction names a class for each pixel: 0 is background")
    return labels


# ----------------------------------------------------------------------------------------------------------------------
# the score

def image_path(voc, name):
    return voc / "JPEGImages" / f"{name}.jpg"


def truth_path(voc, name):
    """The official mask; for SBD's extra images, which have none, the one in SegmentationClassAug."""
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
# pictures

PANEL = 240                                             # height of a panel in pixels
INK, PAPER = (40, 40, 40), (255, 255, 255)


def colour_of(labels):
    """(...) class indices -> (..., 3) uint8 RGB: VOC's colours made brighter, for some are nearly black."""
    return np.minimum(voc_palette()[labels] * 1.1 + 40, 255).astype(np.uint8)


def grey(image):
    return image.mean(axis=2, keepdims=True).repeat(3, axis=2)                      # (H, W, 3) float


def overlay(image, labels):
    """Classes in colour over the picture in dark grey; what is ignored (255) in near white. (H, W, 3) uint8 RGB."""
    strength = np.where(labels == 0, 0, 0.7)[..., None]                             # (H, W, 1)
    return ((1 - strength) * 0.6 * grey(image) + strength * colour_of(labels)).round().astype(np.uint8)


def attention_of(network, image, args):
    """alpha (Sect. 3.2) at the image's own resolution: (L, H, W) numpy, class c at c - 1. None without that branch."""
    with torch.inference_mode(), autocast(args):
        _, logits, _ = network.branches(normalize(torch.from_numpy(image)[None].to(args.device)))
        if logits is None:
            return None
        logits = F.interpolate(logits.float(), image.shape[:2], mode="bilinear", align_corners=False)
        return logits[0].sigmoid().cpu().numpy()


def attention_overlay(image, alpha, truth, boxes):
    """alpha of the classes that are in the picture, each in its colour: how strong is how bright. (H, W, 3) uint8 RGB.

    Eq. 3 trains alpha_c where B is c and nowhere else. So other classes are left out, and what lies outside of the
    boxes too, where the box labels are at hand.
    """
    picture = 0.35 * grey(image)
    for c in sorted(set(np.unique(truth).tolist()) - {0, 255}):
        strength = alpha[c - 1] if boxes is None else alpha[c - 1] * (boxes == c)
        picture += strength[..., None] * (colour_of(c) - picture)
    return picture.round().astype(np.uint8)


def captioned(image, caption):
    """A panel: the picture at PANEL pixels of height under its caption."""
    width = max(1, round(image.shape[1] * PANEL / image.shape[0]))
    shrinks = image.shape[0] > PANEL
    image = cv2.resize(image, (width, PANEL), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    bar = np.full((26, width, 3), PAPER, np.uint8)
    cv2.putText(bar, caption, (2, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, INK, 1, cv2.LINE_AA)
    return cv2.copyMakeBorder(np.vstack([bar, image]), 0, 4, 2, 2, cv2.BORDER_CONSTANT, value=PAPER)


def legend(present, names, width):
    """Swatches and names of the classes `present`, in as many rows as they need: (h, width, 3)."""
    rows, x = [], width
    for c in sorted(present):
        (w, _), _ = cv2.getTextSize(names[c], cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)
        if x + w + 40 > width:
            rows.append(np.full((26, width, 3), PAPER, np.uint8))
            x = 4
        cv2.rectangle(rows[-1], (x, 5), (x + 16, 19), colour_of(c).tolist(), cv2.FILLED)
        cv2.putText(rows[-1], names[c], (x + 22, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, INK, 1, cv2.LINE_AA)
        x += w + 40
    return np.vstack(rows) if rows else np.empty((0, width, 3), np.uint8)


def save_picture(path, image):
    """(H, W, 3) uint8 RGB -> PNG or JPEG, under a temporary name first."""
    temporary = f"{path}.{os.getpid()}.tmp"
    Image.fromarray(image).save(temporary, "PNG" if path.suffix == ".png" else "JPEG", quality=95)
    os.replace(temporary, path)


def strip(voc, name, prediction, mean_iou, network, names, args):
    """One image's panels side by side, each under its caption: (h, w, 3) uint8 RGB; and which classes occur in it."""
    image = read_image(image_path(voc, name))
    truth = read_label(truth_path(voc, name), image.shape[:2], len(names))
    labels = {"truth": truth}
    for folder, caption in (("BoxMasks", "boxes"), ("GrabCutMasks", "GrabCut")):
        path = (args.noisy_labels or voc) / folder / f"{name}.png"
        if path.is_file():                              # grabcut_labels.py makes them for the list it is given
            labels[caption] = read_label(path, image.shape[:2], len(names))
    labels[f"prediction: mIoU {100 * mean_iou:.1f}"] = prediction
    panels = [captioned(image, name)] + [captioned(overlay(image, one), caption) for caption, one in labels.items()]
    alpha = attention_of(network, image, args) if network else None
    if alpha is not None:
        panels.append(captioned(attention_overlay(image, alpha, truth, labels.get("boxes")), "attention"))
    present = set(np.concatenate([one.ravel() for one in labels.values()]).tolist()) - {0, 255}
    return np.hstack(panels), present


def save_pictures(voc, per_image, predicted, network, names, args):
    """--pictures: a strip for each of --num-pictures images, and all of them in sheet.png."""
    ids = [name for name in per_image if not math.isnan(per_image[name])]           # nan: no truth but 255
    count = min(args.num_pictures, len(ids))
    if args.worst:
        chosen = sorted(ids, key=per_image.get)[:count]
    else:                                               # evenly spread over the list
        chosen = [ids[i * len(ids) // count] for i in range(count)]
    strips, everything = [], set()
    args.pictures.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        panels, present = strip(voc, name, predicted(name)[1], per_image[name], network, names, args)
        save_picture(args.pictures / f"{name}.png", np.vstack([panels, legend(present, names, panels.shape[1])]))
        strips.append(panels)
        everything |= present
    width = max(panels.shape[1] for panels in strips)
    strips = [cv2.copyMakeBorder(panels, 0, 0, 0, width - panels.shape[1], cv2.BORDER_CONSTANT, value=PAPER)
              for panels in strips]
    save_picture(args.pictures / "sheet.png", np.vstack([*strips, legend(everything, names, width)]))
    print(f"{count} pictures in {args.pictures}, all of them in sheet.png")


# ----------------------------------------------------------------------------------------------------------------------
# the two jobs

def report(error):
    tqdm.write(f"evaluate.py: {error}", file=sys.stderr)


def finish(failed):
    """A long job's end: what was left out, and the exit status."""
    if failed:
        print(f"evaluate.py: {len(failed)} images were left out (see above): {' '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def evaluate(args):
    """Predictions of a network, or label PNGs, against a list's truth: prints the table, returns the exit status."""
    voc = find_voc(args.data)
    names = class_names(voc)
    ids = read_list(args.list or voc / "ImageSets" / "Segmentation" / f"{args.split}.txt")
    network = None
    if args.checkpoint:
        network, trained = load_checkpoint(args.checkpoint, args.device)
        if trained != names:
            raise BadInput(f"{args.checkpoint}: trained on {len(trained)} classes ({' '.join(trained)}), but {voc} has "
                           f"{len(names)} ({' '.join(names)}): give the data it was trained on")
        require([image_path(voc, name) for name in ids], "image")
    else:
        require([args.labels / f"{name}.png" for name in ids], "label")
    require([truth_path(voc, name) for name in ids], "truth")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    if args.save_png:
        make_output_folder(args.save_png, args.labels, voc / "SegmentationClass", voc / "SegmentationClassAug")

    def predicted(name):                                                            # truth, prediction: (H, W) uint8
        if network is None:
            truth = read_label(truth_path(voc, name), None, len(names))
            return truth, read_prediction(args.labels / f"{name}.png", truth.shape, len(names))
        image = read_image(image_path(voc, name))
        truth = read_label(truth_path(voc, name), image.shape[:2], len(names))
        return truth, predict_labels(network, image, args)

    confusion = torch.zeros(len(names), len(names), dtype=torch.int64)              # rows the truth
    per_image, failed = {}, []                                                      # mIoU of each; ids
    for name in tqdm(ids, desc="evaluate", unit="img", disable=None):
        try:
            truth, prediction = predicted(name)
        except BadInput as error:
            if network is None:                         # seconds of work: nothing is lost by mending the file first
                raise
            report(error)
            failed.append(name)
            continue
        one = confusion_matrix(torch.from_numpy(prediction), torch.from_numpy(truth), len(names))
        confusion += one
        per_image[name] = iou(one).nanmean().item()
        if args.save_png:
            write_label(args.save_png / f"{name}.png", prediction)
    if confusion.sum() == 0:
        raise BadInput(f"{args.list or args.split}: no pixel with a truth in {len(ids)} images: nothing to score")

    result = {**score(confusion, names), "images": len(per_image), "failed": failed}
    print(table(result))
    if args.json:
        temporary = Path(f"{args.json}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(temporary, args.json)
    if args.pictures:
        save_pictures(voc, per_image, predicted, network, names, args)
    return finish(failed)


SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"}


def predict_folder(args):
    """A folder of plain pictures without truth: label PNGs in --out, pictures under their labels in --out/overlay."""
    if not args.images.is_dir():
        raise BadInput(f"no folder {args.images}: --images wants a folder of pictures")
    network, names = load_checkpoint(args.checkpoint, args.device)
    paths = sorted(path for path in args.images.iterdir() if path.suffix.lower() in SUFFIXES)
    if args.list:                                       # e.g. VOC's test images, all of which lie in JPEGImages
        by_id = {path.stem: path for path in paths}
        ids = read_list(args.list)
        require([by_id.get(name, args.images / f"{name}.jpg") for name in ids], "image")
        paths = [by_id[name] for name in ids]
    if not paths:
        raise BadInput(f"no pictures in {args.images}: wanted {' '.join(sorted(SUFFIXES))}")
    by_stem = {}
    for path in paths:
        if by_stem.setdefault(path.stem, path) != path:
            raise BadInput(f"{path}: {by_stem[path.stem].name} would get the same label {path.stem}.png: rename one")
    make_output_folder(args.out, args.images)
    (args.out / "overlay").mkdir(exist_ok=True)

    failed = []
    for path in tqdm(paths, desc="predict", unit="img", disable=None):
        try:
            image = read_image(path)
        except BadInput as error:
            report(error)
            failed.append(path.name)
            continue
        labels = predict_labels(network, image, args)
        write_label(args.out / f"{path.stem}.png", labels)
        present = set(np.unique(labels).tolist()) - {0}
        panels = np.hstack([captioned(image, path.name), captioned(overlay(image, labels), "prediction")])
        save_picture(args.out / "overlay" / f"{path.stem}.jpg",
                     np.vstack([panels, legend(present, names, panels.shape[1])]))
    print(f"{len(paths) - len(failed)} label PNGs in {args.out}, to look at: {args.out / 'overlay'}")
    return finish(failed)


def make_output_folder(out, *sources):
    """A folder to write PNGs to, which is none of those that they are made from."""
    if any(source and source.exists() and out.exists() and out.samefile(source) for source in sources):
        raise BadInput(f"{out}: writing there would overwrite what is read from there: name another folder")
    out.mkdir(parents=True, exist_ok=True)


def main(argv):
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__.split("\n\n")[0].strip(),
        epilog="(paper): the value is the papers'. (ours): the papers do not say.")
    add = parser.add_argument
    add("--data", default="VOCdevkit", help="VOCdevkit, or the VOC2012 folder in it (default %(default)s)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", help="score this network, a .pt file of train_box2seg.py")
    what.add_argument("--labels", type=Path, metavar="DIR", help="score the label PNGs <id>.png in this folder")
    add("--split", default="val", help="list in ImageSets/Segmentation to score (paper: %(default)s)")
    add("--list", type=Path, metavar="FILE", help="score these ids instead, one a line")
    add("--scales", type=float, nargs="+", default=[1.0], metavar="S",
        help="mean of the predictions at these scales of the image (ours: %(default)s)")
    add("--flip", action="store_true", help="and of those for the mirrored image (ours: off)")

    add = parser.add_argument_group("output, besides the table").add_argument
    add("--json", type=Path, metavar="FILE", help="the scores, 0..1")
    add("--save-png", type=Path, metavar="DIR", help="predictions as label PNGs, the form that VOC's server takes as "
        "results/VOC2012/Segmentation/comp6_val_cls/<id>.png")
    add("--pictures", type=Path, metavar="DIR", help="strips: image | truth | boxes | GrabCut | prediction | attention")
    add("--num-pictures", type=int, default=12, metavar="N", help="how many, evenly spread (ours: %(default)s)")
    add("--worst", action="store_true", help="those of lowest mIoU instead")
    add("--noisy-labels", type=Path, metavar="DIR", help="where BoxMasks/ and GrabCutMasks/ lie, for the pictures "
        "(default: in --data)")

    add = parser.add_argument_group("plain pictures, without truth").add_argument
    add("--images", type=Path, metavar="DIR", help="label all pictures of this folder (with --list: only those), "
        "e.g. VOC's test set; needs --checkpoint and --out")
    add("--out", type=Path, metavar="DIR", help="gets <name>.png, and overlay/<name>.jpg to look at")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default here: %(default)s)")
    add("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"],
        help="mixed precision; auto: bf16 on CUDA, off on the CPU (ours: %(default)s)")
    args = parser.parse_args(argv)

    if bool(args.images) != bool(args.out) or (args.images and not args.checkpoint):
        parser.error("--images, --out and --checkpoint go together")
    if not all(0 < scale < math.inf for scale in args.scales) or args.num_pictures < 1:
        parser.error("--scales and --num-pictures must be above 0")
    try:
        args.device = usable_device(args.device)
        return predict_folder(args) if args.images else evaluate(args)
    except BadInput as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
