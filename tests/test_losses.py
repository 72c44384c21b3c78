"""
losses.py against examples worked by hand, naive loops, finite differences, and the promises in its own docstring.

Run:    python -m pytest tests/test_losses.py
Reads:  losses.py
Writes: nothing
Expect: all passed, in about ten seconds of one core's time.

Order: 1 by hand   2 against naive loops   3 gradients   4 what holds for every loss (ignored pixels, nothing to sum,
       precision, memory layout, no waiting, pasted alone)   5 Eq. 10's draws   6 attention does not collapse
       7 BoxSup's costs   8 metric
"""
import ast
import inspect
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import losses

LN2 = math.log(2)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# 1. By hand: one image of four pixels, a b / c d, and L = 2 classes
# ---------------------------------------------------------------------------------------------------------------------
#
#          y: background  class 1  class 2      alpha: class 1  class 2      B    M      embedding
#     a          1/4        1/2      1/4               1/2        0          1    1       (1, 0)
#     b          1/2        1/4      1/4                1        1/2         1    0       (0, 1)
#     c          1/2        1/4      1/4               1/4        0          0    0       (0, 3)
#     d          1/8        1/8      3/4                0        1/3         2    2       (2, 0)

def picture(rows):
    """[a, b, c, d], each a list of channel values -> (1, channels, 2, 2) float64."""
    return torch.tensor(rows, dtype=torch.float64).T.reshape(1, -1, 2, 2)


LOGITS = picture([[1 / 4, 1 / 2, 1 / 4], [1 / 2, 1 / 4, 1 / 4], [1 / 2, 1 / 4, 1 / 4], [1 / 8, 1 / 8, 3 / 4]]).log() + 5
ALPHA = picture([[1 / 2, 0], [1, 1 / 2], [1 / 4, 0], [0, 1 / 3]])
BETA = picture([[1, 0], [0, 1], [0, 3], [2, 0]])
B = torch.tensor([[[1, 1], [0, 2]]])
M = torch.tensor([[[1, 0], [0, 2]]])


def is_close(value, expected):
    return torch.allclose(torch.as_tensor(value, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64),
                          rtol=0, atol=1e-6)


def test_cross_entropy_by_hand():
    """-log y of the label: a ln 2, b 2 ln 2, c ln 2, d ln 4/3. The +5 on all logits must not matter.
    L_box = (ln 2 + 2 ln 2 + ln 2 + 2 ln 2 - ln 3) / 4 = (6 * 0.693147 - 1.098612) / 4 = 0.765068
    With M, b is background and costs ln 2:  L_GC = (5 * 0.693147 - 1.098612) / 4 = 0.591781
    With d unlabelled the mean is over three: 4 ln 2 / 3 = 0.924196; of a alone it is ln 2.
    """
    assert is_close(losses.cross_entropy_loss(LOGITS, B), 0.765068)
    assert is_close(losses.cross_entropy_loss(LOGITS, M), 0.591781)
    assert is_close(losses.cross_entropy_loss(LOGITS, torch.tensor([[[1, 1], [0, 255]]])), 0.924196)
    assert is_close(losses.cross_entropy_loss(LOGITS, torch.tensor([[[1, 255], [255, 255]]])), LN2)


def test_foreground_by_hand():
    """class 1, box {a, b}: (1/2 * ln 2 + 1 * 2 ln 2) / 2 = 1.25 ln 2 = 0.866434
    class 2, box {d}:    (1/3 * ln 4/3) / 1 = 0.095894         sum 0.962328
    Attention outside the boxes (c's 1/4, b's 1/2 for class 2) counts for nothing.
    """
    assert is_close(losses.foreground_loss(LOGITS, ALPHA, B), 0.962328)


def test_background_by_hand():
    """Only c lies outside all boxes: ln 2. With b outside as well, and y(b, 0) = 1/2: (ln 2 + ln 2) / 2, the same;
    with a outside, y(a, 0) = 1/4:  (2 ln 2 + ln 2) / 2 = 1.039721
    """
    assert is_close(losses.background_loss(LOGITS, B), LN2)
    assert is_close(losses.background_loss(LOGITS, torch.tensor([[[0, 1], [0, 2]]])), 1.039721)


def test_attention_weighted_by_hand():
    """L_fg + L_bg = 0.962328 + 0.693147"""
    assert is_close(losses.attention_weighted_loss(LOGITS, ALPHA, B), 1.655475)


def test_attention_box_by_hand():
    """class 1: B = 1 1 0 0, alpha = 1/2 1 1/4 0: 1/4 + 0 + 1/16 + 0; class 2: B = 0 0 0 1, alpha = 0 1/2 0 1/3:
    0 + 1/4 + 0 + 4/9. Sum 1.006944 over 4 pixels: 0.251736. With b unlabelled, (1.006944 - 1/4) / 3 = 0.252315
    """
    assert is_close(losses.attention_box_loss(ALPHA, B), 0.251736)
    assert is_close(losses.attention_box_loss(ALPHA, torch.tensor([[[1, 255], [0, 2]]])), 0.252315)


def test_fill_rate_by_hand():
    """class 1: M has a of the box {a, b}: 1/2; class 2: d of {d}: 1; class 3 has no box: 0.
    M's class 1 in the box of class 2 (overlapping boxes) counts for neither; unlabelled pixels leave both sums.
    """
    assert losses.fill_rate(M, B, 4).tolist() == [[0.5, 1, 0]]
    assert losses.fill_rate(torch.tensor([[[1, 0], [0, 1]]]), B, 3).tolist() == [[0.5, 0]]
    assert losses.fill_rate(torch.tensor([[[1, 255], [0, 2]]]), B, 3).tolist() == [[1, 1]]
    assert losses.fill_rate(M, torch.tensor([[[1, 255], [0, 2]]]), 3).tolist() == [[1, 1]]


def test_attention_fill_rate_by_hand():
    """class 1: (1/2 + 1) / 2 = 3/4 over {a, b}; class 2: 1/3 over {d}"""
    assert is_close(losses.attention_fill_rate(ALPHA, B), [[3 / 4, 1 / 3]])


def test_fill_rate_loss_by_hand():
    """max(0, 0.7 * 1/2 - 3/4) + max(0, 0.7 * 1 - 1/3) = 0 + 0.366667 at the paper's gamma, the default.
    At gamma = 1 the first is still 0, and the second 2/3.
    """
    assert is_close(losses.fill_rate_loss(ALPHA, B, M), 0.366667)
    assert is_close(losses.fill_rate_loss(ALPHA, B, M, gamma=1.0), 2 / 3)


def test_affinity_by_hand():
    """(3, 4) and (4, 3): 24 / 25 = 0.96; (3, 4) and (-4, 3): 0; with itself 1, with its opposite -1. Length is nothing.
    """
    a = torch.tensor([[3.0, 4.0], [30.0, 40.0]])
    b = torch.tensor([[4.0, 3.0], [-4.0, 3.0], [3.0, 4.0], [-0.3, -0.4]])
    assert is_close(losses.affinity(a, b), [[0.96, 0, 1, -1], [0.96, 0, 1, -1]])
    assert losses.affinity(torch.randn(5, 3, 7, 4), torch.randn(5, 3, 6, 4)).shape == (5, 3, 7, 6)


def test_pair_samples_by_hand():
    """S^2 pairs of m^2:   one class of 4 pixels, fraction 1/4: S = 1/2 * 4 = 2 draws, 4 pairs of 16
    two classes on 3 labelled pixels, fraction 1: 3 draws shared by 2 classes are 1.5 each, 2 rounded
    10 % (the default, Sect. 4.1) of a 100 x 100 image in 4 classes: sqrt(0.1) * 10000 / 4 = 790.57
    nothing labelled: 1
    """
    assert losses.pair_samples(torch.zeros(1, 2, 2, dtype=torch.long), 3, fraction=0.25).tolist() == [2]
    assert losses.pair_samples(torch.tensor([[[1, 1], [0, 255]]]), 3, fraction=1.0).tolist() == [2]
    assert losses.pair_samples(torch.arange(10000).view(1, 100, 100) % 4, 21).tolist() == [791]
    assert losses.pair_samples(torch.full((2, 2, 2), 255), 3).tolist() == [1, 1]


def test_affinity_loss_by_hand():
    """Stage 1, y = one-hot labels 1 1 / 0 0, embeddings (1, 0) (3, 4) / (0, 2) (5, 0); 2 draws a class draw all 4 once:
        pair     ab     ac    ad    bc     bd     cd
        A        0.6    0     1     0.8    0.6    0
        target   1      0     0     0      0      1
        square   0.16   0     1     0.64   0.36   1        3.16 / 6 = 0.526667
    Labels 1 1 / 1 0 and 3 draws a class: a, b, c once, d three times, so a pair with d counts three times:
        target   1      1     0     1      0      0
        square   0.16   1     1     0.04   0.36   0        (0.16 + 1 + 0.04 + 3 * (1 + 0.36 + 0)) / (3 + 3 * 3) = 0.44
    """
    beta = picture([[1, 0], [3, 4], [0, 2], [5, 0]])
    labels = torch.tensor([[[1, 1], [0, 0]]])
    assert is_close(losses.affinity_loss(beta, one_hot(labels, 3), labels, 2), 0.526667)
    labels = torch.tensor([[[1, 1], [1, 0]]])
    assert is_close(losses.affinity_loss(beta, one_hot(labels, 3), labels, 3), 0.44)


def test_box2seg_by_hand():
    """L_GC = 0.591781, L_AW = 1.655475, L_alpha = 0.366667 as above. L_A, drawn by M = 1 0 / 0 2, two draws a class:
    b and c once, a and d twice. y_a.y_b = 1/8 + 1/8 + 1/16 = 5/16, y_b.y_c = 1/4 + 1/16 + 1/16 = 3/8,
    y_a.y_d = 1/32 + 1/16 + 3/16 = 9/32, y_b.y_d = 1/16 + 1/32 + 3/16 = 9/32, and c is as b.
        pair        ab       ac       ad       bc       bd       cd
        draws       2        2        4        1        2        2         13 in all
        A           0        0        1        1        0        0
        y.y         5/16     5/16     9/32     3/8      9/32     9/32
        of 1/256    2*25     2*25     4*132.25 100      2*20.25  2*20.25   810 / 256 / 13 = 0.243389
    Eq. 11 at the paper's weights 10, 1, 1:  0.591781 + 16.554752 + 0.366667 + 0.243389 = 17.756589
    At ours, 1, 5, 1, the default:           0.591781 + 1.655475 + 1.833333 + 0.243389 = 4.323978
    With Eq. 6 (0.251736) and 2, 3, 4:  0.591781 + 3.310950 + 0.755208 + 0.973558 = 5.631497
    """
    assert is_close(losses.box2seg_loss(LOGITS, ALPHA, BETA, B, M, num_samples=2)[0], 4.323978)
    total, terms = losses.box2seg_loss(LOGITS, ALPHA, BETA, B, M, num_samples=2, lambda_aw=10, lambda_alpha=1)
    assert list(terms) == ["L_GC", "L_AW", "L_alpha", "L_A"]
    assert is_close(list(terms.values()), [0.591781, 1.655475, 0.366667, 0.243389])
    assert is_close(total, 17.756589)
    total, terms = losses.box2seg_loss(LOGITS, ALPHA, BETA, B, M, 2, lambda_aw=2, lambda_alpha=3, lambda_a=4,
                                       regularizer="box")
    assert is_close(total, 5.631497)


def test_filling_rate_by_hand():
    """B = 1 1 / 0 1: y(., 1) is 1/2 at a, 1/4 at b, 1/8 at d. A rate of 2/3 keeps a and b; c is background:
    (ln 2 + 2 ln 2 + ln 2) / 3 = 4/3 ln 2;  1/3 keeps a:  (ln 2 + ln 2) / 2 = ln 2
    """
    boxes = torch.tensor([[[1, 1], [0, 1]]])
    assert is_close(losses.filling_rate_loss(LOGITS, boxes, torch.tensor([2 / 3, 0.0])), 4 / 3 * LN2)
    assert is_close(losses.filling_rate_loss(LOGITS, boxes, torch.tensor([[1 / 3, 0.0]])), LN2)


