"""Sizes in bytes as people write them."""

import duckdb
import pytest

from xtoken.schemas.io.sizes import memory_size, parse_size


def test_sizes_are_read_as_people_write_them() -> None:
    expected = {"0": 0, "1000": 1000, "20GB": 20 * 10**9, "1.5 tb": 15 * 10**11, "512MiB": 2**29, "3k": 3000, "7B": 7}
    assert {text: parse_size(text) for text in expected} == expected


@pytest.mark.parametrize("text", ["", "many", "-1", "1e9", "20 GB/s", "1XB"])
def test_what_is_not_a_size_is_refused_by_its_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size; write bytes, or 20GB, 512MiB") as refused:
        parse_size(text)
    assert str(refused.value).startswith(repr(text))


@pytest.mark.parametrize("text", ["512MB", "1.5GiB", "2TB", "1000KiB"])
def test_a_size_of_memory_means_the_same_to_duckdb(text: str) -> None:
    session = duckdb.connect()
    session.execute(f"SET memory_limit = '{memory_size(text)}'")
    (shown,) = session.execute("SELECT current_setting('memory_limit')").fetchone() or ("",)
    assert parse_size(shown.replace(" ", "")) == pytest.approx(parse_size(text), rel=0.03)  # it is shown in two digits


@pytest.mark.parametrize("text", ["512", "512M", "512mb", "much", "1 GB"])
def test_other_sizes_of_memory_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write it like 512MB or 2GB"):
        memory_size(text)
