from vpm_jax.cli import run
from vpm_jax.reproduce import main

run(main)
