"""From options to a speculator: the drafter that a config asks for.

Here: `check_draft`, `compile_draft`, `make_speculator`. Not here: drafters (``drafters``), their
memory (``memory``).
"""

from __future__ import annotations

from dataclasses import replace

from fxlm.compiler.artifact import Artifact
from fxlm.compiler.errors import InvalidOption
from fxlm.models.facts import vocab_size
from fxlm.runtime.compile import Compilation, Report, compile_for, open_for
from fxlm.runtime.drafters.base import Drafter
from fxlm.runtime.drafters.custom import FIELD, custom_drafter
from fxlm.runtime.drafters.draft_model import ModelDrafter
from fxlm.runtime.drafters.ngram import NgramDrafter
from fxlm.runtime.drafters.suffix import SuffixDrafter
from fxlm.runtime.lengths import Lengths
from fxlm.runtime.options import EngineOptions
from fxlm.runtime.speculative_config import SpeculativeConfig
from fxlm.runtime.speculator import Speculator
from fxlm.runtime.step import Worker, WorkerSpec


def draft_options(options: EngineOptions) -> EngineOptions | None:
    """Options of the draft model's own compilation; None if no model drafts."""
    config = options.speculative_config
    if config is None or config.kind != "draft_model":
        return None
    eager = options.enforce_eager if config.enforce_eager is None else config.enforce_eager
    return replace(
        options,
        model=str(config.model),
        revision=config.revision,
        max_model_len=config.max_model_len,
        enforce_eager=eager,
        passes=(),
        disable_passes=(),
        tap=(),
        steer=(),
        quantization=config.quantization,
        speculative_config=None,
    )


def check_draft(options: EngineOptions) -> None:
    """Refuse a draft model of other tokens before anything is compiled, if the configs tell.

    Raises:
        InvalidOption: its tokens are not the target's.
    """
    own = draft_options(options)
    if own is not None:
        sizes = [vocab_size(open_for(each).config) for each in (options, own)]
        _require_same(options, own, *sizes)


def compile_draft(
    options: EngineOptions, target: Artifact, report: Report | None = None
) -> Compilation | None:
    """Find or make the artifact of the draft model; None if no model drafts.

    Raises:
        InvalidOption: its tokens are not the target's.
    """
    own = draft_options(options)
    if own is None:
        return None
    compilation = compile_for(own, report=report)
    sizes = [int(a.manifest["model"]["vocab_size"]) for a in (target, compilation.artifact)]
    _require_same(options, own, *sizes)
    return compilation


def _require_same(
    options: EngineOptions, own: EngineOptions, target: int | None, draft: int | None
) -> None:
    """Compare the sizes of the vocabularies, as far as they are known."""
    if target is None or draft is None or target == draft:
        return
    raise InvalidOption(
        FIELD, own.model,
        f"it has a vocabulary of {draft} tokens and {options.model} one of {target}: "
        "a draft model needs the target's tokenizer",
    )  # fmt: skip


def make_speculator(
    config: SpeculativeConfig,
    spec: WorkerSpec,
    draft: Worker | None = None,
    *,
    enable_prefix_caching: bool = True,
) -> Speculator:
    """The speculator of an engine.

    Args:
        config: what to draft with.
        spec: of the target's worker.
        draft: worker of the draft model, if one drafts.
        enable_prefix_caching: of the draft model's cache.
    """
    lengths = Lengths(config.most, adaptive=config.adaptive)
    return Speculator(_drafter(config, spec, draft, enable_prefix_caching), lengths)


def _drafter(
    config: SpeculativeConfig, spec: WorkerSpec, draft: Worker | None, caching: bool
) -> Drafter:
    match config.kind:
        case "ngram":
            return NgramDrafter(*config.lookup)
        case "suffix":
            return SuffixDrafter(
                max_depth=config.suffix_decoding_max_tree_depth,
                max_cached_requests=config.suffix_decoding_max_cached_requests,
                max_spec_factor=config.suffix_decoding_max_spec_factor,
                min_token_prob=config.suffix_decoding_min_token_prob,
            )
        case "custom_class":
            return custom_drafter(config, spec)
        case "draft_model":
            assert draft is not None, config
            return ModelDrafter(draft, enable_prefix_caching=caching)
