"""
Images to candidate segments: the pool from which BoxSup samples its masks (Dai et al., ICCV 2015, Sect. 4.1).

    python mcg_candidates.py --data VOCdevkit                              candidates for all of trainaug (or train)
    python mcg_candidates.py --data VOCdevkit --method ss                  ... by Selective Search: Table 3 (gop: GOP)
    python mcg_candidates.py --coco instances_train2014.json --images train2014 --out coco_candidates
                                                                           extra boxes, for Tables 1 and 4
    python mcg_candidates.py --coco ... --masks --out coco_masks           COCO's own masks instead: Table 1, 68.1
    python mcg_candidates.py --image FILE --box X0 Y0 X1 Y1                look at those that fit a box best

Reads   VOC2012/JPEGImages/<id>.jpg (or .jpeg, .png, .webp, .bmp, .tif, in capitals, too), Annotations/<id>.xml,
        ImageSets/Segmentation/<split>.txt, class_names.txt if there
        (or a COCO instances_*.json and its images)
Writes  VOC2012/Candidates-mcg/<id>.npz (-ss, -gop), 3,500 segments at most, best first (gop: by seed), and source.json:

    superpixels      (H, W) int32   ids 0..R-1; every segment is a union of superpixels
    members          (N, R) bool    segment n holds superpixel r; packed along axis 1 by numpy.packbits
    candidate_boxes  (N, 4) int32   the segments' tight boxes: x0, y0, x1, y1, 0-based, half-open
    boxes, classes   (K, 4) int32, (K,) uint8   the annotation's, as in grabcut_labels.py
    <id>.png                       with --masks instead of <id>.npz: class index per pixel, as in SegmentationClass
    source.json      {"images": the images' folder, seen from this one; "class_names": [...]; "method": ...;
                     "boxes": "Annotations" or the JSON's name; "max_candidates": ...}: a run with others is refused

mcg(), selective_search() and geodesic() come first; the rest reads files and runs these over lists of images.

Segments have no class yet: training decides which one a box takes (train_boxsup.py, Eq. 2 to 4). The segments
come from the pixels alone. No learned model is shipped: the published MCG reads contours from a structured forest and
ranks by a random forest, and the published GOP learns its seeds, all trained on masks; here contours, ranks and seeds
follow from the image by rule. What exists is kept, unless its boxes were corrected since: a second run makes only what
is missing, so a run may be interrupted at any time. Delete the folder to make it anew. Expect 1.2 s (mcg), 1.1 s (ss),
0.2 s (gop) of one core and about 100 KB for an image of VOC's size.
"""
import argparse
import contextlib
import heapq
import itertools
import json
import multiprocessing
import os
import re
import signal
import struct
import sys
import threading
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm


# ---- Multiscale Combinatorial Grouping
# Arbelaez, Pont-Tuset, Barron, Marques, Malik, "Multiscale Combinatorial Grouping", CVPR 2014: contours at several
# scales, a tree of regions from each, and small groups of neighbouring regions from each tree. In place of its two
# learned parts contours are distances of local histograms, as in gPb (Arbelaez et al., PAMI 2011), and the ranking is
# the place in the tree, from its root down. Read mcg() first, at the end of this section: the functions before it are
# its steps, in order. The constants are ours, chosen on some 50 images of VOC's train by the measures of
# tests/candidate_quality.py, where most of them make little difference.
SCALES = 1, 2, 4                              # contours are computed on the image and on reductions by 2 and 4
SHORTEST_SIDE = 64                            # pixels; a reduction that leaves less is not used: contours would wander
WORKING_AREA = 250_000                        # pixels; a larger image is reduced to this (VOC's never are)
SIGMA, OFFSET = 2.0, 3.0                      # pixels: the windows compared on the two sides of a contour
BINS, WIDTHS, MIDDLES = (8, 8, 8), (14, 9, 9), (50, 0, 0)           # histograms of L, a, b, in units of Lab
TEXTURE, FAINT = 1.0, 8.0                     # weight of the orientation histogram; step of L in 2 pixels: half an edge
GRID, TILT = 9, 0.004                         # pixels: superpixels of even size where nothing else decides
MOST_SUPERPIXELS = 2500
EIGENVECTORS, SPREAD, SPECTRAL = 12, 0.1, 0.3    # affinity exp(-strength / SPREAD); share of the spectral strength
AREA_POWER = 0.1                              # small regions are merged first, however faintly preferred
MAX_REGIONS_FOR_GROUPS = 300, 80, 25          # pairs, triplets, 4-tuples are noted when so few regions are left
LONGEST = 1100                                # at most, of each list (a tree's groups of one size)
JACCARD = 0.95                                # above: near duplicates
# PAPER SILENT: how many candidates an image has. At most 3,500 here, whatever the method.
MAX_CANDIDATES = 3500


def to_lab(image):
    """(H, W, 3) uint8 RGB -> float32 L in 0..100, a, b in about -100..100."""
    return cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


def soft_bins(values, width, count, middle=0.0):
    """(H, W) float32 -> list of `count` maps (H, W) that add up to 1: a value is shared by its two nearest bins.

    The bins' centres are `width` apart, `middle` in their middle; what lies beyond the outermost belongs to it.
    """
    position = ((values - middle) / width + (count - 1) / 2).clip(0, count - 1)
    return [(1 - np.abs(position - k)).clip(0) for k in range(count)]


def contour_channels(image):
    """(H, W, 3) uint8 RGB -> four lists of maps (H, W): soft histograms of L, a, b, edge orientation."""
    lab = to_lab(image)
    lists = [soft_bins(lab[..., c], WIDTHS[c], BINS[c], MIDDLES[c]) for c in range(3)]
    smooth = cv2.GaussianBlur(np.ascontiguousarray(lab[..., 0]), (0, 0), 0.7)
    dx, dy = (cv2.Sobel(smooth, cv2.CV_32F, *axis, scale=1 / 4) for axis in ((1, 0), (0, 1)))
    size = cv2.magnitude(dx, dy)
    edge = size / (size + FAINT)                                                 # 0 on a plain surface, to 1 on an edge
    turn = (np.arctan2(dy, dx) % np.pi) * (8 / np.pi)                            # 0..8, and 8 is 0 again
    away = [np.abs(turn - k) for k in range(8)]
    lists.append([edge * (1 - np.minimum(d, 8 - d)).clip(0) for d in away] + [1 - edge])
    return lists


def contour_strength(image):
    """(H, W, 3) uint8 RGB -> (8, H, W) float32 in 0..1: strength of a contour whose normal is at k * 22.5 degrees.

    Angles run from x (right) to y (down). Two Gaussian windows, OFFSET to either side along the normal, each give a
    histogram, g and h; the strength is their Hellinger distance sqrt(1 - sum_k sqrt(g_k h_k)), averaged over L, a, b
    and texture.
    """
    height, width = image.shape[:2]
    pad = int(np.ceil(OFFSET))
    steps = [(round(OFFSET * np.cos(k * np.pi / 8)), round(OFFSET * np.sin(k * np.pi / 8))) for k in range(8)]
    strength = np.zeros((8, height, width), np.float32)
    for maps, weight in zip(contour_channels(image), (1, 1, 1, TEXTURE)):
        common = np.zeros((8, height, width), np.float32)                        # sum_k sqrt(g_k h_k)
        for bin_map in maps:
            root = np.sqrt(cv2.GaussianBlur(bin_map, (0, 0), SIGMA))
            root = cv2.copyMakeBorder(root, pad, pad, pad, pad, cv2.BORDER_REPLICATE)
            for angle, (x, y) in enumerate(steps):
                one = root[pad + y:pad + y + height, pad + x:pad + x + width]
                other = root[pad - y:pad - y + height, pad - x:pad - x + width]
                cv2.accumulateProduct(one, other, common[angle])
        strength += weight * np.sqrt((1 - common).clip(0))
    return strength / (3 + TEXTURE)