# BoxSup: an image of six pixels, L = 2, three superpixels, two boxes that share pixel e, and four segments
#
#     a b c     superpixels  0 0 1     box 0, class 1: a b d e     segments  0: a b    1: a b d e     2: c f     3: none
#     d e f                  2 2 1     box 1, class 2: e f
#
#               a  b  c  d  e  f
#     y of 0    2  1  1  3  2  2     as minus the binary logarithm: what labelling the pixel so costs, in units of ln 2
#     y of 1    1  3  2  1
#     y of 2                3  1

def boxsup_by_hand():
    bits = torch.tensor([[[2, 1, 1], [3, 2, 2]], [[1, 3, 2], [1, 0, 0]], [[0, 0, 2], [0, 3, 1]]], dtype=torch.float64)
    y = 2 ** -bits
    y[2, 0, :2], y[2, 1, 0], y[1, 1, 1:] = 1 - y[:2, 0, :2].sum(0), 1 - y[:2, 1, 0].sum(), 1 - y[[0, 2], 1, 1:].sum(0)
    assert (y > 0).all() and torch.equal(y.sum(0), torch.ones(2, 3, dtype=torch.float64))
    return dict(logits=y.log() + 5, superpixels=torch.tensor([[0, 0, 1], [2, 2, 1]]),
                members=torch.tensor([[1, 0, 0], [1, 0, 1], [0, 1, 0], [0, 0, 0]]).bool(),
                boxes=torch.tensor([[0, 0, 2, 2], [1, 1, 3, 2]]), classes=torch.tensor([1, 2]))


CANDIDATE_BOXES = torch.tensor([[0, 0, 2, 1], [0, 0, 2, 2], [2, 0, 3, 2], [0, 0, 0, 0]])


def test_overlap_cost_by_hand():
    """box 0, 2 x 2: IoU 2/4 with a b, 1 with a b d e, none with c f nor with the empty segment
    box 1, 2 x 1: none with a b; e of a b d e: 1 / (4 + 2 - 1); f of c f: 1 / (2 + 2 - 1)
    """
    costs = losses.overlap_cost(boxsup_by_hand()["boxes"], CANDIDATE_BOXES)
    assert costs.dtype == torch.float32
    assert is_close(costs, [[1 / 2, 0, 1, 1], [1, 4 / 5, 2 / 3, 1]])


def test_regression_cost_by_hand():
    """e is in both boxes, so it is box 1's, the smaller's. Box 0 is left with a, b, d; class 1 in the segment,
    background outside:
        a b: 1 + 3 + 3 = 7      a b d e: 1 + 3 + 1 = 5      c f and none: 2 + 1 + 3 = 6         ln 2 / 6 of it
    Box 1 has e and f:
        a b and none: 2 + 2 = 4             a b d e: 3 + 2 = 5          c f: 2 + 1 = 3
    """
    x = boxsup_by_hand()
    assert is_close(6 * losses.regression_cost(**x) / LN2, [[7, 5, 6, 6], [4, 5, 3, 4]])


def test_recognized_share_by_hand():
    """Two boxes of an image of 4 x 5 pixels, classes 1 and 2, in a network that calls the two left columns 1, the rest
    2. The first, 3 x 2 pixels from x = 1, has its left column called 1: 3 of 6 pixels. The second lies where all is 1:
    0 of 4. The third, of class 2, covers the image: 12 of 20. A box of no pixel has 0."""
    logits = torch.zeros(3, 4, 5)
    logits[1, :, :2] = logits[2, :, 2:] = 1
    boxes = torch.tensor([[1, 0, 3, 3], [0, 1, 2, 3], [0, 0, 5, 4], [2, 2, 2, 3]])
    share = losses.recognized_share(logits, boxes, torch.tensor([1, 2, 2, 1], dtype=torch.uint8))
    assert share.tolist() == pytest.approx([3 / 6, 0, 12 / 20, 0])


def test_a_weight_for_each_box():
    """candidate_cost with weights (K, 1) is its rows with each weight alone."""
    x = scene(0)
    arguments = x.logits[0], x.superpixels, x.members, x.candidate_boxes, x.boxes, x.classes
    weights = torch.arange(len(x.boxes)).float()[:, None]
    cost = losses.candidate_cost(*arguments, weight=weights)
    for k, weight in enumerate(weights[:, 0].tolist()):
        assert torch.equal(cost[k], losses.candidate_cost(*arguments, weight=weight)[k])


def test_candidate_cost_by_hand():
    """E_o + 3 E_r, the paper's lambda by default: 1/2 + 7/2 ln 2 = 2.926015, 5/2 ln 2 = 1.732868, ...; lambda = 1:
    1/2 + 7/6 ln 2 = 1.308672, ..., 1 + 4/6 ln 2 = 1.462098, ...; before the first epoch E_o alone."""
    x = boxsup_by_hand() | dict(candidate_boxes=CANDIDATE_BOXES)
    assert is_close(losses.candidate_cost(**x), [[2.926015, 1.732868, 3.079442, 3.079442],
                                                 [2.386294, 2.532868, 1.706387, 2.386294]])
    assert is_close(losses.candidate_cost(**x, weight=1), [[1.308672, 0.577623, 1.693147, 1.693147],
                                                           [1.462098, 1.377623, 1.013240, 1.462098]])
    assert is_close(losses.candidate_cost(**x | dict(logits=None)), [[1 / 2, 0, 1, 1], [1, 4 / 5, 2 / 3, 1]])


def test_confusion_matrix_and_iou_by_hand():
    """truth 0 1 / 1 255, prediction 0 0 / 1 0: one background right, one of class 1 taken for background, one right;
    the unlabelled pixel counts nowhere. IoU: 0: 1 / (1 + 2 - 1) = 1/2;  1: 1 / (2 + 1 - 1) = 1/2;  2 does not occur.
    """
    confusion = losses.confusion_matrix(torch.tensor([[0, 0], [1, 0]]), torch.tensor([[0, 1], [1, 255]]), 3)
    assert confusion.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert losses.iou(confusion)[:2].tolist() == [0.5, 0.5] and losses.iou(confusion)[2].isnan()


# ---------------------------------------------------------------------------------------------------------------------
# Random input for all that follows
# ---------------------------------------------------------------------------------------------------------------------

def one_hot(labels, num_classes):
    """(N, h, w) -> (N, C, h, w) float64, all zero where unlabelled."""
    return (labels[:, None] == torch.arange(num_classes).view(1, -1, 1, 1)).double()


def scene(seed=0, dtype=torch.float64):
    """Four images, L = 3. 0: overlapping boxes of classes 1 and 2, padding below; 1: boxes of 3 and 1, padding on the
    left; 2: no box; 3: wholly unlabelled. M is B less some pixels, more of class 1 where the boxes overlap, and
    unlabelled at two pixels that B labels (VOC's object borders). For BoxSup, the logits of image 0: 7 superpixels,
    9 segments, one of them empty, 4 boxes, the second inside the first and the third across both.
    """
    g, h, w, d = seeded(seed), 5, 6, 4
    boxes = torch.zeros(4, h, w, dtype=torch.long)
    boxes[0, :4, :4], boxes[0, 2:4, 3:], boxes[0, 4:] = 1, 2, 255
    boxes[1, 1:4, 1:3], boxes[1, :2, 4:], boxes[1, :, 0] = 3, 1, 255
    boxes[2, :, 5] = 255
    boxes[3] = 255
    lost = (torch.rand(boxes.shape, generator=g) < 0.4) & (boxes != 255)
    masks = torch.where(lost, 0, boxes)
    masks[0, 3, 3], masks[0, 1, 1], masks[1, 2, 1] = 1, 255, 255
    logits = 2 * torch.randn(4, 4, h, w, generator=g, dtype=torch.float64)
    g2 = seeded(100 + seed)
    members = torch.rand(9, 7, generator=g2) < 0.5
    members[4] = False
    corners = torch.rand(9, 2, 4, generator=g2).argsort(2)[:, :, :2].sort(2).values    # x0 < x1 and y0 < y1, of 0..3
    return SimpleNamespace(
        logits=logits.to(dtype),
        alpha=torch.rand(4, 3, h, w, generator=g, dtype=torch.float64).to(dtype),
        embeddings=torch.randn(4, d, h, w, generator=g, dtype=torch.float64).to(dtype),
        targets=torch.randn(4, 4, h, w, generator=g, dtype=torch.float64).softmax(1).to(dtype),
        box_labels=boxes, mask_labels=masks,
        rates=torch.tensor([0.617, 0.283, 0.441]),
        superpixels=torch.randint(7, (h, w), generator=g2), members=members,
        candidate_boxes=corners.mT.flatten(1).to(dtype),
        boxes=torch.tensor([[0, 0, 5, 4], [1, 1, 3, 3], [2, 2, 6, 5], [5, 0, 6, 1]], dtype=dtype),
        classes=torch.tensor([1, 3, 2, 1]))


# How each function is called on a scene. A new function in losses.py wants a line here: see test_pasted_alone.
CALLS = {
    "cross_entropy_loss": lambda f, x: f(x.logits, x.box_labels),
    "foreground_loss": lambda f, x: f(x.logits, x.alpha, x.box_labels),
    "background_loss": lambda f, x: f(x.logits, x.box_labels),
    "attention_weighted_loss": lambda f, x: f(x.logits, x.alpha, x.box_labels),
    "attention_box_loss": lambda f, x: f(x.alpha, x.box_labels),
    "fill_rate": lambda f, x: f(x.mask_labels, x.box_labels, 4),
    "attention_fill_rate": lambda f, x: f(x.alpha, x.box_labels),
    "fill_rate_loss": lambda f, x: f(x.alpha, x.box_labels, x.mask_labels),
    "affinity": lambda f, x: f(x.embeddings.flatten(2).transpose(1, 2), x.targets.flatten(2).transpose(1, 2)),
    "pair_samples": lambda f, x: f(x.mask_labels, 4, 0.3),
    "affinity_loss": lambda f, x: f(x.embeddings, x.targets, x.mask_labels, 5, seeded(3)),
    "box2seg_loss": lambda f, x: f(x.logits, x.alpha, x.embeddings, x.box_labels, x.mask_labels, 5,
                                   generator=seeded(3))[0],
    "filling_rate_loss": lambda f, x: f(x.logits, x.box_labels, x.rates),
    "overlap_cost": lambda f, x: f(x.boxes, x.candidate_boxes),
    "regression_cost": lambda f, x: f(x.logits[0], x.superpixels, x.members, x.boxes, x.classes),
    "recognized_share": lambda f, x: f(x.logits[0], x.boxes, x.classes),
    "candidate_cost": lambda f, x: f(x.logits[0], x.superpixels, x.members, x.candidate_boxes, x.boxes, x.classes),
    "confusion_matrix": lambda f, x: f(x.logits.argmax(1), x.mask_labels, 4),
    "iou": lambda f, x: f(losses.confusion_matrix(x.logits.argmax(1), x.mask_labels, 4)),
}

# The losses: the inputs that get gradient, and the label maps, all of which must say 255 for a pixel to be ignored.
TRAINED = {
    "cross_entropy_loss": (["logits"], ["box_labels"]),
    "foreground_loss": (["logits", "alpha"], ["box_labels"]),
    "background_loss": (["logits"], ["box_labels"]),
    "attention_weighted_loss": (["logits", "alpha"], ["box_labels"]),
    "attention_box_loss": (["alpha"], ["box_labels"]),
    "fill_rate_loss": (["alpha"], ["box_labels"]),
    "affinity_loss": (["embeddings", "targets"], ["mask_labels"]),
    "box2seg_loss": (["logits", "alpha", "embeddings"], ["box_labels", "mask_labels"]),
    "filling_rate_loss": (["logits"], ["box_labels"]),
}
each_loss = pytest.mark.parametrize("name", TRAINED)
each_function = pytest.mark.parametrize("name", [n for n in CALLS if n not in ("confusion_matrix", "iou")])


