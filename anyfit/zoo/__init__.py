"""The embedded default: a small network really trained, with its data and the script that trained it."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""A Llama trained on the source code of the Python standard library: see `model/README.md`."""

DATA = "stdlib"
"""The name under which its text, the running interpreter's standard library, is asked for."""
