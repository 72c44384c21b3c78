"""Train Box2Seg (Kulharia et al., ECCV 2020) from bounding boxes, its ablations, and the supervised rows beside it.

    python train_box2seg.py --data VOCdevkit                                   # Table 1: Box2Seg, 74.9 in the paper
    python train_box2seg.py --data VOCdevkit --loss grabcut                    # a row of Table 3
    python train_box2seg.py --data VOCdevkit --init runs/box2seg/last.pt --masks 0.1     # a row of Table 5
    python train_box2seg.py --data toy/VOCdevkit --recipe small --out runs/toy  # synthetic images, minutes on a laptop
    torchrun --nproc-per-node 4 train_box2seg.py --data VOCdevkit --sync-bn    # four GPUs, the same total batch
    python train_box2seg.py --resume --out runs/box2seg                        # go on where it stopped, bit for bit

Reads    VOC2012/{JPEGImages,Annotations,ImageSets/Segmentation}, and SegmentationClass or SegmentationClassAug to
         validate on, and to train on with --loss mask, mask-aw, mask-aw-gc.
Writes   VOC2012/{BoxMasks,GrabCutMasks} where missing (stage 0), and in --out:
         last.pt, best.pt   checkpoints for evaluate.py. Report last.pt's score: best.pt was selected on --val-split
         log.jsonl          first line the arguments, git revision, versions, device, seed; then a record every
                            --log-every steps: loss terms by their name in the paper (of the first process's share of
                            the batch), whether the gradient was clipped (0 or 1), learning rate, images per second;
                            and a record for each validation

The paper's pipeline (Fig. 3, Sect. 4.1) is three stages; **train_stage() below is the algorithm**, the last two:
    stage 0   boxes -> label maps B, GrabCut -> label maps M                  grabcut_labels.py
    stage 1   pre-train encoder, pyramid and beta's branch: Eq. 10 with M     losses.affinity_loss
    stage 2   train y, alpha and beta on Eq. 11                               losses.box2seg_loss
The rest of this file says what the rows of the tables train on (ROWS), with which settings (RECIPES), and hands
train_stage() its images and its network. What any training needs is in the last section of model.py.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import grabcut_labels
import losses
from grabcut_labels import BadInput as BadFile
from grabcut_labels import class_names, find_image, find_voc, read_image, read_label, read_list, require_a_class
from model import (BACKBONES, BadInput, Box2SegNet, Interrupted, Progress, add_common_arguments, barrier,
                   catch_interrupts, check_arguments, check_images, download_voc, finish, hold_folder, in_parallel,
                   make_optimizer, mixed_precision, normalize, parse, pick_device, place_network, print_rank0,
                   random_crop, rank_and_world, resume_run, run_script, save_checkpoint, say_what_a_crop_sees,
                   say_what_is_trained_on, say_without_effect, seed_of, sgd_step, start_log, start_processes, to_cells,
                   validate)

# What --loss trains on. Table 3: Box 59.3, GrabCut 72.7, Affinity 73.9, AW-box 74.1, AW-fr 74.6, Box2Seg 74.9 mIoU.
# Table 4: mask 73.6, mask-aw 75.1.
ROWS = {  #              cross-entropy on  its name   L_AW   L_alpha  L_A
    "box":          ("boxes",          "L_box",   False, None,    False),
    "grabcut":      ("grabcut",        "L_GC",    False, None,    False),
    "affinity":     ("grabcut",        "L_GC",    False, None,    True),
    "aw-box":       ("grabcut",        "L_GC",    True,  "box",   False),
    "aw-fr":        ("grabcut",        "L_GC",    True,  "fr",    False),
    # Ours, controls for AW-fr: attention is given, not learned: GrabCut's mask (alpha(i, c) = 1 where M is c, else 0),
    # gamma eta_c in the whole box, or 1; L_alpha^fr is 0 with each. What "aw-mask" gains over "grabcut" comes from
    # objects' pixels counting more, not from learning attention. "aw-flat" has as much attention as L_alpha^fr asks
    # for, spread evenly: what AW-fr gains over it is due to where attention lies (on 21 classes nothing measurable:
    # docs/results.md, "Box2Seg, 21 classes"). "aw-one" weighs the boxes more than either.
    "aw-mask":      ("grabcut",        "L_GC",    True,  "fr",    False),
    "aw-flat":      ("grabcut",        "L_GC",    True,  "fr",    False),
    "aw-one":       ("grabcut",        "L_GC",    True,  "fr",    False),
    "box2seg":      ("grabcut",        "L_GC",    True,  "fr",    True),
    "mask":         ("masks",          "L_CE",    False, None,    False),
    # PAPER SILENT: what keeps attention from 0 in Table 4. L_alpha^fr, with the filling rates of the true masks,
    # or in "mask-aw-gc" of GrabCut's, which ask for attention also where the truth lacks an object, see Fig. 7. (On 21
    # classes GrabCut's rates gain 1.1 points more with whole masks, and with objects missing as much as the true ones:
    # docs/results.md, "Box2Seg, 21 classes".)
    "mask-aw":      ("masks",          "L_CE",    True,  "fr",    False),
    "mask-aw-gc":   ("masks",          "L_CE",    True,  "fr",    False),
    "filling-rate": ("boxes",          "L_FR",    False, None,    False),  # Song et al. 2019, see Sect. 2
}
FIXED = ("aw-mask", "aw-flat", "aw-one")    # rows whose attention is given, so that no branch is trained for it

# --recipe sets these defaults; a flag of its own overrides each.
# PAPER SILENT: batch size, crop, and how long stage 1 lasts; 16 (DeepLab's of the time is 10 to 20), 321 (DeepLab's),
# and 5 epochs, an eighth of stage 2. The poly schedule runs anew in each stage. Of an epoch's random order those images
# that fill no batch wait for another epoch.
# PAPER SILENT: augmentation. Scale 0.5 to 2, flip and crop are what DeepLab and its kin of the time used; they had no
# jitter of colours, which is 0.3 here, in the paper's recipe too. (It matters little: on 21 classes "grabcut" has 41.0
# mIoU without it, 41.2 with it, one seed. Not measured: with --recipe paper.)
# PAPER SILENT: the power of the "polynomially decaying learning rate as in [7]", and whether it decays by steps or
# epochs; 0.9 and steps, as DeepLab's.
# DEPARTS: the paper prints lambda_AW 10, lambda_alpha 1 (Sect. 4.1). Eq. 3 and Eq. 8 have the same normaliser, so that
# attention grows only where y_c > exp(-lambda_alpha / lambda_AW): at 10 and 1 above 0.905, where no new network is, and
# it dies in the first steps. lambda_alpha = 5 lambda_AW holds it from y_c = 0.007 on; "printed" has the printed ones.
# DEPARTS: the paper prints one learning rate, 1e-4. The encoder, pretrained on ImageNet, has it here too; the new
# layers, pyramid and decoders, have ten times as much, as DeepLab's last layer. In shorter runs with the paper's
# product of steps and rate one rate for all gave 10.2 mIoU on 21 classes, ten times as much for the new layers 44.3
# (docs/results.md, "The printed learning rate"). "printed" has 1e-4 for all. Not measured: with ResNet-101.
# With --init (Table 5) these layers keep their rate, though they are not new: with a tenth of it 5 % of the masks
# harmed less, and all of them gained nothing (docs/results.md, "Table 5").
# PAPER SILENT: a setting for photographs without a large GPU; "photos" is ours: an encoder that a laptop can train,
# which knows its classes from ImageNet, and so keeps its BatchNorm and learns at a tenth of the rate; lambda_AW 0.3
# and lambda_alpha 1.5 are chosen on photographs held out of training (docs/results.md, "Weights of the losses").
# PAPER SILENT: a setting for networks that start from scratch; "small" is ours, for synthetic images.
PAPER = dict(backbone="resnet101", pretrained=True, crop=321, batch_size=16, epochs=40, pretrain_epochs=5, lr=1e-3,
             encoder_lr=0.1, freeze_bn=False, lambda_aw=1.0, lambda_alpha=5.0, lambda_a=1.0, clip_norm=0.0,
             scale=[0.5, 2.0], val_scale=1.0)
RECIPES = {
    "paper": PAPER,
    "printed": PAPER | dict(lr=1e-4, encoder_lr=1.0, lambda_aw=10.0, lambda_alpha=1.0),
    "photos": PAPER | dict(backbone="efficientnet_lite0", crop=193, batch_size=8, epochs=20, pretrain_epochs=2,
                           lr=0.02, freeze_bn=True, lambda_aw=0.3, lambda_alpha=1.5, clip_norm=10.0,
                           scale=[0.5, 1.0], val_scale=0.7),
    "small": PAPER | dict(backbone="resnet18", pretrained=False, crop=129, batch_size=8, epochs=8, pretrain_epochs=2,
                          lr=0.02, encoder_lr=1.0, clip_norm=10.0),
}


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm
# ---------------------------------------------------------------------------------------------------------------------

def train_stage(stage, network, crops, optimizer, rates, autocast, scaler, args, progress):
    """Sect. 3.5 and 4.1, one stage by SGD. "We train our network in two stages": stage 1 minimizes Eq. 10 "using M_i in
    place of y_i", stage 2 minimizes Eq. 11, or what --loss names in its place.

    crops: a dataset of (image, B, M, fill), see Crops; a batch is image (N, H, W, 3), the others (N, H, W), all uint8.
        M: labels of the cross-entropy, GrabCut's; in some rows the boxes or the ground truth, see ROWS
        fill: labels whose filling rate eta attention has to reach; M, except in "mask-aw-gc"
    rates: (L,) filling rate of each class for --loss filling-rate, otherwise None
    """
    _, name, with_aw, regularizer, with_a = ROWS[args.loss]
    num_classes, device = network.arch["num_classes"], next(network.parameters()).device
    for branch in (network.segmentation, network.attention):    # "after the pretraining phase, we enable the decoder
        if branch is not None:                                  # branch to also output y and alpha"
            branch.requires_grad_(stage == 2)
    model = in_parallel(network, args.compile)
    sampling = torch.Generator(device)

    for step, (image, B, M, fill) in progress.steps(crops, progress.total, args.seed + stage, device):
        lr = args.lr * (1 - step / progress.total) ** args.power    # "a polynomially decaying learning rate as in [7]"
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]

        with autocast:
            # (N, L+1, h, w), (N, L, h, w), (N, d, h, w); the first two None in stage 1
            logits, attention, beta = model(normalize(image), embedding_only=stage == 1)
        # PAPER SILENT: how B and M get to m = n / 16. Each cell takes the label of its pixel, so that no label is
        # blended with another; fill rates (Eq. 7) are those of the crop, on this grid.
        B, M, fill = (to_cells(labels, network) for labels in (B, M, fill))     # (N, h, w)
        num_samples = None
        if beta is not None:                                    # "randomly sampling 10% of pixel pairs"
            sampling.manual_seed(seed_of(args.seed, stage, step, rank_and_world()[0]))
            num_samples = losses.pair_samples(M, num_classes, args.pair_fraction)

        if stage == 1:                                          # Eq. 10, M in place of y
            loss = losses.affinity_loss(beta, one_hot(M, num_classes), M, num_samples, sampling)
            terms = {"L_A": loss}
        elif args.loss == "filling-rate":                       # Sect. 2: a hard choice of pixels instead of attention
            loss = losses.filling_rate_loss(logits, B, rates)
            terms = {name: loss}
        else:                                                   # Eq. 11
            alpha = None if attention is None else attention.float().sigmoid()
            if args.loss in FIXED:
                alpha = given_attention(args.loss, B, M, num_classes, args.gamma)
            loss, terms = losses.box2seg_loss(
                logits, alpha, beta, B, M, num_samples, fill_labels=fill,
                lambda_aw=args.lambda_aw if with_aw else 0, lambda_alpha=args.lambda_alpha,
                lambda_a=args.lambda_a if with_a else 0, regularizer=regularizer, gamma=args.gamma,
                detach_targets=args.detach_targets, generator=sampling)
            terms = {name if term == "L_GC" else term: value for term, value in terms.items()}
            if alpha is not None:                               # Eq. 8, for the log: does attention live?
                terms["eta'"] = mean_fill(alpha.detach(), B)

        clipped = sgd_step(loss, model, optimizer, scaler, args.clip_norm)
        progress.finish_step(lr, terms | {"L": loss}, clipped)


def one_hot(labels, num_classes):
    """Label maps (N, h, w), 255 in no class -> (N, num_classes, h, w) float32."""
    return (labels[:, None] == torch.arange(num_classes, device=labels.device).view(1, -1, 1, 1)).float()


def given_attention(loss, B, M, num_classes, gamma):
    """The attention of our controls, the rows in FIXED, see ROWS: (N, L, h, w)."""
    mask = one_hot(M, num_classes)[:, 1:]
    if loss == "aw-mask":
        return mask
    if loss == "aw-flat":
        return (gamma * losses.fill_rate(M, B, num_classes))[:, :, None, None].expand_as(mask)
    return torch.ones_like(mask)    # aw-one


def mean_fill(alpha, B):
    """How much of the boxes attention fills, for the log: Eq. 8, mean over the classes that have a box, 0 in a batch
    without boxes. alpha (N, L, h, w), B (N, h, w) -> scalar."""
    present = losses.fill_rate(B, B, alpha.shape[1] + 1)        # (N, L), 1 for a class with a box
    return losses.attention_fill_rate(alpha, B).sum() / present.sum().clamp(min=1)


def dead_attention(means):
    """Means of an epoch's terms -> a warning if attention filled next to nothing, or None."""
    if means.get("eta'", 1.0) < 0.05:
        return ("attention is dead: it fills less than 5 % of the boxes, and L_AW is little more than the background's "
                "loss; if it stays so, give --lambda-alpha at least 5 times --lambda-aw, and aw-fr rather than aw-box")


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

