"""Block-sparse attention on gathered keys: plain torch, any device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from spatiotoken.attention.kernels.forward_only import forward_only
from spatiotoken.attention.kernels.pattern import SparsePattern, Valid, row_slices, seen_keys
from spatiotoken.attention.kernels.threads import in_threads

# Queries of a head that are computed at once, at least, and with those of other heads that are stacked on them. Half of
# the pairs among a head's own lie in the future and are lost, so few are better at low density, but calls and flat
# matrices cost too. Measured best on a CPU at head size 128.
TILE, ROWS = 64, 128


@forward_only("gather")
def gather_attention(
    query: Tensor, key: Tensor, value: Tensor, pattern: SparsePattern, *, scale: float, valid: Valid | None = None
) -> Tensor:
    """``[B, heads, Q, d]`` in the query's dtype: `SparsePattern`'s attention, one block of queries at a time.

    Gathers the keys that a block of queries needs and multiplies them in float32, for all heads that share a pattern at
    once; beside the output it holds a copy of the keys and values, and what one block needs of them and of logits.
    Padding comes out as zeros. On a CPU, torch's number of threads work on as many blocks, whose products are too small
    to be shared out. On a GPU the host waits for the device at each block.
    """
    # Laid out as models go on with it, token by token, and written once: on large outputs even zeros take a few percent
    # of the time.
    batch, heads, length, dim = query.shape
    make = query.new_empty if valid is None else query.new_zeros
    output = make(batch, length, heads, dim).transpose(1, 2)
    for row, queries, keys in row_slices(query, key, valid):
        count = keys.stop - keys.start
        first, stop = (count - (queries.stop - queries.start)) // pattern.block_q, -(-count // pattern.block_q)
        attend = partial(
            _attend_blocks,
            iter(range(first, stop)[::-1]),  # the last have most to do
            query[row, :, queries],
            # The scale goes where there is less to multiply. Models hand over transposed views, from which gathering
            # takes twice as long.
            (key[row, :, keys].float() * scale).contiguous(),
            value[row, :, keys].float().contiguous(),
            pattern.blocks[row],
            None if pattern.columns is None else pattern.columns[row],
            (pattern.block_q, pattern.block_k),
            output[row, :, queries],
        )
        in_threads(attend, min(torch.get_num_threads(), stop - first) if query.device.type == "cpu" else 1)
    return output


def _attend_blocks(
    pending: Iterator[int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    columns: Tensor | None,
    sizes: tuple[int, int],
    output: Tensor,
) -> None:
    """Query blocks of one row without padding, ``[heads, Q, d]`` and ``[kv_heads, K, d]``, into ``output``.

    Args:
        pending: numbers of the blocks; threads that work on one row share it, and each takes the next.
    """
    (heads, num_queries, dim), (kv_heads, num_keys, _) = query.shape, key.shape
    (block_q, block_k), groups = sizes, blocks.shape[0]
    # A group has `members` key heads with `sharing` query heads on each, which are stacked as if they were queries.
    members, sharing = max(1, kv_heads // groups), heads // max(kv_heads, groups)
    query, output = (x.unflatten(0, (groups * members, sharing)) for x in (query, output))
    group_keys, group_values = (x.unflatten(0, (-1, members)).unbind() for x in (key, value))
    most = int(blocks.sum(dim=-1).max()) * block_k + block_q + (0 if columns is None else columns.shape[-1])
    near_key, near_value = (x.new_empty(members, min(most, num_keys), dim) for x in (key, value))
    tile = min(block_q, max(TILE, ROWS // sharing))
    logits = key.new_empty(sharing * tile * near_key.shape[1])
    # Keys are gathered latest first, so the first w keys of a tile are its w queries' own, and all others are earlier.
    step = torch.arange(tile, device=key.device)
    future = step < tile - 1 - step[:, None]
    offset = num_keys - num_queries
    for block in pending:
        low, high = max(block * block_q, offset), min((block + 1) * block_q, num_keys)
        seen = seen_keys(blocks[:, block : block + 1], columns, block_k, high)[:, 0]
        # All of the queries' own keys are gathered, so that tiles begin at known places.
        whole = bool(seen[:, low:].all())
        gathered = seen.clone()
        gathered[:, low:] = True
        counts = gathered.sum(dim=1).tolist()
        indices = (high - 1 - gathered.flip(1).nonzero()[:, 1]).split(counts)
        tiles, finished = [], []
        for first in range(low, high, tile):
            last = min(first + tile, high)
            rows = slice(first - offset, last - offset)
            queries = query[:, :, rows].float().flatten(1, 2)
            attended = torch.empty_like(queries)
            # In batches of one: torch multiplies small matrices quicker as a batch.
            tiles.append((queries.split(1), attended.split(1), future[-(last - first) :, : last - first], high - last))
            finished.append((output[:, :, rows], attended))
        for group, (index, count) in enumerate(zip(indices, counts, strict=True)):
            kv = group * len(group_keys) // groups
            keys, values = near_key[:, :count], near_value[:, :count]
            torch.index_select(group_keys[kv], 1, index, out=keys)
            torch.index_select(group_values[kv], 1, index, out=values)
            for member in range(members):
                turned, weighed = keys[member, None].transpose(1, 2), values[member, None]
                for queries, attended, ahead, later in tiles:
                    weights = logits[: queries[0].shape[1] * (count - later)].view(1, -1, count - later)
                    torch.bmm(queries[group * members + member], turned[..., later:], out=weights)
                    weights.view(sharing, -1, count - later)[..., : len(ahead)].masked_fill_(ahead, -torch.inf)
                    if not whole:
                        weights.masked_fill_(~seen[group, index[later:]], -torch.inf)
                    torch.bmm(weights.softmax(dim=-1), weighed[:, later:], out=attended[group * members + member])
        for place, attended in finished:
            place.copy_(attended.view(place.shape))
