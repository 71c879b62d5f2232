import numpy as np
import pytest
from sklearn.datasets import load_digits

from prunekit.data.datasets import load_tensors
from prunekit.data.digits import digits
from prunekit.errors import DataError


def test_splits_are_disjoint_and_hold_out_a_fifth_of_each_digit():
    train, val = digits("train"), digits("val")
    assert (len(train), len(val)) == (1442, 355)
    assert sorted(train.names + val.names) == [f"{number:04d}" for number in range(1797)]
    for digit in range(10):
        counts = [sum(images.label(i) == digit for i in range(len(images))) for images in (train, val)]
        assert counts[1] == sum(counts) // 5
    assert train.classes == val.classes == tuple("0123456789")
    assert digits("val").names == val.names


def test_images_equal_those_of_scikit_learn():
    file, val = load_digits(), digits("val")
    for index in (0, 100, 354):
        number = int(val.names[index])
        image, label = val.pair(index)
        assert image.shape == (8, 8, 3) and image.dtype == np.uint8
        assert label == file.target[number] and val.display_target(label) == str(file.target[number])
        for plane in range(3):
            assert np.abs(image[..., plane] - file.images[number] * 255 / 16).max() <= 0.5
    tensors = load_tensors(val, 8)
    assert tensors.images.amax() == 255 and tensors.images.amin() == 0
    assert tensors.targets.tolist() == [val.label(i) for i in range(355)]


def test_dropping_images_keeps_the_others():
    val = digits("val")
    before = val.pair(7)
    val.drop([0, 3])
    assert np.array_equal(val.image(5), before[0]) and val.label(5) == before[1] and val.skipped == 2


def test_unknown_split_raises():
    with pytest.raises(DataError, match="no split 'test'; use train or val"):
        digits("test")
