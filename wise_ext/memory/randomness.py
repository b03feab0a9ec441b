"""Seeded random bits that stay the same on every platform and with every library version.

Masks, DARE's dropping and the key projection are drawn here. numpy promises that the raw stream
of a bit generator never changes; torch promises that for none of its samplers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

RawBits = npt.NDArray[np.uint64]


class BitStream:
    """A stream of random 64-bit words (PCG64), named by whole numbers.

    Args:
        *name: the seed and whatever tells this stream from others of the same seed; each >= 0.

    Raises:
        ValueError: a number is negative.
    """

    def __init__(self, *name: int) -> None:
        if any(part < 0 for part in name):
            raise ValueError(f"a seed must be a whole number >= 0, got {min(name)}")
        # The count keeps (1,) and (1, 0) apart: SeedSequence ignores trailing zeros.
        self._bits = np.random.PCG64(np.random.SeedSequence([len(name), *name]))

    def words(self, count: int) -> RawBits:
        """Return the next ``count`` words, uint64 ``[count]``."""
        return np.asarray(self._bits.random_raw(count), dtype=np.uint64)

    def bernoulli(self, count: int, probability: float) -> npt.NDArray[np.bool_]:
        """Return ``count`` independent draws, bool ``[count]``, true with the given probability."""
        # 53 bits fill a double's mantissa, so the comparison is exact.
        uniform = (self.words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return uniform < probability
