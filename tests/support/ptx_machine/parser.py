"""PTX text to `syntax.Module`.

The grammar is read as far as compilers use it: one statement ends at a semicolon, braces at the
start of a statement open a scope of registers, braces within one hold a vector or an initialiser.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator

from .errors import UnknownForm
from .syntax import (
    BITS,
    Address,
    Immediate,
    Instruction,
    Kernel,
    Module,
    Pair,
    Parameter,
    Register,
    Sink,
    Special,
    Symbol,
    Variable,
    Vector,
)

SPECIAL = re.compile(
    r"%(tid|ntid|ctaid|nctaid|laneid|warpid|nwarpid|smid|nsmid|clock|clock64|globaltimer|"
    r"lanemask_(eq|le|lt|ge|gt)|cluster_\w+|clusterid|nclusterid|dynamic_smem_size|"
    r"total_smem_size|is_explicit_cluster)(\.[xyz])?$"
)
_LABEL = re.compile(r"\s*([A-Za-z_$%][\w$]*)\s*:(?!:)")
_INTEGER = re.compile(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")
_FLOAT = re.compile(r"0([fF][0-9a-fA-F]{8}|[dD][0-9a-fA-F]{16})$")
_GUARD = re.compile(r"@(!?)([%\w$]+)\s+")
_VARIABLE = re.compile(
    r"((?:\.(?:visible|extern|weak)\s+)*)\.(shared|local|const|global)\s+(?:\.align\s+(\d+)\s+)?"
    r"\.(\w+)\s+([\w$]+)\s*((?:\[\d*\])*)\s*(?:=\s*(.*))?$",
    re.DOTALL,
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+((?:\.\w+\s+(?:\d+\s+)?)*)([\w$]+)\s*(?:\[(\d+)\])?$"
)


def parse(text: str) -> Module:
    """Read a module. Raises UnknownForm for what is not understood."""
    source = _Source(text)
    target = re.search(r"^\s*\.target\s+(\w+)", source.text, re.MULTILINE)
    variables: dict[str, Variable] = {}
    kernels: dict[str, Kernel] = {}
    for header, body, line in source.top_level():
        if body is None:
            if variable := _variable(header, line):
                variables[variable.name] = variable
            elif not header.startswith((".version", ".target", ".address_size")):
                raise UnknownForm(f"line {line}: unknown directive {header[:80]!r}")
        elif ".entry" in header:
            kernel = _kernel(header, line, variables)
            _Body(kernel).read(source, *body)
            kernels[kernel.name] = kernel
        elif not header.startswith(".section"):
            raise UnknownForm(f"line {line}: only kernels are understood, got {header[:80]!r}")
    return Module(target.group(1) if target else "", kernels)


class _Source:
    """The text without comments and line tables, every character still on its line."""

    def __init__(self, text: str):
        def blank(match):
            return re.sub(r"[^\n]", " ", match.group())

        text = re.sub(r"//[^\n]*|/\*.*?\*/", blank, text, flags=re.DOTALL)
        self.text = re.sub(r"^[ \t]*\.(loc|file)\b[^\n]*", blank, text, flags=re.MULTILINE)
        self.ends = [match.start() for match in re.finditer(r"\n", self.text)]

    def line(self, at: int) -> int:
        return bisect_left(self.ends, at) + 1

    def matching(self, at: int) -> int:
        """Where the brace opened at `at` is closed."""
        depth = 0
        for match in re.compile(r"[{}]").finditer(self.text, at):
            depth += 1 if match.group() == "{" else -1
            if depth == 0:
                return match.start()
        raise UnknownForm(f"line {self.line(at)}: a brace is never closed")

    def top_level(self) -> Iterator[tuple[str, tuple[int, int] | None, int]]:
        """(header, extent of the body or None, line) of each declaration of the module."""
        # The three directives at the head of a module end with their line.
        heads = re.compile(r"\s*\.(version|target|address_size)\b[^\n]*")
        at = 0
        while match := re.compile(r"\S").search(self.text, at):
            start = match.start()
            if head := heads.match(self.text, at):
                yield head.group().strip(), None, self.line(start)
                at = head.end()
                continue
            stop = re.compile(r"[;{=]").search(self.text, start)
            if stop is None:
                raise UnknownForm(f"line {self.line(start)}: a declaration never ends")
            if stop.group() == "{":
                end = self.matching(stop.start())
                body = (stop.start() + 1, end)
                yield self.text[start : stop.start()].strip(), body, self.line(start)
                at = end + 1
                continue
            end = self.text.index(";", start)
            yield self.text[start:end].strip(), None, self.line(start)
            at = end + 1


def _variable(text: str, line: int) -> Variable | None:
    match = _VARIABLE.match(text)
    if not match:
        return None
    linkage, space, align, kind, name, dimensions, values = match.groups()
    size = BITS[kind] // 8
    sizes = re.findall(r"\[(\d*)\]", dimensions)
    data = None
    if values is not None:
        numbers = [_immediate(v.strip(), line) for v in values.strip("{} \n").split(",")]
        mask = (1 << 8 * size) - 1
        data = b"".join((n.value & mask).to_bytes(size, "little") for n in numbers)
    if "" in sizes:
        extent = len(data) if data is not None else None
    else:
        extent = size
        for count in sizes:
            extent *= int(count)
    if data is not None:
        data = data.ljust(extent, b"\0")
    return Variable(name, space, int(align or size), extent, data)


def _kernel(header: str, line: int, variables: dict[str, Variable]) -> Kernel:
    match = re.match(r"(?:\.\w+\s+)*\.entry\s+([\w$]+)\s*(?:\((.*?)\))?(.*)$", header, re.DOTALL)
    if not match:
        raise UnknownForm(f"line {line}: not a kernel: {header[:80]!r}")
    name, listed, directives = match.groups()
    parameters, offset = [], 0
    for text in filter(None, (t.strip() for t in (listed or "").split(","))):
        found = _PARAMETER.match(text)
        if not found:
            raise UnknownForm(f"line {line}: parameter {text!r} of {name} is not understood")
        align, kind, _, own, count = found.groups()
        size = BITS[kind] // 8
        align = int(align or size)
        offset = -(-offset // align) * align
        parameters.append(Parameter(own, kind, int(count or 1), align, offset))
        offset += size * int(count or 1)
    block = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", directives)
    shape = tuple(int(n or 1) for n in block.groups()) if block else None
    return Kernel(name, parameters, shape, dict(variables))


class _Body:
    """Reads the statements of one kernel."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.scopes: list[dict[str, tuple[str, int, int]]] = [{}]
        self.names: list[dict[str, Register]] = [{}]

    def read(self, source: _Source, start: int, end: int) -> None:
        text, at = source.text, start
        while at < end:
            if match := re.compile(r"\s+").match(text, at, end):
                at = match.end()
            elif text[at] == "{":
                self.scopes.append({})
                self.names.append({})
                at += 1
            elif text[at] == "}":
                self.scopes.pop()
                self.names.pop()
                at += 1
            elif match := _LABEL.match(text, at, end):
                self.kernel.labels[match.group(1)] = len(self.kernel.instructions)
                at = match.end()
            else:
                stop = text.find(";", at, end)
                if stop < 0:
                    raise UnknownForm(f"line {source.line(at)}: a statement never ends")
                self.statement(re.sub(r"\s+", " ", text[at:stop]).strip(), source.line(at))
                at = stop + 1

    def statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self.declare(text, line)
        elif variable := _variable(text, line):
            self.kernel.variables[variable.name] = variable
        elif text.startswith("."):
            if not text.startswith(".pragma"):
                raise UnknownForm(f"line {line}: unknown directive {text!r}")
        else:
            self.kernel.instructions.append(self.instruction(text, line))

    def declare(self, text: str, line: int) -> None:
        """.reg .b32 %r<5>; or .reg .b32 a, b;"""
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text).groups()
        if kind not in BITS:
            raise UnknownForm(f"line {line}: registers of type {kind}")
        for name in names.split(","):
            prefix, count = re.match(r"\s*([\w%$]+)\s*(?:<(\d+)>)?\s*$", name).groups()
            first = len(self.kernel.register_types)
            if count is None:
                self.names[-1][prefix] = Register(prefix, kind, first)
            else:
                self.scopes[-1][prefix] = (kind, first, int(count))
            self.kernel.register_types += [kind] * int(count or 1)

    def instruction(self, text: str, line: int) -> Instruction:
        guard, rest = None, text
        if match := _GUARD.match(text):
            register = self.register(match.group(2))
            if register is None or register.type != "pred":
                raise UnknownForm(f"line {line}: the guard of {text!r} is no predicate")
            guard = Register(register.name, "pred", register.slot, bool(match.group(1)))
            rest = text[match.end() :]
        opcode, _, listed = rest.partition(" ")
        operands = tuple(self.operand(t, line) for t in _split(listed))
        return Instruction(opcode, operands, guard, line, text)

    def register(self, name: str) -> Register | None:
        for names, ranges in zip(reversed(self.names), reversed(self.scopes), strict=True):
            if name in names:
                return names[name]
            match = re.match(r"(.*?)(\d+)$", name)
            if match and match.group(1) in ranges:
                kind, first, count = ranges[match.group(1)]
                if int(match.group(2)) < count:
                    return Register(name, kind, first + int(match.group(2)))
        return None

    def operand(self, text: str, line: int):
        if text == "_":
            return Sink()
        if text.startswith("{"):
            return Vector(tuple(self.operand(t, line) for t in _split(text[1:-1])))
        if text.startswith("["):
            return self.address(text[1:-1].strip(), line)
        if "|" in text:
            first, second = text.split("|")
            return Pair(self.operand(first.strip(), line), self.operand(second.strip(), line))
        if text.startswith("!"):
            inner = self.register(text[1:].strip())
            if inner is not None and inner.type == "pred":
                return Register(inner.name, "pred", inner.slot, True)
        if register := self.register(text):
            return register
        if SPECIAL.match(text):
            return Special(text)
        if re.match(r"[A-Za-z_$][\w$]*$", text):
            return Symbol(text)
        return _immediate(text, line)

    def address(self, text: str, line: int) -> Address:
        if "," in text:
            base, coordinates = text.split(",", 1)
            inner = self.address(base.strip(), line)
            vector = self.operand(coordinates.strip(), line)
            return Address(inner.base, inner.offset, vector)
        match = re.match(r"([^+\s]+)\s*(?:\+\s*(\S+))?$", text)
        if not match:
            raise UnknownForm(f"line {line}: address [{text}] is not understood")
        base = self.operand(match.group(1), line)
        if not isinstance(base, Register | Symbol | Immediate):
            raise UnknownForm(f"line {line}: address [{text}] is not understood")
        return Address(base, _immediate(match.group(2), line).value if match.group(2) else 0)


def _immediate(text: str, line: int) -> Immediate:
    if match := _INTEGER.match(text):
        sign, digits = match.groups()
        octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
        value = int(digits, 8 if octal else 0)
        return Immediate(-value if sign else value, "s")
    if match := _FLOAT.match(text):
        digits = match.group(1)
        return Immediate(int(digits[1:], 16), "f32" if digits[0] in "fF" else "f64")
    raise UnknownForm(f"line {line}: operand {text!r} is not understood")


def _split(text: str) -> list[str]:
    """Operands between commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(text):
        if character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts
