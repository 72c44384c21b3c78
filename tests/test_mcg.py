"""Multiscale Combinatorial Grouping in mcg_candidates.py: each part against a naive reference, and the whole."""
import itertools
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import mcg_candidates
from mcg_candidates import (along_arcs, border_arcs, contour_channels, contour_strength, descend, fill_holes,
                            graph_eigenvectors, mcg, merge_tree, near_duplicates, soft_bins, spectral_strength,
                            tree_groups)

cv2.setNumThreads(1)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def blocks(rows, columns, size):
    """(H, W) superpixels in a grid, for graphs that can be drawn on paper."""
    return np.kron(np.arange(rows * columns).reshape(rows, columns), np.ones((size, size), int)).astype(np.int32)


def drawn(height=60, width=80, seed=0):
    """A disc, upper half red, lower half blue, on mottled green -> image, truth (H, W) bool."""
    ys, xs = np.mgrid[:height, :width]
    truth = (ys - 30) ** 2 + (xs - 40) ** 2 < 18 ** 2
    picture = np.where(truth[..., None], np.where((ys < 30)[..., None], (190, 60, 50), (50, 60, 170)), (70, 130, 60))
    picture = picture + np.random.default_rng(seed).normal(0, 10, picture.shape)
    return picture.clip(0, 255).astype(np.uint8), truth


def connected(member, pairs):
    """Whether superpixels (R,) bool hang together by pairs (A, 2)."""
    todo = set(np.flatnonzero(member).tolist())
    edge = [todo.pop()]
    while edge:
        i = edge.pop()
        for n in [int(b if a == i else a) for a, b in pairs if i in (a, b)]:
            if n in todo:
                todo.remove(n)
                edge.append(n)
    return not todo


# ---------------------------------------------------------------- contours
def test_soft_bins_by_hand():
    """Centres -10, 0, 10: 4 is 0.4 of the way from bin 1 to bin 2; what lies beyond the last centre is all in it."""
    bins = [float(b[0, 0]) for b in soft_bins(np.float32([[4]]), 10, 3)]
    assert bins == pytest.approx([0, 0.6, 0.4])
    assert [float(b[0, 0]) for b in soft_bins(np.float32([[-99]]), 10, 3)] == [1, 0, 0]
    assert [float(b[0, 0]) for b in soft_bins(np.float32([[45]]), 10, 3, middle=50)] == pytest.approx([0.5, 0.5, 0])


def test_channels_are_histograms():
    """In each of the four lists every pixel holds a total of 1 (Hellinger distance of windows is then in 0..1)."""
    for maps in contour_channels(noise(12, 17)):
        np.testing.assert_allclose(sum(maps), 1, atol=1e-5)


def test_orientation_has_no_direction():
    """On a vertical edge the normal points along x: bin 0, whether brightness rises or falls; 4 on a horizontal one."""
    rise = np.zeros((20, 20, 3), np.uint8)
    rise[:, 10:] = 200
    for image, wanted in ((rise, 0), (rise[:, ::-1], 0), (rise.transpose(1, 0, 2), 4),
                          (rise[:, ::-1].transpose(1, 0, 2), 4)):
        bins = [float(m[10, 10]) for m in contour_channels(np.ascontiguousarray(image))[3]]
        assert bins[wanted] > 0.5 and sum(bins) - bins[wanted] - bins[8] < 1e-5


