"""
A toy VOC devkit, drawn: textured shapes of five classes on clutter, with exact masks and boxes.

Neither paper uses synthetic images. This is what lets a newcomer, and every test, run both papers' whole pipelines
within minutes and without a download. The images are made so that boxes and GrabCut go wrong here in the ways
that the Box2Seg paper describes for photographs:

    fill rates differ by class (Sect. 3.2, Fig. 2)  a ball fills its box, a moon, a star or a leaf does not
    label noise is one-sided in boxes (Sect. 1)     so a plain box is much worse than GrabCut
    GrabCut errs (Sect. 3.1)                        two-coloured balls lose a half where it looks like the background,
                                                    and every fourth object is camouflaged: mixed with the colours
                                                    that it lies on. Which objects are hit is chance, so a network
                                                    that sees many images can do better than its labels
    smaller boxes painted last err (Fig. 8a)        mostly the smaller object is in front, but not always
    clutter                                         polygons, bands and lines that are no object, in any colour

Run:    python tests/toy_voc.py toy/VOCdevkit
Reads:  nothing
Writes: toy/VOCdevkit/VOC2012/
            JPEGImages/*.jpg                        quality 95
            Annotations/*.xml                       VOC's form: 1-based inclusive boxes of what is visible
            SegmentationClass/*.png                 palette PNG, class index per pixel, 255 = ignore (see `void` below)
            SegmentationObject/*.png                the same with 1, 2, ... for the XML's first, second, ... object
            ImageSets/Segmentation/{train,val,trainval}.txt
            class_names.txt                         background, ball, moon, star, cross, leaf
Expect: 480 images to train on and 120 to validate, 120x160 pixels, in a few seconds. The same seed gives the same
        bytes on the same machine; an image does not change with the number of images.
"""
import argparse
import colorsys
import os
import sys
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

CLASS_NAMES = ["background", "ball", "moon", "star", "cross", "leaf"]
HUES = {"ball": 0.02, "moon": 0.85, "star": 0.13, "cross": 0.58, "leaf": 0.33}      # loose: +- 0.07 around each
SUPERSAMPLE = 4                                         # outlines are filled at 4x and averaged: anti-aliased edges


# ----------------------------------------------------------------------------------------------------------------------
# shapes and textures, in the object's own coordinates: (u, v) in about [-1, 1] x [-1, 1]

def outline(name):
    """The closed outline of a class: (points, 2)."""
    if name == "ball":
        t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
        return 0.95 * np.stack([np.cos(t), np.sin(t)], axis=1)
    if name == "moon":                                  # a circle, bitten by another one of radius r at (d, 0)
        d, r = 0.46, 0.8
        x = (1 + d * d - r * r) / (2 * d)               # where the two circles meet
        outer, inner = np.arccos(x), np.arccos((x - d) / r)
        s, t = np.linspace(outer, 2 * np.pi - outer, 60), np.linspace(2 * np.pi - inner, inner, 40)
        return np.concatenate([np.stack([np.cos(s), np.sin(s)], axis=1),
                               np.stack([d + r * np.cos(t), r * np.sin(t)], axis=1)])
    if name == "star":
        t = np.arange(10) * np.pi / 5
        r = np.where(np.arange(10) % 2 == 0, 1.05, 0.44)
        return np.stack([r * np.sin(t), -r * np.cos(t)], axis=1)
    if name == "cross":
        a, b = 1.0, 0.27
        return np.array([(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b),
                         (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)])
    if name == "leaf":                                                              # a lens: two sine arcs
        t = np.linspace(-1, 1, 40)
        w = 0.3 * np.cos(t * np.pi / 2) ** 0.8
        return np.concatenate([np.stack([1.25 * t, w], axis=1), np.stack([-1.25 * t, -w], axis=1)])
    raise ValueError(f"no such class: {name}")


def pattern(name, u, v, noise):
    """How much of the second colour each pixel takes, 0..1. (H, W) each."""
    soft = lambda x, edge: np.clip(x / edge + 0.5, 0, 1)                            # a step with a smooth edge
    if name == "ball":                                                              # two halves and a dark seam
        return soft(v, 0.08)
    if name == "moon":                                                              # craters
        return soft(noise - 0.9, 0.35)
    if name == "star":                                                              # a bright core
        return soft(0.5 - np.hypot(u, v), 0.5)
    if name == "cross":                                                             # stripes
        return soft(np.sin(11 * (u + v)), 0.7)
    if name == "leaf":                                                              # a midrib and side veins
        return np.maximum(soft(0.05 - np.abs(v), 0.05), 0.8 * soft(np.sin(14 * (u - 1.2 * np.abs(v))) - 0.6, 0.5))
    raise ValueError(f"no such class: {name}")


