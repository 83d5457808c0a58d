"""The vision tower: methods of the `vision` stage, one file each, packed rows, and exact speed-ups."""

from spatiotoken.vision.base import TowerReducer

__all__ = ["TowerReducer"]
