"""Causal modelling against masked diffusion on 8,192 tokens, 150 times over: about a minute a run on two CPU cores.

    python -m experiments.repeated_data.card
    maskformer train --config=experiments/repeated_data/card.py:diffusion --workdir=runs/repeated_diffusion

The argument names the objective, and nothing else depends on it.
"""

import numpy as np

from configs import bert
from experiments.card import Card, Claim, arm_table, curves_plot, spread
from maskformer.training import objectives_section, parse_arg

# Every token of a row is predicted by both: the causal model reads a start token first, diffusion hides any of them.
OBJECTIVES = {"causal_lm": {"shift": "right"}, "diffusion": {"compat": "llada", "sampling": "batch"}}
# Nats per token, about one part in a hundred of the loss: a smaller difference would be of no use to anyone.
MARGIN = 0.05
# "Few" epochs: the evaluation that comes closest.
FEW_EPOCHS = 12
# Maskings of each test row in the diffusion bound.
SAMPLES = 8


def get_config(arg=None):
    name, _ = parse_arg(arg, choices=tuple(OBJECTIVES), default="diffusion")
    config = bert.get_config("demo")
    config.objective = objectives_section(name, **OBJECTIVES[name])
    config.evaluation.objective = {}

    # Rows of text and nothing else, so that both likelihoods are of the same tokens.
    config.data.start_token = config.data.end_token = None
    config.data.length, config.data.vocabulary_size, config.data.max_rows = 32, 256, 256

    # A first layer that sees two tokens to each side, and a small learning rate, in both arms: without them the
    # diffusion model stays on the unigram plateau for all of these steps.
    config.model.mask = ("window(2, 2)", "everything")
    config.optimizer.learning_rate, config.optimizer.schedule = 1e-3, "constant"
    config.train.batch_size, config.train.steps, config.optimizer.warmup_steps = 32, 1200, 50
    config.train.log_every = 100

    # The curves are read off these evaluations, and the lowest one keeps its checkpoint.
    config.evaluation.every = config.checkpoint.every = 50
    config.evaluation.batch_size, config.evaluation.max_batches = 64, 16
    return config


def measure(run):
    """The validation curve over epochs, and test nats per token of the best and the last checkpoint."""
    steps, losses = run.curve("validation/loss")
    values = {"epochs": steps * run.config.train.batch_size / run.rows("train"), "validation": losses}
    errors = [0.0]
    for name, checkpoint in (("test_best", "best"), ("test_last", "latest")):
        if run.arm == "diffusion":
            bound = run.measure("nll_bound", checkpoint=checkpoint, samples=SAMPLES)
            values[name] = bound["nll_bound"]
            errors.append(bound["nll_bound_stderr"])
        else:
            values[name] = run.measure("loss", checkpoint=checkpoint)["loss"]
    return {**values, "test_standard_error": max(errors)}


def claims(results):
    epochs, validation = results["epochs", "causal_lm"][0], results.array("validation")
    few = int(np.argmin(np.abs(epochs - FEW_EPOCHS)))
    first, total = epochs[few], epochs[-1]
    risen = dict(zip(results.arms, (validation[:, :, -1] - validation.min(axis=2)).T))
    return [
        Claim(
            f"after {first:.0f} epochs the causal model is better (validation: bound - exact)",
            results.difference("validation", "diffusion", "causal_lm")[:, few], MARGIN, "nats",
        ),
        Claim(
            f"by {total:.0f} epochs the causal model's validation loss has turned up (last - lowest)",
            risen["causal_lm"], MARGIN, "nats",
        ),
        Claim(
            f"by {total:.0f} epochs the diffusion model's has not (lowest - last)", -risen["diffusion"], -MARGIN, "nats"
        ),
        Claim(
            f"after {total:.0f} epochs diffusion is better (test: exact - bound)",
            results.difference("test_last", "causal_lm", "diffusion"), MARGIN, "nats",
        ),
        Claim(
            "diffusion overtakes: its best checkpoint is better than the causal model's best (test: exact - bound)",
            results.difference("test_best", "causal_lm", "diffusion"), MARGIN, "nats",
        ),
    ]


def table(results):
    """Where each objective's curve is lowest, and the test loss there and at the end."""
    epochs = results["epochs", "causal_lm"][0]

    def lowest(arm):
        return ", ".join(f"{epoch:.0f}" for epoch in sorted(epochs[results["validation", arm].argmin(axis=1)]))

    def nats(name):
        return lambda arm: (
            f"{'<= ' if arm == 'diffusion' else ''}{results[name, arm].mean():.3f} {spread(results[name, arm])}"
        )

    columns = {
        "epochs at the lowest validation loss (by seed)": lowest,
        "test nats/token, best checkpoint": nats("test_best"),
        f"test nats/token, after {epochs[-1]:.0f} epochs": nats("test_last"),
    }
    error = results.array("test_standard_error").max()
    note = f"Standard error of a bound from the sampling of masks: at most {error:.3f}."
    return f"{arm_table(results, 'objective', columns)}\n\n{note}"


def plot(results, figure):
    labels = {"causal_lm": "causal (exact)", "diffusion": "diffusion (upper bound)"}
    panel = curves_plot(results, figure, "epochs", "validation", labels)
    lowest = results.array("validation").mean(0).min()
    panel.set(
        xscale="log", ylim=(lowest - 0.15, lowest + 2.0), xlabel="epochs over the same rows",
        ylabel="validation nats per token",
    )


CARD = Card(
    __file__, config=get_config, arms={name: name for name in OBJECTIVES}, measure=measure, claims=claims, table=table,
    plot=plot,
)
sweep = CARD.sweep

if __name__ == "__main__":
    CARD.main()
