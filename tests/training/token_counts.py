"""A recipe with a task of its own: how many tokens does a row hold? Nothing of maskformer knows of it."""

import jax.numpy as jnp

from maskformer import models
from maskformer.models import DetectionHead
from maskformer.training import tasks
from tests.training import tiny


class TokenCounts(tasks.Task):
    """One number for each row, read off its first position, under a squared error; `seen` is the rows so far."""

    def __init__(self, objective, config, scale):
        super().__init__(objective, models.Model(config, head=DetectionHead))
        self.scale = scale

    def _errors(self, params, batch, key=None):
        first = jnp.zeros((batch["tokens"].shape[0], 1), jnp.int32)
        answers = self.model.apply(
            params,
            batch["tokens"],
            positions=batch["positions"],
            predict_positions=first,
            segment_ids=batch["segment_ids"],
            dropout_key=key,
        )
        counts = jnp.sum(batch["segment_ids"] > 0, axis=1)
        return (answers[:, 0] - counts / self.scale) ** 2

    def sums(self, params, example, key):
        errors = self._errors(params, example, key)
        return tasks.Sums({"loss": jnp.sum(errors)}, {}, carry=jnp.int32(len(errors)))

    def evaluate(self, params, example):
        real = (example["example_id"] >= 0).astype(jnp.float32)
        errors = self._errors(params, example)
        return {"loss": jnp.stack([jnp.sum(errors * real), jnp.sum(real)])}

    def initial_state(self):
        return {"seen": jnp.int32(0)}

    def update(self, state, carry):
        return {"seen": state["seen"] + carry}


@tasks.builder()
def token_counts(objective, config, *, scale=32.0):
    return TokenCounts(objective, config, scale)


def get_config(corpus):
    config = tiny.tiny_config(corpus, data__pack=False)
    with config.unlocked():
        config.task = {"name": "token_counts", "scale": 16.0}
    return config
