"""The step before Core ML conversion: a pipeline folder as ``torch2coreml.py`` loads it, or why it cannot be one.

What the script needs is known in ``libraries/coreml.py``; here it is held against a folder, and planned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from converter.errors import BadRequest
from converter.libraries import coreml
from converter.libraries.coreml import COREML_VARIANT, Lack
from converter.models.checkpoint import Checkpoint, open_checkpoint
from converter.models.component import Component, WeightSet
from converter.models.configs import look_into, read_json, render_json
from converter.models.faults import ADVICE, find_lost, look
from converter.models.hub_cache import check_places, snapshot_of
from converter.models.inventory import Inventory
