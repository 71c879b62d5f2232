"""The published CSNet models, for comparison with a run.

Gao et al., *Highly Efficient Salient Object Detection with 100K Parameters*, ECCV 2020. Parameters and paper FLOPs are
counted (:mod:`prunekit.flops`); the metrics were measured with the published weights on ECSSD (1,000 images), with the
published protocol (:mod:`prunekit.tasks.saliency`).
"""

from __future__ import annotations

from dataclasses import dataclass

LABEL = "published, ECSSD"


@dataclass(frozen=True)
class Published:
    """One published model.

    Args:
        name: as in the paper; ×2 has twice the width, "L" has learned splits.
        paper_flops: at 224×224, in the paper's convention.
        metrics: ``max_f``, ``mae``, ``s_measure`` and ``max_e`` on ECSSD; empty for the dense models.
    """

    name: str
    params: int
    paper_flops: int
    metrics: dict[str, float]


_METRICS = ("max_f", "mae", "s_measure", "max_e")
PUBLISHED = (
    Published("CSNet ×1", 210_985, 610_638_784, {}),
    Published("CSNet ×2", 788_631, 1_872_279_024, {}),
    Published("CSNet-L ×1", 93_647, 435_463_980, dict(zip(_METRICS, (0.8979, 0.0743, 0.8772, 0.9191), strict=True))),
    Published("CSNet-L ×2", 140_894, 718_394_292, dict(zip(_METRICS, (0.9156, 0.0645, 0.8928, 0.9310), strict=True))),
)