def naive_contours(image):
    """contour_strength() by the definition: windows summed weight by weight, two points a pixel and angle."""
    sizes, lists = image.shape[:2], contour_channels(image)
    reach = round(4 * mcg_candidates.SIGMA)  # OpenCV cuts the window off there, and mirrors the image at its border
    window = np.exp(-np.arange(-reach, reach + 1) ** 2 / (2 * mcg_candidates.SIGMA ** 2))
    window = np.outer(window, window) / window.sum() ** 2

    def blur(values):
        wide = np.pad(values.astype(np.float64), reach, mode="reflect")
        return sum(window[a, b] * wide[a:a + sizes[0], b:b + sizes[1]] for a, b in np.ndindex(window.shape))

    blurred = [np.stack([blur(m) for m in maps]) for maps in lists]                               # (bins, H, W)
    weights = [1, 1, 1, mcg_candidates.TEXTURE]
    strength = np.zeros((8, *sizes))
    for angle in range(8):
        x, y = (round(mcg_candidates.OFFSET * f(angle * np.pi / 8)) for f in (np.cos, np.sin))
        for row, column in np.ndindex(sizes):
            one, other = ((min(max(row + sign * y, 0), sizes[0] - 1), min(max(column + sign * x, 0), sizes[1] - 1))
                          for sign in (1, -1))
            strength[angle, row, column] = sum(
                weight * max(1 - np.sqrt(maps[:, one[0], one[1]] * maps[:, other[0], other[1]]).sum(), 0) ** 0.5
                for weight, maps in zip(weights, blurred)) / sum(weights)
    return strength


def test_contour_strength_against_a_naive_loop():
    image = cv2.GaussianBlur(noise(11, 13, seed=3), (0, 0), 1.5)
    strength = contour_strength(image)
    assert strength.shape == (8, 11, 13)
    np.testing.assert_allclose(strength, naive_contours(image), atol=3e-3)


def test_a_step_is_strongest_on_the_step_and_across_it():
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, 20:] = (200, 120, 40)
    strength = contour_strength(image)
    assert strength[0, 20, 19:21].min() > 0.5 and strength[:, 20, 5].max() < 0.05
    assert strength[0, 20, 20] > 3 * strength[4, 20, 20]  # angle 0: the normal points along x; 4: along y
    assert contour_strength(np.ascontiguousarray(image.transpose(1, 0, 2)))[4, 20, 20] > 0.5


def walk(heights):
    """descend() pixel by pixel: go to the lowest of the four neighbours, as long as it is lower -> where each ends."""
    height, width = heights.shape
    wave = [np.cos(2 * np.pi / mcg_candidates.GRID * np.arange(n, dtype=np.float32)) for n in heights.shape]
    tilted = (heights - mcg_candidates.TILT * (wave[0][:, None] + wave[1])).tolist()
    ends = np.zeros(heights.shape, int)
    for start in np.ndindex(heights.shape):
        y, x = start
        while True:
            around = [(v, u) for v, u in ((y, x + 1), (y, x - 1), (y + 1, x), (y - 1, x))
                      if 0 <= v < height and 0 <= u < width]
            v, u = min(around, key=lambda p: tilted[p[0]][p[1]])
            if tilted[v][u] >= tilted[y][x]:
                break
            y, x = v, u
        ends[start] = y * width + x
    return ends


def test_descend_against_a_walk():
    heights = cv2.GaussianBlur(np.random.default_rng(1).random((23, 31)).astype(np.float32), (0, 0), 2)
    superpixels, ends = descend(heights), walk(heights)
    both = set(zip(superpixels.ravel().tolist(), ends.ravel().tolist()))
    assert len(both) == len(np.unique(ends)) == superpixels.max() + 1 > 3
    for r in range(superpixels.max() + 1):  # each hangs together by pixel edges
        assert cv2.connectedComponents((superpixels == r).astype(np.uint8), connectivity=4)[0] == 2


def test_no_picture_has_too_many_superpixels(monkeypatch):
    monkeypatch.setattr(mcg_candidates, "MOST_SUPERPIXELS", 20)
    assert 1 < descend(np.random.default_rng(0).random((60, 60)).astype(np.float32)).max() + 1 <= 20


