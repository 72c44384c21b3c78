"""
The fully connected CRF with Gaussian pairwise terms: it moves the borders of the prediction to edges of the image.

Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials" (NIPS 2011), which
both papers run on their network's output: Box2Seg's row (C) of Tables 1 and 2 (74.9 -> 76.4), and BoxSup's Sect. 5
throughout. Eq. 1 to 5 and Alg. 1 below are that paper's. Its filter is the permutohedral lattice of Adams, Baek and
Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice" (Eurographics 2010), here as products of sparse
matrices. PyTorch alone, on CPU or GPU; pydensecrf, the authors' C++ code with a Python wrapper, is a second backend,
and what the tests compare with. Read first mean_field(), the algorithm, then crf_kernels(), its two kernels;
permutohedral_lattice() only makes them fast.

Run:    python crf.py holiday.jpg holiday.npy                                       (Box2Seg's network, ResNet-101)
        python crf.py holiday.jpg holiday.npy --preset vgg16-plain                  (BoxSup's)
Reads:  an image, and the class probabilities (C, H, W) of its pixels, any float type, as one gets them by
        numpy.save("holiday.npy", predict(network, image).cpu().numpy()), with predict() of model.py
Writes: crf.png (--out): the image | most probable classes before | after
Expect: a photograph of 500x375 with 21 classes takes half a second to two seconds on one CPU core, the more texture
        the longer (mere noise takes ten).
        Exit status 0; 2 with one line on stderr if an input will not do.
"""
import argparse
import itertools
import math
import os
import struct
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# PAPER SILENT: the CRF's parameters, in both papers (BoxSup points to DeepLab); those that DeepLab's authors found by
# search on held-out images, as others' code has them, for VGG-16 with a 4x4 fc6 ("plain", BoxSup's baseline), for its
# LargeFOV and for a ResNet-101, with their 10 iterations (some copies have 49 pixels for LargeFOV in place of 121). A
# network that is more or less confident needs a search of its own (evaluate.py --crf-search): where probabilities are
# near 0 and 1, the CRF changes nothing.
PRESETS = {"vgg16-plain": dict(w=5, xy=50, rgb=10, gaussian_w=3, gaussian_xy=3),
           "vgg16": dict(w=4, xy=121, rgb=5, gaussian_w=3, gaussian_xy=3),
           "resnet101": dict(w=4, xy=67, rgb=3, gaussian_w=3, gaussian_xy=3)}
ITERATIONS = 10


class BadInput(ValueError):
    """What the user gave cannot be used; the message is one line that names the file and the remedy."""


# ----------------------------------------------------------------------------------------------------------------------
# the Gaussian filter: out_i = sum_j k(f_i, f_j) v_j for all N pixels at once, in time linear in N

def sparse(row_lengths, columns, weights):
    """A sparse matrix, row after row: how many entries each row has, the column of each entry, its value."""
    starts = torch.cat([row_lengths.new_zeros(1), row_lengths.cumsum(0)])
    return columns.flatten().int(), starts.int(), weights.flatten()


def product(matrix, values):
    """Sparse times dense, (R, S) and (S, C) -> (R, C): each row the weighted sum of the rows that its entries name."""
    # That is what embedding_bag does for the words of a sentence, in 0.4 of the time of a sparse CSR tensor (one core).
    columns, starts, weights = matrix
    return F.embedding_bag(columns, values, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)


