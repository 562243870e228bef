"""fxlm: an LLM inference engine in which the compiler is the product."""

__version__ = "0.1.0"
