"""Measures by name: what one may declare, and what is said of one that may not."""

from typing import Annotated, Literal

import pytest

from maskformer.evaluation import measures
from maskformer.evaluation.measures import Help


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """What a test registers, another must not see."""
    before = dict(measures.MEASURES)
    yield
    measures.MEASURES.clear()
    measures.MEASURES.update(before)


def test_the_types_defaults_and_help_of_a_function_are_its_options():
    @measures.builder(shows=("{a:.1f} a", "{b:.0%} of b"))
    def mine(
        run,
        split,
        *,
        kind: Annotated[Literal["x", "y"], "which"] = "x",
        share: Annotated[float | None, Help("of it", each=True)] = None,
        deep: Annotated[bool, "further"] = False,
        table: dict | None = None,
    ):
        """What is mine."""
        return {"kind": kind, "share": share}

    measure = measures.get("mine")
    assert measure.summary == "What is mine."
    options = measure.options
    assert (options["kind"].kind, options["kind"].choices, options["kind"].default) == (str, ("x", "y"), "x")
    assert (options["share"].kind, options["share"].argument) == (float, "shares")
    assert options["deep"].kind is bool and options["table"].kind is None and options["table"].help is None
    assert measure(None, "test", share=1) == {"kind": "x", "share": 1}  # an int is a float too
    columns = measure.columns(kind="y", shares=[0.5, 1.0])
    assert list(columns) == ["share 0.5", "share 1"] and columns["share 1"](None, "test") == {"kind": "y", "share": 1.0}
    assert list(measure.columns(shares=[])) == list(measure.columns()) == ["mine"]
    assert measure.say({"a": 1.25}) == "1.2 a" and measure.say({"a": 0.0, "b": 0.5}) == "0.0 a, 50% of b"
    for wrong, said in (
        ({"kind": "z"}, "kind='z': expected one of x, y"),
        ({"kind": None}, "kind=None: expected one of x, y"),
        ({"share": "much"}, "share='much': expected a float"),
        ({"share": True}, "share=True: expected a float"),
        ({"deep": 1}, "deep=1: expected a bool"),
        ({"shares": [0.5]}, "measure 'mine' has no option 'shares'"),
    ):
        with pytest.raises(ValueError, match=said):
            measure(None, "test", **wrong)
    with pytest.raises(ValueError, match="share='much': expected a float"):
        measure.columns(shares=[0.5, "much"])


def test_a_cell_of_a_measure_that_names_no_phrase_has_all_results():
    @measures.builder()
    def plain(run, split):
        """Plain."""
        return {}

    assert measures.get("plain").say({"a": 1.0, "b": 2.0}) == "a 1.0000, b 2.0000"


def nll(run, split):
    """A name that is taken."""


def positional(run, split, every=1):
    """An option that a flag could not name."""


def untyped(run, split, *, every: Annotated[list, "of them"] = ()):
    """No flag can give a list."""


def without(run, split, *, every: Annotated[int, "of them"]):
    """No default."""


def another_type(run, split, *, samples: Annotated[float, "as a share"] = 0.5):
    """`--samples` is an int in nll_bound."""


@pytest.mark.parametrize(
    "function, said",
    [
        (nll, "measure 'nll' is there already"),
        (positional, "measure 'positional': expected a function .run, split, ., options"),
        (untyped, "measure 'untyped': option 'every': expected a default, and the type"),
        (without, "measure 'without': option 'every': expected a default"),
        (another_type, "its option 'samples' is of another type than that of 'nll_bound'"),
    ],
)
def test_what_cannot_be_a_measure_is_one_line(function, said):
    with pytest.raises(ValueError, match=said) as raised:
        measures.builder()(function)
    assert "\n" not in str(raised.value)
