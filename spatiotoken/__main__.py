"""``python -m spatiotoken``."""

from spatiotoken.cli import main

main()
