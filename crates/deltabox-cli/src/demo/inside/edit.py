"""Edits the work tree.

usage: edit.py sites FILE SEED   prints, in an order that SEED determines, where a defect could be put into a Python file:
                                line, column, token, defect, and what could be tried to repair it
       edit.py apply FILE LINE COLUMN OLD NEW   replaces one token
       edit.py churn DIR SEED          makes, changes, renames and deletes other files below DIR
"""

import io
import os
import random
import sys
import tokenize

# Each token with what a programmer writes by mistake instead.
MISTAKES = {
    "<": ["<=", ">"],
    "<=": ["<", ">"],
    ">": [">=", "<"],
    ">=": [">", "<"],
    "==": ["!="],
    "!=": ["=="],
    "+": ["-"],
    "-": ["+"],
    "and": ["or"],
    "or": ["and"],
    "True": ["False"],
    "False": ["True"],
    "%": ["//"],
    "//": ["%"],
}


def mistakes(token):
    if token.type == tokenize.NUMBER and token.string.isdigit():
        number = int(token.string)
        return [str(number + 1), str(abs(number - 1))]
    return MISTAKES.get(token.string, [])


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def write(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def sites(path, seed):
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(read(path)).readline) if mistakes(t)]
    dice = random.Random(seed)
    dice.shuffle(tokens)
    used = set()
    for token in tokens:
        line, column = token.start
        if line in used:
            continue
        used.add(line)
        wrong = dice.choice(mistakes(token))
        options = sorted({token.string, *mistakes(token)} - {wrong})
        print(line, column, token.string, wrong, ",".join(options))


def apply(path, line, column, old, new):
    lines = read(path).splitlines(keepends=True)
    text = lines[line - 1]
    if not text.startswith(old, column):
        sys.exit(f"{path}:{line}: {old!r} is not there: {text!r}")
    lines[line - 1] = text[:column] + new + text[column + len(old) :]
    write(path, "".join(lines))


def churn(directory, seed):
    dice = random.Random(seed)
    names = sorted(os.path.join(top, name) for top, _, names in os.walk(directory) for name in names)
    files = [name for name in names if os.path.isfile(name) and not os.path.islink(name)]
    new = os.path.join(directory, f"step-{seed}")
    os.mkdir(new, 0o750)
    note = os.path.join(new, "note")
    write(note, f"step {seed}\n" * dice.randrange(1, 2000))
    os.setxattr(note, "user.deltabox.demo", str(seed).encode())
    os.link(note, os.path.join(new, "hard"))
    os.symlink("../" + os.path.basename(dice.choice(files)), os.path.join(new, "soft"))
    os.mkfifo(os.path.join(new, "fifo"))
    with open(os.path.join(new, "sparse"), "wb") as file:
        file.truncate(1 << 20)
        file.seek(dice.randrange(1 << 19))
        file.write(b"data")
    moved, removed, changed, secret = dice.sample(files, 4)
    os.rename(moved, os.path.join(new, "moved"))
    os.unlink(removed)
    os.chmod(secret, 0o600)
    with open(changed, "r+b") as file:
        file.seek(dice.randrange(os.path.getsize(changed) + 1))
        file.write(dice.randbytes(100))


def main():
    command, path, *rest = sys.argv[1:]
    if command == "sites":
        sites(path, int(rest[0]))
    elif command == "apply":
        apply(path, int(rest[0]), int(rest[1]), rest[2], rest[3])
    elif command == "churn":
        churn(path, int(rest[0]))
    else:
        sys.exit(__doc__)


main()
