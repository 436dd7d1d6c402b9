"""The `radnode` command: its words and options. What each command does lives in `node.commands`, imported only when
it runs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from node import __version__
from node.commands.plan_options import add_options as add_plan_options
from node.errors import RadnodeError
from node.log import set_up_logging
from node.priority import Priority
from node.report.kinds import Kind, SegForm

EXIT_DONE, EXIT_FAILED, EXIT_WRONG_USE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 failed, 2 wrong use."""
    options = build_parser().parse_args(arguments)
    set_up_logging(verbose=options.verbose)
    module, _, function = options.run_by.partition(":")
    try:
        command = getattr(importlib.import_module(f"node.commands.{module}"), function)
        return command(options) or EXIT_DONE
    except RadnodeError as error:
        print(f"radnode: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, `radnode ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="radnode",
        description="DICOM inference node: studies in by C-STORE, DICOM SEG and Structured Reports back to the PACS.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong use. Research use only: results are unverified.",
    )
    parser.add_argument("--version", action="version", version=f"radnode {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="say more on standard error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    _add_demo(commands)
    command = _command(
        commands, "check", "check:check", "is this machine ready: configuration, models, peers, disk, accelerator"
    )
    _config(command)
    _json(command)
    _add_serve(commands)
    _add_run(commands)
    command = _command(
        commands, "import", "importing:import_files", "DICOM files into the archive, as if a peer sent them"
    )
    command.add_argument("path", type=Path, metavar="PATH", help="a folder (also of a DICOMDIR), a zip file or a file")
    _config(command)
    _json(command)
    command = _command(
        commands, "reprocess", "reprocess:reprocess", "run a study once more from the archive, through the queue"
    )
    command.add_argument("--study", required=True, metavar="UID", help="Study Instance UID")
    _config(command)

    command = _command(
        commands, "plan", "plan:make_plan", "how many receivers and worker slots so many studies a day need"
    )
    add_plan_options(command)
    _config(command)
    _json(command)

    noun = _noun(commands, "studies", "what was received and what became of it")
    command = _command(noun, "list", "listing:list_studies", "studies, the last received first")
    _config(command)
    _json(command)
    _limit(command)
    command = _command(noun, "show", "listing:show_study", "the whole story of one study")
    command.add_argument("study", metavar="UID")
    command.add_argument(
        "--events", type=_count, default=200, metavar="N", help="at most so many lines of the story (default 200)"
    )
    _config(command)
    _json(command)

    noun = _noun(commands, "jobs", "model runs")
    command = _command(noun, "list", "listing:list_jobs", "jobs, the newest first")
    command.add_argument("--study", metavar="UID", help="only those of this study")
    _config(command)
    _json(command)
    _limit(command)
    command = _command(noun, "retry", "listing:retry_job", "queue a finished job again")
    command.add_argument("job", type=int, metavar="JOB")
    _config(command)
    command = _command(noun, "cancel", "listing:cancel_jobs", "cancel waiting and running jobs")
    command.add_argument("jobs", type=int, nargs="*", metavar="JOB")
    command.add_argument("--study", metavar="UID", help="all that wait or run of this study")
    command.add_argument("--model", metavar="NAME", help="all that wait or run of this model")
    _config(command)
    command = _command(noun, "prioritise", "listing:prioritise_job", "make a job more or less urgent")
    command.add_argument("job", type=int, metavar="JOB")
    command.add_argument(
        "priority", type=Priority, choices=list(Priority), metavar="PRIORITY", help=", ".join(Priority)
    )
    _config(command)

    command = _command(
        noun,
        "withdraw",
        "withdrawing:withdraw",
        "take a job's results back: a rejection note to every peer that has them",
    )
    command.add_argument("job", type=int, metavar="JOB")
    command.add_argument(
        "--reason",
        choices=("quality", "safety", "worklist", "retention"),
        default="quality",
        help="quality (default): wrong or of no use; safety: may harm the patient; worklist: of another patient; "
        "retention: their time is over",
    )
    command.add_argument(
        "--comment", default="", metavar="TEXT", help="for people; nothing that identifies the patient"
    )
    _config(command)

    noun = _noun(commands, "deliveries", "results on their way to peers")
    command = _command(noun, "list", "listing:list_deliveries", "deliveries, the newest first")
    command.add_argument("--study", metavar="UID", help="only those of this study")
    _config(command)
    _json(command)
    _limit(command)
    for name, function, says in (
        ("retry", "retry_delivery", "send one again at once"),
        ("give-up", "give_up_delivery", "owe one no longer: its study may be forgotten"),
    ):
        command = _command(noun, name, f"listing:{function}", says)
        command.add_argument("delivery", type=int, metavar="DELIVERY")
        _config(command)

    _add_models(_noun(commands, "models", "model packages"))
    _add_workers(_noun(commands, "workers", "the processes that run models"))

    noun = _noun(commands, "route", "routing rules")
    command = _command(noun, "explain", "route:explain", "why each series of a study did or did not match")
    command.add_argument("path", nargs="?", type=Path, help="a folder of DICOM files")
    command.add_argument("--study", metavar="UID", help="a study in the archive")
    _config(command)
    _json(command)

    noun = _noun(commands, "peers", "DICOM nodes that we know")
    command = _command(noun, "echo", "peers:echo_peers", "C-ECHO to peers")
    command.add_argument("names", nargs="*", metavar="PEER", help="default: every peer that has a port")
    _config(command)
    _json(command)
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands, "demo", "demo:demo", "the whole chain on this machine: a study in, SEG, SR and pictures out"
    )
    command.add_argument("folder", nargs="?", type=Path, help="your own chest CT study; default: a phantom")
    command.add_argument(
        "--out", type=Path, default=Path("radnode-demo"), metavar="DIR", help="default: ./radnode-demo"
    )
    command.add_argument("--model", default="ct_lung_reference", help="default: ct_lung_reference")


