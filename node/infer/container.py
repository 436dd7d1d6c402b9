"""The command line that runs a container on two folders: no network, nothing writable but the out-folder and /tmp."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from node.infer.packagings import Command

# Where a container finds its folders: as mercure mounts them, or as a MONAI Application Package has them by default.
_FOLDERS = {
    "mercure": ("/tmp/data", "/tmp/output"),
    "map": ("/var/holoscan/input", "/var/holoscan/output"),
}
_PROCESSES_MAX = 4096
_SCRATCH = "/tmp:rw,exec,nosuid,nodev,size=8g"


@dataclass(frozen=True)
class Started:
    """What to run, and which container it starts: killing the engine's client leaves that running."""

    argv: tuple[str, ...]
    container: tuple[str, ...] = ()  # engine and name, as `node.infer.guard.remove_container` takes them; or nothing


def container_argv(command: Command, name: str, folders: tuple[Path, Path], device: str) -> Started:
    """`docker run` or `podman run` of the command's image under `name`, with (in-folder, out-folder) mounted.

    The image is never pulled here: an administrator does that, by the digest that the manifest pins.
    """
    if command.image is None:
        raise ValueError("the command has no image")
    inside_in, inside_out = _FOLDERS[command.layout]
    argv = [
        command.engine, "run", "--rm", "--name", name, "--pull", "never",
        "--network", "none", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
        "--pids-limit", str(_PROCESSES_MAX), "--user", f"{os.getuid()}:{os.getgid()}", "--tmpfs", _SCRATCH,
        "--mount", f"type=bind,src={folders[0]},dst={inside_in},readonly",
        "--mount", f"type=bind,src={folders[1]},dst={inside_out}",
    ]  # fmt: skip
    if command.engine == "podman":
        argv += ["--userns", "keep-id"]  # else the out-folder belongs to nobody in the container
    if command.memory_gb is not None:
        argv += ["--memory", f"{command.memory_gb:g}g", "--memory-swap", f"{command.memory_gb:g}g"]
    if command.shared_memory_gb is not None:
        argv += ["--shm-size", f"{command.shared_memory_gb:g}g"]
    if device.startswith("cuda"):
        index = device.partition(":")[2] or "0"
        argv += ["--gpus", f"device={index}"] if command.engine == "docker" else ["--device", f"nvidia.com/gpu={index}"]
    environment = {"HOME": "/tmp", **command.environment, **folder_variables(inside_in, inside_out)}
    for variable, value in environment.items():
        argv += ["--env", f"{variable}={value}"]
    if command.entrypoint is not None:
        argv += ["--entrypoint", command.entrypoint]
    return Started((*argv, command.image, *command.arguments), (command.engine, name))


def folder_variables(in_folder: str, out_folder: str) -> Mapping[str, str]:
    """The names under which mercure modules and MONAI Application Packages, old and new, look for their folders."""
    return {
        "MERCURE_IN_DIR": in_folder,
        "MERCURE_OUT_DIR": out_folder,
        "MONAI_INPUTPATH": in_folder,
        "MONAI_OUTPUTPATH": out_folder,
        "HOLOSCAN_INPUT_PATH": in_folder,
        "HOLOSCAN_OUTPUT_PATH": out_folder,
    }
