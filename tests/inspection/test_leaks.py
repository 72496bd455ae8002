"""The leak checker passes every objective as it is, and catches each of the faults that people make."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskformer import inspection, masks, models, objectives
from maskformer.inspection import leaks, reachability
from maskformer.objectives import with_attend
from maskformer.objectives.rows import Reads, Side
from tests.objectives.examples import make_batch, make_vocabulary

LENGTH = 16
VOCABULARY = make_vocabulary(size=80, sentinels=12)


def packed_batch(batch_size=2, length=LENGTH):
    """Rows of two documents and some padding."""
    batch = make_batch(batch_size, length, lengths=np.full(batch_size, length - 2), size=80 - 8)
    batch["segment_ids"][:, length // 2 : length - 2] = 2
    batch["positions"][:, length // 2 : length - 2] -= length // 2
    return batch


def attention_model(width=12, layers=2, seed=0):
    """`apply(inputs, corrupted, mask)` of a small transformer written here, apart from the package's own."""
    keys = jax.random.split(jax.random.key(seed), 3 * layers + 2)
    table = jax.random.normal(keys[0], (VOCABULARY.size, width))
    place = jax.random.normal(keys[1], (LENGTH * 2, width))
    weights = [jax.random.normal(k, (width, width)) / width**0.5 for k in keys[2:]]

    def embed(tokens):
        return table[tokens] + place[: tokens.shape[1]]

    def apply(inputs, corrupted, mask, late=False):
        x = embed(inputs) if inputs.ndim == 2 else inputs
        length = x.shape[1]
        allowed = jnp.broadcast_to(mask.dense(length, length), (x.shape[0], length, length))
        if late:
            allowed = jnp.concatenate([allowed[:, 1:], allowed[:, -1:]], axis=1)
        for layer in range(layers):
            q, k, v = (x @ w for w in weights[3 * layer : 3 * layer + 3])
            scores = jnp.where(allowed, q @ k.swapaxes(1, 2) / width**0.5, -1e30)
            x = x + jnp.where(allowed.any(-1, keepdims=True), jax.nn.softmax(scores) @ v, 0.0)
        return x

    return apply, embed


def encoder(**changes):
    return models.create(
        models.EncoderConfig(vocab_size=VOCABULARY.size, layers=2, width=16, heads=2, max_length=LENGTH, **changes)
    )


def leaks_of(objective, batch=None, **kwargs):
    return inspection.check_leaks(objective, packed_batch() if batch is None else batch, **kwargs)


ALL = [
    ("mlm", {"compat": "roberta", "whole_word": True}), ("mlm", {"rate": 0.2, "predict_rate": 0.4}),
    ("causal_lm", {"shift": "right"}), ("fim", {}), ("span_corruption", {"layout": "prefix"}), ("electra", {}),
    ("ul2", {"denoisers": [("R", 3, 0.15), ("S", None, 0.25), ("X", 3, 0.5)]}), ("denoising", {}),
    ("mixture", {"parts": [{"name": "mlm"}, {"name": "causal_lm"}, {"name": "diffusion"}, {"name": "prefix_lm"}]}),
]


@pytest.mark.parametrize(("name", "params"), ALL, ids=lambda x: x if isinstance(x, str) else str(sorted(x)))
def test_every_objective_declares_masks_that_hide_its_answers(name, params):
    report = leaks_of(objectives.create(name, VOCABULARY, LENGTH, **params))
    assert report.ok, str(report)
    assert report.predictions > 0


def test_an_encoder_under_the_mlm_mask_responds_to_nothing_else():
    objective = objectives.create("mlm", VOCABULARY, LENGTH)
    report = leaks_of(objective, model=encoder(), rows=1)
    assert report.ok, str(report)
    assert report.influences == LENGTH**2
    assert report.responsive == 1.0


# --- the six faults ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Unshifted(type(objectives.create("causal_lm", VOCABULARY, LENGTH))):
    def row(self, key, row, rate, token_weights):
        made = super().row(key, row, rate, token_weights)
        return dataclasses.replace(made, target_tokens=row.tokens, loss_weights=row.valid.astype(jnp.float32))


