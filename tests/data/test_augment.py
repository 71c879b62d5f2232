import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit.data.augment import crop_flip, none, resized_crop, shift


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(count=4, side=16, seed=1):
    images = torch.randint(0, 256, (count, 3, side, side), generator=seeded(seed), dtype=torch.uint8)
    masks = (torch.rand(count, 1, side, side, generator=seeded(seed)) > 0.5).to(torch.uint8)
    return images, masks, torch.full((count, 2), 300.0)


def test_none_changes_nothing():
    images, masks, sizes = batch()
    out, targets = none(images, masks, sizes, seeded())
    assert out.dtype == targets.dtype == torch.float32
    assert torch.equal(out, images.float()) and torch.equal(targets, masks.float())


def test_crop_flip_without_crop_and_flips_is_identity():
    images, masks, sizes = batch()
    out, targets = crop_flip(images, masks, sizes, seeded(), crop=0, hflip=0, vflip=0)
    assert out.dtype == targets.dtype == torch.float32
    assert (out - images.float()).abs().max() < 1e-2 and torch.equal(targets, masks.float())


@pytest.mark.parametrize(
    ("options", "axes"), [({"hflip": 1}, [3]), ({"vflip": 1}, [2]), ({"hflip": 1, "vflip": 1}, [2, 3])]
)
def test_flips_are_exact(options, axes):
    images, masks, sizes = batch()
    out, targets = crop_flip(images, masks, sizes, seeded(), **{"crop": 0, "hflip": 0, "vflip": 0, **options})
    assert (out - images.float().flip(axes)).abs().max() < 1e-2
    assert torch.equal(targets, masks.float().flip(axes))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    crop=st.integers(0, 60),
    side=st.integers(8, 40),
    size=st.integers(10, 500),
    area=st.none() | st.floats(0.1, 1),
)
def test_image_and_mask_move_together(seed, crop, side, size, area):
    _, masks, sizes = batch(6, side, seed)
    images = (masks * 255).expand(-1, 3, -1, -1)
    if area is None:
        out, targets = crop_flip(images, masks, sizes * 0 + size, seeded(seed), crop=crop)
    else:
        out, targets = resized_crop(images, masks, sizes, seeded(seed), area=area, color=0)
    assert out.shape == images.shape and out.min() >= 0 and out.max() <= 255
    assert set(targets.unique().tolist()) <= {0.0, 1.0}
    # Where rounding decides (exactly between two pixels) either side is right.
    clear = (out[:, :1] - 127.5).abs() > 0.1
    assert torch.equal((out[:, :1] > 127.5)[clear], targets.bool()[clear])


def test_crop_counts_original_pixels():
    """A ramp shows which share of the image is left: 15 pixels of 100 are much, 15 of 1,500 little."""
    ramp = torch.linspace(0, 255, 64).view(1, 1, 1, 64).expand(200, 3, 64, 64)
    masks = torch.zeros(200, 1, 64, 64)
    spans = {}
    for size in (100, 1500):
        out, _ = crop_flip(ramp, masks, torch.full((200, 2), float(size)), seeded(), hflip=0, vflip=0)
        spans[size] = (out[:, 0, 0, -1] - out[:, 0, 0, 0]) / 255
    # At most 15 off either side: at least 70 of 100 pixels stay.
    assert spans[100].min() > 0.68 and spans[100].min() < 0.75 and spans[100].mean() == pytest.approx(0.85, abs=0.02)
    assert spans[1500].min() > 0.97


def test_crop_uses_height_and_width_separately():
    rows = torch.linspace(0, 255, 64).view(1, 1, 64, 1).expand(100, 1, 64, 64)
    images = torch.cat([rows, rows.mT, rows], 1)
    out, _ = crop_flip(images, rows * 0, torch.tensor([[30.0, 3000.0]]).expand(100, 2), seeded(), hflip=0, vflip=0)
    height = (out[:, 0, -1, 32] - out[:, 0, 0, 32]) / 255
    width = (out[:, 1, 32, -1] - out[:, 1, 32, 0]) / 255
    assert height.mean() < 0.7 and width.min() > 0.97 and height.min() > 0.25


def test_flips_have_the_given_probability():
    ramp = torch.linspace(0, 255, 8).view(1, 1, 1, 8).expand(2000, 3, 8, 8)
    out, _ = crop_flip(ramp, ramp[:, :1] * 0, torch.full((2000, 2), 300.0), seeded(), hflip=0.25)
    assert (out[:, 0, 0, 0] > out[:, 0, 0, -1]).float().mean() == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("augment", [crop_flip, resized_crop, shift])
