"""``a.b=c`` is read by what the field holds: a text as it is typed, all else as YAML, whole."""

import dataclasses
import typing

import pytest
import yaml

from ldm.config.fields import below, dataclasses_in, forms
from ldm.config.json_schema import CONFIGS
from ldm.config.loader import load
from ldm.config.overrides import value_of
from ldm.config.schema import Resume, TrainConfig
from ldm.config.shapes import Classes, TextShape, VaeShape
from ldm.data.folder import FolderData
from ldm.data.hub import DatasetsData
from ldm.demo.shapes import ShapesData
from ldm.diffusion import Edm, times
from ldm.errors import ConfigError

REQUIRED = {"run": "r", "data": {"kind": "shapes"}, "duration": "3 steps"}
TYPED = ["pics #2", "007", "no", "a: b", "2024-01-02", " x ", "'x'", "&a", "*a", "!t", "~"]
IN_BRACKETS = ["[x]", "{x}", "[a, b] and {c}", "[a", "{a: b"]


def parts(annotation: typing.Any, seen: dict[type, None]) -> dict[type, None]:
    """Every dataclass below ``annotation``."""
    for cls in dataclasses_in(annotation):
        if cls not in seen:
            seen[cls] = None
            for hint in typing.get_type_hints(cls, include_extras=True).values():
                parts(hint, seen)
    return seen


EVERY = {
    f"{cls.__name__}.{field.name}": below(cls, field.name, {})
    for config in CONFIGS.values()
    for cls in parts(config, {})
    for field in dataclasses.fields(cls)
}
TEXTS = {name: annotation for name, annotation in EVERY.items() if str in forms(annotation)}
LISTS = {
    name: annotation
    for name, annotation in EVERY.items()
    for form in forms(annotation)
    if typing.get_origin(form) is tuple and {*forms(typing.get_args(form)[0])} == {str}
}


def test_a_text_is_as_it_is_typed_in_every_field_of_every_config():
    assert len(TEXTS) > 40 and {"TrainConfig.vae", "FolderData.path", "Ema.half_life"} < set(TEXTS)
    for name, annotation in TEXTS.items():
        structured = not set(forms(annotation)) <= {str, type(None)}
        for text in TYPED + ([] if structured else IN_BRACKETS):
            assert value_of(annotation, text) == text, name
        for text in ("null", ""):
            may_be_none = type(None) in forms(annotation)
            assert value_of(annotation, text) == (None if may_be_none else text), name


def test_the_texts_of_every_list_are_as_they_are_typed():
    assert {"TrainConfig.train", "TextToImageValidation.prompts", "Resume.allow"} < set(LISTS)
    typed = "[007, no, a: b, 2024-01-02, 'x, #1', null, \"no\", 1.50, {x}]"
    texts = ["007", "no", "a: b", "2024-01-02", "x, #1", "null", "no", "1.50", "{x}"]
    found = {name: value_of(annotation, typed) for name, annotation in LISTS.items()}
    assert found == dict.fromkeys(LISTS, texts)


