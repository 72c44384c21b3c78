"""Files as people have them: sizes that disagree, odd lists, odd PNGs, EXIF, other endings, full disks, other locales.

Each input is right or refused in one line, never silently something else."""
import contextlib
import importlib
import inspect
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import crf
import evaluate
import grabcut_labels
import mcg_candidates
import model
import train_boxsup
from grabcut_labels import (VOC_CLASSES, CannotWrite, check_classes, class_names, find_image, keep_apart,
                            make_labels, read_boxes, read_image, read_label, read_list, require_a_box, require_a_class,
                            voc_palette, write_label)
from mcg_candidates import claim_folder, make_candidates, make_coco_candidates, read_coco, read_source
from toy_voc import make_toy_voc

ROOT = Path(__file__).resolve().parent.parent
BadInput = tuple(script.BadInput for script in (crf, evaluate, grabcut_labels, mcg_candidates, model))
NAMES = ["background", "cat", "dog"]
PIXELS = np.random.default_rng(0).integers(60, 110, (60, 120, 3)).astype(np.uint8)
PIXELS[10:30, 10:50] = 220, 30, 30                      # the dog


def thing(name="dog", xmin=11, ymin=11, xmax=50, ymax=30):
    box = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
    return f"<object><name>{name}</name><bndbox>{box}</bndbox></object>"


def annotation(*things, size="<size><width>120</width><height>60</height></size>"):
    return f"<annotation>{size}{''.join(things)}</annotation>"


@pytest.fixture
def voc(tmp_path):
    """Two images with a dog each, 120 wide, 60 high."""
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    (root / "class_names.txt").write_text("\n".join(NAMES))
    (root / "ImageSets/Segmentation/train.txt").write_text("a\nb\n")
    for name in "ab":
        Image.fromarray(PIXELS).save(root / f"JPEGImages/{name}.jpg", quality=95)
        (root / f"Annotations/{name}.xml").write_text(annotation(thing()))
        write_label(root / f"SegmentationClass/{name}.png", 2 * dog())
    return root


def dog():
    mask = np.zeros((60, 120), np.uint8)
    mask[10:30, 10:50] = 1
    return mask


def call(script, *arguments):
    """What SCRIPT's main() does, without the seconds that a process of its own takes -> exit status, all it prints."""
    module, arguments, out = importlib.import_module(script[:-3]), list(map(str, arguments)), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        patch.setattr(sys, "argv", [script, *arguments])
        try:
            status = module.main(*([arguments] if inspect.signature(module.main).parameters else []))
        except BadInput as error:                       # as the scripts' last lines do
            status = 2
            print(error)
    return status, out.getvalue()


def process(script, *arguments, **options):
    """python SCRIPT ... -> exit status, stdout and stderr together; never a traceback"""
    done = subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], capture_output=True, **options)
    text = (done.stdout + done.stderr).decode()
    assert "Traceback" not in text, text
    return done.returncode, text


def boxes_of(tmp_path, text, size=(60, 120)):
    (tmp_path / "a.xml").write_text(text, encoding="utf-8")
    return read_boxes(tmp_path / "a.xml", NAMES, size)[0].tolist()


def png(path, mode, pixels, bits, palette=None):
    """A PNG byte by byte, of any bit depth: mode 0 grey, 3 palette."""
    packed = np.packbits(np.unpackbits(pixels[..., None], axis=2)[..., 8 - bits:].reshape(len(pixels), -1), axis=1)
    chunk = lambda kind, data: (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], bits, mode, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    colours = chunk(b"PLTE", np.asarray(palette, np.uint8).tobytes()) if palette is not None else b""
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + colours + chunk(b"IDAT", zlib.compress(rows)) +
                     chunk(b"IEND", b""))


# ---------------------------------------------------------------- 1: what a file says twice must agree
@pytest.mark.parametrize("width, height, words", [
    (120, 60, None), (121, 59, None), (0, 0, None), ("", "", None), ("null", "null", None), (" 120.0 ", 60, None),
    (480, 240, "says 480x240, but the image is 120x60: annotate"), (120, 62, "says 120x62"),
    (60, 120, r"says 60x120, but the image is 120x60: if EXIF .*exiftool"), ("inf", 60, "infx60")])
def test_the_size_in_an_xml(tmp_path, width, height, words):
    text = annotation(thing(), size=f"<size><width>{width}</width><height>{height}</height></size>")
    if words is None:
        assert boxes_of(tmp_path, text) == [[10, 10, 50, 30]]
    else:
        with pytest.raises(BadInput, match=f"a.xml: {words}" if words[0] == "s" else words):
            boxes_of(tmp_path, text)


