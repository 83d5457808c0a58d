"""How much of the attention mass a method sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spatiotoken.attention import BlockPattern, Part, PrefillInputs, SparsePattern, SparsePrefill, recall
from spatiotoken.attention.recall import (
    MAX_LENGTH,
    PromptTooLongError,
    block_shares,
    mass_recall,
    measure,
    oracle_pairs,
    seen_pairs,
    structured_inputs,
)
from spatiotoken.attention.sliding_vertical import SlidingVertical
from tests.attention import attention_map, prefill_inputs, video_inputs

SPARSE = SlidingVertical(sink=2, window=6, columns=8, last_queries=4, block=4)


class Pooled(SparsePrefill):
    """The past in pools of 4 keys and, from the last whole pool on, key by key; the first 3 queries are dropped."""

    kind = "approximate"

    def parts(self, inputs: PrefillInputs) -> Sequence[Part]:
        length = inputs.length
        key, value = (x[:, : length // 4 * 4].unflatten(1, (-1, 4)).mean(dim=2) for x in (inputs.key, inputs.value))
        pools = key.shape[1]
        count = pools + length
        reach = torch.arange(pools) * 4 + 3  # last key of each pool
        blocks = torch.zeros(1, 1, count, count, dtype=torch.bool)
        for query in range(length):
            past = reach < query // 4 * 4
            blocks[0, 0, pools + query, :pools] = past
            blocks[0, 0, pools + query, pools + int(past.sum()) * 4 :] = True
        rows = torch.arange(3, length)
        pattern = SparsePattern(blocks, None, 1, 1)
        whole = (torch.cat([pooled, x], dim=1) for pooled, x in ((key, inputs.key), (value, inputs.value)))
        return [Part(inputs.query[:, 3:], *whole, pattern, rows)]


class HeadRows(SparsePrefill):
    """Each head keeps tokens of its own (even ones, odd ones) and sees only these."""

    kind = "approximate"

    def parts(self, inputs: PrefillInputs) -> Sequence[Part]:
        heads, count = inputs.query.shape[0], inputs.length // 2
        kept = torch.arange(count) * 2 + torch.arange(heads)[:, None] % 2
        query, key, value = (
            x.gather(1, kept[: len(x), :, None].expand(-1, -1, x.shape[2]))
            for x in (inputs.query, inputs.key, inputs.value)
        )
        return [Part(query, key, value, SparsePattern(torch.ones(1, 1, 1, 1).bool(), None, count, count), kept)]


class Tail(SparsePrefill):
    """Dense for the first half, a window of blocks for the rest, each part over a prefix of the prompt."""

    kind = "static"

    def parts(self, inputs: PrefillInputs) -> Sequence[Part]:
        half = inputs.length // 2
        whole = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        count = -(-inputs.length // 4)
        near = torch.eye(count, dtype=torch.bool)[None, None]
        return [
            Part(
                inputs.query[:, :half],
                inputs.key[:, :half],
                inputs.value[:, :half],
                SparsePattern(whole, None, half, half),
                torch.arange(half),
            ),
            Part(
                inputs.query[:, half:],
                inputs.key,
                inputs.value,
                SparsePattern(near, None, 4, 4),
                torch.arange(half, inputs.length),
            ),
        ]


class Dense(BlockPattern):
    kind = "static"

    def pattern(self, inputs: PrefillInputs) -> SparsePattern:
        return SparsePattern(torch.ones(1, 1, 1, 1, dtype=torch.bool), None, inputs.length, inputs.length)


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def true_weights(inputs: PrefillInputs) -> Tensor:
    key = inputs.key.double().repeat_interleave(inputs.groups, dim=0)
    logits = inputs.query.double() @ key.transpose(1, 2) * inputs.scale
    return logits.masked_fill(~causal(inputs.length), -torch.inf).softmax(dim=-1)


@pytest.mark.parametrize("method", [SPARSE, Pooled(), HeadRows(), Tail()], ids=lambda method: type(method).__name__)
def test_seen_pairs_are_those_with_weight(method: SparsePrefill) -> None:
    """Also where keys are pooled, moved, dropped, or come in several parts."""
    inputs = prefill_inputs(38, dim=16, heads=2, kv_heads=2)
    forced = method.model_copy(update={"backend": "reference"})
    seen = seen_pairs(method, inputs)
    assert torch.equal(seen, attention_map(forced, inputs) > 0)
    assert 0 < int(seen.sum()) < 2 * 38 * 39 // 2
    found = measure(method, inputs)
    # A pool is one pair, so what is computed is less than what is seen.
    assert float(found.density.mean()) == pytest.approx(forced.attend(inputs).density)
    assert (found.density <= seen.sum(dim=(1, 2)) / (38 * 39 / 2) + 1e-6).all()
    assert method.kind != "static" or torch.allclose(found.density, seen.sum(dim=(1, 2)) / (38 * 39 / 2))


def test_pools_and_dropped_queries() -> None:
    seen = seen_pairs(Pooled(), prefill_inputs(12, heads=2))
    assert not seen[:, :3].any() and torch.equal(seen[:, 3:], causal(12)[3:].expand(2, -1, -1))


def test_dense_methods_see_everything() -> None:
    inputs = prefill_inputs(20)
    for method in (Dense(), SPARSE.model_copy(update={"window": 20})):
        assert torch.equal(seen_pairs(method, inputs), causal(20).expand(4, -1, -1))
        found = measure(method, inputs)
        assert found.density.tolist() == [1.0] * 4 and torch.allclose(found.recall, torch.ones(4))


def test_speed_does_not_count() -> None:
    """Nearly dense patterns that the auto rule would compute densely are what they are."""
    wide = SPARSE.model_copy(update={"window": 28, "columns": 2})
    inputs = prefill_inputs(40)
    assert wide.attend(inputs).output is None and not seen_pairs(wide, inputs)[:, -1].all()


@pytest.mark.parametrize("rows", [1, 7, 128])
def test_mass_recall(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "_ROWS", rows)
    inputs = prefill_inputs(38)
    seen = seen_pairs(SPARSE, inputs)
    expected = (true_weights(inputs) * seen).sum(dim=-1).mean(dim=-1)
    found = mass_recall(inputs, seen)
    assert found.dtype == torch.float32 and 0.1 < float(found.min()) < float(found.max()) < 0.95
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    half = replace(inputs, query=(inputs.query * 300).half(), key=(inputs.key * 300).half())
    assert mass_recall(half, seen).isfinite().all()


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 1.0])
def test_oracle(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "_ROWS", 16)
    inputs = prefill_inputs(60)
    pairs = oracle_pairs(inputs, density)
    counts = pairs.sum(dim=-1)
    assert not (pairs & ~causal(60)).any() and (counts >= 1).all() and (counts == counts[0]).all()
    assert (counts[0] - density * torch.arange(1, 61)).abs().max() <= 1
    # One pair at least for each query, else the share of all pairs to the pair.
    assert density < 0.1 or int(counts[0].sum()) == pytest.approx(density * 1830, abs=8)
    weights = true_weights(inputs)
    for head in range(4):
        for query in range(60):
            best = weights[head, query].topk(int(counts[head, query])).indices
            assert set(best.tolist()) == set(pairs[head, query].nonzero()[:, 0].tolist())


def test_nothing_betters_the_oracle() -> None:
    inputs = video_inputs()
    found = measure(SPARSE, inputs)
    # Somewhat more pairs for the oracle, since a method need not give each query the same share.
    best = mass_recall(inputs, oracle_pairs(inputs, float(found.density.max())))
    assert (best > found.recall).all()


def test_oracle_where_all_keys_are_equal_or_underflow() -> None:
    inputs = prefill_inputs(30)
    flat = replace(inputs, key=torch.ones_like(inputs.key))
    pairs = oracle_pairs(flat, 0.2)
    assert all(row[: int(row.sum())].all() for row in pairs.flatten(0, 1)), "ties go to the first"
    loud = replace(inputs, query=inputs.query * 1000)
    assert not (oracle_pairs(loud, 0.9) & ~causal(30)).any()
    assert int(oracle_pairs(loud, 1.0)[0].sum()) == 465


def test_block_shares() -> None:
    seen = causal(10)[None].clone()
    seen[0, 4:8, :4] = False
    seen[0, 9, 8] = False
    expected = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 2 / 3]])
    torch.testing.assert_close(block_shares(seen, 4)[0], expected)


def test_too_long_a_prompt() -> None:
    with pytest.raises(PromptTooLongError, match=f"{MAX_LENGTH + 1} tokens.*fewer frames"):
        measure(SPARSE, prefill_inputs(MAX_LENGTH + 1, heads=1, kv_heads=1, dim=1))


@pytest.mark.parametrize("measured", [mass_recall, lambda inputs, seen: oracle_pairs(inputs, 0.1)])
def test_holds_no_square_of_floats(measured: Callable[[PrefillInputs, Tensor], Tensor]) -> None:
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            found = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor)]
            sizes.extend(x.numel() for x in found if x.dtype != torch.bool)
            return out

    inputs = prefill_inputs(1500, heads=2, kv_heads=1, dim=8)
    seen = causal(1500).expand(2, -1, -1)
    with Watch():
        measured(inputs, seen)
    assert max(sizes) <= 2 * 128 * 1500


# --------------------------------------------------------------------------------------------------- structured inputs


def test_structured_inputs_have_the_structure_that_is_said() -> None:
    inputs = structured_inputs((8, 6, 6), 60, heads=8, kv_heads=2, dim=64, seed=1)
    length, places = inputs.length, inputs.needed("coordinates")
    assert length == 8 * 36 + 60 and inputs.query.shape == (8, length, 64) and inputs.key.shape == (2, length, 64)
    assert (places[:30] < 0).all() and (places[-30:] < 0).all() and places[30].tolist() == [0, 0, 0, 0]
    assert places[30 + 287].tolist() == [0, 7, 5, 5]

    number = torch.arange(length)
    behind = number[:, None] - number
    video = (places[:, None, 0] >= 0) & (places[:, 0] >= 0)
    other = (places[:, None, 2:] == places[:, 2:]).all(dim=-1) & video & (behind > 0)

    def mass(seen: Tensor) -> Tensor:
        return mass_recall(inputs, (seen & causal(length)).expand(8, -1, -1))

    def share(seen: Tensor) -> float:
        return int((seen & causal(length)).sum()) / (length * (length + 1) / 2)

    sink, local, place = mass((number == 0).expand(length, -1)), mass(behind < 16), mass(other)
    assert (sink[0::4] > 0.6).all() and (sink[1::4] < 0.1).all()
    assert (local[1::4] > 0.9).all() and share(behind < 16) < 0.1
    assert (place[3::4] > 15 * share(other)).all() and (place[3::4] > 3 * place[[0, 2, 4, 6]].max()).all()
    # Columns: few keys hold most of the mass of the queries long after them.
    heavy = true_weights(inputs)[2::4, length // 2 :].mean(dim=1)
    assert (heavy.sort(descending=True).values[:, :20].sum(dim=1) > 0.6).all()
    assert (mass_recall(inputs, oracle_pairs(inputs, 0.1)) > 0.8).all(), "heads of real models are as sparse"


def test_structured_inputs_are_reproducible_and_differ_by_seed() -> None:
    first, again, other = (structured_inputs((2, 3, 4), 5, heads=4, kv_heads=2, dim=16, seed=s) for s in (3, 3, 4))
    assert torch.equal(first.query, again.query) and torch.equal(first.key, again.key)
    assert torch.equal(first.value, again.value) and not torch.equal(first.key, other.key)
    assert not torch.equal(first.query[0], first.query[2]), "a mixture that differs by head"


@pytest.mark.parametrize("wrong", [{"text": 1}, {"dim": 8}, {"heads": 3}])
def test_structured_inputs_refuse(wrong: dict[str, int]) -> None:
    text = wrong.pop("text", 4)
    with pytest.raises(ValueError, match="needs text"):
        structured_inputs((2, 3, 4), text, **({"heads": 4, "kv_heads": 2, "dim": 16} | wrong))
