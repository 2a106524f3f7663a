"""Rotary position embedding: its frequencies, and their table for the positions of a step."""

import math

import torch

from shared.engine.models.config import DenseConfig, RopeScaling


def inverse_frequencies(config: DenseConfig) -> torch.Tensor:
    """theta^(-2i/D) for i < D/2, stretched where the model says so. float32 [D/2]."""
    plain = frequencies(config.head_dim, config.rope_theta)
    return plain if config.rope_scaling is None else _stretch(plain, config.rope_scaling)


def frequencies(dim: int, theta: float) -> torch.Tensor:
    """theta^(-2i/dim) for i < dim/2. float32 [dim/2]."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return 1.0 / theta**exponents


def _stretch(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1's rule: long waves are stretched by `factor`, short ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    original = scaling.original_max_position
    smooth = (original / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    stretched = torch.where(wavelengths > original / scaling.low_freq_factor, frequencies / scaling.factor, between)
    return torch.where(wavelengths < original / scaling.high_freq_factor, frequencies, stretched)


def table(frequencies: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [T, D/2], for positions [T]."""
    angles = positions.float()[:, None] * frequencies[None]
    return angles.cos(), angles.sin()


def turns(frequencies: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The same as numbers to multiply pairs with: complex64 [T, D/2]."""
    return torch.complex(*table(frequencies, positions))
