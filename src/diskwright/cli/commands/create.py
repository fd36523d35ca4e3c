"""``diskwright create``: make a new image."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from diskwright.cli import common
from diskwright.cli.common import Failure, UsageError, opening_error
from diskwright.errors import DiskwrightError, ImageLocked

if TYPE_CHECKING:
    from diskwright.core.create import Plan
    from diskwright.core.options import OptionInfo

SUMMARY: Final = "create an image"

# What the line that announces a creation names even when it was not asked for, and in which order it names
# things. Programs parse this line, so both are as they always were; a format that is not listed here names
# what was asked for, in the order of its options.
_ORDER: Final[Mapping[str, Sequence[str]]] = {
    "raw": ("size", "nocow", "preallocation"),
    "vhdx": ("size", "log_size", "block_size", "subformat", "block_state_zero"),
    "qcow2": (
        "encryption", "encrypt.format", "encrypt.key_secret", "encrypt.cipher_alg", "encrypt.cipher_mode",
        "encrypt.ivgen_alg", "encrypt.ivgen_hash_alg", "encrypt.hash_alg", "encrypt.iter_time",
        "cluster_size", "extended_l2", "preallocation", "compression_type", "size", "compat", "backing_file",
        "backing_fmt", "data_file", "data_file_raw", "lazy_refcounts", "refcount_bits",
    ),
}  # fmt: skip
# Names that are announced with hyphens, as the encrypting formats spell them.
_HYPHENATED: Final = (
    "key_secret", "cipher_alg", "cipher_mode", "ivgen_alg", "ivgen_hash_alg", "hash_alg", "iter_time",
    "detached_header", "new_secret", "old_secret", "luks_version", "sector_size",
)  # fmt: skip
_ALWAYS: Final[Mapping[str, Mapping[str, str]]] = {
    "parallels": {"cluster_size": "1048576"},
    "qed": {"cluster_size": "65536"},
    "vdi": {"static": "off"},
    "vhdx": {"log_size": "1048576", "block_size": "0"},
    "vmdk": {"compat6": "off", "hwversion": "undefined"},
    "qcow2": {
        "cluster_size": "65536",
        "extended_l2": "off",
        "compression_type": "zlib",
        "lazy_refcounts": "off",
        "refcount_bits": "16",
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--format", metavar="FMT", default="raw", help="format of the image (default: raw)")
    parser.add_argument("-b", dest="backing_file", metavar="FILE", help="backing file, as the image shall name it")
    parser.add_argument("-F", "--backing-format", dest="backing_fmt", metavar="FMT", help="the backing file's format")
    parser.add_argument("-u", dest="unsafe", action="store_true", help="do not look at the backing file")
    parser.add_argument(
        "-o", dest="options", action="append", type=common.option_list, default=[], metavar="OPTIONS",
        help="options of the format: name=value,... with commas in values doubled; '-o help' lists them",
    )  # fmt: skip
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    common.add_object(parser)
    common.add_gate(parser)
    parser.add_argument("operands", nargs="*", metavar="FILENAME [SIZE]")


def run(args: argparse.Namespace) -> int:
    options = common.join_options(args.options) if args.options else ""
    if options and common.wants_help(options):
        print(describe_options(args.format, args.operands[0] if args.operands else None), end="")
        return 0
    if not args.operands:
        raise UsageError("Expecting image file name")
    filename = args.operands[0]
    if len(args.operands) > 2:
        raise UsageError(f"Unexpected argument: {args.operands[2]}")
    size = common.size_argument(args.operands[1], "image size") if len(args.operands) == 2 else None
    wanted = dict(common.option_mapping(options))
    try:
        _merge(wanted, args, size)
        _create(filename, args, wanted)
    except (DiskwrightError, OSError) as error:
        raise Failure(f"{filename}: {creation_error(error)}") from error
    return 0


def _merge(wanted: dict[str, Any], args: argparse.Namespace, size: int | None) -> None:
    """What has an option of its own joins the others; it wins over ``-o``, except that a size given twice is
    more likely a slip than a wish."""
    from diskwright.errors import OptionError

    if size is not None:
        if "size" in wanted:
            raise OptionError("The image size must be specified only once")
        wanted["size"] = size
    if args.backing_file is not None:
        wanted["backing_file"] = args.backing_file
    if args.backing_fmt is not None:
        wanted["backing_fmt"] = args.backing_fmt


def _create(filename: str, args: argparse.Namespace, wanted: Mapping[str, object]) -> None:
    from diskwright.core.create import plan

    creation = plan(
        filename,
        args.format,
        wanted,
        gate=common.make_gate(args.gate),
        secrets=common.secrets_of(args),
        check_backing=not args.unsafe,
    )
    if not args.quiet:
        print(announcement(creation, args.format), flush=True)
    creation.make()


def announcement(creation: Plan, format: str) -> str:
    """``Formatting 'x', fmt=qcow2 cluster_size=65536 ...``"""
    from diskwright.core.options import describe

    known = [*describe(creation.driver.create_options), *describe(creation.storage.create_options)]
    order = (*_ORDER.get(format, ()), *(info.name.replace("-", "_") for info in known))
    shown = dict(_ALWAYS.get(format, {}))
    shown.update((name, _as_given(value)) for name, value in creation.given.items())
    pairs = [f"{_told(name)}={shown[name].replace(',', ',,')}" for name in dict.fromkeys(order) if name in shown]
    return " ".join([f"Formatting '{creation.filename}', fmt={format}", *pairs])


def _told(name: str) -> str:
    return name.replace("_", "-") if name.rpartition(".")[2] in _HYPHENATED else name


def _as_given(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def creation_error(error: BaseException) -> str:
    """Why a creation failed, where the image's name has been told already."""
    from diskwright.errors import message_of

    if isinstance(error, ImageLocked):
        return opening_error(error)
    if not isinstance(error, OSError) or error.errno is None:
        return _backing_last(message_of(error))
    if error.filename is None:
        return error.strerror or message_of(error)
    text = error.strerror or ""
    if text.startswith(_BACKING):
        return _backing_last(
            f"{_BACKING}{opening_error(type(error)(error.errno, text.removeprefix(_BACKING), error.filename))}"
        )
    return f"Could not create '{error.filename}': {text}"