def colours(name, under, rng):
    """The two colours of one object, RGB 0..255; `under` is the mean colour of what it covers."""
    hsv = lambda h, s, v: 255 * np.array(colorsys.hsv_to_rgb(h % 1, s, v))
    hue = HUES[name] + rng.uniform(-0.07, 0.07)
    first = hsv(hue, rng.uniform(0.55, 0.95), rng.uniform(0.6, 0.95))
    if name == "ball":                                  # the lower half is pale, dark, or near what lies behind it
        pale, dark = hsv(rng.random(), 0.12, 0.92), hsv(rng.random(), 0.3, 0.25)
        second = [pale, dark, under * rng.uniform(0.85, 1.15)][rng.integers(3)]
    elif name == "moon":
        second = hsv(hue, 0.2, 1.0)
    elif name == "cross":
        second = hsv(hue + rng.uniform(-0.1, 0.1), 0.25, 0.95)
    else:
        second = hsv(hue + rng.uniform(-0.05, 0.05), rng.uniform(0.2, 0.5), 1.0)
    return first, second


# ----------------------------------------------------------------------------------------------------------------------
# one image

def smooth_noise(rng, height, width, cell):
    """Noise of about unit variance whose blobs are `cell` pixels wide: (H, W)."""
    grid = rng.standard_normal((height // cell + 3, width // cell + 3), np.float32)
    big = cv2.resize(grid, (grid.shape[1] * cell, grid.shape[0] * cell), interpolation=cv2.INTER_CUBIC)
    return big[cell:cell + height, cell:cell + width]


def coverage(polygon, height, width):
    """Which part of each pixel lies inside the polygon (points, 2) in pixel coordinates: (H, W), 0..1."""
    canvas = np.zeros((height * SUPERSAMPLE, width * SUPERSAMPLE), np.uint8)
    # fillPoly's integer coordinates are sample centres, and it takes 4 further bits below the point
    points = np.round((polygon * SUPERSAMPLE - 0.5) * 16).astype(np.int32)
    cv2.fillPoly(canvas, [points], 255, cv2.LINE_8, 4)
    return cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def paint(picture, alpha, colour):
    """Colour over image where alpha says so, in place. (H, W, 3), (H, W), (3,) or (H, W, 3)."""
    picture += alpha[..., None] * (np.asarray(colour, np.float32) - picture)


def draw_background(rng, height, width):
    """Clutter without any object: (H, W, 3) float32 RGB."""
    hue = rng.random()
    palette = [255 * np.array(colorsys.hsv_to_rgb((hue + rng.normal(0, 0.1)) % 1, rng.uniform(0.1, 0.55),
                                                  rng.uniform(0.25, 0.9)), np.float32) for _ in range(3)]
    picture = np.empty((height, width, 3), np.float32)
    picture[:] = palette[0]
    side = min(height, width)
    for colour, cell in zip(palette[1:], (max(4, side // 3), max(2, side // 10))):
        paint(picture, 1 / (1 + np.exp(-2.5 * smooth_noise(rng, height, width, cell))), colour)

    for _ in range(rng.integers(3, 8)):                 # distractors: irregular polygons, bands, lines
        colour = 255 * np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.1, 0.8), rng.uniform(0.2, 0.95)))
        centre = rng.uniform(0, 1, 2) * (width, height)
        kind = rng.integers(3)
        if kind == 0:
            t = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(4, 8)))
            r = side * rng.uniform(0.06, 0.26, len(t))[:, None]
            polygon = centre + r * np.stack([np.cos(t), np.sin(t)], axis=1)
        else:
            t = rng.uniform(0, np.pi)
            length, thickness = (2 * max(height, width), rng.uniform(0.03, 0.1)) if kind == 1 else (
                side * rng.uniform(0.2, 0.5), 0.015)
            along = np.array([np.cos(t), np.sin(t)]) * length
            across = np.array([-np.sin(t), np.cos(t)]) * thickness * side
            polygon = centre + np.stack([along + across, along - across, -along - across, -along + across])
        paint(picture, coverage(polygon, height, width) * rng.uniform(0.45, 0.95), colour)
    grain = smooth_noise(rng, height, width, 2) * rng.uniform(5, 14)
    return np.clip(picture + grain[..., None], 0, 255)


