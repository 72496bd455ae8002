"""Masks as text, both ways."""

import functools
import operator
import re
import warnings

import hypothesis
import numpy as np
import pytest
from hypothesis import given, settings

from maskformer import masks
from maskformer.checks import shown
from tests.masks import oracle


@pytest.mark.parametrize(
    "text, mask",
    [
        ("causal", masks.causal()),
        ("causal()", masks.causal()),
        ("full", masks.everything()),
        (" causal&window( 256 ) ", masks.causal() & masks.sliding_window(256)),
        ("window(left=3, right=2)", masks.sliding_window(3, 2)),
        ("causal & window(2) | sinks(1)", (masks.causal() & masks.sliding_window(2)) | masks.sinks(1)),
        ("causal & (window(2) | sinks(1))", masks.causal() & (masks.sliding_window(2) | masks.sinks(1))),
        ("~causal & strided(3)", ~masks.causal() & masks.strided(3)),
        ("~(causal | strided(3))", ~(masks.causal() | masks.strided(3))),
        ("per_head(causal, sinks(1) | full)", masks.per_head([masks.causal(), masks.sinks(1) | masks.everything()])),
        ("per_head([causal, window(1)])", masks.per_head([masks.causal(), masks.sliding_window(1)])),
        ("natten((4, 6), (3, 5), dilation=1)", masks.neighborhood((4, 6), (3, 5))),
        ("block_diagonal((2, 3), align='end', right=0)", masks.block_diagonal((2, 3), align="end", right=0)),
        ("shift(causal, q_offset=-2)", masks.shift(masks.causal(), -2)),
    ],
)
def test_text_means_what_the_builders_mean(text, mask):
    assert masks.parse(text) == mask


@pytest.mark.parametrize(
    "text, message",
    [
        ("causal & windw(4)", "unknown mask 'windw' at column 9; did you mean 'window'?"),
        ("causal & window(lft=4)", "no argument 'lft' at column 16; did you mean 'left'?"),
        ("causal & window(4", "expected ',', found the end at column 17"),
        ("causal & window(4))", "unexpected ')' at column 18"),
        ("causal &", "expected a mask, found the end at column 8"),
        ("", "expected a mask, found the end at column 0"),
        ("causal and window(4)", "masks combine with & | ~, not 'and' at column 7"),
        ("not causal", "masks combine with & | ~, not 'not' at column 0"),
        ("causal + window(4)", "unexpected character '+' at column 7"),
        ("window", "missing a required argument: 'left' at column 0"),
        ("window(1, 2, 3)", "too many positional arguments at column 0"),
        ("window(right=1, 2)", "an argument without a name follows a named one at column 16"),
        ("window(-3)", "window: left=-3, expected an int of at least 0 at column 0"),
        ("window(left=1, left=2)", "'left' is given twice at column 15"),
        ("Causal & CHUNKED(2)", "unknown mask 'Causal' at column 0; did you mean 'causal'?"),
        ("window(big)", "'left' takes a value, not the name 'big' at column 0"),
        ("window(&)", "expected a number, a name or a tuple, found '&' at column 7"),
        ("window(٣)", "unexpected character '٣' at column 7"),
        ("window(1)\n&& causal", "expected a mask, found '&' at column 11"),
        ("per_head(" + "[" * 70, "nested more than 64 deep at column 72"),
        ("strided(" + "9" * 5000 + ")", "a number of 5000 digits; expected at most 1000 at column 8"),
    ],
)
def test_errors_point_at_the_column_and_the_nearest_name(text, message):
    with pytest.raises(masks.MaskSyntaxError) as error:
        masks.parse(text)
    assert message in str(error.value) and shown(text) in str(error.value)


def test_a_long_chain_costs_what_its_terms_cost():
    """Of 3,000 terms; a cost that grows with the cube of them would take hours."""
    windows = [masks.sliding_window(left) for left in range(3000)]
    text = " | ".join(f"sliding_window({left})" for left in range(3000))
    union = masks.parse(text)
    assert union == masks.Or(tuple(windows)) and repr(union) == text
    assert masks.parse(text.replace("|", "&")) == masks.And(tuple(windows))
    few = windows[:300]
    assert functools.reduce(operator.and_, few).terms == tuple(few)
    assert functools.reduce(operator.or_, few + few).block_map(16, 16, 8).kinds().tolist() == [[[[1, 0], [2, 1]]]]


