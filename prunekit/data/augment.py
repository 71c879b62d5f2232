"""Augmentations of whole batches: pure functions of tensors and a random generator.

All take ``images`` ([B, 3, S, S], levels 0 to 255, uint8 or float), ``targets`` (masks [B, 1, S, S] of 0 and 1, or
class labels [B]), ``sizes`` ([B, 2], height and width of the original images in pixels) and a CPU ``generator``; the
same generator state gives the same result on every device. They return float32 images of the same shape and either
float32 masks of 0 and 1, transformed with the images, or the labels unchanged.

The option ``strength``, in [0, 1], scales how much an augmentation changes images (not how often it flips them); a
recipe's ``progressive.strengths`` raise it during a training.
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
    """Return images and masks as float32, otherwise unchanged."""
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
    strength: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Crop up to ``crop`` original pixels from each side, flip, and resize back: the published augmentation of CSNet.

    Args:
        images, targets, sizes, generator: see the module.
        crop: maximum number of original pixels cropped from a side, drawn per side; at most a third of the image.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip.
        strength: factor on the cropped pixels.

    Raises:
        ValueError: ``crop`` is negative, or a probability or ``strength`` is outside [0, 1].
    """
    _check_strength(strength)
    if crop < 0 or not 0 <= hflip <= 1 or not 0 <= vflip <= 1:
        raise ValueError(f"crop_flip needs crop >= 0 and hflip, vflip in [0, 1], got {crop}, {hflip}, {vflip}")
    count = len(images)
    # Draw all numbers whatever the options are, so that changing one option does not change the other numbers.
    cuts = torch.randint(0, crop + 1, (count, 2, 2), generator=generator)
    flips = torch.rand(count, 2, generator=generator) < torch.tensor([vflip, hflip])
    shares = (strength * cuts / sizes.cpu()[:, :, None]).clamp(max=1 / 3)
    before, after = shares.unbind(-1)
    return _crop_and_resize(images, targets, before, after, flips)


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
    color: float = 0.2,
    strength: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random resized crop (Szegedy et al., CVPR 2015, section 6), horizontal flip and color jitter.

    Args:
        images, targets, sizes, generator: see the module; ``sizes`` is not used.
        area: minimum share of the image area, in (0, 1]; drawn uniformly between this and 1.
        aspect: maximum aspect ratio of the crop, at least 1; smaller where a side would exceed the image.
        hflip: probability of a horizontal flip.
        color: maximum relative change of brightness, contrast and saturation, in [0, 1].
        strength: factor on 1 - ``area``, on the logarithm of ``aspect`` and on ``color``.

    Raises:
        ValueError: an argument is outside its range.
    """
    _check_strength(strength)
    if not 0 < area <= 1 or aspect < 1 or not 0 <= hflip <= 1 or not 0 <= color <= 1:
        raise ValueError(
            "resized_crop needs area in (0, 1], aspect >= 1, hflip and color in [0, 1], "
            f"got {area}, {aspect}, {hflip}, {color}"
        )
    area, aspect, color = area + (1 - area) * (1 - strength), aspect**strength, color * strength
    # Draw all numbers whatever the options are, so that changing one option does not change the other numbers.
    drawn = torch.rand(len(images), 8, generator=generator)
    share = (area + (1 - area) * drawn[:, 0]).sqrt()
    # A larger ratio would need a side longer than the image.
    most = (share**-2).clamp(max=aspect)
    stretch = most ** (drawn[:, 1] - 0.5)
    parts = torch.stack([share / stretch, share * stretch], 1).clamp(max=1)
    flips = torch.stack([torch.zeros(len(images), dtype=torch.bool), drawn[:, 2] < hflip], 1)
    before = (1 - parts) * drawn[:, 3:5]
    images, targets = _crop_and_resize(images, targets, before, 1 - parts - before, flips)
    factors = 1 + color * (2 * drawn[:, 5:] - 1)
    return _color_jitter(images, *_to_device(factors, images.device)[..., None, None, None].unbind(1)), targets


def _color_jitter(
    images: torch.Tensor, brightness: torch.Tensor, contrast: torch.Tensor, saturation: torch.Tensor
) -> torch.Tensor:
    """Scale around black, around the mean luma of the image, and around the luma of each pixel (ITU-R BT.601)."""
    images = (images * brightness).clamp(0, 255)
    mean = _luma(images).mean((2, 3), keepdim=True)
    images = (mean + (images - mean) * contrast).clamp(0, 255)
    luma = _luma(images)
    return (luma + (images - luma) * saturation).clamp(0, 255)


def _luma(images: torch.Tensor) -> torch.Tensor:
    red, green, blue = images.split(1, 1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _crop_and_resize(
    images: torch.Tensor, targets: torch.Tensor, before: torch.Tensor, after: torch.Tensor, flips: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Crop each image, flip it, and resize it to its original size.

    Args:
        before: [B, 2], the cropped share at the top and at the left.
        after: [B, 2], the cropped share at the bottom and at the right.
        flips: [B, 2], vertical and horizontal.
    """
    # In the coordinates of grid_sample an image spans [-1, 1].
    scale = (1 - before - after) * torch.where(flips, -1.0, 1.0)
    shift = before - after
    matrix = torch.zeros(len(images), 2, 3)
    # The rows of the matrix are x, y; the shares are y, x.
    matrix[:, 0, 0], matrix[:, 0, 2] = scale[:, 1], shift[:, 1]
    matrix[:, 1, 1], matrix[:, 1, 2] = scale[:, 0], shift[:, 0]
    masks = [targets.float()] if _are_masks(targets) else []
    both = torch.cat([images.float(), *masks], 1)
    points = F.affine_grid(_to_device(matrix, both.device), list(both.shape), align_corners=False)
    both = F.grid_sample(both, points, mode="bilinear", padding_mode="border", align_corners=False)
    # Interpolation may exceed the range by a rounding error.
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
    strength: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift each image by up to ``pixels`` along each axis, as He et al. (CVPR 2016, section 4.2) for CIFAR-10.

    Args:
        images, targets, sizes, generator: see the module; ``sizes`` is not used.
        pixels: maximum shift in either direction, drawn per axis.
        fill: pad with ``zero`` (black, background) or repeat the pixels at the ``edge``.
        strength: factor on ``pixels``, whose product is rounded.

    Raises:
        ValueError: ``pixels`` is negative, or ``strength`` is outside [0, 1].
    """
    _check_strength(strength)
    if pixels < 0:
        raise ValueError(f"shift needs pixels >= 0, got {pixels}")
    pixels = round(strength * pixels)
    moves = torch.randint(-pixels, pixels + 1, (len(images), 2), generator=generator)
    moves = _to_device(moves, images.device)
    masks = [targets.float()] if _are_masks(targets) else []
    both = torch.cat([images.float(), *masks], 1)
    wide = F.pad(both, [pixels] * 4, mode="replicate" if fill == "edge" else "constant")
    rows, columns = (
        torch.arange(side, device=images.device)[None] + pixels - move[:, None]
        for side, move in zip(both.shape[-2:], moves.unbind(1), strict=True)
    )
    # Indices on both sides of a slice move their axes to the front: [B, S, S, C].
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    both = wide[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
    return both[:, :3], both[:, 3:] if masks else targets


def _check_strength(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength:g} must be from 0 to 1")


def _to_device(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy drawn numbers to the device of the images, without blocking."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)


def _are_masks(targets: torch.Tensor) -> bool:
    return targets.ndim == 4
