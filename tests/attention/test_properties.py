"""What holds for every attention method, with the settings of the method table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spatiotoken.attention import PrefillInputs, SparsePrefill
from spatiotoken.attention.recall import seen_pairs, structured_inputs
from spatiotoken.config import build_method
from spatiotoken.registry import METHODS
from tests.attention import attention_map, prefill_inputs
from tests.cases import REDUCED

NAMES = [name for name in sorted(METHODS["attention"].items()) if ("attention", name) in REDUCED]
DEPTH = 4


def method_of(name: str, backend: str = "reference") -> SparsePrefill:
    found = build_method("attention", {"method": name, **REDUCED["attention", name], "backend": backend})
    assert isinstance(found, SparsePrefill)
    return found


def places(kind: str, length: int) -> Tensor:
    """Coordinates of a prompt of text, one video, or two with a newline behind each row; only whole frames."""
    found = torch.full((length, 4), -1)
    videos, (height, width), newline = {"text": (0, (1, 1), 0), "video": (1, (2, 3), 0), "newlines": (2, (2, 2), 1)}[
        kind
    ]
    first = 2
    for video in range(videos):
        frame = height * (width + newline)
        frames = max(0, length - 4) // videos // frame
        rows = torch.cartesian_prod(*(torch.arange(side) for side in (frames, height, width))).view(-1, width, 3)
        rows = torch.nn.functional.pad(rows, (1, 0), value=video)
        rows = torch.nn.functional.pad(rows, (0, 0, 0, newline), value=-1)
        found[first : first + frames * frame] = rows.flatten(0, 1)
        first += frames * frame + 1  # a token of text between the videos
    return found


@st.composite
def prompts(draw: st.DrawFn) -> PrefillInputs:
    length, kv_heads = draw(st.integers(1, 70)), draw(st.sampled_from([1, 2]))
    inputs = prefill_inputs(
        length,
        heads=kv_heads * draw(st.sampled_from([1, 2])),
        kv_heads=kv_heads,
        dim=draw(st.sampled_from([8, 16])),
        seed=draw(st.integers(0, 1000)),
        layer=draw(st.integers(0, DEPTH - 1)),
        depth=DEPTH,
    )
    # Attention that is even, and that is peaked.
    inputs = replace(inputs, query=inputs.query * draw(st.sampled_from([1.0, 4.0])))
    if draw(st.integers(0, 4)) == 0:  # nothing to choose by
        inputs = replace(inputs, key=inputs.key[:, :1].expand_as(inputs.key))
    return replace(inputs, coordinates=places(draw(st.sampled_from(["text", "video", "newlines"])), length))


def masked_weights(inputs: PrefillInputs, seen: Tensor) -> Tensor:
    """``[heads, L, L]`` float64 softmax over what is seen; zeros where nothing is."""
    key = inputs.key.double().repeat_interleave(inputs.groups, dim=0)
    logits = inputs.query.double() @ key.transpose(1, 2) * inputs.scale
    return logits.masked_fill(~seen, -torch.inf).softmax(dim=-1).nan_to_num(0.0)


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=15)
@given(inputs=prompts())
def test_weights(name: str, inputs: PrefillInputs) -> None:
    """Every query that is not dropped averages values of its past, and what is seen is told apart from what is not."""
    method = method_of(name)
    seen = seen_pairs(method, inputs)
    attended = method.attend(inputs)
    if attended.output is None:
        assert attended.density == 1.0 and (seen == causal(inputs.length)).all()
        return
    weights = attention_map(method, inputs)
    sums = weights.sum(dim=-1)
    dropped = (weights == 0).all(dim=-1)
    assert method.kind == "approximate" or not dropped.any()
    torch.testing.assert_close(sums, (~dropped).float(), atol=1e-5, rtol=0)
    assert (weights >= 0).all() and not weights.triu(1).any()
    assert torch.equal(weights > 0, seen)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=15)
@given(inputs=prompts())
def test_is_attention_over_what_is_seen(name: str, inputs: PrefillInputs) -> None:
    """Of methods that leave states as they are: the density is that of the seen pairs, and nothing else is computed."""
    method = method_of(name)
    if method.kind == "approximate":
        return
    attended, seen = method.attend(inputs), seen_pairs(method, inputs)
    pairs = seen.shape[0] * inputs.length * (inputs.length + 1) // 2
    assert attended.density == pytest.approx(int(seen.sum()) / pairs, rel=1e-9)
    if attended.output is not None:
        value = inputs.value.double().repeat_interleave(inputs.groups, dim=0)
        expected = masked_weights(inputs, seen) @ value
        torch.testing.assert_close(attended.output.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=15)
@given(inputs=prompts(), backend=st.sampled_from(["reference", "gather"]))
def test_is_deterministic_and_half_precision_stays_finite(name: str, inputs: PrefillInputs, backend: str) -> None:
    method = method_of(name, backend)
    loud = {part: (getattr(inputs, part) * 30).half() for part in ("query", "key", "value")}
    first, second = (method.attend(replace(inputs, **loud)) for _ in range(2))
    assert (first.density, first.backend) == (second.density, second.backend) and 0 < first.density <= 1
    if first.output is not None:
        assert second.output is not None and torch.equal(first.output, second.output)
        assert first.output.dtype == torch.float16 and first.output.shape == inputs.query.shape
        assert first.output.isfinite().all()
        # Means of values, or of what is left of them.
        assert first.output.abs().max() <= 1.01 * loud["value"].abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_is_sparse_on_a_video(name: str) -> None:
    """The settings of the table do something, so that the rest here says something."""
    inputs = structured_inputs((5, 4, 4), 10, heads=4, kv_heads=2, dim=16)
    attended = method_of(name).attend(replace(inputs, layer=DEPTH - 1, depth=DEPTH))
    assert attended.output is not None and attended.density < 0.9 and attended.backend == "reference"
