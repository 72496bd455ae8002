"""What a training step minimises: one or more terms, each a sum over rows with a denominator known beforehand."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maskformer.models import ElectraModel, Model
from maskformer.objectives import Corrupted, Electra, Objective, token_cross_entropy, token_loss_sums

Batch = dict[str, jax.Array]
Pair = tuple[jax.Array, jax.Array]  # a sum and its weight


class LossSums(NamedTuple):
    """Sums over the rows of a batch or of a part of it; those of parts add up to those of the whole.

    Attributes:
      terms: the sum of each term of the loss.
      means: what is recorded beside them.
      token_losses: (sum of losses, number) of every token, [vocabulary]; None unless the objective adapts to them.
    """

    terms: dict[str, jax.Array]
    means: dict[str, Pair]
    token_losses: Pair | None


def predict(
    model: Model | ElectraModel,
    objective: Objective,
    params: Any,
    corrupted: Corrupted,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Logits at the positions that the objective predicts; without a dropout key, deterministic."""
    return model.apply(
        params,
        corrupted.input_tokens,
        positions=corrupted.positions,
        mask=objective.attend(corrupted),
        predict_positions=corrupted.predict_positions,
        segment_ids=corrupted.segment_ids,
        dropout_key=dropout_key,
    )


class TokenLoss:
    """The cross-entropy of predicted tokens: one network, one term.

    Attributes:
      factors: of each term's mean in what is minimised.
    """

    def __init__(self, model: Model | ElectraModel, objective: Objective, label_smoothing: float):
        self.model, self.objective, self.label_smoothing = model, objective, label_smoothing
        self.factors = {"loss": 1.0}

    def weights(self, corrupted: Corrupted) -> dict[str, jax.Array]:
        """The denominator of each term, from the corrupted batch alone."""
        return {"loss": self.objective.weight_sum(corrupted)}

    def sums(self, params: Any, batch: Batch, corrupted: Corrupted, dropout_key: jax.Array) -> LossSums:
        """The sums of the rows `batch`, corrupted as `corrupted`."""
        return self.of_logits(predict(self.model, self.objective, params, corrupted, dropout_key), corrupted)

    def of_logits(self, logits: jax.Array, corrupted: Corrupted) -> LossSums:
        """The sums of logits [batch, predicted, vocabulary]."""
        targets, weights = corrupted.target_tokens, corrupted.loss_weights
        loss_sum, _ = self.objective.loss(logits, corrupted, self.label_smoothing)
        # The loss needs the largest logit anyway; comparing with it is far cheaper than an argmax.
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        correct = target_logits >= jnp.max(logits, axis=-1)
        token_losses = None
        if self.objective.token_loss_decay is not None:
            used = weights > 0
            losses = jax.lax.stop_gradient(token_cross_entropy(logits, targets, used))
            token_losses = token_loss_sums(targets, losses, used, logits.shape[-1])
        return LossSums({"loss": loss_sum}, {"accuracy": (jnp.sum(correct * weights), jnp.sum(weights))}, token_losses)


class ElectraLoss:
    """The generator's cross-entropy, and the discriminator's on the generator's samples (Clark et al. 2020, section 2).

    Args:
      key: the key that the batch was corrupted with; the samples come from it too.
    """

    def __init__(self, model: ElectraModel, objective: Electra, key: jax.Array, label_smoothing: float):
        self.model, self.objective, self.key = model, objective, key
        self.generator = TokenLoss(model, objective, label_smoothing)
        self.factors = {"loss": 1.0, "discriminator_loss": objective.discriminator_weight}

    def weights(self, corrupted: Corrupted) -> dict[str, jax.Array]:
        """As in `TokenLoss`."""
        asked = jnp.sum(self.objective.questions(corrupted))
        return {**self.generator.weights(corrupted), "discriminator_loss": asked}

    def sums(self, params: Any, batch: Batch, corrupted: Corrupted, dropout_key: jax.Array) -> LossSums:
        """As in `TokenLoss`."""
        generator_key, discriminator_key = jax.random.split(dropout_key)
        logits = predict(self.model, self.objective, params, corrupted, generator_key)
        terms, means, _ = self.generator.of_logits(logits, corrupted)
        detection = detection_sums(
            self.model, self.objective, self.key, params, batch, corrupted, logits, discriminator_key
        )
        discriminator_loss, _ = detection.pop("discriminator_loss")
        return LossSums({**terms, "discriminator_loss": discriminator_loss}, {**means, **detection}, None)


def detection_sums(
    model: ElectraModel,
    objective: Electra,
    key: jax.Array,
    params: Any,
    batch: Batch,
    corrupted: Corrupted,
    logits: jax.Array,
    dropout_key: jax.Array | None = None,
) -> dict[str, Pair]:
    """Sums and weights of the discriminator's loss and of how well it finds the generator's samples.

    A token counts as found where its logit is above 0. `replaced` is the share of the tokens asked about that differ
    from the text: what always answering "original" gets wrong.

    Args:
      key: the key that the batch was corrupted with.
      logits: the generator's, [batch, predicted, vocabulary]; no gradient flows into them from here.
    """
    asked = objective.discriminate(objective.row_keys(key, batch), batch["tokens"], corrupted, logits)
    answers = model.discriminate(
        params,
        asked.input_tokens,
        positions=corrupted.positions,
        mask=objective.attend(corrupted),
        segment_ids=corrupted.segment_ids,
        dropout_key=dropout_key,
    )
    loss_sum, tokens = objective.discriminator_loss(answers, asked)
    replaced = asked.labels * asked.loss_weights
    said = (answers > 0) * asked.loss_weights
    found, told = jnp.sum(said * replaced), jnp.sum(said)
    return {
        "discriminator_loss": (loss_sum, tokens),
        "discriminator_accuracy": (tokens - told - jnp.sum(replaced) + 2 * found, tokens),
        "discriminator_precision": (found, told),
        "discriminator_recall": (found, jnp.sum(replaced)),
        "replaced": (jnp.sum(replaced), tokens),
    }


def create_loss(
    model: Model | ElectraModel, objective: Objective, key: jax.Array, label_smoothing: float = 0.0
) -> TokenLoss | ElectraLoss:
    """The loss of `model` under `objective`.

    Args:
      key: the run's masking key.
      label_smoothing: of the predicted tokens.
    """
    if isinstance(objective, Electra):
        if not isinstance(model, ElectraModel):
            raise ValueError("objective 'electra' trains two networks: make the model from a models.ElectraConfig")
        return ElectraLoss(model, objective, key, label_smoothing)
    return TokenLoss(model, objective, label_smoothing)


def mean_names(objective: Objective) -> tuple[str, ...]:
    """The means that training under `objective` records."""
    names = ("loss", "accuracy", "grad_norm")
    if isinstance(objective, Electra):
        detection = ("loss", "accuracy", "precision", "recall")
        names += ("joint_loss", *(f"discriminator_{name}" for name in detection), "replaced")
    return names
