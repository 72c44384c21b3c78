"""How fast is each stage? Every row is a ratio of two measurements taken by turns in one run.

    python tests/bench.py                                      all rows: minutes on a CPU, at the papers' sizes on a GPU
    python tests/bench.py step crf --repeat 9                  some of them
    python tests/bench.py --size paper --json bench.json       the papers' sizes wherever it runs; and a file

Rows    {names}
Reads   nothing: all images are drawn by toy_voc.py, in a temporary folder that goes away.
Writes  one table, and with --json a file with hardware, versions, date, command, and every single measurement.

A row's ratio is always ours / theirs, so a speed (.../s) should have a high one, a time or a size a low one. What is
compared runs by turns, A B A B ..., so that whatever else the machine does meets both; a ratio is taken within each
pair, and the table shows their median and the least and greatest. A busy machine shows in that spread. What has no
second side to take turns with is measured beside a fixed number, which the row names.
"""
import argparse
import contextlib
import datetime
import functools
import io
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.utils.flop_counter import FlopCounterMode

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER)]
import evaluate
import grabcut_labels
import losses
import mcg_candidates
import model
import toy_voc
import train_box2seg
import train_boxsup
from crf import dense_crf
from model import Box2SegNet, DeepLabVGG16, normalize, resized, to_cells

SIZES = {  # calls: of each side in a turn; images are of VOC's size, 375x500
    "small": dict(backbone="resnet18", boxsup="vgg16", crop=129, batch=8, boxsup_batch=8, pictures=12, calls=2,
                  affinity_sides=(16, 32, 64), reference_batch=2, ids=1_000_000),
    "paper": dict(backbone="resnet101", boxsup="vgg16", crop=321, batch=16, boxsup_batch=20, pictures=64, calls=10,
                  affinity_sides=(41, 81, 121), reference_batch=16, ids=1_000_000)}
CLASSES = 21                                            # VOC's; drawn data names 5 of them, the others never occur


# ----------------------------------------------------------------------------------------------------------------------
# measuring

def row(name, against, unit, ours, theirs, aim, note=""):
    """One line of the table. ours, theirs: what was measured, as many of each; the ratio is ours / theirs, by pairs."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"name": name, "against": against, "unit": unit, "ours": median(ours), "theirs": median(theirs),
            "ratio": median(ratios), "low": min(ratios), "high": max(ratios), "aim": aim, "note": note,
            "all_ours": list(ours), "all_theirs": list(theirs)}


def by_turns(c, *sides, calls=1, warm=2, clock=time.perf_counter):
    """Functions -> for each the list of its seconds a call, c.repeat of them, after `warm` rounds that do not count."""
    def seconds(side, calls):
        if c.device == "cuda":
            torch.cuda.synchronize()
        start = clock()
        for _ in range(calls):
            side()
        if c.device == "cuda":
            torch.cuda.synchronize()
        return (clock() - start) / calls

    for side in sides * warm:
        side()
    return list(zip(*([seconds(side, calls) for side in sides] for _ in range(c.repeat))))


def speed(items, seconds):
    return [items / s for s in seconds]


@contextlib.contextmanager
def one_core():
    """What is measured "on one core" runs with one thread of PyTorch and of OpenCV."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1), cv2.setNumThreads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before[0]), cv2.setNumThreads(before[1])


def peak_tensors(c, work):
    """Most bytes of tensors alive at a time in work(): CUDA's allocator, or on the CPU torch.profiler's profile_memory
    (tracemalloc does not see what torch allocates)."""
    if c.device == "cuda":
        work()                                          # what cuBLAS and cuDNN take once and keep is nobody's
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), default=0)


def resident(field):
    """VmRSS or VmHWM (the peak) of this process in bytes, from Linux's /proc."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status[field].split()[0])


def peak_resident(work):
    """By how many bytes this process is larger at the worst moment of work() than before. Linux."""
    Path("/proc/self/clear_refs").write_text("5")       # the peak starts anew
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def in_fresh_process(function, *arguments):
    """function(*arguments) in a process that has freed nothing yet, so that its size tells what it holds."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# ----------------------------------------------------------------------------------------------------------------------
# what is measured on: synthetic images, one random batch, one step

@functools.cache
def drawn(folder, count, height=375, width=500):
    """-> VOC2012 folder, ids: images with truth and boxes, under 21 class names."""
    voc = Path(toy_voc.make_toy_voc(folder / f"{height}x{width}", count, 0, (height, width)))
    names = toy_voc.CLASS_NAMES + [f"no{number}" for number in range(len(toy_voc.CLASS_NAMES), CLASSES)]
    (voc / "class_names.txt").write_text("\n".join(names) + "\n")
    return voc, mcg_candidates.read_list(voc / "ImageSets" / "Segmentation" / "train.txt")


def new_folder(c):
    return Path(tempfile.mkdtemp(dir=c.folder))


def autocast(c, amp=None):
    """c's own precision: bf16 on a GPU, float32 on the CPU; or amp's, "off", "bf16" or "fp16"."""
    amp = amp or ("bf16" if c.device == "cuda" else "off")
    return torch.autocast(c.device, torch.float16 if amp == "fp16" else torch.bfloat16, enabled=amp != "off")


