"""Every equation of Box2Seg and BoxSup and the IoU metric, one function each. Copy what you need.

Box2Seg: Attention Weighted Loss and Discriminative Feature Learning for Weakly Supervised Segmentation (Kulharia et
al., ECCV 2020), Sect. 3.

    paper   here                 shape (range)               what it is
    ------  -------------------  --------------------------  ------------------------------------------------------
    m       h * w                                            pixels of the output, 1/4 of the image's side each way
    L       L                                                object classes (VOC: 20); class 0 is background
    y       softmax(logits)      (N, L+1, h, w)  [0, 1]      class probabilities; the functions take the logits
    alpha   alpha                (N, L, h, w)    [0, 1]      attention, sigmoid output; alpha[:, c-1] is class c's
    beta    embeddings           (N, d, h, w)    reals       pixel embeddings
    B       box_labels           (N, h, w)  0..L, 255        boxes painted in, the smaller box last
    M       mask_labels          (N, h, w)  0..L, 255        the same after GrabCut
    eta     fill_rate()          (N, L)          [0, 1]      share of class c's box area that M fills
    eta'    attention_fill_rate  (N, L)          [0, 1]      share of class c's box area that alpha fills

B and M are one-hot tensors in the paper and label maps (class indices) here: equivalent, since a pixel has one class.

BoxSup: Exploiting Bounding Boxes to Supervise Convolutional Networks (Dai et al., ICCV 2015), Sect. 3 and 4. One image:

    paper   here                 shape (range)               what it is
    ------  -------------------  --------------------------  ------------------------------------------------------
    B       boxes                (K, 4)  x0 y0 x1 y1         the annotated boxes, pixels from 0, x1 and y1 exclusive
    l_B     classes              (K,)    1..L                their classes
    S       members              (N, R)  0 or 1              candidate segments: 1 if segment n contains superpixel r
            superpixels          (H, W)  0..R-1              the superpixel of each pixel
            candidate_boxes      (N, 4)  x0 y0 x1 y1         the tight boxes of the segments
    l_S                                                      a segment's label: class of the box it is assigned to, or 0
    X       softmax(logits)      (L+1, H, W)  [0, 1]         class probabilities; the functions take the logits
    E_o     overlap_cost()       (K, N)  [0, 1]              how badly segment n's box fits box k
    E_r     regression_cost()    (K, N)  0 and up            cross-entropy of the network if box k gets segment n
    lambda  weight                                           3

BoxSup's Eq. 1, the training loss, is cross_entropy_loss(); the costs only rank candidates, no gradient flows through.

Conventions of all losses:
- 255 marks an unlabelled pixel (crop padding, VOC's object borders): it enters neither numerator nor denominator and
  gets exactly zero gradient. Map any other ignore value (-1, -100) to 255 first: cross_entropy_loss refuses labels that
  are neither 0..L nor 255, but the other losses would count such a pixel as labelled, with no class.
- A class, an image or a whole batch without labelled pixels contributes a finite 0 that still backpropagates (in
  distributed training every parameter needs a gradient).
- Computed in float32 for any input type; float64 stays float64 (fill_rate(), a ratio of counts, is float32). Call them
  outside autocast; inside it the values are the same.
- No Python loop over pixels, classes or images, and no host-device synchronisation.
- Each function can be copied alone: paste it, with the losses that it calls, below the two imports that follow.
"""
import torch
import torch.nn.functional as F


# ---------------------------------------------------------------------------------------------------------------------
# Box2Seg, Sect. 3.2: box and GrabCut masks taken as correct labels; BoxSup, Eq. 1
# ---------------------------------------------------------------------------------------------------------------------

def cross_entropy_loss(logits, labels):
    """Box2Seg Eq. 1 (labels = B: L_box) and Eq. 2 (labels = M: L_GC); with true masks, the supervised loss.

        L = -1/m  sum_c sum_i  labels(i, c) log y(i, c)

    BoxSup Eq. 1, E(theta) = sum_p e(X(p), l(p)), too: l(p) true or estimated.

    logits (N, C, h, w), labels (N, h, w) in 0..C-1 or 255 -> scalar, the mean over the labelled pixels of the batch.
    """
    # DEPARTS: BoxSup's Eq. 1 prints a sum over pixels, whose gradient would grow with the crop. The mean, as Box2Seg's.
    # PAPER SILENT: what BoxSup's e is, "the per-pixel loss function" (Sect. 3). The cross-entropy, as in the FCN.
    # PAPER SILENT: how images are reduced. Here one mean over all labelled pixels of the batch; L_fg, L_bg, L_alpha
    # and L_A, where each image has areas of its own, are means over images.
    if labels.shape != logits[:, 0].shape:  # gather would quietly take a corner
        raise ValueError(f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}")
    log_y = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)     # (N, C, h, w)
    labelled = labels != 255                                                                      # (N, h, w)
    # gather picks log y of the labelled class. (F.cross_entropy's CUDA kernel for maps is not deterministic.)
    picked = log_y.gather(1, torch.where(labelled, labels, 0).long()[:, None])[:, 0]              # (N, h, w)
    return -torch.where(labelled, picked, 0).sum() / labelled.sum().clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------------
