"""What a submission is before any cluster hears of it: its id, its command line, what travels with it, and what may not."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import shlex
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import raysal
from raysal.config import Config, digest_of, load
from raysal.environment import CLIENT, JOB_CPUS, JOB_MEMORY, programs
from raysal.errors import ConfigError, InputError

VERBS = ("train", "score", "query", "label", "loop", "evaluate", "index")
"""The verbs that make sense far from the person who calls them."""

WITHOUT_CONFIG = ("index",)
"""Verbs that have no --config."""

OF_RUNS = ("train", "loop")
"""Verbs that take their places from the configuration: `run`, and `data.root`."""

IN_PROCESS = ("evaluate",)
"""Verbs whose network runs in the job's own process."""

PLACES = ("checkpoint", "manifest", "out", "scores", "labeled", "labels", "dataset", "places")
"""Parameters of the verbs that name files or folders."""

PREFIX = "raysal-"
"""Of every submission id, so that jobs of others are not listed."""

LARGEST_CONFIG = 2**20
"""Bytes of a config file; one that is larger is something else."""

LARGEST_WHEEL = 100 * 2**20
"""Bytes of a wheel: Ray's dashboard takes no larger package."""

SECRETS = (
    re.compile(r"://[^/@\s]*:[^/@\s]*@"),  # user:password@; a lone user, as in abfs://container@account, is none
    re.compile(r"[?&](x-amz-(signature|credential|security-token)|sig|signature|token|access_token|secret|password)=", re.IGNORECASE),
    re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"),  # ids of AWS keys
    re.compile(r"(aws_secret_access_key|secret_key|password|auth_token)['\"]?\s*[=:]\s*['\"]?[^\s'\"]", re.IGNORECASE),
)
"""Looks of a credential. Arguments and config files of jobs are kept, shown and logged by the cluster."""

VERSION = re.compile(r"^__version__ = [\"']([^\"']+)[\"']", re.MULTILINE)
"""Where raysal/__init__.py says it."""

HOW_SECRETS = "give the nodes the right themselves: a role, or a secret that is mounted (docs/security.md)"


@dataclass(frozen=True)
class Submission:
    """A verb with its arguments, ready to be sent.

    Attributes:
        verb: One of `VERBS`.
        arguments: As on the command line, the config file by its bare name.
        id: The same for the same work: verb, configuration without `compute`, and all other arguments.
        config: The local file that travels, None without one.
        wheel: The wheel that travels, None where the cluster's image has raysal.
        cpus: Logical CPUs that the job's own process books, so that it lands on a node that is there for work.
        memory: Bytes that it books; 0 books none.
        gpus: GPUs that it books: verbs that run the network in the job's own process need one with `compute.use_gpu`.
        on: A custom resource of the nodes that the job's own process may run on; empty where any will do.
        grows: Whether it may wait for nodes that an autoscaler brings: its configuration says so, or there is none to say it.
        here: Local paths among the arguments that exist on this machine, where the job may not see them.
        digest: Of the configuration.
    """

    verb: str
    arguments: tuple[str, ...]
    id: str
    config: Path | None = None
    wheel: Path | None = None
    cpus: float = 1.0
    memory: int = 0
    gpus: int = 0
    on: str = ""
    grows: bool = False
    here: tuple[str, ...] = field(default=())
    digest: str = ""

    @property
    def entrypoint(self) -> str:
        """What the cluster's shell runs."""
        return shlex.join(["python", "-m", "raysal", self.verb, *self.arguments])

    @property
    def metadata(self) -> dict[str, str]:
        """What the cluster shows of it beside the command."""
        return {"raysal_verb": self.verb, "raysal_version": raysal.__version__, "config_digest": self.digest}

    @contextlib.contextmanager
    def runtime_env(self) -> Iterator[dict[str, Any]]:
        """Ray's runtime environment: nothing of this machine but the config file and the wheel's package, each in a folder of its own.

        The wheel is unpacked, as Ray would have pip install it with all that it depends on, once more on every node.
        """
        made: dict[str, Any] = {"env_vars": {JOB_CPUS: f"{self.cpus:g}", JOB_MEMORY: str(self.memory), CLIENT: programs()}}
        with tempfile.TemporaryDirectory(prefix="raysal-submit-") as folder:
            alone = Path(folder) / "config"
            alone.mkdir()
            if self.config is not None:
                (alone / self.config.name).write_bytes(self.config.read_bytes())
            if self.config is not None or self.wheel is not None:  # a raysal where the node was started would go before the wheel's
                made["working_dir"] = str(alone)
            if self.wheel is not None:
                with zipfile.ZipFile(self.wheel) as packed:
                    packed.extractall(folder, [n for n in packed.namelist() if n.startswith("raysal/")])
                made["py_modules"] = [str(Path(folder) / "raysal")]
            yield made


