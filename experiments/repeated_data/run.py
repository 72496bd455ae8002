"""Trains the sweep, reads the validation curves, measures the test split, and writes results, plot and verdicts.

    python -m experiments.repeated_data.run --workdir=runs/repeated_data
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import cards
from experiments.repeated_data.config import OBJECTIVES, get_config, sweep
from maskformer import data
from maskformer.training import runs
from maskformer.training.sweeps import apply

# Nats per token, about one part in a hundred of the loss: a smaller difference would be of no use to anyone.
MARGIN = 0.05
# "Few" epochs: the evaluation that comes closest.
FEW_EPOCHS = 12
# Maskings of each test row in the diffusion bound.
SAMPLES = 8


def main(argv: Sequence[str] | None = None) -> None:
    arms = {
        folder(name, overrides["seed"]): apply(get_config(name), overrides)
        for overrides in sweep()
        for name in OBJECTIVES
    }
    cards.main("repeated_data", arms, evaluate, write, argv)


def folder(objective: str, seed: int) -> str:
    """Where a run lies, below the folder of all."""
    return cards.arm_name({"objective": objective, "seed": seed})


def evaluate(workdir: pathlib.Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Validation curves [seed, objective, evaluation], and test nats per token of the best and the last checkpoint."""
    curves: list[list[list[float]]] = []
    best, last, error = (np.zeros((len(seeds), len(OBJECTIVES))) for _ in range(3))
    steps: list[int] = []
    epochs: list[float] = []
    for s, seed in enumerate(seeds):
        curves.append([])
        for o, name in enumerate(OBJECTIVES):
            steps, losses = curve(workdir / folder(name, seed))
            curves[-1].append(losses)
            for checkpoint, values in (("best", best), ("latest", last)):
                run = runs.load(workdir / folder(name, seed), checkpoint=checkpoint)
                if name == "diffusion":
                    bound = run.measure("nll_bound", samples=SAMPLES)
                    values[s, o] = bound["nll_bound"]
                    error[s, o] = max(error[s, o], bound["nll_bound_stderr"])
                else:
                    values[s, o] = run.measure("loss")["loss"]
            rows = len(data.load_dataset(run.experiment.data, "train", run.tokenizer))
            epochs = [step * run.experiment.train.batch_size / rows for step in steps]
    return {
        "objectives": list(OBJECTIVES),
        "axes": "seed, objective, evaluation (validation) or seed, objective (test); nats per token",
        "steps": steps,
        "epochs": epochs,
        "validation": curves,
        "test_best": best.tolist(),
        "test_last": last.tolist(),
        "test_standard_error": error.tolist(),
    }


def curve(run: pathlib.Path) -> tuple[list[int], list[float]]:
    """Steps and validation losses of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # A run that was interrupted may have written a step twice; the later line is the one it went on from.
    losses = {line["step"]: line["validation/loss"] for line in lines if "validation/loss" in line}
    return sorted(losses), [losses[step] for step in sorted(losses)]


def claims(results: dict[str, Any]) -> list[cards.Claim]:
    """The card's claims with their effects per seed."""
    causal, diffusion = (results["objectives"].index(name) for name in ("causal_lm", "diffusion"))
    curves, best, last = (np.array(results[name]) for name in ("validation", "test_best", "test_last"))
    few = int(np.argmin(np.abs(np.array(results["epochs"]) - FEW_EPOCHS)))
    risen = curves[:, :, -1] - curves.min(axis=2)
    first, total = results["epochs"][few], results["epochs"][-1]

    def claim(statement: str, effects: np.ndarray, threshold: float) -> cards.Claim:
        return cards.Claim(statement, effects.tolist(), threshold, "nats")

    return [
        claim(
            f"after {first:.0f} epochs the causal model is better (validation: bound - exact)",
            curves[:, diffusion, few] - curves[:, causal, few], MARGIN,
        ),
        claim(
            f"by {total:.0f} epochs the causal model's validation loss has turned up (last - lowest)",
            risen[:, causal], MARGIN,
        ),
        claim(
            f"by {total:.0f} epochs the diffusion model's has not (lowest - last)",
            -risen[:, diffusion], -MARGIN,
        ),
        claim(
            f"after {total:.0f} epochs diffusion is better (test: exact - bound)",
            last[:, causal] - last[:, diffusion], MARGIN,
        ),
        claim(
            "diffusion overtakes: its best checkpoint is better than the causal model's best (test: exact - bound)",
            best[:, causal] - best[:, diffusion], MARGIN,
        ),
    ]


def write(results: dict[str, Any], output: pathlib.Path) -> None:
    (output / "results.md").write_text(f"{table(results)}\n\n{cards.claims_table(claims(results))}\n")
    draw(results, output / "results.png")


def table(results: dict[str, Any]) -> str:
    """Where each objective's curve is lowest, and the test loss there and at the end."""
    curves, best, last = (np.array(results[name]) for name in ("validation", "test_best", "test_last"))
    epochs = np.array(results["epochs"])
    lines = [
        "| objective | epochs at the lowest validation loss (by seed) | test nats/token, best checkpoint "
        f"| test nats/token, after {epochs[-1]:.0f} epochs |",
        "|---|---|---|---|",
    ]
    for o, name in enumerate(results["objectives"]):
        sign = "<= " if name == "diffusion" else ""
        lowest = sorted(epochs[curves[:, o].argmin(axis=1)])
        lines.append(
            f"| {name} | {', '.join(f'{epoch:.0f}' for epoch in lowest)} "
            f"| {sign}{best[:, o].mean():.3f} {cards.spread(best[:, o])} "
            f"| {sign}{last[:, o].mean():.3f} {cards.spread(last[:, o])} |"
        )
    errors = np.array(results["test_standard_error"])
    lines.append("")
    lines.append(f"Standard error of a bound from the sampling of masks: at most {errors.max():.3f}.")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves, epochs = np.array(results["validation"]), results["epochs"]
    labels = {"causal_lm": "causal (exact)", "diffusion": "diffusion (upper bound)"}
    figure, panel = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for o, name in enumerate(results["objectives"]):
        color = f"C{o}"
        panel.plot(epochs, curves[:, o].T, color=color, alpha=0.35, linewidth=0.8)
        panel.plot(epochs, curves[:, o].mean(0), color=color, linewidth=2, label=labels[name])
    lowest = curves.mean(0).min()
    panel.set_ylim(lowest - 0.15, lowest + 2.0)
    panel.set_xscale("log")
    panel.set_xlabel("epochs over the same rows")
    panel.set_ylabel("validation nats per token")
    panel.legend()
    panel.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
