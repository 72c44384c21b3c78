"""tests/ablation.py, candidate_quality.py and bench.py as somebody would call them, on a few tiny pictures."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_voc import make_toy_voc

HERE = Path(__file__).resolve().parent
TINY = "--crop 32 --batch-size 4 --epochs 2 --scale 0.5 1 --workers 0 --device cpu --amp off --seed 0".split()


def call(script, *arguments, folder, status=0):
    process = subprocess.run([sys.executable, HERE / script, *map(str, arguments)], cwd=folder, capture_output=True,
                             text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.returncode == status, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A devkit, and BoxSup's ablation of two rows on it."""
    folder = tmp_path_factory.mktemp("tools")
    make_toy_voc(folder / "VOCdevkit", images=8, val=3, size=(48, 64), seed=0)
    ablation(folder)
    return folder


def ablation(folder):
    return call("ablation.py", "--data", "VOCdevkit", "--paper", "boxsup", "--rows", "rectangles", "boxsup",
                "--seeds", 3, "--", *TINY, "--warm-up", 1, folder=folder)


def test_ablation_prints_rows_and_runs_nothing_twice(folder):
    out = folder / "runs" / "ablation-boxsup"
    scores = {row: json.loads((out / f"{row}-3" / "done.json").read_text()) for row in ("rectangles", "boxsup")}
    logged = [json.loads(line) for line in (out / "boxsup-3" / "log.jsonl").read_text().splitlines()]
    assert scores["boxsup"]["miou"] == logged[-1]["miou"] and logged[0]["args"]["seed"] == 0  # flags after -- win
    assert len(scores["boxsup"]["masks"]) == 2 and scores["rectangles"]["masks"] == []
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}
    printed = ablation(folder)
    rows = {line.split()[0]: line.split()[1] for line in printed.splitlines() if line.startswith(tuple(scores))}
    assert rows == {row: f"{100 * score['miou']:.1f}" for row, score in scores.items()}
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")} == before


def test_ablation_of_a_row_that_fails_and_of_other_settings(folder):
    flags = "--data", "VOCdevkit", "--paper", "boxsup", "--rows", "rectangles", "--", "--crop", 1
    assert "mIoU" not in call("ablation.py", "--out", "other", *flags, folder=folder, status=1)
    assert "--crop 1: wanted 32" in (folder / "other" / "rectangles-0.log").read_text()
    call("ablation.py", *flags, folder=folder, status=1)  # the first test's folder: of other flags
    assert not (folder / "runs" / "ablation-boxsup" / "rectangles-0.log").exists()


def test_candidate_quality(folder):
    row = call("candidate_quality.py", "--data", "VOCdevkit", "--method", "box", folder=folder).splitlines()[-1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "box" and int(cells[1]) > 0 and cells[2] == "1" and 0.3 < float(cells[4].split(" / ")[0]) < 0.9


def test_what_the_choice_makes_of_candidates(folder):
    """lambda 0 does not ask the network; with any lambda "cheapest" is at least as good as chance on such pictures."""
    out = call("candidate_quality.py", "--data", "VOCdevkit", "--split", "train", "--checkpoint",
               "runs/ablation-boxsup/boxsup-3/last.pt", "--weights", 0, 1, folder=folder)
    lines = out.splitlines()
    assert lines[0].startswith("8 images; the network itself: ") and lines[2] == "| lambda | cheapest | one of five |"
    rows = {cells[1]: [float(x) for x in cells[2:4]] for cells in (line.split("|") for line in lines[4:])}
    assert list(rows) == [" 0 ", " 1 "] and all(0 < x < 100 for row in rows.values() for x in row)
    assert rows[" 0 "][0] > 40  # by the box alone, on isolated shapes


def test_bench_writes_what_it_prints(folder):
    printed = call("bench.py", "stages", "affinity", "--repeat", "1", "--json", "bench.json", folder=folder)
    report = json.loads((folder / "bench.json").read_text())
    assert report["failed"] == [] and report["command"].endswith("--json bench.json") and report["hardware"]["cores"]
    names = [row["name"] for row in report["rows"]]
    assert names[0] == "stages contour_strength" and names[-1] == "affinity growth" and len(names) == 12
    for row in report["rows"]:
        assert row["name"] in printed and row["low"] <= row["ratio"] <= row["high"] and row["ours"] > 0
    assert "no row stage:" in subprocess.run([sys.executable, HERE / "bench.py", "stage"], capture_output=True,
                                             text=True).stderr
