"""mcg_candidates.py: files, interrupted runs, COCO's boxes, Selective Search and GOP against naive references."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import wait
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import grabcut_labels
import mcg_candidates
from conftest import refused, run_as_main
from mcg_candidates import (METHODS, VOC_CLASSES, BadInput, box_iou, claim_folder, class_names, coco_boxes, coco_mask,
                            critical_levels, distinct, extents, felzenszwalb, find_voc, geodesic, geodesic_distance,
                            hierarchy, histograms, make_candidates, neighbours, read_boxes, read_candidates, read_coco,
                            read_image, read_label, read_list, read_source, slope, superpixel_graph, texture_channels,
                            tight_boxes, watershed, write_candidates)
from toy_voc import CLASS_NAMES, make_toy_voc

SCRIPT = Path(mcg_candidates.__file__)


def command_line(*arguments):
    """python mcg_candidates.py ... -> (exit status, stdout, stderr)"""
    return run_as_main(SCRIPT, *arguments)


def all_ids(voc):
    return read_list(voc / "ImageSets" / "Segmentation" / "trainval.txt")


def npz_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.npz"))}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A drawn devkit of 6 + 2 images, and the GOP candidates of all of them, beside it."""
    devkit = tmp_path_factory.mktemp("drawn") / "VOCdevkit"
    make_toy_voc(devkit, images=6, val=2, size=(40, 60))
    voc = find_voc(devkit)
    summary = make_candidates(voc, all_ids(voc), devkit.parent / "candidates", "gop", workers=1)
    assert (summary["made"], summary["skipped"], summary["failures"]) == (8, 0, [])
    return devkit, devkit.parent / "candidates"


@pytest.fixture
def devkit(drawn, tmp_path):
    """A copy without candidates, to be spoilt."""
    return Path(shutil.copytree(drawn[0], tmp_path / "VOCdevkit"))


def four_squares():
    """A 4x6 image of four superpixels, numbered against the order of reading, and three candidates.

        3 3 3 1 1 1
        3 3 3 1 1 1
        0 0 0 0 2 2
        0 0 0 0 2 2
    """
    superpixels = np.repeat([[3, 3, 3, 1, 1, 1], [0, 0, 0, 0, 2, 2]], 2, axis=0)
    members = np.array([[0, 1, 0, 1], [0, 0, 1, 0], [1, 0, 1, 0]], bool)
    return superpixels, members


# ---------------------------------------------------------------- superpixels and their graph
def clutter(height, width, seed=0):
    """Coloured rectangles with noise: an image (H, W, 3) uint8 with something in it."""
    random = np.random.default_rng(seed)
    picture = np.full((height, width, 3), 120.0)
    for _ in range(12):
        y, x = random.integers(0, height), random.integers(0, width)
        picture[y:y + height // 3, x:x + width // 3] = random.integers(0, 256, 3)
    return (picture + random.normal(0, 6, picture.shape)).clip(0, 255).astype(np.uint8)


def connected(mask):
    return cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)[0] == 2


