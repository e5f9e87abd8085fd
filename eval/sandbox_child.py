"""The inside of `eval.sandbox`: locks its own process down, then runs the program it is given.

Started by path in an interpreter without site packages, so it knows nothing of this project. Reads
its settings as JSON from standard input; writes its verdict, one word per line, to its own file.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import resource
import struct
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any, NoReturn

MIB = 1 << 20
FILE_BYTES = 16 * MIB  # one file, standard error among them
FOLDER_BYTES = 64 * MIB  # the working directory, where it is a mount of its own

REFUSED = {
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.killpg",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "pty.spawn",
    "signal.pthread_kill",
    "subprocess.Popen",
}
REFUSED_FAMILIES = ("ctypes.", "socket.", "syslog.")
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

# machine: (its audit number, clone, refused calls). By number, without libseccomp:
# execve, execveat, socket, socketpair, ptrace, kill, tkill, tgkill, rt_sigqueueinfo,
# rt_tgsigqueueinfo, pidfd_send_signal, unshare, setns, mount, bpf, io_uring_setup; fork and vfork
# where they exist.
SYSCALLS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "x86_64": (
        0xC000003E,
        56,
        (59, 322, 41, 53, 101, 62, 200, 234, 129, 297, 424, 272, 308, 165, 321, 425, 57, 58),
    ),
    "aarch64": (
        0xC00000B7,
        220,
        (221, 281, 198, 199, 117, 129, 130, 131, 138, 240, 424, 97, 268, 40, 280, 425),
    ),
}
CLONE3, MOUNT_SETATTR = 435, 442  # the same on every machine
CLONE_THREAD = 0x10000
FOREIGN_ABI = 0x40000000  # x32 system calls carry this bit


def make_read_only(libc: Any, directory: str) -> None:
    """Make all mounts of this process's own namespace read-only but for a new one, `directory`."""
    current, recursive, read_only = -100, 0x8000, struct.pack("4Q", 1, 0, 0, 0)
    long = ctypes.c_long
    if libc.syscall(
        long(MOUNT_SETATTR), long(current), b"/", long(recursive), read_only, long(len(read_only))
    ) or libc.mount(b"tmpfs", os.fsencode(directory), b"tmpfs", 0, b"size=%d" % FOLDER_BYTES):
        raise OSError(ctypes.get_errno(), "cannot make the mounts read-only")


def drop_capabilities(libc: Any) -> None:
    """Give up all privileges, root's included, so that no mount can be undone."""
    version_3 = struct.pack("Ii", 0x20080522, 0)
    with contextlib.suppress(AttributeError):  # not Linux
        libc.capset(version_3, bytes(24))


def refuse_syscalls(libc: Any) -> bool:
    """Have the kernel refuse processes, programs, sockets and signals; threads stay possible.

    Returns False where it cannot: another system, an unknown machine, a kernel that refuses.
    """
    machine = os.uname().machine
    if sys.platform != "linux" or sys.maxsize < 2**32 or machine not in SYSCALLS:
        return False
    audit, clone, refused = SYSCALLS[machine]
    load, equal, at_least, has_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, no_permission, not_there, kill = 0x7FFF0000, 0x50001, 0x50026, 0x80000000
    rules = [  # (operation, skip if true, skip if false, operand)
        (load, 0, 0, 4),
        (equal, 1, 0, audit),
        (give, 0, 0, kill),
        (load, 0, 0, 0),
        (at_least, 0, 1, FOREIGN_ABI),
        (give, 0, 0, no_permission),
        (equal, 0, 1, CLONE3),  # its flags are out of sight; without it libc falls back to clone
        (give, 0, 0, not_there),
    ]
    for number in refused:
        rules += [(equal, 0, 1, number), (give, 0, 0, no_permission)]
    rules += [
        (equal, 0, 3, clone),
        (load, 0, 0, 16),
        (has_bit, 1, 0, CLONE_THREAD),
        (give, 0, 0, no_permission),
        (give, 0, 0, allow),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(code))
    no_new_privileges, seccomp, filtering = 38, 22, 2
    zero = ctypes.c_long(0)
    return not (
        libc.prctl(no_new_privileges, ctypes.c_long(1), zero, zero, zero)
        or libc.prctl(seccomp, ctypes.c_long(filtering), program)
    )


