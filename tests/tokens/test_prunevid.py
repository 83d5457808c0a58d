"""PruneVid: the authors' vectors, and scenes whose right answer is evident."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.prunevid import PruneVid, cluster_tokens, scene_labels, scene_lengths, static_places
from tests.vectors import cases


def reduce(method: PruneVid, frames: Tensor) -> ReducedTokens:
    return method.reduce(VideoFeatures(frames.flatten(0, 1), (frames.shape[0], 1, frames.shape[1])))


def same_rows(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the order of the rows."""
    order = torch.cdist(expected, actual).argmin(dim=1)
    assert order.sort().values.tolist() == list(range(actual.shape[0]))
    torch.testing.assert_close(actual[order], expected, atol=2e-4, rtol=0)


def test_vectors() -> None:
    for hyper, tensors in cases("PruneVid"):
        frames, out = tensors["in.features"].float(), tensors["out.tokens"]
        lengths = scene_lengths(scene_labels(frames, hyper["temporal_segment_ratio"], hyper["k"]).tolist())
        assert lengths == tensors["out.window_sizes"].tolist()
        method = PruneVid(
            similarity=hyper["tau"],
            segment_ratio=hyper["temporal_segment_ratio"],
            cluster_ratio=hyper["cluster_ratio"],
            neighbours=hyper["k"],
        )
        reduced = reduce(method, frames)
        assert reduced.source.shape[0] == out.shape[0] and (reduced.assignment >= 0).all()
        # Theirs come scene by scene, static tokens first, then frame by frame, clusters in order of score.
        frame = reduced.source // frames.shape[1]
        start, offset = 0, 0
        for length, static, dynamic in zip(
            lengths, tensors["out.static_sizes"], tensors["out.dynamic_sizes"], strict=True
        ):
            place = static_places(frames[start : start + length], hyper["tau"])[reduced.source % frames.shape[1]]
            scene = (frame >= start) & (frame < start + length)
            assert (scene & place).sum() == static and (scene & ~place).sum() == dynamic
            assert (frame[scene & place] == start).all()
            same_rows(reduced.embeddings[scene & place], out[offset : offset + static])
            offset += int(static)
            per_frame = int(dynamic) // length
            for t in range(start, start + length):
                same_rows(reduced.embeddings[(frame == t) & ~place], out[offset : offset + per_frame])
                offset += per_frame
            start += length


@pytest.mark.parametrize(
    ("labels", "lengths"),
    [
        ("aaabb", [3, 2]),
        ("aaabaa", [6]),  # b is too short, the second run of a not its longest
        ("aabaa", [5]),  # both runs of a are the longest, and b between them joins them
        ("aacbbb", [2, 4]),
        ("aaacbb", [4, 2]),
        ("aacbb", [3, 2]),  # equal neighbours: the left one
        ("aacdbbbb", [2, 6]),  # c and d are freed together
        ("caab", [4]),
        ("abcd", [4]),  # nothing holds
        ("aacbbbdaaaa", [7, 4]),  # aac goes to bbb, so that d lies between six and four frames
        ("a", [1]),
    ],
)
def test_scene_lengths(labels: str, lengths: list[int]) -> None:
    assert scene_lengths([ord(label) for label in labels]) == lengths


def test_static_places() -> None:
    east, north = torch.eye(2)
    scene = torch.stack([torch.stack([east, east]), torch.stack([east, north]), torch.stack([3 * east, east])])
    # The second place: cosines 0, 0 and 1.
    assert static_places(scene, 0.8).tolist() == [True, False]
    assert static_places(scene, 0.3).tolist() == [True, True]
    assert static_places(scene, 0.34).tolist() == [True, False]
    assert not static_places(torch.ones(5, 3, 7), 1.0).any()
    assert not static_places(torch.ones(1, 3, 7), 0.8).any()


def test_clusters_are_centred_on_themselves() -> None:
    tokens = torch.tensor([0.0, 0.1, 0.3, 5.0, 5.1, 5.3]).view(1, 6, 1).repeat(20, 1, 1)
    owner = cluster_tokens(tokens, 2, 3)
    assert owner.shape == (20, 6) and (owner == owner[0]).all()
    assert len(set(owner[0, :3].tolist())) == 1 and owner[0, 0] < 3
    assert len(set(owner[0, 3:].tolist())) == 1 and owner[0, 3] >= 3
    assert cluster_tokens(torch.zeros(1, 4, 3), 3, 7).tolist() == [[0, 1, 2, 0]]


def test_static_and_dynamic_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    background, moving = torch.randn(1, 5, 32, generator=generator), torch.randn(4, 3, 32, generator=generator)
    frames = torch.cat([background.repeat(4, 1, 1), moving], dim=1)
    reduced = reduce(PruneVid(), frames)
    assert reduced.source.tolist() == [*range(8), 13, 14, 15, 21, 22, 23, 29, 30, 31]
    assert (reduced.assignment.view(4, 8)[:, :5] == torch.arange(5)).all()
    torch.testing.assert_close(reduced.embeddings[:5], background[0])
    assert torch.equal(reduced.embeddings[5:8], moving[0])
    fewer = reduce(PruneVid(unclustered=1), frames)
    assert fewer.source.shape[0] == 2 + 4 * 1


def test_images_and_few_tokens() -> None:
    picture = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    reduced = reduce(PruneVid(), picture)
    assert reduced.source.shape[0] == 10 and reduced.embeddings.dtype == torch.bfloat16
    assert torch.equal(reduce(PruneVid(), picture[:, :14]).embeddings, picture[0, :14])
    assert reduce(PruneVid(unclustered=1, cluster_ratio=0.01), picture[:, :2]).source.tolist() == [0]
    still = reduce(PruneVid(), torch.ones(9, 1, 4))
    assert still.source.tolist() == [0] and torch.equal(still.embeddings, torch.ones(1, 4))


def test_nothing_is_merged_at_one() -> None:
    same = torch.ones(6, 20, 7)
    assert torch.equal(reduce(PruneVid(similarity=1.0, cluster_ratio=1.0), same).embeddings, same.flatten(0, 1))
    assert reduce(PruneVid(similarity=0.9, cluster_ratio=1.0), same).source.tolist() == list(range(20))
