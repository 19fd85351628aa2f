"""TABLES & FIGURES: counts and spans in few letters."""
from __future__ import annotations

import pytest
from harness import ccproxy


@pytest.mark.parametrize("number, text", [
    (0, "0"), (123, "123"), (999, "999"), (1000, "1k"), (4711, "4.71k"), (131_072, "131k"),
    (999_499, "999k"), (999_500, "1M"), (1_048_576, "1.05M"), (10_000_000, "10M"),
    (25e9, "25G")])
def test_short_numbers(number, text):
    assert ccproxy.short_number(number) == text


@pytest.mark.parametrize("seconds, text", [
    (-1, "0ms"), (0, "0ms"), (0.34, "340ms"), (0.9996, "1.00s"), (9.994, "9.99s"),
    (12.34, "12.3s"), (100, "1m40s"), (3600, "1h00m"), (11_000, "3h03m"), (90_000, "1d01h"),
    (1e9, "11574d01h")])
def test_short_spans(seconds, text):
    assert ccproxy.short_span(seconds) == text


@pytest.mark.parametrize("text, width", [
    ("abc", 3), ("", 0), ("\ud55c\uad6d", 4), ("e\u0301", 1), ("a\u2026", 2)])
def test_widths(text, width):
    assert ccproxy.text_width(text) == width


@pytest.mark.parametrize("width, lines", [
    (0, ["id            n", "moonshotai  100", "\ud55c            2"]),
    (10, ["id       n", "moon\u2026  100", "\ud55c       2"]),
    (4, ["id      n", "moo\u2026  100", "\ud55c      2"])])     # no table is that narrow
def test_tables(width, lines):
    rows = [("moonshotai", "100"), ("\ud55c", "2")]
    assert ccproxy.table_lines(("id", "n"), rows, "lr", width) == lines
