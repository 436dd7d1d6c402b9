"""Where a worker's models run: on its own machine, or in a slot on a machine of a Ray cluster."""

from __future__ import annotations

import os

from node.config import Workers
from node.infer.device import choose_device
from node.infer.warm import Models, WarmModels


def open_models(workers: Workers) -> Models:
    """The models of one worker. `ModelError` when a device was named that this machine has not, or Ray is missing."""
    if workers.engine == "ray":
        from node.infer.ray_actor import SlotSettings
        from node.infer.ray_cluster import import_ray
        from node.infer.ray_slot import RaySlot

        import_ray()
        settings = SlotSettings(
            device=workers.device,
            gpus=workers.slot_gpus,
            cpus=workers.cpus,
            memory_bytes=workers.memory_bytes,
            cache=workers.package_cache,
            cache_bytes=workers.package_cache_bytes,
        )
        return RaySlot(workers.address, settings, device=choose_device("auto"))
    return WarmModels(
        choose_device(workers.device),
        memory_bytes=workers.memory_bytes,
        warm_bytes=workers.memory_bytes or _physical_memory() // (2 * workers.count),
    )


def _physical_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
