"""Windows of bytes rejoin, end with whole characters, and prefer to end before a space."""

from xtoken.pipeline.corpus import Document
from xtoken.pipeline.corpus.byte_windows import byte_windows


def windows(text: str, size: int, most: int) -> list[tuple[str, str, bool]]:
    found = byte_windows([Document("d", text, 0, 0)], size, most)
    return [(window.id, window.data.decode(), window.complete) for window in found]


def test_words_stay_whole() -> None:
    assert windows("one two three four", 10, 100) == [
        ("d@0", "one two", False),
        ("d@7", " three", False),
        ("d@13", " four", True),
    ]


def test_long_words_are_cut_between_characters() -> None:
    assert windows("ab€€€", 6, 100) == [("d@0", "ab€", False), ("d@5", "€€", True)]


def test_all_together_have_no_more_than_that() -> None:
    assert windows("one two three four", 10, 9) == [("d@0", "one two", False), ("d@7", " t", False)]
    documents = [Document("a", "tea", 0, 0), Document("b", "€", 0, 1), Document("c", "tea", 0, 2)]
    assert [window.data for window in byte_windows(documents, 10, 5)] == [b"tea"]  # no room for a whole character
    assert [window.complete for window in byte_windows(documents, 10, 6)] == [True, True]
