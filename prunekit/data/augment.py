"""Augmentations of whole batches: pure functions of tensors and a random generator.

Targets are masks [B, 1, S, S] of 0 and 1, which move with their images and come out as float32, or class labels [B],
which come out as they are.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from prunekit.config.registry import register_augmentation


@register_augmentation("none")
def none(
    images: torch.Tensor, targets: torch.Tensor, sizes: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and targets as they are; images and masks as float32."""
    return images.float(), targets.float() if _are_masks(targets) else targets


@register_augmentation("crop_flip")
def crop_flip(
    images: torch.Tensor,
    targets: torch.Tensor,
    sizes: torch.Tensor,
    generator: torch.Generator,
    *,
    crop: int = 15,
    hflip: float = 0.25,
    vflip: float = 0.25,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Crop up to ``crop`` original pixels off each side, flip, resize back: CSNet's published augmentation.

    Args:
        images: [B, 3, S, S], levels 0 to 255 (uint8 or float).
        targets: masks [B, 1, S, S] of 0 and 1, or labels [B].
        sizes: [B, 2], height and width of the original images in pixels: the crop is counted in those.
        generator: a CPU generator; the same state gives the same result on every device.
        crop: most pixels off a side; each side gets its own whole number from 0 to this. At most a third of the image
            goes off a side.
        hflip: probability of a left-right flip.
        vflip: probability of an upside-down flip.

    Returns:
        Images float32 [B, 3, S, S], levels 0 to 255; masks float32 [B, 1, S, S] of 0 and 1 (bilinear, cut at one half),
        or the labels.

    Raises:
        ValueError: a negative crop, or a probability outside 0 … 1.
    """
    if crop < 0 or not 0 <= hflip <= 1 or not 0 <= vflip <= 1:
        raise ValueError(f"crop_flip takes crop >= 0 and hflip, vflip in 0 … 1, not {crop}, {hflip}, {vflip}")
    count = len(images)
    # All numbers are drawn whatever the options, so that changing one leaves the others' course as it was.
    cuts = torch.randint(0, crop + 1, (count, 2, 2), generator=generator)
    flips = torch.rand(count, 2, generator=generator) < torch.tensor([vflip, hflip])
    shares = (cuts / sizes.cpu()[:, :, None]).clamp(max=1 / 3)
    before, after = shares.unbind(-1)
    return _seen(images, targets, before, after, flips)


@register_augmentation("resized_crop")
def resized_crop(
    images: torch.Tensor,
    targets: torch.Tensor,
    sizes: torch.Tensor,
    generator: torch.Generator,
    *,
    area: float = 0.5,
    aspect: float = 4 / 3,
    hflip: float = 0.5,
    colour: float = 0.2,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut out a part of another size and shape, resize it back, flip it, change its colours.

    After Szegedy et al., CVPR 2015, section 6 (the part), and Krizhevsky et al., NeurIPS 2012, section 4.1 (flips).

    Args:
        images: [B, 3, S, S], levels 0 to 255 (uint8 or float).
        targets: masks [B, 1, S, S] of 0 and 1, or labels [B].
        sizes: not used: parts are shares of the image that the model sees.
        generator: a CPU generator; the same state gives the same result on every device.
        area: least share of the image's area, 0 … 1; each image gets its own, up to 1, all alike likely.
        aspect: most that the part is drawn out in either direction, as a ratio of its sides; at least 1. Less where a
            side would be longer than the image's.
        hflip: probability of a left-right flip.
        colour: most change of brightness, contrast and saturation, each by its own factor in 1 ± colour; 0 … 1.

    Returns:
        Images float32 [B, 3, S, S], levels 0 to 255; masks float32 [B, 1, S, S] of 0 and 1 (bilinear, cut at one half),
        or the labels.

    Raises:
        ValueError: an area, probability or change of colour outside 0 … 1 (an area of 0), or an aspect below 1.
    """
    if not 0 < area <= 1 or aspect < 1 or not 0 <= hflip <= 1 or not 0 <= colour <= 1:
        raise ValueError(
            "resized_crop takes area above 0 and up to 1, aspect >= 1, hflip and colour in 0 … 1, "
            f"not {area}, {aspect}, {hflip}, {colour}"
        )
    # All numbers are drawn whatever the options, so that changing one leaves the others' course as it was.
    drawn = torch.rand(len(images), 8, generator=generator)
    share = (area + (1 - area) * drawn[:, 0]).sqrt()
    # A ratio that would make one side longer than the image's would cost area.
    most = (share**-2).clamp(max=aspect)
    drawn_out = most ** (drawn[:, 1] - 0.5)  # of either side, so that their ratio reaches the most
    parts = torch.stack([share / drawn_out, share * drawn_out], 1).clamp(max=1)
    flips = torch.stack([torch.zeros(len(images), dtype=torch.bool), drawn[:, 2] < hflip], 1)
    before = (1 - parts) * drawn[:, 3:5]
    images, targets = _seen(images, targets, before, 1 - parts - before, flips)
    factors = 1 + colour * (2 * drawn[:, 5:] - 1)
    return _recoloured(images, *_sent(factors, images.device)[..., None, None, None].unbind(1)), targets


def _recoloured(
    images: torch.Tensor, brightness: torch.Tensor, contrast: torch.Tensor, saturation: torch.Tensor
) -> torch.Tensor:
    """Each factor about what it keeps: black, the image's mean luma, each pixel's luma (ITU-R BT.601)."""
    images = (images * brightness).clamp(0, 255)
    mean = _luma(images).mean((2, 3), keepdim=True)
    images = (mean + (images - mean) * contrast).clamp(0, 255)
    luma = _luma(images)
    return (luma + (images - luma) * saturation).clamp(0, 255)


def _luma(images: torch.Tensor) -> torch.Tensor:
    red, green, blue = images.split(1, 1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _seen(
    images: torch.Tensor, targets: torch.Tensor, before: torch.Tensor, after: torch.Tensor, flips: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A part of each image, resized to the whole.

    Args:
        before: [B, 2], what is left out above and to the left, as a share of the side.
        after: [B, 2], the same below and to the right.
        flips: [B, 2], upside-down and left-right.
    """
    # In grid_sample's coordinates an image spans -1 … 1, so a share off one side is twice that.
    scale = (1 - before - after) * torch.where(flips, -1.0, 1.0)
    shift = before - after
    matrix = torch.zeros(len(images), 2, 3)
    # Rows of the matrix are x, y; shares are y, x.
    matrix[:, 0, 0], matrix[:, 0, 2] = scale[:, 1], shift[:, 1]
    matrix[:, 1, 1], matrix[:, 1, 2] = scale[:, 0], shift[:, 0]
    masks = [targets.float()] if _are_masks(targets) else []
    both = torch.cat([images.float(), *masks], 1)
    where = F.affine_grid(_sent(matrix, both.device), list(both.shape), align_corners=False)
    both = F.grid_sample(both, where, mode="bilinear", padding_mode="border", align_corners=False)
    # Interpolation may overshoot by a rounding error.
    return both[:, :3].clamp(0, 255), (both[:, 3:] >= 0.5).float() if masks else targets


@register_augmentation("shift")
def shift(
    images: torch.Tensor,
    targets: torch.Tensor,
    sizes: torch.Tensor,
    generator: torch.Generator,
    *,
    pixels: int = 4,
    fill: Literal["zero", "edge"] = "zero",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move each image by up to ``pixels`` whole pixels along each axis, as the ResNet paper does for CIFAR-10.

    Args:
        images: [B, 3, S, S], levels 0 to 255 (uint8 or float).
        targets: masks [B, 1, S, S] of 0 and 1, or labels [B].
        sizes: not used: the pixels are those that the model sees.
        generator: a CPU generator; the same state gives the same result on every device.
        pixels: most pixels in each direction; each axis gets its own whole number, either way alike.
        fill: what comes in: ``zero`` (black, no object) or the pixels of the ``edge`` once more.

    Returns:
        Images float32 [B, 3, S, S]; masks float32 [B, 1, S, S], moved alike, or the labels.

    Raises:
        ValueError: negative pixels.
    """
    if pixels < 0:
        raise ValueError(f"shift takes pixels >= 0, not {pixels}")
    # Drawn first, and whatever the options.
    moves = torch.randint(-pixels, pixels + 1, (len(images), 2), generator=generator)
    moves = _sent(moves, images.device)
    masks = [targets.float()] if _are_masks(targets) else []
    both = torch.cat([images.float(), *masks], 1)
    wide = F.pad(both, [pixels] * 4, mode="replicate" if fill == "edge" else "constant")
    rows, columns = (
        torch.arange(side, device=images.device)[None] + pixels - move[:, None]
        for side, move in zip(both.shape[-2:], moves.unbind(1), strict=True)
    )
    # Indices on both sides of a slice put their own axes in front: [B, S, S, C].
    places = torch.arange(len(images), device=images.device)[:, None, None]
    both = wide[places, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
    return both[:, :3], both[:, 3:] if masks else targets


def _sent(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What was drawn, where the images are; an accelerator does not wait for it."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)


def _are_masks(targets: torch.Tensor) -> bool:
    return targets.ndim == 4
