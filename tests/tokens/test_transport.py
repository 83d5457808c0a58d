"""Optimal transport of tokens against AOT's own results."""

from __future__ import annotations

import torch

from spatiotoken.tokens.transport import merge_clips, merge_into_anchors, sinkhorn
from tests.vectors import cases


def places(mask: torch.Tensor) -> torch.Tensor:
    """``[T, k]`` indices of what is set in each frame."""
    return mask.nonzero()[:, 1].view(mask.shape[0], -1)


def test_authors_vectors_within_frames() -> None:
    for hyper, tensors in cases("AOT", "intra"):
        side = int(tensors["in.features"].shape[1] ** 0.5)
        anchors = places(tensors["in.anchor_mask"])
        assert anchors.shape[1] == hyper["k"]
        merged, owner = merge_into_anchors(tensors["in.features"].float(), anchors, side, side)
        torch.testing.assert_close(merged, tensors["out.anchors_merged"], atol=2e-4, rtol=0)
        assert torch.equal(owner.gather(1, anchors), torch.arange(hyper["k"]).expand_as(anchors))


def test_authors_vectors_between_frames() -> None:
    """Of each clip the authors emit the anchors unmerged, then what later frames keep, then the anchors merged."""
    for hyper, tensors in cases("AOT", "inter"):
        frames = tensors["in.features"].float()
        values = frames.gather(1, places(tensors["in.anchor_mask"]).unsqueeze(-1).expand(-1, -1, frames.shape[-1]))
        kept = 4  # what the 0.3 quantile of 12 is above of
        merged, stays, _ = merge_clips(values, 4, kept)
        assert stays.sum(dim=1).tolist() == [12, kept, kept, kept] * 4
        clips = []
        for first, own in zip(range(0, 16, 4), merged, strict=True):
            later = [values[frame][stays[frame]] for frame in range(first + 1, first + 4)]
            clips.append(torch.cat([values[first], *later, own]))
        assert hyper["keep_ratio"] == 0.3
        torch.testing.assert_close(torch.cat(clips), tensors["out.tokens"], atol=2e-4, rtol=0)


def test_sinkhorn_has_equal_weights() -> None:
    plan = sinkhorn(torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0)), iterations=200, tolerance=1e-6)
    torch.testing.assert_close(plan.sum(dim=1), torch.full((3, 4), 1 / 4))
    torch.testing.assert_close(plan.sum(dim=2), torch.full((3, 5), 1 / 5), atol=1e-5, rtol=0)


def test_sinkhorn_takes_the_cheap_way() -> None:
    plan = sinkhorn(1 - torch.eye(3)[None])
    assert (plan[0].diagonal() > 0.33).all()


def test_settled_problems_do_not_depend_on_others() -> None:
    cost = torch.rand(4, 6, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.1, 1, 2, 3]).view(4, 1, 1)
    for alone, together in zip(cost.split(1), sinkhorn(cost), strict=True):
        torch.testing.assert_close(sinkhorn(alone)[0], together)
    assert not torch.allclose(sinkhorn(cost, joint=True), sinkhorn(cost), atol=1e-6)


def test_tokens_go_to_the_anchor_that_they_resemble() -> None:
    kinds = torch.eye(3)[[0, 1, 0, 0, 1, 1]]
    merged, owner = merge_into_anchors(kinds[None], torch.tensor([[0, 1]]), 2, 3)
    assert owner.tolist() == [[0, 1, 0, 0, 1, 1]]
    torch.testing.assert_close(merged[0], torch.eye(3)[:2], atol=2e-3, rtol=0)


def test_what_a_clip_has_not_seen_stays() -> None:
    """The anchor of the second frame that resembles none of the first is spread, and so stays."""
    first, second = torch.eye(4)[[0, 1, 2]], torch.eye(4)[[2, 3, 0]]
    merged, stays, owner = merge_clips(torch.stack([first, second]), 2, 1)
    assert stays.tolist() == [[True] * 3, [False, True, False]]
    assert owner[1, 0] == 2 and owner[1, 2] == 0
    assert (merged[0].argmax(dim=1) == torch.arange(3)).all() and (merged[0, :, 3] == 0).all()
