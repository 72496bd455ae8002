"""Masking rate at a scale for two CPU cores: the demo's BERT, 700 steps of 2,048 tokens, about a minute a run.

    python -m experiments.mask_rate.card
"""

import math

import numpy as np

from configs import bert
from experiments.card import Card, Claim, arm_table, panels, spread

RATES = {"15%": 0.15, "40%": 0.4, "80%": 0.8}
RATE_MARGIN = 0.05  # nats; one part in a hundred of the loss
CHANCE_MARGIN = 0.25  # of the unigram baseline's accuracy


def get_config(arg=None):
    config = bert.get_config("demo")
    config.train.steps, config.train.log_every = 700, 50
    config.evaluation.every = config.checkpoint.every = 350
    config.evaluation.objective = {"rate": 0.15}
    # 80/10/10, not the paper's all-[MASK], which at this budget stays on the unigram plateau (see the README).
    config.objective.replacement = (0.8, 0.1, 0.1)
    return config


def measure(run):
    """Every model at every rate."""
    at = {name: run.measure("loss", rate=rate) for name, rate in RATES.items()}
    return {
        f"{key} at {name}": metrics[key]
        for key in ("loss", "accuracy", "unigram_accuracy")
        for name, metrics in at.items()
    }


def claims(results):
    own = np.stack([results[f"loss at {rate}", rate] for rate in RATES], axis=1)  # [seed, rate]
    above_chance = results["accuracy at 15%", "80%"] / results["unigram_accuracy at 15%", "80%"] - 1
    return [
        Claim(
            "perplexity at a model's own rate rises with the rate (smallest rise between neighbours, in the log)",
            np.diff(own, axis=1).min(axis=1), 0.0, "nats",
        ),
        Claim(
            f"evaluated at 15%, training at 40% is not worse than at 15% by more than {RATE_MARGIN} nats",
            results.difference("loss at 15%", "15%", "40%"), -RATE_MARGIN, "nats",
        ),
        Claim(
            f"evaluated at 15%, training at 80% is above the unigram accuracy by more than {CHANCE_MARGIN:.0%} of it",
            above_chance, CHANCE_MARGIN, "of it",
        ),
    ]


def table(results):
    def evaluated_at(rate):
        def cell(arm):
            loss, accuracy = results[f"loss at {rate}", arm], results[f"accuracy at {rate}", arm]
            return f"ppl {math.exp(loss.mean()):.1f} (loss {spread(loss)}), accuracy {accuracy.mean():.1%}"

        return cell

    return arm_table(results, "trained at", {f"evaluated at {rate}": evaluated_at(rate) for rate in RATES})


def plot(results, figure):
    for panel, name in zip(panels(figure, 2), ("loss", "accuracy")):
        for rate in RATES:
            values = results.array(f"{name} at {rate}")
            panel.errorbar(list(RATES), values.mean(0), values.std(0), marker="o", label=f"evaluated at {rate}")
        panel.set(xlabel="masking rate in training", ylabel=f"test {name}" + (" (nats)" if name == "loss" else ""))
    figure.axes[0].legend()


CARD = Card(
    __file__, config=get_config, arms={name: {"objective.rate": rate} for name, rate in RATES.items()},
    measure=measure, claims=claims, table=table, plot=plot,
)
sweep = CARD.sweep

if __name__ == "__main__":
    CARD.main()
