"""Locks this process down for good: namespaces, files, privileges, resources.

Each layer is applied if it is asked for, and named if it holds. Linux has all of them; elsewhere
only the resource limits are left. System calls are filter.py's, audit events hook.py's.
"""

import contextlib
import ctypes
import os
import signal
import struct
import sys
from collections.abc import Collection
from typing import Any

from eval.confined.filter import refuse_syscalls

MIB = 1 << 20
FILE_BYTES = 16 * MIB  # one file, standard error among them
FOLDER_BYTES, FOLDER_FILES = 64 * MIB, 10_000  # the working directory
OPEN_FILES = 64

# Of prctl(2), unshare(2), mount(2), mount_setattr(2) and landlock(7).
SET_PARENT_DEATH_SIGNAL, SET_DUMPABLE, SET_NO_NEW_PRIVILEGES = 1, 4, 38
NEW_USER, NEW_MOUNTS, NEW_NETWORK, NEW_IPC, NEW_PIDS = 1 << 28, 1 << 17, 1 << 30, 1 << 27, 1 << 29
MOUNT_SETATTR, CURRENT, ALL_BELOW, PRIVATE, RECURSIVE = 442, -100, 0x8000, 1 << 18, 1 << 14
CREATE_RULESET, ADD_RULE, RESTRICT = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_FOLDER, TRUNCATE = 1, 2, 4, 8, 1 << 14
# remove folder, remove file, make folder, regular file, symlink; refer (between folders)
CHANGE_FOLDER = 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 12 | 1 << 13
# By Landlock's version: file rights, network rights, scopes that it knows.
FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
NETWORK_RIGHTS, SCOPES = 3, 3


def readable() -> list[str]:
    """What a confined process may read outside its directory: libraries and time zones."""
    prefixes = {sys.base_prefix, sys.base_exec_prefix, "/usr", "/usr/local"}
    folders = {os.path.join(prefix, "lib") for prefix in prefixes} | {*sys.path}
    folders |= {"/lib", "/lib64", "/usr/lib64", "/usr/share/zoneinfo", "/etc/localtime"}
    folders |= {"/System/Library", "/dev/urandom", "/dev/null"}
    return sorted({os.path.realpath(f) for f in folders if f and os.path.exists(f)})


