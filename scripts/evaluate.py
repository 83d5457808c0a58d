#!/usr/bin/env python3
"""``spatiotoken eval`` as a script, for `accelerate launch scripts/evaluate.py --dataset … --config … --output …`."""

from __future__ import annotations

import sys

from spatiotoken.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "eval")
    main()
