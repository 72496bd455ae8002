"""A bucket that refuses, is busy, or breaks connections: asked again where that helps, and told in one line."""

import time
import types
import urllib.request

import pytest

from maskformer import paths
from maskformer.cli import main
from maskformer.data import DataConfig, DataError
from maskformer.data.sources import open_source
from maskformer.textfiles import UnreachableError
from maskformer.training.workdir import RunError, prepare_workdir


def first(count, answer):
    """Answer so the first `count` requests."""
    left = [answer] * count
    return lambda method, path: left.pop() if left else None


@pytest.fixture
def quickly(monkeypatch):
    """Neither client waits between two requests; how long they would is theirs to know."""
    import gcsfs.retry
    from google.api_core import retry

    async def at_once(_):
        pass

    monkeypatch.setattr(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=at_once))
    monkeypatch.setattr(
        retry.retry_unary, "time", types.SimpleNamespace(sleep=lambda _: None, monotonic=time.monotonic)
    )


@pytest.fixture
def impatient(quickly, monkeypatch):
    monkeypatch.setattr("maskformer.paths.versions.PATIENCE", 0.5)


@pytest.mark.parametrize("answer", [429, 503, "reset"])
def test_a_bucket_that_is_busy_for_a_moment_is_asked_again(proxy, bucket, answer, quickly):
    run = paths.resolve(f"{bucket}/run")
    for what in (
        lambda: prepare_workdir(run),
        lambda: paths.put(run / "lock.json", b"one"),
        lambda: paths.get(run / "lock.json"),
        lambda: (run / "config.json").write_text("{}"),
        lambda: (run / "config.json").read_text(),
        lambda: list(run.iterdir()),
    ):
        proxy.answer, proxy.refused = first(2, answer), 0
        what()
        assert proxy.refused == 2
    assert paths.get(run / "lock.json")[0] == b"one"


def test_an_answer_that_was_lost_is_not_taken_for_another_writer(proxy, bucket, quickly):
    file = paths.resolve(f"{bucket}/lock.json")
    made = paths.put(file, b"one")
    # The write arrives, and its answer does not: asked again, the store says that the file is another one now.
    seen = []

    def lose(method, path):
        if method in ("POST", "PUT") and not seen:
            seen.append(path)
            request = urllib.request.Request(
                f"{proxy.upstream}/upload/storage/v1/b/{bucket[5:]}/o?uploadType=media&name=lock.json", b"two"
            )
            urllib.request.urlopen(request).close()
            return "reset"
        return None

    proxy.answer = lose
    version = paths.put(file, b"two", made)
    assert seen and version is not None and paths.get(file) == (b"two", version)


@pytest.mark.parametrize("answer, kind", [(503, RunError), ("reset", RunError), (403, ValueError), (401, ValueError)])
def test_a_workdir_in_a_bucket_that_stays_so_is_one_line(proxy, bucket, answer, kind, impatient):
    proxy.answer = lambda method, path: answer
    with pytest.raises(kind) as error:
        prepare_workdir(f"{bucket}/run")
    said = {
        RunError: f"workdir='{bucket}/run': {bucket} does not answer, also when asked again for half a minute (",
        ValueError: f"workdir='{bucket}/run': no access to {bucket} (",
    }
    fixes = {
        RunError: "run the same command again later, or see whe",
        ValueError: "roles/storage.objectUser and roles/",
    }
    assert str(error.value).startswith(said[kind]) and fixes[kind] in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "said",
    [
        "Cannot connect to host storage.googleapis.com:443 ssl:default [Name or service not known]",
        "HTTPSConnectionPool(host='storage.googleapis.com', port=443): Max retries exceeded with url: /token "
        "(Caused by NameResolutionError(\"x: Failed to resolve 'storage.googleapis.com' ([Errno -3] Temporary failure "
        'in name resolution)"))',
    ],
)
def test_a_machine_without_a_network_is_told_which_address_it_could_not_resolve(said):
    with pytest.raises(paths.StoreError, match=r"does not answer.* \(could not resolve storage.googleapis.com\); run"):
        with paths.reported(paths.resolve("gs://bucket/run")):
            raise OSError(said)


def test_a_bucket_that_may_be_read_and_not_written_to_is_refused_before_any_work(proxy, bucket):
    proxy.answer = lambda method, path: 403 if method == "POST" else None
    with pytest.raises(ValueError, match=rf"^workdir='{bucket}/run': no access to {bucket} \(made up 403\); give this"):
        prepare_workdir(f"{bucket}/run")


@pytest.mark.parametrize("answer, code", [(503, 1), (403, 2)])
def test_the_command_line_says_so_in_one_line_and_only_a_busy_bucket_is_worth_another_start(
    proxy, bucket, answer, code, impatient, capsys
):
    proxy.answer = lambda method, path: answer
    arguments = ["train", "--config=configs/bert.py:tiny", f"--workdir={bucket}/run"]
    assert main(arguments) == code
    said = capsys.readouterr().err.strip()
    assert f"workdir='{bucket}/run': " in said and bucket in said and "\n" not in said


@pytest.mark.parametrize("answer, kind", [(503, UnreachableError), (403, DataError)])
def test_text_in_a_bucket_that_cannot_be_read_is_one_line(proxy, bucket, answer, kind, impatient):
    proxy.answer = lambda method, path: answer
    with pytest.raises(kind, match=rf"^data.name='{bucket}/text': .*{bucket} .*made up {answer}") as error:
        open_source(DataConfig(name=f"{bucket}/text"), "train")
    assert type(error.value) is kind and "\n" not in str(error.value)
