"""The paper's tables and figures as lists of runs: each is a scale's config and the keys that a method changes."""

from __future__ import annotations

import runpy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vpm_jax import cli
from vpm_jax import config as config_lib
from vpm_jax.errors import UserError
from vpm_jax.keys import EVALUATE, KEYS, LISTED, NO_RESULT, PROCESS, PROTOCOL, keys_with

Changes = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """A row of a table: what it is called, and by which keys it differs from the scale's config."""

    title: str
    changes: Changes = field(default_factory=dict)
    of: str = ""  # the method whose checkpoint it evaluates; "": it trains its own
    paper: str = ""  # its name in `paper`, where that is not the title

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
    "match.squared": True,  # and so as its concatenated features, each stripe of unit length
}
_WHOLE = {"data.crop": "none"}
_PARTS = (2, 3, 4, 6, 8)

METHODS: dict[str, Method] = {
    "vpm": Method("VPM"),
    # Trained with the crops, as the paper's must have been (64.5 at 0.5).
    "baseline": Method("global feature", _GLOBAL, paper="baseline"),
    "pcb": Method("PCB", _STRIPES | _WHOLE),  # without, as published (0.9 at 0.5)
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
    **{f"vpm-p{p}": Method(f"VPM, p = {p}", {"model.grid": (p, 1)}, paper="VPM" * (p == 6)) for p in _PARTS},
    # To know left from right it must see pictures that lack either.
    "vpm-3x2": Method("VPM, 3 x 2", {"model.grid": (3, 2), "data.crop": "any"}),
}


class Exhibit(NamedTuple):
    """A table or a figure of the paper."""

    title: str
    methods: tuple[str, ...]
    tests: tuple[str, ...] = ()  # datasets of partial images that the trained models are evaluated on too
    shaded: bool = False  # its methods differ in a number, and are drawn from light to dark in its order
    maps: bool = False  # it shows pictures with the regions found in them
    differing: bool = False  # its methods are close: drawn as differences to the first


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
    "figure 4": Exhibit("Figure 4: the number of regions", ("baseline", *(f"vpm-p{p}" for p in _PARTS)), shaded=True),
    "figure 5": Exhibit("Figure 5: the regions found", ("vpm", "vpm-3x2"), maps=True),
}


class Scale(NamedTuple):
    """A size of training: the config file of each dataset, and what differs from it."""

    configs: Mapping[str, str]  # of "market1501", "dukemtmc", "synthetic"; "" for any other
    changes: Changes = {}


_SMALL = {"": "configs/market.py:small"}
SCALES: dict[str, Scale] = {
    "paper": Scale({"": "configs/market.py", "dukemtmc": "configs/duke.py"}),
    "released": Scale({"": "configs/market_released.py"}),
    "small": Scale(_SMALL),
    # To choose by: never the test set, and 500 steps, ten minutes on one core.
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
    "synthetic": Scale({"": "configs/synthetic.py"}),
}


def config_file(scale: str, dataset: str) -> str:
    """FILE[:VARIANT] of the config that a scale starts from."""
    configs = SCALES[scale].configs
    return configs.get(dataset, configs[""])


