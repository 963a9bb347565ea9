"""Slow and obvious: the windows of a document, byte by byte."""


def windows_of(document: bytes, window: int, carried: int) -> list[tuple[bytes, bytes]]:
    """(what a window repeats, what counts in it) of all windows of a document."""
    found, context, new = [], b"", b""
    for place in range(len(document)):
        if len(context) + len(new) == window:
            found.append((context, new))
            context, new = (context + new)[window - carried :], b""
        new += document[place : place + 1]
    return [*found, (context, new)]
