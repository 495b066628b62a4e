"""The paged cache's bookkeeping: which block belongs to whom, and which can be reused for an equal prefix.

Used by the scheduler only. Holds numbers, no tensors, so that its laws can be tested in microseconds: every block is
either free or has exactly as many references as sequences that hold it; only full, computed blocks are ever shared.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Sequence

_ROOT = b"seamount"


def chain_hash(parent: bytes | None, token_ids: Sequence[int]) -> bytes:
    """Return the identity of a full block: its tokens and, through `parent`, all that came before them."""
    digest = hashlib.blake2b(parent or _ROOT, digest_size=16)
    digest.update(struct.pack(f"<{len(token_ids)}I", *token_ids))
    return digest.digest()


class BlockPool:
    """A fixed number of blocks with reference counts and a prefix index.

    A block whose last reference goes stays in the index until its memory is needed; the block that was released longest
    ago is taken first.

    Args:
        num_blocks: blocks in the cache.
        block_size: tokens per block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._published: list[tuple[bytes, tuple[int, ...]] | None] = [None] * num_blocks
        self._index: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._free)

    def allocate(self) -> int | None:
        """Take one free block, with one reference; None when there is none."""
        if not self._free:
            return None
        block, _ = self._free.popitem(last=False)
        self._unpublish(block)
        self._references[block] = 1
        return block

    def find(self, key: bytes, token_ids: Sequence[int]) -> int | None:
        """Return the block published under `key` if it really holds `token_ids`."""
        block = self._index.get(key)
        if block is None:
            return None
        entry = self._published[block]
        return block if entry is not None and entry[1] == tuple(token_ids) else None

    def share(self, block: int) -> None:
        """Add a reference to a block that `find` returned."""
        if self._references[block] == 0:
            del self._free[block]
        self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each of a sequence's blocks, given in the sequence's order.

        The last of them becomes the first to be taken again, since a chain is useless without its beginning.
        """
        for block in reversed(blocks):
            if self._references[block] <= 0:
                raise RuntimeError(f"block {block} was released more often than it was taken")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._published[block] is None:
                    self._free.move_to_end(block, last=False)

    def publish(self, block: int, key: bytes, token_ids: Sequence[int]) -> None:
        """Offer a full, computed block for reuse; of two with equal content the first stays the one that is found."""
        if key not in self._index and self._published[block] is None:
            self._index[key] = block
            self._published[block] = (key, tuple(token_ids))

    def references(self, block: int) -> int:
        """How many sequences hold the block."""
        return self._references[block]

    def _unpublish(self, block: int) -> None:
        entry = self._published[block]
        if entry is not None:
            del self._index[entry[0]]
            self._published[block] = None
