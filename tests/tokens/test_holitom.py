"""HoliTom: the authors' vectors, and windows whose right answer is evident."""

from __future__ import annotations

import pytest
import torch

from spatiotoken.structures import VideoFeatures
from spatiotoken.tokens.holitom import (
    HoliTom,
    Window,
    holitom_budget,
    holitom_count,
    merge_static,
    static_counts,
    static_since,
    static_windows,
)
from tests.vectors import cases


def clip(frames: torch.Tensor, saliency: torch.Tensor | None = None) -> VideoFeatures:
    """A clip of ``[T, N, D]`` tokens on a ``1 x N`` grid; the last token of a frame is the most salient."""
    if saliency is None:
        saliency = torch.arange(frames.shape[1]).float().repeat(frames.shape[0])
    return VideoFeatures(frames.flatten(0, 1), (frames.shape[0], 1, frames.shape[1]), saliency=saliency.view(1, -1))


def scenes(*codes: str) -> torch.Tensor:
    """``[T, N, D]``: a string per frame, a letter per place; equal letters are equal tokens, others orthogonal."""
    return torch.eye(26)[torch.tensor([[ord(letter) - ord("a") for letter in code] for code in codes])]


def test_vectors() -> None:
    for hyper, tensors in cases("HoliTom", "case"):
        frames = tensors["in.features"].float()
        windows = static_windows(static_counts(static_since(frames, hyper["tau"])).tolist(), hyper["max_window"])
        assert [[w.start, w.stop - 1] for w in windows] == tensors["out.windows"].tolist()
        assert [w.static for w in windows] == tensors["out.static_count"].tolist()
        budget = holitom_budget(windows, frames.shape[1], hyper["retain_ratio"])
        counts = [static + (w.stop - w.start) * dynamic for w, (static, dynamic) in zip(windows, budget, strict=True)]
        assert counts == tensors["out.tokens_per_window"].tolist()

        method = HoliTom(
            retention=hyper["retain_ratio"],
            similarity=hyper["tau"],
            beta=hyper["beta"] if hyper["use_beta"] else None,
            neighbours=hyper["K"],
            max_window=hyper["max_window"],
        )
        reduced = method.reduce(clip(frames, tensors["in.attn"]))
        assert reduced.source.shape[0] == holitom_count(windows, frames.shape[1], hyper["retain_ratio"])
        # Ours are in order of place; theirs are window by window, static tokens first.
        starts = torch.tensor([w.start for w in windows])
        window = torch.searchsorted(starts, reduced.source // frames.shape[1], right=True)
        members = torch.bincount(reduced.assignment[reduced.assignment >= 0])
        order = (2 * window + (members == 1)).argsort(stable=True)
        torch.testing.assert_close(reduced.embeddings[order], tensors["out.tokens"], atol=2e-4, rtol=0)


def test_windows_save_the_most() -> None:
    frames = scenes("abc", "abd", "abe", "xye", "xzg", "xwv")
    counts = static_counts(static_since(frames, 0.8)).tolist()
    assert counts[2][0] == 2 and counts[1][1] == 3 and counts[3][2] == 1 and counts[4][2] == 0
    # 2 places over 3 frames save 4; 1 place over the next 3 saves 2; any other cut saves less.
    assert static_windows(counts, 1024) == [Window(0, 3, 2), Window(3, 6, 1)]
    assert static_windows(counts, 1) == [Window(t, t + 1, 0) for t in range(6)]
    assert all(w.stop - w.start <= 2 for w in static_windows(counts, 2))
    # Two places over two frames save as much as one over three: the last frame stays single.
    counts = static_counts(static_since(scenes("ab", "ab", "ac"), 0.8)).tolist()
    assert static_windows(counts, 1024) == [Window(0, 2, 2), Window(2, 3, 0)]


@pytest.mark.parametrize("frames", [5, 6, 7])
def test_windows_against_all_partitions(frames: int) -> None:
    for seed in range(20):
        alike = torch.rand(frames, 4, generator=torch.Generator().manual_seed(seed)) < 0.7
        since = (torch.arange(frames)[:, None] * ~alike).cummax(dim=0).values
        windows = static_windows(static_counts(since).tolist(), 4)
        best = 0
        for cuts in range(2 ** (frames - 1)):
            edges = [0, *(t for t in range(1, frames) if cuts >> (t - 1) & 1), frames]
            spans = [(s, e) for s, e in zip(edges, edges[1:], strict=False)]
            if all(e - s <= 4 for s, e in spans):
                best = max(best, sum(int(alike[s + 1 : e].all(dim=0).sum()) * (e - s - 1) for s, e in spans))
        assert sum(w.static * (w.stop - w.start - 1) for w in windows) == best
        assert [w.start for w in windows] == [0, *(w.stop for w in windows[:-1])]
        for w in windows:
            assert w.static == (int(alike[w.start + 1 : w.stop].all(dim=0).sum()) if w.stop - w.start > 1 else 0)


def test_static_places_are_kept_once() -> None:
    frames = scenes("abcd", "abce", "abcf")
    frames[:, 0, 1] = torch.tensor([0.0, 0.3, 0.0])
    reduced = HoliTom(retention=0.5).reduce(clip(frames))
    # 6 of 12 tokens: what the window leaves, 3 static and 3 dynamic, so nothing is clustered.
    assert reduced.source.tolist() == [0, 1, 2, 3, 7, 11]
    assert reduced.assignment.view(3, 4).tolist() == [[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 2, 5]]
    torch.testing.assert_close(reduced.embeddings[0], frames[:, 0].mean(dim=0))
    assert torch.equal(reduced.embeddings[3:], frames[:, 3])


def test_moving_frames_keep_their_salient_tokens() -> None:
    reduced = HoliTom(retention=0.3).reduce(clip(scenes("abcde", "fghij")))
    assert reduced.source.tolist() == [3, 4, 8, 9]
    assert (reduced.assignment >= 0).sum() == 4
    tied = HoliTom(retention=0.3).reduce(clip(scenes("abcde", "fghij"), torch.ones(10)))
    assert tied.source.tolist() == [0, 1, 5, 6]


def test_centres_outweigh_their_members() -> None:
    tokens = torch.tensor([[0.0], [0.1], [0.12], [0.9], [-0.9]])
    merged, centres, cluster = merge_static(tokens, 3, 7, 0.75)
    assert centres.tolist() == [1, 3, 4] and cluster.tolist() == [0, 0, 0, 1, 2]
    torch.testing.assert_close(merged[:, 0], torch.tensor([0.75 * 0.1 + 0.25 * 0.06, 0.9, -0.9]))
    plain, _, _ = merge_static(tokens, 3, 7, None)
    torch.testing.assert_close(plain[:, 0], torch.tensor([0.22 / 3, 0.9, -0.9]))


def test_a_still_clip_keeps_a_token() -> None:
    still = torch.ones(8, 9, 4)
    reduced = HoliTom(retention=0.001).reduce(clip(still))
    assert reduced.source.tolist() == [0] and (reduced.assignment == 0).all()
    assert torch.equal(reduced.embeddings, still[0, :1])
    assert holitom_budget([Window(0, 8, 9)], 9, 0.001) == [(1, 0)]


def test_counts_exceed_the_share_by_less_than_stated() -> None:
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 5, (4,), generator=generator).tolist()
        windows, start = [], 0
        for length in lengths:
            static = int(torch.randint(0, 10, (), generator=generator)) if length > 1 else 0
            windows.append(Window(start, start + length, static))
            start += length
        retention = float(torch.rand((), generator=generator).clamp(min=0.01))
        count = holitom_count(windows, 9, retention)
        assert 1 <= count < retention * start * 9 + start + len(windows) / 2


def test_image_and_half_precision() -> None:
    picture = torch.randn(1, 9, 8, dtype=torch.bfloat16)
    reduced = HoliTom(retention=0.25).reduce(clip(picture))
    assert reduced.source.tolist() == [6, 7, 8] and torch.equal(reduced.embeddings, picture[0, 6:])
    everything = HoliTom(retention=1.0).reduce(clip(torch.ones(4, 9, 8)))
    assert everything.source.shape[0] == 36
