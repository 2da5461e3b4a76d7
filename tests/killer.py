"""Runs Python code in processes that SIGKILL ends at random at the calls by which anything reaches a disk.

python killer.py CHANCE SEED CODE
"""

import os
import random
import subprocess
import sys


def deadly(function, chance, generator):
    def wrapped(*arguments, **keywords):
        if generator.random() < chance:
            os.kill(os.getpid(), 9)
        return function(*arguments, **keywords)

    return wrapped


def survive(code, n_kills, chance, seed=0):
    """Run ``code(attempt)`` in one process after another until `n_kills` of them were killed and one has finished.

    Parameters
    ----------
    code : callable
        Given the number of the attempt, from 1: what to run.
    n_kills : int
    chance : float
        Of being killed, at each call that writes; must be so high that no process finishes too early.
    """
    kills = 0
    while True:
        chance_now = chance if kills < n_kills else 0.0
        command = [sys.executable, __file__, str(chance_now), str(1000 * seed + kills), code(kills + 1)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert result.returncode in (0, -9), result.stderr
        assert "damaged" not in result.stderr
        if result.returncode == 0:
            assert kills == n_kills, f"finished after {kills} kills"
            return
        kills += 1


if __name__ == "__main__":
    generator = random.Random(int(sys.argv[2]))
    for name in ("pwrite", "fsync", "replace", "link", "unlink"):
        setattr(os, name, deadly(getattr(os, name), float(sys.argv[1]), generator))
    exec(sys.argv[3], {})
