"""Reads Compose files as Compose does, as far as this project's need it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
BASE = ROOT / "docker-compose.yml"
OVERRIDES = {name: ROOT / "deploy" / "compose" / f"{name}.yml" for name in ("cuda", "keys", "tls")}

# The models that run beside the first one, by the beginning of their services' names: the profile
# that starts them, and the variable that names their directory.
BESIDE = {
    "generator": ("generate", "MODEL_DIR"),
    "transcriber": ("transcribe", "TRANSCRIBER_DIR"),
    "captioner": ("caption", "CAPTIONER_DIR"),
}

Node = Any
_VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)(?:(:-|:\+)([^}]*))?\})")


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML whose mappings hold no key twice; PyYAML would take the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; raises `ValueError` for a key that stands twice."""
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise ValueError(f"{node.start_mark}: twice: {sorted(twice)}")
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> list[Node]:
    """The documents of a YAML text; raises `ValueError` or `yaml.YAMLError`."""
    return list(yaml.load_all(text, UniqueKeyLoader))


def interpolate(node: Node, environment: Mapping[str, str]) -> Node:
    """`${NAME}`, `${NAME:-default}`, `${NAME:+other}` and `$$` in all strings but keys."""
    if isinstance(node, dict):
        return {key: interpolate(value, environment) for key, value in node.items()}
    if isinstance(node, list):
        return [interpolate(value, environment) for value in node]
    if not isinstance(node, str):
        return node

    def value(match: re.Match[str]) -> str:
        if match[1]:
            return "$"
        given = environment.get(match[2], "")
        if match[3] == ":-":
            return given or match[4]
        return (match[4] if given else "") if match[3] == ":+" else given

    return _VARIABLE.sub(value, node)


def load(
    *overrides: str,
    environment: Mapping[str, str] | None = None,
    profiles: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The project that `docker compose -f docker-compose.yml -f … up` would start.

    Services of other profiles than `profiles` are left out.
    """
    project: dict[str, Any] = {}
    for path in (BASE, *(OVERRIDES[name] for name in overrides)):
        (document,) = read_yaml(path.read_text("utf-8"))
        project = _merge(project, interpolate(document, environment or {}))
    for name, service in list(project["services"].items()):
        if not set(service.get("profiles", profiles)) <= set(profiles):
            del project["services"][name]
    return project


def variant(*models: str) -> dict[str, Any]:
    """Arguments of `load` with which some of `BESIDE` run, too, from /some/NAME."""
    return {
        "profiles": tuple(BESIDE[model][0] for model in models),
        "environment": {BESIDE[model][1]: f"/some/{model}" for model in models},
    }


def _merge(base: Node, over: Node) -> Node:
    if isinstance(base, dict) and isinstance(over, dict):
        both = {key: _merge(base[key], over[key]) for key in base.keys() & over.keys()}
        return {**base, **over, **both}
    if isinstance(base, list) and isinstance(over, list):
        return base + over
    return over
