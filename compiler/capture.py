"""Capture: a Hugging Face module without weights becomes a Program.

The module has parameters on the meta device and real buffers (`fxlm.models.build`). It is
traced by ``torch.export`` over one ragged token dimension, without cache and without mask;
attention is the placeholder op ``fxlm::attention``. Nothing here knows a model's name.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxlm.compiler import ops
from fxlm.compiler.errors import UnsupportedModel
from fxlm.compiler.layers import Calls, Distinct
from fxlm.compiler.program import MAX_TOKENS, Facts, Input, Program, new_fake_mode
from fxlm.compiler.values import trust

_log = logging.getLogger(__name__)


class _Logits(nn.Module):
    """Adapter: (input_ids, position_ids) -> logits, and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.m = model  # short, as it begins every name of the graph

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        out = self.m(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, return_dict=True
        )
        logits: torch.Tensor = out.logits
        return logits


def capture(model: nn.Module, facts: Facts) -> Program:
    """Trace ``model`` into a Program at stage ``captured``.

    Args:
        model: causal LM; parameters on meta, buffers real, attention pointed at ``fxlm``.
        facts: of this model; ``facts.device`` is where the program will run.

    Returns:
        A Program with step inputs ``input_ids`` int64 [1, T] and ``position_ids`` int64
        [1, T], one weight input per parameter, and one output, logits [1, T, vocab].

    Raises:
        UnsupportedModel: the model does not trace; names the op, the module and the line.
    """
    ops.load()
    mode = new_fake_mode()
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    _fake_tensors(model, mode, facts.device)
    with mode:
        ids = torch.zeros(1, 7, dtype=torch.long, device=facts.device)
        positions = torch.zeros(1, 7, dtype=torch.long, device=facts.device)
    root = _Logits(model)
    inputs = (ids, positions, facts.max_position_embeddings)
    try:
        calls = Calls(root)
        with calls.watching():
            exported, most = _export(root, *inputs)
        return _program(exported, buffers, facts, most, calls)
    except Distinct as reason:
        _log.info("every layer is traced: %s", reason)
    exported, most = _export(root, *inputs)
    return _program(exported, buffers, facts, most)


def _fake_tensors(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> None:
    """Turn parameters and buffers into fake ones on ``device``; shared ones stay shared."""
    memo: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in list(table.items()):
                if tensor is None:
                    continue
                if id(tensor) not in memo:
                    memo[id(tensor)] = _fake(tensor, mode, device)
                table[name] = memo[id(tensor)]  # type: ignore[assignment]


def _fake(tensor: torch.Tensor, mode: FakeTensorMode, device: torch.device) -> torch.Tensor:
    fake = FakeTensor(mode, tensor.detach().to("meta"), device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=False)
    return fake


def _export(
    module: nn.Module, ids: torch.Tensor, positions: torch.Tensor, context: int
) -> tuple[Any, int]:
    """Trace with any number of tokens, or, where the model bounds it, up to its context.

    Returns:
        The exported program, and the most tokens that it takes.
    """
    try:
        return _export_up_to(MAX_TOKENS, module, ids, positions), MAX_TOKENS
    except torch._dynamo.exc.UserError as error:
        if "Constraints violated" not in str(error) or not 2 < context < MAX_TOKENS:
            raise UnsupportedModel(_explain(error)) from error
    except (UnsupportedModel, Distinct):
        raise
    except Exception as error:  # whatever model code raises while traced is the model's fault
        raise UnsupportedModel(_explain(error)) from error
    try:
        return _export_up_to(context, module, ids, positions), context
    except torch._dynamo.exc.UserError as error:
        raise UnsupportedModel(_explain(error)) from error


def _export_up_to(most: int, module: nn.Module, ids: torch.Tensor, positions: torch.Tensor) -> Any:
    tokens = torch.export.Dim("T", min=2, max=most)
    shapes = {"input_ids": {1: tokens}, "position_ids": {1: tokens}}
    with torch.no_grad(), _code_when_called():
        return torch.export.export(module, (ids, positions), dynamic_shapes=shapes, strict=False)


@contextlib.contextmanager
def _code_when_called() -> Iterator[None]:
    """Within: a graph module writes its Python when it is called, if ever, not at every change.

    Export makes some twenty in turn, each of the whole graph, and calls none: a tenth of its time.
    """
    whole: Any = fx.GraphModule.recompile

    def later(self: Any) -> None:
        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            whole(module)
            return module(*args, **kwargs)

        info = getattr(self.graph._codegen, "pytree_info", None)
        if info is not None:
            self._in_spec, self._out_spec = info.in_spec, info.out_spec
        type(self).forward = forward

    with mock.patch.object(fx.GraphModule, "recompile", later):
        yield


def _explain(error: Exception) -> str:
    """Name what failed and the line of the model's source where it did."""
    lines = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if re.search(r"transformers.models|modeling_", code.co_filename):
            owner = trace.tb_frame.f_locals.get("self")
            kind = type(owner).__name__ if owner is not None else "?"
            lines.append(f"{kind}.{code.co_name} at {code.co_filename}:{trace.tb_lineno}")
        trace = trace.tb_next
    where = lines[-1] if lines else "outside the model's source"
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The first line of a violated constraint says only that there is one.
    text = " ".join(said[: 2 if "Constraints violated" in str(error) else 1])
    return f"the model does not capture: {type(error).__name__}: {text} (in {where})"


def _program(
    exported: Any,
    buffers: dict[str, torch.Tensor],
    facts: Facts,
    max_tokens: int,
    calls: Calls | None = None,
) -> Program:
    graph = fx.Graph()
    graph.output(graph.graph_copy(exported.graph, {}))
    specs = exported.graph_signature.input_specs
    if calls is not None:
        placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
        calls.expand(graph, {s.target: placeholders[s.arg.name] for s in specs if s.target})
    names = [spec.arg.name for spec in specs]
    inputs: dict[str, Input] = {}
    constants: dict[str, torch.Tensor] = {}
    for name, spec in zip(names, specs, strict=True):
        kind = spec.kind.name
        source = (spec.target or spec.arg.name).removeprefix("m.")
        if kind == "USER_INPUT":
            inputs[name] = Input(role="step", source=name)
        elif kind == "PARAMETER":
            inputs[name] = Input(role="weight", source=source)
        else:
            inputs[name] = Input(role="constant", source=source)
            value = buffers.get(source)
            constants[source] = exported.constants[spec.target] if value is None else value
    _single_output(graph, exported.graph_signature)
    module = fx.GraphModule(nn.Module(), graph)
    mode = next(iter(graph.nodes)).meta["val"].fake_mode  # export may have made its own
    program = Program(
        module=module,
        inputs=inputs,
        constants=constants,
        facts=facts,
        fake_mode=mode,
        max_tokens=max_tokens,
    )
    program.eliminate_dead_code()
    trust(program.graph)
    return program


def _single_output(graph: fx.Graph, signature: Any) -> None:
    kinds = [spec.kind.name for spec in signature.output_specs]
    if kinds != ["USER_OUTPUT"]:
        raise UnsupportedModel(f"the model changes its own buffers while running: {kinds}")
