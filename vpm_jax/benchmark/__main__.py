from vpm_jax.benchmark import main
from vpm_jax.cli import run

if __name__ == "__main__":  # processes of the step's benchmark import this file again
    run(main)
