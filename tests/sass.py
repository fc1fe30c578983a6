"""NVIDIA's machine code (SASS) as the disassembler prints it: instructions, their order, loops, memory accesses."""

import heapq
import importlib.util
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from torch.utils.cpp_extension import CUDA_HOME


def find(tool):
    """A tool of the CUDA toolkit: on PATH, in the toolkit, in triton's wheel; or None."""
    folders = [Path(CUDA_HOME) / "bin"] if CUDA_HOME else []
    nvcc = shutil.which("nvcc")
    folders += [Path(nvcc).resolve().parent] if nvcc else []
    triton = importlib.util.find_spec("triton")
    if triton and triton.submodule_search_locations:
        folders += [Path(folder) / "backends" / "nvidia" / "bin" for folder in triton.submodule_search_locations]
    candidates = (shutil.which(tool), *(shutil.which(folder / tool) for folder in folders))
    return next((candidate for candidate in candidates if candidate), None)


def output_of(*command):
    result = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


SECTION = re.compile(r"\s*\.section\s+(\.text\.)?([^\s,]+)")
LABEL = re.compile(r"([.$\w]+):\s*$")
BRANCH = re.compile(r"(BRA|JMP|CALL|WARPSYNC\.COLLECTIVE)\b")  # to what its last operand names
INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)(.*)")


class Instruction(NamedTuple):
    address: int
    predicate: str | None
    operation: str
    operands: str
    targets: tuple  # indices of instructions that the operands name

    def is_one_of(self, *names):
        return self.operation.split(".")[0] in names

    @property
    def is_call(self):
        """Functions have names; a CALL of a mere label is a jump."""
        return self.is_one_of("CALL") and "`(.L_" not in self.operands


def instructions_of(text, name_of=str):
    """{name_of(kernel): [Instruction]} of nvdisasm's output."""
    found, instructions, labels = {}, None, {}
    for line in text.splitlines():
        if section := SECTION.match(line):
            instructions, labels = [], {}
            if section[1]:
                found[name_of(section[2])] = instructions, labels
        elif instructions is None:
            continue
        elif label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif match := INSTRUCTION.match(line):
            instructions.append((int(match[1], 16), match[2], match[3], match[4]))

    def targets(operands, labels):
        names = re.findall(r"`\(([^)]+)\)", operands)
        names += [
            name.strip() for group in re.findall(r'BRANCH_TARGETS ([^"]+)', operands) for name in group.split(",")
        ]
        return tuple(labels[name] for name in names if name in labels)

    return {
        kernel: [Instruction(*fields, targets(fields[-1], labels)) for fields in instructions]
        for kernel, (instructions, labels) in found.items()
        if instructions
    }


PTX = re.compile(r"\s+(?:@(!?%p\d+)\s+)?([a-z][\w.]*)\s*(.*);")
PTX_FLOW = {"bra": "BRA", "ret": "RET", "exit": "EXIT"}


def instructions_of_ptx(text, name_of=str):
    """{name_of(kernel): [Instruction]} of nvcc's PTX, where divisions are still instructions."""
    found = {}
    for chunk in text.split(".entry ")[1:]:
        name, labels, lines = chunk[: chunk.index("(")], {}, []
        for line in chunk.split("\n.func ")[0].splitlines():
            if label := re.match(r"(\$L\w+):", line):
                labels[label[1]] = len(lines)
            elif match := PTX.match(line):
                lines.append(match.groups())
        found[name_of(name)] = [
            Instruction(
                i,
                predicate,
                PTX_FLOW.get(operation.split(".")[0], operation),
                operands,
                tuple(labels[label] for label in re.findall(r"\$L\w+", operands) if operation.startswith("bra")),
            )
            for i, (predicate, operation, operands) in enumerate(lines)
        ]
    return found


def _machine_code(cubin):
    """The section of a cubin that is executable: of a single kernel."""
    (at,), (count,) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<H", cubin, 60)
    headers = [struct.unpack_from("<IIQQQQ", cubin, at + 64 * i) for i in range(count)]  # name, type, flags, ...
    ((begin, size),) = [header[4:] for header in headers if header[2] & 4]
    return cubin[begin : begin + size]


