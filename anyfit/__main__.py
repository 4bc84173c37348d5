"""`python -m anyfit` is `anyfit`."""

from anyfit.cli import app

app(prog_name="anyfit")
