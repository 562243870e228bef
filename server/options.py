"""The flags: one function a group, and the typed options that the server reads from them.

Here: `add_engine_options` (shared by serve, compile, plan and check), `add_server_options`,
parsers of sizes, `ServerOptions`. Flag names are vLLM's where the meaning is the same.
Not here: what the engine makes of its flags (`fxlm.runtime.launch`).
"""

import argparse
import ipaddress
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from fxlm.compiler.errors import InvalidOption
from fxlm.server.limits import Limits

KV_CACHE_DTYPES = ("auto", "int8", "fp8", "fp8_e4m3")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
BACKENDS = ("auto", "mp", "ray", "external_launcher")
POLICIES = ("fcfs", "priority")
LOG_LEVELS = ("debug", "info", "warning", "error")
KEY_VARIABLE = "FXLM_API_KEY"
UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?", re.IGNORECASE)


def size_bytes(text: str) -> int:
    """``2GiB`` and ``2G`` are 2 * 2**30 bytes, ``2GB`` is 2 * 10**9, a bare number is bytes."""
    found = SIZE.fullmatch(text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write e.g. 2GiB, 512MiB or bytes")
    number, unit, suffix = found.group(1), found.group(2).lower(), (found.group(3) or "").lower()
    scale = 1000 ** "kmgt".index(unit) * 1000 if unit and suffix == "b" else UNITS[unit]
    value = int(float(number) * scale)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least one byte")
    return value


def whole(low: int) -> Callable[[str], int]:
    """A parser of whole numbers from `low` up."""

    def integer(text: str) -> int:
        value = int(text)  # argparse turns a ValueError into "invalid integer value"
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is less than {low}")
        return value

    return integer


def counts(text: str) -> tuple[int, ...]:
    """``1,2,4`` as numbers, each at least 1."""
    return tuple(whole(1)(part) for part in text.split(","))


def fraction(text: str) -> float:
    """A share between 0 (excluded) and 1."""
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def add_model_argument(parser: argparse.ArgumentParser, *, optional: bool) -> None:
    """The model: a directory, a hub id, or one of the bundled ones."""
    parser.add_argument(
        "model",
        nargs="?" if optional else None,
        default="bundled" if optional else None,
        metavar="MODEL",
        help="checkpoint directory, hub id, 'bundled' or 'bundled-draft'"
        + (" (default: bundled)" if optional else ""),
    )


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Flags of the model, the compiler and the engine; every command that compiles has them."""
    add_checkpoint_options(parser)
    add_memory_options(parser)
    add_parallel_options(parser)
    add_compiler_options(parser)
    add_speculative_options(parser)


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Which weights, tokenizer and numbers."""
    group = parser.add_argument_group("model")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="compute dtype")
    group.add_argument(
        "--quantization",
        metavar="SCHEME[,PATTERN=SCHEME...]",
        help="round weights while loading: int8, int8wo, int4, int4-g32, int4a8, int4a8-g32, fp8, "
        "fp8-channel, fp8-block; exceptions by module path, e.g. int4,down_proj=int8,head=int8",
    )
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub")
    group.add_argument("--tokenizer", metavar="DIR", help="tokenizer, if not the model's own")
    group.add_argument(
        "--max-model-len", type=whole(1), metavar="N", help="context length, in tokens"
    )
    group.add_argument(
        "--seed", type=int, metavar="N", help="makes requests without a seed repeatable"
    )
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the checkpoint",
    )