# ---------------------------------------------------------------- arcs
def test_arcs_by_hand():
    """
    0 0 1     0|1: two pixel edges, to the right          normal (2, 0), angle 0
    0 0 1     0|2: two downward                           normal (0, 2), angle 90 degrees
    2 2 1     1|2: one leftward (from 1 to 2)             normal (-1, 0), angle 0 (mod 180)
    """
    arcs = border_arcs(np.int32([[0, 0, 1], [0, 0, 1], [2, 2, 1]]))
    assert arcs["pairs"].tolist() == [[0, 1], [0, 2], [1, 2]] and arcs["length"].tolist() == [2, 2, 1]
    np.testing.assert_allclose(arcs["angle"] % np.pi, [0, np.pi / 2, 0], atol=1e-9)
    assert sorted(zip(arcs["arc"], arcs["first"], arcs["second"])) == [(0, 1, 2), (0, 4, 5), (1, 3, 6), (1, 4, 7),
                                                                       (2, 7, 8)]


def test_a_slanted_arc_has_the_angle_of_its_chord():
    """Below the diagonal 0, above 1, the normal is at 135 degrees (or -45): x right, y down."""
    ys, xs = np.mgrid[:20, :20]
    arcs = border_arcs((xs > ys).astype(np.int32))
    assert arcs["angle"][0] == pytest.approx(3 * np.pi / 4, abs=0.05)
    arcs = border_arcs((xs + ys > 19).astype(np.int32))
    assert arcs["angle"][0] == pytest.approx(np.pi / 4, abs=0.05)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1)])
def test_arcs_of_a_line(shape):
    arcs = border_arcs(np.repeat(np.arange(3), 3).reshape(shape).astype(np.int32))
    assert arcs["pairs"].tolist() == [[0, 1], [1, 2]]
    np.testing.assert_allclose(arcs["angle"], 0 if shape[0] == 1 else np.pi / 2, atol=1e-9)


def test_arc_strength_is_read_at_its_own_angle():
    superpixels = np.int32([[0, 0, 1, 1]] * 3)
    strength = np.zeros((8, 3, 4), np.float32)
    strength[0, :, 1], strength[0, :, 2], strength[4] = 0.2, 0.6, 1
    assert along_arcs(strength, border_arcs(superpixels)) == pytest.approx([0.4])  # the two sides' mean
    ys, xs = np.mgrid[:40, :41]  # the normal of a steep border, 11.25 degrees from x: half angle 0, half angle 1
    tilted = (xs + ys * np.tan(np.pi / 16) > 24).astype(np.int32)
    strength = np.zeros((8, 40, 41), np.float32)
    strength[0], strength[1] = 0.5, 1
    assert along_arcs(strength, border_arcs(tilted)) == pytest.approx([0.75], abs=0.02)


def test_eigenvectors_against_a_dense_solver():
    rng = np.random.default_rng(0)
    pairs = border_arcs(blocks(9, 11, 2))["pairs"]
    weights = rng.random(len(pairs)) + 0.01
    values, vectors = graph_eigenvectors(pairs, weights, 99, number=6)
    affinity = np.zeros((99, 99))
    affinity[tuple(pairs.T)] = affinity[tuple(pairs.T[::-1])] = weights
    degree = affinity.sum(1)
    wanted, basis = torch.linalg.eigh(torch.from_numpy(np.eye(99) - affinity / np.sqrt(np.outer(degree, degree))))
    np.testing.assert_allclose(values, wanted[1:7], atol=1e-5)
    overlap = (vectors * degree[:, None] ** 0.5).T @ basis[:, 1:7].numpy()  # +-1 on the diagonal
    np.testing.assert_allclose(np.abs(overlap), np.eye(6), atol=1e-2)


def test_eigenvectors_of_two_superpixels():
    """D = diag(w, w): the one other vector is (1, -1), eigenvalue 2."""
    values, vectors = graph_eigenvectors(np.array([[0, 1]]), np.array([0.3]), 2)
    assert values == pytest.approx([2]) and vectors[0, 0] == pytest.approx(-vectors[1, 0])


