"""The same run with fewer layers, for whoever needs not look at each of many that are alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from recyclable.config.settings import Settings
from recyclable.errors import InputError
from recyclable.weights.base import read_config
from recyclable.weights.locate import locate_config

_BASES = ("base", "old_base", "teacher", "second_base")
"""Settings that name a model, where they hold a path or name of one."""
_COUNTS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers")
S = TypeVar("S", bound=Settings)


@contextmanager
def with_layers(settings: S, layers: int) -> Iterator[S | None]:
    """Settings whose models have so many layers, while it lasts; None where any is made of layers of several kinds."""
    with TemporaryDirectory() as folder:
        changed: dict[str, str] = {}
        for field in _BASES:
            named = getattr(settings, field, None)
            if not isinstance(named, str) or named in ("online", "cached"):
                continue
            content = _cut(locate_config(named), layers)
            if content is None:
                yield None
                return
            (place := Path(folder) / field).mkdir()
            (place / "config.json").write_text(json.dumps(content), encoding="utf-8")
            try:
                read_config(place)
            except InputError:  # another field of it counts layers as well
                yield None
                return
            changed[field] = str(place)
        yield settings.model_copy(update=changed)


def _cut(place: Path, layers: int) -> dict[str, Any] | None:
    config = read_config(place)
    content: dict[str, Any] = config.to_dict()
    names = {config.attribute_map.get(name, name) for name in _COUNTS} & content.keys()
    if not names or len({content[name] for name in names if content[name] is not None}) != 1:
        return None
    for name in names:
        content[name] = layers
    for name, value in content.items():
        if isinstance(value, list) and name.endswith("layer_types"):
            if len(set(value)) > 1:
                return None
            content[name] = value[:layers]
    return content
