"""A disk that fails at the Nth operation, and memory that ends; then the same call again.

    python -m tests.hostile.disks [--points 20] [--seed N]

A library that is loaded before any other (LD_PRELOAD) lets the Nth write, fsync, rename or open
below a folder fail with ENOSPC or EIO, and every one after it. The command must end with exit code
3 (2 where it was refused before anything began) and one message; the next call, on a sound disk,
must end with the undisturbed files.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from tests.hostile.kills import Site, check_equal
from tests.hostile.lab import Lab
from tests.hub_stand_in import HubStandIn

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int countdown = -1, code = 0;
static char what[16], below[4096];

__attribute__((constructor)) static void start(void) {
    const char *text = getenv("FAIL_AT");  /* "write 12 28 /folder" */
    if (text) sscanf(text, "%15s %d %d %4095s", what, &countdown, &code, below);
}
static int fails(const char *name, const char *path) {
    if (countdown < 0 || strcmp(what, name) || !path || strncmp(path, below, strlen(below))) return 0;
    if (countdown > 0 && --countdown > 0) return 0;
    errno = code;
    return 1;
}
static int fails_fd(const char *name, int fd) {
    char link[64], path[4096];
    if (countdown < 0 || strcmp(what, name)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size <= 0) return 0;
    path[size] = 0;
    return fails(name, path);
}
#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
ssize_t write(int fd, const void *data, size_t size) { REAL(write); return fails_fd("write", fd) ? -1 : real(fd, data, size); }
int fsync(int fd) { REAL(fsync); return fails_fd("fsync", fd) ? -1 : real(fd); }
int rename(const char *a, const char *b) { REAL(rename); return fails("rename", b) ? -1 : real(a, b); }
static int opened(const char *path, int flags) { return (flags & (O_WRONLY | O_RDWR | O_CREAT)) && fails("open", path); }
int open(const char *path, int flags, ...) {
    REAL(open); va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more);
    return opened(path, flags) ? -1 : real(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    REAL(open64); va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more);
    return opened(path, flags) ? -1 : real(path, flags, mode);
}
"""
KINDS = ("write", "fsync", "rename", "open")
ERRORS = {"ENOSPC": 28, "EIO": 5}
COMMANDS = ("train", "export", "verify")
"""train evaluates after each of its steps, so its evaluations are met as well."""


class Failing(Site):
    """A site whose next process meets a fault."""

    def __init__(self, lab, folder, command, hub, shim) -> None:
        super().__init__(lab, folder, command, hub)
        self.shim, self.fault = shim, ""

    def start(self) -> subprocess.Popen:
        if self.fault:
            os.environ |= {"FAIL_AT": self.fault, "LD_PRELOAD": str(self.shim)}
        try:
            return super().start()
        finally:
            os.environ.pop("FAIL_AT", None)
            os.environ.pop("LD_PRELOAD", None)

    def fail(self, fault: str) -> int:
        """Run it once with a fault below its folder; returns the exit code."""
        self.fault = f"{fault} {self.folder}/"
        code = self.start().wait(900)
        self.fault = ""
        return self.checked(code, fault)

    def starve(self, after: float, more: int) -> int:
        """Run it once; `after` so many seconds its processes get `more` bytes of addresses and no
        others. Returns the exit code.
        """
        process = self.start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(after)
        for number in self.left():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                cap = psutil.Process(number).memory_info().vms + more
                resource.prlimit(number, resource.RLIMIT_AS, (cap, resource.RLIM_INFINITY))
        return self.checked(process.wait(900), f"{more / 2**20:.0f} MiB after {after:.1f} s")

    def checked(self, code: int, fault: str) -> int:
        """Return the exit code; raises AssertionError where it did not end as promised."""
        text = self.log.read_text()
        shown = f"{self.arguments[0]} with {fault} ended with {code}:\n{text[-1500:]}"
        assert code in {0, 1, 2, 3}, shown
        assert "Traceback" not in text, shown
        assert "bug of fastft" not in text, shown
        assert (
            code == 0
            or len(re.findall(r"^error: ", text, re.M)) == 1
            or self.arguments[0] == "verify"
        ), shown
        return code


def survive(points: int, seed: int, caps: int = 0, commands=COMMANDS, say=print) -> dict[str, int]:
    """Fail at `points` places and take the memory away `caps` times; returns how often each ended
    other than well.
    """
    chance, ended = random.Random(seed), dict.fromkeys((*KINDS, "memory"), 0)
    with tempfile.TemporaryDirectory() as name, HubStandIn() as hub:
        folder = Path(name)
        (folder / "shim.c").write_text(SHIM)
        shim = folder / "shim.so"
        compile_ = ["cc", "-shared", "-fPIC", "-O1", "-w", "-o", shim, folder / "shim.c", "-ldl"]
        subprocess.run(compile_, check=True)
        (folder / "lab").mkdir()
        lab = Lab(folder / "lab")
        expected, seconds = {}, {}
        for command in commands:
            site = Failing(lab, folder / f"{command}-undisturbed", command, hub, shim)
            seconds[command] = site.finish()
            expected[command] = site.outcome()
        for number in range(points + caps):
            # Each kind of fault meets each command.
            command = commands[(number + number // len(KINDS)) % len(commands)]
            site = Failing(lab, folder / f"{command}-{number}", command, hub, shim)
            if number < points:
                kind, error = KINDS[number % len(KINDS)], chance.choice(list(ERRORS))
                what = f"{kind} {chance.randint(1, 12)} {error}"
                code = site.fail(what.replace(error, str(ERRORS[error])))
            else:
                kind, more = "memory", chance.randint(0, 2**27)
                after = seconds[command] * chance.uniform(0.1, 0.9)
                what = f"{more / 2**20:.0f} MiB more after {after:.1f} s"
                code = site.starve(after, more)
            ended[kind] += code != 0
            site.finish()
            check_equal(expected[command], site.outcome(), f"{command} after {what}")
            say(f"{command}: {what} -> {code}, then equal")
            shutil.rmtree(site.folder)
    return ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--caps", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", choices=COMMANDS, action="append")
    a = parser.parse_args()
    print(json.dumps(survive(a.points, a.seed, a.caps, a.command or COMMANDS)))


if __name__ == "__main__":
    sys.exit(main())
