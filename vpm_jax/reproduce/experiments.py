"""The paper's tables and figures as lists of runs. A run is a scale's config with the keys that a method changes."""

from __future__ import annotations

import runpy
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vpm_jax import cli
from vpm_jax import config as config_lib
from vpm_jax.errors import UserError, first_line
from vpm_jax.keys import EVALUATE, KEYS, LISTED, NO_RESULT, PROCESS, PROTOCOL, keys_with

Changes = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """A row of a table: its title and the keys that differ from the scale's config."""

    title: str
    changes: Changes = field(default_factory=dict)
    of: str = ""  # the method whose checkpoint it evaluates; "": it is trained
    paper: str = ""  # its name in `paper`, if that is not the title

    @property
    def published(self) -> str:
        return self.paper or self.title


_GLOBAL = {"model.grid": (1, 1)}
_STRIPES = {
    "model.locator": "stripes",
    "loss.region_weight": 0.0,
    "loss.identity_regions": "all",
    "loss.triplet_pairs": "all",
    "match.visibility": "uniform",
    "match.squared": True,  # equals the distance of concatenated unit-length stripes
}
_WHOLE = {"data.crop": "none"}
_REGION_COUNTS = (2, 3, 4, 6, 8)

METHODS: dict[str, Method] = {
    "vpm": Method("VPM"),
    # To reach the paper's numbers at gamma 0.5, the baseline must be trained with crops (64.5) and PCB without (0.9).
    "baseline": Method("global feature", _GLOBAL, paper="baseline"),
    "pcb": Method("PCB", _STRIPES | _WHOLE),
    "vpm-nocrops": Method("VPM (no train crops)", _WHOLE),
    "baseline-nocrops": Method("global feature (no train crops)", _GLOBAL | _WHOLE),
    "pcb-crops": Method("PCB (train crops)", _STRIPES),
    "vpm-bottom": Method("VPM (Bottom)", {"data.crop": "bottom"}),
    "vpm-top": Method("VPM (Top)", {"data.crop": "top"}),
    "vpm-bilateral": Method("VPM (Bilateral)", {"data.crop": "bilateral"}),
    "vpm-notriplet": Method("VPM (no triplet)", {"stage1.triplet_weight": 0.0, "stage2.triplet_weight": 0.0}),
    "mvpm-1": Method("MVPM-1", {"match.visibility": "uniform"}, of="vpm"),
    "mvpm-2": Method("MVPM-2", {"loss.triplet_pairs": "all"}),
    "mvpm-3": Method("MVPM-3", {"loss.identity_regions": "all"}),
    "mvpm-4": Method("MVPM-4", {"loss.triplet_pairs": "all", "loss.identity_regions": "all"}),
    # The paper's VPM has six regions.
    **{f"vpm-p{p}": Method(f"VPM, p = {p}", {"model.grid": (p, 1)}, paper="VPM" * (p == 6)) for p in _REGION_COUNTS},
    # Columns of regions need training crops that lack the left or right side.
    "vpm-3x2": Method("VPM, 3 x 2", {"model.grid": (3, 2), "data.crop": "any"}),
}


class Exhibit(NamedTuple):
    """A table or a figure of the paper."""

    title: str
    methods: tuple[str, ...]
    tests: tuple[str, ...] = ()  # partial datasets to evaluate on as well
    shaded: bool = False  # methods differ in one number: drawn from light to dark
    maps: bool = False  # shows region maps
    differing: bool = False  # methods are close: drawn as differences to the first


EXHIBITS: dict[str, Exhibit] = {
    "table 1": Exhibit(
        "Table 1: VPM, the global feature and PCB over gamma",
        ("vpm", "baseline", "pcb", "vpm-nocrops", "baseline-nocrops", "pcb-crops"),
    ),
    "table 2": Exhibit(
        "Table 2: training crops of the bottom, the top, or either, and real partial images",
        ("vpm-bottom", "vpm-top", "vpm-bilateral"),
        ("partial_reid", "partial_ilids"),
    ),
    "table 3": Exhibit(
        "Table 3: what self-supervision contributes",
        ("vpm", "vpm-notriplet", "mvpm-1", "mvpm-2", "mvpm-3", "mvpm-4"),
        ("partial_ilids",),
        differing=True,
    ),
    "figure 4": Exhibit(
        "Figure 4: the number of regions", ("baseline", *(f"vpm-p{p}" for p in _REGION_COUNTS)), shaded=True
    ),
    "figure 5": Exhibit("Figure 5: region maps", ("vpm", "vpm-3x2"), maps=True),
}


