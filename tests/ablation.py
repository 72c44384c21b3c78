"""Run rows of Box2Seg's Table 3 (and 4) over several seeds and print them as a table, mean and spread.

    python tests/ablation.py --data toy/VOCdevkit                                     # all of Table 3, 3 seeds
    python tests/ablation.py --data toy/VOCdevkit --rows grabcut box2seg --seeds 0 1 2 3 4
    python tests/ablation.py --data toy/VOCdevkit -- --epochs 30 --lr 0.01            # flags after -- go to every run

Each row is the command `train_box2seg.py --loss ROW --seed SEED`, whose folder is OUT/ROW-SEED. The score is that of
the last epoch, not of the best one: choosing the best epoch on the pictures that are reported would flatter every row.
A second call runs only what is missing, and goes on with what was interrupted.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

TABLE3 = ["box", "grabcut", "affinity", "aw-box", "aw-fr", "box2seg"]
PAPER = {"box": 59.3, "grabcut": 72.7, "affinity": 73.9, "aw-box": 74.1, "aw-fr": 74.6, "box2seg": 74.9, "mask": 73.6,
         "mask-aw": 75.1}


def final_miou(folder, epochs):
    """mIoU of the last epoch of a finished run, None for one that is not finished."""
    log = folder / "log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    scores = [r["miou"] for r in records if "miou" in r and r["stage"] == 2 and r["epoch"] == epochs]
    return scores[-1] if scores else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="toy/VOCdevkit")
    parser.add_argument("--rows", nargs="+", default=TABLE3, choices=list(PAPER) + ["filling-rate"], metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", default="runs/ablation", help="default %(default)s")
    parser.add_argument("--recipe", default="small", help="default %(default)s")
    parser.add_argument("rest", nargs="*", help="after --: flags of train_box2seg.py")
    args = parser.parse_args()

    script = Path(__file__).resolve().parent.parent / "train_box2seg.py"
    scores = {row: [] for row in args.rows}
    for seed in args.seeds:  # seed by seed: a table of all rows stands early
        for row in args.rows:
            folder = Path(args.out) / f"{row}-{seed}"
            command = [sys.executable, script, "--out", folder]
            if (folder / "last.pt").exists():
                command += ["--resume"]
            else:
                command += ["--data", args.data, "--recipe", args.recipe, "--loss", row, "--seed", seed, *args.rest]
            done = folder / "done.json"
            if not done.exists():
                print("$", *map(str, command), flush=True)
                if subprocess.run(list(map(str, command))).returncode:
                    sys.exit(f"{row}, seed {seed} failed or was interrupted; the same command goes on")
                epochs = json.loads((folder / "log.jsonl").read_text().split("\n")[0])["args"]["epochs"]
                done.write_text(json.dumps({"miou": final_miou(folder, epochs)}))
            scores[row].append(json.loads(done.read_text())["miou"])

    print(f"\nmIoU (%) on the validation pictures, last epoch, seeds {' '.join(map(str, args.seeds))}\n")
    print(f"{'--loss':14}{'mean':>7}{'+- std':>8}{'min':>7}{'max':>7}{'paper, VOC':>13}   over grabcut, seed by seed")
    for row, values in scores.items():
        values = [100 * v for v in values]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        gain = [100 * (a - b) for a, b in zip(scores[row], scores.get("grabcut", []))]
        print(f"{row:14}{statistics.mean(values):7.1f}{spread:8.1f}{min(values):7.1f}{max(values):7.1f}"
              f"{PAPER.get(row, '-'):>13}   " + " ".join(f"{g:+.1f}" for g in gain))


if __name__ == "__main__":
    main()
