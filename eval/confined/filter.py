"""The system calls that the kernel grants a confined process; it refuses all others.

A seccomp filter (Linux on x86-64 and ARM64): files, memory, threads, clocks, and this process's own
state. No new process or program, no socket, no signal, no mode or owner of a file, and nothing done
to another process. By number, without libseccomp. Knows no path: files are limits.py's.
"""

import ctypes
import os
import struct
import sys
from typing import Any

# Each name is followed by its number on x86-64 and on ARM64; "-" where it does not exist.
GRANTED = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, lseek 8 62,
close 3 57, close_range 436 436, dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59,
poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72,
open 2 -, openat 257 56, stat 4 -, lstat 6 -, fstat 5 80, newfstatat 262 79, statx 332 291,
access 21 -, faccessat 269 48, faccessat2 439 439, readlink 89 -, readlinkat 267 78,
getdents64 217 61, getcwd 79 17, chdir 80 49, fchdir 81 50, statfs 137 43, fstatfs 138 44,
mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35,
rename 82 -, renameat 264 38, renameat2 316 276, link 86 -, linkat 265 37,
symlink 88 -, symlinkat 266 36, truncate 76 45, ftruncate 77 46, fallocate 285 47,
fsync 74 82, fdatasync 75 83, sendfile 40 71, copy_file_range 326 285,
fadvise64 221 223, umask 95 166,
mmap 9 222, munmap 11 215, mremap 25 216, mprotect 10 226, madvise 28 233, msync 26 227, brk 12 214,
futex 202 98, set_robust_list 273 99, rseq 334 293, membarrier 324 283, sched_yield 24 124,
sched_getaffinity 204 123, set_tid_address 218 96, arch_prctl 158 -, exit 60 93, exit_group 231 94,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132,
rt_sigpending 127 136, rt_sigtimedwait 128 137, rt_sigsuspend 130 133, pause 34 -, alarm 37 -,
setitimer 38 103, getitimer 36 102, restart_syscall 219 128, wait4 61 260, waitid 247 95,
clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101,
gettimeofday 96 169, time 201 -, times 100 153,
getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176,
getegid 108 177, getgroups 115 158, getresuid 118 148, getresgid 120 150, getpgid 121 155,
getpgrp 111 -, getsid 124 156, getpriority 140 141, getrusage 98 165, getrlimit 97 163,
sysinfo 99 179, uname 63 160, getcpu 309 168, getrandom 318 278
"""
# Granted for some values of the argument at this place: the call, its place, the values.
SOME = (
    # Of a descriptor: copies, flags, locks, the size of a pipe; not F_SETOWN and F_SETSIG, which
    # have the kernel signal another process.
    ("fcntl 72 25", 1, (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)),
    ("ioctl 16 29", 1, (0x5401, 0x5413, 0x5450, 0x5451)),  # is it a terminal; close on exec
    ("prlimit64 302 261", 0, (0,)),  # limits of this process, no other's
)
CLONE = "clone 56 220"  # for a thread only
CLONE3 = 435  # its flags are out of sight; told that it does not exist, libc falls back to clone
CLONE_THREAD = 0x10000
FOREIGN_ABI = 0x40000000  # x32 system calls carry this bit
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Operations and answers of the filter's machine.
LOAD, EQUAL, AT_LEAST, HAS_BIT, ANSWER = 0x20, 0x15, 0x35, 0x45, 0x06
GRANT, NO_PERMISSION, NO_SUCH_CALL, KILL = 0x7FFF0000, 0x50001, 0x50026, 0x80000000
Rule = tuple[int, int, int, int]  # operation, skip if true, skip if false, operand


def _number(entry: str, column: int) -> int | None:
    text = entry.split()[column]
    return None if text == "-" else int(text)


def rules(machine: str) -> list[Rule]:
    """The filter's program for a machine of `AUDIT`."""
    column = 1 + list(AUDIT).index(machine)
    program: list[Rule] = [
        (LOAD, 0, 0, 4),
        (EQUAL, 1, 0, AUDIT[machine]),
        (ANSWER, 0, 0, KILL),
        (LOAD, 0, 0, 0),
        (AT_LEAST, 0, 1, FOREIGN_ABI),
        (ANSWER, 0, 0, NO_PERMISSION),
        (EQUAL, 0, 1, CLONE3),
        (ANSWER, 0, 0, NO_SUCH_CALL),
    ]
    for entry in GRANTED.replace("\n", " ").split(","):
        if (number := _number(entry, column)) is not None:
            program += [(EQUAL, 0, 1, number), (ANSWER, 0, 0, GRANT)]
    for entry, place, values in SOME:
        tests = [rule for v in values for rule in ((EQUAL, 0, 1, v), (ANSWER, 0, 0, GRANT))]
        tests.append((ANSWER, 0, 0, NO_PERMISSION))
        program += [(EQUAL, 0, 1 + len(tests), _number(entry, column) or 0)]
        program += [(LOAD, 0, 0, 16 + 8 * place), *tests]  # the argument's lower half
    return [
        *program,
        (EQUAL, 0, 2, _number(CLONE, column) or 0),
        (LOAD, 0, 0, 16),
        (HAS_BIT, 1, 0, CLONE_THREAD),
        (ANSWER, 0, 0, NO_PERMISSION),
        (ANSWER, 0, 0, GRANT),
    ]


def refuse_syscalls(libc: Any) -> bool:
    """Have the kernel refuse this process all but the calls above, once and for all.

    Returns False where it cannot: another system, an unknown machine, a kernel that refuses. Needs
    "no new privileges" to be set.
    """
    machine = os.uname().machine
    if sys.platform != "linux" or sys.maxsize < 2**32 or machine not in AUDIT:
        return False
    whole = rules(machine)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in whole))
    program = struct.pack("HxxxxxxQ", len(whole), ctypes.addressof(code))
    seccomp, filtering = 22, 2
    return not libc.prctl(seccomp, ctypes.c_long(filtering), program)
