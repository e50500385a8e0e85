from vpm_jax.cli import run
from vpm_jax.search import main

run(main)
