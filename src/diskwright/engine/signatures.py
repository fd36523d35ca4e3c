"""Signatures: the magic numbers by which kinds of files are told, whether there is a driver for them or not.

Each row names where its numbers are published. A signature is a hint: anybody can write one into a file.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

HEAD: Final = 68 << 10
"""Bytes of a file's, or a disk's, beginning that are looked at: the furthest signature is UFS's at 66908."""
TAIL: Final = 1024
"""Bytes of a file's end: footers are a sector, and old VHD ones a byte less."""

IMAGE: Final = "image"
WRAPPED: Final = "wrapped"
"""Compressed or archived: there may be an image inside."""
CONTENT: Final = "content"
"""Something that may be on a disk, or be one: such a file is a raw image at most."""


class Signature(NamedTuple):
    """``magic`` at ``offset`` (below 0: from the end). ``name`` is the driver's where there is or could be one;
    ``version`` is where the version is, counted from ``offset``, and its layout."""

    name: str
    what: str
    offset: int
    magic: bytes
    source: str
    kind: str = IMAGE
    version: tuple[int, str] | None = None


class Found(NamedTuple):
    """A signature that was found, and the version beside it."""

    signature: Signature
    offset: int
    version: int | None


_QEMU: Final = "QEMU, docs/interop"
_QCOW2: Final = f"{_QEMU}/qcow2: Header"
_VHD: Final = "Virtual Hard Disk Image Format Specification"
_VMDK: Final = "VMware Virtual Disk Format 5.0"

