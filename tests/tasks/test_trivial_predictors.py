import numpy as np
import pytest

from prunekit.data.salient_shapes import salient_shapes
from prunekit.errors import DataError
from prunekit.tasks.saliency import Saliency
from prunekit.tasks.trivial_predictors import center_prior, color_distance, constant_map, otsu, trivial_predictor_scores


def disc(side=32, shaded=False):
    """Return a blue image with an off-center red disc, and its mask."""
    rows, columns = np.mgrid[:side, :side]
    mask = np.where((rows - 10) ** 2 + (columns - 20) ** 2 < 40, 255, 0).astype(np.uint8)
    image = np.full((side, side, 3), (10, 20, 200), np.uint8)
    image[mask > 0] = (220, 30, 30)
    if shaded:
        image[mask > 0, 0] = np.linspace(150, 250, np.count_nonzero(mask))
    return image, mask


def test_color_distance_finds_an_object_of_another_color():
    image, mask = disc()
    assert np.array_equal(otsu(color_distance(image)), mask)
    assert np.array_equal(color_distance(image), mask)


def test_otsu_separates_two_clusters():
    levels = np.r_[np.full(500, 40), np.full(20, 50), np.full(100, 170), np.full(30, 180)].astype(np.uint8)[None]
    assert np.array_equal(otsu(levels) > 0, levels > 100)


@pytest.mark.parametrize("level", [0, 7, 255])
def test_uniform_image_gives_valid_maps(level):
    flat = np.full((5, 9, 3), level, np.uint8)
    for find in (constant_map, center_prior, color_distance):
        assert find(flat).shape == (5, 9) and find(flat).dtype == np.uint8
    assert not color_distance(flat).any() and not otsu(color_distance(flat)).any()


def test_center_prior_peaks_in_the_center():
    levels = center_prior(np.zeros((21, 61, 3), np.uint8))
    assert levels[10, 30] == levels.max() == 255 and np.array_equal(levels, levels[::-1, ::-1])


def test_generated_set_is_hard_for_trivial_predictors():
    """A trained network reaches a max F of 0.85 and more."""
    found = trivial_predictor_scores(salient_shapes("val", size=64, val=120))
    assert set(found) == {"constant", "centre", "colour"}
    assert all(set(metrics) == set(Saliency.metric_names) for metrics in found.values())
    assert max(metrics["max_f"] for metrics in found.values()) < 0.56
    assert max(metrics["s_measure"] for metrics in found.values()) < 0.65


def test_colour_uses_the_better_of_two_maps():
    class One(type(salient_shapes("val", size=16, val=1))):
        def pair(self, index):
            return disc(shaded=True)

    # The distance map varies over a shaded disc; the binarized map does not.
    found = trivial_predictor_scores(One("val", 1, 32, 0))
    assert found["colour"]["max_f"] == pytest.approx(1) and found["colour"]["mae"] == pytest.approx(0, abs=1e-3)


def test_empty_data_set_raises():
    pairs = salient_shapes("val", size=16, val=1)
    pairs.drop([0])
    with pytest.raises(DataError, match="no image"):
        trivial_predictor_scores(pairs)
