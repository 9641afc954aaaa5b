"""A tiny model behind a server of four slots, for each file of claims about it. A file may bring an engine of its own."""

from __future__ import annotations

import pytest

from tests.serve.serving import saved_engine, served


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return saved_engine(tmp_path_factory.mktemp("serve"), max_position_embeddings=512)


@pytest.fixture(scope="module")
def client(engine):
    with served(engine, "--slots", "4") as (client, _):
        yield client
