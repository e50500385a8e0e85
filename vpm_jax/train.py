"""Trains VPM: python -m vpm_jax.train --config market --workdir runs/market

Goes from images to a checkpoint and a table of results on partial queries. Run the same command again to continue an
interrupted run.
"""

from __future__ import annotations

from collections.abc import Sequence

from vpm_jax import cli


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog="python -m vpm_jax.train", description=__doc__)
    cli.add_config(parser, default="synthetic")
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
    workdir = args.workdir or cli.default_workdir(args.config)

    # Loader processes import this module again, so it stays light.
    from vpm_jax.runs import hosts
    from vpm_jax.training import train

    with hosts.joined(args):
        return train(config, workdir, resume=args.resume == "auto")


if __name__ == "__main__":
    cli.run(main)
