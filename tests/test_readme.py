"""README.md and docs/ say what the code does: what they name exists, and the open questions are those of the code."""
import contextlib
import functools
import inspect
import io
import re
import runpy
import sys
from pathlib import Path

import open_questions
import pytest

import losses

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md",
                                                                              *sorted((ROOT / "docs").glob("*.md"))]}
SCRIPTS = sorted(ROOT.glob("*.py"))
CODE = {path: path.read_text() for path in [*SCRIPTS, *sorted((ROOT / "tests").glob("*.py"))]}
COMMANDS = {path.name: path for path, text in CODE.items() if "ArgumentParser(" in text and "__main__" in text
            and path.stem[:5] != "test_"}
every_document = pytest.mark.parametrize("name", DOCUMENTS)


@functools.cache
def flags_of(script):
    """What --help of a script names. In this process: what scripts import takes longer than all the rest."""
    shown = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), "--help"])
        runpy.run_path(str(script), run_name="__main__")
    shown.seek(0)
    return set(re.findall(r"--[a-z][a-z0-9-]*", shown.read()))


def test_open_questions_are_those_of_the_code():
    assert open_questions.FILE.read_text() == open_questions.render(), "python tests/open_questions.py writes it anew"
    assert len(open_questions.tagged("PAPER SILENT")) > 15 and len(open_questions.tagged("DEPARTS")) > 10


def test_open_questions_finds_each_tag_and_its_place(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("# DEPARTS: one,\n# two\nclass A:\n    def f(self):\n        x = 1\n"
                                   "        # why\n        # PAPER SILENT: three\n        # DEPARTS: four\n")
    (tmp_path / "b.py").write_text("# DEPARTS: four\n")
    monkeypatch.setattr(open_questions, "ROOT", tmp_path)
    assert open_questions.tagged("DEPARTS") == {"one, two": ["`a.py`"], "four": ["`a.py`, `A.f`", "`b.py`"]}
    assert open_questions.tagged("PAPER SILENT") == {"three": ["`a.py`, `A.f`"]}
    (tmp_path / "b.py").write_text("x = 1  # DEPARTS: unseen\n")
    with pytest.raises(ValueError, match="b.py: DEPARTS"):
        open_questions.tagged("DEPARTS")


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 250


def test_every_loss_is_in_the_equation_table():
    named = re.findall(r"`(\w+)\(", README)
    functions = [name for name, value in vars(losses).items() if inspect.isfunction(value)]
    assert len(functions) >= 15
    assert set(functions) <= set(named)


@every_document
def test_linked_files_and_sections_exist(name):
    for path in re.findall(r"\]\(([^)#]*)[^)]*\)", DOCUMENTS[name]):
        if path and not path.startswith("http"):
            assert ((ROOT / name).parent / path).exists(), path
    for path, section in re.findall(r"\]\(([^)]*\.md)\), \"([^\"]+)\"", DOCUMENTS[name].replace("\n", " ")):
        assert re.search(rf"^#+ {re.escape(section)}$", ((ROOT / name).parent / path).read_text(), re.M), section


def test_sections_that_the_code_points_to_exist():
    text = re.sub(r"\"\n *f?\"|\n *# ", " ", "\n".join(CODE.values())).replace("  ", " ")
    pointed = re.findall(r"(README\.md|docs/\w+\.md), ['\"]([A-Z][\w ]+)['\"]", text)
    assert pointed
    for path, section in pointed:
        assert re.search(rf"^#+ {re.escape(section)}$", DOCUMENTS[path], re.M), (path, section)


@every_document
def test_scripts_and_functions_that_are_named_exist(name):
    for path in re.findall(r"(?<![\w/-])((?:tests/|docs/)?\w+\.(?:py|md|jpg))\b", DOCUMENTS[name]):
        assert any((folder / path).exists() for folder in (ROOT, ROOT / "tests", ROOT / "docs")), path
    for function in re.findall(r"`(\w+)\(", DOCUMENTS[name]):
        assert re.search(rf"\b(?:def|class) {function}\b", "\n".join(CODE.values())), function


@every_document
def test_flags_that_are_named_exist(name):
    """In a command, of its script; elsewhere, of any."""
    for script, rest in re.findall(r"(?:python|torchrun[^\n`]*?) (?:tests/)?(\w+\.py)((?: [^\n`#&|]*(?:\\\n)?)*)",
                                   DOCUMENTS[name]):
        own, _, passed_on = rest.partition(" -- ")
        for flag in re.findall(r"(?<!\S)(--[a-z][a-z0-9-]*)", own):
            assert flag in flags_of(COMMANDS[script]), (script, flag)
        for flag in re.findall(r"(?<!\S)(--[a-z][a-z0-9-]*)", passed_on):
            assert flag in flags_of(COMMANDS["train_box2seg.py"]) | flags_of(COMMANDS["train_boxsup.py"]), flag
    foreign = {"--nproc-per-node"}  # torchrun's
    known = set().union(*map(flags_of, COMMANDS.values())) | foreign
    for span in re.findall(r"`([^`\n]+)`", DOCUMENTS[name]):
        assert set(re.findall(r"(?<!\S)(--[a-z][a-z0-9-]*)", span)) <= known, span


def test_the_rule_by_which_results_md_chooses_photographs(tmp_path, monkeypatch):
    """The rule's own lines, on five images: animals, or animals and persons; difficult objects do not count."""
    rule = re.search(r"```python\n(from pathlib.*?)```", DOCUMENTS["docs/results.md"], re.S)[1]
    objects = {"a": "cat", "b": "cat person", "c": "person", "d": "dog car", "e": "sheep car!"}
    (tmp_path / "Annotations").mkdir()
    for image_id, names in objects.items():
        things = "".join(f"<object><name>{name.strip('!')}</name><difficult>{int('!' in name)}</difficult></object>"
                         for name in names.split())
        (tmp_path / "Annotations" / f"{image_id}.xml").write_text(f"<annotation>{things}</annotation>")
    lists = tmp_path / "ImageSets" / "Segmentation"
    (lists / "full").mkdir(parents=True)
    for name, ids in {"train": "ab", "trainaug": "abcde", "val": "cde"}.items():
        (lists / "full" / f"{name}.txt").write_text("\n".join(ids))
    monkeypatch.chdir(tmp_path)
    exec(rule, {})
    made = {path.stem: "".join(path.read_text().split()) for path in lists.glob("*.txt")}
    assert made == {"train": "ab", "trainaug": "abe", "half": "ae", "val": "e"}


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
