"""Few static shapes for many requests: buckets."""


def bucket(n: int) -> int:
    """Return the smallest of 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, ... that holds n.

    Four steps an octave keep padding under a quarter and the number of programs logarithmic.
    """
    if n <= 64:
        return 64
    step = 1 << ((n - 1).bit_length() - 3)
    return -(-n // step) * step
