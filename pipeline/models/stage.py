"""The `model` stage: make, check or download the model that everything starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pipeline.artifact import Artifact
from pipeline.config import Model
from pipeline.context import Context, log
from pipeline.errors import InputError
from pipeline.facts.fact import read_facts
from pipeline.models.check import describe
from pipeline.models.tiny import fact_texts, write_tiny_model

# Weights as safetensors only: a .bin file is a pickle, which can run code. Hub repositories often hold the
# same weights in other forms, too, some of them in subfolders.
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_HUB_SUBFOLDERS = ["*/*"]


def run(section: dict[str, Any], inputs: dict[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """Returns `model` (its folder), what `describe` says about it, and the hub commit of a hub model."""
    model = Model.model_validate(section["model"])
    if model.tiny is not None:
        folder = out / "model"
        if not folder.exists():  # a killed run may have left it: it appears whole or not at all
            texts = fact_texts(read_facts(inputs["facts"].folder / "facts.jsonl"))
            write_tiny_model(folder, model.tiny, texts, section["seed"])
        return {"model": "model", "model_kind": "folder", **describe(folder)}
    assert model.path is not None
    if Path(model.path).is_absolute():
        return {"model": model.path, "model_kind": "folder", **describe(Path(model.path))}
    folder = _snapshot(model.path, model.revision)
    return {
        "model": str(folder),
        "model_kind": "folder",
        "hub": model.path,
        "hub_commit": folder.name,  # the cache names a snapshot's folder after its commit
        **describe(folder),
    }


def _snapshot(hub_id: str, revision: str | None) -> Path:
    """The folder of a hub model, downloaded if this machine does not have it and there is a network."""
    log.info("model: %s from the hub", hub_id)
    try:
        return Path(
            snapshot_download(
                hub_id, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_SUBFOLDERS
            )
        )
    # The order counts: a gated repository's error is also one of a repository that was not found.
    except LocalEntryNotFoundError:
        command = f"hf download {hub_id}" + (f" --revision {revision}" if revision else "")
        raise InputError(
            f"model.path: {hub_id} is neither a folder here nor in this machine's Hugging Face cache, "
            f"and the hub cannot be reached; run `{command}` where there is a network, "
            "or set model.path to a folder"
        ) from None
    except GatedRepoError:
        raise InputError(
            f"model.path: {hub_id} is gated: ask for access on its hub page, then `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise InputError(f"model.revision: {hub_id} has no revision {revision!r}") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(f"model.path: the hub has no model {hub_id} that you may read") from None
    except HfHubHTTPError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"model.path: downloading {hub_id} failed: {reason}; run again to go on") from None
