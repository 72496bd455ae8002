"""What arrays a checkpoint holds, as Orbax describes them, against those that a config describes."""

from __future__ import annotations

import os
from typing import Any

import jax
import orbax.checkpoint as ocp

from maskformer.paths import AnyPath
from maskformer.training.checksums import DamageError


class CheckpointError(RuntimeError):
    """No usable checkpoint where one was asked for."""


class StructureError(CheckpointError):
    """The checkpoint holds other arrays than the config describes."""


def saved_tree(folder: AnyPath) -> Any:
    """Orbax's description of the arrays in `folder`."""
    with ocp.PyTreeCheckpointer() as arrays:
        described = arrays.metadata(os.fspath(folder)).item_metadata
    if described is None:
        raise DamageError(f"{folder}: the description of its arrays is missing or cannot be read")
    return described.tree


def check_structure(folder: AnyPath, abstract: Any, only: tuple[str, ...] | None = None) -> None:
    """Compare the arrays saved in `folder` with those that the config describes.

    Args:
      folder: of the state of a checkpoint.
      abstract: pytree of what is expected, with shapes.
      only: names at the top of the tree; None for all.

    Raises:
      StructureError: names the first array whose presence or shape differs.
    """
    tree = saved_tree(folder)
    if only is not None:
        tree = {name: tree[name] for name in only if name in tree}
    saved = _leaves(tree)
    expected = _leaves(abstract)
    for name in sorted(saved.keys() | expected.keys()):
        if name not in saved or name not in expected:
            holder, other = ("config", "checkpoint") if name in expected else ("checkpoint", "config")
            raise StructureError(
                f"checkpoint {folder.parent}: the {holder} has '{name}' and the {other} has not; "
                "use the config that the run was started with, or a new --workdir"
            )
        if saved[name] != expected[name]:
            raise StructureError(
                f"checkpoint {folder.parent}: '{name}' has shape {saved[name]} and the config asks for "
                f"{expected[name]}; use the config that the run was started with, or a new --workdir"
            )


def _leaves(tree: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape, alike for a state and for the nested dicts that Orbax describes it with."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
        if hasattr(leaf, "shape") and leaf.shape is not None
    }