def test_superpixels_cover_the_picture_and_each_is_one_piece():
    for height, width in [(45, 63), (9, 9), (10, 1), (1, 10), (1, 1), (2, 30)]:
        superpixels = watershed(clutter(height, width), 9)
        assert superpixels.shape == (height, width) and superpixels.dtype == np.int32
        assert np.unique(superpixels).tolist() == list(range(-(-height // 9) * -(-width // 9)))
        assert all(connected(superpixels == r) for r in range(superpixels.max() + 1))


def test_superpixels_keep_to_edges():
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:, 23:] = 200
    superpixels = watershed(picture, 9)
    across = set(superpixels[:, :22].ravel()) & set(superpixels[:, 25:].ravel())
    assert not across                                                        # blurred, the edge is some pixels wide


def test_neighbours_by_hand():
    """Along each border the mean over pairs of pixels of the larger of their two values.

        ids     0 0 1     map   1 2 3     0-1: (2, 3) -> 3;   0-2: (1, 4), (2, 5) -> 4, 5
                2 2 1           4 5 6     1-2: (5, 6) -> 6
    """
    pairs, means = neighbours(np.array([[0, 0, 1], [2, 2, 1]]), np.array([[1, 2, 3], [4, 5, 6]]))
    assert pairs.tolist() == [[0, 1], [0, 2], [1, 2]] and means.tolist() == [3, 4.5, 6]
    assert neighbours(np.zeros((3, 3), int), np.zeros((3, 3)))[0].shape == (0, 2)


def test_graph_weights_are_slope_plus_step_of_the_mean_colour():
    """Black, grey and white columns: L is 0, 53.6 and 100, and each border adds how steep the image is there."""
    image = np.repeat(np.repeat(np.uint8([0, 128, 255]), 8)[None, :, None], 6, 0).repeat(3, 2)
    superpixels = np.repeat(np.arange(3), 8)[None].repeat(6, 0)
    pairs, weights = superpixel_graph(image, superpixels)
    steep = slope(image)[0]
    assert pairs.tolist() == [[0, 1], [1, 2]] and steep[[7, 8, 15, 16]].min() > 10
    assert weights.tolist() == pytest.approx([53.6 + max(steep[7:9]), 46.4 + max(steep[15:17])], abs=0.1)


def test_a_large_picture_gets_larger_cells():
    assert watershed(np.zeros((300, 300, 3), np.uint8), 2).max() + 1 == 3600                 # of 5x5, not 22,500 of 2x2


def test_distinct_keeps_the_first_of_equal_rows_in_order():
    members = np.array([[1, 0, 0], [0, 1, 1], [1, 0, 0], [1, 1, 1], [0, 1, 1]], bool)
    assert distinct(members).tolist() == members[[0, 1, 3]].tolist()
    assert distinct(members[:0]).shape == (0, 3)


# ---------------------------------------------------------------- Selective Search
def test_felzenszwalb_by_hand():
    """A chain of four nodes of size 1, arcs 1, 3, 2; scale 2: a node alone bears 2, two bear their heaviest + 1.

    1 joins 0-1 and 2 joins 2-3; then 3 against 1 + 2/2 = 2 and 2 + 2/2 = 3: no. With 3 against 1 + 4/2 = 3: yes.
    """
    pairs, weights = np.array([[0, 1], [1, 2], [2, 3]]), np.array([1.0, 3.0, 2.0])
    assert felzenszwalb(pairs, weights, np.ones(4), 2).tolist() == [0, 0, 1, 1]
    assert felzenszwalb(pairs, weights, np.ones(4), 4).tolist() == [0, 0, 0, 0]
    assert felzenszwalb(pairs, weights, np.ones(4), 0.5).tolist() == [0, 1, 2, 3]
    assert felzenszwalb(pairs, weights, np.array([1, 1, 1, 9.0]), 4).tolist() == [0, 0, 0, 1]  # large ones bear less


def naive_hierarchy(superpixels, channels, bins):
    """All similarities anew for every merge, each from the pixels of two masks."""
    masks = [superpixels == r for r in range(superpixels.max() + 1)]
    alive, merges = set(range(len(masks))), []

    def histogram(mask):
        rows = [np.histogram(channels[..., c][mask], bins, (0, 1))[0] for c in range(channels.shape[2])]
        return np.concatenate(rows) / (mask.sum() * channels.shape[2])

    def similarity(a, b):
        both = masks[a] | masks[b]
        ys, xs = np.nonzero(both)
        box = (ys.max() - ys.min() + 1) * (xs.max() - xs.min() + 1) / both.size
        return np.minimum(histogram(masks[a]), histogram(masks[b])).sum() + 1 - both.mean() + 1 - box + both.mean()

    def touch(a, b):
        return ((masks[a][1:] & masks[b][:-1]).any() or (masks[a][:-1] & masks[b][1:]).any()
                or (masks[a][:, 1:] & masks[b][:, :-1]).any() or (masks[a][:, :-1] & masks[b][:, 1:]).any())

    while len(alive) > 1:
        pairs = [(a, b) for a in alive for b in alive if a < b and touch(a, b)]
        a, b = max(pairs, key=lambda pair: similarity(*pair))
        merges.append((a, b))
        masks.append(masks[a] | masks[b])
        alive = alive - {a, b} | {len(masks) - 1}
    return merges


@pytest.mark.parametrize("seed", [0, 1])
def test_hierarchy_is_that_of_the_naive_search(seed):
    picture = clutter(24, 30, seed)
    superpixels, channels = watershed(picture, 7), (picture + 0.5) / 256     # no value on the edge of a bin
    features = histograms(channels, superpixels, 5).astype(np.float64)
    features /= features.sum(1, keepdims=True)
    sizes = np.bincount(superpixels.ravel()) / superpixels.size
    pairs, _ = neighbours(superpixels, np.zeros(superpixels.shape))
    merges = hierarchy(pairs, features, sizes, extents(superpixels) / (30, 24, 30, 24))
    assert len(merges) == superpixels.max()
    assert [tuple(sorted(merge)) for merge in merges] == naive_hierarchy(superpixels, channels, 5)


def test_selective_search_starts_from_coarse_and_fine_segments(monkeypatch):
    seen, original = [], mcg_candidates.felzenszwalb
    monkeypatch.setattr(mcg_candidates, "felzenszwalb",
                        lambda *a: seen.append((a[3], original(*a).max())) or original(*a))
    mcg_candidates.selective_search(clutter(60, 80))
    assert [scale for scale, _ in seen] == [0.01, 0.02] and seen[0][1] > seen[1][1]


def test_selective_search_hands_on_what_hierarchy_expects(monkeypatch):
    """Channels in 0..1; histograms whose shares add up to 1 each; sizes and tight boxes in shares of the image; three
    colour spaces x four sets of similarities x two starts."""
    seen, channels, first, count = [], [], mcg_candidates.hierarchy, mcg_candidates.histograms
    monkeypatch.setattr(mcg_candidates, "hierarchy", lambda *given: seen.append(given) or first(*given))
    monkeypatch.setattr(mcg_candidates, "histograms", lambda *given: channels.append(given[0]) or count(*given))
    picture = np.random.default_rng(0).integers(0, 2, (40, 72, 3)).astype(np.uint8) * 255   # all of the colour cube
    picture = np.where(np.arange(72)[:, None] < 36, picture, clutter(40, 72))
    superpixels, members = METHODS["ss"](picture)
    assert all(0 <= c.min() and c.max() <= 1.001 for c in channels) and len(channels) == 6
    assert max(c[..., 0].max() for c in channels[::2]) > 0.8                                # and the range is used
    assert [round(float(features[0].sum())) for _, features, *_ in seen] == [2, 1, 1, 0] * 6
    assert len({features.tobytes() for _, features, *_ in seen if features.size}) >= 9
    for _, features, sizes, boxes in seen:
        totals = features.sum(1)
        assert sizes.sum() == pytest.approx(1)
        assert totals.tolist() == pytest.approx([round(float(totals[0]))] * len(sizes))
        assert boxes.min(0).tolist() == pytest.approx([0, 0, -1, -1]) and boxes[:, :2].max(0).min() > 0.5
        assert (-(boxes[:, 0] + boxes[:, 2]) * -(boxes[:, 1] + boxes[:, 3]) >= sizes - 1e-9).all()
    # large ones, late in the hierarchy, come early in the ranking
    areas = members @ np.bincount(superpixels.ravel())
    assert areas[:len(areas) // 4].mean() > 1.5 * areas[-len(areas) // 4:].mean()


def test_extents_are_tight_boxes():
    superpixels, _ = four_squares()
    assert (extents(superpixels) * (1, 1, -1, -1)).tolist() == tight_boxes(superpixels, np.eye(4, dtype=bool)).tolist()


def test_texture_has_the_direction_of_the_rise():
    """Brightness rises to the right: direction 0 is strong, those 45 degrees off are weaker, falls are nothing."""
    ramp = np.tile(np.linspace(0, 1, 20, dtype=np.float32), (20, 1))
    rises = texture_channels(np.dstack([ramp, ramp.T / 2]))[10, 10].reshape(8, 2)                # down, half as steep
    half = 0.5 ** 0.5
    assert rises[:, 0].tolist() == pytest.approx([1, half, 0, 0, 0, 0, 0, half], abs=1e-5)
    assert rises[:, 1].tolist() == pytest.approx([0, half / 2, 0.5, half / 2, 0, 0, 0, 0], abs=1e-5)


# ---------------------------------------------------------------- Geodesic Object Proposals
def test_geodesic_distance_is_that_of_floyd_and_warshall():
    random = np.random.default_rng(0)
    count = 25
    table = np.full((count, count), np.inf)
    np.fill_diagonal(table, 0)
    near = [[] for _ in range(count)]
    for i, j in [(n, n + 1) for n in range(count - 2)] + random.integers(0, count - 1, (30, 2)).tolist():
        weight = random.random()
        table[i, j] = table[j, i] = min(table[i, j], weight)                 # the last node has no neighbour
        near[i].append((j, weight))
        near[j].append((i, weight))
    for k in range(count):
        table = np.minimum(table, table[:, k, None] + table[None, k])
    for sources in ([0], [3, 17, 9], [24]):
        assert geodesic_distance(near, sources) == pytest.approx(table[sources].min(0))


def test_critical_levels_by_hand():
    """Distances 0, 1, 5, 6, 7, areas 0.1, 0.1, 0.2, 0.2, 0.4: level sets of area 0.1, 0.2, 0.4, 0.6, leaps 1, 4, 1, 1.

    One band up to 0.9: cut at the leap of 4. Two bands, of areas [0.05, 0.21) and [0.21, 0.9): 0.2 again, and 0.4.
    """
    signed, sizes = np.array([7, 0, 5, 1, 6.0]), np.array([0.4, 0.1, 0.2, 0.1, 0.2])
    rows = critical_levels(signed, sizes, 1, 0.05, 0.9)
    assert [np.flatnonzero(row).tolist() for row in rows] == [[1, 3]]
    rows = critical_levels(signed, sizes, 2, 0.05, 0.9)
    assert [np.flatnonzero(row).tolist() for row in rows] == [[1, 3], [1, 2, 3]]


def test_seeds_go_where_no_seed_is():
    """A board of sixteen colours and sixteen seeds: each field has one, so that each is a candidate."""
    colours = np.random.default_rng(1).permutation(64)[:16].reshape(4, 4, 1) // (1, 4, 16) % 4 * 80
    board = np.repeat(np.repeat(colours, 20, 0), 20, 1).astype(np.uint8)
    superpixels, members = geodesic(board, spacing=6, seeds=16)
    masks = members[:, superpixels]                                                              # (N, H, W)
    for y, x in np.ndindex(4, 4):
        field = np.zeros((80, 80), bool)
        field[20 * y:20 * y + 20, 20 * x:20 * x + 20] = True
        assert ((masks & field).sum((1, 2)) / (masks | field).sum((1, 2))).max() > 0.8, (y, x)


def test_seeds_are_weighed_against_nothing_the_whole_border_and_each_side(monkeypatch):
    """Six foregrounds a seed, by distances of its own; those of the border are made once."""
    calls, signed = [], []
    distance, levels = mcg_candidates.geodesic_distance, mcg_candidates.critical_levels
    monkeypatch.setattr(mcg_candidates, "geodesic_distance", lambda near, sources: (
        calls.append((set(sources), distance(near, sources))), calls[-1][1])[1])
    monkeypatch.setattr(mcg_candidates, "critical_levels", lambda d, sizes: (signed.append(d), levels(d, sizes))[1])
    superpixels, _ = geodesic(clutter(60, 80), seeds=3)
    top, bottom, left, right = ({*side.tolist()} for side in (superpixels[0], superpixels[-1], superpixels[:, 0],
                                                              superpixels[:, -1]))
    assert [sources for sources, _ in calls[:5]] == [top | bottom | left | right, top, bottom, left, right]
    assert len(calls) == 8 and len(signed) == 18
    assert calls[5][0] == {superpixels[30, 40]}                             # the first seed is the middle
    for n, (sources, foreground) in enumerate(calls[5:]):
        assert len(sources) == 1
        for one, background in zip(signed[6 * n:6 * n + 6], [0, *(away for _, away in calls[:5])]):
            np.testing.assert_array_equal(one, foreground - background)


def test_the_rank_is_place_times_a_random_number(monkeypatch):
    class Given:                                        # so small for the first regions that they come first
        random = staticmethod(lambda n: 1 / np.arange(n, 0, -1) ** 2)
    picture = clutter(40, 50)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Given)
    turned = METHODS["ss"](picture)[1]
    assert turned[-1].all() and turned[0].sum() < turned[-1].sum() / 2


def test_distance_grows_in_plain_parts():
    """Without the cost of a step all of a plain picture would be as near as the seed, and hardly a segment be left."""
    superpixels, members = geodesic(np.full((60, 60, 3), 90, np.uint8), spacing=6, seeds=16)
    assert len(members) > 100 and len(np.unique(members @ np.bincount(superpixels.ravel()))) > 20


# ---------------------------------------------------------------- all methods
@pytest.mark.parametrize("method", METHODS)
def test_what_every_method_promises(method):
    picture = clutter(60, 80)
    superpixels, members = METHODS[method](picture)
    assert superpixels.shape == (60, 80) and superpixels.dtype == np.int32 and members.dtype == bool
    assert np.unique(superpixels).tolist() == list(range(members.shape[1]))
    assert 20 < len(members) <= 3500 and members.any(1).all() and len(distinct(members)) == len(members)
    again, few = METHODS[method](picture, 10)
    assert np.array_equal(again, superpixels) and len(few) == 10              # the same each time


@pytest.mark.parametrize("method", METHODS)
def test_an_object_is_among_the_candidates(method):
    """A red disc on noisy green."""
    ys, xs = np.mgrid[:80, :100]
    truth = (xs - 48) ** 2 + (ys - 40) ** 2 <= 18 ** 2
    picture = np.where(truth[..., None], (190, 60, 50), (60, 140, 50))
    picture = (picture + np.random.default_rng(0).normal(0, 8, picture.shape)).clip(0, 255).astype(np.uint8)
    superpixels, members = METHODS[method](picture)
    masks = members[:, superpixels]                                                              # (N, H, W)
    assert ((masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2))).max() > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_odd_pictures(method, tmp_path):
    """One pixel, one row, one colour: perhaps no candidates, but a file that can be read."""
    for picture in (clutter(1, 1), clutter(1, 50), clutter(50, 2), np.full((30, 40, 3), 255, np.uint8)):
        superpixels, members = METHODS[method](picture)
        write_candidates(tmp_path / "a.npz", superpixels, members, [], [])
        assert len(read_candidates(tmp_path / "a.npz", picture.shape[:2])["members"]) == len(members)


# ---------------------------------------------------------------- files
def test_tight_boxes_by_hand():
    superpixels, members = four_squares()
    assert tight_boxes(superpixels, members).tolist() == [[0, 0, 6, 2], [4, 2, 6, 4], [0, 2, 6, 4]]
    assert tight_boxes(superpixels, members[:0]).shape == (0, 4)


def test_tight_boxes_are_those_of_the_masks():
    rng = np.random.default_rng(0)
    superpixels = np.unique(rng.integers(0, 30, (20, 31)), return_inverse=True)[1].reshape(20, 31)
    members = rng.random((50, superpixels.max() + 1)) < 0.05
    members[:, 0] |= ~members.any(1)
    for member, box in zip(members, tight_boxes(superpixels, members).tolist()):
        ys, xs = np.nonzero(member[superpixels])
        assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_a_file_gives_back_what_was_written(tmp_path):
    """The same masks in the same order; ids along a Z-curve: 3 becomes 0, 1 stays 1, 0 becomes 2, 2 becomes 3."""
    superpixels, members = four_squares()
    write_candidates(tmp_path / "a.npz", superpixels, members, [(0, 0, 6, 2), (1, 1, 3, 3)], [7, 20])
    read = read_candidates(tmp_path / "a.npz", (4, 6), 21)
    assert read["superpixels"].tolist() == np.repeat([[0, 0, 0, 1, 1, 1], [2, 2, 2, 2, 3, 3]], 2, axis=0).tolist()
    assert read["members"].astype(int).tolist() == [[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1]]
    assert read["candidate_boxes"].tolist() == [[0, 0, 6, 2], [4, 2, 6, 4], [0, 2, 6, 4]]
    assert read["boxes"].tolist() == [[0, 0, 6, 2], [1, 1, 3, 3]] and read["classes"].tolist() == [7, 20]
    types = {key: str(array.dtype) for key, array in read.items()}
    assert types == {"superpixels": "int32", "members": "bool", "candidate_boxes": "int32", "boxes": "int32",
                     "classes": "uint8"}
    assert os.listdir(tmp_path) == ["a.npz"]
    raw = np.load(tmp_path / "a.npz")                                        # what others may rely on
    assert set(raw) == set(read) and raw["members"].tolist() == [[0b11000000], [0b00010000], [0b00110000]]
    for image_without in ([], []), (np.zeros((0, 4)), np.zeros(0)):
        write_candidates(tmp_path / "b.npz", superpixels, members[:0], *image_without)
        read = read_candidates(tmp_path / "b.npz")
        assert read["boxes"].shape == (0, 4) and read["classes"].shape == (0,) and read["members"].shape == (0, 4)


@pytest.mark.parametrize("superpixels", [1, 7, 8, 9, 130])
def test_any_number_of_superpixels(tmp_path, superpixels):
    """packbits fills up the last byte: the reader must know where the superpixels end."""
    rng = np.random.default_rng(superpixels)
    picture = np.arange(superpixels)[None].repeat(3, 0)
    members = rng.random((40, superpixels)) < 0.5
    members[:, 0] |= ~members.any(1)
    write_candidates(tmp_path / "a.npz", picture, members, [], [])
    read = read_candidates(tmp_path / "a.npz")
    assert np.array_equal(read["members"], members) and np.array_equal(read["superpixels"], picture)


def test_what_cannot_be_written_is_not(tmp_path):
    superpixels, members = four_squares()
    for bad in ((superpixels, members[:, :3]), (np.where(superpixels == 2, 4, superpixels), np.ones((1, 5), bool)),
                (superpixels, np.zeros((1, 4), bool))):
        with pytest.raises(ValueError):
            write_candidates(tmp_path / "a.npz", *bad, [], [])
    assert os.listdir(tmp_path) == []


def spoil(path, **changes):
    """Rewrites some arrays of a file; None takes one out."""
    arrays = {**np.load(path), **changes}
    np.savez_compressed(path, **{key: array for key, array in arrays.items() if array is not None})


def test_spoilt_files_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    write_candidates(path, *four_squares(), [(0, 0, 6, 2)], [20])
    whole = path.read_bytes()
    with pytest.raises(BadInput, match="no candidates .*mcg_candidates.py"):
        read_candidates(tmp_path / "b.npz")
    middle = len(whole) // 2
    flipped = whole[:100] + bytes([whole[100] ^ 255]) + whole[101:]
    for bytes_ in (b"", b"text", whole[:middle], whole[:-30], flipped):
        path.write_bytes(bytes_)
        with pytest.raises(BadInput, match="a.npz: not a file of candidates") as raised:
            read_candidates(path)
        assert "\n" not in str(raised.value)
    for name, save in [("an array", lambda: np.save(path.open("wb"), np.zeros((3, 3)))),
                       ("a zip", lambda: zipfile.ZipFile(path, "w").writestr("superpixels.npy", "no array")),
                       ("objects", lambda: spoil(path, superpixels=np.array([None, {}], object)))]:
        path.write_bytes(whole)
        save()
        with pytest.raises(BadInput, match="not a file of candidates"):
            read_candidates(path)
    for change in ({"boxes": None}, {"members": None}, {"superpixels": np.zeros((4, 6), np.float32)},
                   {"superpixels": np.zeros((0, 6), np.int32)}, {"superpixels": np.full((4, 6), -1, np.int32)},
                   {"superpixels": np.full((4, 6), 9, np.int32)},             # ten superpixels need two bytes a row
                   {"superpixels": np.zeros((4, 6, 1), np.int32)}, {"members": np.zeros((3, 2), np.uint8)},
                   {"candidate_boxes": np.zeros((2, 4), np.int32)}, {"classes": np.zeros(2, np.uint8)},
                   {"boxes": np.zeros((1, 5), np.int32)}):
        path.write_bytes(whole)
        spoil(path, **change)
        with pytest.raises(BadInput, match="not a file of candidates"):
            read_candidates(path)
    path.write_bytes(whole)
    with pytest.raises(BadInput, match="made for 6x4, but its image is 4x6"):
        read_candidates(path, (6, 4))
    with pytest.raises(BadInput, match="holds class 20, but there are 20 classes"):
        read_candidates(path, (4, 6), 20)
    assert read_candidates(path, (4, 6), 21)["classes"].tolist() == [20]


def test_files_fit_pictures_and_annotations(drawn):
    devkit, folder = drawn
    voc = find_voc(devkit)
    assert {path.stem for path in folder.glob("*.npz")} == set(all_ids(voc))
    for image_id in all_ids(voc):
        size = Image.open(voc / "JPEGImages" / f"{image_id}.jpg").size[::-1]
        boxes, classes = read_boxes(voc / "Annotations" / f"{image_id}.xml", CLASS_NAMES, size)
        read = read_candidates(folder / f"{image_id}.npz", size, len(CLASS_NAMES))
        assert np.array_equal(read["boxes"], boxes) and np.array_equal(read["classes"], classes)
        assert len(np.unique(read["members"], axis=0)) == len(read["members"]) > 20


def test_source_says_where_the_pictures_are(drawn, tmp_path):
    devkit, folder = drawn
    source = read_source(folder)
    assert source["class_names"] == CLASS_NAMES and source["method"] == "gop"
    assert source["images"].samefile(devkit / "VOC2012" / "JPEGImages")
    shutil.copytree(devkit.parent, tmp_path / "moved")                       # all of it moved: still right
    moved = tmp_path / "moved"
    assert read_source(moved / "candidates")["images"].samefile(moved / "VOCdevkit/VOC2012/JPEGImages")
    with pytest.raises(BadInput, match="holds no candidates"):
        read_source(tmp_path)
    for text in ("", "{}", "[]", '{"images": 3, "class_names": [], "method": "ss"}', '{"images": "x", "method": "ss"}'):
        (tmp_path / "source.json").write_text(text)
        with pytest.raises(BadInput, match="source.json: not what"):
            read_source(tmp_path)


def test_parts_made_elsewhere_are_merged_by_copying(drawn, devkit):
    """Two machines, a shard each under a folder of its own; the second copied over the first, source.json too."""
    voc = find_voc(devkit)
    one, two = devkit / "one", devkit.parent / "deep" / "two" / "folders" / "down"
    for part, out in ((1, one), (2, two)):
        status, _, error = command_line("--data", devkit, "--split", "trainval", "--method", "gop", "--shard",
                                        f"{part}/2", "--out", out, "--workers", 1)
        assert status == 0, error
    shutil.copytree(two, one, dirs_exist_ok=True)
    assert not read_source(one)["images"].is_dir()
    summary = make_candidates(voc, all_ids(voc), one, "gop")
    assert summary["made"] == 0 and summary["skipped"] == len(all_ids(voc))
    assert read_source(one)["images"].samefile(voc / "JPEGImages")
    shutil.copy(two / "source.json", one)
    with pytest.raises(BadInput, match="made with other method"):            # but of the same kind they must be
        claim_folder(one, voc / "JPEGImages", CLASS_NAMES, "ss")


def test_a_folder_of_another_kind_is_refused(drawn, tmp_path):
    devkit, folder = drawn
    images = devkit / "VOC2012" / "JPEGImages"
    claim_folder(folder, images, CLASS_NAMES, "gop")                         # the same again is right
    for other in ((images, CLASS_NAMES, "ss"), (images, CLASS_NAMES[::-1], "gop"), (tmp_path, CLASS_NAMES, "gop")):
        with pytest.raises(BadInput, match="made with other"):
            claim_folder(folder, *other)
    assert "made with other method" in refused(SCRIPT, "--data", devkit, "--method", "ss", "--out", folder)


# ---------------------------------------------------------------- runs
def test_workers_shards_and_command_line_change_nothing(drawn, tmp_path):
    devkit, folder = drawn
    voc = find_voc(devkit)
    environment = dict(os.environ)
    summary = make_candidates(voc, all_ids(voc)[::-1], tmp_path / "two", "gop", workers=2)
    assert summary["made"] == 8 and summary["candidates"] > 160 and npz_bytes(tmp_path / "two") == npz_bytes(folder)
    assert dict(os.environ) == environment
    for part in (1, 2):
        status, out, error = command_line("--data", devkit, "--split", "trainval", "--shard", f"{part}/2",
                                          "--method", "gop", "--out", tmp_path / "parts", "--workers", 1)
        assert status == 0 and "4 images of" in out and "made 4, already there 0, failed 0" in out, error
    assert npz_bytes(tmp_path / "parts") == npz_bytes(folder)


def test_a_second_run_makes_only_what_is_missing(drawn, devkit):
    voc = find_voc(devkit)
    folder = voc / "Candidates-gop"
    shutil.copytree(drawn[1], folder)
    (folder / "source.json").unlink()
    ids = all_ids(voc)
    (folder / f"{ids[0]}.npz").unlink()
    (folder / f"{ids[1]}.npz.4711.tmp").write_bytes(b"half a f")             # of a run that was killed
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
    status, out, error = command_line("--data", voc, "--split", "trainval", "--method", "gop", "--workers", 1)
    assert status == 0 and "made 1, already there 7, failed 0" in out, error
    assert npz_bytes(folder) == npz_bytes(drawn[1])
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    assert make_candidates(voc, ids, method="gop")["made"] == 0
    # An object's class is corrected.
    renamed, touched = (voc / "Annotations" / f"{image_id}.xml" for image_id in ids[:2])
    held, name = read_candidates(folder / f"{ids[0]}.npz"), re.search("<name>(.*?)</name>", renamed.read_text())[1]
    other = next(other for other in class_names(voc)[1:] if other != name)
    renamed.write_text(renamed.read_text().replace(f"<name>{name}</name>", f"<name>{other}</name>", 1))
    for path in (renamed, touched):
        os.utime(path, (time.time() + 60, time.time() + 60))
    summary = make_candidates(voc, ids, method="gop")
    assert (summary["made"], summary["skipped"], summary["failures"]) == (1, 7, [])
    now = read_candidates(folder / f"{ids[0]}.npz")
    assert (now["classes"] != held["classes"]).sum() == 1 and np.array_equal(now["members"], held["members"])


def test_what_is_written_is_what_the_method_finds_in_rgb(drawn):
    devkit, folder = drawn
    for name in all_ids(find_voc(devkit))[:3]:
        image = read_image(devkit / "VOC2012" / "JPEGImages" / f"{name}.jpg")
        superpixels, members = METHODS["gop"](image, 3500)
        there = read_candidates(folder / f"{name}.npz")
        assert np.array_equal(there["members"][:, there["superpixels"]], members[:, superpixels])     # masks


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_stopped_in_the_middle_leaves_whole_files_and_goes_on(tmp_path, how):
    devkit = tmp_path / "VOCdevkit"
    make_toy_voc(devkit, images=150, val=1, size=(40, 60))
    voc = find_voc(devkit)
    command = [sys.executable, SCRIPT, "--data", devkit, "--method", "gop", "--workers", "2"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while run.poll() is None and len(list(voc.glob("Candidates-gop/*.npz"))) < 3:
        time.sleep(0.005)
    os.kill(run.pid, how) if how == signal.SIGKILL else os.killpg(run.pid, how)  # a terminal's Ctrl-C goes to all
    error = run.communicate(timeout=60)[1]                                   # returns once the workers are gone, too
    done = list(voc.glob("Candidates-gop/*.npz"))
    assert 3 <= len(done) < 150
    for path in done:
        read_candidates(path, (40, 60), len(CLASS_NAMES))                    # no half file under a final name
    if how == signal.SIGINT:
        assert run.returncode == 130 and "goes on" in error and "Traceback" not in error, error
    left = [f"toy_train_{n:05d}" for n in range(12)]
    (tmp_path / "short.txt").write_text("\n".join(sorted({path.stem for path in done})[:3] + left))
    ids = sorted(set((tmp_path / "short.txt").read_text().split()))
    (tmp_path / "short.txt").write_text("\n".join(ids))
    status, out, error = command_line(*command[2:], "--list", tmp_path / "short.txt")
    there = len({path.stem for path in done} & set(ids))
    assert status == 0 and f"made {len(ids) - there}, already there {there}, failed 0" in out and there >= 3, error


def test_a_long_list_is_handed_out_a_few_at_a_time(drawn, tmp_path, monkeypatch):
    voc, waiting = find_voc(drawn[0]), []

    def wait(jobs, **options):
        waiting.append(len(jobs))
        return real_wait(jobs, **options)

    real_wait = mcg_candidates.wait
    monkeypatch.setattr(mcg_candidates, "wait", wait)
    summary = make_candidates(voc, [f"none{n}" for n in range(100)] + all_ids(voc)[:1], tmp_path, "gop", workers=1)
    assert summary["made"] == 1 and len(summary["failures"]) == 100 and max(waiting) == 3


def test_bad_images_are_reported_and_the_others_made(drawn, devkit):
    voc = find_voc(devkit)
    ids = all_ids(voc)
    jpeg = voc / "JPEGImages" / f"{ids[0]}.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:500])                                # cut off
    (voc / "JPEGImages" / f"{ids[1]}.jpg").unlink()
    xml = voc / "Annotations" / f"{ids[2]}.xml"
    xml.write_text(xml.read_text()[:-30])
    (voc / "Annotations" / f"{ids[3]}.xml").unlink()
    status, out, error = command_line("--data", devkit, "--split", "trainval", "--method", "gop", "--workers", 2)
    assert status == 1 and "Traceback" not in error, error
    assert "made 4, already there 0, failed 4" in out and "4 of 8 images could not be made" in error
    listed = error[error.index("4 of 8"):].splitlines()[1:]
    assert [line.split(":")[0].strip() for line in listed] == ids[:4]
    words = ("not a readable image", "no image", "not readable XML", "no annotation")
    assert all(word in line for word, line in zip(words, listed))
    good = {name: npz for name, npz in npz_bytes(drawn[1]).items() if Path(name).stem in ids[4:]}
    assert npz_bytes(voc / "Candidates-gop") == good


def test_many_failures_do_not_flood_the_screen(devkit):
    voc = find_voc(devkit)
    some = "\n".join([f"none{n:03d}" for n in range(120)] + all_ids(voc)[:1])
    (voc / "ImageSets/Segmentation/some.txt").write_text(some)
    status, out, error = command_line("--data", devkit, "--split", "some", "--method", "gop", "--workers", 1)
    assert status == 1 and "made 1, already there 0, failed 120" in out and "120 of 121 images" in error
    live, listed = (re.findall(rf"^{indent}(none\d+): ", error, re.M) for indent in ("", "  "))
    assert len(set(live)) == 50 and listed == [f"none{n:03d}" for n in range(50)]       # live: in any order
    assert error.strip().endswith("and 70 more")


def test_one_process_never_has_two_files_of_one_name(tmp_path):
    """Machines that share a disk may each have a process of this number."""
    with mcg_candidates.writing(tmp_path / "a") as first, mcg_candidates.writing(tmp_path / "a") as second:
        assert first != second
        for name in (first, second):
            Path(name).write_text(name)
    assert (tmp_path / "a").read_text() == first and os.listdir(tmp_path) == ["a"]


def test_annotations_that_are_newer_but_equal_are_compared_once(devkit, tmp_path, monkeypatch):
    voc, read = find_voc(devkit), []
    ids = all_ids(voc)[:2]
    make_candidates(voc, ids, tmp_path, "gop", workers=1)
    later = time.time() - 100
    for image_id in ids:
        os.utime(tmp_path / f"{image_id}.npz", (later - 100, later - 100))
        os.utime(voc / "Annotations" / f"{image_id}.xml", (later, later))
    monkeypatch.setattr(mcg_candidates, "read_candidates", lambda path: read.append(path) or read_candidates(path))
    for _ in range(2):
        assert make_candidates(voc, ids, tmp_path, "gop", workers=1)["skipped"] == 2
    assert len(read) == 2


def test_an_empty_folders_options_are_not_taken(drawn, tmp_path):
    voc = find_voc(drawn[0])
    ids = all_ids(voc)[:1]
    make_candidates(voc, ids, tmp_path, "gop", workers=1, max_candidates=7)
    assert len(read_candidates(tmp_path / f"{ids[0]}.npz")["members"]) == 7
    (tmp_path / f"{ids[0]}.npz").unlink()
    make_candidates(voc, ids, tmp_path, "gop", workers=1)
    assert len(read_candidates(tmp_path / f"{ids[0]}.npz")["members"]) > 7


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_one_line(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(mcg_candidates, "make_one", die)
    voc = find_voc(drawn[0])
    with pytest.raises(BadInput, match="a worker was killed.*--workers"):
        make_candidates(voc, all_ids(voc), tmp_path, "gop", workers=1)

    def slowly(ids, submit, ahead):                     # the first has died before the second is handed out
        def submit_and_wait(image_id):
            wait([job := submit(image_id)])
            return job
        return original(ids, submit_and_wait, ahead)

    original = mcg_candidates.a_few_ahead
    monkeypatch.setattr(mcg_candidates, "a_few_ahead", slowly)
    with pytest.raises(BadInput, match="a worker was killed.*--workers"):
        make_candidates(voc, all_ids(voc), tmp_path, "gop", workers=1)


def test_the_list_that_is_taken(devkit):
    voc = find_voc(devkit)
    shutil.copy(voc / "ImageSets/Segmentation/val.txt", voc / "ImageSets/Segmentation/trainaug.txt")
    status, out, error = command_line("--data", devkit, "--method", "ss", "--max-candidates", 5, "--workers", 1)
    assert status == 0 and "2 images of" in out and "trainaug.txt" in out, error
    assert "made 2, already there 0, failed 0" in out and ", 5 candidates an image" in out
    assert sorted(os.listdir(voc / "Candidates-ss")) == sorted(
        [f"{image_id}.npz" for image_id in read_list(voc / "ImageSets/Segmentation/val.txt")] + ["source.json"])


# ---------------------------------------------------------------- bad input
def test_refusals(devkit, tmp_path):
    voc = find_voc(devkit)
    jpeg = next((voc / "JPEGImages").glob("*.jpg"))
    assert "no VOC data in nowhere" in refused(SCRIPT, "--data", "nowhere")
    assert "no image list" in refused(SCRIPT, "--data", devkit, "--split", "test")
    assert "expected I/N" in refused(SCRIPT, "--data", devkit, "--shard", "3/2")
    (tmp_path / "file").write_text("")
    assert "--out" in refused(SCRIPT, "--data", devkit, "--out", tmp_path / "file")
    assert "no image" in refused(SCRIPT, "--image", tmp_path / "none.jpg")
    assert "not a readable image" in refused(SCRIPT, "--image", voc / "class_names.txt")
    assert "no area" in refused(SCRIPT, "--image", jpeg, "--box", 500, 5, 600, 9)
    assert "--out" in refused(SCRIPT, "--image", jpeg, "--method", "gop", "--out", tmp_path / "file")
    (voc / "class_names.txt").write_text("background\ncat\ncat\n")
    assert "class_names.txt" in refused(SCRIPT, "--data", devkit)


@pytest.mark.parametrize("arguments", [
    ("--box", "0", "0", "5", "5"), ("--split", "a", "--list", "b"), ("--workers", "0"), ("--max-candidates", "0"),
    ("--method", "sss"), ("--coco", "a.json"), ("--coco", "a.json", "--out", "b"), ("--images", "a"),
    ("--class-names", "a"), ("--coco", "a.json", "--images", "b", "--out", "c", "--split", "train"),
    ("--coco", "a.json", "--images", "b", "--out", "c", "--data", "d"),
    ("--coco", "a.json", "--images", "b", "--out", "c", "--masks", "--method", "ss"),
    ("--image", "a.jpg", "--shard", "9/2")])
def test_arguments_that_do_not_fit(arguments, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mcg_candidates.py", *arguments])
    with pytest.raises(SystemExit) as raised:
        mcg_candidates.main()
    assert raised.value.code == 2 and "error:" in capsys.readouterr().err


# ---------------------------------------------------------------- COCO
def coco_json(path, boxes, **changes):
    """boxes: (file name, category, [x, y, w, h], iscrowd); images are numbered by name, from 100 on."""
    names, files = ("dog", "tv", "giraffe"), sorted({file for file, *_ in boxes} | {"empty.jpg"})
    coco = {"images": [{"id": 100 + n, "file_name": file} for n, file in enumerate(files)],
            "categories": [{"id": 7 + n, "name": name} for n, name in enumerate(names)],
            "annotations": [{"image_id": 100 + files.index(file), "category_id": 7 + names.index(category),
                             "bbox": box, "iscrowd": crowd} for file, category, box, crowd in boxes]}
    path.write_text(json.dumps({**coco, **changes}))
    return path


BOXES = [("b.jpg", "tv", [0.4, 1.6, 10.2, 5.0], 0), ("b.jpg", "giraffe", [0, 0, 9, 9], 0),
         ("a.jpg", "dog", [20.5, 3, 60, 0.2], 0), ("b.jpg", "dog", [2, 2, 8, 8], 1),
         ("c.jpg", "giraffe", [1, 1, 4, 4], 0), ("d.jpg", "dog", [1, 1, 4, 4], 1),
         ("b.jpg", "dog", [-3, 4, 20, 70], 0)]


def test_cocos_boxes_by_hand(tmp_path):
    """A tv is VOC's tvmonitor; the giraffe is no VOC class; crowds, images of these only, and empty ones are out. With
    classes that all have a category, images that show none of them are background; one with a crowd alone is out."""
    found, notes = read_coco(coco_json(tmp_path / "coco.json", BOXES), VOC_CLASSES)
    none = None, None                                   # no size is said
    assert found == {"b": ([[0.4, 1.6, 10.2, 5.0], [-3, 4, 20, 70]], [20, 12], none),
                     "a": ([[20.5, 3, 60, 0.2]], [12], none)}
    assert notes[:2] == ["2 boxes of giraffe, which is no class here left out", "2 crowds (iscrowd 1) left out"]
    assert notes[2].startswith("no category for aeroplane, bicycle") and notes[2].endswith(": dog, tv, giraffe")
    assert notes[3] == "3 of 5 images left out: no box of the classes"
    own, notes = read_coco(tmp_path / "coco.json", ["background", "giraffe", "tv"])  # COCO's own names
    nothing = [], [], none
    assert own == {"b": ([[0.4, 1.6, 10.2, 5.0], [0, 0, 9, 9]], [2, 1], none), "c": ([[1, 1, 4, 4]], [1], none),
                   "a": nothing, "d": nothing, "empty": nothing}
    assert not any("no category" in note for note in notes)
    assert notes[-1] == "3 of 5 images show none of the classes: background"
    dogs, notes = read_coco(tmp_path / "coco.json", ["background", "dog"])
    assert set(dogs) == {"a", "b", "c", "empty"} and dogs["c"] == dogs["empty"] == nothing
    assert notes[-2:] == ["2 of 5 images show none of the classes: background",
                          "1 of 5 images left out: no box of the classes"]
    # 0.4 -> 0, 1.6 -> 2, 10.6 -> 11, 6.6 -> 7; -3 and 74 are clipped; 3 .. 3.2 stays one pixel high
    boxes = coco_boxes([*found["b"][0], *found["a"][0]], (40, 60), "here")
    assert boxes.tolist() == [[0, 2, 11, 7], [0, 4, 17, 40], [21, 3, 60, 4]] and boxes.dtype == np.int32
    slivers = coco_boxes([[59.6, 3, 0.3, 2], [10, 39.7, 5, 0.2]], (40, 60), "here")
    assert slivers.tolist() == [[59, 3, 60, 5], [10, 39, 15, 40]]
    with pytest.raises(BadInput, match="here: box"):
        coco_boxes([[60, 3, 2, 2]], (40, 60), "here")


def test_every_voc_class_has_a_coco_name():
    assert set(mcg_candidates.COCO_TO_VOC.values()) <= set(VOC_CLASSES)
    assert mcg_candidates.COCO_TO_VOC == grabcut_labels.COCO_TO_VOC


def test_candidates_of_coco(drawn, tmp_path):
    images = tmp_path / "val2014"
    images.mkdir()
    jpegs = sorted((drawn[0] / "VOC2012/JPEGImages").glob("*.jpg"))
    for name, jpeg in zip("abcd", jpegs):
        shutil.copy(jpeg, images / f"{name}.jpg")
    shutil.copy(jpegs[0], images / "empty.jpg")
    path, out = coco_json(tmp_path / "coco.json", BOXES), tmp_path / "coco_candidates"
    arguments = ("--coco", path, "--images", images, "--out", out, "--method", "gop", "--workers", 1)
    status, text, error = command_line(*arguments)
    assert status == 0 and "made 2, already there 0, failed 0" in text and "3 boxes" in text, error
    assert sorted(os.listdir(out)) == ["a.npz", "b.npz", "source.json"]
    read = read_candidates(out / "b.npz", (40, 60), 21)
    assert read["boxes"].tolist() == [[0, 2, 11, 7], [0, 4, 17, 40]] and read["classes"].tolist() == [20, 12]
    assert np.array_equal(read["members"], read_candidates(drawn[1] / f"{jpegs[1].stem}.npz")["members"])
    source = read_source(out)
    assert source["images"].samefile(images) and source["class_names"] == VOC_CLASSES
    (tmp_path / "names.txt").write_text("background\ngiraffe\ndog\n")
    assert "other class_names" in refused(SCRIPT, *arguments, "--class-names", tmp_path / "names.txt")
    options = (*arguments, "--class-names", tmp_path / "names.txt", "--out", tmp_path / "own", "--shard", "2/2")
    status, text, error = command_line(*options)
    assert status == 0 and "made 2," in text and os.path.exists(tmp_path / "own" / "a.npz"), error
    background = read_candidates(tmp_path / "own" / "empty.npz", (40, 60), 3)       # no box, no candidates are made
    assert background["boxes"].shape == background["candidate_boxes"].shape == (0, 4)
    later = time.time() + 60
    os.utime(path, (later, later))                                                  # newer, but with the same boxes
    assert "made 0, already there 2, failed 0" in command_line(*arguments)[1]
    path.write_text(path.read_text().replace("0.4", "2.4", 1))                       # a box of b is corrected
    os.utime(path, (later, later))
    assert "made 1, already there 1, failed 0" in command_line(*arguments)[1]
    assert read_candidates(out / "b.npz")["boxes"].tolist() == [[2, 2, 13, 7], [0, 4, 17, 40]]
    whole = path.read_text()
    coco = json.loads(whole)
    coco["annotations"] = [thing for thing in coco["annotations"] if thing["image_id"] != 100]
    path.write_text(json.dumps(coco))                   # a loses its box: its candidates would still be trained on
    error = refused(SCRIPT, *arguments)
    assert f"{out}: holds a.npz, but {path} has no such image, or no box in it: move such files away" in error
    path.write_text(whole)
    (images / "a.jpg").unlink()
    (out / "a.npz").unlink()
    status, text, error = command_line(*arguments)
    assert status == 1 and "made 0, already there 1, failed 1" in text and "no image" in error
    assert "no --coco" in refused(SCRIPT, *arguments, "--coco", tmp_path / "none.json")
    assert "no folder --images" in refused(SCRIPT, *arguments, "--images", tmp_path / "none")
    assert "--class-names" in refused(SCRIPT, *arguments, "--class-names", tmp_path / "none.txt")
    for first in ("dog\ngiraffe\n", "tvmonitor\ndog\n"):                            # JSON's name, and VOC's for its tv
        (tmp_path / "names.txt").write_text(first)
        said = refused(SCRIPT, *arguments, "--class-names", tmp_path / "names.txt")
        assert "write background on a line before" in said
    (tmp_path / "names.txt").write_text("background\ndog\ndog\n")
    assert "different names" in refused(SCRIPT, *arguments, "--class-names", tmp_path / "names.txt")


@pytest.mark.parametrize("spoilt, words", [
    ("", "not a COCO"), ("{", "not a COCO"), ("[]", "not a COCO"), ("{}", "not a COCO"), ("3", "not a COCO"),
    ('{"images": 3, "categories": [], "annotations": []}', "not a COCO"), ("[" * 100_000, "not a COCO"),
    ({"annotations": [{"image_id": 100}]}, "not a COCO"), ({"annotations": [3]}, "not a COCO"),
    ({"categories": [{"id": 7, "name": "unicorn"}]}, "no category is one of the classes"),
    ({"annotations": []}, "no box of the classes"),
    ({"annotations": [{"image_id": 1, "category_id": 7, "bbox": [1, 1, 2, 2]}]}, "not in its lists"),
    ({"annotations": [{"image_id": 100, "category_id": 1, "bbox": [1, 1, 2, 2]}]}, "not in its lists"),
    ({"annotations": [{"image_id": 100, "category_id": 7, "bbox": [1, 1, 2]}]}, "expected x, y, width, height"),
    ({"annotations": [{"image_id": 100, "category_id": 7, "bbox": [1, 1, -2, 2]}]}, "expected x, y, width, height"),
    ({"annotations": [{"image_id": 100, "category_id": 7, "bbox": [1, 1, float("nan"), 2]}]}, "expected x, y, width"),
    ({"annotations": [{"image_id": 100, "category_id": 7, "bbox": "none"}]}, "not a COCO"),
    ({"images": [{"id": n, "file_name": f"{n}.gif"} for n in range(100, 106)]}, "ends in .jpg"),
    ({"images": [{"id": n, "file_name": f"{n}/a.jpg"} for n in range(100, 106)]}, "both have the name a.jpg")])
def test_bad_coco_files(tmp_path, spoilt, words):
    path = tmp_path / "coco.json"
    coco_json(path, BOXES, **spoilt) if isinstance(spoilt, dict) else path.write_text(spoilt)
    with pytest.raises(BadInput) as raised:
        read_coco(path, VOC_CLASSES)
    assert words in str(raised.value) and str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_no_path_from_inside_the_json(tmp_path):
    found, _ = read_coco(coco_json(tmp_path / "coco.json", [("../../x/a.jpg", "dog", [1, 1, 5, 5], 0)]), VOC_CLASSES)
    assert list(found) == ["a"]


def rectangle(x0, y0, x1, y1):
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def test_cocos_masks_by_hand():
    """A pixel is in where half of it is; parts of one object are one; small on large, all on crowds; runs go down."""
    polygons = [[rectangle(1, 1, 5, 3), rectangle(3.5, 2, 6.5, 4)]]
    assert coco_mask(polygons, [3], (5, 8), "here")[0].tolist() == [
        [0, 0, 0, 0, 0, 0, 0, 0],
        [0, 3, 3, 3, 3, 0, 0, 0],
        [0, 3, 3, 3, 3, 3, 3, 0],
        [0, 0, 0, 3, 3, 3, 3, 0],
        [0, 0, 0, 0, 0, 0, 0, 0]]
    crowd = {"size": [3, 4], "counts": [1, 1, 2, 6, 2]}                     # columns .#. .## ### #..
    assert (coco_mask([crowd], [255], (3, 4), "here")[0] / 255).tolist() == [[0, 0, 1, 1], [1, 1, 1, 0], [0, 1, 1, 0]]
    for order in ([0, 1, 2], [2, 1, 0]):                # the crowd is below what is larger than it, too
        outlines = [[rectangle(0, 0, 4, 3)], crowd, [rectangle(1, 1, 3, 2)]]
        classes = [1, 255, 2]
        assert coco_mask([outlines[k] for k in order], [classes[k] for k in order], (3, 4), "here")[0].tolist() == [
            [1, 1, 1, 1], [1, 2, 2, 1], [1, 1, 1, 1]]
    labels, unpainted = coco_mask([[rectangle(9, 9, 12, 12), [1, 1, 1, 1, 1, 1]], []], [1, 2], (3, 4), "here")
    assert not labels.any() and unpainted == 2
    ys, xs = np.mgrid[:16, :16] + 0.5                   # an outline that leaves the image keeps its slope
    slope = coco_mask([[[-8.3, 0, 8, 0, 8, 16.3]]], [1], (16, 16), "here")[0] == 1
    assert np.array_equal(slope, (ys < xs + 8.3) & (xs < 8)) and slope.sum() == 100
    turn = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    disc = np.stack([50.3 + 30 * np.cos(turn), 40.7 + 30 * np.sin(turn)], 1).ravel().tolist()
    ys, xs = np.mgrid[:80, :100] + 0.5
    found = coco_mask([[disc]], [1], (80, 100), "here")[0] == 1
    assert found.sum() == pytest.approx(30 * 30 * np.sin(np.pi / 30) * 30, rel=0.006)               # the polygon's area
    assert (found != (np.hypot(xs - 50.3, ys - 40.7) < 29.96)).sum() < 25                           # all on the rim


@pytest.mark.parametrize("outline", [3, "abc", None, [3], [[1, 2, 3]], [["a", "b"]], {},
                                     {"size": [3, 4], "counts": [5]}, {"size": [3, 4], "counts": [13, -1]},
                                     {"size": [3, 4], "counts": "PP00"}, {"size": [4, 3], "counts": [4, 8]},
                                     {"counts": [4, 8]}, [[float("nan")] * 6], [[0, 0, float("inf"), 0, 2, 2]]])
def test_bad_outlines(outline):
    with pytest.raises(BadInput, match="here: an outline"):
        coco_mask([outline], [1], (3, 4), "here")


def test_masks_of_coco(drawn, tmp_path):
    images = tmp_path / "val2014"
    images.mkdir()
    for name, jpeg in zip("ab", sorted((drawn[0] / "VOC2012/JPEGImages").glob("*.jpg"))):
        shutil.copy(jpeg, images / f"{name}.jpg")
    size = read_image(images / "a.jpg").shape[:2]
    coco = json.loads(coco_json(tmp_path / "coco.json", BOXES).read_text())
    for thing in coco["annotations"]:
        x, y, width, height = thing["bbox"]
        thing["segmentation"] = ({"size": size, "counts": [7, size[0] * size[1] - 7]} if thing["iscrowd"] else
                                 [rectangle(x, y, x + width, y + height)])
    coco["annotations"] = [thing for thing in coco["annotations"] if thing["image_id"] <= 101]         # of a and b
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    arguments = ("--coco", tmp_path / "coco.json", "--images", images, "--out", tmp_path / "masks", "--masks")
    status, text, error = command_line(*arguments, "--workers", 1)
    assert status == 0 and "made 2, already there 0, failed 0" in text and "4 objects" in text, error
    assert sorted(os.listdir(tmp_path / "masks")) == ["a.png", "b.png", "source.json"]
    assert read_source(tmp_path / "masks")["method"] == "masks"
    labels = read_label(tmp_path / "masks" / "b.png", size, 21)
    assert [labels[y, x] for y, x in ((0, 0), (3, 0), (2, 9), (10, 3), (2, -1))] == [0, 20, 20, 12, 255]
    status, text, _ = command_line(*arguments)
    assert status == 0 and "made 0, already there 2" in text
    assert "other method" in refused(SCRIPT, *arguments[:-1])
    for thing in coco["annotations"]:                   # boxes without outlines, as CVAT exports them
        thing["segmentation"] = []
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    for _ in range(2):                                  # the second time they are there
        status, _, error = command_line(*arguments, "--out", tmp_path / "none")
        assert status == 2 and "no class but background" in error.splitlines()[-1]


# ---------------------------------------------------------------- one image
def test_one_picture_is_shown(drawn, tmp_path):
    jpeg = Path(shutil.copy(next((drawn[0] / "VOC2012/JPEGImages").glob("*.jpg")), tmp_path / "a.jpg"))
    status, out, error = command_line("--image", jpeg, "--method", "gop")
    assert status == 0 and out.startswith(str(tmp_path / "a_candidates.png")), error
    sheet = read_image(tmp_path / "a_candidates.png")
    assert sheet.shape[1] == 4 * (320 + 4) and len(np.unique(sheet.reshape(-1, 3), axis=0)) > 100
    elsewhere = ("--out", tmp_path / "new")
    status, out, error = command_line("--image", jpeg, "--method", "gop", "--box", 5, 5, 30, 30, *elsewhere)
    assert status == 0 and (tmp_path / "new" / "a_candidates.png").exists(), error
    superpixels, members = METHODS["gop"](read_image(jpeg))
    best = np.sort(box_iou((5, 5, 30, 30), tight_boxes(superpixels, members)))[:-6:-1]
    assert [float(number) for number in out.split(" by ")[1].split(",")] == pytest.approx(best, abs=0.006)


def test_box_iou_by_hand():
    """[0, 4) x [0, 2) and [2, 6) x [0, 2) share 4 of 12 pixels."""
    assert box_iou((0, 0, 4, 2), [(2, 0, 6, 2), (0, 0, 4, 2), (9, 9, 10, 10)]).tolist() == pytest.approx([1 / 3, 1, 0])


def test_help_teaches():
    status, out, _ = command_line("--help")
    assert status == 0
    for option in "--method --max-candidates --split --class-names".split():
        text = out[out.rindex(f"  {option} "):].split("\n  --")[0]
        assert "ours" in text or "paper" in text, option
