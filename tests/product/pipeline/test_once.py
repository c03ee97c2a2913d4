"""What a call of the pipeline does once, and not at every step or for every batch."""

import inspect
from typing import Any

import pytest
import torch

import tiny
from ldm.diffusion import Condition, Level
from ldm.diffusion.process import Tabulated
from ldm.models import codec
from ldm.models.lora import scaled


@pytest.fixture
def pipe() -> Any:
    return tiny.pipeline("v")


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """What is passed to ``owner.name`` from here on."""
    real, calls = getattr(owner, name), []

    def call(*told: Any, **named: Any) -> Any:
        calls.append(told or named)
        return real(*told, **named)

    monkeypatch.setattr(owner, name, call)
    return calls


def draw(pipe: Any, **told: Any) -> torch.Tensor:
    call = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt", "seed": 0}
    return pipe(["a", "b", "a", "c"], batch_size=2, **call | told).images


def test_a_text_is_encoded_once(pipe, monkeypatch):
    rows = counted(monkeypatch, pipe.text_encoder, "forward")
    joined = counted(monkeypatch, Condition, "cat")
    draw(pipe)
    # Two batches of two prompts, and the text of nothing for both.
    assert [len(call[0] if isinstance(call, tuple) else call["input_ids"]) for call in rows] == [
        2, 1, 2,
    ]  # fmt: skip
    assert len(joined) == 2  # [nothing, prompts] of each batch
    del rows[:]
    pipe(["a", "a", "a"], num_inference_steps=1, output_type="latent", seed=0)
    assert len(rows) == 2


def test_signatures_are_read_once(pipe, monkeypatch):
    draw(pipe)
    read = counted(monkeypatch, inspect, "signature")
    draw(pipe)
    assert not [of for (of,) in read if of.__name__ == "__init__"]  # stock: twenty times
    walked = counted(monkeypatch, torch.nn.Module, "modules")
    with scaled([pipe.unet], 1.0):  # there is nothing to look for
        assert not walked
    assert pipe.components.keys() == set(pipe.config) - {
        "requires_safety_checker", "force_zeros_for_empty_prompt", "requires_aesthetics_score",
        "classes", "sampling",
    } - {name for name in pipe.config if name.startswith("_")}  # fmt: skip


def test_levels_are_worked_out_once(pipe, monkeypatch):
    """A second call with the same steps finds them, and draws the same."""
    first = draw(pipe, sampler="ode-heun")
    asked = counted(monkeypatch, Tabulated, "_log_alpha")
    times = counted(monkeypatch, Level, "like")
    assert torch.equal(draw(pipe, sampler="ode-heun"), first)
    # What remains is the whole table, twice as the target is looked at, and the end.
    assert all(call[1].numel() > 1 or float(call[1]) == 1 for call in asked)
    assert times


def test_a_step_told_a_number_is_that_told_a_tensor(pipe, monkeypatch):
    from diffusers import DDIMScheduler

    told = counted(monkeypatch, DDIMScheduler, "step")
    for name in (None, "ddim"):
        draw(pipe, sampler=name)
    assert len(told) == 2 * 2 * 4 and all(type(call[2]) is int for call in told)


def test_pictures_are_decoded_in_slices(pipe, monkeypatch):
    latent = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = pipe.codec.decode(latent)
    decoded = counted(monkeypatch, pipe.vae, "decode")
    monkeypatch.setattr(codec, "_PIXELS", 2 * whole.shape[-1] * whole.shape[-2] + 1)
    parts = pipe.codec.decode(latent)
    assert [len(call[0]) for call in decoded] == [2, 2, 1]
    assert torch.allclose(parts, whole, atol=1e-5)
    monkeypatch.setattr(codec, "_PIXELS", 1)  # less than one
    assert pipe.codec.decode(latent).shape == whole.shape and len(decoded) == 3 + 5


def test_what_is_not_finite_is_seen_by_its_sum():
    from ldm.calls.running import Watch
    from ldm.errors import NotFiniteError

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        watch = Watch()
        watch.see(torch.full((2, 40000), 60000.0, dtype=dtype), "a large one")  # no half holds it
        watch.check()
        for value, where in ((float("nan"), "one"), (float("inf"), "two")):
            bad = torch.zeros(3, 4, dtype=dtype)
            bad[1, 2] = value
            watch.see(bad, where)
        with pytest.raises(NotFiniteError, match="it arose in one"):
            watch.check()