def test_a_missing_size_is_no_other_size(tmp_path):
    for size in ("", "<size/>", "<size><width>120</width></size>", "<size><depth>3</depth></size>"):
        assert boxes_of(tmp_path, annotation(thing(), size=size)) == [[10, 10, 50, 30]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_of_the_stored_frame_are_refused_where_exif_turns_the_picture(voc, orientation):
    """Sideways (5 to 8) the sizes tell; otherwise the frame that is shown has the stored one's size."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(voc / "JPEGImages/a.jpg", exif=exif, quality=95)
    summary = make_labels(voc, ["a", "b"], workers=1)
    assert [line[:3] for line in summary["failures"]] == ["a: "] * (orientation >= 5)
    if orientation >= 5:
        assert "says 120x60, but the image is 60x120" in summary["failures"][0]
    assert summary["made"] == 2 - (orientation >= 5)


def coco(path, **changes):
    """Two images with a dog each."""
    content = {"images": [{"id": i, "file_name": f"{name}.jpg", "width": 120, "height": 60}
                          for i, name in ((1, "a"), (2, "b"))],
               "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
               "annotations": [{"id": i, "image_id": i, "category_id": 2, "bbox": [10, 10, 40, 20], "iscrowd": 0,
                                "segmentation": [[10, 10, 50, 10, 50, 30, 10, 30]]} for i in (1, 2)], **changes}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("size, good", [((120, 60), True), ((None, None), True), ((0, 0), True), ((119, 61), True),
                                        (("120", "60"), True), ((480, 240), False), ((60, 120), False)])
@pytest.mark.parametrize("method", ["gop", "masks"])
def test_the_size_in_a_json(voc, size, good, method):
    images = [{"id": 1, "file_name": "a.jpg", "width": size[0], "height": size[1]}, {"id": 2, "file_name": "b.jpg"}]
    summary = make_coco_candidates(coco(voc / "c.json", images=images), voc / "JPEGImages", voc / "out", NAMES,
                                   method=method, workers=1, max_candidates=5)
    assert summary["made"] == 1 + good and len(summary["failures"]) == 1 - good
    if not good:
        assert f"a.jpg: says {size[0]}x{size[1]}, but the image is 120x60" in summary["failures"][0]


# ---------------------------------------------------------------- 2: nothing found is said
@pytest.mark.parametrize("text", [
    '<annotations><image name="a.jpg"><box label="dog" xtl="1" ytl="1" xbr="5" ybr="5"/></image></annotations>',
    "<html><body>404 Not Found</body></html>",
    f"<annotation><objects>{thing()}</objects></annotation>",
    f'<annotation xmlns="http://example.org">{thing()}</annotation>',
    f"<annotation>{thing()}{thing().replace('object>', 'Object>')}</annotation>",
    f"<annotation>{thing().replace('object>', 'item>')}</annotation>",
    f"<Annotation>{thing()}</Annotation>"])
def test_an_xml_that_is_not_vocs(tmp_path, text):
    with pytest.raises(BadInput, match="a.xml: <.*is not VOC's form.*export it as Pascal VOC"):
        boxes_of(tmp_path, text)


def test_an_empty_object_is_none_but_one_with_anything_in_it_is_not_left_out(tmp_path):
    assert boxes_of(tmp_path, annotation("<object/>", "<object>\n</object>")) == []
    assert boxes_of(tmp_path, annotation("<object/>", thing())) == [[10, 10, 50, 30]]
    for text in ("<object>dog</object>", '<object name="dog"/>', "<object><bndbox/></object>"):
        with pytest.raises(BadInput, match="an object without a name"):
            boxes_of(tmp_path, annotation(text))


def test_boxes_in_0_to_1_are_no_pixels(tmp_path):
    for corners in ((0.1, 0.2, 0.4, 0.5), (0, 0, 1, 1), (0.5, 0.5, 1, 1)):
        with pytest.raises(BadInput, match="0..1"):
            boxes_of(tmp_path, annotation(thing("dog", *corners)))
        x0, y0, x1, y1 = corners
        with pytest.raises(BadInput, match="here: the box .* lies in 0..1"):
            mcg_candidates.coco_boxes([[5, 5, 9, 9], [x0, y0, x1 - x0, y1 - y0]], (60, 120), "here")
    assert boxes_of(tmp_path, annotation(thing("dog", 1, 1, 1, 1))) == [[0, 0, 1, 1]]     # VOC's first pixel


def test_images_and_classes_without_a_box_are_named(voc, capsys):
    (voc / "Annotations/b.xml").write_text(annotation())
    summary = make_labels(voc, ["a", "b"], workers=1)
    assert summary["notes"] == {"no box, all background": ["b"]} and summary["classes"] == {"dog": 1}
    assert "1 images have no box, all background: b" in capsys.readouterr().err
    status, text = call("grabcut_labels.py", "--data", voc, "--out", voc / "again")
    assert status == 0 and "no box of cat\n" in text and "all background: b" in text
    summary = make_candidates(voc, ["a", "b"], method="gop", workers=1, max_candidates=5)
    assert summary["notes"] == {"no box, all background": ["b"]} and "all background: b" in capsys.readouterr().err


def test_a_whole_list_without_a_box_is_refused_before_anything_is_made(voc):
    for name in "ab":
        (voc / f"Annotations/{name}.xml").write_text(annotation())
    for make in (make_labels, make_candidates):
        with pytest.raises(BadInput, match=r"b.xml: no object in it, nor in any other of the list \(2\)"):
            make(voc, ["a", "b"])
    with pytest.raises(BadInput, match="no object"):
        require_a_box((voc / f"Annotations/{name}.xml" for name in "ab"), NAMES)
    assert not list(voc.glob("*Masks")) and not list(voc.glob("Candidates*"))


def test_what_is_left_out_of_a_json_is_counted_and_named(tmp_path):
    box = lambda image, category, box=(10, 10, 40, 20), **more: {"image_id": image, "category_id": category,
                                                                 "bbox": box, **more}
    things = [box(1, 1), box(1, 2), box(2, 1, iscrowd=1), box(2, 1, iscrowd="0"), box(1, 1, (5, 5, 0, 9))]
    path = coco(tmp_path / "c.json", annotations=things,
                categories=[{"id": 1, "name": "cat"}, {"id": 2, "name": "Dog"}])
    found, notes = read_coco(path, NAMES)
    assert [len(boxes) for boxes, *_ in found.values()] == [1, 1]
    assert notes == ["1 boxes of Dog, which is no class here left out", "1 crowds (iscrowd 1) left out",
                     "1 boxes of no size left out", "no category for dog; those of the file: cat, Dog"]
    for crowd, words in ((1, "2 crowds .iscrowd 1. left out"), (0, "2 boxes of no size left out")):
        path = coco(tmp_path / "c.json", annotations=[box(i, 1, (5, 5, 5, 5 * crowd), iscrowd=crowd) for i in (1, 2)])
        with pytest.raises(BadInput, match=f"c.json: no box of the classes cat, dog .{words}"):
            read_coco(path, NAMES)


def test_an_outline_that_paints_no_pixel(voc):
    """It is said; where none of the whole file paints any, it is refused: boxes without outlines make no masks."""
    square, none = [[10, 10, 50, 10, 50, 30, 10, 30]], [[200, 10, 210, 10, 210, 30]]
    thing = lambda image, outline: {"image_id": image, "category_id": 2, "bbox": [9, 9, 9, 9], "segmentation": outline}
    path = coco(voc / "c.json", annotations=[thing(1, square), thing(1, none), thing(2, none), thing(2, [])])
    summary = make_coco_candidates(path, voc / "JPEGImages", voc / "out", NAMES, method="masks", workers=1)
    assert summary["notes"] == {"an outline that paints no pixel": ["a", "b"]}
    assert np.array_equal(read_label(voc / "out/a.png"), 2 * dog()) and not read_label(voc / "out/b.png").any()
    coco(path, annotations=[thing(1, []), thing(2, none)])
    with pytest.raises(BadInput, match="no class but background"):
        make_coco_candidates(path, voc / "JPEGImages", voc / "out2", NAMES, method="masks", workers=1)


def test_masks_of_0_and_255_are_no_truth(voc, tmp_path):
    for name in "ab":
        Image.fromarray(255 * dog()).save(voc / f"SegmentationClass/{name}.png")
        write_label(tmp_path / f"labels/{name}.png", 0 * dog())
    status, text = call("evaluate.py", "--data", voc, "--labels", tmp_path / "labels", "--split", "train")
    assert status == 2 and "b.png: no class but background in it, nor in any of the list (2)" in text
    status, text = call("train_box2seg.py", "--data", voc, "--loss", "mask", "--recipe", "small", "--batch-size", 2,
                        "--out", tmp_path / "run", "--device", "cpu")
    assert status == 2 and "no class but background" in text
    write_label(voc / "SegmentationClass/b.png", 2 * dog())              # one class in one image is a truth
    require_a_class([voc / "SegmentationClass/a.png", voc / "SegmentationClass/b.png"])


# ---------------------------------------------------------------- 3: nothing is dropped or merged
@pytest.mark.parametrize("text, tag", [
    (thing().replace("</object>", "<bndbox><xmin>1</xmin></bndbox></object>"), "bndbox"),
    (thing().replace("<xmin>", "<xmin>3</xmin><xmin>"), "xmin"),
    (thing().replace("<name>", "<name>cat</name><name>"), "name")])
def test_what_an_object_may_have_once(tmp_path, text, tag):
    with pytest.raises(BadInput, match=f"has several <{tag}>"):
        boxes_of(tmp_path, annotation(text))


@pytest.mark.parametrize("what, things", [
    ("images", [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}, {"id": 1, "file_name": "c.jpg"}]),
    ("categories", [{"id": 2, "name": "dog"}, {"id": 2, "name": "cat"}])])
def test_two_of_one_id_in_a_json(tmp_path, what, things):
    with pytest.raises(BadInput, match=f"c.json: two {what} have the id {things[-1]['id']}"):
        read_coco(coco(tmp_path / "c.json", **{what: things}), NAMES)


# ---------------------------------------------------------------- 4: ids are names
def list_of(tmp_path, text, encoding="utf-8"):
    (tmp_path / "list.txt").write_bytes(text.encode(encoding))
    return read_list(tmp_path / "list.txt")


@pytest.mark.parametrize("text, ids", [
    ("a\nb\n", ["a", "b"]), ("a - Copy\r\n b b \r\n\r\n", ["a - Copy", "b b"]), ("a\rb", ["a", "b"]),
    ("day1/a\nday2/a", ["day1/a", "day2/a"]), ("day1\\a.JPG", ["day1/a"]), ("./a\n./b", ["a", "b"]),
    ("a.jpg\nb.PNG\nc.x", ["a", "b", "c.x"]), ("JPEGImages/a.jpg\n./JPEGImages/c/b.jpg", ["a", "c/b"]),
    ("/JPEGImages/a.jpg /SegmentationClassAug/a.png\n/JPEGImages/b.jpg /SegmentationClassAug/b.png", ["a", "b"]),
    ("JPEGImages/a b.jpg\tAnnotations/a b.xml", ["a b"]), ("VOC2012/JPEGImages/a.jpg", ["a"]),
    ("photo 1\nphoto 0\n", ["photo 1", "photo 0"]), ("a 1\nb\n", ["a 1", "b"]), ("Möwe\n鸟", ["Möwe", "鸟"])])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_whose_meaning_is_plain(tmp_path, text, ids, encoding):
    assert list_of(tmp_path, text, encoding) == ids


@pytest.mark.parametrize("text, words", [
    ("../a", "'../a' is no id"), ("b\nday/../../a", "is no id"), ("/home/me/a.jpg", "is no id"),
    ("C:\\data\\a", "is no id"),
    ("a/", "is no id"), (".jpg", "is no id"), ("x" * 300, "is no id"), ("im/a.jpg lab/b.png", "are two names"),
    ("2008_000008  1\n2008_000015 -1\n2008_000019  0\n", "a second column of 1, 0, -1.*dog_train.txt"),
    ("a\na.jpg", "names an id twice"), ("\n", "is empty"), ("a\0b", "not text in UTF-8")])
def test_lists_that_are_refused(tmp_path, text, words):
    with pytest.raises(BadInput, match=f"list.txt: .*{words}") as raised:
        list_of(tmp_path, text)
    assert "\n" not in str(raised.value)


def test_a_list_may_come_through_a_pipe():
    """--list <(head -40 val.txt), as a shell has it."""
    read, write = os.pipe()
    os.write(write, b"a\nb\n")
    os.close(write)
    assert read_list(f"/dev/fd/{read}") == ["a", "b"]
    os.close(read)


@pytest.mark.parametrize("data", ["Möwe".encode("cp1252"), "a\nb".encode("utf-16-le"), "a".encode("utf-32"),
                                  b"\xff\xd8\xff"])
def test_lists_in_other_encodings_are_refused(tmp_path, data):
    (tmp_path / "list.txt").write_bytes(data)
    with pytest.raises(BadInput, match="list.txt: not text in UTF-8"):
        read_list(tmp_path / "list.txt")


def test_pictures_in_subfolders_all_the_way(voc):
    """day1/a and day2/a are two images: labels, candidates, scores, training."""
    for name in ("day1/a", "day2/a"):
        for folder, ending in (("JPEGImages", "jpg"), ("Annotations", "xml"), ("SegmentationClass", "png")):
            (voc / folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(voc / folder / f"a.{ending}", voc / folder / f"{name}.{ending}")
    ids = list_of(voc, "day1/a\nday2/a\n")
    assert make_labels(voc, ids, workers=1)["made"] == 2
    assert np.array_equal(read_label(voc / "BoxMasks/day2/a.png"), 2 * dog())
    assert make_candidates(voc, ids, method="gop", workers=1, max_candidates=5)["made"] == 2
    status, text = call("evaluate.py", "--data", voc, "--labels", voc / "BoxMasks", "--list", voc / "list.txt")
    assert status == 0 and "mIoU 100.0 %" in text and "2 images" in text
    status, text = call("evaluate.py", "--data", voc, "--labels", voc / "BoxMasks", "--against",
                        voc / "SegmentationClass")
    assert status == 0 and "2 images" in text               # found without a list, too
    images = train_boxsup.Images(voc)
    args = train_boxsup.parse_arguments(["--split", "train", "--extra", str(voc / "Candidates-gop")])[0]
    images, _ = train_boxsup.training_images(voc, NAMES, args, voc / "run")
    assert images.ids[-2:] == ids and images.updated == range(4)
    assert images.files(3)[0].samefile(voc / "JPEGImages/day2/a.jpg")


def test_no_output_is_an_input(voc, tmp_path):
    images, truth = voc / "JPEGImages", voc / "SegmentationClass"
    with pytest.raises(BadInput, match="writing there would overwrite"):
        claim_folder(images, images, NAMES, "masks")
    with pytest.raises(BadInput, match="would overwrite"):
        make_coco_candidates(coco(voc / "c.json"), images, images, NAMES, method="masks")
    make_labels(voc, ["a", "b"], workers=1)
    before = {path: path.read_bytes() for path in voc.rglob("*.*")}
    command = "evaluate.py", "--data", voc, "--labels", voc / "BoxMasks", "--split", "train"
    for flags in (("--pictures", truth), ("--save-png", images), ("--save-png", voc / "BoxMasks"),
                  ("--json", voc / "class_names.txt"), ("--json", voc / "ImageSets/Segmentation/train.txt"),
                  ("--trimap-plot", truth / "a.png"), ("--save-png", voc / "GrabCutMasks")):
        status, text = call(*command, *flags)
        assert status == 2 and "would overwrite" in text, flags
    np.save(voc / "p.npy", np.full((2, 60, 120), 0.5, np.float32))
    status, text = call("crf.py", images / "a.jpg", voc / "p.npy", "--out", images / "a.jpg")
    assert status == 2 and "is read from" in text
    assert {path: path.read_bytes() for path in before} == before
    keep_apart([tmp_path / "new", None], [images, None, tmp_path / "absent"])
    for script in ("train_box2seg.py", "train_boxsup.py"):
        status, text = call(script, "--data", voc, "--init", voc / "best.pt", "--out", voc, "--device", "cpu")
        assert status == 2 and "best.pt: lies in --out, where it would be overwritten" in text


# ---------------------------------------------------------------- 5: pixels mean what they say
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_colours_of_16_bits_are_refused(tmp_path, channels, ending):
    """Pillow reads them as 8 bits: the high bytes, which are 0 where 12 bits or fewer are used."""
    cv2.imwrite(str(tmp_path / f"deep.{ending}"), np.full((4, 5, channels), 4095, np.uint16))
    with pytest.raises(BadInput, match=f"deep.{ending}: its pixels have more than 8 bits"):
        read_image(tmp_path / f"deep.{ending}")


def test_a_bitmap_whose_rows_have_16_bytes_has_8_bits(tmp_path):
    for width in (5, 53, 160):                                   # rows of 16, 160 and 480 bytes
        cv2.imwrite(str(tmp_path / "a.bmp"), np.full((4, width, 3), (1, 2, 200), np.uint8))
        assert (read_image(tmp_path / "a.bmp") == (200, 2, 1)).all()


@pytest.mark.parametrize("mode, dtype", [("I;16", np.uint16), ("I", np.int32), ("F", np.float32)])
def test_pictures_of_more_than_8_bits_are_refused(tmp_path, mode, dtype):
    deep = np.tile(np.linspace(0, 255, 64), (48, 1)).astype(dtype) * 257
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    with pytest.raises(BadInput, match="deep.tif: its pixels have more than 8 bits.*save it with 8 bits"):
        read_image(tmp_path / "deep.tif")
    with pytest.raises(crf.BadInput, match="more than 8 bits"):
        crf.read_image(tmp_path / "deep.tif")


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "RGB"])
def test_pictures_of_8_bits_and_fewer_are_read(tmp_path, mode):
    Image.fromarray(PIXELS).convert(mode).save(path := tmp_path / f"a.{'tif' if mode == 'CMYK' else 'png'}")
    assert np.array_equal(read_image(path), np.array(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_picture_as_other_programs_do(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(path := tmp_path / f"a.{ending}", exif=exif)
    assert np.array_equal(read_image(path), np.array(ImageOps.exif_transpose(Image.open(path)).convert("RGB")))
    assert read_image(path).shape == ((60, 120, 3) if orientation < 5 else (120, 60, 3))


def test_no_odd_exif_tag_fails(tmp_path):
    """Cut off, of the wrong type, an orientation of 9, an unreadable block: what the orientation says, if there."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    good = exif.tobytes()
    for data, turned in [(good, True), (good[:-3], True), (b"Exif\0\0nonsense", False), (b"Exif\0\0", False),
                         (good[:14], False), (good.replace(b"\x06\0\0", b"\x09\0\0"), False),
                         (good.replace(b"\x01\x0e\0\x02", b"\x01\x0e\0\x07"), True),
                         (good.replace(b"\x01\x0e\0\x02", b"\x87\x69\0\x02"), True)]:
        Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=data)
        assert read_image(tmp_path / "a.jpg").shape == ((120, 60, 3) if turned else (60, 120, 3)), data


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", [0, 3])
def test_label_pngs_of_few_bits_hold_their_indices(tmp_path, bits, mode):
    labels = np.random.default_rng(bits).integers(0, 2 ** bits, (13, 21)).astype(np.uint8)
    png(tmp_path / "a.png", mode, labels, bits, voc_palette()[:2 ** bits] if mode == 3 else None)
    assert np.array_equal(read_label(tmp_path / "a.png"), labels)


