"""A device with a clock and a memory of its own, on the CPU: it says what was launched, copied and waited for, and in
what order."""

import torch

from modeling.runtime.gpu.graphs import Recorder

UNREAD = -7_777_777
"""What stands where a copy has not arrived."""


class FakeDownload:
    """Copies of the values that the tensors have now; to be seen only after the wait."""

    def __init__(self, device: "FakeDevice") -> None:
        self._device = device
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.number = device.downloads
        device.downloads += 1

    def add(self, tensor):
        host = torch.full_like(tensor, True if tensor.dtype == torch.bool else UNREAD)
        self._copies.append((host, tensor.clone()))
        self._device.log("copy", self.number)
        return host

    def seal(self):
        self._there_at = self._device.busy_until
        self._device.log("seal", self.number)

    def wait(self):
        self._device.log("wait", self.number)
        self._device.now = max(self._device.now, self._there_at)
        with torch.inference_mode():
            for host, value in self._copies:
                host.copy_(value)


class FakeRecorder:
    """Replays by calling, and has each replay take the device `step_s`."""

    def __init__(self, device: "FakeDevice") -> None:
        self._device = device
        self.sizes: list[int] = []

    def __call__(self, function):
        output = function()
        size = len(output)
        self.sizes.append(size)

        def replay():
            self._device.run(size)
            output.copy_(function())

        return replay, output


class FakeDevice:
    """Named as a GPU, so that its memory is planned.

    `now` is the host's clock: it moves when a test says so and when somebody waits. `busy_until` is when the device has
    done all that was launched. Sizes are bytes.
    """

    depth = 1

    def __init__(
        self, *, step_s: float = 1.0, total: int = 2**33, logit_rows: int = 4, peak: int = 2**20
    ) -> None:
        self.name = "cuda:0"
        self.torch_device = torch.device("cpu")
        self.logit_rows = logit_rows
        self.total = total
        self.others = 0
        """Bytes of the memory that other processes have."""
        self.peak = peak
        self.now = self.busy_until = 0.0
        self.events: list[tuple[str, int]] = []
        self.downloads = 0
        self.released = 0
        self.recorded: FakeRecorder | None = None
        self._step_s = step_s

    def log(self, what: str, number: int) -> None:
        self.events.append((what, number))

    def run(self, size: int) -> None:
        self.log("replay", size)
        self.busy_until = max(self.busy_until, self.now) + self._step_s

    def download(self) -> FakeDownload:
        return FakeDownload(self)

    def recorder(self) -> Recorder | None:
        self.recorded = FakeRecorder(self)
        return self.recorded

    def free_memory(self) -> int:
        return self.total - self.others

    def total_memory(self) -> int:
        return self.total

    def peak_memory(self, work) -> int:
        work()
        return self.peak

    def release_memory(self) -> None:
        self.released += 1


class NoWaitingMode(torch.overrides.TorchFunctionMode):
    """On a GPU each of these calls waits for the device; on a CPU nobody would notice."""

    FORBIDDEN = (
        "item",
        "tolist",
        "cpu",
        "numpy",
        "nonzero",
        "masked_select",
        "__bool__",
        "__int__",
        "__float__",
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        if name in ("tensor", "as_tensor"):
            assert kwargs.get("device") is None, f"{name}(device=...) waits for the device"
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            masks = [i for i in index if isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, "indexing by a mask waits for the device"
            if name == "__setitem__" and not isinstance(args[2], torch.Tensor):
                # What only slices choose, and is more than one number, is filled by the device.
                one = all(isinstance(i, int) for i in index) and len(index) == args[0].dim()
                listed = any(isinstance(i, torch.Tensor) for i in index)
                assert not one and not listed, "a number that is assigned is copied from the host, and waits"
        return func(*args, **kwargs)
