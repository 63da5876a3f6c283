"""Nested values with tensors in them, as optimisers keep them: copied, and taken apart into tensors and JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_TENSOR, _TUPLE, _DTYPE, _ITEMS = "$tensor", "$tuple", "$dtype", "$items"


def map_tensors(tree: Any, change: Callable[[str, Tensor], Any], path: str = "") -> Any:
    """A copy of dictionaries, lists and tuples in which ``change(path, tensor)`` stands for each tensor.

    Args:
        path: of the tree itself; below it, keys and positions follow after a ``/`` each.
    """
    if isinstance(tree, Tensor):
        return change(path, tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(value, change, _below(path, key)) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(value, change, _below(path, number)) for number, value in enumerate(tree))
    return tree


def split_tensors(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """What JSON can hold, and the tensors by their path; ``join_tensors`` puts both together again.

    Raises:
        TypeError: a value that is neither a tensor nor plain.
    """
    tensors: dict[str, Tensor] = {}

    def take(path: str, tensor: Tensor) -> dict[str, str]:
        tensors[path] = tensor
        return {_TENSOR: path}

    return _plain(tree, take, ""), tensors


def join_tensors(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that ``split_tensors`` took apart, types of values and of keys included.

    Raises:
        KeyError: a tensor is missing.
    """
    if isinstance(plain, list):
        return [join_tensors(value, tensors) for value in plain]
    if not isinstance(plain, dict):
        return plain
    (tag, value), *more = plain.items() or [(None, None)]
    if not more and tag == _TENSOR:
        return tensors[value]
    if not more and tag == _TUPLE:
        return tuple(join_tensors(inner, tensors) for inner in value)
    if not more and tag == _DTYPE:
        return getattr(torch, value)
    if not more and tag == _ITEMS:
        return {key: join_tensors(inner, tensors) for key, inner in value}
    return {key: join_tensors(inner, tensors) for key, inner in plain.items()}


def _plain(tree: Any, take: Callable[[str, Tensor], Any], path: str) -> Any:
    if isinstance(tree, Tensor):
        return take(path, tree)
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    if isinstance(tree, torch.dtype):
        return {_DTYPE: str(tree).removeprefix("torch.")}
    if isinstance(tree, (list, tuple)):
        values = [_plain(value, take, _below(path, number)) for number, value in enumerate(tree)]
        return {_TUPLE: values} if isinstance(tree, tuple) else values
    if isinstance(tree, Mapping):
        items = [(key, _plain(value, take, _below(path, key))) for key, value in tree.items()]
        # JSON would make texts of other keys; torch numbers parameters, and a tag must not be taken for one of ours.
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return dict(items)
        return {_ITEMS: [list(item) for item in items]}
    raise TypeError(f"{path} is a {type(tree).__name__}, which a checkpoint cannot hold: tensors and plain values only")


def _below(path: str, key: Any) -> str:
    return f"{path}/{key}" if path else str(key)