def instructions_of_cubins(nvdisasm, processor, cubins):
    """[Instruction] of each, by one run of nvdisasm, which takes 0.3 s to start. ``processor``: of all, as "SM90a"."""
    codes = [_machine_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        text = output_of(nvdisasm, "--binary", processor, file.name)
    lines = [match.groups() for line in text.splitlines() if (match := INSTRUCTION.match(line))]
    assert len(lines) * 16 == sum(map(len, codes))
    found, begin = [], 0
    for code in codes:
        end = begin + len(code) // 16
        instructions = []
        for address, *fields in lines[begin:end]:
            # There are no labels: a branch names an address.
            target = re.search(r"\b0x([0-9a-f]+)\s*;", fields[-1]) if BRANCH.match(fields[1]) else None
            targets = (int(target[1], 16) // 16 - begin,) if target else ()
            instructions.append(Instruction(int(address, 16) - begin * 16, *fields, targets))
        found.append(instructions)
        begin = end
    return found


def successors(code):
    """For each instruction those that may follow it, by index; calls return."""
    for i, instruction in enumerate(code):
        falls_through = instruction.predicate is not None
        branches = instruction.is_one_of("BRA", "BRX", "BRXU", "JMP", "JMX", "CALL") and not instruction.is_call
        if instruction.is_one_of("BRA"):  # BRA.U P0 and BRA.DIV are conditional
            falls_through |= instruction.operation != "BRA" or bool(re.match(r"\s*!?U?P\d", instruction.operands))
        elif instruction.is_one_of("WARPSYNC"):
            branches = falls_through = True
        elif not branches and not instruction.is_one_of("EXIT", "RET"):
            falls_through = True
        following = set(instruction.targets) if branches else set()
        if falls_through and i + 1 < len(code):
            following.add(i + 1)
        yield sorted(following)


def loops_of(code):
    """The outermost loops, each a sorted list of indices."""
    return components(list(successors(code)))


def components(following):
    """The strongly connected components of more than a node, by Tarjan; ``following``: of each node those next."""
    order, lowest, on_stack, stack, loops = {}, {}, set(), [], []
    for root in range(len(following)):
        if root in order:
            continue
        work = [(root, iter(following[root]))]
        order[root] = lowest[root] = len(order)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, rest = work[-1]
            for successor in rest:
                if successor not in order:
                    order[successor] = lowest[successor] = len(order)
                    stack.append(successor)
                    on_stack.add(successor)
                    work.append((successor, iter(following[successor])))
                    break
                if successor in on_stack:
                    lowest[node] = min(lowest[node], order[successor])
            else:
                work.pop()
                if work:
                    lowest[work[-1][0]] = min(lowest[work[-1][0]], lowest[node])
                if lowest[node] == order[node]:
                    at = stack.index(node)
                    loop, stack[at:] = sorted(stack[at:]), []
                    on_stack.difference_update(loop)
                    if len(loop) > 1 or node in following[node]:
                        loops.append(loop)
    return loops


def fewest_instructions(code, *stops):
    """On the shortest way from the first one to one for which the last of ``stops`` holds, by way of the others."""
    following, reached = list(successors(code)), {0: 1}
    for stop in stops:
        ways, seen, reached = [(count, i) for i, count in reached.items()], set(), {}
        heapq.heapify(ways)
        while ways:
            count, i = heapq.heappop(ways)
            if i in seen:
                continue
            seen.add(i)
            if stop(i):
                reached[i] = count
            else:
                for j in following[i]:
                    heapq.heappush(ways, (count + 1, j))
    return min(reached.values())


def is_global(instruction):
    """Whether it accesses global memory, or memory of a kind that is known only when it runs."""
    return instruction.is_one_of("LDG", "STG", "LD", "ST", "LDGSTS", "UBLKCP")


def bits_of(instruction):
    """The width of an access."""
    suffixes = instruction.operation.split(".")
    widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return next((widths[suffix] for suffix in suffixes if suffix in widths), 32)


def innermost_loops(code):
    """The loops that hold no other: of each, what is left when nothing goes back to where it is entered."""

    def innermost(loop, following):
        inside = set(loop)
        entries = {j for i, targets in enumerate(following) if i not in inside for j in targets} & inside
        rest = [[j for j in targets if i in inside and j in inside - entries] for i, targets in enumerate(following)]
        inner = components(rest) if entries else []  # nothing enters what follows the code: a branch to itself
        return [found for part in inner for found in innermost(part, rest)] if inner else [loop]

    following = list(successors(code))
    return [found for loop in components(following) for found in innermost(loop, following)]


def registers_of(operands):
    return {int(number) for number in re.findall(r"\bR(\d+)\b", operands)}


def loads_under_way(code, loop, counts=lambda load: bits_of(load) == 128):
    """Loads of global memory, those that `counts` is true of, that a thread has under way, at most, as it waits for one
    of them."""
    pending, most = [], 0
    for i in [*loop, *loop]:  # the first time round without those of the turn before
        touched = registers_of(code[i].operands)
        if any(touched & loaded for loaded in pending):
            most = max(most, len(pending))
            pending = [loaded for loaded in pending if not touched & loaded]
        if code[i].is_one_of("LDG") and counts(code[i]):
            first = int(re.search(r"\bR(\d+)\b", code[i].operands)[1])
            pending.append(set(range(first, first + max(1, bits_of(code[i]) // 32))))
    return most
