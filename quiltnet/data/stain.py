"""Stains of light microscopy: colour deconvolution, HED jitter, and normalisation after Macenko and Reinhard.

Images are (B, 3, H, W) float RGB in [0, 1] on any device, and results too. Each row depends on itself alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Ruifrok & Johnston 2001: optical density in R, G, B of haematoxylin, eosin and DAB, with the digits that
# scikit-image has.
RGB_FROM_HED = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))

# Ruderman et al. 1998 as in Reinhard et al. 2001: RGB to cone responses, and their logarithms to l, alpha, beta.
LMS_FROM_RGB = ((0.3811, 0.5783, 0.0402), (0.1967, 0.7244, 0.0782), (0.0241, 0.1288, 0.8444))
LAB_FROM_LOG_LMS = np.diag(np.array([3, 6, 2]) ** -0.5) @ [[1, 1, 1], [1, 1, -2], [1, -1, 0]]

ONE_LEVEL = 1 / 255
BACKGROUND = 240 / 255  # light through no tissue, of Macenko et al. 2009's implementation
TISSUE_DENSITY = 0.15  # a pixel of less optical density in R, G or B is background (same source)
MIN_TISSUE_SHARE = 0.01  # of the pixels, below which nothing is estimated
MIN_STAIN_ANGLE = 5.0  # degrees between two stains; haematoxylin and eosin are some 20 apart
MIN_CONCENTRATION = 0.01
MIN_LAB_DEVIATION = 1e-3  # grey and constant tiles have 0 in alpha and beta


class Stains(NamedTuple):
    """What Macenko's method finds. vectors: (B, 3, 2), unit length, haematoxylin first; max_concentration: (B, 2)."""

    vectors: Tensor
    max_concentration: Tensor
    is_estimable: Tensor  # (B,) bool


# The reference of Macenko's own MATLAB code, which torchstain, StainTools and MONAI have taken over.
MACENKO_REFERENCE = (((0.5626, 0.2159), (0.7201, 0.8012), (0.4062, 0.5581)), (1.9705, 1.0308))

# Mean and standard deviation in l, alpha, beta of HistomicsTK's reference image; of RGB from 0 to 255.
REINHARD_REFERENCE = ((8.63234435, -0.11501964, 0.03868433), (0.57506023, 0.10403329, 0.01364062))


def rgb_to_hed(image: Tensor) -> Tensor:
    """Amounts of haematoxylin, eosin and DAB, ``(B, 3, H, W)``: optical density -ln(RGB + 1/255), deconvolved."""
    return _mix(np.linalg.inv(RGB_FROM_HED).T, _density(image))


def hed_to_rgb(stains: Tensor) -> Tensor:
    """The inverse of ``rgb_to_hed``, clipped to [0, 1]."""
    return _transmit(_mix(np.array(RGB_FROM_HED).T, stains))


