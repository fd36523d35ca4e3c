"""What the subcommands share: verdicts, the options most of them take, and opening images as named by a user."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, cast

from diskwright.cli.faces import program
from diskwright.cli.failure import Failure, UsageError
from diskwright.cli.parser import Parser
from diskwright.errors import DiskwrightError, ImageLocked, OptionError, OutOfRange, message_of

if TYPE_CHECKING:
    from diskwright.cli.objects import Objects
    from diskwright.core.gate import Gate
    from diskwright.core.graph import Graph
    from diskwright.core.node import Node
    from diskwright.core.secrets import Secrets


__all__ = ["Failure", "Parser", "UsageError"]  # commands find these here too

CACHE_MODES: Final = ("none", "writeback", "writethrough", "directsync", "unsafe")


# -- options -------------------------------------------------------------------------------------


def add_gate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gate",
        choices=("open", "directory", "closed"),
        default="open",
        help="which files named inside an image (backing files, data files) may be opened: all (open, the default), "
        "those in the image's own directory or below (directory), none (closed). For images of unknown origin.",
    )


def add_source(parser: argparse.ArgumentParser, *, cache: bool = False) -> None:
    """The options of a command that reads one image."""
    parser.add_argument("-f", "--format", metavar="FMT", help="the image's format; probed when not given")
    add_image_opts(parser)
    add_force_share(parser)
    if cache:
        parser.add_argument("-T", metavar="CACHE", dest="source_cache", help="cache mode for reading the image")
    add_object(parser)
    add_gate(parser)


def add_image_opts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image-opts", action="store_true", help="image names are options: driver=qcow2,file.filename=disk.qcow2"
    )


def add_force_share(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-U", "--force-share", action="store_true", help="open images even while others write to them")


def add_object(parser: argparse.ArgumentParser, code: int = 1) -> None:
    parser.add_argument(
        "--object", action=_Define, const=code, default=[], metavar="DEF",
        help="a secret that options name by its id: secret,id=sec0,file=PATH (or data=TEXT), with format=raw|base64, "
        "and keyid= and iv= when it is encrypted itself",
    )  # fmt: skip


class _Define(argparse.Action):
    """Defines an object as soon as it is read, since one may refer to another before it; ``args.objects`` holds them.
    Raises Failure with the exit code that is the option's constant."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        from diskwright.cli.objects import Objects

        objects = getattr(namespace, "objects", None) or Objects()
        try:
            objects.add(str(values))
        except Failure as failure:
            raise Failure(failure.message, self.const) from None
        namespace.objects = objects
        namespace.object = [*namespace.object, str(values)]


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="human|json", default="human", help="how the result is printed")
    parser.add_argument(
        "--json", action="store_const", const="json", dest="output", default="human", help="same as --output=json"
    )


def add_progress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-p", dest="show_progress", action="store_true", help="show progress on standard output")
    parser.add_argument(
        "--progress", choices=("json", "none"),
        help="json: report progress on standard error, one JSON object a line; none: not even on a terminal",
    )  # fmt: skip


def check_output(args: argparse.Namespace) -> bool:
    """Whether the result is to be JSON."""
    if args.output not in ("human", "json"):
        raise Failure("--output must be used with human or json as argument.")
    return bool(args.output == "json")


def cache_mode(text: str | None, what: str, code: int = 1) -> str | None:
    """A cache mode the user named. ``what`` is ``cache`` or ``source cache``."""
    if text is not None and text not in CACHE_MODES:
        raise Failure(f"Invalid {what} option: {text}", code)
    return text


def size_argument(text: str, what: str, most: int = (1 << 63) - 1) -> int:
    """A size the user gave for ``what``, in bytes, ``most`` at most."""
    from diskwright.units import parse_size

    try:
        return parse_size(text, most=most)
    except OutOfRange:
        raise Failure(f"Invalid {what} specified. Must be between 0 and {most}.") from None
    except OptionError:
        raise Failure(
            f"Invalid {what} specified. You may use k, M, G, T, P or E suffixes for\n"
            f"{program()}: kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."
        ) from None


