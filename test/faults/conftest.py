"""How many seeded trials a test has."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "trials(n): `seed` is 0 to n - 1, or as many as --fault-trials asks for"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is tried again and again within one test has time for each trial: a minute, ten times what it takes."""
    seconds = 60 * int(config.getoption("--fault-trials"))
    for item in items:
        if "trials" in getattr(item, "fixturenames", ()) and seconds > 300:
            item.add_marker(pytest.mark.timeout(seconds))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("trials")
    if marker is not None:
        asked = int(metafunc.config.getoption("--fault-trials"))
        metafunc.parametrize("seed", range(max(marker.args[0], asked)))