def call(name, x):
    return CALLS[name](getattr(losses, name), x)


def edit(x, **changes):
    return SimpleNamespace(**{**vars(x), **changes})


def value_and_gradients(name, x):
    """(the loss, one gradient for each input that gets some)"""
    x = edit(x, **{n: getattr(x, n).detach().clone().requires_grad_() for n in TRAINED[name][0]})
    loss = call(name, x)
    return loss, torch.autograd.grad(loss, [getattr(x, n) for n in TRAINED[name][0]])


# ---------------------------------------------------------------------------------------------------------------------
# 2. Against naive loops: pixel by pixel, in Python floats, each equation as it is printed
# ---------------------------------------------------------------------------------------------------------------------

def naive_log_y(logits):
    """[n][i][j][c]"""
    def log_softmax(z):
        total = sum(math.exp(v) for v in z)
        return [math.log(math.exp(v) / total) for v in z]
    return [[[log_softmax(z) for z in row] for row in image] for image in logits.permute(0, 2, 3, 1).tolist()]


def pixels(label_map, wanted):
    """The (i, j) of an (h, w) map where wanted(label)."""
    return [(i, j) for i, row in enumerate(label_map.tolist()) for j, label in enumerate(row) if wanted(label)]


def share(sums, count):
    return sums / count if count else 0.0


def naive_cross_entropy_loss(x):
    log_y, total, count = naive_log_y(x.logits), 0.0, 0
    for n, label_map in enumerate(x.box_labels):
        for i, j in pixels(label_map, lambda label: label != 255):
            total -= log_y[n][i][j][label_map[i, j]]
            count += 1
    return share(total, count)


def naive_foreground_loss(x):
    log_y, total = naive_log_y(x.logits), 0.0
    for n, label_map in enumerate(x.box_labels):
        for c in range(1, 4):
            box = pixels(label_map, lambda label: label == c)
            total += share(sum(-x.alpha[n, c - 1, i, j].item() * log_y[n][i][j][c] for i, j in box), len(box))
    return total / len(x.box_labels)


def naive_background_loss(x):
    log_y, total = naive_log_y(x.logits), 0.0
    for n, label_map in enumerate(x.box_labels):
        outside = pixels(label_map, lambda label: label == 0)
        total += share(sum(-log_y[n][i][j][0] for i, j in outside), len(outside))
    return total / len(x.box_labels)


def naive_attention_weighted_loss(x):
    return naive_foreground_loss(x) + naive_background_loss(x)


def naive_attention_box_loss(x):
    total = 0.0
    for n, label_map in enumerate(x.box_labels):
        labelled, squares = pixels(label_map, lambda label: label != 255), 0.0
        for i, j in labelled:
            for c in range(1, 4):
                b = 1.0 if label_map[i, j] == c else 0.0
                squares += (b - x.alpha[n, c - 1, i, j].item()) ** 2
        total += share(squares, len(labelled))
    return total / len(x.box_labels)


def naive_fill_rate(x):
    rates = [[0.0] * 3 for _ in x.box_labels]
    for n, label_map in enumerate(x.box_labels):
        for c in range(1, 4):
            box = [(i, j) for i, j in pixels(label_map, lambda label: label == c) if x.mask_labels[n, i, j] != 255]
            rates[n][c - 1] = share(sum(1 for i, j in box if x.mask_labels[n, i, j] == c), len(box))
    return rates


def naive_attention_fill_rate(x):
    rates = [[0.0] * 3 for _ in x.box_labels]
    for n, label_map in enumerate(x.box_labels):
        for c in range(1, 4):
            box = pixels(label_map, lambda label: label == c)
            rates[n][c - 1] = share(sum(x.alpha[n, c - 1, i, j].item() for i, j in box), len(box))
    return rates


def naive_fill_rate_loss(x):
    x = SimpleNamespace(**vars(x) | {"box_labels": x.box_labels.masked_fill(x.mask_labels == 255, 255)})
    pairs = zip(naive_fill_rate(x), naive_attention_fill_rate(x))
    return sum(max(0.0, 0.7 * eta - eta_prime) for image in pairs for eta, eta_prime in zip(*image)) / len(x.box_labels)


def naive_affinity(x):
    def cosine(p, q):
        return sum(a * b for a, b in zip(p, q)) / math.sqrt(sum(a * a for a in p)) / math.sqrt(sum(b * b for b in q))
    first, second = (t.flatten(2).transpose(1, 2).tolist() for t in (x.embeddings, x.targets))
    return [[[cosine(p, q) for q in second[n]] for p in first[n]] for n in range(len(first))]


def naive_pair_samples(x):
    samples = []
    for label_map in x.mask_labels:
        present = [label for label in label_map.flatten().tolist() if label != 255]
        samples.append(max(1, round(math.sqrt(0.3) * len(present) / max(1, len(set(present))))))
    return samples


def naive_filling_rate_loss(x):
    log_y, kept = naive_log_y(x.logits), x.box_labels.clone()
    for n, label_map in enumerate(x.box_labels):
        for c in range(1, 4):
            box = pixels(label_map, lambda label: label == c)
            box.sort(key=lambda p: -log_y[n][p[0]][p[1]][c])                             # the most confident first
            for i, j in box[round(x.rates[c - 1].item() * len(box)):]:
                kept[n, i, j] = 255
    return naive_cross_entropy_loss(edit(x, box_labels=kept))


def naive_overlap_cost(x):
    def box_pixels(box):
        x0, y0, x1, y1 = (int(v) for v in box)
        return {(i, j) for i in range(y0, y1) for j in range(x0, x1)}
    box_sets, segment_sets = ([box_pixels(b) for b in boxes.tolist()] for boxes in (x.boxes, x.candidate_boxes))
    return [[1 - len(b & s) / len(b | s) for s in segment_sets] for b in box_sets]


def naive_regression_cost(x):
    log_y, costs = naive_log_y(x.logits)[0], []
    boxes, ids, members = x.boxes.tolist(), x.superpixels.tolist(), x.members.tolist()
    for k, c in enumerate(x.classes.tolist()):
        mine = []
        for i, row in enumerate(ids):
            for j, _ in enumerate(row):
                around = [((x1 - x0) * (y1 - y0), -m) for m, (x0, y0, x1, y1) in enumerate(boxes)
                          if x0 <= j < x1 and y0 <= i < y1]
                if around and min(around)[1] == -k:                                      # the smallest, the last
                    mine.append((i, j))
        costs.append([sum(-log_y[i][j][c if segment[ids[i][j]] else 0] for i, j in mine) / (len(ids) * len(ids[0]))
                      for segment in members])
    return costs


def naive_recognized_share(x):
    called, shares = x.logits[0].argmax(0).tolist(), []
    for (x0, y0, x1, y1), c in zip(x.boxes.int().tolist(), x.classes.tolist()):
        inside = [called[i][j] == c for i in range(y0, y1) for j in range(x0, x1)]
        shares.append(sum(inside) / len(inside))
    return shares


def naive_candidate_cost(x):
    return [[o + 3 * r for o, r in zip(*rows)] for rows in zip(naive_overlap_cost(x), naive_regression_cost(x))]


NAIVE = {name: globals()["naive_" + name] for name in CALLS if "naive_" + name in globals()}
# Eq. 10 and 11 have a section of their own (5), the metric too (8)
assert set(CALLS) - set(NAIVE) == {"affinity_loss", "box2seg_loss", "confusion_matrix", "iou"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAIVE)
def test_against_naive_loop(name, seed):
    x = scene(seed)
    if seed == 2:  # labels without any order, as after a crop through many small boxes
        x.box_labels = torch.tensor([0, 1, 2, 3, 255])[torch.randint(5, x.box_labels.shape, generator=seeded(9))]
        x.mask_labels = torch.tensor([0, 1, 2, 3, 255])[torch.randint(5, x.box_labels.shape, generator=seeded(10))]
    tolerance = 1e-7 if "fill_rate" in name else 1e-12              # fill_rate is float32: it counts pixels
    expected = torch.tensor(NAIVE[name](x), dtype=torch.float64)
    assert torch.allclose(call(name, x).double(), expected, rtol=tolerance, atol=tolerance)


def test_filling_rates_per_image():
    """(N, L) rates: each image has its own, so the batch is as its images one by one, weighted by the pixels kept."""
    x = edit(scene(), rates=torch.tensor([[0.617, 0.283, 0.441], [0.9, 0.1, 0.2], [0.5, 0.5, 0.5], [0, 1, 0]]))
    total, count = 0.0, 0
    for n in range(4):
        one = edit(x, logits=x.logits[n:n + 1], box_labels=x.box_labels[n:n + 1], rates=x.rates[n])
        areas = [(one.box_labels == c).sum().item() for c in range(4)]
        kept = areas[0] + sum(round(rate * area) for rate, area in zip(one.rates.tolist(), areas[1:]))
        total += naive_filling_rate_loss(one) * kept
        count += kept
    assert torch.allclose(call("filling_rate_loss", x), torch.tensor(total / count, dtype=torch.float64), atol=1e-12)


def test_filling_rates_in_half_precision():
    """rates * area is no half-precision number: 0.75 of 90,000 pixels is above float16's largest, 65,504."""
    logits, labels = torch.randn(1, 2, 300, 300, generator=seeded(0)), torch.ones(1, 300, 300, dtype=torch.int64)
    loss = losses.filling_rate_loss(logits, labels, torch.tensor([0.75]))
    for half in (torch.float16, torch.bfloat16):
        assert torch.equal(losses.filling_rate_loss(logits, labels, torch.tensor([0.75], dtype=half)), loss)


def test_filling_rates_of_1_keep_all_pixels_however_unsure():
    logits = 300 * torch.randn(1, 3, 6, 6)
    labels = torch.where(torch.arange(36).view(1, 6, 6) % 5 == 0, 1, 2)
    torch.testing.assert_close(losses.filling_rate_loss(logits, labels, torch.ones(2)),
                               losses.cross_entropy_loss(logits, labels))


def test_filling_rate_ends():
    """All pixels kept is Eq. 1; none kept leaves the background."""
    x = scene()
    assert torch.equal(losses.filling_rate_loss(x.logits, x.box_labels, torch.ones(3)),
                       losses.cross_entropy_loss(x.logits, x.box_labels))
    outside = torch.where(x.box_labels == 0, 0, 255)
    assert torch.equal(losses.filling_rate_loss(x.logits, x.box_labels, torch.zeros(3)),
                       losses.cross_entropy_loss(x.logits, outside))


def test_filling_rate_ties():
    """Equal confidences: the first pixels in reading order are kept, always. (A sort that is not stable gets this
    right by luck on a dozen pixels, not on 300.)"""
    logits = torch.zeros(1, 2, 15, 20, requires_grad=True)
    losses.filling_rate_loss(logits, torch.ones(1, 15, 20, dtype=torch.long), torch.tensor([0.4])).backward()
    assert (logits.grad[0, 0].flatten() != 0).tolist() == [True] * 120 + [False] * 180


# ---------------------------------------------------------------------------------------------------------------------
# 3. Gradients
# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [*TRAINED, "attention_fill_rate", "affinity"])
def test_gradcheck(name):
    """Against finite differences. No input lies on a kink: |gamma eta - eta'| and the gaps between confidences are
    larger than the step of 1e-6."""
    inputs = TRAINED.get(name, (["alpha"] if name == "attention_fill_rate" else ["embeddings", "targets"],))[0]
    x = scene()
    x = edit(x, **{n: t[:2] for n, t in vars(x).items() if n != "rates"})      # the images with boxes, for speed
    eta, eta_prime = losses.fill_rate(x.mask_labels, x.box_labels, 4), losses.attention_fill_rate(x.alpha, x.box_labels)
    margin = (0.7 * eta - eta_prime)[eta_prime > 0]
    assert margin.abs().min() > 1e-3 and (margin > 0).any() and (margin < 0).any()      # both sides are tested
    for n, c in ((0, 1), (0, 2), (1, 1), (1, 3)):
        confidences = x.logits.log_softmax(1)[n, c][x.box_labels[n] == c]
        assert confidences.sort().values.diff().min() > 1e-4

    def function(*values):
        return call(name, edit(x, **dict(zip(inputs, values))))

    assert torch.autograd.gradcheck(function, [getattr(x, n).clone().requires_grad_() for n in inputs])


