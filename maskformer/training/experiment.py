"""From a recipe's `ConfigDict`, or a run's `config.json`, to a validated experiment.

`resolve` reads each section into its frozen dataclass, which checks its own fields (`DataConfig`, `EncoderConfig`,
those of `training/sections.py`), then makes the objectives and the model's shape once, which checks what concerns
several sections. What a recipe starts from is in `training/defaults.py`. Nothing here touches a device.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from maskformer import objectives
from maskformer.attention import platform
from maskformer.checks import integer, nearest, one_line, require, shown, typed
from maskformer.data import DEFAULT_VOCABULARY_SIZE, DataConfig, batch_layout, load_tokenizer
from maskformer.models import EncoderConfig, GeneratorConfig, with_generator
from maskformer.training import tasks
from maskformer.training.sections import (
    LAST_SEED,
    CheckpointConfig,
    EvaluationConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    WatchdogConfig,
    WriterConfig,
    check_master_weights,
    check_warmup,
)

# More ids than any tokenizer in use has; tables of one entry for each id stay small beside the model.
MOST_IDS = 2**21


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """A whole experiment.

    `objective` holds `name` and the parameters of that objective; a share of the run in its schedules, such as "50%",
    becomes steps in `create_objective`. `model` holds the fields of an `EncoderConfig`, and
    in `generator` those of a `GeneratorConfig`, empty unless the objective trains two networks.
    """

    seed: int
    data: DataConfig
    task: Mapping[str, Any]
    objective: Mapping[str, Any]
    model: Mapping[str, Any]
    optimizer: OptimizerConfig
    train: TrainConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    mesh: MeshConfig
    writers: WriterConfig
    watchdog: WatchdogConfig

    def create_objective(self, vocabulary: objectives.Vocabulary, **changes: Any) -> Any:
        """The training objective over rows of `data.length` tokens, with some parameters changed, or another one."""
        return _create_objective(self, vocabulary, changes, "objective")

    def create_model_config(self, objective: objectives.Objective) -> Any:
        """The shape of a model for `objective`, whose vocabulary and longest row decide the rest of it."""
        vocabulary = objective.vocabulary
        # Mode tokens and the like make a row longer than the text it came from.
        longest = max(self.data.length, objective.output_length)
        fields = {key: _tuples(value) for key, value in self.model.items() if key != "generator"}
        encoder = EncoderConfig(vocab_size=vocabulary.size, max_length=longest, **fields)
        generator = self.model.get("generator")
        return with_generator(encoder, GeneratorConfig(**generator)) if generator else encoder

    def create_task(
        self,
        objective: objectives.Objective,
        config: Any,
        *,
        trained: objectives.Objective | None = None,
        unigram: np.ndarray | None = None,
    ) -> tasks.Task:
        """The task that trains a model of `config` on `objective`, or evaluates under it one that was `trained` on
        another: by the same task, unless the objective asks for a task of its own.
        """
        if trained is None:
            return tasks.create(self.task, objective, config, label_smoothing=self.train.label_smoothing)
        section = self.task if objective.task == trained.task else {}
        return tasks.create(section, objective, config, unigram=unigram)


# The sections that are a dataclass as they stand. `objective` is a call of a builder, and of the model's fields some
# come from the tokenizer and the data: asking for them twice would let the two answers differ.
SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "evaluation": EvaluationConfig,
    "checkpoint": CheckpointConfig,
    "mesh": MeshConfig,
    "writers": WriterConfig,
    "watchdog": WatchdogConfig,
}
DERIVED_MODEL_FIELDS = ("vocab_size", "max_length")


def resolve(config: Mapping[str, Any]) -> ExperimentConfig:
    """Validate a config and freeze it.

    Args:
      config: a `ConfigDict` as recipes return it, or the mapping read back from a run's `config.json`.

    Raises:
      ValueError: one line naming the field, its value and what was expected.
    """
    config = plain(config)
    require(isinstance(config, Mapping), "config", config, "a ConfigDict, or the mapping of a config.json")
    # A run from before there were tasks has the objective's own, and one from before there were limits has the usual.
    config = {"task": {}, "watchdog": {}, **config}
    _check_keys("", config, _names(ExperimentConfig))
    missing = sorted(_names(ExperimentConfig) - config.keys())
    if missing:
        raise ValueError(f"config.{missing[0]} is missing: start the recipe from maskformer.training.default_config()")
    for name in ("task", "objective", "model", *SECTIONS):
        require(isinstance(config[name], Mapping), name, config[name], "a section, which holds keys and values")
    sections = {name: _read(section, config[name], name) for name, section in SECTIONS.items()}
    integer("seed", config["seed"], 0, LAST_SEED)
    experiment = ExperimentConfig(**{**config, **sections})
    check_warmup(experiment.optimizer, experiment.train.steps)
    objective, evaluated = _check_objectives(experiment)
    model = _check_model(experiment, objective)
    _check_task(experiment, objective, evaluated, model)
    return experiment


def _check_objectives(experiment: ExperimentConfig) -> tuple[Any, Any]:
    """The objectives of training and of evaluation."""
    section, changes = experiment.objective, experiment.evaluation.objective
    require(isinstance(section.get("name"), str), "objective.name", section.get("name"), "a name, such as 'mlm'")
    _check_schedules("objective", section, experiment.train.steps)
    vocabulary = vocabulary_to_be(experiment.data)
    objective = experiment.create_objective(vocabulary)
    evaluated = objective
    if changes:
        evaluated = _create_objective(experiment, vocabulary, changes, "evaluation.objective")
    if experiment.evaluation.every and objectives.schedules.starts_at_zero(evaluated.rate):
        raise ValueError(
            f"objective.rate: {evaluated.rate.description} is 0 at its start, at which it is evaluated, so nothing "
            "would be predicted; set --config.evaluation.objective.rate to the rate to evaluate at"
        )
    return objective, evaluated


def _check_model(experiment: ExperimentConfig, objective: Any) -> Any:
    """The model's shape, which suits the objective and can be trained."""
    model = experiment.model
    known = _names(EncoderConfig) - set(DERIVED_MODEL_FIELDS)
    _check_keys("model", model, known | {"generator"})
    generator = model.get("generator")
    require(isinstance(generator, Mapping), "model.generator", generator, "a section: {} for none")
    assert generator is not None
    _check_keys("model.generator", generator, _names(GeneratorConfig))
    if objective.trains_generator and not generator:
        raise ValueError(
            f"model.generator is empty: objective.name={objective.name!r} trains a generator beside the model; set it "
            "to maskformer.training.generator_section()"
        )
    if generator and not objective.trains_generator:
        raise ValueError(
            f"model.generator={shown(dict(generator))}: objective.name={objective.name!r} trains no generator; set it "
            "to {}"
        )
    for kind in ("param", "compute", "output"):
        field = f"{kind}_dtype"
        if model.get(field) == "float16":
            raise ValueError(
                f"model.{field}='float16': expected another for training: gradients and Adam's epsilon underflow in "
                "it, and nothing scales the loss; use 'bfloat16', which has the range of float32"
            )
    model_config = experiment.create_model_config(objective)
    check_master_weights(experiment.optimizer, model.get("param_dtype", EncoderConfig.param_dtype))
    return model_config


