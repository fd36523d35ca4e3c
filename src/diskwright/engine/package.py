"""Packages: writing an OVA or OVF around a disk that is converted into it.

An OVA is an archive of the descriptor, the disk and the manifest, in this order, as DSP0243 wants it. The disk goes
into the archive as it is made, in one pass; what was not known before (its length, the digests) is put in at the end.
Until then the archive has no beginning, so that an incomplete one is taken for none.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from diskwright.core import options as opts
from diskwright.core.create import create_image, create_in_one_pass, refuse_to_overwrite
from diskwright.errors import OptionError
from diskwright.formats.ova.archive import BLOCK, header
from diskwright.formats.ova.driver import OvaCreateOptions
from diskwright.formats.ova.envelope import make
from diskwright.storage.pipe import StreamStorage, is_pipe
from diskwright.units import MiB, align_up

if TYPE_CHECKING:
    from diskwright.core.graph import Graph
    from diskwright.core.node import Node

_RECORD: Final = 20 * BLOCK
"""Archives are filled up to multiples of this."""
_LARGEST: Final = 1 << 62


class Package:
    """A package in the making. ``disk`` is where the disk's contents belong; ``finish`` completes it."""

    disk: Node

    def __init__(
        self, graph: Graph, path: str, kind: str, options: Mapping[str, object], size: int, level: int | None = None
    ) -> None:
        """Makes the files. ``size`` of the disk in bytes, ``level`` of its compression. Raises OptionError, GraphError,
        ImageLocked, OSError."""
        values = {key.replace("_", "-"): value for key, value in options.items()}
        self._options: OvaCreateOptions = opts.parse(OvaCreateOptions, {**values, "size": size}, owner=kind)
        self._graph, self._path, self._in_one = graph, path, kind == "ova"
        stem = os.path.splitext(os.path.basename(path))[0]
        self._name = self._options.name or stem
        self._names = [os.path.basename(path), f"{stem}-disk1.vmdk", f"{stem}.mf"]
        self._check()
        if is_pipe(path):
            raise OptionError(f"{kind}: cannot be written into a pipe: it begins with the length of its end")
        self._descriptor_room = align_up(len(self._descriptor(_LARGEST)), BLOCK)
        self._start = 2 * BLOCK + self._descriptor_room if self._in_one else 0
        if self._in_one:
            self._names[0] = f"{stem}.ovf"
            self._files = [self._new(path)] * 3
        else:
            folder = os.path.dirname(path)
            wanted = self._names if self._options.manifest else self._names[:2]
            self._files = [self._new(os.path.join(folder, name)) for name in wanted]
        self._sum, self._length = hashlib.sha256(), 0
        inner = {"size": size, "subformat": "streamOptimized", "adapter_type": self._options.adapter_type}
        stream = StreamStorage(os.path.join(os.path.dirname(path), self._names[1]), self._append)
        opening = {} if level is None else {"compression-level": level}
        self.disk = create_in_one_pass(graph, stream, "vmdk", inner, opening)

    def _check(self) -> None:
        if self._options.cpus < 1 or self._options.memory < MiB:
            raise OptionError("a machine needs a processor, and memory of 1 MiB or more")
        if any(len(os.fsencode(name)) > 100 for name in self._names):
            raise OptionError(f"'{self._names[1]}' is too long for the name of a file in a package")
        if any(not text.isprintable() for text in (self._name, self._options.hardware, *self._names)):
            raise OptionError("a name in a package has to be of printable characters")

    def _new(self, path: str) -> Node:
        refuse_to_overwrite(self._graph, path)
        create_image(path, "raw", {"size": 0})
        return self._graph.open({"driver": "file", "filename": path}, writable=True)

    def _append(self, data: memoryview) -> None:
        self._files[1].writev([(self._start + self._length, data)])
        self._sum.update(data)
        self._length += len(data)

    def _descriptor(self, disk_size: int) -> bytes:
        given = self._options
        return make(
            self._name, self._names[1], disk_size, given.size, adapter=given.adapter_type, cpus=given.cpus,
            memory=given.memory // MiB, hardware=given.hardware,
        )  # fmt: skip

    def finish(self) -> None:
        """Completes the disk and then the package, and makes it durable. Raises OSError, ImageError."""
        self.disk.flush()
        self._graph.release(self.disk)
        text = self._descriptor(self._length)
        if self._in_one:
            text = text.ljust(self._descriptor_room, b"\n")  # so that nothing is between it and the disk
        lines = [(self._names[0], hashlib.sha256(text).hexdigest()), (self._names[1], self._sum.hexdigest())]
        manifest = "".join(f"SHA256({name})= {digest}\n" for name, digest in lines).encode("utf-8", "surrogateescape")
        if self._in_one:
            self._close_archive(text, manifest)
        else:
            self._files[0].pwrite(0, text)
            if self._options.manifest:
                self._files[2].pwrite(0, manifest)
        for file in dict.fromkeys(self._files):
            file.flush()
        for file in dict.fromkeys(self._files):
            self._graph.release(file)

    def _close_archive(self, text: bytes, manifest: bytes) -> None:
        file = self._files[0]
        at = align_up(self._start + self._length, BLOCK)
        if self._options.manifest:
            end = header(self._names[2], len(manifest)) + manifest
            file.pwrite(at, end.ljust(align_up(len(end), BLOCK), b"\0"))
            at += align_up(len(end), BLOCK)
        file.resize(align_up(at + 2 * BLOCK, _RECORD))
        file.pwrite(BLOCK, text + header(self._names[1], self._length))
        file.flush()
        file.pwrite(0, header(self._names[0], len(text)))