class Scale(NamedTuple):
    """A size of training: the config file of each dataset and the keys that differ from it."""

    configs: Mapping[str, str]  # {dataset: FILE[:VARIANT]}; "" for any other dataset
    changes: Changes = {}


_SMALL, _FAST = {"": "configs/market.py:small"}, {"": "configs/market_fast.py"}
SCALES: dict[str, Scale] = {
    "paper": Scale({"": "configs/market.py", "dukemtmc": "configs/duke.py"}),
    "released": Scale({"": "configs/market_released.py"}),
    "small": Scale(_SMALL),
    # For choosing on held-out identities: 500 steps, ten minutes on one core.
    "screen": Scale(
        _SMALL,
        {
            "data.holdout_identities": 100,
            "stage2.epochs": 10,
            "stage2.steps_per_epoch": 50,
            "stage2.triplet_start": 2.5,
            "stage2.warmup_epochs": 1.0,
        },
    ),
    "fast": Scale(_FAST),
    # The same for ResNet-50 from ImageNet weights: 800 steps at 128x64, an hour on one core.
    "fast_screen": Scale(
        _FAST,
        {
            "data.holdout_identities": 100,
            "data.height": 128,
            "data.width": 64,
            "model.dtype": "bfloat16",
            "stage1.epochs": 0,
            "stage2.epochs": 10,
            "stage2.triplet_start": 1.0,
            "stage2.warmup_epochs": 1.0,
        },
    ),
    "synthetic": Scale({"": "configs/synthetic.py"}),
}


def config_file(scale: str, dataset: str) -> str:
    """The config of a scale, FILE[:VARIANT]."""
    configs = SCALES[scale].configs
    return configs.get(dataset, configs[""])