def draw_picture(rng, height, width):
    """One image.

    Returns the image (H, W, 3) uint8 RGB, the owner of each pixel (H, W) uint8 (0 background, k the k-th object) and
    the objects: a list of dicts with the class index and whether it is cut by the edge, camouflaged, partly hidden.
    """
    picture = draw_background(rng, height, width)
    owner = np.zeros((height, width), np.uint8)
    objects = []
    side = min(height, width)
    light = rng.uniform(0, 2 * np.pi)                   # one lamp for the image: shading and shadows agree

    radii = np.sort(side * rng.uniform(0.13, 0.34, rng.choice([1, 2, 3, 4], p=[0.25, 0.35, 0.25, 0.15])))
    if rng.random() < 0.8:                              # later ones are painted over earlier ones: the smaller in front
        radii = radii[::-1]
    for radius in radii:
        index = int(rng.integers(1, len(CLASS_NAMES)))
        name = CLASS_NAMES[index]
        for _ in range(10):                             # look for a place that leaves the others at least half visible
            angle = np.deg2rad(rng.uniform(-30, 30))
            if name == "leaf":                          # a diagonal blade: the lowest fill rate
                angle += np.deg2rad(rng.choice([45, 135, 225, 315]))
            stretch = rng.uniform(0.85, 1.15)
            # (u, v) -> pixels: stretch, turn, scale, move. All work happens in a window around the object.
            centre = rng.uniform(-0.05, 1.05, 2) * (width, height)
            x0, y0 = np.clip(np.floor(centre - 1.5 * radius), 0, (width - 1, height - 1)).astype(int)
            x1, y1 = np.clip(np.ceil(centre + 1.5 * radius), (x0 + 1, y0 + 1), (width, height)).astype(int)
            window = np.s_[y0:y1, x0:x1]
            turn = radius * np.array([[np.cos(angle), -np.sin(angle)],
                                      [np.sin(angle), np.cos(angle)]]) * (stretch, 1 / stretch)
            polygon = outline(name) @ turn.T + (centre - (x0, y0))
            alpha = coverage(polygon, y1 - y0, x1 - x0)                             # (h, w) of the window
            mask = alpha >= 0.5
            inside = mask.sum() / cv2.contourArea(polygon.astype(np.float32))       # which part lies in the image
            left = [other["area"] - np.sum(mask & (owner[window] == k)) for k, other in enumerate(objects, 1)]
            if inside > 0.55 and all(n > 0.5 * other["whole"] for n, other in zip(left, objects)):
                break
        else:
            continue                                    # no room

        under = picture[window]                                                     # (h, w, 3), a view
        mean = under[mask].mean(axis=0)
        h, w = alpha.shape
        xy = np.mgrid[:h, :w][::-1] + 0.5 - (centre - (x0, y0))[:, None, None]      # pixel centres
        u, v = np.einsum("ij,jhw->ihw", np.linalg.inv(turn), xy)
        first, second = colours(name, mean, rng)
        speckle = smooth_noise(rng, h, w, max(2, int(radius / 8)))
        surface = first + pattern(name, u, v, speckle)[..., None] * (second - first)
        if name == "ball":                              # a dark seam between the halves
            surface *= 1 - 0.6 * np.exp(-(v / 0.09) ** 2)[..., None]
        camouflaged = rng.random() < 0.25
        if camouflaged:                                 # mixed with the mean colour of what it covers
            surface += rng.uniform(0.55, 0.8) * (mean - surface)
        surface *= 1 - 0.22 * (u * np.cos(light - angle) + v * np.sin(light - angle))[..., None]
        surface += rng.normal(0, 5, (h, w, 1))

        reach = 0.1 * radius
        move = np.float32([[1, 0, reach * np.cos(light)], [0, 1, reach * np.sin(light)]])
        shadow = cv2.warpAffine(alpha, move, (w, h))
        paint(under, 0.35 * cv2.GaussianBlur(shadow, (0, 0), 0.06 * radius + 0.5), np.zeros(3))
        paint(under, alpha, np.clip(surface, 0, 255))
        for other, n in zip(objects, left):
            other["hidden"] |= bool(n < other["area"])
            other["area"] = n
        owner[window][mask] = len(objects) + 1
        objects.append({"class": index, "area": mask.sum(), "whole": mask.sum(), "cut": bool(inside < 0.97),
                        "camouflaged": camouflaged, "hidden": False})
    return np.clip(np.round(picture), 0, 255).astype(np.uint8), owner, objects


# ----------------------------------------------------------------------------------------------------------------------
# the devkit