def _succeed(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _die_with_parent(libc: Any, parent: int) -> None:
    """Have the kernel kill this process when its parent has died; it may be dead already."""
    libc.prctl(SET_PARENT_DEATH_SIGNAL, ctypes.c_long(signal.SIGKILL))
    if parent and os.getppid() != parent:
        os._exit(1)


def enter_namespaces(libc: Any, directory: str) -> None:
    """Go on in a child with its own users, mounts, network, IPC and processes.

    All mounts are read-only there but for a small new one, `directory`. This process stays, outside
    of them, only to wait and to end as the child does.

    Raises:
      OSError: where the system forbids that.
    """
    user, group = os.geteuid(), os.getegid()
    everything = NEW_USER | NEW_MOUNTS | NEW_NETWORK | NEW_IPC | NEW_PIDS
    _succeed(libc.unshare(everything), "no new namespaces")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {user} 1"),
        ("gid_map", f"0 {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code < 0:
            os.kill(os.getpid(), -code)
        os._exit(abs(code))
    _die_with_parent(libc, 0)  # the parent's number is not visible from here
    _succeed(libc.mount(b"none", b"/", None, RECURSIVE | PRIVATE, None), "no private mounts")
    _succeed(libc.mount(b"proc", b"/proc", b"proc", 0, None), "no /proc of its own")
    long, read_only = ctypes.c_long, struct.pack("4Q", 1, 0, 0, 0)
    arguments = long(CURRENT), b"/", long(ALL_BELOW), read_only, long(len(read_only))
    _succeed(libc.syscall(long(MOUNT_SETATTR), *arguments), "no read-only mounts")
    options = b"size=%d,nr_inodes=%d" % (FOLDER_BYTES, FOLDER_FILES)
    _succeed(
        libc.mount(b"tmpfs", os.fsencode(directory), b"tmpfs", 0, options),
        "no directory of its own",
    )


def drop_privileges(libc: Any) -> None:
    """Give up all privileges, root's included, and the ways to new ones; hide this memory."""
    version_3 = struct.pack("Ii", 0x20080522, 0)
    with contextlib.suppress(AttributeError):  # not Linux
        libc.capset(version_3, bytes(24))
        zero = ctypes.c_long(0)
        libc.prctl(SET_NO_NEW_PRIVILEGES, ctypes.c_long(1), zero, zero, zero)
        libc.prctl(SET_DUMPABLE, zero, zero, zero, zero)


def restrict_files(libc: Any, directory: str) -> bool:
    """Have Landlock grant reading `readable()`, and files in `directory`; nothing else.

    It also bars other processes' memory, environment and descriptors in /proc. Returns False where
    the kernel has no Landlock. Needs "no new privileges" to be set.
    """
    long = ctypes.c_long
    call = lambda number, *arguments: libc.syscall(long(number), *arguments)
    version = call(CREATE_RULESET, None, long(0), long(1)) if sys.platform == "linux" else 0
    if version < 1:
        return False
    rights = FILE_RIGHTS[max(known for known in FILE_RIGHTS if known <= version)]
    attributes = [rights, NETWORK_RIGHTS, SCOPES][: 1 + (version >= 4) + (version >= 6)]
    ruleset = struct.pack(f"{len(attributes)}Q", *attributes)
    rules = call(CREATE_RULESET, ruleset, long(len(ruleset)), long(0))
    if rules < 0:
        return False
    of_files = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
    grants = dict.fromkeys(readable(), READ_FILE | READ_FOLDER)
    grants["/dev/null"] = READ_FILE | WRITE_FILE | TRUNCATE
    grants[directory] = WRITE_FILE | READ_FILE | READ_FOLDER | TRUNCATE | CHANGE_FOLDER
    for path, granted in grants.items():
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        granted &= rights if os.path.isdir(path) else rights & of_files
        rule = struct.pack("=Qi", granted, place)
        failed = call(ADD_RULE, long(rules), long(1), rule, long(0))
        os.close(place)
        if failed:
            return False
    failed = call(RESTRICT, long(rules), long(0))
    os.close(rules)
    return not failed


def limit(seconds: float, memory_mb: int, processes: bool) -> None:
    """Set the resource limits; with `processes`, also on forking, which nothing stops yet.

    The wall clock comes before the limit of CPU time, which is for threads on all cores.
    """
    import resource  # not on Windows, where this file is read all the same

    cpu = (int(seconds) + 2) * (os.cpu_count() or 1)
    limits = {
        resource.RLIMIT_AS: memory_mb * MIB,
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    if processes:
        limits[resource.RLIMIT_NPROC] = 1
    for kind, value in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit of address space
            resource.setrlimit(kind, (value, value))


def confine(settings: dict[str, Any], layers: Collection[str]) -> list[str]:
    """Apply the layers; return those that hold.

    Args:
      settings: `directory`, the only place to write; `seconds`, `memory_mb`; `parent`, the process
        to die with.
      layers: of "namespaces", "landlock", "seccomp"; the resource limits are always applied.

    Raises:
      OSError: if the namespaces are asked for and cannot be entered.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    directory = settings["directory"]
    if sys.platform == "linux":
        _die_with_parent(libc, settings["parent"])
    held = []
    if "namespaces" in layers:
        enter_namespaces(libc, directory)
        held.append("namespaces")
    os.chdir(directory)
    os.environ["TMPDIR"] = directory
    drop_privileges(libc)
    if "landlock" in layers and restrict_files(libc, directory):
        held.append("landlock")
    if "seccomp" in layers and refuse_syscalls(libc):
        held.append("seccomp")
    limit(settings["seconds"], settings["memory_mb"], processes="seccomp" not in held)
    return held
