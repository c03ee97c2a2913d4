"""Classifiers and a CLIP that know noise: trained by their programs, used as guidance."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer
from typer.testing import CliRunner

import tiny
from ldm.cli import app
from ldm.config.classifier import ClassifierConfig
from ldm.config.clip import ClipConfig
from ldm.config.loader import validate
from ldm.demo.shapes import ShapesData
from ldm.diffusion import Condition, DiscreteVP
from ldm.engine.state import OtherRunError
from ldm.errors import ConfigError, FeatureError
from ldm.evaluation.features import clip
from ldm.guidance import Chain, ClassifierFree, ClipPotential, Gradient, LabelPotential
from ldm.models.classifier import NoisyClassifier
from ldm.models.clip import Clip
from ldm.models.clip_size import ClipSize
from ldm.pipeline import LatentDiffusionPipeline
from ldm.tasks import classifier as train_classifier
from ldm.tasks import clip as train_clip
from programs import told
from runs import accelerator

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with an ``image_encoder``."""
    folder = tiny.folder(tmp_path_factory.mktemp("model") / "tiny")
    size = ClipSize(text_width=tiny.WIDTH, text_layers=2, text_heads=4, vision_width=16,
                    vision_layers=1, vision_heads=2, size=16, projection=8)  # fmt: skip
    clip = size.build(tiny.tokenizer(), 0)
    clip.save_text(folder / "text_encoder")
    clip.save_vision(folder / "image_encoder")
    return folder


def tree(run: Path, **changes: Any) -> dict[str, Any]:
    return {
        "run": str(run),
        "data": {"kind": "shapes", "count": 200, "size": 16},
        "images": {"size": 16},
        "labels": {"dark": "on an? (black|light gray) background", "white": "white background"},
        "classifier": {"block_out_channels": [16, 32], "norm_num_groups": 8},
        "batch_size": 16,
        "duration": "3 steps",
        "validation": {"every": "3 steps", "images": 4, "levels": 3},
        "checkpoints": {"every": "2 steps"},
        **changes,
    }


def unlabelled(run: Path) -> dict[str, Any]:
    return {k: v for k, v in tree(run).items() if k not in ("labels", "classifier")}


def train(run: Path, **changes: Any) -> Path:
    config = validate(ClassifierConfig, tree(run, **changes))
    return train_classifier.train(config, accelerator())


def test_a_classifier_learns_and_points_the_way(tmp_path: Path) -> None:
    """Backgrounds of pictures, from random init."""
    folder = train(tmp_path / "run", duration="40 steps", optimizer={"lr": 2e-3}, ema=None,
                   validation={"every": "40 steps", "images": 16, "levels": 3})  # fmt: skip
    classifier = NoisyClassifier.from_pretrained(folder).eval()
    assert classifier.config.labels == ["dark", "white"] and classifier.config.in_channels == 3
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    per_level = [float(v) for v in re.findall(r'held_out_accuracy/0\.\d+": ([\d.]+)', lines)]
    assert len(per_level) == 3 and per_level[0] > 0.9
    # Guided towards one label, it is the one that the classifier finds.
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.3
    level = DiscreteVP().at(torch.tensor(100.0))
    potential = LabelPotential(classifier, torch.tensor([0, 1, 0, 1]))
    x = x.requires_grad_()
    log_p = potential(x, level, torch.tensor(100.0), Condition(torch.zeros(4, 1, 1)))
    assert log_p.shape == (4,) and bool((log_p < 0).all())
    (gradient,) = torch.autograd.grad(log_p.sum(), x)
    brighter = gradient.mean((1, 2, 3)) > 0
    assert brighter.tolist() == [False, True, False, True]


