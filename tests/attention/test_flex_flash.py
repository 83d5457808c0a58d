"""The flash-attention 4 backend: what it hands to torch's flex attention, which test_flex.py holds to the reference.

On a GPU that has flash-attention 4, its kernel itself is held to the reference.
"""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from spatiotoken.attention.kernels import block_sparse_attention, flex, flex_flash, reference_attention, unavailable
from tests.attention import Inputs, make_inputs

GPU = torch.device("cuda")
REASON = unavailable("flex_flash", GPU) if torch.cuda.is_available() else "there is no GPU"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_flash, "find_spec", lambda name: ModuleSpec(name, None))


def capability(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))


@pytest.mark.parametrize(("major", "tiles"), [(9, (128, 128)), (10, (256, 128)), (11, (256, 128))])
def test_asks_torch_for_flash_attention_in_its_tiles(
    major: int, tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_inputs(300, block_q=64, block_k=32, dtype=torch.bfloat16)
    asked: dict[str, Any] = {}

    def flex_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        asked.update(options)
        return torch.zeros_like(query)

    capability(monkeypatch, major)
    monkeypatch.setattr(torch_flex, "flex_attention", flex_attention)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(flex, "_compiled", lambda: flex._flex_row)
    flex_flash.flex_flash_attention(case.query, case.key, case.value, case.pattern, scale=case.scale)
    assert asked["kernel_options"] == {"BACKEND": "FLASH"}
    assert asked["block_mask"].BLOCK_SIZE == tiles
    assert asked["enable_gqa"] and asked["scale"] == case.scale


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 64), (torch.bfloat16, 192)])
def test_says_what_it_does_not_take(dtype: torch.dtype, dim: int) -> None:
    case = make_inputs(40, dim=dim, dtype=dtype)
    with pytest.raises(RuntimeError, match="float16 and bfloat16 and head sizes up to 128, got .*; gather takes all"):
        flex_flash.flex_flash_attention(case.query, case.key, case.value, case.pattern, scale=case.scale)


def test_says_what_is_missing(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unavailable("flex_flash", torch.device("cpu")) == "it needs CUDA tensors, not cpu"
    capability(monkeypatch, 8)
    assert str(unavailable("flex_flash", GPU)).endswith("of compute capability 9, 10, 11, not 8")
    capability(monkeypatch, 9)
    assert unavailable("flex_flash", GPU) is None
    monkeypatch.setattr(flex_flash, "find_spec", lambda name: None)
    assert "flash-attention 4 is not installed" in str(unavailable("flex_flash", GPU))
    # flash-attention 2 is a package of the same name, without that part.
    monkeypatch.setattr(flex_flash, "find_spec", lambda name: None if "." in name else ModuleSpec(name, None))
    assert "flash-attention 4 is not installed" in str(unavailable("flex_flash", GPU))


@pytest.mark.skipif(REASON is not None, reason=f"the flex_flash backend cannot run here: {REASON}")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [0, 9])
@pytest.mark.parametrize("dim", [64, 128])
def test_equals_the_reference_on_a_gpu(dim: int, columns: int, dtype: torch.dtype) -> None:
    case: Inputs = make_inputs(
        700, 500, batch=2, groups="heads", dim=dim, block_q=128, block_k=64, columns=columns,
        bounds=[(0, 700), (40, 690)], dtype=dtype,
    ).to(GPU)  # fmt: skip
    arguments = (case.query, case.key, case.value, case.pattern)
    result = block_sparse_attention(*arguments, scale=case.scale, valid=case.valid, backend="flex_flash")
    expected = reference_attention(*arguments, scale=case.scale, valid=case.valid, check=True)
    torch.testing.assert_close(result.double(), expected, atol=1e-2, rtol=0)
