"""Set-up of the tests, and the command line of test_monitor.py.

    python3 test_monitor.py --setup             install what the tests need, then run them all
    python3 test_monitor.py [pytest options]    run the tests
    python3 test_monitor.py --bench [NAME] [--json FILE]    run the benchmarks

This file runs on a bare Python, before any package is there.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
from typing import NoReturn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENVIRONMENT = os.path.join(ROOT, ".venv")
ENVIRONMENT_PYTHON = os.path.join(ENVIRONMENT, "bin", "python")
INSTALLED = os.path.join(ENVIRONMENT, "packages.txt")  # the Python and the packages; written last
VERSIONS = {
    "axe-playwright-python": "0.1.8",
    "hypothesis": "6.170.15",
    "kosoku": "0.1.0",
    "mypy": "2.4.1",
    "playwright": "1.65.2",
    "prometheus_client": "0.26.0",
    "pytest": "9.2.0",
    "pytest-xdist": "3.8.0",
    "redis": "8.1.0",
    "ruff": "0.17.6",
    "websockets": "17.4",
}
if sys.version_info < (3, 10):  # their last versions for Python 3.9
    VERSIONS.update(hypothesis="6.141.1", mypy="1.19.1", playwright="1.60.0", pytest="8.4.2", redis="7.0.1")
    VERSIONS.update(websockets="15.0.1")
    del VERSIONS["kosoku"]
PACKAGES = [f"{name}=={version}" for name, version in VERSIONS.items()]
HEADLESS = "chromium-headless-shell"  # half the processor time of a whole Chromium
CHROMIUM_NAMES = (HEADLESS, "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Program → its possible names, and its package for each package manager.
SYSTEM_PROGRAMS = {
    "redis-server": (("redis-server",), {"apt-get": "redis-server", "dnf": "redis", "brew": "redis"}),
    "tmux": (("tmux",), dict.fromkeys(("apt-get", "dnf", "brew"), "tmux")),
    "openssl": (("openssl",), {"apt-get": "openssl", "dnf": "openssl", "brew": "openssl"}),
    "chromium": (CHROMIUM_NAMES, {"apt-get": HEADLESS, "dnf": "chromium", "brew": "chromium"}),
}
INSTALL_OPTIONS = {"apt-get": ["install", "-y", "-qq"], "dnf": ["install", "-y", "-q"], "brew": ["install"]}


def find_program(names: tuple[str, ...]) -> str | None:
    """Return the path of the first of these programs that is installed."""
    return next((path for path in map(shutil.which, names) if path), None)


def find_browser() -> str | None:
    """Return the path of Chromium."""
    return find_program(CHROMIUM_NAMES)


def report(message: str) -> None:
    """Print what the set-up does."""
    print(f"setup: {message}", flush=True)


# ---- Environment and programs ----


def set_up() -> None:
    """Make the test environment and install missing system programs, both at the same time."""
    missing = [name for name, (names, _) in SYSTEM_PROGRAMS.items() if not find_program(names)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        installing = pool.submit(install_programs, missing)
        set_up_environment()
        installing.result()


def set_up_environment() -> None:
    """Make .venv with the pinned packages, unless it is up to date."""
    wanted = "\n".join((sys.version, *PACKAGES))
    installed = pathlib.Path(INSTALLED)
    if installed.exists() and installed.read_text("utf-8") == wanted:
        return
    report(f"making {ENVIRONMENT} with {', '.join(PACKAGES)}")
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    if subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=False).returncode:
        sys.exit("setup: no virtual environment could be made; on Debian: apt-get install python3-venv")
    # Python compiles what the tests import; to compile every file of every package here takes longer.
    pip = [ENVIRONMENT_PYTHON, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    if subprocess.run([*pip, "install", "--no-compile", *PACKAGES], check=False).returncode:
        sys.exit("setup: the test packages could not be installed; is there a network?")
    # Compile the tests once; otherwise each of pytest's workers does it, all at the same time.
    collect = [ENVIRONMENT_PYTHON, "-m", "pytest", "--collect-only", "-qq"]
    subprocess.run(collect, cwd=ROOT, env=environment(), check=False, stdout=subprocess.DEVNULL)
    installed.write_text(wanted, "utf-8")


def install_programs(missing: list[str]) -> None:
    """Install missing programs with the system's package manager; tests without their program are skipped."""
    if not missing:
        return
    manager = next((name for name in INSTALL_OPTIONS if shutil.which(name)), None)
    if manager is None:
        report(f"no known package manager; install {', '.join(missing)} yourself")
        return
    packages = [SYSTEM_PROGRAMS[name][1][manager] for name in missing]
    install = [manager, *INSTALL_OPTIONS[manager], *packages]
    sudo = [] if os.geteuid() == 0 or manager == "brew" else ["sudo", "-n"]
    unattended = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    report(f"installing {', '.join(packages)} with {manager}")
    if manager == "apt-get":
        subprocess.run([*sudo, manager, "-qq", "update"], check=False, env=unattended)
    if subprocess.run([*sudo, *install], check=False, env=unattended, stdout=subprocess.DEVNULL).returncode:
        report(f"{manager} failed; try: sudo {' '.join(install)}")


# ---- Command line of test_monitor.py ----


def main() -> NoReturn:
    """Set up if asked to; then this process becomes pytest or the benchmarks in the test environment."""
    parser = argparse.ArgumentParser(
        prog="test_monitor.py", description="Tests and benchmarks of the Contextuate Monitor.",
        epilog="Other options go to pytest: -k NAME for some tests, -m 'not slow' without the soak tests.",
    )  # fmt: skip
    parser.add_argument("--setup", action="store_true", help="install what the tests need, then run them all")
    parser.add_argument(
        "--bench", nargs="?", const="all", metavar="NAME",
        help="run all benchmarks at small sizes, or one at full size (an unknown name lists them)",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="with --bench: also write the figures to a file")
    options, pytest_options = parser.parse_known_args()
    if options.setup:
        set_up()
    if options.bench is not None:
        json_file = [] if options.json is None else [os.path.abspath(options.json)]
        become(os.path.join(".ci", "bench.py"), options.bench, *json_file)
    # Most tests wait for other processes, so there are more workers than processors.
    workers = str(2 * (os.cpu_count() or 1))
    become("-m", "pytest", "-n", workers, "--dist", "worksteal", *pytest_options)


def become(*arguments: str) -> NoReturn:
    """Replace this process by a Python that has the test packages."""
    has_packages = all(map(importlib.util.find_spec, ("pytest", "hypothesis", "websockets", "playwright")))
    python = sys.executable if has_packages else ENVIRONMENT_PYTHON
    if not has_packages and not os.path.exists(INSTALLED):
        sys.exit("the tests' packages are missing; run: python3 test_monitor.py --setup")
    os.chdir(ROOT)
    os.execve(python, [python, *arguments], environment())


def environment() -> dict[str, str]:
    """Return the environment for tests and benchmarks: as for users, bytecode is written and used."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
