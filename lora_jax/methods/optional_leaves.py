"""Pytree dataclasses with leaves that may be absent."""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import flax.serialization
import flax.struct
import jax

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(flax.struct.field,))
def dataclass(cls: type[T]) -> type[T]:
    """`flax.struct.dataclass`, but that a field whose default is None is no part of the tree while
    it is None. What was saved of a class before it had the field still has its structure."""
    made: Any = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(made)
    settings = [f.name for f in fields if not f.metadata.get("pytree_node", True)]
    leaves = [f for f in fields if f.name not in settings]

    def present(node: Any) -> tuple[str, ...]:
        return tuple(
            f.name for f in leaves if f.default is not None or getattr(node, f.name) is not None
        )

    def flatten_with_keys(node: Any) -> Any:
        names = present(node)
        children = [(jax.tree_util.GetAttrKey(name), getattr(node, name)) for name in names]
        return children, (names, tuple(getattr(node, name) for name in settings))

    def unflatten(static: Any, children: Any) -> Any:
        names, values = static
        return made(**dict(zip(names, children, strict=True)),
                    **dict(zip(settings, values, strict=True)))  # fmt: skip

    def to_state(node: Any) -> dict[str, Any]:
        return {name: flax.serialization.to_state_dict(getattr(node, name))
                for name in present(node)}  # fmt: skip

    def from_state(node: Any, state: dict[str, Any]) -> Any:
        names = present(node)
        if set(state) != set(names):
            raise ValueError(
                f"{made.__name__}: expected the fields {', '.join(names)}, found "
                f"{', '.join(state)}."
            )
        restored = {name: flax.serialization.from_state_dict(getattr(node, name), state[name])
                    for name in names}  # fmt: skip
        return dataclasses.replace(node, **restored)

    made.replace = dataclasses.replace
    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten)
    flax.serialization.register_serialization_state(made, to_state, from_state)
    return made
