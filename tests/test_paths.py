"""Paths: local ones are left alone, and buckets have a path's methods, against a real server."""

import importlib.util
import pathlib
import pickle

import pytest

from maskformer import paths
from tests.emulator import check_known_files, contents


def test_a_local_path_is_a_pathlib_path_and_absolute():
    assert paths.resolve("runs/x") == pathlib.Path("runs/x").absolute()
    assert isinstance(paths.resolve("runs/x"), pathlib.Path)
    assert paths.resolve("file:///tmp/run") == pathlib.Path("/tmp/run")
    assert paths.is_local("runs/a:b") and paths.is_local("file:///tmp") and not paths.is_local("gs://b/x")


@pytest.mark.parametrize(
    "written, why",
    [
        ("", "expected a folder; '.' is the current one"),
        ("gz://bucket/run", "unknown address; did you mean 'gs://'?"),
        ("gs://", "expected gs://BUCKET/FOLDER"),
        ("gs:///run", "expected gs://BUCKET/FOLDER"),
        ("memory://run", None),
        ("runs/a:b", None),
    ],
)
def test_what_can_name_no_folder_is_told_without_asking_a_network(written, why):
    assert paths.why_no_folder(written) == why


@pytest.mark.parametrize("kind, extra", [("gs", "gcs"), ("s3", "s3")])
def test_a_missing_client_library_is_one_line_with_the_extra_to_install(monkeypatch, kind, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"{kind}:// needs \w+, which is not installed; pip install 'maskformer\["):
        paths.resolve(f"{kind}://bucket/run")
    assert paths.why_no_folder(f"{kind}://bucket/run").endswith(f"pip install 'maskformer[{extra}]'")


def test_a_run_is_refused_where_none_can_be_whatever_is_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for kind in ("s3", "memory", "gcs"):
        assert paths.why_no_run(f"{kind}://bucket/run").startswith("checkpoints are kept in gs:// or on a file system")
    for root in ("gs://bucket", "gs://bucket/", "gs:/bucket", "gs:///run"):
        assert paths.why_no_run(root) == "expected gs://BUCKET/FOLDER"
    assert paths.why_no_run("gs://bucket/run").endswith("pip install 'maskformer[gcs]'")
    assert paths.why_no_run("gz://bucket/run") == "unknown address; did you mean 'gs://'?"
    assert paths.why_no_run("") == "expected a folder; '.' is the current one"


def test_an_address_survives_arithmetic_pathlib_and_pickling(bucket):
    run = paths.resolve(f"{bucket}/runs/bert/")
    assert str(run) == f"{bucket}/runs/bert"
    assert str(run / "checkpoints" / "7") == f"{bucket}/runs/bert/checkpoints/7"
    assert str(run.parent) == f"{bucket}/runs" and run.name == "bert"
    assert str(run.with_name("x")) == f"{bucket}/runs/x"
    assert paths.resolve(pathlib.Path(f"{bucket}/runs/bert")) == run  # pathlib merges the two slashes
    assert pickle.loads(pickle.dumps(run)) == run
    assert (run.bucket, run.key) == (bucket, "runs/bert")


def test_files_of_a_bucket_are_what_the_server_holds(bucket, emulator):
    run = paths.resolve(f"{bucket}/run")
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "deep" / "er.bin").write_bytes(b"12345")
    assert {name: int(item["size"]) for name, item in contents(emulator, bucket[5:]).items()} == {
        "run/config.json": 2,
        "run/deep/er.bin": 5,
    }
    assert [entry.name for entry in run.iterdir()] == ["config.json", "deep"]
    assert run.is_dir() and (run / "deep").is_dir() and (run / "config.json").is_file()
    assert not (run / "config.json").is_dir() and not (run / "conf").exists()
    assert paths.files_below(run) == [run / "config.json", run / "deep" / "er.bin"]
    assert paths.size(run / "deep" / "er.bin") == 5
    (run / "deep").rename(run / "set-aside")
    assert sorted(contents(emulator, bucket[5:])) == ["run/config.json", "run/set-aside/er.bin"]
    run.rmtree()
    assert not contents(emulator, bucket[5:])


def test_appending_to_an_object_is_refused_since_it_would_overwrite(bucket):
    (paths.resolve(bucket) / "x").write_text("before")
    with pytest.raises(ValueError, match="an object is written whole"):
        (paths.resolve(bucket) / "x").open("a")
    assert (paths.resolve(bucket) / "x").read_text() == "before"


def test_a_file_is_written_only_where_it_is_the_one_that_is_known(bucket):
    check_known_files(bucket)


def test_a_bucket_that_is_not_there_is_one_line_with_the_command_that_makes_it(emulator):
    with pytest.raises(OSError) as error:
        paths.check_store(paths.resolve("gs://not-there-at-all/run"))
    assert error.value.strerror == (
        "there is no bucket gs://not-there-at-all; mend its name, or make it: gcloud storage buckets create "
        "gs://not-there-at-all"
    )
