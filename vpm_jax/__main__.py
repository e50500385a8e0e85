"""Lists the commands: python -m vpm_jax"""

from vpm_jax import __version__

COMMANDS = {
    "train": "train a model or resume a run, then evaluate it",
    "evaluate": "evaluate a run again, also on another dataset",
    "report": "write one HTML page about a run, or one ranked list as a figure",
    "search": "index a folder of images and rank it for a partial query",
    "reproduce": "train the models of the paper's tables and figures, and compare the numbers",
    "export": "write StableHLO that runs without this package, or safetensors for PyTorch",
    "convert": "convert weights between Keras, torchvision, timm, the authors' code and our runs",
    "prepare": "write a dataset as ArrayRecord files",
    "extents": "estimate how much of a person each image shows, and matching training crops",
    "benchmark": "time each stage beside the machine's limits",
    "config": "list every config key with its default and meaning",
}


def main() -> int:
    print(f"vpm_jax {__version__}. Commands (python -m vpm_jax.NAME --help):\n")
    for name, purpose in COMMANDS.items():
        print(f"  {name:10} {purpose}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
