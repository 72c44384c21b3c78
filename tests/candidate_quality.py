"""How good are the candidate segments? One row of a table, over the objects that are their class's only box.

    python tests/candidate_quality.py --data VOCdevkit --split val --method mcg              makes them, measures time
    python tests/candidate_quality.py --data VOCdevkit --split val --candidates DIR          reads DIR/<id>.npz
    python tests/candidate_quality.py --data VOCdevkit --split val --method grabcut          one segment a box (or: box)
    python tests/candidate_quality.py --data VOCdevkit --split train --candidates DIR --checkpoint runs/boxsup/last.pt
                                                       what BoxSup's choice makes of them, by the weight of Eq. 3

Reads   JPEGImages, Annotations, SegmentationClass and the list of VOC2012; writes nothing.

Where a class has one box in an image, the pixels of that class in SegmentationClass are that object's mask; no
instance masks are needed. IoU leaves the pixels labelled 255 out. The columns, means over objects:

    all, first 1000, first 300   best IoU of any candidate, and of the best ranked ones
    recall                       share of objects with a candidate of IoU >= 0.7
    top by box, best of five     IoU of the candidate whose tight box fits the annotated box best; best of the five
    limit                        IoU of the best union of superpixels: what no grouping can exceed
    seconds                      processor time an image, one thread

With --checkpoint, over all boxes: mIoU of the label maps that BoxSup's update would paint (Sect. 4.3) with this network
fixed, for several weights lambda of Eq. 4 (0: E_o alone), which hold for the boxes of which the network recognizes at
least a share (0: for every box), taking the cheapest candidate or one of the five cheapest.
"""
import argparse
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import losses
from grabcut_labels import grabcut
from mcg_candidates import (METHODS, BadInput, box_iou, candidates_folder, check_classes, class_names, find_image,
                            find_voc, read_boxes, read_candidates, read_image, read_label, read_list, tight_boxes)
from model import full_size_logits, load_network
from train_boxsup import choose, paint, segments_of, truth_file


def object_scores(superpixels, members, truth, kind, box):
    """Superpixels (H, W), members (N, R), truth (H, W), where the object is `kind` -> seven numbers or None."""
    count = members.shape[1]
    inside = np.bincount(superpixels.ravel(), (truth == kind).ravel(), count)                     # (R,) true pixels
    known = np.bincount(superpixels.ravel(), (truth != 255).ravel(), count)                       # (R,) labelled pixels
    if not inside.any():
        return None
    ious = members @ inside / (members @ (known - inside) + inside.sum())                         # (N,)
    fit = np.argsort(-box_iou(box, tight_boxes(superpixels, members)), kind="stable")
    # The best union takes superpixels in order of their share of true pixels; somewhere in that order it stops.
    order = np.argsort(-inside / known.clip(1), kind="stable")
    limit = (inside[order].cumsum() / ((known - inside)[order].cumsum() + inside.sum())).max()
    return (ious.max(), ious[:1000].max(), ious[:300].max(), ious.max() >= 0.7, ious[fit[0]], ious[fit[:5]].max(),
            limit)


def measure(voc, ids, make, progress=True):
    """make(id, image, boxes) -> superpixels, list of members (N, R), one for all boxes or one a box.

    -> scores (objects, 7), candidates an image (M,), superpixels an image (M,), seconds an image (M,)
    """
    names, rows, candidates, superpixel_counts, seconds = class_names(voc), [], [], [], []
    for image_id in tqdm(ids, unit="image", disable=not progress):
        image = read_image(find_image(voc / "JPEGImages", image_id))
        boxes, kinds = read_boxes(voc / "Annotations" / f"{image_id}.xml", names, image.shape[:2])
        alone = [k for k in range(len(kinds)) if (kinds == kinds[k]).sum() == 1]
        if not alone:
            continue
        truth = read_label(truth_file(voc, image_id), image.shape[:2], len(names))
        began = time.process_time()
        made = [make(image_id, image, box) for box in (boxes[alone] if make in (whole_box, cut_box) else [None])]
        seconds.append(time.process_time() - began)
        for k, (superpixels, members) in zip(alone, made if len(made) == len(alone) else made * len(alone)):
            score = object_scores(superpixels, members, truth, kinds[k], boxes[k])
            if score is not None:
                rows.append(score)
        candidates.append(len(made[0][1]))
        superpixel_counts.append(made[0][1].shape[1])
    return np.array(rows, float).reshape(-1, 7), candidates, superpixel_counts, seconds


def whole_box(_, image, box):
    """The box itself as the one candidate, made of the superpixels outside and inside."""
    inside = np.zeros(image.shape[:2], np.int32)
    inside[box[1]:box[3], box[0]:box[2]] = 1
    return inside, np.array([[False, True]])


def cut_box(_, image, box):
    """The box's GrabCut as the one candidate."""
    return grabcut(image, box)[0].astype(np.int32), np.array([[False, True]])


