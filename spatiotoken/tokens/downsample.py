"""Baseline: spatial average pooling to the same budget."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import TokenReducer
from spatiotoken.tokens.merging import mean_by_assignment


def pooled_grid(height: int, width: int, retention: float) -> tuple[int, int]:
    """The ``(h, w)`` with the most cells within ``retention * height * width``; of equals, the best aspect ratio.

    Never more than the budget, except that one cell is always left.
    """
    budget = max(1, int(height * width * retention + 1e-9))
    candidates = [(h, min(width, budget // h)) for h in range(1, min(height, budget) + 1)]
    # Wasting up to a tenth of the budget is better than pooling a square picture into stripes.
    most = max(h * w for h, w in candidates)
    good = [(h, w) for h, w in candidates if 10 * h * w >= 9 * most]
    return min(good, key=lambda hw: (abs(hw[0] * width - hw[1] * height), -hw[0] * hw[1]))


def downsample_count(grid: tuple[int, int, int], retention: float) -> int:
    """How many tokens are kept of a ``(T, H, W)`` grid."""
    height, width = pooled_grid(grid[1], grid[2], retention)
    return grid[0] * height * width


def pooling_cells(size: int, cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Split ``size`` places into ``cells`` runs of nearly equal length.

    Returns:
        ``[size]`` cell of each place, and ``[cells]`` the middle place of each cell.
    """
    cell = torch.arange(size, device=device) * cells // size
    index = torch.arange(cells, device=device)
    first, last = (index * size + cells - 1) // cells, ((index + 1) * size + cells - 1) // cells - 1
    return cell, (first + last) // 2


class Downsample(TokenReducer, method="downsample"):
    """Spatial average pooling to the same budget: the baseline of a plainly smaller picture.

    Each frame's ``H x W`` tokens are averaged over a grid of nearly equal cells; a cell takes the position of its
    middle token. Cells do not overlap, so ``assignment`` says exactly what was averaged.
    """

    kind: ClassVar[str] = "baseline"
    merges: ClassVar[bool] = True
    complexity: ClassVar[str] = "O(TND)"
    fidelity: ClassVar[str] = "not published"

    retention: Retention = 0.25

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        frames, height, width = video.grid
        device = video.embeddings.device
        h, w = pooled_grid(height, width, self.retention)
        row_cell, row_middle = pooling_cells(height, h, device)
        column_cell, column_middle = pooling_cells(width, w, device)
        time = torch.arange(frames, device=device).view(-1, 1, 1)
        assignment = (time * h * w + row_cell.view(1, -1, 1) * w + column_cell).flatten()
        source = (time * height * width + row_middle.view(1, -1, 1) * width + column_middle).flatten()
        return ReducedTokens(mean_by_assignment(video.embeddings, assignment, source.shape[0]), source, assignment)
