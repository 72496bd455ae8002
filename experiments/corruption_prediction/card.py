"""Corruption and prediction rates apart, for two CPU cores: the demo's BERT, 600 steps of 2,048 tokens a run.

    python -m experiments.corruption_prediction.card
"""

import functools
import math

from configs import bert
from experiments.card import Card, Claim, arm_table, default_plot, spread

# name -> (corruption rate, prediction rate)
ARMS = {f"{corrupt:.0%} / {predict:.0%}": (corrupt, predict)
        for corrupt, predict in ((0.4, 0.4), (0.4, 0.2), (0.2, 0.2), (0.2, 0.4))}  # fmt: skip
EVALUATED = {"15%": 0.15, "40%": 0.4}
# Nats of test loss, about half a percent of it: a smaller difference would be of no use to anyone.
MARGIN = 0.02


def get_config(arg=None):
    config = bert.get_config("demo")
    # A small vocabulary leaves the unigram plateau within the first hundred steps.
    config.data.vocabulary_size = 1024
    config.train.steps, config.train.log_every = 600, 50
    config.optimizer.warmup_steps = 60
    config.evaluation.every = config.checkpoint.every = 300
    # 80/10/10, not the paper's all-[MASK], which at this budget stays on the unigram plateau.
    config.objective.replacement = (0.8, 0.1, 0.1)
    # Every arm is measured under the same masks, all of them predicted.
    config.evaluation.objective = {"rate": 0.15, "predict_rate": None}
    return config


def measure(run):
    at = {name: run.measure("loss", rate=rate) for name, rate in EVALUATED.items()}
    return {f"{key} at {name}": metrics[key] for key in ("loss", "accuracy") for name, metrics in at.items()}


def claims(results):
    def better(statement, arm, other, at="15%"):
        """How far the other arm's loss lies above."""
        return Claim(statement, results.difference(f"loss at {at}", other, arm), MARGIN, "nats")

    more, hurts = "more predictions help", "more corruption hurts"
    return [
        better(f"{more}, 40% corrupted: predicting 40% is better than 20%", "40% / 40%", "40% / 20%"),
        better(f"{more}, 20% corrupted: predicting 40% is better than 20%", "20% / 40%", "20% / 20%"),
        better(f"{hurts}, 40% predicted: corrupting 20% is better than 40%", "20% / 40%", "40% / 40%"),
        better("the same, evaluated at 40%, the rate of the more corrupted arm", "20% / 40%", "40% / 40%", at="40%"),
        better(f"{hurts}, 20% predicted: corrupting 20% is better than 40%", "20% / 20%", "40% / 20%"),
        better("predictions outweigh corruption: 40/40 is better than 20/20", "40% / 40%", "20% / 20%"),
    ]


def table(results):
    def evaluated_at(rate):
        def cell(arm):
            loss, accuracy = results[f"loss at {rate}", arm], results[f"accuracy at {rate}", arm]
            mean = loss.mean()
            return f"loss {mean:.3f} {spread(loss)}, ppl {math.exp(mean):.1f}, accuracy {accuracy.mean():.1%}"

        return cell

    return arm_table(results, "corrupt / predict", {f"evaluated at {rate}": evaluated_at(rate) for rate in EVALUATED})


CARD = Card(
    __file__, config=get_config,
    arms={name: {"objective.rate": rates[0], "objective.predict_rate": rates[1]} for name, rates in ARMS.items()},
    measure=measure, claims=claims, table=table,
    plot=functools.partial(
        default_plot, xlabel="corrupted / predicted in training",
        labels={f"loss at {rate}": f"test loss (nats), evaluated at {rate}" for rate in EVALUATED},
    ),
)
sweep = CARD.sweep

if __name__ == "__main__":
    CARD.main()
