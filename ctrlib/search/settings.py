"""What a compression is told, checked: this needs no torch, so that wrong numbers are answered at once."""

from __future__ import annotations

from ctrlib.errors import ArgumentError, check_number, check_whole


def parse_bytes(text: str) -> int:
    """A number of bytes as people write it.

    Raises:
        ValueError: it is not one.

    >>> parse_bytes("5MB"), parse_bytes("800 kB"), parse_bytes("2MiB"), parse_bytes("1000")
    (5000000, 800000, 2097152, 1000)
    """
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    number = text.strip().lower().rstrip("abcdefghijklmnopqrstuvwxyz").strip()
    unit = text.strip().lower()[len(number) :].strip()
    try:
        return int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise ArgumentError(f"{text!r} is no number of bytes: write 5MB, 800kB, 2MiB or 1000") from None


def check_settings(
    num_bytes: int | None,
    ratio: float | None,
    layer_ratio: float | None,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
) -> None:
    """Refuse arguments of `ctrlib.search.compress` that make no sense whatever the model is.

    Raises:
        ArgumentError, WrongTypeError: as said.

    >>> check_settings(None, 0.5, None, 1, 1e-4, 8192, 0)
    Traceback (most recent call last):
        ...
    ctrlib.errors.ArgumentError: ratio (--ratio) must be a finite number above 1, got 0.5
    """
    if (num_bytes is None) == (ratio is None):
        raise ArgumentError(
            "give the budget as num_bytes (--bytes) or as ratio (--ratio), one of them: got "
            f"{'neither' if ratio is None else 'both'}"
        )
    if num_bytes is not None:
        check_whole(1, num_bytes=num_bytes)
    for name, value in (("ratio", ratio), ("layer_ratio", layer_ratio)):
        if value is not None:
            check_number(1, above=True, **{name: value})
    check_whole(0, epochs=epochs, seed=seed)
    check_whole(1, batch_size=batch_size)
    check_number(0, learning_rate=learning_rate)
