import contextlib

import jax
import pytest

from maskformer.training import loop, sharding
from tests.training.tiny import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture
def compiled_steps(monkeypatch):
    """The jitted train steps of all runs in a test."""
    steps, jit = [], jax.jit

    def recording(function, **options):
        compiled = jit(function, **options)
        if getattr(function, "__name__", "") == "train_step":
            steps.append(compiled)
        return compiled

    monkeypatch.setattr(loop.jax, "jit", recording)
    return steps


@pytest.fixture(scope="module")
def first_device():
    """A context in which runs see one device, for runs that a whole module shares."""

    @contextlib.contextmanager
    def limited():
        create = sharding.create_mesh
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sharding, "create_mesh", lambda config: create(config, jax.devices()[:1]))
            yield

    return limited


@pytest.fixture
def devices(monkeypatch):
    """A function that makes runs see only the first `count` simulated devices."""
    create = sharding.create_mesh

    def limit(count: int) -> None:
        monkeypatch.setattr(sharding, "create_mesh", lambda config: create(config, jax.devices()[:count]))

    limit(1)
    return limit
