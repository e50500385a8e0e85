"""The stages of a training run."""

from __future__ import annotations

from dataclasses import dataclass

from ml_collections import ConfigDict

from vpm_jax.errors import UserError


@dataclass(frozen=True)
class Stage:
    """A training stage of resolved length: steps [first_step, end_step) of the run."""

    name: str  # "stage1" | "stage2", its key in the config
    index: int  # 1 | 2
    sampling: str  # "plain" | "pk"
    identities: int  # P and K of a batch
    images_per_identity: int
    epochs: int
    steps_per_epoch: int
    first_step: int
    height: int  # of the network's input, in pixels
    width: int

    @property
    def batch(self) -> int:
        return self.identities * self.images_per_identity

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def end_step(self) -> int:
        return self.first_step + self.steps


def schedule(config: ConfigDict, num_images: int | None = None, num_identities: int | None = None) -> tuple[Stage, ...]:
    """The stages that have epochs, in order, with steps per epoch resolved.

    If `steps_per_epoch` is 0, an epoch is one pass: images // batch steps of a "plain" stage,
    identities // stage.identities steps of a "pk" stage (751 // 8 = 93), at least one.

    Args:
      config: the experiment's config, checked by `vpm_jax.config.check`.
      num_images, num_identities: of the training set. Not needed for a resolved config, whose `steps_per_epoch` are
        set; otherwise an epoch without them is one step.

    Raises:
      UserError: if the stages differ in batch size, or a "pk" stage needs more identities than the training set has.
    """
    stages: list[Stage] = []
    for index, name in enumerate(("stage1", "stage2"), start=1):
        values = config[name]
        if not values.epochs:
            continue
        if values.sampling == "pk" and num_identities is not None and values.identities > num_identities:
            raise UserError(
                f"config.{name}.identities is {values.identities}, but the training set has {num_identities}: "
                "lower it or use more data."
            )
        batch = values.identities * values.images_per_identity
        one_pass = (num_identities or 0) // values.identities
        if values.sampling == "plain":
            one_pass = (num_images or 0) // batch
        stage = Stage(
            name=name,
            index=index,
            sampling=values.sampling,
            identities=values.identities,
            images_per_identity=values.images_per_identity,
            epochs=values.epochs,
            steps_per_epoch=values.steps_per_epoch or max(1, one_pass),
            first_step=stages[-1].end_step if stages else 0,
            height=int(values.height or config.data.height),
            width=int(values.width or config.data.width),
        )
        stages.append(stage)
    if len({stage.batch for stage in stages}) > 1:
        sizes = " and ".join(f"{s.identities} x {s.images_per_identity} images in {s.name}" for s in stages)
        raise UserError(f"A batch has {sizes}, expected the same number in both: the step is compiled for one size.")
    return tuple(stages)


def notes(config: ConfigDict) -> list[str]:
    """Sentences about settings of the schedule that never take effect."""
    sentences = []
    for stage in schedule(config):
        values, name = config[stage.name], stage.name
        of_epochs = f"of {stage.epochs} epoch{'s' * (stage.epochs > 1)}"
        if values.triplet_weight:
            if values.triplet_start >= stage.epochs:
                sentences.append(
                    f"the triplet loss never starts ({name}.triplet_start {values.triplet_start:g} {of_epochs})"
                )
            if stage.sampling == "pk" and stage.identities == 1:
                sentences.append(f"no triplet can be mined: batches hold one identity ({name}.identities 1)")
            if stage.sampling == "pk" and stage.images_per_identity == 1:
                one = f"one image of each identity ({name}.images_per_identity 1)"
                sentences.append(f"no triplet can be mined: batches hold {one}")
        if values.warmup_epochs >= stage.epochs:
            warmup = f"{name}.warmup_epochs {values.warmup_epochs:g} {of_epochs}"
            sentences.append(f"the learning rate never reaches {values.learning_rate:g} ({warmup})")
        by_steps = values.schedule == "step" and config.optim.schedule == "stages"
        if by_steps and values.decay_epochs and min(values.decay_epochs) >= stage.epochs:
            decays = f"{name}.decay_epochs {', '.join(f'{epoch:g}' for epoch in values.decay_epochs)} {of_epochs}"
            sentences.append(f"the learning rate never decays ({decays})")
    return [f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences]


def triplet_weight(config: ConfigDict, steps: int) -> float:
    """The weight of the triplet loss in the last of `steps` finished steps."""
    within, stage = stage_of(config, steps)
    return stage.triplet_weight if within > int(stage.triplet_start * stage.steps_per_epoch) else 0.0


def stage_at(stages: tuple[Stage, ...], step: int) -> Stage:
    """The stage that contains global step `step`. Raises ValueError if the schedule does not contain it."""
    for stage in stages:
        if stage.first_step <= step < stage.end_step:
            return stage
    raise ValueError(f"step {step} is outside the schedule's {stages[-1].end_step} steps")


def stage_of(config: ConfigDict, steps: int) -> tuple[int, ConfigDict]:
    """(finished steps within the stage, the stage's config) after `steps` finished steps of the run."""
    stage = stage_at(schedule(config), max(steps, 1) - 1)
    return steps - stage.first_step, config[stage.name]


def ends_epochs(config: ConfigDict, steps: int, every: int) -> bool:
    """Whether `steps` finished steps complete a multiple of `every` epochs of a stage."""
    within, stage = stage_of(config, steps)
    return within % (stage.steps_per_epoch * every) == 0
