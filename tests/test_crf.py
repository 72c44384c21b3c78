"""
crf.py: the lattice by hand and against dictionaries, marginals against pydensecrf and an exact sum over all pairs.

pydensecrf runs where it is installed; crf_reference.npz holds marginals that it gave, for machines that lack it:
    python tests/test_crf.py            makes that file again
"""
import itertools
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import crf
from crf import PRESETS, apply, crf_kernels, dense_crf, mean_field, permutohedral_lattice

REFERENCE = Path(__file__).with_name("crf_reference.npz")


def picture(H, W, texture, seed=0):
    """A drawn image: an ellipse on a ground of another colour, both shaded; texture: standard deviation of noise."""
    generator = np.random.default_rng(seed)
    row, column = np.mgrid[:H, :W] / np.array([H, W]).reshape(2, 1, 1)
    inside = ((row - 0.5) / 0.3) ** 2 + ((column - 0.45) / 0.35) ** 2 < 1
    image = np.where(inside[..., None], (200, 120, 60), (60, 110, 90)) + 40 * (row * column)[..., None]
    return (image + texture * generator.normal(size=(H, W, 3))).clip(0, 255).astype(np.uint8), inside


def softmaps(C, H, W, seed=0, sharpness=2.0):
    """Smooth random probabilities (C, H, W) float32, as a network upsamples them."""
    noise = torch.randn(1, C, max(2, H // 12), max(2, W // 12), generator=torch.Generator().manual_seed(seed))
    noise = torch.nn.functional.interpolate(noise, (H, W), mode="bilinear", align_corners=False)
    return (sharpness * noise[0]).softmax(0)


def ragged(inside):
    """What a network makes of it: the mask (H, W), shifted, with a wrong spot, blurred -> (2, H, W), 0.1 to 0.9."""
    H, W = inside.shape
    foreground = np.roll(inside, (H // 20, -W // 20), (0, 1)).astype(np.float32)
    foreground[H // 6:H // 4, 3 * W // 4:5 * W // 6] = 1
    foreground = 0.1 + 0.8 * cv2.GaussianBlur(foreground, (0, 0), H / 30)
    return torch.from_numpy(np.stack([1 - foreground, foreground]))


def differ(a, b):
    """Mean difference, share of pixels with the same most probable class."""
    return (a - b).abs().mean().item(), (a.argmax(0) == b.argmax(0)).float().mean().item()


# ----------------------------------------------------------------------------------------------------------------------
# the lattice

def dense(matrix, columns):
    """crf.py's sparse matrix, entry by entry, as a dense one of so many columns."""
    column, starts, weight = (x.tolist() for x in matrix)
    out = torch.zeros(len(starts) - 1, columns)
    for row, (start, end) in enumerate(itertools.pairwise(starts)):
        for k in range(start, end):
            out[row, column[k]] += weight[k]
    return out


def test_product_is_the_matrix_product():
    matrix = crf.sparse(torch.tensor([2, 0, 1]), torch.tensor([3, 0, 1]), torch.tensor([0.5, 2.0, -1.0]))
    assert dense(matrix, 4).tolist() == [[2, 0, 0, 0.5], [0, 0, 0, 0], [0, -1, 0, 0]]
    values = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(crf.product(matrix, values), dense(matrix, 4) @ values)


def test_lattice_by_hand_in_one_dimension():
    """
    d = 1: corners (k, -k), 1 apart along either axis. E stretches by sqrt(2/3) (d + 1) / sqrt(1 * 2) = 2 / sqrt(3).
    A single point at 0.25 after E: weights 0.75 at k = 0 and 0.25 at k = 1. Splat 1:           (0.75,   0.25)
    Blur along axis 0, where no other corner exists: (0.75 + 0.25 / 2, 0.25 + 0.75 / 2)       = (0.875,  0.625)
    Axis 1 is the same line backwards: (0.875 + 0.625 / 2, 0.625 + 0.875 / 2)                 = (1.1875, 1.0625)
    Slice: 0.75 * 1.1875 + 0.25 * 1.0625                                                      = 1.15625
    """
    kernel = permutohedral_lattice(torch.tensor([[0.25 * 3 ** 0.5 / 2]]))
    splat, blurs, slice_ = kernel
    assert sorted(dense(splat, 1).flatten().tolist()) == pytest.approx([0.25, 0.75]) and len(blurs) == 2
    assert torch.equal(dense(slice_, 2), dense(splat, 1).T)
    assert apply(kernel, torch.ones(1, 1)).item() == pytest.approx(1.15625)


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_lattice_invariants(d):
    features = torch.randn(300, d, generator=torch.Generator().manual_seed(d)) * 2
    splat, blurs, slice_ = permutohedral_lattice(features)
    M = len(splat[1]) - 1
    splat, blurs, slice_ = dense(splat, 300), [dense(blur, M) for blur in blurs], dense(slice_, M)
    assert torch.equal(splat, slice_.T) and len(blurs) == d + 1
    assert splat.min() > -1e-5 and torch.allclose(splat.sum(0), torch.ones(300), atol=1e-5)
    assert ((splat != 0).sum(0) == d + 1).all()                                     # corners of a simplex
    assert (splat != 0).any(1).all()                                                # none that no point touches
    for blur in blurs:
        assert torch.equal(blur, blur.T) and (blur.diagonal() == 1).all()
        off = blur - torch.eye(len(blur))
        assert set(off.unique().tolist()) <= {0, 0.5} and (off > 0).sum(1).max() <= 2
    if d > 1:                                                                       # along different axes
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(blurs, 2))


def naive_lattice_filter(features, values):
    """Adams et al. with tuples for corners and a dictionary for the lattice, point by point in float64."""
    N, d = features.shape
    E = (np.triu(np.ones((d + 1, d + 1)), 1) - np.diag(np.arange(d + 1)))[:, 1:]    # column j: j ones, then -j
    E = E / np.sqrt(np.arange(1, d + 1) * np.arange(2, d + 2)) * np.sqrt(2 / 3) * (d + 1)
    lattice, corners = {}, []
    for f, value in zip(features, values):
        y = E @ f
        # the nearest point of colour 0: all multiples of d + 1 around y that sum to 0
        down = np.floor(y / (d + 1)).astype(int)
        near = (np.array(ups) + down for ups in itertools.product((0, 1), repeat=d + 1))
        zero = min((c * (d + 1) for c in near if c.sum() == 0), key=lambda c: ((y - c) ** 2).sum())
        # corner of colour r: up by r in all coordinates, and down by d + 1 in the r that y exceeds the least
        highest = np.argsort(-(y - zero), kind="stable")
        own = []
        for r in range(d + 1):
            corner = zero + r
            corner[highest[d + 1 - r:]] -= d + 1
            own.append(tuple(corner.tolist()))
        A = np.vstack([np.array(own).T, np.ones(d + 1)])        # barycentric weights: what sums to 1 and gives y
        weights = np.linalg.lstsq(A, np.append(y, 1), rcond=None)[0]
        corners.append((own, weights))
        for corner, weight in zip(own, weights):
            lattice[corner] = lattice.get(corner, 0) + weight * value
    for j in range(d + 1):
        axis = np.full(d + 1, -1)
        axis[j] = d
        neighbours = lambda c: (tuple((np.array(c) + s * axis).tolist()) for s in (1, -1))
        lattice = {c: v + sum(0.5 * lattice[n] for n in neighbours(c) if n in lattice) for c, v in lattice.items()}
    return np.stack([sum(w * lattice[c] for c, w in zip(own, weights)) for own, weights in corners])


@pytest.mark.parametrize("layout", ["cloud", "sheet"])
@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_lattice_against_dictionaries(d, layout):
    """A cloud has gaps in it; a sheet is full to its borders, where a step must not come out at another border."""
    generator = np.random.default_rng(d)
    features = 1.5 * generator.normal(size=(150, d)) if layout == "cloud" else 4 * generator.random(size=(400, d))
    values = generator.normal(size=(len(features), 3))
    ours = apply(permutohedral_lattice(torch.tensor(features).float()), torch.tensor(values).float())
    assert np.allclose(ours, naive_lattice_filter(features, values), atol=2e-4)


def test_lattice_is_near_a_gaussian():
    """A point source on a plane, 40 x 40: the response against exp(-r^2 / 2), scaled alike at the source."""
    row, column = torch.meshgrid(torch.arange(41.0), torch.arange(41.0), indexing="ij")
    features = torch.stack([column, row], 2).view(-1, 2) / 5
    source = torch.zeros(41 * 41, 1)
    source[20 * 41 + 20] = 1
    response = apply(permutohedral_lattice(features), source)[:, 0]
    exact = (-0.5 * ((features - features[20 * 41 + 20]) ** 2).sum(1)).exp()
    assert torch.corrcoef(torch.stack([response, exact]))[0, 1] > 0.98
    assert response.sum() / response.max() == pytest.approx((exact.sum() / exact.max()).item(), rel=0.25)


def test_kernels_are_normalised_and_the_gaussian_one_is_blind_to_colour():
    image, other = (torch.from_numpy(picture(12, 10, texture, seed)[0]) for texture, seed in ((5, 0), (50, 9)))
    ones, eye = torch.ones(120, 1), torch.eye(120)
    bilateral, gaussian = crf_kernels(image, xy=5, rgb=10, gaussian_xy=3)
    for kernel in (bilateral, gaussian):
        assert apply(kernel, eye).min() > -1e-6 and 0.9 < apply(kernel, ones).mean() < 1.1
    other_bilateral, other_gaussian = crf_kernels(other, xy=5, rgb=10, gaussian_xy=3)
    assert torch.equal(apply(gaussian, eye), apply(other_gaussian, eye))
    assert (apply(bilateral, eye) - apply(other_bilateral, eye)).abs().max() > 0.1


# ----------------------------------------------------------------------------------------------------------------------
# marginals

def drawn_cases():
    for texture, preset, (H, W), C in ((0, "resnet101", (60, 80), 5), (25, "resnet101", (60, 80), 21),
                                       (0, "vgg16", (45, 64), 3), (25, "vgg16", (64, 45), 2)):
        yield picture(H, W, texture)[0], softmaps(C, H, W), PRESETS[preset]


def test_against_pydensecrf():
    pytest.importorskip("pydensecrf.densecrf", exc_type=ImportError)
    for image, probabilities, parameters in drawn_cases():
        ours = dense_crf(image, probabilities, **parameters)
        theirs = dense_crf(image, probabilities, **parameters, backend="pydensecrf")
        mean, same = differ(ours, theirs)
        assert mean < 1e-5 and same >= 0.9999, (image.shape, parameters, mean, same)
        assert differ(ours, probabilities)[0] > 1e-2                                # and something happened


def test_against_pydensecrf_with_every_parameter_changed():
    pytest.importorskip("pydensecrf.densecrf", exc_type=ImportError)
    image, _ = picture(40, 36, texture=10)
    parameters = dict(w=2.5, xy=20, rgb=12, gaussian_w=1.5, gaussian_xy=1.7, iterations=3)
    probabilities = softmaps(4, 40, 36)
    base = dense_crf(image, probabilities, **parameters)
    for changed in ({}, {"w": 7}, {"xy": 60}, {"rgb": 40}, {"gaussian_w": 6}, {"gaussian_xy": 4}, {"iterations": 6}):
        ours = dense_crf(image, probabilities, **{**parameters, **changed})
        theirs = dense_crf(image, probabilities, **{**parameters, **changed}, backend="pydensecrf")
        assert differ(ours, theirs)[0] < 1e-5, changed
        assert not changed or differ(ours, base)[0] > 1e-4, changed                 # each of them counts


def reference_inputs():
    image, _ = picture(12, 16, texture=8)
    return image, softmaps(3, 12, 16, seed=1).numpy()


def test_against_stored_marginals_of_pydensecrf():
    stored = np.load(REFERENCE)                         # inputs too: random numbers may change between versions
    for preset in PRESETS:
        ours = dense_crf(stored["image"], stored["probabilities"], **PRESETS[preset])
        mean, same = differ(ours, torch.from_numpy(stored[preset]))
        assert mean < 1e-5 and same == 1, preset
        assert differ(ours, torch.from_numpy(stored["probabilities"]))[0] > 1e-2


def exact_marginals(image, probabilities, w, xy, rgb, gaussian_w, gaussian_xy, iterations=10):
    """Alg. 1 with all pairs of pixels, float64, without a lattice."""
    H, W = image.shape[:2]
    position = np.stack(np.mgrid[:H, :W], 2).reshape(-1, 2).astype(np.float64)
    colour = image.reshape(-1, 3).astype(np.float64)
    square = lambda x: ((x[:, None] - x[None]) ** 2).sum(2)
    message = 0
    for weight, exponent in ((w, square(position) / xy ** 2 + square(colour) / rgb ** 2),
                             (gaussian_w, square(position) / gaussian_xy ** 2)):
        K = np.exp(-exponent / 2)
        norm = K.sum(1) ** -0.5
        message = message + weight * norm[:, None] * K * norm
    minus_energy = np.log(np.maximum(probabilities.reshape(len(probabilities), -1).T.astype(np.float64), 1e-5))
    softmax = lambda x: torch.from_numpy(x).softmax(1).numpy()
    q = softmax(minus_energy)
    for _ in range(iterations):
        q = softmax(minus_energy + message @ q)
    return torch.from_numpy(q.T.reshape(probabilities.shape))


@pytest.mark.parametrize("preset", PRESETS)
def test_against_all_pairs(preset):
    """The lattice is an approximation: labels may differ where two of them are about as likely."""
    cases = [(picture(30, 36, texture)[0], ragged(picture(30, 36, texture)[1])) for texture in (0, 6, 20)]
    cases += [(picture(30, 36, 6, seed)[0], softmaps(4, 30, 36, seed)) for seed in (0, 3)]
    for i, (image, probabilities) in enumerate(cases):
        exact = exact_marginals(image, probabilities.numpy(), **PRESETS[preset])
        assert differ(dense_crf(image, probabilities, **PRESETS[preset]), exact)[1] >= 0.98, i
        assert differ(exact, probabilities)[1] < 0.98, i                            # the CRF moves more than that


def test_mean_field_by_hand():
    """
    Two pixels, two labels, one iteration, kernel [[1, 1/2], [1/2, 1]], w = 2; pixel 0 is sure by ln 3, pixel 1 even.
    Q = (3/4, 1/4) and (1/2, 1/2) at first. Messages to pixel 1: 1/2 * (3/4, 1/4) + (1/2, 1/2) = (7/8, 5/8): its logits
    differ by 2 * (7/8 - 5/8) = 1/2. To pixel 0: (3/4, 1/4) + 1/2 * (1/2, 1/2) = (1, 1/2): ln 3 + 2 * 1/2.
    """
    K = crf.sparse(torch.tensor([2, 2]), torch.tensor([0, 1, 0, 1]), torch.tensor([1, 0.5, 0.5, 1]))
    unary = torch.tensor([[0.0, np.log(3)], [0, 0]]).float()
    identity = crf.sparse(torch.tensor([1, 1]), torch.tensor([0, 1]), torch.ones(2))
    q = mean_field(unary, [(2, (identity, [K], identity))], iterations=1)
    assert (q[:, 0] / q[:, 1]).log().tolist() == pytest.approx([np.log(3) + 1, 0.5], rel=1e-5)


def test_it_mends_a_ragged_prediction():
    image, inside = picture(60, 80, texture=5)
    wrong = lambda p: (p.argmax(0).numpy() != inside).mean()
    assert wrong(ragged(inside)) > 0.05
    for parameters in PRESETS.values():
        assert wrong(dense_crf(image, ragged(inside), **parameters)) < 0.4 * wrong(ragged(inside))


# ----------------------------------------------------------------------------------------------------------------------
# what goes in and what comes out

def test_presets_are_those_of_the_design():
    assert PRESETS["vgg16"] == dict(w=4, xy=121, rgb=5, gaussian_w=3, gaussian_xy=3)
    assert PRESETS["vgg16-plain"] == dict(w=5, xy=50, rgb=10, gaussian_w=3, gaussian_xy=3)
    assert PRESETS["resnet101"] == dict(w=4, xy=67, rgb=3, gaussian_w=3, gaussian_xy=3)
    image, probabilities = picture(20, 20, 5)[0], softmaps(3, 20, 20)
    assert torch.equal(dense_crf(image, probabilities), dense_crf(image, probabilities, **PRESETS["resnet101"],
                                                                  iterations=10))


def test_array_or_tensor_of_any_float_type_and_any_memory_order():
    image, probabilities = picture(20, 24, 5)[0], softmaps(3, 20, 24)
    wanted = dense_crf(image, probabilities)
    assert wanted.shape == (3, 20, 24) and wanted.dtype == torch.float32
    assert torch.allclose(wanted.sum(0), torch.ones(20, 24), atol=1e-5)
    read_only = image.copy()
    read_only.setflags(write=False)
    turned = probabilities.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for i, p in ((read_only, probabilities.numpy()), (torch.from_numpy(image), probabilities.double()),
                 (np.asfortranarray(image), turned), (image[:, ::-1][:, ::-1], probabilities.numpy()[::-1][::-1])):
        assert torch.allclose(dense_crf(i, p), wanted, atol=1e-6)
    assert differ(dense_crf(image, probabilities.half()), wanted)[0] < 1e-3
    with torch.autocast("cpu", torch.bfloat16):         # the caller's mixed precision stays outside
        assert torch.equal(dense_crf(image, probabilities), wanted)


def test_all_happens_where_the_inputs_lie():
    """What is made without a word about its device becomes a meta tensor here, which holds no values."""
    image, probabilities = picture(20, 24, 5)[0], softmaps(3, 20, 24)
    wanted = dense_crf(image, probabilities)
    with torch.device("meta"):
        assert torch.equal(dense_crf(image, probabilities), wanted)


def test_inputs_are_left_as_they_were():
    image, probabilities = picture(20, 24, 5)[0], softmaps(3, 20, 24)
    image_before, before = image.copy(), probabilities.clone()
    dense_crf(image, probabilities)
    assert (image == image_before).all() and torch.equal(probabilities, before)


def test_classes_have_no_order():
    image, probabilities = picture(20, 24, 5)[0], softmaps(4, 20, 24)
    order = [2, 0, 3, 1]
    assert torch.allclose(dense_crf(image, probabilities[order]), dense_crf(image, probabilities)[order], atol=1e-5)


def test_a_class_of_probability_0_everywhere_stays_out_and_nothing_is_nan():
    image, probabilities = picture(20, 24, 5)[0], softmaps(3, 20, 24)
    padded = torch.cat([probabilities, torch.zeros(1, 20, 24)])
    refined = dense_crf(image, padded)
    assert refined[3].max() < 1e-3 and differ(refined[:3], dense_crf(image, probabilities))[0] < 1e-4
    hard = torch.nn.functional.one_hot(probabilities.argmax(0), 3).permute(2, 0, 1).float()        # 0 and 1 alone
    assert crf.unary_energy(hard).max().item() == pytest.approx(11.5129, abs=1e-4)  # -ln 1e-5
    refined = dense_crf(image, hard)
    assert refined.isfinite().all() and differ(refined, hard)[1] > 0.9


def test_nothing_to_do_changes_nothing():
    image, probabilities = picture(20, 24, 5)[0], softmaps(3, 20, 24)
    assert torch.allclose(dense_crf(image, probabilities, iterations=0), probabilities, atol=1e-6)
    assert torch.allclose(dense_crf(image, probabilities, w=0, gaussian_w=0), probabilities, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2)])
@pytest.mark.parametrize("C", [1, 3])
def test_tiny_pictures_and_one_class(shape, C):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    probabilities = softmaps(C, *shape)
    refined = dense_crf(image, probabilities)
    assert refined.shape == (C, *shape) and torch.allclose(refined.sum(0), torch.ones(shape), atol=1e-5)
    if C == 1:
        assert (refined == 1).all()
    if shape == (1, 1):                                 # a pixel talks to itself: the likeliest label becomes likelier
        assert refined.argmax(0) == probabilities.argmax(0) and refined.max() >= probabilities.max()


def test_what_will_not_do():
    image, probabilities = picture(20, 24, 5)[0], softmaps(3, 20, 24)
    nan, below, above = (probabilities.clone() for _ in range(3))
    nan[1, 3, 4], below[0, 0, 0], above[:, 2, 2] = float("nan"), -0.1, 1
    for i, p, words in ((image.astype(np.float32), probabilities, "uint8 RGB"),
                        (image.astype(np.int64), probabilities, "uint8 RGB"),
                        (image[..., 0], probabilities, "uint8 RGB"),
                        (image.transpose(2, 0, 1), probabilities, "uint8 RGB"),
                        (np.dstack([image, image[..., :1]]), probabilities, "uint8 RGB"),
                        (image[:0], probabilities[:, :0], "uint8 RGB"),
                        (image, probabilities[0], "(C, H, W)"), (image, probabilities[:0], "(C, H, W)"),
                        (image, (255 * probabilities).byte(), "float type"),
                        (image, probabilities[:, 1:], "20x24 and 19x24"),
                        (image.transpose(1, 0, 2), probabilities, "24x20 and 20x24"),
                        (image, probabilities.log(), "softmax"), (image, below, "softmax"), (image, above, "softmax"),
                        (image, 0 * probabilities, "softmax"), (image, nan, "NaN")):
        for backend in ("torch", "pydensecrf"):
            with pytest.raises(ValueError) as error:
                dense_crf(i, p, backend=backend)
            assert words in str(error.value) and "\n" not in str(error.value), error.value
    for wrong, words in ((dict(xy=0), "from 0.01"), (dict(rgb=-1), "from 0.01"),
                         (dict(gaussian_xy=float("nan")), "from 0.01"),
                         (dict(w=-1), "from 0"), (dict(gaussian_w=float("inf")), "from 0"),
                         (dict(iterations=-1), "whole"), (dict(iterations=2.5), "whole"),
                         (dict(backend="cuda"), "backend"),
                         (dict(rgb=0.01), "spread"), (dict(xy=1e-9), "0.01"), (dict(gaussian_xy=1e-40), "0.01")):
        with pytest.raises(ValueError, match=words):
            dense_crf(image, probabilities, **wrong)
    for tiny in (1e-6, 1e-7, 1e-20):                    # one colour: no spread, but beyond what float32 tells apart
        with pytest.raises(ValueError, match="spread"):
            crf.crf_kernels(torch.full(image.shape, 255, dtype=torch.uint8), 67, tiny, 3)


def test_without_pydensecrf_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)                   # importing it fails
    image, probabilities = picture(8, 8, 5)[0], softmaps(2, 8, 8)
    with pytest.raises(ValueError, match="pip install pydensecrf2"):
        dense_crf(image, probabilities, backend="pydensecrf")
    dense_crf(image, probabilities)                                                 # and the default needs none


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_cuda_gives_what_the_cpu_gives():
    for image, probabilities, parameters in drawn_cases():
        there = dense_crf(image, probabilities.cuda(), **parameters)
        mean, same = differ(there.cpu(), dense_crf(image, probabilities, **parameters))
        assert there.is_cuda and mean < 1e-5 and same >= 0.999


def test_kernels_serve_any_weights():
    """What a search over w does: the lattices once, mean field for each weight."""
    image, probabilities = picture(20, 24, 5)[0], softmaps(3, 20, 24)
    bilateral, gaussian = crf_kernels(torch.from_numpy(image), xy=67, rgb=3, gaussian_xy=3)
    for w in (1, 6):
        q = mean_field(crf.unary_energy(probabilities), [(3, gaussian), (w, bilateral)], iterations=5)
        assert torch.equal(q.T.reshape(3, 20, 24), dense_crf(image, probabilities, w=w, iterations=5))


# ----------------------------------------------------------------------------------------------------------------------
# the command

def command_line(*arguments, folder):
    """python crf.py ... in a process of its own -> (exit status, stdout, stderr)"""
    command = [sys.executable, Path(crf.__file__), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def inputs(tmp_path):
    image, inside = picture(45, 60, texture=5)
    Image.fromarray(image).save(tmp_path / "image.png")
    probabilities = softmaps(3, 45, 60).numpy()
    np.save(tmp_path / "probabilities.npy", probabilities.astype(np.float16))
    return tmp_path


def test_command_draws_before_and_after(inputs):
    status, out, error = command_line("image.png", "probabilities.npy", folder=inputs)
    assert status == 0 and error == "" and "% of the pixels changed" in out
    assert sorted(path.name for path in inputs.iterdir()) == ["crf.png", "image.png", "probabilities.npy"]
    drawn = np.array(Image.open(inputs / "crf.png"))
    assert drawn.shape == (26 + 375 + 4, 3 * (500 + 4), 3)
    # Where the panels have class 0 they are grey; elsewhere they are not. Middle of each pixel's square:
    row, column = 26 + ((np.arange(45) + 0.5) * 375 / 45).astype(int), ((np.arange(60) + 0.5) * 500 / 60).astype(int)
    image, probabilities = np.array(Image.open(inputs / "image.png")), np.load(inputs / "probabilities.npy")
    panels = [drawn[np.ix_(row, 504 * k + 2 + column)].astype(int) for k in range(3)]
    assert (panels[0] == image).all()
    refined = dense_crf(image, probabilities)
    for shown, labels in zip(panels[1:], (probabilities.argmax(0), refined.argmax(0).numpy())):
        assert ((np.ptp(shown, axis=2) > 0) == (labels > 0)).all()
    changed = 100 * (probabilities.argmax(0) != refined.argmax(0).numpy()).mean()
    assert 0 < changed and f"crf.png: {changed:.1f} %" in out


def main(*arguments, capsys):
    status = crf.main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def test_command_flags(inputs, capsys, monkeypatch):
    monkeypatch.chdir(inputs)
    image, probabilities = np.array(Image.open("image.png")), np.load("probabilities.npy")
    before = probabilities.argmax(0)
    for flags, parameters in ((["--preset", "vgg16"], PRESETS["vgg16"]),
                              (["--preset", "vgg16", "--rgb", "30", "--iterations", "2"],
                               {**PRESETS["vgg16"], "rgb": 30, "iterations": 2}),
                              (["--w", "0", "--gaussian-w", "9", "--gaussian-xy", "2"],
                               {**PRESETS["resnet101"], "w": 0, "gaussian_w": 9, "gaussian_xy": 2})):
        status, out, _ = main("image.png", "probabilities.npy", "--out", "out.png", *flags, capsys=capsys)
        changed = 100 * (dense_crf(image, probabilities, **parameters).argmax(0).numpy() != before).mean()
        assert status == 0 and out.startswith(f"out.png: {changed:.1f} %"), flags
    np.save("foreign.npy", probabilities.astype(">f4"))         # another machine's byte order
    again = main("image.png", "foreign.npy", "--out", "out.png", *flags, capsys=capsys)[1]
    assert again.split(",")[0] == out.split(",")[0]


def test_command_refuses_in_one_line(inputs, capsys, monkeypatch):
    monkeypatch.chdir(inputs)
    probabilities = np.load("probabilities.npy")
    (inputs / "cut.png").write_bytes((inputs / "image.png").read_bytes()[:500])
    (inputs / "text.npy").write_text("not an array")
    (inputs / "empty.npy").write_bytes(b"")
    np.save("pickle.npy", np.array([{}], object))
    np.savez("several.npz", probabilities)
    np.save("logits.npy", np.log(probabilities.astype(np.float32)))
    np.save("small.npy", probabilities[:, :9])
    np.save("labels.npy", probabilities.argmax(0))
    np.save("words.npy", np.array([["a"]]))
    good = ["image.png", "probabilities.npy"]
    for arguments, words in ((["none.png", good[1]], "no image none.png"),
                             (["cut.png", good[1]], "cut.png: not a readable"),
                             ([good[0], "none.npy"], "no probabilities none.npy"),
                             ([good[0], "text.npy"], "text.npy: not an array"),
                             ([good[0], "empty.npy"], "empty.npy: not an array"),
                             ([good[0], "pickle.npy"], "pickle.npy: not an array"),
                             ([good[0], "several.npz"], "several.npz: not an array"),
                             ([good[0], "logits.npy"], "softmax"), ([good[0], "small.npy"], "45x60 and 9x60"),
                             ([good[0], "labels.npy"], "(C, H, W)"), ([good[0], "words.npy"], "words.npy"),
                             ([*good, "--xy", "0"], "from 0.01"),
                             ([*good, "--rgb", "1e-9", "--backend", "pydensecrf"], "from 0.01"),
                             ([*good, "--out", "crf.jpg"], "a .png file"),
                             ([*good, "--iterations", "-1"], "iterations"),
                             ([*good, "--out", "nowhere/crf.png"], "nowhere"), ([*good, "--out", "."], "--out")):
        status, out, error = main(*arguments, capsys=capsys)
        assert status == 2 and out == "" and error.count("\n") == 1 and error.startswith("crf.py: "), (arguments, error)
        assert words in error, (words, error)
    if not torch.cuda.is_available():
        assert "--device cpu" in main(*good, "--device", "cuda", capsys=capsys)[2]
    assert not (inputs / "crf.png").exists() and not list(inputs.glob("*.tmp"))


def test_help_gives_each_default(capsys):
    with pytest.raises(SystemExit) as stop:
        crf.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for flag in ("--preset", "--w", "--xy", "--rgb", "--gaussian-w", "--gaussian-xy", "--iterations", "--backend"):
        assert flag in text
    assert text.count("(ours: ") == 8


if __name__ == "__main__":
    image, probabilities = reference_inputs()
    np.savez_compressed(REFERENCE, image=image, probabilities=probabilities, **{
        preset: dense_crf(image, probabilities, **PRESETS[preset], backend="pydensecrf").numpy() for preset in PRESETS})
    print(REFERENCE, REFERENCE.stat().st_size, "bytes")
