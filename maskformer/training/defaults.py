"""What a recipe starts from: a `ConfigDict` with every key of an experiment at its default, to change."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

import ml_collections
from ml_collections import config_dict

from maskformer import objectives
from maskformer.checks import choose
from maskformer.models import EncoderConfig, GeneratorConfig
from maskformer.training.experiment import DERIVED_MODEL_FIELDS, SECTIONS


def default_config() -> ml_collections.ConfigDict:
    """Every key of an experiment at its default, for a recipe to change.

    Optional values are typed placeholders, so that `--config.optimizer.clip_norm=0.5` parses as a number.
    """
    config = ml_collections.ConfigDict({"seed": 0})
    for name, section in SECTIONS.items():
        config[name] = _defaults(section)
    config.model = _defaults(EncoderConfig, skip=DERIVED_MODEL_FIELDS)
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
    convention = objectives.COMPAT.get(name) if isinstance(name, str) else None
    builder = name if convention is None else convention.objective
    choose("objective.name", builder, tuple(objectives.BUILDERS))
    for key, parameter in objectives.parameters(builder).items():
        # Listing every parameter lets `--config.objective.KEY=` know it.
        section[key] = _leaf(parameter.default, object)
        if parameter.annotation is Any and parameter.default is not None:
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
