from vpm_jax.benchmark import main
from vpm_jax.cli import run

if __name__ == "__main__":  # the step section's processes import this file again
    run(main)