def voc_palette():
    """VOC's colour map, 256 x 3: the bits of an index dealt in turn to the high bits of red, green and blue."""
    index = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= (((index >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def save_png(path, index_map):
    png = Image.fromarray(index_map)
    png.putpalette(voc_palette().ravel().tolist())      # mode "L" becomes "P": the bytes stay class indices
    png.save(path)


def xml(name, size, objects, boxes):
    """The annotation in VOC's form. Boxes here are 0-based and half-open; the file's are 1-based and inclusive."""
    lines = ["<annotation>", "\t<folder>VOC2012</folder>", f"\t<filename>{name}.jpg</filename>",
             "\t<source>", "\t\t<database>drawn by toy_voc.py</database>", "\t</source>",
             "\t<size>", f"\t\t<width>{size[1]}</width>", f"\t\t<height>{size[0]}</height>", "\t\t<depth>3</depth>",
             "\t</size>", "\t<segmented>1</segmented>"]
    for thing, (x0, y0, x1, y1) in zip(objects, boxes):
        difficult = thing["camouflaged"] and (thing["hidden"] or thing["cut"])
        lines += ["\t<object>", f"\t\t<name>{CLASS_NAMES[thing['class']]}</name>", "\t\t<pose>Unspecified</pose>",
                  f"\t\t<truncated>{int(thing['cut'])}</truncated>", f"\t\t<occluded>{int(thing['hidden'])}</occluded>",
                  f"\t\t<difficult>{int(difficult)}</difficult>", "\t\t<bndbox>",
                  f"\t\t\t<xmin>{x0 + 1}</xmin>", f"\t\t\t<ymin>{y0 + 1}</ymin>",
                  f"\t\t\t<xmax>{x1}</xmax>", f"\t\t\t<ymax>{y1}</ymax>", "\t\t</bndbox>", "\t</object>"]
    return "\n".join(lines + ["</annotation>", ""])


def make_toy_voc(directory, images=480, val=120, size=(120, 160), seed=0):
    """Draw `images` images to train on and `val` to validate on, of size (height, width), under directory/VOC2012.

    Every image has its own random stream (seed, list, number), so that it does not change with how many are drawn.
    Returns the path of the VOC2012 folder.
    """
    root = os.path.join(directory, "VOC2012")
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "SegmentationObject", "ImageSets/Segmentation"):
        os.makedirs(os.path.join(root, folder), exist_ok=True)
    with open(os.path.join(root, "class_names.txt"), "w", encoding="utf-8") as f:
        f.write("\n".join(CLASS_NAMES) + "\n")

    lists = {"train": [], "val": []}
    for number, (split, count) in enumerate([("train", images), ("val", val)]):
        for i in range(count):
            name = f"toy_{split}_{i:05d}"
            image, owner, objects = draw_picture(np.random.default_rng((seed, number, i)), *size)
            boxes = []
            for k in range(len(objects)):               # the tight box of what is visible, as VOC draws them
                ys, xs = np.nonzero(owner == k + 1)
                boxes.append((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
            classes = np.array([0] + [thing["class"] for thing in objects], np.uint8)[owner]
            # VOC's void: a border around objects where nobody can tell. Here 1 pixel, on the outer side only, so that
            # the masks stay exact and a box is the tight box of its mask.
            void = (cv2.dilate(owner, np.ones((3, 3), np.uint8)) > 0) & (owner == 0)
            jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
            with open(os.path.join(root, "JPEGImages", name + ".jpg"), "wb") as f:  # imwrite is silent where it fails
                f.write(jpeg.tobytes())
            for folder, index_map in (("SegmentationClass", classes), ("SegmentationObject", owner)):
                save_png(os.path.join(root, folder, name + ".png"), np.where(void, 255, index_map).astype(np.uint8))
            with open(os.path.join(root, "Annotations", name + ".xml"), "w", encoding="utf-8") as f:
                f.write(xml(name, size, objects, boxes))
            lists[split].append(name)
    for split, names in [*lists.items(), ("trainval", lists["train"] + lists["val"])]:
        with open(os.path.join(root, "ImageSets", "Segmentation", split + ".txt"), "w", encoding="utf-8") as f:
            f.write("".join(name + "\n" for name in names))
    return root


def main():
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Draw a small VOC devkit: textured shapes of five classes on clutter, with exact masks and boxes.")
    parser.add_argument("directory", metavar="DIR", help="the devkit, e.g. toy/VOCdevkit; VOC2012 goes below it")
    parser.add_argument("--images", type=int, default=480, help="images to train on (ours)")
    parser.add_argument("--val", type=int, default=120, help="images to validate on (ours)")
    parser.add_argument("--size", type=int, nargs=2, default=[120, 160], metavar=("H", "W"), help="pixels (ours)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other images (ours)")
    args = parser.parse_args()
    if min(args.images, args.val, args.seed) < 0 or min(args.size) < 16:
        parser.error("--images, --val and --seed must not be negative, and --size at least 16 16")
    voc = Path(args.directory) / "VOC2012"
    if voc.exists() and not ((voc / "class_names.txt").exists()
                             and (voc / "class_names.txt").read_text(encoding="utf-8").split() == CLASS_NAMES):
        parser.error(f"{voc} is another data set, whose lists would be overwritten: name another DIR")
    try:
        root = make_toy_voc(args.directory, args.images, args.val, tuple(args.size), args.seed)
    except OSError as error:
        sys.exit(f"toy_voc.py: {error}")
    print(f"{args.images} + {args.val} images of {args.size[0]}x{args.size[1]} in {root}")


if __name__ == "__main__":
    main()