def test_what_is_no_text_has_to_be_whole_in_every_field():
    for name, annotation in EVERY.items():
        if name not in TEXTS:
            for text in ("3 # x", "[1, 2] # x", "# x", "3\n...\n4"):
                with pytest.raises((ValueError, yaml.YAMLError)):
                    value_of(annotation, text)
                    pytest.fail(name)


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("run=out #1", {"run": "out #1"}),
        ("run=null", {"run": "null"}),
        ("model=null", {"model": None}),
        ("model=", {"model": None}),
        ("vae=null", {"vae": None}),
        ("vae=pixels", {"vae": "pixels"}),
        ("vae=my vae #2", {"vae": "my vae #2"}),
        ("vae=[x]", {"vae": "[x]"}),
        ("vae={latent_channels: 8}", {"vae": VaeShape(latent_channels=8)}),
        ("text={tokenizer: 007, layers: 2}", {"text": TextShape(tokenizer="007", layers=2)}),
        ("text={tokenizer: 'a #1'}", {"text": TextShape(tokenizer="a #1")}),
        ("text={tokenizer: null}", {"text": TextShape()}),
        ("data={path: 007}", {"data": FolderData(path="007")}),
        (
            "data=[{path: no, weight: 2}, {kind: shapes, count: 5}]",
            {"data": (FolderData(path="no", weight=2.0), ShapesData(count=5))},
        ),
        ("train=[unet,text_encoder]", {"train": ("unet", "text_encoder")}),
        ("train=[unet.*attn2*]", {"train": ("unet.*attn2*",)}),
        ("condition=none", {"condition": "none"}),
        ("condition={classes: [no, 007]}", {"condition": Classes(classes=("no", "007"))}),
        ("condition.classes=[no]", {"condition": Classes(classes=("no",))}),
        ("resume.allow=[data, seed]", {"resume": Resume(allow=("data", "seed"))}),
        ("ema=null", {"ema": None}),
        ("batch_size= 16 ", {"batch_size": 16}),
        ("batch_size=010", {"batch_size": 10}),  # 8 in YAML 1.1
        ("micro_batch_size=null", {"micro_batch_size": None}),
        ("trackers=[]", {"trackers": ()}),
    ],
)
def test_overrides_of_a_run(tmp_path, override, found):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(REQUIRED))
    config = load(TrainConfig, file, [override])
    assert {key: getattr(config, key) for key in found} == found


def test_overrides_below_a_kind():
    before = ["run=r", "duration=3 steps"]
    config = load(TrainConfig, None, [*before, "data.path=pics #2", "data.kind=datasets",
                                      "data.split=no", "data.config=null"])  # fmt: skip
    assert config.data == DatasetsData(path="pics #2", split="no")
    config = load(TrainConfig, None, [*before, "data={kind: shapes}", "objective.target=edm",
                                      "objective.times={kind: mode, scale: 1}"])  # fmt: skip
    assert (config.objective.target, config.objective.times) == (Edm(), times.Mode(scale=1.0))
    labels = load(CONFIGS["classifier"], None, [*before, "data={kind: shapes}", "labels.a=^x: #1$",
                                                "labels.b=no"]).labels  # fmt: skip
    assert labels == {"a": "^x: #1$", "b": "no"}
    several = load(TrainConfig, None, [*before, "data={kind: shapes}",
                                       "ema.half_life=[50k images, 2k steps]"])  # fmt: skip
    assert several.ema and several.ema.half_life == ("50k images", "2k steps")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=16 # big", "YAML takes '16' alone for its value"),
        ("batch_size=# big", "to YAML it is a comment"),
        ("images.flip=yes#", "key 'images.flip' is 'yes#'"),
        ("batch_size=1:30", "key 'batch_size' is '1:30'"),  # 90 in YAML 1.1
        ("train=[unet] # all", "YAML takes '[unet]' alone for its value"),
        ("validation.prompts=[a #5 sign, b]", "needs quotes"),
        ("validation={prompts: [a}", "needs quotes"),
        ("train=unet", "key 'train' is 'unet': input should be a list"),
        ("data={kind: shapes, kind: emoji}", "key 'kind' stands twice"),
        ("batch_size=" + "9" * 5000, "cannot be read as int"),
        ("optimizer.lr=" + "9" * 400, "input should be a valid number"),
        ("optimizer.lr=nan", "finite number"),
        ("objective.times={kind: logit_normal, mean: .nan}", "finite number"),
        ("train=" + "[" * 3000, "nested too deep"),
        ("batch_size=&a [*a]", "nested too deep"),
        ("batch_size=!!python/name:os.system", "!!python/name:os.system is no plain value"),
        ("a" + ".a" * 5000 + "=1", "unknown key 'a'"),
    ],
    ids=lambda text: text[:40],
)
def test_refused_in_one_line(override, message):
    with pytest.raises(ConfigError) as caught:
        load(TrainConfig, None, ["run=r", "duration=3 steps", "data={kind: shapes}", override])
    line = str(caught.value)
    assert message in line and "\n" not in line and len(line) < 700
