"""A stand-alone script that shows a guilty pass at work: the graph around the first difference,
before and after, on recorded inputs. Needs torch, safetensors, and fxlm for its own ops.
"""

from __future__ import annotations

from pathlib import Path

from fxlm.compiler.cutout import cutout
from fxlm.runtime.explain.bisect import NODE_TOLERANCE, Guilt

TEMPLATE = '''"""{title}

Made by `fxlm bisect`. `before` and `after` compute the first value that differs, {node}, on the
inputs in {data}. Exit status 1: they still differ; 0: they do not.
"""

import math
import operator
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
{loading}
TOLERANCE = {tolerance!r}  # of a difference, as a share of the largest element


{before}


{after}


def outputs(function, names):
    inputs = load_file(Path(__file__).with_suffix(".safetensors"))  # anew: caches are written
    with torch.inference_mode():
        made = function(*(inputs[name] for name in names))
    made = made if isinstance(made, (list, tuple)) else [made]
    return [value.double() for value in made]


def main():
    worst = 0.0
    for old, new in zip(outputs(before, {before_inputs}), outputs(after, {after_inputs})):
        if old.shape != new.shape:  # logits became tokens, or rows were chosen: look yourself
            print("shapes differ:", list(old.shape), list(new.shape))
            continue
        difference = torch.where(old == new, 0.0, (old - new).abs()).nan_to_num(nan=math.inf)
        scale = old.abs().nan_to_num(nan=0.0, posinf=0.0).max().clamp(min=1e-12)
        worst = max(worst, float(difference.max() / scale))
        print(f"largest difference {{difference.max():.3g}}, of values up to {{scale:.3g}}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
'''


def write_repro(guilt: Guilt, path: Path) -> list[Path]:
    """Write the script, and its inputs beside it.

    Args:
        path: of the script; the inputs get its name with ``.safetensors``.

    Returns:
        Both paths.
    """
    from safetensors.torch import save_file

    place = guilt.place
    before = cutout(guilt.before.program, place.node, place.equal, "before")
    after = cutout(guilt.after.program, place.node, place.equal, "after")
    data = path.with_suffix(".safetensors")
    names = dict.fromkeys([*before.inputs, *after.inputs])
    save_file({name: guilt.inputs[name].contiguous().clone() for name in names}, data)
    ours = any(op.startswith("fxlm.") for op in [*before.ops, *after.ops])
    text = TEMPLATE.format(
        title=f"Pass {guilt.name} changes the model in {guilt.dtype}, {where(guilt)}.",
        node=place.node or "what the graph returns", data=data.name,
        loading="from fxlm.compiler import ops\n\nops.load()\n" if ours else "",
        tolerance=NODE_TOLERANCE.get(guilt.after.program.facts.dtype, 1e-4),
        before=before.text, after=after.text,
        before_inputs=before.inputs, after_inputs=after.inputs,
    )  # fmt: skip
    path.write_text(text, encoding="utf-8")
    return [path, data]


def where(guilt: Guilt) -> str:
    """The place in words."""
    place = guilt.place
    if place.node is None:
        return "in what it returns"
    layer = f"layer {place.layer}" if place.layer >= 0 else "outside of the layers"
    module = f" ({place.module})" if place.module else ""
    return f"{layer}, first at {place.node}{module}"