def test_detached_targets():
    """detach_targets: Eq. 10 trains the embeddings only. The logits get the gradient that they get without L_A."""
    x, gradients = scene(), {}
    for how, options in dict(both={}, detached=dict(detach_targets=True), without=dict(lambda_a=0)).items():
        logits, beta = x.logits.clone().requires_grad_(), x.embeddings.clone().requires_grad_()
        losses.box2seg_loss(logits, x.alpha, beta, x.box_labels, x.mask_labels, 5, generator=seeded(3),
                            **options)[0].backward()
        gradients[how] = logits.grad, beta.grad
    assert torch.allclose(gradients["detached"][0], gradients["without"][0], atol=1e-14)
    assert not torch.allclose(gradients["both"][0], gradients["without"][0], atol=1e-4)
    assert torch.equal(gradients["both"][1], gradients["detached"][1]) and gradients["without"][1] is None


# ---------------------------------------------------------------------------------------------------------------------
# 4. What holds for every loss
# ---------------------------------------------------------------------------------------------------------------------

def ignored_pixels(name, x):
    maps = [getattr(x, m) == 255 for m in TRAINED[name][1]]
    return torch.stack(maps).all(0)                                                               # (N, h, w)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ignored_pixels_get_exactly_zero_gradient(name, dtype):
    x = scene(dtype=dtype)
    ignored = ignored_pixels(name, x)
    assert ignored[3].all() and 0 < ignored[:3].sum() < ignored[:3].numel()
    for gradient in value_and_gradients(name, x)[1]:
        gradient = gradient.transpose(0, 1)                                                       # (C, N, h, w)
        assert (gradient[:, ignored] == 0).all()
        assert (gradient[:, ~ignored] != 0).any()


@each_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ignored_pixels_do_not_matter(name, dtype):
    """Whatever else stands there, loss and gradients are the same to the bit."""
    x = scene(dtype=dtype)
    ignored = ignored_pixels(name, x)[:, None]
    other = {n: torch.where(ignored, 1e4 * torch.randn(getattr(x, n).shape, generator=seeded(7)).to(dtype),
                            getattr(x, n)) for n in TRAINED[name][0]}
    loss, gradients = value_and_gradients(name, x)
    other_loss, other_gradients = value_and_gradients(name, edit(x, **other))
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(g, o) for g, o in zip(gradients, other_gradients))


@each_loss
def test_nothing_to_sum(name):
    """Wholly unlabelled: a finite 0 that carries a gradient of 0. Added to a batch, it changes only the mean."""
    x = scene()
    empty = torch.full_like(x.box_labels, 255)
    loss, gradients = value_and_gradients(name, edit(x, box_labels=empty, mask_labels=empty))
    assert loss == 0 and loss.requires_grad and all((g == 0).all() for g in gradients)

    loss, gradients = value_and_gradients(name, x)
    assert loss > 0 and loss.requires_grad and all(g.isfinite().all() for g in gradients)
    assert all((g[3] == 0).all() for g in gradients)


@each_loss
@pytest.mark.parametrize("labels", [[[0, 0], [0, 0]], [[2, 2], [2, 2]], [[255, 255], [255, 1]]],
                         ids=["no box", "box covers all", "one pixel"])
def test_nothing_to_sum_for_one_part(name, labels):
    """No box, no background, a single pixel, classes 1 and 3 absent: finite, with a finite gradient."""
    x = scene()
    x = edit(x, **{n: t[..., :2, :2] for n, t in vars(x).items() if t.dim() > 1})
    labels = torch.tensor(labels).expand(4, 2, 2)
    loss, gradients = value_and_gradients(name, edit(x, box_labels=labels, mask_labels=labels))
    assert loss.isfinite() and loss.requires_grad and all(g.isfinite().all() for g in gradients)
    if name == "foreground_loss" and (labels == 0).all() or name == "background_loss" and (labels == 2).all() \
            or name == "affinity_loss" and (labels == 255).any():                  # a single pixel makes no pair
        assert loss == 0 and all((g == 0).all() for g in gradients)


def test_absent_classes_add_nothing():
    """An image of class 1 alone: L = 1 and L = 3 agree where only classes present count."""
    x = scene()
    boxes, masks = (torch.where((labels == 2) | (labels == 3), 0, labels) for labels in (x.box_labels, x.mask_labels))
    assert torch.allclose(losses.fill_rate_loss(x.alpha, boxes, masks),
                          losses.fill_rate_loss(x.alpha[:, :1], boxes, masks))
    assert losses.fill_rate(masks, boxes, 4)[:, 1:].eq(0).all()
    assert losses.attention_fill_rate(x.alpha, boxes)[:, 1:].eq(0).all()
    alpha = x.alpha.clone().requires_grad_()
    losses.attention_weighted_loss(x.logits, alpha, boxes).backward()
    assert alpha.grad[:, 1:].eq(0).all() and alpha.grad[:, 0].ne(0).any()


@each_loss
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_in_float32_out(name, half):
    """The input is rounded, nothing after it: the same to the bit as float32 of the rounded input."""
    x = scene(dtype=torch.float32)
    names = ["logits", "alpha", "embeddings", "targets"]
    rounded = edit(x, **{n: getattr(x, n).to(half) for n in names})
    back = edit(x, **{n: getattr(rounded, n).float() for n in names})
    loss, gradients = value_and_gradients(name, rounded)
    assert loss.dtype == torch.float32 and torch.equal(loss, call(name, back))
    assert all(g.dtype == half and g.isfinite().all() for g in gradients)
    if name != "filling_rate_loss":                           # where rounding may swap two pixels' ranks
        assert torch.allclose(loss, call(name, x), rtol=0.02)


@each_function
def test_dtypes(name):
    integer = {"pair_samples": torch.int64, "fill_rate": torch.float32}.get(name)
    assert call(name, scene(dtype=torch.float64)).dtype == (integer or torch.float64)
    assert call(name, scene(dtype=torch.float32)).dtype == (integer or torch.float32)


def test_affinity_of_two_dtypes():
    a, b = torch.randn(3, 5, generator=seeded(0)).half(), torch.randn(4, 5, generator=seeded(1))
    assert torch.equal(losses.affinity(a, b), losses.affinity(a.float(), b))
    assert losses.affinity(a, b.double()).dtype == torch.float64