def _add_serve(commands: argparse._SubParsersAction) -> None:
    command = _command(commands, "serve", "serve:serve", "the service: receive, schedule, work, deliver")
    command.add_argument(
        "--role", choices=("receive", "schedule", "work", "deliver", "web"), help="only this role, in this process"
    )
    _config(command)


def _add_run(commands: argparse._SubParsersAction) -> None:
    command = _command(commands, "run", "run:run", "one model on a folder of DICOM files, without a service")
    command.add_argument("path", type=Path, metavar="PATH", help="a folder or file; any files in any order")
    command.add_argument("--model", required=True, metavar="NAME", help="name of a package, or its folder")
    command.add_argument("--out", required=True, type=Path, metavar="DIR")
    command.add_argument(
        "--results",
        type=_kinds,
        default=(Kind.SEG, Kind.SR),
        metavar="KINDS",
        help=f"what is made, with commas between: {', '.join(Kind)} (default seg,sr)",
    )
    command.add_argument(
        "--seg", type=SegForm, choices=list(SegForm), default=SegForm.BINARY, help="form of the segmentation (binary)"
    )
    command.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1")
    command.add_argument(
        "--in-process", action="store_true", help="without the process of its own that protects from the model"
    )
    _config(command)
    _json(command)


def _add_models(noun: argparse._SubParsersAction) -> None:
    command = _command(noun, "list", "models:list_models", "the packages in the configured folders")
    _config(command)
    _json(command)
    command = _command(noun, "show", "models:show_model", "one package: what it takes, what it gives, its licences")
    command.add_argument("name", metavar="MODEL")
    _config(command)
    _json(command)
    command = _command(noun, "add", "models_add:add_model", "get a package, check it, put it in its place and pin it")
    command.add_argument(
        "source", metavar="SOURCE", help="a folder, a zip file, its web address, or a bundle of the zoo: NAME[@VERSION]"
    )
    command.add_argument("--name", help="the package's name here; default: that of the source")
    command.add_argument("--into", type=Path, metavar="DIR", help="default: the first folder of models.path")
    command.add_argument("--dicom-yaml", type=Path, metavar="FILE", help="the package's dicom.yaml")
    command.add_argument("--sha256", metavar="HASH", help="what the zip file's SHA-256 must be")
    command.add_argument("--replace", action="store_true", help="put it in the place of a package of that name")
    command.add_argument(
        "--pin", action=argparse.BooleanOptionalAction, default=True, help="trust the package as it is now (default)"
    )
    _config(command)
    command = _command(noun, "verify", "models:verify_models", "check packages, their bundles and their pinned digests")
    command.add_argument("names", nargs="*", metavar="MODEL")
    command.add_argument("--weights", action="store_true", help="also read the checkpoints, as weights only")
    _config(command)
    _json(command)
    for name, what in (("pin", "trust a package as it is now"), ("unpin", "take a package's pin away")):
        command = _command(noun, name, f"models:{name}_model", what)
        command.add_argument("name", metavar="MODEL")
        _config(command)
    command = _command(noun, "pause", "pausing:pause_model", "start no further job of a model; what runs is finished")
    command.add_argument("name", metavar="MODEL")
    _reason(command)
    _config(command)
    command = _command(noun, "resume", "pausing:resume_model", "let the jobs of a paused model go on")
    command.add_argument("name", metavar="MODEL")
    _config(command)
    command = _command(noun, "bench", "models_bench:bench", "time and memory of each stage, on a study of yours")
    command.add_argument("name", metavar="MODEL", help="name of a package, or its folder")
    command.add_argument("path", type=Path, metavar="PATH", help="the folder of one study")
    command.add_argument("--repeat", type=_at_least_one, default=3, metavar="N", help="runs (default 3)")
    command.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1")
    _config(command)
    _json(command)


def _add_workers(noun: argparse._SubParsersAction) -> None:
    command = _command(noun, "pause", "pausing:pause_workers", "start no further job at all; what runs is finished")
    _host(command)
    _reason(command)
    _config(command)
    command = _command(noun, "resume", "pausing:resume_workers", "let paused workers go on")
    _host(command)
    _config(command)


def _host(command: argparse.ArgumentParser) -> None:
    command.add_argument("--host", default="", metavar="HOST", help="only the workers of this host (default: all)")


def _reason(command: argparse.ArgumentParser) -> None:
    command.add_argument("--reason", default="", metavar="TEXT", help="for people; shown with the jobs that wait")


def _kinds(text: str) -> tuple[Kind, ...]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in list(Kind)]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no kind of result: {', '.join(Kind)}")
    return tuple(Kind(name) for name in names)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _command(commands: argparse._SubParsersAction, name: str, run_by: str, what: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    command.set_defaults(run_by=run_by)
    return command


def _noun(commands: argparse._SubParsersAction, name: str, what: str) -> argparse._SubParsersAction:
    parser = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    return parser.add_subparsers(title="commands", metavar="COMMAND", required=True)


def _config(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", type=Path, metavar="FILE", help="default: $RADNODE_CONFIG, ./config.yaml, /etc/radnode/config.yaml"
    )


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="machine-readable output")


def _limit(command: argparse.ArgumentParser) -> None:
    command.add_argument("--limit", type=int, default=50, metavar="N", help="at most so many rows (default 50)")


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 4:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of lines, 4 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
