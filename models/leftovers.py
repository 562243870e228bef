"""Tensors of a checkpoint that no parameter is made of.

Some are there lawfully: layers that predict several tokens, rotary tables of older releases, the
other half of a model that also sees. Layers beyond those that the config counts are not: the model
would run without them, and say nonsense. Not here: which tensors are used (`binding`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

from fxlm.compiler.errors import InvalidModel
from fxlm.models.checkpoint import Checkpoint
from fxlm.models.gguf_names import SET_ASIDE
from fxlm.models.shorten import STORED, layers_field

_log = logging.getLogger(__name__)
_SHOWN = 5  # names listed in a warning
_LAYER = re.compile(r"(.+?)\.(\d{1,9})\.")
# Fields that count layers behind the last one, which predict further tokens.
_PREDICTING = ("num_nextn_predict_layers", "num_mtp_layers")
# What a layer that predicts further tokens has, and no other.
_PREDICTS = re.compile(r"(.+?\.\d{1,9}\.)(eh_proj|enorm|hnorm|shared_head)\.")
# Tables of positions, which code makes, scales that `kv_scales` reads or nobody needs, and sizes
# of packed codes, which are read when the code that unpacks them is written.
_NO_WEIGHTS = (
    r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\b([kvq]|prob)_scale$",
    r"\b[kv]_proj\.output_scale$", r"\.weight_shape$", rf"^({'|'.join(SET_ASIDE)})\.",
)  # fmt: skip


def check_unused(
    checkpoint: Checkpoint, model: Any, used: Iterable[str], unused: Iterable[str]
) -> None:
    """Refuse layers that would be dropped; warn of other tensors that nothing asks for.

    Args:
        model: of transformers; it names what its checkpoints hold beside its weights.
        used, unused: raw names of tensors.

    Raises:
        InvalidModel: there are layers beyond the number that the config states.
    """
    if STORED in checkpoint.config:  # its first layers are what was asked for
        return
    last = _last_layers(used)
    text = checkpoint.config.get("text_config") or checkpoint.config
    counts = [text.get(field) for field in _PREDICTING]
    predicting = max((count for count in counts if isinstance(count, int)), default=0)
    known = re.compile("|".join((*_NO_WEIGHTS, *(model._keys_to_ignore_on_load_unexpected or ()))))
    left = {name: _beyond(name, last) for name in unused if not known.search(name)}
    heads = tuple(found[1] for name in left if (found := _PREDICTS.match(name)))
    left = {
        name: beyond
        for name, beyond in left.items()
        if not (0 < beyond <= predicting and name.startswith(heads))
    }
    if dropped := [name for name, beyond in left.items() if beyond]:
        first = min(dropped, key=lambda name: (left[name], name))
        field = layers_field(checkpoint.config)
        raise InvalidModel(
            f"{checkpoint.path / 'config.json'} has {field}={text.get(field)}, but the checkpoint "
            f"holds layers behind these, first {first!r}: the model would run without them. "
            f"Correct {field}, or take the tensors of those layers out of the files"
        )
    if left:
        shown = ", ".join(list(left)[:_SHOWN]) + (", ..." if len(left) > _SHOWN else "")
        _log.warning(
            "%d of the %d tensors of %s are not used by %s: %s",
            len(left), len(checkpoint.tensors), checkpoint.path, type(model).__name__, shown,
        )  # fmt: skip


def _last_layers(used: Iterable[str]) -> dict[str, int]:
    """The highest number in each list of layers."""
    last: dict[str, int] = {}
    for name in used:
        if found := _LAYER.match(name):
            last[found[1]] = max(last.get(found[1], 0), int(found[2]))
    return last


def _beyond(name: str, last: dict[str, int]) -> int:
    """How far a tensor's layer is behind the last one of its list; 0 if it is in no such list."""
    found = _LAYER.match(name)
    return max(0, int(found[2]) - last[found[1]]) if found and found[1] in last else 0
