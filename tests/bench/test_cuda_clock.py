"""The GPU's clock on a simulated device, whose queue runs concurrently with the host."""

from types import SimpleNamespace

import pytest
from _harness import timing

CYCLES_PER_MS = 2e6


class Simulation:
    """torch.cuda with a host and a device clock, in milliseconds; `events` has what happened."""

    def __init__(self):
        self.host = self.device = 0.0
        self.events = []

    def work(self, name, milliseconds):
        """Queued by the host, done by the device when it comes to it."""
        self.events.append(name)
        self.device = max(self.device, self.host) + milliseconds

    def synchronize(self):
        self.events.append("synchronize")
        self.host = max(self.host, self.device)

    def _sleep(self, cycles):
        self.work("spin", cycles / CYCLES_PER_MS)

    def Event(self, enable_timing):  # noqa: N802
        assert enable_timing
        simulation = self

        class Event:
            def record(self):
                simulation.events.append("event")
                self.at = max(simulation.device, simulation.host)

            def query(self):
                return simulation.host >= self.at

            def elapsed_time(self, end):
                return end.at - self.at

        return Event()

    def current_device(self):
        return 0

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=50 << 20)

    def empty(self, size, dtype, device):
        assert size == 100 << 20 and device == "cuda"
        return SimpleNamespace(zero_=lambda: self.work("scrub", 0.05))

    def call(self, launch, work, waits=False):
        """A call whose host side takes `launch` ms and whose kernels take `work` ms."""

        def call():
            self.host += launch
            self.work("kernels", work)
            if waits:
                self.host = max(self.host, self.device)

        return call


@pytest.fixture
def gpu(monkeypatch):
    simulation = Simulation()
    torch = SimpleNamespace(cuda=simulation, empty=simulation.empty, int8=None)
    monkeypatch.setattr(timing, "torch", torch)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: simulation.host / 1e3)
    return simulation


def test_short_kernels_are_not_timed_at_the_speed_of_their_launches(gpu):
    clock = timing.CudaClock()
    assert clock(gpu.call(launch=0.2, work=0.01)) == pytest.approx(0.01)
    assert clock.launch_ms == pytest.approx(0.2)
    assert gpu.events == [
        "scrub", "synchronize", "spin", "event", "kernels", "event", "synchronize",
    ]  # fmt: skip


def test_the_device_spins_until_a_slow_host_has_launched_everything(gpu):
    clock, call = timing.CudaClock(), gpu.call(launch=7.0, work=0.5)
    assert clock(call) == pytest.approx(0.5)
    tries = gpu.events.count("spin")
    assert tries == 3  # 0.5, 2 and 8 ms
    assert clock(call) == pytest.approx(0.5)
    assert gpu.events.count("spin") == tries + 1  # remembered


def test_long_kernels_take_their_time(gpu):
    assert timing.CudaClock()(gpu.call(launch=0.1, work=30.0)) == pytest.approx(30.0)


def test_a_call_that_waits_for_the_device_ends_all_the_same(gpu):
    clock, call = timing.CudaClock(), gpu.call(launch=0.1, work=2.0, waits=True)
    assert clock(call) == pytest.approx(2.0)
    tries = gpu.events.count("spin")
    assert clock(call) == pytest.approx(2.0)
    assert gpu.events.count("spin") == tries + 1


def test_the_cache_stays_warm_where_asked(gpu):
    clock = timing.CudaClock(cold=False)
    clock(gpu.call(launch=0.1, work=0.1))
    assert "scrub" not in gpu.events


def test_launch_times_are_collected_beside_the_times(gpu):
    launches = {}
    calls = {"quick": gpu.call(0.1, 1.0), "slow": gpu.call(0.3, 2.0)}
    times = timing.alternate(
        calls, device="cuda", min_rounds=2, max_rounds=2, budget_s=0.0, launches=launches
    )
    assert times == {"quick": pytest.approx([1.0] * 2), "slow": pytest.approx([2.0] * 2)}
    assert launches == {"quick": pytest.approx([0.1] * 2), "slow": pytest.approx([0.3] * 2)}
