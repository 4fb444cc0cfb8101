"""Parameters of generators with their blocks one by one, as files have them, or stacked, as models with `scan` do."""

import functools

import jax
import numpy as np

from eqvae_jax.generators.networks import example_inputs
from eqvae_jax.weights.errors import WeightsError


def stack_blocks(params):
    """Parameters for a model with `scan` from those of one without; stacked ones are returned as they are."""
    if "blocks" in params:
        return params
    depth = sum(name.startswith("block_") for name in params)
    rest = {name: value for name, value in params.items() if not name.startswith("block_")}
    blocks = [params[f"block_{i}"] for i in range(depth)]
    return rest | {"blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)}


def unstack_blocks(params):
    """Parameters for a model without `scan` from those of one with; others are returned as they are."""
    if "blocks" not in params:
        return params
    stacked = {name: value for name, value in params.items() if name != "blocks"}
    depths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(params["blocks"])}
    if len(depths) != 1 or depths == {()}:
        raise WeightsError("the stacked parameters under \"blocks\" do not agree on how many blocks there are")
    for i in range(depths.pop()[0]):
        stacked[f"block_{i}"] = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), params["blocks"])
    return stacked


@functools.cache
def parameter_shapes(model):
    """Tree of ShapeDtypeStruct of the parameters without `scan`, nothing computed; not to be changed by the caller.

    Raises WeightsError where the model's own fields do not fit together.
    """
    shallow = {"alignment_depth": 1} if hasattr(model, "alignment_depth") else {}
    try:
        one = model.clone(depth=1, scan=False, **shallow)
        one = jax.eval_shape(one.init, jax.random.key(0), *example_inputs(model))["params"]
    except (ValueError, TypeError, ArithmeticError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(f"no {type(model).__name__} has these sizes: {reason}") from error
    block = one.pop("block_0")
    return one | {f"block_{i}": block for i in range(model.depth)}
