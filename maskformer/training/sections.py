"""The sections of an experiment's config beside data, objective and model, each one validated value."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from maskformer.checks import choose, integer, number, require, shown, typed_fields
from maskformer.data.data_config import SPLITS
from maskformer.paths import is_local, why_no_run

OPTIMIZERS = ("adamw", "sgd", "lion", "adafactor")
SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt", "wsd")
DECAYED = ("matrices", "kernels", "all")
MODES = ("min", "max")


# Steps and rows are counted in int32 on the devices.
MOST = 2**31 - 1
# JAX makes a key from the low 32 bits of a seed: beyond them, two seeds would be one.
LAST_SEED = 2**32 - 1
# The float32 before 1: a decay that rounds to 1 divides by 0 where Adam corrects its bias, and forgets nothing.
LAST_DECAY = 1.0 - 2.0**-24
_FLOAT32 = f", at most {LAST_DECAY:.8f}, since float32 has none between that and 1"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, schedule and weight averaging.

    Attributes:
      name: "adamw", "sgd", "lion" or "adafactor", each Optax's own.
      learning_rate: peak rate, reached after the warm-up.
      schedule: shape after the warm-up: "constant", "linear", "cosine" (both to `final_fraction` of the peak at
        the last step), "inverse_sqrt" (peak * sqrt(warmup / step)), "wsd" (warm-up, stable, then linear decay over
        the last `decay_fraction` of the steps; Hu et al. 2024).
      warmup_steps: linear from 0 to the peak.
      weight_decay: decoupled (Loshchilov & Hutter 2019), multiplied by the learning rate.
      decay: which parameters decay: "matrices" (two or more dimensions beside those of layers and experts), "kernels"
        (matrices without the embedding tables), "all".
      clip_norm: global gradient norm above which gradients are scaled down; None for no clipping.
      b1, b2, epsilon: moment decays and denominator of adamw and lion (b1, b2).
      momentum, nesterov: of sgd.
      master_weights: train a float32 copy of parameters that are narrower; they are its rounding.
      ema_decay: decay of an exponential moving average of the parameters, used for evaluation; None for none.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    decay_fraction: float = 0.2
    weight_decay: float = 0.01
    decay: str = "matrices"
    clip_norm: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    momentum: float = 0.9
    nesterov: bool = False
    master_weights: bool = False
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        typed_fields(self, "optimizer")
        choose("optimizer.name", self.name, OPTIMIZERS)
        choose("optimizer.schedule", self.schedule, SCHEDULES)
        choose("optimizer.decay", self.decay, DECAYED)
        number(
            "optimizer.learning_rate", self.learning_rate, "a number above 0 and below 1000", 0.0, 1e3, open_low=True
        )
        integer("optimizer.warmup_steps", self.warmup_steps, 0, MOST)
        number("optimizer.weight_decay", self.weight_decay, "a number from 0 to below 1000", 0.0, 1e3)
        for field in ("final_fraction", "decay_fraction"):
            number(f"optimizer.{field}", getattr(self, field), "a share in [0, 1]", 0.0, 1.0, closed=True)
        for field in ("b1", "b2", "momentum"):
            expected = f"a decay in [0, 1){_FLOAT32}"
            number(f"optimizer.{field}", getattr(self, field), expected, 0.0, LAST_DECAY, closed=True)
        # Below the smallest float32 it is 0, and the update of a gradient of 0 is NaN.
        number("optimizer.epsilon", self.epsilon, "a number above 0, from 1e-30 to 1", 1e-30, 1.0, closed=True)
        if self.clip_norm is not None:
            number(
                "optimizer.clip_norm", self.clip_norm, "a norm above 0 and below 1e30, or None for no clipping",
                0.0, 1e30, open_low=True,
            )
        if self.ema_decay is not None:
            expected = f"a decay in (0, 1){_FLOAT32}, or None"
            number("optimizer.ema_decay", self.ema_decay, expected, 0.0, LAST_DECAY, open_low=True, closed=True)
        if self.schedule == "inverse_sqrt":
            require(
                self.warmup_steps > 0, "optimizer.warmup_steps", self.warmup_steps,
                "at least 1 with schedule 'inverse_sqrt', whose curve starts at the end of the warm-up",
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, batch and rhythm of a run.

    Attributes:
      steps: optimizer updates.
      batch_size: rows per update, over all devices and accumulation steps.
      accumulation_steps: the batch is run in this many parts whose gradients are summed, then normalised once.
      rows_per_device: the most rows that a device (or a group of devices that share rows) runs at once. It decides the
        parts instead of accumulation_steps, anew at each start, so that the batch stays what it is on any number of
        devices. None leaves them to accumulation_steps.
      label_smoothing: share of the target's probability spread evenly over the vocabulary.
      log_every: steps between log lines, each an average over the window.
      init_from: workdir whose parameters (best checkpoint, or the newest) start a new run; None for none.
      resume: workdir whose whole state is continued when this workdir has no checkpoint; None for none.
    """

    steps: int = 1000
    batch_size: int = 32
    accumulation_steps: int = 1
    rows_per_device: int | None = None
    label_smoothing: float = 0.0
    log_every: int = 10
    init_from: str | None = None
    resume: str | None = None

    def __post_init__(self) -> None:
        typed_fields(self, "train")
        for field in ("steps", "batch_size", "accumulation_steps", "log_every"):
            integer(f"train.{field}", getattr(self, field), 1, MOST)
        require(
            self.batch_size % self.accumulation_steps == 0, "train.accumulation_steps", self.accumulation_steps,
            f"a divisor of train.batch_size={self.batch_size}",
        )
        if self.rows_per_device is not None:
            integer("train.rows_per_device", self.rows_per_device, 1, MOST)
            require(
                self.accumulation_steps == 1, "train.accumulation_steps", self.accumulation_steps,
                f"1 beside train.rows_per_device={self.rows_per_device}, which decides it",
            )
        number("train.label_smoothing", self.label_smoothing, "a share in [0, 1)", 0.0, 1.0)
        for field in ("init_from", "resume"):
            value = getattr(self, field)
            require(value is None or value.strip(), f"train.{field}", value, "the workdir of a run, or None")
            if value is not None and (why := why_no_run(value)) is not None:
                raise ValueError(f"train.{field}={shown(value)}: {why}")
        require(
            self.init_from is None or self.resume is None, "train.init_from", self.init_from,
            "None beside train.resume, which already brings the parameters",
        )

    def parts(self, shards: int) -> int:
        """In how many equal parts a batch runs that divides over `shards` devices: the fewest that fit.

        >>> [TrainConfig(batch_size=768, rows_per_device=32).parts(shards) for shards in (24, 16, 8)]
        [1, 2, 3]
        """
        if self.rows_per_device is None:
            return self.accumulation_steps
        rows, most = self.batch_size // shards, self.rows_per_device
        return next(parts for parts in range(1, rows + 1) if rows % parts == 0 and rows // parts <= most)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation during and after training, under masks that no training setting moves.

    Attributes:
      every: steps between evaluations; one more follows the last step. 0 for none.
      batch_size: rows per evaluation batch, over all devices.
      max_batches: batches per evaluation; None for the whole split.
      split: the split to evaluate.
      seed: of the evaluation masks.
      objective: changes to the training objective's parameters when evaluating, such as a fixed `rate`.
      metric, mode: what "best" means, for the kept checkpoint and early stopping.
      patience: evaluations without improvement after which training stops; None never stops early.
      min_improvement: a smaller change does not count as improvement.
    """

    every: int = 100
    batch_size: int = 32
    max_batches: int | None = None
    split: str = "validation"
    seed: int = 0
    objective: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metric: str = "loss"
    mode: str = "min"
    patience: int | None = None
    min_improvement: float = 0.0

    def __post_init__(self) -> None:
        typed_fields(self, "evaluation")
        integer("evaluation.every", self.every, 0, MOST)
        integer("evaluation.batch_size", self.batch_size, 1, MOST)
        integer("evaluation.seed", self.seed, 0, LAST_SEED)
        choose("evaluation.split", self.split, SPLITS)
        choose("evaluation.mode", self.mode, MODES)
        for field in ("max_batches", "patience"):
            if getattr(self, field) is not None:
                integer(f"evaluation.{field}", getattr(self, field), 1, MOST)
        number("evaluation.min_improvement", self.min_improvement, "a number of at least 0", 0.0, math.inf)
        if self.patience is not None:
            require(self.every > 0, "evaluation.every", self.every, "at least 1 when evaluation.patience is set")

    @property
    def criterion(self) -> str:
        """What "best" means, in words that are equal where two evaluations can be compared.

        >>> EvaluationConfig(metric="accuracy", mode="max", objective={"rate": 0.4}).criterion
        'max validation/accuracy of {"rate": 0.4}'
        """
        objective = f" of {json.dumps(dict(self.objective), sort_keys=True)}" if self.objective else ""
        return f"{self.mode} {self.split}/{self.metric}{objective}"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep.

    Attributes:
      every: steps between checkpoints; one more follows the last step. 0 saves only there.
      keep: how many of the newest to keep, beside the best by `evaluation.metric`.
      local_every: steps between checkpoints on each host's own disk (`training/local_tier.py`), from which a run goes
        on after a failure where they are newer than those of the workdir. 0 for none.
      local_folder: where, on every host; in its memory below /dev/shm.
    """

    every: int = 100
    keep: int = 2
    local_every: int = 0
    local_folder: str | None = None

    def __post_init__(self) -> None:
        typed_fields(self, "checkpoint")
        integer("checkpoint.every", self.every, 0, MOST)
        integer("checkpoint.keep", self.keep, 1, MOST)
        integer("checkpoint.local_every", self.local_every, 0, MOST)
        folder = self.local_folder
        require(
            self.local_every == 0 or bool(folder), "checkpoint.local_folder", folder,
            "a folder of each host's own, such as /dev/shm/maskformer, with checkpoint.local_every above 0",
        )
        require(
            folder is None or is_local(folder), "checkpoint.local_folder", folder,
            "a folder of each host's own; checkpoints in buckets are those of the workdir",
        )


# Axes whose traffic the network between slices can carry: gradients and activations once a step or a microbatch. The
# others exchange activations several times a layer.
CROSSES_SLICES = ("data", "stage", "fsdp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; at most one may be -1, "all that remain".

    Attributes:
      stage: parts of the layer stack, each on devices of its own (a pipeline, see `models.pipeline`).
      data: replicas of the parameters; each sees its own rows of the batch.
      fsdp: shards of the parameters; each also sees its own rows.
      expert: shards of the experts of a mixture; each also sees its own rows.
      tensor: shards of the heads, the feed-forward width and the vocabulary.
      context: parts of the sequence, for rows too long for one device.
      context_method: how attention reaches the other parts: "all_gather" collects the keys and values, "ring" passes
        them around, with memory that falls with the axis.
      microbatches: how many a batch, or a part of an accumulated one, is cut into to pass through the stages: a
        multiple of `stage`. None for four for each stage, or the most below that divide the rows.
      rounds: how often a microbatch passes each device: more rounds of fewer layers wait less at the beginning and the
        end of a step, send hidden states more often, and move the weights to the devices of their rounds in every step.
      dcn: how many slices an axis spans, such as {"data": 2}; they multiply to the number of slices, and each divides
        its axis. Slices are those of a TPU pod; on GPU and CPU, where there are none, processes. Only `CROSSES_SLICES`
        may. A TPU pod of several slices with {} has `data` across all of them.
      shard_optimizer: split the optimizer's state, the averaged parameters and the summed gradients over `data` too,
        which otherwise repeats them (ZeRO, stages 1 and 2; Rajbhandari et al. 2020). A step then gathers the updates.
      dcn_gradients: "bfloat16" sends gradients between slices in half the bytes and once a step, whatever
        `train.accumulation_steps` is: each slice first adds up its own in float32. Needs dcn with `data`. None leaves
        the sum over slices to the compiler. Dropout then draws for each slice by itself.
    """

    stage: int = 1
    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    context: int = 1
    context_method: str = "all_gather"
    microbatches: int | None = None
    rounds: int = 1
    dcn: Mapping[str, int] = dataclasses.field(default_factory=dict)
    shard_optimizer: bool = False
    dcn_gradients: str | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name -> devices, in the order of the mesh."""
        return {axis: getattr(self, axis) for axis in ("stage", "data", "fsdp", "expert", "tensor", "context")}

    def __post_init__(self) -> None:
        typed_fields(self, "mesh")
        choose("mesh.context_method", self.context_method, ("all_gather", "ring"))
        sizes = self.sizes
        for axis, size in sizes.items():
            fits = size == -1 or 1 <= size <= MOST
            require(fits, f"mesh.{axis}", size, "at least 1 device, or -1 for all that remain")
        require(
            list(sizes.values()).count(-1) <= 1, "mesh", sizes, "at most one axis of -1, since only one can be inferred"
        )
        integer("mesh.rounds", self.rounds, 1, MOST)
        if self.microbatches is not None:
            integer("mesh.microbatches", self.microbatches, 1, MOST)
            require(
                self.stage == -1 or self.microbatches % self.stage == 0, "mesh.microbatches", self.microbatches,
                f"a multiple of mesh.stage={self.stage}",
            )
        for field, default in (("microbatches", None), ("rounds", 1)):
            require(
                self.stage != 1 or getattr(self, field) == default, f"mesh.{field}", getattr(self, field),
                f"{default} with mesh.stage=1, whose layers run in order; set mesh.stage to the number of stages",
            )
        for axis, across in self.dcn.items():
            if axis in sizes and axis not in CROSSES_SLICES:
                raise ValueError(
                    f"mesh.dcn.{axis}={shown(across)}: {axis} exchanges activations in every layer, too much for the "
                    f"network between slices; expected one of {', '.join(CROSSES_SLICES)}"
                )
            choose("mesh.dcn", axis, CROSSES_SLICES)
            integer(f"mesh.dcn.{axis}", across, 1, MOST)
        choose("mesh.dcn_gradients", self.dcn_gradients, (None, "bfloat16"))
        require(
            self.dcn_gradients is None or self.stage == 1, "mesh.dcn_gradients", self.dcn_gradients,
            f"None with mesh.stage={self.stage}, whose stages add up their gradients on each device and send them once",
        )
        require(
            self.dcn_gradients is None or self.dcn.get("data", 1) > 1, "mesh.dcn_gradients", self.dcn_gradients,
            "None, or mesh.dcn with `data` over several slices, such as --config.mesh.dcn.data=2",
        )


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """How long a run may show no progress before it is ended as hung, in seconds; 0 for no limit.

    Attributes:
      first_step: the first step of a start, with its compilation on the slowest host.
      step: from one step to the next.
      evaluation: one whole evaluation.
      checkpoint: one save, one restore, or the end of the run with its last save.
    """

    first_step: float = 7200.0
    step: float = 1800.0
    evaluation: float = 14400.0
    checkpoint: float = 3600.0

    def __post_init__(self) -> None:
        typed_fields(self, "watchdog")
        for field in dataclasses.fields(self):
            expected = "seconds, a number from 0 (no limit) to 1e8"
            number(f"watchdog.{field.name}", getattr(self, field.name), expected, 0.0, 1e8, closed=True)


@dataclasses.dataclass(frozen=True)
class WriterConfig:
    """Where metrics go beside `metrics.jsonl`, which is always written.

    Attributes:
      progress: draw a live progress bar on a terminal; plain lines elsewhere.
      tensorboard: write TensorBoard events to the workdir.
      wandb_project: Weights & Biases project (extra `[wandb]`); None for none.
    """

    progress: bool = True
    tensorboard: bool = True
    wandb_project: str | None = None

    def __post_init__(self) -> None:
        typed_fields(self, "writers")


def check_warmup(optimizer: OptimizerConfig, steps: int) -> None:
    """Raise the one-line `ValueError` of a warm-up that is not shorter than the run."""
    warmup = optimizer.warmup_steps
    if warmup >= steps:
        shorter = max(steps // 10, int(optimizer.schedule == "inverse_sqrt"))
        fixes = [f"--config.optimizer.warmup_steps={shorter}"] if shorter < steps else []
        raise ValueError(
            f"optimizer.warmup_steps={warmup}: expected fewer than train.steps={steps}, or the run ends before it "
            f"reaches its learning rate; set {' or '.join([*fixes, f'--config.train.steps above {warmup}'])}"
        )


def check_master_weights(optimizer: OptimizerConfig, param_dtype: str) -> None:
    """Raise the one-line `ValueError` of a float32 copy of parameters that are no narrower."""
    if optimizer.master_weights and param_dtype in ("float32", "float64"):
        raise ValueError(
            f"optimizer.master_weights=True: expected False with model.param_dtype={param_dtype!r}, of which a float32 "
            "copy gains nothing; set --config.model.param_dtype=bfloat16, or leave master_weights alone"
        )