@each_function
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(name, dtype):
    """To the bit; the gradient too, taken outside of autocast, as PyTorch wants backward to be."""
    x = scene(dtype=dtype)
    inputs = [getattr(x, n).requires_grad_() for n in TRAINED.get(name, [[]])[0]]
    outside = call(name, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16           # autocast is at work
        inside = call(name, x)
    assert inside.dtype == outside.dtype and torch.equal(inside, outside)
    if inputs:
        gradients = [torch.autograd.grad(loss, inputs) for loss in (inside, outside)]
        assert all(torch.equal(i, o) for i, o in zip(*gradients))


@each_loss
def test_large_logits(name):
    """softmax then log would give log 0; log_softmax stays finite."""
    x = scene(dtype=torch.float32)
    loss, gradients = value_and_gradients(name, edit(x, logits=1e4 * x.logits))
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("name", [n for n in TRAINED if "logits" in TRAINED[n][0]])
def test_a_class_masked_out(name):
    """A class that is masked by logits of -inf, and that no label has, might as well not be there."""
    x = scene()
    masked = edit(x, logits=F.pad(x.logits, (0, 0, 0, 0, 0, 1), value=-torch.inf),
                  alpha=F.pad(x.alpha, (0, 0, 0, 0, 0, 1), value=0.5), rates=F.pad(x.rates, (0, 1)))
    (loss, gradients), (without, expected) = value_and_gradients(name, masked), value_and_gradients(name, x)
    assert torch.allclose(loss, without)
    for gradient, value, n in zip(gradients, expected, TRAINED[name][0]):
        assert torch.allclose(gradient[:, :value.shape[1]], value) and (gradient[:, value.shape[1]:] == 0).all()


@pytest.mark.parametrize("name", CALLS)
def test_label_dtypes(name):
    """Label maps come as uint8 from a PNG, as int64 from elsewhere."""
    x = scene()
    expected = call(name, x)
    for dtype in (torch.uint8, torch.int32, torch.int16):
        narrow = edit(x, box_labels=x.box_labels.to(dtype), mask_labels=x.mask_labels.to(dtype))
        assert torch.equal(call(name, narrow).nan_to_num(-1), expected.nan_to_num(-1))


def strided(t):
    """The same values, every second element of a larger tensor."""
    return t.repeat_interleave(2, -1)[..., ::2]


def transposed(t):
    """The same values, columns before rows in memory."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


@pytest.mark.filterwarnings("error")  # searchsorted warns of a hidden copy
@pytest.mark.parametrize("layout", [strided, transposed, channels_last])
@pytest.mark.parametrize("name", CALLS)
def test_memory_layouts(name, layout):
    x = scene()
    other = SimpleNamespace(**{n: layout(t) for n, t in vars(x).items()})
    assert not other.logits.is_contiguous()
    assert torch.allclose(call(name, other), call(name, x), rtol=1e-12, atol=1e-12, equal_nan=True)


class Recorder(TorchDispatchMode):
    """Notes each operation that runs, forward and backward: its name, the largest result, and whether it makes the CPU
    wait for the GPU, because a Python number or the shape of its result depends on the values."""
    WAITS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "argwhere",
             "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "histc"}

    def __init__(self):
        super().__init__()
        self.names, self.waits, self.largest = set(), [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.names.add(name)
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else []
        if name in self.WAITS or any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
            self.waits.append(name)
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(t):
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.parametrize("wait", [lambda t: t.sum().item(), lambda t: int(t.argmax()), lambda t: bool(t.any()),
                                  lambda t: t[t > 0], lambda t: t.masked_select(t > 0), lambda t: t.nonzero(),
                                  lambda t: t.unique()])
def test_recorder_sees_waiting(wait):
    with Recorder() as recorder:
        wait(torch.tensor([1.0, 2.0, 0.0]))
    assert recorder.waits


@each_function
def test_nothing_waits_for_the_gpu(name):
    x = scene()
    with Recorder() as recorder:
        if name in TRAINED:
            value_and_gradients(name, x)
        else:
            call(name, x)
    assert recorder.waits == []
    if "logits" in TRAINED.get(name, [[]])[0]:
        assert "_log_softmax_backward_data" in recorder.names                         # backward was recorded, too
    source = inspect.getsource(getattr(losses, name))
    assert not any(word in source for word in (".cpu(", ".tolist(", ".numpy(", ".item("))


def source_alone(name):
    """The source of a function and of the losses that it names, and so on."""
    found, wanted = {}, [name]
    while wanted:
        found[wanted[0]] = inspect.getsource(getattr(losses, wanted[0]))
        names = {node.id for text in found.values() for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
        wanted = [n for n in names if n not in found and inspect.isfunction(getattr(losses, n, None))]
    return "\n\n".join(found.values())


@pytest.mark.parametrize("name", [n for n, f in vars(losses).items() if inspect.isfunction(f)])
def test_pasted_alone(name):
    """With two imports and nothing else, each function runs and gives the same."""
    namespace = {}
    exec("import torch\nimport torch.nn.functional as F\n\n" + source_alone(name), namespace)
    x = scene()
    assert name in CALLS, f"{name} is new in losses.py: add a line to CALLS above"
    assert torch.equal(CALLS[name](namespace[name], x).nan_to_num(-1), call(name, x).nan_to_num(-1))


def test_imports_torch_only():
    tree = ast.parse(inspect.getsource(losses))
    imports = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert imports == ["import torch", "import torch.nn.functional as F"]


# ---------------------------------------------------------------------------------------------------------------------
# 5. Eq. 10: which pixels are drawn, and their pairs one by one; Eq. 11
# ---------------------------------------------------------------------------------------------------------------------

def naive_affinity_loss(embeddings, targets, draws):
    """draws: for each image the drawn pixels (i, j), a pixel drawn twice standing there twice."""
    total = 0.0
    for beta, y, drawn in zip(embeddings, targets, draws):
        squares, pairs = 0.0, 0
        for i in drawn:
            for j in drawn:
                if i != j:
                    a, b = beta[:, i[0], i[1]].tolist(), beta[:, j[0], j[1]].tolist()
                    cosine = sum(p * q for p, q in zip(a, b)) / math.hypot(*a) / math.hypot(*b)
                    agreement = sum(p * q for p, q in zip(y[:, i[0], i[1]].tolist(), y[:, j[0], j[1]].tolist()))
                    squares += (cosine - agreement) ** 2
                    pairs += 1
        total += share(squares, pairs)
    return total / len(embeddings)


def even_labels():
    """Two images in which each class present has six pixels, so 6, 12, ... draws leave nothing to chance."""
    labels = torch.tensor([0, 1, 2, 255, 255]).repeat_interleave(6)[torch.randperm(30, generator=seeded(0))]
    other = torch.tensor([0, 3, 255, 255, 255]).repeat_interleave(6)[torch.randperm(30, generator=seeded(1))]
    return torch.stack([labels, other]).view(2, 5, 6)


@pytest.mark.parametrize("times", [1, 2])
def test_affinity_loss_over_all_pairs(times):
    x, labels = scene(), even_labels()
    draws = [pixels(label_map, lambda label: label != 255) * times for label_map in labels]
    for targets in (x.targets[:2], one_hot(labels, 4)):                                # stage 2, stage 1
        loss = losses.affinity_loss(x.embeddings[:2], targets, labels, 6 * times)
        expected = naive_affinity_loss(x.embeddings[:2], targets, draws)
        assert torch.allclose(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-12)


def test_affinity_of_eq_9_is_the_one_in_eq_10():
    """The Gram form equals the mean over the m x m matrix of Eq. 9 less its diagonal, which it never builds."""
    x, labels = scene(), even_labels()
    value = losses.affinity_loss(x.embeddings[:2], x.targets[:2], labels, 6)
    means = []
    for n in range(2):
        keep = (labels[n] != 255).flatten()
        beta, y = (t[n].flatten(1).T[keep] for t in (x.embeddings, x.targets))
        squares = (losses.affinity(beta, beta) - y @ y.T).square()
        means.append((squares.sum() - squares.diagonal().sum()) / (squares.numel() - len(squares)))
    assert torch.allclose(value, torch.stack(means).mean(), rtol=1e-12)


def draw_counts(labels, num_samples, seed):
    """How often affinity_loss draws each pixel, read off its gradient: (N, h, w) float64, nearly integers.

    Needs a pixel o, at (0, 0), that is alone in its class and so gets all of the class's S draws. Let all embeddings be
    equal, A = 1, and y be 1 at o and 0 elsewhere. Of a pixel k's pairs only the one with o changes with y_k:
        dL/dy_k = 2 * 2 w_k w_o (1 - y_o y_k) * (-y_o) / sum_{i != j} w_i w_j = -4 w_k w_o / constant
    which is in proportion to w_k. The factor follows from S draws for each of the K - 1 other classes.
    """
    embeddings = torch.ones(len(labels), 1, *labels.shape[1:], dtype=torch.float64)
    targets = torch.zeros_like(embeddings)
    targets[:, 0, 0, 0] = 1
    targets.requires_grad_()
    losses.affinity_loss(embeddings, targets, labels, num_samples, seeded(seed)).backward()
    gradient = targets.grad[:, 0] * len(labels)                                                   # (N, h, w)
    others = torch.ones_like(gradient)
    others[:, 0, 0] = 0
    classes = torch.stack([(labels == c).flatten(1).any(1) for c in range(255)]).sum(0)           # (N,): K
    samples = torch.as_tensor(num_samples).expand(len(labels)).double()
    sums = (gradient * others).sum((1, 2))
    counts = gradient * others * (samples * (classes - 1) / sums)[:, None, None] + samples[:, None, None] * (1 - others)
    # and the constant is right: (S K)^2 - sum of count^2 ordered pairs of different pixels
    pairs = (samples * classes) ** 2 - counts.square().sum((1, 2))
    assert torch.allclose(sums, -4 * samples * samples * (classes - 1) / pairs, rtol=1e-9)
    return counts


def chance_labels(images=3):
    """Class 9 at (0, 0) alone, then 3 pixels of class 0, 7 of class 1, 11 of class 2 and 8 unlabelled, shuffled."""
    rest = torch.tensor([0] * 3 + [1] * 7 + [2] * 11 + [255] * 8)
    rows = [torch.cat([torch.tensor([9]), rest[torch.randperm(29, generator=seeded(n))]]) for n in range(images)]
    return torch.stack(rows).view(images, 5, 6)


@pytest.mark.parametrize("num_samples", [1, 2, 5, 7, 10, 40, torch.tensor([4, 25, 1])])
def test_each_class_is_drawn_equally(num_samples):
    """num_samples draws for every class present, whatever its area; no pixel a second time before all have had their
    first; the unlabelled never."""
    labels = chance_labels()
    for seed in range(5):
        counts = draw_counts(labels, num_samples, seed)
        assert torch.allclose(counts, counts.round(), rtol=0, atol=1e-9)
        samples = torch.as_tensor(num_samples).expand(3).tolist()
        for n in range(3):
            assert (counts[n][labels[n] == 255] == 0).all()
            for c in (0, 1, 2, 9):
                drawn = counts[n][labels[n] == c].round()
                assert drawn.sum() == samples[n]
                assert drawn.max() - drawn.min() <= 1


@pytest.mark.parametrize("num_samples", [2, 5, 13])
def test_affinity_loss_over_drawn_pairs(num_samples):
    """The same generator draws the same pixels, whatever the embeddings: read the draws, then sum their pairs."""
    x, labels = scene(), chance_labels()
    counts = draw_counts(labels, num_samples, seed=11).round().long()
    draws = [[p for p in pixels(count, lambda count: count > 0) for _ in range(count[p])] for count in counts]
    loss = losses.affinity_loss(x.embeddings[:3], x.targets[:3], labels, num_samples, seeded(11))
    expected = naive_affinity_loss(x.embeddings[:3], x.targets[:3], draws)
    assert torch.allclose(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-12)


def test_draws_are_uniform():
    """6000 equal images. Two draws of class 0's pixels p, q, r: three pairs of pixels, each with probability 1/3. Five
    draws of 11: each pixel with 5/11. All within 5 standard deviations of sqrt(n p (1 - p))."""
    n = 6000
    labels = chance_labels(1).expand(n, 5, 6)
    counts = draw_counts(labels, 2, seed=0).round()
    drawn = counts[:, labels[0] == 0]                                                             # (n, 3)
    left_out = (drawn == 0).sum(0)                                                                # two of three drawn
    assert left_out.sum() == n and (left_out - n / 3).abs().max() < 5 * math.sqrt(n * 1 / 3 * 2 / 3)
    drawn = draw_counts(labels, 5, seed=0).round()[:, labels[0] == 2]                             # (n, 11)
    assert (drawn.sum(0) - n * 5 / 11).abs().max() < 5 * math.sqrt(n * 5 / 11 * 6 / 11)
    assert len(drawn.unique(dim=0)) == math.comb(11, 5)                       # each of the 462 sets of five comes up
    # the eighth draw of class 1's seven pixels is the second of one of them, each with 1/7
    twice = (draw_counts(labels, 8, seed=0).round()[:, labels[0] == 1] == 2).sum(0)
    assert twice.sum() == n and (twice - n / 7).abs().max() < 5 * math.sqrt(n * 1 / 7 * 6 / 7)


@pytest.mark.parametrize("num_samples", range(2, 9))
@pytest.mark.parametrize("labels", [[[1, 1], [255, 255]], [[1, 255], [0, 255]]], ids=["one class", "two classes"])
def test_two_pixels_are_one_pair(labels, num_samples):
    """However often each is drawn, the loss is their (A - y.y)^2 = (0.6 - 0.3)^2: the least that makes a pair at all.
    With weights 2/3 and 1/3 (3 draws from one class) only 4/9 of all drawn pairs are of different pixels."""
    embeddings = picture([[1, 0], [3, 4], [3, 4], [1, 0]])
    targets = picture([[1, 0], [0.3, 0.7], [0.3, 0.7], [0, 1]])
    loss = losses.affinity_loss(embeddings, targets, torch.tensor([labels]), num_samples)
    assert is_close(loss, 0.09)


def test_generator_decides_the_draws():
    x = scene()
    arguments = x.embeddings, x.targets, x.mask_labels, 2
    state = torch.get_rng_state()
    values = [losses.affinity_loss(*arguments, seeded(s)).item() for s in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    assert torch.equal(torch.get_rng_state(), state)                         # the global generator is left alone
    torch.manual_seed(5)
    first = losses.affinity_loss(*arguments)
    torch.manual_seed(5)
    assert torch.equal(first, losses.affinity_loss(*arguments))


def test_box2seg_compiles_for_batches_of_several_sizes():
    """A last batch may be smaller. Traced and run, not translated: no C++ compiler is needed. As pasted, since the
    compiler leaves functions of its own in the module."""
    namespace = {}
    exec("import torch\nimport torch.nn.functional as F\n\n" + source_alone("box2seg_loss"), namespace)
    compiled = torch.compile(namespace["box2seg_loss"], backend="eager")
    for n, side in ((3, 8), (2, 8), (2, 11)):
        labels = torch.randint(0, 4, (n, side, side))
        arguments = torch.randn(n, 4, side, side), torch.rand(n, 3, side, side), torch.randn(n, 5, side, side)
        values = []
        for function in (losses.box2seg_loss, compiled):
            torch.manual_seed(0)
            values.append(function(*arguments, labels, labels, num_samples=9)[0])
        torch.testing.assert_close(*values)


def test_affinity_loss_does_not_see_scale():
    """Cosine: an embedding's length is nothing, and the gradient is at right angles to it."""
    x = scene()
    loss, (gradient, _) = value_and_gradients("affinity_loss", x)
    longer = x.embeddings * torch.rand(4, 1, 5, 6, generator=seeded(0)).add(0.1).double()
    assert torch.allclose(call("affinity_loss", edit(x, embeddings=longer)), loss, rtol=1e-12)
    assert (gradient * x.embeddings).sum(1).abs().max() < 1e-15


def test_an_embedding_of_zeros_is_like_no_other():
    embeddings = torch.randn(1, 4, 3, 3)
    embeddings[0, :, 0, 0] = 0
    embeddings.requires_grad_()
    loss = losses.affinity_loss(embeddings, torch.rand(1, 3, 3, 3), torch.arange(9).view(1, 3, 3) % 3, 3)
    loss.backward()
    assert loss.isfinite() and embeddings.grad.isfinite().all()
    assert losses.affinity(torch.zeros(1, 4), torch.ones(1, 4)) == 0


def test_affinity_loss_is_zero_at_its_optimum():
    """Embeddings of one class parallel, of different classes orthogonal, targets one-hot: 0. The squares are multiplied
    out, so float32 leaves some 1e-6 on either side of 0 where the directions are not the axes."""
    labels = torch.randint(4, (2, 64, 64), generator=seeded(0))
    y = one_hot(labels, 4).float()
    assert losses.affinity_loss(3 * y, y, labels, 256, seeded(0)).abs() < 1e-6
    turned = torch.linalg.qr(torch.randn(64, 64, generator=seeded(1)))[0][:, :4]                  # (64, 4), orthonormal
    beta = torch.einsum("dc,nchw->ndhw", turned, y)
    assert losses.affinity_loss(beta, y, labels, 256, seeded(0)).abs() < 3e-6


@pytest.mark.parametrize("noise", [1.0, 0.1])
def test_affinity_loss_in_float32(noise):
    """Multiplying the squares out costs digits when the loss is small. Enough are left: at 32 x 32 pixels, 1e-6 of
    error in a loss that is 0.05 and 0.0003 here, and five digits of gradient."""
    labels = torch.randint(4, (1, 32, 32), generator=seeded(0))
    y = one_hot(labels, 21)
    base = F.pad(y, (0, 0, 0, 0, 0, 43)) + noise / 8 * torch.randn(1, 64, 32, 32, generator=seeded(1)).double()
    results = []
    for dtype in (torch.float64, torch.float32):
        beta = base.to(dtype).requires_grad_()
        loss = losses.affinity_loss(beta, y.to(dtype), labels, 128, seeded(2))
        results.append((loss.item(), torch.autograd.grad(loss, beta)[0].double()))
    (exact, exact_gradient), (value, gradient) = results
    assert abs(value - exact) < 1e-6 < exact
    assert (gradient - exact_gradient).norm() < 1e-5 * exact_gradient.norm()


def test_no_matrix_of_all_pairs():
    """m = 4096: the m x m matrix has 16.8 million entries, the largest tensor here N * d * m = 0.13 million."""
    N, d, C, m = 2, 16, 5, 4096
    x = SimpleNamespace(embeddings=torch.randn(N, d, 64, 64), targets=torch.randn(N, C, 64, 64).softmax(1),
                        mask_labels=torch.randint(C, (N, 64, 64)))
    with Recorder() as recorder:
        x.embeddings.requires_grad_(), x.targets.requires_grad_()
        losses.affinity_loss(x.embeddings, x.targets, x.mask_labels, 1000).backward()
    assert recorder.largest == N * d * m
    with Recorder() as recorder:                                                # and the recorder would have seen it
        losses.affinity(x.embeddings[0, :, :8].flatten(1).T, x.embeddings[0, :, :8].flatten(1).T)
    assert recorder.largest == 512 ** 2


def test_a_shuffle_next_to_1_leaves_the_classes_apart(monkeypatch):
    """Pixels are sorted by class plus half a random number: 4 plus all of 1 - 2 ** -24 would round up to 5."""
    labels = torch.tensor([[[5, 4], [5, 4]]])
    beta = torch.tensor([[1., 0], [3, 4], [0, 2], [5, 0]]).T.reshape(1, 2, 2, 2)
    targets = F.one_hot(labels, 6).permute(0, 3, 1, 2).float()
    loss = losses.affinity_loss(beta, targets, labels, 2)
    drawn = torch.tensor([[0, 1 - 2 ** -24] * 2])
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda tensor, generator=None: tensor.copy_(drawn))
    assert losses.affinity_loss(beta, targets, labels, 2) == pytest.approx(loss.item())


