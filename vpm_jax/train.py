"""Trains VPM: python -m vpm_jax.train --config configs/market.py --workdir runs/market

Goes from images to a checkpoint and a table of results on partial queries. Run the same command again to continue an
interrupted run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vpm_jax import cli


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog="python -m vpm_jax.train", description=__doc__)
    cli.add_config(parser, default="configs/synthetic.py")
    parser.add_argument("--workdir", type=cli.path, help="checkpoints, metrics and results (default: runs/CONFIG)")
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto: continue the run in the workdir, if any; never: refuse a workdir with a run (default: auto)",
    )
    cli.add_hosts(parser)
    args, overrides = parser.parse_known_args(argv)
    config = cli.load_config(args.config, overrides)
    name = args.config.removesuffix(".py").replace(".py:", "-")
    workdir = args.workdir or Path("runs") / Path(name).name

    # Loader processes import this module again, so it stays light.
    from vpm_jax.runs import hosts
    from vpm_jax.training import train

    with hosts.joined(args):
        return train(config, workdir, resume=args.resume == "auto")


if __name__ == "__main__":
    cli.run(main)
