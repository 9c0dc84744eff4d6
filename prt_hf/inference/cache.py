"""The KV caches of a PRT model's passes as one cache, which `generate()` handles as any other."""

import torch
from transformers import Cache


class PRTCache(Cache):
    """The caches of all passes of a PRT model.

    Args:
        parts (`list[Cache]`): one for each pass, that of the backbone first.
        blocks (`list[int]`): how many times `parts[i]` holds the rows of the batch, block after block.
    """

    def __init__(self, parts: list[Cache], blocks: list[int]):
        # The layers are those of the parts, so Cache.__init__ has nothing to set but this.
        self.layer_class_to_replicate, self.offloading = None, False
        self.parts, self.blocks = parts, blocks
        self.rows = 0  # of the batch, set by the PRT model

    @property
    def layers(self) -> list:
        """The layers of all parts, one part after the other."""
        return [layer for part in self.parts for layer in part.layers]

    @property
    def batch_size(self) -> int:
        """The number of rows of the batch."""
        return self.rows

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of cached tokens."""
        return self.parts[0].get_seq_length(layer_idx)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return the number of tokens that there is room for."""
        return self.parts[0].get_max_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the length and the offset of the mask."""
        return self.parts[0].get_mask_sizes(query_length, layer_idx)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows of all blocks, for beams."""
        for part, count in zip(self.parts, self.blocks, strict=True):
            part.reorder_cache(self._in_blocks(beam_idx, count))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)  # a block of repeated rows is a repeated block
        self.rows *= repeats

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows with these indices."""
        for part, count in zip(self.parts, self.blocks, strict=True):
            part.batch_select_indices(self._in_blocks(indices, count))
        self.rows = len(indices)

    def _in_blocks(self, indices: torch.Tensor, count: int) -> torch.Tensor:
        """Return the same rows of every block."""
        return torch.cat([indices + block * self.rows for block in range(count)])
