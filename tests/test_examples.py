"""The examples run, and the README shows what they do."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_your_model():
    file = ROOT / "examples" / "your_model.py"
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, check=True)
    before, after = (int(word) for word in done.stdout.split(" parameters")[0].split(" → "))
    assert after < 0.8 * before
    assert "proof holds: True" in done.stdout


def test_the_readme_shows_the_example():
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert code.strip() in (ROOT / "examples" / "your_model.py").read_text()