def test_palettes_whose_colours_are_vocs_and_whose_indices_are_not(tmp_path):
    """Requantised: 0 has the colour of class 2, 1 that of the background. Colours of no class leave indices alone."""
    path, labels = tmp_path / "a.png", dog()
    for order, words in [([0, 1], None), ([2, 0], "colours are VOC's"), ([0, 2], "colours are VOC's"),
                         ([0, 15], "colours are VOC's"), ([0, 255], "colours are VOC's")]:
        png(path, 3, labels, 8, voc_palette()[order])
        if words:
            with pytest.raises(BadInput, match=f"a.png: its {words}"):
                read_label(path)
        else:
            assert np.array_equal(read_label(path), labels)
    for palette in ([[0, 0, 0], [255, 255, 255]], [[0, 0, 0]] * 2, np.arange(256)[:, None].repeat(3, 1),
                    [[128, 64, 128], [244, 35, 232]]):
        png(path, 3, labels, 8, palette)
        assert np.array_equal(read_label(path), labels)
    png(path, 3, labels, 8, voc_palette()[[0, 15]])                       # with 3 classes, no class has that colour
    assert np.array_equal(read_label(path, num_classes=3), labels)


def test_labels_are_png_and_of_8_bits(tmp_path):
    Image.fromarray(dog()).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").rename(tmp_path / "a.png")                       # lossy under another name
    with pytest.raises(BadInput, match="a.png: not a readable PNG"):
        read_label(tmp_path / "a.png")
    Image.fromarray(dog().astype(np.uint16) * 300).save(tmp_path / "a.png")
    with pytest.raises(BadInput, match="a.png: a I;16 image, not class indices"):
        read_label(tmp_path / "a.png")


