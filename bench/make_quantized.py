"""Write the bundled model as a checkpoint that is quantized already, by the format's own code.

    python bench/make_quantized.py FORMAT DIR [--llama-quantize PROGRAM]

gptq and awq are written by GPTQModel with calibration text of the training set, bitsandbytes by its
CPU code, fp8 by transformers, and GGUF by gguf-py; its K types, which gguf-py cannot write, by
llama.cpp's ``llama-quantize``. compressed-tensors checkpoints are those of ``fxlm quantize``. The
embedding, which is tied to the head, stays bfloat16 in all of them, so that their sizes and losses
are comparable. GPTQModel is not among the dependencies: ``pip install gptqmodel``, here or
elsewhere (with two cores it asks for ``GPTQMODEL_CPU_WORKERS=2``).

Its 704 inputs of ``down_proj`` are no multiple of 256 or 128: that layer gets in K types what
llama.cpp falls back to (Q4_0 for Q2_K and Q3_K, where that would be IQ4_NL), in fp8 blocks of 64.
GPTQ and AWQ have groups of 32. MXFP4 is a format of experts alone, of which there are none.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fxlm.models.bundled import BUNDLED

SOURCE = BUNDLED["bundled"]
Tensors = dict[str, torch.Tensor]
CALIBRATION_TEXTS = 128
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """How a checkpoint is written.

    Attributes:
        write: called with the path (which does not exist) and ``options``.
        options: of ``write``.
        suffix: of the path.
    """

    write: Callable[..., None]
    options: dict[str, Any] = field(default_factory=dict)
    suffix: str = ""


def compressed_tensors(target: Path, *, scheme: str) -> None:
    """As `fxlm quantize` writes it."""
    from fxlm.runtime.quantize import quantize_checkpoint

    quantize_checkpoint(str(SOURCE), scheme, target)


def gptqmodel(target: Path, *, method: str, bits: int, desc_act: bool = False) -> None:
    """GPTQ, or AWQ in the gemm version, in groups of 32, calibrated on documents of training."""
    library: Any = importlib.import_module("gptqmodel")
    from fxlm.models.bundled.data import corpus

    texts = [document.text[:4000] for document in corpus() if not document.held_out]
    form = {"gptq": "gptq", "awq": "gemm"}[method]
    config = library.QuantizeConfig(
        bits=bits, group_size=32, desc_act=desc_act, method=method, format=form, lm_head=False
    )
    model = library.GPTQModel.load(str(SOURCE), config, device="cpu")
    model.quantize(texts[:: len(texts) // CALIBRATION_TEXTS][:CALIBRATION_TEXTS], batch_size=1)
    model.save(str(target))


def bitsandbytes(target: Path, *, kind: str, nested: bool = False) -> None:
    """4-bit codes of a kind, with or without quantized scales; or 8 bits."""
    from bitsandbytes import functional

    def four(name: str, weight: torch.Tensor) -> Tensors:
        codes, state = functional.quantize_4bit(
            weight, blocksize=64, quant_type=kind, compress_statistics=nested
        )
        return {name: codes} | {f"{name}.{n}": t for n, t in state.as_dict(packed=True).items()}

    def eight(name: str, weight: torch.Tensor) -> Tensors:
        codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
        return {name: codes, name.removesuffix("weight") + "SCB": scale.float()}

    settings = {"quant_method": "bitsandbytes", "load_in_8bit": kind == "int8",
                "load_in_4bit": kind != "int8", "bnb_4bit_quant_type": kind}  # fmt: skip
    _write(target, eight if kind == "int8" else four, settings)


def fp8(target: Path) -> None:
    """Hugging Face's fp8, in blocks of 64 x 64."""
    from types import SimpleNamespace

    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    config = FineGrainedFP8Config(weight_block_size=(64, 64))
    convert: Any = Fp8Quantize(SimpleNamespace(quantization_config=config)).convert
    settings = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    _write(target, lambda name, weight: convert({name: weight}), settings)


def _write(
    target: Path, convert: Callable[[str, torch.Tensor], Tensors], settings: dict[str, Any]
) -> None:
    """The checkpoint with its linear layers converted; the settings go into its config."""
    raw = load_file(SOURCE / "model.safetensors")
    made: Tensors = {}
    for name, tensor in raw.items():
        made |= convert(name, tensor) if name.endswith("proj.weight") else {name: tensor}
    shutil.copytree(SOURCE, target)
    made = {name: tensor.contiguous() for name, tensor in made.items()}
    save_file(made, target / "model.safetensors", {"format": "pt"})
    path = target / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": settings}
    path.write_text(json.dumps(config))


def gguf(target: Path, *, kind: str) -> None:
    """A GGUF file of one of the types that gguf-py writes."""
    from make_gguf import make

    make(SOURCE, target, kind)


def llama_quantize(target: Path, *, kind: str, program: str | None) -> None:
    """A GGUF file of K types."""
    if not program:
        raise ImportError("name llama.cpp's program: --llama-quantize PROGRAM")
    with tempfile.TemporaryDirectory() as scratch:
        dense = Path(scratch) / "dense.gguf"
        gguf(dense, kind="BF16")
        command = [
            program, "--pure", "--token-embedding-type", "bf16",
            "--tensor-type", f"ffn_down={FALLBACKS[kind].lower()}", str(dense), str(target), kind,
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)


FORMATS: dict[str, Format] = {
    **{f"compressed-tensors {scheme}": Format(write=compressed_tensors, options={"scheme": scheme})
       for scheme in ("int8", "int4-g32")},
    "GPTQ 4 bits": Format(write=gptqmodel, options={"method": "gptq", "bits": 4}),
    "GPTQ 4 bits, desc_act": Format(
        write=gptqmodel, options={"method": "gptq", "bits": 4, "desc_act": True}
    ),
    "GPTQ 8 bits": Format(write=gptqmodel, options={"method": "gptq", "bits": 8}),
    "AWQ": Format(write=gptqmodel, options={"method": "awq", "bits": 4}),
    "fp8 of 64 x 64": Format(write=fp8),
    "bitsandbytes int8": Format(write=bitsandbytes, options={"kind": "int8"}),
    "bitsandbytes nf4": Format(write=bitsandbytes, options={"kind": "nf4"}),
    "bitsandbytes nf4, nested": Format(write=bitsandbytes, options={"kind": "nf4", "nested": True}),
    "bitsandbytes fp4": Format(write=bitsandbytes, options={"kind": "fp4"}),
    **{f"GGUF {kind}": Format(write=gguf, options={"kind": kind}, suffix=".gguf")
       for kind in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")},
    **{f"GGUF {kind}": Format(write=llama_quantize, options={"kind": kind}, suffix=".gguf")
       for kind in ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")},
}  # fmt: skip


def make(name: str, folder: Path, program: str | None) -> Path:
    """Write a format into a folder, unless it lies there; returns its path.

    Raises:
        ImportError: the library or program that writes it is not there.
    """
    form = FORMATS[name]
    target = folder / (name.replace(", ", "-").replace(" ", "-") + form.suffix)
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        options = {"program": program} if form.write is llama_quantize else {}
        form.write(target, **form.options, **options)
    return target


def main() -> None:
    """Parse the command line and write one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llama-quantize", metavar="PROGRAM", help="of llama.cpp")
    given = parser.parse_args()
    print(make(given.format, given.folder, given.llama_quantize))


if __name__ == "__main__":
    main()
