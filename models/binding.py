"""Bind the tensors of a checkpoint to the parameters of the model.

Transformers knows, per model type, how names and layouts on disk differ from those in the
module: renamings, experts stacked, tensors joined, split or transposed. `bind` works out from
names and shapes alone which tensors make which parameter; `Binding.convert` then runs those very
rules on any tensors, real, fake or traced, so that a compiler can have them as graph nodes. The
rules see the tensors of a dense checkpoint; of a quantized one, a format makes them from the raw
tensors first (`fxlm.models.formats`). Not here: reading the tensors (`fxlm.models.checkpoint`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxlm.compiler.errors import InvalidModel
from fxlm.models import compat
from fxlm.models.checkpoint import Checkpoint
from fxlm.models.formats import LogicalTensor, logical_tensors, quantization_of
from fxlm.models.leftovers import check_unused

_SHOWN = 5  # names listed in an error
# What formats store beside a quantized weight: after its name, after that of its layer.
OF_A_WEIGHT = (
    "_scale", "_scale_inv", "_scales", "_blocks", "_packed", "_zero_point", "_scale_2", ".absmax",
    ".quant_map",
)  # fmt: skip
OF_A_LAYER = (".scales", ".qzeros", ".qweight", ".SCB")


@dataclass(slots=True, kw_only=True)
class _Rule:
    """One conversion: logical tensors (name, pattern that matched) -> parameters."""

    first: str  # name of the first parameter, as transformers' rules want it
    transform: Any  # None: the one source is the parameter
    sources: list[tuple[str, str]] = field(default_factory=list)
    makes: list[str] = field(default_factory=list)

    def raw(self, logical: Mapping[str, LogicalTensor]) -> list[str]:
        """Raw tensors that the sources are made of."""
        return [raw for name, _ in self.sources for raw in logical[name].sources]

    def apply(
        self, read: Callable[[str], torch.Tensor], dtype: torch.dtype | None, model: Any
    ) -> dict[str, torch.Tensor]:
        """Run the rule; each tensor is cast first, as transformers does."""
        tensors = [read(name) for name, _ in self.sources]
        if dtype is not None:
            tensors = [t if t.dtype == dtype else t.to(dtype) for t in tensors]
        if self.transform is None:
            return {self.first: tensors[0]}
        transform = deepcopy(self.transform)
        for (name, pattern), tensor in zip(self.sources, tensors, strict=True):
            transform.add_tensor(self.first, name, pattern, tensor)
        made = transform.convert(self.first, model=model, config=model.config)
        return {name: v[0] if isinstance(v, list) else v for name, v in made.items()}


@dataclass(slots=True, kw_only=True)
class Binding:
    """Which raw tensors a model needs, and how they become its parameters.

    Attributes:
        names: raw tensors to read, each once, in natural order of the parameters.
        targets: parameter fqn -> raw tensors it is made of; one name of each tied set.
        tied: other fqn -> fqn in ``targets`` that it is the same tensor as.
        unused: raw tensors that nothing asks for.
        constants: persistent buffers the checkpoint lacks; they keep the value code gave them.
    """

    names: list[str]
    targets: dict[str, list[str]]
    tied: dict[str, str]
    unused: list[str]
    constants: list[str]
    _rules: list[_Rule]
    _logical: dict[str, LogicalTensor]
    _model: Any
    _dtypes: dict[str, torch.dtype]

    def convert(self, raw: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the format's code, then transformers' rules.

        Args:
            raw: every tensor of ``names``: real, fake, meta or traced by a proxy.

        Returns:
            A tensor for every key of ``targets`` and of ``tied``, in the dtype of that parameter.
        """

        def read(name: str) -> torch.Tensor:
            logical = self._logical[name]
            return logical.build(*(raw[source] for source in logical.sources))

        result: dict[str, torch.Tensor] = {}
        for rule in self._rules:
            made = rule.apply(read, self._dtypes.get(rule.first), self._model)
            result.update({name: value for name, value in made.items() if name in self.targets})
        result.update({name: result[source] for name, source in self.tied.items()})
        return result


