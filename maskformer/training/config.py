"""How a ConfigDict becomes a validated experiment.

A recipe starts from `default_config()`, which holds every key there is, changes what it needs, and returns the
`ConfigDict`. `resolve` turns that into an `ExperimentConfig` of frozen dataclasses, those of `training/sections.py`
among them. Nothing here touches a device.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from maskformer import objectives
from maskformer.data import DEFAULT_VOCABULARY_SIZE, DataConfig, load_tokenizer
from maskformer.models import EncoderConfig, GeneratorConfig, with_generator
from maskformer.training import tasks
from maskformer.training.sections import (
    CheckpointConfig,
    EvaluationConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    WriterConfig,
    check_master_weights,
    check_warmup,
    choose,
)


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

    def create_objective(self, vocabulary: objectives.Vocabulary, **changes: Any) -> Any:
        """The training objective over rows of `data.length` tokens, with some parameters changed, or another one."""
        section = objectives.schedules.in_steps(change_objective(self.objective, changes), self.train.steps)
        return _create_objective(section, vocabulary, self.data.length)

    def create_model_config(self, vocabulary: objectives.Vocabulary) -> Any:
        """The model's shape; its vocabulary comes from the tokenizer and its positions from the row length."""
        # Mode tokens and the like make a row longer than the text it came from.
        longest = max(self.data.length, self.create_objective(vocabulary).output_length)
        return _model_config(self.model, longest, vocab_size=vocabulary.size)


_SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "evaluation": EvaluationConfig,
    "checkpoint": CheckpointConfig,
    "mesh": MeshConfig,
    "writers": WriterConfig,
}
# What the tokenizer and the data decide; asking for them twice would let the two answers differ.
_DERIVED_MODEL_FIELDS = ("vocab_size", "max_length")


def default_config() -> ml_collections.ConfigDict:
    """Every key of an experiment at its default, for a recipe to change.

    Optional values are typed placeholders, so that `--config.optimizer.clip_norm=0.5` parses as a number.
    """
    config = ml_collections.ConfigDict({"seed": 0})
    for name, section in _SECTIONS.items():
        config[name] = _defaults(section)
    config.model = _defaults(EncoderConfig, skip=_DERIVED_MODEL_FIELDS)
    # Filled in by `generator_section` where the objective trains two networks.
    config.model.generator = ml_collections.ConfigDict()
    config.task = ml_collections.ConfigDict({"name": config_dict.placeholder(str)})
    config.objective = objectives_section("mlm")
    # Fields of the objective that evaluation changes; a recipe pins the rate here.
    config.evaluation.objective = ml_collections.ConfigDict()
    return config


def objectives_section(name: str, **changes: Any) -> ml_collections.ConfigDict:
    """The `objective` section of a recipe: every parameter of the objective `name`, some of them changed."""
    section = ml_collections.ConfigDict({"name": name})
    convention = objectives.COMPAT.get(name)
    builder = name if convention is None else convention.objective
    choose("objective.name", builder, tuple(objectives.BUILDERS))
    for key, parameter in objectives.parameters(builder).items():
        # Listing every parameter lets `--config.objective.KEY=` know it.
        section[key] = _leaf(parameter.default, object)
        if parameter.annotation in (Any, "Any") and parameter.default is not None:
            # A rate is a number or a schedule of the step; a ConfigDict would pin the type of the default.
            section[key] = config_dict.FieldReference(parameter.default, field_type=object)
    for key, value in {**(convention.params if convention else {}), **changes}.items():
        section[key] = value
    return section


def generator_section(**changes: Any) -> ml_collections.ConfigDict:
    """The `model.generator` section of a recipe: every field of `GeneratorConfig`, some of them changed."""
    section = _defaults(GeneratorConfig)
    for key, value in changes.items():
        section[key] = value
    return section