def measure_choice(voc, ids, folder, network, settings, scale):
    """Label maps by Eq. 4, settings [(lambda, least share of a box that the network recognizes)] ->
    {(lambda, share, k): confusion matrix (C, C)}, that of the network's own prediction, and the shares recognized."""
    names, shares = class_names(voc), []
    matrices = {(*setting, k): torch.zeros(len(names), len(names), dtype=torch.int64)
                for setting in settings for k in (1, 5)}
    predicted = torch.zeros(len(names), len(names), dtype=torch.int64)
    for number, image_id in enumerate(tqdm(ids, unit="image")):
        image = read_image(find_image(voc / "JPEGImages", image_id))
        c = read_candidates(Path(folder) / f"{image_id}.npz", image.shape[:2], len(names))
        truth = torch.from_numpy(read_label(truth_file(voc, image_id), image.shape[:2], len(names)))
        there = {key: torch.from_numpy(value) for key, value in c.items()}
        with torch.inference_mode():
            logits = full_size_logits(network, torch.from_numpy(image), scale)                    # (C, H, W)
        predicted += losses.confusion_matrix(logits.argmax(0), truth, len(names))
        E_o = losses.overlap_cost(there["boxes"], there["candidate_boxes"])                       # (K, N)
        del there["candidate_boxes"]
        E_r = losses.regression_cost(logits, **there)                                             # (K, N)
        recognized = losses.recognized_share(logits, there["boxes"], there["classes"])            # (K,)
        shares += recognized.tolist()
        for (weight, share, k), matrix in matrices.items():
            cost = E_o + weight * (recognized >= share)[:, None] * E_r
            choice = choose(cost.numpy(), E_o.numpy() < 1, k, np.random.default_rng(number))
            labels = paint(truth.shape, c["boxes"], c["classes"], segments_of(choice, c))
            matrix += losses.confusion_matrix(torch.from_numpy(labels), truth, len(names))
    return matrices, predicted, np.array(shares)


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("--data", default="VOCdevkit", help="the VOCdevkit, or the VOC2012 folder in it")
    parser.add_argument("--split", default="val", help="list of ImageSets/Segmentation (default: val)")
    parser.add_argument("--method", choices=(*METHODS, "box", "grabcut"), default="mcg", help="default: mcg")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images of the list")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="not the first N images of the list")
    parser.add_argument("--candidates", metavar="DIR", help="read NPZ files of mcg_candidates.py, whatever --method")
    parser.add_argument("--checkpoint", metavar="FILE", help="what BoxSup's choice with this network makes of them")
    parser.add_argument("--lambda-r", type=float, nargs="+", default=[0, 0.3, 1, 3, 10], metavar="LAMBDA",
                        help="with --checkpoint (default: 0 0.3 1 3 10)")
    parser.add_argument("--min-recognized", type=float, nargs="+", default=[0, 0.3], metavar="SHARE",
                        help="with --checkpoint (default: 0 0.3)")
    parser.add_argument("--val-scale", type=float, help="with --checkpoint (default: as in its training)")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)

    voc = find_voc(args.data)
    ids = read_list(voc / "ImageSets" / "Segmentation" / f"{args.split}.txt")[args.skip:][:args.limit]
    if args.checkpoint:
        network, saved = load_network(args.checkpoint)
        if saved["class_names"] != class_names(voc):
            raise BadInput(f"{args.checkpoint}: trained on other classes ({' '.join(saved['class_names'])})")
        folder = args.candidates or candidates_folder(voc, args.method)
        check_classes(folder, class_names(voc))
        settings = [(weight, share) for share in args.min_recognized for weight in args.lambda_r]
        matrices, predicted, shares = measure_choice(
            voc, ids, folder, network, settings, args.val_scale or saved["args"]["val_scale"])
        score = {key: 100 * losses.iou(matrix).nanmean().item() for key, matrix in matrices.items()}
        print(f"{len(ids)} images; the network itself: {100 * losses.iou(predicted).nanmean().item():.1f} mIoU; "
              f"{len(shares)} boxes\n\n| boxes recognized by | share of boxes | lambda | cheapest | one of five |\n"
              "|---|---|---|---|---|")
        for weight, share in settings:
            print(f"| {share:g} | {(shares >= share).mean():.2f} | {weight:g} | {score[weight, share, 1]:.1f} | "
                  f"{score[weight, share, 5]:.1f} |")
        return
    if args.candidates:
        def make(image_id, image, _):
            found = read_candidates(Path(args.candidates) / f"{image_id}.npz", image.shape[:2])
            return found["superpixels"], found["members"]
    elif args.method in METHODS:
        def make(_, image, __):
            return METHODS[args.method](image)
    else:
        make = {"box": whole_box, "grabcut": cut_box}[args.method]
    scores, candidates, superpixels, seconds = measure(voc, ids, make)
    if not len(scores):
        raise BadInput(f"{voc}: no object of {args.split} is its class's only box and has a mask")
    best, first1000, first300, recall, top, five, limit = scores.mean(0)
    print(f"| {'method':8} | objects | candidates | superpixels | IoU all / first 1000 / first 300 | recall | "
          "top by box / best of five | limit | seconds |\n" + "|---" * 9 + "|")
    print(f"| {args.candidates or args.method:8} | {len(scores)} | {np.mean(candidates):.0f} "
          f"| {np.mean(superpixels):.0f} | {best:.3f} / {first1000:.3f} / {first300:.3f} | {recall:.2f} "
          f"| {top:.3f} / {five:.3f} | {limit:.3f} | {np.mean(seconds):.2f} |")


if __name__ == "__main__":
    try:
        main()
    except (BadInput, ValueError) as error:
        print(f"candidate_quality.py: {error}", file=sys.stderr)
        sys.exit(2)
