"""Prints a digest of a directory tree: path, mode, links, owner, content or target of everything in it."""

import hashlib
import os
import stat
import sys

sums = hashlib.sha256()
for directory, directories, files in os.walk(sys.argv[1]):
    directories.sort()
    for name in sorted(directories + files):
        path = os.path.join(directory, name)
        about = os.lstat(path)
        links = 0 if stat.S_ISDIR(about.st_mode) else about.st_nlink
        sums.update(repr((path, about.st_mode, links, about.st_uid, about.st_mtime_ns)).encode())
        if stat.S_ISREG(about.st_mode):
            sums.update(open(path, "rb").read())
        elif stat.S_ISLNK(about.st_mode):
            sums.update(os.readlink(path).encode())
print(sums.hexdigest())
