"""A small batch of lessons on random bases, for the tests of what is trained on lessons."""

import jax
import jax.numpy as jnp
import numpy as np

S, A, B = 20, 12, 2
RNG = np.random.default_rng(5)


def small_lessons():
    """Two texts of 20 and 15 tokens; two readings behind the first, one behind the second, which ends in padding."""
    lengths, parts = (20, 15), ((5, 7), (8,))
    made = {name: np.zeros((B, S), np.int32) for name in ("ids", "at")}
    made |= {name: np.zeros((B, A), np.int32) for name in ("behind", "places", "owner")} | {"asks": np.zeros((B, A), bool)}
    made["at"][:], made["places"][:] = -1, -1
    for row, (length, counts) in enumerate(zip(lengths, parts, strict=True)):
        made["ids"][row, -length:] = RNG.integers(3, 97, length)
        made["at"][row, -length:] = np.arange(length)
        end = 0
        for number, count in enumerate(counts, start=1):
            part = slice(end, end + count)
            made["behind"][row, part], made["owner"][row, part] = RNG.integers(3, 97, count), number
            made["places"][row, part] = length + np.arange(count)
            made["asks"][row, end + 2 : end + count] = True
            end += count
    return jax.tree.map(jnp.asarray, made)