def resolve(config: Mapping[str, Any]) -> ExperimentConfig:
    """Validate a config and freeze it.

    Args:
      config: a `ConfigDict` as recipes return it, or the mapping read back from a run's `config.json`.

    Raises:
      ValueError: one line naming the field, its value and what was expected.
    """
    # A run from before there were tasks has the objective's own.
    config = {"task": {}, **plain(config)}
    known = {field.name for field in dataclasses.fields(ExperimentConfig)}
    _check_keys("", config, known)
    missing = sorted(known - config.keys())
    if missing:
        raise ValueError(f"config.{missing[0]} is missing: start the recipe from maskformer.training.default_config()")
    sections = {name: _build(section, config[name], name) for name, section in _SECTIONS.items()}
    if "name" not in config["objective"]:
        raise ValueError("objective.name is missing: expected the name of an objective, such as 'mlm'")
    evaluated = change_objective(config["objective"], sections["evaluation"].objective)
    vocabulary = _vocabulary_to_be(sections["data"])
    steps, length = sections["train"].steps, sections["data"].length
    check_warmup(sections["optimizer"], steps)
    _check_schedules("objective", config["objective"], steps)
    objective = _create_objective(objectives.schedules.in_steps(config["objective"], steps), vocabulary, length)
    _create_objective(objectives.schedules.in_steps(evaluated, steps), vocabulary, length)
    names = {field.name for field in dataclasses.fields(EncoderConfig)} - set(_DERIVED_MODEL_FIELDS)
    _check_keys("model", config["model"], names | {"generator"})
    _check_types(EncoderConfig, {name: config["model"][name] for name in config["model"].keys() & names}, "model")
    check_master_weights(sections["optimizer"], config["model"].get("param_dtype", EncoderConfig.param_dtype))
    _check_generator(config["model"].get("generator"), objective)
    model = _model_config(config["model"], max(length, objective.output_length), vocab_size=vocabulary.size)
    tasks.create(config["task"], objective, model, label_smoothing=sections["train"].label_smoothing)
    return ExperimentConfig(
        seed=config["seed"], task=config["task"], objective=config["objective"], model=config["model"], **sections
    )


