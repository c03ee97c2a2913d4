"""CLIPs of every format as judges and as spaces, and features of true pictures that are kept."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
)

import tiny
from ldm.data.collection import Collection
from ldm.data.folder import FolderData
from ldm.data.images import ImageTransform, to_image, to_pixels
from ldm.errors import FeatureError
from ldm.evaluation.features import Space, space
from ldm.evaluation.reference import AT_MOST, TrueFeatures, of_items
from ldm.storage.tensor_cache import fingerprint

TEXTS = ["a red apple", "xyzzy", "a corgi on a red sofa, twice as long as the others are"]
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "patch_size": 8,
          "num_attention_heads": 2, "image_size": 32}  # fmt: skip
PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture
def drawn() -> torch.Tensor:
    """Three pictures of 48 px, outside [-1, 1] nowhere."""
    return torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


def of_transformers(folder: Path) -> tuple[Path, CLIPModel]:
    words = tiny.tokenizer()
    text = tiny.text_encoder(words).config.to_dict()
    config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return folder, model


def of_open_clip(folder: Path) -> tuple[Path, CLIP]:
    vision = {"layers": 1, "width": 32, "patch_size": 16, "image_size": 32, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
    cfg = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    model = CLIP(**cfg).eval()
    folder.mkdir()
    mean_and_std = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": cfg, "preprocess_cfg": mean_and_std})
    )
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder, model


@torch.no_grad()
def test_scores_of_a_pipelines_own_clip(tmp_path, drawn):
    folder, model = tiny.clip(tmp_path / "p")
    small = drawn[..., :16, :16]
    found, again = space(f"clip:{folder}"), space(f"clip:{folder}")
    assert fingerprint(*found.made_by) == fingerprint(*again.made_by)
    ids = tiny.tokenizer()(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    text = model.get_text_features(ids.input_ids).pooler_output
    picture = model.get_image_features(small).pooler_output
    assert found.judge is not None
    expected = 100 * cosine_similarity(text, picture).clamp(min=0)
    assert found.judge(TEXTS, small, batch=2) == pytest.approx(expected, abs=1e-4)
    assert cosine_similarity(found(small), picture) == pytest.approx(torch.ones(3))


@torch.no_grad()
def test_scores_of_a_clip_of_transformers(tmp_path, drawn):
    folder, model = of_transformers(tmp_path / "t")
    found, again = space(f"clip:{folder}"), space(f"clip:{folder}")
    judge = found.judge
    assert fingerprint(*found.made_by) == fingerprint(*again.made_by)
    words = tiny.tokenizer()
    inputs = words(
        TEXTS, padding=True, truncation=True, max_length=tiny.LENGTH, return_tensors="pt"
    )
    text = model.get_text_features(**inputs).pooler_output  # padded no further than it must be
    pixels = PROCESSOR([to_image(x) for x in drawn], return_tensors="pt").pixel_values
    picture = model.get_image_features(pixels).pooler_output
    expected = 100 * cosine_similarity(text, picture).clamp(min=0)
    assert judge is not None
    assert judge(TEXTS, drawn, batch=2) == pytest.approx(expected, abs=1e-3)


@torch.no_grad()
def test_scores_of_a_clip_of_open_clip(tmp_path, drawn):
    folder, model = of_open_clip(tmp_path / "o")
    found, again = space(f"clip:{folder}"), space(f"clip:{folder}")
    judge = found.judge
    assert fingerprint(*found.made_by) == fingerprint(*again.made_by)
    text = model.encode_text(open_clip.tokenize(TEXTS))
    cells = [to_image(x).resize((32, 32), Image.Resampling.BICUBIC) for x in drawn]
    levels = torch.stack([torch.from_numpy(np.array(c)).permute(2, 0, 1) for c in cells]) / 255
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    picture = model.encode_image((levels - mean[:, None, None]) / std[:, None, None])
    expected = 100 * cosine_similarity(text, picture).clamp(min=0)
    assert judge is not None
    assert judge(TEXTS, drawn, batch=2) == pytest.approx(expected, abs=1e-3)


@torch.no_grad()
def test_a_vision_model_is_a_space_and_a_clip_is_told_so(tmp_path, drawn):
    folder, _ = of_transformers(tmp_path / "t")
    with pytest.raises(FeatureError, match=f"it also reads texts: write clip:{folder}"):
        space(f"folder:{folder}")
    vision = tmp_path / "v"
    model = CLIPVisionModel(CLIPVisionConfig(**VISION)).eval()
    model.save_pretrained(vision)
    PROCESSOR.save_pretrained(vision)
    with pytest.raises(
        FeatureError, match=f"has no texts beside its pictures: write folder:{vision}"
    ):
        space(f"clip:{vision}")
    found = space(f"folder:{vision}")
    processor = AutoImageProcessor.from_pretrained(vision)  # on tensors, not by Pillow
    pixels = processor([to_image(x) for x in drawn], return_tensors="pt").pixel_values
    assert found(drawn) == pytest.approx(model(pixels).pooler_output, abs=1e-5)
    assert found.judge is None


@torch.no_grad()
def test_what_is_not_whole_is_told_in_one_line(tmp_path, drawn):
    def refused(spec: str) -> str:
        with pytest.raises(FeatureError) as error:
            space(spec)
        assert "\n" not in str(error.value)
        return str(error.value)

    folder, _ = of_transformers(tmp_path / "t")
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if k != "text_projection.weight"}, file,
              metadata={"format": "pt"})  # fmt: skip
    assert "its weights lack 1 tensors, text_projection.weight for one" in refused(f"clip:{folder}")
    file.write_bytes(file.read_bytes()[:100])
    assert refused(f"clip:{folder}").startswith(f"'clip:{folder}' cannot be loaded: ")
    file.unlink()
    assert refused(f"clip:{folder}").startswith(f"'clip:{folder}' cannot be loaded: ")
    folder, _ = of_open_clip(tmp_path / "o")
    (folder / "open_clip_model.safetensors").unlink()
    assert refused(f"clip:{folder}").startswith(f"'clip:{folder}' cannot be loaded: ")
    folder, _ = tiny.clip(tmp_path / "p")
    (folder / "tokenizer").rename(folder / "words")
    assert refused(f"clip:{folder}").endswith(f"there is no {folder / 'tokenizer'}")


class Pictures:
    """Those of a folder, which tell how often they were read."""

    def __init__(self, folder: Path) -> None:
        self.files, self.read = sorted(folder.glob("*.png")), 0

    def features(self, name: str = "these", size: int = 8) -> TrueFeatures:
        transform = ImageTransform(size=size)

        def pictures() -> list[torch.Tensor]:
            self.read += 1
            return [to_pixels(transform(Image.open(file))) for file in self.files]

        return TrueFeatures(lambda: [name], pictures, transform)


def network(weight: float, shown: str = "whole") -> Space:
    layer = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(layer.weight, weight)
    torch.nn.init.zeros_(layer.bias)
    return Space("folder:anywhere", lambda x: layer(x.mean((2, 3))), (layer, shown))


def test_features_are_made_once(own_cache, pictures, caplog):
    given = Pictures(pictures)
    first = given.features()
    expected = first(network(1.0))
    assert torch.equal(first(network(1.0)), expected) and given.read == 1
    assert torch.equal(given.features()(network(1.0)), expected) and given.read == 1
    # Other weights, other pictures, those cut or shown otherwise.
    assert torch.equal(given.features()(network(2.0)), 2 * expected)
    given.features("those")(network(1.0))
    given.features(size=16)(network(1.0))
    given.features()(network(1.0, "cut"))
    assert given.read == 5
    # What a network makes is kept, and what is none is not.
    files = sorted(own_cache.rglob("*.safetensors"))
    assert len(files) == 5
    given.features()(space("pixels:4"))
    assert sorted(own_cache.rglob("*")) == [own_cache / "features", *files]
    for file in files:
        file.write_bytes(b"broken")
    assert torch.equal(given.features()(network(1.0)), expected)
    assert given.read == 7 and "cannot be read and is made again" in caplog.text


def test_features_that_cannot_be_kept_are_used_all_the_same(own_cache, pictures, caplog):
    own_cache.mkdir()
    (own_cache / "features").write_text("no folder")
    assert Pictures(pictures).features()(network(1.0)).shape == (8, 2)
    assert "cannot be written, and is made again next time" in caplog.text


def test_features_of_a_data_set(own_cache, pictures, monkeypatch):
    def found(size: int) -> torch.Tensor:
        transform = ImageTransform(size=size)
        items = Collection(FolderData(path=str(pictures), held_out_fraction=0), transform).train
        return of_items(items, transform)(network(1.0))

    first = found(8)
    seen = [to_pixels(ImageTransform(size=8)(Image.open(pictures / f"{n}.png"))) for n in range(8)]
    assert first == pytest.approx(network(1.0)(seen), abs=1e-6)
    found(16)
    Image.new("RGB", (20, 20), (1, 2, 3)).save(pictures / "0.png")
    changed = found(8)
    assert torch.equal(changed[1:], first[1:]) and not torch.equal(changed[0], first[0])
    assert len(list(own_cache.rglob("features/*.safetensors"))) == 3
    assert AT_MOST > 8
    monkeypatch.setattr("ldm.evaluation.reference.AT_MOST", 4)
    assert torch.equal(found(8), changed[::2])
