"""What the text of compiled PTX says of a kernel: its matrix instructions, and the order of its
global loads and stores."""

import re
from collections import defaultdict

_LABEL = re.compile(r"^(\$L__BB\w+):")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$L__BB\w+);")
_PARAMETER = re.compile(r"\[\w+_param_(\d+)\]")
_PREDICATE = re.compile(r"^@!?%p\d+\s+")
_REGISTER = re.compile(r"%\w+")


def blocks_of(ptx: str) -> tuple[list[list[str]], list[list[int]]]:
    """The basic blocks of the one kernel in `ptx`, and the blocks that may follow each of them."""
    body = ptx[ptx.index("{", ptx.index(".entry")) : ptx.rindex("}")]
    blocks, labels = [[]], {}
    for line in (line.strip() for line in body.splitlines()):
        if label := _LABEL.match(line):
            blocks.append([])
            labels[label.group(1)] = len(blocks) - 1
        elif line and not line.startswith(("//", ".", "$", "{", "}")):
            blocks[-1].append(line)
            if _BRANCH.search(line):
                blocks.append([])
    following = []
    for index, block in enumerate(blocks):
        last = block[-1] if block else ""
        branch = _BRANCH.search(last)
        goes_on = not (last.startswith(("ret", "bra")) or index + 1 == len(blocks))
        following.append([labels[branch.group(1)]] if branch else [])
        if goes_on:
            following[-1].append(index + 1)
    return blocks, following


def loops_of(ptx: str) -> str:
    """The text of the blocks that a thread may come to again."""
    blocks, following = blocks_of(ptx)

    def comes_back(start):
        waiting, seen = list(following[start]), set()
        while waiting:
            index = waiting.pop()
            if index not in seen:
                seen.add(index)
                waiting += following[index]
        return start in seen

    return "\n".join(line for i, block in enumerate(blocks) if comes_back(i) for line in block)


def registers_from(blocks: list[list[str]], parameter: int) -> set[str]:
    """The registers that hold an address computed from a kernel's parameter."""
    sources = defaultdict(set)
    found = set()
    for line in (_PREDICATE.sub("", line) for block in blocks for line in block):
        registers, given = _REGISTER.findall(line), _PARAMETER.search(line)
        if given and int(given.group(1)) == parameter:
            found.add(registers[0])
        elif registers and not line.startswith(("ld", "st", "setp")):  # these hold no address
            sources[registers[0]].update(registers[1:])
    size = -1
    while len(found) != size:
        size = len(found)
        found |= {register for register, used in sources.items() if used & found}
    return found


def stores_without_barrier(ptx: str, read: int, written: int) -> list[tuple[str, str]]:
    """Global loads through parameter `read` from which a store through `written` can be reached
    with no barrier in between, where both may be the same memory.

    A load and a store of one basic block count as safe: there a thread replaces what it has read
    itself.
    """
    blocks, following = blocks_of(ptx)
    inputs, outputs = registers_from(blocks, read), registers_from(blocks, written)

    def touches(line, kind, registers):
        return f"{kind}.global" in line and bool(
            set(_REGISTER.findall(line[line.index("[") : line.index("]")])) & registers
        )

    found = []
    for own, block in enumerate(blocks):
        for at, line in enumerate(block):
            if not touches(line, "ld", inputs):
                continue
            waiting, seen = [(own, at + 1)], set()
            while waiting:
                index, start = waiting.pop()
                for later in blocks[index][start:]:
                    if "bar.sync" in later or "barrier.sync" in later:
                        break
                    if index != own and touches(later, "st", outputs):
                        found.append((line, later))
                else:
                    for target in following[index]:
                        if target not in seen:
                            seen.add(target)
                            waiting.append((target, 0))
    return found
