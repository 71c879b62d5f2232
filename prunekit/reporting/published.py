"""The published CSNet models, to stand beside a run of one's own.

Gao et al., *Highly Efficient Salient Object Detection with 100K Parameters*, ECCV 2020. Parameters and paper FLOPs are
counted (:mod:`prunekit.flops`); the other figures were measured with the published weights on ECSSD (1,000 images)
by the published protocol (:mod:`prunekit.tasks.saliency`).
"""

from __future__ import annotations

from dataclasses import dataclass

LABEL = "published, ECSSD"


@dataclass(frozen=True)
class Published:
    """One published model.

    Attributes:
        name: as the paper names it; ×2 has twice the width, "L" is the one whose splits were learned.
        params: number of parameters.
        paper_flops: at 224×224, in the paper's convention.
        metrics: ``max_f``, ``mae``, ``s_measure`` and ``max_e`` on ECSSD; empty for the dense models.
    """

    name: str
    params: int
    paper_flops: int
    metrics: dict[str, float]


PUBLISHED = (
    Published("CSNet ×1", 210_985, 610_638_784, {}),
    Published("CSNet ×2", 788_631, 1_872_279_024, {}),
    Published(
        "CSNet-L ×1",
        93_647,
        435_463_980,
        {"max_f": 0.8979, "mae": 0.0743, "s_measure": 0.8772, "max_e": 0.9191},
    ),
    Published(
        "CSNet-L ×2",
        140_894,
        718_394_292,
        {"max_f": 0.9156, "mae": 0.0645, "s_measure": 0.8928, "max_e": 0.9310},
    ),
)