def base_config(scale: str, dataset: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The VPM config of a scale and a dataset; `overrides` are --config.KEY=VALUE.

    Raises:
      UserError: for an invalid override, or one of a key that is part of the run's name.
    """
    config = cli.load_config(config_file(scale, dataset))
    for key, value in ({"data.name": dataset} | dict(SCALES[scale].changes)).items():
        config_lib.set_key(config, key, value)
    cli.override(config, overrides)
    if config.data.name != dataset or config.seed:
        raise UserError("--config.data.name and --config.seed are set by --dataset and --seeds: use those.")
    if "data.holdout_identities" in SCALES[scale].changes and not config.data.holdout_identities:
        raise UserError(
            f"The scale {scale} is for choosing, which never looks at a test set: keep data.holdout_identities above "
            "0, or use --scale small or fast."
        )
    config_lib.check(config)
    return config


@dataclass(frozen=True, eq=False)
class Run:
    """A training run, or an evaluation of another run's checkpoint."""

    dataset: str
    scale: str
    method: str  # a key of METHODS, or the name of an ingredient
    variant: str  # the user's name for overrides of all runs, or ""
    seed: int
    config: ConfigDict
    base: ConfigDict  # of the scale, without overrides
    of: Run | None = None  # the run whose checkpoint this one evaluates
    test: str = ""  # the partial dataset to evaluate on; "": the test set of `dataset`

    @property
    def name(self) -> str:
        """The name of its result file and its workdir."""
        suffix = f"-{self.variant}" * bool(self.variant) + f"-on-{self.test}" * bool(self.test)
        return f"{family(self.dataset, self.scale)}-{self.method}{suffix}-seed{self.seed}"

    @property
    def changes(self) -> dict[str, Any]:
        """The keys that differ from the scale's config, without the seed."""
        return differences(self.base, self.config)

    def command(self) -> str:
        """The command line of this run alone."""
        if self.of is None:
            spec = config_file(self.scale, self.dataset)
            command = f"python -m vpm_jax.train --config {spec} --workdir runs/{self.name}"
            before = cli.load_config(spec)
        else:
            command = f"python -m vpm_jax.evaluate --workdir runs/{self.of.name} --output runs/{self.name}"
            before = self.of.config
        command += f" --dataset {self.test}" * bool(self.test)
        changes = differences(before, self.config).items()
        return " ".join([command, *(f"--config.{key}={shlex.quote(str(value))}" for key, value in changes)])


def family(dataset: str, scale: str) -> str:
    """The prefix of run names."""
    return dataset if dataset == scale else f"{dataset}-{scale}"


def fingerprint(config: ConfigDict) -> dict[str, Any]:
    """The keys that a result depends on. Pretrained weights are known by file name, without the folder."""
    irrelevant = keys_with(NO_RESULT)
    leaves = {key: value for key, value in config_lib.flatten(config).items() if key not in irrelevant}
    kind, colon, path = leaves["pretrained"].rpartition(":")
    leaves["pretrained"] = kind + colon + path.rstrip("/").rpartition("/")[2]
    return leaves


def differences(old: ConfigDict, new: ConfigDict) -> dict[str, Any]:
    """{key: new value} of the keys that differ and that a result depends on."""
    before, after = fingerprint(old), fingerprint(new)
    return {key: value for key, value in after.items() if before[key] != value}


def make_run(
    dataset: str,
    scale: str,
    method: str,
    seed: int = 0,
    test: str = "",
    variant: str = "",
    overrides: Sequence[str] = (),
    methods: Mapping[str, Method] = METHODS,
) -> Run:
    """The run of a method. A method that changes nothing (p = 4 where VPM has 4 regions) shares VPM's run.

    Args:
      dataset, scale: a value of data.name, a key of SCALES.
      method: a key of `methods`.
      test: a partial dataset to evaluate on instead of training.
      variant: the name of the overrides.
      overrides: --config.KEY=VALUE, for all methods.
      methods: {name: method}.

    Raises:
      UserError: as `base_config`; for an override of a key that the method sets; for overrides without a variant.
    """
    base, config, own = base_config(scale, dataset), base_config(scale, dataset, overrides), methods[method]
    changed = differences(base, config)
    if changed and not variant:
        raise UserError(
            f"--config.{next(iter(changed))} changes results, whose files are named by scale and method: name this "
            "configuration with --variant NAME."
        )
    if taken := sorted(set(changed) & set(own.changes)):
        raise UserError(f"--config.{taken[0]} is set by {method}: leave it out, or choose other --models.")
    plain, config = config, config.copy_and_resolve_references()
    for key, value in own.changes.items():
        config_lib.set_key(config, key, value)
    if not own.of and not differences(plain, config):
        method = "vpm"
    config.seed = base.seed = seed
    parent = None
    if own.of or test:
        parent = make_run(dataset, scale, own.of or method, seed, "", variant, overrides, methods)
    return Run(dataset, scale, method, variant, seed, config, base, parent, test)


class Cell(NamedTuple):
    """The position of a run in the tables."""

    method: str
    test: str
    seed: int


def plan(
    exhibits: Sequence[str],
    dataset: str,
    scale: str,
    seeds: int,
    models: Sequence[str] = (),
    variant: str = "",
    overrides: Sequence[str] = (),
) -> dict[Cell, Run]:
    """The runs of tables and figures, seed by seed. Cells with the same config share a run.

    Partial datasets are test sets, so they are left out of scales that hold out identities, and of synthetic
    pedestrians, whose models do not transfer.

    Args:
      exhibits: keys of EXHIBITS.
      dataset, scale, variant, overrides: as of `make_run`.
      seeds: 0 to seeds - 1.
      models: only these methods; empty: all.

    Raises:
      UserError: as `make_run`.
    """
    cells: dict[Cell, Run] = {}
    for seed in range(seeds):
        for exhibit in map(EXHIBITS.__getitem__, exhibits):
            for method in (m for m in exhibit.methods if not models or m in models):
                own = make_run(dataset, scale, method, seed, "", variant, overrides)
                cells[Cell(method, "", seed)] = own
                for test in exhibit.tests if dataset != "synthetic" and not own.config.data.holdout_identities else ():
                    cells[Cell(method, test, seed)] = make_run(dataset, scale, method, seed, test, variant, overrides)
    return cells


def is_name(text: Any) -> bool:
    """Whether something can be part of the names of runs and their files, whose separator is "-"."""
    return isinstance(text, str) and text.replace("_", "").replace(".", "").isalnum()


def ingredients(path: Path) -> dict[str, Method]:
    """The ingredients of a recipe that a config file lists, to be tried one at a time.

    SCREEN is {name: keys that differ from the scale's config}; its first entry changes nothing and is the base of all
    comparisons. EVALUATED is {name: (the name in SCREEN whose checkpoint is evaluated, keys)}.

    Raises:
      UserError: for a file without such lists; for an invalid or duplicate name; for a key that does not exist or that
        no ingredient may set.
    """
    try:
        values = runpy.run_path(str(path))
        screen = {name: dict(keys) for name, keys in values["SCREEN"].items()}
        evaluated = {name: (of, dict(keys)) for name, (of, keys) in values.get("EVALUATED", {}).items()}
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"{path} lists no ingredients ({reason}): expected a Python file with SCREEN = {{name: {{key: value}}}}, "
            "such as configs/market_plus.py."
        ) from error
    if not screen or next(iter(screen.values())):
        raise UserError(f"SCREEN in {path} must begin with a base that changes nothing, NAME: {{}}.")
    if taken := sorted((set(screen) | set(evaluated)) & set(METHODS) | set(screen) & set(evaluated)):
        raise UserError(f"{taken[0]} in {path} is the name of another model: choose another name.")
    known, protocol = {key.name for key in KEYS}, set(keys_with(PROTOCOL))
    evaluation = set(keys_with(EVALUATE)) - set(keys_with(PROCESS))
    for name, keys in [*screen.items(), *((name, keys) for name, (_, keys) in evaluated.items())]:
        if not is_name(name):
            raise UserError(f"{name!r} in {path}: expected a name of letters, digits, dots and underscores.")
        if wrong := sorted(map(str, set(keys) - known)):
            raise UserError(f"Ingredient {name} sets {wrong[0]}, which is not a config key: {LISTED}.")
        if wrong := sorted(set(keys) & protocol):
            raise UserError(f"Ingredient {name} sets {wrong[0]}, which must be the same in all runs: leave it out.")
    for name, (of, keys) in evaluated.items():
        if of not in screen:
            raise UserError(f"Ingredient {name} evaluates {of}, which SCREEN in {path} does not define.")
        if wrong := sorted(set(keys) - evaluation):
            raise UserError(f"Ingredient {name} sets {wrong[0]}, which affects training: move it to SCREEN.")
    methods = {name: Method(name, keys) for name, keys in screen.items()}
    return methods | {name: Method(name, screen[of] | keys, of=of) for name, (of, keys) in evaluated.items()}


