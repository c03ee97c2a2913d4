"""A text tower of open_clip against the ``CLIPTextModel`` and the tokenizer made from its files."""

import json
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.errors import ConfigError
from ldm.families.build import build
from ldm.formats.open_clip import Tower
from ldm.models.conditioner import TextConditioner
from runs import tree

WIDTH, LAYERS = 32, 3
VISION = {"layers": 1, "width": 32, "patch_size": 16, "image_size": 32, "head_width": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 4, "layers": LAYERS}
TEXTS = [
    "a corgi on a red sofa",
    "",
    "An  OIL painting,\tof 3,000 CATS (1889) -- don't ask!",
    "Ça va, élève naïf?",
    "日本語 テスト",
    "\U0001f34e apple 🧑‍🚀",
    "under_score a_b ~^`\\ {c|d}",
    "they're I'll we've 's",
    "it costs $9.99 & 50% off",
    "Здравствуй мир, العربية",
    "x" * 60 + " " + "antidisestablishmentarianism",
    "a very long prompt " * 30,
    "  leading and trailing  ",
]


def model_cfg(**changes) -> dict:
    return {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT | changes}


def saved(folder: Path, kind=CLIP, quick: bool = False, **changes) -> tuple[Path, torch.nn.Module]:
    """A folder as on the Hub, and the random model in it."""
    cfg = model_cfg(**changes)
    model = kind(**cfg, quick_gelu=quick).eval()
    for name, value in model.state_dict().items():
        if name.endswith("bias") or ".ln_" in name:  # open_clip's own are 0 and 1
            value.add_(0.1 * torch.randn_like(value))
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": cfg | {"quick_gelu": quick}, "preprocess_cfg": {}})
    )
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder, model


def hidden(model: torch.nn.Module, ids: Tensor, layers: int = LAYERS) -> Tensor:
    """Tokens after the final norm behind ``layers`` layers, with open_clip's own modules."""
    text = model.text if isinstance(model, CustomTextCLIP) else model
    x = text.token_embedding(ids) + text.positional_embedding
    for block in text.transformer.resblocks[:layers]:
        x = block(x, attn_mask=text.attn_mask)
    return text.ln_final(x)


@pytest.mark.parametrize("quick", [False, True], ids=["gelu", "quick_gelu"])
@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
@torch.no_grad()
def test_hidden_states(tmp_path: Path, kind: type, quick: bool) -> None:
    folder, model = saved(tmp_path / "m", kind, quick)
    tower, before = Tower(folder), torch.get_rng_state()
    text_encoder, words = tower.text_encoder(), tower.tokenizer()
    assert torch.equal(torch.get_rng_state(), before)
    ids = open_clip.tokenize(TEXTS)
    found = TextConditioner(words, text_encoder).encode(TEXTS)
    expected = hidden(model, ids)
    assert expected.std() > 0.5
    assert (found.tokens - expected).abs().max() < 1e-5
    # The same through the tower as a whole: its features are the projected end of the text.
    text = model.text if kind is CustomTextCLIP else model
    pooled = found.pooled @ text.text_projection
    assert (pooled - model.encode_text(ids)).abs().max() < 1e-5
    # The activation is not the other one's.
    other = kind(**model_cfg(), quick_gelu=not quick).eval()
    other.load_state_dict(model.state_dict())
    assert (hidden(other, ids) - expected).abs().max() > 1e-3


def test_ids(tmp_path: Path) -> None:
    words = Tower(saved(tmp_path / "m")[0]).tokenizer()
    found = words(TEXTS, padding="max_length", truncation=True, max_length=77).input_ids
    expected = open_clip.tokenize(TEXTS).tolist()
    for text, ours, theirs in zip(TEXTS, found, expected, strict=True):
        assert ours == theirs, text
    assert words.pad_token == "!" and words.pad_token_id == 0 and len(words) == 49408


def config(folder: Path, **changes) -> TrainConfig:
    return validate(TrainConfig, tree(Path("run"), text=str(folder), **changes))