def plain(config: Any) -> Any:
    """The config as nested dicts, lists and scalars, ready for `json.dumps`."""
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    if isinstance(config, Mapping):
        # As JSON has them: a schedule written as {0: 0.3, 1000: 0.15} must equal itself when read back.
        return {str(key): plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [plain(value) for value in config]
    return config


def change_objective(section: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """An objective's section with `changes`; another `name` drops the parameters, which are those of the first one.

    >>> change_objective({"name": "mlm", "rate": 0.15}, {"rate": 0.4})
    {'name': 'mlm', 'rate': 0.4}
    >>> change_objective({"name": "mlm", "rate": 0.15}, {"name": "causal_lm"})
    {'name': 'causal_lm'}
    """
    kept = section if changes.get("name", section["name"]) == section["name"] else {}
    return {**kept, **changes}


def _check_schedules(path: str, value: Any, steps: int) -> None:
    """Raise for a step schedule whose last value the run would never reach."""
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_schedules(f"{path}[{index}]", item, steps)
    elif isinstance(value, Mapping) and value.get("schedule") == "step":
        starts = objectives.schedules.step_values(objectives.schedules.in_steps(value, steps))
        last = max((int(key) for key in starts if str(key).isdecimal()), default=0)
        if last >= steps:
            raise ValueError(
                f"{path}={dict(objectives.schedules.step_values(value))!r}: its last value begins at step {last}, and "
                f"the run ends at train.steps={steps}; give a share of the run, such as '50%', or set "
                f"--config.train.steps above {last}"
            )
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_schedules(f"{path}.{key}", item, steps)


def _create_objective(section: Mapping[str, Any], vocabulary: objectives.Vocabulary, length: int) -> Any:
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in section.items()}
    name = values.pop("name")
    try:
        objective = objectives.create(name, vocabulary, length, **values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.objective: {error}") from error
    if objective.makes_pairs:
        raise ValueError(
            f"objective.name={name!r}: makes pairs for an encoder and a decoder, and maskformer trains single stacks; "
            "set objective.layout='prefix' where it has one, or use one such as 'mlm', 'prefix_lm' or 'diffusion'"
        )
    return objective


def _check_generator(section: Mapping[str, Any] | None, objective: Any) -> None:
    if objective.trains_generator and not section:
        raise ValueError(
            f"model.generator is empty: objective.name={objective.name!r} trains a generator beside the model; set it "
            "to maskformer.training.generator_section()"
        )
    if section and not objective.trains_generator:
        raise ValueError(
            f"model.generator={dict(section)}: objective.name={objective.name!r} trains no generator; set it to {{}}"
        )
    if section:
        _check_keys("model.generator", section, {field.name for field in dataclasses.fields(GeneratorConfig)})
        _check_types(GeneratorConfig, section, "model.generator")


def _vocabulary_to_be(config: DataConfig) -> objectives.Vocabulary:
    """The vocabulary that the tokenizer will have, without training it."""
    if not config.trains_tokenizer:
        return load_tokenizer(config).vocabulary
    size = config.vocabulary_size or DEFAULT_VOCABULARY_SIZE
    sentinels = tuple(range(size - 1, size - 1 - config.sentinels, -1))
    return objectives.Vocabulary(size=size, pad=0, unk=1, cls=2, sep=3, mask=4, sentinels=sentinels)


def _model_config(model: Mapping[str, Any], length: int, vocab_size: int) -> Any:
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in model.items()}
    generator = values.pop("generator", None)
    encoder = EncoderConfig(vocab_size=vocab_size, max_length=length, **values)
    if not generator:
        return encoder
    return with_generator(encoder, GeneratorConfig(**generator))


def _defaults(section: type, skip: tuple[str, ...] = ()) -> ml_collections.ConfigDict:
    types_ = typing.get_type_hints(section)
    values = ml_collections.ConfigDict()
    for field in dataclasses.fields(section):
        if field.name in skip:
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        values[field.name] = _leaf(default, types_[field.name])
    return values


def _leaf(default: Any, annotation: Any) -> Any:
    """`default`, or for None a placeholder of the annotated type so that overrides are parsed and checked."""
    if default is not None:
        several = len([option for option in typing.get_args(annotation) if option is not types.NoneType]) > 1
        # A mask is a string or a tuple of them; a ConfigDict would pin the type of the default.
        return config_dict.FieldReference(default, field_type=object) if several else default
    options = [option for option in typing.get_args(annotation) if option is not types.NoneType]
    kind = typing.get_origin(options[0]) or options[0] if options else object
    return config_dict.placeholder(kind if kind in (int, float, str, bool, tuple) else object)


def _build(section: type, values: Mapping[str, Any], name: str) -> Any:
    _check_keys(name, values, {field.name for field in dataclasses.fields(section)})
    _check_types(section, values, name)
    return section(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _check_keys(path: str, values: Mapping[str, Any], known: set[str]) -> None:
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(sorted(known))}"
            raise ValueError(f"config.{path + '.' if path else ''}{key}: no such key{hint}")


def _check_types(section: type, values: Mapping[str, Any], name: str) -> None:
    """Scalars of the wrong type fail here, by name, before a validator compares them."""
    hints = typing.get_type_hints(section)
    for key, value in values.items():
        options = typing.get_args(hints[key]) if _is_union(hints[key]) else (hints[key],)
        scalars = tuple(option for option in options if option in (int, float, str, bool, types.NoneType))
        if len(scalars) != len(options):
            continue
        accepted = scalars + (int,) if float in scalars else scalars
        wrong = isinstance(value, bool) and bool not in accepted
        if wrong or not isinstance(value, accepted):
            expected = " or ".join("None" if option is types.NoneType else option.__name__ for option in scalars)
            raise ValueError(f"{name}.{key}={value!r}: expected {expected}, got {type(value).__name__}")


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)
