"""Which tokens lie in which tile of keys and values of the Hopper kernel: arithmetic on Python ints alone."""

from typing import NamedTuple

TOKEN_GROUP = 8  # tokens are copied in whole groups


class Run(NamedTuple):
    """Steps whose tiles hold consecutive tokens of one pair of arrays, from its first token on.

    Attributes:
      start: first step.
      stop: the step after the last.
      pair: 0 for key and value, 1 for more_key and more_value.
    """

    start: int
    stop: int
    pair: int


class Ends(NamedTuple):
    """The tile of step 0 that holds the last tokens of the first pair, and those of the second if they fit in.

    Attributes:
      token: the token of the first pair in row 0.
      valid: the row after the last valid one of the first pair.
      more_row: the row where the second pair begins, at a whole group; block_kv if it has no part in the tile.
      more_token: the token of the second pair there.
      more_valid: the row after the last valid one of the second pair; 0 if there is none.
    """

    token: int
    valid: int
    more_row: int
    more_token: int
    more_valid: int

    @property
    def shared(self) -> bool:
        """Whether both pairs have a part in the tile."""
        return self.more_valid > 0


class Tiles(NamedTuple):
    """A tile of keys and values for every step.

    Attributes:
      steps: how many there are.
      ends: what the tile of step 0 holds where it belongs to no run.
      runs: what all other tiles hold.
      tail: how many tokens of the last step's tile are valid where its run ends inside it, else 0.
    """

    steps: int
    ends: Ends | None
    runs: tuple[Run, ...]
    tail: int


def deal(kv_length: int, more_length: int, block_kv: int) -> Tiles:
    """Deals the first tokens of one pair of arrays, or of two, to as few tiles of `block_kv` tokens as can be.

    The order of keys does not matter to attention. So where the first of two pairs ends inside a tile, that tile
    comes first: the loop over the tiles between the first and the last masks nothing, for one pair as for two.

    Args:
      kv_length: valid tokens of the first pair, at least 1.
      more_length: valid tokens of the second pair; 0 if there is none.
      block_kv: tokens of a tile, a multiple of 8.
    """
    full, valid = divmod(kv_length, block_kv)
    if not more_length:
        steps = full + bool(valid)
        return Tiles(steps, None, (Run(0, steps, 0),), valid)
    more_full, tail = divmod(more_length, block_kv)
    begin, ends = 0, None
    if valid:
        begin, row = 1, valid + -valid % TOKEN_GROUP
        if 0 < tail <= block_kv - row:
            ends = Ends(full * block_kv, valid, row, more_full * block_kv, row + tail)
            tail = 0
        else:
            ends = Ends(full * block_kv, valid, block_kv, 0, 0)
    switch = begin + full
    steps = switch + more_full + bool(tail)
    return Tiles(steps, ends, (Run(begin, switch, 0), Run(switch, steps, 1)), tail)
