"""What torch.compile and peft make of a network, and the network inside."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn


def bare(network: Any) -> Any:
    """The network that ``torch.compile`` or ``peft.get_peft_model`` has wrapped, however often.

    A wrapper hands calls and attributes on; but it is of another class, the names of its modules
    have a prefix, and its truth is not defined.
    """
    while True:
        if isinstance(network, PeftModel):
            network = network.get_base_model()
        elif isinstance(network, nn.Module) and "_orig_mod" in network._modules:
            network = network._orig_mod  # hasattr would take ten times as long, at every step
        else:
            return network