def test_latents_of_a_model_and_going_on(tmp_path: Path, model: Path) -> None:
    whole = train(tmp_path / "whole", model=str(model))
    # From its checkpoint after 2 steps, the third is the same.
    halved = tmp_path / "halved"
    train(halved, model=str(model), checkpoints={"every": "2 steps", "keep": 2})
    newest = sorted((halved / "checkpoints").iterdir())
    for folder in (newest[-1], halved / "final"):
        folder.rename(folder.with_name(f"gone-{folder.name}"))
    resumed = train(halved, model=str(model), checkpoints={"every": "2 steps", "keep": 2})
    weights = [NoisyClassifier.from_pretrained(f).state_dict() for f in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert NoisyClassifier.from_pretrained(whole).config.in_channels == 4
    pipe = tiny.pipeline()
    classifier = NoisyClassifier.from_pretrained(whole).eval()
    call = {"num_inference_steps": 4, "output_type": "latent", "seed": 0}
    prompts = ["a", "b"]

    def latent(scale: float, label: int = 0) -> torch.Tensor:
        gradient = Gradient(LabelPotential(classifier, torch.tensor(label)), scale)
        return pipe(prompts, guidance=Chain((ClassifierFree(2.0), gradient)), **call).images

    plain = pipe(prompts, guidance_scale=2.0, **call).images
    assert torch.allclose(latent(0.0), plain, atol=1e-5) and not latent(1.0).requires_grad
    toward, away = latent(50.0, 0), latent(50.0, 1)
    with torch.no_grad():
        logits = [classifier(x, torch.tensor(0.0)).log_softmax(1)[:, 0] for x in (toward, away)]
    assert bool((logits[0] > logits[1]).all())


def test_a_picture_tower_on_noised_latents(tmp_path: Path, model: Path) -> None:
    config = validate(
        ClipConfig,
        {
            **unlabelled(tmp_path / "clip"),
            "model": str(model),
            "clip": {"vision_width": 16, "vision_layers": 1, "vision_heads": 2, "size": 8,
                     "patch": 2},
        },
    )  # fmt: skip
    final = train_clip.train(config, accelerator())
    known = Clip.load(model / "text_encoder", model / "image_encoder")
    towers = Clip.load(final / "text_encoder", final / "image_encoder")
    ids = torch.tensor([[512, 5, 6, 513] + [513] * 20])
    assert torch.equal(known.text_features(ids), towers.text_features(ids))
    assert towers.model.config.vision_config.num_channels == 4
    assert not (final / "image_encoder" / "preprocessor_config.json").exists()
    found = (tmp_path / "clip" / "metrics.jsonl").read_text()
    assert '"held_out_top1/0.17"' in found
    pipe = LatentDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    potential = ClipPotential(
        towers.image_features, lambda cond: towers.model.text_projection(cond.pooled)
    )
    latents = [
        pipe(["a red circle"], guidance=Gradient(potential, s), seed=0, num_inference_steps=4,
             output_type="latent").images
        for s in (0.0, 1.0)
    ]  # fmt: skip
    ids = pipe.tokenizer(["a red circle"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        fit = [float((towers.image_features(x) * towers.text_features(ids)).sum()) for x in latents]
    assert fit[1] > fit[0] + 0.05


def test_a_picture_tower_meets_a_text_encoder_as_it_is(tmp_path: Path, model: Path) -> None:
    clip = {"vision_width": 16, "vision_layers": 1, "vision_heads": 2, "size": 16, "patch": 4,
            "projection": 24}  # fmt: skip
    tree = {**unlabelled(tmp_path / "clip"), "text": str(model), "clip": clip}

    def config_of(tree: dict[str, Any]) -> ClipConfig:
        return validate(ClipConfig, tree)

    final = train_clip.train(config_of(tree), accelerator())
    towers = Clip.load(final / "text_encoder", final / "image_encoder")
    known = Clip.load(model / "text_encoder", model / "image_encoder").model.text_model
    state = known.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in towers.model.text_model.state_dict().items())
    assert towers.model.text_projection.weight.shape == (24, known.config.hidden_size)
    ids = [
        CLIPTokenizer.from_pretrained(folder / "tokenizer")("a red circle").input_ids
        for folder in (final, model)
    ]
    assert ids[0] == ids[1]
    assert towers.image_features(torch.zeros(1, 3, 16, 16)).shape == (1, 24)
    before = config_of(tree).clip.meeting(known, 0).model
    moved = ("vision_model", "visual_projection", "text_projection")
    assert all(
        not torch.equal(a, b)
        for part in moved
        for a, b in zip(
            getattr(before, part).parameters(),
            getattr(towers.model, part).parameters(),
            strict=True,
        )
        if a.ndim > 1
    )
    # The same weights elsewhere are the same run; others are not.
    there = Path(shutil.copytree(model, tmp_path / "there"))
    train_clip.train(config_of({**tree, "text": str(there)}), accelerator())
    file = there / "text_encoder/model.safetensors"
    learnt = load_file(file)
    learnt["text_model.final_layer_norm.bias"] += 0.01
    save_file(learnt, file, metadata={"format": "pt"})
    shutil.rmtree(final)
    with pytest.raises(OtherRunError, match="the weights .or config. that the folder holds"):
        train_clip.train(config_of({**tree, "text": str(there)}), accelerator())
    with pytest.raises(ConfigError, match="text: the text side is that of model"):
        train_clip.train(validate(ClipConfig, {**tree, "model": str(model)}), accelerator())


def test_a_picture_tower_is_exported_and_knows_its_text_encoder(
    tmp_path: Path, model: Path
) -> None:
    out = tmp_path / "half"
    done = CliRunner().invoke(app, ["export", str(out), "--model", str(model), "--half"])
    assert done.exit_code == 0, done.output
    whole, half = clip(str(model)), clip(str(out))
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.allclose(whole.image_features(x), half.image_features(x), atol=5e-3)
    assert load_file(out / "image_encoder/model.safetensors")[
        "visual_projection.weight"
    ].dtype == torch.float16  # fmt: skip
    file = out / "text_encoder/model.safetensors"
    learnt = load_file(file)
    learnt["text_model.final_layer_norm.bias"] += 0.01
    save_file(learnt, file, metadata={"format": "pt"})
    with pytest.raises(FeatureError, match="image_encoder belongs to another text encoder than"):
        clip(str(out))
    again = CliRunner().invoke(app, ["export", str(tmp_path / "again"), "--model", str(out)])
    assert again.exit_code == 2 and "belongs to another text encoder" in again.output


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": {"a": "("}}, "is no regular expression"),
        ({"labels": {"a": "b"}}, "labels"),
        ({"labels": {"a": "white", "b": "no such word"}}, "labels.b: no picture to train on"),
        ({"model": "nowhere"}, "no pipeline folder"),
        ({"images": {"size": 16, "buckets": {"step": 8}}}, "images.buckets"),
    ],
    ids=["expression", "one", "empty", "model", "buckets"],
)
def test_mistakes_are_one_line(command, tmp_path: Path, change, message) -> None:
    line = told(*command(tree(tmp_path / "run", **change), name="train_classifier"))
    assert message in line


def test_dry_runs_count_what_learns(command, tmp_path: Path, model: Path, capsys) -> None:
    clip = {"vision_width": 16, "vision_layers": 1, "vision_heads": 2, "size": 8, "patch": 2}
    for name, config in (
        ("train_classifier", tree(tmp_path / "run", model=str(model))),
        ("train_clip", {**unlabelled(tmp_path / "run"), "model": str(model), "clip": clip}),
    ):
        status, message = command(config, "--dry-run", name=name)
        assert (status, message) == (0, "")
    assert not (tmp_path / "run").exists()


def test_a_clip_that_does_not_fit_is_refused(tmp_path: Path, model: Path) -> None:
    config = validate(ClipConfig, {**unlabelled(tmp_path / "run"), "model": str(model)})
    with pytest.raises(ConfigError, match="clip.size 64 is not 8, the side of what"):
        train_clip.train(config, accelerator())


def test_labels_are_of_pictures_that_fit_one_rule(tmp_path: Path) -> None:
    from ldm.data.collection import Collection
    from ldm.data.images import ImageTransform
    from ldm.tasks.classifier import Labels

    source = ShapesData(count=200, size=16)
    collection = Collection(source, ImageTransform(size=16))
    rules = {"red": "(small|medium|large) red", "blue": "(small|medium|large) blue"}
    labels = Labels(rules)
    labels.restrict(collection)
    for items in (collection.train, collection.held_out):
        for item in items:
            colours = {thing.colour for thing in source.spec(item.index).things}
            assert colours & {"red", "blue"} == {labels.names[labels.of(item) or 0]}
    assert len(collection.train) > 10
