"""From params to a frozen base and a small delta, and from these to weights."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import paths
from lora_jax.extras import bound, inserted, require_free, require_one
from lora_jax.layouts import Layout
from lora_jax.methods import DeltaNode, Extra, Method, MisfitError
from lora_jax.methods.method import of_values
from lora_jax.nodes import rows_behind_layers
from lora_jax.targets import PRESETS, Targets, as_rules, match_rules
from lora_jax.weights import PyTree, Shared, dense_float32, is_weight

Delta = dict[str, Any]


def lora_transform(
    params: PyTree,
    method: Method | Mapping[str, Method | None],
    *,
    targets: Targets = "all-linear",
    key: jax.Array,
    layouts: Mapping[str, Layout | None] | None = None,
) -> tuple[PyTree, Delta]:
    """Splits `params` into a frozen base and an initial delta.

    Bound to that base, an initial delta changes nothing, except for `Prompt` and `Prefix`, which
    put new rows in front of the model's, and `Fusion`, whose adapters are already trained.

    Args:
      params: any pytree of arrays, or of quantised weights, concrete or abstract. Other leaves
        (functions, strings, Python numbers) stay as they are. Where a method is initialised from
        the values of an abstract weight (DoRA, PiSSA, OLoRA, a prompt of words), its node is
        abstract too.
      method: what to put on each target: one method, or an ordered mapping `{target: method}` in
        which the first rule that matches a path wins and None leaves a path frozen.
      targets: for a single method: a preset ("qv", "attention", "mlp", "all-linear"), a regular
        expression over whole components of the slash-joined path, or a sequence of them.
      key: a typed key. Each weight derives its own key from its path, and each stacked layer from
        its index: other targets never change a weight's numbers.
      layouts: `{path: Layout}` for weights that are more than stacked matrices, and None for leaves
        that are none; `infer_layouts` makes it.

    Returns:
      `(base, delta)`: the frozen tree, which equals `params`, and a nested dict that holds a delta
      node at each targeted path.

    Raises:
      ValueError: for a rule that matches nothing, a target that holds integers or is not an array,
        a layout of a path that does not exist, two parameters at one path, a `key` that is not one
        key; for a rank larger than a matrix that a target names, all of them in one message. A
        preset passes over such a matrix, and `describe` says so.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.
    """
    layouts = dict(layouts or {})
    key = paths.one_key(key)
    flat = paths.flatten(params, is_leaf=is_weight)
    for path in layouts:
        _known(path, flat, "layouts names")
    rules = as_rules(method, targets)
    for rule, chosen in rules.items():
        if chosen is not None and not isinstance(chosen, Method):
            raise ValueError(
                f"target {rule!r} is mapped to {chosen!r}: expected a method such as "
                "LoRA(rank=8), or None to leave the target frozen."
            )

    nodes: dict[str, DeltaNode] = {}
    by_method: dict[Method, dict[str, Any]] = {}
    axes: dict[str, Layout] = {}
    misfits: dict[str, dict[str, str]] = {rule: {} for rule in rules}
    for match in match_rules(flat, rules, layouts):
        weight = flat[match.path]
        layout = layout_of(match.path, weight, layouts)
        _require_float(match.path, weight)
        try:
            node = _init_node(match.path, weight, match.method, layout, key)
        except MisfitError as misfit:
            misfits[match.rule][match.path] = str(misfit)
            continue
        by_method.setdefault(match.method, {})[match.path] = weight
        axes[match.path] = layout
        if node is not None:
            nodes[match.path] = node
    _require_fitting(misfits, by_method)
    owners: dict[str, Method] = {}
    for chosen, weights in by_method.items():
        make = functools.partial(chosen.extras, layouts=axes, key=key)
        for path, extra in of_values(chosen, make, weights).items():
            require_free(path, extra, flat)
            require_one(path, extra, owners.get(path), chosen)
            owners[path], nodes[path] = chosen, extra
    return _rebuilt(params, flat), paths.nest(nodes)


def bind(
    base: PyTree,
    delta: Delta,
    *,
    dropout_key: jax.Array | None = None,
    adapter_ids: jax.Array | None = None,
) -> PyTree:
    """The weights that a model runs with: a tree shaped as `base`, adapted where `delta` says.

    Nothing is computed: an adapted leaf becomes an `Adapted` pair that `linear` and `embed` apply
    (with a `Full` delta, the sum). No gradient flows to the base.

    Args:
      base: the frozen tree.
      delta: its delta; with `adapter_ids`, several of them from `stack`.
      dropout_key: a typed key, which turns the adapters' dropout on. Each weight and layer derives
        its own from it, and with `adapter_ids` each row.
      adapter_ids: integers `[batch]`, the adapter of the stack that each row of a batch uses. Axis
        0 of every activation that meets an adapted weight must then be the batch. Ids outside the
        stack are not checked: what such a row gets is undefined.

    Raises:
      ValueError: where the delta has a path that the base lacks, or a node for another shape, or
        puts a prompt or a prefix where the base has a leaf; with `adapter_ids`, for a `Full` delta.
    """
    nodes = {path: _only_trainable(node) for path, node in delta_nodes(delta).items()}
    extras = _extras(nodes)
    if dropout_key is not None:
        dropout_key = paths.one_key(dropout_key, "dropout_key")
    flat = {
        path: jax.lax.stop_gradient(leaf) if paths.is_array(leaf) else leaf
        for path, leaf in paths.flatten(base, is_leaf=is_weight).items()
    }
    for path, extra in extras.items():
        require_free(path, extra, flat)
    for path, node in nodes.items():
        if path in extras:
            continue
        _known(path, flat, "the delta adapts")
        weight, ids = flat[path], None
        one = node if adapter_ids is None else jax.tree.map(lambda leaf: leaf[0], node)
        one.check(path, weight)
        with paths.naming(path):
            node = node.resolve(weight, nodes)
        if adapter_ids is not None:
            node, ids = rows_behind_layers(node, one.stack_ndim), Shared(adapter_ids)
        keys = dropout_key
        if keys is not None:
            keys = paths.keys_for(keys, path, one.sizes().get("stack", ()))
        flat[path] = node.bind(weight, keys, ids)
    weights = _rebuilt(base, flat)
    for path, extra in extras.items():
        if extra.in_weights:
            weights = inserted(weights, path.split("/"), bound(extra, adapter_ids))
    return weights


def merge(base: PyTree, delta: Delta, *, requantize: bool = False) -> PyTree:
    """Plain arrays again: each adapted weight as one dense matrix of its base's dtype.

    `W + scale * a @ b`, summed in float32 and rounded once. Merging into a quantised base
    dequantises the adapted weights; with `requantize` they return to their base's format, whose
    codes are chosen for the float32 sum.

    Raises:
      ValueError: for a method without a merged form, or a delta that does not fit the base.
    """

    def merged(node, weight):
        if requantize and is_weight(weight):
            return weight.requantized(node.merge(dense_float32(weight)))
        return node.merge(weight)

    return _map_adapted(base, delta, merged)


def unmerge(params: PyTree, delta: Delta) -> PyTree:
    """The base that `merge(base, delta)` was made from, up to one rounding in its dtype.

    A bf16 weight loses bits when it is merged, and no later subtraction restores them: keep
    the base instead where you can. Where the merge lost more (an IA3 factor of zero, a DoRA
    column shorter than its update), the result is NaN.

    Args:
      params: what `merge` returned, of plain arrays where the delta adapts: not requantized.
      delta: what was merged.

    Raises:
      ValueError: for a method without a merged form, a delta that does not fit the tree, or a
        weight that is quantised.
    """

    def unmerged(node, weight):
        if is_weight(weight):
            raise ValueError(
                f"{type(weight).__name__} cannot be unmerged: its codes were chosen for the merged "
                "weight. Keep the base, or dequantize(params) first and take the difference."
            )
        return node.unmerge(weight)

    return _map_adapted(params, delta, unmerged)


def delta_nodes(delta: Delta) -> dict[str, DeltaNode]:
    """`{path: node}` of a delta, in its own order.

    Raises:
      ValueError: for a leaf that belongs to no delta node.
    """
    flat = paths.flatten(delta, is_leaf=lambda leaf: isinstance(leaf, DeltaNode))
    for path, leaf in flat.items():
        if not isinstance(leaf, DeltaNode):
            raise ValueError(
                f"{path}: expected a delta node, found {type(leaf).__name__}. A delta is what "
                "lora_transform returns second."
            )
    return flat


def layout_of(path: str, weight: Any, layouts: Mapping[str, Layout | None]) -> Layout:
    """The layout in which a targeted leaf is adapted."""
    return layouts.get(path) or (weight.layout if is_weight(weight) else Layout())


def misfit(path: str, weight: Any, method: Method, layout: Layout) -> str | None:
    """Why a preset passes over a leaf that it matches; None where the leaf fits the method."""

    def make(weight, key):
        return _init_node(path, weight, method, layout, key)

    try:
        jax.eval_shape(make, weight, jax.random.key(0))
    except MisfitError as error:
        return str(error).removeprefix(f"{path}: ")
    return None


def _init_node(
    path: str, weight: Any, method: Method, layout: Layout, key: jax.Array
) -> DeltaNode | None:
    with paths.naming(path):
        stack, _, _ = layout.split(weight.shape) if method.needs_matrix else ((), (), ())
        keys = paths.keys_for(key, path, stack)
        own = method.in_groups(layout.groups)
        make = functools.partial(own.init_node, path, layout=layout, key=keys)
        return of_values(own, make, weight)


def _require_fitting(misfits: dict[str, dict[str, str]], taken: dict[Method, Any]) -> None:
    """Raises ValueError where an explicit target does not fit a leaf, for all such leaves in one
    message, or where nothing that the presets match fits."""
    named = [text for rule, of in misfits.items() if rule not in PRESETS for text in of.values()]
    passed = [text for rule, of in misfits.items() if rule in PRESETS for text in of.values()]
    if named or (passed and not taken):
        raise ValueError("\n".join(named or passed))


def _map_adapted(tree: PyTree, delta: Delta, change) -> PyTree:
    nodes = delta_nodes(delta)
    flat = paths.flatten(tree, is_leaf=is_weight)
    for path, node in nodes.items():
        if isinstance(node, Extra) and not node.in_weights:
            continue
        if not isinstance(node, Extra):
            _known(path, flat, "the delta adapts")
            node.check(path, flat[path])
        weight: Any = flat.get(path)  # an extra has none
        with paths.naming(path):
            flat[path] = change(node.resolve(weight, nodes), weight)
    return _rebuilt(tree, flat)


def _rebuilt(tree: PyTree, flat: Mapping[str, Any]) -> PyTree:
    """A tree of `tree`'s structure with the leaves that `flat` lists in its order."""
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_weight), flat.values())


