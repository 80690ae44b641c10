"""Processes whose clock is wrong: a library that is loaded before the C library answers for the time.

So Python, SQLite, and gRPC's TLS, which reads the time by itself, are all wrong together.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

YEAR_S = 365.25 * 24 * 3600
_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long shift(void) {
    const char *text = getenv("TEST_CLOCK_SHIFT_S");
    return text ? atol(text) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *out) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, out);
    if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE || clock == CLOCK_TAI))
        out->tv_sec += shift();
    return result;
}

int gettimeofday(struct timeval *restrict out, void *restrict zone) {
    struct timespec now;
    int result = clock_gettime(CLOCK_REALTIME, &now);
    out->tv_sec = now.tv_sec;
    out->tv_usec = now.tv_nsec / 1000;
    return result;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
"""


def library(directory: Path) -> Path:
    """The library, made there; skips the test where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler is here (cc), so no process can be given another clock")
    source, made = directory / "clock.c", directory / "clock.so"
    source.write_text(_SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(made), str(source), "-ldl"], check=True)
    return made


def wrong_by(library: Path, years: float) -> dict[str, str]:
    """The environment of a process whose clock is so many years ahead."""
    return {"LD_PRELOAD": str(library), "TEST_CLOCK_SHIFT_S": str(round(years * YEAR_S))}
