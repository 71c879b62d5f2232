import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit.data.datasets import LabelDataset, MaskDataset, image_tensor, load_tensors, normalize, resize
from prunekit.errors import DataError


class InMemory(MaskDataset):
    """Pairs from arrays; those of `broken` cannot be read."""

    def __init__(self, pairs, broken=(), tolerant=False):
        super().__init__([f"p{i}" for i in range(len(pairs))])
        self.by_name = dict(zip(self.names, pairs, strict=True))
        self.broken, self.skip_errors = {f"p{i}" for i in broken}, tolerant

    def image(self, index):
        if self.names[index] in self.broken:
            raise DataError(f"{self.names[index]} is broken")
        return self.by_name[self.names[index]][0]

    def mask(self, index):
        return self.by_name[self.names[index]][1]


def flat(level, height=4, width=6):
    return np.full((height, width, 3), level, np.uint8), np.full((height, width), level, np.uint8)


def test_tensor_shapes_and_types():
    tensors = load_tensors(InMemory([flat(0), flat(127, 5, 3), flat(128)]), 8)
    assert tensors.images.shape == (3, 3, 8, 8) and tensors.images.dtype == torch.uint8
    assert tensors.targets.shape == (3, 1, 8, 8) and tensors.targets.dtype == torch.uint8
    assert tensors.sizes.tolist() == [[4, 6], [5, 3], [4, 6]] and tensors.sizes.dtype == torch.float32
    assert tensors.images.flatten(1).float().mean(1).tolist() == [0, 127, 128]
    assert tensors.targets.flatten(1).float().mean(1).tolist() == [0, 0, 1], "thresholded at one half"


def test_mask_is_thresholded_after_resizing():
    # Columns 0 and 255 enlarged fourfold: the half lies in the middle between their centres.
    mask = np.array([[0, 255]], np.uint8).repeat(2, 0)
    tensors = load_tensors(InMemory([(np.zeros((2, 2, 3), np.uint8), mask)]), 8)
    assert tensors.targets[0, 0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def by_hand(row, size):
    """Half-pixel bilinear without anti-aliasing of one row."""
    centres = np.clip((np.arange(size) + 0.5) * len(row) / size - 0.5, 0, len(row) - 1)
    return np.interp(centres, np.arange(len(row)), row)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=12), st.integers(1, 16))
def test_resize_is_half_pixel_bilinear_without_antialiasing(row, size):
    levels = torch.tensor(row, dtype=torch.float64).view(1, 1, 1, -1)
    assert resize(levels, (1, size))[0, 0, 0].numpy() == pytest.approx(by_hand(row, size), abs=1e-3)


def test_normalize_uses_imagenet_statistics():
    levels = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1) * 255
    assert normalize(levels).abs().max() < 1e-6
    white = normalize(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8))
    assert white.flatten().tolist() == pytest.approx([2.2489, 2.4286, 2.6400], abs=1e-3)


def test_image_tensor_keeps_levels():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert image_tensor(image)[0, 2, 1, 3] == 23 and image_tensor(image).shape == (1, 3, 2, 4)
    assert image_tensor(image[..., 0]).shape == (1, 1, 2, 4)


def test_broken_pair_raises_unless_skip_errors():
    pairs = [flat(level) for level in (10, 20, 30, 40)]
    with pytest.raises(DataError, match="p1 is broken"):
        load_tensors(InMemory(pairs, broken=(1, 3)), 4)
    tolerant = InMemory(pairs, broken=(1, 3), tolerant=True)
    tensors = load_tensors(tolerant, 4)
    assert tensors.images[:, 0, 0, 0].tolist() == [10, 30] and len(tensors) == len(tensors.sizes) == 2
    assert (tolerant.names, tolerant.skipped) == (["p0", "p2"], 2)
    load_tensors(tolerant, 4)
    assert tolerant.skipped == 2, "a second look counts nothing twice"


def test_empty_set_raises():
    with pytest.raises(DataError, match="empty"):
        load_tensors(InMemory([]), 4)
    with pytest.raises(DataError, match="none of the 2 pairs can be read; the first: p0 is broken"):
        load_tensors(InMemory([flat(1), flat(2)], broken=(0, 1), tolerant=True), 4)


class Labelled(LabelDataset):
    """A grey image for each label."""

    def __init__(self, labels, tolerant=False):
        super().__init__([f"p{i}" for i in range(len(labels))], ["a", "b", "c"])
        self.by_name, self.skip_errors = dict(zip(self.names, labels, strict=True)), tolerant

    def image(self, index):
        return flat(10 * index)[0]

    def label(self, index):
        return self.by_name[self.names[index]]


def test_labels_become_tensors():
    images = Labelled([2, 0, 1, 2])
    tensors = load_tensors(images, 5)
    assert tensors.targets.tolist() == [2, 0, 1, 2] and tensors.targets.dtype == torch.int64
    assert tensors.images.shape == (4, 3, 5, 5) and tensors.images[3].unique().tolist() == [30]
    assert [images.display_target(images.target(i)) for i in range(4)] == ["c", "a", "b", "c"]


@pytest.mark.parametrize("label", [3, -1, 255])
def test_label_out_of_range_raises_or_is_skipped(label):
    with pytest.raises(DataError, match=rf"p1 has the label {label}, and the data set has 3 classes \(0 to 2\)"):
        load_tensors(Labelled([0, label, 2]), 4)
    tolerant = Labelled([0, label, 2], tolerant=True)
    assert load_tensors(tolerant, 4).targets.tolist() == [0, 2]
    assert (tolerant.names, tolerant.skipped) == (["p0", "p2"], 1)