# ---------------------------------------------------------------- 6: what was made otherwise is not reused
def test_labels_say_what_they_were_made_of(voc, capsys):
    made = make_labels(voc, ["a"], workers=1, working_size=100)
    source = read_source(voc / "GrabCutMasks")
    assert source["working_size"] == 100 and source["margin"] == 0.1 and source["boxes"] == "Annotations"
    assert source["class_names"] == NAMES and source["images"].samefile(voc / "JPEGImages")
    assert "working_size" not in read_source(voc / "BoxMasks")
    again = make_labels(voc, ["a", "b"], workers=1)                       # nothing said of options: the folder's
    assert again["made"] == 1 and again["source"] == made["source"]
    assert "made with {'working_size': 100}, not the defaults" in capsys.readouterr().err
    with pytest.raises(BadInput, match=r"GrabCutMasks/source.json: made with other working_size \(100, not 240\)"):
        make_labels(voc, ["a", "b"], workers=1, working_size=240)
    with pytest.raises(BadInput, match="BoxMasks/source.json: made with other boxes"):
        claim_folder(voc / "BoxMasks", voc / "JPEGImages", NAMES, "boxes", boxes="detector")
    status, text = call("grabcut_labels.py", "--data", voc)
    assert status == 2 and "made with other working_size" in text
    (voc / "class_names.txt").write_text("background\nbird\ncat\ndog\n")
    with pytest.raises(BadInput, match="BoxMasks/source.json: made with other class_names"):
        make_labels(voc, ["a", "b"], workers=1)
    with pytest.raises(BadInput, match="made with other class_names"):
        check_classes(voc / "BoxMasks", class_names(voc))
    status, text = call("evaluate.py", "--data", voc, "--labels", voc / "BoxMasks", "--split", "train")
    assert status == 2 and "made with other class_names" in text


