"""Rows of logits, sequences that want a token of them, and whether what was drawn is what should be."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from shared.engine.api import BatchItem, SamplingParams

VOCAB, EOS = 97, 5
CUTS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"min_p": 0.02, "top_k": 20, "top_p": 0.7, "temperature": 1.3},
]
MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.0, "top_p": 0.9, "seed": 2},
    {"temperature": 1.0, "top_k": 5, "num_logprobs": 3},
    {"num_logprobs": 0, "frequency_penalty": 0.4},
    {"temperature": 1.2, "repetition_penalty": 1.3, "min_p": 0.05, "seed": 9},
    {"min_tokens": 5},
    {"logit_bias": ((7, 50.0),)},
]


def rows(count: int, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def item(history: Sequence[int] = (1, 2, 3), output_start: int = 3, **params: Any) -> BatchItem:
    """A sequence that has computed all of `history` and wants its next token."""
    last = len(history) - 1
    return BatchItem("r", history[-1:], last, (0,), True, SamplingParams(**params), output_start, tuple(history))


def plain_distribution(row: torch.Tensor, params: SamplingParams) -> Any:
    """Temperature, min_p, top_k, top_p, straight from their definitions."""
    logits = row.double().numpy() / params.temperature
    p = np.exp(logits - logits.max())
    p[p < params.min_p] = 0
    order = sorted(range(len(p)), key=lambda token: (-p[token], token))
    if params.top_k:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    kept, mass = [], 0.0
    for token in order:
        kept.append(token)
        mass += p[token]
        if mass >= params.top_p:
            break
    p[[token for token in order if token not in kept]] = 0
    p /= p.sum()
    return p


def chi_square_bound(freedom: int) -> float:
    """What 99.9 % of fair samplers stay below (Wilson and Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3 if freedom else 1e-9