def size(what: str) -> Callable[[str], int]:
    """The ``type`` of an option that takes a size: a wrong one is told when its turn comes."""
    return lambda text: size_argument(text, what)


def option_list(text: str) -> str:
    """The ``type`` of ``-o``: raises Failure for a stray comma at an end, which would swallow the next list's name."""
    bare = text.replace(",,", "")
    if not text or bare.startswith(",") or bare.endswith(","):
        raise Failure(f"Invalid option list: {text}")
    return text


def join_options(parts: Sequence[str]) -> str:
    """Several ``-o`` as one option text."""
    return ",".join(map(option_list, parts))


def wants_help(options: str) -> bool:
    """Whether an option text asks for a description of the options instead."""
    return any(word in ("help", "?") for word in options.replace(",,", "\0").split(","))


# -- opening -------------------------------------------------------------------------------------


def make_gate(name: str) -> Gate:
    from diskwright.core.gate import ClosedGate, DirectoryGate, OpenGate

    gates: dict[str, type[Gate]] = {"open": OpenGate, "directory": DirectoryGate, "closed": ClosedGate}
    return gates[name]()


def secrets_of(args: argparse.Namespace) -> Secrets:
    """The secrets the user defined with ``--object``; ``args.object`` holds their texts where a command line is not
    read by ``Parser``. Raises Failure."""
    objects = objects_given(args)
    if objects is None:
        from diskwright.core.secrets import Secrets

        return Secrets()
    return objects.secrets


def objects_given(args: argparse.Namespace) -> Objects | None:
    """What the user defined with ``--object``, as in ``secrets_of``; None: nothing."""
    objects = getattr(args, "objects", None)
    if objects is None and args.object:
        from diskwright.cli.objects import objects_of

        args.objects = objects = objects_of(args.object)
    return cast("Objects | None", objects)


@contextmanager
def graph_of(args: argparse.Namespace) -> Iterator[Graph]:
    """A graph with the user's gate, closed at the end."""
    from diskwright.core.graph import Graph

    objects = objects_given(args)
    graph = Graph(make_gate(args.gate), secrets_of(args), objects.groups if objects is not None else None)
    try:
        yield graph
    except BaseException:
        try:
            graph.close()
        except (DiskwrightError, OSError):
            pass  # often a consequence of what led here, and that is to be told
        raise
    graph.close()


def specification(name: str, image_opts: bool) -> str | dict[str, object]:
    """What ``Graph.open`` takes, for an image as a user names it."""
    from diskwright.core.options import split_pairs

    if not image_opts:
        return name
    if "=" not in name:
        raise OptionError(f"Cannot find device='{name}' nor node-name='{name}'")
    return dict(split_pairs(name))


def _as_mapping(spec: str | dict[str, object]) -> dict[str, object]:
    from diskwright.core.graph import parse_json

    if isinstance(spec, dict):
        return spec
    return parse_json(spec[5:]) if spec.startswith("json:") else {"filename": spec}


def open_image(
    graph: Graph,
    name: str,
    *,
    format: str | None = None,
    image_opts: bool = False,
    writable: bool = False,
    force_share: bool = False,
    cache: str | None = None,
    backing: bool = True,
    guest_data: bool = True,
    options: Mapping[str, object] | None = None,
    code: int = 1,
) -> Node:
    """Opens the image a user names, with more ``options`` for its driver. Raises Failure with ``code``, worded
    for that user."""
    if image_opts and format is not None:
        raise Failure("--image-opts and --format are mutually exclusive", code)
    try:
        if writable and force_share:
            raise OptionError("force-share=on can only be used with read-only images")
        spec = specification(name, image_opts)
        if options:
            spec = {**_as_mapping(spec), **options}
        node = graph.open(
            spec,
            driver=format,
            writable=writable,
            force_share=force_share,
            cache=cache,
            backing=backing,
            guest_data=guest_data,
        )
    except (DiskwrightError, OSError) as error:
        # Many of our own messages begin with the name that has just been told.
        reason = opening_error(error).removeprefix(f"{name}: ")
        raise Failure(f"Could not open '{name}': {reason}", code) from error
    if writable:
        given = _as_mapping(spec).get("driver") if not isinstance(spec, str) else None
        warn_guessed_raw(name, node, format or given, False)
    return node


