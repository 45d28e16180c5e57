"""Become another program that dies with its parent.

    python -I -S tether.py PARENT_PID COMMAND...

A supervisor that is killed must not leave a child behind that keeps the GPU. The kernel can see to that, but
only a process itself may ask for it, and asking between fork and exec is not safe in a process with threads.
Hence this stop-over: ask, check that the parent did not die meanwhile, then exec. It imports nothing that
takes time.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # When memory runs out the kernel shall take the child, not the supervisor that would report it.
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    if os.getppid() != parent:
        sys.exit("the parent is gone")
    os.execvp(command[0], command)


main()