def descend(heights):
    """(H, W) float32 contour map -> (H, W) int32 superpixels: pixels whose steepest descent ends in the same minimum.

    Each pixel points to the lowest of itself and its four neighbours; following pointers of pointers, a path of n steps
    takes log2(n) rounds. A faint egg-box of period GRID makes superpixels of even size where there is no contour.
    """
    height, width = heights.shape
    own = np.arange(height * width).reshape(height, width)
    for period in itertools.count(GRID):
        wave = [np.cos(2 * np.pi / period * np.arange(n, dtype=np.float32)) for n in (height, width)]
        heights = heights - TILT * (wave[0][:, None] + wave[1])
        lowest, target = heights.copy(), own.copy()
        for here, there in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:, 1:], np.s_[:, :-1]), (np.s_[:-1], np.s_[1:]),
                            (np.s_[1:], np.s_[:-1])):
            lower = heights[there] < lowest[here]
            lowest[here][lower] = heights[there][lower]
            target[here][lower] = own[there][lower]
        target = target.ravel()
        while not np.array_equal(target, target[target]):
            target = target[target]
        minima, superpixels = np.unique(target, return_inverse=True)
        if len(minima) <= MOST_SUPERPIXELS:
            return superpixels.reshape(height, width).astype(np.int32)
        heights = cv2.GaussianBlur(heights, (0, 0), 2)  # noise: fewer minima; where it is plain, a wider egg-box


