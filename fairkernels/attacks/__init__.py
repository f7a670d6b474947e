"""Adversarial attacks with the constructors of torchattacks, on the fused step: see ``docs/attacks.md``.

::

    attack = fairkernels.attacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=10)
    adversarial = attack(images, labels)
"""

from .apgd import APGD
from .base import Attack, PerClass
from .evaluation import Outcome, evaluate
from .gradient import FFGSM, FGSM, MIFGSM, PGD, PGDL2, TPGD, MaskedPGD
from .roa import ROA
from .shapes import eyeglasses, face_mask, load_shape
from .wearables import EyeglassAttack, FaceMaskAttack

__all__ = [
    "APGD",
    "FFGSM",
    "FGSM",
    "MIFGSM",
    "PGD",
    "PGDL2",
    "ROA",
    "TPGD",
    "Attack",
    "EyeglassAttack",
    "FaceMaskAttack",
    "MaskedPGD",
    "Outcome",
    "PerClass",
    "evaluate",
    "eyeglasses",
    "face_mask",
    "load_shape",
]