def test_pair_samples_give_a_tenth_of_the_pairs():
    """Sect. 4.1: with the draws of pair_samples, S^2 / m^2 is 10 %, whatever the number of classes."""
    labels = torch.stack([torch.arange(4096) % k for k in (1, 2, 3, 7)]).view(4, 64, 64)
    drawn = losses.pair_samples(labels, 21) * torch.tensor([1, 2, 3, 7])
    assert ((drawn / 4096) ** 2).sub(0.1).abs().max() < 0.001


@pytest.mark.parametrize("regularizer", ["fr", "box"])
def test_box2seg_is_the_sum_of_its_terms(regularizer):
    x = scene()
    total, terms = losses.box2seg_loss(x.logits, x.alpha, x.embeddings, x.box_labels, x.mask_labels, 5, 2.0, 3.0, 4.0,
                                       regularizer, 0.6, generator=seeded(3))
    L_alpha = {"fr": losses.fill_rate_loss(x.alpha, x.box_labels, x.mask_labels, 0.6),
               "box": losses.attention_box_loss(x.alpha, x.box_labels)}[regularizer]
    expected = {"L_GC": losses.cross_entropy_loss(x.logits, x.mask_labels),
                "L_AW": losses.attention_weighted_loss(x.logits, x.alpha, x.box_labels), "L_alpha": L_alpha,
                "L_A": losses.affinity_loss(x.embeddings, x.logits.softmax(1), x.mask_labels, 5, seeded(3))}
    assert terms.keys() == expected.keys() and all(torch.equal(terms[n], expected[n]) for n in terms)
    weighted = expected["L_GC"] + 2 * expected["L_AW"] + 3 * expected["L_alpha"] + 4 * expected["L_A"]
    assert torch.allclose(total, weighted, rtol=1e-14)


def test_box2seg_takes_filling_rates_of_other_labels():
    """Table 4, Fig. 7: the truth lacks both objects, GrabCut's masks do not. Without alpha in the boxes L_alpha^fr is
    gamma eta for each of the two classes, by GrabCut's masks; by the truth it asks for nothing."""
    logits, boxes, truth = torch.zeros(1, 3, 2, 4), torch.tensor([[[1, 1, 2, 2]] * 2]), torch.zeros(1, 2, 4).long()
    found = torch.tensor([[[1, 0, 2, 2], [0, 0, 2, 2]]])                   # eta: 1/4 and 1
    alpha = torch.zeros(1, 2, 2, 4)
    terms = [losses.box2seg_loss(logits, alpha, None, boxes, truth, lambda_a=0, fill_labels=fill)[1]
             for fill in (None, truth, found)]
    assert terms[0] == terms[1] and terms[0]["L_alpha"] == 0
    assert terms[2]["L_alpha"].item() == pytest.approx(0.7 * (1 / 4 + 1))
    assert terms[2]["L_GC"] == terms[0]["L_GC"] and terms[2]["L_AW"] == terms[0]["L_AW"]


def test_box2seg_leaves_terms_out():
    """The rows of Table 3, with the branches that they do without."""
    x = edit(scene(), logits=scene().logits.requires_grad_())
    rows = {("L_GC",): dict(alpha=None, embeddings=None, lambda_aw=0, lambda_a=0),
            ("L_GC", "L_A"): dict(alpha=None, embeddings=x.embeddings, lambda_aw=0),
            ("L_GC", "L_AW", "L_alpha"): dict(alpha=x.alpha, embeddings=None, lambda_a=0)}
    for names, options in rows.items():
        total, terms = losses.box2seg_loss(x.logits, box_labels=x.box_labels, mask_labels=x.mask_labels, **options)
        assert tuple(terms) == names and total.requires_grad and not any(t.requires_grad for t in terms.values())
    for alpha, embeddings, options in ((None, x.embeddings, {}), (x.alpha, None, {}), (None, None, {"lambda_aw": 0})):
        with pytest.raises(ValueError, match="without alpha lambda_aw must be 0, without embeddings lambda_a"):
            losses.box2seg_loss(x.logits, alpha, embeddings, x.box_labels, x.mask_labels, **options)


# ---------------------------------------------------------------------------------------------------------------------
# 6. Attention: what it is drawn to, and what keeps it from collapsing (Sect. 3.3)
# ---------------------------------------------------------------------------------------------------------------------

def attention_scene(sure):
    """A 6 x 6 box of class 1 in an 8 x 8 image, GrabCut keeps its upper 24 pixels (eta = 2/3), where y is `sure` of
    class 1; in the 12 others y is 0.3."""
    boxes, masks = torch.zeros(2, 1, 8, 8, dtype=torch.long)
    boxes[0, 1:7, 1:7], masks[0, 1:5, 1:7] = 1, 1
    y = torch.where(masks == 1, sure, 0.3).double()
    return torch.stack([1 - y, y], 1).log(), boxes, masks


def descend(logits, boxes, masks, lambda_aw, lambda_alpha):
    """Where gradient descent on L_AW + L_alpha^fr takes attention alone, y fixed: projected to [0, 1], from 1/2."""
    alpha = torch.full((1, 1, 8, 8), 0.5, dtype=torch.float64)
    for _ in range(500):
        alpha.requires_grad_()
        loss = (lambda_aw * losses.attention_weighted_loss(logits, alpha, boxes) +
                lambda_alpha * losses.fill_rate_loss(alpha, boxes, masks))
        alpha = (alpha.detach() - 0.2 * torch.autograd.grad(loss, alpha)[0]).clamp(0, 1)
    return alpha


def test_attention_gradient():
    """For a pixel i in the box of class c
        area_c dL/dalpha_i = lambda_AW * (-log y_i) - lambda_alpha [eta' < gamma eta]
    and 0 anywhere else. Below the margin attention grows where -log y < lambda_alpha / lambda_AW; at the paper's
    weights, where y > exp(-1/10) = 0.905. Above the margin it shrinks, the slower the surer y is."""
    logits, boxes, masks = attention_scene(sure=0.95)
    for start, below in ((0.4, 1), (0.6, 0)):                          # gamma eta = 0.467
        alpha = torch.full((1, 1, 8, 8), start, dtype=torch.float64, requires_grad=True)
        (10 * losses.attention_weighted_loss(logits, alpha, boxes) +
         losses.fill_rate_loss(alpha, boxes, masks)).backward()
        inside = boxes == 1
        expected = (-10 * logits.log_softmax(1)[:, 1] - below)[inside] / 36
        assert torch.allclose(alpha.grad[:, 0][inside], expected, rtol=1e-9)
        assert (alpha.grad[:, 0][~inside] == 0).all()
        assert (alpha.grad[:, 0][masks == 1] < 0).all() == bool(below)        # 10 * 0.051 < 1
        assert (alpha.grad[:, 0][inside & (masks == 0)] > 0).all()            # 10 * 1.204 > 1


def test_attention_collapses_without_regularizer():
    """"Without any regularization on the attention maps, the network can minimize L_fg by predicting all alpha = 0."
    """
    logits, boxes, masks = attention_scene(sure=0.95)
    alpha = descend(logits, boxes, masks, lambda_aw=10, lambda_alpha=0)
    assert losses.attention_fill_rate(alpha, boxes).item() < 1e-6


def test_attention_fills_what_the_margin_asks():
    """With it, where y is sure: gamma eta = 0.7 * 2/3, no less (but for the step's length) and no more, all of it on
    the pixels that y is sure of."""
    logits, boxes, masks = attention_scene(sure=0.95)
    alpha = descend(logits, boxes, masks, lambda_aw=10, lambda_alpha=1)
    assert abs(losses.attention_fill_rate(alpha, boxes).item() - 0.7 * 2 / 3) < 0.005
    assert alpha[:, 0][(boxes == 1) & (masks == 0)].max() == 0


def test_attention_margin_is_soft():
    """lambda_alpha / lambda_AW is what attention may cost: where y = 0.8, so -log y = 0.22, the paper's 1 / 10 does not
    hold attention up, and 1 / 1 does."""
    logits, boxes, masks = attention_scene(sure=0.8)
    rates = [losses.attention_fill_rate(descend(logits, boxes, masks, weight, 1), boxes).item() for weight in (10, 1)]
    assert rates[0] < 1e-6 and abs(rates[1] - 0.7 * 2 / 3) < 0.005


@pytest.mark.parametrize("regularizer", ["fr", "box"])
@pytest.mark.parametrize("lambda_aw, lambda_alpha, rate, lives", [
    (10, 1, 0.002, False), (10, 1, 0.02, False), (1, 0.1, 0.2, False), (10, 50, 0.02, True), (1, 5, 0.2, True)])
