import jax
import pytest

from maskformer.training import sharding
from tests.training.tiny import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture
def devices(monkeypatch):
    """A function that makes runs see only the first `count` simulated devices."""
    create = sharding.create_mesh

    def limit(count: int) -> None:
        monkeypatch.setattr(sharding, "create_mesh", lambda config: create(config, jax.devices()[:count]))

    limit(1)
    return limit
