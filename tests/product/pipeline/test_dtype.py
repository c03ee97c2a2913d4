"""What ``ldm sample`` and ``ldm evaluate`` compute in."""

import torch

from ldm.cli.options import Dtype


def test_what_the_commands_compute_in(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert Dtype.auto.on("cuda:1") is torch.bfloat16 and Dtype.auto.on("cpu") is torch.float32
    assert Dtype.float16.on("cpu") is torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert Dtype.auto.on("cuda") is torch.float32
