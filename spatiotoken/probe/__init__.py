"""Small models to try the plugin on."""

from spatiotoken.probe.tiny import TINY_MODEL_TYPES, build_tiny

__all__ = ["TINY_MODEL_TYPES", "build_tiny"]
