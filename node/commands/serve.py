"""`radnode serve`: the whole node, or one role of it."""

from __future__ import annotations

from argparse import Namespace

from node.config import find_config, load_config
from node.service import Role, Supervisor, run_role


def serve(options: Namespace) -> int:
    """Serve until told to stop."""
    config = load_config(find_config(options.config))
    if options.role:
        return run_role(config, Role(options.role))
    return Supervisor(config).run()