def test_strength_scales_the_changes(augment):
    images, masks, sizes = batch(8)
    still = {} if augment is shift else {"hflip": 0.0}
    still |= {"vflip": 0.0} if augment is crop_flip else {}

    def change(strength):
        out, _ = augment(images, masks, sizes, seeded(5), strength=strength, **still)
        return float((out - images.float()).abs().mean())

    assert change(0.0) < 1e-2 < change(0.3) < change(1.0)
    whole, plain = augment(images, masks, sizes, seeded(5), strength=1.0), augment(images, masks, sizes, seeded(5))
    assert torch.equal(whole[0], plain[0]) and torch.equal(whole[1], plain[1])
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"strength=.* must be from 0 to 1"):
            change(wrong)


@pytest.mark.parametrize("augment", [crop_flip, resized_crop, shift])
def test_same_generator_state_gives_same_result(augment):
    images, masks, sizes = batch(8)
    state = torch.random.get_rng_state()
    first, again = augment(images, masks, sizes, seeded(5)), augment(images, masks, sizes, seeded(5))
    other = augment(images, masks, sizes, seeded(6))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"
    assert torch.equal(images, batch(8)[0]), "the input is left alone"


@pytest.mark.parametrize("options", [{"crop": -1}, {"hflip": 1.5}, {"vflip": -0.1}])
def test_crop_flip_raises_for_invalid_options(options):
    with pytest.raises(ValueError, match="crop_flip"):
        crop_flip(*batch(), seeded(), **options)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), area=st.floats(0.05, 1), aspect=st.floats(1, 3))
def test_resized_crop_has_the_given_area_and_aspect(seed, area, aspect):
    """Two ramps say where the part begins and ends; the outermost pixels' centres lie half a pixel inside."""
    side = 64
    ramp = torch.linspace(0.5, side - 0.5, side)
    images = torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side), torch.zeros(side, side)])
    masks = torch.zeros(8, 1, side, side)
    out, _ = resized_crop(
        images.expand(8, 3, side, side),
        masks,
        torch.ones(8, 2),
        seeded(seed),
        area=area,
        aspect=aspect,
        hflip=0,
        color=0,
    )
    # Away from the border, which repeats itself by half a pixel.
    step_x = (out[:, 0, 32, 40] - out[:, 0, 32, 24]) / 16
    step_y = (out[:, 1, 40, 32] - out[:, 1, 24, 32]) / 16
    assert max(step_x.max(), step_y.max()) <= 1 + 1e-4
    assert (step_x * step_y).min() >= area - 1e-3
    ratio = (step_x / step_y).log().abs()
    assert ratio.max() <= torch.tensor(aspect).log() + 1e-3
    middle = out[:, :2, 31:33, 31:33].mean((2, 3))
    half = torch.stack([step_x, step_y], 1) * side / 2
    assert (middle - half).min() > -1e-2 and (middle + half).max() < side + 1e-2


def test_resized_crop_covers_all_sizes_positions_and_aspects():
    ramp = torch.linspace(0, 1, 64) * 255
    images = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64)]).expand(
        500, -1, -1, -1
    )
    masks = torch.zeros(500, 1, 64, 64)
    out, _ = resized_crop(images, masks, torch.ones(500, 2), seeded(), area=0.25, aspect=2, hflip=0.5, color=0)
    ends = {"x": (out[:, 0, 32, 0], out[:, 0, 32, -1]), "y": (out[:, 1, 0, 32], out[:, 1, -1, 32])}
    assert (ends["x"][0] > ends["x"][1]).float().mean() == pytest.approx(0.5, abs=0.07)
    assert (ends["y"][0] < ends["y"][1]).all(), "upside down it never is"
    spans = {axis: (last - first).abs() / 255 for axis, (first, last) in ends.items()}
    areas = spans["x"] * spans["y"]
    assert areas.min() < 0.28 and areas.max() > 0.95 and areas.mean() == pytest.approx(0.62, abs=0.04)
    ratio = (spans["x"] / spans["y"]).log()
    assert ratio.min() < -0.6 and ratio.max() > 0.6 and ratio.mean() == pytest.approx(0, abs=0.05)
    for axis, (first, last) in ends.items():
        room = 1 - spans[axis]
        # Uniform in 0 … 1 has a deviation of 0.29.
        place = (torch.minimum(first, last) / 255 / room)[room > 0.1]
        assert place.mean() == pytest.approx(0.5, abs=0.05) and place.std() == pytest.approx(0.29, abs=0.03), axis


