"""Methods of the `layers` stage, one file each."""

from spatiotoken.layers.base import LayerPruner, LayerReducer

__all__ = ["LayerPruner", "LayerReducer"]
