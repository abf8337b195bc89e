"""LoRA adapters that make a semantic cache hit on paraphrases and miss on look-alikes."""

from importlib.metadata import version

__version__ = version("cachelora")
