"""The README is short, its commands are the ones that CI runs, and its example does what it claims."""

import re
from pathlib import Path

from helpers.docs_pages import blocks, start_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def ten_lines():
    return next(block.code for block in blocks("README.md", "python"))


def test_readme_has_at_most_1200_words():
    assert len(README.split()) <= 1200


def test_ten_lines_prune_a_model():
    code = ten_lines()
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    names = start_names("README.md")
    exec(code, names)
    before, after = (sum(p.numel() for p in names[model].parameters()) for model in ("model", "slim"))
    assert after < 0.9 * before and names["equivalence"].passed


def test_example_program_has_the_same_lines():
    body = ten_lines().partition("\n\n")[2]
    assert body in (ROOT / "examples" / "your_model.py").read_text()


def test_readme_has_the_lines_that_ci_runs():
    for start in re.findall(r"\$\(line '([^']+)'\)", (ROOT / ".ci" / "run").read_text()):
        assert start in README
