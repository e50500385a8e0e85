"""Folders of this checkout, for tests and for the processes they start."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"
CONFIGS = ROOT / "configs"
LOCAL = ROOT / "launch" / "local.sh"
REAL_DATA = Path(os.environ.get("VPM_DATA") or ROOT / "data")
# The flag of XLA:CPU to compile without its fusion emitters, which take long; only this version has it.
FUSION_EMITTERS = "xla_cpu_use_fusion_emitters" if version("jaxlib").startswith("0.10.") else ""
# The PYTHONPATH of a process: these helpers and this checkout's package come first.
PYTHON_PATH = os.pathsep.join(filter(None, [str(HELPERS), str(ROOT), os.environ.get("PYTHONPATH")]))