def random_batch(c, size, crop):
    """-> images (N, crop, crop, 3), B, M (N, crop, crop), uint8: noise; three boxes an image, an ellipse in each."""
    rng = np.random.default_rng(0)
    B, M = np.zeros((2, size, crop, crop), np.uint8)
    for b, m in zip(B, M):
        for scale in (0.8, 0.5, 0.3):
            (w, h), kind = (scale * crop * rng.uniform(0.6, 1, 2)).astype(int), int(rng.integers(1, 6))
            x, y = int(rng.integers(crop - w)), int(rng.integers(crop - h))
            b[y:y + h, x:x + w] = kind
            cv2.ellipse(m, (int(x + w // 2), int(y + h // 2)), (int(w // 2), int(h // 2)), 0, 0, 360, kind, -1)
    images = rng.integers(0, 256, (size, crop, crop, 3), np.uint8)
    return [torch.from_numpy(t).to(c.device) for t in (images, B, M)]


def training_step(c, network, images, loss_of, amp=None, channels_last=True, compiled=False):
    """-> a function that makes one step of SGD as train_box2seg.py does. loss_of: the network's outputs -> loss."""
    network.to(c.device, memory_format=torch.channels_last if channels_last else torch.contiguous_format).train()
    model = torch.compile(network) if compiled else network
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(c.device, enabled=amp == "fp16")

    def step():
        x = normalize(images)                           # channels_last as it comes
        with autocast(c, amp):
            outputs = model(x if channels_last else x.contiguous())
        loss = loss_of(outputs)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return step


def box2seg_step(c, images, B, M, backbone=None, network=None, **options):
    """Three branches, all losses of Eq. 11, labels brought to the logits' grid: the step of train_box2seg.py."""
    generator = torch.Generator(c.device)

    def loss_of(outputs):
        logits, attention, beta = outputs
        b, m = to_cells(B, Box2SegNet), to_cells(M, Box2SegNet)
        generator.manual_seed(0)
        return losses.box2seg_loss(logits, attention.float().sigmoid(), beta, b, m, losses.pair_samples(m, CLASSES),
                                   generator=generator)[0]
    return training_step(c, network or Box2SegNet(CLASSES, backbone or c.backbone), images, loss_of, **options)


def plain_step(c, images, M):
    """The same network, the y branch and cross-entropy alone."""
    def loss_of(outputs):
        return losses.cross_entropy_loss(outputs[0], to_cells(M, Box2SegNet))
    return training_step(c, Box2SegNet(CLASSES, c.backbone, attention=False, embedding=False), images, loss_of)


def boxsup_network(c):
    network = (DeepLabVGG16(CLASSES) if c.boxsup == "vgg16" else
               Box2SegNet(CLASSES, c.boxsup, attention=False, embedding=False))
    return network.eval().to(c.device, memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------------------------------------
# rows: labels and candidates

def grabcut(c):
    """grabcut_labels.make_labels, all cores, against a plain loop: one thread, cv2.grabCut on the whole image with
    the box as its rectangle, 5 iterations, the box where that fails. Both read and write files. Aim: 5 times the boxes
    a second on 2 cores, and M (mIoU against the drawn truth) not worse."""
    voc, ids = drawn(c.folder, c.pictures)
    names, made = grabcut_labels.class_names(voc), []

    def ours():
        made.append(new_folder(c))
        grabcut_labels.make_labels(voc, ids, out=made[-1])

    plain = new_folder(c)

    @one_core()
    def theirs():
        for name in ids:
            image = grabcut_labels.read_image(voc / "JPEGImages" / f"{name}.jpg")
            boxes, classes = grabcut_labels.read_boxes(voc / "Annotations" / f"{name}.xml", names, image.shape[:2])
            mask = np.zeros(image.shape[:2], np.uint8)
            for k in grabcut_labels.larger_first(boxes):
                x0, y0, x1, y1 = boxes[k].tolist()
                state, rectangle = np.zeros_like(mask), (x0, y0, x1 - x0, y1 - y0)
                with contextlib.suppress(cv2.error):    # the box covers the image
                    cv2.grabCut(image, state, rectangle, np.zeros((1, 65)), np.zeros((1, 65)), 5, cv2.GC_INIT_WITH_RECT)
                found = state % 2 == 1
                if not found.any():
                    found[y0:y1, x0:x1] = True
                mask[found] = classes[k]
            grabcut_labels.write_label(plain / f"{name}.png", mask)

    def miou(folder):
        confusion = 0
        for name in ids:
            pair = [torch.from_numpy(grabcut_labels.read_label(f / f"{name}.png")) for f in
                    (folder, voc / "SegmentationClass")]
            confusion = confusion + losses.confusion_matrix(*pair, CLASSES)
        return losses.iou(confusion).nanmean().item()

    seconds = by_turns(c, ours, theirs, warm=0)
    boxes = sum(len(grabcut_labels.read_boxes(voc / "Annotations" / f"{name}.xml", names, (375, 500))[0])
                for name in ids)
    note = f"{boxes} boxes in {len(ids)} images, {os.cpu_count()} cores"
    return [row("grabcut", "serial whole-image", "boxes/s", *(speed(boxes, s) for s in seconds), ">= 5", note),
            row("grabcut M", "serial whole-image", "mIoU", [miou(made[-1] / "GrabCutMasks")], [miou(plain)], ">= 1")]


def candidates(c):
    """Each method of mcg_candidates.py: processor time an image, against 2 s; and images/s of 2 processes against 1,
    in make_candidates, from the moment when each has made its first. Aim: under 2 s of one core for 500x375, and
    near-linear in cores."""
    voc, ids = drawn(c.folder, c.pictures)
    rows = []
    for method, propose in mcg_candidates.METHODS.items():
        with one_core():
            seconds = []
            for name in ids[:max(4, c.repeat)]:
                image = mcg_candidates.read_image(voc / "JPEGImages" / f"{name}.jpg")
                start = time.process_time()
                propose(image)
                seconds.append(time.process_time() - start)
        rows.append(row(f"candidates {method}", "2 s of one core", "s/image", seconds, [2.0] * len(seconds), "<= 1",
                        "pairs are images, not repetitions"))

        def rate(workers):
            out = new_folder(c)
            mcg_candidates.make_candidates(voc, ids, out, method, workers)
            done = sorted(path.stat().st_mtime for path in out.glob("*.npz"))
            return (len(done) - workers) / (done[-1] - done[workers - 1])

        pairs = [(rate(2), rate(1)) for _ in range(c.repeat)]
        rows.append(row(f"candidates {method} x2", "1 process", "images/s", *zip(*pairs), ">= 1.8"))
    return rows


def stages(c):
    """MCG stage by stage against the plain loops that the tests hold each to (tests/test_mcg.py), on one core. On a
    image of a quarter of the sides: on a whole one the loops take minutes. The share of each stage in MCG's time on a
    whole image is below the table."""
    with one_core():                                    # which it sets for its tests
        import test_mcg                                 # here: it brings pytest
    ours = {name: getattr(mcg_candidates, name) for name in ("contour_strength", "descend", "spectral_strength",
                                                             "merge_tree", "fill_holes", "near_duplicates")}
    given, seconds = {}, dict.fromkeys(ours, 0.0)

    def watch(name, *arguments):
        given.setdefault(name, arguments)
        start = time.perf_counter()
        result = ours[name](*arguments)
        seconds[name] += time.perf_counter() - start
        return result

    voc, ids = drawn(c.folder, c.pictures)
    image = mcg_candidates.read_image(voc / "JPEGImages" / f"{ids[0]}.jpg")
    quarter = cv2.resize(image, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    try:
        for name in ours:
            setattr(mcg_candidates, name, functools.partial(watch, name))
        with one_core():
            mcg_candidates.mcg(image)
            given.clear()                               # and again, now that all is loaded
            seconds = dict.fromkeys(ours, 0.0)
            start = time.perf_counter()
            mcg_candidates.mcg(image)
            whole, shares = time.perf_counter() - start, dict(seconds)
            given.clear()
            mcg_candidates.mcg(quarter)
    finally:
        for name, function in ours.items():
            setattr(mcg_candidates, name, function)

    superpixels = ours["descend"](*given["descend"])
    members, areas = given["near_duplicates"]
    plain = {"contour_strength": lambda: test_mcg.naive_contours(quarter),
             "descend": lambda: test_mcg.walk(*given["descend"]),
             "merge_tree": lambda: test_mcg.naive_tree(*given["merge_tree"][:4]),
             "fill_holes": lambda: test_mcg.flood(given["fill_holes"][0], superpixels),
             "near_duplicates": lambda: test_mcg.one_by_one(members[:500], areas)}
    given["merge_tree"] = *given["merge_tree"][:4], (0, 0, 0)                       # no groups: the loop finds none
    given["near_duplicates"] = members[:500], areas
    with one_core():
        rows = [row(f"stages {name}", "a plain loop", "s", *by_turns(
            c, functools.partial(ours[name], *given[name]), loop, warm=1), "< 1") for name, loop in plain.items()]
    rows[0]["note"] = f"of {whole:.2f} s for a whole image: " + ", ".join(
        f"{name} {share / whole:.0%}" for name, share in shares.items()) + f"; {areas.size} superpixels in the quarter"
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# rows: BoxSup's label update

def costs(c):
    """losses.regression_cost of 2,000 candidates against Eq. 3 as printed, one full-size mask at a time (in the box's
    window only); and against one forward pass of BoxSup's network on the image. Aims: 50 times; under 10 %."""
    voc, ids = drawn(c.folder, c.pictures)
    read = {name: mcg_candidates.read_boxes(voc / "Annotations" / f"{name}.xml", mcg_candidates.class_names(voc),
                                            (375, 500)) for name in ids}
    name = max(ids, key=lambda name: len(read[name][0]))
    image = mcg_candidates.read_image(voc / "JPEGImages" / f"{name}.jpg")
    superpixels, members = mcg_candidates.mcg(image)
    members = members[np.arange(2000) % len(members)]   # over again where a drawn image has fewer
    boxes, classes, superpixels, members = (torch.from_numpy(a).to(c.device) for a in
                                            (*read[name], superpixels, members))
    network, pixels = boxsup_network(c), torch.from_numpy(image)
    results = {}

    @torch.inference_mode()
    def forward():
        with autocast(c):
            results["logits"] = train_boxsup.full_size_logits(network, pixels, 1.0)

    @torch.inference_mode()
    def ours():
        results["ours"] = losses.regression_cost(results["logits"], superpixels, members, boxes, classes)

    @torch.inference_mode()
    def dense():
        log_y, K = results["logits"].log_softmax(0), len(boxes)
        windows, kinds = [np.s_[y0:y1, x0:x1] for x0, y0, x1, y1 in boxes.tolist()], classes.tolist()
        owner = torch.full_like(superpixels, -1)        # of a pixel in several boxes: the smallest
        for k in mcg_candidates.larger_first(read[name][0]):
            owner[windows[k]] = k
        cost = torch.empty(K, len(members), device=c.device)
        for n in range(len(members)):
            mask = members[n][superpixels]                                          # (H, W)
            for k, window in enumerate(windows):
                e = -torch.where(mask[window], log_y[kinds[k]][window], log_y[0][window])
                cost[k, n] = (e * (owner[window] == k)).sum() / mask.numel()
        results["dense"] = cost

    forward()
    fast, slow = by_turns(c, ours, dense, warm=1)
    gap = (results["ours"] - results["dense"]).abs().max().item()
    cost, network_time = by_turns(c, ours, forward)
    note = f"{len(boxes)} boxes, {members.shape[1]} superpixels, largest difference {gap:.1e}"
    return [row("costs", "dense masks", "images/s", speed(1, fast), speed(1, slow), ">= 50", note),
            row("costs share", f"forward, {c.boxsup}", "s", cost, network_time, "<= 0.1")]


def update(c):
    """train_boxsup.update_labels: its time outside the forward pass (reading, costs, choice, painting, writing) against
    forward passes alone on the same images. Aim: the costs under 10 % of the forward pass (row "costs share"); here
    is all the rest, too."""
    voc, ids = drawn(c.folder, c.pictures)
    out = new_folder(c)
    mcg_candidates.make_candidates(voc, ids, out / "candidates")
    (out / "masks").mkdir()
    images = train_boxsup.Images(voc)
    images.add(ids, voc / "JPEGImages", out / "candidates", out / "masks")
    indices = range(len(ids))
    pixels = [torch.from_numpy(mcg_candidates.read_image(voc / "JPEGImages" / f"{name}.jpg")) for name in ids]
    network = boxsup_network(c)
    args = argparse.Namespace(workers=min(8, os.cpu_count()), val_scale=1.0, lambda_r=3.0, min_recognized=0.3, top_k=5,
                              seed=0)

    def whole():
        train_boxsup.update_labels(network, images, indices, {}, 1, args, CLASSES, [])

    @torch.inference_mode()
    def forward():
        for index in indices:
            train_boxsup.full_size_logits(network, pixels[index], 1.0)

    both, alone = by_turns(c, whole, forward, warm=1)
    return row("update", f"forward, {c.boxsup}", "s/image", [(b - a) / len(indices) for b, a in zip(both, alone)],
               [a / len(indices) for a in alone], "<= 0.1", "ours: all but the forward pass")


# ----------------------------------------------------------------------------------------------------------------------
# rows: Box2Seg's step

def step(c):
    """Box2Seg's step, three branches and all losses, against the same network with the y branch and cross-entropy
    alone: time and peak memory, weights included. Aim: at most 1.25 times the time, 1.3 times the memory."""
    images, B, M = random_batch(c, c.batch, c.crop)
    seconds = by_turns(c, box2seg_step(c, images, B, M), plain_step(c, images, M), calls=c.calls)

    def peak(make, *data):                              # one network at a time; the second step has SGD's momentum too
        def work():
            one = make(c, *data)
            one(), one()
        return [peak_tensors(c, work) / 2 ** 20]

    against, size = "y and L_GC alone", f"{c.backbone}, {c.batch} crops of {c.crop}"
    return [row("step", against, "s", *seconds, "<= 1.25", f"{size}: {c.batch / median(seconds[0]):.1f} images/s"),
            row("step memory", against, "MiB", peak(box2seg_step, images, B, M), peak(plain_step, images, M), "<= 1.3",
                "CUDA's allocator" if c.device == "cuda" else "torch.profiler")]


def reference(c):
    """Box2Seg's step on ResNet-101 against other people's networks with the same encoder, cross-entropy at the size at
    which each gives its logits, same batch and precision: torchvision's DeepLab v3 (without its auxiliary head), and
    segmentation-models-pytorch's UPerNet if installed (it takes multiples of 32 only). Aim: faster than both."""
    crop = c.crop // 32 * 32
    images, B, M = random_batch(c, c.reference_batch, crop)
    ours = box2seg_step(c, images, B, M, backbone="resnet101")
    deeplab = torchvision.models.segmentation.deeplabv3_resnet101(weights=None, weights_backbone=None,
                                                                  num_classes=CLASSES)
    theirs = {"DeepLab v3": training_step(c, deeplab, images, lambda out: losses.cross_entropy_loss(out["out"], M))}
    try:
        import segmentation_models_pytorch as smp
        upernet = smp.UPerNet("resnet101", encoder_weights=None, classes=CLASSES)
        theirs["smp UPerNet"] = training_step(c, upernet, images, lambda out: losses.cross_entropy_loss(out, M))
    except ImportError:
        pass
    ours, *others = by_turns(c, ours, *theirs.values(), calls=c.calls)
    note = f"ResNet-101, {len(images)} crops of {crop}" + (
        "; smp UPerNet: not installed" if len(theirs) == 1 else f"; smp {smp.__version__}")
    return [row("reference", name, "s", ours, other, "< 1", note) for name, other in zip(theirs, others)]


def encoders(c):
    """Box2Seg's step, all losses, with EfficientNet-Lite0 as the recipe "photos" trains it (8 crops of 193, BatchNorm
    of the encoder frozen), against the same step with ResNet-18 and ResNet-101. CPU: processor time, one thread."""
    images, B, M = random_batch(c, 8, 193)
    networks = {name: Box2SegNet(CLASSES, name) for name in ("efficientnet_lite0", "resnet18", "resnet101")}
    networks["efficientnet_lite0"].freeze_batch_norm()
    with one_core():
        lite, *others = by_turns(c, *(box2seg_step(c, images, B, M, network=n) for n in networks.values()), warm=1,
                                 clock=time.perf_counter if c.device == "cuda" else time.process_time)
    count = ", ".join(f"{name} {sum(p.numel() for p in n.parameters()) / 1e6:.1f} M (encoder "
                      f"{sum(p.numel() for p in n.encoder.parameters()) / 1e6:.1f} M)" for name, n in networks.items())
    return [row("encoders lite0", name, "s", lite, other, "< 1", f"parameters: {count}")
            for name, other in zip(list(networks)[1:], others)]


def affinity(c):
    """losses.affinity_loss, forward and backward, for growing m, against building the m x m matrix of all pairs: peak
    memory and time. Then ours at the largest m against ours at the smallest, memory a pixel. Aim: flat."""
    rows, a_pixel = [], []
    for side in c.affinity_sides:
        m = side * side
        beta = torch.randn(2, 64, side, side, device=c.device, requires_grad=True)
        labels = torch.arange(m, device=c.device).view(1, side, side).expand(2, -1, -1) // (m // 5 + 1)    # 5 classes
        one_hot = F.one_hot(labels, CLASSES).permute(0, 3, 1, 2).float()
        draws = losses.pair_samples(labels, CLASSES)

        def ours():
            losses.affinity_loss(beta, one_hot, labels, draws).backward()

        def matrix():
            e, y = (t.flatten(2).transpose(1, 2) for t in (beta, one_hot))                          # (N, m, d)
            squared = (losses.affinity(e, e) - y @ y.transpose(1, 2)).square()                      # (N, m, m)
            ((squared.sum((1, 2)) - squared.diagonal(dim1=1, dim2=2).sum(1)) / (m * m - m)).mean().backward()

        memory = [[peak_tensors(c, work) / 2 ** 20] for work in (ours, matrix)]
        a_pixel.append(memory[0][0] * 2 ** 20 / (2 * m))
        rows += [row(f"affinity m={m} memory", "m x m matrix", "MiB", *memory, "< 1"),
                 row(f"affinity m={m}", "m x m matrix", "s", *by_turns(c, ours, matrix), "< 1")]
    how = "CUDA's allocator" if c.device == "cuda" else "torch.profiler"
    return rows + [row("affinity growth", "at the smallest m", "bytes/pixel", a_pixel[-1:], a_pixel[:1], "<= 1",
                       f"batch of 2, d = 64, embeddings and gradient apart; {how}")]


def full(c):
    """A step of each training (Box2Seg with all losses; BoxSup's network, cross-entropy) in floating point operations a
    second, against one large product of matrices of the same precision: the share of what the machine can do at best.
    From its images/s the hours of the papers' schedules: 10,582 images, 45 epochs of Box2Seg (5 of them stage 1, here
    as if they cost as much) and 45 of BoxSup, without validation, BoxSup's label updates (row update) and waiting."""
    side = 8192 if c.device == "cuda" else 2048
    a = torch.randn(side, side, device=c.device)

    def product():
        with autocast(c):
            a @ a

    def plain(logits):
        return losses.cross_entropy_loss(logits, to_cells(labels, boxsup))

    images, B, M = random_batch(c, c.batch, c.crop)
    pictures, _, labels = random_batch(c, c.boxsup_batch, c.crop)
    boxsup = boxsup_network(c)
    steps = {"Box2Seg": (c.backbone, c.batch, box2seg_step(c, images, B, M)),
             "BoxSup": (c.boxsup, c.boxsup_batch, training_step(
                 c, boxsup, pictures, lambda out: plain(out[0] if isinstance(out, tuple) else out)))}
    rows = []
    for name, (backbone, batch, one) in steps.items():
        one()                                           # cuDNN has made its choices, SGD its momentum
        with FlopCounterMode(display=False) as counter:
            one()
        if c.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds, base = by_turns(c, one, product, calls=c.calls)
        rate = batch / median(seconds)
        memory = f", {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB" if c.device == "cuda" else ""
        note = (f"{backbone}, {batch} crops of {c.crop}{memory}: {rate:.1f} images/s, {10582 * 45 / rate / 3600:.1f} "
                "hours for 45 epochs of 10,582 images")
        rows.append(row(f"full {name}", "a matrix product", "TFLOP/s",
                        [counter.get_total_flops() / s / 1e12 for s in seconds],
                        [2 * side ** 3 / s / 1e12 for s in base], "-", note))
    return rows


def amp(c):
    """Box2Seg's step in other precisions and layouts, and compiled, against float32, contiguous, eager (TF32 as PyTorch
    sets it: in convolutions only). On a CPU bf16 only. Aim: shown on a GPU; 2 times or more."""
    variants = {"bf16": dict(amp="bf16", channels_last=False)}
    if c.device == "cuda":
        variants |= {"channels_last": dict(amp="off"), "fp16": dict(amp="fp16", channels_last=False),
                     "bf16 channels_last": dict(amp="bf16"), "fp16 channels_last": dict(amp="fp16"),
                     "bf16 channels_last compile": dict(amp="bf16", compiled=True)}
    images, B, M = random_batch(c, c.batch, c.crop)
    rows = []
    for name, options in variants.items():
        seconds = by_turns(c, box2seg_step(c, images, B, M, **options),
                           box2seg_step(c, images, B, M, amp="off", channels_last=False), calls=c.calls)
        rows.append(row(f"amp {name}", "float32 eager", "images/s", *(speed(c.batch, s) for s in seconds), ">= 2"))
    return rows


def input_(c):
    """train_box2seg.Crops on one core (decode, scale, flip, crop, colour, B and M) against what Box2Seg's step takes:
    1 / ratio is how many cores feed one step. Then a run of steps behind a DataLoader as in training: the time spent
    waiting for data against the whole. Aim: near nothing."""
    voc, ids = drawn(c.folder, c.pictures)
    grabcut_labels.make_labels(voc, ids)
    crops = train_box2seg.Crops(voc, voc, ["boxes", "grabcut"], ids, CLASSES, c.crop, (0.5, 2.0), 0.3, 0)
    keys = itertools.count()
    one_step = box2seg_step(c, *random_batch(c, c.batch, c.crop))

    @one_core()
    def draw():
        for _ in range(c.batch):
            crops[divmod(next(keys), len(ids))]

    seconds = by_turns(c, draw, one_step, calls=c.calls)
    rows = [row("input", "the step's appetite", "images/s", *(speed(c.batch, s) for s in seconds), ">= 1 / cores")]

    waits, steps = [], 5 * c.calls
    for _ in range(c.repeat):
        loader = iter(torch.utils.data.DataLoader(
            crops, batch_sampler=model.batches(len(ids), c.batch, 1, 0, steps + 1, 0, 1),
            num_workers=min(8, os.cpu_count()), worker_init_fn=model.quiet_worker,
            pin_memory=c.device == "cuda", generator=torch.Generator()))
        next(loader)                                    # the workers have started
        start, waited = time.perf_counter(), 0.0
        for _ in range(steps):
            clock = time.perf_counter()
            next(loader)
            waited += time.perf_counter() - clock
            one_step()
            if c.device == "cuda":
                torch.cuda.synchronize()
        waits.append((waited, time.perf_counter() - start))
    return rows + [row("input wait", "the whole run", "s", *zip(*waits), "<= 0.05",
                       f"{steps} steps, {min(8, os.cpu_count())} workers")]


# ----------------------------------------------------------------------------------------------------------------------
# rows: test time

def evaluation(c):
    """evaluate.py's loop (read, forward, upsample, argmax, score) against the forward passes alone on images that are
    on the device; with three scales; with three scales and the CRF (on a CPU in processes, whose start counts). Aim: at
    most 20 % over it without CRF."""
    voc, ids = drawn(c.folder, c.pictures)
    names = evaluate.class_names(voc)
    network = Box2SegNet(CLASSES, c.backbone).eval().to(c.device, memory_format=torch.channels_last)
    pixels = [normalize(torch.from_numpy(evaluate.read_image(voc / "JPEGImages" / f"{name}.jpg"))[None].to(c.device))
              for name in ids]
    loader = evaluate.load_checkpoint
    evaluate.load_checkpoint = lambda *_: (network, names)                          # once is enough: time the loop

    def row_of(name, aim, scales, *options):
        views = [[resized(x, s, network) for s in scales] for x in pixels]

        def loop():
            with contextlib.redirect_stdout(io.StringIO()):
                status = evaluate.main(["--data", str(voc), "--checkpoint", "-", "--split", "train", "--device",
                                        c.device, "--scales", *map(str, scales), *options])
            if status:
                raise RuntimeError(f"evaluate.py ended with status {status}")

        @torch.inference_mode()
        def forward():
            for view in itertools.chain(*views):
                with autocast(c):
                    network(view)

        seconds = by_turns(c, loop, forward, warm=1)
        return row(name, "forward alone", "s/image", *([t / len(ids) for t in s] for s in seconds), aim)

    try:
        return [row_of("evaluation", "<= 1.2", [1.0]), row_of("evaluation scales", "<= 1.2", [0.8, 1.0, 1.2]),
                row_of("evaluation crf", "-", [0.8, 1.0, 1.2], "--crf")]
    finally:
        evaluate.load_checkpoint = loader


def crf_memory(image, probabilities, backend):
    with one_core():
        return peak_resident(lambda: dense_crf(image, probabilities, backend=backend)) / 2 ** 20


def crf(c):
    """The dense CRF's backend torch (on a GPU where there is one, otherwise on one core) against pydensecrf (one core):
    an image of 500x375, 21 classes, 10 iterations. Aim: as fast on the CPU, 20 times on a GPU."""
    voc, ids = drawn(c.folder, c.pictures)
    image = evaluate.read_image(voc / "JPEGImages" / f"{ids[0]}.jpg")
    coarse = torch.randn(1, CLASSES, 12, 16, generator=torch.Generator().manual_seed(0))
    probabilities = F.interpolate(4 * coarse, image.shape[:2], mode="bicubic")[0].softmax(0)
    there = probabilities.to(c.device)
    sides = [lambda: dense_crf(image, there), lambda: dense_crf(image, probabilities, backend="pydensecrf")]
    try:
        import pydensecrf.densecrf  # noqa: F401
        against = "pydensecrf"
    except ImportError:
        against, sides = "1 s: no pydensecrf here", sides[:1]
    with one_core():
        ours, *theirs = by_turns(c, *sides, warm=1)
    rows = [row("crf", against, "s", ours, theirs[0] if theirs else [1.0] * len(ours),
                "<= 0.05" if c.device == "cuda" else "<= 1")]
    if theirs:
        ours, theirs = (in_fresh_process(crf_memory, image, probabilities.numpy(), b) for b in ("torch", "pydensecrf"))
        rows.append(row("crf memory, CPU", against, "MiB", [ours], [theirs], "-", "resident, in a fresh process each"))
    if c.device == "cuda":
        rows[0]["note"] = f"peak memory {peak_tensors(c, sides[0]) / 2 ** 20:.0f} MiB, CUDA's allocator"
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# rows: scale

def record_curve(file, argv):
    """train_box2seg.py with these arguments, its loss of every step, mean over processes, written to a file. Batch norm
    keeps to its running statistics: in training each process has those of its own share (but for --sync-bn)."""
    torch.nn.BatchNorm2d.train = lambda module, mode=True: torch.nn.Module.train(module, False)
    curve, box2seg_loss = [], losses.box2seg_loss

    def recorded(*args, **options):
        loss, terms = box2seg_loss(*args, **options)
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        curve.append(mean.item())
        return loss, terms

    losses.box2seg_loss = recorded
    status = train_box2seg.main(argv)
    if os.environ.get("RANK", "0") == "0":
        Path(file).write_text(json.dumps(curve))
    return status


def torchrun(c):
    """train_box2seg.py under torchrun with 2 processes against 1 process, equal total batch: the loss, step by step.
    Only what does not depend on the share of the batch that a process has: no drawn pixels (--loss aw-fr), no padding
    (--scale 2 2), batch norm held. Two GPUs where there are, otherwise the CPU. Aim: the same, to rounding."""
    voc, _ = drawn(c.folder, 32, 120, 160)
    options = ["--data", voc, "--recipe", "small", "--loss", "aw-fr", "--scale", "2", "2", "--epochs", "3",
               "--val-split", "none", "--workers", "0", "--amp", "off", "--lr", "0.001", "--device",
               "cuda" if torch.cuda.device_count() > 1 else "cpu"]
    curves = []
    for launcher in (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], []):
        file = new_folder(c) / "curve.json"
        subprocess.run([sys.executable, *launcher, __file__, "curve", file, *options, "--out", file.parent / "run"],
                       check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        curves.append(json.loads(file.read_text()))
    worst = max(abs(a / b - 1) for a, b in zip(*curves))
    return row("torchrun", "1 process", "loss", *curves, "1", f"{len(curves[0])} steps, largest relative difference "
               f"{worst:.1e}; theirs falls from {curves[1][0]:.3f} to {curves[1][-1]:.3f}; pairs are steps")


class NoWork:
    """Stands in for a pool of workers: every job is done at once, with this result."""
    result = None

    def __init__(self, *_, **__):
        pass

    def submit(self, *_):
        job = Future()
        job.set_result(self.result)
        return job

    def shutdown(self, **_):
        pass


def bookkeeping(kind, count):
    """-> bytes an image by which the process grows, at its worst, in one stage's bookkeeping over a list of `count`."""
    make_ids = lambda: [f"2008_{number:09d}" for number in range(count)]
    ids = make_ids()
    folder = Path(tempfile.mkdtemp())
    (folder / "JPEGImages").mkdir()

    def work():
        if kind == "the list":                          # what is there before any of our code runs
            return make_ids()
        if kind == "Images":
            images = train_boxsup.Images(folder)
            images.add(ids, folder, folder, folder)
        if kind == "batches":
            for _ in model.batches(count, 20, 0, 0, count // 20, 0, 1):
                pass
        if kind == "choices":                           # what update_labels() returns, three boxes an image
            return {index: np.zeros(3, np.int32) for index in range(count)}
        if kind == "make_candidates":
            NoWork.result, mcg_candidates.ProcessPoolExecutor = (1, 1, []), NoWork
            mcg_candidates.make_candidates(folder, ids)
        if kind == "make_labels":
            NoWork.result, grabcut_labels.ThreadPoolExecutor = ([1], [None]), NoWork
            grabcut_labels.make_labels(folder, ids)
    try:
        return peak_resident(work) / count
    finally:
        shutil.rmtree(folder)


def stream(c):
    """What each stage holds of a synthetic list of a million ids, all work but the bookkeeping left out: how much the
    process grows at its worst, a fresh process each, against the list of ids itself. Linux. Aim: nothing but a few
    words an image."""
    list_itself = in_fresh_process(bookkeeping, "the list", c.ids)
    return [row(f"stream {kind}", "the list of ids", "bytes/image", [in_fresh_process(bookkeeping, kind, c.ids)],
                [list_itself], "<= 1", f"{c.ids:,} ids")
            for kind in ("Images", "batches", "choices", "make_candidates", "make_labels")]


ROWS = {function.__name__.rstrip("_"): function for function in (
    grabcut, candidates, stages, costs, update, step, encoders, reference, full, affinity, amp, input_, evaluation, crf,
    torchrun, stream)}


# ----------------------------------------------------------------------------------------------------------------------
# the table and the file

def machine():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def table(rows):
    number = lambda x: f"{x:.4g}" if abs(x) < 1e5 else f"{x:.0f}"
    head = ["row", "against", "ours", "theirs", "ours / theirs", "least .. greatest", "aim", "unit"]
    cells = [head] + [[r["name"], r["against"], number(r["ours"]), number(r["theirs"]), number(r["ratio"]),
                       f"{number(r['low'])} .. {number(r['high'])}", r["aim"], r["unit"]] for r in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], ""] +
                     [f"{r['name']}: {r['note']}" for r in rows if r["note"]])


def main(argv):
    if argv[:1] == ["curve"]:                           # this file again, as the training that torchrun() looks at
        return record_curve(argv[1], argv[2:])
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description=__doc__.format(names=" ".join(ROWS)))
    parser.add_argument("rows", nargs="*", metavar="NAME", help="rows to run (default: all)")
    parser.add_argument("--size", choices=list(SIZES), default="paper" if torch.cuda.is_available() else "small",
                        help="of networks, crops, batches (default here: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all that was measured")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="turns (default: %(default)s)")
    args = parser.parse_args(argv)
    for name in args.rows:
        if name not in ROWS:
            parser.error(f"no row {name}: there are {' '.join(ROWS)}")
    if args.repeat < 1:
        parser.error("--repeat must be at least 1")

    torch.backends.cudnn.benchmark = True               # as in training: all crops are of one size
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        c = argparse.Namespace(**SIZES[args.size], repeat=args.repeat, folder=Path(folder),
                               device="cuda" if torch.cuda.is_available() else "cpu")
        for name in args.rows or ROWS:
            start = time.time()
            if c.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                result = ROWS[name](c)
            except Exception as error:                  # one row that fails does not take the others with it
                failed.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
                print(failed[-1], file=sys.stderr)
                continue
            result = result if isinstance(result, list) else [result]
            memory = ""
            if c.device == "cuda":                      # both sides together, and since the last reset
                for record in result:
                    record["gpu_peak_mib"] = torch.cuda.max_memory_allocated() / 2 ** 20
                memory = f", at most {torch.cuda.max_memory_allocated() / 2 ** 20:.0f} MiB of the GPU"
                torch.cuda.empty_cache()
            rows += result
            print(f"{name}: measured in {time.time() - start:.0f} s{memory}", table(result), sep="\n", end="\n\n",
                  file=sys.stderr, flush=True)

    hardware = machine()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
                "numpy": np.__version__, "opencv": cv2.__version__}
    print(f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads, GPU: {hardware['gpu']}; size "
          f"{args.size}; " + ", ".join(f"{key} {value}" for key, value in versions.items()), table(rows), sep="\n\n")
    if args.json:
        report = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                  "command": " ".join(["python tests/bench.py", *argv]), "size": args.size, "hardware": hardware,
                  "versions": versions, "rows": rows, "failed": failed}
        temporary = Path(f"{args.json}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(temporary, args.json)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
