"""One adapter per model family, installed as ``spatiotoken.patches``."""
