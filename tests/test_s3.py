"""Amazon's store, as moto plays it: text, caches, files of lines and conditional writes. Checkpoints are refused."""

import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest

from launch.local import free_port
from maskformer import paths
from maskformer.data import DataConfig, cache, load_dataset, load_tokenizer
from maskformer.training import lines
from maskformer.training.workdir import prepare_workdir
from tests.emulator import check_known_files
from tests.training.tiny import write_corpus


@pytest.fixture(scope="module")
def s3():
    for package in ("s3fs", "moto", "flask"):
        pytest.importorskip(package)
    import s3fs

    port = free_port()
    source = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    server = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{variables['AWS_ENDPOINT_URL']}/moto-api/", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, "moto does not start"
                time.sleep(0.1)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            s3fs.S3FileSystem().mkdir("bucket")
            yield "s3://bucket"
    finally:
        server.kill()
        server.wait()


def test_a_file_is_written_only_where_it_is_the_one_that_is_known(s3):
    check_known_files(s3)


def test_files_of_lines_are_kept_in_parts(s3):
    path = paths.resolve(f"{s3}/run/metrics.jsonl")
    file = lines.LineFile(path)
    for step in (1, 2, 3):
        file.write({"step": step})
        file.flush()
    lines.rewrite(path, lines.read_lines(path)[:2])
    assert lines.read_lines(path) == [{"step": 1}, {"step": 2}]
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.00001.jsonl"]


def test_text_and_the_cache_may_be_there(s3, tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "text")
    for file in corpus.rglob("*.txt"):
        (paths.resolve(f"{s3}/text") / file.relative_to(corpus).as_posix()).write_bytes(file.read_bytes())
    made = []
    for name in (str(corpus), f"{s3}/text"):
        for machine in ("one", "two"):
            monkeypatch.setenv("MASKFORMER_CACHE", f"{s3}/cache")
            monkeypatch.setenv("MASKFORMER_MIRROR", str(tmp_path / machine))
            cache._shared.cache_clear()
            config = DataConfig(name=name, vocabulary_size=200, length=32)
            made.append(next(load_dataset(config, "test", load_tokenizer(config)).eval_batches(8)))
    cache._shared.cache_clear()
    for batch in made[1:]:
        np.testing.assert_array_equal(batch["tokens"], made[0]["tokens"])


def test_a_workdir_there_is_refused_before_anything_is_written(s3):
    with pytest.raises(
        ValueError, match=r"^workdir='s3://bucket/x': checkpoints are kept in gs:// or on a file system"
    ):
        prepare_workdir(f"{s3}/x")
    assert not paths.resolve(f"{s3}/x").exists()


def test_a_bucket_that_is_not_there_is_one_line(s3):
    with pytest.raises(OSError, match=r"there is no bucket s3://nobody; mend its name, or make it: aws s3 mb s3://no"):
        paths.check_store(paths.resolve("s3://nobody/x"))
