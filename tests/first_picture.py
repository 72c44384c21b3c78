"""The README's first image: what boxes become, step by step, on two photographs that may be shown.

    pip install scikit-image                                     # brings both photographs; nothing else here needs it
    python tests/first_picture.py                                # docs/first.jpg
    python tests/first_picture.py --checkpoint runs/box2seg/last.pt                 # and what this network predicts

A row for each photograph, left to right:

    photograph, box     the box that a person would draw: all that either paper is given
    B                   box mask, the box painted with its class              grabcut_labels.box_mask
    M                   GrabCut in the box: what Box2Seg trains on            grabcut_labels.grabcut_mask
    candidates          of MCG's candidate segments the five of least cost, from which BoxSup's label update samples
                        one: by Eq. 2 alone, as before the first epoch, or, with a checkpoint, by Eq. 4
    prediction          of the network, which has never seen the photograph   model.predict

Reads:  the wheel of scikit-image: a cat (data.chelsea, by Stefan van der Walt, CC0) and an astronaut (data.astronaut,
        NASA, public domain); a checkpoint of train_box2seg.py or train_boxsup.py that knows the classes cat and person.
Writes: --out, a JPEG.
"""
import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import losses
from evaluate import colour_of
from grabcut_labels import VOC_CLASSES, BadInput, box_mask, grabcut_mask
from mcg_candidates import mcg, tight_boxes
from model import load_network, predict

ROOT = Path(__file__).resolve().parent.parent
# name in skimage.data: class, box x0 y0 x1 y1 (pixels from 0, x1 and y1 exclusive), drawn by hand
PHOTOGRAPHS = {"chelsea": ("cat", (0, 0, 399, 300)), "astronaut": ("person", (20, 13, 364, 512))}
CELL, GAP, TEXT, INK = 270, 12, 19, (40, 40, 40)           # width of a panel, space between panels, height of letters
COLOURS = {"cat": (60, 190, 255), "person": (120, 230, 80)}  # other classes: those of evaluate.py
TOP_K, LAMBDA = 5, 3.0                                     # BoxSup Sect. 4.3, 4.2


def photograph(name):
    """(H, W, 3) uint8 RGB."""
    try:
        import skimage.data
    except ImportError:
        raise BadInput("the photographs come with scikit-image: pip install scikit-image") from None
    return getattr(skimage.data, name)()


def best_candidates(image, box, class_index, probabilities):
    """The TOP_K candidates of least cost for one box, the best first: (TOP_K, H, W) bool."""
    superpixels, members = mcg(image)                                                             # (H, W), (N, R)
    boxes, classes = torch.tensor([box]), torch.tensor([class_index])
    # The logarithm of probabilities can stand for logits: a softmax gives the probabilities back.
    logits = None if probabilities is None else probabilities.cpu().clamp(min=1e-8).log()
    cost = losses.candidate_cost(logits, torch.from_numpy(superpixels).long(), torch.from_numpy(members),
                                 torch.from_numpy(tight_boxes(superpixels, members)), boxes, classes, LAMBDA)
    best = cost[0].topk(TOP_K, largest=False).indices.numpy()
    return members[best][:, superpixels]


def resized(image, width):
    height = round(image.shape[0] * width / image.shape[1])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def colour(names, c):
    return COLOURS.get(names[c], tuple(colour_of(c).tolist()))


