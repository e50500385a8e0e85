"""Lists the commands: python -m vpm_jax"""

from vpm_jax import __version__

COMMANDS = {
    "train": "train a model, or resume a run, and evaluate it",
    "evaluate": "evaluate a run again, on its own or another test set",
    "report": "one HTML page about a run, or one ranked list as a figure",
    "search": "index a folder of images and query it with a partial one",
    "reproduce": "the paper's tables and figures, beside the paper's numbers",
    "export": "StableHLO for any JAX, safetensors for PyTorch",
    "convert": "weights of Keras, torchvision, timm and the authors' code, in and out",
    "prepare": "a dataset as ArrayRecord files",
    "extents": "how much of a person each image shows, and training crops to match",
    "benchmark": "speed of each stage beside the machine's limits",
    "config": "every config key with its default and meaning",
}


def main() -> int:
    print(f"vpm_jax {__version__}. Commands (python -m vpm_jax.NAME --help):\n")
    for name, purpose in COMMANDS.items():
        print(f"  {name:10} {purpose}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