def test_labels_of_unknown_make_are_kept_and_named(voc, capsys):
    write_label(voc / "GrabCutMasks/a.png", dog())
    summary = make_labels(voc, ["a", "b"], workers=1)
    assert summary["made"] == 2 and "GrabCutMasks: labels of unknown make" in capsys.readouterr().err
    assert not (voc / "GrabCutMasks/source.json").exists() and (voc / "BoxMasks/source.json").exists()
    assert summary["source"]["unknown make"] == ["GrabCutMasks"]            # so that --resume tells them from ours
    shutil.rmtree(voc / "GrabCutMasks")
    assert "unknown make" not in make_labels(voc, ["a", "b"], workers=1)["source"]


def test_detected_boxes_are_told_apart(voc):
    def detect(image):
        return np.array([[10, 10, 50, 30]], np.int32), np.array([2], np.uint8)

    detect.source = "one detector"
    make_labels(voc, ["a"], workers=1, detect=detect)
    detect.source = "another detector"
    with pytest.raises(BadInput, match=r"made with other boxes \(one detector, not another detector\)"):
        make_labels(voc, ["b"], workers=1, detect=detect)


def test_candidates_of_other_boxes_or_number_are_not_mixed(voc):
    folder = voc / "Candidates-gop"
    assert make_candidates(voc, ["a"], method="gop", workers=1, max_candidates=7)["made"] == 1
    assert make_candidates(voc, ["a", "b"], method="gop", workers=1)["candidates"] == 7      # the folder's number
    with pytest.raises(BadInput, match=r"made with other max_candidates \(7, not 9\)"):
        make_candidates(voc, ["a"], method="gop", max_candidates=9)
    with pytest.raises(BadInput, match=r"made with other boxes \(Annotations, not c.json\)"):
        make_coco_candidates(coco(voc / "c.json"), voc / "JPEGImages", folder, NAMES, method="gop")
    shutil.rmtree(folder)
    make_coco_candidates(voc / "c.json", voc / "JPEGImages", folder, NAMES, method="gop", workers=1, max_candidates=7)
    assert make_candidates(voc, ["a", "b"], method="gop")["skipped"] == 2   # complete: as train_boxsup.py takes them
    (folder / "a.npz").unlink()
    with pytest.raises(BadInput, match=r"made with other boxes \(c.json, not Annotations\)"):
        make_candidates(voc, ["a", "b"], method="gop")
    text = json.loads((folder / "source.json").read_text())
    (folder / "source.json").write_text(json.dumps({key: text[key] for key in ("images", "class_names", "method")}))
    assert make_candidates(voc, ["a", "b"], method="gop", workers=1)["made"] == 1    # an older version says less


