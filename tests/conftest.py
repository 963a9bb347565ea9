"""The order of the tests: files that start processes come first."""

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Behind pytest-randomly, whose order stays among the files of each kind.

    The longest files start processes. Where two processes of pytest share the files, the last one to be taken decides
    how long one of them works alone.
    """
    first = {item.path for item in items if item.get_closest_marker("multi_process")}
    items.sort(key=lambda item: item.path not in first)
