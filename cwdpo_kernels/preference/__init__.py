"""Preference losses: base.py says what one is, catalog.py has the formulas, functional.py applies them."""

from .base import Pairs, PreferenceLoss
from .catalog import (
    BCO,
    CPO,
    DPO,
    EXO,
    IPO,
    NCA,
    ORPO,
    PREFERENCE_LOSSES,
    SPPO,
    APODown,
    APOZero,
    CoolingWeighted,
    DiscoPOP,
    Hinge,
    Robust,
    SimPO,
)
from .functional import linear_preference_loss, preference_loss

__all__ = [
    "BCO",
    "CPO",
    "DPO",
    "EXO",
    "IPO",
    "NCA",
    "ORPO",
    "PREFERENCE_LOSSES",
    "SPPO",
    "APODown",
    "APOZero",
    "CoolingWeighted",
    "DiscoPOP",
    "Hinge",
    "Pairs",
    "PreferenceLoss",
    "Robust",
    "SimPO",
    "linear_preference_loss",
    "preference_loss",
]
