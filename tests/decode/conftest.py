"""What the tests of decoding share."""

from __future__ import annotations

import pytest

from eyas.decode.plan import clock


@pytest.fixture(autouse=True)
def no_core_is_taken(monkeypatch):
    """Rounds count as undisturbed, whatever else the machine does while the tests run."""
    monkeypatch.setattr(clock, "cores_taken", lambda: 0)