def _extras(nodes: Mapping[str, DeltaNode]) -> dict[str, Extra]:
    return {path: node for path, node in nodes.items() if isinstance(node, Extra)}


def _only_trainable(node: DeltaNode) -> DeltaNode:
    """The node with no gradient to what does not train. It is stopped here, outside the model's
    scan over layers, which would otherwise keep a copy of each stopped slice for the way back."""

    def stop(leaf, trains):
        return leaf if trains else jax.lax.stop_gradient(leaf)

    return jax.tree.map(stop, node, node.trainable())


def _known(path: str, flat: Mapping[str, Any], what: str) -> None:
    if path not in flat:
        raise ValueError(
            f"{what} {path!r}, which the tree does not have; the nearest paths are: "
            f"{', '.join(paths.nearest(path, flat))}. The tree's structure must be the one that "
            "the delta was made for."
        )


def _require_float(path: str, weight: Any) -> None:
    if not paths.is_array(weight):
        raise ValueError(
            f"{path} is a {type(weight).__name__}: only arrays and quantised weights can be "
            f"adapted. Leave it out with {{{path!r}: None, ...}}."
        )
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(
            f"{path} holds {weight.dtype}: only floating-point (or quantised) weights can be "
            f"adapted. Leave it out with {{{path!r}: None, ...}}."
        )