class Crops(torch.utils.data.Dataset):
    """(epoch, index) -> image (crop, crop, 3) and three label maps (crop, crop), all uint8: B, M and fill, as
    train_stage() has them. Rows without L_AW (ROWS) use one label map and get it three times.

    A crop depends on (seed, stage, epoch, index) alone, not on the worker or on earlier crops. So a run can be repeated
    with any number of workers, and resumed in the middle of an epoch.
    """
    stage = 1                     # main() counts up: stage 2 sees other views than stage 1

    def __init__(self, voc, labels_dir, kinds, ids, num_classes, crop, scale_range, colour, seed):
        self.voc, self.labels_dir, self.kinds, self.ids = voc, labels_dir, kinds, ids
        self.num_classes, self.view, self.seed = num_classes, (crop, scale_range, colour), seed

    def __len__(self):
        return len(self.ids)

    def files(self, index):
        """-> [image, label map, ...] in the order of kinds, of which the last is for the cross-entropy."""
        image_id = self.ids[index]
        where = {"boxes": self.labels_dir / "BoxMasks" / f"{image_id}.png",
                 "grabcut": self.labels_dir / "GrabCutMasks" / f"{image_id}.png",
                 "masks": truth_file(self.voc, image_id)}
        return [find_image(self.voc / "JPEGImages", image_id), *(where[kind] for kind in self.kinds)]

    def __getitem__(self, key):
        # An unreadable image stops training (grabcut_labels.py only skips it): training without it would be another
        # run. Little is lost: once the file is fixed, --resume goes on, with one process from this very step.
        epoch, index = key
        image_file, *label_files = self.files(index)
        image = read_image(image_file)
        maps = [read_label(path, image.shape[:2], self.num_classes) for path in label_files]
        rng = np.random.default_rng((self.seed, epoch, index, self.stage))
        image, maps = random_crop(image, maps, rng, *self.view)
        fill = maps[1] if len(maps) > 1 else maps[0]    # maps: [M]; [B, M]; or, in mask-aw-gc, [B, fill, M]
        return image, maps[0], maps[-1], fill


