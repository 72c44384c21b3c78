"""Mutated files for every reader: each is refused in one line, or read as another parser reads it.

    python tests/fuzz_readers.py                             2,000 mutated files for each reader, some minutes
    python tests/fuzz_readers.py xml png --count 200 --seed 1

Prints for each reader how many files were refused, how many were read and confirmed by the other parser, and how many
were read where the other parser has no answer. A traceback, a message of several lines, or a reading that the other
parser denies is a failure: its file is kept, and the exit status is 1. Not run by pytest.

A further reader is a further line in READERS: its files, how to read one, and what to hold that against.
"""
import argparse
import ast
import io
import json
import re
import shutil
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
import zlib
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from xml.dom import minidom

import cv2
import numpy as np
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import crf
import evaluate
import grabcut_labels
import mcg_candidates
import model

BAD_INPUT = tuple(script.BadInput for script in (crf, evaluate, grabcut_labels, mcg_candidates, model))
NAMES = ["background", "cat", "dog", "Möwe"]
SIZE = 30, 40                                           # of all images here: height, width


class Unclear(Exception):
    """The other parser has no answer."""


# ----------------------------------------------------------------------------------------------------------------------
# mutation

def mutate(rng, files, words):
    """One of the files with one, two or four changes: bits, bytes, pieces cut out or repeated; words of its language, a
    piece of another file put in."""
    data = bytearray(files[rng.integers(len(files))])
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at, to = sorted(rng.integers(0, len(data) + 1, 2).tolist())
        to = min(to, at + int(rng.choice([1, 2, 8, 64])))
        piece = bytes(data[at:to])
        kind = rng.integers(8)
        if kind == 0 and piece:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1 and piece:
            data[at] = int(rng.integers(256))
        elif kind == 2:
            del data[at:to]
        elif kind == 3:
            data[at:at] = piece
        elif kind == 4:
            data[at:at] = rng.bytes(int(rng.integers(1, 5)))
        elif kind == 5:
            data[at:to] = words[rng.integers(len(words))]
        elif kind == 6:
            other = files[rng.integers(len(files))]
            start = int(rng.integers(len(other)))
            data[at:to] = other[start:start + int(rng.choice([4, 32, 256]))]
        elif rng.random() < 0.2:
            del data[at:]
    return bytes(data)


# ----------------------------------------------------------------------------------------------------------------------
# text

def half_up(number):
    return int((Decimal(number) + Decimal("0.5")).to_integral_value(ROUND_FLOOR))


def xml_files():
    box = lambda *corners: "".join(f"<{key}>{c}</{key}>" for key, c in zip(("xmin", "ymin", "xmax", "ymax"), corners))
    thing = lambda name, *corners: f"<object><name>{name}</name><bndbox>{box(*corners)}</bndbox></object>"
    head = "<size><width>40</width><height>30</height><depth>3</depth></size>"
    texts = [f"<annotation>{head}{thing('cat', 1, 1, 20, 20)}{thing('dog', 3.5, 4.2, 40, 30.0)}</annotation>",
             f'<?xml version="1.0" encoding="utf-8"?>\n<annotation>{thing("Möwe", -5, 2, 99, 9)}</annotation>',
             f"<annotation>{head}<object/></annotation>",
             f"<annotation>{head}<object><name>dog</name><part><name>head</name><bndbox>{box(1, 1, 2, 2)}</bndbox>"
             f"</part><bndbox>{box(10, 10, 12, 12)}</bndbox></object></annotation>"]
    return [text.encode() for text in texts]


