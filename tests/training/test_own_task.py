"""A task that only a recipe knows is trained as ours are: sharded, accumulated, evaluated, resumed to the bit."""

import orbax.checkpoint as ocp
import pytest

from maskformer import evaluation
from maskformer.training import resolve, runs, tasks, train_and_evaluate
from maskformer.training.sweeps import apply
from tests.training import token_counts
from tests.training.tiny import metric_lines


def config_of(corpus, **overrides):
    settings = {"optimizer.learning_rate": 3e-3, "model.hidden_dropout": 0.0, "model.attention_dropout": 0.0}
    overrides = {key.replace("__", "."): value for key, value in overrides.items()}
    return apply(token_counts.get_config(corpus), settings | overrides)


@pytest.fixture(scope="module")
def reference(corpus, first_device, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("token_counts")
    with first_device():
        results = train_and_evaluate(config_of(corpus), workdir)
    return metric_lines(workdir), results, workdir


def rows_seen(workdir, step):
    with ocp.PyTreeCheckpointer() as arrays:
        return int(arrays.restore(workdir / "checkpoints" / str(step) / "state")["task"]["seen"])


def test_a_recipes_own_task_learns_and_its_state_is_kept(reference):
    lines, results, workdir = reference
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < losses[0] and set(results) == {"loss"}
    assert rows_seen(workdir, 12) == 12 * 8
    assert lines[-2]["train/tokens_predicted"] == 12 * 8


def test_its_numbers_are_the_same_sharded_and_in_parts(reference, corpus, devices, tmp_path):
    devices(8)
    mesh = dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2, train__accumulation_steps=2)
    train_and_evaluate(config_of(corpus, **mesh), tmp_path)
    for line, other in zip(metric_lines(tmp_path), reference[0], strict=True):
        assert line.keys() == other.keys()
        for name in line:
            assert line[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), (line["step"], name)
    assert rows_seen(tmp_path, 12) == 12 * 8


def test_it_resumes_to_the_same_bits(reference, corpus, devices, tmp_path):
    for steps in (6, 12):  # both runs log and evaluate at step 6
        train_and_evaluate(config_of(corpus, train__steps=steps), tmp_path)
    assert metric_lines(tmp_path) == reference[0]
    assert rows_seen(tmp_path, 12) == 12 * 8


@pytest.mark.parametrize(
    "section, setting, message",
    [
        ({"name": "token_count"}, {}, "task.name='token_count': expected one of .*; did you mean 'token_counts'"),
        ({"name": "token_counts", "scal": 1.0}, {}, "task.scal: task 'token_counts' has no such parameter; .*'scale'"),
        (
            {"name": "token_counts"}, {"train.label_smoothing": 0.1},
            "train.label_smoothing=0.1: task 'token_counts' does not take it; set it to 0",
        ),
        ({"name": "electra"}, {}, "trains two networks"),
    ],
)
def test_a_task_that_cannot_be_is_one_line(corpus, section, setting, message):
    config = apply(token_counts.get_config(corpus), setting)
    with config.unlocked():
        config.task = section
    with pytest.raises(ValueError, match=message):
        resolve(config)


def test_the_name_of_one_of_ours_is_taken():
    def tokens(objective, config):
        return None

    with pytest.raises(ValueError, match="task 'tokens' is there already"):
        tasks.builder()(tokens)
    assert tasks.BUILDERS["tokens"] is tasks.Tokens


@pytest.mark.parametrize(
    "broken, message",
    [
        (dict(evaluate=tasks.Task.evaluate), "task.name='token_counts': TokenCounts does not define evaluate"),
        (dict(sums=tasks.Task.sums), "task.name='token_counts': TokenCounts does not define sums"),
        (dict(weights=lambda self, example: {"los": 1.0}), r"weights\(\) has los; expected those of factors: loss"),
        (dict(means=("accuracy",)), r"sums\(\).means has none; expected those of means: accuracy"),
    ],
)
def test_a_task_that_lacks_a_part_is_refused_before_a_step(corpus, monkeypatch, broken, message):
    for name, part in broken.items():
        monkeypatch.setattr(token_counts.TokenCounts, name, part)
    with pytest.raises(ValueError, match=message):
        resolve(token_counts.get_config(corpus))


def test_a_run_whose_model_predicts_no_tokens_says_so(reference, devices):
    run = runs.load(reference[2])
    assert run.measure("loss")["loss"] > 0
    for measure in ("nll", "nll_bound", "pseudo_perplexity"):
        with pytest.raises(ValueError, match=f"{measure}: .* predicts no tokens"):
            run.measure(measure)
    with pytest.raises(ValueError, match="fill: .* predicts no tokens"):
        evaluation.fill_text(run, "the [MASK]")
