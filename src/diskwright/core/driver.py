"""The three interfaces a driver implements: Storage, Format, Filter.

A driver is a class in a module of ``storage``, ``formats`` or ``filters`` (or of another package, by
the entry-point group ``diskwright.drivers``), listed in that module's ``DRIVERS``. Drivers know nothing
of each other: what one needs beneath it, it is handed as a ``Node``.

What holds for all three:

* Methods may be called from many threads at once, except where a method's text says otherwise.
* Offsets and lengths are bytes, within the node's size, and lengths are above 0: the callers see to it.
* Buffers are ``memoryview`` objects of format ``B``, and belong to the caller again when a call returns.
* A method that cannot do what it is asked raises; it never does half of it silently. An ``OSError``
  with ``ENOTSUP`` means "not this way", before anything has changed; the caller then goes another way.
* A driver never prints, never logs an image's contents and never starts a process.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, Self

from diskwright.core.draining import Draining
from diskwright.core.leases import Leases
from diskwright.core.options import NoOptions
from diskwright.core.permissions import Access
from diskwright.core.secrets import Secrets
from diskwright.extents import DATA, Extent, Extents

if TYPE_CHECKING:
    from diskwright.core.bitmap import DirtyBitmap
    from diskwright.core.ciphered import Cipher
    from diskwright.core.inspection import Inspection
    from diskwright.core.node import Node

COMPRESSION: Final = "Compression not supported for this file format"

Segment = tuple[int, memoryview]
"""``(offset, buffer)``: the bytes of ``buffer`` belong at ``offset``; the length is the buffer's."""

Segments = Sequence[Segment]

Progress = Callable[[int, int], None]
"""Called with ``(done, all)`` of a long operation, in units of its own."""


def not_supported(what: str) -> OSError:
    """The error for "not this way": an OSError with ENOTSUP."""
    return OSError(errno.ENOTSUP, f"{what}: {os.strerror(errno.ENOTSUP)}")


class FilePlace(NamedTuple):
    """Bytes the kernel can move by itself: ``length`` bytes at ``offset`` of the open file ``fd``."""

    fd: int
    offset: int
    length: int


