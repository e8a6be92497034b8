"""Assay: the security layer for collaborative training of language models."""

from importlib.metadata import version as _version

__version__ = _version("assay")