def submission(
    verb: str,
    arguments: Sequence[str],
    values: Mapping[str, Any],
    wheel: Path | None = None,
    cpus: float = 1.0,
    memory: int = 0,
    on: str = "",
) -> Submission:
    """Makes a submission of a verb's arguments and refuses what could not work, or would tell a secret.

    Args:
        verb: One of `VERBS`.
        arguments: Of the verb, as given.
        values: The same, parsed: parameter names and values.
        wheel: See `Submission`.
        cpus, memory, on: See `Submission`.

    Raises:
        InputError: A credential among the arguments, a place that a job can't have, a wheel or config that can't travel.
    """
    config: Path | None = values.get("config")
    told = [*arguments, *([] if config is None else [_text(config)])]
    if any(secret.search(text) for text in told for secret in SECRETS):
        raise InputError(f"an argument or the config file holds what looks like a credential; a job's are kept and shown: {HOW_SECRETS}")
    cfg = None if verb in WITHOUT_CONFIG else load(config, values.get("set_", ()))
    if cfg is not None and cfg.compute.address:
        raise ConfigError(f"compute.address={cfg.compute.address}: a job works on the cluster that it was sent to; leave it out")
    places = [*_places(values), *(_places_of(cfg) if cfg is not None and verb in OF_RUNS else [])]
    for place in places:
        if "://" not in place and not os.path.isabs(place):
            raise InputError(
                f"{place}: a relative path, but a job has another working folder; give an absolute one on storage that every node of the "
                "cluster mounts, or a URI such as s3://BUCKET/..."
            )
    if wheel is not None:
        _check_wheel(wheel)
    digest = "" if cfg is None else cfg.digest()
    about = None if cfg is None else cfg.model_dump(mode="json", exclude={"compute"})
    rest = {k: v for k, v in values.items() if k not in ("config", "set_", "json_")}
    here = tuple(p for p in places if os.path.exists(p.removeprefix("file://")))
    id_ = f"{PREFIX}{verb}-{digest_of([verb, about, rest])[:12]}"
    gpus = int(cfg is not None and cfg.compute.use_gpu and verb in IN_PROCESS)
    grows = cfg is None or cfg.compute.grow_s > 0
    return Submission(verb, tuple(_bare(arguments)), id_, config, wheel, cpus, memory, gpus, on, grows, here, digest)


def check_address(address: str) -> str:
    """The address of a cluster's dashboard, without a slash at its end.

    Raises:
        InputError: It is no such address, or holds a user or password.
    """
    parts = urlsplit(address)
    if parts.username or parts.password or "@" in parts.netloc:
        raise InputError("the address holds a user or password; leave them out: Ray's token is read from ~/.ray/auth_token")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise InputError(f"--address {address}: expected the dashboard's, for example http://127.0.0.1:8265 or https://ray.example.org")
    return address.rstrip("/")


def in_clear(address: str) -> bool:
    """Whether a token sent there can be read on its way."""
    parts = urlsplit(address)
    with contextlib.suppress(ValueError):
        return parts.scheme == "http" and not ipaddress.ip_address(parts.hostname or "").is_loopback
    return parts.scheme == "http" and parts.hostname != "localhost"


def _text(config: Path) -> str:
    try:
        if config.stat().st_size > LARGEST_CONFIG:
            raise ConfigError(f"config {config}: {config.stat().st_size} bytes, a configuration has some thousand; name the YAML file")
        return config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {config}: can't be read: {error}") from error


def _bare(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments with the config file's bare name: in the job it lies in the working folder."""
    before = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if before == "--config":
            yield Path(argument).name
        elif name == "--config" and equals:
            yield f"--config={Path(value).name}"
        else:
            yield argument
        before = argument


def _places(values: Mapping[str, Any]) -> Iterator[str]:
    for name in PLACES:
        value = values.get(name)
        yield from [value] if isinstance(value, str) else value or []


def _places_of(cfg: Config) -> Iterator[str]:
    """The places that a configuration names."""
    yield cfg.run
    if cfg.data.root and cfg.data.reader != "synthetic":
        yield cfg.data.root
    yield from (name for name in (cfg.data.label_set, cfg.model.encoder_weights) if name and name.endswith((".json", ".safetensors")))


def _check_wheel(wheel: Path) -> None:
    """Raises InputError where a file is no wheel of raysal, or too large to be sent."""
    how = "build one: pip wheel --no-deps -w dist ."
    if not wheel.is_file() or wheel.suffix != ".whl":
        raise InputError(f"--wheel {wheel}: no wheel; {how}")
    if (size := wheel.stat().st_size) > LARGEST_WHEEL:
        raise InputError(f"--wheel {wheel}: {size >> 20} MiB, Ray takes {LARGEST_WHEEL >> 20}; put it into the nodes' image")
    try:
        with zipfile.ZipFile(wheel) as packed:
            names = packed.namelist()
            said = packed.read("raysal/__init__.py").decode(errors="replace") if "raysal/__init__.py" in names else ""
    except (zipfile.BadZipFile, zlib.error, RuntimeError) as error:  # no zip file, damaged inside, or locked with a password
        raise InputError(f"--wheel {wheel}: can't be read ({error}); {how}") from error
    if "raysal/__init__.py" not in names:
        raise InputError(f"--wheel {wheel}: holds no raysal; {how}")
    if (version := VERSION.search(said)) is None or version[1] != raysal.__version__:
        raise InputError(
            f"--wheel {wheel}: raysal {version[1] if version else 'without a version'}, but this command, which reads the arguments, is "
            f"{raysal.__version__}; install the wheel here too"
        )
