"""The compilation cache of several processes."""

import pytest

pytestmark = pytest.mark.multiprocess

SOURCE = """
import os
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # the tests' own
from maskformer.training import compilation, distributed
distributed.initialize()
compilation.use_cache()
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
rows = NamedSharding(jax.make_mesh((2,), ("data",)), P("data"))
values = jax.make_array_from_callback((4, 8), rows, lambda index: np.ones((2, 8), np.float32))
total = jax.jit(lambda x: jnp.sin(x).sum() + x, out_shardings=rows)(values)
print(compilation.counts(), float(total.addressable_shards[0].data[0, 0]))
"""


def test_what_each_process_compiled_all_of_them_read_at_the_next_start(run_processes, tmp_path):
    always = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    environment = {"MASKFORMER_CACHE": str(tmp_path / "cache"), **always}
    first = run_processes(SOURCE, extra_environment=environment)
    second = run_processes(SOURCE, extra_environment=environment)
    for before, after in zip(first, second, strict=True):
        assert before.startswith("(0, ") and not before.startswith("(0, 0)")
        assert after == before.replace("(0, ", "(").replace(")", ", 0)")