def test_inversions_cancel_however_many():
    assert masks.parse("~" * 100_001 + "causal") == ~masks.causal()
    assert ~~masks.causal() == masks.parse("~~causal") == masks.causal()


def test_parentheses_may_lie_in_each_other_to_some_depth():
    assert masks.parse("(" * 64 + "causal" + ")" * 64) == masks.causal()
    with pytest.raises(masks.MaskSyntaxError, match="nested more than 64 deep at column 64"):
        masks.parse("(" * 400 + "causal" + ")" * 400)


def test_a_value_as_long_as_a_file_is_shown_short():
    for run in ("-", "[", "~", "window"):
        with pytest.raises(masks.MaskSyntaxError) as error:
            masks.parse(f"window({run * 1000}) & causal")
        assert len(str(error.value)) < 320


def test_a_long_sequence_draws_its_random_blocks_at_once():
    mask = masks.parse("bigbird(10000000)")
    edges = np.asarray(mask.terms[-1].edges)
    assert len(edges) == 3 * (156_250 - 2) and np.abs(edges[:, 0] - edges[:, 1]).min() == 2
    with pytest.raises(ValueError, match="bigbird: length=2147483647 has .* expected at most 4194304 in all"):
        masks.parse("bigbird(2147483647)")


def test_an_array_the_text_does_not_name_is_refused():
    with pytest.raises(masks.MaskSyntaxError, match="did you mean 'segment_ids'"):
        masks.parse("segments", segmnt_ids=np.ones(3, int))


def test_names_stay_open_until_bound_and_say_so_when_used():
    mask = masks.parse("causal & segments & key_padding")
    assert mask.unbound == ("segment_ids", "valid")
    partly = mask.bind(segment_ids=np.array([1, 1, 2]))
    assert partly.unbound == ("valid",)
    for use in (lambda m: m.dense(3, 3), lambda m: m.block_map(3, 3, 1), lambda m: m(0, 0), lambda m: m.select(0, 0)):
        with pytest.raises(ValueError, match=r"needs 'valid': call mask\.bind\(valid=\.\.\.\) first"):
            use(partly)
    bound = partly.bind(valid=np.array([True, False, True]), something_else=3)
    assert bound.unbound == ()
    np.testing.assert_array_equal(bound.dense(3, 3), [[1, 0, 0], [1, 0, 0], [0, 0, 1]])


def test_an_open_mask_is_hashable_and_static():
    import jax

    first, second = masks.parse("causal & segments"), masks.parse("causal & segments(segment_ids)")
    assert first == second and hash(first) == hash(second) and jax.tree.leaves(first) == []


def test_names_of_arrays_can_be_chosen():
    ids = np.array([[1, 2, 2]])
    mask = masks.parse("segments(documents, sentences)", documents=ids, sentences=ids[:, ::-1])
    assert mask == masks.segments(ids, ids[:, ::-1])


def test_two_arrays_of_one_kind_print_under_two_names():
    a, b = np.array([1, 1, 2], np.int32), np.array([3, 3, 3], np.int32)
    mask = masks.segments(a) & masks.segments(b) & ~masks.segments(a)
    assert repr(mask) == "segments(segment_ids) & segments(segment_ids_2) & ~segments(segment_ids)"
    assert masks.parse(repr(mask), **mask.bindings()) == mask


def test_an_array_does_not_print_under_a_name_that_is_open():
    mask = masks.segments(np.array([1, 1, 2], np.int32)) & ~masks.parse("segments")
    assert repr(mask) == "segments(segment_ids_2) & ~segments(segment_ids)"
    assert masks.parse(repr(mask), **mask.bindings()) == mask


def only_first(q, k, table):
    return table[q] == k


def test_predicates_print_under_the_name_of_their_function():
    mask = masks.predicate(only_first, np.array([[2, 1, 0]]), batch_dims=1)
    assert repr(mask) == "predicate(only_first, array, batch_dims=1)"
    assert masks.parse(repr(mask), **mask.bindings()) == mask


