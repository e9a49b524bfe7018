"""The noise contract: Gumbel noise that is a function of (seed, sample, position, token id) and nothing else.

Philox4x64-10 (Salmon et al., 2011) with key (seed, sample) and counter (token_id >> 2, position, 0, 0); lane
token_id & 3 of its output; v = (top 53 bits + 0.5) · 2⁻⁵³; gumbel = −log(−log1p(−v)) in float64, then float32.  The
integers are the bit-exact contract; `proto/noise_vectors.json` has test vectors for other languages.

`position` is the 0-based position in the whole text of the token being chosen.  So one row serves all tree nodes of a
depth, and a row can be computed before the logits exist.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.sampling import SamplingSettings

COUNTER_BITS = 256
# A deep tree touches some tens of depths per round; at a vocabulary of 128k tokens a row is half a megabyte.
CACHED_ROWS = 64


def noise_bits(seed: int, sample: int, position: int, vocab_size: int) -> NDArray[np.uint64]:
    """Return the contract's integers for all token ids below `vocab_size`, uint64 [vocab_size]."""
    # NumPy increments the counter before it generates, so it must start one before block 0 of this position.
    counter = ((position << 64) - 1) % 2**COUNTER_BITS
    generator = np.random.Philox(counter=counter, key=seed | sample << 64)
    return np.asarray(generator.random_raw(vocab_size), np.uint64)


def gumbel_row(seed: int, sample: int, position: int, vocab_size: int) -> NDArray[np.float32]:
    """Return the Gumbel noise of all token ids at one position, float32 [vocab_size]."""
    v = (noise_bits(seed, sample, position, vocab_size) >> np.uint64(11)).astype(np.float64)
    v += 0.5
    v *= 2.0**-53
    return (-np.log(-np.log1p(-v))).astype(np.float32)


@dataclass(eq=False)
class NoiseRows:
    """A cache of the noise rows used last.  It is for one thread only."""

    vocab_size: int
    _rows: OrderedDict[tuple[int, int, int], NDArray[np.float32]] = field(default_factory=OrderedDict)

    def row(self, settings: SamplingSettings, position: int) -> NDArray[np.float32]:
        """Return the noise at `position`, float32 [vocab_size].  The caller must not write to it."""
        key = (settings.seed, settings.sample, position)
        if key not in self._rows:
            self._rows[key] = gumbel_row(*key, self.vocab_size)
            if len(self._rows) > CACHED_ROWS:
                self._rows.popitem(last=False)
        self._rows.move_to_end(key)
        return self._rows[key]
