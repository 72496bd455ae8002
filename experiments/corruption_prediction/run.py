"""Trains the sweep, evaluates every model under the same masks, and writes results, plot and verdicts.

    python -m experiments.corruption_prediction.run --workdir=runs/corruption_prediction
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import cards
from experiments.corruption_prediction.config import ARMS, get_config, sweep
from maskformer.training import runs

# Nats of test loss, about half a percent of it: a smaller difference would be of no use to anyone.
MARGIN = 0.02
EVALUATION_RATES = (0.15, 0.4)


def main(argv: Sequence[str] | None = None) -> None:
    cards.main("corruption_prediction", cards.arms_of(get_config(), sweep()), evaluate, write, argv)


def evaluate(workdir: pathlib.Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Test loss and accuracy: [seed, arm, evaluation rate]."""
    shape = (len(seeds), len(ARMS), len(EVALUATION_RATES))
    loss, accuracy = np.zeros(shape), np.zeros(shape)
    for s, seed in enumerate(seeds):
        for a, (corrupt, predict) in enumerate(ARMS):
            overrides = {"seed": seed, "objective.rate": corrupt, "objective.predict_rate": predict}
            run = runs.load(workdir / cards.arm_name(overrides), checkpoint="latest")
            for e, rate in enumerate(EVALUATION_RATES):
                metrics = run.measure("loss", rate=rate)
                loss[s, a, e], accuracy[s, a, e] = metrics["loss"], metrics["accuracy"]
    return {
        "arms": [list(arm) for arm in ARMS],
        "evaluation_rates": list(EVALUATION_RATES),
        "axes": "seed, arm (corrupt, predict), evaluation rate",
        "loss": loss.tolist(),
        "accuracy": accuracy.tolist(),
    }


def claims(results: dict[str, Any]) -> list[cards.Claim]:
    """The card's claims with their effects per seed: how far the second arm's loss lies above the first one's."""
    loss = np.array(results["loss"])
    arms = [tuple(arm) for arm in results["arms"]]

    def gain(better: tuple[float, float], worse: tuple[float, float], rate: float = 0.15) -> list[float]:
        e = results["evaluation_rates"].index(rate)
        return (loss[:, arms.index(worse), e] - loss[:, arms.index(better), e]).tolist()

    def claim(statement: str, effects: list[float]) -> cards.Claim:
        return cards.Claim(statement, effects, MARGIN, "nats")

    return [
        claim("more predictions help, 40% corrupted: predicting 40% is better than 20%", gain((0.4, 0.4), (0.4, 0.2))),
        claim("more predictions help, 20% corrupted: predicting 40% is better than 20%", gain((0.2, 0.4), (0.2, 0.2))),
        claim("more corruption hurts, 40% predicted: corrupting 20% is better than 40%", gain((0.2, 0.4), (0.4, 0.4))),
        claim("the same, evaluated at 40%, the rate of the more corrupted arm", gain((0.2, 0.4), (0.4, 0.4), 0.4)),
        claim("more corruption hurts, 20% predicted: corrupting 20% is better than 40%", gain((0.2, 0.2), (0.4, 0.2))),
        claim("predictions outweigh corruption: 40/40 is better than 20/20", gain((0.4, 0.4), (0.2, 0.2))),
    ]


def write(results: dict[str, Any], output: pathlib.Path) -> None:
    (output / "results.md").write_text(f"{table(results)}\n\n{cards.claims_table(claims(results))}\n")
    draw(results, output / "results.png")


def table(results: dict[str, Any]) -> str:
    """Perplexity and accuracy of each arm at each evaluation rate: mean and standard deviation over seeds."""
    loss, accuracy = np.array(results["loss"]), np.array(results["accuracy"])
    rates = results["evaluation_rates"]
    lines = [
        "| corrupt / predict | " + " | ".join(f"evaluated at {rate:.0%}" for rate in rates) + " |",
        "|---" * (len(rates) + 1) + "|",
    ]
    for a, (corrupt, predict) in enumerate(results["arms"]):
        cells = [
            f"loss {loss[:, a, e].mean():.3f} {cards.spread(loss[:, a, e])}, "
            f"ppl {math.exp(loss[:, a, e].mean()):.1f}, accuracy {accuracy[:, a, e].mean():.1%}"
            for e in range(len(rates))
        ]
        lines.append(f"| {corrupt:.0%} / {predict:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
    """Each seed a line through the arms, so that paired differences can be seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    loss = np.array(results["loss"])
    names = [f"{corrupt:.0%}/{predict:.0%}" for corrupt, predict in results["arms"]]
    figure, panels = pyplot.subplots(1, len(results["evaluation_rates"]), figsize=(10, 4), layout="constrained")
    for e, (rate, panel) in enumerate(zip(results["evaluation_rates"], panels)):
        panel.plot(names, loss[:, :, e].T, color="tab:gray", alpha=0.6, marker=".", linewidth=0.8)
        panel.plot(names, loss[:, :, e].mean(0), color="tab:blue", marker="o", linewidth=0, markersize=8)
        panel.set_title(f"evaluated at {rate:.0%}")
        panel.set_xlabel("corrupted / predicted in training")
        panel.set_ylabel("test loss (nats)")
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