# Box2Seg, Sect. 3.3: boxes as noisy labels, cross-entropy weighted by attention
# ---------------------------------------------------------------------------------------------------------------------

def foreground_loss(logits, alpha, box_labels):
    """Box2Seg Eq. 3: cross-entropy with the box labels, each pixel weighted by its attention.

        L_fg = sum_c  -1 / sum_i B(i, c)  sum_i  alpha(i, c) B(i, c) log y(i, c)        c = 1..L

    logits (N, L+1, h, w), alpha (N, L, h, w) in [0, 1], box_labels (N, h, w) -> scalar.
    The gradient reaches both logits and alpha: where y(i, c) is near 1, attention costs nothing; elsewhere the loss
    pushes attention down, which is why Sect. 3.3 regularizes it.
    """
    # DEPARTS: Eq. 3 prints 1 / sum_i B(i, c) before the sum over c, where c is not bound. We divide each class by its
    # own box area, "to give similar weighting to each class" as its text says, sum over classes, average over images.
    # (Measured on photographs of 21 classes, lambda_AW 0.3: L_AW helps because object pixels get more weight, not
    # because attention is learned. Fixed attention alpha = M gains as much, also with one normaliser for all classes;
    # alpha = 1 gains nearly as much. After twice the epochs 0.7 points of Box2Seg's gain are left; with noisier M it
    # gains 3.0, but a constant alpha = gamma eta_c in the whole box is then as good as a learned one. The normaliser
    # per class helps small objects. See docs/results.md, "Box2Seg, 21 classes".)
    if box_labels.shape != logits[:, 0].shape:  # (N, 1, h, w) would broadcast, and cross images
        raise ValueError(f"box labels {tuple(box_labels.shape)} do not fit logits {tuple(logits.shape)}")
    if alpha.shape != logits[:, 1:].shape:      # one map for all classes would broadcast, and Eq. 8 see class 1 alone
        raise ValueError(f"alpha {tuple(alpha.shape)} does not fit logits {tuple(logits.shape)}: a map per class, 1..L")
    log_y = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)[:, 1:]
    classes = torch.arange(1, logits.shape[1], device=logits.device).view(1, -1, 1, 1)
    B = box_labels[:, None] == classes                                                            # (N, L, h, w)
    B_log_y = torch.where(B, log_y, 0)  # not B * log_y: a class masked by a logit of -inf would be 0 * inf = nan
    return (-(alpha * B_log_y).sum((2, 3)) / B.sum((2, 3)).clamp(min=1)).sum(1).mean()


def background_loss(logits, box_labels):
    """Box2Seg Eq. 4: outside all boxes the label is certain.

        L_bg = - sum_i B(i, 0) log y(i, 0) / sum_i B(i, 0)

    logits (N, L+1, h, w), box_labels (N, h, w) -> scalar, per image, mean over images.
    """
    if box_labels.shape != logits[:, 0].shape:
        raise ValueError(f"box labels {tuple(box_labels.shape)} do not fit logits {tuple(logits.shape)}")
    log_y = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)[:, 0]
    B = box_labels == 0                                                                           # (N, h, w)
    return (-torch.where(B, log_y, 0).sum((1, 2)) / B.sum((1, 2)).clamp(min=1)).mean()


def attention_weighted_loss(logits, alpha, box_labels):
    """Box2Seg Eq. 5: L_AW = L_fg + L_bg. Arguments as for Eq. 3."""
    return foreground_loss(logits, alpha, box_labels) + background_loss(logits, box_labels)


