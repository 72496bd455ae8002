"""What the TPU compiler sends between two slices, without a TPU."""

import math
import re

import pytest

pytest.importorskip("libtpu", reason="needs the extra [tpu]")

from maskformer.training import recipes, sharding
from maskformer.training.program import Program
from tests.aot.test_meshes import devices_of

pytestmark = [pytest.mark.aot, pytest.mark.slow]  # a compilation takes half a minute


def sent_between_slices(*flags):
    """`(within the entry computation, shape)` of each array that leaves a slice in a step of two accumulated parts."""
    flags = [
        "--config=configs/bert.py:tiny", "--config.train.batch_size=64", "--config.train.accumulation_steps=2",
        "--config.evaluation.every=0", *flags,
    ]  # fmt: skip
    program = Program.of(recipes.load_config(flags)[0])
    mesh = sharding.create_mesh(program.experiment.mesh, devices_of("v5e:2x2", slices=2))
    computation, sent = "", []
    for line in program.on(mesh).lower_train().compile().as_text().splitlines():
        if re.match(r"\S.*\{$", line):
            computation = line.split()[0]
        if match := re.search(r"= \((\w+\[[\d,]*\]).* send\(.*is_host_transfer=true", line):
            sent.append((computation == "ENTRY", match[1]))
    return sent


def test_gradients_cross_once_a_step_as_bfloat16_where_asked():
    sent = sent_between_slices("--config.mesh.dcn.data=2", "--config.mesh.dcn_gradients=bfloat16")
    assert sent and all(entry for entry, _ in sent)
    # What is left in 32 bits are the counts and means of the log line.
    wide = [shape for _, shape in sent if not shape.startswith("bf16")]
    assert set(wide) <= {"f32[1,1,128]", "s32[1,1,128]"} and any(s.startswith("bf16") for _, s in sent)


def test_each_device_of_a_slice_sends_its_own_part_of_the_gradients_only():
    sent = sent_between_slices("--config.mesh.dcn.data=2", "--config.mesh.dcn_gradients=bfloat16")
    numbers = sum(math.prod(map(int, shape[5:-1].split(","))) for _, shape in sent if shape.startswith("bf16["))
    program = Program.of(recipes.load_config(["--config=configs/bert.py:tiny"])[0])
    # Of four devices; small arrays are padded to tiles.
    assert numbers == pytest.approx(program.model.num_params() / 4, rel=0.2)


def test_without_it_they_cross_in_float32():
    sent = sent_between_slices()
    assert any(shape.startswith("f32[") and shape != "f32[1,1,128]" for _, shape in sent)
    assert not any(shape.startswith("bf16") for _, shape in sent)
