"""`radnode peers`: talk to the peers of the configuration."""

from __future__ import annotations

from argparse import Namespace

from node.commands.output import print_json, print_table
from node.config import find_config, load_config
from node.deliver.dimse import echo
from node.deliver.peers import destinations
from node.errors import DeliveryError, NotFound


def echo_peers(options: Namespace) -> int:
    """C-ECHO to each; 1 when one of them does not answer."""
    peers = destinations(load_config(find_config(options.config)))
    addresses = {name: peer.address for name, peer in peers.items()}
    if unknown := [name for name in options.names if name not in addresses]:
        raise NotFound(f"no peer {unknown[0]!r} with a port in the configuration; there are: {', '.join(addresses)}")
    rows = []
    for name in options.names or addresses:
        try:
            answer = f"answered in {echo(addresses[name]) * 1000:.0f} ms"
            good = True
        except DeliveryError as error:
            answer, good = str(error), False
        rows.append({"peer": name, "address": str(addresses[name]), "ok": good, "answer": answer})
    print_json(rows) if options.json else print_table(rows, ["peer", "ok", "answer"], empty="no peer has a port")
    return 0 if all(row["ok"] for row in rows) else 1
