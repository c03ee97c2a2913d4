"""A drawing that is not finite ends in one line that says where it arose, and what to try."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import tiny
from ldm.calls.running import NotFiniteError, Watch
from ldm.cli import app
from ldm.errors import RunError, ToldElsewhere
from ldm.evaluation import sheets

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def pipe() -> Any:
    return tiny.pipeline()


def told(pipe: Any, **arguments: Any) -> str:
    call = {"num_inference_steps": 3, "seed": 0, **arguments}
    with pytest.raises(NotFiniteError) as caught:
        pipe("a red heart", **call)
    (line,) = str(caught.value).splitlines()
    return line


DAMAGED = {
    "text_encoder": ("the text encoder, whose ", "token_embedding.weight"),
    "unet": ("the U-Net, at step 1 of 3, whose ", "conv_out.weight"),
    "vae": ("the decoder, whose ", "decoder.conv_in.weight"),
}


@pytest.mark.parametrize("part", DAMAGED)
@pytest.mark.parametrize("form", ["pil", "latent"])
def test_weights_that_are_no_numbers_are_named(pipe: Any, part: str, form: str) -> None:
    where, weight = DAMAGED[part]
    (found,) = (p for n, p in getattr(pipe, part).named_parameters() if n.endswith(weight))
    found.data[-1] = NAN
    if (part, form) == ("vae", "latent"):  # which nothing decodes
        assert pipe("a", num_inference_steps=1, output_type="latent").images.isfinite().all()
        return
    line = told(pipe, output_type=form)
    assert f"arose in {where}" in line and f"{weight} holds nan or inf: the file" in line


@pytest.mark.parametrize(
    "part, where", [("unet", r"the U-Net, at step \d of 3"), ("vae", "the decoder")]
)
def test_overflow_in_half_precision_says_which_to_take(pipe: Any, part: str, where: str) -> None:
    network = getattr(pipe, part)
    last = network.conv_out if part == "unet" else network.decoder.conv_out
    last.weight.data *= 40_000 / last.weight.abs().max()
    assert pipe("a", num_inference_steps=1, seed=0, guidance_scale=1).images  # float32 holds it
    network.to(torch.float16)
    line = told(pipe)
    assert re.search(where + ", in float16, which ends at 65,504: use bfloat16 or float32", line)


def test_guidance_the_sampler_and_what_is_passed(pipe: Any) -> None:
    assert "guidance or the sampler, at step 1 of 3; try" in told(pipe, guidance_scale=1e39)
    for latents in (
        torch.full((1, *tiny.LATENT), INF),
        torch.ones(1, *tiny.LATENT).double() * 1e99,
    ):
        with pytest.raises(
            ValueError, match="^latents hold nan or inf: pass standard normal noise$"
        ):
            pipe("a red heart", num_inference_steps=3, latents=latents)

    def spoil(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> Any:
        return {"latents": tensors["latents"] * NAN} if step == 1 else tensors

    line = told(pipe, callback_on_step_end=spoil)
    assert line.endswith("the latents that the callback returned at step 2 of 3")
    # Where a sampler cannot go on either.
    pipe.unet.conv_out.bias.data[:] = NAN
    assert "conv_out.bias holds nan" in told(pipe, sampler="ode-adaptive")
    assert "the U-Net, at step 1 of 3" in told(pipe, sampler="ode-heun")


def test_a_value_that_a_later_step_hides_is_told_too(pipe: Any) -> None:
    # x0 is clipped in pixel space, where inf comes out as 1: a picture, but not the model's.
    seen: list[int] = []

    def once(module: Any, inputs: Any, output: Any) -> None:
        seen.append(1)
        if len(seen) == 2:
            output.sample[:] = INF

    pipe.unet.register_forward_hook(once)
    replaced = lambda *_: {"latents": torch.zeros(1, *tiny.LATENT)}  # noqa: E731
    assert "the U-Net, at step 2 of 3; its weights are finite" in told(
        pipe, callback_on_step_end=replaced
    )


def test_nobody_waits_for_a_device_before_the_end() -> None:
    watch = Watch()
    nowhere = torch.empty(3, device="meta")  # whose numbers cannot be read
    watch.see(nowhere, "a step")
    with pytest.raises((NotImplementedError, RuntimeError)):
        watch.check()


def test_validation_drawings_end_a_run_in_one_line(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.unet.conv_out.bias.data[:] = NAN
    monkeypatch.setattr(sheets, "gather_object", lambda mine: mine)
    for rank, kind in ((0, RunError), (1, ToldElsewhere)):
        processes: Any = SimpleNamespace(
            process_index=rank, num_processes=2, is_main_process=rank == 0
        )
        with pytest.raises(kind) as caught:
            sheets.drawn(
                pipe, ["a", "b"], processes, what="a", seed=0, batch=1, num_inference_steps=2
            )
        assert type(caught.value) is kind and "\n" not in str(caught.value)
        assert ("arose in the U-Net" in str(caught.value)) == (rank == 0)  # one of them tells


def test_the_command_line_tells_it_in_one_line(pipe: Any, tmp_path: Path) -> None:
    pipe.unet.conv_out.bias.data[:] = NAN
    pipe.save_pretrained(tmp_path / "model")
    call = ["sample", "a", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "x.png")]
    for more, words in (
        ([], "it arose in the U-Net, at step 1 of 2, whose conv_out.bias holds nan or inf"),
        (["--guidance", "nan"], "guidance_scale must be a finite number, not nan"),
    ):
        result = CliRunner().invoke(app, [*call, "--steps", "2", *more])
        assert result.exit_code == 2 and words in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "x.png").exists()
