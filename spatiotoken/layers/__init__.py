"""Methods of the `layers` stage, one file each."""

from spatiotoken.layers.base import LayerPruner

__all__ = ["LayerPruner"]