def add_parallel_options(parser: argparse.ArgumentParser) -> None:
    """How many ranks, and how they are started."""
    group = parser.add_argument_group("several ranks")
    group.add_argument(
        "--tensor-parallel-size", "-tp", type=whole(1), metavar="N",
        help="ranks that share each layer",
    )  # fmt: skip
    group.add_argument(
        "--sequence-parallel", action="store_true",
        help="between the linears, each of these ranks has its share of the tokens alone",
    )  # fmt: skip
    group.add_argument(
        "--pipeline-parallel-size", "-pp", type=whole(1), metavar="N",
        help="parts that the layers are cut into",
    )  # fmt: skip
    group.add_argument(
        "--distributed-executor-backend",
        choices=BACKENDS,
        help="who starts the ranks: mp (processes of this machine), ray (actors of a Ray cluster), "
        "external_launcher (torchrun has); default: auto, torchrun if it runs this, otherwise mp",
    )
    group.add_argument(
        "--distributed-timeout-seconds", type=whole(1), metavar="S",
        help="how long a rank waits for another before the engine ends (default: 20)",
    )  # fmt: skip


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Flags of `fxlm plan` alone: another machine, and several numbers of ranks at once."""
    parser.add_argument(
        "--hardware", metavar="FILE",
        help="plan for the machine of this JSON file, or for a known one: cpu-2core-avx512, "
        "h100, 8xh100-nvlink",
    )  # fmt: skip
    for flag in ("-tp", "--tensor-parallel-size", "-pp", "--pipeline-parallel-size"):
        parser._option_string_actions[flag].type = counts


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """How much at once."""
    group = parser.add_argument_group("memory and batches")
    group.add_argument(
        "--kv-cache-memory-bytes", type=size_bytes, metavar="SIZE", help="KV cache, e.g. 2GiB"
    )
    group.add_argument(
        "--memory-fraction",
        type=fraction,
        metavar="F",
        help="share of the memory to plan with, when no size is given",
    )
    group.add_argument(
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        help="what the KV cache holds (default: auto, as the activations; fp8 is e4m3)",
    )
    group.add_argument("--block-size", type=whole(1), metavar="N", help="tokens in a KV block")
    group.add_argument("--max-num-seqs", type=whole(1), metavar="N", help="sequences in a step")
    group.add_argument(
        "--max-num-batched-tokens", type=whole(1), metavar="N", help="tokens in a step"
    )
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="reuse KV blocks of equal prefixes (default: on)",
    )
    group.add_argument(
        "--scheduling-policy",
        choices=POLICIES,
        default="fcfs",
        help="who goes first: the oldest, or the lowest 'priority' of a request (default: fcfs)",
    )


def add_compiler_options(parser: argparse.ArgumentParser) -> None:
    """How the model is compiled, where to and for what."""
    group = parser.add_argument_group("compiler and device")
    group.add_argument("--device", choices=DEVICES, default="auto")
    group.add_argument("--threads", type=whole(1), metavar="N", help="CPU threads of the engine")
    group.add_argument(
        "--enforce-eager", action="store_true", help="run the graph without Inductor (slow)"
    )
    group.add_argument(
        "--pass",
        dest="passes",
        action="append",
        default=[],
        metavar="PASS",
        help="a graph pass of your own: FILE.py:NAME, or an installed one; may be repeated",
    )
    group.add_argument(
        "--disable-pass",
        dest="disable_passes",
        action="append",
        default=[],
        metavar="NAME",
        help="leave out a pass of the pipeline; may be repeated",
    )
    add_point_options(group)
    group.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="where artifacts and prepared weights are kept (default: fxlm under $XDG_CACHE_HOME "
        "or ~/.cache)",
    )
    group.add_argument(
        "--prepared-weights",
        choices=("auto", "off"),
        help="keep packed weights in the cache for the next start to map (default: auto)",
    )


def add_point_options(group: argparse._ArgumentGroup) -> None:
    """Where requests may look into the model, or push it."""
    group.add_argument(
        "--tap",
        action="append",
        default=[],
        metavar="MODULE",
        help="let requests ask for what leaves this module, e.g. model.layers.3; may be repeated",
    )
    group.add_argument(
        "--steer",
        action="append",
        default=[],
        metavar="MODULE",
        help="let requests add a vector to what leaves this module; may be repeated",
    )


def add_speculative_options(parser: argparse.ArgumentParser) -> None:
    """Tokens drafted ahead."""
    group = parser.add_argument_group("speculative decoding")
    group.add_argument(
        "--speculative-config",
        metavar="JSON",
        help='e.g. \'{"method": "ngram", "num_speculative_tokens": 4}\' or \'{"model": "DIR"}\'; '
        "keys as in vLLM, see docs/speculative.md",
    )


def add_quantize_options(parser: argparse.ArgumentParser) -> None:
    """Flags of `fxlm quantize` alone."""
    parser.add_argument(
        "--scheme",
        required=True,
        metavar="SCHEME[,PATTERN=SCHEME...]",
        help="as --quantization of serve, e.g. int8, int4-g32, fp8-channel, int4,down_proj=int8",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="new directory")
    parser.add_argument(
        "--calibration", metavar="FILE", help="text that the model reads, to measure outputs"
    )
    parser.add_argument(
        "--budget-error",
        type=float,
        metavar="E",
        help="leave layers alone whose relative error is larger, e.g. 0.05",
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the checkpoint",
    )


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Flags of `fxlm serve` alone."""
    add_address_options(parser)
    add_access_options(parser)
    group = parser.add_argument_group("serving")
    group.add_argument(
        "--served-model-name",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names that clients call the model by (default: MODEL)",
    )
    group.add_argument(
        "--frozen",
        metavar="ARTIFACT",
        help="serve this artifact of MODEL and compile nothing; refused if it does not fit",
    )
    group.add_argument(
        "--tiered-start",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="serve from the uncompiled graph while it is compiled (default: on, with one rank)",
    )
    group.add_argument("--chat-template", metavar="FILE", help="Jinja file, or the template itself")
    group.add_argument(
        "--max-num-queued-reqs",
        type=whole(0),
        default=1024,
        metavar="N",
        help="sequences that may wait beyond --max-num-seqs before a 503 (default: 1024)",
    )
    group.add_argument(
        "--max-body-size",
        type=size_bytes,
        default=Limits().body_bytes,
        metavar="SIZE",
        help="largest request body (default: 8MiB)",
    )
    group.add_argument(
        "--shutdown-timeout",
        type=whole(0),
        default=30,
        metavar="S",
        help="seconds that running requests get after SIGTERM (default: 30)",
    )
    group.add_argument("--log-level", choices=LOG_LEVELS, default="info")