# ==== shared block "lists and truth": equal to the byte in train_box2seg.py and train_boxsup.py
def open_data(args, saved):
    """--data, after --download (not in a run that goes on) -> the folder that holds JPEGImages."""
    if args.download and not saved and rank_and_world()[0] == 0:
        download_voc(args.download, args.data)
    barrier()
    try:
        return find_voc(args.data)
    except BadFile as error:
        raise BadInput(f"{error}; three ways on: --download fetches VOC 2012; python tests/toy_voc.py {args.data} "
                       "makes a small set; for boxes of your own see README.md, 'Your own boxes'") from None


def training_list(voc, split):
    """-> (ids, path of the list). --split, or trainaug.txt (the 10,582 images) where it exists, otherwise train.txt."""
    folder = voc / "ImageSets" / "Segmentation"
    for name in [split] if split else ["trainaug", "train"]:
        if (folder / f"{name}.txt").exists():
            return read_list(folder / f"{name}.txt"), folder / f"{name}.txt"
    wanted = f"{split}.txt" if split else "trainaug.txt or train.txt"
    raise BadInput(f"no image list {folder}/{wanted}: write one, an image id (file name without .jpg) a line")


def validation_list(voc, split, num_classes):
    """--val-split -> ids with ground-truth masks; [] for "none", or for the default "val" where there is no val.txt.
    Reads every mask now, so that a broken one does not stop the run after its first epoch."""
    path = voc / "ImageSets" / "Segmentation" / f"{split}.txt"
    if split == "none" or (split == "val" and not path.exists()):
        print_rank0("no validation: no list of images with true masks")
        return []
    ids = read_list(path)
    for file in (f for i in ids for f in (find_image(voc / "JPEGImages", i), truth_file(voc, i))):
        if not file.exists():
            raise BadInput(f"no {file} to validate on: add it, or give --val-split none")
    require_a_class(truth_file(voc, i) for i in ids)
    if rank_and_world()[0] == 0:
        for i in tqdm(ids, "validation list", leave=False, unit="image", disable=None):
            read_pair(voc, num_classes, i)
    return ids


