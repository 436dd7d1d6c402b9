"""`radnode jobs withdraw`: results taken back from everybody who has them."""

from __future__ import annotations

from argparse import Namespace

from node.archive.open import open_archive
from node.config import find_config, load_config
from node.outcome import withdraw_job
from node.report.rejection import RejectionReason


def withdraw(options: Namespace) -> None:
    """Make a rejection note for the job's results and owe it to their peers."""
    config = load_config(find_config(options.config))
    reason = RejectionReason(options.reason)
    peers = withdraw_job(open_archive(config), config, options.job, reason, options.comment, "command line")
    print(f"the results of job {options.job} are withdrawn; to be told: {', '.join(peers)}")
