"""Step: an opened artifact as something that can be called once per batch.

Loads the weights by running the load graph over mapped files, opens the packages, and then
calls region after region. Needs no Inductor, no transformers and no compiler. Not here: what
is in a batch, memory for the cache (the runtime's).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from fxlm.compiler import graph_json, ops
from fxlm.compiler.artifact import Artifact, TensorSpec, dtype_name
from fxlm.compiler.errors import ArtifactError

Progress = Callable[[int, int], None]
Sink = Callable[[str, torch.Tensor], None]

WINDOW_BYTES = 128 << 20  # of the checkpoint, mapped and read, before its pages are let go


class Reader(Protocol):
    """Where checkpoint tensors come from: on the CPU, usually mapped from a file."""

    def read(self, name: str) -> torch.Tensor: ...

    def read_slice(self, name: str, dim: int, start: int, length: int) -> torch.Tensor: ...

    def forget(self) -> None:
        """Let go of pages read so far; tensors stay valid."""
        ...


def load_weights(
    artifact: Artifact,
    reader: Reader,
    device: torch.device,
    progress: Progress | None = None,
    sink: Sink | None = None,
) -> dict[str, torch.Tensor]:
    """Run the load graph.

    Beside the prepared weights no more is held than `WINDOW_BYTES` of the checkpoint and what
    preparing the weight at hand takes.

    Args:
        artifact: whose weights to prepare.
        reader: of the checkpoint.
        device: where the prepared weights go.
        progress: called with (tensors read, tensors in all).
        sink: is given each weight with its name as soon as it is made; none is then returned.

    Returns:
        Prepared weights by name.
    """
    ops.load()
    content = artifact.read_json("load.json")
    source = _Source(reader, content["inputs"], _constants(artifact), device, progress)
    specs = artifact.weights()
    names = list(specs)
    weights: dict[str, torch.Tensor] = {}
    put = weights.__setitem__ if sink is None else sink
    for position, value in graph_json.Runner(content["graph"]).stream(source):
        name = names[position]
        put(name, _checked(name, value, specs[name]))
        del value
    reader.forget()
    return weights


class _Source:
    """Inputs of the load graph by name, and the pages of files that they hold."""

    def __init__(
        self, reader: Reader, meaning: dict[str, list[Any]], constants: dict[str, torch.Tensor],
        device: torch.device, progress: Progress | None,
    ) -> None:  # fmt: skip
        self.reader = reader
        self.meaning = meaning
        self.constants = constants
        self.device = device
        self.progress = progress
        self.num_read = 0
        self.held_bytes = 0

    def __call__(self, name: str) -> torch.Tensor:
        role, source, *part = self.meaning[name]
        if self.held_bytes > WINDOW_BYTES:
            self.reader.forget()
            self.held_bytes = 0
        if role == "constant":
            value = self.constants[source]
        else:
            whole = not part
            value = self.reader.read(source) if whole else self.reader.read_slice(source, *part)
        self.held_bytes += value.nbytes
        self.num_read += 1
        if self.progress is not None:
            self.progress(self.num_read, len(self.meaning))
        return value.to(self.device)


def _constants(artifact: Artifact) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(artifact.path / "constants.safetensors")


def _checked(name: str, value: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """``value`` with the strides that the step was compiled for."""
    if tuple(value.shape) != spec.shape or dtype_name(value.dtype) != spec.dtype:
        raise ArtifactError(
            f"weight {name} is {dtype_name(value.dtype)} {list(value.shape)}; the artifact was "
            f"compiled for {spec.dtype} {list(spec.shape)}: compile the model again"
        )
    if value.stride() == spec.stride:
        return value
    return torch.empty_strided(
        spec.shape, spec.stride, dtype=value.dtype, device=value.device
    ).copy_(value)


class Step:
    """A model ready to run.

    Args:
        artifact: opened and checked.
        weights: what `load_weights` gave; shared, never written.
        caches: tensors by ``("k" | "v", layer)``, written in place.
        eager: interpret the regions even if packages are there.
    """

    def __init__(
        self,
        artifact: Artifact,
        weights: Mapping[str, torch.Tensor],
        caches: Mapping[tuple[str, int], torch.Tensor],
        eager: bool = False,
    ) -> None:
        ops.load()
        self._fixed: dict[str, Any] = {}
        self._step_names: dict[str, str] = {}
        for name, role, source, layer in artifact.manifest["step_inputs"]:
            if role == "step":
                self._step_names[name] = source
            else:
                self._fixed[name] = weights[source] if role == "weight" else caches[source, layer]
        self.compiled = artifact.compiled and not eager
        self._regions = {
            name: _open_region(artifact, name, self.compiled)
            for name in artifact.manifest["regions"]
        }
        self._results: list[str] = artifact.manifest["results"]
        self._calls = [
            (self._regions[c["region"]], c["inputs"], c["outputs"], release)
            for c, release in _with_release(artifact.manifest["calls"], self._results)
        ]

    def input_names(self) -> list[str]:
        """Names of the step inputs that the graph takes."""
        return list(self._step_names.values())

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Run one step.

        Args:
            inputs: step inputs by name; shapes as in ``docs/architecture.md``.

        Returns:
            token_ids [R], logprobs [R, L + 1], logprob_ids [R, L + 1], ranks [R].
        """
        values: dict[str, Any] = {n: inputs[source] for n, source in self._step_names.items()}
        fixed = self._fixed
        for region, names, outputs, release in self._calls:
            given = [fixed[n] if n in fixed else values[n] for n in names]
            for name, value in zip(outputs, region(given), strict=True):
                values[name] = value
            for name in release:
                del values[name]
        return [values[name] for name in self._results]


def _open_region(
    artifact: Artifact, name: str, compiled: bool
) -> Callable[[Sequence[Any]], list[Any]]:
    if compiled:
        path = str(artifact.path / "regions" / f"{name}.pt2")
        try:
            loader: Any = torch._C._aoti.AOTIModelPackageLoader(path, "model", False, 1, -1)
        except RuntimeError as error:
            raise ArtifactError(f"{path} does not open: {error}") from error
        run: Callable[[Sequence[Any]], list[Any]] = loader.run
        return run
    runner = graph_json.Runner(artifact.read_json(f"regions/{name}.json"))
    return lambda given: runner.run(dict(zip(runner.inputs, given, strict=True)))


def _with_release(
    calls: list[dict[str, Any]], results: Sequence[str]
) -> list[tuple[dict[str, Any], list[str]]]:
    """Each call with the values that no later call needs."""
    made = {name for call in calls for name in call["outputs"]}
    needed = set(results)
    paired = []
    for call in reversed(calls):
        used = {n for n in (*call["inputs"], *call["outputs"]) if n in made}
        paired.append((call, sorted(used - needed)))
        needed |= used
    return paired[::-1]
