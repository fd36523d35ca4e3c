"""Jobs on a disk in use, for programs: what ``api`` does with images nobody uses, done while somebody does.

Each function starts a job and returns it (``jobs.job.Job``): ``result()`` waits for its end and raises JobError when it
failed, ``progress()`` tells how far it is, and it can be paused, throttled, and cancelled.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diskwright.api import format_by_name, open_target
from diskwright.core.disk import Disk
from diskwright.core.node import Node, below_filters

if TYPE_CHECKING:
    from diskwright.jobs.backup import Backup
    from diskwright.jobs.job import EventSink, Job
    from diskwright.jobs.stream import Stream


def live_commit(
    disk: Disk,
    base: str | None = None,
    *,
    top: str | None = None,
    id: str = "commit",
    on_event: EventSink | None = None,
    **options: Any,
) -> Job:
    """Starts to put what the images from ``top`` down have into ``base``, file names of images of the chain; by default
    all of the disk into the lowest.

    With ``top`` below the disk's own image the job ends by itself, and the image over ``top`` stands on ``base`` then.
    Else it becomes ``ready``: ``complete()`` puts the disk on ``base``, ``cancel(force=False)`` leaves it where it is.
    ``options``: backing_file, speed, on_error; see ``jobs.commit``. Raises GraphError, OptionError, OSError.
    """
    from diskwright.jobs.commit import commit_job

    options = {"auto_dismiss": False, **options}
    job = commit_job(id, disk.graph, below_filters(disk.node), top=top, base=base, on_event=on_event, **options)
    job.start()
    return job


def stream(
    disk: Disk,
    base: str | None = None,
    *,
    id: str = "stream",
    on_event: EventSink | None = None,
    **options: Any,
) -> Stream:
    """Starts to take over what the images below the disk's own have, down to ``base`` (a file name), which becomes its
    backing file; without, it needs none afterwards.

    ``options``: bottom, backing_file, speed, on_error; see ``jobs.stream``. Raises GraphError, OptionError, OSError.
    """
    from diskwright.jobs.stream import stream_job

    options = {"auto_dismiss": False, **options}
    job = stream_job(id, disk.graph, below_filters(disk.node), base=base, on_event=on_event, **options)
    job.start()
    return job


def backup(
    disk: Disk,
    target: str | os.PathLike[str] | Node,
    *,
    format: str | None = None,
    create: Mapping[str, object] | None = None,
    existing: bool = False,
    id: str = "backup",
    on_event: EventSink | None = None,
    **options: Any,
) -> Backup:
    """Starts to copy a disk in use as it is now. ``target`` is a new image's name (``format`` defaults to what its
    ending says, else to the disk's own; ``create`` has options for making it), an existing image's with ``existing``,
    or an open node of the disk's graph. It is closed when the job has ended.

    ``options``: sync, bitmap, bitmap_mode, compress, speed, on_source_error, on_target_error, on_cbw_error,
    cbw_timeout; see ``jobs.backup.Backup``. Raises ImageError, OptionError, GraphError or OSError.
    """
    from diskwright.jobs.backup import Backup

    graph, source = disk.graph, below_filters(disk.node)
    if isinstance(target, Node):
        node = target
        graph.hold(node)
    else:
        name = os.fspath(target)
        kind = format or format_by_name(name, source.driver_name)
        node = open_target(graph, name, source.size, format=kind, options=create, existing=existing)
    try:
        options = {"auto_dismiss": False, **options}
        job = Backup(id, graph, source, node, on_event=on_event, **options)
    except BaseException:
        graph.release(node)
        raise
    job.when_cleaned(lambda: graph.release(node))
    job.start()
    return job