class Storage(ABC):
    """Bytes at offsets, on something outside this process (or in its memory).

    A storage keeps no promise of durability before ``flush`` returns; after it, every write that had
    returned is as durable as the medium can make it.
    """

    name: ClassVar[str]
    options: ClassVar[type] = NoOptions
    create_options: ClassVar[type] = NoOptions
    prefixes: ClassVar[tuple[str, ...]] = ()
    """File names beginning with one of these and a colon belong to this driver."""

    filename: str = ""
    """What a user would call this; for messages."""
    alignment: int = 1
    """Requests that keep to this are served without copying; others work too, more slowly."""
    zero_init: bool = False
    """Whether bytes nobody has written since the storage was created or grown read as zeros."""

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, object]:
        """The options that ``filename`` (prefix and all) stands for."""
        return {"filename": filename}

    @classmethod
    @abstractmethod
    def open(cls, options: Any, *, writable: bool) -> Self: ...

    def reopened(self, options: Any, *, writable: bool) -> Self:
        """The same bytes, open for writing or for reading only: a new storage, made with the options of this one, which
        the caller then closes; or this very one, where it can be both."""
        return type(self).open(options, writable=writable)

    @classmethod
    def create(cls, options: Any) -> None:
        """Makes what ``open`` can then open, of the size ``options.size``. Existing contents are lost."""
        raise not_supported(f"Driver '{cls.name}' cannot create")

    @property
    @abstractmethod
    def size(self) -> int:
        """The current size in bytes."""

    @abstractmethod
    def readv(self, segments: Segments, *, nowait: bool = False) -> None:
        """Fills every buffer. What lies beyond the end reads as zeros.

        With ``nowait`` it may raise BlockingIOError instead of waiting for a medium; buffers then hold
        nothing of use, and the caller repeats the call without it.
        """

    @abstractmethod
    def writev(self, segments: Segments) -> None:
        """Writes every buffer. A write beyond the end makes the storage grow, where it can."""

    @abstractmethod
    def flush(self) -> None:
        """Returns when all writes that had returned are durable.

        After a failed flush every later one fails too: nobody can say any more what reached the medium.
        """

    def write_zeros(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        """Makes the range read as zeros. ``unmap``: space may be given back. ``fast``: raise ENOTSUP
        when it would not be faster than writing zeros. The default supports neither and says so."""
        raise not_supported(f"Driver '{self.name}' cannot write zeros")

    def discard(self, offset: int, length: int) -> None:
        """The range's contents no longer matter. May do nothing."""

    def truncate(self, size: int, *, preallocation: str = "off") -> None:
        """Sets the size; new bytes read as zeros. ``preallocation`` is off, falloc or full."""
        raise not_supported(f"Driver '{self.name}' cannot change its size")

    def extent_at(self, offset: int, length: int) -> Extent:
        """The first run at ``offset``: DATA with ``file_offset == offset``, or ZERO. At most ``length`` long."""
        return Extent(offset, length, DATA, offset)

    def extents(self, offset: int, length: int) -> Extents:
        """All runs of the range, in order and without gaps."""
        return Extents.of(runs_of(self.extent_at, offset, length))

    def place(self, offset: int, length: int) -> FilePlace | None:
        """Where the kernel finds the bytes at ``offset``, for sendfile and its kin; None when it cannot.

        Only for reading, only under a lease, and never when a plain read would give something else.
        """
        return None

    def copy_from(self, offset: int, source: FilePlace) -> None:
        """Like ``writev`` of ``source.length`` bytes at ``offset``, moved by the kernel. Raises ENOTSUP
        when the kernel will not; then some of the range may have been written, and the caller writes it all."""
        raise not_supported(f"Driver '{self.name}' cannot copy in the kernel")

    def allocated_size(self) -> int | None:
        """Bytes of the medium in use; None when unknown."""
        return None

    def set_access(self, access: Access) -> None:
        """Announces to other processes what this one does with the storage. Raises ImageLocked."""

    def close(self) -> None:
        """Gives everything up. Does not flush."""


class Reservation(ABC):
    """Places for the bytes of one write, owned by it but not yet on the map.

    The caller writes the guest's bytes to ``extents`` and what ``fills`` asks for, and then calls
    ``publish`` or ``abort``, exactly once. Until then reads see what was there before. An abort, or a
    process that dies, may leak the place and must not do worse.
    """

    extents: Sequence[Extent]
    """DATA runs that cover the write exactly, in order; of ``Format.reserve_stored`` SPECIAL ones."""
    fills: Sequence[Extent] = ()
    """DATA runs outside the write (the rest of newly taken clusters) that the caller must fill with what
    the guest reads there now."""
    zeroed: bool = False
    """Whether the new places already read as zeros, so that fills of zeros can be left out."""

    @abstractmethod
    def publish(self) -> None:
        """Puts the places on the map. The bytes have been handed to the children's ``writev``; making
        them durable before the map is, is the driver's affair at its next flush."""

    @abstractmethod
    def abort(self) -> None:
        """Gives the places back. Never raises."""


class BackingHint(NamedTuple):
    """What an image's header says of its backing file. ``format`` is None when it does not say."""

    filename: str
    format: str | None


class Part(NamedTuple):
    """A further file that the creation of an image makes, empty, for the child ``role``. A ``filename`` that is
    relative is seen from the image."""

    role: str
    filename: str


@dataclass
class CheckReport:
    """What ``check`` found. The names are those of ``qemu-img check --output=json``."""

    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    image_end_offset: int | None = None
    messages: list[str] = field(default_factory=list)
    """What was found, one line each, at most ``MAX_MESSAGES``; more are only counted."""

    MAX_MESSAGES: ClassVar[int] = 1000

    def say(self, message: str) -> None:
        if len(self.messages) < self.MAX_MESSAGES:
            self.messages.append(message)


@dataclass
class CompactReport:
    """What a compaction did. Lengths of the file in bytes."""

    before: int
    after: int = 0
    moved: int = 0
    """Clusters moved to another place; of compressed ones, those that were given up."""
    released: int = 0
    """Clusters given up because they need no place: they read as zeros."""
    complete: bool = False
    """Whether it got to the end, rather than being stopped: then another one goes on where it stopped."""


@dataclass
class Info:
    """Facts of a format beyond its size. The names are those of ``qemu-img info --output=json``."""

    cluster_size: int | None = None
    compressed: bool | None = None
    encrypted: bool | None = None
    dirty: bool | None = None
    specific: Mapping[str, object] | None = None
    """``format-specific`` data, in the order it is to be shown."""


class Measurement(NamedTuple):
    """How long the file of a new image will be, in bytes. The names are those of ``qemu-img measure``."""

    required: int
    """With what it is to hold from the beginning."""
    fully_allocated: int
    """Once every cluster of the disk has been written to."""
    bitmaps: int | None = None
    """What the source's persistent bitmaps would take on top; None when they have no place in such an image."""


@dataclass(frozen=True)
class MeasuredSource:
    """What ``Format.measure`` is told of an image that is to be copied. Sizes in bytes."""

    size: int
    allocated: Callable[[int], int]
    """``(unit)``: how many bytes those units of ``unit`` bytes (a power of two) have in which it holds anything."""
    bitmaps: Sequence[tuple[int, str]] | None
    """``(granularity, name)`` of its persistent bitmaps; None when it cannot have any."""


def _nothing_within(role: str, options: Mapping[str, object]) -> Node:
    raise not_supported(f"Opening the {role} of an image outside of a graph")


@dataclass(frozen=True)
class OpenContext:
    """What a format is handed when it is opened."""

    file: Node
    """The child the image lies in; it is child 0."""
    leases: Leases
    """The graph's leases; clusters go into a ``Quarantine`` of it when they are freed."""
    open_reference: Callable[[str, str, str | None], Node]
    """``(role, filename, driver)``: opens a file that the image names, through the user's gate, as the
    child ``role``. Options the user gave for that role come first; then ``filename`` may be ''."""
    writable: bool
    given: frozenset[str] = frozenset()
    """The roles that the user gave options for."""
    guest_data: bool = True
    """Whether the guest's bytes will be asked for: when not, files that hold nothing else need not be opened, and an
    encrypted image needs no key."""
    secrets: Secrets = field(default_factory=Secrets)
    """Where ids are looked up that turn up later. Those in the options to open with are bound to it already."""
    children: Mapping[str, Node] = field(default_factory=dict)
    """A filter's children, by role."""
    objects: Mapping[str, object] = field(default_factory=dict)
    """What the user has defined beside nodes, by id: throttle groups."""
    draining: Draining = field(default_factory=Draining)
    """Whether somebody waits for requests in flight to end: those held back on purpose should not wait then."""
    open_within: Callable[[str, Mapping[str, object]], Node] = _nothing_within
    """``(role, options)``: opens an image that lies within files which are open already (options name them by their
    nodes), as the child ``role``. It has no backing file."""
    find_node: Callable[[str], Node] | None = None
    """The open node of a name. Raises GraphError."""


class BitmapStore(ABC):
    """The named dirty bitmaps an image keeps while it is closed.

    A bitmap in memory may differ from what is stored as soon as its ``guard`` has been called; the format stores all
    such bitmaps when it is closed. A crash before that must leave them marked as inconsistent.
    """

    available: bool = True
    """Whether this very image can have any."""

    @abstractmethod
    def load(self) -> Sequence[DirtyBitmap]:
        """What is stored, in its order, the first time; afterwards nothing. Bitmaps that were not stored properly
        come without contents, marked ``inconsistent``. Raises CorruptImage, LimitExceeded."""

    @abstractmethod
    def check_new(self, name: str, granularity: int) -> None:
        """Raises ImageError when a further bitmap of that name and granularity could not be stored."""

    @abstractmethod
    def add(self, bitmap: DirtyBitmap) -> None:
        """``bitmap`` is to be stored too. Until it is, a crash loses it."""

    @abstractmethod
    def remove(self, bitmap: DirtyBitmap) -> None:
        """Takes a bitmap out of the image, durably."""


class Format(ABC):
    """A map from guest bytes to bytes of children. It moves no guest data itself.

    ``extent_at``, ``extents`` and ``in_place`` take no lock that data I/O is held under, and are called
    under a lease: an answer stays valid until that lease ends. ``extent_at`` and ``extents`` agree.
    """

    name: ClassVar[str]
    options: ClassVar[type] = NoOptions
    create_options: ClassVar[type] = NoOptions
    amend_options: ClassVar[type] = NoOptions
    has_backing: ClassVar[bool] = False
    """Whether UNALLOCATED ranges may be answered by a backing node."""
    consults_backing: ClassVar[bool] = False
    """Whether ``create_from`` has to look into the backing image, for an identity of it that it records."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """File name endings this format usually has; only a hint, never proof."""

    roles: ClassVar[tuple[str, ...]] = ()
    """What further children are called, in the order of ``children`` from 1 on; where it ends: extent1 and so on."""

    children: tuple[Node, ...]
    """The nodes extents speak of; ``children[0]`` is ``file``. The backing node is not among them."""
    data_child: int = 0
    """The child in which ``in_place`` answers."""
    size: int
    """The guest's size in bytes."""
    cluster_size: int
    """Allocation unit in bytes; 1 where there is none."""
    backing: BackingHint | None = None
    holes: str = "never"
    """Whether the map may name data where the file has a hole, so that it is worth looking: ``never``, ``always``, or
    ``if many`` (when the file takes much less space than it is long)."""
    compresses: bool = False
    """Whether clusters can be written compressed: ``encode`` and ``reserve_stored`` are there."""
    packs: bool = False
    """Whether a copy into such an image is compressed unasked, as its kind says, and so goes by whole clusters."""
    only_compressed: bool = False
    """Whether it takes nothing but compressed clusters, each of them once and in the order of the disk. Such an image
    ``packs``."""
    bitmap_store: BitmapStore | None = None
    """Where it keeps named dirty bitmaps; None for a format that has no place for them."""
    linear: int | None = None
    """When guest byte ``x`` always lies at ``linear + x`` of child 0, that distance: the node then asks
    no further. None for every other map."""
    zeroes_by_discard: bool = False
    """Whether the map cannot call a cluster zeros, but ``discard`` makes whole clusters zeros as long as there is no
    backing node."""
    cipher: Cipher | None = None
    """What the bytes of DATA runs are encrypted with; the node does that. Set once, in ``open``; an encrypted
    image opened without ``OpenContext.guest_data`` has ``ciphered.Locked``."""
    cipher_by_place: bool = False
    """Whether the position ``cipher`` is told is where a sector lies in its child, rather than its guest offset."""

    @staticmethod
    @abstractmethod
    def probe(head: bytes, filename: str) -> int:
        """How sure it is, 0 to 100, that an image beginning with ``head`` (at most 2 KiB) is of this format."""

    @classmethod
    def inspect(cls, file: Node) -> Inspection | None:
        """What the metadata in ``file`` says, right or wrong, of a file that ``probe`` may or may not recognise.
        Takes no memory and no time in proportion to a field of the image, and opens nothing else. What is wrong is
        told, not raised; only OSError may be. None: nothing beyond what opening the image tells."""
        return None

    @classmethod
    @abstractmethod
    def open(cls, context: OpenContext, options: Any) -> Self:
        """Reads and checks the header. Raises CorruptImage, UnsupportedFeature or LimitExceeded, before
        anything in proportion to a field of the image is allocated."""

    @classmethod
    def create(cls, file: Node, options: Any) -> None:
        """Makes an empty image in ``file``, which is open for writing and empty."""
        raise not_supported(f"Format '{cls.name}' cannot create")

    @classmethod
    def create_parts(cls, options: Any, filename: str) -> Sequence[Part]:
        """The further files that ``create_from`` with these options needs for the image ``filename``. The options need
        not be sensible yet. Raises LimitExceeded."""
        return ()

    @classmethod
    def create_from(cls, file: Node, options: Any, parts: Mapping[str, Node]) -> None:
        """``create`` with the further files that ``create_parts`` asked for, by role; and, with ``consults_backing``,
        the backing image as ``backing``."""
        cls.create(file, options)

    @classmethod
    def measure(cls, options: Any, source: MeasuredSource | None) -> Measurement:
        """How large a new image with the create ``options`` will be: an empty one, or a copy of ``source``, whose
        size ``options.size`` then is. Nothing is created. Raises OptionError or LimitExceeded as ``create`` does."""
        raise not_supported(f"Block driver '{cls.name}' does not support size measurement")

    def accept_backing(self, backing: Node) -> None:
        """Called when ``backing`` has been opened to lie beneath this image. Raises ImageError when what the image
        records of its backing image shows that this is not it, or that it has changed since."""

    def stored_bitmaps(self) -> Sequence[tuple[int, str]] | None:
        """``(granularity, name)`` of the persistent bitmaps the image holds, whatever state they are in; None when it
        cannot hold any. Raises CorruptImage."""
        return None

    @abstractmethod
    def extent_at(self, offset: int, length: int) -> Extent:
        """The first run at ``offset``, at most ``length`` long, with as much as is contiguous at little cost.

        For a SPECIAL extent ``file_offset`` and ``stored`` tell the whole stored unit.
        """

    def extents(self, offset: int, length: int) -> Extents:
        """All runs of the range, at most ``extents.WINDOW`` long. Drivers with tables override it, vectorised."""
        return Extents.of(runs_of(self.extent_at, offset, length))

    def decode(self, extent: Extent, raw: memoryview, into: memoryview) -> None:
        """Puts the guest bytes of a SPECIAL extent into ``into`` (``extent.length`` bytes), given its
        ``stored`` raw bytes. Output is bounded whatever ``raw`` holds. Raises CorruptImage."""
        raise NotImplementedError(f"{self.name} has no special extents")

    def in_place(self, offset: int, length: int) -> int:
        """Where in child ``data_child`` the whole range may simply be overwritten, or -1. Never changes anything."""
        return -1

    def reserve(self, offset: int, length: int) -> Reservation:
        """Places for a write of the range. May cover less than asked: the extents tell how much.

        It waits while another reservation is open on a cluster it needs, so a caller has at most one open.
        """
        raise not_supported(f"Format '{self.name}' is read-only")

    def encode(self, data: memoryview, offset: int) -> bytes | None:
        """The guest bytes of the whole cluster at ``offset`` (the disk's last one filled up with zeros) as they would
        be stored; None when that is not smaller. Touches nothing but ``data``, and lets other threads run meanwhile."""
        raise not_supported(COMPRESSION)

    def encode_at(self, offset: int, data: memoryview) -> bytes | None:
        """``encode`` of the cluster at ``offset``, which this fills up when it is the disk's last one and shorter. What
        the same thread reserves next with ``reserve_stored`` is what this has answered."""
        unit = self.cluster_size
        return self.encode(data if len(data) == unit else memoryview(bytes(data).ljust(unit, b"\0")), offset)

    def reserve_stored(self, units: Sequence[tuple[int, int]]) -> Reservation:
        """Places for stored units, ``(guest offset of the cluster, stored length)`` each, in ascending order.

        The reservation has one SPECIAL extent for each unit it covers, which may be fewer than asked, but not none.
        ``stored`` is the unit's length or more: the caller fills the rest with zeros. Otherwise as ``reserve``.
        """
        raise not_supported(COMPRESSION)

    def zero(self, offset: int, length: int, *, unmap: bool) -> tuple[int, int]:
        """Makes the map say that some of the range reads as zeros: ``(offset, length)`` of what it truly
        covered, one run within the range; ``(offset, 0)`` when none. The caller writes the rest."""
        return offset, 0

    def discard(self, offset: int, length: int) -> None:
        """Gives back whole clusters within the range. What the guest reads there afterwards is what the
        specification says, never bytes of something else."""

    def flush(self) -> None:
        """Makes data and metadata durable, in the order data, allocation, map; children included."""
        for child in self.children:
            child.flush()

    def resize(self, size: int, *, preallocation: str = "off", conceal: Callable[[], None] | None = None) -> None:
        """Sets the guest's size; new bytes read as zeros. Called with no other request in flight.

        ``conceal`` is given when a backing image has something where the new bytes are: it writes zeros over that,
        and is to be called when they can be written to and before the new size is in the file.
        """
        raise not_supported(f"Format '{self.name}' cannot be resized")

    def amend(
        self,
        options: Any,
        *,
        resize: Callable[[int], None],
        force: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Changes what was chosen when the image was created. ``options`` is an instance of ``amend_options``, in
        which None stands for what shall stay. Called with no other request in flight.

        ``resize`` changes the size through the node, which knows the backing image. ``force`` allows what may lose
        access to data. Raises OptionError or UnsupportedFeature for what cannot be changed. What is asked for
        together is done step by step: after an error any part may have been done, and the image is sound.
        """
        raise not_supported(f"Format driver '{self.name}' does not support option amendment")

    def change_backing(self, filename: str | None, format: str | None) -> None:
        """Names another backing file of ``format`` in the image, or none, and makes that durable; what was written
        before is durable then too. A crash leaves the old name or the new one. Contents are the caller's affair."""
        raise not_supported(f"Format '{self.name}' cannot change its backing file")

    def backing_changes(self, backing: Node | None) -> None:
        """Called when ``backing`` is to lie beneath this image in the place of another one, whatever the image records,
        or nothing is to lie there any more."""

    def make_empty(self) -> None:
        """Takes everything this layer holds off its map, so that reads go to the backing node. What that holds has
        to be durable. A crash leaves any part of it done. Called with no other request in flight."""
        raise not_supported(f"Format '{self.name}' cannot be emptied")

    def compact(
        self,
        *,
        detect_zeros: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> CompactReport:
        """Gives back to the file system what the image does not use, by moving what lies at the end of the file to
        the front; needs no space meanwhile. With ``detect_zeros`` clusters full of zeros are given up as well.
        A crash loses nothing. Called with no other request in flight, and with nobody else reading the file.

        ``progress(done, total)`` is told in bytes moved; ``stop`` is asked between batches."""
        raise not_supported(f"Format '{self.name}' cannot be compacted")

    def check(self, repair: str) -> CheckReport:
        """Looks for damage and, when ``repair`` is ``leaks`` or ``all``, mends what it can. Called with no
        other request in flight."""
        raise not_supported(f"Format '{self.name}' has no check")

    def info(self) -> Info:
        return Info()

    def zero_init(self) -> bool:
        """Whether a newly created image reads as zeros everywhere."""
        return True

    def close(self) -> None:
        """Writes back what is cached, when writable. Children are closed by the graph afterwards."""


@dataclass(frozen=True)
class Role:
    """A child of a filter: the option that describes it has this name."""

    name: str
    optional: bool = False
    image: bool = False
    """Whether the format of a child given by its file name is guessed. Usually it is bytes: formats lie on filters."""


class Filter(ABC):
    """Stands between a node's users and a child, and passes on what it does not change.

    A filter is given only whole, checked requests. It may delay, refuse, watch or double them.
    """

    name: ClassVar[str]
    options: ClassVar[type] = NoOptions
    prefixes: ClassVar[tuple[str, ...]] = ()
    """File names beginning with one of these and a colon belong to this driver."""
    roles: tuple[Role, ...] = (Role("file"),)
    """Its children; the first is the one it filters."""

    opaque: ClassVar[bool] = False
    """Whether what the child's map says does not hold for it: it has ``extent_at`` and ``extents`` of its own then."""
    needs: Mapping[str, Access] = {}
    """What it does with its other children and lets others do, by role."""

    child: Node
    further: Mapping[str, Node] = {}
    """Its other children, by role."""
    event: Callable[[str], None] | None = None
    """Told by what lies above that something is about to happen; see ``Node.event``."""

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, object]:
        """The options, children among them, that ``filename`` stands for. Raises OptionError."""
        return {cls.roles[0].name: {"filename": filename}}

    @classmethod
    def child_roles(cls, options: dict[str, object]) -> tuple[Role, ...]:
        """The children that a node opened with ``options`` has. May put the options of each where its role says."""
        return cls.roles

    @classmethod
    def open(cls, context: OpenContext, options: Any) -> Self:
        """``context.children`` are the children by role, and ``context.file`` the first of them."""
        raise not_supported(f"Filter '{cls.name}' cannot be opened by name")

    def access(self, above: Access) -> Access:
        """What it does with ``child`` and lets others do, when its own users do ``above``."""
        return above

    @property
    def size(self) -> int:
        """In bytes."""
        return self.child.size

    @property
    def alignment(self) -> int:
        return self.child.alignment

    def readv(self, segments: Segments, *, nowait: bool) -> None:
        self.child.readv(segments, nowait=nowait)

    def writev(self, segments: Segments) -> None:
        self.child.writev(segments)

    def write_zeros(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        self.child.write_zeros(offset, length, unmap=unmap, fast=fast)

    def discard(self, offset: int, length: int) -> None:
        self.child.discard(offset, length)

    def flush(self) -> None:
        self.child.flush()

    def write_compressed(self, segments: Segments, turn: Callable[[], None] | None) -> None:
        """See ``Node.write_compressed``."""
        self.child.write_compressed(segments, turn=turn)

    def resize(self, size: int, *, preallocation: str) -> None:
        self.child.resize(size, preallocation=preallocation)

    def look_up(self, offset: int, length: int) -> None:
        """The map of a range is about to be asked of the child. May raise OSError."""

    def extent_at(self, offset: int, length: int) -> Extent:
        """The first run of the range; see ``Node.extent_at``."""
        return self.child.extent_at(offset, length)

    def extents(self, offset: int, length: int) -> Extents:
        """All runs of the range; see ``Node.extents``."""
        return self.child.extents(offset, length)

    def snapshot_readv(self, segments: Segments) -> None:
        """Fills every buffer with what the child was when the filter was put over it. Raises ENOTSUP for a filter that
        knows no such moment; EACCES where that is not known any more."""
        raise not_supported(f"Filter '{self.name}' keeps no snapshot")

    def snapshot_extents(self, offset: int, length: int) -> Extents:
        """The runs of a range as of that moment: DATA and ZERO, without places. Errors as ``snapshot_readv``."""
        raise not_supported(f"Filter '{self.name}' keeps no snapshot")

    def snapshot_discard(self, offset: int, length: int) -> None:
        """Nobody will read that part of the snapshot any more. Errors as ``snapshot_readv``."""
        raise not_supported(f"Filter '{self.name}' keeps no snapshot")

    def settle(self) -> None:
        """Waits until nothing is in flight below it that no user waits for."""

    def transparent(self) -> bool:
        """Whether places of the child may be read directly, past ``readv``."""
        return True

    def close(self) -> None:
        """Gives up what the filter holds. The children are closed by the graph afterwards."""


Driver = type[Storage] | type[Format] | type[Filter]


def runs_of(extent_at: Callable[[int, int], Extent], offset: int, length: int) -> list[Extent]:
    """The runs of a range, by asking for the first one again and again."""
    runs: list[Extent] = []
    end = offset + length
    while offset < end:
        run = extent_at(offset, end - offset)
        runs.append(run)
        offset = run.end
    return runs