def xml_otherwise(data):
    try:
        root = minidom.parseString(data).documentElement
    except Exception:
        raise Unclear from None
    children = lambda node, tag: [child for child in node.childNodes if child.nodeName == tag]
    text = lambda node: "".join(c.data for c in node.childNodes if c.nodeType in (c.TEXT_NODE, c.CDATA_SECTION_NODE))

    def leading(node):                                  # the text before the first child, as ElementTree has it
        found = ""
        for child in node.childNodes:
            if child.nodeType in (child.TEXT_NODE, child.CDATA_SECTION_NODE):
                found += child.data
            elif child.nodeType == child.ELEMENT_NODE:
                break
        return found.strip()

    boxes, classes = [], []
    for thing in children(root, "object"):
        if not thing.attributes.length and not any(c.nodeType == c.ELEMENT_NODE for c in thing.childNodes) \
                and not text(thing).strip():
            continue
        bndbox, = children(thing, "bndbox")
        x0, y0, x1, y1 = (half_up(leading(*children(bndbox, key))) for key in ("xmin", "ymin", "xmax", "ymax"))
        boxes.append([max(x0 - 1, 0), max(y0 - 1, 0), min(x1, SIZE[1]), min(y1, SIZE[0])])
        classes.append(NAMES.index(leading(*children(thing, "name"))))
    assert root.nodeName == "annotation" and all(a < c and b < d for a, b, c, d in boxes)
    assert len(root.getElementsByTagName("object")) == len(children(root, "object"))
    return boxes, classes


def read_xml(path):
    boxes, classes = grabcut_labels.read_boxes(path, NAMES, SIZE)
    return boxes.tolist(), classes.tolist()


def json_files():
    square = [[1, 1, 9, 1, 9, 9, 1, 9]]
    coco = {"images": [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}, {"id": 7, "file_name": "x/b.PNG"}],
            "categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "Möwe"}, {"id": 5, "name": "giraffe"}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2.5, 10, 1e1], "iscrowd": 0},
                            {"id": 2, "image_id": 1, "category_id": 4, "bbox": [0, 0, 5, 5], "segmentation": square},
                            {"id": 3, "image_id": 7, "category_id": 5, "bbox": [0, 0, 5, 5], "iscrowd": 1},
                            {"id": 4, "image_id": 7, "category_id": 4, "bbox": [2, 2, 0, 7], "iscrowd": False},
                            {"id": 5, "image_id": 7, "category_id": 3, "bbox": [2, 2, 3, 7], "iscrowd": None}]}
    return [json.dumps(coco).encode(), json.dumps(coco, ensure_ascii=False, indent=1).encode("utf-8-sig")]


def python_literal(text):
    """JSON by Python's own parser."""
    def value(node):
        if isinstance(node, ast.Dict):
            pairs = [(value(k), value(v)) for k, v in zip(node.keys, node.values)]
            assert len(dict(pairs)) == len(pairs), "a key twice"
            return dict(pairs)
        if isinstance(node, ast.List):
            return [value(item) for item in node.elts]
        if isinstance(node, ast.Name):
            return {"true": True, "false": False, "null": None, "NaN": float("nan"), "Infinity": float("inf")}[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if not isinstance(node, ast.Constant):
            raise Unclear
        return node.value

    try:
        with warnings.catch_warnings():                 # of odd escapes
            warnings.simplefilter("error")
            return value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, KeyError, RecursionError, MemoryError, Warning):
        raise Unclear from None


def json_otherwise(data):
    coco, found = python_literal(decoded(data)), {}
    for what in ("images", "categories"):
        ids = [thing["id"] for thing in coco[what]]
        assert len(set(ids)) == len(ids), "an id twice"
    for thing in coco["annotations"]:
        image, = (image for image in coco["images"] if image["id"] == thing["image_id"])
        name, = (category["name"] for category in coco["categories"] if category["id"] == thing["category_id"])
        if str(name) in NAMES[1:] and not int(thing.get("iscrowd") or 0) and 0 not in map(float, thing["bbox"][2:]):
            key = re.sub(r"(?i)\.(jpe?g|png|webp|bmp|tiff?)$", "", re.split(r"[/\\]", image["file_name"])[-1])
            boxes, kinds, _ = found.setdefault(key, ([], [], (image.get("width"), image.get("height"))))
            boxes.append([float(number) for number in thing["bbox"]])
            kinds.append(NAMES.index(name))
    return found


def decoded(data):
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if data.startswith(mark):
            return data[len(mark):].decode(encoding)
    return data.decode("utf-8")


def list_files():
    texts = ["a\nb - Copy\nday1/c\n", "\r\na.jpg\r\nb.PNG\r\n", "JPEGImages/a.jpg\n./JPEGImages/b c.jpg\nMöwe",
             "/JPEGImages/a.jpg /SegmentationClassAug/a.png\n/JPEGImages/b.jpg /SegmentationClassAug/b.png\n",
             "2008_000008  1\n2008_000015 -1\n", "".join(f"2007_{n:06}\n" for n in range(30))]
    return [text.encode() for text in texts] + [texts[0].encode("utf-8-sig"), texts[2].encode("utf-16")]