FILES: Final[tuple[Signature, ...]] = (
    Signature("qcow", "QEMU copy-on-write, version 1", 0, b"QFI\xfb\0\0\0\1", _QCOW2, IMAGE, (4, ">I")),
    Signature("qcow2", "QEMU copy-on-write", 0, b"QFI\xfb", _QCOW2, IMAGE, (4, ">I")),
    Signature("qed", "QEMU enhanced disk", 0, b"QED\0", f"{_QEMU}/qed_spec"),
    Signature("cow", "User-mode Linux copy-on-write", 0, b"OOOM", "User-mode Linux, cow.h", IMAGE, (4, ">I")),
    Signature("luks", "Linux unified key setup", 0, b"LUKS\xba\xbe", "LUKS On-Disk Format 1.2.3", IMAGE, (6, ">H")),
    Signature("luks", "LUKS2, second header", 0, b"SKUL\xba\xbe", "LUKS2 On-Disk Format 1.1.0", IMAGE, (6, ">H")),
    Signature("vdi", "VirtualBox disk image", 64, b"\x7f\x10\xda\xbe", "VirtualBox, VDICore.h", IMAGE, (4, "<I")),
    Signature("vmdk", "VMware sparse extent", 0, b"KDMV", f"{_VMDK}: Hosted Sparse Extents", IMAGE, (4, "<I")),
    Signature("vmdk", "VMware ESX sparse extent", 0, b"COWD", f"{_VMDK}: ESX Sparse", IMAGE, (4, "<I")),
    Signature("vmdk", "VMware space-efficient sparse extent", 0, b"\xbe\xba\xfe\xca\0\0\0\0", "libvmdk: VMDK format"),
    Signature("vmdk", "VMware disk descriptor", 0, b"# Disk DescriptorFile", f"{_VMDK}: The Descriptor File"),
    Signature("vhdx", "Hyper-V virtual hard disk 2", 0, b"vhdxfile", "MS-VHDX 2.2.1"),
    Signature("vpc", "virtual hard disk, footer's copy", 0, b"conectix", _VHD, IMAGE, (12, ">I")),
    Signature("vpc", "virtual hard disk, footer", -512, b"conectix", _VHD, IMAGE, (12, ">I")),
    Signature("vpc", "virtual hard disk, footer of old length", -511, b"conectix", _VHD),
    Signature("parallels", "Parallels disk", 0, b"WithoutFreeSpace", f"{_QEMU}/parallels", IMAGE, (16, "<I")),
    Signature("parallels", "Parallels disk 2", 0, b"WithouFreSpacExt", f"{_QEMU}/parallels", IMAGE, (16, "<I")),
    Signature("bochs", "Bochs growing disk", 0, b"Bochs Virtual HD Image\0", "Bochs, hdimage.h", IMAGE, (68, "<I")),
    Signature("cloop", "compressed loop device", 0, b"#!/bin/sh\n#V2.0 Format\n", "cloop, compressed_loop.h"),
    Signature("dmg", "Apple disk image, trailer", -512, b"koly", "Apple UDIF", IMAGE, (4, ">I")),
    Signature("dmg", "Apple encrypted disk image", 0, b"encrcdsa", "Apple UDIF", IMAGE, (8, ">I")),
    Signature("sparseimage", "Apple sparse image", 0, b"sprs", "libmodi: MODI format"),
    Signature("asif", "Apple sparse image of macOS 26", 0, b"shdw", "dissect.hypervisor: ASIF", IMAGE, (4, ">I")),
    Signature("android-sparse", "Android sparse", 0, b"\x3a\xff\x26\xed", "AOSP, sparse_format.h", IMAGE, (4, "<H")),
    Signature("vma", "Proxmox VE backup archive", 0, b"VMA\0", "Proxmox VE, vma_spec.txt", IMAGE, (4, ">I")),
    Signature("ewf", "EnCase evidence file", 0, b"EVF\x09\x0d\x0a\xff\0", "libewf: EWF format"),
    Signature("ewf2", "EnCase evidence file 2", 0, b"EVF2\x0d\x0a\x81\0", "libewf: EWF2 format"),
    Signature("aff", "Advanced Forensic Format", 0, b"AFF10\x0d\x0a\0", "AFFLIB"),
    Signature("partclone", "Partclone image", 0, b"partclone-image\0", "Partclone, IMAGE_FORMATS.md"),
    Signature("ntfsclone", "ntfsclone image", 0, b"\0ntfsclone-image", "ntfs-3g, ntfsclone"),
    Signature("wim", "Windows imaging file", 0, b"MSWIM\0\0\0", "Windows Imaging File Format"),
    Signature("gzip", "gzip", 0, b"\x1f\x8b\x08", "RFC 1952, section 2.3.1", WRAPPED),
    Signature("xz", "xz", 0, b"\xfd7zXZ\0", "The .xz File Format 1.2, section 2.1.1.1", WRAPPED),
    Signature("zstd", "zstd", 0, b"\x28\xb5\x2f\xfd", "RFC 8878, section 3.1.1", WRAPPED),
    Signature("bzip2", "bzip2", 0, b"BZh", "bzip2 format", WRAPPED),
    Signature("lz4", "LZ4 frame", 0, b"\x04\x22\x4d\x18", "LZ4 Frame Format", WRAPPED),
    Signature("zip", "zip", 0, b"PK\3\4", "APPNOTE 6.3, section 4.3.7", WRAPPED),
    Signature("7z", "7-Zip", 0, b"7z\xbc\xaf\x27\x1c", "7zFormat.txt", WRAPPED),
    Signature("tar", "tar (an OVA is one)", 257, b"ustar", "POSIX pax: ustar Interchange Format", WRAPPED),
    Signature("elf", "ELF program", 0, b"\x7fELF", "System V ABI: ELF Header", CONTENT),
    Signature("pe", "DOS or Windows program", 0, b"MZ", "PE Format", CONTENT),
)  # fmt: skip

