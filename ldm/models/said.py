"""What a text tower says to the ids of its tokens, at which of its layers."""

from __future__ import annotations

from typing import Any

from jaxtyping import Int64
from torch import Tensor

from ldm.diffusion import Condition
from ldm.models.wrapped import bare


def said(
    network: Any,
    ids: Int64[Tensor, "b l"],
    mask: Tensor,
    layer: int | None,
    pooled: str | None,
    *,
    masked: bool = False,
    skip: int = 0,
) -> Condition:
    """What a text tower says to ``ids``.

    Args:
        network: of transformers.
        ids: ``b l``.
        mask: bool ``b l``, true where a token is real.
        layer: see ``TextConditioner``.
        pooled: the same.
        masked: whether the tower is given the mask.
        skip: layers further from the end, of a CLIP; the norm that ends one is of no layer.
    """
    hidden = {} if layer is None and not skip else {"output_hidden_states": True}
    # Without values a mask says nothing, and transformers asks whether it is all ones.
    heeded = mask.long() if masked and not ids.is_meta else None
    output = network(ids, attention_mask=heeded, **hidden)
    if layer is not None:
        tokens = output.hidden_states[layer - skip]
    elif skip:
        tokens = _ended(network, output.hidden_states[-1 - skip])
    else:
        tokens = output.last_hidden_state
    return Condition(tokens, mask, getattr(output, pooled) if pooled else None)


def _ended(network: Any, hidden: Tensor) -> Tensor:
    tower = bare(network)
    return getattr(tower, "text_model", tower).final_layer_norm(hidden)
