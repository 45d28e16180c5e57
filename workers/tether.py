"""Become another program that dies with its parent, within limits.

    python -I -S tether.py PARENT_PID LIMITS COMMAND...

A supervisor that is killed must not leave a child behind that keeps the GPU. The kernel can see to that, but
only a process itself may ask for it, and asking between fork and exec is not safe in a process with threads.
Hence this stop-over: ask, check that the parent did not die meanwhile, then exec. It imports nothing that
takes time.

LIMITS is empty, or NAME=NUMBER pairs with commas between them, by the names of `resource.RLIMIT_*`; a program with
limits also dumps no core, gains no rights by what it executes, and makes files that are its user's alone.
NETWORK=0 among them leaves the program no network, not even the loopback.
"""

import ctypes
import os
import resource
import signal
import sys

PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000


def main() -> None:
    parent, limits, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # When memory runs out the kernel shall take the child, not the supervisor that would report it.
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
        if limits:
            libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if limits:
        os.umask(0o077)
        restrict("CORE", 0)
        for name, _, number in (pair.partition("=") for pair in limits.split(",")):
            if name == "NETWORK":
                leave_network()
            else:
                restrict(name, int(number))
    if os.getppid() != parent:
        sys.exit("the parent is gone")
    os.execvp(command[0], command)


def leave_network() -> None:
    """Go where there is no network: to a namespace of our own, which an ordinary user may make within one of users."""
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        sys.exit(f"no namespace without a network: {os.strerror(ctypes.get_errno())}")
    for file, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{file}", "w") as opened:
            opened.write(text)


def restrict(name: str, number: int) -> None:
    """Lower a limit, for good; one that is lower already stays."""
    which: int = getattr(resource, f"RLIMIT_{name}")
    _soft, hard = resource.getrlimit(which)
    if hard != resource.RLIM_INFINITY:
        number = min(number, hard)
    resource.setrlimit(which, (number, number))


main()