def limit(seconds: float, memory_mb: int, processes: bool) -> None:
    """Set the resource limits; with `processes`, also on forking, which nothing stops yet."""
    cpu = int(seconds) + 2
    wanted = {
        resource.RLIMIT_AS: memory_mb * MIB,
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    if processes:
        wanted[resource.RLIMIT_NPROC] = 1
    for kind, value in wanted.items():
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit of address space
            resource.setrlimit(kind, (value, value))


def watch(directory: str, report: Callable[[str], object]) -> None:
    """End this process, with a report, at the first audit event that a program may not cause."""
    join, real, separator, leave = os.path.join, os.path.realpath, os.sep, os._exit

    def refuse(event: str, *args: object) -> NoReturn:
        report(f"blocked {event} {args[0] if args else ''}"[:200])
        leave(1)

    def is_inside(path: Any, folder: int | None) -> bool:
        if isinstance(path, int):  # it was opened before, or it will fail
            return True
        base = ""
        if folder is not None and folder >= 0:
            try:
                base = os.readlink(f"/proc/self/fd/{folder}")
            except OSError:
                return False
        whole = real(join(base, os.fsdecode(path)))
        return whole == directory or whole.startswith(directory + separator)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in REFUSED or event.startswith(REFUSED_FAMILIES):
            refuse(event, *args)
        if event == "open":
            path, _, flags = args
            if flags & WRITING and path != "/dev/null" and not is_inside(path, None):
                refuse(event, path)
        elif event == "sqlite3.connect" and args[0] == ":memory:":
            return
        else:
            for where, folder in CHANGES.get(event, ()):
                if not is_inside(args[where], None if folder is None else args[folder]):
                    refuse(event, args[where])

    with contextlib.suppress(ImportError):  # multiprocessing forks here, past all audit events
        import _posixsubprocess

        _posixsubprocess.fork_exec = lambda *args: refuse("fork_exec")
    for name in ("ctypes", "_ctypes"):  # to be loaded anew, under the hook's eyes
        sys.modules.pop(name, None)
    sys.addaudithook(hook)


def run(source: str) -> str:
    """Run the program as a module that is not the main one; return the verdict."""
    module = types.ModuleType("program")
    sys.modules["program"] = module  # dataclasses and pickle look their module up
    try:
        exec(compile(source, "<program>", "exec"), module.__dict__)
    except MemoryError:
        return "memory"
    except SystemExit:
        print("the program exited before its end", file=sys.stderr)
        return "failed"
    except BaseException as error:
        trace = error.__traceback__
        traceback.print_exception(error.with_traceback(trace and trace.tb_next))
        return "failed"
    return "passed"


def main() -> None:
    """Lock down, run, report, and leave at once, whatever threads the program left behind."""
    settings = json.load(sys.stdin)
    directory, result = os.path.realpath(settings["directory"]), settings["result"]
    report = lambda text: os.write(result, text.encode("utf-8", "replace") + b"\n")
    # In case the process outside, which stops it, has died.
    faulthandler.dump_traceback_later(settings["seconds"] + 5, exit=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if settings["namespaces"]:
        make_read_only(libc, directory)
    os.chdir(directory)
    os.environ["TMPDIR"] = directory
    drop_capabilities(libc)
    filtered = refuse_syscalls(libc)
    limit(settings["seconds"], settings["memory_mb"], processes=not filtered)
    report("started")
    if settings["audit"]:
        watch(directory, report)
    report(run(settings["source"]))
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
