"""The engine process as the server holds it, and the model it serves.

Here: opening tokenizer, template and defaults of a checkpoint; starting and stopping the engine.
Not here: the engine, its process and its sockets (`fxlm.runtime`).
"""

import argparse
import dataclasses
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from fxlm.compiler.errors import InvalidOption
from fxlm.models.chat import ChatTemplate
from fxlm.models.checkpoint import read_json
from fxlm.models.tokenizer import Tokenizer
from fxlm.runtime.client import EngineClient
from fxlm.runtime.launch import EngineSpec
from fxlm.runtime.messages import EngineInfo
from fxlm.server.served import ServedModel

# What vLLM takes from generation_config, too.
DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")


@asynccontextmanager
async def serving(
    spec: EngineSpec, args: argparse.Namespace
) -> AsyncIterator[tuple[EngineClient, ServedModel]]:
    """The running engine and what it serves; the engine's process ends with the block.

    Texts are opened first: a broken template is told before minutes of compiling.

    Raises:
        EngineDead: it did not start; carries its last words.
        InvalidModel, InvalidOption: see `open_model`.
    """
    model = open_model(spec, args)
    client = await EngineClient.start(spec.factory, spec.kwargs, hang_s=spec.hang_s)
    try:
        assert client.info is not None, "started without a word"
        yield client, sized(model, client.info)
    finally:
        await client.close()


def open_model(spec: EngineSpec, args: argparse.Namespace) -> ServedModel:
    """Names and texts of what is served; its sizes are the engine's to tell (`sized`).

    Raises:
        InvalidModel: tokenizer or template are damaged.
        InvalidOption: ``--chat-template`` is neither a file nor a template.
    """
    tokenizer = Tokenizer.open(spec.tokenizer, trust_remote_code=args.trust_remote_code)
    return ServedModel(
        names=tuple(args.served_model_name) or (spec.name,),
        root=spec.name,
        max_model_len=0,
        vocab_size=0,
        max_num_seqs=0,
        tokenizer=tokenizer,
        chat_template=open_template(spec, tokenizer, args.chat_template),
        eos_token_ids=tokenizer.eos_token_ids,
        defaults=open_defaults(spec.directory),
    )


def sized(model: ServedModel, info: EngineInfo) -> ServedModel:
    """`model` with the sizes of its engine; end tokens that it cannot draw are dropped."""
    return dataclasses.replace(
        model,
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        max_num_seqs=info.max_num_seqs,
        eos_token_ids=tuple(token for token in model.eos_token_ids if token < info.vocab_size),
    )


def open_template(
    spec: EngineSpec, tokenizer: Tokenizer, choice: str | None
) -> ChatTemplate | None:
    """The template asked for (a file, or its text), else the checkpoint's, else None."""
    if choice is None:
        return ChatTemplate.open(spec.tokenizer) or ChatTemplate.open(spec.directory)
    if "{" in choice:
        return ChatTemplate(choice, tokenizer.special_tokens)
    try:
        source = Path(choice).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        remedy = f"give a readable Jinja file, or the template itself ({error})"
        raise InvalidOption("--chat-template", choice, remedy) from error
    return ChatTemplate(source, tokenizer.special_tokens)


def open_defaults(directory: Path) -> Mapping[str, float]:
    """Numbers of generation_config.json that stand where a request gives none."""
    path = directory / "generation_config.json"
    found = read_json(path) if path.is_file() else {}
    return {
        name: found[name]
        for name in DEFAULTS
        if type(found.get(name)) in (int, float) and math.isfinite(found[name])
    }
