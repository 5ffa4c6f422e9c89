"""Executes a kernel: its grid in batches of blocks, each batch by all its lanes at once."""

from collections.abc import Callable

import numpy as np

from .control_flow import Execution
from .errors import ProgramError
from .lanes import WARP, Lanes, Layout
from .mbarrier_instructions import SharedBarriers
from .memory import WINDOWS, GlobalMemory, ParameterMemory, SharedMemory
from .observer import Access, Observer
from .pending import Pending
from .program import Program, Step
from .schedule import Schedule

# Bounds of a batch: threads, and bytes of shared memory.
MOST_LANES = 1 << 16
MOST_SHARED = 1 << 26


def launch(
    program: Program,
    grid: tuple[int, int, int],
    parameters: np.ndarray,
    memory: GlobalMemory,
    *,
    block: tuple[int, int, int] | None = None,
    dynamic_shared: int = 0,
    schedule: Schedule | None = None,
    observers: tuple[Observer, ...] = (),
) -> None:
    """Run a kernel to its end.

    parameters is the block that `Program.pack` makes; block may be left out where the kernel
    states it. Raises ProgramError where the program does what no GPU could do.
    """
    schedule = schedule or Schedule()
    block = block or program.kernel.block_size
    stated = program.kernel.block_size
    if block is None or (stated is not None and tuple(block) != stated):
        raise ValueError(f"{program.kernel.name} needs blocks of {stated}, got {block}")
    threads = int(np.prod(block))
    for name, array in program.constants.items():
        memory.register_array(name, array)
    shared = program.static_shared + dynamic_shared
    count = int(np.prod(grid))
    most = max(1, min(MOST_LANES // threads, MOST_SHARED // max(1, shared)))
    size = schedule.batch_size(count, most)
    order = schedule.block_order(count)
    for start in range(0, count, size):
        numbers = order[start : start + size]
        batch = Batch(program, grid, block, numbers, parameters, memory, shared, schedule)
        batch.run(observers)


class Batch:
    """Blocks that run at once: registers, shared memory, and what they share with the others.

    registers holds one array over all slots for each register that has been written.
    """

    def __init__(self, program, grid, block, numbers, parameters, memory, shared, schedule):
        self.program, self.grid, self.block_size = program, grid, block
        self.schedule = schedule
        coordinates = np.stack(
            [numbers % grid[0], numbers // grid[0] % grid[1], numbers // (grid[0] * grid[1])], 1
        )
        warps = -(-int(np.prod(block)) // WARP)
        self.numbers = numbers
        self.layout = Layout(coordinates, schedule.warp_order(numbers, warps), block)
        self.registers: list[np.ndarray | None] = [None] * len(program.kernel.register_types)
        self.shared = SharedMemory(len(numbers), shared)
        self.memory = {
            "global": memory,
            "shared": self.shared,
            "param": ParameterMemory(parameters),
        }
        self.pending = {kind: Pending(self, kind) for kind in ("cp.async", "wgmma", "bulk")}
        self.mbarriers = SharedBarriers()
        # Bulk copies that an mbarrier waits for and that have not arrived.
        self.under_way: list[Callable[[], None]] = []
        self.observers: tuple[Observer, ...] = ()
        self._special: dict[str, np.ndarray] = {}

    def run(self, observers: tuple[Observer, ...]) -> None:
        self.observers = observers
        for observer in observers:
            observer.batch_begins(self)
        with np.errstate(all="ignore"):
            Execution(self, self.program.steps, self.schedule.warps == "apart").run()
            self.deliver()
        for observer in observers:
            observer.batch_ends(self)

    # Called by the execution and by operations.

    def execute(self, step: Step, lanes: Lanes) -> None:
        for observer in self.observers:
            observer.executes(step, lanes)
        step.operation(lanes)

    def guards(self, step: Step, lanes: Lanes) -> None:
        for observer in self.observers:
            observer.guards(step, lanes)

    def observe(self, step: Step, lanes: Lanes) -> None:
        for observer in self.observers:
            observer.executes(step, lanes)

    def access(self, access: Access) -> None:
        for observer in self.observers:
            observer.accesses(access)

    def synchronized(self, step: Step, lanes: Lanes) -> None:
        for observer in self.observers:
            observer.synchronizes(step, lanes)

    def reports(self, lanes: Lanes, barriers: np.ndarray) -> None:
        for observer in self.observers:
            observer.reports(lanes, barriers)

    def hears(self, block: int, barrier: int, lanes: Lanes) -> None:
        for observer in self.observers:
            observer.hears(block, barrier, lanes)

    def completed(self, access: Access, done: np.ndarray) -> None:
        for observer in self.observers:
            observer.completes(access, done)

    def fenced(self, fence: str, lanes: Lanes) -> None:
        for observer in self.observers:
            observer.fences(fence, lanes)

    def initializes(self, objects: np.ndarray) -> None:
        for observer in self.observers:
            observer.initializes(objects)

    def arrives(
        self, lanes: Lanes, objects: np.ndarray, phases: np.ndarray, copied: bool = False
    ) -> None:
        for observer in self.observers:
            observer.arrives(lanes, objects, phases, copied)

    def passes(self, lanes: Lanes, objects: np.ndarray, phases: np.ndarray) -> None:
        for observer in self.observers:
            observer.passes(lanes, objects, phases)

    def deliver(self) -> bool:
        """Let bulk copies arrive; whether any were under way."""
        arriving, self.under_way = self.under_way, []
        for arrive in arriving:
            arrive()
        return bool(arriving)

    def ends(self, lanes: Lanes) -> None:
        """`lanes` have ended: what they never waited for takes effect."""
        for pending in self.pending.values():
            pending.commit(lanes)
            pending.wait(lanes, 0)

    def where(self, step: Step) -> str:
        instruction = step.instruction
        return f"{self.program.kernel.name}, line {instruction.line}, {instruction.text!r}"

    def window(self, space: str) -> int:
        if space not in WINDOWS:
            raise ProgramError(f"{self.program.kernel.name}: the space {space} has no window")
        return WINDOWS[space]

    def special(self, name: str) -> np.ndarray:
        """A special register over all slots."""
        if name not in self._special:
            self._special[name] = self._compute_special(name).astype(np.uint64)
        return self._special[name]

    def _compute_special(self, name: str) -> np.ndarray:
        layout, (bx, by, _) = self.layout, self.block_size
        kind, _, axis = name[1:].partition(".")
        axes = {"x": 0, "y": 1, "z": 2}
        if kind == "tid" and axis:
            thread = layout.thread
            return (thread % bx, thread // bx % by, thread // (bx * by))[axes[axis]]
        if kind == "ctaid" and axis:
            return layout.blocks[layout.block, axes[axis]]
        constants = {"ntid": self.block_size, "nctaid": self.grid, "cluster_ctaid": (0, 0, 0),
                     "cluster_nctaid": (1, 1, 1)}  # fmt: skip
        if kind in constants and axis:
            return np.full(layout.size, constants[kind][axes[axis]])
        if kind == "laneid":
            return layout.lane
        if kind == "warpid":
            return layout.warp
        if kind in ("cluster_ctarank", "clusterid"):
            return np.zeros(layout.size, np.int64)
        if kind == "dynamic_smem_size":
            return np.full(layout.size, self.shared.size - self.program.static_shared)
        if kind.startswith("lanemask_"):
            one = np.uint64(1) << layout.lane.astype(np.uint64)
            below, equal = one - np.uint64(1), one
            full = np.uint64(0xFFFFFFFF)
            return {"eq": equal, "lt": below, "le": below | equal,
                    "ge": full ^ below, "gt": full ^ below ^ equal}[kind[9:]]  # fmt: skip
        raise ProgramError(f"the special register {name} is not implemented")
