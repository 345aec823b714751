"""Budgets are read as written, and sizes and durations are written as read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remat.errors import BudgetFormatError
from remat.units import format_bytes, format_seconds, parse_budget


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (8_000_000, 8_000_000),
        ("8000000", 8_000_000),
        ("8GiB", 8 * 1024**3),
        ("8GB", 8 * 1000**3),
        ("800MiB", 800 * 1024**2),
        ("800 mib", 800 * 1024**2),
        (" 1.5 KiB ", 1536),
        (".5kb", 500),
        ("2TiB", 2 * 1024**4),
        ("17b", 17),
    ],
)
def test_parse_budget_size_gives_bytes(budget, expected):
    """Binary and decimal units, fractions, spaces and plain bytes are all read exactly."""
    assert parse_budget(budget) == expected


def test_parse_budget_percentage_refers_to_the_peak():
    """A percentage is one of the keep-everything peak, rounded down, also above 100."""
    assert parse_budget("60%", keep_all_peak_bytes=1001) == 600
    assert parse_budget("12.5 %", keep_all_peak_bytes=800) == 100
    assert parse_budget("150%", keep_all_peak_bytes=1000) == 1500


@pytest.mark.parametrize(
    "budget",
    [
        "8 gigs",
        "",
        " ",
        "GiB",
        "8GiB8",
        "1e9",
        "8,5GiB",
        "eight",
        "-8GiB",
        "8 G iB",
        "%",
        "nan",
        "inf",
    ],
)
def test_parse_budget_unreadable_names_it_and_what_is_expected(budget):
    """Text that is not a size is refused with the text and examples of what is read."""
    with pytest.raises(
        BudgetFormatError, match="is not a size: expected a positive number"
    ) as info:
        parse_budget(budget)
    assert repr(budget) in str(info.value)
    assert isinstance(info.value, ValueError)


@pytest.mark.parametrize("budget", [True, 8.5, None, [8], b"8GiB"])
def test_parse_budget_other_type_is_refused(budget):
    """Only int and str are budgets: a float or bool is more likely a mistake."""
    with pytest.raises(BudgetFormatError, match="is not a size"):
        parse_budget(budget)


@pytest.mark.parametrize("budget", [0, -1, "0", "0GiB", "0.0MiB", "0.4b"])
def test_parse_budget_nothing_is_refused(budget):
    """Zero, less, and what rounds down to zero bytes are not positive."""
    with pytest.raises(BudgetFormatError, match="is not positive"):
        parse_budget(budget)


def test_parse_budget_percentage_without_peak_is_refused():
    """A percentage means nothing where no peak is known."""
    with pytest.raises(BudgetFormatError, match="no keep-everything peak is known"):
        parse_budget("60%")


@given(st.integers(min_value=1, max_value=2**60))
def test_parse_budget_plain_bytes_round_trip(size):
    """No whole number of bytes loses a digit on the way through text."""
    assert parse_budget(str(size)) == size
    assert parse_budget(f"{size}KiB") == size * 1024


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (23 * 1024**2, "23.0 MiB"),
        (1.63 * 1024**3, "1.63 GiB"),
        (3 * 1024**4, "3.00 TiB"),
        (-(1024**2), "-1.0 MiB"),
    ],
)
def test_format_bytes_uses_the_largest_binary_unit(size, expected):
    """Sizes are written with number and binary unit."""
    assert format_bytes(size) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0.0 ms"),
        (2e-6, "2 µs"),
        (0.0019, "1.9 ms"),
        (1.5, "1.50 s"),
        (75, "1 min 15 s"),
        (3 * 3600 + 61, "3 h 1 min"),
    ],
)
def test_format_seconds_uses_a_readable_unit(seconds, expected):
    """Durations are written with number and unit, from microseconds to hours."""
    assert format_seconds(seconds) == expected
