"""Array types that the annotations of several modules share."""

from __future__ import annotations

from typing import NotRequired, TypedDict

import jax
import numpy as np
from jaxtyping import Bool, Integer, UInt8

AnyArray = np.ndarray | jax.Array


class StepBatch(TypedDict):
    """The arrays of a training batch that the step uses. In the labels of a row locator, w is 1."""

    image: UInt8[AnyArray, "b H W 3"]
    identity: Integer[AnyArray, " b"]  # in 0 .. K-1
    labels: Integer[AnyArray, "b h w"]  # the region of every cell
    visible: Bool[AnyArray, "b p"]
    valid: NotRequired[Bool[AnyArray, "b h w"]]  # the cells that a padded image covers
