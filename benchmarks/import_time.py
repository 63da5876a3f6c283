"""Time until `import quiltnet` and `quiltnet --help` are done, in fresh processes, beside Python's own start.

.venv/bin/python benchmarks/import_time.py [rounds]
"""

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import quiltnet": [sys.executable, "-c", "import quiltnet"],
    "quiltnet --help": [sys.executable, "-m", "quiltnet.cli.app", "--help"],
    "import open_clip (peer)": [sys.executable, "-c", "import open_clip"],
}


def main(rounds: int = 7) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds + 1):
        for name, command in COMMANDS.items():  # in alternation: the machine's mood falls on all alike
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        warm = values[1:]  # the first round fills the disk cache
        print(f"{name:26} min {min(warm):.3f}  median {statistics.median(warm):.3f}  max {max(warm):.3f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
