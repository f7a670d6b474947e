"""Adversarial attacks with the constructors of torchattacks, on the fused step: see ``docs/attacks.md``.

::

    attack = fairkernels.attacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=10)
    adversarial = attack(images, labels)
"""

from .base import Attack, PerClass
from .gradient import FFGSM, FGSM, MIFGSM, PGD, PGDL2, TPGD, MaskedPGD

__all__ = [
    "FFGSM",
    "FGSM",
    "MIFGSM",
    "PGD",
    "PGDL2",
    "TPGD",
    "Attack",
    "MaskedPGD",
    "PerClass",
]