def test_spectral_strength_against_a_dense_solver():
    """gPb's: steps of the eigenvectors over the roots of their eigenvalues; strong arcs tie little; of equal mean."""
    arcs = border_arcs(blocks(5, 6, 2))
    rng = np.random.default_rng(1)
    strength, length = rng.random(len(arcs["pairs"])), rng.integers(1, 9, len(arcs["pairs"]))
    found = spectral_strength({**arcs, "length": length}, strength, 30)
    affinity = np.zeros((30, 30))
    affinity[tuple(arcs["pairs"].T)] = length * np.exp(-strength / mcg_candidates.SPREAD)
    affinity += affinity.T
    degree = affinity.sum(1)
    values, basis = np.linalg.eigh(np.eye(30) - affinity / np.sqrt(np.outer(degree, degree)))
    vectors = basis / degree[:, None] ** 0.5
    i, j = arcs["pairs"].T
    wanted = sum(np.abs(vectors[i, k] - vectors[j, k]) / values[k] ** 0.5
                 for k in range(1, mcg_candidates.EIGENVECTORS + 1))
    assert found @ length == pytest.approx(strength @ length)
    np.testing.assert_allclose(found, wanted * (strength @ length) / (wanted @ length), rtol=0.02)


# ---------------------------------------------------------------- tree and groups
def naive_tree(pairs, strength, length, areas):
    """merge_tree()'s children, each as a set: all borders are summed from the arcs anew for each merge."""
    region, area, children = list(range(len(areas))), dict(enumerate(areas)), []
    arcs = list(zip(pairs.tolist(), strength.tolist(), length.tolist()))
    while len(children) < len(areas) - 1:
        borders = {}
        for (i, j), s, n in arcs:
            if region[i] != region[j]:
                total, whole = borders.get(frozenset((region[i], region[j])), (0, 0))
                borders[frozenset((region[i], region[j]))] = total + s * n, whole + n
        cost = lambda pair: (borders[pair][0] / borders[pair][1] *
                             min(area[r] for r in pair) ** mcg_candidates.AREA_POWER)
        pair, new = min(borders, key=cost), len(areas) + len(children)
        region = [new if r in pair else r for r in region]
        area[new] = sum(area[r] for r in pair)
        children.append(set(pair))
    return children


def test_tree_against_naive_agglomeration():
    rng = np.random.default_rng(5)
    arcs = border_arcs(blocks(5, 6, 3))
    strength, areas = rng.random(len(arcs["pairs"])), rng.integers(1, 50, 30).tolist()
    length = rng.integers(1, 9, len(arcs["pairs"]))           # not all alike: a border's strength is weighted by them
    children, _ = merge_tree(arcs["pairs"], strength, length, areas)
    assert [set(merged) for merged in children] == naive_tree(arcs["pairs"], strength, length, areas)


def test_groups_are_all_small_connected_sets_with_the_new_region():
    rng = np.random.default_rng(6)
    arcs = border_arcs(blocks(4, 4, 2))
    children, groups = merge_tree(arcs["pairs"], rng.random(len(arcs["pairs"])), arcs["length"], [4] * 16, (99, 99, 99))
    leaves = {r: {r} for r in range(16)}
    alive, wanted = set(range(16)), [set(), set(), set()]
    touch = {frozenset(p) for p in arcs["pairs"].tolist()}
    for n, (i, j) in enumerate(children, 16):
        leaves[n] = leaves[i] | leaves[j]
        alive = alive - {i, j} | {n}
        edges = [(a, b) for a, b in itertools.combinations(sorted(alive), 2)
                 if any(frozenset((x, y)) in touch for x in leaves[a] for y in leaves[b])]
        for size in (2, 3, 4):
            for others in itertools.combinations(sorted(alive - {n}), size - 1):
                members = np.zeros(n + 1, bool)
                members[[n, *others]] = True
                inner = [(a, b) for a, b in edges if members[a] and members[b]]
                if connected(members, inner):
                    wanted[size - 2].add(tuple(sorted((n, *others))))
    assert [set(g) for g in groups] == wanted and [len(set(g)) for g in groups] == [len(g) for g in groups]
    _, few = merge_tree(arcs["pairs"], rng.random(len(arcs["pairs"])), arcs["length"], [4] * 16, (5, 3, 0))
    assert few[0] and few[1] and not few[2]