def plan_ingredients(
    methods: Mapping[str, Method],
    dataset: str,
    scale: str,
    seeds: int,
    names: Sequence[str] = (),
    variant: str = "",
    overrides: Sequence[str] = (),
) -> dict[Cell, Run]:
    """The runs of `ingredients`, seed by seed: of these names or all, and always the base.

    Raises:
      UserError: for an invalid config, for a choice on the test set, and as `make_run`.
    """
    cells = {}
    for seed in range(seeds):
        for number, name in enumerate(methods):
            if not number or not names or name in names:
                run = make_run(dataset, scale, name, seed, "", variant, overrides, methods)
                try:
                    config_lib.check(run.config)
                except UserError as error:
                    raise UserError(f"Ingredient {name}: {error}", code=error.code) from error
                cells[Cell(name, "", seed)] = run
    if not names and not all(run.config.data.holdout_identities for run in cells.values()):
        raise UserError(
            "These runs evaluate on the test set, which is not for choosing: use --scale screen, or name the "
            "ingredients to confirm with --models NAME."
        )
    return cells


def distinct(runs: Iterable[Run]) -> list[Run]:
    """The runs by name, without duplicates, each after the run whose checkpoint it evaluates."""
    by_name: dict[str, Run] = {}
    for run in runs:
        for needed in (run.of, run):
            if needed is not None:
                by_name.setdefault(needed.name, needed)
    return list(by_name.values())
