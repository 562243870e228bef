"""Every error a user can meet, in one tree.

    FxlmError
      InvalidOption      an option of the command line or of the Python API
      InvalidModel       a checkpoint that is missing, damaged or refused
      UnsupportedModel   a model that cannot be captured
      PassError          a graph pass that fired too seldom, too often, or broke the graph
      ContractError      a graph that is not lawful at its stage
      ArtifactError      a compiled artifact that is damaged, foreign or absent
      InvalidRequest     a field of a request (names the field: HTTP 400)
      OutOfMemory        memory that does not suffice, before or while serving
      EngineDead         the engine process is gone; carries the reason
        PeersLost        a rank that cannot go on without the others

Faults of our own are assertions with values, not classes of this file.
"""


class FxlmError(Exception):
    """Base of every error raised for a fault outside fxlm itself."""


class InvalidOption(FxlmError):
    """An option has a value that cannot be used.

    Args:
        field: name of the option as the user wrote it, e.g. ``--dtype``.
        value: the offending value.
        remedy: what to write instead, as a sentence.
    """

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field}={value!r} cannot be used: {remedy}")
        self.field = field
        self.value = value
        self.remedy = remedy


class InvalidModel(FxlmError):
    """A checkpoint is missing, damaged, or in a format that is refused."""


class UnsupportedModel(FxlmError):
    """A model cannot be captured; names the op, the module and the line of its source."""


class PassError(FxlmError):
    """A graph pass rewrote another number of places than it must, or broke the graph."""


class ContractError(FxlmError):
    """A graph breaks the law of its stage."""


class ArtifactError(FxlmError):
    """A compiled artifact is damaged, was made for another machine, or is absent."""


class InvalidRequest(FxlmError):
    """A request cannot be served as it stands.

    Args:
        message: what was wrong, the value, and the remedy.
        param: the field of the request, in the client's spelling (``None``: the whole request).
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class OutOfMemory(FxlmError):
    """Memory does not suffice; says how much is needed and how much there is."""


class EngineDead(FxlmError):
    """The engine is gone; the message is its last words."""


class PeersLost(EngineDead):
    """The other ranks are gone or silent: what ails them is the reason, not this rank."""