@torch.no_grad()
def test_the_penultimate_layer_in_a_run_and_in_its_folder(tmp_path: Path) -> None:
    from ldm.tasks.denoising import pipeline

    folder, model = saved(tmp_path / "m")
    made = build(config(folder, text_layers=LAYERS - 1), [])
    ids = open_clip.tokenize(TEXTS)
    expected = hidden(model, ids, LAYERS - 1)
    assert (expected - hidden(model, ids)).abs().max() > 0.1
    found = made.conditioner.encode(TEXTS)
    assert (found.tokens - expected).abs().max() < 1e-5
    pipeline(made).save_pretrained(tmp_path / "p")
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "p")
    tokens = stock.tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(tokens.input_ids, ids.long())
    assert torch.equal(stock.text_encoder(tokens.input_ids)[0], found.tokens)


@torch.no_grad()
def test_every_file_that_open_clip_writes(tmp_path: Path) -> None:
    folder, model = saved(
        tmp_path / "m", norm_kwargs={"eps": 1e-3}, act_kwargs={"approximate": "tanh"}
    )
    expected = hidden(model, open_clip.tokenize(["a cat"]))
    weights = folder / "open_clip_model.safetensors"
    state = load_file(weights)
    weights.unlink()
    checkpoint = {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    for name, content in (
        ("open_clip_pytorch_model.bin", state),
        ("epoch_1.pt", checkpoint),
    ):
        torch.save(content, folder / name)
        path = folder if name.startswith("open_clip") else folder / name
        tower = Tower(path)
        found = TextConditioner(tower.tokenizer(), tower.text_encoder()).encode(["a cat"])
        assert (found.tokens - expected).abs().max() < 1e-5
    # Weights in half precision are read as float32, in which everything else is.
    save_file({k: v.half() for k, v in state.items()}, weights)
    assert {v.dtype for v in Tower(weights).text_encoder().state_dict().values()} == {torch.float32}


def refused(path: Path, **changes) -> str:
    with pytest.raises(ConfigError) as error:
        build(config(path, **changes), [])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_text_tower_of_clip(tmp_path: Path, monkeypatch) -> None:
    folder, _ = saved(tmp_path / "m")
    file, weights = folder / "open_clip_config.json", folder / "open_clip_model.safetensors"
    good = json.loads(file.read_text())

    def told(**text) -> str:
        file.write_text(json.dumps({"model_cfg": model_cfg(**text)}))
        return refused(folder)

    assert told(hf_model_name="roberta-base").startswith(
        f"text: {file}: a tower with hf_model_name 'roberta-base' is no CLIPTextModel"
    )
    assert "a tower with no_causal_mask True is no CLIPTextModel" in told(no_causal_mask=True)
    assert "act_kwargs {'x': 1} are not known" in told(act_kwargs={"x": 1})
    assert f"lacks encoder.layers.{LAYERS}." in told(layers=LAYERS + 1)
    assert "has, beyond its config, encoder.layers.2" in told(layers=LAYERS - 1)
    assert "final_layer_norm.bias is (32,), and by open_clip_config.json (64,)" in told(width=64)
    file.write_text("{}")
    assert "cannot be read as a config of open_clip: KeyError('model_cfg')" in refused(folder)
    file.write_text(json.dumps(good))
    assert refused(folder, text_layers=9) == "text_layers 9: the text encoder has 3"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "open_clip.tokenizer", None)
        assert refused(folder).endswith("which is missing: pip install open_clip_torch")
    weights.write_bytes(b"nothing")
    assert f"{weights} cannot be read as weights: " in refused(folder)
    weights.unlink()
    assert "holds neither open_clip_model.safetensors nor open_clip_pytorch" in refused(folder)
    evil = folder / "open_clip_pytorch_model.bin"
    torch.save({"text_projection": Runs()}, evil)
    assert f"{evil} cannot be read as weights: " in refused(folder)
    assert not Runs.ran
    torch.save({"a": torch.zeros(2)}, evil)
    assert "a is no tensor of a CLIP text tower" in refused(folder)


class Runs:
    """Code in a pickle."""

    ran = False

    def __reduce__(self):
        return _run, ()


def _run() -> None:
    Runs.ran = True


def test_text_layers_of_any_folder(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "p")
    whole = build(config(folder), []).networks["text_encoder"]
    cut = build(config(folder, text_layers=1), []).networks["text_encoder"]
    assert (len(whole.encoder.layers), len(cut.encoder.layers)) == (2, 1)
    assert cut.config.num_hidden_layers == 1
    with pytest.raises(ConfigError, match="text_layers: a described text encoder has text.layers"):
        validate(TrainConfig, tree(Path("run"), text_layers=1))
