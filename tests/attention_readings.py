"""What each reading of Box2Seg's Eq. 3, 6, 8 and 11 does to attention, where the features are given: a table.

    python tests/attention_readings.py                                                  half a minute on one core

y and alpha are linear in fixed features that tell the classes apart, so that all that is left to see is the losses.
Six synthetic images of 16x16 pixels with two round objects of two classes each; B are their boxes; M misses two columns
of every object, as GrabCut may. SGD, 300 steps, the learning rate of three that gives the best mIoU (.002, .02, .2),
gradients clipped at a norm of 10. Reported: how much of the boxes attention fills (Eq. 8), and the mIoU of y with the
objects.

    Eq. 3    class   each class over its own box area, the reading of losses.foreground_loss
             total   all classes over the area of all boxes
    L_alpha  fr      the margin on Eq. 8, in which each class is divided by its own box area
             mean    Eq. 6 as the mean over pixels, the reading of losses.attention_box_loss
             sum     Eq. 6 as printed, the sum over all pixels
             M, B    none: attention is not learned, it is M or B
    Eq. 11   lambda_AW and lambda_alpha: 10 and 1 are printed
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import losses


def images(generator):
    """-> features (6, 5, 16, 16), boxes, masks, truth (6, 16, 16)."""
    row, column = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    boxes, truth = torch.zeros(2, 6, 16, 16, dtype=torch.long)
    for n in range(6):
        for corner, side, c in ((0, 8, n % 3 + 1), (7, 9, (n + 1) % 3 + 1)):
            boxes[n, corner:corner + side, corner:corner + side] = c
            centre = corner + (side - 1) / 2
            truth[n][(row - centre) ** 2 + (column - centre) ** 2 < 0.2 * side ** 2] = c
    masks = truth.clone()
    masks[:, :, [2, 3, 9, 10]] = 0
    noise = 0.3 * torch.randn(6, 4, 16, 16, generator=generator)
    features = F.one_hot(truth, 4).permute(0, 3, 1, 2) + noise
    return F.pad(features, (0, 0, 0, 0, 0, 1), value=1.0), boxes, masks, truth       # a fifth one for the biases


def total_foreground_loss(logits, alpha, boxes):
    log_y = F.log_softmax(logits, 1)[:, 1:]
    B = (boxes[:, None] == torch.arange(1, 4).view(1, -1, 1, 1)).float()
    return (-(alpha * B * log_y).sum((1, 2, 3)) / B.sum((1, 2, 3))).mean()


def sum_box_loss(alpha, boxes):
    return losses.attention_box_loss(alpha, boxes) * boxes[0].numel()


def train(lambda_aw, lambda_alpha, foreground, regularizer, rate):
    """-> mIoU in %, share of the boxes that attention fills."""
    generator = torch.Generator().manual_seed(0)
    features, boxes, masks, truth = images(generator)
    heads = [torch.zeros(channels, 5).normal_(std=0.01, generator=generator).requires_grad_() for channels in (4, 3)]
    optimizer = torch.optim.SGD(heads, lr=rate, momentum=0.9)
    for _ in range(300):
        logits, attention = (torch.einsum("cd,ndhw->nchw", head, features) for head in heads)
        alpha = attention.sigmoid()
        if regularizer in ("M", "B"):
            alpha = F.one_hot(masks if regularizer == "M" else boxes, 4).permute(0, 3, 1, 2)[:, 1:].float()
        loss = losses.cross_entropy_loss(logits, masks)
        if lambda_aw:
            fg = losses.foreground_loss if foreground == "class" else total_foreground_loss
            loss = loss + lambda_aw * (fg(logits, alpha, boxes) + losses.background_loss(logits, boxes))
            loss = loss + lambda_alpha * {"fr": lambda: losses.fill_rate_loss(alpha, boxes, masks),
                                          "mean": lambda: losses.attention_box_loss(alpha, boxes),
                                          "sum": lambda: sum_box_loss(alpha, boxes),
                                          "M": lambda: 0, "B": lambda: 0}[regularizer]()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(heads, 10.0)
        optimizer.step()
    filled = losses.attention_fill_rate(alpha, boxes).sum() / losses.fill_rate(boxes, boxes, 4).sum()
    score = losses.iou(losses.confusion_matrix(logits.argmax(1), truth, 4)).nanmean()
    return 100 * score.item(), filled.item()


def best(*setting):
    return max(train(*setting, rate) for rate in (0.002, 0.02, 0.2))


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    print("| Eq. 3 | L_alpha | lambda_AW, lambda_alpha | attention fills | mIoU |\n|---|---|---|---|---|")
    print(f"| L_GC alone | | | | {best(0, 0, 'class', 'fr')[0]:.1f} |")
    for foreground in ("class", "total"):
        for regularizer in ("fr", "mean", "sum", "M", "B"):
            for lambda_aw, lambda_alpha in ((10, 1), (1, 5)):
                score, filled = best(lambda_aw, lambda_alpha, foreground, regularizer)
                print(f"| {foreground} | {regularizer} | {lambda_aw}, {lambda_alpha} | {filled:.2f} | {score:.1f} |",
                      flush=True)


if __name__ == "__main__":
    main()
