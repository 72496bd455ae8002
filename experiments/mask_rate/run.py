"""Trains the sweep, evaluates every model at every rate, and writes results, plot and verdicts.

    python -m experiments.mask_rate.run --workdir=runs/mask_rate
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import cards
from experiments.mask_rate.config import RATES, get_config, sweep
from maskformer.training import runs

RATE_MARGIN = 0.05  # nats; one part in a hundred of the loss
CHANCE_MARGIN = 0.25  # of the unigram baseline's accuracy


def main(argv: Sequence[str] | None = None) -> None:
    cards.main("mask_rate", cards.arms_of(get_config(), sweep()), evaluate, write, argv)


def evaluate(workdir: pathlib.Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Test loss and accuracy of every model at every evaluation rate: [seed, train rate, eval rate]."""
    shape = (len(seeds), len(RATES), len(RATES))
    loss, accuracy, unigram = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for s, seed in enumerate(seeds):
        for t, train_rate in enumerate(RATES):
            name = cards.arm_name({"seed": seed, "objective.rate": train_rate})
            run = runs.load(workdir / name, checkpoint="latest")
            for e, eval_rate in enumerate(RATES):
                metrics = run.measure("loss", rate=eval_rate)
                loss[s, t, e], accuracy[s, t, e] = metrics["loss"], metrics["accuracy"]
                unigram[s, t, e] = metrics["unigram_accuracy"]
    return {
        "rates": list(RATES),
        "axes": "seed, train rate, evaluation rate",
        "loss": loss.tolist(),
        "accuracy": accuracy.tolist(),
        "unigram_accuracy": unigram.tolist(),
    }


def claims(results: dict[str, Any]) -> list[cards.Claim]:
    """The card's claims with their effects per seed."""
    loss, accuracy = np.array(results["loss"]), np.array(results["accuracy"])
    unigram = np.array(results["unigram_accuracy"])
    own = np.stack([loss[:, i, i] for i in range(len(RATES))], axis=1)  # [seed, rate]
    return [
        cards.Claim(
            "perplexity at a model's own rate rises with the rate (smallest rise between neighbours, in the log)",
            np.diff(own, axis=1).min(axis=1).tolist(), 0.0, "nats",
        ),
        cards.Claim(
            f"evaluated at 15%, training at 40% is not worse than at 15% by more than {RATE_MARGIN} nats",
            (loss[:, 0, 0] - loss[:, 1, 0]).tolist(), -RATE_MARGIN, "nats",
        ),
        cards.Claim(
            f"evaluated at 15%, training at 80% is above the unigram accuracy by more than {CHANCE_MARGIN:.0%} of it",
            (accuracy[:, 2, 0] / unigram[:, 2, 0] - 1).tolist(), CHANCE_MARGIN, "of it",
        ),
    ]


def write(results: dict[str, Any], output: pathlib.Path) -> None:
    (output / "results.md").write_text(f"{matrix(results)}\n\n{cards.claims_table(claims(results))}\n")
    draw(results, output / "results.png")


def matrix(results: dict[str, Any]) -> str:
    """Train rate x evaluation rate: perplexity and accuracy, mean and standard deviation over seeds."""
    loss, accuracy = np.array(results["loss"]), np.array(results["accuracy"])
    lines = [
        "| trained at | " + " | ".join(f"evaluated at {rate:.0%}" for rate in results["rates"]) + " |",
        "|---" * (len(results["rates"]) + 1) + "|",
    ]
    for t, rate in enumerate(results["rates"]):
        cells = [
            f"ppl {math.exp(loss[:, t, e].mean()):.1f} (loss {cards.spread(loss[:, t, e])}), "
            f"accuracy {accuracy[:, t, e].mean():.1%}"
            for e in range(len(results["rates"]))
        ]
        lines.append(f"| {rate:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    loss, accuracy = np.array(results["loss"]), np.array(results["accuracy"])
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    positions = range(len(results["rates"]))
    for values, label, panel in ((loss, "test loss (nats)", axes[0]), (accuracy, "test accuracy", axes[1])):
        for e, rate in enumerate(results["rates"]):
            panel.errorbar(
                positions, values[:, :, e].mean(0), values[:, :, e].std(0), marker="o", capsize=3,
                label=f"evaluated at {rate:.0%}",
            )
        panel.set_xticks(positions, [f"{rate:.0%}" for rate in results["rates"]])
        panel.set_xlabel("masking rate in training")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