def shown(image, labels, names, width=CELL):
    """Labels (H, W) over the photograph: background dark grey, objects outlined and tinted in their class's colour."""
    image = resized(image, width)
    labels = cv2.resize(labels, image.shape[1::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    present = np.unique(labels[labels > 0])
    panel = 0.35 * image.mean(2, keepdims=True).repeat(3, 2)                                      # (h, w, 3)
    for c in present:
        panel = np.where((labels == c)[..., None], 0.82 * image + 0.18 * np.array(colour(names, c)), panel)
    panel = panel.round().astype(np.uint8)
    for c in present:
        contours, _ = cv2.findContours((labels == c).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(panel, contours, -1, colour(names, c), 2 if width == CELL else 1, cv2.LINE_AA)
    return panel


def with_box(image, box, class_name):
    """The photograph, the box and the name of its class, as a person would draw and write them."""
    x0, y0, x1, y1 = (round(corner * CELL / image.shape[1]) for corner in box)
    panel = Image.fromarray(resized(image, CELL))
    pen, font, colour = ImageDraw.Draw(panel), ImageFont.load_default(TEXT - 3), COLOURS[class_name]
    x0, y0, x1, y1 = max(x0, 1), max(y0, 1), min(x1, panel.width - 1), min(y1, panel.height - 1)
    pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline=colour, width=3)
    pen.rectangle((x0, y0, x0 + font.getlength(class_name) + 10, y0 + TEXT + 2), fill=colour)
    pen.text((x0 + 5, y0 + TEXT / 2 + 1), class_name, "black", font, anchor="lm")
    return np.array(panel)


def candidates_panel(image, segments, names, class_index):
    """The segments in two lines of three, half as large as the other panels; in the sixth place, what they are for."""
    small = [shown(image, segment * np.uint8(class_index), names, CELL // 2) for segment in segments]
    note = Image.new("RGB", small[0].shape[1::-1], "white")
    ImageDraw.Draw(note).text((note.width / 2, note.height / 2), "BoxSup samples\none of the five\nfor each epoch", INK,
                              ImageFont.load_default(TEXT - 4), anchor="mm", align="center")
    small.append(np.array(note))
    small = [cv2.copyMakeBorder(panel, 0, 2, 0, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255)) for panel in small]
    return np.vstack([np.hstack(small[:3]), np.hstack(small[3:])])


def row(name, network, names, scale):
    """{caption: (h, w, 3) uint8 RGB} of one photograph."""
    class_name, box = PHOTOGRAPHS[name]
    if class_name not in names:
        raise BadInput(f"--checkpoint: its network does not know the class {class_name} (but {' '.join(names)})")
    image, class_index = photograph(name), names.index(class_name)
    boxes, classes = np.array([box]), np.array([class_index])
    probabilities = None if network is None else predict(network, image, scales=(scale,))         # (C, H, W)
    panels = {"photograph and box": with_box(image, box, class_name),
              "B: box mask": shown(image, box_mask(boxes, classes, image.shape[:2]), names),
              "M: GrabCut in the box": shown(image, grabcut_mask(image, boxes, classes)[0], names),
              "five best candidate segments": candidates_panel(
                  image, best_candidates(image, box, class_index, probabilities), names, class_index)}
    if network is not None:
        panels["prediction"] = shown(image, probabilities.argmax(0).byte().cpu().numpy(), names)
    return panels


def figure(rows):
    """Rows of panels under one line of captions: a PIL image. Panels of one column have one width."""
    widths = [panel.shape[1] for panel in rows[0].values()]
    heights = [max(panel.shape[0] for panel in panels.values()) for panels in rows]
    top = TEXT + 2 * GAP
    sheet = Image.new("RGB", (sum(widths) + GAP * (len(widths) + 1), top + sum(heights) + GAP * len(rows)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)
    x = GAP
    for column, (caption, width) in enumerate(zip(rows[0], widths)):
        pen.text((x + width / 2, top / 2), caption, INK, font, anchor="mm")
        y = top
        for panels, height in zip(rows, heights):
            sheet.paste(Image.fromarray(list(panels.values())[column]), (x, y))
            y += height + GAP
        x += width + GAP
    return sheet


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", metavar="FILE", help="adds what this network predicts (default: left out)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "first.jpg", metavar="FILE",
                        help="default docs/first.jpg")
    args = parser.parse_args(argv)
    if args.out.is_dir():
        raise BadInput(f"--out {args.out}: expected the name of a file")
    network, names, scale = None, VOC_CLASSES, 1.0
    if args.checkpoint:
        try:
            network, saved = load_network(args.checkpoint)
        except ValueError as error:
            raise BadInput(error) from None
        names, scale = saved["class_names"], saved["args"]["val_scale"]   # the scale at which training validated
    sheet = figure([row(name, network, names, scale) for name in PHOTOGRAPHS])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.out, "JPEG", quality=92)
    print(f"{args.out}: {sheet.width} x {sheet.height} pixels")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BadInput as error:
        print(f"first_picture.py: {error}", file=sys.stderr)
        sys.exit(2)
