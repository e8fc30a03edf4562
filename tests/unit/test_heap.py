"""Memory of the roles with a model: what is freed stays, in large pages where the kernel gives them."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
LARGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SCRIPT = """
import re, resource
from pathlib import Path
from farflung.engine.cpu.malloc import keep_freed_memory

def seen(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/smaps_rollup").read_text())[1]) >> 10

before = seen("Rss")
keep_freed_memory()
held = seen("Rss") - before
block = bytearray(b"1") * (256 << 20)
large = seen("AnonHugePages")
del block
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block = bytearray(b"1") * (200 << 20)
print(held, large, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""


@pytest.fixture(scope="module")
def figures() -> tuple[int, int, int]:
    """Memory that asking took in MB, MB in large pages with 256 in use, and page faults of 200 MB taken again."""
    said = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    held, large, faults = map(int, said.split())
    return held, large, faults


def test_asking_takes_no_memory_and_what_is_freed_is_used_again(figures) -> None:
    held, _, faults = figures
    assert held < 8
    assert faults < 1000, "200 MB are 51,200 small pages"


@pytest.mark.skipif(not LARGE.exists() or "[never]" in LARGE.read_text(), reason="the kernel has no large pages")
def test_memory_comes_in_large_pages(figures) -> None:
    _, large, _ = figures
    assert large >= 200
