"""Block masks of causal attention, shared by every seed that needs one of the same size."""

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

MAX_BLOCK_MASKS = 8


def _causal(
    _batch: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor:
    return query >= key


class BlockMasks:
    """Causal block masks by number of tokens and device, the least recently used dropped first.

    Masks are built outside compiled regions: `get_or_make` in eager code, `get` in a traced
    forward, which builds nothing and moves nothing.
    """

    def __init__(self) -> None:
        self._masks: dict[tuple[int, torch.device], BlockMask] = {}
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._masks)

    def get(self, tokens: int, device: torch.device) -> BlockMask | None:
        """Return the mask if there is one."""
        return self._masks.get((tokens, device))

    def get_or_make(self, tokens: int, device: torch.device) -> BlockMask:
        """Return the mask, made and kept if it is missing."""
        key = (tokens, device)
        mask = self._masks.pop(key, None)
        if mask is None:
            self.misses += 1
            with torch.inference_mode(mode=False):  # an evaluation may make what training reads
                mask = create_block_mask(_causal, None, None, tokens, tokens, device=str(device))
        else:
            self.hits += 1
        self._masks[key] = mask
        if len(self._masks) > MAX_BLOCK_MASKS:
            del self._masks[next(iter(self._masks))]
        return mask

    def clear(self) -> None:
        """Drop every mask, and with it what it holds on a device."""
        self._masks.clear()


block_masks = BlockMasks()
"""The masks of this process; slots clear them at every epoch end and after a prune."""
