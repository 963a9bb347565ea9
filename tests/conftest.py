"""The order of the tests: files that start processes, or have lengthy tests, come first."""

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Behind pytest-randomly, whose order stays among the files of each kind.

    These files take longest. Where two processes of pytest share the files, the last one to be taken decides
    how long one of them works alone.
    """
    long = ("multi_process", "lengthy")
    first = {item.path for item in items if any(item.get_closest_marker(name) for name in long)}
    items.sort(key=lambda item: item.path not in first)
