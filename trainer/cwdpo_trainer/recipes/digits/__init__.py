"""Captions for scenes of real handwritten digits, and a LLaVA small enough to learn them on two CPU cores.

`prepare` writes an ordinary preference dataset and an ordinary Hugging Face model with its processor.
"""

from cwdpo_trainer.recipes.digits.prepare import prepare

__all__ = ["prepare"]
