"""The JSON objects beside weights, such as config.json and model_index.json: read within bounds, and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from converter.errors import BadFile, Unreachable, WconvError
from converter.formats.texts import read_config
from converter.storage import Place

NO_OBJECT = "is no JSON object"
"""What conversions take for an empty config, and the doctor for a fault."""


def look_into(place: Place) -> tuple[dict[str, Any], WconvError | None]:
    """Give the object in a JSON file, and what is wrong with it; an empty one where there is no such file."""
    try:
        content = read_config(place) if place.is_file() else {}
    except ValueError as error:
        return {}, BadFile(place, f"is not JSON ({error})", "Fetch it again.")
    except Unreachable:
        raise
    except WconvError as error:
        return {}, error
    return (content, None) if isinstance(content, dict) else ({}, BadFile(place, NO_OBJECT, "Fetch it again."))


def read_json(place: Place) -> dict[str, Any]:
    """Give the object in a JSON file, an empty one where there is none. Raises BadFile for what is no JSON."""
    content, error = look_into(place)
    if error is not None and error.problem != NO_OBJECT:
        raise error
    return content


def render_json(content: Mapping[str, Any]) -> bytes:
    """Give a config's content as its file has it."""
    return (json.dumps(content, indent=2) + "\n").encode()
