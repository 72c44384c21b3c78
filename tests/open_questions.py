"""Write docs/open_questions.md from the comments of the code, or say whether it is up to date.

    python tests/open_questions.py                      writes it
    python tests/open_questions.py --check              exit status 1 if it would change

Two tags mark the places where the code is not simply the paper: `# PAPER SILENT:` where the paper says nothing, and
`# DEPARTS:` where it prints one thing and the code does another. An entry goes on to the next tag, or to the end of the
comment. tests/test_readme.py makes sure that the file and the code agree.
"""
import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "open_questions.md"
READING_ORDER = ("losses.py", "grabcut_labels.py", "model.py", "train_box2seg.py", "mcg_candidates.py",
                 "train_boxsup.py", "crf.py", "evaluate.py")
TAGS = "PAPER SILENT", "DEPARTS"

HEAD = """# Open questions

Where the code is not simply the paper, a comment says so, at the line that decides it. This is the list of all these
comments, made from the code by `python tests/open_questions.py`. Equations and sections are those of Box2Seg or of
BoxSup, whichever the file or function implements. What the choices about Box2Seg's losses lead to is in
[results.md](results.md), "Weights of the losses".

Two choices have no single line. Scores are those of the last epoch, never of the best one, which would be chosen on the
images that are scored. And nothing was searched on the whole of VOC 2012, where Box2Seg reports "a grid search of
hyper-parameters on a held out validation set", and BoxSup one on 100 images; what was chosen on a part of it says so.
"""
INTRODUCTION = {
    "PAPER SILENT": "## PAPER SILENT: the paper says nothing\n\nWhat is missing; what the code does, and why.\n",
    "DEPARTS": "## DEPARTS: the paper prints one thing, the code does another\n\nWhat is printed; what the code does, "
               "and why.\n"}


def enclosing(lines, number):
    """The function or class that line `number` stands in, such as "Box2SegNet.__init__"; "" at the top level."""
    indent, names = len(lines[number]) - len(lines[number].lstrip()), []
    for line in reversed(lines[:number]):
        name = re.match(r" *(?:def|class) (\w+)", line)
        if line.strip() and len(line) - len(line.lstrip()) < indent:
            indent = len(line) - len(line.lstrip())
            names += [name[1]] if name else []
    return ".".join(reversed(names))


def tagged(tag):
    """The comments with this tag: {text on one line: [place]}, in reading order. ValueError: a tag out of place."""
    found, scripts = {}, sorted(ROOT.glob("*.py"), key=lambda p: (READING_ORDER + (p.name,)).index(p.name))
    for script in scripts:
        lines, count, entry = script.read_text().split("\n"), 0, None
        for number, line in enumerate(lines):
            comment = re.match(rf" *# (?:({'|'.join(TAGS)}): )?(.*)", line)
            if comment is None:
                entry = None
            elif comment[1]:
                entry, kind = [comment[2]], comment[1]
                if kind == tag:
                    count += 1
                    place = enclosing(lines, number)
                    found[len(found)] = entry, f"`{script.name}`" + (f", `{place}`" if place else "")
            elif entry is not None:
                entry.append(comment[2])
        if script.read_text().count(tag) != count:
            raise ValueError(f"{script.name}: {tag} where it is not looked for: begin a comment line with '# {tag}: '")
    merged = {}
    for entry, place in found.values():
        merged.setdefault(" ".join(entry), []).append(place)
    return merged


def render():
    lines = [HEAD]
    for tag in TAGS:
        lines.append(INTRODUCTION[tag])
        lines += [f"- {' and '.join(places)}: {text}" for text, places in tagged(tag).items()]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    if parser.parse_args().check:
        sys.exit(0 if FILE.exists() and FILE.read_text() == render() else f"{FILE} is not up to date: {sys.argv[0]}")
    FILE.write_text(render())
    print(f"{FILE}: " + ", ".join(f"{len(tagged(tag))} times {tag}" for tag in TAGS))
