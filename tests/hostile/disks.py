"""A disk that fails at the Nth operation, and memory that ends; then the same call again.

    python -m tests.hostile.disks [--points 20] [--seed N]

A library that is loaded before any other (LD_PRELOAD) lets the Nth write, fsync, rename or open
below a folder fail with ENOSPC or EIO, and every one after it. The command must end with exit code
3 (2 where it was refused before anything began) and one message; the next call, on a sound disk,
must end with the undisturbed files.
"""

from __future__ import annotations

import argparse
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

from tests.hostile.kills import Site
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


class Failing(Site):
    """A site whose next process meets a fault."""

    def __init__(self, lab, folder, command, hub, shim) -> None:
        super().__init__(lab, folder, "data" if command == "train" else command, hub)
        self.shim, self.fault, self.cap = shim, "", 0
        if command == "train":
            self.arguments = ["train", folder / "run.yaml"]

    def start(self) -> subprocess.Popen:
        if self.fault:
            os.environ |= {"FAIL_AT": self.fault, "LD_PRELOAD": str(self.shim)}
        before = resource.getrlimit(resource.RLIMIT_AS)
        if self.cap:
            resource.setrlimit(resource.RLIMIT_AS, (self.cap, before[1]))
        try:
            return super().start()
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
            os.environ.pop("FAIL_AT", None)
            os.environ.pop("LD_PRELOAD", None)

    def fail(self, fault: str = "", cap: int = 0) -> int:
        """Run it once with a fault below its folder, or with so many bytes of addresses."""
        self.fault, self.cap = fault and f"{fault} {self.folder}/", cap
        code = self.start().wait(900)
        self.fault, self.cap = "", 0
        text = self.log.read_text()
        shown = f"{self.arguments[0]} with {fault or cap} ended with {code}:\n{text[-1500:]}"
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
    """Fail at `points` places and run under `caps` limits of memory; returns how often each ended
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
        expected = {}
        for command in commands:
            site = Failing(lab, folder / f"{command}-undisturbed", command, hub, shim)
            site.finish()
            expected[command] = site.outcome()
        faults = [
            (f"{kind} {chance.randint(1, 12)} {chance.choice(list(ERRORS.values()))}", 0)
            for kind in (KINDS[i % len(KINDS)] for i in range(points))
        ] + [("", int(2**30 * chance.uniform(0.6, 6.0))) for _ in range(caps)]
        for number, (fault, cap) in enumerate(faults):
            command = commands[number % len(commands)]
            site = Failing(lab, folder / f"{command}-{number}", command, hub, shim)
            code = site.fail(fault, cap)
            ended[fault.split()[0] if fault else "memory"] += code != 0
            site.finish()
            found = site.outcome()
            names = expected[command].keys() | found.keys()
            differing = {n for n in names if expected[command].get(n) != found.get(n)}
            assert not differing, f"{command} differs after {fault or cap}: {sorted(differing)}"
            say(f"{command}: {fault or f'{cap / 2**30:.1f} GiB'} -> {code}, then equal")
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
