import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.manifest import to_yaml

# What some YAML takes for a number, a truth, nothing, a date, a comment, a tag, a list, or the end of something.
TRAPS = ["y", "No", "on", "null", "~", "1e3", "0x1f", "012", "1:30", "=", "<<", ".inf", "2026-01-01", "- a", "a: b",
         "a #b", "|-", "*", "&a", "!a", "a:", ":a", "", " a", "a ", "---", "a\nb", "a\n  b\n\nc", "\n", "a\n", "  a\nb",
         "a\n ", "\u2028", "\x85", "\ufeff", "a\n\x85b", "\x7f", "\\", '"', "\U0001f600", "a\tb", "a\r\nb"]  # fmt: skip
TEXT = st.text() | st.sampled_from(TRAPS)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.dictionaries(TEXT, VALUE, min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_yaml_reader_gives_back_what_was_written(documents):
    assert list(yaml.safe_load_all(to_yaml(documents))) == documents


@pytest.mark.parametrize("text", TRAPS)
def test_text_that_yaml_could_take_for_something_else_stays_text(text):
    assert yaml.safe_load(to_yaml([{"a": text, "b": [text], text: "c"}])) == {"a": text, "b": [text], text: "c"}


def test_a_script_is_shown_line_by_line():
    assert to_yaml([{"command": ["sh", "export A=1\nexec \"$@\""]}]) == (
        'command:\n- sh\n- |-\n  export A=1\n  exec "$@"\n'
    )


def test_text_that_is_not_unicode_is_refused():
    word = b"caf\xe9".decode("utf-8", "surrogateescape")
    with pytest.raises(ValueError, match="expected text in UTF-8, which is all that Kubernetes takes"):
        to_yaml([{"command": [word]}])