def border_arcs(superpixels):
    """(H, W) ids -> the arcs, that is the borders between two superpixels, as a dict of arrays.

    pairs (A, 2) ids, first < second; length (A,) in pixel edges; angle (A,) of the normal, 0..pi; and for each of the E
    pixel edges: arc (E,), first and second (E,), the flat indices of the pixels on its two sides.
    """
    flat, count = superpixels.ravel(), int(superpixels.max()) + 1
    own = np.arange(flat.size).reshape(superpixels.shape)
    first = np.concatenate([own[:, :-1].ravel(), own[:-1].ravel()])
    second = np.concatenate([own[:, 1:].ravel(), own[1:].ravel()])               # right, then lower neighbours
    on_border = flat[first] != flat[second]
    first, second = first[on_border], second[on_border]
    p, q = flat[first].astype(np.int64), flat[second].astype(np.int64)
    keys, arc = np.unique(np.minimum(p, q) * count + np.maximum(p, q), return_inverse=True)
    # The unit normals of the edges, all pointing to the larger id, add up to the normal of the line from the arc's one
    # end to its other.
    sign = np.where(p < q, 1, -1)
    down = second - first > 1 if superpixels.shape[1] > 1 else np.ones(len(first), bool)
    normal_x, normal_y = (np.bincount(arc, sign * part, len(keys)) for part in (~down, down))
    return {"pairs": np.stack([keys // count, keys % count], 1), "length": np.bincount(arc, minlength=len(keys)),
            "angle": np.arctan2(normal_y, normal_x) % np.pi, "arc": arc, "first": first, "second": second}


def along_arcs(strength, arcs):
    """(8, H, W) contour strength -> (A,) its mean along each arc, read at the arc's own angle, between two of the 8."""
    flat = strength.reshape(8, -1)
    turn = arcs["angle"] * (8 / np.pi)
    below = np.floor(turn).astype(int)
    share, below = (turn - below)[arcs["arc"]], below[arcs["arc"]]
    sides = [(1 - share) * flat[below % 8, pixel] + share * flat[(below + 1) % 8, pixel]
             for pixel in (arcs["first"], arcs["second"])]
    return np.bincount(arcs["arc"], sides[0] + sides[1], len(turn)) / (2 * arcs["length"])


def graph_eigenvectors(pairs, weights, count, number=EIGENVECTORS):
    """The smoothest non-constant vectors on a graph: (D - W) v = lambda D v, as in normalized cuts.

    pairs (A, 2), weights (A,) > 0, count nodes, connected -> values (k,) ascending, vectors (count, k), v' D v = 1,
    k = min(number, count - 1). Inverse iteration on a block of vectors: one Cholesky factor, a few solves.
    """
    i, j = torch.from_numpy(pairs).T
    affinity = torch.zeros(count, count, dtype=torch.float64)
    affinity[i, j] = affinity[j, i] = torch.as_tensor(weights, dtype=torch.float64)
    scale = affinity.sum(1).rsqrt()                                              # D^-1/2
    shift = 1e-5                                                                 # the smallest eigenvalue is 0
    matrix = (1 + shift) * torch.eye(count, dtype=torch.float64) - scale[:, None] * affinity * scale
    factor = torch.linalg.cholesky(matrix)
    start = torch.randn(count, min(count, number + 12), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(8):
        start = torch.linalg.qr(torch.cholesky_solve(start, factor))[0]
    values, rotation = torch.linalg.eigh(start.T @ matrix @ start)               # Rayleigh and Ritz
    vectors = scale[:, None] * (start @ rotation)
    return (values[1:number + 1] - shift).numpy(), vectors[:, 1:number + 1].numpy()


def spectral_strength(arcs, strength, count):
    """(A,) arc strengths -> (A,), of equal mean: the step of each eigenvector across the arc, weighted as in gPb.

    A contour with a gap hardly shows in the local strength; the eigenvectors, which are nearly constant on whole parts
    of the image, step across the gap as well.
    """
    pairs, length = arcs["pairs"], arcs["length"]
    values, vectors = graph_eigenvectors(pairs, length * np.exp(-strength / SPREAD), count)
    steps = (np.abs(vectors[pairs[:, 0]] - vectors[pairs[:, 1]]) / np.sqrt(values.clip(1e-6))).sum(1)
    return steps * (strength @ length) / max(steps @ length, 1e-12)


def merge_tree(pairs, strength, length, areas, alive=MAX_REGIONS_FOR_GROUPS):
    """Merges the two neighbours of least strength x min(area) ** AREA_POWER, until one region is left.

    pairs (A, 2), strength, length (A,), areas (R,) -> children: R - 1 pairs of nodes (superpixels are the nodes 0..R-1,
    the n-th merge makes node R + n); groups: three lists of connected pairs, triplets, 4-tuples of nodes. The border
    between two regions is as strong as the mean over its length. A group is noted when its youngest node is made, if at
    most alive[0], [1], [2] regions are there then.
    """
    count, areas = len(areas), list(areas)
    near = [{} for _ in range(count)]                # near[i][j] = (strength x length, length) of the border of i and j
    heap = []
    for (i, j), s, n in zip(pairs.tolist(), strength.tolist(), length.tolist()):
        near[i][j] = near[j][i] = (s * n, n)
        heap.append((s * min(areas[i], areas[j]) ** AREA_POWER, i, j))
    heapq.heapify(heap)
    children, groups = [], ([], [], [])
    while heap:
        _, i, j = heapq.heappop(heap)
        if near[i] is None or near[j] is None:       # one of them is merged already
            continue
        new = len(near)
        around = {}
        for old in (i, j):
            for n, (s, l) in near[old].items():
                if n != i and n != j:
                    before = around.get(n, (0.0, 0))
                    around[n] = (before[0] + s, before[1] + l)
                    del near[n][old]
        near[i] = near[j] = None
        near.append(around)
        areas.append(areas[i] + areas[j])
        for n, (s, l) in around.items():
            near[n][new] = (s, l)
            heapq.heappush(heap, (s / l * min(areas[new], areas[n]) ** AREA_POWER, n, new))
        children.append((i, j))
        grown = {(new,)}
        for found, most in zip(groups, alive):
            if count - len(children) > most:
                break
            grown = {tuple(sorted((*group, n))) for group in grown for member in group for n in near[member]
                     if n not in group}
            found.extend(sorted(grown))
    return children, groups


def fill_holes(members, pairs, border):
    """(N, R) bool -> the same with holes filled: a hole is what cannot be reached from the image's border without
    crossing the segment.

    border: ids at the image's border. One flood for all N at once: row r of `outside` has a bit for each segment,
    set where superpixel r is known to be outside of it. Sweeps up and down the ids until nothing changes.
    """
    count = len(members)
    padded = np.pad(members, ((0, -count % 64), (0, 0)))
    free = ~np.packbits(np.ascontiguousarray(padded.T), axis=1).view(np.uint64)  # (R, ceil(N / 64)), not in the segment
    outside = np.zeros_like(free)
    outside[border] = free[border]
    near = [[] for _ in range(members.shape[1])]
    for i, j in pairs.tolist():
        near[i].append(j)
        near[j].append(i)
    near = [np.array(ids, int) for ids in near]
    ids = list(range(len(near)))
    before = None
    while before is None or not np.array_equal(outside, before):
        before = outside.copy()
        for r in ids + ids[::-1]:
            outside[r] |= np.bitwise_or.reduce(outside[near[r]]) & free[r]
    return np.ascontiguousarray(np.unpackbits(~outside.view(np.uint8), axis=1, count=count).T).astype(bool)


def near_duplicates(members, areas, limit=JACCARD):
    """(N, R) bool, best first; areas (R,) -> (N,) bool: True if a better segment, itself kept, has Jaccard > limit.

    The ratio of two areas is at least their Jaccard index, so only segments of similar area are compared: sorted by
    area, block by block, as matrix products.
    """
    sizes = members @ areas
    order = np.argsort(-sizes, kind="stable")
    sizes = sizes[order]
    sorted_members = torch.from_numpy(members[order]).float()
    weighted = sorted_members * torch.from_numpy(areas).float()
    better, worse = [], []
    for start in range(0, len(members), 128):
        stop = min(start + 128, len(members))
        last = int(np.searchsorted(-sizes, -limit * sizes[stop - 1], side="right"))    # down to limit x the smallest
        common = (weighted[start:stop] @ sorted_members[start:last].T).numpy()
        jaccard = common / (sizes[start:stop, None] + sizes[start:last] - common)
        i, j = (order[start + index] for index in np.nonzero(jaccard > limit))
        better.append(np.minimum(i, j)[i != j])
        worse.append(np.maximum(i, j)[i != j])
    better, worse = np.concatenate(better), np.concatenate(worse)
    by_rank = np.argsort(better, kind="stable")
    worse, bounds = worse[by_rank], np.searchsorted(better[by_rank], np.arange(len(members) + 1))
    dropped = np.zeros(len(members), bool)
    for n in range(len(members)):
        if not dropped[n]:
            dropped[worse[bounds[n]:bounds[n + 1]]] = True
    return dropped


def tree_nodes(children, leaves, join):
    """Values of the leaves (R, ...) -> values of all nodes (2R - 1, ...), a parent's being join(its two children's)."""
    nodes = np.concatenate([leaves, np.zeros((len(children), *leaves.shape[1:]), leaves.dtype)])
    for n, (i, j) in enumerate(children, len(leaves)):
        nodes[n] = join(nodes[[i, j]])
    return nodes


def tree_groups(pairs, strength, length, areas, keys):
    """One tree -> its four lists of groups, for sizes 1 to 4 (some may be missing), the most promising groups first.

    A list is: nodes (2R - 1, R) bool, which superpixels belong to each node; group (G, size), ids of nodes; key (G,)
    uint64. A superpixel's key is random, a union's is the sum of its parts' modulo 2^64: equal keys, equal segments.
    """
    children, groups = merge_tree(pairs, strength, length, areas)
    nodes = tree_nodes(children, np.eye(len(areas), dtype=bool), lambda two: two[0] | two[1])
    node_keys = tree_nodes(children, keys, np.sum)
    # Single superpixels are left out: they would change the masks that E_o chooses by 0.1 points of IoU
    # (docs/results.md).
    regions = [(n,) for n in range(len(areas), len(nodes))]
    lists = []
    for found in (regions, *groups):
        if found:
            group = np.array(found[::-1][:LONGEST])  # from the root down
            lists.append((nodes, group, node_keys[group].sum(1)))
    return lists


def mcg(image, max_candidates=MAX_CANDIDATES):
    """Multiscale Combinatorial Grouping: (H, W, 3) uint8 RGB of any size -> superpixels (H, W) int32, members (N, R).

    Segment n, of 1 <= N <= max_candidates, is the union of the superpixels r with members[n, r] (bool); best first.
    """
    # DEPARTS: BoxSup takes the published MCG [2], whose contours come from a structured forest and whose ranking from a
    # random forest, both trained on masks. Here contours and ranking follow from the image by rule: no learned model is
    # shipped, and nothing was trained on masks.
    height, width = image.shape[:2]
    if height * width > WORKING_AREA:
        scale = (WORKING_AREA / (height * width)) ** 0.5
        size = max(1, int(width * scale)), max(1, int(height * scale))
        superpixels, members = mcg(cv2.resize(image, size, interpolation=cv2.INTER_AREA), max_candidates)
        return cv2.resize(superpixels, (width, height), interpolation=cv2.INTER_NEAREST_EXACT), members

    # 1. Contours at each scale, and their mean, all at the image's own size. Superpixels from the mean.
    contours = []
    for scale in [scale for scale in SCALES if scale == 1 or min(height, width) >= SHORTEST_SIDE * scale]:
        small = cv2.resize(image, (width // scale, height // scale), interpolation=cv2.INTER_AREA)
        contours.append(np.stack([cv2.resize(c, (width, height)) for c in contour_strength(small)]))   # (8, H, W)
    contours.append(sum(contours) / len(contours))
    superpixels = descend(cv2.GaussianBlur(contours[-1].max(0), (0, 0), 1))                       # (H, W)
    areas = np.bincount(superpixels.ravel())                                                      # (R,)
    if len(areas) == 1:
        return superpixels, np.ones((1, 1), bool)

    # 2. Coarse contours, too, are read on the arcs of these superpixels, so that all trees share one set of
    # superpixels, and MCG's alignment of trees is not needed.
    arcs = border_arcs(superpixels)
    strengths = [along_arcs(contour, arcs) for contour in contours]                               # each (A,)
    spectral = spectral_strength(arcs, strengths[-1], len(areas))
    strengths = [(1 - SPECTRAL) * strength + SPECTRAL * spectral for strength in strengths]

    # 3. From each contour map a tree, from each tree four ranked lists (regions, pairs, triplets, 4-tuples); all lists
    # are merged by relative rank.
    keys = np.random.default_rng(0).integers(0, 2 ** 64, len(areas), dtype=np.uint64)
    lists = [groups for strength in strengths
             for groups in tree_groups(arcs["pairs"], strength, arcs["length"], areas.tolist(), keys)]
    place = np.concatenate([(np.arange(len(key)) + 0.5) / len(key) for _, _, key in lists])
    order = np.argsort(place, kind="stable")
    first = np.unique(np.concatenate([key for _, _, key in lists])[order], return_index=True)[1]  # no segment twice
    members = np.concatenate([np.bitwise_or.reduce([nodes[part] for part in group.T]) for nodes, group, _ in lists])
    members = members[order[np.sort(first)]]                                                      # (N, R), best first

    # 4. Holes filled, near duplicates left out.
    border = np.unique(np.concatenate([superpixels[0], superpixels[-1], superpixels[:, 0], superpixels[:, -1]]))
    members = fill_holes(members, arcs["pairs"], border)
    return superpixels, members[~near_duplicates(members, areas)][:max_candidates]


# ---------------------------------------------------------------- superpixels and their graph, for the two below
def derivatives(channels):
    """(H, W, C) float32 -> its derivatives in x and in y, per pixel, of Gaussians with sigma 1."""
    smooth = cv2.GaussianBlur(channels, (0, 0), 1)
    return cv2.Sobel(smooth, cv2.CV_32F, 1, 0, scale=1 / 8), cv2.Sobel(smooth, cv2.CV_32F, 0, 1, scale=1 / 8)


def slope(image):
    """(H, W, 3) uint8 RGB -> (H, W) float32: how fast the colour changes, in units of Lab a pixel."""
    dx, dy = derivatives(to_lab(image))
    return np.sqrt((dx ** 2 + dy ** 2).sum(2))


def watershed(image, spacing):
    """One seed in each cell of spacing x spacing pixels, flooded -> (H, W) int32 superpixels, ids 0..R-1.

    A seed lies where its cell is smoothest, so that few lie on a contour. OpenCV then floods along the smallest steps.
    An image of more than about 4,000 such cells gets larger ones.
    """
    height, width = image.shape[:2]
    spacing = max(spacing, round((height * width / 4000) ** 0.5))
    steep = slope(image)
    seeds, number = np.zeros((height + 2, width + 2), np.int32), 0  # OpenCV leaves the outermost pixels out: add some
    for y in range(0, height, spacing):
        for x in range(0, width, spacing):
            cell = steep[y:y + spacing, x:x + spacing]
            b, a = divmod(int(cell.argmin()), cell.shape[1])
            number += 1
            seeds[y + b + 1, x + a + 1] = number
    smooth = cv2.copyMakeBorder(cv2.GaussianBlur(image, (0, 0), 0.8), 1, 1, 1, 1, cv2.BORDER_REPLICATE)
    labels = cv2.watershed(smooth, seeds)[1:-1, 1:-1]
    while (line := labels <= 0).any():  # between two regions OpenCV leaves a line of -1 or 0: the larger id, the
        # lower or right region, takes it whatever its colours (by colour the best unions have an IoU of .948, not .946)
        grown = cv2.dilate(labels.astype(np.float32), np.ones((3, 3), np.uint8)).astype(np.int32)
        labels = np.where(line, grown, labels)
    return np.unique(labels, return_inverse=True)[1].reshape(height, width).astype(np.int32)


def neighbours(superpixels, strength):
    """-> pairs (A, 2) of neighbouring ids, first < second, and strength (H, W) averaged along their borders: (A,)."""
    arcs, strength = border_arcs(superpixels), strength.ravel()
    edges = np.maximum(strength[arcs["first"]], strength[arcs["second"]])                         # (E,)
    return arcs["pairs"], np.bincount(arcs["arc"], edges, len(arcs["length"])) / arcs["length"]


def superpixel_graph(image, superpixels):
    """-> pairs (A, 2) of neighbours; weights (A,) in Lab units: slope at the border plus step of the mean colour."""
    pairs, steepness = neighbours(superpixels, slope(image))
    flat, lab = superpixels.ravel(), to_lab(image)
    sums = np.stack([np.bincount(flat, lab[..., c].ravel()) for c in range(3)], 1)                # (R, 3)
    mean = sums / np.bincount(flat)[:, None]
    return pairs, steepness + np.linalg.norm(mean[pairs[:, 0]] - mean[pairs[:, 1]], axis=1)


def extents(superpixels):
    """-> (R, 4): x0, y0, -x1, -y1 of each one's tight box. The box around two has the smaller of each."""
    ys, xs = np.divmod(np.arange(superpixels.size), superpixels.shape[1])
    found = np.full((4, int(superpixels.max()) + 1), superpixels.size, np.int64)
    for extent, position in zip(found, (xs, ys, -xs - 1, -ys - 1)):
        np.minimum.at(extent, superpixels.ravel(), position)
    return found.T


def distinct(members):
    """(N, R) bool -> its rows without those that are equal to one before."""
    return members[np.sort(np.unique(np.packbits(members, axis=1), axis=0, return_index=True)[1])]


# ---------------------------------------------------------------- Selective Search (Uijlings et al., IJCV 2013)
# PAPER SILENT: in which settings Selective Search was run; three colour spaces x four sets of similarities x two
# starting segmentations, ranked as in its paper (Sect. 3.3: position in the hierarchy times a random number).
# DEPARTS: Selective Search starts from Felzenszwalb and Huttenlocher's segments, grown from pixels. Here they are grown
# from superpixels: so all segments are unions of one set of superpixels, and it takes a hundredth of the steps.
def felzenszwalb(pairs, weights, sizes, scale):
    """Felzenszwalb and Huttenlocher (IJCV 2004) on a graph: (A, 2), (A,), sizes (R,) -> segment of each node, (R,).

    Two segments merge along an arc no heavier than the heaviest inside either of them, plus scale / its size.
    """
    parent, sizes, inside = list(range(len(sizes))), list(sizes), [0.0] * len(sizes)

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    order = np.argsort(weights, kind="stable")
    for (i, j), weight in zip(pairs[order].tolist(), weights[order].tolist()):
        i, j = root(i), root(j)
        if i != j and weight <= min(inside[i] + scale / sizes[i], inside[j] + scale / sizes[j]):
            parent[j], inside[i] = i, weight  # arcs come sorted: this one is the heaviest so far
            sizes[i] += sizes[j]
    return np.unique([root(i) for i in range(len(parent))], return_inverse=True)[1]


def histograms(channels, superpixels, bins):
    """(H, W, C) in 0..1 -> (R, C * bins) float32 counts of pixels."""
    count, found = int(superpixels.max()) + 1, []
    for c in range(channels.shape[2]):
        binned = (channels[..., c] * bins).astype(np.int32).clip(0, bins - 1)                     # (H, W)
        found.append(np.bincount((superpixels * bins + binned).ravel(), minlength=count * bins).reshape(count, bins))
    return np.concatenate(found, 1).astype(np.float32)


def texture_channels(channels):
    """(H, W, 3) -> (H, W, 24) in 0..1: derivatives in eight directions, falls cut off (they rise the other way)."""
    dx, dy = derivatives(channels)                                                                # (H, W, 3) each
    angles = np.arange(8) * np.pi / 4
    rises = np.concatenate([np.maximum(np.cos(t) * dx + np.sin(t) * dy, 0) for t in angles], 2)
    return rises / (rises.max() + 1e-9)


def hierarchy(pairs, features, sizes, boxes):
    """Algorithm 1: the two most similar neighbours merge, and so on -> [(i, j), ...]; the n-th makes region R + n.

    pairs: (A, 2); features: (R, D), shares of each histogram, which add up to 1; sizes: (R,) in shares of the image;
    boxes: (R, 4), see extents, in units that make the image's area 1. Similarity (Sect. 3.2):

        s(i, j) = sum_d min(features_i, features_j) + (1 - size_i - size_j) + (1 - (size of box_ij - size_i - size_j))
                  colour and texture                  size                    fill
    """
    count = len(sizes)
    features = np.concatenate([features, np.zeros((count - 1, features.shape[1]), features.dtype)])
    sizes = np.concatenate([sizes, np.zeros(count - 1)])
    boxes = np.concatenate([boxes, np.zeros((count - 1, 4))])
    near = [set() for _ in range(2 * count - 1)]
    for i, j in pairs.tolist():
        near[i].add(j)
        near[j].add(i)

    def similarity(i, j):
        both, box = sizes[i] + sizes[j], np.minimum(boxes[i], boxes[j])
        box = (box[..., 0] + box[..., 2]) * (box[..., 1] + box[..., 3])
        return np.minimum(features[i], features[j]).sum(-1) + (1 - both) + (1 - (box - both))

    heap = [(-s, i, j) for s, (i, j) in zip(similarity(pairs[:, 0], pairs[:, 1]).tolist(), pairs.tolist())]
    heapq.heapify(heap)
    merges = []
    while heap:
        _, i, j = heapq.heappop(heap)
        if j not in near[i]:  # one of them has been merged away
            continue
        new = count + len(merges)
        merges.append((i, j))
        share = sizes[i] / (sizes[i] + sizes[j])
        features[new] = share * features[i] + (1 - share) * features[j]
        sizes[new], boxes[new] = sizes[i] + sizes[j], np.minimum(boxes[i], boxes[j])
        near[new] = (near[i] | near[j]) - {i, j}
        near[i], near[j] = set(), set()
        others = sorted(near[new])
        for k, s in zip(others, similarity(new, others).tolist() if others else ()):
            near[k] = near[k] - {i, j} | {new}
            heapq.heappush(heap, (-s, k, new))
    return merges


def selective_search(image, max_candidates=MAX_CANDIDATES, spacing=10, scales=(0.01, 0.02)):
    """-> superpixels (H, W) int32, members (N, R) bool, best first. About 1.1 s and 3,000 of them a VOC image."""
    superpixels = watershed(image, spacing)
    sizes = np.bincount(superpixels.ravel()) / superpixels.size                                   # (R,), add up to 1
    boxes = extents(superpixels) / (image.shape[1], image.shape[0], image.shape[1], image.shape[0])
    pairs, weights = superpixel_graph(image, superpixels)
    rgb = image.astype(np.float32) / 255
    total = rgb.sum(2, keepdims=True)
    spaces = [cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV) / np.float32((360, 1, 1)),
              (to_lab(image) + np.float32((0, 128, 128))) / np.float32((100, 256, 256)),
              np.concatenate([rgb[..., :2] / (total + 1e-3), total / 3], 2)]                      # r, g, intensity
    described = [(histograms(space, superpixels, 25), histograms(texture_channels(space), superpixels, 10))
                 for space in spaces]
    random, ranks, found = np.random.default_rng(0), [], []
    for scale in scales:  # in a segment of 1 % of the image scale / size is 1 or 2, in units of Lab
        segments = felzenszwalb(pairs, weights, sizes, scale)
        start = np.arange(segments.max() + 1)[:, None] == segments                                # (S, R) bool
        borders = np.sort(segments[pairs], 1)
        borders = np.unique(borders[borders[:, 0] < borders[:, 1]], axis=0)                       # (A', 2)
        start_boxes = np.stack([np.where(start, edge, 1).min(1) for edge in boxes.T], 1)
        for colour, texture in described:
            colour, texture = (start.astype(np.float32) @ histogram for histogram in (colour, texture))
            colour, texture = (histogram / histogram.sum(1, keepdims=True) for histogram in (colour, texture))
            for used in ([colour, texture], [texture], [colour], [colour[:, :0]]):                # and size and fill
                merges = hierarchy(borders, np.concatenate(used, 1), start @ sizes, start_boxes)
                regions = tree_nodes(merges, start, lambda two: two[0] | two[1])
                found.append(regions)
                ranks.append(np.arange(len(regions), 0, -1) * random.random(len(regions)))        # the last merge is 1
    best = np.argsort(np.concatenate(ranks), kind="stable")
    return superpixels, distinct(np.concatenate(found)[best])[:max_candidates]


# ---------------------------------------------------------------- Geodesic Object Proposals (Kraehenbuehl, Koltun)
# PAPER SILENT: in which settings GOP (ECCV 2014) was run; as background nothing, the image's border, or one of its
# sides; on superpixels of a watershed.
# DEPARTS: the published GOP learns where to put its seeds and masks. Ours is its form without learning, with seeds by
# geodesic distance alone: nothing here has seen a mask.
def geodesic_distance(near, sources):
    """Dijkstra: near[i] = [(neighbour, weight), ...], sources: nodes at distance 0 -> (R,) distances."""
    distance = [np.inf] * len(near)
    heap = [(0.0, i) for i in sources]
    while heap:
        d, i = heapq.heappop(heap)
        if d < distance[i]:
            distance[i] = d
            for j, weight in near[i]:
                if d + weight < distance[j]:
                    heapq.heappush(heap, (d + weight, j))
    return np.array(distance)


def critical_levels(signed, sizes, number=6, smallest=0.01, largest=0.9):
    """Level sets of a signed distance (R,) that change least when the level does -> up to `number` rows (R,) bool.

    One in each of `number` bands of area (equal steps of its logarithm, in shares of the image): where the distance
    leaps most from one superpixel to the next, which is at a contour.
    """
    order = np.argsort(signed, kind="stable")
    leaps, areas = np.diff(signed[order]), np.cumsum(sizes[order])[:-1]
    bands = np.searchsorted(areas, smallest * (largest / smallest) ** (np.arange(number + 1) / number))
    rows = []
    for low, high in zip(bands, bands[1:]):
        if low < high:
            row = np.zeros(len(order), bool)
            row[order[:low + leaps[low:high].argmax() + 1]] = True
            rows.append(row)
    return rows


def geodesic(image, max_candidates=MAX_CANDIDATES, spacing=14, seeds=80, step=0.3):
    """-> superpixels (H, W) int32, members (N, R) bool, by seed; N = 0 in an image of one superpixel. About 0.2 s and
    2,700 of them a VOC image."""
    superpixels = watershed(image, spacing)
    sizes = np.bincount(superpixels.ravel()) / superpixels.size                                   # (R,), add up to 1
    pairs, weights = superpixel_graph(image, superpixels)
    near = [[] for _ in sizes]
    for (i, j), weight in zip(pairs.tolist(), (weights + step).tolist()):  # a step costs something in flat parts, too
        near[i].append((j, weight))
        near[j].append((i, weight))
    sides = [set(side.tolist()) for side in (superpixels[0], superpixels[-1], superpixels[:, 0], superpixels[:, -1])]
    backgrounds = [0] + [geodesic_distance(near, side) for side in (set.union(*sides), *sides)]
    rows, nearest = [], np.full(len(sizes), np.inf)
    seed = superpixels[superpixels.shape[0] // 2, superpixels.shape[1] // 2]
    for _ in range(min(seeds, len(sizes))):
        foreground = geodesic_distance(near, [seed])
        for background in backgrounds:  # signed distance: below 0 nearer to the seed than to the background
            rows += critical_levels(foreground - background, sizes)
        nearest = np.minimum(nearest, foreground)
        seed = nearest.argmax()  # greedy: the next seed is where all others are far
    return superpixels, distinct(np.array(rows, bool).reshape(-1, len(sizes)))[:max_candidates]


METHODS = {"mcg": mcg, "ss": selective_search, "gop": geodesic}  # image, max_candidates -> superpixels, members


# ---------------------------------------------------------------- candidates on disk
def tight_boxes(superpixels, members):
    """(H, W) ids, (N, R) bool -> (N, 4) int32 tight boxes, half-open: boxes around boxes, no mask is drawn."""
    edges = [np.where(members, edge, superpixels.size).min(1) for edge in extents(superpixels).T]  # x0, y0, -x1, -y1
    return (np.stack(edges, 1) * (1, 1, -1, -1)).astype(np.int32)


def write_candidates(path, superpixels, members, boxes, classes):
    """Writes <id>.npz, under a temporary name first, so that no half file is ever seen.

    superpixels: (H, W) ids 0..R-1; members: (N, R) bool, no row empty; boxes: (K, 4), classes: (K,).
    The ids are given out anew along a Z-curve (the bits of x and y of each one's first pixel, interleaved): a compact
    segment is then a few runs of bits, which takes a third off the file.
    """
    first = np.unique(superpixels, return_index=True)[1]                             # (R,) first pixel of each
    if len(first) != members.shape[1] or not members.any(1).all():
        raise ValueError(f"{len(first)} superpixels, members of {members.shape[1]}; or an empty candidate")
    y, x = np.divmod(first, superpixels.shape[1])
    order = np.argsort(sum((x >> bit & 1) << 2 * bit | (y >> bit & 1) << 2 * bit + 1 for bit in range(16)))
    number = np.empty(len(order), np.int32)
    number[order] = np.arange(len(order))
    superpixels, members = number[superpixels], np.ascontiguousarray(members[:, order])  # else saved column by column
    with writing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, superpixels=superpixels, members=np.packbits(members, axis=1),
                            candidate_boxes=tight_boxes(superpixels, members),
                            boxes=np.asarray(boxes, np.int32).reshape(-1, 4), classes=np.asarray(classes, np.uint8))


def read_candidates(path, size=None, num_classes=None):
    """<id>.npz -> {"superpixels", "members" (unpacked: (N, R) bool), "candidate_boxes", "boxes", "classes"}.

    size: (H, W) of the image it belongs to, num_classes: background included; checked where given. Raises BadInput.
    """
    kinds = {"superpixels": ("int32", 2), "members": ("uint8", 2), "candidate_boxes": ("int32", 2),
             "boxes": ("int32", 2), "classes": ("uint8", 1)}
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {key: file[key] for key in kinds}
        if any((array.dtype, array.ndim) != kinds[key] for key, array in found.items()):
            raise ValueError("its arrays are of other types")
        count = int(found["superpixels"].max()) + 1                                              # R
        shapes = (len(found["members"]), -(-count // 8)), (len(found["members"]), 4), (len(found["classes"]), 4)
        if found["superpixels"].min() < 0 or tuple(
                found[key].shape for key in ("members", "candidate_boxes", "boxes")) != shapes:
            raise ValueError("its arrays do not fit each other")
        found["members"] = np.unpackbits(found["members"], axis=1, count=count).view(bool)       # (N, R)
        height, width = found["superpixels"].shape
        corners = np.concatenate([found["boxes"], found["candidate_boxes"]])
        low, high = corners[:, :2], corners[:, 2:]
        if (low < 0).any() or (low >= high).any() or (high > (width, height)).any():
            raise ValueError("a box leaves its image")
    except FileNotFoundError:
        raise BadInput(f"no candidates {path}: make them by mcg_candidates.py") from None
    except Exception as error:  # broken bytes make NumPy raise nearly anything
        raise BadInput(f"{path}: not a file of candidates ({one_line(error)}): delete it and run mcg_candidates.py "
                       "again") from None
    if size is not None and (height, width) != tuple(size):
        raise BadInput(f"{path}: made for {width}x{height}, but its image is {size[1]}x{size[0]}: "
                       "delete it and make it again")
    if num_classes is not None and (worst := found["classes"].max(initial=0)) >= num_classes:
        raise BadInput(f"{path}: holds class {worst}, but there are {num_classes} classes: check class_names.txt")
    return found


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


# ---------------------------------------------------------------- boxes from COCO (Tables 1, 4, 5)
# ==== shared block "COCO's JSON": equal to the byte in grabcut_labels.py and mcg_candidates.py
COCO_TO_VOC = {"airplane": "aeroplane", "motorcycle": "motorbike", "potted plant": "pottedplant", "couch": "sofa",
               "dining table": "diningtable", "tv": "tvmonitor"}  # VOC's other fourteen have the same name in COCO


def once(pairs):
    """A JSON object's pairs -> dict; of a key that is there twice json would keep the last value alone."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("an object has one key twice")
    return dict(pairs)
# ==== end of shared block


def read_coco(path, names, masks=False):
    """A COCO instances_*.json -> {id: (boxes [[x, y, width, height], ...], classes [class, ...], size (width, height)
    as the JSON has it)}, ids are the file names' stems; and lines that say what was left out.

    names: class names, background first; a category takes part whose name, in COCO or in VOC, is one of them. An image
    without anything of these classes is background, and has no box. It is left out if all its boxes were, or if one of
    the classes has no category in the JSON: what it shows may then be labelled nowhere. masks: not boxes but COCO's
    outlines, as coco_mask() takes them, crowds among them as class 255. Raises BadInput.
    """
    # PAPER SILENT: what COCO's crowd regions count as; as boxes they are left out: one box around many objects, which
    # no segment fits; what lies in no other box is then background. As masks they are ignored (255): nobody has
    # labelled their pixels one by one.
    # PAPER SILENT: what COCO's images with none of the classes are trained on as. Table 1 counts all 123,287; as
    # background: COCO labels all of its 80 categories in every image, so these images contain none of ours.
    if not Path(path).is_file():
        raise BadInput(f"no --coco {path}: expected an instances_*.json of COCO")
    try:
        coco = json.loads(read_text(path), object_pairs_hook=once)
        categories = [(category["id"], str(category["name"])) for category in coco["categories"]]
        images = [(image["id"], str(image["file_name"]), (image.get("width"), image.get("height")))
                  for image in coco["images"]]
        annotations = [(thing["image_id"], thing["category_id"], [float(number) for number in thing["bbox"]],
                        thing["segmentation"] if masks else None, bool(int(thing.get("iscrowd") or 0)))
                       for thing in coco["annotations"]]
        for what, things in (("images", images), ("categories", categories)):
            if twice := [key for key, count in Counter(key for key, *_ in things).items() if count > 1]:
                raise BadInput(f"{path}: two {what} have the id {twice[0]!r}: give each an id of its own (where files "
                               "were merged, in the annotations, too)")
        name_of, image_of = dict(categories), {key: (file, size) for key, file, size in images}
        unknown = [box for box in annotations if box[0] not in image_of or box[1] not in name_of]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BadInput(f"{path}: not a COCO instances_*.json ({one_line(error)}): export it again") from None
    used = {name_of.get(category) for _, category, *_ in annotations}
    if names[0] in used | {COCO_TO_VOC.get(name) for name in used} and "background" not in names[0].lower():
        raise BadInput(f"{path}: has boxes of {names[0]}, the first of the class names, which is to be the background: "
                       "write background on a line before it")
    classes = {}
    for key, name in categories:
        name = name if name in names[1:] else COCO_TO_VOC.get(name)
        if name in names[1:]:
            classes[key] = names.index(name)
    if not classes:
        raise BadInput(f"{path}: no category is one of the classes {', '.join(names[1:])}: see --class-names")
    if unknown:
        raise BadInput(f"{path}: a box of image {unknown[0][0]!r}, category {unknown[0][1]!r}, not in its lists: "
                       "export it again with all its images and categories")

    found, left_out, ids = {}, Counter(), {}

    def entry(image):
        """-> what is found of the image: boxes, classes, size."""
        file, size = image_of[image]
        file = os.path.basename(file.replace("\\", "/"))  # never a path from inside the JSON
        stem = image_id(file, path)
        if not file.lower().endswith(ENDINGS):
            raise BadInput(f"{path}: image {image} is {file!r}: expected a name that ends in {', '.join(ENDINGS)}")
        if ids.setdefault(stem, image) != image:
            raise BadInput(f"{path}: images {ids[stem]} and {image} both have the name {file}, ending apart: "
                           "rename one")
        return found.setdefault(stem, ([], [], size))

    for image, category, box, outline, crowd in annotations:
        if len(box) != 4 or not np.isfinite(box).all() or min(box[2:]) < 0:
            raise BadInput(f"{path}: image {image} has the box {box}; expected x, y, width, height: fix it")
        if category not in classes:
            left_out[f"boxes of {name_of[category]}, which is no class here"] += 1
        elif crowd and not masks:
            left_out["crowds (iscrowd 1)"] += 1
        elif min(box[2:]) == 0 and not masks:
            left_out["boxes of no size"] += 1
        else:
            boxes, kinds, _ = entry(image)
            boxes.append(outline if masks else box)
            kinds.append(255 if crowd else classes[category])
    notes = [f"{count} {what} left out" for what, count in left_out.most_common()]
    if absent := [name for c, name in enumerate(names) if c and c not in classes.values()]:
        notes.append(f"no category for {', '.join(absent)}; those of the file: {', '.join(name_of.values())}")
    elif found:
        shown = {image for image, category, *_ in annotations if category in classes}
        background = [entry(image) for image in image_of if image not in shown]
        if background:
            notes.append(f"{len(background)} of {len(images)} images show none of the classes: background")
    if len(found) < len(images):
        notes.append(f"{len(images) - len(found)} of {len(images)} images left out: no box of the classes")
    if not any(c != 255 for _, kinds, _ in found.values() for c in kinds):
        why = "; ".join(notes) + " as crowds (iscrowd 1), if at all" * bool(found)
        raise BadInput(f"{path}: no box of the classes {', '.join(names[1:])} ({why}): see --class-names")
    return found, notes


def coco_boxes(boxes, size, where):
    """COCO's x, y, width, height, floats from 0 -> (K, 4) int32 corners, half-open, clipped; never below one pixel."""
    corners = []
    for x, y, width, height in boxes:
        if max(x + width, y + height) <= 1:
            raise BadInput(f"{where}: the box {x} {y} {width} {height} lies in 0..1, as a share of the image: expected "
                           "pixels")
        x0, y0, x1, y1 = (int(np.floor(edge + 0.5)) for edge in (x, y, x + width, y + height))
        x0, y0 = x0 - (x < size[1] == x0), y0 - (y < size[0] == y0)  # a sliver in the last column or row
        corners.append(clip_box((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)), size, where))
    return np.array(corners, np.int32).reshape(-1, 4)


def coco_outline(outline, size):
    """One of COCO's segmentations -> (H, W) bool.

    A list of polygons [x, y, x, y, ...], in pixels from 0, pixel i reaching from i to i + 1; or (crowds) {"size":
    [H, W], "counts": [run lengths down the columns, of outside and inside by turns]}. Raises ValueError, TypeError,
    KeyError.
    """
    if isinstance(outline, dict):
        if list(outline["size"]) != list(size):
            raise ValueError(f"runs of size {outline['size']}, the image's is {list(size)}")
        counts = np.array(outline["counts"], np.int64)
        return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(size[::-1]).T
    mask = np.zeros(size, bool)
    for polygon in outline:
        points = np.array(polygon, np.float64).reshape(-1, 2)
        if not (np.abs(points) < 2 ** 20).all():        # NaN, too
            raise ValueError("no numbers of pixels")
        x0, y0 = np.floor(points.min(0)).astype(int).clip(0)
        x1, y1 = np.ceil(points.max(0)).astype(int).clip(max=size[::-1])
        if x0 < x1 and y0 < y1:
            fine = np.zeros((8 * (y1 - y0), 8 * (x1 - x0)), np.uint8)           # a pixel is in if half of its 64 are
            cv2.fillPoly(fine, [np.rint(8 * (points - (x0, y0)) - 0.5).astype(np.int32)], 255)
            mask[y0:y1, x0:x1] |= cv2.resize(fine, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA) >= 128
    return mask


def coco_mask(outlines, classes, size, where):
    """COCO's segmentations, see coco_outline() -> (H, W) uint8 label map, the smaller object on top, 255 (crowds) below
    all others; and how many of them paint no pixel. Raises BadInput."""
    # PAPER SILENT: which of two masks of COCO that overlap is on top; the smaller, as for boxes.
    try:
        found = [coco_outline(outline, size) for outline in outlines]
    except (ValueError, TypeError, KeyError, OverflowError, cv2.error) as error:
        raise BadInput(f"{where}: an outline in the JSON cannot be drawn ({' '.join(str(error).split())}): expected "
                       "polygons, or uncompressed runs of the image's size") from None
    labels = np.zeros(size, np.uint8)
    for k in sorted(range(len(found)), key=lambda k: (classes[k] != 255, -int(found[k].sum()))):
        labels[found[k]] = classes[k]
    return labels, sum(not mask.any() for mask in found)


# ---------------------------------------------------------------- candidates for a list of images
def candidates_folder(voc, method="mcg", out=None):
    """Where the candidates of one method go: beside SegmentationClass, or to out."""
    return Path(out or Path(voc) / f"Candidates-{method}")


def make_candidates(voc, ids, out=None, method="mcg", workers=None, max_candidates=None):
    """Makes the candidates of the images that have none, or whose annotation has been corrected since, on all cores,
    with a progress bar on stderr.

    voc: folder with JPEGImages; out: see candidates_folder; workers: processes (default: one per core); max_candidates:
    an image (default: as in the folder, or 3,500). Returns {"made", "skipped": counts of images, "candidates", "boxes":
    counts, "notes": see say_notes, "failures": ["id: what is wrong"]}.
    """
    voc, names, folder = Path(voc), class_names(voc), candidates_folder(voc, method, out)
    complete = all((folder / f"{i}.npz").exists() for i in ids)  # then their boxes may be from elsewhere, as COCO's are
    if not complete:
        require_a_box((voc / "Annotations" / f"{i}.xml" for i in ids), names)
    return make_all(folder, voc / "JPEGImages", names, ids, lambda i: voc / "Annotations" / f"{i}.xml",
                    {} if complete else {"boxes": "Annotations"}, method, workers, max_candidates)


def make_coco_candidates(path, images, out, names=VOC_CLASSES, shard="1/1", method="mcg", workers=None,
                         max_candidates=None):
    """The same for the images of a COCO instances_*.json (path) in the folder images, with the boxes of `names`;
    method "masks": no candidates, but COCO's own masks, as label PNGs."""
    found, notes = read_coco(path, names, method == "masks")
    if not Path(images).is_dir():
        raise BadInput(f"no folder --images {images}: expected the images that {path} names")
    keep_apart([Path(out)], [Path(images)])
    ending = "png" if method == "masks" else "npz"
    there = {file.stem for file in Path(out).glob(f"*.{ending}") if not file.name.startswith("._")}
    if gone := there - found.keys():                    # of a JSON that had more: training would take them, too
        raise BadInput(f"{out}: holds {min(gone)}.{ending}" + f" (and {len(gone) - 1} more)" * (len(gone) > 1) +
                       f", but {path} has no such image, or no box in it: move such files away, or name another --out")
    ids = take_shard(list(found), shard)
    summary = make_all(Path(out), images, names, ids, found.get, {"boxes": Path(path).name}, method, workers,
                       max_candidates, Path(path).stat().st_mtime)
    if method == "masks":                               # boxes without outlines, say
        require_a_class(target for i in ids if (target := Path(out) / f"{i}.png").exists())
    for note in notes:
        print(f"{path}: {note}", file=sys.stderr)
    return summary


def boxes_of(annotation, names, size, where):
    """An annotation, XML's path or COCO's (boxes, classes, size), of an image of size (H, W) -> boxes, classes."""
    if isinstance(annotation, Path):
        return read_boxes(annotation, names, size)
    boxes, classes, said = annotation
    check_size(said, size, f"the JSON's {where.name}")
    return coco_boxes(boxes, size, where), classes


def make_one(target, images, name, annotation, names, method, max_candidates):
    """One image, in a process of its own -> numbers of candidates and boxes, and what say_notes() is to say of it."""
    picture = find_image(images, name)
    image = read_image(picture)                                                                   # (H, W, 3) uint8
    boxes, classes = boxes_of(annotation, names, image.shape[:2], picture)
    if len(boxes):
        superpixels, members = METHODS[method](image, max_candidates)
    else:                                               # nothing will choose among them
        superpixels, members = np.zeros(image.shape[:2], np.int32), np.zeros((0, 1), bool)
    write_candidates(target, superpixels, members, boxes, classes)
    return len(members), len(boxes), [] if len(boxes) else ["no box, all background"]


def draw_one(target, images, name, annotation, *_):
    """COCO's masks of one image -> 0 candidates, number of objects, notes."""
    picture, (outlines, classes, size) = find_image(images, name), annotation
    image = read_image(picture)
    check_size(size, image.shape[:2], f"the JSON's {picture.name}")
    labels, unpainted = coco_mask(outlines, classes, image.shape[:2], picture)
    write_label(target, labels)
    return 0, len(classes), ["an outline that paints no pixel"] * bool(unpainted)


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


def make_all(folder, images, names, ids, annotation_of, source, method, workers, max_candidates, written=None):
    """Candidates of images/<id>.jpg -> folder/<id>.npz, for each id; annotation_of(id): XML path, or COCO's boxes;
    source: {"boxes": where these are from}; written: when COCO's JSON was last changed. With method "masks" COCO's
    masks -> folder/<id>.png."""
    if method != "masks":
        there = (read_source(folder) if (Path(folder) / "source.json").exists() and any(Path(folder).rglob("*.npz"))
                 else {})
        max_candidates = max_candidates or there.get("max_candidates", MAX_CANDIDATES)
        source = source | {"max_candidates": max_candidates}
    claim_folder(folder, images, names, method, **source)
    summary = {"made": 0, "skipped": 0, "candidates": 0, "boxes": 0, "notes": {}, "failures": []}
    workers = workers or os.cpu_count()
    # Processes, since much of the work is Python's own. The variable is read as NumPy is loaded.
    threads_before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    pool = process_pool(workers, ["torch"])

    make, ending = (draw_one, "png") if method == "masks" else (make_one, "npz")
    annotated = read_source(folder).get("boxes") == "Annotations"

    def corrected(target, annotation):
        """Is the annotation newer than the candidates, and does it have other boxes?"""
        if isinstance(annotation, Path):
            newer = annotated and annotation.exists() and annotation.stat().st_mtime > target.stat().st_mtime
        else:
            newer = written > target.stat().st_mtime
        if not newer or method == "masks":              # masks are drawn as fast as they are compared
            return newer
        try:
            held = read_candidates(target)
            boxes, classes = boxes_of(annotation, names, held["superpixels"].shape, target)
            same = np.array_equal(held["boxes"], boxes) and np.array_equal(held["classes"], classes)
            if same:
                with contextlib.suppress(OSError):
                    target.touch()                      # so that the next run need not look again
            return not same
        except BadInput:  # make_one() says what is wrong
            return True

    def submit(image_id):
        target, annotation = Path(folder) / f"{image_id}.{ending}", annotation_of(image_id)
        return None if target.exists() and not corrected(target, annotation) else pool.submit(
            make, target, images, image_id, annotation, names, method, max_candidates)

    try:
        with tqdm(total=len(ids), desc=f"candidates ({method})", unit="image", disable=None if ids else True) as bar:
            for image_id, job in a_few_ahead(ids, submit, 3 * workers):
                bar.update()
                if job is None:
                    summary["skipped"] += 1
                    continue
                try:
                    candidates, boxes, notes = job.result()
                except (CannotWrite, BrokenProcessPool):
                    raise
                except Exception as error:  # one bad image does not stop the others, whatever is bad in it
                    summary["failures"].append(f"{image_id}: {one_line(error)}")
                    if len(summary["failures"]) <= MOST:
                        tqdm.write(summary["failures"][-1], file=sys.stderr)
                    continue
                summary["made"] += 1
                summary["candidates"] += candidates
                summary["boxes"] += boxes
                for note in notes:
                    summary["notes"].setdefault(note, []).append(image_id)
    except BrokenProcessPool:
        raise BadInput(f"{folder}: a worker was killed, perhaps for want of memory: give fewer --workers; the same "
                       "command goes on from here") from None
    finally:  # also on Ctrl-C: what is running is finished, what is waiting is dropped
        pool.shutdown(cancel_futures=True)
        del os.environ["OMP_NUM_THREADS"]
        if threads_before is not None:
            os.environ["OMP_NUM_THREADS"] = threads_before
    summary["notes"] = say_notes(summary["notes"])
    summary["failures"].sort()
    return summary


# ---------------------------------------------------------------- one image
def box_iou(box, others):
    """IoU of one box (4,) with others (N, 4) -> (N,)."""
    (x0, y0, x1, y1), (a0, b0, a1, b1) = box, np.asarray(others, np.int64).reshape(-1, 4).T
    inside = (np.minimum(x1, a1) - np.maximum(x0, a0)).clip(0) * (np.minimum(y1, b1) - np.maximum(y0, b0)).clip(0)
    return inside / ((x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0) - inside)


def show_candidates(path, method="mcg", corners=None, out=None, max_candidates=MAX_CANDIDATES):
    """A contact sheet of the image and its first 15 candidates, or the 15 whose tight box fits a box best -> its path,
    how many candidates there are, and the IoU of the best five with the box (None without a box)."""
    image = read_image(path)
    box = None if corners is None else clip_box(corners, image.shape[:2], path)
    superpixels, members = METHODS[method](image, max_candidates)
    chosen, ious = np.arange(len(members)), None
    if box is not None:
        ious = box_iou(box, tight_boxes(superpixels, members))
        chosen = np.argsort(-ious, kind="stable")
    scale = 320 / max(image.shape[:2])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    grey = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] // 3 + 150, 3, 2)           # (H, W, 3), pale
    panels = []
    for n in (None, *chosen[:15]):
        mask = np.zeros(superpixels.shape, bool) if n is None else members[n][superpixels]         # (H, W)
        panel = image if n is None else np.where(mask[..., None], image, grey)
        panel = cv2.resize(np.ascontiguousarray(panel), size, interpolation=cv2.INTER_AREA)
        outline = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        cv2.drawContours(panel, cv2.findContours(outline, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0], -1, (0, 160, 60), 1)
        if box is not None:
            x0, y0, x1, y1 = (round(corner * scale) for corner in box)
            cv2.rectangle(panel, (x0, y0), (x1 - 1, y1 - 1), (255, 60, 60), 1)
        panel = cv2.copyMakeBorder(panel, 20, 2, 2, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255))
        title = f"{len(members)} candidates" if n is None else f"#{n + 1}" + (f": {ious[n]:.2f}" if corners else "")
        cv2.putText(panel, title, (4, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
        panels.append(panel)
    panels += [np.full_like(panels[0], 255)] * (16 - len(panels))
    sheet = np.vstack([np.hstack(panels[row:row + 4]) for row in range(0, 16, 4)])
    target = (Path(out) if out else Path(path).parent) / f"{Path(path).stem}_candidates.png"
    with writing(target) as temporary:
        Image.fromarray(sheet).save(temporary, "PNG")
    return target, len(members), None if ious is None else ious[chosen[:5]]


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
    add("--out", metavar="DIR", help="where the NPZ files (or PNGs) go (default: Candidates-METHOD beside "
        "SegmentationClass)")
    add("--workers", type=int, metavar="N", help="images at a time, each on one core (default: as many as cores); "
        "Selective Search takes about 0.5 GB a million pixels, --masks 0.06 GB a million pixels of an outline's box")
    add("--method", choices=tuple(METHODS), default="mcg", help="Multiscale Combinatorial Grouping (default, paper), "
        "Selective Search or Geodesic Object Proposals (paper: Table 3)")
    add("--max-candidates", type=int, metavar="N", help="keep at most N candidates an image, the best ranked (default: "
        "as in the folder, or 3500, ours)")
    coco = parser.add_argument_group("boxes from COCO (paper: Tables 1, 4, 5)")
    coco.add_argument("--coco", metavar="JSON", help="an instances_*.json, instead of --data; needs --images and --out")
    coco.add_argument("--images", metavar="DIR", help="the images that it names")
    coco.add_argument("--masks", action="store_true", help="no candidates: COCO's own masks, as label PNGs (paper: the "
                      "baseline of 68.1 in Table 1)")
    coco.add_argument("--class-names", metavar="FILE", help="one a line, background first, COCO's own names or VOC's; "
                      "other boxes are left out (default: VOC's 20, paper; for PASCAL-Context all 80, paper)")
    one = parser.add_argument_group("one image")
    one.add_argument("--image", metavar="FILE", help="show its first candidates: writes FILE_candidates.png beside it")
    one.add_argument("--box", type=int, nargs=4, metavar=("X0", "Y0", "X1", "Y1"), help="show those whose tight box "
                     "fits this box best instead; pixels from 0, X1 and Y1 not included")
    arguments = parser.parse_args()
    if arguments.box and not arguments.image:
        parser.error("--box goes with --image")
    if arguments.coco and not (arguments.images and arguments.out):
        parser.error("--coco needs --images DIR and --out DIR")
    if arguments.coco and (arguments.split or arguments.list or arguments.data != parser.get_default("data")):
        parser.error("--coco takes all images of its JSON: no --data, --split, --list (--shard takes a part)")
    if arguments.masks and (arguments.method != "mcg" or arguments.max_candidates):
        parser.error("--masks makes no candidates: no --method, no --max-candidates")
    if arguments.image and any(getattr(arguments, name) != parser.get_default(name) for name in
                               ("split", "list", "shard", "workers", "coco")):
        parser.error("--split, --list, --shard, --workers and --coco: not with --image, which is one image")
    if (arguments.images or arguments.class_names or arguments.masks) and not arguments.coco:
        parser.error("--images, --masks and --class-names go with --coco")
    if any(number is not None and number < 1 for number in (arguments.max_candidates, arguments.workers)):
        parser.error("--max-candidates, --workers: expected at least 1")
    return arguments


def main():
    arguments = parse_arguments()
    options = {key: getattr(arguments, key) for key in ("method", "max_candidates") if getattr(arguments, key)}
    if arguments.image:
        path, count, ious = show_candidates(arguments.image, corners=arguments.box, out=arguments.out, **options)
        print(f"{path}: {count} candidates" + ("" if ious is None else ", tight boxes of the best five fit the box by "
                                               + ", ".join(f"{iou:.2f}" for iou in ious)))
        return 0
    options["workers"] = arguments.workers
    if arguments.coco:
        if arguments.class_names and not Path(arguments.class_names).is_file():
            raise BadInput(f"no --class-names {arguments.class_names}: expected one name a line, background first")
        names = read_names(arguments.class_names) if arguments.class_names else VOC_CLASSES
        options["method"] = "masks" if arguments.masks else arguments.method
        print(f"images of {arguments.coco} -> {arguments.out}")
        summary = make_coco_candidates(arguments.coco, arguments.images, arguments.out, names, arguments.shard,
                                       **options)
    else:
        voc = find_voc(arguments.data)
        lists = voc / "ImageSets" / "Segmentation"
        split = arguments.split or ("trainaug" if (lists / "trainaug.txt").exists() else "train")
        path = Path(arguments.list) if arguments.list else lists / f"{split}.txt"
        ids = take_shard(read_list(path), arguments.shard)
        print(f"{len(ids)} images of {path} -> {candidates_folder(voc, arguments.method, arguments.out)}")
        summary = make_candidates(voc, ids, arguments.out, **options)
    made, failures = summary["made"], summary["failures"]
    print(f"made {made}, already there {summary['skipped']}, failed {len(failures)}")
    if made:
        print(f"{summary['boxes']} objects" if arguments.masks else
              f"{summary['boxes']} boxes, {summary['candidates'] / made:.0f} candidates an image")
    if failures:
        print(f"{len(failures)} of {made + summary['skipped'] + len(failures)} images could not be made; fix them or "
              "take them off the list and run again:", *shortened(failures), sep="\n  ", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that a pipe's encoding lacks, on Windows
    try:
        sys.exit(main())
    except BadInput as error:
        print(f"mcg_candidates.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("mcg_candidates.py: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