def swap_parts():
    def weight(*values):
        return {"schedule": "step", "values": dict(zip(("0", "500"), values))}

    return [
        {"name": "mlm", "weight": weight(1.0, 0.0)},
        {"name": "causal_lm", "weight": weight(0.0, 1.0)},
        {"name": "diffusion", "weight": 0.0},
    ]


def test_a_part_of_a_mixture_that_only_later_steps_follow_is_checked_too():
    swap = objectives.create("mixture", VOCABULARY, LENGTH, parts=swap_parts())
    report = inspection.check_leaks(swap, packed_batch(), step=0)
    assert report.ok and report.parts == ("mlm", "causal_lm") and report.rows == 4
    assert "2 rows of each part, mlm and causal_lm: " in str(report)
    # At step 0 no row follows the second part.
    late = Unshifted("unshifted", VOCABULARY, LENGTH, LENGTH)
    broken = dataclasses.replace(swap, parts=(swap.parts[0], late, swap.parts[2]))
    report = inspection.check_leaks(broken, packed_batch(), step=0)
    assert not report.ok and all(leak.message.startswith("part 'unshifted'") for leak in report.leaks)


def test_a_missing_shift_is_caught():
    report = leaks_of(Unshifted("unshifted", VOCABULARY, LENGTH, LENGTH))
    leak = report.leaks[0]
    assert (leak.kind, leak.query, leak.key) == ("target", 1, 1)
    assert "position 1 is token 1 of the row, which stands there in the input" in str(report)


def test_labels_left_in_the_input_are_caught():
    unmasked = dataclasses.replace(
        objectives.create("mlm", VOCABULARY, LENGTH),
        replace=lambda key, tokens, selection: (tokens, jnp.zeros(tokens.shape, jnp.int8)),
    )
    report = leaks_of(unmasked)
    assert not report.ok and report.leaks[0].kind == "target"