def list_otherwise(data):
    """Each line that is not empty has one id; what the id lacks of it is one of the additions that are documented."""
    lines = [line.strip() for line in re.split("\r\n|\r|\n", decoded(data)) if line.strip()]

    def told(ids):
        folder, ending = Path("/data/JPEGImages"), r"(\.(jpe?g|png|webp|bmp|tiff?))?"
        for line, name in zip(lines, ids):
            whole = line.replace("\\", "/")
            before = r"(\./)?(/?((VOCdevkit/)?VOC2012/)?JPEGImages/)?"
            column = rf"(\s+\S?.*/?{re.escape(name.split('/')[-1])}\.(png|xml))?"
            assert re.fullmatch(before + re.escape(name) + ending + column, whole, re.I), (line, name)
            assert folder in (folder / name).resolve().parents and "\0" not in name, name
        return len(ids) == len(lines) == len(set(ids))
    return told


def yolo_files():
    texts = ["0 0.5 0.5 0.25 0.5\n2 0.1 0.2 0.2 0.4\n", "1 0.5 0.5 1 1 0.87\n", "0 0.1 0.1 0.9 0.2 0.8 0.9 0.2 0.7\n",
             "1 .25 .5 5e-1 1\r\n\r\n0 1.02 0.5 0.1 0.1\r\n", "2 0.1 0.1 0.9 0.1 0.9 0.9 0.1 0.9 0.5\n", "\n"]
    return [text.encode() for text in texts] + [texts[0].encode("utf-8-sig"), texts[1].encode("utf-16")]


def yolo_otherwise(data):
    """Each row by Decimal: the box around its points, or from its centre and size; nothing else is in the row."""
    boxes = []
    for line in re.split("\r\n|\r|\n", decoded(data)):
        words = [word for word in line.replace("\t", " ").split(" ") if word]
        if not words:
            continue
        if not all(re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", word, re.A) for word in words):
            raise Unclear
        kind, *row = map(Decimal, words)
        if len(row) < 6:
            x, y, w, h = row[:4]
            row = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        xs, ys = row[0:len(row) - len(row) % 2:2], row[1::2]
        boxes.append((NAMES[1:][int(kind)], *(float(edge) for edge in (min(xs), min(ys), max(xs), max(ys)))))
    return lambda ours: len(ours) == len(boxes) and all(
        a[0] == b[0] and np.allclose(a[1:], b[1:], rtol=0, atol=1e-9) for a, b in zip(ours, boxes))


def names_files():
    text = "\n".join(NAMES)
    return [text.encode(), text.replace("\n", "\r\n").encode("utf-8-sig"), text.encode("utf-16")]


def names_otherwise(data):
    return [line.strip() for line in re.split("\r\n|\r|\n", decoded(data)) if line.strip()]


# ----------------------------------------------------------------------------------------------------------------------
# images

def picture():
    ys, xs = np.mgrid[:SIZE[0], :SIZE[1]]
    return np.stack([5 * xs, 8 * ys, 100 + 100 * np.sin(xs / 5 + ys / 7)], 2).astype(np.uint8)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg_files():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8769] = 6, "maker", {0x9003: "2026:01:01 00:00:00"}
    image = Image.fromarray(picture())
    return [saved(image, "JPEG", quality=90), saved(image, "JPEG", exif=exif), saved(image.convert("L"), "JPEG"),
            saved(image, "JPEG", progressive=True, exif=exif), saved(image.convert("CMYK"), "JPEG")]


def like_opencv(data):
    """As OpenCV reads it, but for what two decoders make of broken blocks: same size, most pixels about the same."""
    there = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if there is None:
        raise Unclear

    def same(ours):
        if ours.shape != there.shape and ours.transpose(1, 0, 2).shape != there.shape:
            return False
        if ours.shape != there.shape or np.abs(ours.astype(int) - there[..., ::-1]).mean() > 3:
            raise Unclear                               # odd bytes in EXIF or in the data, which each takes its way
        return True
    return same


