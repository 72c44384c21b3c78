"""Run rows of the papers' tables over several seeds and print them as a table, mean and spread.

    python tests/ablation.py --data toy/VOCdevkit                                     # Box2Seg, Table 3, 3 seeds
    python tests/ablation.py --data toy/VOCdevkit --paper boxsup                      # BoxSup, Tables 1 to 3
    python tests/ablation.py --data toy/VOCdevkit --rows grabcut box2seg --seeds 0 1 2 3 4
    python tests/ablation.py --data toy/VOCdevkit -- --epochs 30 --lr 0.01            # flags after -- go to every run

Each row is one command, such as `train_box2seg.py --loss ROW --seed SEED`, whose folder is OUT/ROW-SEED, and whose
output goes to OUT/ROW-SEED.log. The score is that of the last epoch, not of the best one: choosing the best epoch on
the pictures that are reported would flatter every row. A second call runs only what is missing, and goes on with what
was interrupted. Without a GPU as many runs go on side by side as there are cores, one core each, which does more than
one run on all of them.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_boxsup import find_voc, training_list

# row: (flags, mIoU in the paper on VOC 2012 val)
TABLES = {
    "box2seg": {  # Tables 3 and 4
        "box": (["--loss", "box"], 59.3), "grabcut": (["--loss", "grabcut"], 72.7),
        "affinity": (["--loss", "affinity"], 73.9), "aw-box": (["--loss", "aw-box"], 74.1),
        "aw-fr": (["--loss", "aw-fr"], 74.6), "box2seg": (["--loss", "box2seg"], 74.9),
        "mask": (["--loss", "mask"], 73.6), "mask-aw": (["--loss", "mask-aw"], 75.1),
        "filling-rate": (["--loss", "filling-rate"], "-")},
    "boxsup": {  # Tables 2, 3 and 1
        "rectangles": (["--labels", "rectangles"], 52.3), "grabcut": (["--labels", "grabcut"], 55.2),
        "no-sampling": (["--top-k", "1"], 59.7), "boxsup": ([], 62.0), "ss": (["--method", "ss"], 59.5),
        "gop": (["--method", "gop"], 60.4), "semi": (["--masks-list", "OUT/masks.txt"], 63.5),
        "masks": (["--labels", "masks"], 63.8)}}
DEFAULT = {"box2seg": ["box", "grabcut", "affinity", "aw-box", "aw-fr", "box2seg", "mask"],
           "boxsup": list(TABLES["boxsup"])}
ROOT = Path(__file__).resolve().parent.parent


def read_scores(folder):
    """A finished run's folder -> {"miou": of the last epoch, "masks": those of BoxSup's first and last labels}."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    masks = [record["mask_miou"] for record in records if "mask_miou" in record]
    return {"miou": [record["miou"] for record in records if "miou" in record][-1], "masks": masks[:1] + masks[-1:]}


def prepare(args, out):
    """Labels and candidates that several runs would otherwise make at the same time."""
    flags = ["--data", args.data] + (["--split", args.split] if args.split else [])
    made = [["grabcut_labels.py", *flags]] if args.paper == "box2seg" or "grabcut" in args.rows else []
    if args.paper == "boxsup":
        method_of = {"boxsup": "mcg", "no-sampling": "mcg", "semi": "mcg", "ss": "ss", "gop": "gop"}
        methods = {method_of[row] for row in args.rows if row in method_of}
        made += [["mcg_candidates.py", *flags, "--method", method] for method in sorted(methods)]
        voc = find_voc(args.data)  # "semi": every tenth image has a mask
        (out / "masks.txt").write_text("\n".join(training_list(voc, args.split)[0][::10]) + "\n")
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
    parser.add_argument("--jobs", type=int, default=1 if torch.cuda.is_available() else os.cpu_count(), metavar="N",
                        help="runs side by side (default here: %(default)s)")
    parser.add_argument("rest", nargs="*", help="after --: flags of the training script")
    args = parser.parse_args()
    table = TABLES[args.paper]
    args.rows = args.rows or DEFAULT[args.paper]
    if unknown := set(args.rows) - set(table):
        parser.error(f"--rows {' '.join(sorted(unknown))}: known are {' '.join(table)}")
    out = Path(args.out or f"runs/ablation-{args.paper}")
    out.mkdir(parents=True, exist_ok=True)
    settings = json.dumps({"paper": args.paper, "data": args.data, "recipe": args.recipe, "split": args.split,
                           "flags": args.rest})
    if (out / "settings.json").exists() and (out / "settings.json").read_text() != settings:
        sys.exit(f"{out} holds runs with other settings ({(out / 'settings.json').read_text()}): name another --out")
    (out / "settings.json").write_text(settings)
    prepare(args, out)

    waiting = []  # (folder, command), seed by seed: a table of all rows stands early
    for seed in args.seeds:
        for row in args.rows:
            folder = out / f"{row}-{seed}"
            command = [sys.executable, ROOT / f"train_{args.paper}.py", "--out", folder]
            if (folder / "last.pt").exists():
                command += ["--resume"]
            else:
                command += ["--data", args.data, "--recipe", args.recipe, "--seed", seed,
                            "--val-every", 1000,  # the last epoch alone
                            *(["--split", args.split] if args.split else []),
                            *(flag.replace("OUT", str(out)) for flag in table[row][0]),
                            *(["--workers", 0] if args.jobs > 1 else []), *args.rest]
            if not (folder / "done.json").exists():
                waiting.append((folder, list(map(str, command))))

    running, failed = {}, []  # process: its folder
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if args.jobs > 1 else {})
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                folder, command = waiting.pop(0)
                print("$", *command, flush=True)
                with open(f"{folder}.log", "a") as log:
                    running[subprocess.Popen(command, env=environment, stdout=log, stderr=log)] = folder
            time.sleep(0.5)
            for process in [process for process in running if process.poll() is not None]:
                folder = running.pop(process)
                if process.returncode:
                    failed.append(folder)
                    print(f"{folder}: failed, see {folder}.log", file=sys.stderr, flush=True)
                    continue
                scores = read_scores(folder)
                (folder / "done.json").write_text(json.dumps(scores))
                print(f"{folder}: {100 * scores['miou']:.1f} mIoU", flush=True)
    except KeyboardInterrupt:  # the runs have heard it too: they save and leave
        for process in running:
            process.wait()
        sys.exit("interrupted; the same command goes on")
    if failed:
        sys.exit(f"{len(failed)} runs failed; mended, the same command goes on")

    scores = {row: [json.loads((out / f"{row}-{seed}" / "done.json").read_text()) for seed in args.seeds]
              for row in args.rows}
    print(f"\nmIoU (%) on the validation pictures, last epoch, seeds {' '.join(map(str, args.seeds))}\n")
    print(f"{'row':14}{'mean':>7}{'+- std':>8}{'min':>7}{'max':>7}{'paper, VOC':>13}   over grabcut, seed by seed")
    for row in args.rows:
        values = [100 * score["miou"] for score in scores[row]]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        over = [100 * (a["miou"] - b["miou"]) for a, b in zip(scores[row], scores.get("grabcut", []))]
        line = (f"{row:14}{statistics.mean(values):7.1f}{spread:8.1f}{min(values):7.1f}{max(values):7.1f}"
                f"{table[row][1]:>13}   " + " ".join(f"{gain:+.1f}" for gain in over))
        if scores[row][0]["masks"]:
            first, last = ([100 * score["masks"][end] for score in scores[row]] for end in (0, -1))
            line += f"   masks {statistics.mean(first):.1f} -> {statistics.mean(last):.1f}"
        print(line)


if __name__ == "__main__":
    main()