def test_resized_crop_with_area_one_keeps_the_image():
    images, masks, sizes = batch()
    out, targets = resized_crop(images, masks, sizes, seeded(), area=1, aspect=3, hflip=0, color=0)
    assert (out - images.float()).abs().max() < 1e-2 and torch.equal(targets, masks.float())


def test_color_jitter_changes_images_but_not_masks():
    images, masks, sizes = batch(400, 4)
    grey = images[:, :1].expand(-1, 3, -1, -1) // 2 + 60
    whole = {"area": 1, "aspect": 1, "hflip": 0}
    out, targets = resized_crop(grey, masks, sizes, seeded(), **whole, color=0.2)
    assert torch.equal(targets, masks.float())
    assert (out - out[:, :1]).abs().max() < 1e-2, "grey stays grey"
    change = out.mean((1, 2, 3)) / grey.float().mean((1, 2, 3))
    assert 0.8 - 1e-3 <= change.min() < 0.82 and 1.18 < change.max() <= 1.2 + 1e-3
    spread = out.std((1, 2, 3)) / grey.float().std((1, 2, 3)) / change
    assert 0.8 - 1e-3 <= spread.min() < 0.82 and 1.18 < spread.max() <= 1.2 + 1e-3
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    mild = images // 4 + 96  # nothing is cut off at 0 or 255
    out, _ = resized_crop(mild, masks, sizes, seeded(), **whole, color=0.2)
    colourless = [x - (x * weights).sum(1, keepdim=True) for x in (out, mild.float())]
    change = colourless[0].flatten(1).norm(dim=1) / colourless[1].flatten(1).norm(dim=1)
    assert change.min() < 0.7 and change.max() > 1.3, "three factors"


@pytest.mark.parametrize("options", [{"area": 0}, {"area": 1.1}, {"aspect": 0.9}, {"hflip": -0.1}, {"color": 1.2}])
def test_resized_crop_raises_for_invalid_options(options):
    with pytest.raises(ValueError, match="resized_crop"):
        resized_crop(*batch(), seeded(), **options)


LABELS = torch.tensor([3, 0, 1, 9])


@pytest.mark.parametrize("augment", [none, crop_flip, resized_crop, shift])
def test_labels_are_unchanged_and_images_as_with_masks(augment):
    images, masks, sizes = batch()
    out, labels = augment(images, LABELS, sizes, seeded())
    assert labels.dtype == torch.int64 and torch.equal(labels, LABELS)
    assert out.dtype == torch.float32 and torch.equal(out, augment(images, masks, sizes, seeded())[0])


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    pixels=st.integers(0, 20),
    side=st.integers(1, 12),
    fill=st.sampled_from(["zero", "edge"]),
)
def test_shift_moves_by_whole_pixels(seed, pixels, side, fill):
    images, masks, sizes = batch(6, side, seed)
    out, targets = shift(images, masks, sizes, seeded(seed), pixels=pixels, fill=fill)
    moves = torch.randint(-pixels, pixels + 1, (6, 2), generator=seeded(seed))
    for index, (down, right) in enumerate(moves.tolist()):
        for row in range(side):
            for column in range(side):
                y, x = row - down, column - right
                if fill == "edge":
                    y, x = min(max(y, 0), side - 1), min(max(x, 0), side - 1)
                inside = 0 <= y < side and 0 <= x < side
                expected = images[index, :, y, x].tolist() if inside else [0, 0, 0]
                assert out[index, :, row, column].tolist() == expected
                assert targets[index, 0, row, column] == (masks[index, 0, y, x] if inside else 0)


def test_shift_is_symmetric():
    spot = torch.zeros(3000, 3, 9, 9)
    spot[:, :, 4, 4] = 255
    out, _ = shift(spot, torch.zeros(3000, dtype=torch.int64), torch.ones(3000, 2), seeded(), pixels=2)
    counts = out[:, 0].sum(0) / 255
    assert counts.sum() == 3000 and counts[2:7, 2:7].sum() == 3000
    assert counts[2:7, 2:7].min() > 80 and counts[2:7, 2:7].max() < 160, "120 each"


def test_shift_raises_for_negative_pixels():
    with pytest.raises(ValueError, match="shift needs pixels >= 0"):
        shift(*batch(), seeded(), pixels=-1)
