"""What becomes of position ids: numbered anew, or those of several members of a merged token."""

from __future__ import annotations

import pytest
import torch

from spatiotoken import patch_model, patched, unpatch_model
from spatiotoken.positions import MEMBERS, compacted, member_rows, rotary_of_members
from tests.conftest import QUESTION, Family

VIDEO = ("video", "pancake", 4)


def config(positions: str, method: str = "downsample", retention: float = 0.4) -> dict[str, object]:
    return {"tokens": {"method": method, "retention": retention, "positions": positions}}


def own(family: Family) -> str:
    return "compact" if family.stacks_videos else "ppe"


def test_compacted() -> None:
    positions = torch.tensor([[0, 0, 1, 2, 3, 4]])  # the first is padding
    valid = torch.tensor([[False, True, True, True, True, True]])
    kept = torch.tensor([[False, True, False, True, False, True]])
    assert compacted(positions, valid, kept)[kept].tolist() == [0, 1, 2]


def test_member_rows() -> None:
    # Visual tokens at rows 2 to 8; the first four are one token, the fifth is dropped, the last two are one.
    bearers = torch.tensor([1, 1, 1, 1, -1, 6, 6])
    rows = member_rows(10, torch.arange(2, 9), bearers)
    assert rows[3].tolist() == [2, 3, 4, 5] and rows[8].tolist() == [7, 7, 8, 8]
    assert rows[[0, 1, 9]].tolist() == [[row] * MEMBERS for row in (0, 1, 9)]
    alone = member_rows(6, torch.arange(1, 5), torch.arange(4))
    assert torch.equal(alone, torch.arange(6)[:, None].expand(-1, MEMBERS))


def test_rotary_of_members() -> None:
    def rotary(hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[..., None].float().expand(*positions.shape, 16)
        return angles, -angles

    positions = torch.arange(MEMBERS).view(MEMBERS, 1, 1, 1).expand(MEMBERS, 3, 1, 2)
    cos, sin = rotary_of_members(rotary, torch.zeros(1, 2, 4), positions)
    assert cos[0, 0, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3] * 2 and torch.equal(sin, -cos)


def test_pruned_tokens_have_one_position_each(qwen: Family) -> None:
    """Without merging there is nothing that a token could take from members."""
    inputs = qwen.inputs([VIDEO, QUESTION])
    patch_model(qwen.model, config("keep", "random"))
    expected = qwen.logits(inputs)
    patch_model(qwen.model, config("ppe", "random"))
    assert torch.equal(qwen.logits(inputs), expected)


def test_positions_change_the_answer_and_leave_no_trace(family: Family) -> None:
    inputs = family.inputs([VIDEO, QUESTION])
    before = family.logits(inputs)
    with patched(family.model, config("keep")):
        kept = family.logits(inputs)[:, -1]
    with patched(family.model, config(own(family))):
        moved = family.logits(inputs)[:, -1]
    assert not torch.allclose(kept, moved, atol=1e-3)
    assert torch.equal(family.logits(inputs), before)


def test_keeping_all_changes_nothing(family: Family) -> None:
    inputs = family.inputs([VIDEO, QUESTION])
    expected = family.logits(inputs)
    with patched(family.model, config(own(family), retention=1.0)):
        assert torch.equal(family.logits(inputs), expected)


@pytest.mark.parametrize("layers", [None, {"method": "fastv", "layer": 2, "retention": 0.5}])
def test_cache_equals_recomputation(family: Family, layers: dict[str, object] | None) -> None:
    if layers:
        inputs, new = family.inputs([VIDEO, QUESTION]), 1
    else:
        inputs, new = family.inputs([VIDEO, QUESTION]), 5
    patch_model(family.model, config(own(family)) | {"layers": layers})
    generated = family.generate(inputs, new=new)
    for step in range(new):
        answered = generated.sequences[:, : inputs["input_ids"].shape[1] + step]
        longer = inputs | {"input_ids": answered, "attention_mask": torch.ones_like(answered)}
        if "mm_token_type_ids" in longer:
            types = longer["mm_token_type_ids"]
            longer["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, step))
        logits = family.logits(longer, use_cache=False)[:, -1]
        torch.testing.assert_close(logits, generated.scores[step].float(), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_singles(family: Family, side: str) -> None:
    samples = [[VIDEO, QUESTION], [("video", "nasa", 4), "Why?"]]
    patch_model(family.model, config(own(family), retention=0.3))
    batch = family.inputs(*samples, padding_side=side)
    logits = family.logits(batch)
    for row, sample in enumerate(samples):
        single = family.inputs(sample)
        last = logits[row][batch["attention_mask"][row].bool()][-1]
        torch.testing.assert_close(last, family.logits(single)[0, -1], atol=2e-4, rtol=2e-4)
    if side == "left":
        together = family.generate(batch).sequences[:, batch["input_ids"].shape[1] :]
        for row, sample in enumerate(samples):
            single = family.inputs(sample)
            alone = family.generate(single).sequences[:, single["input_ids"].shape[1] :]
            assert torch.equal(together[row], alone[0])


def test_second_turn_goes_on_without_gaps(llava: Family) -> None:
    """Positions of a later turn follow those of the shortened prompt, as in a prompt that was never longer."""
    patch_model(llava.model, config("compact"))
    inputs = llava.inputs([VIDEO, QUESTION])
    with torch.inference_mode():
        first = llava.model(**inputs, use_cache=True)
        more = inputs["input_ids"][:, :5]
        second = llava.model(input_ids=more, past_key_values=first.past_key_values).logits[:, -1]
    ids = torch.cat([inputs["input_ids"], more], dim=1)
    whole = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    torch.testing.assert_close(second, llava.logits(whole)[:, -1], atol=2e-4, rtol=2e-4)


def test_refused_where_it_means_nothing(family: Family) -> None:
    other = "ppe" if own(family) == "compact" else "compact"
    with pytest.raises(ValueError, match=f"tokens.positions: '{other}'.*supported: keep, {own(family)}"):
        patch_model(family.model, config(other))
    assert unpatch_model(family.model) is family.model
