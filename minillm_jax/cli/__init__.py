"""The command line: the only place that prints or exits."""

from minillm_jax.cli.commands import main as main