def truth_file(voc, image_id):
    """Ground-truth mask of an image: VOC's, or, for the 9,000 extra images (SBD), the one in SegmentationClassAug."""
    own, extra = (voc / folder / f"{image_id}.png" for folder in ("SegmentationClass", "SegmentationClassAug"))
    return extra if extra.exists() and not own.exists() else own


def read_pair(voc, num_classes, image_id):
    """-> image (H, W, 3) and true labels (H, W), uint8."""
    image = read_image(find_image(voc / "JPEGImages", image_id))
    return image, read_label(truth_file(voc, image_id), image.shape[:2], num_classes)
# ==== end of shared block


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------

def parse_arguments(argv):
    """-> (arguments, {name: value} of those that were given on the command line)."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="(paper): the value is Box2Seg's. (ours): the paper does not say, or we depart from it. Learning rate\n"
               "and loss weights belong together: see README.md, 'Learning rate and loss weights'.")
    add_common_arguments(parser, RECIPES, "runs/LOSS")
    add = parser.add_argument_group("supervision").add_argument
    add("--label-dir", metavar="DIR", help="folder of BoxMasks/ and GrabCutMasks/, which are made if missing (default: "
        "in --data)")
    add("--loss", default="box2seg", choices=list(ROWS), help="row of Table 3 or 4; filling-rate: Song et al.; "
        "aw-mask, aw-flat, aw-one (ours): attention is GrabCut's mask, gamma eta_c, or 1 (default %(default)s)")
    add("--masks", type=float, default=1.0, metavar="FRACTION", help="train on the true masks of this fixed "
        "random fraction of the images; without --loss it means --loss mask (paper, Table 5: 0.05, 0.1, 1; default "
        "%(default)s)")

    add = parser.add_argument_group("network").add_argument
    add("--backbone", choices=BACKBONES, help="(paper: resnet101; default %(default)s)")
    add("--embedding-dim", type=int, default=64, help="d of the embeddings beta (ours: %(default)s)")
    add("--width", type=int, help="channels of pyramid and decoders (ours: 256; the small encoders: 64)")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=int, help="epochs of stage 2 (paper: 40; default %(default)s)")
    add("--pretrain-epochs", type=int, help="epochs of stage 1, embedding alone; 0 for none (ours: 5; "
        "default %(default)s)")
    add("--batch-size", type=int, help="over all processes (ours: 16; default %(default)s)")
    add("--lr", type=float, help="initial learning rate; the encoder's is --encoder-lr times as much (paper: 1e-4 "
        "for both; default %(default)s)")
    add("--momentum", type=float, default=0.9, help="(paper: %(default)s)")
    add("--weight-decay", type=float, default=5e-4, help="(paper: %(default)s)")
    add("--power", type=float, default=0.9, help="lr = initial (1 - step / steps)^power (DeepLab's: %(default)s)")
    add("--clip-norm", type=float, help="clip the gradient to this norm; 0: no clipping (ours; default %(default)s)")
    add("--lambda-aw", type=float, help="weight of L_AW (paper: 10, which kills attention; default %(default)s)")
    add("--lambda-alpha", type=float, help="weight of L_alpha (paper: 1; ours: at least 5 times --lambda-aw; default "
        "%(default)s)")
    add("--lambda-a", type=float, help="weight of L_A (paper: 1; default %(default)s)")
    add("--gamma", type=float, default=0.7, help="share of GrabCut's filling rate to reach (paper: %(default)s)")
    add("--pair-fraction", type=float, default=0.1, help="share of the pixel pairs that L_A sees (paper: %(default)s "
        "in stage 1)")
    add("--detach-targets", action="store_true", help="L_A in stage 2 trains the embeddings only, not y (ours: off)")

    add = parser.add_argument_group("augmentation").add_argument
    add("--crop", type=int, help="side of the training crops, 32 k + 1 pixels (ours: 321; default %(default)s)")
    add("--scale", type=float, nargs=2, metavar=("MIN", "MAX"), help="random scale (ours: 0.5 2; default "
        "%(default)s)")
    add("--colour", type=float, default=0.3, help="brightness, contrast, saturation times a random 1 +- this (ours: "
        "%(default)s)")
    add("--val-scale", type=float, help="validation images go through the network "
        "at this scale; scores are at full size (ours: 1; default %(default)s)")
    return parse(parser, RECIPES, argv)


def check(args, device, out):
    """What can be seen to be wrong before any work is done."""
    check_arguments(args, device, out, [
        (args.epochs >= 1, f"--epochs {args.epochs}: expected at least 1"),
        (min(args.pretrain_epochs, args.lambda_aw, args.lambda_alpha, args.lambda_a) >= 0,
         "--pretrain-epochs, --lambda-*: expected 0 or more"),
        (args.resume or 0 <= args.gamma <= 1, f"--gamma {args.gamma}: expected a share, 0 to 1"),
        (args.resume or args.power >= 0, f"--power {args.power}: expected 0 or more"),
        (0 < args.pair_fraction <= 1, f"--pair-fraction {args.pair_fraction}: expected above 0 and at most 1"),
        (args.embedding_dim >= 1 and (args.width or 1) >= 1, "--embedding-dim, --width: expected 1 or more"),
        (0 < args.masks <= 1, f"--masks {args.masks}: expected a fraction of the images, above 0 and at most 1"),
        (args.masks == 1 or ROWS[args.loss][0] == "masks", "--masks goes with --loss mask, mask-aw or mask-aw-gc")])


# ---------------------------------------------------------------------------------------------------------------------
# The whole run
# ---------------------------------------------------------------------------------------------------------------------

def without_effect(args):
    """Names of the arguments that the row --loss ignores."""
    target, _, with_aw, regularizer, with_a = ROWS[args.loss]
    names = set() if target == "masks" else {"masks"}
    if args.loss == "mask":
        names |= {"label_dir"}
    if not with_a:
        names |= {"lambda_a"}
    if not with_a or not args.lambda_a:
        names |= {"pretrain_epochs", "pair_fraction", "detach_targets", "embedding_dim"}
    if not with_aw:
        names |= {"lambda_aw"}
    if not with_aw or not args.lambda_aw or args.loss in FIXED:
        names |= {"lambda_alpha"}
    if not with_aw or not args.lambda_aw or args.loss in ("aw-mask", "aw-one") or regularizer == "box":
        names |= {"gamma"}
    return names


def training_images(voc, args):
    """--split and --masks -> (ids, the file that names them)."""
    ids, list_file = training_list(voc, args.split)
    # PAPER SILENT: which images have masks in Table 5, the loss and the schedule of its fine-tuning; a random choice,
    # the same whatever the seed of the run, cross-entropy on these images alone, and the schedule of stage 2.
    # (True masks for a share of the images and GrabCut's for all others did no better: docs/results.md, "Table 5".)
    if args.masks < 1:
        keep = np.random.default_rng(0).permutation(len(ids))[:max(1, round(args.masks * len(ids)))]
        ids = [ids[i] for i in sorted(keep)]
    return ids, list_file


def make_crops(voc, ids, list_file, num_classes, args, with_aw, saved):
    """Stage 0: B and M (Sect. 3.1), made where they are missing -> Crops, whose files are all there, and what B and M
    were made of."""
    target = ROWS[args.loss][0]
    kinds = (["boxes"] if with_aw else []) + (["grabcut"] if args.loss == "mask-aw-gc" else []) + [target]
    made_of = saved and saved.get("made_of")
    if kinds != ["masks"] and rank_and_world()[0] == 0:
        summary = grabcut_labels.make_labels(voc, ids, out=args.label_dir, workers=args.workers)
        if summary["failures"]:
            raise BadInput(f"{len(summary['failures'])} images got no labels ({summary['failures'][0]}): fix them or "
                           f"take them off {list_file}")
        if made_of not in (None, summary["source"]):
            raise BadInput(f"{args.label_dir or voc}: the run had labels of {made_of}, not of {summary['source']}: "
                           "give the --label-dir that it had")
        made_of = summary["source"]
        if saved and summary["corrected"]:
            print_rank0(f"labels of {summary['corrected']} images were made anew, since their annotations are newer: "
                        "from here on the run learns from these")
    barrier()
    crops = Crops(voc, Path(args.label_dir or voc), kinds, ids, num_classes, args.crop, tuple(args.scale), args.colour,
                  args.seed)
    for index in range(len(ids)):
        for path in crops.files(index):
            if not path.exists():
                raise BadInput(f"no {path}, which {list_file} names: add it or take its id off the list")
    if target == "masks":
        require_a_class(crops.files(index)[-1] for index in range(len(ids)))
    return crops, made_of


def main(argv):
    args, given = parse_arguments(argv)
    if "masks" in given and "loss" not in given:
        args.loss = "mask"  # Table 5
    out, saved = Path(args.out or f"runs/{args.loss}"), None
    if args.resume:
        saved, args = resume_run(args, given, out, may_differ={"label_dir"})
    device = pick_device(args.device)
    check(args, device, out)
    device = start_processes(args, device)
    say_without_effect(without_effect(args), given, f"with --loss {args.loss}")

    # ---- images and labels
    voc = open_data(args, saved)
    names = class_names(voc)
    ids, list_file = training_images(voc, args)
    print_rank0(f"{len(ids)} training images from {list_file}, {len(names) - 1} classes"
                + (" (the paper's list has 10582 images)" if list_file.name == "trainaug.txt" else ""))
    check_images(ids, names, list_file, args, saved, out)
    _, _, with_aw, _, with_a = ROWS[args.loss]
    with_aw, with_a = with_aw and args.lambda_aw > 0, with_a and args.lambda_a > 0  # no branch that nothing trains
    val_ids = validation_list(voc, args.val_split, len(names))
    say_what_is_trained_on(ids, val_ids, args.val_split)
    crops, made_of = make_crops(voc, ids, list_file, len(names), args, with_aw, saved)
    if not saved:
        say_what_a_crop_sees(crops.files, len(ids), args)
    rates = None
    if args.loss == "filling-rate":
        rates = grabcut_labels.class_fill_rates(voc, ids, out=args.label_dir).to(device)

    # ---- network
    torch.manual_seed(args.seed)
    network = Box2SegNet(len(names), args.backbone, args.embedding_dim, width=args.width,
                         attention=with_aw and args.loss not in FIXED, embedding=with_a,
                         weights=None if saved else args.weights,
                         pretrained=args.pretrained and not (args.weights or args.init or saved))
    network = place_network(network, args, saved, names, device)
    args.amp, autocast, scaler = mixed_precision(args.amp, device)

    # ---- both stages, from the first step or from where the run stopped
    first_stage, first_step, best = (saved["stage"], saved["step"], saved["best"]) if saved else (1, 0, 0.0)
    if saved:
        scaler.load_state_dict(saved["scaler"])
    hold_folder(out)
    start_log(out, args, device, saved, len(ids), names, stage=first_stage, step=first_step)
    interrupted = catch_interrupts()
    read = partial(read_pair, voc, len(names))
    per_epoch = len(ids) // args.batch_size
    # PAPER SILENT: whether Table 3's rows without L_A have a stage 1, and whether its epochs are among the 40. Here
    # they have none, and the 40 are stage 2's; tests/ablation.py --budget gives all rows as many epochs.
    for stage, epochs in ((1, args.pretrain_epochs if with_a else 0), (2, args.epochs)):
        step = first_step if stage == first_stage else 0
        if stage < first_stage or step >= epochs * per_epoch:
            continue
        crops.stage = stage
        optimizer = make_optimizer(network, args)
        if saved and stage == first_stage:
            optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["rng"])  # nothing here draws from it any more; a dropout that you add would
            if saved["cuda_rng"] is not None and device.type == "cuda":
                torch.cuda.set_rng_state(saved["cuda_rng"], device)

        def save(name, step, best):
            save_checkpoint(out / name, network, optimizer, scaler, args, names, ids, stage=stage, step=step, best=best,
                            made_of=made_of, rng=torch.get_rng_state(),
                            cuda_rng=torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

        def score():
            confusion = validate(network, val_ids, read, args.val_scale, losses.confusion_matrix)
            return losses.iou(confusion).nanmean().item()

        progress = Progress(args, out, save, score if stage == 2 and val_ids else None, interrupted,
                            title=f"stage {stage}", where={"stage": stage}, step=step, epochs=epochs,
                            per_epoch=per_epoch, best=best, remark=dead_attention)
        try:
            train_stage(stage, network, crops, optimizer, rates, autocast, scaler, args, progress)
        except Interrupted as where:
            print_rank0(f"interrupted {where}; to go on: python train_box2seg.py --resume --out {out}")
            return 130
        best = progress.best
    finish(out, best)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, "train_box2seg.py", [BadFile], "--out or --label-dir"))
