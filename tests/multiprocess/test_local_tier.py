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
workdir, elsewhere = (folder / name for name in ("workdir", "elsewhere"))
workdir.mkdir(parents=True, exist_ok=True)
tier = LocalTier(folder, workdir, abstract)
tier.begin()
for step in (3, 5, 8):
    tier.save(step, state(step), RunRecord(next_example=step))
tier.wait()
assert sorted(path.name for path in tier.folder.iterdir()) == ["5", "8"]
multihost_utils.sync_global_devices("saved")

restored, record = LocalTier(folder, workdir, abstract).restore(-1)
same(restored, 8)
assert record.next_example == 8
assert LocalTier(folder, workdir, abstract).restore(8) is None
assert LocalTier(folder, elsewhere, abstract).restore(-1) is None

for victim in (0, 1):
    if jax.process_index() == victim:
        tier.folder.rename(tier.folder.with_name("away"))
    multihost_utils.sync_global_devices("lost")
    restored, record = LocalTier(folder, workdir, abstract).restore(4)
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
restored, record = LocalTier(folder, workdir, abstract).restore(-1)
same(restored, 5)

other = {name: leaf.update(shape=(*leaf.shape, 2)) for name, leaf in abstract.items()}
assert LocalTier(folder, workdir, other).restore(-1) is None
print("ok")
"""


# Along a torus the devices of one process may stand beside each other on one axis, and those of the next on another.
CROSSED = """
import pathlib, sys
sys.path.insert(0, ".")
from maskformer.training import distributed
distributed.initialize()
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from maskformer.training.local_tier import LocalTier
from maskformer.training.record import RunRecord

devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
crossed = np.array([devices[number] for number in (0, 2, 1, 3, 4, 5, 6, 7)]).reshape(4, 2)
at = NamedSharding(Mesh(crossed, ("fsdp", "tensor")), P("fsdp"))
value = np.arange(8, dtype=np.float32)
abstract = {"split": jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=at)}
folder = workdir = pathlib.Path(sys.argv[1])
tier = LocalTier(folder, workdir, abstract)
tier.begin()
tier.save(3, {"split": jax.make_array_from_callback(value.shape, at, lambda index: value[index])}, RunRecord())
tier.wait()
if jax.process_index() < 2:
    tier.folder.rename(tier.folder.with_suffix(".away"))
multihost_utils.sync_global_devices("lost")
restored, _ = LocalTier(folder, workdir, abstract).restore(-1)
for shard in restored["split"].addressable_shards:
    assert np.asarray(shard.data).tolist() == value[shard.index].tolist(), (shard.index, shard.data)
print("ok")
"""


@pytest.mark.slow
def test_two_neighbours_that_hold_the_parts_of_a_torus_differently_are_restored_from_the_third(run_processes, tmp_path):
    (tmp_path / "run").mkdir()
    outputs = run_processes(CROSSED, processes=4, devices_per_process=2, arguments=[str(tmp_path / "run")])
    assert outputs == ["ok\n"] * 4


@pytest.mark.parametrize("layout", ["data", "fsdp"])
def test_a_lost_or_damaged_part_comes_from_a_replica_or_from_the_neighbours_copy(run_processes, tmp_path, layout):
    outputs = run_processes(SOURCE, devices_per_process=2, arguments=[str(tmp_path / "local"), layout])
    assert outputs == ["ok\n"] * 2