_BACKING: Final = "Could not open backing image: "


def _backing_last(text: str) -> str:
    """The cause comes first; that it is about the backing file, on a line of its own."""
    return f"{text.removeprefix(_BACKING)}\nCould not open backing image." if text.startswith(_BACKING) else text


def describe_options(format: str, filename: str | None) -> str:
    """What ``-o help`` prints: one line an option, from the drivers' own descriptions."""
    from diskwright.core import registry
    from diskwright.core.driver import Storage
    from diskwright.core.graph import storage_for
    from diskwright.core.options import describe
    from diskwright.errors import OptionError

    try:
        driver = registry.find(format)
    except OptionError:
        raise Failure(f"Unknown file format '{format}'") from None
    if not hasattr(driver, "create_options"):
        raise Failure(f"Format driver '{format}' does not support image creation")
    rows = {info.name: info for info in describe(driver.create_options)}
    if filename is not None and not issubclass(driver, Storage):
        for info in describe(storage_for(filename).create_options):
            if info.name != "filename":
                rows.setdefault(info.name, info)
    of = "" if filename is not None else f" {format}"
    lines = [f"Supported{of} options:"]
    lines += option_lines(rows)
    if filename is None:
        lines += ["", "What holds the image may have options too: name the image to see them."]
    return "\n".join(lines) + "\n"


def option_lines(rows: Mapping[str, OptionInfo]) -> list[str]:
    """One line an option, in the order of their names."""
    labels = {name: f"  {_told(name.replace('-', '_'))}=<{_kind(info)}>" for name, info in rows.items()}
    return [f"{labels[name]:<24} - {_explained(rows[name])}" for name in sorted(rows)]


def _explained(info: OptionInfo) -> str:
    from diskwright.core.options import OneOf

    return f"{info.help} ({', '.join(info.type.words)})" if isinstance(info.type, OneOf) else info.help


def _kind(info: OptionInfo) -> str:
    from diskwright.core.options import BOOL, INT, SIZE

    if info.type is BOOL:
        return "bool (on/off)"
    if info.type is INT:
        return "num"
    return "size" if info.type is SIZE else "str"