# ---------------------------------------------------------------- sets of segments
def flood(members, superpixels):
    """fill_holes() pixel by pixel, segment by segment -> (N, H, W) bool."""
    filled = np.zeros((len(members), *superpixels.shape), bool)
    for n, member in enumerate(members):
        rest = np.pad(~member[superpixels], 1, constant_values=True).astype(np.uint8)  # a rim of outside pixels
        _, parts = cv2.connectedComponents(rest, connectivity=4)
        filled[n] = parts[1:-1, 1:-1] != parts[0, 0]
    return filled


def test_holes_against_a_flood_of_pixels():
    superpixels = blocks(7, 9, 1)
    border = np.unique(np.concatenate([superpixels[0], superpixels[-1], superpixels[:, 0], superpixels[:, -1]]))
    members = np.random.default_rng(2).random((150, 63)) < 0.65
    members[0], members[1] = True, False
    filled = fill_holes(members, border_arcs(superpixels)["pairs"], border)
    np.testing.assert_array_equal(filled[:, superpixels], flood(members, superpixels))
    assert (members != filled).any(1).sum() > 10


def one_by_one(members, areas, limit=mcg_candidates.JACCARD):
    """near_duplicates() by the definition: each segment against all that were kept before it."""
    kept = []
    for n, row in enumerate(members):
        if all((areas * (row & members[k])).sum() <= limit * (areas * (row | members[k])).sum() for k in kept):
            kept.append(n)
    return ~np.isin(np.arange(len(members)), kept)


def test_near_duplicates_against_sets():
    rng = np.random.default_rng(3)
    areas = rng.integers(1, 9, 40)
    base = rng.random((30, 40)) < 0.5
    members = np.concatenate([base, base, base ^ (rng.random((30, 40)) < 0.02), base ^ (rng.random((30, 40)) < 0.05)])
    members = members[rng.permutation(len(members))]
    members = members[members.any(1)]
    dropped = one_by_one(members, areas, 0.95)
    np.testing.assert_array_equal(near_duplicates(members, areas, 0.95), dropped)
    assert 30 <= (~dropped).sum() < 100


def test_groups_come_from_the_root_down_and_hold_no_superpixel_alone():
    arcs = border_arcs(blocks(4, 5, 3))
    strength = np.random.default_rng(4).random(len(arcs["pairs"]))
    lists = tree_groups(arcs["pairs"], strength, arcs["length"], [9] * 20, np.arange(20, dtype=np.uint64))
    members, regions, _ = lists[0]
    assert regions[:, 0].tolist() == list(range(38, 19, -1)) and members[38].all()      # 0 to 19 are the superpixels
    assert all((np.diff(group.max(1)) <= 0).all() for _, group, _ in lists)


def test_equal_keys_are_equal_segments():
    """Over all groups of a tree: as many different keys as different sets of superpixels, in the same places."""
    arcs = border_arcs(blocks(4, 5, 3))
    strength = np.random.default_rng(4).random(len(arcs["pairs"]))
    keys = np.random.default_rng(0).integers(0, 2 ** 64, 20, dtype=np.uint64)
    seen = {}
    lists = tree_groups(arcs["pairs"], strength, arcs["length"], [9] * 20, keys)
    assert [group.shape[1] for _, group, _ in lists] == [1, 2, 3, 4]
    for nodes, group, key in lists:
        for ids, number in zip(group, key.tolist()):
            parts = [frozenset(np.flatnonzero(nodes[n]).tolist()) for n in ids]
            union = frozenset().union(*parts)
            assert len(union) == sum(map(len, parts))                                              # disjoint
            assert number == sum(keys[list(union)].tolist()) % 2 ** 64
            assert seen.setdefault(number, union) == union
    assert len(set(seen.values())) == len(seen) > 50


