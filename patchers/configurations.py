"""Model configurations: from a directory, the local Hugging Face cache, or one short request to the hub."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

TIMEOUT_SECONDS = 4.0
"""`hf_hub_download` tries six times, which takes 23 s where there is no network."""


def directory_config(directory: str | Path, filename: str) -> dict[str, Any]:
    """The JSON object in a file of a directory; empty where there is no such file, or none in it."""
    path = Path(directory) / filename
    try:
        return _json_object(path.read_bytes()) if path.is_file() else {}
    except LookupError:
        return {}


def hub_config(name: str, filename: str) -> dict[str, Any]:
    """The JSON object in a file of a hub repository.

    Raises:
        LookupError: it cannot be had; the message is the reason, as a clause.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        cached = hf_hub_download(name, filename, local_files_only=True)
        return _json_object(Path(cached).read_bytes())
    except HFValidationError:
        raise LookupError("it is neither a directory nor a name that the hub allows") from None
    except LocalEntryNotFoundError:
        if constants.HF_HUB_OFFLINE:
            raise LookupError("it is not in the local cache, and HF_HUB_OFFLINE is set") from None
    return _json_object(_downloaded(name, filename))


def _downloaded(name: str, filename: str) -> bytes:
    from huggingface_hub import get_token, hf_hub_url

    request = urllib.request.Request(hf_hub_url(name, filename))
    if token := get_token():  # for the hub alone, not for where it may send us on
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            return bytes(response.read())
    except HTTPError as error:
        raise LookupError(f"the Hugging Face hub answered {error.code} {error.reason}") from None
    except OSError:
        raise LookupError("it is not in the local cache, and the Hugging Face hub cannot be reached") from None


def _json_object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise LookupError(f"its configuration is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise LookupError("its configuration is not a JSON object")
    return value
