"""Filters over what tests look at from below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diskwright.core.gate import OpenGate
from diskwright.core.graph import Graph
from diskwright.core.node import FilterNode


def over_memory(driver: str, size: int = 1 << 20, role: str = "file", **options: object) -> tuple[Graph, FilterNode]:
    """A filter over ``size`` bytes of memory. Hyphens in names of options are written as underscores."""
    return opened({"driver": driver, role: memory(size), **{key.replace("_", "-"): v for key, v in options.items()}})


def memory(size: int) -> dict[str, object]:
    return {"driver": "memory", "size": size}


def opened(options: Mapping[str, object], objects: Mapping[str, object] | None = None) -> tuple[Graph, Any]:
    graph = Graph(OpenGate(), objects=objects)
    try:
        return graph, graph.open(options, writable=True)
    except BaseException:
        graph.close()
        raise
