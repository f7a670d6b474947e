"""Philox4x32-10 (Salmon et al., SC 2011) in plain PyTorch: the same numbers as the kernels draw."""

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW32 = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds on 32-bit words that are held in int64 (products wrap, their bits are right)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = high32(right) ^ c1 ^ k0, right & LOW32, high32(left) ^ c3 ^ k1, left & LOW32
        k0, k1 = (k0 + WEYL[0]) & LOW32, (k1 + WEYL[1]) & LOW32
    return c0, c1, c2, c3


def high32(product: Tensor) -> Tensor:
    return (product >> 32) & LOW32


def uniforms(count: int, seed: int, *, stream: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``count`` numbers in [0, 1) with 24 bits: element e is word ``e % 4`` of counter ``e // 4``."""
    index = torch.arange((count + 3) // 4, device=device)
    zero = torch.zeros_like(index)
    words = philox((index & LOW32, index >> 32, zero + stream, zero), (seed & LOW32, (seed >> 32) & LOW32))
    return (torch.stack(words, -1).flatten()[:count] >> 8).to(dtype) * 2.0**-24
