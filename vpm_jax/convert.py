"""Converts weights: python -m vpm_jax.convert runs/market --output market.safetensors

SOURCE is a value of config.pretrained: a workdir, a .pth, .safetensors or .npz, keras:FOLDER, released:FILE.
The extension of --output selects the format:

  .npz          the backbone, for config.pretrained
  .safetensors  for PyTorch: the backbone under torchvision's names, VPM's heads as locator.* and heads.N.*; the
                metadata hold the settings, and the file name lists differences from torchvision's network
  a folder      a workdir for vpm_jax.evaluate, from a whole VPM (the released code's, or our .safetensors);
                --config.KEY=VALUE changes its config, for example --config.data.name=dukemtmc
                (python -m vpm_jax.config lists the keys)
"""

from __future__ import annotations

from collections.abc import Sequence

from vpm_jax import cli, parallel
from vpm_jax import config as config_lib
from vpm_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog="python -m vpm_jax.convert", description=__doc__)
    parser.add_argument("source", metavar="SOURCE", help="KIND:PATH or PATH")
    parser.add_argument(
        "--output", type=cli.path, required=True, metavar="FILE", help=".npz, .safetensors or a new folder"
    )
    parser.add_argument("--data-root", default="", help='searched for "keras" (default: $VPM_DATA, else ./data)')
    parser.add_argument(
        "--partial", action="store_true", help="skip tensors that do not match, instead of rejecting the file"
    )
    parser.add_argument("--backbone-only", action="store_true", help=".safetensors without VPM's heads")
    parser.add_argument(
        "--keep-epsilon",
        action="store_true",
        help="keep the batch norms' epsilon in a .safetensors, for further training; by default they are folded to "
        "PyTorch's 1e-5, which is exact in eval mode",
    )
    args, overrides = parser.parse_known_args(argv)
    kind = args.output.suffix.lower()
    if kind not in (".npz", ".safetensors", ""):
        raise UserError(f"--output {args.output} ends in {kind!r}: expected .npz, .safetensors or a folder's name.")
    (cli.check_output if kind else cli.check_folder)("--output", args.output)
    if kind != ".safetensors" and (args.backbone_only or args.keep_epsilon):
        raise UserError("--backbone-only and --keep-epsilon are for an --output that ends in .safetensors.")

    if overrides and kind:
        raise UserError(f"{overrides[0]}: config keys are for an --output that is a folder.")

    parallel.prepare_backend()
    from vpm_jax import pretrained
    from vpm_jax.pretrained import own

    weights = pretrained.load(args.source, args.data_root, args.partial, key="SOURCE")
    print(f"Read {weights.source}.")
    if weights.skipped:
        print(f"Skipped: {weights.skipped}.")
    missing = sorted(set(weights.network.shapes()) - set(weights.flat()))
    if missing:
        raise UserError(
            f"{args.source} lacks {len(missing)} of the backbone's tensors ({missing[0]}, ...): it can initialize "
            "a training run, with config.pretrained=partial:PATH, but cannot be converted."
        )
    if kind == ".npz":
        own.write_npz(args.output, weights)
        print(f"Wrote {args.output}: train from it with --config.pretrained={args.output}")
    elif kind == ".safetensors":
        own.write_for_torch(args.output, weights, args.backbone_only, args.keep_epsilon)
    else:
        if weights.config is not None:
            cli.override(weights.config, overrides)
            config_lib.check(weights.config)
        own.write_workdir(args.output, weights)
        print(f"Wrote {args.output}: evaluate it with python -m vpm_jax.evaluate --workdir {args.output}")
    return 0


if __name__ == "__main__":
    cli.run(main)