def test_a_run_does_not_go_on_with_other_labels_or_candidates(tmp_path):
    """--resume with --label-dir, --candidates of another make, which the checkpoint's choices do not point into."""
    voc = Path(make_toy_voc(tmp_path / "toy", images=4, val=1, size=(40, 48)))
    flags = ("--data", voc, "--recipe", "small", "--crop", 32, "--batch-size", 2, "--epochs", 1, "--val-split", "none",
             "--workers", 0, "--device", "cpu", "--amp", "off")
    for script, other, make in (
            ("train_box2seg.py", "--label-dir", lambda out: make_labels(voc, ids, out, 1, working_size=100)),
            ("train_boxsup.py", "--candidates", lambda out: make_candidates(voc, ids, out, "mcg", 1, 9))):
        ids = read_list(voc / "ImageSets/Segmentation/train.txt")
        status, text = call(script, *flags, "--out", tmp_path / script)
        assert status == 0, text
        make(tmp_path / other)
        resume = script, "--resume", "--out", tmp_path / script
        status, text = call(*resume, other, tmp_path / other)
        assert status == 2 and f"give the {other}" in text, text
        assert call(*resume)[0] == 0


# ---------------------------------------------------------------- 7: one bad image never stops the others
def test_whatever_is_bad_in_one_image(voc, monkeypatch):
    def mask(image, *_, **__):
        if image[0, 0].sum() == 0:
            raise MemoryError("too large")
        return whole(image, *_, **__)

    whole = grabcut_labels.grabcut_mask
    monkeypatch.setattr(grabcut_labels, "grabcut_mask", mask)
    Image.fromarray(0 * PIXELS).save(voc / "JPEGImages/a.jpg")
    summary = make_labels(voc, ["a", "b"], workers=1)
    assert summary["made"] == 1 and summary["failures"] == ["a: MemoryError: too large"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX alone has such limits")
@pytest.mark.parametrize("script, flags", [
    ("grabcut_labels.py", ()), ("mcg_candidates.py", ("--method", "gop", "--workers", 1)),
    ("grabcut_labels.py", ("--image", "VOC/JPEGImages/a.jpg", "--box", 10, 10, 50, 30)),
    ("evaluate.py", ("--labels", "VOC/SegmentationClass", "--split", "train", "--pictures", "images")),
    ("train_box2seg.py", ("--loss", "mask", "--recipe", "small", "--batch-size", 2, "--device", "cpu", "--workers", 0,
                          "--crop", 32, "--epochs", 1))])
def test_a_full_disk_is_one_line(voc, script, flags):
    """No file may grow beyond a few bytes: what writing to a full disk looks like."""
    import resource
    flags = [str(flag).replace("VOC", str(voc)) for flag in flags]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
    status, text = process(script, "--data", voc, *flags, preexec_fn=limit, cwd=voc)
    assert status == 2 and sum("cannot be written" in line or "Errno" in line for line in text.splitlines()) == 1, text
    assert not list(voc.rglob("*.tmp"))


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="a.png: cannot be written .*--out"):
        write_label(tmp_path / "file/a.png", dog())


