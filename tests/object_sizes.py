"""Which sizes of objects does a loss help? Label maps against the truth, object by object.

    python evaluate.py --checkpoint runs/grabcut/last.pt --save-png grabcut                  label maps of val
    python tests/object_sizes.py --data VOCdevkit --labels grabcut box2seg                   compares folders of them

Of every annotated box in which the truth has its class, only the pixels inside count: IoU of those labelled as its
class with those that are of its class, without the pixels labelled 255; the mean over the boxes whose area is such a
share of the image. In brackets: recall, the share of its true pixels that are labelled as its class. mIoU counts
pixels, and so large objects most.
"""
import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from grabcut_labels import BadInput, class_names, find_voc, read_boxes, read_label, read_list
from train_boxsup import truth_file

EDGES = 0, 0.02, 0.1, 0.3, 1  # shares of the image's area


def object_scores(labels, truth, boxes, classes):
    """Label map and truth (H, W), boxes (K, 4), classes (K,) -> (K, 3): share of the image, IoU, recall; nan where
    nothing of the class is in its box."""
    rows = []
    for (x0, y0, x1, y1), kind in zip(boxes, classes):
        inside = np.s_[y0:y1, x0:x1]
        true = truth[inside] == kind
        found = (labels[inside] == kind) & (truth[inside] != 255)
        hit = (true & found).sum()
        share = (x1 - x0) * (y1 - y0) / truth.size
        rows.append((share, *((hit / (true | found).sum(), hit / true.sum()) if true.any() else (np.nan, np.nan))))
    return np.array(rows, float).reshape(-1, 3)


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("--data", default="VOCdevkit", help="the VOCdevkit, or the VOC2012 folder in it")
    parser.add_argument("--split", default="val", help="list of ImageSets/Segmentation (default: val)")
    parser.add_argument("--labels", type=Path, nargs="+", required=True, metavar="DIR", help="label PNGs <id>.png")
    args = parser.parse_args()
    voc = find_voc(args.data)
    names, scores = class_names(voc), [[] for _ in args.labels]
    for image_id in read_list(voc / "ImageSets" / "Segmentation" / f"{args.split}.txt"):
        truth = read_label(truth_file(voc, image_id), None, len(names))
        boxes = read_boxes(voc / "Annotations" / f"{image_id}.xml", names, truth.shape)
        for folder, rows in zip(args.labels, scores):
            rows.append(object_scores(read_label(folder / f"{image_id}.png", truth.shape, len(names)), truth, *boxes))
    scores = np.array([np.concatenate(rows) for rows in scores])                             # (folders, objects, 3)
    scores = scores[:, ~np.isnan(scores[0, :, 1])]
    print("| box, of the image | objects | " + " | ".join(map(str, args.labels)) + " |\n"
          + "|---" * (2 + len(args.labels)) + "|")
    for low, high in [*zip(EDGES, EDGES[1:]), (0, 1)]:
        chosen = scores[:, (scores[0, :, 0] > low) & (scores[0, :, 0] <= high), 1:]
        cells = [f"{100 * iou:.1f} ({100 * recall:.1f})" for iou, recall in chosen.mean(1)] if chosen.size else (
            ["-"] * len(args.labels))
        print(f"| {100 * low:g} to {100 * high:g} % | {chosen.shape[1]} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        print(f"object_sizes.py: {error}", file=sys.stderr)
        sys.exit(2)