def test_which_weights_hold_attention(lambda_aw, lambda_alpha, rate, lives, regularizer):
    """Trained from the start, y and alpha linear in fixed features that tell the classes apart. With the printed
    weights, at any rate, attention dies before y knows its classes, and does not come back when it does; with
    lambda_alpha = 5 lambda_AW it lives, and y finds what the masks miss (a fifth of each object here)."""
    generator = seeded(0)
    row, column = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    boxes, truth = torch.zeros(2, 6, 16, 16, dtype=torch.long)
    for n in range(6):
        boxes[n, 3:13, 3:13] = n % 3 + 1
        truth[n][(row - 7.5) ** 2 + (column - 7.5) ** 2 < 4.5 ** 2] = n % 3 + 1
    masks = truth.clone()
    masks[:, :, 5:7] = 0
    features = F.one_hot(truth, 4).permute(0, 3, 1, 2) + 0.3 * torch.randn(6, 4, 16, 16, generator=generator)
    heads = [torch.zeros(channels, 5).normal_(std=0.01, generator=generator).requires_grad_() for channels in (4, 3)]
    optimizer = torch.optim.SGD(heads, lr=rate, momentum=0.9)
    features = F.pad(features, (0, 0, 0, 0, 0, 1), value=1.0)                  # a fifth one for the biases
    for _ in range(200):
        logits, attention = (torch.einsum("cd,ndhw->nchw", head, features) for head in heads)
        loss, terms = losses.box2seg_loss(logits, attention.sigmoid(), None, boxes, masks, lambda_aw=lambda_aw,
                                          lambda_alpha=lambda_alpha, lambda_a=0, regularizer=regularizer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    filled = losses.attention_fill_rate(attention.sigmoid(), boxes).sum(1).mean()
    quality = losses.iou(losses.confusion_matrix(logits.argmax(1), truth, 4)).nanmean()
    if regularizer == "fr":
        greatest = 0.7 * losses.fill_rate(masks, boxes, 4).sum(1).mean()       # of L_alpha
        assert (terms["L_alpha"] > 0.9 * greatest) == (not lives)
    assert filled > 0.3 and quality > 0.85 if lives else filled < 0.05 and quality < 0.75


# ---------------------------------------------------------------------------------------------------------------------
# 7. BoxSup's costs against a dense evaluation: every mask painted, every pixel looked at, in float64
# ---------------------------------------------------------------------------------------------------------------------

BOXES = {                                                                      # on an image of 40 x 50 pixels
    "apart": [[2, 3, 20, 30], [25, 5, 49, 39]],
    "overlapping": [[25, 0, 35, 40], [20, 10, 50, 40], [2, 3, 30, 30]],        # the smallest, the largest, the other
    "nested": [[5, 5, 40, 35], [10, 10, 20, 20], [12, 12, 15, 40]],
    "twice the same": [[5, 5, 40, 35], [5, 5, 40, 35]],
    "equal areas": [[5, 5, 15, 25], [0, 10, 20, 20]],
    "whole image": [[0, 0, 50, 40]],
    "one in the whole image": [[10, 10, 30, 30], [0, 0, 50, 40]],
    "one pixel": [[49, 39, 50, 40]],
    "two hundred": [[x, y, x + 2 + x % 3, y + 3] for x in range(0, 40, 2) for y in range(0, 30, 3)],
    "none": [],
}


def boxsup_scene(boxes, height=40, width=50, R=60, N=40, seed=0):
    """Superpixels of any shape, ids in no order; segments of few and of many, the first empty, the second all."""
    g = seeded(seed)
    cells = torch.rand(R, 2, generator=g) * torch.tensor([height, width])
    y, x = torch.arange(height)[:, None, None], torch.arange(width)[None, :, None]
    superpixels = ((y - cells[:, 0]).square() + (x - cells[:, 1]).square()).argmin(2)             # Voronoi
    members = torch.rand(N, R, generator=g) < torch.rand(N, 1, generator=g)
    members[0], members[1] = False, True
    logits = 4 * torch.randn(5, height, width, generator=g, dtype=torch.float64)
    return dict(logits=logits, superpixels=superpixels, members=members,
                boxes=torch.tensor(boxes, dtype=torch.long).view(-1, 4), classes=torch.arange(len(boxes)) % 4 + 1)


def dense_regression_cost(logits, superpixels, members, boxes, classes):
    """Eq. 3 as it reads: for each box and each mask a label map, its cross-entropy over the box's pixels."""
    log_y, costs = logits.double().log_softmax(0), torch.zeros(len(boxes), len(members), dtype=torch.float64)
    owner = torch.full(superpixels.shape, -1)
    for k in sorted(range(len(boxes)), key=lambda k: -(boxes[k, 2:] - boxes[k, :2]).prod()):      # the smallest last
        x0, y0, x1, y1 = boxes[k].tolist()
        owner[y0:y1, x0:x1] = k
    for k, c in enumerate(classes.tolist()):
        mine = owner == k
        for n, segment in enumerate(members):
            mask = segment[superpixels]                                                           # (H, W)
            labels = torch.where(mask, c, 0)
            e = -log_y.gather(0, labels[None])[0]
            costs[k, n] = e[mine].sum() / e.numel()
    return costs


@pytest.mark.parametrize("name", BOXES)
def test_regression_cost_against_dense_evaluation(name):
    x = boxsup_scene(BOXES[name])
    expected = dense_regression_cost(**x)
    costs = losses.regression_cost(**x)
    assert costs.shape == (len(BOXES[name]), 40) and costs.dtype == torch.float64
    assert torch.allclose(costs, expected, rtol=0, atol=1e-10)
    costs = losses.regression_cost(**x | dict(logits=x["logits"].float()))
    assert costs.dtype == torch.float32 and torch.allclose(costs.double(), expected, rtol=0, atol=1e-5)


def test_regression_cost_is_the_same_each_time_with_threads():
    """Large enough for PyTorch to share the sums among threads, which in float32 add in no fixed order."""
    g = seeded(0)
    x = dict(logits=torch.randn(21, 375, 500, generator=g), superpixels=torch.randint(60, (375, 500), generator=g),
             members=torch.rand(50, 60, generator=g) < 0.3, classes=torch.tensor([3, 7]),
             boxes=torch.tensor([[5, 5, 480, 370], [30, 40, 300, 200]]))
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first, *others = [losses.regression_cost(**x) for _ in range(20)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first, other) for other in others)


def test_a_box_without_a_pixel_of_its_own_is_left_to_eq_2():
    """The later of two equal boxes has all pixels: for the other Eq. 3 costs nothing, whatever the segment. A box
    inside another keeps its own."""
    costs = losses.regression_cost(**boxsup_scene(BOXES["twice the same"]))
    assert (costs[0] == 0).all() and costs[1].std() > 0.001
    assert (losses.regression_cost(**boxsup_scene(BOXES["nested"])).std(1) > 0.001).all()


def test_regression_cost_in_float32_at_full_size():
    """375 x 500 pixels, all of them in one box: sums of 187,500 float32 keep the five decimals. Every tenth segment."""
    x = boxsup_scene([[0, 0, 500, 375]], 375, 500, R=1700, N=200)
    x["logits"] = x["logits"].float()
    with Recorder() as recorder:
        costs = losses.regression_cost(**x)
    assert recorder.largest <= 5 * 375 * 500                               # nothing of segments x pixels, 37 million
    x["members"] = x["members"][::10]
    assert (costs[:, ::10].double() - dense_regression_cost(**x)).abs().max() < 1e-5


def test_segments_differ_by_their_own_pixels_only():
    """HW (E_r(k, n) - E_r(k, empty)) is the sum over S in B of e(p, class k) - e(p, background), and that is the sum
    of logit 0 less logit k: no other class, no other pixel, no constant on all logits tells one from another."""
    x = boxsup_scene(BOXES["apart"])
    costs = losses.regression_cost(**x)
    for k, (x0, y0, x1, y1) in enumerate(x["boxes"].tolist()):
        slope = (x["logits"][0] - x["logits"][k + 1])[y0:y1, x0:x1]
        expected = torch.stack([slope[s[x["superpixels"]][y0:y1, x0:x1]].sum() for s in x["members"]]) / (40 * 50)
        assert torch.allclose(costs[k] - costs[k, 0], expected, rtol=0, atol=1e-10)

    other = x["logits"] + torch.randn(40, 50, generator=seeded(1))                             # on all classes
    assert torch.allclose(losses.regression_cost(**x | dict(logits=other)), costs, rtol=0, atol=1e-10)
    other = x["logits"].clone()
    other[3:] = torch.randn(2, 40, 50, generator=seeded(2))                                    # classes of no box
    changed = losses.regression_cost(**x | dict(logits=other))
    assert (changed - costs).abs().min() > 1e-4                                                # all alike
    assert torch.allclose(changed - changed[:, :1], costs - costs[:, :1], rtol=0, atol=1e-10)
    other = torch.where(dense_inside(x["boxes"]), x["logits"], 99.0)                           # outside the boxes
    assert torch.equal(losses.regression_cost(**x | dict(logits=other)), costs)


def dense_inside(boxes, height=40, width=50):
    inside = torch.zeros(height, width, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes.tolist():
        inside[y0:y1, x0:x1] = True
    return inside


def test_best_of_all_segments():
    """Of all 2^8 unions of 8 superpixels, Eq. 3 is least for the one that takes each superpixel where the class beats
    the background on the whole, and no other."""
    every = torch.tensor([[n >> r & 1 for r in range(8)] for n in range(256)]).bool()
    x = boxsup_scene([[0, 0, 50, 40]], R=8) | dict(members=every)
    slope = x["logits"][0] - x["logits"][1]
    gain = torch.stack([slope[x["superpixels"] == r].sum() for r in range(8)])
    assert 0 < (gain < 0).sum() < 8 and gain.abs().min() > 1
    best = losses.regression_cost(**x)[0].argmin()
    assert torch.equal(every[best], gain < 0)


def test_feedback_finds_the_object():
    """Sect. 4.2: with E_o alone the segment whose tight box fits best is chosen; the network's say makes it the object.
    A disc in a box of its size: the segments are the disc, its upper half, and the box less the disc."""
    y, x = torch.meshgrid(torch.arange(20) - 9.5, torch.arange(20) - 9.5, indexing="ij")
    disc = y.square() + x.square() < 64
    superpixels = torch.where(disc, torch.where(y < 0, 0, 1), 2)
    superpixels[(y.abs() > 8) | (x.abs() > 8)] = 3
    members = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]]).bool()
    candidate_boxes = torch.tensor([[2, 2, 17, 17], [2, 2, 18, 10], [2, 2, 18, 18]])           # the disc's a little off
    logits = torch.stack([torch.zeros(20, 20), torch.where(disc, 1.0, -1.0)])
    arguments = superpixels, members, candidate_boxes, torch.tensor([[2, 2, 18, 18]]), torch.tensor([1])
    assert losses.candidate_cost(None, *arguments)[0].tolist() == [1 - 225 / 256, 0.5, 0]
    assert losses.candidate_cost(logits, *arguments).argmin(1).tolist() == [0]
    assert losses.candidate_cost(logits, *arguments, weight=0).argmin(1).tolist() == [2]