def test_another_drive_of_windows(voc, monkeypatch):
    def relpath(*_):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", relpath)
    assert make_labels(voc, ["a"], workers=1)["made"] == 1
    assert read_source(voc / "BoxMasks")["images"] == voc / "JPEGImages"
    assert make_labels(voc, ["a", "b"], workers=1)["made"] == 1


def test_a_value_error_of_ours_keeps_its_traceback(voc):
    """... and one of the user's, which model.py raises, does not."""
    text = ("import sys, losses, runpy; sys.argv[0] = sys.argv[1]; del sys.argv[1]\n"
            "def wrong(*_, **__): raise ValueError('ours')\n"
            "losses.cross_entropy_loss = losses.box2seg_loss = wrong\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", text, ROOT / "train_box2seg.py", "--data", voc, "--recipe", "small",
                           "--batch-size", "2", "--device", "cpu", "--workers", "0", "--pretrain-epochs", "0",
                           "--out", voc / "run"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "Traceback" in done.stderr and done.stderr.strip().endswith("ValueError: ours")
    (voc / "weights.pth").write_bytes(b"no weights")
    status, error = process("train_box2seg.py", "--data", voc, "--weights", voc / "weights.pth", "--recipe", "small",
                            "--batch-size", 2, "--device", "cpu", "--out", voc / "run2")
    assert status == 2 and "weights.pth: not a readable PyTorch file" in error


# ---------------------------------------------------------------- 8: endings
@pytest.mark.parametrize("ending", "JPG jpeg JPEG png PNG webp bmp tif tiff TIF".split())
def test_pictures_of_any_ending_are_found(voc, ending):
    (voc / "JPEGImages/a.jpg").unlink()
    Image.fromarray(PIXELS).save(voc / f"JPEGImages/a.{ending}")
    assert find_image(voc / "JPEGImages", "a") == voc / f"JPEGImages/a.{ending}"
    assert make_labels(voc, ["a", "b"], workers=1)["made"] == 2
    (voc / "JPEGImages" / "a.xmp").write_text("")                         # beside it, and no image
    assert find_image(voc / "JPEGImages", "a").suffix == f".{ending}"


def test_other_endings_in_coco_and_in_training(voc):
    for name, ending in (("a", "JPG"), ("b", "png")):
        (voc / f"JPEGImages/{name}.jpg").unlink()
        Image.fromarray(PIXELS).save(voc / f"JPEGImages/{name}.{ending}")
    images = [{"id": 1, "file_name": "a.JPG"}, {"id": 2, "file_name": "sub/b.png"}]
    summary = make_coco_candidates(coco(voc / "c.json", images=images), voc / "JPEGImages", voc / "Candidates-gop",
                                   NAMES, method="gop", workers=1, max_candidates=5)
    assert summary["made"] == 2
    for script in ("train_box2seg.py", "train_boxsup.py"):
        status, text = call(script, "--data", voc, "--recipe", "small", "--crop", 32, "--batch-size", 2, "--epochs", 1,
                            "--val-split", "train", "--workers", 0, "--device", "cpu", "--out", voc / script,
                            *(("--method", "gop") if "sup" in script else ("--pretrain-epochs", 0)))
        assert status == 0 and "mIoU" in text, text


def test_two_pictures_of_one_id_are_refused(voc, tmp_path):
    """A mask beside its image, say."""
    write_label(voc / "JPEGImages/a.png", dog())
    with pytest.raises(BadInput, match="a.jpg and a.png have one id: rename one, or move it out of"):
        find_image(voc / "JPEGImages", "a")
    assert "have one id" in make_labels(voc, ["a", "b"], workers=1)["failures"][0]
    os.link(voc / "JPEGImages/b.jpg", voc / "JPEGImages/b.JPG")           # one file of two names, as on Windows
    assert find_image(voc / "JPEGImages", "b").name == "b.jpg"


def test_what_macos_leaves_beside_files_is_skipped(voc, monkeypatch):
    monkeypatch.setattr(evaluate, "load_checkpoint", lambda *_: (None, NAMES))
    monkeypatch.setattr(evaluate, "crf_options", lambda *_: None)
    monkeypatch.setattr(evaluate, "class_probabilities", lambda *_: evaluate.torch.nn.functional.one_hot(
        evaluate.torch.from_numpy(2 * dog()).long()).permute(2, 0, 1))
    for folder, ending in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        (voc / folder / f"._a.{ending}").write_bytes(b"\0\5\x16\7")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = evaluate.main(["--checkpoint", "x", "--images", str(voc / "JPEGImages"), "--out", str(voc / "out"),
                                "--device", "cpu"])
    assert status == 0 and "2 label PNGs" in out.getvalue()
    shutil.copytree(voc / "SegmentationClass", voc / "copy")
    status, text = call("evaluate.py", "--data", voc, "--labels", voc / "copy", "--against", voc / "SegmentationClass")
    assert status == 0 and "2 images" in text
    with contextlib.redirect_stderr(io.StringIO()) as error:
        status = evaluate.main(["--checkpoint", "x", "--images", str(voc / "out/overlay"), "--out", str(voc / "out"),
                                "--device", "cpu"])
    assert status == 2 and "would overwrite" in error.getvalue()


# ---------------------------------------------------------------- 9: text is UTF-8
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_names_in_any_of_these_encodings(voc, encoding):
    (voc / "class_names.txt").write_bytes("background\r\ncat\r\nMöwe\r\n".encode(encoding))
    assert class_names(voc) == ["background", "cat", "Möwe"]
    path = coco(voc / "c.json", categories=[{"id": 2, "name": "Möwe"}])
    path.write_bytes(json.dumps(json.loads(path.read_text()), ensure_ascii=False).encode(encoding))
    assert read_coco(path, class_names(voc))[0]["a"][1] == [2]
    xml = '<?xml version="1.0" encoding="utf-16"?>' if encoding == "utf-16" else ""
    (voc / "Annotations/a.xml").write_bytes((xml + annotation(thing("Möwe"))).encode(encoding))
    assert read_boxes(voc / "Annotations/a.xml", class_names(voc), (60, 120))[1].tolist() == [2]


def test_the_first_name_of_labelmes_own_list_is_no_class(voc):
    (voc / "class_names.txt").write_text("__ignore__\n_background_\ncat\n")
    assert class_names(voc) == ["_background_", "cat"]


def test_a_locale_without_these_letters(voc):
    """LC_ALL=C with nothing of Python's own UTF-8, and a pipe in ASCII: read, written and printed all the same."""
    (voc / "class_names.txt").write_text("background\ndog\nMöwe\n", encoding="utf-8")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
                                "PYTHONIOENCODING": "ascii"}
    status, text = process("grabcut_labels.py", "--data", voc, env=environment)
    assert status == 0 and "no box of M\\xf6we" in text
    status, text = process("evaluate.py", "--data", voc, "--labels", voc / "BoxMasks", "--against",
                           voc / "GrabCutMasks", "--json", voc / "s.json", env=environment)
    assert status == 0 and json.loads((voc / "s.json").read_text(encoding="utf-8"))["iou"]["Möwe"] is None
    np.save(voc / "p.npy", np.full((2, *PIXELS.shape[:2]), 0.5, np.float32))
    status, text = process("crf.py", voc / "JPEGImages/a.jpg", voc / "p.npy", "--out", voc / "Möwe.png",
                           env=environment)
    assert status == 0 and "\\udcb6we.png: 0.0 %" in text and (voc / "Möwe.png").exists()


def test_vocs_own_names_are_a_list_of_its_own(tmp_path):
    class_names(tmp_path).append("changed")
    assert class_names(tmp_path) == VOC_CLASSES and len(VOC_CLASSES) == 21
