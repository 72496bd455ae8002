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


def shapes(size):
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    at = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return {"weight": jax.ShapeDtypeStruct((size,), "float32", sharding=at)}


def save(tier, *steps, size=3):
    for step in steps:
        made = jax.device_put(jax.numpy.full(size, float(step)), shapes(size)["weight"].sharding)
        tier.save(step, {"weight": made}, RunRecord(next_example=step))
    tier.wait()


def test_a_start_on_another_mesh_keeps_its_own_beside_newer_ones_of_the_one_before(tmp_path):
    """What is of no use any more does not take the place of what is."""
    before = LocalTier(tmp_path / "local", tmp_path, shapes(3))
    before.begin()
    save(before, 8, 10)
    tier = LocalTier(tmp_path / "local", tmp_path, shapes(4))
    assert tier.restore(newer_than=1) is None
    tier.begin()
    save(tier, 2, 4, size=4)
    restored, record = LocalTier(tmp_path / "local", tmp_path, shapes(4)).restore(newer_than=1)
    assert restored["weight"].tolist() == [4.0] * 4 and record.next_example == 4
    assert sorted(path.name for path in tier.folder.iterdir()) == ["2", "4"]


def test_a_host_that_comes_back_does_not_bring_steps_that_the_run_has_since_made_anew(tmp_path):
    first = LocalTier(tmp_path / "local", tmp_path, shapes(3))
    first.begin()
    save(first, 2, 4)
    first.folder.rename(tmp_path / "of a host that was lost")
    # The run goes on elsewhere from step 1, which is in its workdir, and drops the later lines of its metrics.
    elsewhere = LocalTier(tmp_path / "local", tmp_path, shapes(3))
    assert elsewhere.restore(newer_than=1) is None
    elsewhere.begin()
    save(elsewhere, 2)
    (tmp_path / "of a host that was lost" / "4").rename(elsewhere.folder / "4")
    back = LocalTier(tmp_path / "local", tmp_path, shapes(3))
    assert back.restore(newer_than=1)[1].next_example == 2
    back.begin()
    assert [path.name for path in back.folder.iterdir()] == ["2"]
    # A start that ends before its first save leaves what it went on from; what it makes anew takes its place.
    again = LocalTier(tmp_path / "local", tmp_path, shapes(3))
    assert again.restore(newer_than=1)[1].next_example == 2
    again.begin()
    save(again, 4)
    assert LocalTier(tmp_path / "local", tmp_path, shapes(3)).restore(newer_than=1)[1].next_example == 4


def test_a_disk_that_takes_nothing_costs_the_checkpoint_and_not_the_run(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    tier = LocalTier(tmp_path / "file", tmp_path, shapes(3))
    tier.begin()
    save(tier, 1)
    assert "local checkpoint of step 1: cannot be written" in caplog.text and tier.restore(-1) is None


def test_a_folder_is_asked_for_and_has_to_be_of_the_host(config):
    from maskformer.training.sections import CheckpointConfig

    with pytest.raises(ValueError, match=r"checkpoint\.local_folder=None: expected a folder of each host's own"):
        CheckpointConfig(local_every=5)
    with pytest.raises(ValueError, match=r"checkpoint\.local_folder='gs://b/x'"):
        CheckpointConfig(local_every=5, local_folder="gs://b/x")