FILE_SYSTEMS: Final[tuple[Signature, ...]] = (
    Signature("iso9660", "ISO 9660", 32769, b"CD001", "ECMA-119, section 8.1.2", CONTENT),
    Signature("squashfs", "SquashFS", 0, b"hsqs", "Linux, Documentation/filesystems/squashfs", CONTENT, (28, "<H")),
    Signature("ext", "ext2, ext3 or ext4", 1080, b"\x53\xef", "Linux, Documentation/filesystems/ext4", CONTENT),
    Signature("xfs", "XFS", 0, b"XFSB", "XFS Filesystem Structure, section 13", CONTENT),
    Signature("btrfs", "Btrfs", 65600, b"_BHRfS_M", "Btrfs on-disk format: Superblock", CONTENT),
    Signature("ntfs", "NTFS", 3, b"NTFS    ", "libfsntfs: NTFS format", CONTENT),
    Signature("bitlocker", "BitLocker", 3, b"-FVE-FS-", "libbde: BDE format", CONTENT),
    Signature("exfat", "exFAT", 3, b"EXFAT   ", "exFAT specification, section 3.1.2", CONTENT),
    Signature("fat", "FAT12", 54, b"FAT12   ", "FAT specification 1.03", CONTENT),
    Signature("fat", "FAT16", 54, b"FAT16   ", "FAT specification 1.03", CONTENT),
    Signature("fat", "FAT32", 82, b"FAT32   ", "FAT specification 1.03", CONTENT),
    Signature("refs", "ReFS", 3, b"ReFS\0\0\0\0", "libfsrefs: ReFS format", CONTENT),
    Signature("f2fs", "F2FS", 1024, b"\x10\x20\xf5\xf2", "Linux, f2fs_fs.h", CONTENT),
    Signature("erofs", "EROFS", 1024, b"\xe2\xe1\xf5\xe0", "Linux, erofs_fs.h", CONTENT),
    Signature("hfs+", "HFS+", 1024, b"H+", "Apple TN1150", CONTENT),
    Signature("hfsx", "HFSX", 1024, b"HX", "Apple TN1150", CONTENT),
    Signature("apfs", "APFS container", 32, b"NXSB", "Apple File System Reference", CONTENT),
    Signature("reiserfs", "ReiserFS", 65588, b"ReIsEr", "Linux, reiserfs.h", CONTENT),
    Signature("jfs", "JFS", 32768, b"JFS1", "Linux, jfs_superblock.h", CONTENT),
    Signature("ufs2", "UFS2", 66908, b"\x19\x01\x54\x19", "FreeBSD, ufs/ffs/fs.h", CONTENT),
    Signature("swap", "Linux swap", 4086, b"SWAPSPACE2", "Linux, swap.h", CONTENT),
    Signature("lvm2", "LVM2 physical volume", 512, b"LABELONE", "LVM2, label.h", CONTENT),
    Signature("lvm2", "LVM2 physical volume", 536, b"LVM2 001", "LVM2, label.h", CONTENT),
    Signature("md", "Linux RAID, version 1.2", 4096, b"\xfc\x4e\x2b\xa9", "Linux, md_p.h", CONTENT, (4, "<I")),
    Signature("cramfs", "cramfs", 0, b"\x45\x3d\xcd\x28", "Linux, cramfs_fs.h", CONTENT),
)


def matches(rows: Sequence[Signature], head: bytes, tail: bytes = b"", size: int | None = None) -> list[Found]:
    """Which of ``rows`` a file of ``size`` bytes shows that begins with ``head`` and ends with ``tail``; of rows of one
    name the first only."""
    found: list[Found] = []
    for row in rows:
        data, at = (head, row.offset) if row.offset >= 0 else (tail, len(tail) + row.offset)
        if at < 0 or data[at : at + len(row.magic)] != row.magic:
            continue
        if row.name == "qcow2" and found and found[-1].signature.name == "qcow":
            continue  # one magic, told apart by the version
        if any(row.name == other.signature.name for other in found):
            continue
        version = None
        if row.version is not None:
            place, layout = row.version
            if at + place + struct.calcsize(layout) <= len(data):
                (version,) = struct.unpack_from(layout, data, at + place)
        found.append(Found(row, row.offset if row.offset >= 0 else (size or 0) + row.offset, version))
    return found
