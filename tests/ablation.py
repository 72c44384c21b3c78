"""Run rows of the papers' tables over several seeds and print them as a table, mean and spread.

    python tests/ablation.py --data toy/VOCdevkit                                     # Box2Seg, Table 3, 3 seeds
    python tests/ablation.py --data toy/VOCdevkit --paper boxsup                      # BoxSup, Tables 1 to 3
    python tests/ablation.py --data animals/VOCdevkit --split half --recipe photos --budget 5 --stage-1 1
                                                      # photographs: 5 epochs for each row, one of them stage 1's
    python tests/ablation.py --data toy/VOCdevkit --rows grabcut box2seg --seeds 0 1 2 3 4
    python tests/ablation.py --data toy/VOCdevkit -- --lr 0.01                        # flags after -- go to every run

Each row is one command, such as `train_box2seg.py --loss ROW --seed SEED`, whose folder is OUT/ROW-SEED, and whose
output goes to OUT/ROW-SEED.log. The score is that of the last epoch, not of the best one: choosing the best epoch on
the images that are reported would flatter every row. A second call runs only what is missing, and goes on with what
was interrupted. Without a GPU as many runs go on side by side as there are cores, one core each, which does more than
one run on all of them. --record FILE keeps every finished run as a line of JSON, and takes what is there for done
where all its arguments are the same: those given, the defaults of its day, and the method's VERSION.
"""
import argparse
import importlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_boxsup
from grabcut_labels import VOC_CLASSES, BadInput, class_names, find_voc, read_boxes, read_label, write_label
from train_box2seg import ROWS
from train_boxsup import training_list, truth_file

# row: (flags, mIoU in the paper on VOC 2012 val). Flags name OUT, the folder of all runs, and SEED, and MISSING, the
# data with a tenth of the objects missing from its masks.
TABLES = {
    "box2seg": {  # Table 3, and Song et al.'s filling rates
        "box": (["--loss", "box"], 59.3), "grabcut": (["--loss", "grabcut"], 72.7),
        "affinity": (["--loss", "affinity"], 73.9), "aw-box": (["--loss", "aw-box"], 74.1),
        "aw-fr": (["--loss", "aw-fr"], 74.6), "box2seg": (["--loss", "box2seg"], 74.9),
        "aw-mask": (["--loss", "aw-mask"], "-"), "aw-flat": (["--loss", "aw-flat"], "-"),  # ours: attention is given
        "aw-one": (["--loss", "aw-one"], "-"), "filling-rate": (["--loss", "filling-rate"], "-"),
        # Table 4: true masks, and masks of which a tenth of the objects is missing, as in Fig. 7
        "mask": (["--loss", "mask"], 73.6), "mask-aw": (["--loss", "mask-aw"], 75.1),
        "mask-aw-gc": (["--loss", "mask-aw-gc"], 75.1),
        "mask-missing": (["--loss", "mask", "--data", "MISSING"], "-"),
        "mask-aw-missing": (["--loss", "mask-aw", "--data", "MISSING"], "-"),
        "mask-aw-gc-missing": (["--loss", "mask-aw-gc", "--data", "MISSING"], "-")},
    "boxsup": {  # Tables 2, 3 and 1
        "rectangles": (["--supervision", "rectangles"], 52.3), "grabcut": (["--supervision", "grabcut"], 55.2),
        "no-sampling": (["--top-k", "1"], 59.7), "boxsup": ([], 62.0), "ss": (["--method", "ss"], 59.5),
        "gop": (["--method", "gop"], 60.4), "semi": (["--masks-list", "OUT/masks.txt"], 63.5),
        "masks": (["--supervision", "masks"], 63.8)}}
# Table 5: Box2Seg's network, or ImageNet's, fine-tuned with a share of the masks. Every row takes as many steps as
# `tune` epochs of all images, to the nearest epoch of its own; the rows that start from ImageNet also those that
# Box2Seg had before.
for share, paper in (("0.05", 78.7), ("0.1", 83.1), ("1", 86.4)):
    TABLES["box2seg"][f"tuned-{share}"] = (["--loss", "mask", "--init", "OUT/box2seg-SEED/last.pt", "--masks", share],
                                           paper)
    TABLES["box2seg"][f"imagenet-{share}"] = (["--loss", "mask", "--masks", share], "-")
DEFAULT = {"box2seg": ["box", "grabcut", "affinity", "aw-box", "aw-fr", "box2seg", "mask"],
           "boxsup": list(TABLES["boxsup"])}
ROOT = Path(__file__).resolve().parent.parent
# Of the method: to be raised by a change that moves the numbers of runs with the same arguments, whose records then no
# longer count as done. 1 (records without a version): maps were stretched over images of any size (docs/results.md).
VERSION = 2


