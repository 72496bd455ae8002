"""Checkpoints on the host's own disk: what a killed run goes on from. `tests/multiprocess` has lost hosts."""


import jax
import pytest

from maskformer.training import program, train_and_evaluate
from maskformer.training.local_tier import LocalTier
from maskformer.training.record import RunRecord
from tests.training.tiny import metric_lines, tiny_config


class Killed(BaseException):
    pass


@pytest.fixture
def config(corpus, tmp_path):
    def made(**changes):
        rare = dict(checkpoint__every=100, checkpoint__local_every=2, train__steps=10, evaluation__every=0)
        return tiny_config(corpus, **rare | changes, checkpoint__local_folder=str(tmp_path / "local"))

    return made


def killed_at(monkeypatch, step, *arguments):
    """Train until the batch of `step` is asked for."""
    batches, to_global = [0], program.sharding.to_global

    def counted(batch, placement):
        batches[0] += 1
        if batches[0] == step:
            raise Killed
        return to_global(batch, placement)

    monkeypatch.setattr(program.sharding, "to_global", counted)
    with pytest.raises(Killed):
        train_and_evaluate(*arguments)
    monkeypatch.setattr(program.sharding, "to_global", to_global)


def starts(workdir):
    from maskformer.training.events import read_events

    return [event["step"] for event in read_events(workdir) if event["event"] == "start"]


def test_a_killed_run_goes_on_from_the_newest_local_checkpoint_to_the_same_bits(
    config, devices, tmp_path, monkeypatch, quick_compilation
):
    devices(1)
    train_and_evaluate(config(checkpoint__local_every=0), tmp_path / "undisturbed")
    killed_at(monkeypatch, 9, config(), tmp_path / "run")
    train_and_evaluate(config(), tmp_path / "run")
    assert starts(tmp_path / "run")[-1] >= 4
    assert metric_lines(tmp_path / "run") == metric_lines(tmp_path / "undisturbed")
    assert not list((tmp_path / "local").rglob("*.bin")), "a run that is over leaves nothing there"


def test_a_new_run_in_the_same_folder_takes_nothing_from_the_one_before(
    config, devices, tmp_path, monkeypatch, quick_compilation
):
    devices(1)
    killed_at(monkeypatch, 6, config(), tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    train_and_evaluate(config(), tmp_path / "run")
    assert starts(tmp_path / "run") == [0]


def test_a_disk_that_takes_nothing_costs_the_checkpoint_and_not_the_run(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    at = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = {"weight": jax.device_put(jax.numpy.ones(3), at)}
    tier = LocalTier(tmp_path / "file", "run", {"weight": jax.ShapeDtypeStruct((3,), "float32", sharding=at)})
    tier.save(1, state, RunRecord())
    tier.wait()
    assert "local checkpoint of step 1: cannot be written" in caplog.text and tier.restore(-1) is None


def test_a_folder_is_asked_for_and_has_to_be_of_the_host(config):
    from maskformer.training.sections import CheckpointConfig

    with pytest.raises(ValueError, match=r"checkpoint\.local_folder=None: expected a folder of each host's own"):
        CheckpointConfig(local_every=5)
    with pytest.raises(ValueError, match=r"checkpoint\.local_folder='gs://b/x'"):
        CheckpointConfig(local_every=5, local_folder="gs://b/x")
