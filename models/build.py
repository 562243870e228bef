"""Build a Hugging Face model without its weights.

Parameters are on the meta device, buffers are real; attention and experts point at fxlm's
ops. Loading weights is no part of it: they are graph inputs (`fxlm.models.binding`).
"""

from __future__ import annotations

import copy
import importlib
import re
import types
from typing import Any

import torch
from torch import nn

from fxlm.compiler.errors import InvalidModel, UnsupportedModel
from fxlm.models import adapters, attention, compat, experts
from fxlm.models.checkpoint import Checkpoint


def load_config(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """Read the checkpoint's config as transformers' config object.

    Raises:
        InvalidModel: the config is refused by transformers; carries its reason.
    """
    compat.import_transformers()
    from transformers import AutoConfig

    trust = trust_remote_code or checkpoint.trust_remote_code
    try:
        return AutoConfig.from_pretrained(str(checkpoint.path), trust_remote_code=trust)
    except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
        raise InvalidModel(f"config.json of {checkpoint.path} is refused: {error}") from error
    except Exception as error:
        if type(error).__module__.startswith("huggingface_hub"):  # its strict config checks
            raise InvalidModel(f"config.json of {checkpoint.path} is refused: {error}") from error
        raise


def build_model(
    checkpoint: Checkpoint | Any, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> nn.Module:
    """Build the causal LM of a checkpoint, or of a transformers config object.

    Args:
        checkpoint: an open checkpoint, or a config (copied, never changed).
        dtype: of the parameters; those the model keeps in float32 stay so.
        trust_remote_code: run the Python that comes with the checkpoint.

    Returns:
        The model in eval mode: parameters on meta without gradients, tied ones shared,
        buffers real. ``position_ids`` decide positions; every forward restarts the numbering
        of attention layers.

    Raises:
        InvalidModel: the config is refused.
        UnsupportedModel: there is no causal LM of this type, or it does not build.
    """
    if isinstance(checkpoint, Checkpoint):
        trust_remote_code = trust_remote_code or checkpoint.trust_remote_code
        config = load_config(checkpoint, trust_remote_code=trust_remote_code)
    else:
        config = copy.deepcopy(checkpoint)
    _forget_quantization(config)
    attention.register()
    experts.register()
    model: nn.Module = _construct(config, dtype, trust_remote_code)
    _keep_float32(model, dtype)
    model.requires_grad_(False)
    model.eval()
    adapters.adapt(model)
    model.register_forward_pre_hook(_restart)
    return model


def _forget_quantization(config: Any) -> None:
    """Formats unpack to dense weights, so transformers' quantizers have no part in the model."""
    for owner in (config, getattr(config, "text_config", None)):
        for key in ("quantization_config", "compression_config"):
            if owner is not None and key in owner.__dict__:
                delattr(owner, key)


def _restart(module: nn.Module, args: object) -> None:
    attention.restart_numbering()


def _construct(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    kind = getattr(config, "model_type", "?")
    native = type(config).__module__
    if native.startswith("transformers.models."):
        adapters.open_tables(_modeling(native))
    try:
        with compat.meta_parameters(), torch.no_grad():
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=attention.NAME,
                experts_implementation=attention.NAME,
                trust_remote_code=trust_remote_code,
            )
    except UnsupportedModel:
        raise
    except Exception as error:  # whatever the model's own code raises is the model's fault
        raise UnsupportedModel(f"{kind} does not build: {type(error).__name__}: {error}") from error
    model.tie_weights()
    compat.initialize_buffers(model)
    return model


def _modeling(config_module: str) -> Any:
    """The modeling module beside a configuration module of transformers (or an empty one)."""
    name = config_module.replace(".configuration_", ".modeling_")
    try:
        return importlib.import_module(name)
    except ImportError:
        return types.ModuleType(name)


def _keep_float32(model: Any, dtype: torch.dtype) -> None:
    """Give what the model keeps in float32 that dtype, as from_pretrained does."""
    patterns = compat.keep_in_fp32(model, dtype)
    if not patterns:
        return
    wanted = re.compile("|".join(f"({p.replace('*', '.*')})" for p in patterns))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point() or not wanted.search(name):
            continue
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor.float()
        else:
            module._parameters[leaf] = nn.Parameter(tensor.float(), requires_grad=False)
