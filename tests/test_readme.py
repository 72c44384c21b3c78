"""README.md says what the code does: open questions, functions and flags that it names exist."""
import inspect
import re
import subprocess
import sys
from pathlib import Path

import losses

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(ROOT.glob("*.py"))


def open_questions():
    """Each PAPER SILENT comment of the code as one line of text."""
    found = []
    for script in SCRIPTS:
        for block in re.findall(r"(?:^ *#.*\n)+", script.read_text(), re.M):
            text = " ".join(line.strip().lstrip("#").strip() for line in block.splitlines())
            found += [(script.name, part.strip()) for part in text.split("PAPER SILENT:")[1:]]
    return found


def test_every_open_question_of_the_code_is_in_the_readme_and_no_other():
    listed = re.findall(r"^- \*\*`(\w+\.py)`\*\* (.*)$", README, re.M)
    assert len(open_questions()) > 15
    assert sorted(listed) == sorted(open_questions())
    for script in SCRIPTS:  # none hides where the pattern above does not look
        text = script.read_text()
        assert text.count("PAPER SILENT") == sum(name == script.name for name, _ in open_questions()), script.name


def test_every_loss_is_in_the_equation_table():
    named = re.findall(r"`(\w+)\(", README)
    functions = [name for name, value in vars(losses).items() if inspect.isfunction(value)]
    assert len(functions) >= 15
    assert set(functions) <= set(named)


def test_no_command_scores_the_checkpoint_that_was_chosen_on_the_images_it_is_scored_on():
    for text in [README] + [script.read_text() for script in SCRIPTS]:
        assert not re.findall(r"--(?:checkpoint|init) \S*best\.pt", text)


def test_files_and_flags_that_the_readme_names_exist():
    for path in re.findall(r"\]\(([^)h#][^)#]*)\)", README):
        assert (ROOT / path).exists(), path
    for script in ("train_box2seg.py", "train_boxsup.py", "evaluate.py", "grabcut_labels.py", "mcg_candidates.py",
                   "crf.py"):
        known = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True).stdout
        for command in re.findall(rf"python (?:\S+/)?{script}((?: [^\n`#&|]*(?:\\\n)?)*)", README):
            for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", command):
                assert flag in known, (script, flag)


def test_shared_blocks_are_equal_to_the_byte():
    """... in all files that hold them, at least two, and the fence names exactly these."""
    blocks = {}
    for script in SCRIPTS:
        text = script.read_text()
        pattern = r'^# ==== shared block "([^"]+)": ([^\n]*\n)(.*?)^# ==== end of shared block$'
        found = re.findall(pattern, text, re.M | re.S)
        assert len(found) == text.count("==== shared block") == text.count("==== end of shared block"), script.name
        for name, fence, body in found:
            blocks.setdefault(name, {})[script.name] = fence, body
    assert len(blocks) >= 4
    for name, copies in blocks.items():
        assert len(copies) >= 2 and len(set(copies.values())) == 1, (name, list(copies))
        *others, last = sorted(copies)
        assert copies[last][0] == f"equal to the byte in {', '.join(others)} and {last}\n", name