def _check_task(experiment: ExperimentConfig, objective: Any, evaluated: Any, model: Any) -> None:
    """That the task can be made, and measures what says which evaluation is the best."""
    smoothing, evaluation = experiment.train.label_smoothing, experiment.evaluation
    typed("task.name", experiment.task.get("name"), str | None)
    try:
        objective.check_label_smoothing(smoothing)
    except ValueError as error:
        raise ValueError(f"train.{error}") from error
    task = experiment.create_task(objective, model)
    if evaluated is not objective:
        experiment.create_task(evaluated, model, trained=objective)
    # Ours are whole and measure the loss; to find out more takes a moment.
    ours = type(task).__module__.startswith("maskformer.")
    if not ours:
        _check_own_task(experiment, objective)
    if evaluation.every and not (ours and evaluation.metric == "loss"):
        names = metric_names(experiment, objective, evaluated)
        hint = nearest(evaluation.metric, names)
        expected = f"what objective.name={evaluated.name!r} measures, one of {', '.join(names)}{hint}"
        require(evaluation.metric in names, "evaluation.metric", evaluation.metric, expected)


def _check_own_task(experiment: ExperimentConfig, objective: Any) -> None:
    """That the parts of a recipe's own task are there and fit together."""
    task = experiment.create_task(objective, _traceable(experiment, objective))
    try:
        with platform.assume("cpu"):
            task.check(_batch_shapes(experiment))
            if experiment.evaluation.every:
                task.measured(_batch_shapes(experiment))
    except NotImplementedError as error:
        raise ValueError(f"task.name={shown(experiment.task.get('name'))}: {error}") from error


def metric_names(experiment: ExperimentConfig, trained: Any, evaluated: Any) -> tuple[str, ...]:
    """What an evaluation measures, and so what `evaluation.metric` may name."""
    unigram = np.zeros(evaluated.vocabulary.size, np.float32)
    task = experiment.create_task(evaluated, _traceable(experiment, trained), trained=trained, unigram=unigram)
    with platform.assume("cpu"):
        return task.measured(_batch_shapes(experiment))


def _traceable(experiment: ExperimentConfig, objective: Any) -> Any:
    """The model's shape, to be traced as the reference would compute it on a CPU: without a look at the devices."""
    shape = {**experiment.model, "attention_implementation": "reference"}
    return dataclasses.replace(experiment, model=shape).create_model_config(objective)


def _batch_shapes(experiment: ExperimentConfig) -> dict[str, jax.ShapeDtypeStruct]:
    layout = batch_layout(experiment.evaluation.batch_size, experiment.data.length)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in layout.items()}


