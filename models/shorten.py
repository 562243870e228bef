"""A checkpoint cut to its first layers, so that a large model can be looked at in little memory.

The directory holds links to the files of the other and a config that says fewer layers, and how
many are stored; tensors of the layers that are gone are not read. Not here: models whose layers
are no plain list.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fxlm.compiler.errors import InvalidOption
from fxlm.models.checkpoint import Checkpoint, open_checkpoint

FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
STORED = "fxlm_layers_stored"  # of a shortened config: layers that the files hold


def num_layers(config: dict[str, Any]) -> int:
    """Layers that a config states, of its text part if it has one; 0 if it states none."""
    field = layers_field(config)
    return int((config.get("text_config") or config)[field]) if field else 0


def layers_field(config: dict[str, Any]) -> str:
    """The field of a config, or of its text part, that states them; empty if none does."""
    text = config.get("text_config") or config
    return next((name for name in FIELDS if type(text.get(name)) is int), "")


def shorten(checkpoint: Checkpoint, count: int, directory: Path) -> Checkpoint:
    """A checkpoint of the first ``count`` layers, in ``directory`` (which must be empty).

    Raises:
        InvalidOption: ``count`` is not within the layers of the model.
    """
    total = num_layers(checkpoint.config)
    if not 1 <= count <= total:
        raise InvalidOption(
            "--layers", count, f"the model has {total or 'no plain list of'} layers"
        )
    for file in checkpoint.path.iterdir():
        if file.is_file() and file.name != "config.json":
            (directory / file.name).symlink_to(file.resolve())
    cut = {STORED: total, **_cut(checkpoint.config, total, count)}
    text = json.dumps(cut, indent=1)
    (directory / "config.json").write_text(text, encoding="utf-8")
    trust = checkpoint.trust_remote_code
    made = open_checkpoint(directory, trust_remote_code=trust)
    made.source = checkpoint.source
    return made


def _cut(config: dict[str, Any], total: int, count: int) -> dict[str, Any]:
    """Every number of layers, and every list with an entry a layer, cut; nested configs too."""
    cut: dict[str, Any] = {}
    for name, value in config.items():
        if name in FIELDS and value == total:
            cut[name] = count
        elif isinstance(value, list) and len(value) == total and name != "architectures":
            cut[name] = value[:count]
        else:
            cut[name] = _cut(value, total, count) if isinstance(value, dict) else value
    return cut
