"""`python -m minillm_jax` is `minillm-jax`."""

from minillm_jax.cli import main

main()
