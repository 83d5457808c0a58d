"""ToMe: in each layer of the tower the most similar patches of a frame merge in pairs."""

from __future__ import annotations

from typing import ClassVar

from spatiotoken.registry import Retention
from spatiotoken.vision.base import TowerMerge, TowerReducer, TowerShape, TowerTokens
from spatiotoken.vision.pairs import mean_keys, merge_patches, steps_left


def tome_count(patches: int, retention: float, layer: int, depth: int) -> int:
    """How many of the ``patches`` of a frame are left behind a layer: about as many go in each of ``depth`` layers."""
    return steps_left(patches, max(1, int(patches * retention + 1e-9)), layer, depth)


class ToMe(TowerReducer, method="tome", paper="2210.09461"):
    """Merges the most similar patches of each frame in pairs, some in every layer (arXiv 2210.09461).

    Between attention and MLP of a layer, the ``[n]`` patches of a frame are split into even and odd ones in order of
    place. Each even one is matched with the odd one whose key, averaged over heads, is the most similar by cosine, and
    the best matched merge into the mean over all patches that they stand for, at the odd one's position. As many go in
    each layer (the paper's constant schedule), so that ``int(retention * N)`` of a frame's ``N``, at least one, are
    left behind the last. Attention is proportional: a key counts as often as it stands for patches. CLS tokens never
    merge. A retention below ``0.5 ** depth`` takes several matchings in a layer.

    The authors give the number that goes in each layer; a share fits any tower and picture size. Their unmerged tokens
    move to the front, which decides what is even in the next layer: here tokens stay in place. Keys are those that
    attend, with rotary positions where the tower has them, so that neighbours are the more alike. The released code
    carries a non-commercial licence; ours is written from the paper's rule and compared with its results.
    """

    kind: ClassVar[str] = "merging in a frame"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    complexity: ClassVar[str] = "O(TN^2 D) per layer"
    fidelity: ClassVar[str] = "authors' vectors, in part"
    proportional: ClassVar[bool] = True

    retention: Retention = 0.25

    def layers(self, tower: TowerShape) -> tuple[int, ...]:
        return () if self.retention == 1 else tuple(range(tower.depth))

    def reduce(self, tokens: TowerTokens) -> TowerMerge | None:
        _, height, width = tokens.grid
        count = tome_count(height * width, self.retention, tokens.layer, tokens.tower.depth)
        return None if count == tokens.counts[0] else merge_patches(tokens, mean_keys(tokens), count)
