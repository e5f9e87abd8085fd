"""An audit hook: the first forbidden attempt ends the program, and is named.

Where the kernel's layers hold, it only says what was tried; where they do not, it is what guards
files and the network, and a program that looks for it can evade it.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from eval.confined.limits import readable

REFUSED = {
    "gc.get_objects",  # where the hook could be searched for
    "gc.get_referrers",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.killpg",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "pty.spawn",
    "resource.prlimit",
    "signal.pthread_kill",
    "subprocess.Popen",
    "sys.addaudithook",
}
REFUSED_FAMILIES = ("ctypes.", "socket.", "syslog.")
# Functions that change other processes, or files, and raise no audit event.
SILENT = {
    "_posixshmem": ("shm_open", "shm_unlink"),
    "_posixsubprocess": ("fork_exec",),  # multiprocessing forks there
    "posix": ("fchmod", "fchown", "mkfifo", "mknod", "sched_setaffinity", "sched_setscheduler",
              "sched_setparam", "setpriority", "nice"),
}  # fmt: skip
# Events that change files: where their arguments hold a path and its directory's descriptor.
CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.chflags": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.link": ((0, 2), (1, 3)),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.removexattr": ((0, None),),
    "os.rename": ((0, 2), (1, 3)),
    "os.rmdir": ((0, 1),),
    "os.setxattr": ((0, None),),
    "os.symlink": ((1, 2),),  # wherever it points, opening it resolves it
    "os.truncate": ((0, None),),
    "os.utime": ((0, 3),),
    "sqlite3.connect": ((0, None),),
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _refuse_silent(refuse: Callable[..., NoReturn]) -> None:
    """Put `refuse` in the place of the functions of SILENT; `os` holds those of posix once more."""
    for module, names in SILENT.items():
        with contextlib.suppress(ImportError):
            holders = [__import__(module), *([os] if module == "posix" else [])]
            for holder, name in itertools.product(holders, names):
                if hasattr(holder, name):
                    setattr(holder, name, lambda *args, name=name, **_: refuse(name, *args))


def watch(directory: str, report: Callable[[str], object]) -> None:
    """End this process, with a report, at the first audit event that a program may not cause."""
    join, real, link, decode = os.path.join, os.path.realpath, os.readlink, os.fsdecode
    leave, open_file = os._exit, os.open
    refused, families, changes = frozenset(REFUSED), REFUSED_FAMILIES, dict(CHANGES)
    descriptors, separator = f"/proc/{os.getpid()}/fd", os.sep
    library, writing = [directory, *readable()], WRITING

    def refuse(event: str, *args: object) -> NoReturn:
        try:
            report(f"{event} {args[0] if args else ''}"[:200])
        finally:
            leave(1)

    def is_inside(path: Any, folder: int | None, roots: list[str]) -> bool:
        if isinstance(path, int):  # it was opened before, or it will fail
            return True
        base = ""
        if folder is not None and folder >= 0:
            try:
                base = link(f"{descriptors}/{folder}")
            except OSError:
                return False
        text = str.__str__(decode(path))  # a subclass loses its own methods
        whole = real(join(base, text))
        return any(whole == root or whole.startswith(root + separator) for root in roots)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in refused or event.startswith(families):
            refuse(event, *args)
        if event == "object.__setattr__" and args[1] == "__code__":
            refuse(event, "__code__")
        if event == "open":
            path, _, flags = args
            roots = [directory] if flags & writing else library
            if path != "/dev/null" and not is_inside(path, None, roots):
                refuse(event, path)
        elif event == "sqlite3.connect" and args[0] == ":memory:":
            return
        else:
            for where, folder in changes.get(event, ()):
                base = None if folder is None else args[folder]
                if not is_inside(args[where], base, [directory]):
                    refuse(event, args[where])

    def open_at(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if dir_fd is not None and flags & writing and not is_inside(path, dir_fd, [directory]):
            refuse("open", path)
        return open_file(path, flags, mode, dir_fd=dir_fd)

    _refuse_silent(refuse)
    vars(os)["open"] = vars(sys.modules["posix"])["open"] = open_at  # its event lacks dir_fd
    os.supports_dir_fd.add(open_at)
    for name in ("ctypes", "_ctypes"):  # to be loaded anew, under the hook's eyes
        sys.modules.pop(name, None)
    sys.addaudithook(hook)