def attention_box_loss(alpha, box_labels):
    """Box2Seg Eq. 6: attention should equal the box mask. Without it or L_alpha^fr, alpha = 0 would minimize Eq. 3.

        L_alpha^bbox = sum_i sum_c  || B(i, c) - alpha(i, c) ||^2                       c = 1..L

    alpha (N, L, h, w) in [0, 1], box_labels (N, h, w) -> scalar.
    """
    # DEPARTS: Eq. 6 prints a sum over all pixels, thousands of times larger than the other terms, which are means: the
    # network learns little else (on 21 classes 3.5 mIoU in place of 38.2). We take the mean over labelled pixels, the
    # sum over classes and the mean over images. (In boxes of less than half the crop this pulls attention away from 0
    # with a smaller gradient than L_alpha^fr: 2 / crop area against 1 / box area. With fixed features, where it cannot
    # drown other gradients, the printed sum keeps attention alive even at the printed weights: docs/results.md,
    # "Weights of the losses".)
    if box_labels.shape != alpha[:, 0].shape:
        raise ValueError(f"box labels {tuple(box_labels.shape)} do not fit alpha {tuple(alpha.shape)}")
    alpha = alpha.to(torch.promote_types(alpha.dtype, torch.float32))
    classes = torch.arange(1, alpha.shape[1] + 1, device=alpha.device).view(1, -1, 1, 1)
    B = (box_labels[:, None] == classes).to(alpha.dtype)                                          # (N, L, h, w)
    labelled = (box_labels != 255)[:, None]                                                       # (N, 1, h, w)
    squared = torch.where(labelled, (B - alpha).square(), 0)
    return (squared.sum((1, 2, 3)) / labelled.sum((1, 2, 3)).clamp(min=1)).mean()


def fill_rate(mask_labels, box_labels, num_classes):
    """Box2Seg Eq. 7: the share of class c's box area that the GrabCut mask fills.

        eta_c = sum_i M(i, c) / sum_i B(i, c)

    mask_labels, box_labels (N, h, w), num_classes = L + 1 -> (N, L) float32 in [0, 1], 0 for a class without box.
    """
    # DEPARTS: Eq. 7 prints the sum of M over all pixels. Where boxes overlap, M(., c) can reach beyond B(., c), and the
    # rate could exceed 1. We count M inside B only; without overlap it is the same number.
    if mask_labels.shape != box_labels.shape or box_labels.ndim != 3:
        raise ValueError(f"labels {tuple(mask_labels.shape)} and {tuple(box_labels.shape)}: expected (N, h, w) twice")
    classes = torch.arange(1, num_classes, device=box_labels.device).view(1, -1, 1, 1)
    B = (box_labels[:, None] == classes) & (mask_labels != 255)[:, None]                          # (N, L, h, w)
    M = B & (mask_labels[:, None] == classes)
    return M.sum((2, 3)).float() / B.sum((2, 3)).clamp(min=1)


def attention_fill_rate(alpha, box_labels):
    """Box2Seg Eq. 8: the share of class c's box area that attention fills.

        eta'_c = sum_i B(i, c) alpha(i, c) / sum_i B(i, c)

    alpha (N, L, h, w) in [0, 1], box_labels (N, h, w) -> (N, L) in [0, 1], 0 for a class without box.
    """
    if box_labels.shape != alpha[:, 0].shape:
        raise ValueError(f"box labels {tuple(box_labels.shape)} do not fit alpha {tuple(alpha.shape)}")
    alpha = alpha.to(torch.promote_types(alpha.dtype, torch.float32))
    classes = torch.arange(1, alpha.shape[1] + 1, device=alpha.device).view(1, -1, 1, 1)
    B = (box_labels[:, None] == classes).to(alpha.dtype)                                          # (N, L, h, w)
    return (B * alpha).sum((2, 3)) / B.sum((2, 3)).clamp(min=1)


def fill_rate_loss(alpha, box_labels, mask_labels, gamma=0.7):
    """Box2Seg Sect. 3.3, a hinge: attention must fill at least gamma times what GrabCut fills; above that it is free.

        L_alpha^fr = sum_c max(0, gamma eta_c - eta'_c)

    alpha (N, L, h, w) in [0, 1], box_labels, mask_labels (N, h, w) -> scalar, sum over the classes present, mean over
    images.
    """
    # PAPER SILENT: how classes and images are reduced (it prints the loss of one class). The sum over classes, as in
    # Eq. 3, whose gradient this one has to balance, and the mean over images.
    # PAPER SILENT: pixels of a box that M does not label (255, around the objects of true masks). They count in neither
    # rate, so that eta and eta' look at the same pixels. Eq. 3 counts them, so nothing keeps attention up on them.
    eta = fill_rate(mask_labels, box_labels, alpha.shape[1] + 1)                                  # (N, L)
    box_labels = torch.where(mask_labels == 255, 255, box_labels)
    return (gamma * eta - attention_fill_rate(alpha, box_labels)).clamp(min=0).sum(1).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Box2Seg, Sect. 3.4: pixel embeddings