def plain(config: Any) -> Any:
    """The config as nested dicts, lists and scalars, ready for `json.dumps`.

    Raises:
      ValueError: a value that JSON does not have, or one that holds itself.
    """
    try:
        return _plain(config, "")
    except RecursionError:
        raise ValueError("config: expected values that hold a few others, and some are nested without end") from None


def _plain(value: Any, path: str) -> Any:
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        # As JSON has them: a schedule written as {0: 0.3, 1000: 0.15} must equal itself when read back.
        return {str(key): _plain(inner, f"{path}.{key}" if path else str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, path) for inner in value]
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    fix = "; write str(path)" if isinstance(value, os.PathLike) else ""
    kinds = "a number, a string, None, or a list or mapping of them, which config.json can hold"
    raise ValueError(f"{one_line(path) or 'config'}={shown(value)}: expected {kinds}, got {type(value).__name__}{fix}")


def change_objective(section: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """An objective's section with `changes`; another `name` drops the parameters, which are those of the first one.

    >>> change_objective({"name": "mlm", "rate": 0.15}, {"rate": 0.4})
    {'name': 'mlm', 'rate': 0.4}
    >>> change_objective({"name": "mlm", "rate": 0.15}, {"name": "causal_lm"})
    {'name': 'causal_lm'}
    """
    kept = section if changes.get("name", section["name"]) == section["name"] else {}
    return {**kept, **changes}


def vocabulary_to_be(config: DataConfig) -> objectives.Vocabulary:
    """The vocabulary that the tokenizer will have, without training it."""
    if not config.trains_tokenizer:
        return load_tokenizer(config).vocabulary
    size = config.vocabulary_size or DEFAULT_VOCABULARY_SIZE
    require(size <= MOST_IDS, "data.vocabulary_size", size, f"at most {MOST_IDS}")
    sentinels = tuple(range(size - 1, size - 1 - config.sentinels, -1))
    return objectives.Vocabulary(size=size, pad=0, unk=1, cls=2, sep=3, mask=4, sentinels=sentinels)


def _create_objective(
    experiment: ExperimentConfig, vocabulary: objectives.Vocabulary, changes: Mapping[str, Any], section: str
) -> Any:
    """The experiment's objective with changes, which come from `section`: its errors name the config's own keys."""
    data = experiment.data
    try:
        changed = change_objective(experiment.objective, changes)
        values = {key: _tuples(v) for key, v in objectives.schedules.in_steps(changed, experiment.train.steps).items()}
        return objectives.create(values.pop("name"), vocabulary, data.length, **values)
    except objectives.VocabularyError as error:
        problem = _under(section, error.problem)
        if data.trains_tokenizer:
            fix = f"the last data.sentinels={data.sentinels} ids are such: raise it, or lower what needs them"
        else:
            fix = f"data.tokenizer={shown(data.tokenizer)} brings its own: take another, or another objective"
        raise ValueError(f"{problem}; {fix}") from error
    except ValueError as error:
        raise ValueError(_under(section, one_line(str(error)))) from error


def _under(section: str, message: str) -> str:
    """The message of an objective with its parameter named as a key of the config: `objective.rate=2: expected ...`."""
    names_parameter = re.match(r"[a-z_]+(\[.*?\])?[=.:]", message)
    return f"{section}.{message}" if names_parameter else f"config.{section}: {message}"


def _check_schedules(path: str, value: Any, steps: int) -> None:
    """Raise for a step schedule whose last value the run would never reach."""
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_schedules(f"{path}[{index}]", item, steps)
    elif isinstance(value, Mapping) and value.get("schedule") == "step":
        try:
            starts = objectives.schedules.step_values(objectives.schedules.in_steps(value, steps))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        last = max((int(key) for key in starts if str(key).isdecimal()), default=0)
        if last >= steps:
            raise ValueError(
                f"{path}={shown(dict(objectives.schedules.step_values(value)))}: its last value begins at step {last}, "
                f"and the run ends at train.steps={steps}; give a share of the run, such as '50%', or set "
                f"--config.train.steps above {last}"
            )
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_schedules(f"{path}.{key}", item, steps)


def _read(section: type, values: Mapping[str, Any], name: str) -> Any:
    _check_keys(name, values, _names(section))
    return section(**{key: _tuples(value) for key, value in values.items()})


def _check_keys(path: str, values: Mapping[str, Any], known: set[str]) -> None:
    for key in values:
        if key not in known:
            hint = nearest(key, sorted(known), cutoff=0.5) or f"; known keys: {', '.join(sorted(known))}"
            raise ValueError(f"config.{path + '.' if path else ''}{one_line(key, 80)}: no such key{hint}")


def _names(section: type) -> set[str]:
    return {field.name for field in dataclasses.fields(section)}


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that dataclasses and builders hold."""
    return tuple(value) if isinstance(value, list) else value
