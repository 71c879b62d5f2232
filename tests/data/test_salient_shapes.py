import numpy as np
import pytest

from prunekit.data.patterns import FIELDS, coverage, outline
from prunekit.data.salient_shapes import salient_shapes
from prunekit.errors import DataError


def pictures(split, count=12, **options):
    pairs = salient_shapes(split, size=options.pop("size", 32), train=count, val=count, **options)
    return [pairs.pair(i) for i in range(count)]


def test_shapes_and_levels():
    pairs = salient_shapes("val", size=48, val=3)
    assert len(pairs) == 3 and len(set(pairs.names)) == 3 and pairs.skipped == 0
    image, mask = pairs.image(1), pairs.mask(1)
    assert image.shape == (48, 48, 3) and mask.shape == (48, 48) and image.dtype == mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 255}
    assert len(salient_shapes("train", size=32)) == 1024 and len(salient_shapes("val", size=32)) == 200


def test_image_depends_only_on_seed_split_and_index():
    forth = pictures("train", seed=3)
    pairs = salient_shapes("train", size=32, seed=3, train=500)
    for index in (11, 0, 5, 5):
        assert np.array_equal(pairs.image(index), forth[index][0])
        assert np.array_equal(pairs.mask(index), forth[index][1])


def test_images_differ_between_splits_seeds_and_indices():
    drawn = [
        image.tobytes() for split in ("train", "val") for seed in (0, 1, -1) for image, _ in pictures(split, seed=seed)
    ]
    assert len(set(drawn)) == len(drawn) == 72


def test_dropping_a_pair_keeps_the_others():
    pairs = salient_shapes("val", size=32, val=4)
    third = pairs.image(2)
    pairs.drop([0])
    assert np.array_equal(pairs.image(1), third)


def test_object_areas_are_in_range():
    shares = np.array([mask.mean() / 255 for _, mask in pictures("train", 150, size=64)])
    assert shares.min() > 0.01 and shares.max() < 0.5 and 0.1 < shares.mean() < 0.3
    assert shares.std() > 0.05


def test_objects_are_not_all_centered():
    masks = [mask for _, mask in pictures("train", 60)]
    assert 5 < sum(mask[[0, -1]].any() or mask[:, [0, -1]].any() for mask in masks) < 55
    assert 5 < sum(mask[16, 16] == 0 for mask in masks) < 55


@pytest.mark.parametrize(
    ("options", "said"), [({"split": "test"}, "no split 'test'"), ({"size": 8}, "size=8"), ({"val": 0}, "val=0")]
)
def test_invalid_options_raise(options, said):
    with pytest.raises(DataError, match=said):
        salient_shapes(**{"split": "val", "size": 32, **options})


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.__name__)
def test_fields_are_in_unit_range(field):
    for seed in range(20):
        levels = field(np.random.default_rng(seed), 40)
        assert levels.shape == (40, 40) and levels.min() >= -1e-6 and levels.max() <= 1 + 1e-6
        assert levels.std() > 0.01


def test_outlines_have_their_area_and_one_pixel_edges():
    shares = []
    for seed in range(60):
        cover = coverage(outline(np.random.default_rng(seed), 96, (0.5, 0.5), 0.15))
        shares.append((cover >= 0.5).mean())
        # An edge a pixel wide: few pixels are partly covered.
        assert ((cover > 0.02) & (cover < 0.98)).mean() < 0.15
    assert min(shares) > 0.08 and max(shares) < 0.25 and abs(np.mean(shares) - 0.15) < 0.03
