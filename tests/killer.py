"""Runs Python code in a process that SIGKILL ends at random at the calls by which anything reaches a disk.

python killer.py CHANCE SEED CODE
"""

import os
import random
import sys


def deadly(function, chance, generator):
    def wrapped(*arguments, **keywords):
        if generator.random() < chance:
            os.kill(os.getpid(), 9)
        return function(*arguments, **keywords)

    return wrapped


if __name__ == "__main__":
    generator = random.Random(int(sys.argv[2]))
    for name in ("pwrite", "fsync", "replace", "link", "unlink"):
        setattr(os, name, deadly(getattr(os, name), float(sys.argv[1]), generator))
    exec(sys.argv[3], {})
