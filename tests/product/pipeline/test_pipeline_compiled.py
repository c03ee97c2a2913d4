"""``pipe.compile()``."""

import pytest
import torch

import tiny
import tiny_sd3
from launched import digests
from ldm.models import compiled
from ldm.pipeline import LatentDiffusionPipeline


def transformer() -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline(**tiny_sd3.components(), unet=None)


@pytest.mark.parametrize("made", [tiny.pipeline, transformer])
def test_compiled_blocks_draw_the_same(made, tmp_path, monkeypatch):
    """With the backend that runs what was traced as it is; another would round otherwise."""
    calls = []
    monkeypatch.setattr(compiled, "BACKEND", lambda graph, _: (calls.append(1), graph.forward)[1])
    pipe = made()
    told = {"num_inference_steps": 2, "seed": 0, "output_type": "pt"}
    plain = pipe(["a", "b"], **told).images
    pipe.save_pretrained(tmp_path / "plain")
    blocks = pipe.compile()
    assert blocks == sum(m._compiled_call_impl is not None for m in pipe.network.modules()) >= 1
    assert not calls  # nothing yet
    assert torch.equal(pipe(["a", "b"], **told).images, plain) and calls
    pipe.save_pretrained(tmp_path / "compiled")
    assert digests(tmp_path / "compiled", at_least=2) == digests(tmp_path / "plain", at_least=2)