@pytest.mark.parametrize("alias", ["causal", "window"])
def test_a_builder_of_ones_own_cannot_take_the_name_of_ours(alias):
    with pytest.raises(ValueError, match=f"'{alias}' is a mask of maskformer.masks already"):

        @masks.builder(alias)
        def one_of_my_own():
            return masks.everything()

    assert masks.parse("causal") == masks.causal()
    with pytest.raises(ValueError, match="'<lambda>' cannot be written"):
        masks.builder()(lambda: masks.everything())


def test_names_inside_a_mask_argument_are_open_until_they_are_bound_in_any_order():
    ids = np.array([1, 1, 2, 2, 1], np.int32)
    mask = masks.parse("shift(segments, q_offset=start)")
    assert set(mask.unbound) == {"segment_ids", "start"}
    expected = masks.shift(masks.segments(ids), 3)
    assert mask.bind(segment_ids=ids, start=3) == expected == masks.parse(str(mask), segment_ids=ids, start=3)
    assert mask.bind(segment_ids=ids).bind(start=3) == mask.bind(start=3).bind(segment_ids=ids) == expected
    traced = masks.shift(masks.segments(ids), np.array(3, np.int32), -2)
    assert masks.parse(repr(traced), **traced.bindings()) == traced
    with pytest.raises(ValueError, match="needs 'start', 'segment_ids'"):
        mask.dense(2, 2)


def test_a_name_that_another_file_took_is_warned_about(tmp_path):
    for number in (1, 2):
        (tmp_path / f"recipe_{number}.py").write_text(
            "from maskformer import masks\n\n@masks.builder()\ndef taken_twice():\n    return masks.causal()\n"
        )

    def read(number):
        path = tmp_path / f"recipe_{number}.py"
        exec(compile(path.read_text(), str(path), "exec"), {"__name__": "recipe"})

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(1)
        read(1)
    with pytest.warns(UserWarning, match=r"'taken_twice' of .*recipe_1.py now means that of .*recipe_2.py"):
        read(2)


def test_a_builder_of_ones_own_may_take_masks_and_arrays():
    @masks.builder(ids="segment_ids")
    def same_segment_of(mask: masks.Mask, ids):
        return mask & masks.segments(ids)

    ids = np.array([1, 1, 2], np.int32)
    for arguments in ("window(1) & key_padding", "mask=window(1) & key_padding, ids=segment_ids"):
        mask = masks.parse(f"same_segment_of({arguments})")
        assert set(mask.unbound) == {"segment_ids", "valid"}
        bound = mask.bind(segment_ids=ids, valid=ids > 0)
        np.testing.assert_array_equal(bound.dense(3, 3), [[1, 0, 0], [1, 1, 0], [0, 0, 1]])


def test_an_offset_that_is_an_array_has_a_name_in_the_text():
    mask = masks.shift(masks.causal(), np.array(2, np.int32), np.array(1, np.int32))
    assert repr(mask) == "shift(causal, q_offset, k_offset)"
    assert masks.parse(repr(mask), **mask.bindings()) == mask
    start = masks.parse("shift(causal, q_offset=start)")
    np.testing.assert_array_equal(start.bind(start=np.array(2)).dense(2, 4), masks.causal().dense(2, 4, q_offset=2))


@pytest.mark.parametrize(
    "decorate, message",
    [
        (lambda: masks.builder(lambda: masks.causal()), "with its parentheses"),
        (lambda: masks.builder("two words"), "'two words' cannot be written"),
        (lambda: masks.builder("not"), "'not' cannot be written"),
        (lambda: masks.builder(3), "3 cannot be written"),
        (lambda: masks.builder(idx="segment_ids")(of_ids), "of_ids has no parameter 'idx'; did you mean 'ids'?"),
        (lambda: masks.builder(ids="segment ids"), "'segment ids' cannot be written"),
    ],
)
def test_a_builder_that_no_text_could_call_is_refused(decorate, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        decorate()


def of_ids(ids):
    return masks.segments(ids)


leaves = hypothesis.strategies.one_of(oracle.leaves, oracle.slow_leaves)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck))
@given(oracle.expressions(3, leaves))
def test_every_mask_prints_to_text_that_parses_to_the_same_mask(pair):
    mask = pair.mask & masks.per_head([pair.mask, masks.causal()])
    assert masks.parse(repr(mask), **mask.bindings()) == mask
    assert masks.parse(repr(mask)).bind(**mask.bindings()) == mask
