import dataclasses

import pytest
import yaml

from launch.accelerators import tpu_slice
from launch.job import Job, Sweep
from launch.jobset import Pod, jobset
from launch.kubectl import Run, Unreachable, supervise
from tests.launch.cluster import Cluster


class FakeKubectl:
    """`Kubectl` without the program."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.away = 0  # calls that will not reach it

    def jobsets(self, name):
        if self.away:
            self.away -= 1
            raise Unreachable("kubectl: Unable to connect to the server")
        return dict(self.cluster.objects)

    def create(self, manifest):
        for item in yaml.safe_load_all(manifest):
            if not self.cluster.create(item):
                raise RuntimeError("kubectl refused: AlreadyExists")

    def delete(self, name):
        self.cluster.delete(name)


@dataclasses.dataclass
class Watched:
    code: int
    cluster: Cluster
    said: list


def runs_of(sweep=None, sizes=(1,), restarts=10, command=("train",)):
    job = Job(command, sizes[0] * 4, restarts, 120, Sweep.parse(sweep) if sweep else None)

    def make(index):
        def one(slices, failures):
            changed = dataclasses.replace(job, processes=slices * 4, restarts=restarts - failures)
            return jobset(changed, tpu_slice("v6e:4x4"), Pod("image"), "bert", slices, index)

        return one

    return [Run("bert" if i is None else f"bert-{i}", sizes, make(i)) for i in job.runs()]


def watch(events=(), *, cluster=None, slices=100, kubectl=None, at_once=None, runs=None, **fields):
    """Supervises runs; before the n-th look the n-th event happens, and after the last all that runs is done."""
    cluster = cluster or Cluster(slices)
    kubectl = kubectl or FakeKubectl(cluster)
    now, said, left = [0.0], [], list(events)

    def sleep(seconds):
        assert len(said) < 200, "it never ends"
        now[0] += seconds
        if left:
            left.pop(0)(cluster)
        else:
            for name in cluster.running():
                if cluster.objects[name]["status"].get("replicatedJobsStatus", [{}])[0].get("ready"):
                    cluster.end(name)
        cluster.tick()

    code = supervise(
        kubectl, "bert", runs or runs_of(**fields), at_once=at_once, patience=100, period=50, clock=lambda: now[0],
        sleep=sleep, say=said.append,
    )  # fmt: skip
    return Watched(code, cluster, said)


def nothing(cluster):
    pass


@pytest.mark.parametrize(("at_once", "most"), [(None, 7), (3, 3), (1, 1)])
def test_a_sweep_has_at_most_so_many_runs_at_a_time_and_all_of_them_in_the_end(at_once, most):
    watched = watch(sweep="0-6", at_once=at_once)
    assert watched.code == 0 and watched.cluster.most == most
    assert [name for name, *_ in watched.cluster.made] == [f"bert-{i}" for i in range(7)]
    assert watched.said[-1] == "7 done"


def test_a_run_that_failed_makes_the_exit_code_1_and_says_why():
    watched = watch([lambda c: c.end("bert-1", "Failed", "jobset failed due to reaching max restarts")], sweep="0-2")
    assert watched.code == 1
    assert "bert-1: failed (jobset failed due to reaching max restarts)" in watched.said
    assert watched.said[-1] == "2 done, 1 failed"


def test_a_run_that_somebody_deletes_is_not_made_again():
    watched = watch([nothing, lambda c: c.delete("bert")])
    assert watched.code == 1 and len(watched.cluster.made) == 1
    assert "bert: failed (its JobSet was deleted by somebody else)" in watched.said


def sizes_made(watched):
    return [slices for _, slices, _ in watched.cluster.made]


@pytest.mark.parametrize(("there", "made"), [(4, [4]), (3, [4, 2]), (1, [4, 2, 1])])
def test_an_elastic_run_takes_as_many_slices_as_are_there(there, made):
    watched = watch([nothing] * 8, slices=there, sizes=(4, 2, 1))
    assert watched.code == 0 and sizes_made(watched) == made


def test_an_elastic_run_that_loses_a_slice_goes_on_with_fewer_and_grows_at_the_next_interruption():
    def lose(cluster):
        cluster.slices = 3
        cluster.interrupt("bert")

    def win(cluster):
        cluster.slices = 4
        cluster.interrupt("bert")

    watched = watch([nothing, lose, *[nothing] * 6, win, *[nothing] * 4], slices=4, sizes=(4, 2))
    assert watched.code == 0 and sizes_made(watched) == [4, 2, 4]
    assert "bert: with 4 slices waited 100 s for machines; next with 2" in watched.said
    assert "bert: with 2 slices was interrupted; next with 4" in watched.said


def test_an_elastic_run_that_gets_its_machines_back_in_time_keeps_its_jobset():
    watched = watch([nothing, lambda c: c.interrupt("bert"), nothing, nothing], slices=4, sizes=(4, 2))
    assert watched.code == 0 and sizes_made(watched) == [4]


def test_an_elastic_run_that_finds_no_machines_at_all_begins_again_with_the_largest():
    def come(cluster):
        cluster.slices = 4

    watched = watch([*[nothing] * 8, come, *[nothing] * 8], slices=0, sizes=(4, 2))
    assert sizes_made(watched)[:3] == [4, 2, 4] and watched.code == 0


def test_failures_are_counted_over_all_jobsets_of_a_run():
    def fail(cluster):
        cluster.slices = 2
        cluster.interrupt("bert", counted=1)

    watched = watch([nothing, fail, *[nothing] * 8], slices=4, sizes=(4, 2), restarts=3)
    assert [left for *_, left in watched.cluster.made] == [3, 2]


def test_a_launcher_that_starts_again_takes_over_what_is_there():
    cluster = Cluster()
    for run in runs_of(sweep="0-1"):
        cluster.create(run.make(1, 0))
    cluster.end("bert-0")
    watched = watch(cluster=cluster, sweep="0-3", at_once=2)
    assert watched.code == 0 and [name for name, *_ in cluster.made] == [f"bert-{i}" for i in range(4)]
    assert cluster.most == 2
    assert watched.said[:3] == ["bert-0: there already", "bert-0: done", "bert-1: there already"]


def test_a_launcher_that_starts_again_knows_the_size_and_the_failures_of_an_elastic_run():
    cluster = Cluster(slices=2)
    cluster.create(runs_of(sizes=(4, 2, 1), restarts=5)[0].make(2, 1))
    cluster.tick()

    def lose(cluster):
        cluster.slices = 1
        cluster.interrupt("bert", counted=1)

    watched = watch([nothing, lose, *[nothing] * 12], cluster=cluster, sizes=(4, 2, 1), restarts=5)
    assert watched.code == 0
    assert [(slices, left) for _, slices, left in cluster.made] == [(2, 4), (4, 3), (2, 3), (1, 3)]


def test_what_the_cluster_added_to_a_jobset_does_not_make_it_another_one():
    cluster = Cluster()
    cluster.create(runs_of()[0].make(1, 0))
    spec = cluster.objects["bert"]["spec"]
    # JobSet's webhook and Kueue, which admits it to a flavor of its own.
    spec |= {"network": {"enableDNSHostnames": True}, "successPolicy": {"operator": "All"}, "managedBy": "kueue"}
    template = spec["replicatedJobs"][0]["template"]["spec"]["template"]
    template["metadata"]["creationTimestamp"] = None
    template["spec"]["nodeSelector"]["cloud.google.com/gke-nodepool"] = "slice-0"
    template["spec"]["tolerations"].append({"key": "reserved", "operator": "Exists"})
    watched = watch(cluster=cluster)
    assert watched.code == 0 and watched.said[0] == "bert: there already" and len(cluster.made) == 1


def test_a_jobset_without_restarts_left_is_taken_over_where_the_server_leaves_out_the_zero():
    cluster = Cluster()
    (run,) = runs_of(restarts=0)
    cluster.create(run.make(1, 0))
    # `MaxRestarts int32 json:"maxRestarts,omitempty"`, in which Go does not write a 0.
    del cluster.objects["bert"]["spec"]["failurePolicy"]["maxRestarts"]
    watched = watch(cluster=cluster, restarts=0)
    assert watched.code == 0 and watched.said[0] == "bert: there already" and len(cluster.made) == 1


def test_a_foreign_jobset_of_that_name_is_left_alone():
    cluster = Cluster()
    spec = {"replicatedJobs": [{"name": "slice", "replicas": 1, "template": {}}]}
    cluster.objects["bert"] = {"metadata": {"name": "bert"}, "spec": spec, "status": {}}
    with pytest.raises(ValueError, match="--name 'bert': expected a name of which there is no JobSet of another"):
        watch(cluster=cluster)


@pytest.mark.parametrize("other", [{"command": ("other",)}, {"sizes": (2,)}, {"restarts": 11}])
def test_a_jobset_of_that_name_that_is_another_one_is_left_alone(other):
    cluster = Cluster()
    (run,) = runs_of(**other)
    cluster.create(run.make(run.slices, 0))
    with pytest.raises(ValueError, match="--name 'bert': expected a name of which there is no JobSet of another"):
        watch(cluster=cluster)


def test_a_cluster_that_is_away_for_a_while_is_waited_for():
    cluster = Cluster()
    kubectl = FakeKubectl(cluster)

    def leave(cluster):
        kubectl.away = 19

    watched = watch([nothing, leave, *[nothing] * 20], cluster=cluster, kubectl=kubectl)
    assert watched.code == 0
    assert watched.said.count("kubectl: Unable to connect to the server: trying again") == 1

    kubectl = FakeKubectl(Cluster())
    with pytest.raises(Unreachable):
        watch([lambda cluster: setattr(kubectl, "away", 20), *[nothing] * 30], cluster=kubectl.cluster, kubectl=kubectl)
    kubectl.away = 1
    with pytest.raises(Unreachable):
        watch(kubectl=kubectl)


def test_ctrl_c_leaves_the_runs_alone():
    def interrupt(cluster):
        raise KeyboardInterrupt

    watched = watch([nothing, interrupt])
    assert watched.code == 130 and watched.cluster.running() == ["bert"]
    assert "give the same command again" in watched.said[-1]