def warn_guessed_raw(name: str, node: Node, format: object, image_opts: bool) -> None:
    """Says that an image to be changed was taken for raw only because nothing else fits: whoever writes its first
    bytes could make it another one. ``format`` is the one that was given; ``image_opts`` or a ``json:`` name say what
    they mean."""
    if format is not None or image_opts or name.startswith("json:") or node.driver_name != "raw" or node.file is None:
        return
    lines = (
        f"WARNING: Image format was not specified for '{node.file.filename}' and probing guessed raw.",
        "         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be "
        "restricted.",
        "         Specify the 'raw' format explicitly to remove the restrictions.",
    )
    sys.stdout.flush()
    print("\n".join(lines), file=sys.stderr)


def snapshot_options(graph: Graph, name: str, args: argparse.Namespace) -> dict[str, object]:
    """What to open an image with so that it shows the internal snapshot ``args.snapshot`` (the text of ``-l``), its
    driver included. Raises Failure when the text is wrong, or there is no such snapshot."""
    from diskwright.core import snapshots

    wanted = snapshot_parameters(args.snapshot)
    node = open_image(
        graph, name, format=args.format, image_opts=args.image_opts, force_share=args.force_share, backing=False
    )
    driver, keeper = node.driver_name, snapshots.keeper(node)
    try:
        if keeper is None or not _can_show_snapshots(driver):
            raise Failure(
                f"Failed to load snapshot: Block format '{driver}' used by device '' does not support temporarily "
                "loading internal snapshots"
            )
        found = keeper.snapshots()
        if wanted:
            snapshots.find(found, id=wanted.get("snapshot.id"), name=wanted.get("snapshot.name"))
        else:
            snapshots.find_any(found, args.snapshot)
    except (DiskwrightError, OSError) as error:
        raise Failure(f"Failed to load snapshot: {message_of(error)}") from error
    graph.release(node)
    if not wanted:
        return {"driver": driver, "snapshot": args.snapshot}
    return {"driver": driver, **{key.replace(".", "-"): value for key, value in wanted.items()}}


def _can_show_snapshots(driver: str) -> bool:
    from diskwright.core.options import describe
    from diskwright.core.registry import find

    return any(info.name == "snapshot" for info in describe(find(driver).options))


def snapshot_parameters(text: str) -> dict[str, str]:
    """``snapshot.id`` and ``snapshot.name`` of a text that gives these; none for an id or name as such."""
    if not text.startswith("snapshot."):
        return {}
    wanted = dict(option_mapping(text))
    if not wanted or not set(wanted) <= {"snapshot.id", "snapshot.name"}:
        raise Failure(f"Failed in parsing snapshot param '{text}'")
    return wanted


def guest_size(node: Node) -> int:
    """The size a guest sees: disks have whole sectors, and what a file lacks of its last one reads as zeros."""
    from diskwright.units import SECTOR, align_up

    return align_up(node.size, SECTOR)


def opening_error(error: BaseException) -> str:
    """Why an open failed. The kernel's refusals name the file they are about."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        name = error.filename
        if not name:
            return "The 'file' block driver requires a file name"
        text = error.strerror or ""
        if text.startswith("'file' driver requires "):
            return text
        cause = text
        while cause.startswith("Could not open backing file: "):
            cause = cause.removeprefix("Could not open backing file: ")
        if cause != text:
            return f"{text.removesuffix(cause)}Could not open '{name}': {cause}"
        return f"Could not open '{name}': {text}"
    if isinstance(error, ImageLocked):
        return str(error).strip().replace(_WHO_HAS_IT, _WHO_HAS_IT.replace(": ", "\n"))
    return message_of(error)


_WHO_HAS_IT: Final = ": Is another process using the image"
"""Begins a second line, as everywhere where somebody waits for these words."""


def one_operand(names: Sequence[str]) -> str:
    if len(names) != 1:
        raise UsageError("Expecting one image file name")
    return names[0]


def option_mapping(options: str) -> Mapping[str, str]:
    """An ``-o`` text as names and raw values."""
    from diskwright.core.options import split_pairs

    return split_pairs(options)