def hed_jitter(image: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Each stain s becomes alpha * s + beta (Tellez et al. 2018, 2019). alpha, beta: (B, 3); 1 and 0 change nothing."""
    # Deconvolution, scaling and convolution are one 3 x 3 matrix for each image.
    rgb_from_hed = torch.as_tensor(RGB_FROM_HED, dtype=image.dtype, device=image.device).T
    hed_from_rgb = torch.as_tensor(np.linalg.inv(RGB_FROM_HED), dtype=image.dtype, device=image.device).T
    scaled = (rgb_from_hed[None, :, :, None] * alpha[:, None, :, None] * hed_from_rgb[None, None]).sum(2)  # (B, 3, 3)
    shift = (rgb_from_hed[None] * beta[:, None]).sum(-1)  # (B, 3)
    return _transmit(_mix(scaled, _density(image)) + shift[:, :, None, None])


def estimate_stains(image: Tensor) -> Stains:
    """Directions and strengths of the two stains of each image (Macenko et al. 2009, alpha=1, beta=0.15).

    Not estimable: under 1 % tissue, one colour only (stains less than 5 degrees apart), or no stain at all. Needs
    float64 for three numbers an image, which Apple's MPS does not have.
    """
    density = _macenko_density(image).flatten(2)  # (B, 3, N)
    is_tissue = (density >= TISSUE_DENSITY).all(1)  # (B, N)
    count = is_tissue.sum(-1)  # (B,)
    vectors = _extreme_vectors(density, is_tissue, count)  # (B, 3, 2)
    cosine = (vectors[..., 0] * vectors[..., 1]).sum(-1)  # (B,)
    apart = cosine < np.cos(np.radians(MIN_STAIN_ANGLE))
    vectors = torch.where(apart[:, None, None], vectors, _reference_vectors(MACENKO_REFERENCE[0], image))
    concentration = _concentrations(vectors, density)  # (B, 2, N)
    every = torch.full_like(count, density.shape[-1])[:, None]
    strongest = _percentiles(concentration, every, (0.99,))[..., 0]  # (B, 2)
    has_stain = (strongest > MIN_CONCENTRATION).all(-1)
    return Stains(vectors, strongest, apart & has_stain & _has_tissue(image))


def macenko_normalize(
    image: Tensor, reference: tuple[Sequence | Tensor, Sequence | Tensor] = MACENKO_REFERENCE
) -> Tensor:
    """Stains exchanged for those of a reference; images whose stains cannot be estimated are returned as they are.

    reference: vectors (3, 2) and concentrations (2,), such as the first two of ``estimate_stains`` for one image.
    """
    vectors, strongest, is_estimable = estimate_stains(image)
    concentration = _concentrations(vectors, _macenko_density(image).flatten(2))  # (B, 2, N)
    target = torch.as_tensor(reference[1], dtype=image.dtype, device=image.device)  # (2,)
    concentration = concentration * (target / strongest.clamp(min=MIN_CONCENTRATION))[..., None]
    density = _mix(_reference_vectors(reference[0], image), concentration.unflatten(-1, image.shape[-2:]))
    normalized = (BACKGROUND * torch.exp(-density)).clamp(0, 1)
    return torch.where(is_estimable[:, None, None, None], normalized, image)


def lab_statistics(image: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``(B, 3)`` over an image's l, alpha, beta (Reinhard et al. 2001, natural log)."""
    lab = _rgb_to_lab(image).flatten(2)
    mean = lab.mean(-1, dtype=_sum_dtype(image))
    deviation = (lab - mean[..., None]).square().mean(-1).sqrt()
    return mean.to(image.dtype), deviation.to(image.dtype)


def reinhard_normalize(
    image: Tensor, reference: tuple[Sequence | Tensor, Sequence | Tensor] = REINHARD_REFERENCE
) -> Tensor:
    """Mean and deviation in l, alpha, beta brought to a reference's (Reinhard et al. 2001).

    Returned as they are: images with under 1 % tissue, and grey or constant ones, whose deviation is 0.
    """
    mean, deviation = lab_statistics(image)
    target_mean, target_deviation = (
        torch.as_tensor(values, dtype=image.dtype, device=image.device) for values in reference
    )
    is_estimable = (deviation > MIN_LAB_DEVIATION).all(-1) & _has_tissue(image)
    gain = target_deviation / deviation.clamp(min=MIN_LAB_DEVIATION)  # (B, 3)
    lab = (_rgb_to_lab(image) - mean[:, :, None, None]) * gain[:, :, None, None]
    log_lms = _mix(np.linalg.inv(LAB_FROM_LOG_LMS), lab + target_mean.reshape(-1, 3)[:, :, None, None])
    normalized = (_mix(np.linalg.inv(LMS_FROM_RGB), log_lms.exp()) / 255).clamp(0, 1)
    return torch.where(is_estimable[:, None, None, None], normalized, image)


def _density(image: Tensor) -> Tensor:
    return -torch.log(image + ONE_LEVEL)


def _transmit(density: Tensor) -> Tensor:
    """The inverse of ``_density``, clipped."""
    return (torch.exp(-density) - ONE_LEVEL).clamp(0, 1)


def _macenko_density(image: Tensor) -> Tensor:
    return -torch.log((image + ONE_LEVEL) / BACKGROUND)


def _rgb_to_lab(image: Tensor) -> Tensor:
    # Black has no logarithm: it counts as one level.
    lms = _mix(LMS_FROM_RGB, image.clamp(min=ONE_LEVEL) * 255)
    return _mix(LAB_FROM_LOG_LMS, lms.log())


def _mix(matrix: Tensor | np.ndarray | Sequence, image: Tensor) -> Tensor:
    """Channels j of ``(B, channels, H, W)`` into channels i by ``matrix``, (i, j) or one for each image (B, i, j).

    By plain sums and not as a matrix product, whose last bit depends on the size of the batch.
    """
    matrix = torch.as_tensor(matrix, dtype=image.dtype, device=image.device)[..., None, None]
    matrix = matrix if matrix.ndim == 5 else matrix[None]  # (B or 1, i, j, 1, 1)
    mixed = matrix[:, :, 0] * image[:, :1]
    for channel in range(1, image.shape[1]):
        mixed = mixed + matrix[:, :, channel] * image[:, channel : channel + 1]
    return mixed


def _has_tissue(image: Tensor) -> Tensor:
    is_tissue = (_macenko_density(image) >= TISSUE_DENSITY).all(1)  # (B, H, W)
    return is_tissue.flatten(1).sum(-1) >= MIN_TISSUE_SHARE * is_tissue[0].numel()


def _extreme_vectors(density: Tensor, is_tissue: Tensor, count: Tensor) -> Tensor:
    """``(B, 3, 2)``: the 1st and 99th percentile of directions in the plane of most variance; haematoxylin first."""
    some = count.clamp(min=1)[:, None]
    mean = (density * is_tissue[:, None]).sum(-1, dtype=torch.float64) / some  # (B, 3)
    centred = (density - mean[..., None]) * is_tissue[:, None]
    products = [(centred[:, i] * centred[:, j]).sum(-1) for i in range(3) for j in range(3)]
    covariance = torch.stack(products, -1).unflatten(-1, (3, 3)) / some[..., None]  # (B, 3, 3)
    plane = torch.linalg.eigh(covariance).eigenvectors[..., 1:]  # (B, 3, 2), most variance last
    # An eigenvector has no sign. Towards the tissue's mean, no direction is cut in two by the jump from pi to -pi.
    towards = (plane * mean[..., None]).sum(1, keepdim=True)
    plane = torch.where(towards < 0, -plane, plane).to(density.dtype)
    across, along = ((density * plane[..., axis, None]).sum(1) for axis in (0, 1))  # (B, N)
    angle = torch.atan2(along, across).masked_fill(~is_tissue, torch.inf)
    extremes = _percentiles(angle, count, (0.01, 0.99))  # (B, 2)
    vectors = plane[:, :, :1] * extremes.cos()[:, None] + plane[:, :, 1:] * extremes.sin()[:, None]
    is_swapped = vectors[:, 0, 0] <= vectors[:, 0, 1]  # haematoxylin takes more of the red
    return torch.where(is_swapped[:, None, None], vectors.flip(-1), vectors)


def _concentrations(vectors: Tensor, density: Tensor) -> Tensor:
    """Least squares: ``(B, 2, N)`` amounts of two unit vectors (B, 3, 2) in (B, 3, N)."""
    first, second = ((density * vectors[..., stain, None]).sum(1) for stain in (0, 1))  # (B, N)
    cosine = (vectors[..., 0] * vectors[..., 1]).sum(-1)[:, None]
    return torch.stack([first - cosine * second, second - cosine * first], 1) / (1 - cosine.square())[..., None]


def _percentiles(values: Tensor, count: Tensor, shares: tuple[float, ...]) -> Tensor:
    """``(..., shares)`` over the ``count`` smallest of the last dimension, interpolated as by numpy; 0 of none."""
    ordered = values.sort(-1).values
    count = count.expand(values.shape[:-1])[..., None]
    place = torch.tensor(shares, dtype=torch.float64, device=values.device) * (count - 1).clamp(min=0)
    below, above = place.floor().long(), place.ceil().long()
    low, high = ordered.gather(-1, below), ordered.gather(-1, above)
    return torch.where(count > 0, low + (high - low) * (place - below).to(values.dtype), 0)


def _reference_vectors(vectors: Sequence | Tensor, image: Tensor) -> Tensor:
    """``(3, 2)`` of unit length."""
    vectors = torch.as_tensor(vectors, dtype=image.dtype, device=image.device).reshape(3, 2)
    return vectors / vectors.norm(dim=0)


def _sum_dtype(image: Tensor) -> torch.dtype:
    """Long sums in float64, so that their order, which may depend on the batch, does not show."""
    return torch.float32 if image.device.type == "mps" else torch.float64