def test_packing_without_segments_is_caught():
    causal = objectives.create("causal_lm", VOCABULARY, LENGTH)
    report = leaks_of(with_attend(causal, lambda corrupted: masks.causal()))
    leak = next(leak for leak in report.leaks if leak.kind == "segment")
    assert (leak.query, leak.key) == (LENGTH // 2, 0)
    assert str(leak.path[-1]) == f"layer 1: position {LENGTH // 2} reads position 0 by causal"
    assert leaks_of(with_attend(causal, lambda corrupted: masks.causal()), cross_segments=True).ok


def test_the_precedence_of_and_over_or_is_caught_and_named():
    """`causal & window | sinks` lets early queries see the future through the sinks."""
    causal = objectives.create("causal_lm", VOCABULARY, LENGTH)

    def wrong(corrupted):
        return masks.segments(corrupted.segment_ids) & (
            masks.causal() & masks.sliding_window(4) | masks.sinks(3)
        )

    def right(corrupted):
        return masks.segments(corrupted.segment_ids) & masks.causal() & (masks.sliding_window(4) | masks.sinks(3))

    report = leaks_of(with_attend(causal, wrong))
    leak = report.leaks[0]
    assert leak.kind == "target" and leak.query < leak.key <= 2
    assert any("sinks(3)" in hop.term for hop in leak.path)
    assert leaks_of(with_attend(causal, right)).ok


def test_a_prefix_that_covers_targets_is_caught():
    @dataclasses.dataclass(frozen=True, eq=False)
    class Covering(type(objectives.create("prefix_lm", VOCABULARY, LENGTH))):
        def row(self, key, row, rate, token_weights):
            made = super().row(key, row, rate, token_weights)
            return dataclasses.replace(made, loss_weights=(made.target_tokens > 0).astype(jnp.float32))

    report = leaks_of(Covering("covering", VOCABULARY, LENGTH, LENGTH), rows=2)
    leak = next(leak for leak in report.leaks if leak.kind == "target")
    assert leak.key == leak.query + 1


@pytest.mark.parametrize("by", ["exchange", "jacobian"])
def test_a_cache_that_is_off_by_one_is_caught(by):
    """The model's queries stand one place too late, so each one sees the key after it."""
    apply, embed = attention_model()
    causal = objectives.create("causal_lm", VOCABULARY, LENGTH)
    batch = make_batch(1, LENGTH, size=72)
    kwargs = {"embed": embed} if by == "jacobian" else {}
    report = leaks_of(causal, batch, apply=lambda x, c, mask: apply(x, c, mask, late=True), rows=1, **kwargs)
    leak = report.leaks[0]
    assert (leak.kind, leak.query, leak.key) == ("influence", 0, 1)
    assert "causal keeps from it" in leak.message
    assert leaks_of(causal, batch, apply=apply, rows=1, **kwargs).ok


# --- its parts --------------------------------------------------------------------------------------------------------


def test_influence_of_an_unmasked_model_is_everywhere_and_equals_the_jacobian():
    apply, embed = attention_model()
    objective = with_attend(objectives.create("mlm", VOCABULARY, LENGTH), lambda c: masks.everything())
    one = jax.tree.map(lambda x: x[:1], objective(jax.random.key(0), make_batch(1, LENGTH, size=72)))
    exchange = leaks.influence_by_exchange(lambda t, c: apply(t, c, masks.everything()), one, VOCABULARY)
    jacobian = leaks.influence_by_jacobian(lambda x: apply(x, one, masks.everything()), embed(one.input_tokens))
    assert exchange.all() and jacobian.all()


def test_reach_is_the_closure_of_the_masks_layer_by_layer():
    window = masks.sliding_window(1)
    row = Side("row", np.zeros((1, 8), int), np.ones((1, 8), int))
    stack = reachability.stack_of([row], [(Reads(0, 0, window),)] * 3, 0)
    reached = stack.reach()
    q, k = np.arange(8)[:, None], np.arange(8)[None]
    for layers in range(4):
        assert (reached[layers] == ((k <= q) & (q - k <= layers))).all()
    hops = stack.path(5, 3)
    assert [(hop.layer, hop.query, hop.key) for hop in hops][-1][2] == "position 3"
    assert len(hops) == 2


def test_a_masks_path_through_two_layers_is_reported_hop_by_hop():
    """Neither layer alone shows the answer; both together do."""
    causal = objectives.create("causal_lm", VOCABULARY, LENGTH)
    batch = make_batch(1, LENGTH, size=72)
    first = masks.causal() | masks.predicate(lambda q, k: (q == 0) & (k == 5))
    report = leaks_of(causal, batch, layer_masks=lambda corrupted: (first, masks.causal()), rows=1)
    leak = report.leaks[0]
    assert leak.kind == "target" and leak.key == 5
    assert leak.path[-1].layer == 1 and leak.path[-1].query == "position 0"


def test_a_pair_objective_is_refused_a_single_stack_model():
    apply, _ = attention_model()
    pair = objectives.create("span_corruption", VOCABULARY, LENGTH)
    for given in ({"apply": apply}, {"model": encoder()}):
        with pytest.raises(ValueError, match="layout='prefix'"):
            leaks_of(pair, **given)


def test_a_decoder_that_reads_its_own_target_is_caught_although_denoising_copies_its_input():
    denoising = objectives.create("denoising", VOCABULARY, LENGTH)

    def ahead(corrupted):
        declared = denoising.attend(corrupted)
        return dataclasses.replace(declared, decoder=masks.segments(corrupted.decoder_segment_ids))

    report = leaks_of(with_attend(denoising, ahead))
    assert not report.ok
    assert "decoder" in report.leaks[0].message


def test_raise_if_leaking_says_what_leaks():
    causal = objectives.create("causal_lm", VOCABULARY, LENGTH)
    report = leaks_of(with_attend(causal, lambda corrupted: masks.everything()))
    with pytest.raises(ValueError, match="objective 'causal_lm' leaks"):
        report.raise_if_leaking()
    leaks_of(causal).raise_if_leaking()


def test_text_that_already_holds_the_mask_or_a_sentinel_is_refused():
    batch = packed_batch()
    batch["tokens"][1, 3] = VOCABULARY.sentinels[0]
    with pytest.raises(ValueError, match=r"holds 1 tokens with id 79, which vocabulary.sentinels reserves"):
        leaks_of(objectives.create("mlm", VOCABULARY, LENGTH), batch)
    batch["tokens"][1, 3] = 200
    with pytest.raises(ValueError, match="holds token 200, outside the vocabulary of 80"):
        leaks_of(objectives.create("mlm", VOCABULARY, LENGTH), batch)