def test_names_of_superpixels_and_order_of_boxes_do_not_matter():
    x = boxsup_scene(BOXES["overlapping"])
    costs = losses.regression_cost(**x)
    new = torch.randperm(60, generator=seeded(3))                                              # r is now new[r]
    renamed = x | dict(superpixels=new[x["superpixels"]], members=x["members"][:, new.argsort()])
    assert torch.allclose(losses.regression_cost(**renamed), costs, rtol=0, atol=1e-12)
    turned = x | dict(boxes=x["boxes"][[2, 0, 1]], classes=x["classes"][[2, 0, 1]])
    assert torch.allclose(losses.regression_cost(**turned), costs[[2, 0, 1]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("box_dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("segment_dtype", [torch.bool, torch.uint8, torch.float32, torch.float64])
def test_boxsup_dtypes(box_dtype, segment_dtype):
    """As an NPZ holds them, or made ready beforehand: the same costs."""
    x = boxsup_scene(BOXES["overlapping"])
    other = x | dict(boxes=x["boxes"].to(box_dtype), members=x["members"].to(segment_dtype),
                     superpixels=x["superpixels"].int(), classes=x["classes"].to(torch.uint8))
    assert torch.equal(losses.regression_cost(**other), losses.regression_cost(**x))
    assert torch.allclose(losses.overlap_cost(other["boxes"], x["boxes"]).double(),
                          losses.overlap_cost(x["boxes"].double(), x["boxes"]), rtol=0, atol=1e-7)


def test_overlap_cost_of_large_boxes():
    """100,000 pixels a side: the areas overflow an int32, and the cost stays within [0, 1]."""
    large = torch.tensor([[0, 0, 100_000, 100_000], [50_000, 0, 100_000, 100_000], [7, 7, 77_777, 99_999]],
                         dtype=torch.int32)
    costs = losses.overlap_cost(large, large)
    assert is_close(costs[0, :2], [0, 0.5]) and is_close(costs.diagonal(), [0, 0, 0])
    assert costs.min() >= 0 and costs.max() <= 1


def test_no_boxes_or_no_segments():
    x, empty = boxsup_scene(BOXES["overlapping"]), torch.zeros(0, 4, dtype=torch.long)
    none = x | dict(members=x["members"][:0])
    assert losses.regression_cost(**none).shape == losses.candidate_cost(**none, candidate_boxes=empty).shape == (3, 0)
    nobody = boxsup_scene([]) | dict(candidate_boxes=torch.zeros(40, 4, dtype=torch.long))
    assert losses.candidate_cost(**nobody).shape == losses.candidate_cost(**nobody | dict(logits=None)).shape == (0, 40)
    assert losses.overlap_cost(empty, empty).shape == (0, 0)
    assert (losses.overlap_cost(x["boxes"], torch.zeros(2, 4, dtype=torch.long)) == 1).all()
    assert (losses.overlap_cost(x["boxes"][:, [0, 1, 0, 1]], torch.zeros(2, 4, dtype=torch.long)) == 1).all()


def test_regression_cost_refuses_what_it_would_misread():
    x = boxsup_scene(BOXES["apart"])
    with pytest.raises(ValueError, match=r"superpixels \(20, 50\) do not fit logits \(5, 40, 50\)"):
        losses.regression_cost(**x | dict(superpixels=x["superpixels"][:20]))
    R = x["members"].shape[1]
    with pytest.raises(IndexError, match=f"index {R} is out of bounds"):
        losses.regression_cost(**x | dict(superpixels=x["superpixels"] + 1))  # as skimage's slic numbers them
    with pytest.raises(IndexError, match=f"index {R} is out of bounds"):
        losses.regression_cost(**x | dict(superpixels=x["superpixels"] - 1))  # -1 is no way to say the last one
    assert torch.equal(losses.regression_cost(**x | dict(superpixels=x["superpixels"].to(torch.uint8))),
                       losses.regression_cost(**x))


def test_boxsup_refuses_numbers_that_do_not_go_together():
    """One class for all boxes, or one box for all segments, would broadcast; a class too many would not be seen."""
    x = boxsup_scene(BOXES["apart"])
    K, N = len(x["boxes"]), len(x["members"])
    candidate_boxes = torch.zeros(N, 4, dtype=torch.long)
    for classes in (x["classes"][:1], torch.cat([x["classes"], x["classes"][:1]])):
        with pytest.raises(ValueError, match=f"{len(classes)} classes for {K} boxes"):
            losses.regression_cost(**x | dict(classes=classes))
        with pytest.raises(ValueError, match=f"{len(classes)} classes for {K} boxes"):
            losses.recognized_share(x["logits"], x["boxes"], classes)
    with pytest.raises(ValueError, match=f"1 boxes of {N} segments"):
        losses.candidate_cost(**x, candidate_boxes=candidate_boxes[:1])


def test_overlap_cost_needs_no_pixels():
    boxes = torch.tensor([[0.1, 0.2, 0.4, 0.6], [0.5, 0.5, 0.9, 0.9]], dtype=torch.float64)
    torch.testing.assert_close(losses.overlap_cost(boxes, boxes), losses.overlap_cost(1000 * boxes, 1000 * boxes))
    torch.testing.assert_close(losses.overlap_cost(boxes, boxes), 1 - torch.eye(2, dtype=torch.float64))


def test_large_boxes_in_small_integers_keep_their_order():
    """300 x 300 pixels do not fit into int16."""
    boxes = torch.tensor([[0, 0, 300, 300], [0, 0, 30, 30]])
    x = dict(logits=torch.randn(3, 300, 300), superpixels=torch.arange(300).expand(300, 300) // 100,
             members=torch.eye(3), classes=torch.tensor([1, 2]))
    assert torch.equal(losses.regression_cost(**x, boxes=boxes.short()), losses.regression_cost(**x, boxes=boxes))


@pytest.mark.parametrize("wrong", [lambda labels: labels[:, None], lambda labels: labels[:1],
                                   lambda labels: labels[:, :-1]], ids=["a channel", "one image", "another size"])
@pytest.mark.parametrize("name, value", [("cross_entropy_loss", "logits"), ("foreground_loss", "alpha"),
                                         ("background_loss", "logits"), ("attention_weighted_loss", "alpha"),
                                         ("attention_box_loss", "alpha"), ("attention_fill_rate", "alpha")])
def test_labels_of_another_shape_are_refused(name, value, wrong):
    """They would broadcast: a plausible number, in which every image has the labels of all."""
    logits, alpha, labels = torch.randn(4, 4, 8, 9), torch.rand(4, 3, 8, 9), torch.randint(0, 4, (4, 8, 9))
    arguments = [alpha] if name in ("attention_box_loss", "attention_fill_rate") else [logits]
    arguments += [alpha] * (value == "alpha" and arguments[0] is logits)
    assert getattr(losses, name)(*arguments, labels).isfinite().all()
    with pytest.raises(ValueError, match="labels .* do not fit (logits|alpha)"):
        getattr(losses, name)(*arguments, wrong(labels))


def test_shapes_of_samples_and_rates_are_refused():
    logits, labels = torch.randn(3, 4, 8, 9), torch.randint(0, 4, (3, 8, 9))
    with pytest.raises(ValueError, match=r"\(3, 1, 8, 9\): expected \(N, h, w\)"):
        losses.pair_samples(labels[:, None], 4)
    for rates in (torch.tensor(0.5), torch.rand(1), torch.rand(3, 1), torch.rand(4), torch.rand(1, 3)):
        with pytest.raises(ValueError, match=r"rates .*: expected \(3,\) or \(3, 3\)"):
            losses.filling_rate_loss(logits, labels, rates)
    with pytest.raises(ValueError, match="box labels .* do not fit logits"):
        losses.filling_rate_loss(logits, labels[:, :-1], torch.rand(3))


@pytest.mark.parametrize("wrong", [lambda labels: labels[:, None], lambda labels: labels[:1],
                                   lambda labels: labels[:, :-1]], ids=["a channel", "one image", "another size"])
def test_masks_of_another_shape_are_refused(wrong):
    labels = torch.randint(0, 4, (4, 8, 9))
    for mask_labels, box_labels in ((wrong(labels), labels), (labels, wrong(labels)), (labels[:, None],) * 2):
        with pytest.raises(ValueError, match="expected .N, h, w. twice"):
            losses.fill_rate(mask_labels, box_labels, 4)
        with pytest.raises(ValueError, match="expected .N, h, w. twice"):
            losses.fill_rate_loss(torch.rand(4, 3, 8, 9), box_labels, mask_labels)


@pytest.mark.parametrize("wrong", [lambda x: x[:, :1], lambda x: x[:1], lambda x: x[..., :-1]],
                         ids=["one map for all classes", "one image", "another size"])
def test_attention_of_another_shape_is_refused(wrong):
    """One map for all classes would broadcast in Eq. 3, and Eq. 8 would hold up class 1's share of it alone."""
    logits, alpha, labels = torch.randn(4, 4, 8, 9), torch.rand(4, 3, 8, 9), torch.randint(0, 4, (4, 8, 9))
    with pytest.raises(ValueError, match="alpha .* does not fit logits"):
        losses.foreground_loss(logits, wrong(alpha), labels)
    with pytest.raises(ValueError, match="alpha .* does not fit logits"):
        losses.box2seg_loss(logits, wrong(alpha), None, labels, labels, lambda_a=0)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("wrong", [lambda x: x[:1], lambda x: x.transpose(-1, -2), lambda x: x[..., :-1]],
                         ids=["one image", "transposed", "another size"])
def test_affinity_of_another_shape_is_refused(which, wrong):
    arguments = [torch.randn(4, 5, 8, 9), torch.rand(4, 3, 8, 9), torch.randint(0, 3, (4, 8, 9))]
    assert losses.affinity_loss(*arguments, 6).isfinite()
    arguments[which] = wrong(arguments[which])
    with pytest.raises(ValueError, match="do not fit each other"):
        losses.affinity_loss(*arguments, 6)


# ---------------------------------------------------------------------------------------------------------------------
# 8. The metric
# ---------------------------------------------------------------------------------------------------------------------

def test_confusion_matrix_against_naive_loop():
    predictions = torch.randint(5, (3, 17, 13), generator=seeded(0))
    labels = torch.tensor([0, 1, 2, 3, 4, 255])[torch.randint(6, (3, 17, 13), generator=seeded(1))]
    expected = [[0] * 5 for _ in range(5)]
    for prediction, label in zip(predictions.flatten().tolist(), labels.flatten().tolist()):
        if label != 255:
            expected[label][prediction] += 1
    confusion = losses.confusion_matrix(predictions, labels, 5)
    assert confusion.dtype == torch.int64 and confusion.tolist() == expected

    one_by_one = sum(losses.confusion_matrix(p, t, 5) for p, t in zip(predictions, labels))
    assert torch.equal(one_by_one, confusion)                                           # images add up


def test_confusion_matrix_at_the_ends():
    nothing = torch.full((4, 4), 255)
    assert losses.confusion_matrix(torch.zeros(4, 4, dtype=torch.long), nothing, 3).sum() == 0
    assert losses.confusion_matrix(nothing, nothing, 3).sum() == 0        # what is predicted where truth is 255 is free
    assert losses.confusion_matrix(torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.long), 2).sum() == 0


@pytest.mark.parametrize("prediction, label", [(3, 0), (0, 3), (-1, 0), (0, -1), (255, 0), (0, 254)])
def test_confusion_matrix_refuses_unknown_classes(prediction, label):
    """One wrong pixel among right ones."""
    predictions, labels = torch.tensor([0, 1, 2, prediction]), torch.tensor([2, 1, 0, label])
    with pytest.raises(ValueError, match="outside 0..2"):
        losses.confusion_matrix(predictions, labels, 3)


def test_confusion_matrix_refuses_other_shapes():
    with pytest.raises(ValueError, match="differ in shape"):
        losses.confusion_matrix(torch.zeros(2, 3, dtype=torch.long), torch.zeros(3, 2, dtype=torch.long), 2)


def test_iou_against_sets():
    """Intersection over union of the sets of pixels, class by class."""
    predictions = torch.randint(4, (500,), generator=seeded(2))
    labels = torch.tensor([0, 1, 2, 255])[torch.randint(4, (500,), generator=seeded(3))]
    value = losses.iou(losses.confusion_matrix(predictions, labels, 4))
    counted = [k for k in range(500) if labels[k] != 255]
    for c in range(3):
        truth = {k for k in counted if labels[k] == c}
        predicted = {k for k in counted if predictions[k] == c}
        assert math.isclose(value[c].item(), len(truth & predicted) / len(truth | predicted), rel_tol=1e-12)
    assert value[3].isnan() and value.dtype == torch.float64


def test_iou_of_classes_that_do_not_occur():
    """truth 0 0 1 1, prediction 0 2 1 1: class 2 does not occur, so it has no IoU, but the pixel that it took is lost
    to class 0: 1/2. Class 3 occurs nowhere. mIoU = (1/2 + 1) / 2. A class that is never found has 0, not nan."""
    value = losses.iou(losses.confusion_matrix(torch.tensor([0, 2, 1, 1]), torch.tensor([0, 0, 1, 1]), 4))
    assert value[:2].tolist() == [0.5, 1.0] and value[2:].isnan().all() and value.nanmean() == 0.75
    assert losses.iou(losses.confusion_matrix(torch.tensor([0, 0]), torch.tensor([0, 1]), 2)).tolist() == [0.5, 0.0]
