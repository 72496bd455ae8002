"""Runs side by side: any folder's name, damaged files, and a picture that cannot be written."""

import json
import os
import re
import warnings

import pytest

from maskformer import cli, paths, report


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(name="run", config=None, extra=b""):
        folder = tmp_path / name
        folder.mkdir()
        config = config if config is not None else {"seed": 0, "evaluation": {"split": "test"}}
        (folder / "config.json").write_text(json.dumps(config))
        lines = [json.dumps({"step": step, "train/loss": 2.0 / step, "test/loss": 3.0 / step}) for step in (1, 2)]
        (folder / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\n" + extra)
        return name

    return make


NAMES = (r"$\badmath$", "$", "_hidden", "two\nlines", "\x1b[31mred", os.fsdecode(b"\xff\xfe"), "a|b", "größe")


def test_folders_of_any_name_have_their_rows_and_their_curves(make_run, tmp_path):
    runs = [make_run(name) for name in NAMES]
    lines = report.table(runs).splitlines()
    assert len(lines) == 2 + len(NAMES) and all("1.5000" in line for line in lines[2:])
    assert all(line.isprintable() for line in lines)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.draw_curves(runs, tmp_path / "report.svg")
    # Letters become shapes in the picture, and the comment before them is the text.
    text = (tmp_path / "report.svg").read_text()
    for label in (r"$\badmath$", "$", "./_hidden", r"two\nlines", r"\x1b[31mred", r"\xff\xfe", "a|b"):
        assert f"<!-- {label} -->" in text


def test_folders_without_a_run_are_left_out_beside_others_with_a_warning(make_run, tmp_path, capsys):
    (tmp_path / "000").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert cli.main(["report", "000", make_run("001"), "notes.txt"]) == 0
    out, err = capsys.readouterr()
    assert "| 001 |" in out and "curves: 001/report.png" in out and "| 000 |" not in out
    assert err.splitlines() == [
        f"warning: workdir '{name}': no run there, or none that has begun; left out" for name in ("000", "notes.txt")
    ]
    assert cli.main(["report", "000", "notes.txt"]) == 2
    assert capsys.readouterr().err.startswith("error: workdir '000': no config.json there; expected the folder of a")


def test_the_folder_of_a_sweep_is_refused_with_what_shows_its_runs(make_run, tmp_path, capsys):
    make_run("001")
    for flags in ([], ["--goodput"]):
        (tmp_path / "001" / "events.jsonl").write_text("")
        assert cli.main(["report", str(tmp_path), *flags]) == 2
        assert capsys.readouterr().err == (
            f"error: workdir '{tmp_path}': the folder of a sweep, expected its runs: `maskformer report {tmp_path}/*`, "
            f"or `maskformer sweep --workdir={tmp_path} --status`\n"
        )


def test_the_picture_of_a_run_in_a_bucket_is_named_by_its_address(make_run, tmp_path, bucket, capsys):
    for file in (tmp_path / make_run()).iterdir():
        paths.resolve(f"{bucket}/sweep/000/{file.name}").write_bytes(file.read_bytes())
    assert cli.main(["report", f"{bucket}/sweep/000"]) == 0
    assert f"curves: {bucket}/sweep/000/report.png\n" in capsys.readouterr().out
    assert cli.main(["report", f"{bucket}/sweep"]) == 2
    assert f"`maskformer report {bucket}/sweep/000 ...`, or" in capsys.readouterr().err


def write_metrics(run, *lines):
    with open(f"{run}/metrics.jsonl", "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def labels(picture):
    """The words of an SVG, which are the comments before its letters' shapes."""
    return re.findall("<!-- (.*?) -->", picture.read_text())


def test_the_metrics_of_a_task_of_ones_own_have_their_columns_and_panels(make_run, tmp_path):
    tokens, own = make_run("tokens"), make_run("own")
    write_metrics(
        own,
        {"step": 1, "train/mse": 3.0, "train/grad_norm": 1.0, "train/mfu": 0.5, "test/mse": 2.5, "test/r2": 0.125},
        {"step": 2, "train/mse": 1.0, "train/joint": 9.0, "test/mse": 1.5},
        {"step": 3, "train/mse": 0.5, "train/learning_rate": 0.1},
    )
    header, _, *rows = report.table([tokens, own]).splitlines()
    assert header.split() == "| run | step | tokens | loss | mse | r2 |".split()
    assert [row.split() for row in rows] == [
        "| tokens | 2 | 0 | 1.5000 | - | - |".split(), "| own | 3 | 0 | - | 1.5000 | - |".split()
    ]
    report.draw_curves([tokens, own], tmp_path / "report.svg")
    kinds = ("training", "held-out", "learning")
    assert [label for label in labels(tmp_path / "report.svg") if label.startswith(kinds)] == [
        "training loss (nats)", "held-out loss (nats)", "learning rate", "training mse", "held-out mse", "held-out r2",
        "training joint",
    ]
    header, *_ = report.table([own]).splitlines()
    assert header.split() == "| run | step | tokens | mse | r2 |".split(), "no column that no run has"


def test_the_discriminator_stands_beside_its_generator_and_details_of_known_metrics_are_left_out(make_run, tmp_path):
    run = make_run()
    names = "replaced discriminator_loss accuracy_mask loss_keep unigram_loss predicted accuracy loss".split()
    write_metrics(run, {"step": 1, "train/tokens_seen": 5} | {f"test/{name}": 0.5 for name in names})
    header, _, row = report.table([run]).splitlines()
    assert header.split() == "| run | step | tokens | loss | accuracy | replaced | discriminator_loss |".split()
    assert row.split() == "| run | 1 | 5 | 0.5000 | 50.00% | 0.5000 | 0.5000 |".split()
    report.draw_curves([run], tmp_path / "report.svg")
    assert [label for label in labels(tmp_path / "report.svg") if "held-out" in label] == [
        "held-out loss (nats)", "held-out accuracy", "held-out replaced", "held-out discriminator_loss"
    ]


def test_runs_that_have_said_nothing_yet_are_shown_empty(make_run, tmp_path):
    run = make_run()
    write_metrics(run)
    assert report.table([run]).splitlines()[2].split() == "| run | 0 | 0 |".split()
    report.draw_curves([run], tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000


DAMAGE = (b"\xff\xfe\n", b"\0" * 100 + b"\n", b"[1]\n", b"7\n", b'{"step": 2, "tr\n', b"{}\n")


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_metrics_are_reported_and_the_rest_is_shown(make_run, damage, caplog):
    run = make_run(extra=damage + json.dumps({"step": 3, "test/loss": 1.0}).encode() + b"\n")
    row = report.table([run]).splitlines()[2]
    assert "1.0000" in row and "metrics.jsonl: damaged at line 3" in caplog.text


@pytest.mark.parametrize("text", ["", "garbage", "[1]", "7", "{}", '{"evaluation": 3}'])
def test_a_damaged_config_is_one_line_that_names_the_file(make_run, text):
    run = make_run()
    with open(f"{run}/config.json", "w") as file:
        file.write(text)
    for use in (report.table, lambda runs: report.draw_curves(runs, "report.png")):
        with pytest.raises(ValueError, match="run/config.json: ") as error:
            use([run])
        assert "\n" not in str(error.value)


def test_a_folder_without_metrics_is_no_run(make_run, tmp_path):
    run = make_run()
    (tmp_path / run / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="workdir 'run': no metrics.jsonl there; expected the folder of a run"):
        report.table([run])


@pytest.mark.parametrize("output", ["no/such/folder/report.png", "run", "/dev/full"])
def test_a_picture_that_cannot_be_written_is_one_line(make_run, output):
    run = make_run()
    with pytest.raises(ValueError) as error:
        report.draw_curves([run], output)
    assert output in str(error.value) and "\n" not in str(error.value)


def test_a_run_in_a_folder_that_is_not_utf_8_is_reported_by_the_command(make_run, capsys):
    run = make_run(os.fsdecode(b"\xff\xfe"))
    assert cli.main(["report", run]) == 0
    out = capsys.readouterr().out
    out.encode()
    assert r"curves: \xff\xfe/report.png" in out