def base_config(scale: str, dataset: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config that a scale trains VPM with on a dataset; `overrides` are --config.KEY=VALUE.

    Raises:
      UserError: for an override that no config takes, or one of a key that names the run.
    """
    config = cli.load_config(config_file(scale, dataset))
    for key, value in ({"data.name": dataset} | dict(SCALES[scale].changes)).items():
        config_lib.set_key(config, key, value)
    cli.override(config, overrides)
    if config.data.name != dataset or config.seed:
        raise UserError("--config.data.name and --config.seed are set by --dataset and --seeds: use those.")
    if scale == "screen" and not config.data.holdout_identities:
        raise UserError(
            "The scale screen is for choosing, which never looks at a test set: leave data.holdout_identities above 0, "
            "or use --scale small."
        )
    config_lib.check(config)
    return config


@dataclass(frozen=True, eq=False)
class Run:
    """One training, or one evaluation of another run's checkpoint, and the config it is asked with."""

    dataset: str
    scale: str
    method: str  # a key of METHODS, or the name of a part
    variant: str  # what the user calls overrides that hold for all runs; "" without
    seed: int
    config: ConfigDict
    base: ConfigDict  # of the scale, without overrides
    of: Run | None = None  # the run whose checkpoint this one evaluates
    test: str = ""  # the dataset of partial images that it evaluates on; "": its own test set

    @property
    def name(self) -> str:
        """What its result file and its workdir are called."""
        what = f"-{self.variant}" * bool(self.variant) + f"-on-{self.test}" * bool(self.test)
        return f"{family(self.dataset, self.scale)}-{self.method}{what}-seed{self.seed}"

    @property
    def changes(self) -> dict[str, Any]:
        """The keys by which it differs from the scale's config, but for the seed."""
        return differences(self.base, self.config)

    def command(self) -> str:
        """The command line that does the same alone."""
        if self.of is None:
            spec = config_file(self.scale, self.dataset)
            start, begin = f"python -m vpm_jax.train --config {spec} --workdir runs/{self.name}", cli.load_config(spec)
        else:
            start = f"python -m vpm_jax.evaluate --workdir runs/{self.of.name} --output runs/{self.name}"
            begin = self.of.config
        start += f" --dataset {self.test}" * bool(self.test)
        return " ".join([start, *(_argument(*item) for item in differences(begin, self.config).items())])


def _argument(key: str, value: Any) -> str:
    text = str(value)
    return f"--config.{key}='{text}'" if set(text) & set("() ") else f"--config.{key}={text}"


def family(dataset: str, scale: str) -> str:
    """The start of a run's name."""
    return dataset if dataset == scale else f"{dataset}-{scale}"


def fingerprint(config: ConfigDict) -> dict[str, Any]:
    """Every key that a result depends on. Of pretrained weights the file's name counts, wherever it lies."""
    free = keys_with(NO_RESULT)
    leaves = {key: value for key, value in config_lib.flatten(config).items() if key not in free}
    kind, colon, path = leaves["pretrained"].rpartition(":")
    leaves["pretrained"] = kind + colon + path.rstrip("/").rpartition("/")[2]
    return leaves


def differences(old: ConfigDict, new: ConfigDict) -> dict[str, Any]:
    """{key: new value} of the keys that a result depends on and that differ."""
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
    """The run of a method. What changes nothing (p = 4 where VPM has 4 regions) is VPM's own run, by its name.

    Args:
      dataset, scale: keys of `config.data.name` and SCALES.
      method: a key of `methods`.
      test: a dataset of partial images, to evaluate on that instead of training.
      variant: the name of what the overrides make.
      overrides: --config.KEY=VALUE, for every method alike.
      methods: what there is to choose from.

    Raises:
      UserError: as `base_config`; for an override of what the method is about, or without a variant's name.
    """
    base, config, own = base_config(scale, dataset), base_config(scale, dataset, overrides), methods[method]
    changed = differences(base, config)
    if changed and not variant:
        raise UserError(
            f"--config.{next(iter(changed))} changes results, whose files are named by scale and method: name what "
            "you try by --variant NAME."
        )
    if taken := sorted(set(changed) & set(own.changes)):
        raise UserError(f"--config.{taken[0]} is what {method} is about: leave it out, or choose other --models.")
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
    """Where a run stands in the tables."""

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
    """The runs of tables and figures, seed by seed; cells that come to the same share a run.

    Partial images are test sets: a scale that holds out identities evaluates on none; nor do synthetic pedestrians,
    which look like nobody there.

    Args:
      exhibits: keys of EXHIBITS.
      dataset, scale, variant, overrides: as of `make_run`.
      seeds: 0 to seeds - 1.
      models: only these methods; all without.

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
    """Whether something can stand in the names of runs and their files, which "-" divides."""
    return isinstance(text, str) and text.replace("_", "").replace(".", "").isalnum()


def parts(path: Path) -> dict[str, Method]:
    """What a config file lists to be tried, one part at a time: its SCREEN {name: keys that differ from the scale's
    config} and its EVALUATED {name: (a name in SCREEN whose checkpoint is evaluated, keys)}. The first of SCREEN
    changes nothing: what the others are compared with.

    Raises:
      UserError: for a file without such lists, a name that files cannot have or that is another model's, a key that
        there is not or that no part may set.
    """
    try:
        found = runpy.run_path(str(path))
        screen = {name: dict(keys) for name, keys in found["SCREEN"].items()}
        evaluated = {name: (of, dict(keys)) for name, (of, keys) in found.get("EVALUATED", {}).items()}
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {cli.first_line(error)}"
        raise UserError(
            f"{path} lists no parts to try ({reason}): expected a Python file with SCREEN = {{name: {{key: value}}}}, "
            "as configs/market_plus.py has it."
        ) from error
    if not screen or next(iter(screen.values())):
        raise UserError(
            f"SCREEN in {path} must begin with a name for no change, {{}}: what the others are compared with."
        )
    if taken := sorted((set(screen) | set(evaluated)) & set(METHODS) | set(screen) & set(evaluated)):
        raise UserError(f"{taken[0]} in {path} is the name of another model: call the part something else.")
    known, protocol = {key.name for key in KEYS}, set(keys_with(PROTOCOL))
    evaluation = set(keys_with(EVALUATE)) - set(keys_with(PROCESS))
    for name, keys in [*screen.items(), *((name, keys) for name, (_, keys) in evaluated.items())]:
        if not is_name(name):
            raise UserError(f"{name!r} in {path}: expected a name of letters, digits, dots and underscores.")
        if wrong := sorted(map(str, set(keys) - known)):
            raise UserError(f"The part {name} sets {wrong[0]}, which is no config key: {LISTED}.")
        if wrong := sorted(set(keys) & protocol):
            raise UserError(f"The part {name} sets {wrong[0]}, by which all parts are judged: leave it out.")
    for name, (of, keys) in evaluated.items():
        if of not in screen:
            raise UserError(f"The part {name} evaluates {of}, which SCREEN in {path} has not.")
        if wrong := sorted(set(keys) - evaluation):
            raise UserError(f"The part {name} sets {wrong[0]}, which takes a training: put it into SCREEN.")
    methods = {name: Method(name, keys) for name, keys in screen.items()}
    return methods | {name: Method(name, screen[of] | keys, of=of) for name, (of, keys) in evaluated.items()}


def plan_parts(
    methods: Mapping[str, Method],
    dataset: str,
    scale: str,
    seeds: int,
    names: Sequence[str] = (),
    variant: str = "",
    overrides: Sequence[str] = (),
) -> dict[Cell, Run]:
    """The runs of `parts`, seed by seed: of these names, or all, and always what they are compared with.

    Raises:
      UserError: for a value that no part of the config can have, for all parts on a test set, and as `make_run`.
    """
    cells = {}
    for seed in range(seeds):
        for number, name in enumerate(methods):
            if not number or not names or name in names:
                run = make_run(dataset, scale, name, seed, "", variant, overrides, methods)
                try:
                    config_lib.check(run.config)
                except UserError as error:
                    raise UserError(f"The part {name}: {error}") from error
                cells[Cell(name, "", seed)] = run
    if not names and not all(run.config.data.holdout_identities for run in cells.values()):
        raise UserError(
            "These runs evaluate on the test set, which is not for choosing: take --scale screen, or confirm what it "
            "has chosen by --models NAME."
        )
    return cells


def distinct(runs: Iterable[Run]) -> list[Run]:
    """Each run once, by its name, after the one whose checkpoint it needs."""
    found: dict[str, Run] = {}
    for run in runs:
        for each in (run.of, run):
            if each is not None:
                found.setdefault(each.name, each)
    return list(found.values())
