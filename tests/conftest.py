"""What every test may ask for. Helpers that are plain functions live in tests/tiny.py."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from eyas.config import EyasError

settings.register_profile(  # the same examples on every machine, and none that is judged by a clock
    "eyas", max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("eyas")


SLOWEST = ("test_real.py", "test_peers.py", "test_doctor.py", "test_parallel.py", "test_example.py", "test_new_draft.py", "test_train.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first: of processes side by side none shall begin with one when the others are done."""
    rank = {name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True)
def plans_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What planners learn from tiny models stays out of the user's cache."""
    from eyas.decode.plan import store

    monkeypatch.setattr(store, "cache_dir", lambda: tmp_path)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads PyTorch has, until the test ends."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def embedded() -> Path:
    """The embedded target's directory; mark tests that use it `real`. With EYAS_REQUIRE_REAL set, its absence is a failure."""
    from eyas.files.embedded import embedded_target

    try:
        with open(Path(tempfile.gettempdir()) / f"eyas-tests-{os.getuid()}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of several test processes one fetches, the others wait for it
            return embedded_target()
    except EyasError as error:
        if os.environ.get("EYAS_REQUIRE_REAL"):
            pytest.fail(f"EYAS_REQUIRE_REAL is set, and {error}")
        pytest.skip(str(error))
