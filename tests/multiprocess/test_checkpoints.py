"""Checkpoints that several processes write and check together."""

import pytest

pytestmark = pytest.mark.multiprocess

# Each process checks its part of the files, and all of them come to the same answer.
SOURCE = """
import pathlib, sys
sys.path.insert(0, ".")
from maskformer.training import distributed
distributed.initialize()
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from maskformer.training.checkpoints import Checkpoints, RunRecord
from maskformer.training.sections import CheckpointConfig, EvaluationConfig

workdir = pathlib.Path(sys.argv[1])
split = NamedSharding(jax.make_mesh((2,), ("data",)), PartitionSpec("data"))
values = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
shape = {"weight": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=split)}
made = Checkpoints(workdir, CheckpointConfig(keep=3), EvaluationConfig())
for step in (1, 2):
    scaled = jax.make_array_from_callback(values.shape, split, lambda index: step * values[index])
    made.save(step, {"weight": scaled}, RunRecord(next_example=step), None)
made.close()
for owner in (1, 0):
    # A file that only one of the processes looks at.
    if jax.process_index() == 0:
        files = sorted((workdir / "checkpoints" / "2" / "state").glob(f"ocdbt.process_{owner}/d/*"))
        path = max(files, key=lambda path: path.stat().st_size)
        data = path.read_bytes()
        path.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    multihost_utils.sync_global_devices("flipped")
    again = Checkpoints(workdir, CheckpointConfig(keep=3), EvaluationConfig())
    state, record = again.restore_latest(shape)
    again.close()
    print(owner, record.next_example, sorted(path.name for path in workdir.iterdir()))
    multihost_utils.sync_global_devices("seen")
    if jax.process_index() == 0:
        (workdir / "damaged-2").rename(workdir / "checkpoints" / "2")
        path.write_bytes(data)
    multihost_utils.sync_global_devices("mended")
"""


def test_damage_that_one_of_two_processes_finds_is_got_round_by_both(run_processes, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    line = "{} 1 ['checkpoints', 'damaged-2']\n"
    assert run_processes(SOURCE, arguments=[str(workdir)]) == [line.format(1) + line.format(0)] * 2
