"""Asking a model for words: what it costs, and who can be asked."""

import jax
import pytest

from maskformer import evaluation


def test_all_texts_of_a_run_are_one_compilation(load, monkeypatch):
    compiled = []

    def listen(event, _duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    run = load("mlm")
    evaluation.fill_text(run, "the [MASK]")  # what else there is to compile, such as random numbers
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        texts = ["the lady [MASK] the garden.", "[MASK]", "the [MASK] admired the [MASK]."]
        guesses = [evaluation.fill_text(run, text, top=2) for text in texts]
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert [len(of_text) for of_text in guesses] == [1, 1, 2] and not compiled
    assert guesses[0] != guesses[1]


def test_examples_are_passages_of_the_test_split_with_a_word_masked(load):
    run = load("mlm")
    texts = evaluation.example_texts(run, 4)
    assert texts and all("[MASK]" in text and "[CLS]" not in text for text in texts)
    assert texts == evaluation.example_texts(run, 4)


@pytest.mark.parametrize(
    "objective, options, text, said",
    [
        ("causal_lm", {}, "a [MASK]", "fill: this run's objective is 'causal_lm', which never saw"),
        ("mlm", {"objective__replacement": [0.0, 0.5, 0.5]}, "a [MASK]", "which never saw \\[MASK\\]"),
        ("mlm", {}, "no question", "the text has no \\[MASK\\]"),
        ("mlm", {}, "[MASK] lady" * 40, "tokens and the model reads 32; shorten it"),
    ],
)
def test_what_cannot_be_filled_is_one_line(load, objective, options, text, said):
    with pytest.raises(ValueError, match=said) as raised:
        evaluation.fill_text(load(objective, **options), text)
    assert "\n" not in str(raised.value)
