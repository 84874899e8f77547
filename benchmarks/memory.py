"""Peak memory of one training step, as the operating system sees it.

Each measurement is a process of its own: it prepares the operands, runs a small step so that code
and thread pools are in place, asks Linux to forget the resident-set high-water mark
(/proc/self/clear_refs), runs the step once and reads the mark (VmHWM). So everything counts: saved
activations, gradients, library buffers and the scratch of our kernels, which no tensor statistics
would show.

    python -m xattn_ops.benchmarks.memory ipsa 0 8 float32 fused cpu
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

Step = Callable[[], tuple[Tensor, ...]]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Peak:
    """Bytes a step needs beyond its operands, with the gradients and the output among them."""

    operator: str
    shape: str
    batch: int
    dtype: str
    variant: str
    peak_bytes: int
    result_bytes: int  # output and gradients: no implementation can do with less
    dense_bytes: int  # one attention matrix of all units
    tokens: int  # of one image; 0 where it makes no sense

    @property
    def bytes_per_token(self) -> float | None:
        """The same at every size where memory is linear in the number of tokens."""
        return self.peak_bytes / (self.batch * self.tokens) if self.tokens else None


def available(device: str = "cpu") -> str:
    """Why peak memory cannot be measured here, or ""."""
    if device == "cpu" and not (STATUS.exists() and CLEAR.exists()):
        return "needs Linux's /proc/self/clear_refs"
    return ""


def measure(
    operator: str,
    stage: int,
    batch: int,
    dtype: str,
    variant: str,
    threads: int | None = None,
    device: str = "cpu",
) -> Peak:
    """Run the step in a fresh process and return its peak.

    Raises:
        RuntimeError: the process failed; the message carries its last line.
    """
    command = [sys.executable, "-m", __name__, operator, str(stage), str(batch), dtype, variant]
    command += [device, *([] if threads is None else [str(threads)])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the memory run of {operator} ({variant}) failed: {last}")
    return Peak(**json.loads(done.stdout.strip().splitlines()[-1]))


def peak_of_step(
    operator: str, stage: int, batch: int, dtype: str, variant: str, device: str = "cpu"
) -> Peak:
    """Measure in this process, which should be fresh: memory it has freed before hides a peak."""
    from xattn_ops.benchmarks import cases

    case = cases.build(operator, stage, batch, getattr(torch, dtype), cases.STEP, device)
    chosen = {**case.ours, **case.plain}[variant]
    small = cases.build(operator, stage, 1, getattr(torch, dtype), cases.STEP, device)
    warm = {**small.ours, **small.plain}[variant]
    outputs = warm.forward()
    warm.step([torch.ones_like(out) for out in outputs])
    shapes = [(case.batch, *out.shape[1:]) for out in outputs]
    grads = [torch.ones(shape, dtype=case.dtype, device=device) for shape in shapes]
    del small, warm, outputs
    gc.collect()
    results, peak = (_on_cuda if device == "cuda" else _on_cpu)(lambda: chosen.step(grads))
    return Peak(
        operator=case.operator,
        shape=case.shape,
        batch=case.batch,
        dtype=dtype,
        variant=variant,
        peak_bytes=peak,
        result_bytes=sum(t.numel() * t.element_size() for t in results),
        dense_bytes=case.dense_bytes,
        tokens=case.tokens,
    )


def _on_cpu(step: Step) -> tuple[tuple[Tensor, ...], int]:
    """What the step gives, and how far the process grew beyond what it had."""
    _give_back()
    before = _status("VmRSS")
    CLEAR.write_text("5")
    results = step()
    return results, _status("VmHWM") - before


def _on_cuda(step: Step) -> tuple[tuple[Tensor, ...], int]:
    """The same of torch's allocator, where all of a CUDA step's memory comes from."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = step()
    torch.cuda.synchronize()
    return results, torch.cuda.max_memory_allocated() - before


def _give_back() -> None:
    """Return freed heap to the system (glibc), so that the step pays for what it takes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(key: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in {STATUS}")


def main(arguments: list[str]) -> None:
    operator, stage, batch, dtype, variant, device, *threads = arguments
    if threads:
        torch.set_num_threads(int(threads[0]))
    peak = peak_of_step(operator, int(stage), int(batch), dtype, variant, device)
    print(json.dumps(asdict(peak)))


if __name__ == "__main__":
    main(sys.argv[1:])