# ---------------------------------------------------------------- the whole
def masks(image, **options):
    superpixels, members = mcg(image, **options)
    assert superpixels.dtype == np.int32 and superpixels.shape == image.shape[:2] and members.dtype == bool
    assert np.array_equal(np.unique(superpixels), np.arange(members.shape[1]))
    assert members.ndim == 2 and len(members) and members.any(1).all()
    return superpixels, members


def test_a_two_coloured_object_is_found():
    image, truth = drawn(seed=1)
    superpixels, members = masks(image)
    found, upper = members[:, superpixels], np.arange(60)[:, None] < 30                           # (N, H, W)

    def best(mask):
        return ((found & mask).sum((1, 2)) / (found | mask).sum((1, 2))).max()

    assert best(truth) > 0.9
    assert best(truth & upper) > 0.8 and best(truth & ~upper) > 0.8                               # each colour alone


def test_a_bay_is_no_hole():
    """A red C, open to the image's left border, on green, and a blue disc within a red one: the bay stays, while no
    segment has a hole, as the ring would."""
    ys, xs = np.mgrid[:64, :110]
    letter = (ys > 8) & (ys < 56) & (xs < 50) & ~((ys > 22) & (ys < 42) & (xs < 32))
    away = np.hypot(ys - 32, xs - 82)
    image = np.where((letter | (away < 20))[..., None], (190, 60, 50), (70, 130, 60))
    image = np.where((away < 9)[..., None], (50, 60, 170), image) + np.random.default_rng(0).normal(0, 5, (64, 110, 3))
    superpixels, members = masks(image.clip(0, 255).astype(np.uint8))
    found = members[:, superpixels]
    assert ((found & letter).sum((1, 2)) / (found | letter).sum((1, 2))).max() > 0.85
    np.testing.assert_array_equal(found, flood(members, superpixels))


def test_a_plain_picture_of_the_full_working_area_ends():
    """Its egg-box has 49 x 65 minima, more than MOST_SUPERPIXELS. Blurred alone it ends flat, where every pixel is a
    minimum, for ever: one in four greys at 640x480, as float32 rounds them."""
    assert descend(np.full((433, 577), 2.4e-4, np.float32)).max() + 1 <= mcg_candidates.MOST_SUPERPIXELS


def test_lists_are_interleaved_by_share(monkeypatch):
    """A list of two has its segments at 1/4 and 3/4, one of four at 1/8, 3/8, 5/8 and 7/8, and so they are merged; of a
    segment that is in both, its better place counts."""
    trees = []

    def two_lists(pairs, strength, length, areas, keys):
        trees.append(len(areas))
        if len(trees) > 1:                                                        # the other trees find nothing
            return []
        return [(np.eye(len(areas), dtype=bool), np.array(ids)[:, None], keys[ids])
                for ids in ([7, 1], [2, 1, 4, 5])]

    monkeypatch.setattr(mcg_candidates, "tree_groups", two_lists)
    monkeypatch.setattr(mcg_candidates, "fill_holes", lambda members, pairs, border: members)
    _, members = mcg(drawn()[0])
    assert len(trees) > 1 and [np.flatnonzero(member).tolist() for member in members] == [[2], [7], [1], [4], [5]]


