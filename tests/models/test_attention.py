"""Attention, masks, experts and adapters: the module fxlm builds computes what theirs does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import masking_utils as masks

from fxlm.compiler.capture import capture
from fxlm.compiler.errors import UnsupportedModel
from fxlm.compiler.program import Facts
from fxlm.models import attention
from fxlm.models.attention import MaskTag, classify
from fxlm.models.binding import bind
from fxlm.models.build import build_model
from fxlm.models.checkpoint import open_checkpoint
from fxlm.models.tiny import tiny_config
from tests.checkpoints import FAMILIES, make_checkpoint

# Beside FAMILIES: sinks, experts of every layout, hand-written attention, own positions, ALiBi.
MORE = ["gpt_oss", "dbrx", "llama4_text", "longcat_flash", "deepseek_v3", "bloom", "mpt", "gptj",
        "codegen", "gpt_neo", "gpt_neox_japanese", "openai-gpt", "xglm", "bart", "roberta",
        "gemma3n_text"]  # fmt: skip


def loaded(path: Path) -> Any:
    """Our module with the weights in it, to be run eagerly on the op's reference."""
    checkpoint = open_checkpoint(path)
    model: Any = build_model(checkpoint, torch.float32)
    binding = bind(checkpoint, model)
    weights = binding.convert({name: checkpoint.read(name) for name in binding.names})
    for module_name, module in model.named_modules():
        for leaf in list(module._parameters):
            name = f"{module_name}.{leaf}" if module_name else leaf
            if module._parameters[leaf] is not None:
                module._parameters[leaf] = nn.Parameter(weights[name], requires_grad=False)
    return model


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = make_checkpoint(family, tmp_path)
    model = loaded(path)
    theirs = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.randint(3, 250, (1, 21), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(21)[None]
    with torch.no_grad():
        ours = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        expected = theirs(input_ids=ids, use_cache=False).logits
    scale = float(expected.abs().max())
    assert float((ours - expected).abs().max()) < 1e-4 * scale
    assert len(set(expected[0].argmax(-1).tolist())) > 4, "tokens must vary to show anything"


def test_masks_are_read() -> None:
    causal = masks.causal_mask_function
    ids = torch.zeros(1, 4, dtype=torch.long)
    assert classify(causal) == MaskTag()
    assert classify(masks.sliding_window_causal_mask_function(7)) == MaskTag(window=7)
    assert classify(masks.chunked_causal_mask_function(5, ids[0])) == MaskTag(chunk=5)
    window = masks.sliding_window_causal_mask_function(7)
    packed = masks.and_masks(masks.packed_sequence_mask_function(ids), window)
    assert classify(packed) == MaskTag(window=7)
    if hasattr(masks, "packed_sequence_compatibility_function"):  # newer than 5.17
        packed = masks.packed_sequence_compatibility_function(window, ids, ids)
        assert classify(packed) == MaskTag(window=7)
    image = masks.blockwise_overlay(ids)
    assert classify(masks.or_masks(causal, image)) == MaskTag()


def other(*args: Any) -> bool:
    return True


@pytest.mark.parametrize(
    "function",
    [
        masks.bidirectional_mask_function,
        masks.and_masks(other, masks.causal_mask_function),
        masks.or_masks(other, masks.causal_mask_function),
        masks.and_masks(
            masks.chunked_overlay(3, torch.zeros(1)), masks.chunked_overlay(4, torch.zeros(1))
        ),
    ],
)
def test_masks_that_mean_something_else(function: Any) -> None:
    tag = classify(function)
    assert tag.reason
    with pytest.raises(UnsupportedModel, match="Linear"):
        attention.pattern(nn.Linear(1, 1), tag, None, None)


def test_what_attention_refuses() -> None:
    module = nn.Linear(1, 1)
    q = torch.zeros(1, 2, 3, 4)

    def refused(*words: str, mask: object = None, **kwargs: Any) -> None:
        with pytest.raises(UnsupportedModel) as error:
            attention.attention(module, q, q, q, mask, **kwargs)
        assert all(word in str(error.value) for word in ("Linear", *words))

    refused("position_bias", position_bias=torch.zeros(1))
    refused("a mask of its own", mask=torch.zeros(1))
    refused("bidirectional", is_causal=False)
    refused("sliding_window=4", sliding_window=4)
    longer, wider = torch.zeros(1, 2, 5, 4), torch.zeros(1, 3, 3, 4)
    with pytest.raises(UnsupportedModel, match="5 keys for 3 queries"):
        attention.attend(module, q, longer, longer)
    with pytest.raises(UnsupportedModel, match="2 query heads over 3 key heads"):
        attention.attend(module, q, wider, wider)


def test_layers_are_numbered_anew_in_each_forward(tmp_path: Path) -> None:
    model = loaded(make_checkpoint("llama", tmp_path))
    seen: list[int] = []
    original = torch.ops.fxlm.attention

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is original.default:
                seen.append(args[3])
            return func(*args, **(kwargs or {}))

    ids = torch.arange(3, 8)[None]
    with Spy(), torch.no_grad():
        for _ in range(2):
            model(input_ids=ids, position_ids=torch.arange(5)[None], use_cache=False)
    assert seen == [0, 1, 0, 1]


@pytest.mark.parametrize("model_type", ["mamba", "qwen3_5_text", "falcon_mamba", "rwkv", "minimax"])
def test_recurrent_layers_are_refused(model_type: str) -> None:
    model = build_model(tiny_config(model_type), torch.float32)
    facts = Facts(
        model_type=model_type, vocab_size=256, max_position_embeddings=512, num_layers=2,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match="recurrent or convolutional"):
        capture(model, facts)
