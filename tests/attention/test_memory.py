"""Large outputs are ordinary tensors, whatever pages they lie in."""

import gc

import pytest
import torch

from spatiotoken.attention.kernels.memory import LEAST_BYTES, unwritten


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [LEAST_BYTES // 2, LEAST_BYTES, LEAST_BYTES + 12])
def test_outputs_are_ordinary_tensors(size: int, dtype: torch.dtype) -> None:
    count = size // dtype.itemsize
    output = unwritten((count // 2, 2), dtype, torch.device("cpu"))
    assert output.shape == (count // 2, 2) and output.dtype == dtype and output.is_contiguous()
    view = output.fill_(1)[1:]
    del output
    gc.collect()
    assert int(view.sum(dtype=torch.float64)) == count // 2 * 2 - 2
    torch.testing.assert_close(view.clone(), torch.ones_like(view))


def test_rows_are_unrelated() -> None:
    first, second = (unwritten((LEAST_BYTES // 4,), torch.float32, torch.device("cpu")) for _ in range(2))
    first.fill_(1), second.fill_(2)
    assert bool((first == 1).all()) and bool((second == 2).all())
