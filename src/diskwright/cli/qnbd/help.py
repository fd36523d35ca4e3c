"""The help text of qemu-nbd's command line."""

from __future__ import annotations

from typing import Final

from diskwright.cli.faces import OWN_NAME, program

_TEXT: Final = """\
Usage: {program} [OPTIONS] FILE
  or:  {program} -L [OPTIONS]
  or:  {program} -d DEVICE
Exports a disk image over NBD, until its last client has left.

  -h, --help                show this text
  -V, --version             show the version

Where clients come from:
  -p, --port=PORT           TCP port to listen on, by number or name (10809; 0: any)
  -b, --bind=ADDRESS        address or host name to listen on (0.0.0.0)
  -k, --socket=PATH         listen on a unix socket instead
  -e, --shared=NUM          how many clients at a time (1; 0: up to 4096); others wait
  -t, --persistent          go on when the last client has left
  -x, --export-name=NAME    the export's name (empty)
  -D, --description=TEXT    what clients are told about it
  -v, --verbose             report connections on standard error

What they see:
  -r, --read-only           refuse to be written to
  -o, --offset=BYTES        leave out so many bytes at the image's beginning
  -s, --snapshot            keep the image as it is: what is written goes to a temporary
                            file and is lost at the end
  -l, --load-snapshot=WHICH export a snapshot within the image, read-only: an id or name, or
                            snapshot.id=ID,snapshot.name=NAME
  -A, --allocation-depth    let clients ask which image of a chain holds what
  -B, --bitmap=NAME         let clients ask what is dirty in a bitmap; may be given again

TLS and secrets:
      --object KIND,id=ID,..  define a secret, tls-creds-x509, tls-creds-psk, authz-simple,
                            authz-list or authz-list-file
      --tls-creds=ID        require TLS, with these credentials
      --tls-optional        let clients go without it
      --tls-authz=ID        let in only whom this object allows
      --tls-hostname=NAME   with -L: the name in the server's certificate

The process:
  -L, --list                list what another server exports
      --fork                go to the background once clients can connect
      --pid-file=PATH       store the process's id
  -T, --trace=PATTERN       accepted, and of no effect
  -c, --connect=DEVICE      make the kernel's device (/dev/nbd0) show the image
  -d, --disconnect          free the kernel's device that is named

How the image is opened:
  -f, --format=FORMAT       its format; guessed when not given
      --image-opts          FILE is a set of options: driver=qcow2,file.filename=disk.qcow2
  -n, --nocache             same as --cache=none
      --cache=MODE          none, writeback, writethrough, directsync or unsafe
      --aio=MODE            accepted: threads, native or io_uring
      --discard=MODE        pass on that space is not needed: ignore (default) or unmap
      --detect-zeroes=MODE  look for zeros in what is written: off, on or unmap
      --gate=WHICH          which files named inside an image may be opened: open (all),
                            directory (its own) or closed
"""


def text() -> str:
    command = f"{program()} nbd" if program() == OWN_NAME else program()
    return _TEXT.format(program=command)