def permutohedral_lattice(features):
    """
    Points (N, d) float32 -> splat (M, N), blurs [d + 1 of (M, M)], slice (N, M): sparse matrices, whose product filters
    with the Gaussian exp(-|f_i - f_j|^2 / 2), up to a constant factor and to the lattice's own error.

    The lattice lives in d + 1 coordinates that sum to 0. Its points have whole coordinates that are all equal modulo
    d + 1; that common remainder r = 0..d is the point's colour. They cut the space into simplices with one corner of
    each colour. Splat: each pixel gives its value to the d + 1 corners around it, by barycentric weight. Blur: [1/2 1
    1/2] along each of the d + 1 axes. Slice: each pixel reads its corners with the weights that it gave. Only the M <=
    N (d + 1) corners that some pixel touches exist; the others hold 0 and pass nothing on, as in the authors' code.

    All in float32, and int64 for the names of corners: float64 is needed nowhere. The order of operations is that of
    the authors' code. It matters: rounding decides in which of two simplices a pixel on their border lies, and so which
    corners exist.
    Raises ValueError if the features spread too far.
    """
    (N, d), device = features.shape, features.device

    # 1. Elevate (Adams et al., p. 5): y = E f, d coordinates -> d + 1 that sum to 0. The last factor makes the blur's
    #    standard deviation 1 (p. 6); it is rounded to float32 where the authors' code does.
    factor = float(np.float32(math.sqrt(2 / 3) * (d + 1)))
    scale = features.new_tensor([1 / math.sqrt(j * (j + 1)) * factor for j in range(1, d + 1)])
    x = (features * scale).T                                                        # (d, N)
    y = x.new_empty(d + 1, N)
    below = torch.zeros_like(x[0])
    for j in range(d, 0, -1):
        y[j] = below - j * x[j - 1]
        below = below + x[j - 1]
    y[0] = below

    # 2. The corner of colour 0: round to multiples of d + 1. Where these do not sum to 0, correct the coordinates that
    #    were rounded the farthest. rank: 0 for the coordinate that lies highest above its corner's, d for the lowest;
    #    of equal ones the first is the higher, as in the authors' code.
    corner = (y * (1 / (d + 1))).round()
    above = y - corner * (d + 1)
    rank = corner.sum(0).long().repeat(d + 1, 1)                                    # (d + 1, N)
    for i, j in itertools.combinations(range(d + 1), 2):
        lower = above[i] < above[j]
        rank[i] += lower
        rank[j] += ~lower
    wrap = (rank < 0).long() - (rank > d).long()
    rank += wrap * (d + 1)
    corner = (corner + wrap) * (d + 1)                                              # (d + 1, N), sum 0
    low, high = corner.amin(1, keepdim=True), corner.amax(1, keepdim=True)
    room = (high - low + (4 * d + 1))[:d, 0].tolist()                               # 2 d more on both sides, for step 6
    # Refused before they are used as indices: coordinates too large for float32 (ranks then leave 0..d) or int64; NaN.
    if not (rank.min() == 0 and rank.max() == d and max(room) < 2 ** 16 and math.prod(room) < 2 ** 62):
        raise BadInput("the features spread too far for the lattice: raise the standard deviations xy and rgb")

    # 3. Barycentric weights (p. 10): differences of neighbours in the sorted residuals; row r for colour r.
    place = d - rank
    rising = torch.empty_like(y).scatter_(0, place, (y - corner) * (1 / (d + 1)))
    weights = rising - rising.roll(1, dims=0)
    weights[0] += 1                                                                 # (d + 1, N), sum 1

    # 4. Name each corner by one int64: its coordinates as digits of a number, but the last one, which the others imply.
    #    unit[j]: what a step of 1 in coordinate j adds to the name. Digits have room to spare, so a step to a neighbour
    #    is the addition of a constant.
    unit = [math.prod(map(int, room[:j])) for j in range(d)] + [0]
    units = torch.tensor(unit, device=device)[:, None]
    first = ((corner - low).long() * units).sum(0)                                  # (N,), colour 0
    # From colour r to r + 1: 1 up in all coordinates, and d + 1 down in the one of rank d - r.
    step = sum(unit) - (d + 1) * torch.empty_like(rank).scatter_(0, place, units.expand(-1, N))
    names = first + step.cumsum(0) - step                                           # (d + 1, N)

    # 5. Splat and slice: one sort finds the corners that are the same.
    names, order = names.T.flatten().sort(stable=True)
    corners, index, count = names.unique_consecutive(return_inverse=True, return_counts=True)  # (M,), (N(d+1),), (M,)
    M, weights = len(corners), weights.T.flatten()                                  # (N(d+1),), pixel by pixel
    splat = sparse(count, order // (d + 1), weights[order])
    back = torch.empty_like(index).scatter_(0, order, index)
    slice_ = sparse(torch.full((N,), d + 1, device=device), back, weights)

    # 6. Blur: the neighbour along axis j is d up in coordinate j and 1 down in all others, or the reverse. In place of
    #    one that does not exist stands the corner itself, with weight 0.
    here, blurs = torch.arange(M, device=device), []
    for j in range(d + 1):
        step = abs((d + 1) * unit[j] - sum(unit))
        at = torch.searchsorted(corners, corners + step).clamp(max=M - 1)
        exists = corners[at] == corners + step
        after = torch.where(exists, at, here)
        before = torch.arange(M + 1, device=device).scatter_(0, torch.where(exists, at, M), here)[:M]
        columns = torch.stack([before, here, after], dim=1)                         # (M, 3)
        taps = 0.5 * (columns != here[:, None]).float()
        taps[:, 1] = 1
        blurs.append(sparse(torch.full((M,), 3, device=device), columns, taps))
    return splat, blurs, slice_


def apply(kernel, values):
    """One message passing (Eq. 5): values (N, C) -> (N, C). kernel as permutohedral_lattice() or gaussian_kernel()."""
    splat, blurs, slice_ = kernel
    values = product(splat, values)                                                 # (M, C)
    for blur in blurs:
        values = product(blur, values)
    return product(slice_, values)


def gaussian_kernel(features):
    """
    Points (N, d) float32 -> the filter D^-1/2 K D^-1/2, ready for apply(); K is the lattice's, D its row sums.

    Built once per image: ten iterations and all classes share it, and so do all weights w that a search may try.
    """
    # PAPER SILENT: how a kernel is normalised; without normalisation a pixel in a large even area gets a larger message
    # than one in a small area. Symmetric, which is pydensecrf's default and what later work used.
    kernel = permutohedral_lattice(features)
    norm = apply(kernel, features.new_ones(len(features), 1)).rsqrt()               # (N, 1)
    (pixels, _, splat_weights), _, (_, _, slice_weights) = kernel
    splat_weights.mul_(norm[pixels, 0])
    slice_weights.view(len(features), -1).mul_(norm)
    return kernel


# ----------------------------------------------------------------------------------------------------------------------
# the CRF

def crf_kernels(image, xy, rgb, gaussian_xy):
    """
    The two kernels of Eq. 3 -> (bilateral, gaussian): exp(-|p_i - p_j|^2 / 2 xy^2 - |I_i - I_j|^2 / 2 rgb^2), near and
    alike in colour, and exp(-|p_i - p_j|^2 / 2 gaussian_xy^2), near. image: (H, W, 3) uint8 RGB tensor.
    """
    # PAPER SILENT: in which colours pixels are compared; RGB as it is in the file, 0..255, never an image that was
    # normalised for the network.
    H, W = image.shape[:2]
    row, column = torch.meshgrid(*(torch.arange(n, device=image.device) for n in (H, W)), indexing="ij")
    position = torch.stack([column, row], dim=2).view(H * W, 2).float()             # x, y
    colour = image.reshape(H * W, 3).float()
    return gaussian_kernel(torch.cat([position / xy, colour / rgb], dim=1)), gaussian_kernel(position / gaussian_xy)


def mean_field(unary, weighted_kernels, iterations=ITERATIONS):
    """
    Alg. 1: the energies psi_u of Eq. 1, (N, C), and [(w, kernel), ...] of Eq. 2 -> Q, (N, C), sum 1 per pixel.

        Q_i(l) = 1/Z_i exp(-psi_u(l) - sum_m w_m sum_j k_m(f_i, f_j) sum_l' mu(l, l') Q_j(l'))                   (Eq. 4)

    With Potts' mu(l, l') = [l != l'] the inner sum is 1 - Q_j(l), and what does not depend on l goes into Z_i: each
    label is lifted by w times the message it gets. Eq. 4 has j != i; the authors' code leaves j = i in, and so do we.
    """
    q = (-unary).softmax(dim=1)
    for _ in range(iterations):
        logits = -unary
        for w, kernel in weighted_kernels:
            logits.add_(apply(kernel, q), alpha=w)          # message passing (Eq. 5) and compatibility transform
        q = logits.softmax(dim=1)                           # local update and normalization
    return q


def unary_energy(probabilities):
    """psi_u = -log p, (N, C) for (C, H, W)."""
    # PAPER SILENT: the energy of a probability of 0, which is infinite; probabilities are at least 1e-5 here, energies
    # at most 11.5. Messages lower a label's energy by at most about 1.3 w + 1.1 gaussian_w (measured on photographs),
    # 8.5 to 9.8 with the presets: such a label can win only where all others are nearly equal. With the largest w that
    # evaluate.py --crf-search tries, 7, it is 12.4.
    return -probabilities.clamp(min=1e-5).log().flatten(1).T.contiguous()


def pydensecrf(image, probabilities, w, xy, rgb, gaussian_w, gaussian_xy, iterations):
    """dense_crf() by the authors' C++ code, on one core. CPU tensors in, (C, H, W) out."""
    try:
        from pydensecrf.densecrf import DenseCRF2D
    except ImportError:
        raise BadInput("backend pydensecrf is not installed: pip install pydensecrf2, which needs a C++ compiler, "
                       "or take the backend torch") from None
    C, H, W = probabilities.shape
    crf = DenseCRF2D(W, H, C)                           # width first
    crf.setUnaryEnergy(unary_energy(probabilities).T.contiguous().numpy())          # (C, N)
    crf.addPairwiseGaussian(gaussian_xy, compat=gaussian_w)       # a number, Potts; an array would have the other sign
    crf.addPairwiseBilateral(xy, rgb, image.numpy().copy(), compat=w)  # a copy: it wants to write
    return torch.from_numpy(np.array(crf.inference(iterations))).view(C, H, W)


def as_tensor(x):
    if torch.is_tensor(x):
        return x
    x = np.array(x)
    try:
        return torch.from_numpy(x.astype(x.dtype.newbyteorder("=")))    # a .npy may have another machine's byte order
    except TypeError:
        raise BadInput(f"an array of {x.dtype}, a type that PyTorch lacks") from None


@torch.no_grad()
def dense_crf(image, probabilities, w=4, xy=67, rgb=3, gaussian_w=3, gaussian_xy=3, iterations=ITERATIONS,
              backend="torch"):
    """
    Class probabilities of one image, refined: (C, H, W) float32, sum 1 per pixel, where `probabilities` lie.

    image           (H, W, 3) uint8 RGB as in the file, numpy array or tensor
    probabilities   (C, H, W) of any float type, numpy array or tensor, 0..1, sum 1 per pixel
    w, xy, rgb      the bilateral kernel of Eq. 3: weight, standard deviation in pixels, and in steps of 0..255
    gaussian_w, gaussian_xy     the Gaussian kernel's; PRESETS holds all five, the defaults are those for ResNet-101
    backend         "torch", on the device of `probabilities`, or "pydensecrf", on one CPU core
    Raises ValueError, one line, on any other type, size or range, NaN included, and where pydensecrf is not installed.
    """
    image, probabilities = as_tensor(image), as_tensor(probabilities)
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[2] != 3 or image.numel() == 0:
        raise BadInput(f"image must be (H, W, 3) uint8 RGB, not {tuple(image.shape)} {image.dtype}")
    if not probabilities.is_floating_point() or probabilities.dim() != 3 or len(probabilities) == 0:
        raise BadInput("probabilities must be (C, H, W) of a float type, "
                       f"not {tuple(probabilities.shape)} {probabilities.dtype}")
    if image.shape[:2] != probabilities.shape[1:]:
        raise BadInput("image and probabilities differ in height x width: {}x{} and {}x{}".format(
            *image.shape[:2], *probabilities.shape[1:]))
    if not all(0 <= x < math.inf for x in (w, gaussian_w)) or not all(  # far below 0.01 pydensecrf crashes
            0.01 <= x < math.inf for x in (xy, rgb, gaussian_xy)):
        raise BadInput("w and gaussian_w must be numbers from 0, xy, rgb and gaussian_xy from 0.01")
    if not (isinstance(iterations, int) and iterations >= 0):
        raise BadInput(f"iterations must be a whole number from 0, not {iterations}")
    if backend not in ("torch", "pydensecrf"):
        raise BadInput(f"backend must be torch or pydensecrf, not {backend}")
    probabilities = probabilities.float()
    if not probabilities.isfinite().all():
        raise BadInput("probabilities hold NaN or infinity")
    if probabilities.min() < 0 or (probabilities.sum(0) - 1).abs().max() > 0.02:    # 0.02: float16, and means of it
        raise BadInput("probabilities must be from 0 and sum to 1 over the classes: apply softmax to logits first")

    if backend == "pydensecrf":
        refined = pydensecrf(image.cpu(), probabilities.cpu(), w, xy, rgb, gaussian_w, gaussian_xy, iterations)
        return refined.to(probabilities.device)
    with torch.autocast(probabilities.device.type, enabled=False):
        bilateral, gaussian = crf_kernels(image.to(probabilities.device), xy, rgb, gaussian_xy)
        q = mean_field(unary_energy(probabilities), [(gaussian_w, gaussian), (w, bilateral)], iterations)
    return q.T.contiguous().view(probabilities.shape)


# ----------------------------------------------------------------------------------------------------------------------
# before and after, to look at

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


def read_inputs(image_file, probabilities_file):
    """-> (H, W, 3) uint8 RGB, and what the .npy file holds."""
    image = read_image(image_file)
    try:
        with open(probabilities_file, "rb") as file:
            probabilities = np.load(file)               # without pickles, numpy's default
    except FileNotFoundError:
        raise BadInput(f"no probabilities {probabilities_file}: write them with numpy.save") from None
    except (OSError, ValueError, EOFError, SyntaxError):
        probabilities = None
    if not isinstance(probabilities, np.ndarray):       # np.load reads .npz too
        raise BadInput(f"{probabilities_file}: not an array as numpy.save writes it: make it again")
    return image, probabilities


def drawable(words):
    return words.encode("utf-8", "replace").decode()    # OpenCV crashes on a file name that is no UTF-8


def panel(image, labels, caption):
    """The image in grey under VOC's colours made brighter, below its caption; labels None: the image itself."""
    if labels is not None:
        bits = [sum((labels >> (3 * k + c) & 1) << (7 - k) for k in range(3)) for c in range(3)]   # VOC's palette
        colour = np.minimum(np.stack(bits, axis=2) * 1.1 + 40, 255)
        strength = np.where(labels == 0, 0, 0.7)[..., None]
        image = (strength * colour + (1 - strength) * 0.6 * image.mean(axis=2, keepdims=True)).astype(np.uint8)
    scale = min(375 / image.shape[0], 500 / image.shape[1])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    bar = np.full((26, image.shape[1], 3), 255, np.uint8)
    cv2.putText(bar, drawable(caption), (2, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (40, 40, 40), 1, cv2.LINE_AA)
    return cv2.copyMakeBorder(np.vstack([bar, image]), 0, 4, 2, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def main(argv):
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__.split("\n\n")[0].strip(),
        epilog="(ours): neither paper says. What each parameter does: Eq. 3 of Kraehenbuehl and Koltun.")
    add = parser.add_argument
    add("image", metavar="IMAGE", help="an image")
    add("probabilities", metavar="PROBABILITIES.npy", help="(C, H, W) class probabilities of its pixels, float")
    add("--preset", choices=sorted(PRESETS), default="resnet101", help="parameters for Box2Seg's network (resnet101: "
        "w 4, xy 67, rgb 3), for BoxSup's (vgg16-plain: w 5, xy 50, rgb 10) or its LargeFOV (vgg16: w 4, xy 121, "
        "rgb 5) (ours: %(default)s)")
    add("--w", type=float, help="weight of the bilateral kernel, for pixels near and similar (ours: the preset's)")
    add("--xy", type=float, help="its standard deviation in pixels (ours: the preset's)")
    add("--rgb", type=float, help="its standard deviation in colour, in steps of 0..255 (ours: the preset's)")
    add("--gaussian-w", type=float, help="weight of the Gaussian kernel, for near pixels (ours: 3)")
    add("--gaussian-xy", type=float, help="its standard deviation in pixels (ours: 3)")
    add("--iterations", type=int, default=ITERATIONS, help="iterations of the mean field (ours: %(default)s)")
    add("--backend", choices=["torch", "pydensecrf"], default="torch", help="(ours: %(default)s)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the backend torch runs (default %(default)s)")
    add("--out", type=Path, default=Path("crf.png"), metavar="FILE",
        help="gets image | before | after (default %(default)s)")
    args = parser.parse_args(argv)

    given = {name: getattr(args, name) for name in PRESETS[args.preset] if getattr(args, name) is not None}
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise BadInput("--device cuda: this PyTorch sees no CUDA GPU: give --device cpu")
        if not args.out.parent.is_dir() or args.out.is_dir():
            raise BadInput(f"--out {args.out}: expected the name of a file in a folder that exists")
        if args.out.exists() and any(args.out.samefile(path) for path in (args.image, args.probabilities)
                                     if Path(path).exists()):
            raise BadInput(f"--out {args.out}: is read from: give another name")
        if args.out.suffix.lower() != ".png":
            raise BadInput(f"--out {args.out}: expected the name of a .png file")
        image, probabilities = read_inputs(args.image, args.probabilities)
        start = time.perf_counter()
        try:
            before = as_tensor(probabilities).to(args.device)
            after = dense_crf(image, before, **PRESETS[args.preset] | given, iterations=args.iterations,
                              backend=args.backend).argmax(0).cpu().numpy()
        except BadInput as error:
            raise BadInput(f"{args.image}, {args.probabilities}: {error}") from None
    except BadInput as error:
        print(f"crf.py: {error}", file=sys.stderr)
        return 2
    seconds, before = time.perf_counter() - start, before.argmax(0).cpu().numpy()
    changed = 100 * (before != after).mean()
    panels = [panel(image, None, Path(args.image).name), panel(image, before, "before"),
              panel(image, after, f"after: {changed:.1f} % changed")]
    temporary = f"{args.out}.{os.getpid()}.tmp"
    try:
        Image.fromarray(np.hstack(panels)).save(temporary, "PNG")
        os.replace(temporary, args.out)
    except OSError as error:
        print(f"crf.py: --out {args.out}: cannot be written ({error.strerror}): make room, or give another place",
              file=sys.stderr)
        return 2
    print(f"{args.out}: {changed:.1f} % of the pixels changed their class, {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that a pipe's encoding lacks, on Windows
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("crf.py: interrupted", file=sys.stderr)
        sys.exit(130)
