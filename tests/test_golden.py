"""The authors' own results, vector by vector, of methods without a test file of their own."""

from __future__ import annotations

import torch

from spatiotoken.layers.fastv import FastV, fastv_selection
from spatiotoken.structures import LayerTokens, VideoFeatures
from spatiotoken.tokens.divprune import DivPrune, divprune_count, divprune_order
from spatiotoken.tokens.evs import EVS
from tests.vectors import cases


def test_divprune() -> None:
    for hyper, tensors in cases("DivPrune"):
        features = tensors["in.features"].float()
        video = VideoFeatures(features.flatten(0, 1), (features.shape[0], 1, features.shape[1]))
        count = divprune_count(video.num_tokens, hyper["ratio"])
        assert torch.equal(divprune_order(video.embeddings, count).int(), tensors["out.selected_in_order"])
        reduced = DivPrune(retention=hyper["ratio"]).reduce(video)
        assert torch.equal(reduced.source.int(), tensors["out.kept_sorted"])


def test_evs() -> None:
    for hyper, tensors in cases("EVS"):
        frames, height, width = hyper["video_size_thw"]
        merge = hyper["spatial_merge_size"]
        video = VideoFeatures(tensors["in.features"].float().flatten(0, 1), (frames, height // merge, width // merge))
        reduced = EVS(retention=1 - hyper["q"]).reduce(video)
        assert torch.equal(reduced.source.int(), tensors["out.kept"])
        assert torch.equal(reduced.assignment >= 0, tensors["out.retention_mask"])


def test_fastv() -> None:
    for hyper, tensors in cases("FastV"):
        attention = tensors["in.last_token_attn"]
        start, stop = hyper["sys_length"], hyper["sys_length"] + hyper["image_len"]
        visual = attention[:, start:stop]
        kept = start + fastv_selection(visual, hyper["attention_rank"])
        text = torch.arange(attention.shape[1])
        expected = tensors["out.keep_indices"].long()
        assert torch.equal(torch.cat([text[:start], kept, text[stop:]]), expected)
        method = FastV(retention=hyper["attention_rank"] / hyper["image_len"])
        assert torch.equal(start + method.select(LayerTokens(2, hyper["image_len"], visual)), kept)
