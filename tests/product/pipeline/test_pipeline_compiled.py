"""``pipe.compile()``."""

import pytest
import torch

import tiny
import tiny_sd3
from launched import digests
from ldm.pipeline import LatentDiffusionPipeline


def transformer() -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline(**tiny_sd3.components(), unet=None)


@pytest.mark.parametrize("made", [tiny.pipeline, transformer])
def test_compiled_blocks_draw_the_same(made, tmp_path, traced):
    pipe = made()
    told = {"num_inference_steps": 2, "seed": 0, "output_type": "pt"}
    plain = pipe(["a", "b"], **told).images
    pipe.save_pretrained(tmp_path / "plain")
    blocks = pipe.compile()
    assert blocks == sum(m._compiled_call_impl is not None for m in pipe.network.modules()) >= 1
    assert not traced  # nothing yet
    assert torch.equal(pipe(["a", "b"], **told).images, plain) and traced
    pipe.save_pretrained(tmp_path / "compiled")
    assert digests(tmp_path / "compiled", at_least=2) == digests(tmp_path / "plain", at_least=2)
