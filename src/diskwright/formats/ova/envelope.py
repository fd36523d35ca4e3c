"""ova: the OVF descriptor, after DSP0243 "Open Virtualization Format Specification", as far as it is about disks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from diskwright.errors import CorruptImage, LimitExceeded, UnsupportedFeature

if TYPE_CHECKING:
    from xml.parsers.expat import XMLParserType

MAX_TEXT: Final = 4 << 20
"""Bytes of a descriptor at most."""
_MAX_ITEMS: Final = 1000
_OVF: Final = re.compile(r"http://(?:schemas\.dmtf\.org|www\.vmware\.com)/[\w./]*ovf[\w./]*")
_UNITS: Final = re.compile(r"byte(?:\s*\*\s*2\^(\d{1,2}))?")
_FORMAT: Final = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"
_CIM: Final = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2"


@dataclass(frozen=True)
class FileReference:
    href: str
    size: int | None
    compression: str
    chunked: bool


@dataclass(frozen=True)
class DiskReference:
    id: str
    file: str | None
    """The id of its file; None for a disk that begins empty."""
    capacity: int | None
    """In bytes; None when it is no plain number."""


@dataclass
class Envelope:
    files: dict[str, FileReference] = field(default_factory=dict)
    """By id."""
    disks: list[DiskReference] = field(default_factory=list)


def parse(path: str, text: bytes) -> Envelope:
    """What a descriptor says of its files and disks. Raises CorruptImage, LimitExceeded, UnsupportedFeature."""
    from xml.parsers import expat

    if len(text) > MAX_TEXT:
        raise LimitExceeded(f"{path}: has a descriptor of {len(text)} bytes; at most {MAX_TEXT} are accepted")
    found = Envelope()
    parser = expat.ParserCreate(namespace_separator=" ")
    _refuse_entities(parser, path)

    def start(tag: str, attributes: dict[str, str]) -> None:
        space, _, name = tag.rpartition(" ")
        if name not in ("File", "Disk") or not _OVF.fullmatch(space):
            return
        given = {key.rpartition(" ")[2]: value for key, value in attributes.items()}
        if len(found.files) + len(found.disks) >= _MAX_ITEMS:
            raise LimitExceeded(f"{path}: has more than {_MAX_ITEMS} files and disks, the most accepted")
        if name == "File":
            found.files[given.get("id", "")] = FileReference(
                given.get("href", ""), _plain(given.get("size")), given.get("compression", ""), "chunkSize" in given
            )
        else:
            found.disks.append(DiskReference(given.get("diskId", ""), given.get("fileRef") or None, _capacity(given)))

    parser.StartElementHandler = start
    try:
        parser.Parse(text.rstrip(b"\0"), True)
    except expat.ExpatError as error:
        raise CorruptImage(path, "OVF descriptor", "damaged", None, str(error)) from error
    return found


def _refuse_entities(parser: XMLParserType, path: str) -> None:
    """A descriptor has no use for a document type, and what one can define costs time and memory without limit."""

    def refuse(*_: object) -> None:
        raise UnsupportedFeature(f"{path}: its descriptor has a document type declaration, which is not accepted")

    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse


def _plain(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 20 else None


def _capacity(given: dict[str, str]) -> int | None:
    number, units = (
        _plain(given.get("capacity")),
        _UNITS.fullmatch(given.get("capacityAllocationUnits", "byte").strip()),
    )
    return None if number is None or units is None else number << int(units[1] or 0)


def make(
    name: str,
    disk_file: str,
    disk_size: int | None,
    capacity: int,
    *,
    adapter: str,
    cpus: int,
    memory: int,
    hardware: str,
) -> bytes:
    """The descriptor of a machine with one disk. ``disk_size`` is the length of its file, ``capacity`` of the disk, in
    bytes; ``memory`` in MiB. Resource types are those of CIM_ResourceAllocationSettingData."""
    from xml.sax.saxutils import escape, quoteattr

    ide = adapter == "ide"
    size = "" if disk_size is None else f' ovf:size="{disk_size}"'
    controller: dict[str, object] = {"ElementName": "IDE controller 0" if ide else "SCSI controller 0", "InstanceID": 3}
    controller |= {"ResourceType": 5} if ide else {"ResourceSubType": adapter, "ResourceType": 6}
    items: list[dict[str, object]] = [
        {"AllocationUnits": "hertz * 10^6", "Description": "Virtual CPUs", "ElementName": f"{cpus} virtual CPU(s)",
         "InstanceID": 1, "ResourceType": 3, "VirtualQuantity": cpus},
        {"AllocationUnits": "byte * 2^20", "Description": "Memory", "ElementName": f"{memory} MiB of memory",
         "InstanceID": 2, "ResourceType": 4, "VirtualQuantity": memory},
        {"Address": 0, **controller},
        {"AddressOnParent": 0, "ElementName": "Hard disk 1", "HostResource": "ovf:/disk/vmdisk1", "InstanceID": 4,
         "Parent": 3, "ResourceType": 17},
    ]  # fmt: skip
    rows = "".join(
        "      <Item>\n"
        + "".join(f"        <rasd:{key}>{escape(str(value))}</rasd:{key}>\n" for key, value in item.items())
        + "      </Item>\n"
        for item in items
    )
    text = f"""<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
          xmlns:rasd="{_CIM}/CIM_ResourceAllocationSettingData"
          xmlns:vssd="{_CIM}/CIM_VirtualSystemSettingData">
  <References>
    <File ovf:href={quoteattr(disk_file)} ovf:id="file1"{size}/>
  </References>
  <DiskSection>
    <Info>Virtual disks</Info>
    <Disk ovf:capacity="{capacity}" ovf:capacityAllocationUnits="byte" ovf:diskId="vmdisk1" ovf:fileRef="file1"
          ovf:format="{_FORMAT}"/>
  </DiskSection>
  <VirtualSystem ovf:id={quoteattr(name)}>
    <Info>A virtual machine</Info>
    <Name>{escape(name)}</Name>
    <OperatingSystemSection ovf:id="1">
      <Info>The operating system is not known</Info>
    </OperatingSystemSection>
    <VirtualHardwareSection>
      <Info>Virtual hardware</Info>
      <System>
        <vssd:ElementName>Virtual Hardware Family</vssd:ElementName>
        <vssd:InstanceID>0</vssd:InstanceID>
        <vssd:VirtualSystemIdentifier>{escape(name)}</vssd:VirtualSystemIdentifier>
        <vssd:VirtualSystemType>{escape(hardware)}</vssd:VirtualSystemType>
      </System>
{rows}    </VirtualHardwareSection>
  </VirtualSystem>
</Envelope>
"""
    return text.encode()