def test_each_scale_has_a_tree_of_its_own_and_their_mean_another(monkeypatch):
    """Contours of the image and of reductions by 2 and 4, while 64 pixels are left; superpixels of the strongest angle
    of their mean; a tree from each scale and from the mean, all with the same share of the mean's eigenvectors."""
    seen = {name: [] for name in ("contour_strength", "descend", "along_arcs", "spectral_strength", "tree_groups")}
    for name, calls in seen.items():
        def spied(*a, calls=calls, original=getattr(mcg_candidates, name)):
            calls.append((a, original(*a)))
            return calls[-1][1]
        monkeypatch.setattr(mcg_candidates, name, spied)
    for size, reductions in (((128, 260), [(128, 260), (64, 130)]), ((127, 260), [(127, 260)]),
                             ((256, 300), [(256, 300), (128, 150), (64, 75)])):
        for calls in seen.values():
            calls.clear()
        image = cv2.normalize(cv2.GaussianBlur(noise(*size), (0, 0), 5), None, 0, 255, cv2.NORM_MINMAX)
        mcg(image, max_candidates=10)
        assert [a[0].shape[:2] for a, _ in seen["contour_strength"]] == reductions
        for (small,), _ in seen["contour_strength"]:
            np.testing.assert_array_equal(small, cv2.resize(image, small.shape[1::-1], interpolation=cv2.INTER_AREA))
        contours = [np.stack([cv2.resize(c, size[::-1]) for c in found]) for _, found in seen["contour_strength"]]
        contours.append(np.mean(contours, 0))
        (((heights,), superpixels),) = seen["descend"]
        np.testing.assert_allclose(heights, cv2.GaussianBlur(contours[-1].max(0), (0, 0), 1), atol=1e-6)
        for contour, ((strength, _), _) in zip(contours, seen["along_arcs"], strict=True):
            np.testing.assert_allclose(strength, contour, atol=1e-6)
        local = [found for _, found in seen["along_arcs"]]
        (((_, strength, count), spectral),) = seen["spectral_strength"]
        assert np.array_equal(strength, local[-1]) and count == superpixels.max() + 1
        for one, ((_, strength, *_), _) in zip(local, seen["tree_groups"], strict=True):
            np.testing.assert_allclose(strength, 0.7 * one + 0.3 * spectral)


def test_invariants():
    image = cv2.GaussianBlur(noise(60, 80, seed=1), (0, 0), 3)
    image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX)
    superpixels, members = masks(image)
    pairs = border_arcs(superpixels)["pairs"]
    assert len(members) > 100
    assert len(np.unique(np.packbits(members, axis=1), axis=0)) == len(members)                   # no two are equal
    for member in members[::7]:
        assert connected(member, pairs)
    areas = np.bincount(superpixels.ravel())
    common = (members * areas) @ members.T.astype(int)
    jaccard = common / (np.diag(common)[:, None] + np.diag(common) - common) - np.eye(len(members))
    assert jaccard.max() <= mcg_candidates.JACCARD + 1e-6
    again = mcg(image)
    assert np.array_equal(superpixels, again[0]) and np.array_equal(members, again[1])            # deterministic
    assert np.array_equal(mcg(image, max_candidates=17)[1], members[:17])                         # best first


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (1, 300), (300, 1), (3, 3), (20, 700)])
def test_pictures_of_any_shape(shape):
    masks(noise(*shape))
    masks(np.full((*shape, 3), 255, np.uint8))


def test_a_plain_picture_gives_its_whole():
    for value in (0, 90, 255):
        superpixels, members = masks(np.full((50, 70, 3), value, np.uint8))
        assert (members.sum(1) == members.shape[1]).any()


def test_large_pictures_are_reduced(monkeypatch):
    image, truth = drawn()
    monkeypatch.setattr(mcg_candidates, "WORKING_AREA", 60 * 80)
    large = cv2.resize(image, (243, 181), interpolation=cv2.INTER_CUBIC)
    superpixels, members = masks(large)
    found, truth = members[:, superpixels], cv2.resize(truth.astype(np.uint8), (243, 181)) == 1
    assert ((found & truth).sum((1, 2)) / (found | truth).sum((1, 2))).max() > 0.85
    for r in range(members.shape[1]):                                                             # no id is blended
        assert cv2.connectedComponents((superpixels == r).astype(np.uint8), connectivity=4)[0] == 2
    # Each pixel has the id at its own centre, not at its upper left corner (4 % differ), but for one on a border.
    small = mcg_candidates.mcg(cv2.resize(large, (80, 59), interpolation=cv2.INTER_AREA))[0]
    y, x = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in ((181, 59), (243, 80)))
    assert (superpixels != small[y[:, None], x]).mean() < 0.001
