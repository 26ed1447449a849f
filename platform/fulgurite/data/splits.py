"""What DataModules of sequences check and split alike."""

from __future__ import annotations

from fulgurite.errors import ConfigError

__all__ = ["check_fractions", "check_min", "split_ranges"]


def check_min(name: str, value: int, minimum: int = 1) -> None:
    """Refuse an argument of a DataModule that is too small.

    Raises:
        ConfigError: The value is below the minimum.

    Example:
        >>> check_min("length", 1)
    """
    if value < minimum:
        raise ConfigError(
            f"The {name} is {value}.", f"Set `--data.init_args.{name}` to {minimum} or more."
        )


def check_fractions(
    val_fraction: float,
    test_fraction: float,
    option: str = "data.init_args",
    names: tuple[str, str] = ("val_fraction", "test_fraction"),
) -> None:
    """Refuse fractions that leave nothing for training.

    Args:
        val_fraction: Fraction of the samples that is for validation.
        test_fraction: Fraction of the samples that is for test.
        option: Where the command line has both.
        names: What it calls them.

    Raises:
        ConfigError: A fraction is negative, or their sum is 1 or more.

    Example:
        >>> check_fractions(0.1, 0.2)
    """
    if not (val_fraction >= 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
        raise ConfigError(
            f"The fractions of validation and test are {val_fraction} and {test_fraction}.",
            f"Set `--{option}.{names[0]}` and `--{option}.{names[1]}` to 0 or more, below 1 "
            "together.",
        )


def split_ranges(
    total: int, val_fraction: float, test_fraction: float
) -> tuple[range, range, range]:
    """Return the tokens of training, validation and test: contiguous, in this order, disjoint.

    Example:
        >>> split_ranges(100, 0.1, 0.2)
        (range(0, 70), range(70, 80), range(80, 100))
    """
    val, test = int(total * val_fraction), int(total * test_fraction)
    first, second = total - val - test, total - test
    return range(first), range(first, second), range(second, total)
