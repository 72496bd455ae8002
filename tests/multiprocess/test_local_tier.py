"""Local checkpoints: a process that lost its disk gets its part from the others, bit by bit."""

import pytest

pytestmark = pytest.mark.multiprocess

SOURCE = """
import pathlib, shutil, sys
sys.path.insert(0, ".")
from maskformer.training import distributed
distributed.initialize()
import jax, jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
from maskformer.training.local_tier import LocalTier
from maskformer.training.record import RunRecord

mesh = jax.make_mesh((2, 2), ("data", "fsdp")) if sys.argv[2] == "data" else jax.make_mesh((4, 1), ("fsdp", "data"))
random = np.random.default_rng(0)
odd = np.array([[-0.0, np.nan, np.inf, 1e-45], [0.0, -1.5, 3.0, -np.inf]] * 4, np.float32)
values = {
    "whole": odd, "step": np.int32(7), "split": random.normal(size=(8, 6)).astype(np.float32),
    "narrow": np.asarray(jnp.asarray(odd, jnp.bfloat16)), "flags": odd > 0,
}
spec = {"whole": P(), "step": P(), "split": P("fsdp"), "narrow": P(None, "fsdp"), "flags": P("fsdp")}
at = {name: NamedSharding(mesh, of) for name, of in spec.items()}
abstract = {name: jax.ShapeDtypeStruct(np.shape(v), v.dtype, sharding=at[name]) for name, v in values.items()}

def state(step):
    arrays = {name: np.asarray(value) for name, value in (values | {"step": step}).items()}
    arrays["step"] = np.asarray(step, np.int32)
    made = jax.make_array_from_callback
    return {name: made(a.shape, at[name], lambda index, a=a: a[index]) for name, a in arrays.items()}

def same(restored, step):
    for name, value in (values | {"step": np.int32(step)}).items():
        for shard in restored[name].addressable_shards:
            expected = np.asarray(value)[shard.index]
            assert np.asarray(shard.data).tobytes() == np.ascontiguousarray(expected).tobytes(), name

folder = pathlib.Path(sys.argv[1])
tier = LocalTier(folder, "run", abstract)
for step in (3, 5, 8):
    tier.save(step, state(step), RunRecord(next_example=step))
tier.wait()
assert sorted(path.name for path in tier.folder.iterdir()) == ["5", "8"]
multihost_utils.sync_global_devices("saved")

restored, record = LocalTier(folder, "run", abstract).restore(-1)
same(restored, 8)
assert record.next_example == 8
assert LocalTier(folder, "run", abstract).restore(8) is None
assert LocalTier(folder, "other", abstract).restore(-1) is None

for victim in (0, 1):
    if jax.process_index() == victim:
        tier.folder.rename(tier.folder.with_name("away"))
    multihost_utils.sync_global_devices("lost")
    restored, record = LocalTier(folder, "run", abstract).restore(4)
    same(restored, 8)
    assert record.next_example == 8
    if jax.process_index() == victim:
        tier.folder.with_name("away").rename(tier.folder)
    multihost_utils.sync_global_devices("found")

# A part that is damaged counts as lost; where nobody else has what it held, the step before is used.
arrays = tier.folder / "8" / "arrays.bin"
data = bytearray(arrays.read_bytes())
data[11] ^= 1
arrays.write_bytes(data)
multihost_utils.sync_global_devices("damaged")
restored, record = LocalTier(folder, "run", abstract).restore(-1)
same(restored, 5)

other = {name: leaf.update(shape=(*leaf.shape, 2)) for name, leaf in abstract.items()}
assert LocalTier(folder, "run", other).restore(-1) is None
print("ok")
"""


@pytest.mark.parametrize("layout", ["data", "fsdp"])
def test_a_lost_or_damaged_part_comes_from_a_replica_or_from_the_neighbours_copy(run_processes, tmp_path, layout):
    outputs = run_processes(SOURCE, devices_per_process=2, arguments=[str(tmp_path / "local"), layout])
    assert outputs == ["ok\n"] * 2