def png_bytes(pixels, colour, bits, palette=()):
    """(H, W) indices or (H, W, 3) RGB -> a PNG; by hand, since Pillow writes no grey PNG of 2 or 4 bits."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = pixels.reshape(len(pixels), -1)
    spread = np.unpackbits(rows[..., None], axis=2)[..., 8 - bits:].reshape(len(rows), -1)
    head = struct.pack(">IIBBBBB", pixels.shape[1], len(pixels), bits, colour, 0, 0, 0)
    plte = chunk(b"PLTE", bytes(palette)) if len(palette) else b""
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in np.packbits(spread, axis=1)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + plte + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def rechunked(rng, files, words):
    """Half of the files are changed inside a chunk of the PNG, or in its pixels (as many), and the checksums are then
    right."""
    if rng.random() < 0.5:
        return mutate(rng, files, words)
    data, chunks = files[rng.integers(len(files))], []
    at = 8
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunks.append((kind, data[at + 8:at + 8 + length]))
        at += 12 + length
    chosen, whole = rng.integers(len(chunks) - 1), data[:8]
    for number, (kind, content) in enumerate(chunks):
        if number == chosen:
            raw = zlib.decompress(content) if kind == b"IDAT" else content
            content = mutate(rng, [raw], words)
            content = zlib.compress(content[:len(raw)].ljust(len(raw), b"\0")) if kind == b"IDAT" else content
        whole += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return whole


def png_by_hand(data):
    """PNG specification, without interlacing -> (H, W, channels) uint8 samples as stored, colour type, bits."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise Unclear
    at, body, head = 8, b"", None
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        content = data[at + 8:at + 8 + length]
        checksum = data[at + 8 + length:at + 12 + length]
        assert kind == b"IEND" or checksum == struct.pack(">I", zlib.crc32(kind + content)), f"{kind} is broken"
        head = struct.unpack_from(">IIBBBBB", content) if kind == b"IHDR" and head is None else head
        body += content if kind == b"IDAT" else b""
        at += 12 + length
        if kind == b"IEND":
            break
    width, height, bits, colour, *_, interlace = head
    if interlace or bits > 8:
        raise Unclear
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row_bytes, step = (width * channels * bits + 7) // 8, max(1, channels * bits // 8)
    raw, rows, above = zlib.decompress(body), [], bytes(row_bytes)
    if len(raw) < height * (row_bytes + 1):             # whose checksums are right: Pillow takes what lacks for 0
        raise Unclear
    for y in range(height):
        kind, *row = raw[y * (row_bytes + 1):(y + 1) * (row_bytes + 1)]
        for x in range(row_bytes):
            a, b, c = (row[x - step] if x >= step else 0), above[x], (above[x - step] if x >= step else 0)
            p = min((a, b, c), key=lambda value: abs(a + b - c - value))
            row[x] = row[x] + (0, a, b, (a + b) // 2, p)[kind] & 255
        rows.append(row)
        above = row
    unpacked = np.unpackbits(np.array(rows, np.uint8), axis=1)[:, :width * channels * bits]
    samples = np.packbits(unpacked.reshape(height, width * channels, bits), axis=2)[..., 0] >> (8 - bits)
    return samples.reshape(height, width, channels), colour, bits


def png_files():
    image = Image.fromarray(picture())
    return [saved(image, "PNG"), saved(image.convert("L"), "PNG"), png_bytes(picture(), 2, 8)]


def png_otherwise(data):
    samples, colour, bits = png_by_hand(data)
    if colour not in (0, 2) or bits < 8:
        raise Unclear
    return lambda ours: np.array_equal(ours, np.broadcast_to(samples, (*samples.shape[:2], 3)))


def label_files():
    labels, colours = (np.arange(1200) // 300 % 4).reshape(SIZE).astype(np.uint8), grabcut_labels.voc_palette()
    return [png_bytes(labels, 0, 8), png_bytes(labels, 3, 8, colours.tobytes()), png_bytes(labels, 0, 2),
            png_bytes(labels, 0, 4), png_bytes(labels % 2, 0, 1), png_bytes(labels, 3, 4, colours[:16].tobytes()),
            png_bytes(labels, 3, 8, colours[[2, 0, 1, 3]].tobytes())]


def label_otherwise(data):
    samples, colour, _ = png_by_hand(data)
    return lambda ours: colour in (0, 3) and np.array_equal(ours, samples[..., 0])


# ----------------------------------------------------------------------------------------------------------------------
# arrays and weights

def npz_files():
    superpixels = (np.arange(1200) // 100).reshape(SIZE)
    members = np.eye(12, dtype=bool) | np.eye(12, k=1, dtype=bool)
    with tempfile.TemporaryDirectory() as folder:
        mcg_candidates.write_candidates(Path(folder) / "a.npz", superpixels, members, [[1, 2, 9, 9]], [2])
        whole = (Path(folder) / "a.npz").read_bytes()
    return [whole]


def rezipped(rng, files, words):
    """Half of the files are changed inside the zip, whose checksums are then right."""
    if rng.random() < 0.5:
        return mutate(rng, files, words)
    file, old = io.BytesIO(), zipfile.ZipFile(io.BytesIO(files[rng.integers(len(files))]))
    chosen = old.namelist()[rng.integers(len(old.namelist()))]
    with zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, mutate(rng, [content], words) if name == chosen else content)
    return file.getvalue()


def npz_otherwise(data):
    try:
        file = zipfile.ZipFile(io.BytesIO(data))
    except Exception:
        raise Unclear from None

    def array(key):
        content = file.read(f"{key}.npy")
        length, at = struct.unpack_from("<H", content, 8)[0], 10
        head = ast.literal_eval(content[at:at + length].decode("latin-1").strip())
        flat = np.frombuffer(content, head["descr"], int(np.prod(head["shape"], dtype=int)), at + length)
        return flat.reshape(head["shape"], order="F" if head["fortran_order"] else "C")

    def same(ours):
        try:
            theirs = {key: array(key) for key in ours}
        except (ValueError, SyntaxError, struct.error, UnicodeError):
            raise Unclear from None                     # another version of the format
        count = theirs["superpixels"].max() + 1
        bits = [[row[r // 8] >> 7 - r % 8 & 1 for r in range(count)] for row in theirs["members"]]
        theirs["members"] = np.array(bits, bool).reshape(-1, count)
        boxes = np.concatenate([theirs["boxes"], theirs["candidate_boxes"]])
        inside = (boxes[:, :2] >= 0).all() and (boxes[:, :2] < boxes[:, 2:]).all() and (
            boxes[:, 2:] <= SIZE[::-1]).all()
        return inside and all(np.array_equal(ours[key], theirs[key]) for key in ours)
    return same


class Tiny(nn.Module):
    """Stands for the networks, whose 40 MB would be written 2,000 times."""
    def __init__(self, num_classes, width):
        super().__init__()
        self.arch = {"network": "Tiny", "num_classes": num_classes, "width": width}
        self.layer = nn.Linear(width, num_classes)


def checkpoint_files():
    torch.manual_seed(0)
    network = Tiny(4, 5)
    file = io.BytesIO()
    torch.save({"model": network.state_dict(), "arch": network.arch, "class_names": NAMES, "step": 3}, file)
    return [file.getvalue()]


def read_checkpoint(path):
    model.NETWORKS["Tiny"] = Tiny
    network, saved_ = model.load_network(path)
    return [p.detach().numpy() for p in network.parameters()], saved_["class_names"]


def checkpoint_otherwise(data):
    try:
        file = zipfile.ZipFile(io.BytesIO(data))
        names = sorted(name for name in file.namelist() if re.search(r"/data/\d+$", name))
    except Exception:
        raise Unclear from None

    def same(ours):
        parameters, class_names = ours                  # zipfile checks the CRC of what it reads
        theirs = [np.frombuffer(file.read(name), np.float32) for name in names]
        return len(class_names) == 4 and len(theirs) == len(parameters) and all(
            np.array_equal(a.ravel(), b, equal_nan=True) for a, b in zip(parameters, theirs))
    return same


# ----------------------------------------------------------------------------------------------------------------------

# name: (valid files, words to put in, read(path), otherwise(bytes) -> what was to be read, or a function that says
# whether that is what the file holds)[, mutate]
READERS = {
    "xml": (xml_files, b"<object> </object> <object/> <name> <bndbox> <xmin> 1 0 -1 1e9 nan &#65; <!--x--> <a>".split(),
            read_xml, xml_otherwise),
    "json": (json_files, b'{ } [ ] , : null true NaN 1e400 -0 "id" 1 "cat" \\u0041 \\ud800 "iscrowd"'.split(),
             lambda path: mcg_candidates.read_coco(path, NAMES)[0], json_otherwise),
    "list": (list_files, [b"\n", b"\r", b"../", b"/", b"\\", b" ", b".jpg", b" 1", b"\t", b"JPEGImages/", b"C:", b"\0"],
             grabcut_labels.read_list, list_otherwise),
    "yolo": (yolo_files, [b"\n", b"\r", b" ", b"\t", b"0.5", b"-", b"e1", b"nan", b"inf", b"_", b"9", b"\xd9\xa3"],
             lambda path: grabcut_labels.yolo_boxes(path, NAMES[1:]), yolo_otherwise),
    "names": (names_files, [b"\n", b"\r", b" ", b"\xc3", b"\0", b"cat"], grabcut_labels.read_names, names_otherwise),
    "png": (png_files, [b"IDAT", b"PLTE", b"tRNS", b"\0\0\0\0", b"eXIf"], grabcut_labels.read_image, png_otherwise,
            rechunked),
    "label": (label_files, [b"IDAT", b"PLTE", b"tRNS", b"\0\0\0\0", b"\1"],
              lambda path: grabcut_labels.read_label(path, None, 4), label_otherwise, rechunked),
    "jpeg": (jpeg_files, [b"\xff\xd9", b"\xff\xda", b"\xff\xe1", b"Exif\0\0", b"\xff\xd8", b"\0\6"],
             grabcut_labels.read_image, like_opencv),
    "npz": (npz_files, [b"superpixels", b"<i4", b"|u1", b"PK\1\2", b"\0\0\0\0", b"\xff\xff\xff\xff"],
            lambda path: mcg_candidates.read_candidates(path, SIZE, 4), npz_otherwise, rezipped),
    "checkpoint": (checkpoint_files, [b"model", b"arch", b"PK\1\2", b"\0\0\0\0", b"q\0", b"X\3\0\0\0cat"],
                   read_checkpoint, checkpoint_otherwise, rezipped),
}


def try_file(path, data, read, otherwise):
    """-> "refused", "confirmed", "read", or what is wrong."""
    path.write_bytes(data)
    try:
        ours = read(path)
    except BAD_INPUT as error:
        return "refused" if str(path) in str(error) and "\n" not in str(error) else f"a bad message: {error}"
    except Exception:
        return traceback.format_exc()
    try:
        theirs = otherwise(data)
        return "confirmed" if (theirs(ours) if callable(theirs) else theirs == ours) else f"read as {ours}"
    except Unclear:
        return "read"
    except Exception:
        return f"read as {ours}, but {traceback.format_exc()}"


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("readers", nargs="*", choices=[*READERS, []], metavar="READER", help=" ".join(READERS))
    parser.add_argument("--count", type=int, default=2000, help="mutated files for each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other files (default: %(default)s)")
    parser.add_argument("--keep", default="fuzz_failures", metavar="DIR", help="for files that failed (default: "
                        "%(default)s)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")                     # Pillow's, of broken EXIF
    failures, folder = 0, Path(tempfile.mkdtemp())
    try:
        for name in args.readers or READERS:
            files, words, read, otherwise, change = (*READERS[name], mutate)[:5]
            files, rng = files(), np.random.default_rng((args.seed, *name.encode()))
            outcomes = {"refused": 0, "confirmed": 0, "read": 0}
            for number, data in enumerate([*files, *(change(rng, files, words) for _ in range(args.count))]):
                outcome = try_file(folder / "file", data, read, otherwise)
                if outcome in outcomes:
                    outcomes[outcome] += 1
                else:
                    failures += 1
                    Path(args.keep).mkdir(exist_ok=True)
                    (Path(args.keep) / f"{name}-{args.seed}-{number}").write_bytes(data)
                    print(f"{name} {number}: {outcome}")
            print(f"{name:12}{len(files)} files and {args.count} mutated ones: {outcomes['refused']} refused, "
                  f"{outcomes['confirmed']} read and confirmed, {outcomes['read']} read but not by the other parser",
                  flush=True)
    finally:
        shutil.rmtree(folder)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