# ---------------------------------------------------------------------------------------------------------------------

def affinity(a, b):
    """Box2Seg Eq. 9: cosine similarity of every embedding in a with every embedding in b.

        A(i, j) = beta_i . beta_j / (||beta_i|| ||beta_j||)

    a (..., P, d), b (..., Q, d) -> (..., P, Q) in [-1, 1].
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = (F.normalize(x.to(dtype), dim=-1, eps=1e-6) for x in (a, b))
    with torch.autocast(a.device.type, enabled=False):  # autocast would round the products to 16 bits
        return a @ b.transpose(-2, -1)


def pair_samples(labels, num_classes, fraction=0.1):
    """How many pixels per class to sample for Eq. 10, so that their pairs are `fraction` of an image's pixel pairs.

    Sect. 4.1: "randomly sampling 10% of pixel pairs". S samples make S^2 pairs, so S = sqrt(fraction) m, shared equally
    by the classes that occur.

    labels (N, h, w) -> (N,) int64, at least 1.
    """
    if labels.ndim != 3:
        raise ValueError(f"labels {tuple(labels.shape)}: expected (N, h, w)")
    # PAPER SILENT: how to sample 10 % of the pairs "equally from each class" where a class has fewer pixels than its
    # equal share. Its pixels are drawn more than once; repeated pairs count, so fewer than 10 % are distinct.
    classes = torch.arange(num_classes, device=labels.device).view(1, -1, 1, 1)
    area = (labels[:, None] == classes).sum((2, 3))                                               # (N, L+1)
    return (fraction ** 0.5 * area.sum(1) / (area > 0).sum(1).clamp(min=1)).round().long().clamp(min=1)


def affinity_loss(embeddings, targets, labels, num_samples, generator=None):
    """Box2Seg Eq. 10: pixels of one class should have affinity 1, pixels of different classes 0.

        L_A = 1/|pairs|  sum_{i != j}  (A(i, j) - y_j^T y_i)^2         over sampled pixels of an image, mean over images

    embeddings (N, d, h, w); targets (N, C, h, w), y: class probabilities, or one-hot M in stage 1; labels (N, h, w),
    the classes to sample by; num_samples: pixels sampled per class present, background included (an int, or the (N,)
    of pair_samples()); generator: on the device of labels -> scalar. The embedding branch must not end in a ReLU: an
    embedding of exactly 0 has no direction, and its gradient is huge.

    "To avoid creating large affinity matrices of size m x m, we randomly sample a small fraction of pixel embeddings
    equally from each class" (Sect. 3.4). Equally: a class with fewer pixels than num_samples repeats them in turn, so
    that the sample is described by a count per pixel, normalised to weights w_i with sum 1. Then the affinity matrix is
    never built at all: with the unit embeddings e_i as columns of E, the targets y_i as columns of Y, W = diag(w), the
    squares multiply out to small Gram matrices,

        sum_ij w_i w_j (e_i.e_j - y_i.y_j)^2  =  ||E W E^T||_F^2  -  2 ||E W Y^T||_F^2  +  ||Y W Y^T||_F^2

    of d x d, d x C and C x C. It is the same number, in memory linear in m, and any number of pixels may be sampled.
    (In float32 up to 2e-6, so that the loss of perfect embeddings may come out as -0.000002.)
    """
    # DEPARTS: Eq. 10 prints a sum over all pairs, whose size would depend on how many pixels are sampled; with lambda_A
    # = 1 beside terms that are means, we take the mean. And a pixel is not paired with itself, where A = 1 always.
    if not embeddings[:, 0].shape == targets[:, 0].shape == labels.shape:
        raise ValueError(f"embeddings {tuple(embeddings.shape)}, targets {tuple(targets.shape)} and labels "
                         f"{tuple(labels.shape)} do not fit each other")
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    labels = labels.flatten(1).long()                                                             # (N, m)
    if torch.is_tensor(num_samples):
        num_samples = num_samples.view(-1, 1)
    # Sample: shuffle the pixels within each class, and deal num_samples out over their ranks.
    shuffle = torch.empty(labels.shape, device=labels.device).uniform_(generator=generator)  # as rand, but it compiles
    order = (labels + 0.5 * shuffle).argsort(1)  # by class, at random within it (half: 4 + 0.99999999 would round to 5)
    group = labels.gather(1, order)
    first = torch.searchsorted(group, group)                                      # where the pixel's class begins,
    size = torch.searchsorted(group, group, right=True) - first                   # how many pixels it has,
    rank = torch.arange(labels.shape[1], device=labels.device) - first            # and the pixel's place among them
    draws = (num_samples - 1 - rank).div(size, rounding_mode="floor") + 1         # 1 or 0 if size >= num_samples
    draws = torch.where(group == 255, 0, draws)
    w = torch.zeros(labels.shape, dtype=dtype, device=labels.device).scatter(1, order, draws.to(dtype))
    w = w / w.sum(1, keepdim=True).clamp(min=1)                                                   # (N, m), sums to 1

    e = F.normalize(embeddings.flatten(2).to(dtype), dim=1, eps=1e-6)                             # (N, d, m)
    y = targets.flatten(2).to(dtype)                                                              # (N, C, m)
    with torch.autocast(e.device.type, enabled=False):
        ee, ey, yy = (a * w[:, None] @ b.transpose(1, 2) for a, b in ((e, e), (e, y), (y, y)))
    every_pair = ee.square().sum((1, 2)) - 2 * ey.square().sum((1, 2)) + yy.square().sum((1, 2))
    self_pairs = (w * (e.square().sum(1) - y.square().sum(1))).square().sum(1)
    share = 1 - w.square().sum(1)  # weight of the pairs i != j: 0 for one sampled pixel, else >= 4/9 (w = 2/3, 1/3)
    return ((every_pair - self_pairs) * (share > 0.25) / share.clamp(min=0.25)).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Box2Seg, Sect. 3.5: the total loss
# ---------------------------------------------------------------------------------------------------------------------

def box2seg_loss(logits, alpha, embeddings, box_labels, mask_labels, num_samples=256, lambda_aw=1.0, lambda_alpha=5.0,
                 lambda_a=1.0, regularizer="fr", gamma=0.7, detach_targets=False, generator=None, fill_labels=None):
    """Box2Seg Eq. 11: L = L_GC + lambda_AW L_AW + lambda_alpha L_alpha + lambda_A L_A.

    logits (N, L+1, h, w); alpha (N, L, h, w) in [0, 1], or None if lambda_aw = 0; embeddings (N, d, h, w), or None if
    lambda_a = 0; box_labels, mask_labels (N, h, w); regularizer "fr" (L_alpha^fr) or "box" (L_alpha^bbox, Eq. 6).
    lambda_aw = 0 leaves out L_AW and L_alpha, lambda_a = 0 leaves out L_A, which makes the rows of Table 3.
    fill_labels (N, h, w): labels for the filling rates of L_alpha^fr, where they are not mask_labels (ours: GrabCut's
    beside true masks, for Table 4).
    -> (scalar, {"L_GC": ..., "L_AW": ..., "L_alpha": ..., "L_A": ...}), the terms unweighted and detached.
    """
    # DEPARTS: Sect. 4.1 prints the weights 10, 1, 1; ours are 1, 5, 1. Where attention fills less than gamma eta, its
    # gradient in a box of class c is lambda_AW (-log y_c) - lambda_alpha, over the box's area: with 10 and 1 attention
    # grows only where y_c > exp(-1/10) = 0.905, where no new network is, and dies in the first steps; what is left of
    # L_AW is then L_bg at ten times its weight. With lambda_alpha = 5 lambda_AW it grows where y_c > exp(-5) = 0.007.
    # PAPER SILENT: how many pixels L_A samples in stage 2. 256 of each class here; train_box2seg.py samples as many as
    # in stage 1, 10 % of the pairs.
    if lambda_aw and alpha is None or lambda_a and embeddings is None:
        raise ValueError("without alpha lambda_aw must be 0, without embeddings lambda_a")
    terms = {"L_GC": cross_entropy_loss(logits, mask_labels)}
    loss = terms["L_GC"]
    if lambda_aw:
        terms["L_AW"] = attention_weighted_loss(logits, alpha, box_labels)
        if regularizer not in ("fr", "box"):
            raise ValueError(f"regularizer {regularizer!r}: expected 'fr' or 'box'")
        fill_labels = mask_labels if fill_labels is None else fill_labels
        terms["L_alpha"] = (fill_rate_loss(alpha, box_labels, fill_labels, gamma) if regularizer == "fr" else
                            attention_box_loss(alpha, box_labels))
        loss = loss + lambda_aw * terms["L_AW"] + lambda_alpha * terms["L_alpha"]
    if lambda_a:
        # PAPER SILENT: whether the gradient of Eq. 10 reaches y in stage 2. The embeddings "are trained by minimizing
        # disagreements between them and estimated segmentation output" (Sect. 1: only they move), yet "the entire
        # network" is trained "end-to-end to optimize the loss function in Eqn. 11" (Sect. 4.1: both move). Both by
        # default; with detach_targets, L_A reaches y only through the features that the branches share.
        # PAPER SILENT: by which labels pixels are sampled "equally from each class" in stage 2. By M, which is
        # fixed; of the network's own labels most classes are missing at first.
        y = F.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)
        y = y.detach() if detach_targets else y
        terms["L_A"] = affinity_loss(embeddings, y, mask_labels, num_samples, generator)
        loss = loss + lambda_a * terms["L_A"]
    return loss, {name: term.detach() for name, term in terms.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Box2Seg, Sect. 2, the comparison method: pixels selected by a hard threshold where Box2Seg has soft weights
# ---------------------------------------------------------------------------------------------------------------------

def filling_rate_loss(logits, box_labels, rates):
    """Song et al. (CVPR 2019), as Box2Seg's Sect. 2 tells it: in the boxes of class c only the most confident
    pixels are trained on, a share rates[c - 1] of them; the rest, "the 40% pixels with the lowest confidences in each
    bounding box" for a rate of 0.6, are ignored.

    logits (N, L+1, h, w), box_labels (N, h, w), rates (L,) per class or (N, L) per image, in [0, 1] -> scalar, the mean
    cross-entropy over the pixels kept and those outside all boxes. The number kept is rates * area, rounded.
    """
    # DEPARTS: the pixels are ranked "in each bounding box" (Sect. 2). B does not tell two boxes of one class apart, so
    # theirs are ranked together.
    N, L = len(logits), logits.shape[1] - 1
    if box_labels.shape != logits[:, 0].shape:
        raise ValueError(f"box labels {tuple(box_labels.shape)} do not fit logits {tuple(logits.shape)}")
    if rates.shape not in ((L,), (N, L)):
        raise ValueError(f"rates {tuple(rates.shape)}: expected {(L,)} or {(N, L)}")
    log_y = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)
    classes = torch.arange(1, logits.shape[1], device=logits.device).view(1, -1, 1)
    B = box_labels.flatten(1)[:, None] == classes                                                 # (N, L, m)
    confidence = torch.where(B, log_y[:, 1:].flatten(2).detach(), -torch.inf)
    rank = confidence.argsort(dim=2, descending=True, stable=True).argsort(2)    # 0 for class c's most confident pixel
    keep = (B & (rank < (rates.float() * B.sum(2)).round()[:, :, None])).any(1) | (box_labels.flatten(1) == 0)
    return cross_entropy_loss(logits, torch.where(keep.view(box_labels.shape), box_labels, 255))


# ---------------------------------------------------------------------------------------------------------------------
# BoxSup, Sect. 4: the cost of assigning candidate segment n to box k, for all pairs (k, n) of an image at once
# ---------------------------------------------------------------------------------------------------------------------

def overlap_cost(boxes, candidate_boxes):
    """BoxSup Eq. 2, the summand: how badly the tight box of a segment fits the annotated box.

        E_o(k, n) = 1 - IoU(B_k, box of S_n)

    boxes (K, 4), candidate_boxes (N, 4), x0 y0 x1 y1, x1 and y1 exclusive -> (K, N) in [0, 1]; 1 for an empty segment.
    """
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    boxes, candidate_boxes = boxes.to(dtype)[:, None], candidate_boxes.to(dtype)                  # (K, 1, 4), (N, 4)
    area, candidate_area = ((b[..., 2:] - b[..., :2]).prod(-1) for b in (boxes, candidate_boxes))
    low = torch.maximum(boxes[..., :2], candidate_boxes[:, :2])                                   # (K, N, 2)
    high = torch.minimum(boxes[..., 2:], candidate_boxes[:, 2:])
    both = (high - low).clamp(min=0).prod(-1)                                                     # (K, N)
    return 1 - both / (area + candidate_area - both).clamp(min=1e-9)  # 0 / 0 of two empty boxes is 0


def regression_cost(logits, superpixels, members, boxes, classes):
    """BoxSup Eq. 3 for every box with every segment: how badly the label map that this choice makes fits the network.

        E_r(k, n) = 1/HW  sum_{p in B_k}  e(X(p), class k if p in S_n, background otherwise)        e: cross-entropy

    logits (L+1, H, W) at the image's own resolution, superpixels (H, W) ids 0..R-1, members (N, R) bool or 0 and 1,
    boxes (K, 4), classes (K,) in 1..L -> (K, N). A pixel in several boxes counts in the smallest of them alone, whose
    segment is painted last; a box that has no pixel left costs 0 with every segment, and Eq. 2 alone chooses.

    Split the sum: every pixel of the box costs e(X(p), 0), whatever the segment; each pixel of the segment then adds
    e(X(p), class k) - e(X(p), 0). The second part is a sum over superpixels, so that all boxes and segments together
    are one matrix product,

        HW E_r(k, n) = sum_{p in B_k} e(X(p), 0)  +  sum_r members(n, r) D(k, r)
        D(k, r)      = sum_{p in B_k and superpixel r}  e(X(p), class k) - e(X(p), 0)
    """
    # DEPARTS: Eq. 3 prints a sum over all pixels of the image, beside Eq. 2, which is at most 1: with lambda = 3, Eq. 2
    # would not matter. We sum over the pixels of the box only and divide by those of the image, H W. What a segment
    # covers outside the box is judged by Eq. 2 alone. So E_r hardly counts for small boxes. (The mean over the box's
    # pixels is larger by the image's area over the box's, 13 times for the median box of VOC's 2007 images: at lambda =
    # 3 a network that is not yet sure of its objects then chooses tiny segments, and its feedback makes the masks
    # worse. Where lambda holds for recognized boxes only, the mean over the box and the mean over the image give
    # equally good masks, of small boxes, too: docs/results.md, "Network feedback".)
    # PAPER SILENT: what Eq. 3 counts where boxes overlap, when each box chooses by itself. A pixel in several boxes is
    # the smallest one's, whose segment is painted last: 72.5 / 68.8 mIoU of the chosen masks in place of 71.2 / 67.8
    # where such pixels counted for none (docs/results.md, "Network feedback"). (Where the smallest box's segment leaves
    # them free, a larger box's may be painted there; that is not counted.)
    (H, W), K, R = superpixels.shape, len(boxes), members.shape[1]
    if len(classes) != K:
        raise ValueError(f"{len(classes)} classes for {K} boxes")
    if logits.shape[1:] != superpixels.shape:  # gather would quietly take a corner
        raise ValueError(f"superpixels {tuple(superpixels.shape)} do not fit logits {tuple(logits.shape)}")

    # Whose is each pixel? 1..K, or 0, no box's. Of several boxes the smallest, of equal ones the last.
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)                                                  # (K, 1) each
    y, x = torch.arange(H, device=boxes.device), torch.arange(W, device=boxes.device)
    inside = ((y0 <= y) & (y < y1))[:, :, None] & ((x0 <= x) & (x < x1))[:, None]                 # (K, H, W)
    order = (-(x1 - x0).double() * (y1 - y0))[:, 0].argsort(stable=True)                          # (K,), largest first
    place = torch.arange(1, K + 1, dtype=torch.int16, device=boxes.device)[:, None, None]
    top = F.pad(inside[order] * place, (0, 0, 0, 0, 1, 0)).amax(0)     # (H, W) place of the box painted last, 0: none
    owner = F.pad(order + 1, (1, 0))[top.long()]                                                  # (H, W) 0..K

    log_y = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=0)     # (L+1, H, W)
    e_background = -log_y[0]                                                                      # (H, W)
    e_class = -log_y.gather(0, F.pad(classes.long(), (1, 0))[owner][None])[0]                     # (H, W), its owner's

    ids = superpixels.long()                            # 0..R-1; index_put raises at R, but would take -1 for R-1
    ids = ids.masked_fill(ids < 0, R)
    table = torch.zeros(K + 1, R, dtype=torch.float64, device=log_y.device)
    # Summed in float64: a CPU with several threads adds float32 in no fixed order, and equal runs would differ.
    background, D = (table.index_put((owner, ids), e.double(), accumulate=True)[1:].to(log_y.dtype)
                     for e in (e_background, e_class - e_background))                             # (K, R)
    with torch.autocast(D.device.type, enabled=False):  # autocast would round the sums to 16 bits
        total = background.sum(1, keepdim=True) + D @ members.to(D.dtype).T                       # (K, N)
    return total / (H * W)


def recognized_share(logits, boxes, classes):
    """How much of each box the network predicts as the box's class. Ours, not in the paper: train_boxsup.py sets lambda
    to 0 for a box where this is small.

    logits (L+1, H, W) at the image's own resolution, boxes (K, 4), classes (K,) in 1..L -> (K,) in [0, 1], the
    share of the box's pixels whose most probable class is the box's.

    A network that does not recognize an object takes it for background; Eq. 3 is then smallest for the smallest
    segment, and the masks become scraps, from which the network learns that there is nothing but background.
    """
    if len(classes) != len(boxes):
        raise ValueError(f"{len(classes)} classes for {len(boxes)} boxes")
    y, x = (torch.arange(side, device=boxes.device) for side in logits.shape[1:])
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)                                                  # (K, 1) each
    inside = ((y0 <= y) & (y < y1))[:, :, None] & ((x0 <= x) & (x < x1))[:, None]                 # (K, H, W)
    recognized = inside & (logits.argmax(0) == classes.long()[:, None, None])
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return recognized.sum((1, 2)).to(dtype) / inside.sum((1, 2)).clamp(min=1)


def candidate_cost(logits, superpixels, members, candidate_boxes, boxes, classes, weight=3.0):
    """BoxSup Eq. 4, for every box with every segment: E_o + lambda E_r, lambda = 3 the paper's.

    Arguments as for Eq. 2 and 3, or logits None: E_o alone, for the first label update -> (K, N). weight: lambda, a
    number or (K, 1), one for each box. Box k takes one of the segments with the *smallest* costs in row k (Sect. 4.3):
    costs.topk(5, largest=False).
    """
    # DEPARTS: Eq. 2 prints 1/N before the sum over segments. A box activates one segment, so that one term of the sum
    # is left; divided by the N segments, thousands here, it would be nothing beside E_r. Left out.
    # DEPARTS: Sect. 4.3 samples from the segments "with the largest costs", after it has asked for the cost that "is
    # the smallest among all candidates". Eq. 4 is a minimum: we take the smallest.
    if len(candidate_boxes) != len(members):
        raise ValueError(f"{len(candidate_boxes)} boxes of {len(members)} segments")
    if logits is None:
        return overlap_cost(boxes, candidate_boxes)
    return overlap_cost(boxes, candidate_boxes) + weight * regression_cost(logits, superpixels, members, boxes, classes)


# ---------------------------------------------------------------------------------------------------------------------
# The metric
# ---------------------------------------------------------------------------------------------------------------------

def confusion_matrix(predictions, labels, num_classes):
    """Pixel counts (num_classes, num_classes) int64: rows the truth, columns the prediction; truth 255 is left out.

    predictions, labels: integer tensors of one shape. Add the matrices of all images up before taking iou(): the
    benchmark's IoU is that of the whole set. ValueError for a class outside 0..num_classes-1.
    """
    if predictions.shape != labels.shape:
        raise ValueError(f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)} differ in shape")
    predictions, labels = predictions.flatten().long(), labels.flatten().long()
    valid = labels != 255
    known = ~valid | ((0 <= labels) & (labels < num_classes) & (0 <= predictions) & (predictions < num_classes))
    if not known.all():
        raise ValueError(f"a label or prediction outside 0..{num_classes - 1}")
    cell = torch.where(valid, labels * num_classes + predictions, num_classes ** 2)      # one bin more for the ignored
    return torch.bincount(cell, minlength=num_classes ** 2 + 1)[:-1].view(num_classes, num_classes)


def iou(confusion):
    """Intersection over union per class, (C,) float64, of a confusion matrix (C, C) with rows the truth.

        IoU_c = n_cc / (sum_j n_cj + sum_i n_ic - n_cc)

    nan for a class that does not occur in the truth: iou(confusion).nanmean() is the mIoU.
    """
    confusion = confusion.double()
    truth, predicted, both = confusion.sum(1), confusion.sum(0), confusion.diagonal()
    return torch.where(truth > 0, both / (truth + predicted - both), torch.nan)
