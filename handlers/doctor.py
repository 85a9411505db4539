"""Checks of `jobworker doctor` for the built-in types: the model, and whether its vectors fit."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import click
import orjson

from jobworker.worker.options import ENV_PREFIX, ExplicitOption
from jobworker.worker.urls import parse_http_url

#: Level (ok, note or wrong), subject, what was found, what to do.
Found = tuple[str, str, str] | tuple[str, str, str, str]
#: Loading a large model from a slow disk takes minutes.
_MODEL_WITHIN_S = 600.0
_NO_MODEL = "\0"
OPTIONS = (
    click.option("--milvus-prefix", cls=ExplicitOption, default="z_novel_",
                 envvar=f"{ENV_PREFIX}_MILVUS_PREFIX", help="Prefix of the collection names."),
    click.option("--milvus-uri", cls=ExplicitOption, default="", envvar=f"{ENV_PREFIX}_MILVUS_URI",
                 help="Milvus of the deployment.  [default: that of the service of --data-dir]"),
    click.option("--device", cls=ExplicitOption, default="auto", envvar=f"{ENV_PREFIX}_DEVICE",
                 help="With --model."),
    click.option("--configured-model", cls=ExplicitOption, hidden=True, default="",
                 envvar=f"{ENV_PREFIX}_MODEL"),
    click.option("--model", is_flag=False, flag_value="", default=_NO_MODEL, show_default=False,
                 help="Load a model too, in a process of its own, and report its dimension. Without a name: "
                 "the service's model."),
)  # fmt: skip


def findings(options: Mapping[str, str], endpoints: Mapping[str, Any]) -> Iterator[Found]:
    """Nothing without ``--model``. ``endpoints``: addresses of the service on this machine."""
    if options["model"] != _NO_MODEL:
        if options["milvus_uri"]:
            parse_http_url(options["milvus_uri"], "--milvus-uri", "http://milvus.example:19530")
        milvus = milvus_access(options["milvus_uri"], str(endpoints.get("milvus_uri", "")))
        model = options["model"] or options["configured_model"]
        yield from _model(model, options["device"], milvus, options["milvus_prefix"])


def milvus_access(given: str, found: str) -> tuple[str, str]:
    """Uri and token. The uri of an embedded store holds its own, and clients would prefer the other."""
    embedded = not given and urlsplit(found).password is not None
    return given or found, "" if embedded else os.environ.get(f"{ENV_PREFIX}_MILVUS_TOKEN", "")


def _model(model: str, device: str, milvus: tuple[str, str], prefix: str) -> Iterator[Found]:
    """Look in a process of its own; ``milvus``: its uri and token."""
    command = [sys.executable, "-P", "-m", "jobworker.handlers.encoder.doctor", model, device, prefix]
    try:
        done = subprocess.run(
            # Not as arguments: every user of the host can read those.
            command, input="\n".join(milvus).encode(), capture_output=True, timeout=_MODEL_WITHIN_S,
            check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        found: dict[str, Any] = orjson.loads(done.stdout)
    except subprocess.TimeoutExpired:
        yield ("wrong", "model", f"not loaded within {_MODEL_WITHIN_S:.0f} s", "a nearer disk?")
        return
    except ValueError:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        yield ("wrong", "model", f"could not be loaded: {''.join(last)}", "its log says more")
        return
    yield from model_findings(found["model"], found.get("milvus"))


def model_findings(model: dict[str, Any], milvus: dict[str, Any] | None) -> Iterator[Found]:
    """Result of loading the model, and whether its vectors fit the collections."""
    if "error" in model:
        yield ("wrong", "model", model["error"], "name one by --model that is on this machine")
    else:
        says = f"{model['model']}: {model['dim']} dimensions, {model['max_tokens']} tokens a window"
        yield ("ok", "model", f"{says}, loaded in {model['load_s']} s")
    if milvus is None:
        return
    if "error" in milvus:
        do = "is it running, and are --milvus-uri and JOBWORKER_MILVUS_TOKEN right?"
        yield ("wrong", "Milvus", milvus["error"], do)
        return
    yield ("ok", "Milvus", f"version {milvus['version']}{' (Lite)' if milvus['lite'] else ''}")
    for name, dim in milvus["dims"].items():
        if dim is None:
            yield ("note", "Milvus", f"there is no {name} yet: its first write makes it")
        elif dim != model.get("dim", dim):
            yield ("wrong", "Milvus", f"{name} holds vectors of {dim} dimensions, not {model['dim']}",
                          "start with the model it was filled with, or rebuild it")  # fmt: skip
        else:
            yield ("ok", "Milvus", f"{name} holds vectors of {dim} dimensions")