def budget_flags(args, row, flags):
    """--budget: the epochs of a row's stages, stage 1 included, so that every row sees as many images."""
    if not args.budget:
        return []
    if args.paper == "boxsup":
        return ["--epochs", args.budget]
    if row.startswith(("tuned", "imagenet")):
        epochs = args.tune + (args.budget if row.startswith("imagenet") else 0)
        share = float(flags[flags.index("--masks") + 1])
        # counted in steps, not images: an epoch leaves out what fills no batch, of few images as much as a third
        steps, fewer = (max(1, n // args.batch_size) for n in (args.images, round(share * args.images)))
        return ["--epochs", round(epochs * steps / fewer)]
    first = args.stage_1 if row in ("affinity", "box2seg") else 0
    return ["--pretrain-epochs", first, "--epochs", args.budget - first]


def flags_of(args, row, **places):
    """The flags of a row's run, all but its seed, and those that say where files lie and how the run is watched.
    places: what OUT, SEED and MISSING stand for."""
    flags = TABLES[args.paper][row][0]
    budget = budget_flags(args, row, flags)
    flags = [re.sub("OUT|SEED|MISSING", lambda name: str(places.get(name[0], name[0])), flag) for flag in flags]
    return list(map(str, ["--recipe", args.recipe, *(["--split", args.split] if args.split else []), *flags, *budget,
                          *args.rest]))


def arguments_of(args, row):
    """{name: value}: all that the training script makes of these flags, defaults included. Runs of one seed with the
    same arguments are the same run, wherever their files lie."""
    arguments = vars(importlib.import_module(f"train_{args.paper}").parse_arguments(flags_of(args, row))[0])
    elsewhere = ("data", "download", "out", "resume", "overwrite", "seed", "device", "workers", "log_every",
                 "save_every", "val_every")
    data = "MISSING" if row.endswith("missing") else "data"
    if row.startswith("tuned"):  # which network it starts from
        arguments["init"] = arguments_of(args, "box2seg")
    return {"data": data, "version": VERSION} | {name: value for name, value in arguments.items()
                                                 if name not in elsewhere}


def read_run(folder):
    """A finished run's folder -> mIoU of the last epoch, of BoxSup's first and last masks, what attention fills (eta',
    mean over the steps of the last epoch), and what it was run with."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    masks = [record["mask_miou"] for record in records if "mask_miou" in record]
    filled = [record for record in records if "eta'" in record]
    attention = [record["eta'"] for record in filled if record["epoch"] > filled[-1]["epoch"] - 1 + 1e-6]
    return {"miou": [record["miou"] for record in records if "miou" in record][-1], "masks": masks[:1] + masks[-1:],
            "attention": [statistics.mean(attention)] if attention else [], "git": records[0]["git"],
            "torch": records[0]["versions"]["torch"], "device": records[0]["device"], "date": time.strftime("%Y-%m-%d")}


def without_some_objects(data, split, out, share=0.1):
    """Fig. 7: data whose training masks miss a tenth of the objects, a fixed random choice: what is labelled with the
    object's class inside its box, and in no other box of the class, becomes background. Validation masks stay whole."""
    if (out / "missing" / "done").exists():
        return
    voc, rng = find_voc(data), np.random.default_rng(0)
    names = class_names(voc)
    with tempfile.TemporaryDirectory(dir=out) as folder:    # moved when it is whole: two commands may want it at once
        under_way = Path(folder) / "missing"
        made = under_way / "VOC2012"
        (made / "SegmentationClass").mkdir(parents=True)
        for part in ("JPEGImages", "Annotations", "ImageSets"):
            (made / part).symlink_to((voc / part).resolve())
        if names != VOC_CLASSES:
            shutil.copy(voc / "class_names.txt", made)
        for path in sorted((voc / "SegmentationClass").glob("*.png")):
            shutil.copyfile(path, made / "SegmentationClass" / path.name)
        removed = total = 0
        for image_id in training_list(voc, split)[0]:
            labels = read_label(truth_file(voc, image_id))
            boxes, classes = read_boxes(voc / "Annotations" / f"{image_id}.xml", names, labels.shape)
            for k in np.flatnonzero(rng.random(len(boxes)) < share):
                gone = np.zeros(labels.shape, bool)
                for j in [k, *(j for j in range(len(boxes)) if j != k and classes[j] == classes[k])]:
                    x0, y0, x1, y1 = boxes[j]
                    gone[y0:y1, x0:x1] = j == k
                labels[gone & (labels == classes[k])] = 0
                removed += 1
            total += len(boxes)
            write_label(made / "SegmentationClass" / f"{image_id}.png", labels)
        (under_way / "done").write_text(f"{removed} of {total} objects removed\n")
        try:
            under_way.rename(out / "missing")
        except OSError:
            if not (out / "missing" / "done").exists():     # not because the other command was faster
                raise
    print(f"{removed} of {total} objects removed from the masks of {out / 'missing'}")


def prepare(args, voc, out):
    """Labels and candidates that several runs would otherwise make at the same time."""
    flags = ["--data", args.data] + (["--split", args.split] if args.split else [])
    box2seg = args.paper == "box2seg"
    labelled = (ROWS.keys() - {"mask"}) & set(args.rows)
    made = [["grabcut_labels.py", *flags]] if box2seg and labelled or "grabcut" in args.rows else []
    if any("missing" in row for row in args.rows):
        without_some_objects(args.data, args.split, out)
        if any(row.startswith("mask-aw") and row.endswith("missing") for row in args.rows):
            made += [["grabcut_labels.py", "--data", str(out / "missing"), *flags[2:]]]
    if not box2seg:
        method_of = {"boxsup": "mcg", "no-sampling": "mcg", "semi": "mcg", "ss": "ss", "gop": "gop"}
        methods = {method_of[row] for row in args.rows if row in method_of}
        made += [["mcg_candidates.py", *flags, "--method", method] for method in sorted(methods)]
        # "semi": every tenth image has a mask
        (out / "masks.txt").write_text("\n".join(training_list(voc, args.split)[0][::10]) + "\n", encoding="utf-8")
    for script, *rest in made:
        print("$ python", script, *rest, flush=True)
        if subprocess.run([sys.executable, ROOT / script, *rest]).returncode:
            sys.exit(f"{script} failed")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--paper", default="box2seg", choices=list(TABLES), help="default %(default)s")
    parser.add_argument("--data", default="toy/VOCdevkit", help="default %(default)s")
    parser.add_argument("--split", help="list to train on (default: as the training script)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="default: those of Table 3, and mask; all of BoxSup's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", help="default runs/ablation-PAPER")
    parser.add_argument("--recipe", default="small", help="default %(default)s")
    parser.add_argument("--budget", type=int, metavar="EPOCHS", help="of every row, stage 1 included (default: the "
                        "recipe's epochs, and stage 1's on top)")
    parser.add_argument("--stage-1", type=int, default=1, metavar="EPOCHS", help="of them (default %(default)s)")
    parser.add_argument("--tune", type=int, default=2, metavar="EPOCHS", help="Table 5: fine-tuning takes as many "
                        "steps as so many epochs of all images (default %(default)s)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="keeps the finished runs, a line of JSON each; "
                        "one file for each data set")
    parser.add_argument("--jobs", type=int, default=1 if torch.cuda.is_available() else os.cpu_count(), metavar="N",
                        help="runs side by side (default here: %(default)s)")
    parser.add_argument("rest", nargs="*", help="after --: flags of the training script")
    args = parser.parse_args()
    table = TABLES[args.paper]
    args.rows, args.seeds = list(dict.fromkeys(args.rows or DEFAULT[args.paper])), list(dict.fromkeys(args.seeds))
    if unknown := set(args.rows) - set(table):
        parser.error(f"--rows {' '.join(sorted(unknown))}: known are {' '.join(table)}")
    if not args.budget and any(row.startswith(("tuned", "imagenet")) for row in args.rows):
        parser.error("--rows tuned-..., imagenet-...: need --budget, from which their steps are counted")
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    voc = find_voc(args.data)
    args.images = len(training_list(voc, args.split)[0])
    script = importlib.import_module(f"train_{args.paper}")
    args.batch_size = script.parse_arguments(["--recipe", args.recipe, *args.rest])[0].batch_size
    out = Path(args.out or f"runs/ablation-{args.paper}")
    out.mkdir(parents=True, exist_ok=True)
    arguments = {row: arguments_of(args, row) for row in table}
    if any(arguments[row]["val_split"] == "none" for row in args.rows):
        parser.error("--val-split none leaves nothing to compare")
    settings, here = {"paper": args.paper, "data": args.data, "arguments": arguments}, out / "settings.json"
    if not here.exists():  # never written anew: another command may be reading it
        here.write_text(json.dumps(settings))
    elif json.loads(here.read_text()) != settings:
        sys.exit(f"{out} holds runs with other settings (see {here}): name another --out")

    def done(row, seed):
        return (out / f"{row}-{seed}" / "done.json").exists()

    def waits_for_network(seed):  # Table 5 starts from box2seg's network, for which a record does not stand
        return any(row.startswith("tuned") and not done(row, seed) for row in args.rows)

    runs = []
    if args.record and args.record.exists():
        for number, line in enumerate(args.record.read_text().splitlines(), 1):
            try:
                runs.append(json.loads(line))
            except ValueError:
                sys.exit(f"{args.record}, line {number}: no record, perhaps cut off: delete the line")
    elif args.record:
        args.record.parent.mkdir(parents=True, exist_ok=True)
    for run in sorted(runs, key=lambda run: run["row"] == "box2seg"):   # when it is known what Table 5 lacks
        if run["paper"] == args.paper and run["arguments"] == arguments.get(run["row"]) and not (
                run["row"] == "box2seg" and waits_for_network(run["seed"])):
            (out / f"{run['row']}-{run['seed']}").mkdir(exist_ok=True)
            (out / f"{run['row']}-{run['seed']}" / "done.json").write_text(json.dumps(run))
    for folder in (out / f"box2seg-{seed}" for seed in filter(waits_for_network, args.seeds)):
        if not (folder / "last.pt").exists():
            (folder / "done.json").unlink(missing_ok=True)
        if "box2seg" not in args.rows and not (folder / "done.json").exists():
            parser.error(f"--rows tuned-...: start from {folder}/last.pt: add box2seg")
    prepare(args, voc, out)

    waiting = []  # (row, seed, command), seed by seed: a table of all rows stands early
    for seed in args.seeds:
        for row in args.rows:
            folder = out / f"{row}-{seed}"
            command = [sys.executable, ROOT / f"train_{args.paper}.py", "--out", folder]
            if (folder / "last.pt").exists():
                command += ["--resume"]
            else:
                flags = flags_of(args, row, OUT=out, SEED=seed, MISSING=out / "missing")
                command += ["--data", args.data, "--seed", seed, "--val-every", 1000,  # the last epoch alone
                            "--log-every", 1,           # for the mean of eta'
                            *(["--workers", 0] if args.jobs > 1 else []), *flags]
            if not done(row, seed):
                waiting.append((row, seed, list(map(str, command))))

    def ready(job):  # Table 5 starts from runs that have to be over
        return not job[0].startswith("tuned") or done("box2seg", job[1])

    running, failed = {}, []  # process: its job

    def stopped(*_):  # by a kill, which the runs have not heard, unlike Ctrl-C
        for process in running:
            process.terminate()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stopped)
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if args.jobs > 1 else {})
    try:
        while waiting or running:
            while len(running) < args.jobs and (job := next(filter(ready, waiting), None)):
                waiting.remove(job)
                print("$", *job[2], flush=True)
                with open(f"{out / job[0]}-{job[1]}.log", "a") as log:
                    running[subprocess.Popen(job[2], env=environment, stdout=log, stderr=log)] = *job, time.time()
            if not running:
                sys.exit(f"{len(waiting)} runs wait for others that failed")
            time.sleep(0.5)
            for process in [process for process in running if process.poll() is not None]:
                row, seed, command, started = running.pop(process)
                folder = out / f"{row}-{seed}"
                if process.returncode:
                    failed.append(folder)
                    print(f"{folder}: failed, see {folder}.log", file=sys.stderr, flush=True)
                    continue
                run = {"paper": args.paper, "row": row, "seed": seed, **read_run(folder),
                       "minutes": round((time.time() - started) / 60, 1), "arguments": arguments[row]}
                (folder / "done.json").write_text(json.dumps(run))
                if args.record:
                    with open(args.record, "a") as file:
                        file.write(json.dumps(run) + "\n")
                print(f"{folder}: {100 * run['miou']:.1f} mIoU", flush=True)
    except KeyboardInterrupt:  # the runs have heard it too: they save and leave
        for process in running:
            process.wait()
        sys.exit("interrupted; the same command goes on")
    if failed:
        sys.exit(f"{len(failed)} runs failed; fixed, the same command goes on")

    scores = {row: [json.loads((out / f"{row}-{seed}" / "done.json").read_text()) for seed in args.seeds]
              for row in args.rows}
    print(f"\nmIoU (%) on the validation images, last epoch, seeds {' '.join(map(str, args.seeds))}\n")
    print(f"{'row':16}{'mean':>7}{'+- std':>8}{'min':>7}{'max':>7}{'paper, VOC':>13}   over grabcut, seed by seed")
    for row in args.rows:
        values = [100 * score["miou"] for score in scores[row]]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        over = [100 * (a["miou"] - b["miou"]) for a, b in zip(scores[row], scores.get("grabcut", []))]
        line = (f"{row:16}{statistics.mean(values):7.1f}{spread:8.1f}{min(values):7.1f}{max(values):7.1f}"
                f"{table[row][1]:>13}   " + " ".join(f"{gain:+.1f}" for gain in over))
        if scores[row][0]["masks"]:
            first, last = ([100 * score["masks"][end] for score in scores[row]] for end in (0, -1))
            line += f"   masks {statistics.mean(first):.1f} -> {statistics.mean(last):.1f}"
        print(line)


if __name__ == "__main__":
    try:
        main()
    except (BadInput, train_boxsup.BadInput, train_boxsup.BadFile) as error:
        sys.exit(f"ablation.py: {error}")
    except KeyboardInterrupt:  # while labels or candidates were made, which stay
        sys.exit("interrupted; the same command goes on")
