"""What is told of a LUKS header: the format-specific facts of ``qemu-img info``, under its names and in its order."""

from __future__ import annotations

from diskwright.codecs.luks.luks1 import SECTOR, Luks1
from diskwright.codecs.luks.luks2 import Luks2


def facts(header: Luks1 | Luks2, *, within: str | None = None) -> dict[str, object]:
    """``within``: the name of what the header belongs to says which format it is (in a qcow2 image: ``luks``)."""
    if isinstance(header, Luks2):
        return _facts2(header)
    mode, ivgen, ivhash = header.mode
    found: dict[str, object] = {"ivgen-alg": ivgen, "hash-alg": header.hash_spec}
    found["cipher-alg"] = cipher_alg(header)
    found["uuid"] = header.uuid
    if ivhash:
        found["ivgen-hash-alg"] = ivhash
    if within is not None:
        found["format"] = within
    found["cipher-mode"] = mode
    slots: list[dict[str, object]] = []
    for slot in header.slots:
        row: dict[str, object] = {"active": slot.in_use}
        if slot.in_use:
            row["iters"] = slot.password_iterations
        row["key-offset"] = slot.key_material_offset * SECTOR
        if slot.in_use:
            row["stripes"] = slot.stripes
        slots.append(row)
    found["slots"] = slots
    found["payload-offset"] = header.payload_start
    found["master-key-iters"] = header.mk_digest_iterations
    return found


def cipher_alg(header: Luks1) -> str:
    """The cipher with the length of its key in bits, as QEMU names it: aes-256."""
    bits = header.key_bytes * 8
    return f"{header.cipher_name}-{bits // 2 if header.mode[0] == 'xts' else bits}"


def _facts2(header: Luks2) -> dict[str, object]:
    found: dict[str, object] = {"version": 2, "uuid": header.uuid}
    if header.label:
        found["label"] = header.label
    found["encryption"] = header.encryption
    found["sector-size"] = header.sector_size
    slots: list[dict[str, object]] = []
    for name, slot in sorted(header.keyslots().items(), key=lambda row: (len(row[0]), row[0])):
        kdf = slot.get("kdf") if isinstance(slot, dict) else None
        kind = kdf.get("type") if isinstance(kdf, dict) else None
        slots.append({"keyslot": ascii(name)[1:-1][:8], "kdf": ascii(str(kind))[1:-1][:16]})
    found["slots"] = slots
    found["payload-offset"] = header.payload_start
    return found
