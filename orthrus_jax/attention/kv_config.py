"""KVCacheConfig: in how many bits the shared cache is stored, and the rule of who reads them.

The rule is a function of positions alone: that is why AR decoding and every other loop read the
same mixture of quantised and exact slots. Knows no arrays of a cache.
"""

import dataclasses
from typing import Any

from orthrus_jax.config import ModelConfig
from orthrus_jax.errors import UserError

UNQUANTISED = "bf16"  # as --kv-cache spells it: the model's own type
BITS = (2, 4)
LEAST_BLOCK = 16  # channels that are rotated together
ITERATIONS = 8  # of the variance normalisation, as published


@dataclasses.dataclass(frozen=True)
class KVCacheConfig:
    """A quantised cache (KVarN, arXiv 2606.03458). Hashable: a static part of every program.

    Tiles of G tokens by D channels of one key head are stored in a few bits; the first G slots (the
    sink) and the newest ones stay exact. A row at position p reads the slots from G up to
    `quantised_end(p)` from tiles, all others exactly.

    Attributes:
      key_bits, value_bits: 2 or 4.
      clip: at 2 bits, round within mean +- 1.5 standard deviations of a row in place of its range.
        Not published: a deviation to be named.
      tile: G, tokens of a tile; a power of two. Also the sink's.
      lag: W, how many positions a tile stays unread after its end; None is G. A pass over more
        than W + 1 positions would read tiles that are not final.
      rotate: rotate the channels by a Hadamard matrix. False, with iterations=0, is plain
        rounding, to compare with.
      iterations: of the variance normalisation.

    Raises:
      UserError: naming the field and its value.
    """

    key_bits: int = 4
    value_bits: int = 4
    clip: bool = False
    tile: int = 128
    lag: int | None = None
    rotate: bool = True
    iterations: int = ITERATIONS

    def __post_init__(self) -> None:
        for name in ("key_bits", "value_bits"):
            if getattr(self, name) not in BITS:
                raise UserError(f"{name}={getattr(self, name)!r} is not one of 2, 4")
        if type(self.tile) is not int or self.tile < 4 or self.tile & (self.tile - 1):
            raise UserError(f"tile={self.tile!r} must be a power of two from 4 on")
        if self.lag is not None and not 0 <= self.lag <= self.tile:
            raise UserError(f"lag={self.lag} must be from 0 to the tile's {self.tile}")

    @property
    def name(self) -> str:
        """As --kv-cache spells it: k4v2 for keys in four bits and values in two."""
        return f"k{self.key_bits}v{self.value_bits}"

    @property
    def sink(self) -> int:
        """S, the first slots, which are always read exactly."""
        return self.tile

    @property
    def wait(self) -> int:
        """W, the lag as a number."""
        return self.tile if self.lag is None else self.lag

    @property
    def tail(self) -> int:
        """Exact slots after the sink: 2 G + W.

        The newest tile's, those that wait, and those that a pass of W + 1 positions writes.
        """
        return 2 * self.tile + self.wait

    @property
    def exact_slots(self) -> int:
        """Slots of the exact buffer: sink and tail."""
        return self.sink + self.tail

    @property
    def longest_pass(self) -> int:
        """The most slots that one cycle may write: W + 1."""
        return self.wait + 1

    def quantised_end(self, position: Any) -> Any:
        """q(p): the first slot after the tiles that a row at `position` reads.

        A multiple of G, at least the sink. For integers, NumPy's and JAX's arrays.
        """
        full = (position - self.wait) // self.tile * self.tile
        return full + (self.sink - full) * (full < self.sink)

    def tiles(self, slots: int) -> int:
        """How many tiles a sequence of `slots` slots can fill."""
        return max(slots // self.tile - 1, 0)

    def worthwhile(self, slots: int) -> bool:
        """Whether any position below `slots` reads a tile: up to S + G + W none does."""
        return slots > self.sink + self.tile + self.wait

    def bytes_per_slot(self, head_dim: int) -> float:
        """Bytes of a slot in a tile of one key head: its codes and its part of the vectors."""
        codes = head_dim * (self.key_bits + self.value_bits) / 8
        return codes + 2 * 3 * (head_dim + self.tile) / self.tile

    def check(self, config: ModelConfig) -> None:
        """Refuse a model whose heads cannot be rotated.

        Raises:
          UserError: naming the size.
        """
        if rotated_block(config.head_dim) < LEAST_BLOCK:
            raise UserError(
                f"kv_cache={self.name}: head_dim={config.head_dim} is no multiple of "
                f"{LEAST_BLOCK}, which the Hadamard rotation needs; use {UNQUANTISED}"
            )


PRESETS: dict[str, KVCacheConfig] = {
    "k4v4": KVCacheConfig(4, 4),
    "k4v2": KVCacheConfig(4, 2),
    "k2v2": KVCacheConfig(2, 2),
}
NAMES = (UNQUANTISED, *PRESETS)  # of --kv-cache


def rotated_block(head_dim: int) -> int:
    """Channels that the Hadamard matrix mixes: the largest power of two that divides a head's."""
    return head_dim & -head_dim


def kv_cache_of(given: KVCacheConfig | str | None) -> KVCacheConfig | None:
    """The configuration that a caller names; None is a cache in the model's own type.

    Raises:
      UserError: for what names none.
    """
    if given is None or given == UNQUANTISED or isinstance(given, KVCacheConfig):
        return given if isinstance(given, KVCacheConfig) else None
    if not isinstance(given, str) or given not in PRESETS:
        raise UserError(
            f"kv_cache={given!r:.60} is not one of {', '.join(NAMES)}, nor a KVCacheConfig"
        )
    return PRESETS[given]
