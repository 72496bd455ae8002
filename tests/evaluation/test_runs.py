"""Evaluating a run in every way that is defined for it, and being told where one is not."""

import math

import pytest

from maskformer import evaluation
from maskformer.training import comparison, sharding


def test_the_likelihood_of_a_causal_run_is_its_loss_over_all_bytes_of_the_text(load, corpus):
    size = sum(file.stat().st_size for file in (corpus / "test").iterdir())
    run = load("causal_lm")
    exact, metrics = run.measure("nll"), run.measure("loss")
    assert exact["nll"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert exact["tokens"] == metrics["predicted"]
    # Every token of text is predicted, from [CLS] on.
    assert exact["bytes"] == pytest.approx(size, rel=1e-6)
    nats = exact["nll"] * exact["tokens"]
    assert exact["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    without = run.measure("nll", markers=False)
    assert without["tokens"] < exact["tokens"] and without["bytes"] == exact["bytes"]
    assert run.measure("nll", max_batches=1)["bytes"] < exact["bytes"]


@pytest.mark.parametrize(
    "name, measure",
    [
        ("mlm", lambda run: run.measure("pseudo_perplexity")),
        ("mlm", lambda run: run.measure("pseudo_perplexity", within_word_l2r=True, every=2)),
        ("diffusion", lambda run: run.measure("nll_bound", samples=2)),
        ("causal_lm", lambda run: run.measure("nll")),
        ("mlm", lambda run: run.measure("loss", objective="causal_lm")),
    ],
)
def test_one_and_eight_devices_agree(load, name, measure):
    one, eight = measure(load(name, 1)), measure(load(name, 8))
    assert one.keys() == eight.keys()
    for key in one:
        assert eight[key] == pytest.approx(one[key], rel=2e-5), key


def test_within_word_masking_hides_more_and_every_scores_fewer(load):
    run = load("mlm", data__vocabulary_size=60)  # words in pieces
    whole = run.measure("pseudo_perplexity")
    assert whole["scored"] == whole["tokens"]
    later = run.measure("pseudo_perplexity", within_word_l2r=True)
    assert later["scored"] == whole["scored"] and later["pseudo_nll"] != whole["pseudo_nll"]
    some = run.measure("pseudo_perplexity", every=4)
    assert some["tokens"] == whole["tokens"] and abs(some["scored"] - whole["scored"] / 4) < 8


def test_special_tokens_are_part_of_the_bound_where_training_hid_them(load):
    diffusion, masked = load("diffusion"), load("mlm")
    text = diffusion.measure("nll_bound", samples=2, markers=False)
    assert diffusion.measure("nll_bound", samples=2)["tokens"] > text["tokens"]
    assert masked.measure("nll_bound", samples=2)["tokens"] == text["tokens"]
    assert masked.measure("nll_bound", samples=2, markers=True)["tokens"] > text["tokens"]


@pytest.mark.parametrize(
    "name, objective",
    [("mlm", "causal_lm"), ("mlm", "prefix_lm"), ("mlm", "mdlm"), ("causal_lm", "roberta"), ("diffusion", "span_mlm")],
)
def test_a_run_is_evaluated_under_another_objective_with_its_own_attention(load, name, objective, monkeypatch):
    run = load(name)
    masks, apply = [], type(run.model).apply

    def spy(model, *arguments, mask, **rest):
        masks.append(str(mask))
        return apply(model, *arguments, mask=mask, **rest)

    monkeypatch.setattr(type(run.model), "apply", spy)
    results = run.measure("loss", objective=objective, max_batches=1)
    assert results["predicted"] > 0 and 0 < results["loss"] < 12
    assert masks and all(("causal" in mask) == (objective in ("causal_lm", "prefix_lm")) for mask in masks)


def test_the_config_may_name_another_objective_for_evaluation(load):
    run = load("mlm", evaluation__objective={"name": "causal_lm"})
    asked = load("mlm").measure("loss", objective="causal_lm", max_batches=1)
    assert run.measure("loss", max_batches=1) == asked
    # A change at the call comes on top of the config's, and another name starts afresh.
    assert run.measure("loss", changes={"shift": "right"}, max_batches=1)["predicted"] > asked["predicted"]
    assert "accuracy_mask" in run.measure("loss", objective="mlm", rate=0.3, max_batches=1)


@pytest.mark.parametrize(
    "measure, name, said",
    [
        (lambda run: run.measure("nll_bound"), "causal_lm", "nll_bound: this run's objective is 'causal_lm', whose"),
        (lambda run: run.measure("pseudo_perplexity"), "causal_lm", "pseudo_perplexity: .* never saw \\[MASK\\]"),
        (lambda run: run.measure("nll"), "mlm", "nll: .* never predicted the next token; use nll_bound"),
        (lambda run: run.measure("loss", objective="causal_lm", rate=0.1), "mlm", "no parameter 'rate'"),
        (
            lambda run: run.measure("loss", objective="span_corruption", changes={"layout": "prefix"}),
            "mlm",
            "needs . sentinels",
        ),
        (lambda run: run.measure("loss", objective="fim"), "mlm", "objective 'fim' needs prefix_token"),
        (lambda run: run.measure("loss", objective="masked_source"), "mlm", "encoder and a decoder"),
        (lambda run: run.measure("loss", "tst"), "mlm", "split 'tst'.*did you mean 'test'"),
        (lambda run: run.measure("nll_bound", samples=3), "mlm", "samples=3"),
        (lambda run: run.measure("pseudo_perplexity", every=0), "mlm", "every=0"),
        (lambda run: run.measure("nl_bound"), "mlm", "did you mean 'nll_bound'"),
        (lambda run: run.measure("nll", samples=2), "causal_lm", "measure 'nll' has no option 'samples'"),
        (lambda run: run.measure("nll_bound", sampels=2), "mlm", "no option 'sampels' .*did you mean 'samples'"),
        (lambda run: run.measure("nll_bound", samples="many"), "mlm", "samples='many': expected an int"),
        (lambda run: run.measure("nll_bound", estimator="tiem"), "mlm", "did you mean 'time'"),
    ],
)
def test_what_is_not_defined_is_one_line_with_the_reason(load, measure, name, said):
    with pytest.raises(ValueError, match=said) as raised:
        measure(load(name))
    assert "\n" not in str(raised.value)


def test_rows_longer_than_the_model_are_refused_before_they_run(load, monkeypatch):
    run = load("mlm")
    monkeypatch.setattr(type(run.experiment.create_objective(run.tokenizer.vocabulary)), "output_length", 40)
    with pytest.raises(ValueError, match="makes rows of 40 tokens, and the run's model was built for 32"):
        run.measure("loss")


def test_evaluation_attends_across_devices_by_the_method_of_the_run(load, monkeypatch):
    methods = []
    activations = sharding.activations

    def spy(mesh, rules, method="all_gather", **options):
        methods.append((method, mesh.shape["context"]))
        return activations(mesh, rules, method, **options)

    monkeypatch.setattr(sharding, "activations", spy)
    alone = load("causal_lm").measure("loss")
    ring = load("causal_lm", 1, mesh__context=2, mesh__context_method="ring")
    assert ring.measure("loss")["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert methods == [("all_gather", 1), ("ring", 2)]


def test_a_matrix_of_runs_and_rates_gives_each_cell_or_the_reason(load, monkeypatch):
    by_folder = {"a": load("mlm"), "b": load("causal_lm")}
    monkeypatch.setattr(comparison.runs, "load", lambda workdir, **_: by_folder[workdir])
    loss, bound = (evaluation.get_measure(name) for name in ("loss", "nll_bound"))
    columns = {**loss.columns(rates=[0.15, 0.5]), **bound.columns(samples=2)}
    compared = comparison.compare(["a", "b"], columns)
    masked = compared.cells["a"]
    assert masked["rate 0.15"] == by_folder["a"].measure("loss", rate=0.15)
    assert masked["rate 0.5"]["predicted"] > 2 * masked["rate 0.15"]["predicted"]
    lines = compared.table().splitlines()
    assert "nll <= " in lines[2] and "n/a [1] " in lines[3] and "n/a [3] " in lines[3]
    assert lines[4].startswith("[1] b, rate 0.15: config.objective: objective 'causal_lm' has no parameter 'rate'")
    with pytest.raises(ValueError, match="no parameter 'rate'"):
        comparison.compare(["b"], loss.columns(rates=[0.15]))