def bind(checkpoint: Checkpoint, model: nn.Module) -> Binding:
    """Bind ``checkpoint`` to ``model``. Call it before capture: it may change the model.

    Persistent buffers that the checkpoint holds become parameters (they are weights), and
    parameters that config says are tied, but which the checkpoint holds with different
    values, are untied, both as ``from_pretrained`` does.

    Raises:
        InvalidModel: tensors are missing, have another shape than the model's, belong to layers
            that config does not count, or hold codes of a quantized weight that no format reads.
    """
    hf: Any = model
    logical = logical_tensors(checkpoint)
    rules, unused = _rules(logical, hf)
    made, targets = _dry_run(rules, logical, hf)
    tied = _tie(checkpoint, hf, targets)
    _require_all(checkpoint, hf, targets, tied)
    _require_shapes(hf, made, targets)
    constants = _promote_buffers(hf, targets)
    used = [rule for rule in rules if any(name in targets for name in rule.makes)]
    _refuse_codes(checkpoint, hf, used, logical)
    names = dict.fromkeys(raw for rule in used for raw in rule.raw(logical))
    unused += [raw for rule in rules if rule not in used for raw in rule.raw(logical)]
    _refuse_orphans(checkpoint, names, logical, set(unused) - set(names))
    doubles = {raw for rule in rules if not tied.keys().isdisjoint(rule.makes)
               for raw in rule.raw(logical)}  # fmt: skip
    check_unused(checkpoint, hf, names, sorted(set(unused) - set(names) - doubles))
    dtypes = {name: tensor.dtype for name, tensor in hf.state_dict(keep_vars=True).items()}
    return Binding(
        names=list(names), targets=targets, tied=tied,
        unused=sorted(set(unused) - set(names)), constants=constants, _rules=used,
        _logical=logical, _model=hf, _dtypes=dtypes,
    )  # fmt: skip


def _rules(logical: Mapping[str, LogicalTensor], model: Any) -> tuple[list[_Rule], list[str]]:
    """Sort names into rules, the way transformers' own loader does; and raw names left over."""
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = compat.conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    rules: dict[str, _Rule] = {}
    unused: list[str] = []
    for raw in sorted(logical, key=dot_natural_key):
        name, pattern = rename_source_key(raw, renamings, converters, prefix, state)
        if name not in state and raw in state:
            name, pattern = rename_source_key(raw, [], [], prefix, state)
        if name not in state or (pattern is None and name in rules):
            unused.extend(
                logical[raw].sources
            )  # of several renamed to one parameter the first is taken
            continue
        transform = None if pattern is None else by_pattern[pattern]
        rule = rules.setdefault(name, _Rule(first=name, transform=transform))
        rule.sources.append((raw, raw if pattern is None else pattern))
    return list(rules.values()), unused


def _dry_run(
    rules: list[_Rule], logical: Mapping[str, LogicalTensor], model: Any
) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
    """Convert meta tensors: the shape of every parameter, and the raw tensors it is made of."""
    meta = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in logical.items()
    }
    made: dict[str, torch.Tensor] = {}
    targets: dict[str, list[str]] = {}
    for rule in rules:
        try:
            result = rule.apply(meta.__getitem__, None, model)
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
            raise InvalidModel(
                f"{rule.first} cannot be made of {', '.join(n for n, _ in rule.sources[:3])} "
                f"({len(rule.sources)} tensors): {error}"
            ) from error
        rule.makes = list(result)
        made.update(result)
        targets.update({name: rule.raw(logical) for name in result})
    return made, targets


