"""How a matrix's size is factored into the modes of a tensor train."""

from __future__ import annotations

import math

import numpy as np


def check_modes(shape: tuple[int, ...], modes: tuple[int, ...], rank: int) -> None:
    """Raise ValueError unless `modes` factor `shape` and `rank` is at most the largest unfolding's."""
    size = math.prod(shape)
    if len(modes) < 2 or min(modes) < 1 or math.prod(modes) != size:
        raise ValueError(
            f"modes {tuple(modes)} multiply to {math.prod(modes):,}, a weight {tuple(shape)} has "
            f"{size:,} entries. The nearest that do: {nearest_modes(shape, modes)}."
        )
    most = full_rank(modes)
    if not 1 <= rank <= most:
        raise ValueError(f"rank must lie in 1..{most} for modes {tuple(modes)}, got {rank}.")


def full_rank(modes: tuple[int, ...]) -> int:
    """The largest rank of an unfolding of a tensor of `modes`."""
    left = np.cumprod(np.array(modes, object))[:-1]
    return int(max(min(n, math.prod(modes) // n) for n in left))


def nearest_modes(shape: tuple[int, ...], modes: tuple[int, ...]) -> tuple[int, ...]:
    """As many modes as `modes`, close to them, whose product is that of `shape`.

    The prime factors of prod(shape), largest first, each go to the mode that lacks most.
    """
    primes, rest, p = [], math.prod(shape), 2
    while rest > 1:
        while rest % p == 0:
            primes.append(p)
            rest //= p
        p += 1
    made = [1] * max(len(modes), 2)
    wanted = [max(m, 1) for m in modes] + [1] * (len(made) - len(modes))
    for p in reversed(primes):
        k = max(range(len(made)), key=lambda i: (wanted[i] / made[i], -i))
        made[k] *= p
    return tuple(made)


def separate_modes(d_out: int, d_in: int, largest: int = 8) -> tuple[int, ...]:
    """Modes of d_out followed by those of d_in, prime factors multiplied up to `largest`: runs factored."""
    return _modes(d_out, largest) + _modes(d_in, largest)


def _modes(size, largest):
    made, p = [], 2
    while size > 1:
        while size % p == 0:
            if made and made[-1] * p <= largest:
                made[-1] *= p
            else:
                made.append(p)
            size //= p
        p += 1
    return tuple(made) or (1,)
