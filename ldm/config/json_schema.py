"""JSON schemas of the configs, by which editors complete a YAML and tell what its keys mean.

    # yaml-language-server: $schema=.schema/train.json

as the first line of a config in configs/; ``ldm schema train`` prints one for anywhere else.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from ldm.config.autoencoder import AutoencoderConfig
from ldm.config.classifier import ClassifierConfig
from ldm.config.clip import ClipConfig
from ldm.config.schema import RunConfig, TrainConfig
from ldm.lazy import named

CONFIGS: dict[str, type[RunConfig]] = {
    "train": TrainConfig,
    "autoencoder": AutoencoderConfig,
    "clip": ClipConfig,
    "classifier": ClassifierConfig,
}
"""Class of the config of each program in training/."""

_ARGUMENT = re.compile(r"^    (\w+): (.+(?:\n        .+)*)", re.MULTILINE)


def text(config: type[RunConfig]) -> str:
    """The schema of ``config`` as the JSON that is kept in configs/.schema."""
    schema = TypeAdapter(config).json_schema(schema_generator=_Documented)
    return json.dumps({"$schema": _Documented.schema_dialect, **schema}, indent=1) + "\n"


class _Documented(GenerateJsonSchema):
    """pydantic's, with the ``Args`` of docstrings as descriptions, and unions told by ``kind``."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """No: the key says as much."""
        return False

    def dataclass_schema(self, schema: Any) -> JsonSchemaValue:
        """An object whose keys are described."""
        made, cls = super().dataclass_schema(schema), schema["cls"]
        made["description"] = _line(inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0])
        described = documented(cls)
        for name, value in made["properties"].items():
            if name in described:
                value["description"] = described[name]
        return made

    def tagged_union_schema(self, schema: Any) -> JsonSchemaValue:
        """Any of the kinds. Without ``kind`` it is the default one, or what the path is."""
        made = super().tagged_union_schema(schema)
        tell = schema["discriminator"]
        default = tell({}) if callable(tell) else None
        kinds = dict(zip(schema["choices"], made.pop("oneOf"), strict=True))
        every = []
        for kind, one in kinds.items():
            described = self.get_schema_from_definitions(one["$ref"]) or {}
            told = kind == default or "path" in described.get("required", ())
            every.append(one if told else {**one, "required": ["kind"]})
        mapping = {kind: one["$ref"] for kind, one in kinds.items()}
        discriminator = {"propertyName": "kind", "mapping": mapping}
        return {**made, "anyOf": every, "discriminator": discriminator}


def documented(cls: type) -> dict[str, str]:
    """What the docstrings of ``cls``, of the dataclasses it extends, and of that which it mirrors,
    tell of their fields.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            doc = inspect.cleandoc(base.__doc__ or "")
            if mirrors := vars(base).get("mirrors"):
                found |= documented(named(mirrors))
            arguments = doc.partition("Args:\n")[2]
            found |= {name: _line(told) for name, told in _ARGUMENT.findall(arguments)}
    return found


def _line(text: str) -> str:
    return " ".join(text.split())