def add_address_options(parser: argparse.ArgumentParser) -> None:
    """Where the server listens."""
    group = parser.add_argument_group("address")
    group.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    group.add_argument("--port", type=whole(0), default=8000, help="default: 8000; 0 = any free")
    group.add_argument("--uds", metavar="PATH", help="a Unix socket instead of host and port")
    group.add_argument("--root-path", default="", metavar="PATH", help="prefix a proxy strips")
    group.add_argument("--ssl-certfile", metavar="FILE")
    group.add_argument("--ssl-keyfile", metavar="FILE")
    group.add_argument("--ssl-ca-certs", metavar="FILE")
    group.add_argument("--ssl-cert-reqs", type=int, choices=(0, 1, 2), default=0)
    group.add_argument("--ssl-ciphers", metavar="NAMES")


def add_access_options(parser: argparse.ArgumentParser) -> None:
    """Who may call."""
    group = parser.add_argument_group("access")
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"asked for on every route but /health and /version; may be repeated; better given "
        f"as {KEY_VARIABLE}, which other users of the machine cannot read",
    )
    group.add_argument(
        "--metrics-public", action="store_true", help="answer /metrics without a key"
    )
    group.add_argument(
        "--allowed-origins",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="web origins that may call from a browser (default: none)",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerOptions:
    """What the HTTP side needs to know; the engine's flags are not in it."""

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    root_path: str = ""
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = 0
    ssl_ciphers: str | None = None
    api_keys: tuple[str, ...] = ()
    metrics_public: bool = False
    allowed_origins: tuple[str, ...] = ()
    max_num_queued_reqs: int = 1024
    shutdown_timeout_s: int = 30
    log_level: str = "info"
    limits: Limits = field(default_factory=Limits)

    @property
    def is_public(self) -> bool:
        """Whether other machines can reach the server."""
        if self.uds is not None or self.host == "localhost":
            return False
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return True


def server_options(args: argparse.Namespace) -> ServerOptions:
    """The typed options of the parsed flags.

    Raises:
        InvalidOption: a combination that cannot work.
    """
    check_server_options(args)
    secret = os.environ.get(KEY_VARIABLE, "")
    return ServerOptions(
        host=args.host,
        port=args.port,
        uds=args.uds,
        root_path=args.root_path,
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        ssl_ciphers=args.ssl_ciphers,
        api_keys=(*args.api_key, *([secret] if secret else [])),
        metrics_public=args.metrics_public,
        allowed_origins=tuple(args.allowed_origins),
        max_num_queued_reqs=args.max_num_queued_reqs,
        shutdown_timeout_s=args.shutdown_timeout,
        log_level=args.log_level,
        limits=Limits(body_bytes=args.max_body_size),
    )


def check_server_options(args: argparse.Namespace) -> None:
    """Refuse what would fail later, or silently mean something else."""
    if any(not key.strip() or not key.isascii() for key in args.api_key):
        raise InvalidOption("--api-key", "", "a key is ASCII text and not empty")
    if args.ssl_keyfile and not args.ssl_certfile:
        raise InvalidOption("--ssl-keyfile", args.ssl_keyfile, "give --ssl-certfile as well")
    if args.port > 65535:
        raise InvalidOption("--port", args.port, "ports end at 65535")
    if args.root_path and not args.root_path.startswith("/"):
        raise InvalidOption("--root-path", args.root_path, "it must begin with /")
