"""Equal layers are traced twice and copied: the graph is the one that a full trace gives."""

from __future__ import annotations

import logging
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from fxlm.compiler import layers
from fxlm.compiler.alike import alike
from fxlm.compiler.capture import capture
from fxlm.compiler.outline import canonical_text
from fxlm.compiler.program import Program, module_paths
from tests.programs import facts, tiny_model

DEPTH = 6


def text(program: Program) -> list[object]:
    """What a program computes, of which inputs, and which module each node is of."""
    books = [
        (module_paths(n), str(n.target) if n.op != "placeholder" else program.inputs[n.name])
        for n in program.graph.nodes
    ]
    return [canonical_text(program.graph), books]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_a_copied_layer_is_what_tracing_it_gives(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    shared = capture(tiny_model(family, num_hidden_layers=DEPTH), facts(family))
    assert "every layer is traced" not in caplog.text
    with mock.patch.object(layers, "FEWEST", DEPTH + 1):
        full = capture(tiny_model(family, num_hidden_layers=DEPTH), facts(family))
    assert text(shared) == text(full)


def test_only_two_layers_of_a_kind_are_traced() -> None:
    model: Any = tiny_model("llama", num_hidden_layers=DEPTH)
    traced: list[nn.Module] = []

    class Reporting(type(model.model.layers[0])):  # type: ignore[misc]
        def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            traced.append(self)
            return super().forward(x, **kwargs)

    for layer in model.model.layers:
        layer.__class__ = Reporting
    capture(model, facts())
    assert len(traced) == 2


def _model_that(change: Any) -> Any:
    model: Any = tiny_model("llama", num_hidden_layers=DEPTH)
    change(model.model.layers)
    return model


def _scales_by_number(layers_: Any) -> None:
    class Numbered(type(layers_[0])):  # type: ignore[misc]
        def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return super().forward(x, **kwargs) * (2.0 if self.place % 3 == 2 else 1.0)

    for number, layer in enumerate(layers_):
        layer.__class__ = Numbered
        layer.place = number


def _looks_up_its_number(layers_: Any) -> None:
    table = [1.0] * (DEPTH - 1) + [2.0]

    class Numbered(type(layers_[0])):  # type: ignore[misc]
        def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return super().forward(x, **kwargs) * table[self.place]

    for number, layer in enumerate(layers_):
        layer.__class__ = Numbered
        layer.place = number


def _remembers(layers_: Any) -> None:
    class Counting(type(layers_[0])):  # type: ignore[misc]
        def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            self.last = object()
            return super().forward(x, **kwargs)

    for layer in layers_:
        layer.__class__ = Counting


@pytest.mark.parametrize("change", [_scales_by_number, _looks_up_its_number, _remembers])
def test_a_layer_that_depends_on_more_is_traced(
    change: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    shared = capture(_model_that(change), facts())
    assert "every layer is traced" in caplog.text
    with mock.patch.object(layers, "FEWEST", DEPTH + 1):
        full = capture(_model_that(change), facts())
    assert text(shared) == text(full)


def test_layers_that_differ_in_an_attribute_are_of_two_kinds() -> None:
    def change(layers_: Any) -> None:
        layers_[4].input_layernorm.variance_epsilon = 0.5

    shared = capture(_model_that(change), facts())
    with mock.patch.object(layers, "FEWEST", DEPTH + 1):
        full = capture(_model_that(change), facts())
    assert text(shared) == text(full)


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        (nn.Linear(2, 3), nn.Linear(2, 3), True),
        (nn.Linear(2, 3), nn.Linear(2, 4), False),
        (nn.Linear(2, 3), nn.Linear(2, 3, bias=False), False),
        (nn.LayerNorm(2), nn.LayerNorm(2, eps=0.1), False),
        (nn.ReLU(), nn.SiLU(), False),
        ([1, {"a": 2.0}], [1, {"a": 2.0}], True),
        (True, 1, False),
        (object(), object(), False),
    ],
)
def test_alike_is_equal_all_the_way_down(left: object, right: object, equal: bool) -> None:
    assert alike(left, right) is equal
