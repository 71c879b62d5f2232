"""The published numbers match the package's counts and the documentation."""

from pathlib import Path

import pytest

from prunekit.backbones.csnet import csnet
from prunekit.flops import count_modules, total
from prunekit.reporting.published import PUBLISHED


@pytest.mark.parametrize("name, width", [("CSNet ×1", 20), ("CSNet ×2", 40)])
def test_published_dense_counts_match_built_models(name, width):
    published = next(one for one in PUBLISHED if one.name == name)
    counted = total(count_modules(csnet(width), (3, 32, 32))[0])
    assert (counted["params"], counted["paper_flops"]) == (published.params, published.paper_flops)


def test_documentation_table_matches_published_models():
    text = (Path(__file__).parents[2] / "docs/guides/csnet.md").read_text()
    section = text.split("| CSNet ×1, dense |")[1].split("\n\n")[0]
    rows = [line for line in f"| CSNet ×1, dense |{section}".splitlines() if line.startswith("| CSNet")]
    assert len(rows) == len(PUBLISHED)
    for row, one in zip(rows, PUBLISHED, strict=True):
        figures = [f"{one.metrics[key]:.4f}" if one.metrics else "–" for key in ("max_f", "mae", "s_measure", "max_e")]
        name, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        assert name.removesuffix(", dense") == one.name
        assert cells == [f"{one.params:,}", f"{one.paper_flops:,}", *figures]
