"""What tests of the server benchmark share: the fake server, its prompts, and how a run is made of them."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from redraft.evaluate.load import ServerConfig
from redraft.evaluate.server import bench_servers
from redraft.evaluate.speed import Prompt

FAKE = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fake_server.py"))))
PROMPTS = [Prompt(f"p{i}", [1, 10 + i, 20 + 3 * i], "maths" if i % 2 else "general") for i in range(8)]
LIMIT = 12


def settings(**options: Any) -> ServerConfig:
    return ServerConfig(**({"max_new_tokens": LIMIT, "timeout": 10.0} | options))


def run(servers: dict[str, Any], prompts: list[Prompt] = PROMPTS, **options: Any) -> dict[str, Any]:
    places = {name: getattr(server, "url", server) for name, server in servers.items()}
    return bench_servers(places, prompts, settings(**options), "my-target", {"seed": 0})


def plans(prompts: list[Prompt] = PROMPTS) -> list[tuple[int, list[int]]]:
    """(tokens, accepted tokens of the rounds) of every prompt."""
    found = [FAKE.plan(p.ids, LIMIT) for p in prompts]
    return [(len(ids), accepted) for ids, accepted in found]