def _tie(checkpoint: Checkpoint, model: Any, targets: dict[str, list[str]]) -> dict[str, str]:
    """Keep one of each set of tied parameters in ``targets``; untie what differs."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    groups: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(id(parameter), []).append(name)
    tied: dict[str, str] = {}
    for group in groups.values():
        present = [name for name in group if name in targets]
        if len(group) == 1 or not present:
            continue
        kept = present[0]
        for name in present[1:]:
            if not _same(checkpoint, targets[kept], targets[name]):
                _untie(model, name, parameters[name])
        for name in group:
            if name != kept and model.get_parameter(name) is parameters[kept]:
                tied[name] = kept
                targets.pop(name, None)
    return tied


def _same(checkpoint: Checkpoint, left: list[str], right: list[str]) -> bool:
    pairs = zip(left, right, strict=False)
    return len(left) == len(right) and all(
        a == b or torch.equal(checkpoint.read(a), checkpoint.read(b)) for a, b in pairs
    )


def _untie(model: Any, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    fresh = nn.Parameter(torch.empty_like(parameter), requires_grad=False)
    model.get_submodule(owner)._parameters[leaf] = fresh


def _require_all(
    checkpoint: Checkpoint, model: Any, targets: dict[str, list[str]], tied: dict[str, str]
) -> None:
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    missing = [name for name in names if name not in targets and name not in tied]
    if missing:
        raise InvalidModel(
            f"{checkpoint.path} lacks {len(missing)} of the {len(names)} tensors that "
            f"{type(model).__name__} needs: {', '.join(missing[:_SHOWN])}"
            f"{', ...' if len(missing) > _SHOWN else ''}"
        )


def _require_shapes(
    model: Any, made: dict[str, torch.Tensor], targets: dict[str, list[str]]
) -> None:
    state = model.state_dict(keep_vars=True)
    for name in list(targets):
        if name not in state:
            del targets[name]  # made by a rule beside what the model has
        elif state[name].shape != made[name].shape:
            raise InvalidModel(
                f"tensor {name} (from {', '.join(targets[name][:3])}) has shape "
                f"{list(made[name].shape)}, but config.json makes it {list(state[name].shape)}"
            )


def _refuse_codes(
    checkpoint: Checkpoint, model: Any, rules: list[_Rule], logical: Mapping[str, LogicalTensor]
) -> None:
    """Integers and float8 are codes of a quantized weight; a cast would make garbage of them."""
    state = model.state_dict(keep_vars=True)
    for rule in rules:
        if not any(name in state and state[name].is_floating_point() for name in rule.makes):
            continue
        for name, _ in rule.sources:
            dtype = logical[name].dtype
            if not dtype.is_floating_point or dtype.itemsize == 1:
                raise InvalidModel(
                    f"tensor {name!r} of {checkpoint.path} is {str(dtype).removeprefix('torch.')}, "
                    f"the codes of a quantized weight, and nothing says how to read them: "
                    f"{_stated(checkpoint)}. Restore the quantization_config that the checkpoint "
                    "was published with, or download it again"
                )


def _stated(checkpoint: Checkpoint) -> str:
    found = quantization_of(checkpoint)
    if found is None:
        return "its config.json has no quantization_config"
    return f"its quantization_config ({found[0]}) does not cover this tensor"


def _refuse_orphans(
    checkpoint: Checkpoint,
    names: Mapping[str, Any],
    logical: Mapping[str, LogicalTensor],
    unused: set[str],
) -> None:
    """A weight taken as it is must have no scales beside it: something was replaced."""
    for name in names:
        if name not in logical or logical[name].sources != (name,):
            continue
        module = name.removesuffix(".weight")
        beside = [f"{name}{end}" for end in OF_A_WEIGHT]
        beside += [f"{module}{end}" for end in OF_A_LAYER if module != name]
        found = [other for other in beside if other in unused]
        if found:
            raise InvalidModel(
                f"{name!r} of {checkpoint.path} is {checkpoint.tensors[name].dtype}, a plain "
                f"weight, yet {found[0]!r} belongs to a quantized one and would be ignored: "
                f"{_stated(checkpoint)}. Download the checkpoint again, or delete {found[0]!r} if "
                "the weight is dense"
            )


def _promote_buffers(model: Any, targets: dict[str, list[str]]) -> list[str]:
    """Make parameters of the persistent buffers the checkpoint holds; return the others."""
    constants = []
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in model.state_dict():
        if name in parameters:
            continue
        if name not in targets:
            constants.append(name)
            continue
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        buffer = module._buffers.pop(leaf)
        module.register_parameter(leaf, nn.Parameter(buffer.to("meta"), requires_grad=False))
    return constants
